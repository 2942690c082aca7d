"""The command line ``mx-moe``: ``env`` says what would run where and why; ``eval`` scores a checkpoint with quantized experts."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any

FORMATS = ("bf16", "mxfp8", "mxfp6", "mxfp4", "nvfp4")


def parser() -> argparse.ArgumentParser:
    """The arguments; torch is imported only once they are right."""
    p = argparse.ArgumentParser(
        prog="mx-moe",
        description="Mixture-of-Experts layers on microscaling weights: which backend runs, and how well.",
    )
    version = importlib.metadata.version("mx-moe")
    p.add_argument("--version", action="version", version=version, help="print the version and stop")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    env = commands.add_parser(
        "env", help="versions, devices, and per format which backend would run and why others would not"
    )
    env.add_argument(
        "--arch", metavar="NAME", help="answer for an architecture that is not here (sm90, sm100, gfx950 ...)"
    )
    env.add_argument("--json", action="store_true", help="print JSON")

    e = commands.add_parser("eval", help="quantize the experts of a transformers checkpoint and report bits per byte")
    e.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json and safetensors")
    e.add_argument("--text", required=True, metavar="FILE", help="text to score")
    e.add_argument(
        "--format", required=True, metavar="FORMAT",
        help=f"{', '.join(FORMATS)}, or a scheme such as w4a8; bf16 leaves the experts as they are; 'stored' runs a quantized checkpoint",
    )  # fmt: skip
    e.add_argument("--backend", default="auto", help="auto (default), native, rebased, fused, emulation or reference")
    e.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator, else the CPU)")
    e.add_argument("--max-bytes", type=int, metavar="N", help="read only the first N bytes of the text")
    e.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens predicted from one context (default 512)"
    )
    e.add_argument("--allow-skipped", action="store_true", help="leave experts of an unknown kind in 16 bits")
    e.add_argument("--no-progress", action="store_true", help="show no progress bars")
    e.add_argument("--json", action="store_true", help="print JSON")
    return p


def environment(arch: str | None) -> dict[str, Any]:
    """Versions, devices, and for each format the backend with the reasons against those preferred to it."""
    import platform

    import torch

    import mx_kernels as mk

    from .oracle import explain

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("mx-moe", "mx-quant", "mx-kernels", "torch", "triton", "transformers", "safetensors", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] if accelerator else []
    devices = []
    for kind in (*kinds, "cpu"):
        d = mk.Device.probe(kind)
        devices.append({"device": kind, "name": d.name, "arch": d.arch.name, "triton": d.triton, "memory": d.memory})
        devices[-1]["advice"] = d.advice
    device = mk.Device.fake(arch) if arch else mk.Device.probe()
    return {"versions": versions, "devices": devices, "arch": device.arch.name, "formats": explain(device)}


def _env(args: argparse.Namespace) -> None:
    found = environment(args.arch)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    for d in found["devices"]:
        print(
            f"device {d['device']}: {d['name']} ({d['arch']}), {'Triton ' + d['triton'] if d['triton'] else 'no Triton kernels'}"
        )
        if d["advice"]:
            print(f"  {d['advice']}")
    print(f"\non {found['arch']}{' (not probed: answered by name)' if args.arch else ''}:\n")
    print(f"{'weights':<12} {'backend':<10} inputs")
    for name, choice in found["formats"].items():
        print(f"{name:<12} {choice['backend']:<10} {choice['inputs']}")
        for other, reason in choice["rejected"].items():
            print(f"{'':<12} not {other}: {reason}")


def _eval(args: argparse.Namespace) -> None:
    from pathlib import Path

    text_file = Path(args.text)
    if not text_file.is_file():
        raise FileNotFoundError(f"there is no text file {text_file}")
    if args.max_bytes is not None and args.max_bytes < 2:
        raise ValueError(f"--max-bytes is {args.max_bytes}, needs at least 2: the first byte is never predicted")
    with text_file.open("rb") as f:
        text = f.read(-1 if args.max_bytes is None else args.max_bytes)

    from .eval import evaluate

    found = evaluate(
        args.checkpoint,
        text,
        args.format,
        backend=args.backend,
        device=args.device,
        window=args.window,
        allow_skipped=args.allow_skipped,
        progress=not args.no_progress,
    )
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    experts = found.experts
    print(f"checkpoint     {found.checkpoint}")
    print(f"format         {found.format}")
    print(
        f"bits per byte  {found.bits_per_byte:.4f}  ({found.predicted_bytes:,} bytes predicted, {found.seconds:.1f} s)"
    )
    print(f"expert bytes   {experts.expert_bytes:,}  ({8 * experts.expert_bytes / experts.elements:.2f} bits a weight)")
    print(f"coverage       {100 * experts.coverage:.1f}% of {experts.elements:,} expert weights quantized")
    for name, count in experts.backends.items():
        print(f"backend        {name} ({count} layers)")
    if experts.layers:
        for name, reason in experts.layers[0].backend["rejected"].items():
            print(f"               not {name}: {reason}")
    for name, _, reason in experts.skipped:
        print(f"left as it is  {name}: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for what went wrong (on stderr; with --json as JSON too), 2 for wrong arguments."""
    args = parser().parse_args(argv)
    import warnings

    if args.command == "eval":  # the reasons are part of the report
        warnings.filterwarnings("ignore", message="emulated experts", category=RuntimeWarning)
    try:
        {"env": _env, "eval": _eval}[args.command](args)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        print(f"mx-moe: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
