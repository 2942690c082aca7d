"""The five re-created systems by name, end to end from loaded weights to the layer's output, against the float64 oracle.

Tolerances (||got - want|| / ||want||): bfloat16 x rounds h, the result and, in a fused layer, each pair: 2^-8; with inputs
quantized to MXFP8, h may round to another code where it is near a midpoint: 6e-3; with NVFP4 inputs, h is rounded to bfloat16
first and its codes have two bits: 5e-2.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mx_kernels as mk
import mx_moe as mm
import mx_quant as mq

pytestmark = pytest.mark.filterwarnings("ignore:emulated experts")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BF16 = 2**-8
GPT_OSS = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
SILU = mk.Activation("silu")


def source(oracle, device: str, activation: mk.Activation, weight: str = "bfloat16", **shape):
    """2880 = 22.5 tiles of 128 is what gpt-oss has; 160 and 96 are such odd multiples of 32."""
    shape = {"experts": 8, "hidden": 160, "intermediate": 96, "tokens": 37, "top_k": 4, **shape}
    return oracle.layer(weight, activation=activation, bias=True, dtype=torch.bfloat16, device=device, **shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_1_mxfp8_emulation(oracle, device: str, tokens: int) -> None:
    case = source(oracle, device, GPT_OSS, "mxfp8_e4m3", tokens=tokens)
    w = case.weights
    experts = mm.Mxfp8EmulationTritonExperts(
        w.w13.scale, w.w2.scale, w1_bias=w.w13_bias, w2_bias=w.w2_bias, activation="swigluoai_uninterleave", limit=7.0
    )
    got = experts.apply(case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    assert oracle.relative(got, oracle.dense(case.x, case.routing, w, GPT_OSS)) <= BF16


@pytest.mark.parametrize("device", DEVICES)
def test_2_mxfp8_native(oracle, device: str) -> None:
    """Where the hardware has the instruction it runs; elsewhere it is refused with that reason and emulation is what is chosen."""
    case = source(oracle, device, SILU, "mxfp8_e4m3")
    w = case.weights
    native = mm.Mxfp8NativeTritonExperts(w.w13.scale, w.w2.scale, w1_bias=w.w13_bias, w2_bias=w.w2_bias)
    args = (case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    here = mk.Device.probe(device)
    if here.native("mxfp8_e4m3", "mxfp8_e4m3"):
        want = oracle.dense(case.x, case.routing, w, SILU, inputs="mxfp8_e4m3")
        assert oracle.relative(native.apply(*args), want) <= 6e-3
        assert mm.select_mxfp8_moe_backend(here).name == "native"
    else:
        with pytest.raises(mk.Unsupported, match=f"{here} has no hardware dot_scaled for mxfp8_e4m3"):
            native.apply(*args)
        assert mm.select_mxfp8_moe_backend(here).name == ("emulation" if device == "cpu" else "fused")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["mxfp8", "w8a8"])
def test_3_mxfp8_online_moe(oracle, device: str, scheme: str) -> None:
    """Created, loaded in bf16, quantized while loading, run on the chosen backend; a second processing changes nothing."""
    case = source(oracle, device, SILU)
    w, layer = case.weights, nn.Module()
    method = mq.Mxfp8OnlineMoEMethod(scheme, make_experts=mm.make_experts, activation=SILU)
    method.create_weights(layer, 8, 160, 96, bias=True, device=device)
    for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
        getattr(layer, name).copy_(getattr(w, name.removesuffix("_weight")))
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    got = method.apply(layer, case.x, case.routing)
    inputs = layer.experts.inputs.format
    assert inputs is (mk.MXFP8 if scheme == "w8a8" else None)
    weights = mq.quantize_experts(w.w13, w.w2, "mxfp8", w13_bias=w.w13_bias, w2_bias=w.w2_bias)
    want = oracle.dense(case.x, case.routing, weights, SILU, inputs=None if inputs is None else inputs.name)
    assert oracle.relative(got, want) <= (BF16 if inputs is None else 6e-3)
    asked = None if inputs is None else inputs.name
    assert layer.experts.choice.name == mm.select_mxfp8_moe_backend(mk.Device.probe(device), inputs=asked).name


@pytest.mark.parametrize("device", DEVICES)
def test_3_mxfp8_online_linear(oracle, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 160, generator=g).bfloat16(), torch.randn(7, 160, generator=g).bfloat16().to(device)
    layer, method = nn.Module(), mq.Mxfp8OnlineLinearMethod()
    method.create_weights(layer, 160, 96, device=device)
    layer.weight.data.copy_(weight)
    method.process_weights_after_loading(layer)
    got = method.apply(layer, x)
    want = x.cpu().double() @ oracle.values(mk.quantize(weight, mk.MXFP8)).T
    assert oracle.relative(got, want) <= BF16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_4_mxfp4_moe_gpt_oss(oracle, device: str, tokens: int) -> None:
    """Interleaved codes and biases as the checkpoint has them, SwiGLU-OAI; the layer's tensors are released."""
    case = source(oracle, device, GPT_OSS, "mxfp4", tokens=tokens)
    w, layer = case.weights, nn.Module()
    method = mq.Mxfp4MoEMethod(make_experts=mm.make_experts)
    method.create_weights(layer, 8, 160, 96, bias=True, device=device)
    layer.w13_weight.copy_(mq.interleave(w.w13.data, 1))
    layer.w13_weight_scale.copy_(mq.interleave(w.w13.scale, 1))
    layer.w13_bias.data.copy_(mq.interleave(w.w13_bias, 1))
    layer.w2_weight.copy_(w.w2.data)
    layer.w2_weight_scale.copy_(w.w2.scale)
    layer.w2_bias.data.copy_(w.w2_bias)
    method.process_weights_after_loading(layer)
    got = method.apply(layer, case.x, case.routing)
    inputs = layer.experts.inputs.format
    want = oracle.dense(case.x, case.routing, w, GPT_OSS, inputs=None if inputs is None else inputs.name)
    assert oracle.relative(got, want) <= (BF16 if inputs is None else 6e-3)
    assert torch.equal(method.weights(layer).w13.data, w.w13.data)
    assert all(p is None or p.numel() == 0 for n, p in layer.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_5_nvfp4_quantization_emulation(oracle, device: str, tokens: int) -> None:
    case = source(oracle, device, SILU, "nvfp4", tokens=tokens)
    w = case.weights
    a1, a2 = (torch.tensor(v / 2688, device=device) for v in (5.0, 8.0))
    experts = mm.Nvfp4QuantizationEmulationTritonExperts(
        w.w13.scale, w.w2.scale, w.w13.global_scale, w.w2.global_scale, a1, a2, w1_bias=w.w13_bias, w2_bias=w.w2_bias
    )
    got = experts.apply(case.x, w.w13.data, w.w2.data, case.routing.weights, case.routing.ids)
    calibrated = mq.ExpertWeights(w.w13, w.w2, w.w13_bias, w.w2_bias, mk.NVFP4, a1, a2)
    want = oracle.dense(case.x, case.routing, calibrated, SILU, inputs="nvfp4")
    assert oracle.relative(got, want) <= 5e-2
    plain = oracle.dense(case.x, case.routing, w, SILU)
    assert oracle.relative(got, plain) > 5e-2  # inputs are quantized


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "mxfp4", "nvfp4", "bfloat16"])
def test_cuda_graphs(oracle, weight: str) -> None:
    """A layer is captured and replayed on new tokens and routing: nothing reads the host."""
    case = source(oracle, "cuda", SILU, weight, tokens=300)
    experts = mm.make_experts(case.weights, SILU)
    x, ids, weights = case.x.clone(), case.routing.ids.clone(), case.routing.weights.clone()
    for _ in range(3):
        experts(x, mm.Routing(ids, weights))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, mm.Routing(ids, weights))
    for shift in range(3):
        x.copy_(case.x.roll(shift, 0))
        ids.copy_((case.routing.ids + shift) % 8)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, experts(x, mm.Routing(ids, weights)))


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["mxfp8_e4m3", "mxfp4", "nvfp4"])
def test_same_bits_run_to_run(oracle, weight: str) -> None:
    case = source(oracle, "cuda", SILU, weight, tokens=300)
    for name in ("fused", "emulation"):
        experts = mm.make_experts(case.weights, SILU, backend=name)
        first = experts(case.x, case.routing)
        for _ in range(5):
            assert torch.equal(experts(case.x, case.routing), first)
