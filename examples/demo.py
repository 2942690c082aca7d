"""The main job on two small trained checkpoints: ``nox -s demo``, or ``python examples/demo.py`` where the packages are installed.

1. One table. Bits per byte of a text with the experts in 16 bits and in every format; and with one quantized checkpoint of each
   layout, written, read again and scored: the same as quantized in memory, and as the checkpoint dequantized on disk.
2. A line of text, continued by a reloaded model.

Ends with an exit status of 1 where a reloaded checkpoint does not score the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from mx_moe.eval import Evaluation

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
HEADING = (
    "model", "experts", "stored as", "bits per byte", "change", "expert bytes", "bits a weight", "covered", "backend",
    "reloads the same",
)  # fmt: skip
PROMPT = b"The :mod:`pickle` module implements binary protocols for "


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned columns; the first row is the heading, the first column left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for cells in rows:
        yield "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )


def row(model: str, name: str, stored: str, found: Evaluation, plain: float, same: str) -> list[str]:
    """One line of the table; ``plain``: the bits per byte with 16-bit experts."""
    experts = found.experts
    return [
        model, name, stored, f"{found.bits_per_byte:.4f}", f"{100 * (found.bits_per_byte / plain - 1):+.2f}%",
        f"{experts.expert_bytes:,}", f"{8 * experts.expert_bytes / experts.elements:.2f}",
        f"{100 * experts.coverage:.0f}%", ", ".join(experts.backends), same,
    ]  # fmt: skip


def score(model: str, text: bytes, folder: Path, bar: tqdm) -> tuple[list[list[str]], bool]:
    """The rows of one model, and whether each checkpoint scored the same as what was written and as its 16-bit copy."""
    import mx_quant as mq
    from mx_moe.eval import evaluate

    in_memory: dict[str, Evaluation] = {}
    rows, all_same = [], True
    for name in FORMATS:
        bar.set_description(f"{model} {name}")
        in_memory[name] = evaluate(HERE / model, text, name)
        rows.append(row(model, name, "in memory", in_memory[name], in_memory["bf16"].bits_per_byte, "-"))
        bar.update()
    for layout, name in LAYOUTS.items():
        bar.set_description(f"{model} {layout}")
        out, copy = folder / f"{model}-{layout}", folder / f"{model}-{layout}-bf16"
        mq.quantize_checkpoint(HERE / model, out, name, layout=layout, exclude=("*self_attn*",))
        mq.dequantize_checkpoint(out, copy)
        reloaded = evaluate(out, text, "stored")
        same = reloaded.bits_per_byte == evaluate(copy, text, "bf16").bits_per_byte
        if name != "nvfp4":  # on disk NVFP4's global scale has an exact reciprocal, in memory it need not
            same &= reloaded.bits_per_byte == in_memory[name].bits_per_byte
        rows.append(row(model, name, layout, reloaded, in_memory["bf16"].bits_per_byte, "yes" if same else "NO"))
        all_same &= same
        bar.update()
    return rows, all_same


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--max-bytes", type=int, default=8192, help="bytes of text to score (default 8192)")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which of the two (default both)")
    args = p.parse_args(argv)

    from tqdm import tqdm

    from mx_moe import select_mxfp8_moe_backend
    from mx_moe.eval import continue_line
    from mx_moe.integrations.loading import load_quantized

    warnings.filterwarnings("ignore", message="emulated experts")  # the table says which backend runs
    quiet_transformers()
    start = time.perf_counter()
    text = (HERE / "python-docs.txt").read_bytes()[: args.max_bytes]
    print("Experts run on:", *str(select_mxfp8_moe_backend()).splitlines(), sep="\n  ")
    rows, all_same = [list(HEADING)], True
    with tempfile.TemporaryDirectory() as folder:
        with tqdm(total=len(args.models) * (len(FORMATS) + len(LAYOUTS)), unit="run", file=sys.stderr) as bar:
            for name in args.models:
                found, same = score(name, text, Path(folder), bar)
                rows += found
                all_same &= same
        print(
            f"\n{len(text):,} bytes of Python documentation, with experts quantized in memory and read from checkpoints:\n"
        )
        print(*table(rows), sep="\n", flush=True)
        model, _ = load_quantized(Path(folder) / f"{args.models[-1]}-gpt-oss")
        line = continue_line(model, PROMPT, new_bytes=96)
    print(f"\n{args.models[-1]}, reloaded in MXFP4, continues a line:\n\n{(PROMPT + line).decode(errors='replace')}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if not all_same:
        print("a reloaded checkpoint differs from what was written", file=sys.stderr)
    return 0 if all_same else 1


def quiet_transformers() -> None:
    """Leave standard error to our progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
