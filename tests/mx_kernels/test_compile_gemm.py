"""The canonical GEMM kernel, compiled for hardware that is not here: the instruction it multiplies with, spills, shared memory.

An architecture's table (``Device.native``) says where block-scaled instructions are; they must be there, and only there.
"""

from __future__ import annotations

import re

import pytest

import mx_kernels as mk

pytestmark = pytest.mark.compile

MATRIX = r"wgmma\.mma_async[\w.]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.:]*|v_mfma\w+|v_wmma\w+"
NATIVE = {
    "sm_100": r"tcgen05\.mma.*kind::(mxf8f6f4|mxf4|mxf4nvf4)\.block_scale",
    "sm_120": r"mma\.sync.*kind::(mxf8f6f4|mxf4nvf4)\.block_scale",
    "gfx950": r"v_mfma_scale_f32_.*f8f6f4",
}
UPCAST = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f16",
    "sm_120": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)_bf16",
    "gfx950": r"v_mfma_f32_(16x16x32|32x32x16)_bf16",
}
SHARED = 101376 - 1024  # what a block may have on sm_86, sm_89 and sm_120, the smallest of NVIDIA's
LOCAL = {"gfx942": 65536, "gfx950": 163840}  # what a workgroup may have: CDNA 3 and 4
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SILU, OAI = mk.Activation("silu"), mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)


def compiled(aot, target, x, w, block=16, routing="sorted", activation=SILU, requantize=None, even=True):
    """The kernel as ``_launch`` would configure it on that architecture."""
    from mx_kernels.kernels import generic_gemm as g

    device = mk.Device.fake(target.replace("_", ""))
    formats = [mk.FORMATS.get(name) for name in (x, w)]
    kinds = tuple(name if f is None else f.element.name for name, f in zip((x, w), formats, strict=True))
    blocks = [0 if f is None else f.block for f in formats]
    compute = g.compute_mode(device, *("" if f is None else f.name for f in formats), kinds)
    options = dict(g.tile_config(compute, device.arch, kinds, blocks[1], block))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    words = [compute != "native" or name.startswith("mxfp6") for name in (x, w)]  # codes are read as words or as bytes
    stored = [POINTERS.get(name, "*i32" if word else "*u8") for name, word in zip((x, w), words, strict=True)]
    # Rows of K = 2880: 16-byte rows of words (8 of FP6), and scales by fours at best.
    units = [
        (2 if "fp6" in name else 4) if word and name in mk.FORMATS else 16
        for name, word in zip((x, w), words, strict=True)
    ]
    wanted = g.scale_units(compute, device.arch, options["REORDER"], blocks[1], options["BK"])
    scale_unit = next(unit for unit in wanted if unit <= 4)
    signature = {
        "x": stored[0],
        "x_scale": "*u8",
        "x_global": "*fp32",
        "x_stride": "i32",
        "x_scale_stride": "i32",
        "w": stored[1],
        "w_scale": "*u8",
        "w_global": "*fp32",
        "w_stride_e": "i32",
        "w_stride_n": "i32",
        "w_scale_stride_e": "i32",
        "w_scale_stride_n": "i32",
        "out": "*u8" if requantize else "*bf16",
        "out_scale": "*u8",
        "sorted_ids": "*i32",
        "expert_ids": "*i32",
        "num_padded": "*i32",
        "num_pairs": "i32",
        "top_k": "i32",
        "E": "i32",
        "N": "i32",
        "K": "i32",
        "tiles_n": "i32",
        "bias": "*bf16",
        "bias_stride_e": "i32",
        "row_weight": "*fp32",
        "alpha": "fp32",
        "beta": "fp32",
        "limit": "fp32",
    }
    a = activation
    constexprs = {
        "XKIND": kinds[0],
        "XB": blocks[0],
        "X_GLOBAL": "one" if x == "nvfp4" else "",
        "WKIND": kinds[1],
        "WB": blocks[1],
        "W_GLOBAL": "expert" if w == "nvfp4" else "",
        "ROUTING": routing,
        "BLOCK": block,
        "PAIRS": 64,
        "BIAS": True,
        "ROW_WEIGHT": True,
        "COMPUTE": compute,
        "ACT": a.kind if a else "",
        "INTERLEAVED": bool(a) and a.layout == "interleaved",
        "GATED": bool(a) and a.gated,
        "CLAMP": bool(a) and a.limit is not None,
        "WHOLE": True,
        "RAGGED": not even,
        "ELEMENT": requantize.element.name if requantize else "",
        "RULE": str(requantize.default_rule if requantize else ""),
        "WARPS": launch["num_warps"],
        "X_UNIT": units[0],
        "W_UNIT": units[1],
        "XS_UNIT": scale_unit,
        "WS_UNIT": scale_unit,
        **options,
    }
    odd = [n for n in signature if "stride" in n] + ["top_k", "num_pairs", "E", "tiles_n"]
    return compute, aot.compile_kernel(g._gemm_kernel, signature, constexprs, target, unaligned=odd, **launch)


