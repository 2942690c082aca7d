"""grouped_gemm: each pair against its own expert, on every mix of operands, and the experts that it does not touch."""

from __future__ import annotations

import sys

import pytest
import torch

import mx_kernels as mk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = (*DTYPES, *mk.FORMATS.values())
SILU = mk.Activation("silu")
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
ACTIVATIONS = (
    None,
    SILU,
    OAI,
    mk.Activation("gelu", "interleaved", limit=3.0),
    mk.Activation("gelu_tanh"),
    mk.Activation("relu2", gated=False),
)


def operand(x, kind):
    return mk.quantize(x, kind) if isinstance(kind, mk.Format) else x.to(kind)


def exact(t):
    """The values that an operand stands for, float64."""
    if not isinstance(t, mk.QuantizedTensor):
        return t.double()
    if t.global_scale is None:
        return mk.dequantize(t, torch.float32).double()
    g = t.global_scale
    ones = mk.QuantizedTensor(t.data, t.scale, t.format, t.rule, torch.float32, torch.ones_like(g))
    return mk.dequantize(ones).double() * g.double().view(*g.shape, *(1,) * (t.ndim - g.ndim))


def dense(x, w, ids, top_k, epilogue=None):
    """One pair after the other, in float64; NaN for dropped pairs (ids: rows of w, -1 dropped)."""
    epilogue = epilogue or mk.Epilogue()
    x, w, rows = exact(x), exact(w), []
    for p, e in enumerate(ids.flatten().tolist()):
        h = w[max(e, 0)] @ x[p // top_k]
        if epilogue.bias is not None:
            h = h + epilogue.bias[max(e, 0)].double()
        if epilogue.activation is not None:
            h = mk.reference.activated(h, epilogue.activation)
        if epilogue.row_weight is not None:
            h = h * epilogue.row_weight.flatten()[p].double()
        rows.append(h if e >= 0 else torch.full_like(h, torch.nan))
    return torch.stack(rows)


def compare(got, want):
    """Float32 sums of K = 64 products of size about 1, then one rounding of the output; dropped rows are zero."""
    dropped = want.isnan().all(-1)
    assert got[dropped].eq(0).all()
    got, want = got[~dropped], want[~dropped]
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps / 2 + 2e-6, atol=2e-5 * float(want.abs().max()))


def problem(tokens=7, k=2, experts=5, n=64, width=64):
    ids = torch.randint(0, experts, (tokens, k))
    return torch.randn(tokens, width), torch.randn(experts, n, width), ids


@pytest.mark.parametrize("w_kind", OPERANDS, ids=str)
@pytest.mark.parametrize("x_kind", OPERANDS, ids=str)
def test_pairs(x_kind, w_kind):
    x, w, ids = problem()
    x, w = operand(x, x_kind), operand(w, w_kind)
    tiles = mk.moe_align_block_size(ids, 16, 5)
    want = dense(x, w, ids, 2)
    for out in DTYPES:
        got = mk.grouped_gemm(x, w, tiles, top_k=2, out_dtype=out)
        assert got.dtype == out
        compare(got, want)
    assert mk.grouped_gemm(x, w, tiles, top_k=2).dtype == x.dtype


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_epilogue(activation, biased, weighted):
    x, w, ids = problem()
    epilogue = mk.Epilogue(
        torch.randn(5, 64).bfloat16() if biased else None, activation, torch.randn(7, 2) if weighted else None
    )
    tiles = mk.moe_align_block_size(ids, 16, 5)
    got = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=epilogue)
    compare(got, dense(x, w, ids, 2, epilogue))


def test_grouped_mm():
    """torch's own grouped product of sorted rows."""
    ids = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3]).view(-1, 1)
    x, w = torch.randn(9, 32).bfloat16(), torch.randn(4, 24, 32).bfloat16()
    ends = torch.tensor([3, 3, 5, 9], dtype=torch.int32)
    want = torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends)
    got = mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, 16, 4))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-9)  # both round to bf16, perhaps on different sides


