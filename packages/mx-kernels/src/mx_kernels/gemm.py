"""GEMM on plain and quantized operands: the product of a linear layer.

    out[..., n] = epilogue(sum_k x[..., k] * w[n, k])

Letters: M rows of x, N output features before the activation, K summed over. Sums are float32, the output is rounded once.
Kernel: ``kernels.generic_gemm.gemm``, with the op's arguments and results.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .activation import fake_result
from .dispatch import (
    bytes_of,
    check_device,
    check_float,
    check_float32,
    check_last_stride,
    check_out_dtype,
    check_type,
    direct,
    flat_activation,
    flat_operand,
    has_triton,
    kernels,
    requantized,
    whole_activation,
    whole_operand,
)
from .epilogue import Epilogue
from .formats import Format, get_format
from .packed_gemm import packed_product, rounds_itself
from .packing import PackedWeight
from .quantize import dequantize, quantize
from .tensor import QuantizedTensor

Operand = Tensor | QuantizedTensor

_SCHEMA = (
    "(Tensor x, Tensor? x_scale, Tensor? x_global, str x_format, Tensor w, Tensor? w_scale, Tensor? w_global, str w_format, "
    "Tensor? bias, str act, str act_layout, bool gated, float alpha, float beta, float limit, Tensor? row_weight, "
    "str requantize, str rule, ScalarType out_dtype) -> (Tensor, Tensor)"
)


def _gemm(
    x: Tensor,
    x_scale: Tensor | None,
    x_global: Tensor | None,
    x_format: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    bias: Tensor | None,
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    row_weight: Tensor | None,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [M, K], w [N, K]; x_global [] or [M] -> (values or codes [M, ..], scales or empty)."""
    if x_global is not None and x_global.ndim and x_scale is not None:  # one global scale a row: rows become matrices
        x, x_scale = x.unsqueeze(1), x_scale.unsqueeze(1)
    result = reference.gemm(
        whole_operand(x, x_scale, x_global, x_format),
        whole_operand(w, w_scale, w_global, w_format),
        epilogue=whole_epilogue(bias, (act, act_layout, gated, alpha, beta, limit), row_weight, requantize, rule),
        out_dtype=out_dtype,
        decoder=dequantize,
    )
    data, scale = flat_result(result)
    return (data, scale) if data.ndim == 2 else (data.squeeze(1), scale.squeeze(1) if scale.ndim == 3 else scale)


gemm_op = torch.library.custom_op("mx_kernels::gemm", _gemm, mutates_args=(), schema=_SCHEMA)


@gemm_op.register_kernel(("cuda", "xpu"))
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    if not has_triton():
        return _gemm(x, *args)  # type: ignore[arg-type]
    result: tuple[Tensor, Tensor] = kernels("generic_gemm").gemm(x, *args)
    return result


@gemm_op.register_fake
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    w, gated, requantize, out_dtype = args[3], args[10], args[15], args[17]
    assert isinstance(w, Tensor)
    assert isinstance(requantize, str)
    assert isinstance(out_dtype, torch.dtype)
    return fake_result(x, (x.shape[0], w.shape[0] // 2 if gated else w.shape[0]), requantize, out_dtype)


def whole_epilogue(
    bias: Tensor | None,
    activation: tuple[str, str, bool, float, float, float],
    row_weight: Tensor | None,
    requantize: str,
    rule: str,
) -> Epilogue:
    """An epilogue from an op's arguments."""
    f = get_format(requantize) if requantize else None
    return Epilogue(bias, whole_activation(*activation), row_weight, f, f.check_rule(rule) if f else None)


def flat_result(result: Operand) -> tuple[Tensor, Tensor]:
    """A result as an op returns it: (values or codes as bytes, scales as bytes or empty)."""
    if isinstance(result, QuantizedTensor):
        return bytes_of(result.data), bytes_of(result.scale)
    return result, result.new_empty((0,), dtype=torch.uint8)


def check_operand(t: Operand, name: str) -> None:
    """Raise TypeError for a dtype that cannot be multiplied, ValueError for a stride along K that is not 1."""
    if isinstance(t, QuantizedTensor):
        check_last_stride(t.data, f"{name}.data")
        check_last_stride(t.scale, f"{name}.scale")
    elif isinstance(t, Tensor):
        check_float(t, name)
        check_last_stride(t, name)
    else:
        raise TypeError(f"{name} is a {type(t).__name__}, needs a Tensor or a QuantizedTensor: quantize() makes one")


def check_product(x: Operand, w: Operand | PackedWeight) -> None:
    """Raise ValueError unless x [..., K] and w [..., N, K] agree in K and device."""
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"x has K = {x.shape[-1]} and w has K = {w.shape[-1]} ({tuple(x.shape)} and {tuple(w.shape)}): "
            "both need the same K, last; transpose what has it elsewhere"
        )
    check_device(w if isinstance(w, Tensor) else w.data, x.device, "w", "x")


def check_epilogue(epilogue: Epilogue, bias_shape: tuple[int, ...], rows: int, device: torch.device) -> Tensor | None:
    """The row weights as [rows], after every check of the epilogue (ValueError, TypeError)."""
    check_type(epilogue, Epilogue, "epilogue", "leave it out for none")
    bias, weight, f = epilogue.bias, epilogue.row_weight, epilogue.requantize_to or epilogue.round_to
    n = bias_shape[-1]
    width = n if epilogue.activation is None else epilogue.activation.out_features(n)
    if bias is not None:
        check_float(bias, "bias")
        if tuple(bias.shape) != bias_shape:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, needs {bias_shape}: one per weight row, before activation"
            )
        check_last_stride(bias, "bias")
        check_device(bias, device, "bias", "x")
    if weight is not None:
        check_float32(weight, "row_weight")
        if weight.numel() != rows:
            raise ValueError(f"row_weight has shape {tuple(weight.shape)}, needs {rows} values, one per output row")
        check_device(weight, device, "row_weight", "x")
        weight = weight.reshape(rows).contiguous()
    if f is None:
        if epilogue.rule is not None:
            raise ValueError(
                f"rule is {epilogue.rule!r} without requantize_to or round_to: a scale rule needs a format, name it or leave it out"
            )
    else:
        f.check_k(width, "the output's width")
        f.check_rule(epilogue.rule)
    return weight


