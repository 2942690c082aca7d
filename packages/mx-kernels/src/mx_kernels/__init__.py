"""Microscaling kernels: Triton on GPUs, PyTorch everywhere. See the package's README."""

from . import reference
from .activation import activate
from .align import Alignment, moe_align_block_size
from .choose import Candidate, Choice, Unsupported, choose
from .combine import combine
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
from .gemm import gemm
from .grouped_gemm import block_size, grouped_gemm
from .layouts import (
    swizzle_8x4,
    swizzle_128x4,
    swizzle_cdna4,
    swizzle_hopper,
    unswizzle_8x4,
    unswizzle_128x4,
    unswizzle_cdna4,
    unswizzle_hopper,
)
from .moe import PackedLayer, RebasedLayer
from .packing import PackedWeight, pack
from .quantize import compute_global_scale, dequantize, quantize, quantize_dequantize
from .rebase import (
    REBASED_ACTIVATIONS,
    REBASED_FORMATS,
    RebasedWeight,
    grouped_gemm_rebased,
    rebase,
    rebase_rows,
    rebased_block_size,
)
from .slots import gather_rows, layer_slots
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
    "REBASED_ACTIVATIONS",
    "REBASED_FORMATS",
    "Activation",
    "Alignment",
    "Architecture",
    "Candidate",
    "Choice",
    "Device",
    "Element",
    "Epilogue",
    "Format",
    "PackedLayer",
    "PackedWeight",
    "QuantizedTensor",
    "RebasedLayer",
    "RebasedWeight",
    "ScaleRule",
    "Unsupported",
    "activate",
    "block_size",
    "choose",
    "combine",
    "compute_global_scale",
    "dequantize",
    "gather_rows",
    "gemm",
    "get_format",
    "grouped_gemm",
    "grouped_gemm_rebased",
    "layer_slots",
    "moe_align_block_size",
    "pack",
    "quantize",
    "quantize_dequantize",
    "rebase",
    "rebase_rows",
    "rebased_block_size",
    "reference",
    "swizzle_8x4",
    "swizzle_128x4",
    "swizzle_cdna4",
    "swizzle_hopper",
    "unswizzle_8x4",
    "unswizzle_128x4",
    "unswizzle_cdna4",
    "unswizzle_hopper",
]
