"""Launching kernels: what a launcher needs to know about a device, and a way past Triton's dispatch.

``kernel[grid](*args)`` looks at every argument to find the compiled kernel, 15 to 25 us of the host's time for a dozen of them
(H200 machine, Triton 3.6), several times what the kernels of one token take. What it finds follows from dtypes, numbers, which
tensors are there and whether they are aligned to 16 bytes. A ``Launch`` stands for one choice of all that and remembers the kernel,
and how the CUDA driver launches it (``driver.py``).
"""

from __future__ import annotations

import contextvars
import copy
import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ..choose import Unsupported
from ..tuned import wgmma
from .driver import DriverLaunch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """fp8: Triton converts float32 to FP8 with saturation; asm: kernels may use PTX; units: multiprocessors.

    pdl: a kernel may start before the one in front has ended (programmatic dependent launch). wgmma: warpgroup products (sm_90).
    shared: bytes of shared memory that a program may have, of what Triton calls "cuda".
    """

    fp8: bool
    asm: bool
    units: int
    pdl: bool = False
    wgmma: bool = False
    shared: int = 0


@functools.cache
def target(device: torch.device) -> Target:
    """The facts of an accelerator."""
    if device.type not in ("cuda", "xpu"):  # Triton's interpreter, and compiling without a device
        return Target(False, False, 132)
    properties = torch.get_device_module(device.type).get_device_properties(device)
    units = getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    shared = 0
    if device.type == "cuda":
        shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return Target(capability >= (8, 9), nvidia, units, capability >= (9, 0), wgmma(device), shared)


@functools.cache
def takes_registers() -> bool:
    """Whether Triton's ptxas takes registers that a warpgroup product still reads (``dot.py``): 12.8 and older do, and one that
    does not tell its version may."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        version = tuple(int(n) for n in get_ptxas(90).version.split(".")[:2])
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return True
    return version < (12, 9)


PDL_PAIRS = {"align": 8192, "place": 1 << 31, "product": 16384, "rebase_rows": 8192, "rebased": 8192, "combine": 8192}
"""Up to how many pairs a kernel starts before the one in front of it has ended (NVIDIA, sm_90 and up).

Such a kernel waits for the end of the one in front (``gdc_wait``) before it reads what that or anything earlier wrote, and only then
lets the one behind it start. So whatever starts knows that all but the kernel in front of it have ended. A layer's GEMM 2 may wait
for the tiles of its blocks instead, and its last program for all of GEMM 1 (``ahead.wait_for``). "place" stands for the
alignment's last two; the last reads the ids, and nothing else, before it waits: the alignment's first has waited for them.
"""


def starts_early(kernel: str, pairs: int, device: torch.device) -> bool:
    """Whether that kernel is launched so, by ``PDL_PAIRS``."""
    return pairs <= PDL_PAIRS[kernel] and target(device).pdl


def early_options(early: bool, lets: bool = False) -> dict[str, bool]:
    """A kernel's constants and Triton's options: whether it starts early; lets: whether it lets the next one, where it does not."""
    return {"PDL": early or lets} | ({"launch_pdl": True} if early else {})


Boxes = tuple[tuple[int, Callable[[Any], Any]], ...]


class Launch:
    """``kernel[grid](*args, *values, **options)`` on ``device``, whichever is current; ``args``, tensors above all, come with the call.

    values: what follows the arguments, in the kernel's order; options: the kernel's constants after those, and Triton's options; boxes:
    which arguments the copy engine loads (their places), with what describes such a tensor, or an address, for it.
    A Launch is for arguments that differ in nothing but their pointers: the caller keeps one for each set of dtypes, absent
    tensors (None) and numbers. most: programs that a multiprocessor may have at a time, 0 for as many as fit; Triton's own launches
    (the first, and those that the driver does not make) do not heed it.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        *values: int | float,
        boxes: Boxes = (),
        most: int = 0,
        **options: Any,
    ) -> None:
        self.kernel, self.device, self.boxes, self.most = kernel, device, boxes, most
        self.grid = (*grid, 1, 1)[:3]
        self.values = (*values, *(options.pop(name) for name in kernel.arg_names if name in options))
        self.options = options
        self.compiled: CompiledKernel | None = None
        self.by_driver: DriverLaunch | None = None
        self.given: Sequence[Any] = ()  # what it was compiled for, tensors as addresses
        self.others: list[Launch] = []  # what ``having`` made

    def having(self, **numbers: int) -> Launch:
        """The same launch with other numbers, of arguments for which Triton does not compile: it is compiled when this one is. One for
        the same numbers."""
        names = self.kernel.arg_names
        behind = names[len(names) - len(self.values) :]
        assert numbers.keys() <= {*behind}
        values = tuple(numbers.get(name, value) for name, value in zip(behind, self.values, strict=True))
        for known in self.others:
            if known.values == values:
                return known
        other = copy.copy(self)
        other.values, other.others = values, []
        self.others.append(other)
        if self.compiled is not None:
            other._take(self.compiled, self.given)
        return other

    def __call__(self, *args: Any) -> None:
        """Launch. Tensors that are not aligned to 16 bytes go through Triton's dispatch, as does the first call."""
        pointers, low = [], 0
        for a in args:
            if isinstance(a, Tensor):
                a = a.data_ptr()
                low |= a
            pointers.append(a)
        if self.compiled is None or low & 15 or not ready(self.device):
            self._dispatch(args, low & 15 == 0)
        else:
            self.run(current_stream(self.device), pointers)

    def run(self, stream: int, pointers: Sequence[Any]) -> None:
        """Launch what is ``compiled`` on tensors given by their addresses, aligned to 16 bytes, where the device is ``ready``."""
        if self.by_driver is not None:
            return self.by_driver(stream, pointers)
        k = self.compiled
        assert k is not None
        given = self.boxed(pointers)
        k.run(*self.grid, stream, k.function, k.packed_metadata, None, None, None, *given, *self.values)
        return None

    def boxed(self, given: Sequence[Any]) -> Sequence[Any]:
        """Tensors, or their addresses, those that the copy engine loads described for it."""
        if self.boxes:
            given = [*given]
            for place, describe in self.boxes:
                given[place] = describe(given[place])
        return given

    def _dispatch(self, args: tuple[Any, ...], aligned: bool) -> None:
        module = torch.get_device_module(self.device.type)
        if self.device.index not in (None, module.current_device()):
            with module.device(self.device):
                return self._dispatch(args, aligned)
        assert len(args) + len(self.values) == len(self.kernel.arg_names), (
            self.kernel
        )  # in the kernel's order, all of them
        given = self.boxed(args)
        made = self.kernel[self.grid](*given, *self.values, **self.options)
        if aligned and self.device.type == "cuda" and isinstance(made, CompiledKernel):  # not in the interpreter
            self._take(made, self.boxed([a.data_ptr() if isinstance(a, Tensor) else a for a in args]))
        return None

    def _take(self, made: CompiledKernel, given: Sequence[Any]) -> None:
        """Launch that kernel from now on, which was compiled for such arguments; the others too."""
        self.compiled, self.given = made, given
        try:
            self.by_driver = DriverLaunch(made, self.grid, given, self.values, apart(self.device, self.most))
        except Unsupported as reason:
            self.by_driver = None
            _log.info("%s goes on by Triton's launcher: %s", made.name, reason)
        for other in self.others:
            other._take(made, given)


