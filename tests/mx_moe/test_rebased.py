"""Re-based experts (``experts/rebased.py``) beyond their capabilities, which test_experts.py has: the layer that launches at once, promoted
sums."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk
from mx_moe import EXPERT_CLASSES

from .test_experts import build, compare


def test_rebased_experts_are_launched_at_once(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layer answers, with what ``promote`` is by then; not where the router's weight goes to the input."""
    case = oracle.layer("mxfp8_e4m3", tokens=9, top_k=1, bias=True, dtype=torch.bfloat16)
    make = lambda **options: EXPERT_CLASSES["rebased"](  # noqa: E731
        case.weights, case.activation, choice=None, inputs="mxfp8_e4m3", **options
    )
    experts, asked, answer = make(), [], []

    def launch(layer, x, ids, weights, *, promote):
        asked.append((layer, promote))
        return answer[0] if answer else None

    monkeypatch.setattr(mk.RebasedLayer, "launch", launch)
    want = experts(case.x, case.routing)
    experts.promote = True
    assert torch.equal(experts(case.x, case.routing), want)  # the reference promotes
    answer.append(torch.zeros_like(case.x))
    assert experts(case.x, case.routing) is answer[0]
    assert asked == [(experts._layer, False), (experts._layer, True), (experts._layer, True)]
    on_input = make(router_weight_on_input=True)
    assert on_input(case.x, case.routing) is not answer[0]
    assert len(asked) == 3
    with pytest.raises(ValueError, match="needs \\[T, "):
        experts(case.x[:, :32], case.routing)
    case.weights.w13_bias.zero_()
    answer.clear()
    assert torch.equal(experts(case.x, case.routing), want), "the experts' bias is their own, as the weights are"
    with pytest.raises(mk.Unsupported, match="make new experts"):
        experts.update_weights(case.weights)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_rebased_experts_at_once_and_by_steps(
    oracle, monkeypatch: pytest.MonkeyPatch, weight: str, tokens: int
) -> None:
    case = oracle.layer(
        weight, tokens=tokens, hidden=512, intermediate=384, bias=True, dtype=torch.bfloat16, device="cuda"
    )
    experts = build("rebased", case, dtype=torch.bfloat16)
    for experts.promote in (False, True):
        with monkeypatch.context() as m:
            m.setattr(mk.RebasedLayer, "launch", lambda *args, **options: None)
            want = experts(case.x, case.routing)
        got = experts._layer.launch(case.x, case.routing.ids, case.routing.weights, promote=experts.promote)
        assert got is not None
        assert torch.equal(got, want)
        assert torch.equal(experts(case.x, case.routing), want)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "mxfp4"])
def test_promoted_sums_of_rebased_experts(oracle, weight: str) -> None:
    """``promote = True``: 600 tokens fill blocks of 128 pairs, where MXFP4 too leaves its sums in the matrix unit otherwise."""
    case = oracle.layer(weight, tokens=600, hidden=512, intermediate=384, dtype=torch.bfloat16, device="cuda")
    experts = build("rebased", case, dtype=torch.bfloat16)
    left = compare(oracle, experts, case)
    experts.promote = True
    assert not torch.equal(compare(oracle, experts, case), left)
