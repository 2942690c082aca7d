"""gemm: plain and quantized operands against float64, the epilogue in its order."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = (*DTYPES, *mk.FORMATS.values())
SILU = mk.Activation("silu")
ACTIVATIONS = (
    None,
    SILU,
    mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0),
    mk.Activation("gelu", "interleaved"),
    mk.Activation("gelu_tanh", gated=False),
    mk.Activation("relu2", gated=False, limit=2.0),
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


def activated(h, a):
    return h if a is None else mk.reference.activated(h, a)


def oracle(x, w, bias=None, activation=None, row_weight=None):
    """[M, K] x [N, K] in float64 and a bound of the float32 sum's error before the epilogue: K products, 2^-24 each."""
    x, w = exact(x), exact(w)
    acc = x @ w.T
    slack = (x.abs() @ w.abs().T) * (x.shape[-1] + 4) * 2.0**-24
    acc = acc if bias is None else acc + bias.double()
    out = activated(acc, activation)
    # An activation's slope is at most 2 here in each of gate and up; values reach u and g themselves.
    if activation is not None:
        size = acc.abs().amax() + 2
        slack = torch.full_like(out, float(slack.max() * 4 * size)) + 16 * 2.0**-24 * (1 + out.abs())
    if row_weight is not None:
        out, slack = out * row_weight.double()[:, None], slack * row_weight.abs().double()[:, None]
    return out, slack + out.abs() * 2.0**-22


def check(got, want, slack):
    ulp = torch.finfo(got.dtype).eps / 2  # the output's one rounding
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    assert ((got.double() - want).abs() <= slack * 1.01 + want.abs() * ulp + smallest).all()


@pytest.mark.parametrize("w_kind", OPERANDS, ids=str)
@pytest.mark.parametrize("x_kind", OPERANDS, ids=str)
def test_pairs(x_kind, w_kind):
    x, w = operand(torch.randn(9, 96), x_kind), operand(torch.randn(40, 96), w_kind)
    want, slack = oracle(x, w)
    for out in DTYPES:
        got = mk.gemm(x, w, out_dtype=out)
        assert got.dtype == out
        check(got, want, slack)
    assert mk.gemm(x, w).dtype == x.dtype


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_epilogue(activation, biased, weighted):
    x, w = torch.randn(9, 64).bfloat16(), mk.quantize(torch.randn(64, 64), mk.MXFP8)
    bias = torch.randn(64).bfloat16() if biased else None
    weight = torch.randn(9) if weighted else None
    got = mk.gemm(x, w, epilogue=mk.Epilogue(bias, activation, weight), out_dtype=torch.float32)
    check(got, *oracle(x, w, bias, activation, weight))
    assert got.shape == (9, 64 if activation is None or not activation.gated else 32)


def test_bias_before_row_weight():
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    epilogue = mk.Epilogue(bias=torch.ones(3), row_weight=torch.tensor([2.0, 0.0]))
    assert mk.gemm(x, w, epilogue=epilogue).tolist() == [[10.0] * 3, [0.0] * 3]


def test_exact_small_integers():
    """Products and sums of small integers are exact in float32: bitwise equality, whatever the order of the sum."""
    x = torch.randint(-4, 5, (17, 128)).bfloat16()
    for f in mk.FORMATS.values():
        codes = torch.randint(-2, 3, (33, 128)).float()
        codes[:, ::16] = (
            6.0 if f.element.name == "e2m1" else 4.0
        )  # each block's amax is a power of two off the maximum, or it
        w = mk.quantize(codes, f, global_scale=torch.ones(()) if f.has_global_scale else None)
        if torch.equal(mk.dequantize(w, torch.float32), codes):
            assert torch.equal(mk.gemm(x, w, out_dtype=torch.float32), x.float() @ codes.T)
        else:
            pytest.fail(f"{f} does not hold its own integers")


@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_requantize(format):
    """Quantized from the float32 result, not from a rounded one."""
    x, w = torch.randn(5, 3, 64).bfloat16(), torch.randn(128, 64).bfloat16()
    for rule in (None, *format.rules):
        got = mk.gemm(x, w, epilogue=mk.Epilogue(activation=SILU, requantize_to=format, rule=rule))
        plain = mk.gemm(x, w, epilogue=mk.Epilogue(activation=SILU), out_dtype=torch.float32)
        want = mk.quantize(plain, format, rule=rule)
        assert (got.format, got.rule, got.dtype, got.shape) == (
            format,
            rule or format.default_rule,
            torch.bfloat16,
            (5, 3, 64),
        )
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))
        if format.has_global_scale:
            assert torch.equal(got.global_scale, want.global_scale)


def test_leading_dimensions():
    w = torch.randn(8, 32)
    for lead in ((), (0,), (1,), (2, 3), (2, 0, 3)):
        x = torch.randn(*lead, 32)
        got = mk.gemm(x, w)
        assert got.shape == (*lead, 8)
        torch.testing.assert_close(got, x @ w.T, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 3, 4, 32)
    many = mk.quantize(x, mk.NVFP4)  # a global scale for each [4, 32]
    assert many.global_scale.shape == (2, 3)
    got = mk.gemm(many, w, out_dtype=torch.float32)
    torch.testing.assert_close(got, mk.dequantize(many, torch.float32) @ w.T, rtol=1e-5, atol=1e-5)
    assert mk.gemm(many, w, epilogue=mk.Epilogue(row_weight=torch.rand(2, 3, 4))).shape == (2, 3, 4, 8)
    assert mk.gemm(torch.randn(3, 32), torch.randn(0, 32)).shape == (3, 0)
    assert mk.gemm(torch.randn(3, 0), torch.randn(8, 0)).eq(0).all()


