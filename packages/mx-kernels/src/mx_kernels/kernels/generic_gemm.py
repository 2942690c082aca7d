"""GEMM and grouped GEMM on the canonical layout: one kernel for every GPU and every mix of operands.

    out[p, n] = epilogue(sum_k x[p // top_k, k] * w[e, n, k])

A program computes BN rows of w times BM rows of x, transposed (w on the side of the matrix unit's M, where block-scaled
instructions want 128 rows whatever the number of tokens is). COMPUTE says how:

- "native": ``tl.dot_scaled`` on codes and scales, where the architecture has the instruction;
- "bf16": operands decoded to bf16 in registers, exactly (``operands``). A float16 operand is split into two bf16 whose sum it
  is, and multiplied twice: float16 could not hold the scaled codes, and one bf16 could not hold the float16;
- "fp16": two float16 operands; "fp32": anything with a float32 operand, in full float32 precision.

A gated activation needs gate n and up n in one program: its tile holds alternately 8 gate and 8 up rows of w, wherever the
activation's layout has them, so that on NVIDIA's accumulator layout both are in one thread.

Letters: P pairs, E experts, N rows of w, K summed over, B a scale's block. Offsets of experts and rows are 64-bit.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import Architecture, Device
from ..formats import get_format
from .finish import activated, store_quantized
from .launch import launch
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

_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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


def _units(t: Tensor, kind: str, native: bool) -> Tensor:
    """An operand in the units that the kernel loads: codes as 32-bit words, but as bytes for ``tl.dot_scaled``."""
    if t.dtype != torch.uint8 or (native and kind not in ("e2m3", "e3m2")):
        return t
    if t.data_ptr() % 4 or any(stride % 4 for stride in t.stride()[:-1]):
        t = t.clone(memory_format=torch.contiguous_format)  # an odd offset into someone's buffer: words need alignment
    return t.view(torch.int32)


_UNITS = (16, 8, 4, 2, 1)


def _strides(t: Tensor | None, dims: int, units: tuple[int, ...] = _UNITS) -> tuple[tuple[int, ...], int]:
    """The strides of the leading dimensions over the first of ``units`` that divides them, and that unit.

    Triton itself only notices multiples of 16, and reads word by word, or scale by scale, otherwise: MXFP4 rows of K = 2880
    are 360 words.
    """
    if t is None:
        return (0,) * dims, 1
    strides = t.stride()[:dims]
    unit = next(u for u in units if not any(stride % u for stride in strides))
    return tuple(stride // unit for stride in strides), unit


def scale_units(compute: str, arch: Architecture, reorder: bool, w_block: int, bk: int) -> tuple[int, ...]:
    """Strides of scales may be multiples of these: how many scales a thread loads at once decides the whole tile's layout.

    REORDER wants four threads along K, one block each: bytes, or words of the four blocks that make up BK. On sm_100 Triton
    3.6 cannot compile a decoded tile whose scales are loaded several at a time (TritonGPUOptimizeDotOperands fails).
    """
    if reorder:
        return (4, 1) if w_block == 32 and bk == 128 else (1,)
    return (1,) if compute != "native" and arch.name in ("sm100", "sm103") else _UNITS


_KERNEL_RULES = ("floor", "ceil", "even", "rceil")  # the others try several scales: quantized by a second launch


def _kind(t: Tensor, name: str) -> tuple[str, int]:
    """(KIND, B) of an operand."""
    if not name:
        return _PLAIN[t.dtype], 0
    f = get_format(name)
    return f.element.name, f.block


def compute_mode(device: Device, x: str, w: str, kinds: tuple[str, str]) -> str:
    """COMPUTE for operands of these formats ("" plain) and kinds on a device."""
    if "fp32" in kinds or triton.knobs.runtime.interpret:
        return "fp32"
    if x and w and device.native(x, w):
        return "native"
    return "fp16" if kinds == ("fp16", "fp16") else "bf16"


def tile_config(compute: str, arch: Architecture, kinds: tuple[str, str], w_block: int, block: int) -> dict[str, int]:
    """Tile and launch options, from host integers alone: BM, BN, BK, REORDER, num_warps, num_stages.

    BK is what keeps every tile free of spills and under 99 KB of shared memory (the compile tests check both). REORDER is for
    Hopper, whose matrix unit takes w from registers: a fifth fewer instructions there, nothing gained on sm_80 and sm_120.
    """
    reorder = kinds[1] in ("e2m1", "e4m3", "e5m2") and compute != "native"
    reorder = reorder and (arch.name == "sm90" or triton.knobs.runtime.interpret)
    bm = min(max(block, 16), 128)
    if compute == "fp32":
        return {"BM": min(bm, 64), "BN": 64, "BK": 32, "REORDER": reorder, "num_warps": 4, "num_stages": 2}
    split = compute == "bf16" and "fp16" in kinds
    if split:
        bm = min(bm, 64)
    bk = 128 if w_block != 16 or compute == "native" else 64  # four blocks of w, one for each of REORDER's four threads
    if compute == "native":
        if bm >= 64 and {"e2m3", "e3m2"} & {*kinds}:
            bk = 64
    elif bm >= 64 or arch.vendor == "amd" or split or kinds[1] in _PLAIN.values():
        blackwell = arch.name in (
            "sm100",
            "sm103",
        )  # sums in tensor memory leave registers; Triton 3.6 fails at 32 there
        bk = 32 if split and bm >= 64 and not blackwell else 64
    return {
        "BM": bm,
        "BN": 128,
        "BK": bk,
        "REORDER": reorder,
        "num_warps": 8 if bm == 128 else 4,
        "num_stages": 2 if arch.vendor == "amd" else 3,
    }


@functools.lru_cache(maxsize=4096)
def _plan(
    device: torch.device, x_format: str, w_format: str, x_kind: str, w_kind: str, w_block: int, block: int
) -> tuple[str, dict[str, int], tuple[int, ...]]:
    facts = Device.probe(device)
    compute = compute_mode(facts, x_format, w_format, (x_kind, w_kind))
    options = tile_config(compute, facts.arch, (x_kind, w_kind), w_block, block)
    return compute, options, scale_units(compute, facts.arch, bool(options["REORDER"]), w_block, options["BK"])


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    x_global: Tensor | None,
    x_format: str,
    w: Tensor,  # [E, N, ..]
    w_scale: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    routing: tuple[str, Tensor | None, Tensor | None, Tensor | None, int],
    num_pairs: int,
    top_k: int,
    bias: Tensor | None,
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    row_weight: Tensor | None,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    (x_kind, xb), (w_kind, wb) = _kind(x, x_format), _kind(w, w_format)
    how, sorted_ids, expert_ids, num_padded, block = routing
    num_experts, n = w.shape[0], w.shape[1]
    k = x_scale.shape[1] * xb if x_scale is not None else x.shape[1]
    if k == 0:  # an empty sum: the kernel's loop wants at least one step
        x, w, k = x.new_zeros((x.shape[0], 16)), w.new_zeros((num_experts, n, 16)), 16
    width = n // 2 if gated else n
    f = get_format(requantize) if requantize else None
    fused = f is not None and rule in _KERNEL_RULES
    if f is not None and fused:
        out = x.new_empty((num_pairs, f.data_width(width)), dtype=torch.uint8)
        out_scale = x.new_empty((num_pairs, width // f.block), dtype=torch.uint8)
    else:
        out = x.new_empty((num_pairs, width), dtype=torch.float32 if f is not None else out_dtype)
        out_scale = x.new_empty((0,), dtype=torch.uint8)
    if num_pairs and width:
        compute, options, units = _plan(x.device, x_format, w_format, x_kind, w_kind, wb, block)
        bm, bn = options["BM"], options["BN"]
        if how == "none":
            programs = triton.cdiv(num_pairs, bm)
        elif how == "self":
            programs = num_pairs
        else:
            assert expert_ids is not None
            programs = expert_ids.shape[0] * max(1, block // bm)
        if programs:
            per_row = x_global is not None and x_global.ndim > 0
            tiles_n = triton.cdiv(width, bn // 2 if gated else bn)
            native = compute == "native"
            x, w = _units(x, x_kind, native), _units(w, w_kind, native)
            (x_stride,), x_unit = _strides(x, 1)
            (xs_stride,), xs_unit = _strides(x_scale, 1, units)
            (we_stride, wn_stride), w_unit = _strides(w, 2)
            (wse_stride, wsn_stride), ws_unit = _strides(w_scale, 2, units)
            launch(
                _gemm_kernel,
                (tiles_n * programs,),
                x.device,
                x,
                x_scale,
                x_global,
                x_stride,
                xs_stride,
                w,
                w_scale,
                w_global,
                we_stride,
                wn_stride,
                wse_stride,
                wsn_stride,
                out,
                out_scale,
                sorted_ids,
                expert_ids,
                num_padded,
                num_pairs,
                top_k,
                num_experts,
                n,
                k,
                tiles_n,
                bias,
                bias.stride(0) if bias is not None else 0,
                row_weight,
                alpha,
                beta,
                0.0 if math.isinf(limit) else limit,
                XKIND=x_kind,
                XB=xb,
                X_GLOBAL="" if x_global is None else "row" if per_row else "one",
                WKIND=w_kind,
                WB=wb,
                W_GLOBAL="" if w_global is None else "expert" if w_global.ndim else "one",
                ROUTING=how,
                BLOCK=block,
                PAIRS=triton.next_power_of_2(num_pairs) if how == "self" else 1,
                BIAS=bias is not None,
                ACT=act,
                INTERLEAVED=act_layout == "interleaved",
                GATED=gated,
                CLAMP=not math.isinf(limit),
                ROW_WEIGHT=row_weight is not None,
                ELEMENT=f.element.name if f is not None and fused else "",
                RULE=rule if fused else "",
                COMPUTE=compute,
                WHOLE=k >= options["BK"],
                RAGGED=k % options["BK"] > 0,
                WARPS=options["num_warps"],
                X_UNIT=x_unit,
                XS_UNIT=xs_unit,
                W_UNIT=w_unit,
                WS_UNIT=ws_unit,
                **options,
            )
    if f is not None and not fused:
        from . import quantize

        data, scale = quantize.quantize(out, f.name, rule, None)
        return data, scale
    return out, out_scale


def grouped_gemm(
    x: Tensor,  # [M, ..]
    x_scale: Tensor | None,
    x_global: Tensor | None,
    x_format: str,
    w: Tensor,  # [E, N, ..]
    w_scale: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    sorted_ids: Tensor | None,
    expert_ids: Tensor,
    num_padded: Tensor,
    block_size: int,
    num_pairs: int,
    top_k: int,
    *epilogue: object,
) -> tuple[Tensor, Tensor]:
    """The op ``mx_kernels::grouped_gemm``; ``epilogue`` is its arguments from ``bias`` on."""
    if sorted_ids is None:
        routing = ("self", None, expert_ids, None, block_size)
    else:
        routing = ("sorted", sorted_ids, expert_ids, num_padded, block_size)
    return _launch(x, x_scale, x_global, x_format, w, w_scale, w_global, w_format, routing, num_pairs, top_k, *epilogue)


def gemm(
    x: Tensor,  # [M, ..]
    x_scale: Tensor | None,
    x_global: Tensor | None,
    x_format: str,
    w: Tensor,  # [N, ..]
    w_scale: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    bias: Tensor | None,
    *epilogue: object,
) -> tuple[Tensor, Tensor]:
    """The op ``mx_kernels::gemm``; ``epilogue`` is its arguments from ``act`` on."""
    rows = x.shape[0]
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    routing = ("none", None, None, None, block)
    w, w_scale = w.unsqueeze(0), None if w_scale is None else w_scale.unsqueeze(0)
    bias = None if bias is None else bias.unsqueeze(0)
    return _launch(x, x_scale, x_global, x_format, w, w_scale, w_global, w_format, routing, rows, 1, bias, *epilogue)
