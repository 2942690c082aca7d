"""Checkpoints that compressed-tensors, ModelOpt and Quark wrote (tests/golden/checkpoints): codes, scales and globals come out right.

``decode`` is written here from the formats' definitions, so neither our decoder nor a tool's is trusted alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mx_kernels as mk
import mx_quant as mq
from mx_quant import layouts
from mx_quant.layouts import LAYOUTS

ROOT = Path(__file__).parents[1] / "golden" / "checkpoints"

# folder -> layout, format, number of quantized weights, activations under a stored scale
CASES = {
    "compressed-tensors-mxfp4a16": ("compressed-tensors", mk.MXFP4, 7, False),
    "compressed-tensors-mxfp6a8": ("compressed-tensors", mk.MXFP6_E2M3, 7, False),
    "compressed-tensors-mxfp8": ("compressed-tensors", mk.MXFP8, 7, False),
    "compressed-tensors-nvfp4": ("compressed-tensors", mk.NVFP4, 7, True),
    "compressed-tensors-nvfp4a16": ("compressed-tensors", mk.NVFP4, 7, False),
    "modelopt-mxfp8-qwen3-moe": ("modelopt", mk.MXFP8, 10, False),
    "modelopt-nvfp4-gpt-oss": ("modelopt", mk.NVFP4, 6, True),
    "modelopt-nvfp4-mixtral": ("modelopt", mk.NVFP4, 10, True),
    "modelopt-nvfp4-qwen3-moe": ("modelopt", mk.NVFP4, 10, True),
    "modelopt-w4a16-nvfp4-qwen3": ("modelopt", mk.NVFP4, 7, False),
    "quark-mxfp4": ("quark", mk.MXFP4, 7, False),
    "quark-mxfp6e2m3": ("quark", mk.MXFP6_E2M3, 7, False),
    "quark-mxfp6e3m2": ("quark", mk.MXFP6_E3M2, 7, False),
}

ACTIVATIONS = {
    "compressed-tensors-mxfp6a8": mk.MXFP8,
    "compressed-tensors-mxfp8": mk.MXFP8,
    "compressed-tensors-nvfp4": mk.NVFP4,
    "modelopt-mxfp8-qwen3-moe": mk.MXFP8,
    "modelopt-nvfp4-gpt-oss": mk.NVFP4,
    "modelopt-nvfp4-mixtral": mk.NVFP4,
    "modelopt-nvfp4-qwen3-moe": mk.NVFP4,
}


def load(name):
    folder = ROOT / name
    configs = {f.name: json.loads(f.read_text()) for f in folder.glob("*.json")}
    return configs, load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def getter(tensors):
    return lambda name, expert=None: tensors[name] if expert is None else tensors[name][expert]


def values(element):
    """The value of every code of an FP4 or FP6 element, in float64."""
    half, out = 1 << (element.bits - 1), []
    for code in range(2 * half):
        m = code & ((1 << element.mantissa) - 1)
        e = (code >> element.mantissa) & ((1 << element.exponent) - 1)
        v = (
            m * 2.0 ** (1 - element.bias - element.mantissa)
            if e == 0
            else (1 + m / 2**element.mantissa) * 2.0 ** (e - element.bias)
        )
        out.append(-v if code & half else v)
    return torch.tensor(out, dtype=torch.float64)


def decode(q):
    """(elements, block scales) of a QuantizedTensor in float64, each [..., K]; the global scale is left out."""
    f, data = q.format, q.data
    if f.element.bits == 8:
        x = data.float().double()
    elif f.element.bits == 4:
        x = values(f.element)[torch.stack([data & 15, data >> 4], -1).flatten(-2).long()]
    else:
        b = data.long().unflatten(-1, (-1, 3))
        word = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
        x = values(f.element)[torch.stack([word >> 6 * i & 63 for i in range(4)], -1).flatten(-2)]
    s = (q.scale.double() - 127).exp2() if f.scale == "e8m0" else q.scale.float().double()
    return x, s.repeat_interleave(f.block, -1)


@pytest.mark.parametrize("name", CASES)
def test_reads_as_the_tool_does(name):
    layout_name, f, count, activations = CASES[name]
    configs, tensors, expected = load(name)
    layout = layouts.detect_layout(configs, tensors)
    assert layout is LAYOUTS[layout_name]
    refs = layout.refs(configs, tensors)
    assert {r.name for r in refs} == set(expected)
    assert len(refs) == count
    for ref in refs:
        q = layout.read(ref, getter(tensors))
        want = expected[ref.name]
        assert tuple(q.shape) == ref.shape == tuple(want.shape)
        assert q.format is f
        if ref.interleaved:
            want = torch.cat([want[:, 0::2], want[:, 1::2]], 1)
        x, s = decode(q)
        if q.global_scale is not None:  # both tools round scale * global to float32 first
            g = q.global_scale.reshape(*q.global_scale.shape, *[1] * (s.ndim - q.global_scale.ndim))
            divisor = tensors.get(ref.module + ".weight_global_scale")
            s = (s.float() * g if divisor is None else s.float() / divisor).double()
        assert torch.equal((x * s).to(want.dtype), want)
        # and our own decoder, which rounds once: at most one float32 rounding away where a global scale is involved
        ours = mk.dequantize(q, torch.float32).double()
        assert ((ours - x * s).abs() <= (x * s).abs() * (2**-22 if f.has_global_scale else 0)).all()
        scale = layout.read_input_scale(ref, getter(tensors))
        assert (scale is not None) == activations
        assert ref.activation is ACTIVATIONS.get(name)
        for tensor in ref.tensors:
            assert tensor in tensors


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[1] is mk.NVFP4])
def test_globals_are_multipliers(name):
    """Global scales as amax / 2688 of the weights. gate and up, and q, k and v, share one in ModelOpt."""
    layout_name = CASES[name][0]
    configs, tensors, expected = load(name)
    layout = LAYOUTS[layout_name]
    refs = {r.name: r for r in layout.refs(configs, tensors)}
    groups = layouts.joint_groups(refs.values()) if layout_name == "modelopt" else {}
    joint = {r.name: group for group in groups.values() for r in group}
    for ref in refs.values():
        g = layout.read(ref, getter(tensors)).global_scale
        members = joint.get(ref.name, [ref])
        amax = max(float(expected[m.name].abs().max()) for m in members)
        # decoded values and tools' own bf16 arithmetic keep amax only roughly; a divisor taken for a multiplier is 1e6 off
        torch.testing.assert_close(g, torch.full_like(g, amax / 2688), rtol=0.15, atol=0)
        for m in members:
            assert torch.equal(layout.read(m, getter(tensors)).global_scale, g)


@pytest.mark.parametrize("name", CASES)
def test_written_again(name):
    """Read and written by us: the tool's own tensors, byte for byte (divisors may differ in the last bit, see globals.py)."""
    _, f, _, activations = CASES[name]
    configs, tensors, _ = load(name)
    layout = layouts.detect_layout(configs, tensors)
    refs = layout.refs(configs, tensors)
    out = {}
    for ref in refs:
        scale = layout.read_input_scale(ref, getter(tensors))
        out |= layout.write(ref, layout.read(ref, getter(tensors)), input_scale=scale)
    for n, t in out.items():
        if n.endswith("global_scale"):
            torch.testing.assert_close(t, tensors[n], rtol=2**-23, atol=0)
            assert torch.equal(1 / t, 1 / tensors[n])
        elif t.dtype == torch.float32 and t.ndim == 1:  # ours is per expert, ModelOpt's one for all
            assert (t == tensors[n]).all()
        else:
            assert t.dtype == tensors[n].dtype
            assert torch.equal(
                t.view(torch.uint8) if t.ndim else t, tensors[n].view(torch.uint8) if t.ndim else tensors[n]
            )
    again = layout.config({"config.json": configs["config.json"]}, refs, tensors, activations=activations)
    assert layouts.detect_layout(again, tensors) is layout
    assert [r.name for r in layout.refs(again, tensors)] == [r.name for r in refs]
    assert {r.format for r in layout.refs(again, tensors)} == {f}


