"""Fused and per-expert weights: regrouping is a bijection, incomplete or uneven experts are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_quant import layouts
from mx_quant.layouts import FAMILIES, FUSED, PER_EXPERT, WeightRef, assemble_input_scale, assemble_plain, regroup

E, I, H = 3, 4, 6


def experts(family, biases=True):
    fam, p = FAMILIES[family], "model.layers.0.mlp.experts"
    shapes = {fam.gate: (I, H), fam.up: (I, H), fam.down: (H, I)}
    refs = [WeightRef(f"{p}.{e}.{n}.weight", "expert", s) for e in range(E) for n, s in shapes.items()]
    if biases:
        refs += [WeightRef(f"{p}.{e}.{n}.bias", "expert_bias", s[:1]) for e in range(E) for n, s in shapes.items()]
    return refs


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "llama4"])
def test_there_and_back(family):
    fam = FAMILIES[family]
    refs = experts(family)
    values = {r.name: torch.randn(r.shape) for r in refs}
    fused = regroup(refs, FUSED, fam)
    p = "model.layers.0.mlp.experts"
    assert {t.ref.name: t.ref.shape for t in fused} == {
        f"{p}.gate_up_proj": (E, 2 * I, H),
        f"{p}.down_proj": (E, H, I),
        f"{p}.gate_up_proj_bias": (E, 2 * I),
        f"{p}.down_proj_bias": (E, H),
    }
    whole = {t.ref.name: assemble_plain(t, lambda n, e: values[n]) for t in fused}
    for e in range(E):
        want = torch.cat([values[f"{p}.{e}.{fam.gate}.weight"], values[f"{p}.{e}.{fam.up}.weight"]])
        assert torch.equal(whole[f"{p}.gate_up_proj"][e], want)
    stored = {n: x for t in fused for n, x in layouts.write_plain(t.ref, whole[t.ref.name]).items()}
    again = {r.name: r for r in layouts.plain_refs({"model_type": (*fam.model_types, "x")[0]}, stored)}
    assert {n: (r.shape, r.interleaved, r.transposed) for n, r in again.items()} == {
        t.ref.name: (t.ref.shape, t.ref.interleaved, t.ref.transposed) for t in fused
    }
    apart = regroup(list(again.values()), PER_EXPERT, fam)
    assert {t.ref.name for t in apart} == set(values)

    def read(name, expert):
        return layouts.read_plain(
            again[name], lambda n, e=None: stored[n] if e is None else stored[n][e], expert=expert
        )

    for t in apart:
        assert torch.equal(assemble_plain(t, read), values[t.ref.name])
        assert t.ref.shape == values[t.ref.name].shape


def test_same():
    linear = WeightRef("lm_head.weight", "linear", (8, H))
    (target,) = regroup([linear], PER_EXPERT, FAMILIES["qwen3"])
    assert target.ref == linear
    assert target.sources == ("lm_head.weight",)
    with pytest.raises(ValueError, match=r"unknown grouping 'x'; there are 'fused', 'per-expert'"):
        regroup([linear], "x", FAMILIES["qwen3"])


def test_incomplete():
    refs = experts("qwen3-moe", biases=False)
    with pytest.raises(ValueError, match=r"expert 1 has no up weight, so 3 experts cannot be fused"):
        regroup([r for r in refs if "1.up" not in r.name], FUSED, FAMILIES["qwen3-moe"])
    with pytest.raises(ValueError, match=r"differ in shape"):
        regroup([replace(refs[0], shape=(I, 2 * H)), *refs[1:]], FUSED, FAMILIES["qwen3-moe"])
    mixed = [replace(r, format=mk.MXFP4 if "0.down" in r.name else mk.MXFP8) for r in refs]
    with pytest.raises(ValueError, match=r"down_proj differ in format: mxfp4, mxfp8_e4m3"):
        regroup(mixed, FUSED, FAMILIES["qwen3-moe"])


def test_experts_without_gate():
    refs = [r for r in experts("qwen3-moe", biases=False) if "gate" not in r.name]
    names = {t.ref.name: t.ref.shape for t in regroup(refs, FUSED, FAMILIES["qwen3-moe"])}
    p = "model.layers.0.mlp.experts"
    assert names == {f"{p}.up_proj": (E, I, H), f"{p}.down_proj": (E, H, I)}


def test_merged_gate_up():
    """Experts stored one by one with gate and up in one matrix (gate first) are fused as they are."""
    p = "model.layers.0.mlp.experts"
    refs = [WeightRef(f"{p}.{e}.gate_up_proj.weight", "expert", (2 * I, H)) for e in range(E)]
    (target,) = regroup(refs, FUSED, FAMILIES["default"])
    assert (target.ref.name, target.ref.shape) == (f"{p}.gate_up_proj", (E, 2 * I, H))
    assert {t.ref.name for t in regroup([target.ref], PER_EXPERT, FAMILIES["default"])} == {
        f"{p}.{e}.{n}_proj.weight" for e in range(E) for n in ("gate", "up")
    }


def test_input_scales():
    refs = [replace(r, format=mk.NVFP4, input_scale="x") for r in experts("qwen3-moe", biases=False)]
    gate_up, down = regroup(refs, FUSED, FAMILIES["qwen3-moe"])
    scales = {r.name: torch.tensor(float(r.name.split(".")[5]) + 1) for r in refs}
    assert assemble_input_scale(gate_up, lambda n, e: scales[n]).tolist() == [1, 2, 3]
    assert float(assemble_input_scale(down, lambda n, e: scales[n], 1)) == 2
    assert assemble_input_scale(down, lambda n, e: None) is None
    scales["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.tensor(9.0)
    with pytest.raises(ValueError, match=r"gate_up_proj: its parts have different input scales"):
        assemble_input_scale(gate_up, lambda n, e: scales[n])
    with pytest.raises(ValueError, match=r"1 of 3 experts have no input scale"):
        assemble_input_scale(down, lambda n, e: None if ".1." in n else scales[n])


@pytest.mark.parametrize("pattern", ["re:(a+)+b", "re:" + ".*a" * 7, "re:(x){9}"])
def test_patterns_are_bounded(pattern):
    config = {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": [pattern]}
    with pytest.raises(ValueError, match="could match for hours"):
        layouts.LAYOUTS["modelopt"].refs({"config.json": {"quantization_config": config}}, {})
    config["ignore"] = ["re:("]
    with pytest.raises(ValueError, match="no regular expression"):
        layouts.LAYOUTS["modelopt"].refs({"config.json": {"quantization_config": config}}, {})


def test_unclaimed():
    """A quantized tensor that no weight owns (FP8 outside the MX groups, an odd name) is an error, not a tensor to copy."""
    info = layouts.TensorInfo(torch.float8_e4m3fn, (64, 64))
    ref = WeightRef("a.up_proj.weight", "linear", (32, 64), mk.MXFP4)
    for name in ("quark", "compressed-tensors"):
        layout = layouts.LAYOUTS[name]
        infos = layout.plan(ref)
        configs = layout.config({"config.json": {}}, [ref], infos)
        with pytest.raises(ValueError, match=r"b\.kernel is float8_e4m3fn \[64, 64\], so it is quantized"):
            layout.refs(configs, infos | {"b.kernel": info})
