"""Alignment of routed pairs and the reduction over a token's experts, in plain PyTorch.

Letters: T tokens, k experts a token, P = T * k pairs (pair p = token * k + slot), E experts in the weights, H hidden size.
No function here reads a value on the host, so all of them also run on an accelerator without waiting for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment import Alignment, capacity


def local_experts(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:  # [T, k] -> [P]
    """The row of the weights that each pair goes to, int64; -1 for a dropped pair.

    Dropped: a negative id, an id not below E (or not below the map's length), a mapped id of -1.
    """
    flat = ids.flatten().to(torch.int64)
    if expert_map is None:
        return torch.where((flat >= 0) & (flat < num_experts), flat, -1)
    known = (flat >= 0) & (flat < expert_map.shape[0])
    if expert_map.shape[0] == 0:
        return torch.full_like(flat, -1)
    local = expert_map.to(torch.int64)[torch.where(known, flat, 0)]
    return torch.where(known & (local >= 0) & (local < num_experts), local, -1)


def needs_no_sorting(pairs: int, num_experts: int, expert_map: Tensor | None) -> bool:
    """Few pairs over many experts: each pair is a block of its own."""
    return expert_map is None and pairs * 4 <= num_experts


def aligned(
    ids: Tensor,  # [T, k]
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted_ids [capacity], expert_ids [capacity / block_size], num_padded [1]), int32, always sorted.

    Within an expert the pairs stay in order.
    """
    local = local_experts(ids, num_experts, expert_map)
    pairs, device = local.numel(), local.device
    slots = capacity(pairs, block_size, num_experts)
    key = torch.where(local < 0, num_experts, local)  # dropped pairs sort last
    order = torch.argsort(key, stable=True)
    key = key[order]
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    count = count.scatter_add(0, key, torch.ones_like(key))
    padded = (count[:-1] + block_size - 1) // block_size * block_size
    end = padded.cumsum(0)
    total = end[-1:]
    start = torch.cat((end - padded, total.new_full((1,), slots)))  # dropped pairs start past the last slot
    rank = torch.arange(pairs, device=device) - (count.cumsum(0) - count)[key]
    slot = torch.where(key < num_experts, start[key] + rank, slots)
    sorted_ids = torch.full((slots + 1,), pairs, dtype=torch.int32, device=device)
    sorted_ids = sorted_ids.scatter(0, slot, order.to(torch.int32))[:slots]
    first = torch.arange(0, slots, block_size, device=device)
    expert = torch.searchsorted(end, first, right=True)
    expert_ids = torch.where(first < total, expert, -1).to(torch.int32)
    return sorted_ids.contiguous(), expert_ids, total.to(torch.int32)


def moe_align_block_size(
    ids: Tensor,  # [T, k]
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,  # [E_global]
    *,
    sort: bool = False,
) -> Alignment:
    """Group pairs by expert into blocks of ``block_size``; see ``mx_kernels.moe_align_block_size``."""
    ids = ids.to(torch.int32)
    if not sort and needs_no_sorting(ids.numel(), num_experts, expert_map):
        experts = local_experts(ids, num_experts, None).to(torch.int32)
        return Alignment(ids, num_experts, block_size, None, experts, experts[:0])
    sorted_ids, expert_ids, num_padded = aligned(ids, block_size, num_experts, expert_map)
    return Alignment(ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, expert_map)


def pair_experts(  # -> [P]
    sorted_ids: Tensor | None,  # [capacity]
    expert_ids: Tensor,  # [capacity / block_size] or [P]
    num_padded: Tensor,  # [1]
    block_size: int,
    num_pairs: int,
    num_experts: int,
) -> Tensor:
    """The inverse of the alignment: the expert of each pair, int64; -1 for a dropped one."""
    expert_ids = expert_ids.to(torch.int64)
    if sorted_ids is None:
        return torch.where((expert_ids >= 0) & (expert_ids < num_experts), expert_ids, -1)
    slot = torch.arange(sorted_ids.shape[0], device=sorted_ids.device)
    used = (slot < num_padded) & (sorted_ids < num_pairs)
    pair = torch.where(used, sorted_ids.to(torch.int64), num_pairs)
    expert = expert_ids.repeat_interleave(block_size, output_size=sorted_ids.shape[0])
    result = torch.full((num_pairs + 1,), -1, dtype=torch.int64, device=sorted_ids.device)
    return result.scatter(0, pair, expert)[:num_pairs]


def slot_rows(
    x: Tensor,  # [M, K]
    sorted_ids: Tensor,  # [capacity]
    num_padded: Tensor,  # [1]
    num_pairs: int,
    top_k: int,
) -> Tensor:  # [capacity, K]
    """Row ``sorted_ids[r] // top_k`` for each slot r; zeros for a slot without a pair."""
    slot = torch.arange(sorted_ids.shape[0], device=sorted_ids.device)
    used = (slot < num_padded) & (sorted_ids < num_pairs)
    row = torch.where(used, sorted_ids.to(torch.int64), 0) // top_k
    return torch.where(used[:, None], x[row], 0)


def pair_rows(
    x: Tensor,  # [capacity, K]
    sorted_ids: Tensor,  # [capacity]
    num_padded: Tensor,  # [1]
    num_pairs: int,
) -> Tensor:  # [P, K]
    """The inverse: the row of each pair's slot; zeros for a dropped pair."""
    slot = torch.arange(sorted_ids.shape[0], device=sorted_ids.device)
    used = (slot < num_padded) & (sorted_ids < num_pairs)
    pair = torch.where(used, sorted_ids.to(torch.int64), num_pairs)
    return x.new_zeros((num_pairs + 1, x.shape[1])).index_copy(0, pair, torch.where(used[:, None], x, 0))[:num_pairs]


def gather_rows(x: Tensor, tiles: Alignment, *, top_k: int = 1) -> Tensor:  # [M, K] -> [capacity, K]
    """The rows of each slot; see ``mx_kernels.gather_rows``."""
    assert tiles.sorted_ids is not None
    return slot_rows(x, tiles.sorted_ids, tiles.num_padded, tiles.num_pairs, top_k)


def combined(
    y: Tensor,  # [P, H]
    ids: Tensor,  # [T, k]
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
    weights: Tensor | None,  # [T, k]
    out_dtype: torch.dtype,
) -> Tensor:  # [T, H]
    """Sum of the rows of a token's pairs, in float32 and in slot order; the rows of dropped pairs are not read."""
    tokens, k = ids.shape
    kept = (local_experts(ids, num_experts, expert_map) >= 0).view(tokens, k, 1)
    rows = y.view(tokens, k, y.shape[1])
    total = y.new_zeros((tokens, y.shape[1]), dtype=torch.float32)
    for slot in range(k):
        term = rows[:, slot].float()
        if weights is not None:
            term = term * weights[:, slot, None]
        total = total + torch.where(kept[:, slot], term, 0.0)
    return total.to(out_dtype)


def combine(
    y: Tensor,  # [P, H]
    tiles: Alignment,
    *,
    weights: Tensor | None = None,  # [T, k]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [T, H]
    """Reduce the pairs of each token; see ``mx_kernels.combine``."""
    return combined(y, tiles.ids, tiles.num_experts, tiles.expert_map, weights, out_dtype or y.dtype)
