"""gpt-oss under OpenAI's names and under those of transformers: which tensor becomes which, and what config.json says.

L the layer, q = heads * head_dim rows of queries, k = kv heads * head_dim rows of keys and of values::

    block.L.attn.qkv.{weight,bias} [q + 2k, ..]   model.layers.L.self_attn.{q,k,v}_proj.{weight,bias}
    block.L.attn.out.{weight,bias}, .sinks        model.layers.L.self_attn.o_proj.{weight,bias}, .sinks
    block.L.attn.norm.scale, mlp.norm.scale       model.layers.L.input_layernorm.weight, post_attention_layernorm.weight
    block.L.mlp.gate.{weight,bias}                model.layers.L.mlp.router.{weight,bias}
    block.L.mlp.mlp{1,2}_{weight,bias}            model.layers.L.mlp.experts.{gate_up,down}_proj{,_bias}
    embedding.weight, norm.scale, unembedding.weight    model.embed_tokens.weight, model.norm.weight, lm_head.weight

Rows of mlp1, its bias too, interleave gate and up under both names. Sources: openai/gpt-oss, torch/weights.py and torch/model.py, and
the tensor names of the checkpoints that both publish.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Infos

_PLAIN = (
    ("attn.out.weight", "self_attn.o_proj.weight"),
    ("attn.out.bias", "self_attn.o_proj.bias"),
    ("attn.sinks", "self_attn.sinks"),
    ("attn.norm.scale", "input_layernorm.weight"),
    ("mlp.norm.scale", "post_attention_layernorm.weight"),
    ("mlp.gate.weight", "mlp.router.weight"),
    ("mlp.gate.bias", "mlp.router.bias"),
    ("mlp.mlp1_weight", "mlp.experts.gate_up_proj"),
    ("mlp.mlp1_bias", "mlp.experts.gate_up_proj_bias"),
    ("mlp.mlp2_weight", "mlp.experts.down_proj"),
    ("mlp.mlp2_bias", "mlp.experts.down_proj_bias"),
)
_OUTSIDE = (
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.scale", "model.norm.weight"),
    ("unembedding.weight", "lm_head.weight"),
)
# Fields of config.json: OpenAI's and transformers'; all others that both know have one name.
_FIELDS = (("num_experts", "num_local_experts"), ("experts_per_token", "num_experts_per_tok"))
_SHARED = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim", "num_attention_heads",
    "num_key_value_heads", "sliding_window", "rope_theta",
)  # fmt: skip
_ROPE = (
    ("factor", "rope_scaling_factor"),
    ("beta_fast", "rope_ntk_beta"),
    ("beta_slow", "rope_ntk_alpha"),
    ("original_max_position_embeddings", "initial_context_length"),
    ("rope_theta", "rope_theta"),
)


@dataclass(frozen=True)
class Rows:
    """Rows ``start``:``stop`` of the first dimension of the stored tensor ``name``."""

    name: str
    start: int
    stop: int


def is_original(names: Any) -> bool:
    """Whether tensors are named as OpenAI names them."""
    return any(n.startswith("block.") for n in names)


def renamed(name: str, *, original: bool) -> str | None:
    """The name of a tensor that is not of q, k or v, in OpenAI's naming (``original``) or transformers'; None for unknown ones."""
    a, b = (1, 0) if original else (0, 1)
    for pair in _OUTSIDE:
        if name == pair[a]:
            return pair[b]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)" if original else r"block\.(\d+)\.(.+)", name)
    for pair in _PLAIN if found else ():
        if found and found[2] == pair[a]:
            return f"{'block' if original else 'model.layers'}.{found[1]}.{pair[b]}"
    return None


def rename(config: Mapping[str, Any], infos: Infos, *, original: bool) -> dict[str, tuple[Rows, ...]]:
    """What each tensor under the other names is made of, in the order of ``infos``.

    ValueError for a tensor that has no other name, for one of q, k and v without the others, and for a qkv whose rows are not
    those that config.json's numbers of heads say.
    """
    out: dict[str, tuple[Rows, ...]] = {}
    for name, info in infos.items():
        qkv = re.fullmatch(
            r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)" if original
            else r"block\.(\d+)\.attn\.(qkv)\.(weight|bias)", name,
        )  # fmt: skip
        if qkv is None:
            new = renamed(name, original=original)
            if new is None:
                naming = "OpenAI's names" if original else "transformers' names"
                raise ValueError(
                    f"{name} has no counterpart in {naming} of gpt-oss: leave the checkpoint in its layout"
                )
            out[new] = (Rows(name, 0, info.shape[0] if info.shape else 1),)
        elif original:
            stem, last = f"model.layers.{qkv[1]}.self_attn", qkv[3]
            three = [f"{stem}.{p}_proj.{last}" for p in "qkv"]
            lacking = [n for n in three if n not in infos]
            if lacking:
                raise ValueError(f"{name} is there and {lacking[0]} is not: OpenAI's names need q, k and v together")
            out.setdefault(f"block.{qkv[1]}.attn.qkv.{last}", tuple(Rows(n, 0, infos[n].shape[0]) for n in three))
        else:
            at, sizes = 0, _qkv_rows(config)
            if sum(sizes) != info.shape[0]:
                raise ValueError(f"{name} has {info.shape[0]} rows, but config.json's heads make {sum(sizes)} of them")
            for part, n in zip("qkv", sizes, strict=True):
                out[f"model.layers.{qkv[1]}.self_attn.{part}_proj.{qkv[3]}"] = (Rows(name, at, at + n),)
                at += n
    return out


def _qkv_rows(config: Mapping[str, Any]) -> tuple[int, int, int]:
    fields = ("num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = [config.get(f) for f in fields]
    for field, size in zip(fields, sizes, strict=True):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"config.json: {field} is {size!r}, needs a positive integer to tell q, k and v apart")
    heads, kv, dim = (s for s in sizes if isinstance(s, int))
    return heads * dim, kv * dim, kv * dim


def rename_config(config: Mapping[str, Any], *, original: bool) -> dict[str, Any]:
    """config.json as OpenAI writes it (``original``) or as transformers reads it; what both know is kept, the rest is left out.

    ValueError for a field about rotary embeddings that is no positive number.
    """
    found = {f: config[f] for f in _SHARED if f in config}
    a, b = (1, 0) if original else (0, 1)
    found |= {pair[b]: config[pair[a]] for pair in _FIELDS if pair[a] in config}
    if original:
        for part in ("rope_scaling", "rope_parameters"):
            rope = config.get(part)
            if isinstance(rope, Mapping):
                found |= {new: _positive(f"{part}.{old}", rope[old]) for old, new in _ROPE if old in rope}
        return found
    found |= {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16"}
    found |= {"tie_word_embeddings": False, "attention_bias": True}
    if "rope_scaling_factor" in config and "initial_context_length" in config:
        defaults = {"rope_ntk_beta": 32.0, "rope_ntk_alpha": 1.0}
        rope = {old: _positive(new, {**defaults, **config}[new]) for old, new in _ROPE[:4]}
        found["max_position_embeddings"] = int(rope["factor"] * rope["original_max_position_embeddings"])
        found["rope_scaling"] = {"rope_type": "yarn", "truncate": False, **rope}
    return found


def _positive(field: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise ValueError(f"config.json: {field} is {str(value)[:80]!r}, needs a positive number")
    return value
