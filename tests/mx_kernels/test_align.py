"""moe_align_block_size: every kept pair once, in a block of its expert; dropped pairs nowhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_kernels.alignment import capacity

OPS = torch.ops.mx_kernels


def check(tiles: mk.Alignment, expected: dict[int, int]) -> None:
    """Walk the blocks in plain Python: exactly the pairs of ``expected`` (pair -> expert), each once."""
    pairs, seen = tiles.ids.numel(), {}
    if tiles.sorted_ids is None:
        assert tiles.expert_ids.shape == (pairs,)
        assert tiles.num_padded.numel() == 0
        seen = {p: e for p, e in enumerate(tiles.expert_ids.tolist()) if e >= 0}
        assert seen == expected
        return
    block, slots = tiles.block_size, tiles.sorted_ids.tolist()
    used = int(tiles.num_padded)
    assert len(slots) % block == 0
    assert used % block == 0
    assert used <= len(slots)
    assert len(tiles.expert_ids) == len(slots) // block
    for b, expert in enumerate(tiles.expert_ids.tolist()):
        rows = slots[b * block : (b + 1) * block]
        if b * block >= used:
            assert expert == -1
            assert rows == [pairs] * block
            continue
        assert 0 <= expert < tiles.num_experts
        live = [p for p in rows if p != pairs]
        assert live, "a block in use has at least one pair"
        for p in live:
            assert p not in seen
            seen[p] = expert
    assert seen == expected
    counts = [list(expected.values()).count(e) for e in range(tiles.num_experts)]
    assert used == sum(-(-c // block) * block for c in counts)


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 40))
    tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, 6))
    total = draw(st.integers(1, 60)) if draw(st.booleans()) else None
    limit = experts if total is None else total
    ids = draw(st.lists(st.integers(-2, limit), min_size=tokens * k, max_size=tokens * k))
    table = None if total is None else draw(st.lists(st.integers(-1, experts - 1), min_size=total, max_size=total))
    block = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 96, 160]))
    return experts, torch.tensor(ids, dtype=torch.int64).view(tokens, k), table, block


@settings(max_examples=150, deadline=None)
@given(routings(), st.booleans())
def test_every_pair_once(routing, narrow):
    experts, ids, table, block = routing
    expert_map = None if table is None else torch.tensor(table, dtype=torch.int32)
    expected = {}
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < (experts if table is None else len(table)):
            local = e if table is None else table[e]
            if local >= 0:
                expected[p] = local
    before = ids.clone()
    tiles = mk.moe_align_block_size(ids.int() if narrow else ids, block, experts, expert_map)
    assert torch.equal(ids, before)
    assert tiles.ids.dtype == torch.int32
    assert (tiles.sorted_ids is None) == (table is None and ids.numel() * 4 <= experts)
    check(tiles, expected)
    sorted_ids, expert_ids, num_padded = OPS.moe_align_block_size(ids.int(), block, experts, expert_map)
    check(mk.Alignment(tiles.ids, experts, block, sorted_ids, expert_ids, num_padded, expert_map), expected)
    assert len(sorted_ids) == capacity(ids.numel(), block, experts)


def test_capacity():
    assert capacity(100, 16, 8) == 224  # 100 + 8 * 15 = 220, in whole blocks of 16
    assert capacity(3, 16, 8) == 48  # fewer pairs than experts: a block a pair
    assert capacity(7, 1, 8) == 7
    assert capacity(0, 64, 8) == 0
    for pairs in (1, 7, 8, 9, 100):  # it holds the worst routings
        for block in (1, 4, 16):
            spread = torch.arange(pairs).view(-1, 1) % 8
            for ids in (spread, torch.zeros_like(spread), spread % 3):
                counts = torch.bincount(ids.flatten(), minlength=8)
                assert int(((counts + block - 1) // block * block).sum()) <= capacity(pairs, block, 8)


def test_order_within_an_expert():
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]])
    tiles = mk.moe_align_block_size(ids, 4, 3)
    assert tiles.sorted_ids.tolist() == [1, 2, 6, 6, 5, 6, 6, 6, 0, 3, 4, 6, 6, 6, 6, 6]
    assert tiles.expert_ids.tolist() == [0, 1, 2, -1]
    assert tiles.num_padded.tolist() == [12]
    assert (tiles.num_pairs, tiles.top_k, tiles.device) == (6, 2, ids.device)


def test_all_tokens_to_one_expert_and_large():
    ids = torch.full((4096, 4), 3, dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 64, 512)
    assert int(tiles.num_padded) == 4096 * 4
    assert tiles.expert_ids[: 4096 * 4 // 64].eq(3).all()
    assert tiles.expert_ids[4096 * 4 // 64 :].eq(-1).all()
    assert torch.equal(tiles.sorted_ids[: 4096 * 4], torch.arange(4096 * 4, dtype=torch.int32))


def test_every_pair_dropped():
    for ids in (torch.full((5, 2), -1), torch.full((5, 2), 4)):
        tiles = mk.moe_align_block_size(ids, 16, 4)
        assert int(tiles.num_padded) == 0
        check(tiles, {})
    everything_elsewhere = torch.full((4,), -1, dtype=torch.int32)
    check(mk.moe_align_block_size(torch.tensor([[0, 3]]), 16, 4, everything_elsewhere), {})


@pytest.mark.parametrize(
    ("ids", "kwargs", "error", "message"),
    [
        (torch.zeros(2, 2), {}, TypeError, "ids is torch.float32"),
        (torch.zeros(4, dtype=torch.int32), {}, ValueError, r"ids has shape \(4,\)"),
        (torch.tensor([[0, 1], [5, 0]]), {}, ValueError, r"ids\[1, 0\] is 5, but there are 4 experts"),
        (torch.tensor([[0], [2**40]]), {}, ValueError, r"ids\[1, 0\]"),
        (torch.tensor([[0, 9]]), {"num_experts": 8}, ValueError, r"ids\[0, 1\] is 9, but there are 8"),
        (torch.zeros(2, 2, dtype=torch.int32), {"block_size": 24}, ValueError, "block_size is 24"),
        (torch.zeros(2, 2, dtype=torch.int32), {"block_size": 0}, ValueError, "block_size is 0"),
        (torch.zeros(2, 2, dtype=torch.int32), {"num_experts": 0}, ValueError, "num_experts is 0"),
        (torch.zeros(2, 2, dtype=torch.int32), {"expert_map": torch.zeros(4)}, TypeError, "expert_map is"),
        (
            torch.zeros(2, 2, dtype=torch.int32),
            {"expert_map": torch.zeros(2, 2, dtype=torch.int32)},
            ValueError,
            "expert_map has shape",
        ),
        (
            torch.zeros(2, 2, dtype=torch.int32),
            {"expert_map": torch.tensor([0, 4], dtype=torch.int32)},
            ValueError,
            r"expert_map\[1\] is 4",
        ),
        (
            torch.zeros(2, 2, dtype=torch.int32),
            {"expert_map": torch.zeros(4, dtype=torch.int32, device="meta")},
            ValueError,
            "expert_map is on meta",
        ),
        (torch.empty((2**20, 2**11), dtype=torch.int32, device="meta"), {}, ValueError, "split the batch"),
    ],
)
def test_refused(ids, kwargs, error, message):
    with pytest.raises(error, match=message):
        mk.moe_align_block_size(ids, **{"block_size": 16, "num_experts": 4, **kwargs})


def test_op():
    ids = torch.randint(-1, 9, (13, 3), dtype=torch.int32)
    table = torch.tensor([0, -1, 1, 2, -1, 3, 3, 0], dtype=torch.int32)
    torch.library.opcheck(OPS.moe_align_block_size.default, (ids, 16, 4, table))
    torch.library.opcheck(OPS.moe_align_block_size.default, (ids[:0], 16, 8, None))
    torch.library.opcheck(OPS.expert_of_pair.default, (ids, 8))


def test_meta():
    tiles = mk.moe_align_block_size(torch.empty((7, 2), dtype=torch.int32, device="meta"), 16, 4)
    assert tiles.sorted_ids.shape == (capacity(14, 16, 4),)
    assert tiles.num_padded.shape == (1,)
    tiles = mk.moe_align_block_size(torch.empty((1, 2), dtype=torch.int32, device="meta"), 16, 64)
    assert tiles.sorted_ids is None
    assert tiles.expert_ids.shape == (2,)


@pytest.mark.parametrize("experts", [4, 64])
def test_compiles(experts):
    def f(ids):
        tiles = mk.moe_align_block_size(ids, 16, experts)
        return tiles.expert_ids, tiles.num_padded, tiles.ids if tiles.sorted_ids is None else tiles.sorted_ids

    ids = torch.randint(0, 4, (5, 2))
    for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(ids), f(ids), strict=True):
        assert torch.equal(a, b)


def test_matches_reference():
    ids = torch.randint(-1, 33, (50, 4))
    a, b = mk.moe_align_block_size(ids, 16, 32), mk.reference.moe_align_block_size(ids, 16, 32)
    for name in ("ids", "sorted_ids", "expert_ids", "num_padded"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    a, b = mk.moe_align_block_size(ids[:2], 16, 32), mk.reference.moe_align_block_size(ids[:2], 16, 32)
    assert a.sorted_ids is None
    assert b.sorted_ids is None
    assert torch.equal(a.expert_ids, b.expert_ids)
