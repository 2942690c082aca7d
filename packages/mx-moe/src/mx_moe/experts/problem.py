"""What a set of experts is asked to do, and what a class of experts can do, both as data.

``Capability.why_not(problem)`` is the only place that compares the two; the tests of each class are generated from its
capability, so that every claim is checked against the reference and nothing that is not claimed runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mx_kernels import FORMATS, Activation, QuantizedTensor
from mx_quant import ExpertWeights

PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Names of weights that are not quantized."""

FEATURES = ("bias", "expert_map", "router_weight_on_input", "shared_experts", "input_scales")
"""bias: of either GEMM. expert_map: ids are global, weights local. router_weight_on_input: x * weight before GEMM 1 (top-1).
shared_experts: ids past the routed experts. input_scales: a float32 global scale for the inputs of each GEMM (NVFP4)."""

KINDS = ("silu", "swiglu_oai", "gelu", "gelu_tanh", "relu2", "identity")
LAYOUTS = ("concatenated", "interleaved")
EVERY_FORMAT = tuple(FORMATS)


@dataclass(frozen=True)
class Problem:
    """One MoE layer, as far as the choice of a backend depends on it.

    weight: a format's name, or "bfloat16", "float16", "float32" for weights that are not quantized.
    inputs: format that the inputs of both GEMMs are quantized to; None leaves them in 16 bits; "auto" leaves them too,
        except where the hardware multiplies quantized operands only.
    num_experts: rows of the weights, E. hidden, intermediate: H, I. tokens: T if known. dtype: of x.
    """

    weight: str
    activation: Activation
    num_experts: int
    hidden: int
    intermediate: int
    top_k: int | None = None
    tokens: int | None = None
    dtype: torch.dtype = torch.bfloat16
    inputs: str | None = "auto"
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.weight not in FORMATS and self.weight not in PLAIN:
            raise ValueError(f"unknown weights {self.weight!r}; there are {', '.join((*FORMATS, *PLAIN))}")
        if self.inputs not in (None, "auto") and self.inputs not in FORMATS:
            raise ValueError(f"unknown inputs {self.inputs!r}; there are auto, None, {', '.join(FORMATS)}")
        unknown = set(self.features) - set(FEATURES)
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; there are {', '.join(FEATURES)}")

    @classmethod
    def of(
        cls,
        weights: ExpertWeights,
        activation: Activation,
        *,
        inputs: str | None = "auto",
        dtype: torch.dtype = torch.bfloat16,
        expert_map: bool = False,
        router_weight_on_input: bool = False,
        shared_experts: bool = False,
        top_k: int | None = None,
        tokens: int | None = None,
    ) -> Problem:
        """The problem that these weights pose. Raises ValueError where the activation does not fit w13's rows."""
        rows, width = weights.w13.shape[1], weights.intermediate_size
        if rows != (2 if activation.gated else 1) * width:
            raise ValueError(
                f"w13 has {rows} rows and w2 {width} columns, but {activation.kind} (gated={activation.gated}) needs "
                f"{(2 if activation.gated else 1) * width} rows: {'I gate and I up' if activation.gated else 'I'} rows"
            )
        asked = {
            "bias": weights.w13_bias is not None or weights.w2_bias is not None,
            "expert_map": expert_map,
            "router_weight_on_input": router_weight_on_input,
            "shared_experts": shared_experts,
            "input_scales": weights.w13_input_scale is not None and weights.w2_input_scale is not None,
        }
        return cls(
            weight_name(weights.w13),
            activation,
            weights.num_experts,
            weights.hidden_size,
            width,
            top_k,
            tokens,
            dtype,
            inputs,
            frozenset(name for name, wanted in asked.items() if wanted),
        )

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized."""
        return self.weight in FORMATS

    def __str__(self) -> str:
        inputs = "" if self.inputs == "auto" else f" x {self.inputs or self.dtype} inputs"
        features = f" with {', '.join(sorted(self.features))}" if self.features else ""
        return (
            f"{self.weight} experts{inputs} ({self.num_experts} experts, H = {self.hidden}, I = {self.intermediate}, "
            f"{self.activation.kind}{features})"
        )


@dataclass(frozen=True)
class Capability:
    """What a class of experts does; whatever is not listed is refused with a reason.

    weights: format names and plain dtypes. inputs: formats that GEMM inputs may be quantized to, None for 16 bits.
    kinds, layouts: of the activation. features: of FEATURES. dtypes: of x.
    """

    weights: tuple[str, ...] = (*EVERY_FORMAT, *PLAIN)
    inputs: tuple[str | None, ...] = (None, *EVERY_FORMAT)
    kinds: tuple[str, ...] = KINDS
    layouts: tuple[str, ...] = LAYOUTS
    gated: tuple[bool, ...] = (True, False)
    features: tuple[str, ...] = FEATURES
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    def why_not(self, problem: Problem) -> str | None:
        """The first thing that ``problem`` asks for and this class does not do, or None."""
        act = problem.activation
        if problem.weight not in self.weights:
            return f"it takes {_names(self.weights)} weights, not {problem.weight}"
        if problem.inputs != "auto" and problem.inputs not in self.inputs:
            return f"it takes inputs in {_names(self.inputs)}, not {problem.inputs or '16 bits'}"
        if problem.dtype not in self.dtypes:
            return f"it takes x in {_names(self.dtypes)}, not {problem.dtype}"
        if act.kind not in self.kinds or act.gated not in self.gated:
            return f"it has no {'' if act.gated else 'ungated '}activation {act.kind} (it has {_names(self.kinds)})"
        if act.layout not in self.layouts:
            return f"it needs gate and up {_names(self.layouts)}, these are {act.layout}"
        missing = sorted(problem.features - set(self.features))
        if missing:
            return f"it has no {_names(missing)}"
        return why_not_inputs(problem, problem.inputs)


def why_not_inputs(problem: Problem, inputs: str | None) -> str | None:
    """Why the GEMM inputs cannot be quantized to that format: K not divisible, or NVFP4 without its scales."""
    if inputs is None or inputs == "auto":
        return None
    f = FORMATS[inputs]
    for name, k in (("hidden", problem.hidden), ("intermediate", problem.intermediate)):
        if k % f.block:
            return f"{name} size {k} is not a multiple of {inputs}'s block length {f.block}, so inputs cannot be quantized to it"
    if f.has_global_scale and "input_scales" not in problem.features:
        return (
            f"{inputs} inputs need a calibrated global scale per GEMM (w13_input_scale, w2_input_scale), and the weights "
            "carry none: a scale taken from the batch would make a token's result depend on its neighbours"
        )
    return None


def weight_name(w: Tensor | QuantizedTensor) -> str:
    """The format's name, or the dtype's for a plain tensor; TypeError for another dtype."""
    if isinstance(w, QuantizedTensor):
        return w.format.name
    for name, dtype in PLAIN.items():
        if w.dtype == dtype:
            return name
    raise TypeError(
        f"weights are {w.dtype}, need a QuantizedTensor or {', '.join(PLAIN)}: quantize them with mx_quant.quantize_experts"
    )


def _names(items: Iterable[object]) -> str:
    return ", ".join("16 bits" if i is None else str(i).removeprefix("torch.") for i in items)
