"""Launches as a graph: what the driver is given, and on a GPU the same bits as one by one."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import threading

import pytest
import torch

from mx_kernels.choose import Unsupported

from . import test_moe, test_rebased_moe
from .test_kernels_driver import (
    CODES,
    META,
    SIGNATURE,
    VALUES,
    Cuda,
    compile_all,
    compiled,
    descriptor,
    given_of,
    layer_of,
)


@pytest.fixture
def chain(monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module("mx_kernels.kernels.chain")
    monkeypatch.setattr(module, "_chains", {})
    return module


@pytest.fixture
def driver(chain):
    return importlib.import_module("mx_kernels.kernels.driver")


@pytest.fixture
def moe(chain):
    return importlib.import_module("mx_kernels.kernels.moe")


class Graphs(Cuda):
    """Stands in for the driver's graphs too: nodes and edges, what each node has, whole launches; relaxed: of captures elsewhere."""

    def __init__(self, codes, refuses="", priority=0):
        super().__init__(codes)
        self.refuses, self.priority, self.relaxed, self.changes = refuses, priority, False, []
        self.nodes, self.edges, self.attributes, self.destroyed = [], [], [], []

    def error(self, name):
        return 700 if name == self.refuses else 0

    def params(self, ref):
        """(the function, grid, threads, shared memory, numbers) of a node."""
        n = ref._obj
        at = (ctypes.c_void_p * len(self.codes)).from_address(n.params)
        self.cuLaunchKernelEx(ctypes.byref(_launch_of(n)), ctypes.c_void_p(n.function), at, None)
        function, grid, block, shared, _, _, given = self.launches.pop()
        return function, grid, block, shared, given

    def cuThreadExchangeStreamCaptureMode(self, ref):
        mode = ref._obj.value
        ref._obj.value, self.relaxed = (2 if self.relaxed else 0), mode == 2
        return 0

    def cuStreamGetPriority(self, stream, ref):
        ref._obj.value = self.priority
        return self.error("priority")

    def cuGraphCreate(self, ref, flags):
        ref._obj.value = 5
        return self.error("create")

    def cuGraphAddKernelNode_v2(self, ref, graph, front, count, node):
        assert (graph.value, front, count.value) == (5, None, 0)
        self.nodes.append(self.params(node))
        ref._obj.value = len(self.nodes)
        return self.error("node")

    def cuGraphAddDependencies_v2(self, graph, a, b, edge, count):
        e = edge._obj
        self.edges.append((a._obj.value, b._obj.value, (e.port, e.to, e.kind)))
        assert count.value == 1
        return self.error("edge")

    def cuGraphKernelNodeSetAttribute(self, node, attribute, value):
        self.attributes.append((node.value, attribute, value._obj.number))
        return self.error("attribute")

    def cuGraphInstantiateWithFlags(self, ref, graph, flags):
        assert self.relaxed
        ref._obj.value = 6
        return self.error("instantiate")

    def cuGraphExecKernelNodeSetParams_v2(self, launched, node, ref):
        if self.errors:
            return self.errors.pop(0)
        self.nodes[node.value - 1] = self.params(ref)
        self.changes.append(node.value)
        return 0

    def cuGraphLaunch(self, launched, stream):
        self.launches.append((launched.value, stream.value, list(self.nodes)))
        return self.errors.pop(0) if self.errors else 0

    def cuGraphExecDestroy(self, launched):
        self.destroyed.append(launched.value)

    def cuGraphDestroy(self, graph):
        self.destroyed.append(graph.value)


def _launch_of(node):
    driver = importlib.import_module("mx_kernels.kernels.driver")
    return driver._Config(node.grid, node.block, node.shared, None, None, 0)


def launches(driver, monkeypatch, cuda, early):
    """One for each of ``early``, of kernels 70, 71, ..."""
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(importlib.import_module("mx_kernels.kernels.chain"), "_cuda", lambda: cuda)
    runs = []
    for i, pdl in enumerate(early):
        kernel = compiled(SIGNATURE, [META], launch_pdl=pdl, shared=1000 + i)
        kernel.function = 70 + i
        runs.append(driver.DriverLaunch(kernel, (7, 2, 1 + i), (descriptor(1 << 20), 4096, None, 8192), VALUES))
    return runs


def linked(chain, runs):
    """Each on three addresses of its own, in a list that ends with none."""
    last = 3 * len(runs)
    return chain.Links(runs, [(3 * i, 3 * i + 1, last, 3 * i + 2) for i in range(len(runs))], last + 1)


def addresses(*given):
    return [*itertools.chain(*given), None]


def node(i, matrix, a, b):
    held = (9, 2, matrix, [128, 96], [256], [64, 32], [1, 1], (0, 3, 2, 0))
    given = [held, 96, 128, 128, 1, a, b, -5, 0.25, 1 << 40, 0, 0]
    return 70 + i, [7, 2, 1 + i], [128, 1, 1], 1000 + i, given


A, B, C = (1 << 20, 4096, 8192), (1 << 21, 512, 1 << 47), (1 << 22, 1024, 2048)


