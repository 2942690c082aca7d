"""Launching kernels that follow each other on a stream by one call of the CUDA driver: as a graph of them, one behind the other.

The driver takes 5 us of the host's time for each launch, 2 for a graph of eight kernels and 0.7 for each of them whose parameters
change (docs/performance-host.md). A node's kernel, grid and parameters can all be replaced before the graph is launched again, so one
graph serves whatever kernels, as many as it has nodes: there is one for each number of them (and which of them start before the one
in front has ended), device and stream.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

from ..choose import Unsupported
from .driver import DriverLaunch, _cuda, asked

_log = logging.getLogger(__name__)
_NAMES = (
    "cuGraphCreate", "cuGraphDestroy", "cuGraphAddKernelNode_v2", "cuGraphAddDependencies_v2", "cuGraphInstantiateWithFlags",
    "cuGraphExecKernelNodeSetParams_v2", "cuGraphExecDestroy", "cuGraphLaunch", "cuGraphKernelNodeSetAttribute",
    "cuStreamGetPriority", "cuThreadExchangeStreamCaptureMode",
)  # fmt: skip
_PRIORITY = 8  # the attribute of a kernel that a stream's priority becomes
_RELAXED = 2  # a thread may make what a capture on another may not


class _Edge(ctypes.Structure):
    """From one node to the next, CUgraphEdgeData. port 1, kind 1: from where a kernel lets the next one start."""

    _fields_ = (("port", ctypes.c_ubyte), ("to", ctypes.c_ubyte), ("kind", ctypes.c_ubyte), ("no", ctypes.c_ubyte * 5))


class _Value(ctypes.Structure):
    """Of a kernel's attribute, CUlaunchAttributeValue."""

    _fields_ = (("number", ctypes.c_int), ("rest", ctypes.c_char * 60))


class Chain:
    """A graph of launches, one behind the other, for one stream. Raises Unsupported, which says why, where there is none.

    runs: the launches that it begins with; others of the same number, of which the same start early, may take their places.
    """

    def __init__(self, runs: Sequence[DriverLaunch], stream: int) -> None:
        cuda = _cuda()
        missing = [name for name in _NAMES if not hasattr(cuda, name)]
        if cuda is None or missing:
            raise Unsupported(f"the CUDA driver has no {missing[0]}")
        self.cuda, self.stream, self.lock = cuda, ctypes.c_void_p(stream), threading.Lock()
        self.what = f"launch {len(runs)} kernels as a graph"
        self.graph, self.launched = ctypes.c_void_p(), ctypes.c_void_p()
        self.nodes: list[ctypes.c_void_p] = []
        self.held: list[Any] = [None] * len(runs)  # (what a node launches, on which addresses)
        mode, priority = ctypes.c_int(_RELAXED), ctypes.c_int()
        exchange = functools.partial(cuda.cuThreadExchangeStreamCaptureMode, ctypes.byref(mode))
        self._make(exchange)
        try:
            self._make(cuda.cuStreamGetPriority, self.stream, ctypes.byref(priority))
            self._make(cuda.cuGraphCreate, ctypes.byref(self.graph), 0)
            for run in runs:
                self._add(run, priority.value)
            self._make(cuda.cuGraphInstantiateWithFlags, ctypes.byref(self.launched), self.graph, ctypes.c_ulonglong(0))
        finally:
            exchange()

    def __del__(self) -> None:
        """Graphs that still run are destroyed when they have ended."""
        if getattr(self, "launched", None):
            self.cuda.cuGraphExecDestroy(self.launched)
        if getattr(self, "graph", None):
            self.cuda.cuGraphDestroy(self.graph)

    def _make(self, *ask: Any) -> None:
        try:
            asked(self.cuda, "make a graph", *ask)
        except RuntimeError as error:
            raise Unsupported(str(error)) from error

    def _add(self, run: DriverLaunch, priority: int) -> None:
        """One node more, behind the last."""
        node = ctypes.c_void_p()
        with run.lock:
            none = ctypes.c_size_t(0)
            self._make(self.cuda.cuGraphAddKernelNode_v2, ctypes.byref(node), self.graph, None, none, run.node)
        if self.nodes:
            edge = _Edge(1, 0, 1) if run.early else _Edge()
            pair = ctypes.byref(self.nodes[-1]), ctypes.byref(node)
            self._make(self.cuda.cuGraphAddDependencies_v2, self.graph, *pair, ctypes.byref(edge), ctypes.c_size_t(1))
        if priority:
            self._make(self.cuda.cuGraphKernelNodeSetAttribute, node, _PRIORITY, ctypes.byref(_Value(priority)))
        self.nodes.append(node)

    def __call__(self, runs: Sequence[DriverLaunch], given: Sequence[Sequence[int | None]]) -> None:
        """Launch them all, each on its addresses, which are aligned to 16 bytes."""
        cuda, held, change = self.cuda, self.held, self.cuda.cuGraphExecKernelNodeSetParams_v2
        with self.lock:
            for i, new in enumerate(zip(runs, given, strict=True)):
                if new != held[i]:
                    held[i] = None  # until it has been replaced
                    run, addresses = new
                    with run.lock:
                        run.place(addresses)
                        asked(cuda, self.what, change, self.launched, self.nodes[i], run.node)
                    held[i] = new
            asked(cuda, self.what, cuda.cuGraphLaunch, self.launched, self.stream)


_CHAINS = 64  # that are kept: each takes some 100 KB of the device's memory
_chains: dict[tuple[object, ...], Chain | None] = {}


def chain(device: int | None, stream: int, runs: tuple[DriverLaunch, ...], early: tuple[bool, ...]) -> Chain | None:
    """The chain for such launches, of which those start early, or None: then each is launched by itself."""
    key = (device, stream, early)
    if key not in _chains and len(_chains) < _CHAINS:
        try:
            _chains[key] = Chain(runs, stream)
        except Unsupported as reason:
            _log.info("kernels are launched one by one: %s", reason)
            _chains[key] = None
    return _chains.get(key)
