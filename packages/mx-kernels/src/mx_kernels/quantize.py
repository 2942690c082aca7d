"""Quantize, dequantize, and both at once, along the last dimension.

    x [..., K] -> codes [..., K] and one scale per block [..., K / block];  x ~ decode(code) * scale * global_scale

The formulas, and what becomes of NaN, Inf and zero, are in ``mx_kernels.reference`` (quantize.py there). Every path returns
the same bits: the reference, the CPU path (``cpu.py``) and the Triton kernels.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import (
    bytes_of,
    check_device,
    check_float,
    check_float32,
    check_last_stride,
    direct,
    direct_on_cpu,
    has_triton,
)
from .formats import Format, ScaleRule, get_format
from .tensor import QuantizedTensor


def quantize(
    x: Tensor,  # [..., K]
    format: Format | str,
    *,
    rule: ScaleRule | str | None = None,
    global_scale: Tensor | None = None,  # [] or a prefix of the leading dimensions
) -> QuantizedTensor:
    """Quantize x [..., K] (bf16, fp16 or fp32; K contiguous, rows may be strided) to ``format``.

    rule: how block scales follow from the blocks (``ScaleRule``); None is the format's default. SEARCH and FOUR_OVER_SIX try
        several scales a block and are meant for offline use.
    global_scale: NVFP4 only, float32, in [2^-117, 2^117]. None computes ``compute_global_scale(x)``: one per matrix [N, K].

    Magnitudes above the largest one saturate. A NaN makes its whole block NaN; an infinity becomes its block's largest value.
    Raises TypeError for dtypes; ValueError for shapes, strides, rules and (on the CPU) values of ``global_scale``.
    """
    f, rule, global_scale = _checked(x, format, rule, global_scale)
    run = _run("quantize", _quantize, x, global_scale)
    data, scale = run(x, f.name, rule.value, global_scale)
    return QuantizedTensor(data.view(f.data_dtype), scale.view(f.scale_dtype), f, rule, x.dtype, global_scale)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values of ``q`` [..., K] as bf16, fp16 or fp32 (None: ``q.dtype``), computed in float32 and rounded once."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q is {type(q).__name__}, needs a QuantizedTensor: quantize() makes one")
    dtype = q.dtype if dtype is None else dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"dtype is {dtype}, needs bfloat16, float16 or float32: cast the result to others yourself")
    check_last_stride(q.data, "data")
    check_last_stride(q.scale, "scale")
    args = (bytes_of(q.data), bytes_of(q.scale), q.global_scale, q.format.name, dtype)
    run = _run("dequantize", _dequantize, *args[:3])
    out: Tensor = run(*args)
    return out


def quantize_dequantize(
    x: Tensor,  # [..., K]
    format: Format | str,
    *,
    rule: ScaleRule | str | None = None,
    global_scale: Tensor | None = None,  # [] or a prefix of the leading dimensions
) -> Tensor:
    """``dequantize(quantize(x, ...))`` in one pass: x [..., K] -> the same shape and dtype. Arguments and errors of ``quantize``."""
    f, rule, global_scale = _checked(x, format, rule, global_scale)
    run = _run("quantize_dequantize", _quantize_dequantize, x, global_scale)
    out: Tensor = run(x, f.name, rule.value, global_scale)
    return out


def compute_global_scale(x: Tensor) -> Tensor:
    """NVFP4's global scale of x [..., N, K] (bf16, fp16 or fp32): float32 [...], one per matrix; [] for up to two dimensions.

    A / 2688 (= 448 * 6) where A is the matrix's largest finite magnitude; 1 where A is 0.
    """
    check_float(x, "x")
    out: Tensor = _run("compute_global_scale", _compute_global_scale, x)(x)
    return out


def _kernels() -> Any:
    return importlib.import_module("mx_kernels.kernels.quantize")


def _run(name: str, op: Any, *tensors: Tensor | None) -> Any:
    """The device's own function where nothing traces, else the op."""
    if direct(*tensors):
        return getattr(_kernels(), name)
    return _ON_CPU[name] if direct_on_cpu(*tensors) else op


def _checked(
    x: Tensor, format: Format | str, rule: ScaleRule | str | None, global_scale: Tensor | None
) -> tuple[Format, ScaleRule, Tensor | None]:
    """What both functions do with their arguments first: check them, and compute a global scale where one is needed."""
    f = get_format(format)
    rule = f.check_rule(rule)
    _check_input(x, f)
    if f.has_global_scale and global_scale is None:
        global_scale = compute_global_scale(x)
    _check_global_scale(global_scale, f, x.ndim, x.shape, x.device)
    return f, rule, global_scale