@pytest.mark.compile
@pytest.mark.parametrize("priority", [0, -5])
def test_what_the_driver_is_given(chain, driver, monkeypatch, priority):
    """Nodes one behind the other; those that start early from where the one in front lets them; only what differs is replaced."""
    cuda = Graphs(CODES, priority=priority)
    early = (True, False, True)
    runs = launches(driver, monkeypatch, cuda, early)
    links = linked(chain, runs)
    whole = chain.chain(0, 99, links)
    assert cuda.edges == [(1, 2, (0, 0, 0)), (2, 3, (1, 0, 1))]
    assert cuda.attributes == ([(i, 8, priority) for i in (1, 2, 3)] if priority else [])
    assert not cuda.relaxed

    def check(links, *want):
        """(kernel, its addresses) of each launch"""
        whole(links, addresses(*(given for _, given in want)))
        assert cuda.launches.pop() == (6, 99, [node(i, *given) for i, given in want])
        changes, cuda.changes = cuda.changes, []
        return changes

    assert check(links, (0, A), (1, B), (2, C)) == [1, 2, 3]
    assert check(links, (0, A), (1, C), (2, C)) == [2]
    assert check(links, (0, A), (1, C), (2, C)) == []
    # other kernels on the same addresses, one of them twice; and back
    others = linked(chain, [runs[0], runs[2], runs[2]])
    assert check(others, (0, A), (2, C), (2, B)) == [1, 2, 3]
    assert check(links, (0, A), (1, C), (2, C)) == [1, 2, 3]
    # addresses that two kernels share
    shared = chain.Links(runs, [(0, 1, 7, 2), (3, 1, 7, 4), (5, 2, 7, 6)], 8)
    for x, changes in ((1, [1, 2, 3]), (2, [1, 2]), (3, [1, 2])):
        whole(shared, [1 << 20, 16 * x, 32, 1 << 21, 64, 1 << 22, 128, None])
        want = [node(0, 1 << 20, 16 * x, 32), node(1, 1 << 21, 16 * x, 64), node(2, 1 << 22, 32, 128)]
        assert cuda.launches.pop() == (6, 99, want)
        assert cuda.changes == changes
        cuda.changes = []
    assert not cuda.launches


@pytest.mark.compile
def test_streams_share_links(chain, driver, monkeypatch):
    """What one stream's graph was given last is not taken for what another's has."""
    cuda = Graphs(CODES)
    links = linked(chain, launches(driver, monkeypatch, cuda, (False, False)))
    first = chain.chain(0, 99, links)
    cuda.nodes, mine = [], cuda.nodes
    second = chain.chain(0, 98, links)
    cuda.nodes, others = mine, cuda.nodes
    for whole, nodes, stream, given in (
        (first, mine, 99, (A, B)),
        (second, others, 98, (C, C)),
        (first, mine, 99, (A, C)),  # of which the first kernel's are not asked for again, the memory has them
        (second, others, 98, (A, C)),
    ):
        cuda.nodes = nodes
        whole(links, addresses(*given))
        assert cuda.launches.pop() == (6, stream, [node(i, *each) for i, each in enumerate(given)])
    assert cuda.changes == [1, 2, 1, 2, 2, 1]


@pytest.mark.compile
def test_one_for_each_device_stream_and_kind(chain, driver, monkeypatch):
    cuda = Graphs(CODES)
    early, late = (linked(chain, launches(driver, monkeypatch, cuda, (False, pdl))) for pdl in (True, False))
    other = linked(chain, launches(driver, monkeypatch, cuda, (False, True)))
    first = chain.chain(0, 99, early)
    assert chain.chain(0, 99, other) is first
    others = [chain.chain(1, 99, early), chain.chain(0, 98, early), chain.chain(0, 99, late)]
    assert len({id(c) for c in (first, *others)}) == 4
    monkeypatch.setattr(chain, "_CHAINS", 4)
    assert chain.chain(0, 97, early) is None  # no more are kept
    assert chain.chain(0, 99, early) is first
    chain._chains.clear()
    del first, others
    assert sorted(cuda.destroyed) == [5] * 4 + [6] * 4


@pytest.mark.compile
@pytest.mark.parametrize("refuses", ["priority", "create", "node", "edge", "attribute", "instantiate", "cuGraphLaunch"])
def test_where_there_is_none(chain, driver, monkeypatch, caplog, refuses):
    """What the driver has not or does not make is logged once, and launches stay as they are."""
    cuda = Graphs(CODES, refuses, priority=-1)
    if refuses == "cuGraphLaunch":
        monkeypatch.delattr(Graphs, refuses)
    links = linked(chain, launches(driver, monkeypatch, cuda, (False, True)))
    with caplog.at_level("INFO"):
        assert chain.chain(0, 99, links) is None
        assert chain.chain(0, 99, links) is None
    assert len(caplog.records) == 1
    said = "has no cuGraphLaunch" if refuses == "cuGraphLaunch" else "did not make a graph: out of patience"
    assert f"launched one by one: the CUDA driver {said}" in caplog.text
    assert not cuda.relaxed
    with pytest.raises(Unsupported, match="CUDA driver"):
        chain.Chain(links, 99)


