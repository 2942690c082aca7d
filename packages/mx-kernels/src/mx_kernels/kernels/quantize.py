"""Quantization kernels: quantize, dequantize, and both at once; NVFP4's global scale has a file of its own.

    x [..., K] -> codes [..., K] and one scale per block [..., K / block];  x ~ decode(code) * scale * global_scale

Bit for bit the values of ``mx_kernels.reference``. All are bound by memory: one pass, each block in the registers of a few
neighbouring threads. A program takes BLOCKS blocks; B is a block's length. Letters: N blocks in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..formats import Format, ScaleRule, get_format
from .bits import (
    block_amax,
    decode,
    e8m0_byte,
    e8m0_reciprocal,
    e8m0_value,
    element_bits,
    encode,
    grid_code,
    grid_value,
    on_grid,
    round_to,
    split4,
    word_factor,
    words,
)
from .launch import launch, target

_OFFLINE = (ScaleRule.SEARCH.value, ScaleRule.FOUR_OVER_SIX.value)
_CHUNK = 1 << 26  # elements that a rule without a kernel works on at a time


@triton.jit
def _fp8(v, ELEMENT: tl.constexpr, FP8: tl.constexpr):
    """FP8 codes, uint8: the conversion instruction where the architecture has it (rounds, saturates), else by integers."""
    if FP8:
        if ELEMENT == "e4m3":
            return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        return encode(v, ELEMENT).to(tl.uint8)


@triton.jit
def _reciprocal(x):
    """1 / x, rounded to nearest, for x in 2^-100 ... 2^100: NVIDIA's rcp.rn.f32 without its range checks and branches."""
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def _nvfp4_scale(amax, g, ASM: tl.constexpr):
    """E4M3 code of clamp(amax / (6 g), 2^-9, 448), int32, and 1 / (decode(code) * g), both divisions rounded to nearest.

    ASM: without division's branches. A power of two taken from g to amax and back to the result changes no rounding and keeps
    the divisors near 1; the quotient by the reciprocal is corrected twice (not where it is clamped: above 512 it may be Inf).
    """
    if ASM:
        exponent = g.to(tl.int32, bitcast=True) & 0x7F800000
        shift = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        g = g * shift
        a = amax * shift
        d = 6.0 * g
        inverse = _reciprocal(d)
        quotient = a * inverse
        ratio = tl.fma(tl.fma(-quotient, d, a), inverse, quotient)
        ratio = tl.fma(tl.fma(-ratio, d, a), inverse, ratio)
        ratio = tl.where(quotient < 512.0, ratio, quotient)
    else:
        ratio = tl.div_rn(amax, 6.0 * g)
    binade, total = on_grid(tl.maximum(ratio, 0.001953125), "e4m3")
    step = grid_value(binade, total, "e4m3") * g
    if ASM:
        factor = _reciprocal(step) * shift
    else:
        factor = tl.div_rn(1.0, step)
    return grid_code(binade, total, "e4m3"), factor


@triton.jit
def _block_scale(x, g, ELEMENT: tl.constexpr, RULE: tl.constexpr, E8M0: tl.constexpr, ASM: tl.constexpr):
    """x [N, B] float32 -> scale byte [N] int32, factor [N] that brings the block to the element's range, NaN blocks [N]."""
    bits = block_amax(x)
    bad = bits > 0x7F800000
    if E8M0:
        byte = e8m0_byte(bits, ELEMENT, RULE)
        return byte, e8m0_reciprocal(byte), bad
    else:
        code, factor = _nvfp4_scale(bits.to(tl.float32, bitcast=True), g, ASM)
        zero = bits == 0
        return tl.where(bad, 0x7F, tl.where(zero, 0, code)), tl.where(zero, 1.0, factor), bad


