"""Activation functions in plain PyTorch, in float32. The formulas are those of ``Activation``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..epilogue import Activation
from ..formats import Format, ScaleRule
from ..tensor import QuantizedTensor
from .quantize import quantize


def activated(h: Tensor, activation: Activation) -> Tensor:  # [..., 2I] -> [..., I], or [..., I] -> [..., I] not gated
    """The activation of a float32 tensor, float32, not rounded."""
    if not activation.gated:
        g, u = h, None
    elif activation.layout == "interleaved":
        g, u = h[..., 0::2], h[..., 1::2]
    else:
        g, u = h.chunk(2, dim=-1)
    limit = activation.limit
    if limit is not None:
        g = g.clamp(max=limit)
        u = None if u is None else u.clamp(-limit, limit)
    match activation.kind:
        case "silu":
            f = g * torch.sigmoid(g)
        case "swiglu_oai":
            assert u is not None
            assert activation.alpha is not None
            assert activation.beta is not None
            return g * torch.sigmoid(activation.alpha * g) * (u + activation.beta)
        case "gelu":
            f = F.gelu(g)
        case "gelu_tanh":
            f = F.gelu(g, approximate="tanh")
        case "relu2":
            f = torch.relu(g).square()
        case _:
            f = g
    return f if u is None else f * u


def activate(
    h: Tensor,  # [..., 2I], or [..., I] not gated
    activation: Activation,
    *,
    requantize_to: Format | None = None,
    rule: ScaleRule | str | None = None,
) -> Tensor | QuantizedTensor:  # [..., I]
    """Activation and its one rounding; see ``mx_kernels.activate``."""
    out = activated(h.float(), activation)
    if requantize_to is None:
        return out.to(h.dtype)
    q = quantize(out.contiguous(), requantize_to, rule=rule)
    return QuantizedTensor(q.data, q.scale, q.format, q.rule, h.dtype, q.global_scale)
