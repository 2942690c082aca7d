"""Small kernels on a GPU: quantize, dequantize, round trip, global scale, activation, combine, align.

    python benchmarks/small_gpu.py [--out FOLDER]

GB/s count each tensor once, read or written; the share is of a device-to-device copy in the same run. Every result is checked
against the reference before its time is printed. torchao's quantizers run beside ours where it is installed. Writes
small_gpu.json and small_gpu.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cases import describe, time_graph
from torch import Tensor

import mx_kernels as mk
from mx_kernels import reference
from mx_kernels.reference.moe import aligned, combined

SHAPES = ((16384, 7168), (128, 1536, 2048))
CHECKED = 1 << 22  # elements of a large result that are compared


def time_us(run: Callable[[], object], calls: int) -> float:
    """Microseconds of one call, from a graph of ``calls`` calls."""
    return time_graph([run] * calls)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"{what}: the result differs from the reference; no time is printed")


class Report:
    """Rows of (kernel, case, us, GB/s, share of the copy rate)."""

    def __init__(self, copy: float) -> None:
        self.copy = copy
        self.rows: list[dict[str, str | float]] = []

    def add(self, kernel: str, case: str, us: float, moved: int = 0) -> None:
        rate = moved / us / 1e3
        self.rows.append({"kernel": kernel, "case": case, "us": us, "gb_s": rate, "share": rate / self.copy})
        print(f"{kernel:28} {case:44} {us:9.1f} us" + (f" {rate:7.0f} GB/s {rate / self.copy:6.1%}" if moved else ""))

    def markdown(self, head: str) -> str:
        lines = [head, "", "| kernel | case | us | GB/s | share of the copy rate |", "|---|---|---|---|---|"]
        for r in self.rows:
            rate = f"{r['gb_s']:.0f} | {100 * float(r['share']):.0f}%" if r["gb_s"] else "|"
            lines.append(f"| {r['kernel']} | {r['case']} | {r['us']:.1f} | {rate} |")
        return "\n".join(lines) + "\n"


def quantizers(report: Report) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        size = "x".join(map(str, shape))
        part = max(1, CHECKED // x[0].numel())
        for f in mk.FORMATS.values():
            g = mk.compute_global_scale(x) if f.has_global_scale else None
            q = mk.quantize(x, f, global_scale=g)
            some = g if g is None or g.ndim == 0 else g[:part]
            want = reference.quantize(x[:part], f, global_scale=some)
            require(same(q.data[:part], want.data) and same(q.scale[:part], want.scale), f"quantize {f}")
            value = reference.dequantize(want)
            require(same(mk.dequantize(q)[:part], value), f"dequantize {f}")
            require(same(mk.quantize_dequantize(x, f, global_scale=g)[:part], value), f"quantize_dequantize {f}")
            packed = q.data.nbytes + q.scale.nbytes
            case = f"{f} {size}"
            report.add("quantize", case, time_us(lambda: mk.quantize(x, f, global_scale=g), 3), x.nbytes + packed)  # noqa: B023
            report.add("dequantize", case, time_us(lambda: mk.dequantize(q), 3), x.nbytes + packed)  # noqa: B023
            trip = time_us(lambda: mk.quantize_dequantize(x, f, global_scale=g), 3)  # noqa: B023
            report.add("quantize_dequantize", case, trip, 2 * x.nbytes)
        require(torch.equal(mk.compute_global_scale(x), reference.compute_global_scale(x)), "compute_global_scale")
        report.add("compute_global_scale", size, time_us(lambda: mk.compute_global_scale(x), 3), x.nbytes)  # noqa: B023


def peers(report: Report) -> None:
    """torchao's quantizers, compiled as its documentation says, on the first shape."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    except ImportError as missing:
        print(f"torchao is not installed ({missing}): no peers")
        return
    x = torch.randn(SHAPES[0], device="cuda", dtype=torch.bfloat16)
    runs = {
        "mxfp8_e4m3": lambda x: to_mx(x, torch.float8_e4m3fn, 32),
        "mxfp4": lambda x: to_mx(x, torch.float4_e2m1fn_x2, 32),
        "nvfp4": lambda x: nvfp4_quantize(x, 16, x.new_ones((), dtype=torch.float32)),
    }
    for name, run in runs.items():
        f = mk.get_format(name)
        packed = x.numel() // 8 * f.element.bits + x.numel() // f.block
        try:
            compiled = torch.compile(run)
            us = time_us(lambda: compiled(x), 3)  # noqa: B023
        except Exception as error:  # a peer that fails must not end our run
            print(f"torchao {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        report.add("torchao quantize, compiled", f"{name} {'x'.join(map(str, SHAPES[0]))}", us, x.nbytes + packed)


def alignments(report: Report) -> None:
    from mx_kernels.kernels.align import moe_align_block_size as align

    cases = [(t, k, e) for k, e in ((8, 128), (4, 128), (8, 512)) for t in (1, 16, 64, 256, 1024, 4096, 16384)]
    for tokens, top_k, experts in (*cases, (131072, 8, 512)):
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.int()
        got, want = align(ids, 64, experts, None), aligned(ids, 64, experts, None)
        require(all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "align")
        us = time_us(lambda: align(ids, 64, experts, None), 20)  # noqa: B023
        report.add("moe_align_block_size", f"T={tokens} k={top_k} E={experts}", us)


def activations(report: Report) -> None:
    kinds = (mk.Activation("silu"), mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0))
    for a in kinds:
        h = torch.randn(65536, 2 * 2880, device="cuda", dtype=torch.bfloat16)
        part = CHECKED // h.shape[1]
        want = reference.activated(h[:part].double(), a)
        error = (mk.activate(h, a)[:part].double() - want).abs()
        require(bool((error <= 2.0**-8 * want.abs() + 2.0**-19).all()), f"activate {a.kind}")
        for f in (None, mk.MXFP8, mk.MXFP4):
            if f is not None:
                exact = reference.quantize(mk.activate(h[:part].float(), a), f)
                require(same(mk.activate(h, a, requantize_to=f).data[:part], exact.data), f"activate {a.kind} {f}")
            bits = 16.0 if f is None else f.bits_per_element
            us = time_us(lambda: mk.activate(h, a, requantize_to=f), 3)  # noqa: B023
            moved = h.nbytes + int(h.numel() // 2 * bits / 8)
            report.add("activate", f"{a.kind} 65536x2880 to {f or 'bf16'}", us, moved)


def combines(report: Report) -> None:
    for tokens, top_k, width in ((1, 4, 2880), (64, 4, 2880), (1024, 8, 2048), (16384, 4, 2880), (16384, 8, 2048)):
        ids = torch.rand(tokens, 64, device="cuda").topk(top_k).indices.int()
        tiles = mk.moe_align_block_size(ids, 64, 64)
        y = torch.randn(tokens * top_k, width, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, top_k, device="cuda")
        want = combined(y, ids, 64, None, weights, y.dtype)
        require(torch.equal(mk.combine(y, tiles, weights=weights), want), "combine")
        us = time_us(lambda: mk.combine(y, tiles, weights=weights), 5)  # noqa: B023
        moved = y.nbytes + want.nbytes if y.nbytes > 1 << 26 else 0  # smaller ones live in the L2 cache
        report.add("combine", f"T={tokens} k={top_k} H={width}", us, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    out = parser.parse_args().out
    source = torch.empty(SHAPES[0], device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_us(lambda: target.copy_(source), 3) / 1e3
    where = describe()
    head = f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}"
    head += f"; device-to-device copy {copy:.0f} GB/s (read + write)."
    print(head)
    report = Report(copy)
    out.mkdir(parents=True, exist_ok=True)
    for part in (quantizers, alignments, activations, combines, peers):
        part(report)
        (out / "small_gpu.json").write_text(json.dumps({**where, "copy_gb_s": copy, "rows": report.rows}, indent=1))
        (out / "small_gpu.md").write_text(report.markdown(head))


if __name__ == "__main__":
    main()
