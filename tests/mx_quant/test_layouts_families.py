"""Roles of tensors by name, for every family that is claimed."""

from __future__ import annotations

import pytest
import torch

from mx_quant import layouts
from mx_quant.layouts import FAMILIES, classify, family_of
from mx_quant.layouts.families import deinterleave, interleave

P = "model.layers.3"

ROLES = [
    # Qwen3-MoE, OLMoE, DeepSeek-V3
    (f"{P}.mlp.experts.7.gate_proj.weight", "expert", "gate"),
    (f"{P}.mlp.experts.7.up_proj.weight", "expert", "up"),
    (f"{P}.mlp.experts.7.down_proj.weight", "expert", "down"),
    (f"{P}.mlp.experts.7.gate_up_proj.weight", "expert", "gate_up"),
    (f"{P}.mlp.gate.weight", "router", ""),
    (f"{P}.mlp.gate.e_score_correction_bias", "router", ""),
    (f"{P}.mlp.shared_experts.up_proj.weight", "shared_expert", "up"),
    (f"{P}.mlp.shared_expert.up_proj.weight", "shared_expert", "up"),
    (f"{P}.mlp.shared_expert_gate.weight", "router", ""),
    (f"{P}.self_attn.q_a_proj.weight", "attention", "q_a_proj"),
    (f"{P}.self_attn.kv_a_proj_with_mqa.weight", "attention", "kv_a_proj_with_mqa"),
    (f"{P}.self_attn.q_a_layernorm.weight", "norm", ""),
    # Mixtral, MiniMax-M2
    (f"{P}.block_sparse_moe.experts.7.w1.weight", "expert", "gate"),
    (f"{P}.block_sparse_moe.experts.7.w3.weight", "expert", "up"),
    (f"{P}.block_sparse_moe.experts.7.w2.weight", "expert", "down"),
    (f"{P}.block_sparse_moe.gate.weight", "router", ""),
    (f"{P}.block_sparse_moe.e_score_correction_bias", "router", ""),
    # gpt-oss, both namings
    (f"{P}.mlp.experts.gate_up_proj", "fused_expert", "gate_up"),
    (f"{P}.mlp.experts.down_proj", "fused_expert", "down"),
    (f"{P}.mlp.experts.gate_up_proj_bias", "fused_bias", "gate_up"),
    (f"{P}.mlp.router.weight", "router", ""),
    (f"{P}.mlp.router.bias", "router", ""),
    ("block.3.mlp.mlp1_weight", "fused_expert", "gate_up"),
    ("block.3.mlp.mlp2_bias", "fused_bias", "down"),
    ("block.3.attn.norm.scale", "norm", ""),
    ("block.3.attn.qkv.weight", "attention", "qkv"),
    ("unembedding.weight", "lm_head", ""),
    ("embedding.weight", "embedding", ""),
    # dense
    (f"{P}.self_attn.q_proj.weight", "attention", "q"),
    (f"{P}.self_attn.q_norm.weight", "norm", ""),
    (f"{P}.self_attn.q_proj.bias", "other", ""),
    (f"{P}.mlp.gate_proj.weight", "mlp", "gate"),
    (f"{P}.mlp.gate_up_proj.weight", "mlp", "gate_up"),
    (f"{P}.input_layernorm.weight", "norm", ""),
    ("model.embed_tokens.weight", "embedding", ""),
    ("model.norm.weight", "norm", ""),
    ("lm_head.weight", "lm_head", ""),
    ("model.layers.61.eh_proj.weight", "other", ""),
    # Nemotron-H, Hunyuan, Granite
    ("backbone.layers.3.mixer.experts.7.up_proj.weight", "expert", "up"),
    ("backbone.layers.3.mixer.gate.weight", "router", ""),
    (f"{P}.mlp.gate.wg.weight", "router", ""),
    (f"{P}.mlp.shared_mlp.gate_proj.weight", "shared_expert", "gate"),
    (f"{P}.block_sparse_moe.router.layer.weight", "router", ""),
    # models inside models
    ("model.language_model.layers.3.mlp.experts.gate_up_proj", "fused_expert", "gate_up"),
    ("language_model.model.layers.3.feed_forward.experts.down_proj", "fused_expert", "down"),
    ("language_model.model.layers.3.feed_forward.router.weight", "router", ""),
    ("model.visual.blocks.0.attn.qkv.weight", "encoder", ""),
    ("vision_tower.layers.0.self_attn.q_proj.weight", "encoder", ""),
]


@pytest.mark.parametrize(("name", "kind", "part"), ROLES)
def test_classify(name, kind, part):
    role = classify(name)
    assert (role.kind, role.part) == (kind, part)
    if ".3." in name:
        assert role.layer == 3
    assert role.expert == (7 if ".7." in name else None)
    if kind in ("expert", "fused_expert", "fused_bias"):
        assert name.startswith(role.experts + ".")


