"""Offline quantization: the bits of ``mx_kernels.quantize`` whatever the buffers, shards and threads; explicit coverage; bounded memory."""

from __future__ import annotations

import importlib.metadata
import json
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

import mx_kernels as mk
from mx_quant import offline
from mx_quant.convert import Checkpoint, convert_checkpoint, dequantize_checkpoint, inspect_checkpoint
from mx_quant.engine import global_scale, largest_magnitude, run_tasks
from mx_quant.layouts import LAYOUTS, assemble, classify, regroup
from mx_quant.offline import quantize_checkpoint
from mx_quant.output import parse_bytes
from mx_quant.plan import grouping_of
from mx_quant.shards import ShardReader

CASES = [(layout.name, f) for layout in LAYOUTS.values() for f in layout.formats if "original" not in layout.name]
IDS = [f"{name}-{f}" for name, f in CASES]
# ModelOpt has no form for MXFP8 of experts that the family stores transposed: refused, see test_refused_by_layout.
GPT_OSS = [(n, f) for n, f in CASES if (n, f) != ("modelopt", mk.MXFP8)]
GPT_OSS_IDS = [f"{name}-{f}" for name, f in GPT_OSS]
LINEAR = [(n, f) for n, f in CASES if "linear" in LAYOUTS[n].kinds]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def joint_amax(tensors, name):
    group = classify(name).group
    members = [t for n, t in tensors.items() if classify(n).group == group] if group else [tensors[name]]
    return torch.stack([t.abs().amax().float() for t in members]).amax()


def expected(name, x, tensors, f, rule=None):
    g = global_scale(joint_amax(tensors, name)) if f.has_global_scale else None
    return mk.quantize(x, f, rule=rule, global_scale=g)


def check_equal(q, want, name):
    assert q.format is want.format, name
    assert same(q.data, want.data), name
    assert same(q.scale, want.scale), name
    if q.global_scale is not None:
        assert torch.equal(q.global_scale.reshape(()), want.global_scale.reshape(())), name


@pytest.mark.parametrize(("layout", "f"), LINEAR, ids=[f"{n}-{f}" for n, f in LINEAR])
def test_same_bits_as_quantize(checkpoints, tmp_path, layout, f):
    tensors = checkpoints.moe_tensors()
    src = checkpoints.save(tmp_path / "src", tensors, shards=3)
    summary = quantize_checkpoint(src, tmp_path / "out", f, layout=layout)
    assert summary.weights_quantized == 2 * (4 + 4 * 3)
    with Checkpoint(tmp_path / "out") as ck:
        assert ck.layout.name == layout
        assert len(ck.weights) == 32
        for name in ck.weights:
            check_equal(ck.read(name), expected(name, tensors[name], tensors, f), name)
        for name, x in tensors.items():
            if name not in ck.weights:
                assert same(ck.reader.read(name), x), name
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kind": "test"}'


def test_refused_by_layout(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.gpt_oss_tensors(), model_type="gpt_oss")
    with pytest.raises(ValueError, match="blocks along N"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="modelopt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layout", "f"), GPT_OSS, ids=GPT_OSS_IDS)
def test_fused_interleaved_source(checkpoints, tmp_path, layout, f):
    tensors = checkpoints.gpt_oss_tensors()
    src = checkpoints.save(tmp_path / "src", tensors, model_type="gpt_oss")
    quantize_checkpoint(src, tmp_path / "out", f, layout=layout, exclude=("*.self_attn.*",))
    stored = tensors["model.layers.0.mlp.experts.gate_up_proj"]  # [E, H, 2I], gate and up alternate
    gate, up = stored[..., 0::2].mT.contiguous(), stored[..., 1::2].mT.contiguous()
    down = tensors["model.layers.0.mlp.experts.down_proj"].mT.contiguous()
    with Checkpoint(tmp_path / "out") as ck, Checkpoint(src) as source:
        assert set(classify(n).kind for n in ck.weights) <= {"expert", "fused_expert"}
        fused = {t.ref.name.rpartition(".")[2]: t for t in regroup(list(ck.weights.values()), "fused", ck.family)}
        for e in range(3):
            for param, parts in (("gate_up_proj", (gate[e], up[e])), ("down_proj", (down[e],))):
                x = torch.cat(parts)
                g = global_scale(x.abs().amax()) if f.has_global_scale else None
                check_equal(assemble(fused[param], ck.read, e), mk.quantize(x, f, global_scale=g), param)
        bias = {n: r for n, r in ck.plain.items() if "bias" in n}
        assert bias
        for target in regroup(list(bias.values()), "fused", ck.family):
            got = torch.stack([torch.cat([ck.read_plain(p.name, p.expert) for p in row]) for row in target.rows])
            assert same(got, source.read_plain(target.ref.name)), target.ref.name


