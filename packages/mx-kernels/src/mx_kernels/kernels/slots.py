"""Rows in the order of the slots of a tile list, which a product can load by whole boxes (TMA) instead of row by row.

out[r] = rows[sorted_ids[r] // top_k]          for the slots r < num_padded that hold a pair; others stay as they are

Each row is read once and written to the slots of its pairs, which are looked up first: a row that each slot reads for itself comes from
memory several times.
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
def _places_kernel(sorted_ids, num_padded, places, n_pairs, R: tl.constexpr, FILL: tl.constexpr):
    """places [P]: the slot of each pair that has one; where FILL -1 for all, to begin with."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    if FILL:
        tl.store(places + r, tl.zeros((R,), tl.int32) - 1, mask=r < n_pairs)
    else:
        pair = tl.load(sorted_ids + r, mask=r < tl.load(num_padded), other=n_pairs)
        tl.store(places + pair, r, mask=pair < n_pairs)


@triton.jit
def _gather_rows_kernel(
    x, out, scale, out_scale, places, x_stride, W, TOP_K: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """WIDTH columns of a row of x [M, W], and where SCALED its scale [M], to the slots of its TOP_K pairs."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(x + token * x_stride + k, mask=k < W)
    for i in tl.static_range(TOP_K):
        r = tl.load(places + token * TOP_K + i).to(tl.int64)
        tl.store(out + r * W + k, row, mask=k < tl.where(r >= 0, W, 0))
        if SCALED:
            tl.store(out_scale + r, tl.load(scale + token), mask=r >= 0)  # the same from each program of a row


@functools.lru_cache(maxsize=4096)
def plan(
    capacity: int, row: int, dtype: torch.dtype, stride: int, scaled: bool, pairs: int, top_k: int, device: torch.device
) -> tuple[tuple[Launch, tuple[str, ...]], ...]:
    """The launches, each with the names of its tensors; anything for the scales where there are none. places: [pairs] int32."""
    r = 1024
    found = ("sorted_ids", "num_padded", "places")
    fill, place = (
        Launch(_places_kernel, (-(-size // r),), device, pairs, R=r, FILL=fill, num_warps=4)
        for size, fill in ((pairs, True), (capacity, False))
    )
    width = min(4096, triton.next_power_of_2(row))
    run = Launch(
        _gather_rows_kernel,
        (pairs // top_k, -(-row // width)),
        device,
        stride,
        row,
        TOP_K=top_k,
        WIDTH=width,
        SCALED=scaled,
        num_warps=max(1, min(8, width * dtype.itemsize // 2048)),
    )
    return (fill, found), (place, found), (run, ("x", "out", "scale", "out_scale", "places"))


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
    if out.numel() and num_pairs:
        tensors = {
            "x": x,
            "out": out,
            "scale": x if scale is None else scale,
            "out_scale": out if out_scale is None else out_scale,
        }
        tensors |= {"sorted_ids": sorted_ids, "num_padded": num_padded}
        tensors["places"] = torch.empty(num_pairs, dtype=torch.int32, device=x.device)
        for run, names in plan(capacity, width, x.dtype, x.stride(0), scale is not None, num_pairs, top_k, x.device):
            run(*(tensors[name] for name in names))
    return out, out_scale
