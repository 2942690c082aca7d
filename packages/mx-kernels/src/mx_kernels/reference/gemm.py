"""GEMM and grouped GEMM on plain and quantized operands, in plain PyTorch.

    out[m, n] = epilogue(sum_k x[m, k] * w[n, k])

in float32: operands are decoded exactly, products are summed in float32, the global scales (NVFP4) multiply the sum, and
the output is rounded once. Letters: M rows, E experts, P pairs. On an accelerator this follows torch's setting for TF32
matrix products, which is off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..alignment import Alignment
from ..epilogue import Activation, Epilogue
from ..tensor import QuantizedTensor
from .activation import activated
from .moe import pair_experts, pair_rows, slot_rows
from .quantize import dequantize, quantize, quantize_dequantize

Operand = Tensor | QuantizedTensor


def _decode(t: Operand, decoder: Callable[[QuantizedTensor, torch.dtype], Tensor]) -> Tensor:
    """The operand in float32, without its global scale: every value is exact."""
    if isinstance(t, Tensor):
        return t.float()
    if t.global_scale is not None:
        t = replace(t, global_scale=torch.ones_like(t.global_scale))
    return decoder(t, torch.float32)


def _global_scale(t: Operand) -> Tensor | None:
    return t.global_scale if isinstance(t, QuantizedTensor) else None


def _finish(
    acc: Tensor,  # [M, N]
    scales: tuple[Tensor | None, Tensor | None],  # [] or [M, 1] each
    bias: Tensor | None,  # [N]
    activation: Activation | None,
    row_weight: Tensor | None,  # [M]
) -> Tensor:  # [M, N_out]
    gx, gw = scales
    if gx is not None and gw is not None:
        gx, gw = gx * gw, None
    for scale in (gx, gw):
        acc = acc if scale is None else acc * scale
    if bias is not None:
        acc = acc + bias.float()
    if activation is not None:
        acc = activated(acc, activation)
    if row_weight is not None:
        acc = acc * row_weight[:, None]
    return acc


def _stored(out: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor | QuantizedTensor:
    if epilogue.round_to is not None:
        return quantize_dequantize(out.contiguous(), epilogue.round_to, rule=epilogue.rule).to(dtype)
    if epilogue.requantize_to is None:
        return out.to(dtype)
    q = quantize(out.contiguous(), epilogue.requantize_to, rule=epilogue.rule)
    return replace(q, dtype=dtype)


def gemm(
    x: Operand,  # [..., K]
    w: Operand,  # [N, K]
    *,
    epilogue: Epilogue | None = None,
    out_dtype: torch.dtype | None = None,
    decoder: Callable[[QuantizedTensor, torch.dtype], Tensor] = dequantize,
) -> Tensor | QuantizedTensor:  # [..., N_out]
    """One weight for all rows; see ``mx_kernels.gemm``. ``decoder``: what stands in for ``dequantize``, with the same values."""
    epilogue = epilogue or Epilogue()
    lead, k = x.shape[:-1], x.shape[-1]
    gx = _global_scale(x)
    if gx is not None and gx.ndim:
        gx = gx.view(*gx.shape, *(1,) * (len(lead) - gx.ndim)).expand(lead).reshape(-1, 1)
    weight = epilogue.row_weight
    acc = _decode(x, decoder).reshape(lead.numel(), k) @ _decode(w, decoder).T
    out = _finish(
        acc,
        (gx, _global_scale(w)),
        epilogue.bias,
        epilogue.activation,
        None if weight is None else weight.reshape(-1),
    )
    return _stored(out.view(*lead, out.shape[-1]), epilogue, out_dtype or x.dtype)


def grouped_gemm(
    x: Operand,  # [M, K]
    w: Operand,  # [E, N, K]
    tiles: Alignment,
    *,
    top_k: int = 1,
    from_slots: bool = False,
    to_slots: bool = False,
    epilogue: Epilogue | None = None,
    out_dtype: torch.dtype | None = None,
    decoder: Callable[[QuantizedTensor, torch.dtype], Tensor] = dequantize,
) -> Tensor | QuantizedTensor:  # [P, N_out]
    """One weight per expert; see ``mx_kernels.grouped_gemm``. Rows of dropped pairs, and of slots without a pair, are zero.

    Loops over the experts that a pair goes to and decodes those alone, one at a time. ``decoder``: what stands in for
    ``dequantize``, with the same values.
    """
    epilogue = epilogue or Epilogue()
    dtype = out_dtype or x.dtype
    pairs, (num_experts, n, _) = tiles.num_pairs, w.shape
    experts = pair_experts(tiles.sorted_ids, tiles.expert_ids, tiles.num_padded, tiles.block_size, pairs, num_experts)
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts + 1, minlength=num_experts + 1).tolist()
    act, weight = epilogue.activation, epilogue.row_weight
    weight = None if weight is None else weight.reshape(-1)
    width = n if act is None else act.out_features(n)
    held = dtype if epilogue.requantize_to is None and epilogue.round_to is None else torch.float32
    out = torch.zeros((pairs, width), dtype=held, device=x.device)
    values = _decode(x, decoder) if isinstance(x, QuantizedTensor) else x
    if from_slots:
        assert tiles.sorted_ids is not None
        values = pair_rows(values, tiles.sorted_ids, tiles.num_padded, pairs)
    gx, gw = _global_scale(x), _global_scale(w)
    end = counts[0]
    for e, count in enumerate(counts[1:]):
        if not count:
            continue
        rows = order[end : end + count]
        end += count
        acc = values[rows // top_k].float() @ _decode(w[e], decoder).T
        y = _finish(
            acc,
            (gx, gw if gw is None or gw.ndim == 0 else gw[e]),
            None if epilogue.bias is None else epilogue.bias[e],
            act,
            None if weight is None else weight[rows],
        )
        out[rows] = y.to(held)
    if to_slots:
        assert tiles.sorted_ids is not None
        out = slot_rows(out, tiles.sorted_ids, tiles.num_padded, pairs, 1)
    return _stored(out, epilogue, dtype)