def test_per_expert_source_into_fused_layout(checkpoints, tmp_path):
    tensors = checkpoints.moe_tensors()
    src = checkpoints.save(tmp_path / "src", tensors, shards=2)
    quantize_checkpoint(src, tmp_path / "out", mk.MXFP4, layout="gpt-oss")
    with Checkpoint(tmp_path / "out") as ck:
        p = "model.layers.1.mlp.experts"
        x = torch.cat([tensors[f"{p}.2.gate_proj.weight"], tensors[f"{p}.2.up_proj.weight"]])
        check_equal(ck.read(f"{p}.gate_up_proj", 2), mk.quantize(x, mk.MXFP4), p)


@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP4, mk.NVFP4], ids=str)
def test_bytes_do_not_depend_on_buffers_or_threads(checkpoints, tmp_path, monkeypatch, f):
    """Rows cut, experts together or apart, one thread or three, groups in one buffer or scanned: the same files."""
    layout = next(n for n, g in LINEAR if g is f)
    tensors = checkpoints.moe_tensors()
    src = checkpoints.save(tmp_path / "src", tensors, shards=3)
    quantize_checkpoint(src, tmp_path / "a", f, layout=layout, jobs=1, max_shard_size=40_000)
    monkeypatch.setattr(offline, "_SMALLEST", 1)
    for i, size in enumerate((400, 3000, 20000)):
        monkeypatch.setattr(offline, "_BUNDLE", size)
        out = tmp_path / f"b{i}"
        quantize_checkpoint(src, out, f, layout=layout, jobs=3, max_shard_size=40_000)
        assert checkpoints.contents(out) == checkpoints.contents(tmp_path / "a"), size


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes(checkpoints, tmp_path, dtype):
    tensors = checkpoints.moe_tensors(layers=1, dtype=dtype)
    src = checkpoints.save(tmp_path / "src", tensors)
    for f in (mk.MXFP8, mk.NVFP4):
        layout = next(n for n, g in LINEAR if g is f)
        quantize_checkpoint(src, tmp_path / str(f), f, layout=layout)
        with Checkpoint(tmp_path / str(f)) as ck:
            for name in ck.weights:
                check_equal(ck.read(name), expected(name, tensors[name], tensors, f), name)


@pytest.mark.parametrize("rule", ["floor", "even", "search"])
def test_rules(checkpoints, tmp_path, rule):
    tensors = checkpoints.moe_tensors(layers=1)
    src = checkpoints.save(tmp_path / "src", tensors)
    options = {"search": True} if rule == "search" else {"rule": rule}
    summary = quantize_checkpoint(src, tmp_path / "out", mk.MXFP8, layout="mxfp8", **options)
    assert summary.rule == rule
    with Checkpoint(tmp_path / "out") as ck:
        for name in ck.weights:
            check_equal(ck.read(name), mk.quantize(tensors[name], mk.MXFP8, rule=rule), name)


def test_a_version_is_there_where_nothing_is_installed(monkeypatch):
    from mx_quant.output import own_version

    assert own_version()[0].isdigit()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert own_version() == "not installed"


