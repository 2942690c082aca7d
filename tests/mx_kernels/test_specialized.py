"""Warps that load and warps that multiply (``kernels/specialized.py``): where they are taken, what they compile to, what they compute."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels import tuned
from mx_kernels.packed_gemm import flat_product
from mx_kernels.tuning import Config, Problem, choose_config

SILU = mk.Activation("silu")
OAI = mk.Activation("swiglu_oai", "interleaved", alpha=1.702, beta=1.0, limit=7.0)
SPECIALIZED = Config(256, 128, 64, 4, 4, group=4, specialized=True)  # two warpgroups that multiply
JOINED = replace(SPECIALIZED, group=1, join=32)  # last blocks of few pairs join the one in front
SMALL = Config(160, 192, 64, 4, 6, group=2, specialized=True)  # three
THREE = Config(256, 192, 64, 4, 3, group=2, specialized=True)  # of plain weights
TWO_PROGRAMS = Config(128, 128, 64, 4, 4, levels=3)
FORMATS = [mk.MXFP8, mk.MXFP8_E5M2, mk.MXFP6_E2M3, mk.MXFP4, mk.NVFP4]


@pytest.fixture
def kernel():
    return pytest.importorskip("mx_kernels.kernels.grouped_gemm", exc_type=ImportError)


@pytest.mark.parametrize(
    ("experts", "pairs", "n", "k", "pairs_order", "slots"),
    [  # measured on an H100, rows in the order of pairs and of slots
        (8, 8192, 28672, 4096, True, True),
        (8, 8192, 4096, 14336, True, True),
        (8, 4096, 28672, 4096, True, True),
        (128, 131072, 1536, 2048, True, True),
        (128, 131072, 2048, 768, False, True),
        (128, 131072, 2048, 704, False, False),
        (128, 65536, 5760, 2880, True, True),
        (8, 2048, 28672, 4096, True, True),
        (8, 1024, 28672, 4096, False, False),
    ],
)
def test_where_it_was_measured_to_be_faster(experts, pairs, n, k, pairs_order, slots):
    p = Problem("e4m3", 32, pairs, experts, n, k)
    for small, gains in (
        (choose_config(p, 160, specialized=True, slots=True), pairs >= 64 * experts and k >= 768),
        (choose_config(p, 160, specialized=True), pairs >= 86 * experts and k >= 2048),
    ):
        assert small.specialized == gains
        assert (small.pairs, small.rows) == ((160, 192) if gains else (32, 128))
    assert not choose_config(replace(p, element=""), 160, specialized=True, slots=True).specialized
    assert choose_config(p, 256, specialized=True).specialized == pairs_order
    assert choose_config(p, 256, specialized=True, slots=True).specialized == slots
    assert not choose_config(p, 256, slots=True).specialized
    plain = replace(p, element="")
    many = pairs >= 512 * experts
    assert choose_config(plain, 256, specialized=True).specialized == (many and k >= 2048 and n < 5120)
    assert choose_config(plain, 256, specialized=True, slots=True).specialized == (many and k >= 768)


@pytest.mark.parametrize(
    ("element", "pairs", "n", "k", "block", "elsewhere"),
    [  # where tokens may be brought into slot order, and where not
        ("e2m1", 50, 5760, 2880, 64, 64),
        ("e2m1", 59, 5760, 2880, 96, 96),
        ("e2m1", 60, 5760, 2880, 160, 96),
        ("e4m3", 63, 5760, 2880, 96, 96),
        ("e4m3", 64, 5760, 2880, 160, 96),
        ("e5m2", 151, 5760, 2880, 160, 128),
        ("e5m2", 152, 5760, 2880, 256, 128),
        ("e2m1", 151, 5760, 2880, 160, 128),
        ("e2m1", 152, 5760, 2880, 256, 128),  # many experts need a second block of 160
        ("e2m1", 256, 5760, 2880, 256, 256),
        ("e2m1", 300, 5760, 2880, 160, 256),  # which holds what most of them have over 256
        ("e4m3", 300, 5760, 2880, 160, 256),
        ("e2m1", 448, 5760, 2880, 256, 256),
        ("e2m1", 128, 5760, 2912, 128, 128),  # half a step
        ("e2m1", 128, 5792, 2880, 128, 128),  # likewise, of the second product
        ("e2m1", 51, 1536, 2048, 96, 96),
        ("e2m1", 85, 1536, 2048, 96, 96),  # not worth a gather
        ("e2m1", 86, 1536, 2048, 160, 96),
        ("e4m3", 85, 1536, 2048, 96, 96),
        ("e4m3", 87, 1536, 2048, 160, 128),
        ("e2m1", 86, 512, 7168, 96, 96),  # whose second product's rows are short
        ("e2m1", 151, 1536, 2048, 160, 128),
        ("e2m1", 152, 1536, 2048, 256, 128),
        ("e4m3", 152, 1536, 2048, 256, 128),
        ("e2m1", 128, 1408, 2048, 128, 128),  # whose second product's rows are short
        ("e2m1", 223, 1536, 2048, 256, 128),
        ("e2m1", 224, 1536, 2048, 256, 256),
        ("e2m1", 768, 1536, 2048, 256, 256),
        ("e2m1", 700, 1408, 2048, 256, 256),
        ("e2m1", 700, 1536, 1984, 128, 128),  # whose rows are short
        ("e2m1", 4096, 5760, 1024, 128, 128),
    ],
)
def test_blocks_of_160_and_256_where_they_are_faster(element, pairs, n, k, block, elsewhere):
    """A layer's blocks follow its first weight."""
    p = Problem(element, 32, 16 * pairs, 16, n, k)
    assert tuned.model_block(p, True, True) == block
    assert tuned.model_block(p, True) == elsewhere
    assert tuned.model_block(p, False, True) == (128 if pairs > 48 else 64)
    plain = replace(p, element="")
    assert tuned.model_block(plain, True, True) == (256 if pairs > 96 else 128)


