"""Open a checkpoint of any layout; store it in another layout, or in full precision again; say what is in it.

Codes and scales are moved, never recomputed: between two layouts of one format every bit is kept. Experts are fused, split
and interleaved as the target layout and the model family want it.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import QuantizedTensor

from .engine import Progress, run_tasks
from .layouts import (
    FAMILIES,
    FUSED,
    LAYOUTS,
    PER_EXPERT,
    Family,
    Layout,
    Target,
    TensorInfo,
    WeightRef,
    assemble,
    classify,
    detect_layout,
    family_of,
    get_layout,
    plain_refs,
    plan_plain,
    read_plain,
    regroup,
    write_plain,
)
from .layouts.gpt_oss_names import Rows, is_original, rename, rename_config, renamed
from .output import arrange, parse_bytes, plan_output, produce, stored_names, workers_of
from .plan import MATRICES, expert_module, grouping_of, read_configs, read_infos, write_biases
from .shards import ShardReader
from .staging import check_places
from .writer import ShardWriter

_ROWS = 1 << 24  # elements that are dequantized together
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Checkpoint:
    """An open checkpoint: ``weights`` are its quantized weights, ``plain`` its matrices and expert biases in full precision.

    layout: the layout of the quantized ones, None where there are none. Use as a context manager. Raises ValueError where
    files, headers or configuration are damaged, contradictory or unknown.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.reader = ShardReader(path)
        try:
            self.configs = read_configs(self.reader.folder)
            self.infos = read_infos(self.reader)
            config = self.configs.get("config.json", {})
            self.layout: Layout | None = detect_layout(self.configs, self.infos)
            refs = self.layout.refs(self.configs, self.infos) if self.layout is not None else []
            self.weights: dict[str, WeightRef] = {r.name: r for r in refs}
            owned = {t for r in refs for t in r.tensors}
            self.plain = {r.name: r for r in plain_refs(config, self.infos) if r.tensors[0] not in owned}
            self.family: Family = family_of(config, self.infos)
        except BaseException:
            self.reader.close()
            raise

    def read(self, name: str, expert: int | None = None) -> QuantizedTensor:
        """A quantized weight in canonical form, or one expert of a fused one."""
        assert self.layout is not None
        return self.layout.read(self.weights[name], self.reader.get, expert=expert)

    def read_plain(self, name: str, expert: int | None = None) -> Tensor:
        """A full-precision weight or expert bias in canonical form, or one expert of it."""
        return read_plain(self.plain[name], self.reader.get, expert=expert)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Conversion:
    """What ``convert_checkpoint`` or ``dequantize_checkpoint`` did. layout_to is None for full precision."""

    src: str
    out: str
    layout_from: str
    layout_to: str | None
    weights: int
    bytes_in: int
    bytes_out: int
    shards: tuple[str, ...]
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self) | {"shards": list(self.shards)}

    def __str__(self) -> str:
        return (
            f"{self.weights} weights: {self.layout_from} -> {self.layout_to or 'full precision'}, "
            f"{self.bytes_in / 1e9:.3f} GB -> {self.bytes_out / 1e9:.3f} GB in {self.seconds:.2f} s"
        )


def _quantized(ck: Checkpoint) -> Layout:
    if ck.layout is None:
        raise ValueError(f"{ck.reader.folder} is not quantized: quantize it first")
    return ck.layout


