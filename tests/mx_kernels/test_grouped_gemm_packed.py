"""Products with packed weights through the op on the CPU; the kernel: ``test_kernels_grouped_gemm.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels.packed_gemm import flat_product, grouped_gemm_packed_op

from .test_kernels_grouped_gemm import OAI, OTHERS, SILU, problem


@pytest.mark.parametrize("act", [SILU, OAI, *OTHERS], ids=lambda a: f"{a.kind}-{a.gated}" if a else "none")
@pytest.mark.parametrize("f", [mk.MXFP4, mk.NVFP4, mk.MXFP8, mk.MXFP6_E2M3], ids=str)
def test_a_packed_weight_gives_what_the_weight_gives(f, act):
    x, w, ids, epilogue = problem(f, (3, 96, 160), 5, 2, act)
    tiles = mk.moe_align_block_size(ids, 16, 3)
    gated = act is not None and act.gated
    p = mk.pack(w, gated=gated, layout=act.layout if act else "concatenated")
    got = mk.grouped_gemm(x, p, tiles, top_k=2, epilogue=epilogue)
    assert torch.equal(got, mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=epilogue))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_weights(dtype):
    ids = torch.randint(0, 3, (6, 2), dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 16, 3)
    x, w = torch.randn(6, 96).to(dtype), torch.randn(3, 40, 96).to(dtype)
    epilogue = mk.Epilogue(activation=SILU)
    got = mk.grouped_gemm(x, mk.pack(w, gated=True), tiles, top_k=2, epilogue=epilogue)
    assert torch.equal(got, mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=epilogue))


@pytest.mark.parametrize("rule", [None, "floor", "search"])
def test_rounded(rule):
    """Values instead of codes, from canonical and from packed weights, in grouped products and in linear layers."""
    x, w, ids, epilogue = problem(mk.MXFP4, (3, 128, 96), 5, 2, OAI)
    tiles = mk.moe_align_block_size(ids, 16, 3)
    p = mk.pack(w, gated=True, layout=OAI.layout)
    rule = None if rule is None else mk.ScaleRule(rule)
    want = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=epilogue, out_dtype=torch.float32)
    want = mk.quantize_dequantize(want, mk.MXFP8, rule=rule).bfloat16()
    rounded = replace(epilogue, round_to=mk.MXFP8, rule=rule)
    for weight in (w, p):
        got = mk.grouped_gemm(x, weight, tiles, top_k=2, epilogue=rounded, out_dtype=torch.bfloat16)
        assert torch.equal(got, want)
    one = mk.QuantizedTensor(w.data[0], w.scale[0], w.format, w.rule)
    linear = mk.Epilogue(activation=OAI, round_to=mk.MXFP8, rule=rule)
    want = mk.gemm(x, one, epilogue=mk.Epilogue(activation=OAI), out_dtype=torch.float32)
    want = mk.quantize_dequantize(want, mk.MXFP8, rule=rule).bfloat16()
    for weight in (one, mk.pack(one, gated=True, layout=OAI.layout)):
        assert torch.equal(mk.gemm(x, weight, epilogue=linear), want)


def test_gates_and_ups_without_an_activation_are_rounded_in_their_own_order():
    """A packed tile holds 8 gates, then 8 ups: its rows are no blocks of the result, so the kernel must not round there."""
    x, w, ids, _ = problem(mk.MXFP4, (3, 128, 96), 5, 2, None)
    tiles, p = mk.moe_align_block_size(ids, 16, 3), mk.pack(w, gated=True)
    rounded = mk.Epilogue(round_to=mk.MXFP8)
    assert "mxfp8_e4m3" not in flat_product(x, p, tiles, 2, rounded, None, torch.float32)
    assert "mxfp8_e4m3" in flat_product(x, mk.pack(w), tiles, 2, rounded, None, torch.float32)
    want = mk.quantize_dequantize(mk.grouped_gemm(x, w, tiles, top_k=2, out_dtype=torch.float32), mk.MXFP8)
    assert torch.equal(mk.grouped_gemm(x, p, tiles, top_k=2, epilogue=rounded, out_dtype=torch.float32), want)


def test_linear_and_requantized():
    w = mk.quantize(torch.randn(64, 96), mk.MXFP4)
    x = torch.randn(2, 5, 96).bfloat16()
    p = mk.pack(w)
    assert torch.equal(mk.gemm(x, p), mk.gemm(x, w))
    for act in (None, mk.Activation("gelu", gated=False)):
        epilogue = mk.Epilogue(torch.randn(64).bfloat16(), act, torch.rand(2, 5))
        assert torch.equal(mk.gemm(x, p, epilogue=epilogue), mk.gemm(x, w, epilogue=epilogue))
    q = mk.quantize(x, mk.MXFP8)
    assert torch.equal(mk.gemm(q, p, out_dtype=torch.float32), mk.gemm(q, w, out_dtype=torch.float32))
    to8 = mk.Epilogue(requantize_to=mk.MXFP8)
    a, b = mk.gemm(x, p, epilogue=to8), mk.gemm(x, w, epilogue=to8)
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_quantized_activations(name):
    w = mk.quantize(torch.randn(3, 32, 96), mk.NVFP4)
    tiles = mk.moe_align_block_size(torch.tensor([[0, 2], [1, 1]], dtype=torch.int32), 16, 3)
    q = mk.quantize(torch.randn(2, 96), name)
    got = mk.grouped_gemm(q, mk.pack(w), tiles, top_k=2, out_dtype=torch.float32)
    want = mk.grouped_gemm(q, w, tiles, top_k=2, out_dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)  # the global scale: on the values or on the sum


def test_bad_arguments():
    x, w, ids, _ = problem(mk.MXFP4, (3, 96, 160), 5, 2, None)
    tiles = mk.moe_align_block_size(ids, 16, 3)
    gated = mk.pack(w, gated=True)
    with pytest.raises(ValueError, match=r"pack\(w, gated=True, layout='interleaved'\)"):
        mk.grouped_gemm(x, gated, tiles, top_k=2, epilogue=mk.Epilogue(activation=OAI))
    with pytest.raises(ValueError, match="packed with gated=False"):
        mk.grouped_gemm(x, mk.pack(w), tiles, top_k=2, epilogue=mk.Epilogue(activation=SILU))
    with pytest.raises(ValueError, match="not gated"):
        mk.grouped_gemm(x, gated, tiles, top_k=2, epilogue=mk.Epilogue(activation=OTHERS[0]))
    with pytest.raises(ValueError, match="K = 128"):
        mk.grouped_gemm(x[:, :128], gated, tiles, top_k=2)
    with pytest.raises(TypeError, match="float16"):
        mk.grouped_gemm(x, mk.pack(torch.randn(3, 96, 160).half()), tiles, top_k=2)


def op_arguments():
    x, w, ids, epilogue = problem(mk.MXFP4, (3, 96, 160), 5, 2, SILU)
    tiles = mk.moe_align_block_size(ids, 16, 3)
    p = mk.pack(w, gated=True)
    return flat_product(x.contiguous(), p, tiles, 2, epilogue, epilogue.row_weight, torch.bfloat16)


def test_opcheck():
    torch.library.opcheck(grouped_gemm_packed_op, op_arguments())


def test_compiles_whole():
    x, w, ids, epilogue = problem(mk.MXFP4, (3, 96, 160), 5, 2, SILU)
    p = mk.pack(w, gated=True)

    def layer(x, ids):
        return mk.grouped_gemm(x, p, mk.moe_align_block_size(ids, 16, 3), top_k=2, epilogue=epilogue)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, ids), layer(x, ids))


def test_no_tokens():
    w = mk.pack(mk.quantize(torch.randn(3, 32, 96), mk.MXFP4))
    tiles = mk.moe_align_block_size(torch.empty((0, 2), dtype=torch.int32), 16, 3)
    assert mk.grouped_gemm(torch.empty(0, 96), w, tiles, top_k=2).shape == (0, 32)
