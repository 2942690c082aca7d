"""Mixture-of-Experts layers on microscaling weights. See the package's README."""

from .distributed import ExpertMap, ExpertParallel, Placement, balance, rebalance_
from .experts.base import Experts
from .experts.emulation import EmulationExperts
from .experts.fused import FusedExperts
from .experts.native import NativeExperts
from .experts.problem import Capability, Problem
from .experts.rebased import RebasedExperts
from .experts.reference import ReferenceExperts
from .experts.seeds import (
    Mxfp8EmulationTritonExperts,
    Mxfp8NativeTritonExperts,
    Mxfp8TritonExpertsBase,
    Nvfp4QuantizationEmulationTritonExperts,
    named_activation,
)
from .layer import MoE
from .oracle import (
    EXPERT_BACKENDS,
    EXPERT_CLASSES,
    explain,
    make_experts,
    select_backend,
    select_mxfp4_moe_backend,
    select_mxfp8_moe_backend,
    select_nvfp4_moe_backend,
)
from .routing import Router, Routing

__all__ = [
    "EXPERT_BACKENDS",
    "EXPERT_CLASSES",
    "Capability",
    "EmulationExperts",
    "ExpertMap",
    "ExpertParallel",
    "Experts",
    "FusedExperts",
    "MoE",
    "Mxfp8EmulationTritonExperts",
    "Mxfp8NativeTritonExperts",
    "Mxfp8TritonExpertsBase",
    "NativeExperts",
    "Nvfp4QuantizationEmulationTritonExperts",
    "Placement",
    "Problem",
    "RebasedExperts",
    "ReferenceExperts",
    "Router",
    "Routing",
    "balance",
    "explain",
    "make_experts",
    "named_activation",
    "rebalance_",
    "select_backend",
    "select_mxfp4_moe_backend",
    "select_mxfp8_moe_backend",
    "select_nvfp4_moe_backend",
]
