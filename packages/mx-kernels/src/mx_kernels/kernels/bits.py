"""Elements and block scales on bits, shared by the kernels: exact on every architecture, also where Triton has no FP8 type.

The rules and policies are those of ``reference.elements`` and ``reference.quantize``; ELEMENT is an element's name ("e4m3",
"e5m2", "e3m2", "e2m3", "e2m1") and RULE a scale rule's value. Codes are int32, the sign in the element's top bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import formats

_ELEMENTS = {e.name: e for e in (formats.E4M3, formats.E5M2, formats.E3M2, formats.E2M3, formats.E2M1)}

INF_BITS = tl.constexpr(0x7F800000)


@triton.constexpr_function
def element_bits(name):
    return _ELEMENTS[name].bits


@triton.constexpr_function
def mantissa_bits(name):
    return _ELEMENTS[name].mantissa


@triton.constexpr_function
def largest(name):
    return _ELEMENTS[name].max


@triton.constexpr_function
def min_normal_bits(name):
    """The float32 bits of the element's smallest normal, 2^(1 - bias)."""
    return (128 - _ELEMENTS[name].bias) << 23


@triton.constexpr_function
def code_offset(name):
    """What ``encode`` adds so that the element's smallest normal has the code 2^M."""
    e = _ELEMENTS[name]
    return -((128 - e.bias) << e.mantissa) - ((23 - e.mantissa) << 23)


@triton.constexpr_function
def decode_factor(name):
    return 2.0 ** (127 - _ELEMENTS[name].bias)


@triton.constexpr_function
def emax(name):
    return _ELEMENTS[name].emax


@triton.constexpr_function
def rule_addend(name, rule):
    """What is added to the bits of amax so that a truncated exponent follows the rule.

    RCEIL: m > T is m + (0x7fffff - T) >= 2^23, with T the mantissa of the element's maximum, 2^emax * (1 + T / 2^23).
    """
    e = _ELEMENTS[name]
    top = int((e.max / 2.0**e.emax - 1.0) * 2**23)
    return {"floor": 0, "ceil": 0x7FFFFF, "even": 1 << (22 - e.mantissa), "rceil": 0x7FFFFF - top}[rule]


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_amax(x):
    """Float32 bits of the largest magnitude along the last axis: [N, B] -> int32 [N]; NaN is above INF_BITS."""
    return tl.reduce(tl.abs(x), 1, larger).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def e8m0_byte(bits, ELEMENT: tl.constexpr, RULE: tl.constexpr):
    """E8M0 bytes from the float32 bits of amax; Inf gives 254, NaN 255."""
    # The sum stays below 2^31: INF_BITS + 0x7fffff is the largest that is not NaN.
    byte = tl.maximum(((bits + rule_addend(ELEMENT, RULE)) >> 23) - emax(ELEMENT), 0)
    return tl.where(bits >= INF_BITS, tl.where(bits > INF_BITS, 255, 254), byte)


@triton.jit
def e8m0_value(byte):
    """2^(byte - 127) as float32; byte 0 is subnormal, 255 NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_reciprocal(byte):
    """2^(127 - byte) as float32 for bytes to 254, there the subnormal 2^-127."""
    return tl.where(byte == 254, 0x00400000, (254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def on_grid(v, ELEMENT: tl.constexpr):
    """Float32 bits of 2^e, the binade of |v| but no lower than the smallest normal's, and 2^(e + 23 - M) + |v|, |v| saturated:
    that sum's last place is a step of the element's grid, so the adder rounds to nearest, ties to even.
    """
    a = tl.minimum(tl.abs(v), largest(ELEMENT))
    binade = tl.maximum(a.to(tl.int32, bitcast=True) & INF_BITS, min_normal_bits(ELEMENT))
    return binade, tl.fma(binade.to(tl.float32, bitcast=True), 1.0 * (1 << (23 - mantissa_bits(ELEMENT))), a)


@triton.jit
def grid_code(binade, total, ELEMENT: tl.constexpr):
    """The code of the magnitude that ``on_grid`` rounded: what the sum's bits lie above the addend's are grid steps."""
    M: tl.constexpr = mantissa_bits(ELEMENT)
    return total.to(tl.int32, bitcast=True) - binade + (binade >> (23 - M)) + code_offset(ELEMENT)


@triton.jit
def grid_value(binade, total, ELEMENT: tl.constexpr):
    """The magnitude that ``on_grid`` rounded."""
    return total - binade.to(tl.float32, bitcast=True) * (1 << (23 - mantissa_bits(ELEMENT)))


@triton.jit
def encode(v, ELEMENT: tl.constexpr):
    """Int32 codes of float32 values: nearest, ties to even, saturating, sign of zero kept."""
    SIGN: tl.constexpr = 1 << (element_bits(ELEMENT) - 1)
    binade, total = on_grid(v, ELEMENT)
    return grid_code(binade, total, ELEMENT) | ((v.to(tl.int32, bitcast=True) >> (32 - element_bits(ELEMENT))) & SIGN)


@triton.jit
def round_to(v, ELEMENT: tl.constexpr):
    """``decode(encode(v))`` without the code; the sign of zero is kept."""
    binade, total = on_grid(v, ELEMENT)
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    return (grid_value(binade, total, ELEMENT).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """Float32 values of int32 codes, the NaN codes and E5M2's infinities included."""
    if ELEMENT == "e5m2":
        # E5M2 is the upper half of float16.
        return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        SIGN: tl.constexpr = 1 << (element_bits(ELEMENT) - 1)
        # The code's fields land on a float32's; a product with a power of two makes up for the biases and is exact.
        bits = ((code & (SIGN - 1)) << (23 - mantissa_bits(ELEMENT))) | ((code & SIGN) << (32 - element_bits(ELEMENT)))
        value = bits.to(tl.float32, bitcast=True) * decode_factor(ELEMENT)
        if ELEMENT == "e4m3":
            value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
        return value


