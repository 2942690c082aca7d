"""Small checkpoints for tests: random weights under the names and shapes of real model families."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def moe_tensors(
    layers=2, experts=4, hidden=64, inner=96, vocab=96, seed=0, dtype=torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Qwen3-MoE names: per-expert gate, up and down."""
    g = torch.Generator().manual_seed(seed)

    def w(*shape):
        return (torch.randn(*shape, generator=g) * 0.05 * (1 + torch.rand(shape[0], 1, generator=g) * 3)).to(dtype)

    t = {"model.embed_tokens.weight": w(vocab, hidden), "lm_head.weight": w(vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}"
        for n, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            t[f"{p}.self_attn.{n}_proj.weight"] = w(rows, hidden)
        t[f"{p}.self_attn.o_proj.weight"] = w(hidden, hidden)
        t[f"{p}.mlp.gate.weight"] = w(experts, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[f"{p}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
        for e in range(experts):
            t[f"{p}.mlp.experts.{e}.gate_proj.weight"] = w(inner, hidden)
            t[f"{p}.mlp.experts.{e}.up_proj.weight"] = w(inner, hidden)
            t[f"{p}.mlp.experts.{e}.down_proj.weight"] = w(hidden, inner)
    t["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    return t


def gpt_oss_tensors(layers=1, experts=3, hidden=64, inner=96, seed=0) -> dict[str, torch.Tensor]:
    """gpt-oss names: fused, transposed [E, K, N], gate and up interleaved, with biases."""
    g = torch.Generator().manual_seed(seed)

    def w(*shape):
        return (torch.randn(*shape, generator=g) * 0.05).bfloat16()

    t = {"model.embed_tokens.weight": w(96, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}"
        t[f"{p}.self_attn.q_proj.weight"] = w(hidden, hidden)
        t[f"{p}.mlp.router.weight"] = w(experts, hidden)
        t[f"{p}.mlp.experts.gate_up_proj"] = w(experts, hidden, 2 * inner)
        t[f"{p}.mlp.experts.gate_up_proj_bias"] = w(experts, 2 * inner)
        t[f"{p}.mlp.experts.down_proj"] = w(experts, inner, hidden)
        t[f"{p}.mlp.experts.down_proj_bias"] = w(experts, hidden)
    return t


def save(folder: Path, tensors: dict[str, torch.Tensor], model_type="qwen3_moe", shards=1, **config) -> Path:
    """A checkpoint folder in the way of ``save_pretrained``: names sorted, an index where there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "dtype": "bfloat16", **config}, indent=2))
    (folder / "tokenizer.json").write_text('{"kind": "test"}')
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map, step = {}, -(-len(names) // shards)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * step : (i + 1) * step]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
