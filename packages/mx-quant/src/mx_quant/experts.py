"""The weights of an MoE layer's experts, and how they are quantized: expert by expert, into storage allocated once.

E experts (rows of weights: routed ones of this rank, then fused shared ones), H hidden, I intermediate size. Canonical form:
``w13`` [E, 2I, H] with I gate rows and then I up rows, ``w2`` [E, H, I]; not gated, ``w13`` is [E, I, H]. Expert is dimension
0 of every tensor, so that a slice (expert parallel) or a permutation (load balancing) of experts is one of dimension 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mx_kernels import Format, QuantizedTensor

from . import storage
from .checks import check_dtype, check_loaded, quantize_finite
from .layouts import families
from .scheme import Scheme, get_scheme

LAYOUTS = ("concatenated", "interleaved")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of E experts, quantized or plain (both of one kind and format).

    w13: [E, 2I, H], gate rows then up rows, or [E, I, H] where experts are not gated. w2: [E, H, I].
    w13_bias: [E, 2I] or [E, I]; w2_bias: [E, H]; any float dtype, or None.
    input_format: what a layer quantizes the inputs of both GEMMs to; None leaves them as they are.
    w13_input_scale, w2_input_scale: float32 [E] or [], the calibrated global scales of NVFP4 inputs; None takes them from
        the inputs themselves.

    Construction checks shapes, dtypes and devices (ValueError, TypeError); it reads no values and copies nothing.
    """

    w13: Tensor | QuantizedTensor
    w2: Tensor | QuantizedTensor
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    input_format: Format | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        a, b = self.w13, self.w2
        if a.ndim != 3 or b.ndim != 3:
            raise ValueError(
                f"w13 {tuple(a.shape)} and w2 {tuple(b.shape)} need three dimensions, [E, 2I, H] and [E, H, I]"
            )
        e, n, h = a.shape
        if b.shape[0] != e or b.shape[1] != h:
            raise ValueError(f"w13 {tuple(a.shape)} [E, 2I, H] needs w2 of shape [{e}, {h}, I], got {tuple(b.shape)}")
        i = b.shape[2]
        if n not in (i, 2 * i):
            raise ValueError(
                f"w13 has {n} rows, but w2 {tuple(b.shape)} says I = {i}: needs 2I = {2 * i} (gated) or I = {i}"
            )
        for name, w in (("w13", a), ("w2", b)):
            self._check_weight(name, w)
        if isinstance(a, QuantizedTensor) != isinstance(b, QuantizedTensor):
            raise TypeError("one of w13 and w2 is quantized and the other is not: quantize both or neither")
        if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.format is not b.format:
            raise ValueError(f"w13 is {a.format} and w2 is {b.format}: both need one format")
        for name, bias, want in (("w13_bias", self.w13_bias, (e, n)), ("w2_bias", self.w2_bias, (e, h))):
            if bias is not None:
                check_dtype(name, bias)
                if tuple(bias.shape) != want:
                    raise ValueError(f"{name} has shape {tuple(bias.shape)}, needs {want}")
        for name in ("w13_input_scale", "w2_input_scale"):
            self._check_input_scale(name, getattr(self, name))
        for name, t in self.named_tensors():
            if t.device != a.device:
                raise ValueError(f"{name} is on {t.device} and w13 on {a.device}: move all to one device")

    def _check_weight(self, name: str, w: Tensor | QuantizedTensor) -> None:
        if not isinstance(w, QuantizedTensor):
            check_dtype(name, w)
        elif w.global_scale is not None and w.global_scale.ndim != 1:
            raise ValueError(
                f"the global scale of {name} has shape {tuple(w.global_scale.shape)}, needs [{w.shape[0]}], one per expert: "
                f"expand it"
            )

    def _check_input_scale(self, name: str, scale: Tensor | None) -> None:
        if scale is None:
            return
        if self.input_format is None or not self.input_format.has_global_scale:
            raise ValueError(f"{name} belongs to NVFP4 inputs, but input_format is {self.input_format}")
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} is {scale.dtype}, needs float32")
        if tuple(scale.shape) not in ((), (self.num_experts,)):
            raise ValueError(f"{name} has shape {tuple(scale.shape)}, needs [] or [{self.num_experts}]")

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything there is: "w13", "w13_scale", "w13_global_scale", "w2" .. "w13_bias" .."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, QuantizedTensor):
                yield from ((f.name + suffix, t) for suffix, t in storage.parts(value).items())
            elif isinstance(value, Tensor):
                yield f.name, value

    @property
    def num_experts(self) -> int:
        """E, the experts whose weights these are."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.w2.shape[2]

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up rows."""
        return self.w13.shape[1] == 2 * self.intermediate_size

    @property
    def format(self) -> Format | None:
        """The weights' format, or None where they are plain tensors."""
        return self.w13.format if isinstance(self.w13, QuantizedTensor) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of plain weights, or what quantized ones dequantize to."""
        return self.w13.dtype

    @property
    def device(self) -> torch.device:
        """Where all its tensors are."""
        return self.w13.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for _, t in self.named_tensors())

    def map(self, f: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """Apply ``f`` to each of its tensors."""

        def one(value: Any) -> Any:
            if isinstance(value, QuantizedTensor):
                return value.map(f)
            return f(value) if isinstance(value, Tensor) else value

        return replace(self, **{x.name: one(getattr(self, x.name)) for x in fields(self)})

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on another device."""
        return self.map(lambda t: t.to(device))

    def __getitem__(self, experts: slice | Tensor) -> ExpertWeights:
        """Some of the experts: a view for a slice (one rank's share), a copy for an index tensor."""
        if not isinstance(experts, (slice, Tensor)):
            raise TypeError(f"experts are selected by a slice or an index tensor, not by {type(experts).__name__}")
        return self.map(lambda t: t if t.ndim == 0 else _select(t, experts))

    def permute(self, order: Sequence[int] | Tensor) -> ExpertWeights:
        """New weights whose expert i is this one's ``order[i]``; experts may repeat (redundant experts) or be left out."""
        return self[_order(order, self.num_experts, self.device)]

    def permute_(self, order: Sequence[int] | Tensor) -> None:
        """``permute`` in the memory these weights have, one tensor after another; ``order`` has E entries."""
        index = _order(order, self.num_experts, self.device)
        if index.numel() != self.num_experts:
            raise ValueError(f"order has {index.numel()} entries, needs one per expert, {self.num_experts}")
        for _, t in self.named_tensors():
            if t.ndim:
                storage.as_bytes(t).copy_(storage.as_bytes(_select(t, index)))

    def copy_(self, other: ExpertWeights) -> None:
        """Write ``other`` into the memory these weights have (pointers stay, for captured graphs); ValueError unless it fits."""
        mine, given = dict(self.named_tensors()), dict(other.named_tensors())
        if mine.keys() != given.keys():
            raise ValueError(
                f"these weights have {', '.join(mine)}, the new ones {', '.join(given)}: both need the same"
            )
        if self.format is not other.format or self.input_format is not other.input_format:
            raise ValueError(f"cannot write {other.format} weights into {self.format} ones: quantize them to it first")
        for name, t in mine.items():
            if t.shape != given[name].shape or t.dtype != given[name].dtype:
                raise ValueError(
                    f"{name} is {t.dtype} {tuple(t.shape)}, the new one {given[name].dtype} {tuple(given[name].shape)}"
                )
        for name, t in mine.items():
            storage.as_bytes(t).copy_(storage.as_bytes(given[name]))

    def check_scales(self) -> None:
        """Raise ValueError naming the tensor where a scale was never loaded (NaN) or a global scale is missing or zero."""
        for name in ("w13", "w2"):
            w = getattr(self, name)
            if isinstance(w, QuantizedTensor):
                storage.check_scales(name, w)
            scale = getattr(self, name + "_input_scale")
            if scale is not None:
                storage.check_positive(name + "_input_scale", scale)

    def __repr__(self) -> str:
        kind = str(self.format or self.dtype)
        return (
            f"ExpertWeights({kind}, E={self.num_experts}, H={self.hidden_size}, I={self.intermediate_size}, "
            f"gated={self.gated}, bias={self.w13_bias is not None or self.w2_bias is not None}, device={self.device})"
        )