def test_provenance(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors())
    summary = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", rule="even", max_shard_size=100_000)
    assert len(summary.shards) > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["quantization_config"]["quant_method"] == "mxfp8"
    made = config["mx_quant"]
    assert (made["format"], made["rule"], made["layout"]) == ("mxfp8_e4m3", "even", "mxfp8")
    assert len(made["source_sha256"]) == 64
    assert made["source_sha256"] == summary.source_hash
    manifest = json.loads((tmp_path / "out" / "mx_quant.json").read_text())
    with ShardReader(tmp_path / "out") as r:
        for file in summary.shards:
            with safe_open(tmp_path / "out" / file, "pt") as f:
                metadata = f.metadata()
            assert metadata["format"] == "pt"
            assert {k.removeprefix("mx_quant."): v for k, v in metadata.items() if k != "format"} == made
            assert set(manifest["crc32"][file]) == {t.name for t in r if t.file == file}
    other = checkpoints.save(tmp_path / "other", checkpoints.moe_tensors(), extra=1)
    again = quantize_checkpoint(other, tmp_path / "out2", "mxfp8", layout="mxfp8", dry_run=True)
    assert again.source_hash != summary.source_hash


def test_coverage(checkpoints, tmp_path):
    tensors = checkpoints.moe_tensors()
    src = checkpoints.save(tmp_path / "src", tensors)
    s = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", dry_run=True)
    total = sum(t.numel() for t in tensors.values())
    left = sum(t.numel() for n, t in tensors.items() if any(k in n for k in ("embed", "lm_head", "norm", "mlp.gate.")))
    assert s.parameters == total
    assert s.parameters_quantized == total - left
    assert s.coverage == (total - left) / total
    assert s.expert_coverage == 1.0
    assert f"{100 * s.coverage:.2f}%" in str(s)
    assert [n for n, _ in s.skipped] == ["lm_head.weight"]
    assert json.loads(json.dumps(s.to_dict()))["coverage"] == s.coverage
    more = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", dry_run=True, include=("lm_head",))
    assert more.parameters_quantized - s.parameters_quantized == tensors["lm_head.weight"].numel()
    less = quantize_checkpoint(
        src, tmp_path / "out", "mxfp8", layout="mxfp8", dry_run=True, exclude=("*.0.*", "o_proj")
    )
    assert less.weights_quantized < s.weights_quantized
    assert ("model.layers.1.self_attn.o_proj.weight", "excluded by 'o_proj'") in less.skipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "mxfp5"}, "unknown format"),
        ({"layout": "nothing"}, "unknown layout"),
        ({"format": "mxfp4", "layout": "mxfp8"}, "goes into"),
        ({"rule": "amax"}, "no scale rule"),
        ({"rule": "even", "search": True}, "choose one"),
        ({"include": ("lm_hed",)}, "matches no weight"),
        ({"exclude": ("*",)}, "no weight is left"),
        ({"max_memory": "1MiB"}, "are needed"),
        ({"max_memory": "lots"}, "not a number of bytes"),
        ({"max_shard_size": 0}, "at least one byte"),
        ({"jobs": 0}, "at least 1"),
    ],
)
def test_bad_arguments(checkpoints, tmp_path, options, message):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    options = {"format": "mxfp8", "layout": "mxfp8"} | options
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(src, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_resume_of_a_complete_output(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    before = checkpoints.contents(tmp_path / "out")
    again = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", resume=True)
    assert again.resumed == 1
    assert checkpoints.contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="not empty"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", rule="even", resume=True)


def test_the_disk_is_asked_for_what_comes(checkpoints, tmp_path, monkeypatch):
    """With every read, for as many bytes further on: all of the source but its beginning has been asked for by then."""
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors())
    asked = []
    monkeypatch.setattr(ShardReader, "read_ahead", lambda self, info, at, n: asked.append((info.start + at, n)))
    monkeypatch.setattr("mx_quant.engine._AHEAD", 50_000)
    monkeypatch.setattr(offline, "_SMALLEST", 1)
    monkeypatch.setattr(offline, "_BUNDLE", 20_000)
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", jobs=1)
    asked.sort()
    assert asked[0][0] < 120_000
    assert all(b[0] <= a[0] + a[1] + 60_000 for a, b in pairwise(asked))
    assert asked[-1][0] > (src / "model.safetensors").stat().st_size


def test_progress(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    seen = []
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", progress=lambda *a: seen.append(a), jobs=2)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in checkpoints.moe_tensors(layers=1).values())


@pytest.mark.parametrize(("layout", "f"), CASES, ids=IDS)
def test_convert_keeps_every_bit(checkpoints, tmp_path, layout, f):
    """From each layout to every other that holds the format, and back."""
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1, experts=2))
    only_experts = {"exclude": ("*.self_attn.*",)}
    quantize_checkpoint(src, tmp_path / "a", f, layout=layout, **only_experts)
    for other in [n for n, g in CASES if g is f and n != layout]:
        done = convert_checkpoint(tmp_path / "a", tmp_path / other, other)
        assert (done.layout_from, done.layout_to) == (layout, other)
        back = tmp_path / f"{other}-back"
        convert_checkpoint(tmp_path / other, back, layout)
        with Checkpoint(tmp_path / "a") as a, Checkpoint(back) as b, Checkpoint(tmp_path / other) as middle:
            assert middle.layout.name == other
            assert a.infos == b.infos
            assert all(same(a.reader.read(n), b.reader.read(n)) for n in a.infos)
            for t in regroup(list(middle.weights.values()), grouping_of(a.layout) or "per-expert", a.family):
                if t.ref.name in a.weights:
                    check_equal(assemble(t, middle.read), a.read(t.ref.name), t.ref.name)


