"""The re-created classes by name: their contracts, one by one, against formulas written here and the float64 oracle."""

from __future__ import annotations

import warnings

import pytest
import torch

import mx_kernels as mk
import mx_quant as mq
from mx_moe import (
    Mxfp8EmulationTritonExperts,
    Mxfp8NativeTritonExperts,
    Mxfp8TritonExpertsBase,
    Nvfp4QuantizationEmulationTritonExperts,
    Problem,
    named_activation,
)

pytestmark = pytest.mark.filterwarnings("ignore:emulated experts")
OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)


def mxfp8(case, cls=Mxfp8EmulationTritonExperts, **options):
    w = case.weights
    experts = cls(w.w13.scale, w.w2.scale, w1_bias=w.w13_bias, w2_bias=w.w2_bias, **options)
    return experts, (w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)


# Mxfp8EmulationTritonExperts


@pytest.mark.parametrize("as_bytes", [False, True])
def test_mxfp8_emulation(oracle, as_bytes: bool) -> None:
    """Weights as FP8 or as their bytes; inputs stay as they are."""
    case = oracle.layer(bias=True, activation=OAI)
    experts, (w1, w2, weights, ids) = mxfp8(case, activation=OAI)
    if as_bytes:
        w1, w2 = w1.view(torch.uint8), w2.view(torch.uint8)
    got = experts.apply(case.x, w1, w2, weights, ids)
    assert oracle.relative(got, oracle.dense(case.x, case.routing, case.weights, OAI)) <= 2e-6
    assert not experts.quantization_emulation


def test_mxfp8_emulation_takes_wide_weights_as_they_are(oracle) -> None:
    case = oracle.layer("bfloat16", dtype=torch.bfloat16)
    experts = Mxfp8EmulationTritonExperts(None, None)
    got = experts.apply(case.x, case.weights.w13, case.weights.w2, case.routing.weights, case.routing.ids)
    assert oracle.relative(got, oracle.dense(case.x, case.routing, case.weights, case.activation)) <= 2**-8


def test_mxfp8_weights_need_their_scales(oracle) -> None:
    case = oracle.layer()
    w = case.weights
    with pytest.raises(ValueError, match="w1_scale is missing"):
        Mxfp8EmulationTritonExperts(None, None).apply(
            case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids
        )


