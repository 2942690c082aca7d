"""Packed weights: the private layout that the grouped GEMM with 16-bit activations streams.

The matrix units take weights as 16-bit fragments, so codes are stored in the order in which the threads of a warp hold them
and with their bits where the 16-bit form wants them: decoding is a few shifts and masks, then one multiplication by the scale.

    strip  16 rows of a matrix (gated: 8 gate rows, then the 8 up rows that they meet in the activation)
    tile   a strip's 64 (E2M1) or 32 (E4M3, E5M2) columns: 512 bytes, 16 for each thread t = 4 g + c of a warp
    data   uint8 [E, K tiles, strips, 512];  plain weights: [E, rows, K], their rows in the same order
    scale  uint8 [E, ceil(K / 128), rows, 128 / block], the rows padded to 256

A thread's fragment of 16 columns holds rows g and g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 (PTX ISA, wgmma, register
fragments of A). Scale bytes carry the distance between the two exponent biases: code bits read as bf16 are the value times
2^-126 (E2M1), 2^-120 (E4M3) or 2^-112 (E5M2), and a byte s is stored as s + 126, s + 120 or s + 112. The product is the
weight, exactly, as a bf16. Where an expert's scales do not fit that window they are shifted by a power of two that the
epilogue takes back. MXFP6 is widened to E4M3, which holds each of its values. NVFP4's E4M3 scales become an unsigned float
of 5 exponent and 3 mantissa bits, which has no subnormals, so that shifting it and adding a constant makes it a bf16.

Letters: E experts, N rows, K columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dispatch import bytes_of, direct, kernels
from .epilogue import LAYOUTS
from .formats import E2M1, E4M3, E5M2, Element, Format, ScaleRule
from .reference.elements import code_values, encode, unpack_codes
from .tensor import QuantizedTensor
from .tuning import Problem

STRIP, TILE, SCALE_K, SCALE_ROWS = 16, 512, 128, 256
PLAIN_K = 64  # plain weights: columns are padded to this
_FOLD = {E2M1.name: 126, E4M3.name: 120, E5M2.name: 112}  # added to the stored scale byte
_CHUNK = 1 << 26  # bytes of codes that are packed at once


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as ``pack`` made it; ``grouped_gemm`` and ``gemm`` take it in the place of the weight.

    data, scale: the layout above. shift: int32 [E], the power of two taken out of each expert's scales (None: none was).
    alpha: float32 [E], what the epilogue multiplies by (2^shift, or NVFP4's global scale times 2^7; None: nothing).
    global_scale: as the weight had it. shape: logical, [E, N, K] or [N, K]. format: None for a plain weight.
    gated, layout: whether gate and up rows meet in a strip, and where the weight had them ("concatenated", "interleaved").
    """

    data: Tensor
    scale: Tensor | None
    alpha: Tensor | None
    shift: Tensor | None
    global_scale: Tensor | None
    shape: torch.Size
    format: Format | None
    rule: ScaleRule | None
    dtype: torch.dtype
    gated: bool
    layout: str

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.data.device

    @property
    def element(self) -> str:
        """What a byte of ``data`` holds: "e2m1" (two codes), "e4m3", "e5m2", or "" for a plain weight."""
        return _stored(self.format).name if self.format is not None else ""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, padding included."""
        tensors = (self.data, self.scale, self.alpha, self.shift, self.global_scale)
        return sum(t.nbytes for t in tensors if t is not None)

    def problem(self, num_pairs: int, num_experts: int) -> Problem:
        """What its product with so many pairs asks of a launch configuration."""
        rows = -(-self.data.shape[-2] // STRIP) * STRIP if self.format is None else self.data.shape[2] * STRIP
        return Problem(
            self.element, 32 if self.format is None else self.format.block, num_pairs, num_experts, rows, self.shape[-1]
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> PackedWeight:
        """Apply ``f`` to each of its tensors."""

        def some(t: Tensor | None) -> Tensor | None:
            return None if t is None else f(t)

        return replace(
            self,
            data=f(self.data),
            scale=some(self.scale),
            alpha=some(self.alpha),
            shift=some(self.shift),
            global_scale=some(self.global_scale),
        )

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return self.map(lambda t: t.to(device))

    def unpack(self) -> QuantizedTensor | Tensor:
        """The weight that was packed, bit for bit (codes under an NVFP4 scale of zero come back as zeros)."""
        *lead, n, k = self.shape
        plain = self.format is None
        if plain:
            return _canonical_rows(self.data, n, self.gated, self.layout)[..., :k].reshape(self.shape)
        assert self.format is not None
        assert self.rule is not None
        assert self.scale is not None
        if direct(self.data):
            codes = kernels("packing").unpack_codes(self.data, self.format, n, k, self.gated, self.layout)
        else:
            data = self.data
            if self.element == "e4m3":
                data = _gathered_e4m3(data.view(torch.int32)).view(torch.uint8)
            stored = _unpack_e2m1(data) if self.element == "e2m1" else _unpack_bytes(data)
            codes = _canonical_rows(stored, n, self.gated, self.layout)
            codes = _narrow(codes[..., : k // (2 if self.element == "e2m1" else 1)], self.format)
        rows = -(-n // STRIP) * STRIP if not self.gated else self.data.shape[2] * STRIP
        scale = self.scale.transpose(1, 2)[:, :rows].flatten(2)
        over = self.scale.shape[1] * SCALE_K - k
        if over and k >= SCALE_K and _overlaps(k, self.element):  # the last tile ends at K
            cut = over // self.format.block
            tail = SCALE_K // self.format.block
            scale = torch.cat((scale[..., :-tail], scale[..., -tail + cut :]), -1)
        scale = _canonical_rows(scale[..., : k // self.format.block], n, self.gated, self.layout)
        if self.format.scale == "e8m0":
            moved = scale.int() - _FOLD[self.element]
            scale = (moved if self.shift is None else moved + self.shift[:, None, None]).to(torch.uint8)
        else:
            scale = _scale_tables()[1].to(scale.device)[scale.int()]
        data = codes.reshape(*lead, n, -1).view(self.format.data_dtype)
        scale = scale.reshape(*lead, n, -1).contiguous().view(self.format.scale_dtype)
        return QuantizedTensor(data, scale, self.format, self.rule, self.dtype, self.global_scale)


def pack(w: QuantizedTensor | Tensor, *, gated: bool = False, layout: str = "concatenated") -> PackedWeight:
    """Bring a weight [E, N, K] or [N, K] into the layout that the GEMM with 16-bit activations streams.

    w: quantized, or plain bf16 or fp16. gated: a gated activation follows, so that the N rows are gates and ups; ``layout``
    says how ("concatenated": N/2 gates, then N/2 ups; "interleaved": gate and up in turn), as in ``Activation.layout``.
    Reads values once (it waits for the device): call it when weights are loaded.

    Raises ValueError for a NaN (or infinite) code or scale, naming the first, for an expert whose scales lie too far apart
    for 16-bit weights, for an odd gated N and an unknown layout; TypeError for other dtypes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown activation layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if w.ndim not in (2, 3):
        raise ValueError(f"w has shape {tuple(w.shape)}, needs [E, N, K] or [N, K]")
    if 0 in w.shape:
        raise ValueError(f"w has shape {tuple(w.shape)}: there is nothing to pack")
    n = w.shape[-2]
    if gated and n % 2:
        raise ValueError(f"w has {n} rows, but a gated activation needs as many gates as ups: an even number")
    if isinstance(w, Tensor):
        return _pack_plain(w, gated, layout)
    return _pack_quantized(w, gated, layout)


