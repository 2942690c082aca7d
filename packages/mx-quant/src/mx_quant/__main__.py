"""Command line ``mx-quant``: quantize, inspect, verify, convert, dequantize, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORMATS = ("mxfp8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mx-quant",
        description="Quantize safetensors checkpoints to microscaling formats, look into them and move them between layouts.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        found.add_argument("--quiet", action="store_true", help="no progress bar")
        return found

    def produces(found: argparse.ArgumentParser) -> None:
        found.add_argument("src", metavar="SRC", help="checkpoint folder; never written to")
        found.add_argument("out", metavar="OUT", help="folder to make; appears when it is complete")
        found.add_argument("--resume", action="store_true", help="continue what an interrupted run left beside OUT")
        found.add_argument("--overwrite", action="store_true", help="replace OUT, discard an unfinished run")
        found.add_argument(
            "--max-shard-size", default="5GB", metavar="SIZE", help="of a file of the output (default 5GB)"
        )
        found.add_argument("--jobs", type=int, metavar="N", help="worker threads (default: one per CPU)")

    c = command("quantize", "Quantize a bf16, fp16 or fp32 checkpoint.")
    produces(c)
    c.add_argument("--format", required=True, choices=FORMATS, help="number format of the weights")
    c.add_argument("--layout", help="how to store them (default: mxfp8 for MXFP8, else compressed-tensors or quark)")
    c.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="also quantize these weights (lm_head)"
    )
    c.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these weights in full precision"
    )
    c.add_argument(
        "--allow-unquantized-experts",
        action="append",
        default=[],
        metavar="PATTERN",
        help="expert weights that may stay in full precision or be missing; others are an error",
    )
    c.add_argument("--rule", help="scale rule: rceil, even, floor, ceil, search; nvfp4: amax, four_over_six, search")
    c.add_argument("--search", action="store_true", help="the same as --rule search: slower, smallest squared error")
    c.add_argument("--activations", action="store_true", help="tell readers to quantize activations too")
    c.add_argument("--dry-run", action="store_true", help="only say what would be done")
    c.add_argument("--max-memory", default="4GiB", metavar="SIZE", help="of this process at its peak (default 4GiB)")
    c.add_argument("--device", default="cpu", help="where to quantize: cpu (default), cuda, cuda:1, xpu")

    c = command("inspect", "Say what is in a checkpoint, from its headers.")
    c.add_argument("path", metavar="PATH")

    c = command("verify", "Check a quantized checkpoint: hashes, scales, codes, coverage; against its source too.")
    c.add_argument("out", metavar="OUT")
    c.add_argument("--against", metavar="SRC", help="the full-precision source: nothing lost, SNR of every weight")
    c.add_argument(
        "--min-snr", type=float, metavar="DB", help="lowest SNR that a weight may have against SRC (default 6)"
    )
    c.add_argument("--allow-unquantized-experts", action="append", default=[], metavar="PATTERN")
    c.add_argument("--jobs", type=int, metavar="N", help="worker threads (default: one per CPU)")

    c = command("convert", "Store a quantized checkpoint in another layout, bit for bit.")
    produces(c)
    c.add_argument("--layout", required=True, help="the layout to store it in")

    c = command("dequantize", "Store a quantized checkpoint in full precision.")
    produces(c)
    c.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))

    c = command("report", "Error of every quantized weight against its source: SNR, relative error, cosine, bytes.")
    c.add_argument("out", metavar="OUT", help="quantized checkpoint")
    c.add_argument("src", metavar="SRC", help="its full-precision source")
    c.add_argument("--plot", metavar="FILE.png", help="write a heat map of SNR, layers x experts (needs matplotlib)")
    c.add_argument("--worst", type=int, default=10, metavar="N", help="list the N worst weights (0: all)")
    return parser


def _bar(quiet: bool) -> tuple[Callable[[int, int], None] | None, Callable[[], None]]:
    """A progress callback that draws on stderr, and what ends it."""
    if quiet:
        return None, lambda: None
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False, mininterval=0.2)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress, bar.close


def _common(a: argparse.Namespace, progress: Any) -> dict[str, Any]:
    return {
        "resume": a.resume,
        "overwrite": a.overwrite,
        "max_shard_size": a.max_shard_size,
        "jobs": a.jobs,
        "progress": progress,
    }


def _quantize(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .offline import quantize_checkpoint

    found = quantize_checkpoint(
        a.src,
        a.out,
        a.format,
        layout=a.layout,
        include=a.include,
        exclude=a.exclude,
        allow_unquantized_experts=a.allow_unquantized_experts,
        rule=a.rule,
        search=a.search,
        activations=a.activations,
        dry_run=a.dry_run,
        max_memory=a.max_memory,
        device=a.device,
        **_common(a, progress),
    )
    return found, True


def _inspect(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .convert import inspect_checkpoint

    return inspect_checkpoint(a.path), True


def _verify(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .verify import MIN_SNR, verify_checkpoint

    found = verify_checkpoint(
        a.out,
        a.against,
        allow_unquantized_experts=a.allow_unquantized_experts,
        min_snr=MIN_SNR if a.min_snr is None else a.min_snr,
        jobs=a.jobs,
        progress=progress,
    )
    return found, found.ok


def _convert(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .convert import convert_checkpoint

    return convert_checkpoint(a.src, a.out, a.layout, **_common(a, progress)), True


def _dequantize(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .convert import dequantize_checkpoint

    return dequantize_checkpoint(a.src, a.out, dtype=a.dtype, **_common(a, progress)), True


def _report(a: argparse.Namespace, progress: Any) -> tuple[Any, bool]:
    from .verify import report_checkpoint

    if a.plot is not None and not Path(a.plot).absolute().parent.is_dir():
        raise ValueError(f"the folder of {a.plot} does not exist: make it first")
    found = report_checkpoint(a.out, a.src, progress=progress)
    if a.plot is not None:
        found.plot(a.plot)
    return (found if a.json else found.to_markdown(a.worst).rstrip()), True


_COMMANDS = {
    "quantize": _quantize,
    "inspect": _inspect,
    "verify": _verify,
    "convert": _convert,
    "dequantize": _dequantize,
    "report": _report,
}


def _text_of_inspection(found: dict[str, Any]) -> str:
    experts = found["expert_coverage"]
    lines = [
        f"layout      {found['layout'] or 'none (full precision)'}",
        f"family      {found['family']}, experts {found['experts'] or 'none'}",
        f"size        {found['bytes']:,} bytes in {found['shards']} shard(s), {found['tensors']} tensors",
        f"quantized   {100 * found['coverage']:.2f}% of {found['parameters']:,} parameters"
        + ("" if experts is None else f", {100 * experts:.2f}% of expert parameters"),
    ]
    for name, row in sorted(found["formats"].items(), key=lambda kv: -kv[1]["bytes"]):
        lines.append(
            f"  {name:12s} {row['weights']:7,} weights {row['parameters']:16,} parameters {row['bytes']:16,} bytes"
        )
    lines += [f"  expert weights in full precision: {n}" for n in found["unquantized_experts"][:10]]
    if found["made_by"]:
        lines.append("made by     " + ", ".join(f"{k} {v}" for k, v in found["made_by"].items()))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 where it worked and found nothing wrong, 1 for a failure, 2 for bad usage."""
    parser = _parser()
    a = parser.parse_args(argv)
    if a.version:
        import importlib.metadata

        print(importlib.metadata.version("mx-quant"))
        return 0
    if a.command is None:
        parser.print_help()
        return 2
    progress, close = _bar(a.quiet)
    try:
        found, ok = _COMMANDS[a.command](a, progress)
        close()
        if a.json:
            print(json.dumps(found if isinstance(found, dict) else found.to_dict()))
        else:
            print(_text_of_inspection(found) if isinstance(found, dict) else found)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        close()
        return _fail(a, "interrupted: run the same command with --resume to continue")
    except (ValueError, TypeError, KeyError, ModuleNotFoundError) as e:
        close()
        return _fail(a, str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e))
    except (OSError, RuntimeError) as e:
        close()
        advice = " (run the same command with --resume to continue)" if hasattr(a, "resume") else ""
        return _fail(a, f"{e}{advice}")
    return 0 if ok else 1


def _fail(a: argparse.Namespace, message: str) -> int:
    if a.json:
        print(json.dumps({"error": message}))
    print(textwrap.fill(f"mx-quant {a.command}: {' '.join(message.split())}", 110), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
