"""What a user would run instead, where it is importable: each peer prepares a layer's weights its own way and returns a call.

A peer gets bf16 weights w13 [E, 2I, H] (gate; up) and w2 [E, H, I] that an MX format holds exactly, and is checked like ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Shape
from torch import Tensor

import mx_kernels as mk

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """name; the module it needs; what it does with w13, w2, x, ids and weights: prepare(...) -> call."""

    name: str
    module: str
    prepare: Callable[[Shape, Tensor, Tensor, Tensor, Tensor, Tensor], Call]

    def why_not(self) -> str | None:
        """None where it can run here."""
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"


def _torch_grouped_mm(shape: Shape, w13: Tensor, w2: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Call:
    """Sort by expert, torch.nn.functional.grouped_mm twice, activation between, index_add."""
    a, b = w13.transpose(1, 2), w2.transpose(1, 2)
    tokens, k = ids.shape

    def call() -> Tensor:
        order = ids.flatten().argsort(stable=True)
        ends = torch.histc(ids.float(), shape.experts, 0, shape.experts - 1).cumsum(0).int()
        h = torch.nn.functional.grouped_mm(x[order // k], a, offs=ends)
        y = torch.nn.functional.grouped_mm(mk.activate(h, shape.activation), b, offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros(tokens, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, order // k, y)

    return call


def _vllm_triton(shape: Shape, w13: Tensor, w2: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Call:
    """vLLM's Triton fused_experts on bf16 weights."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    if shape.activation.kind != "silu":
        raise ValueError("measured with SiLU only: its SwiGLU-OAI wants interleaved rows")
    return lambda: fused_experts(x, w13, w2, weights, ids)


PEERS = {
    p.name: p
    for p in (Peer("torch_grouped_mm_bf16", "torch", _torch_grouped_mm), Peer("vllm_triton_bf16", "vllm", _vllm_triton))
}
