from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
from torch import nn
from toy_models import Dense, E, H, I, Model, expected_experts, held, same, same_weight

import mx_kernels as mk
import mx_quant as mq


@pytest.mark.parametrize("format", mk.FORMATS)
def test_dense_model(format):
    model = Dense().bfloat16()
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    coverage = mq.quantize_model(model, format)
    assert isinstance(model.one, mq.MxLinear)
    for name in ("one", "two"):
        assert same_weight(model.get_submodule(name).quantized, mk.quantize(w[f"{name}.weight"], format))
    x = torch.randn(3, H).bfloat16()
    one = mk.gemm(x, mk.quantize(w["one.weight"], format), epilogue=mk.Epilogue(bias=w["one.bias"]))
    assert torch.equal(model(x), mk.gemm(torch.relu(one), mk.quantize(w["two.weight"], format)))
    assert coverage.percent == pytest.approx(100 * (H * 32 + 32 * 32) / (H * 32 + 32 * 32 + 32))
    assert coverage.expert_percent is None
    assert model.mx_coverage is coverage


@pytest.mark.parametrize("oss", [False, True])
@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_fused_experts_are_quantized_not_skipped(format, oss):
    model = Model(oss).bfloat16()
    want = [expected_experts(b.experts, format) for b in model.layers]
    coverage = mq.quantize_model(model, format, experts=held)
    for n, block in enumerate(model.layers):
        assert block.experts.name == f"layers.{n}.experts"
        assert same(block.experts.weights, want[n])
        assert isinstance(block.q_proj, mq.MxLinear)
        assert type(block.gate) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert coverage.expert_percent == 100
    rows = {r.name: r for r in coverage.rows}
    assert rows["layers.0.experts.gate_up_proj"] == mq.Covered(
        "layers.0.experts.gate_up_proj", E * 2 * I * H, mk.get_format(format).name, "", True
    )
    assert rows["lm_head.weight"].reason == "skipped by 'lm_head'"
    assert rows["layers.1.gate.weight"].reason == "skipped by '*.gate'"
    assert rows["embed.weight"].reason == "Embedding is neither an nn.Linear nor experts of a known form"
    assert coverage.numel == sum(p.numel() for p in Model(oss).parameters())
    d = json.loads(json.dumps(coverage.to_dict()))
    assert d["quantized"] == coverage.quantized == 2 * (H * H + E * 3 * I * H)
    assert "100.0% of expert weights" in str(coverage)
    assert f"{coverage.percent:.1f}% quantized" in coverage.to_markdown()


def test_the_scheme_reaches_layers_and_experts():
    model = Model().bfloat16()
    mq.quantize_model(model, mq.Scheme("mxfp4", "mxfp8", "floor"), experts=held)
    assert model.layers[0].q_proj.scheme == mq.Scheme("mxfp4", "mxfp8", "floor")
    assert model.layers[0].experts.weights.input_format is mk.MXFP8
    assert model.layers[0].experts.weights.w13.rule is mk.ScaleRule.FLOOR


def test_each_source_is_released_before_the_next_is_quantized(monkeypatch):
    model = Model().bfloat16()
    names = [f"layers.{n}.{p}" for n in range(2) for p in ("q_proj", "experts")]
    alive = {n: weakref.ref(next(iter(model.get_submodule(n).parameters()))) for n in names}
    seen = []
    real = mk.quantize

    def spy(x, *args, **kwargs):
        seen.append(sum(r() is not None for r in alive.values()))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(mk, "quantize", spy)
    mq.quantize_model(model, "mxfp4", experts=held)
    assert sorted(set(seen), reverse=True) == [4, 3, 2, 1]
    assert [r() for r in alive.values()] == [None] * 4


def test_include_and_skip():
    model = Dense().bfloat16()
    coverage = mq.quantize_model(model, "mxfp4", include=("two",))
    assert type(model.one) is nn.Linear
    assert isinstance(model.two, mq.MxLinear)
    assert {r.name: r.reason for r in coverage.rows}["one.weight"] == "not in include"
    again = mq.quantize_model(model, "mxfp8", include=("o*",), skip=())
    assert model.two.scheme.weight is mk.MXFP4
    assert {r.name: r.format for r in again.rows} == {"one.weight": "mxfp8_e4m3", "two.weight": "mxfp4"}
    with pytest.raises(ValueError, match="include 'thre' matches no module of Dense"):
        mq.quantize_model(Dense(), "mxfp4", include=("two", "thre"))
    with pytest.raises(ValueError, match="Dense has no weight to quantize"):
        mq.quantize_model(Dense(), "mxfp4", skip=("*",))
    with pytest.raises(TypeError, match="sequences of patterns"):
        mq.quantize_model(Dense(), "mxfp4", skip="two")


def unchanged(model, error, match, **kwargs):
    """The call raises, and every parameter is still the one it was."""
    before = dict(model.named_parameters())
    with pytest.raises(error, match=match):
        mq.quantize_model(model, kwargs.pop("scheme", "mxfp8"), **kwargs)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}


