from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mx_kernels as mk
import mx_quant as mq

SILU = mk.Activation("silu")
ONLINE = {
    mq.Mxfp8OnlineMoEMethod: mk.MXFP8,
    mq.Mxfp6OnlineMoEMethod: mk.MXFP6_E2M3,
    mq.Mxfp4OnlineMoEMethod: mk.MXFP4,
    mq.Nvfp4OnlineMoEMethod: mk.NVFP4,
}
OFFLINE = {mq.Mxfp4MoEMethod: mk.MXFP4, mq.Mxfp8MoEMethod: mk.MXFP8, mq.Nvfp4MoEMethod: mk.NVFP4}
E, H, I = 3, 96, 32  # H is no multiple of a tile: padding would show


def same(a, b) -> bool:
    """Bit-equal weights: every tensor of both."""
    x, y = dict(a.named_tensors()), dict(b.named_tensors())
    return x.keys() == y.keys() and all(
        x[n].shape == y[n].shape and torch.equal(x[n].reshape(-1).view(torch.uint8), y[n].reshape(-1).view(torch.uint8))
        for n in x
    )


def sources(gated=True):
    n = 2 * I if gated else I
    return {
        "w13_weight": torch.randn(E, n, H).bfloat16(),
        "w2_weight": torch.randn(E, H, I).bfloat16(),
        "w13_bias": torch.randn(E, n).bfloat16(),
        "w2_bias": torch.randn(E, H).bfloat16(),
    }


def expected(s, scheme):
    return mq.quantize_experts(s["w13_weight"], s["w2_weight"], scheme, w13_bias=s["w13_bias"], w2_bias=s["w2_bias"])


