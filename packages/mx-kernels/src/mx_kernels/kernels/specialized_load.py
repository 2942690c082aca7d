"""The warps of ``specialized.py`` that load, and what a descriptor for the copy engine (TMA) is made of.

A stage of the ring holds a step of 64 columns: rows of x, 128 weight rows, their scales. Who multiplies waits for ``full`` and arrives
at ``empty``; who loads the other way around.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Address

# Names that changed after Triton 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_reinterpret = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret

BK: gl.constexpr = gl.constexpr(64)
ROWS: gl.constexpr = gl.constexpr(128)
BOX: gl.constexpr = gl.constexpr(64)  # rows of x that one copy of the engine brings
TABLE: gl.constexpr = gl.constexpr(1024)  # blocks whose place is looked up
LINES: gl.constexpr = gl.constexpr(16)  # of codes, likewise, of 32 words: four strips


def box_layout(columns: int) -> gl.NVMMASharedLayout:
    """Of a box in shared memory: its rows are 128 bytes, of words (32) or of bf16 (64)."""
    return gl.NVMMASharedLayout(128, 1024 // columns, 2)


def descriptor(base: Tensor | int, shape: tuple[int, int], box: tuple[int, int]) -> TensorDescriptor:
    """A contiguous matrix of words or bf16, or what lies at an address, for the copy engine."""
    held = base if isinstance(base, Tensor) else Address(base, torch.int32 if box[1] == 32 else torch.bfloat16)
    return TensorDescriptor(held, [*shape], [shape[1], 1], [*box], box_layout(box[1]))


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def level_of(sorted_ids, block, pairs, BM: gl.constexpr):
    """2 where a block has more than half of BM pairs, 1 where more than a quarter, else 0."""
    half = gl.load(sorted_ids + block * BM + BM // 2) < pairs
    quarter = gl.load(sorted_ids + block * BM + BM // 4) < pairs
    return half.to(gl.int32) + quarter.to(gl.int32)


@gluon.jit
def fill_tables(runs, ids, sorted_ids, expert_ids, blocks, pairs, BM: gl.constexpr):
    """What ``piece`` looks up of the first TABLE blocks: where the blocks of its expert begin and their number, its level; its expert."""
    L: gl.constexpr = gl.BlockedLayout([TABLE // 128], [32], [4], [0])
    b = gl.arange(0, TABLE, L)
    there = b < blocks
    e = gl.load(expert_ids + b, mask=there, other=-1)
    before = gl.load(expert_ids + b - 1, mask=there & (b > 0), other=-2)
    behind = gl.load(expert_ids + b + 1, mask=b + 1 < blocks, other=-2)
    start = gl.associative_scan(gl.where(e != before, b, 0), 0, _larger)
    end = gl.associative_scan(gl.where(e != behind, b + 1, TABLE), 0, _smaller, reverse=True)
    level = level_of(sorted_ids, gl.where(there, b, 0), pairs, BM)
    runs.store(start + (end - start) * TABLE + level * (2 * TABLE * TABLE))
    ids.store(e)


@gluon.jit
def _entry(table, i):
    """A number of a table in shared memory."""
    one = _reinterpret(table, gl.int32, [TABLE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(i)
    return gl.max(one.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM: gl.constexpr):
    """The t-th piece of work: its block, weight tile and expert, and how full the block is.

    The blocks of one expert walk the weight tiles together, up to ``group`` of them, so that a tile is read once for all; past
    TABLE blocks each walks them alone.
    """
    block = t // tiles
    tile = t % tiles
    if blocks <= TABLE:
        e = _entry(ids, block)
        run = _entry(runs, block)
        start = run % TABLE
        size = run // TABLE % (2 * TABLE)
        together = gl.cdiv(size, gl.cdiv(size, group))
        at = t - start * tiles
        first = at // (together * tiles) * together
        width = gl.minimum(size - first, together)
        at -= first * tiles
        block = start + first + at % width
        tile = at // width
        level = _entry(runs, block) // (2 * TABLE * TABLE)
    else:
        e = gl.load(expert_ids + block)
        level = level_of(sorted_ids, block, pairs, BM)
    return block, tile, e, level


@gluon.jit
def half_of(step, k, TAIL: gl.constexpr):
    """Which half of its 128 columns a step takes."""
    second = step % 2
    if TAIL:
        second |= (step * BK >= k - BK).to(gl.int32)
    return second


@gluon.jit
def _scales_of(s, strip0, BLOCK: gl.constexpr):
    """Addresses of the words of scales of a tile's rows, one a loading thread."""
    row = strip0 * 16 + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return s.to(gl.pointer_type(gl.int32)) + row * (32 // BLOCK)


@gluon.jit
def _load_scales(ss, s_from, step, s_step, k, full, BLOCK: gl.constexpr, TAIL: gl.constexpr):
    """Copy a step's scales, and arrive when this thread's copies have come."""
    s0 = step // 2 * (s_step // 4)
    if BLOCK == 16:
        s0 += half_of(step, k, TAIL)
    _copy(ss, s_from + s0)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _load_rows(
    x, w, s, sorted_ids, first, strip0, w_step, s_step, k, x_stride, pairs, it, ring,
    N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """Copy all steps of a tile with N pairs, whose rows of x lie anywhere; ``it`` counts steps. w, s: the expert's."""
    xs, ws, ss, full, empty = ring
    WARPS: gl.constexpr = gl.num_warps()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    UNIT: gl.constexpr = 64 if KIND == "e2m1" else 32
    pair = gl.load(sorted_ids + first + gl.arange(0, N, gl.SliceLayout(1, COPY)))
    at = gl.where(pair < pairs, pair, 0) // TOP_K
    if WIDE:
        at = at.to(gl.int64)
    x_from = x + ((at * x_stride)[:, None] + gl.arange(0, BK, gl.SliceLayout(0, COPY))[None, :])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    part = gl.arange(0, BK // UNIT, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None] * w_step
    strip = strip0 + gl.arange(0, ROWS // 16, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    w_from = w + (part + strip * 128 + gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :])
    s_from = _scales_of(s, strip0, BLOCK)
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), (it // STAGES & 1) ^ 1)
        _copy(xs.index(stage).slice(0, N, 0), x_from)
        _copy(ws.index(stage), w_from)
        _load_scales(ss.index(stage), s_from, step, s_step, k, full.index(stage), BLOCK, TAIL)
        it += 1
        # addresses go on by what the next step is away: nothing is computed anew while copies wait for their registers
        by = BK
        if TAIL:
            by = gl.minimum(BK, k - BK - k0)
        k0 += by
        x_from += by
        w_from += by // UNIT * w_step
    return it


@gluon.jit
def _load_boxes(
    x, w, s, first, w_row, strip0, w_step, s_step, k, it, ring,
    N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The same where the rows of x lie together: by the copy engine, but for the scales. w_row: where the tile's weights begin."""
    xs, ws, ss, full, empty = ring
    PARTS: gl.constexpr = 1 if KIND == "e2m1" else 2  # of a step's columns, each a tile of ``packing.py``
    if KIND != "":
        s_from = _scales_of(s, strip0, BLOCK)
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), (it // STAGES & 1) ^ 1)
        if KIND == "":
            mbarrier.expect(full.index(stage), 2 * (N + ROWS) * BK)
            _copy_box(w, [w_row, k0], full.index(stage), ws.index(stage))
        else:
            mbarrier.expect(full.index(stage), 2 * N * BK + PARTS * ROWS * 32)
            for i in gl.static_range(ROWS // 64 * PARTS):  # all columns of the first four strips, then of the others
                row = w_row + (k0 * PARTS // BK + i % PARTS) * (w_step // 32) + i // PARTS * LINES
                _copy_box(w, [row, 0], full.index(stage), ws.index(stage).slice(i * LINES, LINES, 0))
        for i in gl.static_range(N // BOX):
            _copy_box(x, [first + i * BOX, k0], full.index(stage), xs.index(stage).slice(i * BOX, BOX, 0))
        if KIND != "":
            _load_scales(ss.index(stage), s_from, step, s_step, k, full.index(stage), BLOCK, TAIL)
        it += 1
        k0 += BK
        if TAIL:
            k0 = gl.minimum(k0, k - BK)
    return it


@gluon.jit
def loader(
    x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group,
    runs, ids, xs, ws, ss, full, empty,
    BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """The warpgroup that loads: all tiles of the program, as many pairs of a block as it has, rounded up to a level."""
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips * 16, ROWS)
    ring = (xs, ws, ss, full, empty)
    it = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, tile, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        first = block * BM
        if (e >= 0) & (e < experts):
            strip0 = gl.minimum(tile * (ROWS // 16), strips - ROWS // 16)
            of_s = s + e.to(gl.int64) * s_expert
            if TOP_K > 0:
                of_w = w + e.to(gl.int64) * w_expert
                args = (x, of_w, of_s, sorted_ids, first, strip0, w_step, s_step, k, x_stride, pairs, it, ring)
                if level == 2:
                    it = _load_rows(*args, BM, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)
                elif level == 1:
                    it = _load_rows(*args, BM // 2, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)
                else:
                    it = _load_rows(*args, BM // 4, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)
            else:
                if KIND == "":
                    w_row = (e * strips + strip0) * 16
                else:  # rows of 32 words, four a strip
                    w_row = e * (w_expert // 32) + strip0 * 4
                boxes = (x, w, of_s, first, w_row, strip0, w_step, s_step, k, it, ring)
                if level == 2:
                    it = _load_boxes(*boxes, BM, KIND, BLOCK, TAIL, STAGES)
                elif level == 1:
                    it = _load_boxes(*boxes, BM // 2, KIND, BLOCK, TAIL, STAGES)
                else:
                    it = _load_boxes(*boxes, BM // 4, KIND, BLOCK, TAIL, STAGES)
