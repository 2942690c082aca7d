"""Rows of tuned.py as data: made from measurements, merged with those that are there, written as source."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from typing import Any

from mx_kernels.tuned import Row, Run, class_of
from mx_kernels.tuning import Config, Problem

Rows = tuple[tuple[Run, ...], tuple[Row, ...]]


def row_of(p: Problem, block: int, c: Config, us: float, model_us: float) -> dict[str, Any]:
    """A measured row, as tune.json holds it."""
    return {
        "problem": asdict(p),
        "block": block,
        "config": asdict(c),
        "us": round(us, 2),
        "model_us": round(model_us, 2),
    }


def merge(runs: tuple[Run, ...], rows: tuple[Row, ...], results: Iterable[dict[str, Any]]) -> Rows:
    """Old rows and those of new results. What a result measured replaces every older row of that device and problem.

    So a row goes where the model has become as good. Runs that no row refers to are left out.
    """
    kept = [(runs[r.run], r.problem, r.block, r.config, r.us, r.model_us) for r in rows]
    for result in results:
        w = result["where"]
        run = Run(class_of(w["device"]), w["units"], w["torch"], w["triton"], w["date"])
        measured = {Problem(**p) for p in result["measured"]}
        place = (run.device, run.units)
        kept = [k for k in kept if (k[0].device, k[0].units) != place or k[1] not in measured]
        kept += [
            (run, Problem(**r["problem"]), r["block"], Config(**r["config"]), r["us"], r["model_us"])
            for r in result["rows"]
        ]
    kept.sort(key=lambda k: (k[0].device, k[0].units, *vars(k[1]).values()))
    order = tuple(dict.fromkeys(sorted((k[0] for k in kept), key=lambda run: tuple(vars(run).values()))))
    return order, tuple(Row(order.index(run), *rest) for run, *rest in kept)


def literal(value: object) -> str:
    """A dataclass as a call: positional without defaults, by name what differs from its default."""
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value).replace("'", '"')
    parts = []
    for f in fields(value):
        v = getattr(value, f.name)
        if f.default is MISSING:
            parts.append(literal(v))
        elif v != f.default:
            parts.append(f"{f.name}={literal(v)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def render(runs: tuple[Run, ...], rows: tuple[Row, ...], into: str | None = None) -> str:
    """Both tables as source; ``into``: a module's source, with the tables between its "fmt: off" and "fmt: on" replaced."""

    def table(name: str, kind: str, items: tuple[object, ...]) -> str:
        lines = [f"    {literal(item)},\n" for item in items]
        lines = [line if len(line) <= 120 else line.replace(" Config(", "\n        Config(") for line in lines]
        return f"{name}: tuple[{kind}, ...] = " + (f"(\n{''.join(lines)})" if items else "()")

    text = f"{table('RUNS', 'Run', runs)}\n{table('ROWS', 'Row', rows)}\n"
    if into is None:
        return text
    found = re.search(r"(?<=# fmt: off\n).*?(?=# fmt: on\n)", into, re.DOTALL)
    if found is None:
        raise ValueError(
            'the file has no "# fmt: off" ... "# fmt: on": it must be tuned.py, whose tables stand between them'
        )
    return into[: found.start()] + text + into[found.end() :]
