"""Measure launch configurations of the packed grouped GEMM, and write those that beat the model into tuned.py.

    python benchmarks/tune.py --out DIR [--shapes gpt-oss-120b ...] [--formats mxfp4 ...] [--tokens 1 4 ...] [--sets ...] [--write FILE]
    python benchmarks/tune.py --from DIR/tune.json ... --write packages/mx-kernels/src/mx_kernels/tuned.py
    python benchmarks/tune.py --dry --out DIR ...           # no GPU: list the candidates and compile them for sm_90

Both GEMMs of an MoE layer, without alignment and combine. Candidates are compiled ahead, a batch (shape, format) at a time on all
cores while the batch before is measured. A cell is the median of replays of a CUDA graph that walks several layers with routings and
weight copies of their own. The blocks of both GEMMs hold equally many pairs, so the best pair of configurations counts; it is
measured again in turns with the model's, its results are compared with the model's, and it becomes rows only if it wins by more
than ``MARGIN``. Writes tune.json (every cell, the rows, device, versions, date) and, with ``--write``, the rows into the file.
Floors: ``cases.Shape.floor_us`` with the ceilings of ``cases.py``. Letters: P pairs, E experts, n weight rows, k columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import FORMATS, Shape, describe, find_shape, routing
from torch import Tensor
from tune_candidates import SETS, Job, jobs, model, problem_of, short, size_of
from tune_rows import merge, render, row_of

import mx_kernels as mk
from mx_kernels import tuned
from mx_kernels.packed_gemm import flat_product
from mx_kernels.packing import PackedWeight
from mx_kernels.tuning import Config, slots_from

MARGIN = 0.03
TURNS = 5  # how often the model's pair and the best one are measured in turns


# --- operands ---


def random_weight(shape: Shape, fmt: str, gemm: int, device: str) -> PackedWeight:
    """Random finite codes in the packed layout, without packing anything; on "meta" nothing but sizes."""
    n, k = size_of(shape, gemm)
    gated, layout = gemm == 1, "concatenated"  # experts are packed so, whatever their activation's layout
    whole = torch.Size((shape.experts, n, k))
    if fmt == "bf16":
        data = torch.empty(whole, dtype=torch.bfloat16, device=device)
        return PackedWeight(
            data.normal_() if device != "meta" else data, *[None] * 4, whole, None, None, data.dtype, gated, layout
        )
    f = mk.get_format(fmt)
    bits = 4 if f.element.bits == 4 else 8
    sizes = (
        (shape.experts, k // (64 if bits == 4 else 32), -(-n // 16), 512),
        (shape.experts, -(-k // 128), -(-n // 256) * 256, 128 // f.block),
    )
    data, scale = (torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    if device != "meta":
        low, high = (60, 110) if f.has_global_scale else (236, 247) if bits == 4 else (228, 239)
        data.random_(0, 256)
        scale.random_(low, high)
        if bits == 8:
            data.bitwise_and_(0xBF)  # no NaN, no infinity
    alpha = torch.ones(shape.experts, device=device) if f.has_global_scale else None
    return PackedWeight(data, scale, alpha, None, None, whole, f, f.default_rule, torch.bfloat16, gated, layout)


@dataclass
class Operands:
    """What both GEMMs of a cell read besides weights; ``biases`` where the model of that shape has them."""

    x: Tensor  # [T, H]
    h: Tensor  # [P, I]
    biases: tuple[Tensor | None, Tensor | None]
    weight: Tensor  # [P]
    slots: dict[int, Tensor] = field(
        default_factory=dict
    )  # h in slot order, by alignment: a layer's GEMM 1 stores it so

    @staticmethod
    def make(shape: Shape, tokens: int, device: str) -> Operands:
        pairs = tokens * shape.top_k
        x, h = (
            torch.empty(size, dtype=torch.bfloat16, device=device)
            for size in ((tokens, shape.hidden), (pairs, shape.intermediate))
        )
        if device != "meta":
            x.normal_()
            h.normal_()
        biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if shape.activation.kind == "swiglu_oai":
            biases = tuple(  # type: ignore[assignment]
                torch.zeros((shape.experts, n), dtype=torch.bfloat16, device=device)
                for n in (2 * shape.intermediate, shape.hidden)
            )
        return Operands(x, h, biases, torch.ones(pairs, device=device))

    def product(self, job_gemm: int, shape: Shape, w: PackedWeight, tiles: mk.Alignment, c: Config) -> Tensor:
        """``packed_product`` with a given configuration, of rows in slot order where a layer has them so: GEMM 1's are gathered."""
        import mx_kernels.kernels.grouped_gemm as kernel

        boxed = (
            c.specialized and slots_from(w.problem(tiles.num_pairs, shape.experts), job_gemm == 1, tiles.block_size) > 0
        )
        if job_gemm == 1:
            epilogue = mk.Epilogue(self.biases[0], shape.activation)
            x = mk.gather_rows(self.x, tiles, top_k=shape.top_k) if boxed else self.x
            args = flat_product(x, w, tiles, 0 if boxed else shape.top_k, epilogue, None, torch.bfloat16)
        else:
            if boxed and id(tiles) not in self.slots:
                self.slots[id(tiles)] = mk.gather_rows(self.h, tiles)
            h = self.slots[id(tiles)] if boxed else self.h
            args = flat_product(
                h, w, tiles, 0 if boxed else 1, mk.Epilogue(self.biases[1]), self.weight, torch.bfloat16
            )
        out: Tensor = kernel.grouped_gemm_packed(*args, c)
        return out