def test_convert_refuses(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    with pytest.raises(ValueError, match="not quantized"):
        convert_checkpoint(src, tmp_path / "x", "mxfp8")
    quantize_checkpoint(src, tmp_path / "a", "mxfp8", layout="mxfp8")
    with pytest.raises(ValueError, match="does not hold"):
        convert_checkpoint(tmp_path / "a", tmp_path / "x", "gpt-oss")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("family", "layout", "f"),
    [("qwen3_moe", *c) for c in CASES] + [("gpt_oss", *c) for c in GPT_OSS],
    ids=[f"qwen3-{i}" for i in IDS] + [f"gpt-oss-{i}" for i in GPT_OSS_IDS],
)
def test_dequantize(checkpoints, tmp_path, family, layout, f):
    """The names, shapes and dtypes of the source again, its values up to one quantization."""
    make = checkpoints.moe_tensors if family == "qwen3_moe" else checkpoints.gpt_oss_tensors
    tensors = make(layers=1)
    src = checkpoints.save(tmp_path / "src", tensors, model_type=family)
    quantize_checkpoint(src, tmp_path / "q", f, layout=layout)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d")
    with Checkpoint(src) as a, Checkpoint(tmp_path / "d") as d, Checkpoint(tmp_path / "q") as q:
        assert d.layout is None
        assert a.infos == d.infos
        stored = {t.ref.name: t for t in regroup(list(d.plain.values()), "per-expert", d.family)}
        for t in regroup(list(q.weights.values()), "per-expert", q.family):
            (p,) = stored[t.ref.name].rows[0]
            got = d.read_plain(p.name, p.expert)[p.start : p.stop]
            assert same(got, mk.dequantize(assemble(t, q.read), torch.bfloat16)), t.ref.name
        untouched = [n for n in a.infos if "bias" in n or "norm" in n or "embed" in n]
        assert untouched
        assert all(same(a.reader.read(n), d.reader.read(n)) for n in untouched)
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())


def test_inspect(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors())
    plain = inspect_checkpoint(src)
    assert (plain["layout"], plain["coverage"], plain["experts"]) == (None, 0.0, "per-expert")
    s = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    found = inspect_checkpoint(tmp_path / "out")
    assert found["layout"] == "mxfp8"
    assert found["coverage"] == pytest.approx(s.coverage)
    assert found["expert_coverage"] == 1.0
    assert found["parameters"] == s.parameters
    assert found["formats"]["mxfp8_e4m3"]["bytes"] == s.parameters_quantized * 33 // 32
    json.dumps(found)