class Factory:
    """A stand-in for ``mx_moe.make_experts`` that remembers what it was given and packs nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, weights, activation, *, expert_map=None):
        self.calls.append((activation, expert_map))
        self.weights = weights
        return self.run

    def run(self, x, routing):
        return x * routing


# --- online ---


@pytest.mark.parametrize("cls", ONLINE)
@pytest.mark.parametrize("gated", [True, False])
def test_online(cls, gated):
    """Loading, processing twice, the canonical unswizzled result, and the source released."""
    method, layer, s = cls(), nn.Module(), sources(gated)
    method.create_weights(layer, E, H, I, gated=gated, bias=True)
    layer.load_state_dict(s)
    loaded = [weakref.ref(layer.w13_weight), weakref.ref(layer.w2_weight)]
    method.process_weights_after_loading(layer)
    assert [r() for r in loaded] == [None, None]
    f = ONLINE[cls]
    assert layer.w13_weight.dtype == f.data_dtype
    assert layer.w13_weight_scale.shape == (E, s["w13_weight"].shape[1], H // f.block)
    assert layer.w2_weight_scale.shape == (E, H, I // f.block)
    assert layer.w13_input_scale is None
    assert layer.w2_input_scale is None
    weights = method.weights(layer)
    assert same(weights, expected(s, f))
    pointers = [t.data_ptr() for _, t in weights.named_tensors()]
    method.process_weights_after_loading(layer)
    assert pointers == [t.data_ptr() for _, t in method.weights(layer).named_tensors()]
    assert same(method.weights(layer), expected(s, f))


def test_online_interleaved_source():
    method, layer, s = mq.Mxfp8OnlineMoEMethod(row_layout="interleaved"), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    layer.load_state_dict(s | {n: mq.interleave(s[n], 1) for n in ("w13_weight", "w13_bias")})
    method.process_weights_after_loading(layer)
    assert same(method.weights(layer), expected(s, mk.MXFP8))


@pytest.mark.parametrize("row_layout", ["concatenated", "interleaved"])
def test_online_on_meta_quantizes_as_experts_come(row_layout):
    method, layer, s = mq.Nvfp4OnlineMoEMethod(row_layout=row_layout), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True, device="meta")
    assert layer.w13_weight.is_meta
    woven = s | {n: mq.interleave(s[n], 1) for n in ("w13_weight", "w13_bias")} if row_layout == "interleaved" else s
    layer.w13_bias.data.copy_(woven["w13_bias"])
    layer.w2_bias.data.copy_(s["w2_bias"])
    for e in range(E):
        method.load_expert(layer, e, "gate_up", woven["w13_weight"][e])
        if e == 2:
            with pytest.raises(ValueError, match="1 matrices are missing, the first is 'down' of expert 2"):
                method.process_weights_after_loading(layer)
        method.load_expert(layer, e, "down", s["w2_weight"][e])
    method.process_weights_after_loading(layer)
    assert same(method.weights(layer), expected(s, mk.NVFP4))
    with pytest.raises(RuntimeError, match="not processed yet"):
        method.load_expert(layer, 0, "down", s["w2_weight"][0])


def test_online_refuses_what_was_not_loaded_and_stays_as_it_was():
    method, layer, s = mq.Mxfp8OnlineMoEMethod(), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    with pytest.raises(RuntimeError, match="not ready"):
        method.weights(layer)
    with pytest.raises(ValueError, match="w13_bias is not finite"):
        method.process_weights_after_loading(layer)
    layer.load_state_dict({k: v for k, v in s.items() if k != "w2_weight"}, strict=False)
    with pytest.raises(ValueError, match=r"experts\.w2\[0\] is not finite"):
        method.process_weights_after_loading(layer)
    assert torch.equal(layer.w13_weight, s["w13_weight"])
    layer.load_state_dict(s)
    method.process_weights_after_loading(layer)
    assert same(method.weights(layer), expected(s, mk.MXFP8))


def test_fused_shared_experts_are_rows():
    method, layer = mq.Mxfp8OnlineMoEMethod(), nn.Module()
    method.create_weights(layer, E - 1, H, I, bias=True, fused_shared_experts=1)
    s = sources()
    layer.load_state_dict(s)
    method.process_weights_after_loading(layer)
    assert method.weights(layer).num_experts == E


# --- offline ---


def offline_state(s, scheme, woven):
    """What an offline layer loads, from an independent route: quantize the rows in the order of the file."""
    rows = {n: mq.interleave(s[n], 1) if woven else s[n] for n in ("w13_weight", "w13_bias")}
    state = {"w13_bias": rows["w13_bias"], "w2_bias": s["w2_bias"]}
    for name, w in (("w13_weight", rows["w13_weight"]), ("w2_weight", s["w2_weight"])):
        q = mk.quantize(w, scheme)
        state |= {name: q.data, name + "_scale": q.scale}
        if q.global_scale is not None:
            state[name + "_global_scale"] = q.global_scale
    return state


@pytest.mark.parametrize("cls", OFFLINE)
def test_offline(cls):
    method, layer, s = cls(), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    if cls is mq.Mxfp4MoEMethod:  # gpt-oss: unpadded uint8 pairs of codes
        assert (layer.w13_weight.dtype, layer.w13_weight.shape) == (torch.uint8, (E, 2 * I, H // 2))
        assert (layer.w2_weight_scale.dtype, layer.w2_weight_scale.shape) == (torch.uint8, (E, H, I // 32))
    layer.load_state_dict({"w13_bias": s["w13_bias"], "w2_bias": s["w2_bias"]}, strict=False)
    with pytest.raises(ValueError, match=r"w13_scale is NaN .* was not loaded"):
        method.process_weights_after_loading(layer)
    layer.load_state_dict(offline_state(s, OFFLINE[cls], cls is mq.Mxfp4MoEMethod))
    method.process_weights_after_loading(layer)
    weights = method.weights(layer)
    assert same(weights, expected(s, OFFLINE[cls]))
    pointers = [t.data_ptr() for _, t in weights.named_tensors()]
    method.process_weights_after_loading(layer)
    assert same(method.weights(layer), expected(s, OFFLINE[cls]))
    assert pointers == [t.data_ptr() for _, t in method.weights(layer).named_tensors()]


def test_gpt_oss_tensors_as_they_are_on_disk(tmp_path):
    """Blocks and scales of a gpt-oss checkpoint, loaded flat, give what the layout's own reader gives."""
    prefix = "model.layers.0.mlp.experts"
    source = {
        f"{prefix}.gate_up_proj": torch.randn(E, H, 2 * I).bfloat16(),
        f"{prefix}.gate_up_proj_bias": torch.randn(E, 2 * I).bfloat16(),
        f"{prefix}.down_proj": torch.randn(E, I, H).bfloat16(),
        f"{prefix}.down_proj_bias": torch.randn(E, H).bfloat16(),
    }
    (tmp_path / "src").mkdir()
    save_file(source, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text('{"model_type": "gpt_oss"}')
    mq.quantize_checkpoint(tmp_path / "src", tmp_path / "out", "mxfp4", layout="gpt-oss", jobs=1)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    disk = {n.removeprefix(prefix + "."): t for n, t in load_file(file).items()}
    assert disk["gate_up_proj_blocks"].shape == (E, 2 * I, H // 32, 16)
    method, layer = mq.Mxfp4MoEMethod(), nn.Module()
    method.create_weights(layer, E, H, I, bias=True)
    state = {}
    for ours, theirs in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        state[f"{ours}_weight"] = disk[f"{theirs}_blocks"].flatten(-2)
        state[f"{ours}_weight_scale"] = disk[f"{theirs}_scales"]
        state[f"{ours}_bias"] = disk[f"{theirs}_bias"]
    layer.load_state_dict(state)
    method.process_weights_after_loading(layer)
    with mq.Checkpoint(tmp_path / "out") as checkpoint:
        assert same(method.weights(layer), mq.read_experts(checkpoint, prefix))
    rows = source[f"{prefix}.gate_up_proj"].permute(0, 2, 1)
    canonical = torch.cat((rows[:, 0::2], rows[:, 1::2]), 1).contiguous()
    assert torch.equal(method.weights(layer).w13.data, mk.quantize(canonical, mk.MXFP4).data)


def test_reordering_happens_once_even_if_the_factory_fails():
    calls = []

    def failing(weights, activation, *, expert_map=None):
        calls.append(weights)
        if len(calls) == 1:
            raise mk.Unsupported("no backend")
        return Factory()(weights, activation)

    method, layer, s = mq.Mxfp4MoEMethod(make_experts=failing), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    layer.load_state_dict(offline_state(s, mk.MXFP4, True))
    with pytest.raises(mk.Unsupported, match="no backend"):
        method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    assert same(calls[1], expected(s, mk.MXFP4))


def test_gpt_oss_activation_is_explicit():
    a = mq.Mxfp4MoEMethod().activation
    assert (a.kind, a.alpha, a.beta, a.limit, a.layout, a.gated) == (
        "swiglu_oai",
        1.702,
        1.0,
        7.0,
        "concatenated",
        True,
    )
    other = mk.Activation("swiglu_oai", alpha=1.5, beta=0.0, limit=5.0)
    factory = Factory()
    method, layer, s = mq.Mxfp4MoEMethod(make_experts=factory, activation=other), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    layer.load_state_dict(offline_state(s, mk.MXFP4, True))
    method.process_weights_after_loading(layer)
    assert factory.calls == [(other, None)]


@pytest.mark.parametrize("name", ["w13_weight_global_scale", "w2_input_scale"])
def test_offline_refuses_zero_scales(name):
    method, layer, s = mq.Nvfp4MoEMethod("nvfp4_w4a4"), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True, input_scales=True)
    state = offline_state(s, mk.NVFP4, False) | {"w13_input_scale": torch.ones(E), "w2_input_scale": torch.ones(E)}
    state[name] = state[name].clone()
    state[name][1] = 0
    layer.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"{name.replace('_weight', '')} is 0\.0 at index 1"):
        method.process_weights_after_loading(layer)
    state[name][1] = 2
    layer.load_state_dict(state)
    method.process_weights_after_loading(layer)
    weights = method.weights(layer)
    assert weights.input_format is mk.NVFP4
    assert torch.equal(weights.w2_input_scale, state["w2_input_scale"])
    with pytest.raises(ValueError, match="input_scales=True belongs to NVFP4"):
        mq.Nvfp4MoEMethod().create_weights(layer, E, H, I, input_scales=True)


