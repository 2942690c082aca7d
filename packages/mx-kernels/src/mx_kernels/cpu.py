"""The CPU path of quantization: the reference's arithmetic, bit for bit, in chunks that stay in a core's cache.

Blocks get their scales from the largest float32 pattern of each, as an integer, and then their codes from
v = x * reciprocal(scale) in float32:

- FP8: torch's cast, after a clamp where the rule lets amax saturate (v is exact, and the cast rounds to nearest even).
- E2M1: the subnormals of v 2^-14 as a float16 begin where E2M1's do, so its bits, rounded to nearest even at bit 9, are the code.
  From bfloat16 with a power of two as scale it is that float16, exactly or below a quarter of the smallest code; any other v is
  rounded to odd first, to 9 significant bits, which float16 holds and which are as good as v itself for what follows.
- FP6 codes, scale searches and blocks with Inf or NaN: the reference itself.

Threads draw spans of chunks, and torch does not divide an operation again: threads that met after every operation would
wait for the slowest each time, which on a busy machine takes several times as long (2 cores: 0.25 for 1.0 GB/s of MXFP8).
The scales of a span are computed together: however small an operation is, it takes 2 us and may hand over the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import reference
from .dispatch import bytes_of
from .formats import E2M1, E4M3, Element, Format, ScaleRule, get_format

CHUNK = 1 << 18  # elements: long enough operations that threads seldom meet at the interpreter lock
SPAN = 16  # chunks, at most
_SEARCHES = (ScaleRule.SEARCH, ScaleRule.FOUR_OVER_SIX)
_HALF = 14  # E2M1's 1 is the smallest normal float16, 2^-14
_HALF_LIMIT = 224 << 23  # float32 bits of an amax that leaves room for 2^-14 in the reciprocal of its scale
_HALF_LEAST = 2.0**-112  # a reciprocal that does


def _cut(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _run(worker: Callable[[Iterator[slice]], None], blocks: int, chunk: int, span: int = 1) -> None:
    """Have workers draw spans of up to ``span`` chunks of blocks from one iterator, as many of them as torch would use threads."""
    threads = torch.get_num_threads()
    # Several spans for each thread, so that none waits long for the last one.
    span = max(1, min(span, -(-blocks // chunk) // (4 * threads if threads > 1 else 1)))
    spans = _cut(0, blocks, span * chunk)
    workers = min(threads, len(spans))
    if workers <= 1:
        worker(iter(spans))
        return
    inference = torch.is_inference_mode_enabled()  # a new thread does not inherit it

    def run(shared: Iterator[slice]) -> None:
        with torch.inference_mode(inference):
            worker(shared)

    # How many threads torch divides an operation over belongs to the thread that calls it; set_num_threads also sets what
    # later threads start with, and that is put back.
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(run, [iter(spans)] * workers):
                pass
    finally:
        torch.set_num_threads(threads)


def compute_global_scale(x: Tensor) -> Tensor:
    """x [..., N, K] on the CPU -> float32 [...]: the reference's result from one pass over x, where that is finite."""
    lead = x.shape[: max(0, x.ndim - 2)]
    if x.numel() == 0:
        return reference.compute_global_scale(x)
    matrices = x.detach().flatten(0, -3) if x.ndim > 2 else x.detach()[None]
    amax = torch.empty(len(matrices))
    for i, matrix in enumerate(matrices):
        low, high = torch.aminmax(matrix)
        amax[i] = torch.maximum(-low, high)
    if not bool((amax < torch.inf).all()):
        return reference.compute_global_scale(x)
    g: Tensor = reference.global_scale_of(amax)
    return g.reshape(lead)


