"""verify: a sound checkpoint has no finding; each kind of damage is found and named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mx_kernels as mk
from mx_quant.convert import convert_checkpoint
from mx_quant.offline import quantize_checkpoint
from mx_quant.verify import check_quantized, report_checkpoint, verify_checkpoint

LAYOUT = {"mxfp8": "mxfp8", "mxfp4": "compressed-tensors", "nvfp4": "modelopt", "mxfp6": "compressed-tensors"}
UP = "model.layers.0.mlp.experts.1.up_proj"


def make(checkpoints, tmp_path, f="mxfp8", **options):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1), shards=2)
    quantize_checkpoint(src, tmp_path / "out", f, layout=LAYOUT[f], **options)
    return src, tmp_path / "out"


def damage(out, change, manifest=False):
    """Rewrite the output's tensors after ``change(tensors)``; the manifest goes unless it is asked for."""
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if not manifest:
        (out / "mx_quant.json").unlink()


def kinds(v):
    return {(f.kind, f.tensor) for f in v.findings}


@pytest.mark.parametrize("f", LAYOUT)
def test_sound(checkpoints, tmp_path, f):
    src, out = make(checkpoints, tmp_path, f)
    v = verify_checkpoint(out, against=src, jobs=2)
    assert v.ok, str(v)
    assert v.weights == 16
    assert v.hashed == v.tensors
    assert len(v.report.rows) == 16
    assert min(r.error.snr_db for r in v.report.rows) > 14
    assert f"layers  0: {v.report.layers()[0]:.2f}" in str(v)
    assert json.loads(json.dumps(v.to_dict()))["ok"] is True
    assert str(v).endswith("ok")


def test_sound_after_conversion_and_fusing(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.gpt_oss_tensors(), model_type="gpt_oss")
    quantize_checkpoint(src, tmp_path / "a", "mxfp4", layout="gpt-oss")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", "gpt-oss")
    for name in "abc":
        v = verify_checkpoint(tmp_path / name, against=src)
        assert v.ok, str(v)
        assert len(v.report.rows) == 3 * 3


def test_flipped_bit(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)
    v = verify_checkpoint(out)
    assert [f.kind for f in v.findings] == ["changed"]


