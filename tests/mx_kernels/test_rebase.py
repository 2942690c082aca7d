"""Re-based MXFP8: what changes and by how much, the product against float64, and the kernels against both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_kernels import reference
from mx_kernels.formats import E2M1
from mx_kernels.rebased_fp4 import pack_fp4, unpack_fp4

SWIGLU_OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
FORMATS = [mk.MXFP8, mk.MXFP6_E2M3, mk.MXFP6_E3M2, mk.MXFP4]


def _value(w: mk.RebasedWeight) -> torch.Tensor:
    v = w.codes().float() * w.scale[..., None]
    return reference.concatenated_rows(v) if w.gated else v


def _inputs(device="cpu", tokens=37, experts=5, top_k=2, hidden=96, width=64, fmt=mk.MXFP8, block_size=16):
    g = torch.Generator(device=device).manual_seed(tokens * 7 + width)
    x = torch.randn(tokens, hidden, device=device, generator=g).bfloat16()
    w13 = mk.quantize(torch.randn(experts, 2 * width, hidden, device=device, generator=g) * 0.1, fmt)
    w2 = mk.quantize(torch.randn(experts, hidden, width, device=device, generator=g) * 0.1, fmt)
    ids = torch.rand(tokens, experts, device=device, generator=g).topk(top_k).indices.int()
    return x, w13, w2, ids, mk.moe_align_block_size(ids, block_size, experts)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_rebase_is_exact_within_the_range_of_e4m3(fmt, gated):
    """Block scales of a row within 6 octaves: no E4M3 code of MXFP8 becomes subnormal that was not, nor any narrower one."""
    w = torch.randn(3, 32, 128) * torch.exp2(torch.randint(0, 3, (3, 32, 4)).float()).repeat_interleave(32, -1)
    w = torch.where(w.abs() < 0.25, 0.25 * w.sign(), w)
    q = mk.quantize(w, fmt)
    r = mk.rebase(q, gated=gated)
    assert torch.equal(_value(r), mk.dequantize(q, torch.float32))
    assert r.changed == 0
    assert r.error == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.integers(0, 40))
def test_rebase_states_its_error(seed, spread):
    """``changed`` and ``error`` are those of the values, recomputed in float64; large values never change."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 16, 96, generator=g) * torch.exp2(
        -torch.randint(0, spread + 1, (2, 16, 3), generator=g).float()
    ).repeat_interleave(32, -1)
    q = mk.quantize(w, mk.MXFP8)
    r = mk.rebase(q)
    want, got = mk.dequantize(q, torch.float32).double(), _value(r).double()
    assert r.error == pytest.approx(((got - want).norm() / want.norm()).item(), rel=1e-6)
    assert r.changed == pytest.approx((got != want).sum().item() / (want != 0).sum().item())
    assert r.error < 2**-7  # what changes is below 2^-14 of its row's largest value
    top = q.scale.amax(-1, keepdim=True) == q.scale
    assert torch.equal(got[top.repeat_interleave(32, -1)], want[top.repeat_interleave(32, -1)])


def _every_fp4_code(down: torch.Tensor, rows: int = 1) -> mk.QuantizedTensor:
    """MXFP4 [1, rows, 32 * len(down)]: all E2M1 codes, twice, under block scales that many octaves below 2^(120 - 127)."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2 * len(down))[None, None].repeat(1, rows, 1)
    scale = (120 - down).to(torch.uint8)[None, None].repeat(1, rows, 1)
    return mk.QuantizedTensor(reference.pack_codes(codes, mk.MXFP4), scale, mk.MXFP4, mk.MXFP4.default_rule)


@pytest.mark.parametrize("gated", [False, True])
def test_rebase_mxfp4_holds_twelve_octaves(gated):
    """Every E2M1 code under every block scale up to 11 octaves below the row's largest; further down codes are rounded to E2M1 there."""
    q = _every_fp4_code(torch.arange(12), rows=16)
    r = mk.rebase(q, gated=gated)
    assert r.changed == 0
    assert torch.equal(_value(r), mk.dequantize(q, torch.float32))
    lower = _every_fp4_code(torch.tensor([0, 12, 13, 40, 120]))
    r = mk.rebase(lower)
    got, want = _value(r).reshape(5, 32), mk.dequantize(lower, torch.float32).reshape(5, 32)
    step = 0.5 * 2.0 ** (120 - 127 - 11)  # of E2M1 under the lowest scale there is
    assert torch.equal(got[0], want[0])
    assert torch.equal(
        got[1:] / step, (want[1:] / step).round()
    )  # ties to even codes, that is to even multiples of 0.5
    assert r.changed == pytest.approx((got != want).sum().item() / (want != 0).sum().item())
    assert 0 < r.error == pytest.approx(((got - want).norm() / want.norm()).item(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), blocks=st.integers(1, 9))