def _pack_plain(w: Tensor, gated: bool, layout: str) -> PackedWeight:
    if w.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"w is {w.dtype}, needs bfloat16 or float16 (or a QuantizedTensor): cast it first")
    k = w.shape[-1]
    data = w.detach().reshape(-1, *w.shape[-2:])
    if gated or data.shape[1] % STRIP:
        data = _packed_rows(data, gated, layout)
    if k % PLAIN_K:
        data = torch.nn.functional.pad(data, (0, -k % PLAIN_K))
    data = data.contiguous()
    return PackedWeight(data, None, None, None, None, w.shape, None, None, w.dtype, gated, layout)


def _pack_quantized(w: QuantizedTensor, gated: bool, layout: str) -> PackedWeight:
    *_, n, k = w.shape
    f, element = w.format, _stored(w.format)
    codes = bytes_of(w.data).reshape(-1, n, w.data.shape[-1])
    scale = bytes_of(w.scale).reshape(-1, n, k // f.block)
    experts = codes.shape[0]
    width = k if _overlaps(k, element.name) else -(-k // SCALE_K) * SCALE_K
    alpha = None if w.global_scale is None else (w.global_scale * 128).expand(experts).contiguous()
    if direct(w.data, w.scale):
        tiles, strips = width // (64 if element is E2M1 else 32), -(-(n // 2) // 8) if gated else -(-n // STRIP)
        rows, over = -(-strips * STRIP // SCALE_ROWS) * SCALE_ROWS, _repeated(k, element.name, f)
        data, seen = kernels("packing").pack_codes(codes, scale, f, tiles, strips, gated, layout)
        fold = functools.partial(kernels("packing").pack_scales, scale, f, _FOLD[element.name])
        packed = fold(None, width, rows, over, gated, layout)  # mostly the scales need no shift, which is not known yet
        seen = seen.cpu()  # the one wait for the device
        least, _, most, bad = zip(*seen.tolist(), strict=True)
        if any(bad):
            e = bad.index(1)
            _finite(codes[e : e + 1], f, e)
        shift, (first, last) = None, _window(f) if f.scale == "e8m0" else (0, 0x7E)
        if 255 - max(least) < first or max(most) > last:
            low, some, high, _ = seen.int().unbind(1)
            shift = _checked_shift(w, scale, 255 - torch.where(255 - low < first, some, low), high)
        if shift is not None:
            del packed  # its memory first
            packed = fold(shift, width, rows, over, gated, layout)
    else:
        data, low, high = _pack_codes(codes, scale, f, width, gated, layout)
        shift = _checked_shift(w, scale, low, high)
        packed = _pack_scale(_fold(scale, shift, f), k, width, gated, layout, f)
    if shift is not None:
        alpha = torch.ldexp(torch.ones_like(shift, dtype=torch.float32), shift)
    return PackedWeight(
        data, packed,
        *(alpha, shift, w.global_scale, w.shape, f, w.rule, w.dtype, gated, layout),
    )  # fmt: skip


def _checked_shift(w: QuantizedTensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
    """``_shift``, None for scales that are not powers of two; ValueError for one that is no number. low, high: [E]."""
    f = w.format
    if f.scale == "e8m0":
        if int(high.max()) == 255:
            e, row, block = (scale == 255).nonzero()[0].tolist()
            raise ValueError(
                f"scale[{e}, {row}, {block}] of the {f} weight is 255 (NaN): quantize weights that are finite"
            )
        shift = _shift(low.int(), high.int(), f)
        return None if shift is None else shift.to(w.device)
    if int(high.max()) >= 0x7F:
        e, row, block = (scale >= 0x7F).nonzero()[0].tolist()
        raise ValueError(
            f"scale[{e}, {row}, {block}] of the {f} weight is {float(w.scale.reshape(scale.shape)[e, row, block])}: "
            "block scales are numbers from 0 to 448"
        )
    return None


def _pack_codes(
    codes: Tensor, scale: Tensor, f: Format, width: int, gated: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, and the smallest and largest scale byte of each expert; a part at a time."""
    experts, n, blocks = scale.shape
    k, element = blocks * f.block, _stored(f)
    strips = -(-(n // 2) // 8) if gated else -(-n // STRIP)
    per_tile = 64 if element is E2M1 else 32
    data = torch.empty((experts, width // per_tile, strips, TILE), dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK // (n * k))
    low, high = scale.flatten(1).amin(1), scale.flatten(1).amax(1)
    for e in range(0, experts, step):
        part = slice(e, min(e + step, experts))
        stored = _widen(_finite(codes[part], f, e), f)
        if f.scale == "e8m0":
            low[part] = _lowest(scale[part], stored, low[part], f)
        else:
            stored = _silence(stored, scale[part])
        stored = torch.nn.functional.pad(stored, (0, width * stored.shape[-1] // k - stored.shape[-1]))
        stored = _packed_rows(stored, gated, layout)
        if element is E2M1:
            _pack_e2m1(stored, data[part])
        else:
            _pack_bytes(stored, data[part])
            if element is E4M3:
                words = data[part].view(torch.int32)
                words.copy_(_spread_e4m3(words))
    return data, low, high


def _fold(scale: Tensor, shift: Tensor | None, f: Format) -> Tensor:
    """Scale bytes as they are stored."""
    if f.scale != "e8m0":
        return _scale_tables()[0].to(scale.device)[scale.int()]
    folded = scale.int() + _FOLD[_stored(f).name]
    return (folded if shift is None else folded - shift[:, None, None]).to(torch.uint8)


def _stored(f: Format) -> Element:
    """The element whose codes are stored: E4M3 for MXFP6."""
    return E4M3 if f.element.bits == 6 else f.element


def _overlaps(k: int, element: str) -> bool:
    """Whether the last 128 columns are one step of the K loop, whatever K is: it then repeats columns, with scales of zero."""
    return k >= SCALE_K and k % (64 if element == "e2m1" else 32) == 0


def _repeated(k: int, element: str, f: Format) -> int:
    """How many blocks the last 128 columns repeat."""
    return -k % SCALE_K // f.block if _overlaps(k, element) else 0


def _finite(codes: Tensor, f: Format, first: int) -> Tensor:
    """``codes`` [e, N, bytes]; ValueError if one is a NaN or an infinity."""
    if f.element in (E4M3, E5M2):
        bad = (codes & 0x7F) >= (0x7F if f.element is E4M3 else 0x7C)
        if bool(bad.any()):
            e, row, col = bad.nonzero()[0].tolist()
            code = int(codes[e, row, col])
            raise ValueError(
                f"code {code:#04x} at [{first + e}, {row}, {col}] of the {f} weight is not finite: quantize weights that are"
            )
    return codes


@functools.cache
def _widening(f: Format) -> tuple[Tensor, Tensor]:
    """(E4M3 code of each MXFP6 code, MXFP6 code of each of those E4M3 codes)."""
    wide = encode(torch.tensor(code_values(f.element), dtype=torch.float32), E4M3)
    narrow = torch.zeros(256, dtype=torch.uint8)
    narrow[wide.long()] = torch.arange(64, dtype=torch.uint8)
    return wide, narrow


def _widen(codes: Tensor, f: Format) -> Tensor:
    return codes if f.element.bits != 6 else _widening(f)[0].to(codes.device)[unpack_codes(codes, f).int()]


def _narrow(codes: Tensor, f: Format) -> Tensor:
    if f.element.bits != 6:
        return codes
    a, b, c, d = _widening(f)[1].to(codes.device)[codes.int()].unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(-2)


@functools.cache
def _scale_tables() -> tuple[Tensor, Tensor]:
    """E4M3 scale bytes as an unsigned float 8 e + m, 2^(e - 10) * (1 + m / 8), with 0 for zero; and back."""
    there, back = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    for byte in range(1, 0x7F):
        fraction, exponent = math.frexp(code_values(E4M3)[byte])
        there[byte] = 8 * (exponent + 9) + round(16 * fraction) - 8
        back[int(there[byte])] = byte
    return there, back


def _silence(codes: Tensor, scale: Tensor) -> Tensor:
    """FP4 codes [e, N, K / 2] with zeros (of their sign) where the block scale is zero: that float has no zero."""
    if bool((scale == 0).any()):
        zero = (scale == 0).repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)
        codes = torch.where(zero, codes & 0x88, codes)
    return codes


@functools.cache
def _window(f: Format) -> tuple[int, int]:
    """The scale bytes at which every value of ``f`` is a bf16 (down to 2^-133) and the folded byte is one (up to 254)."""
    smallest = min(v for v in code_values(f.element) if v > 0)
    return -6 - (int(torch.tensor(smallest).log2()) if smallest < 1 else 0), 254 - _FOLD[_stored(f).name]


def _lowest(scale: Tensor, codes: Tensor, low: Tensor, f: Format) -> Tensor:
    """Per expert: the smallest scale byte of a block that is not all zeros, where ``low``, the smallest of all, is below the window."""
    least = _window(f)[0]
    if int(low.min()) >= least:
        return low
    magnitude = 0x77 if f.element is E2M1 else 0x7F
    used = ((codes & magnitude) != 0).unflatten(-1, (scale.shape[-1], -1)).any(-1)
    return torch.where(low < least, torch.where(used, scale, 254).flatten(1).amin(1), low)


def _shift(low: Tensor, high: Tensor, f: Format) -> Tensor | None:
    """int32 [E]: what to subtract from each expert's scale bytes so that they lie in the window; None where all do."""
    least, most = _window(f)
    high = torch.maximum(high, low)
    shift = torch.where(high > most, high - most, torch.where(low < least, low - least, 0))
    wrong = (low - shift < least) & (low < 254) | (high - shift > most)
    if bool(wrong.any()):
        e = int(wrong.nonzero()[0])
        raise ValueError(
            f"expert {e} of the {f} weight has scale bytes from {int(low[e])} to {int(high[e])}, but 16-bit weights hold "
            f"{most - least + 1} in a row: use a backend that decodes to float32"
        )
    return shift.int() if bool(shift.any()) else None


# --- rows, tiles and scales ---


def _packed_rows(t: Tensor, gated: bool, layout: str) -> Tensor:
    """[E, N, X] -> [E, 16 * strips, X], zeros where there is no row."""
    if not gated:
        return torch.nn.functional.pad(t, (0, 0, 0, -t.shape[1] % STRIP))
    half: Tensor = t.unflatten(1, (2, -1)) if layout == "concatenated" else t.unflatten(1, (-1, 2)).transpose(1, 2)
    half = torch.nn.functional.pad(half, (0, 0, 0, -half.shape[2] % 8))
    half = half.unflatten(2, (-1, 8)).transpose(1, 2)
    return half.flatten(1, 3)


def _canonical_rows(t: Tensor, n: int, gated: bool, layout: str) -> Tensor:
    """The inverse: [E, 16 * strips, X] -> [E, N, X]."""
    if not gated:
        return t[:, :n]
    half: Tensor = t.unflatten(1, (-1, 2, 8)).transpose(1, 2).flatten(2, 3)[:, :, : n // 2]
    return (half if layout == "concatenated" else half.transpose(1, 2)).flatten(1, 2)


def _pack_bytes(codes: Tensor, out: Tensor) -> None:
    """One code a byte: [E, rows, K] -> [E, K tiles, strips, 512].

    A 32-bit word is (row g + 8, row g) of column 2c, then of column 2c + 1: shifting it by a byte exchanges the rows.
    """
    e, rows, k = codes.shape
    t = codes.view(e, rows // 16, 2, 8, k // 32, 2, 2, 4, 2)  # strip, half, g | tile, step, k half, c, parity
    out.view(e, k // 32, rows // 16, 8, 4, 2, 2, 2, 2).copy_(t.flip(2).permute(0, 4, 1, 3, 7, 5, 6, 8, 2))


def _rotated(words: Tensor, by: int) -> Tensor:
    """int32 words rotated to the left."""
    return (words << by) | ((words >> (32 - by)) & ((1 << by) - 1))


def _spread_e4m3(words: Tensor) -> Tensor:
    """int32 words of four codes, a byte each -> their bits where a bf16 has them, so that decoding takes five operations.

    A bf16 pair takes signs at bits 15 and 31 and a code's other bits at 10-4 and 26-20. The codes of row g are there; those of
    row g + 8 have sign and exponent 4 further to the left (the sign rotates into the other half) and the mantissa 4 to the right.
    """
    kept, fields = words & -0x7FF87FF9, (words >> 4) & 0x07F007F0
    return kept | fields | ((words << 8) & 0x78007800) | (_rotated(words, 12) & 0x00080008)


def _gathered_e4m3(words: Tensor) -> Tensor:
    """The inverse of ``_spread_e4m3``."""
    kept, fields = words & -0x7FF87FF9, (words & 0x07F007F0) << 4
    return kept | fields | ((words & 0x78007800) >> 8) | _rotated(words & 0x00080008, 20)


def _unpack_bytes(data: Tensor) -> Tensor:
    e, tiles, strips, _ = data.shape
    t = data.view(e, tiles, strips, 8, 4, 2, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
    return t.flip(2).reshape(e, strips * 16, tiles * 32)


_ROTATION = {(0, 0): 0, (0, 1): 6, (1, 0): 12, (1, 1): 2}  # (k half, row half) -> right rotation that decodes it


@functools.cache
def _e2m1_table() -> Tensor:
    """int32 [2, 2, 256]: where the two codes of a byte go in the 32-bit word of their (k half, row half).

    A bf16 pair takes a code's sign at bits 15 and 31 and its other bits at 8-6 and 24-22. Three rotations of the word give
    a pair each; the fourth takes signs and exponents from a rotation by 2 and mantissas from a shift by 6.
    """
    codes = torch.arange(256)
    table = torch.zeros((2, 2, 256), dtype=torch.int64)
    for (k_half, row_half), rotation in _ROTATION.items():
        for parity in (0, 1):
            code = (codes >> 4 * parity) & 15
            for bit, place in ((3, 15), (2, 8), (1, 7), (0, 6)):
                place += 16 * parity
                moved = place - 6 if rotation == 2 and bit == 0 else (place + rotation) % 32
                table[k_half, row_half] |= ((code >> bit) & 1) << moved
    return torch.where(table >= 1 << 31, table - (1 << 32), table).to(torch.int32)


def _pack_e2m1(codes: Tensor, out: Tensor) -> None:
    """Two codes a byte: [E, rows, K / 2] -> [E, K tiles, strips, 512]."""
    e, rows, width = codes.shape
    t = codes.view(e, rows // 16, 2, 8, width // 32, 4, 2, 4)  # strip, half, g | tile, step, k half, c
    t = t.permute(0, 4, 1, 3, 7, 5, 6, 2).to(torch.int32)  # e, tile, strip, g, c, step, k half, row half
    table = _e2m1_table().to(codes.device)
    words = torch.zeros(t.shape[:-2], dtype=torch.int32, device=codes.device)
    for k_half, row_half in _ROTATION:
        index = t[..., k_half, row_half].reshape(-1)
        words |= table[k_half, row_half].index_select(0, index).view(words.shape)
    out.view(torch.int32).view(words.shape).copy_(words)


def _unpack_e2m1(data: Tensor) -> Tensor:
    e, tiles, strips, _ = data.shape
    words = data.view(torch.int32).view(e, tiles, strips, 8, 4, 4).long() & 0xFFFFFFFF
    table = _e2m1_table().to(data.device).long() & 0xFFFFFFFF
    out = torch.zeros((*words.shape, 2, 2), dtype=torch.uint8, device=data.device)
    for k_half, row_half in _ROTATION:
        for bit in range(8):
            place = table[k_half, row_half, 1 << bit]
            out[..., k_half, row_half] |= ((words & place) != 0).to(torch.uint8) << bit
    return out.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(e, strips * 16, tiles * 32)


def _pack_scale(scale: Tensor, k: int, width: int, gated: bool, layout: str, f: Format) -> Tensor:
    """Folded bytes [E, N, K / block] -> [E, K tiles, rows, 128 / block]."""
    tiles, per_tile = -(-width // SCALE_K), SCALE_K // f.block
    scale = torch.nn.functional.pad(_packed_rows(scale, gated, layout), (0, tiles * per_tile - scale.shape[-1]))
    if over := _repeated(k, _stored(f).name, f):  # the last tile ends at K: its first bytes belong to repeated columns
        scale[..., -per_tile:] = scale[..., -per_tile:].roll(over, -1)
    scale = torch.nn.functional.pad(scale, (0, 0, 0, -scale.shape[1] % SCALE_ROWS))
    scale = scale.unflatten(-1, (tiles, per_tile)).transpose(1, 2)
    return scale.contiguous()
