"""Experts of transformers models on our backends: quantized in place, or as they are through the experts interface.

``quantize_experts_(model, "mxfp4")`` replaces the weights of every experts module by quantized ones and its forward by ours;
``register()`` adds the experts implementation "mx", which runs unquantized experts on our pipeline.

transformers (5.17 and later) marks an experts class with ``is_transposed``, ``is_concatenated``, ``has_bias``, ``has_gate`` and gives
it ``_apply_gate``. These say how ``gate_up_proj`` and ``down_proj`` are stored; what the gate computes is found by comparing it
with ours on a ramp of numbers, so that an unknown one is an error and never a wrong result. E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mx_kernels as mk
import mx_quant as mq
from mx_kernels import Activation
from mx_quant import ExpertWeights, Scheme

from ..experts.base import ExpertsBase
from ..oracle import make_experts
from ..routing import Routing

PLAIN_FORMATS = ("bf16", "none")
_FLAGS = ("is_transposed", "has_bias", "has_gate")


@dataclass(frozen=True)
class QuantizedLayer:
    """One experts module: its name, its backend with the reasons against others, weights (elements) and bytes held."""

    name: str
    experts: int
    backend: dict[str, Any]
    inputs: str
    elements: int
    nbytes: int


def layer_of(name: str, experts: ExpertsBase, elements: int) -> QuantizedLayer:
    """One row of the report."""
    inputs = str(experts.inputs.format or "16 bits")
    return QuantizedLayer(name, experts.num_experts, experts.choice.to_dict(), inputs, elements, experts.nbytes)


@dataclass(frozen=True)
class ExpertsReport:
    """What ``quantize_experts_`` did. ``coverage`` is the share of all expert weights that are now quantized."""

    format: str
    layers: tuple[QuantizedLayer, ...]
    skipped: tuple[tuple[str, int, str], ...] = ()

    @property
    def elements(self) -> int:
        """Expert weights of the model, quantized or not."""
        return sum(layer.elements for layer in self.layers) + sum(n for _, n, _ in self.skipped)

    @property
    def coverage(self) -> float:
        """Quantized expert weights over all expert weights, 0 to 1."""
        done = 0 if self.format in PLAIN_FORMATS else sum(layer.elements for layer in self.layers)
        return done / self.elements if self.elements else 0.0

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts as they are held now (codes, scales, packing)."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def backends(self) -> dict[str, int]:
        """How many layers each backend runs."""
        names = [layer.backend["backend"] for layer in self.layers]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "format": self.format,
            "coverage": self.coverage,
            "expert_weights": self.elements,
            "expert_bytes": self.expert_bytes,
            "backends": self.backends,
            "rejected": self.layers[0].backend["rejected"] if self.layers else {},
            "inputs": self.layers[0].inputs if self.layers else None,
            "layers": [vars(layer) for layer in self.layers],
            "skipped": [{"name": name, "elements": n, "reason": why} for name, n, why in self.skipped],
        }


class MxExperts:
    """Mixed into the class of a converted experts module; ``mx_experts`` runs it."""

    mx_experts: ExpertsBase

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # [T, H]
        """The weighted sum over each token's experts, [T, H]. Ids of experts that are elsewhere equal the number of experts."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.mx_experts(x.contiguous(), Routing(top_k_index, top_k_weights)).view(hidden_states.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``model.to(device)``: experts are made again there, with the same inputs; casts leave codes and scales alone."""
        target = fn(torch.empty(0, device=self.mx_experts.device)).device
        if target != self.mx_experts.device:
            self.mx_experts = _moved(self.mx_experts, target)
        return super()._apply(fn, recurse)  # type: ignore[misc]


def _moved(experts: ExpertsBase, device: torch.device) -> ExpertsBase:
    fmt = experts.inputs.format
    return make_experts(
        experts.weights,
        experts.activation,
        device=device,
        inputs=None if fmt is None else fmt.name,
        dtype=experts.dtype,
    )


