"""Methods for linear layers: online, offline, and by the names of their formats."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import mx_kernels as mk
import mx_quant as mq

from .test_linear import FORMATS, same, source

ONLINE = {
    mq.Mxfp8OnlineLinearMethod: mk.MXFP8,
    mq.Mxfp6OnlineLinearMethod: mk.MXFP6_E2M3,
    mq.Mxfp4OnlineLinearMethod: mk.MXFP4,
    mq.Nvfp4OnlineLinearMethod: mk.NVFP4,
}
OFFLINE = {mq.Mxfp8LinearMethod: mk.MXFP8, mq.Mxfp4LinearMethod: mk.MXFP4, mq.Nvfp4LinearMethod: mk.NVFP4}


def test_named_methods_have_their_format():
    for cls, format in (ONLINE | OFFLINE).items():
        assert cls().scheme == mq.get_scheme(format)
        with pytest.raises(ValueError, match="use the method of its format"):
            cls(mk.MXFP6_E3M2)
    with pytest.raises(ValueError, match="serves every format"):
        mq.OnlineLinearMethod()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_online(format, dtype):
    """Load, process, apply; the second processing changes nothing, and the source is released."""
    method, layer, linear = mq.OnlineLinearMethod(format), nn.Module(), source(dtype=dtype)
    method.create_weights(layer, 64, 32, bias=True, dtype=dtype)
    layer.load_state_dict(linear.state_dict())
    loaded = weakref.ref(layer.weight)
    method.process_weights_after_loading(layer)
    assert loaded() is None
    assert layer.input_scale is None
    assert layer.weight.dtype == format.data_dtype
    assert layer.weight_scale.shape == (32, 64 // format.block)
    pointers = [b.data_ptr() for b in layer.buffers()]
    before = method.quantized(layer).map(torch.clone)
    method.process_weights_after_loading(layer)
    assert pointers == [b.data_ptr() for b in layer.buffers()]
    assert same(method.quantized(layer), before)
    x = torch.randn(3, 64, dtype=dtype)
    assert torch.equal(method.apply(layer, x), mq.MxLinear.from_linear(linear, format)(x))
    assert torch.equal(
        method.apply(layer, x, torch.zeros(32, dtype=dtype)),
        method.apply(layer, x) * 0 + mq.MxLinear.from_quantized(before)(x),
    )


def test_online_weights_on_meta_are_quantized_as_they_come():
    method, layer, linear = mq.Mxfp8OnlineLinearMethod("w8a8"), nn.Module(), source(bias=False)
    method.create_weights(layer, 64, 32, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match=r"q\.weight has shape \(64, 32\), needs \(32, 64\)"):
        method.load_weight(layer, linear.weight.T, "q.weight")
    method.load_weight(layer, linear.weight)
    method.process_weights_after_loading(layer)
    assert same(method.quantized(layer), mk.quantize(linear.weight.detach(), mk.MXFP8))
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(method.apply(layer, x), mq.MxLinear.from_linear(linear, "w8a8")(x))
    with pytest.raises(RuntimeError, match="quantized already"):
        method.load_weight(layer, linear.weight)


@pytest.mark.parametrize("cls", [mq.Mxfp8OnlineLinearMethod, mq.Nvfp4OnlineLinearMethod])
def test_methods_compile_without_graph_breaks(cls):
    method, layer = cls(), nn.Module()
    method.create_weights(layer, 64, 32, bias=True)
    layer.load_state_dict(source().state_dict())
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 64).bfloat16()
    compiled = torch.compile(lambda t: method.apply(layer, t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), method.apply(layer, x))


def test_online_update_keeps_pointers():
    method, layer = mq.Nvfp4OnlineLinearMethod(), nn.Module()
    method.create_weights(layer, 64, 32, bias=True)
    layer.load_state_dict(source().state_dict())
    method.process_weights_after_loading(layer)
    pointers = [t.data_ptr() for t in (*layer.buffers(), layer.bias)]
    new = source()
    method.update_weights(layer, new.weight, new.bias.detach())
    assert pointers == [t.data_ptr() for t in (*layer.buffers(), layer.bias)]
    assert same(method.quantized(layer), mk.quantize(new.weight.detach(), mk.NVFP4))
    assert torch.equal(layer.bias, new.bias)


@pytest.mark.parametrize("cls", [*ONLINE, *OFFLINE])
def test_create_weights_names_the_field_its_value_and_the_rule(cls):
    format = (ONLINE | OFFLINE)[cls]
    with pytest.raises(
        ValueError,
        match=rf"in_features is 40, but {format} needs a positive multiple of its block length {format.block}",
    ):
        cls().create_weights(nn.Module(), 40, 32)
    with pytest.raises(ValueError, match="out_features is -1"):
        cls().create_weights(nn.Module(), 64, -1)


def test_online_refuses_dtypes_and_what_was_not_loaded():
    method, layer = mq.Mxfp8OnlineLinearMethod(), nn.Module()
    with pytest.raises(TypeError, match=r"dtype of the weights is torch.float8_e4m3fn"):
        method.create_weights(layer, 64, 32, dtype=torch.float8_e4m3fn)
    method.create_weights(layer, 64, 32)
    with pytest.raises(RuntimeError, match="not ready: call process_weights_after_loading"):
        method.apply(layer, torch.randn(1, 64))
    with pytest.raises(ValueError, match="weight is not finite: 2048 of 2048"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("cls", OFFLINE)
def test_offline(cls):
    method, layer = cls(), nn.Module()
    method.create_weights(layer, 64, 32, bias=True)
    with pytest.raises(ValueError, match=r"weight_scale is NaN in .* was not loaded"):
        method.process_weights_after_loading(layer)
    want = mq.MxLinear.from_linear(source(), OFFLINE[cls])
    layer.load_state_dict(want.state_dict())
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    assert same(method.quantized(layer), want.quantized)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(method.apply(layer, x), want(x))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_offline_refuses_missing_or_zero_scales(bad):
    method = mq.Nvfp4LinearMethod("nvfp4_w4a4")
    good = mq.MxLinear.from_quantized(
        mk.quantize(torch.randn(32, 64), mk.NVFP4), None, mk.NVFP4, input_scale=torch.tensor(0.5)
    ).state_dict()
    for name in ("weight_global_scale", "input_scale"):
        layer = nn.Module()
        method.create_weights(layer, 64, 32, input_scale=True)
        layer.load_state_dict(good | {name: torch.tensor(bad)})
        with pytest.raises(ValueError, match=f"{name} is .* needs a positive finite multiplier"):
            method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match="input_scale=True belongs to NVFP4"):
        mq.Nvfp4LinearMethod().create_weights(nn.Module(), 64, 32, input_scale=True)


def test_offline_static_input_scale_is_used():
    method, layer = mq.Nvfp4LinearMethod("nvfp4_w4a4"), nn.Module()
    want = mq.MxLinear.from_quantized(
        mk.quantize(torch.randn(32, 64).bfloat16(), mk.NVFP4), None, mk.NVFP4, input_scale=torch.tensor(0.5)
    )
    method.create_weights(layer, 64, 32, input_scale=True)
    layer.load_state_dict(want.state_dict())
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(method.apply(layer, x), want(x))
