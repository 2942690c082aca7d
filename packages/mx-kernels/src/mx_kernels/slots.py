"""Slot order: one row for each slot of a tile list, where the pairs of an expert lie together.

A product whose rows lie so loads a block's rows as boxes by the copy engine (TMA) instead of one by one, which made GEMMs of
Mixtral's shape 10 to 15% faster (H100, docs/performance.md). Tokens have to be brought into that order first (``gather_rows``); what
GEMM 1 stores for GEMM 2 can be stored so at once (``grouped_gemm(.., to_slots=True)``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import Alignment
from .dispatch import check_device, check_float, check_last_stride, check_type, direct, has_triton, kernels
from .packing import PackedWeight
from .reference import moe as reference
from .tuned import wgmma
from .tuning import LARGE, SMALL, slots_from


@torch.library.custom_op("mx_kernels::gather_rows", mutates_args=())
def gather_rows_op(x: Tensor, sorted_ids: Tensor, num_padded: Tensor, num_pairs: int, top_k: int) -> Tensor:
    """[capacity, K]."""
    return reference.slot_rows(x, sorted_ids, num_padded, num_pairs, top_k)


@gather_rows_op.register_kernel(("cuda", "xpu"))
def _gather_rows(x: Tensor, sorted_ids: Tensor, num_padded: Tensor, num_pairs: int, top_k: int) -> Tensor:
    if not has_triton():
        return reference.slot_rows(x, sorted_ids, num_padded, num_pairs, top_k)
    out: Tensor = kernels("slots").gather_rows(x, sorted_ids, num_padded, num_pairs, top_k)[0]
    return out


@gather_rows_op.register_fake
def _(x: Tensor, sorted_ids: Tensor, num_padded: Tensor, num_pairs: int, top_k: int) -> Tensor:
    return x.new_empty((sorted_ids.shape[0], x.shape[1]))


def slots_of(tiles: Alignment) -> int:
    """The capacity of a tile list; ValueError where there is none."""
    check_type(tiles, Alignment, "tiles", "moe_align_block_size makes one")
    if tiles.sorted_ids is None:
        raise ValueError("the alignment is not sorted, and needs to be: pass sort=True to moe_align_block_size")
    return tiles.sorted_ids.shape[0]


def gather_rows(x: Tensor, tiles: Alignment, *, top_k: int = 1) -> Tensor:  # [M, K] -> [capacity, K]
    """Row ``sorted_ids[r] // top_k`` of x for each slot r of a tile list: tokens, or pairs where top_k is 1, in slot order.

    x: float32, bf16 or fp16. Rows of slots that hold no pair are undefined on an accelerator (zeros from the reference).
    Raises ValueError for shapes, strides, devices and an alignment that is not sorted, TypeError for dtypes.
    """
    check_float(x, "x")
    check_last_stride(x, "x")
    slots_of(tiles)
    assert tiles.sorted_ids is not None
    check_device(tiles.ids, x.device, "the alignment", "x")
    if x.ndim != 2 or top_k < 1 or x.shape[0] * top_k != tiles.num_pairs:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and top_k is {top_k}, but the tile list holds {tiles.num_pairs} pairs: needs [M, K] with "
            "M * top_k pairs"
        )
    run = _gather_rows if direct(x, tiles.ids) else gather_rows_op
    out: Tensor = run(x, tiles.sorted_ids, tiles.num_padded, tiles.num_pairs, top_k)
    return out


def layer_slots(w13: object, w2: object, tiles: Alignment, *, plain: bool, ordered: bool) -> tuple[bool, bool]:
    """Whether x should be gathered for GEMM 1, and whether h should be kept in slot order for GEMM 2: (False, False) but for packed
    weights on a device with warpgroup products and as many pairs an expert as blocks of 160 or 256 are for.

    x is bf16. plain: GEMM 1 multiplies it as it is and does not round its result. ordered: nothing between the GEMMs looks at all rows
    of h.
    """
    return plain and _faster(w13, tiles, True), ordered and _faster(w2, tiles, False)


def _faster(w: object, tiles: Alignment, gather: bool) -> bool:
    """Whether the product with w is faster from slots, the gather included where x has to be gathered first."""
    if (
        not isinstance(w, PackedWeight)
        or tiles.sorted_ids is None
        or tiles.block_size not in (SMALL, LARGE)
        or w.shape[-1] % 64
    ):
        return False
    p = w.problem(tiles.num_pairs, w.shape[0])
    bf16 = w.format is not None or w.dtype == torch.bfloat16
    return bf16 and wgmma(w.data.device) and 0 < slots_from(p, gather, tiles.block_size) * p.num_experts <= p.num_pairs
