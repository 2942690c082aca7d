"""Alignment of routed pairs: a stable counting sort by expert into padded blocks, without atomics.

    position(pair) = start(expert) + (pairs of the expert in earlier tiles) + (earlier pairs of the expert in this tile)

A program looks at a tile of TILE pairs for the sake of GROUP experts: a running sum over the tile counts two of them at a time, in the
halves of a word. Up to FUSED_PAIRS pairs one launch does all, each program counting every expert for itself. Beyond, one launch ranks
pairs within their tile, and a second one places them. Nothing depends on the order in which programs run: same inputs, same bits.
Letters: P pairs, E experts in the weights (EP: the next power of two), tiles of TILE pairs.
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
from .launch import Launch, starts_early

FUSED_PAIRS = 2048
TILE = 1024  # pairs that a program ranks; four times as many from MANY pairs on, so that their counts stay few
MANY = 1 << 17
PROGRAMS = 528  # that ranking may take: four on each multiprocessor of an H200
PLACERS = 132
RANK_WARPS = 4


@triton.jit
def _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP: tl.constexpr):
    """The rows of the weights of pairs ``i``, -1 where they have none."""
    e = tl.load(ids + i, mask=i < pairs, other=-1)
    if HAS_MAP:
        e = tl.load(expert_map + e, mask=(e >= 0) & (e < num_global), other=-1)
    return tl.where((e >= 0) & (e < experts), e, -1)


@triton.jit
def _two(e, first):
    """For each pair whether it is of expert ``first`` or the next, and then a one in the low or the high half of a word."""
    apart = (e >> 1) - (first >> 1)
    here = tl.maximum(1 - apart * apart, 0)  # arithmetic: 16 predicates a thread do not fit the machine's six
    return here, here << ((e & 1) * 16)


@triton.jit
def _half(both, e):
    return (both >> ((e & 1) * 16)) & 0xFFFF


@triton.jit
def _fill(
    sorted_ids, expert_ids, num_padded, start, total, padded, pid, programs, pairs, slots,
    BLOCK: tl.constexpr, EP: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Name the blocks of OWN experts, fill their padding, and a share of what lies behind all blocks."""
    used = tl.sum(padded, 0)
    own = pid * OWN + tl.arange(0, OWN)
    there = own < EP
    own = tl.where(there, own, 0)
    first = tl.gather(start, own, 0)
    count = tl.where(there, tl.gather(total, own, 0), 0)
    blocks = (count + BLOCK - 1) // BLOCK
    slot = (first + count)[:, None] + tl.arange(0, BLOCK)[None, :]
    nothing = tl.zeros((OWN, BLOCK), tl.int32) + pairs
    tl.store(sorted_ids + slot, nothing, mask=slot < (first + blocks * BLOCK)[:, None])
    for at in range(0, tl.max(blocks, 0), 64):
        b = at + tl.arange(0, 64)[None, :]
        name = own[:, None] + tl.zeros((OWN, 64), tl.int32)
        tl.store(expert_ids + (first // BLOCK)[:, None] + b, name, mask=b < blocks[:, None])
    for at in range(used + pid * 256, slots, programs * 256):
        rest = at + tl.arange(0, 256)
        tl.store(sorted_ids + rest, tl.zeros((256,), tl.int32) + pairs, mask=rest < slots)
        begins = (rest < slots) & (rest % BLOCK == 0)
        tl.store(expert_ids + rest // BLOCK, tl.full((256,), -1, tl.int32), mask=begins)
    if pid == 0:
        tl.store(num_padded, used)


@triton.jit
def _align_kernel(
    ids,  # [P]
    expert_map,
    sorted_ids,  # [slots], the capacity
    expert_ids,  # [slots / BLOCK]
    num_padded,  # [1]
    pairs,
    experts,
    num_global,
    slots,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """All in one tile: each program places the pairs of GROUP experts."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0)
    i = tl.arange(0, TILE)
    e = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)
    total = tl.histogram(tl.where(e >= 0, e, 0), EP, mask=e >= 0)
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    mine = (e >= 0) & (e // GROUP == group)
    position = tl.gather(start, tl.where(mine, e, 0), 0) - 1
    for first in range(group * GROUP, group * GROUP + GROUP, 2):
        here, one = _two(e, first)
        position += here * _half(tl.cumsum(one, 0), e)
    tl.store(sorted_ids + position, i, mask=mine)
    _fill(
        sorted_ids, expert_ids, num_padded, start, total, padded, group, tl.num_programs(0), pairs, slots, BLOCK, EP, GROUP
    )  # fmt: skip


@triton.jit
def _rank_kernel(
    ids,  # [P]
    expert_map,
    ranks,  # [P], from 1 on
    counts,  # [tiles, EP]
    pairs,
    experts,
    num_global,
    HAS_MAP: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each pair's place among its expert's pairs in its tile, and how many those are."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group, tile = tl.program_id(0), tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    e = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)
    counts += tile.to(tl.int64) * EP
    rank = tl.zeros((TILE,), tl.int32)
    for first in range(group * GROUP, group * GROUP + GROUP, 2):
        here, one = _two(e, first)
        rank += here * tl.cumsum(one, 0)
        count = tl.sum(one, 0)
        tl.store(counts + first, count & 0xFFFF, mask=first < EP)
        tl.store(counts + first + 1, count >> 16, mask=first < EP)
    tl.store(ranks + i, _half(rank, e), mask=(e >= 0) & (e // GROUP == group))


@triton.jit
def _place_kernel(
    ids,  # [P]
    expert_map,
    ranks,  # [P]
    counts,  # [tiles, EP]
    sorted_ids,  # [slots], the capacity
    expert_ids,  # [slots / BLOCK]
    num_padded,  # [1]
    pairs,
    experts,
    num_global,
    slots,
    tiles,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # divides TILE
    ROWS: tl.constexpr,  # of counts at a time
    OWN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up what is in front of each pair: the experts before its own, and their pairs in earlier tiles."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    i = pid * CHUNK + tl.arange(0, CHUNK)
    e = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)  # there already before the ranks are
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rank = tl.load(ranks + i, mask=e >= 0, other=0)
    total = tl.zeros((EP,), tl.int32)
    before = tl.zeros((EP,), tl.int32)
    column = tl.arange(0, EP)[None, :]
    for at in range(0, tiles, ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        here = tl.load(counts + row.to(tl.int64) * EP + column, mask=(row < tiles) & (column < experts), other=0)
        total += tl.sum(here, 0)
        before += tl.sum(tl.where(row < pid * CHUNK // TILE, here, 0), 0)
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    position = tl.gather(start + before, tl.where(e >= 0, e, 0), 0) + rank - 1
    tl.store(sorted_ids + position, i, mask=e >= 0)
    _fill(sorted_ids, expert_ids, num_padded, start, total, padded, pid, programs, pairs, slots, BLOCK, EP, OWN)


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
    tensors: dict[str, Any] = {"ids": ids, "expert_map": expert_map}
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
    """No launch for no pairs, one for few, two for many."""
    slots = capacity(pairs, block_size, num_experts)
    sizes = {"sorted_ids": slots, "expert_ids": slots // block_size, "num_padded": 1}
    if pairs == 0:
        return Plan(sizes, ())
    bins = max(64, triton.next_power_of_2(num_experts))
    numbers = (pairs, num_experts, num_global or 0)
    given, made = ("ids", "expert_map"), ("sorted_ids", "expert_ids", "num_padded")
    early = starts_early("align", pairs, device)
    fixed: dict[str, Any] = {"HAS_MAP": num_global is not None, "EP": bins}
    first = fixed | {"PDL": early, **({"launch_pdl": True} if early else {})}
    if pairs <= FUSED_PAIRS:
        tile = max(128, triton.next_power_of_2(pairs))
        run = Launch(
            *(_align_kernel, (-(-num_experts // 2),), device, *numbers, slots),
            **first,
            BLOCK=block_size,
            TILE=tile,
            GROUP=2,
            num_warps=align_warps(tile),
        )
        return Plan(sizes, ((run, given + made),))
    many = 1 if pairs <= MANY else 4
    tile, warps = TILE * many, RANK_WARPS * many
    tiles = -(-pairs // tile)
    group = 2
    while group < 64 and -(-num_experts // group) * tiles > PROGRAMS:
        group *= 2
    chunk = min(tile, max(128, triton.next_power_of_2(-(-pairs // PLACERS))))
    placers = -(-pairs // chunk)
    early = starts_early("place", pairs, device)
    sizes |= {"ranks": pairs, "counts": tiles * bins}
    rank = Launch(
        *(_rank_kernel, (-(-num_experts // group), tiles), device, *numbers),
        **first | {"PDL": first["PDL"] or early},
        TILE=tile,
        GROUP=group,
        num_warps=warps,
    )
    place = Launch(
        *(_place_kernel, (placers,), device, *numbers, slots, tiles),
        **fixed,
        BLOCK=block_size,
        TILE=tile,
        CHUNK=chunk,
        ROWS=min(triton.next_power_of_2(tiles), max(1, 4096 // bins)),
        OWN=max(2, triton.next_power_of_2(-(-bins // placers))),
        PDL=early,
        **({"launch_pdl": True} if early else {}),
        num_warps=4 if chunk <= 256 else 8,
    )
    return Plan(sizes, ((rank, (*given, "ranks", "counts")), (place, (*given, "ranks", "counts", *made))))


def align_warps(tile: int) -> int:
    """Four pairs a thread, in 4 to 16 warps."""
    return max(4, min(16, tile // 128))
