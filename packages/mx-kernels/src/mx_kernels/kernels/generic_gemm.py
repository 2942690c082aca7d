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
from torch import Tensor

from ..device import Architecture, Device
from ..formats import get_format
from .generic_kernel import _gemm_kernel
from .launch import launch, takes_registers

_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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
    """Tile and launch options, from host integers alone: BM, BN, BK, REORDER, DRAIN, num_warps, num_stages.

    BK is what keeps every tile free of spills and under 99 KB of shared memory (the compile tests check both). REORDER is for
    Hopper, whose matrix unit takes w from registers: a fifth fewer instructions there, nothing gained on sm_80 and sm_120.
    """
    reorder = kinds[1] in ("e2m1", "e4m3", "e5m2") and compute != "native"
    reorder = reorder and (arch.name == "sm90" or triton.knobs.runtime.interpret)
    bm = min(max(block & -block, 16), 128)  # of blocks of 160 or 96 pairs 32
    if compute == "fp32":
        tile = {"BM": min(bm, 64), "BN": 64, "BK": 32, "REORDER": reorder, "DRAIN": False}
        return {**tile, "num_warps": 4, "num_stages": 2}
    split = compute == "bf16" and "fp16" in kinds
    if split:
        bm = min(bm, 64)
    plain = kinds[1] in _PLAIN.values()
    bk = 128 if w_block != 16 or compute == "native" else 64  # four blocks of w, one for each of REORDER's four threads
    if compute == "native":
        if bm >= 64 and {"e2m3", "e3m2"} & {*kinds}:
            bk = 64
    elif bm >= 64 or arch.vendor == "amd" or split or plain:
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
        "DRAIN": arch.name == "sm90" and (split or not plain) and takes_registers(),
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
