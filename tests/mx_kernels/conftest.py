"""The ``aot`` fixture: the module ``aot.py`` beside this file (it imports Triton, so it is loaded only where a test asks)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def aot():
    pytest.importorskip("triton")
    if "aot" not in sys.modules:
        spec = importlib.util.spec_from_file_location("aot", Path(__file__).with_name("aot.py"))
        sys.modules["aot"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["aot"])
    return sys.modules["aot"]
