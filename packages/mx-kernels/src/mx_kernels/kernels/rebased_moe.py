"""The launches of an MoE layer on re-based weights, planned once for each number of tokens; ``moe.py`` makes them.

    align; x's rows to codes, a row a slot; GEMM 1 to MXFP8; its rows to codes; GEMM 2 to pairs; combine

What lives at different times shares a part of the workspace: x's codes lie where y will, and those of tokens that are re-based once
each and copied where GEMM 1 will put h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import flat_activation
from ..rebase import rebased_block_size
from . import align, combine, rebased, slots
from .moe import GIVEN, Named, Plan, plan_of

if TYPE_CHECKING:
    from ..moe import RebasedLayer


def plan(layer: RebasedLayer, x: Tensor, ids: Tensor, weights: Tensor, promote: bool) -> Plan:
    """What the five steps would launch, in their order."""
    (tokens, hidden), k, pairs, device, dtype = x.shape, ids.shape[1], ids.numel(), x.device, x.dtype
    experts, width, wgmma = layer.w13.shape[0], layer.w2.shape[2], rebased.target(device).wgmma
    num_global = None if layer.expert_map is None else layer.expert_map.shape[0]
    block = rebased_block_size(pairs, layer.w13, promote)
    sort = align.plan(pairs, block, experts, num_global, device)
    capacity = sort.sizes["sorted_ids"]
    launches: list[Named] = [*sort.launches]
    parts = {name: 4 * size for name, size in sort.sizes.items()}
    parts |= {"h": capacity * width, "h_scale": capacity * width // 32}
    parts |= {"codes": capacity * width, "scale": 4 * capacity}  # of h, and one a row of x's and then of these
    parts |= {"y": max(capacity * hidden, pairs * hidden * dtype.itemsize)}
    listed = ("sorted_ids", "num_padded")
    if rebased.copies(pairs, hidden, k):
        parts |= {"h": max(parts["h"], tokens * hidden), "once": 4 * tokens}
        rows = rebased.plan_rows(tokens, hidden, dtype, x.stride(0), False, None, 0, device)
        parts |= {"places": 4 * pairs}
        launches.append((rows, ("x", "h", "h", "once", "once", "once")))
        there = {"x": "h", "out": "y", "scale": "once", "out_scale": "scale"}
        for run, names in slots.plan(capacity, hidden // 4, torch.int32, hidden // 4, True, pairs, k, device):
            launches.append((run, tuple(there.get(name, name) for name in names)))
    else:
        rows = rebased.plan_rows(capacity, hidden, dtype, x.stride(0), False, pairs, k, device)
        launches.append((rows, ("x", "y", "y", "scale", *listed)))
    counters = 0
    for name, w, bias, act, source, result in (
        ("w13", layer.w13, layer.w13_bias, layer.activation, "y", "h"),
        ("w2", layer.w2, layer.w2_bias, None, "codes", "y"),
    ):
        one = act is not None
        kind, _, _, alpha, beta, limit = flat_activation(act)
        product = rebased.plan_product(
            *(capacity, w.shape[2], experts, w.shape[1], w.octaves is not None, block, pairs),
            *(None if bias is None else bias.dtype, not one, not one, kind, alpha, beta, limit, promote, one),
            *(torch.bfloat16 if one else dtype, device, wgmma, ()),
        )
        partial = f"{name}_partial" if product.partial else ""
        parts |= {partial: 4 * product.partial} if partial else {}
        octaves = f"{name}_octaves" if w.octaves is not None else name
        names = (source, name, octaves, "scale", f"{name}_scale", result, "h_scale" if one else "")
        names += ("sorted_ids", "expert_ids", "num_padded", f"{name}_bias", "" if one else "weights")
        names += (partial, "counters" if partial else "")
        there = {*GIVEN, *layer.tensors, *parts, "counters"}
        names = tuple(n if n in there else result for n in names)
        launches.append((product.behind, names))
        counters = max(counters, product.counters)
        if one:
            rows = rebased.plan_rows(capacity, width, torch.uint8, width, True, pairs, 0, device)
            launches.append((rows, ("h", "h_scale", "codes", "scale", *listed)))
    total = combine.plan(tokens, k, hidden, experts, num_global, False, dtype, dtype, device)
    launches.append((total, ("y", "ids", "expert_map", "", "ids", "out")))
    return plan_of(layer, launches, parts, {"counters": counters} if counters else {})
