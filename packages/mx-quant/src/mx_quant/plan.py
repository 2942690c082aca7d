"""What a quantization run will do, decided from headers alone: which weights, under which names, in which order.

``select`` decides weight by weight and gives a reason for each one left out; ``bundles`` cuts the work into pieces that fit
a buffer: whole matrices, experts of a fused tensor, or rows of a matrix that is too large. Weights that share an NVFP4
global scale, or the bytes they are cut from, stay together where they fit.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mx_kernels import Format

from .layouts import (
    FUSED,
    PER_EXPERT,
    Family,
    Infos,
    Layout,
    Target,
    TensorInfo,
    WeightRef,
    assemble_plain,
    classify,
    read_plain,
    write_plain,
)
from .shards import ShardReader, load_json, read_small
from .writer import ShardWriter

CONFIG_FILES = ("config.json", "hf_quant_config.json")
MATRICES = ("linear", "expert", "fused_expert")
_DEFAULT_KINDS = ("expert", "fused_expert", "shared_expert", "mlp", "attention")
_NAMED = 5  # missing weights that an error names
_LISTED = 1 << 20  # missing weights that are compared with patterns
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Key = tuple[str, int | None]
"""A source tensor, or one expert of it."""


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON configuration files of a checkpoint that layouts look at, by file name."""
    return {
        name: load_json(read_small(folder / name), str(folder / name))
        for name in CONFIG_FILES
        if (folder / name).is_file()
    }


def read_infos(reader: ShardReader) -> dict[str, TensorInfo]:
    """Torch dtype and shape of every tensor, as layouts want them."""
    return {t.name: TensorInfo(t.torch_dtype, t.torch_shape) for t in reader}


def source_hash(reader: ShardReader) -> str:
    """SHA-256 of the source's structure: each shard's name, size and header, and config.json. Not of the weights' values."""
    h = hashlib.sha256()
    for file in reader.files:
        h.update(json.dumps([file, reader.sizes[file], len(reader.headers[file])]).encode())
        h.update(reader.headers[file])
    config = reader.folder / "config.json"
    if config.is_file():
        h.update(read_small(config))
    return h.hexdigest()


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first shell pattern that matches a weight's name, its module, or the module's last part; None without one."""
    module = name.removesuffix(".weight")
    last = module.rpartition(".")[2]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(n, pattern) for n in (name, module, last)):
            return pattern
    return None


@dataclass(frozen=True)
class Selection:
    """Weights to quantize, biases that are stored along with them, and (name, reason) of each matrix that is left as it is."""

    chosen: tuple[WeightRef, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Holes:
    """What the experts of one layer lack: the first names, how many, the experts there must be, and a sentence on why."""

    names: tuple[str, ...]
    missing: int
    count: int
    detail: str


def expert_holes(
    names: Iterable[str],
    family: Family,
    config: Mapping[str, Any] | None = None,
    *,
    fused: Mapping[str, int] | None = None,
    allow: Sequence[str] = (),
) -> list[Holes]:
    """What is missing among expert weights, but for what ``allow`` names.

    Each expert has every matrix that any of its layer has, a down_proj, and an up_proj beside a gate_proj. Their numbers run from
    0 up to what config.json says, or else up to the largest of any layer (a fused tensor cannot lose its end: config.json alone
    tells what it must hold); and where there is a router, there are experts.
    names: of all tensors. fused: the experts that each fused tensor holds.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    routed = []
    for name in names:
        role = classify(name)
        if role.kind == "expert" and role.expert is not None:
            found.setdefault(role.experts, {}).setdefault(role.part, {})[role.expert] = name.split(".")[-2]
        elif role.kind == "router" and name.endswith((".gate.weight", ".router.weight")):
            routed.append(name.rsplit(".", 2)[0])
    counts = {experts: 1 + max(max(present) for present in parts.values()) for experts, parts in found.items()}
    stated, field = _experts_said(config or {})
    said, why = stated, field
    if stated is None and counts:
        largest = max(counts, key=counts.__getitem__)
        said, why = counts[largest], f"{largest} has {counts[largest]}"
    holes = []
    for experts, parts in found.items():
        count = max(counts[experts], said or 0)
        wanted = {part: next(iter(present.values())) for part, present in parts.items()}
        wanted.setdefault("down", family.down)
        if "gate" in wanted:
            wanted.setdefault("up", family.up)
        missing = count * len(wanted) - sum(map(len, parts.values()))
        if not missing:
            continue
        # A corrupt name may claim an expert of any number: the names are not listed beyond the first.
        lacking: Iterable[str] = (
            f"{experts}.{e}.{projection}.weight"
            for e in range(count)
            for part, projection in wanted.items()
            if e not in parts.get(part, ())
        )
        if allow and missing <= _LISTED:
            lacking = [n for n in lacking if matches(n, allow) is None]
            missing = len(lacking)
        if missing:
            need = f"each of the {count} experts of {experts} needs {', '.join(wanted.values())}"
            need += f" ({why})" if count > counts[experts] else ""
            holes.append(Holes(tuple(islice(lacking, _NAMED)), missing, count, need))
    layers = {*found, *(classify(n).experts for n in fused or {})}
    for module in routed:
        if not layers & {module, f"{module}.experts"} and matches(f"{module}.experts", allow) is None:
            holes.append(Holes((f"{module}.experts",), 1, 1, f"{module} has a router and no experts"))
    for name, n in (fused or {}).items():
        if stated is not None and n < stated and matches(name, allow) is None:
            holes.append(Holes((name,), stated - n, stated, f"it holds {n} experts of {stated} ({field})"))
    return holes


