"""Measured rows: where one is used instead of the model, and that tune.py's writer and reader agree."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk
from mx_kernels import tuned
from mx_kernels.tuned import Row, Run, class_of, distance, nearest
from mx_kernels.tuning import Config, Problem, choose_config

RUN = Run("H200", 132, "2.11.0", "3.6.0", "2026-11-25")
P = Problem("e2m1", 32, 4096, 128, 5760, 2880)
ODD = Config(64, 128, 64, 8, 2, levels=3)
"""Nothing that the model would choose."""

configs = st.builds(
    Config,
    pairs=st.sampled_from([16, 64, 256]),
    rows=st.sampled_from([64, 128]),
    step=st.sampled_from([64, 128]),
    warps=st.sampled_from([4, 8]),
    stages=st.integers(2, 4),
    split=st.sampled_from([1, 4]),
    levels=st.integers(1, 3),
    mask=st.booleans(),
    evict=st.sampled_from(["", "evict_first"]),
)
problems = st.builds(
    Problem,
    element=st.sampled_from(["", "e2m1", "e4m3"]),
    block=st.sampled_from([16, 32]),
    num_pairs=st.integers(1, 1 << 17),
    num_experts=st.integers(1, 256),
    n=st.integers(1, 512).map(lambda v: 16 * v),
    k=st.integers(1, 512).map(lambda v: 32 * v),
)


@pytest.fixture
def rows(monkeypatch):
    """Put rows in the place of the shipped ones, and a device in that of this machine's."""

    def put(*rows: Row, place: tuple[str, int] = ("H200", 132)) -> None:
        monkeypatch.setattr(tuned, "ROWS", rows)
        monkeypatch.setattr(tuned, "RUNS", (RUN,))
        monkeypatch.setattr(tuned, "place", lambda device: place)
        tuned._row.cache_clear()

    yield put
    tuned._row.cache_clear()


CUDA = torch.device("cuda", 0)


def test_a_row_serves_its_problem_and_near_ones(rows):
    rows(Row(0, P, 64, ODD, 100.0, 120.0))
    for p in (
        P,
        replace(P, num_pairs=5000),
        replace(P, n=5120, k=3072),
        replace(P, num_pairs=4096 * 2, num_experts=256),
    ):
        if distance(p, P) <= tuned.NEAR:
            assert tuned.config_for(p, 64, CUDA) == ODD
            assert tuned.block_for(p, CUDA) == 64
    assert tuned.config_for(P, 32, CUDA) == choose_config(P, 32), "another block size is another question"


@pytest.mark.parametrize(
    "far",
    [
        replace(P, num_pairs=4096 * 2),
        replace(P, n=2880),
        replace(P, k=768),
        replace(P, element="e4m3"),
        replace(P, block=16),
        replace(P, num_experts=32),
    ],
)
def test_far_problems_follow_the_model(rows, far):
    rows(Row(0, P, 64, ODD, 100.0, 120.0))
    assert distance(far, P) > tuned.NEAR
    assert tuned.config_for(far, 64, CUDA) == choose_config(far, 64)


@pytest.mark.parametrize("place", [("H100", 132), ("H200", 114), ("", 0)])
def test_rows_of_other_devices_do_not_count(rows, place):
    rows(Row(0, P, 64, ODD, 100.0, 120.0), place=place)
    assert tuned.config_for(P, 64, CUDA) == choose_config(P, 64)
    assert tuned.block_for(P, CUDA) == 64


def test_the_nearest_row_counts(rows):
    near, nearer = replace(P, num_pairs=5200), replace(P, num_pairs=4400)
    rows(Row(0, near, 64, ODD, 1.0, 2.0), Row(0, nearer, 64, replace(ODD, stages=3), 1.0, 2.0))
    assert tuned.config_for(P, 64, CUDA).stages == 3
    assert tuned.config_for(near, 64, CUDA).stages == 2


def test_a_row_that_does_not_fit_is_left(rows):
    huge = replace(ODD, rows=256, step=128, stages=8)
    rows(Row(0, P, 64, huge, 1.0, 2.0))
    assert tuned.config_for(P, 64, CUDA) == choose_config(P, 64)
    fine = Problem("e2m1", 32, 4, 128, 5760, 448)
    rows(Row(0, fine, 16, Config(16, 128, 128, 4, 3, split=4), 1.0, 2.0))
    assert tuned.config_for(fine, 16, CUDA).split == 4
    assert tuned.config_for(replace(fine, k=384), 16, CUDA) == choose_config(replace(fine, k=384), 16)