def compile_together(runs: Sequence[tuple[Launch, Sequence[torch.dtype | None]]]) -> None:
    """Compile those launches that nobody has compiled yet at once, a thread for each, for tensors of such dtypes (None: absent), aligned to
    16 bytes. Triton has the kernels when they are launched: the first call waits for the slowest instead of for one after another.

    What does not compile is left to its launch, which raises.
    """
    todo = [(run, types) for run, types in runs if run.compiled is None]
    if len(todo) < 2:
        return

    def compile_all() -> None:
        with ThreadPoolExecutor(len(todo)) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            for run, types in todo:
                boxed = {place: describe(0) for place, describe in run.boxes}
                given = [boxed.get(i, held) for i, held in enumerate(types)]
                run.kernel.warmup(*given, *run.values, grid=run.grid, **run.options)

    contextvars.Context().run(compile_all)  # Triton has no second mode within one of the caller's


RESERVED = 1024  # bytes of shared memory that a program takes beyond its own (NVIDIA, sm_80 and up): with them one may have all there is


def apart(device: torch.device, most: int) -> int:
    """Bytes of shared memory of which no more than ``most`` programs fit a multiprocessor; 0 where any number may."""
    return (target(device).shared + RESERVED) // (most + 1) - RESERVED + 128 if most else 0


@dataclass(frozen=True)
class Address:
    """What a descriptor for the copy engine (TMA) asks of its tensor, where only the address is known."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def ready(device: torch.device) -> bool:
    """Whether ``device`` is the current one, and no profiler wants to hear of every launch (only Triton's dispatch tells it)."""
    hooks = triton.knobs.runtime
    watched = getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True)
    return not watched and device.index == torch.cuda.current_device()


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def _kind(a: Any) -> Any:
    """What Triton compiles for: dtypes and numbers."""
    return a.dtype if isinstance(a, Tensor) else a


_LAUNCHES = 4096  # that are remembered
_launches: dict[tuple[Any, ...], Launch] = {}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on ``device``, whichever is current; a ``Launch`` for each kind of arguments."""
    key = (id(kernel), grid, device, *map(_kind, args), *options.values())
    known = _launches.get(key)
    if known is None:
        if len(_launches) >= _LAUNCHES:
            _launches.clear()
        known = _launches[key] = Launch(kernel, grid, device, **options)
    known(*args)
