"""Which modules of a model are quantized, decided before anything is done: linear layers and fused experts.

Whatever stays in full precision has a reason, and expert weights do only where the caller names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mx_kernels import Format

from .coverage import Coverage, Covered
from .experts import check_expert_sizes
from .linear import MxLinear
from .plan import matches
from .scheme import Scheme


@dataclass(frozen=True)
class FusedExperts:
    """How a module stores fused experts: names of its parameters, and their form.

    transposed: K first, [E, H, 2I] and [E, I, H]. interleaved: gate and up rows alternate.
    """

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    transposed: bool
    interleaved: bool
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return tuple(n for n in (self.up, self.down, self.up_bias, self.down_bias) if n is not None)


@dataclass
class ModelPlan:
    """What will be done to a model, by module name; nothing in it keeps a weight alive."""

    scheme: Scheme
    linears: dict[str, tuple[str, ...]] = field(default_factory=dict)  # first name -> every name of that module
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    rows: list[Covered] = field(default_factory=list)
    other: int = 0
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def coverage(self) -> Coverage:
        """The coverage once the plan is carried out."""
        return Coverage(self.scheme, tuple(self.rows), self.other)


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """The form of a module of fused experts, from its parameters and transformers' flags; None for any other module.

    ValueError where its shapes fit neither [E, 2I, H] and [E, H, I] nor their transposes.
    """
    params = {n: p for n, p in module._parameters.items() if p is not None}
    up = next((n for n in ("gate_up_proj", "up_proj") if n in params and params[n].ndim == 3), None)
    if up is None or "down_proj" not in params or params["down_proj"].ndim != 3 or "gate_proj" in params:
        return None
    a, b = params[up].shape, params["down_proj"].shape
    factor = 2 if up == "gate_up_proj" else 1
    canonical = a[2] == b[1] and a[1] == factor * b[2]
    swapped = a[1] == b[2] and a[2] == factor * b[1]
    transposed = bool(getattr(module, "is_transposed", swapped and not canonical))
    if a[0] != b[0] or not (swapped if transposed else canonical):
        wanted = "[E, H, 2I] and [E, I, H]" if transposed else "[E, 2I, H] and [E, H, I]"
        raise ValueError(f"{up} {tuple(a)} and down_proj {tuple(b)} are not {wanted}")
    hidden, intermediate = (b[2], b[1]) if transposed else (b[1], b[2])
    up_bias, down_bias = (n if n in params else None for n in (f"{up}_bias", "down_proj_bias"))
    interleaved = factor == 2 and not getattr(module, "is_concatenated", True)
    return FusedExperts(
        up, "down_proj", up_bias, down_bias, transposed, interleaved, a[0], hidden, intermediate, factor == 2
    )


def plan_model(
    model: nn.Module, scheme: Scheme, include: Sequence[str], skip: Sequence[str], experts: bool
) -> ModelPlan:
    """Decide module by module, and refuse before anything is done: see ``quantize_model``. ``experts``: there is a factory for them."""
    if isinstance(include, str) or isinstance(skip, str):
        raise TypeError("include and skip are sequences of patterns, not one string: write skip=('lm_head',)")
    plan = ModelPlan(scheme)
    names: dict[int, list[str]] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        for p, tensor in module._parameters.items():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(_join(name, p))
    plan.aliases = {found[0]: tuple(found) for found in names.values()}
    for pattern in include:
        if not any(matches(n, (pattern,)) for n in plan.aliases):
            raise ValueError(f"include {pattern!r} matches no module of {type(model).__name__}")
    problems: list[str] = []
    lost: list[Covered] = []
    for name, module in model.named_modules():
        _plan_module(plan, name, module, owners, include, skip, experts, problems, lost)
    if problems:
        raise ValueError(
            _listed(f"{len(problems)} weights cannot be quantized to {scheme}", problems, "skip them by name")
        )
    if lost:
        count, share = len(lost), 100 * sum(r.numel for r in lost) / max(1, plan.coverage().numel)
        found = [f"{r.name}: {r.reason}" for r in lost]
        text = f"{count} expert weights ({share:.0f}% of all parameters) would stay in full precision"
        raise ValueError(_listed(text, found, "if that is intended, name them in skip"))
    if not plan.linears and not plan.experts:
        raise ValueError(
            f"{type(model).__name__} has no weight to quantize: no nn.Linear and no experts that include and skip leave"
        )
    return plan


def _plan_module(
    plan: ModelPlan,
    name: str,
    module: nn.Module,
    owners: dict[int, list[str]],
    include: Sequence[str],
    skip: Sequence[str],
    experts: bool,
    problems: list[str],
    lost: list[Covered],
) -> None:
    pattern = matches(name, skip)
    reason = f"skipped by {pattern!r}" if pattern else ""
    if not reason and include and matches(name, include) is None:
        reason = "not in include"
    form: FusedExperts | None = None
    why = ""
    try:
        form = fused_experts(module)
    except ValueError as e:
        why = str(e)
    f = plan.scheme.weight
    if isinstance(module, MxLinear):
        plan.rows.append(Covered(f"{name}.weight", module.quantized.shape.numel(), module.quantized.format.name))
    taken = form is not None or type(module) is nn.Linear
    if taken and not reason:
        if form is not None and not experts:
            reason = "no experts factory was given (experts=...)"
        else:
            trouble = list(_trouble(name, module, form, owners, f))
            problems += trouble
            if form is not None:
                plan.experts[name] = form
            else:
                plan.linears[name] = plan.aliases[name]
    elif not taken and not reason:
        reason = why or _why_not(module)
    weights = {"weight"} if form is None else {form.up, form.down}
    for p, tensor in module._parameters.items():
        if tensor is None or owners[id(tensor)][0] != _join(name, p):
            continue
        if tensor.ndim < 2 or (form is not None and p not in weights):
            plan.other += tensor.numel()
            continue
        full = _join(name, p)
        expert = form is not None or bool(why) or _is_expert(full, module, tensor)
        done = (name in plan.linears or name in plan.experts) and p in weights
        row = Covered(full, tensor.numel(), f.name if done else None, "" if done else reason, expert)
        plan.rows.append(row)
        if expert and not done and pattern is None and matches(full, skip) is None:
            lost.append(row)


def _trouble(
    name: str, module: nn.Module, form: FusedExperts | None, owners: dict[int, list[str]], format: Format
) -> Iterator[str]:
    """Everything that keeps this module from being quantized."""
    if not name:
        yield f"the model is itself a {type(module).__name__}: use MxLinear.from_linear or quantize_experts"
    for p in ("weight",) if form is None else (form.up, form.down):
        tensor = getattr(module, p)
        others = [n for n in owners[id(tensor)] if n != _join(name, p)]
        if others:
            yield f"{_join(name, p)} is shared with {', '.join(others)}"
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{_join(name, p)} is {tensor.dtype}, needs bfloat16, float16 or float32 to be quantized")
    try:
        if form is None:
            format.check_k(module.in_features, f"in_features of {name}")  # type: ignore[arg-type]
        else:
            check_expert_sizes(form.num_experts, form.hidden_size, form.intermediate_size, format)
    except ValueError as e:
        yield str(e) if form is None else f"{name}: {e}"
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        yield f"{name} has forward hooks, which its replacement would not have: remove them first"


def _why_not(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear, whose forward is not known"
    return f"{type(module).__name__} is neither an nn.Linear nor experts of a known form"


def _is_expert(name: str, module: nn.Module, tensor: Tensor) -> bool:
    """Whether this is a weight of experts: by its name, or one matrix for each of several. Not a kernel, nor a [1, N, D] embedding."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return "experts" in name.split(".") or (tensor.ndim == 3 and min(tensor.shape) > 1)


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _listed(text: str, items: Sequence[str], advice: str) -> str:
    more = f"; and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{text}: {'; '.join(items[:5])}{more}. To go on, {advice}"
