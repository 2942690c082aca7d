"""Where each tensor of a checkpoint belongs in a model, and reading it there: the second half of ``load_online``.

Everything is decided and checked from headers before a byte of data is read. A model's fused experts may be on disk as they
are in memory, or one by one (``experts.3.gate_proj.weight``, ``experts.3.w1.weight``); then they are fused on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .checks import SOURCE_DTYPES, check_dtype, joint_global_scale, quantize_finite
from .experts import ExpertBuilder, ExpertWeights, deinterleave, interleave
from .layouts import classify
from .linear import MxLinear
from .model_plan import FusedExperts, ModelPlan, fused_experts
from .plan import matches
from .shards import ShardReader


@dataclass
class _Sources:
    """Names on disk of one module of fused experts: whole parameters by their name, or matrices by (expert, part)."""

    form: FusedExperts
    whole: dict[str, str] = field(default_factory=dict)
    weights: dict[tuple[int, str], str] = field(default_factory=dict)
    biases: dict[tuple[int, str], str] = field(default_factory=dict)

    def all(self) -> Iterator[str]:
        """Every name on disk."""
        yield from (*self.whole.values(), *self.weights.values(), *self.biases.values())


class Loader:
    """Reads a checkpoint into a model as its plan says. ``jobs``: names of modules and tensors, in the order of the files."""

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        reader: ShardReader,
        *,
        ignore: Sequence[str] = (),
        rename: Callable[[str], str] | None = None,
        device: torch.device,
        quantized: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """``quantized``: what a quantized checkpoint brings, name of a model's weight -> names on disk; not for this class to read."""
        self.model, self.plan, self.reader, self.device = model, plan, reader, device
        self.rename = rename
        self.quantized: Mapping[str, Sequence[str]] = dict(quantized or {})
        self.state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        groups: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            groups.setdefault(id(tensor), []).append(name)
        self.ties = {n: tuple(group) for group in groups.values() for n in group}
        self.on_disk: dict[str, list[str]] = {}  # first name of tied ones -> names on disk
        self.fused_sources: dict[str, _Sources] = {}
        for name, module in model.named_modules():
            form = plan.experts.get(name) or _form(module)
            if form is not None:
                self.fused_sources[name] = _Sources(form)
        self._check_buffers()
        taken = {n for names in self.quantized.values() for n in names}
        unexpected = [n for n in reader.names if n not in taken and not self._place(n) and matches(n, ignore) is None]
        missing = self._missing()
        if missing or unexpected:
            raise ValueError(_disagree(type(model).__name__, str(reader.folder), missing, unexpected))
        self._check_tensors()
        self.jobs = self._order()

    def _check_buffers(self) -> None:
        lost = [n for n, b in self.model.named_buffers() if b.is_meta and n not in self.state]
        if lost:
            raise ValueError(
                f"{len(lost)} buffers are on the meta device and in no checkpoint, the first is {lost[0]}: build the model "
                f"under mx_quant.meta_parameters(), which leaves buffers their values"
            )

    def _place(self, name: str) -> bool:
        """Note where the tensor ``name`` of the checkpoint goes; False where the model has no place for it."""
        candidates = model_names(name, self.rename)
        for candidate in candidates:
            if candidate in self.state:
                module, _, last = candidate.rpartition(".")
                sources = self.fused_sources.get(module)
                if sources is not None and last in sources.form.names:
                    _once(sources.whole, last, name)
                else:
                    self.on_disk.setdefault(self.ties[candidate][0], []).append(name)
                return True
        for candidate in candidates:
            role = classify(candidate)
            sources = self.fused_sources.get(role.experts)
            if sources is None or role.expert is None or role.expert >= sources.form.num_experts:
                continue
            if role.part not in (("gate", "up", "gate_up", "down") if sources.form.gated else ("up", "down")):
                continue
            bias = role.kind == "expert_bias"
            if bias and (sources.form.down_bias if role.part == "down" else sources.form.up_bias) is None:
                continue
            _once(sources.biases if bias else sources.weights, (role.expert, role.part), name)
            return True
        return False

    def _missing(self) -> list[str]:
        missing = []
        owned = {f"{m}.{p}" for m, s in self.fused_sources.items() for p in s.form.names}
        for name, tied in self.ties.items():
            if name == tied[0] and name not in self.on_disk and name not in owned and self._needed(name):
                missing.append(name)
        for module, s in self.fused_sources.items():
            f = s.form
            for param, found in (
                (f.up, s.weights),
                (f.down, s.weights),
                (f.up_bias, s.biases),
                (f.down_bias, s.biases),
            ):
                if param is None:
                    continue
                parts = _parts(param, f)
                single = [n for (_, part), n in found.items() if part in parts or (part == "gate_up" and "up" in parts)]
                if param in s.whole or f"{module}.{param}" in self.quantized:
                    if single:
                        raise ValueError(
                            f"the checkpoint holds {module}.{param} both whole and as {single[0]}: which is right?"
                        )
                    continue
                lost = [
                    f"{module}.{e}.{part}"
                    for e in range(f.num_experts)
                    for part in parts
                    if (e, part) not in found and not (part != "down" and (e, "gate_up") in found)
                ]
                # nothing of this parameter is there one by one: it is the parameter that is missing
                missing += lost if len(lost) < f.num_experts * len(parts) else [f"{module}.{param}"]
        return missing

    def _needed(self, name: str) -> bool:
        """False for what comes quantized, and for what a quantized module keeps (an MxLinear of an earlier run has its weights)."""
        module, _, _ = name.rpartition(".")
        return name not in self.quantized and not isinstance(self.model.get_submodule(module), MxLinear)

    def _check_tensors(self) -> None:
        for name, files in self.on_disk.items():
            for file in files:
                self._check(file, tuple(self.state[name].shape), self.state[name].dtype)
        for module, s in self.fused_sources.items():
            f = s.form
            owner = self.model.get_submodule(module)
            for param, file in s.whole.items():
                tensor: Tensor = getattr(owner, param)
                self._check(file, tuple(tensor.shape), tensor.dtype)
            h, i = f.hidden_size, f.intermediate_size
            for (e, part), file in s.weights.items():
                if part == "gate_up" and (other := s.weights.get((e, "gate")) or s.weights.get((e, "up"))):
                    raise ValueError(
                        f"the checkpoint holds one weight twice, as {file} and as {other}: which is right?"
                    )
                self._check(file, {"down": (h, i), "gate_up": (2 * i, h)}.get(part, (i, h)), torch.bfloat16)
            for (_, part), file in s.biases.items():
                self._check(file, ({"down": h, "gate_up": 2 * i}.get(part, i),), torch.bfloat16)

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        info = self.reader.info(name)
        if dtype in SOURCE_DTYPES:
            check_dtype(name, torch.empty(0, dtype=info.torch_dtype))
        elif info.torch_dtype != dtype:
            raise TypeError(f"{name} is {info.torch_dtype} in the checkpoint, needs {dtype}")
        if info.torch_shape != shape:
            raise ValueError(f"{name} has shape {info.torch_shape} in the checkpoint, the model needs {shape}")

    def _order(self) -> list[str]:
        position = {n: i for i, n in enumerate(self.reader.names)}
        first: dict[str, int] = {}
        for name, files in self.on_disk.items():
            module = name.rpartition(".")[0]
            job = module if module in self.plan.linears else name
            first[job] = min(first.get(job, len(position)), *(position[f] for f in files))
        for name, stored in self.quantized.items():
            module = name.rpartition(".")[0]
            first[module] = min(first.get(module, len(position)), *(position[f] for f in stored))
        for module, s in self.fused_sources.items():
            if module in self.plan.experts:
                first[module] = min((position[n] for n in s.all()), default=first.get(module, 0))
            else:
                for param in s.form.names:
                    first[f"{module}.{param}"] = min(position[n] for n in s.all())
        return sorted(first, key=first.__getitem__)

    def linear(self, module: str) -> MxLinear:
        """The quantized layer in place of an ``nn.Linear``."""
        name = self.on_disk[f"{module}.weight"][0]
        scheme = self.plan.scheme
        q = quantize_finite(name, self.reader.read(name).to(self.device), scheme.weight, rule=scheme.rule)
        return MxLinear.from_quantized(q, self.bias(module), scheme.activation)

    def bias(self, module: str) -> Tensor | None:
        """The bias of a linear layer, if it has one."""
        return self._read(f"{module}.bias") if f"{module}.bias" in self.on_disk else None

    def fused(self, module: str) -> ExpertWeights:
        """The quantized experts of a module, read one expert (or one matrix) at a time."""
        s = self.fused_sources[module]
        f, scheme = s.form, self.plan.scheme
        dtype = self.reader.info(next(s.all())).torch_dtype
        builder = ExpertBuilder(
            f.num_experts,
            f.hidden_size,
            f.intermediate_size,
            scheme,
            gated=f.gated,
            dtype=dtype,
            device=self.device,
        )
        layout = "interleaved" if f.interleaved else "concatenated"
        for param, part in ((f.up, "gate_up" if f.gated else "up"), (f.down, "down")):
            if param in s.whole:
                for e in range(f.num_experts):
                    builder.put(e, part, self._slice(s, param, e), name=f"{s.whole[param]}[{e}]", layout=layout)
        joint: dict[int, Tensor] = {}  # one global scale for gate and up of an expert, found by reading both first
        for (e, part), name in s.weights.items():
            shares = part in ("gate", "up") and f.gated and scheme.weight.has_global_scale
            if shares and e not in joint:
                joint[e] = self._joint(s, e)
            g = joint[e] if shares else None
            builder.put(e, part, self.reader.read(name), name=name, global_scale=g)
        owner = self.model.get_submodule(module)
        biases = []
        for bias in (f.up_bias, f.down_bias):
            b = None if bias is None else self._bias(s, bias, getattr(owner, bias).dtype)
            biases.append(deinterleave(b, 1) if b is not None and bias == f.up_bias and f.interleaved else b)
        return builder.build(*biases)

    def _slice(self, s: _Sources, param: str, expert: int) -> Tensor:  # [N, K]
        x = self.reader.get(s.whole[param], expert)
        return x.T if s.form.transposed else x

    def _joint(self, s: _Sources, expert: int) -> Tensor:
        names = (s.weights[expert, "gate"], s.weights[expert, "up"])
        return joint_global_scale((n, self.reader.read(n)) for n in names)

    def _bias(self, s: _Sources, param: str, dtype: torch.dtype) -> Tensor:  # [E, N], as the module stores it
        if param in s.whole:
            return self.reader.read(s.whole[param]).to(self.device, dtype)
        rows = [self._joined(s.biases, param, s.form, e) for e in range(s.form.num_experts)]
        b = torch.stack(rows).to(self.device, dtype)
        return interleave(b, 1) if s.form.interleaved and param == s.form.up_bias else b

    def _joined(self, found: dict[tuple[int, str], str], param: str, form: FusedExperts, expert: int) -> Tensor:
        if param in (form.up, form.up_bias) and (expert, "gate_up") in found:
            return self.reader.read(found[expert, "gate_up"])
        return torch.cat([self.reader.read(found[expert, part]) for part in _parts(param, form)])

    def keep(self, name: str) -> None:
        """Load a tensor as it is, in the model's dtype, under each of the names that share it."""
        module, _, last = name.rpartition(".")
        s = self.fused_sources.get(module)
        value = self._read(name) if s is None or last not in s.form.names else self._keep_fused(s, name, last)
        old = self.state[name]
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        for tied in self.ties[name]:
            path, _, leaf = tied.rpartition(".")
            owner = self.model.get_submodule(path)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = value  # type: ignore[assignment]

    def _keep_fused(self, s: _Sources, name: str, param: str) -> Tensor:
        dtype = self.state[name].dtype
        if param in (s.form.up_bias, s.form.down_bias):
            return self._bias(s, param, dtype)
        if param in s.whole:
            return self.reader.read(s.whole[param]).to(self.device, dtype)
        out = torch.empty(self.state[name].shape, dtype=dtype, device=self.device)
        for e in range(s.form.num_experts):
            x = self._joined(s.weights, param, s.form, e)
            if s.form.interleaved and param == s.form.up:
                x = interleave(x, 0)
            out[e].copy_(x.T if s.form.transposed else x)
        return out

    def _read(self, name: str) -> Tensor:
        """A tensor in the model's dtype; ValueError where names that the model ties differ in the checkpoint."""
        first, *others = self.on_disk[name]
        x = self.reader.read(first)
        for other in others:
            if not torch.equal(x, self.reader.read(other)):
                raise ValueError(f"{first} and {other} are one tensor in the model but differ in the checkpoint")
        return x.to(self.device, self.state[name].dtype)


