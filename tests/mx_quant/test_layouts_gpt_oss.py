"""gpt-oss in both namings: bytes against the layout's definition, and whole checkpoints under OpenAI's own names."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mx_kernels as mk
import mx_quant as mq
from mx_quant.layouts import FAMILIES, LAYOUTS, TensorInfo, WeightRef
from mx_quant.layouts.gpt_oss_names import rename, rename_config
from mx_quant.plan import expert_holes

E, H, I = 2, 64, 32


def test_bytes():
    """blocks[e, 2 * i] is gate row i of expert e and blocks[e, 2 * i + 1] up row i; byte j of a block holds codes 2j, 2j + 1."""
    layout = LAYOUTS["gpt-oss"]
    ref = WeightRef("m.mlp.experts.gate_up_proj", "fused_expert", (E, 2 * I, H), mk.MXFP4)
    codes = torch.randint(0, 16, (E, 2 * I, H), dtype=torch.uint8)
    scale = torch.randint(0, 255, (E, 2 * I, H // 32), dtype=torch.uint8)
    q = mk.QuantizedTensor(codes[..., 0::2] | codes[..., 1::2] << 4, scale, mk.MXFP4, mk.ScaleRule.EVEN)
    out = layout.write(ref, q)
    blocks, scales = out["m.mlp.experts.gate_up_proj_blocks"], out["m.mlp.experts.gate_up_proj_scales"]
    assert (blocks.shape, scales.shape) == ((E, 2 * I, H // 32, 16), (E, 2 * I, H // 32))
    for row, stored in ((0, 0), (I, 1), (3, 6), (I + 5, 11)):
        assert torch.equal(scales[:, stored], scale[:, row])
        for block in range(H // 32):
            want = codes[:, row, 32 * block : 32 * block + 32]
            assert torch.equal(blocks[:, stored, block] & 15, want[:, 0::2])
            assert torch.equal(blocks[:, stored, block] >> 4, want[:, 1::2])


@pytest.fixture
def original(tmp_path):
    """A random bf16 checkpoint under OpenAI's names, and its tensors."""
    tensors = {}
    for block in range(2):
        p = f"block.{block}"
        shapes = {
            "mlp.mlp1_weight": (E, 2 * I, H), "mlp.mlp1_bias": (E, 2 * I), "mlp.mlp2_weight": (E, H, I), "mlp.mlp2_bias": (E, H),
            "attn.qkv.weight": (96, H), "mlp.gate.weight": (E, H), "attn.norm.scale": (H,),
        }  # fmt: skip
        tensors |= {f"{p}.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors |= {n: torch.randn(16, H).bfloat16() for n in ("embedding.weight", "unembedding.weight")}
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_experts": E}))
    return folder, tensors


def test_original_names(original, tmp_path):
    source, tensors = original
    mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss-original")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "quantization_config" not in config
    quantized = {n for n in tensors if n.endswith(("mlp1_weight", "mlp2_weight"))}
    assert set(stored) == (set(tensors) - quantized) | {f"{n}.{s}" for n in quantized for s in ("blocks", "scales")}
    for name in set(tensors) - quantized:
        assert torch.equal(stored[name], tensors[name])
    for name in quantized:  # rows stay as they were stored: interleaved
        q = mk.quantize(tensors[name], mk.MXFP4)
        assert torch.equal(stored[f"{name}.blocks"].flatten(-2), q.data)
        assert torch.equal(stored[f"{name}.scales"], q.scale)


@pytest.mark.parametrize("middle", ["quark", "compressed-tensors"])
def test_original_there_and_back(middle, original, tmp_path):
    """Expert by expert in another layout, biases too, and back: the same bytes under the same names."""
    source, tensors = original
    mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss-original")
    mq.convert_checkpoint(tmp_path / "q", tmp_path / "there", layout=middle)
    there = load_file(tmp_path / "there" / "model.safetensors")
    assert torch.equal(there["block.1.mlp.experts.1.up_proj.bias"], tensors["block.1.mlp.mlp1_bias"][1, 1::2])
    mq.convert_checkpoint(tmp_path / "there", tmp_path / "back", layout="gpt-oss-original")
    want, found = (load_file(tmp_path / n / "model.safetensors") for n in ("q", "back"))
    assert set(want) == set(found)
    assert all(torch.equal(want[n], found[n]) for n in want)


def test_namings_do_not_mix(original, tmp_path):
    source, _ = original
    with pytest.raises(
        ValueError,
        match=r"block\.0\.mlp\.mlp1_weight is not named as layout gpt-oss names experts.*use gpt-oss-original",
    ):
        mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss")
    assert not (tmp_path / "q").exists()
    ref = WeightRef("model.layers.0.mlp.experts.down_proj", "fused_expert", (E, H, I), mk.MXFP4)
    with pytest.raises(ValueError, match=r"is not named as layout gpt-oss-original names experts.*use gpt-oss"):
        LAYOUTS["gpt-oss-original"].plan(ref)


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def published(tmp_path, checkpoints):
    """A bf16 gpt-oss checkpoint under transformers' names with everything that the published ones hold, quantized by us."""
    tensors = checkpoints.gpt_oss_tensors(layers=2)
    for i in range(2):
        p = f"model.layers.{i}"
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"{p}.self_attn.{name}_proj.weight"] = torch.randn(rows, 64).bfloat16()
            tensors[f"{p}.self_attn.{name}_proj.bias"] = torch.randn(rows).bfloat16()
        tensors[f"{p}.self_attn.o_proj.weight"] = torch.randn(64, 64).bfloat16()
        tensors[f"{p}.self_attn.o_proj.bias"] = torch.randn(64).bfloat16()
        tensors[f"{p}.self_attn.sinks"] = torch.randn(4).bfloat16()
        tensors[f"{p}.mlp.router.bias"] = torch.randn(3).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}.{name}.weight"] = torch.randn(64)
    tensors["model.norm.weight"] = torch.randn(64)
    tensors["lm_head.weight"] = torch.randn(96, 64).bfloat16()
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    rope["original_max_position_embeddings"] = 64
    config = {
        **HEADS, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "num_local_experts": 3,
        "num_experts_per_tok": 2, "swiglu_limit": 7.0, "sliding_window": 8, "rope_theta": 150000, "rope_scaling": rope,
    }  # fmt: skip
    checkpoints.save(tmp_path / "bf16", tensors, model_type="gpt_oss", **config)
    mq.quantize_checkpoint(tmp_path / "bf16", tmp_path / "published", mk.MXFP4, layout="gpt-oss")
    return tmp_path / "published", tensors


