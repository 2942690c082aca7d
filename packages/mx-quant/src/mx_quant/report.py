"""What quantization cost, tensor by tensor: ``e = dequantize(q) - x`` against the source ``x``.

    SNR = 10 log10(sum x^2 / sum e^2) dB;  relative error = ||e|| / ||x||;  cosine = <x, y> / (||x|| ||y||) with y = x + e

Products are float32 (float64 for a float64 source), sums float64. Tensors are streamed: one pair at a time, in pieces of a bounded size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import QuantizedTensor

from .layouts import classify

_PIECE = (
    1 << 18
)  # elements compared at once: 1 MiB of float32 stays in a core's cache, two to four times faster than 16 MiB


@dataclass(frozen=True)
class Error:
    """The error of one tensor, or of one expert of it.

    snr_db: infinite where nothing was lost. relative: ||e|| / ||x||. max_abs: the largest |e|. cosine: of x and y (1 for two
    zero tensors).
    """

    snr_db: float
    relative: float
    max_abs: float
    cosine: float


@dataclass(frozen=True)
class Row:
    """One tensor of a report. ``experts`` holds the SNR in dB of each expert of a fused tensor [E, N, K], else nothing.

    energy: sum x^2 and sum e^2, of which the errors of several tensors together are made.
    """

    name: str
    format: str
    rule: str
    shape: tuple[int, ...]
    nbytes: int
    source_nbytes: int
    error: Error
    experts: tuple[float, ...] = ()
    energy: tuple[float, float] = (0.0, 0.0)

    @property
    def bits(self) -> float:
        """Bits stored for one element, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; numbers that are not finite are null (an SNR of null with ``exact`` true: nothing was lost)."""
        found = asdict(self) | asdict(self.error) | {"bits": self.bits, "exact": self.error.max_abs == 0}
        del found["error"], found["energy"]
        found["shape"] = list(self.shape)
        found["experts"] = [_finite(s) for s in self.experts]
        return {k: _finite(v) if isinstance(v, float) else v for k, v in found.items()}


@dataclass(frozen=True)
class Report:
    """The rows of every tensor compared, in the order they came, and the error of all of them together."""

    rows: tuple[Row, ...]
    total: Error

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized tensors."""
        return sum(r.nbytes for r in self.rows)

    @property
    def source_nbytes(self) -> int:
        """Bytes of their sources."""
        return sum(r.source_nbytes for r in self.rows)

    def worst(self, n: int = 10) -> tuple[Row, ...]:
        """The ``n`` rows of lowest SNR, the lowest first; one whose SNR is NaN comes before all."""
        return tuple(sorted(self.rows, key=lambda r: -math.inf if math.isnan(r.error.snr_db) else r.error.snr_db)[:n])

    def layers(self) -> dict[int, float]:
        """SNR in dB of all weights of each layer together, by its number."""
        sums: dict[int, _Sums] = {}
        for row in self.rows:
            layer = classify(row.name).layer
            if layer is not None:
                sums.setdefault(layer, _Sums()).add(_Sums(xx=row.energy[0], ee=row.energy[1]))
        return {n: sums[n].error().snr_db for n in sorted(sums)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: {"total", "bytes", "source_bytes", "layers" (SNR), "tensors", "worst" (names)}."""
        return {
            "total": {k: _finite(v) for k, v in asdict(self.total).items()},
            "bytes": self.nbytes,
            "source_bytes": self.source_nbytes,
            "layers": {str(n): _finite(snr) for n, snr in self.layers().items()},
            "tensors": [r.to_dict() for r in self.rows],
            "worst": [r.name for r in self.worst()],
        }

    def to_markdown(self, worst: int = 10) -> str:
        """A table of all tensors together and of the ``worst`` ones by SNR (0: of all tensors in their order)."""
        head = ["tensor", "format", "shape", "SNR dB", "relative error", "max error", "cosine", "bits", "bytes"]
        lines = [" | ".join(head), " | ".join("---" for _ in head)]
        e, ratio = self.total, self.source_nbytes / max(1, self.nbytes)
        count = f"**all {len(self.rows)}**"
        lines.append(
            " | ".join((count, "", "", *_numbers(e), f"{ratio:.2f}x smaller", f"{self.nbytes:,}")),
        )
        for r in self.worst(worst) if worst else self.rows:
            shape = "x".join(map(str, r.shape))
            lines.append(
                " | ".join((f"`{r.name}`", r.format, shape, *_numbers(r.error), f"{r.bits:.2f}", f"{r.nbytes:,}"))
            )
        return "\n".join(f"| {line} |" for line in lines) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a heat map of SNR (PNG, or what the suffix says): layers x experts for each expert projection, or layers x weights.

        Raises ModuleNotFoundError where matplotlib is missing, ValueError where no tensor's name has a layer number.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("plots need matplotlib: pip install 'mx-quant[plot]'", name=e.name) from e
        panels = self._panels()
        if not panels:
            raise ValueError("no tensor's name has a layer number (layers.N.): there are no layers to plot")
        width = max(6.0, min(24.0, 1.5 + 0.25 * max(len(columns) for _, columns, _ in panels)))
        figure = Figure(figsize=(width, sum(1.6 + 0.22 * len(grid) for _, _, grid in panels)), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axis, (title, columns, grid) in zip(axes, panels, strict=True):
            layers = sorted(grid)
            values = [[_finite(grid[n].get(c, math.nan)) for c in columns] for n in layers]
            image = axis.imshow([[math.nan if v is None else v for v in line] for line in values], aspect="auto")
            axis.set(title=f"SNR in dB: {title}", ylabel="layer", xlabel="expert" if title != "weights" else "weight")
            axis.set_yticks(range(len(layers)), [str(n) for n in layers])
            step = max(1, len(columns) // 32)
            axis.set_xticks(range(0, len(columns), step), [str(c) for c in columns[::step]])
            if title == "weights":
                axis.tick_params(axis="x", rotation=60)
            figure.colorbar(image, ax=axis)
        figure.savefig(path, dpi=120)

    def _panels(self) -> list[tuple[str, list[Any], dict[int, dict[Any, float]]]]:
        """(title, columns, {layer: {column: SNR}}) of each heat map: one per expert projection, else one of all weights."""
        experts: dict[str, dict[int, dict[Any, float]]] = {}
        dense: dict[int, dict[Any, float]] = {}
        for row in self.rows:
            role = classify(row.name)
            layer = role.layer
            if layer is None:
                continue
            inner = row.name.partition(f".{layer}.")[2]
            if row.experts:
                experts.setdefault(role.part or inner, {}).setdefault(layer, {}).update(enumerate(row.experts))
            elif role.expert is not None:
                experts.setdefault(role.part, {}).setdefault(layer, {})[role.expert] = row.error.snr_db
            else:
                dense.setdefault(layer, {})[inner.removesuffix(".weight")] = row.error.snr_db
        panels = [(title, sorted(_columns(grid)), grid) for title, grid in experts.items()]
        if dense:
            panels.append(("weights", _columns(dense), dense))
        return panels


def compare(pairs: Iterable[tuple[str, Tensor, QuantizedTensor]]) -> Report:
    """The report of (name, source [..., N, K], quantized [..., N, K]) pairs; each is dropped before the next is asked for.

    ValueError names a tensor whose shapes differ, or that comes twice; TypeError one that is not a floating-point source.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    total = _Sums()
    for name, x, q in pairs:
        if name in seen:
            raise ValueError(f"{name} comes twice: every tensor needs a name of its own")
        seen.add(name)
        if not x.is_floating_point() or x.dtype.itemsize < 2:
            raise TypeError(f"{name}: the source is {x.dtype}, needs bfloat16, float16, float32 or float64")
        if x.shape != q.shape:
            raise ValueError(f"{name}: the source has shape {tuple(x.shape)}, the quantized tensor {tuple(q.shape)}")
        row, sums = _compare(name, x, q)
        rows.append(row)
        total.add(sums)
        del x, q  # before the next pair is made
    return Report(tuple(rows), total.error())


def error_report(source: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]) -> Report:
    """``compare`` of two mappings by name; ValueError where a quantized tensor has no source."""
    missing = [n for n in quantized if n not in source]
    if missing:
        raise ValueError(f"{len(missing)} quantized tensors have no source, the first is {missing[0]!r}")
    return compare((name, source[name], q) for name, q in quantized.items())


