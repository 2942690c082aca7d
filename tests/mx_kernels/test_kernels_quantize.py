"""The quantization kernels return the reference's bits: every code, every scale byte, 10^8 values of every format, rule and dtype."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk
from mx_kernels import FORMATS, MXFP4, MXFP6_E2M3, MXFP8, NVFP4, ScaleRule, reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE_SCALE = (ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.AMAX)
CASES = [(f, rule) for f in FORMATS.values() for rule in f.rules if rule in ONE_SCALE]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.use_deterministic_algorithms(False)
    with torch.device("cuda"):
        yield


def same(a, b):
    """Equal bits, any NaN standing for any other."""
    if a.dtype.is_floating_point:
        nan = a.isnan() & b.isnan()
        a, b = (t.view(BITS[t.dtype]).masked_fill(nan, 0) for t in (a, b))
    return torch.equal(a, b)


def kernels():
    from mx_kernels.kernels import quantize

    return quantize


def global_scales():
    from mx_kernels.kernels import global_scale

    return global_scale


def hard_values(rows, k, block, dtype, generator):
    """Blocks of every kind: all bit patterns, wide and narrow ranges at every exponent, grid points and ties, zeros, specials."""
    shape = (rows // 4, k // block, block)
    random = lambda *size: torch.rand(size, generator=generator)  # noqa: E731
    whole = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    patterns = whole.view(torch.float32) if dtype == torch.float32 else whole.to(torch.int16).view(dtype).float()
    low, high = (-24, 15) if dtype == torch.float16 else (-140, 120)
    scale = torch.exp2(torch.randint(low, high, (*shape[:2], 1), generator=generator).float())
    normal = torch.randn(shape, generator=generator) * scale
    # Multiples of a 64th, so that each element type's grid points and ties are hit.
    ties = torch.randint(-512, 513, shape, generator=generator) / 64 * scale
    sparse = torch.where(random(*shape) < 0.05, normal, -0.0 * random(*shape[:2], 1))
    special = random(*shape)
    normal = torch.where(special < 2e-4, torch.inf, torch.where(special > 1 - 2e-4, -torch.inf, normal))
    normal = torch.where((special > 0.5) & (special < 0.5001), torch.nan, normal)
    return torch.cat((patterns, normal, ties, sparse)).reshape(rows, k).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("f", "rule"), CASES, ids=str)
def test_quantize_returns_the_bits_of_the_reference(f, rule, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    for chunk in range(4):
        x = hard_values(8192, 4096, f.block, dtype, generator)
        g = None
        if f.has_global_scale:
            g = torch.exp2(torch.rand((), generator=generator) * 40 - 20) if chunk else mk.compute_global_scale(x)
        codes, scale = reference.quantize_codes(x, f, rule, g)
        data = reference.pack_codes(codes, f)
        got_data, got_scale = kernels().quantize(x, f.name, rule.value, g)
        assert torch.equal(got_scale, scale)
        assert torch.equal(got_data, data)
        value = reference.dequantize_parts(data, scale, g, f).to(dtype)
        assert same(kernels().dequantize(data, scale, g, f.name, dtype), value)
        assert same(kernels().quantize_dequantize(x, f.name, rule.value, g), value)


@pytest.mark.parametrize(("f", "rule"), [c for c in CASES if c[0] is not NVFP4], ids=str)
def test_scales_follow_the_rule_at_every_mantissa(f, rule):
    mantissa = torch.arange(2**23, dtype=torch.int32)
    for exponent in (1, 127, 254):
        amax = (mantissa + (exponent << 23)).view(torch.float32)
        x = amax[:, None] * torch.cat((torch.ones(1), torch.rand(f.block - 1)))
        codes, scale = reference.quantize_codes(x, f, rule)
        data, got = kernels().quantize(x, f.name, rule.value, None)
        assert torch.equal(got, scale)
        assert torch.equal(data, reference.pack_codes(codes, f))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nvfp4_divides_as_the_reference_for_global_scales_of_every_size(dtype):
    generator = torch.Generator("cuda").manual_seed(2)
    exponent = torch.rand(2048, generator=generator) * 234 - 117
    g = torch.exp2(exponent)
    spread = torch.exp2(torch.rand(2048, 256, 1, generator=generator) * 24 - 4)
    x = (torch.randn(2048, 256, 64, generator=generator) * spread * g[:, None, None]).to(dtype)
    for per_matrix in (256, 1):  # a program has one global scale, or several
        y = x if per_matrix == 256 else x.reshape(2048, 256, 64)[:, :1].contiguous()
        codes, scale = reference.quantize_codes(y, NVFP4, None, g)
        data, got = kernels().quantize(y, "nvfp4", "amax", g)
        assert torch.equal(got, scale)
        assert torch.equal(data, reference.pack_codes(codes, NVFP4))
        value = reference.dequantize_parts(data, scale, g, NVFP4).to(dtype)
        assert same(kernels().dequantize(data, scale, g, "nvfp4", dtype), value)
        assert same(kernels().quantize_dequantize(y, "nvfp4", "amax", g), value)
    for i in range(0, 2048, 61):  # one global scale for all
        codes, scale = reference.quantize_codes(x[i], NVFP4, None, g[i])
        data, got = kernels().quantize(x[i], "nvfp4", "amax", g[i])
        assert torch.equal(got, scale)
        assert torch.equal(data, reference.pack_codes(codes, NVFP4))


def test_reciprocal_is_rounded_to_nearest_at_every_mantissa():
    import triton
    import triton.language as tl

    reciprocal = kernels()._reciprocal

    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        i = tl.program_id(0) * N + tl.arange(0, N)
        tl.store(out + i, reciprocal(tl.load(x + i)))

    for exponent in (118, 127, 130, 136):  # divisors are scale * g and 6 * g with g in [1, 2)
        x = (torch.arange(2**23, dtype=torch.int32) + (exponent << 23)).view(torch.float32)
        out = torch.empty_like(x)
        kernel[(2**13,)](x, out, N=1024)
        assert torch.equal(out, (1 / x.double()).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_dequantize_every_code_under_every_scale_byte(f, dtype):
    width = f.data_width(f.block)
    data = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, width).repeat(256, 1)
    data = data + torch.arange(width, dtype=torch.uint8) * 37  # neighbours differ
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)[:, None]
    g = torch.tensor(0.3) if f.has_global_scale else None
    want = reference.dequantize_parts(data, scale, g, f).to(dtype)
    assert same(kernels().dequantize(data, scale, g, f.name, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_shapes_strides_and_empty_tensors(f, shape, dtype):
    k = 3 * f.block
    wide = torch.randn(*shape, k + 32, dtype=dtype)
    for x in (wide[..., :k], wide[..., 16 : 16 + k], wide[..., 1 : 1 + k]):
        q, want = mk.quantize(x, f), reference.quantize(x, f)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))
        assert same(mk.dequantize(q), reference.dequantize(want))
        assert same(mk.quantize_dequantize(x, f), reference.quantize_dequantize(x, f))
    empty = mk.quantize(wide[..., :k][:0] if shape else wide.new_empty(0, k), f)
    assert empty.shape[0] == 0
    assert mk.dequantize(empty).numel() == 0


@pytest.mark.parametrize(
    ("f", "rule"),
    [(MXFP4, ScaleRule.SEARCH), (MXFP8, ScaleRule.SEARCH), (NVFP4, ScaleRule.SEARCH), (NVFP4, ScaleRule.FOUR_OVER_SIX)],
    ids=str,
)
def test_offline_rules_run_in_chunks(f, rule, monkeypatch):
    monkeypatch.setattr(kernels(), "_CHUNK", 3 * 128)
    x = torch.randn(4, 5, 128)
    q, want = mk.quantize(x, f, rule=rule), reference.quantize(x, f, rule=rule)
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))
    assert same(mk.quantize_dequantize(x, f, rule=rule), reference.dequantize(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(32,), (1, 2880), (7, 48), (3, 100, 1040), (2, 3, 5, 64), (0, 4, 32), (2, 4096, 4096)], ids=str
)
def test_global_scale_is_the_reference_and_the_same_each_time(shape, dtype):
    x = torch.randn(shape).to(dtype)
    if x.numel() > 100:
        x.view(-1)[3], x.view(-1)[-5] = torch.inf, torch.nan
    if x.ndim > 2 and x.numel():
        x[0] = 0
    got = global_scales().compute_global_scale(x)
    assert got.shape == x.shape[: max(0, x.ndim - 2)]
    assert torch.equal(got, reference.compute_global_scale(x))
    assert torch.equal(got, global_scales().compute_global_scale(x))


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", [(7, 48, 256), (5, 3, 96), (9, 640), (6, 50, 224), (5, 300, 1056)], ids=str)
@pytest.mark.parametrize("turns", [1, 4])
def test_rows_alone_are_dequantized(f, shape, turns, monkeypatch):
    """In a graph, for rows that change between its replays; a row that is passed over is not written."""
    monkeypatch.setattr(kernels(), "turns_for", lambda matrices: turns)
    q = mk.quantize(torch.randn(shape, dtype=torch.bfloat16), f)
    whole = reference.dequantize(q)
    rows = torch.tensor([4, 0, 4, 2, -1])
    assert same(mk.dequantize(q, rows=rows)[:4], whole[rows[:4]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mk.dequantize(q, rows=rows)
    for now in ([1, -1, 3, -1, 0], [-1] * 5, [4, 3, 2, 1, 0]):
        rows.copy_(torch.tensor(now))
        out.fill_(7)
        graph.replay()
        want = torch.where((rows >= 0).view(-1, *[1] * (out.ndim - 1)), whole[rows.clamp(min=0)], 7)
        assert same(out, want)


@pytest.mark.parametrize("f", [MXFP4, MXFP6_E2M3, MXFP8], ids=str)
def test_offsets_beyond_32_bits(f):
    rows, k = 2**20 + 3, 2080  # 2.18e9 elements
    x = torch.empty(rows, k, dtype=torch.bfloat16).normal_()
    data, scale = kernels().quantize(x, f.name, f.default_rule.value, None)
    tail = slice(rows - 5000, rows)
    codes, want = reference.quantize_codes(x[tail], f)
    assert torch.equal(scale[tail], want)
    assert torch.equal(data[tail], reference.pack_codes(codes, f))
    del x
    out = kernels().dequantize(data, scale, None, f.name, torch.bfloat16)
    assert same(out[tail], reference.dequantize_parts(data[tail], scale[tail], None, f).bfloat16())


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_cuda_graphs_and_determinism(f):
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    run = lambda: (mk.quantize(x, f), mk.quantize_dequantize(x, f))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, y = run()
    for seed in range(3):
        x.copy_(torch.randn(64, 512, generator=torch.Generator("cuda").manual_seed(seed)))
        graph.replay()
        want = reference.quantize(x, f)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))
        assert same(y, reference.dequantize(want))


def test_compiles_without_a_graph_break():
    x = torch.randn(64, 512, dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(x):
        q = mk.quantize(x, MXFP4)
        return mk.dequantize(q) + mk.quantize_dequantize(x, NVFP4)

    want = reference.quantize_dequantize(x, MXFP4) + reference.quantize_dequantize(x, NVFP4)
    assert same(step(x), want)


@pytest.mark.parametrize("f", [MXFP8, MXFP4, NVFP4], ids=str)
def test_opcheck(f):
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    g = torch.tensor(0.01) if f.has_global_scale else None
    ops = torch.ops.mx_kernels
    torch.library.opcheck(ops.quantize.default, (x, f.name, f.default_rule.value, g))
    torch.library.opcheck(ops.quantize_dequantize.default, (x, f.name, f.default_rule.value, g))
    data, scale = ops.quantize(x, f.name, f.default_rule.value, g)
    torch.library.opcheck(ops.dequantize.default, (data, scale, g, f.name, torch.bfloat16))