def test_groups():
    def group(name):
        return classify(name).group

    p = f"{P}.mlp.experts"
    assert group(f"{p}.7.gate_proj.weight") == group(f"{p}.7.up_proj.weight") != group(f"{p}.6.up_proj.weight")
    assert group(f"{p}.7.down_proj.weight") is None
    assert group(f"{p}.gate_up_proj") is None  # it is one matrix already
    p = f"{P}.self_attn"
    assert group(f"{p}.q_proj.weight") == group(f"{p}.k_proj.weight") == group(f"{p}.v_proj.weight") is not None
    assert group(f"{p}.o_proj.weight") is None
    assert group(f"{p}.q_a_proj.weight") == group(f"{p}.kv_a_proj_with_mqa.weight") is not None
    assert group(f"{P}.block_sparse_moe.experts.1.w1.weight") == group(f"{P}.block_sparse_moe.experts.1.w3.weight")
    assert (
        group(f"{P}.mlp.gate_proj.weight")
        == group(f"{P}.mlp.up_proj.weight")
        != group("model.layers.4.mlp.up_proj.weight")
    )


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.model_types])
def test_family_by_model_type(name):
    for model_type in FAMILIES[name].model_types:
        assert family_of({"model_type": model_type}).name == name
        assert family_of({"model_type": "wrapper", "text_config": {"model_type": model_type}}).name == name


def test_family_by_names():
    assert family_of({}, ["model.layers.0.mlp.experts.gate_up_proj_blocks"]).name == "gpt-oss"
    assert family_of({}, ["block.0.mlp.mlp1_weight.blocks"]).name == "gpt-oss"
    assert family_of({}, ["block.0.mlp.experts.0.up_proj.weight"]).name == "gpt-oss"
    assert family_of({}, ["model.layers.0.mlp.experts.0.gate_proj.bias"]).name == "gpt-oss"
    assert family_of({"model_type": "new"}, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"]).gate == "w1"
    assert family_of({"model_type": "new"}, ["model.layers.0.mlp.experts.0.up_proj.weight"]).gate == "gate_proj"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn])
def test_interleave(dtype):
    rows = torch.arange(12, dtype=torch.uint8).to(dtype)[:, None].expand(12, 3)
    mixed = interleave(rows, 0)
    assert mixed[:, 0].float().tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert torch.equal(deinterleave(mixed, 0).float(), rows.float())
    assert torch.equal(interleave(rows.T[None], 2).float(), mixed.T[None].float())


def test_plain_refs():
    """gpt-oss stores [E, H, 2I] interleaved; the reference is canonical and read_plain and write_plain are inverses."""
    e, h, i = 2, 8, 6
    names = {
        "gate_up_proj": (e, h, 2 * i),
        "down_proj": (e, i, h),
        "gate_up_proj_bias": (e, 2 * i),
        "down_proj_bias": (e, h),
    }
    tensors = {f"{P}.mlp.experts.{n}": torch.randn(s).bfloat16() for n, s in names.items()}
    tensors |= {f"{P}.mlp.router.weight": torch.randn(e, h), f"{P}.self_attn.q_proj.weight": torch.randn(h, h)}
    tensors |= {f"{P}.input_layernorm.weight": torch.ones(h), "lm_head.weight": torch.randn(4, h)}
    refs = {r.name: r for r in layouts.plain_refs({"model_type": "gpt_oss"}, tensors)}
    assert {n: (r.kind, r.shape) for n, r in refs.items()} == {
        f"{P}.mlp.experts.gate_up_proj": ("fused_expert", (e, 2 * i, h)),
        f"{P}.mlp.experts.down_proj": ("fused_expert", (e, h, i)),
        f"{P}.mlp.experts.gate_up_proj_bias": ("fused_bias", (e, 2 * i)),
        f"{P}.mlp.experts.down_proj_bias": ("fused_bias", (e, h)),
        f"{P}.self_attn.q_proj.weight": ("linear", (h, h)),
        "lm_head.weight": ("linear", (4, h)),
    }

    def get(name, expert=None):
        return tensors[name] if expert is None else tensors[name][expert]

    w = tensors[f"{P}.mlp.experts.gate_up_proj"]
    found = layouts.read_plain(refs[f"{P}.mlp.experts.gate_up_proj"], get)
    assert torch.equal(found[:, :i], w[:, :, 0::2].transpose(1, 2))
    assert torch.equal(found[:, i:], w[:, :, 1::2].transpose(1, 2))
    b = tensors[f"{P}.mlp.experts.gate_up_proj_bias"]
    assert torch.equal(
        layouts.read_plain(refs[f"{P}.mlp.experts.gate_up_proj_bias"], get), torch.cat([b[:, 0::2], b[:, 1::2]], 1)
    )
    for name, ref in refs.items():
        x = layouts.read_plain(ref, get)
        assert tuple(x.shape) == ref.shape
        assert torch.equal(layouts.write_plain(ref, x)[name], tensors[name])
        info = layouts.plan_plain(ref, tensors[name].dtype)[name]
        assert (info.dtype, info.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        for expert in range(ref.experts or 0):
            one = layouts.read_plain(ref, get, expert=expert)
            assert torch.equal(one, x[expert])
            assert torch.equal(layouts.write_plain(ref, one)[name], tensors[name][expert])