@dataclass
class _Sums:
    """Float64 sums that errors are made of, and that add up over pieces."""

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    ee: float = 0.0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        self.xx += other.xx
        self.yy += other.yy
        self.xy += other.xy
        self.ee += other.ee
        self.largest = other.largest if math.isnan(other.largest) else max(self.largest, other.largest)

    def error(self) -> Error:
        if self.ee == 0:
            snr, relative = math.inf, 0.0
        else:
            ratio = self.xx / self.ee
            snr = 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan
            relative = math.sqrt(self.ee / self.xx) if self.xx > 0 else math.nan if math.isnan(self.xx) else math.inf
        norm = math.sqrt(self.xx * self.yy)
        cosine = self.xy / norm if norm > 0 else math.nan if math.isnan(norm) else float(self.xx == self.yy)
        return Error(snr, relative, self.largest, max(-1.0, min(1.0, cosine)) if cosine == cosine else cosine)


def _compare(name: str, x: Tensor, q: QuantizedTensor) -> tuple[Row, _Sums]:
    total, experts = _Sums(), []
    if q.ndim >= 3:
        for e in range(q.shape[0]):
            one = _sums(x[e], q[e])
            experts.append(one.error().snr_db)
            total.add(one)
    else:
        total = _sums(x, q)
    row = Row(
        name, q.format.name, q.rule.value, tuple(q.shape), q.nbytes, x.nbytes, total.error(), tuple(experts),
        (total.xx, total.ee),
    )  # fmt: skip
    return row, total


def _sums(x: Tensor, q: QuantizedTensor) -> _Sums:  # [..., N, K]
    total = _Sums()
    for a, b in _pieces(x, q):
        wide = torch.promote_types(a.dtype, torch.float32)
        a, y = a.detach().to(wide), mk.dequantize(b, torch.float32).to(a.device, wide)
        e = y - a
        xx, yy, ee = (float((t * t).sum(dtype=torch.float64)) for t in (a, y, e))
        largest = float(e.abs().max()) if e.numel() else 0.0
        total.add(_Sums(xx, yy, (xx + yy - ee) / 2, ee, largest))  # <x, y> from ||y - x||^2
    return total


def _pieces(x: Tensor, q: QuantizedTensor) -> Iterator[tuple[Tensor, QuantizedTensor]]:
    """``x`` and ``q`` in pieces along their first dimension, of about _PIECE elements each."""
    if q.ndim < 2:
        yield x, q
        return
    step = max(1, _PIECE // max(1, math.prod(q.shape[1:])))
    for start in range(0, q.shape[0], step):
        yield x[start : start + step], q[start : start + step]


def _columns(grid: Mapping[int, Mapping[Any, float]]) -> list[Any]:
    return list(dict.fromkeys(c for line in grid.values() for c in line))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(e: Error) -> tuple[str, ...]:
    return f"{e.snr_db:.2f}", f"{e.relative:.3e}", f"{e.max_abs:.3e}", f"{e.cosine:.6f}"
