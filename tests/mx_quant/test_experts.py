from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
import mx_quant as mq

FORMATS = list(mk.FORMATS.values())


def same(a, b) -> bool:
    """Bit-equal weights: every tensor of both."""
    x, y = dict(a.named_tensors()), dict(b.named_tensors())
    return x.keys() == y.keys() and all(
        x[n].shape == y[n].shape
        and torch.equal(
            x[n].contiguous().reshape(-1).view(torch.uint8), y[n].contiguous().reshape(-1).view(torch.uint8)
        )
        for n in x
    )


def sources(e=3, h=64, i=32, gated=True, dtype=torch.bfloat16):
    n = 2 * i if gated else i
    return {
        "w13": torch.randn(e, n, h).to(dtype),
        "w2": torch.randn(e, h, i).to(dtype),
        "w13_bias": torch.randn(e, n).to(dtype),
        "w2_bias": torch.randn(e, h).to(dtype),
    }


def quantized(format="mxfp4", **sizes):
    return mq.quantize_experts(**sources(**sizes), scheme=format)


# --- quantize_experts ---


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_expert_by_expert_is_the_whole_tensor(format, gated):
    """Bitwise: blocks do not know their expert, and NVFP4's global scale is one per matrix both ways."""
    s = sources(gated=gated)
    w = mq.quantize_experts(**s, scheme=format)
    want = mq.ExpertWeights(mk.quantize(s["w13"], format), mk.quantize(s["w2"], format), s["w13_bias"], s["w2_bias"])
    assert same(w, want)
    assert (w.num_experts, w.hidden_size, w.intermediate_size, w.gated) == (3, 64, 32, gated)
    assert w.format is format
    assert w.dtype == torch.bfloat16
    assert w.nbytes < sum(t.nbytes for t in s.values())


@pytest.mark.parametrize("format", [mk.MXFP8, mk.MXFP4, mk.NVFP4], ids=str)
def test_interleaved_rows_become_canonical(format):
    s = sources()
    woven = s | {"w13": mq.interleave(s["w13"], 1), "w13_bias": mq.interleave(s["w13_bias"], 1)}
    assert torch.equal(woven["w13"][:, 0::2], s["w13"][:, :32])
    assert torch.equal(woven["w13"][:, 1::2], s["w13"][:, 32:])
    before = {k: v.clone() for k, v in woven.items()}
    assert same(
        mq.quantize_experts(**woven, scheme=format, layout="interleaved"), mq.quantize_experts(**s, scheme=format)
    )
    assert all(torch.equal(before[k], v) for k, v in woven.items())


