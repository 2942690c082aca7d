"""Packing weights on the accelerator: ``packing.py``'s layout, written as it is read.

    codes [E, N, data_width(K)] -> data [E, K tiles, strips, 512];  scales [E, N, K / block] -> [E, K / 128, rows, 128 / block]

A packed row pairs rows g and g + 8 of its strip (gated: a gate row and its up row), so a program reads two tiles of rows, A and B,
as 32-bit words, merges them bit by bit in registers and writes whole tiles. All index arithmetic that grows with E is 64-bit.
Each program also says what it saw, in the four bytes of a word: 255 less the smallest scale byte, 255 less the smallest of a block
that is not all zeros, the largest scale byte, and whether a code is not finite. The largest of each is what an expert has.

Letters: R = 8 S rows of A (and of B) of S strips, T K tiles; g, c, step and k half are a thread's place in ``packing.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format
from .launch import launch
from .numerics import gathered_e4m3, spread_e4m3

ORDER = {(False, "concatenated"): 0, (False, "interleaved"): 0, (True, "concatenated"): 1, (True, "interleaved"): 2}
"""(gated, layout) -> how packed rows follow from the weight's: 0 in order, 1 gates then ups, 2 gate and up in turn."""
CODES = {"e4m3": (4, 4, 4), "e5m2": (4, 4, 4), "e2m3": (2, 8, 4), "e3m2": (2, 8, 4), "e2m1": (4, 4, 4)}
"""(strips, K tiles, warps) of a program that packs codes, by the weight's element."""
SCALES = (64, 8, 4)
"""(packed rows, scale tiles, warps) of a program that packs scales."""


