"""A scheme: the format of the weights, the format of the activations, and the weights' scale rule.

``WxAy`` reads: weights of x bits, activations of y bits; A16 leaves activations as they are (bfloat16 or float16).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import mx_kernels as mk
from mx_kernels import Format, QuantizedTensor, ScaleRule


@dataclass(frozen=True)
class Scheme:
    """What a layer quantizes, and to what.

    weight: format of the weights. activation: format that inputs are quantized to at run time, one scale per block of a
        token; None leaves them as they are. rule: the weights' scale rule (None: the weight format's default).
    Formats and the rule may be given by name. ValueError for an unknown name or a rule that the weight format has not.
    """

    weight: Format
    activation: Format | None = None
    rule: ScaleRule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", mk.get_format(self.weight))
        if self.activation is not None:
            object.__setattr__(self, "activation", mk.get_format(self.activation))
        object.__setattr__(self, "rule", self.weight.check_rule(self.rule))

    @property
    def name(self) -> str:
        """For example "mxfp4_w4a8": the weight format, then bits of weights and activations."""
        bits = 16 if self.activation is None else self.activation.element.bits
        return f"{self.weight}_w{self.weight.element.bits}a{bits}"

    def quantize_input(self, x: Tensor, global_scale: Tensor | None = None) -> Tensor | QuantizedTensor:
        """The operand of a GEMM for ``x`` [..., K]: quantized as the scheme says, or ``x`` itself.

        ``global_scale``: float32 [] for NVFP4 activations, from calibration; None takes it from ``x``'s largest magnitude,
        which then depends on every token of the batch.
        """
        if self.activation is None:
            return x
        if self.activation.has_global_scale and x.ndim > 2 and global_scale is None:
            # one scale for the whole batch, as for [T, K]: [B, T, K] and [B * T, K] give the same result
            global_scale = mk.compute_global_scale(x.reshape(-1, x.shape[-1]))
        return mk.quantize(x, self.activation, global_scale=global_scale)

    def to_dict(self) -> dict[str, str | None]:
        """A JSON-ready form: {"name", "weight", "activation", "rule"}."""
        rule = self.weight.check_rule(self.rule)
        return {
            "name": self.name,
            "weight": self.weight.name,
            "activation": None if self.activation is None else self.activation.name,
            "rule": rule.value,
        }

    def __str__(self) -> str:
        return self.name


W8A16 = Scheme(mk.MXFP8)
W8A8 = Scheme(mk.MXFP8, mk.MXFP8)
W6A16 = Scheme(mk.MXFP6_E2M3)
W6A8 = Scheme(mk.MXFP6_E2M3, mk.MXFP8)
W6A6 = Scheme(mk.MXFP6_E2M3, mk.MXFP6_E2M3)
W4A16 = Scheme(mk.MXFP4)
W4A8 = Scheme(mk.MXFP4, mk.MXFP8)
W4A4 = Scheme(mk.MXFP4, mk.MXFP4)
NVFP4_W4A16 = Scheme(mk.NVFP4)
NVFP4_W4A4 = Scheme(mk.NVFP4, mk.NVFP4)

SCHEMES: dict[str, Scheme] = {
    "w8a16": W8A16,
    "w8a8": W8A8,
    "w6a16": W6A16,
    "w6a8": W6A8,
    "w6a6": W6A6,
    "w4a16": W4A16,
    "w4a8": W4A8,
    "w4a4": W4A4,
    "nvfp4_w4a16": NVFP4_W4A16,
    "nvfp4_w4a4": NVFP4_W4A4,
}


def get_scheme(scheme: Scheme | Format | str, *, rule: ScaleRule | str | None = None) -> Scheme:
    """A scheme from itself, from a name of SCHEMES, or from a format or its name: that format's weights, inputs as they are.

    ``rule`` replaces the scheme's scale rule. ValueError for an unknown name lists those there are.
    """
    if isinstance(scheme, Format):
        scheme = Scheme(scheme)
    elif isinstance(scheme, str):
        found = SCHEMES.get(scheme.lower())
        if found is None:
            try:
                found = Scheme(mk.get_format(scheme))
            except ValueError:
                names = ", ".join((*SCHEMES, *mk.FORMATS))
                raise ValueError(f"unknown scheme or format {scheme!r}; there are {names}") from None
        scheme = found
    elif not isinstance(scheme, Scheme):
        raise TypeError(f"scheme is a {type(scheme).__name__}, needs a Scheme, a Format or a name")
    if rule is None:
        return scheme
    return Scheme(scheme.weight, scheme.activation, scheme.weight.check_rule(rule))
