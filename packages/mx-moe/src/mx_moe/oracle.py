"""The oracle: which class of experts runs a problem on a device, and why those preferred to it do not.

A pure function of device facts, problem and request; ``mx_kernels.Device.fake("gfx950")`` asks for hardware that is not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Activation, Candidate, Choice, Device
from mx_quant import ExpertWeights

from .experts.base import ExpertsBase
from .experts.emulation import EmulationExperts
from .experts.fused import FusedExperts
from .experts.native import NativeExperts
from .experts.problem import FEATURES, Problem
from .experts.rebased import OPT_IN, RebasedExperts
from .experts.reference import ReferenceExperts

_SILU = Activation("silu")

EXPERT_CLASSES: dict[str, type[ExpertsBase]] = {
    c.name: c for c in (NativeExperts, RebasedExperts, FusedExperts, EmulationExperts, ReferenceExperts)
}

EXPERT_BACKENDS: tuple[Candidate, ...] = tuple(
    Candidate(c.name, c.why_not, c, OPT_IN if c is RebasedExperts else None) for c in EXPERT_CLASSES.values()
)
"""In order of preference; "rebased" only by name."""


def select_backend(
    problem: Problem, device: Device | torch.device | str | None = None, requested: str = "auto"
) -> Choice:
    """The backend for ``problem`` on ``device`` (None: the current accelerator, else the CPU), with every rejection's reason.

    ``requested`` names a backend ("native", "rebased", "fused", "emulation", "reference"): it is taken or refused, never replaced.
    Raises mx_kernels.Unsupported with the reasons, ValueError for an unknown name.
    """
    if not isinstance(device, Device):
        device = Device.probe(device)
    return mk.choose(EXPERT_BACKENDS, device, problem, requested)


def _select(
    weight: str,
    activation: Activation,
    device: Device | torch.device | str | None,
    requested: str,
    inputs: str | None,
    features: frozenset[str],
    sizes: tuple[int, int, int],
) -> Choice:
    problem = Problem(weight, activation, *sizes, inputs=inputs, features=features)
    return select_backend(problem, device, requested)


def select_mxfp8_moe_backend(
    device: Device | torch.device | str | None = None,
    requested: str = "auto",
    *,
    activation: Activation = _SILU,
    inputs: str | None = "auto",
    features: frozenset[str] = frozenset(),
    sizes: tuple[int, int, int] = (8, 4096, 4096),
) -> Choice:
    """The backend for MXFP8 E4M3 experts; ``sizes``: experts, hidden, intermediate. See ``select_backend``."""
    return _select("mxfp8_e4m3", activation, device, requested, inputs, features, sizes)


def select_mxfp4_moe_backend(
    device: Device | torch.device | str | None = None,
    requested: str = "auto",
    *,
    activation: Activation = _SILU,
    inputs: str | None = "auto",
    features: frozenset[str] = frozenset(),
    sizes: tuple[int, int, int] = (8, 4096, 4096),
) -> Choice:
    """The backend for MXFP4 experts; ``sizes``: experts, hidden, intermediate. See ``select_backend``."""
    return _select("mxfp4", activation, device, requested, inputs, features, sizes)


def select_nvfp4_moe_backend(
    device: Device | torch.device | str | None = None,
    requested: str = "auto",
    *,
    activation: Activation = _SILU,
    inputs: str | None = "auto",
    features: frozenset[str] = frozenset({"input_scales"}),
    sizes: tuple[int, int, int] = (8, 4096, 4096),
) -> Choice:
    """The backend for NVFP4 experts (with calibrated input scales unless ``features`` says otherwise). See ``select_backend``."""
    return _select("nvfp4", activation, device, requested, inputs, features, sizes)


def make_experts(
    weights: ExpertWeights,
    activation: Activation,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    inputs: str | None = "scheme",
    dtype: torch.dtype | None = None,
    expert_map: Tensor | None = None,  # [E_global] int32
    router_weight_on_input: bool = False,
    shared_experts: int = 0,
    top_k: int | None = None,
) -> ExpertsBase:
    """Experts of one layer on the best backend of ``device`` (None: where the weights are), with ``.choice``.

    inputs: format that the inputs of both GEMMs are quantized to; None leaves them in 16 bits; "auto" quantizes them where
        native hardware multiplies quantized inputs. "scheme" (default) takes the weights' ``input_format``; where that is None
        inputs stay in 16 bits, unless ``backend`` names a class that takes quantized ones only.
    dtype: of the x to come (default: what the weights dequantize to).
    expert_map: row of the weights for each global expert id, -1 for experts that are elsewhere.
    router_weight_on_input: x * routing weight before GEMM 1 instead of after GEMM 2; one expert a token only.
    shared_experts: the last rows of the weights are experts that every token goes to (``Router(shared_experts=...)``).

    Raises mx_kernels.Unsupported with every reason, ValueError and TypeError for weights that do not fit.
    """
    if shared_experts and not 0 < shared_experts < weights.num_experts:
        raise ValueError(
            f"shared_experts is {shared_experts}, but the weights have {weights.num_experts} rows, shared ones included"
        )
    if router_weight_on_input and top_k is not None and top_k + shared_experts != 1:
        raise ValueError(
            f"the router weight can be applied to the input with one expert a token only, got top_k = {top_k} and "
            f"{shared_experts} shared experts"
        )
    if device is not None and torch.device(device) != weights.device:
        weights = weights.to(device)
    if inputs == "scheme":
        unsaid = None if backend == "auto" else "auto"  # a class asked for by name brings its own inputs
        inputs = unsaid if weights.input_format is None else weights.input_format.name
    elif inputs not in (None, "auto"):
        inputs = mk.get_format(inputs).name
    problem = Problem.of(
        weights,
        activation,
        inputs=inputs,
        dtype=dtype or weights.dtype,
        expert_map=expert_map is not None,
        router_weight_on_input=router_weight_on_input,
        shared_experts=shared_experts > 0,
        top_k=top_k,
    )
    choice = select_backend(problem, weights.device, backend)
    if inputs == "auto":
        inputs = EXPERT_CLASSES[choice.name].auto_inputs(problem.weight)
    experts: ExpertsBase = choice.candidate.build(
        weights,
        activation,
        choice=choice,
        inputs=inputs,
        expert_map=expert_map,
        router_weight_on_input=router_weight_on_input,
        dtype=problem.dtype,
    )
    return experts


def explain(device: Device, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Any]]:
    """For each format: which backend would run on ``device`` and why those preferred to it would not (JSON-ready)."""
    result: dict[str, dict[str, Any]] = {}
    for name in ("bfloat16", *mk.FORMATS):
        features = frozenset({"input_scales"}) if name == "nvfp4" else frozenset()
        problem = Problem(name, _SILU, 8, 4096, 4096, dtype=dtype, features=features)
        choice = select_backend(problem, device)
        inputs = EXPERT_CLASSES[choice.name].auto_inputs(name)
        result[name] = {**choice.to_dict(), "inputs": inputs or str(dtype).removeprefix("torch.")}
    return result


__all__ = [
    "EXPERT_BACKENDS",
    "EXPERT_CLASSES",
    "FEATURES",
    "Problem",
    "explain",
    "make_experts",
    "select_backend",
    "select_mxfp4_moe_backend",
    "select_mxfp8_moe_backend",
    "select_nvfp4_moe_backend",
]
