"""Launching kernels that follow each other on a stream by one call of the CUDA driver: as a graph of them, one behind the other.

The driver takes 5 us of the host's time for each launch, 2 for a graph of eight kernels and 0.7 for each of them whose parameters
change (docs/performance-host.md). A node's kernel, grid and parameters can all be replaced before the graph is launched again, so one
graph serves whatever kernels, as many as it has nodes: there is one for each number of them (and which of them start before the one
in front has ended), device and stream.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import operator
import threading
from collections.abc import Sequence
from typing import Any

from ..choose import Unsupported
from .driver import Bound, DriverLaunch, _cuda, again, asked

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


class Links:
    """Launches that follow each other, whose addresses are in one list of ``count``.

    places: of each launch's arguments in that list. The addresses are written once for all of them, where the driver reads them.
    """

    def __init__(self, runs: Sequence[DriverLaunch], places: Sequence[Sequence[int]], count: int) -> None:
        self.early = tuple(run.early for run in runs)
        self.lock = threading.Lock()  # what the driver reads is changed for each launch
        self.given = (ctypes.c_void_p * count)()
        self.bound = [Bound(run, self.given, where) for run, where in zip(runs, places, strict=True)]
        self.described = [bound for bound in self.bound if bound.maps]
        self.bits = [1 << i for i in range(count)]  # one for each address
        self.reads = [functools.reduce(operator.or_, (self.bits[i] for i in where), 0) for where in places]


class Chain:
    """A graph of launches, one behind the other, for one stream. Raises Unsupported, which says why, where there is none.

    links: the launches that it begins with; others of the same number, of which the same start early, may take their places.
    """

    def __init__(self, links: Links, stream: int) -> None:
        cuda = _cuda()
        missing = [name for name in _NAMES if not hasattr(cuda, name)]
        if cuda is None or missing:
            raise Unsupported(f"the CUDA driver has no {missing[0]}")
        self.cuda, self.stream, self.lock = cuda, ctypes.c_void_p(stream), threading.Lock()
        self.what = f"launch {len(links.bound)} kernels as a graph"
        self.graph, self.launched = ctypes.c_void_p(), ctypes.c_void_p()
        self.nodes: list[ctypes.c_void_p] = []
        self.held: tuple[Links | None, Sequence[int | None]] = None, ()  # what the nodes launch, on which addresses
        mode, priority = ctypes.c_int(_RELAXED), ctypes.c_int()
        exchange = functools.partial(cuda.cuThreadExchangeStreamCaptureMode, ctypes.byref(mode))
        self._make(exchange)
        try:
            self._make(cuda.cuStreamGetPriority, self.stream, ctypes.byref(priority))
            self._make(cuda.cuGraphCreate, ctypes.byref(self.graph), 0)
            for bound in links.bound:
                self._add(bound, priority.value)
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

    def _add(self, bound: Bound, priority: int) -> None:
        """One node more, behind the last."""
        node = ctypes.c_void_p()
        ask = self.cuda.cuGraphAddKernelNode_v2
        self._make(ask, ctypes.byref(node), self.graph, None, ctypes.c_size_t(0), bound.node)
        if self.nodes:
            edge = _Edge(1, 0, 1) if bound.run.early else _Edge()
            pair = ctypes.byref(self.nodes[-1]), ctypes.byref(node)
            self._make(self.cuda.cuGraphAddDependencies_v2, self.graph, *pair, ctypes.byref(edge), ctypes.c_size_t(1))
        if priority:
            self._make(self.cuda.cuGraphKernelNodeSetAttribute, node, _PRIORITY, ctypes.byref(_Value(priority)))
        self.nodes.append(node)

    def __call__(self, links: Links, addresses: Sequence[int | None]) -> None:
        """Launch them all on those addresses, which are aligned to 16 bytes."""
        change, launch = self.cuda.cuGraphExecKernelNodeSetParams_v2, self.cuda.cuGraphLaunch
        with self.lock:
            (before, old), self.held = self.held, (None, ())  # until all nodes have been replaced
            differ = -1
            if before is links:
                differ = sum(itertools.compress(links.bits, map(operator.ne, addresses, old)))
            if differ:
                with links.lock:
                    links.given[:] = addresses
                    for bound in links.described:
                        bound.follow(addresses)
                    for node, bound, reads in zip(self.nodes, links.bound, links.reads):
                        if reads & differ and (error := change(self.launched, node, bound.node)):
                            again(self.cuda, self.what, error, change, self.launched, node, bound.node)
            self.held = links, addresses
            if error := launch(self.launched, self.stream):
                again(self.cuda, self.what, error, launch, self.launched, self.stream)


_CHAINS = 64  # that are kept: each takes some 100 KB of the device's memory
_chains: dict[tuple[object, ...], Chain | None] = {}


def chain(device: int | None, stream: int, links: Links) -> Chain | None:
    """The chain for such launches, or None: then each is launched by itself."""
    key = (device, stream, links.early)
    if key not in _chains and len(_chains) < _CHAINS:
        try:
            _chains[key] = Chain(links, stream)
        except Unsupported as reason:
            _log.info("kernels are launched one by one: %s", reason)
            _chains[key] = None
    return _chains.get(key)
