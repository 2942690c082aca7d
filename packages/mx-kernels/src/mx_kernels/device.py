"""Device facts: what an architecture's matrix units can do, as a table, and the device a tensor is on.

``ARCHITECTURES`` says which pairs of operand formats an architecture multiplies *in hardware* (block-scaled matrix
instructions). That part is generated from compiled code (``native_table.py``, made by ``nox -s native``), and
``tests/mx_kernels/test_compile_gemm.py`` makes it again. Importing this module touches no device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass

import torch

from .native_table import NATIVE, NATIVE_SINCE, PRODUCT_SINCE

_OLDEST = "3.6.0"
"""The oldest Triton that is supported anywhere."""


@dataclass(frozen=True)
class Architecture:
    """Facts of one architecture.

    native: (activation family, weight family) pairs that have a block-scaled matrix instruction ("mxfp8" stands for
        E4M3 and E5M2; MXFP6 is widened to E4M3, which holds each of its values).
    bf16: matrix units multiply bfloat16.
    native_since, product_since: the oldest Triton that emits those instructions, and that compiles any product, there.
    """

    name: str
    vendor: str
    native: frozenset[tuple[str, str]] = frozenset()
    bf16: bool = True
    native_since: str = _OLDEST
    product_since: str = _OLDEST


def _row(name: str, vendor: str, bf16: bool = True) -> Architecture:
    native, since = NATIVE.get(name, frozenset()), NATIVE_SINCE.get(name, _OLDEST)
    return Architecture(name, vendor, native, bf16, since, PRODUCT_SINCE.get(name, _OLDEST))


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        _row("cpu", "cpu"),
        _row("sm75", "nvidia", bf16=False),
        *(_row(f"sm{n}", "nvidia") for n in (80, 86, 89, 90, 100, 103, 120, 121)),
        *(_row(f"gfx{n}", "amd") for n in ("90a", "942", "950", "1100", "1201", "1250")),
        _row("xpu", "intel"),
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


def _release(version: str) -> tuple[int, ...]:
    """A version's three numbers, for comparison: "3.6.0+gitabc" is (3, 6, 0)."""
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])]
    return (*numbers, 0, 0, 0)[:3]


@dataclass(frozen=True)
class Device:
    """One device: ``type`` is torch's device type ("cpu", "cuda" (also ROCm), "xpu", "mps" ...), ``arch`` what is known of it.

    ``arch`` is a row of ARCHITECTURES, or for hardware that is not in the table a row that claims as little as possible.
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

        An architecture that is not in the table has no native pairs; a device type other than cuda and xpu has no Triton.
        Raises ValueError for the meta device, which is no hardware.
        """
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _probe(device)

    @classmethod
    def fake(cls, arch: str, triton: str | None = "") -> Device:
        """A device that is not here, by architecture name ("sm90", "gfx950", "cpu" ...); ValueError lists the names.

        triton: its version, None for none; by default the oldest that makes all that the table claims for ``arch``.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
        a = ARCHITECTURES[arch]
        kind = {"cpu": "cpu", "intel": "xpu"}.get(a.vendor, "cuda")
        if triton == "":
            triton = max(a.native_since, a.product_since, key=_release)
        return cls(kind, a, f"{arch} (not probed)", None if a.vendor == "cpu" else triton)

    def native(self, activation: str, weight: str) -> bool:
        """Whether the matrix units multiply these two formats (names) with their block scales in hardware.

        False where the Triton that is here is older than the first that emits the instruction.
        """
        emits = self.triton is None or _release(self.triton) >= _release(self.arch.native_since)
        return emits and (family(activation), family(weight)) in self.arch.native

    @property
    def compiles(self) -> bool:
        """Whether Triton is here and new enough for this architecture."""
        return self.triton is not None and _release(self.triton) >= _release(self.arch.product_since)

    def native_elsewhere(self, activation: str, weight: str) -> tuple[str, ...]:
        """The architectures that do, with a Triton that is new enough."""
        pair = (family(activation), family(weight))
        return tuple(a.name for a in ARCHITECTURES.values() if pair in a.native)

    @property
    def advice(self) -> str | None:
        """What would make kernels faster on this device, if it is here; None where there is nothing to do."""
        if self.arch.name != "sm90" or self.triton is None or not self.units:
            return None
        from .kernels.launch import takes_registers

        if not takes_registers():
            return None
        return (
            "Triton's ptxas is older than 12.9, so products of quantized weights wait for every step: name a newer one, such as that "
            "of CUDA 13, by TRITON_PTXAS_PATH (up to 12% in prefill)"
        )

    def __str__(self) -> str:
        return self.arch.name


@functools.cache
def _probe(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("cpu", ARCHITECTURES["cpu"], "CPU", None)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device("xpu", ARCHITECTURES["xpu"], xpu.name, triton_version(), memory=xpu.total_memory)
    if device.type == "meta":
        raise ValueError("device is meta, needs one that holds data: cpu, cuda (also ROCm), xpu, mps ...")
    if device.type != "cuda":
        return Device(device.type, Architecture(device.type, device.type), device.type, None)
    p = torch.cuda.get_device_properties(device)
    name = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm{p.major}{p.minor}"
    note = "" if name in ARCHITECTURES else f" ({name} is not in the table)"
    arch = ARCHITECTURES.get(name) or _unknown(name, p.major)
    return Device("cuda", arch, p.name + note, triton_version(), p.multi_processor_count, p.total_memory)


def _unknown(name: str, major: int) -> Architecture:
    """A row for a GPU that is not in the table; ``major`` is that of its compute capability, or the 9 of gfx9xx."""
    if torch.version.hip:
        return Architecture(name, "amd", bf16=major >= 9)
    return Architecture(name, "nvidia", bf16=major >= 8)
