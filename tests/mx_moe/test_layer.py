"""MoE modules against transformers' own MoE blocks with the same weights, and their checks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mx_kernels as mk
import mx_quant as mq
from mx_moe import MoE, Router, make_experts

pytestmark = pytest.mark.filterwarnings("ignore:emulated experts")
H, I, E, T = 64, 32, 8, 11
SILU = mk.Activation("silu")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def randomize(block: nn.Module) -> nn.Module:
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return block.eval()


def experts_of(block: nn.Module):
    return make_experts(
        mq.ExpertWeights(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()), SILU, dtype=torch.float32
    )  # fmt: skip


def same(ours: MoE, theirs: nn.Module) -> None:
    x = torch.randn(2, T, H)
    with torch.no_grad():
        want = theirs(x)
        want = want[0] if isinstance(want, tuple) else want
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-5)


def test_deepseek_v3(transformers) -> None:
    """Shared experts, groups, a correction bias, scaling."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = randomize(DeepseekV3MoE(config))
    bias = torch.randn(E) * 0.1
    theirs.gate.e_score_correction_bias.copy_(bias)
    router = Router(
        3, "sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, top_k_groups=2, group_score="top2_sum",
        correction_bias=bias,
    )  # fmt: skip
    ours = MoE(theirs.gate.weight, router, experts_of(theirs), shared=theirs.shared_experts)
    same(ours, theirs)
    assert "correction_bias" in dict(ours.named_buffers())


def test_qwen2_moe(transformers) -> None:
    """A shared expert behind a gate of one number a token."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        hidden_size=H, moe_intermediate_size=I, shared_expert_intermediate_size=48, num_experts=E, num_experts_per_tok=2,
        norm_topk_prob=False,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = randomize(Qwen2MoeSparseMoeBlock(config))
    ours = MoE(
        theirs.gate.weight, Router(2), experts_of(theirs), shared=theirs.shared_expert,
        shared_gate=theirs.shared_expert_gate.weight,
    )  # fmt: skip
    same(ours, theirs)


def test_gpt_oss(transformers) -> None:
    """A router with a bias; experts with biases, taken from the block by the integration."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    from mx_moe.integrations.transformers import experts_activation, experts_weights

    config = transformers.GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = randomize(GptOssMLP(config))
    weights, act = experts_weights(theirs.experts, None), experts_activation(theirs.experts)
    router = Router(2, softmax_over="selected")
    ours = MoE(theirs.router.weight, router, make_experts(weights, act), router_bias=theirs.router.bias)
    same(ours, theirs)


def test_shared_experts_fused_into_the_weights() -> None:
    """The same shared expert as a row of the weights and as a module."""
    g = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(E + 1, 2 * I, H, generator=g) * 0.2, torch.randn(E + 1, H, I, generator=g) * 0.2
    gate = torch.randn(E, H, generator=g)

    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = (x @ w13[E].T).chunk(2, -1)
            return (nn.functional.silu(a) * b) @ w2[E].T

    fused = MoE(gate, Router(2, shared_experts=1), make_experts(mq.ExpertWeights(w13, w2), SILU, shared_experts=1))
    apart = MoE(gate, Router(2), make_experts(mq.ExpertWeights(w13[:E], w2[:E]), SILU), shared=Shared())
    x = torch.randn(T, H, generator=g)
    torch.testing.assert_close(fused(x), apart(x), rtol=1e-5, atol=1e-5)


def test_quantized_and_cast() -> None:
    w13, w2, gate = torch.randn(E, 2 * I, H) * 0.2, torch.randn(E, H, I) * 0.2, torch.randn(E, H)
    weights = mq.quantize_experts(w13.bfloat16(), w2.bfloat16(), "mxfp8")
    moe = MoE(gate, Router(2, renormalize=True), make_experts(weights, SILU))
    x = torch.randn(3, T, H).bfloat16()
    out = moe(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.equal(moe.route(x[0]).ids, Router(2, renormalize=True)(x[0].float() @ gate.T).ids)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out, rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 300])