def test_transposed_views_are_read_as_they_are():
    """transformers holds gpt-oss's experts as [E, H, 2I] and [E, I, H]."""
    s = sources()
    t = s | {k: s[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("w13", "w2")}
    assert not t["w13"].is_contiguous()
    assert same(mq.quantize_experts(**t, scheme="nvfp4"), mq.quantize_experts(**s, scheme="nvfp4"))


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gpu_is_the_cpu(format):
    """Bitwise, whether the source is there or the result is asked for there; and experts move in place there too."""
    device = "cuda" if torch.cuda.is_available() else "xpu"
    s = sources()
    want = mq.quantize_experts(**s, scheme=format)
    there = mq.quantize_experts(**{k: v.to(device) for k, v in s.items()}, scheme=format)
    sent = mq.quantize_experts(**s, scheme=format, device=device)
    assert there.device.type == sent.device.type == device
    assert same(there.to("cpu"), want)
    assert same(sent.to("cpu"), want)
    pointers = [t.data_ptr() for _, t in there.named_tensors()]
    there.permute_([2, 0, 1])
    assert same(there.to("cpu"), want.permute([2, 0, 1]))
    there.copy_(sent)
    assert same(there.to("cpu"), want)
    assert pointers == [t.data_ptr() for _, t in there.named_tensors()]


def test_gate_and_up_share_one_global_scale_per_expert():
    s = sources()
    s["w13"][:, :32] *= torch.tensor([1.0, 8.0, 1.0]).view(3, 1, 1)
    w = mq.quantize_experts(s["w13"], s["w2"], "nvfp4")
    for e in range(3):
        assert w.w13.global_scale[e] == s["w13"][e].float().abs().max() / 2688
        assert w.w2.global_scale[e] == s["w2"][e].float().abs().max() / 2688


def test_the_scheme_goes_along():
    s = sources()
    w = mq.quantize_experts(s["w13"], s["w2"], mq.Scheme(mk.MXFP4, mk.MXFP8, "floor"))
    assert w.input_format is mk.MXFP8
    assert w.w13.rule is w.w2.rule is mk.ScaleRule.FLOOR
    assert mq.quantize_experts(s["w13"], s["w2"], "mxfp4").input_format is None


def test_bad_sources():
    s = sources()
    with pytest.raises(
        ValueError, match="hidden_size is 48, but mxfp8_e4m3 needs a positive multiple of its block length 32"
    ):
        mq.quantize_experts(**sources(h=48), scheme="mxfp8")
    with pytest.raises(ValueError, match="intermediate_size is 40"):
        mq.quantize_experts(**sources(i=40), scheme="mxfp8")
    with pytest.raises(ValueError, match="unknown layout 'woven'"):
        mq.quantize_experts(**s, scheme="mxfp8", layout="woven")
    with pytest.raises(ValueError, match="has no gate rows"):
        mq.quantize_experts(**sources(gated=False), scheme="mxfp8", layout="interleaved")
    with pytest.raises(TypeError, match=r"w13 is torch\.uint8.*quantized already"):
        mq.quantize_experts(s["w13"].to(torch.uint8), s["w2"], "mxfp8")
    with pytest.raises(ValueError, match="meta device"):
        mq.quantize_experts(s["w13"].to("meta"), s["w2"].to("meta"), "mxfp8")
    s["w2"][2, 5, 7] = torch.inf
    with pytest.raises(ValueError, match=r"layer0\.w2\[2\] is not finite.*\(5, 7\)"):
        mq.quantize_experts(**s, scheme="nvfp4", name="layer0")


# --- ExpertBuilder ---


@pytest.mark.parametrize("format", [mk.MXFP6_E2M3, mk.NVFP4], ids=str)
def test_builder_takes_matrices_in_any_order(format):
    s = sources()
    b = mq.ExpertBuilder(3, 64, 32, format)
    pointers = [b.w13.data.data_ptr(), b.w2.scale.data_ptr()]
    for e in (2, 0, 1):
        gate, up = s["w13"][e, :32], s["w13"][e, 32:]
        g = mq.joint_global_scale([("gate", gate), ("up", up)]) if format.has_global_scale else None
        b.put(e, "down", s["w2"][e])
        b.put(e, "up", up, global_scale=g)
        b.put(e, "gate", gate, global_scale=g)
    w = b.build(s["w13_bias"], s["w2_bias"])
    assert same(w, mq.quantize_experts(**s, scheme=format))
    assert pointers == [w.w13.data.data_ptr(), w.w2.scale.data_ptr()]


def test_builder_refuses_what_does_not_fit():
    b = mq.ExpertBuilder(2, 64, 32, "nvfp4")
    gate = torch.randn(32, 64)
    with pytest.raises(ValueError, match=r"gate\[0\]: gate and up share one nvfp4 global scale"):
        b.put(0, "gate", gate)
    with pytest.raises(ValueError, match="expert is 2, needs 0 to 1"):
        b.put(2, "down", torch.randn(64, 32))
    with pytest.raises(ValueError, match=r"x has shape \(32, 64\), needs \(64, 32\)"):
        b.put(0, "down", gate, name="x")
    with pytest.raises(ValueError, match="unknown part 'w1'; there are down, up, gate, gate_up"):
        b.put(0, "w1", gate)
    with pytest.raises(ValueError, match=r"unknown part 'gate'; there are down, up$"):
        mq.ExpertBuilder(2, 64, 32, "mxfp4", gated=False).put(0, "gate", gate)
    b.put(0, "gate_up", torch.randn(64, 64))
    b.put(1, "down", torch.randn(64, 32))
    with pytest.raises(ValueError, match="3 matrices are missing, the first is 'down' of expert 0"):
        b.build()


# --- ExpertWeights ---


def test_plain_weights_are_allowed():
    w = mq.ExpertWeights(**sources())
    assert w.format is None
    assert w.gated
    assert w.dtype == torch.bfloat16
    assert "bfloat16, E=3, H=64, I=32" in repr(w)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"w2": torch.zeros(2, 64, 32)}, ValueError, r"needs w2 of shape \[3, 64, I\]"),
        ({"w2": torch.zeros(3, 64, 48)}, ValueError, r"needs 2I = 96 \(gated\) or I = 48"),
        ({"w13": torch.zeros(64, 64)}, ValueError, "need three dimensions"),
        ({"w2": torch.zeros(3, 64, 32, dtype=torch.int8)}, TypeError, "w2 is torch.int8"),
        ({"w13_bias": torch.zeros(3, 32)}, ValueError, r"w13_bias has shape \(3, 32\), needs \(3, 64\)"),
        ({"w2_bias": torch.zeros(3, 32)}, ValueError, r"w2_bias has shape \(3, 32\), needs \(3, 64\)"),
        ({"w2_bias": torch.zeros(3, 64, dtype=torch.int32)}, TypeError, "w2_bias is torch.int32"),
        ({"w2": mk.quantize(torch.zeros(3, 64, 32), mk.MXFP4)}, TypeError, "quantize both or neither"),
        ({"w2_bias": torch.zeros(3, 64, device="meta")}, ValueError, "w2_bias is on meta and w13 on cpu"),
        ({"w13_input_scale": torch.ones(3)}, ValueError, "w13_input_scale belongs to NVFP4 inputs"),
        ({"w2_input_scale": torch.ones(2), "input_format": mk.NVFP4}, ValueError, r"needs \[\] or \[3\]"),
        ({"w2_input_scale": torch.ones(3).half(), "input_format": mk.NVFP4}, TypeError, "needs float32"),
    ],
)
def test_bad_weights(change, error, match):
    with pytest.raises(error, match=match):
        mq.ExpertWeights(**(sources(dtype=torch.float32) | change))


