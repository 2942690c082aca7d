"""The packed grouped GEMM, ahead of time: the instructions, registers and spills of what is launched, on every target.

The bounds are what Triton 3.6 and 3.9 make of the shipped configurations, with a few percent to spare: more instructions in the
K loop, a spill inside of it or serialized wgmma would cost speed that no other test can see.
"""

from __future__ import annotations

import importlib
import itertools
import re
import types

import pytest
import torch

import mx_kernels as mk
from mx_kernels.packed_gemm import flat_product
from mx_kernels.tuned import ROWS, model_block
from mx_kernels.tuning import SHARED, Config, Problem, choose_config

kernel = pytest.importorskip("mx_kernels.kernels.grouped_gemm", exc_type=ImportError)
takes_registers = importlib.import_module("mx_kernels.kernels.launch").takes_registers
pytestmark = pytest.mark.compile
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
EXPERTS = 16
PAIRS = {
    16: 64,
    32: EXPERTS * 16,
    64: EXPERTS * 32,
    96: EXPERTS * 64,
    128: EXPERTS * 256,
    256: EXPERTS * 512,
}  # block -> pairs


@pytest.fixture
def launched(monkeypatch):
    """What ``grouped_gemm_packed`` would launch: (tensors, sizes, constants, options)."""
    calls = []
    monkeypatch.setattr(kernel, "_launch", lambda plan, tensors: calls.append((plan, tensors)))

    def run(name: str, block: int, k: int, act: mk.Activation | None, config: Config | None = None):
        w = torch.randn(1, 256, k)
        q = w.bfloat16() if name == "bf16" else mk.quantize(w, name)
        p = mk.pack(q, gated=act is not None, layout=act.layout if act else "concatenated")
        p = p.map(lambda t: torch.empty((EXPERTS, *t.shape[1:]) if t.ndim else t.shape, dtype=t.dtype, device="meta"))
        object.__setattr__(p, "shape", torch.Size((EXPERTS, 256, k)))
        pairs = PAIRS[block]
        i32 = {"dtype": torch.int32, "device": "meta"}
        ids = torch.empty((pairs // 4, 4), **i32)
        slots = pairs + EXPERTS * block
        routed = (torch.empty(slots, **i32), torch.empty(slots // block, **i32), torch.empty(1, **i32))
        if pairs <= 64:
            routed = (None, torch.empty(pairs, **i32), torch.empty(0, **i32))
        tiles = mk.Alignment(ids, EXPERTS, block, *routed)
        x = torch.empty((pairs // 4, k), dtype=torch.bfloat16, device="meta")
        bias = torch.empty((EXPERTS, 256), dtype=torch.bfloat16, device="meta") if act else None
        args = flat_product(x, p, tiles, 4, mk.Epilogue(bias, act), None, torch.bfloat16)
        kernel.grouped_gemm_packed(*args, config)
        return calls[-1]

    return run


def compiled(aot, plan, tensors, target: str, **changed):
    names = kernel._grouped_gemm_packed_kernel.arg_names
    types = {torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32"}
    values = (*(types[t.dtype] for t in tensors), *("fp32" if isinstance(s, float) else "i32" for s in plan.sizes))
    signature = dict(zip(names, values))
    early = target.startswith("sm_") and int(target[3:]) >= 90  # as products of few pairs are launched
    constants = {**dict(zip(names[len(values) :], plan.constants)), "PDL": early, **changed}
    options = {k: v for k, v in plan.options.items() if not (aot.TARGETS[target].backend == "hip" and k == "maxnreg")}
    if aot.TARGETS[target].backend == "hip":
        options["num_stages"] = 2
    loose = ("experts", "pairs", "blocks", "piece_stride", "strips", "rows", "ahead", "flow")
    return aot.compile_kernel(
        kernel._grouped_gemm_packed_kernel, signature, constants, target, unaligned=loose, **options
    ), constants


LIMITS = {  # (format, block) -> registers, instructions of the K loop for each weight of a thread (widest loop)
    ("mxfp4", 16): (128, 3.05),
    ("mxfp4", 32): (168, 3.85),
    ("mxfp4", 64): (168, 4.25),
    ("mxfp4", 96): (160, 4.25),
    ("mxfp4", 128): (255, 4.70),
    ("nvfp4", 16): (128, 3.20),
    ("nvfp4", 32): (168, 4.00),
    ("nvfp4", 64): (168, 4.40),
    ("nvfp4", 96): (160, 4.40),
    ("nvfp4", 128): (255, 4.80),
    ("mxfp8", 16): (128, 3.40),
    ("mxfp8", 32): (168, 4.15),
    ("mxfp8", 64): (168, 4.55),
    ("mxfp8", 96): (160, 4.60),
    ("mxfp8", 128): (255, 5.00),
    ("mxfp8_e5m2", 16): (128, 3.80),
    ("mxfp8_e5m2", 64): (168, 5.10),
    ("mxfp8_e5m2", 128): (255, 5.55),
    ("mxfp6_e2m3", 16): (128, 3.40),  # packed as E4M3
    ("mxfp6_e2m3", 128): (255, 5.00),
    ("bf16", 16): (64, 1.90),
    ("bf16", 32): (80, 2.05),
    ("bf16", 64): (168, 2.70),
    ("bf16", 96): (255, 3.20),
    ("bf16", 128): (255, 2.70),
    ("bf16", 256): (255, 2.10),
}


@pytest.mark.parametrize("act", [OAI, None], ids=["gemm1", "gemm2"])
@pytest.mark.parametrize(("name", "block"), LIMITS)
def test_shipped_configurations_on_hopper(aot, launched, name, block, act):
    plan, tensors = launched(name, block, 448, act)
    made, c = compiled(aot, plan, tensors, "sm_90")
    registers, instructions = LIMITS[name, block]
    if kernel._REGISTERS:  # Triton 3.8 and later
        registers = kernel._REGISTERS.get(registers, registers)
        instructions *= 1.31 if block == 96 else 1.01  # whose operands are moved
    assert "wgmma.mma_async" in made.asm
    assert "cp.async.bulk.prefetch.L2" in made.asm
    loops = [loop for loop in made.loops() if any(line.startswith("HGMMA") for line in loop)]
    # at once, behind what is asked for, of who leaves without work, and, where nothing is sorted, behind the work of the last
    assert made.asm.count("griddepcontrol.wait") == 3 + (c["ROUTE"] != kernel.SORTED.value)
    assert made.asm.count("ld.acquire.gpu") == 2  # of what has been counted: early, and while there is not enough
    assert 1 <= made.asm.count(".global.gpu.release.add") <= len(loops)
    assert not any(code in made.log for code in ("C7510", "C7515"))
    assert not made.overwritten()
    assert made.registers <= registers
    assert len(loops) == c["LEVELS"] + (block == 96)
    for loop in loops:
        assert not [line for line in loop if line.startswith("STL")], "a spill in the K loop"
        assert sum(line.startswith("LDL") for line in loop) <= 8
    assert len(loops[-1]) / (c["N"] * c["BK"] / (32 * plan.options["num_warps"])) <= instructions


LAYERS = (  # experts, experts a token, hidden, intermediate
    (128, 4, 2880, 2880), (32, 4, 2880, 2880), (128, 8, 2048, 768), (8, 2, 4096, 14336), (64, 8, 2048, 1024), (256, 8, 7168, 256),
)  # fmt: skip
FORMATS = {"mxfp4": ("e2m1", 32), "nvfp4": ("e2m1", 16), "mxfp8": ("e4m3", 32), "bf16": ("", 32)}


def chosen() -> dict[tuple[str, int, Config], int]:
    """(format, pairs of a block, configuration) -> GEMM that the model takes it for first, over layers and numbers of tokens.

    With the measured rows; without what the tests above and below pin.
    """
    found: dict[tuple[str, int, Config], int] = {}
    for name, (element, block) in FORMATS.items():
        for experts, top_k, hidden, inner in LAYERS:
            for wgmma, pairs in itertools.product((True, False), (top_k << power for power in range(15))):
                for gemm, n, k in ((1, 2 * inner, hidden), (2, hidden, inner)):
                    p = Problem(element, block, pairs, experts, n, k)
                    size = 16 if pairs <= 64 else model_block(p, wgmma)
                    found.setdefault((name, size, choose_config(p, size)), gemm)
    for row in ROWS:
        name = next(n for n, kind in FORMATS.items() if kind == (row.problem.element, row.problem.block))
        found.setdefault((name, row.block, row.config), 1)
    for name in FORMATS:
        for block, pairs in PAIRS.items():
            p = Problem(*FORMATS[name], pairs, EXPERTS, 256, 448)
            found.pop((name, block, choose_config(p, block)), None)
    return found


CHOSEN = chosen()


def config_id(value: object) -> str | None:
    return "x".join(map(str, vars(value).values())) if isinstance(value, Config) else None


@pytest.mark.parametrize(("name", "block", "config"), CHOSEN, ids=config_id)
def test_everything_that_is_chosen_on_hopper(aot, launched, name, block, config):
    """Whatever the model or a measured row takes: the matrix unit runs unhindered, and nothing is spilled inside a K loop."""
    act = OAI if CHOSEN[name, block, config] == 1 else None
    made, c = compiled(aot, *launched(name, block, 1024, act, config), "sm_90")
    assert "wgmma.mma_async" in made.asm
    assert not any(code in made.log for code in ("C7510", "C7515"))
    assert not made.overwritten()
    assert made.registers <= (kernel._REGISTERS.get(config.maxnreg, config.maxnreg) or 255)
    loops = [loop for loop in made.loops() if any(line.startswith("HGMMA") for line in loop)]
    assert len(loops) == c["LEVELS"] + (block == 96)
    assert not [line for loop in loops for line in loop if line.startswith("STL")], "a spill in a K loop"


@pytest.mark.parametrize(
    ("version", "waits"), [("12.4", True), ("12.8.93", True), ("12.9", False), ("13.0", False), ("", True)]
)
def test_an_unknown_ptxas_is_waited_for_like_an_old_one(monkeypatch, version, waits):
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: types.SimpleNamespace(version=version))
    assert takes_registers.__wrapped__() == waits
    monkeypatch.delattr(compiler, "get_ptxas")
    assert takes_registers.__wrapped__()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_left_operands_stay_while_products_read_them(aot, launched, name):
    """With results rounded, registers are scarce. Without waiting, ptxas 12.8 overwrites left operands, later ones do not."""
    plan, tensors = launched(name, 128, 2048, mk.Activation("silu"))
    rounding = {"ROUND": "e4m3", "RULE": "rceil"}
    made, c = compiled(aot, plan, tensors, "sm_90", **rounding)
    assert made.spills == 0
    assert not made.overwritten()
    assert c["DRAIN"] == takes_registers()
    made, _ = compiled(aot, plan, tensors, "sm_90", **rounding, DRAIN=False)
    assert bool(made.overwritten()) == takes_registers()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "bf16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1250"])
def test_every_target(aot, native, launched, monkeypatch, target, name, block):
    """PTX for NVIDIA, plain Triton for the others: ``mma``, ``mfma``, ``wmma``, and nothing scaled by the hardware."""
    if not native.here(target).compiles:
        pytest.skip(f"this Triton compiles no product for {target}")
    hip = aot.TARGETS[target].backend == "hip"
    monkeypatch.setattr(kernel, "_facts", lambda device: (132, SHARED, False))
    kernel._plans.clear()
    plan, tensors = launched(name, block, 448, OAI)
    kernel._plans.clear()
    made, _ = compiled(aot, plan, tensors, target, PTX=not hip)
    want = (
        ("v_wmma" if target == "gfx1250" else "v_mfma") if hip else "tcgen05.mma" if target == "sm_100" else "mma.sync"
    )
    assert want in made.asm or (target == "sm_100" and "mma.sync" in made.asm)
    assert not re.search(r"block_scale|v_(mfma|wmma)_scale", made.asm)
    assert made.spills == 0


@pytest.mark.parametrize("name", ["mxfp4", "bf16"])
def test_blocks_of_96_without_warpgroup_products_are_three_of_32(launched, monkeypatch, name):
    for wgmma, want in ((True, (96, 1)), (False, (32, 3))):
        monkeypatch.setattr(kernel, "_facts", lambda device, wgmma=wgmma: (132, SHARED, wgmma))
        kernel._plans.clear()
        assert launched(name, 96, 448, OAI)[0].constants[:2] == want
    kernel._plans.clear()


def test_split_and_dependent_launch(aot, launched):
    """One token: split K, a reduction by the last to arrive, and waiting for the kernel in front."""
    plan, tensors = launched("mxfp4", 16, 2880, None)
    made, _ = compiled(aot, plan, tensors, "sm_90", SPLIT=4)
    assert "griddepcontrol.wait" in made.asm
    assert "griddepcontrol.launch_dependents" in made.asm
    assert "atom.global.gpu.acq_rel.add" in made.asm
    assert choose_config(Problem("e2m1", 32, 4, 128, 2880, 2880), 16).split == 4
