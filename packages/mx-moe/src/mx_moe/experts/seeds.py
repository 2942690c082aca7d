"""The expert classes of the systems that this project re-creates, under their names and with their contracts.

Common to all: x [T, H] contiguous; w1 [E, 2I, H] (I rows where the activation is not gated), w2 [E, H, I], given at each
call; topk_weights [T, k] float32, topk_ids [T, k] int, global expert ids; the result [T, H] is weighted and reduced.
``global_num_experts`` -1 means E. ``expert_map`` int32 [E_global] maps a global id to a row of w1 and w2, or -1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Activation, Choice, Format, QuantizedTensor
from mx_quant import ExpertWeights

from ..routing import Routing
from .base import ExpertsBase, joint_scale
from .emulation import EmulationExperts
from .native import NativeExperts
from .problem import Problem

_NAMED = {
    "silu": ("silu", True),
    "gelu": ("gelu", True),
    "gelu_tanh": ("gelu_tanh", True),
    "relu2": ("relu2", True),
    "silu_no_mul": ("silu", False),
    "gelu_no_mul": ("gelu", False),
    "gelu_tanh_no_mul": ("gelu_tanh", False),
    "relu2_no_mul": ("relu2", False),
}


def named_activation(
    name: str, *, alpha: float | None = None, beta: float | None = None, limit: float | None = None
) -> Activation:
    """The activation of that name in serving engines.

    "silu", "gelu", "gelu_tanh", "relu2" (gated, gate rows first), the same with "_no_mul" (not gated), "swigluoai" (gate and
    up rows interleaved; limit 7 by default) and "swigluoai_uninterleave" (gate rows first; a limit is required). alpha is
    1.702 and beta 1.0 by default for the last two. Raises ValueError for an unknown name, a missing limit, and parameters
    that the activation does not have.
    """
    name = name.lower()
    if name in _NAMED:
        kind, gated = _NAMED[name]
        return Activation(kind, gated=gated, alpha=alpha, beta=beta, limit=limit)
    if name not in ("swigluoai", "swigluoai_uninterleave"):
        names = ", ".join((*_NAMED, "swigluoai", "swigluoai_uninterleave"))
        raise ValueError(f"unknown activation {name!r}; there are {names}")
    layout = "interleaved"
    if name == "swigluoai_uninterleave":
        layout = "concatenated"
        if limit is None:
            raise ValueError(
                "swigluoai_uninterleave needs a clamp limit (gpt-oss: limit=7.0): without it results differ silently"
            )
    return Activation(
        "swiglu_oai",
        layout,
        alpha=1.702 if alpha is None else alpha,
        beta=1.0 if beta is None else beta,
        limit=7.0 if limit is None else limit,
    )


class _TritonExperts:
    """Scales, biases and activation bound at construction; weights and routing given at each call."""

    format: ClassVar[Format]
    backend: ClassVar[type[ExpertsBase] | None] = None
    inputs: ClassVar[str | None] = None
    quantization_emulation: ClassVar[bool] = False

    def __init__(
        self,
        w1_scale: Tensor | None,  # [E, 2I, H / block]
        w2_scale: Tensor | None,  # [E, H, I / block]
        *,
        w1_bias: Tensor | None = None,  # [E, 2I]
        w2_bias: Tensor | None = None,  # [E, H]
        activation: Activation | str = "silu",
        alpha: float | None = None,
        beta: float | None = None,
        limit: float | None = None,
    ) -> None:
        if self.backend is None:
            raise TypeError(
                f"{type(self).__name__} is the base of its emulation and native classes: construct one of those, "
                "or let select_mxfp8_moe_backend choose"
            )
        if isinstance(activation, str):
            activation = named_activation(activation, alpha=alpha, beta=beta, limit=limit)
        elif (alpha, beta, limit) != (None, None, None):
            raise ValueError("alpha, beta and limit belong to an activation's name; this one is given as an Activation")
        self.activation = activation
        self.w1_scale, self.w2_scale = w1_scale, w2_scale
        self.w1_bias, self.w2_bias = w1_bias, w2_bias
        self._bound: tuple[object, ExpertsBase] | None = None

    @classmethod
    def why_not(cls, device: mk.Device, problem: Problem) -> str | None:
        """Why this class cannot run ``problem`` on ``device``, or None."""
        if problem.weight != cls.format.name:
            return f"it takes {cls.format} weights, not {problem.weight}"
        return None if cls.backend is None else cls.backend.why_not(device, problem)

    def apply(
        self,
        x: Tensor,  # [T, H]
        w1: Tensor,  # [E, 2I, H]
        w2: Tensor,  # [E, H, I]
        topk_weights: Tensor,  # [T, k]
        topk_ids: Tensor,  # [T, k]
        *,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,  # [E_global]
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:  # [T, H]
        """Weighted and reduced over k, in x's dtype. Raises ValueError, TypeError, and Unsupported with the reason."""
        here = w1.shape[0] if expert_map is None else expert_map.shape[0]
        if global_num_experts not in (-1, here):
            what = "the weights have no expert_map and" if expert_map is None else "expert_map has"
            raise ValueError(f"global_num_experts is {global_num_experts}, but {what} {here} experts")
        key = None
        if not torch.compiler.is_compiling():  # values are checked once, so that no later call waits for the device
            tensors = (w1, w2, expert_map)
            key = (
                *((t.data_ptr(), t.shape, t.dtype) for t in tensors if t is not None),
                apply_router_weight_on_input,
                x.dtype,
            )
        if key is None or self._bound is None or self._bound[0] != key:
            self._bound = (key, self._bind(w1, w2, expert_map, apply_router_weight_on_input, x.dtype))
        return self._bound[1](x, Routing(topk_ids, topk_weights))

    def _bind(
        self, w1: Tensor, w2: Tensor, expert_map: Tensor | None, weight_on_input: bool, dtype: torch.dtype
    ) -> ExpertsBase:
        """Experts on these weights, which they share; Unsupported with the reason."""
        backend = self.backend
        assert backend is not None
        weights = ExpertWeights(
            self._operand(w1, self.w1_scale, 1),
            self._operand(w2, self.w2_scale, 2),
            self.w1_bias,
            self.w2_bias,
            None if self.inputs is None else mk.get_format(self.inputs),
            *self._input_scales(),
        )
        problem = Problem.of(
            weights, self.activation, dtype=dtype, inputs=self.inputs, expert_map=expert_map is not None,
            router_weight_on_input=weight_on_input,
        )  # fmt: skip
        device = mk.Device.probe(w1.device)
        reason = backend.why_not(device, problem)
        if reason is not None:
            raise mk.Unsupported(f"{type(self).__name__} cannot run {problem} on {device}", ((backend.name, reason),))
        return backend(
            weights,
            self.activation,
            choice=Choice(mk.Candidate(backend.name, backend.why_not, backend)),
            inputs=self.inputs,
            expert_map=expert_map,
            router_weight_on_input=weight_on_input,
            dtype=dtype,
        )

    def _operand(self, w: Tensor, scale: Tensor | None, gemm: int) -> Tensor | QuantizedTensor:
        """Weights of two bytes an element or more are used as they are; others need their scales."""
        if w.element_size() >= 2:
            return w
        if scale is None:
            raise ValueError(
                f"w{gemm}_scale is missing: {self.format} weights need uint8 or float8 scales of shape [E, N, K / {self.format.block}]"
            )
        return QuantizedTensor(
            w.view(self.format.data_dtype), scale.view(self.format.scale_dtype), self.format,
            self.format.default_rule, torch.bfloat16, self._global_scale(gemm, w.shape[0]),
        )  # fmt: skip

    def _global_scale(self, gemm: int, num_experts: int) -> Tensor | None:
        return None

    def _input_scales(self) -> tuple[Tensor | None, Tensor | None]:
        return None, None