def test_bad_quantized_weights():
    w = quantized("nvfp4")
    one = mk.QuantizedTensor(w.w13.data, w.w13.scale, mk.NVFP4, w.w13.rule, global_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"global scale of w13 has shape \(\), needs \[3\]"):
        mq.ExpertWeights(one, w.w2)
    with pytest.raises(ValueError, match="w13 is nvfp4 and w2 is mxfp4"):
        mq.ExpertWeights(w.w13, quantized("mxfp4").w2)


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_slice_is_a_view_of_one_rank(format):
    w = quantized(format, e=4)
    part = w[1:3]
    assert part.num_experts == 2
    assert part.w13.data.data_ptr() == w.w13.data[1].data_ptr()
    s = w[torch.tensor([1, 2])]
    assert same(part, s)
    with pytest.raises(TypeError, match="by a slice or an index tensor, not by int"):
        w[1]


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), format=st.sampled_from(["mxfp8", "mxfp6", "nvfp4"]))
def test_permute(order, format):
    """In place and new agree, every expert moves with all its tensors, and the inverse brings it back."""
    w = quantized(format, e=4)
    w = mq.ExpertWeights(w.w13, w.w2, w.w13_bias, w.w2_bias, mk.NVFP4, torch.arange(1.0, 5.0), torch.tensor(2.0))
    new = w.permute(order)
    for row, e in enumerate(order):
        assert same(new[row : row + 1], w[e : e + 1])
    before = w.map(torch.clone)
    pointers = [t.data_ptr() for _, t in w.named_tensors()]
    w.permute_(torch.tensor(order))
    assert same(w, new)
    assert pointers == [t.data_ptr() for _, t in w.named_tensors()]
    w.permute_([order.index(e) for e in range(4)])
    assert same(w, before)


