"""Declared capability = tested capability: one test for each claim of each class, against a float64 oracle.

Tolerances, as ||got - want|| / ||want||. float32 x: two float32 sums of at most 128 terms, 2e-6. bfloat16 x: one rounding of
h, of the result, and (NVFP4) of the weights, each of relative rms 2^-9 / sqrt(3): 2^-8. Quantized inputs: the oracle rounds h
from float64, so that a code may differ where h is within an ulp of a midpoint, one of which changes a result by about 1e-3.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
import mx_quant as mq
from mx_moe import EXPERT_CLASSES, Capability, EmulationExperts, ReferenceExperts, Router, Routing, make_experts
from mx_moe.experts.base import Inputs, Weights, fused_moe

SWIGLU_OAI = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}
QUANTIZED_INPUTS = 4e-3
REBASED_INPUTS = 2**-7
"""Sums on the matrix unit differ by up to 2^-11, so about one E4M3 code of h in a hundred rounds the other way."""
NVFP4_INPUTS = (
    5e-2  # h is rounded to 16 bits first, which moves about 2^-9 of the codes, of two bits each, over a midpoint
)
pytestmark = pytest.mark.filterwarnings("ignore:emulated experts")


def activation(
    kind: str, layout: str = "concatenated", gated: bool = True, limit: float | None = None
) -> mk.Activation:
    if kind == "swiglu_oai":
        return mk.Activation(kind, layout, alpha=1.3, beta=0.5, limit=limit or 2.0)
    return mk.Activation(kind, layout, gated, limit=limit)


def claims(pick=None) -> list:
    """(class name, device), or (class name, claim, device) for every claim: on the CPU for those that run there."""
    found = []
    for name, cls in EXPERT_CLASSES.items():
        for claim in [()] if pick is None else [(c,) for c in pick(cls.capability)]:
            if name in ("emulation", "reference"):
                found.append(pytest.param(name, *claim, "cpu"))
            found.append(pytest.param(name, *claim, "cuda", marks=pytest.mark.gpu))
    return found


def smallest_dtype(name: str) -> torch.dtype:
    dtypes = EXPERT_CLASSES[name].capability.dtypes
    return torch.float32 if torch.float32 in dtypes else torch.bfloat16


def build(name: str, case, **options):
    """The named class, or skip where this hardware lacks what it is for (the refusals have their own tests)."""
    try:
        return make_experts(case.weights, case.activation, backend=name, **options)
    except mk.Unsupported as error:
        if name not in ("native", "rebased"):
            raise
        pytest.skip(str(error.rejected[0][1]))


def compare(oracle, experts, case, routing=None, dtype=None, **options) -> torch.Tensor:
    """Run and compare with the oracle, which quantizes the inputs as the experts do."""
    routing = routing or case.routing
    inputs = experts.inputs.format
    got = experts(case.x, routing)
    assert got.dtype == case.x.dtype
    assert got.shape == case.x.shape
    want = oracle.dense(
        case.x, routing, case.weights, case.activation, inputs=None if inputs is None else inputs.name, **options
    )
    limit = TOLERANCE[case.dtype] if inputs is None else max(TOLERANCE[case.dtype], QUANTIZED_INPUTS)
    if inputs is not None and inputs.has_global_scale and case.dtype != torch.float32:
        limit = NVFP4_INPUTS
    if experts.name == "rebased":
        limit = max(limit, REBASED_INPUTS)
    assert oracle.relative(got, want) <= limit
    return got


def check(
    oracle, name: str, device: str, *, dtype=None, inputs="auto", expert_map=None, weight_on_input=False, **shape
):
    """Build the named class and compare."""
    dtype = dtype or (torch.float16 if shape.get("weight") == "float16" else smallest_dtype(name))
    case = oracle.layer(dtype=dtype, device=device, **shape)
    if expert_map is not None:
        expert_map = expert_map.to(device)
    experts = build(
        name, case, inputs=inputs, dtype=dtype, expert_map=expert_map, router_weight_on_input=weight_on_input
    )
    compare(oracle, experts, case, expert_map=expert_map, weight_on_input=weight_on_input)
    return experts, case


@pytest.mark.parametrize(("name", "weight", "device"), claims(lambda c: c.weights))
def test_weights(oracle, name: str, weight: str, device: str) -> None:
    check(oracle, name, device, weight=weight)


@pytest.mark.parametrize(("name", "dtype", "device"), claims(lambda c: c.dtypes))
@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "nvfp4", "bfloat16"])
def test_dtypes(oracle, name: str, dtype: torch.dtype, weight: str, device: str) -> None:
    check(oracle, name, device, weight=weight, dtype=dtype)


@pytest.mark.parametrize(("name", "inputs", "device"), claims(lambda c: c.inputs))
def test_inputs(oracle, name: str, inputs: str | None, device: str) -> None:
    weight = "nvfp4" if inputs == "nvfp4" else "mxfp4" if inputs == "mxfp4" else "mxfp8_e4m3"
    experts, _ = check(oracle, name, device, weight=weight, inputs=inputs, input_scales=inputs == "nvfp4")
    assert (None if experts.inputs.format is None else experts.inputs.format.name) == inputs


@pytest.mark.parametrize(
    ("name", "act", "device"),
    claims(
        lambda c: [
            (kind, layout, gated)
            for kind, layout, gated in itertools.product(c.kinds, c.layouts, c.gated)
            if gated or (kind != "swiglu_oai" and layout == "concatenated")
        ]
    ),
)
@pytest.mark.parametrize("limit", [None, 0.5])
def test_activations(oracle, name: str, act: tuple, limit: float | None, device: str) -> None:
    check(oracle, name, device, weight="mxfp4", activation=activation(*act, limit=limit), bias=True)


@pytest.mark.parametrize(("name", "feature", "device"), claims(lambda c: c.features))
def test_features(oracle, name: str, feature: str, device: str) -> None:
    act = activation("swiglu_oai")
    if feature == "bias":
        check(oracle, name, device, bias=True, activation=act)
    elif feature == "expert_map":
        table = torch.tensor([-1, 3, 0, -1, 5, 1, 2, 4, -1], dtype=torch.int32)
        check(oracle, name, device, expert_map=table, bias=True)
    elif feature == "router_weight_on_input":
        check(oracle, name, device, weight_on_input=True, top_k=1, bias=True)
    elif feature == "shared_experts":
        shared_experts(oracle, name, device)
    else:
        assert feature == "input_scales"
        check(oracle, name, device, weight="nvfp4", inputs="nvfp4", input_scales=True)


def shared_experts(oracle, name: str, device: str) -> None:
    """Two shared experts are rows 6 and 7 of the weights; every token goes to them with weight 0.5."""
    dtype = smallest_dtype(name)
    case = oracle.layer(experts=8, dtype=dtype, device=device)
    experts = build(name, case, dtype=dtype, shared_experts=2)
    router = Router(2, renormalize=True, shared_experts=2, shared_weight=0.5)
    logits = torch.randn(13, 6, generator=torch.Generator().manual_seed(1)).to(device)
    routing = router(logits)
    routed = Router(2, renormalize=True)(logits)
    half = torch.full((13, 1), 0.5, device=device)
    ids = torch.cat((routed.ids, *(torch.full((13, 1), e, device=device, dtype=torch.int32) for e in (6, 7))), dim=1)
    want = Routing(ids, torch.cat((routed.weights, half, half), dim=1))
    assert torch.equal(routing.ids, want.ids)
    assert torch.equal(routing.weights, want.weights)
    compare(oracle, experts, case, routing)


@pytest.mark.parametrize(("name", "device"), claims())
@pytest.mark.parametrize("tokens", [0, 1, 200])
@pytest.mark.parametrize("experts", [1, 40])
def test_sizes(oracle, name: str, tokens: int, experts: int, device: str) -> None:
    check(oracle, name, device, tokens=tokens, experts=experts, top_k=1 if experts == 1 else 3, weight="mxfp4")


@pytest.mark.parametrize(("name", "device"), claims())
def test_dropped_slots(oracle, name: str, device: str) -> None:
    """Slots with -1, with the id one past the experts, or mapped to -1 add nothing, not even 0 * NaN."""
    dtype = smallest_dtype(name)
    case = oracle.layer(dtype=dtype, device=device, tokens=4, experts=5, bias=True)
    table = torch.tensor([0, 1, -1, 2, 3, 4], dtype=torch.int32, device=device)
    experts = build(name, case, dtype=dtype, expert_map=table)
    ids = torch.tensor([[0, -1], [6, 1], [2, 2], [3, 2]], device=device)
    weights = torch.tensor([[0.5, float("nan")], [1.0, 0.25], [1.0, 1.0], [0.75, float("nan")]], device=device)
    got = compare(oracle, experts, case, Routing(ids, weights), expert_map=table)
    assert torch.isfinite(got).all()
    assert torch.equal(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("name", ["emulation", "reference"])
@given(
    weight=st.sampled_from([*mk.FORMATS, "float32"]), kind=st.sampled_from(["silu", "swiglu_oai", "relu2"]),
    experts=st.integers(1, 9), top_k=st.integers(1, 3), tokens=st.integers(0, 20), hidden=st.sampled_from([32, 96]),
    intermediate=st.sampled_from([32, 160]), bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_combinations(oracle, name: str, kind: str, experts: int, top_k: int, **shape) -> None:
    top_k = min(top_k, max(1, experts - 1))
    check(oracle, name, "cpu", activation=activation(kind), experts=experts, top_k=top_k, **shape)


@pytest.mark.parametrize("name", ["emulation", "reference"])
def test_unhit_experts_are_never_dequantized(oracle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales are NaN, and the dequantized elements are counted."""
    case = oracle.layer(experts=6, tokens=3, top_k=1)
    ids = torch.tensor([[4], [1], [4]])
    unhit = [0, 2, 3, 5]
    case.weights.w13.scale[unhit] = 255
    case.weights.w2.scale[unhit] = 255
    seen = []
    if name == "emulation":
        real = mk.dequantize
        monkeypatch.setattr(mk, "dequantize", lambda q, *a, rows: seen.append(rows.tolist()) or real(q, *a, rows=rows))
    experts = make_experts(case.weights, case.activation, backend=name)
    got = experts(case.x, Routing(ids, torch.ones(3, 1)))
    assert torch.isfinite(got).all()
    assert seen == ([[1, 4], [1, 4]] if name == "emulation" else [])


