"""Every layout: what it writes it reads back bit for bit, weights move between layouts without loss, bad input is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_quant import layouts
from mx_quant.layouts import FAMILIES, FUSED, LAYOUTS, PER_EXPERT, TensorInfo, WeightRef

E, H, I = 3, 64, 96

CASES = [(layout, f) for layout in LAYOUTS.values() for f in layout.formats]
IDS = [f"{layout.name}-{f}" for layout, f in CASES]


def quantized(f, *shape, seed=0):
    """Random codes and scales of every kind that may be stored; global scales that a divisor can hold."""
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape[:-1], f.data_width(shape[-1])), dtype=torch.uint8, generator=g)
    top = 255 if f.scale == "e8m0" else 0x7F
    scale = torch.randint(0, top, (*shape[:-1], shape[-1] // f.block), dtype=torch.uint8, generator=g)
    glob = None
    if f.has_global_scale:
        glob = layouts.exact_global(torch.rand(shape[:-2], generator=g) * 1e-3 + 1e-6)
    return mk.QuantizedTensor(data.view(f.data_dtype), scale.view(f.scale_dtype), f, f.default_rule, global_scale=glob)


def same_bytes(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def equal(a, b):
    assert a.format is b.format
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
    assert (a.global_scale is None) == (b.global_scale is None)
    if a.global_scale is not None:
        assert torch.equal(a.global_scale, b.global_scale)
    return True


def getter(tensors):
    return lambda name, expert=None: tensors[name] if expert is None else tensors[name][expert]


def weights_of(family, f):
    """Names and canonical shapes of one layer as each family has them on disk, with a router and a norm beside them."""
    p = "model.layers.0"
    attention = [(f"{p}.self_attn.{n}_proj.weight", "linear", (n_, H)) for n, n_ in (("q", 64), ("k", 32), ("v", 32))]
    name = {"mixtral": "block_sparse_moe", "minimax-m2": "block_sparse_moe"}.get(family, "mlp")
    fam = FAMILIES[family]
    if family == "qwen3":
        moe = [(f"{p}.mlp.{n}_proj.weight", "linear", (I, H)) for n in ("gate", "up")]
    elif family == "gpt-oss":
        moe = [
            (f"{p}.mlp.experts.gate_up_proj", "fused_expert", (E, 2 * I, H)),
            (f"{p}.mlp.experts.down_proj", "fused_expert", (E, H, I)),
        ]
    else:
        moe = [
            (f"{p}.{name}.experts.{e}.{proj}.weight", "expert", (I, H) if proj != fam.down else (H, I))
            for e in range(E)
            for proj in (fam.gate, fam.up, fam.down)
        ]
    shared = [(f"{p}.mlp.shared_experts.up_proj.weight", "linear", (I, H))] if family == "deepseek-v3" else []
    head = [("lm_head.weight", "linear", (32, H))]
    plain = {
        "model.embed_tokens.weight": torch.zeros(32, H, dtype=torch.bfloat16),
        f"{p}.input_layernorm.weight": torch.ones(H, dtype=torch.bfloat16),
        f"{p}.{name}.gate.weight": torch.zeros(E, H, dtype=torch.bfloat16),
    }
    return [WeightRef(n, k, s, f) for n, k, s in (*attention, *moe, *shared, *head)], plain


FAMILY_NAMES = ("qwen3-moe", "mixtral", "minimax-m2", "deepseek-v3", "olmoe", "gpt-oss", "qwen3")


def store(layout, f, refs, plain, *, activations=False):
    """All tensors and configs of a checkpoint, and what went in."""
    tensors, made = dict(plain), {}
    for i, ref in enumerate(refs):
        scale = torch.tensor(0.125) if ref.input_scale else None
        q = made[ref.name] = quantized(f, *ref.shape, seed=i)
        out = layout.write(ref, q, input_scale=scale)
        plan = layout.plan(ref)
        assert {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in out.items()} == plan
        assert not set(out) & set(tensors)
        tensors |= out
    configs = layout.config({"config.json": {"model_type": "x"}}, refs, tensors, activations=activations)
    return tensors, configs, made


def original(ref):
    """A fused weight under OpenAI's own name."""
    return replace(ref, name="block.0.mlp.mlp" + ("1" if "gate" in ref.name else "2") + "_weight")


