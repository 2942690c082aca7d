"""Quantized checkpoints of every layout as transformers models whose experts run on our backends.

Experts go from the files to QuantizedTensor to the backend and are never held in full precision; quantized linear layers are
dequantized; the rest is loaded as it is. The modelling code is transformers', the reading of the layout is mx_quant's, so layouts
that transformers does not read (ModelOpt, Quark, NVFP4 experts) work too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mx_kernels as mk
import mx_quant as mq

from ..oracle import make_experts
from .transformers import ExpertsReport, attach, expert_elements, expert_modules, experts_activation, layer_of

_RENAMES = ((".mlp.", ".block_sparse_moe."),)  # Mixtral and MiniMax-M2: name in the model, name on disk


def load_quantized(
    checkpoint: str | os.PathLike[str],
    *,
    backend: str = "auto",
    inputs: str | None = "scheme",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Any, ExpertsReport]:
    """The causal language model of a checkpoint folder, in evaluation mode, and what runs its experts.

    backend, inputs: as for ``make_experts``. device: where everything goes (None: the CPU).

    Raises ImportError without transformers, FileNotFoundError without the folder, ValueError for layouts and configurations
    that mx_quant refuses, for experts that the checkpoint lacks, and naming tensors that are missing.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a transformers checkpoint")
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with mq.meta_parameters():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    where = torch.device(device or "cpu")
    with mq.Checkpoint(folder) as ck:
        report = _load_experts(model, ck, backend, inputs, where, progress)
        _load_rest(model, ck, where)
    return model.to(where).eval(), report


def _load_experts(
    model: nn.Module, ck: mq.Checkpoint, backend: str, inputs: str | None, device: torch.device, progress: bool
) -> ExpertsReport:
    stored = set(mq.expert_layers(ck))
    modules = list(expert_modules(model))
    names = {}
    for name, _ in modules:
        found = next((n for n in _on_disk(name) if n in stored), None)
        if found is None:
            raise ValueError(
                f"{ck.reader.folder} has no experts for {name}; it has {', '.join(sorted(stored)) or 'none'}"
            )
        names[name] = found
    shown: Any = modules
    if progress:
        from tqdm import tqdm

        shown = tqdm(modules, desc="load experts", unit="layer", leave=False)
    layers, formats = [], set()
    for name, module in shown:
        activation, elements = experts_activation(module), expert_elements(module)
        dtype = next(module.parameters()).dtype
        weights = mq.read_experts(ck, names[name], device=device)
        experts = make_experts(weights, activation, backend=backend, inputs=inputs, dtype=dtype)
        attach(module, experts)
        formats.add("bf16" if weights.format is None else weights.format.name)
        layers.append(layer_of(name, experts, elements))
    return ExpertsReport(" and ".join(sorted(formats)), tuple(layers))


def _load_rest(model: nn.Module, ck: mq.Checkpoint, device: torch.device) -> None:
    """Every other parameter and buffer, by its name; tied ones once."""
    state: dict[str, Tensor] = {}
    for name, target in model.state_dict(keep_vars=True).items():
        value = next((v for n in _on_disk(name) if (v := _tensor(ck, n)) is not None), None)
        if value is None:
            continue
        if value.shape != target.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in {ck.reader.folder}, the model needs {tuple(target.shape)}"
            )
        state[name] = value.to(device, target.dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, t in model.state_dict(keep_vars=True).items() if t.is_meta]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{ck.reader.folder} lacks {', '.join(missing[:5])}{more}: the checkpoint is not complete")


def _tensor(ck: mq.Checkpoint, name: str) -> Tensor | None:
    """A tensor of the checkpoint in full precision, or None."""
    if name in ck.weights:
        return mk.dequantize(ck.read(name))
    return ck.reader.get(name) if name in ck.infos else None


def _on_disk(name: str) -> tuple[str, ...]:
    return (name, *(name.replace(here, there) for here, there in _RENAMES if here in name))
