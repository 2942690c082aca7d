"""Quantize a checkpoint on disk: stream it through a few buffers into a staged output, whatever its size.

A run is planned from the headers (``plan.py``), then worker threads take bundles of it: read bytes, quantize rows that share
K in one call, write each tensor to its place in its shard. Every offset is known from the start, so the order in which
workers finish does not show in the output. See ``staging.py`` for what a kill, a full disk or a second run leave behind.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mx_kernels as mk
from mx_kernels import Format, ScaleRule

from .engine import Progress, Quantizer, buffer_nbytes, run_tasks
from .layouts import (
    LAYOUTS,
    Layout,
    Target,
    TensorInfo,
    WeightRef,
    detect_layout,
    family_of,
    get_layout,
    plain_refs,
    plan_plain,
    regroup,
)
from .output import Output, arrange, parse_bytes, plan_output, produce, resident, workers_of
from .plan import (
    MATRICES,
    bundles,
    check_experts,
    expert_module,
    grouping_of,
    key_nbytes,
    pack,
    read_configs,
    read_infos,
    select,
    write_biases,
)
from .shards import ShardReader
from .staging import check_places
from .writer import ShardWriter

# Bytes of source in a worker's buffer: gate and up of one expert fit, calls are cheap, and 12 MiB are no faster.
_BUNDLE = 8 << 20
_SMALLEST = 1 << 20
_WORKING_SET = 4  # what quantizing takes beside the buffer, in its size: codes and scales, and experts made canonical
_MARGIN = 64 << 20  # allocators, threads' caches of mx_kernels, headers
_START = 1 << 30  # bytes that a disk may read while an accelerator starts


@dataclass(frozen=True)
class QuantizeSummary:
    """What a run did, or with ``dry_run`` would do.

    weights_quantized, parameters_quantized: matrices (an expert of a fused tensor counts as one) and their elements;
    coverage: parameters_quantized / parameters. expert_coverage: the same among expert weights (1.0 without experts).
    skipped: (name, reason) of every matrix left in full precision. resumed: shards that were complete before.
    """

    src: str
    out: str
    format: str
    rule: str
    layout: str
    weights_quantized: int
    parameters: int
    parameters_quantized: int
    expert_parameters: int
    expert_parameters_quantized: int
    bytes_in: int
    bytes_out: int
    shards: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    source_hash: str
    dry_run: bool = False
    resumed: int = 0
    seconds: float = 0.0

    @property
    def coverage(self) -> float:
        """The share of all parameters that is quantized."""
        return self.parameters_quantized / max(1, self.parameters)

    @property
    def expert_coverage(self) -> float:
        """The share of expert parameters that is quantized."""
        return self.expert_parameters_quantized / self.expert_parameters if self.expert_parameters else 1.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        skipped = [{"name": n, "reason": why} for n, why in self.skipped]
        more = {"coverage": self.coverage, "expert_coverage": self.expert_coverage, "skipped": skipped}
        return asdict(self) | {"shards": list(self.shards)} | more

    def __str__(self) -> str:
        verb = "would quantize" if self.dry_run else "quantized"
        lines = [
            f"{verb} {self.weights_quantized} weights to {self.format} ({self.rule}), layout {self.layout}: "
            f"{100 * self.coverage:.2f}% of {self.parameters:,} parameters"
            + (f", {100 * self.expert_coverage:.2f}% of expert parameters" if self.expert_parameters else ""),
            f"{self.bytes_in / 1e9:.3f} GB -> {self.bytes_out / 1e9:.3f} GB in {len(self.shards)} shard(s)"
            + (
                ""
                if self.dry_run
                else f", {self.seconds:.2f} s, {self.bytes_in / 1e9 / max(1e-9, self.seconds):.2f} GB/s"
            ),
        ]
        if self.resumed:
            lines.append(f"{self.resumed} shard(s) were complete already")
        lines += [f"  left as it is: {name}: {why}" for name, why in self.skipped[:20]]
        if len(self.skipped) > 20:
            lines.append(f"  ... and {len(self.skipped) - 20} more")
        return "\n".join(lines)


def quantize_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Format | str,
    *,
    layout: Layout | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unquantized_experts: Sequence[str] = (),
    rule: ScaleRule | str | None = None,
    search: bool = False,
    activations: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    max_memory: int | str = "4GiB",
    max_shard_size: int | str = "5GB",
    device: str | torch.device = "cpu",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> QuantizeSummary:
    """Quantize the bf16, fp16 or fp32 safetensors checkpoint ``src`` (a folder) into the new folder ``out``.

    layout: a row of LAYOUTS or its name (None: "mxfp8" for MXFP8, else the first that holds the format).
    include, exclude: shell patterns on weight names; by default linears of attention and MLPs and all experts are quantized,
        and embeddings, lm_head, norms and routers are not.
    allow_unquantized_experts: patterns of expert weights that may stay in full precision or be missing; others are an error.
    rule: scale rule, None for the format's default; search=True is rule="search". activations: the config asks readers to
        quantize activations too (MX formats, whose activation scales are dynamic).
    dry_run: only plan. resume: continue what an interrupted run left. overwrite: replace ``out``.
    max_memory: of the whole process, at its peak. max_shard_size: of an output file. jobs: worker threads, None for one per CPU.
    device: where weights are quantized; the bytes of the output are the same from any.

    NVFP4: q, k and v, and gate and up, share one global scale, the smallest at least amax / 2688 whose reciprocal has an
    exact reciprocal, so that layouts that store divisors lose nothing.

    The source is never written to; ``out`` appears when it is complete. Raises ValueError for whatever is wrong with the
    source (a weight that is not finite is named with its first index) or with the arguments, and leaves nothing behind then;
    OSError when the disk fails, after which ``resume`` goes on.
    """
    start = time.perf_counter()
    src_path, out_path = Path(src), Path(out)
    check_places(src_path, out_path)
    f = mk.get_format(format)
    if search and rule is not None:
        raise ValueError(f"search=True is the rule 'search', but the rule {str(rule)!r} was given too: choose one")
    rule = f.check_rule(ScaleRule.SEARCH if search else rule)
    lay = _layout_for(f, layout)
    if activations and (f not in lay.activations or f.has_global_scale):
        raise ValueError(
            f"layout {lay.name} cannot ask for {f} activations without calibrated scales: leave activations=False"
        )
    with ShardReader(src_path) as reader:
        job = _plan(
            reader, f, rule, lay, include, exclude, allow_unquantized_experts, activations, parse_bytes(max_shard_size)
        )
        summary = replace(job.summary, src=str(src_path), out=str(out_path), dry_run=dry_run)
        if dry_run:
            return summary
        with _asking_ahead(reader, device):
            place = _device(device, f, rule, _dtype(reader, job))
        limit, workers = _fit(parse_bytes(max_memory), jobs, job)

        def write(writer: ShardWriter) -> None:
            work = bundles(reader, job.targets, job.sources, job.copies, joint=f.has_global_scale, limit=limit)
            write_biases(reader, writer, job.biases, job.sources)
            run = Quantizer(reader, writer, lay, f, rule, job.sources, work, place)
            tasks = pack(work, limit)
            sizes = [t.nbytes for t in tasks]
            pinned = place.type in ("cuda", "xpu")
            run_tasks(tasks, sizes, run, workers, buffer_nbytes=buffer_nbytes(tasks), pinned=pinned, progress=progress)

        resumed = produce(reader, out_path, job.output, write, resume=resume, overwrite=overwrite)
    return replace(summary, resumed=resumed, seconds=time.perf_counter() - start)


def _dtype(reader: ShardReader, job: _Job) -> torch.dtype:
    """What most weights that are quantized are stored as."""
    found = Counter(reader.info(part.name).torch_dtype for t in job.targets for row in t.rows for part in row)
    return found.most_common(1)[0][0] if found else torch.bfloat16


@contextmanager
def _asking_ahead(reader: ShardReader, device: str | torch.device) -> Iterator[None]:
    """Have the system read the source's first bytes while an accelerator starts, which takes as long as reading a gigabyte."""
    stop = threading.Event()

    def ask() -> None:
        left = _START
        for info in sorted(reader.tensors.values(), key=lambda i: (i.file, i.start)):
            if left <= 0 or stop.is_set():
                return
            reader.read_ahead(info, 0, info.nbytes)
            left -= info.nbytes

    thread = threading.Thread(target=ask, name="mx-quant-ahead", daemon=True)
    if str(device).partition(":")[0] != "cpu":
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()


