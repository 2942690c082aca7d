"""Products with packed weights: the custom op behind ``grouped_gemm`` and ``gemm`` for a ``PackedWeight``.

On an accelerator with Triton it is ``kernels.grouped_gemm``; elsewhere the weight is unpacked and the reference computes the
product. Letters as in ``grouped_gemm.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .alignment import Alignment
from .dispatch import check_float, check_last_stride, direct, flat_activation, has_triton, kernels, whole_activation
from .epilogue import Epilogue
from .formats import ScaleRule, get_format
from .packing import PackedWeight
from .quantize import dequantize
from .tensor import QuantizedTensor

_SCHEMA = (
    "(Tensor x, Tensor w, Tensor? w_scale, Tensor? w_alpha, Tensor? w_shift, Tensor? w_global, str w_format, int n, int k, "
    "bool w_gated, str w_layout, Tensor? sorted_ids, Tensor? expert_ids, Tensor? num_padded, int block_size, int num_pairs, "
    "int tokens, int top_k, Tensor? bias, str act, bool gated, float alpha, float beta, float limit, Tensor? row_weight, "
    "str round_to, str rule, bool to_slots, ScalarType out_dtype) -> Tensor"
)


def _grouped_gemm_packed(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    w_alpha: Tensor | None,
    w_shift: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    n: int,
    k: int,
    w_gated: bool,
    w_layout: str,
    sorted_ids: Tensor | None,
    expert_ids: Tensor | None,
    num_padded: Tensor | None,
    block_size: int,
    num_pairs: int,
    tokens: int,
    top_k: int,
    bias: Tensor | None,
    act: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    row_weight: Tensor | None,
    round_to: str,
    rule: str,
    to_slots: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [M, K] -> [num_pairs, N_out], or a row a slot: of x where top_k is 0, of the result where to_slots. Without ``expert_ids`` the one
    weight serves all rows (a linear layer)."""
    f = get_format(w_format) if w_format else None
    packed = PackedWeight(
        *(w, w_scale, w_alpha, w_shift, w_global, torch.Size((w.shape[0], n, k)), f),
        *(f.default_rule if f else None, torch.bfloat16 if f else w.dtype, w_gated, w_layout),
    )
    if expert_ids is None or num_padded is None:
        expert_ids = torch.zeros(num_pairs, dtype=torch.int32, device=x.device)
        sorted_ids, num_padded = None, expert_ids[:0]
        bias = None if bias is None else bias.unsqueeze(0)  # [N], of the one weight
    k = max(top_k, 1)
    ids = expert_ids.new_empty((num_pairs // k, k))  # only its size counts here
    out = reference.grouped_gemm(
        x,
        packed.unpack(),
        Alignment(ids, w.shape[0], block_size, sorted_ids, expert_ids, num_padded),
        top_k=k,
        from_slots=top_k == 0,
        to_slots=to_slots,
        epilogue=Epilogue(
            bias,
            whole_activation(act, w_layout, gated, alpha, beta, limit),
            row_weight,
            rule=ScaleRule(rule) if rule else None,
            round_to=get_format(round_to) if round_to else None,
        ),
        out_dtype=out_dtype,
    )
    assert isinstance(out, Tensor)
    return out


grouped_gemm_packed_op = torch.library.custom_op(
    "mx_kernels::grouped_gemm_packed", _grouped_gemm_packed, mutates_args=(), schema=_SCHEMA
)


@grouped_gemm_packed_op.register_kernel(("cuda", "xpu"))
def _(x: Tensor, *args: object) -> Tensor:
    if not has_triton():
        return _grouped_gemm_packed(x, *args)  # type: ignore[arg-type]
    out: Tensor = kernels("grouped_gemm").grouped_gemm_packed(x, *args)
    return out


@grouped_gemm_packed_op.register_fake
def _(x: Tensor, *args: object) -> Tensor:
    n, sorted_ids, num_pairs, gated, to_slots, out_dtype = (args[i] for i in (6, 10, 14, 19, 26, 27))
    assert isinstance(n, int)
    assert isinstance(num_pairs, int)
    assert isinstance(out_dtype, torch.dtype)
    rows = sorted_ids.shape[0] if to_slots and isinstance(sorted_ids, Tensor) else num_pairs
    return x.new_empty((rows, n // 2 if gated else n), dtype=out_dtype)


def packed_product(
    x: Tensor | QuantizedTensor,  # [M, K]
    w: PackedWeight,
    tiles: Alignment | None,  # None: one weight for all rows
    top_k: int,
    epilogue: Epilogue,  # requantize_to is left to the caller, and round_to unless it ``rounds_itself``
    row_weight: Tensor | None,  # float32 [P]
    out_dtype: torch.dtype,
    to_slots: bool = False,
) -> Tensor:  # [P, N_out], or a row a slot
    """The product of operands that were checked; top_k: 0 where x has a row a slot. Errors of ``flat_product``."""
    args = flat_product(x, w, tiles, top_k, epilogue, row_weight, out_dtype, to_slots)
    run = kernels("grouped_gemm").grouped_gemm_packed if direct(args[0], w.data, row_weight) else grouped_gemm_packed_op
    out: Tensor = run(*args)
    return out


def rounds_itself(epilogue: Epilogue, w: PackedWeight) -> bool:
    """Whether the product rounds its result to ``round_to``.

    Not by a search, which tries two scales, and not gates and ups without an activation: a tile has them in another order than
    the result, whose blocks are rounded.
    """
    f = epilogue.round_to
    ordered = epilogue.activation is not None or not w.gated
    return f is not None and ordered and f.check_rule(epilogue.rule) is not ScaleRule.SEARCH


def flat_product(
    x: Tensor | QuantizedTensor,
    w: PackedWeight,
    tiles: Alignment | None,
    top_k: int,
    epilogue: Epilogue,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
    to_slots: bool = False,
) -> tuple[Any, ...]:
    """The op's arguments. x is bf16, or any float or quantized tensor as a sum of bf16 tensors that is exact.

    Raises ValueError where the activation and the packing disagree on gates and ups, TypeError for an fp16 weight with
    activations that are not fp16.
    """
    a = epilogue.activation
    if a is not None and a.gated and (not w.gated or a.layout != w.layout):
        how = f"gated=True, layout={w.layout!r}" if w.gated else "gated=False"
        raise ValueError(
            f"the activation is gated with {a.layout} gates and ups, but w was packed with {how}: "
            f"pack(w, gated=True, layout={a.layout!r})"
        )
    if a is not None and not a.gated and w.gated:
        raise ValueError("the activation is not gated, but w was packed with gated=True: pack(w)")
    if isinstance(x, QuantizedTensor):
        x = dequantize(x, torch.float32 if x.format.has_global_scale else torch.bfloat16)
    check_float(x, "x")
    check_last_stride(x, "x")
    if w.format is None and w.dtype == torch.float16 and x.dtype != torch.float16:
        raise TypeError(f"w is packed float16 and x is {x.dtype}: cast x to float16, or pack w as bfloat16")
    act, _, gated, alpha, beta, limit = flat_activation(a)
    f = epilogue.round_to if rounds_itself(epilogue, w) else None
    rounded = ("", "") if f is None else (f.name, f.check_rule(epilogue.rule).value)
    routed = (None, None, None, 16, x.shape[0], x.shape[0])
    if tiles is not None:
        routed = (  # type: ignore[assignment]
            *(tiles.sorted_ids, tiles.expert_ids, tiles.num_padded),
            *(tiles.block_size, tiles.num_pairs, tiles.ids.shape[0]),
        )
    return (
        *(x, w.data, w.scale, w.alpha, w.shift, w.global_scale, "" if w.format is None else w.format.name),
        *(w.shape[-2], w.shape[-1], w.gated, w.layout),
        *routed,
        *(top_k, epilogue.bias, act, gated, alpha, beta, limit, row_weight, *rounded, to_slots, out_dtype),
    )