@triton.jit
def _store_codes(
    data, start, live, v, bad,
    ELEMENT: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr, NARROW: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Encode v [N, B] and store the codes of blocks start ... start + N - 1; codes of NaN blocks are 0."""
    BITS: tl.constexpr = element_bits(ELEMENT)
    n = tl.arange(0, N)[:, None]
    if BITS == 8:
        v = tl.where(bad[:, None], 0.0, v)
        data += start * B
        tl.store(data + (n * B + tl.arange(0, B)[None, :]), _fp8(v, ELEMENT, FP8), mask=live[:, None])
    else:
        word = tl.where(bad[:, None], 0, words(v, ELEMENT, ASM, NARROW, N, B))
        if BITS == 4:
            data = data.to(tl.pointer_type(tl.int32)) + start * (B // 8)
            tl.store(data + (n * (B // 8) + tl.arange(0, B // 8)[None, :]), word, mask=live[:, None])
        else:
            # Four groups of 24 bits are three words. Word j of a block's half h lies at 6 n + 3 h + j.
            q0, q1, q2, q3 = split4(word, N, B // 16)
            w0 = q0 | (q1 << 24)
            w1 = ((q1 >> 8) & 0xFFFF) | (q2 << 16)
            w2 = ((q2 >> 16) & 0xFF) | (q3 << 8)
            j = tl.arange(0, 4)[None, None, :]
            triple = tl.join(tl.join(w0, w2), tl.join(w1, w2)).reshape(N, B // 16, 4)
            data = data.to(tl.pointer_type(tl.int32)) + start * 6
            at = n[:, :, None] * 6 + tl.arange(0, B // 16)[None, :, None] * 3 + j
            tl.store(data + at, triple, mask=live[:, None, None] & (j < 3))


@triton.jit
def _load_tile(x, first, live, WHOLE: tl.constexpr, N: tl.constexpr, U: tl.constexpr):
    """U units (elements or words) from each offset ``first`` [N]: [N, U].

    WHOLE: a thread gets a whole line (by loads of 16 bytes from this layout), so that what is worked out per line is worked out
    once, not in each of the threads that share it.
    """
    if WHOLE:
        C: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        at = tl.arange(0, U // (2 * C))[None, :, None] * (2 * C) + tl.arange(0, C)[None, None, :] + first[:, None, None]
        mask = live[:, None, None]
        v = tl.join(tl.load(x + at, mask=mask, other=0), tl.load(x + at + C, mask=mask, other=0))
        return v.trans(0, 1, 3, 2).reshape(N, U)
    else:
        return tl.load(x + (first[:, None] + tl.arange(0, U)[None, :]), mask=live[:, None], other=0)


@triton.jit
def _load_blocks(
    x, start, live, stride, per_row,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Blocks start ... start + N - 1 of x as float32 [N, B]. PAIRS: two bf16 come as one word, and widen by one instruction each."""
    UNITS: tl.constexpr = 2 if PAIRS else 1
    if PAIRS:
        x = x.to(tl.pointer_type(tl.int32))
    if ROWS:
        block = start + tl.arange(0, N)
        row = block // per_row
        first = row * (stride // UNITS) + (block - row * per_row) * (B // UNITS)
    else:
        x += start * (B // UNITS)
        first = tl.arange(0, N) * (B // UNITS)
    v = _load_tile(x, first, live, WHOLE, N, B // UNITS)
    return _widened(v, N, B) if PAIRS else v.to(tl.float32)


@triton.jit
def _widened(words, N: tl.constexpr, B: tl.constexpr):
    """Words of two bf16 [N, B / 2] -> float32 [N, B]."""
    return tl.join(words << 16, words & -65536).reshape(N, B).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_kernel(
    x,  # N blocks; rows of per_row blocks are ``stride`` elements apart where ROWS
    data,
    scale,  # [N]
    global_scale,  # [] or one per per_global blocks
    stride,
    blocks,  # N
    per_row,
    per_global,
    ELEMENT: tl.constexpr,
    RULE: tl.constexpr,
    E8M0: tl.constexpr,
    FP8: tl.constexpr,  # the architecture converts to FP8
    ASM: tl.constexpr,  # PTX instructions
    PAIRS: tl.constexpr,  # x is bf16, aligned to 4 bytes
    WHOLE: tl.constexpr,  # a thread takes whole blocks
    ROWS: tl.constexpr,
    GLOBALS: tl.constexpr,  # 0: one; 1: one per program; 2: any
    ROUND_TRIP: tl.constexpr,  # data gets the values instead of the codes
    N: tl.constexpr,
    B: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * N
    n = tl.arange(0, N)
    live = n < tl.minimum(blocks - start, N).to(tl.int32)
    NARROW: tl.constexpr = E8M0 and x.dtype.element_ty != tl.float32
    v = _load_blocks(x, start, live, stride, per_row, ROWS, PAIRS, WHOLE, N, B)
    g = 1.0
    if not E8M0:
        if GLOBALS == 0:
            g = tl.load(global_scale)
        elif GLOBALS == 1:
            g = tl.load(global_scale + start // per_global)
        else:
            g = tl.load(global_scale + (start + n) // per_global, mask=live, other=1.0)
    byte, factor, bad = _block_scale(v, g, ELEMENT, RULE, E8M0, ASM)
    if ROUND_TRIP:
        if E8M0:
            step = e8m0_value(byte)
        else:
            step = tl.where(bad, float("nan"), decode(byte, "e4m3"))
        v = round_to(v * factor[:, None], ELEMENT) * step[:, None]
        if not E8M0:
            if GLOBALS == 2:
                v = v * g[:, None]
            else:
                v = v * g
        data += start * B
        at = n[:, None] * B + tl.arange(0, B)[None, :]
        tl.store(data + at, v.to(data.dtype.element_ty), mask=live[:, None])
    else:
        tl.store(scale + start + n, byte.to(tl.uint8), mask=live)
        SCALED: tl.constexpr = ASM and element_bits(ELEMENT) < 8
        if SCALED and E8M0:
            factor = factor * word_factor(ELEMENT)
        v = v * factor[:, None]
        if SCALED and not E8M0:
            # Here the factor is no power of two and may be as small as 2^-126: halving it could round.
            v = v * word_factor(ELEMENT)
        _store_codes(data, start, live, v, bad, ELEMENT, FP8, ASM, NARROW, N, B)


@triton.jit
def _load_codes(data, start, live, ELEMENT: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """What holds the codes of blocks start ... start + N - 1, as it lies in memory: a tuple of bytes or words."""
    BITS: tl.constexpr = element_bits(ELEMENT)
    n = tl.arange(0, N)[:, None]
    if BITS == 8:
        return (tl.load(data + start * B + (n * B + tl.arange(0, B)[None, :]), mask=live[:, None], other=0),)
    else:
        data = data.to(tl.pointer_type(tl.int32)) + start * (B * BITS // 32)
        if BITS == 4:
            return (tl.load(data + (n * (B // 8) + tl.arange(0, B // 8)[None, :]), mask=live[:, None], other=0),)
        else:
            at = data + (n * 6 + tl.arange(0, B // 16)[None, :] * 3)
            w0 = tl.load(at, mask=live[:, None], other=0)
            w1 = tl.load(at + 1, mask=live[:, None], other=0)
            return w0, w1, tl.load(at + 2, mask=live[:, None], other=0)


@triton.jit
def _values(codes, ELEMENT: tl.constexpr, FP8: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """The elements that ``_load_codes`` gave, as float32 [N, B]."""
    BITS: tl.constexpr = element_bits(ELEMENT)
    if FP8 and ELEMENT == "e4m3":
        return codes[0].to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif BITS == 8:
        return decode(codes[0].to(tl.int32), ELEMENT)
    else:
        if BITS == 4:
            code = codes[0][:, :, None] >> (tl.arange(0, 8)[None, None, :] * 4)
        else:
            w0, w1, w2 = codes
            q1 = ((w0 >> 24) & 0xFF) | (w1 << 8)
            q2 = ((w1 >> 16) & 0xFFFF) | (w2 << 16)
            four = tl.join(tl.join(w0, q2), tl.join(q1, w2 >> 8))
            code = four.reshape(N, B // 4)[:, :, None] >> (tl.arange(0, 4)[None, None, :] * 6)
        return decode(code, ELEMENT).reshape(N, B)


@triton.jit
def _store_values(
    out, step, codes, global_scale, start, live, per_global,
    ELEMENT: tl.constexpr, E8M0: tl.constexpr, FP8: tl.constexpr, GLOBALS: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The values of blocks start ... start + N - 1, from their scales and what ``_load_codes`` gave, to ``out``."""
    n = tl.arange(0, N)
    v = _values(codes, ELEMENT, FP8, N, B) * step[:, None]
    if not E8M0:
        if GLOBALS == 0:
            v = v * tl.load(global_scale)
        elif GLOBALS == 1:
            v = v * tl.load(global_scale + start // per_global)
        else:
            v = v * tl.load(global_scale + (start + n) // per_global, mask=live, other=1.0)[:, None]
    at = n[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _dequantize_kernel(
    data, scale, global_scale, rows, out, blocks, per_global,
    ELEMENT: tl.constexpr, E8M0: tl.constexpr, FP8: tl.constexpr, GLOBALS: tl.constexpr, SELECT: tl.constexpr, TURNS: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A tile is N blocks. A program takes one, or with SELECT up to TURNS of a matrix: it loads the next before it stores one.

    scale [blocks], blocks with SELECT those of one matrix; rows [R]: matrices to take, none for a negative one. global_scale: by GLOBALS
    0, one or none; 1, one for each program; 2, one for each ``per_global`` blocks.
    """
    n = tl.arange(0, N)
    if SELECT:
        programs = tl.cdiv(blocks, N * TURNS)  # of a matrix
        place = tl.program_id(0) // programs
        matrix = tl.load(rows + place).to(tl.int64)
        if matrix < 0:
            return
        part = tl.program_id(0) % programs
        start = part.to(tl.int64) * (N * TURNS)
        own = tl.minimum(blocks - start, N * TURNS).to(tl.int32)
        out += (place.to(tl.int64) * blocks + start) * B
        start += matrix * blocks
        if GLOBALS == 1:
            global_scale += matrix * (blocks // per_global) + part // tl.cdiv(per_global, N * TURNS)
        MANY: tl.constexpr = 2 if GLOBALS == 2 else 0
        byte = tl.load(scale + start + n, mask=n < own, other=0).to(tl.int32)
        codes = _load_codes(data, start, n < own, ELEMENT, N, B)
        for i in range(0, own, N):
            live = n + N < own - i
            next_byte = tl.load(scale + start + i + N + n, mask=live, other=0).to(tl.int32)
            next_codes = _load_codes(data, start + i + N, live, ELEMENT, N, B)
            step = e8m0_value(byte) if E8M0 else decode(byte, "e4m3")
            _store_values(
                out + i * B, step, codes, global_scale, start + i, n < own - i, per_global, ELEMENT, E8M0, FP8, MANY, N, B
            )  # fmt: skip
            byte, codes = next_byte, next_codes
    else:
        start = tl.program_id(0).to(tl.int64) * N
        live = n < tl.minimum(blocks - start, N).to(tl.int32)
        out += start * B
        byte = tl.load(scale + start + n, mask=live, other=0).to(tl.int32)
        step = e8m0_value(byte) if E8M0 else decode(byte, "e4m3")
        codes = _load_codes(data, start, live, ELEMENT, N, B)
        _store_values(out, step, codes, global_scale, start, live, per_global, ELEMENT, E8M0, FP8, GLOBALS, N, B)


# --- launchers: the arguments and results of the custom ops of the same names ---

TILES = {
    "quantize": {8: (64, 2, False), 6: (64, 2, True), 4: (256, 4, True)},
    "round_trip": {8: (64, 4, False), 6: (64, 4, False), 4: (64, 4, False)},
    "dequantize": {8: (64, 4, False), 6: (64, 4, False), 4: (32, 2, False)},
}
"""(runs of 32 elements that a program takes, its warps, whether a thread takes whole blocks), by kernel and bits of an element."""


def _tile(kind: str, f: Format, blocks: int, units: int) -> tuple[int, int, bool]:
    """(blocks of a program, its warps, whole blocks per thread): half as large until each of ``units`` multiprocessors has two."""
    n, warps, whole = TILES[kind][f.element.bits]
    n = n * 32 // f.block
    while warps > 1 and n > 32 and blocks < 2 * units * n:
        n, warps = n // 2, warps // 2
    return n, warps, whole


def rows_of(x: Tensor) -> tuple[Tensor, bool]:
    """x [..., K] as rows [R, K] (copied only if no such view exists), and whether they lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, rows.shape[0] > 1 and rows.stride(0) != rows.shape[1]


def _globals(global_scale: Tensor | None, blocks: int, n: int, matrix: int = 0) -> tuple[int, int]:
    """(GLOBALS, blocks per global scale) of programs of n blocks; matrix: blocks that no program reaches across, 0 for none."""
    if global_scale is None or global_scale.numel() == 1:
        return 0, blocks
    each = blocks // global_scale.numel()
    return (1 if each % n == 0 or each == matrix else 2), each


def turns_for(matrices: int) -> int:
    """Tiles of a selected matrix that a program takes. Of few matrices most are there, and short programs end together; of more, some are
    passed over, whose programs take as long as others (docs/performance.md)."""
    return 1 if matrices <= 16 else 4


def _run_quantize(x: Tensor, f: Format, rule: str, g: Tensor | None, data: Tensor, scale: Tensor | None) -> None:
    rows, apart = rows_of(x)
    blocks, per_row = x.numel() // f.block, x.shape[-1] // f.block
    device = target(x.device)
    bits = f.element.bits
    n, warps, whole = _tile("round_trip" if scale is None else "quantize", f, blocks, device.units)
    kind, each = _globals(g, blocks, n)
    aligned = rows.data_ptr() % 4 == 0 and rows.stride(0) % 2 == 0
    launch(
        _quantize_kernel,
        (triton.cdiv(blocks, n),),
        x.device,
        rows,
        data,
        scale,
        None if g is None else g.contiguous(),
        rows.stride(0),
        blocks,
        per_row,
        each,
        ELEMENT=f.element.name,
        RULE=rule,
        E8M0=f.scale == "e8m0",
        FP8=device.fp8,
        ASM=device.asm and (device.fp8 or bits != 6),
        PAIRS=bits < 8 and x.dtype == torch.bfloat16 and aligned,
        WHOLE=whole,
        ROWS=apart,
        GLOBALS=kind,
        ROUND_TRIP=scale is None,
        N=n,
        B=f.block,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def quantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [..., data_width(K)] and scale bytes [..., K / block], uint8.

    The rules that try several scales (SEARCH, FOUR_OVER_SIX) are offline rules: the reference runs on the device, in chunks.
    """
    f = get_format(format)
    lead, k = x.shape[:-1], x.shape[-1]
    data = torch.empty((*lead, f.data_width(k)), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*lead, k // f.block), dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return data, scale
    if rule not in _OFFLINE:
        _run_quantize(x, f, rule, global_scale, data, scale)
        return data, scale
    rows = x.reshape(-1, k)
    g = global_scale
    if g is not None and g.ndim:
        g = g.reshape(-1).repeat_interleave(rows.shape[0] // g.numel())
    step = max(1, _CHUNK // k)
    for i in range(0, rows.shape[0], step):
        part = slice(i, i + step)
        codes, bytes_ = reference.quantize_codes(rows[part], f, rule, g if g is None or g.ndim == 0 else g[part])
        data.view(-1, data.shape[-1])[part] = reference.pack_codes(codes, f)
        scale.view(-1, scale.shape[-1])[part] = bytes_
    return data, scale


def quantize_dequantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Tensor:
    """The values of x [..., K] after a round trip, in x's dtype, contiguous."""
    if rule in _OFFLINE:
        return dequantize(*quantize(x, format, rule, global_scale), global_scale, format, x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _run_quantize(x, get_format(format), rule, global_scale, out, None)
    return out


def dequantize(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    dtype: torch.dtype,
    rows: Tensor | None = None,  # [R]
) -> Tensor:
    """Values [..., K] of ``dtype`` from codes [..., data_width(K)] and scale bytes [..., K / block]; rows: of dimension 0."""
    f = get_format(format)
    lead = scale.shape[:-1] if rows is None else (rows.shape[0], *scale.shape[1:-1])
    out = torch.empty((*lead, scale.shape[-1] * f.block), dtype=dtype, device=data.device)
    if out.numel() == 0:
        return out
    data, scale = data.contiguous(), scale.contiguous()
    if data.data_ptr() % 4:
        data = data.clone()
    n, warps, _ = _tile("dequantize", f, out.numel() // f.block, target(data.device).units)
    blocks, turns, count = scale.numel(), 1, 1
    if rows is not None:
        blocks, count = scale[0].numel(), rows.shape[0]
        turns = turns_for(count)
    own = n * turns
    kind, each = _globals(global_scale, scale.numel(), own, blocks)
    launch(
        *(_dequantize_kernel, (triton.cdiv(blocks, own) * count,), data.device),
        *(data, scale, None if global_scale is None else global_scale.contiguous()),
        *(None if rows is None else rows.contiguous(), out, blocks, each),
        ELEMENT=f.element.name,
        E8M0=f.scale == "e8m0",
        FP8=target(data.device).fp8,
        GLOBALS=kind,
        SELECT=rows is not None,
        TURNS=turns,
        N=n,
        B=f.block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out
