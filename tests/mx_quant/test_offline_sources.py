"""What offline quantization asks of its source: finite, complete, apart from the output, at rest; a bad one leaves nothing behind."""

from __future__ import annotations

import os
import time
from itertools import count

import pytest
import torch

import mx_kernels as mk
from mx_quant import __main__ as cli
from mx_quant import offline, output
from mx_quant.layouts import FAMILIES
from mx_quant.offline import quantize_checkpoint
from mx_quant.plan import expert_holes
from mx_quant.shards import ShardReader
from mx_quant.verify import verify_checkpoint


def test_experts_are_never_left_out_silently(checkpoints, tmp_path):
    odd = checkpoints.moe_tensors(inner=80)  # K of down_proj is 80, not a multiple of 32
    src = checkpoints.save(tmp_path / "src", odd)
    with pytest.raises(
        ValueError, match=r"8 expert weights would stay in full precision \(model\.layers\.0.*down_proj.*block 32"
    ):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    assert not (tmp_path / "out").exists()
    s = quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", allow_unquantized_experts=("*.down_proj",))
    assert 0 < s.expert_coverage < 1
    quantize_checkpoint(src, tmp_path / "out2", "mxfp8", layout="mxfp8", exclude=("down_proj",), dry_run=True)
    strange = {
        **checkpoints.moe_tensors(layers=1),
        "model.layers.0.moe.experts.w_all": torch.zeros(4, 32, 32).bfloat16(),
    }
    src = checkpoints.save(tmp_path / "strange", strange)
    with pytest.raises(ValueError, match=r"w_all: its name is not one"):
        quantize_checkpoint(src, tmp_path / "out3", "mxfp8", layout="mxfp8")
    quantize_checkpoint(
        src, tmp_path / "out3", "mxfp8", layout="mxfp8", allow_unquantized_experts=("*.experts.w_all",), dry_run=True
    )


