"""Mixture-of-Experts layers on microscaling weights. See the package's README.

Names are imported when they are first used, so that ``mx-moe --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from .distributed import ExpertMap as ExpertMap
    from .distributed import ExpertParallel as ExpertParallel
    from .distributed import Placement as Placement
    from .distributed import balance as balance
    from .distributed import rebalance_ as rebalance_
    from .experts.base import Experts as Experts
    from .experts.emulation import EmulationExperts as EmulationExperts
    from .experts.fused import FusedExperts as FusedExperts
    from .experts.native import NativeExperts as NativeExperts
    from .experts.problem import Capability as Capability
    from .experts.problem import Problem as Problem
    from .experts.rebased import RebasedExperts as RebasedExperts
    from .experts.reference import ReferenceExperts as ReferenceExperts
    from .experts.seeds import Mxfp8EmulationTritonExperts as Mxfp8EmulationTritonExperts
    from .experts.seeds import Mxfp8NativeTritonExperts as Mxfp8NativeTritonExperts
    from .experts.seeds import Mxfp8TritonExpertsBase as Mxfp8TritonExpertsBase
    from .experts.seeds import Nvfp4QuantizationEmulationTritonExperts as Nvfp4QuantizationEmulationTritonExperts
    from .experts.seeds import named_activation as named_activation
    from .layer import MoE as MoE
    from .oracle import EXPERT_BACKENDS as EXPERT_BACKENDS
    from .oracle import EXPERT_CLASSES as EXPERT_CLASSES
    from .oracle import explain as explain
    from .oracle import make_experts as make_experts
    from .oracle import select_backend as select_backend
    from .oracle import select_mxfp4_moe_backend as select_mxfp4_moe_backend
    from .oracle import select_mxfp8_moe_backend as select_mxfp8_moe_backend
    from .oracle import select_nvfp4_moe_backend as select_nvfp4_moe_backend
    from .routing import Router as Router
    from .routing import Routing as Routing

_HOMES = {
    "distributed": (
        "ExpertMap",
        "ExpertParallel",
        "Placement",
        "balance",
        "rebalance_",
    ),
    "experts.base": ("Experts",),
    "experts.emulation": ("EmulationExperts",),
    "experts.fused": ("FusedExperts",),
    "experts.native": ("NativeExperts",),
    "experts.problem": (
        "Capability",
        "Problem",
    ),
    "experts.rebased": ("RebasedExperts",),
    "experts.reference": ("ReferenceExperts",),
    "experts.seeds": (
        "Mxfp8EmulationTritonExperts",
        "Mxfp8NativeTritonExperts",
        "Mxfp8TritonExpertsBase",
        "Nvfp4QuantizationEmulationTritonExperts",
        "named_activation",
    ),
    "layer": ("MoE",),
    "oracle": (
        "EXPERT_BACKENDS",
        "EXPERT_CLASSES",
        "explain",
        "make_experts",
        "select_backend",
        "select_mxfp4_moe_backend",
        "select_mxfp8_moe_backend",
        "select_nvfp4_moe_backend",
    ),
    "routing": (
        "Router",
        "Routing",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
