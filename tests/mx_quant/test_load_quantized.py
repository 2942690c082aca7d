from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import Runs, runs

import mx_quant as mq

transformers = pytest.importorskip("transformers")

# every layout with a format and a family that it holds
CASES = [
    ("gpt-oss", "mxfp4", "gpt_oss"),
    ("compressed-tensors", "mxfp4", "qwen3_moe"),
    ("compressed-tensors", "mxfp6", "mixtral"),
    ("compressed-tensors", "nvfp4", "qwen3_moe"),
    ("compressed-tensors", "mxfp8", "qwen3"),
    ("modelopt", "nvfp4", "mixtral"),
    ("modelopt", "mxfp8", "qwen3_moe"),
    ("mxfp8", "mxfp8", "mixtral"),
    ("mxfp8-weight-scale", "mxfp8", "qwen3_moe"),
    ("quark", "mxfp4", "mixtral"),
]


def config(family):
    common = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    moe = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    if family == "gpt_oss":
        oss = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
        return transformers.GptOssConfig(intermediate_size=96, **oss, **common)
    if family == "mixtral":
        return transformers.MixtralConfig(intermediate_size=64, num_local_experts=4, **common)
    if family == "qwen3":
        return transformers.Qwen3Config(intermediate_size=64, **common)
    return transformers.Qwen3MoeConfig(intermediate_size=64, **moe, **common)


def checkpoint(folder, family):
    transformers.AutoModelForCausalLM.from_config(config(family)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def empty(family):
    with mq.meta_parameters():
        return transformers.AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16).eval()


def tensors(model):
    """Every quantized tensor of a model by name."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, mq.MxLinear):
            q = module.quantized
            out |= {f"{name}.data": q.data, f"{name}.scale": q.scale}
        if isinstance(module, Runs):
            out |= {f"{name}.{n}": t for n, t in module.weights.named_tensors()}
    return out


@pytest.mark.parametrize(("layout", "format", "family"), CASES)
def test_every_layout(layout, format, family, tmp_path):
    """The same logits as transformers gives for the dequantized checkpoint; MX codes are those that loading online makes."""
    src = checkpoint(tmp_path / "src", family)
    mq.quantize_checkpoint(src, tmp_path / "out", format, layout=layout, jobs=1)
    model = mq.load_quantized(empty(family), tmp_path / "out", experts=runs)
    found = tensors(model)
    if family == "qwen3":
        assert model.mx_coverage.expert_percent is None
    else:
        assert model.mx_coverage.expert_percent == 100
    if format != "nvfp4":
        online = mq.load_online(empty(family), src, format, experts=runs)
        want = tensors(online)
        want = {n: t for n, t in want.items() if n in found}
        assert found.keys() == want.keys()
        for name, t in found.items():
            assert t.dtype == want[name].dtype
            assert torch.equal(t.contiguous().view(torch.uint8), want[name].contiguous().view(torch.uint8)), name

    mq.dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", jobs=1)
    ids = torch.arange(24).view(2, 12) % 128
    with torch.no_grad():
        load = transformers.AutoModelForCausalLM.from_pretrained
        expected = load(tmp_path / "plain", experts_implementation="eager").eval()(ids).logits.float()
        exact = load(src, experts_implementation="eager").eval()(ids).logits.float()
        got = model(ids).logits.float()
    # MX values are exact in bf16, so only the order of sums may differ (measured: 0 to 0.1%); NVFP4 values are rounded to bf16 in
    # the dequantized checkpoint (0.7%). The quantization itself moves these logits by 3 to 16%.
    assert (got - expected).norm() < (0.015 if format == "nvfp4" else 0.003) * expected.norm()
    assert (exact - expected).norm() > 0.02 * expected.norm()


def test_coverage_says_what_the_checkpoint_left(tmp_path):
    src = checkpoint(tmp_path / "src", "gpt_oss")
    mq.quantize_checkpoint(src, tmp_path / "out", "mxfp4", layout="gpt-oss", jobs=1)
    model = mq.load_quantized(empty("gpt_oss"), tmp_path / "out", experts=runs)
    rows = {r.name: r for r in model.mx_coverage.rows}
    assert rows["model.layers.0.mlp.experts.down_proj"].format == "mxfp4"
    assert rows["model.layers.0.self_attn.q_proj.weight"].reason == "in full precision in the checkpoint"
    assert model.mx_coverage.numel == sum(p.numel() for p in empty("gpt_oss").parameters())
    assert model.model.layers[0].mlp.experts.weights.w13_bias.dtype == torch.bfloat16


def test_input_scales_choose_the_activation(tmp_path):
    """A checkpoint with NVFP4 input scales runs with them; activation=None leaves inputs as they are."""
    src = checkpoint(tmp_path / "src", "qwen3")
    out = tmp_path / "out"
    mq.quantize_checkpoint(src, out, "nvfp4", layout="modelopt", jobs=1)
    for config_file in ("config.json", "hf_quant_config.json"):
        text = (out / config_file).read_text()
        assert "W4A16_NVFP4" in text
        (out / config_file).write_text(text.replace("W4A16_NVFP4", "NVFP4"))
    (file,) = out.glob("*.safetensors")
    stored = load_file(file)
    for name in [n for n in stored if n.endswith(".weight_scale_2")]:
        stored[name.replace("weight_scale_2", "input_scale")] = torch.tensor(0.01)
    save_file(stored, file, metadata={"format": "pt"})
    if (out / "model.safetensors.index.json").exists():
        index = {"metadata": {}, "weight_map": dict.fromkeys(stored, file.name)}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    layer = mq.load_quantized(empty("qwen3"), out).model.layers[0].mlp.down_proj
    assert layer.scheme == mq.NVFP4_W4A4
    assert layer.input_scale == torch.tensor(0.01)
    layer = mq.load_quantized(empty("qwen3"), out, activation=None).model.layers[0].mlp.down_proj
    assert layer.scheme == mq.NVFP4_W4A16
    assert layer.input_scale is None


def test_refusals_leave_the_model_as_it_was(tmp_path):
    src = checkpoint(tmp_path / "src", "qwen3_moe")
    out = tmp_path / "out"
    mq.quantize_checkpoint(src, out, "mxfp8", layout="mxfp8", jobs=1)
    model = empty("qwen3_moe")
    before = {n: id(p) for n, p in model.named_parameters()}
    for match, path, kwargs in (
        (r"has no quantized weight: load_online quantizes while loading", src, {"experts": runs}),
        (r"holds quantized experts \(model\.layers\.0\.mlp\.experts and 1 more\): pass experts=", out, {}),
        (
            r"no nn\.Linear and no fused experts for \d+ quantized weights .* rename",
            out,
            {"experts": runs, "rename": "x.{}".format},
        ),
    ):
        with pytest.raises(ValueError, match=match):
            mq.load_quantized(model, path, **kwargs)
    other = config("qwen3_moe")
    other.head_dim = 32
    with mq.meta_parameters():
        wider = transformers.AutoModelForCausalLM.from_config(other)
    with pytest.raises(
        ValueError, match=r"k_proj\.weight has shape \(32, 64\) in the checkpoint, the model needs \(64, 64\)"
    ):
        mq.load_quantized(wider, out, experts=runs)
    (file,) = out.glob("*.safetensors")
    stored = load_file(file)
    del stored["model.norm.weight"]
    save_file(stored | {"more": torch.zeros(1)}, file)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"1 tensors that .* needs: model\.norm\.weight .*; it has 1 tensors .*: more"):
        mq.load_quantized(model, out, experts=runs)
    assert {n: id(p) for n, p in model.named_parameters()} == before
