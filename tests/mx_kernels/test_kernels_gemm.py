"""The Triton GEMM on canonical weights: on a GPU against float64, and its index logic in Triton's interpreter.

Where an error comes from. Decoding is exact, and so is every product of two decoded operands in float32. What is left: sums in
float32 inside the matrix unit, which cuts off low bits of addends (measured on an H200 with K = 4096: at most 2^-21.3 of the
sum of magnitudes, 2^-20.5 for float16, which takes two products; here K <= 224, and the tests allow 2^-20), the activation (a
few 2^-23), and the output's one rounding (2^-9 relative for bf16, 2^-12 for fp16).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mx_kernels as mk

SUMS = 2.0**-20
SILU = mk.Activation("silu")
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
X_KINDS = (torch.bfloat16, torch.float16, mk.MXFP8, mk.MXFP4, mk.NVFP4)
W_KINDS = (torch.bfloat16, torch.float16, *mk.FORMATS.values())
gpu = pytest.mark.gpu


def operand(x, kind):
    return mk.quantize(x, kind) if isinstance(kind, mk.Format) else x.to(kind)


def exact(t):
    """The values that an operand stands for, float64 (a global scale times at most 6 bits is not exact in float32)."""
    if not isinstance(t, mk.QuantizedTensor):
        return t.double()
    if t.global_scale is None:
        return mk.reference.dequantize(t, torch.float32).double()
    g = t.global_scale
    ones = dataclasses.replace(t, global_scale=torch.ones_like(g))
    return mk.reference.dequantize(ones, torch.float32).double() * g.double().view(*g.shape, *(1,) * (t.ndim - g.ndim))


def check(got, x, w, ids, top_k, kept=None):
    """got [P, N] against float64, pair by pair; the bound is of the sums and of the output's rounding."""
    x, w, flat = exact(x), exact(w), ids.flatten()
    kept = torch.ones_like(flat, dtype=torch.bool) if kept is None else kept
    pairs = kept.nonzero().flatten()
    rows, experts = x[pairs // top_k], flat[pairs].long()
    want, size = torch.empty_like(got[pairs], dtype=torch.float64), torch.empty_like(got[pairs], dtype=torch.float64)
    for e in experts.unique().tolist():
        of = experts == e
        want[of], size[of] = rows[of] @ w[e].T, rows[of].abs() @ w[e].abs().T
    rounding = torch.finfo(got.dtype).eps / 2
    excess = (got[pairs].double() - want).abs() - SUMS * size - rounding * want.abs()
    assert excess.max() <= 0, f"{excess.max()} over the bound"


def routed(tokens, k, experts, spread=None):
    scores = torch.rand(tokens, experts if spread is None else spread, device="cuda")
    return scores.topk(k).indices.int()


@gpu
@pytest.mark.parametrize("w_kind", W_KINDS, ids=str)
@pytest.mark.parametrize("x_kind", X_KINDS, ids=str)
def test_pairs(x_kind, w_kind):
    """K and N off the tiles (K = 224 is 7 blocks of 32), some experts idle, every dtype out."""
    x, w = (
        operand(torch.randn(70, 224, device="cuda"), x_kind),
        operand(torch.randn(9, 200, 224, device="cuda"), w_kind),
    )
    ids = routed(70, 2, 9, 7)
    tiles = mk.moe_align_block_size(ids, 16, 9)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        got = mk.grouped_gemm(x, w, tiles, top_k=2, out_dtype=out)
        assert got.dtype == out
        check(got, x, w, ids, 2)


@gpu
@pytest.mark.parametrize("x_kind", [torch.float32, torch.bfloat16])
def test_float32(x_kind):
    x, w = torch.randn(40, 96, device="cuda").to(x_kind), torch.randn(3, 64, 96, device="cuda")
    ids = routed(40, 2, 3)
    got = mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, 32, 3), top_k=2, out_dtype=torch.float32)
    check(got, x, w, ids, 2)