def test_fp4_codes_come_back(seed, rows, blocks):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 32 * blocks), generator=g, dtype=torch.uint8)
    octaves = torch.randint(0, 12, (rows, blocks), generator=g, dtype=torch.uint8)
    data, packed = pack_fp4(reference.pack_codes(codes, mk.MXFP4), octaves)
    got = unpack_fp4(data, packed[None], rows, 32 * blocks)[0].view(torch.float8_e4m3fn).float()
    factor = torch.exp2(octaves.float() - 5).repeat_interleave(32, -1)
    assert torch.equal(got, reference.decode(codes, E2M1) * factor)
    assert data.numel() == -(-rows // 16) * 16 * -(-blocks // 2) * 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rebase_rows(dtype):
    """Within half of E4M3's smallest step under the row's scale of MXFP8's values; from codes the same; of a tile list its pairs alone."""
    x, _, _, ids, tiles = _inputs()
    x = x.to(dtype)
    data, scale = mk.rebase_rows(x)
    exact = mk.quantize_dequantize(x.float(), mk.MXFP8)
    assert ((data.float() * scale[:, None] - exact).abs() <= scale[:, None] * 2**-10).all()
    from_codes = mk.rebase_rows(mk.quantize(x, mk.MXFP8))
    assert torch.equal(from_codes[0].view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(from_codes[1], scale)
    slots = torch.randn(tiles.sorted_ids.numel(), 96).to(dtype)
    listed, whole = mk.rebase_rows(slots, tiles), mk.rebase_rows(slots)
    live = tiles.sorted_ids < ids.numel()
    assert torch.equal(listed[0].view(torch.uint8)[live], whole[0].view(torch.uint8)[live])
    assert torch.equal(listed[1][live], whole[1][live])
    assert not listed[0].view(torch.uint8)[~live].any()
    by_token = mk.rebase_rows(x, tiles, top_k=2)
    token = tiles.sorted_ids[live].long() // 2
    assert torch.equal(by_token[0].view(torch.uint8)[live], data.view(torch.uint8)[token])
    assert torch.equal(by_token[1][live], scale[token])
    assert not by_token[0].view(torch.uint8)[~live].any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("act", [None, mk.Activation("silu"), SWIGLU_OAI], ids=["none", "silu", "swiglu_oai"])
def test_grouped_gemm_rebased_against_float64(fmt, act):
    """Pair by pair in float64 of the re-based operands: float32 sums, one bf16 rounding (2^-9)."""
    x, w13, _, ids, tiles = _inputs(fmt=fmt)
    w = mk.rebase(w13, gated=act is not None)
    bias, weight = torch.randn(5, 128), torch.rand(ids.numel())
    rows = mk.rebase_rows(x, tiles, top_k=2)
    epilogue = mk.Epilogue(bias, act, weight)
    y = mk.grouped_gemm_rebased(rows, w, tiles, epilogue=epilogue, scatter=True, out_dtype=torch.float32)
    in_tile_order = mk.grouped_gemm_rebased(rows, w, tiles, epilogue=epilogue, out_dtype=torch.float32)
    codes = mk.grouped_gemm_rebased(rows, w, tiles, epilogue=replace(epilogue, requantize_to=mk.MXFP8))
    quantized = mk.quantize(y, mk.MXFP8)
    value = (rows[0].float() * rows[1][:, None]).double()
    weights = _value(w).double()
    for slot, pair in enumerate(tiles.sorted_ids.tolist()):
        if pair >= ids.numel():
            continue
        e = ids.flatten()[pair]
        acc = weights[e] @ value[slot] + bias[e].double()
        want = reference.activated(acc, act) if act else acc
        torch.testing.assert_close(y[pair].double(), want * weight[pair].double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(y[pair], in_tile_order[slot])
        assert torch.equal(codes.data[slot].view(torch.uint8), quantized.data[pair].view(torch.uint8))
        assert torch.equal(codes.scale[slot], quantized.scale[pair])


def test_layer_is_close_to_exact_mxfp8():
    """A whole layer against exact MXFP8 x MXFP8: nearer than bf16's rounding of its output (2^-9)."""
    x, w13, w2, _, tiles = _inputs(tokens=64, hidden=256, width=128, block_size=32)
    act = mk.Activation("silu")
    epilogue = mk.Epilogue(activation=act, requantize_to=mk.MXFP8)
    h = mk.grouped_gemm_rebased(mk.rebase_rows(x, tiles, top_k=2), mk.rebase(w13, gated=True), tiles, epilogue=epilogue)
    y = mk.grouped_gemm_rebased(mk.rebase_rows(h, tiles), mk.rebase(w2), tiles, scatter=True, out_dtype=torch.float32)
    hx = mk.grouped_gemm(
        mk.quantize(x, mk.MXFP8), w13, tiles, top_k=2, epilogue=mk.Epilogue(activation=act), out_dtype=torch.float32
    )
    want = mk.grouped_gemm(mk.quantize(hx, mk.MXFP8), w2, tiles, out_dtype=torch.float32)
    assert ((y - want).norm() / want.norm()).item() < 2**-9


@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP4], ids=str)
def test_ops_trace_and_check(fmt):
    x, w13, _, _, tiles = _inputs(tokens=8, fmt=fmt)
    q = mk.quantize(torch.randn(tiles.sorted_ids.numel(), 96), mk.MXFP8)
    for args in (
        (x, None, None, None, 0, 0),
        (x, None, tiles.sorted_ids, tiles.num_padded, tiles.num_pairs, 2),
        (q.data.view(torch.uint8), q.scale, tiles.sorted_ids, tiles.num_padded, tiles.num_pairs, 0),
    ):
        torch.library.opcheck(torch.ops.mx_kernels.rebase_rows.default, args)
    data, scale = mk.rebase_rows(x, tiles, top_k=2)
    w = mk.rebase(w13)
    for quantize in (False, True):
        args = (
            data.view(torch.uint8), scale, w.data.view(torch.uint8), w.octaves, w.scale, tiles.ids, tiles.sorted_ids, tiles.expert_ids,
            tiles.num_padded, tiles.block_size, None, "", 0.0, 0.0, 0.0, None, True, True, quantize, torch.float32,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mx_kernels.grouped_gemm_rebased.default, args)


def test_bad_input():
    x, w13, _, _, tiles = _inputs()
    w = mk.rebase(w13)
    with pytest.raises(ValueError, match="nvfp4 cannot be re-based"):
        mk.rebase(mk.quantize(torch.randn(2, 16, 32), mk.NVFP4))
    with pytest.raises(ValueError, match=r"needs \[E, N, K\]"):
        mk.rebase(w13[0])
    with pytest.raises(ValueError, match="multiple of 16"):
        mk.rebase(mk.quantize(torch.randn(2, 24, 32), mk.MXFP8), gated=True)
    nan = mk.quantize(torch.full((1, 1, 32), float("nan")), mk.MXFP8)
    with pytest.raises(ValueError, match="NaN block scales"):
        mk.rebase(nan)
    with pytest.raises(TypeError, match=r"x is torch\.int32"):
        mk.rebase_rows(x.int(), tiles)
    with pytest.raises(ValueError, match="one per slot"):
        mk.rebase_rows(x, tiles)
    with pytest.raises(ValueError, match="x is mxfp4, needs mxfp8_e4m3"):
        mk.rebase_rows(mk.quantize(x, mk.MXFP4))
    with pytest.raises(ValueError, match="must agree"):
        mk.rebase_rows(x, tiles, top_k=3)
    unsorted = mk.Alignment(tiles.ids, 5, 16, None, tiles.ids.flatten(), tiles.ids.flatten()[:0])
    for call in (lambda: mk.rebase_rows(x, unsorted), lambda: mk.grouped_gemm_rebased(mk.rebase_rows(x), w, unsorted)):
        with pytest.raises(ValueError, match="pass sort=True"):
            call()
    with pytest.raises(ValueError, match="without tiles"):
        mk.rebase_rows(x, top_k=2)
    with pytest.raises(ValueError, match="the tile list has"):
        mk.grouped_gemm_rebased(mk.rebase_rows(x), w, tiles)
    odd = mk.moe_align_block_size(tiles.ids, 96, 5, sort=True)
    with pytest.raises(ValueError, match="blocks of 96 pairs, needs a power of two"):
        mk.grouped_gemm_rebased(mk.rebase_rows(x, odd, top_k=2), w, odd)
    rows = mk.rebase_rows(x, tiles, top_k=2)
    with pytest.raises(ValueError, match="gated=False"):
        mk.grouped_gemm_rebased(rows, w, tiles, epilogue=mk.Epilogue(activation=SWIGLU_OAI))
    for epilogue in (mk.Epilogue(requantize_to=mk.MXFP4), mk.Epilogue(round_to=mk.MXFP8)):
        with pytest.raises(ValueError, match="requantizes to mxfp8_e4m3"):
            mk.grouped_gemm_rebased(rows, w, tiles, epilogue=epilogue)
    with pytest.raises(ValueError, match="silu or swiglu_oai"):
        mk.grouped_gemm_rebased(
            rows, mk.rebase(w13, gated=True), tiles, epilogue=mk.Epilogue(activation=mk.Activation("gelu"))
        )
    with pytest.raises(ValueError, match="bias has shape"):
        mk.grouped_gemm_rebased(rows, w, tiles, epilogue=mk.Epilogue(bias=torch.zeros(5)))


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("spread", [3, 20])
def test_rebase_on_the_gpu_is_that_of_the_cpu(fmt, spread):
    w = torch.randn(3, 48, 416) * torch.exp2(-torch.randint(0, spread, (3, 48, 13)).float()).repeat_interleave(32, -1)
    q = mk.quantize(w, fmt)
    want, got = mk.rebase(q, gated=True), mk.rebase(q.to("cuda"), gated=True)
    for name in ("data", "octaves", "scale"):
        a, b = getattr(want, name), getattr(got, name)
        assert (a is None and b is None) or torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
    assert (got.changed, got.error) == pytest.approx((want.changed, want.error), rel=1e-5)


@pytest.mark.compile
def test_devices_without_fp8_are_refused(monkeypatch):
    kernels = pytest.importorskip("mx_kernels.kernels.rebased", exc_type=ImportError)
    from mx_kernels.kernels.launch import Target

    monkeypatch.setattr(kernels, "target", lambda device: Target(False, True, 108))
    with pytest.raises(mk.Unsupported, match="sm_89 and later"):
        kernels._needs_fp8(torch.device("cuda", 0))
    kernels._needs_fp8(torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "pairs", "fmt", "promote", "rows"),
    [  # the fastest measured on an H100 (docs/performance.md)
        ((128, 5760, 2880), 4096, mk.MXFP4, False, 64),
        ((128, 1536, 2048), 8192, mk.MXFP4, False, 64),
        ((128, 1536, 2048), 8192, mk.MXFP4, True, 64),
        ((128, 1536, 2048), 32768, mk.MXFP4, False, 128),
        ((8, 28672, 4096), 512, mk.MXFP4, False, 128),
        ((8, 28672, 4096), 512, mk.MXFP8, False, 64),
        ((8, 28672, 4096), 2048, mk.MXFP8, False, 128),
        ((128, 5760, 2880), 64, mk.MXFP4, False, 16),
    ],
)
def test_rebased_blocks_where_they_were_measured(shape, pairs, fmt, promote, rows):
    octaves = torch.empty(0, dtype=torch.uint8) if fmt is mk.MXFP4 else None
    w = mk.RebasedWeight(
        torch.empty(0), octaves, torch.empty(shape[:2], device="meta"), torch.Size(shape), fmt, True, 0.0, 0.0
    )
    assert mk.rebased_block_size(pairs, w, promote) == rows
