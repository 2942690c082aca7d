from __future__ import annotations

import pytest
import torch
from torch import nn

import mx_kernels as mk
from mx_quant import storage

FORMATS = list(mk.FORMATS.values())


def quantized(format, shape=(3, 8, 64)):
    return mk.quantize(torch.randn(shape).bfloat16(), format)


def same(a, b):
    x, y = storage.parts(a), storage.parts(b)
    return x.keys() == y.keys() and all(torch.equal(storage.as_bytes(x[n]), storage.as_bytes(y[n])) for n in x)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (3, 8, 64)])
def test_allocate_has_the_form_of_quantize_and_says_it_is_not_loaded(format, shape):
    new, want = storage.allocate(shape, format), quantized(format, shape)
    assert (new.shape, new.rule, new.dtype) == (want.shape, want.rule, want.dtype)
    for a, b in zip(storage.parts(new).values(), storage.parts(want).values(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.isnan(
        mk.dequantize(mk.QuantizedTensor(want.data, new.scale, format, want.rule, global_scale=want.global_scale))
    ).all()
    with pytest.raises(ValueError, match=r"w_scale is NaN in"):
        storage.check_scales("w", new)
    storage.fill(new, want)
    storage.check_scales("w", new)
    assert same(new, want)


def test_allocate_on_meta_takes_no_memory():
    new = storage.allocate((1 << 20, 1 << 20, 64), mk.NVFP4, device="meta")
    assert new.global_scale.shape == (1 << 20,)
    with pytest.raises(ValueError, match="on the meta device"):
        storage.check_scales("w", new)


def test_fill_refuses_what_does_not_fit():
    target = quantized(mk.NVFP4)
    for source, match in (
        (quantized(mk.MXFP4), "cannot copy mxfp4"),
        (quantized(mk.NVFP4, (3, 8, 32)), r"shape \(3, 8, 32\)"),
    ):
        with pytest.raises(ValueError, match=match):
            storage.fill(target, source)
    one = mk.quantize(torch.randn(3, 8, 64), mk.NVFP4, global_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"global scale of shape \(\) into one of shape \(3,\)"):
        storage.fill(target, one)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_attach_and_attached(format):
    layer, q = nn.Module(), quantized(format)
    layer.register_parameter("w", nn.Parameter(torch.zeros(2)))
    layer.w_scale = 3
    storage.attach(layer, "w", q)
    assert set(layer.state_dict()) == {"w", "w_scale"} | ({"w_global_scale"} if format.has_global_scale else set())
    back = storage.attached(layer, "w", format, q.rule, q.dtype)
    assert back.data is q.data
    assert same(back, q)
    storage.detach(layer, "w")
    storage.detach(layer, "never_there")
    assert not hasattr(layer, "w")
    layer.w = q.data.to(torch.float32)
    with pytest.raises(TypeError, match="needs"):
        storage.attached(layer, "w", format, q.rule, q.dtype)


def test_check_positive_names_the_index():
    storage.check_positive("g", torch.tensor([1.0, 2.0]))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"g is .* at index 1, needs a positive finite multiplier"):
            storage.check_positive("g", torch.tensor([1.0, bad]))
