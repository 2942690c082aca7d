"""pack and unpack are inverses, bit for bit; the packed words decode to the weight; what cannot be held is refused."""

from __future__ import annotations

import math

import pytest
import torch

import mx_kernels as mk
from mx_kernels import packing

GATES = [(False, "concatenated"), (True, "concatenated"), (True, "interleaved")]
SHAPES = [(2, 48, 96), (1, 96, 2880), (3, 40, 768), (2, 80, 160), (2, 64, 64), (64, 32)]


def random_bytes(shape: tuple[int, ...], f: mk.Format) -> mk.QuantizedTensor:
    """Every finite code and many scales, zero scales among them."""
    *lead, n, k = shape
    codes = torch.randint(0, 256, (*lead, n, f.data_width(k)), dtype=torch.uint8)
    if f.element.dtype is not None:
        codes[(codes & 0x7F) >= (0x7F if f.element.mantissa == 3 else 0x7C)] = 0x55
    if f.scale == "e8m0":
        scale = torch.randint(20, 128, (*lead, n, k // f.block), dtype=torch.uint8)
        return mk.QuantizedTensor(codes.view(f.data_dtype), scale, f, f.default_rule)
    scale = torch.randint(1, 0x7F, (*lead, n, k // f.block), dtype=torch.uint8).view(torch.float8_e4m3fn)
    g = torch.ldexp(torch.ones(lead), torch.randint(-8, 8, lead))  # a power of two, so that products with it are exact
    return mk.QuantizedTensor(codes, scale, f, f.default_rule, global_scale=g)


def assert_same(a: mk.QuantizedTensor, b: mk.QuantizedTensor) -> None:
    assert a.shape == b.shape
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
    assert (a.format, a.rule, a.dtype) == (b.format, b.rule, b.dtype)
    assert a.global_scale is None or torch.equal(a.global_scale, b.global_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("f", mk.FORMATS.values(), ids=str)
def test_unpack_is_the_inverse(f, shape):
    q = random_bytes(shape, f)
    for gated, layout in GATES:
        p = mk.pack(q, gated=gated, layout=layout)
        assert_same(p.unpack(), q)
        assert p.shape == q.shape
        assert p.ndim == len(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_weights(dtype):
    w = torch.randn(2, 56, 100).to(dtype)
    for gated, layout in GATES:
        assert torch.equal(mk.pack(w, gated=gated, layout=layout).unpack(), w)


def test_plain_weight_that_fits_is_not_copied():
    w = torch.randn(2, 64, 128).bfloat16()
    assert mk.pack(w).data.data_ptr() == w.data_ptr()


def decode_fragments(p: mk.PackedWeight) -> torch.Tensor:
    """[E, 16 * strips, K] by the steps of the kernel's PTX, thread by thread, as float64 without alpha."""
    experts, tiles, strips, _ = p.data.shape
    words = p.data.view(torch.int32).view(experts, tiles, strips, 8, 4, -1).long() & 0xFFFFFFFF

    def rotate(x, r):
        return ((x >> r) | (x << (32 - r))) & 0xFFFFFFFF

    def pair(x):  # two bf16 of a register
        half = torch.stack((x & 0xFFFF, x >> 16), -1).to(torch.int32)
        return (half << 16).view(torch.float32).double()

    if p.element == "e2m1":
        fourth = (rotate(words, 2) & 0x81808180) | ((words << 6) & 0x00400040)
        regs = [words & 0x81C081C0, rotate(words, 6) & 0x81C081C0, rotate(words, 12) & 0x81C081C0, fourth]
        rows = torch.stack([torch.stack((pair(regs[i]), pair(regs[i + 1])), -2) for i in (0, 2)], -3)
        v = rows  # e, tile, strip, g, c, step, k half, row half, parity
        out = v.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(experts, strips * 16, tiles * 64)
    else:
        if p.element == "e4m3":
            turned = (words >> 4) | (words << 28)
            regs = [words & 0x87F087F0, (turned & 0x87808780) | ((words << 4) & 0x00700070)]
        else:
            low = (words << 8) & 0xFFFFFFFF
            regs = [(x & 0x80008000) | ((x >> 3) & 0x0FE00FE0) for x in (words, low)]
        v = torch.stack((pair(regs[0]), pair(regs[1])), -2)  # e, tile, strip, g, c, (step, k half), row half, parity
        v = v.unflatten(5, (2, 2))
        out = v.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(experts, strips * 16, tiles * 32)
    return out


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2"])
def test_fragments_decode_to_the_weight(name):
    f = mk.get_format(name)
    q = random_bytes((2, 32, 256), f)
    p = mk.pack(q)
    stored = p.scale.transpose(1, 2)[:, :32].flatten(2).long()
    if f.scale == "e8m0":
        scale = torch.ldexp(torch.ones(stored.shape, dtype=torch.float64), stored - 127)
    else:
        scale = ((stored * 16 + 0x7600) << 16).to(torch.int32).view(torch.float32).double()
    got = decode_fragments(p) * scale.repeat_interleave(f.block, -1)
    if p.alpha is not None:
        got *= p.alpha.double()[:, None, None]
    want = mk.dequantize(q, torch.float32).double()
    assert torch.equal(got, want)


def test_scales_past_the_window_are_shifted():
    f = mk.MXFP4
    q = mk.quantize(torch.randn(3, 16, 128), f)
    scale = q.scale.clone()
    scale[1] = 200
    scale[1, 0, 0] = 254
    scale[2] = torch.where(q.scale[2] > 0, 120, 0)
    q = mk.QuantizedTensor(q.data, scale, f, q.rule)
    p = mk.pack(q)
    assert p.shift.tolist() == [0, 126, 0]
    assert p.alpha.tolist() == [1.0, 2.0**126, 1.0]
    assert_same(p.unpack(), q)


def test_small_mxfp8_scales_are_shifted_up():
    q = mk.quantize(torch.randn(2, 16, 64), mk.MXFP8)
    scale = q.scale.clone()
    scale[1] = 1
    p = mk.pack(mk.QuantizedTensor(q.data, scale, mk.MXFP8, q.rule))
    assert p.shift.tolist() == [0, -2]
    assert p.unpack().scale.tolist() == scale.tolist()


def test_zero_blocks_need_no_shift():
    w = torch.randn(2, 16, 64)
    w[:, 3] = 0
    q = mk.quantize(w, mk.MXFP8)
    assert int(q.scale.min()) == 0
    assert mk.pack(q).shift is None


def test_scales_too_far_apart_are_refused():
    q = mk.quantize(torch.randn(2, 16, 64), mk.MXFP4)
    scale = q.scale.clone()
    scale[1, 0, 0], scale[1, 1, 0] = 254, 1
    with pytest.raises(ValueError, match="expert 1 of the mxfp4 weight has scale bytes from 1 to 254"):
        mk.pack(mk.QuantizedTensor(q.data, scale, mk.MXFP4, q.rule))


@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP8_E5M2], ids=str)
def test_codes_that_are_not_finite_are_refused(f):
    q = mk.quantize(torch.randn(2, 16, 64), f)
    data = q.data.view(torch.uint8).clone()
    data[1, 2, 3] = 0xFF
    with pytest.raises(ValueError, match=r"0xff at \[1, 2, 3\]"):
        mk.pack(mk.QuantizedTensor(data.view(f.data_dtype), q.scale, f, q.rule))


@pytest.mark.parametrize(("f", "byte"), [(mk.MXFP4, 255), (mk.NVFP4, 0x7F), (mk.NVFP4, 0x81)], ids=str)
def test_scales_that_are_no_scales_are_refused(f, byte):
    q = mk.quantize(torch.randn(2, 16, 64), f)
    scale = q.scale.view(torch.uint8).clone()
    scale[1, 2, 1] = byte
    with pytest.raises(ValueError, match=r"scale\[1, 2, 1\]"):
        mk.pack(mk.QuantizedTensor(q.data, scale.view(f.scale_dtype), f, q.rule, global_scale=q.global_scale))


def test_codes_under_a_zero_nvfp4_scale_become_zeros():
    q = random_bytes((1, 16, 64), mk.NVFP4)
    scale = q.scale.view(torch.uint8).clone()
    scale[0, 5, 1] = 0
    q = mk.QuantizedTensor(q.data, scale.view(torch.float8_e4m3fn), mk.NVFP4, q.rule, global_scale=q.global_scale)
    u = mk.pack(q).unpack()
    assert torch.equal(mk.dequantize(u), mk.dequantize(q))
    assert torch.equal(u.scale.view(torch.uint8), scale)
    assert torch.equal(u.data[0, 5, 8:16], q.data[0, 5, 8:16] & 0x88)


def test_bad_arguments():
    q = mk.quantize(torch.randn(2, 15, 64), mk.MXFP4)
    with pytest.raises(ValueError, match="15 rows"):
        mk.pack(q, gated=True)
    with pytest.raises(ValueError, match="unknown activation layout"):
        mk.pack(q, layout="zipped")
    with pytest.raises(TypeError, match="float32"):
        mk.pack(torch.randn(2, 16, 64))
    with pytest.raises(ValueError, match=r"\[E, N, K\]"):
        mk.pack(torch.randn(64).bfloat16())


def test_size_is_close_to_the_weights():
    """Packing pads rows to 16 and scales to 256 rows: less than 2% for a matrix of 2880 x 2880."""
    q = mk.quantize(torch.randn(2880, 2880), mk.MXFP4)
    assert mk.pack(q).nbytes < 1.02 * q.nbytes


def test_to_and_map():
    p = mk.pack(mk.quantize(torch.randn(2, 16, 64), mk.NVFP4))
    moved = p.to("meta")
    assert moved.data.device.type == "meta"
    assert moved.device.type == "meta"
    assert math.prod(p.shape) == 2 * 16 * 64
    assert packing.STRIP == 16