def model_names(name: str, rename: Callable[[str], str] | None) -> tuple[str, ...]:
    """What a tensor of a checkpoint may be called in a model: renamed, and Mixtral's and MiniMax's MoE block under its name there."""
    found = rename(name) if rename is not None else name
    return tuple(dict.fromkeys((found, found.replace(".block_sparse_moe.", ".mlp."))))


def _once(found: dict[Any, str], key: Any, name: str) -> None:
    if key in found:
        raise ValueError(f"the checkpoint holds one weight twice, as {found[key]} and as {name}: which is right?")
    found[key] = name


def _form(module: Any) -> FusedExperts | None:
    try:
        return fused_experts(module)
    except ValueError:  # of an unknown form: its parameters are kept as they are (plan_model has let it pass by name)
        return None


def _parts(param: str, form: FusedExperts) -> tuple[str, ...]:
    if param in (form.down, form.down_bias):
        return ("down",)
    return ("gate", "up") if form.gated else ("up",)


def _disagree(model: str, folder: str, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    parts = []
    for names, what, advice in (
        (missing, f"does not have {len(missing)} tensors that {model} needs", "rename maps names that differ"),
        (unexpected, f"has {len(unexpected)} tensors that {model} does not", "ignore leaves tensors out"),
    ):
        if names:
            more = f", and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{what}: {', '.join(names[:5])}{more} ({advice})")
    return f"{folder} {'; it '.join(parts)}"
