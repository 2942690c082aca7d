"""Every script of examples/ runs and ends well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS_TRANSFORMERS = ("demo.py", "quantize_checkpoint.py", "transformers_experts.py")
ARGUMENTS = {"demo.py": ("--max-bytes", "600", "--reload-bytes", "300", "--models", "tiny-qwen3-moe")}


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
        assert done.stdout.count(" yes") == 5
        assert "NO" not in done.stdout
        assert "100%" in done.stdout
