"""Results of layers as Markdown, plots and README rows: of run.py (moe.json) and of the peer harness (time.jsonl), merged.

A cell is one (name, shape, format, tokens, routing): ``us`` is the mean of its passes, ``noise`` their spread over it, ``share`` the
roofline max(bytes / read rate, flops / matmul rate) over ``us``, with the ceilings of the card that its file was measured on. What
is compared: the same weight format, and activations in 16 bits, or quantized to FP8 ("_a8"), or weights dequantized in every call.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from cases import FORMATS, Ceilings, find_shape

Cell = dict[str, Any]
GROUPS = {"a16": "16-bit activations", "a8": "FP8 activations", "emulation": "emulation"}
TITLES = {
    "bf16": "bf16",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "mxfp6_e2m3": "MXFP6 E2M3",
    "mxfp6_e3m2": "MXFP6 E3M2",
}


# --- reading ---


def load(paths: list[Path]) -> tuple[dict[str, Any], list[Cell]]:
    """(device, versions, date, ceilings; merged cells) of files or folders; ValueError where they are of different devices."""
    files: list[Path] = []
    for path in paths:
        files += sorted((*path.glob("**/moe.json"), *path.glob("**/time*.jsonl"))) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no moe.json and no time*.jsonl under {', '.join(map(str, paths))}")
    where: dict[str, Any] = {}
    cells: list[Cell] = []
    for file in files:
        here, found = _of_harness(file) if file.suffix == ".jsonl" else _of_run(file)
        if where and here["device"] != where["device"]:
            raise ValueError(f"{file} is of {here['device']} and {files[0]} of {where['device']}: draw them apart")
        where = where or here
        cells += [finished(c, here) for c in found]
    return where, merged(cells)


def _of_run(file: Path) -> tuple[dict[str, Any], list[Cell]]:
    saved = json.loads(file.read_text())
    return saved["where"], saved["cells"]


def _of_harness(file: Path) -> tuple[dict[str, Any], list[Cell]]:
    """time.jsonl with micro.json (ceilings) and card.txt (date) beside it."""
    ceilings = json.loads((file.parent / "micro.json").read_text())["ceilings"]
    card = file.parent / "card.txt"
    dates = re.findall(r"^\d{4}-\d\d-\d\d$", card.read_text(), re.M) if card.is_file() else []
    where = {
        "device": ceilings["device"],
        "torch": ceilings["torch"],
        "triton": ceilings["triton"],
        "date": dates[-1] if dates else "date unknown",
        "ceilings": vars(Ceilings(ceilings["read_gbps"], ceilings["copy_gbps"], ceilings["bf16_tflops"])),
    }
    cells = []
    for line in filter(str.strip, file.read_text().splitlines()):
        r = json.loads(line)
        if "T" not in r or "skipped" in r:
            continue
        cell = {
            "name": r["peer"],
            "shape": r["shape"],
            "tokens": r["T"],
            "routing": "uniform",
            "ours": r["peer"].startswith("mx_"),
        }
        cell["format"] = r.get("fmt") or next((f for f in FORMATS if f in r["peer"]), "bf16")
        if "fail" in r:
            cell["failed"] = r["fail"][:200]
        elif not r["ok"]:
            cell |= {"failed": f"error {r['err']:.1e}"} | ({"error": r["err"]} if math.isfinite(r["err"]) else {})
        else:
            cell |= {"us": r["us"], "error": r["err"], "distinct": r["distinct"], "graph": r["mode"] == "graph"}
        cells.append(cell)
    return where, cells


def finished(cell: Cell, where: dict[str, Any]) -> Cell:
    """The cell with its floor and share; cells of old files bring a floor."""
    c = {"routing": "uniform", **cell}
    if c.pop("skew", 0.0):
        c["routing"] = f"zipf:{cell['skew']}"
    if "us" not in c:
        return c
    shape = find_shape(c["shape"])
    if "distinct" in c:
        c["floor_us"] = shape.floor_us(c["format"], c["tokens"], c["distinct"], Ceilings(**where["ceilings"]))
    c["share"] = c["floor_us"] / c["us"]
    c["tflops"] = shape.flops(c["tokens"]) / c["us"] * 1e-6
    return c


def merged(cells: list[Cell]) -> list[Cell]:
    """One cell each: passes averaged; a failure counts only where no pass succeeded. Order of first appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c["name"], c["shape"], c["format"], c["tokens"], c["routing"]), []).append(c)
    out = []
    for passes in groups.values():
        good = [c for c in passes if "us" in c]
        if not good:
            out.append(passes[-1])
            continue
        times = [c["us"] for c in good]
        us = statistics.mean(times)
        floor = statistics.mean(c["floor_us"] for c in good)
        spread = {"passes": len(times), "noise": (max(times) - min(times)) / us} if len(times) > 1 else {}
        out.append(
            {
                **good[-1],
                "us": us,
                "floor_us": floor,
                "share": floor / us,
                "error": max(c["error"] for c in good),
                **spread,
            }
        )
    return out


