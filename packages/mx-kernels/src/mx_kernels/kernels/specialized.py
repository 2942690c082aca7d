"""Packed grouped GEMM for many pairs an expert on Hopper: warps that load, warps that multiply (Gluon).

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program stays on its multiprocessor and takes one tile of weight rows times the pairs of a block after another: 192 rows times up to 160
pairs, or 128 rows times up to 256. Three warpgroups, or two, take 64 rows each, decode a step's weights into registers while the product
of the step before runs, and store their part of the result while others still multiply (``specialized_tile.py``). What loads copies rows
of x, codes and scales to shared memory, several steps ahead and on into the next tile (``specialized_load.py``): one warp where x lies in
slot order (TOP_K 0, ``slots.py``), which sends the copy engine (TMA) for boxes of all three, else a warpgroup that copies sixteen bytes a
thread. Plain weights (KIND "", in slot order only) are multiplied from shared memory.

``packing.py`` has the layout of the codes; letters as in ``grouped_gemm.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .epilogue import gate_and_up, gated
from .specialized_load import BK, PART, TABLE, fill_tables, levels_of, loader, main_of, piece
from .specialized_tile import plain_tile, tile


@gluon.constexpr_function
def _out(ACT, C=64):
    """Layout of C pairs' results before they are rounded: where there is an activation, 32 of gates and ups that met in one thread."""
    if ACT != "":
        return gl.DistributedLinearLayout(
            [[0, 1], [0, 8], [0, 16], [0, 32]][: C.bit_length() - 3], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [],
            [32, C],
        )  # fmt: skip
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])


