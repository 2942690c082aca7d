from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mx_kernels as mk
import mx_quant as mq
from mx_quant import storage

FORMATS = list(mk.FORMATS.values())


def same(a: mk.QuantizedTensor, b: mk.QuantizedTensor) -> bool:
    """Bit-equal: codes, scales and global scales."""
    pairs = [(a.data, b.data), (a.scale, b.scale)]
    if a.global_scale is not None or b.global_scale is not None:
        pairs.append((a.global_scale.reshape(-1), b.global_scale.reshape(-1)))
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def source(k=64, n=32, bias=True, dtype=torch.bfloat16):
    return nn.Linear(k, n, bias=bias, dtype=dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_linear(format, bias):
    """Against ``F.linear`` in float64 on the dequantized weight; bf16 output rounding is 2^-9 relative, fp32 sums add 64 * 2^-24."""
    linear = source(bias=bias)
    layer = mq.MxLinear.from_linear(linear, format)
    assert same(layer.quantized, mk.quantize(linear.weight.detach(), format))
    x = torch.randn(2, 3, 64).bfloat16()
    w = mk.dequantize(layer.quantized, torch.float32).double()
    want = nn.functional.linear(x.double(), w, None if not bias else linear.bias.double())
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert got.shape == (2, 3, 32)
    scale = x.double().abs() @ w.abs().T
    assert ((got.double() - want).abs() <= want.abs() * 2.0**-8 + scale * 2.0**-18).all()


@pytest.mark.parametrize("name", [n for n, s in mq.SCHEMES.items() if s.activation is not None])
def test_forward_quantizes_inputs_as_the_scheme_says(name):
    scheme = mq.get_scheme(name)
    layer = mq.MxLinear.from_linear(source(), scheme)
    x = torch.randn(5, 64).bfloat16()
    want = mk.gemm(mk.quantize(x, scheme.activation), layer.quantized, epilogue=mk.Epilogue(bias=layer.bias))
    assert torch.equal(layer(x), want)
    assert torch.equal(layer(x.T.contiguous().T), want)
    plain = mq.MxLinear.from_linear(source(), scheme.weight)
    assert not torch.equal(plain(x), want)


def test_static_input_scale():
    q = mk.quantize(torch.randn(32, 64).bfloat16(), mk.NVFP4)
    layer = mq.MxLinear.from_quantized(q, None, mk.NVFP4, input_scale=torch.tensor(0.01))
    x = torch.randn(5, 64).bfloat16()
    want = mk.gemm(mk.quantize(x, mk.NVFP4, global_scale=torch.tensor(0.01)), q)
    assert torch.equal(layer(x), want)
    with pytest.raises(ValueError, match=r"input_scale is 0\.0 .* missing, zero"):
        mq.MxLinear.from_quantized(q, None, mk.NVFP4, input_scale=torch.tensor(0.0))
    with pytest.raises(ValueError, match="belongs to NVFP4 activations"):
        mq.MxLinear.from_quantized(q, None, mk.MXFP8, input_scale=torch.tensor(0.01))
    with pytest.raises(TypeError, match=r"needs float32 \[\]"):
        mq.MxLinear.from_quantized(q, None, mk.NVFP4, input_scale=torch.ones(1))


@pytest.mark.parametrize("scheme", ["w8a8", "w6a16", "w4a16", "nvfp4_w4a16"])
def test_state_dict_round_trip(scheme, tmp_path):
    layer = mq.MxLinear.from_linear(source(), scheme)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    other = mq.MxLinear(64, 32, True, scheme)
    assert list(other.state_dict()) == list(state)
    pointer = other.weight.data_ptr()
    other.load_state_dict(state)
    assert other.weight.data_ptr() == pointer
    assert same(other.quantized, layer.quantized)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(other(x), layer(x))
    assigned = mq.MxLinear(64, 32, True, scheme, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(x), layer(x))


def test_state_dict_never_casts():
    """A copy of bf16 weights into FP8 codes has the right shape and the wrong numbers."""
    layer = mq.MxLinear(64, 32, False, "w8a16")
    state = layer.state_dict() | {"weight": torch.randn(32, 64).bfloat16()}
    with pytest.raises(RuntimeError, match=r"weight is torch.bfloat16, needs torch.float8_e4m3fn .* update_weights"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("scheme", ["w8a16", "nvfp4_w4a16"])
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_casts_leave_codes_and_scales_alone(scheme, cast):
    layer = mq.MxLinear.from_linear(source(dtype=torch.float32), scheme)
    before = layer.quantized.map(torch.clone)
    cast(layer)
    assert same(layer.quantized, before)
    assert layer.bias.dtype != torch.float32
    assert layer.weight_scale.dtype == layer.quantized.format.scale_dtype
    moved = layer.to("meta")
    assert moved.quantized.device.type == "meta"


def test_type_cast_of_everything_is_refused():
    layer = mq.MxLinear.from_linear(source(), "w8a16")
    before = layer.quantized.map(torch.clone)
    with pytest.raises(TypeError, match=r"codes and scales cannot become torch\.float32"):
        layer.type(torch.float32)
    assert same(layer.quantized, before)


def test_copies_do_not_share_memory():
    layer = mq.MxLinear.from_linear(source(), "nvfp4_w4a16")
    other = copy.deepcopy(layer)
    assert same(layer.quantized, other.quantized)
    assert layer.quantized.data.data_ptr() != other.quantized.data.data_ptr()
    assert other.quantized.data is other.weight


def test_from_linear_leaves_the_source_alone():
    linear = source()
    before = copy.deepcopy(linear.state_dict())
    layer = mq.MxLinear.from_linear(linear, "w4a4")
    layer(torch.randn(2, 64).bfloat16())
    layer.update_weights(torch.randn(32, 64), torch.randn(32))
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items())
    assert linear.bias.requires_grad
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_update_weights_keeps_pointers(format):
    layer = mq.MxLinear.from_linear(source(), format)
    held = [t.data_ptr() for t in (*layer.buffers(), layer.bias)]
    new = source()
    layer.update_weights(new.weight.detach(), new.bias.detach())
    assert held == [t.data_ptr() for t in (*layer.buffers(), layer.bias)]
    want = mq.MxLinear.from_linear(new, format)
    assert same(layer.quantized, want.quantized)
    assert torch.equal(layer.bias, want.bias)
    layer.update_weights(mk.quantize(torch.zeros(32, 64).bfloat16(), format))
    assert mk.dequantize(layer.quantized).abs().max() == 0


def test_update_weights_writes_nothing_when_something_is_wrong():
    layer = mq.MxLinear.from_linear(source(), "nvfp4_w4a16")
    before = layer.quantized.map(torch.clone)
    bad = torch.randn(32, 64).bfloat16()
    bad[3, 5] = torch.nan
    unloaded = mq.MxLinear(64, 32, False, "nvfp4_w4a16").quantized
    for weight, bias, error, match in (
        (bad, None, ValueError, r"weight is not finite.*\(3, 5\)"),
        (torch.randn(32, 32).bfloat16(), None, ValueError, "shape"),
        (torch.randn(32, 64).double(), None, TypeError, "float64"),
        (mk.quantize(torch.randn(32, 64), mk.MXFP4), None, ValueError, "cannot copy mxfp4"),
        (unloaded, None, ValueError, r"weight_scale is NaN in 128 of 128 blocks, the first at index \(0, 0\)"),
        (torch.randn(32, 64), torch.randn(31), ValueError, "bias has shape"),
    ):
        with pytest.raises(error, match=match):
            layer.update_weights(weight, bias)
        assert same(layer.quantized, before)
    plain = mq.MxLinear.from_linear(source(bias=False), "w8a16")
    with pytest.raises(ValueError, match="this layer has none"):
        plain.update_weights(torch.randn(32, 64), torch.randn(32))


def test_dequantize_gives_a_linear():
    layer = mq.MxLinear.from_linear(source(), "w8a16")
    plain = layer.dequantize()
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, mk.dequantize(layer.quantized))
    assert torch.equal(plain.bias, layer.bias)


