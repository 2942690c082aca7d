"""Weights that a product asks for before it begins: those that its first steps load. In Triton's interpreter; what asks for them is in
compiled code (``test_compile_packed.py``, ``test_kernels_rebased.py``), and layers on a GPU give the same bits (``test_moe.py``).

On a GPU also blocks that a product counts, and for which another waits.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import mx_kernels as mk

INTERPRETED = """
import torch
import triton
import triton.language as tl
from mx_kernels.kernels.ahead import CHUNKS, rows_at, scales_at, tiles_at
from test_kernels_ahead import CASES, rows, tiles


@triton.jit
def tiles_kernel(at, there, scale_at, scale_there, strip0, strips, w_step, s_step, k, first,
                 N: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, ROW: tl.constexpr, STRIDE: tl.constexpr):
    i = tl.arange(0, CHUNKS)
    a, b = tiles_at(strip0, strips, w_step, k, first, N, BK, UNIT, STRIDE)
    tl.store(at + i, a)
    tl.store(there + i, b.to(tl.int8))
    a, b = scales_at(strip0, s_step, k, first, N, BK, UNIT, ROW, STRIDE)
    tl.store(scale_at + i, a)
    tl.store(scale_there + i, b.to(tl.int8))


@triton.jit
def rows_kernel(at, there, row0, rows, width, k, first,
                N: tl.constexpr, BK: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr):
    i = tl.arange(0, CHUNKS)
    a, b = rows_at(row0, rows, width, k, first, N, BK, BYTES, STRIDE)
    tl.store(at + i, a)
    tl.store(there + i, b.to(tl.int8))


def taken(at, there):
    return {int(a) for a, b in zip(at, there) if b}


def room():
    return torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int8)


for case in CASES["tiles"]:
    (n, bk, unit, row, stride), (strip0, strips, k, first) = case
    w_step, s_step = strips * 512, (strips * 16 + 5) * row
    codes, scales = room(), room()
    tiles_kernel[(1,)](*codes, *scales, strip0, strips, w_step, s_step, k, first,
                       N=n, BK=bk, UNIT=unit, ROW=row, STRIDE=stride)
    assert (taken(*codes), taken(*scales)) == tiles(w_step, s_step, *case), case
for case in CASES["rows"]:
    (n, bk, size, stride), (row0, there, width, k, first) = case
    got = room()
    rows_kernel[(1,)](*got, row0, there, width, k, first, N=n, BK=bk, BYTES=size, STRIDE=stride)
    assert taken(*got) == rows(*case), case
