"""Nothing is lost: kill -9 at every system call, a full disk, read errors, a source that changes, two runs at once.

After each the output is absent, as it was before, or complete; and a resumed run gives the bytes of an undisturbed one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from mx_quant import staging, writer
from mx_quant.convert import convert_checkpoint, dequantize_checkpoint
from mx_quant.engine import Quantizer
from mx_quant.offline import quantize_checkpoint
from mx_quant.shards import ShardReader

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OPTIONS = {"format": "mxfp8", "layout": "mxfp8", "max_shard_size": 6_000, "jobs": 1}


class Children:
    """Talks to ``crash_child.py``."""

    def __init__(self):
        path = Path(__file__).with_name("crash_child.py")
        self.process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, src, out, options=OPTIONS, **more):
        self.process.stdin.write(json.dumps({"src": str(src), "out": str(out), "options": options} | more) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def children():
    c = Children()
    yield c
    c.process.stdin.close()
    c.process.wait(20)


def place():
    """A new folder in memory where the system has one: hundreds of runs would spend minutes in fsync on a disk."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="mx-crash-", dir=shm if os.access(shm, os.W_OK) else None))


@pytest.fixture
def tmp_path():
    folder = place()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def case(checkpoints):
    """A tiny checkpoint, the files of an undisturbed run, and those of the checkpoint."""
    folder = place()
    tensors = checkpoints.moe_tensors(layers=1, experts=2, hidden=32, inner=64)
    src = checkpoints.save(folder / "src", tensors, shards=2)
    quantize_checkpoint(src, folder / "good", **OPTIONS)
    yield src, checkpoints.contents(folder / "good"), checkpoints.contents(src)
    shutil.rmtree(folder)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_undisturbed_child(checkpoints, children, case, tmp_path):
    src, good, _ = case
    found = children(src, tmp_path / "out")
    assert found["signal"] == 0
    assert found["error"] is None
    assert found["events"] > 50
    assert checkpoints.contents(tmp_path / "out") == good
    assert len([n for n in good if n.endswith(".safetensors")]) >= 3


@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_killed_at_every_system_call(checkpoints, children, case, tmp_path, mode):
    src, good, source = case
    events = children(src, tmp_path / "first")["events"]
    assert events > 50
    step = 1 if mode == "half" else 2
    resumed = 0
    for n in range(1, events + 1, step):
        folder = tmp_path / f"{mode}{n}"
        folder.mkdir()
        out = folder / "out"
        assert children(src, out, kill=n, mode=mode)["signal"] == signal.SIGKILL, n
        if out.exists():
            assert {k: v for k, v in checkpoints.contents(out).items() if k != staging.JOURNAL} == good, n
        again = children(src, out, options={**OPTIONS, "resume": True})
        assert again["error"] is None, (n, again)
        resumed += again["events"] < events
        assert checkpoints.contents(out) == good, n
        assert hidden(folder) == [], n
        shutil.rmtree(folder)
    assert resumed > 10, "no run was shorter for being resumed"
    assert checkpoints.contents(src) == source


def test_killed_again_and_again(checkpoints, children, case, tmp_path):
    """Each attempt is killed a few calls further on, until one is through."""
    src, good, _ = case
    out = tmp_path / "out"
    for attempt in range(500):
        found = children(src, out, options={**OPTIONS, "resume": True}, kill=attempt + 5, mode="after")
        if found["signal"] == 0:
            break
    assert found["error"] is None
    assert attempt > 5
    assert checkpoints.contents(out) == good
    assert hidden(tmp_path) == []


def test_killed_at_random_times_with_threads(checkpoints, children, case, tmp_path):
    """At least sixty kills, each output resumed until it is through."""
    src, good, _ = case
    rng = random.Random(0)
    options = {**OPTIONS, "jobs": 3, "resume": True}
    kills = outputs = 0
    while kills < 60:
        out = tmp_path / f"out{outputs}"
        longest = 0.08
        while children(src, out, options=options, timer=rng.uniform(0.001, longest))["signal"]:
            kills += 1
            longest *= 1.5  # a busy machine may need longer to get anywhere
        assert checkpoints.contents(out) == good
        outputs += 1
    assert outputs > 5
    assert hidden(tmp_path) == []


