"""Safetensors shards: a reader that trusts nothing in a file.

A file is ``u64 n | n bytes of JSON | data``; the JSON maps a tensor's name to its dtype, shape and [begin, end) in data.
Source: the safetensors format description (huggingface/safetensors, "Format"); sharded checkpoints add
``model.safetensors.index.json`` with ``weight_map``: tensor name -> file name.

What is checked before anything is allocated: the header's length against the file's, JSON validity and nesting, duplicate
names, dtype, shape and byte count against each other, offsets inside the file without holes or overlaps, file names that
stay in the folder. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same limit
JSON_LIMIT = 256_000_000  # bytes of an index or a config

# safetensors name -> (torch dtype, bits of an element); sub-byte types are read as the bytes that hold them
DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 64),
    "I64": (torch.int64, 64),
    "U64": (torch.uint64, 64),
    "C64": (torch.complex64, 64),
    "F32": (torch.float32, 32),
    "I32": (torch.int32, 32),
    "U32": (torch.uint32, 32),
    "BF16": (torch.bfloat16, 16),
    "F16": (torch.float16, 16),
    "I16": (torch.int16, 16),
    "U16": (torch.uint16, 16),
    "U8": (torch.uint8, 8),
    "I8": (torch.int8, 8),
    "BOOL": (torch.bool, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 8),
    "F6_E2M3": (torch.uint8, 6),
    "F6_E3M2": (torch.uint8, 6),
    "F4": (torch.uint8, 4),
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, (dtype, bits) in DTYPES.items() if bits >= 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``start`` is its first byte in ``file``; ``dtype`` and ``shape`` are as the header has them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype it is read as (uint8 for F4 and F6)."""
        return DTYPES[self.dtype][0]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape it is read as: as stored, with F4 and F6 counted in bytes along the last dimension."""
        bits = DTYPES[self.dtype][1]
        return self.shape if bits >= 8 else (*self.shape[:-1], self.shape[-1] * bits // 8)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension (all of it for a scalar)."""
        return self.nbytes // max(1, self.shape[0]) if self.shape else self.nbytes

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes; ValueError for anything else, duplicate keys, NaN, or absurd size or nesting."""
    if len(raw) > JSON_LIMIT:
        raise ValueError(f"{what} has {len(raw)} bytes of JSON; {JSON_LIMIT} is the limit")
    # Each real entry takes tens of bytes; brackets beyond that are an attempt to make small input into large objects.
    if raw.count(b"[") + raw.count(b"{") > len(raw) // 6 + 64:
        raise ValueError(f"{what} is not a plausible header: {len(raw)} bytes of JSON with mostly empty brackets")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply to be a header") from None
    except ValueError as e:
        raise ValueError(f"{what} is not valid JSON: {str(e)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds a JSON {type(found).__name__}, needs an object")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} appears twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _size(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} is {str(value)[:80]!r}, needs an integer from 0 to 2^63 - 1")
    return value


def parse_header(raw: bytes, data_nbytes: int, file: str = "file") -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors (in the order of their bytes) and the metadata of a header that precedes ``data_nbytes`` of data.

    Raises ValueError that names the file and the tensor.
    """
    if raw[:1] != b"{":
        raise ValueError(f"the header of {file} does not begin with {{ and is no safetensors header")
    found = load_json(raw, f"the header of {file}")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ of {file} is not a map of strings")
    base = 8 + len(raw)
    tensors = []
    for name, entry in found.items():
        where = f"tensor {name[:200]!r} in {file}"
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(f"{where} has a name that is not valid Unicode")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} needs exactly dtype, shape and data_offsets, has {str(entry)[:120]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{where} has the dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > 32:
            raise ValueError(f"{where} has a shape that is not a list of at most 32 sizes: {str(shape)[:120]}")
        sizes = tuple(_size(d, f"a dimension of {where}") for d in shape)
        if not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError(f"{where} has data_offsets {str(offsets)[:120]}, needs [begin, end]")
        begin, end = (_size(o, f"an offset of {where}") for o in offsets)
        if begin > end or end > data_nbytes:
            raise ValueError(f"{where} lies at [{begin}, {end}), outside the {data_nbytes} bytes of data")
        bits = DTYPES[dtype][1]
        if bits < 8 and (not sizes or sizes[-1] * bits % 8):
            raise ValueError(f"{where} is {dtype} of shape {list(sizes)}, whose rows are not whole bytes")
        need = math.prod(sizes) * bits // 8
        if need != end - begin:
            raise ValueError(
                f"{where} is {dtype} of shape {list(sizes)}, which takes {need} bytes, but its offsets span {end - begin}"
            )
        tensors.append(TensorInfo(name, dtype, sizes, file, base + begin, need))
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    at = base
    for t in tensors:
        if t.start != at:
            kind = "overlaps the tensor before it" if t.start < at else f"leaves a hole of {t.start - at} bytes"
            raise ValueError(f"tensor {t.name[:200]!r} in {file} {kind}: the file is corrupt")
        at += t.nbytes
    if at != base + data_nbytes:
        raise ValueError(
            f"{file} holds {data_nbytes} bytes of data, its header describes {at - base}: the file is corrupt or truncated"
        )
    return {t.name: t for t in tensors}, metadata


def parse_index(raw: bytes, what: str = INDEX) -> dict[str, str]:
    """``weight_map`` of an index; ValueError for file names that are not plain names of safetensors files."""
    weight_map = load_json(raw, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{what} has no weight_map of tensor names to file names")
    for file in {f if isinstance(f, str) else repr(f): f for f in weight_map.values()}.values():
        _check_file_name(file, what)
    return weight_map


def _check_file_name(file: Any, what: str) -> None:
    plain = isinstance(file, str) and file.isprintable() and 0 < len(file.encode(errors="replace")) <= 255
    if not plain or "/" in file or "\\" in file or not file.endswith(".safetensors") or file.startswith("."):
        raise ValueError(
            f"{what} names the file {str(file)[:200]!r}, needs the plain name of a .safetensors file in the same folder"
        )


def _all_of_a_set(files: list[str]) -> bool:
    """Whether the names (sorted) are x-00001-of-0000n to x-0000n-of-0000n of one x, without a gap."""
    found = [re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", f) for f in files]
    parts = [(m[1], int(m[2]), int(m[3])) for m in found if m]
    return bool(parts) and parts == [(parts[0][0], i + 1, len(files)) for i in range(len(files))]


def _open(folder: Path, file: str) -> int:
    """A read-only descriptor of a regular file that lies in ``folder`` (or in its Hugging Face blob store)."""
    path = folder / file
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    # <repo>/snapshots/<revision>/x -> <repo>/blobs/<hash> is how the Hugging Face cache stores a download.
    allowed = {home} | ({home.parent.parent / "blobs"} if home.parent.name == "snapshots" else set())
    if real.parent not in allowed:
        raise ValueError(f"{path} is a link that leaves its folder (to {real}): replace it by the file itself")
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing from {folder}: download it again") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path} is not a regular file")
    return fd


def _pread(fd: int, view: memoryview, at: int, what: str) -> None:
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], at + done)
        if n == 0:
            raise ValueError(
                f"{what} ended {len(view) - done} bytes early: it shrank while being read, or is truncated"
            )
        done += n