@pytest.mark.compile
def test_errors_leave_nothing_half_done(chain, driver, monkeypatch):
    """A node that was not replaced is not taken for what it should have become."""
    cuda = Graphs(CODES)
    links = linked(chain, launches(driver, monkeypatch, cuda, (False, False)))
    whole = chain.chain(0, 99, links)
    whole(links, addresses(A, A))
    cuda.errors = [719]
    with pytest.raises(RuntimeError, match=r"did not launch 2 kernels as a graph: out of patience \(error 719\)"):
        whole(links, addresses(B, B))
    whole(links, addresses(B, A))
    assert cuda.launches.pop() == (6, 99, [node(0, *B), node(1, *A)])
    cuda.errors = [4]
    with pytest.raises(RuntimeError, match="error 4"):
        whole(links, addresses(B, A))


class Kernels(Graphs):
    """Kernels of so many addresses each, by their functions: 70, 71, ..."""

    def __init__(self, counts):
        super().__init__([])
        self.counts = counts

    def cuFuncGetParamInfo(self, function, *rest):
        self.codes = ["P"] * (self.counts[function.value - 70] + 2)
        return super().cuFuncGetParamInfo(function, *rest)

    def params(self, ref):
        self.codes = ["P"] * (self.counts[ref._obj.function - 70] + 2)
        return super().params(ref)


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("kind", ["mxfp4", "rebased"])
def test_a_layer_as_a_graph_has_the_addresses_of_its_launches(chain, moe, driver, monkeypatch, kind, tokens):
    """Two layers in turns, which share a plan: each node has what its launch by itself is given, the layer's own tensors among them."""
    make = test_rebased_moe if kind == "rebased" else test_moe
    layers = [make.make_layer() if kind == "rebased" else make.make_layer(kind) for _ in range(2)]
    given = test_moe.make_input(tokens)
    test_moe.Ledger(monkeypatch)
    monkeypatch.setattr(moe, "_plans", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    make.steps(layers[0], *given, *((True,) if kind == "rebased" else ()))
    assert layers[0].launch(*given) is not None
    (plan,) = moe._plans.values()
    cuda = Kernels([len(places) for _, places in plan.launches])
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(chain, "_cuda", lambda: cuda)
    for i, (run, places) in enumerate(plan.launches):
        kernel = compiled(["*u8"] * len(places))
        kernel.function = 70 + i
        monkeypatch.setattr(run, "by_driver", driver.DriverLaunch(kernel, run.grid, places, ()))
    moe._plans.clear()
    seen = []

    def watched(*key):
        whole = chain.chain(*key)
        return lambda links, addresses: (seen.append(addresses), whole(links, addresses))

    monkeypatch.setattr(moe, "chain", watched)
    for layer in (*layers, *layers):
        out = layer.launch(*given)
        *_, nodes = cuda.launches.pop()
        addresses = seen.pop()
        want = [[addresses[i] or 0 for i in places] for _, places in plan.launches]
        assert [numbers[:-2] for *_, numbers in nodes] == want
        assert {t.data_ptr() for t in layer.tensors.values()} <= {*itertools.chain(*want)}
        assert out.data_ptr() in want[-1]


# --- on a GPU ---


def one_by_one(moe, monkeypatch, layer, given):
    with monkeypatch.context() as patch:
        patch.setattr(moe, "chain", lambda *_: None)
        return layer.launch(*given)


@pytest.mark.gpu
def test_same_bits_whatever_it_launched_before(chain, moe, monkeypatch):
    """Layers and numbers of tokens in turns, which share graphs, far ahead of the device: each call has its own kernels and addresses."""
    layers = [layer_of(name) for name in ("mxfp4", "rebased", "mxfp8", "mxfp4")]
    many = [(layer, given_of(tokens)) for tokens in (1, 200, 2100, 201, 64, 1) for layer in layers]
    for layer, given in many:
        compile_all(layer, given)
    want = [one_by_one(moe, monkeypatch, layer, given) for layer, given in many]
    torch.cuda.synchronize()
    for _ in range(3):
        torch.cuda._sleep(20_000_000)
        got = [layer.launch(*given) for layer, given in many]
        assert all(map(torch.equal, got, want))
    used = [whole for whole in chain._chains.values() if whole is not None]
    assert len(used) == len(chain._chains) < len(many)


@pytest.mark.gpu
def test_streams_priorities_and_captures(chain, moe, monkeypatch):
    """A chain a stream, one of high priority among them; made while another thread captures a graph, which has launches of its own."""
    layer, given = layer_of("mxfp4"), given_of(300)
    compile_all(layer, given)
    want = one_by_one(moe, monkeypatch, layer, given)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    got = []

    def work():
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(layer.launch(*given))

    work()  # so that memory is there
    torch.cuda.synchronize()
    assert len(chain._chains) == 3
    chain._chains.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.launch(*given)
        assert not chain._chains
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert len(chain._chains) == 3
    assert len(got) == 6
    assert all(torch.equal(y, want) for y in (*got, captured))
