"""The K loop of the packed GEMMs: weights from registers, activations from shared memory.

    acc[n, m] = sum_k weight[n, k] * x[row of m, k]

The weight is the left operand, since only that one may come from registers on Hopper, and every weight is decoded there.

A product whose left operand is in registers goes on reading them after it was issued. ptxas before 12.9, which comes with Triton
3.6, uses them for something else meanwhile (github.com/triton-lang/triton/issues/9433 tells of it), which adds garbage where the
matrix unit is late. With such a ptxas a step ends by waiting for its products (``drained``).

Letters: N weight rows and M activation rows of a tile, S = N / 16 strips, K columns, BK columns a step (128, plain weights
also 64). KIND: "e2m1", "e4m3", "e5m2" or "" (plain weights). BLOCK: columns a scale byte covers, 32, or 16 for NVFP4.
"""

import triton
import triton.language as tl

from .numerics import (
    decode_e2m1,
    decode_e4m3,
    decode_e5m2,
    decode_e5m3,
    decode_e8m0,
    decode_e8m0_word,
    plain_e2m1,
    plain_e4m3,
    plain_e5m2,
    plain_e5m3,
    plain_e8m0,
    plain_e8m0_word,
)


@triton.jit
def weight_tile(w, s, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """Decode words [T, S, 128] and scales, bytes [N, BK / BLOCK] or words [N] of two bytes, to bf16 (PTX) or float32 [N, BK]."""
    WORDS: tl.constexpr = s.dtype == tl.int32
    if PTX:
        if KIND == "e2m1":
            v = decode_e2m1(w)
        elif KIND == "e4m3":
            v = decode_e4m3(w)
        else:
            v = decode_e5m2(w)
        if BLOCK == 16:
            scale = decode_e5m3(s)
        elif WORDS:
            scale = decode_e8m0_word(s)
        else:
            scale = decode_e8m0(s)
    else:
        if KIND == "e2m1":
            v = plain_e2m1(w)
            FOLD: tl.constexpr = 126
        elif KIND == "e4m3":
            v = plain_e4m3(w)
            FOLD: tl.constexpr = 120
        else:
            v = plain_e5m2(w)
            FOLD: tl.constexpr = 112
        if BLOCK == 16:
            scale = plain_e5m3(s)
        elif WORDS:
            scale = plain_e8m0_word(s, FOLD)
        else:
            scale = plain_e8m0(s, FOLD)
    return v * scale[:, :, None].broadcast_to(N, BK // BLOCK, BLOCK).reshape(N, BK)


@triton.jit
def drained(acc):
    """float32 ``acc`` after the products that add to it: no instruction, but a use, for which the compiler waits."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _rows(p, live, inside, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Activations of a step."""
    if TAIL == 2:
        if MASK_ROWS:
            inside &= live[:, None]
        return tl.load(p, mask=inside, other=0.0)
    elif MASK_ROWS:
        return tl.load(p, mask=live[:, None], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def packed_dot(
    acc,  # float32 [N, M]
    x,  # [M, K]
    x_offset,  # [M], of the rows (int64 where 32 bits do not suffice)
    live,  # bool [M]
    rest,  # None, or acc, x_offset and live of more rows
    w,  # the expert's words, or its rows if plain
    s,  # the expert's scale bytes
    strip,  # int32 [S], or the plain weight's rows [N]
    scale_row,  # int32 [N]
    w_step,  # words of a K tile, or elements of a plain row
    s_step,  # bytes of 128 columns' scales
    k,  # columns
    first,  # the first step
    steps,  # their number, at least 1
    piece_stride,  # elements between the pieces of x
    N: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    TAIL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    EVICT: tl.constexpr,
    PTX: tl.constexpr,
    DRAIN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add ``steps`` steps of BK columns, each STRIDE steps after the one before.

    TAIL: 0, BK divides K; 1, the last step covers the last BK columns (those it repeats have scales of zero); 2, x is masked.
    PIECES: x is the sum of that many bf16 tensors (one, or two for fp16 and three for float32, whose sum is x exactly).
    """
    column = tl.arange(0, BK)
    UNIT: tl.constexpr = 64 if KIND == "e2m1" else 32
    TILES: tl.constexpr = BK // UNIT
    if KIND == "":
        w_offset = strip[:, None] * w_step + column[None, :]
    else:
        part = tl.arange(0, TILES)[:, None, None] * w_step
        w_offset = part + strip[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
        # Steps of 64 columns take half of the bytes of 128: of MXFP's four a row two, and a copy is of four at least.
        WORDS: tl.constexpr = BK == 64 and BLOCK == 32
        if WORDS:
            s = s.to(tl.pointer_type(tl.int32))
            s_step = s_step // 4
            s_offset = scale_row
        else:
            s_offset = scale_row[:, None] * (128 // BLOCK) + tl.arange(0, BK // BLOCK)[None, :]
    x_offset = x_offset[:, None] + column[None, :]
    MORE: tl.constexpr = rest is not None
    if MORE:
        acc2, x_offset2, live2 = rest
        x_offset2 = x_offset2[:, None] + column[None, :]
    tl.assume(steps > 0)
    step = first
    for _ in range(steps):
        k0 = step * BK
        if TAIL == 1:
            k0 = tl.minimum(k0, k - BK)
        if KIND == "":
            v = tl.load(w + (k0 + w_offset), eviction_policy=EVICT)
        else:
            codes = tl.load(w + (k0 // UNIT * w_step + w_offset), eviction_policy=EVICT)
            at = step * s_step
            second = 0
            if BK == 64:
                second = step % 2
                if TAIL == 1:
                    second |= (k0 == k - BK).to(tl.int32)  # what the last 128 columns repeat are the first of them
                at = step // 2 * s_step
            if BLOCK == 16:
                at += second * (64 // BLOCK)
            scales = tl.load(s + (at + s_offset), eviction_policy=EVICT)
            if WORDS:
                scales = scales >> (16 * second)
            v = weight_tile(codes, scales, N, BK, KIND, BLOCK, PTX)
        for piece in tl.static_range(PIECES):
            p = x + piece * piece_stride
            b = _rows(p + (k0 + x_offset), live, (k0 + column)[None, :] < k, TAIL, MASK_ROWS)
            if MORE:
                b2 = _rows(p + (k0 + x_offset2), live2, (k0 + column)[None, :] < k, TAIL, MASK_ROWS)
            if INTERPRET:
                acc = tl.dot(v.to(tl.float32), b.to(tl.float32).trans(), acc)
                if MORE:
                    acc2 = tl.dot(v.to(tl.float32), b2.to(tl.float32).trans(), acc2)
            else:
                acc = tl.dot(v.to(b.dtype), b.trans(), acc)
                if MORE:
                    acc2 = tl.dot(v.to(b.dtype), b2.trans(), acc2)
        if DRAIN:
            acc = drained(acc)
            if MORE:
                acc2 = drained(acc2)
        step += STRIDE
    if MORE:
        return acc, acc2
    else:
        return acc
