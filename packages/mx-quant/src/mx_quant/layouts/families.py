"""Model families as data: which tensor of a checkpoint is an expert, a router, a norm, and how fused experts are stored.

Letters: E experts, I intermediate size, H hidden size. Canonical (here and in memory): K last, gate rows before up rows::

    experts.gate_up_proj [E, 2I, H]     experts.down_proj [E, H, I]     experts.3.gate_proj.weight [I, H]

gpt-oss and Llama 4 store the full-precision fused parameters transposed, [E, H, 2I] and [E, I, H]; gpt-oss also interleaves
gate (even) and up (odd) rows, in full precision and quantized alike.
Source: the conversion tables of transformers 5.23 and the checkpoints of each family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LINEAR = "linear"
EXPERT = "expert"
FUSED_EXPERT = "fused_expert"
EXPERT_BIAS = "expert_bias"
FUSED_BIAS = "fused_bias"


@dataclass(frozen=True)
class Family:
    """How one model family names and stores its experts.

    ``gate``, ``up``, ``down`` are the projections' names in ``experts.<i>.<name>.weight``. ``transposed``: full-precision fused
    parameters are stored [E, K, N]. ``interleaved``: the rows of fused gate_up alternate, gate first.
    """

    name: str
    model_types: tuple[str, ...]
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False


GPT_OSS = Family("gpt-oss", ("gpt_oss",), transposed=True, interleaved=True)
DEFAULT = Family("default", ())

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        GPT_OSS,
        Family("qwen3-moe", ("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe")),
        Family("mixtral", ("mixtral",), gate="w1", up="w3", down="w2"),
        Family("minimax-m2", ("minimax_m2", "minimax"), gate="w1", up="w3", down="w2"),
        Family("deepseek-v3", ("deepseek_v3", "deepseek_v2", "kimi_k2", "glm4_moe")),
        Family("olmoe", ("olmoe",)),
        Family("llama4", ("llama4", "llama4_text"), transposed=True),
        Family("qwen3", ("qwen3", "qwen2", "llama", "mistral")),
        DEFAULT,
    )
}


def family_of(config: Mapping[str, Any], names: Iterable[str] = ()) -> Family:
    """The family of a checkpoint, from config.json's ``model_type`` (also inside ``text_config``), else from tensor names.

    An unknown ``model_type`` gets the default naming (gate_proj, up_proj, down_proj), w1/w3/w2 where the names say so.
    """
    text = config.get("text_config")
    types = (config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None)
    for family in FAMILIES.values():
        if any(t in family.model_types for t in types):
            return family
    w1 = False
    for name in names:
        if _GPT_OSS_NAME.search(name):
            return GPT_OSS
        w1 = w1 or re.search(r"\.experts\.\d+\.w1\.", name) is not None
    return FAMILIES["mixtral"] if w1 else DEFAULT


# OpenAI's own names, and expert biases, which no other family here has
_GPT_OSS_NAME = re.compile(
    r"\.mlp1_weight(\.|$)|^block\.\d+\.mlp\.experts\.|\.experts\.gate_up_proj_(blocks|bias)$|\.experts\.\d+\.gate_proj\.bias$"
)


def stored_as(name: str, family: Family) -> tuple[bool, bool]:
    """(interleaved, transposed) of a fused parameter or bias ``name``; under OpenAI's own names always and never."""
    last = name.rpartition(".")[2].removesuffix("_bias")
    interleaved = last in ("mlp1_weight", "mlp1") or (family.interleaved and last == "gate_up_proj")
    return interleaved, family.transposed and last.endswith("_proj")


def fused_name(experts: str, param: str, bias: bool) -> str:
    """The fused parameter (or bias) of the experts named ``experts``.<i>; OpenAI's own gpt-oss names it mlp1 and mlp2."""
    if re.fullmatch(r"(.*\.)?block\.\d+\.mlp\.experts", experts) and param in ("gate_up_proj", "down_proj"):
        number = 1 if param == "gate_up_proj" else 2
        return f"{experts.removesuffix('experts')}mlp{number}_{'bias' if bias else 'weight'}"
    return f"{experts}.{param}{'_bias' if bias else ''}"


