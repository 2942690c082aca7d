"""Every custom op that mx_kernels registers passes opcheck, compiles to one graph and runs on the meta device.

The ops are found, not listed: one without a case here fails ``test_every_op_has_a_case``.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels.dispatch import flat_operand
from mx_kernels.packed_gemm import flat_product

OPS = torch.ops.mx_kernels
NO_ACTIVATION = ("", "concatenated", False, 0.0, 0.0, float("inf"))
SILU = ("silu", "concatenated", True, 0.0, 0.0, float("inf"))


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.partition("::")[2] for n in names if n.startswith("mx_kernels::")}


def rebasing(device) -> bool:
    """Whether re-based products run there."""
    return mk.Device.probe(device).arch.name in ("cpu", "sm90")


@functools.cache
def cases(device: str = "cpu") -> dict[str, tuple]:
    """Op name -> arguments on a device."""
    with torch.device(device):
        return _cases()


def _cases() -> dict[str, tuple]:
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(3, 64, 64).bfloat16()
    ids = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]], dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 16, 3, sort=True)
    blocks = (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded)
    q4, qn = mk.quantize(w, mk.MXFP4), mk.quantize(x, mk.NVFP4)
    bytes4 = flat_operand(qn)
    packed = mk.pack(q4, gated=True)
    act = mk.Activation("silu")
    rebased = mk.rebase(mk.quantize(w, mk.MXFP8))
    rows = x[:1].to(torch.float8_e4m3fn), x[0, :1].float()  # stands in where their kernel cannot run
    if rebasing(x.device):
        rows = mk.rebase_rows(x, tiles, top_k=2)
    tail = (None, "", 0.0, 0.0, float("inf"), torch.rand(8), True, True, False, torch.bfloat16)
    return {
        "quantize": (x, "nvfp4", "amax", qn.global_scale),
        "dequantize": (*bytes4, torch.bfloat16),
        "quantize_dequantize": (x, "mxfp6_e2m3", "even", None),
        "compute_global_scale": (w,),
        "gemm": (*flat_operand(x), *flat_operand(q4[0]), w[0, 0], *NO_ACTIVATION, None, "", "", torch.bfloat16),
        "grouped_gemm": (
            *(*flat_operand(qn), *flat_operand(q4), *blocks, 16, 8, 2),
            *(w[:, 0].contiguous(), *SILU, torch.rand(8), "mxfp8_e4m3", "rceil", torch.bfloat16),
        ),
        "grouped_gemm_packed": flat_product(
            x, packed, tiles, 2, mk.Epilogue(activation=act), torch.rand(8), torch.bfloat16
        ),
        "gather_rows": (x, torch.randperm(8).int(), torch.tensor([8], dtype=torch.int32), 8, 2),  # a pair in every slot
        "moe_align_block_size": (ids, 16, 3, torch.tensor([0, 2, 1], dtype=torch.int32)),
        "expert_of_pair": (ids, 3),
        "activate": (x, *SILU, "mxfp4", "even", torch.bfloat16),
        "combine": (torch.randn(8, 64), ids, 3, None, torch.rand(4, 2), torch.bfloat16),
        "rebase_rows": (x, None, None, None, 0, 0),
        "grouped_gemm_rebased": (
            *(rows[0].view(torch.uint8), rows[1], rebased.data.view(torch.uint8), None, rebased.scale),
            *(ids, *blocks, 16, *tail),
        ),
    }


CASES = cases()
ops = pytest.mark.parametrize("name", CASES)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def test_every_op_has_a_case():
    assert registered() == set(CASES)


def arguments(name, device):
    if "rebase" in name and not rebasing(device):
        pytest.skip("re-based products are made for sm90")
    return cases(device)[name]


@devices
@ops
def test_opcheck(name, device):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, arguments(name, device), test_utils=tests)


def results(out) -> tuple[torch.Tensor, ...]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


@devices
@ops
def test_fullgraph(name, device):
    op, args = getattr(OPS, name), arguments(name, device)
    torch.compiler.reset()  # one function for all ops would count as its recompilations
    got = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(results(got), results(op(*args)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@ops
def test_meta(name):
    op, args = getattr(OPS, name), CASES[name]
    got = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for a, b in zip(results(got), results(op(*args)), strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def layer(weights, pack):
    """The five steps of an MoE layer through the public functions, with every kind of weight."""

    def run(x, ids, route):
        tiles = mk.moe_align_block_size(ids, 16, 3)
        h = mk.grouped_gemm(x, weights[0], tiles, top_k=2)
        h = mk.activate(h, mk.Activation("silu"), requantize_to=None if pack else mk.MXFP8)
        y = mk.grouped_gemm(h, weights[1], tiles, epilogue=mk.Epilogue(row_weight=route))
        y = mk.combine(y, tiles)
        return mk.quantize_dequantize(mk.gemm(y, weights[2]), mk.NVFP4)

    return run


@pytest.mark.parametrize("pack", [False, True], ids=["canonical", "packed"])
def test_a_layer_is_one_graph(pack):
    x, ids = torch.randn(4, 64).bfloat16(), torch.randint(0, 3, (4, 2), dtype=torch.int32)
    route = torch.rand(4, 2)
    weights = [mk.quantize(torch.randn(*s).bfloat16(), mk.MXFP4) for s in ((3, 64, 64), (3, 64, 32), (64, 64))]
    run = layer([mk.pack(w) for w in weights] if pack else weights, pack)
    want = run(x, ids, route)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x, ids, route), want)
    meta = layer([mk.pack(w).to("meta") if pack else w.to("meta") for w in weights], pack)
    got = meta(*(t.to("meta") for t in (x, ids, route)))
    assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_a_quantized_tensor_is_made_on_meta():
    q = mk.quantize(torch.empty(4, 64, device="meta"), mk.NVFP4)
    assert q.device.type == "meta"
    assert replace(q).shape == (4, 64)
    assert mk.dequantize(q).shape == (4, 64)
