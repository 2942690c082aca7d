"""Experts read from checkpoints of every layout: the same codes and scales in canonical form, whatever the storage is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import mx_kernels as mk
import mx_quant as mq

E, H, I = 3, 64, 96


def checkpoint(folder, family: str):
    """A source checkpoint with one layer of experts, and its canonical w13, w2, biases."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    w13, w2, b13, b2 = normal(E, 2 * I, H), normal(E, H, I), normal(E, 2 * I), normal(E, H)
    name = "model.layers.0.mlp.experts"
    if family == "gpt_oss":
        tensors = {
            f"{name}.gate_up_proj": mq.interleave(w13, 1).transpose(1, 2).contiguous(),
            f"{name}.gate_up_proj_bias": mq.interleave(b13, 1),
            f"{name}.down_proj": w2.transpose(1, 2).contiguous(),
            f"{name}.down_proj_bias": b2,
        }
    else:
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if family == "qwen3_moe" else ("w1", "w3", "w2")
        name = name if family == "qwen3_moe" else "model.layers.0.block_sparse_moe.experts"
        tensors = {}
        for e in range(E):
            tensors[f"{name}.{e}.{gate}.weight"] = w13[e, :I].contiguous()
            tensors[f"{name}.{e}.{up}.weight"] = w13[e, I:].contiguous()
            tensors[f"{name}.{e}.{down}.weight"] = w2[e].contiguous()
        b13 = b2 = None
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": family, "torch_dtype": "bfloat16"}))
    return name, (w13, w2, b13, b2)


LAYOUTS = [
    ("mxfp4", "gpt-oss"), ("mxfp4", "compressed-tensors"), ("mxfp4", "quark"), ("mxfp6", "compressed-tensors"),
    ("mxfp8", "mxfp8"), ("mxfp8", "compressed-tensors"), ("nvfp4", "compressed-tensors"), ("nvfp4", "modelopt"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "layout"), LAYOUTS)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_codes_and_scales_arrive(tmp_path, family: str, format: str, layout: str) -> None:
    name, (w13, w2, b13, b2) = checkpoint(tmp_path / "src", family)
    mq.quantize_checkpoint(tmp_path / "src", tmp_path / "out", format, layout=layout)
    with mq.Checkpoint(tmp_path / "out") as ck:
        (found,) = mq.expert_layers(ck)
        got = mq.read_experts(ck, found)
    if family == "gpt_oss" or layout != "gpt-oss":
        assert found.rsplit(".", 2)[0] == name.rsplit(".", 2)[0]
    assert got.format is mk.get_format(format)
    want = mq.quantize_experts(w13, w2, format, w13_bias=b13, w2_bias=b2)
    for a, b in ((got.w13, want.w13), (got.w2, want.w2)):
        if not got.format.has_global_scale:  # NVFP4's offline global scale has an exact reciprocal: another number
            assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
            assert torch.equal(a.scale, b.scale)
        else:
            assert torch.allclose(mk.dequantize(a), mk.dequantize(b), rtol=0.3, atol=0.2)
    for a, b in ((got.w13_bias, b13), (got.w2_bias, b2)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_plain_experts_are_canonical(tmp_path, family: str) -> None:
    _, (w13, w2, b13, _) = checkpoint(tmp_path / "src", family)
    with mq.Checkpoint(tmp_path / "src") as ck:
        got = mq.read_experts(ck, mq.expert_layers(ck)[0])
    assert got.format is None
    assert torch.equal(got.w13, w13)
    assert torch.equal(got.w2, w2)
    assert b13 is None or torch.equal(got.w13_bias, b13)


def test_unknown_names_are_listed(tmp_path) -> None:
    name, _ = checkpoint(tmp_path / "src", "qwen3_moe")
    with (
        mq.Checkpoint(tmp_path / "src") as ck,
        pytest.raises(ValueError, match=f"no experts named 'x'; there are {name}"),
    ):
        mq.read_experts(ck, "x")
