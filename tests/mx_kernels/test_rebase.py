"""Re-based MXFP8: what changes and by how much, the product against float64, and the kernels against both."""

from __future__ import annotations

import re
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


@pytest.mark.gpu
@pytest.mark.parametrize("k", [32, 96, 768, 2880, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rebase_rows_kernel_is_bit_exact(monkeypatch, k, dtype):
    from mx_kernels.kernels import rebased

    x = torch.randn(301, k, device="cuda") * torch.exp2(
        torch.randint(-12, 12, (301, k // 32), device="cuda").float()
    ).repeat_interleave(32, -1)
    x[0] = 0
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    x = x.to(dtype)
    from_codes = mk.quantize(x, mk.MXFP8)
    for operand, args in ((x, (x, None)), (from_codes, (from_codes.data.view(torch.uint8), from_codes.scale))):
        got, want = mk.rebase_rows(operand), reference.rebase_rows(*args, None, None, 0, 0)
        finite = want[1].isfinite()
        assert torch.equal(got[0].view(torch.uint8)[finite], want[0][finite])
        assert torch.equal(got[1].nan_to_num(-1), want[1].nan_to_num(-1))
    tiles = mk.moe_align_block_size(torch.randint(0, 7, (90, 1), device="cuda", dtype=torch.int32), 16, 7, sort=True)
    slots = x[torch.arange(tiles.sorted_ids.numel(), device="cuda") % 301]
    live = (tiles.sorted_ids < 90) & (torch.arange(len(slots), device="cuda") < tiles.num_padded)
    pairs, whole = tiles.sorted_ids[live].long(), mk.rebase_rows(x)
    monkeypatch.setattr(rebased, "COPIED", 2048 * 90)  # tokens once each, and copied
    for got, rows in (
        (mk.rebase_rows(slots, tiles), live.nonzero()[:, 0] % 301),
        (mk.rebase_rows(x[:90], tiles, top_k=1), pairs),
        (mk.rebase_rows(x[:45], tiles, top_k=2), pairs // 2),
    ):
        assert torch.equal(got[0].view(torch.uint8)[live], whole[0].view(torch.uint8)[rows])
        assert torch.equal(got[1][live].nan_to_num(-1), whole[1][rows].nan_to_num(-1))


@pytest.mark.gpu
def test_rebase_rows_beyond_32_bits():
    x = torch.empty(2**20 + 3, 2080, dtype=torch.bfloat16, device="cuda").normal_()  # 2.2e9 values
    last = x[-1000:].clone()
    got, want = mk.rebase_rows(x), mk.rebase_rows(last)
    assert torch.equal(got[0].view(torch.uint8)[-1000:], want[0].view(torch.uint8))
    assert torch.equal(got[1][-1000:], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP4], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("promote", [True, False])
@pytest.mark.parametrize(
    "act", [None, mk.Activation("silu", limit=3.0), SWIGLU_OAI], ids=["none", "silu", "swiglu_oai"]
)
def test_grouped_gemm_rebased_kernel(block_size, promote, act, fmt):
    """float32 output against the reference. Hopper's FP8 accumulator keeps about 14 bits: promoted every 128 along K the error stays
    below 2^-11 in the Frobenius norm, otherwise below 2^-9 at K = 2880; the activation about doubles a relative error."""
    x, w13, _, ids, tiles = _inputs(
        "cuda", tokens=500, experts=9, top_k=3, hidden=2880, width=416, fmt=fmt, block_size=block_size
    )
    w = mk.rebase(w13, gated=act is not None)
    weight, bias = torch.rand(ids.numel(), device="cuda"), torch.randn(9, 832, device="cuda")
    rows = mk.rebase_rows(x, tiles, top_k=3)
    epilogue = mk.Epilogue(bias, act, weight)
    want, _ = reference.grouped_gemm_rebased(
        rows[0].view(torch.uint8), rows[1], w.codes().view(torch.uint8), w.scale, tiles, epilogue, True, torch.float32
    )
    options = {"promote": promote, "out_dtype": torch.float32}
    for scatter in (True, False):
        y = mk.grouped_gemm_rebased(rows, w, tiles, epilogue=epilogue, scatter=scatter, **options)
        if not scatter:
            live = (tiles.sorted_ids < ids.numel()) & (torch.arange(y.shape[0], device="cuda") < tiles.num_padded)
            y = torch.zeros_like(want).index_copy(0, tiles.sorted_ids[live].long(), y[live])
        error = ((y.double() - want.double()).norm() / want.double().norm()).item()
        assert error < (2**-11 if promote else 2**-9) * (2 if act else 1)
        if not scatter:  # the same sums, so the same codes
            q = mk.grouped_gemm_rebased(
                rows, w, tiles, epilogue=replace(epilogue, requantize_to=mk.MXFP8), promote=promote
            )
            sums = mk.grouped_gemm_rebased(rows, w, tiles, epilogue=epilogue, **options)
            whole = mk.quantize(sums[live], mk.MXFP8)
            assert torch.equal(q.data.view(torch.uint8)[live], whole.data.view(torch.uint8))
            assert torch.equal(q.scale[live], whole.scale)


@pytest.mark.parametrize(
    ("experts", "pairs", "n", "k", "split"),
    [  # on an H100 splitting gained 14% of a layer in the first, and lost 2 to 11% in the next two
        (8, 2, 4096, 14336, 4),
        (8, 8, 4096, 14336, 1),
        (8, 32, 4096, 14336, 1),
        (8, 2, 28672, 4096, 1),
        (128, 4, 2880, 2880, 1),
        (128, 8, 2048, 768, 1),
        (8, 2000, 64, 14336, 1),
    ],
)
def test_split_k_where_tiles_leave_the_device_idle(experts, pairs, n, k, split):
    rebased = pytest.importorskip("mx_kernels.kernels.rebased", exc_type=ImportError)
    assert rebased._split_of(n, k, experts, pairs, 128, 128, torch.device("cpu")) == split


INTERPRETED = """
import torch
import mx_kernels as mk
from mx_kernels.kernels import rebased

torch.manual_seed(0)
for fmt in (mk.MXFP8, mk.MXFP4):
    for act in ("", "silu"):
        w = mk.rebase(mk.quantize(torch.randn(3, 160, 1024) * 0.1, fmt), gated=act != "")
        ids = torch.rand(3, 3).topk(2).indices.int()
        tiles = mk.moe_align_block_size(ids, 16, 3, sort=True)
        x, scale = mk.rebase_rows(torch.randn(3, 1024), tiles, top_k=2)
        epilogue = mk.Epilogue(activation=mk.Activation(act) if act else None)
        want = mk.grouped_gemm_rebased((x, scale), w, tiles, epilogue=epilogue, scatter=True, out_dtype=torch.float32)
        weight = (w.data.view(torch.uint8), w.octaves, w.scale)
        where = (tiles.sorted_ids, tiles.expert_ids, tiles.num_padded, 16, ids.numel())
        for split in (1, 2, 4):
            options = {"scatter": True, "activation": act, "out_dtype": torch.float32, "config": {"SPLIT": split}}
            got, _ = rebased.grouped_gemm_rebased(x.view(torch.uint8), scale, *weight, *where, **options)
            assert (got - want).norm() / want.norm() < 1e-6
print("right")
"""


def test_the_kernel_in_the_interpreter(interpreted):
    """Products of either format, whole and split: tiles that rows and columns do not fill, gates, pairs back in their places."""
    interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP4], ids=str)
def test_a_split_product_repeats_itself(monkeypatch, fmt):
    """Few pairs over a long K: several programs a tile, whose sums are added up in one order; gates and quantized results too."""
    rebased = pytest.importorskip("mx_kernels.kernels.rebased")
    splits, split_of = [], rebased._split_of
    monkeypatch.setattr(rebased, "_split_of", lambda *args: splits.append(split_of(*args)) or splits[-1])
    for tokens, act in ((1, None), (3, SWIGLU_OAI), (16, None)):
        x, w13, _, ids, _ = _inputs("cuda", tokens=tokens, experts=4, top_k=2, hidden=14336, width=256, fmt=fmt)
        tiles = mk.moe_align_block_size(ids, 16, 4, sort=True)
        w, rows = mk.rebase(w13, gated=act is not None), mk.rebase_rows(x, tiles, top_k=2)
        epilogue = mk.Epilogue(None, act, torch.rand(ids.numel(), device="cuda"))
        want, _ = reference.grouped_gemm_rebased(
            rows[0].view(torch.uint8),
            rows[1],
            w.codes().view(torch.uint8),
            w.scale,
            tiles,
            epilogue,
            True,
            torch.float32,
        )
        got = [
            mk.grouped_gemm_rebased(
                rows, w, tiles, epilogue=epilogue, scatter=True, promote=True, out_dtype=torch.float32
            )
            for _ in range(5)
        ]
        assert splits[-1] > 1
        assert all(torch.equal(got[0], again) for again in got)
        assert (got[0].double() - want.double()).norm() / want.double().norm() < 2**-10
        if act:
            codes = mk.grouped_gemm_rebased(
                rows, w, tiles, epilogue=replace(epilogue, requantize_to=mk.MXFP8), promote=True
            )
            live = (tiles.sorted_ids < ids.numel()) & (
                torch.arange(len(tiles.sorted_ids), device="cuda") < tiles.num_padded
            )
            whole = mk.quantize(got[0][tiles.sorted_ids[live].long()], mk.MXFP8)
            assert torch.equal(codes.data.view(torch.uint8)[live], whole.data.view(torch.uint8))


@pytest.mark.compile
@pytest.mark.parametrize("fp4", [False, True])
def test_compiles_with_split_k(fp4):
    compiled = _compiled(16, fp4, False, fp4, k=14336, split=4)
    assert "atom.global.gpu.acq_rel.add" in compiled.asm
    assert not any(code in compiled.log for code in ("C7510", "C7515"))
    assert compiled.spills == 0
    assert not compiled.overwritten()


@pytest.mark.gpu
@pytest.mark.parametrize("ptx", [True, False], ids=["ptx", "plain"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("k", [256, 416, 448])
def test_fp4_decoding_is_exact(monkeypatch, block_size, ptx, k):
    """One-hot activations, twelve octaves: every code under every scale comes out as it went in, whatever the place in a tile."""
    from mx_kernels.kernels import rebased

    if not ptx:
        plain = replace(rebased.target(torch.device("cuda", 0)), wgmma=False)
        monkeypatch.setattr(rebased, "target", lambda device: plain)
    experts, n = 3, 200  # neither rows nor columns fill their tiles
    codes = torch.randint(0, 16, (experts, n, k), device="cuda", dtype=torch.uint8)
    scale = torch.randint(110, 122, (experts, n, k // 32), device="cuda", dtype=torch.uint8)
    scale[..., 0] = 121
    w = mk.QuantizedTensor(reference.pack_codes(codes, mk.MXFP4), scale, mk.MXFP4, mk.MXFP4.default_rule)
    r = mk.rebase(w)
    assert r.changed == 0
    ids = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(k)[:, None]
    tiles = mk.moe_align_block_size(ids, block_size, experts, sort=True)
    x = torch.eye(k, device="cuda").repeat(experts, 1)
    y = mk.grouped_gemm_rebased(mk.rebase_rows(x, tiles, top_k=1), r, tiles, scatter=True, out_dtype=torch.float32)
    assert torch.equal(y.unflatten(0, (experts, k)).transpose(1, 2), mk.dequantize(w, torch.float32))


def _compiled(block_m, promote, gated, fp4=False, target="sm_90", k=2880, split=1, **options):
    """gated: GEMM 1, whose result is quantized; otherwise GEMM 2, whose result is by pair."""
    from mx_kernels.kernels import rebased
    from mx_kernels.kernels.launch import takes_registers

    from .aot import compile_kernel

    config = {**rebased.tile_config(block_m, promote, fp4, gated), **options}
    bn = config.pop("BN")
    signature = {
        "x": f"tensordesc<fp8e4nv[{block_m},128]>", "w": "*i32" if fp4 else f"tensordesc<fp8e4nv[{bn},128]>",
        "octaves": "*u8" if fp4 else "*bf16", "x_scale": "*fp32", "w_scale": "*fp32", "y": "*fp8e4nv" if gated else "*bf16",
        "y_scale": "*u8", "sorted_ids": "*i32", "expert_ids": "*i32", "num_padded": "*i32", "bias": "*bf16", "row_weight": "*fp32",
        "partial": "*fp32", "counter": "*i32", "n_pairs": "i32", "N": "i32", "N_OUT": "i32",
    }  # fmt: skip
    constants = {
        "K": k, "BM": block_m, "BN": bn, "BK": 128, "GROUP": 8, "SPLIT": split, "SWAP": config.pop("SWAP"), "PROMOTE": promote, "FP4": fp4,
        "PTX": target == "sm_90", "DRAIN": target == "sm_90" and takes_registers(), "BIAS": gated, "WEIGHTED": not gated,
        "SCATTER": not gated, "QUANTIZE": gated, "GATED": gated, "KIND": "swiglu_oai" if gated else "", "ALPHA": 1.702, "BETA": 1.0,
        "LIMIT": 7.0,
    }  # fmt: skip
    return compile_kernel(rebased._grouped_gemm_rebased_kernel, signature, constants, target, **config)


@pytest.mark.compile
@pytest.mark.parametrize("gated", [True, False], ids=["gemm1", "gemm2"])
@pytest.mark.parametrize(
    ("fp4", "block_m", "promote"),
    [(f, b, p) for f in (False, True) for b in (16, 32, 64, 128) for p in (True, False) if p or b >= 64 or not f],
)
def test_compiles_to_fp8_wgmma(fp4, block_m, promote, gated):
    """FP8 warpgroup products, none serialized; the shipped tiles do not spill. Weights of four bits come from registers, eight codes
    in some twelve operations, and promoted sums are added there (always in blocks of fewer than 64 pairs)."""
    compiled = _compiled(block_m, promote, gated, fp4)
    assert compiled.opcodes()["QGMMA"] > 0
    assert "C7510" not in compiled.log
    assert "C7515" not in compiled.log
    assert compiled.spills == 0
    assert not compiled.overwritten()
    if fp4:
        products = [line for line in compiled.sass if line.startswith("QGMMA")]
        assert all(re.match(r"QGMMA\S+ R\d+, R\d+, gdesc", line) for line in products)
        loop = next(body for body in compiled.loops() if any(line.startswith("QGMMA") for line in body))
        words = 8 if promote and block_m == 128 else 16  # of a thread and step
        assert sum(line.startswith(("PRMT", "LOP3", "SHF", "IMAD")) for line in loop) <= 13 * words
        assert sum(line.startswith("FADD") for line in loop) == (block_m * words // 16 * promote)


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_89", "sm_100", "sm_120"])
def test_fp4_compiles_where_weights_do_not_come_from_registers(target):
    names = _compiled(32, True, True, True, target, num_stages=2).opcodes()
    assert any("MMA" in name for name in names), names


@pytest.mark.compile
@pytest.mark.parametrize("k", [32, 768, 2880, 14336])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("codes", [False, True], ids=["values", "codes"])
def test_rebase_rows_compiles(aot, dtype, k, codes):
    """FP8 conversions by the hardware, whole rows in registers without a spill."""
    from mx_kernels.kernels import rebased

    first, rest = rebased._split(k)
    signature = {
        "x": "*fp8e4nv" if codes else f"*{dtype}", "x_stride": "i32", "x_scale": "*u8", "out": "*fp8e4nv", "scale": "*fp32",
        "sorted_ids": "*i32", "num_padded": "*i32", "n_pairs": "i32", "top_k": "i32",
    }  # fmt: skip
    rows = rebased._rows_of_a_program(first)
    constants = {"K": k, "R": rows, "FIRST": first, "REST": rest, "CODES": codes, "LISTED": True, "GATHER": not codes}
    warps = rebased._warps(first, rows)
    made = aot.compile_kernel(
        rebased._rebase_rows_kernel, signature, constants, "sm_90", unaligned=("n_pairs", "top_k"), num_warps=warps
    )
    assert made.spills == 0
    assert any("F2FP" in name and "E4M3" in name for name in made.opcodes(full=True))


INTERPRETED = """
import torch
import mx_kernels as mk
from mx_kernels import reference
from mx_kernels.kernels import rebased

def operand(x, codes):
    q = mk.quantize(x, mk.MXFP8)
    return (q.data.view(torch.uint8), q.scale) if codes else (x, None)

for k in (32, 768, 2880):
    x = torch.randn(22, k) * torch.exp2(torch.randint(-9, 9, (22, k // 32)).float()).repeat_interleave(32, -1)
    ids = torch.rand(22, 7).topk(3).indices.int()
    ids[3, 1] = -1
    tiles = mk.moe_align_block_size(ids, 4 if k == 32 else 16, 7, sort=True)
    slot = torch.arange(len(tiles.sorted_ids))
    listed = (slot < tiles.num_padded) & (tiles.sorted_ids < tiles.num_pairs)
    lists = tiles.sorted_ids, tiles.num_padded, tiles.num_pairs
    for codes in (False, True):
        for rebased.COPIED in (1 << 40, 1):
            for given, args in ((x, (None, None, 0, 0)), (x, (*lists, 3)), (x[slot % 22], (*lists, 0))):
                got, want = (f(*operand(given, codes), *args) for f in (rebased.rebase_rows, reference.rebase_rows))
                live = listed if args[0] is not None else torch.ones(22, dtype=bool)
                assert torch.equal(got[1][live], want[1][live])
                assert ((got[0][live].int() - want[0][live].int()).abs() <= 8).all()
print("right")
"""


@pytest.mark.compile
def test_rows_in_the_interpreter(interpreted):
    """Which row goes where. The interpreter rounds some FP8 values down and loses a carry into the exponent: codes up to 8 apart."""
    interpreted(INTERPRETED)


@pytest.mark.compile
@pytest.mark.parametrize("words", [192, 1792])
def test_copies_take_sixteen_bytes(aot, words):
    from mx_kernels.kernels import rebased

    signature = {
        "words": "*i32",
        "scale": "*fp32",
        "out": "*i32",
        "out_scale": "*fp32",
        "sorted_ids": "*i32",
        "num_padded": "*i32",
    }
    signature |= {"n_pairs": "i32", "top_k": "i32", "W": "i32"}
    made = aot.compile_kernel(
        rebased._copy_rows_kernel, signature, {"R": 8 if words < 512 else 2, "WIDTH": 1 << (words - 1).bit_length()}, "sm_90",
        unaligned=("n_pairs", "top_k"), num_warps=4,
    )  # fmt: skip
    names = made.opcodes(full=True)
    assert names["LDG.E.128"] == names["STG.E.128"] > 0
    assert made.spills == 0


def test_devices_without_fp8_are_refused(monkeypatch):
    kernels = pytest.importorskip("mx_kernels.kernels.rebased", exc_type=ImportError)
    from mx_kernels.kernels.launch import Target

    monkeypatch.setattr(kernels, "target", lambda device: Target(False, True, 108))
    with pytest.raises(mk.Unsupported, match="sm_89 and later"):
        kernels._needs_fp8(torch.device("cuda", 0))
    kernels._needs_fp8(torch.device("cpu"))
