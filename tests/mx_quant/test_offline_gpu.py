"""Offline quantization on a GPU: the bytes of every file are those of the CPU, whatever is interrupted, resumed or mixed."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

import mx_kernels as mk
from mx_quant import __main__ as cli
from mx_quant import offline
from mx_quant.layouts import LAYOUTS
from mx_quant.offline import quantize_checkpoint

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "xpu"
CASES = [(layout.name, f) for layout in LAYOUTS.values() for f in layout.formats if "original" not in layout.name]
IDS = [f"{name}-{f}" for name, f in CASES]
GPT_OSS = [(n, f) for n, f in CASES if (n, f) != ("modelopt", mk.MXFP8)]
FORMATS = [(next(n for n, g in CASES if g is f and "linear" in LAYOUTS[n].kinds), f) for f in mk.FORMATS.values()]


def both(checkpoints, src, folder, f, **options):
    """The files that a CPU and a GPU make of ``src``."""
    made = []
    for i, device in enumerate(("cpu", DEVICE)):
        out = folder / f"out{i}"
        quantize_checkpoint(src, out, f, device=device, **options)
        made.append(checkpoints.contents(out))
    return made


@pytest.mark.parametrize(("layout", "f"), CASES, ids=IDS)
def test_single_experts(checkpoints, tmp_path, layout, f):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(), shards=3)
    cpu, gpu = both(checkpoints, src, tmp_path, f, layout=layout, max_shard_size=60_000, jobs=2)
    assert len(cpu) > 5
    assert cpu == gpu


@pytest.mark.parametrize(("layout", "f"), GPT_OSS, ids=[f"{n}-{f}" for n, f in GPT_OSS])
def test_fused_experts(checkpoints, tmp_path, layout, f):
    src = checkpoints.save(tmp_path / "src", checkpoints.gpt_oss_tensors(layers=2), model_type="gpt_oss")
    cpu, gpu = both(checkpoints, src, tmp_path, f, layout=layout)
    assert cpu == gpu


@pytest.mark.parametrize(
    ("layout", "f", "rule"),
    [(n, f, rule) for n, f in FORMATS for rule in f.rules],
    ids=lambda v: str(v),
)
def test_rules(checkpoints, tmp_path, layout, f, rule):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    cpu, gpu = both(checkpoints, src, tmp_path, f, layout=layout, rule=rule)
    assert cpu == gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("layout", "f"), FORMATS, ids=[f"{n}-{f}" for n, f in FORMATS])
def test_other_source_dtypes(checkpoints, tmp_path, layout, f, dtype):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1, dtype=dtype))
    cpu, gpu = both(checkpoints, src, tmp_path, f, layout=layout)
    assert cpu == gpu


@pytest.mark.parametrize(("layout", "f"), FORMATS, ids=[f"{n}-{f}" for n, f in FORMATS])
def test_buffers_and_threads(checkpoints, tmp_path, monkeypatch, layout, f):
    """Buffers that are filled again while earlier ones are still on their way, rows cut, many threads on one device."""
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=3), shards=3)
    quantize_checkpoint(src, tmp_path / "want", f, layout=layout, jobs=1, max_shard_size=60_000)
    want = checkpoints.contents(tmp_path / "want")
    monkeypatch.setattr(offline, "_SMALLEST", 1)
    for i, (size, jobs) in enumerate([(400, 1), (3000, 8), (20_000, 4)]):
        monkeypatch.setattr(offline, "_BUNDLE", size)
        out = tmp_path / str(i)
        quantize_checkpoint(src, out, f, layout=layout, jobs=jobs, max_shard_size=60_000, device=DEVICE)
        assert checkpoints.contents(out) == want, (size, jobs)


@pytest.mark.parametrize("second", ["cpu", DEVICE])
@pytest.mark.parametrize(("layout", "f"), FORMATS, ids=[f"{n}-{f}" for n, f in FORMATS])
def test_resume(checkpoints, tmp_path, monkeypatch, layout, f, second):
    """A run on the GPU that meets a full disk goes on, there or on the CPU, to the bytes of an undisturbed one."""
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(), shards=2)
    options = {"layout": layout, "max_shard_size": 40_000, "jobs": 2}
    quantize_checkpoint(src, tmp_path / "want", f, **options)
    real, left, lock = os.pwrite, [40], threading.Lock()

    def full(*args):
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(src, tmp_path / "out", f, device=DEVICE, **options)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    done = quantize_checkpoint(src, tmp_path / "out", f, device=second, resume=True, **options)
    assert done.resumed >= 1
    assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "want")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP4, mk.NVFP4], ids=str)
def test_not_finite(checkpoints, tmp_path, f, bad):
    tensors = checkpoints.moe_tensors(layers=1)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[name][5, 7] = bad
    src = checkpoints.save(tmp_path / "src", tensors)
    with pytest.raises(ValueError, match=rf"{name} is not finite.*\(5, 7\)".replace(".m", r"\.m")):
        quantize_checkpoint(src, tmp_path / "out", f, device=DEVICE)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_names_of_devices(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    quantize_checkpoint(src, tmp_path / "want", "mxfp8")
    for i, device in enumerate((DEVICE, f"{DEVICE}:0", torch.device(DEVICE, 0))):
        quantize_checkpoint(src, tmp_path / str(i), "mxfp8", device=device)
        assert checkpoints.contents(tmp_path / str(i)) == checkpoints.contents(tmp_path / "want")
    args = ["quantize", str(src), str(tmp_path / "cli"), "--format", "mxfp8", "--device", DEVICE, "--quiet"]
    assert cli.main(args) == 0
    assert checkpoints.contents(tmp_path / "cli") == checkpoints.contents(tmp_path / "want")
    with pytest.raises(ValueError, match="cannot be used"):
        quantize_checkpoint(src, tmp_path / "none", "mxfp8", device=f"{DEVICE}:99")


def test_the_last_device(checkpoints, tmp_path):
    """On a machine with several, a device that is not the current one of any thread."""
    count = torch.get_device_module(DEVICE).device_count()
    if count < 2:
        pytest.skip("needs two devices")
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    quantize_checkpoint(src, tmp_path / "want", "nvfp4", layout="modelopt")
    quantize_checkpoint(src, tmp_path / "out", "nvfp4", layout="modelopt", device=f"{DEVICE}:{count - 1}", jobs=3)
    assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "want")
