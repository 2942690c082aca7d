"""compressed-tensors: ``mxfp4-pack-quantized``, ``mxfp6-pack-quantized``, ``mxfp8-quantized`` and ``nvfp4-pack-quantized``.

One set of tensors per linear or expert, N rows, K columns::

    mxfp4  weight_packed uint8 [N, K/2]     weight_scale uint8 [N, K/32]
    mxfp6  weight_packed uint8 [N, 3K/4]    weight_scale uint8 [N, K/32]          (E2M3)
    mxfp8  weight float8_e4m3fn [N, K]      weight_scale uint8 [N, K/32]
    nvfp4  weight_packed uint8 [N, K/2]     weight_scale float8_e4m3fn [N, K/16]  weight_global_scale float32 [1], a divisor

and for NVFP4 with quantized activations ``input_global_scale`` float32 [1], a divisor too. config.json lists groups of modules
(``targets``), what their weights and input activations are, and ``ignore``. Source: compressed-tensors 0.20.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mx_kernels import MXFP4, MXFP6_E2M3, MXFP8, NVFP4, Format

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
from .families import EXPERT, LINEAR, family_of
from .modules import Names, check_stored, is_data, module_layout, stored_ref

_WHERE = "config.json: quantization_config"
_TABLE = {
    MXFP4.name: Names("weight_packed", "weight_scale"),
    MXFP6_E2M3.name: Names("weight_packed", "weight_scale"),
    MXFP8.name: Names("weight", "weight_scale"),
    NVFP4.name: Names(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divisor=True, global_shape=(1,)
    ),
}
_FORMATS: dict[str, Format] = {
    "mxfp4-pack-quantized": MXFP4,
    "mxfp6-pack-quantized": MXFP6_E2M3,
    "mxfp8-quantized": MXFP8,
    "nvfp4-pack-quantized": NVFP4,
}
_NAMES = {f.name: name for name, f in _FORMATS.items()}
_ACTIVATIONS = {MXFP6_E2M3.name: MXFP8}  # the preset MXFP6A8; every other format goes with activations of its own kind


@dataclass(frozen=True)
class _Group:
    name: str
    targets: tuple[str, ...]
    named: Callable[[str], bool]
    format: Format
    activation: Format | None


def _arguments(format: Format, *, inputs: bool) -> dict[str, Any]:
    """The weights (or input_activations) entry of a group; MX activations are quantized dynamically, NVFP4's locally."""
    nv = format is NVFP4
    scale = "torch.float8_e4m3fn" if nv else "torch.uint8"
    return {
        "num_bits": (_ACTIVATIONS.get(format.name, format) if inputs else format).element.bits,
        "type": "float",
        "strategy": "tensor_group" if nv else "group",
        "group_size": format.block,
        "symmetric": True,
        "dynamic": ("local" if nv else True) if inputs else False,
        "scale_dtype": scale,
        "zp_dtype": scale,
    }


def _group(name: str, found: Any, default: str | None) -> _Group:
    where = f"{_WHERE}.config_groups.{name}"
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {found!r}, needs an object")
    stored = found.get("format") or default
    require("format", stored, list(_FORMATS), where)
    format = _FORMATS[str(stored)]
    targets = tuple(names_list(found.get("targets"), f"{where}.targets"))
    weights = found.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}.weights is {weights!r}, needs an object: a {stored} group has quantized weights")
    for field, want in _arguments(format, inputs=False).items():
        if field in ("dynamic", "zp_dtype"):
            continue
        optional = field in ("scale_dtype", "symmetric")
        require(f"weights.{field}", weights.get(field), [want, None] if optional else [want], f"{where} ({stored})")
    require("weights.dynamic", weights.get("dynamic", False), [False, None], where)
    inputs = found.get("input_activations")
    activation = None
    if isinstance(inputs, Mapping):
        if format is NVFP4:
            require("input_activations.num_bits", inputs.get("num_bits"), [4], where)
            require("input_activations.dynamic", inputs.get("dynamic"), ["local", False], where)
        stated = [inputs.get(field) for field in ("type", "num_bits", "group_size")]
        activation = next((f for f in _FORMATS.values() if stated == ["float", f.element.bits, f.block]), None)
    return _Group(name, targets, matcher(targets, shell=False), format, activation)


