"""The weighted sum over a token's experts, in one pass.

    out[t] = sum over slots s, in order, of (weights[t, s] *) y[t * k + s],   dropped pairs left out and never read

In float32, one rounding at the end. Bound by memory: each program takes COLUMNS columns of one token.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, early_options, starts_early, target


@triton.jit(do_not_specialize=["clears"])
def _combine_kernel(
    y,  # [T * k, H]
    ids,  # [T, k]
    expert_map,
    weights,  # [T, k]
    done,
    out,  # [T, H]
    experts,
    num_global,
    H,
    clears,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """clears: how many counts in ``done``, of products that have ended, to leave as zeros."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = h < H
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = t * TOP_K + slot
        e = tl.load(ids + pair)
        if HAS_MAP:
            e = tl.load(expert_map + e, mask=(e >= 0) & (e < num_global), other=-1)
        kept = (e >= 0) & (e < experts)
        row = tl.load(y + pair * H + h, mask=live & kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            # A dropped pair's weight may be anything: it is not read either.
            row = row * tl.load(weights + pair, mask=kept, other=0.0)
        total += row
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=live)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for at in range(0, clears, 64):
            count = at + tl.arange(0, 64)
            tl.store(done + count, tl.zeros((64,), tl.int32), mask=count < clears)


def combine(
    y: Tensor,  # [T * k, H]
    ids: Tensor,  # [T, k]
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
    weights: Tensor | None,  # [T, k]
    out_dtype: torch.dtype,
) -> Tensor:  # [T, H]
    """Sum of the rows of each token's pairs."""
    tokens, width, device = ids.shape[0], y.shape[1], y.device
    out = torch.empty((tokens, width), dtype=out_dtype, device=device)
    if tokens and width:
        num_global = None if expert_map is None else expert_map.shape[0]
        run = plan(
            tokens, ids.shape[1], width, num_experts, num_global, weights is not None, y.dtype, out_dtype, device
        )
        run(y.contiguous(), ids, expert_map, weights, ids, out)
    return out


@functools.lru_cache(maxsize=4096)
def plan(
    tokens: int,
    k: int,
    width: int,
    num_experts: int,
    num_global: int | None,
    weighted: bool,
    dtype: torch.dtype,  # of y: Triton compiles a kernel for each
    out_dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """The launch, for (y, ids, expert_map, weights, done, out), ids for ``done`` unless some are to be cleared (``having``)."""
    # Few tokens: narrower columns, so that every multiprocessor has some.
    columns = 256
    while columns < 2048 and columns < width and tokens * -(-width // columns) > 8 * target(device).units:
        columns *= 2
    early = starts_early("combine", tokens * k, device)
    return Launch(
        _combine_kernel,
        (tokens, -(-width // columns)),
        device,
        num_experts,
        num_global or 0,
        width,
        0,
        TOP_K=k,
        HAS_MAP=num_global is not None,
        WEIGHTED=weighted,
        COLUMNS=columns,
        **early_options(early),
        num_warps=1 if columns <= 256 else 2 if columns == 512 else 4,
        enable_fp_fusion=False,
    )