def _check_input(x: Tensor, f: Format) -> None:
    check_float(x, "x")
    if x.ndim == 0:
        raise ValueError("x has no dimensions, needs at least one, K: reshape it to [1, K]")
    f.check_k(x.shape[-1], "the last dimension of x")
    check_last_stride(x, "x")


def _check_global_scale(g: Tensor | None, f: Format, ndim: int, shape: torch.Size, device: torch.device) -> None:
    if g is None:
        return
    if not f.has_global_scale:
        raise ValueError(f"{f} has no global scale, but one was given: pass global_scale=None")
    check_float32(g, "global_scale")
    if g.ndim > max(0, ndim - 2) or g.shape != shape[: g.ndim]:
        raise ValueError(
            f"global_scale has shape {tuple(g.shape)}, needs [] or a prefix of x's leading dimensions {tuple(shape[:-2])}"
        )
    check_device(g, device, "global_scale", "x")


def _check_global_values(g: Tensor | None) -> None:
    """On the CPU only: an accelerator would have to wait for the answer."""
    if g is None:
        return
    fits = (g >= reference.GLOBAL_MIN) & (g <= reference.GLOBAL_MAX)
    if not bool(fits.all()):
        value = float(g[~fits][0]) if g.ndim else float(g)
        raise ValueError(
            f"global_scale is {value}, needs a multiplier in [2^-117, 2^117]: pass amax / 2688, "
            "or None to have it computed (a divisor, as some checkpoints store it, must be inverted first)"
        )


# --- custom ops: the reference anywhere, Triton on cuda and xpu ---


@torch.library.custom_op("mx_kernels::quantize", mutates_args=())
def _quantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = reference.quantize_codes(x, format, rule, global_scale)
    return reference.pack_codes(codes, format).contiguous(), scale


@torch.library.custom_op("mx_kernels::dequantize", mutates_args=())
def _dequantize(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    return reference.dequantize_parts(data, scale, global_scale, format).to(dtype)


@torch.library.custom_op("mx_kernels::quantize_dequantize", mutates_args=())
def _quantize_dequantize(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Tensor:
    data, scale = _quantize(x, format, rule, global_scale)
    out: Tensor = _dequantize(data, scale, global_scale, format, x.dtype)
    return out


@torch.library.custom_op("mx_kernels::compute_global_scale", mutates_args=())
def _compute_global_scale(x: Tensor) -> Tensor:
    return reference.compute_global_scale(x)


@_quantize.register_kernel("cpu")
def _quantize_on_cpu(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_global_values(global_scale)
    return cpu.quantize(x, format, rule, global_scale)


@_quantize_dequantize.register_kernel("cpu")
def _quantize_dequantize_on_cpu(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Tensor:
    data, scale = _quantize_on_cpu(x, format, rule, global_scale)
    return cpu.dequantize(data, scale, global_scale, format, x.dtype)


_compute_global_scale.register_kernel("cpu", cpu.compute_global_scale)
_dequantize.register_kernel("cpu", cpu.dequantize)
_ON_CPU = {
    "quantize": _quantize_on_cpu,
    "dequantize": cpu.dequantize,
    "quantize_dequantize": _quantize_dequantize_on_cpu,
    "compute_global_scale": cpu.compute_global_scale,
}


if has_triton():

    @_quantize.register_kernel(("cuda", "xpu"))
    def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Any:
        return _kernels().quantize(x, format, rule, global_scale)

    @_dequantize.register_kernel(("cuda", "xpu"))
    def _(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Any:
        return _kernels().dequantize(data, scale, global_scale, format, dtype)

    @_quantize_dequantize.register_kernel(("cuda", "xpu"))
    def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Any:
        return _kernels().quantize_dequantize(x, format, rule, global_scale)

    @_compute_global_scale.register_kernel(("cuda", "xpu"))
    def _(x: Tensor) -> Any:
        return _kernels().compute_global_scale(x)


@_quantize.register_fake
def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    f = get_format(format)
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*lead, f.data_width(k)), dtype=torch.uint8),
        x.new_empty((*lead, k // f.block), dtype=torch.uint8),
    )


@_dequantize.register_fake
def _(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    return data.new_empty((*scale.shape[:-1], scale.shape[-1] * get_format(format).block), dtype=dtype)


@_quantize_dequantize.register_fake
def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_compute_global_scale.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[: max(0, x.ndim - 2)], dtype=torch.float32)
