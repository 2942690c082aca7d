"""The warps of ``specialized.py`` that load, and what a descriptor for the copy engine (TMA) is made of.

A stage of the ring holds a step of 64 columns: rows of x, 64 weight rows for each warpgroup that multiplies, and in an even step the
scales of two. Who multiplies waits for ``full`` and arrives at ``empty``; who loads the other way around, and nobody waits for its own
copies: the hardware arrives when a thread's have come. Two more rings hold what is known of a tile: ``jobs`` which it is, ``notes`` its
pairs, for whoever stores its results.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from .ahead import count_of, wait_for, wait_where
from .launch import Address

# Names that changed after Triton 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_reinterpret = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret

BK: gl.constexpr = gl.constexpr(64)
PART: gl.constexpr = gl.constexpr(64)  # weight rows of a warpgroup that multiplies
TABLE: gl.constexpr = gl.constexpr(1024)  # blocks whose place is looked up
COPIERS: gl.constexpr = gl.constexpr(64)  # threads that copy rows of x
LINES: gl.constexpr = gl.constexpr(16)  # of codes, of 32 words, that one copy of the engine brings: four strips
FULL: gl.constexpr = gl.constexpr(65536)  # in a table: over experts


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
    """Numbers of pairs that there are loops for in tiles of up to BM: a tile takes the first that holds its own. Each is one product a
    step, or two of a power of two pairs."""
    return (64, 96, 128, 160) if BM == 160 else (64, 128, 192, 256, 288)[: 5 if BM == 288 else 4]


@gluon.constexpr_function
def block_of(BM):
    """Pairs of a block, where tiles take up to BM: what is over, a last block of so few pairs joins the one in front."""
    return 256 if BM == 288 else BM


@gluon.constexpr_function
def full_of(BM):
    """The level of a full block."""
    return levels_of(BM).index(block_of(BM))


@gluon.constexpr_function
def box_of(BM):
    """Rows of x that one copy of the engine brings."""
    return 64 if BM == 256 else 32


@gluon.constexpr_function
def main_of(N, ROWS):
    """Of N pairs those of the first product: the largest power of two, but no more than the ROWS that lie together in ``xs``."""
    return min(1 << (N.bit_length() - 1), ROWS)


@gluon.jit
def rows_of(xs, xt, stage, FIRST: gl.constexpr, N: gl.constexpr):
    """Rows FIRST to FIRST + N - 1 of a stage; those past a power of two have memory of their own."""
    if xs.shape[1] <= FIRST:
        return xt.index(stage).slice(FIRST - xs.shape[1], N, 0)
    else:
        return xs.index(stage).slice(FIRST, N, 0)


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The stage behind, and its phase."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def released(empty, stage):
    """One thread arrives for all that have read the stage."""
    _barrier()
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def level_of(sorted_ids, block, pairs, BM: gl.constexpr):
    """Which of ``levels_of`` a block takes alone."""
    LEVELS: gl.constexpr = levels_of(BM)
    level = block * 0
    for i in gl.static_range(full_of(BM)):
        level += (gl.load(sorted_ids + block * block_of(BM) + LEVELS[i]) < pairs).to(gl.int32)
    return level


@gluon.jit
def _joins(sorted_ids, block, there, pairs, BM: gl.constexpr):
    """Whether a block behind another of its expert has so few pairs that it joins that."""
    over = gl.load(sorted_ids + block * block_of(BM) + (BM - block_of(BM)), mask=there, other=0)
    return there & (over >= pairs)


@gluon.jit
def fill_tables(runs, ids, sorted_ids, expert_ids, blocks, pairs, group, BM: gl.constexpr):
    """What ``piece`` looks up of the first TABLE blocks: where the full blocks of its expert begin and their number (a block alone
    where it is not full, or they do not walk together), its level; its expert (none of a block that joins the one in front), and how
    many up to it come first: full ones where they walk together, else all that do not join."""
    L: gl.constexpr = gl.BlockedLayout([TABLE // 128], [32], [4], [0])
    JOIN: gl.constexpr = block_of(BM) < BM
    b = gl.arange(0, TABLE, L)
    there = b < blocks
    e = gl.load(expert_ids + b, mask=there, other=-1)
    level = level_of(sorted_ids, gl.where(there, b, 0), pairs, BM)
    run = b + TABLE
    first = there & (level == full_of(BM))
    own = e
    if JOIN:
        before = gl.load(expert_ids + b - 1, mask=there & (b > 0), other=-2)
        behind = gl.load(expert_ids + b + 1, mask=b + 1 < blocks, other=-2)
        level += _joins(sorted_ids, b + 1, e == behind, pairs, BM).to(gl.int32)
        joins = _joins(sorted_ids, b, e == before, pairs, BM)
        own = gl.where(joins, -1, e)
        if group == 1:
            first = there & (joins == 0)
    up_to = b * 0
    if JOIN or group > 1:
        up_to = gl.associative_scan(first.to(gl.int32), 0, _sum)
    if group > 1:
        before = gl.load(expert_ids + b - 1, mask=there & (b > 0), other=-2)
        behind = gl.load(expert_ids + b + 1, mask=b + 1 < blocks, other=-2)
        there = b + 1 < blocks
        ends = (e != behind) | (level_of(sorted_ids, gl.where(there, b + 1, 0), pairs, BM) != full_of(BM))
        start = gl.associative_scan(gl.where(e != before, b, 0), 0, _larger)
        end = gl.associative_scan(gl.where(ends, b + 1, TABLE), 0, _smaller, reverse=True)
        run = gl.where(first, start + (end - start) * TABLE, run)
    runs.store(run + level * (2 * TABLE * TABLE))
    ids.store(own + 1 + up_to * FULL)


@gluon.jit
def _entry(table, i):
    """A number of a table in shared memory."""
    N: gl.constexpr = table.shape[0] if len(table.shape) == 1 else table.shape[0] * table.shape[1]
    one = _reinterpret(table, gl.int32, [N, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(i)
    return gl.max(one.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _ordered(ids, blocks, place):
    """The block that comes at ``place``: those first that a table counts (``fill_tables``), such as full ones, which take equally long
    and keep in step, then the others."""
    counted = _entry(ids, blocks - 1) // FULL
    rest = place >= counted
    nth = gl.where(rest, place - counted, place)
    block = nth * 0
    for i in gl.static_range(10):  # blocks, 2^10 at most, up to which there are no more than nth of their kind
        probe = block + (512 >> i)
        n = _entry(ids, probe - 1) // FULL
        block = gl.where(gl.where(rest, probe - n, n) <= nth, probe, block)
    return block


@gluon.jit
def piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM: gl.constexpr):
    """The t-th piece of work: its block, weight tile and expert, and how full the block is.

    The full blocks of one expert walk the weight tiles together, up to ``group`` of them, so that a tile is read once for all; past
    TABLE blocks each walks them alone, and none joins another.
    """
    block = t // tiles
    tile = t - block * tiles
    if blocks <= TABLE:
        if block_of(BM) < BM or group > 1:
            block = _ordered(ids, blocks, block)
        e = _entry(ids, block) % FULL - 1
        run = _entry(runs, block)
        start = run % TABLE
        size = run // TABLE % (2 * TABLE)
        if size > 1:
            together = gl.cdiv(size, gl.cdiv(size, group))
            at = (block - start) * tiles + tile
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
def _copy_rows(x, at, rows, FIRST: gl.constexpr, N: gl.constexpr):
    """Start copying 64 columns of N rows, eight a thread, those of slots FIRST and behind. at: where rows begin, in eights of columns.

    A thread's columns are added to x first, and in 64 bits, so that an address takes two instructions more than its row's number."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    begin = at.slice(FIRST, N, 0).load(gl.SliceLayout(1, COPY)).to(gl.int64) * 8  # so that Triton sees their alignment
    _copy(rows, (x + gl.arange(0, BK, gl.SliceLayout(0, COPY)))[None, :] + begin[:, None])


