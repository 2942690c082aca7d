"""Element codes: every code, every midpoint and its float32 neighbours, golden vectors, ml_dtypes; E8M0 bytes; packing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mx_kernels import FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, reference
from mx_kernels.formats import E2M1, E2M3, E3M2, E4M3, E5M2

ELEMENTS = (E4M3, E5M2, E3M2, E2M3, E2M1)
elements = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)


def floats(hexes):
    return torch.tensor([int(h, 16) for h in hexes]).to(torch.int32).view(torch.float32)


def same_bits(a, b):
    """Equal float32 bits; any NaN equals any NaN."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def codes_of(element):
    return torch.arange(1 << element.bits).to(torch.uint8)


def finite_magnitudes(element):
    """Values of codes 0..max_code, ascending."""
    return reference.decode(codes_of(element)[: element.max_code + 1], element)


@elements
def test_golden(element, golden):
    want = json.loads((golden / "elements.json").read_text())[element.name]
    assert same_bits(reference.decode(codes_of(element), element), floats(want["decode_f32_bits"]))
    probes = floats(want["probe_in_f32_bits"])
    assert torch.equal(reference.encode(probes, element), torch.tensor(want["probe_code"], dtype=torch.uint8))


@elements
def test_facts_of_the_table_agree_with_the_codes(element):
    values = finite_magnitudes(element)
    assert values[-1] == element.max
    assert bool((values.diff() > 0).all())
    assert math.floor(math.log2(element.max)) == element.emax
    assert values[1] == 2.0 ** (1 - element.bias - element.mantissa)


@elements
def test_encode_inverts_decode(element):
    codes = codes_of(element)
    values = reference.decode(codes, element)
    finite = values.isfinite()
    assert torch.equal(reference.encode(values[finite], element), codes[finite])


@elements
def test_midpoints_and_their_neighbours(element):
    values = finite_magnitudes(element)
    middle = (values[1:] + values[:-1]) / 2  # exact in float32
    low = torch.arange(element.max_code, dtype=torch.int32)
    even = low + low % 2
    bits = middle.view(torch.int32)
    for delta, want in ((-1, low), (0, even), (1, low + 1)):
        x = (bits + delta).view(torch.float32)
        assert torch.equal(reference.encode(x, element).int(), want)
        assert torch.equal(reference.encode(-x, element).int(), want + (1 << (element.bits - 1)))


@elements
def test_out_of_range_and_special_values(element):
    top, sign = element.max_code, 1 << (element.bits - 1)
    beyond = torch.tensor([element.max, element.max * 1.5, 3.4e38, math.inf])
    assert reference.encode(beyond, element).tolist() == [top] * 4
    assert reference.encode(-beyond, element).tolist() == [top | sign] * 4
    assert reference.encode(torch.tensor([0.0, -0.0, 1e-45, -1e-45]), element).tolist() == [0, sign, 0, sign]
    nan = int(reference.encode(torch.tensor(math.nan), element))
    assert nan == (0x7F if element.bits == 8 else top)


@elements
def test_encode_finds_the_nearest_code_of_every_bf16_number(element):
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double()
    values = finite_magnitudes(element).double()
    upper = torch.searchsorted(values, x).clamp(max=element.max_code)
    lower = (upper - 1).clamp(min=0)
    below, above = (x - values[lower]).abs(), (values[upper] - x).abs()
    nearest = torch.where(below < above, lower, torch.where(above < below, upper, lower + lower % 2))
    nearest = torch.where(x >= element.max, element.max_code, nearest)
    assert torch.equal(reference.encode(x.float(), element).long(), nearest)


@elements
def test_ml_dtypes(element):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    name = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn"}
    dtype = getattr(ml_dtypes, name.get(element.name, "float4_e2m1fn"))
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    want = torch.from_numpy(codes.view(dtype).astype(np.float32))
    assert same_bits(reference.decode(torch.from_numpy(codes), element), want)
    x = torch.randn(20000).mul(element.max / 3).clamp(-element.max, element.max)
    want = torch.from_numpy(x.numpy().astype(dtype).view(np.uint8).copy())
    assert torch.equal(reference.encode(x, element), want)


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda e: e.name)
def test_fp8_is_torch_after_a_clamp(element):
    x = torch.cat((torch.randn(100000), torch.randn(100000) * element.max, torch.randn(10000) * 1e-4))
    want = x.clamp(-element.max, element.max).to(element.dtype).view(torch.uint8)
    assert torch.equal(reference.encode(x, element), want)


def test_e8m0_bytes(golden):
    byte = torch.arange(256).to(torch.uint8)
    want = floats(json.loads((golden / "elements.json").read_text())["e8m0"]["decode_f32_bits"])
    value = reference.scale_to_float(byte)
    assert same_bits(value, want)
    assert value[0] == 2.0**-127
    assert value[127] == 1
    assert value[254] == 2.0**127
    assert value[255].isnan()
    assert same_bits(value, byte.view(torch.float8_e8m0fnu).float())
    product = value[:255] * reference.scale_to_reciprocal(byte)[:255]
    assert bool((product == 1).all())
    assert reference.scale_to_reciprocal(byte)[255].isnan()


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_packing_round_trip_of_all_codes(f):
    codes = torch.randperm(1 << f.element.bits).repeat(8)[: f.block * 8].to(torch.uint8)
    codes = torch.cat((codes, torch.randint(0, 1 << f.element.bits, (f.block * 24,)).to(torch.uint8))).view(4, -1)
    data = reference.pack_codes(codes, f)
    assert data.shape[-1] == f.data_width(codes.shape[-1])
    assert torch.equal(reference.unpack_codes(data.view(f.data_dtype), f), codes)


def test_packing_golden(golden):
    v = {k: torch.from_numpy(a) for k, a in np.load(golden / "layouts_packing.npz").items()}
    assert torch.equal(reference.pack_codes(v["fp4_codes"], MXFP4), v["fp4_packed_ct"])
    for f in (MXFP6_E2M3, MXFP6_E3M2):
        assert torch.equal(reference.pack_codes(v["fp6_codes"], f), v["fp6_e2m3_packed_ct"])
    assert torch.equal(reference.pack_codes(v["fp4_codes"], MXFP8), v["fp4_codes"])


@given(st.lists(st.integers(0, 63), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_fp6_bytes_are_little_endian(v):
    data = reference.pack_codes(torch.tensor(v, dtype=torch.uint8), MXFP6_E2M3).tolist()
    assert int.from_bytes(bytes(data), "little") == v[0] | v[1] << 6 | v[2] << 12 | v[3] << 18


@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False), st.sampled_from(ELEMENTS))
@settings(max_examples=200, deadline=None)
def test_encode_is_monotone_and_odd(a, b, element):
    x = torch.tensor([min(a, b), max(a, b)])
    low, high = reference.decode(reference.encode(x, element), element)
    assert low <= high
    assert torch.equal(reference.encode(-x, element), reference.encode(x, element) ^ (1 << (element.bits - 1)))