def test_repr():
    layer = mq.MxLinear(64, 32, False, mq.Scheme(mk.MXFP4, mk.MXFP8, "floor"))
    assert "in_features=64, out_features=32, bias=False, scheme=mxfp4_w4a8, rule=floor" in repr(layer)


def test_bad_construction():
    with pytest.raises(
        ValueError, match="in_features is 33, but mxfp8_e4m3 needs a positive multiple of its block length 32"
    ):
        mq.MxLinear(33, 32)
    with pytest.raises(ValueError, match="out_features is 0"):
        mq.MxLinear(32, 0)
    with pytest.raises(ValueError, match=r"K of q_proj\.weight .* is 48"):
        mq.MxLinear.from_linear(source(48), "w4a16", name="q_proj.weight")
    with pytest.raises(ValueError, match=r"weight has shape \(2, 32, 64\), needs two dimensions"):
        mq.MxLinear.from_quantized(mk.quantize(torch.randn(2, 32, 64), mk.MXFP4))
    with pytest.raises(ValueError, match=r"bias has shape \(31,\), needs \(32,\)"):
        mq.MxLinear.from_quantized(mk.quantize(torch.randn(32, 64), mk.MXFP4), torch.zeros(31))
    with pytest.raises(TypeError, match="float64"):
        mq.MxLinear.from_linear(source(dtype=torch.float64), "w4a16")
    with pytest.raises(ValueError, match="meta device"):
        mq.MxLinear.from_linear(source().to("meta"), "w4a16")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "nvfp4_w4a16"])