def test_modelopt_fused_mxfp8_is_refused():
    """ModelOpt 0.47.0 quantizes gpt-oss's fused experts along N: shapes as it writes them, [E, K, N] and [E, K, N/32]."""
    infos = {
        "model.layers.0.mlp.experts.gate_up_proj": layouts.TensorInfo(torch.float8_e4m3fn, (2, 64, 192)),
        "model.layers.0.mlp.experts.gate_up_proj_weight_scale": layouts.TensorInfo(torch.uint8, (2, 64, 6)),
    }
    config = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
    with pytest.raises(ValueError, match=r"gate_up_proj.*blocks along N, not K"):
        LAYOUTS["modelopt"].refs({"config.json": {"model_type": "gpt_oss", "quantization_config": config}}, infos)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("compressed-tensors-mxfp4a16", ["quark", "compressed-tensors"]),
        ("compressed-tensors-mxfp6a8", ["quark", "compressed-tensors"]),
        ("compressed-tensors-mxfp8", ["mxfp8", "quark", "modelopt", "mxfp8-weight-scale", "compressed-tensors"]),
        ("compressed-tensors-nvfp4", ["modelopt", "compressed-tensors"]),
        ("modelopt-mxfp8-qwen3-moe", ["compressed-tensors", "mxfp8", "modelopt"]),
        ("modelopt-nvfp4-gpt-oss", ["compressed-tensors"]),
        ("modelopt-nvfp4-mixtral", ["compressed-tensors", "modelopt"]),
    ],
)
def test_converted_checkpoint(name, way, tmp_path):
    """A tool's checkpoint, converted by files from layout to layout: the same weights and activations in the last one."""
    configs, tensors, _ = load(name)
    source = tmp_path / "source"
    shutil.copytree(ROOT / name, source, ignore=shutil.ignore_patterns("expected.safetensors"))
    layout = layouts.detect_layout(configs, tensors)
    want = {r.name: (r, layout.read(r, getter(tensors))) for r in layout.refs(configs, tensors)}
    for i, step in enumerate(way):
        out = tmp_path / f"{i}-{step}"
        mq.convert_checkpoint(source, out, layout=step)
        source = out
    configs = {
        n: json.loads((source / n).read_text())
        for n in ("config.json", "hf_quant_config.json")
        if (source / n).exists()
    }
    stored = load_file(source / "model.safetensors")
    last = layouts.detect_layout(configs, stored)
    assert last.name == way[-1]
    refs = {r.name: r for r in last.refs(configs, stored)}
    grouping = None if set(refs) == set(want) else layouts.FUSED
    family = layouts.family_of(configs["config.json"], stored)
    found = layouts.regroup(list(refs.values()), grouping, family)
    assert {t.ref.name for t in found} == set(want)
    for t in found:
        ref, before = want[t.ref.name]
        after = layouts.assemble(t, lambda n, e: last.read(refs[n], getter(stored), expert=e))
        assert torch.equal(after.data.view(torch.uint8), before.data.view(torch.uint8))
        assert torch.equal(after.scale.view(torch.uint8), before.scale.view(torch.uint8))
        assert t.ref.activation is ref.activation
        if before.global_scale is not None:  # a multiplier that no divisor gives back moves by one rounding
            torch.testing.assert_close(after.global_scale, before.global_scale, rtol=2**-23, atol=0)
