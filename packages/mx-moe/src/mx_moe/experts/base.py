"""The five steps of an MoE layer, written once, and what every class of experts shares.

    tiles = align(ids)                                             blocks of pairs of one expert
    h = grouped_gemm(prepare(x), w13), bias, activation            [T, H] -> [T * k, I]
    y = grouped_gemm(prepare(h), w2), bias, x routing weight       [T * k, I] -> [T * k, H]
    out = combine(y)                                               [T * k, H] -> [T, H]

T tokens, H hidden size, I intermediate size, E experts (rows of the weights), k experts a token, P = T * k pairs. Classes
differ in their operands: *native* quantizes x and h and multiplies codes; *fused* upcasts weights in registers; *emulation*
dequantizes the weights of the experts that were hit; *reference* runs the PyTorch twin of each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Activation, Choice, Epilogue, Format
from mx_quant import ExpertWeights

from ..routing import Routing
from .problem import Capability, Problem

Operand = Any  # a plain tensor, a QuantizedTensor, or a packed weight of mx_kernels


@runtime_checkable
class Experts(Protocol):
    """What ``make_experts`` returns. ``choice`` says which backend runs and why those preferred to it do not."""

    choice: Choice

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:  # x [T, H] -> [T, H]
        """The weighted sum over each token's experts, in x's dtype."""
        ...


@dataclass(frozen=True, eq=False)
class Inputs:
    """How activations become GEMM operands.

    format: None passes them on. quantized: as QuantizedTensor (native), else quantized and dequantized again.
    scales: float32 [] global scales (multipliers) of GEMM 1's and GEMM 2's input; NVFP4 only.
    """

    format: Format | None = None
    quantized: bool = False
    scales: tuple[Tensor | None, Tensor | None] = (None, None)

    def requantize(self) -> Format | None:
        """The format that GEMM 1's epilogue quantizes to: the activation and the quantization are then one float32 pass."""
        return self.format if self.format is not None and not self.format.has_global_scale else None


@dataclass(frozen=True, eq=False)
class Weights:
    """The operands of one forward. ``w13`` and ``w2`` are called once each, so that neither need outlive its GEMM."""

    w13: Callable[[], Operand]  # [E, 2I or I, H]
    w2: Callable[[], Operand]  # [E, H, I]
    num_experts: int
    w13_bias: Tensor | None = None  # [E, 2I or I]
    w2_bias: Tensor | None = None  # [E, H]
    expert_map: Tensor | None = None  # [E_global] int32


def _prepare(x: Tensor, inputs: Inputs, gemm: int, ops: Any) -> Operand:  # [M, K]
    """The operand that GEMM 1 (``gemm`` 0) or GEMM 2 multiplies."""
    if inputs.format is None:
        return x
    if inputs.quantized:
        return ops.quantize(x, inputs.format, global_scale=inputs.scales[gemm])
    return ops.quantize_dequantize(x, inputs.format, global_scale=inputs.scales[gemm])


def fused_moe(
    x: Tensor,  # [T, H]
    routing: Routing,
    weights: Weights,
    activation: Activation,
    *,
    inputs: Inputs | None = None,
    weight_on_input: bool = False,
    pair_dtype: torch.dtype | None = None,
    ops: Any = mk,
) -> Tensor:  # [T, H]
    """The five steps. ``ops`` is mx_kernels or its reference; ``pair_dtype`` is GEMM 2's output dtype (default: x's).

    weight_on_input: x * routing weight before GEMM 1, and none after GEMM 2; needs one expert a token (ValueError).
    """
    inputs = inputs or Inputs()
    dtype, k = x.dtype, routing.top_k
    row_weight: Tensor | None = routing.weights
    if weight_on_input:
        x = weighted_input(x, routing)
        row_weight = None
    w13 = weights.w13()
    plain = inputs.format is None
    slots = plain and dtype == torch.bfloat16
    rows = mk.block_size(routing.ids.numel(), weights.num_experts, x.device, w13, slots=slots)
    tiles = ops.moe_align_block_size(routing.ids, rows, weights.num_experts, weights.expert_map)
    f = inputs.requantize()
    w2 = weights.w2() if isinstance(w13, mk.PackedWeight) else None
    gathered, ordered = False, False
    if w2 is not None and dtype == torch.bfloat16:
        gathered, ordered = mk.layer_slots(w13, w2, tiles, plain=plain, ordered=plain or f is not None)
    x = _prepare(x, inputs, 0, ops)
    if gathered:
        x = ops.gather_rows(x, tiles, top_k=k)
    h = ops.grouped_gemm(
        x,
        w13,
        tiles,
        top_k=1 if gathered else k,
        from_slots=gathered,
        to_slots=ordered,
        epilogue=Epilogue(
            bias=weights.w13_bias,
            activation=activation,
            requantize_to=f if inputs.quantized else None,
            round_to=None if inputs.quantized else f,
        ),
        out_dtype=dtype,
    )
    del w13, x  # they may be a decoded copy and a gathered one
    if f is None:
        h = _prepare(h, inputs, 1, ops)
    y = ops.grouped_gemm(
        h,
        weights.w2() if w2 is None else w2,
        tiles,
        top_k=1,
        from_slots=ordered,
        epilogue=Epilogue(bias=weights.w2_bias, row_weight=row_weight),
        out_dtype=pair_dtype or dtype,
    )
    return ops.combine(y, tiles, out_dtype=dtype)  # type: ignore[no-any-return]