def output_dtype(x: Operand, out_dtype: torch.dtype | None) -> torch.dtype:
    """``out_dtype``, by default x's; TypeError unless it is float32, bf16 or fp16."""
    dtype = out_dtype or x.dtype
    check_out_dtype(dtype)
    return dtype


def stored(q: QuantizedTensor, epilogue: Epilogue) -> Tensor | QuantizedTensor:
    """A requantized result, or its values where the epilogue wants those."""
    return dequantize(q, q.dtype) if epilogue.round_to is not None else q


def fused_format(f: Format | None) -> str:
    """The format that the kernel itself writes; NVFP4's global scale needs the whole result first, so not that one."""
    return "" if f is None or f.has_global_scale else f.name


def gemm(
    x: Operand,  # [..., K]
    w: Operand | PackedWeight,  # [N, K]
    *,
    epilogue: Epilogue = Epilogue(),  # noqa: B008
    out_dtype: torch.dtype | None = None,
) -> Tensor | QuantizedTensor:  # [..., N_out]
    """Multiply x by a weight: ``x @ w.T`` with float32 sums, then the epilogue, then one rounding.

    x: float32, bf16, fp16, or quantized. w: the same, two-dimensional. Any mix; quantized operands are decoded exactly.
    A ``PackedWeight`` (of ``pack``) gives the same values, faster where its layout suits the device.
    epilogue: bias [N], activation, row_weight (one per row of x), requantize_to or round_to. out_dtype: of the result (of what
    the quantized result stands for), by default x's. N_out is N, or N/2 after a gated activation.

    Raises ValueError for shapes, strides, devices and a requantized width off the block; TypeError for dtypes.
    """
    check_operand(x, "x")
    if not isinstance(w, PackedWeight):
        check_operand(w, "w")
    if x.ndim < 1 or w.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}, needs x [..., K] and w [N, K]")
    check_product(x, w)
    dtype = output_dtype(x, out_dtype)
    lead = x.shape[:-1]
    rows, n = lead.numel(), w.shape[0]
    row_weight = check_epilogue(epilogue, (n,), rows, x.device)
    f, rule = epilogue.requantize_to or epilogue.round_to, epilogue.rule
    if isinstance(w, PackedWeight):
        flat = x.reshape(rows, x.shape[-1]) if isinstance(x, Tensor) else dequantize(x, torch.float32).flatten(0, -2)
        whole = f is None or rounds_itself(epilogue, w)
        y = packed_product(flat, w, None, 1, epilogue, row_weight, dtype if whole else torch.float32)
        y = y.view(*lead, y.shape[-1])
        return y if whole or f is None else stored(replace(quantize(y, f, rule=rule), dtype=dtype), epilogue)
    fused = fused_format(f)
    data, scale, x_global, x_format = flat_operand(x)
    data = data.reshape(rows, data.shape[-1])
    scale = None if scale is None else scale.reshape(rows, scale.shape[-1])
    if x_global is not None and x_global.ndim:
        x_global = x_global.view(*x_global.shape, *(1,) * (len(lead) - x_global.ndim)).expand(lead).reshape(rows)
    args = (
        *(data, scale, x_global, x_format),
        *flat_operand(w),
        epilogue.bias,
        *flat_activation(epilogue.activation),
        row_weight,
        fused,
        f.check_rule(rule).value if f is not None and fused else "",
        torch.float32 if f is not None and not fused else dtype,
    )
    run = kernels("generic_gemm").gemm if direct(data, args[4], epilogue.bias, row_weight) else gemm_op
    out: Tensor
    out, out_scale = run(*args)
    out = out.view(*lead, out.shape[-1])
    if f is None:
        return out
    if not fused:
        return replace(quantize(out, f, rule=rule), dtype=dtype)
    return stored(requantized(out, out_scale.view(*lead, out_scale.shape[-1]), fused, rule, dtype), epilogue)