@triton.jit
def split4(x, N: tl.constexpr, G: tl.constexpr):
    """[N, 4 G] -> four tensors [N, G]: elements 0, 1, 2, 3 of each group of four neighbours."""
    even, odd = tl.split(x.reshape(N, G, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def split8(x, N: tl.constexpr, G: tl.constexpr):
    """[N, 8 G] -> eight tensors [N, G]: elements 0 ... 7 of each group of eight neighbours."""
    even, odd = tl.split(x.reshape(N, 4 * G, 2))
    x0, x2, x4, x6 = split4(even, N, G)
    x1, x3, x5, x7 = split4(odd, N, G)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.constexpr_function
def word_factor(name):
    """What ``word`` wants its values multiplied by: it places the element where the hardware rounds to its grid."""
    return {"e2m1": 0.5, "e2m3": 2.0**-6, "e3m2": 2.0**-12}[name]


@triton.constexpr_function
def _e2m1_asm(narrow):
    """PTX: eight float32 v / 2 -> a word of eight E2M1 codes.

    |v| is the sum of its parts in [0, 2], [2, 4] and [4, 6]. Saturation cuts the parts out; each is counted in its own steps
    (1/2, 1, 2) by an addition to 1.5 * 2^23, whose last place is 1: nearest, ties to even. NaN counts as 0. ``narrow``: in
    pairs of float16 (1.5 * 2^10 + 4, from which subtracting copysign(4, v) makes the sign bit, 8), which hold v exactly if it
    came from bf16 or float16, or round it where it is far below the first tie, 1/4.
    """
    if narrow:
        body = [
            f"""cvt.rn.f16x2.f32 h, ${2 * i + 2}, ${2 * i + 1}; and.b32 a, h, 0x7FFF7FFF;
            fma.rn.sat.f16x2 t, a, one, zero;    fma.rn.f16x2 r{i}, t, four, base;
            fma.rn.sat.f16x2 t, a, one, minus1;  fma.rn.f16x2 r{i}, t, two, r{i};
            fma.rn.sat.f16x2 t, a, one, minus2;  fma.rn.f16x2 r{i}, t, one, r{i};
            lop3.b32 t, h, 0x80008000, four, 0xEA; sub.rn.f16x2 r{i}, r{i}, t;"""
            for i in range(4)
        ]
        constants = {"zero": 0, "one": 0x3C003C00, "two": 0x40004000, "four": 0x44004400, "base": 0x66046604}
        constants |= {"minus1": 0xBC00BC00, "minus2": 0xC000C000}
        # Codes 0 and 1 are in bytes 0 and 2 of r0; the result's nibbles are in order.
        pack = """prmt.b32 r0, r0, r1, 0x6240; prmt.b32 r2, r2, r3, 0x6240; prmt.b32 r1, r0, r2, 0x5410;
            prmt.b32 r3, r0, r2, 0x7632; mad.lo.u32 $0, r3, 16, r1;"""
    else:
        body = [
            f"""mov.b32 h{i}, ${i + 1}; abs.f32 a, h{i};
            add.rn.sat.f32 t, a, 0f00000000; fma.rn.f32 r{i}, t, 0f40800000, 0f4B400000;
            add.rn.sat.f32 t, a, 0fBF800000; fma.rn.f32 r{i}, t, 0f40000000, r{i};
            add.rn.sat.f32 t, a, 0fC0000000; add.rn.f32 r{i}, r{i}, t;"""
            for i in range(8)
        ]
        constants = {}
        # Low bytes of r, then the top bytes of v, whose highest bits are the signs of the low and of the high nibbles.
        pack = """mad.lo.u32 r0, r1, 16, r0; mad.lo.u32 r2, r3, 16, r2; mad.lo.u32 r4, r5, 16, r4; mad.lo.u32 r6, r7, 16, r6;
            prmt.b32 r0, r0, r2, 0x0040; prmt.b32 r4, r4, r6, 0x0040; prmt.b32 r0, r0, r4, 0x5410;
            prmt.b32 h0, h0, h2, 0x0073; prmt.b32 h4, h4, h6, 0x0073; prmt.b32 h0, h0, h4, 0x5410;
            prmt.b32 h1, h1, h3, 0x0073; prmt.b32 h5, h5, h7, 0x0073; prmt.b32 h1, h1, h5, 0x5410;
            shr.u32 h0, h0, 4; and.b32 h0, h0, 0x08080808; or.b32 r0, r0, h0; lop3.b32 $0, h1, 0x80808080, r0, 0xEA;"""
    names = "".join(f", {name}" for name in constants)
    loads = "".join(f"mov.b32 {name}, {value};" for name, value in constants.items())
    return "{ .reg .b32 h, h<8>, a, t, r<8>" + names + "; " + loads + " ".join(body) + pack + "}"


@triton.constexpr_function
def _fp6_asm(name):
    """PTX: four float32 -> four FP6 codes in the low 24 bits of a word.

    E2M3 * 2^-6 (E3M2 * 2^-12) has the smallest normal, the steps and so the codes of E4M3 (E5M2); codes above 31 become 31.
    """
    wide = {"e2m3": "e4m3x2", "e3m2": "e5m2x2"}[name]
    return f"""{{ .reg .b16 p, q; .reg .b32 c, a, b;
        cvt.rn.satfinite.{wide}.f32 p, $2, $1; cvt.rn.satfinite.{wide}.f32 q, $4, $3; mov.b32 c, {{p, q}};
        shr.u32 a, c, 5; shr.u32 b, c, 6; lop3.b32 a, a, b, 0x01010101, 0xA8; mul.lo.u32 a, a, 31;
        lop3.b32 a, a, c, 0x1F1F1F1F, 0xA8; shr.u32 c, c, 2; and.b32 c, c, 0x20202020; or.b32 c, c, a;
        shr.u32 a, c, 2; and.b32 a, a, 0x0FC00FC0; lop3.b32 c, c, 0x003F003F, a, 0xEA;
        shr.u32 a, c, 4; and.b32 a, a, 0x00FFF000; lop3.b32 $0, c, 0x00000FFF, a, 0xEA; }}"""


@triton.jit
def words(v, ELEMENT: tl.constexpr, ASM: tl.constexpr, NARROW: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """Codes of v [N, B] float32, packed: eight E2M1 a word [N, B / 8], or four E2M3 or E3M2 in 24 bits [N, B / 4].

    ASM: by NVIDIA's instructions, v multiplied by ``word_factor`` already; NARROW: v was bf16 or float16, times a power of two.
    """
    if ELEMENT == "e2m1":
        v0, v1, v2, v3, v4, v5, v6, v7 = split8(v, N, B // 8)
        if ASM:
            code: tl.constexpr = _e2m1_asm(NARROW)
            parts = [v0, v1, v2, v3, v4, v5, v6, v7]
            return tl.inline_asm_elementwise(code, "=r,f,f,f,f,f,f,f,f", parts, dtype=tl.int32, is_pure=True, pack=1)
        else:
            low = encode(v0, ELEMENT) | (encode(v1, ELEMENT) << 4) | (encode(v2, ELEMENT) << 8)
            low |= (encode(v3, ELEMENT) << 12) | (encode(v4, ELEMENT) << 16) | (encode(v5, ELEMENT) << 20)
            return low | (encode(v6, ELEMENT) << 24) | (encode(v7, ELEMENT) << 28)
    else:
        v0, v1, v2, v3 = split4(v, N, B // 4)
        if ASM:
            code: tl.constexpr = _fp6_asm(ELEMENT)
            parts = [v0, v1, v2, v3]
            return tl.inline_asm_elementwise(code, "=r,f,f,f,f", parts, dtype=tl.int32, is_pure=True, pack=1)
        else:
            low = encode(v0, ELEMENT) | (encode(v1, ELEMENT) << 6) | (encode(v2, ELEMENT) << 12)
            return low | (encode(v3, ELEMENT) << 18)