class Mxfp8TritonExpertsBase(_TritonExperts):
    """FP8 E4M3 weights [E, N, K] with uint8 E8M0 scales [E, N, K / 32]: what both MXFP8 classes share."""

    format = mk.MXFP8


class Mxfp8EmulationTritonExperts(Mxfp8TritonExpertsBase):
    """Weights dequantized to 16 bits, then plain experts; inputs are not quantized. Any device; says once that it is slower.

    Weights that are already two bytes an element or more are used as they are (no scales needed).
    """

    backend = EmulationExperts


class Mxfp8NativeTritonExperts(Mxfp8TritonExpertsBase):
    """Weights and MXFP8-quantized inputs go into ``tl.dot_scaled``; only where the hardware has it (else Unsupported)."""

    backend = NativeExperts
    inputs = "mxfp8_e4m3"


class Nvfp4QuantizationEmulationTritonExperts(_TritonExperts):
    """NVFP4 weights dequantized; inputs of both GEMMs go through an NVFP4 quantize-dequantize; then 16-bit experts.

    w1_global_scale, w2_global_scale: float32 [E] or [], multipliers of the weights.
    a1_global_scale, a2_global_scale: float32, multipliers of the inputs of GEMM 1 and 2 (amax / 2688; a checkpoint that
        stores the divisor must be inverted first); per expert ones are joined by their maximum.
    Raises ValueError where one is missing, zero, negative or not finite.
    """

    format = mk.NVFP4
    backend = EmulationExperts
    inputs = "nvfp4"
    quantization_emulation = True

    def __init__(
        self,
        w1_scale: Tensor,  # [E, 2I, H / 16]
        w2_scale: Tensor,  # [E, H, I / 16]
        w1_global_scale: Tensor,  # [E] or []
        w2_global_scale: Tensor,  # [E] or []
        a1_global_scale: Tensor | None,  # [E] or []
        a2_global_scale: Tensor | None,  # [E] or []
        *,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        activation: Activation | str = "silu",
        alpha: float | None = None,
        beta: float | None = None,
        limit: float | None = None,
    ) -> None:
        super().__init__(
            w1_scale, w2_scale, w1_bias=w1_bias, w2_bias=w2_bias, activation=activation, alpha=alpha, beta=beta, limit=limit
        )  # fmt: skip
        for name, scale in (("a1", a1_global_scale), ("a2", a2_global_scale)):
            if scale is None:
                raise ValueError(
                    f"{name}_global_scale is missing: NVFP4 activations need the input scale of each GEMM from calibration; "
                    "without it every activation would become NaN"
                )
        assert a1_global_scale is not None
        assert a2_global_scale is not None
        self.w1_global_scale = joint_checked(w1_global_scale, "w1_global_scale")
        self.w2_global_scale = joint_checked(w2_global_scale, "w2_global_scale")
        self.a1_global_scale = joint_scale(a1_global_scale, "a1_global_scale")
        self.a2_global_scale = joint_scale(a2_global_scale, "a2_global_scale")

    def _global_scale(self, gemm: int, num_experts: int) -> Tensor | None:
        scale = self.w1_global_scale if gemm == 1 else self.w2_global_scale
        return scale.reshape(-1).expand(num_experts)

    def _input_scales(self) -> tuple[Tensor | None, Tensor | None]:
        return self.a1_global_scale, self.a2_global_scale


def joint_checked(scale: Tensor, what: str) -> Tensor:
    """``scale`` itself, float32; ValueError unless all of it is finite and positive."""
    joint_scale(scale, what)
    return scale.float()