def storable(layout, f, family):
    """The family's weights that the layout can hold in this format."""
    refs, plain = weights_of(family, f)
    refs = [r for r in refs if r.kind in layout.kinds]
    if layout.name == "gpt-oss-original":
        refs = [original(r) for r in refs]
    if layout.name == "modelopt" and f is mk.MXFP8 and family == "gpt-oss":
        refs = [r for r in refs if r.kind == "linear"]
    return refs, plain


@pytest.mark.parametrize(
    ("layout", "f", "family"),
    [
        pytest.param(layout, f, family, id=f"{name}-{family}")
        for (layout, f), name in zip(CASES, IDS, strict=True)
        for family in FAMILY_NAMES
        if storable(layout, f, family)[0]
    ],
)
def test_round_trip(layout, f, family):
    refs, plain = storable(layout, f, family)
    model_type = (*FAMILIES[family].model_types, "other")[0]
    refs = [t.ref for t in layouts.regroup(refs, None, FAMILIES[family])]
    tensors, configs, made = store(layout, f, refs, plain)
    configs["config.json"]["model_type"] = model_type
    assert layouts.detect_layout(configs, tensors) is layout
    found = {r.name: r for r in layout.refs(configs, tensors)}
    assert set(found) == set(made)
    for ref in refs:
        again = found[ref.name]
        assert (again.kind, again.shape, again.format, again.input_scale) == (ref.kind, ref.shape, f, None)
        assert set(again.tensors) == set(layout.plan(ref))
        equal(layout.read(again, getter(tensors)), made[ref.name])
        assert layout.read_input_scale(again, getter(tensors)) is None
        if ref.kind == "fused_expert":
            for e in range(E):
                equal(layout.read(again, getter(tensors), expert=e), made[ref.name][e])
                one = layout.write(ref, made[ref.name][e], expert=e)
                assert set(one) == set(layout.plan(ref))
                for n, t in one.items():
                    assert same_bytes(t, tensors[n][e]), n


@pytest.mark.parametrize("name", ["compressed-tensors", "modelopt"])
def test_round_trip_w4a4(name):
    layout = LAYOUTS[name]
    refs, plain = weights_of("qwen3-moe", mk.NVFP4)
    refs = [replace(r, input_scale="wanted") for r in refs]
    tensors, configs, made = store(layout, mk.NVFP4, refs, plain, activations=True)
    for ref in layout.refs(configs, tensors):
        assert ref.input_scale in ref.tensors
        assert layout.read_input_scale(ref, getter(tensors)) == 0.125
        equal(layout.read(ref, getter(tensors)), made[ref.name])
    victim = ref.input_scale
    stored = tensors.pop(victim)
    with pytest.raises(ValueError, match=victim):
        layout.refs(configs, tensors)
    for bad in (0.0, float("nan"), float("inf"), -1.0):
        tensors[victim] = torch.full_like(stored, bad)
        with pytest.raises(ValueError, match=rf"{victim}.*finite positive"):
            layout.read_input_scale(ref, getter(tensors))
    with pytest.raises(ValueError, match="no input_scale"):
        layout.write(refs[0], made[refs[0].name])
    with pytest.raises(ValueError, match="finite positive"):
        layout.write(refs[0], made[refs[0].name], input_scale=torch.tensor(0.0))


