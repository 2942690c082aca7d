"""MoE layers on one GPU: ours beside what is importable, cold weights, CUDA graphs, correctness before every time.

    python benchmarks/run.py --shapes gpt-oss-120b --tokens 1,16,256 --formats mxfp8,mxfp4 --modes a16,a8 --out out/
    python benchmarks/run.py --shapes 4096,1536,64,6,silu --routing zipf:1.2 --peers ""          # H,I,E,k,activation
    python benchmarks/run.py --from FILE_OR_FOLDER ... --out out/                                # no GPU: merge and draw again
    python benchmarks/run.py --from FILE_OR_FOLDER ... --readme gpt-oss-120b                     # print a README's rows

A layer is align + GEMM 1 + activation + GEMM 2 + weighted sum; the router's linear is outside. Writes moe.json, moe.md (every cell,
its share of the roofline by this card's own ceilings, its error, speed-ups, memory), a PNG for each shape and speed-up.png. A figure
whose check against float32 failed is not printed. ``--from`` reads moe.json files, the time.jsonl of the peer harness, which runs
ours through ``harness_plugin.py`` beside peers that need preparation, and folders of both; several passes are averaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from cases import FORMATS, SHAPES, TOKENS, Shape, describe, find_shape, layers_for, routing, time_graph
from peers import PEERS
from torch import Tensor

import mx_kernels as mk
import mx_moe as mm
import mx_quant as mq


@dataclass(frozen=True)
class Mode:
    """How our layer runs. suffix: of its name; tolerance: of its Frobenius error against float32; formats: None for all.

    Activations in bf16 between the GEMMs: 0.02. In MXFP8 (E4M3 keeps 4 bits): 0.06. promote: of re-based experts.
    """

    suffix: str
    backend: str = "auto"
    inputs: str | None = None
    tolerance: float = 0.02
    formats: tuple[str, ...] | None = None
    promote: bool = False


MODES = {
    "a16": Mode(""),
    "a8": Mode("_a8_rebased", "rebased", "mxfp8", 0.06, ("mxfp8", "mxfp4")),
    "a8-promoted": Mode("_a8_rebased_promoted", "rebased", "mxfp8", 0.06, ("mxfp8", "mxfp4"), promote=True),
    "a8-exact": Mode("_a8", "auto", "mxfp8", 0.06, ("mxfp8", "mxfp4")),
    "emulation": Mode("_emulation", "emulation", formats=("mxfp8", "mxfp4", "nvfp4")),
}


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


@dataclass(frozen=True)
class Task:
    """What is measured: one (shape, format, tokens, routing), by ``name``."""

    name: str
    shape: Shape
    fmt: str
    tokens: int
    routing: str
    tolerance: float = 0.02

    @property
    def cell(self) -> report.Cell:
        return {
            "name": self.name,
            "shape": self.shape.name,
            "format": self.fmt,
            "tokens": self.tokens,
            "routing": self.routing,
        }


def measure(task: Task, prepare: Callable[..., Any], layers: list[Any], w: mq.ExpertWeights) -> report.Cell:
    """One cell: build the calls, check the first against float32, time all of them in one graph."""
    shape, tokens = task.shape, task.tokens
    inputs = []
    for i in range(len(layers)):
        g = torch.Generator("cuda").manual_seed(i)
        x = torch.randn(tokens, shape.hidden, device="cuda", generator=g).bfloat16()
        inputs.append((x, *routing(shape, tokens, i, task.routing)))
    calls = [prepare(layer, *given) for layer, given in zip(layers, inputs, strict=True)]
    rows = torch.linspace(0, tokens - 1, min(tokens, 8), device="cuda").round().long()
    want = reference_rows(shape, w, *inputs[0], rows)
    error = float((calls[0]()[rows].float() - want).norm() / want.norm())
    distinct = sum(ids.unique().numel() for _, ids, _ in inputs) / len(inputs)
    cell = {**task.cell, "error": error, "distinct": distinct}
    if not error < task.tolerance:
        return {**cell, "failed": f"error {error:.1e} is not below {task.tolerance}"}
    workspace = workspace_bytes(calls[0])
    return {**cell, "us": time_graph(calls), "workspace_bytes": workspace}


def workspace_bytes(call: Callable[[], Tensor]) -> int:
    """What a call allocates at most besides its output, after it ran once."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.nbytes


def clone(w: mq.ExpertWeights) -> mq.ExpertWeights:
    """The same weights in other memory."""
    return w.map(torch.Tensor.clone)


