"""What a layer costs besides its speed in a graph: emulation, host time, compilation, memory.

    python benchmarks/layer_gpu.py --out DIR [--shapes gpt-oss-120b ...] [--parts emulation host compile memory]

- emulation: dequantize-on-the-fly experts, CUDA graph, cold weights; the dequantization alone against a copy of this run, for the
  experts that T tokens hit (only those are dequantized). Each layer was checked against float32.
- host: a call outside of a graph. The time in which the host issues it, one of ROW in a row as the layers of a model are, while the
  device is busy with earlier work (median of rows); and the wall time of a call that the host waits for. In turns with the same
  kernels launched one by one instead of as a graph (``kernels/chain.py``).
- compile: seconds from the first call of a new process to its result, with an empty Triton cache and with the cache that this left;
  imports, weights and packing are outside.
- memory: bytes of the packed weights over those of their codes and scales, and the most that a call allocates besides its output.

Prints a table for each part and writes layer_gpu.json and layer_gpu.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Shape, describe, find_shape, routing, time_graph
from ceilings import copy_gb_s
from run import MODES, Task, make_weights, ours, workspace_bytes

import mx_kernels as mk
import mx_moe as mm

Row = dict[str, Any]
ROW = 20


def layer(shape: Shape, fmt: str, mode: str = "a16") -> Any:
    """Our experts with random weights."""
    m = MODES[mode]
    return mm.make_experts(make_weights(shape, fmt), shape.activation, backend=m.backend, inputs=m.inputs)


def call_of(experts: Any, shape: Shape, tokens: int) -> Callable[[], torch.Tensor]:
    x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
    given = mm.Routing(*routing(shape, tokens, 0))
    return lambda: experts(x, given)


# --- emulation ---


def emulation(shape: Shape, formats: list[str], tokens: list[int]) -> list[Row]:
    """Layers that dequantize the experts that were hit, and the rate of that."""
    copy = copy_gb_s()
    rows = []
    for fmt in formats:
        w = make_weights(shape, fmt)
        copies: list[Any] = []
        for t in tokens:
            task = Task(f"mx_{fmt}_emulation", shape, fmt, t, "uniform", MODES["emulation"].tolerance)
            cell = ours(task, MODES["emulation"], w, copies)
            row = {"shape": shape.name, "format": fmt, "tokens": t, "error": cell["error"], "us": cell.get("us")}
            if "failed" in cell:
                rows.append({**row, "failed": cell["failed"]})
                continue
            hit = routing(shape, t, 0)[0].unique()
            moved = len(hit) * (w.w13.nbytes / shape.experts + 4 * shape.intermediate * shape.hidden)
            places = torch.cat((hit.long(), hit.new_full((min(t * shape.top_k, shape.experts) - len(hit),), -1)))
            us = time_graph([functools.partial(mk.dequantize, w.w13, rows=places)] * 3)
            rate = moved / us * 1e-3
            rows.append({**row, "hit": len(hit), "dequantize_w13_us": us, "gb_s": rate, "share_of_copy": rate / copy})
        del w, copies
    return rows


# --- host ---


def issue_us(call: Callable[[], torch.Tensor]) -> float:
    """Microseconds of the host for one of ROW calls."""
    torch.cuda._sleep(20_000_000)  # about ten milliseconds: the device never waits for the host
    begun = time.perf_counter()
    for _ in range(ROW):
        call()
    us = 1e6 * (time.perf_counter() - begun) / ROW
    torch.cuda.synchronize()
    return us


def wall_us(call: Callable[[], torch.Tensor]) -> float:
    """Microseconds until one call's result is there."""
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begun)


