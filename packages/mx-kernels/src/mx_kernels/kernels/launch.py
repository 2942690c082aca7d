"""What a launcher needs to know about the device of its tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """fp8: Triton converts float32 to FP8 with saturation; asm: kernels may use PTX; units: multiprocessors."""

    fp8: bool
    asm: bool
    units: int


@functools.cache
def target(device: torch.device) -> Target:
    """The facts of an accelerator."""
    properties = torch.get_device_module(device.type).get_device_properties(device)
    units = getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64
    nvidia = device.type == "cuda" and torch.version.hip is None
    return Target(nvidia and torch.cuda.get_device_capability(device) >= (8, 9), nvidia, units)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on ``device``, whichever is current."""
    run: Callable[..., Any] = kernel[grid]
    module = torch.get_device_module(device.type)
    guard = contextlib.nullcontext() if device.index in (None, module.current_device()) else module.device(device)
    with guard:
        run(*args, **options)
