"""Is a quantized checkpoint whole and sane, and how far is it from its source?

Everything is looked at: headers, configuration, the CRC-32 of each tensor where the manifest has it, every scale and FP8 code,
every value in full precision. A finding names the tensor and what is wrong with it; nothing is repaired.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mx_kernels import QuantizedTensor

from .convert import Checkpoint
from .engine import Progress, refuse_nonfinite, run_tasks
from .layouts import PER_EXPERT, Target, WeightRef, assemble, assemble_plain, regroup
from .output import workers_of
from .plan import MATRICES, expert_holes, matches, source_hash
from .report import Report, compare
from .shards import ShardReader, bytes_of, load_json, read_small
from .staging import MANIFEST

_PIECE = 8 << 20  # bytes of a tensor looked at together
MIN_SNR = 6.0  # dB; the coarsest format (MXFP4, any rule) stays above 14 on weights, unrelated weights below 0


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: ``tensor`` is a tensor, a weight or a file; ``kind`` one word; ``detail`` a sentence."""

    tensor: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.tensor}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What ``verify_checkpoint`` found. weights, tensors: how many were looked at; hashed: tensors whose CRC-32 was compared."""

    path: str
    layout: str | None
    findings: tuple[Finding, ...]
    weights: int = 0
    tensors: int = 0
    hashed: int = 0
    report: Report | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "path": self.path,
            "ok": self.ok,
            "layout": self.layout,
            "weights": self.weights,
            "tensors": self.tensors,
            "hashed": self.hashed,
            "findings": [asdict(f) for f in self.findings],
            "against": None if self.report is None else self.report.to_dict(),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.path}: layout {self.layout or 'none'}, {self.weights} quantized weights, {self.tensors} tensors, "
            f"{self.hashed} checked against their CRC-32"
        ]
        if self.report is not None and self.report.rows:
            worst = self.report.worst(1)[0]
            lines.append(
                f"SNR against the source: {self.report.total.snr_db:.2f} dB over all, lowest {worst.error.snr_db:.2f} dB ({worst.name})"
            )
            layers = [f"{n}: {snr:.2f}" for n, snr in self.report.layers().items()]
            lines += [f"  layers  {', '.join(layers[i : i + 8])}" for i in range(0, len(layers), 8)]
        lines += [f"  {f}" for f in self.findings[:50]]
        if len(self.findings) > 50:
            lines.append(f"  ... and {len(self.findings) - 50} more")
        lines.append("ok" if self.ok else f"{len(self.findings)} problem(s)")
        return "\n".join(lines)


def verify_checkpoint(
    out: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    allow_unquantized_experts: Sequence[str] = (),
    min_snr: float = MIN_SNR,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Look for everything that can be wrong with the quantized checkpoint ``out``.

    Damaged or contradictory files; tensors, or matrices of experts, that are missing; wrong shapes; scales that are NaN, zero
    under codes that are not, or out of range; FP8 codes and full-precision values that are not finite; experts left in full
    precision or not there (unless allowed by name); tensors that differ from their CRC-32. With ``against``, its source: tensors that were
    lost or changed, and the SNR of every weight, which must be at least ``min_snr`` dB.

    Never raises for what is wrong with ``out``; ValueError for a bad argument or an unreadable ``against``.
    """
    path = Path(out)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a quantized checkpoint")
    try:
        ck = Checkpoint(path)
    except (ValueError, TypeError, OSError) as e:
        return Verification(str(path), None, (Finding(path.name, "unreadable", str(e)),))
    with ck:
        findings: list[Finding] = []
        if ck.layout is None:
            findings.append(Finding(path.name, "unquantized", "no weight is quantized"))
        findings += [
            Finding(r.name, "unquantized", "expert weights in full precision")
            for r in ck.plain.values()
            if r.kind in MATRICES and r.kind != "linear" and matches(r.name, allow_unquantized_experts) is None
        ]
        fused = {r.name: r.shape[0] for r in (*ck.weights.values(), *ck.plain.values()) if r.kind == "fused_expert"}
        config = ck.configs.get("config.json", {})
        for h in expert_holes(
            [*ck.weights, *ck.infos], ck.family, config, fused=fused, allow=allow_unquantized_experts
        ):
            rest = f" ({h.missing} of this layer are missing)" if h.missing > 1 else ""
            findings += [Finding(n, "missing", h.detail + rest) for n in h.names]
        crc, more = _manifest(ck)
        findings += more
        owned = {t for r in ck.weights.values() for t in r.tensors}

        def work(task: str | WeightRef, buffer: Tensor) -> None:
            if isinstance(task, str):
                findings.extend(_tensor(ck.reader, task, crc.get(task), task not in owned, buffer))
            else:
                findings.extend(_weight(ck, task))

        tasks: list[str | WeightRef] = [*ck.reader.names, *ck.weights.values()]
        sizes = [t.nbytes for t in ck.reader] + [
            sum(ck.reader.tensors[n].nbytes for n in r.tensors) for r in ck.weights.values()
        ]
        run_tasks(tasks, sizes, work, workers_of(jobs), buffer_nbytes=_PIECE, progress=progress)
        report = None
        if against is not None:
            with Checkpoint(against) as source:
                more, report = _against(ck, source, min_snr, progress)
                findings += more
        findings.sort(key=lambda f: (f.kind, f.tensor))
        return Verification(
            str(path), ck.layout.name if ck.layout else None, tuple(findings), len(ck.weights), len(ck.reader),
            len(crc), report,
        )  # fmt: skip