# --- comparing ---


def group(cell: Cell) -> tuple[str, str]:
    """What is compared with what: (weights' format, key of ``GROUPS``)."""
    name = cell["name"]
    return cell["format"], "emulation" if "emul" in name else "a8" if "_a8" in name else "a16"


def best_peer(cell: Cell, cells: list[Cell]) -> Cell | None:
    """The fastest peer of the same group, shape, tokens and routing."""
    same = [
        c for c in cells
        if "us" in c and not c.get("ours") and group(c) == group(cell)
        and all(c[key] == cell[key] for key in ("shape", "tokens", "routing"))
    ]  # fmt: skip
    return min(same, key=lambda c: float(c["us"]), default=None)


def speed_up(cell: Cell, cells: list[Cell]) -> float | None:
    """The best peer's time over this cell's; None for peers, failures, and where there is none."""
    peer = best_peer(cell, cells) if cell.get("ours") and "us" in cell else None
    return None if peer is None else float(peer["us"] / cell["us"])


def best_ours(cells: list[Cell], key: tuple[str, str]) -> dict[int, Cell]:
    """Our fastest cell of a group for each number of tokens."""
    out: dict[int, Cell] = {}
    for c in cells:
        if (
            c.get("ours")
            and "us" in c
            and group(c) == key
            and (c["tokens"] not in out or c["us"] < out[c["tokens"]]["us"])
        ):
            out[c["tokens"]] = c
    return out


# --- Markdown ---


def number(us: float) -> str:
    return f"{us:.{0 if us >= 100 else 1}f}"


def title(key: tuple[str, str]) -> str:
    fmt = TITLES.get(key[0], key[0])
    return fmt if key[1] == "a16" else f"{fmt}, {GROUPS[key[1]]}"


def head(where: dict[str, Any]) -> str:
    """Device, versions, date and ceilings, in a sentence."""
    text = f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}"
    if "ceilings" in where:
        c = Ceilings(**where["ceilings"])
        text += f"; read {c.read_gb_s:.0f} GB/s, copy {c.copy_gb_s:.0f} GB/s (read + write), bf16 {c.matmul_tflops:.0f} TFLOP/s"
    return text


def _table(cells: list[Cell], tokens: list[int]) -> list[str]:
    lines = ["| | " + " | ".join(f"T={t}" for t in tokens) + " | error | noise |", "|---" * (len(tokens) + 3) + "|"]
    for name, fmt in dict.fromkeys((c["name"], c["format"]) for c in cells):
        row = {c["tokens"]: c for c in cells if (c["name"], c["format"]) == (name, fmt)}
        texts = []
        for t in tokens:
            c = row.get(t, {})
            eager = "" if c.get("graph", True) else " (no graph)"
            texts.append(
                f"{number(c['us'])} · {100 * c['share']:.0f}{eager}" if "us" in c else c.get("failed", "")[:60]
            )
        worst = max((c["error"] for c in row.values() if "error" in c), default=math.nan)
        noise = max((c["noise"] for c in row.values() if "noise" in c), default=None)
        lines.append(
            f"| {name} | " + " | ".join(texts) + f" | {worst:.1e} | {'' if noise is None else f'{noise:.1%}'} |"
        )
    return lines


def _comparison(cells: list[Cell], tokens: list[int]) -> list[str]:
    """Speed-up of ours over the best peer of the group, with that peer's name."""
    lines = []
    for name, fmt in dict.fromkeys((c["name"], c["format"]) for c in cells if c.get("ours")):
        row = {c["tokens"]: c for c in cells if (c["name"], c["format"]) == (name, fmt)}
        texts = []
        for t in tokens:
            peer = best_peer(row[t], cells) if "us" in row.get(t, {}) else None
            texts.append("" if peer is None else f"{peer['us'] / row[t]['us']:.2f} {peer['name']}")
        if any(texts):
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    if not lines:
        return []
    return ["", "Speed-up over the best peer:", "", "| | " + " | ".join(f"T={t}" for t in tokens) + " |",
            "|---" * (len(tokens) + 1) + "|", *lines]  # fmt: skip


