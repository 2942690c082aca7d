"""What tune.py tries: for each GEMM of a layer the model's configuration, its neighbours, and some by regime."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from cases import Shape

import mx_kernels as mk
from mx_kernels import tuned
from mx_kernels.tuning import Config, Problem, block_pairs, choose_config

SETS = "chosen,near,decode,split,mid,prefill,wide"
SHARED = 232448  # bytes of shared memory of a program on sm_90


@dataclass(frozen=True)
class Job:
    """One candidate of one GEMM (1 or 2) of a layer."""

    shape: Shape
    fmt: str
    tokens: int
    gemm: int
    config: Config

    @property
    def pairs(self) -> int:
        return self.tokens * self.shape.top_k

    @property
    def size(self) -> tuple[int, int]:
        """(n, k)."""
        s = self.shape
        return (2 * s.intermediate, s.hidden) if self.gemm == 1 else (s.hidden, s.intermediate)


def problem_of(shape: Shape, fmt: str, tokens: int, gemm: int) -> Problem:
    """What the chooser is asked for."""
    n, k = Job(shape, fmt, tokens, gemm, Config(16, 64, 64, 4, 2)).size
    f = None if fmt == "bf16" else mk.get_format(fmt)
    element = "" if f is None else "e2m1" if f.element.bits == 4 else "e5m2" if f.element.name == "e5m2" else "e4m3"
    return Problem(element, 32 if f is None else f.block, tokens * shape.top_k, shape.experts, -(-n // 16) * 16, k)


def model(shape: Shape, fmt: str, tokens: int, units: int) -> dict[int, Config]:
    """What the model takes for both GEMMs, measured rows apart."""
    pairs = tokens * shape.top_k
    block = 16 if pairs <= 64 else block_pairs(pairs, shape.experts, fmt == "nvfp4")
    return {g: choose_config(problem_of(shape, fmt, tokens, g), block, units) for g in (1, 2)}


def near(c: Config, pairs: int) -> list[Config]:
    """Every configuration that differs from ``c`` in one respect."""
    out = [replace(c, stages=s) for s in (c.stages - 1, c.stages + 1) if s >= 2]
    out += [replace(c, levels=v) for v in (c.levels - 1, c.levels + 1) if v >= 1 and c.pairs >> (v - 1) >= 16]
    out += [replace(c, group=g) for g in (1, 4, 8, 16) if c.split == 1 and pairs > 64]
    out += [replace(c, split=s) for s in (1, 2, 4, 8) if pairs <= 64 and c.group == 1]
    out += [replace(c, maxnreg=r) for r in (0, 128, 168)]
    out += [replace(c, mask=not c.mask), replace(c, warps=12 - c.warps), replace(c, step=192 - c.step)]
    out += [replace(c, rows=r, warps=w) for r, w in ((64, 4), (128, 4), (128, 8), (256, 8))]
    return [d for d in out if d != c]


def candidates(fmt: str, pairs: int, experts: int, which: str) -> list[Config]:
    """Configurations worth a look, by regime; ``which`` names the sets."""
    plain = fmt == "bf16"
    each = pairs / experts
    step = 64 if plain else 128
    out: list[Config] = []
    sets = which.split(",")
    if "decode" in sets and (each <= 12 or pairs <= 64):
        out += [
            Config(16, 128, 128, 4, stages, maxnreg=0 if plain else regs)
            for stages, regs in ((4, 128), (3, 128), (4, 0))
        ]
        if plain:
            out += [Config(16, 128, 64, 4, stages) for stages in (4, 6, 8)]
    if "split" in sets and pairs <= 64 and not plain:
        out += [Config(16, 128, 128, 4, stages, split, maxnreg=128) for split in (2, 4) for stages in (3, 4)]
    if "mid" in sets and 2 <= each <= 128 and pairs > 64:
        for block, levels, stages in (
            (32, 1, 3),
            (32, 2, 3),
            (32, 2, 4),
            (64, 2, 2),
            (64, 2, 3),
            (64, 2, 4),
            (64, 3, 3),
        ):
            if block / 4 <= each * 2 and each <= 2.5 * block:
                out.append(Config(block, 128, step, 4, stages, levels=levels, maxnreg=0 if plain else 168))
    if "prefill" in sets and each >= 24:
        for group, levels, stages in itertools.product((1, 8), (2, 3), (2, 3)):
            out.append(Config(128, 128, step, 4, stages, group=group, levels=levels))
        for levels in (2, 3):
            out.append(Config(128, 256, step, 8, 3, group=8, levels=levels, mask=each < 256))
            out.append(Config(128, 128, step, 8, 2, group=8, levels=levels, maxnreg=128))
    if "wide" in sets and each >= 64:
        for stages, bk, levels in itertools.product((2, 3, 4), (64, 128), (1, 3)):
            out.append(Config(256, 128, bk, 8, stages, group=8, levels=levels))
    return out


def jobs(shape: Shape, fmt: str, tokens: list[int], sets: str, units: int) -> list[Job]:
    """All candidates of a batch; of each cell the model's choice is the first."""
    out: list[Job] = []
    for t, gemm in itertools.product(tokens, (1, 2)):
        p = problem_of(shape, fmt, t, gemm)
        first = replace(model(shape, fmt, t, units)[gemm], pdl=False)
        found = [first, *(near(first, p.num_pairs) if "near" in sets.split(",") else [])]
        found += candidates(fmt, p.num_pairs, p.num_experts, sets)
        for c in dict.fromkeys(found):
            if c == first or (tuned.legal(c, p, SHARED) and (p.num_pairs > 64 or c.pairs == 16)):
                out.append(Job(shape, fmt, t, gemm, c))
    return out


def short(c: Config) -> str:
    """A configuration in a word."""
    flags = (("k", c.split, 1), ("g", c.group, 1), ("L", c.levels, 1), ("r", c.maxnreg, 0))
    shown = "".join(f"{name}{value}" for name, value, usual in flags if value != usual)
    return f"{c.pairs}x{c.rows}x{c.step}w{c.warps}s{c.stages}{shown}{'' if c.mask else 'n'}{'p' if c.pdl else ''}"
