"""The engine of layouts that store a weight as a few tensors beside each other and differ only in names, dtypes and divisors.

One ``Names`` row per format says it all: compressed-tensors, ModelOpt, Quark and ``quant_method: "mxfp8"`` are tables of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mx_kernels import Format, QuantizedTensor

from .base import (
    Configs,
    Get,
    Infos,
    Layout,
    TensorInfo,
    WeightRef,
    check_global,
    check_info,
    check_scale,
    check_weight,
    scale_dtypes,
)
from .families import EXPERT, FUSED_EXPERT, LINEAR, Family, classify, deinterleave, interleave, stored_as
from .globals import invert_global

FUSED_PARAMS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")


def _same_prefix(param: str, suffix: str) -> str:
    return suffix.replace("weight", param, 1)


@dataclass(frozen=True)
class Names:
    """How a layout names the tensors of one weight: what stands in place of "weight" in its full-precision name.

    ``divisor``: the stored global scale is 1 / multiplier. ``global_shape``: its shape for one matrix, (1,) or ().
    ``fused(param, suffix)`` names a fused parameter's tensor, for ("gate_up_proj", "weight_scale") say.
    ``transposes``: fused parameters of a family that stores them [E, K, N] in full precision are stored so here too.
    """

    data: str
    scale: str
    global_scale: str | None = None
    input_scale: str | None = None
    divisor: bool = False
    global_shape: tuple[int, ...] = ()
    fused: Callable[[str, str], str] = _same_prefix
    transposes: bool = False

    def of(self, ref_name: str, suffix: str) -> str:
        """The stored tensor's name for a weight's full-precision name."""
        if ref_name.endswith(".weight"):
            return ref_name[: -len("weight")] + suffix
        head, _, param = ref_name.rpartition(".")
        return f"{head}.{self.fused(param, suffix)}"


def is_data(tensor: str, names: Names) -> bool:
    """Whether a tensor's name is that of a weight's codes."""
    last = tensor.rpartition(".")[2]
    return last == names.data or any(last == names.fused(p, names.data) for p in FUSED_PARAMS)


def stored_ref(tensor: str, info: Any, format: Format, names: Names, family: Family) -> WeightRef:
    """The reference of a quantized weight from its data tensor. ValueError for a shape no weight has."""
    shape = tuple(info.shape)
    head, _, last = tensor.rpartition(".")
    if head and last == names.data and len(shape) == 2:
        name = f"{head}.weight"
        kind = EXPERT if classify(name).kind == EXPERT else LINEAR
        return WeightRef(name, kind, (shape[0], _unpacked(shape[1], format)), format)
    for param in FUSED_PARAMS:
        if head and last == names.fused(param, names.data) and len(shape) == 3:
            interleaved, transposed = stored_as(f"{head}.{param}", family)
            e, n, k = (shape[0], shape[2], shape[1]) if transposed and names.transposes else shape
            canonical = (e, n, _unpacked(k, format))
            return WeightRef(
                f"{head}.{param}", FUSED_EXPERT, canonical, format, interleaved=interleaved, transposed=transposed
            )
    raise ValueError(
        f"{tensor} of shape {shape} looks like a quantized weight, but is neither a linear's {names.data} [N, K] nor a fused expert "
        f"parameter [E, N, K] such as {names.fused('gate_up_proj', names.data)}"
    )


def _unpacked(width: int, format: Format) -> int:
    return width * 8 // format.element.bits


def check_stored(ref: WeightRef, infos: Infos, names: Names, why: str) -> WeightRef:
    """``ref`` with the names of its tensors, after checking that all are stored with the right dtypes and shapes.

    Where its activations are quantized under a stored global scale, that must be there too.
    """
    f = _format(ref)
    if ref.activation is not None and ref.activation.has_global_scale and names.input_scale is not None:
        ref = replace(ref, input_scale=names.of(ref.name, names.input_scale))
    k = ref.shape[-1]
    if k <= 0 or k % f.block:
        data = names.of(ref.name, names.data)
        raise ValueError(
            f"{data} has shape {tuple(infos[data].shape)}, so K is {k}, no multiple of {f}'s block {f.block}: {why}"
        )
    (data, data_info), (scale, scale_info), *scalars = plan(ref, names).items()
    check_info(infos, data, (data_info.dtype,), data_info.shape, why)
    check_info(infos, scale, scale_dtypes(f), scale_info.shape, why)
    for name, _ in scalars:
        info = check_info(infos, name, (torch.float32,), None, why)
        if math.prod(info.shape) not in (1, ref.experts or 1):
            raise ValueError(
                f"{name} has shape {tuple(info.shape)}, needs {names.global_shape}, one global scale: {why}"
            )
    return replace(ref, tensors=(data, scale, *(name for name, _ in scalars)))


def plan(ref: WeightRef, names: Names) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a weight's stored tensors: data, scale, then the global scales."""
    f = _format(ref)
    f.check_k(ref.shape[-1], f"K of {ref.name}")
    n, k = ref.shape[-2:]
    swap = _swapped(ref, names)

    def matrix(width: int) -> tuple[int, ...]:
        return (*ref.shape[:-2], width, n) if swap else (*ref.shape[:-2], n, width)

    out = {
        names.of(ref.name, names.data): TensorInfo(f.data_dtype, matrix(f.data_width(k))),
        names.of(ref.name, names.scale): TensorInfo(f.scale_dtype, matrix(k // f.block)),
    }
    if names.global_scale is not None:
        shape = names.global_shape if ref.experts is None else (ref.experts, *names.global_shape)
        out[names.of(ref.name, names.global_scale)] = TensorInfo(torch.float32, shape)
        if ref.input_scale is not None and names.input_scale is not None:
            out[names.of(ref.name, names.input_scale)] = TensorInfo(torch.float32, shape)
    return out


def write(
    ref: WeightRef, q: QuantizedTensor, names: Names, expert: int | None, input_scale: Tensor | None
) -> dict[str, Tensor]:
    """The stored tensors of a weight, or of one expert of a fused one. Globals are inverted where the layout stores divisors."""
    data, scale = q.data, q.scale
    if ref.interleaved:
        data, scale = interleave(data, data.ndim - 2), interleave(scale, scale.ndim - 2)
    if _swapped(ref, names):
        data, scale = data.transpose(-1, -2).contiguous(), scale.transpose(-1, -2).contiguous()
    out = {names.of(ref.name, names.data): data, names.of(ref.name, names.scale): scale}
    if names.global_scale is None:
        return out
    assert q.global_scale is not None
    lead = () if ref.experts is None or expert is not None else (ref.experts,)
    out[names.of(ref.name, names.global_scale)] = _stored_global(q.global_scale, lead, names)
    if ref.input_scale is None:
        return out
    if input_scale is None:
        raise ValueError(
            f"{ref.name} has quantized activations but no input_scale was given: calibrate one, or write weights only (W4A16)"
        )
    check_global(f"input_scale of {ref.name}", input_scale)
    assert names.input_scale is not None
    out[names.of(ref.name, names.input_scale)] = _stored_global(input_scale, lead, names)
    return out


def read(ref: WeightRef, get: Get, names: Names, expert: int | None) -> QuantizedTensor:
    """The QuantizedTensor of a stored weight, or of one expert of a fused one. ValueError for NaN scales or bad globals."""
    f = _format(ref)
    data = get(names.of(ref.name, names.data), expert)
    name = names.of(ref.name, names.scale)
    scale = get(name, expert)
    if f.scale == "e8m0":
        scale = scale.view(torch.uint8)
    check_scale(name, scale)
    if _swapped(ref, names):
        data, scale = data.transpose(-1, -2).contiguous(), scale.transpose(-1, -2).contiguous()
    if ref.interleaved:
        data, scale = deinterleave(data, data.ndim - 2), deinterleave(scale, scale.ndim - 2)
    g = None
    if names.global_scale is not None:
        g = _read_global(ref, names.of(ref.name, names.global_scale), get, names, expert, data)
    return QuantizedTensor(data, scale, f, ref.rule or f.default_rule, global_scale=g)


def read_input_scale(ref: WeightRef, get: Get, names: Names, expert: int | None) -> Tensor | None:
    """The float32 multiplier of NVFP4 activations, None for weight-only; ValueError where it is zero or not finite."""
    if ref.input_scale is None or names.input_scale is None:
        return None
    return _read_global(ref, names.of(ref.name, names.input_scale), get, names, expert, None)


def _swapped(ref: WeightRef, names: Names) -> bool:
    return ref.transposed and names.transposes


def _stored_global(g: Tensor, lead: tuple[int, ...], names: Names) -> Tensor:
    g = invert_global(g) if names.divisor else g.float()
    shape = (*lead, *names.global_shape)
    return g.reshape((*g.shape, *([1] * (len(shape) - g.ndim)))).expand(shape).contiguous()


def _read_global(ref: WeightRef, name: str, get: Get, names: Names, expert: int | None, data: Tensor | None) -> Tensor:
    stored = get(name)  # a few bytes: one per expert, or one for all of them
    if stored.numel() == 1:
        stored = stored.reshape(())
        if ref.experts is not None and expert is None:
            stored = stored.expand(ref.experts).contiguous()
    elif ref.experts is not None and stored.numel() == ref.experts:
        stored = stored.reshape(ref.experts)
        stored = stored if expert is None else stored[expert]
    else:
        raise ValueError(f"{name} has shape {tuple(stored.shape)}, needs {names.global_shape}, one global scale")
    if names.divisor:
        check_global(name, stored)
        return invert_global(stored)
    check_global(name, stored, data)
    return stored.float()


def _format(ref: WeightRef) -> Format:
    if ref.format is None:
        raise ValueError(f"{ref.name} is in full precision: its reference names no format")
    return ref.format


def module_layout(
    name: str,
    table: Mapping[str, Names],
    *,
    formats: Sequence[Format],
    kinds: Sequence[str],
    activations: Sequence[Format],
    detect: Callable[[Configs, Infos], bool],
    refs: Callable[[Configs, Infos], list[WeightRef]],
    config: Callable[..., dict[str, dict[str, Any]]],
    why_not: Callable[[WeightRef], str | None] = lambda ref: None,
) -> Layout:
    """The Layout row of a table of Names by format name. ``why_not`` says why a weight cannot be stored, if it cannot."""

    def names_of(ref: WeightRef) -> Names:
        f = _format(ref)
        if f.name not in table:
            raise ValueError(f"layout {name} cannot hold {f} ({ref.name}); it holds {', '.join(table)}")
        reason = f"it stores {' and '.join(kinds)} weights only" if ref.kind not in kinds else why_not(ref)
        if reason is not None:
            raise ValueError(f"layout {name} cannot hold {ref.name} ({ref.kind}, {list(ref.shape)}): {reason}")
        return table[f.name]

    def row_plan(ref: WeightRef) -> dict[str, TensorInfo]:
        return plan(ref, names_of(ref))

    def row_write(
        ref: WeightRef, q: QuantizedTensor, *, expert: int | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        names = names_of(replace(ref, format=ref.format or q.format))
        check_weight(ref, q, expert, tuple(formats), name)
        if input_scale is not None and names.input_scale is None:
            raise ValueError(
                f"{ref.name}: {q.format} activations are scaled dynamically; there is no input_scale to store"
            )
        return write(ref, q, names, expert, input_scale)

    def row_read(ref: WeightRef, get: Get, *, expert: int | None = None) -> QuantizedTensor:
        return read(ref, get, names_of(ref), expert)

    def row_read_input_scale(ref: WeightRef, get: Get, *, expert: int | None = None) -> Tensor | None:
        return read_input_scale(ref, get, names_of(ref), expert)

    return Layout(
        name=name,
        formats=tuple(formats),
        kinds=tuple(kinds),
        activations=tuple(activations),
        detect=detect,
        refs=refs,
        plan=row_plan,
        write=row_write,
        read=row_read,
        read_input_scale=row_read_input_scale,
        config=config,
    )
