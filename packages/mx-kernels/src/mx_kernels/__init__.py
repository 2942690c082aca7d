"""Microscaling kernels: Triton on GPUs, PyTorch everywhere. See the package's README."""

from . import reference
from .choose import Candidate, Choice, Unsupported, choose
from .device import ARCHITECTURES, Architecture, Device
from .epilogue import Activation, Epilogue
from .formats import (
    FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8,
    MXFP8_E5M2,
    NVFP4,
    Element,
    Format,
    ScaleRule,
    get_format,
)
from .quantize import compute_global_scale, dequantize, quantize, quantize_dequantize
from .tensor import QuantizedTensor

__all__ = [
    "ARCHITECTURES",
    "FORMATS",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "MXFP8_E5M2",
    "NVFP4",
    "Activation",
    "Architecture",
    "Candidate",
    "Choice",
    "Device",
    "Element",
    "Epilogue",
    "Format",
    "QuantizedTensor",
    "ScaleRule",
    "Unsupported",
    "choose",
    "compute_global_scale",
    "dequantize",
    "get_format",
    "quantize",
    "quantize_dequantize",
    "reference",
]
