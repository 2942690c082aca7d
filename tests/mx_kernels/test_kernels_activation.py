"""The activation kernel against the reference: float32 to a few units in the last place, requantization to the bit."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk
from mx_kernels import FORMATS, Activation, reference

pytestmark = pytest.mark.gpu
ACTIVATIONS = [
    Activation(kind, layout, gated, *((1.702, 1.0) if kind == "swiglu_oai" else (None, None)), limit)
    for kind in ("silu", "swiglu_oai", "gelu", "gelu_tanh", "relu2", "identity")
    for layout in ("concatenated", "interleaved")
    for gated in (True, False)
    for limit in (None, 7.0)
    if gated or (kind != "swiglu_oai" and layout == "concatenated")
]
NAMES = [f"{a.kind}-{a.layout}-{'gated' if a.gated else 'plain'}-{a.limit}" for a in ACTIVATIONS]


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.use_deterministic_algorithms(False)
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("a", ACTIVATIONS, ids=NAMES)
def test_values(a):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((33, 2 * 768), (5, 2 * 2880), (7, 2 * 17), (2, 3, 2 * 96), (0, 64)):
            h = (torch.randn(shape) * 3).to(dtype)
            got = mk.activate(h, a)
            want = reference.activated(h.double(), a)
            assert got.dtype == dtype
            # exp, erf and the division of the GPU are good to 2 ulp each; a product of three such factors, in float32:
            # 16 ulp of the largest partial product (|up| <= 16 here), then one rounding to the output's dtype.
            bound = 2.0**-19 * (want.abs() + 1) + want.abs() * torch.finfo(dtype).eps
            assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_requantized_bits_are_those_of_the_values(f, dtype):
    for a in (Activation("silu"), Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)):
        h = (torch.randn(129, 2 * 736) * 3).to(dtype)
        values = mk.activate(h.float(), a)
        for rule in f.rules:
            got, want = mk.activate(h, a, requantize_to=f, rule=rule), reference.quantize(values, f, rule=rule)
            assert got.dtype == dtype
            assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
            assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))


def test_specials_reach_the_scales():
    h = torch.randn(4, 128)
    h[0, 3], h[1, 70] = torch.nan, torch.inf
    got = mk.activate(h, Activation("silu"), requantize_to=mk.MXFP8)
    assert got.scale[0, 0] == 255
    assert got.scale[1, 0] == 254
    assert (got.scale[2:] < 200).all()


@pytest.mark.parametrize("f", [None, mk.MXFP8, mk.MXFP4], ids=str)
def test_offsets_beyond_32_bits(f):
    rows = 2**20 + 3  # 2.2e9 values
    h = torch.empty(rows, 2 * 1056, dtype=torch.bfloat16).normal_()
    got, want = (mk.activate(t, Activation("silu"), requantize_to=f) for t in (h, h[-1000:].clone()))
    if f is None:
        assert torch.equal(got[-1000:], want)
    else:
        assert torch.equal(got.data.view(torch.uint8)[-1000:], want.data.view(torch.uint8))
        assert torch.equal(got.scale[-1000:], want.scale)


def test_the_same_bits_each_time():
    h = (torch.randn(777, 2 * 736) * 3).bfloat16()
    for f in FORMATS.values():
        first = mk.activate(h, Activation("silu"), requantize_to=f)
        for _ in range(5):
            again = mk.activate(h, Activation("silu"), requantize_to=f)
            assert torch.equal(again.data.view(torch.uint8), first.data.view(torch.uint8))
            assert torch.equal(again.scale.view(torch.uint8), first.scale.view(torch.uint8))


def test_cuda_graph_compile_and_opcheck():
    a = Activation("silu")
    h = torch.randn(64, 512, dtype=torch.bfloat16)
    mk.activate(h, a, requantize_to=mk.MXFP8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = mk.activate(h, a, requantize_to=mk.MXFP8)
    h.copy_(torch.randn(64, 512))
    graph.replay()
    assert torch.equal(q.scale, mk.activate(h, a, requantize_to=mk.MXFP8).scale)
    step = torch.compile(lambda h: mk.activate(h, a) * 2, fullgraph=True)
    assert torch.equal(step(h), mk.activate(h, a) * 2)
    args = (h, "silu", "concatenated", True, 0.0, 0.0, float("inf"), "mxfp4", "even", torch.bfloat16)
    torch.library.opcheck(torch.ops.mx_kernels.activate.default, args)
