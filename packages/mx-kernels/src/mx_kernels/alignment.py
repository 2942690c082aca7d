"""Alignment: routed pairs grouped into blocks of one expert each, as ``grouped_gemm`` walks them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def capacity(pairs: int, block_size: int, num_experts: int) -> int:
    """Slots that always suffice for ``pairs`` pairs, in whole blocks: known on the host, whatever the routing is.

    pairs + E * (block_size - 1), rounded up; with fewer pairs than experts no more than one block a pair.
    """
    slots = -(-(pairs + num_experts * (block_size - 1)) // block_size) * block_size
    return min(slots, pairs * block_size) if pairs < num_experts else slots


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pairs p = token * k + slot, T * k of them, sorted by expert and padded to whole blocks.

    ids: [T, k] int32 as routed (global expert ids). num_experts: E, the experts that the weights have.
    sorted_ids: [capacity] int32. Slots [0, num_padded) hold each pair that is not dropped once, in a block of its expert;
        T * k marks padding. None: no sorting was needed, and block b is pair b alone.
    expert_ids: int32, the expert (a row of the weights) of each block; -1 past ``num_padded``, and -1 (on a GPU also any id
        outside [0, E)) for a dropped pair where ``sorted_ids`` is None.
    num_padded: [1] int32, slots in use; empty where ``sorted_ids`` is None: there every block is in use.
    expert_map: [E_global] int32, row of the weights or -1 for an expert that is not here; None: ids are rows.
    """

    ids: Tensor
    num_experts: int
    block_size: int
    sorted_ids: Tensor | None
    expert_ids: Tensor
    num_padded: Tensor
    expert_map: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """T * k."""
        return self.ids.numel()

    @property
    def top_k(self) -> int:
        """k, experts a token."""
        return self.ids.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.ids.device