@pytest.mark.parametrize(("source", "f"), CASES, ids=IDS)
def test_convert(source, f):
    """Through every other layout of the format and back, fused or one by one as it wants them: the same bytes."""
    family = FAMILIES["gpt-oss"]
    refs, _ = weights_of("gpt-oss", f)
    experts = [r for r in refs if r.kind == "fused_expert"]
    if source.name == "gpt-oss-original":
        experts = [original(r) for r in experts]
    made = {r.name: quantized(f, *r.shape, seed=i) for i, r in enumerate(experts)}
    if source.name == "modelopt" and f is mk.MXFP8:
        family = FAMILIES["qwen3-moe"]

    def grouping(layout):
        return FUSED if "expert" not in layout.kinds else PER_EXPERT

    def move(layout, refs, read):
        tensors = {}
        targets = layouts.regroup(refs, grouping(layout), family)
        for t in targets:
            tensors |= layout.write(t.ref, layouts.assemble(t, read))
        configs = layout.config(
            {"config.json": {"model_type": family.model_types[0]}}, [t.ref for t in targets], tensors
        )
        return layout.refs(configs, tensors), tensors

    def reader(layout, refs, tensors):
        by_name = {r.name: r for r in refs}
        return lambda name, e: layout.read(by_name[name], getter(tensors), expert=e)

    for middle in LAYOUTS.values():
        if f not in middle.formats or {source.name, middle.name} == {"gpt-oss", "gpt-oss-original"}:
            continue  # those two differ in the names of the whole model
        if middle.name == "gpt-oss-original" and source is not middle:
            continue
        a_refs, a = move(source, experts, lambda n, e: made[n] if e is None else made[n][e])
        b_refs, b = move(middle, a_refs, reader(source, a_refs, a))
        c_refs, c = move(source, b_refs, reader(middle, b_refs, b))
        assert set(a) == set(c)
        for name in a:
            assert same_bytes(a[name], c[name]), (middle.name, name)
        back = layouts.regroup(c_refs, FUSED, family)
        assert {t.ref.name for t in back} == set(made)
        for t in back:
            equal(layouts.assemble(t, reader(source, c_refs, c)), made[t.ref.name])


def sample(layout, f):
    """One weight that the layout can hold."""
    if "linear" in layout.kinds:
        return WeightRef("model.layers.0.mlp.up_proj.weight", "linear", (I, H), f)
    ref = WeightRef("model.layers.0.mlp.experts.gate_up_proj", "fused_expert", (E, 2 * I, H), f)
    return original(ref) if layout.name == "gpt-oss-original" else ref


def test_nothing_is_mutated():
    for layout, f in CASES:
        ref = sample(layout, f)
        q = quantized(f, *ref.shape)
        before = q.map(torch.clone)
        tensors = layout.write(ref, q)
        copies = {n: t.clone() for n, t in tensors.items()}
        configs = {"config.json": {"model_type": "gpt_oss", "quantization_config": {"quant_method": "other"}}}
        new = layout.config(configs, [ref], tensors)
        assert configs["config.json"]["quantization_config"] == {"quant_method": "other"}
        layout.read(layout.refs(new, tensors)[0], getter(tensors))
        equal(q, before)
        assert all(same_bytes(t, copies[n]) for n, t in tensors.items())


@pytest.mark.parametrize(("layout", "f"), CASES, ids=IDS)
def test_never_writes_nan_scales(layout, f):
    ref = sample(layout, f)
    good = quantized(f, *ref.shape)
    bad = good.map(torch.clone)
    index = (0,) * (len(ref.shape) - 1) + (1,)
    bad.scale.view(torch.uint8)[index] = 0xFF
    with pytest.raises(ValueError, match=r"0xff.*quantize this tensor again"):
        layout.write(ref, bad)
    tensors = layout.write(ref, good)
    scale_name = next(n for n, t in tensors.items() if t.dtype == f.scale_dtype and t.numel() == good.scale.numel())
    tensors[scale_name].view(torch.uint8).flatten()[:] = 0xFF
    configs = layout.config({"config.json": {"model_type": "gpt_oss"}}, [ref], tensors)
    with pytest.raises(ValueError, match=scale_name.replace(".", r"\.")):
        layout.read(layout.refs(configs, tensors)[0], getter(tensors))