def check(target, kernel, wanted):
    found = set(re.findall(MATRIX, kernel.asm))
    assert found, "no matrix instruction"
    assert all(re.match(wanted, name) for name in found), found
    assert kernel.spills == 0
    assert kernel.shared <= LOCAL.get(target, SHARED)
    assert not re.search(r"C75(10|15)", kernel.log), "ptxas serialized wgmma"


PAIRS = [
    ("mxfp8_e4m3", "mxfp8_e4m3"),
    ("mxfp8_e4m3", "mxfp6_e3m2"),
    ("mxfp8_e5m2", "mxfp4"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
]


def claims(target, x, w):
    return mk.Device.fake(target.replace("_", "")).native(x, w)


@pytest.mark.parametrize(
    ("target", "x", "w", "block"),
    [(t, x, w, b) for t in sorted(NATIVE) for x, w in PAIRS for b in (16, 128) if b == 16 or claims(t, x, w)],
)
def test_native_where_the_table_says(aot, target, x, w, block):
    native = claims(target, x, w)
    compute, kernel = compiled(aot, target, x, w, block)
    assert compute == ("native" if native else "bf16")
    check(target, kernel, NATIVE[target] if native else UPCAST[target])


@pytest.mark.parametrize(
    ("target", "x", "w", "block"),
    [
        ("sm_80", "bf16", "mxfp4", 64),
        ("sm_80", "bf16", "mxfp8_e4m3", 16),
        ("sm_80", "fp16", "mxfp8_e4m3", 128),
        ("sm_80", "nvfp4", "nvfp4", 16),
        ("sm_90", "bf16", "mxfp4", 16),
        ("sm_90", "bf16", "mxfp8_e4m3", 128),
        ("sm_90", "bf16", "mxfp8_e5m2", 64),
        ("sm_90", "bf16", "mxfp6_e2m3", 16),
        ("sm_90", "bf16", "nvfp4", 64),
        ("sm_90", "fp16", "mxfp4", 64),
        ("sm_90", "bf16", "bf16", 128),
        ("sm_90", "mxfp8_e4m3", "mxfp8_e4m3", 16),
        ("sm_100", "bf16", "mxfp4", 16),
        ("sm_100", "fp16", "mxfp8_e4m3", 64),
        ("sm_120", "bf16", "mxfp8_e4m3", 16),
        ("gfx942", "bf16", "mxfp4", 16),
        ("gfx942", "bf16", "nvfp4", 64),
        ("gfx942", "mxfp8_e4m3", "mxfp6_e3m2", 128),
        ("gfx950", "bf16", "mxfp8_e4m3", 16),
    ],
)
def test_upcast_elsewhere(aot, target, x, w, block):
    """bf16 matrix instructions on operands decoded in registers; no FP8 type is needed, so also on sm_80 and gfx942."""
    compute, kernel = compiled(aot, target, x, w, block, activation=OAI)
    assert compute == "bf16"
    check(target, kernel, UPCAST[target])
    if target.startswith("gfx"):  # the decoder multiplies float32 subnormals by powers of two: they must not be flushed
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", kernel.asm)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_same_plain_types(aot, target):
    compute, kernel = compiled(aot, target, "fp16", "fp16", 64)
    assert compute == "fp16"
    check(target, kernel, r"(mma\.sync|wgmma).*f16\.f16|v_mfma.*_f16")


@pytest.mark.parametrize(
    ("target", "requantize"),
    [("sm_90", mk.MXFP8), ("sm_80", mk.MXFP4), ("gfx942", mk.MXFP6_E3M2), ("sm_100", mk.MXFP4)],
)
def test_requantizing_and_self_routing(aot, target, requantize):
    """The epilogue that quantizes, ragged K, and blocks that route themselves."""
    x = "mxfp8_e4m3"
    compute, kernel = compiled(aot, target, x, x, routing="self", requantize=requantize, even=False)
    assert compute == ("native" if target in NATIVE else "bf16")
    check(target, kernel, NATIVE[target] if target in NATIVE else UPCAST[target])


def test_full_precision(aot):
    """Float32 operands are multiplied as float32, by fused multiply-adds and no matrix unit's TF32."""
    compute, kernel = compiled(aot, "sm_90", "fp32", "mxfp4")
    assert compute == "fp32"
    assert "fma.rn.f32" in kernel.asm
    assert not re.search(MATRIX, kernel.asm)
    assert kernel.spills == 0
