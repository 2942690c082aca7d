"""Device facts: what an architecture's matrix units can do, as a table, and the device a tensor is on.

``ARCHITECTURES`` says which pairs of operand formats an architecture multiplies *in hardware* (block-scaled matrix
instructions). It is checked against compiled code: ``tests/mx_kernels/test_compile.py`` compiles every pair for every
architecture and looks for the instruction. Importing this module touches no device.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

import torch

_MX8_4 = frozenset({("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp4")})
_SAME = frozenset({("mxfp8", "mxfp8"), ("mxfp4", "mxfp4")})
_NVFP4 = frozenset({("nvfp4", "nvfp4")})


@dataclass(frozen=True)
class Architecture:
    """Facts of one architecture.

    native: (activation family, weight family) pairs that have a block-scaled matrix instruction ("mxfp8" stands for
        E4M3 and E5M2; MXFP6 is widened to E4M3, which holds each of its values).
    fp8: Triton can convert float8_e4m3fn there; where it cannot, kernels decode the bytes by hand.
    fp8_dot: matrix units multiply FP8 (without block scales). warp: threads of a warp or wavefront.
    """

    name: str
    vendor: str
    native: frozenset[tuple[str, str]] = frozenset()
    fp8: bool = True
    fp8_dot: bool = False
    bf16: bool = True
    warp: int = 32


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("cpu", "cpu"),
        Architecture("sm75", "nvidia", fp8=False, bf16=False),
        Architecture("sm80", "nvidia", fp8=False),
        Architecture("sm86", "nvidia", fp8=False),
        Architecture("sm89", "nvidia", fp8_dot=True),
        Architecture("sm90", "nvidia", fp8_dot=True),
        Architecture("sm100", "nvidia", _MX8_4 | _NVFP4, fp8_dot=True),
        Architecture("sm103", "nvidia", _MX8_4 | _NVFP4, fp8_dot=True),
        Architecture("sm120", "nvidia", _SAME | _NVFP4, fp8_dot=True),
        Architecture("sm121", "nvidia", _SAME | _NVFP4, fp8_dot=True),
        Architecture("gfx90a", "amd", fp8=False, warp=64),
        Architecture("gfx942", "amd", fp8=False, fp8_dot=True, warp=64),
        Architecture("gfx950", "amd", _MX8_4, fp8_dot=True, warp=64),
        Architecture("gfx1100", "amd", fp8=False),
        Architecture("gfx1201", "amd", fp8=False, fp8_dot=True),
        Architecture("gfx1250", "amd", _MX8_4, fp8_dot=True),
        Architecture("xpu", "intel"),
    )
}


def family(format_name: str) -> str:
    """The operand family of a format in ``Architecture.native``: "mxfp8", "mxfp4", "nvfp4", or a plain dtype's name."""
    if format_name.startswith(("mxfp8", "mxfp6")):
        return "mxfp8"
    return format_name


def triton_version() -> str | None:
    """The installed Triton's version, or None; does not import it."""
    for name in ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-xpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True)
class Device:
    """One device: ``type`` is torch's device type ("cpu", "cuda" (also ROCm), "xpu"), ``arch`` a row of ARCHITECTURES.

    ``triton`` is the version that would compile its kernels, or None: then every operation runs on its PyTorch reference.
    """

    type: str
    arch: Architecture
    name: str
    triton: str | None
    units: int = 0
    memory: int = 0

    @classmethod
    def probe(cls, device: torch.device | str | None = None) -> Device:
        """The facts of a torch device (None: the current accelerator, else the CPU).

        Raises ValueError for a device type that is not cpu, cuda or xpu, and for an architecture not in the table.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _probe(device)

    @classmethod
    def fake(cls, arch: str, triton: str | None = "3.6.0") -> Device:
        """A device that is not here, by architecture name ("sm90", "gfx950", "cpu" ...); ValueError lists the names."""
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
        a = ARCHITECTURES[arch]
        kind = {"cpu": "cpu", "intel": "xpu"}.get(a.vendor, "cuda")
        return cls(kind, a, f"{arch} (not probed)", None if a.vendor == "cpu" else triton)

    def native(self, activation: str, weight: str) -> bool:
        """Whether the matrix units multiply these two formats (names) with their block scales in hardware."""
        return (family(activation), family(weight)) in self.arch.native

    def native_elsewhere(self, activation: str, weight: str) -> tuple[str, ...]:
        """The architectures that do."""
        pair = (family(activation), family(weight))
        return tuple(a.name for a in ARCHITECTURES.values() if pair in a.native)

    def __str__(self) -> str:
        return self.arch.name


@functools.cache
def _probe(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("cpu", ARCHITECTURES["cpu"], "CPU", None)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device("xpu", ARCHITECTURES["xpu"], xpu.name, triton_version(), memory=xpu.total_memory)
    if device.type != "cuda":
        raise ValueError(f"device is {device}, needs cpu, cuda (also ROCm) or xpu")
    p = torch.cuda.get_device_properties(device)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm{p.major}{p.minor}"
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{p.name} has the architecture {arch}, which is not in the table: add a row to mx_kernels/device.py"
        )
    return Device("cuda", ARCHITECTURES[arch], p.name, triton_version(), p.multi_processor_count, p.total_memory)