@gpu
@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_every_code_and_scale(format):
    """x is the identity, so the product is the decoded weight: all codes times all scales, bit for bit."""
    codes = 1 << format.element.bits
    k = max(codes, 64)
    scales = torch.arange(0, 256 if format.scale == "e8m0" else 127, device="cuda", dtype=torch.uint8)
    # zeros of x times an infinity would be NaN: leave out what overflows, and NaN
    top = 254 - format.element.emax if format.scale == "e8m0" else 127
    scales = scales[:top]
    code = torch.arange(k, device="cuda") % codes
    values = mk.reference.decode(code.to(torch.uint8).cpu(), format.element).cuda()
    code = torch.where(values.isfinite(), code, 0).to(torch.uint8)
    data = mk.reference.pack_codes(code.expand(len(scales), k).contiguous(), format).view(format.data_dtype)
    scale = scales[:, None].expand(-1, k // format.block).contiguous().view(format.scale_dtype)
    g = torch.tensor(0.75, device="cuda") if format.has_global_scale else None
    w = mk.QuantizedTensor(data, scale, format, format.default_rule, torch.float32, g)
    got = mk.gemm(torch.eye(k, device="cuda").bfloat16(), w, out_dtype=torch.float32).T
    # finer than bf16's smallest subnormal is rounded to it; everything else is a bf16 already (times the global scale)
    plain = w if g is None else dataclasses.replace(w, global_scale=torch.ones_like(g))
    want = mk.reference.dequantize(plain, torch.float32).bfloat16().float()
    want = want if g is None else want * g
    assert torch.equal(got, want)


@gpu
@pytest.mark.parametrize("format", [mk.MXFP8, mk.MXFP8_E5M2, mk.MXFP4, mk.NVFP4], ids=str)
def test_nan_stays_in_its_row(format):
    w = mk.quantize(torch.randn(64, 96, device="cuda"), format)
    scale = w.scale.view(torch.uint8).clone()
    scale[5, 1] = 255 if format.scale == "e8m0" else 127
    data = w.data.view(torch.uint8).clone()
    if format.element.bits == 8:
        data[7, 3] = 0x7F
    bad = dataclasses.replace(w, scale=scale.view(format.scale_dtype), data=data.view(format.data_dtype))
    got = mk.gemm(torch.randn(20, 96, device="cuda").bfloat16(), bad).isnan()
    want = torch.zeros_like(got)
    want[:, [5, 7] if format.element.bits == 8 else [5]] = True
    assert torch.equal(got, want)


ROUTINGS = [
    (1, 1, 4, None),
    (1, 4, 128, None),
    (5, 3, 40, None),
    (16, 4, 128, 3),
    (64, 1, 4, 1),
    (200, 4, 16, None),
    (300, 2, 8, 2),
]


@gpu
@pytest.mark.parametrize("block", [16, 64, 160, 256])
@pytest.mark.parametrize(("tokens", "k", "experts", "spread"), ROUTINGS)
def test_routings(tokens, k, experts, spread, block):
    """Self-routed and sorted, one token, all to one expert, blocks larger than a tile."""
    x = torch.randn(tokens, 64, device="cuda").bfloat16()
    ids = routed(tokens, k, experts, None if spread is None else max(k, spread))
    w = mk.quantize(torch.randn(experts, 96, 64, device="cuda"), mk.MXFP4)
    tiles = mk.moe_align_block_size(ids, block, experts)
    assert (tiles.sorted_ids is None) == (tokens * k <= 64)
    check(mk.grouped_gemm(x, w, tiles, top_k=k), x, w, ids, k)


@gpu
@pytest.mark.parametrize("experts", [1, 2, 60, 512])
@pytest.mark.parametrize("tokens", [3, 700])
def test_any_number_of_experts(tokens, experts):
    """Odd multiples of 32 as K and N; with 512 experts most are idle or have few tokens."""
    x, k = torch.randn(tokens, 96, device="cuda").bfloat16(), min(8, experts)
    ids = routed(tokens, k, experts)
    w = mk.quantize(torch.randn(experts, 160, 96, device="cuda"), mk.MXFP8)
    tiles = mk.moe_align_block_size(ids, 16, experts)
    check(mk.grouped_gemm(x, w, tiles, top_k=k), x, w, ids, k)


@gpu
@pytest.mark.parametrize(("n", "k"), [(5760, 2880), (2880, 2880), (2048, 768), (4096, 256), (288, 1056)])
def test_sizes_of_models(n, k):
    """2880 = 22.5 tiles of 128; 768 and 256 as slices of an intermediate size; odd multiples of 32."""
    for x_kind, w_kind in ((torch.bfloat16, mk.MXFP4), (mk.MXFP8, mk.MXFP8), (torch.float16, mk.NVFP4)):
        x, w = operand(torch.randn(90, k, device="cuda"), x_kind), operand(torch.randn(3, n, k, device="cuda"), w_kind)
        ids = routed(90, 2, 3)
        check_large(
            mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, 64, 3), top_k=2, out_dtype=torch.float32), x, w, ids
        )