@gluon.constexpr_function
def noted(BM):
    """A power of two that a tile's slots fit in."""
    return 1 << (BM - 1).bit_length()


@gluon.jit
def _note(
    sorted_ids, row_weight, first, level, pairs, x_stride, notes, count,
    BM: gl.constexpr, TOP_K: gl.constexpr, HAS_WEIGHT: gl.constexpr,
):  # fmt: skip
    """For the epilogue of the program's tile number ``count``: the pairs of its slots and their weights. For who copies: where
    their rows of x begin; any row for a slot without a pair."""
    ids, weights, full, empty, at = notes
    i = gl.arange(0, noted(BM), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    slots = gl.where(level > full_of(BM), BM, block_of(BM))  # others' may be behind a block's, or nothing
    pair = gl.load(sorted_ids + first + i, mask=i < slots, other=pairs)
    place = count & 1
    mbarrier.wait(empty.index(place), (count >> 1 & 1) ^ 1)
    ids.index(place).store(pair)
    if HAS_WEIGHT:
        weights.index(place).store(gl.load(row_weight + pair, mask=pair < pairs, other=0.0))
    if TOP_K > 0:
        at.store((gl.where(pair < pairs, pair, 0) // TOP_K).to(at.dtype) * (x_stride // 8))
    _barrier()
    mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def _load_rows(x, at, k, stage, phase, ring, N: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr):
    """Copy the rows of N slots for all steps of a tile."""
    xs, xt, _, _, full, empty = ring
    MAIN: gl.constexpr = main_of(N, xs.shape[1])
    k0 = 0
    for _ in range(gl.cdiv(k, BK)):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        _copy_rows(x, at, rows_of(xs, xt, stage, 0, MAIN), 0, MAIN)
        if N > MAIN:
            _copy_rows(x, at, rows_of(xs, xt, stage, MAIN, N - MAIN), MAIN, N - MAIN)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = following(stage, phase, STAGES)
        by = BK
        if TAIL:
            by = gl.minimum(BK, k - BK - k0)
        k0 += by
        x += by
    return stage, phase


@gluon.jit
def _load_boxes(
    x, w, s, first, w_row, s_row, strip0, w_step, k, stage, phase, ring,
    N: gl.constexpr, BOX: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """Send the copy engine for all steps of a tile: for weights, and rows of x where they lie together. w_row, s_row: where the tile's
    codes and scales begin."""
    xs, xt, ws, ss, full, empty = ring
    UNITS: gl.constexpr = 1 if KIND == "e2m1" else 2  # of a step's columns, each a tile of ``packing.py``
    WORDS: gl.constexpr = 32 // BLOCK  # of scales of a row and 128 columns
    BOXES: gl.constexpr = N // BOX if TOP_K == 0 else 0
    ROWS: gl.constexpr = 2 * BOXES * BOX * BK  # bytes of x
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        if KIND == "":
            mbarrier.expect(full.index(stage), ROWS + 2 * GROUPS * PART * BK)
            for g in gl.static_range(GROUPS):
                _copy_box(w, [w_row + g * PART, k0], full.index(stage), ws.index(stage * GROUPS + g))
        else:
            CODES: gl.constexpr = ROWS + GROUPS * PART * UNITS * 32
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
        for i in gl.static_range(BOXES):
            _copy_box(x, [first + i * BOX, k0], full.index(stage), rows_of(xs, xt, stage, i * BOX, BOX))
        stage, phase = following(stage, phase, STAGES)
        k0 += BK
        if TAIL:
            k0 = gl.minimum(k0, k - BK)
    return stage, phase


@gluon.jit
def _fence_rows():
    """What others' threads stored is there for the copy engine too, once who sends it knows of that."""
    gl.inline_asm_elementwise("fence.proxy.async.global; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _post(jobs, count, block, tile, e, level):
    """Tell the others of the program's tile number ``count``; a block of -1 is the end."""
    said, full, empty = jobs
    place = count & 1
    i = gl.arange(0, 4, gl.BlockedLayout([4], [32], [1], [0]))
    word = gl.where(i == 0, block, gl.where(i == 1, tile, gl.where(i == 2, e, level)))
    mbarrier.wait(empty.index(place), (count >> 1 & 1) ^ 1)
    said.index(place).store(word)
    _barrier()
    mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def job_of(jobs, count):
    """The program's tile number ``count``, once it is known: block (-1: there is none), weight tile, expert and level."""
    said, full, empty = jobs
    place = count & 1
    mbarrier.wait(full.index(place), count >> 1 & 1)
    block = _entry(said, 4 * place)
    tile = _entry(said, 4 * place + 1)
    e = _entry(said, 4 * place + 2)
    level = _entry(said, 4 * place + 3)
    released(empty, place)
    return block, tile, e, level


@gluon.jit
def sends(
    given, BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    TOP_K: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Who draws tiles, one after another from a counter that all programs share, tells the others, and sends the copy engine: as many
    pairs of a block as it has, rounded up to a level. The counter is zero again at the end.

    Where x lies in slot order, made by the kernel in front, a block's rows are waited for (``ahead.py``); the last program waits for all.
    """
    (
        x, w, s, sorted_ids, expert_ids, num_padded, _, counter, experts, k, strips, w_expert, w_step, s_expert, _, pairs, group,
        runs, ids, ring, _, jobs, done, ahead, flow,
    ) = given  # fmt: skip
    LEVELS: gl.constexpr = levels_of(BM)
    STRIPS: gl.constexpr = GROUPS * PART // 16
    blocks = gl.load(num_padded) // block_of(BM)
    tiles = gl.cdiv(strips, STRIPS)
    stage = 0
    phase = 0
    count = 0
    t = gl.program_id(0)
    if PDL:
        flow = gl.where(t == gl.num_programs(0) - 1, gl.minimum(flow, 0), flow)
        wait_where((ahead != 0) & (flow <= 0))
        gdc_launch_dependents()
    while t < blocks * tiles:
        block, tile, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        drawn = gl.atomic_add(counter, 1, sem="relaxed")
        if (e >= 0) & (e < experts):
            _post(jobs, count, block, tile, e, level)
            count += 1
            strip0 = gl.minimum(tile * STRIPS, strips - STRIPS)
            if PDL and TOP_K == 0:  # noqa: SIM102
                if flow > 0:
                    wait_for(done + block, flow, count_of(done + block, flow))
                    _fence_rows()
            if KIND == "":
                w_row = (e * strips + strip0) * 16
            else:  # rows of 32 words, four a strip
                w_row = e * (w_expert // 32) + strip0 * 4
            for i in gl.static_range(len(LEVELS)):
                if level == i:
                    stage, phase = _load_boxes(
                        x, w, s, block * block_of(BM), w_row, e * s_expert, strip0, w_step, k, stage, phase, ring,
                        LEVELS[i], box_of(BM), GROUPS, KIND, BLOCK, TAIL, STAGES, TOP_K,
                    )  # fmt: skip
        t = gl.num_programs(0) + drawn
        # each tile is the first of a program or drawn, and each program that had one draws in vain at last: as many as there are tiles
        if drawn == blocks * tiles - 1:
            gl.store(counter, 0)
    _post(jobs, count, -1, 0, 0, 0)


@gluon.jit
def copies(
    given, BM: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, TOP_K: gl.constexpr, HAS_WEIGHT: gl.constexpr
):  # fmt: skip
    """Who copies what lies anywhere: pairs and their weights, and rows of x unless boxes bring them."""
    (
        x, _, _, sorted_ids, _, _, row_weight, _, _, k, _, _, _, _, x_stride, pairs, _, _, _, ring, notes, jobs, _, _, _,
    ) = given  # fmt: skip
    LEVELS: gl.constexpr = levels_of(BM)
    stage = 0
    phase = 0
    count = 0
    block, _, _, level = job_of(jobs, count)
    while block >= 0:
        first = block * block_of(BM)
        _note(sorted_ids, row_weight, first, level, pairs, x_stride, notes, count, BM, TOP_K, HAS_WEIGHT)
        if TOP_K > 0:
            for i in gl.static_range(len(LEVELS)):
                if level == i:
                    stage, phase = _load_rows(x, notes[4], k, stage, phase, ring, LEVELS[i], TAIL, STAGES)
        count += 1
        block, _, _, level = job_of(jobs, count)
