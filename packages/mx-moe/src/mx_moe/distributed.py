"""Expert parallelism on torch.distributed: who holds which expert, tokens to the experts and back, and load balancing.

Every rank has its own tokens and a share of the experts. A token travels once to each rank that holds one of its experts, with
its k ids and weights; that rank sums its own experts' part, and the parts of a token are summed at home in float32, in rank
order. E experts (slots), R ranks, T tokens of this rank, k experts a token, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mx_quant import ExpertWeights

from .experts.base import Experts
from .routing import Routing


@dataclass(frozen=True)
class ExpertMap:
    """Consecutive experts for each rank; where E does not divide, the first ranks hold one more.

    Raises ValueError unless 0 <= rank < ranks <= num_experts.
    """

    num_experts: int
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank}, needs 0 to {self.ranks - 1}")
        if self.num_experts < self.ranks:
            raise ValueError(f"{self.num_experts} experts do not give each of {self.ranks} ranks one: use fewer ranks")

    @property
    def counts(self) -> list[int]:
        """Experts of each rank."""
        share, more = divmod(self.num_experts, self.ranks)
        return [share + (r < more) for r in range(self.ranks)]

    @property
    def first(self) -> int:
        """The first expert of this rank."""
        return sum(self.counts[: self.rank])

    @property
    def local(self) -> slice:
        """The experts of this rank: ``weights[map.local]``."""
        return slice(self.first, self.first + self.counts[self.rank])

    def table(self, device: torch.device | str | None = None) -> Tensor:  # [E] int32
        """``expert_map`` of this rank: row of its weights, or -1 for an expert that is elsewhere."""
        e = torch.arange(self.num_experts, dtype=torch.int32, device=device)
        here = (e >= self.first) & (e < self.local.stop)
        return torch.where(here, e - self.first, -1).to(torch.int32)

    def owners(self, device: torch.device | str | None = None) -> Tensor:  # [E] int64
        """The rank of each expert."""
        return torch.repeat_interleave(torch.arange(self.ranks), torch.tensor(self.counts)).to(device or "cpu")


class ExpertParallel:
    """Experts of all ranks behind one call; every rank of the group must call it, also without tokens.

    make(weights, expert_map) builds this rank's experts, for instance::

        ExpertParallel(weights[m.local], m, lambda w, table: make_experts(w, activation, expert_map=table))
    """

    def __init__(
        self,
        weights: ExpertWeights,
        expert_map: ExpertMap,
        make: Callable[[ExpertWeights, Tensor], Experts],
        group: Any = None,
    ) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if (size, rank) != (expert_map.ranks, expert_map.rank):
            raise ValueError(
                f"expert_map is for rank {expert_map.rank} of {expert_map.ranks}, but this process is rank {rank} of {size}"
            )
        here = expert_map.counts[rank]
        if weights.num_experts != here:
            raise ValueError(
                f"rank {rank} holds {here} experts, got weights of {weights.num_experts}: pass weights[expert_map.local]"
            )
        self.map, self.group = expert_map, group
        self.experts = make(weights, expert_map.table(weights.device))
        self.choice = self.experts.choice
        self._owners = expert_map.owners(weights.device)

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:  # x [T, H] -> [T, H]
        """The weighted sum over each token's experts, wherever they are, in x's dtype. Ids are global."""
        e, ids = self.map.num_experts, routing.ids
        known = (ids >= 0) & (ids < e)
        owner = torch.where(known, self._owners[torch.where(known, ids, 0).long()], -1)  # [T, k]
        to = torch.stack([(owner == r).any(dim=1) for r in range(self.map.ranks)])  # [R, T]
        rank, token = to.nonzero(as_tuple=True)
        send = to.sum(dim=1).tolist()
        receive = self._exchange_counts(send, x.device)
        rows_ids = torch.where(owner[token] == rank[:, None], ids[token], -1)
        there = self._exchange(x[token].contiguous(), send, receive)
        there_ids = self._exchange(rows_ids, send, receive)
        there_weights = self._exchange(routing.weights[token], send, receive)
        y = self.experts(there, Routing(there_ids, there_weights))
        back = self._exchange(y, receive, send)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for count in send:  # in rank order, each token at most once: deterministic
            out[token[start : start + count]] += back[start : start + count].float()
            start += count
        return out.to(x.dtype)

    def _exchange_counts(self, send: Sequence[int], device: torch.device) -> list[int]:
        given = torch.tensor(send, dtype=torch.int64, device=device)
        got = torch.empty_like(given)
        dist.all_to_all_single(got, given, group=self.group)
        return got.tolist()

    def _exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return exchange_rows(rows, send, receive, self.group)


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Any = None) -> Tensor:
    """Rows of dimension 0 to every rank and from every rank, in rank order; as bytes, so of any dtype."""
    width = math.prod(rows.shape[1:])
    given = rows.contiguous().view(rows.shape[0], width).view(torch.uint8)
    got = given.new_empty((sum(receive), given.shape[1]))
    dist.all_to_all_single(got, given, list(receive), list(send), group=group)
    return got.view(rows.dtype).view(sum(receive), *rows.shape[1:])


@dataclass(frozen=True)
class Placement:
    """Which expert each slot holds: ``experts[s]`` for the S slots of all ranks, S / R a rank; experts may repeat."""

    experts: tuple[int, ...]
    num_experts: int

    def __post_init__(self) -> None:
        missing = set(range(self.num_experts)) - set(self.experts)
        if missing:
            raise ValueError(f"no slot holds expert {min(missing)}: every expert needs one")

    def slots(self, routing: Routing) -> Routing:
        """Expert ids as slot ids; the tokens of an expert with several slots take them in turn."""
        where: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.experts):
            where[expert].append(slot)
        most = max(len(w) for w in where)
        device = routing.ids.device
        table = torch.tensor([[w[i % len(w)] for i in range(most)] for w in where], dtype=torch.int32, device=device)
        count = torch.tensor([len(w) for w in where], device=device)
        known = (routing.ids >= 0) & (routing.ids < self.num_experts)
        e = torch.where(known, routing.ids, 0).long()
        turn = torch.arange(routing.num_tokens, device=device)[:, None] % count[e]
        return Routing(torch.where(known, table[e, turn], -1).to(torch.int32), routing.weights)


def balance(load: Sequence[float] | Tensor, slots: int, ranks: int) -> Placement:
    """A placement of E experts with that load on ``slots`` slots, slots / ranks on each rank.

    Slots beyond E go to the experts with the most load per slot (no more than one a rank, if they can). Then the heaviest
    slots go first, each to the rank with the least load so far (one without that expert, if it can). Raises ValueError for
    slots < E or not divisible by ranks, and for loads that are negative or not finite.
    """
    values = [float(v) for v in load]
    if any(not 0 <= v < float("inf") for v in values):
        raise ValueError(f"loads are {values[:8]}, need finite numbers of 0 or more")
    if slots < len(values) or slots % ranks:
        raise ValueError(f"slots is {slots}, needs at least the {len(values)} experts and a multiple of {ranks} ranks")
    copies = [1] * len(values)
    for _ in range(slots - len(values)):
        heaviest = max(range(len(values)), key=lambda e: (copies[e] < ranks, values[e] / copies[e], -e))
        copies[heaviest] += 1
    pieces = sorted(((values[e] / copies[e], e) for e in range(len(values)) for _ in range(copies[e])), reverse=True)
    held: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for weight, e in pieces:
        free = [r for r in range(ranks) if len(held[r]) < slots // ranks]
        r = min(free, key=lambda r: (e in held[r], total[r], r))
        held[r].append(e)
        total[r] += weight
    return Placement(tuple(e for rank in held for e in sorted(rank)), len(values))


def rebalance_(
    weights: ExpertWeights, old: Placement, new: Placement, expert_map: ExpertMap, group: Any = None
) -> None:
    """Move experts from placement ``old`` to ``new``, in place: the tensors keep their addresses. Every rank must call it.

    ``expert_map`` is over the slots. A slot is filled from this rank where the expert is here, else from the first rank with it.
    """
    slots = len(old.experts)
    if len(new.experts) != slots or expert_map.num_experts != slots:
        raise ValueError(
            f"old has {slots} slots, new {len(new.experts)} and expert_map {expert_map.num_experts}: all need the same"
        )
    rank_of = expert_map.owners().tolist()
    bounds = [sum(expert_map.counts[:r]) for r in range(expert_map.ranks)]
    send: list[list[int]] = [[] for _ in range(expert_map.ranks)]  # rows of this rank, for each rank
    receive: list[list[int]] = [[] for _ in range(expert_map.ranks)]  # slots of this rank, from each rank
    for slot, e in enumerate(new.experts):
        sources = [s for s, held in enumerate(old.experts) if held == e]
        to = rank_of[slot]
        source = next((s for s in sources if rank_of[s] == to), sources[0])
        if rank_of[source] == expert_map.rank:
            send[to].append(source - bounds[expert_map.rank])
        if to == expert_map.rank:
            receive[rank_of[source]].append(slot - bounds[expert_map.rank])
    given = torch.tensor([row for rows in send for row in rows], dtype=torch.int64, device=weights.device)
    place = torch.tensor([row for rows in receive for row in rows], dtype=torch.int64, device=weights.device)
    order = torch.argsort(place)

    def move(t: Tensor) -> Tensor:
        if t.ndim == 0:
            return t
        bytes_ = t.view(torch.uint8) if t.element_size() == 1 else t
        got = exchange_rows(bytes_[given], [len(r) for r in send], [len(r) for r in receive], group)
        return got[order].view(t.dtype)

    weights.copy_(weights.map(move))
