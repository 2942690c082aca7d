"""Which kernels of a layer start before the one in front of them has ended, that the one in front lets them, and which ask for weights
meanwhile; launches of one kernel with several numbers."""

from __future__ import annotations

import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import mx_kernels as mk

from . import test_moe, test_rebased_moe
from .test_moe import Ledger, number


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
@pytest.mark.parametrize("tokens", [1, 40, 300, 2049, 4097])
@pytest.mark.parametrize("kind", ["mxfp4", "bf16", "rebased", "rebased_mxfp8"])
def test_who_asks_for_weights(kernels, monkeypatch, kind, tokens):
    """A layer's GEMM 2, and re-based products, which do not follow the alignment; none of MXFP4, none of the steps one by one."""
    rebased = kind.startswith("rebased")
    make = test_rebased_moe if rebased else test_moe
    layer = make.make_layer(mk.MXFP8 if kind == "rebased_mxfp8" else mk.MXFP4) if rebased else make.make_layer(kind)
    ledger = Ledger(monkeypatch)
    launch = kernels["launch"]
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, pdl=True))
    given = test_moe.make_input(tokens)
    make.steps(layer, *given, *((True,) if rebased else ()))
    alone = [number(run, "ahead") for run, _ in ledger.take() if "grouped_gemm" in run.kernel.__name__]
    assert layer.launch(*given) is not None
    one, two = (number(run, "ahead") for run, _ in ledger.take() if "grouped_gemm" in run.kernel.__name__)
    few = tokens * test_moe.K <= launch.PDL_PAIRS["rebased" if rebased else "product"]
    assert alone == [0, 0]
    assert (one, two) == (few and kind == "rebased_mxfp8", few and kind != "rebased")


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 40, 300, 2049, 4097])
@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_who_waits_for_blocks(kernels, monkeypatch, kind, tokens):
    """A layer's GEMM 2, for those that its GEMM 1 counts: where the alignment has written zeros, or among counters where there is none.
    Nobody in the steps one by one, nor where products do not start early."""
    layer = test_moe.make_layer(kind)
    ledger = Ledger(monkeypatch)
    launch = kernels["launch"]
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, pdl=True))
    monkeypatch.setattr(kernels["grouped_gemm"], "overlaps", lambda streamed, programs, units: True)
    given = test_moe.make_input(tokens)
    test_moe.steps(layer, *given)
    alone = [number(run, "flow") for run, _ in ledger.take() if "grouped_gemm" in run.kernel.__name__]
    assert alone == [0, 0]
    assert layer.launch(*given) is not None
    calls = ledger.take()
    one, two = ((run, places) for run, places in calls if "grouped_gemm" in run.kernel.__name__)
    led, aligned = tokens * test_moe.K <= launch.PDL_PAIRS["product"], tokens * test_moe.K > 64
    assert (number(one[0], "flow"), number(two[0], "flow")) == ((-1, 2 * test_moe.I // 128) if led else (0, 0))
    names = one[0].kernel.arg_names
    done = [places[names.index("done")] for _, places in (one, two)]
    if led:
        assert done[0] == done[1]
        split = [places[names.index("counter")] for run, places in (one, two) if number(run, "SPLIT") > 1]
        assert len({*split}) == len(split)  # each has its own, as they run at a time
        assert done[0] not in split
    total, places = calls[-1]
    clears = tokens * test_moe.K if led and not aligned else 0
    assert number(total, "clears") == clears
    if clears:
        assert places[total.kernel.arg_names.index("done")] == done[0]
    if led and aligned:
        fills = next((run, places) for run, places in calls if "zeros" in run.kernel.arg_names)
        zeros = fills[1][fills[0].kernel.arg_names.index("zeros")]
        assert number(fills[0], "ZEROS")
        assert zeros not in fills[1][-3:]
        assert done[0] == zeros


@pytest.mark.compile
def test_launches_of_one_kernel(kernels, monkeypatch):
    """They are compiled together, whichever was made first; each has its numbers."""
    launch, taken = kernels["launch"], []
    kernel = SimpleNamespace(arg_names=["x", "n", "ahead", "BLOCK"])
    monkeypatch.setattr(
        launch, "DriverLaunch", lambda made, grid, given, values, room: taken.append((given, values, room))
    )
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, shared=232448))
    run = launch.Launch(kernel, (7,), torch.device("cpu"), 5, 0, BLOCK=16, most=2)
    first = run.having(ahead=1)
    second = first.having(n=6)
    run._take("kernel", [512])
    third = run.having(n=7)
    launches = run, first, second, third
    assert [launch.values for launch in launches] == [(5, 0, 16), (5, 1, 16), (6, 1, 16), (7, 0, 16)]
    assert run.having(ahead=1) is first
    assert run.others == [first, third]
    assert [launch.compiled for launch in launches] == ["kernel"] * 4
    assert [values for _, values, _ in taken] == [launch.values for launch in launches]
    assert {(*given, room) for given, _, room in taken} == {(512, launch.apart(run.device, 2))}
    with pytest.raises(AssertionError):
        run.having(x=1)