def _manifest(ck: Checkpoint) -> tuple[dict[str, int], list[Finding]]:
    """The CRC-32 of tensors by name, and what in the manifest does not fit the files."""
    path = ck.reader.folder / MANIFEST
    if not path.exists():
        return {}, []
    try:
        by_file = load_json(read_small(path), str(path)).get("crc32", {})
        crc = {n: int(c) for tensors in by_file.values() for n, c in tensors.items()}
    except (ValueError, TypeError, AttributeError) as e:
        return {}, [Finding(MANIFEST, "unreadable", str(e))]
    lost = [Finding(n, "missing", f"{MANIFEST} lists it, no shard holds it") for n in crc if n not in ck.reader]
    added = [Finding(n, "unknown", f"{MANIFEST} does not list it") for n in ck.reader.names if n not in crc]
    return {n: c for n, c in crc.items() if n in ck.reader}, lost + added


def _tensor(reader: ShardReader, name: str, crc: int | None, plain: bool, buffer: Tensor) -> list[Finding]:
    """CRC-32 of a tensor and, of one that no quantized weight owns, its values."""
    found = []
    info = reader.info(name)
    if crc is not None:
        seen = 0
        for at in range(0, info.nbytes, buffer.numel()):
            part = buffer[: min(buffer.numel(), info.nbytes - at)]
            reader.read_bytes(info, at, part)
            seen = zlib.crc32(bytes_of(part), seen)
        if seen != crc:
            found.append(Finding(name, "changed", f"its CRC-32 is {seen:08x}, but {crc:08x} was written"))
    if plain and info.torch_dtype in (torch.bfloat16, torch.float16, torch.float32):
        try:
            refuse_nonfinite(reader, name)
        except ValueError as e:
            found.append(Finding(name, "non-finite", str(e)))
    return found


def _weight(ck: Checkpoint, ref: WeightRef) -> list[Finding]:
    """The codes and scales of a quantized weight, expert by expert; one finding of a kind is enough."""
    found: dict[str, Finding] = {}
    for expert in range(ref.experts) if ref.experts is not None else (None,):
        try:
            q = ck.read(ref.name, expert)
            assert ck.layout is not None
            ck.layout.read_input_scale(ref, ck.reader.get, expert=expert)
        except (ValueError, TypeError) as e:
            found.setdefault("scale", Finding(ref.name, "scale", str(e)))
            continue
        where = "" if expert is None else f"expert {expert}: "
        for kind, detail in check_quantized(q):
            found.setdefault(kind, Finding(ref.name, kind, where + detail))
    return list(found.values())


