"""Offline quantization of a checkpoint on disk, ours beside torchao and llm-compressor: seconds, GB/s of input, peak memory.

    python benchmarks/quantize_offline.py CHECKPOINT [--dir FOLDER] [--formats mxfp8,mxfp4,nvfp4] [--repeats 3] [--only ours,disk]
                                          [--device cuda] [--jobs N] [--cold] [--json]

``make_checkpoint.py`` makes the checkpoint. Every run is a process of its own; its clock starts after imports and one small
call. torchao is a loop over shards by hand, as its users write it: load a tensor, quantize, keep, save the shard; llm-compressor
is its ``model_free_ptq``. Tools that are not installed are left out. The contestants take turns, the median counts, and the
source is read once beforehand, so that it comes from the page cache; with ``--cold`` its pages are dropped before every run.

``disk`` quantizes nothing: it reads the bytes that we read, writes as many as we write, and fsyncs, with as many threads. Whoever
takes as long is bound by the disk. With ``--device`` only it and we run, for the others quantize on the CPU here.

No figure stands for wrong results: our output must pass ``verify_checkpoint`` and equal the reference quantizer on a sample of
weights, bit for bit, and torchao's scales must be ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FORMATS = ("mxfp8", "mxfp4", "nvfp4")
LLM_COMPRESSOR = {"mxfp8": "MXFP8", "mxfp4": "MXFP4", "nvfp4": "NVFP4A16"}


def quantizable(name: str) -> bool:
    """The weights that every contestant quantizes: linears of attention and experts."""
    return name.endswith("_proj.weight")


@dataclass(frozen=True)
class Options:
    """device, jobs: as quantize_checkpoint has them. nbytes: what ``disk`` writes."""

    device: str = "cpu"
    jobs: int | None = None
    nbytes: int = 0


def run_ours(src: str, out: str, fmt: str, options: Options) -> float:
    import torch

    import mx_kernels as mk
    import mx_quant as mq

    # 8 MiB, as in a run: Triton compiles for large tensors what it does not need for small ones.
    mk.quantize(torch.zeros(2048, 2048, device=options.device), fmt)
    start = time.perf_counter()
    mq.quantize_checkpoint(src, out, fmt, device=options.device, jobs=options.jobs)
    return time.perf_counter() - start


def run_disk(src: str, out: str, fmt: str, options: Options) -> float:
    """Read all of ``src`` and write ``options.nbytes`` of it to one file, in pieces of 8 MiB, each thread its own."""
    files = [(f, f.stat().st_size) for f in sorted(Path(src).glob("*.safetensors"))]
    total, piece, written = sum(n for _, n in files), 8 << 20, 0
    tasks = []
    for file, size in files:
        for at in range(0, size, piece):
            n = min(piece, size - at)
            share = n * options.nbytes // total
            tasks.append((file, at, n, written, share))
            written += share
    os.makedirs(out)
    descriptors = {file: os.open(file, os.O_RDONLY) for file, _ in files}
    fd = os.open(Path(out) / "bytes", os.O_WRONLY | os.O_CREAT)
    local = threading.local()

    def work(task: tuple[Path, int, int, int, int]) -> None:
        file, at, n, place, share = task
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(piece))
        got = 0
        while got < n:
            got += os.preadv(descriptors[file], [local.buffer[got:n]], at + got)
        put = 0
        while put < share:
            put += os.pwrite(fd, local.buffer[put:share], place + put)

    start = time.perf_counter()
    with ThreadPoolExecutor(options.jobs or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(work, tasks))
    os.fsync(fd)
    return time.perf_counter() - start


def run_torchao(src: str, out: str, fmt: str, options: Options) -> float:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    def quantize(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if fmt == "nvfp4":
            g = x.abs().max().float() / 2688
            scale, data = nvfp4_quantize(x, 16, g)
            return {"": data.view(torch.uint8), "_scale": scale, "_scale_2": g}
        mode = ScaleCalculationMode.RCEIL if fmt == "mxfp8" else ScaleCalculationMode.EVEN
        dtype = torch.float8_e4m3fn if fmt == "mxfp8" else torch.float4_e2m1fn_x2
        scale, data = to_mx(x, dtype, 32, scaling_mode=mode)
        return {"": data.view(torch.uint8), "_scale": scale.view(torch.uint8)}

    quantize(torch.ones(32, 32, dtype=torch.bfloat16))
    os.makedirs(out)
    start = time.perf_counter()
    for shard in sorted(Path(src).glob("*.safetensors")):
        made = {}
        with safe_open(shard, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                x = f.get_tensor(name)
                made |= {name + s: t for s, t in quantize(x).items()} if quantizable(name) else {name: x}
        save_file(made, Path(out) / shard.name)
    return time.perf_counter() - start


def run_llm_compressor(src: str, out: str, fmt: str, options: Options) -> float:
    from llmcompressor import model_free_ptq

    start = time.perf_counter()
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*embed_tokens$"]
    model_free_ptq(model_stub=src, save_directory=out, scheme=LLM_COMPRESSOR[fmt], ignore=ignore, device="cpu")
    return time.perf_counter() - start


TOOLS = {
    "ours": (run_ours, "mx_quant"),
    "disk": (run_disk, "os"),
    "torchao": (run_torchao, "torchao"),
    "llm-compressor": (run_llm_compressor, "llmcompressor"),
}


def check(src: Path, out: Path, fmt: str) -> None:
    """Raise SystemExit unless the output is sound and a sample of it is the reference's, bit for bit."""
    import torch

    import mx_quant as mq
    from mx_kernels import reference

    found = mq.verify_checkpoint(out)
    if not found.ok:
        raise SystemExit(f"{fmt}: {found}")
    with mq.Checkpoint(out) as ck, mq.Checkpoint(src) as source:
        names = sorted(ck.weights)
        for name in names[:: max(1, len(names) // 7)]:
            q, x = ck.read(name), source.read_plain(name)
            want = reference.quantize(x[:64], q.format, rule=q.rule, global_scale=q.global_scale)
            for mine, theirs in ((q.data[:64], want.data), (q.scale[:64], want.scale)):
                if not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
                    raise SystemExit(f"{fmt}: {name} differs from the reference")


def check_torchao(src: Path, out: Path, fmt: str) -> None:
    """Raise SystemExit unless torchao's block scales of a sample are ours (NVFP4: up to one step, its arithmetic differs)."""
    import torch
    from safetensors import safe_open

    import mx_kernels as mk

    shard = sorted(src.glob("*.safetensors"))[0]
    with safe_open(shard, "pt") as f, safe_open(out / shard.name, "pt") as g:
        name = next(n for n in f.keys() if quantizable(n))  # noqa: SIM118
        x, scale = f.get_tensor(name), g.get_tensor(name + "_scale")
        options = {"global_scale": g.get_tensor(name + "_scale_2")} if fmt == "nvfp4" else {}
    mine = mk.quantize(x, fmt, **options).scale.view(torch.uint8).int()
    differ = (mine - scale.view(torch.uint8).int().reshape(mine.shape)).abs()
    if int(differ.max()) > (fmt == "nvfp4") or float((differ > 0).float().mean()) > 0.05:
        raise SystemExit(f"torchao's {fmt} scales differ from ours")


def drop_pages(src: Path) -> None:
    """Have the system forget the source's pages (they are clean, so it may)."""
    for file in src.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def peak() -> int:
    """Peak bytes of this process. Linux's own number: ru_maxrss counts what the process was before it became this program."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(tool: str, src: str, out: str, fmt: str, options: Options) -> None:
    """A run in this process: prints its seconds of time and of CPU, and its peak memory, as JSON."""
    before = time.process_time()
    seconds = TOOLS[tool][0](src, out, fmt, options)
    print(json.dumps({"seconds": seconds, "cpu": time.process_time() - before, "peak": peak()}))


def measure(tool: str, src: Path, out: Path, fmt: str, options: Options) -> dict[str, float] | str:
    """A run in a fresh process, or the last line of its error."""
    shutil.rmtree(out, ignore_errors=True)
    args = [sys.executable, __file__, str(src), "--one", tool, "--out", str(out), "--formats", fmt]
    args += ["--device", options.device, "--nbytes", str(options.nbytes)]
    args += ["--jobs", str(options.jobs)] if options.jobs else []
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1][:100]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path)
    parser.add_argument("--dir", type=Path, help="where outputs go (default: a temporary folder)")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="tools, by comma")
    parser.add_argument("--device", default="cpu", help="where we quantize (default: cpu)")
    parser.add_argument("--jobs", type=int, help="our worker threads (default: one per CPU)")
    parser.add_argument("--cold", action="store_true", help="read the source from the disk, not from the page cache")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--nbytes", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args()
    options = Options(a.device, a.jobs, a.nbytes)
    if a.one:
        one(a.one, str(a.src), a.out, a.formats, options)
        return
    wanted = a.only.split(",") if a.only else list(TOOLS) if a.device == "cpu" else ["ours", "disk"]
    if "disk" in wanted and "ours" not in wanted:
        parser.error("disk writes as many bytes as ours does: --only needs ours too")
    tools = [t for t in TOOLS if t in wanted and importlib.util.find_spec(TOOLS[t][1])]
    size = 0
    for shard in sorted(a.src.glob("*.safetensors")):
        with open(shard, "rb") as f:
            while piece := f.read(1 << 24):
                size += len(piece)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        out = Path(folder) / "out"
        for fmt in a.formats.split(","):
            runs: dict[str, list[dict[str, float] | str]] = {t: [] for t in tools}
            for turn in range(a.repeats):
                for tool in tools:
                    if runs[tool] and isinstance(runs[tool][0], str):
                        continue
                    if a.cold:
                        drop_pages(a.src)
                    found = measure(tool, a.src, out, fmt, options)
                    print(f"{tool} {fmt}: {found}", file=sys.stderr, flush=True)
                    if tool == "ours" and isinstance(found, dict):
                        options = replace(options, nbytes=sum(f.stat().st_size for f in out.iterdir()))
                    if turn == 0 and isinstance(found, dict) and tool == "ours":
                        check(a.src, out, fmt)
                    if turn == 0 and isinstance(found, dict) and tool == "torchao":
                        check_torchao(a.src, out, fmt)
                    runs[tool].append(found)
            for tool, results in runs.items():
                good = [r for r in results if isinstance(r, dict)]
                if not good:
                    rows.append({"tool": tool, "format": fmt, "error": results[0]})
                    continue
                seconds = statistics.median(r["seconds"] for r in good)
                peak = max(r["peak"] for r in good)
                rows.append(
                    {
                        "tool": tool,
                        "format": fmt,
                        "seconds": seconds,
                        "cpu_seconds": statistics.median(r["cpu"] for r in good),
                        "gb_per_s": size / 1e9 / seconds,
                        "peak_mib": peak / 2**20,
                    }
                )
    if a.json:
        print(json.dumps({"bytes": size, "cpus": os.cpu_count(), "device": a.device, "cold": a.cold, "rows": rows}))
        return
    cache = "cold" if a.cold else "from the page cache"
    print(f"{a.src}: {size / 1e9:.3f} GB {cache}, {os.cpu_count()} CPUs, ours on {a.device}, medians of {a.repeats}")
    print("| tool | format | seconds | CPU seconds | GB/s of input | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        cells = (
            f"{r['seconds']:.2f} | {r['cpu_seconds']:.2f} | {r['gb_per_s']:.2f} | {r['peak_mib']:.0f}"
            if "seconds" in r
            else f"{r['error']} | | | "
        )
        print(f"| {r['tool']} | {r['format']} | {cells} |")


if __name__ == "__main__":
    main()
