"""Packed grouped GEMM for many pairs an expert on Hopper: warps that load, warps that multiply (Gluon).

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program stays on its multiprocessor and takes one tile of 128 weight rows times up to 256 pairs after another. One warpgroup copies
rows of x, codes and scales to shared memory, several steps ahead and on into the next tile; two warpgroups take 64 weight rows each,
decode a step's weights into registers while the product of the step before runs, and store their part of the result while the other
still multiplies. ``packing.py`` has the layout of the codes; letters as in ``grouped_gemm.py``.

Where x lies in slot order (TOP_K 0, ``slots.py``), the copy engine (TMA) loads it in boxes of 64 rows, and codes in boxes of four strips
of 32 or 64 columns; plain weights (KIND "", only then) come in boxes of 128 rows and are multiplied from shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import gate_and_up, gated
from .numerics import SCALED_E2M1, SCALED_E4M3, SCALED_E5M2, byte_tile, word_tile
from .specialized_load import BK, ROWS, TABLE, fill_tables, half_of, loader, piece

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name changed after Triton 3.6


@gluon.jit
def _scales(words, second, BLOCK: gl.constexpr):
    """int32 [S, 8], four scale bytes of a row each -> int32 [S, 8, 64 / BLOCK]: bf16 pairs of one scale, of the step's columns."""
    if BLOCK == 16:
        a, b, c, d = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            prmt.b32 t, $4, 0, 0x4040;
            mad.lo.u32 $0, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4141;
            mad.lo.u32 $1, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4242;
            mad.lo.u32 $2, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4343;
            mad.lo.u32 $3, t, 16, 0x76007600;
            }
            """,
            "=&r,=&r,=&r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(gl.join(a, c), gl.join(b, d)).reshape([words.shape[0], 8, 4])
    else:
        a, b = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            prmt.b32 t, $2, 0, 0x4040;
            shl.b32 $0, t, 7;
            prmt.b32 t, $2, 0, 0x4141;
            shl.b32 $1, t, 7;
            }
            """,
            "=&r,=r,r", [words >> (16 * second)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(a, b)


@gluon.jit
def _weights(w, low, high, KIND: gl.constexpr):
    """Words [T, S, 128] of codes and of scales of their rows (the strip's upper and lower eight) -> bf16 [16 S, 64].

    ``numerics.decode_*`` with the multiplication by the scales: LLVM would pair rows for it, whose halves then have to be sorted.
    """
    if KIND == "e2m1":
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            SCALED_E2M1, "=&h,=&h,=&h,=&h,=&h,=&h,=h,=h,r,r,r", [w, low, high],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True, pack=1,
        )  # fmt: skip
        return word_tile(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            SCALED_E4M3 if KIND == "e4m3" else SCALED_E5M2, "=&h,=&h,=h,=h,r,r,r", [w, low, high],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
        return byte_tile(a, b, c, d)


@gluon.jit
def _spread(scale, KIND: gl.constexpr, BLOCK: gl.constexpr, WORDS: gl.constexpr):
    """Scales [4, 8, 64 / BLOCK] for each of the words [T, 4, 128] (strip, g, c, its four words)."""
    if KIND != "e2m1":
        L: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [1, 0, 0, 0, 0]],
            [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]],
            [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0]], [], [2, 4, 8, 4, 4],
        )  # fmt: skip
        scale = gl.convert_layout(scale.permute([2, 0, 1]), gl.SliceLayout(3, gl.SliceLayout(4, L)))
        scale, _ = gl.broadcast(scale[:, :, :, None, None], gl.full([2, 4, 8, 4, 4], 0, gl.int32, L))
        return gl.convert_layout(scale.reshape([2, 4, 128]), WORDS)
    else:
        B: gl.constexpr = 64 // BLOCK
        L: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]] if B == 2 else [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0]],
            [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
            [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]], [], [4, 8, 4, B, 4 // B],
        )  # fmt: skip
        scale = gl.convert_layout(scale, gl.SliceLayout(2, gl.SliceLayout(4, L)))
        scale, _ = gl.broadcast(scale[:, :, None, :, None], gl.full([4, 8, 4, B, 4 // B], 0, gl.int32, L))
        return gl.convert_layout(scale.reshape([1, 4, 128]), WORDS)


@gluon.jit
def _decoded(
    ws, ss, second, HALF: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, BOXED: gl.constexpr, OPERAND: gl.constexpr
):  # fmt: skip
    """bf16 [64, 64] of a stage: the warpgroup's part of the weight tile, as a left operand."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    T: gl.constexpr = 1 if KIND == "e2m1" else 2
    LISTED: gl.constexpr = gl.DistributedLinearLayout([[8]], [[0], [0], [1], [2], [4]], [[16], [32]], [], [64])
    if BOXED:  # rows of 32 words, four a strip
        LINES: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2]] if T == 1 else [[0, 1], [0, 2], [16, 0]],
            [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [16 * T, 32],
        )  # fmt: skip
        lines = ws.slice(HALF * 16 * T, 16 * T, 0).load(LINES)
        words = gl.convert_layout(lines.reshape([T, 4, 128]), WORDS, assert_trivial=True)
    else:
        words = ws.slice(HALF * 4, 4, 1).load(WORDS)
    scales = ss.slice(HALF * 64, 64, 0).load(LISTED)
    low, high = gl.split(scales.reshape([4, 2, 8]).permute([0, 2, 1]))
    low = _spread(_scales(low, second, BLOCK), KIND, BLOCK, WORDS)
    high = _spread(_scales(high, second, BLOCK), KIND, BLOCK, WORDS)
    return gl.convert_layout(_weights(words, low, high, KIND), OPERAND)


@gluon.jit
def _used(a):
    """A use of registers, by a store that never happens: what they hold is there by now, decoded before a wait and not after it, and
    kept until then while a product reads it (ptxas before 12.9 would take the registers for something else)."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, %nsmid;
        setp.eq.u32 p, t, 0;
        @p st.shared.v4.b32 [t], {$4, $5, $6, $7};
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r", [a], dtype=gl.bfloat16, is_pure=False, pack=8,
    )  # fmt: skip


@gluon.jit
def _released(empty, stage):
    """One thread arrives for all that have read the stage."""
    _barrier()
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _plain_tile(ring, it, k, HALF: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """``_tile`` of plain weights: the next product is issued before the one in front of it has ended."""
    xs, ws, _, full, empty = ring
    acc = gl.zeros([64, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    for step in range(gl.cdiv(k, BK)):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), it // STAGES & 1)
        a = ws.index(stage).slice(HALF * 64, 64, 0)
        acc = warpgroup_mma(a, xs.index(stage).slice(0, N, 0).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        _barrier()
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=step > 0)
        it += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    _released(empty, (it - 1) % STAGES)
    return acc, it


@gluon.jit
def _tile(
    ring, it, k,
    HALF: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    BOXED: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """float32 [64, N]: the sums of the warpgroup's weight rows and N pairs; ``it`` counts steps."""
    xs, ws, ss, full, empty = ring
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    acc = gl.zeros([64, N], gl.float32, ACC)
    steps = gl.cdiv(k, BK)
    stage = it % STAGES
    mbarrier.wait(full.index(stage), it // STAGES & 1)
    a = _decoded(ws.index(stage), ss.index(stage), half_of(0, k, TAIL), HALF, KIND, BLOCK, BOXED, OPERAND)
    if not BOXED:
        fence_async_shared()
    for step in range(1, steps):
        token = warpgroup_mma(a, xs.index(stage).slice(0, N, 0).permute([1, 0]), acc, is_async=True)
        it += 1
        following = it % STAGES
        mbarrier.wait(full.index(following), it // STAGES & 1)
        b = _decoded(
            ws.index(following), ss.index(following), half_of(step, k, TAIL), HALF, KIND, BLOCK, BOXED, OPERAND
        )
        if not BOXED:
            fence_async_shared()
        _used(b)
        acc = warpgroup_mma_wait(0, deps=[token])
        if KEEP:
            _used(a)
        _released(empty, stage)
        stage = following
        a = b
    token = warpgroup_mma(a, xs.index(stage).slice(0, N, 0).permute([1, 0]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[token])
    if KEEP:
        _used(a)
    _released(empty, stage)
    return acc, it + 1


@gluon.constexpr_function
def _out(ACT):
    """Layout of 64 pairs' results before they are rounded: where there is an activation, 32 of gates and ups that met in one thread."""
    if ACT != "":
        return gl.DistributedLinearLayout(
            [[0, 1], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 64]
        )  # fmt: skip
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.jit
def _asked_for(
    sorted_ids, bias, row_weight, first, pairs, n, row0,
    N: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr,
):  # fmt: skip
    """What a tile's epilogue takes from memory, loaded while its products run: pairs and their weights [64, N / 64], biases of rows (of
    gates, and of ups)."""
    C: gl.constexpr = N // 64
    LINES: gl.constexpr = gl.BlockedLayout([1, C], [32, 1], [4, 1], [1, 0])
    i = gl.arange(0, 64, gl.SliceLayout(1, LINES))[:, None] + 64 * gl.arange(0, C, gl.SliceLayout(0, LINES))[None, :]
    pair = gl.load(sorted_ids + first + i)
    weight = pair
    if HAS_WEIGHT:
        weight = gl.load(row_weight + pair, mask=pair < pairs, other=0.0)
    b0 = 0.0
    b1 = 0.0
    if HAS_BIAS:
        OUT: gl.constexpr = _out(ACT)
        if ACT != "":
            j = row0 // 2 + gl.arange(0, 32, gl.SliceLayout(1, OUT))
            inside = j < n // 2
            i0, i1 = gate_and_up(j, n // 2, INTERLEAVED)
            b0 = gl.load(bias + i0, mask=inside, other=0.0).to(gl.float32)
            b1 = gl.load(bias + i1, mask=inside, other=0.0).to(gl.float32)
        else:
            j = row0 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            b0 = gl.load(bias + j, mask=j < n, other=0.0).to(gl.float32)
    return pair, weight, b0, b1


@gluon.jit
def _halves(t):
    """[64, C] -> its first and its last C / 2 columns."""
    C: gl.constexpr = t.shape[1]
    return gl.split(t.reshape([64, 2, C // 2]).permute([0, 2, 1]))


@gluon.jit
def _store(
    acc, pair, weight, b0, b1, y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit,
    ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TO_SLOTS: gl.constexpr,
):  # fmt: skip
    """Epilogue and store of the warpgroup's sums, 64 pairs after 64 (``epilogue.py`` has the formulas)."""
    N: gl.constexpr = acc.shape[1]
    if N > 64:
        a, b = gl.split(acc.reshape([64, 2, N // 2]).permute([0, 2, 1]))
        pair0, pair1 = _halves(pair)
        weight0, weight1 = pair0, pair1
        if HAS_WEIGHT:
            weight0, weight1 = _halves(weight)
        args = (pairs, n, scale, row0, act_alpha, act_beta, act_limit)
        _store(a, pair0, weight0, b0, b1, y, first, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
        behind = first + N // 2
        _store(b, pair1, weight1, b0, b1, y, behind, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
    else:
        MEET: gl.constexpr = ACT != ""
        J: gl.constexpr = 32 if MEET else 64
        OUT: gl.constexpr = _out(ACT)
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // J, J // 8], [4, 1], [1, 0])
        if HAS_ALPHA:
            acc = acc * scale
        if MEET:
            g, u = gl.split(acc.reshape([4, 2, 8, N]).permute([0, 2, 3, 1]))
            g = gl.convert_layout(g.reshape([J, N]), OUT)
            u = gl.convert_layout(u.reshape([J, N]), OUT)
            if HAS_BIAS:
                g += b0[:, None]
                u += b1[:, None]
            o = gated(g, u, act_alpha, act_beta, act_limit, ACT, LIMIT, True)
        else:
            o = gl.convert_layout(acc, OUT)
            if HAS_BIAS:
                o += b0[:, None]
        if HAS_WEIGHT:
            o = o * gl.convert_layout(weight.reshape([64]), gl.SliceLayout(0, OUT))[None, :]
        o = gl.convert_layout(o.to(y.dtype.element_ty).permute([1, 0]), STORE)
        pair = gl.convert_layout(pair.reshape([64]), gl.SliceLayout(1, STORE))
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
def _sums(
    ring, it, k,
    HALF: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    BOXED: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    if KIND == "":
        acc, it = _plain_tile(ring, it, k, HALF, N, STAGES)
    else:
        acc, it = _tile(ring, it, k, HALF, N, KIND, BLOCK, TAIL, STAGES, BOXED, KEEP)
    return acc, it


@gluon.jit
def _consumer(
    y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group, act_alpha, act_beta, act_limit,
    runs, ids, xs, ws, ss, full, empty,
    HALF: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr,
    HAS_ALPHA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, BOXED: gl.constexpr,
    TO_SLOTS: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: weight rows HALF * 64 to HALF * 64 + 63 of the same tiles."""
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips * 16, ROWS)
    it = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, tile, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        first = block * BM
        if (e >= 0) & (e < experts):
            row0 = gl.minimum(tile * (ROWS // 16), strips - ROWS // 16) * 16 + HALF * 64
            scale = 1.0
            if HAS_ALPHA:
                scale = gl.load(alpha + e)
            ring = (xs, ws, ss, full, empty)
            where = (sorted_ids, bias + e.to(gl.int64) * n, row_weight, first, pairs, n, row0)
            args = (y, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit)
            if level == 2:
                asked = _asked_for(*where, BM, INTERLEAVED, ACT, HAS_BIAS, HAS_WEIGHT)
                acc, it = _sums(ring, it, k, HALF, BM, KIND, BLOCK, TAIL, STAGES, BOXED, KEEP)
                _store(acc, *asked, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
            elif level == 1:
                asked_half = _asked_for(*where, BM // 2, INTERLEAVED, ACT, HAS_BIAS, HAS_WEIGHT)
                half, it = _sums(ring, it, k, HALF, BM // 2, KIND, BLOCK, TAIL, STAGES, BOXED, KEEP)
                _store(half, *asked_half, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)
            else:
                asked_quarter = _asked_for(*where, BM // 4, INTERLEAVED, ACT, HAS_BIAS, HAS_WEIGHT)
                quarter, it = _sums(ring, it, k, HALF, BM // 4, KIND, BLOCK, TAIL, STAGES, BOXED, KEEP)
                _store(quarter, *asked_quarter, *args, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, TO_SLOTS)


@gluon.jit(do_not_specialize=["experts", "pairs", "group", "act_alpha", "act_beta", "act_limit"])
def _grouped_gemm_specialized_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter,
    experts, n, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group, act_alpha, act_beta, act_limit,
    BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TOP_K: gl.constexpr, TO_SLOTS: gl.constexpr,
    KEEP: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed, gates and ups where there is an activation; y [P, N_out], a row a slot where TO_SLOTS; bias [E, n]; blocks
    of BM pairs. Where TOP_K is 0, x and w are ``boxed``.

    ``partial`` and ``counter`` are not used: what launches takes the tensors of either kernel.
    """
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], gl.NVMMASharedLayout(128, 16, 2))
    if KIND == "":
        ws = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, BK], gl.NVMMASharedLayout(128, 16, 2))
        ss = ws
    else:
        T: gl.constexpr = 1 if KIND == "e2m1" else 2
        if TOP_K == 0:
            ws = gl.allocate_shared_memory(gl.int32, [STAGES, T * ROWS // 4, 32], gl.NVMMASharedLayout(128, 32, 2))
        else:
            WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
            ws = gl.allocate_shared_memory(gl.int32, [STAGES, T, ROWS // 16, 128], WORDS)
        ss = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    runs = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ids = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fill_tables(runs, ids, sorted_ids, expert_ids, gl.load(num_padded) // BM, pairs, BM)
    # who arrives: each loading thread for its copies, one for those of the copy engine
    ARRIVALS: gl.constexpr = (0 if KIND == "" else 128) + (1 if TOP_K == 0 else 0)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
                act_alpha, act_beta, act_limit, runs, ids, xs, ws, ss, full, empty,
                0, BM, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                TOP_K == 0, TO_SLOTS, KEEP,
            )),
            (_consumer, (
                y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
                act_alpha, act_beta, act_limit, runs, ids, xs, ws, ss, full, empty,
                1, BM, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE,
                TOP_K == 0, TO_SLOTS, KEEP,
            )),
            (loader, (
                x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride,
                pairs, group, runs, ids, xs, ws, ss, full, empty, BM, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K,
            )),
        ],
        [4, 4],
        [PRODUCT_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
