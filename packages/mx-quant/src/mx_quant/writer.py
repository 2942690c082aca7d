"""Writes safetensors shards whose every offset is known before the first byte: any part, any time, any thread.

``plan_shards`` fixes files, headers and offsets; ``ShardWriter`` fills them in and holds nothing in memory. A shard is
fsynced when its last byte has come. CRC-32 of each tensor is taken on the way (parts are joined by polynomial arithmetic).
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .shards import INDEX, NAMES, SINGLE, TensorInfo, bytes_of

_SYNC_EVERY = 192 << 20  # bytes written between two background fdatasync calls


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, torch dtype, shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """Bytes of the tensor ``name``, from its byte ``offset`` on."""

    name: str
    tensor: Tensor
    offset: int = 0


@dataclass(frozen=True)
class Shard:
    """One file to be written: ``head`` is length and header, ``tensors`` lie at their ``start``, ``nbytes`` is the file's size."""

    file: str
    head: bytes
    tensors: tuple[TensorInfo, ...]
    nbytes: int


def plan_shards(
    specs: Iterable[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most ``max_shard_bytes`` of data (one larger tensor gets a file of its own).

    Files are filled in the order given; inside a file wider dtypes come first, so that every tensor is aligned.
    Raises ValueError for duplicate names.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled, seen = 0, set()
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"two tensors would be written under the name {spec.name!r}")
        seen.add(spec.name)
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    shards = []
    for i, group in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda s: -s.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at, places = 0, []
        for s in group:
            if s.dtype not in NAMES:
                raise TypeError(f"{s.name!r} has the dtype {s.dtype}, which safetensors cannot hold")
            header[s.name] = {
                "dtype": NAMES[s.dtype],
                "shape": list(s.shape),
                "data_offsets": [at, at + s.nbytes],
            }
            places.append(at)
            at += s.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        tensors = tuple(
            TensorInfo(s.name, NAMES[s.dtype], tuple(s.shape), file, base + p, s.nbytes)
            for s, p in zip(group, places, strict=True)
        )
        shards.append(Shard(file, struct.pack("<Q", len(text)) + text, tensors, base + at))
    return tuple(shards)


def index_json(shards: Sequence[Shard]) -> bytes:
    """The bytes of ``model.safetensors.index.json`` for these shards."""
    weight_map = {t.name: s.file for s in shards for t in s.tensors}
    total = sum(t.nbytes for s in shards for t in s.tensors)
    found = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(found, indent=2) + "\n").encode()


