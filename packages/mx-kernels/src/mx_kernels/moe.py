"""A whole MoE layer on packed or re-based weights, launched at once: what its steps do, at a third of what they cost the host.

The steps (``moe_align_block_size``, ``grouped_gemm`` twice, ``combine``; for re-based weights ``grouped_gemm_rebased`` on what
``rebase_rows`` makes) check their arguments, find their launches and allocate one by one. All of that follows from a few numbers, so a
layer that is called again with the same ones needs to do it once. Launcher and plans: ``kernels.moe``, ``kernels.rebased_moe``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import FLOATS, direct, kernels
from .epilogue import Activation
from .formats import Format
from .packing import PackedWeight
from .quantize import quantize_dequantize
from .rebase import RebasedWeight
from .reference.rebase import gate_up_rows


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The operands of an MoE layer's five steps that stay the same from call to call.

    w13: [E, 2I or I, H], w2: [E, H, I], of ``pack``; biases: [E, 2I or I] and [E, H]; expert_map: int32 [E_global]. All of them were
    checked by the caller: a layer launches what the steps would, it does not repeat what they refuse. inputs: an MX format that
    both products' inputs are quantized to and back, by its default rule, as ``quantize_dequantize`` and ``Epilogue.round_to`` do.
    """

    w13: PackedWeight
    w2: PackedWeight
    activation: Activation
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_map: Tensor | None = None
    inputs: Format | None = None

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names."""
        named = {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias, "expert_map": self.expert_map}
        for name, w in (("w13", self.w13), ("w2", self.w2)):
            named |= {name: w.data, f"{name}_scale": w.scale, f"{name}_alpha": w.alpha}
        return {name: t for name, t in named.items() if t is not None}

    @functools.cached_property
    def key(self) -> object:
        """What a plan depends on: equal for layers of one shape."""
        w13, w2 = self.w13, self.w2
        formats = (w13.format, w2.format, w13.gated, w13.layout, w2.gated, self.inputs)
        return _token((_facts(self.tensors), w13.shape, w2.shape, *formats, self.activation))

    def launch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:  # [T, H], [T, k], [T, k] -> [T, H]
        """The weighted sum over each token's experts, bit for bit what the five steps give, or None: then run those.

        None is the answer to what they do not do by these launches alone (x in another dtype than the weights are decoded to, ids or
        weights that are not contiguous int32 and float32, unaligned tensors, no tokens), to what they refuse, off CUDA devices (ROCm's
        count) with Triton and on others than the current one, while something traces, differentiates or profiles launches, and
        until the steps themselves have compiled their kernels.
        """
        dtype = torch.bfloat16 if self.w13.format is not None else self.w13.data.dtype
        if not _served(self, x, ids, weights) or x.dtype != dtype:
            return None
        if self.inputs is not None:
            x = quantize_dequantize(x, self.inputs)
        moe = kernels("moe")
        out: Tensor | None = moe.launch(moe.plan, self, x, ids, weights)
        return out


@dataclass(frozen=True, eq=False)
class RebasedLayer:
    """The same for re-based weights: w13 [E, 2I, H], ``gated``, and w2 [E, H, I], of ``rebase``.

    activation: one of REBASED_ACTIVATIONS, gated and concatenated. w13_bias: [E, 2I], gate and up as two halves, of which the layer
    keeps a copy in the order of w13's rows: later changes of it are not seen.
    """

    w13: RebasedWeight
    w2: RebasedWeight
    activation: Activation
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_map: Tensor | None = None

    def __post_init__(self) -> None:
        """Make the copy now: the first call may be within the capture of a graph."""
        assert self.tensors

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names, the first bias in the order of w13's rows."""
        bias = None if self.w13_bias is None else gate_up_rows(self.w13_bias)
        named = {"w13_bias": bias, "w2_bias": self.w2_bias, "expert_map": self.expert_map}
        for name, w in (("w13", self.w13), ("w2", self.w2)):
            named |= {name: w.data, f"{name}_octaves": w.octaves, f"{name}_scale": w.scale}
        return {name: t for name, t in named.items() if t is not None}

    @functools.cached_property
    def key(self) -> object:
        """What a plan depends on: equal for layers of one shape."""
        return _token((_facts(self.tensors), self.w13.shape, self.w2.shape, self.activation))

    def launch(
        self, x: Tensor, ids: Tensor, weights: Tensor, *, promote: bool = True
    ) -> Tensor | None:  # [T, H], [T, k], [T, k] -> [T, H]
        """What ``PackedLayer.launch`` gives, and None where that does; x: bf16, fp16 or float32, which is the result's dtype too.

        promote: of both products, as ``grouped_gemm_rebased`` takes it. Blocks are of ``rebased_block_size``.
        """
        if not _served(self, x, ids, weights) or x.dtype not in FLOATS:
            return None
        out: Tensor | None = kernels("moe").launch(kernels("rebased_moe").plan, self, x, ids, weights, promote)
        return out


def _served(layer: PackedLayer | RebasedLayer, x: Tensor, ids: Tensor, weights: Tensor) -> bool:
    """Whether launches alone are what the steps do for such tensors, x's dtype apart."""
    if not direct(x, ids, weights) or x.ndim != 2 or ids.ndim != 2 or x.device != layer.w13.data.device:
        return False
    (tokens, width), k = x.shape, ids.shape[1]
    if width != layer.w13.shape[2] or x.stride(1) != 1 or ids.shape != weights.shape or not tokens or not k:
        return False
    if ids.dtype != torch.int32 or weights.dtype != torch.float32 or ids.shape[0] != tokens:
        return False
    if layer.expert_map is not None and not layer.expert_map.is_contiguous():
        return False
    return ids.is_contiguous() and weights.is_contiguous() and ids.device == weights.device == x.device


def _facts(tensors: dict[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items())


@functools.cache
def _token(facts: tuple[object, ...]) -> object:
    """One object for equal facts, which is cheap to hash."""
    return object()