def check_large(got, x, w, ids):
    """Against float64 in the Frobenius norm: sums of thousands of terms pass ``SUMS`` in single outputs, 1e-5 in none of all."""
    x, w, flat = exact(x), exact(w), ids.flatten().long()
    for e in range(len(w)):
        of = (flat == e).nonzero().flatten()
        want = x[of // 2] @ w[e].T
        assert (got[of] - want).norm() <= 1e-5 * want.norm()


@gpu
def test_dropped_pairs_and_nothing():
    w = mk.quantize(torch.randn(6, 96, 64, device="cuda"), mk.MXFP8)
    for tokens in (10, 100):
        x = torch.randn(tokens, 64, device="cuda").bfloat16()
        ids = torch.randint(-2, 8, (tokens, 2), device="cuda", dtype=torch.int32)
        kept = ((ids >= 0) & (ids < 6)).flatten()
        got = mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, 16, 6), top_k=2)
        check(got, x, w, ids, 2, kept)
        table = torch.tensor([-1, 3, 0, -1, 5, 1, 2, -1], dtype=torch.int32, device="cuda")
        ids = torch.randint(0, 9, (tokens, 2), device="cuda", dtype=torch.int32)
        local = torch.cat((table, table[:1]))[ids.long()]
        tiles = mk.moe_align_block_size(ids, 16, 6, table)
        got = mk.grouped_gemm(x, w, tiles, top_k=2)
        check(got, x, w, local, 2, (local >= 0).flatten())
    empty = mk.moe_align_block_size(ids[:0], 16, 6)
    assert mk.grouped_gemm(x[:0], w, empty, top_k=2).shape == (0, 96)
    assert mk.gemm(x[:0], w[0]).shape == (0, 96)
    everything_dropped = mk.moe_align_block_size(torch.full((100, 2), -1, device="cuda", dtype=torch.int32), 16, 6)
    assert mk.grouped_gemm(x, w, everything_dropped, top_k=2).shape == (200, 96)
    got = mk.gemm(torch.zeros(5, 0, device="cuda"), torch.zeros(8, 0, device="cuda"))
    assert got.eq(0).all()


ACTIVATIONS = [
    None,
    SILU,
    OAI,
    dataclasses.replace(OAI, layout="concatenated", beta=0.0),
    mk.Activation("gelu", "interleaved", limit=1.0),
    mk.Activation("gelu_tanh"),
    mk.Activation("relu2", gated=False),
    mk.Activation("identity", limit=0.5),
]


@gpu
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_epilogue(activation):
    """Bias, activation, row weight and width off the tile against the reference on the CPU, in float32."""
    n = 2 * 104 if activation is not None and activation.gated else 104
    x, w = torch.randn(80, 96, device="cuda").bfloat16(), mk.quantize(torch.randn(5, n, 96, device="cuda"), mk.MXFP8)
    ids, weights = routed(80, 2, 5), torch.randn(80, 2, device="cuda")
    bias = torch.randn(5, n, device="cuda").bfloat16()
    tiles = mk.moe_align_block_size(ids, 32, 5)
    got = mk.grouped_gemm(
        x, w, tiles, top_k=2, epilogue=mk.Epilogue(bias, activation, weights), out_dtype=torch.float32
    )
    epilogue = mk.Epilogue(bias.cpu(), activation, weights.cpu())
    away = mk.moe_align_block_size(ids.cpu(), 32, 5)
    want = mk.grouped_gemm(x.cpu(), w.to("cpu"), away, top_k=2, epilogue=epilogue, out_dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@gpu
@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_requantize(format):
    """The same bits as the float32 result, quantized."""
    x, w = torch.randn(80, 96, device="cuda").bfloat16(), mk.quantize(torch.randn(5, 320, 96, device="cuda"), mk.MXFP8)
    ids = routed(80, 2, 5)
    tiles = mk.moe_align_block_size(ids, 32, 5)
    for rule in format.rules:
        got = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=mk.Epilogue(None, SILU, None, format, rule))
        plain = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=mk.Epilogue(activation=SILU), out_dtype=torch.float32)
        want = mk.quantize(plain, format, rule=rule)
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))
        assert got.dtype == torch.bfloat16