def moe(x, ids, weights, w13, w2, activation, b13=None, b2=None):
    tiles = mk.moe_align_block_size(ids, 16, w13.shape[0])
    h = mk.grouped_gemm(x, w13, tiles, top_k=ids.shape[1], epilogue=mk.Epilogue(b13, activation))
    y = mk.grouped_gemm(h, w2, tiles, epilogue=mk.Epilogue(b2, row_weight=weights))
    return mk.combine(y, tiles)


def test_transformers_gpt_oss():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=6)
    theirs = GptOssExperts(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, ids, weights = torch.randn(11, 32), torch.randint(0, 6, (11, 3)), torch.rand(11, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(11)])
    p = {name: value.detach() for name, value in theirs.named_parameters()}
    ours = moe(
        *(x, ids, weights),
        *(p["gate_up_proj"].transpose(1, 2).contiguous(), p["down_proj"].transpose(1, 2).contiguous(), OAI),
        *(p["gate_up_proj_bias"], p["down_proj_bias"]),
    )
    with torch.no_grad():
        want = GptOssExperts.forward(theirs, x, ids, weights)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_transformers_mixtral():
    """The Mixtral formula, written out, and transformers' module where it is installed."""
    x, ids, weights = torch.randn(11, 32), torch.stack([torch.randperm(6)[:2] for _ in range(11)]), torch.rand(11, 2)
    w13, w2 = torch.randn(6, 96, 32), torch.randn(6, 32, 48)
    ours = moe(x, ids, weights, w13, w2, SILU)
    want = torch.zeros_like(x)
    for t in range(11):
        for slot in range(2):
            gate, up = (w13[ids[t, slot]] @ x[t]).chunk(2)
            want[t] += weights[t, slot] * (w2[ids[t, slot]] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-3)
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    theirs = MixtralExperts(transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=6))
    with torch.no_grad():
        theirs.gate_up_proj.copy_(w13)
        theirs.down_proj.copy_(w2)
        torch.testing.assert_close(ours, theirs(x, ids, weights), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_routings(rows):
    """No tokens, one token, all to one expert, experts without tokens, dropped pairs, an expert map."""
    _, w, _ = problem(experts=9)
    for tokens, k, low, high in (
        (0, 2, 0, 9),
        (1, 2, 0, 9),
        (1, 1, 3, 4),
        (20, 2, 3, 4),
        (20, 3, 2, 5),
        (20, 2, -2, 10),
    ):
        ids, x = torch.randint(low, high, (tokens, k)), torch.randn(tokens, 64)
        local = torch.where((ids < 0) | (ids >= 9), -1, ids)
        got = mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, rows, 9), top_k=k)
        assert got.shape == (tokens * k, 64)
        if tokens:
            compare(got, dense(x, w, local, k))
    table = torch.tensor([4, -1, 2, -1, 0, 1, -1, 3, -1, -1, -1, -1, 8], dtype=torch.int32)
    ids, x = torch.randint(0, 14, (20, 2)), torch.randn(20, 64)
    local = torch.cat((table, torch.tensor([-1])))[ids]
    got = mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, rows, 9, table), top_k=2)
    compare(got, dense(x, w, local, 2))


def test_only_hit_experts_are_decoded(monkeypatch):
    module, decoded = sys.modules["mx_kernels.grouped_gemm"], []
    real = module.dequantize
    monkeypatch.setattr(module, "dequantize", lambda t, dtype: decoded.append(tuple(t.shape)) or real(t, dtype))
    w = mk.quantize(torch.randn(64, 32, 64), mk.MXFP4)
    w.scale[5] = 255  # an expert that nobody hits may hold anything
    ids = torch.tensor([[3, 60], [60, 7], [-1, 3]])
    for _ in range(2):
        got = mk.grouped_gemm(torch.randn(3, 64), w, mk.moe_align_block_size(ids, 16, 64), top_k=2)
        assert decoded == [(32, 64)] * 3
        assert got.isfinite().all()
        decoded.clear()
        ids = ids.repeat(20, 1)[:3]


