"""Emulation: the weights of the experts that were hit are dequantized first, then a plain grouped GEMM runs. Any device.

Experts that no token goes to are never dequantized. On the CPU the host knows which they are. An accelerator is not waited for: a
vector on the device says which experts to decode, and its places that no expert needs are passed over there. R = min(P, E) of
P = T * k pairs are enough places. Slower than a native or fused path, which it says once.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import QuantizedTensor
from mx_quant import ExpertWeights

from ..routing import Routing
from .base import ExpertsBase, Weights, warn_once
from .problem import Capability


class EmulationExperts(ExpertsBase):
    """Dequantized weights x inputs in 16 bits (or quantized and dequantized)."""

    name = "emulation"
    capability = Capability()

    def _bind(self, weights: ExpertWeights) -> None:
        super()._bind(weights)
        w = weights.w13
        if isinstance(w, QuantizedTensor):
            why = "; ".join(f"{name}: {reason}" for name, reason in self.choice.rejected) or "asked for by name"
            warn_once(
                f"emulation on {self.device.type}",
                "emulated experts dequantize their weights in every forward, which is slower than a native or fused path "
                f"({why})",
            )

    def _operands(self, routing: Routing, dtype: torch.dtype) -> Weights:
        w = self._weights
        if not isinstance(w.w13, QuantizedTensor):
            return super()._operands(routing, dtype)
        rows, table = hit_experts(routing.ids, self.num_experts, self.expert_map)
        return Weights(
            lambda: _plain(w.w13, rows, dtype),
            lambda: _plain(w.w2, rows, dtype),
            self.num_experts if rows is None else rows.shape[0],
            _of_rows(w.w13_bias, rows, self.num_experts),
            _of_rows(w.w2_bias, rows, self.num_experts),
            table,
        )


def _plain(w: Tensor | QuantizedTensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:  # [E, N, K] -> [R, N, K]
    """Experts ``rows`` (None: all) in ``dtype``: a dequantized value is rounded to it once, from float32."""
    assert isinstance(w, QuantizedTensor)
    return mk.dequantize(w, dtype, rows=rows)


def _of_rows(bias: Tensor | None, rows: Tensor | None, num_experts: int) -> Tensor | None:  # [E, N] -> [R, N]
    """The biases of ``rows``; all of them where each expert has its own place."""
    if bias is None or rows is None or rows.shape[0] == num_experts:
        return bias
    return bias.index_select(0, rows.clamp(min=0))


def hit_experts(
    ids: Tensor,  # [T, k]
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
) -> tuple[Tensor | None, Tensor | None]:
    """(rows [R] int64: the expert of each place, -1 where it is not needed; table [E_global] int32: id -> place, else -1).

    rows None: all E experts, each in its own place. table None: an id is its place.
    The CPU reads the ids: R is the number of experts that were hit (1 if there is none), or rows is None where all were. While
    tracing and on accelerators R = min(max(1, T * k), E); with R = E each expert that was hit has its own place.
    """
    device, total = ids.device, num_experts if expert_map is None else expert_map.shape[0]
    flat = ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < total), flat, total)
    seen = torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill(0, flat, True)[:total]
    if expert_map is None:
        hit = seen
    else:
        local = torch.where(seen & (expert_map >= 0), expert_map.long(), num_experts)
        hit = torch.zeros(num_experts + 1, dtype=torch.bool, device=device).index_fill(0, local, True)[:num_experts]
    known = device.type == "cpu" and not torch.compiler.is_compiling()
    experts = torch.arange(num_experts, device=device)
    if not known and ids.numel() >= num_experts:
        return torch.where(hit, experts, -1), expert_map
    place = torch.where(hit, hit.cumsum(0) - 1, -1)
    if known:
        rows = hit.nonzero().flatten()
        if rows.numel() == num_experts:
            return None, expert_map
        rows = rows if rows.numel() else rows.new_zeros(1)
    else:
        places = max(1, ids.numel())
        rows = torch.full((places + 1,), -1, device=device).scatter(0, torch.where(hit, place, places), experts)[
            :places
        ]
    place = place.to(torch.int32)
    if expert_map is None:
        return rows, place
    return rows, torch.where(expert_map >= 0, place[expert_map.clamp(min=0).long()], -1)