def _pread_bytes(fd: int, n: int, at: int, what: str) -> bytes:
    buffer = bytearray(n)
    _pread(fd, memoryview(buffer), at, what)
    return bytes(buffer)


def _read_header(fd: int, size: int, file: str) -> bytes:
    if size < 8:
        raise ValueError(f"{file} has {size} bytes, too few for a safetensors file, which needs at least 8")
    (n,) = struct.unpack("<Q", _pread_bytes(fd, 8, 0, file))
    if n > HEADER_LIMIT or n > size - 8:
        raise ValueError(
            f"{file} claims a header of {n} bytes in a file of {size} bytes (limit {HEADER_LIMIT}): not safetensors, or truncated"
        )
    return _pread_bytes(fd, n, 8, file)


def bytes_of(t: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return t.reshape(-1).view(torch.uint8).numpy().data


class ShardReader:
    """The tensors of a checkpoint: a folder (with or without an index) or one safetensors file, opened read-only.

    ``tensors`` maps names to TensorInfo in the order of files and bytes; ``metadata`` maps file names to their metadata.
    Opening reads and checks every header and nothing else. Raises ValueError for whatever is missing or contradictory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path} does not exist: give a checkpoint folder or a .safetensors file")
        self.folder = path if path.is_dir() else path.parent
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.sizes: dict[str, int] = {}
        self.headers: dict[str, bytes] = {}
        self._fds: dict[str, int] = {}
        try:
            if path.is_dir():
                files, weight_map = self._find()
            else:
                files, weight_map = [path.name], None
            for file in files:
                self._add(file)
            if weight_map is not None:
                self._check_index(weight_map)
            self.opened = self.stamps()
        except BaseException:
            self.close()
            raise

    def _find(self) -> tuple[list[str], dict[str, str] | None]:
        present = sorted(p.name for p in self.folder.iterdir() if p.name.endswith(".safetensors"))
        if (self.folder / INDEX).exists():
            raw = read_small(self.folder / INDEX)
            weight_map = parse_index(raw, str(self.folder / INDEX))
            return sorted(set(weight_map.values())), weight_map
        if SINGLE in present:
            return [SINGLE], None
        if len(present) == 1 or _all_of_a_set(present):  # OpenAI's own gpt-oss-120b has no index
            return present, None
        if present:
            raise ValueError(
                f"{self.folder} has {len(present)} .safetensors files and no {INDEX} that says which belong"
            )
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            raise ValueError(
                f"{self.folder} has only pickled weights, which are never read: convert them to safetensors"
            )
        raise ValueError(f"{self.folder} has no .safetensors file")

    def _add(self, file: str) -> None:
        _check_file_name(file, str(self.folder))
        fd = self._fds[file] = _open(self.folder, file)
        size = self.sizes[file] = os.fstat(fd).st_size
        try:
            raw = self.headers[file] = _read_header(fd, size, file)
            tensors, self.metadata[file] = parse_header(raw, size - 8 - len(raw), file)
        except ValueError as error:
            raise ValueError(f"{error}; copy or download {self.folder / file} again") from None
        for name, info in tensors.items():
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} is both in {self.tensors[name].file} and in {file}")
            self.tensors[name] = info

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise ValueError(
                    f"the index says that {name!r} is in {file}, but that file does not hold it: download both again"
                )
        for name, info in self.tensors.items():
            if name not in weight_map:
                raise ValueError(
                    f"{info.file} holds {name!r}, which the index does not list: index and shards disagree, download both again"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names in the order of files and bytes."""
        return tuple(self.tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """The shards' file names."""
        return tuple(self._fds)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Where ``name`` lies; KeyError with the nearest names if there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(name, self.tensors, 3, 0.5)
            raise KeyError(f"{self.folder} has no tensor {name!r}; near: {', '.join(near) or 'nothing'}") from None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or a range of its first dimension, in fresh memory of its own (F4 and F6 as their bytes)."""
        info = self.info(name)
        shape = list(info.torch_shape)
        first = 0
        if rows is not None:
            if not shape:
                raise ValueError(f"{name!r} is a scalar and has no rows to select")
            first, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows have the step {step}, needs 1")
            shape[0] = max(0, stop - first)
        buffer = torch.empty(math.prod(shape) * info.torch_dtype.itemsize, dtype=torch.uint8)
        self.read_bytes(info, first * info.row_nbytes if shape else 0, buffer)
        return buffer.view(info.torch_dtype).view(shape)

    def read_bytes(self, info: TensorInfo, offset: int, out: Tensor) -> None:
        """Fill ``out`` (contiguous, CPU) with bytes of the file from ``offset`` after the start of ``info``.

        The range may run on into the tensors that follow in the file. ValueError if the file ends before.
        """
        _pread(self._fds[info.file], bytes_of(out), info.start + offset, info.file)

    def read_ahead(self, info: TensorInfo, offset: int, nbytes: int) -> None:
        """Have the system read these bytes from the disk, if they are not in memory, while we do something else."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fds[info.file], info.start + offset, nbytes, os.POSIX_FADV_WILLNEED)

    def get(self, name: str, expert: int | None = None) -> Tensor:
        """All of a tensor, or entry ``expert`` of its first dimension alone: what layouts read through."""
        return self.read(name) if expert is None else self.read(name, slice(expert, expert + 1))[0]

    def stamps(self) -> list[tuple[int, int]]:
        """(size, modification time in ns) of each file as it is now."""
        found = [os.fstat(fd) for fd in self._fds.values()]
        return [(s.st_size, s.st_mtime_ns) for s in found]

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_small(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes that lies in its folder; ValueError otherwise."""
    fd = _open(path.parent, path.name)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{path} has {size} bytes; {limit} is the limit")
        return _pread_bytes(fd, size, 0, str(path))
    finally:
        os.close(fd)
