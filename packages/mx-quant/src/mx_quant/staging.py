"""An output folder that is either absent, as it was, or complete: staged beside its place, journaled, renamed when done.

Beside ``out`` stand, while a run lasts, ``.out.lock`` (held with flock: one run at a time), ``.out.partial`` (the output so
far, with a journal of its finished shards) and, for the moment in which an old output is replaced, ``.out.old``.
The rename of ``.out.partial`` to ``out`` is the one step that makes a result visible; everything before it is fsynced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from .shards import INDEX, ShardReader, load_json, read_small
from .writer import Shard, sync_folder, write_file

JOURNAL = ".mx-quant-journal"
MANIFEST = "mx_quant.json"


def check_places(src: Path, out: Path) -> None:
    """Raise ValueError unless ``out`` is a place apart from ``src``: not it, not inside it, not around it."""
    src_real, out_real = Path(os.path.realpath(src)), Path(os.path.realpath(out))
    if src_real.is_file():
        src_real = src_real.parent
    if out_real == src_real:
        raise ValueError(
            f"the output {out} is the source itself: choose another folder, the source is never written to"
        )
    if out_real.is_relative_to(src_real):
        raise ValueError(f"the output {out} lies inside the source {src}: choose a folder outside it")
    if src_real.is_relative_to(out_real):
        raise ValueError(f"the output {out} contains the source {src}: choose a folder beside it")


class Staging:
    """The right to write one output, and its staging folder ``path``; use as a context manager.

    fingerprint: what the output depends on; a partial output is continued only where it is equal. witness: what must not
    have changed between two runs of one job besides (times of the source files). resume: continue a partial output, or find
    a complete one. overwrite: replace an output that is there, discard a partial one (that ``resume`` cannot continue).

    ``complete`` says that ``out`` is already what the fingerprint asks for; ``finished`` maps finished shards to the CRC-32
    of their tensors. Raises ValueError where the place is taken, another run is at work, or there is something else to continue.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        witness: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._lock_path = self.out.with_name(f".{self.out.name}.lock")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._overwrite = overwrite
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._start = {"fingerprint": self.fingerprint, "witness": json.loads(json.dumps(witness))}
        self.finished: dict[str, dict[str, int]] = {}
        self.complete = False
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        try:
            self._settle()
            self._look(resume)
        except BaseException:
            self._release()
            raise

    def _acquire(self) -> int:
        try:
            import fcntl  # here, so that everything else of this package imports where there is none
        except ModuleNotFoundError as e:
            raise OSError("writing checkpoints needs POSIX file locks (fcntl), which this system has not") from e
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise ValueError(
                    f"another run (process {pid or 'unknown'}) is writing {self.out}: wait for it"
                ) from None
            except OSError:
                os.close(fd)
                raise
            # The file may have been unlinked by its last holder between our open and our lock.
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(self._lock_path))
            except FileNotFoundError:
                same = False
            if same:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)

    def _release(self) -> None:
        if self._lock >= 0:
            os.unlink(self._lock_path)
            os.close(self._lock)
            self._lock = -1

    def _settle(self) -> None:
        """Finish or undo a replacement that was interrupted."""
        if self._old.exists():
            if self.out.is_dir() and any(self.out.iterdir()):
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.out)  # also onto an empty folder
                sync_folder(self.out.parent)

    def _look(self, resume: bool) -> None:
        taken = self.out.is_symlink() or (self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())))
        if taken and resume and self._is_ours():
            self.complete = True
            (self.out / JOURNAL).unlink(missing_ok=True)
            return
        if taken and (not self._overwrite or not self.out.is_dir() or self.out.is_symlink()):
            raise ValueError(f"{self.out} exists and is not empty: choose another output, or overwrite it")
        journal = self._read_journal()
        if journal and resume and journal[0] == self._start:
            self.finished = {line["shard"]: line["crc"] for line in journal[1:]}
        elif journal and not self._overwrite:
            if not resume:
                raise ValueError(
                    f"an unfinished run left {self.path}: continue it with resume, or overwrite to discard it"
                )
            theirs = {**journal[0].get("fingerprint", {}), **journal[0].get("witness", {})}
            ours = {**self._start["fingerprint"], **self._start["witness"]}
            differ = [k for k in ours if theirs.get(k) != ours[k]] or ["its journal"]
            raise ValueError(
                f"the unfinished run in {self.path} was for something else ({', '.join(differ)} differ): "
                f"repeat its options on the same source, or overwrite to discard it"
            )
        elif self.path.exists():
            shutil.rmtree(self.path)

    def _is_ours(self) -> bool:
        path = self.out / MANIFEST
        if not path.is_file():
            return False
        found = load_json(read_small(path), str(path))
        return bool(found.get("fingerprint") == self.fingerprint)

    def _read_journal(self) -> list[dict[str, Any]]:
        path = self.path / JOURNAL
        if not path.is_file():
            return []
        lines = []
        for raw in read_small(path).split(b"\n")[:-1]:  # a line cut short by a kill has no newline
            try:
                lines.append(load_json(raw, str(path)))
            except ValueError:
                break
        return lines

    def begin(self, shards: Sequence[Shard], nbytes: int) -> None:
        """Make the staging folder for these shards; ``nbytes`` more will be written. ValueError if the disk lacks space."""
        self.finished = {s.file: self.finished[s.file] for s in shards if s.file in self.finished and self._whole(s)}
        left = nbytes - sum(s.nbytes for s in shards if s.file in self.finished)
        stat = os.statvfs(self.out.parent)
        free = stat.f_bavail * stat.f_frsize
        reusable = (
            sum(p.stat().st_blocks * 512 for p in self.path.iterdir() if p.name not in self.finished)
            if self.path.exists()
            else 0
        )
        if left > free + reusable:
            raise ValueError(f"the output takes {left} more bytes, but {self.out.parent} has only {free} free")
        if not (self.path / JOURNAL).exists():
            self.path.mkdir(exist_ok=True)
            self._append(self._start)
            sync_folder(self.path)
            sync_folder(self.out.parent)
        else:
            self._cut_journal()

    def _whole(self, shard: Shard) -> bool:
        try:
            fd = os.open(self.path / shard.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return os.fstat(fd).st_size == shard.nbytes and os.pread(fd, len(shard.head), 0) == shard.head
        finally:
            os.close(fd)

    def _cut_journal(self) -> None:
        """Drop a last line that a kill cut short, so that the next line stands alone."""
        lines = [json.dumps(self._start), *(json.dumps({"shard": f, "crc": c}) for f, c in self.finished.items())]
        fresh = self.path / (JOURNAL + ".new")
        write_file(fresh, "".join(line + "\n" for line in lines).encode())
        os.replace(fresh, self.path / JOURNAL)
        sync_folder(self.path)

    def _append(self, line: Mapping[str, Any]) -> None:
        fd = os.open(self.path / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, (json.dumps(line) + "\n").encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def record(self, shard: Shard, crc: dict[str, int]) -> None:
        """Note that a shard is complete and on disk."""
        self.finished[shard.file] = crc
        self._append({"shard": shard.file, "crc": crc})

    def discard(self) -> None:
        """Remove the partial output, so that nothing is left to continue."""
        (self.path / JOURNAL).unlink(missing_ok=True)  # first: without it a folder that a kill leaves counts as stray
        shutil.rmtree(self.path)
        sync_folder(self.out.parent)

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Write the small files, check the staged checkpoint, and rename it into place."""
        expected = {*self.finished, *files, JOURNAL}
        for path in self.path.iterdir():
            if path.name in expected or path.name == INDEX:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name, data in files.items():
            write_file(self.path / name, data)
        sync_folder(self.path)
        ShardReader(self.path).close()
        if self.out.exists() and any(self.out.iterdir()):
            os.rename(self.out, self._old)
        os.rename(self.path, self.out)
        sync_folder(self.out.parent)
        (self.out / JOURNAL).unlink()
        sync_folder(self.out)
        if self._old.exists():
            shutil.rmtree(self._old)
        self.complete = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._release()