class ShardWriter:
    """Writes planned shards into ``folder``, any part of any tensor at any time and from any thread.

    A shard whose last byte has come is fsynced and closed, then ``on_shard(shard, crc)`` is called with the CRC-32 of
    each of its tensors; ``done`` names the files that are complete already and are left alone. Nothing is held in memory.
    ``submit`` has a thread of the writer's own do it: threads that wrote at once would wait for the file's lock, spinning.
    ``finish`` raises ValueError if bytes are missing, and writes the index (for more than one shard).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        shards: Sequence[Shard],
        *,
        done: Iterable[str] = (),
        on_shard: Callable[[Shard, dict[str, int]], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.shards = tuple(shards)
        self._on_shard = on_shard
        self._done = set(done)
        self._shard = {s.file: s for s in self.shards}
        self._info = {t.name: t for s in self.shards for t in s.tensors}
        self._left = {s.file: sum(t.nbytes for t in s.tensors) for s in self.shards}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {n: [] for n in self._info}
        self._fds: dict[str, int] = {}
        self._unsynced = 0
        self._lock = threading.Lock()
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="mx-write")
        self._failure: BaseException | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="mx-sync")
        self._pending: list[Future[None]] = []

    def needs(self, name: str) -> bool:
        """Whether ``name`` belongs to a shard that is not complete."""
        return self._info[name].file not in self._done

    def submit(self, parts: Sequence[Part]) -> Future[None]:
        """``write`` these parts in the background; they must stay as they are until the result is there."""
        return self._writes.submit(self._write_all, parts)

    def _write_all(self, parts: Sequence[Part]) -> None:
        try:
            for part in parts:
                self.write(part.name, part.tensor, part.offset)
        except BaseException as e:
            self._failure = self._failure or e
            raise

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Write ``tensor`` (contiguous, CPU) at byte ``offset`` of ``name``; ValueError for a wrong size or a second time."""
        info = self._info[name]
        view = bytes_of(tensor)
        if tensor.dtype != info.torch_dtype and tensor.dtype != torch.uint8:
            raise TypeError(f"{name!r} was planned as {info.torch_dtype}, got {tensor.dtype}")
        if offset < 0 or offset + len(view) > info.nbytes:
            raise ValueError(
                f"{name!r} was planned with {info.nbytes} bytes; [{offset}, {offset + len(view)}) is outside"
            )
        if not len(view):
            return
        crc = zlib.crc32(view)
        fd = self._fd(info.file)
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], info.start + offset + done)
        with self._lock:
            self._pieces[name].append((offset, len(view), crc))
            self._left[info.file] -= len(view)
            self._unsynced += len(view)
            complete = self._left[info.file] <= 0
            sync = self._unsynced >= _SYNC_EVERY
            if sync:
                self._unsynced = 0
            if complete:
                self._pending.append(self._background.submit(self._complete, info.file))
            elif sync:
                self._pending.append(self._background.submit(_sync_data, fd))
            ready = [p for p in self._pending if p.done()]
        for p in ready:
            p.result()

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                if file in self._done:
                    raise ValueError(f"{file} is complete; nothing more can be written to it")
                fd = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                self._fds[file] = fd
                _pwrite(fd, self._shard[file].head, 0)
            return self._fds[file]

    def _complete(self, file: str) -> None:
        shard = self._shard[file]
        crcs = {t.name: _join(self._pieces.pop(t.name), t) for t in shard.tensors}
        fd = self._fds[file]
        os.fsync(fd)
        os.close(fd)
        with self._lock:
            del self._fds[file]
            self._done.add(file)
        if self._on_shard is not None:
            self._on_shard(shard, crcs)

    def finish(self) -> None:
        """Wait for the last write and fsync, and write the index; ValueError if any tensor is incomplete."""
        self._writes.shutdown(wait=True)
        if self._failure is not None:
            raise self._failure
        for shard in self.shards:
            if (
                self._left[shard.file] == 0
                and shard.file not in self._done
                and not any(t.nbytes for t in shard.tensors)
            ):
                self._fd(shard.file)
                self._complete(shard.file)
        self._background.shutdown(wait=True)
        for p in self._pending:
            p.result()
        for shard in self.shards:
            if shard.file not in self._done:
                missing = [t.name for t in shard.tensors if sum(n for _, n, _ in self._pieces[t.name]) != t.nbytes]
                raise ValueError(f"{shard.file} is incomplete: {', '.join(missing[:5])} were not written in full")
        if len(self.shards) > 1:
            write_file(self.folder / INDEX, index_json(self.shards))
        sync_folder(self.folder)

    def close(self) -> None:
        """Stop: wait for the background threads and close what is open, complete or not."""
        self._writes.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _sync_data(fd: int) -> None:
    """Bring written bytes to the disk (macOS has no fdatasync)."""
    getattr(os, "fdatasync", os.fsync)(fd)


def _join(pieces: list[tuple[int, int, int]], info: TensorInfo) -> int:
    at, crc = 0, 0
    for offset, n, piece in sorted(pieces):
        if offset != at:
            raise ValueError(f"parts of {info.name!r} overlap or leave a hole at byte {min(at, offset)}")
        crc = crc32_join(crc, piece, n) if at else piece
        at += n
    return crc


def crc32_join(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two byte strings together from the CRC-32 of each; ``nbytes`` is the length of the second.

    Appending a zero bit multiplies by x modulo the CRC's polynomial; bits are reflected (bit 31 is x^0).
    """
    power, square = 1 << 31, 1 << 30  # x^0, x^1
    n = 8 * nbytes
    while n:
        if n & 1:
            power = _times(power, square)
        square = _times(square, square)
        n >>= 1
    return _times(first, power) ^ second


def _times(a: int, b: int) -> int:
    product = 0
    for i in range(31, -1, -1):
        if a >> i & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def _pwrite(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and fsync it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