print("right")
"""
CASES = {
    "tiles": [  # (weight rows, step, columns of a tile, scale bytes of 128 columns, stride), (strip, strips, columns, first step)
        ((128, 128, 64, 4, 1), (8, 24, 2880, 0)),
        ((128, 128, 64, 8, 4), (0, 8, 2880, 3)),
        ((128, 128, 32, 4, 2), (4, 10, 768, 1)),  # the last rows are not there
        ((64, 128, 64, 4, 1), (4, 8, 128, 0)),  # one step, nothing behind it
        ((128, 64, 64, 4, 1), (16, 32, 448, 0)),
        ((128, 64, 32, 4, 1), (0, 8, 96, 0)),
    ],
    "rows": [  # (weight rows, step, bytes of a value, stride), (row, rows, width, columns, first step)
        ((128, 128, 2, 1), (256, 1536, 2048, 2048, 0)),
        ((128, 64, 2, 1), (1520, 1536, 2880, 2880, 0)),  # half of the rows are not there
        ((64, 128, 1, 1), (64, 200, 2048, 2048, 0)),
        ((16, 128, 1, 2), (0, 16, 4096, 4096, 1)),  # and what follows
        ((128, 128, 2, 1), (0, 128, 128, 128, 0)),  # rows shorter than a chunk
    ],
}


def tiles(w_step, s_step, constants, numbers):
    """Bytes at which codes and scales of the first steps begin."""
    n, bk, unit, row, stride = constants
    strip0, strips, k, first = numbers
    steps = itertools.count(first, stride)
    every = ((step, tile, strip) for step in steps for tile in range(bk // unit) for strip in range(n // 16))
    asked = [*itertools.islice(every, 16)]
    codes = {
        (step * (bk // unit) + tile) * w_step + (strip0 + strip) * 512
        for step, tile, strip in asked
        if step * bk + tile * unit < k and strip0 + strip < strips
    }
    groups = {step * bk // 128 for step, _, _ in asked if step * bk // 128 * 128 < k}
    return codes, {group * s_step + strip0 * 16 * row for group in groups}


def rows(constants, numbers):
    """Bytes at which the first chunks of rows begin."""
    n, bk, size, stride = constants
    row0, there, width, k, first = numbers
    columns = 512 // size
    every = (
        (row, first * bk + turn * stride * max(bk, columns)) for turn in range(16) for row in range(row0, row0 + n)
    )
    return {
        (row * width + column) * size
        for row, column in itertools.islice(every, 16)
        if row < there and column + columns <= k
    }


@pytest.mark.compile
def test_what_is_asked_for_in_the_interpreter(interpreted):
    interpreted(INTERPRETED)


def product(plan, run, x, w, tiles, y, done):
    """Launch it without anything of an epilogue."""
    words = w.data if w.format is None else w.data.view(torch.int32)
    scale = y if w.scale is None else w.scale
    partial = torch.empty(plan.partial or 1, device="cuda")
    counter = torch.zeros(plan.counters or 1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()  # who waits for counts does not wait for the kernel in front, which here made those zeros
    of_a_tile_list = (y if t is None else t for t in (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded))
    run(x, words, scale, y, *of_a_tile_list, y, y, y, partial, counter, done)
    return partial, counter  # which live as long as the launch


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5, 20, 100, 700])
def test_blocks_are_counted_and_waited_for(tokens, name, monkeypatch):
    """Each tile is counted behind what was stored. GEMM 2 starts with h full of NaN, and is right as soon as h and the counts are. One
    token, pairs that are not sorted (K is split), and sorted ones."""
    # few programs of GEMM 2: others have to run while they wait
    check_counts(tokens, name, monkeypatch, experts=32, hidden=256, width=1024, k=4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3"])
@pytest.mark.parametrize(("tokens", "block"), [(180, 160), (300, 160), (330, 256)])
def test_blocks_of_specialized_warps_are_counted_and_waited_for(tokens, block, name, monkeypatch):
    """The same where warps load or multiply, and h is in slot order: each warpgroup counts, and who sends the copy engine waits."""
    if not importlib.import_module("mx_kernels.tuned").wgmma(torch.device("cuda", 0)):
        pytest.skip("no warpgroup products on this device")
    one, two = check_counts(tokens, name, monkeypatch, experts=4, hidden=2048, width=768, k=2, slots=True)
    assert one.pairs == block
    for plan in (one, two):
        assert plan.kernel.__name__ == "_grouped_gemm_specialized_kernel"
    assert not one.begins, "rows of x are copied"


def check_counts(tokens, name, monkeypatch, *, experts, hidden, width, k, slots=False):
    """The plans of two products, of which the first counts and the second waits. slots: h is in slot order."""
    kernel = importlib.import_module("mx_kernels.kernels.grouped_gemm")
    flat = importlib.import_module("mx_kernels.packed_gemm").flat_product
    if not kernel.target(torch.device("cuda", 0)).pdl:
        pytest.skip("kernels do not start early on this device")
    monkeypatch.setattr(kernel, "overlaps", lambda streamed, programs, units: True)
    w13, w2 = (torch.randn(experts, *s, device="cuda").bfloat16() / 32 for s in ((2 * width, hidden), (hidden, width)))
    if name != "bf16":
        w13, w2 = mk.quantize(w13, name), mk.quantize(w2, name)
    w13, w2 = mk.pack(w13, gated=True), mk.pack(w2)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, device="cuda").topk(k).indices.int()
    tiles = mk.moe_align_block_size(ids, mk.block_size(ids.numel(), experts, "cuda", w13, slots=slots), experts)
    first = mk.Epilogue(activation=mk.Activation("silu"))
    wanted_h = mk.grouped_gemm(x, w13, tiles, top_k=k, epilogue=first, to_slots=slots)
    wanted_y = mk.grouped_gemm(wanted_h, w2, tiles, from_slots=slots)
    rows = tiles.sorted_ids < ids.numel() if slots else slice(None)  # others hold nothing
    one = kernel.plan_packed(*flat(x, w13, tiles, k, first, None, torch.bfloat16, slots))
    two = kernel.plan_packed(*flat(wanted_h, w2, tiles, 0 if slots else 1, mk.Epilogue(), None, torch.bfloat16))
    assert one.leads(two)
    h, y = torch.full_like(wanted_h, torch.nan), torch.empty_like(wanted_y)
    blocks = tiles.expert_ids.numel()
    if tiles.sorted_ids is not None:
        used = [b < int(tiles.num_padded) // tiles.block_size for b in range(blocks)]
    else:  # a pair of an expert that another has before has no block
        listed = ids.flatten().tolist()
        used = [e not in listed[:b] for b, e in enumerate(listed)]
    want = [one.tiles * u for u in used]
    counts = torch.zeros(blocks, dtype=torch.int32, device="cuda")
    behind = two.behind(one.tiles)
    kept = [product(one, one.counting, x, w13, tiles, h, counts)]
    assert torch.equal(h[rows], wanted_h[rows])
    assert counts.tolist() == want
    kept.append(product(two, behind, h, w2, tiles, y, counts))
    assert torch.equal(y, wanted_y)
    assert counts.tolist() == want
    beside, filled = torch.cuda.Stream(), torch.tensor(want, dtype=torch.int32, device="cuda")
    for late in (False, True):  # first in time, which also loads what must not be loaded while a kernel waits
        h.fill_(torch.nan)
        counts.zero_()
        y.zero_()
        product(two, lambda *tensors: kept.append(tensors), h, w2, tiles, y, counts)
        torch.cuda.synchronize()
        for step in ("wait", "write") if late else ("write", "wait"):
            if step == "wait":
                behind(*kept[-1])
            else:
                with torch.cuda.stream(beside):
                    torch.cuda._sleep(1 << 20)
                    h.copy_(wanted_h)
                    counts.copy_(filled)
        torch.cuda.synchronize()
        assert torch.equal(y, wanted_y)
    return one, two
