"""Quantization methods and checkpoints. See the package's README."""

from .checks import check_finite, joint_global_scale, quantize_finite
from .scheme import (
    NVFP4_W4A4,
    NVFP4_W4A16,
    SCHEMES,
    W4A4,
    W4A8,
    W4A16,
    W6A6,
    W6A8,
    W6A16,
    W8A8,
    W8A16,
    Scheme,
    get_scheme,
)

__all__ = [
    "NVFP4_W4A4",
    "NVFP4_W4A16",
    "SCHEMES",
    "W4A4",
    "W4A8",
    "W4A16",
    "W6A6",
    "W6A8",
    "W6A16",
    "W8A8",
    "W8A16",
    "Scheme",
    "check_finite",
    "get_scheme",
    "joint_global_scale",
    "quantize_finite",
]
