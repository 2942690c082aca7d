"""Quantize a model in memory, or while it is loaded: one weight in full precision at a time.

``quantize_model`` replaces the ``nn.Linear`` modules and fused experts of a model. ``load_online`` does the same to a model
whose weights are still on disk: each is read, quantized and dropped before the next is read.

Fused experts (transformers 5: ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] in one module, in gpt-oss transposed and
interleaved) become ``ExpertWeights``. What runs them is not of this package, so it is injected: ``experts(name, module, weights)``
returns the module to put in place of ``module`` (or ``module`` itself, changed).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mx_kernels import Format

from .checks import check_finite
from .coverage import Coverage
from .experts import ExpertWeights, quantize_experts
from .linear import MxLinear
from .load import Loader
from .model_plan import FusedExperts, ModelPlan, plan_model
from .scheme import Scheme, get_scheme
from .shards import ShardReader

DEFAULT_SKIP = ("lm_head", "*.router", "*.router.*", "*.gate", "*.shared_expert_gate")
ExpertsFactory = Callable[[str, nn.Module, ExpertWeights], nn.Module]


def quantize_model(
    model: nn.Module,
    scheme: Scheme | Format | str,
    *,
    include: Sequence[str] = (),
    skip: Sequence[str] = DEFAULT_SKIP,
    experts: ExpertsFactory | None = None,
    progress: bool = False,
) -> Coverage:
    """Replace the linear layers and fused experts of ``model``, in place, by quantized ones; returns what share was covered.

    Each source weight is released before the next is quantized, and none is changed.

    Args:
        include: shell patterns of module names (full, or their last part); empty is every module. skip: those left as they are.
        experts: makes the module that runs fused experts, from (name, module, ExpertWeights).
        progress: show a bar.

    Before anything is replaced: ValueError for weights that do not fit the format or are not finite, for weights shared with
    other modules, for patterns of ``include`` that match nothing, and for *expert weights that would stay in full precision
    without being named in* ``skip``; TypeError for other dtypes than bf16, fp16 and fp32.
    """
    plan = plan_model(model, get_scheme(scheme), include, skip, experts is not None)
    for name in plan.linears:
        check_finite(f"{name}.weight", _loaded(f"{name}.weight", model.get_submodule(name).weight))  # type: ignore[arg-type]
    for name, form in plan.experts.items():
        for p in form.names:
            check_finite(f"{name}.{p}", _loaded(f"{name}.{p}", getattr(model.get_submodule(name), p)))
    # experts first: a factory that refuses them does so before anything is replaced
    for name in _bar((*plan.experts, *plan.linears), plan.scheme, progress):
        source = model.get_submodule(name)
        if name in plan.experts:
            assert experts is not None
            weights = _quantize_fused(name, source, plan.experts[name], plan.scheme)
            _replace(model, plan, name, _made(experts(name, source, weights), name, plan.experts[name]))
        else:
            assert isinstance(source, nn.Linear)
            _replace(model, plan, name, MxLinear.from_linear(source, plan.scheme, name=f"{name}.weight"))
        del source
    return _finish(model, plan)


def load_online(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    scheme: Scheme | Format | str,
    *,
    include: Sequence[str] = (),
    skip: Sequence[str] = DEFAULT_SKIP,
    experts: ExpertsFactory | None = None,
    ignore: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> nn.Module:
    """Load a safetensors checkpoint in full precision into ``model`` and quantize it on the way; returns ``model``.

    ``model`` is best built under ``meta_parameters()``, so that its weights take no memory. Weights that are quantized are
    read one at a time (fused experts: one expert at a time) and never two are held in full precision; what is not quantized
    (embeddings, norms, ``skip``) is loaded in the model's own dtype. Experts that the checkpoint stores one by one are fused.
    ``model.mx_coverage`` then says what share is quantized.

    Args:
        include, skip, experts, progress: as in ``quantize_model``.
        ignore: shell patterns of checkpoint tensors that the model does not have.
        rename: the model's name of a checkpoint's tensor, where they differ.
        device: where everything goes (None: the CPU).

    Before anything is replaced: ValueError for missing and unexpected tensors, shapes, buffers without values, and all that
    ``quantize_model`` refuses; TypeError for dtypes. A weight that is not finite raises when it is read, naming it.
    """
    if callable(getattr(model, "tie_weights", None)):
        model.tie_weights()  # type: ignore[operator]
    plan = plan_model(model, get_scheme(scheme), include, skip, experts is not None)
    with ShardReader(checkpoint) as reader:
        loader = Loader(model, plan, reader, ignore=ignore, rename=rename, device=torch.device(device or "cpu"))
        return carry_out(model, loader, experts, progress)


def carry_out(model: nn.Module, loader: Loader, experts: ExpertsFactory | None, progress: bool) -> nn.Module:
    """Do the loader's jobs one after another: replace what is quantized, keep the rest; returns ``model``."""
    plan = loader.plan
    for job in _bar(loader.jobs, plan.scheme, progress):
        if job in plan.linears:
            _replace(model, plan, job, loader.linear(job))
        elif job in plan.experts:
            assert experts is not None
            source, weights = model.get_submodule(job), loader.fused(job)
            _replace(model, plan, job, _made(experts(job, source, weights), job, plan.experts[job]))
            del source, weights
        else:
            loader.keep(job)
    _finish(model, plan)
    return model


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built in this context have their parameters on the meta device and their buffers where they belong.

    For ``load_online``: unlike ``torch.device("meta")``, buffers that no checkpoint holds (rotary frequencies) keep their
    values. Say the dtype when building (``from_config(config, dtype=torch.bfloat16)``): ``model.to(dtype)`` casts buffers too.
    Changes ``nn.Module`` for all threads while it lasts.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _quantize_fused(name: str, module: nn.Module, form: FusedExperts, scheme: Scheme) -> ExpertWeights:
    w13, w2, b13, b2 = (
        None if p is None else getattr(module, p).detach() for p in (form.up, form.down, form.up_bias, form.down_bias)
    )
    assert w13 is not None
    assert w2 is not None
    if form.transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    layout = "interleaved" if form.interleaved else "concatenated"
    return quantize_experts(w13, w2, scheme, w13_bias=b13, w2_bias=b2, layout=layout, name=name)


def _made(module: Any, name: str, form: FusedExperts) -> nn.Module:
    """What the factory returned, if it is a module that has let go of the source weights."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"experts(...) returned {type(module).__name__} for {name}, needs an nn.Module")
    kept = [n for n in form.names if isinstance(module._parameters.get(n), Tensor)]
    if kept:
        raise ValueError(
            f"experts(...) returned a module for {name} that still has {', '.join(kept)} in full precision"
        )
    return module


def _replace(model: nn.Module, plan: ModelPlan, name: str, new: nn.Module) -> None:
    old = model.get_submodule(name)
    new.train(old.training)
    for alias in plan.aliases[name]:
        parent, _, last = alias.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def _finish(model: nn.Module, plan: ModelPlan) -> Coverage:
    found = plan.coverage()
    model.mx_coverage = found  # type: ignore[assignment]
    return found


def _loaded(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: use load_online")
    return tensor.detach()


def _bar(names: Sequence[str], scheme: Scheme, progress: bool) -> Iterable[str]:
    if not progress:
        return names
    from tqdm import tqdm

    return tqdm(names, desc=f"quantize to {scheme}", unit="module")  # type: ignore[no-any-return]
