"""The combine kernel returns the reference's bits and never reads a dropped row."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk
from mx_kernels.reference.moe import combined, local_experts

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.use_deterministic_algorithms(False)
    with torch.device("cuda"):
        yield


def combine(*args):
    from mx_kernels.kernels import combine

    return combine.combine(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 300, 5000])
def test_bits(tokens, dtype):
    for k, width in ((1, 64), (4, 2880), (8, 2048), (3, 77)):
        ids = torch.randint(-1, 65, (tokens, k)).int()
        expert_map = torch.randint(-1, 16, (64,)).int()
        y = torch.randn(tokens * k, width).to(dtype)
        weights = torch.rand(tokens, k)
        for mapping, experts in ((None, 64), (expert_map, 16)):
            y[local_experts(ids, experts, mapping) < 0] = torch.nan
            for w in (None, weights):
                for out in DTYPES:
                    args = (y, ids, experts, mapping, w, out)
                    assert torch.equal(combine(*args), combined(*args))


@pytest.mark.parametrize("clears", [0, 1, 40, 64, 200])
def test_clears_counts(clears):
    from mx_kernels.kernels import combine

    ids, y = torch.randint(0, 8, (50, 4)).int(), torch.randn(200, 96)
    done, out = torch.full((201,), 7, dtype=torch.int32), torch.empty(50, 96)
    run = combine.plan(50, 4, 96, 8, None, False, y.dtype, y.dtype, y.device)
    run.having(clears=clears)(y, ids, None, None, done, out)
    assert torch.equal(out, combined(y, ids, 8, None, None, y.dtype))
    assert done.tolist() == [0] * clears + [7] * (201 - clears)


def test_offsets_beyond_32_bits():
    tokens, k, width = 140000, 4, 4096  # 2.3e9 elements
    ids = torch.randint(0, 8, (tokens, k)).int()
    y = torch.empty(tokens * k, width, dtype=torch.bfloat16).normal_()
    weights = torch.rand(tokens, k)
    got = combine(y, ids, 8, None, weights, torch.bfloat16)
    last = slice(tokens - 1000, tokens)
    want = combined(y[-1000 * k :], ids[last], 8, None, weights[last], torch.bfloat16)
    assert torch.equal(got[last], want)


def test_cuda_graph_compile_and_opcheck():
    ids = torch.rand(100, 32).topk(4).indices.int()
    y, weights = torch.randn(400, 96, dtype=torch.bfloat16), torch.rand(100, 4)
    tiles = mk.moe_align_block_size(ids, 16, 32)
    mk.combine(y, tiles, weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mk.combine(y, tiles, weights=weights)
    y.copy_(torch.randn(400, 96))
    graph.replay()
    assert torch.equal(out, combined(y, ids, 32, None, weights, torch.bfloat16))
    step = torch.compile(lambda y: mk.combine(y, mk.moe_align_block_size(ids, 16, 32), weights=weights), fullgraph=True)
    assert torch.equal(step(y), out)
    torch.library.opcheck(torch.ops.mx_kernels.combine.default, (y, ids, 32, None, weights, torch.bfloat16))
