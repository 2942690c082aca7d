"""Quark: OCP MXFP4, MXFP6 (E2M3, E3M2) and MXFP8 (E4M3, E5M2), per group of 32 with E8M0 scales.

Per linear or expert ``weight`` uint8 [N, K/2] (fp4), uint8 [N, 3K/4] (fp6) or float8 [N, K] (fp8), and ``weight_scale`` uint8 [N, K/32].
config.json: ``global_quant_config.weight`` says the dtype and the scale rule (``scale_calculation_mode``), ``layer_quant_config`` overrides
it by name pattern, ``exclude`` lists what stays in full precision. Source: amd-quark 0.13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mx_kernels import MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, MXFP8_E5M2, Format, ScaleRule

from .base import (
    Configs,
    Infos,
    WeightRef,
    check_unclaimed,
    matcher,
    names_list,
    quantization_config,
    require,
    unquantized_modules,
    with_quantization,
)
from .families import EXPERT, LINEAR, family_of
from .modules import Names, check_stored, module_layout, stored_ref

_WHERE = "config.json: quantization_config"
_DTYPES: dict[str, Format] = {
    "fp4": MXFP4,
    "fp6_e2m3": MXFP6_E2M3,
    "fp6_e3m2": MXFP6_E3M2,
    "fp8_e4m3": MXFP8,
    "fp8_e5m2": MXFP8_E5M2,
}
_NAME = {f.name: name for name, f in _DTYPES.items()}
_TABLE = {f.name: Names("weight", "weight_scale") for f in _DTYPES.values()}
_RULES = {"even": ScaleRule.EVEN, "floor": ScaleRule.FLOOR, "ceil": ScaleRule.CEIL}


def _weight_config(found: Any, where: str) -> tuple[Format, ScaleRule]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {found!r}, needs an object")
    require("dtype", found.get("dtype"), list(_DTYPES), where)
    require("qscheme", found.get("qscheme"), ["per_group"], where)
    require("group_size", found.get("group_size"), [32], where)
    require("ch_axis", found.get("ch_axis", -1), [-1, 1], where)
    require("scale_format", found.get("scale_format"), ["e8m0"], where)
    mode = found.get("scale_calculation_mode") or "even"
    require("scale_calculation_mode", mode, list(_RULES), where)
    return _DTYPES[str(found["dtype"])], _RULES[str(mode)]


def _is_mx(found: Any) -> bool:
    return isinstance(found, Mapping) and found.get("dtype") in list(_DTYPES) and found.get("scale_format") == "e8m0"


def _detect(configs: Configs, infos: Infos) -> bool:
    return quantization_config(configs).get("quant_method") == "quark"


def _refs(configs: Configs, infos: Infos) -> list[WeightRef]:
    config = quantization_config(configs)
    require("quant_method", config.get("quant_method"), ["quark"], _WHERE)
    export = config.get("export")
    if not isinstance(export, Mapping):
        raise ValueError(f"{_WHERE}.export is {export!r}, needs an object")
    require("weight_format", export.get("weight_format", "real_quantized"), ["real_quantized"], f"{_WHERE}.export")
    require("pack_method", export.get("pack_method", "reorder"), ["reorder", "order"], f"{_WHERE}.export")
    layers = config.get("layer_quant_config") or {}
    if not isinstance(layers, Mapping):
        raise ValueError(f"{_WHERE}.layer_quant_config is {layers!r}, needs an object")
    excluded = matcher(names_list(config.get("exclude"), f"{_WHERE}.exclude"), shell=True)
    wild = {p: matcher([p], shell=True) for p in layers if p.startswith("re:") or any(c in p for c in "*?[")}
    family = family_of(configs.get("config.json", {}), infos)
    dtypes = {f.data_dtype for f in _DTYPES.values()}
    out = []
    for tensor, info in infos.items():
        if not tensor.endswith(".weight") or info.dtype not in dtypes:
            continue
        module = tensor.removesuffix(".weight")
        if excluded(module):
            raise ValueError(f"{module} is in {_WHERE}.exclude, but is stored quantized ({info.dtype})")
        where = f"{_WHERE}.global_quant_config"
        found = config.get("global_quant_config")
        pattern = module if module in layers else next((p for p, matches in wild.items() if matches(module)), None)
        if pattern is not None:
            where, found = f"{_WHERE}.layer_quant_config[{pattern!r}]", layers[pattern]
        weight = found.get("weight") if isinstance(found, Mapping) else found
        format, rule = _weight_config(weight, f"{where}.weight")
        names = _TABLE[format.name]
        why = f"{_NAME[format.name]} by {where}.weight.dtype"
        ref = stored_ref(tensor, info, format, names, family)
        inputs = found.get("input_tensors") if isinstance(found, Mapping) else None
        activation = _weight_config(inputs, f"{where}.input_tensors")[0] if _is_mx(inputs) else None
        ref = replace(ref, rule=rule, activation=activation)
        out.append(check_stored(ref, infos, names, why))
    if not out:
        raise ValueError(f"{_WHERE}.quant_method is 'quark', but no weight is uint8 or float8: nothing is quantized")
    return check_unclaimed(out, infos, _WHERE)


def _spec(format: Format, rule: ScaleRule | None, *, dynamic: bool) -> dict[str, Any]:
    # Quark has three modes; what other rules wrote is read the same way, so it is recorded as the nearest of them
    nearest = {ScaleRule.RCEIL: "ceil", ScaleRule.SEARCH: "even"}
    rule = rule or format.default_rule
    return {
        "dtype": _NAME[format.name],
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "is_dynamic": dynamic,
        "scale_format": "e8m0",
        "scale_type": "float",
        "scale_calculation_mode": nearest.get(rule, rule.value),
        "round_method": "half_even",
        "symmetric": None,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": False,
        "mx_element_dtype": None,
    }


def _entry(format: Format, rule: ScaleRule | None, activations: bool) -> dict[str, Any]:
    return {
        "weight": _spec(format, rule, dynamic=False),
        "input_tensors": _spec(format, None, dynamic=True) if activations else None,
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }


def _config(
    configs: Configs, refs: Sequence[WeightRef], infos: Infos, *, activations: bool = False
) -> dict[str, dict[str, Any]]:
    kinds = list(dict.fromkeys((r.format, r.rule) for r in refs if r.format is not None))
    first, rest = kinds[0], kinds[1:]
    config = {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "version": "0.13",
        "global_quant_config": _entry(*first, activations),
        "layer_quant_config": {
            r.module: _entry(f, rule, activations) for f, rule in rest for r in refs if (r.format, r.rule) == (f, rule)
        },
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": unquantized_modules(refs, infos),
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }
    return {"config.json": with_quantization(configs, config)}


QUARK = module_layout(
    "quark",
    _TABLE,
    formats=tuple(_DTYPES.values()),
    kinds=(LINEAR, EXPERT),
    activations=tuple(_DTYPES.values()),
    detect=_detect,
    refs=_refs,
    config=_config,
)