def test_experts_without_a_factory_fail_unless_skipped_by_name():
    model = Model()
    unchanged(model, ValueError, r"4 expert weights \(78% of all parameters\) would stay .* name them in skip")
    coverage = mq.quantize_model(model, "mxfp8", skip=("lm_head", "*.gate", "*.experts"))
    assert coverage.expert_percent == 0
    assert {r.name: r.reason for r in coverage.rows}["layers.1.experts.down_proj"] == "skipped by '*.experts'"


def test_experts_outside_include_or_of_an_unknown_form_fail():
    unchanged(Model(), ValueError, "4 expert weights .*not in include", include=("*.q_proj",), experts=held)
    model = Model()
    model.layers[1].experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I + 2, H))
    unchanged(model, ValueError, r"gate_up_proj \(3, 66, 64\) and down_proj \(3, 64, 32\) are not", experts=held)
    model.layers[1].experts = nn.Module()
    model.layers[1].experts.w1 = nn.Parameter(torch.randn(E, I, H))
    unchanged(model, ValueError, "w1: Module is neither an nn.Linear nor experts of a known form", experts=held)
    separate = Model()
    separate.layers[0].experts.gate_proj = nn.Parameter(torch.randn(E, I, H))
    unchanged(separate, ValueError, "neither an nn.Linear nor experts of a known form", experts=held)


def test_convolutions_and_embeddings_are_not_experts():
    model = Dense()
    model.conv = nn.Conv1d(4, 4, 3)
    model.positions = nn.Parameter(torch.zeros(1, 8, 4))
    coverage = mq.quantize_model(model, "mxfp8")
    experts = {r.name: r.expert for r in coverage.rows}
    assert experts["conv.weight"] is experts["positions"] is False


def test_all_that_does_not_fit_is_named_before_anything_is_replaced():
    model = Dense(40)
    unchanged(
        model, ValueError, "1 weights cannot be quantized .*in_features of one is 40, but mxfp8_e4m3 needs .* skip them"
    )
    model = Model()
    model.layers[0].experts.gate_up_proj = nn.Parameter(torch.randn(E, 80, H))
    model.layers[0].experts.down_proj = nn.Parameter(torch.randn(E, H, 40))
    unchanged(model, ValueError, r"layers\.0\.experts: intermediate_size is 40", experts=held)
    unchanged(Dense().double(), TypeError, r"one\.weight is torch\.float64")
    unchanged(Dense().to("meta"), ValueError, "on the meta device and has no values: use load_online")
    model = Dense()
    with torch.no_grad():
        model.two.weight[1, 2] = math.inf
    unchanged(model, ValueError, r"two\.weight is not finite.*\(1, 2\)")
    model = Model()
    with torch.no_grad():
        model.layers[1].experts.down_proj[2, 1, 0] = math.nan
    unchanged(model, ValueError, r"layers\.1\.experts\.down_proj is not finite.*\(2, 1, 0\)", experts=held)
    unchanged(nn.Linear(32, 32), ValueError, "use MxLinear.from_linear")


def test_tied_weights_and_hooks_are_refused():
    model = Model()
    model.lm_head.weight = model.embed.weight
    unchanged(model, ValueError, r"lm_head\.weight is shared with embed\.weight", skip=("*.gate",), experts=held)
    coverage = mq.quantize_model(model, "mxfp8", experts=held)
    assert coverage.numel == sum(p.numel() for p in Model().parameters()) - 10 * H
    model = Dense()
    model.one.register_forward_hook(lambda *args: None)
    unchanged(model, ValueError, "one has forward hooks")


def test_a_module_under_two_names_is_replaced_once():
    model = Dense()
    model.three = model.two
    mq.quantize_model(model.eval(), "mxfp8")
    assert isinstance(model.three, mq.MxLinear)
    assert model.three is model.two
    assert not model.three.training


def test_subclasses_of_linear_are_left_with_a_reason():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(32, 2)
    model.linear = nn.Linear(32, 32)
    coverage = mq.quantize_model(model, "mxfp8")
    reasons = {r.name: r.reason for r in coverage.rows}
    assert "subclass of nn.Linear" in reasons["attention.out_proj.weight"]
    assert reasons["linear.weight"] == ""


def test_a_factory_that_refuses_leaves_the_model_as_it_was():
    def refuses(name, module, weights):
        raise mk.Unsupported(f"no backend for {name}")

    unchanged(Model(), mk.Unsupported, r"no backend for layers\.0\.experts", experts=refuses)


def test_factories_are_checked():
    with pytest.raises(TypeError, match=r"returned function for layers\.0\.experts, needs an nn\.Module"):
        mq.quantize_model(Model(), "mxfp8", experts=lambda n, m, w: lambda x: x)
    with pytest.raises(ValueError, match="still has gate_up_proj, down_proj in full precision"):
        mq.quantize_model(Model(), "mxfp8", experts=lambda n, m, w: m)
