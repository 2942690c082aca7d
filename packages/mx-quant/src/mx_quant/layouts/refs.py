"""From tensor names to weight references, and from the weights a source has to the weights a target layout wants.

Experts come fused ([E, N, K] in one tensor) or one by one, gate and up merged or apart. ``regroup`` says which rows of which source
weights make up each target weight; ``assemble`` and ``assemble_plain`` put them together. Quantization runs along K, so rows may be
cut and joined before or after it, bit for bit; only NVFP4's global scales need care (``fold_globals``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mx_kernels import QuantizedTensor

from .base import Get, Infos, TensorInfo, WeightRef
from .families import (
    EXPERT,
    EXPERT_BIAS,
    FUSED_BIAS,
    FUSED_EXPERT,
    LINEAR,
    Family,
    classify,
    deinterleave,
    family_of,
    fused_name,
    interleave,
    stored_as,
)
from .globals import fold_globals

FUSED = "fused"
PER_EXPERT = "per-expert"


def plain_refs(config: Mapping[str, Any], infos: Infos) -> list[WeightRef]:
    """The full-precision weights of a checkpoint that could be quantized, and the biases that belong to experts.

    Linears and experts are 2-D ``.weight`` tensors (routers, norms and embeddings excluded; lm_head included), fused experts 3-D.
    Shapes are canonical: transposed storage is undone by ``read_plain``.
    """
    family = family_of(config, infos)
    out = []
    for name, info in infos.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            continue
        shape, role = tuple(info.shape), classify(name)
        inter, swap = stored_as(name, family)
        if role.kind == FUSED_EXPERT and len(shape) == 3:
            canonical = (shape[0], shape[2], shape[1]) if swap else shape
            out.append(WeightRef(name, FUSED_EXPERT, canonical, None, (name,), interleaved=inter, transposed=swap))
        elif role.kind == FUSED_BIAS and len(shape) == 2:
            out.append(WeightRef(name, FUSED_BIAS, shape, None, (name,), interleaved=inter))
        elif role.kind == EXPERT_BIAS and len(shape) == 1:
            out.append(WeightRef(name, EXPERT_BIAS, shape, None, (name,)))
        elif role.kind == EXPERT and len(shape) == 2:
            out.append(WeightRef(name, EXPERT, shape, None, (name,)))
        elif role.kind not in ("router", "norm", "embedding") and name.endswith(".weight") and len(shape) == 2:
            out.append(WeightRef(name, LINEAR, shape, None, (name,)))
    return out


def read_plain(ref: WeightRef, get: Get, *, expert: int | None = None) -> Tensor:
    """A full-precision weight or expert bias in canonical form: K last, gate rows before up rows."""
    x = get(ref.name, expert)
    if ref.transposed:
        x = x.transpose(-1, -2)
    if ref.interleaved:
        x = deinterleave(x, x.ndim - (1 if ref.kind == FUSED_BIAS else 2))
    return x.contiguous()


def write_plain(ref: WeightRef, x: Tensor) -> dict[str, Tensor]:
    """The stored form of a full-precision weight or expert bias (all experts or one): the inverse of ``read_plain``."""
    if ref.interleaved:
        x = interleave(x, x.ndim - (1 if ref.kind == FUSED_BIAS else 2))
    if ref.transposed:
        x = x.transpose(-1, -2)
    return {ref.name: x.contiguous()}


def plan_plain(ref: WeightRef, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Name, dtype and stored shape of a full-precision weight or expert bias."""
    shape = (*ref.shape[:-2], ref.shape[-1], ref.shape[-2]) if ref.transposed else ref.shape
    return {ref.name: TensorInfo(dtype, shape)}