def _group_of(module: str, groups: Sequence[_Group]) -> _Group:
    """The group whose targets name the module; else one that targets a class (such as "Linear")."""
    for group in groups:
        if group.named(module):
            return group
    for group in groups:
        if any(not t.startswith("re:") and "." not in t for t in group.targets):
            return group
    raise ValueError(
        f"{module} is stored quantized, but no target of {_WHERE}.config_groups matches it: "
        f"{', '.join([repr(t) for g in groups for t in g.targets][:8])}"
    )


def _detect(configs: Configs, infos: Infos) -> bool:
    return quantization_config(configs).get("quant_method") == "compressed-tensors"


def _refs(configs: Configs, infos: Infos) -> list[WeightRef]:
    config = quantization_config(configs)
    require("quant_method", config.get("quant_method"), ["compressed-tensors"], _WHERE)
    require("quantization_status", config.get("quantization_status", "compressed"), ["compressed"], _WHERE)
    default = config.get("format")
    require("format", default, [*_FORMATS, "mixed-precision", None], _WHERE)
    listed = config.get("config_groups")
    if not isinstance(listed, Mapping) or not listed:
        raise ValueError(f"{_WHERE}.config_groups is {listed!r}, needs at least one group")
    groups = [_group(name, g, None if default == "mixed-precision" else default) for name, g in listed.items()]
    if default in _FORMATS and any(g.format is not _FORMATS[default] for g in groups):
        raise ValueError(
            f"{_WHERE}.format is {default!r}, but config_groups have {sorted({_NAMES[g.format.name] for g in groups})}: "
            f"several formats are 'mixed-precision'"
        )
    ignored = matcher(names_list(config.get("ignore"), f"{_WHERE}.ignore"), shell=False)
    family = family_of(configs.get("config.json", {}), infos)
    out = []
    for tensor, info in infos.items():
        scale = tensor.removesuffix("_packed") + "_scale"
        if not tensor.endswith("weight_packed") and not (tensor.endswith(".weight") and scale in infos):
            continue
        module = tensor.rpartition(".")[0]
        group = _group_of(module, groups)
        names = _TABLE[group.format.name]
        why = f"{_NAMES[group.format.name]} by {_WHERE}.config_groups.{group.name}"
        if ignored(module):
            raise ValueError(f"{module} is in {_WHERE}.ignore, but is stored quantized ({tensor}, {scale})")
        if not is_data(tensor, names):
            raise ValueError(f"{tensor} is stored, but {why} stores codes as {names.data}")
        ref = replace(stored_ref(tensor, info, group.format, names, family), activation=group.activation)
        out.append(check_stored(ref, infos, names, why))
    if not out:
        raise ValueError(
            f"{_WHERE}.quant_method is 'compressed-tensors', but no weight has a weight_scale: nothing is quantized"
        )
    return check_unclaimed(out, infos, _WHERE)


def _config(
    configs: Configs, refs: Sequence[WeightRef], infos: Infos, *, activations: bool = False
) -> dict[str, dict[str, Any]]:
    check_input_scales(refs, activations)
    formats = list(dict.fromkeys(r.format for r in refs if r.format is not None))
    groups = {}
    for i, f in enumerate(formats):
        members = [r.module for r in refs if r.format is f]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(formats) == 1 else members,
            "weights": _arguments(f, inputs=False),
            "input_activations": _arguments(f, inputs=True) if activations else None,
            "output_activations": None,
            "format": _NAMES[f.name],
        }
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": _NAMES[formats[0].name] if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": unquantized_modules(refs, infos),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return {"config.json": with_quantization(configs, config)}


COMPRESSED_TENSORS = module_layout(
    "compressed-tensors",
    _TABLE,
    formats=(MXFP4, MXFP6_E2M3, MXFP8, NVFP4),
    kinds=(LINEAR, EXPERT),
    activations=(MXFP4, MXFP6_E2M3, MXFP8, NVFP4),
    detect=_detect,
    refs=_refs,
    config=_config,
)