@pytest.mark.parametrize("scheme", ["bf16", "mxfp8", "w8a8", "mxfp6", "mxfp4", "w4a8", "nvfp4"])
def test_a_whole_layer_on_the_gpu(scheme: str, tokens: int) -> None:
    """Router, experts and a shared expert: near the CPU's result, one graph for torch.compile, captured, the same bits each time.

    Tolerance as in test_systems: bf16 roundings of h, of pairs and of the result, 2^-8; inputs in MXFP8 move codes of h, 6e-3.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).bfloat16()  # noqa: E731
    w13, w2, gate, shared = draw(E, 2 * I, H), draw(E, H, I), torch.randn(E, H, generator=g), draw(H, H)
    weights = mq.ExpertWeights(w13, w2) if scheme == "bf16" else mq.quantize_experts(w13, w2, scheme)
    x = torch.randn(tokens, H, generator=g).bfloat16()

    def build(device: str) -> MoE:
        linear = nn.Linear(H, H, bias=False, dtype=torch.bfloat16)
        linear.weight = nn.Parameter(shared.clone(), requires_grad=False)
        experts = make_experts(weights, SILU, device=device)
        return MoE(gate.to(device), Router(2, renormalize=True), experts, shared=linear.to(device))

    moe, there = build("cuda"), x.cuda()
    inputs = moe.experts.inputs.format
    assert (inputs is None) == (scheme not in ("w8a8", "w4a8"))
    native = inputs is not None and mk.Device.probe("cuda").native(inputs.name, weights.w13.format.name)
    assert moe.experts.choice.name == ("native" if native else "fused")
    with torch.no_grad():
        got, want = moe(there), build("cpu")(x)
        assert float((got.cpu() - want).norm() / want.norm()) <= (
            2**-7 if inputs is None else 1.2e-2
        )  # both sides round
        for _ in range(3):
            assert torch.equal(moe(there), got)
        torch._dynamo.reset()
        compiled = torch.compile(moe, fullgraph=True)(there)
        assert (
            float((compiled - got).norm() / got.norm()) <= 2**-8
        )  # torch's own operations are fused, and rounded, differently
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            moe(there)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe(there)
        there.copy_(torch.randn(tokens, H, generator=g))
        graph.replay()
        assert torch.equal(out, moe(there))


def test_checks() -> None:
    weights = mq.ExpertWeights(torch.zeros(E, 2 * I, H), torch.zeros(E, H, I))
    experts = make_experts(weights, SILU)
    gate = torch.zeros(E, H)
    with pytest.raises(ValueError, match=r"router_weight has shape \(64,\)"):
        MoE(torch.zeros(H), Router(1), experts)
    with pytest.raises(ValueError, match="experts have H = 64"):
        MoE(torch.zeros(E, 32), Router(1), experts)
    with pytest.raises(ValueError, match="for 7 experts and the router appends 0 shared ones, but the experts are 8"):
        MoE(torch.zeros(7, H), Router(1), experts)
    with pytest.raises(ValueError, match="appends 1 shared ones, but the experts are 8"):
        MoE(gate, Router(1, shared_experts=1), experts)
    with pytest.raises(ValueError, match="router_bias has shape"):
        MoE(gate, Router(1), experts, router_bias=torch.zeros(3))
    with pytest.raises(ValueError, match="correction_bias has shape"):
        MoE(gate, Router(1, correction_bias=torch.zeros(3)), experts)
    with pytest.raises(ValueError, match="nothing to gate"):
        MoE(gate, Router(1), experts, shared_gate=torch.zeros(1, H))
    with pytest.raises(ValueError, match="shared_gate has shape"):
        MoE(gate, Router(1), experts, shared=nn.Identity(), shared_gate=torch.zeros(2, H))
    MoE(gate, Router(7, shared_experts=1), make_experts(weights, SILU, expert_map=torch.zeros(9, dtype=torch.int32)))