def test_killed_while_replacing(checkpoints, children, case, tmp_path):
    """The old output is there, or beside its place, until the new one is; the next run puts it right."""
    src, good, _ = case
    options = {**OPTIONS, "overwrite": True}
    old = {"old.txt": b"keep me"}

    def make(folder):
        folder.mkdir()
        (folder / "out").mkdir()
        (folder / "out" / "old.txt").write_bytes(old["old.txt"])
        return folder / "out"

    events = children(src, make(tmp_path / "first"), options=options)["events"]
    for n in range(events - 30, events + 1):
        folder = tmp_path / str(n)
        out = make(folder)
        assert children(src, out, options=options, kill=n, mode="before")["signal"] == signal.SIGKILL, n
        spare = folder / ".out.old"
        if out.exists():
            found = checkpoints.contents(out)
            found.pop(staging.JOURNAL, None)
            assert found in (old, good), n
        else:
            assert checkpoints.contents(spare) == old, n
            # Whatever is asked for next, the old output comes back first.
            bad = children(src, out, options=OPTIONS)
            assert "not empty" in bad["error"], (n, bad)
            assert checkpoints.contents(out) == old, n
        again = children(src, out, options={**options, "resume": True})
        assert again["error"] is None, (n, again)
        assert checkpoints.contents(out) == good, n
        assert hidden(folder) == [], n


@pytest.mark.parametrize("make", [convert_checkpoint, dequantize_checkpoint])
def test_other_outputs_resume_too(checkpoints, case, tmp_path, monkeypatch, make):
    src, _, _ = case
    quantize_checkpoint(src, tmp_path / "q", **OPTIONS)
    options = {"max_shard_size": 6_000, "jobs": 1}
    if make is convert_checkpoint:
        options["layout"] = "compressed-tensors"
    make(tmp_path / "q", tmp_path / "good", **options)
    real, left = os.pwrite, [20]

    def stops(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", stops)
    with pytest.raises(OSError, match="Input/output"):
        make(tmp_path / "q", tmp_path / "out", **options)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    done = make(tmp_path / "q", tmp_path / "out", resume=True, **options)
    assert done.resumed >= 1
    assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "good")


def test_resume_wants_the_same_job(checkpoints, children, case, tmp_path):
    src, good, _ = case
    mine = shutil.copytree(src, tmp_path / "src")
    out = tmp_path / "out"
    assert children(mine, out, kill=60, mode="after")["signal"]
    before = hidden(tmp_path)
    with pytest.raises(ValueError, match="unfinished run left"):
        quantize_checkpoint(mine, out, **OPTIONS)
    with pytest.raises(ValueError, match=r"rule.* differ"):
        quantize_checkpoint(mine, out, **OPTIONS, rule="even", resume=True)
    os.utime(mine / "model-00001-of-00002.safetensors", ns=(5, 5))
    with pytest.raises(ValueError, match="source_times differ"):
        quantize_checkpoint(mine, out, **OPTIONS, resume=True)
    assert [n for n in before if "lock" not in n] == hidden(tmp_path)
    quantize_checkpoint(mine, out, **OPTIONS, overwrite=True)
    assert checkpoints.contents(out) == good
    assert hidden(tmp_path) == []