def test_writing_in_place_leaves_the_sources_alone():
    s = sources()
    before = {k: v.clone() for k, v in s.items()}
    w = mq.quantize_experts(**s, scheme="mxfp8")
    w.permute_([1, 2, 0])
    w.copy_(quantized("mxfp8"))
    assert all(torch.equal(before[k], v) for k, v in s.items())


def test_permute_with_redundant_experts():
    w = quantized(e=3)
    new = w.permute([0, 2, 2, 1])
    assert new.num_experts == 4
    assert same(new[1:2], new[2:3])
    with pytest.raises(ValueError, match="order has 4 entries, needs one per expert, 3"):
        w.permute_([0, 2, 2, 1])
    with pytest.raises(ValueError, match=r"order\[1\] is 3, needs 0 to 2"):
        w.permute([0, 3])
    with pytest.raises(ValueError, match="needs one dimension of expert numbers"):
        w.permute(torch.zeros(3))


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_copy_keeps_pointers_and_refuses_what_does_not_fit(format):
    w, new = quantized(format), quantized(format)
    pointers = [t.data_ptr() for _, t in w.named_tensors()]
    assert not same(w, new)
    w.copy_(new)
    assert same(w, new)
    assert pointers == [t.data_ptr() for _, t in w.named_tensors()]
    for other, match in (
        (quantized("mxfp4"), "the new ones" if format == "nvfp4" else "cannot write mxfp4"),
        (mq.ExpertWeights(new.w13, new.w2), "both need the same"),
        (quantized(format, i=64), "the new one"),
        (mq.ExpertWeights(new.w13, new.w2, new.w13_bias.float(), new.w2_bias), "w13_bias is torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=match):
            w.copy_(other)
        assert same(w, new)


def test_check_scales_finds_what_was_never_loaded():
    w = quantized("nvfp4")
    w.check_scales()
    w.w2.scale.view(torch.uint8)[1, 2, 0] = 0x7F
    with pytest.raises(ValueError, match=r"w2_scale is NaN in 1 of 384 blocks, the first at index \(1, 2, 0\)"):
        w.check_scales()
    w = quantized("nvfp4")
    w.w13.global_scale[2] = 0
    with pytest.raises(ValueError, match=r"w13_global_scale is 0\.0 at index 2"):
        w.check_scales()
    w = mq.ExpertWeights(
        w.w13, quantized("nvfp4").w2, input_format=mk.NVFP4, w2_input_scale=torch.tensor([1.0, 0.0, 1.0])
    )
    w.w13.global_scale[2] = 1
    with pytest.raises(ValueError, match=r"w2_input_scale is 0\.0 at index 1"):
        w.check_scales()


def test_interleave_refuses_odd_rows():
    for f in (mq.interleave, mq.deinterleave):
        with pytest.raises(ValueError, match="dimension 1 has 3 rows"):
            f(torch.zeros(2, 3), 1)


@settings(max_examples=20, deadline=None)
@given(
    pairs=st.integers(0, 5),
    dim=st.integers(0, 2),
    dtype=st.sampled_from([torch.uint8, torch.float8_e4m3fn, torch.bfloat16]),
)
def test_interleave_round_trip(pairs, dim, dtype):
    shape = [2, 3, 4]
    shape[dim] = 2 * pairs
    x = torch.randint(0, 120, shape, dtype=torch.uint8)
    x = x.view(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
    back = mq.deinterleave(mq.interleave(x, dim), dim)
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))
