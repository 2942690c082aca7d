"""The canonical GEMM kernel, compiled for hardware that is not here: the instruction it multiplies with, spills, shared memory.

An architecture's table (``Device.native``) says where block-scaled instructions are; they must be there, and only there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import mx_kernels as mk
from mx_kernels.device import triton_version
from mx_kernels.native_table import NATIVE as TABLE
from mx_kernels.native_table import NATIVE_SINCE, PRODUCT_SINCE

pytestmark = pytest.mark.compile

MATRIX = r"wgmma\.mma_async[\w.]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.:]*|v_mfma\w+|v_wmma\w+"
NATIVE = {
    "sm_100": r"tcgen05\.mma.*kind::(mxf8f6f4|mxf4|mxf4nvf4)\.block_scale",
    "sm_120": r"mma\.sync.*kind::(mxf8f6f4|mxf4nvf4)\.block_scale",
    "gfx950": r"v_mfma_scale_f32_.*f8f6f4",
    "gfx1250": r"v_wmma_scale(16)?_f32_.*f8f6f4",
}
UPCAST = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f16",
    "sm_120": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)_bf16",
    "gfx950": r"v_mfma_f32_(16x16x32|32x32x16)_bf16",
    "gfx1250": r"v_wmma_f32_16x16x32_bf16",
}
SHARED = 101376 - 1024  # what a block may have on sm_86, sm_89 and sm_120, the smallest of NVIDIA's
LOCAL = {"gfx942": 65536, "gfx950": 163840, "gfx1250": 327680}  # what a workgroup may have: CDNA 3, CDNA 4, gfx1250
SILU, OAI = mk.Activation("silu"), mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)


@pytest.fixture
def compiled(native):
    """``native.compile_gemm``, or skip where ``test_the_table_is_what_compiles`` shows that this Triton cannot."""

    def run(target, *args, **options):
        if not native.here(target).compiles:
            pytest.skip(f"this Triton compiles no product for {target}")
        return native.compile_gemm(target, *args, **options)

    return run


def check(target, kernel, wanted):
    found = set(re.findall(MATRIX, kernel.asm))
    assert found, "no matrix instruction"
    assert all(re.match(wanted, name) for name in found), found
    assert kernel.spills == 0
    assert kernel.shared <= LOCAL.get(target, SHARED)
    assert not re.search(r"C75(10|15)", kernel.log), "ptxas serialized wgmma"
    if target == "sm_90":
        assert not kernel.overwritten()


PAIRS = [
    ("mxfp8_e4m3", "mxfp8_e4m3"),
    ("mxfp8_e4m3", "mxfp6_e3m2"),
    ("mxfp8_e5m2", "mxfp4"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
]


def claims(target, x, w):
    return mk.Device.fake(target.replace("_", ""), triton_version()).native(x, w)


@pytest.mark.parametrize(
    ("target", "x", "w", "block"),
    [(t, x, w, b) for t in sorted(NATIVE) for x, w in PAIRS for b in (16, 128) if b == 16 or claims(t, x, w)],
)
def test_native_where_the_table_says(compiled, target, x, w, block):
    native = claims(target, x, w)
    compute, kernel = compiled(target, x, w, block)
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
        ("sm_90", "bf16", "mxfp6_e3m2", 64),
        ("sm_90", "bf16", "mxfp6_e3m2", 128),
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
        ("gfx1250", "bf16", "mxfp8_e4m3", 16),
        ("gfx1250", "bf16", "mxfp4", 128),
        ("gfx1250", "fp16", "nvfp4", 64),
    ],
)
def test_upcast_elsewhere(compiled, target, x, w, block):
    """bf16 matrix instructions on operands decoded in registers; no FP8 type is needed, so also on sm_80 and gfx942."""
    compute, kernel = compiled(target, x, w, block, activation=OAI)
    assert compute == "bf16"
    check(target, kernel, UPCAST[target])
    if target.startswith(
        "gfx9"
    ):  # the decoder multiplies float32 subnormals by powers of two: they must not be flushed
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", kernel.asm)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1250"])
def test_same_plain_types(compiled, target):
    compute, kernel = compiled(target, "fp16", "fp16", 64)
    assert compute == "fp16"
    check(target, kernel, r"(mma\.sync|wgmma).*f16\.f16|v_(mfma|wmma).*_f16")


@pytest.mark.parametrize(
    ("target", "requantize"),
    [
        ("sm_90", mk.MXFP8),
        ("sm_80", mk.MXFP4),
        ("gfx942", mk.MXFP6_E3M2),
        ("sm_100", mk.MXFP4),
        ("sm_120", mk.MXFP8),
        ("gfx950", mk.MXFP8),
        ("gfx1250", mk.MXFP8),
    ],
)
def test_requantizing_and_self_routing(compiled, target, requantize):
    """The epilogue that quantizes, ragged K, and blocks that route themselves."""
    x = "mxfp8_e4m3"
    compute, kernel = compiled(target, x, x, routing="self", requantize=requantize, even=False)
    assert compute == ("native" if claims(target, x, x) else "bf16")
    check(target, kernel, NATIVE[target] if compute == "native" else UPCAST[target])


def test_full_precision(compiled):
    """Float32 operands are multiplied as float32, by fused multiply-adds and no matrix unit's TF32."""
    compute, kernel = compiled("sm_90", "fp32", "mxfp4")
    assert compute == "fp32"
    assert "fma.rn.f32" in kernel.asm
    assert not re.search(MATRIX, kernel.asm)
    assert kernel.spills == 0