def _device(device: str | torch.device, format: Format, rule: ScaleRule, dtype: torch.dtype) -> torch.device:
    """The device, after it has quantized some blocks: a run that finds out later would leave a partial output.

    What PyTorch and Triton import and compile at the first call belongs to the process, whose memory is looked at after this.
    """
    try:
        shape = (1, 16, format.block) if format.has_global_scale else (16, format.block)
        x = torch.zeros(shape, dtype=dtype, device=torch.device(device))
        one = torch.ones(1, device=x.device) if format.has_global_scale else None
        mk.quantize(x, format, rule=rule, global_scale=one).to("cpu")
    except (RuntimeError, AssertionError, TypeError) as e:
        text = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"the device {str(device)!r} cannot be used ({text}): choose cpu or another one") from e
    return x.device  # with its index: "cuda" is the current device, which is another one in another thread


def _layout_for(format: Format, layout: Layout | str | None) -> Layout:
    if layout is None:
        fitting = [row for row in LAYOUTS.values() if format in row.formats and "linear" in row.kinds]
        if not fitting:
            raise ValueError(f"no layout holds {format}")
        # Of the layouts of MXFP8, this is the one that transformers reads for dense and MoE models alike.
        return next((row for row in fitting if row.name == "mxfp8"), fitting[0])
    row = get_layout(layout) if isinstance(layout, str) else layout
    if format not in row.formats:
        names = [r.name for r in LAYOUTS.values() if format in r.formats]
        raise ValueError(
            f"layout {row.name} holds {', '.join(f.name for f in row.formats)}, not {format}; {format} goes into "
            f"{', '.join(names) or 'none'}"
        )
    return row


