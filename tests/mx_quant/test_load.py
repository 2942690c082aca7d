"""``load_online`` and the Loader behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from toy_models import Dense, H, I, Model, apart, empty, expected_experts, held, runs, same, same_weight, tiny, write

import mx_kernels as mk
import mx_quant as mq
from mx_quant.shards import ShardReader


def test_meta_parameters_leave_buffers_their_values():
    model = empty()
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model.frequencies, torch.arange(4.0))
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("format", ["mxfp8", "mxfp6", "nvfp4"])
@pytest.mark.parametrize("form", ["fused", "apart", "oss"])
def test_load_online_is_quantize_model(format, form, tmp_path):
    """Bit for bit, from fused experts, from single ones, and from transposed and interleaved ones with biases."""
    source = Model(form == "oss").bfloat16()
    state = source.state_dict()
    write(tmp_path, apart(state) if form == "apart" else state)
    model = empty(Model, form == "oss").bfloat16()
    assert mq.load_online(model, tmp_path, format, experts=held) is model
    coverage = mq.quantize_model(source, format, experts=held)
    assert model.mx_coverage == coverage
    assert model.state_dict().keys() == source.state_dict().keys()
    for name, t in source.state_dict().items():
        got = model.state_dict()[name]
        assert got.dtype == t.dtype
        assert torch.equal(got.reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), name
    for a, b in zip(model.layers, source.layers, strict=True):
        assert same(a.experts.weights, b.experts.weights)
    assert model.embed.weight.requires_grad


@pytest.mark.parametrize("form", ["fused", "apart", "oss"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_never_two_weights_in_full_precision(form, format, tmp_path, monkeypatch):
    """When a tensor is read, the storage of every weight read before it is gone, unless the model keeps it as it is."""
    source = Model(form == "oss").bfloat16()
    write(tmp_path, apart(source.state_dict()) if form == "apart" else source.state_dict())
    live: list[tuple[str, StorageWeakRef]] = []
    peak = [0]
    real = ShardReader.read

    def read(self, name, rows=None):
        kept = ("embed", "lm_head", "norm", "bias", "gate.weight")
        assert [n for n, r in live if not r.expired() and not any(k in n for k in kept)] == []
        t = real(self, name, rows)
        live.append((name, StorageWeakRef(t.untyped_storage())))
        peak[0] = max(peak[0], 0 if any(k in name for k in kept) else t.nbytes)
        return t

    monkeypatch.setattr(ShardReader, "read", read)
    model = mq.load_online(empty(Model, form == "oss").bfloat16(), tmp_path, format, experts=held)
    assert all(b.experts.weights.format is mk.get_format(format) for b in model.layers)
    assert len(live) >= 14
    assert peak[0] == 2 * (H * H if form == "apart" else 2 * I * H)  # q_proj, or one expert of gate_up_proj


def test_skipped_experts_are_fused_in_full_precision(tmp_path):
    source = Model().bfloat16()
    write(tmp_path, apart(source.state_dict()))
    model = empty().bfloat16()
    mq.load_online(model, tmp_path, "mxfp8", skip=("lm_head", "*.gate", "*.experts"))
    for name in ("layers.0.experts.gate_up_proj", "layers.1.experts.down_proj"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert model.mx_coverage.expert_percent == 0


def test_names_that_differ(tmp_path):
    source = Model().bfloat16()
    state = {n.replace("layers.", "model.blocks."): t for n, t in apart(source.state_dict()).items()}
    write(tmp_path, state | {"draft.weight": torch.zeros(2, 2)})
    with pytest.raises(
        ValueError, match=r"does not have 14 tensors that Model needs: .*rename maps.*it has 29 tensors"
    ):
        mq.load_online(empty(), tmp_path, "mxfp8", experts=held)
    model = mq.load_online(
        empty().bfloat16(),
        tmp_path,
        "mxfp8",
        experts=held,
        ignore=("draft.*",),
        rename=lambda n: n.replace("model.blocks.", "layers."),
    )
    assert same(model.layers[1].experts.weights, expected_experts(source.layers[1].experts, "mxfp8"))


def test_tied_tensors_come_from_either_name(tmp_path):
    source = Model().bfloat16()
    state = source.state_dict()
    state["lm_head.weight"] = state["embed.weight"]

    def tied():
        model = empty().bfloat16()
        model.lm_head.weight = model.embed.weight
        return model

    for drop in ("lm_head.weight", "embed.weight", None):
        write(tmp_path, {n: t.clone() for n, t in state.items() if n != drop})
        model = mq.load_online(tied(), tmp_path, "mxfp8", experts=held)
        assert model.lm_head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, source.embed.weight)
    write(tmp_path, state | {"lm_head.weight": torch.zeros(10, H).bfloat16()})
    with pytest.raises(ValueError, match="are one tensor in the model but differ in the checkpoint"):
        mq.load_online(tied(), tmp_path, "mxfp8", experts=held)


def test_what_is_kept_takes_the_dtype_of_the_model(tmp_path):
    source = Dense()
    write(tmp_path, source.state_dict())
    model = mq.load_online(empty(Dense).half(), tmp_path, "mxfp8")
    assert model.one.bias.dtype == torch.float16
    assert same_weight(model.one.quantized, mk.quantize(source.one.weight.detach(), "mxfp8"))


def refused(tmp_path, state, error, match, model=None, **kwargs):
    """The call raises and the model is as it was."""
    write(tmp_path, state)
    model = empty() if model is None else model
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        mq.load_online(model, tmp_path, "mxfp8", experts=held, **kwargs)
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_missing_and_unexpected(tmp_path):
    state = Model().bfloat16().state_dict()
    less = {n: t for n, t in state.items() if n != "layers.1.q_proj.bias"}
    refused(tmp_path, less, ValueError, r"does not have 1 tensors that Model needs: layers\.1\.q_proj\.bias")
    refused(tmp_path, state | {"more": torch.zeros(1)}, ValueError, "has 1 tensors that Model does not: more .*ignore")
    single = apart(state)
    less = {n: t for n, t in single.items() if n != "layers.0.experts.2.up_proj.weight"}
    refused(tmp_path, less, ValueError, r"1 tensors that Model needs: layers\.0\.experts\.2\.up")
    more = single | {"layers.0.experts.3.up_proj.weight": single["layers.0.experts.2.up_proj.weight"]}
    refused(tmp_path, more, ValueError, r"1 tensors that Model does not: layers\.0\.experts\.3\.up_proj")
    less = {n: t for n, t in state.items() if n != "layers.0.experts.down_proj"}
    refused(tmp_path, less, ValueError, r"1 tensors that Model needs: layers\.0\.experts\.down_proj")


def test_contradictory_experts(tmp_path):
    state = Model().bfloat16().state_dict()
    single = apart(state)
    name = "layers.0.experts.down_proj"
    refused(
        tmp_path,
        single | {name: state[name].clone()},
        ValueError,
        rf"holds {name} both whole and as .*experts\.\d\.down_proj",
    )
    name = "layers.0.experts.1.down_proj.weight"
    refused(
        tmp_path,
        single | {name.replace("down_proj", "w2"): single[name]},
        ValueError,
        "one weight twice, as .* and as ",
    )
    both = {"layers.0.experts.1.gate_up_proj.weight": torch.zeros(2 * I, H)}
    refused(tmp_path, single | both, ValueError, r"one weight twice, as .*gate_up_proj\.weight and as ")
    bias = {"layers.0.experts.1.down_proj.bias": torch.zeros(H)}
    refused(
        tmp_path, single | bias, ValueError, r"1 tensors that Model does not: layers\.0\.experts\.1\.down_proj\.bias"
    )


def test_shapes_and_dtypes(tmp_path):
    state = Model().bfloat16().state_dict()
    name = "layers.0.q_proj.weight"
    refused(
        tmp_path,
        state | {name: torch.zeros(H, 32)},
        ValueError,
        r"q_proj\.weight has shape \(64, 32\) in the checkpoint",
    )
    refused(
        tmp_path,
        state | {name: torch.zeros(H, H, dtype=torch.uint8)},
        TypeError,
        r"uint8.*quantized already: read it with",
    )
    refused(tmp_path, state | {name: torch.zeros(H, H, dtype=torch.float64)}, TypeError, "float64, needs bfloat16")
    wrong = apart(state)
    wrong["layers.0.experts.1.down_proj.weight"] = torch.zeros(I, H)
    refused(tmp_path, wrong, ValueError, r"experts\.1\.down_proj\.weight has shape \(32, 64\) .* needs \(64, 32\)")
    model = empty(Dense)
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    dense = Dense().state_dict() | {"count": torch.zeros(())}
    refused(tmp_path, dense, TypeError, r"count is torch\.float32 in the checkpoint, needs torch\.int64", model)


def test_experts_and_buffers_are_checked_first(tmp_path):
    state = Model().bfloat16().state_dict()
    write(tmp_path, state)
    with pytest.raises(ValueError, match=r"4 expert weights .* would stay in full precision"):
        mq.load_online(empty(), tmp_path, "mxfp8")
    with torch.device("meta"):
        model = Model()
    refused(
        tmp_path, state, ValueError, r"1 buffers are on the meta device .* frequencies: .*meta_parameters\(\)", model
    )


def test_not_finite_names_the_tensor_on_disk(tmp_path):
    state = Model().bfloat16().state_dict()
    state["layers.1.experts.down_proj"][2, 5, 7] = math.nan
    write(tmp_path, state)
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.down_proj\[2\] is not finite.*\(5, 7\)"):
        mq.load_online(empty(), tmp_path, "mxfp8", experts=held)


# --- transformers ---

FAMILIES = ("gpt_oss", "qwen3_moe", "qwen2_moe", "mixtral", "minimax_m2", "olmoe", "deepseek_v3", "qwen3", "qwen3_tied")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_checkpoints(family, tmp_path):
    """From a checkpoint that transformers wrote: bit for bit the model that transformers reads, quantized in memory."""
    transformers = pytest.importorskip("transformers")
    auto, config = transformers.AutoModelForCausalLM, tiny(family)
    auto.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with mq.meta_parameters():
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
    mq.load_online(model, tmp_path, "mxfp4", experts=runs)
    want = auto.from_pretrained(tmp_path, experts_implementation="eager").eval()
    coverage = mq.quantize_model(want, "mxfp4", experts=runs)
    assert (
        coverage.expert_percent
        == model.mx_coverage.expert_percent
        == (None if family in ("qwen3", "qwen3_tied") else 100)
    )
    assert coverage.numel == model.mx_coverage.numel
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    ids = torch.arange(24).view(2, 12) % 128
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want(ids).logits)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral", "qwen3"])
def test_quantized_models_equal_dequantized_weights_in_transformers(family, tmp_path):
    """Against transformers' own forward with every weight quantized and dequantized: an independent path."""
    transformers = pytest.importorskip("transformers")
    auto, config = transformers.AutoModelForCausalLM, tiny(family)
    auto.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model, want = (auto.from_pretrained(tmp_path, experts_implementation="eager").eval() for _ in range(2))
    mq.quantize_model(model, "mxfp4", experts=runs)
    ids = torch.arange(24).view(2, 12) % 128
    with torch.no_grad():
        exact = want(ids).logits.float()
        for name, module in want.named_modules():
            if type(module) is nn.Linear and name != "lm_head":
                module.weight.copy_(mk.quantize_dequantize(module.weight, "mxfp4"))
            for p in ("gate_up_proj", "down_proj"):
                if isinstance(w := getattr(module, p, None), nn.Parameter) and w.ndim == 3:
                    t = w.transpose(1, 2) if family == "gpt_oss" else w
                    t = mk.quantize_dequantize(t.contiguous(), "mxfp4")
                    w.copy_(t.transpose(1, 2) if family == "gpt_oss" else t)
        got, expected = model(ids).logits.float(), want(ids).logits.float()
    # MXFP4 values are exact in bf16, so only the order of sums may differ (measured: 0); MXFP4 itself moves logits by 10 to 16%
    assert (got - expected).norm() < 0.003 * expected.norm()
    assert (exact - expected).norm() > 0.05 * expected.norm()


