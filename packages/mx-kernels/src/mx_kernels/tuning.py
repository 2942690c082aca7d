"""Launch configurations of the packed grouped GEMM, chosen from host integers alone: a model of the regimes.

Letters: P pairs, E experts, r = P / E pairs an expert, N packed weight rows, K columns, U multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One launch: a program computes ``rows`` weight rows times up to ``pairs`` pairs of one expert.

    step: columns a step of the K loop. split: programs that share the K loop of a tile. group: blocks of pairs that walk the
    weight tiles together. levels: narrower loops (a half, a quarter of ``pairs``) for blocks with few pairs. mask: do not
    load rows of x that are not there. maxnreg: registers a thread, 0 for the compiler's choice. pdl: start before the kernel
    in front has ended (NVIDIA, sm_90 and up).
    """

    pairs: int
    rows: int
    step: int
    warps: int
    stages: int
    split: int = 1
    group: int = 1
    levels: int = 1
    mask: bool = True
    evict: str = ""
    maxnreg: int = 0
    pdl: bool = False


def block_pairs(num_pairs: int, num_experts: int) -> int:
    """The block size for the alignment: a power of two that holds what most experts get, 16 to 128."""
    for block, limit in ((16, 10), (32, 20), (64, 52)):
        if num_pairs <= limit * num_experts:
            return block
    return 128


def choose_config(
    element: str,  # "e2m1", "e4m3", "e5m2" or "" (plain 16-bit weights)
    block: int,
    num_pairs: int,
    num_experts: int,
    n: int,
    k: int,
    units: int,
) -> Config:
    """The configuration for blocks of ``block`` pairs. units: multiprocessors of the device (0 if unknown: 132)."""
    units = units or 132
    rows = min(128, max(64, 1 << (n - 1).bit_length()))
    plain = element == ""
    step = 64 if plain and k % 128 else 128
    each = num_pairs / num_experts
    if block <= 16:
        stages = 5 if plain else (4 if element == "e2m1" else 3)
        tiles = -(-n // rows) * min(num_pairs, num_experts)
        split = 1
        if not plain and num_pairs <= 16:
            while split < 8 and tiles * split * 2 <= 4 * units and -(-k // step) >= 4 * split:
                split *= 2
        return Config(16, rows, step, 4, stages, split, maxnreg=0 if plain else 128)
    if block <= 64:
        return Config(
            block, rows, step, 4, 4 if plain else 3, levels=2 if block == 64 else 1, maxnreg=0 if plain else 168
        )
    wide = n >= 256 and each >= 96
    if wide:
        return Config(block, 256, step, 8, 3, group=8, levels=3, mask=each < 256)
    return Config(block, rows, step, 4, 3, levels=2)