def test_parse_bytes():
    assert [parse_bytes(t) for t in ("4GiB", "500MB", "64k", "12", 7, "1.5 GiB", "2T")] == [
        4 << 30, 500_000_000, 65536, 12, 7, 3 << 29, 2 << 40,
    ]  # fmt: skip
    for bad in ("", "4 apples", "-1", "nan", "inf", "GiB", "0"):
        with pytest.raises(ValueError, match="number of bytes"):
            parse_bytes(bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_largest_magnitude(dtype):
    x = torch.randn(1000).to(dtype)
    assert largest_magnitude(x) == x.abs().amax()
    for bad in (float("nan"), float("-inf")):
        y = x.clone()
        y[500] = bad
        assert not torch.isfinite(largest_magnitude(y))


def test_global_scale_survives_inversion():
    a = torch.rand(10000) * 10
    for v in [*a[:300], torch.tensor(0.0), torch.tensor(3e38), torch.tensor(1e-44)]:
        g = global_scale(v)
        assert 1 / (1 / g) == g
        if 0 < v < 1e38 and v > 1e-30:
            assert v / 2688 <= g <= v / 2688 * (1 + 2**-20)


def test_run_tasks_stops_at_the_first_error():
    seen, gate = [], threading.Event()

    def work(task, buffer):
        seen.append(task)
        if task == 3:
            gate.set()
            raise OSError("disk")
        gate.wait(5)

    with pytest.raises(OSError, match="disk"):
        run_tasks(range(100), [1] * 100, work, 4)
    assert len(seen) < 20


def test_threads_of_torch_are_left_as_they_were():
    before = torch.get_num_threads()
    run_tasks(range(4), [1] * 4, lambda t, b: None, 2)
    assert torch.get_num_threads() == before


MEMORY = """
import resource, sys, time
import torch
from mx_quant.offline import quantize_checkpoint
src, out, format, layout, limit = sys.argv[1:]
quantize_checkpoint(src, out, format, layout=layout, max_memory=int(limit), jobs=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def sparse_checkpoint(folder, tensors):
    """A checkpoint of zeros that takes no disk space: headers, then holes."""
    folder.mkdir()
    header, at = {}, 0
    for name, shape in tensors.items():
        n = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return at


def base_memory():
    code = "import resource, mx_quant.offline; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it")
@pytest.mark.parametrize(("f", "layout"), [("mxfp4", "compressed-tensors"), ("mxfp8", "mxfp8"), ("nvfp4", "modelopt")])
def test_memory_is_bounded(tmp_path, f, layout):
    """A checkpoint more than 8 times larger than the limit, with a linear, an embedding and a fused tensor larger than it."""
    base = base_memory()
    limit = base + (160 << 20)
    big = limit // (2 * 4096) + 4096  # rows of 4096 in bf16: more than the limit
    tensors = {"model.embed_tokens.weight": [big, 4096], "model.layers.0.self_attn.o_proj.weight": [big, 4096]}
    tensors["model.layers.0.mlp.experts.down_proj"] = [big // 512 + 1, 512, 4096]
    layer = 3
    while 2 * sum(torch.Size(s).numel() for s in tensors.values()) <= 8 * limit:
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = [64, 1024, 2048]
        layer += 1
    nbytes = sparse_checkpoint(tmp_path / "src", tensors)
    assert nbytes > 8 * limit
    args = [str(tmp_path / "src"), str(tmp_path / "out"), f, layout, str(limit)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEMORY, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert peak <= limit, f"peak {peak >> 20} MiB, limit {limit >> 20} MiB, {time.perf_counter() - start:.1f} s"


def test_layout_defaults():
    for f in mk.FORMATS.values():
        if any(f in row.formats and "linear" in row.kinds for row in LAYOUTS.values()):
            assert f in offline._layout_for(f, None).formats
    assert offline._layout_for(mk.MXFP8, replace(LAYOUTS["mxfp8"], name="mine")).name == "mine"
