"""Grouped GEMM on packed weights and 16-bit activations: ``packing.py`` has the layout, ``dot.py`` the K loop.

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program computes N weight rows times up to BM pairs of one expert, the rows it needs gathered from x. Which pairs: from the
alignment (sorted_ids, expert_ids, num_padded), from the expert of each pair alone (up to 64 pairs: every program finds the
pairs of its expert by comparing ids), or all rows in order (a linear layer).

Blocks that hold few pairs run a narrower loop than full ones (LEVELS), so that one decoded weight tile serves a whole
expert without multiplying by rows that are not there. With split K, each program stores its partial sums, and the last
to arrive adds them up in a fixed order, so the result does not depend on which one that is.
"""

import triton
import triton.language as tl

from .ahead import CHUNK, ask, count_of, counted, rows_at, scales_at, tiles_at, wait_for, wait_where
from .dot import packed_dot
from .epilogue import outputs, store

SORTED: tl.constexpr = tl.constexpr(0)
PAIR: tl.constexpr = tl.constexpr(1)
SELF: tl.constexpr = tl.constexpr(2)
DENSE: tl.constexpr = tl.constexpr(3)


@triton.jit
def _tile(
    x, w, s, y, sorted_ids, bias, row_weight, partial, counter, done,
    first, pair, count, scale, strip0, strips, rows, w_step, s_step, n, k, x_stride, piece_stride, pairs, slot, split,
    act_alpha, act_beta, act_limit, flow,
    M: tl.constexpr, REST: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, TAIL: tl.constexpr, CLAMP: tl.constexpr, MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr,
    TOP_K: tl.constexpr, TO_SLOTS: tl.constexpr, ROUTE: tl.constexpr, COUNTS: tl.constexpr, PTX: tl.constexpr, DRAIN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """N weight rows times M pairs, and REST more behind them: K loop, reduction over splits, epilogue; where ``flow`` is negative the
    tile is counted in ``done`` then."""
    live = pair < pairs
    pair = tl.where(live, pair, 0)
    if CLAMP:  # fewer rows than N: repeat the last
        strip = tl.minimum(strip0 + tl.arange(0, N // 16), strips - 1)
        row = tl.minimum(strip0 * 16 + tl.arange(0, N), rows - 1)
    else:
        strip = strip0 + tl.arange(0, N // 16)
        row = strip0 * 16 + tl.arange(0, N)
    EARLY: tl.constexpr = M <= 32  # hide the latency of what the epilogue loads; larger tiles need the registers
    b0 = 0.0
    b1 = 0.0
    weight = 0.0
    if EARLY and HAS_BIAS:
        _, inside, i0, i1 = outputs(strip0 * 16, n, N, GATED, INTERLEAVED, ACT)
        b0 = tl.load(bias + i0, mask=inside, other=0.0).to(tl.float32)
        b1 = tl.load(bias + i1, mask=inside, other=0.0).to(tl.float32)
    if EARLY and HAS_WEIGHT:
        weight = tl.load(row_weight + pair, mask=live, other=0.0)
    if TOP_K == 0:
        at = first + tl.arange(0, M)
    else:
        at = pair // TOP_K
    if WIDE:
        at = at.to(tl.int64)
    rest = None
    if REST > 0:
        pair2 = _pairs(sorted_ids, first + M, pairs, REST, ROUTE)
        live2 = pair2 < pairs
        pair2 = tl.where(live2, pair2, 0)
        if TOP_K == 0:
            at2 = first + M + tl.arange(0, REST)
        else:
            at2 = pair2 // TOP_K
        if WIDE:
            at2 = at2.to(tl.int64)
        rest = (tl.zeros((N, REST), tl.float32), at2 * x_stride, live2)
    steps = tl.cdiv(k, BK)
    if SPLIT > 1:
        steps = (steps - split + SPLIT - 1) // SPLIT
    acc = packed_dot(
        tl.zeros((N, M), tl.float32), x, at * x_stride, live, rest, w, s, row if KIND == "" else strip, row,
        w_step, s_step, k, split, steps, piece_stride,
        N, M, BK, KIND, BLOCK, SPLIT, TAIL, MASK_ROWS, PIECES, EVICT, PTX, DRAIN, INTERPRET,
    )  # fmt: skip
    if REST > 0:
        acc, acc2 = acc
        store(
            acc2, y, sorted_ids, bias, row_weight, first + M, pair2, live2, pairs, n, scale, strip0 * 16, b0, b1, weight,
            act_alpha, act_beta, act_limit,
            N, REST, GATED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, INTERLEAVED, EARLY, WIDE, ROUTE == SORTED,
            TO_SLOTS, PTX,
        )  # fmt: skip
    last = True
    if SPLIT > 1:
        part = partial + slot.to(tl.int64) * (SPLIT * M * N) + tl.arange(0, M)[None, :] * N + tl.arange(0, N)[:, None]
        column = (tl.arange(0, M) < count)[None, :]
        tl.store(
            part + split * (M * N), acc, mask=column
        )  # only the pairs that are there: reading back takes most time
        tl.debug_barrier()
        last = tl.atomic_add(counter + slot, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((N, M), tl.float32)
            for q in tl.static_range(SPLIT):
                acc += tl.load(part + q * (M * N), mask=column, other=0.0, cache_modifier=".cg")
            tl.store(counter + slot, 0)
        store(
            acc, y, sorted_ids, bias, row_weight, first, pair, live, pairs, n, scale, strip0 * 16, b0, b1, weight,
            act_alpha, act_beta, act_limit,
            N, M, GATED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, INTERLEAVED, EARLY, WIDE, ROUTE == SORTED,
            TO_SLOTS, PTX,
        )  # fmt: skip
        if COUNTS and SPLIT > 1:  # noqa: SIM102
            if flow < 0:  # whoever is the last of them
                counted(done)


@triton.jit
def _ones(x):  # int64 -> int32, the number of ones
    x -= (x >> 1) & 0x5555555555555555
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    return ((x + (x >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _pairs(sorted_ids, first, pairs, M: tl.constexpr, ROUTE: tl.constexpr):
    """int32 [M]: the pairs of a block; ``pairs`` or more where there is none."""
    column = first + tl.arange(0, M)
    if ROUTE == SORTED:
        return tl.load(sorted_ids + column)
    else:
        return column


@triton.jit
def _ask(
    w, s, e, strip0, first, strips, rows, w_expert, w_step, s_expert, s_step, k,
    N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Ask for the first steps of an expert's weights (``ahead.py``)."""
    w += e.to(tl.int64) * w_expert
    if KIND == "":
        at, there = rows_at(strip0 * 16, rows, w_step, k, first, N, BK, 2, STRIDE)
        ask(w, at, there, CHUNK)
    else:
        UNIT: tl.constexpr = 64 if KIND == "e2m1" else 32
        ROW: tl.constexpr = 128 // BLOCK
        at, there = tiles_at(strip0, strips, 4 * w_step, k, first, N, BK, UNIT, STRIDE)
        ask(w, at, there, CHUNK)
        at, there = scales_at(strip0, s_step, k, first, N, BK, UNIT, ROW, STRIDE)
        ask(s + e.to(tl.int64) * s_expert, at, there, N * ROW)


_NUMBERS = ["experts", "pairs", "blocks", "piece_stride", "act_alpha", "act_beta", "act_limit", "ahead", "flow"]


@triton.jit(do_not_specialize=_NUMBERS)
def _grouped_gemm_packed_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter, done,
    experts, n, k, strips, rows, w_expert, w_step, s_expert, s_step, x_stride, piece_stride, pairs, blocks,
    act_alpha, act_beta, act_limit, ahead, flow,
    BM: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ROUTE: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, TAIL: tl.constexpr, CLAMP: tl.constexpr,
    MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROUND: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, TO_SLOTS: tl.constexpr, PDL: tl.constexpr,
    PTX: tl.constexpr, DRAIN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed; y [P, N_out]; bias [E, n]; partial [blocks * tiles, SPLIT, BM, N], counter [blocks * tiles], done [blocks].

    A block is one of PARTS parts of a block of the alignment. TOP_K: 0 where x has a row a slot; TO_SLOTS: where y has. ahead: whether
    weights are asked for before the kernel in front has ended (``ahead.py``). flow: -1 where tiles are counted in ``done``, for the
    kernel behind; else how many the kernel in front counts for a block there, which this one then waits for; 0 where it waits for the
    end of that kernel.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(strips * 16, N)
    last = tl.num_programs(0) - 1  # ends behind the kernel in front, on which whatever starts behind this one relies
    COUNTS: tl.constexpr = PDL and ROUTE != DENSE
    found = 0
    if PDL:  # noqa: SIM102
        if ahead == 0:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    split = 0
    if GROUP == 1:
        tile = pid % tiles
        block = pid // tiles
        if SPLIT > 1:
            split = block % SPLIT
            block = block // SPLIT
    else:  # GROUP blocks share the weight tiles that they read from the second-level cache
        first = pid // (GROUP * tiles) * GROUP
        size = tl.minimum(blocks - first, GROUP)
        block = first + pid % (GROUP * tiles) % size
        tile = pid % (GROUP * tiles) // size
    MAIN: tl.constexpr = 64 if BM == 96 else BM
    column = tl.arange(0, MAIN)
    if ROUTE == DENSE:
        e = 0
        pair = _pairs(sorted_ids, block * BM, pairs, MAIN, ROUTE)
        count = tl.minimum(pairs - block * BM, BM)
    elif ROUTE == SORTED:
        used = tl.load(num_padded)  # the three loads do not wait for each other
        e = tl.load(expert_ids + block // PARTS)
        pair = _pairs(sorted_ids, block * BM, pairs, MAIN, ROUTE)
        if COUNTS:
            flow = tl.where(pid == last, tl.minimum(flow, 0), flow)  # it mostly has no work
            found = count_of(done + block, flow)
        count = tl.sum((pair < pairs).to(tl.int32), 0)  # padding follows the pairs
        if MAIN < BM:
            over = _pairs(sorted_ids, block * BM + MAIN, pairs, BM - MAIN, ROUTE)
            count += tl.sum((over < pairs).to(tl.int32), 0)
        there = block * BM < used
        if PARTS > 1:
            there &= count > 0
    elif ROUTE == PAIR:
        e = tl.load(expert_ids + block)
        if COUNTS:
            found = count_of(done + block, flow)
        pair = tl.where(column == 0, block, pairs)
        count = 1
        there = block >= 0
    else:
        other = tl.arange(0, 64)
        ids = tl.load(expert_ids + other, mask=other < pairs, other=-1)
        e = tl.load(expert_ids + block)
        if COUNTS:
            found = count_of(done + block, flow)
        mine = tl.sum((ids == e).to(tl.int64) << other.to(tl.int64), 0)  # a bit for each pair of this expert
        before = _ones(mine & ((tl.full((), 1, tl.int64) << block.to(tl.int64)) - 1))
        there = before % MAIN == 0  # else another program computes this pair
        count = tl.minimum(_ones(mine) - before, MAIN)
        for _ in range(before):
            mine &= mine - 1
        pair = tl.full((MAIN,), 0, tl.int32) + pairs
        for i in range(count):
            pair = tl.where(column == i, _ones((mine & -mine) - 1), pair)
            mine &= mine - 1
    if ROUTE != DENSE:
        there &= (e >= 0) & (e < experts)
        if PDL:
            wait_where((pid == last) & (there == 0))
        if not there:
            return
    strip0 = tile * (N // 16)
    if not CLAMP:
        strip0 = tl.minimum(strip0, strips - N // 16)  # the last tile ends at the last row; two store the same values
    if PDL:  # noqa: SIM102
        if ahead != 0:
            _ask(w, s, e, strip0, split, strips, rows, w_expert, w_step, s_expert, s_step, k, N, BK, KIND, BLOCK, SPLIT)
            wait_for(done + block, flow, found)
            tl.extra.cuda.gdc_launch_dependents()
    scale = 1.0
    if HAS_ALPHA:
        scale = tl.load(alpha + e)
    if ROUTE != DENSE:
        w += e.to(tl.int64) * w_expert
        s += e.to(tl.int64) * s_expert
        bias += e.to(tl.int64) * n
    slot = block * tiles + tile
    first = block * BM
    QUARTER: tl.constexpr = MAIN // 4 if LEVELS > 2 else MAIN
    HALF: tl.constexpr = MAIN // 2 if LEVELS > 1 else MAIN
    tensors = (x, w, s, y, sorted_ids, bias, row_weight, partial, counter, done + block)
    sizes = (
        strip0, strips, rows, w_step, s_step, n, k, x_stride, piece_stride, pairs, slot, split, act_alpha, act_beta, act_limit, flow,
    )  # fmt: skip
    if LEVELS > 2 and count <= QUARTER:
        _tile(
            *tensors, first, _pairs(sorted_ids, first, pairs, QUARTER, ROUTE), count, scale, *sizes,
            QUARTER, 0, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, TO_SLOTS, ROUTE, COUNTS, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    elif LEVELS > 1 and count <= HALF:
        _tile(
            *tensors, first, _pairs(sorted_ids, first, pairs, HALF, ROUTE), count, scale, *sizes,
            HALF, 0, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, TO_SLOTS, ROUTE, COUNTS, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    elif MAIN < BM and count > MAIN:
        _tile(
            *tensors, first, pair, count, scale, *sizes,
            MAIN, BM - MAIN, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, TO_SLOTS, ROUTE, COUNTS, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    else:
        _tile(
            *tensors, first, pair, count, scale, *sizes,
            MAIN, 0, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, TO_SLOTS, ROUTE, COUNTS, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    if COUNTS:
        if SPLIT == 1:  # noqa: SIM102
            if flow < 0:
                counted(done + block)
        if ROUTE != SORTED:  # noqa: SIM102
            if flow > 0:
                wait_where(pid == last)
