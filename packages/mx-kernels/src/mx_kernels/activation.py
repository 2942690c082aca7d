"""Activations as an operation of their own, fused with the quantization of their result.

The formulas are those of ``Activation``; in float32, with one rounding at the end. Letters: I output width.
Kernel: ``kernels.activation.activate``, with the op's arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import (
    bytes_of,
    check_float,
    check_last_stride,
    check_type,
    direct,
    flat_activation,
    has_triton,
    kernels,
    requantized,
    whole_activation,
)
from .epilogue import Activation
from .formats import Format, ScaleRule, get_format
from .quantize import quantize
from .tensor import QuantizedTensor


def _activate(
    h: Tensor,
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    activation = whole_activation(act, act_layout, gated, alpha, beta, limit)
    assert activation is not None
    if not requantize:
        out = reference.activated(h.float(), activation).to(out_dtype)
        return (out.clone() if out is h else out), h.new_empty((0,), dtype=torch.uint8)
    q = reference.activate(h, activation, requantize_to=get_format(requantize), rule=rule)
    assert isinstance(q, QuantizedTensor)
    return bytes_of(q.data), bytes_of(q.scale)


activate_op = torch.library.custom_op(
    "mx_kernels::activate",
    _activate,
    mutates_args=(),
    schema="(Tensor h, str act, str act_layout, bool gated, float alpha, float beta, float limit, "
    "str requantize, str rule, ScalarType out_dtype) -> (Tensor, Tensor)",
)


@activate_op.register_kernel(("cuda", "xpu"))
def _(h: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    if not has_triton():
        return _activate(h, *args)  # type: ignore[arg-type]
    result: tuple[Tensor, Tensor] = kernels("activation").activate(h, *args)
    return result


@activate_op.register_fake
def _(
    h: Tensor,
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return fake_result(h, (*h.shape[:-1], h.shape[-1] // 2 if gated else h.shape[-1]), requantize, out_dtype)


def fake_result(like: Tensor, shape: tuple[int, ...], requantize: str, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What an op with an optional requantization returns for an output of that shape: (codes or values, scales)."""
    if not requantize:
        return like.new_empty(shape, dtype=out_dtype), like.new_empty((0,), dtype=torch.uint8)
    f = get_format(requantize)
    data = like.new_empty((*shape[:-1], f.data_width(shape[-1])), dtype=torch.uint8)
    return data, like.new_empty((*shape[:-1], shape[-1] // f.block), dtype=torch.uint8)


def activate(
    h: Tensor,  # [..., 2I], or [..., I] not gated
    activation: Activation,
    *,
    requantize_to: Format | str | None = None,
    rule: ScaleRule | str | None = None,
) -> Tensor | QuantizedTensor:  # [..., I]
    """Apply an activation in float32, then round once to h's dtype or quantize.

    h: float32, bf16 or fp16. requantize_to: the result is a QuantizedTensor of that format whose dtype is h's; I must be a
    multiple of its block. The values are quantized from float32, not from h's dtype. NVFP4's global scale is computed from
    the result, which takes a second pass.

    Raises ValueError for an odd gated width, for I off the block and for strides, TypeError for dtypes.
    """
    check_float(h, "h")
    check_type(activation, Activation, "activation", 'Activation("silu") is one')
    if h.ndim < 1:
        raise ValueError("h has no dimensions, needs at least one, the features: reshape it to [1, 2I]")
    check_last_stride(h, "h")
    width = activation.out_features(h.shape[-1])
    f = None if requantize_to is None else get_format(requantize_to)
    if f is None and rule is not None:
        raise ValueError(
            f"rule is {rule!r} without requantize_to: a scale rule needs a format, name it or leave the rule out"
        )
    if f is not None:
        f.check_k(width, "the activation's output width")
        rule = f.check_rule(rule)
    two_pass = f is not None and f.has_global_scale
    dtype = torch.float32 if two_pass else h.dtype
    fused = "" if f is None or two_pass else f.name
    h = h.contiguous()
    args = (*flat_activation(activation), fused, str(rule or ""), dtype)
    data: Tensor
    data, scale = (kernels("activation").activate if direct(h) else activate_op)(h, *args)
    if f is None:
        return data
    if two_pass:
        q = quantize(data, f, rule=rule)
        return QuantizedTensor(q.data, q.scale, f, q.rule, h.dtype, q.global_scale)
    return requantized(data, scale, f.name, rule, h.dtype)
