"""Which kernels of a layer start before the one in front of them has ended, and that the one in front lets them."""

from __future__ import annotations

import importlib
import itertools

import pytest

from . import test_moe, test_rebased_moe
from .test_moe import Ledger


@pytest.fixture
def kernels():
    """Modules of launches, in which nothing of a test is remembered."""
    pytest.importorskip("triton")
    names = ("launch", "align", "combine", "rebased", "grouped_gemm", "moe")
    found = {name: importlib.import_module(f"mx_kernels.kernels.{name}") for name in names}

    def forget():
        for plan in (
            found["align"].plan,
            found["combine"].plan,
            found["rebased"].plan_product,
            found["rebased"].plan_rows,
        ):
            plan.cache_clear()
        found["grouped_gemm"]._plans.clear()
        found["moe"]._plans.clear()

    forget()
    yield found
    forget()


def early(run):
    return bool(run.options.get("launch_pdl"))


def lets(run):
    """Whether a kernel lets the next one start before it has ended, or None where it cannot."""
    names = run.kernel.arg_names
    return dict(zip(names[len(names) - len(run.values) :], run.values, strict=True)).get("PDL")


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 5, 40, 300, 2048, 2049])
@pytest.mark.parametrize("kind", ["mxfp4", "bf16", "rebased"])
def test_who_starts_early_and_who_lets_it(kernels, monkeypatch, kind, tokens):
    """All kernels of a few pairs, but for products that would be placed badly; of many the alignment's last two."""
    make = test_rebased_moe if kind == "rebased" else test_moe
    layer = make.make_layer() if kind == "rebased" else make.make_layer(kind)
    ledger = Ledger(monkeypatch)
    launch = kernels["launch"]
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, pdl=True))
    make.steps(layer, *test_moe.make_input(tokens), *((True,) if kind == "rebased" else ()))
    runs = [run for run, _ in ledger.take()]
    for run in runs:
        assert not early(run) or lets(run)
    for front, behind in itertools.pairwise(runs):
        assert not early(behind) or lets(front)
    few = tokens * test_moe.K <= 8192
    assert early(runs[-1]) == few
    products = [run for run in runs if "grouped_gemm" in run.kernel.__name__]
    assert len(products) == 2
    assert all(lets(run) == few for run in products)
    aligned = [run for run in runs if run.kernel.__name__ in ("_scan_kernel", "_place_kernel")]
    assert all(map(early, aligned))