def test_with_the_experts_of_mx_moe(tmp_path):
    """The factory of docs/adding.md, in memory, while loading and from a quantized checkpoint: one and the same model."""
    transformers = pytest.importorskip("transformers")
    mm = pytest.importorskip("mx_moe")
    integration = pytest.importorskip("mx_moe.integrations.transformers")

    def experts(name, module, weights):
        integration.attach(module, mm.make_experts(weights, integration.experts_activation(module)))
        return module

    config = tiny("gpt_oss")
    source = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    source.save_pretrained(tmp_path / "src")
    mq.quantize_checkpoint(tmp_path / "src", tmp_path / "out", "mxfp4", layout="gpt-oss", jobs=1)
    models = []
    for load, folder in ((mq.load_online, "src"), (mq.load_quantized, "out")):
        with mq.meta_parameters():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        more = {"scheme": "mxfp4", "skip": ("lm_head", "*.router", "*_proj")} if load is mq.load_online else {}
        models.append(load(model, tmp_path / folder, experts=experts, **more))
    coverage = mq.quantize_model(source, "mxfp4", skip=("lm_head", "*.router", "*_proj"), experts=experts)
    assert coverage.expert_percent == models[1].mx_coverage.expert_percent == 100
    ids = torch.arange(24).view(2, 12) % 128
    with torch.no_grad():
        want = source(ids).logits
        assert torch.isfinite(want).all()
        for model in models:
            assert torch.equal(model(ids).logits, want)