def convert_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: Layout | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Store the quantized checkpoint ``src`` in another layout, bit for bit: codes, scales and global scales are kept.

    Between "gpt-oss" and "gpt-oss-original" every tensor is renamed, and q, k and v are cut or joined; other layouts keep names.
    ValueError where the layout does not hold a weight's format or kind: nothing is requantized on the way.
    """
    start = time.perf_counter()
    check_places(Path(src), Path(out))
    to = get_layout(layout) if isinstance(layout, str) else layout
    with Checkpoint(src) as ck:
        source = _quantized(ck)
        refs = list(ck.weights.values())
        grouping = grouping_of(to)
        for ref in refs:
            if ref.format not in to.formats:
                raise ValueError(
                    f"{ref.name} is {ref.format}, which layout {to.name} does not hold (it holds "
                    f"{', '.join(f.name for f in to.formats)}): dequantize the checkpoint and quantize it again"
                )
        targets = regroup(refs, grouping, ck.family)
        for target in targets:
            if target.ref.kind not in to.kinds:
                raise ValueError(
                    f"{target.ref.name} is a quantized {target.ref.kind} weight, but layout {to.name} stores only "
                    f"{' and '.join(to.kinds)} weights: choose another layout, or dequantize the checkpoint first"
                )
        moved, tensors = _biases(ck, grouping)
        base = {n: _without_quantization(c) for n, c in ck.configs.items() if n == "config.json"}
        rows: dict[str, tuple[Rows, ...]] = {}
        original = to is LAYOUTS["gpt-oss-original"]
        if (original or to is LAYOUTS["gpt-oss"]) and is_original(ck.infos) != original:
            targets, moved = (_renamed(found, original) for found in (targets, moved))
            used = {n for t in (*targets, *moved) for n in stored_names(t, tensors)}
            config = base.get("config.json", {})
            rows = rename(config, {n: i for n, i in ck.infos.items() if n not in used}, original=original)
            base["config.json"] = rename_config(config, original=original)
        made = [(stored_names(t, tensors), to.plan(t.ref)) for t in targets]
        made += [(stored_names(t, tensors), plan_plain(t.ref, ck.infos[t.sources[0]].dtype)) for t in moved]
        made += [([r.name for r in parts], {name: _joined_info(ck, parts)}) for name, parts in rows.items()]
        specs, copies = arrange(ck.reader, made)
        moves = [*_whole(ck, copies), *(m for name, parts in rows.items() for m in _moves(ck, name, parts))]
        named = [replace(t.ref, tensors=tuple(to.plan(t.ref))) for t in targets]
        infos = {s.name: TensorInfo(s.dtype, s.shape) for s in specs}
        activations = bool(to.activations) and any(r.activation is not None for r in refs)
        configs = {**base, **to.config(base, named, infos, activations=activations)}
        provenance = {"format": str(refs[0].format), "rule": str(refs[0].rule or ""), **_origin(ck), "layout": to.name}
        output = plan_output(ck.reader, specs, configs, provenance, {}, parse_bytes(max_shard_size))

        def write(writer: ShardWriter) -> None:
            write_biases(ck.reader, writer, moved, ck.plain)
            _run(ck, writer, targets, moves, lambda t, e: _move(ck, source, to, writer, t, e), jobs, progress)

        resumed = produce(ck.reader, Path(out), output, write, resume=resume, overwrite=overwrite)
        return Conversion(
            str(src), str(out), source.name, to.name, len(refs), sum(ck.reader.sizes.values()), output.nbytes,
            tuple(s.file for s in output.shards), resumed, time.perf_counter() - start,
        )  # fmt: skip


def _biases(ck: Checkpoint, grouping: str | None) -> tuple[list[Target], dict[str, tuple[str, ...]]]:
    """Expert biases that change their grouping, and the stored tensors of every weight and of those biases."""
    owners = {expert_module(n) for n in ck.weights} - {""}
    biases = [r for r in ck.plain.values() if r.kind not in MATRICES and expert_module(r.name) in owners]
    moved = [t for t in regroup(biases, grouping, ck.family) if t.ref.name not in ck.plain]
    return moved, {r.name: r.tensors for r in (*ck.weights.values(), *biases)}


@dataclass(frozen=True)
class _Bytes:
    """``nbytes`` bytes of the stored tensor ``source`` from ``start`` on, which become those of ``name`` from ``offset`` on."""

    source: str
    start: int
    nbytes: int
    name: str
    offset: int


def _whole(ck: Checkpoint, names: Sequence[str]) -> list[_Bytes]:
    return [_Bytes(n, 0, ck.reader.tensors[n].nbytes, n, 0) for n in names]


def _moves(ck: Checkpoint, name: str, parts: Sequence[Rows]) -> list[_Bytes]:
    found, at = [], 0
    for r in parts:
        each = ck.reader.tensors[r.name].row_nbytes
        found.append(_Bytes(r.name, r.start * each, (r.stop - r.start) * each, name, at))
        at += found[-1].nbytes
    return found


def _joined_info(ck: Checkpoint, parts: Sequence[Rows]) -> TensorInfo:
    """Dtype and shape of rows put together; ValueError where they differ in either."""
    infos = [ck.infos[r.name] for r in parts]
    if len({(i.dtype, tuple(i.shape[1:])) for i in infos}) > 1:
        raise ValueError(f"{', '.join(r.name for r in parts)} differ in dtype or columns: they cannot be joined")
    rows = (sum(r.stop - r.start for r in parts),) if infos[0].shape else ()
    return TensorInfo(infos[0].dtype, (*rows, *infos[0].shape[1:]))


def _renamed(targets: Sequence[Target], original: bool) -> list[Target]:
    """Experts and their biases under gpt-oss's other names."""
    found = []
    for t in targets:
        name = renamed(t.ref.name, original=original)
        if name is None:
            raise ValueError(f"{t.ref.name} is not named as gpt-oss names experts: choose another layout")
        found.append(replace(t, ref=replace(t.ref, name=name)))
    return found


