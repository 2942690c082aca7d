"""Seeds, the gpu marker, and uninitialized memory that shows: every ``torch.empty`` is filled with NaN or the largest integer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a process may recompile a function eight times, and tests share some
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # workers of pytest-xdist share the device


def pytest_collection_modifyitems(config, items):
    has_triton = importlib.util.find_spec("triton") is not None
    has_gpu = has_triton and (torch.cuda.is_available() or torch.xpu.is_available())
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU with Triton"))
        if "compile" in item.keywords and not has_triton:
            item.add_marker(pytest.mark.skip(reason="needs Triton (nox -s compile installs it)"))
