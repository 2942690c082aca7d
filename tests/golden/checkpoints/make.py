"""Write the small checkpoints of this folder with the tools themselves: ``python make.py compressed-tensors|modelopt|quark [OUT]``.

Each run needs that tool and transformers (versions: README.md). Every checkpoint is one layer with seeded weights whose rows differ
by powers of two, with zero blocks and zeros of both signs. Beside the tool's files stands expected.safetensors: each quantized weight
as the tool's own code decodes it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

COMMON = {
    "vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "qwen3": lambda: Qwen3Config(**COMMON, intermediate_size=32, architectures=["Qwen3ForCausalLM"]),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **COMMON, intermediate_size=32, moe_intermediate_size=32, num_experts=2, num_experts_per_tok=1,
        architectures=["Qwen3MoeForCausalLM"],
    ),
    "mixtral": lambda: MixtralConfig(
        **COMMON, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, architectures=["MixtralForCausalLM"]
    ),
    "gpt-oss": lambda: GptOssConfig(
        **COMMON, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        architectures=["GptOssForCausalLM"],
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                continue
            rows = 2.0 ** torch.randint(-6, 3, (*p.shape[:-1], 1)).to(p.dtype)
            p.copy_(torch.randn(p.shape).to(p.dtype) * rows)
            p[..., 0, :16] = 0.0
            p[..., 1, 1] = -0.0
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def finish(folder: Path, expected: dict[str, torch.Tensor], tool: str, version: str) -> None:
    for extra in list(folder.iterdir()):
        if extra.is_dir():
            shutil.rmtree(extra)
        elif extra.name not in ("config.json", "hf_quant_config.json", "model.safetensors"):
            extra.unlink()
    metadata = {"tool": tool, "version": version, "torch": torch.__version__}
    save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors", metadata=metadata)
    print(folder.name, sum(f.stat().st_size for f in folder.iterdir()), "bytes", len(expected), "weights")


def compressed_tensors(out: Path) -> None:
    import compressed_tensors as ct
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    for preset in ("MXFP4A16", "MXFP6A8", "MXFP8", "NVFP4A16", "NVFP4"):
        model = build("qwen3")
        scheme = preset_name_to_scheme(preset, ["Linear"])
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for name, module in model.named_modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            w, args = module.weight.data, module.quantization_scheme.weights
            blocks = w.unflatten(-1, (-1, args.group_size))
            g = None
            if hasattr(module, "weight_global_scale"):
                g = generate_gparam(w.min(), w.max())
                module.weight_global_scale.data = g
            scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=g)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            if hasattr(module, "input_global_scale"):
                seed = sum(map(ord, name))
                module.input_global_scale.data = torch.tensor([2688.0 / (1 + seed % 7)])
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        folder = out / f"compressed-tensors-{preset.lower()}"
        model.save_pretrained(folder)
        compressor.update_config(folder)
        kind = json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
        stored, expected = tensors_of(folder), {}
        for name in stored:
            if name.endswith(".weight_scale"):
                module = name.removesuffix("weight_scale")
                state = {n.removeprefix(module): t for n, t in stored.items() if n.startswith(module)}
                done = BaseCompressor.get_value_from_registry(kind).decompress(state, scheme)
                expected[module + "weight"] = done["weight"].data
        finish(folder, expected, "compressed-tensors", ct.__version__)


def modelopt(out: Path) -> None:
    import modelopt
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    def calibrate(model):
        for ids in (torch.arange(16), torch.arange(15, -1, -1), torch.arange(16) // 2):
            model(ids[None])

    for name, kind in (
        ("qwen3-moe", "NVFP4_DEFAULT_CFG"), ("qwen3-moe", "MXFP8_DEFAULT_CFG"), ("mixtral", "NVFP4_DEFAULT_CFG"),
        ("gpt-oss", "NVFP4_DEFAULT_CFG"), ("qwen3", "W4A16_NVFP4_CFG"),
    ):  # fmt: skip
        model = mtq.quantize(build(name), getattr(mtq, kind), calibrate)
        short = kind.lower().removesuffix("_cfg").removesuffix("_default").replace("_", "-")
        folder = out / f"modelopt-{short}-{name}"
        export_hf_checkpoint(model, export_dir=folder)
        stored, expected = tensors_of(folder), {}
        for n, data in stored.items():
            if data.dtype not in (torch.uint8, torch.float8_e4m3fn) or n.endswith("_scale"):
                continue
            prefix = n if n.endswith(".weight") else f"{n}_weight"
            scale, transposed = stored[f"{prefix}_scale"], data.ndim == 3
            if transposed:
                data, scale = data.transpose(-1, -2).contiguous(), scale.transpose(-1, -2).contiguous()
            if data.dtype == torch.uint8:
                g = stored[f"{prefix}_scale_2"]
                shape = torch.Size((*data.shape[:-1], 2 * data.shape[-1]))
                q = NVFP4QTensor(shape, torch.float32, data)
                w = q.dequantize(torch.float32, scale=scale, double_scale=g, block_sizes={-1: 16})
            else:
                w = MXFP8QTensor(data.shape, torch.bfloat16, data).dequantize(scale=scale)
            expected[n] = w
        finish(folder, expected, "nvidia-modelopt", modelopt.__version__)


def quark(out: Path) -> None:
    from importlib.metadata import version

    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config import config as q
    from quark.torch.utils.pack import create_pack_method

    for kind in ("OCP_MXFP4Spec", "OCP_MXFP6E2M3Spec", "OCP_MXFP6E3M2Spec"):
        spec = getattr(q, kind)(ch_axis=-1, is_dynamic=False).to_quantization_spec()
        config = q.QConfig(global_quant_config=q.QLayerConfig(weight=spec), exclude=["lm_head"])
        model = ModelQuantizer(config).quantize_model(build("qwen3"), [torch.arange(16)[None]])
        model = ModelQuantizer.freeze(model)
        folder = out / f"quark-{kind.removeprefix('OCP_').removesuffix('Spec').lower()}"
        export_safetensors(model, folder)
        stored, expected = tensors_of(folder), {}
        dtype = json.loads((folder / "config.json").read_text())["quantization_config"]["global_quant_config"]["weight"]
        for n, data in stored.items():
            if data.dtype == torch.uint8 and n.endswith(".weight"):
                codes = create_pack_method("per_group", dtype["dtype"]).unpack(data, reorder=True)
                scale = (stored[f"{n}_scale"].float() - 127).exp2()
                w = (codes.float().unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2)
                expected[n] = w.bfloat16()  # exact
        finish(folder, expected, "amd-quark", version("amd-quark"))


if __name__ == "__main__":
    tool = {"compressed-tensors": compressed_tensors, "modelopt": modelopt, "quark": quark}[sys.argv[1]]
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    target.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        tool(target)
