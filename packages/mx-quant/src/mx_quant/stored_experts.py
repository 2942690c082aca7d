"""The experts of one layer of a checkpoint, stored in any layout, as ExpertWeights.

Codes and scales are moved, never recomputed. Experts stored one by one are fused, gate rows before up rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import QuantizedTensor

from .convert import Checkpoint
from .experts import ExpertWeights
from .layouts import (
    FUSED,
    Target,
    WeightRef,
    assemble,
    assemble_input_scale,
    assemble_plain,
    classify,
    regroup,
)

_KINDS = ("expert", "fused_expert", "expert_bias", "fused_bias")


def expert_layers(checkpoint: Checkpoint) -> list[str]:
    """The names that stand before an expert's number or projection, such as "model.layers.0.mlp.experts", in order."""
    refs = (*checkpoint.weights.values(), *checkpoint.plain.values())
    return list(dict.fromkeys(classify(r.name).experts for r in refs if r.kind in _KINDS))


def read_experts(checkpoint: Checkpoint, experts: str, *, device: torch.device | str | None = None) -> ExpertWeights:
    """The experts of the layer named ``experts`` (one of ``expert_layers``), quantized or plain as they are stored.

    NVFP4 weights that carry input scales get ``input_format`` NVFP4. Raises ValueError for an unknown name, for experts of
    which some are quantized and some are not, and for what the layout refuses.
    """
    found = [
        r for r in (*checkpoint.weights.values(), *checkpoint.plain.values())
        if r.kind in _KINDS and classify(r.name).experts == experts
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"{checkpoint.reader.folder} has no experts named {experts!r}; there are {', '.join(expert_layers(checkpoint)) or 'none'}"
        )
    targets = {_part(t.ref): t for t in regroup(found, FUSED, checkpoint.family)}
    up = next((part for part in ("gate_up", "up") if part in targets), None)
    if up is None or "down" not in targets:
        raise ValueError(f"{experts} holds {', '.join(sorted(targets))}: needs gate and up (or up alone) and down")
    scales = [_input_scale(checkpoint, targets[part]) for part in (up, "down")]
    weights = ExpertWeights(
        _weight(checkpoint, targets[up]),
        _weight(checkpoint, targets["down"]),
        _bias(checkpoint, targets.get(up + "_bias")),
        _bias(checkpoint, targets.get("down_bias")),
        mk.NVFP4 if any(s is not None for s in scales) else None,
        *scales,
    )
    return weights if device is None else weights.to(device)


def _part(ref: WeightRef) -> str:
    return classify(ref.name).part + ("_bias" if ref.kind.endswith("bias") else "")


def _weight(checkpoint: Checkpoint, target: Target) -> Tensor | QuantizedTensor:
    names = target.sources
    quantized = [n for n in names if n in checkpoint.weights]
    if not quantized:
        return assemble_plain(target, checkpoint.read_plain)
    if len(quantized) < len(names):
        bare = next(n for n in names if n not in checkpoint.weights)
        raise ValueError(
            f"{target.ref.name}: {bare} is in full precision and {quantized[0]} is quantized: both need one format"
        )
    return assemble(target, checkpoint.read)


def _bias(checkpoint: Checkpoint, target: Target | None) -> Tensor | None:
    return None if target is None else assemble_plain(target, checkpoint.read_plain)


def _input_scale(checkpoint: Checkpoint, target: Target) -> Tensor | None:
    layout = checkpoint.layout
    if layout is None or any(n not in checkpoint.weights for n in target.sources):
        return None

    def read(name: str, expert: int | None) -> Tensor | None:
        return layout.read_input_scale(checkpoint.weights[name], checkpoint.reader.get, expert=expert)

    return assemble_input_scale(target, read)
