"""Rows in the order of the slots of a tile list, which a product can load by whole boxes (TMA) instead of row by row.

out[r] = rows[sorted_ids[r] // top_k]          for the slots r < num_padded that hold a pair; others stay as they are
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch


@triton.jit
def slots(sorted_ids, num_padded, n_pairs, top_k, R: tl.constexpr):
    """R slots of a tile list: whether there are any, each, whether it has a pair, and the pair's token (the pair where top_k is 1)."""
    first = tl.program_id(0).to(tl.int64) * R
    padded = tl.load(num_padded)
    r = first + tl.arange(0, R)
    pair = tl.load(sorted_ids + r, mask=r < padded, other=n_pairs)
    live = pair < n_pairs
    return first < padded, r, live, (tl.where(live, pair, 0) // top_k).to(tl.int64)


@triton.jit
def _gather_rows_kernel(
    x, out, scale, out_scale, sorted_ids, num_padded, x_stride, n_pairs, top_k, W,
    R: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Rows of x [M, W], and where SCALED their scales [M], to R slots of out [capacity, W]."""
    there, r, live, token = slots(sorted_ids, num_padded, n_pairs, top_k, R)
    if not there:
        return
    k = tl.arange(0, WIDTH)[None, :]
    inside = live[:, None] & (k < W)
    tl.store(out + r[:, None] * W + k, tl.load(x + token[:, None] * x_stride + k, mask=inside), mask=inside)
    if SCALED:
        tl.store(out_scale + r, tl.load(scale + token, mask=live), mask=live)


@functools.lru_cache(maxsize=4096)
def plan(
    capacity: int, row: int, dtype: torch.dtype, stride: int, scaled: bool, pairs: int, top_k: int, device: torch.device
) -> Launch:
    """The launch for (x, out, scale, out_scale, sorted_ids, num_padded), anything for the scales where there are none."""
    width = triton.next_power_of_2(row)
    r = max(1, min(8, 16384 // (width * dtype.itemsize)))
    return Launch(
        _gather_rows_kernel,
        (-(-capacity // r),),
        device,
        stride,
        pairs,
        top_k,
        row,
        R=r,
        WIDTH=width,
        SCALED=scaled,
        num_warps=4,
    )


def gather_rows(
    x: Tensor,  # [M, W]
    sorted_ids: Tensor,  # [capacity]
    num_padded: Tensor,
    num_pairs: int,
    top_k: int,
    scale: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor | None]:  # [capacity, W], [capacity]
    """The rows of each slot, and their scales."""
    capacity, width = sorted_ids.shape[0], x.shape[1]
    out = torch.empty((capacity, width), dtype=x.dtype, device=x.device)
    out_scale = None if scale is None else torch.empty(capacity, dtype=scale.dtype, device=x.device)
    if out.numel():
        run = plan(capacity, width, x.dtype, x.stride(0), scale is not None, num_pairs, top_k, x.device)
        run(x, out, x if scale is None else scale, out if out_scale is None else out_scale, sorted_ids, num_padded)
    return out, out_scale