def test_only_where_the_device_has_warpgroup_products(monkeypatch):
    p = Problem("e4m3", 32, 8192, 8, 28672, 4096)
    q = Problem("e4m3", 32, 1024, 8, 28672, 4096)
    for capability, want in (((9, 0), 256), ((8, 0), 128), ((10, 0), 128), ((12, 0), 128)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(tuned, "place", lambda device: ("", 0))
        tuned.wgmma.cache_clear()
        tuned._row.cache_clear()
        assert tuned.block_for(p, torch.device("cuda", 0)) == want
        assert tuned.block_for(q, torch.device("cuda", 0), True) == (160 if want == 256 else 128)
    tuned.wgmma.cache_clear()
    tuned._row.cache_clear()
    assert not tuned.wgmma(torch.device("cpu"))


def meta_product(
    kernel, monkeypatch, f, k, act, config=None, *, pairs=8192, experts=8, block=256, slots=False, out=torch.bfloat16, x=None, **epilogue
):  # fmt: skip
    """The plan of a product on the meta device, and its tensors. f: None for plain weights; slots: x and y have a row a slot."""
    calls = []
    monkeypatch.setattr(kernel, "_launch", lambda plan, tensors: calls.append((plan, tensors)))
    w = torch.randn(1, 256, k)
    w = w.bfloat16() if f is None else mk.quantize(w, f)
    p = mk.pack(w, gated=act is not None, layout=act.layout if act else "concatenated")
    p = p.map(lambda t: torch.empty((experts, *t.shape[1:]) if t.ndim else t.shape, dtype=t.dtype, device="meta"))
    object.__setattr__(p, "shape", torch.Size((experts, 256, k)))
    i32 = {"dtype": torch.int32, "device": "meta"}
    capacity = pairs + experts * block
    routed = (torch.empty(capacity, **i32), torch.empty(capacity // block, **i32), torch.empty(1, **i32))
    tiles = mk.Alignment(torch.empty((pairs // 2, 2), **i32), experts, block, *routed)
    bias = torch.empty((experts, 256), dtype=torch.bfloat16, device="meta") if act is OAI else None
    weight = torch.empty(pairs, device="meta") if act is None else None
    top_k = 2 if act else 1
    rows, top_k = (capacity, 0) if slots else (pairs // top_k, top_k)
    x = torch.empty((rows, k), dtype=torch.bfloat16, device="meta") if x is None else x
    y = kernel.grouped_gemm_packed(
        *flat_product(x, p, tiles, top_k, mk.Epilogue(bias, act, **epilogue), weight, out, slots), config
    )
    assert y.shape == (capacity if slots else pairs, 128 if act else 256)
    return calls[-1]


@pytest.mark.compile
def test_a_product_that_it_does_not_serve_is_left_to_the_other_kernel(kernel, monkeypatch):
    """Results that are rounded, blocks of other sizes: the model takes two programs a multiprocessor; asked for by name, an error."""
    taken, _ = meta_product(kernel, monkeypatch, mk.MXFP4, 2048, SILU)
    assert taken.kernel is not kernel._grouped_gemm_packed_kernel
    for changed in ({"round_to": mk.MXFP8}, {"block": 128}):
        plan, _ = meta_product(kernel, monkeypatch, mk.MXFP4, 2048, SILU, **changed)
        assert plan.kernel is kernel._grouped_gemm_packed_kernel
        with pytest.raises(ValueError, match="specialized"):
            meta_product(kernel, monkeypatch, mk.MXFP4, 2048, SILU, SPECIALIZED, **changed)
    for x in (torch.empty(4096, width, dtype=torch.bfloat16, device="meta")[:, :2048] for width in (2049, 2056)):
        loose, _ = meta_product(kernel, monkeypatch, mk.MXFP4, 2048, SILU, x=x)
        assert loose.kernel is kernel._grouped_gemm_packed_kernel  # rows that begin anywhere cannot be copied so
    short, _ = meta_product(kernel, monkeypatch, mk.MXFP4, 96, SILU)  # half of its K is padding
    assert short.kernel is kernel._grouped_gemm_packed_kernel
    for experts in (65534, 65535):  # more than a table of the kernel's holds
        many, _ = meta_product(kernel, monkeypatch, mk.MXFP4, 2048, SILU, pairs=1 << 24, experts=experts)
        assert (many.kernel is taken.kernel) == (experts < 65535)
    for slots in (True, False):
        plain, _ = meta_product(kernel, monkeypatch, None, 2048, SILU, slots=slots)
        assert plain.kernel is taken.kernel
        assert [place for place, _, _ in plain.boxes] == [0, 1][not slots :]
    codes, _ = meta_product(kernel, monkeypatch, mk.NVFP4, 2048, SILU, slots=True)
    assert [place for place, _, _ in codes.boxes] == [0, 1, 2]
    assert codes.boxes[2] == (2, (8 * 16, 512), (1, 128))  # of 16 times 128 columns, two words for each of 256 rows


@pytest.mark.compile
def test_small_blocks(kernel, monkeypatch):
    """Of quantized weights alone; elsewhere blocks of 160 pairs are five of 32 to the other kernel."""
    args = (kernel, monkeypatch, mk.MXFP4, 2048, SILU)
    taken, _ = meta_product(*args, block=160, pairs=1024, slots=True)
    assert taken.constants[:2] == (160, 2)  # of 256 rows two tiles of 128
    assert taken.boxes[0][2] == (32, 64)
    wide, _ = meta_product(*args, SMALL, block=160, slots=True)
    assert (wide.kernel, *wide.constants[:2]) == (taken.kernel, 160, 3)
    copied, _ = meta_product(*args, block=160, pairs=1024)
    assert copied.kernel is taken.kernel
    assert [place for place, _, _ in copied.boxes] == [1, 2]
    plain = (kernel, monkeypatch, None, 2048, SILU)
    plan, _ = meta_product(*plain, block=160, pairs=1024, slots=True)
    assert plan.kernel is kernel._grouped_gemm_packed_kernel
    assert plan.constants[:2] == (32, 5)
    with pytest.raises(ValueError, match="specialized"):
        meta_product(*plain, SMALL, block=160, slots=True)
    more = (SMALL, 256), (SPECIALIZED, 160), (replace(SMALL, rows=64), 160), (replace(SMALL, join=32), 160)
    for config, block in (*more, (replace(SPECIALIZED, join=16), 256)):
        with pytest.raises(ValueError, match="specialized"):
            meta_product(*args, config, block=block, slots=True)
    with pytest.raises(ValueError, match="of plain weights none"):
        meta_product(*plain, JOINED, slots=True)
    three, _ = meta_product(*plain, THREE, slots=True)
    assert (three.kernel, *three.constants[:2]) == (taken.kernel, 256, 3)
    chosen, _ = meta_product(kernel, monkeypatch, None, 98304, SILU, slots=True)  # 50 MB an expert
    assert (chosen.kernel, *chosen.constants[:2], chosen.sizes[9]) == (taken.kernel, 256, 3, 8)
    float32, _ = meta_product(*plain, THREE, slots=True, out=torch.float32)
    assert float32.constants[:2] == (256, 2), "results take more room on their way out"
    with pytest.raises(ValueError, match="those of 192 rows and more by 192 too"):
        meta_product(*args, THREE, slots=True)
    with pytest.raises(ValueError, match="takes 64 pairs, which do not divide blocks of 160"):
        meta_product(*args, Config(64, 128, 64, 4, 3), block=160)
    with pytest.raises(ValueError, match="blocks of 80 pairs"):
        meta_product(*args, block=80)


@pytest.mark.compile
def test_blocks_that_are_waited_for(kernel, monkeypatch):
    """Each warpgroup counts its part of a tile; who copies rows of x can count but not begin early; blocks that join others do neither."""
    monkeypatch.setattr(kernel, "starts_early", lambda *_: True)
    monkeypatch.setattr(kernel, "overlaps", lambda *_: True)
    monkeypatch.setattr(kernel, "_plans", {})
    args = (kernel, monkeypatch, mk.MXFP4, 2048)
    one, _ = meta_product(*args, SILU, block=160, pairs=1024)
    wide, _ = meta_product(*args, SILU, SMALL, block=160, pairs=1024)
    two, _ = meta_product(*args, None, block=160, pairs=1024, slots=True)
    joined, _ = meta_product(*args, SILU, JOINED)
    assert (one.tiles, wide.tiles, two.tiles, joined.tiles) == (2 * 2, 2 * 3, 2 * 2, 0)  # of 256 rows, by 128 or 192
    assert one.leads(two)
    assert wide.leads(two)
    assert not two.leads(one)
    assert not joined.leads(two)
    assert one.behind() is one.launch
    assert two.behind(one.tiles) is not two.launch
    monkeypatch.setattr(kernel, "starts_early", lambda *_: False)
    monkeypatch.setattr(kernel, "_plans", {})
    late, _ = meta_product(*args, None, block=160, pairs=1024, slots=True)
    assert not one.leads(late)
    assert late.behind(one.tiles) is late.launch


LIMITS = {
    mk.MXFP8: 4.2,
    mk.MXFP8_E5M2: 4.5,
    mk.MXFP4: 4.0,
    mk.NVFP4: 4.2,
}  # instructions a weight of a thread and step


def compiled(aot, kernel, plan, tensors, spills=0, early=True):
    """The machine code of a plan, and that it holds together: registers change hands, no more bytes spill than ``spills``, and nothing
    is serialized or overwritten. early: as products of few pairs are launched."""
    specialized = importlib.import_module("mx_kernels.kernels.specialized")
    box_layout = importlib.import_module("mx_kernels.kernels.specialized_load").box_layout
    assert plan.kernel is specialized._grouped_gemm_specialized_kernel
    names = plan.kernel.arg_names
    types = {torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32"}
    values = [*(types[t.dtype] for t in tensors), *("fp32" if isinstance(s, float) else "i32" for s in plan.sizes)]
    for place, _, (rows, columns) in plan.boxes:
        held = "i32" if rows == 1 or columns == 32 else "bf16"
        values[place] = f"tensordesc<{held}[{rows}, {columns}],{box_layout(rows, columns)!r}>"
    constants = dict(zip(names[len(values) :], plan.constants, strict=True)) | {"PDL": early}
    loose = ("experts", "pairs", "strips", "group", "ahead", "flow")
    made = aot.compile_kernel(
        plan.kernel, dict(zip(names, values)), constants, "sm_90", unaligned=loose, **plan.options
    )
    assert not any(code in made.log for code in ("C7510", "C7512", "C7514", "C7515"))
    assert made.spills <= (64 if aot.TRITON_VERSION >= (3, 8) else spills)  # a few registers, once a tile
    steps = [
        body for body in made.loops() if any("UTMALDG" in line or "HGMMA" in line or "LDGSTS" in line for line in body)
    ]
    steps = [body for body in steps if sum("PHASECHK" in line for line in body) in (1, 2) and len(body) < 400]
    largest, groups = plan.constants[:2]
    assert len(steps) >= (5 if largest == 288 else 4) * (groups + 1)  # levels, of those who multiply and of who loads
    spilled = max(sum(line.startswith(("STL", "LDL")) for line in body) for body in steps)
    assert spilled == 0 or (spilled == 1 and aot.TRITON_VERSION >= (3, 8))
    assert not made.overwritten()
    assert made.opcodes()["USETMAXREG"] >= 2
    assert made.shared <= 232448
    # at once or who sends the copy engine, and with it the last program; who waits for a block; each warpgroup counts
    waits = len(plan.boxes) == 3 or (constants["KIND"] == "" and len(plan.boxes) == 2)
    found = {
        "griddepcontrol.wait": 2 + waits,
        "griddepcontrol.launch_dependents": 1,
        "ld.acquire.gpu": 2 * waits,
        "fence.proxy.async.global": waits,
        ".global.gpu.release.add": groups,
    }
    for instruction, times in found.items():
        assert made.asm.count(instruction) == times * early, instruction
    assert ("cp.async.mbarrier.arrive.noinc" in made.asm) == (not waits), "copies arrive by themselves"
    return made


@pytest.mark.compile
@pytest.mark.parametrize(
    ("f", "act", "how"),
    [
        *(
            (mk.MXFP8, act, how)
            for act, how in (
                (OAI, "pairs"),
                (SILU, "slots"),
                (None, "slots"),
                (OAI, "small"),
                (None, "narrow"),
                (SILU, "joined pairs"),
            )
        ),
        (mk.MXFP8_E5M2, SILU, "slots"),
        *(
            (mk.MXFP4, act, how)
            for act, how in (
                (OAI, "pairs"),
                (OAI, "slots"),
                (None, "small"),
                (None, "narrow"),
                (OAI, "joined"),
                (SILU, "joined pairs"),
            )
        ),
        *(
            (mk.NVFP4, act, how)
            for act, how in (
                (SILU, "slots"),
                (SILU, "small pairs"),
                (SILU, "narrow pairs"),
                (None, "joined pairs"),
                (None, "joined"),
            )
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else str(v) if v in FORMATS else {SILU: "silu", OAI: "oai", None: "gemm2"}[v],
)
def test_what_it_compiles_to(aot, kernel, monkeypatch, f, act, how):
    """Products from registers; weights by the copy engine, and x where it lies in slot order."""
    k = 2880 if f is mk.MXFP4 else 2048
    narrow, slots = "narrow" in how, "pairs" not in how
    small, joined = narrow or "small" in how, "joined" in how
    block, kind = 160 if small else 256, f.element.name if f.element.bits == 4 or f is mk.MXFP8_E5M2 else "e4m3"
    config = choose_config(
        Problem(kind, f.block, 2112 if joined else 16384, 8, 256 if narrow else 28672, k),
        block,
        specialized=True,
        slots=slots,
    )
    assert (config.rows, config.join) == (192 if small and not narrow else 128, 32 * joined)
    assert config.stages == (
        (7 if kind == "e2m1" else 6) + narrow if small else 5 if kind == "e2m1" or not joined else 4
    )
    plan, tensors = meta_product(kernel, monkeypatch, f, k, act, config, slots=slots, block=block)
    assert plan.constants[6] == (4 if joined and not slots and act is None else config.stages)  # notes take more room
    made = compiled(aot, kernel, plan, tensors, 40 if small or joined else 0, early=not joined)
    # of x four to one of 64 rows for 256, 192, 128 and 64 pairs, or of 32 rows five to two or nine to two; the weights, 32 or 64 columns of
    # 64 rows, and their scales
    boxes, groups = (
        (5 + 4 + 3 + 2, 2 if narrow else 3) if small else (9 + 8 + 6 + 4 + 2 if joined else 4 + 3 + 2 + 1, 2)
    )
    assert made.opcodes()["UTMALDG"] == boxes * slots + (4 + joined) * groups * (2 if f.element.bits == 4 else 3)
    assert (made.opcodes()["LDGSTS"] > 0) == (not slots)
    loops = [body for body in made.loops() if sum(line.startswith("HGMMA") for line in body) == 8 and len(body) < 400]
    for pairs in (128, 64) if small else (256, 128, 64):
        body = min(
            (b for b in loops if all(f"64x{pairs}x16" in line for line in b if line.startswith("HGMMA"))), key=len
        )
        assert len(body) / 64 <= LIMITS[f]
        products, waits, decoded = (
            [i for i, line in enumerate(body) if line.startswith(word)]
            for word in ("HGMMA", "WARPGROUP.DEPBAR", "HMUL2")
        )
        assert len(waits) == 2
        assert len(decoded) == 32
        for wait in waits:  # 16 pairs of weights are decoded between the products in front and their end
            issued = max((i for i in products if i < wait), default=None)
            between = [i for i in decoded if (issued is None or i > issued) and i < wait]
            assert len(between) == 16, "weights are decoded while the product before runs"


@pytest.mark.compile
@pytest.mark.parametrize(
    ("rows", "act", "out"),
    [
        (128, SILU, torch.bfloat16),
        (128, OAI, torch.float32),
        (128, None, torch.bfloat16),
        (128, None, torch.float32),
        (192, OAI, torch.bfloat16),
        (192, None, torch.bfloat16),
    ],
    ids=["silu-bf16", "oai-fp32", "gemm2-bf16", "gemm2-fp32", "three-oai", "three-gemm2"],
)
@pytest.mark.parametrize("slots", [True, False], ids=["slots", "pairs"])
def test_what_plain_weights_compile_to(aot, kernel, monkeypatch, rows, act, out, slots):
    """Weights by the copy engine, x too where it lies in slot order, and products from shared memory; one is issued before the one in
    front of it has ended."""
    config, spills = (SPECIALIZED, 0) if rows == 128 else (THREE, 40)
    plan, tensors = meta_product(kernel, monkeypatch, None, 2048, act, config, slots=slots, out=out)
    made = compiled(aot, kernel, plan, tensors, spills)
    assert made.opcodes()["UTMALDG"] == (4 + 3 + 2 + 1) * slots + 4 * rows // 64
    assert (made.opcodes()["LDGSTS"] > 0) == (not slots)
    loops = [[line for line in b if line.startswith("HGMMA")] for b in made.loops() if len(b) < 100]
    found = [sum(int(re.search(r"64x(\d+)x16", line).group(1)) for line in products) for products in loops if products]
    assert sorted(found) == sorted([64 * 4, 128 * 4, 192 * 4, 256 * 4] * (rows // 64)), (
        "a loop for each number of pairs"
    )
    loops = [body for body in made.loops() if any(line.startswith("HGMMA") for line in body) and len(body) < 100]
    for body in loops:
        assert len(body) < 80
        assert not any(line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0") for line in body)
        waits, gives = (
            next(i for i, line in enumerate(body) if line.startswith(f"SYNCS.{w}")) for w in ("PHASECHK", "ARRIVE")
        )
        place = re.search(r"\[(U?R\d+)", body[gives]).group(1)
        between = body[waits:gives] if waits < gives else body[waits:] + body[:gives]
        assert any(re.match(rf"\S+ {place},", line) for line in between), "not the stage in front is given back"
