"""The benchmarks' own logic, as far as it needs no GPU: results are read, merged, compared and written as they say."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")


@pytest.fixture(scope="module")
def bench():
    """Import a module of benchmarks/ by name."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def report(bench):
    return bench("report")


def cell(name: str, us: float, tokens: int = 4, **more: object) -> dict:
    return {
        "name": name, "shape": "qwen3-30b-a3b", "format": "mxfp4", "tokens": tokens, "routing": "uniform", "us": us,
        "error": 3e-3, "distinct": 28.9, "ours": name.startswith("mx_"), **more,
    }  # fmt: skip


WHERE = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-25",
         "ceilings": {"read_gb_s": 4000.0, "copy_gb_s": 3900.0, "matmul_tflops": 700.0}}  # fmt: skip


def run_of(tmp_path: Path, name: str, cells: list[dict], **where: str) -> Path:
    path = tmp_path / name / "moe.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"where": WHERE | where, "cells": cells}))
    return path


def harness(tmp_path: Path, rows: list[dict]) -> Path:
    folder = tmp_path / "harness"
    folder.mkdir()
    ceilings = {
        "device": "NVIDIA H200",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "read_gbps": 4000.0,
        "copy_gbps": 3900.0,
        "bf16_tflops": 700.0,
    }
    (folder / "micro.json").write_text(json.dumps({"ceilings": ceilings}))
    (folder / "card.txt").write_text("NVIDIA H200, 580\n2026-11-25\n")
    (folder / "time.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def measured(peer: str, us: float, fmt: str = "mxfp4", **more: object) -> dict:
    return {"shape": "qwen3-30b-a3b", "peer": peer, "fmt": fmt, "T": 4, "us": us, "err": 4e-3, "ok": True, "distinct": 28.9,
            "mode": "graph", **more}  # fmt: skip


def test_readme_rows_are_the_results(report):
    """README's rows are what the command beside them prints."""
    text = (ROOT / "README.md").read_text()
    folder, shape = re.search(r"run\.py --from (\S+)\s+--readme (\S+?)`", text).groups()
    where, cells = report.load([ROOT / folder])
    rows = report.readme(where, cells, shape)
    assert rows in text, f"README's rows should be\n{rows}"
    names = ("mx_mxfp8_a8_rebased", "mx_mxfp4_a8_rebased", "humming_mxfp8_a8tok", "humming_mxfp4_a8g128")
    us = {c["name"]: round(c["us"]) for c in cells if (c["shape"], c["tokens"]) == (shape, 16384) and "us" in c}
    with_mxfp8_inputs = re.search(r"take (\d+) us with MXFP8 and (\d+) us .*\n.* take (\d+) and (\d+)\.", text).groups()
    assert [int(n) for n in with_mxfp8_inputs] == [us[name] for name in names]


def test_passes_are_averaged_and_compared_with_peers_of_the_same_kind(report, tmp_path):
    one = run_of(
        tmp_path, "a", [cell("mx_mxfp4", 10.0), cell("mx_mxfp4_a8_rebased", 5.0), cell("mx_bf16", 2.0, format="bf16")]
    )
    two = run_of(tmp_path, "b", [cell("mx_mxfp4", 12.0), cell("mx_mxfp4", 1.0, tokens=16)])
    peers = [measured("humming_mxfp4", 22.0), measured("tk_mxfp4_logits", 33.0), measured("humming_mxfp4_a8g128", 4.0)]
    where, cells = report.load([one, two, harness(tmp_path, peers)])
    assert where["device"] == "NVIDIA H200"
    ours = next(c for c in cells if c["name"] == "mx_mxfp4" and c["tokens"] == 4)
    assert ours["us"] == 11.0
    assert ours["passes"] == 2
    assert ours["noise"] == pytest.approx(2 / 11)
    moved = 28.9 * 3 * 2048 * 768 * 4.25 / 8 + 4 * 2048 * 4
    assert ours["floor_us"] == pytest.approx(moved / 4000e9 * 1e6)
    assert ours["share"] == pytest.approx(ours["floor_us"] / 11)
    assert report.speed_up(ours, cells) == 2.0
    assert report.best_peer(ours, cells)["name"] == "humming_mxfp4"
    a8 = next(c for c in cells if c["name"] == "mx_mxfp4_a8_rebased")
    assert report.speed_up(a8, cells) == pytest.approx(0.8)
    assert report.speed_up(next(c for c in cells if c["format"] == "bf16"), cells) is None
    assert report.speed_up(next(c for c in cells if c["tokens"] == 16), cells) is None


def test_failures_of_the_harness_are_shown_and_never_compared(report, tmp_path):
    wrong = {**measured("humming_mxfp4", 1.0), "ok": False, "err": 0.7}
    fails = {"shape": "qwen3-30b-a3b", "peer": "marlin_mxfp4", "fmt": "mxfp4", "T": 4, "fail": "out of memory"}
    skipped = {"shape": "qwen3-30b-a3b", "peer": "tk_mxfp4", "T": 4, "skipped": "deadline"}
    nan = {**measured("tk_mxfp4_logits", 1.0), "ok": False, "err": math.nan}
    rows = [
        wrong,
        fails,
        skipped,
        nan,
        {"done": True},
        measured("mx_mxfp4", 10.0),
        measured("tk_mxfp4_norouting", 15.0),
    ]
    where, cells = report.load([harness(tmp_path, rows)])
    assert {c["name"]: c.get("failed") for c in cells} == {
        "humming_mxfp4": "error 7.0e-01", "marlin_mxfp4": "out of memory", "tk_mxfp4_logits": "error nan",
        "mx_mxfp4": None, "tk_mxfp4_norouting": None,
    }  # fmt: skip
    assert report.speed_up(next(c for c in cells if c["name"] == "mx_mxfp4"), cells) == 1.5
    text = report.markdown(where | {"note": "of an old kernel"}, cells)
    assert "\n\nof an old kernel\n\n" in text
    report.write(where, cells, tmp_path / "out")
    assert "NaN" not in (tmp_path / "out" / "moe.json").read_text()
    assert "out of memory" in text
    assert "1.50 tk_mxfp4_norouting" in text
    assert "2026-11-25; read 4000 GB/s" in text


def test_devices_are_not_mixed(report, tmp_path):
    a, b = run_of(tmp_path, "a", [cell("mx_mxfp4", 1.0)]), run_of(tmp_path, "b", [], device="NVIDIA H100 80GB HBM3")
    with pytest.raises(ValueError, match=r"is of NVIDIA H100 80GB HBM3 and .* of NVIDIA H200"):
        report.load([a, b])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no moe.json and no time\*.jsonl"):
        report.load([tmp_path / "empty"])


def test_everything_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    cells = [
        cell("mx_mxfp4", 10.0),
        cell("mx_mxfp4", 3.0, routing="zipf:1.2", workspace_bytes=1 << 20, weight_bytes=1 << 30),
    ]
    source = run_of(tmp_path, "a", [*cells, cell("mx_mxfp8", 4.0, shape="4096,1536,64,6,silu", format="mxfp8")])
    peer = harness(tmp_path, [measured("humming_mxfp4", 22.0)])
    other = run_of(tmp_path, "b", [cell("torch_grouped_mm_bf16", 9.0, format="bf16", workspace_bytes=1 << 21)])
    where, cells = report.load([source, peer, other])
    report.write(where, cells, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "moe.json", "moe.md", "speed-up.png", "qwen3-30b-a3b.png", "qwen3-30b-a3b-zipf-1.2.png", "4096,1536,64,6,silu.png",
    }  # fmt: skip
    again = report.load([tmp_path / "out" / "moe.json"])
    assert report.markdown(*again) == (tmp_path / "out" / "moe.md").read_text()
    assert "mx_mxfp4: weights 1024 MiB; in a call, besides input and output, MiB: 1.0 at T=4" in report.markdown(*again)
    assert "torch_grouped_mm_bf16: in a call, besides input and output, MiB: 2.0 at T=4" in report.markdown(*again)


def test_shapes_of_the_command_line(bench):
    cases = bench("cases")
    shape = cases.find_shape("4096,1536,64,6,silu")
    assert (shape.hidden, shape.intermediate, shape.experts, shape.top_k) == (4096, 1536, 64, 6)
    for bad in ("nothing", "1,2,3,silu", "1,2,3,4,relu", "a,2,3,4,silu"):
        with pytest.raises(ValueError, match="needs H,I,E,k,silu"):
            cases.find_shape(bad)


def test_routings(bench):
    cases = bench("cases")
    shape = cases.find_shape("qwen3-30b-a3b")
    hits = {}
    for kind in ("uniform", "zipf", "zipf:3", "one-hot"):
        ids, weights = cases.routing(shape, 64, 3, kind, "cpu")
        assert ids.shape == weights.shape == (64, 8)
        assert all(len(set(row)) == 8 for row in ids.tolist())
        assert torch.allclose(weights.sum(1), torch.ones(64))
        hits[kind] = ids.unique().numel()
    assert hits["one-hot"] == 8 < hits["zipf:3"] < hits["zipf"] < hits["uniform"]
    with pytest.raises(ValueError, match="needs uniform, zipf"):
        cases.routing(shape, 4, 0, "even", "cpu")


def test_tune_tries_warps_that_specialize_where_there_are_any(bench, monkeypatch):
    """Only with warpgroup products and many pairs an expert; the model's choice and its neighbours too."""
    candidates, cases = bench("tune_candidates"), bench("cases")
    shape = cases.find_shape("mixtral-8x7b")
    for there in (True, False):
        monkeypatch.setattr(candidates.tuned, "wgmma", lambda device, there=there: there)
        for fmt, tokens, some in (
            ("mxfp8", 4096, True),
            ("mxfp4", 1024, True),
            ("mxfp8", 64, False),
            ("bf16", 4096, True),
        ):
            jobs = candidates.jobs(shape, fmt, [tokens], "near,specialized", 132)
            assert any(j.config.specialized for j in jobs) == (there and some)
            found = {(j.block, j.config.pairs, j.config.rows) for j in jobs if j.config.specialized}
            assert found <= {(256, 256, 128), (256, 256, 192), (160, 160, 192)}
            assert ((256, 256, 192) in found) == (there and fmt == "bf16")
            assert ((160, 160, 192) in found) == (there and tokens == 1024)
        block, chosen = candidates.model(shape, "mxfp8", 4096, 132)
        assert (block, chosen[1].specialized) == ((256, True) if there else (128, False))