def test_compiles_without_graph_breaks(scheme):
    layer = mq.MxLinear.from_linear(source(), scheme)
    x = torch.randn(3, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("scheme", mq.SCHEMES)
def test_a_layer_that_was_never_loaded_gives_nan(scheme):
    layer = mq.MxLinear(64, 32, True, scheme)
    assert torch.isnan(layer(torch.randn(2, 64).bfloat16())).all()


def test_bad_inputs():
    layer = mq.MxLinear.from_linear(source(), "w8a16")
    for x, error, match in (
        (torch.randn(2, 32), ValueError, "x has K = 32 and w has K = 64"),
        (torch.randn(()), ValueError, r"x has shape \(\)"),
        (torch.zeros(2, 64, dtype=torch.int32), TypeError, "x is torch.int32"),
        (torch.randn(2, 64, device="meta"), ValueError, "move both to one device"),
    ):
        with pytest.raises(error, match=match):
            layer(x)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w6a16", "w4a16", "nvfp4_w4a16"])
def test_packed_is_the_same_layer(scheme):
    """The same values; what is saved, loaded, moved and repeated is canonical, bit for bit."""
    plain, layer = (mq.MxLinear.from_linear(source(), scheme) for _ in range(2))
    other = mq.MxLinear.from_linear(source(), scheme)
    layer.load_state_dict(plain.state_dict())
    x, before = torch.randn(5, 64).bfloat16(), list(layer.state_dict())
    assert layer.pack_() is layer
    packed = layer._packed
    assert layer.pack_()._packed is packed
    assert layer.weight.is_meta
    assert repr(layer).endswith("packed)")
    assert torch.equal(layer(x), plain(x))
    assert same(layer.quantized, plain.quantized)
    state = layer.state_dict()
    assert list(state) == before
    assert all(torch.equal(storage.as_bytes(t), storage.as_bytes(plain.state_dict()[n])) for n, t in state.items())
    assert torch.equal(layer.dequantize().weight, plain.dequantize().weight)
    copied = copy.deepcopy(layer).half()
    assert copied._packed is not None
    assert torch.equal(copied(x.half()), plain(x.half()))
    layer.load_state_dict(other.state_dict())
    assert layer._packed is not None
    assert torch.equal(layer(x), other(x))
    where = layer._packed.data.data_ptr()
    layer.update_weights(plain.quantized, plain.bias)
    assert layer._packed.data.data_ptr() == where
    assert torch.equal(layer(x), plain(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), plain(x))
    assert layer.unpack_()._packed is None
    assert same(layer.quantized, plain.quantized)
    assert layer.weight.data_ptr() == layer.quantized.data.data_ptr()
    meta = layer.pack_().to("meta")
    assert meta._packed is None
    assert meta.weight.is_meta


def test_packing_refuses_what_was_never_loaded_and_other_scales():
    with pytest.raises(ValueError, match="NaN"):
        mq.MxLinear(64, 16, scheme="w4a16").pack_()
    layer = mq.MxLinear.from_linear(source(), "w8a16").pack_()
    small = nn.Linear(64, layer.out_features, dtype=torch.bfloat16)
    small.weight.data = torch.randn_like(small.weight) * 2.0**100
    old = layer._packed.data.clone()
    with pytest.raises(ValueError, match="need a shift"):
        layer.update_weights(small.weight.detach())
    assert torch.equal(layer._packed.data, old)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", mq.SCHEMES)
def test_packed_on_the_gpu(scheme):
    """Against the canonical kernel: both sum in float32 in an order of their own and round once, 2^-8."""
    plain, layer = (mq.MxLinear.from_linear(source().cuda(), scheme) for _ in range(2))
    layer.load_state_dict(plain.state_dict())
    layer.pack_()
    for tokens in (0, 1, 5, 300):
        x = torch.randn(tokens, 64, device="cuda").bfloat16()
        got, want = layer(x).double(), plain(x).double()
        assert (got - want).norm() <= 2**-8 * want.norm()
    assert same(layer.quantized, plain.quantized)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    assert layer.cpu()._packed is None


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", mq.SCHEMES)
def test_gpu_is_the_cpu(scheme):
    """Codes bit for bit; products to the rounding of bf16 (2^-8) and of sums in another order (64 * 2^-24 of the magnitudes)."""
    device = "cuda" if torch.cuda.is_available() else "xpu"
    linear = source()
    want, got = mq.MxLinear.from_linear(linear, scheme), mq.MxLinear.from_linear(linear.to(device), scheme)
    assert same(got.quantized.to("cpu"), want.quantized)
    moved = mq.MxLinear.from_linear(linear.to("cpu"), scheme).to(device)
    x = torch.randn(5, 64).bfloat16()
    y, y_moved, expected = got(x.to(device)).cpu().double(), moved(x.to(device)).cpu().double(), want(x).double()
    assert torch.equal(y, y_moved)
    magnitudes = x.double().abs() @ mk.dequantize(want.quantized, torch.float32).double().abs().T
    assert ((y - expected).abs() <= expected.abs() * 2.0**-7 + magnitudes * 2.0**-15).all()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16", "nvfp4_w4a16"])
def test_a_captured_graph_sees_new_weights(scheme, packed):
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA or ROCm device")

    def made(linear):
        layer = mq.MxLinear.from_linear(linear, scheme)
        return layer.pack_() if packed else layer

    layer, x = made(source().cuda()), torch.randn(4, 64, device="cuda").bfloat16()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    new = source().cuda()
    layer.update_weights(new.weight.detach(), new.bias.detach())
    graph.replay()
    assert torch.equal(y, made(new)(x))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(mk.FORMATS)),
    n=st.integers(1, 5),
    blocks=st.integers(1, 3),
    tokens=st.integers(0, 3),
    data=st.data(),
)
def test_any_shape_and_rule(name, n, blocks, tokens, data):
    format = mk.get_format(name)
    rule = data.draw(st.sampled_from(format.rules))
    layer = mq.MxLinear.from_linear(source(blocks * format.block, n), mq.Scheme(format, rule=rule))
    assert layer.quantized.rule is rule
    x = torch.randn(tokens, blocks * format.block).bfloat16()
    assert layer(x).shape == (tokens, n)
    assert torch.isfinite(layer(x)).all()
