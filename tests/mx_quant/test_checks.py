from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_quant import checks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite_names_tensor_and_first_index(dtype, bad):
    x = torch.randn(3, 4, 32).to(dtype)
    checks.check_finite("w", x)
    x[1, 2, 5] = bad
    x[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer\.w is not finite: 2 of 384 .* index \(1, 2, 5\)"):
        checks.check_finite("layer.w", x)


def test_check_finite_accepts_empty_strided_and_extreme():
    checks.check_finite("w", torch.empty(0, 32))
    checks.check_finite("w", torch.full((2, 32), torch.finfo(torch.float32).max))
    x = torch.randn(4, 6)
    x[2, 1] = math.inf
    with pytest.raises(ValueError, match=r"index \(1, 2\)"):
        checks.check_finite("w", x.T)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_check_dtype_says_when_already_quantized(dtype):
    with pytest.raises(TypeError, match=r"w is .* needs bfloat16, float16 or float32.*quantized already"):
        checks.check_dtype("w", torch.zeros(2, 32).to(dtype))
    with pytest.raises(TypeError, match="convert it first"):
        checks.check_dtype("w", torch.zeros(2, 32, dtype=torch.float64))


def test_check_matrix():
    with pytest.raises(ValueError, match=r"K of w .* is 33, but mxfp4"):
        checks.check_matrix("w", torch.zeros(2, 33), mk.MXFP4)
    with pytest.raises(ValueError, match="needs at least two dimensions"):
        checks.check_matrix("w", torch.zeros(32), mk.MXFP4)
    with pytest.raises(ValueError, match="meta device"):
        checks.check_matrix("w", torch.zeros(2, 32, device="meta"), mk.MXFP4)


def test_joint_global_scale():
    a, b = torch.randn(4, 16).bfloat16(), 3 * torch.randn(2, 16).bfloat16()
    g = checks.joint_global_scale([("a", a), ("b", b)])
    assert g.shape == ()
    assert g.dtype == torch.float32
    assert g == torch.cat((a, b)).float().abs().max() / 2688
    assert checks.joint_global_scale([("zero", torch.zeros(2, 16))]) == 1
    with pytest.raises(ValueError, match="at least one"):
        checks.joint_global_scale([])
    b[1, 3] = math.nan
    with pytest.raises(ValueError, match=r"b is not finite.*\(1, 3\)"):
        checks.joint_global_scale([("a", a), ("b", b)])


@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_quantize_finite_equals_quantize(format):
    x = torch.randn(6, 64).bfloat16()
    for source in (x, x.T.contiguous().T):
        q, want = checks.quantize_finite("w", source, format), mk.quantize(x, format)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))


@pytest.mark.parametrize(("format", "rule"), [(f, r) for f in mk.FORMATS.values() for r in f.rules], ids=str)
def test_quantize_finite_accepts_the_largest_numbers(format, rule):
    x = torch.full((2, 64), torch.finfo(torch.float32).max)
    assert checks.quantize_finite("w", x, format, rule=rule).shape == x.shape


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(mk.FORMATS)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    at=st.integers(0, 5 * 64 - 1),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    given_scale=st.booleans(),
)
def test_quantize_finite_refuses_any_nonfinite_value(name, dtype, at, bad, given_scale):
    format = mk.get_format(name)
    x = torch.ones(5, 64, dtype=dtype)
    x.view(-1)[at] = bad
    g = torch.tensor(0.5) if given_scale and format.has_global_scale else None
    with pytest.raises(ValueError, match=rf"up\.w is not finite.*\({at // 64}, {at % 64}\)"):
        checks.quantize_finite("up.w", x, format, global_scale=g)
