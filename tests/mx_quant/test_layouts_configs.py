"""Configurations that are unknown, contradictory or wrong: the error names the field, what it says and what is known."""

from __future__ import annotations

import copy
import traceback
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_quant import layouts
from mx_quant.layouts import LAYOUTS, TensorInfo, WeightRef

NAME = "model.layers.0.mlp.up_proj.weight"
ORIGINAL = "block.0.mlp.mlp1_weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def stored(name, f, **more):
    """(configs, infos) of a checkpoint with one weight in a layout."""
    layout = LAYOUTS[name]
    fused = "linear" not in layout.kinds
    ref = WeightRef(NAME, "linear", (32, 64), f, **more)
    if fused:
        ref = WeightRef(ORIGINAL if name == "gpt-oss-original" else EXPERTS, "fused_expert", (2, 32, 64), f)
    infos = layout.plan(ref)
    configs = layout.config(
        {"config.json": {"model_type": "gpt_oss" if fused else "qwen3"}}, [ref], infos, activations=bool(more)
    )
    return layout, configs, infos


def change(configs, path, value):
    """A copy of the configs with one field, given as "file:key.key", replaced or (value None) removed."""
    configs = copy.deepcopy(configs)
    file, _, keys = path.partition(":")
    *head, last = keys.split(".")
    target = configs[file]
    for key in head:
        target = target[key]
    if value is None:
        target.pop(last)
    else:
        target[last] = value
    return configs


Q = "config.json:quantization_config"
G = f"{Q}.config_groups.group_0"
W = f"{Q}.global_quant_config.weight"
HF = "hf_quant_config.json:quantization"

