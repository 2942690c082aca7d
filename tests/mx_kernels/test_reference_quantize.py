"""Block scales and quantization of the reference: golden vectors, rules on all mantissas, what becomes of special values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mx_kernels import FORMATS, MXFP4, MXFP8, NVFP4, ScaleRule, reference
from mx_kernels.formats import E2M1, E4M3

MX = {f.element.name: f for f in FORMATS.values() if f.scale == "e8m0"}
RULES = (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL)
mx = pytest.mark.parametrize("f", MX.values(), ids=str)


def load(path):
    return {k: torch.from_numpy(v) for k, v in np.load(path).items()}


def no_negative_zero(codes, element):
    return torch.where(codes == 1 << (element.bits - 1), 0, codes)


@mx
@pytest.mark.parametrize("rule", RULES)
def test_golden_blocks(f, rule, golden):
    v = load(golden / "mx_blocks.npz")
    codes, scale = reference.quantize_codes(v["x"], f, rule)
    assert torch.equal(codes, v[f"{f.element.name}.{rule}.codes"])
    assert torch.equal(scale[:, 0], v[f"{f.element.name}.{rule}.scale"])


# tool and element -> the rule it follows, rows whose scale differs, and how its codes differ where the scale is the same
TOOLS = {
    "vllm.e4m3": ("rceil", (), ""),
    "modelopt.e4m3": ("rceil", (), ""),
    "triton_kernels_vllm033.e4m3.round_up": ("rceil", (), ""),
    "triton_kernels_vllm033.e5m2.round_up": ("rceil", (), ""),
    # >= where the rule has >: amax mantissas of exactly 1.75; and the largest bf16 number, whose scale it wraps.
    "compressed_tensors.e4m3": ("rceil", (116, 117, 118, 119, 120, 169), ""),
    "compressed_tensors.e2m1": ("even", (169,), "-0"),
    "compressed_tensors.e2m3": ("even", (169,), ""),
    "quark.e2m1": ("even", (169,), "-0"),
    "quark.e2m3": ("even", (169,), "-0"),
    "quark.e3m2": ("even", (169,), "-0"),
    "modelopt.e2m1": ("rceil", (), "ties"),  # ties toward zero, and 0 as 0x8
    "triton_kernels_vllm033.e2m1.round_up": ("rceil", (), "ties"),  # ties away from zero
}


@pytest.mark.parametrize("tool", TOOLS)
def test_golden_tools(tool, golden):
    v = load(golden / "mx_by_tool.npz")
    rule, other_scales, other_codes = TOOLS[tool]
    f = MX[tool.split(".")[1]]
    codes, scale = reference.quantize_codes(v["x"], f, rule)
    differ = scale[:, 0] != v[f"{tool}.scale"]
    assert tuple(differ.nonzero().view(-1).tolist()) == other_scales
    ours, theirs = codes[~differ], v[f"{tool}.codes"][~differ]
    if not other_codes:
        assert torch.equal(ours, theirs)
        return
    assert not torch.equal(ours, theirs)  # otherwise the exception above is out of date
    ours, theirs = no_negative_zero(ours, f.element), no_negative_zero(theirs, f.element)
    differ_at = ours != theirs
    if other_codes == "-0":
        assert not differ_at.any()
        return
    ratio = (v["x"][~differ] * reference.scale_to_reciprocal(scale[~differ]))[differ_at].abs()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert len(ratio)
    assert bool(torch.isin(ratio, ties).all())


@mx
def test_rceil_is_the_exact_logarithm_for_all_mantissas(f):
    """ceil(log2(amax / max)): the smallest byte at which amax does not saturate, over all 2^23 mantissas of one binade."""
    element, exponent = f.element, 140
    for start in range(0, 1 << 23, 1 << 20):
        bits = (exponent << 23) + torch.arange(start, start + (1 << 20), dtype=torch.int32)
        byte = reference.e8m0_scale(bits, element, ScaleRule.RCEIL)
        amax = bits.view(torch.float32).double()
        limit = element.max * torch.exp2(byte.double() - 127)
        assert bool((amax <= limit).all())
        assert bool((amax > limit / 2).all())


@mx
@pytest.mark.parametrize("rule", RULES)
def test_rules_by_their_definitions(f, rule):
    element = f.element
    bits = torch.cat([(e << 23) + torch.arange(0, 1 << 23, 4099, dtype=torch.int32) for e in range(0, 255, 6)])
    edges = torch.tensor(
        [0x3FFFFF, 0x400000, 0x400001, 0x600000, 0x600001, 0x700000, 0x700001, 0x7FFFFF], dtype=torch.int32
    )
    bits = torch.cat((bits, *((e << 23) + edges for e in (0, 1, 100, 254))))
    e, m = bits >> 23, bits & 0x7FFFFF
    top = {"e4m3": 0x600000, "e5m2": 0x600000, "e3m2": 0x600000, "e2m3": 0x700000, "e2m1": 0x400000}[element.name]
    want = {
        ScaleRule.FLOOR: e,
        ScaleRule.CEIL: e + (m > 0),
        ScaleRule.EVEN: (bits + (1 << (22 - element.mantissa))) >> 23,
        ScaleRule.RCEIL: e + (m > top),
    }[rule]
    want = (want - element.emax).clamp(0, 254).to(torch.uint8)
    assert torch.equal(reference.e8m0_scale(bits, element, rule), want)


def test_a_search_is_not_a_rule_of_one_scale():
    with pytest.raises(ValueError, match="'search' is not a rule of one E8M0 scale"):
        reference.e8m0_scale(torch.zeros(1, dtype=torch.int32), E4M3, ScaleRule.SEARCH)


@mx
def test_every_scale_byte_is_reached_and_scaling_by_two_shifts_it(f):
    base = torch.randn(64, 32).clamp(-3.9, 3.9)
    base[:, 0] = 2.0
    codes, scale = reference.quantize_codes(base, f)
    seen = set()
    for shift in range(-100, 120, 3):
        c, s = reference.quantize_codes(base * 2.0**shift, f)
        assert torch.equal(c, codes)
        assert torch.equal(s.int(), scale.int() + shift)
        seen.update(s.view(-1).tolist())
    assert len(seen) >= 74


@mx
@pytest.mark.parametrize("rule", [*RULES, ScaleRule.SEARCH])
def test_special_blocks(f, rule):
    x = torch.randn(6, 32)
    x[0] = 0.0
    x[0, 3] = -0.0
    x[1, 5] = math.nan
    x[2, 5], x[2, 6] = math.inf, math.nan
    x[3, 7] = -math.inf
    x[4] *= 2.0**-140
    codes, scale = reference.quantize_codes(x, f, rule)
    sign = 1 << (f.element.bits - 1)
    assert scale[:5, 0].tolist() == [0, 255, 255, 254, 0]
    assert codes[0].tolist() == [0] * 3 + [sign] + [0] * 28
    assert not codes[1:3].any()
    assert codes[3, 7] == f.element.max_code | sign
    assert bool((codes[3, :7] % sign == 0).all())  # 1 is nothing beside 2^127
    values = reference.dequantize_parts(reference.pack_codes(codes, f), scale, None, f)
    assert bool(values[1:3].isnan().all())
    assert values[3, 7] == -math.inf  # the largest code at 2^127 is beyond float32
    assert bool(torch.cat((values[3, :7], values[[0, 4, 5]].view(-1))).isfinite().all())
    # Byte 0 is 2^-127: subnormal blocks keep what that scale can hold.
    assert bool(((values[4] - x[4]).abs() <= 2.0**-127 * 0.5).all())


SPECIAL = ("e4m3", "e2m3", "e2m1")


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("element", SPECIAL)
def test_golden_special_blocks(element, rule, golden):
    """Blocks of zeros, subnormals, the largest numbers, NaN and Inf as torchao writes them; where we differ, how."""
    found = json.loads((golden / "special_blocks.json").read_text())
    assert len(found) >= 12
    for name, block in found.items():
        bits = np.array([int(b, 16) for b in block["x_f32_bits"]], dtype=np.uint32)
        codes, scale = reference.quantize_codes(torch.from_numpy(bits.view(np.float32)), MX[element], rule)
        ours, (byte, theirs) = (int(scale), codes.tolist()), block[f"torchao.{element}.{rule}"]
        if "nan" in name:  # theirs are codes of numbers under a NaN scale; ours are 0
            assert (ours, byte) == ((255, [0] * 32), 255), name
        elif "inf" in name:  # the same codes; their FLOOR and EVEN take Inf's exponent field for a number's
            assert ours == (254, theirs), name
        elif name == "tiny_2^-130":  # they divide by 2^-126 at least
            exact = reference.encode(torch.from_numpy(bits.view(np.float32)).double() * 2.0**127, MX[element].element)
            assert (*ours, byte) == (0, exact.tolist(), 0), name
        elif name.startswith("f32_448+1ulp") and (element, rule) == (
            "e4m3",
            "rceil",
        ):  # their float32 logarithm rounds down
            assert ours[0] == byte + 1, name
        else:
            assert ours == (byte, theirs), name


@mx
def test_search_takes_the_better_scale(f):
    x = torch.randn(400, 32) * torch.exp(torch.randn(400, 1))
    error = {}
    for rule in (ScaleRule.SEARCH, ScaleRule.FLOOR, ScaleRule.CEIL):
        codes, scale = reference.quantize_codes(x, f, rule)
        values = reference.dequantize_parts(reference.pack_codes(codes, f), scale, None, f)
        error[rule] = (values - x).double().square().sum(-1)
    best = torch.minimum(error[ScaleRule.FLOOR], error[ScaleRule.CEIL])
    # CEIL is FLOOR's next scale (mantissas are never 0 here), so the search equals the better of the two.
    torch.testing.assert_close(error[ScaleRule.SEARCH], best, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
@pytest.mark.parametrize("tool", ["te_ref", "vllm_ref", "torchao", "modelopt", "compressed_tensors"])
def test_golden_nvfp4(kind, tool, golden):
    v = load(golden / "nvfp4.npz")
    x = v["bf16.x"].view(torch.bfloat16) if kind == "bf16" else v["f32.x"]
    g = reference.compute_global_scale(x)
    stored = v[f"{kind}.{tool}.global"]
    expected = {"torchao": g, "modelopt": g, "te_ref": x.abs().amax().float()}.get(tool, 1 / g)
    if (kind, tool) == ("bf16", "compressed_tensors"):
        expected = expected.bfloat16().float()  # it computes in the input's dtype
    torch.testing.assert_close(stored, expected, rtol=2**-23, atol=0)
    codes, scale = reference.quantize_codes(x, NVFP4, global_scale=g)
    theirs, bytes_ = reference.unpack_codes(v[f"{kind}.{tool}.packed"], NVFP4), v[f"{kind}.{tool}.scale_e4m3_bytes"]
    used = scale != 0  # tools differ in the scale byte that they give to a block of zeros
    assert used.sum() == scale.numel() - 2
    if (kind, tool) == ("bf16", "compressed_tensors"):
        assert (
            int((scale != bytes_)[used].sum()) == 13
        )  # its global scale is rounded to bf16: 5% of the blocks, one step
        assert int((scale.int() - bytes_.int())[used].abs().max()) == 1
    else:
        assert torch.equal(scale[used], bytes_[used])
        differ = no_negative_zero(codes, E2M1) != no_negative_zero(theirs, E2M1)
        # ModelOpt divides by the scales one after the other: two quotients fall on the other side of a tie.
        assert int(differ.sum()) == (2 if (kind, tool) == ("bf16", "modelopt") else 0)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_golden_four_over_six(kind, golden):
    v = load(golden / "nvfp4.npz")
    x = v["bf16.x"].view(torch.bfloat16) if kind == "bf16" else v["f32.x"]
    g = reference.compute_global_scale(x)
    codes, scale = reference.quantize_codes(x, NVFP4, ScaleRule.FOUR_OVER_SIX, g)
    assert torch.equal(scale, v[f"{kind}.te_ref_4over6_MSE_448.scale_e4m3_bytes"])
    theirs = reference.unpack_codes(v[f"{kind}.te_ref_4over6_MSE_448.packed"], NVFP4)
    assert torch.equal(no_negative_zero(codes, E2M1), no_negative_zero(theirs, E2M1))


def test_nvfp4_search_is_the_best_of_nine_codes():
    x = torch.randn(300, 16)
    g = reference.compute_global_scale(x)
    _, standard = reference.quantize_codes(x, NVFP4, ScaleRule.AMAX, g)
    best = torch.full((300,), math.inf, dtype=torch.float64)
    for d in range(-3, 6):
        scale = (standard.int() + d).clamp(1, 0x7E).to(torch.uint8)
        step = reference.decode(scale, E4M3) * g
        values = reference.decode(reference.encode(x * (1 / step), E2M1), E2M1).double() * step.double()
        best = torch.minimum(best, (values - x.double()).square().sum(-1))
    codes, scale = reference.quantize_codes(x, NVFP4, ScaleRule.SEARCH, g)
    values = reference.decode(codes, E2M1).double() * (reference.decode(scale, E4M3) * g).double()
    torch.testing.assert_close((values - x.double()).square().sum(-1), best, rtol=1e-12, atol=0)


def test_nvfp4_special_blocks():
    x = torch.randn(5, 16)
    x[0], x[1, 3], x[2, 4] = -0.0, math.nan, -math.inf
    x[3] *= 1e-9
    g = reference.compute_global_scale(x)
    assert g == x.nan_to_num(0, 0, 0).abs().max() / 2688  # of the finite numbers
    for rule in NVFP4.rules:
        codes, scale = reference.quantize_codes(x, NVFP4, rule, g)
        assert scale[:4, 0].tolist() == [0, 0x7F, 0x7E, 1]  # a tiny block keeps the smallest scale
        assert codes[0].tolist() == [8] * 16
        assert not codes[1].any()
        assert codes[2, 4] == 0xF
        values = reference.dequantize_parts(reference.pack_codes(codes, NVFP4), scale, g, NVFP4)
        assert bool(values[1].isnan().all())
        assert bool(values[[0, 2, 3, 4]].isfinite().all())


def test_global_scale():
    assert reference.compute_global_scale(torch.zeros(3, 16)) == 1
    assert reference.compute_global_scale(torch.full((16,), math.nan)) == 1
    assert reference.compute_global_scale(torch.full((16,), -5376.0)) == 2
    assert reference.compute_global_scale(torch.full((1, 16), 1e-40)) == reference.GLOBAL_MIN
    x = torch.randn(2, 3, 4, 16)
    assert torch.equal(reference.compute_global_scale(x), x.abs().amax((-1, -2)) / 2688)
    assert reference.compute_global_scale(torch.empty(2, 0, 16)).tolist() == [1, 1]


def test_signal_to_noise_of_every_rule(golden):
    """Against another program's figures on another sample of the same distribution: within 0.1 dB."""
    want = json.loads((golden / "error_metrics.json").read_text())
    nvfp4 = {ScaleRule.AMAX: "std_448", ScaleRule.FOUR_OVER_SIX: "4o6_448", ScaleRule.SEARCH: "mse_448"}
    x = (torch.randn(256, 4096) * 0.02).bfloat16()  # the deviation matters: rules depend on where amax is in its binade
    for f in FORMATS.values():
        for rule in f.rules:
            q = reference.quantize(x, f, rule=rule)
            error = (reference.dequantize(q, torch.float32) - x.float()).double()
            snr = 10 * math.log10(float(x.double().square().sum() / error.square().sum()))
            row = want["nvfp4"]["gauss"] if f == NVFP4 else want["mx"][f"{f.element.name}.gauss"]
            key = nvfp4[rule] if f == NVFP4 else "mse_search_floor_0_+1" if rule == "search" else rule
            assert abs(snr - row[key]["snr_db"]) < 0.1, (f.name, rule, snr)


def test_torchao():
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = (torch.randn(64, 128) * torch.exp(2 * torch.randn(64, 1))).bfloat16()
    modes = mx_tensor.ScaleCalculationMode
    for f, dtype in ((MXFP8, torch.float8_e4m3fn), (MXFP4, torch.float4_e2m1fn_x2)):
        for rule in RULES:
            scale, data = mx_tensor.to_mx(x, dtype, 32, scaling_mode=modes[rule.name])
            q = reference.quantize(x, f, rule=rule)
            assert torch.equal(scale.view(torch.uint8), q.scale)
            assert torch.equal(data.view(torch.uint8), q.data.view(torch.uint8))
