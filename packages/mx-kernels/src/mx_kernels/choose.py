"""One chooser: a pure function from device facts and a problem to a choice *and every rejection with its reason*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Unsupported(RuntimeError):
    """Nothing fits. ``rejected`` holds (name, reason) of every candidate, in order of preference."""

    def __init__(self, message: str, rejected: Sequence[tuple[str, str]] = ()) -> None:
        self.rejected = tuple(rejected)
        super().__init__("\n".join((message, *(f"  {name}: {reason}" for name, reason in self.rejected))))


@dataclass(frozen=True)
class Candidate:
    """One way of doing a job. ``why_not(device, problem)`` is None where it works, else the reason why it does not.

    opt_in: why it is never taken by "auto", only by name; None for the others.
    """

    name: str
    why_not: Callable[[Any, Any], str | None]
    build: Callable[..., Any]
    opt_in: str | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and (name, reason) of those preferred to it or refused, in order of preference."""

    candidate: Candidate
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of the chosen candidate."""
        return self.candidate.name

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: {"backend": name, "rejected": {name: reason}}."""
        return {"backend": self.name, "rejected": dict(self.rejected)}

    def __str__(self) -> str:
        return "\n".join((self.name, *(f"  {name}: {reason}" for name, reason in self.rejected)))


def choose(candidates: Sequence[Candidate], device: Any, problem: Any, requested: str = "auto") -> Choice:
    """The first candidate, in order of preference, that ``device`` can run ``problem`` with.

    ``requested`` names one candidate instead of "auto": it is taken or refused, never replaced by another.
    Raises Unsupported with every reason where none fits; ValueError for an unknown name.
    """
    names = [c.name for c in candidates]
    if requested != "auto":
        if requested not in names:
            raise ValueError(f"unknown backend {requested!r}; there are {', '.join(('auto', *names))}")
        wanted = candidates[names.index(requested)]
        reason = wanted.why_not(device, problem)
        if reason is not None:
            raise Unsupported(f"the requested backend cannot run {problem} on {device}", ((wanted.name, reason),))
        return Choice(wanted)
    rejected: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.why_not(device, problem) or candidate.opt_in
        if reason is None:
            return Choice(candidate, tuple(rejected))
        rejected.append((candidate.name, reason))
    raise Unsupported(f"no backend can run {problem} on {device}", rejected)
