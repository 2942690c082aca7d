"""Packing kernels write the bytes of the PyTorch version, for every format, order of rows and ragged shape."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

import mx_kernels as mk
from mx_kernels import packing

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1250")
GATES = [(False, "concatenated"), (True, "concatenated"), (True, "interleaved")]
SHAPES = [(1, 16, 32), (1, 34, 96), (9, 48, 352), (9, 200, 768), (1, 1000, 2880), (2, 272, 4128), (64, 160)]


def any_bytes(shape, f, device="cpu", seed=0):
    """Every finite code and every scale that a 16-bit weight holds; zero scales and blocks of zeros among them."""
    *lead, n, k = shape
    g = torch.Generator(device).manual_seed(seed)
    draw = lambda low, high, *size: torch.randint(low, high, size, generator=g, device=device, dtype=torch.uint8)  # noqa: E731
    codes = draw(0, 256, *lead, n, f.data_width(k))
    if f.element.dtype is not None:
        codes[(codes & 0x7F) >= (0x7F if f.element.mantissa == 3 else 0x7C)] = 0xD5
    blocks = (*lead, n, k // f.block)
    if f.scale == "e8m0":
        scale = draw(20, 128, *blocks)
        codes.unflatten(-1, (k // 32, -1))[..., 0, :] = 0
        scale[..., 0] = draw(0, 2, *blocks[:-1]) * 20  # its blocks are zeros, so that scales of 0 need no shift
        return mk.QuantizedTensor(codes.view(f.data_dtype), scale, f, f.default_rule)
    scale = draw(0, 0x7F, *blocks)
    scale[scale < 2] = 0
    return mk.QuantizedTensor(
        codes, scale.view(torch.float8_e4m3fn), f, f.default_rule, global_scale=torch.rand(lead, device=device)
    )


def by_kernels():
    """Packing as on an accelerator, whatever the device."""
    return mock.patch.object(packing, "direct", return_value=True)


def assert_packed_alike(q, gated, layout):
    with by_kernels():
        got = mk.pack(q, gated=gated, layout=layout)
    with mock.patch.object(packing, "direct", return_value=False):
        want = mk.pack(q, gated=gated, layout=layout)
    for name in ("data", "scale", "alpha", "shift"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.device == b.device
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (name, q.format, q.shape, gated, layout)
        by_torch = want.unpack()
    with by_kernels():
        by_kernel = got.unpack()
    assert torch.equal(by_kernel.data.view(torch.uint8), by_torch.data.view(torch.uint8))
    assert torch.equal(by_kernel.scale.view(torch.uint8), q.scale.view(torch.uint8))


def check_shapes(shapes, device):
    for i, shape in enumerate(shapes):
        for f in mk.FORMATS.values():
            if shape[-1] % f.block == 0:
                for gated, layout in GATES:
                    assert_packed_alike(any_bytes(shape, f, device, i), gated, layout)


def check_shift_and_errors(device):
    """Scales out of the window are shifted alike; bytes that are no numbers are named alike."""
    for f in (mk.MXFP8, mk.MXFP8_E5M2, mk.MXFP4):
        q = any_bytes((3, 16, 96), f, device)
        scale = q.scale.clamp(min=20) if f is mk.MXFP4 else q.scale.clone()  # MXFP4's window has no lower end
        scale[1] = torch.where(scale[1] > 19, scale[1] + 100, scale[1])
        scale[2] = torch.where(scale[2] > 19, scale[2] % 7, scale[2])
        assert_packed_alike(mk.QuantizedTensor(q.data, scale, f, q.rule), False, "concatenated")
        scale[1, 7, 2] = 255
        bad = mk.QuantizedTensor(q.data, scale, f, q.rule)
        with by_kernels(), pytest.raises(ValueError, match=r"scale\[1, 7, 2\]"):
            mk.pack(bad)
    for f, code in ((mk.MXFP8, 0xFF), (mk.MXFP8_E5M2, 0x7C)):
        q = any_bytes((3, 16, 96), f, device)
        data = q.data.view(torch.uint8).clone()
        data[2, 15, 95] = code
        bad = mk.QuantizedTensor(data.view(f.data_dtype), q.scale, f, q.rule)
        with by_kernels(), pytest.raises(ValueError, match=rf"{code:#x} at \[2, 15, 95\]"):
            mk.pack(bad)
    q = any_bytes((3, 16, 96), mk.NVFP4, device)
    scale = q.scale.view(torch.uint8).clone()
    scale[1, 2, 3] = 0x80
    q = mk.QuantizedTensor(q.data, scale.view(q.scale.dtype), mk.NVFP4, q.rule, global_scale=q.global_scale)
    with by_kernels(), pytest.raises(ValueError, match=r"scale\[1, 2, 3\]"):
        mk.pack(q)


INTERPRETED = """
import test_kernels_packing as t
t.check_shapes([(1, 16, 32), (2, 34, 96), (2, 40, 352)], "cpu")
t.check_shift_and_errors("cpu")
print("right")
"""


@pytest.mark.compile
def test_kernels_in_the_interpreter(interpreted):
    """All index and bit arithmetic, on the CPU, where Triton is installed."""
    interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_bytes_are_those_of_pytorch(shape):
    check_shapes([shape], "cuda")


@pytest.mark.gpu
def test_shifts_and_errors_are_those_of_pytorch():
    check_shift_and_errors("cuda")


@pytest.mark.gpu
def test_offsets_past_31_bits():
    """More than 2^32 bytes of codes: the last expert is packed as it is alone."""
    f = mk.MXFP8
    small = any_bytes((1, 4096, 4096), f, "cuda")
    experts = 2**32 // (4096 * 4096) + 2
    data = torch.empty((experts, 4096, 4096), dtype=torch.uint8, device="cuda")
    data[:] = small.data.view(torch.uint8)
    scale = small.scale.expand(experts, -1, -1).contiguous()
    p = mk.pack(mk.QuantizedTensor(data.view(f.data_dtype), scale, f, f.default_rule))
    want = mk.pack(small)
    for e in (experts // 2, experts - 1):
        assert torch.equal(p.data[e], want.data[0])
        assert torch.equal(p.scale[e], want.scale[0])


@pytest.mark.gpu
def test_a_view_that_starts_at_an_odd_byte():
    f = mk.MXFP4
    q = any_bytes((2, 64, 128), f, "cuda")
    data = torch.empty(q.data.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(q.data.shape).copy_(q.data)
    assert_packed_alike(mk.QuantizedTensor(data, q.scale, f, q.rule), True, "concatenated")


@pytest.mark.gpu
def test_little_memory_is_needed():
    q = any_bytes((8, 5760, 2880), mk.MXFP4, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p = mk.pack(q)
    assert torch.cuda.max_memory_allocated() - before < 1.02 * p.nbytes + (1 << 20)
    assert math.prod(p.shape) == math.prod(q.shape)


def compile_codes(aot, target, f, *, gated=False, unit=4):
    from mx_kernels.kernels import packing as kernels

    s, t, warps = kernels.CODES[f.element.name]
    signature = {"codes": "*i32", "scale": "*u8", "out": "*i32", "seen": "*i32"}
    sizes = ("n", "units", "blocks", "tiles", "strips")
    signature |= dict.fromkeys(sizes, "i32")
    constants = {"ELEMENT": f.element.name, "BLOCK": f.block, "UNIT": unit, "ORDER": int(gated), "S": s, "T": t}
    return aot.compile_kernel(
        kernels._pack_codes_kernel, signature, constants, target, unaligned=sizes, num_warps=warps
    )


def compile_unpack(aot, target, f):
    from mx_kernels.kernels import packing as kernels

    s, t, warps = kernels.CODES[f.element.name]
    sizes = ("n", "units", "tiles", "strips")
    signature = {"data": "*i32", "codes": "*i32"} | dict.fromkeys(sizes, "i32")
    constants = {"ELEMENT": f.element.name, "UNIT": 4, "ORDER": 1, "S": s, "T": t}
    return aot.compile_kernel(
        kernels._unpack_codes_kernel, signature, constants, target, unaligned=sizes, num_warps=warps
    )


def compile_scales(aot, target, f, *, shift=False, gated=False):
    from mx_kernels.kernels import packing as kernels

    r, t, warps = kernels.SCALES
    signature = {"scale": "*u8", "out": "*u8"} | ({"shift": "*i32"} if shift else {})
    sizes = ("n", "blocks", "tiles", "rows", "over")
    signature |= dict.fromkeys(sizes, "i32")
    per_tile = 128 // f.block
    constants = {} if shift else {"shift": None}
    constants |= {"FOLD": 126, "E8M0": f.scale == "e8m0", "ORDER": int(gated)}
    constants |= {"B": per_tile, "R": r, "T": t * 4 // per_tile}
    return aot.compile_kernel(
        kernels._pack_scales_kernel, signature, constants, target, unaligned=sizes, num_warps=warps
    )


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("f", mk.FORMATS.values(), ids=str)
def test_pack_compiles(aot, f, target):
    done = [compile_codes(aot, target, f, gated=f.element.bits == 8), compile_scales(aot, target, f, gated=True)]
    if f.scale == "e8m0":
        done.append(compile_scales(aot, target, f, shift=True))
    else:
        done.append(compile_codes(aot, target, f, unit=2))
    done.append(compile_unpack(aot, target, f))
    for compiled in done:
        assert compiled.spills == 0
        # Codes become subnormal float32 on their way; AMD's kernels must not flush them.
        assert not target.startswith("gfx") or "float_denorm_mode_32 3" in compiled.asm
        assert ".ftz" not in compiled.asm
    if target == "sm_90":
        wide = done[0].opcodes(full=True)
        assert done[0].registers <= 128
        assert any("STG.E.128" in name for name in wide)
        assert f.element.bits == 6 or any("LDG.E.128" in name for name in wide)
