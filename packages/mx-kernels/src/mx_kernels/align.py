"""Alignment of routed pairs: which pairs each block of a grouped GEMM works on.

Letters: T tokens, k experts a token, pair p = token * k + slot, E experts in the weights.
Kernel: ``kernels.align.moe_align_block_size``, with the op's arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import Alignment, capacity
from .dispatch import check_device, check_type, direct, has_triton, kernels
from .reference.moe import aligned, local_experts, needs_no_sorting

__all__ = ["Alignment", "moe_align_block_size"]

SELF_ROUTED = 64
"""On an accelerator, up to this many pairs are not sorted: the grouped GEMM finds the pairs of an expert itself."""


def stays_unsorted(ids: Tensor, num_experts: int, expert_map: Tensor | None, accelerated: bool) -> bool:
    """Whether each pair is a block of its own."""
    few = accelerated and expert_map is None and ids.numel() <= SELF_ROUTED
    return few or needs_no_sorting(ids.numel(), num_experts, expert_map)


def _refuse_bad_ids(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    """Raise ValueError for an id past the skip sentinel or a map entry past the weights (reads values)."""
    total = num_experts if expert_map is None else expert_map.shape[0]
    wrong = (ids > total).nonzero()
    if wrong.shape[0]:
        t, slot = wrong[0].tolist()
        raise ValueError(
            f"ids[{t}, {slot}] is {int(ids[t, slot])}, but there are {total} experts: "
            f"use 0 to {total - 1}, or a negative id or {total} to drop the pair"
        )
    if expert_map is not None:
        wrong = ((expert_map >= num_experts) | (expert_map < -1)).nonzero()
        if wrong.shape[0]:
            e = int(wrong[0])
            raise ValueError(
                f"expert_map[{e}] is {int(expert_map[e])}, but the weights have {num_experts} experts: "
                f"use 0 to {num_experts - 1}, or -1 for an expert that is not here"
            )


@torch.library.custom_op(
    "mx_kernels::moe_align_block_size",
    mutates_args=(),
    schema="(Tensor ids, int block_size, int num_experts, Tensor? expert_map) -> (Tensor, Tensor, Tensor)",
)
def moe_align_block_size_op(
    ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted_ids, expert_ids, num_padded), always sorted."""
    if ids.device.type == "cpu":
        _refuse_bad_ids(ids, num_experts, expert_map)
    return aligned(ids, block_size, num_experts, expert_map)


@moe_align_block_size_op.register_kernel(("cuda", "xpu"))
def _(ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if not has_triton():
        return aligned(ids, block_size, num_experts, expert_map)
    parts: tuple[Tensor, Tensor, Tensor] = kernels("align").moe_align_block_size(
        ids, block_size, num_experts, expert_map
    )
    return parts


@moe_align_block_size_op.register_fake
def _(ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    slots = capacity(ids.numel(), block_size, num_experts)
    return (
        ids.new_empty((slots,), dtype=torch.int32),
        ids.new_empty((slots // block_size,), dtype=torch.int32),
        ids.new_empty((1,), dtype=torch.int32),
    )


@torch.library.custom_op(
    "mx_kernels::expert_of_pair", mutates_args=(), schema="(Tensor ids, int num_experts) -> Tensor"
)
def expert_of_pair_op(ids: Tensor, num_experts: int) -> Tensor:
    """The expert of each pair, int32 [T * k], -1 for a dropped one: the alignment that needs no sorting."""
    if ids.device.type == "cpu":
        _refuse_bad_ids(ids, num_experts, None)
    return local_experts(ids, num_experts, None).to(torch.int32)


@expert_of_pair_op.register_fake
def _(ids: Tensor, num_experts: int) -> Tensor:
    return ids.new_empty((ids.numel(),), dtype=torch.int32)


def moe_align_block_size(
    ids: Tensor,  # [T, k]
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,  # [E_global]
    *,
    sort: bool = False,
) -> Alignment:
    """Group the T * k routed pairs by expert into blocks of ``block_size`` rows, each block of one expert.

    ids: int32 or int64 [T, k], expert of each pair: rows of the weights, or global ids where ``expert_map`` is given.
    block_size: a power of two or a multiple of 32. num_experts: E, experts in the weights.
    expert_map: int32 [E_global], a global id's row of the weights, -1 where that expert is elsewhere.

    A pair is dropped (appears in no block) with a negative id, with the id E (E_global with a map), or with a mapped id of
    -1. Other ids out of range: ValueError naming the first on the CPU; dropped on an accelerator, which is never waited for.
    With T * k * 4 <= E and no map nothing is sorted and each pair is its own block (``sorted_ids`` is None); on an
    accelerator with Triton that also holds up to 64 pairs without a map. ``sort=True`` sorts in these cases too.

    Raises ValueError for shapes, block sizes, devices and ids out of range, TypeError for dtypes.
    """
    check_type(ids, Tensor, "ids", "torch.as_tensor makes one")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids is {ids.dtype}, needs int32 or int64: cast it with .int()")
    if ids.ndim != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}, needs [tokens, experts a token]: reshape it to [T, k]")
    if block_size < 1 or (block_size & (block_size - 1) and block_size % 32):
        raise ValueError(
            f"block_size is {block_size}, needs a power of two or a multiple of 32 (16, 32, 64, 96, 128, 160 or 256 suit the kernels)"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, needs the number of experts in the weights, at least 1")
    if ids.numel() + num_experts * block_size >= 2**31:
        raise ValueError(f"{ids.numel()} pairs do not fit 32-bit indices: split the batch")
    if expert_map is not None:
        check_type(expert_map, Tensor, "expert_map", "torch.as_tensor makes one")
        if expert_map.dtype != torch.int32:
            raise TypeError(f"expert_map is {expert_map.dtype}, needs int32: cast it with .int()")
        if expert_map.ndim != 1:
            raise ValueError(
                f"expert_map has shape {tuple(expert_map.shape)}, needs [global experts]: one row or -1 for each global id"
            )
        check_device(expert_map, ids.device, "expert_map", "ids")
        expert_map = expert_map.contiguous()
    if ids.dtype == torch.int64:
        ids = ids.clamp(-1, 2**31 - 1).to(torch.int32)
    ids = ids.contiguous()
    accelerated = has_triton() and (ids.is_cuda or ids.is_xpu)
    if not sort and stays_unsorted(ids, num_experts, expert_map, accelerated):
        experts = ids.flatten() if accelerated else expert_of_pair_op(ids, num_experts)
        return Alignment(ids, num_experts, block_size, None, experts, experts[:0])
    run = kernels("align").moe_align_block_size if direct(ids, expert_map) else moe_align_block_size_op
    sorted_ids, expert_ids, num_padded = run(ids, block_size, num_experts, expert_map)
    return Alignment(ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, expert_map)