@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_requantize(format):
    """Quantized from the float32 result; dropped rows do not reach NVFP4's global scale."""
    x, w, ids = problem(n=128)
    ids[0, 0] = -1
    tiles = mk.moe_align_block_size(ids, 16, 5)
    for rule in (None, *format.rules):
        got = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=mk.Epilogue(None, SILU, None, format, rule))
        plain = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=mk.Epilogue(activation=SILU))
        want = mk.quantize(plain, format, rule=rule)
        assert (got.format, got.rule, got.shape) == (format, rule or format.default_rule, (14, 64))
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))
        if format.has_global_scale:
            assert torch.equal(got.global_scale, want.global_scale)


def test_global_scale_per_expert_or_shared():
    x, w, ids = problem()
    w = w * torch.arange(1, 6).view(5, 1, 1)
    tiles = mk.moe_align_block_size(ids, 16, 5)
    for g in (torch.rand(5) * 0.01 + 0.01, torch.tensor(0.02)):
        q = mk.quantize(w, mk.NVFP4, global_scale=g)
        compare(mk.grouped_gemm(x, q, tiles, top_k=2), dense(x, q, ids, 2))


def test_deterministic_and_untouched():
    x, w, ids = problem(tokens=40)
    q, weights = mk.quantize(w, mk.MXFP8), torch.rand(40, 2)
    copies = [t.clone() for t in (x, q.data.view(torch.uint8), q.scale, ids, weights)]
    tiles = mk.moe_align_block_size(ids, 16, 5)
    results = [mk.grouped_gemm(x, q, tiles, top_k=2, epilogue=mk.Epilogue(row_weight=weights)) for _ in range(2)]
    assert torch.equal(*results)
    for a, b in zip((x, q.data.view(torch.uint8), q.scale, ids, weights), copies, strict=True):
        assert torch.equal(a, b)
    again = mk.grouped_gemm(
        x, q, mk.moe_align_block_size(ids, 64, 5), top_k=2, epilogue=mk.Epilogue(row_weight=weights)
    )
    assert torch.equal(results[0], again), "the block size decides nothing"


def refusals():
    x, w, ids = torch.randn(4, 64), torch.randn(3, 64, 64), torch.tensor([[0, 1], [1, 2], [0, 2], [0, 0]])
    tiles, e = mk.moe_align_block_size(ids, 16, 3), mk.Epilogue
    two = {"top_k": 2}
    return [
        ((x.double(), w, tiles), two, TypeError, "x is torch.float64"),
        ((x, "w", tiles), two, TypeError, "w is a str"),
        ((x, w[0], tiles), two, ValueError, r"w \(64, 64\)"),
        ((x[None], w, tiles), two, ValueError, r"x has shape \(1, 4, 64\)"),
        ((x, w[..., :32].contiguous(), tiles), two, ValueError, "x has K = 64 and w has K = 32"),
        ((x, w.transpose(1, 2), tiles), two, ValueError, "w has stride"),
        ((x.T.contiguous().T, w, tiles), two, ValueError, "x has stride"),
        ((x, w.to("meta"), tiles), two, ValueError, "w is on meta"),
        ((x.to("meta"), w.to("meta"), tiles), two, ValueError, "the alignment is on cpu"),
        ((x, w[:2], tiles), two, ValueError, "w has 2 experts, but the alignment was made for 3"),
        ((x, w, tiles), {}, ValueError, "x has 4 rows and top_k is 1, but the alignment has 8 pairs"),
        ((x, w, tiles), {"top_k": 0}, ValueError, "top_k is 0"),
        ((x, w, tiles), {**two, "out_dtype": torch.int8}, TypeError, "out_dtype"),
        (
            (x, w, tiles),
            {**two, "epilogue": e(bias=torch.zeros(64))},
            ValueError,
            r"bias has shape \(64,\), needs \(3, 64\)",
        ),
        ((x, w, tiles), {**two, "epilogue": e(bias=torch.zeros(3, 64).int())}, TypeError, "bias is"),
        ((x, w, tiles), {**two, "epilogue": e(row_weight=torch.zeros(4))}, ValueError, "needs 8 values"),
        ((x, w, tiles), {**two, "epilogue": e(row_weight=torch.zeros(8).bfloat16())}, TypeError, "row_weight is"),
        ((x, w[:, :63], tiles), {**two, "epilogue": e(activation=SILU)}, ValueError, "odd width"),
        ((x, w[:, :48], tiles), {**two, "epilogue": e(requantize_to=mk.MXFP8)}, ValueError, "the output's width is 48"),
        ((x, w, tiles), {**two, "epilogue": e(rule="even")}, ValueError, "without requantize_to"),
    ]


