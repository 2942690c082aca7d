"""What happens to an output tile in registers: the activation, and the quantization of its rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import block_amax, e8m0_byte, e8m0_reciprocal, element_bits, encode


@triton.jit
def sigmoid(x, slope, ASM: tl.constexpr):
    """1 / (1 + exp(-slope * x)), to a few units in the last place; by NVIDIA's exp2 and reciprocal where ASM, a third of the
    instructions."""
    if ASM:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * (slope * -1.4426950408889634)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e + 1.0], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sigmoid(slope * x)


@triton.jit
def activated(
    g, u, alpha, beta, limit, KIND: tl.constexpr, GATED: tl.constexpr, CLAMP: tl.constexpr, ASM: tl.constexpr = False
):
    """The formulas of ``Activation`` in float32; u is not used where not GATED, limit only where CLAMP. NaN stays NaN. ASM: short
    sigmoids of gates, where instructions bound the time."""
    if CLAMP:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        if GATED:
            u = tl.maximum(u, -limit, propagate_nan=tl.PropagateNan.ALL)
            u = tl.minimum(u, limit, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "swiglu_oai":
        return g * sigmoid(g, alpha, ASM) * (u + beta)
    if KIND == "silu":
        f = g * sigmoid(g, 1.0, ASM and GATED)
    elif KIND == "gelu":
        f = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), without the cancellation
        f = g * tl.sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g * g))
    elif KIND == "relu2":
        r = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        f = r * r
    else:
        f = g
    if GATED:
        f = f * u
    return f


@triton.jit
def store_quantized(
    out,  # [M, C] float32
    data,
    scale,
    row,  # [M] int64, rows of the result
    live,  # [M]
    col,  # the tile's first column
    width,  # columns of the result
    ELEMENT: tl.constexpr,
    RULE: tl.constexpr,
    B: tl.constexpr,
):
    """Quantize the tile along its columns with E8M0 scales, as ``reference.quantize`` does, and store codes and scales."""
    M: tl.constexpr = out.shape[0]
    C: tl.constexpr = out.shape[1]
    BITS: tl.constexpr = element_bits(ELEMENT)
    blocks = out.reshape(M * (C // B), B)
    bits = block_amax(blocks)
    byte = e8m0_byte(bits, ELEMENT, RULE)
    bad = bits > 0x7F800000
    code = encode(blocks * e8m0_reciprocal(byte)[:, None], ELEMENT)
    code = tl.where(bad[:, None], 0, code).reshape(M, C)
    s = col // B + tl.arange(0, C // B)
    inside = live[:, None] & (s < width // B)[None, :]
    tl.store(scale + row[:, None] * (width // B) + s[None, :], byte.reshape(M, C // B).to(tl.uint8), mask=inside)
    if BITS == 8:
        c = col + tl.arange(0, C)
        tl.store(data + row[:, None] * width + c[None, :], code.to(tl.uint8), mask=live[:, None] & (c < width)[None, :])
    elif BITS == 4:
        low, high = tl.split(code.reshape(M, C // 2, 2))
        c = col // 2 + tl.arange(0, C // 2)
        p = data + row[:, None] * (width // 2) + c[None, :]
        tl.store(p, (low | (high << 4)).to(tl.uint8), mask=live[:, None] & (c < width // 2)[None, :])
    else:
        even, odd = tl.split(code.reshape(M, C // 4, 2, 2))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        word = c0 | (c1 << 6) | (c2 << 12) | (c3 << 18)
        c = col // 4 + tl.arange(0, C // 4)
        p = data + row[:, None] * (width // 4 * 3) + (c * 3)[None, :]
        ok = live[:, None] & (c < width // 4)[None, :]
        tl.store(p, (word & 255).to(tl.uint8), mask=ok)
        tl.store(p + 1, ((word >> 8) & 255).to(tl.uint8), mask=ok)
        tl.store(p + 2, ((word >> 16) & 255).to(tl.uint8), mask=ok)