def _memory(cells: list[Cell]) -> list[str]:
    lines = []
    for name, fmt in dict.fromkeys((c["name"], c["format"]) for c in cells if "workspace_bytes" in c):
        row = [c for c in cells if (c["name"], c["format"]) == (name, fmt) and "workspace_bytes" in c]
        parts = ", ".join(f"{c['workspace_bytes'] / 2**20:.1f} at T={c['tokens']}" for c in row)
        weights = f"weights {row[0]['weight_bytes'] / 2**20:.0f} MiB; " if "weight_bytes" in row[0] else ""
        lines.append(f"- {name}: {weights}in a call, besides input and output, MiB: {parts}")
    return ["", "Memory:", "", *lines] if lines else []


def sections(cells: list[Cell]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((c["shape"], c["routing"]) for c in cells))


def section_name(shape: str, routing: str) -> str:
    return shape if routing == "uniform" else f"{shape} {routing.replace(':', '-')}"


def markdown(where: dict[str, Any], cells: list[Cell]) -> str:
    """Every cell: microseconds · percent of the roofline; then speed-ups, then memory."""
    lines = [f"{head(where)}. A cell: microseconds · percent of the roofline.", ""]
    if "note" in where:
        lines += [where["note"], ""]
    for shape, routing in sections(cells):
        here = [c for c in cells if (c["shape"], c["routing"]) == (shape, routing)]
        tokens = sorted({c["tokens"] for c in here})
        lines += [
            f"### {section_name(shape, routing)}",
            "",
            *_table(here, tokens),
            *_comparison(here, tokens),
            *_memory(here),
            "",
        ]
    return "\n".join(lines)


def readme(where: dict[str, Any], cells: list[Cell], shape: str, tokens: list[int] | None = None) -> str:
    """Rows for a README: the best peer and ours of each format, 16-bit activations, the faster one bold."""
    here = [
        c
        for c in cells
        if c["shape"] == shape and c["routing"] == "uniform" and (tokens is None or c["tokens"] in tokens)
    ]
    columns = sorted({c["tokens"] for c in here})
    lines = ["| tokens | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for fmt in FORMATS:
        ours = best_ours(here, (fmt, "a16"))
        peers = {t: best_peer(c, here) for t, c in ours.items()}
        if not any(peers.values()):
            continue
        rows: tuple[list[str], list[str]] = ([], [])
        for t in columns:
            times = [c and c["us"] for c in (peers.get(t), ours.get(t))]
            for row, us, other in zip(rows, times, reversed(times), strict=True):
                wins = us is not None and other is not None and us < other
                row.append("" if us is None else f"**{us:.0f}**" if wins else f"{us:.0f}")
        lines += [
            f"| {TITLES[fmt]}, {who} | " + " | ".join(row) + " |"
            for who, row in zip(("best peer", "mx"), rows, strict=True)
        ]
    return "\n".join(lines) + "\n"


def write(where: dict[str, Any], cells: list[Cell], out: Path) -> None:
    """moe.json, moe.md and the plots (these only where matplotlib is installed, which is said)."""
    out.mkdir(parents=True, exist_ok=True)
    save(where, cells, out)
    (out / "moe.md").write_text(markdown(where, cells))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plots: matplotlib is not installed here; elsewhere run.py --from {out / 'moe.json'} draws them")
        return
    from plots import headline, plot_section

    for shape, routing in sections(cells):
        here = [c for c in cells if (c["shape"], c["routing"]) == (shape, routing)]
        if not any(c.get("ours") for c in here):
            continue
        name = section_name(shape, routing)
        plot_section(f"{name} — {head(where)}", here, out / f"{name.replace(' ', '-')}.png")
    headline(head(where), cells, out / "speed-up.png")


def save(where: dict[str, Any], cells: list[Cell], out: Path) -> None:
    """moe.json, with few digits."""
    short = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in c.items()} for c in cells]
    text = ",\n".join(json.dumps(c) for c in short)
    (out / "moe.json").write_text(f'{{"where": {json.dumps(where)},\n"cells": [\n{text}\n]}}\n')