def ours(task: Task, mode: Mode, w: mq.ExpertWeights, copies: list[Any]) -> report.Cell:
    """Our layer, with the backend that the oracle takes or the mode names. ``copies``: layers made so far."""
    count = layers_for(task.shape, task.fmt, task.tokens, task.routing)
    while len(copies) < count:
        made = mm.make_experts(clone(w), task.shape.activation, backend=mode.backend, inputs=mode.inputs)
        if mode.promote:
            made.promote = True
        copies.append(made)
    cell = measure(task, lambda e, x, ids, p: lambda: e(x, mm.Routing(ids, p)), copies[:count], w)
    return {**cell, "backend": copies[0].choice.name, "weight_bytes": copies[0].nbytes, "ours": True}


def theirs(task: Task, peer: Any, w: mq.ExpertWeights, layers: list[mq.ExpertWeights]) -> report.Cell:
    """A peer's layer on bf16 weights; what it refuses is said in the cell."""
    count = layers_for(task.shape, task.fmt, task.tokens, task.routing)
    try:
        prepare = lambda c, x, ids, p: peer.prepare(task.shape, c.w13, c.w2, x, ids, p)  # noqa: E731
        return measure(task, prepare, layers[:count], w)
    except ValueError as error:
        return {**task.cell, "failed": str(error)}


def run(args: argparse.Namespace) -> int:
    """Everything that was asked for; 1 where a check failed."""
    from ceilings import ceilings

    where: dict[str, Any] = {**describe(), "ceilings": vars(ceilings())}
    print(report.head(where), file=sys.stderr)
    tokens = [int(t) for t in args.tokens.split(",")]
    cells: list[report.Cell] = []

    def record(cell: report.Cell) -> None:
        cells.append(report.finished(cell, where))
        said = cell.get("failed") or f"{cell['us']:.1f} us ({100 * cells[-1]['share']:.0f}%)"
        print(f"{cell['shape']} {cell['name']} T={cell['tokens']} {cell['routing']}: {said}", file=sys.stderr)
        report.save(where, cells, args.out)

    args.out.mkdir(parents=True, exist_ok=True)
    for shape in map(find_shape, args.shapes):
        for fmt in args.formats.split(","):
            w = make_weights(shape, fmt)
            for mode in (MODES[m] for m in args.modes.split(",")):
                if mode.formats is not None and fmt not in mode.formats:
                    continue
                copies: list[Any] = []
                for kind in args.routing:
                    for t in tokens:
                        record(
                            ours(Task(f"mx_{fmt}{mode.suffix}", shape, fmt, t, kind, mode.tolerance), mode, w, copies)
                        )
                del copies
            for peer in (PEERS[name] for name in args.peers.split(",") if name and fmt == "bf16"):
                if reason := peer.why_not():
                    print(f"{peer.name}: {reason}", file=sys.stderr)
                    continue
                layers = [
                    clone(w) for _ in range(max(layers_for(shape, fmt, t, k) for t in tokens for k in args.routing))
                ]
                for kind in args.routing:
                    for t in tokens:
                        record(theirs(Task(peer.name, shape, fmt, t, kind), peer, w, layers))
                del layers
            torch.cuda.empty_cache()
    report.write(where, report.merged(cells), args.out)
    print((args.out / "moe.md").read_text())
    return 1 if any("failed" in c and "error" in c for c in cells) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["gpt-oss-120b", "qwen3-30b-a3b", "mixtral-8x7b"],
        help=f"of {', '.join(SHAPES)}, or H,I,E,k,silu or H,I,E,k,swiglu_oai",
    )  # fmt: skip
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--modes", default="a16,a8", help=f"of {', '.join(MODES)}")
    parser.add_argument("--routing", nargs="+", default=["uniform"], help="uniform, zipf, zipf:EXPONENT or one-hot")
    parser.add_argument("--peers", default=",".join(PEERS), help="names, or nothing for none")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--from", dest="sources", nargs="+", type=Path, help="results to draw again; needs no GPU")
    parser.add_argument("--note", help="with --from: what a reader of these results must know")
    parser.add_argument(
        "--readme", metavar="SHAPE", help="with --from: print a README's rows of this shape, write nothing"
    )
    args = parser.parse_args()
    if args.sources:
        where, cells = report.load(args.sources)
        where |= {"note": args.note} if args.note else {}
        if args.readme:
            print(report.readme(where, cells, args.readme), end="")
        else:
            report.write(where, cells, args.out)
            print(report.markdown(where, cells))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/run.py measures a GPU, and there is none here (--from draws results again)", file=sys.stderr)
        return 2
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
