"""Linear layers with quantized weights: ``y[t, n] = sum_k x[t, k] * w[n, k] + bias[n]``.

``MxLinear`` is the module. The *methods* give the same to a layer that a serving engine owns, in its protocol:
``create_weights`` before loading, ``process_weights_after_loading`` after it, ``apply`` in the forward. An *online* method
loads bfloat16 or float16 and quantizes; an *offline* one loads codes and scales. One generic base serves every format.
T tokens, N = out_features, K = in_features. For inference: no gradient flows through codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import mx_kernels as mk
from mx_kernels import Format, PackedWeight, QuantizedTensor, ScaleRule

from . import storage
from .checks import check_dtype, check_loaded, check_matrix, quantize_finite
from .scheme import Scheme, get_scheme


def linear(
    x: Tensor,
    weight: QuantizedTensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    scheme: Scheme,
    input_scale: Tensor | None = None,
) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] plus ``bias`` [N] -> [..., N] of x's dtype, x quantized as the scheme says.

    ``input_scale``: float32 [] for NVFP4 activations, else from ``x`` itself. Raises what ``mx_kernels.gemm`` raises.
    """
    if x.ndim and x.stride(-1) != 1:
        x = x.contiguous()
    operand = scheme.quantize_input(x, input_scale)
    return mk.gemm(operand, weight, epilogue=mk.Epilogue(bias=bias), out_dtype=x.dtype)  # type: ignore[return-value]


