"""The specification: a plain-PyTorch twin of every operation, on any device, which is also its CPU kernel.

Twins take the same arguments as the public functions and return the same values; what is faster is compared with them bit for bit.
"""

from .activation import activate, activated
from .elements import (
    ABS_MASK,
    INF_BITS,
    code_values,
    decode,
    encode,
    pack_codes,
    scale_to_float,
    scale_to_reciprocal,
    unpack_codes,
)
from .gemm import gemm, grouped_gemm
from .moe import combine, gather_rows, moe_align_block_size
from .quantize import (
    GLOBAL_MAX,
    GLOBAL_MIN,
    compute_global_scale,
    dequantize,
    dequantize_parts,
    e4m3_scale,
    e8m0_scale,
    global_scale_of,
    nvfp4_reciprocal,
    quantize,
    quantize_codes,
    quantize_dequantize,
    scale_rounding,
)
from .rebase import concatenated_rows, gate_up_rows, grouped_gemm_rebased, rebase_rows, rebased

__all__ = [
    "ABS_MASK",
    "GLOBAL_MAX",
    "GLOBAL_MIN",
    "INF_BITS",
    "activate",
    "activated",
    "code_values",
    "combine",
    "compute_global_scale",
    "concatenated_rows",
    "decode",
    "dequantize",
    "dequantize_parts",
    "e4m3_scale",
    "e8m0_scale",
    "encode",
    "gate_up_rows",
    "gather_rows",
    "gemm",
    "global_scale_of",
    "grouped_gemm",
    "grouped_gemm_rebased",
    "moe_align_block_size",
    "nvfp4_reciprocal",
    "pack_codes",
    "quantize",
    "quantize_codes",
    "quantize_dequantize",
    "rebase_rows",
    "rebased",
    "scale_rounding",
    "scale_to_float",
    "scale_to_reciprocal",
    "unpack_codes",
]
