"""Activation and Epilogue as data: what is accepted, and each refusal."""

from __future__ import annotations

import math

import pytest
import torch

from mx_kernels import MXFP8, NVFP4, Activation, Epilogue, ScaleRule
from mx_kernels.epilogue import KINDS, LAYOUTS

SILU = Activation("silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gated(kind, layout):
    more = {"alpha": 1.702, "beta": 1.0} if kind == "swiglu_oai" else {}
    a = Activation(kind, layout, limit=7.0, **more)
    assert a.out_features(10) == 5
    assert a == Activation(kind, layout, limit=7.0, **more)
    with pytest.raises(ValueError, match="odd width of 9"):
        a.out_features(9)


def test_not_gated():
    assert Activation("relu2", gated=False).out_features(9) == 9
    assert Activation("silu", "concatenated", True, None, None, None) == SILU


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "swish"}, "unknown activation 'swish'; there are silu, swiglu_oai"),
        ({"kind": "silu", "layout": "split"}, "unknown activation layout 'split'; there are concatenated, interleaved"),
        ({"kind": "swiglu_oai"}, "swiglu_oai needs alpha and beta"),
        ({"kind": "swiglu_oai", "alpha": 1.702}, "swiglu_oai needs alpha and beta"),
        ({"kind": "swiglu_oai", "beta": 1.0}, "swiglu_oai needs alpha and beta"),
        ({"kind": "swiglu_oai", "alpha": 1.0, "beta": 1.0, "gated": False}, "gated=False has no meaning"),
        ({"kind": "silu", "alpha": 1.0}, "alpha and beta belong to swiglu_oai; silu has none"),
        ({"kind": "gelu", "beta": 0.0}, "alpha and beta belong to swiglu_oai; gelu has none"),
        ({"kind": "silu", "limit": 0.0}, "limit is 0.0, needs a positive number"),
        ({"kind": "silu", "limit": -1.0}, "limit is -1.0, needs a positive number"),
        ({"kind": "silu", "limit": math.inf}, "limit is inf, needs a finite number"),
        ({"kind": "swiglu_oai", "alpha": math.nan, "beta": 1.0}, "alpha is nan, needs a finite number"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Activation(**arguments)


def test_epilogue_is_data():
    empty = Epilogue()
    assert (empty.bias, empty.activation, empty.row_weight, empty.requantize_to, empty.rule) == (None,) * 5
    e = Epilogue(torch.ones(4), SILU, requantize_to=MXFP8, rule=ScaleRule.FLOOR)
    assert e.activation is SILU
    with pytest.raises(AttributeError):
        e.rule = None


def test_rounding_is_one_of_two_and_needs_no_global_scale():
    assert Epilogue(round_to=MXFP8, rule=ScaleRule.FLOOR).round_to is MXFP8
    with pytest.raises(ValueError, match="codes or values"):
        Epilogue(requantize_to=MXFP8, round_to=MXFP8)
    with pytest.raises(ValueError, match="round it with quantize_dequantize"):
        Epilogue(round_to=NVFP4)
    with pytest.raises(TypeError, match="round_to is a str"):
        Epilogue(round_to="mxfp8")
