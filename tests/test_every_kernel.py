"""The script that memory checkers run launches every Triton kernel that there is."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "every_kernel.py"
SOURCES = sorted((ROOT / "packages" / "mx-kernels" / "src" / "mx_kernels" / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("every_kernel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(path: Path) -> set[str]:
    """The kernels of a file: its jit functions that are named so."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            found |= {node.name} if node.name.endswith("_kernel") else set()
    return found


@pytest.mark.skipif(not SOURCES, reason="needs the source tree")
def test_each_kernel_has_a_part(script):
    there = {(path.stem, name) for path in SOURCES for name in launched(path)}
    listed = [(m, name) for modules in script.PARTS.values() for m, names in modules.items() for name in names]
    assert len(there) > 10
    assert set(listed) == there
    assert len(listed) == len(there), "a kernel is listed twice"


@pytest.mark.skipif(not SOURCES, reason="needs the source tree")
def test_each_kernel_is_compiled_ahead_of_time():
    """Some file of compile tests names it, or compiles all that its module plans to launch."""
    texts = [path.read_text() for path in (ROOT / "tests" / "mx_kernels").glob("*.py")]
    compiling = "".join(text for text in texts if "compile_kernel(" in text)
    for path in SOURCES:
        for name in launched(path):
            assert f".{name}" in compiling or f"{path.stem}.plan" in compiling, f"no compile test for {name}"


def test_a_part_that_is_not_there():
    done = subprocess.run([sys.executable, SCRIPT, "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown parts ['everything']; there are quantize, activate" in done.stderr


def test_a_kernel_that_did_not_run_is_an_error(script, monkeypatch):
    from types import SimpleNamespace

    cache = {}
    kernel = SimpleNamespace(device_caches={0: (cache, {}, None)})
    monkeypatch.setattr(script.importlib, "import_module", lambda name: SimpleNamespace(_x_kernel=kernel))
    with pytest.raises(AssertionError, match=r"x did not launch m\._x_kernel"):
        script.check_compiled("x", {"m": ("_x_kernel",)})
    cache["key"] = "compiled"
    script.check_compiled("x", {"m": ("_x_kernel",)})


@pytest.mark.gpu
def test_it_runs():
    subprocess.run([sys.executable, SCRIPT], check=True)