def test_arguments_are_kept_and_rows_may_be_strided():
    x, w, bias = torch.randn(6, 64), torch.randn(8, 32), torch.randn(8)
    copies = x.clone(), w.clone(), bias.clone()
    got = mk.gemm(x[:, :32], w, epilogue=mk.Epilogue(bias))
    assert torch.equal(got, mk.gemm(x[:, :32].contiguous(), w, epilogue=mk.Epilogue(bias)))
    assert all(torch.equal(a, b) for a, b in zip((x, w, bias), copies, strict=True))


def refusals():
    x, w = torch.randn(4, 64), torch.randn(64, 64)
    e = mk.Epilogue
    return [
        ((x.double(), w), {}, TypeError, "x is torch.float64"),
        ((x, w.to(torch.float8_e4m3fn)), {}, TypeError, "w is torch.float8_e4m3fn"),
        ((x, [1.0]), {}, TypeError, "w is a list"),
        ((x, w[:, :32].contiguous()), {}, ValueError, "x has K = 64 and w has K = 32"),
        ((x, w[None]), {}, ValueError, r"w \(1, 64, 64\)"),
        ((torch.randn(()), w), {}, ValueError, "needs x"),
        ((x, w.T), {}, ValueError, "w has stride"),
        ((torch.randn(64, 4).T, w), {}, ValueError, "x has stride"),
        ((x, w.to("meta")), {}, ValueError, "w is on meta"),
        ((x, w), {"out_dtype": torch.float64}, TypeError, "out_dtype"),
        ((x, w), {"epilogue": e(bias=torch.zeros(32))}, ValueError, r"bias has shape \(32,\), needs \(64,\)"),
        ((x, w), {"epilogue": e(bias=torch.zeros(64).double())}, TypeError, "bias is"),
        ((x, w), {"epilogue": e(bias=torch.zeros(64, device="meta"))}, ValueError, "bias is on meta"),
        ((x, w), {"epilogue": e(row_weight=torch.zeros(3))}, ValueError, "needs 4 values"),
        ((x, w), {"epilogue": e(row_weight=torch.zeros(4).half())}, TypeError, "row_weight is"),
        ((x, w), {"epilogue": e(row_weight=torch.zeros(4, device="meta"))}, ValueError, "row_weight is on meta"),
        ((x, w[:63]), {"epilogue": e(activation=SILU)}, ValueError, "odd width"),
        ((x, w[:48]), {"epilogue": e(requantize_to=mk.MXFP4)}, ValueError, "the output's width is 48"),
        ((x, w), {"epilogue": e(requantize_to=mk.MXFP4, rule="amax")}, ValueError, "no scale rule"),
        ((x, w), {"epilogue": e(rule="even")}, ValueError, "without requantize_to"),
    ]


@pytest.mark.parametrize("case", range(len(refusals())))
def test_refused(case):
    args, kwargs, error, message = refusals()[case]
    with pytest.raises(error, match=message):
        mk.gemm(*args, **kwargs)


def flat(t):
    from mx_kernels.dispatch import flat_operand

    return flat_operand(t)


def test_op():
    x, w = torch.randn(5, 64), torch.randn(64, 64)
    act = ("silu", "concatenated", True, 0.0, 0.0, float("inf"))
    none = ("", "concatenated", False, 0.0, 0.0, float("inf"))
    op = torch.ops.mx_kernels.gemm.default
    torch.library.opcheck(op, (*flat(x), *flat(w), None, *none, None, "", "", torch.bfloat16))
    q, v = mk.quantize(x, mk.NVFP4), mk.quantize(w, mk.MXFP4)
    torch.library.opcheck(op, (*flat(q), *flat(v), w[0], *act, x[:, 0].contiguous(), "", "", torch.float32))
    torch.library.opcheck(op, (*flat(q), *flat(v), None, *act, None, "mxfp8_e4m3", "rceil", torch.float32))


def test_compiles_and_meta():
    x, w = torch.randn(5, 64), mk.quantize(torch.randn(64, 64), mk.MXFP4)

    def f(x):
        q = mk.gemm(mk.quantize(x, mk.MXFP8), w, epilogue=mk.Epilogue(activation=SILU, requantize_to=mk.MXFP8))
        return mk.gemm(q, w[:8].map(lambda t: t[:, : t.shape[1] // 2].contiguous()))

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    got = mk.gemm(x.to("meta"), w.to("meta"), epilogue=mk.Epilogue(activation=SILU, requantize_to=mk.NVFP4))
    assert got.shape == (5, 32)
    assert got.device.type == "meta"


def test_twin():
    x, w = torch.randn(5, 64), mk.quantize(torch.randn(64, 64), mk.MXFP6_E3M2)
    epilogue = mk.Epilogue(torch.randn(64), SILU, torch.randn(5))
    a, b = mk.gemm(x, w, epilogue=epilogue), mk.reference.gemm(x, w, epilogue=epilogue)
    assert torch.equal(a, b)
    assert torch.equal(a, mk.gemm(x, w, epilogue=epilogue))
