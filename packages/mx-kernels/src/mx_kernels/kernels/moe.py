"""The launches of an MoE layer, planned once for each number of tokens: ``moe.py`` says what for. Here for packed weights, in
``rebased_moe.py`` for re-based ones.

One workspace holds what passes from step to step (the alignment, h [P, I], y [P, H], partial sums, or x and h with a row a slot), 256
bytes apart; the kernels get addresses. P = T * k pairs.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..align import stays_unsorted
from ..alignment import Alignment
from ..epilogue import Epilogue
from ..grouped_gemm import block_size
from ..packed_gemm import flat_product
from ..slots import layer_slots
from . import align, combine, grouped_gemm, slots
from .chain import Links, chain
from .launch import Launch, compile_together, current_stream, ready

if TYPE_CHECKING:
    from ..moe import PackedLayer, RebasedLayer

GIVEN = ("x", "ids", "weights", "out")


Named = tuple[Launch, tuple[str, ...]]


@dataclass(frozen=True)
class Plan:
    """What a call of the layer does.

    launches: each with the places of its tensors in the list of addresses, which has GIVEN, the layer's tensors, the workspace's parts
    at ``offsets``, sets of counters at ``counts``, and at its end None: ``addresses`` in all. size: of the workspace, in bytes. counters:
    their number, which all are zero before and after. types: of each launch's tensors, where all of them are known.
    """

    launches: tuple[tuple[Launch, tuple[int, ...]], ...]
    offsets: tuple[int, ...]
    size: int
    counters: int
    counts: tuple[int, ...]
    addresses: int
    types: tuple[tuple[torch.dtype | None, ...], ...] = ()

    @functools.cached_property
    def links(self) -> Links | None:
        """The launches, if the driver makes all of them. To be asked when they have been compiled."""
        runs = [run.by_driver for run, _ in self.launches]
        known = [run for run in runs if run is not None]
        return (
            Links(known, [places for _, places in self.launches], self.addresses) if len(known) == len(runs) else None
        )


_PLANS = 4096  # that are remembered
_plans: dict[tuple[object, ...], Plan] = {}


def launch(
    planned: Callable[..., Plan],  # of the layer, x, ids and weights, and of options that it takes
    layer: PackedLayer | RebasedLayer,
    x: Tensor,  # [T, H]
    ids: Tensor,  # [T, k]
    weights: Tensor,  # [T, k]
    *options: object,
) -> Tensor | None:  # [T, H]
    """The layer's result, or None where a kernel is not compiled yet or Triton's dispatch has to see the launch."""
    device = x.device
    key = (layer.key, ids.shape, x.stride(0), x.dtype, *options)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _PLANS:
            _plans.clear()
        plan = _plans[key] = planned(layer, x, ids, weights, *options)
        if plan.types and ready(device):
            compile_together([(run, types) for (run, _), types in zip(plan.launches, plan.types, strict=True)])
    for run, _ in plan.launches:
        if run.compiled is None:
            return None
    if not ready(device):
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # both twice as fast as by torch.empty
    work = x.new_empty(plan.size // x.element_size())
    addresses: list[int | None] = [t.data_ptr() for t in (x, ids, weights, out, *layer.tensors.values())]
    if functools.reduce(operator.or_, addresses) & 15:
        return None
    base = work.data_ptr()
    addresses += [base + offset for offset in plan.offsets]
    if plan.counters:
        base = grouped_gemm.counters(device, plan.counters).data_ptr()
        addresses += [base + offset for offset in plan.counts]
    addresses.append(None)
    stream, links, whole = current_stream(device), plan.links, None
    if links is not None and not torch.cuda.is_current_stream_capturing():
        whole = chain(device.index, stream, links)
    if whole is not None:
        whole(links, addresses)
    else:
        try:
            for run, places in plan.launches:
                run.run(stream, [addresses[i] for i in places])
        except BaseException:  # what some have counted nobody has cleared
            grouped_gemm.forget(device)
            raise
    return out


def plan_of(
    layer: PackedLayer | RebasedLayer,
    launches: list[Named],
    parts: dict[str, int],
    counters: dict[str, int],
    types: dict[str, torch.dtype] | None = None,
) -> Plan:
    """Launches with the names of their tensors, the bytes of the workspace's parts and the numbers of counters, as a plan; a name that is
    nowhere is None. types: of the tensors, where each has one for all launches."""
    ends = [*itertools.accumulate(-(-size // 256) * 256 for size in parts.values())]
    counted = [0, *itertools.accumulate(-(-size // 4) * 4 for size in counters.values())]
    names = (*GIVEN, *layer.tensors, *parts, *counters, "")
    place = {name: i for i, name in enumerate(names)}
    nowhere = len(names) - 1
    return Plan(
        tuple((run, tuple(place.get(name, nowhere) for name in listed)) for run, listed in launches),
        (0, *ends[:-1]),
        ends[-1],
        counted[-1],
        tuple(4 * count for count in counted[:-1]),
        len(names),
        tuple(tuple(types.get(name) for name in listed) for _, listed in launches) if types else (),
    )


def plan(layer: PackedLayer, x: Tensor, ids: Tensor, weights: Tensor) -> Plan:
    """What the five steps would launch, in their order."""
    (tokens, hidden), k, pairs, device, dtype = x.shape, ids.shape[1], ids.numel(), x.device, x.dtype
    w13, w2, expert_map = layer.w13, layer.w2, layer.expert_map
    experts, width = w13.shape[0], w2.shape[2]
    num_global = None if expert_map is None else expert_map.shape[0]
    launches: list[Named] = []
    plain = layer.inputs is None
    rows = block_size(pairs, experts, device, w13, slots=plain and dtype == torch.bfloat16)
    parts = {"h": 0, "y": 0}  # bytes in the workspace, set below
    if stays_unsorted(ids, experts, expert_map, True):
        where = ("", "ids", "ids")
        tiles = Alignment(ids, experts, rows, None, ids.view(-1), ids.view(-1)[:0])
    else:
        where = ("sorted_ids", "expert_ids", "num_padded")
        sort = align.plan(pairs, rows, experts, num_global, device)
        launches += sort.launches
        parts |= {name: 4 * size for name, size in sort.sizes.items()}
        shapes = (torch.empty(sort.sizes[name], dtype=torch.int32, device="meta") for name in where)
        tiles = Alignment(ids, experts, rows, *shapes, expert_map)
    gathered, ordered = layer_slots(w13, w2, tiles, plain=plain, ordered=True)
    capacity = 0 if tiles.sorted_ids is None else tiles.sorted_ids.shape[0]
    source = "x"
    if gathered:
        source = "y"  # the same memory: GEMM 2 writes after GEMM 1 has read
        parts |= {"places": 4 * pairs}
        there = {"out": "y", "scale": "x", "out_scale": "y"}
        for run, names in slots.plan(capacity, hidden, dtype, x.stride(0), False, pairs, k, device):
            launches.append((run, tuple(there.get(name, name) for name in names)))
        x = torch.empty((capacity, hidden), dtype=dtype, device=device)
    h = torch.empty((capacity if ordered else pairs, width), dtype=dtype, device=device)
    parts |= {"h": h.nbytes, "y": (capacity if gathered else pairs) * hidden * x.element_size()}
    first = Epilogue(layer.w13_bias, layer.activation, round_to=layer.inputs)
    one = grouped_gemm.plan_packed(*flat_product(x, w13, tiles, 0 if gathered else k, first, None, dtype, ordered))
    two = grouped_gemm.plan_packed(
        *flat_product(h, w2, tiles, 0 if ordered else 1, Epilogue(layer.w2_bias), weights, dtype)
    )
    led = not gathered and one.leads(two)  # a GEMM 2 that begins writes where gathered rows lie
    runs = (one.counting, two.behind(one.tiles)) if led else (one.launch, two.behind())
    # The alignment's zeros, or counters that the sum clears.
    done = where[1] if not led else "zeros" if where[0] else "done"
    counters = {"done": pairs} if done == "done" else {}
    for product, run, rows_of, w, result in ((one, runs[0], source, "w13", "h"), (two, runs[1], "h", "w2", "y")):
        partial, counter = f"{w}_partial" if product.partial else "", f"{w}_counter" if product.counters else ""
        parts |= {partial: 4 * product.partial} if partial else {}
        counters |= {counter: product.counters} if counter else {}
        names = (
            *(rows_of, w, f"{w}_scale", result, *where, f"{w}_alpha", f"{w}_bias", "weights" if product is two else ""),
            *(partial, counter, done),
        )
        there = {*GIVEN, *layer.tensors, *parts, *counters}
        launches.append((run, tuple(name if name in there else result for name in names)))
    total = combine.plan(tokens, k, hidden, experts, num_global, False, dtype, dtype, device)
    if "done" in counters:
        total = total.having(clears=pairs)
    launches.append((total, ("y", "ids", "expert_map", "", "done" if "done" in counters else "ids", "out")))
    types = dict.fromkeys((*counters, *parts), torch.int32) | {name: t.dtype for name, t in layer.tensors.items()}
    types |= dict.fromkeys(("x", "out", "h", "y"), dtype) | {"ids": ids.dtype, "weights": weights.dtype}
    types |= {w: torch.int32 for w, of in (("w13", w13), ("w2", w2)) if of.format is not None}
    types |= {f"{w}_partial": torch.float32 for w in ("w13", "w2")}
    return plan_of(layer, launches, parts, counters, types)
