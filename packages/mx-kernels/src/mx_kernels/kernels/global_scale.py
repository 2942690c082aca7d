"""NVFP4's global scale of a matrix: A / 2688, where A is its largest finite magnitude; two launches, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import launch
from .quantize import rows_of


@triton.jit
def _amax_kernel(x, partial, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Largest finite magnitude of this program's share of matrix program_id(1), as float32 bits: partial [matrices, parts]."""
    matrix = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    for row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        line = x + (matrix * rows + row) * stride
        for column in range(0, columns, COLUMNS):
            live = (row + r < rows) & (column + c < columns)
            v = tl.load(line + r.to(tl.int64) * stride + column + c, mask=live, other=0.0).to(tl.float32)
            bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            best = tl.maximum(best, tl.where(bits < 0x7F800000, bits, 0))
    tl.store(partial + matrix * tl.num_programs(0) + tl.program_id(0), tl.max(best))


@triton.jit
def _global_scale_kernel(partial, out, parts, GLOBAL_MIN: tl.constexpr, PARTS: tl.constexpr):
    """The global scale of matrix program_id(0) from its parts."""
    p = tl.arange(0, PARTS)
    amax = tl.max(tl.load(partial + tl.program_id(0) * parts + p, mask=p < parts, other=0)).to(tl.float32, bitcast=True)
    g = tl.maximum(tl.div_rn(amax, 2688.0), GLOBAL_MIN)
    tl.store(out + tl.program_id(0), tl.where(amax > 0, g, 1.0))


def compute_global_scale(x: Tensor) -> Tensor:
    """NVFP4's global scale, one per matrix of x [..., N, K], [] for up to two dimensions; two launches, deterministic."""
    lead = x.shape[: max(0, x.ndim - 2)]
    if x.numel() == 0:
        return torch.ones(lead, dtype=torch.float32, device=x.device)
    rows, _ = rows_of(x)
    matrices = lead.numel()
    per_matrix = rows.shape[0] // matrices
    columns = min(1024, triton.next_power_of_2(rows.shape[1]))
    height = 4096 // columns
    parts = max(1, min(triton.cdiv(per_matrix, height), 4096 // matrices, 1024))
    partial = torch.empty((matrices, parts), dtype=torch.int32, device=x.device)
    out = torch.empty(lead, dtype=torch.float32, device=x.device)
    shape = (rows.stride(0), per_matrix, rows.shape[1])
    launch(_amax_kernel, (parts, matrices), x.device, rows, partial, *shape, ROWS=height, COLUMNS=columns, num_warps=4)
    size = triton.next_power_of_2(parts)
    launch(
        _global_scale_kernel, (matrices,), x.device, partial, out, parts, reference.GLOBAL_MIN, PARTS=size, num_warps=1
    )
    return out