def test_places(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    before = checkpoints.contents(src)
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for out, message in (
        (src, "source itself"),
        (tmp_path / "link", "source itself"),
        (src / "out", "inside the source"),
        (tmp_path, "contains the source"),
        (tmp_path / "full", "not empty"),
        (tmp_path / "file", "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_checkpoint(src, out, "mxfp8", layout="mxfp8")
    with pytest.raises(ValueError, match="not empty"):
        quantize_checkpoint(src, tmp_path / "file", "mxfp8", layout="mxfp8", overwrite=True)
    assert checkpoints.contents(src) == before
    quantize_checkpoint(src, tmp_path / "full", "mxfp8", layout="mxfp8", overwrite=True)
    assert not (tmp_path / "full" / "mine.txt").exists()
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(src, tmp_path / "empty", "mxfp8", layout="mxfp8")
    assert checkpoints.contents(tmp_path / "empty") == checkpoints.contents(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_source_is_only_read(checkpoints, tmp_path, monkeypatch):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1), shards=2)
    before = checkpoints.contents(src)
    real = os.open

    def spy(path, flags, *args, **kwargs):
        if str(path).startswith(str(src)):
            assert flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0, path
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    assert checkpoints.contents(src) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("f", [mk.MXFP8, mk.MXFP4, mk.NVFP4], ids=str)
def test_not_finite(checkpoints, tmp_path, f, bad):
    tensors = checkpoints.moe_tensors(layers=1)
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][70, 33] = bad
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][90, 1] = bad
    src = checkpoints.save(tmp_path / "src", tensors)
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight is not finite.* at index \(70, 33\)"):
        quantize_checkpoint(src, tmp_path / "out", f)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_not_finite_in_a_fused_expert(checkpoints, tmp_path):
    tensors = checkpoints.gpt_oss_tensors()
    tensors["model.layers.0.mlp.experts.down_proj"][1, 5, 7] = float("inf")
    src = checkpoints.save(tmp_path / "src", tensors, model_type="gpt_oss")
    with pytest.raises(ValueError, match=r"experts\.down_proj is not finite.* at index \(1, 5, 7\)"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp4", layout="gpt-oss")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_quantized_already(checkpoints, tmp_path):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "mxfp8", layout="mxfp8")


def test_source_that_changes_during_the_run(checkpoints, tmp_path, monkeypatch):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    real = output.ShardWriter.finish

    def finish(self):
        os.utime(src / "model.safetensors", ns=(1, 1))
        real(self)

    monkeypatch.setattr(output.ShardWriter, "finish", finish)
    with pytest.raises(ValueError, match="changed during the run"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


UP = "model.layers.0.mlp.experts.3.up_proj.weight"


def bad_at_the_end(checkpoints, folder):
    """A checkpoint whose last tensor but one is not finite, so that shards are complete before it is met."""
    tensors = checkpoints.moe_tensors(layers=1)
    tensors["model.layers.0.self_attn.q_proj.weight"][-1, -1] = float("nan")
    return checkpoints.save(folder, tensors)


@pytest.mark.parametrize("jobs", [1, 3])
def test_bad_source_leaves_nothing_behind(checkpoints, tmp_path, monkeypatch, jobs):
    """Shards were complete already; a run that excludes the weight needs neither overwrite nor resume."""
    src = bad_at_the_end(checkpoints, tmp_path / "src")
    monkeypatch.setattr("mx_quant.offline._BUNDLE", 20_000)
    monkeypatch.setattr("mx_quant.offline._SMALLEST", 1)
    finished = []
    real = output.Staging.record
    monkeypatch.setattr(output.Staging, "record", lambda *a: (finished.append(a[1].file), real(*a))[1])
    options = {"layout": "mxfp8", "max_shard_size": 6_000, "jobs": jobs}
    with pytest.raises(ValueError, match=r"q_proj\.weight is not finite"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", **options)
    assert finished
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", **options, exclude=("q_proj",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_bad_source_keeps_the_old_output(checkpoints, tmp_path):
    src = bad_at_the_end(checkpoints, tmp_path / "src")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not finite"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", overwrite=True)
    assert checkpoints.contents(tmp_path / "out") == {"old.txt": b"keep"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_bad_source_ends_a_resumed_run_too(checkpoints, tmp_path, monkeypatch):
    """A read error keeps what is needed to resume; the bad value that the resumed run then meets removes it."""
    src = bad_at_the_end(checkpoints, tmp_path / "src")
    real, calls = ShardReader.read_bytes, count()

    def failing(self, *args):
        if next(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(self, *args)

    monkeypatch.setattr("mx_quant.offline._BUNDLE", 20_000)
    monkeypatch.setattr("mx_quant.offline._SMALLEST", 1)
    monkeypatch.setattr(ShardReader, "read_bytes", failing)
    options = {"max_shard_size": 6_000, "jobs": 1}
    with pytest.raises(OSError, match="Input/output error"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "src"]
    monkeypatch.setattr(ShardReader, "read_bytes", real)
    with pytest.raises(ValueError, match="is not finite"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", **options, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_bad_source_on_the_command_line(checkpoints, tmp_path, capsys):
    src = bad_at_the_end(checkpoints, tmp_path / "src")
    command = ["quantize", str(src), str(tmp_path / "out"), "--format", "mxfp8", "--quiet"]
    assert cli.main(command) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "q_proj.weight is not finite" in error
    assert "--resume" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert cli.main([*command, "--exclude", "q_proj"]) == 0


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_leaves_nothing_behind(checkpoints, tmp_path, device):
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors(layers=1))
    with pytest.raises(ValueError, match=f"the device '{device}' cannot be used"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", device=device)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_the_disk_reads_ahead_while_an_accelerator_starts(checkpoints, tmp_path, monkeypatch):
    """From the first byte of the source on, as far as is meant, and without an effect on the output; not for a CPU."""
    src = checkpoints.save(tmp_path / "src", checkpoints.moe_tensors())
    asked, started = [], []
    real = ShardReader.read_ahead

    def read_ahead(self, info, offset, nbytes):
        asked.append((info.file, info.start + offset, nbytes, bool(started)))
        real(self, info, offset, nbytes)

    def start(device, *args):
        for _ in range(10_000):
            if sum(a[2] for a in asked) >= 5000:
                break
            time.sleep(0.001)
        started.append(args)
        return torch.device("cpu")

    quantize_checkpoint(src, tmp_path / "cpu", "mxfp4")
    monkeypatch.setattr(ShardReader, "read_ahead", read_ahead)
    monkeypatch.setattr(offline, "_device", start)
    monkeypatch.setattr(offline, "_START", 5000)
    quantize_checkpoint(src, tmp_path / "gpu", "mxfp4", device="cuda")
    assert started[0][1:] == (mk.MXFP4.default_rule, torch.bfloat16)
    early = [a for a in asked if not a[3]]
    with ShardReader(src) as reader:
        first = sorted(reader.tensors.values(), key=lambda i: (i.file, i.start))
        asked.clear()
        with offline._asking_ahead(reader, "cpu"):
            pass
        assert asked == []
    assert [a[:3] for a in early] == [(i.file, i.start, i.nbytes) for i in first[: len(early)]]
    assert sum(a[2] for a in early[:-1]) < 5000 <= sum(a[2] for a in early)
    for a, b in zip(sorted((tmp_path / "cpu").iterdir()), sorted((tmp_path / "gpu").iterdir()), strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("layout", ["mxfp8", "compressed-tensors"])
def test_an_expert_that_lacks_a_matrix(checkpoints, tmp_path, layout):
    tensors = checkpoints.moe_tensors()
    del tensors[UP]
    src = checkpoints.save(tmp_path / "src", tensors)
    want = rf"1 expert weights are missing \({UP}\): each of the 4 experts of .* needs .*; download".replace(
        ".m", r"\.m"
    )
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=want):
            quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout=layout, dry_run=dry_run)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert cli.main(["quantize", str(src), str(tmp_path / "out"), "--format", "mxfp8", "--quiet"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_expert_holes(checkpoints):
    names = [n for n in checkpoints.moe_tensors() if ".experts." in n]
    family = FAMILIES["qwen3-moe"]
    p = "model.layers.1.mlp.experts"

    def holes(kept, family=family):
        return [(h.names[0].split(".experts.")[0] + ".experts", h.missing, h.names) for h in expert_holes(kept, family)]

    assert holes(names) == []
    assert holes([n for n in names if not n.startswith(f"{p}.1.")]) == [
        (p, 3, tuple(f"{p}.1.{x}_proj.weight" for x in ("gate", "up", "down")))
    ]
    lacking = [n for n in names if not (n.startswith(p) and "down" in n)]
    assert holes(lacking) == [(p, 4, tuple(f"{p}.{e}.down_proj.weight" for e in range(4)))]
    lacking = [n for n in names if not (n.startswith(p) and "up" in n)]
    assert holes(lacking) == [(p, 4, tuple(f"{p}.{e}.up_proj.weight" for e in range(4)))]
    assert holes([n for n in names if "gate" not in n]) == []  # experts without gates
    mixtral = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")]
    assert holes(mixtral, FAMILIES["mixtral"]) == []
    assert holes(mixtral[:-1], FAMILIES["mixtral"])[0][1:] == (1, (mixtral[-1],))
    (_, (_, missing, named)) = holes([*names, f"{p}.{10**15}.up_proj.weight"])
    assert missing == 3 * (10**15 + 1) - 13
    assert named[0] == f"{p}.4.gate_proj.weight"


COUNTS = [
    {"num_experts": 4},
    {"num_local_experts": 4},
    {"n_routed_experts": 4},
    {"text_config": {"num_experts": 4}, "num_experts": 9},
    {},  # the other layer has four
]


@pytest.mark.parametrize("config", COUNTS, ids=str)
def test_last_experts_of_a_layer_are_missing(checkpoints, tmp_path, config, capsys):
    """Nothing but the configuration or another layer tells: the numbers of those that are there run without a hole."""
    gone = [f"model.layers.1.mlp.experts.{e}" for e in (2, 3)]
    tensors = {n: t for n, t in checkpoints.moe_tensors().items() if not n.startswith(tuple(f"{g}." for g in gone))}
    src = checkpoints.save(tmp_path / "src", tensors, **config)
    with pytest.raises(ValueError, match=r"6 expert weights are missing \(model\.layers\.1\.mlp\.experts\.2\.") as e:
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    assert ("config.json" if config else "model.layers.0.mlp.experts has 4") in str(e.value)
    with pytest.raises(ValueError, match="3 expert weights are missing"):
        quantize_checkpoint(
            src, tmp_path / "out", "mxfp8", layout="mxfp8", allow_unquantized_experts=("*.1.mlp.experts.2.*",)
        )
    assert not (tmp_path / "out").exists()
    allowed = ("*.1.mlp.experts.[23].*",)
    quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8", allow_unquantized_experts=allowed)
    found = verify_checkpoint(tmp_path / "out")
    assert {f.tensor.split(".experts.")[1] for f in found.findings if f.kind == "missing"} >= {"2.gate_proj.weight"}
    assert "each of the 4 experts" in found.findings[0].detail
    assert verify_checkpoint(tmp_path / "out", allow_unquantized_experts=allowed).ok
    assert cli.main(["verify", str(tmp_path / "out"), "--quiet", "--json"]) == 1
    assert "experts.2.gate_proj.weight" in capsys.readouterr().out


def test_fused_experts_that_hold_too_few(checkpoints, tmp_path):
    tensors = checkpoints.gpt_oss_tensors(layers=2)
    for name in [n for n in tensors if ".layers.1.mlp.experts." in n]:
        tensors[name] = tensors[name][:2].clone()
    src = checkpoints.save(tmp_path / "src", tensors, model_type="gpt_oss", num_local_experts=3)
    with pytest.raises(
        ValueError, match=r"layers\.1.*gate_up_proj.*it holds 2 experts of 3 \(config\.json: num_local_experts"
    ):
        quantize_checkpoint(src, tmp_path / "out", "mxfp4", layout="gpt-oss")
    allowed = ("*.1.mlp.experts.*",)
    quantize_checkpoint(src, tmp_path / "out", "mxfp4", layout="gpt-oss", allow_unquantized_experts=allowed)
    found = verify_checkpoint(tmp_path / "out")
    assert sorted(f.tensor.rpartition(".")[2] for f in found.findings) == ["down_proj", "gate_up_proj"]
    assert verify_checkpoint(tmp_path / "out", allow_unquantized_experts=allowed).ok


def test_a_router_without_experts(checkpoints, tmp_path):
    tensors = {n: t for n, t in checkpoints.moe_tensors().items() if not n.startswith("model.layers.1.mlp.experts.")}
    src = checkpoints.save(tmp_path / "src", tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp has a router and no experts"):
        quantize_checkpoint(src, tmp_path / "out", "mxfp8", layout="mxfp8")
    assert not (tmp_path / "out").exists()
