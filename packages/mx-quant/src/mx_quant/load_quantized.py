"""Load a quantized checkpoint, of any layout, into a model that keeps it quantized.

Linear layers become ``MxLinear``; experts, fused or one by one on disk, become ``ExpertWeights`` and then what ``experts`` makes of
them. Codes and scales are those of the checkpoint, bit for bit; nothing is dequantized on the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mx_kernels import Format, QuantizedTensor

from .convert import Checkpoint
from .coverage import Covered
from .experts import ExpertWeights
from .layouts import FUSED, Target, WeightRef, classify, regroup
from .linear import MxLinear
from .load import Loader, model_names
from .model_plan import ModelPlan, fused_experts
from .online import ExpertsFactory, carry_out
from .scheme import Scheme
from .stored_experts import read_experts


def load_quantized(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    experts: ExpertsFactory | None = None,
    activation: Format | str | None = "checkpoint",
    ignore: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> nn.Module:
    """Load a checkpoint of any layout of LAYOUTS into ``model`` and keep it quantized; returns ``model``.

    ``model`` is best built under ``meta_parameters()``. What the checkpoint holds in full precision is loaded in the model's
    dtype. ``model.mx_coverage`` then says what share is quantized.

    Args:
        activation: format that inputs are quantized to, or None for none; "checkpoint" is NVFP4 where the checkpoint brings
            its input scales, and none elsewhere.
        experts, ignore, rename, device, progress: as in ``load_online``.

    ValueError, before anything is replaced, for a checkpoint that is not quantized, for missing and unexpected tensors, for
    shapes, and for quantized weights that the model has no ``nn.Linear`` or experts for. Scales that a layout may not hold
    (NaN, a global scale of zero) raise when they are read, naming the tensor.
    """
    if callable(getattr(model, "tie_weights", None)):
        model.tie_weights()  # type: ignore[operator]
    with Checkpoint(checkpoint) as source:
        loader = QuantizedLoader(
            model,
            source,
            activation=activation,
            experts=experts is not None,
            ignore=ignore,
            rename=rename,
            device=torch.device(device or "cpu"),
        )
        return carry_out(model, loader, experts, progress)


class QuantizedLoader(Loader):
    """A Loader whose linear layers and experts come quantized from a ``Checkpoint``."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        activation: Format | str | None,
        experts: bool,
        ignore: Sequence[str],
        rename: Callable[[str], str] | None,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        refs = list(checkpoint.weights.values())
        if not refs:
            raise ValueError(f"{checkpoint.reader.folder} has no quantized weight: load_online quantizes while loading")
        self.linears: dict[str, WeightRef] = {}
        self.targets: dict[str, dict[str, Target]] = {}  # experts module -> "up" or "down"
        bits = {r.format: r for r in refs if r.format is not None}
        static = any(r.input_scale is not None for r in refs)
        if activation == "checkpoint":
            activation = next((f for f in bits if f.has_global_scale), None) if static else None
        scheme = Scheme(next(iter(bits)), activation)  # type: ignore[arg-type]
        plan = ModelPlan(scheme)
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        plan.aliases = {found[0]: tuple(found) for found in names.values()}
        self.modules = dict(model.named_modules())
        quantized: dict[str, list[str]] = {}
        homeless = []
        for target in regroup(refs, FUSED, checkpoint.family):
            sources = [checkpoint.weights[n] for n in target.sources]
            stored = [t for r in sources for t in (*r.tensors, r.input_scale) if t is not None]
            place = self._linear(target, plan, rename) or self._experts(target, plan, rename)
            if place is None:
                homeless.append(target.ref.name)
            else:
                quantized[place] = stored
        if homeless:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear and no fused experts for {len(homeless)} quantized weights of "
                f"{checkpoint.reader.folder}, the first is {homeless[0]}: rename maps names that differ"
            )
        if plan.experts and not experts:
            raise ValueError(
                f"{checkpoint.reader.folder} holds quantized experts ({next(iter(plan.experts))} and {len(plan.experts) - 1} "
                f"more): pass experts=..., which makes the modules that run them"
            )
        self._rows(model, plan, quantized)
        self.modules = {}  # the loader must not keep what it replaces
        super().__init__(
            model, plan, checkpoint.reader, ignore=ignore, rename=rename, device=device, quantized=quantized
        )

    def _linear(self, target: Target, plan: ModelPlan, rename: Callable[[str], str] | None) -> str | None:
        """The model's weight that a linear target becomes, noted in the plan; ValueError where its shape differs."""
        if target.ref.kind != "linear":
            return None
        for name in model_names(target.ref.name, rename):
            path = name.removesuffix(".weight")
            module = self.modules.get(path)
            if type(module) is nn.Linear:
                _check_shape(target.ref, tuple(module.weight.shape))
                self.linears[path] = self.checkpoint.weights[target.sources[0]]
                plan.linears[path] = plan.aliases[path]
                return f"{path}.weight"
        return None

    def _experts(self, target: Target, plan: ModelPlan, rename: Callable[[str], str] | None) -> str | None:
        """The model's parameter that a fused target becomes, noted in the plan."""
        for name in model_names(target.ref.name, rename):
            path, _, param = name.rpartition(".")
            module = self.modules.get(path)
            form = None if module is None else fused_experts(module)
            if form is None or param not in (form.up, form.down):
                continue
            n = (2 if form.gated else 1) * form.intermediate_size
            down = param == form.down
            sizes = (form.hidden_size, form.intermediate_size) if down else (n, form.hidden_size)
            _check_shape(target.ref, (form.num_experts, *sizes))
            self.targets.setdefault(path, {})["down" if down else "up"] = target
            plan.experts[path] = form
            return name
        return None

    def _rows(self, model: nn.Module, plan: ModelPlan, quantized: dict[str, list[str]]) -> None:
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2 or (name.endswith("_bias") and name.rpartition(".")[0] in plan.experts):
                plan.other += tensor.numel()
                continue
            done = name in quantized
            role = classify(name)
            ref = self._ref(name) if done else None
            plan.rows.append(
                Covered(
                    name,
                    tensor.numel(),
                    None if ref is None or ref.format is None else ref.format.name,
                    "" if done else "in full precision in the checkpoint",
                    role.kind in ("expert", "fused_expert"),
                )
            )

    def _ref(self, name: str) -> WeightRef:
        path, _, param = name.rpartition(".")
        if path in self.linears:
            return self.linears[path]
        return self.targets[path]["down" if param == "down_proj" else "up"].ref

    def _missing(self) -> list[str]:
        half = [
            f"{m}.{s.form.up if 'down' in found else s.form.down}"
            for m, found in self.targets.items()
            if len(found) == 1
            for s in (self.fused_sources[m],)
        ]
        return [*half, *(n for n in super()._missing() if n not in half)]

    def linear(self, module: str) -> MxLinear:
        """The layer around a quantized weight of the checkpoint."""
        ref = self.linears[module]
        activation = self.plan.scheme.activation
        layout = self.checkpoint.layout
        assert layout is not None
        scale = self._input_scale(layout.read_input_scale(ref, self.reader.get), activation)
        q = replace(self.checkpoint.read(ref.name).to(self.device), dtype=self.state[f"{module}.weight"].dtype)
        return MxLinear.from_quantized(q, self.bias(module), activation, input_scale=scale)

    def fused(self, module: str) -> ExpertWeights:
        """The experts of a module, joined where the checkpoint has them one by one."""
        form, down = self.fused_sources[module].form, self.targets[module]["down"]
        activation = self.plan.scheme.activation
        w = read_experts(self.checkpoint, classify(down.sources[0]).experts, device=self.device)
        dtype = self.state[f"{module}.{form.down}"].dtype
        assert isinstance(w.w13, QuantizedTensor)
        assert isinstance(w.w2, QuantizedTensor)
        return ExpertWeights(
            replace(w.w13, dtype=dtype),
            replace(w.w2, dtype=dtype),
            None if w.w13_bias is None else w.w13_bias.to(dtype),
            None if w.w2_bias is None else w.w2_bias.to(dtype),
            activation,
            self._input_scale(w.w13_input_scale, activation),
            self._input_scale(w.w2_input_scale, activation),
        )

    def _input_scale(self, scale: Tensor | None, activation: Format | None) -> Tensor | None:
        return (
            scale.to(self.device)
            if scale is not None and activation is not None and activation.has_global_scale
            else None
        )


def _check_shape(ref: WeightRef, shape: tuple[int, ...]) -> None:
    if tuple(ref.shape) != shape:
        raise ValueError(f"{ref.name} has shape {tuple(ref.shape)} in the checkpoint, the model needs {shape}")
