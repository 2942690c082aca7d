"""Routing: from router logits to the experts of each token and their weights.

    scores = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits))              [T, E] float32
    choose by  scores + correction_bias, outside the best ``top_k_groups`` groups -inf
    weights = scores of the chosen (never the biased ones)                            [T, k]
    renormalize: weights / (sum + 1e-20);  then x scaling_factor, exactly once

T tokens, E routed experts, k experts a token. Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2: sigmoid scores, groups,
correction bias), Mixtral (arXiv 2401.04088, section 2.1: softmax over the chosen logits), OpenAI's gpt-oss model card.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("max", "top2_sum")
EPS = 1e-20


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to, and with what weight.

    ids: [T, k] int32 (int64 is converted), global expert ids; -1, or an id one past the experts, marks a slot to skip.
    weights: [T, k] float32 (other float dtypes are converted).

    Raises TypeError for other dtypes, ValueError for shapes that differ or are not [T, k]. Values are read by ``validate`` only.
    """

    ids: Tensor  # [T, k] int32
    weights: Tensor  # [T, k] float32

    def __post_init__(self) -> None:
        ids, weights = self.ids, self.weights
        if ids.dtype != torch.int32:
            if ids.dtype != torch.int64:
                raise TypeError(f"expert ids are {ids.dtype}, need int32 or int64")
            object.__setattr__(self, "ids", ids.to(torch.int32))
        if weights.dtype != torch.float32:
            if not weights.is_floating_point():
                raise TypeError(f"routing weights are {weights.dtype}, need float32")
            object.__setattr__(self, "weights", weights.float())
        if ids.ndim != 2 or ids.shape != weights.shape:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)} and weights {tuple(weights.shape)}: both need the same shape [T, k]"
            )
        if ids.device != weights.device:
            raise ValueError(f"ids are on {ids.device} and weights on {weights.device}: move both to one device")

    @property
    def top_k(self) -> int:
        """Experts of a token, k."""
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens, T."""
        return self.ids.shape[0]

    def validate(self, num_experts: int) -> None:
        """Raise ValueError, naming the first place, unless every id is in [-1, num_experts] and every weight is finite.

        Reads values, so on an accelerator it waits for the device: for tests and debugging, not for a forward.
        """
        if self.ids.numel() == 0:
            return
        bad = (self.ids < -1) | (self.ids > num_experts)
        if bool(bad.any()):
            t, slot = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"expert id {int(self.ids[t, slot])} at token {t}, slot {slot}: needs 0 to {num_experts - 1} "
                f"(-1 or {num_experts} to skip the slot)"
            )
        bad = ~torch.isfinite(self.weights)
        if bool(bad.any()):
            t, slot = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"routing weight {float(self.weights[t, slot])} at token {t}, slot {slot}: needs a finite number; "
                "check the router's logits for NaN and Inf"
            )


@dataclass(frozen=True, eq=False)
class Router:
    """How experts are chosen, as data; calling it on logits [T, E] gives a Routing.

    top_k: experts of a token. score: "softmax", "sigmoid" or "sqrt_softplus" of the logits.
    softmax_over: "all" experts, or the "selected" ones (gpt-oss; the same as "all" with ``renormalize``).
    renormalize: divide the weights by their sum (+ 1e-20). scaling_factor: multiplies the weights afterwards.
    num_groups, top_k_groups: the E experts form ``num_groups`` equal groups of neighbours; only the experts of the best
        ``top_k_groups`` groups can be chosen. group_score: a group's "max" score or the sum of its two best ("top2_sum").
    correction_bias: [E], added to the scores for the choice of groups and experts, never to the weights.
    shared_experts: that many experts more, ids E .. E + n - 1, go to every token with ``shared_weight``; they are appended
        after renormalization and scaling.

    Raises ValueError for contradictory settings at construction.
    """

    top_k: int
    score: str = "softmax"
    softmax_over: str = "all"
    renormalize: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "max"
    correction_bias: Tensor | None = None  # [E]
    shared_experts: int = 0
    shared_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, needs at least 1")
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}; there are {', '.join(SCORES)}")
        if self.softmax_over not in ("all", "selected"):
            raise ValueError(f"softmax_over is {self.softmax_over!r}, needs 'all' or 'selected'")
        if self.softmax_over == "selected" and (self.score != "softmax" or self.correction_bias is not None):
            raise ValueError(
                "softmax_over='selected' chooses by the logits themselves: it needs score='softmax' and no correction_bias"
            )
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"unknown group_score {self.group_score!r}; there are {', '.join(GROUP_SCORES)}")
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise ValueError(f"top_k_groups is {self.top_k_groups}, needs 1 to num_groups = {self.num_groups}")
        if self.num_groups > 1 and self.group_score == "top2_sum" and self.correction_bias is None:
            raise ValueError(
                "group_score 'top2_sum' sums biased scores, but correction_bias is missing: pass the checkpoint's "
                "e_score_correction_bias, or zeros if it has none"
            )
        if self.shared_experts < 0:
            raise ValueError(f"shared_experts is {self.shared_experts}, needs 0 or more")

    def __call__(self, logits: Tensor) -> Routing:  # [T, E] -> ids, weights [T, top_k + shared_experts]
        """The experts of each token, best first.

        Raises TypeError for logits that are not floating point, ValueError for shapes that do not fit the settings.
        """
        self._check(logits)
        x = logits.float()
        if self.softmax_over == "selected":
            best, ids = self._choose(x)
            weights = torch.softmax(best, dim=-1)
        else:
            scores = self._scores(x)
            biased = scores if self.correction_bias is None else scores + self.correction_bias.float()
            _, ids = self._choose(biased)
            weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
        if self.scaling_factor != 1.0:
            weights = weights * self.scaling_factor
        ids = ids.to(torch.int32)
        if self.shared_experts:
            ids, weights = self._append_shared(ids, weights, logits.shape[1])
        return Routing(ids, weights)

    def _check(self, logits: Tensor) -> None:
        if not logits.is_floating_point():
            raise TypeError(f"router logits are {logits.dtype}, need a floating-point dtype")
        if logits.ndim != 2:
            raise ValueError(
                f"router logits have shape {tuple(logits.shape)}, need [T, E]: flatten batch and sequence first"
            )
        experts = logits.shape[1]
        if experts % self.num_groups:
            raise ValueError(f"{experts} experts do not divide into num_groups = {self.num_groups} equal groups")
        size = experts // self.num_groups
        if self.top_k > size * self.top_k_groups:
            where = f"{experts} experts" if self.num_groups == 1 else f"{self.top_k_groups} groups of {size} experts"
            raise ValueError(f"top_k is {self.top_k}, but there are only {where} to choose from")
        if self.num_groups > 1 and self.group_score == "top2_sum" and size < 2:
            raise ValueError(f"group_score 'top2_sum' needs groups of at least 2 experts, these have {size}")
        bias = self.correction_bias
        if bias is not None:
            if tuple(bias.shape) != (experts,):
                raise ValueError(f"correction_bias has shape {tuple(bias.shape)}, needs [{experts}], one per expert")
            if bias.device != logits.device:
                raise ValueError(
                    f"correction_bias is on {bias.device} and logits on {logits.device}: move both to one device"
                )

    def _scores(self, x: Tensor) -> Tensor:  # [T, E]
        if self.score == "softmax":
            return torch.softmax(x, dim=-1)
        if self.score == "sigmoid":
            return torch.sigmoid(x)
        return torch.nn.functional.softplus(x).sqrt()

    def _choose(self, biased: Tensor) -> tuple[Tensor, Tensor]:  # [T, E] -> values, ids [T, k]
        if self.num_groups > 1:
            groups = biased.unflatten(1, (self.num_groups, -1))  # [T, G, E/G]
            if self.group_score == "max":
                group_scores = groups.amax(dim=-1)
            else:
                group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
            best = group_scores.topk(self.top_k_groups, dim=-1).indices
            kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
            biased = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        values, ids = biased.topk(self.top_k, dim=-1)
        return values, ids

    def _append_shared(self, ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:  # [T, k]
        t, n = ids.shape[0], self.shared_experts
        extra = torch.arange(experts, experts + n, dtype=torch.int32, device=ids.device)
        ids = torch.cat((ids, extra.expand(t, n)), dim=1)
        return ids, torch.cat((weights, weights.new_full((t, n), self.shared_weight)), dim=1)