@gpu
def test_gemm_shapes_and_strides():
    w = mk.quantize(torch.randn(300, 160, device="cuda"), mk.MXFP4)
    ids = lambda rows: torch.zeros(rows, 1, device="cuda", dtype=torch.int32)  # noqa: E731
    for rows in (1, 20, 50, 200):
        x = torch.randn(rows, 400, device="cuda").bfloat16()[:, 100:260]
        check(mk.gemm(x, w), x, w[None], ids(rows), 1)
    x = mk.quantize(torch.randn(3, 4, 7, 160, device="cuda"), mk.NVFP4)  # a global scale for each [7, 160]
    got = mk.gemm(x, w, out_dtype=torch.float32)
    check(got.view(84, 300), exact(x).view(84, 160), w[None], ids(84), 1)
    every_other = mk.quantize(torch.randn(4, 64, 160, device="cuda"), mk.MXFP8)[::2]
    x = torch.randn(30, 160, device="cuda").bfloat16()
    chosen = routed(30, 1, 2)
    got = mk.grouped_gemm(x, every_other, mk.moe_align_block_size(chosen, 16, 2))
    check(got, x, every_other, chosen, 1)


@gpu
def test_past_two_to_the_31():
    """The last expert starts past 2^31 bytes, and the last rows of x and of the result too."""
    w = torch.zeros(3, 1 << 15, 1 << 15, dtype=torch.uint8, device="cuda")
    w[2, -300:] = torch.randint(0, 120, (300, 1 << 15), dtype=torch.uint8, device="cuda")
    scale = torch.full((3, 1 << 15, 1 << 10), 120, dtype=torch.uint8, device="cuda")
    big = mk.QuantizedTensor(w.view(torch.float8_e4m3fn), scale, mk.MXFP8, mk.MXFP8.default_rule)
    x = torch.randn(70, 1 << 15, device="cuda").bfloat16()
    got = mk.grouped_gemm(x, big, mk.moe_align_block_size(torch.full((70, 1), 2, device="cuda"), 64, 3))
    assert got[:, :-300].eq(0).all()
    last = big[2][-300:]
    check(got[:, -300:], x, last[None], torch.zeros(70, 1, device="cuda", dtype=torch.int32), 1)
    del w, scale, big
    rows = (1 << 26) + 5
    tall = torch.zeros(rows, 32, device="cuda", dtype=torch.bfloat16)
    tall[-3:] = 1
    got = mk.gemm(tall, torch.ones(48, 32, device="cuda", dtype=torch.bfloat16))
    assert got[-3:].eq(32).all()
    assert got[:-3].count_nonzero() == 0