def _run(
    ck: Checkpoint,
    writer: ShardWriter,
    targets: Sequence[Target],
    copies: Sequence[_Bytes],
    work: Callable[[Target, int | None], None],
    jobs: int | None,
    progress: Progress | None,
) -> None:
    """Do every matrix of the targets with ``work``, and copy the bytes that are only copied."""
    tasks: list[tuple[Target, int | None] | _Bytes] = [*copies]
    for t in targets:
        tasks += [(t, e) for e in (range(t.ref.experts) if t.ref.experts is not None else (None,))]

    def nbytes(task: tuple[Target, int | None] | _Bytes) -> int:
        if isinstance(task, _Bytes):
            return task.nbytes
        target, expert = task
        return math.prod(target.ref.shape if expert is None else target.ref.shape[1:])

    def do(task: tuple[Target, int | None] | _Bytes, buffer: Tensor) -> None:
        if not isinstance(task, _Bytes):
            work(*task)
        elif writer.needs(task.name):
            _copy(ck.reader, writer, task, buffer)

    workers = workers_of(jobs)
    run_tasks(tasks, [nbytes(t) for t in tasks], do, workers, buffer_nbytes=8 << 20, progress=progress)


def _copy(reader: ShardReader, writer: ShardWriter, task: _Bytes, buffer: Tensor) -> None:
    """Copy bytes through ``buffer`` (uint8)."""
    info = reader.info(task.source)
    for at in range(0, task.nbytes, buffer.numel()):
        part = buffer[: min(buffer.numel(), task.nbytes - at)]
        reader.read_bytes(info, task.start + at, part)
        writer.write(task.name, part, task.offset + at)


def _move(ck: Checkpoint, source: Layout, to: Layout, writer: ShardWriter, target: Target, expert: int | None) -> None:
    names = to.plan(target.ref)
    if not any(writer.needs(n) for n in names):
        return
    q = assemble(target, ck.read, expert)
    scale = None
    if target.ref.input_scale is not None:
        found = [
            source.read_input_scale(ck.weights[p.name], ck.reader.get, expert=p.expert)
            for p in target.rows[expert or 0]
        ]
        scales = [s for s in found if s is not None]
        if any(not torch.equal(s, scales[0]) for s in scales):
            raise ValueError(
                f"{target.ref.name} is joined from weights with different input scales, which cannot be one"
            )
        scale = scales[0] if scales else None
    options: dict[str, Any] = {} if scale is None else {"input_scale": scale}
    for name, t in to.write(target.ref, q, expert=expert, **options).items():
        if writer.needs(name):
            writer.write(name, t.contiguous(), 0 if expert is None else expert * t.nbytes)


def _origin(ck: Checkpoint) -> dict[str, str]:
    """What an earlier run of ours noted of the full-precision source, where there was one."""
    made = ck.configs.get("config.json", {}).get("mx_quant")
    if not isinstance(made, Mapping):
        return {}
    found = {"rule": made.get("rule"), "origin_sha256": made.get("origin_sha256", made.get("source_sha256"))}
    return {k: v for k, v in found.items() if isinstance(v, str)}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in config.items() if k not in ("quantization_config", "mx_quant")}
    if isinstance(found.get("text_config"), Mapping):
        found["text_config"] = {k: v for k, v in found["text_config"].items() if k != "quantization_config"}
    return found


