"""Activation, alone or fused with the quantization of its result, in one pass.

    h [..., 2 I] (gate and up, concatenated or interleaved), or [..., I] not gated -> [..., I], or codes and scales

In float32, one rounding at the end. A program takes N blocks of B columns of the result, row after row. Bound by memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import ScaleRule, get_format
from . import quantize as quantization
from .bits import element_bits, word_factor
from .finish import activated
from .launch import launch, target
from .quantize import _block_scale, _load_tile, _store_codes, _widened


@triton.jit
def _activate_kernel(
    h,  # [R, 2 I] or [R, I]
    out,  # [R, I], or its codes
    scale,
    blocks,
    per_row,  # I / B
    alpha,
    beta,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMP: tl.constexpr,
    ELEMENT: tl.constexpr,  # "" stores values
    RULE: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    PAIRS: tl.constexpr,  # h is bf16, aligned to 4 bytes
    WHOLE: tl.constexpr,  # a thread takes whole blocks
    WIDE: tl.constexpr,  # 2^31 blocks or more
    N: tl.constexpr,
    B: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * N
    n = tl.arange(0, N)
    live = n < tl.minimum(blocks - start, N).to(tl.int32)
    if GATED:
        block = start + n if WIDE else start.to(tl.int32) + n
        row = (block // per_row).to(tl.int64)
        # Column c of the result: gate 2 c and up 2 c + 1, or gate c and up I + c.
        column = (block - row * per_row) * B
        if INTERLEAVED and PAIRS:
            word = _load_tile(h.to(tl.pointer_type(tl.int32)), row * (per_row * B) + column, live, WHOLE, N, B)
            g = (word << 16).to(tl.float32, bitcast=True)
            u = (word & -65536).to(tl.float32, bitcast=True)
        elif INTERLEAVED:
            both = _load_tile(h, 2 * (row * (per_row * B) + column), live, WHOLE, N, 2 * B)
            g, u = tl.split(both.to(tl.float32).reshape(N, B, 2))
        elif PAIRS:
            first = row * (per_row * B) + column // 2
            h = h.to(tl.pointer_type(tl.int32))
            g = _widened(_load_tile(h, first, live, WHOLE, N, B // 2), N, B)
            u = _widened(_load_tile(h, first + per_row * (B // 2), live, WHOLE, N, B // 2), N, B)
        else:
            first = 2 * row * (per_row * B) + column
            g = _load_tile(h, first, live, WHOLE, N, B).to(tl.float32)
            u = _load_tile(h, first + per_row * B, live, WHOLE, N, B).to(tl.float32)
    else:
        g = _load_tile(h, start * B + n * B, live, WHOLE, N, B).to(tl.float32)
        u = g
    v = activated(g, u, alpha, beta, limit, KIND, GATED, CLAMP, ASM)
    if ELEMENT == "":
        tl.store(
            out + start * B + (n[:, None] * B + tl.arange(0, B)[None, :]),
            v.to(out.dtype.element_ty),
            mask=live[:, None],
        )
    else:
        byte, factor, bad = _block_scale(v, 1.0, ELEMENT, RULE, True, ASM)
        tl.store(scale + start + n, byte.to(tl.uint8), mask=live)
        if ASM and element_bits(ELEMENT) < 8:
            factor = factor * word_factor(ELEMENT)
        _store_codes(out, start, live, v * factor[:, None], bad, ELEMENT, FP8, ASM, False, N, B)


def activate(
    h: Tensor,  # [..., 2 I] or [..., I]
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(values [..., I], empty scales), or codes and scale bytes of the MX format ``requantize``.

    Rules that try several scales take a second pass over float32 values.
    """
    h = h.contiguous()
    width = h.shape[-1] // 2 if gated else h.shape[-1]
    lead = h.shape[:-1]
    empty = torch.empty(0, dtype=torch.uint8, device=h.device)
    if requantize and rule == ScaleRule.SEARCH.value:
        values, _ = activate(h, act, act_layout, gated, alpha, beta, limit, "", "", torch.float32)
        return quantization.quantize(values, requantize, rule, None)
    f = get_format(requantize) if requantize else None
    if f is None:
        # The widest block that divides a row; 1 for odd widths.
        block = math.gcd(width, 32) if width else 32
        out, scale = torch.empty((*lead, width), dtype=out_dtype, device=h.device), empty
    else:
        if f.has_global_scale:
            raise ValueError(f"{f} needs a global scale: activate to float32, then quantize")
        block = f.block
        out = torch.empty((*lead, f.data_width(width)), dtype=torch.uint8, device=h.device)
        scale = torch.empty((*lead, width // block), dtype=torch.uint8, device=h.device)
    if out.numel() == 0:
        return out, scale
    blocks = math.prod(lead) * width // block
    device = target(h.device)
    pairs = h.dtype == torch.bfloat16 and block == 32 and h.data_ptr() % 4 == 0
    # Whole blocks need one a thread, 128 for four warps; few blocks are spread over all multiprocessors.
    n, warps = 128 if f is not None and pairs else 2048 // block, 4
    while warps > 1 and blocks < 2 * device.units * n:
        n, warps = n // 2, warps // 2
    launch(
        _activate_kernel,
        (triton.cdiv(blocks, n),),
        h.device,
        h,
        out,
        None if f is None else scale,
        blocks,
        width // block,
        alpha,
        beta,
        limit,
        KIND=act,
        GATED=gated,
        INTERLEAVED=act_layout == "interleaved",
        CLAMP=limit != math.inf,
        ELEMENT="" if f is None else f.element.name,
        RULE=rule,
        FP8=device.fp8,
        ASM=device.asm and (f is None or device.fp8 or f.element.bits != 6),
        PAIRS=pairs,
        # Not from float32: its interleaved tile has permuted registers, whose FP8 codes Triton 3.6 swaps in a warp shuffle.
        WHOLE=f is not None and pairs,
        WIDE=blocks >= 2**31 - n,
        N=n,
        B=block,
        num_warps=warps,
    )
    return out, scale