def test_truncated(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert [f.kind for f in verify_checkpoint(out).findings] == ["unreadable"]


def test_missing_scale(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    damage(out, lambda t: t.pop(f"{UP}.weight_scale_inv"))
    v = verify_checkpoint(out)
    assert not v.ok
    assert f"{UP}.weight_scale_inv is missing" in v.findings[0].detail


def test_lost_and_added_tensors(checkpoints, tmp_path):
    src, out = make(checkpoints, tmp_path)

    def change(t):
        t.pop("model.norm.weight")
        t["extra"] = torch.zeros(3)

    damage(out, change, manifest=True)
    found = kinds(verify_checkpoint(out, against=src))
    assert {("missing", "model.norm.weight"), ("unknown", "extra")} <= found


@pytest.mark.parametrize("f", LAYOUT)
def test_an_expert_that_lacks_a_matrix(checkpoints, tmp_path, f):
    """Codes, scales and all of one matrix are gone, and no manifest tells."""
    _, out = make(checkpoints, tmp_path, f)
    damage(out, lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{UP}.")])
    found = verify_checkpoint(out)
    assert kinds(found) == {("missing", f"{UP}.weight")}
    assert "each of the 4 experts" in found.findings[0].detail


def test_experts_that_are_not_there(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    gone = UP.removesuffix("up_proj")
    damage(out, lambda t: [t.pop(n) for n in list(t) if n.startswith(gone)])
    found = verify_checkpoint(out)
    assert kinds(found) == {("missing", f"{gone}{x}_proj.weight") for x in ("gate", "up", "down")}
    assert "3 of this layer are missing" in str(found)


def test_wrong_shape(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    damage(out, lambda t: t.update({f"{UP}.weight_scale_inv": t[f"{UP}.weight_scale_inv"][:-1].clone()}))
    assert "has shape (95, 2), needs (96, 2)" in str(verify_checkpoint(out))


@pytest.mark.parametrize(
    ("f", "tensor", "change", "kind", "text"),
    [
        ("mxfp8", "weight_scale_inv", lambda t: t[3].fill_(255), "scale", "0xff"),
        ("mxfp8", "weight_scale_inv", lambda t: t[3].fill_(250), "scale", "out of range"),
        ("mxfp8", "weight_scale_inv", lambda t: t.zero_(), "scale", "zero under codes"),
        ("mxfp8", "weight", lambda t: t.view(torch.uint8)[5].fill_(0x7F), "non-finite", "codes are NaN"),
        ("mxfp4", "weight_scale", lambda t: t.zero_(), "scale", "zero under codes"),
        ("mxfp6", "weight_scale", lambda t: t.zero_(), "scale", "zero under codes"),
        ("nvfp4", "weight_scale", lambda t: t.view(torch.uint8)[0, 0].fill_(0), "scale", "zero under codes"),
        ("nvfp4", "weight_scale", lambda t: t.view(torch.uint8)[0, 0].fill_(0x7F), "scale", "0x7f"),
        ("nvfp4", "weight_scale", lambda t: t.view(torch.uint8)[0, 0].fill_(0x81), "scale", "0x81"),
        ("nvfp4", "weight_scale_2", lambda t: t.zero_(), "scale", "finite positive"),
        ("nvfp4", "weight_scale_2", lambda t: t.fill_(float("nan")), "scale", "finite positive"),
        ("nvfp4", "weight_scale_2", lambda t: t.fill_(-1), "scale", "finite positive"),
    ],
)
def test_damaged_values(checkpoints, tmp_path, f, tensor, change, kind, text):
    _, out = make(checkpoints, tmp_path, f)
    damage(out, lambda t: change(t[f"{UP}.{tensor}"]))
    v = verify_checkpoint(out)
    assert kinds(v) == {(kind, f"{UP}.weight")}
    assert text in str(v)


def test_full_precision_values(checkpoints, tmp_path):
    src, out = make(checkpoints, tmp_path)
    damage(out, lambda t: t["lm_head.weight"][3, 4].fill_(float("nan")))
    v = verify_checkpoint(out, against=src)
    assert kinds(v) == {("non-finite", "lm_head.weight"), ("changed", "lm_head.weight")}
    assert "(3, 4)" in str(v)


def test_unquantized_experts(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path, exclude=("down_proj",))
    v = verify_checkpoint(out)
    assert {f.kind for f in v.findings} == {"unquantized"}
    assert len(v.findings) == 4
    assert verify_checkpoint(out, allow_unquantized_experts=("*.down_proj",)).ok


def test_another_source(checkpoints, tmp_path):
    _, out = make(checkpoints, tmp_path)
    other = checkpoints.save(tmp_path / "other", checkpoints.moe_tensors(layers=1, seed=5), shards=3)
    v = verify_checkpoint(out, against=other)
    assert {f.kind for f in v.findings} == {"source", "snr", "changed"}
    assert sum(f.kind == "snr" for f in v.findings) == 16


def test_not_quantized(checkpoints, tmp_path):
    src, out = make(checkpoints, tmp_path)
    assert ("unquantized", "src") in kinds(verify_checkpoint(src))
    with pytest.raises(ValueError, match="quantized itself"):
        verify_checkpoint(out, against=out)
    with pytest.raises(ValueError, match="does not exist"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="quantized itself"):
        report_checkpoint(out, out)
    with pytest.raises(ValueError, match="not quantized"):
        report_checkpoint(src, src)


@pytest.mark.parametrize("f", mk.FORMATS.values(), ids=str)
def test_check_quantized_accepts_what_quantize_makes(f):
    x = torch.randn(8, 96)
    x[2] = 0
    x[3] *= 1e-30
    x[4] *= 1e30
    q = mk.quantize(x, f) if not f.has_global_scale else mk.quantize(torch.randn(8, 96), f)
    assert list(check_quantized(q)) == []
    negative_zero = mk.quantize(-torch.zeros(2, 96), f)
    assert list(check_quantized(negative_zero)) == []


def test_report(checkpoints, tmp_path):
    src, out = make(checkpoints, tmp_path, "nvfp4")
    found = report_checkpoint(out, src)
    assert len(found.rows) == 16
    x = load_file(src / "model-00001-of-00002.safetensors")
    name = next(r.name for r in found.rows if r.name in x)
    row = next(r for r in found.rows if r.name == name)
    assert row.source_nbytes == x[name].nbytes
    assert 15 < row.error.snr_db < 30