BAD = [
    ("gpt-oss", mk.MXFP4, f"{Q}.quant_method", "mxfp5", r"quant_method is 'mxfp5'; known: 'mxfp4'"),
    ("mxfp8", mk.MXFP8, f"{Q}.weight_block_size", [128, 128], r"weight_block_size is \[128, 128\]; known: \[1, 32\]"),
    ("mxfp8", mk.MXFP8, f"{Q}.scale_fmt", "float", r"scale_fmt is 'float'; known: 'ue8m0'"),
    ("mxfp8", mk.MXFP8, f"{Q}.activation_scheme", "static", r"activation_scheme is 'static'; known: 'dynamic'"),
    (
        "compressed-tensors",
        mk.MXFP4,
        f"{Q}.format",
        "pack-quantized",
        r"format is 'pack-quantized'; known: 'mxfp4-pack",
    ),
    (
        "compressed-tensors",
        mk.MXFP4,
        f"{Q}.format",
        "mxfp8-quantized",
        r"format is 'mxfp8-quantized', but config_groups",
    ),
    ("compressed-tensors", mk.MXFP4, f"{Q}.quantization_status", "frozen", r"quantization_status is 'frozen'"),
    ("compressed-tensors", mk.MXFP4, f"{Q}.config_groups", {}, r"config_groups is \{\}, needs at least one group"),
    ("compressed-tensors", mk.MXFP4, f"{Q}.config_groups", [1], r"config_groups is \[1\]"),
    ("compressed-tensors", mk.MXFP4, f"{Q}.config_groups.group_0", "all", r"group_0 is 'all', needs an object"),
    ("compressed-tensors", mk.MXFP4, f"{G}.format", "int-quantized", r"group_0: format is 'int-quantized'; known"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.group_size", 16, r"weights.group_size is 16; known: 32"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.num_bits", 8, r"weights.num_bits is 8; known: 4"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.type", "int", r"weights.type is 'int'; known: 'float'"),
    (
        "compressed-tensors",
        mk.MXFP4,
        f"{G}.weights.strategy",
        "channel",
        r"weights.strategy is 'channel'; known: 'group'",
    ),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.symmetric", False, r"weights.symmetric is False"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.dynamic", True, r"weights.dynamic is True"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights.scale_dtype", "torch.bfloat16", r"scale_dtype is 'torch.bfloat16'"),
    ("compressed-tensors", mk.MXFP4, f"{G}.weights", None, r"weights is None, needs an object"),
    ("compressed-tensors", mk.MXFP4, f"{G}.targets", "Linear", r"targets is 'Linear', needs a list of module names"),
    (
        "compressed-tensors",
        mk.MXFP4,
        f"{G}.targets",
        ["model.layers.1.mlp.up_proj"],
        r"up_proj is stored quantized, but no target",
    ),
    (
        "compressed-tensors",
        mk.MXFP4,
        f"{Q}.ignore",
        ["re:.*up_proj"],
        r"up_proj is in .*ignore, but is stored quantized",
    ),
    ("compressed-tensors", mk.MXFP4, f"{Q}.ignore", "lm_head", r"ignore is 'lm_head', needs a list of module names"),
    ("compressed-tensors", mk.MXFP8, f"{G}.format", "mxfp4-pack-quantized", r"weights.num_bits is 8; known: 4"),
    ("compressed-tensors", mk.NVFP4, f"{G}.weights.group_size", 32, r"weights.group_size is 32; known: 16"),
    ("modelopt", mk.NVFP4, f"{Q}.quant_method", "modelopt_fp8", r"quant_method is 'modelopt_fp8'; known: 'modelopt'"),
    (
        "modelopt",
        mk.NVFP4,
        f"{HF}.quant_algo",
        "FP8",
        r"quant_algo is 'FP8', but config.json: .* is 'W4A16_NVFP4': they contradict",
    ),
    ("modelopt", mk.NVFP4, f"{HF}.group_size", 32, r"group_size is 32; known: 16"),
    ("modelopt", mk.MXFP8, f"{HF}.group_size", 16, r"group_size is 16; known: 32"),
    (
        "modelopt",
        mk.NVFP4,
        f"{HF}.exclude_modules",
        ["*.mlp.*"],
        r"up_proj is in .*exclude_modules, but is stored quantized",
    ),
    (
        "modelopt",
        mk.NVFP4,
        f"{HF}.exclude_modules",
        "lm_head",
        r"exclude_modules is 'lm_head', needs a list of module names",
    ),
    ("modelopt", mk.NVFP4, HF, [], r"hf_quant_config.json: quantization is \[\], needs an object"),
    ("quark", mk.MXFP4, f"{W}.dtype", "int4", r"dtype is 'int4'; known: 'fp4'"),
    ("quark", mk.MXFP4, f"{W}.dtype", "fp6_e2m3", r"fp6_e2m3 by .*weight.dtype"),
    ("quark", mk.MXFP4, f"{W}.qscheme", "per_tensor", r"qscheme is 'per_tensor'; known: 'per_group'"),
    ("quark", mk.MXFP4, f"{W}.group_size", 128, r"group_size is 128; known: 32"),
    ("quark", mk.MXFP4, f"{W}.ch_axis", 0, r"ch_axis is 0"),
    ("quark", mk.MXFP4, f"{W}.scale_format", "e4m3", r"scale_format is 'e4m3'; known: 'e8m0'"),
    ("quark", mk.MXFP4, f"{W}.scale_calculation_mode", "odd", r"scale_calculation_mode is 'odd'"),
    ("quark", mk.MXFP4, W, None, r"global_quant_config.weight is None, needs an object"),
    ("quark", mk.MXFP4, f"{Q}.export", None, r"export is None, needs an object"),
    ("quark", mk.MXFP4, f"{Q}.export.weight_format", "fake_quantized", r"weight_format is 'fake_quantized'"),
    ("quark", mk.MXFP4, f"{Q}.exclude", ["*up_proj"], r"up_proj is in .*exclude, but is stored quantized"),
    ("quark", mk.MXFP4, f"{Q}.layer_quant_config", ["x"], r"layer_quant_config is \['x'\], needs an object"),
    (
        "quark",
        mk.MXFP4,
        f"{Q}.layer_quant_config",
        {"*up_proj": {"weight": {"dtype": "int8"}}},
        r"layer_quant_config\['\*up_proj'\]",
    ),
]


@pytest.mark.parametrize(("name", "f", "path", "value", "message"), BAD)
def test_bad_field(name, f, path, value, message):
    layout, configs, infos = stored(name, f)
    assert [r.format for r in layout.refs(configs, infos)] == [f]
    with pytest.raises((ValueError, TypeError), match=message):
        layout.refs(change(configs, path, value), infos)


@pytest.mark.parametrize(("name", "f"), [(n, layout.formats[0]) for n, layout in LAYOUTS.items()])
def test_nothing_quantized(name, f):
    layout, configs, _ = stored(name, f)
    with pytest.raises(ValueError, match="nothing is quantized"):
        layout.refs(configs, {"model.norm.weight": TensorInfo(torch.bfloat16, (64,))})


def test_group_size_contradicts_shapes():
    """A config that says NVFP4 over tensors with 32-wide blocks: the scale's dtype and shape are named."""
    layout, configs, infos = stored("modelopt", mk.NVFP4)
    scale = NAME + "_scale"
    with pytest.raises(ValueError, match=rf"{scale} has shape \(32, 2\), needs \(32, 4\)"):
        layout.refs(configs, infos | {scale: TensorInfo(torch.float8_e4m3fn, (32, 2))})
    with pytest.raises(TypeError, match=rf"{scale} is uint8, needs float8_e4m3fn: nvfp4 by hf_quant_config"):
        layout.refs(configs, infos | {scale: TensorInfo(torch.uint8, (32, 4))})


def test_mxfp8_two_names():
    layout, configs, infos = stored("mxfp8", mk.MXFP8)
    both = infos | {"model.layers.1.mlp.up_proj.weight_scale": TensorInfo(torch.uint8, (32, 2))}
    with pytest.raises(ValueError, match="weight_scale and weight_scale_inv in one checkpoint"):
        layout.refs(configs, both)


def test_e8m0_dtype_is_accepted():
    """transformers may save the scales as float8_e8m0fnu; they are the same bytes."""
    layout, configs, infos = stored("mxfp8", mk.MXFP8)
    q = mk.quantize(torch.randn(32, 64), mk.MXFP8)
    (ref,) = layout.refs(configs, infos)
    tensors = layout.write(ref, q)
    scale = NAME + "_scale_inv"
    tensors[scale] = tensors[scale].view(torch.float8_e8m0fnu)
    (ref,) = layout.refs(configs, tensors)
    again = layout.read(ref, lambda n, expert=None: tensors[n])
    assert torch.equal(again.scale, q.scale)
    assert torch.equal(mk.dequantize(again), mk.dequantize(q))


def test_modelopt_without_config_json_entry():
    """Older ModelOpt exports have hf_quant_config.json alone; newer transformers-only ones config.json alone."""
    layout, configs, infos = stored("modelopt", mk.NVFP4)
    del configs["config.json"]["quantization_config"]
    assert layouts.detect_layout(configs, infos) is layout
    assert len(layout.refs(configs, infos)) == 1
    layout, configs, infos = stored("modelopt", mk.MXFP8)
    del configs["hf_quant_config.json"]
    assert layouts.detect_layout(configs, infos) is layout
    assert len(layout.refs(configs, infos)) == 1


@pytest.mark.parametrize("name", ["compressed-tensors", "modelopt", "quark"])
def test_mixed_formats(name):
    """Two formats in one checkpoint: each module is read as its own, and an unlisted or non-MX one is an error."""
    layout = LAYOUTS[name]
    first, second = layout.formats[:2]
    refs = [
        WeightRef(f"model.layers.{i}.mlp.up_proj.weight", "linear", (32, 64), f) for i, f in enumerate((first, second))
    ]
    infos = layout.plan(refs[0]) | layout.plan(refs[1])
    configs = layout.config({"config.json": {"model_type": "qwen3"}}, refs, infos)
    assert layouts.detect_layout(configs, infos) is layout
    assert {r.name: r.format for r in layout.refs(configs, infos)} == {r.name: r.format for r in refs}
    if name == "modelopt":
        with pytest.raises(ValueError, match=r"up_proj is stored quantized .*quantized_layers does not list it"):
            layout.refs(change(configs, f"{HF}.quantized_layers", {}), infos)
        with pytest.raises(ValueError, match=r"quantized_layers is 'x', needs an object"):
            layout.refs(change(configs, f"{HF}.quantized_layers", "x"), infos)
        listed = configs["hf_quant_config.json"]["quantization"]["quantized_layers"]
        listed = {n: {"quant_algo": "W4A16_AWQ"} for n in listed}
        with pytest.raises(ValueError, match=r"quant_algo is 'W4A16_AWQ'; known: 'NVFP4'"):
            layout.refs(change(configs, f"{HF}.quantized_layers", listed), infos)


def test_quark_records_the_rule():
    layout = LAYOUTS["quark"]
    for rule in ("even", "floor", "ceil"):
        ref = WeightRef(NAME, "linear", (32, 64), mk.MXFP4, rule=mk.ScaleRule(rule))
        configs = layout.config({"config.json": {}}, [ref], layout.plan(ref))
        assert (
            configs["config.json"]["quantization_config"]["global_quant_config"]["weight"]["scale_calculation_mode"]
            == rule
        )
        assert layout.refs(configs, layout.plan(ref))[0].rule == rule


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_activations(name, layout):
    """activations=True is recorded where the layout can, and refused where it cannot."""
    fused = "linear" not in layout.kinds
    f = layout.formats[0]
    ref = WeightRef(EXPERTS, "fused_expert", (2, 32, 64), f) if fused else WeightRef(NAME, "linear", (32, 64), f)
    if not layout.activations:
        with pytest.raises(ValueError, match="no quantized activations"):
            layout.config({"config.json": {}}, [], {}, activations=True)
        return
    for f in layout.activations:
        bare = replace(ref, format=f)
        full = replace(bare, input_scale="x") if f is mk.NVFP4 else bare
        without = layout.config({"config.json": {}}, [bare], layout.plan(bare))
        configs = layout.config({"config.json": {}}, [full], layout.plan(full), activations=True)
        always = name.startswith("mxfp8") or (
            name == "modelopt" and f is mk.MXFP8
        )  # activations are quantized dynamically
        assert (configs == without) == always
        (again,) = layout.refs(configs, layout.plan(full))
        assert again.activation is (mk.MXFP8 if f is mk.MXFP6_E2M3 and name == "compressed-tensors" else f)
        (again,) = layout.refs(without, layout.plan(bare))
        assert again.activation is (f if always else None)
        if f is mk.NVFP4:
            with pytest.raises(ValueError, match=r"activations=True, but .* has no input_scale"):
                layout.config({"config.json": {}}, [bare], layout.plan(bare), activations=True)
            with pytest.raises(ValueError, match=r"activations=False, but .* has an input_scale"):
                layout.config({"config.json": {}}, [full], layout.plan(full))


def test_fused_write_keeps_other_configs():
    layout, configs, infos = stored("gpt-oss", mk.MXFP4)
    configs["config.json"]["hidden_size"] = 64
    configs["config.json"]["text_config"] = {"quantization_config": {"quant_method": "fp8"}, "x": 1}
    ref = layout.refs(change(configs, "config.json:text_config", None), infos)[0]
    new = layout.config(configs, [ref], infos)["config.json"]
    assert new["hidden_size"] == 64
    assert new["text_config"] == {"x": 1}
    assert new["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 32, 2, 8), r"needs \[E, N, K/32, 16\]"),
        ((2, 32, 32), r"needs \[E, N, K/32, 16\]"),
        ((3, 32, 2, 16), r"scales has shape"),
    ],
)
def test_gpt_oss_shapes(shape, message):
    layout, configs, infos = stored("gpt-oss", mk.MXFP4)
    with pytest.raises(ValueError, match=message):
        layout.refs(configs, infos | {EXPERTS + "_blocks": TensorInfo(torch.uint8, shape)})


