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


def dequantize(
    q: QuantizedTensor,
    dtype: torch.dtype | None = None,
    *,
    rows: Tensor | None = None,  # [R]
) -> Tensor:
    """The values of ``q`` [..., K] as bf16, fp16 or fp32 (None: ``q.dtype``), computed in float32 and rounded once.

    rows: int32 or int64; of q [E, ..., K] these E-th parts alone are read, and the result is [R, ..., K]. For a negative one nothing
    is, and its place holds anything: so a number of parts that only the device knows takes no more time than they do.

    Raises TypeError for dtypes; ValueError for strides, for ``rows`` that are no vector on q's device, and on the CPU past E.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q is {type(q).__name__}, needs a QuantizedTensor: quantize() makes one")
    dtype = q.dtype if dtype is None else dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"dtype is {dtype}, needs bfloat16, float16 or float32: cast the result to others yourself")
    check_last_stride(q.data, "data")
    check_last_stride(q.scale, "scale")
    if rows is not None:
        _check_rows(rows, q)
    args = (bytes_of(q.data), bytes_of(q.scale), q.global_scale, q.format.name, dtype, rows)
    run = _run("dequantize", _dequantize, *args[:3], rows)
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


def _kernels(name: str = "quantize") -> Any:
    return importlib.import_module(f"mx_kernels.kernels.{name}")


def _run(name: str, op: Any, *tensors: Tensor | None) -> Any:
    """The device's own function where nothing traces, else the op."""
    if direct(*tensors):
        return getattr(_kernels("global_scale" if name == "compute_global_scale" else "quantize"), name)
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


def _check_rows(rows: Tensor, q: QuantizedTensor) -> None:
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows is {rows.dtype}, needs int32 or int64")
    if rows.ndim != 1 or q.ndim < 2:
        raise ValueError(f"rows has shape {tuple(rows.shape)} and q {tuple(q.shape)}, needs rows [R] and q [E, ..., K]")
    check_device(rows, q.device, "rows", "q")


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
def _dequantize(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    return reference.dequantize_parts(*_selected(data, scale, global_scale, rows), format).to(dtype)


def _selected(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """These rows of dimension 0; of a negative one the first."""
    if rows is None:
        return data, scale, global_scale
    rows = rows.clamp(min=0)
    g = global_scale if global_scale is None or global_scale.ndim == 0 else global_scale.index_select(0, rows)
    return data.index_select(0, rows), scale.index_select(0, rows), g


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


@_dequantize.register_kernel("cpu")
def _dequantize_on_cpu(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    if rows is not None and rows.numel() and int(rows.max()) >= data.shape[0]:
        raise ValueError(f"rows holds {int(rows.max())}, but q has {data.shape[0]} of them, from 0 on")
    return cpu.dequantize(*_selected(data, scale, global_scale, rows), format, dtype)


_ON_CPU = {
    "quantize": _quantize_on_cpu,
    "dequantize": _dequantize_on_cpu,
    "quantize_dequantize": _quantize_dequantize_on_cpu,
    "compute_global_scale": cpu.compute_global_scale,
}


if has_triton():

    @_quantize.register_kernel(("cuda", "xpu"))
    def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Any:
        return _kernels().quantize(x, format, rule, global_scale)

    @_dequantize.register_kernel(("cuda", "xpu"))
    def _(data: Tensor, *args: Any) -> Any:
        return _kernels().dequantize(data, *args)

    @_quantize_dequantize.register_kernel(("cuda", "xpu"))
    def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Any:
        return _kernels().quantize_dequantize(x, format, rule, global_scale)

    @_compute_global_scale.register_kernel(("cuda", "xpu"))
    def _(x: Tensor) -> Any:
        return _kernels("global_scale").compute_global_scale(x)


@_quantize.register_fake
def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    f = get_format(format)
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*lead, f.data_width(k)), dtype=torch.uint8),
        x.new_empty((*lead, k // f.block), dtype=torch.uint8),
    )


@_dequantize.register_fake
def _(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    lead = scale.shape[:-1] if rows is None else (rows.shape[0], *scale.shape[1:-1])
    return data.new_empty((*lead, scale.shape[-1] * get_format(format).block), dtype=dtype)


@_quantize_dequantize.register_fake
def _(x: Tensor, format: str, rule: str, global_scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_compute_global_scale.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[: max(0, x.ndim - 2)], dtype=torch.float32)