# --- both ---


@pytest.mark.parametrize("cls", [*ONLINE, *OFFLINE])
def test_create_weights_names_the_field_its_value_and_the_rule(cls):
    f = (ONLINE | OFFLINE)[cls]
    for sizes, field in (((E, 40, I), "hidden_size is 40"), ((E, H, 24), "intermediate_size is 24")):
        with pytest.raises(
            ValueError, match=rf"{field}, but {f} needs a positive multiple of its block length {f.block}"
        ):
            cls().create_weights(nn.Module(), *sizes)
    with pytest.raises(ValueError, match="num_experts is 0"):
        cls().create_weights(nn.Module(), 0, H, I)


def test_bad_arguments():
    with pytest.raises(ValueError, match="make_experts needs an activation"):
        mq.Mxfp8OnlineMoEMethod(make_experts=Factory())
    with pytest.raises(ValueError, match="prepared weights are always concatenated"):
        mq.Mxfp8OnlineMoEMethod(activation=mk.Activation("silu", layout="interleaved"))
    with pytest.raises(ValueError, match="unknown layout"):
        mq.Mxfp8OnlineMoEMethod(row_layout="rows")
    with pytest.raises(ValueError, match="serves every format"):
        mq.OfflineMoEMethod()
    with pytest.raises(ValueError, match="these experts are not gated"):
        mq.Mxfp4OnlineMoEMethod(row_layout="interleaved").create_weights(nn.Module(), E, H, I, gated=False)
    with pytest.raises(ValueError, match="gated is False, but the activation is"):
        mq.Mxfp4OnlineMoEMethod(activation=SILU).create_weights(nn.Module(), E, H, I, gated=False)
    with pytest.raises(TypeError, match=r"expert_map is torch\.int64"):
        mq.Mxfp4OnlineMoEMethod().create_weights(nn.Module(), E, H, I, expert_map=torch.arange(3))
    with pytest.raises(ValueError, match=r"expert_map\[2\] is 3, needs -1 \(not here\) or a row, 0 to 2"):
        mq.Mxfp4OnlineMoEMethod().create_weights(
            nn.Module(), E, H, I, expert_map=torch.tensor([0, -1, 3], dtype=torch.int32)
        )


