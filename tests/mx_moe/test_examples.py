"""Every script of examples/ runs and ends well."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS_TRANSFORMERS = ("demo.py", "quantize_checkpoint.py", "transformers_experts.py")
ARGUMENTS = {"demo.py": ("--max-bytes", "400", "--models", "tiny-qwen3-moe")}


@pytest.mark.skipif(not SCRIPTS, reason="needs the examples folder of the source tree")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_runs(script: Path) -> None:
    if script.name in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, script, *ARGUMENTS.get(script.name, ())],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if script.name == "demo.py":
        assert done.stdout.count("bits per byte") == 1  # one table
        assert done.stdout.count("in memory  ") == 5
        assert done.stdout.count(" yes\n") == 5
        assert "NO" not in done.stdout
        assert "100%" in done.stdout


@pytest.mark.skipif(not SCRIPTS, reason="needs the examples folder of the source tree")
def test_demo_fails_where_a_checkpoint_reloads_differently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from mx_moe import eval as scoring

    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "FORMATS", ("bf16", "mxfp4"))
    monkeypatch.setattr(demo, "LAYOUTS", {"gpt-oss": "mxfp4"})
    monkeypatch.setattr(demo, "quiet_transformers", lambda: None)
    evaluate = scoring.evaluate

    def lossy(checkpoint, text, format):
        found = evaluate(checkpoint, text, format)
        return dataclasses.replace(found, bits_per_byte=found.bits_per_byte + 1e-9 * (format == "stored"))

    arguments = ("--max-bytes", "200", "--models", "tiny-qwen3-moe")
    assert demo.main(arguments) == 0
    assert capsys.readouterr().out.count(" yes\n") == 1
    monkeypatch.setattr(scoring, "evaluate", lossy)
    assert demo.main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out.count(" NO\n") == 1
    assert "a reloaded checkpoint differs" in shown.err