def paths(tree, prefix=()):
    """Every path of keys into nested objects."""
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.floats(allow_nan=False), st.text(max_size=5), st.just({}), st.just([]),
    st.lists(st.one_of(st.text(max_size=4), st.integers(), st.just([])), max_size=3),
    st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=4), st.just({})), max_size=2),
    st.sampled_from(["mxfp8", "NVFP4", "re:.*", "*", "mixed-precision", "MIXED_PRECISION", "Linear", [[1, 32]], "fp4", 32, 16]),
)  # fmt: skip
DTYPES = st.sampled_from(
    [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16]
)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fuzz(name, data):
    """Whatever a config and a header say, there are references or a ValueError or TypeError of ours; nothing else escapes."""
    f = data.draw(st.sampled_from(LAYOUTS[name].formats))
    layout, configs, infos = stored(name, f)
    configs, infos = copy.deepcopy(configs), dict(infos)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(
            st.sampled_from(sorted((p for p in paths(configs) if len(p) > 1), key=str) or [("config.json", "x")])
        )
        target = configs
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = data.draw(VALUES)
    if data.draw(st.booleans()):
        victim = data.draw(st.sampled_from(sorted(infos)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 16, 32, 33, 64, 2**40]), max_size=4))
        new = data.draw(
            st.sampled_from([victim, "x", "experts.gate_up_proj", "a.experts.0.w1.weight", "weight", ".weight"])
        )
        infos[new] = TensorInfo(data.draw(DTYPES), tuple(shape))
    error = None
    try:
        layouts.detect_layout(configs, infos)
        refs = layout.refs(configs, infos)
    except (ValueError, TypeError) as e:
        error = e
    if error is not None:
        assert "layouts" in traceback.extract_tb(error.__traceback__)[-1].filename, (
            error
        )  # ours, not an accident inside torch
        return
    for ref in refs:
        assert ref.format in layout.formats
        for tensor, info in layout.plan(ref).items():
            assert tensor in ref.tensors
            assert len(info.shape) < 2 or tuple(infos[tensor].shape) == info.shape
