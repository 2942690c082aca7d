"""Small models of every form that plans and loaders tell apart, and checkpoints of them. Loaded by conftest.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mx_kernels as mk
import mx_quant as mq

E, H, I = 3, 64, 32


class Experts(nn.Module):
    """Fused experts as transformers 5 has them; ``oss`` transposed, interleaved and with biases."""

    def __init__(self, oss=False):
        super().__init__()
        self.is_transposed, self.is_concatenated = oss, not oss
        self.gate_up_proj = nn.Parameter(torch.randn(E, H, 2 * I) if oss else torch.randn(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.randn(E, I, H) if oss else torch.randn(E, H, I))
        if oss:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * I))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H))


class Block(nn.Module):
    def __init__(self, oss=False):
        super().__init__()
        self.q_proj = nn.Linear(H, H)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = Experts(oss)
        self.norm = nn.LayerNorm(H)


class Model(nn.Module):
    """An embedding, two blocks and a head: everything that a plan has to tell apart."""

    def __init__(self, oss=False):
        super().__init__()
        self.embed = nn.Embedding(10, H)
        self.layers = nn.ModuleList([Block(oss), Block(oss)])
        self.lm_head = nn.Linear(H, 10, bias=False)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


class Dense(nn.Module):
    def __init__(self, k=H):
        super().__init__()
        self.one = nn.Linear(k, 32)
        self.two = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Held(nn.Module):
    """What a factory of experts returns: it holds the weights it was given."""

    def __init__(self, name, weights):
        super().__init__()
        self.name, self.weights = name, weights


def held(name, module, weights):
    return Held(name, weights)


def same(a, b) -> bool:
    x, y = dict(a.named_tensors()), dict(b.named_tensors())
    return x.keys() == y.keys() and all(
        torch.equal(x[n].reshape(-1).view(torch.uint8), y[n].reshape(-1).view(torch.uint8)) for n in x
    )


def same_weight(a, b) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(
        a.scale.view(torch.uint8), b.scale.view(torch.uint8)
    )


def canonical(m: Experts):
    """Independent of the code under test: transpose, then pick even and odd rows."""
    w13, w2, b13, b2 = m.gate_up_proj.detach(), m.down_proj.detach(), None, None
    if m.is_transposed:
        w13, w2 = w13.permute(0, 2, 1), w2.permute(0, 2, 1)
        w13 = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1).contiguous()
        b13 = m.gate_up_proj_bias.detach()
        b13, b2 = torch.cat((b13[:, 0::2], b13[:, 1::2]), 1), m.down_proj_bias.detach()
    return w13, w2.contiguous(), b13, b2


def expected_experts(m: Experts, format):
    w13, w2, b13, b2 = canonical(m)
    return mq.ExpertWeights(mk.quantize(w13, format), mk.quantize(w2, format), b13, b2)


def empty(cls=Model, *args):
    with mq.meta_parameters():
        return cls(*args)


def write(folder, state):
    """Two shards with an index, names in turn, so that modules cross files."""
    names = sorted(state)
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].contiguous() for n in names if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def apart(state):
    """Fused experts one by one, as Qwen3-MoE has them on disk."""
    out = {}
    for name, t in state.items():
        module, _, last = name.rpartition(".")
        for e in range(E) if last in ("gate_up_proj", "down_proj") else ():
            if last == "down_proj":
                out[f"{module}.{e}.down_proj.weight"] = t[e]
            else:
                out[f"{module}.{e}.gate_proj.weight"], out[f"{module}.{e}.up_proj.weight"] = t[e, :I], t[e, I:]
        if last not in ("gate_up_proj", "down_proj"):
            out[name] = t
    return out


class Runs(nn.Module):
    """Runs dequantized experts one after another with the source's own gate: an independent forward."""

    def __init__(self, module, weights):
        super().__init__()
        self.gate, self.woven, self.weights = module._apply_gate, not module.is_concatenated, weights

    def forward(self, x, ids, scores):
        w, out = self.weights, torch.zeros_like(x)
        w13, w2 = mk.dequantize(w.w13), mk.dequantize(w.w2)
        for e in range(w.num_experts):
            t, slot = (ids == e).nonzero(as_tuple=True)
            h = nn.functional.linear(x[t], w13[e], None if w.w13_bias is None else w.w13_bias[e])
            h = nn.functional.linear(
                self.gate(mq.interleave(h, 1) if self.woven else h), w2[e], None if w.w2_bias is None else w.w2_bias[e]
            )
            out.index_add_(0, t, (h * scores[t, slot, None]).to(x.dtype))
        return out


def runs(name, module, weights):
    return Runs(module, weights)


def tiny(family):
    """The configuration of a small model of each family."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": family == "qwen3_tied", "dtype": "bfloat16",
    }  # fmt: skip
    if family == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **common | {"num_hidden_layers": 3, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4,
            n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
            kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
    common |= {} if family == "olmoe" else {"head_dim": 16}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    qwen = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "gpt_oss": lambda: transformers.GptOssConfig(**common | {"intermediate_size": 96}, **local, sliding_window=8),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**common, **qwen),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**common, **qwen, shared_expert_intermediate_size=64),
        "mixtral": lambda: transformers.MixtralConfig(**common, **local),
        "minimax_m2": lambda: transformers.MiniMaxM2Config(
            **common, **local, rotary_dim=16, bos_token_id=1, eos_token_id=2
        ),
        "olmoe": lambda: transformers.OlmoeConfig(**common, num_experts=4, num_experts_per_tok=2, eos_token_id=2),
        "qwen3": lambda: transformers.Qwen3Config(**common),
        "qwen3_tied": lambda: transformers.Qwen3Config(**common),
    }[family]()
