"""ModelOpt: NVFP4 and MXFP8, described by hf_quant_config.json and by config.json.

Per linear or expert, N rows, K columns::

    NVFP4  weight uint8 [N, K/2]          weight_scale float8_e4m3fn [N, K/16]   weight_scale_2 float32 [], a multiplier
    MXFP8  weight float8_e4m3fn [N, K]    weight_scale uint8 [N, K/32]

and for NVFP4 with quantized activations ``input_scale`` float32 [], a multiplier. Fused experts of gpt-oss and Llama 4 are
``experts.gate_up_proj`` with ``gate_up_proj_weight_scale`` and so on, stored transposed ([E, K/2, N], [E, K/16, N]); their MXFP8 form has
its blocks along N, which is no quantization of K, and is refused. quant_algo: NVFP4, W4A16_NVFP4 (weights only), MXFP8, or
MIXED_PRECISION with ``quantized_layers``. Source: nvidia-modelopt 0.47.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mx_kernels import MXFP8, NVFP4, Format

from .base import (
    Configs,
    Infos,
    WeightRef,
    check_input_scales,
    check_unclaimed,
    matcher,
    names_list,
    quantization_config,
    require,
    unquantized_modules,
    with_quantization,
)
from .families import EXPERT, FUSED_EXPERT, LINEAR, family_of
from .modules import Names, check_stored, is_data, module_layout, stored_ref

_CONFIG = "config.json: quantization_config"
_HF = "hf_quant_config.json: quantization"
_METHODS = ["modelopt", "modelopt_fp4"]


def _fused(param: str, suffix: str) -> str:
    return param if suffix == "weight" else f"{param}_{suffix}"


_TABLE = {
    NVFP4.name: Names("weight", "weight_scale", "weight_scale_2", "input_scale", fused=_fused, transposes=True),
    MXFP8.name: Names("weight", "weight_scale", fused=_fused, transposes=True),
}
# quant_algo -> format of weights, of activations
_ALGORITHMS: dict[str, tuple[Format, Format | None]] = {
    "NVFP4": (NVFP4, NVFP4),
    "W4A16_NVFP4": (NVFP4, None),
    "MXFP8": (MXFP8, MXFP8),
}


def _hf(configs: Configs) -> Mapping[str, Any]:
    found = configs.get("hf_quant_config.json", {}).get("quantization", {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{_HF} is {found!r}, needs an object")
    return found


def _detect(configs: Configs, infos: Infos) -> bool:
    method = quantization_config(configs).get("quant_method")
    return method in _METHODS or (method is None and bool(_hf(configs)))


def _algorithm(where: str, algorithm: Any, group_size: Any) -> tuple[Format, Format | None]:
    require("quant_algo", algorithm, list(_ALGORITHMS), where)
    format, activation = _ALGORITHMS[str(algorithm)]
    require("group_size", group_size, [format.block, None], f"{where} ({algorithm})")
    return format, activation


def _refs(configs: Configs, infos: Infos) -> list[WeightRef]:
    flat, nested = quantization_config(configs), _hf(configs)
    if flat:
        require("quant_method", flat.get("quant_method"), _METHODS, _CONFIG)
    where, config = (_HF, nested) if nested else (_CONFIG, flat)
    algorithm = config.get("quant_algo")
    if nested and flat and flat.get("quant_algo") not in (None, algorithm):
        raise ValueError(
            f"{_HF}.quant_algo is {algorithm!r}, but {_CONFIG}.quant_algo is {flat['quant_algo']!r}: they contradict"
        )
    mixed = config.get("quantized_layers", flat.get("quantized_layers"))
    if algorithm == "MIXED_PRECISION" and not isinstance(mixed, Mapping):
        raise ValueError(f"{where}.quantized_layers is {mixed!r}, needs an object: quant_algo is 'MIXED_PRECISION'")
    if algorithm != "MIXED_PRECISION":
        _algorithm(where, algorithm, config.get("group_size"))
    listed = config.get("exclude_modules", config.get("ignore"))
    excluded = matcher(names_list(listed, f"{where}.exclude_modules"), shell=True)
    family = family_of(configs.get("config.json", {}), infos)
    out = []
    for tensor, info in infos.items():
        names = _TABLE[NVFP4.name]
        if info.dtype not in (torch.uint8, torch.float8_e4m3fn) or not is_data(tensor, names):
            continue
        module = tensor.removesuffix(".weight")
        if excluded(module):
            raise ValueError(f"{module} is in {where}.exclude_modules, but is stored quantized ({info.dtype})")
        if algorithm == "MIXED_PRECISION":
            assert isinstance(mixed, Mapping)
            layer = mixed.get(module)
            if not isinstance(layer, Mapping):
                raise ValueError(
                    f"{module} is stored quantized ({info.dtype}), but {where}.quantized_layers does not list it"
                )
            here = f"{where}.quantized_layers.{module}"
            format, activation = _algorithm(here, layer.get("quant_algo"), layer.get("group_size"))
            why = f"{format} by {here}"
        else:
            format, activation = _ALGORITHMS[str(algorithm)]
            why = f"{format} by {where}.quant_algo"
        names = _TABLE[format.name]
        ref = replace(stored_ref(tensor, info, format, names, family), activation=activation)
        reason = _why_not(ref)
        if reason is not None:
            raise ValueError(f"{tensor} {list(info.shape)} cannot be read: {reason}")
        out.append(check_stored(ref, infos, names, why))
    if not out:
        raise ValueError(
            f"{where}.quant_algo is {algorithm!r}, but no weight is uint8 or float8_e4m3fn: nothing is quantized"
        )
    return check_unclaimed(out, infos, where)


def _why_not(ref: WeightRef) -> str | None:
    if ref.format is MXFP8 and ref.transposed:
        return (
            "ModelOpt stores MXFP8 of fused experts of this family with blocks along N, not K; "
            "leave these experts in full precision, or use another layout, such as compressed-tensors, expert by expert"
        )
    return None


def _config(
    configs: Configs, refs: Sequence[WeightRef], infos: Infos, *, activations: bool = False
) -> dict[str, dict[str, Any]]:
    def algorithm(format: Format | None) -> str:
        if format is NVFP4:
            return "NVFP4" if activations else "W4A16_NVFP4"
        return "MXFP8"

    check_input_scales(refs, activations)
    formats = list(dict.fromkeys(r.format for r in refs if r.format is not None))
    ignore = unquantized_modules(refs, infos)
    producer = {"name": "modelopt", "version": "0.47.0"}
    if len(formats) == 1:
        name, block = algorithm(formats[0]), formats[0].block
        details: dict[str, Any] = {"quant_algo": name, "kv_cache_quant_algo": None, "group_size": block}
    else:
        name, block = "MIXED_PRECISION", 0
        details = {
            "quant_algo": name,
            "kv_cache_quant_algo": None,
            "quantized_layers": {
                r.module: {"quant_algo": algorithm(r.format), "group_size": r.format.block} for r in refs if r.format
            },
        }
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": name, "ignore": ignore, "producer": producer}
    if len(formats) == 1:
        bits = {"dynamic": False, "num_bits": formats[0].element.bits, "type": "float", "group_size": block}
        both = {"weights": bits, "input_activations": bits} if name != "W4A16_NVFP4" else {"weights": bits}
        flat["config_groups"] = {"group_0": {**both, "targets": ["Linear"]}}
    else:
        flat["quantized_layers"] = details["quantized_layers"]
    return {
        "config.json": with_quantization(configs, flat),
        "hf_quant_config.json": {"producer": producer, "quantization": {**details, "exclude_modules": ignore}},
    }


MODELOPT = module_layout(
    "modelopt",
    _TABLE,
    formats=(NVFP4, MXFP8),
    kinds=(LINEAR, EXPERT, FUSED_EXPERT),
    activations=(NVFP4, MXFP8),
    detect=_detect,
    refs=_refs,
    config=_config,
    why_not=_why_not,
)