def test_from_published_names_to_openai_names_and_back(published, tmp_path):
    folder, tensors = published
    mq.convert_checkpoint(folder, tmp_path / "original", "gpt-oss-original", max_shard_size=30_000)
    with mq.Checkpoint(tmp_path / "original") as ck, mq.Checkpoint(folder) as before:
        assert ck.layout is LAYOUTS["gpt-oss-original"]
        assert all(n.startswith(("block.0.", "block.1.", "embedding.", "norm.", "unembedding.")) for n in ck.infos)
        get, was = ck.reader.get, before.reader.get
        for i in range(2):
            a, b = f"block.{i}", f"model.layers.{i}"
            for last in ("weight", "bias"):
                joined = torch.cat([tensors[f"{b}.self_attn.{p}_proj.{last}"] for p in "qkv"])
                assert torch.equal(get(f"{a}.attn.qkv.{last}"), joined)
                assert torch.equal(get(f"{a}.attn.out.{last}"), tensors[f"{b}.self_attn.o_proj.{last}"])
                assert torch.equal(get(f"{a}.mlp.gate.{last}"), tensors[f"{b}.mlp.router.{last}"])
            assert torch.equal(get(f"{a}.attn.sinks"), tensors[f"{b}.self_attn.sinks"])
            assert torch.equal(get(f"{a}.attn.norm.scale"), tensors[f"{b}.input_layernorm.weight"])
            assert torch.equal(get(f"{a}.mlp.norm.scale"), tensors[f"{b}.post_attention_layernorm.weight"])
            for one, other in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
                assert torch.equal(get(f"{a}.mlp.{one}_bias"), tensors[f"{b}.mlp.experts.{other}_bias"])
                for part in ("blocks", "scales"):
                    assert torch.equal(get(f"{a}.mlp.{one}_weight.{part}"), was(f"{b}.mlp.experts.{other}_{part}"))
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config.pop("mx_quant")["layout"] == "gpt-oss-original"
    assert config == {
        **HEADS, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "num_experts": 3,
        "experts_per_token": 2, "swiglu_limit": 7.0, "sliding_window": 8, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_beta": 32.0, "rope_ntk_alpha": 1.0, "initial_context_length": 64,
    }  # fmt: skip
    assert mq.verify_checkpoint(tmp_path / "original").ok
    mq.convert_checkpoint(tmp_path / "original", tmp_path / "back", "gpt-oss")
    want, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert set(want) == set(found)
    assert all(torch.equal(want[n], found[n]) and want[n].dtype == found[n].dtype for n in want)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert {k: v for k, v in old.items() if k != "mx_quant"}.items() <= new.items()
    assert new["max_position_embeddings"] == 2048


