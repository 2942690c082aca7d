"""Shapes, inputs, rooflines and the timer that every GPU benchmark shares.

Roofline: max(bytes / read rate, flops / matmul rate), with the ceilings measured on the card in the same run (``ceilings.py``): the
weights of the experts that are hit, once, in their format, plus the activations in and out; 2 flops for each multiply-add.
Timing: a CUDA graph walks several layers, each with its own weights and routing, so that no weight waits in the L2 cache;
warm-up, then the median of the replays divided by the number of layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import mx_kernels as mk

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
FORMATS = ("bf16", "mxfp8", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class Ceilings:
    """What a card can do at most: reading, copying (read + write), a bf16 product of 8192^3 in a burst."""

    read_gb_s: float
    copy_gb_s: float
    matmul_tflops: float


H200 = Ceilings(4587, 4299, 797)
"""Measured on an NVIDIA H200 (docs/performance.md)."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer: H hidden, I intermediate, E experts, top_k, activation."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: mk.Activation

    def active(self, tokens: int) -> float:
        """Expected number of experts hit under uniform routing."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def weight_bytes(self, fmt: str, experts: float) -> float:
        """Bytes of the weights of so many experts."""
        bits = 16 if fmt == "bf16" else mk.get_format(fmt).bits_per_element
        return experts * 3 * self.hidden * self.intermediate * bits / 8

    def flops(self, tokens: int) -> float:
        """Floating-point operations of both GEMMs."""
        return 2.0 * tokens * self.top_k * 3 * self.hidden * self.intermediate

    def floor_us(self, fmt: str, tokens: int, distinct: float, ceilings: Ceilings = H200) -> float:
        """The roofline in microseconds for ``distinct`` experts hit."""
        moved = self.weight_bytes(fmt, distinct) + tokens * self.hidden * 4
        return max(moved / ceilings.read_gb_s * 1e-3, self.flops(tokens) / ceilings.matmul_tflops * 1e-6)


SWIGLU_OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
SILU = mk.Activation("silu")
SHAPES = {
    s.name: s
    for s in (
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, SWIGLU_OAI),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, SILU),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, SILU),
        Shape("deepseek-v3-tp8", 7168, 256, 256, 8, SILU),
        Shape("olmoe-1b-7b", 2048, 1024, 64, 8, SILU),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4, SWIGLU_OAI),
        Shape("tiny", 256, 256, 8, 2, SILU),
    )
}


def find_shape(name: str) -> Shape:
    """A shape by name, or "H,I,E,k,silu" / "H,I,E,k,swiglu_oai"; ValueError says what is known."""
    if name in SHAPES:
        return SHAPES[name]
    parts = name.split(",")
    kinds = {"silu": SILU, "swiglu_oai": SWIGLU_OAI}
    if len(parts) != 5 or not all(p.isdigit() for p in parts[:4]) or parts[4] not in kinds:
        raise ValueError(f"no shape {name!r}: needs H,I,E,k,silu or H,I,E,k,swiglu_oai, or one of {', '.join(SHAPES)}")
    h, i, e, k = map(int, parts[:4])
    return Shape(name, h, i, e, k, kinds[parts[4]])


def routing(
    shape: Shape, tokens: int, seed: int, kind: str = "uniform", device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int32 [T, k] and weights float32 [T, k].

    kind: "uniform"; "zipf" or "zipf:1.5", which favours some experts by that exponent (1); "one-hot", where every token takes the
    same k experts. Which experts are favoured changes with the seed. ValueError for other kinds.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    logits = torch.randn(tokens, shape.experts, device=device, generator=g)
    name, _, exponent = kind.partition(":")
    if name not in ("uniform", "zipf", "one-hot") or (exponent and name != "zipf"):
        raise ValueError(f"no routing {kind!r}: needs uniform, zipf, zipf:EXPONENT or one-hot")
    if name != "uniform":
        rank = torch.randperm(shape.experts, device=device, generator=g) + 1
        penalty = 100.0 * (rank > shape.top_k) if name == "one-hot" else float(exponent or 1) * torch.log(rank)
        logits -= penalty
    values, ids = logits.topk(shape.top_k, dim=-1)
    return ids.int(), values.softmax(-1)


def layers_for(shape: Shape, fmt: str, tokens: int, kind: str = "uniform", budget: float = 48e9) -> int:
    """How many layers one graph walks so that their active weights are ten times the L2 cache."""
    active = shape.top_k if kind == "one-hot" else shape.active(tokens)
    copies = math.ceil(600e6 / shape.weight_bytes(fmt, active))
    return int(max(1, min(16, max(2, copies), budget // shape.weight_bytes(fmt, shape.experts))))


def time_graph(calls: Sequence[Callable[[], object]], seconds: float = 0.1) -> float:
    """Median microseconds of one call: one CUDA graph over all calls, warmed up for 30 ms, then replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep = [call() for call in calls]
        one = max(_replay(graph, stream, 1)[0] * 1e-6, 1e-6)
        for _ in range(min(400, int(0.03 / one))):
            graph.replay()
        times = _replay(graph, stream, int(max(7, min(100, seconds / one))))
    del graph, keep
    return statistics.median(times) / len(calls)


def _replay(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, times: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in pairs:
        before.record(stream)
        graph.replay()
        after.record(stream)
    stream.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in pairs]


def describe() -> dict[str, str]:
    """Device and versions that a figure belongs to."""
    import datetime

    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
