"""The ``aot`` and ``native`` fixtures: modules beside this file (they import Triton, so they are loaded only where a test asks)."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture(scope="session")
def aot():
    return _load("aot")


@pytest.fixture(scope="session")
def native(aot):
    return _load("native")