@pytest.mark.parametrize(("layout", "f"), CASES, ids=IDS)
def test_damaged(layout, f):
    """Each stored tensor in turn: missing, of another dtype, of another shape. The error names it."""
    ref = sample(layout, f)
    tensors = layout.write(ref, quantized(f, *ref.shape))
    configs = layout.config({"config.json": {"model_type": "gpt_oss"}}, [ref], tensors)
    infos = layout.plan(ref)
    for i, (victim, info) in enumerate(infos.items()):
        if i:  # without its data a weight is not there at all
            with pytest.raises(ValueError, match=r"missing|nothing is quantized"):
                layout.refs(configs, {n: t for n, t in infos.items() if n != victim})
        with pytest.raises((TypeError, ValueError), match=r"needs|nothing is quantized|looks like|not a positive"):
            layout.refs(configs, infos | {victim: TensorInfo(torch.int16, info.shape)})
        with pytest.raises(ValueError, match=r"needs|looks like|no multiple of|is missing"):
            layout.refs(configs, infos | {victim: TensorInfo(info.dtype, (*info.shape, 5, 3))})


def test_wrong_weights_are_refused():
    q = quantized(mk.MXFP8, I, H)
    ref = WeightRef("model.layers.0.mlp.up_proj.weight", "linear", (I, H), mk.MXFP8)
    with pytest.raises(ValueError, match=r"needs \(96, 64\)"):
        LAYOUTS["mxfp8"].write(ref, quantized(mk.MXFP8, H, H))
    with pytest.raises(ValueError, match="gpt-oss layout stores fused experts"):
        LAYOUTS["gpt-oss"].write(ref, q)
    with pytest.raises(ValueError, match=r"cannot hold mxfp8_e4m3"):
        LAYOUTS["gpt-oss"].write(WeightRef("a.experts.down_proj", "fused_expert", (I, H)), q)
    with pytest.raises(ValueError, match="reference says mxfp4"):
        LAYOUTS["quark"].write(replace(ref, format=mk.MXFP4), q)
    fused = WeightRef(
        "model.layers.0.mlp.experts.gate_up_proj", "fused_expert", (E, 2 * I, H), mk.MXFP8, transposed=True
    )
    with pytest.raises(ValueError, match="blocks along N"):
        LAYOUTS["modelopt"].plan(fused)
    with pytest.raises(ValueError, match="linear and expert weights only"):
        LAYOUTS["quark"].plan(fused)
    with pytest.raises(ValueError, match="pad K to 96"):
        LAYOUTS["mxfp8"].plan(replace(ref, shape=(I, 80)))
    with pytest.raises(ValueError, match="full precision"):
        LAYOUTS["mxfp8"].plan(replace(ref, format=None))
    with pytest.raises(ValueError, match="no input_scale to store"):
        LAYOUTS["mxfp8"].write(ref, q, input_scale=torch.tensor(1.0))


def test_other_refusals():
    ref = WeightRef("m.mlp.up_proj.weight", "linear", (I, H), mk.NVFP4)
    q = quantized(mk.NVFP4, I, H)
    with pytest.raises(
        ValueError, match=r"layout mxfp8 cannot hold nvfp4 \(m\.mlp\.up_proj\.weight\); it holds mxfp8_e4m3"
    ):
        LAYOUTS["mxfp8"].plan(ref)
    tensors = LAYOUTS["modelopt"].write(ref, q)
    tensors["m.mlp.up_proj.weight_scale_2"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"weight_scale_2 has shape \(3,\), needs \(\), one global scale"):
        LAYOUTS["modelopt"].read(ref, getter(tensors))
    fused = WeightRef("m.experts.down_proj", "fused_expert", (E, I, H), mk.MXFP4)
    with pytest.raises(ValueError, match="no input_scale"):
        LAYOUTS["gpt-oss"].write(fused, quantized(mk.MXFP4, E, I, H), input_scale=torch.ones(()))
    layout = LAYOUTS["compressed-tensors"]
    configs = layout.config({"config.json": {}}, [ref], layout.plan(ref))
    stored = {
        "m.mlp.up_proj.weight": TensorInfo(torch.float8_e4m3fn, (I, H)),
        "m.mlp.up_proj.weight_scale": TensorInfo(torch.uint8, (I, 2)),
    }
    with pytest.raises(
        ValueError, match=r"up_proj\.weight is stored, but nvfp4-pack-quantized by .* stores codes as weight_packed"
    ):
        layout.refs(configs, stored)


