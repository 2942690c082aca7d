from __future__ import annotations

import json

import pytest
import torch

import mx_kernels as mk
import mx_quant as mq


@pytest.mark.parametrize(("name", "scheme"), mq.SCHEMES.items())
def test_rows(name, scheme):
    """A row's name says its bits, and every way of asking for it gives the same scheme."""
    bits = name.rsplit("_", 1)[-1]
    assert scheme.name.endswith(bits)
    w, _, a = bits[1:].partition("a")
    assert scheme.weight.element.bits == int(w)
    assert (16 if scheme.activation is None else scheme.activation.element.bits) == int(a)
    assert scheme.rule == scheme.weight.default_rule
    assert mq.get_scheme(name) == mq.get_scheme(name.upper()) == mq.get_scheme(scheme) == scheme
    assert name.startswith("nvfp4") == (scheme.weight is mk.NVFP4)


@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_get_scheme_of_a_format_leaves_activations(format):
    want = mq.Scheme(format, None, format.default_rule)
    assert mq.get_scheme(format) == mq.get_scheme(format.name) == want
    assert mq.get_scheme(format, rule="search").rule is mk.ScaleRule.SEARCH


def test_get_scheme_keeps_the_activation_with_another_rule():
    assert mq.get_scheme("w4a8", rule="floor") == mq.Scheme(mk.MXFP4, mk.MXFP8, mk.ScaleRule.FLOOR)


def test_bad_names():
    with pytest.raises(ValueError, match=r"unknown scheme or format 'w3a3'; there are w8a16, .*mxfp4"):
        mq.get_scheme("w3a3")
    with pytest.raises(ValueError, match="no scale rule 'amax'"):
        mq.get_scheme("w4a16", rule="amax")
    with pytest.raises(ValueError, match="no scale rule 'rceil'"):
        mq.Scheme(mk.NVFP4, rule="rceil")
    with pytest.raises(ValueError, match="unknown format"):
        mq.Scheme(mk.MXFP4, "int8")
    with pytest.raises(TypeError, match="needs a Scheme, a Format or a name"):
        mq.get_scheme(4)


def test_to_dict_is_json():
    d = json.loads(json.dumps(mq.W4A8.to_dict()))
    assert d == {"name": "mxfp4_w4a8", "weight": "mxfp4", "activation": "mxfp8_e4m3", "rule": "even"}
    assert str(mq.NVFP4_W4A4) == "nvfp4_w4a4"


def test_quantize_input_leaves_or_quantizes():
    x = torch.randn(3, 64).bfloat16()
    assert mq.W4A16.quantize_input(x) is x
    q = mq.W8A8.quantize_input(x)
    want = mk.quantize(x, mk.MXFP8)
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(q.scale, want.scale)


def test_quantize_input_nvfp4_has_one_global_scale_whatever_the_shape():
    x = torch.randn(2, 3, 64).bfloat16()
    q, flat = mq.NVFP4_W4A4.quantize_input(x), mq.NVFP4_W4A4.quantize_input(x.flatten(0, 1))
    assert q.global_scale.shape == ()
    assert q.global_scale == flat.global_scale == x.float().abs().max() / 2688
    assert torch.equal(q.data.flatten(0, 1), flat.data)
    zero = mq.NVFP4_W4A4.quantize_input(torch.zeros(2, 3, 64))
    assert zero.global_scale == 1
    given = mq.NVFP4_W4A4.quantize_input(x, torch.tensor(0.25))
    assert given.global_scale == 0.25
