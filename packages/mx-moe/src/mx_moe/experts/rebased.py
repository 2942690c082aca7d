"""Re-based experts: MXFP8 inputs x MXFP8, MXFP6 or MXFP4 weights on Hopper's FP8 matrix units, which know no block scales.

The block scales of a weight row, and of a token, are folded into its E4M3 codes under one power of two (``mx_kernels.rebase``).
That changes codes that become subnormal, so it is never chosen by itself: ask for ``backend="rebased"``. ``exactness`` says what
it did to the weights; ``experts.promote = True`` adds up in float32 what the matrix unit keeps about 14 bits of.

    tiles = align(ids); x -> rebase_rows, gathered; GEMM 1, activation, to MXFP8; rebase_rows; GEMM 2 x routing weight; combine
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Epilogue, QuantizedTensor
from mx_quant import ExpertWeights

from ..routing import Routing
from .base import ExpertsBase, triton_reason, weighted_input
from .fused import concatenated
from .problem import Capability, Problem

OPT_IN = "opt-in: it changes small codes (backend='rebased'; the weights' share is stated in .exactness)"


class RebasedExperts(ExpertsBase):
    """MXFP8 inputs x re-based weights. Holds E4M3 codes, one byte a weight, also for MXFP6; MXFP4 keeps its four bits.

    promote: sums stay in the matrix unit, which keeps about 14 bits (default); with ``experts.promote = True`` they are added up in
        float32 every 128 along K, which takes longer.
    """

    name = "rebased"
    capability = Capability(
        weights=tuple(f.name for f in mk.REBASED_FORMATS),
        inputs=("mxfp8_e4m3",),
        kinds=mk.REBASED_ACTIVATIONS,
        gated=(True,),
        features=("bias", "expert_map", "router_weight_on_input", "shared_experts"),
        dtypes=(torch.bfloat16, torch.float16),
    )
    promote: bool = False

    @classmethod
    def why_not(cls, device: mk.Device, problem: Problem) -> str | None:
        """Needs FP8 matrix units and no block scales in hardware: sm90."""
        if device.arch.name != "sm90":
            return f"it is made for sm90, whose FP8 matrix units have no block scales; this is {device}"
        reason = triton_reason(device, "it runs in a Triton kernel")
        return reason or cls.capability.why_not(problem)

    @classmethod
    def auto_inputs(cls, weight: str) -> str | None:
        """MXFP8 E4M3, whatever the weights are."""
        return "mxfp8_e4m3"

    def _bind(self, weights: ExpertWeights) -> None:
        w13, bias = concatenated(weights, self.activation)
        assert isinstance(w13, QuantizedTensor)
        assert isinstance(weights.w2, QuantizedTensor)
        self.activation = replace(self.activation, layout="concatenated")
        self._w13, self._w2 = mk.rebase(w13, gated=True), mk.rebase(weights.w2)
        # a copy, as the layer's is: whoever changes the given one must not see it in one of them only
        self._w13_bias, self._w2_bias = None if bias is None else bias.clone(), weights.w2_bias
        self._layer = mk.RebasedLayer(
            self._w13, self._w2, self.activation, self._w13_bias, self._w2_bias, self.expert_map
        )

    @property
    def weights(self) -> ExpertWeights:
        """Not kept: re-basing may have changed codes, so the canonical weights cannot be made again."""
        raise mk.Unsupported(
            "re-based experts do not keep the canonical weights: keep the ExpertWeights they were made from"
        )

    def update_weights(self, weights: ExpertWeights) -> None:
        """Not possible: what re-basing did to the old ones is stated in ``exactness``."""
        raise mk.Unsupported("re-based experts take no new weights: make new experts from them")

    @property
    def nbytes(self) -> int:
        """Bytes of the re-based weights."""
        return self._w13.nbytes + self._w2.nbytes

    @property
    def exactness(self) -> dict[str, dict[str, float]]:
        """Share of the weights that changed, and their relative error, of both GEMMs."""
        return {name: {"changed": w.changed, "error": w.error} for name, w in (("w13", self._w13), ("w2", self._w2))}

    def _forward(self, x: Tensor, routing: Routing) -> Tensor:  # [T, H] -> [T, H]
        """All launches at once where nothing but the layer itself is to be done, else the five steps."""
        if not self.router_weight_on_input:
            out = self._layer.launch(x, routing.ids, routing.weights, promote=self.promote)
            if out is not None:
                return out
        weight: Tensor | None = routing.weights.reshape(-1)
        if self.router_weight_on_input:
            x, weight = weighted_input(x, routing), None
        rows = mk.rebased_block_size(routing.ids.numel(), self._w13, self.promote)
        tiles = mk.moe_align_block_size(routing.ids, rows, self.num_experts, self.expert_map, sort=True)
        h = mk.grouped_gemm_rebased(
            mk.rebase_rows(x, tiles, top_k=routing.top_k),
            self._w13,
            tiles,
            epilogue=Epilogue(self._w13_bias, self.activation, requantize_to=mk.MXFP8),
            promote=self.promote,
        )
        y = mk.grouped_gemm_rebased(
            mk.rebase_rows(h, tiles),
            self._w2,
            tiles,
            epilogue=Epilogue(self._w2_bias, row_weight=weight),
            scatter=True,
            promote=self.promote,
            out_dtype=x.dtype,
        )
        assert isinstance(y, Tensor)
        return mk.combine(y, tiles, out_dtype=x.dtype)