def test_meta():
    """Layouts plan and write without values too: shapes of a model on the meta device."""
    for layout, f in CASES:
        ref = sample(layout, f)
        out = layout.write(ref, quantized(f, *ref.shape).to("meta"))
        assert {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in out.items()} == layout.plan(ref)
        assert all(t.is_meta for t in out.values())


def test_detect():
    assert layouts.detect_layout({"config.json": {"model_type": "qwen3"}}, {}) is None
    assert layouts.detect_layout({}, {}) is None
    config = {"config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}}
    with pytest.raises(ValueError, match=r"quant_method is 'bitsandbytes'; known: .*modelopt"):
        layouts.detect_layout(config, {})
    with pytest.raises(ValueError, match="needs an object"):
        layouts.detect_layout({"config.json": {"quantization_config": "mxfp4"}}, {})
    with pytest.raises(ValueError, match=r"unknown layout 'x'; there are gpt-oss"):
        layouts.get_layout("x")
    nested = {"config.json": {"text_config": {"quantization_config": {"quant_method": "quark"}}}}
    assert layouts.detect_layout(nested, {}) is LAYOUTS["quark"]
    both = {"config.json": {"quantization_config": {"quant_method": "quark"}}}
    with pytest.raises(ValueError, match=r"several layouts at once: gpt-oss, quark"):
        layouts.detect_layout(both, {"a.experts.down_proj_blocks": TensorInfo(torch.uint8, (1, 1, 1, 16))})


def test_config_lists_what_stays():
    refs, plain = weights_of("qwen3-moe", mk.MXFP8)
    refs = [r for r in refs if r.kind == "expert"]
    _, configs, _ = store(LAYOUTS["mxfp8"], mk.MXFP8, refs, plain)
    assert configs["config.json"]["quantization_config"]["ignored_layers"] == ["lm_head", "model.layers.0.mlp.gate"]


def test_config_lists_fused_experts_that_stay():
    p = "model.layers.{}.mlp.experts.{}"
    ref = WeightRef("model.layers.0.self_attn.q_proj.weight", "linear", (I, H), mk.MXFP8)
    plain = {
        p.format(i, n): TensorInfo(torch.bfloat16, (E, H, 2 * I)) for i in (0, 1) for n in ("gate_up_proj", "down_proj")
    }
    config = LAYOUTS["mxfp8"].config({"config.json": {}}, [ref], plain)["config.json"]["quantization_config"]
    assert config["ignored_layers"] == ["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    fused = WeightRef(p.format(0, "gate_up_proj"), "fused_expert", (E, 2 * I, H), mk.MXFP8)
    config = LAYOUTS["mxfp8"].config({"config.json": {}}, [ref, fused], plain)["config.json"]["quantization_config"]
    assert config["ignored_layers"] == ["lm_head", "model.layers.1.mlp.experts"]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 0x7F7FFFFF))
def test_divisor_survives(bits):
    """divisor -> multiplier -> divisor -> multiplier is the identity on multipliers, for every positive float32 in range."""
    d = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    g = layouts.invert_global(d)
    if not (torch.isfinite(g) and g > 0 and torch.isfinite(g.reciprocal())):
        return
    assert layouts.invert_global(layouts.invert_global(g)) == g


def test_exact_global_every_mantissa():
    g = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    e = layouts.exact_global(g)
    assert torch.equal(layouts.invert_global(layouts.invert_global(e)), e)
    assert bool(((e == g) | (e == torch.nextafter(g, torch.tensor(torch.inf)))).all())
