"""The main job on two small trained checkpoints: ``nox -s demo``, or ``python examples/demo.py`` where the packages are installed.

1. Bits per byte of a text with the experts in 16 bits and in every format.
2. One quantized checkpoint of each layout, written, read again and scored: the same bits per byte as before it was written.
3. A line of text, continued by the reloaded model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
MODELS = ("tiny-gpt-oss", "tiny-qwen3-moe")
FORMATS = ("bf16", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
LAYOUTS = {  # layout: a format that it holds
    "gpt-oss": "mxfp4",
    "mxfp8": "mxfp8",
    "compressed-tensors": "mxfp6",
    "quark": "mxfp4",
    "modelopt": "nvfp4",
}
PROMPT = b"The :mod:`pickle` module implements binary protocols for "


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned columns; the first row is the heading, the first column left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))


def score_formats(models: Sequence[str], text: bytes, bar) -> list[list[str]]:
    from mx_moe.eval import evaluate

    rows = [["model", "experts", "bits per byte", "change", "expert bytes", "bits a weight", "covered", "backend"]]
    for model in models:
        plain = None
        for name in FORMATS:
            bar.set_description(f"{model} {name}")
            found = evaluate(HERE / model, text, name)
            experts = found.experts
            plain = plain or found.bits_per_byte
            rows.append(
                [
                    model, name, f"{found.bits_per_byte:.4f}", f"{100 * (found.bits_per_byte / plain - 1):+.2f}%",
                    f"{experts.expert_bytes:,}", f"{8 * experts.expert_bytes / experts.elements:.2f}",
                    f"{100 * experts.coverage:.0f}%", ", ".join(experts.backends),
                ]
            )  # fmt: skip
            bar.update()
    return rows


def write_and_reload(models: Sequence[str], text: bytes, folder: Path, bar) -> tuple[list[list[str]], bool]:
    """Each layout: quantize on disk, reload, and score; the same as quantized in memory, and as dequantized on disk."""
    import mx_quant as mq
    from mx_moe.eval import evaluate

    rows = [["model", "layout", "experts", "megabytes", "reloaded", "its 16-bit copy", "the same"]]
    same = True
    for model in models:
        for layout, name in LAYOUTS.items():
            bar.set_description(f"{model} {layout}")
            out, copy = folder / f"{model}-{layout}", folder / f"{model}-{layout}-bf16"
            summary = mq.quantize_checkpoint(HERE / model, out, name, layout=layout, exclude=("*self_attn*",))
            mq.dequantize_checkpoint(out, copy)
            reloaded = evaluate(out, text, "stored").bits_per_byte
            wanted = evaluate(copy, text, "bf16").bits_per_byte
            equal = reloaded == wanted
            if name != "nvfp4":  # on disk NVFP4's global scale has an exact reciprocal, in memory it need not
                equal &= reloaded == evaluate(HERE / model, text, name).bits_per_byte
            same &= equal
            rows.append(
                [
                    model, layout, name, f"{summary.bytes_out / 1e6:.2f}", f"{reloaded:.6f}", f"{wanted:.6f}",
                    "yes" if equal else "NO",
                ]
            )  # fmt: skip
            bar.update()
    return rows, same


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--max-bytes", type=int, default=16384, help="bytes of text to score in part 1 (default 16384)")
    p.add_argument("--reload-bytes", type=int, default=2048, help="bytes of text to score in part 2 (default 2048)")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which of the two (default both)")
    args = p.parse_args(argv)

    from tqdm import tqdm

    from mx_moe import select_mxfp8_moe_backend
    from mx_moe.eval import continue_line
    from mx_moe.integrations.loading import load_quantized

    warnings.filterwarnings("ignore", message="emulated experts")  # the table says which backend runs
    quiet_transformers()
    start = time.perf_counter()
    text = (HERE / "python-docs.txt").read_bytes()
    print("Experts run on:", *str(select_mxfp8_moe_backend()).splitlines(), sep="\n  ")
    with tqdm(total=len(args.models) * (len(FORMATS) + len(LAYOUTS)), unit="run", file=sys.stderr) as bar:
        rows = score_formats(args.models, text[: args.max_bytes], bar)
        bar.clear()
        print(f"\nBits per byte of {min(args.max_bytes, len(text)):,} bytes of Python documentation:\n")
        print(*table(rows), sep="\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows, same = write_and_reload(args.models, text[: args.reload_bytes], Path(folder), bar)
            bar.clear()
            print("\nCheckpoints written in each layout, read again and scored:\n")
            print(*table(rows), sep="\n", flush=True)
            model, _ = load_quantized(Path(folder) / f"{args.models[-1]}-gpt-oss")
            line = continue_line(model, PROMPT, new_bytes=96)
    print(f"\n{args.models[-1]}, reloaded in MXFP4, continues a line:\n\n{(PROMPT + line).decode(errors='replace')}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if not same:
        print("a reloaded checkpoint differs from what was written", file=sys.stderr)
    return 0 if same else 1


def quiet_transformers() -> None:
    """Leave standard error to our progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
