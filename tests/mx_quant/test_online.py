from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import mx_kernels as mk
import mx_quant as mq
from mx_quant.shards import ShardReader

E, H, I = 3, 64, 32


class Experts(nn.Module):
    """Fused experts as transformers 5 has them; ``oss`` transposed, interleaved and with biases."""

    def __init__(self, oss=False):
        super().__init__()
        self.is_transposed, self.is_concatenated = oss, not oss
        self.gate_up_proj = nn.Parameter(torch.randn(E, H, 2 * I) if oss else torch.randn(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.randn(E, I, H) if oss else torch.randn(E, H, I))
        if oss:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * I))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H))


class Block(nn.Module):
    def __init__(self, oss=False):
        super().__init__()
        self.q_proj = nn.Linear(H, H)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = Experts(oss)
        self.norm = nn.LayerNorm(H)


class Model(nn.Module):
    """An embedding, two blocks and a head: everything that a plan has to tell apart."""

    def __init__(self, oss=False):
        super().__init__()
        self.embed = nn.Embedding(10, H)
        self.layers = nn.ModuleList([Block(oss), Block(oss)])
        self.lm_head = nn.Linear(H, 10, bias=False)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


class Dense(nn.Module):
    def __init__(self, k=H):
        super().__init__()
        self.one = nn.Linear(k, 32)
        self.two = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Held(nn.Module):
    """What a factory of experts returns: it holds the weights it was given."""

    def __init__(self, name, weights):
        super().__init__()
        self.name, self.weights = name, weights


def held(name, module, weights):
    return Held(name, weights)


def same(a, b) -> bool:
    x, y = dict(a.named_tensors()), dict(b.named_tensors())
    return x.keys() == y.keys() and all(
        torch.equal(x[n].reshape(-1).view(torch.uint8), y[n].reshape(-1).view(torch.uint8)) for n in x
    )


def same_weight(a, b) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(
        a.scale.view(torch.uint8), b.scale.view(torch.uint8)
    )


def canonical(m: Experts):
    """Independent of the code under test: transpose, then pick even and odd rows."""
    w13, w2, b13, b2 = m.gate_up_proj.detach(), m.down_proj.detach(), None, None
    if m.is_transposed:
        w13, w2 = w13.permute(0, 2, 1), w2.permute(0, 2, 1)
        w13 = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1).contiguous()
        b13 = m.gate_up_proj_bias.detach()
        b13, b2 = torch.cat((b13[:, 0::2], b13[:, 1::2]), 1), m.down_proj_bias.detach()
    return w13, w2.contiguous(), b13, b2


def expected_experts(m: Experts, format):
    w13, w2, b13, b2 = canonical(m)
    return mq.ExpertWeights(mk.quantize(w13, format), mk.quantize(w2, format), b13, b2)


# --- quantize_model ---


@pytest.mark.parametrize("format", mk.FORMATS)
def test_dense_model(format):
    model = Dense().bfloat16()
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    coverage = mq.quantize_model(model, format)
    assert isinstance(model.one, mq.MxLinear)
    for name in ("one", "two"):
        assert same_weight(model.get_submodule(name).quantized, mk.quantize(w[f"{name}.weight"], format))
    x = torch.randn(3, H).bfloat16()
    one = mk.gemm(x, mk.quantize(w["one.weight"], format), epilogue=mk.Epilogue(bias=w["one.bias"]))
    assert torch.equal(model(x), mk.gemm(torch.relu(one), mk.quantize(w["two.weight"], format)))
    assert coverage.percent == pytest.approx(100 * (H * 32 + 32 * 32) / (H * 32 + 32 * 32 + 32))
    assert coverage.expert_percent is None
    assert model.mx_coverage is coverage


