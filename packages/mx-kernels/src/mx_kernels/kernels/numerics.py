"""Codes and scale bytes of packed weights to 16-bit (``packing.py`` has the layout and the arithmetic).

Each decoder comes twice: as PTX on 32-bit registers (NVIDIA, sm_80 and up), and in plain Triton on float32 (every other
device, and Triton's interpreter). Both are exact. PTX leaves the exponent biases to the scale, so that one multiplication
of bf16 pairs does both; plain Triton takes them off first, because AMD hardware flushes subnormals.

Tiles: T K tiles, S strips of 16 rows, 128 words each. g, c: a thread's place in its warp (``packing.py``).
"""

import triton
import triton.language as tl

_PAIRS = {  # of a word W, scratch t and u: what leaves two neighbours of a row in v, for rows g and g + 8 in turn
    "e2m1": (  # nine integer operations for eight codes
        "and.b32 v, W, 0x81C081C0;",
        "shf.r.wrap.b32 t, W, W, 6; and.b32 v, t, 0x81C081C0;",
        "shf.r.wrap.b32 t, W, W, 12; and.b32 v, t, 0x81C081C0;",
        "shf.r.wrap.b32 t, W, W, 2; shl.b32 u, W, 6; and.b32 u, u, 0x00400040; lop3.b32 v, t, 0x81808180, u, 0xEA;",
    ),
    "e4m3": (  # five for four
        "and.b32 v, W, 0x87F087F0;",
        "shf.r.wrap.b32 t, W, W, 4; shl.b32 u, W, 4; and.b32 u, u, 0x00700070; lop3.b32 v, t, 0x87808780, u, 0xEA;",
    ),
    "e5m2": (  # seven for four
        "shr.b32 t, W, 3; and.b32 t, t, 0x0FE00FE0; lop3.b32 v, W, 0x80008000, t, 0xEA;",
        "shl.b32 u, W, 8; shl.b32 t, W, 5; and.b32 t, t, 0x0FE00FE0; lop3.b32 v, u, 0x80008000, t, 0xEA;",
    ),
}


def _decoding(kind: str, scaled: bool) -> str:
    """The assembly whose results are a word's codes as bf16; operands after them: the word, and where ``scaled`` the scales of rows g
    and of rows g + 8 that it multiplies by, each twice in 32 bits."""
    pairs = _PAIRS[kind]
    word = 2 * len(pairs)
    lines = ["{ .reg .b32 t, u, v;"]
    for i, pair in enumerate(pairs):
        lines.append(pair.replace("W", f"${word}"))
        if scaled:
            lines.append(f"mul.rn.bf16x2 v, v, ${word + 1 + i % 2};")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, v;")
    return "\n".join((*lines, "}"))


E2M1, E4M3, E5M2 = (tl.constexpr(_decoding(kind, False)) for kind in _PAIRS)
SCALED_E2M1, SCALED_E4M3, SCALED_E5M2 = (tl.constexpr(_decoding(kind, True)) for kind in _PAIRS)


@triton.jit
def decode_e2m1(w):  # int32 [T, S, 128] -> bf16 [16 S, 64 T], values * 2^-126
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        E2M1,
        "=h,=h,=h,=h,=h,=h,=h,=h,r",
        [w],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )
    return word_tile(a, b, c, d, e, f, g, h)


@triton.jit
def decode_e4m3(w):  # int32 [T, S, 128] -> bf16 [16 S, 32 T], values * 2^-120
    a, b, c, d = tl.inline_asm_elementwise(
        E4M3,
        "=h,=h,=h,=h,r",
        [w],
        dtype=(tl.bfloat16,) * 4,
        is_pure=True,
        pack=1,
    )
    return byte_tile(a, b, c, d)


@triton.jit
def decode_e5m2(w):  # int32 [T, S, 128] -> bf16 [16 S, 32 T], values * 2^-112
    a, b, c, d = tl.inline_asm_elementwise(
        E5M2,
        "=h,=h,=h,=h,r",
        [w],
        dtype=(tl.bfloat16,) * 4,
        is_pure=True,
        pack=1,
    )
    return byte_tile(a, b, c, d)


@triton.jit
def decode_e8m0(s):  # uint8 [N, B] -> bf16 [N, B], 2^(s - 127); 0 is 0
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        prmt.b32 t, $2, 0, 0x5140;
        shl.b32 $0, t, 7;
        prmt.b32 t, $2, 0, 0x7362;
        shl.b32 $1, t, 7;
        }
        """,
        "=r,=r,r",
        [s],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode_e8m0_word(s):  # int32 [N], two bytes each -> bf16 [N, 2], 2^(s - 127); 0 is 0
    low, high = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        prmt.b32 t, $2, 0, 0x5140;
        shl.b32 t, t, 7;
        mov.b32 {$0, $1}, t;
        }
        """,
        "=h,=h,r",
        [s],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return tl.join(low, high)


@triton.jit
def decode_e5m3(s):  # uint8 [N, B] -> bf16 [N, B], NVFP4's scales * 2^119
    """With a code times 2^-126 the product is the weight times 2^-7, without the global scale."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        prmt.b32 t, $2, 0, 0x5140;
        mad.lo.u32 $0, t, 16, 0x76007600;
        prmt.b32 t, $2, 0, 0x7362;
        mad.lo.u32 $1, t, 16, 0x76007600;
        }
        """,
        "=r,=r,r",
        [s],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def word_tile(a, b, c, d, e, f, g, h):  # (k half, row half, parity) 000, 001 .. 111, each [T, S, 128] -> [16 S, 64 T]
    even = tl.join(tl.join(a, e), tl.join(c, g))  # .. k half, row half
    v = tl.join(even, tl.join(tl.join(b, f), tl.join(d, h)))  # .. parity
    v = v.reshape(a.shape[0], a.shape[1], 8, 4, 4, 2, 2, 2)  # .. g, c, step, k half, row half, parity
    return v.trans(1, 6, 2, 0, 4, 5, 3, 7).reshape(a.shape[1] * 16, a.shape[0] * 64)


