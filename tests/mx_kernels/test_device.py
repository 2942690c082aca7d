"""The device table: every architecture by name, what it multiplies in hardware, probing the device that is here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mx_kernels import ARCHITECTURES, FORMATS, Device
from mx_kernels.device import _probe, family, triton_version

NATIVE = {
    ("mxfp8_e4m3", "mxfp8_e4m3"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("mxfp8_e5m2", "mxfp6_e2m3"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("mxfp8_e4m3", "mxfp4"): {"sm100", "sm103", "gfx950", "gfx1250"},
    ("mxfp4", "mxfp8_e4m3"): {"sm100", "sm103", "gfx950", "gfx1250"},
    ("mxfp4", "mxfp4"): {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"},
    ("nvfp4", "nvfp4"): {"sm100", "sm103", "sm120", "sm121", "gfx1250"},
    ("bfloat16", "mxfp4"): set(),
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
    first = {"sm121": "3.8.0", "gfx1250": "3.8.0"}
    assert device.triton == (None if name == "cpu" else first.get(name, "3.6.0"))
    assert device.compiles == (name != "cpu")
    assert Device.fake(name, triton=None).triton is None
    for pair, where in NATIVE.items():
        assert device.native(*pair) == (name in where)
        assert set(device.native_elsewhere(*pair)) == where


@pytest.mark.parametrize(
    ("name", "triton", "compiles", "mx", "nvfp4"),
    [
        ("sm100", "3.6.0", True, True, True),
        ("sm100", "3.5.1+git17", False, False, False),
        ("sm100", None, False, True, True),
        ("sm121", "3.6.0", True, False, False),
        ("sm121", "3.7.1+rocm7", True, False, False),
        ("sm121", "3.8", True, True, True),
        ("gfx1250", "3.6.0", False, False, False),
        ("gfx1250", "3.7.1", True, False, False),
        ("gfx1250", "3.10.0", True, True, True),
    ],
)
def test_an_older_triton_makes_less(name, triton, compiles, mx, nvfp4):
    """Without Triton ``native`` says what the hardware has."""
    device = Device.fake(name, triton)
    assert device.compiles == compiles
    assert device.native("mxfp8_e4m3", "mxfp8_e4m3") == mx
    assert device.native("nvfp4", "nvfp4") == nvfp4


def test_facts_that_kernels_rely_on():
    assert [a.name for a in ARCHITECTURES.values() if not a.bf16] == ["sm75"]
    assert {a.vendor for a in ARCHITECTURES.values()} == {"cpu", "nvidia", "amd", "intel"}


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
    with pytest.raises(ValueError, match="device is meta, needs one that holds data"):
        Device.probe("meta")


@pytest.mark.parametrize(
    ("name", "capability", "bf16"),
    [
        ("sm70", (7, 0), False),
        ("sm87", (8, 7), True),
        ("sm110", (11, 0), True),
        ("gfx803", (8, 0), False),
        ("gfx908", (9, 0), True),
        ("gfx1030", (10, 3), True),
    ],
)
def test_a_gpu_that_is_not_in_the_table(accelerator, name, capability, bf16):
    """It runs what needs no block-scaled instruction, and says that it is unknown."""
    accelerator(name, capability)
    device = Device.probe("cuda:0")
    assert str(device) == device.arch.name == name
    assert device.name == f"Some GPU ({name} is not in the table)"
    assert (device.type, device.arch.vendor) == ("cuda", "amd" if name.startswith("gfx") else "nvidia")
    assert device.arch.bf16 == bf16
    assert device.arch.native == frozenset()
    assert (device.triton, device.units, device.memory) == (triton_version(), 16, 1 << 30)
    assert name not in ARCHITECTURES
    with pytest.raises(ValueError, match=f"unknown architecture '{name}'"):
        Device.fake(name)


@pytest.mark.parametrize(("name", "capability"), [("sm90", (9, 0)), ("gfx950", (9, 5))])
def test_a_gpu_that_is_in_the_table(accelerator, name, capability):
    accelerator(name, capability)
    device = Device.probe("cuda:0")
    assert device.arch is ARCHITECTURES[name]
    assert device.name == "Some GPU"


@pytest.fixture
def accelerator(monkeypatch):
    """A function that makes torch report a GPU of this name and compute capability."""

    def install(name: str, capability: tuple[int, int]) -> None:
        hip = name.startswith("gfx")
        facts = SimpleNamespace(
            name="Some GPU", major=capability[0], minor=capability[1], multi_processor_count=16, total_memory=1 << 30
        )
        if hip:
            facts.gcnArchName = f"{name}:sramecc+:xnack-"
        monkeypatch.setattr(torch.version, "hip", "6.4" if hip else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        _probe.cache_clear()

    yield install
    _probe.cache_clear()


@pytest.mark.parametrize("kind", ["mps", "privateuseone"])
def test_a_device_without_triton(kind):
    device = Device.probe(kind)
    assert (device.type, device.arch.name, device.name, device.triton) == (kind, kind, kind, None)
    assert str(device) == kind
    assert not device.native("mxfp8_e4m3", "mxfp8_e4m3")


def test_the_current_accelerator_is_probed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert Device.probe() == Device.probe("mps")


def test_unknown_architecture():
    with pytest.raises(ValueError, match="unknown architecture 'sm89a'; there are cpu, sm75"):
        Device.fake("sm89a")


@pytest.mark.compile
def test_advice_where_products_wait(monkeypatch):
    assert Device.probe("cpu").advice is None
    assert Device.fake("sm90").advice is None  # it is not here
    launch = pytest.importorskip("mx_kernels.kernels.launch", exc_type=ImportError)
    here = replace(Device.fake("sm90"), units=132)
    monkeypatch.setattr(launch, "takes_registers", lambda: True)
    assert "TRITON_PTXAS_PATH" in here.advice
    assert replace(Device.fake("sm100"), units=148).advice is None
    monkeypatch.setattr(launch, "takes_registers", lambda: False)
    assert here.advice is None


@pytest.mark.compile
def test_triton_version_is_that_of_the_import():
    triton = pytest.importorskip("triton")
    assert triton_version() == triton.__version__


@pytest.mark.gpu
def test_probe_the_accelerator():
    device = Device.probe()
    assert device.type in ("cuda", "xpu")
    assert device.memory > 0
    assert device == Device.probe(f"{device.type}:0")
