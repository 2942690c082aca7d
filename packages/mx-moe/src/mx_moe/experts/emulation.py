"""Emulation: the weights of the experts that were hit are dequantized first, then a plain grouped GEMM runs. Any device.

On the CPU experts that no token goes to are never dequantized. An accelerator is not waited for, so the host knows no more than
P = T * k: with P < E, P rows are dequantized, those of the experts that were hit (places left over repeat one of them); with
P >= E all E are. Slower than a native or fused path, which it says once.
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
        if rows is None:
            return Weights(
                lambda: _plain(w.w13, None, dtype),
                lambda: _plain(w.w2, None, dtype),
                self.num_experts,
                w.w13_bias,
                w.w2_bias,
                self.expert_map,
            )
        return Weights(
            lambda: _plain(w.w13, rows, dtype),
            lambda: _plain(w.w2, rows, dtype),
            rows.shape[0],
            None if w.w13_bias is None else w.w13_bias[rows],
            None if w.w2_bias is None else w.w2_bias[rows],
            table,
        )


def _plain(w: Tensor | QuantizedTensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:  # [E, N, K] -> [R, N, K]
    """Experts ``rows`` (None: all) in ``dtype``: a dequantized value is rounded to it once, from float32."""
    assert isinstance(w, QuantizedTensor)
    return mk.dequantize(w if rows is None else w.map(lambda t: _select(t, rows)), dtype)


def _select(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of dimension 0, as bytes: FP8 has no index_select on every device."""
    return t.view(torch.uint8).index_select(0, rows).view(t.dtype) if t.element_size() == 1 else t.index_select(0, rows)


def hit_experts(
    ids: Tensor,  # [T, k]
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
) -> tuple[Tensor | None, Tensor | None]:
    """(rows [R] int64: experts that a pair goes to, each once; table [E_global] int32: id -> place in ``rows``, else -1).

    (None, None): take all E rows as they are. On the CPU, where every expert was hit; R is otherwise the number of hit ones (1,
    if there is none). While tracing and on accelerators, with T * k >= E; R is otherwise T * k, and places past the last hit
    expert repeat the first.
    """
    device, total = ids.device, num_experts if expert_map is None else expert_map.shape[0]
    known = device.type == "cpu" and not torch.compiler.is_compiling()
    if not known and ids.numel() >= num_experts:
        return None, None
    flat = ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < total), flat, total)
    seen = torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill(0, flat, True)[:total]
    if expert_map is None:
        hit = seen
    else:
        local = torch.where(seen & (expert_map >= 0), expert_map.long(), num_experts)
        hit = torch.zeros(num_experts + 1, dtype=torch.bool, device=device).index_fill(0, local, True)[:num_experts]
    place = torch.where(hit, hit.cumsum(0) - 1, -1).to(torch.int32)
    if known:
        rows = hit.nonzero().flatten()
        if rows.numel() == num_experts:
            return None, None
        rows = rows if rows.numel() else rows.new_zeros(1)
    else:
        order = torch.argsort(hit.to(torch.int8), descending=True, stable=True)
        slot = torch.arange(max(1, ids.numel()), device=device)
        rows = order[torch.where(slot < hit.sum(), slot, 0)]
    if expert_map is None:
        return rows, place
    return rows, torch.where(expert_map >= 0, place[expert_map.clamp(min=0).long()], -1)
