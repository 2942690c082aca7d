"""The table of formats: facts that follow from bits, names, rules, widths, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from mx_kernels import FORMATS, MXFP4, MXFP6_E2M3, MXFP8, NVFP4, Format, ScaleRule, get_format, quantize
from mx_kernels.formats import E2M1, E2M3, E3M2, E4M3, E5M2

formats = pytest.mark.parametrize("f", FORMATS.values(), ids=str)


@pytest.mark.parametrize("e", [E4M3, E5M2, E3M2, E2M3, E2M1], ids=lambda e: e.name)
def test_elements_follow_from_their_bits(e):
    assert e.bits == {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}[e.name]
    assert e.name == f"e{e.exponent}m{e.mantissa}"
    field, fraction = e.max_code >> e.mantissa, e.max_code & ((1 << e.mantissa) - 1)
    assert e.max == math.ldexp(1 + fraction / (1 << e.mantissa), field - e.bias)
    assert 2**e.emax <= e.max < 2 ** (e.emax + 1)
    if e.dtype is not None:
        assert torch.finfo(e.dtype).max == e.max
        assert torch.tensor(e.max_code, dtype=torch.uint8).view(e.dtype).float() == e.max


@formats
def test_rows(f):
    assert FORMATS[f.name] is f
    assert get_format(f.name) is f
    assert get_format(f) is f
    assert str(f) == f.name
    assert f.default_rule == f.rules[0]
    assert len(set(f.rules)) == len(f.rules)
    assert f.data_dtype == (f.element.dtype or torch.uint8)
    assert f.data_width(f.block) * 8 == f.block * f.element.bits
    assert f.bits_per_element == f.element.bits + 8 / f.block
    assert f.has_global_scale == (f.scale == "e4m3")
    assert f.scale_dtype == (torch.uint8 if f.scale == "e8m0" else torch.float8_e4m3fn)


def test_defaults_and_sizes():
    assert {f.name: f.default_rule.value for f in FORMATS.values()} == {
        "mxfp8_e4m3": "rceil",
        "mxfp8_e5m2": "rceil",
        "mxfp6_e2m3": "even",
        "mxfp6_e3m2": "even",
        "mxfp4": "even",
        "nvfp4": "amax",
    }
    assert [f.bits_per_element for f in FORMATS.values()] == [8.25, 8.25, 6.25, 6.25, 4.25, 4.5]
    assert [f.data_width(96) for f in FORMATS.values()] == [96, 96, 72, 72, 48, 48]


def test_names():
    assert get_format("mxfp8") is MXFP8
    assert get_format("mxfp6") is MXFP6_E2M3
    with pytest.raises(ValueError, match=r"unknown format 'fp4'; there are mxfp8_e4m3, .*nvfp4, mxfp8, mxfp6"):
        get_format("fp4")


@formats
def test_check_rule(f):
    assert f.check_rule(None) is f.rules[0]
    for rule in ScaleRule:
        if rule in f.rules:
            assert f.check_rule(rule.value) is f.check_rule(rule) is rule
        else:
            with pytest.raises(
                ValueError, match=f"{f.name} has no scale rule '{rule.value}'; it has {f.rules[0].value}"
            ):
                f.check_rule(rule)
    with pytest.raises(ValueError, match=f"unknown scale rule 'best'; {f.name} has"):
        f.check_rule("best")


@formats
def test_check_k(f):
    f.check_k(f.block)
    f.check_k(f.block * 7)
    for k in (0, -f.block, f.block - 1, f.block + 1):
        with pytest.raises(
            ValueError, match=f"w2 is {k}, but {f.name} needs a positive multiple of its block length {f.block}"
        ):
            f.check_k(k, "w2")
    with pytest.raises(ValueError, match=f"pad K to {2 * f.block} with zeros"):
        f.check_k(f.block + 1)


def test_a_format_is_a_value():
    same = Format("mxfp4", E2M1, 32, "e8m0", MXFP4.rules)
    assert same == MXFP4
    assert hash(same) == hash(MXFP4)
    assert same != NVFP4
    with pytest.raises(AttributeError):
        same.block = 16


@formats
def test_a_copy_of_a_row_is_the_row(f):
    """Tensors and modules are copied and pickled, and code compares formats and elements by identity."""
    assert copy.copy(f) is copy.deepcopy(f) is pickle.loads(pickle.dumps(f)) is f
    q = quantize(torch.randn(2, 64), f)
    other = copy.deepcopy(q)
    assert other.format is f
    assert torch.equal(other.data.view(torch.uint8), q.data.view(torch.uint8))
    own = Format("own", f.element, 64, f.scale, f.rules)  # of no table: a copy is equal
    assert pickle.loads(pickle.dumps(own)) == copy.deepcopy(own) == own
