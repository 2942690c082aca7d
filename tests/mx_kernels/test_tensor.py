"""QuantizedTensor: what it accepts, selects, moves and refuses."""

from __future__ import annotations

import pytest
import torch

from mx_kernels import FORMATS, MXFP4, MXFP6_E2M3, MXFP8, NVFP4, QuantizedTensor, quantize


def make(f, *shape, g=None):
    lead, k = shape[:-1], shape[-1]
    data = torch.zeros(*lead, f.data_width(k), dtype=torch.uint8).view(f.data_dtype)
    scale = torch.zeros(*lead, k // f.block, dtype=torch.uint8).view(f.scale_dtype)
    if f.has_global_scale and g is None:
        g = torch.ones(())
    return QuantizedTensor(data, scale, f, f.default_rule, global_scale=g)


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_facts(f):
    q = make(f, 3, 5, 64)
    assert q.shape == (3, 5, 64)
    assert q.ndim == 3
    assert q.device.type == "cpu"
    assert q.nbytes == 3 * 5 * (64 * f.element.bits // 8 + 64 // f.block) + (4 if f.has_global_scale else 0)
    assert q.nbytes == pytest.approx(3 * 5 * 64 * f.bits_per_element / 8, abs=4)
    assert f.name in repr(q)
    assert "(3, 5, 64)" in repr(q)
    assert q.to("meta").data.device.type == "meta"
    assert q.to("meta").shape == q.shape
    assert q.map(torch.clone).data.data_ptr() != q.data.data_ptr()


def test_names_are_resolved():
    q = make(MXFP8, 2, 32)
    named = QuantizedTensor(q.data, q.scale, "mxfp8", "floor")
    assert named.format is MXFP8
    assert named.rule.name == "FLOOR"


def test_selection():
    q = quantize(torch.randn(4, 6, 64), NVFP4)
    one = q[2]
    assert one.shape == (6, 64)
    assert one.global_scale == q.global_scale[2]
    assert torch.equal(one.data, q.data[2])
    assert torch.equal(one[1:3].data, q.data[2, 1:3])
    assert one[1:3].global_scale.shape == ()
    some = q[torch.tensor([3, 0])]
    assert torch.equal(some.global_scale, q.global_scale[[3, 0]])
    assert torch.equal(some.data, q.data[[3, 0]])
    assert q[1:1].shape == (0, 6, 64)
    with pytest.raises(IndexError, match=r"shape \(64,\) has no leading dimension"):
        q[0][0][0]


def test_wrong_dtypes():
    q = make(MXFP8, 2, 32)
    with pytest.raises(TypeError, match=r"data of mxfp8_e4m3 is torch\.uint8, needs torch\.float8_e4m3fn: use \.view"):
        QuantizedTensor(q.data.view(torch.uint8), q.scale, MXFP8, "floor")
    with pytest.raises(TypeError, match=r"scale of mxfp8_e4m3 is torch\.int8, needs torch\.uint8"):
        QuantizedTensor(q.data, q.scale.view(torch.int8), MXFP8, "floor")
    with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
        QuantizedTensor(q.data, q.scale, MXFP8, "floor", torch.float64)
    n = make(NVFP4, 2, 32)
    with pytest.raises(TypeError, match=r"global_scale is torch\.float64, needs float32"):
        QuantizedTensor(n.data, n.scale, NVFP4, "amax", global_scale=torch.ones((), dtype=torch.float64))


def test_wrong_shapes():
    for f in (MXFP8, MXFP6_E2M3, MXFP4):
        q = make(f, 2, 64)
        for data in (q.data[:1], q.data[..., 1:], q.data[None]):
            with pytest.raises(ValueError, match=rf"data of {f} has shape .* needs data of shape"):
                QuantizedTensor(data, q.scale, f, "floor")
    with pytest.raises(ValueError, match="at least one dimension"):
        QuantizedTensor(torch.zeros((), dtype=torch.uint8), torch.zeros((), dtype=torch.uint8), MXFP4, "floor")
    with pytest.raises(ValueError, match="data is on meta and scale on cpu"):
        QuantizedTensor(make(MXFP4, 2, 32).data.to("meta"), make(MXFP4, 2, 32).scale, MXFP4, "floor")
    with pytest.raises(ValueError, match="nvfp4 has no scale rule 'floor'"):
        QuantizedTensor(make(NVFP4, 2, 32).data, make(NVFP4, 2, 32).scale, NVFP4, "floor")


def test_global_scales():
    for shape in ((), (3,), (3, 4)):
        assert make(NVFP4, 3, 4, 5, 32, g=torch.ones(shape)).global_scale.shape == shape
    for shape in ((4,), (3, 5), (3, 4, 5)):
        with pytest.raises(ValueError, match=r"needs \[\] or a prefix of the leading dimensions \(3, 4\)"):
            make(NVFP4, 3, 4, 5, 32, g=torch.ones(shape))
    n = make(NVFP4, 2, 32)
    with pytest.raises(ValueError, match="nvfp4 needs a global_scale"):
        QuantizedTensor(n.data, n.scale, NVFP4, "amax")
    with pytest.raises(ValueError, match="mxfp4 has no global scale"):
        make(MXFP4, 2, 32, g=torch.ones(()))
    with pytest.raises(ValueError, match="global_scale is on meta and data on cpu"):
        make(NVFP4, 2, 32, g=torch.ones((), device="meta"))
