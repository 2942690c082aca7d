"""The alignment kernels return the reference's tensors (pairs stay in order inside an expert), whatever the routing.

On a GPU, and for fewer sizes on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk
from mx_kernels.reference.moe import aligned


@pytest.fixture(autouse=True)
def _on_the_device(request):
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.use_deterministic_algorithms(False)
    with torch.device("cuda"):
        yield


def align(ids, block, experts, expert_map=None):
    from mx_kernels.kernels import align

    return align.moe_align_block_size(ids, block, experts, expert_map)


def check(ids, block, experts, expert_map=None):
    got, want = align(ids, block, experts, expert_map), aligned(ids, block, experts, expert_map)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a, b)


def routing(tokens, top_k, experts, kind="uniform"):
    if kind == "uniform":
        return torch.rand(tokens, experts).topk(min(top_k, experts)).indices.int()
    if kind == "one":
        return torch.full((tokens, top_k), experts - 1, dtype=torch.int32)
    ids = (torch.rand(tokens, top_k) ** 6 * (experts + 2)).int() - 1  # skewed, with both sentinels
    return ids


def clears(tokens):
    """A zero for each block, and nothing behind, where kernels that start early count."""
    from mx_kernels.kernels import align

    p = align.plan(tokens * 4, 16, 60, None, torch.device("cpu"))
    tensors = {"ids": routing(tokens, 4, 60), "expert_map": None}
    tensors |= {name: torch.empty(size, dtype=torch.int32) for name, size in p.sizes.items()}
    blocks = p.sizes["expert_ids"]
    zeros = torch.full((blocks + 1,), 7, dtype=torch.int32)
    for launch, names in p.launches:
        given = [tensors[name] for name in names]
        if "sorted_ids" in names:
            launch, given[names.index("sorted_ids") - 1] = launch.having(ZEROS=True), zeros
        launch(*given)
    assert zeros.tolist() == [0] * blocks + [7]
    for got, want in zip(
        ("sorted_ids", "expert_ids", "num_padded"), aligned(tensors["ids"], 16, 60, None), strict=True
    ):
        assert torch.equal(tensors[got], want)


INTERPRETED = """
import torch
import test_kernels_align as t
from mx_kernels.kernels import align

for experts, kind in ((1, "one"), (8, "uniform"), (60, "skewed"), (128, "uniform")):
    for tokens in (0, 1, 127, 700):  # one launch up to 512 tokens, then two
        t.check(t.routing(tokens, 4, experts, kind), 64, experts)
t.check(t.routing(1100, 4, 33, "skewed"), 16, 33)
expert_map = torch.arange(40).int() - 8
for tokens in (5, 700):
    t.check(torch.randint(-2, 43, (tokens, 6)).int(), 32, 32, expert_map.clamp(min=-1))
align.plan.cache_clear()
t.check(t.routing(700, 4, 128, "uniform"), 64, 128)
t.check(t.routing(1100, 4, 60, "skewed"), 128, 60)
t.check(t.routing(700, 4, 60, "skewed"), 160, 60)
for tokens in (5, 300, 5000):
    t.clears(tokens)
print("right")
"""


@pytest.mark.compile
def test_kernels_in_the_interpreter(interpreted):
    interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "one", "skewed"])
@pytest.mark.parametrize("block", [16, 64, 128, 160])
@pytest.mark.parametrize("experts", [1, 8, 60, 128, 512])
def test_every_size(experts, block, kind):
    for tokens in (0, 1, 3, 17, 64, 127, 1024, 2049):
        check(routing(tokens, 4, experts, kind), block, experts)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(16384, 8, 128), (131072, 8, 512), (1048576, 1, 512), (4097, 4, 33)]
)
def test_many_pairs(tokens, top_k, experts):
    check(routing(tokens, top_k, experts, "skewed"), 64, experts)
    check(routing(tokens, top_k, experts, "one"), 16, experts)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 300, 9000])
def test_expert_map(tokens):
    total, local = 256, 100
    expert_map = torch.full((total,), -1, dtype=torch.int32)
    expert_map[torch.randperm(total)[:local]] = torch.randperm(local).int()
    ids = torch.randint(-2, total + 3, (tokens, 6)).int()
    check(ids, 32, local, expert_map)
    check(ids, 32, local, torch.full_like(expert_map, -1))


@pytest.mark.gpu
def test_the_public_function_sorts_and_skips():
    ids = routing(512, 8, 128)
    tiles = mk.moe_align_block_size(ids, 64, 128)
    assert torch.equal(tiles.sorted_ids, aligned(ids, 64, 128, None)[0])
    assert mk.moe_align_block_size(ids[:8], 16, 128).sorted_ids is None


@pytest.mark.gpu
def test_same_bits_each_time():
    ids = routing(20000, 8, 256, "skewed")
    first = align(ids, 64, 256)
    for _ in range(20):
        for a, b in zip(align(ids, 64, 256), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 4096])
def test_cuda_graph(tokens):
    ids = routing(tokens, 8, 128)
    align(ids, 64, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tiles = mk.moe_align_block_size(ids, 64, 128)
    for kind in ("skewed", "one", "uniform"):
        ids.copy_(routing(tokens, 8, 128, kind))
        graph.replay()
        want = aligned(ids, 64, 128, None)
        assert torch.equal(tiles.sorted_ids, want[0])
        assert torch.equal(tiles.expert_ids, want[1])
        assert torch.equal(tiles.num_padded, want[2])


@pytest.mark.gpu
def test_compiles_without_a_graph_break_and_opcheck():
    ids = routing(300, 4, 64)
    step = torch.compile(lambda ids: mk.moe_align_block_size(ids, 32, 64).sorted_ids, fullgraph=True)
    assert torch.equal(step(ids), aligned(ids, 32, 64, None)[0])
    torch.library.opcheck(torch.ops.mx_kernels.moe_align_block_size.default, (ids, 32, 64, None))
