"""Re-based MXFP8 in plain PyTorch: one power of two per row in place of one per 32 elements.

    MXFP8:     x[k] ~ q[k] * 2^(e[k // 32] - 127)                 q E4M3
    re-based:  x[k] ~ r[k] * 2^(top - 127),  r[k] = e4m3(q[k] * 2^(e[k // 32] - top)),  top = max over the row of e

A code changes only where ``q * 2^(e - top)`` is below E4M3's smallest normal, 2^-6. Products of re-based rows need no block
scales, so FP8 matrix units take them (DESIGN: decision 12 in docs/decisions.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..alignment import Alignment
from ..epilogue import Epilogue
from ..formats import E4M3, MXFP8, Element
from ..tensor import QuantizedTensor
from .elements import decode, encode, scale_to_float
from .gemm import grouped_gemm
from .quantize import quantize


def octaves_of_room(element: Element) -> int:
    """How often the element's largest value can be doubled within E4M3."""
    return math.floor(math.log2(E4M3.max / element.max))


def rebased(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8's codes [..., K] and E8M0 bytes [..., K/32] -> E4M3 codes [..., K] (uint8) and float32 scales [...].

    A row with a NaN scale (255) gets the scale NaN.
    """
    top = scale.amax(-1)
    down = scale.to(torch.int32) - top[..., None].to(torch.int32)
    factor = ((down + 127).clamp(min=0) << 23).view(torch.float32)  # 2^down; far below E4M3's range it is 0
    value = decode(codes, E4M3).unflatten(-1, (-1, 32)) * factor[..., None]
    return encode(value.flatten(-2), E4M3), scale_to_float(top)


def rebase_rows(
    x: Tensor,  # [M, K]
    x_scale: Tensor | None,  # uint8 [M, K / 32] where x is MXFP8's codes
    sorted_ids: Tensor | None,  # [capacity]
    num_padded: Tensor | None,  # [1]
    num_pairs: int,
    top_k: int,  # 0: a row of x for each slot
) -> tuple[Tensor, Tensor]:  # [M, K], [M]; or of capacity rows
    """MXFP8 (RCEIL), then re-based. With a tile list, slot r is row sorted_ids[r] // top_k of x, or row r; zero without a pair."""
    if x_scale is None:
        q = quantize(x, MXFP8)
        x, x_scale = q.data.view(torch.uint8), q.scale
    data, scale = rebased(x, x_scale)
    if sorted_ids is not None and num_padded is not None:
        slot = torch.arange(len(sorted_ids), device=x.device)
        live = (slot < num_padded) & (sorted_ids < num_pairs)
        if top_k:
            rows = (torch.where(live, sorted_ids, 0) // top_k).long()
            empty = data.new_zeros((len(slot), x.shape[1])), scale.new_zeros(len(slot))
            data, scale = (data[rows], scale[rows]) if len(x) else empty
        data, scale = torch.where(live[:, None], data, 0), torch.where(live, scale, 0.0)
    return data.to(torch.uint8), scale


def gate_up_rows(w: Tensor) -> Tensor:  # [E, 2I, ...] -> [E, 2I, ...]
    """Rows [gate; up] as [8 gate | 8 up] per 16."""
    e, n = w.shape[:2]
    return w.reshape(e, 2, n // 16, 8, *w.shape[2:]).transpose(1, 2).reshape(e, n, *w.shape[2:])


def concatenated_rows(w: Tensor) -> Tensor:
    """The inverse of ``gate_up_rows``."""
    e, n = w.shape[:2]
    return w.reshape(e, n // 16, 2, 8, *w.shape[2:]).transpose(1, 2).reshape(e, n, *w.shape[2:])


def grouped_gemm_rebased(
    x: Tensor,  # [capacity, K]
    x_scale: Tensor,  # [capacity]
    w: Tensor,  # [E, N, K]
    w_scale: Tensor,  # [E, N]
    tiles: Alignment,
    epilogue: Epilogue,
    scatter: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [capacity, N_out] or [P, N_out]; scale bytes where the epilogue requantizes
    """Both operands decoded to float32, then ``grouped_gemm``; rows that hold no pair are zero."""
    assert tiles.sorted_ids is not None
    slot = torch.arange(x.shape[0], device=x.device)
    live = (slot < tiles.num_padded) & (tiles.sorted_ids < tiles.num_pairs)
    pair = torch.where(live, tiles.sorted_ids, tiles.num_pairs).long()
    values = x.view(torch.float8_e4m3fn).float() * x_scale[:, None]
    rows = values.new_zeros((tiles.num_pairs + 1, x.shape[1])).index_copy(0, pair, values)[:-1]
    weight = w.view(torch.float8_e4m3fn).float() * w_scale[..., None]
    if epilogue.activation is not None:
        weight = concatenated_rows(weight)
    y = grouped_gemm(rows, weight, tiles, epilogue=epilogue, out_dtype=out_dtype)
    if isinstance(y, QuantizedTensor):
        parts = y.data.view(torch.uint8), y.scale
    else:
        parts = y, y.new_empty(0, dtype=torch.uint8)
    if scatter:
        return parts
    data, scale = (torch.cat((p, p.new_zeros((1, p.shape[1]))))[pair] if p.ndim == 2 else p for p in parts)
    return data, scale
