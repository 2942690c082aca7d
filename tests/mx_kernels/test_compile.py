"""Every small kernel compiles ahead of time for every target; on sm_90 the shipped configurations do not spill."""

from __future__ import annotations

import pytest
import torch

from mx_kernels import FORMATS, MXFP4, MXFP6_E3M2, MXFP8, NVFP4

pytestmark = pytest.mark.compile
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1250")
NO_FUSION = {"enable_fp_fusion": False}


def facts(target):
    """(FP8, ASM) as ``kernels.launch.target`` finds them on such a device."""
    nvidia = target.startswith("sm")
    return nvidia and target != "sm_80", nvidia


def checked(compiled, registers=128):
    """No spills, and enough threads fit to keep the memory busy."""
    assert compiled.spills == 0
    if compiled.target == "sm_90":
        assert "C7510" not in compiled.log
        assert compiled.registers <= registers
    elif compiled.target.startswith("gfx9"):
        # Scales of 2^-127 and decoded codes are subnormal: the kernel must run with subnormals on.
        assert "float_denorm_mode_32 3" in compiled.asm
    return compiled


def compile_quantize(aot, target, f, *, dtype="bf16", rule=None, rows=False, many=0, round_trip=False, pairs=True):
    from mx_kernels.kernels import quantize

    fp8, asm = facts(target)
    bits = f.element.bits
    signature = {"x": f"*{dtype}", "data": f"*{dtype}" if round_trip else "*u8", "stride": "i32"}
    signature |= {"blocks": "i32", "per_row": "i32", "per_global": "i32"}
    optional = {"scale": (not round_trip, "*u8"), "global_scale": (f.has_global_scale, "*fp32")}
    signature |= {name: kind for name, (given, kind) in optional.items() if given}
    constants = {name: None for name, (given, _) in optional.items() if not given}
    constants |= {"ELEMENT": f.element.name, "RULE": (rule or f.default_rule).value, "E8M0": f.scale == "e8m0"}
    constants |= {"FP8": fp8, "ASM": asm and (fp8 or bits != 6), "PAIRS": bits < 8 and dtype == "bf16" and pairs}
    constants |= {"ROWS": rows, "GLOBALS": many, "ROUND_TRIP": round_trip, "B": f.block}
    n, warps, constants["WHOLE"] = quantize.TILES["round_trip" if round_trip else "quantize"][bits]
    constants["N"] = n * 32 // f.block
    return aot.compile_kernel(
        quantize._quantize_kernel,
        signature,
        constants,
        target,
        unaligned=("blocks", "per_row", "per_global"),
        num_warps=warps,
        **NO_FUSION,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_quantize(aot, f, target):
    checked(compile_quantize(aot, target, f))
    if f in (MXFP8, MXFP4, NVFP4):
        checked(compile_quantize(aot, target, f, round_trip=True))


@pytest.mark.parametrize("target", TARGETS)
def test_quantize_variants(aot, target):
    checked(compile_quantize(aot, target, MXFP4, dtype="fp32", rows=True))
    checked(compile_quantize(aot, target, MXFP6_E3M2, dtype="fp16", rule=MXFP4.rules[-2]))
    checked(compile_quantize(aot, target, NVFP4, many=1, rows=True))
    checked(compile_quantize(aot, target, NVFP4, dtype="fp32", many=2, round_trip=True))
    checked(compile_quantize(aot, target, MXFP4, rows=True, pairs=False))


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_quantize_uses_the_wide_instructions(aot, f):
    """On sm_90: all loads of 16 bytes, and the hardware's rounding where it has one (FP8; FP6 through FP8; FP4 by saturating adds)."""
    compiled = compile_quantize(aot, "sm_90", f)
    opcodes = compiled.opcodes(full=True)
    assert opcodes["LDG.E.128"] >= 2
    instruction = {8: "F2FP.SATFINITE", 6: "F2FP.SATFINITE", 4: ".SAT"}[f.element.bits]
    assert any(instruction in name for name in opcodes)


# SASS instructions of a program on sm_90, over the elements that one of its threads has: 17 to 19 per element keep up with
# 4.3 TB/s of traffic at 1.75 to 2 GHz (132 SMs, four issue slots, 32 lanes).
BUDGET = {8: 15.0, 6: 12.5, 4: 12.0, "nvfp4": 18.0}


@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_quantize_stays_within_its_instruction_budget(aot, f):
    from mx_kernels.kernels import quantize

    if aot.TRITON_VERSION != (3, 6):
        pytest.skip("counted with Triton 3.6")
    n, warps, _ = quantize.TILES["quantize"][f.element.bits]
    each = n / warps
    assert len(compile_quantize(aot, "sm_90", f).sass) / each <= BUDGET["nvfp4" if f is NVFP4 else f.element.bits]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("f", FORMATS.values(), ids=str)
def test_dequantize(aot, f, target):
    from mx_kernels.kernels import quantize

    signature = {"data": "*u8", "scale": "*u8", "out": "*bf16", "blocks": "i32", "per_global": "i32"}
    constants = {"ELEMENT": f.element.name, "E8M0": f.scale == "e8m0", "FP8": facts(target)[0], "B": f.block}
    n, warps, _ = quantize.TILES["dequantize"][f.element.bits]
    constants["N"] = n * 32 // f.block
    few, many_matrices = quantize.turns_for(16), quantize.turns_for(17)
    assert few < many_matrices
    variants = [(0, 0), (0, many_matrices)]
    if target == "sm_90":
        variants += [(0, few)] + [(1, 0), (2, 0), (1, many_matrices), (2, many_matrices)] * f.has_global_scale
    for many, select in variants:
        given = {"global_scale": "*fp32"} if f.has_global_scale else {}
        given |= {"rows": "*i64"} if select else {}
        fixed = constants | {"GLOBALS": many, "SELECT": select > 0, "TURNS": max(select, 1)}
        fixed |= {name: None for name in ("global_scale", "rows") if name not in given}
        unaligned = ("blocks", "per_global")
        compiled = checked(
            aot.compile_kernel(
                quantize._dequantize_kernel,
                signature | given,
                fixed,
                target,
                unaligned=unaligned,
                num_warps=warps,
                **NO_FUSION,
            )
        )
        if target == "sm_90":
            assert compiled.opcodes(full=True)["STG.E.128"] >= 2
        if target == "sm_90" and select:  # the next tile's loads stand in front of this one's stores
            loop = [line.split(".")[0] for line in compiled.loops()[-1]]
            assert "LDG" in loop
            assert "LDG" not in loop[loop.index("STG") :]


@pytest.mark.parametrize("target", TARGETS)
def test_global_scale(aot, target):
    from mx_kernels.kernels import global_scale

    signature = {"x": "*bf16", "partial": "*i32", "stride": "i32", "rows": "i32", "columns": "i32"}
    checked(aot.compile_kernel(global_scale._amax_kernel, signature, {"ROWS": 4, "COLUMNS": 1024}, target, num_warps=4))
    signature = {"partial": "*i32", "out": "*fp32", "parts": "i32"}
    constants = {"GLOBAL_MIN": 2.0**-117, "PARTS": 1024}
    checked(aot.compile_kernel(global_scale._global_scale_kernel, signature, constants, target, num_warps=1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("experts", "mapped"), [(128, False), (512, True)])
@pytest.mark.parametrize("pairs", [8, 512, 2048, 8192, 131072, 1 << 20])
def test_align(aot, target, pairs, experts, mapped, monkeypatch):
    from mx_kernels.kernels import align

    early = target in ("sm_90", "sm_100", "sm_120")
    monkeypatch.setattr(align, "starts_early", lambda kernel, pairs, device: early)
    device = torch.device("meta")
    plan = align.plan.__wrapped__(pairs, 64, experts, experts + 8 if mapped else None, device)
    for launch, tensors in plan.launches:
        names = launch.kernel.arg_names
        values = dict(zip(names[len(tensors) :], launch.values, strict=True))
        numbers = {n: "i32" for n in names[len(tensors) :] if n.islower() and values[n]}
        signature = {n: "*i32" for n in names[: len(tensors)] if mapped or n != "expert_map"} | numbers
        constants = {n: v for n, v in values.items() if n not in numbers}
        constants |= {"expert_map": None} if not mapped and "expert_map" in names else {}
        unaligned = tuple(n for n in numbers if values[n] % 16)
        options = {n: v for n, v in launch.options.items() if n != "launch_pdl"}
        made = checked(aot.compile_kernel(launch.kernel, signature, constants, target, unaligned=unaligned, **options))
        if early:
            assert made.asm.count("griddepcontrol.wait") == made.asm.count("griddepcontrol.launch_dependents") == 1
        assert made.shared <= 65536


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("f", [None, MXFP8, MXFP4], ids=str)
def test_activate(aot, target, kind, f):
    from mx_kernels.kernels import activation

    fp8, asm = facts(target)
    signature = {"h": "*bf16", "out": "*u8" if f else "*bf16", "blocks": "i32", "per_row": "i32"}
    signature |= {"alpha": "fp32", "beta": "fp32", "limit": "fp32"} | ({"scale": "*u8"} if f else {})
    constants = {} if f else {"scale": None}
    constants |= {"KIND": kind, "GATED": True, "INTERLEAVED": kind == "swiglu_oai", "CLAMP": kind == "swiglu_oai"}
    constants |= {"ELEMENT": f.element.name if f else "", "RULE": f.default_rule.value if f else "", "FP8": fp8}
    constants |= {"ASM": asm, "PAIRS": True, "WHOLE": f is not None, "WIDE": False, "N": 128 if f else 64, "B": 32}
    unaligned = ("blocks", "per_row")
    checked(
        aot.compile_kernel(activation._activate_kernel, signature, constants, target, unaligned=unaligned, num_warps=4)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_combine(aot, target):
    from mx_kernels.kernels import combine

    signature = {"y": "*bf16", "ids": "*i32", "weights": "*fp32", "done": "*i32", "out": "*bf16"}
    signature |= {"experts": "i32", "H": "i32", "clears": "i32"}
    constants = {"TOP_K": 8, "HAS_MAP": False, "WEIGHTED": True, "COLUMNS": 1024, "expert_map": None, "num_global": 0}
    constants["PDL"] = target in ("sm_90", "sm_100", "sm_120")
    checked(
        aot.compile_kernel(
            combine._combine_kernel,
            signature,
            constants,
            target,
            unaligned=("experts", "clears"),
            num_warps=4,
            **NO_FUSION,
        )
    )
