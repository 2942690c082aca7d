"""Checks of source weights before they are quantized, each naming the tensor.

Offline and at load a NaN or an infinity in a weight is an error, not a number to encode: see ``check_finite``.
``quantize_finite`` finds it without another pass over the weights, from the scales that quantization makes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Format, QuantizedTensor, ScaleRule

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# FORMATS: a NaN in a block gives scale byte 0xFF and an infinity 0xFE. A finite float32 block reaches at most
# 254 - emax + 1 <= 253, so these two bytes say "not finite" for every element type and scale rule.
_FIRST_NONFINITE_E8M0 = 0xFE


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` is a tensor of bfloat16, float16 or float32."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, needs a Tensor: torch.as_tensor makes one")
    if x.dtype not in SOURCE_DTYPES:
        hint = (
            "it looks quantized already: read it with its checkpoint layout"
            if x.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
            else "convert it first"
        )
        raise TypeError(f"{name} is {x.dtype}, needs bfloat16, float16 or float32 to be quantized: {hint}")


def check_loaded(name: str, x: Tensor) -> None:
    """Raise ValueError where ``x`` is on the meta device, so has no values."""
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load its weights first (load_online)")


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError naming the tensor and the index of its first NaN or infinity; None for a finite one."""
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x)  # propagates NaN; three to seven times faster than isfinite(x).all() on a CPU
    if torch.isfinite(torch.stack((low, high)).float()).all():
        return
    bad = ~torch.isfinite(x.reshape(-1))
    count, flat = int(bad.sum()), int(bad.int().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))
    value = float(x.reshape(-1)[flat])
    advice = (
        "load it: it seems that nothing was loaded into it"
        if count == x.numel()
        else "repair the source, or leave this tensor out of quantization"
    )
    raise ValueError(
        f"{name} is not finite: {count} of {x.numel()} values, the first is {value} at index {index}; {advice}"
    )


def check_matrix(name: str, x: Tensor, format: Format) -> None:
    """Raise TypeError or ValueError unless ``x`` is a loaded [..., K] weight whose K is a multiple of the format's block."""
    check_dtype(name, x)
    check_loaded(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, needs at least two dimensions [N, K]")
    format.check_k(x.shape[-1], f"K of {name} (shape {tuple(x.shape)})")


def joint_global_scale(parts: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The float32 global scale [] that tensors share (gate and up; q, k and v): their joint largest magnitude / 2688.

    Streams ``parts`` (name, tensor): one is looked at and dropped before the next is asked for. All zeros give 1.
    Raises ValueError for a NaN or an infinity, or where there is no part.
    """
    largest: Tensor | None = None
    for name, x in parts:
        check_dtype(name, x)
        low, high = torch.aminmax(x)
        amax = torch.maximum(low.float().abs(), high.float().abs())
        if not torch.isfinite(amax):
            check_finite(name, x)
        largest = amax if largest is None else torch.maximum(largest, amax)
        del x  # before the next one is made
    if largest is None:
        raise ValueError("no tensors to share a global scale: pass at least one (name, tensor)")
    return mk.compute_global_scale(largest.reshape(1, 1))


def quantize_finite(
    name: str,
    x: Tensor,
    format: Format,
    *,
    rule: ScaleRule | str | None = None,
    global_scale: Tensor | None = None,
    checked: bool = False,
) -> QuantizedTensor:
    """``mx_kernels.quantize`` of a weight ``x`` [..., N, K] (any strides), refusing one that is not finite.

    Raises what ``check_matrix`` and ``check_finite`` raise. MX formats are checked on their scale bytes, a 32nd of the
    weights, which are searched only to name the culprit; NVFP4 is checked by the pass that finds its global scale, or by
    one of its own where a scale is given, unless ``checked`` says that ``joint_global_scale`` has seen this tensor.
    """
    check_matrix(name, x, format)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if format.has_global_scale:
        if global_scale is None and x.ndim == 2:
            global_scale = joint_global_scale([(name, x)])  # its pass over x checks too
        elif global_scale is None or not checked:
            check_finite(name, x)
        return mk.quantize(x, format, rule=rule, global_scale=global_scale)
    q = mk.quantize(x, format, rule=rule, global_scale=global_scale)
    if q.scale.numel() and int(q.scale.max()) >= _FIRST_NONFINITE_E8M0:
        check_finite(name, x)
    return q