def check_quantized(q: QuantizedTensor) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each thing that is wrong with the values of a quantized tensor [..., N, K]."""
    f, scale, data = q.format, q.scale.view(torch.uint8), q.data.view(torch.uint8)
    if scale.numel() == 0:
        return
    e8m0 = f.scale == "e8m0"
    top = 0xFE if e8m0 else 0x7E
    bad = scale > top
    if bool(bad.any()):
        yield "scale", f"{int(bad.sum())} block scales are NaN or negative, the first at {_first(bad)}"
    if e8m0:
        over = (scale.int() + f.element.emax > 254) & ~bad
        if bool(over.any()):
            yield (
                "scale",
                f"{int(over.sum())} block scales are out of range (values beyond float32), the first at {_first(over)}",
            )
    if f.element.bits == 8:
        special = 0x7F if f.element.name == "e4m3" else 0x7C
        wrong = (data & 0x7F) >= special
        if bool(wrong.any()):
            yield "non-finite", f"{int(wrong.sum())} codes are NaN or infinity, the first at {_first(wrong)}"
        used = (data & 0x7F) != 0
    elif f.element.bits == 4:
        used = (data & 0x77) != 0
    else:
        # Four FP6 codes share three bytes; the signs are bits 5, 11, 17 and 23.
        mask = torch.tensor([0xDF, 0xF7, 0x7D], dtype=torch.uint8).repeat(data.shape[-1] // 3)
        used = (data & mask) != 0
    live = used.unflatten(-1, (scale.shape[-1], -1)).any(-1)
    zero = (scale == 0) & live
    if bool(zero.all()) or (not e8m0 and bool(zero.any())):
        yield (
            "scale",
            f"{int(zero.sum())} of {scale.numel()} block scales are zero under codes that are not, the first at {_first(zero)}",
        )
    g = q.global_scale
    if g is not None and not bool((torch.isfinite(g) & (g > 0)).all()):
        yield "scale", f"the global scale is {g.flatten()[:4].tolist()}, needs a finite positive number"


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def _against(
    ck: Checkpoint, source: Checkpoint, min_snr: float, progress: Progress | None
) -> tuple[list[Finding], Report | None]:
    if source.layout is not None:
        raise ValueError(f"{source.reader.folder} is quantized itself: give the full-precision source to compare with")
    found: list[Finding] = []
    made = ck.configs.get("config.json", {}).get("mx_quant")
    if isinstance(made, dict):
        digest = made.get("origin_sha256", made.get("source_sha256"))
        if digest not in (None, source_hash(source.reader)):
            found.append(Finding(ck.reader.folder.name, "source", "it was made from another source: the hashes differ"))
    missing: list[str] = []
    report = compare(pairs(ck, source, missing, progress))
    found += [Finding(n, "missing", "a quantized weight has no counterpart in the source") for n in missing]
    for row in report.rows:
        if not row.error.snr_db >= min_snr:
            found.append(Finding(row.name, "snr", f"{row.error.snr_db:.2f} dB against the source, needs {min_snr}"))
    moved = {p.name for t in _split(ck, source) for row in t.rows for p in row}
    renamed = {p.name for t in _per_expert(source) if t.ref.kind not in MATRICES for row in t.rows for p in row}
    for info in source.reader:
        if info.name in moved or (info.name in renamed and info.name not in ck.reader):
            continue
        if info.name not in ck.reader:
            found.append(Finding(info.name, "missing", "the source has it, the output has not"))
        elif not _same(ck.reader, source.reader, info.name):
            found.append(Finding(info.name, "changed", "it is not quantized, but differs from the source"))
    return found, report


def _per_expert(ck: Checkpoint) -> list[Target]:
    return regroup(list(ck.plain.values()), PER_EXPERT, ck.family)


def _split(ck: Checkpoint, source: Checkpoint) -> list[Target]:
    """The source's weights, expert by expert, of those that ``ck`` has quantized."""
    names = {t.ref.name for t in regroup(list(ck.weights.values()), PER_EXPERT, ck.family)}
    return [t for t in _per_expert(source) if t.ref.name in names]


def pairs(
    ck: Checkpoint, source: Checkpoint, missing: list[str], progress: Progress | None = None
) -> Iterator[tuple[str, Tensor, QuantizedTensor]]:
    """(name, source [N, K], quantized [N, K]) of every quantized weight, fused experts taken apart: what ``compare`` reads.

    Names of quantized weights that the source does not have, or has in another shape, are added to ``missing``. ``progress`` is
    told the elements of those that have been compared.
    """
    plain = {t.ref.name: t for t in _per_expert(source)}
    targets = regroup(list(ck.weights.values()), PER_EXPERT, ck.family)
    total, done = sum(math.prod(t.ref.shape) for t in targets), 0
    for target in targets:
        if progress is not None:
            progress(done, total)
        done += math.prod(target.ref.shape)
        other = plain.get(target.ref.name)
        if other is None or tuple(other.ref.shape) != tuple(target.ref.shape):
            missing.append(target.ref.name)
            continue
        try:
            q = assemble(target, ck.read)
        except (ValueError, TypeError):
            continue  # its scales are damaged, which the checks of weights say
        yield target.ref.name, assemble_plain(other, source.read_plain), q
    if progress is not None:
        progress(done, total)


def _same(a: ShardReader, b: ShardReader, name: str) -> bool:
    x, y = a.info(name), b.info(name)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    one, two = (torch.empty(min(_PIECE, x.nbytes), dtype=torch.uint8) for _ in range(2))
    for at in range(0, x.nbytes, _PIECE):
        n = min(_PIECE, x.nbytes - at)
        a.read_bytes(x, at, one[:n])
        b.read_bytes(y, at, two[:n])
        if not torch.equal(one[:n], two[:n]):
            return False
    return True


def report_checkpoint(
    out: str | os.PathLike[str], source: str | os.PathLike[str], *, progress: Progress | None = None
) -> Report:
    """The error of every quantized weight of ``out`` against its full-precision ``source``, one weight at a time.

    ValueError where ``out`` is not quantized, ``source`` is, or a weight has no counterpart.
    """
    with Checkpoint(out) as ck, Checkpoint(source) as src:
        if ck.layout is None:
            raise ValueError(f"{out} is not quantized: give the quantized checkpoint first, then its source")
        if src.layout is not None:
            raise ValueError(f"{source} is quantized itself: give the full-precision source")
        missing: list[str] = []
        found = compare(pairs(ck, src, missing, progress))
        if missing:
            raise ValueError(
                f"{len(missing)} quantized weights have no counterpart in {source}, the first is {missing[0]}"
            )
        return found
