"""quantize, dequantize, quantize_dequantize: the CPU path equals the reference bit for bit; ops, tracing, properties, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_kernels import FORMATS, MXFP4, MXFP8, NVFP4, ScaleRule, cpu, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [(f, rule) for f in FORMATS.values() for rule in f.rules]
formats = pytest.mark.parametrize("f", FORMATS.values(), ids=str)


def same(a, b):
    """Equal values and signs of zero; any NaN equals any NaN."""
    a, b = a.float(), b.float()
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def assert_equals_reference(x, f, rule, global_scale=None):
    q, want = (
        mk.quantize(x, f, rule=rule, global_scale=global_scale),
        reference.quantize(x, f, rule=rule, global_scale=global_scale),
    )
    assert torch.equal(q.scale.view(torch.uint8), want.scale.view(torch.uint8))
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    assert (q.format, q.rule, q.dtype, q.shape) == (f, f.check_rule(rule), x.dtype, x.shape)
    for dtype in DTYPES:
        assert same(mk.dequantize(q, dtype), reference.dequantize(want, dtype))


def hard_values(rows, k, block, dtype):
    """Blocks of every magnitude, multiples of 1/64 (ties), random bit patterns (NaN and Inf among them), zeros of both signs."""
    shape = (rows // 4, k // block, block)
    bits = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    patterns = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype).float()
    low, high = (-20, 14) if dtype == torch.float16 else (-140, 110)
    power = torch.exp2(torch.randint(low, high, (*shape[:2], 1)).float())
    normal = torch.randn(shape) * power
    ties = torch.randint(-512, 513, shape) / 64 * power
    sparse = torch.where(torch.rand(shape) < 0.05, normal, -0.0 * torch.rand((*shape[:2], 1)).round())
    return torch.cat((patterns, normal, ties, sparse)).reshape(rows, k).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("f", "rule"), CASES, ids=str)
def test_equals_the_reference(f, rule, dtype):
    g = torch.tensor(2.0**-9) if f.has_global_scale else None
    assert_equals_reference(hard_values(64, 512, f.block, dtype), f, rule, g)


@pytest.mark.parametrize(("f", "rule"), [c for c in CASES if c[1] not in cpu._SEARCHES], ids=str)
def test_every_bf16_number_at_many_scales(f, rule):
    """All 65,536 patterns in blocks whose first element, of each exponent, sets the scale."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()]
    others = torch.nn.functional.pad(patterns, (0, -len(patterns) % (f.block - 1))).view(-1, f.block - 1)
    g = torch.tensor(2.0**-40) if f.has_global_scale else None
    default = rule is f.default_rule
    for exponent in (0, 1, 7, 20, 60, 126, 127, 128, 223, 224, 254) if default else (1, 127, 224):
        for mantissa in (0, 0x20, 0x60, 0x61, 0x7F) if default else (0x60, 0x61):
            amax = torch.tensor(exponent << 7 | mantissa, dtype=torch.int16).view(torch.bfloat16)
            rest = torch.where(others.abs() <= amax, others, amax)
            x = torch.cat((amax.expand(len(rest), 1), rest), 1)
            data, scale = cpu.quantize(x, f.name, rule.value, g)
            codes, want = reference.quantize_codes(x, f, rule, g)
            assert torch.equal(scale, want)
            assert torch.equal(data, reference.pack_codes(codes, f))