def quantize_experts_(
    model: nn.Module,
    format: Scheme | mk.Format | str,
    *,
    backend: str = "auto",
    inputs: str | None = "scheme",
    allow_skipped: bool = False,
    progress: bool = False,
) -> ExpertsReport:
    """Quantize the experts of a transformers model in place, layer by layer; each layer's 16-bit weights are freed at once.

    format: a scheme or format or its name; "bf16" keeps the weights as they are and only changes what runs them.
    backend, inputs: as for ``make_experts``. allow_skipped: leave experts of an unknown kind as they are instead of raising.

    Raises ValueError before anything is changed: for a model without experts, and, naming the module, for experts whose
    storage or gate is not known or whose sizes do not fit the format.
    """
    scheme = scheme_of(format)
    found = list(expert_modules(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts module: nothing to quantize (dense models: mx_quant.quantize_model)"
        )
    plans, skipped = [], []
    for name, module in found:
        try:
            activation = experts_activation(module)
            if scheme is not None:
                h, i = _sizes(module)
                scheme.weight.check_k(h, f"{name}: hidden size")
                scheme.weight.check_k(i, f"{name}: intermediate size")
            plans.append((name, module, activation))
        except ValueError as error:
            if not allow_skipped:
                raise ValueError(f"{name}: {error}") from None
            skipped.append((name, expert_elements(module), str(error)))
    if progress:
        from tqdm import tqdm

        plans = tqdm(plans, desc=f"quantize {format}", unit="layer", leave=False)
    layers = []
    for name, module, activation in plans:
        elements = expert_elements(module)
        weights = experts_weights(module, scheme, name=name)
        experts = make_experts(
            weights, activation, backend=backend, inputs=inputs, dtype=_first_parameter(module).dtype
        )
        attach(module, experts)
        layers.append(layer_of(name, experts, elements))
    return ExpertsReport("bf16" if scheme is None else scheme.name, tuple(layers), tuple(skipped))


def scheme_of(format: Scheme | mk.Format | str) -> Scheme | None:
    """The scheme, or None for "bf16" and "none"; ValueError for an unknown name."""
    return None if isinstance(format, str) and format in PLAIN_FORMATS else mq.get_scheme(format)


def attach(module: nn.Module, experts: ExpertsBase) -> None:
    """Let ``experts`` run this experts module, and free its own weights."""
    base = type(module)
    if not issubclass(base, MxExperts):
        module.__class__ = type(f"Mx{base.__name__}", (MxExperts, base), {})
    for name in ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"):
        module._parameters.pop(name, None)
    module.mx_experts = experts  # type: ignore[assignment]


def experts_factory(*, backend: str = "auto", inputs: str | None = "scheme") -> Callable[..., nn.Module]:
    """What ``mx_quant.quantize_model`` and ``load_online`` take as ``experts``: it runs fused experts on our backends."""

    def factory(name: str, module: nn.Module, weights: ExpertWeights) -> nn.Module:
        activation = experts_activation(module)
        attach(module, make_experts(weights, activation, backend=backend, inputs=inputs, dtype=weights.dtype))
        return module

    return factory


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything in the model that holds experts, of a kind that we know or not."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        known = all(hasattr(module, flag) for flag in _FLAGS)
        looks_like = name.split(".")[-1] == "experts" or type(module).__name__.endswith("Experts")
        if known or (looks_like and any(True for _ in module.parameters())):
            inside += (name + ".",)
            yield name, module


def experts_activation(module: nn.Module) -> Activation:
    """The activation of an experts module, found by comparing its gate with ours; gate and up halves concatenated.

    Raises ValueError for a class that transformers' experts interface does not describe, for a norm after each expert, and
    for a gate that none of our activations equals.
    """
    kind = type(module).__name__
    if not all(hasattr(module, flag) for flag in _FLAGS):
        raise ValueError(
            f"{kind} is not described by transformers' experts interface (no is_transposed, has_bias, has_gate): its layout is "
            "unknown. Pass allow_skipped=True to leave it in 16 bits"
        )
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"{kind} normalizes each expert's output (has_post_expert_norm), which our pipeline does not do"
        )
    if isinstance(module, MxExperts):
        raise ValueError(f"{kind} is quantized already: load the model again to quantize it differently")
    layout = "concatenated" if getattr(module, "is_concatenated", True) else "interleaved"
    gated = bool(module.has_gate)
    ramp = torch.linspace(-12, 12, 97)
    h = torch.cat((ramp, ramp.flip(0) * 0.9 + 0.3)) if gated else ramp
    given = mq.interleave(h[None], 1) if gated and layout == "interleaved" else h[None]
    with torch.no_grad():
        gate: Any = module._apply_gate if gated else module.act_fn
        want = gate(given).float()
    for candidate in _candidates(module, gated):
        got = mk.activate(h[None], candidate)
        if isinstance(got, Tensor) and torch.allclose(got, want, rtol=1e-5, atol=1e-5):
            return candidate
    raise ValueError(
        f"the gate of {kind} equals none of our activations (silu, swiglu_oai, gelu, gelu_tanh, relu2, identity, with the "
        f"limits and alphas among its attributes) on {layout} gate and up: it would be computed wrongly"
    )


