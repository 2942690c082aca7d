"""Measured launch configurations of the packed grouped GEMM, and when one of them is used instead of ``tuning.py``'s model.

A row says: on this device, for this problem, this configuration was measured, and by how much it beats the model's choice. It is
used for a problem with the same element and scale block, on the same kind of side of 64 pairs (up to there programs find their
pairs by comparing ids), whose distance is at most half an octave:

    distance = sqrt(sum over r = P / E, A, n, k of log2(ratio of the two problems)^2)

P pairs, E experts, A experts that are hit under uniform routing, n weight rows, k columns. Everything else follows the model.
``benchmarks/tune.py`` writes ``RUNS`` and ``ROWS``, a row only where it won by more than the noise.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch

from .tuning import (
    SHARED,
    UNITS,
    Config,
    Problem,
    block_pairs,
    choose_config,
    shared_bytes,
    specialized_block,
)

NEAR = 0.5  # octaves


@dataclass(frozen=True)
class Run:
    """Where and when rows were measured. device: its ``class_of``; units: its multiprocessors."""

    device: str
    units: int
    torch: str
    triton: str
    date: str


@dataclass(frozen=True)
class Row:
    """One measured problem.

    run: index into ``RUNS``. block: pairs of a block of the alignment. us: of ``config``; model_us: of what the model chose, in
    turns with it, each with its own blocks.
    """

    run: int
    problem: Problem
    block: int
    config: Config
    us: float
    model_us: float


# fmt: off
RUNS: tuple[Run, ...] = (
    Run("H100", 132, "2.11.0+cu130", "3.6.0", "2026-11-25"),
)
ROWS: tuple[Row, ...] = (
    Row(0, Problem("", 32, 2048, 8, 28672, 4096), 256,
        Config(256, 128, 64, 8, 4, group=4, levels=3), 1014.01, 1145.59),
    Row(0, Problem("e4m3", 32, 128, 8, 4096, 14336), 64,
        Config(64, 128, 64, 4, 4, levels=2, maxnreg=168), 160.51, 160.56),
    Row(0, Problem("e4m3", 32, 128, 8, 28672, 4096), 64,
        Config(64, 128, 64, 4, 6, levels=2, maxnreg=168), 322.78, 339.28),
)
# fmt: on


@functools.cache
def place(device: torch.device) -> tuple[str, int]:
    """(``class_of`` its name, multiprocessors) of an accelerator; ("", 0) where there is none."""
    if device.type not in ("cuda", "xpu") or not torch.get_device_module(device.type).is_available():
        return "", 0
    properties = torch.get_device_module(device.type).get_device_properties(device)
    units = getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0)
    return class_of(properties.name), units


def class_of(name: str) -> str:
    """A device's name without maker, memory and form ("H200", "MI300X"): its first word of capitals and digits, else all."""
    found = re.search(r"\b(?=[A-Z]+\d)[A-Z0-9]+\b", name)
    return found.group() if found else name


def distance(a: Problem, b: Problem) -> float:
    """Octaves between two problems; infinite where rows of one say nothing about the other."""
    if (a.element, a.block, a.num_pairs <= 64) != (b.element, b.block, b.num_pairs <= 64):
        return math.inf
    ratios = (
        a.num_pairs * b.num_experts / (a.num_experts * b.num_pairs),
        a.active / b.active,
        a.n / b.n,
        a.k / b.k,
    )
    return math.hypot(*(math.log2(r) for r in ratios))


def nearest(
    p: Problem, where: tuple[str, int], block: int | None, rows: tuple[Row, ...], runs: tuple[Run, ...]
) -> Row | None:
    """The nearest row measured at ``where`` within ``NEAR`` (ties: the first); ``block``: of those with blocks of so many pairs."""
    here = [
        (distance(p, row.problem), row)
        for row in rows
        if (runs[row.run].device, runs[row.run].units) == where and block in (None, row.block)
    ]
    best = min(here, key=lambda found: found[0], default=None)
    return best[1] if best is not None and best[0] <= NEAR else None


def legal(c: Config, p: Problem, shared: int) -> bool:
    """Whether a row's configuration can also serve ``p``: its tiles fit, its split is not finer than the K loop."""
    return (
        shared_bytes(c, p) <= shared
        and c.split <= -(-p.k // c.step)
        and c.rows <= max(64, 2 * p.n)
        and (p.element != "" or p.k % c.step == 0)
    )


def config_for(
    p: Problem,
    block: int,
    device: torch.device,
    units: int = UNITS,
    shared: int = SHARED,
    specialized: bool = False,
    slots: bool = False,
) -> Config:
    """The configuration for blocks of ``block`` pairs: of a near measured row, else the model's. specialized: whether
    ``kernels/specialized.py`` serves this product; slots: whether the rows of x lie in slot order."""
    row = nearest(p, place(device), block, ROWS, RUNS) if ROWS else None
    if row is not None and legal(row.config, p, shared) and (specialized or not row.config.specialized):
        return row.config
    return choose_config(p, block, units, shared, specialized, slots)


def block_for(p: Problem, device: torch.device, slots: bool = False) -> int:
    """Pairs of a block of the alignment for a layer whose first weight is ``p``'s: of a near row, else the model's.

    slots: its tokens may be brought into slot order. A row counts where the model takes the same blocks for it, since it was measured
    against those. Rows are passed over while tracing, where the number of pairs may be a symbol.
    """
    row = None if torch.compiler.is_compiling() or not ROWS else _row(p, device)
    block = model_block(p, wgmma(device), slots)
    return block if row is None or model_block(row.problem, wgmma(device), slots) != block else row.block


def model_block(p: Problem, specialized: bool = False, slots: bool = False) -> int:
    """The model's block size. specialized: on a device with ``wgmma``; slots: tokens may be brought into slot order."""
    block = specialized_block(p, slots) if specialized and p.element else 0
    return block or block_pairs(p.num_pairs, p.num_experts, p.element == "", specialized)


@functools.cache
def wgmma(device: torch.device) -> bool:
    """Whether a device has warpgroup products: NVIDIA's sm_90."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(maxsize=4096)  # asked in every call of a layer
def _row(p: Problem, device: torch.device) -> Row | None:
    return nearest(p, place(device), None, ROWS, RUNS)
