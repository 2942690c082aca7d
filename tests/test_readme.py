"""The READMEs tell the truth: their Python runs, their tables are what the oracle says, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mx_kernels as mk

ROOT = Path(__file__).parent.parent
READMES = [p for p in (ROOT / "README.md", *sorted((ROOT / "packages").glob("mx-*/README.md"))) if p.is_file()]
ARCHITECTURES = ("cpu", "sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950", "gfx1250", "xpu")
pytestmark = pytest.mark.skipif(not READMES, reason="needs the source tree")


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def hardware_table() -> str:
    """Markdown: the backend that the oracle takes, for each format and architecture."""
    import mx_moe as mm

    choices = {arch: mm.explain(mk.Device.fake(arch)) for arch in ARCHITECTURES}
    lines = ["| | " + " | ".join(ARCHITECTURES) + " |", "|---" * (len(ARCHITECTURES) + 1) + "|"]
    for name in next(iter(choices.values())):
        lines.append(f"| {name} | " + " | ".join(choices[arch][name]["backend"] for arch in ARCHITECTURES) + " |")
    return "\n".join(lines)


def native_row() -> str:
    """The row of mx-moe's table of backends that says where native experts run."""
    where = [name for name, a in mk.ARCHITECTURES.items() if a.native]
    return f"| native | quantized inputs and weights go into block-scaled matrix instructions | {', '.join(where)} |"


TABLES = {  # file -> what replaces the lines that match
    ROOT / "README.md": (r"^\| \| cpu .*(\n\|.*)*", hardware_table),
    ROOT / "packages/mx-moe/README.md": (r"^\| native \|.*", native_row),
}


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.parent.name)
def test_generated_tables(path):
    pytest.importorskip("mx_moe")
    want = TABLES[path][1]()
    assert want in path.read_text(), f"run nox -s native, which writes\n{want}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.parent.name)
def test_python_runs(path, tmp_path, monkeypatch):
    """Every Python block of a README runs, in order, in one namespace that holds what a reader would have."""
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(path, "python")
    if any("mx_quant" in b or "mx_moe" in b for b in blocks):
        pytest.importorskip("mx_moe")
    experts, hidden, width = 8, 64, 96
    checkpoint = tmp_path / "bf16-checkpoint"
    space = {
        "weight": torch.randn(128, 64, dtype=torch.bfloat16),
        "x": torch.randn(4, 64, dtype=torch.bfloat16),
        "w13": torch.randn(experts, 2 * width, hidden, dtype=torch.bfloat16),
        "w2": torch.randn(experts, hidden, width, dtype=torch.bfloat16),
        "logits": torch.randn(4, experts),
        "model": torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)).bfloat16(),
    }
    if any("bf16-checkpoint" in b for b in blocks):
        _write_checkpoint(checkpoint)
    for block in blocks:
        exec(compile(block, str(path), "exec"), space)


def _write_checkpoint(folder: Path) -> None:
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {
        f"model.layers.0.mlp.{n}_proj.weight": torch.randn(64, 64, dtype=torch.bfloat16) for n in ("gate", "up", "down")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64}))


@pytest.mark.parametrize("command", ["mx-quant", "mx-moe"])
def test_commands_of_the_readmes_exist(command):
    """Each subcommand and option that a README shows is known to the command."""
    module = command.replace("-", "_")
    pytest.importorskip(module)
    for path in READMES:
        for line in "\n".join(_blocks(path, "sh")).splitlines():
            words = line.split("#")[0].split()
            if not words or words[0] != command:
                continue
            done = subprocess.run(
                [sys.executable, "-m", module, words[1], "--help"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{path.name} shows {line!r}: {done.stderr}"
            for option in (w for w in words if w.startswith("--")):
                assert option in done.stdout, f"{path.name} shows {option}, which {command} {words[1]} does not know"


if __name__ == "__main__":  # nox -s native
    for file, (pattern, table) in TABLES.items():
        text, count = re.subn(pattern, table(), file.read_text(), flags=re.M)
        assert count == 1, f"{file} has {count} places for its table"
        file.write_text(text)
