"""QuantizedTensor: the one form of a quantized tensor, with one canonical memory layout.

Unswizzled, unpadded, K last; gate and up halves concatenated; expert is dimension 0. Whatever a kernel wants instead
(padding, swizzles, fragment order) is derived from it and stays private to that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import Format, ScaleRule, get_format


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """``x[..., k] ~ decode(data) * scale[..., k // block] * global_scale[...]``, logical shape [..., N, K].

    data: FP8 [..., N, K]; or uint8 [..., N, K/2] (two FP4 codes a byte, even k in the low nibble); or uint8 [..., N, 3K/4]
        (four FP6 codes in three little-endian bytes).
    scale: [..., N, K/block], uint8 (E8M0: 2^(byte - 127), 255 is NaN) or float8_e4m3fn (NVFP4).
    rule: the scale rule it was made with. dtype: what ``dequantize`` returns by default (bf16, fp16 or fp32).
    global_scale: float32 multiplier, [] or one per matrix [...] (a prefix of the leading dimensions); NVFP4 only.

    Construction checks shapes and dtypes (ValueError, TypeError); it never copies and never reads values.
    """

    data: Tensor
    scale: Tensor
    format: Format
    rule: ScaleRule
    dtype: torch.dtype = torch.bfloat16
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        f = get_format(self.format)
        object.__setattr__(self, "format", f)
        object.__setattr__(self, "rule", f.check_rule(self.rule))
        if self.data.dtype != f.data_dtype:
            raise TypeError(
                f"data of {f} is {self.data.dtype}, needs {f.data_dtype}: use .view({f.data_dtype}) on its bytes"
            )
        if self.scale.dtype != f.scale_dtype:
            raise TypeError(
                f"scale of {f} is {self.scale.dtype}, needs {f.scale_dtype}: use .view({f.scale_dtype}) on its bytes"
            )
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"dtype is {self.dtype}, needs bfloat16, float16 or float32")
        if self.data.ndim < 1 or self.scale.ndim < 1:
            raise ValueError("data and scale need at least one dimension, K")
        k = self.scale.shape[-1] * f.block
        want = (*self.scale.shape[:-1], f.data_width(k))
        if tuple(self.data.shape) != want:
            raise ValueError(
                f"data of {f} has shape {tuple(self.data.shape)}, but scale {tuple(self.scale.shape)} "
                f"(one per {f.block} of K = {k}) needs data of shape {want}"
            )
        if self.data.device != self.scale.device:
            raise ValueError(f"data is on {self.data.device} and scale on {self.scale.device}: move both to one device")
        g = self.global_scale
        if f.has_global_scale:
            if g is None:
                raise ValueError(
                    f"{f} needs a global_scale (float32 multiplier): compute one from the tensor's largest magnitude"
                )
            if g.dtype != torch.float32:
                raise TypeError(f"global_scale is {g.dtype}, needs float32")
            if g.ndim > max(0, self.data.ndim - 2) or tuple(g.shape) != tuple(self.data.shape[: g.ndim]):
                raise ValueError(
                    f"global_scale has shape {tuple(g.shape)}, needs [] or a prefix of the leading dimensions {tuple(self.data.shape[:-2])}"
                )
            if g.device != self.data.device:
                raise ValueError(
                    f"global_scale is on {g.device} and data on {self.data.device}: move both to one device"
                )
        elif g is not None:
            raise ValueError(f"{f} has no global scale, but one was given: pass global_scale=None")

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., N, K]."""
        return torch.Size((*self.scale.shape[:-1], self.scale.shape[-1] * self.format.block))

    @property
    def ndim(self) -> int:
        """The number of logical dimensions."""
        return self.data.ndim

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and global scales."""
        g = self.global_scale
        return self.data.nbytes + self.scale.nbytes + (0 if g is None else g.nbytes)

    def map(self, f: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """Apply ``f`` to each of its tensors (``.to(device)``, ``.contiguous()``, ``.clone()`` ...)."""
        g = self.global_scale
        return replace(self, data=f(self.data), scale=f(self.scale), global_scale=None if g is None else f(g))

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        return self.map(lambda t: t.to(device))

    def __getitem__(self, index: int | slice | Tensor) -> QuantizedTensor:
        """Select along the first dimension (an expert of [E, N, K], rows of [N, K]); K is never sliced."""
        if self.ndim < 2:
            raise IndexError(f"a quantized tensor of shape {tuple(self.shape)} has no leading dimension to select from")
        g = self.global_scale
        return replace(
            self,
            data=self.data[index],
            scale=self.scale[index],
            global_scale=g if g is None or g.ndim == 0 else g[index],
        )

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, rule={self.rule}, device={self.device})"
