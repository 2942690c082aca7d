"""Tiles of GEMM operands: loaded from the canonical layout and decoded in registers, on integers alone.

A tile is [R, BK]: R rows of x or of w, BK values along K. KIND is what a value is stored as: an element's name ("e4m3" ..
"e2m1") or "bf16", "fp16", "fp32". B is the length of a scale's block (32: E8M0 scales, 16: E4M3), 0 for plain tensors.

Every code times its block scale is a bf16 (at most 6 significant bits), so decoding to bf16 is exact; only values finer than
bf16's smallest subnormal, 2^-133, which E8M0 bytes 0 to 5 alone can reach, are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import decode, decode_factor, e8m0_value, element_bits, mantissa_bits

PLAIN = ("bf16", "fp16", "fp32")


@triton.constexpr_function
def is_plain(kind):
    return kind in PLAIN


@triton.constexpr_function
def per_unit(kind):
    """Values in one storage unit: four FP6 in three bytes, two FP4 in a byte, else one."""
    return {"e2m3": 4, "e3m2": 4, "e2m1": 2}.get(kind, 1)


@triton.jit
def _load(p, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """p [R, C] with the rows and columns outside masked to zero."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(p, mask=rows[:, None] & cols[None, :], other=0)
    elif MASK_ROWS:
        return tl.load(p, mask=rows[:, None], other=0)
    elif MASK_COLS:
        return tl.load(p, mask=cols[None, :], other=0)
    else:
        return tl.load(p)


@triton.jit
def load_stored(p, rows, k, K, KIND: tl.constexpr, BK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr):
    """Values k .. k + BK - 1 of the rows at p [R, 1], as stored: [R, BK], or [R, BK / 2] bytes of two FP4 codes.

    FP6 comes unpacked, [R, BK] codes: its three-byte units have no tile of their own.
    """
    PER: tl.constexpr = per_unit(KIND)
    unit = k // PER + tl.arange(0, BK // PER)
    inside = unit < K // PER
    if PER == 4:
        q = p + unit[None, :] * 3
        b0 = _load(q, rows, inside, MASK_ROWS, MASK_K).to(tl.uint16)
        b1 = _load(q + 1, rows, inside, MASK_ROWS, MASK_K).to(tl.uint16)
        b2 = _load(q + 2, rows, inside, MASK_ROWS, MASK_K).to(tl.uint16)
        c0 = b0 & 63
        c1 = (b0 >> 6) | ((b1 & 15) << 2)
        c2 = (b1 >> 4) | ((b2 & 3) << 4)
        c3 = b2 >> 2
        return tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(p.shape[0], BK)
    else:
        return _load(p + unit[None, :], rows, inside, MASK_ROWS, MASK_K)


@triton.jit
def load_scales(p, rows, k, K, B: tl.constexpr, BK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr):
    """The scale bytes of that tile: [R, BK / B]; zero where masked, so that the product is zero there."""
    block = k // B + tl.arange(0, BK // B)
    return _load(p + block[None, :], rows, block < K // B, MASK_ROWS, MASK_K)


@triton.jit
def codes_of(stored, KIND: tl.constexpr):
    """One code a value: FP4 bytes [R, C] -> [R, 2 C], low nibble first; others are codes already."""
    if KIND == "e2m1":
        return tl.join(stored & 15, stored >> 4).reshape(stored.shape[0], 2 * stored.shape[1])
    else:
        return stored


@triton.jit
def bf16_of(code, KIND: tl.constexpr):
    """The bf16 values of codes: their fields land on a bf16's, a product with a power of two makes up for the biases."""
    BITS: tl.constexpr = element_bits(KIND)
    MAG: tl.constexpr = (1 << (BITS - 1)) - 1
    c = code.to(tl.uint16)
    mag = c & MAG
    bits = (mag << (7 - mantissa_bits(KIND))) | ((c & (MAG + 1)) << (16 - BITS))
    v = bits.to(tl.bfloat16, bitcast=True) * tl.full((), decode_factor(KIND), tl.bfloat16)
    if KIND == "e4m3":
        nan = tl.full((), 0x7FC0, tl.uint16).to(tl.bfloat16, bitcast=True)
        v = tl.where(mag == 0x7F, nan, v)
    if KIND == "e5m2":
        special = (0x7F80 | ((mag & 3) << 5) | ((c & 0x80) << 8)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        v = tl.where(mag >= 0x7C, special, v)
    return v


@triton.jit
def bf16_scale(byte, B: tl.constexpr):
    """The bf16 values of scale bytes: E8M0 (B 32; byte 0 is subnormal, 255 NaN) or E4M3 (B 16)."""
    if B == 16:
        return bf16_of(byte, "e4m3")
    else:
        b = byte.to(tl.uint16)
        bits = tl.where(b == 0, 0x40, tl.where(b == 255, 0x7FC0, b << 7)).to(tl.uint16)
        return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _times_scale(v, s, B: tl.constexpr):
    """v [R, BK] * s [R, BK / B]."""
    R: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    return (v.reshape(R, BK // B, B) * s.reshape(R, BK // B, 1)).reshape(R, BK)


@triton.jit
def decoded(stored, scales, KIND: tl.constexpr, B: tl.constexpr, FP32: tl.constexpr):
    """The tile's values [R, BK], bf16 (float32 where FP32); a plain tile keeps its type unless FP32."""
    if is_plain(KIND):
        if FP32:
            return stored.to(tl.float32)
        else:
            return stored
    elif FP32:
        s = scales.to(tl.int32)
        if B == 16:
            s = decode(s, "e4m3")
        else:
            s = e8m0_value(s)
        return _times_scale(decode(codes_of(stored, KIND).to(tl.int32), KIND), s, B)
    else:
        return _times_scale(bf16_of(codes_of(stored, KIND), KIND), bf16_scale(scales, B), B)


@triton.jit
def native_operand(stored, KIND: tl.constexpr):
    """The tile as ``tl.dot_scaled`` takes it: FP8 and FP4 as they are; FP6 as E4M3, which holds each of its values."""
    if per_unit(KIND) == 4:
        return bf16_of(stored, KIND).to(tl.float32).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return stored


@triton.constexpr_function
def native_name(kind):
    return {"e2m3": "e4m3", "e3m2": "e4m3"}.get(kind, kind)


@triton.jit
def native_scale(scales, B: tl.constexpr):
    if B == 16:
        return scales.to(tl.float8e4nv, bitcast=True)
    else:
        return scales


@triton.jit
def halves(v):
    """float16 as two bf16 whose sum it is, exactly: 8 and then at most 3 of its 11 significant bits."""
    high = v.to(tl.bfloat16)
    rest = (v.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
    return high, tl.where(tl.abs(high.to(tl.float32)) == float("inf"), tl.zeros_like(rest), rest)
