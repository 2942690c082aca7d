"""The ``checkpoints`` fixture: the module ``checkpoints.py`` beside this file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints():
    if "checkpoints" not in sys.modules:
        spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("checkpoints.py"))
        sys.modules["checkpoints"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["checkpoints"])
    return sys.modules["checkpoints"]
