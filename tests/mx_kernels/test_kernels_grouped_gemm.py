"""The kernel of products with packed weights, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels import reference
from mx_kernels.packed_gemm import flat_product, grouped_gemm_packed_op
from mx_kernels.tuning import Config

SILU = mk.Activation("silu")
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
OTHERS = [
    mk.Activation("gelu", gated=False),
    mk.Activation("gelu_tanh", "interleaved", limit=1.5),
    mk.Activation("relu2", gated=False, limit=2.0),
    mk.Activation("silu", limit=1.0),
    mk.Activation("swiglu_oai", alpha=1.5, beta=0.0),
    mk.Activation("identity"),
    None,
]
CONFIGS = [
    Config(16, 128, 128, 4, 4, maxnreg=128),
    Config(16, 128, 128, 4, 3, split=4, maxnreg=128),
    Config(16, 64, 128, 4, 5),
    Config(32, 128, 128, 4, 3, maxnreg=168),
    Config(64, 128, 128, 4, 3, levels=3, maxnreg=168),
    Config(96, 128, 64, 4, 4, levels=3, maxnreg=160),
    Config(128, 256, 128, 8, 3, group=8, levels=3),
    Config(128, 128, 128, 4, 2, mask=False),
    Config(128, 128, 64, 4, 4, levels=3),
    Config(128, 128, 64, 4, 5, group=8, levels=3),
    Config(256, 128, 128, 8, 3, levels=3),
]


def short(c: Config) -> str:
    return f"{c.pairs}x{c.rows}x{c.step}w{c.warps}s{c.stages}k{c.split}g{c.group}L{c.levels}"


def problem(
    f: mk.Format, shape: tuple[int, int, int], tokens: int, top_k: int, act: mk.Activation | None, device="cpu"
):
    """(x with NaN around it, weight, ids with dropped pairs, epilogue)."""
    experts, n, k = shape
    w = mk.quantize(torch.randn(shape) * 0.1, f).to(device)
    around = torch.full((tokens + 3, k + 64), float("nan"), dtype=torch.bfloat16, device=device)
    x = around[1 : tokens + 1, 32 : k + 32]
    x.copy_(torch.randn(tokens, k))
    ids = torch.randint(-1, experts, (tokens, top_k), dtype=torch.int32).to(device)
    bias = torch.randn(experts, n).to(device)
    weight = torch.rand(tokens * top_k).to(device)
    return x, w, ids, mk.Epilogue(bias, act, weight)


def launch(x, p, tiles, top_k, epilogue, dtype, config=None):
    from mx_kernels.kernels.grouped_gemm import grouped_gemm_packed

    args = flat_product(x, p, tiles, top_k, epilogue, epilogue.row_weight, dtype)
    return grouped_gemm_packed(*args, config)


def exact(x, w, ids, top_k, epilogue) -> torch.Tensor:
    """The product in float64, zeros for dropped pairs."""
    values = mk.dequantize(w, torch.float32).double() if isinstance(w, mk.QuantizedTensor) else w.double()
    flat = ids.flatten().long()
    rows = x.double().repeat_interleave(top_k, 0)
    acc = torch.zeros((flat.numel(), values.shape[1]), dtype=torch.float64, device=x.device)
    for e in range(values.shape[0]):
        hit = flat == e
        acc[hit] = rows[hit] @ values[e].T + (0 if epilogue.bias is None else epilogue.bias[e].double())
    if epilogue.activation is not None:
        acc = reference.activated(acc, epilogue.activation)
    if epilogue.row_weight is not None:
        acc = acc * epilogue.row_weight[:, None]
    return torch.where((flat >= 0)[:, None], acc, 0.0)


def check(f, shape, tokens, top_k, act, config=None, *, device, block=16, dtype=torch.float32, x_dtype=torch.bfloat16):
    """Relative error of the kernel against float64: float32 sums in some order, then one rounding to ``dtype``."""
    x, w, ids, epilogue = problem(f, shape, tokens, top_k, act, device)
    x = x.to(x_dtype)
    gated = act is not None and act.gated
    p = mk.pack(w, gated=gated, layout=act.layout if act else "concatenated")
    if tokens * top_k <= 64:
        tiles = mk.Alignment(ids, shape[0], 16, None, ids.flatten(), ids.flatten()[:0])
    else:
        tiles = mk.Alignment(ids, shape[0], block, *reference.moe.aligned(ids, block, shape[0], None))
    y = launch(x, p, tiles, top_k, epilogue, dtype, config).double()
    want = exact(x, w, ids, top_k, epilogue)
    kept = ids.flatten() >= 0
    error = (y[kept] - want[kept]).norm() / want[kept].norm()
    rounding = (want.float().to(dtype).double() - want).norm() / want.norm()
    # 1e-5: tensor cores drop bits below the sum's last as they add (up to 2880 terms), and exp is good to 2 ulp
    assert error < 1.1 * rounding + 1e-5, f"{error} against {rounding}"
    return y


def check_linear(f, shape, rows, *, device):
    """One weight for all rows."""
    w = mk.quantize(torch.randn(shape) * 0.1, f).to(device)
    x = torch.randn(rows, shape[1]).bfloat16().to(device)
    epilogue = mk.Epilogue(torch.randn(shape[0]).to(device), mk.Activation("gelu", gated=False))
    y = launch(x, mk.pack(w), None, 1, epilogue, torch.float32)
    want = reference.activated(
        x.double() @ mk.dequantize(w, torch.float32).double().T + epilogue.bias, epilogue.activation
    )
    assert (y - want).norm() / want.norm() < 1e-5


def check_rounded(f, act, tokens, config=None, *, device, block=16):
    """The rounded result is what ``quantize_dequantize`` makes of the result, for formats and rules of all kinds."""
    x, w, ids, epilogue = problem(f, (4, 128, 128), tokens, 2, act, device)
    p = mk.pack(w, gated=act is not None and act.gated, layout=act.layout if act else "concatenated")
    if tokens * 2 <= 64:
        tiles = mk.Alignment(ids, 4, 16, None, ids.flatten(), ids.flatten()[:0])
    else:
        tiles = mk.Alignment(ids, 4, block, *reference.moe.aligned(ids, block, 4, None))
    y = launch(x, p, tiles, 2, epilogue, torch.float32, config)
    kept = ids.flatten() >= 0
    for to, rule in ((mk.MXFP8, None), (mk.MXFP8_E5M2, "floor"), (mk.MXFP6_E3M2, "ceil"), (mk.MXFP4, "even")):
        rounded = replace(epilogue, round_to=to, rule=None if rule is None else mk.ScaleRule(rule))
        got = launch(x, p, tiles, 2, rounded, torch.float32, config)
        assert torch.equal(got[kept], reference.quantize_dequantize(y[kept], to, rule=rule))


INTERPRETED = """
import torch, test_kernels_grouped_gemm as t, mx_kernels as mk
from mx_kernels.tuning import Config
torch.manual_seed(1)
t.check(mk.MXFP4, (3, 96, 160), 5, 2, t.SILU, device="cpu")
t.check(mk.NVFP4, (3, 96, 176), 40, 2, t.OAI, device="cpu")
t.check(mk.MXFP8, (3, 144, 192), 40, 2, None, device="cpu")
t.check(mk.MXFP8_E5M2, (2, 40, 96), 3, 2, t.OTHERS[2], device="cpu")
t.check(mk.MXFP6_E2M3, (2, 80, 64), 1, 2, t.OTHERS[3], device="cpu")
t.check(mk.MXFP4, (3, 160, 640), 6, 2, t.OTHERS[1], Config(16, 64, 128, 4, 3, split=4), device="cpu")
t.check(mk.MXFP4, (3, 160, 256), 40, 2, t.OAI, Config(64, 64, 128, 4, 3, levels=3, group=4), device="cpu", block=64)
t.check(mk.MXFP8, (2, 80, 160), 40, 2, None, Config(64, 64, 64, 4, 3, levels=2), device="cpu", block=64)
t.check(mk.NVFP4, (2, 80, 192), 40, 2, None, Config(64, 64, 64, 4, 3), device="cpu", block=64)
t.check(mk.MXFP8, (2, 64, 128), 6, 2, None, device="cpu", x_dtype=torch.float16)
t.check(mk.MXFP8, (2, 64, 128), 6, 2, None, device="cpu", x_dtype=torch.float32)
t.check(mk.MXFP4, (3, 160, 256), 160, 2, t.OAI, Config(96, 64, 64, 4, 3, levels=3), device="cpu", block=96)
t.check(mk.NVFP4, (2, 80, 192), 120, 2, None, Config(96, 64, 64, 4, 3), device="cpu", block=96)
t.check(mk.MXFP4, (3, 160, 256), 60, 2, t.OAI, Config(32, 64, 64, 4, 3, levels=2), device="cpu", block=128)
for rows in (1, 33, 70):
    t.check_linear(mk.MXFP4, (80, 192), rows, device="cpu")
