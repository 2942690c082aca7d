"""What share of a model's weights is quantized, weight by weight, with the reason for each one that is not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .scheme import Scheme


@dataclass(frozen=True)
class Covered:
    """One weight: ``format`` it is quantized to, or None and the ``reason``. ``expert``: it belongs to experts of an MoE layer."""

    name: str
    numel: int
    format: str | None
    reason: str = ""
    expert: bool = False


@dataclass(frozen=True)
class Coverage:
    """The weights of a model with two and more dimensions, and ``other``, the elements of all its vectors and scalars."""

    scheme: Scheme
    rows: tuple[Covered, ...]
    other: int = 0

    @property
    def numel(self) -> int:
        """Elements of all parameters, quantized or not."""
        return self.other + sum(r.numel for r in self.rows)

    @property
    def quantized(self) -> int:
        """Elements of the weights that are quantized."""
        return sum(r.numel for r in self.rows if r.format is not None)

    @property
    def percent(self) -> float:
        """Percent of all parameters' elements that are quantized."""
        return 100 * self.quantized / max(1, self.numel)

    @property
    def expert_percent(self) -> float | None:
        """The same of expert weights alone; None for a model without experts."""
        experts = [r for r in self.rows if r.expert]
        if not experts:
            return None
        return 100 * sum(r.numel for r in experts if r.format is not None) / max(1, sum(r.numel for r in experts))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: {"scheme", "percent", "expert_percent", "quantized", "parameters", "weights"}."""
        return {
            "scheme": self.scheme.to_dict(),
            "percent": self.percent,
            "expert_percent": self.expert_percent,
            "quantized": self.quantized,
            "parameters": self.numel,
            "weights": [asdict(r) for r in self.rows],
        }

    def to_markdown(self) -> str:
        """A table of every weight, with the total first."""
        lines = ["| weight | elements | format |", "| --- | --- | --- |"]
        lines.append(f"| **{self.percent:.1f}% quantized** | {self.numel:,} | {self.scheme} |")
        lines += [f"| `{r.name}` | {r.numel:,} | {r.format or f'as it was: {r.reason}'} |" for r in self.rows]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        experts = "" if self.expert_percent is None else f", {self.expert_percent:.1f}% of expert weights"
        left = sum(r.format is None for r in self.rows)
        return (
            f"{self.scheme}: {self.percent:.1f}% of {self.numel:,} parameters quantized{experts}; "
            f"{len(self.rows) - left} weights quantized, {left} left as they were"
        )
