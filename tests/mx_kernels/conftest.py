"""The ``aot``, ``native`` and ``pieces`` fixtures: modules beside this file (they import Triton, so they are loaded only where a test
asks).

``interpreted(code)`` runs code in this folder in Triton's interpreter, which a process has for all kernels or for none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _load(name):
    pytest.importorskip("triton")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def interpreted():
    """What is run has to print "right" and nothing else."""
    pytest.importorskip("triton")

    def run(code):
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.stdout.strip() == "right", done.stderr[-2000:]

    return run


@pytest.fixture(scope="session")
def aot():
    return _load("aot")


@pytest.fixture(scope="session")
def native(aot):
    return _load("native")


@pytest.fixture(scope="session")
def pieces():
    return _load("pieces")
