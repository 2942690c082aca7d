"""Make a synthetic Qwen3-MoE checkpoint in bf16: real names and shapes, random weights, five shards, 2.57 GB by default.

    python benchmarks/make_checkpoint.py OUT [--layers 2] [--experts 128] [--shards 5] [--seed 0]

Weights are normal, with a scale of their own for every row, so that block scales vary as they do in trained weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mx_quant import ShardWriter, TensorSpec, plan_shards

HIDDEN, INNER, VOCAB, HEADS, KV, HEAD = 2048, 768, 9728, 32, 4, 128


def shapes(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, sorted by name as ``save_pretrained`` writes them."""
    found: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        p = f"model.layers.{i}"
        found |= {
            f"{p}.input_layernorm.weight": (HIDDEN,),
            f"{p}.post_attention_layernorm.weight": (HIDDEN,),
            f"{p}.mlp.gate.weight": (experts, HIDDEN),
            f"{p}.self_attn.q_norm.weight": (HEAD,),
            f"{p}.self_attn.k_norm.weight": (HEAD,),
            f"{p}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{p}.self_attn.k_proj.weight": (KV * HEAD, HIDDEN),
            f"{p}.self_attn.v_proj.weight": (KV * HEAD, HIDDEN),
            f"{p}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        }
        for e in range(experts):
            q = f"{p}.mlp.experts.{e}"
            found[f"{q}.gate_proj.weight"] = found[f"{q}.up_proj.weight"] = (INNER, HIDDEN)
            found[f"{q}.down_proj.weight"] = (HIDDEN, INNER)
    yield from sorted(found.items())


def config(layers: int, experts: int) -> dict[str, object]:
    """config.json of that model."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }


def make(out: Path, layers: int = 2, experts: int = 128, shards: int = 5, seed: int = 0) -> int:
    """Write the checkpoint into the new folder ``out``; its bytes."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config(layers, experts), indent=2) + "\n")
    g = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 24, generator=g) * 0.02  # drawing every weight anew would take most of a minute

    def weight(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        n = shape[0] * shape[1]
        start = int(torch.randint(0, pool.numel(), (1,), generator=g))
        values = torch.cat([pool[start : start + n], pool[: max(0, start + n - pool.numel())]])
        values = values.repeat(-(-n // values.numel()))[:n].view(shape)
        return (values * torch.rand(shape[0], 1, generator=g).mul_(2).exp_()).to(torch.bfloat16)

    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes(layers, experts)]
    total = sum(s.nbytes for s in specs)
    largest = max(s.nbytes for s in specs)
    planned = plan_shards(specs, total // shards + largest, {"format": "pt"})
    with ShardWriter(out, planned) as writer:
        for s in specs:
            writer.write(s.name, weight(s.shape))
        writer.finish()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    total = make(a.out, a.layers, a.experts, a.shards, a.seed)
    print(f"{a.out}: {total / 1e9:.3f} GB in {len(list(a.out.glob('*.safetensors')))} shards")


if __name__ == "__main__":
    main()
