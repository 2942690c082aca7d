"""Tiles of GEMM operands: loaded from the canonical layout and decoded in registers, on integers alone.

A tile is [R, BK]: R rows of x or of w, BK values along K. KIND is what a value is stored as: an element's name ("e4m3" ..
"e2m1") or "bf16", "fp16", "fp32". B is the length of a scale's block (32: E8M0 scales, 16: E4M3), 0 for plain tensors.

Codes are read as 32-bit words and spread over two bf16 patterns at a time: a code's fields land on a bf16's, and a product
with a power of two makes up for the difference of the biases. Every code times its block scale is a bf16 (at most 6
significant bits), so this is exact; only values finer than bf16's smallest subnormal, 2^-133, which E8M0 bytes 0 to 9 alone
can reach, are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import decode, decode_factor, e8m0_value, mantissa_bits

PLAIN = ("bf16", "fp16", "fp32")


@triton.constexpr_function
def is_plain(kind):
    return kind in PLAIN


@triton.constexpr_function
def is_fp6(kind):
    return kind in ("e2m3", "e3m2")


@triton.constexpr_function
def per_unit(kind, native):
    """Values in one loaded unit: a plain value, a word of codes (16 FP6 in three), or a byte of them where native."""
    if kind in PLAIN:
        return 1
    if kind in ("e2m3", "e3m2"):
        return 16
    return {True: 2, False: 8}[native] if kind == "e2m1" else {True: 1, False: 4}[native]


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
def load_stored(
    p,
    rows,
    k,
    K,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    BK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """Values k .. k + BK - 1 of the rows at p [R, 1], as ``per_unit`` says: [R, BK / PER].

    FP6 comes as bf16 patterns, [R, BK]: its three words for 16 values have no tile of their own.
    """
    PER: tl.constexpr = per_unit(KIND, NATIVE)
    unit = k // PER + tl.arange(0, BK // PER)
    inside = unit < K // PER
    if is_fp6(KIND):
        q = p + unit[None, :] * 3
        w0 = _load(q, rows, inside, MASK_ROWS, MASK_K).to(tl.uint32, bitcast=True)
        w1 = _load(q + 1, rows, inside, MASK_ROWS, MASK_K).to(tl.uint32, bitcast=True)
        w2 = _load(q + 2, rows, inside, MASK_ROWS, MASK_K).to(tl.uint32, bitcast=True)
        g0 = _four_fp6(w0, KIND)
        g1 = _four_fp6((w0 >> 24) | (w1 << 8), KIND)
        g2 = _four_fp6((w1 >> 16) | (w2 << 16), KIND)
        g3 = _four_fp6(w2 >> 8, KIND)
        # [.., value, a, b] with group 2 a + b -> [.., a, b, value]
        groups = tl.permute(tl.join(tl.join(g0, g2), tl.join(g1, g3)), (0, 1, 3, 4, 2))
        return groups.reshape(p.shape[0], BK)
    else:
        return _load(p + unit[None, :], rows, inside, MASK_ROWS, MASK_K)


@triton.jit
def load_scales(p, rows, k, K, B: tl.constexpr, BK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr):
    """The scale bytes of that tile: [R, BK / B]; zero where masked, so that the product is zero there."""
    block = k // B + tl.arange(0, BK // B)
    return _load(p + block[None, :], rows, block < K // B, MASK_ROWS, MASK_K)


@triton.jit
def _low(pair):
    return (pair & 0xFFFF).to(tl.uint16)


@triton.jit
def _high(pair):
    return (pair >> 16).to(tl.uint16)


@triton.jit
def _four_fp6(g, KIND: tl.constexpr):
    """The patterns of the four codes in the low 24 bits: [R, C] -> [R, C, 4]."""
    M: tl.constexpr = mantissa_bits(KIND)
    MAG: tl.constexpr = 31 << (7 - M)
    p0 = ((g << 10) & 0x8000) | ((g << (7 - M)) & MAG)
    p1 = ((g << 4) & 0x8000) | ((g << 1 >> M) & MAG)
    p2 = ((g >> 2) & 0x8000) | ((g >> (5 + M)) & MAG)
    p3 = ((g >> 8) & 0x8000) | ((g >> (11 + M)) & MAG)
    a = tl.join(p0.to(tl.uint16), p2.to(tl.uint16))
    b = tl.join(p1.to(tl.uint16), p3.to(tl.uint16))
    return tl.join(a, b).reshape(g.shape[0], g.shape[1], 4)


@triton.jit
def patterns(stored, KIND: tl.constexpr):
    """uint16 bf16 patterns [R, BK] of the values over 2^(127 - bias); NaN and Inf codes as if they were numbers.

    The values of a word come as pairs of its two halves: FP4 value 4 h + 2 a + b is at 4 a + 2 b + h, FP8 value 2 h + o at
    2 o + h, so that a pair is one register and no byte moves.
    """
    if is_fp6(KIND):
        return stored
    else:
        q = stored.to(tl.uint32, bitcast=True)
        R: tl.constexpr = q.shape[0]
        C: tl.constexpr = q.shape[1]
        if KIND == "e2m1":
            q0 = ((q << 12) & 0x80008000) | ((q << 6) & 0x01C001C0)
            q1 = ((q << 8) & 0x80008000) | ((q << 2) & 0x01C001C0)
            q2 = ((q << 4) & 0x80008000) | ((q >> 2) & 0x01C001C0)
            q3 = (q & 0x80008000) | ((q >> 6) & 0x01C001C0)
            low = tl.join(tl.join(_low(q0), _low(q2)), tl.join(_low(q1), _low(q3)))
            high = tl.join(tl.join(_high(q0), _high(q2)), tl.join(_high(q1), _high(q3)))
            return tl.join(low, high).reshape(R, 8 * C)
        else:
            M: tl.constexpr = mantissa_bits(KIND)
            MAG: tl.constexpr = 0x007F007F << (7 - M)
            even = ((q << 8) & 0x80008000) | ((q << (7 - M)) & MAG)
            odd = (q & 0x80008000) | ((q >> (1 + M)) & MAG)
            low = tl.join(_low(even), _low(odd))
            return tl.join(low, tl.join(_high(even), _high(odd))).reshape(R, 4 * C)


@triton.jit
def in_order(v, KIND: tl.constexpr):
    """Values as ``patterns`` has them, put in the order of K: the tile of x."""
    R: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    if KIND == "e2m1":
        return tl.permute(v.reshape(R, BK // 8, 2, 2, 2), (0, 1, 4, 2, 3)).reshape(R, BK)
    elif KIND == "e4m3" or KIND == "e5m2":
        return tl.permute(v.reshape(R, BK // 4, 2, 2), (0, 1, 3, 2)).reshape(R, BK)
    else:
        return v


@triton.jit
def unit_row(i, WARPS: tl.constexpr):
    """The row of the product that row i of a loaded tile of w becomes: see ``for_matrix_unit``."""
    return i // (16 * WARPS) * (16 * WARPS) + i % (8 * WARPS) // 8 * 16 + i // (8 * WARPS) % 2 * 8 + i % 8


@triton.jit
def unit_rows(v, WARPS: tl.constexpr):
    """A tile [N, C] with its rows moved to where ``unit_row`` says."""
    N: tl.constexpr = v.shape[0]
    C: tl.constexpr = v.shape[1]
    return tl.permute(v.reshape(N // (16 * WARPS), 2, WARPS, 8, C), (0, 2, 1, 3, 4)).reshape(N, C)


@triton.jit
def for_matrix_unit(v, KIND: tl.constexpr, WARPS: tl.constexpr):
    """A tile of FP4 or FP8 w as ``patterns`` has it, rows and K in the order in which Hopper's matrix unit takes them.

    A thread there feeds rows r and r + 8 and, of 16 values along K, 2 t + {0, 1, 8, 9}, t being one of 4 neighbours. A load gives
    a warp 8 rows and the thread a quarter of BK in a row. A sum over K may run in any order that x shares, and rows may come
    in any order that the product's columns follow; these orders make the loaded registers the fed ones, without an exchange
    (four blocks in BK; with another number some exchange is left).
    """
    N: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    v = unit_rows(v, WARPS)
    if KIND == "e2m1":
        return tl.permute(v.reshape(N, 4, BK // 32, 2, 2, 2), (0, 2, 3, 4, 1, 5)).reshape(N, BK)
    else:
        return tl.permute(v.reshape(N, 4, BK // 16, 2, 2), (0, 2, 3, 1, 4)).reshape(N, BK)


@triton.jit
def like_matrix_unit(v, KIND: tl.constexpr):
    """Values of x, in the order of K, put in the order that ``for_matrix_unit`` gives a w of this KIND."""
    R: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    if KIND == "e2m1":
        return tl.permute(v.reshape(R, 4, BK // 32, 2, 2, 2), (0, 2, 4, 5, 1, 3)).reshape(R, BK)
    else:
        return tl.permute(v.reshape(R, 4, BK // 16, 2, 2), (0, 2, 4, 1, 3)).reshape(R, BK)


@triton.jit
def nan_codes(stored, KIND: tl.constexpr):
    """Bits set in the words of E4M3 codes that hold a NaN (0x7F or 0xFF)."""
    q = stored.to(tl.uint32, bitcast=True)
    return (((q & 0x7F7F7F7F) + 0x01010101) & 0x80808080).to(tl.int32, bitcast=True)


@triton.jit
def _bf16(bits, KIND: tl.constexpr):
    v = bits.to(tl.bfloat16, bitcast=True) * tl.full((), decode_factor(KIND), tl.bfloat16)
    if KIND == "e5m2":
        infinite = (bits & 0x0F80) == 0x0F80  # Inf and NaN keep their mantissa and get bf16's largest exponent
        v = tl.where(infinite, (bits | 0x7F80).to(tl.bfloat16, bitcast=True), v)
    return v


@triton.jit
def _fp32(bits, KIND: tl.constexpr):
    v = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * decode_factor(KIND)
    if KIND == "e5m2":
        infinite = ((bits.to(tl.uint32) | 0x7F80) << 16).to(tl.float32, bitcast=True)
        v = tl.where((bits & 0x0F80) == 0x0F80, infinite, v)
    return v


@triton.jit
def _bf16_scale(byte, B: tl.constexpr):
    """The bf16 values of scale bytes: E8M0 (B 32; byte 0 is subnormal, 255 NaN) or E4M3 (B 16)."""
    b = byte.to(tl.uint16)
    if B == 16:
        bits = ((b & 0x80) << 8) | ((b & 0x7F) << 4)
        v = _bf16(bits, "e4m3")
        return tl.where((b & 0x7F) == 0x7F, tl.full((), 0x7FC0, tl.uint16).to(tl.bfloat16, bitcast=True), v)
    else:
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
    """The tile's values [R, BK], bf16 (float32 where FP32), in the order of ``patterns``; a plain tile keeps its type unless FP32."""
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
        return _times_scale(_fp32(patterns(stored, KIND), KIND), s, B)
    else:
        return _times_scale(_bf16(patterns(stored, KIND), KIND), _bf16_scale(scales, B), B)


@triton.jit
def native_operand(stored, KIND: tl.constexpr):
    """The tile as ``tl.dot_scaled`` takes it: FP8 and FP4 as they are; FP6 as E4M3, which holds each of its values."""
    if is_fp6(KIND):
        return _bf16(stored, KIND).to(tl.float32).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
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