@pytest.mark.parametrize("oss", [False, True])
@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_fused_experts_are_quantized_not_skipped(format, oss):
    model = Model(oss).bfloat16()
    want = [expected_experts(b.experts, format) for b in model.layers]
    coverage = mq.quantize_model(model, format, experts=held)
    for n, block in enumerate(model.layers):
        assert block.experts.name == f"layers.{n}.experts"
        assert same(block.experts.weights, want[n])
        assert isinstance(block.q_proj, mq.MxLinear)
        assert type(block.gate) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert coverage.expert_percent == 100
    rows = {r.name: r for r in coverage.rows}
    assert rows["layers.0.experts.gate_up_proj"] == mq.Covered(
        "layers.0.experts.gate_up_proj", E * 2 * I * H, mk.get_format(format).name, "", True
    )
    assert rows["lm_head.weight"].reason == "skipped by 'lm_head'"
    assert rows["layers.1.gate.weight"].reason == "skipped by '*.gate'"
    assert rows["embed.weight"].reason == "Embedding is neither an nn.Linear nor experts of a known form"
    assert coverage.numel == sum(p.numel() for p in Model(oss).parameters())
    d = json.loads(json.dumps(coverage.to_dict()))
    assert d["quantized"] == coverage.quantized == 2 * (H * H + E * 3 * I * H)
    assert "100.0% of expert weights" in str(coverage)
    assert f"{coverage.percent:.1f}% quantized" in coverage.to_markdown()


def test_the_scheme_reaches_layers_and_experts():
    model = Model().bfloat16()
    mq.quantize_model(model, mq.Scheme("mxfp4", "mxfp8", "floor"), experts=held)
    assert model.layers[0].q_proj.scheme == mq.Scheme("mxfp4", "mxfp8", "floor")
    assert model.layers[0].experts.weights.input_format is mk.MXFP8
    assert model.layers[0].experts.weights.w13.rule is mk.ScaleRule.FLOOR


def test_each_source_is_released_before_the_next_is_quantized(monkeypatch):
    model = Model().bfloat16()
    names = [f"layers.{n}.{p}" for n in range(2) for p in ("q_proj", "experts")]
    alive = {n: weakref.ref(next(iter(model.get_submodule(n).parameters()))) for n in names}
    seen = []
    real = mk.quantize

    def spy(x, *args, **kwargs):
        seen.append(sum(r() is not None for r in alive.values()))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(mk, "quantize", spy)
    mq.quantize_model(model, "mxfp4", experts=held)
    assert sorted(set(seen), reverse=True) == [4, 3, 2, 1]
    assert [r() for r in alive.values()] == [None] * 4


def test_include_and_skip():
    model = Dense().bfloat16()
    coverage = mq.quantize_model(model, "mxfp4", include=("two",))
    assert type(model.one) is nn.Linear
    assert isinstance(model.two, mq.MxLinear)
    assert {r.name: r.reason for r in coverage.rows}["one.weight"] == "not in include"
    again = mq.quantize_model(model, "mxfp8", include=("o*",), skip=())
    assert model.two.scheme.weight is mk.MXFP4
    assert {r.name: r.format for r in again.rows} == {"one.weight": "mxfp8_e4m3", "two.weight": "mxfp4"}
    with pytest.raises(ValueError, match="include 'thre' matches no module of Dense"):
        mq.quantize_model(Dense(), "mxfp4", include=("two", "thre"))
    with pytest.raises(ValueError, match="Dense has no weight to quantize"):
        mq.quantize_model(Dense(), "mxfp4", skip=("*",))
    with pytest.raises(TypeError, match="sequences of patterns"):
        mq.quantize_model(Dense(), "mxfp4", skip="two")


def unchanged(model, error, match, **kwargs):
    """The call raises, and every parameter is still the one it was."""
    before = dict(model.named_parameters())
    with pytest.raises(error, match=match):
        mq.quantize_model(model, kwargs.pop("scheme", "mxfp8"), **kwargs)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}


