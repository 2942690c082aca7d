"""``quant_method: "mxfp8"`` (MiniMax style, fine-grained): MXFP8 E4M3 weights with one E8M0 byte per 32 columns.

``weight`` float8_e4m3fn [N, K] and ``weight_scale_inv`` uint8 [N, K/32], which is the multiplier in spite of its name (layout ``mxfp8``:
transformers, SGLang), or ``weight_scale`` (layout ``mxfp8-weight-scale``: vLLM). Fused experts ``gate_up_proj`` [E, 2I, H] have
``gate_up_proj_scale_inv``. config.json: ``weight_block_size [1, 32]``, ``scale_fmt "ue8m0"``, ``ignored_layers``; activations are always
MXFP8 where hardware has it ("dynamic").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mx_kernels import MXFP8

from .base import (
    Configs,
    Infos,
    Layout,
    WeightRef,
    check_unclaimed,
    quantization_config,
    require,
    unquantized_modules,
    with_quantization,
)
from .families import EXPERT, FUSED_EXPERT, LINEAR, family_of
from .modules import Names, check_stored, module_layout, stored_ref

_WHERE = "config.json: quantization_config"
_INVERSE = Names("weight", "weight_scale_inv")
_PLAIN = Names("weight", "weight_scale")


def _uses(names: Names, infos: Infos) -> bool:
    suffix = names.scale.removeprefix("weight")
    return any(n.endswith(suffix) for n in infos)


def _detect(names: Names, configs: Configs, infos: Infos) -> bool:
    if quantization_config(configs).get("quant_method") != "mxfp8":
        return False
    return _uses(_INVERSE, infos) == (names is _INVERSE)


def _refs(names: Names, configs: Configs, infos: Infos) -> list[WeightRef]:
    config = quantization_config(configs)
    require("quant_method", config.get("quant_method"), ["mxfp8"], _WHERE)
    require("weight_block_size", config.get("weight_block_size", [1, 32]), [[1, 32]], _WHERE)
    require("scale_fmt", config.get("scale_fmt", "ue8m0"), ["ue8m0"], _WHERE)
    require("activation_scheme", config.get("activation_scheme", "dynamic"), ["dynamic"], _WHERE)
    if _uses(_INVERSE, infos) and _uses(_PLAIN, infos):
        raise ValueError(
            "quant_method is 'mxfp8' with scales named weight_scale and weight_scale_inv in one checkpoint; known: one of them"
        )
    family = family_of(configs.get("config.json", {}), infos)
    why = f"MXFP8 by {_WHERE}.quant_method"
    out = [
        check_stored(replace(stored_ref(tensor, info, MXFP8, names, family), activation=MXFP8), infos, names, why)
        for tensor, info in infos.items()
        if info.dtype == torch.float8_e4m3fn
    ]
    if not out:
        raise ValueError(f"{_WHERE}.quant_method is 'mxfp8', but no tensor is float8_e4m3fn: nothing is quantized")
    return check_unclaimed(out, infos, _WHERE)


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


def _row(name: str, names: Names) -> Layout:
    return module_layout(
        name,
        {MXFP8.name: names},
        formats=(MXFP8,),
        kinds=(LINEAR, EXPERT, FUSED_EXPERT),
        activations=(MXFP8,),
        detect=lambda configs, infos: _detect(names, configs, infos),
        refs=lambda configs, infos: _refs(names, configs, infos),
        config=_config,
    )


MXFP8_INVERSE = _row("mxfp8", _INVERSE)
MXFP8_PLAIN = _row("mxfp8-weight-scale", _PLAIN)
