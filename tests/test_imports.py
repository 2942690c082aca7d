"""The arrows of the house: mx_moe -> mx_quant -> mx_kernels -> torch; Triton in the kernel files only; imports do nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("mx_kernels", "mx_quant", "mx_moe")
FILES = sorted(p for name in ORDER for p in (ROOT / "packages").glob(f"mx-*/src/{name}/**/*.py"))
pytestmark = pytest.mark.skipif(not FILES, reason="needs the source tree")


def _package(path: Path) -> str:
    return path.relative_to(ROOT / "packages").parts[2]


def _imports(path: Path) -> list[str]:
    """Absolute modules that a file imports, at any depth of it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "packages")))
def test_arrows(path):
    own = _package(path)
    for module in _imports(path):
        top = module.split(".")[0]
        if top in ORDER:
            assert ORDER.index(top) <= ORDER.index(own), f"{path.name} of {own} imports {module}"
            if top != own:
                assert module == top, f"{path.name} imports {module}: across packages only through __init__"
        if top == "triton":
            assert own == "mx_kernels", f"{path.name} imports triton outside mx_kernels"
            assert path.parent.name == "kernels", f"{path.name} imports triton outside mx_kernels/kernels"


@pytest.mark.parametrize("name", ORDER)
def test_import_does_nothing(name):
    """No Triton, no transformers, no device context, no environment variable of ours, and no output."""
    code = f"""
import os, sys
import torch
read = []
real = os.environ.__class__.__getitem__
def spy(self, key):
    read.append(key)
    return real(self, key)
before = set(sys.modules)
os.environ.__class__.__getitem__ = spy
import {name}
os.environ.__class__.__getitem__ = real
heavy = {{"triton", "transformers", "matplotlib", "safetensors.torch"}} & (set(sys.modules) - before)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert not read, read
"""
    if name not in sys.modules:
        pytest.importorskip(name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
