"""Reference experts: the PyTorch twin of each of the five steps, on any device; the specification of the other classes."""

from __future__ import annotations

from typing import Any, ClassVar

import mx_kernels as mk

from .base import ExpertsBase
from .problem import Capability


class ReferenceExperts(ExpertsBase):
    """Operands decoded exactly, products summed in float32, the hit experts one after another."""

    name = "reference"
    capability = Capability()
    ops: ClassVar[Any] = mk.reference
