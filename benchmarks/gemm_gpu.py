"""How fast is the packed grouped GEMM? Both GEMMs of MoE layers over launch configurations, cold weights, CUDA graphs.

python benchmarks/gemm_gpu.py --out DIR [--models gpt-oss-120b ...] [--formats mxfp4 ...] [--tokens 1 4 ...] [--sets ...]

Every configuration is compiled first, in parallel. A cell is the median of replays of a graph that holds several layers with
different routings and weight copies; roofline = max(weight bytes / 4587 GB/s, flops / 797 TFLOP/s), measured on an H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import mx_kernels as mk
from mx_kernels.packed_gemm import flat_product
from mx_kernels.packing import PackedWeight
from mx_kernels.tuning import Config, Problem, block_pairs, choose_config

OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
SILU = mk.Activation("silu")
MODELS = {  # experts, top-k, hidden, intermediate, activation, bias
    "gpt-oss-120b": (128, 4, 2880, 2880, OAI, True),
    "qwen3-30b-a3b": (128, 8, 2048, 768, SILU, False),
    "mixtral-8x7b": (8, 2, 4096, 14336, SILU, False),
}
BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8_e4m3": 8.25, "bf16": 16}
BANDWIDTH, FLOPS = 4587e9, 797e12
ROUNDS = 3


def empty_weight(name: str, experts: int, n: int, k: int, act: mk.Activation | None, device: str) -> PackedWeight:
    """Random codes in the packed layout, without packing anything."""
    gated, layout = act is not None, act.layout if act else "concatenated"
    if name == "bf16":
        data = torch.empty((experts, n, k), dtype=torch.bfloat16, device=device)
        if device != "meta":
            data.normal_()
        none = (None, None, None, None)
        return PackedWeight(data, *none, torch.Size((experts, n, k)), None, None, torch.bfloat16, gated, layout)
    f = mk.get_format(name)
    unit = 32 if f.element.bits == 8 else 64
    per = 128 // f.block
    rows = -(-n // 256) * 256
    low, high = {"mxfp4": (236, 247), "nvfp4": (60, 110), "mxfp8_e4m3": (228, 239)}[name]
    if device == "meta":
        data = torch.empty((experts, k // unit, n // 16, 512), dtype=torch.uint8, device=device)
        scale = torch.empty((experts, -(-k // 128), rows, per), dtype=torch.uint8, device=device)
    else:
        data = torch.randint(0, 256, (experts, k // unit, n // 16, 512), dtype=torch.uint8, device=device)
        scale = torch.randint(low, high, (experts, -(-k // 128), rows, per), dtype=torch.uint8, device=device)
    alpha = torch.ones(experts, device=device) if f.has_global_scale else None
    shape = torch.Size((experts, n, k))
    return PackedWeight(data, scale, alpha, None, None, shape, f, f.default_rule, torch.bfloat16, gated, layout)


def candidates(name: str, pairs: int, experts: int, which: str) -> list[Config]:
    """Configurations worth a look; ``which`` names sets: chosen, decode, split, mid, prefill."""
    plain = name == "bf16"
    each = pairs / experts
    step = 64 if plain else 128
    out: list[Config] = []
    sets = which.split(",")
    if "decode" in sets and (each <= 12 or pairs <= 64):
        for stages, regs in ((4, 128), (3, 128), (4, 0)):
            out.append(Config(16, 128, 128, 4, stages, maxnreg=0 if plain else regs))
        if plain:
            out += [Config(16, 128, 64, 4, stages) for stages in (4, 6, 8)]
    if "split" in sets and pairs <= 32 and not plain:
        out += [Config(16, 128, 128, 4, stages, split, maxnreg=128) for split in (2, 4) for stages in (3, 4)]
    if "mid" in sets and 2 <= each <= 128 and pairs > 64:
        shapes = ((32, 1, 3), (32, 2, 3), (32, 2, 4), (64, 2, 2), (64, 2, 3), (64, 2, 4), (64, 3, 3))
        for block, levels, stages in shapes:
            if block / 4 <= each * 2 and each <= 2.5 * block:
                out.append(Config(block, 128, step, 4, stages, levels=levels, maxnreg=0 if plain else 168))
    if "prefill" in sets and each >= 24:
        for group, levels, stages in itertools.product((1, 8), (2, 3), (2, 3)):
            out.append(Config(128, 128, step, 4, stages, group=group, levels=levels, mask=True))
            if stages == 3 and group == 8:
                out.append(Config(128, 256, step, 8, stages, group=group, levels=levels, mask=True))
                out.append(Config(128, 128, step, 8, stages, group=group, levels=levels, maxnreg=128))
        out.append(Config(128, 128, step, 8, 2, group=8, levels=2, maxnreg=128))
        if each >= 256:
            out.append(Config(128, 128, step, 4, 3, group=8, levels=3, mask=False))
            out.append(Config(128, 256, step, 8, 3, group=8, levels=3, mask=False))
            out.append(Config(128, 256, step, 8, 3, group=16, levels=3, mask=False))
    if "steps" in sets and not plain:
        deep = 5 if name == "mxfp4" else 4
        if pairs > 64 and each <= 12:
            out += [Config(16, 128, 64, 4, stages, maxnreg=128) for stages in (5, 6, 8)]
            out.append(Config(16, 128, 128, 4, 5, maxnreg=128))
        if 4 <= each <= 28:
            for stages in (4, 6):
                out.append(Config(32, 128, 64, 4, stages, levels=2, maxnreg=168))
            out.append(Config(32, 128, 128, 4, 3, levels=2, maxnreg=168))
        if 12 <= each <= 100:
            out.append(Config(64, 128, 128, 4, 3, levels=3 if each >= 48 else 2, maxnreg=168))
            for stages in (4, 5, 6):
                out.append(Config(64, 128, 64, 4, stages, levels=3 if each >= 48 else 2, maxnreg=168))
        if each >= 28:
            out.append(Config(128, 128, 64, 4, deep, levels=3))
            if each >= 96:
                out.append(Config(128, 128, 128, 4, 3 if name == "mxfp4" else 2, levels=3))
            if each >= 256:
                out.append(Config(128, 128, 64, 4, deep, group=8, levels=3))
                out.append(Config(128, 128, 64, 4, deep, group=4, levels=3))
                out.append(Config(128, 256, 128, 8, 3, levels=3, mask=False))
            if name == "nvfp4":
                out.append(Config(128, 128, 64, 4, 5, levels=3))
    if "steps" in sets and plain and each >= 28:
        out.append(Config(256, 128, 64, 8, 4, levels=3))
        out.append(Config(256, 128, 64, 8, 4, group=4, levels=3))
        out.append(Config(128, 256, 64, 8, 4, levels=3))
        out.append(Config(128, 256, 64, 8, 4, group=8, levels=3))
        out.append(Config(128, 128, 64, 4, 3, levels=3))
        out.append(Config(64, 128, 64, 4, 4, levels=3))
    return list(dict.fromkeys(out))


def product(x, w, tiles, top_k, bias, act, weight, config):
    """``packed_product`` with a given configuration."""
    import mx_kernels.kernels.grouped_gemm as kernel

    args = flat_product(x, w, tiles, top_k, mk.Epilogue(bias, act), weight, torch.bfloat16)
    return kernel.grouped_gemm_packed(*args, config)


def problem(model: str, tokens: int, device: str):
    experts, k, hidden, inner, _, has_bias = MODELS[model]
    pairs = tokens * k
    x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=device)
    a = torch.empty((pairs, inner), dtype=torch.bfloat16, device=device)
    if device != "meta":
        x.normal_()
        a.normal_()
    b1 = torch.zeros((experts, 2 * inner), dtype=torch.bfloat16, device=device) if has_bias else None
    b2 = torch.zeros((experts, hidden), dtype=torch.bfloat16, device=device) if has_bias else None
    weight = torch.ones(pairs, device=device)
    return x, a, b1, b2, weight


def fake_tiles(pairs: int, k: int, experts: int, block: int) -> mk.Alignment:
    """The alignment's shapes, to compile for."""
    i32 = {"dtype": torch.int32, "device": "meta"}
    ids = torch.empty((pairs // k, k), **i32)
    if pairs <= 64:
        return mk.Alignment(ids, experts, block, None, torch.empty(pairs, **i32), torch.empty(0, **i32))
    slots = (pairs + experts * (block - 1)) // block * block
    parts = (torch.empty(slots, **i32), torch.empty(slots // block, **i32), torch.empty(1, **i32))
    return mk.Alignment(ids, experts, block, *parts)


def compile_one(job) -> str | None:
    """Fill Triton's cache with one configuration (runs in a process of its own, on meta tensors)."""
    import mx_kernels.kernels.grouped_gemm as kernel

    model, name, tokens, gemm, config = job
    experts, k, hidden, inner, act, _ = MODELS[model]

    def warm(plan, tensors):
        kernel._grouped_gemm_packed_kernel.warmup(*tensors, *plan.sizes, *plan.constants, grid=(1,), **plan.options)

    kernel._launch = warm
    x, a, b1, b2, weight = problem(model, tokens, "meta")
    tiles = fake_tiles(tokens * k, k, experts, config.pairs)
    try:
        if gemm == 1:
            product(x, empty_weight(name, experts, 2 * inner, hidden, act, "meta"), tiles, k, b1, act, None, config)
        else:
            product(a, empty_weight(name, experts, hidden, inner, None, "meta"), tiles, 1, b2, None, weight, config)
    except Exception as error:
        return f"{job}: {error!r:.300}"
    return None


def median(graph, replays: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    graph.replay()
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in events) * 1e3


def captured(run, layers: int):
    """A graph of ``layers`` calls."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    return graph


def replayed(graph, layers: int, budget: float) -> float:
    """Microseconds a layer."""
    first = median(graph, 2)
    return median(graph, max(4, min(25, int(budget * 1e3 / first)))) / layers


def timed(run, layers: int, budget: float) -> float:
    """Microseconds a layer."""
    return replayed(captured(run, layers), layers, budget)


def both(first, second):
    """One after the other."""

    def run(layer):
        first(layer)
        second(layer)

    return run


def routings(model: str, tokens: int, layers: int) -> list[torch.Tensor]:
    experts, k = MODELS[model][:2]
    if tokens == 1:
        order = torch.randperm(experts)
        return [order[torch.arange(r * k, r * k + k) % experts][None].int().cuda() for r in range(layers)]
    return [torch.rand(tokens, experts, device="cuda").topk(k, 1).indices.int() for _ in range(layers)]


def jobs(args) -> list[tuple]:
    out = []
    for model, name, tokens in itertools.product(args.models, args.formats, args.tokens):
        experts, k, hidden, inner, *_ = MODELS[model]
        pairs = tokens * k
        for gemm, n, width in ((1, 2 * inner, hidden), (2, hidden, inner)):
            found = candidates(name, pairs, experts, args.sets)
            if "chosen" in args.sets:
                block = 16 if pairs <= 64 else block_pairs(pairs, experts, name == "bf16")
                element = "" if name == "bf16" else "e4m3" if "8" in name else "e2m1"
                p = Problem(element, 16 if name == "nvfp4" else 32, pairs, experts, n, width)
                found.insert(0, replace(choose_config(p, block), pdl=False))
            for c in dict.fromkeys(found):
                if name == "bf16" and width % c.step:
                    c = replace(c, step=64)
                if c.split <= width // c.step:
                    out.append((model, name, tokens, gemm, c))
    return list(dict.fromkeys(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(BITS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--sets", default="chosen,decode,split,mid,prefill")
    parser.add_argument("--budget", type=float, default=15, help="milliseconds of measuring a cell")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new cell is started")
    args = parser.parse_args()
    begun = time.time()
    todo = jobs(args)
    kinds = {}
    for j in todo:  # one compilation serves every number of tokens with the same route
        route = (j[2] * MODELS[j[0]][1] <= 64, j[2] == 1)
        kinds.setdefault((*j[:2], *j[3:], route), j)
    with multiprocessing.get_context("fork").Pool() as pool:
        failed = [r for r in pool.map(compile_one, kinds.values(), chunksize=1) if r]
    print(f"{len(kinds)} kernels compiled in {time.time() - begun:.0f} s; failed: {failed[:3]}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model, name in itertools.product(args.models, args.formats):
        experts, _, hidden, inner, act, _ = MODELS[model]
        copies = 2 if hidden * inner > 4e6 else 4
        w1 = [empty_weight(name, experts, 2 * inner, hidden, act, "cuda") for _ in range(copies)]
        w2 = [empty_weight(name, experts, hidden, inner, None, "cuda") for _ in range(copies)]
        for tokens in args.tokens:
            if time.time() - begun > args.limit:
                break
            rows += measure(
                model, name, tokens, w1, w2, [j for j in todo if j[:3] == (model, name, tokens)], args.budget
            )
            (args.out / "gemm.json").write_text(json.dumps(rows))
        del w1, w2
    print(f"{time.time() - begun:.0f} s")


def measure(model, name, tokens, w1, w2, todo, budget) -> list[dict]:
    experts, k, hidden, inner, act, _ = MODELS[model]
    pairs = tokens * k
    layers = {1: 16, 4: 16, 16: 8, 64: 6}.get(tokens, 4 if tokens < 1024 else 2)
    x, a, b1, b2, weight = problem(model, tokens, "cuda")
    ids = routings(model, tokens, layers)
    active = statistics.mean(len(i.unique()) for i in ids)
    tiles: dict[int, list] = {}
    for block in {j[4].pairs for j in todo}:
        if pairs <= 64:
            tiles[block] = [mk.Alignment(i, experts, 16, None, i.flatten(), i.flatten()[:0]) for i in ids]
        else:
            tiles[block] = [
                mk.Alignment(i, experts, block, *mk.reference.moe.aligned(i, block, experts, None)) for i in ids
            ]

    def gemm1(c):
        return lambda r: product(x, w1[r % len(w1)], tiles[c.pairs][r], k, b1, act, None, c)

    def gemm2(c):
        return lambda r: product(a, w2[r % len(w2)], tiles[c.pairs][r], 1, b2, None, weight, c)

    rows, lines, best = [], [], {}
    for gemm, make, n, width in ((1, gemm1, 2 * inner, hidden), (2, gemm2, hidden, inner)):
        floor = max(active * n * width * BITS[name] / 8 / BANDWIDTH, 2 * pairs * n * width / FLOPS) * 1e6
        graphs = []
        for *_, c in (j for j in todo if j[3] == gemm):
            try:
                graphs.append((captured(make(c), layers), c))
            except Exception as error:
                print(f"  {model} {name} T={tokens} GEMM{gemm} {short(c)}: {error!r:.200}", flush=True)
                if "CUDA error" in str(error):
                    raise SystemExit(1) from error
        # In turns, so that no configuration has the cool card for itself.
        turns = [[replayed(graph, layers, budget / ROUNDS) for graph, _ in graphs] for _ in range(ROUNDS)]
        cells = []
        for i, (_, c) in enumerate(graphs):
            us = statistics.median(turn[i] for turn in turns)
            cells.append((us, c))
            rows.append(
                {"model": model, "format": name, "tokens": tokens, "gemm": gemm, "us": us, "floor": floor, **asdict(c)}
            )
        chosen = cells[0]
        cells.sort(key=lambda cell: cell[0])
        best[gemm] = cells
        shown = "  ".join(f"{short(c)} {us:.1f}" for us, c in cells[:5])
        lines.append(f"  GEMM{gemm} floor {floor:.1f} chosen {short(chosen[1])} {chosen[0]:.1f} | {shown}")
    blocks = {c.pairs for _, c in best[1]} & {c.pairs for _, c in best[2]}
    sums = []
    for block in blocks:
        c1, c2 = (next(cell for cell in best[g] if cell[1].pairs == block) for g in (1, 2))
        sums.append((c1[0] + c2[0], c1[1], c2[1]))
    total, c1, c2 = min(sums, key=lambda s: s[0])
    pair = {}
    for label, d1, d2 in (
        ("plain", c1, c2),
        ("pdl2", c1, replace(c2, pdl=True)),
        ("pdl", replace(c1, pdl=True), replace(c2, pdl=True)),
    ):
        if label != "plain" and tokens > 16:
            continue
        pair[label] = timed(both(gemm1(d1), gemm2(d2)), layers, budget)
    rows.append(
        {"model": model, "format": name, "tokens": tokens, "gemm": "pair", "us": min(pair.values()), "variants": pair}
    )
    print(
        f"{model} {name} T={tokens} pair {' '.join(f'{a} {b:.1f}' for a, b in pair.items())} (sum {total:.1f})",
        *lines,
        sep="\n",
        flush=True,
    )
    return rows


def short(c: Config) -> str:
    flags = "".join(
        f"{a}{b}"
        for a, b, d in (
            ("k", c.split, 1),
            ("g", c.group, 1),
            ("L", c.levels, 1),
            ("r", c.maxnreg, 0),
        )
        if b != d
    )
    return f"{c.pairs}x{c.rows}w{c.warps}s{c.stages}{flags}{'' if c.mask else 'n'}{'' if c.step == 128 else c.step}"


if __name__ == "__main__":
    main()
