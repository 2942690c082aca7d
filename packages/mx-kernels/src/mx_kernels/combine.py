"""The last step of an MoE layer: the sum over a token's experts.

    out[t] = sum over slots s, in order, of (weights[t, s] *) y[t * k + s],   dropped pairs left out

Letters: T tokens, k experts a token, H hidden size. Kernel: ``kernels.combine.combine``, with the op's arguments and result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import Alignment
from .dispatch import (
    check_device,
    check_float,
    check_float32,
    check_last_stride,
    check_out_dtype,
    check_type,
    direct,
    has_triton,
    kernels,
)
from .reference.moe import combined


@torch.library.custom_op(
    "mx_kernels::combine",
    mutates_args=(),
    schema="(Tensor y, Tensor ids, int num_experts, Tensor? expert_map, Tensor? weights, ScalarType out_dtype) -> Tensor",
)
def combine_op(
    y: Tensor,
    ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[T, H] of ``out_dtype``."""
    return combined(y, ids, num_experts, expert_map, weights, out_dtype)


@combine_op.register_kernel(("cuda", "xpu"))
def _(
    y: Tensor,
    ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if not has_triton():
        return combined(y, ids, num_experts, expert_map, weights, out_dtype)
    out: Tensor = kernels("combine").combine(y, ids, num_experts, expert_map, weights, out_dtype)
    return out


@combine_op.register_fake
def _(
    y: Tensor,
    ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return y.new_empty((ids.shape[0], y.shape[1]), dtype=out_dtype)


def combine(
    y: Tensor,  # [T * k, H]
    tiles: Alignment,
    *,
    weights: Tensor | None = None,  # [T, k]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [T, H]
    """Sum the k rows of each token, in float32 and in slot order, and round once.

    y: float32, bf16 or fp16, row p of pair p. Rows of dropped pairs are never read, whatever they hold; a token that has
    no other gets zeros. weights: float32 [T, k], if the rows are not weighted yet. out_dtype: y's by default.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes.
    """
    check_float(y, "y")
    check_type(tiles, Alignment, "tiles", "moe_align_block_size makes one")
    check_last_stride(y, "y")
    if y.ndim != 2 or y.shape[0] != tiles.num_pairs:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, needs [{tiles.num_pairs}, H]: one row for each of the "
            f"{tiles.ids.shape[0]} tokens times {tiles.top_k} experts"
        )
    check_device(y, tiles.device, "y", "the alignment")
    if weights is not None:
        check_float32(weights, "weights")
        if weights.shape != tiles.ids.shape:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}, needs that of ids, {tuple(tiles.ids.shape)}: one a pair"
            )
        check_device(weights, y.device, "weights", "y")
        weights = weights.contiguous()
    out_dtype = out_dtype or y.dtype
    check_out_dtype(out_dtype)
    y = y.contiguous()
    run = kernels("combine").combine if direct(y, tiles.ids, weights) else combine_op
    out: Tensor = run(y, tiles.ids, tiles.num_experts, tiles.expert_map, weights, out_dtype)
    return out
