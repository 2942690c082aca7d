"""Packing weights on a GPU: pack, unpack and rebase.

    python benchmarks/packing_gpu.py [--out FOLDER] [--shape E N K]

GB/s count each tensor once, read or written (packed weights with their padding); the share is of a device-to-device copy in the
same run. ``pack`` and ``rebase`` are timed as they are called, their checks and the wait for the device included. The bytes are
checked against the PyTorch version, expert by expert, before a time is printed. Writes packing_gpu.json and packing_gpu.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from cases import describe
from ceilings import copy_gb_s
from torch import Tensor

import mx_kernels as mk
from mx_kernels import packing
from mx_kernels.rebase import REBASED_FORMATS

SHAPES = ((128, 5760, 2880), (8, 28672, 4096))


def time_us(run: Callable[[], object], times: int = 7) -> float:
    """Median microseconds of ``run()`` in a stream of calls, after two for warmth."""
    for _ in range(2):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in pairs:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return 1e3 * sorted(before.elapsed_time(after) for before, after in pairs)[times // 2]


def random_weight(shape: tuple[int, ...], f: mk.Format) -> mk.QuantizedTensor:
    """Random finite codes and random scales around one."""
    *lead, n, k = shape
    codes = torch.randint(0, 256, (*lead, n, f.data_width(k)), dtype=torch.uint8, device="cuda")
    if f.element.dtype is not None:
        codes &= 0xBF  # no NaN, no infinity
    low, high = (110, 125) if f.scale == "e8m0" else (1, 127)
    scale = torch.randint(low, high, (*lead, n, k // f.block), dtype=torch.uint8, device="cuda")
    g = torch.ones(lead, device="cuda") if f.has_global_scale else None
    return mk.QuantizedTensor(codes.view(f.data_dtype), scale.view(f.scale_dtype), f, f.default_rule, global_scale=g)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"{what}: the result differs from the PyTorch version; no time is printed")


def measure(f: mk.Format, shape: tuple[int, ...], gated: bool, copy: float) -> list[dict[str, str | float]]:
    """Rows of one weight, checked first on its first and last expert."""
    q = random_weight(shape, f)
    case = f"{f} {'x'.join(map(str, shape))}{' gated' if gated else ''}"
    packed = mk.pack(q, gated=gated)
    for part in (slice(0, 1), slice(shape[0] - 1, shape[0])):
        one = q[part]
        with mock.patch.object(packing, "direct", return_value=False):
            want = mk.pack(one, gated=gated)
        assert packed.scale is not None
        assert want.scale is not None
        require(same(packed.data[part], want.data) and same(packed.scale[part], want.scale), f"pack {case}")
    moved = q.nbytes + packed.nbytes
    runs: list[tuple[str, Callable[[], object], int]] = [("pack", lambda: mk.pack(q, gated=gated), moved)]
    runs.append(("unpack", packed.unpack, moved))
    if f in REBASED_FORMATS:
        runs.append(("rebase", lambda: mk.rebase(q, gated=gated), q.nbytes + mk.rebase(q, gated=gated).nbytes))
    rows: list[dict[str, str | float]] = []
    del packed
    for name, run, bytes_ in runs:
        us = time_us(run)
        rate = bytes_ / us / 1e3
        rows.append({"kernel": name, "case": case, "us": us, "gb_s": rate, "share": rate / copy})
        print(f"{name:8} {case:40} {us:9.0f} us {rate:6.0f} GB/s {rate / copy:6.1%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("E", "N", "K"))
    args = parser.parse_args()
    copy = copy_gb_s()
    where = describe()
    head = f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}"
    head += f"; device-to-device copy {copy:.0f} GB/s (read + write)."
    print(head)
    rows = []
    for shape in [tuple(args.shape)] if args.shape else SHAPES:
        for f in mk.FORMATS.values():
            for gated in (True, False):
                rows += measure(f, shape, gated, copy)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packing_gpu.json").write_text(json.dumps({**where, "copy_gb_s": copy, "rows": rows}, indent=1))
    lines = [head, "", "| kernel | case | us | GB/s | share of the copy rate |", "|---|---|---|---|---|"]
    lines += [f"| {r['kernel']} | {r['case']} | {r['us']:.0f} | {r['gb_s']:.0f} | {r['share']:.0%} |" for r in rows]
    (args.out / "packing_gpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