def host(shape: Shape, formats: list[str], tokens: list[int], calls: int = 200) -> list[Row]:
    """Host time of a call outside of a graph."""
    rows = []
    launches = importlib.import_module("mx_kernels.kernels.moe")
    ways = {"": launches.chain, "_one_by_one": lambda *_: None}
    for fmt in formats:
        for mode in ("a16", "a8"):
            if MODES[mode].formats is not None and fmt not in MODES[mode].formats:
                continue
            experts = layer(shape, fmt, mode)
            for t in tokens:
                call = call_of(experts, shape, t)
                times: dict[str, list[float]] = {}
                for _ in range(4):
                    for way, launches.chain in ways.items():
                        for name, measure, n in (("host", issue_us, calls // ROW), ("wall", wall_us, calls // 4)):
                            measure(call)
                            times.setdefault(f"{name}{way}_us", []).extend(measure(call) for _ in range(n))
                launches.chain = ways[""]
                row = {"shape": shape.name, "layer": f"mx_{fmt}{MODES[mode].suffix}", "tokens": t}
                rows.append(row | {name: statistics.median(each) for name, each in times.items()})
            del experts
    return rows


# --- compilation ---


def first_call(shape: Shape, fmt: str, tokens: int) -> float:
    """Seconds of this process's first call, until its result is there."""
    call = call_of(layer(shape, fmt), shape, tokens)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def compilation(shape: Shape, formats: list[str], tokens: list[int]) -> list[Row]:
    """First calls in processes of their own: an empty cache, then the cache that the first left.

    Making the weights launches kernels of ours too (quantize, pack); they are compiled before the clock starts.
    """
    rows = []
    for fmt in formats:
        for t in tokens:
            seconds = []
            with tempfile.TemporaryDirectory() as cache:
                for _ in range(2):
                    command = [sys.executable, __file__, "--first-call", shape.name, fmt, str(t)]
                    done = subprocess.run(
                        command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True
                    )
                    if done.returncode:
                        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
                    seconds.append(float(done.stdout.split()[-1]))
            row = {"shape": shape.name, "layer": f"mx_{fmt}", "tokens": t}
            rows.append({**row, "cold_s": seconds[0], "cached_s": seconds[1]})
    return rows


# --- memory ---


def memory(shape: Shape, formats: list[str], tokens: list[int]) -> list[Row]:
    """What a layer holds and what a call allocates."""
    rows = []
    for fmt in formats:
        for mode in ("a16", "a8"):
            if MODES[mode].formats is not None and fmt not in MODES[mode].formats:
                continue
            torch.cuda.empty_cache()
            w = make_weights(shape, fmt)
            plain = w.w13.nbytes + w.w2.nbytes
            m = MODES[mode]
            before = torch.cuda.memory_allocated()
            experts = mm.make_experts(w, shape.activation, backend=m.backend, inputs=m.inputs)
            held = torch.cuda.memory_allocated() - before
            del w
            for t in tokens:
                call = call_of(experts, shape, t)
                call()
                pairs = t * shape.top_k * (shape.intermediate + shape.hidden) * 2
                row = {
                    "shape": shape.name,
                    "layer": f"mx_{fmt}{m.suffix}",
                    "tokens": t,
                    "weights_mib": experts.nbytes / 2**20,
                }
                row |= {"over_codes": experts.nbytes / plain - 1, "held_mib": held / 2**20, "pairs_mib": pairs / 2**20}
                rows.append({**row, "workspace_mib": workspace_bytes(call) / 2**20})
            del experts
    return rows


PARTS = {"emulation": emulation, "host": host, "compile": compilation, "memory": memory}
TOKENS = {"emulation": [1, 16, 64, 256], "host": [1, 64, 1024], "compile": [1, 1024], "memory": [1, 64, 1024, 16384]}
FORMATS = {
    "emulation": ["mxfp8", "mxfp4", "nvfp4"],
    "host": ["bf16", "mxfp8", "mxfp4", "nvfp4"],
    "compile": ["mxfp8", "mxfp4", "nvfp4"],
    "memory": ["bf16", "mxfp8", "mxfp4", "nvfp4"],
}


def text(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def markdown(part: str, rows: list[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"### {part}", "", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(text(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shapes", nargs="+", default=["gpt-oss-120b"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--formats", nargs="+", help="default: those of each part")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: those of each part")
    parser.add_argument("--first-call", nargs=3, metavar=("SHAPE", "FORMAT", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_call:
        name, fmt, tokens = args.first_call
        print(first_call(find_shape(name), fmt, int(tokens)))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/layer_gpu.py measures a GPU, and there is none here", file=sys.stderr)
        return 2
    where = describe()
    head = f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}\n"
    print(head)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    tables = [head]
    for part in args.parts:
        rows: list[Row] = []
        for shape in map(find_shape, args.shapes):
            rows += PARTS[part](shape, args.formats or FORMATS[part], args.tokens or TOKENS[part])
            torch.cuda.empty_cache()
        results[part] = rows
        tables.append(markdown(part, rows))
        print(tables[-1], flush=True)
        (args.out / "layer_gpu.json").write_text(json.dumps({"where": where, **results}, indent=0) + "\n")
        (args.out / "layer_gpu.md").write_text("\n".join(tables))
    return 1 if any("failed" in row for rows in results.values() for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
