"""The workers of an offline run: read a bundle of source bytes, quantize rows together, write tensors to their places."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

import mx_kernels as mk
from mx_kernels import Format, QuantizedTensor, ScaleRule

from .layouts import Layout, WeightRef, assemble_plain, exact_global, read_plain
from .plan import Bundle, Copy, Key, Unit
from .shards import ShardReader, TensorInfo
from .writer import Part, ShardWriter

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (bytes of the source done, bytes in all)."""

_SCAN = 4 << 20  # bytes of a large tensor looked at together
_AHEAD = 32 << 20  # how far behind what is read now the disk is asked for what comes: some bundles of every thread
# Bits of infinity; magnitudes order like their bits, so whatever is not finite is at least this.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
_GLOBAL_MIN = 2.0**-117  # mx_kernels refuses smaller ones: scale times global must stay a normal float32


def run_tasks(
    tasks: Sequence[T],
    nbytes: Sequence[int],
    work: Callable[[T, Tensor], None],
    jobs: int,
    *,
    buffer_nbytes: int = 0,
    pinned: bool = False,
    progress: Progress | None = None,
) -> None:
    """Call ``work(task, buffer)`` for every task, in order, on ``jobs`` threads; the first exception stops all and is raised.

    nbytes: what each task adds to ``progress``. Each thread has one buffer, uint8 [buffer_nbytes], ``pinned`` where an
    accelerator copies from it. PyTorch's own threads stay out where there are several of ours.
    """
    total, done, at = sum(nbytes), 0, 0
    lock, errors = threading.Lock(), list[BaseException]()

    def loop() -> None:
        nonlocal at, done
        buffer = torch.empty(buffer_nbytes, dtype=torch.uint8, pin_memory=pinned)
        while True:
            with lock:
                if errors or at == len(tasks):
                    return
                mine = at
                at += 1
            work(tasks[mine], buffer)
            with lock:
                done += nbytes[mine]
                if progress is not None:
                    progress(done, total)

    def guarded() -> None:
        try:
            torch.set_num_threads(1)
            loop()
        except BaseException as e:
            with lock:
                errors.append(e)

    if jobs == 1:
        loop()
        return
    threads = torch.get_num_threads()
    workers = [threading.Thread(target=guarded, name=f"mx-quant-{i}", daemon=True) for i in range(jobs)]
    try:
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    except BaseException as e:
        errors.append(e)
        for w in workers:
            w.join()
        raise
    finally:
        torch.set_num_threads(threads)
    if errors:
        raise errors[0]


def buffer_nbytes(tasks: Sequence[Bundle]) -> int:
    """Bytes of a buffer that holds any one of the bundles.

    A source tensor starts on a 64-byte boundary where it does not continue the one before.
    """
    return max(
        (t.nbytes + 64 * sum(1 if isinstance(i, Copy) else len(i.keys) for i in t.items) for t in tasks), default=0
    )


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude [] of a bf16, fp16 or fp32 tensor, in its dtype; NaN or infinity if there is one."""
    low, high = torch.aminmax(
        x
    )  # propagates NaN; 14 GB/s of bf16 on one Xeon core, twice as fast as amax of magnitudes
    return torch.maximum(low.abs(), high.abs())


def refuse_nonfinite(reader: ShardReader, name: str) -> None:
    """Raise ValueError naming the first index of ``name`` that is NaN or infinite, if there is one."""
    info = reader.info(name)
    bits, mask, infinity = _INFINITY[info.torch_dtype]
    for at in range(0, info.nbytes, _SCAN):
        x = torch.empty(min(_SCAN, info.nbytes - at), dtype=torch.uint8)
        reader.read_bytes(info, at, x)
        bad = (x.view(bits) & mask) >= infinity
        if bool(bad.any()):
            flat = int(bad.int().argmax())
            value = float(x.view(info.torch_dtype)[flat])
            index = torch.unravel_index(torch.tensor(at // bits.itemsize + flat), info.shape)
            raise ValueError(
                f"{name} is not finite: its first such value is {value} at index {tuple(int(i) for i in index)} "
                f"(shape {list(info.shape)}, {info.file}); repair the source, or exclude this weight"
            )


def global_scale(amax: Tensor) -> Tensor:
    """NVFP4's global scale [] of weights with that largest magnitude: amax / 2688, rounded up to one that survives inversion."""
    g = (amax.float() / 2688.0).clamp(min=_GLOBAL_MIN)
    return exact_global(torch.where(amax > 0, g, 1.0))


