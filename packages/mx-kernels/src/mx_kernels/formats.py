"""Number formats as rows of data.

A *format* is an element type, a block length along the last dimension (K) and a block scale::

    x[..., k] ~ decode(data[..., k]) * scale[..., k // block] * global_scale

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.1 to 5.3 (elements), 5.4 (E8M0), 6.3 (conversion);
NVIDIA's description of NVFP4 (E2M1 elements, one E4M3 scale per 16, one float32 scale per tensor).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Element:
    """A small floating-point element type: 1 sign bit, ``exponent`` and ``mantissa`` bits.

    ``max`` is the largest finite magnitude, ``max_code`` its code, ``emax`` its exponent. ``dtype`` is the torch dtype that
    stores one element a byte, or None where codes are packed into uint8 (two FP4 a byte, four FP6 in three bytes).
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    emax: int
    max: float
    max_code: int
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 1 + self.exponent + self.mantissa


E4M3 = Element("e4m3", 4, 3, 7, 8, 448.0, 0x7E, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, 15, 15, 57344.0, 0x7B, torch.float8_e5m2)
E3M2 = Element("e3m2", 3, 2, 3, 4, 28.0, 0x1F)
E2M3 = Element("e2m3", 2, 3, 1, 2, 7.5, 0x1F)
E2M1 = Element("e2m1", 2, 1, 1, 2, 6.0, 0x07)


class ScaleRule(enum.StrEnum):
    """How a block's scale follows from its largest magnitude ``amax``.

    MX (E8M0 scales), with ``amax = 2^e * (1 + m)``:

    - ``FLOOR`` (OCP, torchao): ``2^(e - emax)``; magnitudes above the element's maximum saturate.
    - ``CEIL``: one more where ``m > 0``.
    - ``EVEN`` (AITER, Quark, compressed-tensors MXFP4): amax's mantissa is rounded to the element's first.
    - ``RCEIL`` (cuBLAS, TransformerEngine): ``2^ceil(log2(amax / max))``, exactly, on bits.
    - ``SEARCH`` (offline): the better of FLOOR's scale and the next one by squared error of the block.

    NVFP4 (E4M3 scales under a float32 global scale ``g``):

    - ``AMAX``: ``e4m3(amax / (6 g))``.
    - ``FOUR_OVER_SIX`` (offline): the better of mapping amax to 6 and to 4.
    - ``SEARCH`` (offline): the best of the nine E4M3 codes around AMAX's.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"
    SEARCH = "search"
    AMAX = "amax"
    FOUR_OVER_SIX = "four_over_six"


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    ``block`` elements along K share one ``scale``, "e8m0" (a power of two) or "e4m3". ``rules`` are the scale rules that
    the format accepts; the first is its default.
    """

    name: str
    element: Element
    block: int
    scale: str
    rules: tuple[ScaleRule, ...]
    has_global_scale: bool = False

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Copies and pickles of a row of the table are that row, which code compares by identity."""
        known = FORMATS.get(self.name) is self
        return (get_format, (self.name,)) if known else super().__reduce__()

    @property
    def default_rule(self) -> ScaleRule:
        """The scale rule used where the caller names none."""
        return self.rules[0]

    @property
    def data_dtype(self) -> torch.dtype:
        """The dtype of ``QuantizedTensor.data``: an FP8 dtype, or uint8 for packed FP6 and FP4 codes."""
        return self.element.dtype or torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of ``QuantizedTensor.scale``: uint8 for E8M0 bytes, float8_e4m3fn for E4M3."""
        return torch.uint8 if self.scale == "e8m0" else torch.float8_e4m3fn

    @property
    def bits_per_element(self) -> float:
        """Bits stored for one element, its share of the block scale included."""
        return self.element.bits + 8 / self.block

    def data_width(self, k: int) -> int:
        """The last dimension of ``data`` for ``k`` elements: k, 3k/4 or k/2."""
        return k * self.element.bits // 8

    def check_k(self, k: int, what: str = "the last dimension") -> None:
        """Raise ValueError unless ``k`` is a positive multiple of the block length."""
        if k <= 0 or k % self.block:
            raise ValueError(
                f"{what} is {k}, but {self.name} needs a positive multiple of its block length {self.block}: "
                f"pad K to {max(1, -(-k // self.block)) * self.block} with zeros"
            )

    def check_rule(self, rule: ScaleRule | str | None) -> ScaleRule:
        """``rule`` as a ScaleRule of this format (None: the default); ValueError if it has no such rule."""
        if rule is None:
            return self.default_rule
        names = ", ".join(r.value for r in self.rules)
        try:
            rule = ScaleRule(rule)
        except ValueError:
            raise ValueError(f"unknown scale rule {rule!r}; {self.name} has {names}") from None
        if rule not in self.rules:
            raise ValueError(f"{self.name} has no scale rule {rule.value!r}; it has {names}")
        return rule

    def __str__(self) -> str:
        return self.name


def _mx(first: ScaleRule) -> tuple[ScaleRule, ...]:
    every = (ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.SEARCH)
    return (first, *(rule for rule in every if rule is not first))


MXFP8 = Format("mxfp8_e4m3", E4M3, 32, "e8m0", _mx(ScaleRule.RCEIL))
MXFP8_E5M2 = Format("mxfp8_e5m2", E5M2, 32, "e8m0", _mx(ScaleRule.RCEIL))
MXFP6_E2M3 = Format("mxfp6_e2m3", E2M3, 32, "e8m0", _mx(ScaleRule.EVEN))
MXFP6_E3M2 = Format("mxfp6_e3m2", E3M2, 32, "e8m0", _mx(ScaleRule.EVEN))
MXFP4 = Format("mxfp4", E2M1, 32, "e8m0", _mx(ScaleRule.EVEN))
NVFP4 = Format(
    "nvfp4", E2M1, 16, "e4m3", (ScaleRule.AMAX, ScaleRule.FOUR_OVER_SIX, ScaleRule.SEARCH), has_global_scale=True
)

FORMATS: dict[str, Format] = {f.name: f for f in (MXFP8, MXFP8_E5M2, MXFP6_E2M3, MXFP6_E3M2, MXFP4, NVFP4)}
_ALIASES = {"mxfp8": MXFP8, "mxfp6": MXFP6_E2M3}


def get_format(name: str | Format) -> Format:
    """The format of that name ("mxfp8" is E4M3, "mxfp6" is E2M3); ValueError names those there are."""
    if isinstance(name, Format):
        return name
    found = FORMATS.get(name) or _ALIASES.get(name)
    if found is None:
        raise ValueError(f"unknown format {name!r}; there are {', '.join((*FORMATS, *_ALIASES))}")
    return found
