from __future__ import annotations

import builtins
import json
import math
import weakref

import pytest
import torch

import mx_kernels as mk
import mx_quant as mq
from mx_quant import report


def pair(name="w", shape=(8, 64), format="mxfp4", dtype=torch.bfloat16):
    x = torch.randn(shape).to(dtype)
    return name, x, mk.quantize(x, format)


@pytest.mark.parametrize("format", mk.FORMATS)
def test_numbers_are_the_formulas(format):
    """Against the definitions in float64; products in float32 err by 2^-24 each, far under the tolerance."""
    name, x, q = pair(shape=(32, 128), format=format)
    (row,) = mq.compare([(name, x, q)]).rows
    a, y = x.double(), mk.dequantize(q, torch.float32).double()
    e = row.error
    assert e.snr_db == pytest.approx(10 * math.log10((a**2).sum() / ((y - a) ** 2).sum()), rel=1e-6)
    assert e.relative == pytest.approx(float((y - a).norm() / a.norm()), rel=1e-6)
    assert e.max_abs == float((y - a).abs().max())
    assert e.cosine == pytest.approx(float(torch.cosine_similarity(a.flatten(), y.flatten(), dim=0)), rel=1e-6)
    assert e.snr_db == pytest.approx(-20 * math.log10(e.relative), rel=1e-9)
    assert (row.nbytes, row.source_nbytes) == (q.nbytes, x.nbytes)
    assert row.bits == pytest.approx(q.format.bits_per_element + (32 / x.numel() if q.global_scale is not None else 0))


def test_pieces_add_up(monkeypatch):
    pairs = [pair("a", (7, 64)), pair("b", (3, 5, 32)), pair("c", (64,))]
    whole = mq.compare(pairs)
    monkeypatch.setattr(report, "_PIECE", 100)
    cut = mq.compare(pairs)
    for one, other in zip((*whole.rows, whole), (*cut.rows, cut), strict=True):
        a, b = (r.error if isinstance(r, report.Row) else r.total for r in (one, other))
        assert a.snr_db == pytest.approx(b.snr_db, rel=1e-12)
        assert a.max_abs == b.max_abs


