"""Independent readers: what transformers and compressed-tensors make of our checkpoints is, bit for bit, what we decode ourselves.

Tiny random models of each family are quantized and written in a layout, then loaded by transformers, which dequantizes on a CPU; the
same weights dequantized by us and stored in bf16 are loaded beside them. Every parameter must be equal. Which reader can read what:
docs/layouts.md; what they cannot read is read by compressed-tensors' own decompressors.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mx_kernels as mk
from mx_quant import layouts
from mx_quant.layouts import FUSED, LAYOUTS, PER_EXPERT

transformers = pytest.importorskip("transformers", minversion="5.23")

COMMON = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"intermediate_size": 64, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, intermediate_size=96),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **MOE, moe_intermediate_size=64, num_experts=4),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, **MOE, num_local_experts=4),
    "minimax-m2": lambda: transformers.MiniMaxM2Config(**COMMON, **MOE, num_local_experts=4, rotary_dim=16),
    "olmoe": lambda: transformers.OlmoeConfig(**{**COMMON, "num_key_value_heads": 4}, **MOE, num_experts=4),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{k: v for k, v in COMMON.items() if k != "head_dim"} | {"num_key_value_heads": 4}, **MOE, moe_intermediate_size=32,
        n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """family -> (config.json, tensors) of a random bf16 checkpoint as transformers saves it; rows differ by powers of two."""
    made = {}

    def get(family):
        if family not in made:
            torch.manual_seed(1)
            folder = tmp_path_factory.mktemp(family)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
            with torch.no_grad():
                for p in model.parameters():
                    rows = 2.0 ** torch.randint(-4, 3, (*p.shape[:-1], 1)) if p.ndim > 1 else 1.0
                    p.copy_(torch.randn(p.shape) * rows)
            model.save_pretrained(folder)
            made[family] = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        return made[family]

    return get


def getter(tensors):
    return lambda name, expert=None: tensors[name] if expert is None else tensors[name][expert]


def quantize(config, tensors, layout, f, chosen=lambda ref: True, *, power_of_two=False, grouping=None):
    """A checkpoint in ``layout`` and the same one dequantized by us: (config, tensors, dequantized tensors).

    power_of_two: NVFP4 global scales are such, so that the order in which a reader multiplies cannot matter.
    """
    family = layouts.family_of(config, tensors)
    sources = [r for r in layouts.plain_refs(config, tensors) if r.kind in ("linear", "expert", "fused_expert")]
    sources = [r for r in sources if chosen(r) and r.name != "lm_head.weight"]
    if "linear" not in layout.kinds:
        sources = [r for r in sources if r.kind != "linear"]
    if "expert" not in layout.kinds or "fused_expert" not in layout.kinds:
        grouping = FUSED if "expert" not in layout.kinds else PER_EXPERT
    by_name = {r.name: r for r in sources}
    weights = {r.name: layouts.read_plain(r, getter(tensors)) for r in sources}
    groups = layouts.joint_groups(sources) if f.has_global_scale else {}
    joint = {r.name: [m.name for m in g] for g in groups.values() for r in g}
    made = {}
    for name, w in weights.items():
        g = None
        if f.has_global_scale:  # one per matrix, so one per expert of a fused weight
            amax = torch.stack([weights[m].float().abs().amax((-1, -2)) for m in joint.get(name, [name])]).amax(0)
            g = (amax / 2688).log2().ceil().exp2() if power_of_two else layouts.exact_global(amax / 2688)
        made[name] = mk.quantize(w, f, global_scale=g)
    plain = {n: t for n, t in tensors.items() if n not in by_name}
    out, dense = dict(plain), dict(plain)
    refs = []
    for target in layouts.regroup(sources, grouping, family):
        ref = replace(target.ref, format=f)
        refs.append(ref)
        out |= layout.write(ref, layouts.assemble(target, lambda n, e: made[n] if e is None else made[n][e]))
    for name, ref in by_name.items():
        dense |= layouts.write_plain(ref, mk.dequantize(made[name], torch.bfloat16))
    return layout.config({"config.json": config}, refs, out)["config.json"], out, dense


def load(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    options = {}
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if method == "mxfp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    if method == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model


READS = [
    ("gpt-oss", mk.MXFP4, "gpt-oss"),
    *(("compressed-tensors", f, m) for f in (mk.MXFP4, mk.MXFP6_E2M3) for m in FAMILIES if m != "gpt-oss"),
    ("compressed-tensors", mk.MXFP8, "qwen3"),
    ("compressed-tensors", mk.NVFP4, "qwen3"),
    *(("mxfp8", mk.MXFP8, m) for m in FAMILIES if m != "gpt-oss"),
]


@pytest.mark.parametrize(("name", "f", "family"), READS, ids=[f"{n}-{f}-{m}" for n, f, m in READS])
def test_transformers(name, f, family, source, tmp_path):
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors", minversion="0.20")
    config, tensors = source(family)
    quantized, out, dense = quantize(config, tensors, LAYOUTS[name], f, power_of_two=True)
    found = dict(load(tmp_path / "quantized", quantized, out).state_dict())
    want = dict(load(tmp_path / "dense", config, dense).state_dict())
    assert set(found) == set(want)
    original = dict(load(tmp_path / "source", config, tensors).state_dict())
    changed = 0
    for n, w in want.items():
        assert found[n].dtype == w.dtype, n
        assert torch.equal(found[n], w), n
        changed += not torch.equal(w, original[n])
    assert changed >= 4  # weights really went through the format


@pytest.mark.parametrize(
    ("f", "power_of_two"),
    [(mk.MXFP4, True), (mk.MXFP6_E2M3, True), (mk.MXFP8, True), (mk.NVFP4, True), (mk.NVFP4, False)],
    ids=["mxfp4", "mxfp6", "mxfp8", "nvfp4-power-of-two", "nvfp4"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors(family, f, power_of_two, source):
    """compressed-tensors' decompressors on every weight, experts included (which transformers reads wrongly for NVFP4)."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config, tensors = source(family)
    quantized, out, dense = quantize(config, tensors, LAYOUTS["compressed-tensors"], f, power_of_two=power_of_two)
    parsed = QuantizationConfig.model_validate(quantized["quantization_config"])
    (scheme,) = parsed.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    want = {n: t for n, t in dense.items() if n.endswith(".weight")}
    for ref in layouts.plain_refs(config, dense):  # gpt-oss has its experts fused there
        if ref.kind == "fused_expert":
            for t in layouts.regroup([ref], PER_EXPERT, layouts.family_of(config)):
                one = layouts.read_plain(ref, getter(dense), expert=t.rows[0][0].expert)
                want[t.ref.name] = one[t.rows[0][0].start : t.rows[0][0].stop]
    modules = {n.removesuffix("weight_scale") for n in out if n.endswith(".weight_scale")}
    assert len(modules) >= 7
    for module in modules:
        state = {n.removeprefix(module): t for n, t in out.items() if n.startswith(module)}
        found = compressor.decompress(state, scheme)["weight"].bfloat16()
        dense_weight = want[module + "weight"]
        if power_of_two:
            assert torch.equal(found, dense_weight), module
        else:  # code * (scale / divisor) is rounded twice in float32, our code * scale * multiplier once: a bf16 tie may fall either way
            torch.testing.assert_close(found, dense_weight, rtol=2**-7, atol=0)


