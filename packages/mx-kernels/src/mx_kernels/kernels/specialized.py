"""Packed grouped GEMM for many pairs an expert on Hopper: warps that load, warps that multiply (Gluon).

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program stays on its multiprocessor and draws one tile after another of weight rows times the pairs of a block: 192 or 128 rows times up
to 160 pairs, or 128 rows (of plain weights also 192) times up to 256, or 288 where up to 32 of an expert's last block join the one in
front. Three warpgroups, or two, take 64 rows each (in the last tile none, where the tile in front has them), decode a step's weights into
registers while the product of the step before runs, and store their part of the result while others still multiply
(``specialized_tile.py``). Three warps load, several steps ahead and on into the next tile (``specialized_load.py``): one draws tiles and
sends the copy engine (TMA) for boxes of codes and scales, and of x where its rows lie in slot order (TOP_K 0, ``slots.py``); two note a
tile's pairs and their weights for the epilogue and copy rows of x that lie anywhere, sixteen bytes a thread. Plain weights (KIND "") are
multiplied from shared memory.

``packing.py`` has the layout of the codes; letters as in ``grouped_gemm.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from .epilogue import gate_and_up, gated
from .specialized_load import (
    BK,
    COPIERS,
    PART,
    TABLE,
    block_of,
    copies,
    fill_tables,
    job_of,
    levels_of,
    main_of,
    noted,
    released,
    sends,
)
from .specialized_tile import passed_over, plain_tile, tile


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
def _bias_of(bias, n, row0, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Biases of the warpgroup's rows (of gates, and of ups), loaded while products run: not yet converted, which would wait for them."""
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
    acc, ids, weights, b0, b1, y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit,
    AT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TO_SLOTS: gl.constexpr,
):  # fmt: skip
    """Epilogue and store of the warpgroup's sums, those of slots AT and behind of the block that begins at ``first``, 64 after 64
    (``epilogue.py`` has the formulas)."""
    N: gl.constexpr = acc.shape[1]
    if N > 64:
        a, b = _halves(acc)
        args = (ids, weights, b0, b1, y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit)
        _store(a, *args, AT, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
        _store(b, *args, AT + N // 2, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
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
            o = o * weights.slice(AT, N, 0).load(gl.SliceLayout(0, OUT))[None, :]
        o = gl.convert_layout(o.to(y.dtype.element_ty).permute([1, 0]), STORE)
        at = ids.slice(AT, N, 0).load(gl.SliceLayout(1, STORE))
        live = at < pairs
        width = n // 2 if MEET else n
        column = (row0 // 2 if MEET else row0) + gl.arange(0, J, gl.SliceLayout(0, STORE))
        if TO_SLOTS:
            at = first + AT + gl.arange(0, N, gl.SliceLayout(1, STORE))
        if WIDE:
            at = at.to(gl.int64)
        gl.store(y + (at * width)[:, None] + column[None, :], o, mask=live[:, None] & (column < width)[None, :])


@gluon.jit
def _multiplies(
    given, OF: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    EVEN: gl.constexpr, STAGES: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TO_SLOTS: gl.constexpr, COPIED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: weight rows OF * 64 to OF * 64 + 63 of the same tiles."""
    y, alpha, bias, n, k, strips, pairs, act_alpha, act_beta, act_limit, ring, notes, jobs, done, flow = given
    LEVELS: gl.constexpr = levels_of(BM)
    STRIPS: gl.constexpr = GROUPS * PART // 16
    stage = 0
    phase = 0
    count = 0
    block, at, e, level = job_of(jobs, count)
    while block >= 0:
        first = block * block_of(BM)
        row0 = gl.minimum(at * STRIPS, strips - STRIPS) * 16 + OF * PART
        scale = 1.0
        if HAS_ALPHA:
            scale = gl.load(alpha + e)
        b0, b1 = _bias_of(bias + e.to(gl.int64) * n, n, row0, INTERLEAVED, ACT, HAS_BIAS)
        args = (b0, b1, y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit)
        place = count & 1
        if row0 + PART <= at * STRIPS * 16:  # the tile in front has these rows
            level = -1
            stage, phase = passed_over(ring, stage, phase, k, STAGES)
            mbarrier.wait(notes[2].index(place), count >> 1 & 1)
        for i in gl.static_range(len(LEVELS)):
            if level == i:
                N: gl.constexpr = LEVELS[i]
                if KIND == "":
                    acc, rest, stage, phase = plain_tile(ring, stage, phase, k, OF, GROUPS, N, STAGES, COPIED)
                else:
                    acc, rest, stage, phase = tile(
                        ring, stage, phase, k, OF, GROUPS, N, KIND, BLOCK, TAIL, EVEN, STAGES, COPIED
                    )
                held = (notes[0].index(place), notes[1].index(place))
                mbarrier.wait(notes[2].index(place), count >> 1 & 1)
                _store(acc, *held, *args, 0, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
                if acc.shape[1] < N:
                    _store(
                        rest, *held, *args, acc.shape[1], ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS
                    )
        released(notes[3], count & 1)
        if PDL:  # noqa: SIM102
            if flow < 0:
                gl.atomic_add(done + block, 1, sem="release", scope="gpu")
        count += 1
        block, at, e, level = job_of(jobs, count)


@gluon.jit(do_not_specialize=["experts", "pairs", "group", "act_alpha", "act_beta", "act_limit", "ahead", "flow"])
def _grouped_gemm_specialized_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter, done,
    experts, n, k, strips, w_expert, w_step, s_expert, x_stride, pairs, group, act_alpha, act_beta, act_limit, ahead, flow,
    BM: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, EVEN: gl.constexpr,
    STAGES: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TOP_K: gl.constexpr, TO_SLOTS: gl.constexpr,
    PDL: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed, gates and ups where there is an activation; y [P, N_out], a row a slot where TO_SLOTS; bias [E, n]; tiles
    of up to BM pairs, blocks of ``block_of`` it. w and s, and x where TOP_K is 0, are ``boxed``.

    counter: [1] int32, zero before and after. ``partial`` is not used: what launches takes the tensors of either kernel. PDL: it may start
    before the kernel in front has ended, and lets the next one. ahead: the alignment has ended by then, so that only who reads x waits.
    done, flow: as in ``packed_kernel.py``; each warpgroup counts its part of a tile.
    """
    if PDL:  # noqa: SIM102
        if ahead == 0:
            gdc_wait()
    # one product of 256 pairs takes more registers than each thread of three such warpgroups begins with
    MAIN: gl.constexpr = main_of(BM, 256 if GROUPS == 2 else 128)
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
        ws = gl.allocate_shared_memory(gl.int32, [PLACES, T * PART // 4, 32], gl.NVMMASharedLayout(128, 32, 2))
        ss = gl.allocate_shared_memory(gl.int32, [PLACES, 1, PART * (32 // BLOCK)], gl.NVMMASharedLayout(0, 32, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    runs = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ids = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fill_tables(runs, ids, sorted_ids, expert_ids, gl.load(num_padded) // block_of(BM), pairs, group, BM)
    NOTED: gl.constexpr = noted(BM)
    noted_ids = gl.allocate_shared_memory(gl.int32, [2, NOTED], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    noted_weights = noted_ids
    if HAS_WEIGHT:
        noted_weights = gl.allocate_shared_memory(gl.float32, [2, NOTED], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows_at = noted_ids
    if TOP_K > 0:
        rows_at = gl.allocate_shared_memory(
            gl.int64 if WIDE else gl.int32, [NOTED], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
    noted_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    noted_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    job_words = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    job_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    job_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(job_full.index(i), count=1)
        mbarrier.init(job_empty.index(i), count=GROUPS + 1)  # who multiplies, and who copies
        mbarrier.init(noted_full.index(i), count=1)
        mbarrier.init(noted_empty.index(i), count=GROUPS)
    ARRIVALS: gl.constexpr = 1 if TOP_K == 0 else 1 + COPIERS  # the copy engine's, and those of who copies
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=GROUPS)
    ring = (xs, xt, ws, ss, full, empty)
    notes = (noted_ids, noted_weights, noted_full, noted_empty, rows_at)
    jobs = (job_words, job_full, job_empty)
    products = (y, alpha, bias, n, k, strips, pairs, act_alpha, act_beta, act_limit, ring, notes, jobs, done, flow)
    loads = (
        x, w, s, sorted_ids, expert_ids, num_padded, row_weight, counter, experts, k, strips, w_expert, w_step, s_expert, x_stride,
        pairs, group, runs, ids, ring, notes, jobs, done, ahead, flow,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiplies, (
                    products, 0, BM, GROUPS, KIND, BLOCK, TAIL, EVEN, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
                    WIDE, TO_SLOTS, TOP_K > 0, PDL,
                )),
                (_multiplies, (
                    products, 1, BM, GROUPS, KIND, BLOCK, TAIL, EVEN, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
                    WIDE, TO_SLOTS, TOP_K > 0, PDL,
                )),
                (sends, (loads, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, TOP_K, PDL)),
                (copies, (loads, BM, TAIL, STAGES, TOP_K, HAS_WEIGHT)),
            ],
            [4, 1, COPIERS // 32],
            [PRODUCT_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiplies, (
                    products, 0, BM, GROUPS, KIND, BLOCK, TAIL, EVEN, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
                    WIDE, TO_SLOTS, TOP_K > 0, PDL,
                )),
                (_multiplies, (
                    products, 1, BM, GROUPS, KIND, BLOCK, TAIL, EVEN, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
                    WIDE, TO_SLOTS, TOP_K > 0, PDL,
                )),
                (_multiplies, (
                    products, 2, BM, GROUPS, KIND, BLOCK, TAIL, EVEN, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
                    WIDE, TO_SLOTS, TOP_K > 0, PDL,
                )),
                (sends, (loads, BM, GROUPS, KIND, BLOCK, TAIL, STAGES, TOP_K, PDL)),
                (copies, (loads, BM, TAIL, STAGES, TOP_K, HAS_WEIGHT)),
            ],
            [4, 4, 1, COPIERS // 32],
            [PRODUCT_REGISTERS, PRODUCT_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