@dataclass(frozen=True)
class Role:
    """What a tensor is.

    kind: "expert", "fused_expert", "expert_bias", "fused_bias", "router", "norm", "embedding", "lm_head", "attention", "mlp",
        "shared_expert", "encoder" (of images or sound, and its projector) or "other" (biases of dense layers are "other").
    part: "gate", "up", "down", "gate_up", "q", "k", "v", "o" ... or "". experts: what stands before the expert's index,
    such as "model.layers.0.mlp.experts". group: equal for the weights that share one NVFP4 global scale (gate and up of one
    expert or MLP; q, k and v), None elsewhere.
    """

    kind: str
    part: str = ""
    layer: int | None = None
    expert: int | None = None
    experts: str = ""
    group: str | None = None


_PARTS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down", "w13": "gate_up",
    "mlp1": "gate_up", "mlp2": "down",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "qkv_proj": "qkv", "qkv": "qkv", "out": "o",
}  # fmt: skip
_PROJECTION = r"gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3|w13"
_JOINT = {
    "gate": "gate_up",
    "up": "gate_up",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "q_a_proj": "qkv_a",
    "kv_a_proj_with_mqa": "qkv_a",
}

# The first pattern that matches decides.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("encoder", r"(.*\.)?(visual|vision_tower|vision_model|audio_tower|audio_model|multi_modal_projector)\."),
        (EXPERT, rf"(?P<experts>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>{_PROJECTION})\.weight$"),
        (EXPERT_BIAS, rf"(?P<experts>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>{_PROJECTION})\.bias$"),
        (FUSED_EXPERT, r"(?P<experts>.*\bexperts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)$"),
        (FUSED_BIAS, r"(?P<experts>.*\bexperts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)_bias$"),
        (FUSED_EXPERT, r"(?P<experts>.*\bmlp)\.(?P<part>mlp1|mlp2)_weight$"),
        (FUSED_BIAS, r"(?P<experts>.*\bmlp)\.(?P<part>mlp1|mlp2)_bias$"),
        ("norm", r".*norm[^.]*\.(weight|bias|scale)$"),
        ("embedding", r"(.*\.)?(embed_tokens|embedding|wte)\.weight$"),
        ("lm_head", r"(.*\.)?(lm_head|unembedding)\.weight$"),
        ("router", r".*\.(mlp|block_sparse_moe|feed_forward|moe|mixer)\.(gate|router)\.((wg|layer)\.)?(weight|bias)$"),
        ("router", r".*(e_score_correction_bias|\bshared_expert_gate\.weight)$"),
        ("shared_expert", rf".*\.shared_(experts?|mlp)\.(?P<part>{_PROJECTION})\.weight$"),
        ("mlp", rf".*\.(mlp|feed_forward)\.(?P<part>{_PROJECTION})\.weight$"),
        ("attention", r".*\.(self_attn|attn|attention|linear_attn|cross_attn)\.(?P<part>\w+)\.weight$"),
    )
)  # fmt: skip


def classify(name: str) -> Role:
    """The role of the tensor ``name`` of a full-precision checkpoint (of a WeightRef: its ``name``)."""
    layer = re.search(r"\b(?:layers|block|h)\.(\d+)\.", name)
    number = int(layer[1]) if layer else None
    for kind, pattern in _PATTERNS:
        found = pattern.match(name)
        if found is None:
            continue
        groups = found.groupdict()
        raw = groups.get("part") or ""
        part = _PARTS.get(raw, raw)
        joint = _JOINT.get(part)
        group = None
        if joint and kind in (EXPERT, FUSED_EXPERT, "mlp", "shared_expert", "attention"):
            group = name[: found.start("part")] + joint
        expert = groups.get("expert")
        return Role(kind, part, number, None if expert is None else int(expert), groups.get("experts") or "", group)
    return Role("other", layer=number)


def deinterleave(rows: Tensor, dim: int) -> Tensor:
    """Rows g0, u0, g1, u1 .. of the non-negative dimension ``dim`` -> g0, g1 .., u0, u1 .. (a copy)."""
    halves: Tensor = rows.unflatten(dim, (-1, 2)).transpose(dim, dim + 1)
    return halves.flatten(dim, dim + 1)


def interleave(rows: Tensor, dim: int) -> Tensor:
    """The inverse of ``deinterleave``: g0, g1 .., u0, u1 .. -> g0, u0, g1, u1 .. (a copy)."""
    pairs: Tensor = rows.unflatten(dim, (2, -1)).transpose(dim, dim + 1)
    return pairs.flatten(dim, dim + 1)
