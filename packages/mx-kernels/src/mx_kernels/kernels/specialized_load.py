"""The warps of ``specialized.py`` that load, and what a descriptor for the copy engine (TMA) is made of.

A stage of the ring holds a step of 64 columns: rows of x, 64 weight rows for each warpgroup that multiplies, their scales (where boxes
bring them, an even step those of two). Who multiplies waits for ``full`` and arrives
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
PART: gl.constexpr = gl.constexpr(64)  # weight rows of a warpgroup that multiplies
TABLE: gl.constexpr = gl.constexpr(1024)  # blocks whose place is looked up
LINES: gl.constexpr = gl.constexpr(16)  # of codes, of 32 words, that one copy of the engine brings: four strips


def box_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """Of a box in shared memory: rows of 128 bytes, of words (32) or of bf16 (64), or one row of words (scales)."""
    return gl.NVMMASharedLayout(0, 32, 2) if rows == 1 else gl.NVMMASharedLayout(128, 1024 // columns, 2)


def descriptor(base: Tensor | int, shape: tuple[int, int], box: tuple[int, int]) -> TensorDescriptor:
    """A contiguous matrix of words or bf16, or what lies at an address, for the copy engine."""
    dtype = torch.int32 if box[0] == 1 or box[1] == 32 else torch.bfloat16
    held = base.view(dtype) if isinstance(base, Tensor) else Address(base, dtype)
    return TensorDescriptor(held, [*shape], [shape[1], 1], [*box], box_layout(*box))


@gluon.constexpr_function
def levels_of(BM):
    """Numbers of pairs that there are loops for in blocks of BM: a block takes the first that holds its own."""
    return (64, 96, 128, 160) if BM == 160 else (BM // 4, BM // 2, BM)


@gluon.constexpr_function
def box_of(BM):
    """Rows of x that one copy of the engine brings."""
    return 32 if BM == 160 else 64


@gluon.constexpr_function
def main_of(N):
    """Of N pairs those of the first product: the largest power of two."""
    return 1 << (N.bit_length() - 1)


@gluon.jit
def rows_of(xs, xt, stage, FIRST: gl.constexpr, N: gl.constexpr):
    """Rows FIRST to FIRST + N - 1 of a stage; those past a power of two have memory of their own."""
    if xs.shape[1] == FIRST:
        return xt.index(stage).slice(0, N, 0)
    else:
        return xs.index(stage).slice(FIRST, N, 0)


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The stage behind, and its phase."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def level_of(sorted_ids, block, pairs, BM: gl.constexpr):
    """Which of ``levels_of`` a block takes."""
    LEVELS: gl.constexpr = levels_of(BM)
    level = block * 0
    for i in gl.static_range(len(LEVELS) - 1):
        level += (gl.load(sorted_ids + block * BM + LEVELS[i]) < pairs).to(gl.int32)
    return level


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
    tile = t - block * tiles
    if blocks <= TABLE:
        e = _entry(ids, block)
        run = _entry(runs, block)
        start = run % TABLE
        size = run // TABLE % (2 * TABLE)
        if size > 1:
            together = gl.cdiv(size, gl.cdiv(size, group))
            at = t - start * tiles
            first = at // (together * tiles) * together
            width = gl.minimum(size - first, together)
            at -= first * tiles
            tile = at // width
            block = start + first + at - tile * width
            run = _entry(runs, block)
        level = run // (2 * TABLE * TABLE)
    else:
        e = gl.load(expert_ids + block)
        level = level_of(sorted_ids, block, pairs, BM)
    return block, tile, e, level


@gluon.jit
def half_of(step, k, TAIL: gl.constexpr):
    """Which half of its 128 columns a step takes."""
    second = step & 1
    if TAIL:
        second |= (step * BK >= k - BK).to(gl.int32)
    return second


@gluon.jit
def _scales_at(step, s_step, k, BLOCK: gl.constexpr, TAIL: gl.constexpr):
    """Where a step's scales begin, in words."""
    s0 = (step >> 1) * (s_step // 4)
    if BLOCK == 16:
        s0 += half_of(step, k, TAIL)
    return s0


@gluon.jit
def _load_rows(
    x, w, s, sorted_ids, first, strip0, w_step, s_step, k, x_stride, pairs, stage, phase, ring,
    N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """Copy all steps of a tile with N pairs, whose rows of x lie anywhere. w, s: the expert's."""
    xs, _, ws, ss, full, empty = ring
    ROWS: gl.constexpr = 2 * PART
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
    row = strip0 * 16 + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    s_from = s.to(gl.pointer_type(gl.int32)) + row * (32 // BLOCK)
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        _copy(xs.index(stage).slice(0, N, 0), x_from)
        _copy(ws.index(stage), w_from)
        _copy(ss.index(stage), s_from + _scales_at(step, s_step, k, BLOCK, TAIL))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = following(stage, phase, STAGES)
        # addresses go on by what the next step is away: nothing is computed anew while copies wait for their registers
        by = BK
        if TAIL:
            by = gl.minimum(BK, k - BK - k0)
        k0 += by
        x_from += by
        w_from += by // UNIT * w_step
    return stage, phase


@gluon.jit
def _load_boxes(
    x, w, s, first, w_row, s_row, strip0, w_step, k, stage, phase, ring,
    N: gl.constexpr, BOX: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The same where the rows of x lie together, all by the copy engine. w_row, s_row: where the tile's codes and scales begin."""
    xs, xt, ws, ss, full, empty = ring
    UNITS: gl.constexpr = 1 if KIND == "e2m1" else 2  # of a step's columns, each a tile of ``packing.py``
    WORDS: gl.constexpr = 32 // BLOCK  # of scales of a row and 128 columns
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        if KIND == "":
            mbarrier.expect(full.index(stage), 2 * (N + GROUPS * PART) * BK)
            for g in gl.static_range(GROUPS):
                _copy_box(w, [w_row + g * PART, k0], full.index(stage), ws.index(stage * GROUPS + g))
        else:
            CODES: gl.constexpr = 2 * N * BK + GROUPS * PART * UNITS * 32
            even = step % 2 == 0  # its scales are those of the odd step behind too
            mbarrier.expect(full.index(stage), CODES + GROUPS * PART * WORDS * 4, pred=even)
            mbarrier.expect(full.index(stage), CODES, pred=step % 2 == 1)
            for g in gl.static_range(GROUPS):
                place = stage * GROUPS + g
                for i in gl.static_range(UNITS):
                    row = w_row + g * LINES + (k0 * UNITS // BK + i) * (w_step // 32)
                    _copy_box(w, [row, 0], full.index(stage), ws.index(place).slice(i * LINES, LINES, 0))
                at = [s_row + step // 2, (strip0 * 16 + g * PART) * WORDS]
                _copy_box(s, at, full.index(stage), ss.index(place), pred=even)
        for i in gl.static_range(N // BOX):
            _copy_box(x, [first + i * BOX, k0], full.index(stage), rows_of(xs, xt, stage, i * BOX, BOX))
        stage, phase = following(stage, phase, STAGES)
        k0 += BK
        if TAIL:
            k0 = gl.minimum(k0, k - BK)
    return stage, phase


@gluon.jit
def loader(
    given, BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """Who loads: all tiles of the program, as many pairs of a block as it has, rounded up to a level."""
    (
        x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group,
        runs, ids, xs, xt, ws, ss, full, empty,
    ) = given  # fmt: skip
    LEVELS: gl.constexpr = levels_of(BM)
    STRIPS: gl.constexpr = GROUPS * PART // 16
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips, STRIPS)
    ring = (xs, xt, ws, ss, full, empty)
    stage = 0
    phase = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, tile, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        first = block * BM
        if (e >= 0) & (e < experts):
            strip0 = gl.minimum(tile * STRIPS, strips - STRIPS)
            if TOP_K > 0:
                of_w = w + e.to(gl.int64) * w_expert
                of_s = s + e.to(gl.int64) * s_expert
                args = (x, of_w, of_s, sorted_ids, first, strip0, w_step, s_step, k, x_stride, pairs)
                for i in gl.static_range(len(LEVELS)):
                    if level == i:
                        stage, phase = _load_rows(
                            *args, stage, phase, ring, LEVELS[i], KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K
                        )
            else:
                if KIND == "":
                    w_row = (e * strips + strip0) * 16
                else:  # rows of 32 words, four a strip
                    w_row = e * (w_expert // 32) + strip0 * 4
                boxes = (x, w, s, first, w_row, e * s_expert, strip0, w_step, k)
                for i in gl.static_range(len(LEVELS)):
                    if level == i:
                        stage, phase = _load_boxes(
                            *boxes, stage, phase, ring, LEVELS[i], box_of(BM), GROUPS, KIND, BLOCK, TAIL, STAGES
                        )
