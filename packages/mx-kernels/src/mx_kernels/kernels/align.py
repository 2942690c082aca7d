"""Alignment of routed pairs: a stable counting sort by expert into padded blocks, without atomics.

    position(pair) = start(expert) + (pairs of the expert in earlier chunks) + (earlier pairs of the expert in this chunk)

Each program places one chunk of pairs. Up to FUSED_PAIRS pairs it counts all ids itself, in one launch; beyond, a first
launch counts the ids of each chunk, and each program sums that table. Nothing depends on the order in which programs run:
same inputs, same bits. The work of filling padding and of naming the blocks' experts is spread over the programs.
Letters: P pairs, E experts in the weights (EP: the next power of two), C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..alignment import capacity
from .launch import launch

FUSED_PAIRS = 16384
_MAX_CHUNKS = 128


@triton.jit
def _experts(ids, expert_map, i, live, pairs, experts, num_global, HAS_MAP: tl.constexpr):
    """The rows of the weights of pairs ``i`` and whether they have one; 0 where not."""
    e = tl.load(ids + i, mask=live & (i < pairs), other=-1)
    if HAS_MAP:
        e = tl.load(expert_map + e, mask=(e >= 0) & (e < num_global), other=-1)
    kept = (e >= 0) & (e < experts)
    return tl.where(kept, e, 0), kept


@triton.jit
def _count_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [C, EP]
    pairs,
    experts,
    num_global,
    chunk,
    HAS_MAP: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0) * chunk
    total = tl.zeros((EP,), tl.int32)
    for at in range(first, tl.minimum(first + chunk, pairs), TILE):
        i = at + tl.arange(0, TILE)
        e, kept = _experts(ids, expert_map, i, i < first + chunk, pairs, experts, num_global, HAS_MAP)
        total += tl.histogram(e, EP, mask=kept)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), total)


@triton.jit
def _align_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [C, EP] where COUNTED
    sorted_ids,  # [capacity]
    expert_ids,  # [capacity / BLOCK]
    num_padded,  # [1]
    pairs,
    experts,
    num_global,
    chunk,
    slots,  # capacity
    HAS_MAP: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    SUB: tl.constexpr,
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    first = pid * chunk
    total = tl.zeros((EP,), tl.int32)
    before = tl.zeros((EP,), tl.int32)
    if COUNTED:
        r = tl.arange(0, 16)[:, None]
        for c in range(0, programs, 16):
            table = tl.load(counts + (c + r) * EP + tl.arange(0, EP)[None, :], mask=c + r < programs, other=0)
            total += tl.sum(table, 0)
            before += tl.sum(tl.where(c + r < pid, table, 0), 0)
    else:
        for at in range(0, pairs, TILE):
            i = at + tl.arange(0, TILE)
            e, kept = _experts(ids, expert_map, i, i >= 0, pairs, experts, num_global, HAS_MAP)
            here = tl.histogram(e, EP, mask=kept)
            total += here
            if at + TILE <= first:
                before += here
            elif at < first:
                before += tl.histogram(e, EP, mask=kept & (i < first))
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, 0)
    used = tl.sum(padded, 0)
    base = end - padded + before

    for at in range(first, tl.minimum(first + chunk, pairs), SUB):
        i = at + tl.arange(0, SUB)
        e, kept = _experts(ids, expert_map, i, i < first + chunk, pairs, experts, num_global, HAS_MAP)
        position = tl.gather(base, e, 0)
        for other in range(at, at + SUB, 32):
            j = other + tl.arange(0, 32)
            f, valid = _experts(ids, expert_map, j, j < first + chunk, pairs, experts, num_global, HAS_MAP)
            f = tl.where(valid, f, -1)
            earlier = (e[:, None] == f[None, :]) & (i[:, None] > j[None, :])
            position += tl.sum(earlier.to(tl.int32), 1)
        tl.store(sorted_ids + position, i, mask=kept)
        base += tl.histogram(e, EP, mask=kept)

    # Padding: slot j after each expert's last pair, then everything past the last block.
    for j in range(pid, BLOCK - 1, programs):
        slot = end - padded + total + j
        tl.store(sorted_ids + slot, tl.full((EP,), 0, tl.int32) + pairs, mask=slot < end)
    for tail in range(used + pid * TILE, slots, programs * TILE):
        s = tail + tl.arange(0, TILE)
        tl.store(sorted_ids + s, tl.full((TILE,), 0, tl.int32) + pairs, mask=s < slots)
    for block in range(pid * 64, slots // BLOCK, programs * 64):
        b = block + tl.arange(0, 64)
        owner = tl.sum((end[None, :] <= (b * BLOCK)[:, None]).to(tl.int32), 1)
        tl.store(expert_ids + b, tl.where(b * BLOCK < used, owner, -1), mask=b < slots // BLOCK)
    if pid == 0:
        tl.store(num_padded, used)


def moe_align_block_size(
    ids: Tensor,  # [T, k]
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted_ids [capacity], expert_ids [capacity / block_size], num_padded [1]), int32; pairs stay in order in an expert."""
    pairs = ids.numel()
    slots = capacity(pairs, block_size, num_experts)
    sorted_ids = torch.empty(slots, dtype=torch.int32, device=ids.device)
    expert_ids = torch.empty(slots // block_size, dtype=torch.int32, device=ids.device)
    if pairs == 0:
        return sorted_ids, expert_ids, torch.zeros(1, dtype=torch.int32, device=ids.device)
    num_padded = torch.empty(1, dtype=torch.int32, device=ids.device)
    bins = max(64, triton.next_power_of_2(num_experts))
    num_global = 0 if expert_map is None else expert_map.numel()
    shape = (pairs, num_experts, num_global)
    counted = pairs > FUSED_PAIRS
    counts, sub = None, 128
    chunk = sub
    if counted:
        sub = 256
        chunk = max(1024, triton.cdiv(triton.cdiv(pairs, _MAX_CHUNKS), sub) * sub)
        counts = torch.empty((triton.cdiv(pairs, chunk), bins), dtype=torch.int32, device=ids.device)
        table = (ids, expert_map, counts, *shape, chunk)
        launch(
            _count_kernel,
            (counts.shape[0],),
            ids.device,
            *table,
            HAS_MAP=expert_map is not None,
            EP=bins,
            TILE=1024,
            num_warps=8,
        )
    launch(
        _align_kernel,
        (triton.cdiv(pairs, chunk),),
        ids.device,
        ids,
        expert_map,
        counts,
        sorted_ids,
        expert_ids,
        num_padded,
        *shape,
        chunk,
        slots,
        HAS_MAP=expert_map is not None,
        COUNTED=counted,
        BLOCK=block_size,
        EP=bins,
        TILE=1024,
        SUB=sub,
        num_warps=8,
    )
    return sorted_ids, expert_ids, num_padded
