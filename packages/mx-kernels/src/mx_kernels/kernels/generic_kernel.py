"""The kernel of the GEMMs on the canonical layout: a tile's rows, its sum over K, its epilogue. See ``generic_gemm``.

Letters: P pairs, E experts, N rows of w, K summed over; a tile is BN rows of w times BM rows of x, its sums [BN, BM].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import drained
from .finish import activated, store_quantized
from .operands import (
    decoded,
    for_matrix_unit,
    halves,
    in_order,
    like_matrix_unit,
    load_scales,
    load_stored,
    nan_codes,
    native_name,
    native_operand,
    native_scale,
    unit_row,
    unit_rows,
)


@triton.jit
def _mul_add(w, x, acc, WKIND: tl.constexpr, XKIND: tl.constexpr, COMPUTE: tl.constexpr):
    """acc [BN, BM] + w [BN, BK] @ x [BM, BK].T of decoded tiles."""
    if COMPUTE == "fp32":
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    elif COMPUTE == "fp16":
        return tl.dot(w, tl.trans(x), acc)
    elif XKIND == "fp16":
        high, low = halves(x)
        acc = tl.dot(w, tl.trans(low), acc)
        return tl.dot(w, tl.trans(high), acc)
    elif WKIND == "fp16":
        high, low = halves(w)
        acc = tl.dot(low, tl.trans(x), acc)
        return tl.dot(high, tl.trans(x), acc)
    else:
        return tl.dot(w, tl.trans(x), acc)


@triton.jit
def _step(
    acc,  # [BN, BM]
    x_bad,
    w_bad,
    xp,  # [BM, 1] pointers to rows
    xsp,
    wp,  # [BN, 1]
    wsp,
    live,
    k,
    K,
    XKIND: tl.constexpr,
    XB: tl.constexpr,
    WKIND: tl.constexpr,
    WB: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASK_K: tl.constexpr,
    BK: tl.constexpr,
    REORDER: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Add the products of values k .. k + BK - 1, and note the words that hold NaN codes."""
    NATIVE: tl.constexpr = COMPUTE == "native"
    xt = load_stored(xp, live, k, K, XKIND, NATIVE, BK, True, MASK_K)
    wt = load_stored(wp, live, k, K, WKIND, NATIVE, BK, False, MASK_K)
    xs = None
    ws = None
    if XB > 0:
        xs = load_scales(xsp, live, k, K, XB, BK, True, MASK_K)
    if WB > 0:
        ws = load_scales(wsp, live, k, K, WB, BK, False, MASK_K)
    if NATIVE:
        acc = tl.dot_scaled(
            native_operand(wt, WKIND),
            native_scale(ws, WB),
            native_name(WKIND),
            tl.trans(native_operand(xt, XKIND)),
            native_scale(xs, XB),
            native_name(XKIND),
            acc,
        )
    else:
        wv = decoded(wt, ws, WKIND, WB, COMPUTE == "fp32")
        xv = in_order(decoded(xt, xs, XKIND, XB, COMPUTE == "fp32"), XKIND)
        if REORDER:
            wv = for_matrix_unit(wv, WKIND, WARPS)
            xv = like_matrix_unit(xv, WKIND)
        else:
            wv = in_order(wv, WKIND)
        acc = _mul_add(wv, xv, acc, WKIND, XKIND, COMPUTE)
        if XKIND == "e4m3":
            x_bad |= nan_codes(xt, XKIND)
        if WKIND == "e4m3":
            w_bad |= nan_codes(wt, WKIND)
    return acc, x_bad, w_bad