def weighted_input(x: Tensor, routing: Routing) -> Tensor:  # [T, H]
    """x * routing weight; ValueError unless each token has one expert."""
    if routing.top_k != 1:
        raise ValueError(
            f"the router weight can be applied to the input with one expert a token only, but routing has {routing.top_k}: "
            "x would need a different weight for each of them"
        )
    return (x.float() * routing.weights).to(x.dtype)


class ExpertsBase:
    """Experts bound to their weights: checks, what each class may override, and the call.

    name: of the backend. capability: what is claimed, and so tested. pair_dtype: of GEMM 2's output, None for x's.
    quantizes_inputs: GEMM inputs stay quantized (native); else they are dequantized again.
    """

    name: ClassVar[str]
    capability: ClassVar[Capability]
    pair_dtype: ClassVar[torch.dtype | None] = torch.float32
    quantizes_inputs: ClassVar[bool] = False
    ops: ClassVar[Any] = mk

    def __init__(
        self,
        weights: ExpertWeights,
        activation: Activation,
        *,
        choice: Choice,
        inputs: str | None = None,
        expert_map: Tensor | None = None,
        router_weight_on_input: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.choice = choice
        self.dtype = dtype or weights.dtype
        self.activation = activation
        self.expert_map = expert_map
        self.router_weight_on_input = router_weight_on_input
        self.num_experts, self.hidden = int(weights.w13.shape[0]), int(weights.w13.shape[-1])
        self.intermediate = int(weights.w2.shape[-1])
        self.device = weights.w13.device
        self.inputs = Inputs(
            None if inputs is None else mk.get_format(inputs), self.quantizes_inputs, input_scales(weights)
        )
        check_expert_map(expert_map, self.num_experts, self.device)
        self._bind(weights)

    @classmethod
    def why_not(cls, device: mk.Device, problem: Problem) -> str | None:
        """Why this class cannot run ``problem`` on ``device``, or None."""
        return cls.capability.why_not(problem)

    @classmethod
    def auto_inputs(cls, weight: str) -> str | None:
        """What GEMM inputs are quantized to where nothing says it: None, 16 bits, unless the class can do nothing else."""
        return None

    def _bind(self, weights: ExpertWeights) -> None:
        """Keep the weights, or a packing of them."""
        self._weights = weights

    @property
    def weights(self) -> ExpertWeights:
        """The weights in their canonical layout."""
        return self._weights

    def update_weights(self, weights: ExpertWeights) -> None:
        """Write new weights into the memory of the old ones, so that captured graphs see them; ValueError unless they fit."""
        self._weights.copy_(weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are held."""
        return self._weights.nbytes

    def _operands(self, routing: Routing, dtype: torch.dtype) -> Weights:
        """The weights of one forward of x in ``dtype``."""
        w = self._weights
        return Weights(lambda: w.w13, lambda: w.w2, self.num_experts, w.w13_bias, w.w2_bias, self.expert_map)

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:  # [T, H] -> [T, H]
        """The weighted sum over each token's experts, in x's dtype.

        Raises ValueError for shapes, strides and devices, TypeError for x's dtype.
        """
        self._check(x, routing)
        return self._forward(x, routing)

    def _forward(self, x: Tensor, routing: Routing) -> Tensor:  # [T, H] -> [T, H]
        """The call, without its checks."""
        return fused_moe(
            x,
            routing,
            self._operands(routing, x.dtype),
            self.activation,
            inputs=self.inputs,
            weight_on_input=self.router_weight_on_input,
            pair_dtype=self.pair_dtype,
            ops=self.ops,
        )

    def _check(self, x: Tensor, routing: Routing) -> None:
        if x.dtype not in self.capability.dtypes:
            raise TypeError(f"x is {x.dtype}, needs {' or '.join(str(d) for d in self.capability.dtypes)}")
        if x.ndim != 2 or x.shape[1] != self.hidden:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, needs [T, {self.hidden}]: flatten batch and sequence into T first"
            )
        if x.shape[0] != routing.num_tokens:
            raise ValueError(f"x has {x.shape[0]} tokens and routing {routing.num_tokens}: both need the same T")
        if x.device != self.device or routing.ids.device != self.device:
            raise ValueError(
                f"x is on {x.device}, routing on {routing.ids.device} and the experts on {self.device}: move all to one device"
            )
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"x has stride {x.stride(1)} along H, needs 1: pass x.contiguous()")

    def __repr__(self) -> str:
        fmt = self.inputs.format
        return (
            f"{type(self).__name__}({self.num_experts} experts, H={self.hidden}, I={self.intermediate}, "
            f"inputs={fmt or '16 bits'}, device={self.device})"
        )


def input_scales(weights: ExpertWeights) -> tuple[Tensor | None, Tensor | None]:
    """The global scales of both GEMMs' inputs, float32 [] each, or None where the weights carry none.

    Scales of single experts are joined by their maximum: x is quantized before it is known which expert reads it.
    Raises ValueError for scales that are not finite and positive, and where only one of the two is there.
    """
    scales = (weights.w13_input_scale, weights.w2_input_scale)
    if (scales[0] is None) != (scales[1] is None):
        one, other = ("w13", "w2") if scales[1] is None else ("w2", "w13")
        raise ValueError(
            f"{one}_input_scale is given and {other}_input_scale is missing: both GEMMs need one, or neither"
        )
    if scales[0] is None or scales[1] is None:
        return None, None
    return joint_scale(scales[0], "w13_input_scale"), joint_scale(scales[1], "w2_input_scale")


def joint_scale(scale: Tensor, what: str) -> Tensor:
    """``scale`` as one float32 number []; ValueError unless all of it is finite and positive (reads values, once)."""
    if scale.numel() == 0:
        raise ValueError(f"{what} is empty: needs one positive number, or one per expert")
    scale = scale.float()
    if _readable(scale) and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{what} holds {scale.flatten()[:8].tolist()}: every input scale must be finite and positive (a multiplier, "
            "amax / 2688); a missing or zero scale turns activations into NaN: calibrate the checkpoint again"
        )
    return scale.max().reshape(())


def check_expert_map(expert_map: Tensor | None, num_experts: int, device: torch.device) -> None:
    """Raise unless ``expert_map`` is int32 [E_global] on ``device`` with rows below ``num_experts`` or -1 (reads values, once)."""
    if expert_map is None:
        return
    if expert_map.dtype != torch.int32:
        raise TypeError(f"expert_map is {expert_map.dtype}, needs int32")
    if expert_map.ndim != 1:
        raise ValueError(f"expert_map has shape {tuple(expert_map.shape)}, needs [E_global]")
    if expert_map.device != device:
        raise ValueError(f"expert_map is on {expert_map.device} and the weights on {device}: move both to one device")
    bad = (expert_map < -1) | (expert_map >= num_experts)
    if _readable(bad) and bool(bad.any()):
        e = int(bad.nonzero()[0])
        raise ValueError(
            f"expert_map[{e}] is {int(expert_map[e])}, needs -1 (not here) or a row of the weights, 0 to {num_experts - 1}"
        )


def _readable(t: Tensor) -> bool:
    return t.device.type != "meta" and not torch.compiler.is_compiling()


def hardware_reason(device: mk.Device, inputs: str, weight: str) -> str | None:
    """Why ``device`` does not multiply these two formats in hardware, and which architectures do; None where it does.

    Also None where only Triton is too old for any kernel: ``triton_reason`` says that.
    """
    if device.native(inputs, weight):
        return None
    have = device.native_elsewhere(inputs, weight)
    pair = weight if inputs == weight else f"{inputs} x {weight}"
    if device.arch.name in have and not device.compiles:
        return None
    if device.arch.name in have:
        need = device.arch.native_since
        return f"{device} multiplies {pair} in hardware from Triton {need} on, and this is Triton {device.triton}: update it"
    where = f"{', '.join(have)} have" if have else "no architecture in the table has"
    if device.type in ("cuda", "xpu") and device.arch.name not in mk.ARCHITECTURES:
        return (
            f"{device} is not in the table of architectures: no hardware dot_scaled is known there for {pair} ({where})"
        )
    return f"{device} has no hardware dot_scaled for {pair} ({where})"


def triton_reason(device: mk.Device, job: str) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if device.type not in ("cuda", "xpu"):
        return f"{device} runs no Triton kernels, and {job}"
    if device.triton is None:
        return f"Triton is not installed, and {job}: pip install triton (GPU builds of torch bring their own)"
    if not device.compiles:
        return f"Triton {device.triton} is older than {device.arch.product_since}, which {device} needs, and {job}"
    return None


_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """``warnings.warn`` once in this process for each ``key``; not while tracing, where nothing can be said."""
    if not torch.compiler.is_compiling() and key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
