"""Alignment of routed pairs: a stable counting sort by expert into padded blocks, without atomics.

    position(pair) = start(expert) + (pairs of the expert in earlier chunks) + (earlier pairs of the expert in this chunk)

Up to FUSED_PAIRS pairs one launch does all: each program counts every expert for itself and places the pairs of two, by a running
sum that counts them in the halves of a word. Beyond, one launch counts the pairs of each chunk, one sums those counts over
the chunks, and one compares the pairs of a chunk with each other and places them. Nothing depends on the order in which programs
run: same inputs, same bits. Letters: P pairs, E experts in the weights (EP: the next power of two).
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
from .launch import Launch, early_options, starts_early

FUSED_PAIRS = 2048
FEW_PAIRS = 32768
"""Up to which a chunk has 64 pairs, which are compared in less time; beyond, 128 leave fewer counts to sum (docs/performance.md)."""


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
    zeros, sorted_ids, expert_ids, num_padded, start, total, padded, pid, programs, pairs, slots,
    BLOCK: tl.constexpr, EP: tl.constexpr, OWN: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Name the blocks of OWN experts, fill their padding, and a share of what lies behind all blocks; ZEROS: clear a share of that."""
    used = tl.sum(padded, 0)
    own = pid * OWN + tl.arange(0, OWN)
    there = own < EP
    own = tl.where(there, own, 0)
    first = tl.gather(start, own, 0)
    count = tl.where(there, tl.gather(total, own, 0), 0)
    blocks = (count + BLOCK - 1) // BLOCK
    SPAN: tl.constexpr = triton.next_power_of_2(BLOCK)
    slot = (first + count)[:, None] + tl.arange(0, SPAN)[None, :]
    nothing = tl.zeros((OWN, SPAN), tl.int32) + pairs
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
    if ZEROS:
        for at in range(pid * 256, slots // BLOCK, programs * 256):
            block = at + tl.arange(0, 256)
            tl.store(zeros + block, tl.zeros((256,), tl.int32), mask=block < slots // BLOCK)
    if pid == 0:
        tl.store(num_padded, used)


@triton.jit
def _align_kernel(
    ids,  # [P]
    expert_map,
    zeros,  # [slots / BLOCK]
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
    ZEROS: tl.constexpr,
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
        zeros, sorted_ids, expert_ids, num_padded, start, total, padded, group, tl.num_programs(0), pairs, slots,
        BLOCK, EP, GROUP, ZEROS,
    )  # fmt: skip


@triton.jit
def _count_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [chunks + 1, EP]
    pairs,
    experts,
    num_global,
    HAS_MAP: tl.constexpr,
    EP: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many pairs of each expert a chunk holds."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = _experts(ids, expert_map, tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), pairs, experts, num_global, HAS_MAP)
    count = tl.histogram(tl.where(e >= 0, e, 0), EP, mask=e >= 0)
    tl.store(counts + tl.program_id(0).to(tl.int64) * EP + tl.arange(0, EP), count)


@triton.jit
def _scan_kernel(counts, chunks, EP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """counts [chunks + 1, EP], in place: what earlier chunks hold; in the last row what all hold. A program takes COLUMNS experts."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
def _place_kernel(
    ids,  # [P]
    expert_map,
    counts,  # [chunks + 1, EP]
    zeros,  # [slots / BLOCK]
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
    CHUNK: tl.constexpr,
    OWN: tl.constexpr,
    ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up what is in front of each pair: the experts before its own, their pairs in earlier chunks, and those in this one."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    first = pid * CHUNK
    i = first + tl.arange(0, CHUNK)
    mine = _experts(ids, expert_map, i, pairs, experts, num_global, HAS_MAP)  # there already before the counts are
    position = tl.zeros((CHUNK,), tl.int32)
    for column in tl.static_range(0, CHUNK, 32):
        j = first + column + tl.arange(0, 32)
        other = _experts(ids, expert_map, j, pairs, experts, num_global, HAS_MAP)
        position += tl.sum(((mine[:, None] == other[None, :]) & (i[:, None] > j[None, :])).to(tl.int32), 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.load(counts + programs.to(tl.int64) * EP + tl.arange(0, EP))
    before = tl.load(counts + pid.to(tl.int64) * EP + tl.arange(0, EP))
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    position += tl.gather(start + before, tl.where(mine >= 0, mine, 0), 0)
    tl.store(sorted_ids + position, i, mask=mine >= 0)
    _fill(
        zeros, sorted_ids, expert_ids, num_padded, start, total, padded, pid, programs, pairs, slots, BLOCK, EP, OWN, ZEROS
    )  # fmt: skip


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
    """No launch for no pairs, one for few, three for many. Where products start early, a zero for each block too."""
    slots = capacity(pairs, block_size, num_experts)
    sizes = {"sorted_ids": slots, "expert_ids": slots // block_size, "num_padded": 1}
    zeros = starts_early("product", pairs, device)  # in which they count their tiles
    sizes |= {"zeros": slots // block_size} if zeros else {}
    if pairs == 0:
        return Plan(sizes, ())
    bins = max(64, triton.next_power_of_2(num_experts))
    numbers = (pairs, num_experts, num_global or 0)
    given, made = ("ids", "expert_map"), ("zeros" if zeros else "num_padded", "sorted_ids", "expert_ids", "num_padded")
    fixed: dict[str, Any] = {"HAS_MAP": num_global is not None, "EP": bins}
    lets = any(starts_early(behind, pairs, device) for behind in ("place", "product", "rebase_rows"))
    first = fixed | early_options(starts_early("align", pairs, device), lets)
    if pairs <= FUSED_PAIRS:
        tile = max(128, triton.next_power_of_2(pairs))
        run = Launch(
            *(_align_kernel, (-(-num_experts // 2),), device, *numbers, slots),
            **first,
            BLOCK=block_size,
            TILE=tile,
            GROUP=2,
            ZEROS=zeros,
            num_warps=align_warps(tile),
        )
        return Plan(sizes, ((run, given + made),))
    chunk = 64 if pairs <= FEW_PAIRS else 128
    chunks = -(-pairs // chunk)
    rows = min(1024, max(256, triton.next_power_of_2(chunks)))
    columns = 2 if chunks > 512 and bins <= 128 else 4
    sizes |= {"counts": (chunks + 1) * bins}
    later = early_options(starts_early("place", pairs, device), lets)
    count = Launch(*(_count_kernel, (chunks,), device, *numbers), **first, CHUNK=chunk, num_warps=4)
    scan = Launch(
        *(_scan_kernel, (bins // columns,), device, chunks), EP=bins, ROWS=rows, COLUMNS=columns, **later, num_warps=4
    )
    place = Launch(
        *(_place_kernel, (chunks,), device, *numbers, slots),
        **fixed,
        **later,
        BLOCK=block_size,
        CHUNK=chunk,
        OWN=max(2, triton.next_power_of_2(-(-bins // chunks))),
        ZEROS=zeros,
        num_warps=4,
    )
    steps = ((count, (*given, "counts")), (scan, ("counts",)), (place, (*given, "counts", *made)))
    return Plan(sizes, steps)


def align_warps(tile: int) -> int:
    """Four pairs a thread, in 4 to 16 warps."""
    return max(4, min(16, tile // 128))