class Quantizer:
    """``work`` of ``run_tasks``: quantizes the units of a bundle and copies what is only copied.

    A unit is quantized together with its neighbours where they follow each other in the file and share a dtype: blocks do not
    care about rows. Results are written by the writer's own thread while the next bundle is quantized; of each thread of ours
    at most two bundles' results are in memory. Raises ValueError for a weight that is not finite.
    """

    def __init__(
        self,
        reader: ShardReader,
        writer: ShardWriter,
        layout: Layout,
        format: Format,
        rule: ScaleRule,
        sources: Mapping[str, WeightRef],
        work: Sequence[Bundle],
        device: torch.device,
    ) -> None:
        self._reader, self._writer, self._layout = reader, writer, layout
        self._format, self._rule, self._sources, self._device = format, rule, sources, device
        self._members: dict[tuple[str, int | None], dict[Key, None]] = {}
        for bundle in work:
            for item in bundle.items:
                if isinstance(item, Unit):
                    self._members.setdefault(item.group, {}).update(dict.fromkeys(item.keys))
        self._globals: dict[tuple[str, int | None], Tensor] = {}
        self._lock, self._launch = threading.Lock(), threading.Lock()
        self._outputs: dict[str, tuple[str, ...]] = {}
        self._local = threading.local()

    def __call__(self, bundle: Bundle, buffer: Tensor) -> None:
        """Do one bundle with the thread's own ``buffer``."""
        items = [item for item in bundle.items if self._needed(item)]
        views = self._load(items, buffer)
        copies = [Part(c.name, views[_where(c)[0]], c.start) for c in items if isinstance(c, Copy)]
        copied = self._writer.submit(copies) if copies else None
        made: list[Part] = []
        run: list[Unit] = []
        for item in items:
            if isinstance(item, Copy):
                continue
            if run and not self._follows(run[-1], item, views):
                made += self._quantize(run, views)
                run = []
            run.append(item)
        if run:
            made += self._quantize(run, views)
        before: Future[None] | None = getattr(self._local, "written", None)
        if before is not None:
            before.result()
        self._local.written = self._writer.submit(made)
        if copied is not None:
            copied.result()  # before the buffer is used again

    def _needed(self, item: Unit | Copy) -> bool:
        if isinstance(item, Copy):
            return self._writer.needs(item.name)
        ref = item.target.ref
        if ref.name not in self._outputs:
            self._outputs[ref.name] = tuple(self._layout.plan(ref))
        return any(self._writer.needs(n) for n in self._outputs[ref.name])

    def _load(self, items: Sequence[Unit | Copy], buffer: Tensor) -> dict[tuple[str, int], Tensor]:
        """Read the items' bytes, in as few calls as the file's order allows: (tensor, first byte) -> bytes in ``buffer``."""
        views: dict[tuple[str, int], Tensor] = {}
        pending: tuple[TensorInfo, int, int, int] | None = None  # info, first byte in it, place in the buffer, length
        for item in items:
            for place, nbytes in _ranges(self._reader, item):
                if place in views:
                    continue
                name, start = place
                info = self._reader.tensors[name]
                if pending is not None:
                    first, offset, at, length = pending
                    end = at + length
                    joins = first.file == info.file and first.start + offset + length == info.start + start
                    if joins and end % info.torch_dtype.itemsize == 0:
                        pending = (first, offset, at, length + nbytes)
                        views[place] = buffer[end : end + nbytes]
                        continue
                    self._reader.read_bytes(first, offset, buffer[at:end])
                    at = -(-end // 64) * 64
                else:
                    at = 0
                pending = (info, start, at, nbytes)
                views[place] = buffer[at : at + nbytes]
        if pending is not None:
            first, offset, at, length = pending
            self._reader.read_ahead(first, offset + length + _AHEAD, length)
            self._reader.read_bytes(first, offset, buffer[at : at + length])
        return views

    def _follows(self, a: Unit, b: Unit, views: Mapping[tuple[str, int], Tensor]) -> bool:
        """Whether ``b`` lies right behind ``a`` and can be quantized with it."""
        if not (a.plain and b.plain):
            return False
        x, y = self._view(a, views), self._view(b, views)
        if x.dtype != y.dtype or x.data_ptr() + x.nbytes != y.data_ptr():
            return False
        return not self._format.has_global_scale or (x.numel() == y.numel() and not a.part and not b.part)

    def _view(self, unit: Unit, views: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """A plain unit's rows [n, K] in the buffer."""
        (place, _), *_ = _ranges(self._reader, unit)
        dtype = self._reader.tensors[place[0]].torch_dtype
        return views[place].view(dtype).view(-1, unit.target.ref.shape[-1])

    def _matrix(self, unit: Unit, views: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Any unit's rows [n, K], canonical."""

        def get(name: str, expert: int | None = None) -> Tensor:
            info = self._reader.tensors[name]
            shape = info.torch_shape if expert is None else info.torch_shape[1:]
            return views[name, (expert or 0) * info.row_nbytes].view(info.torch_dtype).view(shape)

        def read(name: str, expert: int | None) -> Tensor:
            return read_plain(self._sources[name], get, expert=expert)

        return assemble_plain(unit.target, read, unit.expert)

    def _global(self, unit: Unit, views: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """The global scale of the unit's group: from the buffer if all of the group is there, else by reading the group."""
        with self._lock:
            known = self._globals.get(unit.group)
            if known is not None:
                return known
        amax = []
        for name, expert in self._members[unit.group]:
            info = self._reader.tensors[name]
            first = (expert or 0) * info.row_nbytes
            nbytes = info.nbytes if expert is None else info.row_nbytes
            seen = views.get((name, first))
            if seen is not None and seen.numel() == nbytes:
                found = largest_magnitude(seen.view(info.torch_dtype))
            else:
                found = self._scan(info, first, nbytes)
            if not bool(torch.isfinite(found)):
                refuse_nonfinite(self._reader, name)
            amax.append(found.float())
        g = global_scale(torch.stack(amax).amax())
        with self._lock:
            return self._globals.setdefault(unit.group, g)

    def _scan(self, info: TensorInfo, first: int, nbytes: int) -> Tensor:
        found = []
        x = torch.empty(min(_SCAN, nbytes), dtype=torch.uint8)
        for at in range(0, nbytes, _SCAN):
            part = x[: min(_SCAN, nbytes - at)]
            self._reader.read_bytes(info, first + at, part)
            found.append(largest_magnitude(part.view(info.torch_dtype)))
        return torch.stack(found).amax()

    def _quantize(self, run: Sequence[Unit], views: Mapping[tuple[str, int], Tensor]) -> list[Part]:
        if len(run) > 1:
            x = _joined(self._view(run[0], views), self._view(run[-1], views))
        else:
            x = self._view(run[0], views) if run[0].plain else self._matrix(run[0], views)
        f = self._format
        x, g = x.view(-1, f.block), None
        if f.has_global_scale:
            g = torch.stack([self._global(unit, views) for unit in run])
            x = x.unflatten(0, (len(run), -1))
        if self._device.type == "cpu":
            q = mk.quantize(x, f, rule=self._rule, global_scale=g)
        else:
            # Both copies wait: the first for the buffer, which this thread fills again, the second for the result.
            x, g = x.to(self._device), None if g is None else g.to(self._device)
            with self._launch:  # Triton compiles at a first launch, which is no work for two threads at once
                q = mk.quantize(x, f, rule=self._rule, global_scale=g)
            q = q.to("cpu")
        # mx_kernels marks blocks with a NaN or an infinity by scale bytes 0xFF and 0xFE, which no finite block reaches.
        if f.scale == "e8m0" and int(q.scale.max()) >= 0xFE:
            for unit in run:
                for name, _ in unit.keys:
                    refuse_nonfinite(self._reader, name)
        data, scale = q.data.view(-1, q.data.shape[-1]), q.scale.view(-1, 1)
        made, at = [], 0
        for i, unit in enumerate(run):
            n, k = unit.rows[1] - unit.rows[0], unit.target.ref.shape[-1]
            end = at + n * k // f.block
            one = replace(
                q,
                data=data[at:end].view(n, -1),
                scale=scale[at:end].view(n, -1),
                global_scale=None if g is None else q.global_scale[i],  # type: ignore[index]
            )
            made += self._parts(unit, one)
            at = end
        return made

    def _parts(self, unit: Unit, q: QuantizedTensor) -> list[Part]:
        """The stored tensors of a unit, and where in their own they begin."""
        ref = unit.target.ref
        first, stop = unit.rows
        if unit.part:
            ref = replace(ref, shape=(stop - first, ref.shape[-1]))
        found = []
        for name, t in self._layout.write(ref, q, expert=unit.expert).items():
            if unit.expert is not None:
                offset = unit.expert * t.nbytes
            elif not unit.part:
                offset = 0
            elif t.ndim >= 2:
                offset = first * (t.nbytes // (stop - first))
            elif first == 0:
                offset = 0  # a global scale is the same for all rows: the first part writes it
            else:
                continue
            if self._writer.needs(name):
                found.append(Part(name, t.contiguous(), offset))
        return found


def _where(item: Copy) -> tuple[tuple[str, int], int]:
    return (item.name, item.start), item.stop - item.start


def _ranges(reader: ShardReader, item: Unit | Copy) -> list[tuple[tuple[str, int], int]]:
    """The byte ranges of the source that an item needs: ((tensor, first byte in it), length)."""
    if isinstance(item, Copy):
        return [_where(item)]
    found = []
    for name, expert in item.keys:
        info = reader.tensors[name]
        if item.part:
            found.append(((name, item.rows[0] * info.row_nbytes), (item.rows[1] - item.rows[0]) * info.row_nbytes))
        elif expert is None:
            found.append(((name, 0), info.nbytes))
        else:
            found.append(((name, expert * info.row_nbytes), info.row_nbytes))
    return found


def _joined(first: Tensor, last: Tensor) -> Tensor:
    """The values from ``first`` to ``last`` as one vector: two views of one buffer with nothing but values between them."""
    n = (last.data_ptr() - first.data_ptr()) // first.itemsize + last.numel()
    return first.as_strided((n,), (1,))