GPUS = [a.name for a in mk.ARCHITECTURES.values() if a.vendor in ("nvidia", "amd")]


@pytest.fixture(scope="module")
def rows(native, tmp_path_factory):
    """What the generator finds, in a process of its own: a pair that Triton 3.6 cannot compile may abort one that compiled others."""
    file = tmp_path_factory.mktemp("native") / "rows.json"
    done = subprocess.run([sys.executable, native.__file__, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("arch", GPUS)
def test_the_table_is_what_compiles(rows, aot, arch):
    """``native_table.py``, made again for the installed Triton; versions before an architecture's first make less."""
    made, here = rows[arch], aot.TRITON_VERSION
    pairs = frozenset(tuple(pair) for pair in made["native"])
    if here >= version(NATIVE_SINCE.get(arch, "3.6.0")):
        assert pairs == TABLE.get(arch, frozenset()), "run nox -s native"
    else:
        assert pairs < TABLE[arch], f"Triton {here} makes all of the row: NATIVE_SINCE is too late, run nox -s native"
    has_units = mk.ARCHITECTURES[arch].bf16
    assert made["product"] == (has_units and here >= version(PRODUCT_SINCE.get(arch, "3.6.0"))), "run nox -s native"


def version(text):
    return tuple(int(part) for part in text.split(".")[:2])


def test_why_triton_3_6_makes_no_product_for_gfx1250(native, aot, capfd):
    """Its assembler refuses kernels whose arguments fill 32 scalar registers (of 5 bits of a field), as those of every product do."""
    if aot.TRITON_VERSION != (3, 6):
        pytest.skip("about Triton 3.6")
    with pytest.raises(RuntimeError, match="LLD failed to link"):
        native.compile_gemm("gfx1250", "bf16", "mxfp4")
    assert "amdgpu_user_sgpr_count smaller than" in capfd.readouterr().err


def test_the_table_as_it_is_written(native):
    """The generator's text: the newest's rows, the first version of each, and nothing about architectures without rows."""
    few, all_ = [["mxfp8", "mxfp8"]], [["mxfp8", "mxfp8"], ["mxfp4", "mxfp4"]]
    make = lambda pairs, product=True: {"native": pairs, "product": product}  # noqa: E731
    found = {
        "3.6.0": {"sm90": make([]), "sm100": make(all_), "gfx1250": make([], False)},
        "3.8.0": {"sm90": make([]), "sm100": make(all_), "gfx1250": make(few)},
        "3.9.0": {"sm90": make([]), "sm100": make(all_), "gfx1250": make(all_)},
    }
    space = {}
    exec(native.source(found), space)
    pairs = frozenset({("mxfp8", "mxfp8"), ("mxfp4", "mxfp4")})
    assert space["NATIVE"] == {"sm100": pairs, "gfx1250": pairs}
    assert space["NATIVE_SINCE"] == {"gfx1250": "3.9.0"}
    assert space["PRODUCT_SINCE"] == {"gfx1250": "3.8.0"}