class ExpertBuilder:
    """Storage for E quantized experts, allocated once and filled one matrix at a time; each source can be dropped at once.

    >>> builder = ExpertBuilder(8, hidden_size=64, intermediate_size=32, scheme="mxfp4")
    >>> builder.put(0, "gate", gate)  # [I, H]; "up" [I, H], "gate_up" [2I, H], "down" [H, I]
    >>> weights = builder.build()
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        scheme: Scheme | Format | str,
        *,
        gated: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        self.scheme = get_scheme(scheme)
        check_expert_sizes(num_experts, hidden_size, intermediate_size, self.scheme.weight)
        self.gated = gated
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        f, rule = self.scheme.weight, self.scheme.rule
        rows = (2 if gated else 1) * intermediate_size
        self.w13 = storage.allocate((num_experts, rows, hidden_size), f, rule=rule, dtype=dtype, device=device)
        self.w2 = storage.allocate(
            (num_experts, hidden_size, intermediate_size), f, rule=rule, dtype=dtype, device=device
        )
        self._missing = {(e, part) for e in range(num_experts) for part in self._parts()}

    def _parts(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def put(
        self,
        expert: int,
        part: str,
        weight: Tensor,
        *,
        name: str | None = None,
        global_scale: Tensor | None = None,
        layout: str = "concatenated",
    ) -> None:
        """Quantize one matrix into its place. ``weight``: "gate" or "up" [I, H], "gate_up" [2I, H], "down" [H, I].

        ``layout``: how "gate_up" orders its rows, "concatenated" or "interleaved" (g0, u0, g1, u1 ..). ``global_scale``: float32
        [] that NVFP4's gate and up share; needed where they come apart (``joint_global_scale``). ``name`` is what errors call
        the weight. ValueError or TypeError for what does not fit, before anything is written.
        """
        name = name or f"{part}[{expert}]"
        i, f = self.intermediate_size, self.scheme.weight
        places = {
            "down": (self.w2, 0, self.hidden_size, i),
            "up": (self.w13, i if self.gated else 0, i, self.hidden_size),
        }
        if self.gated:
            places |= {"gate": (self.w13, 0, i, self.hidden_size), "gate_up": (self.w13, 0, 2 * i, self.hidden_size)}
        if part not in places:
            raise ValueError(f"{name}: unknown part {part!r}; there are {', '.join(places)}")
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"{name}: expert is {expert}, needs 0 to {self.num_experts - 1}")
        target, start, n, k = places[part]
        if tuple(weight.shape) != (n, k):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, needs {(n, k)}")
        if f.has_global_scale and self.gated and part in ("gate", "up") and global_scale is None:
            raise ValueError(
                f"{name}: gate and up share one {f} global scale: pass global_scale=joint_global_scale(both)"
            )
        woven = check_row_layout(layout) == "interleaved" and part == "gate_up"
        g = None if global_scale is None else global_scale.to(target.device)
        q = quantize_finite(name, weight.to(target.device), f, rule=self.scheme.rule, global_scale=g)
        for place, codes in ((target.data, q.data), (target.scale, q.scale)):
            rows = storage.as_bytes(codes)
            if woven:  # a row's codes do not depend on its neighbours: reorder them, not the wider weights
                rows = deinterleave(rows, 0)
            storage.as_bytes(place[expert, start : start + n]).copy_(rows)
        if target.global_scale is not None and q.global_scale is not None:
            target.global_scale[expert].copy_(q.global_scale)
        self._missing -= {(expert, p) for p in (("gate", "up") if part == "gate_up" else (part,))}

    def build(self, w13_bias: Tensor | None = None, w2_bias: Tensor | None = None) -> ExpertWeights:
        """The finished weights, with biases [E, 2I] (gates then ups) and [E, H]; ValueError where a part was never put."""
        if self._missing:
            e, part = min(self._missing)
            raise ValueError(f"{len(self._missing)} matrices are missing, the first is {part!r} of expert {e}")
        return ExpertWeights(self.w13, self.w2, w13_bias, w2_bias, self.scheme.activation)


def quantize_experts(
    w13: Tensor,
    w2: Tensor,
    scheme: Scheme | Format | str,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    layout: str = "concatenated",
    name: str = "experts",
    device: torch.device | str | None = None,
) -> ExpertWeights:
    """Quantize the experts of one layer, one expert at a time; nothing given is changed.

    Args:
        w13: [E, 2I, H], or [E, I, H] where experts are not gated; bf16, fp16 or fp32, any strides (a transposed view is fine).
        w2: [E, H, I].
        scheme: weights' format or whole scheme (``get_scheme``); its activation format goes along as ``input_format``.
        w13_bias: [E, 2I] or None, rows ordered as w13's; w2_bias: [E, H] or None.
        layout: how w13 orders its 2I rows: "concatenated" (gates, then ups) or "interleaved" (g0, u0, g1, u1 ..).
        name: what errors call these weights. device: where the result goes (None: where w13 is).

    NVFP4 gives each expert one global scale for w13 (gate and up from their joint largest magnitude) and one for w2.
    Raises ValueError for shapes and values (H or I that do not fit the format, NaN or infinity), TypeError for dtypes.
    """
    scheme = get_scheme(scheme)
    plain = ExpertWeights(w13, w2, w13_bias, w2_bias)  # checks shapes, dtypes and devices
    check_loaded(f"{name}.w13", w13)
    if check_row_layout(layout) == "interleaved" and not plain.gated:
        raise ValueError(
            f"{name}: layout is interleaved, but w13 {tuple(w13.shape)} has no gate rows beside w2 {tuple(w2.shape)}"
        )
    where = device or w13.device
    builder = ExpertBuilder(
        plain.num_experts,
        plain.hidden_size,
        plain.intermediate_size,
        scheme,
        gated=plain.gated,
        dtype=w13.dtype,
        device=where,
    )
    part = "gate_up" if plain.gated else "up"
    for e in range(plain.num_experts):
        builder.put(e, part, w13[e].detach(), name=f"{name}.w13[{e}]", layout=layout)
        builder.put(e, "down", w2[e].detach(), name=f"{name}.w2[{e}]")
    if w13_bias is not None:
        w13_bias = deinterleave(w13_bias.detach(), 1) if layout == "interleaved" else w13_bias.detach()
    # copies: these weights can be written in place later, and what was given must not change then
    biases = (None if b is None else b.detach().to(where, copy=True) for b in (w13_bias, w2_bias))
    return builder.build(*biases)


def deinterleave(x: Tensor, dim: int) -> Tensor:
    """(g0, u0, g1, u1 ..) along ``dim`` to (g0, g1 .., u0, u1 ..); a new tensor. ValueError for an odd length."""
    return families.deinterleave(x, _even(x, dim))


def interleave(x: Tensor, dim: int) -> Tensor:
    """The inverse of ``deinterleave``: (g0, g1 .., u0, u1 ..) to (g0, u0, g1, u1 ..)."""
    return families.interleave(x, _even(x, dim))


def _even(x: Tensor, dim: int) -> int:
    if x.shape[dim] % 2:
        raise ValueError(f"dimension {dim} has {x.shape[dim]} rows: gate and up rows interleave in pairs")
    return dim % x.ndim


def check_expert_sizes(num_experts: int, hidden_size: int, intermediate_size: int, format: Format) -> None:
    """Raise ValueError naming the field, its value and the rule where a size of experts does not fit the format."""
    if num_experts <= 0:
        raise ValueError(f"num_experts is {num_experts}, needs a positive number")
    format.check_k(hidden_size, "hidden_size")
    format.check_k(intermediate_size, "intermediate_size")


def check_row_layout(layout: str) -> str:
    """``layout``, if it is one of LAYOUTS; else ValueError."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r} of gate and up rows; there are {', '.join(LAYOUTS)}")
    return layout


def _select(t: Tensor, experts: slice | Tensor) -> Tensor:
    if isinstance(experts, slice):
        return t[experts]
    if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):  # FP8 has no index_select on every device
        return t.view(torch.uint8).index_select(0, experts).view(t.dtype)
    return t.index_select(0, experts)


def _order(order: Sequence[int] | Tensor, num_experts: int, device: torch.device) -> Tensor:
    index = torch.as_tensor(order)
    if index.ndim != 1 or index.is_floating_point() or index.dtype is torch.bool:
        raise ValueError(f"order is {index.dtype} of shape {tuple(index.shape)}, needs one dimension of expert numbers")
    outside = (index < 0) | (index >= num_experts)
    if bool(outside.any()):
        first = int(outside.int().argmax())
        raise ValueError(f"order[{first}] is {int(index[first])}, needs 0 to {num_experts - 1}")
    return index.to(device=device, dtype=torch.int64)
