"""From planned tensors to a finished output folder: names and bytes of every file, provenance, staging, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layouts import Target, TensorInfo
from .plan import CONFIG_FILES, source_hash
from .shards import INDEX, ShardReader, read_small
from .staging import MANIFEST, Staging
from .writer import Shard, ShardWriter, TensorSpec, plan_shards

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True)
class Output:
    """Every byte of an output that is known before its weights are: shards' places and headers, and the small files."""

    shards: tuple[Shard, ...]
    files: dict[str, bytes]
    fingerprint: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(s.nbytes for s in self.shards) + sum(map(len, self.files.values()))


def arrange(
    reader: ShardReader, made: Sequence[tuple[Sequence[str], Mapping[str, TensorInfo]]]
) -> tuple[list[TensorSpec], list[str]]:
    """The tensors of an output in the source's order, and the names of those that are copied.

    ``made``: (stored tensors that are used up, tensors that are made of them), per weight; whatever is not used up is copied.
    """
    places = {name: i for i, name in enumerate(reader.tensors)}
    consumed = {name for names, _ in made for name in names}
    at: dict[str, list[TensorSpec]] = {}
    for names, tensors in made:
        first = min(names, key=places.__getitem__)
        at.setdefault(first, []).extend(TensorSpec(n, i.dtype, tuple(i.shape)) for n, i in tensors.items())
    specs, copies = [], []
    for info in reader:
        if info.name not in consumed:
            copies.append(info.name)
            specs.append(TensorSpec(info.name, info.torch_dtype, info.torch_shape))
        specs += at.get(info.name, [])
    return specs, copies


def own_version() -> str:
    """The version of mx-quant, or "not installed" where it runs from its sources."""
    try:
        return importlib.metadata.version("mx-quant")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def plan_output(
    reader: ShardReader,
    specs: Sequence[TensorSpec],
    configs: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, str],
    options: Mapping[str, Any],
    max_shard_size: int,
) -> Output:
    """The files of an output with these tensors and configuration files; ``options`` join the fingerprint only.

    ``provenance`` goes into config.json ("mx_quant") and into every shard's metadata, with our version and the source's hash.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}, needs at least one byte")
    full = {
        "version": own_version(),
        **provenance,
        "source_sha256": source_hash(reader),
    }
    shards = plan_shards(specs, max_shard_size, {"format": "pt"} | {f"mx_quant.{k}": v for k, v in full.items()})
    files = small_files(reader.folder)
    for name, text in configs.items():
        more = {"mx_quant": full} if name == "config.json" else {}
        files[name] = (json.dumps({**text, **more}, indent=2) + "\n").encode()
    fingerprint = {
        **full,
        **options,
        "shards": _digest(s.head for s in shards),
        "files": _digest(x for n in sorted(files) for x in (n.encode(), files[n])),
    }
    return Output(shards, files, fingerprint)


def produce(
    reader: ShardReader,
    out: Path,
    output: Output,
    write: Callable[[ShardWriter], None],
    *,
    resume: bool,
    overwrite: bool,
) -> int:
    """Fill ``out`` by calling ``write(writer)``, or what is missing of it; the number of shards that were complete before.

    Where the source turns out to be bad (ValueError, TypeError, KeyError) a resumed run would find the same: nothing is left
    behind. Other errors, those of the machine, leave what is needed to resume.
    """
    witness = {"source_times": [list(s) for s in reader.stamps()]}
    with Staging(out, output.fingerprint, witness, resume=resume, overwrite=overwrite) as staging:
        if staging.complete:
            return len(output.shards)
        staging.begin(output.shards, output.nbytes)
        resumed = len(staging.finished)
        try:
            with ShardWriter(staging.path, output.shards, done=staging.finished, on_shard=staging.record) as writer:
                write(writer)
                writer.finish()
            _check_unchanged(reader)
        except (ValueError, TypeError, KeyError):
            staging.discard()
            raise
        staging.commit(output.files | {MANIFEST: _manifest(output.fingerprint, staging.finished)})
    return resumed


def _check_unchanged(reader: ShardReader) -> None:
    changed = [f for f, old, new in zip(reader.files, reader.opened, reader.stamps(), strict=True) if old != new]
    if changed:
        raise ValueError(f"the source changed during the run ({', '.join(changed)}): run again on a source at rest")


def _digest(parts: Iterable[bytes]) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


def _manifest(fingerprint: Mapping[str, Any], crc: Mapping[str, Mapping[str, int]]) -> bytes:
    """The bytes of ``mx_quant.json``: what made this output, and the CRC-32 of every tensor by file."""
    ordered = {file: crc[file] for file in sorted(crc)}
    return (json.dumps({"fingerprint": fingerprint, "crc32": ordered}, indent=1) + "\n").encode()


def small_files(folder: Path) -> dict[str, bytes]:
    """The other files of a checkpoint folder, which an output takes along: tokenizer, generation config, code ..."""
    found = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name in (*CONFIG_FILES, MANIFEST, INDEX) or name.endswith(_WEIGHT_SUFFIXES):
            continue
        if path.is_file():
            found[name] = read_small(path)
    return found


def stored_names(target: Target, tensors: Mapping[str, Sequence[str]]) -> list[str]:
    """The stored tensors of a target's source weights; ``tensors`` maps a weight to those it occupies."""
    return [t for name in target.sources for t in tensors[name]]


def parse_bytes(text: str | int) -> int:
    """A number of bytes from 4294967296, "4GiB", "500MB", "64k" ...; ValueError otherwise."""
    if isinstance(text, int):
        return text
    units = {"": 1, "b": 1}
    for i, u in enumerate("kmgt"):
        units |= {u: 1024 ** (i + 1), f"{u}ib": 1024 ** (i + 1), f"{u}b": 1000 ** (i + 1)}
    lower = text.strip().lower()
    digits = lower.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = lower[len(digits) :].strip()
    try:
        found = float(digits) * units[unit]
        if not math.isfinite(found) or found < 1:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is not a number of bytes: write 4GiB, 500MB or 4294967296") from None
    return int(found)


def resident() -> int:
    """Bytes of this process in memory (0 where the system does not say)."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def workers_of(jobs: int | None) -> int:
    """The number of worker threads: ``jobs``, or one per CPU this process may use. ValueError below 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = cpus if jobs is None else jobs
    if found < 1:
        raise ValueError(f"jobs is {found}, needs at least 1")
    return found
