"""What tune.py tries: for each GEMM of a layer the model's configuration, its neighbours, and some by regime."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from cases import Shape

import mx_kernels as mk
from mx_kernels import tuned
from mx_kernels.tuning import JOIN, Config, Problem, choose_config, slots_from

SETS = "near,decode,split,mid,prefill,wide,steps,specialized"
SHARED = 232448  # bytes of shared memory of a program on sm_90


@dataclass(frozen=True)
class Job:
    """One candidate of one GEMM (1 or 2) of a layer; block: pairs of a block of the alignment."""

    shape: Shape
    fmt: str
    tokens: int
    gemm: int
    block: int
    config: Config

    @property
    def pairs(self) -> int:
        return self.tokens * self.shape.top_k


def size_of(shape: Shape, gemm: int) -> tuple[int, int]:
    """(n, k)."""
    return (2 * shape.intermediate, shape.hidden) if gemm == 1 else (shape.hidden, shape.intermediate)


def problem_of(shape: Shape, fmt: str, tokens: int, gemm: int) -> Problem:
    """What the chooser is asked for."""
    n, k = size_of(shape, gemm)
    f = None if fmt == "bf16" else mk.get_format(fmt)
    element = "" if f is None else "e2m1" if f.element.bits == 4 else "e5m2" if f.element.name == "e5m2" else "e4m3"
    return Problem(element, 32 if f is None else f.block, tokens * shape.top_k, shape.experts, -(-n // 16) * 16, k)


def model(shape: Shape, fmt: str, tokens: int, units: int) -> tuple[int, dict[int, Config]]:
    """(pairs of a block, configurations of both GEMMs) that the model takes, measured rows apart."""
    problems = {g: problem_of(shape, fmt, tokens, g) for g in (1, 2)}
    wide = tuned.wgmma(torch.device("cuda", 0))
    block = 16 if tokens * shape.top_k <= 64 else tuned.model_block(problems[1], wide, True)
    slots = {g: slots_from(p, g == 1, block) > 0 for g, p in problems.items()}
    return block, {g: choose_config(p, block, units, specialized=wide, slots=slots[g]) for g, p in problems.items()}


def near(c: Config, pairs: int) -> list[Config]:
    """Every configuration that differs from ``c`` in one respect."""
    if c.specialized:
        found = [replace(c, stages=c.stages - 1), replace(c, stages=c.stages + 1)]
        return found + [replace(c, group=g) for g in (1, 4, 8, 16) if g != c.group]
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
        for stages, group, mask in itertools.product((3, 4), (1, 8), (True, False)):
            out.append(Config(256, 128, step, 8, stages, group=group, levels=3, mask=mask))
    if "steps" in sets:
        out += steps(fmt, pairs, each)
    if "specialized" in sets and each >= 192 and tuned.wgmma(torch.device("cuda", 0)):
        for stages, group in itertools.product((4,) if plain else (4, 5), (1, 4, 8)):
            out.append(Config(256, 128, 64, 4, stages, group=group, specialized=True))
        if plain:
            out += [Config(256, 192, 64, 4, 3, group=group, specialized=True) for group in (1, 4, 8)]
        else:
            out.append(Config(256, 128, 64, 4, 5 if "4" in fmt else 4, specialized=True, join=JOIN))
    if "specialized" in sets and 48 <= each <= 320 and not plain and tuned.wgmma(torch.device("cuda", 0)):
        out += [Config(160, 192, 64, 4, stages, group=g, specialized=True) for stages, g in ((6, 1), (5, 1), (6, 2))]
    return out


def steps(fmt: str, pairs: int, each: float) -> list[Config]:
    """Steps of 64 columns with more stages."""
    out: list[Config] = []
    levels = 3 if each >= 48 else 2
    deep = 5 if "4" in fmt else 4
    if fmt == "bf16":
        if each >= 28:
            out += [Config(256, 128, 64, 8, 4, group=group, levels=3) for group in (1, 4)]
            out += [Config(128, 256, 64, 8, 4, group=group, levels=3) for group in (1, 8)]
            out += [Config(128, 128, 64, 4, 3, levels=3), Config(64, 128, 64, 4, 4, levels=3)]
        return out
    if pairs > 64 and each <= 12:
        out += [Config(16, 128, 64, 4, stages, maxnreg=128) for stages in (5, 6, 8)]
        out.append(Config(16, 128, 128, 4, 5, maxnreg=128))
    if 4 <= each <= 28 and pairs > 64:
        out += [Config(32, 128, 64, 4, stages, levels=2, maxnreg=168) for stages in (4, 6)]
    if 12 <= each <= 100 and pairs > 64:
        out += [Config(64, 128, 64, 4, stages, levels=levels, maxnreg=168) for stages in (4, 5, 6)]
    if 28 <= each <= 100 and tuned.wgmma(torch.device("cuda", 0)):
        out += [Config(96, 128, 64, 4, stages, levels=3, maxnreg=160) for stages in (3, 4)]
    if each >= 28:
        out += [Config(128, 128, 64, 4, stages, group=group, levels=3) for stages in (4, deep) for group in (1, 4, 8)]
        out.append(Config(128, 128, 128, 4, 2, levels=3))
    return out


def jobs(shape: Shape, fmt: str, tokens: list[int], sets: str, units: int) -> list[Job]:
    """All candidates of a batch; of each cell the model's choice is the first.

    A block of the alignment holds the pairs of a configuration; twice as many are tried where that is the model's block, or 256.
    """
    out: list[Job] = []
    for t, gemm in itertools.product(tokens, (1, 2)):
        p = problem_of(shape, fmt, t, gemm)
        block, chosen = model(shape, fmt, t, units)
        first = chosen[gemm]
        found = [first, *(near(first, p.num_pairs) if "near" in sets.split(",") else [])]
        found += candidates(fmt, p.num_pairs, p.num_experts, sets)
        out.append(Job(shape, fmt, t, gemm, block, first))
        for c in dict.fromkeys(found):
            if tuned.legal(c, p, SHARED) and (p.num_pairs > 64 or c.pairs == 16):
                blocks = {c.pairs} | ({2 * c.pairs} & {block, 256} if p.num_pairs > 64 else set())
                out += [Job(shape, fmt, t, gemm, b, c) for b in sorted(blocks)]
    return list(dict.fromkeys(out))


def short(c: Config) -> str:
    """A configuration in a word."""
    flags = (("k", c.split, 1), ("g", c.group, 1), ("L", c.levels, 1), ("r", c.maxnreg, 0), ("j", c.join, 0))
    shown = "".join(f"{name}{value}" for name, value, usual in flags if value != usual)
    marks = "".join(m for m, there in (("n", not c.mask), ("s", c.specialized)) if there)
    return f"{c.pairs}x{c.rows}x{c.step}w{c.warps}s{c.stages}{shown}{marks}"
