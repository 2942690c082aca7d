"""MoE layers in a serving engine's protocol: ``create_weights``, ``process_weights_after_loading``, ``apply``.

An *online* method loads bfloat16 or float16 experts and quantizes them expert by expert into storage allocated once; an
*offline* one loads codes and scales. One generic base serves every format.

What multiplies is not here: packages import mx_moe -> mx_quant, never back, so the factory of experts is injected::

    method = Mxfp4MoEMethod(make_experts=mx_moe.make_experts)

It is called as ``make_experts(weights, activation, expert_map=...)``, with ``shared_experts=n`` where the last n rows are fused
shared experts, once the weights are ready; it chooses the backend (as ``mx_moe.select_mxfp8_moe_backend`` does). The layer's own
tensors are then released: the experts keep what they need. What it returns is called as ``experts(x, routing)``, has the
canonical ``weights``, and writes new ones in place with ``update_weights(weights)``.
Without a factory the layer keeps the canonical weights (``weights``).

E experts of this rank, fused shared experts last; H hidden, I intermediate size; k experts a token, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mx_kernels as mk
from mx_kernels import Activation, Format, QuantizedTensor

from . import storage
from .checks import check_dtype, check_finite
from .experts import ExpertBuilder, ExpertWeights, check_expert_sizes, check_row_layout, deinterleave, quantize_experts
from .linear import is_processed, method_scheme
from .scheme import Scheme

GPT_OSS_ACTIVATION = Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
_TENSORS = ("w13_weight", "w2_weight", "w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")
_QUANTIZED = tuple(w + s for w in ("w13_weight", "w2_weight") for s in ("_scale", "_global_scale"))


class _MoEMethodBase:
    """What online and offline methods share.

    format: of the class's weights, None for every format. row_layout: how w13 and its bias order gate and up rows as loaded.
    activation: what the experts apply, gate and up concatenated (the canonical form).
    """

    format: ClassVar[Format | None] = None
    row_layout: str = "concatenated"
    activation: Activation | None = None

    def __init__(
        self,
        scheme: Scheme | Format | str | None = None,
        *,
        make_experts: Callable[..., Any] | None = None,
        activation: Activation | None = None,
        row_layout: str | None = None,
    ) -> None:
        self.scheme = method_scheme(type(self).__name__, self.format, scheme)
        self.make_experts = make_experts
        self.activation = activation or self.activation
        self.row_layout = check_row_layout(row_layout or self.row_layout)
        if make_experts is not None and self.activation is None:
            raise ValueError(
                "make_experts needs an activation: pass activation=Activation(...), with every parameter it has"
            )
        if self.activation is not None and self.activation.layout != "concatenated":
            raise ValueError(
                "activation.layout is interleaved, but prepared weights are always concatenated: say how rows are loaded with "
                "row_layout='interleaved', and give the activation the layout 'concatenated'"
            )

    def apply(self, layer: Any, x: Tensor, routing: Any) -> Tensor:
        """``x`` [T, H] and its routing (``mx_moe.Routing``, global expert ids) -> [T, H], weighted and summed over k."""
        experts = getattr(layer, "experts", None)
        if not is_processed(layer) or experts is None:
            raise RuntimeError(
                f"{type(self).__name__} has no experts to run: pass make_experts=mx_moe.make_experts, and call "
                f"process_weights_after_loading"
            )
        out: Tensor = experts(x, routing)
        return out

    def weights(self, layer: Any) -> ExpertWeights:
        """The layer's weights in canonical form, sharing their memory; RuntimeError before they are processed."""
        if not is_processed(layer):
            raise RuntimeError(
                f"the weights of {type(layer).__name__} are not ready: call process_weights_after_loading"
            )
        if getattr(layer, "experts", None) is not None:
            held: ExpertWeights = layer.experts.weights
            return held
        return self._attached(layer)

    def update_weights(self, layer: Any, weights: ExpertWeights) -> None:
        """Write new weights into the memory of the old ones, for captured graphs; ValueError unless they fit.

        Where the experts were made by a factory they do it themselves, with ``update_weights(weights)``.
        """
        experts = getattr(layer, "experts", None)
        if experts is None:
            self.weights(layer).copy_(weights)
        elif hasattr(experts, "update_weights"):
            experts.update_weights(weights)
        else:
            raise RuntimeError(f"{type(experts).__name__} has no update_weights: make new experts from the new weights")

    def permute_experts(self, layer: Any, order: Sequence[int] | Tensor) -> None:
        """Put expert ``order[i]`` at row i, in place (load balancing)."""
        if getattr(layer, "experts", None) is None:
            self.weights(layer).permute_(order)
        else:
            self.update_weights(layer, self.weights(layer).permute(order))

    def _register(
        self,
        layer: Any,
        rows: int,
        shared: int,
        gated: bool,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        expert_map: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        check_dtype("dtype of the weights", torch.empty(0, dtype=dtype))
        _check_expert_map(expert_map, rows)
        if not gated and self.row_layout == "interleaved":
            raise ValueError("row_layout is interleaved, but these experts are not gated: use 'concatenated'")
        if self.activation is not None and self.activation.gated != gated:
            raise ValueError(f"gated is {gated}, but the activation is {self.activation}: both must agree")
        n = (2 if gated else 1) * intermediate_size
        for name, width in (("w13_bias", n), ("w2_bias", hidden_size)):
            b = torch.full((rows, width), float("nan"), dtype=dtype, device=device) if bias else None
            layer.register_parameter(name, None if b is None else nn.Parameter(b, requires_grad=False))
        layer.register_buffer("expert_map", expert_map)
        layer.mx_dtype = dtype
        layer.mx_row_layout = self.row_layout
        layer.mx_shared_experts = shared
        layer.mx_processed = False
        layer.experts = None

    def _attached(self, layer: Any) -> ExpertWeights:
        f, rule = self.scheme.weight, self.scheme.weight.check_rule(self.scheme.rule)
        w13, w2 = (storage.attached(layer, name, f, rule, layer.mx_dtype) for name in ("w13_weight", "w2_weight"))
        b13, b2 = (None if b is None else b.detach() for b in (layer.w13_bias, layer.w2_bias))
        return ExpertWeights(w13, w2, b13, b2, self.scheme.activation, layer.w13_input_scale, layer.w2_input_scale)

    def _finish(self, layer: Any, weights: ExpertWeights) -> None:
        """Hand the weights to the factory and release the layer's tensors, or keep them on the layer."""
        if self.make_experts is not None:
            shared = {"shared_experts": layer.mx_shared_experts} if layer.mx_shared_experts else {}
            experts = self.make_experts(weights, self.activation, expert_map=layer.expert_map, **shared)
            for name in (*_TENSORS, *_QUANTIZED):
                storage.detach(layer, name)
            storage.detach(layer, "experts")
            layer.experts = experts
        else:
            for name, w in (("w13_weight", weights.w13), ("w2_weight", weights.w2)):
                assert isinstance(w, QuantizedTensor)
                storage.attach(layer, name, w)
            for name, b in (("w13_bias", weights.w13_bias), ("w2_bias", weights.w2_bias)):
                storage.detach(layer, name)
                layer.register_parameter(name, None if b is None else nn.Parameter(b, requires_grad=False))
        layer.mx_processed = True


class OnlineMoEMethod(_MoEMethodBase):
    """Load bf16, fp16 or fp32 experts and quantize them, in any format: ``OnlineMoEMethod("w4a8", ...)``."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = True,
        bias: bool = False,
        fused_shared_experts: int = 0,
        expert_map: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Register ``w13_weight`` [E, 2I, H] and ``w2_weight`` [E, H, I] (``device="meta"``: no memory, for ``load_expert``).

        E = ``num_experts`` of this rank + ``fused_shared_experts``. ``bias``: also ``w13_bias`` [E, 2I], ``w2_bias`` [E, H].
        ``expert_map``: int32 [E_global], global id -> row or -1, for expert parallelism. ValueError names the field, its
        value and the rule where H or I is not a multiple of the block.
        """
        check_expert_sizes(num_experts, hidden_size, intermediate_size, self.scheme.weight)
        rows, n = num_experts + fused_shared_experts, (2 if gated else 1) * intermediate_size
        meta = str(device) == "meta"
        where = None if meta else device
        self._register(
            layer, rows, fused_shared_experts, gated, hidden_size, intermediate_size, bias, expert_map, dtype, where
        )
        for name, shape in (
            ("w13_weight", (rows, n, hidden_size)),
            ("w2_weight", (rows, hidden_size, intermediate_size)),
        ):
            empty = torch.full(shape, float("nan"), dtype=dtype, device=device)
            layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        layer.w13_input_scale = layer.w2_input_scale = None
        layer.mx_builder = None
        if meta:
            layer.mx_builder = ExpertBuilder(
                rows, hidden_size, intermediate_size, self.scheme, gated=gated, dtype=dtype, device=where
            )

    def load_expert(
        self,
        layer: Any,
        expert: int,
        part: str,
        weight: Tensor,
        *,
        name: str | None = None,
        global_scale: Tensor | None = None,
    ) -> None:
        """Quantize one matrix of one expert now, where parameters are on meta: see ``ExpertBuilder.put`` for the parts.

        "gate_up" rows are in the method's ``row_layout``. No second tensor is ever in full precision.
        """
        if is_processed(layer) or layer.mx_builder is None:
            raise RuntimeError("load_expert fills a layer created with device='meta' and not processed yet")
        layer.mx_builder.put(expert, part, weight, name=name, global_scale=global_scale, layout=self.row_layout)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the experts and release the source; nothing where that is done. ValueError for what is missing or not finite."""
        if is_processed(layer):
            return
        biases = _checked_biases(layer)
        if layer.mx_builder is not None:
            if biases[0] is not None and self.row_layout == "interleaved":
                biases = (deinterleave(biases[0], 1), biases[1])
            weights = layer.mx_builder.build(*biases)
        else:
            weights = quantize_experts(
                layer.w13_weight,
                layer.w2_weight,
                self.scheme,
                w13_bias=biases[0],
                w2_bias=biases[1],
                layout=self.row_layout,
            )
        self._finish(layer, weights)
        layer.mx_builder = None


class OfflineMoEMethod(_MoEMethodBase):
    """Load codes and scales of a quantized checkpoint's experts, in any format."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = True,
        bias: bool = False,
        input_scales: bool = False,
        fused_shared_experts: int = 0,
        expert_map: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Register codes and scales, marked as not loaded, with unpadded shapes: ``w13_weight`` (MXFP4: uint8 [E, 2I, H/2]),
        ``w13_weight_scale`` [E, 2I, H/block], ``w2_weight``, ``w2_weight_scale`` and, for NVFP4, ``.._global_scale`` [E].

        ``input_scales``: the checkpoint brings ``w13_input_scale`` and ``w2_input_scale`` [E] of NVFP4 inputs. The rest as in
        ``OnlineMoEMethod.create_weights``.
        """
        f = self.scheme.weight
        check_expert_sizes(num_experts, hidden_size, intermediate_size, f)
        if input_scales and (self.scheme.activation is None or not self.scheme.activation.has_global_scale):
            raise ValueError(f"{self.scheme} has no input scales: input_scales=True belongs to NVFP4 activations")
        rows, n = num_experts + fused_shared_experts, (2 if gated else 1) * intermediate_size
        self._register(
            layer, rows, fused_shared_experts, gated, hidden_size, intermediate_size, bias, expert_map, dtype, device
        )
        for name, shape in (
            ("w13_weight", (rows, n, hidden_size)),
            ("w2_weight", (rows, hidden_size, intermediate_size)),
        ):
            storage.attach(layer, name, storage.allocate(shape, f, rule=self.scheme.rule, dtype=dtype, device=device))
        for name in ("w13_input_scale", "w2_input_scale"):
            layer.register_buffer(name, torch.full((rows,), float("nan"), device=device) if input_scales else None)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded, put gate and up rows in canonical order, make the experts; nothing where that is done.

        ValueError names a scale or bias that is missing (NaN) or a global or input scale that is zero. Interleaved rows are
        reordered in place, expert by expert, so that no second copy of the weights is made.
        """
        if is_processed(layer):
            return
        _checked_biases(layer)
        weights = self._attached(layer)
        weights.check_scales()
        if layer.mx_row_layout == "interleaved":
            assert isinstance(weights.w13, QuantizedTensor)
            codes = [storage.as_bytes(weights.w13.data), storage.as_bytes(weights.w13.scale)]
            for t in codes if weights.w13_bias is None else (*codes, weights.w13_bias):
                for e in range(weights.num_experts):
                    t[e].copy_(deinterleave(t[e], 0))
            layer.mx_row_layout = "concatenated"  # so that no second call reorders again, whatever the factory raises
        self._finish(layer, weights)


class Mxfp8OnlineMoEMethod(OnlineMoEMethod):
    """bf16 or fp16 experts to MXFP8 (E4M3); inputs as they are, or ``Mxfp8OnlineMoEMethod("w8a8")``."""

    format = mk.MXFP8


class Mxfp6OnlineMoEMethod(OnlineMoEMethod):
    """bf16 or fp16 experts to MXFP6 (E2M3)."""

    format = mk.MXFP6_E2M3


class Mxfp4OnlineMoEMethod(OnlineMoEMethod):
    """bf16 or fp16 experts to MXFP4."""

    format = mk.MXFP4


class Nvfp4OnlineMoEMethod(OnlineMoEMethod):
    """bf16 or fp16 experts to NVFP4: one global scale per expert for gate and up together, one for down."""

    format = mk.NVFP4


class Mxfp4MoEMethod(OfflineMoEMethod):
    """gpt-oss checkpoints: MXFP4 experts with interleaved gate and up rows, biases, and SwiGLU-OAI (1.702, 1, 7)."""

    format = mk.MXFP4
    row_layout = "interleaved"
    activation = GPT_OSS_ACTIVATION


class Mxfp8MoEMethod(OfflineMoEMethod):
    """MXFP8 (E4M3) checkpoints."""

    format = mk.MXFP8


class Nvfp4MoEMethod(OfflineMoEMethod):
    """NVFP4 checkpoints, weight-only or with calibrated input scales."""

    format = mk.NVFP4


def _checked_biases(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    found = tuple(None if b is None else b.detach() for b in (layer.w13_bias, layer.w2_bias))
    for name, b in zip(("w13_bias", "w2_bias"), found, strict=True):
        if b is not None:
            check_finite(name, b)
    return found[0], found[1]


def _check_expert_map(expert_map: Tensor | None, rows: int) -> None:
    if expert_map is None:
        return
    if expert_map.dtype != torch.int32 or expert_map.ndim != 1:
        raise TypeError(f"expert_map is {expert_map.dtype} {tuple(expert_map.shape)}, needs int32 [E_global]")
    bad = (expert_map < -1) | (expert_map >= rows)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        raise ValueError(
            f"expert_map[{first}] is {int(expert_map[first])}, needs -1 (not here) or a row, 0 to {rows - 1}"
        )