def test_modelopt_nvfp4_by_converter(source):
    """compressed-tensors' converter makes of our ModelOpt checkpoint what we write in its own layout."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    config, tensors = source("qwen3-moe")
    quantized, out, _ = quantize(config, tensors, LAYOUTS["modelopt"], mk.NVFP4)
    _, want, _ = quantize(config, tensors, LAYOUTS["compressed-tensors"], mk.NVFP4)
    ignore = quantized["quantization_config"]["ignore"]
    ignore = [*ignore, "re:.*norm$", "model.embed_tokens"]
    found = ModelOptNvfp4Converter(ignore=ignore, targets=["re:.*"]).validate(dict(out))
    assert set(found) == set(want)
    for n, t in want.items():
        assert torch.equal(found[n].reshape(t.shape).view(torch.uint8), t.view(torch.uint8)), n


def test_gpt_oss_exploded_and_fused_again(source, tmp_path):
    """gpt-oss through compressed-tensors, expert by expert, and back to the gpt-oss layout: transformers reads the same model."""
    config, tensors = source("gpt-oss")
    quantized, out, dense = quantize(
        config, tensors, LAYOUTS["compressed-tensors"], mk.MXFP4, lambda r: r.kind != "linear"
    )
    there, back = LAYOUTS["compressed-tensors"], LAYOUTS["gpt-oss"]
    refs = {r.name: r for r in there.refs({"config.json": quantized}, out)}
    result = {n: t for n, t in tensors.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    targets = layouts.regroup(list(refs.values()), FUSED, layouts.family_of(config))
    for target in targets:
        q = layouts.assemble(target, lambda n, e: there.read(refs[n], getter(out), expert=e))
        result |= back.write(target.ref, q)
    fused = back.config({"config.json": config}, [t.ref for t in targets], result)["config.json"]
    found = load(tmp_path / "fused", fused, result).state_dict()
    want = load(tmp_path / "dense", config, dense).state_dict()
    assert all(torch.equal(found[n], w) for n, w in want.items())


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_fused_source(family, source):
    """Experts fused as transformers 5 holds them, [E, 2I, H], quantize into per-expert layouts to the same bytes."""
    config, tensors = source(family)
    fused = dict(tensors)
    for target in layouts.regroup(layouts.plain_refs(config, tensors), FUSED, layouts.family_of(config)):
        if target.ref.kind == "fused_expert":
            for name in target.sources:
                del fused[name]
            fused[target.ref.name] = layouts.assemble_plain(target, lambda n, e: tensors[n])
    assert len(fused) < len(tensors)
    for name, f in (("compressed-tensors", mk.NVFP4), ("quark", mk.MXFP4), ("modelopt", mk.NVFP4)):
        config_a, a, _ = quantize(config, tensors, LAYOUTS[name], f, grouping=PER_EXPERT)
        config_b, b, _ = quantize(config, fused, LAYOUTS[name], f, grouping=PER_EXPERT)
        assert config_a == config_b
        assert set(a) == set(b)
        for n, t in a.items():
            assert torch.equal(t, b[n]) if t.ndim == 0 else torch.equal(t.view(torch.uint8), b[n].view(torch.uint8)), n


@pytest.mark.parametrize("f", [mk.MXFP4, mk.MXFP6_E2M3, mk.MXFP6_E3M2], ids=str)
def test_quark(f, source, tmp_path):
    """transformers with amd-quark reads our Quark checkpoints (amd-quark 0.13 has no OCP MXFP8 weights)."""
    pytest.importorskip("quark.torch")
    config, tensors = source("qwen3")
    quantized, out, dense = quantize(config, tensors, LAYOUTS["quark"], f)
    modules = dict(load(tmp_path / "quark", quantized, out).named_modules())
    names = [n.removesuffix("_scale") for n in out if n.endswith("weight_scale")]
    assert len(names) == 14
    for name in names:
        module = modules[name.removesuffix(".weight")]
        found = module.weight_quantizer(module.weight)
        assert torch.equal(found.bfloat16(), dense[name]), name


@pytest.mark.parametrize("f", [mk.NVFP4, mk.MXFP8], ids=str)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "deepseek-v3"])
def test_modelopt(f, family, source):
    """ModelOpt's own tensor classes decode what we write as we do."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    config, tensors = source(family)
    _, out, dense = quantize(config, tensors, LAYOUTS["modelopt"], f, power_of_two=True)
    names = [n.removesuffix("_scale") for n in out if n.endswith("weight_scale")]
    assert len(names) > 14
    for name in names:
        data, scale = out[name], out[name + "_scale"]
        if f is mk.MXFP8:
            found = qtensor.MXFP8QTensor(data.shape, torch.bfloat16, data).dequantize(scale=scale)
        else:
            q = qtensor.NVFP4QTensor(torch.Size((data.shape[0], 2 * data.shape[1])), torch.float32, data)
            double = out[name + "_scale_2"]
            found = q.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
        assert torch.equal(found.bfloat16(), dense[name]), name
