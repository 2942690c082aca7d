"""MoE: router, routed experts and shared experts as one module.

    out = experts(x, Router(x W_router^T + b)) + sigmoid(x W_gate^T) * shared(x)        the gate is optional

x [..., H], W_router [E, H]. Sources: DeepSeekMoE (arXiv 2401.06066, section 3: shared experts), Qwen2-MoE (the shared gate).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .experts.base import Experts
from .routing import Router, Routing


class MoE(nn.Module):
    """A Mixture-of-Experts layer on experts of any backend.

    router_weight: [E, H], router_bias: [E] or None; logits are computed in ``router_dtype`` (default: float32, as DeepSeek does;
        torch.bfloat16 repeats models that compute them in bf16).
    router: how experts are chosen; its correction_bias becomes a buffer of the module.
    experts: what ``make_experts`` returns. shared: any module [T, H] -> [T, H], added to the routed experts.
    shared_gate: [1, H] or [H, H]; the shared output is multiplied by sigmoid(x shared_gate^T).

    Raises ValueError for shapes that do not fit each other.
    """

    correction_bias: Tensor | None
    router_bias: Tensor | None
    shared_gate: Tensor | None

    def __init__(
        self,
        router_weight: Tensor,  # [E, H]
        router: Router,
        experts: Experts,
        *,
        router_bias: Tensor | None = None,  # [E]
        router_dtype: torch.dtype = torch.float32,
        shared: nn.Module | None = None,
        shared_gate: Tensor | None = None,  # [1, H] or [H, H]
    ) -> None:
        super().__init__()
        if router_weight.ndim != 2:
            raise ValueError(f"router_weight has shape {tuple(router_weight.shape)}, needs [E, H]")
        e, h = router_weight.shape
        self._check_experts(experts, e, h, router.shared_experts)
        if router_bias is not None and tuple(router_bias.shape) != (e,):
            raise ValueError(f"router_bias has shape {tuple(router_bias.shape)}, needs [{e}]")
        if router.correction_bias is not None and tuple(router.correction_bias.shape) != (e,):
            raise ValueError(f"correction_bias has shape {tuple(router.correction_bias.shape)}, needs [{e}]")
        if shared_gate is not None:
            if shared is None:
                raise ValueError("shared_gate is given without shared: there is nothing to gate")
            if shared_gate.ndim != 2 or shared_gate.shape[0] not in (1, h) or shared_gate.shape[1] != h:
                raise ValueError(f"shared_gate has shape {tuple(shared_gate.shape)}, needs [1, {h}] or [{h}, {h}]")
        self.router_weight = nn.Parameter(router_weight.detach(), requires_grad=False)
        self.register_buffer("router_bias", None if router_bias is None else router_bias.detach())
        self.register_buffer("correction_bias", router.correction_bias)
        self.register_buffer("shared_gate", None if shared_gate is None else shared_gate.detach())
        self.router = router
        self.router_dtype = router_dtype
        self.experts = experts
        self.shared = shared

    @staticmethod
    def _check_experts(experts: Experts, routed: int, hidden: int, shared: int) -> None:
        have, width = getattr(experts, "num_experts", None), getattr(experts, "hidden", hidden)
        if width != hidden:
            raise ValueError(f"router_weight is for H = {hidden}, but the experts have H = {width}")
        table = getattr(experts, "expert_map", None)
        if table is not None:
            have = table.shape[0]
        if have is not None and have != routed + shared:
            raise ValueError(
                f"router_weight is for {routed} experts and the router appends {shared} shared ones, but the experts "
                f"{'map' if table is not None else 'are'} {have}"
            )

    def route(self, x: Tensor) -> Routing:  # [T, H]
        """The experts of each token."""
        d = self.router_dtype
        bias = None if self.router_bias is None else self.router_bias.to(d)
        logits = nn.functional.linear(x.to(d), self.router_weight.to(d), bias)
        router = self.router
        if self.correction_bias is not None:
            router = replace(router, correction_bias=self.correction_bias)
        return router(logits)

    def forward(self, x: Tensor) -> Tensor:  # [..., H] -> [..., H]
        """Routed plus shared experts, in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.experts(rows.contiguous(), self.route(rows))
        if self.shared is not None:
            extra = self.shared(rows)
            if self.shared_gate is not None:
                extra = extra * torch.sigmoid(nn.functional.linear(rows, self.shared_gate.to(rows.dtype)))
            out = out + extra
        return out.view(x.shape)