@triton.jit
def byte_tile(a, b, c, d):  # (row half, parity) 00, 01, 10, 11, each [T, S, 128] -> [16 S, 32 T]
    t = tl.join(tl.join(a, c), tl.join(b, d))
    t = t.reshape(a.shape[0], a.shape[1], 8, 4, 2, 2, 2, 2)  # .. g, c, step, k half, row half, parity
    return t.trans(1, 6, 2, 0, 4, 5, 3, 7).reshape(a.shape[1] * 16, a.shape[0] * 32)


# --- plain Triton: float32 out, values without a factor ---


@triton.jit
def plain_e2m1(w):  # int32 [T, S, 128] -> float32 [16 S, 64 T]
    x = w.to(tl.uint32, bitcast=True)
    second = (x >> 6) | (x << 26)
    third = (x >> 12) | (x << 20)
    fourth = (((x >> 2) | (x << 30)) & 0x81808180) | ((x << 6) & 0x00400040)
    first_half = tl.join(_e2m1_pair(x), _e2m1_pair(second))  # .., parity, row half
    v = tl.join(first_half, tl.join(_e2m1_pair(third), _e2m1_pair(fourth)))  # .., k half
    v = v.reshape(w.shape[0], w.shape[1], 8, 4, 4, 2, 2, 2)  # .. g, c, step, parity, row half, k half
    return v.trans(1, 6, 2, 0, 4, 7, 3, 5).reshape(w.shape[1] * 16, w.shape[0] * 64)


@triton.jit
def _e2m1_pair(x):
    return tl.join(_e2m1_value(x & 0xFFFF), _e2m1_value(x >> 16))


@triton.jit
def _e2m1_value(x):  # sign at bit 15, code at bits 8-6
    e = (x >> 7) & 3
    m = (x >> 6) & 1
    twice = tl.where(e > 0, (2 + m) << (tl.maximum(e, 1) - 1), m)
    v = twice.to(tl.float32) * 0.5
    return tl.where((x & 0x8000) != 0, -v, v)


@triton.jit
def plain_e4m3(w):  # int32 [T, S, 128] -> float32 [16 S, 32 T]
    return _plain_bytes(gathered_e4m3(w), 3)


@triton.jit
def plain_e5m2(w):  # int32 [T, S, 128] -> float32 [16 S, 32 T]
    return _plain_bytes(w, 2)


@triton.jit
def _rotated(x, BY: tl.constexpr):  # to the left
    u = x.to(tl.uint32, bitcast=True)
    return ((u << BY) | (u >> (32 - BY))).to(tl.int32, bitcast=True)


@triton.jit
def spread_e4m3(w):
    """``packing._spread_e4m3``: words of four codes, a byte each -> bits where ``decode_e4m3`` wants them."""
    return (w & -0x7FF87FF9) | ((w >> 4) & 0x07F007F0) | ((w << 8) & 0x78007800) | (_rotated(w, 12) & 0x00080008)


@triton.jit
def gathered_e4m3(w):
    """The inverse of ``spread_e4m3``."""
    byte = (w & -0x7FF87FF9) | ((w & 0x07F007F0) << 4) | ((w & 0x78007800) >> 8)
    return byte | _rotated(w & 0x00080008, 20)


@triton.jit
def _plain_bytes(w, M: tl.constexpr):
    x = w.to(tl.uint32, bitcast=True)
    even = tl.join(_float8_value((x >> 8) & 0xFF, M), _float8_value(x & 0xFF, M))  # .., row half
    odd = tl.join(_float8_value(x >> 24, M), _float8_value((x >> 16) & 0xFF, M))
    v = tl.join(even, odd).reshape(w.shape[0], w.shape[1], 8, 4, 2, 2, 2, 2)  # .. row half, parity
    return v.trans(1, 6, 2, 0, 4, 5, 3, 7).reshape(w.shape[1] * 16, w.shape[0] * 32)


@triton.jit
def _float8_value(x, M: tl.constexpr):  # uint32 codes of an 8-bit float with M mantissa bits -> float32
    BIAS: tl.constexpr = (1 << (6 - M)) - 1
    magnitude = x & 0x7F
    normal = ((magnitude << (23 - M)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    one = ((127 + 1 - BIAS - M) << 23) + 0 * magnitude  # the bits of the smallest subnormal
    v = tl.where(magnitude < (1 << M), magnitude.to(tl.float32) * one.to(tl.float32, bitcast=True), normal)
    return tl.where((x & 0x80) != 0, -v, v)


@triton.jit
def plain_e8m0(s, FOLD: tl.constexpr):  # uint8 [N, B] -> float32, 2^(s - FOLD - 127); 0 below that range
    e = tl.maximum(s.to(tl.int32) - FOLD, 0)
    return (e << 23).to(tl.float32, bitcast=True)


@triton.jit
def plain_e8m0_word(s, FOLD: tl.constexpr):  # int32 [N], two bytes each -> float32 [N, 2], likewise
    return plain_e8m0(tl.join(s & 0xFF, (s >> 8) & 0xFF), FOLD)


@triton.jit
def plain_e5m3(s):  # uint8 [N, B] -> float32, NVFP4's scales * 2^-7, for the same epilogue as PTX
    return ((s.to(tl.uint32) << 20) + (110 << 23)).to(tl.float32, bitcast=True)