class MxLinear(nn.Module):
    """A linear layer whose weight is quantized: ``weight`` (codes), ``weight_scale`` and, for NVFP4, ``weight_global_scale``.

    Made by ``from_linear`` or ``from_quantized``; made by its constructor it waits for ``load_state_dict``: its scales
    are NaN until then. ``dtype`` is what the weight dequantizes to. ``.to(dtype)`` and ``.half()`` leave codes and scales as they
    are. ``input_scale`` (float32 [] buffer or None) is the calibrated global scale of NVFP4 activations. ``pack_`` puts the
    weight in the order that GPU kernels stream; what is saved and loaded stays the same.
    """

    bias: nn.Parameter | None
    weight: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    input_scale: Tensor | None
    _packed: PackedWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme | Format | str = "w8a16",
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        scheme = get_scheme(scheme)
        _check_sizes(in_features, out_features, scheme.weight)
        b = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        weight = storage.allocate(
            (out_features, in_features), scheme.weight, rule=scheme.rule, dtype=dtype, device=device
        )
        self._set(weight, b, scheme, None)

    def _set(self, weight: QuantizedTensor, bias: Tensor | None, scheme: Scheme, input_scale: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.scheme = Scheme(weight.format, scheme.activation, weight.rule)
        self.dtype = weight.dtype
        # not the Parameter itself: it may want gradients, and this layer has none to give
        own = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", own)
        storage.attach(self, "weight", weight)
        self.register_buffer("input_scale", input_scale)
        self._quantized = weight

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        scheme: Scheme | Format | str,
        *,
        name: str = "weight",
        global_scale: Tensor | None = None,
    ) -> MxLinear:
        """Quantize an ``nn.Linear``; its bias is copied. ``name`` is what errors call its weight.

        ``global_scale``: float32 [] that NVFP4 weights share (``joint_global_scale``). Raises TypeError for a dtype that is
        not bf16, fp16 or fp32, ValueError for K that does not fit the format and for weights that are not finite.
        """
        scheme = get_scheme(scheme)
        if not isinstance(source, nn.Linear):
            raise TypeError(f"source is a {type(source).__name__}, needs an nn.Linear: from_quantized takes a weight")
        q = quantize_finite(name, source.weight.detach(), scheme.weight, rule=scheme.rule, global_scale=global_scale)
        return cls.from_quantized(q, None if source.bias is None else source.bias.detach().clone(), scheme.activation)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        activation: Format | None = None,
        *,
        input_scale: Tensor | None = None,
    ) -> MxLinear:
        """A layer around ``weight`` [N, K] and ``bias`` [N], sharing their memory; ValueError or TypeError where they do not fit."""
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, needs two dimensions [N, K]")
        if bias is not None:
            _check_bias(bias, weight.shape[0])
        if input_scale is not None:
            _check_input_scale(input_scale, activation)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(weight, bias, Scheme(weight.format, activation, weight.rule), input_scale)
        return layer

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight [N, K], sharing this module's memory; a copy where it is packed."""
        if self._packed is not None:
            return _canonical(self._packed)
        q = self._quantized
        if (
            q.data is not self.weight
            or q.scale is not self.weight_scale
            or (q.global_scale is not None and q.global_scale is not self.weight_global_scale)
        ):
            q = storage.attached(self, "weight", q.format, q.rule, q.dtype)
            self._quantized = q
        return q

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N] of x's dtype."""
        weight = self.quantized if self._packed is None else self._packed
        return linear(x, weight, self.bias, scheme=self.scheme, input_scale=self.input_scale)

    def pack_(self) -> MxLinear:
        """Hold the weight as ``mx_kernels.pack`` orders it, for GPUs that upcast it in registers; values stay the same.

        Its buffers are on meta then. ``quantized``, ``state_dict`` and ``dequantize`` unpack, exactly; loading packs again, into
        new memory (``update_weights`` keeps it). On another kind of device the layer is canonical again. Reads values: not for
        a forward. Raises ValueError for scales that are NaN, as those of a layer that was never loaded.
        """
        if self._packed is None:
            self._packed = mk.pack(self.quantized)
            self._hold(self.quantized.to("meta"))
        return self

    def unpack_(self) -> MxLinear:
        """Hold the weight in canonical order again."""
        if self._packed is not None:
            self._hold(_canonical(self._packed))
            self._packed = None
        return self

    def _hold(self, q: QuantizedTensor) -> None:
        self._buffers.update({"weight" + suffix: t for suffix, t in storage.parts(q).items()})
        self._quantized = q

    def update_weights(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> None:
        """Write new weights [N, K] (full precision: quantized first) into the memory the old ones have, for captured graphs.

        Everything is checked before anything is written: ValueError for shapes, formats and values, TypeError for dtypes.
        """
        new_bias = _updated_bias(self.bias, bias, self.out_features)
        if self._packed is None:
            storage.fill(self.quantized, _new_weight(weight, self.quantized))
        else:
            _fill_packed(self._packed, mk.pack(_new_weight(weight, self._quantized)))
        if new_bias is not None and self.bias is not None:
            self.bias.data.copy_(new_bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` of the weights as this layer sees them, in ``dtype`` (None: the source's)."""
        w = mk.dequantize(self.quantized, dtype)
        with torch.device("meta"):
            out = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=w.dtype)
        out.weight = nn.Parameter(w, requires_grad=False)
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach().to(w.dtype), requires_grad=False)
        return out

    def extra_repr(self) -> str:
        """Sizes, scheme and scale rule."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, rule={self._quantized.rule}" + (", packed" if self._packed is not None else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MxLinear:
        packed_on = None if self._packed is None else self._packed.device.type
        self.unpack_()
        names = [n for n, t in self._buffers.items() if t is not None]
        held = {n: self._buffers[n] for n in names}
        moved = {n: storage.apply_to_bytes(fn, t) for n, t in held.items() if t is not None}
        self._buffers.update(dict.fromkeys(names))  # hidden from the base class, which would cast them
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(held)
        self._buffers.update(moved)
        return self.pack_() if self.weight.device.type == packed_on else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination.update({f"{prefix}weight{s}": t for s, t in storage.parts(self.quantized).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        for name, own in self._buffers.items():
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and given.dtype != own.dtype:
                errors.append(
                    f"{prefix}{name} is {given.dtype}, needs {own.dtype} ({self.scheme}): a copy would cast codes to other "
                    f"numbers; use update_weights for a weight in full precision"
                )
                return
        packed = self._packed is not None
        self.unpack_()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if packed:
            self.pack_()


def _canonical(packed: PackedWeight) -> QuantizedTensor:
    q = packed.unpack()
    assert isinstance(q, QuantizedTensor)
    return q


def _fill_packed(target: PackedWeight, source: PackedWeight) -> None:
    """Copy into the memory that captured graphs read; ValueError, before anything is written, where ``source`` has other tensors."""
    pairs = [(getattr(target, n), getattr(source, n)) for n in ("data", "scale", "alpha", "shift", "global_scale")]
    if any((old is None) != (new is None) for old, new in pairs):
        raise ValueError(
            "the new weight's scales need a shift, or need none, unlike the old ones': unpack_() and pack_() the layer"
        )
    for old, new in pairs:
        if old is not None:
            old.copy_(new)


class LinearMethod(Protocol):
    """What an engine calls: once before loading, once (or more often) after it, and in every forward."""

    def create_weights(self, layer: Any, in_features: int, out_features: int) -> None:
        """Register on ``layer`` what loading fills."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the loaded weights ready; a second call does nothing."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., K] -> [..., N]."""


class _LinearMethodBase:
    """What online and offline methods share: the scheme, ``apply`` and ``update_weights``."""

    format: ClassVar[Format | None] = None

    def __init__(self, scheme: Scheme | Format | str | None = None) -> None:
        self.scheme = method_scheme(type(self).__name__, self.format, scheme)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., K] -> [..., N] of x's dtype. ``bias`` [N] None: the layer's own, if it has one."""
        own = getattr(layer, "bias", None) if bias is None else bias
        return linear(x, self.quantized(layer), own, scheme=self.scheme, input_scale=layer.input_scale)

    def quantized(self, layer: Any) -> QuantizedTensor:
        """The layer's weight [N, K], sharing its memory; RuntimeError before ``process_weights_after_loading``."""
        if not is_processed(layer):
            raise RuntimeError(
                f"the weights of {type(layer).__name__} are not ready: call process_weights_after_loading"
            )
        rule: ScaleRule = self.scheme.weight.check_rule(self.scheme.rule)
        return storage.attached(layer, "weight", self.scheme.weight, rule, layer.mx_dtype)

    def update_weights(self, layer: Any, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> None:
        """Write new weights [N, K] into the memory of the old ones, as ``MxLinear.update_weights`` does."""
        target = self.quantized(layer)
        own: Tensor | None = getattr(layer, "bias", None)
        new_bias = _updated_bias(own, bias, target.shape[0])
        storage.fill(target, _new_weight(weight, target))
        if new_bias is not None and own is not None:
            own.data.copy_(new_bias)

    def _create(self, layer: Any, out_features: int, bias: bool, dtype: torch.dtype, device: Any) -> None:
        empty = torch.full((out_features,), float("nan"), dtype=dtype, device=device) if bias else None
        layer.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        layer.mx_dtype = dtype
        layer.mx_processed = False


class OnlineLinearMethod(_LinearMethodBase):
    """Load bf16, fp16 or fp32 weights and quantize them, in any format: ``OnlineLinearMethod("w4a8")``.

    After ``process_weights_after_loading`` the layer has ``weight`` (codes), ``weight_scale`` (unswizzled) and, for NVFP4,
    ``weight_global_scale``; ``input_scale`` is None: activations are scaled from themselves.
    """

    def create_weights(
        self,
        layer: Any,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Register ``weight`` [N, K] (``device="meta"``: no memory, for ``load_weight``) and ``bias`` [N] or None, both NaN.

        ValueError names the field, its value and the rule where K is not a multiple of the block; TypeError for the dtype.
        """
        _check_sizes(in_features, out_features, self.scheme.weight)
        check_dtype("dtype of the weights", torch.empty(0, dtype=dtype))
        empty = torch.full((out_features, in_features), float("nan"), dtype=dtype, device=device)
        layer.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        layer.input_scale = None
        self._create(layer, out_features, bias, dtype, None if str(device) == "meta" else device)

    def load_weight(self, layer: Any, weight: Tensor, name: str = "weight") -> None:
        """Quantize ``weight`` [N, K] now and drop it: with parameters on meta, no second tensor is ever in full precision."""
        own = layer.weight
        if is_processed(layer):
            raise RuntimeError(f"{name} is quantized already: use update_weights")
        if tuple(weight.shape) != tuple(own.shape):
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, needs {tuple(own.shape)} [out_features, in_features]"
            )
        q = quantize_finite(name, weight.detach(), self.scheme.weight, rule=self.scheme.rule)
        storage.attach(layer, "weight", q)
        layer.mx_processed = True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize ``layer.weight`` and release it; nothing where that is done. ValueError where it was not loaded or is not finite."""
        if is_processed(layer):
            return
        check_loaded("weight", layer.weight)
        self.load_weight(layer, layer.weight)


class OfflineLinearMethod(_LinearMethodBase):
    """Load codes and scales of a quantized checkpoint, in any format."""

    def create_weights(
        self,
        layer: Any,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        input_scale: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Register ``weight``, ``weight_scale`` and what else the format has, marked as not loaded.

        ``input_scale``: the checkpoint brings the global scale of NVFP4 activations. ``dtype``: of bias and dequantized
        weights. ValueError names the field, its value and the rule where K is not a multiple of the block.
        """
        f = self.scheme.weight
        _check_sizes(in_features, out_features, f)
        if input_scale and (self.scheme.activation is None or not self.scheme.activation.has_global_scale):
            raise ValueError(f"{self.scheme} has no static input scale: input_scale=True belongs to NVFP4 activations")
        q = storage.allocate((out_features, in_features), f, rule=self.scheme.rule, dtype=dtype, device=device)
        storage.attach(layer, "weight", q)
        layer.register_buffer("input_scale", torch.tensor(float("nan"), device=device) if input_scale else None)
        self._create(layer, out_features, bias, dtype, device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every scale was loaded and is usable (ValueError names it); nothing where that is done."""
        if is_processed(layer):
            return
        rule = self.scheme.weight.check_rule(self.scheme.rule)
        q = storage.attached(layer, "weight", self.scheme.weight, rule, layer.mx_dtype)
        storage.check_scales("weight", q)
        if layer.input_scale is not None:
            storage.check_positive("input_scale", layer.input_scale)
        layer.mx_processed = True


class Mxfp8OnlineLinearMethod(OnlineLinearMethod):
    """bf16 or fp16 checkpoints to MXFP8 (E4M3); inputs as they are, or ``Mxfp8OnlineLinearMethod("w8a8")``."""

    format = mk.MXFP8


class Mxfp6OnlineLinearMethod(OnlineLinearMethod):
    """bf16 or fp16 checkpoints to MXFP6 (E2M3)."""

    format = mk.MXFP6_E2M3


class Mxfp4OnlineLinearMethod(OnlineLinearMethod):
    """bf16 or fp16 checkpoints to MXFP4."""

    format = mk.MXFP4


class Nvfp4OnlineLinearMethod(OnlineLinearMethod):
    """bf16 or fp16 checkpoints to NVFP4."""

    format = mk.NVFP4


class Mxfp8LinearMethod(OfflineLinearMethod):
    """MXFP8 (E4M3) checkpoints."""

    format = mk.MXFP8


class Mxfp4LinearMethod(OfflineLinearMethod):
    """MXFP4 checkpoints."""

    format = mk.MXFP4


class Nvfp4LinearMethod(OfflineLinearMethod):
    """NVFP4 checkpoints, weight-only or with quantized activations."""

    format = mk.NVFP4


def method_scheme(owner: str, format: Format | None, scheme: Scheme | Format | str | None) -> Scheme:
    """The scheme of a method class bound to ``format`` (None: to none); ValueError where the two disagree."""
    if scheme is None:
        if format is None:
            raise ValueError(f"{owner} serves every format: name one, for example {owner}('w8a16')")
        return Scheme(format)
    found = get_scheme(scheme)
    if format is not None and found.weight is not format:
        raise ValueError(f"{owner} has {format} weights, but the scheme is {found}: use the method of its format")
    return found


def is_processed(layer: Any) -> bool:
    """Whether ``process_weights_after_loading`` has run on this layer."""
    return bool(getattr(layer, "mx_processed", False))


def _check_sizes(in_features: int, out_features: int, format: Format) -> None:
    format.check_k(in_features, "in_features")
    if out_features <= 0:
        raise ValueError(f"out_features is {out_features}, needs a positive number")


def _check_bias(bias: Tensor, out_features: int) -> None:
    check_dtype("bias", bias)
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, needs ({out_features},) [out_features]")


def _check_input_scale(scale: Tensor, activation: Format | None) -> None:
    if activation is None or not activation.has_global_scale:
        raise ValueError("input_scale belongs to NVFP4 activations: pass activation=NVFP4, or no input_scale")
    if scale.dtype != torch.float32 or scale.ndim != 0:
        raise TypeError(f"input_scale is {scale.dtype} {tuple(scale.shape)}, needs float32 []")
    storage.check_positive("input_scale", scale)


def _updated_bias(own: Tensor | None, new: Tensor | None, out_features: int) -> Tensor | None:
    if new is None:
        return None
    if own is None:
        raise ValueError("a new bias was given, but this layer has none: build it with bias=True")
    _check_bias(new, out_features)
    return new


def _new_weight(weight: Tensor | QuantizedTensor, target: QuantizedTensor) -> QuantizedTensor:
    if tuple(weight.shape) != tuple(target.shape):
        raise ValueError(f"the new weight has shape {tuple(weight.shape)}, needs {tuple(target.shape)} [out, in]")
    if isinstance(weight, QuantizedTensor):
        storage.check_scales("weight", weight)
        return weight
    check_matrix("weight", weight, target.format)
    return quantize_finite("weight", weight.detach(), target.format, rule=target.rule)
