"""``toy_models`` and ``checkpoints``, the modules of these names beside this file, for the tests here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if importlib.util.find_spec("mx_quant") is not None:
    _load("toy_models")


@pytest.fixture(scope="session")
def checkpoints():
    return _load("checkpoints")
