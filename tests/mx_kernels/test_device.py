"""The device table: every architecture by name, what it multiplies in hardware, probing the device that is here."""

from __future__ import annotations

import pytest
import torch

from mx_kernels import ARCHITECTURES, FORMATS, Device
from mx_kernels.device import family, triton_version

NATIVE = {
    ("mxfp8_e4m3", "mxfp8_e4m3"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("mxfp8_e5m2", "mxfp6_e2m3"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("mxfp8_e4m3", "mxfp4"): {"sm100", "sm103", "gfx950", "gfx1250"},
    ("mxfp4", "mxfp4"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("nvfp4", "nvfp4"): {"sm100", "sm103", "sm120", "sm121"},
    ("bfloat16", "mxfp4"): set(),
    ("mxfp4", "mxfp8_e4m3"): set(),
    ("nvfp4", "mxfp4"): set(),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fake(name):
    device = Device.fake(name)
    assert device.arch is ARCHITECTURES[name]
    assert device.arch.name == name
    assert str(device) == name
    kind = {"nvidia": "cuda", "amd": "cuda", "intel": "xpu", "cpu": "cpu"}[device.arch.vendor]
    assert device.type == kind
    assert device.triton == (None if name == "cpu" else "3.6.0")
    assert Device.fake(name, triton=None).triton is None
    for pair, where in NATIVE.items():
        assert device.native(*pair) == (name in where)
        assert set(device.native_elsewhere(*pair)) == where


def test_facts_that_kernels_rely_on():
    for arch in ARCHITECTURES.values():
        assert arch.warp == (64 if arch.name in ("gfx90a", "gfx942", "gfx950") else 32)
        if arch.native:
            assert arch.fp8
            assert arch.fp8_dot
    assert not ARCHITECTURES["sm75"].bf16
    assert not ARCHITECTURES["sm80"].fp8


def test_families():
    assert {f.name: family(f.name) for f in FORMATS.values()} == {
        "mxfp8_e4m3": "mxfp8",
        "mxfp8_e5m2": "mxfp8",
        "mxfp6_e2m3": "mxfp8",
        "mxfp6_e3m2": "mxfp8",
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
    }
    assert family("bfloat16") == "bfloat16"


def test_probe():
    cpu = Device.probe("cpu")
    assert (cpu.type, cpu.arch.name, cpu.triton) == ("cpu", "cpu", None)
    assert cpu == Device.probe(torch.device("cpu"))
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        assert Device.probe() == cpu
    with pytest.raises(ValueError, match="device is meta, needs cpu, cuda"):
        Device.probe("meta")


def test_unknown_architecture():
    with pytest.raises(ValueError, match="unknown architecture 'sm89a'; there are cpu, sm75"):
        Device.fake("sm89a")


def test_triton_version_is_that_of_the_import():
    triton = pytest.importorskip("triton")
    assert triton_version() == triton.__version__


@pytest.mark.gpu
def test_probe_the_accelerator():
    device = Device.probe()
    assert device.type in ("cuda", "xpu")
    assert device.arch.name in ARCHITECTURES
    assert device.memory > 0
    assert device == Device.probe(f"{device.type}:0")
