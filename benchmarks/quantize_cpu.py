"""CPU quantization in GB/s of bf16 input, beside torchao's ``to_mx`` and ``nvfp4_quantize``, eager and compiled.

    python benchmarks/quantize_cpu.py [--rows N] [--columns K] [--repeats R] [--json] [--no-compile]
    python benchmarks/quantize_cpu.py --snr        signal-to-noise ratios of every format and rule (docs/formats.md)

No figure stands for wrong results: ours must equal the reference bit for bit first, torchao's scales must equal ours, and
its codes may differ in one of a thousand (ties). The contestants take turns, so that a busy machine slows all of them; the
best of the turns counts. torchao's compiled path needs a C++ compiler; what it cannot compile is shown as a dash.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable

import torch

import mx_kernels as mk
from mx_kernels import reference

TIMED = (mk.MXFP8, mk.MXFP4, mk.NVFP4)
COLUMNS = ("gauss", "t3", "outliers")


def torchao_quantizer(f: mk.Format, x: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]] | None:
    """(scale, data) of torchao under the format's default rule; None where torchao is not installed."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    except ImportError:
        return None
    if f == mk.NVFP4:
        g = mk.compute_global_scale(x)
        return lambda: nvfp4_quantize(x, 16, g)
    dtype = torch.float8_e4m3fn if f == mk.MXFP8 else torch.float4_e2m1fn_x2
    return lambda: to_mx(x, dtype, 32, scaling_mode=ScaleCalculationMode[f.default_rule.name])


def check(f: mk.Format, x: torch.Tensor, q: mk.QuantizedTensor, theirs: Callable | None) -> None:
    """Raise unless ours are the reference's bits and torchao's are ours, but for ties."""
    rows = slice(0, min(len(x), 256))
    want = reference.quantize(x[rows], f, global_scale=q.global_scale)
    if not torch.equal(q[rows].data.view(torch.uint8), want.data.view(torch.uint8)):
        raise SystemExit(f"{f}: codes differ from the reference")
    if not torch.equal(q[rows].scale.view(torch.uint8), want.scale.view(torch.uint8)):
        raise SystemExit(f"{f}: scales differ from the reference")
    if theirs is None:
        return
    scale, data = (t.view(torch.uint8).reshape(len(x), -1) for t in theirs())
    if not torch.equal(scale, q.scale.view(torch.uint8)):
        raise SystemExit(f"{f}: torchao's scales differ from ours")
    if (data != q.data.view(torch.uint8)).float().mean() > 1e-3:
        raise SystemExit(f"{f}: torchao's codes differ from ours")


def compiled(theirs: Callable) -> Callable | None:
    """torchao under torch.compile; None where that fails."""
    run = torch.compile(theirs)
    try:
        run()
    except Exception as e:  # whatever a compiler may raise: the table shows a dash, the reason goes to stderr
        warnings.warn(f"torchao does not compile: {str(e).splitlines()[0]}", stacklevel=2)
        return None
    return run


def measure(contestants: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Best seconds of each, in turns."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def throughput(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per format."""
    x = torch.randn(args.rows, args.columns).mul(0.02).bfloat16()
    rows = []
    for f in TIMED:
        q = mk.quantize(x, f)
        theirs = torchao_quantizer(f, x)
        check(f, x, q, theirs)
        run = {"ours": lambda f=f, g=q.global_scale: mk.quantize(x, f, global_scale=g)}
        run["dequantize"] = lambda q=q: mk.dequantize(q)
        if theirs is not None:
            run["torchao"] = theirs
            if args.compile and (fast := compiled(theirs)) is not None:
                run["torchao_compiled"] = fast
        seconds = measure(run, args.repeats)
        rows.append({"format": f.name, **{name: x.nbytes / s / 1e9 for name, s in seconds.items()}})
    return rows


def print_throughput(rows: list[dict[str, object]]) -> None:
    """The rows as a table, with the ratios of ours to torchao's."""
    print(
        "| format | quantize, GB/s | torchao | ratio | torchao compiled | ratio | dequantize, GB/s |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        cells = [row["format"], f"{row['ours']:.2f}"]
        for other in ("torchao", "torchao_compiled"):
            cells += [f"{row[other]:.2f}", f"{row['ours'] / row[other]:.1f}x"] if other in row else ["-", "-"]
        print("| " + " | ".join([*cells, f"{row['dequantize']:.2f}"]) + " |")


def distributions() -> dict[str, torch.Tensor]:
    """512 x 4096 bf16 weights: normal, Student's t with 3 degrees of freedom, normal with 0.2% of values 20 times as large."""
    shape = (512, 4096)
    gauss = torch.randn(shape) * 0.02
    t3 = 0.02 * torch.randn(shape) / torch.sqrt(torch.distributions.Chi2(3.0).sample(shape) / 3)
    outliers = torch.where(torch.rand(shape) < 0.002, gauss * 20, gauss)
    return {name: x.bfloat16() for name, x in zip(COLUMNS, (gauss, t3, outliers))}


def signal_to_noise() -> list[dict[str, object]]:
    """SNR in dB, one row per format and rule."""
    samples, rows = distributions(), []
    for f in mk.FORMATS.values():
        for rule in f.rules:
            row: dict[str, object] = {"format": f.name, "rule": rule.value}
            for name, x in samples.items():
                error = mk.dequantize(mk.quantize(x, f, rule=rule), torch.float32) - x.float()
                row[name] = 10 * math.log10(float(x.double().square().sum() / error.double().square().sum()))
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--snr", action="store_true", help="print signal-to-noise ratios instead")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = signal_to_noise() if args.snr else throughput(args)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    if args.json:
        print(json.dumps({**facts, "rows": rows}, indent=1))
        return
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    if args.snr:
        print("| format | rule | gauss | t3 | outliers |\n|---|---|---|---|---|")
        for row in rows:
            print(f"| {row['format']} | {row['rule']} | " + " | ".join(f"{row[k]:.2f}" for k in COLUMNS) + " |")
    else:
        print_throughput(rows)


if __name__ == "__main__":
    main()
