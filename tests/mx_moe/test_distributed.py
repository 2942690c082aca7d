"""Expert parallelism with gloo processes on the CPU against one process, in float32; placements as pure functions."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
import mx_quant as mq
from mx_moe import ExpertMap, ExpertParallel, Placement, Router, Routing, balance, make_experts, rebalance_

SILU = mk.Activation("silu")
E, H, I, TOKENS = 7, 64, 32, (5, 0, 9, 3)


def test_remainder_experts_go_to_the_first_ranks() -> None:
    maps = [ExpertMap(7, 3, r) for r in range(3)]
    assert maps[0].counts == [3, 2, 2]
    assert [m.local for m in maps] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert maps[1].table().tolist() == [-1, -1, -1, 0, 1, -1, -1]
    assert maps[0].owners().tolist() == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="rank is 3, needs 0 to 2"):
        ExpertMap(7, 3, 3)
    with pytest.raises(ValueError, match="2 experts do not give each of 3 ranks one"):
        ExpertMap(2, 3, 0)


@pytest.mark.filterwarnings("ignore:emulated experts")
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_parts_of_all_ranks_add_up(oracle, ranks: int) -> None:
    """Each rank with its share and its map, all tokens: absent experts add nothing, and the parts sum to the whole."""
    case = oracle.layer(experts=E, hidden=H, intermediate=I)
    total = torch.zeros(case.x.shape, dtype=torch.float64)
    for r in range(ranks):
        m = ExpertMap(E, ranks, r)
        part = make_experts(case.weights[m.local], SILU, expert_map=m.table(), dtype=torch.float32)
        total += part(case.x, case.routing).double()
    want = oracle.dense(case.x, case.routing, case.weights, SILU)
    assert oracle.relative(total, want) <= 2e-6


def weights_and_tokens(ranks: int, format: str):
    g = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(E, 2 * I, H, generator=g) * 0.2, torch.randn(E, H, I, generator=g) * 0.2
    weights = mq.quantize_experts(w13, w2, format, w13_bias=torch.randn(E, 2 * I, generator=g))
    tokens = TOKENS[:ranks]
    x = torch.randn(sum(tokens), H, generator=g)
    routing = Router(2, renormalize=True)(torch.randn(sum(tokens), E, generator=g))
    routing.ids[0, 1] = -1  # a dropped slot
    return weights, x, routing, tokens


def worker(rank: int, ranks: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        for format in ("mxfp8", "nvfp4"):
            check_dispatch(rank, ranks, format)
        check_rebalance(rank, ranks)
        check_errors(rank, ranks)
        torch.save(True, os.path.join(folder, f"{rank}.ok"))
    finally:
        dist.destroy_process_group()


def check_dispatch(rank: int, ranks: int, format: str) -> None:
    weights, x, routing, tokens = weights_and_tokens(ranks, format)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    m = ExpertMap(E, ranks, rank)
    parallel = ExpertParallel(weights[m.local], m, lambda w, t: make_experts(w, SILU, expert_map=t))
    got = parallel(x[mine], Routing(routing.ids[mine], routing.weights[mine]))
    want = make_experts(weights, SILU)(x, routing)[mine]
    # float32: the k parts of a token are summed rank by rank instead of slot by slot
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert parallel.choice.name == "emulation"


def check_rebalance(rank: int, ranks: int) -> None:
    """Redundant experts: the same result before and after they move, and the tensors keep their memory."""
    weights, x, routing, _ = weights_and_tokens(ranks, "mxfp4")
    slots = -(-(E + 2) // ranks) * ranks
    old = balance([1.0] * E, slots, ranks)
    new = balance([9.0, 1, 1, 5, 1, 1, 7], slots, ranks)
    m = ExpertMap(slots, ranks, rank)
    held = weights.permute(list(old.experts))[m.local].map(lambda t: t.clone())
    want = make_experts(weights, SILU)(x, routing)
    where = held.w13.data.data_ptr()
    for placement in (old, new):
        if placement is new:
            rebalance_(held, old, new, m)
        mine = weights.permute(list(placement.experts))[m.local]
        assert torch.equal(held.w13.data, mine.w13.data)
        assert torch.equal(held.w2.scale, mine.w2.scale)
        assert torch.equal(held.w13_bias, mine.w13_bias)
        parallel = ExpertParallel(held, m, lambda w, t: make_experts(w, SILU, expert_map=t))
        got = parallel(x, placement.slots(routing))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert held.w13.data.data_ptr() == where


def check_errors(rank: int, ranks: int) -> None:
    weights = weights_and_tokens(ranks, "mxfp8")[0]
    make = lambda w, t: make_experts(w, SILU, expert_map=t)  # noqa: E731
    with pytest.raises(ValueError, match="but this process is rank"):
        ExpertParallel(weights, ExpertMap(E, ranks + 1, rank), make)
    with pytest.raises(ValueError, match="pass weights"):
        ExpertParallel(weights, ExpertMap(E, ranks, rank), make)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes(ranks: int, tmp_path) -> None:
    mp.start_processes(worker, args=(ranks, str(tmp_path)), nprocs=ranks, start_method="fork")
    assert all((tmp_path / f"{r}.ok").exists() for r in range(ranks))


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(0, 12), st.sampled_from([1, 2, 4]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_balance(load: list[float], redundant: int, ranks: int) -> None:
    """Every expert has a slot, copies go to heavy experts, and no rank exceeds the mean by more than its heaviest slot."""
    slots = -(-(len(load) + redundant) // ranks) * ranks
    placement = balance(load, slots, ranks)
    assert len(placement.experts) == slots
    copies = [placement.experts.count(e) for e in range(len(load))]
    assert min(copies) >= 1
    for e in range(len(load)):
        for other in range(len(load)):
            if (
                1 < copies[e] <= ranks and copies[other] < ranks
            ):  # the last copy went to e because no other expert had more load per slot
                assert load[other] / copies[other] <= load[e] / (copies[e] - 1) * (1 + 1e-9)
    share = [load[e] / copies[e] for e in placement.experts]
    per = slots // ranks
    totals = [sum(share[r * per : (r + 1) * per]) for r in range(ranks)]
    assert sum(totals) == pytest.approx(sum(load))


def test_balance_evens_out_a_skewed_load() -> None:
    load = [100.0, 1, 1, 1, 1, 1, 1, 1]
    before, after = balance(load, 8, 4), balance(load, 12, 4)

    def worst(p: Placement) -> float:
        per = len(p.experts) // 4
        return max(sum(load[e] / p.experts.count(e) for e in p.experts[r * per : (r + 1) * per]) for r in range(4))

    assert worst(before) == 101.0
    assert worst(after) < 30
    holders = {s // 3 for s, e in enumerate(after.experts) if e == 0}
    assert len(holders) == 4  # copies of one expert are on different ranks


def test_slots_take_turns() -> None:
    placement = Placement((0, 1, 0, 2), 3)
    routing = Routing(torch.tensor([[0, 1], [0, 2], [0, -1], [3, 0]]), torch.ones(4, 2))
    got = placement.slots(routing)
    assert got.ids.tolist() == [[0, 1], [2, 3], [0, -1], [-1, 2]]
    assert got.weights is routing.weights


def test_placement_errors() -> None:
    with pytest.raises(ValueError, match="no slot holds expert 1"):
        Placement((0, 0), 2)
    with pytest.raises(ValueError, match="slots is 3, needs at least the 4 experts"):
        balance([1.0] * 4, 3, 1)
    with pytest.raises(ValueError, match="a multiple of 2 ranks"):
        balance([1.0] * 4, 5, 2)
    with pytest.raises(ValueError, match="loads are"):
        balance([1.0, -1.0], 2, 1)
    weights = mq.ExpertWeights(torch.zeros(4, 2 * I, H), torch.zeros(4, H, I))
    with pytest.raises(ValueError, match="all need the same"):
        rebalance_(weights, balance([1.0] * 4, 4, 1), balance([1.0] * 4, 5, 1), ExpertMap(4, 1, 0))