@pytest.mark.compile
def test_kernels_compile_together_whatever_mode_the_caller_is_in(kernels):
    """Each by a thread of the mode that is made for them, which is not the caller's."""
    triton = pytest.importorskip("triton")
    mode = importlib.import_module("triton.runtime._async_compile").active_mode
    seen = []

    def warmup(*given, **options):
        assert isinstance(mode.get(), triton.AsyncCompileMode)
        seen.append((given, options, mode.get()))

    def launch(value, compiled=None):
        kernel = SimpleNamespace(warmup=warmup)
        boxes = ((1, lambda address: ("described", address)),)
        return SimpleNamespace(
            kernel=kernel, values=(value,), boxes=boxes, grid=(2,), options={"o": 1}, compiled=compiled
        )

    runs = [(launch(i, compiled), ("bf16", "i32", None)) for i, compiled in ((1, None), (2, None), (3, object()))]
    with ThreadPoolExecutor(1) as threads, triton.AsyncCompileMode(threads) as outer:
        kernels["launch"].compile_together(runs)
        assert mode.get() is outer
    assert [(given, options) for given, options, _ in seen] == [
        (("bf16", ("described", 0), None, value), {"grid": (2,), "o": 1}) for value in (1, 2)
    ]
    assert len({id(used) for _, _, used in seen}) == 1
    assert seen[0][2] is not outer
    kernels["launch"].compile_together(runs[1:])  # one that is not compiled yet: nobody to compile with
    assert len(seen) == 2


@pytest.mark.compile
@pytest.mark.parametrize("shared", [232448, 101376])
def test_apart(kernels, monkeypatch, shared):
    """So many programs fit a multiprocessor, and no more."""
    launch = kernels["launch"]
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, shared=shared))
    for most in (1, 2, 3, 4):
        each = launch.apart(torch.device("cpu"), most) + 1024
        assert (shared + 1024) // each == most
    assert launch.apart(torch.device("cpu"), 0) == 0


@pytest.mark.gpu
def test_shared_memory_of_a_program(kernels):
    if torch.cuda.get_device_capability() == (9, 0):
        assert kernels["launch"].target(torch.device("cuda", 0)).shared == 227 << 10


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 5, 40, 300, 2048, 2049, 4097])
@pytest.mark.parametrize("kind", ["mxfp4", "bf16", "rebased"])
def test_who_starts_early_and_who_lets_it(kernels, monkeypatch, kind, tokens):
    """All kernels of a few pairs, but for products whose programs are few and uneven; of many the alignment's last two."""
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
    assert early(runs[-1]) == (tokens * test_moe.K <= 8192)
    few = tokens * test_moe.K <= launch.PDL_PAIRS["rebased" if kind == "rebased" else "product"]
    products = [run for run in runs if "grouped_gemm" in run.kernel.__name__]
    assert len(products) == 2
    assert all(lets(run) == few for run in products)
    aligned = [run for run in runs if run.kernel.__name__ in ("_scan_kernel", "_place_kernel")]
    assert all(map(early, aligned))
