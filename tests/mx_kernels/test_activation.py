"""activate: the formulas of Activation, in float32, rounded or quantized once."""

from __future__ import annotations

import math

import pytest
import torch

import mx_kernels as mk

ACTIVATIONS = [
    mk.Activation(kind, layout, gated, limit=limit)
    for kind in ("silu", "gelu", "gelu_tanh", "relu2", "identity")
    for layout, gated in (("concatenated", True), ("interleaved", True), ("concatenated", False))
    for limit in (None, 1.5)
] + [
    mk.Activation("swiglu_oai", layout, alpha=1.702, beta=1.0, limit=7.0) for layout in ("concatenated", "interleaved")
]
ACTIVATIONS += [
    mk.Activation("swiglu_oai", alpha=1.0, beta=0.0),
    mk.Activation("swiglu_oai", alpha=0.5, beta=-2.0, limit=0.25),
]


def scalar(a: mk.Activation, g: float, u: float) -> float:
    """One output, from the formulas, in Python's float64."""
    if a.limit is not None:
        g, u = min(g, a.limit), max(-a.limit, min(u, a.limit))
    if a.kind == "swiglu_oai":
        return g / (1 + math.exp(-a.alpha * g)) * (u + a.beta)
    f = {
        "silu": lambda: g / (1 + math.exp(-g)),
        "gelu": lambda: g * 0.5 * (1 + math.erf(g / math.sqrt(2))),
        "gelu_tanh": lambda: g * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu2": lambda: max(g, 0.0) ** 2,
        "identity": lambda: g,
    }[a.kind]()
    return f * u if a.gated else f


def expected(h: torch.Tensor, a: mk.Activation) -> torch.Tensor:
    rows = []
    for row in h.double().flatten(0, -2).tolist():
        n = len(row) // 2
        if not a.gated:
            rows.append([scalar(a, g, 0.0) for g in row])
        elif a.layout == "interleaved":
            rows.append([scalar(a, row[2 * i], row[2 * i + 1]) for i in range(n)])
        else:
            rows.append([scalar(a, row[i], row[n + i]) for i in range(n)])
    return torch.tensor(rows, dtype=torch.float64).view(*h.shape[:-1], a.out_features(h.shape[-1]))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_formulas(activation):
    """Float32 against float64: a handful of roundings and torch's exp, erf and tanh, each good to a few 2^-24."""
    h = torch.randn(3, 4, 16) * 3
    want = expected(h, activation)
    got = mk.activate(h, activation)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)
    for dtype in (torch.bfloat16, torch.float16):
        low = mk.activate(h.to(dtype), activation)
        assert low.dtype == dtype
        assert torch.equal(low, mk.activate(h.to(dtype).float(), activation).to(dtype)), "rounded once, from float32"


def test_transformers_gpt_oss():
    """The clamped SwiGLU of transformers' gpt-oss, in its own code."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1)
    experts = GptOssExperts(config)
    h = torch.randn(5, 16) * 6
    ours = mk.activate(h, mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0))
    torch.testing.assert_close(ours, experts._apply_gate(h), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("format", mk.FORMATS.values(), ids=str)
def test_requantize(format):
    """Quantized from the float32 values: the same bits as activating in float32 and quantizing that."""
    h = torch.randn(6, 2, 128).bfloat16()
    activation = mk.Activation("silu")
    for rule in (None, *format.rules):
        q = mk.activate(h, activation, requantize_to=format, rule=rule)
        want = mk.quantize(mk.activate(h.float(), activation), format, rule=rule)
        assert (q.format, q.rule, q.dtype, q.shape) == (format, rule or format.default_rule, torch.bfloat16, (6, 2, 64))
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))
        if format.has_global_scale:
            assert torch.equal(q.global_scale, want.global_scale)


def test_extremes():
    h = torch.tensor([[torch.nan, 1.0], [200.0, 2.0], [-200.0, 2.0], [0.0, torch.nan]])
    got = mk.activate(h, mk.Activation("silu", limit=7.0))
    assert got[0].isnan()
    assert got[1] == pytest.approx(7 / (1 + math.exp(-7)) * 2)
    assert got[2] == 0
    assert got[3].isnan()


def test_sizes_and_strides():
    for shape in ((0, 8), (3, 0, 8), (2, 3, 0)):
        got = mk.activate(torch.zeros(shape), mk.Activation("silu"))
        assert got.shape == (*shape[:-1], shape[-1] // 2)
    h = torch.randn(4, 32)
    copy = h.clone()
    identity = mk.activate(h, mk.Activation("identity", gated=False))
    assert torch.equal(identity, h)
    assert identity.data_ptr() != h.data_ptr()
    rows = h[:, :16]
    assert torch.equal(mk.activate(rows, mk.Activation("silu")), mk.activate(rows.contiguous(), mk.Activation("silu")))
    assert torch.equal(h, copy)
    assert mk.activate(torch.randn(16), mk.Activation("silu")).shape == (8,)


def test_refused():
    silu = mk.Activation("silu")
    for args, kwargs, error, message in [
        ((torch.zeros(2, 8).double(), silu), {}, TypeError, "h is torch.float64"),
        ((torch.zeros(()), silu), {}, ValueError, "no dimensions"),
        ((torch.zeros(2, 7), silu), {}, ValueError, "odd width of 7"),
        ((torch.zeros(8, 2).T, silu), {}, ValueError, "stride"),
        ((torch.zeros(2, 96), silu), {"requantize_to": mk.MXFP4}, ValueError, "output width is 48"),
        ((torch.zeros(2, 64), silu), {"rule": "even"}, ValueError, "without requantize_to"),
        ((torch.zeros(2, 64), silu), {"requantize_to": mk.MXFP4, "rule": "amax"}, ValueError, "no scale rule"),
    ]:
        with pytest.raises(error, match=message):
            mk.activate(*args, **kwargs)


def test_op_meta_compile():
    h = torch.randn(5, 128)
    flat = ("swiglu_oai", "interleaved", True, 1.702, 1.0, 7.0)
    op = torch.ops.mx_kernels.activate.default
    torch.library.opcheck(op, (h, *flat, "", "", torch.bfloat16))
    torch.library.opcheck(op, (h, *flat, "mxfp4", "even", torch.float32))
    torch.library.opcheck(op, (h, "identity", "concatenated", False, 0.0, 0.0, math.inf, "", "", torch.float32))
    a = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0)

    def f(h):
        q = mk.activate(h, a, requantize_to=mk.MXFP8)
        return q.data.view(torch.uint8), q.scale, mk.activate(h, a)

    for x, y in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(h), f(h), strict=True):
        assert torch.equal(x, y)
    q = mk.activate(h.to("meta"), a, requantize_to=mk.MXFP6_E2M3)
    assert q.shape == (5, 64)
    assert q.device.type == "meta"