def test_damaged_partial_shards_are_written_again(checkpoints, children, case, tmp_path):
    src, good, _ = case
    out = tmp_path / "out"
    assert children(src, out, kill=70, mode="after")["signal"]
    partial = tmp_path / ".out.partial"
    journal = (partial / staging.JOURNAL).read_bytes()
    assert journal.count(b'"shard"') >= 2
    shards = sorted(partial.glob("*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], 50)
    (partial / staging.JOURNAL).write_bytes(journal[:-3])  # and a last line that was cut short
    (partial / "stray.tmp").write_text("left over")
    (partial / "stray").mkdir()
    (partial / "stray" / "file").write_text("left over")
    quantize_checkpoint(src, out, **OPTIONS, resume=True)
    assert checkpoints.contents(out) == good


def test_two_runs_at_once(checkpoints, case, tmp_path, monkeypatch):
    src, good, _ = case
    out = tmp_path / "out"
    inside, go, errors = threading.Event(), threading.Event(), []
    real = Quantizer.__call__

    def slow(self, *args):
        inside.set()
        go.wait(30)
        real(self, *args)

    monkeypatch.setattr(Quantizer, "__call__", slow)

    def first():
        try:
            quantize_checkpoint(src, out, **OPTIONS)
        except BaseException as e:
            errors.append(e)

    t = threading.Thread(target=first)
    t.start()
    assert inside.wait(30)
    code = (
        "import sys\nfrom mx_quant.offline import quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], 'mxfp8', layout='mxfp8', resume=True)"
    )
    second = subprocess.run(
        [sys.executable, "-c", code, str(src), str(out)], capture_output=True, text=True, check=False
    )
    go.set()
    t.join(60)
    assert second.returncode != 0
    assert f"another run (process {os.getpid()})" in second.stderr
    assert errors == []
    assert checkpoints.contents(out) == good
    assert hidden(tmp_path) == []


def test_read_errors(checkpoints, case, tmp_path, monkeypatch):
    """A real descriptor that stops giving bytes: a directory's is put in place of a shard's."""
    src, good, _ = case
    real, left = ShardReader.read_bytes, [3]

    def failing(self, info, *args):
        left[0] -= 1
        if left[0] == 0:
            fd = os.open(src, os.O_RDONLY)
            os.dup2(fd, self._fds[info.file])
            os.close(fd)
        return real(self, info, *args)

    monkeypatch.setattr("mx_quant.offline._BUNDLE", 4096)
    monkeypatch.setattr("mx_quant.offline._SMALLEST", 1)
    monkeypatch.setattr(ShardReader, "read_bytes", failing)
    with pytest.raises(IsADirectoryError):
        quantize_checkpoint(src, tmp_path / "out", **OPTIONS)
    monkeypatch.setattr(ShardReader, "read_bytes", real)
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(src, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.contents(tmp_path / "out") == good


def test_source_truncated_during_the_run(checkpoints, case, tmp_path, monkeypatch):
    src, good, _ = case
    mine = shutil.copytree(src, tmp_path / "src")
    shard = mine / "model-00002-of-00002.safetensors"
    stat, whole = shard.stat(), shard.read_bytes()
    real = Quantizer.__call__

    def cut(self, *args):
        if shard.stat().st_size == len(whole):
            os.truncate(shard, len(whole) // 2)
        real(self, *args)

    monkeypatch.setattr(Quantizer, "__call__", cut)
    with pytest.raises(ValueError, match="shrank while being read"):
        quantize_checkpoint(mine, tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    quantize_checkpoint(mine, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.contents(tmp_path / "out") == good


def test_no_space_is_said_beforehand(case, tmp_path, monkeypatch):
    src, _, _ = case
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda p: os.statvfs_result((*real(p)[:2], 10, 3, 1, *real(p)[5:])))
    with pytest.raises(ValueError, match=r"more bytes, but .* has only"):
        quantize_checkpoint(src, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_writes_refused_by_the_system(checkpoints, case, tmp_path):
    """A limit on file sizes makes a real write fail in the middle of a shard."""
    src, good, _ = case
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            quantize_checkpoint(src, tmp_path / "out", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(src, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.contents(tmp_path / "out") == good


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 24 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if done is None or done.returncode:
        pytest.skip(f"this machine lets us mount no tmpfs: {done.stderr.strip() if done else 'no mount command'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(checkpoints, case, tmpfs, monkeypatch):
    src, good, _ = case
    with pytest.raises(ValueError, match="bytes, but"):
        quantize_checkpoint(src, tmpfs / "out", **OPTIONS)
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda p: os.statvfs_result((*real(p)[:2], 10**9, 10**9, 10**9, *real(p)[5:])))
    with pytest.raises(OSError, match="No space left") as e:
        quantize_checkpoint(src, tmpfs / "out", **OPTIONS)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert hidden(tmpfs) == [".out.partial"]
    subprocess.run(["mount", "-o", "remount,size=4m", str(tmpfs)], check=True)
    again = quantize_checkpoint(src, tmpfs / "out", **OPTIONS, resume=True)
    assert again.resumed >= 1
    assert checkpoints.contents(tmpfs / "out") == good


def test_failure_in_the_background_is_not_lost(case, tmp_path, monkeypatch):
    """An fsync that fails in the writer's own thread fails the run."""
    src, _, _ = case
    real = os.fsync

    def fails(fd):
        if threading.current_thread().name.startswith("mx-sync"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(writer.os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        quantize_checkpoint(src, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
