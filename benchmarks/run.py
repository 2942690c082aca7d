"""MoE layers on one GPU: ours beside what is importable, cold weights, CUDA graphs, correctness before every time.

    python benchmarks/run.py --shapes gpt-oss-120b --tokens 1,16,256 --formats mxfp8,mxfp4 --out out/

A layer is align + GEMM 1 + activation + GEMM 2 + weighted sum; the router's linear is outside. Writes moe.json, moe.md and three
PNG plots per shape (time against T, share of the roofline, speed-up over the best peer). ``--inputs mxfp8`` quantizes activations;
``--backend`` asks for one backend; ``--skew`` draws experts by a Zipf law. A figure whose check failed is not printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import FORMATS, SHAPES, TOKENS, Shape, describe, layers_for, routing, time_graph
from peers import PEERS
from torch import Tensor

import mx_kernels as mk
import mx_moe as mm
import mx_quant as mq

TOLERANCE = {"bf16": 0.02, "a8": 0.06}
"""Frobenius error against float32: bf16 in and between the GEMMs; with MXFP8 activations (E4M3 keeps 4 bits)."""


def make_weights(shape: Shape, fmt: str, seed: int = 1) -> mq.ExpertWeights:
    """Random normals times random powers of two per block, quantized on the GPU; "bf16" keeps the values MXFP8 can hold."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    f = mk.get_format("mxfp8" if fmt == "bf16" else fmt)
    parts = []
    for n, k in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        data, scale, total = [], [], []
        for _ in range(shape.experts):
            octave = torch.randint(-2, 3, (n, k // 32, 1), device="cuda", generator=g)
            w = torch.randn(n, k // 32, 32, device="cuda", generator=g) * torch.exp2(octave.float())
            q = mk.quantize(w.view(n, k) * (0.5 * k**-0.5), f)
            data.append(q.data)
            scale.append(q.scale)
            total.append(q.global_scale)
        whole = mk.QuantizedTensor(
            torch.stack([d.view(torch.uint8) for d in data]).view(f.data_dtype),
            torch.stack([s.view(torch.uint8) for s in scale]).view(f.scale_dtype),
            f, f.default_rule, torch.bfloat16, torch.stack(total) if f.has_global_scale else None,
        )  # fmt: skip
        parts.append(whole if fmt != "bf16" else mk.dequantize(whole))
    return mq.ExpertWeights(*parts)


def reference_rows(shape: Shape, w: mq.ExpertWeights, x: Tensor, ids: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """The layer's output for some tokens, in float32 from dequantized weights."""
    out = torch.zeros(len(rows), shape.hidden, device="cuda")
    for e in ids[rows].unique().tolist():
        token, slot = (ids[rows] == e).nonzero(as_tuple=True)
        w13, w2 = (
            mk.dequantize(t[e], torch.float32) if isinstance(t, mk.QuantizedTensor) else t[e].float()
            for t in (w.w13, w.w2)
        )
        y = mk.reference.activated(x[rows[token]].float() @ w13.T, shape.activation) @ w2.T
        out.index_add_(0, token, y * weights[rows[token], slot, None])
    return out


def measure(
    shape: Shape,
    fmt: str,
    tokens: int,
    skew: float,
    prepare: Callable[..., Any],
    layers: list[Any],
    w: mq.ExpertWeights,
    tol: float,
) -> dict[str, Any]:
    """One cell: build the calls, check the first against float32, time all of them in one graph."""
    inputs = []
    for i in range(len(layers)):
        x = torch.randn(
            tokens, shape.hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(i)
        ).bfloat16()
        inputs.append((x, *routing(shape, tokens, i, skew)))
    calls = [prepare(layer, *given) for layer, given in zip(layers, inputs, strict=True)]
    rows = torch.linspace(0, tokens - 1, min(tokens, 8), device="cuda").round().long()
    want = reference_rows(shape, w, *inputs[0], rows)
    error = float((calls[0]()[rows].float() - want).norm() / want.norm())
    distinct = sum(ids.unique().numel() for _, ids, _ in inputs) / len(inputs)
    floor = shape.floor_us(fmt, tokens, distinct)
    cell = {"shape": shape.name, "format": fmt, "tokens": tokens, "skew": skew, "error": error, "floor_us": floor}
    if not error < tol:
        return {**cell, "failed": f"error {error:.1e} is not below {tol}"}
    us = time_graph(calls)
    return {**cell, "us": us, "share": floor / us, "tflops": shape.flops(tokens) / us * 1e-6}


def clone(w: mq.ExpertWeights) -> mq.ExpertWeights:
    """The same weights in other memory."""
    return w.map(torch.Tensor.clone)


def ours(
    shape: Shape, fmt: str, tokens: int, w: mq.ExpertWeights, args: argparse.Namespace, copies: list[Any]
) -> dict[str, Any]:
    """Our layer, with the backend that the oracle takes."""
    while len(copies) < layers_for(shape, fmt, tokens):
        copies.append(mm.make_experts(clone(w), shape.activation, backend=args.backend, inputs=args.inputs))
    layers = copies[: layers_for(shape, fmt, tokens)]
    cell = measure(
        shape, fmt, tokens, args.skew, lambda e, x, ids, p: lambda: e(x, mm.Routing(ids, p)), layers, w,
        TOLERANCE["a8" if args.inputs else "bf16"],
    )  # fmt: skip
    return {
        **cell,
        "name": f"mx_{fmt}" + ("_a8" if args.inputs else ""),
        "backend": layers[0].choice.name,
        "ours": True,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one row a name, one column a token count, "microseconds · percent of the roofline"."""
    lines = []
    for shape in dict.fromkeys(c["shape"] for c in cells):
        here = [c for c in cells if c["shape"] == shape]
        tokens = sorted({c["tokens"] for c in here})
        lines += [
            f"### {shape}",
            "",
            "| | " + " | ".join(f"T={t}" for t in tokens) + " | error |",
            "|---" * (len(tokens) + 2) + "|",
        ]
        for name in dict.fromkeys(c["name"] for c in here):
            row = {c["tokens"]: c for c in here if c["name"] == name}
            texts = []
            for t in tokens:
                c = row.get(t, {"failed": ""})
                texts.append(
                    c["failed"]
                    if "failed" in c
                    else f"{c['us']:.{0 if c['us'] >= 100 else 1}f} · {100 * c['share']:.0f}"
                )
            worst = max((c["error"] for c in row.values() if "error" in c), default=float("nan"))
            lines.append(f"| {name} | " + " | ".join(texts) + f" | {worst:.1e} |")
        lines.append("")
    return "\n".join(lines)


def group(cell: dict[str, Any]) -> tuple[str, bool]:
    """What is compared with what: the weights' format, and whether activations are quantized."""
    return cell["format"], "a8" in cell["name"]


def speed_up(cell: dict[str, Any], cells: list[dict[str, Any]]) -> float | None:
    """Time of the best peer of the same group, shape, tokens and skew, over this cell's; None where there is none."""
    same = [
        c["us"] for c in cells
        if "us" in c and not c.get("ours") and group(c) == group(cell)
        and all(c.get(key, 0.0) == cell.get(key, 0.0) for key in ("shape", "tokens", "skew"))
    ]  # fmt: skip
    return min(same) / cell["us"] if same and cell.get("ours") and "us" in cell else None


def plots(cells: list[dict[str, Any]], out: Path) -> None:
    """PNG per shape: time against T, share of the roofline, speed-up of ours over the best peer of the same group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "time, us": lambda c: c["us"],
        "share of the roofline": lambda c: c["share"],
        "speed-up over the best peer": lambda c: speed_up(c, cells),
    }
    for shape in dict.fromkeys(c["shape"] for c in cells):
        here = [c for c in cells if c["shape"] == shape and "us" in c]
        names = list(dict.fromkeys(c["name"] for c in here))
        colors = {name: plt.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
        figure, axes = plt.subplots(1, 3, figsize=(16, 5))
        for axis, (title, value) in zip(axes, panels.items(), strict=True):
            for name in names:
                points = [(c["tokens"], value(c)) for c in here if c["name"] == name]
                points = [p for p in points if p[1] is not None]
                style = {"linewidth": 2.2} if name.startswith("mx_") else {"linewidth": 1, "linestyle": "--"}
                if points:
                    axis.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, label=name, color=colors[name], **style
                    )
            axis.set(
                title=f"{shape}: {title}", xlabel="tokens", xscale="log", yscale="log" if "time" in title else "linear"
            )
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=6)
        axes[2].axhline(1.0, color="black", linewidth=0.8)
        if axes[2].lines[:-1]:
            axes[2].legend(fontsize=6)
        figure.tight_layout()
        figure.savefig(out / f"{shape}.png", dpi=90)
        plt.close(figure)


def write(where: dict[str, str], cells: list[dict[str, Any]], out: Path) -> None:
    """moe.json, moe.md and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "moe.json").write_text(json.dumps({"where": where, "cells": cells}, indent=0) + "\n")
    versions = f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}"
    text = f"{versions}. A cell: microseconds · percent of the roofline.\n\n" + table(cells)
    (out / "moe.md").write_text(text)
    plots(cells, out)
    print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="gpt-oss-120b,qwen3-30b-a3b,mixtral-8x7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--inputs", default=None, help="quantize activations to this format, for example mxfp8")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--peers", default=",".join(PEERS), help="names, or nothing for none")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--from", dest="source", type=Path, help="draw the tables and plots of a moe.json again; needs no GPU"
    )
    args = parser.parse_args()
    if args.source:
        saved = json.loads(args.source.read_text())
        write(saved["where"], saved["cells"], args.out)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/run.py measures a GPU, and there is none here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []

    def record(name: str, cell: dict[str, Any]) -> None:
        cells.append({"name": name, **cell})
        print(
            f"{cell.get('shape')} {name} T={cell.get('tokens')}: " + (cell.get("failed") or f"{cell['us']:.1f} us"),
            file=sys.stderr,
        )
        (args.out / "moe.json").write_text(json.dumps({"where": describe(), "cells": cells}, indent=1))

    for shape in (SHAPES[name] for name in args.shapes.split(",")):
        for fmt in args.formats.split(","):
            w, copies = make_weights(shape, fmt), []
            for tokens in map(int, args.tokens.split(",")):
                cell = ours(shape, fmt, tokens, w, args, copies)
                record(cell["name"], cell)
            copies.clear()
            for peer in (PEERS[name] for name in args.peers.split(",") if name and fmt == "bf16"):
                if reason := peer.why_not():
                    print(f"{peer.name}: {reason}", file=sys.stderr)
                    continue
                layers = [clone(w) for _ in range(layers_for(shape, fmt, 1))]
                for tokens in map(int, args.tokens.split(",")):
                    prepare = lambda c, x, ids, p, peer=peer, shape=shape: peer.prepare(shape, c.w13, c.w2, x, ids, p)  # noqa: E731
                    try:
                        record(
                            peer.name,
                            measure(
                                shape,
                                fmt,
                                tokens,
                                args.skew,
                                prepare,
                                layers[: layers_for(shape, fmt, tokens)],
                                w,
                                0.02,
                            ),
                        )
                    except ValueError as error:
                        record(peer.name, {"shape": shape.name, "format": fmt, "tokens": tokens, "failed": str(error)})
                del layers
            torch.cuda.empty_cache()
    write(describe(), cells, args.out)
    return 1 if any("failed" in c and "error" in c for c in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