def test_experts_without_a_factory_fail_unless_skipped_by_name():
    model = Model()
    unchanged(model, ValueError, r"4 expert weights \(78% of all parameters\) would stay .* name them in skip")
    coverage = mq.quantize_model(model, "mxfp8", skip=("lm_head", "*.gate", "*.experts"))
    assert coverage.expert_percent == 0
    assert {r.name: r.reason for r in coverage.rows}["layers.1.experts.down_proj"] == "skipped by '*.experts'"


def test_experts_outside_include_or_of_an_unknown_form_fail():
    unchanged(Model(), ValueError, "4 expert weights .*not in include", include=("*.q_proj",), experts=held)
    model = Model()
    model.layers[1].experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I + 2, H))
    unchanged(model, ValueError, r"gate_up_proj \(3, 66, 64\) and down_proj \(3, 64, 32\) are not", experts=held)
    model.layers[1].experts = nn.Module()
    model.layers[1].experts.w1 = nn.Parameter(torch.randn(E, I, H))
    unchanged(model, ValueError, "w1: Module is neither an nn.Linear nor experts of a known form", experts=held)
    separate = Model()
    separate.layers[0].experts.gate_proj = nn.Parameter(torch.randn(E, I, H))
    unchanged(separate, ValueError, "neither an nn.Linear nor experts of a known form", experts=held)


def test_convolutions_and_embeddings_are_not_experts():
    model = Dense()
    model.conv = nn.Conv1d(4, 4, 3)
    model.positions = nn.Parameter(torch.zeros(1, 8, 4))
    coverage = mq.quantize_model(model, "mxfp8")
    experts = {r.name: r.expert for r in coverage.rows}
    assert experts["conv.weight"] is experts["positions"] is False


def test_all_that_does_not_fit_is_named_before_anything_is_replaced():
    model = Dense(40)
    unchanged(
        model, ValueError, "1 weights cannot be quantized .*in_features of one is 40, but mxfp8_e4m3 needs .* skip them"
    )
    model = Model()
    model.layers[0].experts.gate_up_proj = nn.Parameter(torch.randn(E, 80, H))
    model.layers[0].experts.down_proj = nn.Parameter(torch.randn(E, H, 40))
    unchanged(model, ValueError, r"layers\.0\.experts: intermediate_size is 40", experts=held)
    unchanged(Dense().double(), TypeError, r"one\.weight is torch\.float64")
    unchanged(Dense().to("meta"), ValueError, "on the meta device and has no values: use load_online")
    model = Dense()
    with torch.no_grad():
        model.two.weight[1, 2] = math.inf
    unchanged(model, ValueError, r"two\.weight is not finite.*\(1, 2\)")
    model = Model()
    with torch.no_grad():
        model.layers[1].experts.down_proj[2, 1, 0] = math.nan
    unchanged(model, ValueError, r"layers\.1\.experts\.down_proj is not finite.*\(2, 1, 0\)", experts=held)
    unchanged(nn.Linear(32, 32), ValueError, "use MxLinear.from_linear")


def test_tied_weights_and_hooks_are_refused():
    model = Model()
    model.lm_head.weight = model.embed.weight
    unchanged(model, ValueError, r"lm_head\.weight is shared with embed\.weight", skip=("*.gate",), experts=held)
    coverage = mq.quantize_model(model, "mxfp8", experts=held)
    assert coverage.numel == sum(p.numel() for p in Model().parameters()) - 10 * H
    model = Dense()
    model.one.register_forward_hook(lambda *args: None)
    unchanged(model, ValueError, "one has forward hooks")


def test_a_module_under_two_names_is_replaced_once():
    model = Dense()
    model.three = model.two
    mq.quantize_model(model.eval(), "mxfp8")
    assert isinstance(model.three, mq.MxLinear)
    assert model.three is model.two
    assert not model.three.training


