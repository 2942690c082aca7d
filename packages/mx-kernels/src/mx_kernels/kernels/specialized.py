"""Packed grouped GEMM for many pairs an expert on Hopper: warps that load, warps that multiply (Gluon).

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program stays on its multiprocessor and takes one tile of 128 weight rows times up to 256 pairs after another. One warpgroup copies
rows of x, codes and scales to shared memory, several steps ahead and on into the next tile; two warpgroups take 64 weight rows each,
decode a step's weights into registers while the product of the step before runs, and store their part of the result while the other
still multiplies. ``packing.py`` has the layout of the codes; letters as in ``grouped_gemm.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import gate_and_up, gated
from .numerics import SCALED_E2M1, SCALED_E4M3, SCALED_E5M2, byte_tile, word_tile

# Names that changed after Triton 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

BK: gl.constexpr = gl.constexpr(64)
ROWS: gl.constexpr = gl.constexpr(128)


@gluon.jit
def _place(t, tiles, blocks, group):
    """(block, tile) of the t-th piece of work: ``group`` blocks walk the weight tiles together."""
    first = t // (group * tiles) * group
    size = gl.minimum(blocks - first, group)
    inside = t % (group * tiles)
    return first + inside % size, inside // size


@gluon.jit
def _second(step, k, TAIL: gl.constexpr):
    """Which half of its 128 columns a step takes."""
    second = step % 2
    if TAIL:
        second |= (step * BK >= k - BK).to(gl.int32)
    return second


@gluon.jit
def _load_tile(
    x, w, s, sorted_ids, first, strip0, w_step, s_step, k, x_stride, pairs, it, ring,
    N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """Copy all steps of a tile with N pairs; ``it`` counts steps."""
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
    s_at = (strip0 * 16 + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))) * (32 // BLOCK)
    s_from = s.to(gl.pointer_type(gl.int32)) + s_at
    s_step = s_step // 4
    k0 = 0
    for step in range(gl.cdiv(k, BK)):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), (it // STAGES & 1) ^ 1)
        _copy(xs.index(stage).slice(0, N, 0), x_from)
        _copy(ws.index(stage), w_from)
        s0 = step // 2 * s_step
        if BLOCK == 16:
            s0 += _second(step, k, TAIL)
        _copy(ss.index(stage), s_from + s0)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
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
def _loader(
    x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group,
    xs, ws, ss, full, empty,
    BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """The warpgroup that loads: all tiles of the program, as many pairs of a block as it has, rounded up to a level."""
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips * 16, ROWS)
    it = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, tile = _place(t, tiles, blocks, group)
        e = gl.load(expert_ids + block)
        first = block * BM
        if (e >= 0) & (e < experts):
            strip0 = gl.minimum(tile * (ROWS // 16), strips - ROWS // 16)
            args = (
                x, w + e.to(gl.int64) * w_expert, s + e.to(gl.int64) * s_expert, sorted_ids, first, strip0, w_step, s_step, k,
                x_stride, pairs, it, (xs, ws, ss, full, empty),
            )  # fmt: skip
            if gl.load(sorted_ids + first + BM // 2) < pairs:
                it = _load_tile(*args, BM, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)
            elif gl.load(sorted_ids + first + BM // 4) < pairs:
                it = _load_tile(*args, BM // 2, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)
            else:
                it = _load_tile(*args, BM // 4, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K)


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
def _decoded(ws, ss, second, HALF: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, OPERAND: gl.constexpr):
    """bf16 [64, 64] of a stage: the warpgroup's part of the weight tile, as a left operand."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    LISTED: gl.constexpr = gl.DistributedLinearLayout([[8]], [[0], [0], [1], [2], [4]], [[16], [32]], [], [64])
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
def _tile(
    ring, it, k,
    HALF: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    KEEP: gl.constexpr,
):  # fmt: skip
    """float32 [64, N]: the sums of the warpgroup's weight rows and N pairs; ``it`` counts steps."""
    xs, ws, ss, full, empty = ring
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    acc = gl.zeros([64, N], gl.float32, ACC)
    steps = gl.cdiv(k, BK)
    stage = it % STAGES
    mbarrier.wait(full.index(stage), it // STAGES & 1)
    a = _decoded(ws.index(stage), ss.index(stage), _second(0, k, TAIL), HALF, KIND, BLOCK, OPERAND)
    fence_async_shared()
    for step in range(1, steps):
        token = warpgroup_mma(a, xs.index(stage).slice(0, N, 0).permute([1, 0]), acc, is_async=True)
        it += 1
        following = it % STAGES
        mbarrier.wait(full.index(following), it // STAGES & 1)
        b = _decoded(ws.index(following), ss.index(following), _second(step, k, TAIL), HALF, KIND, BLOCK, OPERAND)
        fence_async_shared()
        _used(b)
        acc = warpgroup_mma_wait(0, deps=[token])
        if KEEP:
            _used(a)
        _barrier()  # one thread arrives for all that have read the codes
        mbarrier.arrive(empty.index(stage), count=1)
        stage = following
        a = b
    token = warpgroup_mma(a, xs.index(stage).slice(0, N, 0).permute([1, 0]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[token])
    if KEEP:
        _used(a)
    _barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    return acc, it + 1


@gluon.jit
def _store(
    acc, y, sorted_ids, bias, row_weight, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit,
    INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Epilogue and store of the warpgroup's sums, 64 pairs after 64 (``epilogue.py`` has the formulas)."""
    N: gl.constexpr = acc.shape[1]
    if N > 64:
        a, b = gl.split(acc.reshape([64, 2, N // 2]).permute([0, 2, 1]))
        args = (pairs, n, scale, row0, act_alpha, act_beta, act_limit)
        to = (y, sorted_ids, bias, row_weight)
        _store(a, *to, first, *args, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE)
        _store(b, *to, first + N // 2, *args, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE)
    else:
        MEET: gl.constexpr = ACT != ""
        J: gl.constexpr = 32 if MEET else 64
        if MEET:
            OUT: gl.constexpr = gl.DistributedLinearLayout(
                [[0, 1], [0, 8], [0, 16], [0, 32]],
                [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [J, N],
            )  # fmt: skip
        else:
            OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // J, J // 8], [4, 1], [1, 0])
        if HAS_ALPHA:
            acc = acc * scale
        j = gl.arange(0, J, gl.SliceLayout(1, OUT))
        if MEET:
            g, u = gl.split(acc.reshape([4, 2, 8, N]).permute([0, 2, 3, 1]))
            g = gl.convert_layout(g.reshape([J, N]), OUT)
            u = gl.convert_layout(u.reshape([J, N]), OUT)
            if HAS_BIAS:
                j += row0 // 2
                inside = j < n // 2
                i0, i1 = gate_and_up(j, n // 2, INTERLEAVED)
                g += gl.load(bias + i0, mask=inside, other=0.0).to(gl.float32)[:, None]
                u += gl.load(bias + i1, mask=inside, other=0.0).to(gl.float32)[:, None]
            o = gated(g, u, act_alpha, act_beta, act_limit, ACT, LIMIT, True)
        else:
            o = gl.convert_layout(acc, OUT)
            if HAS_BIAS:
                j += row0
                o += gl.load(bias + j, mask=j < n, other=0.0).to(gl.float32)[:, None]
        if HAS_WEIGHT:
            slot = gl.load(sorted_ids + first + gl.arange(0, N, gl.SliceLayout(0, OUT)))
            o = o * gl.load(row_weight + slot, mask=slot < pairs, other=0.0)[None, :]
        o = gl.convert_layout(o.to(y.dtype.element_ty).permute([1, 0]), STORE)
        pair = gl.load(sorted_ids + first + gl.arange(0, N, gl.SliceLayout(1, STORE)))
        live = pair < pairs
        width = n // 2 if MEET else n
        column = (row0 // 2 if MEET else row0) + gl.arange(0, J, gl.SliceLayout(0, STORE))
        if WIDE:
            pair = pair.to(gl.int64)
        gl.store(y + (pair * width)[:, None] + column[None, :], o, mask=live[:, None] & (column < width)[None, :])


@gluon.jit
def _consumer(
    y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group, act_alpha, act_beta, act_limit,
    xs, ws, ss, full, empty,
    HALF: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr, INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr,
    HAS_ALPHA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: weight rows HALF * 64 to HALF * 64 + 63 of the same tiles."""
    blocks = gl.load(num_padded) // BM
    tiles = gl.cdiv(strips * 16, ROWS)
    it = 0
    for t in range(gl.program_id(0), blocks * tiles, gl.num_programs(0)):
        block, tile = _place(t, tiles, blocks, group)
        e = gl.load(expert_ids + block)
        first = block * BM
        if (e >= 0) & (e < experts):
            row0 = gl.minimum(tile * (ROWS // 16), strips - ROWS // 16) * 16 + HALF * 64
            scale = 1.0
            if HAS_ALPHA:
                scale = gl.load(alpha + e)
            ring = (xs, ws, ss, full, empty)
            args = (
                y, sorted_ids, bias + e.to(gl.int64) * n, row_weight, first, pairs, n, scale, row0, act_alpha, act_beta, act_limit,
            )  # fmt: skip
            if gl.load(sorted_ids + first + BM // 2) < pairs:
                acc, it = _tile(ring, it, k, HALF, BM, KIND, BLOCK, TAIL, STAGES, KEEP)
                _store(acc, *args, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE)
            elif gl.load(sorted_ids + first + BM // 4) < pairs:
                half, it = _tile(ring, it, k, HALF, BM // 2, KIND, BLOCK, TAIL, STAGES, KEEP)
                _store(half, *args, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE)
            else:
                quarter, it = _tile(ring, it, k, HALF, BM // 4, KIND, BLOCK, TAIL, STAGES, KEEP)
                _store(quarter, *args, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE)


@gluon.jit(do_not_specialize=["experts", "pairs", "group", "act_alpha", "act_beta", "act_limit"])
def _grouped_gemm_specialized_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter,
    experts, n, k, strips, w_expert, w_step, s_expert, s_step, x_stride, pairs, group, act_alpha, act_beta, act_limit,
    BM: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_WEIGHT: gl.constexpr, WIDE: gl.constexpr, TOP_K: gl.constexpr, KEEP: gl.constexpr,
    PRODUCT_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed, gates and ups where there is an activation; y [P, N_out]; bias [E, n]; blocks of BM pairs.

    ``partial`` and ``counter`` are not used: what launches takes the tensors of either kernel.
    """
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], gl.NVMMASharedLayout(128, 16, 2))
    T: gl.constexpr = 1 if KIND == "e2m1" else 2
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, T, ROWS // 16, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    ss = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
                act_alpha, act_beta, act_limit, xs, ws, ss, full, empty,
                0, BM, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, KEEP,
            )),
            (_consumer, (
                y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, experts, n, k, strips, pairs, group,
                act_alpha, act_beta, act_limit, xs, ws, ss, full, empty,
                1, BM, KIND, BLOCK, TAIL, STAGES, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, WIDE, KEEP,
            )),
            (_loader, (
                x, w, s, sorted_ids, expert_ids, num_padded, experts, k, strips, w_expert, w_step, s_expert, s_step, x_stride,
                pairs, group, xs, ws, ss, full, empty, BM, KIND, BLOCK, TAIL, STAGES, WIDE, TOP_K,
            )),
        ],
        [4, 4],
        [PRODUCT_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
