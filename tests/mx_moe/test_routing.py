"""Routers against transformers' own on random hidden states, and each rule of the semantics on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mx_moe import Router, Routing

T, H, E = 33, 16, 8


def same(ours: Routing, ids: torch.Tensor, weights: torch.Tensor, exact: bool = True) -> None:
    """Equal as maps expert -> weight: transformers leaves the order of the chosen open (sorted=False)."""

    def table(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.full((i.shape[0], E), -1.0).scatter(1, i.long(), w.float())

    got, want = table(ours.ids, ours.weights), table(ids, weights)
    assert torch.equal(got >= 0, want >= 0)
    if exact:
        assert torch.equal(got, want)
    else:  # the same float32 formula with its sums in another order: a few ulp
        torch.testing.assert_close(got, want, rtol=2**-21, atol=0)


def weight_(module) -> torch.Tensor:
    torch.nn.init.normal_(module.weight)
    return module.weight.detach()


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def test_gpt_oss(transformers) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    config = transformers.GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=3)
    theirs, x = GptOssTopKRouter(config), torch.randn(T, H)
    weight_(theirs)
    torch.nn.init.normal_(theirs.bias)
    logits, weights, ids = theirs(x)
    same(Router(3, softmax_over="selected")(logits), ids, weights)
    same(Router(3, renormalize=True)(logits), ids, weights, exact=False)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Olmoe"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_families(transformers, family: str, renormalize: bool) -> None:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=H, num_experts=E, num_experts_per_tok=3, norm_topk_prob=renormalize
    )
    module = f"transformers.models.{'qwen3_moe' if family == 'Qwen3Moe' else 'olmoe'}"
    theirs = getattr(pytest.importorskip(f"{module}.modeling_{module.split('.')[-1]}"), f"{family}TopKRouter")(config)
    weight_(theirs)
    logits, weights, ids = theirs(torch.randn(T, H))
    same(Router(3, renormalize=renormalize)(logits), ids, weights)


def test_mixtral(transformers) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    theirs = MixtralTopKRouter(transformers.MixtralConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=2))
    weight_(theirs)
    logits, weights, ids = theirs(torch.randn(T, H))
    same(Router(2, renormalize=True)(logits), ids, weights)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)])
def test_deepseek_v3(transformers, renormalize: bool, groups: tuple[int, int]) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=3, n_group=groups[0], topk_group=groups[1],
        routed_scaling_factor=2.5, norm_topk_prob=renormalize,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    weight_(theirs)
    bias = torch.randn(E) * 0.3
    theirs.e_score_correction_bias.copy_(bias)
    result = theirs(torch.randn(T, H))
    logits, weights, ids = result
    ours = Router(
        3, "sigmoid", renormalize=renormalize, scaling_factor=2.5, num_groups=groups[0], top_k_groups=groups[1],
        group_score="top2_sum", correction_bias=bias,
    )  # fmt: skip
    same(ours(logits), ids, weights, exact=False)


def test_minimax_m2(transformers) -> None:
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

    theirs = MiniMaxM2TopKRouter(
        transformers.MiniMaxM2Config(hidden_size=H, num_local_experts=E, num_experts_per_tok=3)
    )
    weight_(theirs)
    bias = torch.randn(E) * 0.3
    logits, weights, ids = theirs(torch.randn(T, H), bias)
    same(Router(3, "sigmoid", renormalize=True, correction_bias=bias)(logits), ids, weights, exact=False)


def test_sqrt_softplus() -> None:
    logits = torch.randn(T, E, dtype=torch.float64) * 4
    scores = torch.log1p(torch.exp(logits)).sqrt()
    want, ids = scores.topk(3)
    routing = Router(3, "sqrt_softplus", scaling_factor=1.5)(logits)
    assert torch.equal(routing.ids.long(), ids)
    # float32 softplus against float64: softplus is linear above 20, and both roots are within an ulp or two
    torch.testing.assert_close(routing.weights.double(), want * 1.5, rtol=2**-20, atol=0)


def test_weights_come_from_the_unbiased_score() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 100.0])
    routing = Router(2, "sigmoid", correction_bias=bias)(logits)
    assert routing.ids.tolist() == [[3, 0]]
    assert torch.equal(routing.weights, torch.sigmoid(logits[:, [3, 0]]))


def test_scaling_is_applied_once_and_after_renormalization() -> None:
    routing = Router(3, renormalize=True, scaling_factor=2.5)(torch.randn(T, E))
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.full((T,), 2.5), rtol=2**-21, atol=0)


def test_renormalization_of_zeros_is_zero() -> None:
    routing = Router(2, "sigmoid", renormalize=True)(torch.full((1, 4), -200.0))
    assert torch.equal(routing.weights, torch.zeros(1, 2))


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.sampled_from(["max", "top2_sum"]), st.integers(0, 2**31)
)
@settings(max_examples=40, deadline=None)
def test_groups_property(groups: int, kept: int, size: int, group_score: str, seed: int) -> None:
    """No expert outside the best groups is ever chosen, whatever the scores (negative biased scores included)."""
    kept = min(kept, groups)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, groups * size, generator=generator)
    bias = torch.randn(groups * size, generator=generator) * 3
    top_k = min(3, kept * size)
    routing = Router(
        top_k, "sigmoid", num_groups=groups, top_k_groups=kept, group_score=group_score, correction_bias=bias
    )(logits)
    biased = torch.sigmoid(logits) + bias
    for t in range(5):
        best = biased[t].view(groups, size).topk(1 if group_score == "max" else 2).values.sum(1).topk(kept).indices
        allowed = {int(g) * size + j for g in best for j in range(size)}
        want = sorted(allowed, key=lambda e: -float(biased[t, e]))[:top_k]
        assert routing.ids[t].tolist() == want


def test_shared_experts_are_appended() -> None:
    logits = torch.randn(T, E)
    plain = Router(2, renormalize=True, scaling_factor=2.0)(logits)
    shared = Router(2, renormalize=True, scaling_factor=2.0, shared_experts=2, shared_weight=0.5)(logits)
    assert torch.equal(shared.ids[:, :2], plain.ids)
    assert torch.equal(shared.weights[:, :2], plain.weights)
    assert shared.ids[:, 2:].tolist() == [[E, E + 1]] * T
    assert torch.equal(shared.weights[:, 2:], torch.full((T, 2), 0.5))


def test_dtypes_and_no_tokens() -> None:
    routing = Router(2)(torch.empty(0, E, dtype=torch.bfloat16))
    assert routing.ids.dtype == torch.int32
    assert routing.weights.dtype == torch.float32
    assert routing.ids.shape == (0, 2)
    x = torch.randn(T, E).bfloat16()
    assert torch.equal(Router(2)(x).weights, Router(2)(x.float()).weights)
    assert (
        Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bfloat16)).ids.dtype == torch.int32
    )


def test_logits_are_not_changed() -> None:
    x = torch.randn(T, E)
    before = x.clone()
    Router(2, "sigmoid", renormalize=True, scaling_factor=3.0, num_groups=4, top_k_groups=2)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1, "score": "relu"}, "unknown score 'relu'"),
        ({"top_k": 1, "softmax_over": "some"}, "softmax_over is 'some'"),
        ({"top_k": 1, "softmax_over": "selected", "score": "sigmoid"}, "softmax_over='selected'"),
        ({"top_k": 1, "group_score": "sum"}, "unknown group_score"),
        ({"top_k": 1, "num_groups": 2, "top_k_groups": 3}, "top_k_groups is 3"),
        ({"top_k": 1, "num_groups": 2, "group_score": "top2_sum"}, "correction_bias is missing"),
        ({"top_k": 1, "shared_experts": -1}, "shared_experts is -1"),
    ],
)
def test_contradictory_settings(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**settings_)


def test_bad_logits() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        Router(1)(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need \[T, E\]"):
        Router(1)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="top_k is 5, but there are only 4 experts"):
        Router(5)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="7 experts do not divide"):
        Router(1, num_groups=2)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="top_k is 3, but there are only 1 groups of 2 experts"):
        Router(3, num_groups=2)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="groups of at least 2"):
        Router(1, num_groups=4, group_score="top2_sum", correction_bias=torch.zeros(4))(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"correction_bias has shape \(3,\)"):
        Router(1, correction_bias=torch.zeros(3))(torch.zeros(2, 4))


def test_routing_checks() -> None:
    with pytest.raises(TypeError, match=r"expert ids are torch\.float32"):
        Routing(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(TypeError, match=r"weights are torch\.int32"):
        Routing(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="same shape"):
        Routing(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 2))
    good = Routing(torch.tensor([[0, -1], [4, 3]]), torch.ones(2, 2))
    good.validate(4)
    with pytest.raises(ValueError, match="expert id 4 at token 1, slot 0: needs 0 to 2"):
        good.validate(3)
    with pytest.raises(ValueError, match="routing weight nan at token 0, slot 1"):
        Routing(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[1.0, float("nan")]])).validate(4)