def test_subclasses_of_linear_are_left_with_a_reason():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(32, 2)
    model.linear = nn.Linear(32, 32)
    coverage = mq.quantize_model(model, "mxfp8")
    reasons = {r.name: r.reason for r in coverage.rows}
    assert "subclass of nn.Linear" in reasons["attention.out_proj.weight"]
    assert reasons["linear.weight"] == ""


def test_a_factory_that_refuses_leaves_the_model_as_it_was():
    def refuses(name, module, weights):
        raise mk.Unsupported(f"no backend for {name}")

    unchanged(Model(), mk.Unsupported, r"no backend for layers\.0\.experts", experts=refuses)


def test_factories_are_checked():
    with pytest.raises(TypeError, match=r"returned function for layers\.0\.experts, needs an nn\.Module"):
        mq.quantize_model(Model(), "mxfp8", experts=lambda n, m, w: lambda x: x)
    with pytest.raises(ValueError, match="still has gate_up_proj, down_proj in full precision"):
        mq.quantize_model(Model(), "mxfp8", experts=lambda n, m, w: m)


# --- load_online ---


def empty(cls=Model, *args):
    with mq.meta_parameters():
        return cls(*args)


def write(folder, state):
    """Two shards with an index, names in turn, so that modules cross files."""
    names = sorted(state)
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].contiguous() for n in names if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def apart(state):
    """Fused experts one by one, as Qwen3-MoE has them on disk."""
    out = {}
    for name, t in state.items():
        module, _, last = name.rpartition(".")
        for e in range(E) if last in ("gate_up_proj", "down_proj") else ():
            if last == "down_proj":
                out[f"{module}.{e}.down_proj.weight"] = t[e]
            else:
                out[f"{module}.{e}.gate_proj.weight"], out[f"{module}.{e}.up_proj.weight"] = t[e, :I], t[e, I:]
        if last not in ("gate_up_proj", "down_proj"):
            out[name] = t
    return out


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


class Runs(nn.Module):
    """Runs dequantized experts one after another with the source's own gate: an independent forward."""

    def __init__(self, module, weights):
        super().__init__()
        self.gate, self.woven, self.weights = module._apply_gate, not module.is_concatenated, weights

    def forward(self, x, ids, scores):
        w, out = self.weights, torch.zeros_like(x)
        w13, w2 = mk.dequantize(w.w13), mk.dequantize(w.w2)
        for e in range(w.num_experts):
            t, slot = (ids == e).nonzero(as_tuple=True)
            h = nn.functional.linear(x[t], w13[e], None if w.w13_bias is None else w.w13_bias[e])
            h = nn.functional.linear(
                self.gate(mq.interleave(h, 1) if self.woven else h), w2[e], None if w.w2_bias is None else w.w2_bias[e]
            )
            out.index_add_(0, t, (h * scores[t, slot, None]).to(x.dtype))
        return out


def runs(name, module, weights):
    return Runs(module, weights)


def tiny(family):
    """The configuration of a small model of each family."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": family == "qwen3_tied", "dtype": "bfloat16",
    }  # fmt: skip
    if family == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **common | {"num_hidden_layers": 3, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4,
            n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
            kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
    common |= {} if family == "olmoe" else {"head_dim": 16}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    qwen = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "gpt_oss": lambda: transformers.GptOssConfig(**common | {"intermediate_size": 96}, **local, sliding_window=8),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**common, **qwen),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**common, **qwen, shared_expert_intermediate_size=64),
        "mixtral": lambda: transformers.MixtralConfig(**common, **local),
        "minimax_m2": lambda: transformers.MiniMaxM2Config(
            **common, **local, rotary_dim=16, bos_token_id=1, eos_token_id=2
        ),
        "olmoe": lambda: transformers.OlmoeConfig(**common, num_experts=4, num_experts_per_tok=2, eos_token_id=2),
        "qwen3": lambda: transformers.Qwen3Config(**common),
        "qwen3_tied": lambda: transformers.Qwen3Config(**common),
    }[family]()


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
