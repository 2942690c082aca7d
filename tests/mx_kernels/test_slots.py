"""Rows in the order of slots: they are where the tile list says, and change no value of a product."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels import reference

SILU = mk.Activation("silu")
E, N, K = 5, 128, 64


def routed(tokens, k=2, device="cpu", experts=E):
    """Ids with dropped pairs."""
    ids = torch.rand(tokens, experts, device=device).topk(k).indices.int()
    ids[::5, 0] = -1
    return ids


def by_pair(y, tiles):
    """Rows of slots -> rows of pairs, zeros for dropped ones."""
    out = y.new_zeros(tiles.num_pairs, y.shape[1])
    for slot, pair in enumerate(tiles.sorted_ids[: int(tiles.num_padded)].tolist()):
        if pair < tiles.num_pairs:
            out[pair] = y[slot]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
def test_gathered_rows(dtype, k):
    tiles = mk.moe_align_block_size(routed(37, k), 16, E, sort=True)
    x = torch.randn(37, 24).to(dtype)
    rows = mk.gather_rows(x, tiles, top_k=k)
    assert rows.shape == (len(tiles.sorted_ids), 24)
    assert rows.dtype == dtype
    used = 0
    for slot, pair in enumerate(tiles.sorted_ids.tolist()):
        live = pair < tiles.num_pairs and slot < int(tiles.num_padded)
        used += live
        assert torch.equal(rows[slot], x[pair // k] if live else torch.zeros(24, dtype=dtype))
    assert used == (tiles.ids >= 0).sum()


@pytest.mark.parametrize("act", [SILU, None], ids=["silu", "none"])
@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP4, mk.NVFP4, None], ids=str)
def test_products_have_the_same_values(f, act):
    tiles = mk.moe_align_block_size(routed(40), 16, E, sort=True)
    w = torch.randn(E, N, K).bfloat16()
    p = mk.pack(w if f is None else mk.quantize(w, f), gated=act is not None)
    x = torch.randn(40, K).bfloat16()
    epilogue = mk.Epilogue(torch.randn(E, N), act, torch.rand(80), round_to=mk.MXFP8 if act else None)
    want = mk.grouped_gemm(x, p, tiles, top_k=2, epilogue=epilogue)
    rows = mk.gather_rows(x, tiles, top_k=2)
    assert torch.equal(mk.grouped_gemm(rows, p, tiles, from_slots=True, epilogue=epilogue), want)
    slots = mk.grouped_gemm(x, p, tiles, top_k=2, to_slots=True, epilogue=epilogue)
    assert slots.shape[0] == len(tiles.sorted_ids)
    assert torch.equal(by_pair(slots, tiles), want)
    both = mk.grouped_gemm(rows, p, tiles, from_slots=True, to_slots=True, epilogue=epilogue)
    assert torch.equal(by_pair(both, tiles), want)


def test_what_is_refused():
    ids = routed(40)
    tiles, unsorted = (
        mk.moe_align_block_size(ids, 16, E, sort=True),
        mk.Alignment(ids, E, 16, None, ids.view(-1), ids[:0]),
    )
    w = torch.randn(E, N, K).bfloat16()
    p, x = mk.pack(w), torch.randn(40, K).bfloat16()
    with pytest.raises(ValueError, match="pack"):
        mk.grouped_gemm(x, w, tiles, top_k=2, to_slots=True)
    with pytest.raises(ValueError, match="gather_rows"):
        mk.grouped_gemm(x, p, tiles, top_k=2, from_slots=True)
    for call in (
        lambda: mk.grouped_gemm(x, p, unsorted, top_k=2, to_slots=True),
        lambda: mk.gather_rows(x, unsorted, top_k=2),
    ):
        with pytest.raises(ValueError, match="sort=True"):
            call()
    for epilogue in (mk.Epilogue(requantize_to=mk.MXFP8), mk.Epilogue(round_to=mk.MXFP8, rule=mk.ScaleRule.SEARCH)):
        with pytest.raises(ValueError, match="all rows"):
            mk.grouped_gemm(x, p, tiles, top_k=2, to_slots=True, epilogue=epilogue)
    with pytest.raises(ValueError, match="80 pairs"):
        mk.gather_rows(x, tiles)
    with pytest.raises(TypeError):
        mk.gather_rows(x.int(), tiles, top_k=2)


def test_where_a_layer_takes_them(monkeypatch):
    """Weights wide enough for a gather, enough pairs an expert, blocks of 256, a device with warpgroup products; plain weights later."""
    module = importlib.import_module("mx_kernels.slots")

    def orders(f, n, k, pairs, block=256, **given):
        w = torch.empty(1, n, k, dtype=torch.bfloat16)
        p = mk.pack(w if f is None else mk.quantize(w.zero_(), f), gated=True)
        p = replace(p, shape=torch.Size((4, n, k)))
        blocks = torch.zeros(pairs // block, dtype=torch.int32)
        tiles = mk.Alignment(
            torch.zeros(pairs // 2, 2, dtype=torch.int32), 4, block, torch.zeros(pairs), blocks, blocks[:1]
        )
        return mk.layer_slots(p, p, tiles, **{"plain": True, "ordered": True, **given})

    assert orders(mk.MXFP8, 5632, 2048, 2048) == (False, False)
    monkeypatch.setattr(module, "wgmma", lambda device: True)
    assert orders(mk.MXFP8, 5632, 2048, 2048) == (True, True)
    assert orders(mk.MXFP8, 5632, 2048, 2048, plain=False) == (False, True)
    assert orders(mk.MXFP8, 5632, 2048, 2048, ordered=False) == (True, False)
    assert orders(mk.MXFP8, 5632, 2048, 2048, block=128) == (False, False)
    assert orders(mk.MXFP8, 5632, 2048, 600) == (False, False)
    assert orders(mk.MXFP8, 5632, 2048, 480, block=160) == (True, True)
    assert orders(mk.MXFP8, 5632, 2048, 252, block=160) == (False, False)
    assert orders(mk.MXFP4, 5632, 2048, 316, block=160) == (True, True)
    assert orders(mk.MXFP4, 4096, 768, 316, block=160) == (False, True)
    assert orders(None, 5632, 2048, 8192, block=160) == (False, False)
    assert orders(mk.MXFP8, 4096, 2048, 2048) == (False, True)
    assert orders(mk.MXFP8, 5632, 1024, 2048) == (False, True)  # short rows are worth no gather
    assert orders(mk.MXFP8, 5632, 704, 2048) == (False, False)
    assert orders(None, 5632, 2048, 2044) == (False, False)
    assert orders(None, 5632, 2048, 2048) == (True, True)
    assert orders(None, 1536, 2048, 2048) == (False, True)
    assert orders(None, 2048, 768, 2048) == (False, True)
    assert orders(None, 2048, 704, 2048) == (False, False)
    w = torch.zeros(4, 5632, 2048, dtype=torch.bfloat16)
    tiles = mk.moe_align_block_size(torch.zeros(2048, 1, dtype=torch.int32), 256, 4, sort=True)
    assert mk.layer_slots(w, w, tiles, plain=True, ordered=True) == (False, False)  # not packed


INTERPRETED = """
import torch, test_kernels_grouped_gemm as t, test_slots, mx_kernels as mk
from mx_kernels.kernels.slots import gather_rows
from mx_kernels.packed_gemm import flat_product
from mx_kernels.kernels.grouped_gemm import grouped_gemm_packed
from mx_kernels.tuning import Config