def sizes_of_tiles(pairs: int, k: int, experts: int, block: int) -> mk.Alignment:
    """An alignment on "meta", to compile for."""
    i32 = {"dtype": torch.int32, "device": "meta"}
    ids = torch.empty((pairs // k, k), **i32)  # type: ignore[call-overload]
    if pairs <= 64:
        return mk.Alignment(ids, experts, block, None, ids.flatten(), ids.flatten()[:0])
    slots = (pairs + experts * (block - 1)) // block * block
    parts = (torch.empty(n, **i32) for n in (slots, slots // block, 1))  # type: ignore[call-overload]
    return mk.Alignment(ids, experts, block, *parts)


# --- compiling ---


class Offline:
    """Stands for a GPU driver of Triton, so that ``warmup`` compiles for sm_90 where there is no GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(job: Job) -> str | None:
    """Fill Triton's cache with one configuration (in a process of its own, on meta tensors); what went wrong, or None."""
    import triton

    import mx_kernels.kernels.grouped_gemm as kernel

    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Offline())

    def warm(plan: Any, tensors: Any) -> None:
        tensors = plan.launch.boxed(tensors)
        plan.kernel.warmup(*tensors, *plan.sizes, *plan.constants, grid=(1,), **plan.options)

    kernel._launch = warm
    try:
        tiles = sizes_of_tiles(job.pairs, job.shape.top_k, job.shape.experts, job.block)
        w = random_weight(job.shape, job.fmt, job.gemm, "meta")
        Operands.make(job.shape, job.tokens, "meta").product(job.gemm, job.shape, w, tiles, job.config)
    except Exception as error:  # a candidate that does not compile is one fewer
        return f"{job.shape.name} {job.fmt} T={job.tokens} GEMM{job.gemm} {short(job.config)}: {error!r:.300}"
    return None


def kernels_of(todo: list[Job]) -> list[Job]:
    """One job for each kernel: a compilation serves every number of tokens with the same route."""
    kinds: dict[object, Job] = {}
    for j in todo:
        route = (j.pairs <= 64, j.tokens == 1, j.pairs > j.shape.experts)
        kinds.setdefault((j.shape, j.fmt, j.gemm, j.block, j.config, route), j)
    return list(kinds.values())


# --- measuring ---


def median(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    graph.replay()
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in events) * 1e3


def replayed(graph: torch.cuda.CUDAGraph, layers: int, budget: float) -> float:
    """Microseconds a layer, in about ``budget`` milliseconds."""
    first = median(graph, 2)
    return median(graph, max(4, min(25, int(budget * 1e3 / first)))) / layers


class Cell:
    """One (shape, format, tokens) on the GPU."""

    def __init__(
        self, shape: Shape, fmt: str, tokens: int, weights: dict[int, list[PackedWeight]], budget: float
    ) -> None:
        self.shape, self.fmt, self.tokens, self.weights, self.budget = shape, fmt, tokens, weights, budget
        self.layers = {1: 16, 4: 16, 16: 8, 64: 6}.get(tokens, 4 if tokens < 1024 else 2)
        self.given = Operands.make(shape, tokens, "cuda")
        self.ids = [routing(shape, tokens, seed)[0] for seed in range(self.layers)]
        self.active = statistics.mean(len(i.unique()) for i in self.ids)
        self.tiles: dict[int, list[mk.Alignment]] = {}
        # Dozens of candidates wait at once and nobody reads their results, so their graphs share memory, which lives as long as
        # one of them does.
        self.pool = torch.cuda.graph_pool_handle()
        self.first: torch.cuda.CUDAGraph | None = None

    def run(self, gemm: int, block: int, c: Config) -> Callable[[int], Tensor]:
        """The product of a layer."""
        if block not in self.tiles:
            few = self.tokens * self.shape.top_k <= 64
            self.tiles[block] = [
                mk.Alignment(i, self.shape.experts, 16, None, i.flatten(), i.flatten()[:0])
                if few
                else mk.moe_align_block_size(i, block, self.shape.experts, sort=True)
                for i in self.ids
            ]
        w, tiles = self.weights[gemm], self.tiles[block]
        return lambda r: self.given.product(gemm, self.shape, w[r % len(w)], tiles[r], c)

    def pair(self, block: int, configs: dict[int, Config]) -> Callable[[int], None]:
        """Both products of a layer."""
        first, second = (self.run(g, block, configs[g]) for g in (1, 2))

        def run(r: int) -> None:
            first(r)
            second(r)

        return run

    def graph(self, run: Callable[[int], object]) -> torch.cuda.CUDAGraph:
        """A graph that walks all layers."""
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            for layer in range(self.layers):
                run(layer)
        self.first = self.first or graph
        return graph

    def in_turns(self, runs: list[Callable[[int], object]]) -> list[float]:
        """Medians of several things measured in turns."""
        graphs = [self.graph(run) for run in runs]
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(TURNS):
            order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
            for i in order:
                times[i].append(median(graphs[i], 4) / self.layers)
        return [statistics.median(t) for t in times]

    def agrees(self, gemm: int, a: tuple[int, Config], b: tuple[int, Config]) -> bool:
        """Whether two configurations with their blocks compute the same product, up to the order of their sums."""
        x, y = (self.run(gemm, *c)(0).float() for c in (a, b))
        return bool((x - y).norm() <= 1e-2 * x.norm())


def best_pair(times: dict[int, dict[tuple[int, Config], float]]) -> tuple[int, dict[int, Config]]:
    """The block of pairs, and each GEMM's configuration for it, with the least sum."""
    best: dict[int, dict[int, tuple[float, Config]]] = {}
    for g, found in times.items():
        for (block, c), us in found.items():
            here = best.setdefault(block, {})
            if g not in here or us < here[g][0]:
                here[g] = (us, c)
    block = min((b for b in best if len(best[b]) == 2), key=lambda b: best[b][1][0] + best[b][2][0])
    return block, {g: best[block][g][1] for g in (1, 2)}


def measure(cell: Cell, todo: list[Job], units: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a record for every candidate, rows for tuned.py) of one cell."""
    shape, fmt, tokens = cell.shape, cell.fmt, cell.tokens
    where = {"shape": shape.name, "format": fmt, "tokens": tokens}
    records: list[dict[str, Any]] = []
    times: dict[int, dict[tuple[int, Config], float]] = {1: {}, 2: {}}
    lines = []
    for gemm in (1, 2):
        graphs = []
        for job in (j for j in todo if j.gemm == gemm):
            try:
                graphs.append((job, cell.graph(cell.run(gemm, job.block, job.config))))
            except Exception as error:  # too many resources: the next candidate
                print(f"  {where} GEMM{gemm} {short(job.config)}: {error!r:.200}", flush=True)
                if "CUDA error" in str(error):
                    raise SystemExit(1) from error
        # In turns: the first would have the cool card for itself, which is worth a tenth where the tensor cores are the limit.
        found = [[replayed(graph, cell.layers, cell.budget / 3) for _, graph in graphs] for _ in range(3)]
        for i, (job, _) in enumerate(graphs):
            us = statistics.median(turn[i] for turn in found)
            times[gemm][job.block, job.config] = us
            records.append({**where, "gemm": gemm, "us": us, "block": job.block, "config": asdict(job.config)})
        best = sorted(times[gemm].items(), key=lambda found: found[1])[:4]
        lines.append(f"  GEMM{gemm} " + "  ".join(f"{block}:{short(c)} {us:.1f}" for (block, c), us in best))
    model_block, base = model(shape, fmt, tokens, units)
    block, best_of = best_pair(times)
    if block == model_block:  # a GEMM that gains nothing keeps the model's configuration
        for g in (1, 2):
            if times[g][block, best_of[g]] > (1 - MARGIN) * times[g][block, base[g]]:
                best_of[g] = base[g]
    pairs = {"model": (model_block, base), "found": (block, best_of)}
    us_of = dict(zip(pairs, cell.in_turns([cell.pair(*p) for p in pairs.values()]), strict=True))
    records.append({**where, "gemm": "pair", "us": us_of})
    rows: list[dict[str, Any]] = []
    if us_of["found"] < (1 - MARGIN) * us_of["model"]:
        for g in (g for g in (1, 2) if (block, best_of[g]) != (model_block, base[g])):
            new, old = (block, best_of[g]), (model_block, base[g])
            if not cell.agrees(g, old, new):
                print(f"  {where} GEMM{g} {short(best_of[g])} differs from {short(base[g])}: no row", flush=True)
                rows.clear()
                break
            now = cell.in_turns([cell.run(g, *new), cell.run(g, *old)])
            rows.append(row_of(problem_of(shape, fmt, tokens, g), block, best_of[g], *now))
    floor = shape.floor_us(fmt, tokens, cell.active)
    print(
        f"{shape.name} {fmt} T={tokens}: " + ", ".join(f"{name} {t:.1f}" for name, t in us_of.items()),
        f"us, floor {floor:.1f}, {len(rows)} rows",
        *(f"\n{line}" for line in lines),
        flush=True,
    )
    return records, rows


def save(
    args: argparse.Namespace, where: dict[str, Any], records: list[Any], rows: list[Any], cells: list[Any]
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"where": where, "records": records, "rows": rows, "measured": cells}
    (args.out / "tune.json").write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shapes", nargs="+", default=["gpt-oss-120b", "qwen3-30b-a3b", "mixtral-8x7b"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--sets", default=SETS, help=f"of {SETS}")
    parser.add_argument("--budget", type=float, default=15, help="milliseconds of measuring a candidate")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new cell is started")
    parser.add_argument("--processes", type=int, default=None, help="that compile")
    parser.add_argument("--write", type=Path, help="the file whose rows are replaced (tuned.py)")
    parser.add_argument(
        "--from", dest="sources", nargs="+", type=Path, help="tune.json files to take rows from; needs no GPU"
    )
    parser.add_argument("--dry", action="store_true", help="compile for sm_90 only")
    args = parser.parse_args()
    if args.sources:
        results = [json.loads(path.read_text()) for path in args.sources]
        text = render(*merge(tuned.RUNS, tuned.ROWS, results))
        if args.write:
            args.write.write_text(render(*merge(tuned.RUNS, tuned.ROWS, results), into=args.write.read_text()))
        print(text)
        return 0
    begun = time.time()
    units = 132 if args.dry else 0
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:  # before CUDA starts in this process
        if not args.dry:
            if not torch.cuda.is_available():
                raise SystemExit("benchmarks/tune.py measures a GPU, and there is none here: --dry compiles only")
            units = torch.cuda.get_device_properties(0).multi_processor_count
        batches = {}
        for name, fmt in itertools.product(args.shapes, args.formats):
            todo = jobs(find_shape(name), fmt, args.tokens, args.sets, units)
            kernels = kernels_of(todo)
            batches[name, fmt] = (todo, len(kernels), pool.map_async(compile_one, kernels, chunksize=1))
        where: dict[str, Any] = {} if args.dry else {**describe(), "units": units}
        records: list[Any] = []
        rows: list[Any] = []
        cells: list[Any] = []
        for (name, fmt), (todo, count, compiled) in batches.items():
            failed = [r for r in compiled.get() if r]
            print(
                f"{name} {fmt}: {count} kernels compiled at {time.time() - begun:.0f} s, {len(failed)} failed",
                flush=True,
            )
            print(*(f"  {line}\n" for line in failed[:3]), sep="", end="")
            if args.dry:
                continue
            shape = find_shape(name)
            copies = 2 if shape.weight_bytes(fmt, shape.experts) > 2e8 else 4
            weights = {g: [random_weight(shape, fmt, g, "cuda") for _ in range(copies)] for g in (1, 2)}
            for tokens in args.tokens:
                if time.time() - begun > args.limit:
                    print(f"{name} {fmt} T={tokens}: not measured, {args.limit:.0f} s are over")
                    continue
                cell = Cell(shape, fmt, tokens, weights, args.budget)
                more, new = measure(cell, [j for j in todo if j.tokens == tokens], units)
                records += more
                rows += new
                cells += [asdict(problem_of(shape, fmt, tokens, g)) for g in (1, 2)]
                save(args, where, records, rows, cells)
            del weights
    print(f"{time.time() - begun:.0f} s")
    if args.write and not args.dry:
        result = {"where": where, "records": records, "rows": rows, "measured": cells}
        args.write.write_text(render(*merge(tuned.RUNS, tuned.ROWS, [result]), into=args.write.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