t.check_linear(mk.NVFP4, (80, 192), 33, device="cpu")
t.check_rounded(mk.MXFP4, t.OAI, 3, device="cpu")
t.check_rounded(mk.MXFP8, None, 40, Config(64, 64, 64, 4, 3), device="cpu", block=64)
t.check_rounded(mk.MXFP4, t.OAI, 190, Config(96, 64, 64, 4, 3), device="cpu", block=96)
print("right")
"""


@pytest.mark.compile
def test_kernel_in_the_interpreter(interpreted):
    """Index logic, plain decoding and epilogue, where Triton is installed."""
    interpreted(INTERPRETED)


def every_pair(f: mk.Format) -> mk.QuantizedTensor:
    """[N, 128] with each finite code under each scale byte whose products are bf16 numbers."""
    if f.element.bits == 8:
        codes = torch.arange(256, dtype=torch.uint8)
        codes = torch.where((codes & 0x7F) >= (0x7F if f.element.mantissa == 3 else 0x7C), 0, codes)
        first, last = (3, 134) if f.element.mantissa == 3 else (10, 142)
    else:
        codes = torch.arange(16, dtype=torch.uint8).repeat(2)
        first, last = (0, 128) if f.scale == "e8m0" else (1, 0x7E)
    groups = codes.view(-1, f.block)
    scales = torch.arange(first, last + 1, dtype=torch.uint8)
    codes = groups.repeat(len(scales), 1)
    scale = scales.repeat_interleave(len(groups))
    rest = -len(scale) % (32 * 128 // f.block)
    codes, scale = torch.cat((codes, codes[:1].repeat(rest, 1))), torch.cat((scale, scale[:1].repeat(rest)))
    order = torch.randperm(len(scale))
    codes, scale = codes[order].view(-1, 128), scale[order].view(-1, 128 // f.block)
    data = reference.pack_codes(codes, f).view(f.data_dtype)
    g = torch.tensor(0.5) if f.has_global_scale else None
    return mk.QuantizedTensor(data, scale.view(f.scale_dtype), f, f.default_rule, torch.bfloat16, g)


@pytest.mark.gpu
@pytest.mark.parametrize("f", [mk.MXFP4, mk.NVFP4, mk.MXFP8, mk.MXFP8_E5M2], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_every_code_and_scale_is_decoded_exactly(config, f):
    """Through an identity as activations; one row of zeros stands between tests of sums and of single products."""
    w = every_pair(f).to("cuda")
    experts = mk.QuantizedTensor(w.data[None], w.scale[None], f, w.rule, w.dtype, w.global_scale)
    eye = torch.eye(128, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros((128, 1), dtype=torch.int32, device="cuda")
    tiles = mk.Alignment(ids, 1, config.pairs, *reference.moe.aligned(ids, config.pairs, 1, None))
    config = replace(config, split=1)
    y = launch(eye, mk.pack(experts), tiles, 1, mk.Epilogue(), torch.float32, config)
    assert torch.equal(y.T, mk.dequantize(w, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("f", [mk.MXFP4, mk.NVFP4, mk.MXFP8], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_random_problems_on_the_gpu(config, f):
    block = config.pairs
    check(f, (4, 5760, 2880), 12, 2, OAI, config if block == 16 else None, device="cuda", dtype=torch.bfloat16)
    if config.split == 1:
        check(f, (5, 1536, 2048), 300, 3, SILU, config, device="cuda", block=block, dtype=torch.bfloat16)
        check(f, (5, 2880, 2880), 70, 3, None, config, device="cuda", block=block)
        check(f, (40, 288, 320), 700, 1, OTHERS[0], config, device="cuda", block=block)


@pytest.mark.gpu
@pytest.mark.parametrize("act", [SILU, OAI, *OTHERS], ids=lambda a: f"{a.kind}-{a.gated}" if a else "none")
def test_activations_on_the_gpu(act):
    check(mk.MXFP8, (5, 288, 192), 60, 3, act, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32], ids=str)
def test_other_activations_on_the_gpu(x_dtype):
    check(mk.MXFP4, (5, 288, 192), 60, 3, SILU, device="cuda", x_dtype=x_dtype)
    check(mk.NVFP4, (5, 288, 192), 20, 3, None, device="cuda", x_dtype=x_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_weights_on_the_gpu(dtype):
    for experts, n, k, tokens in ((4, 288, 2880, 9), (4, 288, 200, 300), (3, 1024, 2048, 1500)):
        w = torch.randn(experts, n, k, device="cuda").to(dtype)
        ids = torch.randint(0, experts, (tokens, 2), dtype=torch.int32, device="cuda")
        x = torch.randn(tokens, k, device="cuda").to(dtype)
        epilogue = mk.Epilogue(activation=SILU)
        tiles = mk.moe_align_block_size(ids, 64, experts)
        got = mk.grouped_gemm(x, mk.pack(w, gated=True), tiles, top_k=2, epilogue=epilogue, out_dtype=torch.float32)
        want = exact(x, w, ids, 2, epilogue)
        assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("act", [SILU, OAI, None], ids=lambda a: a.layout if a else "none")
@pytest.mark.parametrize("f", [mk.MXFP4, mk.MXFP8], ids=str)
def test_rounded_results_on_the_gpu(f, act):
    for tokens, config in (
        (3, None),
        (40, None),
        (300, Config(64, 128, 128, 4, 3)),
        (900, Config(128, 128, 64, 4, 4, levels=3)),
    ):
        check_rounded(f, act, tokens, config, device="cuda", block=16 if config is None else config.pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("f", [mk.MXFP4, mk.NVFP4, mk.MXFP8], ids=str)
def test_a_full_device_computes_the_same_each_time(f, block):
    """Thousands of programs that share the matrix units, half-full blocks among them: what one product leaves to the next shows there.

    Rounded results are those of a pass of its own over float32, and repetition changes no bit.
    """
    w = mk.pack(mk.quantize(torch.randn(128, 1536, 2048, device="cuda", dtype=torch.bfloat16) * 0.02, f), gated=True)
    for tokens in (256, 1024, 6000):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        ids = torch.rand(tokens, 128, device="cuda").topk(8).indices.int()
        tiles = mk.moe_align_block_size(ids, block, 128, sort=True)

        def product(tiles=tiles, x=x, **parts):
            return mk.grouped_gemm(
                x, w, tiles, top_k=8, epilogue=mk.Epilogue(activation=SILU, **parts), out_dtype=torch.float32
            )

        exact_sums, rounded = product(), product(round_to=mk.MXFP8)
        assert exact_sums.isfinite().all()
        assert torch.equal(rounded, mk.quantize_dequantize(exact_sums, mk.MXFP8))
        for _ in range(5):
            assert torch.equal(product(), exact_sums)
            assert torch.equal(product(round_to=mk.MXFP8), rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 300, 3000])
def test_linear_on_the_gpu(rows):
    check_linear(mk.MXFP8, (2880, 2880), rows, device="cuda")
    check_linear(mk.NVFP4, (96, 160), rows, device="cuda")


@pytest.mark.gpu
def test_all_pairs_to_one_expert():
    w = mk.quantize(torch.randn(3, 256, 256), mk.MXFP4).to("cuda")
    p = mk.pack(w)
    for tokens in (1, 15, 16, 17, 64, 1000):
        ids = torch.ones((tokens, 1), dtype=torch.int32, device="cuda")
        x = torch.randn(tokens, 256, device="cuda").bfloat16()
        y = mk.grouped_gemm(x, p, mk.moe_align_block_size(ids, 16, 3), out_dtype=torch.float32)
        want = exact(x, w, ids, 1, mk.Epilogue())
        assert (y - want).norm() / want.norm() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [1, 512])
def test_any_number_of_experts_and_every_dtype_out(experts, out):
    """Odd multiples of 32 as K and N; with 512 experts most have few tokens."""
    for tokens in (3, 700):
        check(mk.MXFP4, (experts, 160, 96), tokens, min(8, experts), None, device="cuda", dtype=out)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2048, 768), (4096, 256), (288, 1056)])
def test_sizes_of_models(n, k):
    """768 and 256 as slices of an intermediate size, odd multiples of 32; 2880 is in the problems above."""
    for f in (mk.MXFP4, mk.MXFP8, mk.NVFP4):
        for tokens in (2, 90, 1500):
            check(f, (3, n, k), tokens, 2, SILU, device="cuda")


@pytest.mark.gpu
def test_nothing_on_the_gpu():
    w = mk.pack(mk.quantize(torch.randn(3, 32, 96, device="cuda"), mk.MXFP4))
    x, ids = torch.empty(0, 96, device="cuda").bfloat16(), torch.empty((0, 2), dtype=torch.int32, device="cuda")
    assert mk.grouped_gemm(x, w, mk.moe_align_block_size(ids, 16, 3), top_k=2).shape == (0, 32)
    dropped = mk.moe_align_block_size(torch.full((100, 2), -1, dtype=torch.int32, device="cuda"), 16, 3)
    assert mk.grouped_gemm(x.new_zeros(100, 96), w, dropped, top_k=2).shape == (200, 32)


@pytest.mark.gpu
def test_past_two_to_the_31():
    """The last of 514 experts starts past 2^31 words; then the last rows of x and of the result pass 2^31 values."""
    w = mk.quantize(torch.randn(1, 4096, 4096, device="cuda"), mk.MXFP8)
    one, experts = mk.pack(w), 514
    big = one.map(lambda t: t.new_empty((experts, *t.shape[1:])))
    for name in ("data", "scale", "alpha"):
        if getattr(big, name) is not None:
            getattr(big, name)[-1] = getattr(one, name)[0]
    big = replace(big, shape=torch.Size((experts, 4096, 4096)))
    assert big.data.numel() // 4 > 2**31
    x, ids = torch.randn(200, 4096, device="cuda").bfloat16(), torch.full((200, 1), experts - 1, device="cuda").int()
    got = mk.grouped_gemm(x, big, mk.moe_align_block_size(ids, 64, experts), out_dtype=torch.float32)
    want = x.double() @ mk.dequantize(w, torch.float32)[0].double().T
    assert (got - want).norm() / want.norm() < 1e-5
    del big, got, want
    rows = (1 << 26) + 5
    tall = torch.zeros(rows, 32, device="cuda", dtype=torch.bfloat16)
    tall[-3:] = 1
    got = mk.gemm(tall, mk.pack(mk.quantize(torch.ones(48, 32, device="cuda"), mk.MXFP4)))
    assert got[-3:].eq(32).all()
    assert got[:-3].count_nonzero() == 0


@pytest.mark.gpu
def test_split_sums_are_the_same_every_time():
    """1000 launches over 8 inputs: a partial sum from an earlier launch would show."""
    w = mk.quantize(torch.randn(8, 1024, 2880) * 0.1, mk.MXFP4).to("cuda")
    p = mk.pack(w)
    ids = torch.arange(8, dtype=torch.int32, device="cuda")[None]
    tiles = mk.Alignment(ids, 8, 16, None, ids.flatten(), ids.flatten()[:0])
    config = Config(16, 128, 128, 4, 3, split=8, maxnreg=128)
    xs = [torch.randn(1, 2880, device="cuda").bfloat16() for _ in range(8)]
    first = [launch(x, p, tiles, 8, mk.Epilogue(), torch.float32, config) for x in xs]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(1000):
        wrong += (launch(xs[turn % 8], p, tiles, 8, mk.Epilogue(), torch.float32, config) != first[turn % 8]).sum()
    assert int(wrong) == 0


@pytest.mark.gpu
def test_graph_and_opcheck_on_the_gpu():
    x, w, ids, epilogue = problem(mk.NVFP4, (64, 96, 160), 3, 4, SILU, "cuda")
    x, p = x.contiguous(), mk.pack(w, gated=True)
    tiles = mk.moe_align_block_size(ids.clamp(min=0), 16, 64)
    want = mk.grouped_gemm(x, p, tiles, top_k=4, epilogue=epilogue)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mk.grouped_gemm(x, p, tiles, top_k=4, epilogue=epilogue)
    graph.replay()
    assert torch.equal(got, want)
    torch.library.opcheck(
        grouped_gemm_packed_op, flat_product(x, p, tiles, 4, epilogue, epilogue.row_weight, torch.bfloat16)
    )


@pytest.mark.gpu
def test_a_clamp_does_not_hide_nan():
    """min and max of the activation's limit pass a NaN on, as the reference does."""
    act = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    x[3] = float("nan")
    w = mk.pack(mk.quantize(torch.randn(4, 64, 64, device="cuda"), mk.MXFP8), gated=True)
    ids = torch.randint(0, 4, (40, 2), device="cuda", dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 16, 4)
    y = mk.grouped_gemm(x, w, tiles, top_k=2, epilogue=mk.Epilogue(activation=act))
    assert y[6:8].isnan().all()
    assert y[:6].isfinite().all()