def test_the_alignment_of_a_layer_asks_the_rows(rows):
    w = mk.pack(mk.quantize(torch.randn(128, 32, 64), mk.MXFP4))
    assert mk.block_size(2048, 128, "cuda", w) == 32
    rows(Row(0, w.problem(2048, 128), 128, ODD, 1.0, 2.0))
    assert mk.block_size(2048, 128, "cuda", w) == 128
    assert mk.block_size(2048, 128, "cpu", w) == 16


def test_a_row_counts_where_the_model_takes_the_blocks_it_was_measured_against(rows):
    w = mk.pack(mk.quantize(torch.randn(128, 32, 64), mk.MXFP4))
    rows(Row(0, w.problem(20 * 128, 128), 128, ODD, 1.0, 2.0))
    assert mk.block_size(24 * 128, 128, "cuda", w) == 128
    assert mk.block_size(26 * 128, 128, "cuda", w) == 64  # near, but the model has changed its mind


@given(problems, problems)
@settings(max_examples=200, deadline=None)
def test_distance_is_one(a, b):
    assert distance(a, a) == 0
    assert distance(a, b) == distance(b, a) or math.isclose(distance(a, b), distance(b, a))
    if (a.num_pairs <= 64) != (b.num_pairs <= 64):
        assert distance(a, b) == math.inf


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 5090"),
        ("Intel(R) Data Center GPU Max 1550", "Intel(R) Data Center GPU Max 1550"),
    ],
)
def test_class_of_a_device(name, short):
    assert class_of(name) == short


def test_shipped_rows():
    """Each is of a run, legal, the only one for its problem and blocks, and in the order that the writer gives."""
    assert {r.run for r in tuned.ROWS} == set(range(len(tuned.RUNS)))
    keys = [(tuned.RUNS[r.run].device, tuned.RUNS[r.run].units, *vars(r.problem).values()) for r in tuned.ROWS]
    assert keys == sorted(set(keys))
    for row in tuned.ROWS:
        assert tuned.legal(row.config, row.problem, 232448)
        assert (
            nearest(row.problem, (tuned.RUNS[row.run].device, tuned.RUNS[row.run].units), None, tuned.ROWS, tuned.RUNS)
            == row
        )


# --- the writer ---


@pytest.fixture(scope="module")
def writer():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("tune_rows")
    sys.path.remove(folder)


def result(measured: list[Problem], rows: list[tuple[Problem, Config]], date: str = "2026-11-25") -> dict:
    where = {"device": "NVIDIA H200", "units": 132, "torch": "2.11.0", "triton": "3.6.0", "date": date}
    made = [{"problem": asdict(p), "block": c.pairs, "config": asdict(c), "us": 1.5, "model_us": 2.25} for p, c in rows]
    return {"where": where, "measured": [asdict(p) for p in measured], "rows": made}


@given(st.lists(st.tuples(problems, configs), max_size=6, unique_by=lambda pair: pair[0]))
@settings(max_examples=50, deadline=None)
def test_what_is_written_reads_the_same(writer, found):
    made = writer.merge((), (), [result([p for p, _ in found], found)])
    source = Path(tuned.__file__).read_text()
    written = writer.render(*made, into=source)
    names = {"Config": Config, "Problem": Problem, "Row": Row, "Run": Run}
    tables = written[written.index("# fmt: off") : written.index("# fmt: on")]
    exec(tables, names)
    assert (names["RUNS"], names["ROWS"]) == made
    assert writer.render(*made, into=written) == written
    assert all(len(line) <= 120 for line in tables.splitlines())
    assert {(r.problem, r.config) for r in made[1]} == set(found)


def test_new_measurements_replace_old_ones(writer):
    q = replace(P, n=2880)
    old = writer.merge((), (), [result([P, q], [(P, ODD), (q, ODD)], "2026-11-01")])
    runs, rows = writer.merge(*old, [result([P], [], "2026-11-25")])
    assert [(runs[r.run].date, r.problem) for r in rows] == [("2026-11-01", q)], "the model became as good for P"
    runs, rows = writer.merge(*old, [result([P], [(P, replace(ODD, stages=3))], "2026-11-25")])
    assert {r.problem: (runs[r.run].date, r.config.stages) for r in rows} == {
        P: ("2026-11-25", 3),
        q: ("2026-11-01", 2),
    }
    other = result([P], [], "2026-11-25")
    other["where"]["device"] = "NVIDIA H100 80GB HBM3"
    assert writer.merge(*old, [other]) == old


def test_the_writer_knows_its_file(writer):
    with pytest.raises(ValueError, match="fmt: off"):
        writer.render((), (), into="x = 1\n")