def test_emulation_says_once_that_it_is_slower(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    import mx_moe.experts.base as base

    monkeypatch.setattr(base, "_warned", set())
    case = oracle.layer()
    with pytest.warns(RuntimeWarning, match="slower than a native or fused path.*cpu has no hardware dot_scaled"):
        make_experts(case.weights, case.activation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_experts(case.weights, case.activation)
    plain = oracle.layer("float32")
    monkeypatch.setattr(base, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_experts(plain.weights, plain.activation)


@pytest.mark.parametrize("name", ["native", "rebased", "fused"])
def test_cpu_refuses(oracle, name: str) -> None:
    case = oracle.layer()
    reason = {
        "native": "cpu has no hardware dot_scaled for mxfp8_e4m3",
        "rebased": "it is made for sm90",
        "fused": "cpu runs no Triton kernels",
    }[name]
    with pytest.raises(mk.Unsupported, match=reason):
        make_experts(case.weights, case.activation, backend=name)


def test_what_is_not_claimed_is_refused(oracle) -> None:
    """Each claim taken away from a class in turn turns into a reason that names it."""
    from mx_moe import Problem

    case = oracle.layer(bias=True, activation=activation("swiglu_oai"))
    problem = Problem.of(
        case.weights, case.activation, inputs="mxfp8_e4m3", expert_map=True, router_weight_on_input=True,
        shared_experts=True,
    )  # fmt: skip
    assert Capability().why_not(problem) is None
    assert "takes mxfp4 weights, not mxfp8_e4m3" in Capability(weights=("mxfp4",)).why_not(problem)
    assert "takes inputs in 16 bits, not mxfp8_e4m3" in Capability(inputs=(None,)).why_not(problem)
    assert "no activation swiglu_oai" in Capability(kinds=("silu",)).why_not(problem)
    assert "these are concatenated" in Capability(layouts=("interleaved",)).why_not(problem)
    assert "takes x in float16, not torch.bfloat16" in Capability(dtypes=(torch.float16,)).why_not(problem)
    for feature in problem.features:
        rest = tuple(f for f in Capability().features if f != feature)
        assert Capability(features=rest).why_not(problem) == f"it has no {feature}"


def test_quantized_inputs_that_do_not_fit(oracle) -> None:
    case = oracle.layer("nvfp4", hidden=48, intermediate=64)
    with pytest.raises(mk.Unsupported, match="hidden size 48 is not a multiple of mxfp8_e4m3's block length 32"):
        make_experts(case.weights, case.activation, inputs="mxfp8")
    with pytest.raises(mk.Unsupported, match="nvfp4 inputs need a calibrated global scale per GEMM"):
        make_experts(case.weights, case.activation, inputs="nvfp4")


def test_inputs_follow_the_scheme(oracle) -> None:
    case = oracle.layer(inputs="mxfp8_e4m3")
    assert make_experts(case.weights, case.activation).inputs.format is mk.MXFP8
    assert make_experts(case.weights, case.activation, inputs=None).inputs.format is None
    assert make_experts(case.weights, case.activation, inputs="auto").inputs.format is None


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_bad_input_scales(oracle, bad: float) -> None:
    case = oracle.layer("nvfp4", input_scales=True)
    w = case.weights
    weights = mq.ExpertWeights(w.w13, w.w2, None, None, mk.NVFP4, torch.tensor(bad), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"w13_input_scale holds .*finite and positive"):
        make_experts(weights, case.activation)
    weights = mq.ExpertWeights(w.w13, w.w2, input_format=mk.NVFP4, w13_input_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match="w2_input_scale is missing"):
        make_experts(weights, case.activation, inputs=None)


def test_bad_arguments(oracle) -> None:
    case = oracle.layer()
    experts = make_experts(case.weights, case.activation)
    x, routing = case.x, case.routing
    with pytest.raises(ValueError, match=r"x has shape \(13, 63\), needs \[T, 64\]"):
        experts(x[:, :63], routing)
    with pytest.raises(ValueError, match=r"x has shape \(1, 13, 64\)"):
        experts(x[None], routing)
    with pytest.raises(ValueError, match="x has 12 tokens and routing 13"):
        experts(x[:12], routing)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        experts(x.double(), routing)
    with pytest.raises(ValueError, match="stride 13 along H"):
        experts(x.T.contiguous().T, routing)
    with pytest.raises(ValueError, match=r"ids\[0, 1\] is 7, but there are 6 experts"):
        experts(x[:1], Routing(torch.tensor([[0, 7]]), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="move all to one device"):
        experts(x.to("meta"), routing)
    with pytest.raises(ValueError, match=r"needs 96 rows: I rows"):
        make_experts(case.weights, mk.Activation("silu", gated=False))
    with pytest.raises(ValueError, match="shared_experts is 6"):
        make_experts(case.weights, case.activation, shared_experts=6)
    with pytest.raises(ValueError, match="one expert a token only, got top_k = 2"):
        make_experts(case.weights, case.activation, router_weight_on_input=True, top_k=2)
    with pytest.raises(ValueError, match="one expert a token only, but routing has 2"):
        make_experts(case.weights, case.activation, router_weight_on_input=True)(x, routing)
    with pytest.raises(TypeError, match=r"expert_map is torch\.int64"):
        make_experts(case.weights, case.activation, expert_map=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expert_map\[1\] is 6"):
        make_experts(case.weights, case.activation, expert_map=torch.tensor([0, 6], dtype=torch.int32))


@pytest.mark.parametrize(("name", "device"), claims())
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_weights_come_back(oracle, name: str, layout: str, device: str) -> None:
    """``experts.weights`` are canonical: the same bytes where nothing was reordered, and experts built from them agree."""
    act = activation("swiglu_oai", layout)
    case = oracle.layer("mxfp4", activation=act, bias=True, dtype=torch.bfloat16, device=device)
    experts = build(name, case, dtype=torch.bfloat16)
    if name == "rebased":  # re-basing may change codes
        with pytest.raises(mk.Unsupported, match="do not keep the canonical weights"):
            experts.weights  # noqa: B018
        return
    if experts.activation.layout == layout:
        assert torch.equal(experts.weights.w13.data, case.weights.w13.data)
        assert torch.equal(experts.weights.w2.scale, case.weights.w2.scale)
    again = make_experts(experts.weights, experts.activation, backend=name, dtype=torch.bfloat16)
    assert torch.equal(again(case.x, case.routing), experts(case.x, case.routing))
    assert experts.nbytes >= case.weights.w13.nbytes + case.weights.w2.nbytes


@pytest.mark.parametrize(("name", "device"), claims())
@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "bfloat16"])
def test_new_weights_in_place(oracle, name: str, weight: str, device: str) -> None:
    """``update_weights`` writes into the memory that captured graphs read."""
    if name == "rebased" or (name == "native" and weight == "bfloat16"):
        pytest.skip("keeps no canonical weights" if name == "rebased" else "takes quantized weights only")
    options = {"bias": True, "dtype": torch.bfloat16, "device": device, "input_scales": weight == "nvfp4"}
    old, new = (oracle.layer(weight, seed=seed, **options) for seed in (0, 1))
    experts, fresh = (build(name, case, dtype=torch.bfloat16, inputs="auto") for case in (old, new))
    w13 = old.weights.w13 if weight == "bfloat16" else old.weights.w13.data
    where = w13.data_ptr()
    experts.update_weights(new.weights)
    assert torch.equal(experts(new.x, new.routing), fresh(new.x, new.routing))
    if name in ("emulation", "reference"):
        assert w13.data_ptr() == where
        assert torch.equal(
            w13.view(torch.uint8), (new.weights.w13 if weight == "bfloat16" else new.weights.w13.data).view(torch.uint8)
        )
    with pytest.raises(ValueError, match=r"cannot write|need the same"):
        experts.update_weights(oracle.layer("mxfp8_e4m3", bias=True).weights)


@pytest.mark.parametrize("name", ["emulation", "reference"])
def test_nothing_is_changed(oracle, name: str) -> None:
    case = oracle.layer(bias=True)
    before = [case.x.clone(), case.routing.ids.clone(), case.routing.weights.clone(), case.weights.w13.data.clone()]
    make_experts(case.weights, case.activation, backend=name)(case.x, case.routing)
    after = [case.x, case.routing.ids, case.routing.weights, case.weights.w13.data]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("experts", [6, 60])
def test_compiles_to_one_graph(oracle, weight: str, experts: int) -> None:
    case = oracle.layer(weight, dtype=torch.bfloat16, bias=True, experts=experts)
    experts = make_experts(case.weights, case.activation)

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return experts(x, Routing(ids, weights))

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for tokens in (13, 7, 11):  # the second call makes the number of tokens symbolic
        args = (case.x[:tokens], case.routing.ids[:tokens], case.routing.weights[:tokens])
        assert torch.equal(compiled(*args), forward(*args))


def test_hit_experts_without_reading_values() -> None:
    """The branch for accelerators and tracing gives the same table, the same rows, and -1 for the places left over."""
    from mx_moe.experts.emulation import hit_experts

    traced = torch.compile(hit_experts, fullgraph=True, backend="eager")
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(-1, 20, (5, 2), generator=g)
        table = None if seed % 2 else torch.randperm(19, generator=g).to(torch.int32) - 3
        rows, places = hit_experts(ids, 19, table)
        many, same = traced(ids, 19, table)
        assert torch.equal(places, same)
        assert many.tolist() == rows.tolist() + [-1] * (10 - rows.shape[0])
    rows, table = traced(ids, 10, None)  # as many pairs as experts: each keeps its place
    assert table is None
    assert rows.tolist() == [e if e in ids else -1 for e in range(10)]
    every = torch.arange(6).view(3, 2)
    assert hit_experts(every, 6, None) == (None, None)
    rows, places = hit_experts(torch.full((2, 1), -1), 6, None)
    assert rows.tolist() == [0]
    assert places.tolist() == [-1] * 6
    rows, places = traced(torch.full((2, 1), -1), 6, None)
    assert rows.tolist() == [-1, -1]
    assert places.tolist() == [-1] * 6


def test_classes_are_named_after_backends() -> None:
    assert EXPERT_CLASSES["emulation"] is EmulationExperts
    assert EXPERT_CLASSES["reference"] is ReferenceExperts
    assert list(EXPERT_CLASSES) == ["native", "rebased", "fused", "emulation", "reference"]


@pytest.mark.parametrize("inputs", [None, mk.MXFP8, mk.NVFP4], ids=str)
@pytest.mark.parametrize("orders", [(True, True), (False, True), (True, False)], ids=str)
def test_the_steps_in_slot_order(monkeypatch: pytest.MonkeyPatch, orders: tuple[bool, bool], inputs) -> None:
    """Whatever order rows lie in between the steps, the result is the same; who may not reorder says so (NVFP4 looks at all rows of h)."""
    asked = []

    def layer_slots(w13, w2, tiles, *, plain, ordered):
        asked.append((plain, ordered))
        return orders[0] and plain, orders[1] and ordered

    w13, w2 = (mk.quantize(torch.randn(3, n, k).bfloat16(), mk.MXFP4) for n, k in ((128, 64), (64, 64)))
    packed = mk.pack(w13, gated=True), mk.pack(w2)
    ids = torch.rand(20, 3).topk(2).indices.int()
    ids[0] = -1
    routing = Routing(ids, torch.rand(20, 2))
    weights = Weights(lambda: packed[0], lambda: packed[1], 3, torch.randn(3, 128), torch.randn(3, 64))
    x = torch.randn(20, 64).bfloat16()
    run = lambda x: fused_moe(x, routing, weights, mk.Activation("silu"), inputs=Inputs(inputs))  # noqa: E731
    want = run(x)
    monkeypatch.setattr(mk, "layer_slots", layer_slots)
    assert torch.equal(run(x), want)
    assert asked == [(inputs is None, inputs is not mk.NVFP4)]
    run(x.half())
    assert len(asked) == 1, "rows of 16-bit floats that are split into two stay where they are"
