"""What ``kernels/specialized.py`` computes, on a GPU: bit for bit what the other kernel does (``test_specialized.py`` has where it is
taken, and what it compiles to)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

import mx_kernels as mk
from mx_kernels.packed_gemm import flat_product
from mx_kernels.tuning import Config

from .test_specialized import FORMATS, JOINED, OAI, SILU, SMALL, SPECIALIZED, THREE, TWO_PROGRAMS, kernel

__all__ = ["kernel"]  # a fixture


def routing(tokens: int, experts: int, top_k: int, skew: float) -> torch.Tensor:
    """Ids with dropped pairs; the more skew, the fewer experts get most."""
    share = torch.arange(1, experts + 1).float().pow(-skew)
    ids = torch.multinomial(share.expand(tokens, experts), top_k).int()
    ids[::7, 0] = -1
    return ids.cuda()


def by_pair(y: torch.Tensor, tiles: mk.Alignment) -> torch.Tensor:
    """Rows of slots -> rows of pairs."""
    used = tiles.sorted_ids < tiles.num_pairs
    used[int(tiles.num_padded) :] = False
    out = y.new_zeros(tiles.num_pairs, y.shape[1])
    out[tiles.sorted_ids[used].long()] = y[used]
    return out


GELU = mk.Activation("gelu_tanh", limit=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("act", [SILU, OAI, GELU, None], ids=["silu", "oai", "gelu", "none"])
@pytest.mark.parametrize("f", [*FORMATS, None], ids=str)
def test_bit_for_bit_what_the_other_kernel_computes(kernel, f, act):
    """Every level (256, 192, 128, 64 pairs), rows of x and of the result in the order of pairs and of slots."""
    for problem in drawn(f, act):
        want = problem.product(128, TWO_PROGRAMS)
        assert want.isfinite().all()
        assert torch.equal(problem.product(256, SPECIALIZED), want)
        for config in (SPECIALIZED, TWO_PROGRAMS) if problem.bias is not None else (SPECIALIZED,):
            assert torch.equal(problem.product(256, config, slots=True), want)
    config = replace(SPECIALIZED, stages=4 if f is None else 5)  # as many as the model gives results of 16 bits
    want = problem.product(128, TWO_PROGRAMS, out=torch.bfloat16)
    for slots in (True, False):
        assert torch.equal(problem.product(256, config, slots, torch.bfloat16), want)


@pytest.mark.gpu
@pytest.mark.parametrize("act", [SILU, OAI, GELU, None], ids=["silu", "oai", "gelu", "none"])
def test_three_warpgroups_of_plain_weights_compute_the_same(kernel, act):
    """Every level, whole tiles and last ones of which two warpgroups, one or none have rows of their own; blocks that walk together."""
    for problem in drawn(None, act):
        if problem.packed.shape[1] >= 192:
            want = problem.product(128, TWO_PROGRAMS, out=torch.bfloat16)
            assert want.isfinite().all()
            for config, slots in ((THREE, True), (THREE, False), (replace(THREE, group=8), True)):
                assert torch.equal(problem.product(256, config, slots, torch.bfloat16), want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("f", "act"),
    [
        (mk.MXFP8, SILU),
        (mk.MXFP8, None),
        (mk.MXFP8_E5M2, GELU),
        (mk.MXFP6_E2M3, None),
        (mk.MXFP4, OAI),
        (mk.MXFP4, None),
        (mk.NVFP4, OAI),
        (mk.NVFP4, None),
    ],
)
def test_small_blocks_compute_the_same(kernel, f, act):
    """Every level (160, 128, 96, 64 pairs), from slots and not; the other kernel takes five times 32 pairs of such a block."""
    for problem in drawn(f, act):
        if problem.packed.shape[1] >= 192:
            want = problem.product(128, TWO_PROGRAMS)
            uneven = problem.packed.shape[1] == 304  # rows, of which two tiles take some
            few = replace(SMALL, stages=3 if uneven else 6)
            configs = (few, True), (few, False), (Config(32, 128, 64, 4, 3), True)
            if uneven:
                configs += (replace(few, rows=128), True), (replace(few, rows=128), False)
            for config, slots in configs:
                assert torch.equal(problem.product(160, config, slots=slots), want)
    config = replace(SMALL, stages=7 if f.element.bits == 4 else 6)
    want = problem.product(128, TWO_PROGRAMS, out=torch.bfloat16)
    narrow = replace(config, rows=128, stages=8 if f.element.bits == 4 else 7)
    for rows, slots in ((config, True), (config, False), (narrow, True), (narrow, False)):
        assert torch.equal(problem.product(160, rows, slots, torch.bfloat16), want)


FEW_OVER = (256 + 32, 257, 256, 256 + 33, 1, 0, 512 + 32, 31, 1024 + 5, 255, 768, 512 + 33, 300)  # pairs of each expert


def exactly(counts: tuple[int, ...], top_k: int = 1) -> torch.Tensor:
    """Ids [tokens, top_k] of so many pairs for each expert in any order, and a few dropped ones."""
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = torch.cat([ids, torch.full((8 + -len(ids) % top_k,), -1)])
    return ids[torch.randperm(len(ids))].view(-1, top_k).int().cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("act", [OAI, None], ids=["oai", "none"])
@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP6_E2M3, mk.MXFP4, mk.NVFP4], ids=str)
def test_last_blocks_of_few_pairs_join_the_one_in_front(kernel, f, act, group):
    """The same bits, whatever they begin with: experts of 256 pairs and some, rows anywhere and in slot order."""
    config = replace(JOINED, group=group)
    for n, k in ((256, 256), (304, 384)):
        ids = exactly(FEW_OVER, 2 if act else 1)
        experts, tokens = len(FEW_OVER), ids.shape[0]
        w = mk.quantize(torch.randn(experts, n, k, device="cuda") * k**-0.5, f)
        p = mk.pack(w, gated=act is not None, layout=act.layout if act else "concatenated")
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        bias = torch.randn(experts, n, device="cuda") if n == 304 else None
        weight = torch.rand(ids.numel(), device="cuda")
        problem = Drawn(kernel, act, p, x, ids, ids.shape[1], bias, weight, experts)
        want = problem.product(128, TWO_PROGRAMS)
        assert want.isfinite().all()
        for slots in (True, False):
            assert torch.equal(problem.product(256, config, slots), want)
        want = problem.product(128, TWO_PROGRAMS, out=torch.bfloat16)
        most = replace(config, stages=5 if f.element.bits == 4 else 4)
        for slots in (True, False):
            assert torch.equal(problem.product(256, most, slots, torch.bfloat16), want)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("largest", "block"), [(160, 160), (256, 256), (288, 256)])
def test_pieces_of_an_alignment(pieces, group, largest, block):
    """Each weight tile of each block once with the level of what it has to multiply, none of one that joins another."""
    counts, tiles = (*FEW_OVER, 64, 65, 160 + 32, 160 + 33), 5
    ids = exactly(counts)
    made = mk.moe_align_block_size(ids, block, len(counts), sort=True)
    blocks = int(made.num_padded) // block
    found = torch.full((blocks * tiles, 4), -7, dtype=torch.int32, device="cuda")
    pieces.pieces_kernel[(1,)](
        found, made.sorted_ids, made.expert_ids, made.num_padded, ids.numel(), group, tiles, BM=largest, num_warps=4
    )
    levels, want = pieces.LEVELS[largest], set()
    for e, n in enumerate(counts):
        parts = [block] * (n // block) + [n % block] * (n % block > 0)
        if len(parts) > 1 and largest > block and parts[-1] <= largest - block:
            parts[-2:] = [sum(parts[-2:])]
        first = int((made.expert_ids == e).nonzero()[0]) if parts else 0
        for i, part in enumerate(parts):
            level = next(at for at, most in enumerate(levels) if part <= most)
            want |= {(first + i, tile, e, level) for tile in range(tiles)}
    assert (largest == 288) == any(level == 4 for _, _, _, level in want)
    rows = [tuple(row) for row in found.tolist()]
    assert len({row[:2] for row in rows}) == blocks * tiles
    assert {row for row in rows if row[2] >= 0} == want


@dataclass
class Drawn:
    """A random problem, and its products for live pairs."""

    kernel: ModuleType
    act: mk.Activation | None
    packed: mk.PackedWeight
    x: torch.Tensor
    ids: torch.Tensor
    top_k: int
    bias: torch.Tensor | None
    weight: torch.Tensor | None
    experts: int = 9

    def product(
        self, block: int, config: Config, slots: bool = False, out: torch.dtype = torch.float32
    ) -> torch.Tensor:
        tiles = mk.moe_align_block_size(self.ids, block, self.experts, sort=True)
        x, top_k = (mk.gather_rows(self.x, tiles, top_k=self.top_k), 0) if slots else (self.x, self.top_k)
        args = flat_product(x, self.packed, tiles, top_k, mk.Epilogue(self.bias, self.act), self.weight, out, slots)
        y = self.kernel.grouped_gemm_packed(*args, config)
        return (by_pair(y, tiles) if slots else y)[(self.ids >= 0).flatten()]


def drawn(f: mk.Format | None, act: mk.Activation | None) -> Iterator[Drawn]:
    """K with and without a tail, steps of even and odd number, biases and row weights, skewed routing, dropped pairs."""
    for n, k, skew, top_k in ((256, 256, 0.0, 2), (304, 320, 1.5, 2), (128, 160, 3.0, 1), (1536, 2048, 0.5, 2)):
        if (f is None and k % 64) or (f is not None and f.element.bits == 4 and k % 64):
            k += 32
        ids = routing(1900, 9, top_k, skew)
        w = torch.randn(9, n, k, device="cuda") * k**-0.5
        w = w.bfloat16() if f is None else mk.quantize(w, f)
        p = mk.pack(w, gated=act is not None, layout=act.layout if act else "concatenated")
        x = torch.randn(1900 if act else ids.numel(), k, device="cuda").bfloat16()
        bias = torch.randn(9, n, device="cuda") if k != 256 else None
        weight = torch.rand(ids.numel(), device="cuda") if act is None or k == 320 else None
        kernel = importlib.import_module("mx_kernels.kernels.grouped_gemm")
        yield Drawn(kernel, act, p, x, ids, top_k if act else 1, bias, weight)


@pytest.mark.gpu
def test_fewer_tiles_than_programs_or_none(kernel):
    """Tiles are drawn from a counter, which is zero again whatever there was to draw."""
    p = mk.pack(mk.quantize(torch.randn(8, 256, 256, device="cuda") * 0.1, mk.MXFP4))
    for tokens, live in ((2000, 8), (300, 1), (300, 0)):
        ids = routing(tokens, 8, 2, 0.5)
        ids[ids >= live] = -1
        x = torch.randn(tokens, 256, device="cuda").bfloat16()
        outputs = []
        for config, block in ((TWO_PROGRAMS, 128), (SPECIALIZED, 256), (JOINED, 256), (SMALL, 160)):
            tiles = mk.moe_align_block_size(ids, block, 8, sort=True)
            args = flat_product(x, p, tiles, 2, mk.Epilogue(), None, torch.bfloat16)
            outputs.append(kernel.grouped_gemm_packed(*args, config)[(ids >= 0).flatten()])
            assert not kernel.counters(x.device, 1).any()
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["pairs", "slots", "small", "joined"])
def test_more_blocks_than_are_looked_up(kernel, how):
    """Over 1024 blocks each walks the weight tiles alone; up to there those of an expert do so together, in parts of equal size."""
    p = mk.pack(mk.quantize(torch.randn(3, 288, 128, device="cuda") * 0.1, mk.MXFP8))
    for tokens in (4500, 140000):
        ids = routing(tokens, 3, 2, 0.5)
        x = torch.randn(tokens, 128, device="cuda").bfloat16()
        outputs = []
        taken = {"small": (SMALL, 160), "joined": (JOINED, 256)}.get(how, (SPECIALIZED, 256))
        for config, block in ((TWO_PROGRAMS, 128), taken):
            tiles = mk.moe_align_block_size(ids, block, 3, sort=True)
            boxed = how != "pairs" and block > 128
            source = mk.gather_rows(x, tiles, top_k=2) if boxed else x
            args = flat_product(source, p, tiles, 0 if boxed else 2, mk.Epilogue(), None, torch.bfloat16)
            outputs.append(kernel.grouped_gemm_packed(*args, config)[(ids >= 0).flatten()])
        assert torch.equal(*outputs)


@pytest.mark.gpu
def test_experts_of_a_layer_that_are_elsewhere(kernel):
    """Blocks of experts that an expert map sends away are left out by those who load and those who multiply alike."""
    ids = routing(3000, 6, 2, 0.5)
    expert_map = torch.tensor([1, -1, 0, -1, 2, -1], dtype=torch.int32, device="cuda")
    p = mk.pack(mk.quantize(torch.randn(3, 256, 512, device="cuda") * 0.04, mk.MXFP8), gated=True)
    x = torch.randn(3000, 512, device="cuda").bfloat16()
    here = torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()], -1).flatten() >= 0
    outputs = []
    for config, block in ((TWO_PROGRAMS, 128), (SPECIALIZED, 256), (JOINED, 256), (SMALL, 160)):
        tiles = mk.moe_align_block_size(ids, block, 3, expert_map, sort=True)
        boxed = block == 160
        rows = mk.gather_rows(x, tiles, top_k=2) if boxed else x
        args = flat_product(rows, p, tiles, 0 if boxed else 2, mk.Epilogue(activation=SILU), None, torch.bfloat16)
        outputs.append(kernel.grouped_gemm_packed(*args, config)[here])
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP4, mk.NVFP4], ids=str)
def test_a_layer_of_mixtral_takes_it_and_repeats_itself(kernel, f):
    """A full device, taken by the model, in a CUDA graph: the same bits each time, and a reference's values."""
    ids = torch.rand(4096, 8, device="cuda").topk(2).indices.int()
    w = mk.quantize(torch.randn(8, 4096, 4096, device="cuda").bfloat16() * 0.015, f)
    p = mk.pack(w, gated=True)
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    rows = mk.block_size(ids.numel(), 8, "cuda", p)
    assert rows == 256
    tiles = mk.moe_align_block_size(ids, rows, 8, sort=True)

    def product():
        return mk.grouped_gemm(x, p, tiles, top_k=2, epilogue=mk.Epilogue(activation=SILU), out_dtype=torch.float32)

    kernel._plans.clear()
    first = product()
    plan = next(plan for plan in kernel._plans.values() if plan.kernel is not kernel._grouped_gemm_packed_kernel)
    assert plan.programs == torch.cuda.get_device_properties(0).multi_processor_count
    pairs = (ids == 3).flatten().nonzero().flatten()
    up = x[pairs // 2].double() @ mk.dequantize(w, torch.float32)[3].double().T
    gate, up = up.chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up
    assert (first[pairs] - want).norm() / want.norm() < 1e-5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # which begins with the capture
        again = product()
        held = kernel.counters(again.device, 1)
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, again)
        assert not held.any(), "who draws the last tile makes the counter zero again"
