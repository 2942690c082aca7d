"""Quantization methods and checkpoints. See the package's README.

Names are imported when they are first used, so that ``mx-quant --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from .checks import check_finite as check_finite
    from .checks import joint_global_scale as joint_global_scale
    from .checks import quantize_finite as quantize_finite
    from .convert import Checkpoint as Checkpoint
    from .convert import Conversion as Conversion
    from .convert import convert_checkpoint as convert_checkpoint
    from .convert import dequantize_checkpoint as dequantize_checkpoint
    from .convert import inspect_checkpoint as inspect_checkpoint
    from .coverage import Coverage as Coverage
    from .coverage import Covered as Covered
    from .experts import ExpertBuilder as ExpertBuilder
    from .experts import ExpertWeights as ExpertWeights
    from .experts import deinterleave as deinterleave
    from .experts import interleave as interleave
    from .experts import quantize_experts as quantize_experts
    from .layouts import LAYOUTS as LAYOUTS
    from .layouts import Layout as Layout
    from .layouts import TensorInfo as TensorInfo
    from .layouts import WeightRef as WeightRef
    from .layouts import detect_layout as detect_layout
    from .layouts import get_layout as get_layout
    from .linear import LinearMethod as LinearMethod
    from .linear import Mxfp4LinearMethod as Mxfp4LinearMethod
    from .linear import Mxfp4OnlineLinearMethod as Mxfp4OnlineLinearMethod
    from .linear import Mxfp6OnlineLinearMethod as Mxfp6OnlineLinearMethod
    from .linear import Mxfp8LinearMethod as Mxfp8LinearMethod
    from .linear import Mxfp8OnlineLinearMethod as Mxfp8OnlineLinearMethod
    from .linear import MxLinear as MxLinear
    from .linear import Nvfp4LinearMethod as Nvfp4LinearMethod
    from .linear import Nvfp4OnlineLinearMethod as Nvfp4OnlineLinearMethod
    from .linear import OfflineLinearMethod as OfflineLinearMethod
    from .linear import OnlineLinearMethod as OnlineLinearMethod
    from .load_quantized import load_quantized as load_quantized
    from .moe_method import GPT_OSS_ACTIVATION as GPT_OSS_ACTIVATION
    from .moe_method import Mxfp4MoEMethod as Mxfp4MoEMethod
    from .moe_method import Mxfp4OnlineMoEMethod as Mxfp4OnlineMoEMethod
    from .moe_method import Mxfp6OnlineMoEMethod as Mxfp6OnlineMoEMethod
    from .moe_method import Mxfp8MoEMethod as Mxfp8MoEMethod
    from .moe_method import Mxfp8OnlineMoEMethod as Mxfp8OnlineMoEMethod
    from .moe_method import Nvfp4MoEMethod as Nvfp4MoEMethod
    from .moe_method import Nvfp4OnlineMoEMethod as Nvfp4OnlineMoEMethod
    from .moe_method import OfflineMoEMethod as OfflineMoEMethod
    from .moe_method import OnlineMoEMethod as OnlineMoEMethod
    from .offline import QuantizeSummary as QuantizeSummary
    from .offline import quantize_checkpoint as quantize_checkpoint
    from .online import load_online as load_online
    from .online import meta_parameters as meta_parameters
    from .online import quantize_model as quantize_model
    from .report import Report as Report
    from .report import compare as compare
    from .report import error_report as error_report
    from .scheme import NVFP4_W4A4 as NVFP4_W4A4
    from .scheme import NVFP4_W4A16 as NVFP4_W4A16
    from .scheme import SCHEMES as SCHEMES
    from .scheme import W4A4 as W4A4
    from .scheme import W4A8 as W4A8
    from .scheme import W4A16 as W4A16
    from .scheme import W6A6 as W6A6
    from .scheme import W6A8 as W6A8
    from .scheme import W6A16 as W6A16
    from .scheme import W8A8 as W8A8
    from .scheme import W8A16 as W8A16
    from .scheme import Scheme as Scheme
    from .scheme import get_scheme as get_scheme
    from .shards import ShardReader as ShardReader
    from .stored_experts import expert_layers as expert_layers
    from .stored_experts import read_experts as read_experts
    from .verify import Finding as Finding
    from .verify import Verification as Verification
    from .verify import report_checkpoint as report_checkpoint
    from .verify import verify_checkpoint as verify_checkpoint
    from .writer import ShardWriter as ShardWriter
    from .writer import TensorSpec as TensorSpec
    from .writer import plan_shards as plan_shards

_HOMES = {
    "checks": (
        "check_finite",
        "joint_global_scale",
        "quantize_finite",
    ),
    "convert": (
        "Checkpoint",
        "Conversion",
        "convert_checkpoint",
        "dequantize_checkpoint",
        "inspect_checkpoint",
    ),
    "coverage": (
        "Coverage",
        "Covered",
    ),
    "experts": (
        "ExpertBuilder",
        "ExpertWeights",
        "deinterleave",
        "interleave",
        "quantize_experts",
    ),
    "layouts": (
        "LAYOUTS",
        "Layout",
        "TensorInfo",
        "WeightRef",
        "detect_layout",
        "get_layout",
    ),
    "linear": (
        "LinearMethod",
        "MxLinear",
        "Mxfp4LinearMethod",
        "Mxfp4OnlineLinearMethod",
        "Mxfp6OnlineLinearMethod",
        "Mxfp8LinearMethod",
        "Mxfp8OnlineLinearMethod",
        "Nvfp4LinearMethod",
        "Nvfp4OnlineLinearMethod",
        "OfflineLinearMethod",
        "OnlineLinearMethod",
    ),
    "load_quantized": ("load_quantized",),
    "moe_method": (
        "GPT_OSS_ACTIVATION",
        "Mxfp4MoEMethod",
        "Mxfp4OnlineMoEMethod",
        "Mxfp6OnlineMoEMethod",
        "Mxfp8MoEMethod",
        "Mxfp8OnlineMoEMethod",
        "Nvfp4MoEMethod",
        "Nvfp4OnlineMoEMethod",
        "OfflineMoEMethod",
        "OnlineMoEMethod",
    ),
    "offline": (
        "QuantizeSummary",
        "quantize_checkpoint",
    ),
    "online": (
        "load_online",
        "meta_parameters",
        "quantize_model",
    ),
    "report": (
        "Report",
        "compare",
        "error_report",
    ),
    "scheme": (
        "NVFP4_W4A16",
        "NVFP4_W4A4",
        "SCHEMES",
        "Scheme",
        "W4A16",
        "W4A4",
        "W4A8",
        "W6A16",
        "W6A6",
        "W6A8",
        "W8A16",
        "W8A8",
        "get_scheme",
    ),
    "shards": ("ShardReader",),
    "stored_experts": (
        "expert_layers",
        "read_experts",
    ),
    "verify": (
        "Finding",
        "Verification",
        "report_checkpoint",
        "verify_checkpoint",
    ),
    "writer": (
        "ShardWriter",
        "TensorSpec",
        "plan_shards",
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