def _experts_said(config: Mapping[str, Any]) -> tuple[int | None, str]:
    """The number of experts of a layer that config.json states, and where; (None, "") without one."""
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        for field in _EXPERT_COUNTS:
            n = part.get(field)
            if isinstance(n, int) and not isinstance(n, bool) and n > 0:
                return n, f"config.json: {field} is {n}"
    return None, ""


def check_experts(
    refs: Iterable[WeightRef], names: Iterable[str], family: Family, config: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Raise ValueError naming the weights that experts lack, if there are any that ``allow`` does not name."""
    fused = {r.name: r.shape[0] for r in refs if r.kind == "fused_expert"}
    holes = expert_holes(names, family, config, fused=fused, allow=allow)
    if not holes:
        return
    total = sum(h.missing for h in holes)
    listed = ", ".join([n for h in holes for n in h.names][:_NAMED])
    raise ValueError(
        f"{total} expert weights are missing ({listed}{', ...' if total > _NAMED else ''}): {holes[0].detail}; download the "
        f"checkpoint again, or repair it, or allow them by name (allow_unquantized_experts) if they are not meant to be there"
    )


def grouping_of(layout: Layout) -> str | None:
    """How a layout wants its experts: FUSED, PER_EXPERT, or None where it takes either."""
    fused, single = "fused_expert" in layout.kinds, "expert" in layout.kinds
    return None if fused and single else FUSED if fused else PER_EXPERT


def select(
    refs: Sequence[WeightRef],
    infos: Infos,
    layout: Layout,
    format: Format,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unquantized_experts: Sequence[str] = (),
) -> Selection:
    """Which of the full-precision weights ``refs`` are quantized.

    Linears of attention, MLPs and shared experts, and experts, are; ``include`` adds others (lm_head), ``exclude`` takes away.
    ValueError where an ``include`` matches nothing, where nothing at all is left, and where expert weights would stay in full
    precision without being excluded or allowed by name.
    """
    matrices = [r for r in refs if r.kind in MATRICES]
    for pattern in include:
        if not any(matches(r.name, (pattern,)) for r in matrices):
            raise ValueError(
                f"include {pattern!r} matches no weight that can be quantized (routers, norms and embeddings never are)"
            )
    chosen, skipped, lost = [], [], []
    for ref in matrices:
        reason, by_name = _why_not(ref, infos, layout, format, include, exclude)
        if reason is None:
            chosen.append(ref)
            continue
        skipped.append((ref.name, reason))
        if ref.kind != "linear" and not by_name and matches(ref.name, allow_unquantized_experts) is None:
            lost.append((ref.name, reason))
    known = {r.name for r in refs}
    for name, info in infos.items():
        wide = info.dtype.is_floating_point and info.dtype.itemsize > 1
        expert = "expert" in name and (info.dtype.is_floating_point or name.endswith(".weight"))
        if name in known or len(info.shape) < 2 or not (expert or (name.endswith(".weight") and not wide)):
            continue
        if classify(name).kind in ("router", "norm", "embedding", "expert_bias", "fused_bias"):
            continue
        reason = "its name is not one of a known expert weight" if wide else _wrong_dtype(info.dtype)
        skipped.append((name, reason))
        if expert and matches(name, (*exclude, *allow_unquantized_experts)) is None:
            lost.append((name, reason))
    if lost:
        listed = "; ".join(f"{n}: {why}" for n, why in lost[:3])
        raise ValueError(
            f"{len(lost)} expert weights would stay in full precision ({listed}{'; ...' if len(lost) > 3 else ''}): "
            f"exclude them, or allow them by name (allow_unquantized_experts), if that is intended"
        )
    if not chosen:
        listed = "; ".join(f"{n}: {why}" for n, why in skipped[:3])
        raise ValueError(f"no weight is left to quantize ({listed or 'the checkpoint has no matrices'})")
    return Selection(tuple(chosen), tuple(skipped))


def _why_not(
    ref: WeightRef, infos: Infos, layout: Layout, format: Format, include: Sequence[str], exclude: Sequence[str]
) -> tuple[str | None, bool]:
    """Why a weight is not quantized (None: it is), and whether the caller asked for that by name."""
    pattern = matches(ref.name, exclude)
    if pattern is not None:
        return f"excluded by {pattern!r}", True
    role = classify(ref.name)
    if role.kind not in _DEFAULT_KINDS and matches(ref.name, include) is None:
        return f"{'lm_head' if role.kind == 'lm_head' else 'not a known kind of linear'}: include it by name", False
    dtype = infos[ref.tensors[0]].dtype
    if dtype not in _SOURCE_DTYPES:
        return _wrong_dtype(dtype), False
    grouping = grouping_of(layout)
    kind = {FUSED: "fused_expert", PER_EXPERT: "expert", None: ref.kind}[grouping] if ref.kind != "linear" else "linear"
    if kind not in layout.kinds:
        return f"the layout {layout.name} stores only {' and '.join(layout.kinds)} weights", False
    if ref.shape[-1] % format.block or ref.shape[-1] == 0 or math.prod(ref.shape) == 0:
        return f"K of {list(ref.shape)} is not a positive multiple of {format}'s block {format.block}", False
    return None, False


def _wrong_dtype(dtype: torch.dtype) -> str:
    return f"its dtype is {dtype}, needs bfloat16, float16 or float32"


@dataclass(frozen=True)
class Unit:
    """One matrix [N, K] to quantize and write, or rows of it.

    expert: which expert of a fused target. rows: which rows of the target's matrix are made (all of them unless it is large).
    keys: the source tensors or experts it is made of. plain: those are one tensor whose stored rows are exactly the target's.
    group: weights with equal group share one NVFP4 global scale.
    """

    target: Target
    expert: int | None
    rows: tuple[int, int]
    keys: tuple[Key, ...]
    plain: bool
    group: tuple[str, int | None]

    @property
    def part(self) -> bool:
        """Whether it is only some rows of its matrix."""
        return self.rows != (0, self.target.ref.shape[-2])


@dataclass(frozen=True)
class Copy:
    """Bytes [start, stop) of a tensor that is written as it is."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Bundle:
    """Work that is done together; ``nbytes`` of the source are in memory meanwhile."""

    items: tuple[Unit | Copy, ...]
    nbytes: int


def key_nbytes(reader: ShardReader, key: Key) -> int:
    """Bytes of a source tensor or of one expert of it."""
    info = reader.tensors[key[0]]
    return info.nbytes if key[1] is None else info.row_nbytes


def item_nbytes(reader: ShardReader, item: Unit | Copy) -> int:
    """Bytes of the source that an item takes."""
    if isinstance(item, Copy):
        return item.stop - item.start
    if item.part:
        return (item.rows[1] - item.rows[0]) * reader.tensors[item.keys[0][0]].row_nbytes
    return sum(key_nbytes(reader, key) for key in item.keys)


def units_of(target: Target, sources: Mapping[str, WeightRef]) -> list[Unit]:
    """A unit per matrix of a target."""
    group = classify(target.ref.name).group or target.ref.name
    units = []
    for i, row in enumerate(target.rows):
        expert = None if target.ref.experts is None else i
        keys = tuple(dict.fromkeys((p.name, p.expert) for p in row))
        piece, source = row[0], sources[row[0].name]
        whole = (piece.start, piece.stop) == (0, source.shape[-2])
        plain = len(row) == 1 and whole and not source.transposed and not source.interleaved
        units.append(
            Unit(
                target,
                expert,
                (0, target.ref.shape[-2]),
                keys,
                plain,
                (group, expert if expert is not None else piece.expert),
            )
        )
    return units


def bundles(
    reader: ShardReader,
    targets: Sequence[Target],
    sources: Mapping[str, WeightRef],
    copies: Iterable[str],
    *,
    joint: bool,
    limit: int,
) -> list[Bundle]:
    """The work in the order of the source's bytes, in bundles of at most ``limit`` bytes of source.

    joint: weights of one group share a global scale. A matrix that cannot be cut into rows (one that is transposed, interleaved
    or joined) forms a bundle of its own even where it is larger.
    """
    together: dict[Any, list[Unit]] = {}
    for target in targets:
        for unit in units_of(target, sources):
            together.setdefault(unit.group if joint else unit.keys[0], []).append(unit)
    found: list[Bundle] = []
    for units in together.values():
        keys = dict.fromkeys(key for unit in units for key in unit.keys)
        nbytes = sum(key_nbytes(reader, key) for key in keys)
        if nbytes <= limit:
            found.append(Bundle(tuple(units), nbytes))
            continue
        for unit in units:
            parts = _cut(reader, unit, limit) if unit.plain and unit.expert is None else [unit]
            found += [Bundle((p,), item_nbytes(reader, p)) for p in parts]
    for name in copies:
        n = reader.tensors[name].nbytes
        found += [Bundle((Copy(name, a, min(a + limit, n)),), min(limit, n - a)) for a in range(0, n, limit)]
    files = {file: i for i, file in enumerate(reader.files)}

    def place(bundle: Bundle) -> tuple[int, int, int]:
        item = bundle.items[0]
        name, expert = (item.name, None) if isinstance(item, Copy) else item.keys[0]
        info = reader.tensors[name]
        inside = item.start if isinstance(item, Copy) else (expert or 0) * info.row_nbytes
        return files[info.file], info.start + inside, 0 if isinstance(item, Copy) else item.rows[0]

    return sorted(found, key=place)


def _cut(reader: ShardReader, unit: Unit, limit: int) -> list[Unit]:
    row = reader.tensors[unit.keys[0][0]].row_nbytes
    step, n = max(1, limit // row), unit.rows[1]
    return [replace(unit, rows=(a, min(a + step, n))) for a in range(0, n, step)]


def pack(found: Sequence[Bundle], limit: int) -> list[Bundle]:
    """Neighbouring bundles joined into larger ones of at most ``limit`` bytes."""
    packed: list[list[Bundle]] = []
    filled = 0
    for bundle in found:
        if not packed or filled + bundle.nbytes > limit:
            packed.append([])
            filled = 0
        packed[-1].append(bundle)
        filled += bundle.nbytes
    return [Bundle(tuple(i for b in group for i in b.items), sum(b.nbytes for b in group)) for group in packed]


def expert_module(name: str) -> str:
    """The experts module that an expert weight or bias belongs to, "" for other tensors."""
    return classify(name).experts


def write_biases(
    reader: ShardReader, writer: ShardWriter, targets: Sequence[Target], sources: Mapping[str, WeightRef]
) -> None:
    """Write expert biases that are stored in another grouping than the source's."""

    def read(name: str, expert: int | None) -> Tensor:
        return read_plain(sources[name], reader.get, expert=expert)

    for target in targets:
        for name, x in write_plain(target.ref, assemble_plain(target, read)).items():
            if writer.needs(name):
                writer.write(name, x)
