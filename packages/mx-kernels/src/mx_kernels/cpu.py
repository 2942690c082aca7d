"""The CPU path of quantization: the reference's arithmetic, bit for bit, in pieces that stay in the cores' caches.

Blocks are taken in batches. A batch first gets its scales: the largest float32 pattern of each block, as an integer, and the
reference's rule on those. Then its codes, chunk by chunk, from v = x * reciprocal(scale) in float32:

- FP8: torch's cast, after a clamp (v is exact, and the cast rounds to nearest even).
- E2M1: |v| has spacing 1/2 up to 2, 1 up to 4, 2 up to 6. An adder rounds to spacing u when it adds 2^23 u, and leaves the
  multiple of u in its last bits: three sums give rne(2v), rne(v) + 2, rne(v / 2) + 4, and the smallest of them is the code.
- FP6 codes and scale searches: the reference itself, chunk by chunk.

Every operation writes into a buffer, and torch divides it over its threads: each core meets the same part of a chunk again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .dispatch import bytes_of
from .formats import E2M1, E4M3, Element, Format, ScaleRule, get_format

CHUNK = 1 << 16  # elements a thread: two float32 buffers and three of bytes in 2 MiB of cache
BATCH = 16  # chunks that get their scales together
_SEARCHES = (ScaleRule.SEARCH, ScaleRule.FOUR_OVER_SIX)
# What rounds |v| to multiples of 1/2, 1 and 2, and how far their codes are from the multiple.
_ADDERS = (2.0**22, 2.0**23 + 2, 2.0**24 + 8)


def _slices(first: int, end: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, end)) for i in range(first, end, step))


def _chunk_blocks(f: Format) -> int:
    return CHUNK * torch.get_num_threads() // f.block


def _per_block(global_scale: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The global scale of every block [blocks, 1], or [] where one serves all; ``lead``: shape of the scales."""
    if global_scale.numel() == 1:
        return global_scale.reshape(())
    g = global_scale.reshape(*global_scale.shape, *([1] * (len(lead) - global_scale.ndim)))
    return g.expand(lead).reshape(-1, 1)


def _part(g: Tensor, s: slice) -> Tensor:
    return g[s] if g.ndim else g


def quantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16, fp16 or fp32 on the CPU -> data uint8 [..., data_width(K)], scale uint8 [..., K / block]."""
    f, r = get_format(format), ScaleRule(rule)
    lead, k = x.shape[:-1], x.shape[-1]
    data = torch.empty((*lead, f.data_width(k)), dtype=torch.uint8)
    scale = torch.empty((*lead, k // f.block), dtype=torch.uint8)
    blocks = x.detach().contiguous().view(-1, f.block)
    out, scales = data.view(-1, f.data_width(f.block)), scale.view(-1, 1)
    g = torch.ones(()) if global_scale is None else _per_block(global_scale, tuple(scale.shape))
    step = _chunk_blocks(f)
    if r in _SEARCHES:
        for s in _slices(0, len(blocks), step):
            codes, scales[s] = reference.quantize_codes(blocks[s], f, r, _part(g, s) if f.has_global_scale else None)
            out[s] = reference.pack_codes(codes, f)
        return data, scale
    work = _Work(f, min(step, len(blocks)))
    for batch in _slices(0, len(blocks), step * BATCH):
        amax = torch.empty((batch.stop - batch.start, 1), dtype=torch.int32)
        for s in _slices(batch.start, batch.stop, step):
            work.amax(blocks[s], amax[s.start - batch.start : s.stop - batch.start])
        if f.scale == "e8m0":
            scales[batch] = reference.e8m0_scale(amax, f.element, r)
            reciprocal = reference.scale_to_reciprocal(scales[batch])
        else:
            scales[batch] = reference.e4m3_scale(amax.view(torch.float32), _part(g, batch))
            reciprocal = reference.nvfp4_reciprocal(scales[batch], _part(g, batch))
        for s in _slices(batch.start, batch.stop, step):
            work.encode(blocks[s], reciprocal[s.start - batch.start : s.stop - batch.start], out[s])
        invalid = amax.view(-1) > reference.INF_BITS
        if bool(invalid.any()):
            out[batch][invalid] = 0
    return data, scale


class _Work:
    """The steps on one chunk of blocks, with their buffers."""

    def __init__(self, f: Format, blocks: int) -> None:
        self.f = f
        self.values = torch.empty(blocks, f.block)
        if f.element == E2M1:
            self.sums = torch.empty(blocks, f.block)
            self.codes, self.other, self.sign = torch.empty((3, blocks, f.block), dtype=torch.uint8)
            self.pairs = torch.empty(blocks, f.block // 2, dtype=torch.int16)

    def amax(self, x: Tensor, out: Tensor) -> None:
        """The largest magnitude of each block of x [R, B] as float32 bits -> int32 [R, 1]."""
        v = self.values[: len(x)].copy_(x).abs_()
        torch.amax(v.view(torch.int32), 1, keepdim=True, out=out)

    def encode(self, x: Tensor, reciprocal: Tensor, out: Tensor) -> None:
        """The data of x [R, B] * reciprocal [R, 1] -> uint8 [R, W]; NaN gives any code."""
        v, element = self.values[: len(x)].copy_(x), self.f.element
        if element == E2M1:
            self._encode_e2m1(v, reciprocal, out)
        elif element.dtype is not None:
            v.mul_(reciprocal).clamp_(-element.max, element.max)
            out.view(element.dtype).copy_(v)
        else:
            out.copy_(reference.pack_codes(reference.encode(v.mul_(reciprocal), element), self.f))

    def _encode_e2m1(self, v: Tensor, reciprocal: Tensor, out: Tensor) -> None:
        n = len(v)
        sums, codes, other, pairs = self.sums[:n], self.codes[:n], self.other[:n], self.pairs[:n]
        bits = sums.view(torch.int32)
        torch.bitwise_right_shift(v.view(torch.int32), 28, out=bits)
        sign = self.sign[:n].copy_(bits)  # the sign, also of zero, is bit 3
        v.abs_().mul_(reciprocal).clamp_(max=E2M1.max)
        codes.copy_(torch.add(v, _ADDERS[0], out=sums).view(torch.int32))
        for adder in _ADDERS[1:]:
            other.copy_(torch.add(v, adder, out=sums).view(torch.int32))
            torch.minimum(codes, other, out=codes)
        codes.bitwise_or_(sign.bitwise_and_(8))
        two = codes.view(torch.int16)  # the code of even k in the low byte (little-endian)
        torch.bitwise_right_shift(two, 4, out=pairs)
        out.copy_(pairs.bitwise_or_(two))


def dequantize(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """data uint8 [..., data_width(K)], scale uint8 [..., K / block] on the CPU -> [..., K] in ``dtype``."""
    f = get_format(format)
    width, step = f.data_width(f.block), _chunk_blocks(f)
    out = torch.empty((*scale.shape[:-1], scale.shape[-1] * f.block), dtype=dtype)
    blocks, scales = bytes_of(data).contiguous().view(-1, width), bytes_of(scale).contiguous().view(-1, 1)
    results = out.view(-1, f.block)
    g = None if global_scale is None else _per_block(global_scale, tuple(scale.shape))
    table = _byte_table(f.element)
    index = torch.empty(step * width, dtype=torch.int32)
    values = torch.empty(step, f.block)
    for batch in _slices(0, len(blocks), step * BATCH):
        e8m0 = f.scale == "e8m0"
        steps = reference.scale_to_float(scales[batch]) if e8m0 else reference.decode(scales[batch], E4M3)
        for s in _slices(batch.start, batch.stop, step):
            v = values[: s.stop - s.start]
            if table is None:
                v.copy_(reference.decode(reference.unpack_codes(blocks[s], f), f.element))
            else:
                i = index[: blocks[s].numel()].copy_(blocks[s].view(-1))
                torch.index_select(table, 0, i, out=v.view(-1).view(table.dtype))
            v.mul_(steps[s.start - batch.start : s.stop - batch.start])
            results[s] = v if g is None else v.mul_(_part(g, s))
    return out


def _byte_table(element: Element) -> Tensor | None:
    """What each byte of data decodes to: float32 [256], for FP4 two of them as one int64; None for FP6."""
    if element.bits == 6:
        return None
    byte = torch.arange(256, dtype=torch.int32)
    if element.bits == 8:
        return reference.decode(byte.to(torch.uint8), element)
    low, high = (reference.decode((byte >> shift & 0xF).to(torch.uint8), element) for shift in (0, 4))
    return torch.stack((low, high), -1).view(torch.int64).view(-1)