torch.manual_seed(0)
for k in (1, 2):
    tiles = mk.moe_align_block_size(test_slots.routed(37, k), 16, 5, sort=True)
    x, scale = torch.randn(37, 48), torch.rand(37)
    live = (tiles.sorted_ids < tiles.num_pairs) & (torch.arange(len(tiles.sorted_ids)) < tiles.num_padded)
    rows, scales = gather_rows(x, tiles.sorted_ids, tiles.num_padded, tiles.num_pairs, k, scale)
    assert torch.equal(rows[live], mk.reference.gather_rows(x, tiles, top_k=k)[live])
    assert torch.equal(scales[live], scale[tiles.sorted_ids[live].long() // k])
w = torch.randn(5, 96, 128)
for block, f, act, config in (
    (64, mk.MXFP4, t.SILU, Config(64, 64, 128, 4, 3, levels=3)), (64, mk.MXFP8, None, Config(32, 64, 64, 4, 3, levels=2)),
    (96, mk.MXFP4, None, Config(96, 64, 64, 4, 3, levels=3)),
):
    ids = test_slots.routed(240 if block == 96 else 70)
    x = torch.randn(ids.shape[0], 128).bfloat16()
    tiles = mk.moe_align_block_size(ids, block, 5, sort=True)
    p = mk.pack(mk.quantize(w, f), gated=act is not None)
    rows = mk.gather_rows(x, tiles, top_k=2)
    epilogue = mk.Epilogue(None, act)
    run = lambda x, k, to: grouped_gemm_packed(*flat_product(x, p, tiles, k, epilogue, None, torch.float32, to), config)
    live = (tiles.ids >= 0).flatten()
    want = run(x, 2, False)[live]
    assert torch.equal(run(rows, 0, False)[live], want)
    assert torch.equal(test_slots.by_pair(run(rows, 0, True), tiles)[live], want)
print("right")
"""


@pytest.mark.compile
def test_kernels_in_the_interpreter(interpreted):
    interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_rows_on_the_gpu(dtype):
    for tokens, k, width, block in ((1, 2, 64, 16), (900, 2, 100, 64), (5000, 8, 2880, 256), (3000, 1, 7168, 128)):
        tiles = mk.moe_align_block_size(routed(tokens, k, "cuda", 16), block, 16, sort=True)
        wide = torch.randn(tokens, width + 8, device="cuda").to(dtype)
        for x in (wide[:, :width], wide[:, :width].contiguous(), wide[:, 3 : width + 3]):
            rows = mk.gather_rows(x, tiles, top_k=k)
            slot = torch.arange(len(tiles.sorted_ids), device="cuda")
            live = (tiles.sorted_ids < tiles.num_pairs) & (slot < tiles.num_padded)
            assert torch.equal(rows[live], reference.gather_rows(x, tiles, top_k=k)[live])


@pytest.mark.compile
@pytest.mark.parametrize(("width", "held", "scaled"), [(192, "i32", True), (1792, "i32", True), (4096, "bf16", False)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1201"])
def test_what_the_gather_compiles_to(aot, target, width, held, scaled):
    """Sixteen bytes a load and store (``_gather_rows_kernel``), none in registers that spill (``_places_kernel`` too)."""
    slots = importlib.import_module("mx_kernels.kernels.slots")
    dtype = {"i32": torch.int32, "bf16": torch.bfloat16}[held]
    pointers = {"x": held, "out": held, "scale": "fp32", "out_scale": "fp32"}
    launches = slots.plan(1 << 16, width, dtype, width, scaled, 3 << 10, 3, torch.device("meta"))
    assert [run.grid for run, _ in launches] == [(3, 1, 1), (64, 1, 1), (1 << 10, 1, 1)]
    for run, given in launches:
        names = run.kernel.arg_names
        numbers = [name for name in ("x_stride", "W", "n_pairs") if name in names]
        signature = {name: f"*{pointers.get(name, 'i32')}" for name in given} | dict.fromkeys(numbers, "i32")
        assert [*signature] == names[: len(signature)]
        constants = dict(zip(names[len(signature) :], run.values[len(numbers) :], strict=True))
        made = aot.compile_kernel(
            run.kernel, signature, constants, target, unaligned=("n_pairs",), num_warps=run.options["num_warps"]
        )
        assert made.spills == 0
        if target.startswith("sm") and run.kernel is slots._gather_rows_kernel:
            loads, stores = (made.opcodes(full=True)[name] for name in ("LDG.E.128", "STG.E.128"))
            assert 0 < 3 * loads == stores, "each row is read once"