@gpu
def test_deterministic_graph_compile_opcheck():
    x, w13 = (
        torch.randn(90, 128, device="cuda").bfloat16(),
        mk.quantize(torch.randn(8, 192, 128, device="cuda"), mk.MXFP4),
    )
    w2, weights = mk.quantize(torch.randn(8, 128, 96, device="cuda"), mk.MXFP8), torch.rand(90, 2, device="cuda")
    ids = routed(90, 2, 8)

    def layer(x, ids, weights):
        tiles = mk.moe_align_block_size(ids, 16, 8)
        h = mk.grouped_gemm(
            mk.quantize(x, mk.MXFP8), w13, tiles, top_k=2, epilogue=mk.Epilogue(None, SILU, None, mk.MXFP8)
        )
        return mk.combine(mk.grouped_gemm(h, w2, tiles, epilogue=mk.Epilogue(row_weight=weights)), tiles)

    want = layer(x, ids, weights)
    assert torch.equal(layer(x, ids, weights), want)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, ids, weights), want)
    few = layer(x[:9], ids[:9], weights[:9])
    torch.testing.assert_close(few, want[:9], rtol=2**-7, atol=2**-7 * float(want.abs().max()))
    graph = torch.cuda.CUDAGraph()
    buffers = [t.clone() for t in (x, ids, weights)]
    with torch.cuda.graph(graph):
        out = layer(*buffers)
    other = torch.randn_like(x), routed(90, 2, 8), torch.rand_like(weights)
    for buffer, value in zip(buffers, other, strict=True):
        buffer.copy_(value)
    graph.replay()
    assert torch.equal(out, layer(*other))
    from mx_kernels.dispatch import flat_operand

    q, tiles = mk.quantize(x, mk.MXFP8), mk.moe_align_block_size(ids, 16, 8)
    act = ("silu", "concatenated", True, 0.0, 0.0, float("inf"))
    rest = (None, *act, None, "mxfp4", "even", torch.bfloat16)
    route = (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded, 16, 180, 2)
    args = (*flat_operand(q), *flat_operand(w13), *route, *rest)
    torch.library.opcheck(torch.ops.mx_kernels.grouped_gemm.default, args)
    torch.library.opcheck(torch.ops.mx_kernels.gemm.default, (*flat_operand(q), *flat_operand(w13[0]), *rest))


INTERPRETED = """
import torch
import mx_kernels as mk
from mx_kernels.dispatch import flat_activation, flat_operand
from mx_kernels.kernels import generic_gemm

torch.manual_seed(0)
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
GELU = mk.Activation("gelu_tanh", gated=False)
cases = [(torch.bfloat16, mk.MXFP4, 8, OAI, None), (mk.MXFP8, mk.MXFP6_E2M3, 128, mk.Activation("silu"), mk.MXFP4),
         (mk.NVFP4, mk.NVFP4, 16, GELU, None), (torch.float32, mk.MXFP6_E3M2, 32, None, mk.MXFP6_E3M2),
         (torch.bfloat16, mk.MXFP8, 16, None, None), (torch.bfloat16, mk.MXFP4, 160, mk.Activation("silu"), None)]
for i, (xk, wk, block, act, to) in enumerate(cases):
    x, n = torch.randn(9, 96), 192 if act is not None and act.gated else 96
    w = mk.quantize(torch.randn(5, n, 96), wk)
    x = mk.quantize(x, xk) if isinstance(xk, mk.Format) else x.to(xk)
    ids = torch.randint(-1, 6, (9, 2), dtype=torch.int32)
    kept = ((ids >= 0) & (ids < 5)).flatten()
    bias, weights = torch.randn(5, n), torch.rand(18)
    tiles = mk.moe_align_block_size(ids, block, 5)
    epilogue = mk.Epilogue(bias, act, weights, to)
    want = mk.reference.grouped_gemm(x, w, tiles, top_k=2, epilogue=epilogue, out_dtype=torch.float32)
    rest = (bias, *flat_activation(act), weights, to.name if to else "", to.default_rule.value if to else "", torch.float32)
    routing = (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded) if i % 2 else (None, ids.flatten(), ids[0, :0])
    got, scale = generic_gemm.grouped_gemm(*flat_operand(x), *flat_operand(w), *routing, block, 18, 2, *rest)
    if to is None:
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-4)
    else:  # a result on a rounding boundary may fall to either side
        assert (got[kept] != want.data[kept]).float().mean() < 0.01
        assert (scale[kept] != want.scale[kept]).float().mean() < 0.01
print("right")
"""


@pytest.mark.compile
def test_interpreted(interpreted):
    """Rows, experts, tails, both routings, gate and up, packing, on the CPU: full float32, since the interpreter has no bf16."""
    triton = pytest.importorskip("triton")
    import numpy

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        pytest.skip("the interpreter of Triton 3.9 refuses masks that a scalar comparison went into")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    interpreted(INTERPRETED)