def dequantize_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Store the quantized checkpoint ``src`` in full precision (bfloat16, float16 or float32).

    Experts are named and stored as the model family has them: gpt-oss and Llama 4 fused and transposed, others one by one;
    an unknown family keeps the grouping of ``src``.
    """
    start = time.perf_counter()
    check_places(Path(src), Path(out))
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    with Checkpoint(src) as ck:
        source = _quantized(ck)
        refs = list(ck.weights.values())
        grouping = FUSED if ck.family.transposed else None if ck.family is FAMILIES["default"] else PER_EXPERT
        targets = regroup(refs, grouping, ck.family)
        moved, tensors = _biases(ck, grouping)
        plain = {t.ref.name: _plain_ref(t.ref, ck.family) for t in targets}
        made = [(stored_names(t, tensors), plan_plain(plain[t.ref.name], DTYPES[dtype])) for t in targets]
        made += [(stored_names(t, tensors), plan_plain(t.ref, ck.infos[t.sources[0]].dtype)) for t in moved]
        specs, copies = arrange(ck.reader, made)
        configs = {n: _without_quantization(c) for n, c in ck.configs.items() if n == "config.json"}
        provenance = {**_origin(ck), "format": dtype, "layout": ""}
        output = plan_output(ck.reader, specs, configs, provenance, {}, parse_bytes(max_shard_size))

        def expand(writer: ShardWriter, target: Target, expert: int | None) -> None:
            ref = plain[target.ref.name]
            if not writer.needs(ref.name):
                return
            q = assemble(target, ck.read, expert)
            rows = max(1, _ROWS // q.shape[-1]) if expert is None else q.shape[0]
            for at in range(0, q.shape[0], rows):
                part = replace(q, data=q.data[at : at + rows], scale=q.scale[at : at + rows])
                x = mk.dequantize(part, DTYPES[dtype])
                (stored,) = write_plain(ref, x).values()
                writer.write(ref.name, stored, at * x.shape[-1] * x.itemsize if expert is None else expert * x.nbytes)

        def write(writer: ShardWriter) -> None:
            write_biases(ck.reader, writer, moved, ck.plain)
            _run(ck, writer, targets, _whole(ck, copies), lambda t, e: expand(writer, t, e), jobs, progress)

        resumed = produce(ck.reader, Path(out), output, write, resume=resume, overwrite=overwrite)
        return Conversion(
            str(src), str(out), source.name, None, len(refs), sum(ck.reader.sizes.values()), output.nbytes,
            tuple(s.file for s in output.shards), resumed, time.perf_counter() - start,
        )  # fmt: skip


def _plain_ref(ref: WeightRef, family: Family) -> WeightRef:
    """The full-precision form of a quantized weight: fused experts transposed and interleaved as the family has them."""
    part, original = classify(ref.name).part, ref.name.endswith(("mlp1_weight", "mlp2_weight"))
    fused = ref.experts is not None
    return replace(
        ref,
        format=None,
        rule=None,
        input_scale=None,
        tensors=(ref.name,),
        transposed=fused and family.transposed and not original and part in ("gate_up", "down"),
        interleaved=fused and family.interleaved and part == "gate_up",
    )


def inspect_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a checkpoint, from its headers: layout, bytes by format, how experts are stored, share of weights quantized.

    JSON-ready. Bytes of a quantized weight include its scales; parameters count logical elements.
    """
    with Checkpoint(path) as ck:
        formats: dict[str, dict[str, int]] = {}
        quantized = 0
        for ref in ck.weights.values():
            row = formats.setdefault(str(ref.format), {"weights": 0, "parameters": 0, "bytes": 0})
            row["weights"] += ref.experts or 1
            row["parameters"] += math.prod(ref.shape)
            row["bytes"] += sum(ck.reader.tensors[t].nbytes for t in ref.tensors)
            quantized += math.prod(ref.shape)
        owned = {t for r in ck.weights.values() for t in r.tensors}
        for info in ck.reader:
            if info.name not in owned:
                row = formats.setdefault(info.dtype.lower(), {"weights": 0, "parameters": 0, "bytes": 0})
                row["weights"] += 1
                row["parameters"] += info.numel
                row["bytes"] += info.nbytes
        total = quantized + sum(i.numel for i in ck.reader if i.name not in owned)
        every = (*ck.weights.values(), *ck.plain.values())
        kinds = Counter(r.kind for r in every if r.kind in ("expert", "fused_expert"))
        experts = sum(math.prod(r.shape) for r in every if r.kind in kinds)
        experts_quantized = sum(math.prod(r.shape) for r in ck.weights.values() if r.kind in kinds)
        config = ck.configs.get("config.json", {})
        return {
            "path": str(path),
            "layout": ck.layout.name if ck.layout is not None else None,
            "family": ck.family.name,
            "experts": "fused" if kinds["fused_expert"] else "per-expert" if kinds["expert"] else None,
            "shards": len(ck.reader.files),
            "tensors": len(ck.reader),
            "bytes": sum(ck.reader.sizes.values()),
            "parameters": total,
            "coverage": quantized / max(1, total),
            "expert_coverage": experts_quantized / experts if experts else None,
            "formats": formats,
            "unquantized_experts": [r.name for r in ck.plain.values() if r.kind in kinds] if ck.weights else [],
            "made_by": config.get("mx_quant"),
        }