def test_openai_names_by_way_of_single_experts(published, tmp_path):
    """OpenAI's names, expert by expert in another layout, and from there under transformers' names."""
    folder, _ = published
    mq.convert_checkpoint(folder, tmp_path / "original", "gpt-oss-original")
    mq.convert_checkpoint(tmp_path / "original", tmp_path / "single", "quark")
    mq.convert_checkpoint(tmp_path / "single", tmp_path / "back", "gpt-oss")
    want, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert set(want) == set(found)
    assert all(torch.equal(want[n], found[n]) for n in want)


def test_transformers_reads_what_was_under_openai_names(published, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    folder, _ = published
    mq.convert_checkpoint(folder, tmp_path / "original", "gpt-oss-original")
    mq.convert_checkpoint(tmp_path / "original", tmp_path / "back", "gpt-oss")
    mq.dequantize_checkpoint(folder, tmp_path / "plain")
    models = []
    for place, options in (("back", {"quantization_config": transformers.Mxfp4Config(dequantize=True)}), ("plain", {})):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / place, dtype=torch.bfloat16, output_loading_info=True, **options
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        models.append(model.state_dict())
    assert all(torch.equal(t, models[1][n]) for n, t in models[0].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, c: t.update({"block.0.extra.weight": torch.zeros(2)}),
            r"block\.0\.extra\.weight has no counterpart",
        ),
        (lambda t, c: c.pop("head_dim"), r"head_dim is None, needs a positive integer"),
        (lambda t, c: c.update(rope_scaling_factor="x"), r"rope_scaling_factor is 'x', needs a positive number"),
        (lambda t, c: c.update(initial_context_length=1e400), r"initial_context_length is 'inf', needs"),
        (lambda t, c: c.update(head_dim=8), r"has 128 rows, but config\.json's heads make 64"),
    ],
)
def test_what_cannot_be_renamed(published, tmp_path, change, message):
    folder, _ = published
    mq.convert_checkpoint(folder, tmp_path / "original", "gpt-oss-original")
    bad = tmp_path / "bad"
    bad.mkdir()
    tensors, config = (
        load_file(tmp_path / "original" / "model.safetensors"),
        json.loads((tmp_path / "original" / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, bad / "model.safetensors")
    (bad / "config.json").write_text(json.dumps(config).replace("Infinity", "1e400"))
    with pytest.raises(ValueError, match=message):
        mq.convert_checkpoint(bad, tmp_path / "out", "gpt-oss")
    assert not (tmp_path / "out").exists()


def test_q_without_k_cannot_be_joined(published, tmp_path):
    folder, _ = published
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file(tensors, bad / "model.safetensors")
    (bad / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"k_proj\.bias is not: OpenAI's names need q, k and v"):
        mq.convert_checkpoint(bad, tmp_path / "out", "gpt-oss-original")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["num_experts", "num_local_experts", "text_config", "head_dim", "num_attention_heads", "rope_scaling",
                         "rope_parameters", "rope_scaling_factor", "initial_context_length", "rope_ntk_beta"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda x: st.lists(x, max_size=2)
                     | st.dictionaries(st.sampled_from(["factor", "beta_fast", "num_experts", "rope_theta"]), x, max_size=2), max_leaves=4),
    ),
    st.booleans(),
)  # fmt: skip
def test_any_configuration_is_renamed_or_refused(config, original):
    infos = {
        n: TensorInfo(torch.bfloat16, (4, 2))
        for n in ("block.0.attn.qkv.weight", "model.layers.0.self_attn.q_proj.weight")
    }
    names = ["model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.gate.weight"]
    for call in (
        lambda: rename_config(config, original=original),
        lambda: rename(config, infos, original=original),
        lambda: expert_holes(names, FAMILIES["qwen3-moe"], config, allow=("*.7.*",)),
    ):
        try:
            json.dumps(call(), default=str)
        except ValueError as e:
            error = str(e)
        else:
            continue
        assert any(said in error for said in ("config.json", "counterpart", "together")), error