def test_says_once_that_it_is_slower(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    import mx_moe.experts.base as base

    monkeypatch.setattr(base, "_warned", set())
    case = oracle.layer()
    experts, args = mxfp8(case)
    with pytest.warns(RuntimeWarning, match="slower than a native"):
        experts.apply(case.x, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts.apply(case.x, *args)


def test_global_ids_and_expert_map(oracle) -> None:
    """Ids are global; -1 in the map is elsewhere; the count is checked; rows of absent experts are zeros."""
    case = oracle.layer(experts=3)
    table = torch.tensor([-1, 2, 0, 1, -1], dtype=torch.int32)
    experts, (w1, w2, weights, _) = mxfp8(case)
    ids = torch.tensor([[1, 0], [4, 0]] + [[2, 3]] * 11)
    case.routing = type(case.routing)(ids, weights)
    got = experts.apply(case.x, w1, w2, weights, ids, global_num_experts=5, expert_map=table)
    want = oracle.dense(case.x, case.routing, case.weights, case.activation, expert_map=table)
    assert oracle.relative(got, want) <= 2e-6
    assert torch.equal(got[1], torch.zeros(64))
    with pytest.raises(ValueError, match="global_num_experts is 4, but expert_map has 5"):
        experts.apply(case.x, w1, w2, weights, ids, global_num_experts=4, expert_map=table)
    with pytest.raises(ValueError, match=r"global_num_experts is 4, but the weights have no expert_map and 3"):
        experts.apply(case.x, w1, w2, weights, ids, global_num_experts=4)


def test_router_weight_on_input(oracle) -> None:
    """The weight is in GEMM 1's input and nowhere else: silu is not linear, so twice or in the wrong place would show."""
    case = oracle.layer(top_k=1)
    experts, args = mxfp8(case)
    got = experts.apply(case.x, *args, apply_router_weight_on_input=True)
    want = oracle.dense(case.x, case.routing, case.weights, case.activation, weight_on_input=True)
    assert oracle.relative(got, want) <= 2e-6
    assert oracle.relative(experts.apply(case.x, *args), want) > 0.1
    two = oracle.layer(top_k=2)
    experts, args = mxfp8(two)
    with pytest.raises(ValueError, match="one expert a token only, but routing has 2"):
        experts.apply(two.x, *args, apply_router_weight_on_input=True)


def test_values_are_checked_once(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later calls on the same weights read no value on the host (CUDA graphs), and see weights that changed in place."""
    import mx_moe.experts.base as base

    case = oracle.layer(experts=3)
    table = torch.tensor([0, 1, 2], dtype=torch.int32)
    experts, args = mxfp8(case)
    first = experts.apply(case.x, *args, expert_map=table)
    seen = []
    monkeypatch.setattr(base, "check_expert_map", lambda *a: seen.append(a))
    again = experts.apply(case.x, args[0].data, *args[1:], expert_map=table.data)
    assert torch.equal(first, again)
    assert not seen
    case.weights.w13.data.view(torch.uint8).bitwise_xor_(0x80)  # minus every code
    changed = experts.apply(case.x, *args, expert_map=table)
    want = oracle.dense(case.x, case.routing, case.weights, case.activation)
    assert not seen
    assert oracle.relative(changed, want) <= 2e-6
    experts.apply(case.x, args[0].clone(), *args[1:], expert_map=table)
    assert len(seen) == 1


@pytest.mark.parametrize("system", ["mxfp8", "nvfp4"])
def test_compiles_to_one_graph(oracle, system: str) -> None:
    case = oracle.layer("mxfp8_e4m3" if system == "mxfp8" else "nvfp4", dtype=torch.bfloat16)
    w = case.weights
    scale = torch.tensor(2.0**-9)
    experts = mxfp8(case)[0] if system == "mxfp8" else nvfp4(case, scale, scale)
    args = (case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    compiled = torch.compile(experts.apply, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), experts.apply(*args), rtol=2**-7, atol=2**-7)


# activations by name


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("silu", mk.Activation("silu")),
        ("gelu", mk.Activation("gelu")),
        ("relu2_no_mul", mk.Activation("relu2", gated=False)),
        ("swigluoai", mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)),
    ],
)
def test_named_activation(name: str, want: mk.Activation) -> None:
    assert named_activation(name) == want


def test_swigluoai_uninterleave_requires_a_limit() -> None:
    with pytest.raises(ValueError, match="swigluoai_uninterleave needs a clamp limit"):
        named_activation("swigluoai_uninterleave")
    with pytest.raises(ValueError, match="swigluoai_uninterleave needs a clamp limit"):
        Mxfp8EmulationTritonExperts(None, None, activation="swigluoai_uninterleave")
    got = named_activation("SWIGLUOAI_UNINTERLEAVE", limit=5.0)
    assert got == mk.Activation("swiglu_oai", "concatenated", alpha=1.702, beta=1.0, limit=5.0)
    got = named_activation("swigluoai_uninterleave", alpha=1.0, beta=0.0, limit=5.0)
    assert (got.alpha, got.beta) == (1.0, 0.0)


def test_activation_parameters_are_never_dropped(oracle) -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        named_activation("swish")
    with pytest.raises(ValueError, match="alpha and beta belong to swiglu_oai"):
        named_activation("silu", alpha=1.702)
    with pytest.raises(ValueError, match="given as an Activation"):
        Mxfp8EmulationTritonExperts(None, None, activation=OAI, limit=7.0)
    for options in ({"limit": 0.25}, {"alpha": 3.0, "limit": 9.0}, {"beta": 0.0, "limit": 9.0}):
        act = named_activation("swigluoai_uninterleave", **options)
        case = oracle.layer(activation=act, bias=True)
        experts, args = mxfp8(case, activation="swigluoai_uninterleave", **options)
        got = experts.apply(case.x, *args)
        assert oracle.relative(got, oracle.dense(case.x, case.routing, case.weights, act)) <= 2e-6
        other = oracle.dense(case.x, case.routing, case.weights, OAI)
        assert oracle.relative(got, other) > 1e-2


# Mxfp8NativeTritonExperts


def test_native_is_refused_where_the_hardware_is_missing(oracle) -> None:
    case = oracle.layer()
    experts, args = mxfp8(case, Mxfp8NativeTritonExperts)
    with pytest.raises(mk.Unsupported, match="cpu has no hardware dot_scaled for mxfp8_e4m3"):
        experts.apply(case.x, *args)
    problem = Problem.of(case.weights, case.activation, inputs="mxfp8_e4m3")
    for arch in ("sm100", "sm120", "gfx950"):
        assert Mxfp8NativeTritonExperts.why_not(mk.Device.fake(arch), problem) is None
    assert "sm90 has no hardware" in Mxfp8NativeTritonExperts.why_not(mk.Device.fake("sm90"), problem)
    other = Problem.of(oracle.layer("mxfp4").weights, case.activation)
    assert Mxfp8NativeTritonExperts.why_not(mk.Device.fake("sm100"), other) == "it takes mxfp8_e4m3 weights, not mxfp4"


def test_native_arithmetic_on_the_reference(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native pipeline (quantized x, requantizing epilogue, float32 pairs) on the CPU's ops, its refusal lifted."""
    import mx_moe.experts.native as native

    monkeypatch.setattr(native.NativeExperts, "why_not", classmethod(lambda cls, device, problem: None))
    case = oracle.layer(bias=True, activation=OAI, dtype=torch.bfloat16)
    experts, args = mxfp8(case, Mxfp8NativeTritonExperts, activation=OAI)
    seen = []
    real = mk.grouped_gemm
    monkeypatch.setattr(mk, "grouped_gemm", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    got = experts.apply(case.x, *args)
    # bf16 is rounded to once, at the end: x is bf16, GEMM 1 quantizes from float32, pairs are float32
    want = oracle.dense(case.x, case.routing, case.weights, OAI, inputs="mxfp8_e4m3")
    assert oracle.relative(got, want) <= 4e-3
    (first, k1), (second, k2) = seen
    assert isinstance(first[0], mk.QuantizedTensor)
    assert isinstance(first[1], mk.QuantizedTensor)
    assert isinstance(second[0], mk.QuantizedTensor)
    assert k1["epilogue"].requantize_to is mk.MXFP8
    assert k2["out_dtype"] == torch.float32


def test_base_is_not_a_backend() -> None:
    with pytest.raises(TypeError, match="construct one of those"):
        Mxfp8TritonExpertsBase(None, None)
    assert issubclass(Mxfp8NativeTritonExperts, Mxfp8TritonExpertsBase)
    assert issubclass(Mxfp8EmulationTritonExperts, Mxfp8TritonExpertsBase)


# Nvfp4QuantizationEmulationTritonExperts

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nvfp4_qdq(x: torch.Tensor, g: float) -> torch.Tensor:
    """s = e4m3(clamp(g * amax / 6, +-448)); q = rne_e2m1(clamp(x * g / s, +-6)); q * s / g, and 0 where s is 0. g divides."""
    blocks = x.float().unflatten(-1, (-1, 16))
    s = (g * blocks.abs().amax(-1, keepdim=True) / 6).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    v = torch.where(s == 0, 0.0, blocks * g / s).clamp(-6, 6)
    ties_to_even = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    distance = (v.abs()[..., None] - E2M1[ties_to_even]).abs()
    q = E2M1[ties_to_even][distance.argmin(-1)].copysign(v)
    return (q * s / g).flatten(-2)


def nvfp4(case, a1: object, a2: object, **options):
    w = case.weights
    return Nvfp4QuantizationEmulationTritonExperts(
        w.w13.scale, w.w2.scale, w.w13.global_scale, w.w2.global_scale, a1, a2, **options
    )


def test_nvfp4_emulation(oracle) -> None:
    """Both GEMMs' inputs go through the quantize-dequantize formula, each with its own global scale."""
    case = oracle.layer("nvfp4")
    w = case.weights
    divisors = (2.0**9, 2.0**11)  # powers of two: multiplying by 1/g and dividing by g are then the same
    experts = nvfp4(case, torch.tensor(1 / divisors[0]), torch.tensor(1 / divisors[1]))
    assert experts.quantization_emulation
    got = experts.apply(case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    w13, w2 = oracle.values(w.w13), oracle.values(w.w2)
    want = torch.zeros(case.x.shape, dtype=torch.float64)
    for t in range(13):
        for slot in range(2):
            e = int(case.routing.ids[t, slot])
            h = oracle.activate(w13[e] @ nvfp4_qdq(case.x[t], divisors[0]).double(), case.activation)
            y = w2[e] @ nvfp4_qdq(h, divisors[1]).double()
            want[t] += y * float(case.routing.weights[t, slot])
    assert (
        oracle.relative(got, want) <= 4e-3
    )  # a code of h may differ where float32 and float64 sums straddle a midpoint
    plain = oracle.dense(case.x, case.routing, w, case.activation)
    assert oracle.relative(got, plain) > 2e-2


def test_nvfp4_scales_per_expert_are_joined(oracle) -> None:
    case = oracle.layer("nvfp4")
    w = case.weights
    args = (case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    one = nvfp4(case, torch.tensor(2.0**-9), torch.tensor(2.0**-9)).apply(*args)
    scales = torch.tensor([2.0**-10, 2.0**-9, 2.0**-12, 2.0**-9, 2.0**-11, 2.0**-10])
    assert torch.equal(nvfp4(case, scales, scales[:2]).apply(*args), one)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_nvfp4_bad_scales(oracle, bad: float) -> None:
    case = oracle.layer("nvfp4")
    good = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"a1_global_scale holds .*finite and positive"):
        nvfp4(case, torch.tensor([1.0, bad]), good)
    with pytest.raises(ValueError, match=r"a2_global_scale holds .*finite and positive"):
        nvfp4(case, good, torch.tensor(bad))
    w = case.weights
    with pytest.raises(ValueError, match=r"w1_global_scale holds .*finite and positive"):
        Nvfp4QuantizationEmulationTritonExperts(w.w13.scale, w.w2.scale, torch.tensor([bad]), good, good, good)


def test_nvfp4_missing_scales(oracle) -> None:
    case = oracle.layer("nvfp4")
    with pytest.raises(ValueError, match="a1_global_scale is missing"):
        nvfp4(case, None, torch.tensor(1.0))
    with pytest.raises(ValueError, match="a2_global_scale is missing"):
        nvfp4(case, torch.tensor(1.0), None)
    with pytest.raises(ValueError, match="a1_global_scale is empty"):
        nvfp4(case, torch.empty(0), torch.tensor(1.0))


# all of them on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("system", ["mxfp8", "nvfp4"])
def test_on_the_gpu(oracle, system: str) -> None:
    case = oracle.layer("mxfp8_e4m3" if system == "mxfp8" else "nvfp4", bias=True, dtype=torch.bfloat16, device="cuda")
    w = case.weights
    args = (case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    if system == "mxfp8":
        experts = Mxfp8EmulationTritonExperts(w.w13.scale, w.w2.scale, w1_bias=w.w13_bias, w2_bias=w.w2_bias)
        inputs = None
    else:
        a = torch.tensor(2.0**-9, device="cuda")
        experts = nvfp4(case, a, a, w1_bias=w.w13_bias, w2_bias=w.w2_bias)
        inputs = "nvfp4"
        case.weights = mq.ExpertWeights(w.w13, w.w2, w.w13_bias, w.w2_bias, mk.NVFP4, a, a)
    got = experts.apply(*args)
    want = oracle.dense(case.x, case.routing, case.weights, case.activation, inputs=inputs)
    # bf16 roundings of weights (NVFP4), h and the result; with quantized inputs, h's rounding moves codes over midpoints
    assert oracle.relative(got, want) <= (2**-8 if system == "mxfp8" else 4e-2)
    problem = Problem.of(case.weights, case.activation, inputs="mxfp8_e4m3")
    native = Mxfp8NativeTritonExperts(w.w13.scale, w.w2.scale)
    if system == "mxfp8" and native.why_not(mk.Device.probe("cuda"), problem) is not None:
        with pytest.raises(mk.Unsupported, match="no hardware dot_scaled"):
            native.apply(*args)