def test_experts_of_a_fused_tensor():
    name, x, q = pair("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 32), "nvfp4")
    (row,) = mq.compare([(name, x, q)]).rows
    each = mq.compare((f"e{e}", x[e], q[e]) for e in range(4))
    assert row.experts == tuple(r.error.snr_db for r in each.rows)
    assert row.error == each.total


def test_exact_zero_and_nan():
    x = torch.tensor([[1.0, -2.0] * 16])
    zero = torch.zeros(2, 32)
    nan = torch.ones(1, 32)
    nan[0, 3] = math.nan
    r = mq.compare((n, t, mk.quantize(t, "mxfp4")) for n, t in (("exact", x), ("zero", zero), ("nan", nan)))
    exact, zeros, bad = r.rows
    assert exact.error == zeros.error == report.Error(math.inf, 0.0, 0.0, 1.0)
    assert math.isnan(bad.error.snr_db)
    assert r.worst(1) == (bad,)
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert [t["exact"] for t in d["tensors"]] == [True, True, False]
    assert d["tensors"][0]["snr_db"] is None
    lost = mq.compare([("w", torch.zeros(1, 32), mk.quantize(x, "mxfp4"))]).total
    assert lost.snr_db == -math.inf


def test_worst_and_forms():
    pairs = [pair("good", format="mxfp8"), pair("bad", format="mxfp4"), pair("middle", format="mxfp6")]
    r = mq.compare(pairs)
    assert [w.name for w in r.worst()] == ["bad", "middle", "good"]
    assert [w.name for w in r.worst(2)] == ["bad", "middle"]
    text = r.to_markdown(worst=2)
    assert "**all 3**" in text
    assert "`bad`" in text
    assert "`good`" not in text
    assert {line.count("|") for line in text.splitlines()} == {10}
    assert r.to_markdown(worst=0).index("`good`") < r.to_markdown(worst=0).index("`bad`")
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert [t["name"] for t in d["tensors"]] == ["good", "bad", "middle"]
    assert d["worst"] == ["bad", "middle", "good"]
    assert d["bytes"] == sum(q.nbytes for _, _, q in pairs)
    assert d["tensors"][1] == d["tensors"][1] | {"format": "mxfp4", "rule": "even", "shape": [8, 64]}


def test_layers():
    """The SNR of a layer is that of all its weights' errors together; what has no layer is in none."""
    names = ["model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.3.a.weight", "lm_head.weight"]
    source = {n: torch.randn(8, 64) * 2.0**i for i, n in enumerate(names)}
    quantized = {n: mk.quantize(x, mk.MXFP4) for n, x in source.items()}
    found = mq.error_report(source, quantized)
    e = {n: (mk.dequantize(quantized[n], torch.float32) - x).double().square().sum() for n, x in source.items()}
    x = {n: t.double().square().sum() for n, t in source.items()}
    both = 10 * torch.log10((x[names[0]] + x[names[1]]) / (e[names[0]] + e[names[1]]))
    assert found.layers() == pytest.approx({0: float(both), 3: found.rows[2].error.snr_db}, rel=1e-6)
    assert found.to_dict()["layers"] == {str(n): v for n, v in found.layers().items()}


def test_pairs_are_streamed():
    alive = []

    def pairs():
        for n in range(4):
            assert [r for r in alive if r() is not None] == []
            x = torch.randn(4, 32)
            q = mk.quantize(x, "mxfp8")
            alive.extend((weakref.ref(x), weakref.ref(q)))
            yield f"w{n}", x, q
            del x, q

    assert len(mq.compare(pairs()).rows) == 4


def test_error_report_of_mappings():
    name, x, q = pair()
    assert mq.error_report({name: x, "bias": x[0]}, {name: q}) == mq.compare([(name, x, q)])
    with pytest.raises(ValueError, match="1 quantized tensors have no source, the first is 'other'"):
        mq.error_report({name: x}, {"other": q})


def test_bad_pairs():
    name, x, q = pair()
    with pytest.raises(ValueError, match=r"w: the source has shape \(4, 64\), the quantized tensor \(8, 64\)"):
        mq.compare([(name, x[:4], q)])
    with pytest.raises(ValueError, match="w comes twice"):
        mq.compare([(name, x, q), (name, x, q)])
    with pytest.raises(TypeError, match=r"w: the source is torch\.int8"):
        mq.compare([(name, x.to(torch.int8), q)])


@pytest.mark.parametrize("kind", ["fused", "single", "dense"])
def test_plot(kind, tmp_path):
    pytest.importorskip("matplotlib")
    shape = {"fused": (3, 16, 32)}.get(kind, (16, 32))
    names = {
        "fused": [f"model.layers.{n}.mlp.experts.{p}" for n in range(3) for p in ("gate_up_proj", "down_proj")],
        "single": [f"model.layers.{n}.mlp.experts.{e}.down_proj.weight" for n in range(2) for e in range(3)],
        "dense": [f"model.layers.{n}.self_attn.{p}.weight" for n in range(2) for p in ("q_proj", "o_proj")],
    }[kind]
    r = mq.compare([*(pair(n, shape) for n in names), pair("lm_head.weight")])
    panels = r._panels()
    assert [t for t, _, _ in panels] == {"fused": ["gate_up", "down"], "single": ["down"], "dense": ["weights"]}[kind]
    assert panels[0][1] == (["self_attn.q_proj", "self_attn.o_proj"] if kind == "dense" else [0, 1, 2])
    r.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_says_what_is_missing(tmp_path, monkeypatch):
    r = mq.compare([pair("lm_head.weight")])
    with pytest.raises(ValueError, match="no layers to plot"):
        r.plot(tmp_path / "map.png")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mx-quant\[plot\]'"):
        r.plot(tmp_path / "map.png")
