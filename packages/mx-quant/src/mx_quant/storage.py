"""The tensors of a QuantizedTensor as named members of an nn.Module, and storage that is allocated once and filled in place.

A weight called ``w`` is held as ``w`` (codes), ``w_scale`` and, for NVFP4, ``w_global_scale``. New storage is marked: its
scales are NaN (byte 0xFF, or 0x7F for E4M3), so that a weight which was never loaded is found, not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mx_kernels import Format, QuantizedTensor, ScaleRule


def allocate(
    shape: Sequence[int],
    format: Format,
    *,
    rule: ScaleRule | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> QuantizedTensor:
    """Storage for a quantized [..., N, K] whose scales are NaN until it is filled; ValueError unless K fits the format."""
    *rows, k = shape
    format.check_k(k, f"K of {tuple(shape)}")
    nan = 0xFF if format.scale == "e8m0" else 0x7F
    scale = torch.full((*rows, k // format.block), nan, dtype=torch.uint8, device=device).view(format.scale_dtype)
    data = torch.empty((*rows, format.data_width(k)), dtype=torch.uint8, device=device).view(format.data_dtype)
    g = torch.full(rows[:-1], float("nan"), device=device) if format.has_global_scale else None
    return QuantizedTensor(data, scale, format, format.check_rule(rule), dtype, g)


def parts(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of ``q`` by the suffix of their name: "", "_scale" and, where it has one, "_global_scale"."""
    found = {"": q.data, "_scale": q.scale}
    if q.global_scale is not None:
        found["_global_scale"] = q.global_scale
    return found


def fill(target: QuantizedTensor, source: QuantizedTensor) -> None:
    """Copy ``source`` into the memory of ``target`` (pointers stay); ValueError unless format and shape agree."""
    if target.format is not source.format or target.shape != source.shape:
        raise ValueError(
            f"cannot copy {source.format} of shape {tuple(source.shape)} into {target.format} of shape "
            f"{tuple(target.shape)}: quantize it to the target's format first"
        )
    g, new = target.global_scale, source.global_scale
    if g is not None and new is not None and g.shape != new.shape:
        raise ValueError(f"cannot copy a global scale of shape {tuple(new.shape)} into one of shape {tuple(g.shape)}")
    for old, value in zip(parts(target).values(), parts(source).values(), strict=True):
        as_bytes(old).copy_(as_bytes(value))


def as_bytes(t: Tensor) -> Tensor:
    """``t`` seen as uint8: copies and selections of FP8 that no cast can touch (float32 [] becomes [4])."""
    if t.dtype is torch.uint8:
        return t
    return (t.reshape(1) if t.ndim == 0 else t).view(torch.uint8)


def attach(layer: nn.Module, name: str, q: QuantizedTensor) -> None:
    """Register the tensors of ``q`` on ``layer`` as buffers, in place of whatever has those names."""
    for suffix, tensor in parts(q).items():
        detach(layer, name + suffix)
        layer.register_buffer(name + suffix, tensor)


def detach(layer: nn.Module, name: str) -> None:
    """Take a parameter, buffer or attribute off ``layer`` if it is there, so that nothing on it keeps the tensor alive."""
    if name in layer._parameters or name in layer._buffers or name in layer.__dict__:
        delattr(layer, name)


def attached(layer: nn.Module, name: str, format: Format, rule: ScaleRule, dtype: torch.dtype) -> QuantizedTensor:
    """The QuantizedTensor whose tensors ``attach`` registered; TypeError where something has cast them since."""
    g = getattr(layer, name + "_global_scale") if format.has_global_scale else None
    return QuantizedTensor(getattr(layer, name), getattr(layer, name + "_scale"), format, rule, dtype, g)


def apply_to_bytes(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """``f`` of ``nn.Module._apply`` on a tensor's bytes: moves it, where a cast (``.half()``) leaves codes and scales alone."""
    moved = f(as_bytes(t))
    if moved.dtype is not torch.uint8:
        raise TypeError(f"codes and scales cannot become {moved.dtype}: dequantize the weight, or quantize it again")
    return moved if t.dtype is torch.uint8 else moved.view(t.dtype).reshape(t.shape)


def check_scales(name: str, q: QuantizedTensor) -> None:
    """Raise ValueError naming the tensor where a scale is NaN (was never loaded) or a global scale is not positive and finite."""
    if q.data.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load its weights first")
    codes = q.scale.view(torch.uint8)
    bad = codes == 0xFF if q.format.scale == "e8m0" else (codes & 0x7F) == 0x7F
    if bool(bad.any()):
        index = tuple(int(i) for i in torch.unravel_index(bad.reshape(-1).int().argmax(), bad.shape))
        raise ValueError(
            f"{name}_scale is NaN in {int(bad.sum())} of {bad.numel()} blocks, the first at index {index}: "
            f"it was not loaded, or the checkpoint is damaged"
        )
    if q.global_scale is not None:
        check_positive(f"{name}_global_scale", q.global_scale)


def check_positive(name: str, scale: Tensor) -> None:
    """Raise ValueError unless every value of a float32 scale is finite and above zero."""
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        first = int(bad.reshape(-1).int().argmax())
        raise ValueError(
            f"{name} is {float(scale.reshape(-1)[first])} at index {first}, needs a positive finite multiplier: it is missing, "
            f"zero or damaged, and would make NaN or a dead layer"
        )
