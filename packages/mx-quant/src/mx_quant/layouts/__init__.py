"""Checkpoint layouts: how each tool stores quantized weights, one file and one row of LAYOUTS each. See docs/layouts.md.

``detect_layout(configs, infos)`` finds the layout of a checkpoint; ``layout.refs`` lists its weights; ``layout.read`` and
``layout.write`` go between stored tensors and QuantizedTensor; ``regroup`` maps fused experts to single ones and back.
"""

from __future__ import annotations

from .base import Configs, Get, Info, Infos, Layout, TensorInfo, WeightRef, quantization_config, unquantized_modules
from .compressed_tensors import COMPRESSED_TENSORS
from .families import FAMILIES, Family, Role, classify, family_of
from .globals import exact_global, fold_globals, invert_global
from .gpt_oss import GPT_OSS, GPT_OSS_ORIGINAL
from .modelopt import MODELOPT
from .mxfp8 import MXFP8_INVERSE, MXFP8_PLAIN
from .quark import QUARK
from .refs import (
    FUSED,
    PER_EXPERT,
    Piece,
    Target,
    assemble,
    assemble_input_scale,
    assemble_plain,
    joint_groups,
    plain_refs,
    plan_plain,
    read_plain,
    regroup,
    write_plain,
)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (GPT_OSS, GPT_OSS_ORIGINAL, COMPRESSED_TENSORS, MODELOPT, MXFP8_INVERSE, MXFP8_PLAIN, QUARK)
}


def get_layout(name: str) -> Layout:
    """The layout of that name; ValueError names those there are."""
    found = LAYOUTS.get(name)
    if found is None:
        raise ValueError(f"unknown layout {name!r}; there are {', '.join(LAYOUTS)}")
    return found


def detect_layout(configs: Configs, infos: Infos) -> Layout | None:
    """The layout of a checkpoint from its JSON files and tensor infos; None for one in full precision.

    ValueError where ``quant_method`` is unknown or the tensor names contradict it, naming the field, its value and what is known.
    """
    found = [layout for layout in LAYOUTS.values() if layout.detect(configs, infos)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the checkpoint looks like several layouts at once: {', '.join(f.name for f in found)}")
    config = quantization_config(configs)
    if not config:
        return None
    known = "mxfp4, mxfp8, compressed-tensors, modelopt, quark"
    raise ValueError(f"config.json: quantization_config.quant_method is {config.get('quant_method')!r}; known: {known}")


__all__ = [
    "FAMILIES",
    "FUSED",
    "LAYOUTS",
    "PER_EXPERT",
    "Configs",
    "Family",
    "Get",
    "Info",
    "Infos",
    "Layout",
    "Piece",
    "Role",
    "Target",
    "TensorInfo",
    "WeightRef",
    "assemble",
    "assemble_input_scale",
    "assemble_plain",
    "classify",
    "detect_layout",
    "exact_global",
    "family_of",
    "fold_globals",
    "get_layout",
    "invert_global",
    "joint_groups",
    "plain_refs",
    "plan_plain",
    "quantization_config",
    "read_plain",
    "regroup",
    "unquantized_modules",
    "write_plain",
]
