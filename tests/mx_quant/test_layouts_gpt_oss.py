"""gpt-oss in both namings: bytes against the layout's definition, and whole checkpoints under OpenAI's own names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mx_kernels as mk
import mx_quant as mq
from mx_quant.layouts import LAYOUTS, WeightRef

E, H, I = 2, 64, 32


def test_bytes():
    """blocks[e, 2 * i] is gate row i of expert e and blocks[e, 2 * i + 1] up row i; byte j of a block holds codes 2j, 2j + 1."""
    layout = LAYOUTS["gpt-oss"]
    ref = WeightRef("m.mlp.experts.gate_up_proj", "fused_expert", (E, 2 * I, H), mk.MXFP4)
    codes = torch.randint(0, 16, (E, 2 * I, H), dtype=torch.uint8)
    scale = torch.randint(0, 255, (E, 2 * I, H // 32), dtype=torch.uint8)
    q = mk.QuantizedTensor(codes[..., 0::2] | codes[..., 1::2] << 4, scale, mk.MXFP4, mk.ScaleRule.EVEN)
    out = layout.write(ref, q)
    blocks, scales = out["m.mlp.experts.gate_up_proj_blocks"], out["m.mlp.experts.gate_up_proj_scales"]
    assert (blocks.shape, scales.shape) == ((E, 2 * I, H // 32, 16), (E, 2 * I, H // 32))
    for row, stored in ((0, 0), (I, 1), (3, 6), (I + 5, 11)):
        assert torch.equal(scales[:, stored], scale[:, row])
        for block in range(H // 32):
            want = codes[:, row, 32 * block : 32 * block + 32]
            assert torch.equal(blocks[:, stored, block] & 15, want[:, 0::2])
            assert torch.equal(blocks[:, stored, block] >> 4, want[:, 1::2])


@pytest.fixture
def original(tmp_path):
    """A random bf16 checkpoint under OpenAI's names, and its tensors."""
    tensors = {}
    for block in range(2):
        p = f"block.{block}"
        shapes = {
            "mlp.mlp1_weight": (E, 2 * I, H), "mlp.mlp1_bias": (E, 2 * I), "mlp.mlp2_weight": (E, H, I), "mlp.mlp2_bias": (E, H),
            "attn.qkv.weight": (96, H), "mlp.gate.weight": (E, H), "attn.norm.scale": (H,),
        }  # fmt: skip
        tensors |= {f"{p}.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors |= {n: torch.randn(16, H).bfloat16() for n in ("embedding.weight", "unembedding.weight")}
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_experts": E}))
    return folder, tensors


def test_original_names(original, tmp_path):
    source, tensors = original
    mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss-original")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "quantization_config" not in config
    quantized = {n for n in tensors if n.endswith(("mlp1_weight", "mlp2_weight"))}
    assert set(stored) == (set(tensors) - quantized) | {f"{n}.{s}" for n in quantized for s in ("blocks", "scales")}
    for name in set(tensors) - quantized:
        assert torch.equal(stored[name], tensors[name])
    for name in quantized:  # rows stay as they were stored: interleaved
        q = mk.quantize(tensors[name], mk.MXFP4)
        assert torch.equal(stored[f"{name}.blocks"].flatten(-2), q.data)
        assert torch.equal(stored[f"{name}.scales"], q.scale)


@pytest.mark.parametrize("middle", ["quark", "compressed-tensors"])
def test_original_there_and_back(middle, original, tmp_path):
    """Expert by expert in another layout, biases too, and back: the same bytes under the same names."""
    source, tensors = original
    mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss-original")
    mq.convert_checkpoint(tmp_path / "q", tmp_path / "there", layout=middle)
    there = load_file(tmp_path / "there" / "model.safetensors")
    assert torch.equal(there["block.1.mlp.experts.1.up_proj.bias"], tensors["block.1.mlp.mlp1_bias"][1, 1::2])
    mq.convert_checkpoint(tmp_path / "there", tmp_path / "back", layout="gpt-oss-original")
    want, found = (load_file(tmp_path / n / "model.safetensors") for n in ("q", "back"))
    assert set(want) == set(found)
    assert all(torch.equal(want[n], found[n]) for n in want)


def test_namings_do_not_mix(original, tmp_path):
    source, _ = original
    with pytest.raises(
        ValueError,
        match=r"block\.0\.mlp\.mlp1_weight is not named as layout gpt-oss names experts.*use gpt-oss-original",
    ):
        mq.quantize_checkpoint(source, tmp_path / "q", mk.MXFP4, layout="gpt-oss")
    assert not (tmp_path / "q").exists()
    ref = WeightRef("model.layers.0.mlp.experts.down_proj", "fused_expert", (E, H, I), mk.MXFP4)
    with pytest.raises(ValueError, match=r"is not named as layout gpt-oss-original names experts.*use gpt-oss"):
        LAYOUTS["gpt-oss-original"].plan(ref)
