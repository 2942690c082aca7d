"""gpt-oss MXFP4: fused experts with "blocks" and "scales", gate and up rows interleaved, biases in bf16.

transformers' names (``gpt-oss``) and OpenAI's (``gpt-oss-original``), L the layer::

    model.layers.L.mlp.experts.gate_up_proj_{blocks,scales,bias}      block.L.mlp.mlp1_weight.{blocks,scales}, block.L.mlp.mlp1_bias
    model.layers.L.mlp.experts.down_proj_{blocks,scales,bias}         block.L.mlp.mlp2_weight.{blocks,scales}, block.L.mlp.mlp2_bias

blocks uint8 [E, 2I, H/32, 16] and [E, H, I/32, 16] (two codes a byte, low nibble first), scales uint8 [E, 2I, H/32] and [E, H, I/32].
Only fused experts can be stored; everything else stays in full precision. Source: the published checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mx_kernels import MXFP4, QuantizedTensor

from .base import (
    Configs,
    Get,
    Infos,
    Layout,
    TensorInfo,
    WeightRef,
    check_info,
    check_scale,
    check_unclaimed,
    check_weight,
    quantization_config,
    require,
    unquantized_modules,
    with_quantization,
)
from .families import FUSED_EXPERT, classify, deinterleave, interleave

_SUFFIX = re.compile(r"(?P<name>.*)(?P<separator>[_.])blocks$")


def _names(ref_name: str) -> tuple[str, str]:
    """Names of blocks and scales: after "." where the parameter itself ends in "_weight" (OpenAI's), after "_" elsewhere."""
    separator = "." if ref_name.endswith("_weight") else "_"
    return f"{ref_name}{separator}blocks", f"{ref_name}{separator}scales"


def _detect(original: bool, configs: Configs, infos: Infos) -> bool:
    blocks = [n for n in infos if _SUFFIX.match(n)]
    if blocks:
        return original == any(n.endswith("_weight.blocks") for n in blocks)
    return not original and quantization_config(configs).get("quant_method") == "mxfp4"


def _refs(configs: Configs, infos: Infos) -> list[WeightRef]:
    config = quantization_config(configs)
    if config:
        require("quantization_config.quant_method", config.get("quant_method"), ["mxfp4"], "config.json")
    out = []
    for name in infos:
        found = _SUFFIX.match(name)
        if found is None:
            continue
        shape = tuple(infos[name].shape)
        if len(shape) != 4 or shape[3] != 16 or 0 in shape:
            raise ValueError(
                f"{name} has shape {shape}, needs [E, N, K/32, 16]: MXFP4 blocks hold 32 codes in 16 bytes"
            )
        check_info(infos, name, (torch.uint8,), None, "MXFP4 blocks")
        scales = f"{found['name']}{found['separator']}scales"
        check_info(infos, scales, (torch.uint8, torch.float8_e8m0fnu), shape[:3], f"the scales of {name}")
        role = classify(found["name"])
        out.append(
            WeightRef(
                found["name"],
                FUSED_EXPERT,
                (shape[0], shape[1], shape[2] * 32),
                MXFP4,
                (name, scales),
                interleaved=role.part == "gate_up",
            )
        )
    if not out:
        raise ValueError(
            "quantization_config.quant_method is 'mxfp4', but no tensor name ends in blocks: nothing is quantized"
        )
    return check_unclaimed(out, infos, "quant_method mxfp4")


def _plan(original: bool, ref: WeightRef) -> dict[str, TensorInfo]:
    _check(original, ref)
    e, n, k = ref.shape
    MXFP4.check_k(k, f"K of {ref.name}")
    blocks, scales = _names(ref.name)
    return {
        blocks: TensorInfo(torch.uint8, (e, n, k // 32, 16)),
        scales: TensorInfo(torch.uint8, (e, n, k // 32)),
    }


def _write(
    original: bool, ref: WeightRef, q: QuantizedTensor, *, expert: int | None = None, input_scale: Tensor | None = None
) -> dict[str, Tensor]:
    _check(original, ref)
    check_weight(ref, q, expert, (MXFP4,), "gpt-oss")
    if input_scale is not None:
        raise ValueError(f"{ref.name}: gpt-oss MXFP4 has no input_scale; activations are not quantized")
    data, scale = q.data, q.scale
    if classify(ref.name).part == "gate_up":
        data, scale = interleave(data, data.ndim - 2), interleave(scale, scale.ndim - 2)
    blocks, scales = _names(ref.name)
    return {blocks: data.reshape(*scale.shape, 16), scales: scale}


def _read(ref: WeightRef, get: Get, *, expert: int | None = None) -> QuantizedTensor:
    blocks, scales = _names(ref.name)
    data, scale = get(blocks, expert), get(scales, expert).view(torch.uint8)
    check_scale(scales, scale)
    data = data.reshape(*data.shape[:-2], -1)
    if ref.interleaved:
        data, scale = deinterleave(data, data.ndim - 2), deinterleave(scale, scale.ndim - 2)
    return QuantizedTensor(data, scale, MXFP4, ref.rule or MXFP4.default_rule)


def _read_input_scale(ref: WeightRef, get: Get, *, expert: int | None = None) -> None:
    return None


def _config(
    original: bool, configs: Configs, refs: Sequence[WeightRef], infos: Infos, *, activations: bool = False
) -> dict[str, dict[str, Any]]:
    for ref in refs:
        _check(original, ref)
    if activations:
        raise ValueError("gpt-oss MXFP4 has no quantized activations: leave activations=False")
    config = with_quantization(
        configs, {"quant_method": "mxfp4", "modules_to_not_convert": unquantized_modules(refs, infos)}
    )
    if original:  # those checkpoints say nothing: the tensor names do
        del config["quantization_config"]
    return {"config.json": config}


def _check(original: bool, ref: WeightRef) -> None:
    if ref.kind != FUSED_EXPERT:
        raise ValueError(
            f"{ref.name} is a {ref.kind} weight {list(ref.shape)}, but the gpt-oss layout stores fused experts [E, N, K] only: "
            f"leave it in full precision, or choose a layout such as compressed-tensors"
        )
    if original != ref.name.endswith(("mlp1_weight", "mlp2_weight")):
        mine, other = ("gpt-oss-original", "gpt-oss") if original else ("gpt-oss", "gpt-oss-original")
        raise ValueError(
            f"{ref.name} is not named as layout {mine} names experts, and one checkpoint cannot mix both namings: use {other} "
            f"(and convert to {mine} afterwards)"
        )


def _layout(name: str, original: bool) -> Layout:
    return Layout(
        name=name,
        formats=(MXFP4,),
        kinds=(FUSED_EXPERT,),
        activations=(),
        detect=partial(_detect, original),
        refs=_refs,
        plan=partial(_plan, original),
        write=partial(_write, original),
        read=_read,
        read_input_scale=_read_input_scale,
        config=partial(_config, original),
    )


GPT_OSS = _layout("gpt-oss", original=False)
GPT_OSS_ORIGINAL = _layout("gpt-oss-original", original=True)
