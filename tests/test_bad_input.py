"""Bad input: every error says what came, what is needed and what to do, before anything is written.

Each row is a call and the three parts of its message, in order. What belongs to one function only is tested beside it.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

import mx_kernels as mk

mq = pytest.importorskip("mx_quant")
mm = pytest.importorskip("mx_moe")

SILU = mk.Activation("silu")
NAME = "model.layers.0.mlp.down_proj.weight"


def operands():
    w = torch.randn(3, 64, 64)
    ids = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]], dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 16, 3, sort=True)
    x = torch.randn(4, 64)
    return x, w, mk.quantize(w, mk.MXFP8), ids, tiles


def calls():
    """id -> (call, error, what came, what is needed, what to do)."""
    x, w, q, ids, tiles = operands()
    columns, y = torch.randn(64, 4).t(), torch.randn(8, 64)
    rebased, rows = mk.rebase(q), mk.rebase_rows(x, tiles, top_k=2)
    experts = mm.make_experts(mq.quantize_experts(torch.randn(3, 128, 64), w, mk.MXFP8), SILU)
    routing = mm.Routing(ids, torch.rand(4, 2))

    def epilogue(**parts):
        return lambda: mk.gemm(x, q[0], epilogue=mk.Epilogue(**parts))

    def routed(**parts):
        return lambda: mk.grouped_gemm_rebased(rows, rebased, tiles, epilogue=mk.Epilogue(**parts))

    return {
        "quantize-type": (
            lambda: mk.quantize([1.0], mk.MXFP8),
            TypeError,
            "x is a list",
            "needs a Tensor",
            "makes one",
        ),
        "quantize-dtype": (lambda: mk.quantize(x.int(), mk.MXFP8), TypeError, "int32", "needs float32", "cast"),
        "quantize-shape": (lambda: mk.quantize(x[0, 0], mk.MXFP8), ValueError, "no dimensions", "needs", "reshape"),
        "quantize-k": (
            lambda: mk.quantize(x[:, :40], mk.MXFP8),
            ValueError,
            "is 40",
            "multiple of .* 32",
            "pad K to 64",
        ),
        "quantize-stride": (lambda: mk.quantize(columns, mk.MXFP8), ValueError, "stride 4", "needs 1", "contiguous"),
        "quantize-device": (
            lambda: mk.quantize(x, mk.NVFP4, global_scale=torch.ones((), device="meta")),
            *(ValueError, "is on meta", "x on cpu", "move both"),
        ),
        "quantize-zero-scale": (
            lambda: mk.quantize(x, mk.NVFP4, global_scale=torch.zeros(())),
            *(ValueError, r"is 0\.0", "needs a multiplier", "pass amax / 2688"),
        ),
        "quantize-scale-type": (
            lambda: mk.quantize(x, mk.NVFP4, global_scale=1.0),
            *(TypeError, "is a float", "needs a Tensor", "makes one"),
        ),
        "dequantize-type": (lambda: mk.dequantize(x), TypeError, "q is Tensor", "needs a QuantizedTensor", "quantize"),
        "gemm-type": (lambda: mk.gemm([1], q[0]), TypeError, "x is a list", "needs a Tensor or", "quantize"),
        "gemm-dtype": (lambda: mk.gemm(x.int(), q[0]), TypeError, "int32", "needs float32", "cast"),
        "gemm-k": (lambda: mk.gemm(x[:, :32], q[0]), ValueError, "K = 32 .* K = 64", "need the same", "transpose"),
        "gemm-stride": (lambda: mk.gemm(columns, q[0]), ValueError, "stride 4", "needs 1", "contiguous"),
        "gemm-device": (lambda: mk.gemm(x.to("meta"), q[0]), ValueError, "w is on cpu", "x on meta", "move both"),
        "gemm-out-dtype": (
            lambda: mk.gemm(x, q[0], out_dtype=torch.int8),
            *(TypeError, "int8", "needs float32", "cast the result"),
        ),
        "gemm-bias": (epilogue(bias=torch.ones(3)), ValueError, r"\(3,\)", r"needs \(64,\)", "one per weight row"),
        "gemm-row-weight": (epilogue(row_weight=torch.ones(4).half()), TypeError, "float16", "needs float32", "cast"),
        "gemm-activation": (epilogue(activation="silu"), TypeError, "is a str", "needs an Activation", "is one"),
        "gemm-requantize": (epilogue(requantize_to="mxfp8"), TypeError, "is a str", "needs a Format", "get_format"),
        "gemm-odd": (
            lambda: mk.gemm(x, mk.quantize(w[0, :63], mk.MXFP8), epilogue=mk.Epilogue(activation=SILU)),
            *(ValueError, "odd width of 63", "needs as many gates as ups", "gated=False"),
        ),
        "gemm-epilogue": (
            lambda: mk.gemm(x, q[0], epilogue=None),
            TypeError,
            "NoneType",
            "needs an? Epilogue",
            "leave",
        ),
        "grouped-rows": (
            lambda: mk.grouped_gemm(x, q, tiles),
            ValueError,
            "4 rows and top_k is 1",
            "8 pairs",
            "pass top_k=2",
        ),
        "grouped-experts": (
            lambda: mk.grouped_gemm(x, q[:2], tiles, top_k=2),
            *(ValueError, "w has 2 experts", "made for 3", "pass it num_experts=2"),
        ),
        "grouped-tiles": (
            lambda: mk.grouped_gemm(x, q, ids),
            TypeError,
            "is a Tensor",
            "needs an? Alignment",
            "makes one",
        ),
        "grouped-device": (
            lambda: mk.grouped_gemm(x.to("meta"), q.to("meta"), tiles, top_k=2),
            *(ValueError, "is on cpu", "x on meta", "move both"),
        ),
        "align-dtype": (
            lambda: mk.moe_align_block_size(ids.float(), 16, 3),
            TypeError,
            "float32",
            "needs int32",
            "cast",
        ),
        "align-shape": (lambda: mk.moe_align_block_size(ids[0], 16, 3), ValueError, r"\(2,\)", "needs", "reshape"),
        "align-ids": (
            lambda: mk.moe_align_block_size(ids + 3, 16, 3),
            *(ValueError, r"ids\[0, 1\] is 4", "there are 3 experts", "use 0 to 2, .* to drop"),
        ),
        "align-few-ids": (  # few enough pairs that nothing is sorted
            lambda: mk.moe_align_block_size(ids[:1] + 99, 16, 64),
            *(ValueError, r"ids\[0, 0\] is 99", "there are 64 experts", "use 0 to 63"),
        ),
        "align-map": (
            lambda: mk.moe_align_block_size(ids, 16, 3, torch.tensor([0, 1, 7], dtype=torch.int32)),
            *(ValueError, r"expert_map\[2\] is 7", "have 3 experts", "use 0 to 2, or -1"),
        ),
        "align-block": (
            lambda: mk.moe_align_block_size(ids, 12, 3),
            ValueError,
            "is 12",
            "needs a power of two",
            "16, 32",
        ),
        "activate-dtype": (lambda: mk.activate(x.int(), SILU), TypeError, "int32", "needs float32", "cast"),
        "activate-type": (lambda: mk.activate(x, "silu"), TypeError, "is a str", "needs an? Activation", "is one"),
        "activate-stride": (lambda: mk.activate(columns, SILU), ValueError, "stride 4", "needs 1", "contiguous"),
        "activate-k": (
            lambda: mk.activate(x[:, :48].contiguous(), SILU, requantize_to=mk.MXFP8),
            *(ValueError, "is 24", "multiple of .* 32", "pad K to 32"),
        ),
        "combine-shape": (
            lambda: mk.combine(x, tiles),
            ValueError,
            r"\(4, 64\)",
            r"needs \[8, H\]",
            "one row for each",
        ),
        "combine-weights": (
            lambda: mk.combine(y, tiles, weights=torch.rand(4, 2).half()),
            *(TypeError, "float16", "needs float32", "cast"),
        ),
        "combine-device": (lambda: mk.combine(y.to("meta"), tiles), ValueError, "is on meta", "on cpu", "move both"),
        "rebase-format": (
            lambda: mk.rebase(mk.quantize(w, mk.NVFP4)),
            *(ValueError, "nvfp4 cannot", "are no E4M3 values", "mxfp8_e4m3, .* can"),
        ),
        "rebased-row-weight": (routed(row_weight=torch.ones(3)), ValueError, r"\(3,\)", "needs 8 values", "one a pair"),
        "rebased-row-weight-dtype": (
            routed(row_weight=torch.ones(8).half()),
            TypeError,
            "float16",
            "needs float32",
            "cast",
        ),
        "rebased-bias-dtype": (routed(bias=torch.ones(3, 64).int()), TypeError, "int32", "needs float32", "cast"),
        "rebased-operand": (
            lambda: mk.grouped_gemm_rebased((x, x[:, 0]), rebased, tiles),
            *(ValueError, "is torch.float32", "needs float8_e4m3fn", "pass what rebase_rows returns"),
        ),
        "experts-dtype": (lambda: experts(x.int(), routing), TypeError, "int32", "needs", "float32"),
        "experts-shape": (lambda: experts(x[:, :32], routing), ValueError, r"\(4, 32\)", r"needs \[T, 64\]", "flatten"),
        "experts-stride": (lambda: experts(columns, routing), ValueError, "stride 4", "needs 1", "contiguous"),
        "experts-device": (lambda: experts(x.to("meta"), routing), ValueError, "x is on meta", "on cpu", "move all"),
        "experts-ids": (
            lambda: experts(x, mm.Routing(ids + 3, routing.weights)),
            *(ValueError, r"ids\[0, 1\] is 4", "there are 3 experts", "use 0 to 2"),
        ),
        "model-k": (
            lambda: mq.quantize_model(torch.nn.Sequential(torch.nn.Linear(40, 8)), mk.MXFP8),
            *(ValueError, "in_features of 0 is 40", "multiple of .* 32", "pad K to 64 .* skip them by name"),
        ),
        "method-k": (
            lambda: mq.Mxfp4MoEMethod().create_weights(torch.nn.Module(), 4, 64, 40),
            *(ValueError, "intermediate_size is 40", "multiple of .* 32", "pad K to 64"),
        ),
        "layer-type": (
            lambda: mq.MxLinear.from_linear(w[0], mk.MXFP8),
            *(TypeError, "is a Tensor", "needs an nn.Linear", "from_quantized"),
        ),
    }


@pytest.mark.parametrize("case", calls())
def test_call(case):
    call, error, *parts = calls()[case]
    with pytest.raises(error) as caught:
        call()
    assert re.search(".*".join(parts), str(caught.value), re.S), caught.value


def method_layer(method, **missing):
    layer = torch.nn.Module()
    method.create_weights(layer, 2, 64, 64, **missing)
    for name in ("w13_weight_scale", "w2_weight_scale"):
        getattr(layer, name).view(torch.uint8).fill_(0x38)
    for name in ("w13_weight_global_scale", "w2_weight_global_scale"):
        if hasattr(layer, name):
            getattr(layer, name).fill_(1.0)
    return layer


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0])
@pytest.mark.parametrize("name", ["w13_weight_global_scale", "w2_weight_global_scale"])
def test_missing_and_zero_global_scales(name, value):
    method = mq.Nvfp4MoEMethod()
    layer = method_layer(method)
    getattr(layer, name)[1] = value
    need = rf"{name.replace('_weight', '')} is {value}.*needs a positive finite.*missing, zero or damaged"
    with pytest.raises(ValueError, match=need):
        method.process_weights_after_loading(layer)
    assert not layer.mx_processed


def test_missing_block_scales():
    method = mq.Mxfp8MoEMethod()
    layer = method_layer(method)
    layer.w2_weight_scale.view(torch.uint8)[1, 3, 1] = 0xFF
    with pytest.raises(ValueError, match=r"w2_scale is NaN in 1 of 256 blocks.*\(1, 3, 1\).*not loaded, or .* damaged"):
        method.process_weights_after_loading(layer)


def test_weights_that_were_never_loaded():
    method, layer = mq.Mxfp8OnlineLinearMethod(), torch.nn.Module()
    method.create_weights(layer, 64, 64)
    with pytest.raises(ValueError, match=r"weight is not finite: 4096 of 4096 values.*load it"):
        method.process_weights_after_loading(layer)


@pytest.fixture
def folder(tmp_path):
    """A source of two shards with an index, to be damaged."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 64}))
    names = {NAME: "model-00001-of-00002.safetensors", NAME.replace("down", "up"): "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.randn(64, 64).bfloat16()}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return source


def truncate(source):
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def foreign(source):
    (source / "model-00002-of-00002.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))


def empty(source):
    (source / "model-00002-of-00002.safetensors").write_bytes(b"")


def missing_shard(source):
    (source / "model-00002-of-00002.safetensors").unlink()


def renamed(source, file):
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][NAME] = file
    index.write_text(json.dumps(found))


def not_finite(source):
    x = torch.randn(64, 64).bfloat16()
    x[3, 5] = math.inf
    save_file({NAME: x}, source / "model-00001-of-00002.safetensors")


def doubles(source):
    for i, name in enumerate((NAME, NAME.replace("down", "up"))):
        save_file({name: torch.ones(64, 64).double()}, source / f"model-0000{i + 1}-of-00002.safetensors")


def integers(source):
    for i, name in enumerate((NAME, NAME.replace("down", "up"))):
        save_file({name: torch.ones(64, 64, dtype=torch.int8)}, source / f"model-0000{i + 1}-of-00002.safetensors")


def not_divisible(source):
    for i, name in enumerate((NAME, NAME.replace("down", "up"))):
        save_file({name: torch.ones(64, 40).bfloat16()}, source / f"model-0000{i + 1}-of-00002.safetensors")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncate, ("outside the", "bytes of data", "download .* again")),
        (foreign, ("claims a header", "not safetensors", "download .* again")),
        (empty, ("0 bytes", "needs at least 8", "download .* again")),
        (missing_shard, ("model-00002-of-00002.safetensors", "is missing", "download it again")),
        (lambda s: renamed(s, "../other/model.safetensors"), ("names the file", "needs the plain name", "same folder")),
        (lambda s: renamed(s, "/model.safetensors"), ("names the file", "needs the plain name", "same folder")),
        (
            lambda s: renamed(s, "model-00002-of-00002.safetensors"),
            ("the index says", "does not hold", "download both"),
        ),
        (not_finite, (f"{NAME} is not finite", r"inf at index \(3, 5\)", "repair the source, or exclude")),
        (doubles, ("no weight is left", "float64", "needs bfloat16")),
        (integers, ("no weight is left", "int8", "needs bfloat16")),
        (not_divisible, ("no weight is left", r"\[64, 40\]", "multiple of .* 32")),
    ],
    ids=[
        "truncated",
        "foreign",
        "empty",
        "missing",
        "outside",
        "absolute",
        "elsewhere",
        "inf",
        "dtype",
        "integers",
        "k",
    ],
)
def test_checkpoints(folder, damage, parts):
    damage(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    out = folder.parent / "out"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        mq.quantize_checkpoint(folder, out, mk.MXFP8)
    assert re.search(".*".join(parts), str(caught.value), re.S), caught.value
    assert not out.exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    if damage is not not_finite:  # found while weights stream: what was done stays beside, for a look or a new run
        assert [p.name for p in folder.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("damage", [truncate, foreign, missing_shard])
def test_damaged_checkpoints_leave_a_model_alone(folder, damage):
    damage(folder)
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.model.layers[0].mlp = torch.nn.ModuleDict(
        {f"{p}_proj": torch.nn.Linear(64, 64, bias=False) for p in ("up", "down")}
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="download"):
        mq.load_online(model, folder, mk.MXFP8)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
