"""The command line: every command, JSON, exit status, one-paragraph errors without a traceback."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mx_quant
from mx_quant import __main__ as cli


def run(*args):
    return cli.main([str(a) for a in args])


@pytest.fixture
def src(checkpoints, tmp_path):
    return checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))


def test_whole_way(src, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("quantize", src, out, "--format", "mxfp4", "--exclude", "o_proj", "--dry-run") == 0
    assert "would quantize 15 weights" in capsys.readouterr().out
    assert not out.exists()
    assert run("quantize", src, out, "--format", "mxfp4", "--exclude", "o_proj", "--json", "--jobs", "2") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["weights_quantized"] == 15
    assert made["layout"] == "compressed-tensors"
    assert 0 < made["coverage"] < 1
    assert run("inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "compressed-tensors"
    assert run("inspect", out) == 0
    assert "mxfp4" in capsys.readouterr().out
    assert run("verify", out, "--against", src, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run("convert", out, tmp_path / "quark", "--layout", "quark") == 0
    assert "15 weights: compressed-tensors -> quark" in capsys.readouterr().out
    assert run("verify", tmp_path / "quark", "--against", src) == 0
    assert run("dequantize", tmp_path / "quark", tmp_path / "plain", "--dtype", "float32", "--json") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "plain", "--json") == 0
    assert json.loads(capsys.readouterr().out)["coverage"] == 0
    pytest.importorskip("matplotlib")
    plot = tmp_path / "snr.png"
    assert run("report", out, src, "--plot", plot, "--worst", "2") == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 5
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert run("report", out, src, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 15


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "{tmp}/nowhere"), "does not exist"),
        (("quantize", "{src}", "{src}", "--format", "mxfp8"), "source itself"),
        (("quantize", "{src}", "{tmp}/o", "--format", "mxfp4", "--layout", "mxfp8"), "goes into"),
        (("quantize", "{src}", "{tmp}/o", "--format", "mxfp8", "--rule", "amax"), "no scale rule"),
        (("quantize", "{src}", "{tmp}/o", "--format", "mxfp8", "--max-memory", "many"), "number of bytes"),
        (("quantize", "{src}", "{tmp}/o", "--format", "mxfp8", "--device", "warp"), "device"),
        (("convert", "{src}", "{tmp}/o", "--layout", "quark"), "not quantized"),
        (("dequantize", "{src}", "{tmp}/o"), "not quantized"),
        (("verify", "{tmp}/nowhere"), "does not exist"),
        (("report", "{src}", "{src}"), "not quantized"),
    ],
)
def test_errors(src, tmp_path, capsys, args, message):
    args = [a.format(src=src, tmp=tmp_path) for a in args]
    assert run(*args) == 1
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert err.startswith(f"mx-quant {args[0]}: ")
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()
    assert run(*args, "--json") == 1
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_every_command_draws_its_progress_and_prints_one_json_object(src, tmp_path, capsys, monkeypatch):
    import tqdm

    drawn = []

    class Bar:
        n, total = 0, None

        def __init__(self, **options):
            assert options["file"] is sys.stderr

        def update(self, more):
            self.n += more

        def close(self):
            drawn.append((self.n, self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    out, other = tmp_path / "out", tmp_path / "other"
    commands = {
        "quantize": (src, out, "--format", "nvfp4", "--layout", "modelopt"),
        "verify": (out, "--against", src),
        "convert": (out, other, "--layout", "compressed-tensors"),
        "dequantize": (other, tmp_path / "plain"),
        "report": (out, src),
    }
    for name, args in commands.items():
        assert run(name, *args, "--json") == 0
        found = capsys.readouterr()
        assert isinstance(json.loads(found.out), dict), name
        assert found.err == ""
        ((n, total),) = set(drawn)
        assert n == total > 50_000, name
        drawn.clear()
        if name in ("quantize", "convert", "dequantize"):
            assert run(name, *args, "--json", "--quiet", "--overwrite") == 0
            capsys.readouterr()
            assert drawn == []
    assert run("inspect", out, "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["coverage"] < 1


def test_verify_fails_on_a_finding(src, tmp_path, capsys):
    assert run("verify", src) == 1
    assert "no weight is quantized" in capsys.readouterr().out


def test_disk_errors_say_how_to_go_on(src, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    assert run("quantize", src, tmp_path / "out", "--format", "mxfp8") == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "No space left on device" in err
    assert "--resume" in err


def test_interrupt(src, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mx_quant.engine.Quantizer.__call__", stop)
    assert run("quantize", src, tmp_path / "out", "--format", "mxfp8", "--jobs", "2") == 1
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("quantize", src, tmp_path / "out", "--format", "mxfp8", "--resume") == 0


def test_usage(capsys):
    with pytest.raises(SystemExit) as e:
        run("quantize", "a", "b", "--format", "mxfp5")
    assert e.value.code == 2
    assert run() == 2
    assert "quantize" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out.count(".") == 2


def test_module_entry():
    done = subprocess.run([sys.executable, "-m", "mx_quant", "--help"], capture_output=True, text=True, check=True)
    for name in ("quantize", "inspect", "verify", "convert", "dequantize", "report"):
        assert name in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_and_version_do_not_wait_for_torch(args):
    code = f"""
import runpy, sys
sys.argv = ["mx_quant", *{args!r}]
try:
    runpy.run_module("mx_quant", run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
heavy = {{"torch", "triton", "mx_kernels", "tqdm"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_lazy_names_are_typed_names():
    """What type checkers see imported in __init__.py is what is imported when it is used."""
    tree = ast.parse(Path(mx_quant.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {a.name: f"mx_quant.{n.module}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(seen) == mx_quant.__all__
    for name, module in seen.items():
        assert getattr(mx_quant, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mx_quant.nothing  # noqa: B018


def test_formats_are_those_of_the_kernels():
    import mx_kernels as mk

    assert {mk.get_format(f) for f in cli.FORMATS} == set(mk.FORMATS.values())