def test_the_factory_gets_weights_activation_and_map_and_the_layer_lets_go():
    factory, table = Factory(), torch.tensor([-1, 0, 1, 2], dtype=torch.int32)
    method, layer, s = mq.Mxfp8OnlineMoEMethod("w8a8", make_experts=factory, activation=SILU), nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True, expert_map=table)
    with pytest.raises(RuntimeError, match="no experts to run"):
        method.apply(layer, torch.ones(2, H), 3.0)
    layer.load_state_dict(s | {"expert_map": table})
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    assert factory.calls == [(SILU, layer.expert_map)]
    assert factory.weights.input_format is mk.MXFP8
    assert same(factory.weights, expected(s, mq.W8A8))
    assert not hasattr(layer, "w13_weight")
    assert list(layer.state_dict()) == ["expert_map"]
    assert torch.equal(method.apply(layer, torch.ones(2, H), 3.0), torch.full((2, H), 3.0))
    without = mq.Mxfp8OnlineMoEMethod()
    plain = nn.Module()
    without.create_weights(plain, E, H, I, bias=True)
    plain.load_state_dict(s)
    without.process_weights_after_loading(plain)
    with pytest.raises(RuntimeError, match="no experts to run: pass make_experts"):
        without.apply(plain, torch.ones(2, H), 3.0)


def test_originals_are_released_once_the_backend_has_its_layout():
    """A backend that packs keeps nothing of the loaded tensors alive."""
    method = mq.Mxfp4MoEMethod(make_experts=lambda w, a, *, expert_map: _Packed(w))
    layer, s = nn.Module(), sources()
    method.create_weights(layer, E, H, I, bias=True)
    layer.load_state_dict(offline_state(s, mk.MXFP4, True))
    loaded = [weakref.ref(t) for t in (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight)]
    method.process_weights_after_loading(layer)
    assert [r() for r in loaded] == [None, None, None]
    assert same(method.weights(layer), expected(s, mk.MXFP4))


