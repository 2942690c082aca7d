"""Scale layouts of other libraries' kernels, and their inverses, as index permutations.

In memory scales are row-major [..., R, C]: R rows (N), C = K / block scales a row; leading dimensions (experts) stay apart.
With row r and column c, a matrix is stored at (each padded with zero bytes to whole tiles):

    128x4   ((r // 128) * ceil(C / 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    8x4     ((r // 8) * ceil(C / 4) + c // 4) * 32 + (r % 8) * 4 + c % 4
    CDNA4   row r // 32, column ((((c // 8) * 4 + c % 4) * 16 + r % 16) * 2 + (c // 4) % 2) * 2 + (r // 16) % 2
    Hopper  row (r // 32w) * w + (r // 16) % w, column ((((c // 2) * 2 + (r // 16w) % 2) * 8 + r % 8) * 2 + c % 2) * 2 + (r // 8) % 2

Sources: cuBLAS, "1D Block Scaling Factors Layout" (128x4); FlashInfer (8x4); triton_kernels (CDNA4; Hopper, w = num_warps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Layout:
    """r and c split into digits (the leading one first and unbounded, so not listed), and the order the digits are stored in.

    Digits are numbered over r's, then c's. ``rows``: how many of the stored digits make up a row of the result (0: it is flat).
    """

    name: str
    r: tuple[int, ...]
    c: tuple[int, ...]
    order: tuple[int, ...]
    rows: int = 0
    pads: bool = True

    @property
    def tile(self) -> tuple[int, int]:
        return math.prod(self.r), math.prod(self.c)

    def padded(self, rows: int, columns: int) -> tuple[int, int]:
        r, c = self.tile
        return -(-rows // r) * r, -(-columns // c) * c

    def check(self, rows: int, columns: int) -> None:
        if not self.pads and self.padded(rows, columns) != (rows, columns):
            raise ValueError(
                f"scales have {rows} rows and {columns} columns; the {self.name} layout needs multiples of {self.tile}"
            )

    def stored(self, rows: int, columns: int) -> tuple[int, ...]:
        """The last dimensions of the stored form of ``rows`` x ``columns`` scales."""
        rows, columns = self.padded(rows, columns)
        if not self.rows:
            return (rows * columns,)
        digits = self._digits(rows, columns)
        stored = [digits[i] for i in self.order]
        return (math.prod(stored[: self.rows]), math.prod(stored[self.rows :]))

    def _digits(self, rows: int, columns: int) -> tuple[int, ...]:
        r, c = self.tile
        return (rows // r, *self.r, columns // c, *self.c)

    def apply(self, scale: Tensor) -> Tensor:
        if scale.ndim < 2 or scale.element_size() != 1:
            raise ValueError(
                f"scale is {scale.dtype} {tuple(scale.shape)}, needs [..., rows, columns] of a one-byte dtype: "
                "uint8, or float8_e4m3fn for NVFP4"
            )
        rows, columns = scale.shape[-2:]
        self.check(rows, columns)
        padded = self.padded(rows, columns)
        bits = F.pad(scale.view(torch.uint8), (0, padded[1] - columns, 0, padded[0] - rows))
        lead = scale.shape[:-2]
        digits = bits.reshape(*lead, *self._digits(*padded))
        n = len(lead)
        out = digits.permute(*range(n), *(n + i for i in self.order))
        return out.reshape(*lead, *self.stored(rows, columns)).contiguous().view(scale.dtype)

    def invert(self, data: Tensor, rows: int, columns: int) -> Tensor:
        if rows < 0 or columns < 0:
            raise ValueError(f"rows are {rows} and columns {columns}, need numbers that are not negative")
        self.check(rows, columns)
        want = self.stored(rows, columns)
        if data.ndim < len(want) or tuple(data.shape[-len(want) :]) != want or data.element_size() != 1:
            raise ValueError(
                f"data is {data.dtype} {tuple(data.shape)}, but {rows} x {columns} scales in the {self.name} layout "
                f"are one-byte numbers of shape [..., {', '.join(map(str, want))}]"
            )
        padded = self.padded(rows, columns)
        lead = data.shape[: -len(want)]
        n, digits = len(lead), self._digits(*padded)
        stored = data.view(torch.uint8).reshape(*lead, *(digits[i] for i in self.order))
        back = [self.order.index(i) for i in range(len(self.order))]
        out = stored.permute(*range(n), *(n + i for i in back)).reshape(*lead, *padded)
        return out[..., :rows, :columns].contiguous().view(data.dtype)


_128X4 = _Layout("128x4", (4, 32), (4,), (0, 3, 2, 1, 4))
_8X4 = _Layout("8x4", (8,), (4,), (0, 2, 1, 3))
_CDNA4 = _Layout("CDNA4", (2, 16), (2, 4), (0, 3, 5, 2, 4, 1), rows=1, pads=False)


def _hopper(num_warps: int) -> _Layout:
    if num_warps not in (4, 8):
        raise ValueError(f"num_warps is {num_warps}, needs 4 or 8")
    return _Layout(f"Hopper (num_warps {num_warps})", (2, num_warps, 2, 8), (2,), (0, 2, 5, 1, 4, 6, 3), rows=2)


def swizzle_128x4(scale: Tensor) -> Tensor:
    """[..., R, C] one-byte scales -> [..., ceil(R / 128) * 128 * ceil(C / 4) * 4]: cuBLAS, CUTLASS, FlashInfer."""
    return _128X4.apply(scale)


def unswizzle_128x4(data: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``swizzle_128x4``: -> [..., rows, columns]; padding is dropped."""
    return _128X4.invert(data, rows, columns)


def swizzle_8x4(scale: Tensor) -> Tensor:
    """[..., R, C] one-byte scales -> [..., ceil(R / 8) * 8 * ceil(C / 4) * 4]: FlashInfer's layout for few rows."""
    return _8X4.apply(scale)


def unswizzle_8x4(data: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``swizzle_8x4``: -> [..., rows, columns]; padding is dropped."""
    return _8X4.invert(data, rows, columns)


def swizzle_cdna4(scale: Tensor) -> Tensor:
    """[..., R, C] one-byte scales -> [..., R / 32, C * 32], gfx950; ValueError unless 32 divides R and 8 divides C."""
    return _CDNA4.apply(scale)


def unswizzle_cdna4(data: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``swizzle_cdna4``: -> [..., rows, columns]."""
    return _CDNA4.invert(data, rows, columns)


def swizzle_hopper(scale: Tensor, num_warps: int = 8) -> Tensor:
    """[..., R, C] one-byte scales -> [..., R' / 32, C' * 32], sm90; R' is R padded to 32 * num_warps, C' is C padded to 2."""
    return _hopper(num_warps).apply(scale)


def unswizzle_hopper(data: Tensor, rows: int, columns: int, num_warps: int = 8) -> Tensor:
    """The inverse of ``swizzle_hopper``: -> [..., rows, columns]; padding is dropped."""
    return _hopper(num_warps).invert(data, rows, columns)