def _candidates(module: nn.Module, gated: bool) -> Iterator[Activation]:
    sources = (vars(module), getattr(getattr(module, "config", None), "__dict__", {}))
    numbers = {
        k: float(v) for s in sources for k, v in s.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    limits = [None, *(v for k, v in numbers.items() if ("limit" in k or "clamp" in k) and v > 0)]
    for limit, kind in itertools.product(limits, ("silu", "gelu", "gelu_tanh", "relu2", "identity")):
        yield Activation(kind, gated=gated, limit=limit)
    if gated:
        alphas = [v for k, v in numbers.items() if "alpha" in k]
        for limit, alpha, beta in itertools.product(limits, alphas, (1.0, 0.0)):
            yield Activation("swiglu_oai", alpha=alpha, beta=beta, limit=limit)


def experts_weights(module: nn.Module, scheme: Scheme | None, *, name: str = "experts") -> ExpertWeights:
    """The weights of an experts module in canonical form, quantized (or with ``scheme`` None as they are).

    Nothing of the module is changed; plain weights that are canonical already are shared with it.
    """
    up, down = _projections(module)
    w13, w2 = up.detach(), down.detach()
    if module.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    b13 = getattr(module, prefix + "_bias").detach() if module.has_bias else None
    b2 = module.down_proj_bias.detach() if module.has_bias else None  # type: ignore[operator]
    interleaved = bool(module.has_gate) and not getattr(module, "is_concatenated", True)
    layout = "interleaved" if interleaved else "concatenated"
    if scheme is not None:
        return mq.quantize_experts(w13, w2, scheme, w13_bias=b13, w2_bias=b2, layout=layout, name=name)
    if interleaved:
        w13, b13 = mq.deinterleave(w13, 1), None if b13 is None else mq.deinterleave(b13, 1)
    return ExpertWeights(w13.contiguous(), w2.contiguous(), b13, b2)


def _projections(module: nn.Module) -> tuple[Tensor, Tensor]:
    up = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            f"{type(module).__name__} has no three-dimensional gate_up_proj (or up_proj) and down_proj: its layout is unknown"
        )
    return up, down


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(H, I)."""
    up, down = _projections(module)
    hidden, intermediate = (1, 1) if module.is_transposed else (2, 2)
    return up.shape[hidden], down.shape[intermediate]


def expert_elements(module: nn.Module) -> int:
    """Weights of an experts module, biases not counted."""
    return sum(p.numel() for n, p in module.named_parameters() if "bias" not in n)


def _first_parameter(module: nn.Module) -> Tensor:
    return next(module.parameters())


def mx_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # [T, H]
    """The experts implementation "mx": unquantized experts on our pipeline.

    Canonical weights are shared with the module; transposed or interleaved ones are copied once, and again after they change.
    """
    up, down = _projections(module)
    key = (up.data_ptr(), up._version, down.data_ptr(), down._version, hidden_states.dtype)
    held = module.__dict__.get("_mx_plain")
    if held is None or held[0] != key:
        weights = experts_weights(module, None)
        held = (key, make_experts(weights, experts_activation(module), dtype=hidden_states.dtype))
        module.__dict__["_mx_plain"] = held
    return held[1](hidden_states.contiguous(), Routing(top_k_index, top_k_weights))  # type: ignore[no-any-return]


def register() -> None:
    """Add the experts implementation "mx": ``model.set_experts_implementation("mx")``, or ``experts_implementation="mx"``."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("mx", mx_forward)
