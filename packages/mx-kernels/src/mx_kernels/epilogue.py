"""What happens to an accumulator before it is stored, as data: activation and epilogue of a GEMM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .formats import Format, ScaleRule

KINDS = ("silu", "swiglu_oai", "gelu", "gelu_tanh", "relu2", "identity")
LAYOUTS = ("concatenated", "interleaved")


@dataclass(frozen=True)
class Activation:
    """An activation function and where its gate and up inputs are.

    Gated, with g and u the two halves of the last dimension [.., 2I] -> [.., I]; g = min(g, limit), u = clamp(u, -limit, limit) first:

    - "silu":       g * sigmoid(g) * u
    - "swiglu_oai": g * sigmoid(alpha * g) * (u + beta)      (gpt-oss: alpha 1.702, beta 1, limit 7)
    - "gelu", "gelu_tanh": gelu(g) * u, by erf or by tanh;  "relu2": relu(g)^2 * u;  "identity": g * u

    Not gated (``gated=False``): f(g) of [.., I] -> [.., I]; "swiglu_oai" is always gated.
    ``layout``: "concatenated" [g0..gI-1, u0..uI-1] or "interleaved" [g0, u0, g1, u1 ..].
    ``alpha`` and ``beta`` belong to "swiglu_oai" alone and must be given there: systems differ in their defaults
    (1.702 and 1, or 1 and 0). ``limit`` None is no clamp.
    """

    kind: str
    layout: str = "concatenated"
    gated: bool = True
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r}; there are {', '.join(KINDS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown activation layout {self.layout!r}; there are {', '.join(LAYOUTS)}")
        if self.kind == "swiglu_oai":
            if not self.gated:
                raise ValueError("swiglu_oai is a gated activation: gated=False has no meaning for it")
            if self.alpha is None or self.beta is None:
                raise ValueError(
                    "swiglu_oai needs alpha and beta (gpt-oss: alpha=1.702, beta=1.0, limit=7.0): defaults differ between systems"
                )
        elif self.alpha is not None or self.beta is not None:
            raise ValueError(
                f"alpha and beta belong to swiglu_oai; {self.kind} has none, got alpha={self.alpha}, beta={self.beta}"
            )
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, needs a finite number")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit is {self.limit}, needs a positive number (None for no clamp)")

    def out_features(self, n: int) -> int:
        """Output width for ``n`` input features: n/2 gated, n otherwise; ValueError for an odd gated n."""
        if not self.gated:
            return n
        if n % 2:
            raise ValueError(
                f"a gated activation halves its input, which has an odd width of {n}: it needs as many gates as ups "
                "(gated=False if there are no gates)"
            )
        return n // 2


@dataclass(frozen=True, eq=False)
class Epilogue:
    """Applied to the float32 accumulator in this order: bias, activation, row weight, then a cast or a requantization.

    bias: [N] (``gemm``) or [E, N] (``grouped_gemm``), any float dtype, N before the activation.
    row_weight: float32, one per output row. requantize_to: the result is a QuantizedTensor of that format; round_to: it is a
    plain tensor of the values that such a one would have (``rule`` None: the format's default). The output's width must be a
    multiple of the format's block. TypeError for an activation or a format of another type; ValueError for both at once,
    and for round_to a format with a global scale, which is known only when the whole result is.
    """

    bias: Tensor | None = None
    activation: Activation | None = None
    row_weight: Tensor | None = None
    requantize_to: Format | None = None
    rule: ScaleRule | None = None
    round_to: Format | None = None

    def __post_init__(self) -> None:
        a, f = self.activation, self.requantize_to
        if a is not None and not isinstance(a, Activation):
            raise TypeError(f'activation is a {type(a).__name__}, needs an Activation: Activation("silu") is one')
        for name, value in (("requantize_to", f), ("round_to", self.round_to)):
            if value is not None and not isinstance(value, Format):
                raise TypeError(f"{name} is a {type(value).__name__}, needs a Format: get_format(name) finds one")
        if self.round_to is not None:
            if f is not None:
                raise ValueError(f"requantize_to is {f} and round_to {self.round_to}: one of them, codes or values")
            if self.round_to.has_global_scale:
                raise ValueError(
                    f"round_to is {self.round_to}, whose global scale needs the whole result: round it with quantize_dequantize"
                )
