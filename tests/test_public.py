"""What is public: ``__all__`` is complete and documented (ruff keeps it sorted); versions agree with the metadata."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import inspect

import pytest

PACKAGES = ("mx_kernels", "mx_quant", "mx_moe")


@pytest.mark.parametrize("name", PACKAGES)
def test_all(name):
    package = pytest.importorskip(name)
    assert len(set(package.__all__)) == len(package.__all__)
    for item in package.__all__:
        assert hasattr(package, item), f"{name}.__all__ names {item}, which is not there"
    public = {k for k, v in vars(package).items() if not k.startswith("_") and not inspect.ismodule(v)}
    assert public - {"annotations"} == {n for n in package.__all__ if not inspect.ismodule(getattr(package, n))}


@pytest.mark.parametrize("name", PACKAGES)
def test_documented(name):
    package = pytest.importorskip(name)
    for item in package.__all__:
        value = getattr(package, item)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), f"{name}.{item} has no docstring"
            if inspect.isclass(value):
                for attr, member in vars(value).items():
                    if not attr.startswith("_") and inspect.isfunction(member):
                        assert inspect.getdoc(getattr(value, attr)), f"{name}.{item}.{attr} has no docstring"


@pytest.mark.parametrize("name", PACKAGES)
def test_typed_and_versioned(name):
    pytest.importorskip(name)
    version = importlib.metadata.version(name.replace("_", "-"))
    assert version.count(".") == 2
    files = importlib.resources.files(importlib.import_module(name))
    assert (files / "py.typed").is_file()