@dataclass(frozen=True)
class Piece:
    """Rows ``start``:``stop`` of source weight ``name`` (of its expert ``expert`` where it is fused), canonical row order."""

    name: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Target:
    """A weight to write and what it is made of: one row of pieces per expert (a single row where it is not fused)."""

    ref: WeightRef
    rows: tuple[tuple[Piece, ...], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source weights it needs, each once."""
        return tuple(dict.fromkeys(p.name for row in self.rows for p in row))


def regroup(refs: Sequence[WeightRef], grouping: str | None, family: Family) -> list[Target]:
    """The weights (and expert biases) of an output whose experts are stored FUSED or PER_EXPERT; None leaves them as they are.

    FUSED joins gate and up into gate_up (an expert without gate keeps its own name). Fused parameters of a transposed family stay
    transposed in full precision, and interleaved ones interleaved. ValueError where experts are missing or differ in shape.
    """
    if grouping not in (None, FUSED, PER_EXPERT):
        raise ValueError(f"unknown grouping {grouping!r}; there are {FUSED!r}, {PER_EXPERT!r} and None")
    out: list[Target] = []
    pending: dict[tuple[str, str], dict[tuple[int, str], WeightRef]] = {}
    for ref in refs:
        if grouping == PER_EXPERT and ref.kind in (FUSED_EXPERT, FUSED_BIAS):
            out += _split(ref, family)
        elif grouping == FUSED and ref.kind in (EXPERT, EXPERT_BIAS):
            role = classify(ref.name)
            assert role.expert is not None
            pending.setdefault((role.experts, ref.kind), {})[role.expert, role.part] = ref
        else:
            out.append(_same(ref, family))
    for (experts, kind), found in pending.items():
        out += _join(experts, kind, found, family)
    return out


def _same(ref: WeightRef, family: Family) -> Target:
    if ref.experts is not None:
        interleaved, transposed = stored_as(ref.name, family)
        ref = replace(ref, interleaved=interleaved, transposed=transposed and ref.kind == FUSED_EXPERT)
    n = ref.shape[-1] if ref.kind in (EXPERT_BIAS, FUSED_BIAS) else ref.shape[-2]
    if ref.experts is None:
        return Target(ref, ((Piece(ref.name, None, 0, n),),))
    return Target(ref, tuple((Piece(ref.name, e, 0, n),) for e in range(ref.experts)))


def _split(ref: WeightRef, family: Family) -> list[Target]:
    """One fused weight -> a weight per expert and projection: gate_up becomes gate and up."""
    role = classify(ref.name)
    bias = ref.kind == FUSED_BIAS
    n = ref.shape[1]
    parts = {"gate_up": ((family.gate, 0, n // 2), (family.up, n // 2, n))}.get(
        role.part, (({"gate": family.gate, "up": family.up}.get(role.part, family.down), 0, n),)
    )
    experts = role.experts if role.experts.endswith("experts") else f"{role.experts}.experts"
    out = []
    for e in range(ref.shape[0]):
        for projection, start, stop in parts:
            target = WeightRef(
                f"{experts}.{e}.{projection}.{'bias' if bias else 'weight'}",
                EXPERT_BIAS if bias else EXPERT,
                (stop - start,) if bias else (stop - start, ref.shape[2]),
                ref.format,
                rule=ref.rule,
                activation=ref.activation,
                input_scale=ref.input_scale,
            )
            out.append(Target(target, ((Piece(ref.name, e, start, stop),),)))
    return out


def _join(experts: str, kind: str, found: dict[tuple[int, str], WeightRef], family: Family) -> list[Target]:
    """Weights per expert and projection -> one fused weight per projection, gate before up."""
    count = 1 + max(e for e, _ in found)
    parts = {part for _, part in found}
    wanted: list[tuple[str, tuple[str, ...]]] = []
    if {"gate", "up"} <= parts:
        wanted.append(("gate_up_proj", ("gate", "up")))
        parts -= {"gate", "up"}
    wanted += [(f"{part}_proj", (part,)) for part in ("gate", "up", "gate_up", "down") if part in parts]
    out = []
    for param, members in wanted:
        rows: list[tuple[Piece, ...]] = []
        shapes: set[tuple[int, ...]] = set()
        refs: list[WeightRef] = []
        for e in range(count):
            for part in members:
                if (e, part) not in found:
                    raise ValueError(
                        f"{experts}: expert {e} has no {part} weight, so {count} experts cannot be fused into {param}"
                    )
            row = [found[e, part] for part in members]
            rows.append(tuple(Piece(r.name, None, 0, r.shape[0]) for r in row))
            shapes.update(r.shape for r in row)
            refs += row
        if len(shapes) != 1:
            raise ValueError(f"{experts}: experts of {param} differ in shape: {sorted(shapes)}; they cannot be fused")
        n, *k = shapes.pop()
        if len({r.format for r in refs}) != 1:
            formats = sorted({str(r.format) for r in refs})
            raise ValueError(
                f"{experts}: experts of {param} differ in format: {', '.join(formats)}; they cannot be fused"
            )
        bias = kind == EXPERT_BIAS
        name = fused_name(experts, param, bias)
        interleaved, transposed = stored_as(name, family)
        target = WeightRef(
            name,
            FUSED_BIAS if bias else FUSED_EXPERT,
            (count, len(members) * n, *k),
            refs[0].format,
            rule=refs[0].rule,
            activation=refs[0].activation,
            input_scale=refs[0].input_scale,
            interleaved=interleaved,
            transposed=transposed and not bias,
        )
        out.append(Target(target, tuple(rows)))
    return out


def assemble(
    target: Target, read: Callable[[str, int | None], QuantizedTensor], expert: int | None = None
) -> QuantizedTensor:
    """The target's QuantizedTensor [N, K] or [E, N, K] (with ``expert``: that one's [N, K]), from ``read(name, expert)``.

    Different NVFP4 global scales within one matrix are folded exactly or refused (ValueError).
    """
    if target.ref.experts is None or expert is not None:
        row = target.rows[expert or 0]
        parts = [_rows(read(p.name, p.expert), p) for p in row]
        if len(parts) == 1:
            return parts[0]
        if parts[0].format.has_global_scale:
            parts = fold_globals(parts, target.ref.name)
        return replace(parts[0], data=torch.cat([p.data for p in parts]), scale=torch.cat([p.scale for p in parts]))
    return stack([assemble(target, read, e) for e in range(target.ref.experts)])


def assemble_input_scale(
    target: Target, read: Callable[[str, int | None], Tensor | None], expert: int | None = None
) -> Tensor | None:
    """The target's activation scale, float32 [] or [E] (with ``expert``: that one's []), from ``read(name, expert)``; None without.

    ValueError where rows of one matrix were calibrated differently: they multiply the same input.
    """
    if target.ref.experts is None or expert is not None:
        found = [read(p.name, p.expert) for p in target.rows[expert or 0]]
        values = {None if f is None else float(f) for f in found}
        if len(values) > 1:
            raise ValueError(
                f"{target.ref.name}: its parts have different input scales ({values}): calibrate them together"
            )
        return found[0]
    each = [assemble_input_scale(target, read, e) for e in range(target.ref.experts)]
    scales = [s for s in each if s is not None]
    if scales and len(scales) != len(each):
        raise ValueError(f"{target.ref.name}: {len(each) - len(scales)} of {len(each)} experts have no input scale")
    return torch.stack(scales) if scales else None


def assemble_plain(target: Target, read: Callable[[str, int | None], Tensor], expert: int | None = None) -> Tensor:
    """The target's canonical full-precision tensor from ``read(name, expert)``; of one expert with ``expert``."""
    if target.ref.experts is None or expert is not None:
        parts = [read(p.name, p.expert)[p.start : p.stop] for p in target.rows[expert or 0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.stack([assemble_plain(target, read, e) for e in range(target.ref.experts)])


def stack(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Experts [N, K] -> [E, N, K]; global scales become [E]."""
    first = parts[0]
    g = [p.global_scale for p in parts if p.global_scale is not None]
    return replace(
        first,
        data=torch.stack([p.data for p in parts]),
        scale=torch.stack([p.scale for p in parts]),
        global_scale=torch.stack(g) if g else None,
    )


def _rows(q: QuantizedTensor, piece: Piece) -> QuantizedTensor:
    """Rows of [N, K]; unlike indexing, a global scale [] is kept."""
    if (piece.start, piece.stop) == (0, q.shape[0]):
        return q
    return replace(q, data=q.data[piece.start : piece.stop], scale=q.scale[piece.start : piece.stop])


def joint_groups(refs: Iterable[WeightRef]) -> dict[str, list[WeightRef]]:
    """Weights that must share one NVFP4 global scale: gate and up of an expert or MLP; q, k and v. Single ones are left out."""
    groups: dict[str, list[WeightRef]] = {}
    for ref in refs:
        group = classify(ref.name).group
        if group is not None:
            groups.setdefault(group, []).append(ref)
    return {name: members for name, members in groups.items() if len(members) > 1}
