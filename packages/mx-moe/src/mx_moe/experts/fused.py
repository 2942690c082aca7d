"""Fused experts: weights stay quantized in memory and are upcast in the registers of the GEMM, exactly.

Inputs stay in 16 bits, or are quantized and dequantized again where the scheme asks for it. At construction the weights are
put into the kernels' private order (``mx_kernels.pack``, invertible); the canonical tensors are released with the last
reference to them, and ``weights`` makes them again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import mx_kernels as mk
import mx_quant as mq
from mx_kernels import Activation, QuantizedTensor
from mx_quant import ExpertWeights

from ..routing import Routing
from .base import ExpertsBase, Weights, triton_reason
from .problem import EVERY_FORMAT, Capability, Problem


class FusedExperts(ExpertsBase):
    """16-bit (or quantized and dequantized) inputs x weights upcast in registers."""

    name = "fused"
    capability = Capability(
        weights=(*EVERY_FORMAT, "bfloat16", "float16"),
        dtypes=(torch.bfloat16, torch.float16),
    )
    pair_dtype = None

    @classmethod
    def why_not(cls, device: mk.Device, problem: Problem) -> str | None:
        """Needs an accelerator with Triton and its 16-bit matrix instructions."""
        reason = triton_reason(device, "fused upcasts weights in the registers of a Triton kernel")
        if reason is not None:
            return reason
        if problem.dtype == torch.bfloat16 and not device.arch.bf16:
            return f"{device} has no bfloat16 matrix instructions: use float16"
        if problem.weight == "float16" and problem.dtype != torch.float16:
            return f"float16 weights need x in float16, not {str(problem.dtype).removeprefix('torch.')}"
        return cls.capability.why_not(problem)

    def _bind(self, weights: ExpertWeights) -> None:
        w13, bias = concatenated(weights, self.activation)  # the packing brings gate and up together by itself
        self.activation = replace(self.activation, layout="concatenated")
        self._w13 = mk.pack(w13, gated=self.activation.gated)
        self._w2 = mk.pack(weights.w2)
        self._w13_bias, self._w2_bias = bias, weights.w2_bias
        self._layer = mk.PackedLayer(
            *(self._w13, self._w2, self.activation, self._w13_bias, self._w2_bias, self.expert_map),
            inputs=self.inputs.requantize(),
        )
        self._input_format_and_scales = weights.input_format, weights.w13_input_scale, weights.w2_input_scale

    def _forward(self, x: Tensor, routing: Routing) -> Tensor:  # [T, H] -> [T, H]
        """All launches at once where nothing but the layer itself is to be done, else the five steps: also for inputs in NVFP4, whose
        global scales are no part of it."""
        out = None
        if self.inputs.format is self._layer.inputs and not self.router_weight_on_input:
            out = self._layer.launch(x, routing.ids, routing.weights)
        return super()._forward(x, routing) if out is None else out

    @property
    def weights(self) -> ExpertWeights:
        """The canonical weights, made again from the packing (a copy)."""
        return ExpertWeights(
            self._w13.unpack(),
            self._w2.unpack(),
            self._w13_bias,
            self._w2_bias,
            *self._input_format_and_scales,
        )

    def update_weights(self, weights: ExpertWeights) -> None:
        """Pack new canonical weights into the memory of the old ones, for captured graphs; ValueError unless they fit."""
        if weights.format is not self._w13.format or weights.w13.shape != self._w13.shape:
            raise ValueError(
                f"cannot write {weights} over experts packed as {self!r}: both need one format and one shape"
            )
        packed = (mk.pack(weights.w13, gated=self.activation.gated), mk.pack(weights.w2))
        pairs = [*zip((self._w13, self._w2), packed, strict=True)]
        for name in ("data", "scale", "alpha", "shift", "global_scale"):
            for old, new in pairs:
                if (getattr(old, name) is None) != (getattr(new, name) is None):
                    raise ValueError(f"the new weights are packed with another {name}: make new experts from them")
        for old, new in pairs:
            for name in ("data", "scale", "alpha", "shift", "global_scale"):
                if getattr(old, name) is not None:
                    getattr(old, name).copy_(getattr(new, name))
        for mine, given in ((self._w13_bias, weights.w13_bias), (self._w2_bias, weights.w2_bias)):
            if mine is not None and given is not None:
                mine.copy_(given)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, padding included."""
        return int(self._w13.nbytes + self._w2.nbytes)

    def _operands(self, routing: Routing, dtype: torch.dtype) -> Weights:
        return Weights(
            lambda: self._w13, lambda: self._w2, self.num_experts, self._w13_bias, self._w2_bias, self.expert_map
        )


def concatenated(
    weights: ExpertWeights, activation: Activation
) -> tuple[Tensor | QuantizedTensor, Tensor | None]:  # [E, 2I, H], [E, 2I]
    """w13 and its bias with gate and up as two halves, whatever the activation's layout is."""
    w13, bias = weights.w13, weights.w13_bias
    if activation.layout == "concatenated":
        return w13, bias
    if isinstance(w13, QuantizedTensor):
        w13 = w13.map(lambda t: mq.deinterleave(t, 1) if t.ndim > 1 else t)
    else:
        w13 = mq.deinterleave(w13, 1)
    return w13, None if bias is None else mq.deinterleave(bias, 1)
