"""transformers' MoE families on our experts: against transformers' own eager experts with the same, dequantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mx_kernels as mk
import mx_quant as mq
from mx_moe import make_experts
from mx_moe.integrations.transformers import (
    MxExperts,
    attach,
    expert_modules,
    experts_activation,
    experts_factory,
    experts_weights,
    quantize_experts_,
    register,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:emulated experts")
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": False, "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "GptOss": {"intermediate_size": 96, "num_local_experts": 4, "sliding_window": 8},
    "Qwen3Moe": {"moe_intermediate_size": 64, "num_experts": 4, "norm_topk_prob": True},
    "Mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "Olmoe": {"intermediate_size": 64, "num_experts": 4},
    "MiniMaxM2": {"intermediate_size": 64, "num_local_experts": 4, "rotary_dim": 16},
    "DeepseekV3": {
        "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 5 % 128


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    for _, module in expert_modules(model):
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)  # large enough that experts matter and gpt-oss's clamp acts
    model.set_experts_implementation("eager")
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def dequantized_(model: nn.Module, format: str) -> nn.Module:
    """The same model whose expert parameters hold what the quantized ones dequantize to, in their own layout."""
    scheme = mq.get_scheme(format)
    for _, module in expert_modules(model):
        weights = experts_weights(module, scheme)
        w13, w2 = mk.dequantize(weights.w13, torch.float32), mk.dequantize(weights.w2, torch.float32)
        if not getattr(module, "is_concatenated", True):
            w13 = mq.interleave(w13, 1)
        if module.is_transposed:
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        with torch.no_grad():
            module.gate_up_proj.copy_(w13)
            module.down_proj.copy_(w2)
    return model


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, format: str) -> None:
    theirs = model_of(family)
    plain = logits(theirs)
    ours = copy.deepcopy(theirs)
    report = quantize_experts_(ours, format)
    if format != "bf16":
        dequantized_(theirs, format)
    want = logits(theirs)
    # the same float32 products summed in another order, through two layers and norms
    torch.testing.assert_close(logits(ours), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert report.coverage == (0.0 if format == "bf16" else 1.0)
    assert len(report.layers) == (1 if family == "DeepseekV3" else 2)
    assert report.backends == {"emulation": len(report.layers)}
    assert report.elements == sum(
        p.numel() for _, m in expert_modules(theirs) for n, p in m.named_parameters() if "bias" not in n
    )
    if format != "bf16":
        assert float((want - plain).abs().max()) > 1e-3  # quantization shows, so it was not skipped
        f = mk.get_format(format)
        modules = [m for _, m in expert_modules(theirs)]
        biases = sum(p.nbytes for m in modules for n, p in m.named_parameters() if "bias" in n)
        global_scales = len(modules) * 4 * 2 * 4 if f.has_global_scale else 0  # experts, matrices, bytes
        assert report.expert_bytes == report.elements * f.bits_per_element / 8 + biases + global_scales
    for name, _ in ours.named_parameters():
        assert not name.endswith(("gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize("family", ["GptOss", "Qwen3Moe"])
def test_generate(family: str) -> None:
    theirs = model_of(family)
    ours = copy.deepcopy(theirs)
    quantize_experts_(ours, "mxfp4")
    dequantized_(theirs, "mxfp4")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS[:1], **options), theirs.generate(IDS[:1], **options))


@pytest.mark.parametrize("family", ["GptOss", "Qwen3Moe"])
def test_compiles_to_one_graph(family: str) -> None:
    model = model_of(family)
    quantize_experts_(model, "mxfp4")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = logits(model)
    torch.testing.assert_close(logits(compiled), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_implementation_mx(family: str) -> None:
    """Unquantized experts on our pipeline, through the experts interface; a changed parameter is seen."""
    register()
    model = model_of(family)
    want = logits(model)
    model.set_experts_implementation("mx")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    with torch.no_grad():
        for _, module in expert_modules(model):
            module.down_proj.copy_(module.down_proj.roll(1, 0))
    changed = logits(model)
    assert float((changed - want).abs().max()) > 1e-2
    model.set_experts_implementation("eager")
    want = logits(model)
    torch.testing.assert_close(changed, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_gpt_oss_activation_is_found_with_its_own_parameters() -> None:
    model = model_of("GptOss", swiglu_alpha=1.25, swiglu_limit=3.0)
    _, module = next(expert_modules(model))
    want = mk.Activation("swiglu_oai", alpha=1.25, beta=1.0, limit=3.0)
    assert experts_activation(module) == want


@pytest.mark.parametrize(
    ("act", "kind"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")]
)
def test_activations_are_found(act: str, kind: str) -> None:
    _, module = next(expert_modules(model_of("Qwen3Moe", hidden_act=act)))
    assert experts_activation(module) == mk.Activation(kind)


def test_an_unknown_gate_is_an_error_before_anything_is_changed() -> None:
    model = model_of("Qwen3Moe")
    modules = list(expert_modules(model))
    modules[1][1].act_fn = nn.Tanh()
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.experts: the gate of Qwen3MoeExperts equals none of our"
    ):
        quantize_experts_(model, "mxfp4")
    assert not any(isinstance(m, MxExperts) for _, m in modules)
    report = quantize_experts_(model, "mxfp4", allow_skipped=True)
    assert report.coverage == 0.5
    assert [name for name, _, _ in report.skipped] == ["model.layers.1.mlp.experts"]


def test_unknown_layouts_are_errors() -> None:
    class OldExperts(nn.ModuleList):
        pass

    model = nn.Module()
    model.experts = OldExperts([nn.Linear(32, 32)])
    with pytest.raises(ValueError, match="experts: OldExperts is not described by transformers' experts interface"):
        quantize_experts_(model, "mxfp4")
    with pytest.raises(ValueError, match="Linear has no experts module"):
        quantize_experts_(nn.Linear(2, 2), "mxfp4")
    model = model_of("Qwen3Moe")
    _, module = next(expert_modules(model))
    module.has_post_expert_norm = True
    with pytest.raises(ValueError, match="has_post_expert_norm"):
        quantize_experts_(model, "mxfp4")
    module.has_post_expert_norm = False
    module.down_proj = None
    with pytest.raises(ValueError, match="no three-dimensional gate_up_proj"):
        quantize_experts_(model, "mxfp4")


def test_sizes_that_do_not_fit_are_named_before_anything_is_changed() -> None:
    model = model_of("Qwen3Moe", moe_intermediate_size=80)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: intermediate size is 80, but mxfp4 needs"):
        quantize_experts_(model, "mxfp4")
    assert not any(isinstance(m, MxExperts) for _, m in expert_modules(model))
    quantize_experts_(model, "nvfp4")


def test_twice_is_an_error() -> None:
    model = model_of("Qwen3Moe")
    quantize_experts_(model, "mxfp4")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_experts_(model, "mxfp8")


def test_backends_by_name_are_refused_with_the_reason() -> None:
    with pytest.raises(mk.Unsupported, match="cpu has no hardware dot_scaled"):
        quantize_experts_(model_of("Qwen3Moe"), "mxfp8", backend="native")
    model = model_of("Qwen3Moe")
    assert quantize_experts_(model, "mxfp8", backend="reference").backends == {"reference": 2}


def test_quantized_inputs() -> None:
    model = model_of("Qwen3Moe")
    other = copy.deepcopy(model)
    report = quantize_experts_(model, "w8a8")
    assert {layer.inputs for layer in report.layers} == {"mxfp8_e4m3"}
    assert {layer.inputs for layer in quantize_experts_(other, "w8a16").layers} == {"16 bits"}
    assert float((logits(model) - logits(other)).abs().max()) > 1e-4


def test_casts_leave_codes_alone() -> None:
    model = model_of("Qwen3Moe")
    quantize_experts_(model, "mxfp4")
    _, module = next(expert_modules(model))
    data = module.mx_experts.weights.w13.data
    model.to(torch.bfloat16)
    assert module.mx_experts.weights.w13.data is data
    assert logits(model).isfinite().all()


def test_parameters_are_freed() -> None:
    model = model_of("Mixtral")
    before = sum(p.numel() for p in model.parameters())
    report = quantize_experts_(model, "mxfp4")
    assert sum(p.numel() for p in model.parameters()) == before - report.elements


def test_with_quantize_model() -> None:
    """mx_quant replaces linears, our factory runs the experts."""
    model = model_of("GptOss")
    coverage = mq.quantize_model(model, "mxfp8", experts=experts_factory())
    assert coverage.quantized > 0
    assert all(isinstance(m, MxExperts) for _, m in expert_modules(model))
    assert logits(model).isfinite().all()


def test_attach_other_weights() -> None:
    model = model_of("Qwen3Moe")
    want = logits(dequantized_(copy.deepcopy(model), "mxfp8"))
    for _, module in list(expert_modules(model)):
        weights = experts_weights(module, mq.get_scheme("mxfp8"))
        attach(module, make_experts(weights, experts_activation(module), backend="reference"))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_gpu(family: str) -> None:
    """bf16 on the GPU against bf16 on the CPU, both quantized: bf16 rounding through two layers."""
    model = model_of(family, torch.bfloat16)
    moved = copy.deepcopy(model).cuda()
    report = quantize_experts_(moved, "mxfp4")
    assert set(report.backends) <= {"native", "fused"}
    quantize_experts_(model, "mxfp4")
    got, want = logits(moved, IDS.cuda()).cpu(), logits(model)
    assert float((got - want).norm() / want.norm()) < 5e-2
    moved.generate(IDS[:1].cuda(), max_new_tokens=3, do_sample=False, pad_token_id=0)