@pytest.mark.parametrize("case", range(len(refusals())))
def test_refused(case):
    args, kwargs, error, message = refusals()[case]
    with pytest.raises(error, match=message):
        mk.grouped_gemm(*args, **kwargs)


def test_op():
    from mx_kernels.dispatch import flat_operand

    x, w, ids = problem()
    op = torch.ops.mx_kernels.grouped_gemm.default
    act = ("silu", "concatenated", True, 0.0, 0.0, float("inf"))
    none = ("", "concatenated", False, 0.0, 0.0, float("inf"))
    tiles = mk.moe_align_block_size(ids, 16, 5)
    route = (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded, 16, 14, 2)
    torch.library.opcheck(op, (*flat_operand(x), *flat_operand(w), *route, None, *none, None, "", "", torch.bfloat16))
    q, v = mk.quantize(x, mk.MXFP8), mk.quantize(w, mk.NVFP4)
    rest = (torch.randn(5, 64), *act, torch.rand(14), "mxfp4", "even", torch.float32)
    torch.library.opcheck(op, (*flat_operand(q), *flat_operand(v), *route, *rest))
    alone = (None, ids.flatten().int(), tiles.num_padded[:0], 16, 14, 2)
    torch.library.opcheck(op, (*flat_operand(q), *flat_operand(v), *alone, *rest))


def test_compiles_and_meta():
    x, w, ids = problem()
    w13, w2, weights = mk.quantize(w, mk.MXFP4), mk.quantize(torch.randn(5, 64, 32), mk.MXFP8), torch.rand(7, 2)

    def f(x, ids, weights):
        tiles = mk.moe_align_block_size(ids, 16, 5)
        epilogue = mk.Epilogue(activation=SILU, requantize_to=mk.MXFP8)
        h = mk.grouped_gemm(mk.quantize(x, mk.MXFP8), w13, tiles, top_k=2, epilogue=epilogue)
        y = mk.grouped_gemm(h, w2, tiles, epilogue=mk.Epilogue(row_weight=weights))
        return mk.combine(y, tiles)

    want = f(x, ids, weights)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, ids, weights), want)
    w13, w2 = w13.to("meta"), w2.to("meta")
    got = f(x.to("meta"), ids.to("meta"), weights.to("meta"))
    assert got.shape == want.shape
    assert got.device.type == "meta"


def test_block_size():
    assert mk.block_size(8, 4, "cpu") == 16
    sizes = [mk.block_size(pairs * 128, 128, "cuda") for pairs in (0, 1, 8, 9, 32, 33, 128, 129, 4096)]
    assert sizes == [16, 16, 16, 32, 32, 64, 64, 128, 128]


def test_twin():
    x, w, ids = problem()
    tiles = mk.moe_align_block_size(ids, 16, 5)
    q, epilogue = mk.quantize(w, mk.MXFP6_E2M3), mk.Epilogue(torch.randn(5, 64), OAI, torch.randn(14))
    a = mk.grouped_gemm(x, q, tiles, top_k=2, epilogue=epilogue)
    assert torch.equal(a, mk.reference.grouped_gemm(x, q, tiles, top_k=2, epilogue=epilogue))