@triton.jit
def _weight_row(r, pid_n, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr):
    """The row of w for row r of the product's tile; rows past the end repeat one inside and are not stored."""
    if GATED:
        col = tl.minimum(pid_n * (BN // 2) + r // 16 * 8 + r % 8, I - 1)
        half = r // 8 % 2
        return 2 * col + half if INTERLEAVED else col + half * I
    else:
        return tl.minimum(pid_n * BN + r, I - 1)


@triton.jit
def _rows_of_block(
    pid,
    sorted_ids,
    expert_ids,
    num_padded,
    num_pairs,
    E,
    ROUTING: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """(expert or -1, pairs [BM], live [BM]) of row block ``pid``.

    ROUTING "none": all rows in order, one weight. "sorted": block b of the alignment. "self": block b leads if
    pair b is the first, or the BM-th, 2 BM-th .. after it, that goes to its expert, and it collects those that follow.
    """
    m = tl.arange(0, BM)
    if ROUTING == "none":
        pair = pid * BM + m
        return 0, pair, pair < num_pairs
    elif ROUTING == "sorted":
        PARTS: tl.constexpr = (BLOCK + BM - 1) // BM
        block = pid // PARTS
        slot = block * BLOCK + (pid % PARTS) * BM + m
        e = -1
        if block * BLOCK < tl.load(num_padded):
            e = tl.load(expert_ids + block)
        pair = tl.load(sorted_ids + slot, mask=(m < BLOCK) & (e >= 0), other=num_pairs)
        return e, pair, pair < num_pairs
    else:
        i = tl.arange(0, PAIRS)
        ids = tl.load(expert_ids + i, mask=i < num_pairs, other=-1)
        e = tl.load(expert_ids + pid)
        same = (ids == e).to(tl.int32)
        place = tl.cumsum(same, 0) - 1
        rank = tl.sum(tl.where(i < pid, same, 0), 0)
        e = tl.where((e >= 0) & (e < E) & (rank % BM == 0), e, -1)
        mine = (same[None, :] == 1) & (place[None, :] == (rank + m)[:, None])
        live = tl.sum(mine.to(tl.int32), 1) > 0
        return e, tl.sum(tl.where(mine, i[None, :], 0), 1), live


@triton.jit(do_not_specialize=["x_scale_stride", "w_scale_stride_e", "w_scale_stride_n"])  # their UNITs say it all
def _gemm_kernel(
    x,  # [M, ..]: values, words of codes, or bytes of them where COMPUTE is "native" (but words for FP6)
    x_scale,
    x_global,
    x_stride,
    x_scale_stride,
    w,  # [E, N, ..]
    w_scale,
    w_global,
    w_stride_e,
    w_stride_n,
    w_scale_stride_e,
    w_scale_stride_n,
    out,  # [P, N_out], or its codes
    out_scale,
    sorted_ids,
    expert_ids,
    num_padded,
    num_pairs,
    top_k,
    E,
    N,
    K,
    tiles_n,
    bias,
    bias_stride_e,
    row_weight,
    alpha,
    beta,
    limit,
    XKIND: tl.constexpr,
    XB: tl.constexpr,
    X_GLOBAL: tl.constexpr,  # "", "one" or "row"
    WKIND: tl.constexpr,
    WB: tl.constexpr,
    W_GLOBAL: tl.constexpr,  # "", "one" or "expert"
    ROUTING: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATED: tl.constexpr,
    CLAMP: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    ELEMENT: tl.constexpr,  # of the requantized result, or ""
    RULE: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,  # K >= BK
    RAGGED: tl.constexpr,  # K % BK > 0
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    REORDER: tl.constexpr,
    DRAIN: tl.constexpr,  # see ``dot.py``
    WARPS: tl.constexpr,
    X_UNIT: tl.constexpr,  # of x_stride, a power of two: what the compiler knows of the alignment of rows
    XS_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    WS_UNIT: tl.constexpr,
):
    pid = tl.program_id(0)
    e, pair, live = _rows_of_block(
        pid // tiles_n, sorted_ids, expert_ids, num_padded, num_pairs, E, ROUTING, BLOCK, BM, PAIRS
    )
    if e < 0:
        return
    e = e.to(tl.int64) if ROUTING != "none" else tl.full((), 0, tl.int64)
    pid_n = pid % tiles_n
    r = tl.arange(0, BN)
    I = N // 2 if GATED else N
    n = _weight_row(r, pid_n, I, GATED, INTERLEAVED, BN)
    loaded = n
    if REORDER:
        loaded = _weight_row(unit_row(r, WARPS), pid_n, I, GATED, INTERLEAVED, BN)
    loaded = loaded.to(tl.int64)
    row = (pair // top_k).to(tl.int64)
    xp = x + (row * x_stride * X_UNIT)[:, None]
    wp = w + ((e * w_stride_e + loaded * w_stride_n) * W_UNIT)[:, None]
    NATIVE: tl.constexpr = COMPUTE == "native"
    xsp = xp
    wsp = wp
    if XB > 0:
        xsp = x_scale + (row * x_scale_stride * XS_UNIT)[:, None]
    if WB > 0:
        wsp = w_scale + ((e * w_scale_stride_e + loaded * w_scale_stride_n) * WS_UNIT)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    # A word with a NaN code makes its whole row NaN, which is what its product is: cheaper than a test of each value.
    X_NAN: tl.constexpr = XKIND == "e4m3" and not NATIVE
    W_NAN: tl.constexpr = WKIND == "e4m3" and not NATIVE
    x_bad = tl.zeros((BM, BK // 4) if X_NAN else (1, 1), tl.int32)
    w_bad = tl.zeros((BN, BK // 4) if W_NAN else (1, 1), tl.int32)
    whole = K // BK * BK  # masks along K would keep loads from being wide, so the last, ragged step stands alone
    if WHOLE:
        tl.assume(whole > 0)  # else ptxas serializes wgmma (C7515), since the loop might not run
        for k in range(0, whole, BK):
            acc, x_bad, w_bad = _step(
                acc,
                x_bad,
                w_bad,
                xp,
                xsp,
                wp,
                wsp,
                live,
                k,
                K,
                XKIND,
                XB,
                WKIND,
                WB,
                COMPUTE,
                False,
                BK,
                REORDER,
                WARPS,
            )
            if DRAIN:
                acc = drained(acc)
    if RAGGED:
        acc, x_bad, w_bad = _step(
            acc, x_bad, w_bad, xp, xsp, wp, wsp, live, whole, K, XKIND, XB, WKIND, WB, COMPUTE, True, BK, REORDER, WARPS
        )
    if X_NAN:
        acc = tl.where((tl.max((x_bad != 0).to(tl.int32), 1) > 0)[None, :], float("nan"), acc)
    if W_NAN:
        bad = tl.max((w_bad != 0).to(tl.int32), 1)[:, None]
        if REORDER:
            bad = unit_rows(bad, WARPS)
        acc = tl.where(bad > 0, float("nan"), acc)
    if X_GLOBAL == "row":
        g = tl.load(x_global + row, mask=live, other=0.0)
        if W_GLOBAL == "one":
            g = g * tl.load(w_global)
        if W_GLOBAL == "expert":
            g = g * tl.load(w_global + e)
        acc = acc * g[None, :]
    elif X_GLOBAL == "one" or W_GLOBAL != "":
        g = 1.0
        if X_GLOBAL == "one":
            g = tl.load(x_global)
        if W_GLOBAL == "one":
            g = g * tl.load(w_global)
        if W_GLOBAL == "expert":
            g = g * tl.load(w_global + e)
        acc = acc * g
    if BIAS:
        acc = acc + tl.load(bias + e * bias_stride_e + n).to(tl.float32)[:, None]
    if GATED:
        pairs_of_8 = tl.permute(acc.reshape(BN // 16, 2, 8, BM), (0, 2, 3, 1))
        gate, up = tl.split(pairs_of_8)
        o = activated(gate, up, alpha, beta, limit, ACT, True, CLAMP).reshape(BN // 2, BM)
        C: tl.constexpr = BN // 2
    else:
        o = acc
        if ACT != "":
            o = activated(acc, acc, alpha, beta, limit, ACT, False, CLAMP)
        C: tl.constexpr = BN
    if ROW_WEIGHT:
        o = o * tl.load(row_weight + pair, mask=live, other=0.0)[None, :]
    at = pair.to(tl.int64)
    if ELEMENT == "":
        c = pid_n * C + tl.arange(0, C)
        p = out + (at * I)[:, None] + c[None, :]
        tl.store(p, tl.trans(o).to(out.dtype.element_ty), mask=live[:, None] & (c < I)[None, :])
    else:
        store_quantized(tl.trans(o), out, out_scale, at, live, pid_n * C, I, ELEMENT, RULE, 32)