def _per_block(global_scale: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The global scale of every block [blocks, 1], or [] where one serves all; ``lead``: shape of the scales."""
    if global_scale.numel() == 1:
        return global_scale.reshape(())
    g = global_scale.reshape(*global_scale.shape, *([1] * (len(lead) - global_scale.ndim)))
    return g.expand(lead).reshape(-1, 1)


def _part(g: Tensor | None, s: slice) -> Tensor | None:
    return g[s] if g is not None and g.ndim else g


def quantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16, fp16 or fp32 on the CPU -> data uint8 [..., data_width(K)], scale uint8 [..., K / block]."""
    f, r = get_format(format), ScaleRule(rule)
    lead, k = x.shape[:-1], x.shape[-1]
    data = torch.empty((*lead, f.data_width(k)), dtype=torch.uint8)
    scale = torch.empty((*lead, k // f.block), dtype=torch.uint8)
    blocks = x.detach().contiguous().view(-1, f.block)
    out, scales = data.view(-1, f.data_width(f.block)), scale.view(-1, 1)
    g = None if global_scale is None else _per_block(global_scale, tuple(scale.shape))

    def slow(s: slice) -> None:
        codes, scales[s] = reference.quantize_codes(blocks[s], f, r, _part(g, s))
        out[s] = reference.pack_codes(codes, f)

    # NVFP4's sums take twice the memory that the other ways to codes do, and a core's cache holds 1 to 2 MiB.
    step = CHUNK // f.block // (1 if g is None else 2)

    def worker(spans: Iterator[slice]) -> None:
        work = None if r in _SEARCHES else _Work(f, r, min(step, len(blocks)))
        for s in spans:
            if work is None or not work.quantize(blocks[s], _part(g, s), out[s], scales[s]):
                for chunk in _cut(s.start, s.stop, step):
                    slow(chunk)

    _run(worker, len(blocks), step, SPAN)
    return data, scale


class _Work:
    """Quantization of spans of blocks, chunk by chunk, in buffers of its own.

    Views are made once for a span: a slice taken in the loop costs as much as a small operation.
    """

    def __init__(self, f: Format, rule: ScaleRule, blocks: int) -> None:
        self.f, self.step = f, blocks
        self.rounding = reference.scale_rounding(f.element, rule) if f.scale == "e8m0" else 0
        self.saturates = rule not in (ScaleRule.CEIL, ScaleRule.RCEIL)
        self.buffers: dict[tuple[int, type[_Values]], _Values] = {}
        self.maxima: dict[tuple[int, torch.dtype], _Maxima] = {}
        if f.scale == "e4m3":
            # Code 0 is a block of zeros: an infinite step makes its reciprocal 0.
            self.steps = torch.tensor([torch.inf, *reference.code_values(E4M3)[1:]])

    def quantize(self, x: Tensor, g: Tensor | None, out: Tensor, scale: Tensor) -> bool:
        """x [R, B] -> out uint8 [R, W], scale uint8 [R, 1]; False, and nothing of worth in them, where x is not finite."""
        amax = torch.empty((len(x), 1), dtype=torch.int32)
        two_bytes = self.f.block == 16 and x.dtype in (torch.bfloat16, torch.float16)
        step = CHUNK // 16 if two_bytes else self.step
        for part, into in zip(x.split(step), amax.split(step), strict=True):
            if two_bytes:
                self._maxima(len(part), x.dtype).of(part, into)
            else:
                b = self._buffers(len(part), _Values)
                b.v.copy_(part).abs_()
                torch.amax(b.bits, 1, keepdim=True, out=into)
        top = int(amax.max()) if len(x) else 0
        if top >= reference.INF_BITS:
            return False
        kind: type[_Values] = _Values
        if self.f.element == E2M1:
            kind = _Halves if g is None and x.dtype == torch.bfloat16 else _OddHalves
        if g is None:
            late = kind.shift > 0 and top >= _HALF_LIMIT
            reciprocal = self._e8m0(amax, scale, 0 if late else kind.shift)
        else:
            reciprocal = self._e4m3(amax, g, scale)
            late = bool(((reciprocal < _HALF_LEAST) & (reciprocal > 0)).any())  # 0: a block of zeros
            if not late:
                reciprocal.mul_(2.0**-kind.shift)
        for part, r, into in zip(*(t.split(self.step) for t in (x, reciprocal, out)), strict=True):
            b = self._buffers(len(part), kind)
            b.v.copy_(part).mul_(r)
            if late:
                b.v.mul_(2.0**-kind.shift)
            b.encode(into, self.f, self.saturates)
        return True

    def _buffers(self, blocks: int, kind: type[_Values]) -> _Values:
        if (blocks, kind) not in self.buffers:
            v = None if kind is _Values else self._buffers(blocks, _Values).v
            self.buffers[blocks, kind] = kind(torch.empty((blocks, self.f.block)) if v is None else v)
        return self.buffers[blocks, kind]

    def _maxima(self, blocks: int, dtype: torch.dtype) -> _Maxima:
        if (blocks, dtype) not in self.maxima:
            self.maxima[blocks, dtype] = _Maxima(blocks, dtype)
        return self.maxima[blocks, dtype]

    def _e8m0(self, amax: Tensor, scale: Tensor, shift: int) -> Tensor:
        """The scale bytes of finite amax bits [R, 1], and 2^(127 - byte - shift)."""
        byte = amax.add_(self.rounding).bitwise_right_shift_(23).sub_(self.f.element.emax).clamp_(min=0)
        scale.copy_(byte)
        return byte.neg_().add_(254 - shift).bitwise_left_shift_(23).view(torch.float32)

    def _e4m3(self, amax: Tensor, g: Tensor, scale: Tensor) -> Tensor:
        """The scale bytes of finite amax bits [R, 1] with global scales g, and 1 / (s g)."""
        code = (amax.view(torch.float32) / (6.0 * g)).clamp_(2.0**-9, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
        code.mul_(amax.clamp_(max=1))
        scale.copy_(code)
        step = self.steps.index_select(0, code.view(-1).to(torch.int32)).view(-1, 1)
        return step.mul_(g).reciprocal_()


class _Maxima:
    """The largest magnitudes of blocks of 16 two-byte floats, by their bits.

    Each value gives way to the larger of itself and the one 8 further on, then 4, 2 and 1: the first of a block is its largest then.
    Whole vectors are compared so, where torch.amax goes through rows of 16 one by one (0.46 for 0.17 ns a value).
    """

    def __init__(self, blocks: int, dtype: torch.dtype) -> None:
        n = 16 * blocks
        self.bits, other = torch.empty((2, n), dtype=torch.int16)
        self.steps, source, into, end = [], self.bits, other, n
        for far in (8, 4, 2, 1):
            self.steps.append((source[: end - far], source[far:end], into[: end - far]))
            source, into, end = into, source, end - far
        self.first = source.view(dtype).view(-1, 16)[:, :1]

    def of(self, x: Tensor, amax: Tensor) -> None:
        """x [R, 16] -> their float32 bits, int32 [R, 1]."""
        torch.bitwise_and(x.view(torch.int16).view(-1), _16[0x7FFF], out=self.bits)
        for near, far, into in self.steps:
            torch.maximum(near, far, out=into)
        amax.view(torch.float32).copy_(self.first)


class _Values:
    """The scaled values v [R, B] of a chunk, float32, and how they become codes; ``shift``: they are 2^-shift times as large."""

    shift = 0

    def __init__(self, v: Tensor) -> None:
        self.v, self.bits = v, v.view(torch.int32)

    def encode(self, out: Tensor, f: Format, saturates: bool) -> None:
        """v (used up) -> packed codes uint8 [R, W] of FP8 and FP6."""
        element = f.element
        if element.dtype is None:
            out.copy_(reference.pack_codes(reference.encode(self.v, element), f))
        else:
            out.view(element.dtype).copy_(self.v.clamp_(-element.max, element.max) if saturates else self.v)


# Numbers of a dtype of their own: a Python number takes 2.5 us to become one, in each operation.
_16 = {n: torch.tensor(n, dtype=torch.int16) for n in (1, 3, 4, 9, 255, 0x0F0F, 0x7FFF)}
_32 = {n: torch.tensor(n, dtype=torch.int32) for n in (0x7FFF, -0x8000)}


class _Halves(_Values):
    """E2M1 codes of values 2^-14 times as large, by rounding the bits of float16. ``shift``: see ``_HALF``."""

    shift = _HALF

    def __init__(self, v: Tensor) -> None:
        super().__init__(v)
        self.rest = torch.empty_like(self.bits)
        self.word, self.odd = self.rest.view(torch.int16).view(2, *v.shape)
        self.h = self.word.view(torch.float16)
        self.codes = torch.empty_like(v, dtype=torch.uint8)
        self.two = self.codes.view(torch.int16)  # the code of even k is in the low byte (little-endian)
        self.pairs = torch.empty_like(self.two)

    def encode(self, out: Tensor, f: Format, saturates: bool) -> None:
        most = E2M1.max * 2.0**-_HALF
        self.h.copy_(self.v.clamp_(-most, most))
        # To nearest even: the code in bits 9 to 11, the sign in bit 15, whatever is between them 0.
        torch.bitwise_right_shift(self.word, _16[9], out=self.odd).bitwise_and_(_16[1])
        self.codes.copy_(self.word.add_(self.odd).add_(_16[255]).bitwise_right_shift_(_16[9]))
        torch.bitwise_right_shift(self.two, _16[3], out=self.pairs)
        self.two.bitwise_or_(self.pairs).bitwise_and_(
            _16[0x0F0F]
        )  # the sign, in bits 6 and 7 of a byte, comes to bit 3
        torch.bitwise_right_shift(self.two, _16[4], out=self.pairs)
        out.copy_(self.pairs.bitwise_or_(self.two))


class _OddHalves(_Halves):
    """The same for any float32 values: rounded to odd first, to 9 significant bits, which float16 holds.

    Whatever is cut off becomes a one in the last place that is kept. So a value stays on its side of every tie.
    """

    def encode(self, out: Tensor, f: Format, saturates: bool) -> None:
        torch.bitwise_and(self.bits, _32[0x7FFF], out=self.rest).add_(_32[0x7FFF])
        self.bits.bitwise_or_(self.rest).bitwise_and_(_32[-0x8000])
        super().encode(out, f, saturates)


def dequantize(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """data uint8 [..., data_width(K)], scale uint8 [..., K / block] on the CPU -> [..., K] in ``dtype``."""
    f = get_format(format)
    width = f.data_width(f.block)
    out = torch.empty((*scale.shape[:-1], scale.shape[-1] * f.block), dtype=dtype)
    blocks, scales = bytes_of(data).contiguous().view(-1, width), bytes_of(scale).contiguous().view(-1, 1)
    results = out.view(-1, f.block)
    g = None if global_scale is None else _per_block(global_scale, tuple(scale.shape))
    table = _byte_table(f.element)

    def worker(chunks: Iterator[slice]) -> None:
        step = min(CHUNK // f.block, len(blocks))
        index = torch.empty(step * width, dtype=torch.int32)
        values = torch.empty(step, f.block)
        for s in chunks:
            v = values[: s.stop - s.start]
            if table is None:
                v.copy_(reference.decode(reference.unpack_codes(blocks[s], f), f.element))
            else:
                i = index[: blocks[s].numel()].copy_(blocks[s].view(-1))
                torch.index_select(table, 0, i, out=v.view(-1).view(table.dtype))
            e8m0 = f.scale == "e8m0"
            v.mul_(reference.scale_to_float(scales[s]) if e8m0 else reference.decode(scales[s], E4M3))
            part = _part(g, s)
            results[s] = v if part is None else v.mul_(part)

    _run(worker, len(blocks), CHUNK // f.block)
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
