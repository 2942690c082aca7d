"""Alignment of routed pairs: a stable counting sort by expert into padded blocks, without atomics.

    position(pair) = start(expert) + (pairs of the expert in earlier chunks) + (earlier pairs of the expert in this chunk)

Each program places one chunk of CHUNK pairs. Up to FUSED_PAIRS pairs it counts all ids itself, in one launch; beyond, one
launch counts the ids of each chunk and another sums those counts over the chunks. Nothing depends on the order in which
programs run: same inputs, same bits. Naming the experts of the blocks and filling their padding is spread over the programs.
Letters: P pairs, E experts in the weights (EP: the next power of two), C chunks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..alignment import capacity
from .launch import Launch

FUSED_PAIRS = 4096
CHUNK = 128


@triton.jit
def _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP: tl.constexpr):
    """The rows of the weights of pairs ``i`` and whether they have one; 0 where not."""
    e = tl.load(ids + i, mask=i < pairs, other=-1)
    if HAS_MAP:
        e = tl.load(expert_map + e, mask=(e >= 0) & (e < num_global), other=-1)
    kept = (e >= 0) & (e < experts)
    return tl.where(kept, e, 0), kept


@triton.jit
def _count_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [C + 1, EP]
    pairs,
    experts,
    num_global,
    HAS_MAP: tl.constexpr,
    EP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    e, kept = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)
    tl.store(counts + tl.program_id(0).to(tl.int64) * EP + tl.arange(0, EP), tl.histogram(e, EP, mask=kept))


@triton.jit
def _scan_kernel(counts, chunks, EP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts [C + 1, EP], in place: what earlier chunks hold; in the last row what all hold. A program takes COLUMNS experts."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = counts + row.to(tl.int64) * EP + column
        here = tl.load(at, mask=row < chunks, other=0)
        tl.store(at, tl.cumsum(here, 0) - here + total[None, :], mask=row < chunks)
        total += tl.sum(here, 0)
    tl.store(counts + tl.cast(chunks, tl.int64) * EP + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def _align_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [C + 1, EP] where COUNTED
    sorted_ids,  # [capacity]
    expert_ids,  # [capacity / BLOCK]
    num_padded,  # [1]
    pairs,
    experts,
    num_global,
    blocks,  # capacity / BLOCK
    HAS_MAP: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,  # blocks filled at a time
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    first = pid * CHUNK
    i = first + tl.arange(0, CHUNK)
    mine, kept = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)
    if COUNTED:
        total = tl.load(counts + programs.to(tl.int64) * EP + tl.arange(0, EP))
        before = tl.load(counts + pid.to(tl.int64) * EP + tl.arange(0, EP))
    else:
        total = tl.zeros((EP,), tl.int32)
        before = tl.zeros((EP,), tl.int32)
        e, valid = _experts(ids, expert_map, tl.arange(0, TILE), pairs, experts, num_global, HAS_MAP)
        for at in range(0, pairs, TILE):
            # The next tile is on its way while this one is counted.
            j = at + TILE + tl.arange(0, TILE)
            e_next, valid_next = _experts(ids, expert_map, j, pairs, experts, num_global, HAS_MAP)
            here = tl.histogram(e, EP, mask=valid)
            total += here
            if at + TILE <= first:
                before += here
            elif at < first:
                before += tl.histogram(e, EP, mask=valid & (j - TILE < first))
            e, valid = e_next, valid_next
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, 0)
    start = end - padded

    position = tl.gather(start + before, mine, 0)
    for column in tl.static_range(0, CHUNK, 32):
        j = first + column + tl.arange(0, 32)
        other, valid = _experts(ids, expert_map, j, pairs, experts, num_global, HAS_MAP)
        earlier = (mine[:, None] == other[None, :]) & valid[None, :] & (i[:, None] > j[None, :])
        position += tl.sum(earlier.to(tl.int32), 1)
    tl.store(sorted_ids + position, i, mask=kept)

    used = tl.sum(padded, 0)
    for block in range(pid * FILL, blocks, programs * FILL):
        b = block + tl.arange(0, FILL)
        slot = b * BLOCK
        # The block's expert is the number of experts that end before it; its pairs end at start + total.
        passed = end[None, :] <= slot[:, None]
        owner = tl.sum(passed.to(tl.int32), 1)
        holds = (start[None, :] <= slot[:, None]) & (passed == 0)
        last = tl.sum(tl.where(holds, (start + total)[None, :], 0), 1)
        tl.store(expert_ids + b, tl.where(slot < used, owner, -1), mask=b < blocks)
        s = slot[:, None] + tl.arange(0, BLOCK)[None, :]
        nothing = tl.zeros((FILL, BLOCK), tl.int32) + pairs
        tl.store(sorted_ids + s, nothing, mask=(s >= last[:, None]) & (b < blocks)[:, None])
    if pid == 0:
        tl.store(num_padded, used)


def moe_align_block_size(
    ids: Tensor,  # [T, k]
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,  # [E_global]
) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted_ids [capacity], expert_ids [capacity / block_size], num_padded [1]), int32; pairs stay in order in an expert."""
    device = ids.device
    num_global = None if expert_map is None else expert_map.shape[0]
    p = plan(ids.numel(), block_size, num_experts, num_global, device)
    tensors: dict[str, Any] = {"ids": ids, "expert_map": expert_map, "counts": None}
    tensors |= {name: torch.empty(size, dtype=torch.int32, device=device) for name, size in p.sizes.items()}
    for launch, names in p.launches:
        launch(*(tensors[name] for name in names))
    sorted_ids, expert_ids, num_padded = (tensors[name] for name in ("sorted_ids", "expert_ids", "num_padded"))
    if not p.launches:
        num_padded.zero_()
    return sorted_ids, expert_ids, num_padded