@pytest.mark.parametrize(("f", "rule"), CASES, ids=str)
def test_threads_and_chunks(f, rule, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 512)
    threads = torch.get_num_threads()
    x = torch.randn(5, 7, 160)
    x[1, 2, 3], x[4, 6, 150] = math.nan, math.inf
    g = torch.rand(5) + 0.01 if f.has_global_scale else None
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with torch.inference_mode(n == 3):
                assert_equals_reference(x, f, rule, g)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 512)
    monkeypatch.setattr(cpu, "_Work", lambda *args: 1 / 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            mk.quantize(torch.randn(64, 64), MXFP8)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@formats
def test_shapes_strides_and_nothing(f):
    x = torch.randn(4, 6, 128).bfloat16()
    q = mk.quantize(x, f)
    assert q.data.shape == (4, 6, f.data_width(128))
    assert q.scale.shape == (4, 6, 128 // f.block)
    assert mk.dequantize(q).shape == x.shape
    wide = torch.randn(4, 6, 256).bfloat16()
    strided = mk.quantize(wide[:, ::2, :128], f)
    dense = mk.quantize(wide[:, ::2, :128].contiguous(), f)
    assert torch.equal(strided.data.view(torch.uint8), dense.data.view(torch.uint8))
    assert same(mk.dequantize(strided[1:]), mk.dequantize(dense)[1:])
    assert mk.quantize(x[0, 0], f).data.shape == (f.data_width(128),)
    for empty in (x[:0], x[:, :0]):
        assert mk.dequantize(mk.quantize(empty, f)).shape == empty.shape
        assert mk.quantize_dequantize(empty, f).shape == empty.shape
    before = x.clone()
    mk.quantize_dequantize(x, f)
    assert torch.equal(x, before)


@formats
def test_quantize_dequantize_is_both(f):
    x = hard_values(16, 128, f.block, torch.bfloat16)
    for rule in f.rules:
        out = mk.quantize_dequantize(x, f, rule=rule)
        assert out.dtype == x.dtype
        assert same(out, mk.dequantize(mk.quantize(x, f, rule=rule)))
        assert same(out, reference.quantize_dequantize(x, f, rule=rule))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computed_global_scale_equals_the_reference(dtype):
    x = torch.randn(2, 3, 4, 32).to(dtype)
    x[0, 1] = 0
    for part in (x, x[0, 0], x[0, 0, 0], x[:0], x[..., :0, :], x[:, :, ::2, :16]):
        assert torch.equal(mk.compute_global_scale(part), reference.compute_global_scale(part))
    x[1, 0, 2, 3], x[1, 1, 2, 3] = math.nan, -math.inf
    g = mk.compute_global_scale(x)
    assert torch.equal(g, reference.compute_global_scale(x))
    assert bool(g.isfinite().all())


def test_global_scales():
    x = torch.randn(3, 4, 5, 32)
    q = mk.quantize(x, NVFP4)
    assert torch.equal(q.global_scale, x.abs().amax((-1, -2)) / 2688)
    assert mk.quantize(x[0, 0], NVFP4).global_scale.shape == ()
    for g in (torch.tensor(1e-3), torch.rand(3) + 0.1, torch.rand(3, 4) + 0.1):
        q = mk.quantize(x, NVFP4, global_scale=g)
        for i in range(3):
            part = g if g.ndim == 0 else g[i]
            one = mk.quantize(x[i], NVFP4, global_scale=part)
            assert torch.equal(q[i].data, one.data)
            assert same(mk.dequantize(q)[i], mk.dequantize(one))


@formats
def test_ops_pass_opcheck(f):
    x = torch.randn(2, 3, 64).bfloat16()
    g = mk.compute_global_scale(x) if f.has_global_scale else None
    ops = torch.ops.mx_kernels
    args = (x, f.name, f.default_rule.value, g)
    torch.library.opcheck(ops.quantize.default, args)
    torch.library.opcheck(ops.quantize_dequantize.default, args)
    torch.library.opcheck(ops.compute_global_scale.default, (x,))
    data, scale = ops.quantize(*args)
    torch.library.opcheck(ops.dequantize.default, (data, scale, g, f.name, torch.float16))
    torch.library.opcheck(ops.dequantize.default, (data, scale, g, f.name, torch.float16, torch.tensor([1, 0, 1])))


@formats
def test_compiles_to_one_graph_and_runs_on_meta(f):
    def both(x):
        q = mk.quantize(x, f)
        return q.data.view(torch.uint8), q.scale.view(torch.uint8), mk.dequantize(q), mk.quantize_dequantize(x, f)

    x = torch.randn(2, 3, 64).bfloat16()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b, c in zip(compiled(x), both(x), both(x.to("meta"))):
        assert torch.equal(a, b)
        assert (c.shape, c.dtype, c.device.type) == (b.shape, b.dtype, "meta")


values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
one_case = st.sampled_from(CASES)


@given(st.lists(values, min_size=32, max_size=32), one_case)
@settings(max_examples=60, deadline=None)
def test_sign_symmetry(x, case):
    f, rule = case
    x = torch.tensor(x)
    assert torch.equal(mk.quantize_dequantize(-x, f, rule=rule), -mk.quantize_dequantize(x, f, rule=rule))


@given(st.lists(values, min_size=32, max_size=32), st.sampled_from([c for c in CASES if c[0] != NVFP4]))
@settings(max_examples=60, deadline=None)
def test_idempotent(x, case):
    """A dequantized block quantizes to itself: its scale can only become finer, on a grid that holds the coarser one."""
    f, rule = case
    once = mk.quantize_dequantize(torch.tensor(x), f, rule=rule)
    assert torch.equal(mk.quantize_dequantize(once, f, rule=rule), once)


@given(st.lists(values, min_size=32, max_size=32), st.sampled_from([c for c in CASES if c[0] != NVFP4]))
@settings(max_examples=60, deadline=None)
def test_monotone_within_a_block(x, case):
    f, rule = case
    x = torch.tensor(sorted(x))
    assert bool((mk.quantize_dequantize(x, f, rule=rule).diff() >= 0).all())


@given(st.lists(values, min_size=32, max_size=32), st.integers(-40, 40), one_case)
@settings(max_examples=60, deadline=None)
def test_scaling_by_a_power_of_two(x, power, case):
    f, rule = case
    # Scales are clamped where magnitudes are next to nothing: keep clear of that.
    x = torch.tensor([v if abs(v) > 1e-3 else 0.0 for v in x])
    scaled = mk.quantize_dequantize(x * 2.0**power, f, rule=rule)
    assert torch.equal(scaled, mk.quantize_dequantize(x, f, rule=rule) * 2.0**power)


@formats
def test_error_is_within_half_a_step(f):
    x = torch.randn(32, 128)
    rule = {"e8m0": ScaleRule.RCEIL, "e4m3": ScaleRule.AMAX}[f.scale]  # rules that do not saturate (NVFP4: by a 16th)
    error = (mk.quantize_dequantize(x, f, rule=rule) - x).abs()
    amax = x.unflatten(-1, (-1, f.block)).abs().amax(-1).repeat_interleave(f.block, -1)
    relative = x.abs() * 2.0 ** -(f.element.mantissa + 1)
    smallest = amax * 2 * 2.0 ** (1 - f.element.bias - f.element.mantissa) / f.element.max / 2
    saturation = amax / 16 if f == NVFP4 else 0
    assert bool((error <= torch.maximum(relative, smallest) + saturation).all())


# --- bad input ---


@pytest.mark.parametrize("call", [mk.quantize, mk.quantize_dequantize])
def test_bad_input(call):
    x = torch.randn(4, 64)
    with pytest.raises(TypeError, match=r"x is torch\.int64, needs float32, bfloat16 or float16"):
        call(torch.ones(4, 64, dtype=torch.int64), MXFP8)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        call(x.double(), MXFP8)
    with pytest.raises(ValueError, match="x has no dimensions"):
        call(torch.tensor(1.0), MXFP8)
    with pytest.raises(
        ValueError, match=r"the last dimension of x is 40, but mxfp4 needs a positive multiple.*32.*pad K to 64"
    ):
        call(torch.randn(4, 40), MXFP4)
    with pytest.raises(ValueError, match="the last dimension of x is 0"):
        call(torch.randn(4, 0), MXFP4)
    with pytest.raises(ValueError, match="stride 4 along its last dimension"):
        call(torch.randn(64, 4).t(), MXFP8)
    with pytest.raises(ValueError, match="unknown format 'mxfp5'"):
        call(x, "mxfp5")
    with pytest.raises(ValueError, match="mxfp8_e4m3 has no scale rule 'amax'"):
        call(x, MXFP8, rule=ScaleRule.AMAX)
    with pytest.raises(ValueError, match="unknown scale rule 'round'"):
        call(x, MXFP8, rule="round")
    with pytest.raises(ValueError, match="mxfp8_e4m3 has no global scale"):
        call(x, MXFP8, global_scale=torch.tensor(1.0))


@pytest.mark.parametrize("call", [mk.quantize, mk.quantize_dequantize])
def test_bad_global_scale(call):
    x = torch.randn(2, 4, 64)
    with pytest.raises(TypeError, match=r"global_scale is torch\.float64, needs float32"):
        call(x, NVFP4, global_scale=torch.ones((), dtype=torch.float64))
    for shape in ((1,), (3,), (2, 4)):
        with pytest.raises(ValueError, match="needs \\[\\] or a prefix of x's leading dimensions \\(2,\\)"):
            call(x, NVFP4, global_scale=torch.ones(shape))
    for value in (0.0, -1.0, math.nan, math.inf, 1e-40):
        with pytest.raises(ValueError, match="needs a multiplier in"):
            call(x, NVFP4, global_scale=torch.tensor([1.0, value]))
        with pytest.raises(ValueError, match="needs a multiplier in"):
            call(x, NVFP4, global_scale=torch.tensor(value))
    with pytest.raises(ValueError, match="global_scale is on meta and x on cpu"):
        call(x, NVFP4, global_scale=torch.ones((), device="meta"))
    with pytest.raises(TypeError, match=r"x is torch\.int32"):
        mk.compute_global_scale(x.int())


@formats
def test_rows_alone_are_dequantized(f):
    q = mk.quantize(torch.randn(5, 3, 96), f)
    q.scale.view(torch.uint8)[[0, 3]] = 255  # NaN, should they be read
    whole = reference.dequantize(q)
    for rows in (torch.tensor([4, 1, 1, 2]), torch.tensor([2, 4], dtype=torch.int32)):
        assert same(mk.dequantize(q, rows=rows), whole[rows])
    some = mk.dequantize(q, torch.bfloat16, rows=torch.tensor([4, -1, 2]))
    assert same(some[[0, 2]], whole[[4, 2]].bfloat16())
    assert mk.dequantize(q, rows=torch.empty(0, dtype=torch.int64)).shape == (0, 3, 96)
    one = mk.quantize(torch.randn(5, 96), f)
    assert same(mk.dequantize(one, rows=torch.tensor([3])), reference.dequantize(one)[[3]])
    compiled = torch.compile(lambda q, rows: mk.dequantize(q, rows=rows), fullgraph=True, backend="aot_eager")
    assert same(compiled(q, torch.tensor([4, 1])), whole[[4, 1]])


INTERPRETED = """
import torch, mx_kernels as mk
from mx_kernels.kernels import launch, quantize
chip = launch.Target(fp8=False, asm=False, units=4)
quantize.target = lambda device: chip
quantize.launch = lambda kernel, grid, device, *args, **options: kernel[grid](*args, **options)
rows = torch.tensor([4, -1, 0, 4, 2])
for f in mk.FORMATS.values():
    cases = [((5, 6, 3), None), ((5, 3, 3), torch.tensor(0.5)), ((5, 3, 3), torch.rand(5) + 0.5)]
    # a matrix of more tiles than a program takes, and no multiple of them
    cases += [((5, 200, 3), torch.rand(5) + 0.5)]
    if f.has_global_scale:  # two of a matrix, one or both of a program
        cases += [(shape, torch.rand(5, 2) + 0.5) for shape in ((5, 2, 16, 32), (5, 2, 100, 3))]
    for (*lead, blocks), g in cases:
        x = torch.randn(*lead, blocks * f.block)
        q = mk.quantize(x, f, global_scale=g if f.has_global_scale else None)
        given = (q.data.view(torch.uint8), q.scale.view(torch.uint8), q.global_scale, f.name, torch.float32)
        want = mk.reference.dequantize(q, torch.float32)
        assert torch.equal(quantize.dequantize(*given), want)
        for some, turns in ((rows, 4), *[(rows.int(), 1)] * (g is None)):
            quantize.turns_for = lambda matrices: turns
            assert torch.equal(quantize.dequantize(*given, some)[rows >= 0], want[rows[rows >= 0]])
print("right")
"""


@pytest.mark.compile
def test_the_dequantization_kernel_in_the_interpreter(interpreted):
    """Whole tensors and selected rows, on the CPU, where Triton is installed."""
    interpreted(INTERPRETED)


def test_bad_rows():
    q = mk.quantize(torch.randn(4, 3, 64), MXFP8)
    with pytest.raises(TypeError, match=r"rows is torch\.float32, needs int32 or int64"):
        mk.dequantize(q, rows=torch.ones(2))
    with pytest.raises(ValueError, match=r"rows has shape \(1, 2\)"):
        mk.dequantize(q, rows=torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows holds 4, but q has 4 of them"):
        mk.dequantize(q, rows=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="rows is on meta and q on cpu"):
        mk.dequantize(q, rows=torch.tensor([0], device="meta"))
    with pytest.raises(ValueError, match=r"q \(64,\), needs rows \[R\] and q \[E, \.\.\., K\]"):
        mk.dequantize(mk.quantize(torch.randn(64), MXFP8), rows=torch.tensor([0]))


def test_bad_dequantize():
    q = mk.quantize(torch.randn(4, 64), MXFP8)
    with pytest.raises(TypeError, match="q is Tensor, needs a QuantizedTensor"):
        mk.dequantize(q.data)
    with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
        mk.dequantize(q, torch.float64)
    with pytest.raises(ValueError, match="scale has stride"):
        mk.dequantize(mk.QuantizedTensor(q.data, q.scale.t().contiguous().t(), q.format, q.rule))


def test_torchao():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(64, 128).bfloat16()
    q = mk.quantize(x, NVFP4)
    scale, data = nvfp4.nvfp4_quantize(x, 16, q.global_scale)
    assert torch.equal(scale.view(torch.uint8).view(64, 8), q.scale.view(torch.uint8))
    ours, theirs = (reference.unpack_codes(t.view(torch.uint8).view(64, 64), NVFP4).int() for t in (q.data, data))
    # It multiplies by (1 / g) / s where we do by 1 / (s g): a few products fall on the other side of a tie.
    assert int((ours != theirs).sum()) <= ours.numel() // 1000
    assert int((ours - theirs).abs().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-120, -100, 0, 100, 126])
def test_codes_of_four_bits_at_either_end_of_float32(exponent, dtype):
    """Where float32 has no room for the power of two that makes float16 bits of the values, it is multiplied on apart."""
    x = (torch.randn(64, 64) * 2.0**exponent).clamp(-3e38, 3e38).to(dtype)
    x[3] = 0
    for rule in (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.RCEIL):
        assert_equals_reference(x, MXFP4, rule)
    for g in (2.0**-117, 2.0 ** max(-117, min(117, exponent)), 2.0**117):
        assert_equals_reference(x, NVFP4, None, torch.tensor(g))
