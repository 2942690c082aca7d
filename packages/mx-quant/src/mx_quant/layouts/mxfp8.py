"""``quant_method: "mxfp8"`` (MiniMax style, fine-grained): MXFP8 E4M3 weights with one E8M0 byte per 32 columns.

``weight`` float8_e4m3fn [N, K] and ``weight_scale_inv`` uint8 [N, K/32], which is the multiplier in spite of its name (layout ``mxfp8``:
transformers, SGLang), or ``weight_scale`` (layout ``mxfp8-weight-scale``: vLLM). Fused experts ``gate_up_proj`` [E, 2I, H] have
``gate_up_proj_scale_inv``. config.json: ``weight_block_size [1, 32]``, ``scale_fmt "ue8m0"``, ``ignored_layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mx_kernels import MXFP8, QuantizedTensor

from .base import (
    Configs,
    Get,
    Infos,
    Layout,
    Names,
    TensorInfo,
    WeightRef,
    check_stored,
    check_weight,
    plan,
    quantization_config,
    read,
    require,
    unquantized_modules,
    with_quantization,
    write,
)
from .families import EXPERT, FUSED_EXPERT, LINEAR, family_of
from .refs import stored_ref

_NAMES = {"mxfp8": Names("weight", "weight_scale_inv"), "mxfp8-weight-scale": Names("weight", "weight_scale")}


def _uses(names: Names, infos: Infos) -> bool:
    suffix = names.scale.removeprefix("weight")
    return any(n.endswith(suffix) for n in infos)


def _detect(name: str, configs: Configs, infos: Infos) -> bool:
    if quantization_config(configs).get("quant_method") != "mxfp8":
        return False
    inverse = _uses(_NAMES["mxfp8"], infos)
    return inverse if name == "mxfp8" else not inverse


def _refs(name: str, configs: Configs, infos: Infos) -> list[WeightRef]:
    config = quantization_config(configs)
    where = "config.json: quantization_config"
    require("quant_method", config.get("quant_method"), ["mxfp8"], where)
    block = config.get("weight_block_size", [1, 32])
    require("weight_block_size", list(block) if isinstance(block, Sequence) else block, [[1, 32]], where)
    require("scale_fmt", config.get("scale_fmt", "ue8m0"), ["ue8m0"], where)
    require("activation_scheme", config.get("activation_scheme", "dynamic"), ["dynamic"], where)
    both = [n for n in _NAMES if _uses(_NAMES[n], infos)]
    if len(both) > 1:
        raise ValueError(
            f"{where}: tensors are named weight_scale and weight_scale_inv in one checkpoint; known: one of them"
        )
    names = _NAMES[name]
    family = family_of(configs.get("config.json", {}), infos)
    out = []
    for tensor, info in infos.items():
        if info.dtype != torch.float8_e4m3fn:
            continue
        ref = stored_ref(tensor, tuple(info.shape), MXFP8, names, family)
        out.append(check_stored(ref, infos, names, f"{tensor} is MXFP8 ({where})"))
    if not out:
        raise ValueError(f"{where}: quant_method is 'mxfp8', but no tensor is float8_e4m3fn: nothing is quantized")
    return out


def _write(
    names: Names, ref: WeightRef, q: QuantizedTensor, *, expert: int | None = None, input_scale: Tensor | None = None
) -> dict[str, Tensor]:
    check_weight(ref, q, expert, (MXFP8,), "mxfp8")
    if input_scale is not None:
        raise ValueError(f"{ref.name}: MXFP8 activations are scaled dynamically; there is no input_scale to store")
    return write(ref, q, names, expert=expert)


def _read_input_scale(ref: WeightRef, get: Get, *, expert: int | None = None) -> None:
    return None


def _config(
    configs: Configs, refs: Sequence[WeightRef], infos: Infos, *, activations: bool = False
) -> dict[str, dict[str, Any]]:
    config = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
        "ignored_layers": unquantized_modules(refs, infos),
    }
    return {"config.json": with_quantization(configs, config)}


def _layout(name: str) -> Layout:
    names = _NAMES[name]

    def row_plan(ref: WeightRef) -> dict[str, TensorInfo]:
        return plan(ref, names)

    def row_read(ref: WeightRef, get: Get, *, expert: int | None = None) -> QuantizedTensor:
        return read(ref, get, names, expert=expert)

    return Layout(
        name=name,
        formats=(MXFP8,),
        kinds=(LINEAR, EXPERT, FUSED_EXPERT),
        activations=(MXFP8,),
        detect=lambda configs, infos: _detect(name, configs, infos),
        refs=lambda configs, infos: _refs(name, configs, infos),
        plan=row_plan,
        write=lambda ref, q, **options: _write(names, ref, q, **options),
        read=row_read,
        read_input_scale=_read_input_scale,
        config=_config,
    )


MXFP8_LAYOUT = _layout("mxfp8")
MXFP8_WEIGHT_SCALE = _layout("mxfp8-weight-scale")