@triton.jit
def _row(p, HALF: tl.constexpr, n, ORDER: tl.constexpr):
    """The weight's row of row ``p % 8`` in half HALF of strip ``p // 8``, and whether there is one."""
    if ORDER == 0:
        row = p + (p // 8 + HALF) * 8
        return row, row < n
    elif ORDER == 1:
        return p + HALF * (n // 2), p < n // 2
    else:
        return 2 * p + HALF, p < n // 2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _rotate(x, BY: tl.constexpr):
    return (x << BY) | (x >> (32 - BY))


@triton.jit
def _merge_e2m1(a, b, S: tl.constexpr, T: tl.constexpr):
    """Words of eight codes [R, 8 T] of rows g and g + 8 -> int32 [S, 8, T, 4, 4], the words of (g, tile, step, c).

    Nibbles of one parity from two (k half, row half) pairs share a byte; then each group of bits that moves by the same distance
    moves at once. The distances are those of ``packing._e2m1_table``.
    """
    a0, a1 = tl.split(a.to(tl.uint32, bitcast=True).reshape(8 * S, 4 * T, 2))
    b0, b1 = tl.split(b.to(tl.uint32, bitcast=True).reshape(8 * S, 4 * T, 2))
    q_even = (a0 & 0x0F0F0F0F) | ((b0 & 0x0F0F0F0F) << 4)
    q_odd = ((a0 >> 4) & 0x0F0F0F0F) | (b0 & 0xF0F0F0F0)
    r_even = (b1 & 0x0F0F0F0F) | ((a1 & 0x0F0F0F0F) << 4)
    r_odd = ((b1 >> 4) & 0x0F0F0F0F) | (a1 & 0xF0F0F0F0)
    q_even, q_odd, r_even, r_odd = _by_c(q_even), _by_c(q_odd), _by_c(r_even), _by_c(r_odd)
    q = q_even | (q_odd << 16)
    r = r_even | (r_odd << 16)
    word = (_rotate(q, 6) & 0x01C001C0) | (_rotate(q, 12) & 0x80008000)  # magnitude and sign of (0, 0)
    eight = (q & 0x00F000F0) | (r & 0xFF0FFF0F)
    word |= _rotate(eight, 8) & 0x76007600  # magnitude of (0, 1), exponent of (1, 1)
    fourteen = (q & 0x00800080) | (r & 0xFF7FFF7F)
    word |= _rotate(fourteen, 14) & 0x003E003E  # signs of (0, 1) and (1, 1), magnitude of (1, 0)
    word |= (_rotate(r, 20) & 0x08000800) | (r & 0x00010001)  # sign of (1, 0), mantissa of (1, 1)
    return word.to(tl.int32, bitcast=True).reshape(S, 8, T, 4, 4)


@triton.jit
def _by_c(x):
    """Each byte of x [.., G] by itself: [.., G, 2, 2], byte 2 i + j at (i, j)."""
    return tl.join(tl.join(x & 0xFF, (x >> 16) & 0xFF), tl.join((x >> 8) & 0xFF, x >> 24))


@triton.jit
def _pairs(w):
    """Words of four codes [.., W] -> [.., W, 2], each with two codes in bytes 0 and 2."""
    return tl.join((w & 0xFF) | ((w & 0xFF00) << 8), ((w >> 16) & 0xFF) | ((w >> 8) & 0xFF0000))


@triton.jit
def _wide(code, M: tl.constexpr):
    """E4M3 codes of E2M3 (M = 3) or E3M2 (M = 2) codes: the fields read as a float32, whose product has E4M3's exponent."""
    value = ((code & 31) << (23 - M)).to(tl.float32, bitcast=True) * (64.0 if M == 3 else 16.0)
    return (value.to(tl.int32, bitcast=True) >> 20) | ((code & 32) << 2)


@triton.jit
def _wide_pairs(w0, w1, w2, M: tl.constexpr):
    """16 FP6 codes in three words [R, G] -> [R, G, 2, 2, 2] (k half, c), each with two E4M3 codes in bytes 0 and 2."""
    q2 = ((w0 >> 24) & 0xFF) | (w1 << 8)
    q5 = ((w1 >> 28) & 0xF) | (w2 << 4)
    c0 = tl.join(w0, w1 >> 16)
    c1 = tl.join(w0 >> 12, q5)
    c2 = tl.join(q2, w2 >> 8)
    c3 = tl.join(w1 >> 4, w2 >> 20)
    q = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return _wide(q & 0x3F, M) | (_wide((q >> 6) & 0x3F, M) << 16)


@triton.jit
def _load_words(line, live, col, limit):
    return tl.load(line[:, None] + col[None, :], mask=live[:, None] & (col < limit)[None, :], other=0)


@triton.jit
def _load_threes(line, live, limit, COUNT: tl.constexpr):
    """COUNT groups of three words that lie side by side, as three tensors [R, COUNT].

    Of four threads the last loads nothing; three loads of every third word would ask for each line three times.
    """
    group = 3 * tl.arange(0, COUNT)[:, None]
    i = tl.arange(0, 4)[None, :]
    mask = live[:, None, None] & ((i < 3) & (group + i < limit))[None, :, :]
    w = tl.load(line[:, None, None] + (group + i)[None, :, :], mask=mask, other=0)
    even, odd = tl.split(w.reshape(line.shape[0], COUNT, 2, 2))
    w0, w2 = tl.split(even)
    w1, _ = tl.split(odd)
    return w0, w1, w2


@triton.jit
def _pack_codes_kernel(
    codes,  # int32 words [E, N, units * UNIT]
    scale,  # uint8 [E, N, blocks]
    out,  # int32 words [E, tiles, strips, 128]
    seen,  # int32, one per program
    n,
    units,
    blocks,
    tiles,
    strips,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # words that divide a row, for wide loads
    ORDER: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    p = tl.program_id(1) * (8 * S) + tl.arange(0, 8 * S)
    t0 = tl.program_id(0) * T
    row_a, live_a = _row(p, 0, n, ORDER)
    row_b, live_b = _row(p, 1, n, ORDER)
    row_a = expert * n + row_a
    row_b = expert * n + row_b
    width = units * UNIT

    FP6: tl.constexpr = ELEMENT == "e2m3" or ELEMENT == "e3m2"
    COLUMNS: tl.constexpr = 64 if ELEMENT == "e2m1" else 32
    NB: tl.constexpr = T * COLUMNS // BLOCK
    block = t0 * (COLUMNS // BLOCK) + tl.arange(0, NB)
    in_a = live_a[:, None] & (block < blocks)[None, :]
    in_b = live_b[:, None] & (block < blocks)[None, :]
    scale_a = tl.load(scale + (row_a * blocks)[:, None] + block[None, :], mask=in_a, other=1).to(tl.int32)
    scale_b = tl.load(scale + (row_b * blocks)[:, None] + block[None, :], mask=in_b, other=1).to(tl.int32)

    line_a = codes + row_a * width
    line_b = codes + row_b * width
    bad = 0
    if FP6:
        limit = width - 6 * t0
        a0, a1, a2 = _load_threes(line_a + 6 * t0, live_a, limit, 2 * T)
        b0, b1, b2 = _load_threes(line_b + 6 * t0, live_b, limit, 2 * T)
        # All bits but the signs, which are bits 5, 11 ... 95 of the three words.
        used_a = ((a0 & -0x20820821) | (a1 & -0x08208209) | (a2 & 0x7DF7DF7D)).reshape(8 * S, T, 2)
        used_b = ((b0 & -0x20820821) | (b1 & -0x08208209) | (b2 & 0x7DF7DF7D)).reshape(8 * S, T, 2)
        M: tl.constexpr = 3 if ELEMENT == "e2m3" else 2
        word = _wide_pairs(b0, b1, b2, M) | (_wide_pairs(a0, a1, a2, M) << 8)
        word = word.reshape(S, 8, T, 2, 2, 4)
    else:
        col = t0 * 8 + tl.arange(0, 8 * T)
        a = _load_words(line_a, live_a, col, width)
        b = _load_words(line_b, live_b, col, width)
        if ELEMENT == "e2m1":
            if BLOCK == 16:  # signs only where the scale is zero, which the stored scales cannot be
                keep_a = tl.where(scale_a == 0, -0x77777778, -1)
                keep_b = tl.where(scale_b == 0, -0x77777778, -1)
                a &= keep_a[:, :, None].broadcast_to(8 * S, NB, 2).reshape(8 * S, 8 * T)
                b &= keep_b[:, :, None].broadcast_to(8 * S, NB, 2).reshape(8 * S, 8 * T)
            word = _merge_e2m1(a, b, S, T)
        else:
            used_a = (a & 0x7F7F7F7F).reshape(8 * S, T, 8)
            used_b = (b & 0x7F7F7F7F).reshape(8 * S, T, 8)
            ABOVE: tl.constexpr = 0x01010101 if ELEMENT == "e4m3" else 0x04040404
            over = ((used_a + ABOVE) | (used_b + ABOVE)) & -0x7F7F7F80
            bad = tl.max((over != 0).to(tl.int32))
            word = (_pairs(b) | (_pairs(a) << 8)).reshape(S, 8, T, 2, 2, 4)

    low = tl.min(tl.minimum(tl.where(in_a, scale_a, 255), tl.where(in_b, scale_b, 255)))
    high = tl.max(tl.maximum(tl.where(in_a, scale_a, 0), tl.where(in_b, scale_b, 0)))
    used = low
    if ELEMENT != "e2m1":
        some_a = in_a & (tl.reduce(used_a, 2, _or) != 0)
        some_b = in_b & (tl.reduce(used_b, 2, _or) != 0)
        used = tl.min(tl.minimum(tl.where(some_a, scale_a, 254), tl.where(some_b, scale_b, 254)))
    pid = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(seen + pid, (255 - low) | ((255 - used) << 8) | (high << 16) | (bad << 24))

    if ELEMENT == "e2m1":
        word = word.permute(2, 0, 1, 4, 3)
    else:
        word = word.permute(2, 0, 1, 5, 3, 4)
        if ELEMENT != "e5m2":
            word = spread_e4m3(word)
    tile = t0 + tl.arange(0, T)
    at = tl.program_id(1) * (128 * S) + tl.arange(0, 128 * S)
    out += (expert * tiles + tile)[:, None] * (strips * 128) + at[None, :]
    tl.store(out, word.reshape(T, 128 * S), mask=(tile < tiles)[:, None] & (at < strips * 128)[None, :])


@triton.jit
def _pack_scales_kernel(
    scale,  # uint8 [E, N, blocks]
    out,  # uint8 [E, tiles, rows, B]
    shift,  # int32 [E] or None
    n,
    blocks,
    tiles,
    rows,
    over,  # columns by which the last tile's blocks move right, the blocks that it repeats
    FOLD: tl.constexpr,
    E8M0: tl.constexpr,
    ORDER: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * R + tl.arange(0, R)
    p = r // 16 * 8 + r % 8
    half = r // 8 % 2
    row_a, live_a = _row(p, 0, n, ORDER)
    row_b, live_b = _row(p, 1, n, ORDER)
    row = expert * n + tl.where(half == 0, row_a, row_b)
    live = tl.where(half == 0, live_a, live_b)
    column = tl.program_id(0) * (T * B) + tl.arange(0, T * B)
    last = column >= (tiles - 1) * B
    source = tl.where(last, column - over, column)
    inside = (source < blocks) & ((source >= (tiles - 1) * B) | (column < (tiles - 1) * B))
    inside = live[:, None] & inside[None, :]
    byte = tl.load(scale + (row * blocks)[:, None] + source[None, :], mask=inside, other=0).to(tl.int32)
    if E8M0:
        byte += FOLD
        if shift is not None:
            byte -= tl.load(shift + expert)
    else:
        # E4M3's fields read as a float32, whose product with 8 has the exponent that is stored.
        byte = ((byte << 20).to(tl.float32, bitcast=True) * 8.0).to(tl.int32, bitcast=True) >> 20
    byte = tl.where(inside, byte, 0).to(tl.uint8)
    tile = tl.program_id(0) * T + tl.arange(0, T)
    at = tl.program_id(1) * (R * B) + tl.arange(0, R * B)
    out += (expert * tiles + tile)[:, None] * (rows * B) + at[None, :]
    byte = byte.reshape(R, T, B).permute(1, 0, 2).reshape(T, R * B)
    tl.store(out, byte, mask=(tile < tiles)[:, None] & (at < rows * B)[None, :])


@triton.jit
def _gather_c(x):
    """The inverse of ``_by_c``: bytes [.., 2, 2] -> words [..]."""
    even, odd = tl.split(x)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0 | (c1 << 8) | (c2 << 16) | (c3 << 24)


@triton.jit
def _part_e2m1(word, S: tl.constexpr, T: tl.constexpr):
    """The inverse of ``_merge_e2m1``: words [S, 8, T, 4, 4] -> canonical words of rows g and g + 8, [R, 8 T] each."""
    w = word.to(tl.uint32, bitcast=True).reshape(8 * S, 4 * T, 2, 2)
    six, eight, twelve, fourteen, twenty = (
        _rotate(w, 26),
        _rotate(w, 24),
        _rotate(w, 20),
        _rotate(w, 18),
        _rotate(w, 12),
    )
    q = (six & 0x00070007) | (twelve & 0x00080008) | (eight & 0x00700070) | (fourteen & 0x00800080)
    r = (fourteen & 0x00780078) | (twenty & 0x00800080) | (eight & 0x00060006) | (w & 0x00010001)
    a0 = _gather_c((q & 0xF) | ((q >> 12) & 0xF0))
    b0 = _gather_c(((q >> 4) & 0xF) | ((q >> 16) & 0xF0))
    b1 = _gather_c((r & 0xF) | ((r >> 12) & 0xF0))
    a1 = _gather_c(((r >> 4) & 0xF) | ((r >> 16) & 0xF0))
    a = tl.join(a0, a1).reshape(8 * S, 8 * T).to(tl.int32, bitcast=True)
    return a, tl.join(b0, b1).reshape(8 * S, 8 * T).to(tl.int32, bitcast=True)


@triton.jit
def _narrow_pairs(p, M: tl.constexpr):
    """The inverse of ``_wide`` on pairs: two E4M3 codes in bytes 0 and 2 -> two FP6 codes in 12 bits."""
    low = ((p & 0x7F) << 20).to(tl.float32, bitcast=True) * (1 / 64.0 if M == 3 else 1 / 16.0)
    high = ((p & 0x7F0000) << 4).to(tl.float32, bitcast=True) * (1 / 64.0 if M == 3 else 1 / 16.0)
    low = (low.to(tl.int32, bitcast=True) >> (23 - M)) | ((p >> 2) & 32)
    return low | (((high.to(tl.int32, bitcast=True) >> (23 - M)) | ((p >> 18) & 32)) << 6)


@triton.jit
def _store_fp6(line, live, limit, p, S: tl.constexpr, T: tl.constexpr, M: tl.constexpr):
    """16 codes from pairs [S, 8, T, 2, 2, 4] to three words, stored side by side."""
    even, odd = tl.split(_narrow_pairs(p, M).reshape(8 * S, 2 * T, 2, 2, 2))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    q0, q4 = tl.split(c0)
    q1, q5 = tl.split(c1)
    q2, q6 = tl.split(c2)
    q3, q7 = tl.split(c3)
    i = tl.arange(0, 8 * T)
    group = tl.broadcast_to((tl.minimum(i // 3, 2 * T - 1))[None, :], (8 * S, 8 * T))
    w0 = tl.gather(q0 | (q1 << 12) | (q2 << 24), group, 1)
    w1 = tl.gather((q2 >> 8) | (q3 << 4) | (q4 << 16) | (q5 << 28), group, 1)
    w2 = tl.gather((q5 >> 4) | (q6 << 8) | (q7 << 20), group, 1)
    third = (i % 3)[None, :]
    word = tl.where(third == 0, w0, tl.where(third == 1, w1, w2))
    tl.store(line[:, None] + i[None, :], word, mask=live[:, None] & (i < limit)[None, :])


@triton.jit
def _unpack_codes_kernel(
    data,  # int32 words [E, tiles, strips, 128]
    codes,  # int32 words [E, N, units * UNIT]
    n,
    units,
    tiles,
    strips,
    ELEMENT: tl.constexpr,
    UNIT: tl.constexpr,
    ORDER: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    p = tl.program_id(1) * (8 * S) + tl.arange(0, 8 * S)
    t0 = tl.program_id(0) * T
    row_a, live_a = _row(p, 0, n, ORDER)
    row_b, live_b = _row(p, 1, n, ORDER)
    width = units * UNIT
    line_a = codes + (expert * n + row_a) * width
    line_b = codes + (expert * n + row_b) * width
    tile = t0 + tl.arange(0, T)
    at = tl.program_id(1) * (128 * S) + tl.arange(0, 128 * S)
    at = (expert * tiles + tile)[:, None] * (strips * 128) + at[None, :]
    inside = (tile < tiles)[:, None] & (tl.program_id(1) * (128 * S) + tl.arange(0, 128 * S) < strips * 128)[None, :]
    word = tl.load(data + at, mask=inside, other=0)
    if ELEMENT == "e2m1":
        a, b = _part_e2m1(word.reshape(T, S, 8, 4, 4).permute(1, 2, 0, 4, 3), S, T)
    else:
        if ELEMENT != "e5m2":
            word = gathered_e4m3(word)
        word = word.reshape(T, S, 8, 4, 2, 2).permute(1, 2, 0, 4, 5, 3)
        a = (word >> 8) & 0xFF00FF
        b = word & 0xFF00FF
    if ELEMENT == "e2m3" or ELEMENT == "e3m2":
        M: tl.constexpr = 3 if ELEMENT == "e2m3" else 2
        limit = tl.minimum(6 * T, width - 6 * t0)
        _store_fp6(line_a + 6 * t0, live_a, limit, a, S, T, M)
        _store_fp6(line_b + 6 * t0, live_b, limit, b, S, T, M)
    else:
        if ELEMENT != "e2m1":
            a = _join_pairs(a, S, T)
            b = _join_pairs(b, S, T)
        col = t0 * 8 + tl.arange(0, 8 * T)
        tl.store(line_a[:, None] + col[None, :], a, mask=live_a[:, None] & (col < width)[None, :])
        tl.store(line_b[:, None] + col[None, :], b, mask=live_b[:, None] & (col < width)[None, :])


@triton.jit
def _join_pairs(p, S: tl.constexpr, T: tl.constexpr):
    """The inverse of ``_pairs``: [S, 8, T, 2, 2, 4] -> words [R, 8 T]."""
    p = (p & 0xFF) | (p >> 8)
    low, high = tl.split(p.reshape(8 * S, 8 * T, 2))
    return low | (high << 16)


# --- launchers ---


def _words(t: Tensor) -> Tensor:
    """Contiguous bytes as 32-bit words (copied where they are not, or where they do not start at one)."""
    t = t.contiguous()
    return (t if t.data_ptr() % 4 == 0 else t.clone()).view(torch.int32)


def pack_codes(
    codes: Tensor, scale: Tensor, f: Format, tiles: int, strips: int, gated: bool, layout: str
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [E, N, data_width(K)], and scale bytes [E, N, K / block] -> data [E, tiles, strips, 512] and uint8 [E, 4].

    The second result, per expert: 255 less the smallest scale byte; 255 less the smallest of a block that is not all zeros (254 if
    none; for E2M1 the same as the first); the largest; 1 if a code is not finite. Codes of NVFP4 blocks whose scale is zero become
    zeros of their sign.
    """
    experts, n, blocks = scale.shape
    s, t, warps = CODES[f.element.name]
    data = torch.empty((experts, tiles, strips, 512), dtype=torch.uint8, device=codes.device)
    grid = (triton.cdiv(tiles, t), triton.cdiv(strips, s), experts)
    seen = torch.empty((experts, grid[0] * grid[1]), dtype=torch.int32, device=codes.device)
    words = _words(codes)
    unit = next(u for u in (4, 2, 1) if words.shape[-1] % u == 0)
    launch(
        _pack_codes_kernel,
        grid,
        codes.device,
        words,
        scale.contiguous(),
        data.view(torch.int32),
        seen,
        n,
        words.shape[-1] // unit,
        blocks,
        tiles,
        strips,
        ELEMENT=f.element.name,
        BLOCK=f.block,
        UNIT=unit,
        ORDER=ORDER[gated, layout],
        S=s,
        T=t,
        num_warps=warps,
    )
    return data, seen.view(torch.uint8).view(experts, -1, 4).amax(1)


def pack_scales(
    scale: Tensor,
    f: Format,
    fold: int,
    shift: Tensor | None,
    width: int,
    rows: int,
    over: int,
    gated: bool,
    layout: str,
) -> Tensor:
    """Scale bytes [E, N, K / block] -> [E, ceil(width / 128), rows, 128 / block], folded and shifted; ``rows`` with their padding.

    over: how many blocks the last tile repeats, which get the byte 0 (0: none).
    """
    experts, n, blocks = scale.shape
    tiles, per_tile = triton.cdiv(width, 128), 128 // f.block
    out = torch.empty((experts, tiles, rows, per_tile), dtype=torch.uint8, device=scale.device)
    r, t, warps = SCALES
    t = t * 4 // per_tile
    launch(
        _pack_scales_kernel,
        (triton.cdiv(tiles, t), triton.cdiv(rows, r), experts),
        scale.device,
        scale.contiguous(),
        out,
        shift,
        n,
        blocks,
        tiles,
        rows,
        over,
        FOLD=fold,
        E8M0=f.scale == "e8m0",
        ORDER=ORDER[gated, layout],
        B=per_tile,
        R=r,
        T=t,
        num_warps=warps,
    )
    return out


def unpack_codes(data: Tensor, f: Format, n: int, k: int, gated: bool, layout: str) -> Tensor:
    """Data [E, tiles, strips, 512] of ``pack_codes`` -> codes, uint8 [E, N, data_width(K)]."""
    experts, tiles, strips, _ = data.shape
    s, t, warps = CODES[f.element.name]
    codes = torch.empty((experts, n, f.data_width(k)), dtype=torch.uint8, device=data.device)
    words = codes.view(torch.int32)
    unit = next(u for u in (4, 2, 1) if words.shape[-1] % u == 0)
    launch(
        _unpack_codes_kernel,
        (triton.cdiv(tiles, t), triton.cdiv(strips, s), experts),
        data.device,
        _words(data),
        words,
        n,
        words.shape[-1] // unit,
        tiles,
        strips,
        ELEMENT=f.element.name,
        UNIT=unit,
        ORDER=ORDER[gated, layout],
        S=s,
        T=t,
        num_warps=warps,
    )
    return codes