class _Packed:
    """A backend with its own copy that can be updated in place."""

    def __init__(self, weights):
        self.weights = weights.map(torch.clone)

    def update_weights(self, weights):
        self.weights.copy_(weights)


@pytest.mark.parametrize("packed", [True, False])
def test_update_and_permute_in_place(packed):
    factory = (lambda w, a, *, expert_map: _Packed(w)) if packed else None
    method, layer = mq.Nvfp4OnlineMoEMethod(make_experts=factory, activation=SILU), nn.Module()
    method.create_weights(layer, E, H, I, bias=True)
    layer.load_state_dict(sources())
    method.process_weights_after_loading(layer)
    pointers = [t.data_ptr() for _, t in method.weights(layer).named_tensors()]
    new = expected(sources(), mk.NVFP4)
    method.update_weights(layer, new)
    assert same(method.weights(layer), new)
    method.permute_experts(layer, [2, 0, 1])
    assert same(method.weights(layer), new.permute([2, 0, 1]))
    assert pointers == [t.data_ptr() for _, t in method.weights(layer).named_tensors()]


@pytest.mark.parametrize("gpt_oss", [True, False])
def test_with_the_experts_of_mx_moe(gpt_oss):
    """The whole protocol on the real factory equals the experts made from weights quantized directly."""
    mm = pytest.importorskip("mx_moe")
    s, layer = sources(), nn.Module()
    if gpt_oss:
        method = mq.Mxfp4MoEMethod(make_experts=mm.make_experts)
        method.create_weights(layer, E, H, I, bias=True)
        layer.load_state_dict(offline_state(s, mk.MXFP4, True))
    else:
        method = mq.Mxfp8OnlineMoEMethod("w8a8", make_experts=mm.make_experts, activation=SILU)
        method.create_weights(layer, E, H, I, bias=True)
        layer.load_state_dict(s)
    method.process_weights_after_loading(layer)
    want = mm.make_experts(expected(s, method.scheme), method.activation)
    x, routing = torch.randn(5, H).bfloat16(), mm.Router(top_k=2)(torch.randn(5, E))
    assert torch.equal(method.apply(layer, x, routing), want(x, routing))
    new = expected(sources(), method.scheme)
    method.update_weights(layer, new)
    method.permute_experts(layer, [1, 2, 0])
    want = mm.make_experts(new.permute([1, 2, 0]), method.activation)
    assert torch.equal(method.apply(layer, x, routing), want(x, routing))


def test_expert_map_and_shared_experts_reach_mx_moe():
    """Two routed experts of four are here, and a shared one behind them; each row is used for its own global id."""
    mm = pytest.importorskip("mx_moe")
    s, layer = sources(), nn.Module()
    table = torch.tensor([-1, 1, -1, 0, 2], dtype=torch.int32)
    method = mq.Mxfp8OnlineMoEMethod(make_experts=mm.make_experts, activation=SILU)
    method.create_weights(layer, 2, H, I, bias=True, fused_shared_experts=1, expert_map=table)
    layer.load_state_dict(s | {"expert_map": table})
    method.process_weights_after_loading(layer)
    x = torch.randn(5, H).bfloat16()
    routing = mm.Router(top_k=2, shared_experts=1)(torch.randn(5, 4))
    want = mm.make_experts(expected(s, mk.MXFP8), SILU, expert_map=table, shared_experts=1)(x, routing)
    assert torch.equal(method.apply(layer, x, routing), want)
    here = mm.make_experts(expected(s, mk.MXFP8), SILU)
    local = table[routing.ids.long()]
    rows = mm.Routing(local.clamp(min=0), torch.where(local >= 0, routing.weights, 0.0))
    assert torch.allclose(method.apply(layer, x, routing).float(), here(x, rows).float(), rtol=2**-7, atol=1e-3)


def test_update_needs_experts_that_can():
    method, layer = mq.Mxfp8OnlineMoEMethod(make_experts=Factory(), activation=SILU), nn.Module()
    method.create_weights(layer, E, H, I, bias=True)
    s = sources()
    layer.load_state_dict(s)
    method.process_weights_after_loading(layer)
    with pytest.raises(RuntimeError, match="has no update_weights"):
        method.update_weights(layer, expected(s, mk.MXFP8))