@dataclass(frozen=True)
class Plan:
    """The launches of an alignment with the names of their tensors, and the sizes of those (int32) that it makes."""

    sizes: dict[str, int]
    launches: tuple[tuple[Launch, tuple[str, ...]], ...]


@functools.lru_cache(maxsize=4096)
def plan(pairs: int, block_size: int, num_experts: int, num_global: int | None, device: torch.device) -> Plan:
    """No launch for no pairs, one for few, three for many."""
    slots = capacity(pairs, block_size, num_experts)
    sizes = {"sorted_ids": slots, "expert_ids": slots // block_size, "num_padded": 1}
    if pairs == 0:
        return Plan(sizes, ())
    bins = max(64, triton.next_power_of_2(num_experts))
    chunks = triton.cdiv(pairs, CHUNK)
    many = pairs > FUSED_PAIRS
    numbers = (pairs, num_experts, num_global or 0)
    fixed = {"HAS_MAP": num_global is not None, "EP": bins, "CHUNK": CHUNK}
    launches = []
    if many:
        sizes["counts"] = (chunks + 1) * bins
        count = Launch(_count_kernel, (chunks,), device, *numbers, **fixed, num_warps=4)
        scan = Launch(_scan_kernel, (bins // 4,), device, chunks, EP=bins, ROWS=1024, COLUMNS=4, num_warps=8)
        launches += [(count, ("ids", "expert_map", "counts")), (scan, ("counts",))]
    place = Launch(
        _align_kernel,
        (chunks,),
        device,
        *numbers,
        slots // block_size,
        **fixed,
        COUNTED=many,
        BLOCK=block_size,
        TILE=min(2048, max(256, triton.next_power_of_2(pairs))),
        FILL=fill_blocks(block_size, bins),
        num_warps=8 if many else 16,
    )
    launches.append((place, ("ids", "expert_map", "counts", "sorted_ids", "expert_ids", "num_padded")))
    return Plan(sizes, tuple(launches))


def fill_blocks(block_size: int, bins: int) -> int:
    """Blocks that a program fills at a time: no more than 16 slots and 16 comparisons a thread."""
    return max(1, min(16, 4096 // block_size, 4096 // bins))