@dataclass(frozen=True)
class _Job:
    """A planned run: what is made of what, and every file of the output."""

    targets: tuple[Target, ...]
    biases: tuple[Target, ...]
    sources: dict[str, WeightRef]
    copies: tuple[str, ...]
    output: Output
    summary: QuantizeSummary
    largest: int  # bytes of the largest matrix that cannot be cut


def _plan(
    reader: ShardReader,
    format: Format,
    rule: ScaleRule,
    layout: Layout,
    include: Sequence[str],
    exclude: Sequence[str],
    allow: Sequence[str],
    activations: bool,
    max_shard: int,
) -> _Job:
    configs, infos = read_configs(reader.folder), read_infos(reader)
    found = detect_layout(configs, infos)
    if found is not None:
        raise ValueError(
            f"{reader.folder} is quantized already (layout {found.name}): use convert for another layout, or dequantize first"
        )
    config = configs.get("config.json", {})
    family = family_of(config, infos)
    refs = plain_refs(config, infos)
    check_experts(refs, infos, family, config, allow)
    selection = select(refs, infos, layout, format, include=include, exclude=exclude, allow_unquantized_experts=allow)
    chosen = {r.name: replace(r, format=format, rule=rule) for r in selection.chosen}
    biases = [r for r in refs if r.kind not in MATRICES and expert_module(r.name) in {expert_module(n) for n in chosen}]
    grouping = grouping_of(layout)
    targets = regroup(list(chosen.values()), grouping, family)
    bias_targets = [] if grouping is None else regroup(biases, grouping, family)
    sources = {r.name: r for r in refs}
    made = [(t.sources, layout.plan(t.ref)) for t in targets]
    made += [(t.sources, plan_plain(t.ref, infos[t.sources[0]].dtype)) for t in bias_targets]
    specs, copies = arrange(reader, made)
    infos_out = {s.name: TensorInfo(s.dtype, s.shape) for s in specs}
    named = [replace(t.ref, tensors=tuple(layout.plan(t.ref))) for t in targets]
    new_configs = {**configs, **layout.config(configs, named, infos_out, activations=activations)}
    provenance = {"format": format.name, "rule": rule.value, "layout": layout.name}
    options = {"include": sorted(include), "exclude": sorted(exclude), "activations": activations}
    output = plan_output(reader, specs, new_configs, provenance, options, max_shard)
    sizes = {n: math.prod(i.shape) for n, i in infos.items()}
    experts = [r for r in refs if r.kind in ("expert", "fused_expert")]
    summary = QuantizeSummary(
        src="", out="", format=format.name, rule=rule.value, layout=layout.name,
        weights_quantized=sum(r.experts or 1 for r in selection.chosen),
        parameters=sum(sizes.values()),
        parameters_quantized=sum(sizes[n] for n in chosen),
        expert_parameters=sum(sizes[r.name] for r in experts),
        expert_parameters_quantized=sum(sizes[r.name] for r in experts if r.name in chosen),
        bytes_in=sum(reader.sizes.values()),
        bytes_out=sum(s.nbytes for s in output.shards),
        shards=tuple(s.file for s in output.shards),
        skipped=selection.skipped,
        source_hash=output.fingerprint["source_sha256"],
    )  # fmt: skip
    largest = _largest(reader, targets)
    return _Job(tuple(targets), tuple(bias_targets), sources, tuple(copies), output, summary, largest)


def _largest(reader: ShardReader, targets: Sequence[Target]) -> int:
    """Bytes of the largest matrix that is only quantized whole: an expert of a fused tensor, or one joined from several."""
    whole = [row for t in targets if t.ref.experts is not None or t.rows[0][0].expert is not None for row in t.rows]
    return max((sum(key_nbytes(reader, (p.name, p.expert)) for p in row) for row in whole), default=0)


def _fit(max_memory: int, jobs: int | None, job: _Job) -> tuple[int, int]:
    """Bytes of source in one buffer and worker threads that keep the process within ``max_memory``."""
    wanted = workers_of(jobs)
    base = resident() + _MARGIN
    smallest = max(_SMALLEST, job.largest)
    for workers in range(wanted, 0, -1):
        each = (max_memory - base) // (workers * (_WORKING_SET + 1))
        if each >= smallest:
            return max(min(each, _BUNDLE), smallest), workers
    need = base + smallest * (_WORKING_SET + 1)
    raise ValueError(
        f"max_memory is {max_memory >> 20} MiB, but {need >> 20} MiB are needed: {base >> 20} MiB for the process and "
        f"{smallest * (_WORKING_SET + 1) >> 20} MiB to quantize a matrix of {smallest >> 20} MiB"
    )