@gluon.constexpr_function
def _stored(ACT):
    """Layout of rounded results [pairs, columns] on their way to memory, sixteen bytes a thread."""
    J = 32 if ACT != "" else 64
    return gl.BlockedLayout([1, 8], [256 // J, J // 8], [4, 1], [1, 0])


@gluon.jit
def _pairs_of(sorted_ids, row_weight, first, pairs, N: gl.constexpr, ACT: gl.constexpr, HAS_WEIGHT: gl.constexpr):
    """Pairs [N] of slots and their weights [64, N / 64] ([32, 1] of 32), loaded while products run."""
    pair = gl.load(sorted_ids + first + gl.arange(0, N, gl.SliceLayout(1, _stored(ACT))))
    weight = 0.0
    if HAS_WEIGHT:
        C: gl.constexpr = 64 if N > 64 else N
        LINES: gl.constexpr = gl.BlockedLayout([1, N // C], [32, 1], [4, 1], [1, 0])
        i = (
            gl.arange(0, C, gl.SliceLayout(1, LINES))[:, None]
            + C * gl.arange(0, N // C, gl.SliceLayout(0, LINES))[None, :]
        )
        of = gl.load(sorted_ids + first + i)
        weight = gl.load(row_weight + of, mask=of < pairs, other=0.0)
    return pair, weight


@gluon.jit
def _bias_of(bias, n, row0, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Biases of the warpgroup's rows (of gates, and of ups), likewise, and not yet converted: that would wait for them."""
    b0 = 0.0
    b1 = 0.0
    if HAS_BIAS:
        OUT: gl.constexpr = _out(ACT)
        if ACT != "":
            j = row0 // 2 + gl.arange(0, 32, gl.SliceLayout(1, OUT))
            inside = j < n // 2
            i0, i1 = gate_and_up(j, n // 2, INTERLEAVED)
            b0 = gl.load(bias + i0, mask=inside, other=0.0)
            b1 = gl.load(bias + i1, mask=inside, other=0.0)
        else:
            j = row0 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            b0 = gl.load(bias + j, mask=j < n, other=0.0)
    return b0, b1


@gluon.jit
def _halves(t):
    """[.., C] -> its first and its last C / 2 columns."""
    if len(t.shape) == 1:
        return gl.split(t.reshape([2, t.shape[0] // 2]).permute([1, 0]))
    else:
        return gl.split(t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute([0, 2, 1]))


@gluon.jit
def _added(t, bias):
    """[J, C] plus a bias of each row."""
    ROWS: gl.constexpr = gl.SliceLayout(1, t.type.layout)
    return t + gl.convert_layout(bias.to(gl.float32), ROWS, assert_trivial=True)[:, None]


@gluon.jit
def _store(
    acc, pair, weight, b0, b1, y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit,
    ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TO_SLOTS: gl.constexpr,
):  # fmt: skip
    """Epilogue and store of the warpgroup's sums, 64 pairs after 64 (``epilogue.py`` has the formulas)."""
    N: gl.constexpr = acc.shape[1]
    if N > 64:
        a, b = _halves(acc)
        pair0, pair1 = _halves(pair)
        weight0, weight1 = weight, weight
        if HAS_WEIGHT:
            weight0, weight1 = _halves(weight)
        args = (pairs, n, scale, row0, act_alpha, act_beta, act_limit)
        _store(a, pair0, weight0, b0, b1, y, first, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
        behind = first + N // 2
        _store(b, pair1, weight1, b0, b1, y, behind, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
    else:
        MEET: gl.constexpr = ACT != ""
        J: gl.constexpr = 32 if MEET else 64
        OUT: gl.constexpr = _out(ACT, N)
        STORE: gl.constexpr = _stored(ACT)
        if HAS_ALPHA:
            acc = acc * scale
        if MEET:
            g, u = gl.split(acc.reshape([4, 2, 8, N]).permute([0, 2, 3, 1]))
            g = gl.convert_layout(g.reshape([J, N]), OUT)
            u = gl.convert_layout(u.reshape([J, N]), OUT)
            if HAS_BIAS:
                g = _added(g, b0)
                u = _added(u, b1)
            o = gated(g, u, act_alpha, act_beta, act_limit, ACT, LIMIT, True)
        else:
            o = gl.convert_layout(acc, OUT)
            if HAS_BIAS:
                o = _added(o, b0)
        if HAS_WEIGHT:
            o = o * gl.convert_layout(weight.reshape([N]), gl.SliceLayout(0, OUT))[None, :]
        o = gl.convert_layout(o.to(y.dtype.element_ty).permute([1, 0]), STORE)
        pair = gl.convert_layout(pair, gl.SliceLayout(1, STORE), assert_trivial=True)
        live = pair < pairs
        width = n // 2 if MEET else n
        column = (row0 // 2 if MEET else row0) + gl.arange(0, J, gl.SliceLayout(0, STORE))
        at = pair
        if TO_SLOTS:
            at = first + gl.arange(0, N, gl.SliceLayout(1, STORE))
        if WIDE:
            at = at.to(gl.int64)
        gl.store(y + (at * width)[:, None] + column[None, :], o, mask=live[:, None] & (column < width)[None, :])


@gluon.jit
def _consumer(
    given, OF: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, BOXED: gl.constexpr, TO_SLOTS: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: weight rows OF * 64 to OF * 64 + 63 of the same tiles."""
    (
        y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
        act_alpha, act_beta, act_limit, runs, ids, xs, xt, ws, ss, full, empty,
    ) = given  # fmt: skip
    LEVELS: gl.constexpr = levels_of(BM)
    STRIPS: gl.constexpr = GROUPS * PART // 16
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips, STRIPS)
    ring = (xs, xt, ws, ss, full, empty)
    stage = 0
    phase = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, at, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        first = block * BM
        if (e >= 0) & (e < experts):
            row0 = gl.minimum(at * STRIPS, strips - STRIPS) * 16 + OF * PART
            scale = 1.0
            if HAS_ALPHA:
                scale = gl.load(alpha + e)
            b0, b1 = _bias_of(bias + e.to(gl.int64) * n, n, row0, INTERLEAVED, ACT, HAS_BIAS)
            args = (pairs, n, scale, row0, act_alpha, act_beta, act_limit)
            for i in gl.static_range(len(LEVELS)):
                if level == i:
                    N: gl.constexpr = LEVELS[i]
                    MAIN: gl.constexpr = main_of(N)
                    pair, weight = _pairs_of(sorted_ids, row_weight, first, pairs, MAIN, ACT, HAS_WEIGHT)
                    if N > MAIN:
                        pair_rest, weight_rest = _pairs_of(
                            sorted_ids, row_weight, first + MAIN, pairs, N - MAIN, ACT, HAS_WEIGHT
                        )
                    if KIND == "":
                        acc, rest, stage, phase = plain_tile(ring, stage, phase, k, OF, GROUPS, N, STAGES)
                    else:
                        acc, rest, stage, phase = tile(
                            ring, stage, phase, k, OF, GROUPS, N, KIND, BLOCK, TAIL, STAGES, BOXED
                        )
                    _store(
                        acc, pair, weight, b0, b1, y, first, *args,
                        ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS,
                    )  # fmt: skip
                    if N > MAIN:
                        _store(
                            rest, pair_rest, weight_rest, b0, b1, y, first + MAIN, *args,
                            ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS,
                        )  # fmt: skip


@gluon.jit(do_not_specialize=["experts", "pairs", "group", "act_alpha", "act_beta", "act_limit"])
def _grouped_gemm_specialized_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter,
    experts, n, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group, act_alpha, act_beta, act_limit,
    BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TOP_K: gl.constexpr, TO_SLOTS: gl.constexpr,
    PRODUCT_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed, gates and ups where there is an activation; y [P, N_out], a row a slot where TO_SLOTS; bias [E, n]; blocks
    of BM pairs. Where TOP_K is 0, x, w and s are ``boxed``.

    ``partial`` and ``counter`` are not used: what launches takes the tensors of either kernel.
    """
    MAIN: gl.constexpr = main_of(BM)
    BOXED: gl.constexpr = TOP_K == 0
    PLACES: gl.constexpr = STAGES * GROUPS
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, MAIN, BK], gl.NVMMASharedLayout(128, 16, 2))
    xt = xs
    if BM > MAIN:
        xt = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM - MAIN, BK], gl.NVMMASharedLayout(128, 16, 2))
    if KIND == "":
        ws = gl.allocate_shared_memory(gl.bfloat16, [PLACES, PART, BK], gl.NVMMASharedLayout(128, 16, 2))
        ss = ws
    else:
        T: gl.constexpr = 1 if KIND == "e2m1" else 2
        if BOXED:
            ws = gl.allocate_shared_memory(gl.int32, [PLACES, T * PART // 4, 32], gl.NVMMASharedLayout(128, 32, 2))
            ss = gl.allocate_shared_memory(gl.int32, [PLACES, 1, PART * (32 // BLOCK)], gl.NVMMASharedLayout(0, 32, 2))
        else:
            WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
            ws = gl.allocate_shared_memory(gl.int32, [STAGES, T, GROUPS * PART // 16, 128], WORDS)
            ss = gl.allocate_shared_memory(gl.int32, [STAGES, GROUPS * PART], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    runs = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ids = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fill_tables(runs, ids, sorted_ids, expert_ids, gl.load(num_padded) // BM, pairs, BM)
    LOADERS: gl.constexpr = 1 if BOXED else 4
    ARRIVALS: gl.constexpr = 1 if BOXED else 32 * LOADERS  # the copy engine's, or one of each thread for its copies
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=GROUPS)
    products = (
        y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
        act_alpha, act_beta, act_limit, runs, ids, xs, xt, ws, ss, full, empty,
    )  # fmt: skip
    loads = (
        x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride,
        pairs, group, runs, ids, xs, xt, ws, ss, full, empty,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    products, 0, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                    BOXED, TO_SLOTS,
                )),
                (_consumer, (
                    products, 1, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                    BOXED, TO_SLOTS,
                )),
                (loader, (loads, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)),
            ],
            [4, LOADERS],
            [PRODUCT_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    products, 0, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                    BOXED, TO_SLOTS,
                )),
                (_consumer, (
                    products, 1, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                    BOXED, TO_SLOTS,
                )),
                (_consumer, (
                    products, 2, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                    BOXED, TO_SLOTS,
                )),
                (loader, (loads, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)),
            ],
            [4, 4, LOADERS],
            [PRODUCT_REGISTERS, PRODUCT_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
