"""Kernels launched by the CUDA driver itself: what it is given, and on a GPU the same bits as by Triton's launcher."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import struct
import threading
from types import SimpleNamespace

import pytest
import torch

import mx_kernels as mk
from mx_kernels.choose import Unsupported

from .test_moe import steps
from .test_rebased_moe import steps as rebased_steps

MAP = "tensordesc<bf16[32, 64],NVMMASharedLayout(swizzle_byte_width=128)>"
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [32, 64], "fp4_padded": False}


@pytest.fixture
def driver():
    pytest.importorskip("triton")
    return importlib.import_module("mx_kernels.kernels.driver")


class Cuda:
    """Stands in for the driver's library: a kernel with parameters of such sizes, what it was launched with, and what of its maps.

    A map's bytes are a number: of its description among those that were asked for.
    """

    def __init__(self, codes):
        self.codes, self.launches, self.maps, self.errors = codes, [], [], []
        self.room = 0

    def cuFuncGetParamInfo(self, function, i, offset, size):
        if i.value < len(self.codes):
            size._obj.value = struct.calcsize(self.codes[i.value])
        return 0 if i.value < len(self.codes) else 1

    def cuFuncGetAttribute(self, most, attribute, function):
        most._obj.value = self.room
        return 0 if attribute == 8 else 1

    def cuFuncSetAttribute(self, function, attribute, room):
        self.room = room
        return 0 if attribute == 8 else 1

    def cuTensorMapEncodeTiled(self, place, kind, rank, address, sizes, strides, box, ones, *rest):
        self.write(place, (kind, rank, address.value, [*sizes], strides[: rank - 1], [*box], [*ones], rest))
        return 0

    def cuTensorMapReplaceAddress(self, place, address):
        held = self.map_at(place.value)
        self.write(place, (*held[:2], address.value, *held[3:]))
        return 0

    def write(self, place, made):
        assert place.value % 64 == 0
        ctypes.memmove(place, struct.pack("128s", b"map" + bytes([len(self.maps)])), 128)
        self.maps.append(made)

    def map_at(self, at):
        assert at % 64 == 0
        name, number, rest = struct.unpack("3sB124s", ctypes.string_at(at, 128))
        assert (name, rest) == (b"map", bytes(124))
        return self.maps[number]

    def cuLaunchKernelEx(self, ref, function, params, extra):
        if self.errors:
            return self.errors.pop(0)
        given = []
        for code, at in zip(self.codes, params, strict=True):
            if code == "128s":
                given.append(self.map_at(at))
            else:
                given.append(struct.unpack(code, ctypes.string_at(at, struct.calcsize(code)))[0])
        c = ref._obj
        early = [(a.id, a.value) for a in c.attributes[: c.count]]
        self.launches.append((function.value, [*c.grid], [*c.block], c.shared, c.stream, early, given))
        return 0

    def cuGetErrorString(self, error, text):
        text._obj.value = b"out of patience"
        return 0


def descriptor(address, shape=(96, 128)):
    base = SimpleNamespace(data_ptr=lambda: address)
    return SimpleNamespace(base=base, shape=[*shape], strides=[shape[1], 1], padding="zero")


def compiled(signature, metas=(), **metadata):
    about = {
        "num_ctas": 1,
        "num_warps": 4,
        "shared": 1000,
        "launch_pdl": False,
        "launch_cooperative_grid": False,
        "tensordesc_meta": [*metas],
    }
    about |= {"global_scratch_size": 0, "profile_scratch_size": 0} | metadata
    names = [f"a{i}" for i in range(len(signature))]
    source = SimpleNamespace(signature=dict(zip(names, signature)), fn=SimpleNamespace(arg_names=names))
    return SimpleNamespace(src=source, metadata=SimpleNamespace(**about), function=77, name="kernel")


SIGNATURE = [MAP, "*bf16", "constexpr", "*i32", "i32", "constexpr", "fp32", "i64", "constexpr"]
CODES = ["128s", "i", "i", "q", "q", "P", "P", "i", "f", "q", "P", "P"]
VALUES = (-5, 1, 0.25, 1 << 40, "silu")


@pytest.mark.compile
def test_parameters(driver):
    assert driver.parameters(SIGNATURE) == [["128s", "i", "i", "q", "q"], ["P"], [], ["P"], ["i"], [], ["f"], ["q"], []]
    assert driver.parameters(["tensordesc<u8[8]>"]) == [["128s", "i", "q"]]
    for unknown in ("fp16", "u128", ("i32", "i32"), None):
        with pytest.raises(Unsupported, match="an argument is of type"):
            driver.parameters(["*u8", unknown])


@pytest.mark.compile
@pytest.mark.parametrize("early", [False, True])
def test_what_the_driver_is_given(driver, monkeypatch, early):
    """Addresses and a matrix's change, numbers stay; absent tensors and constants are no parameters."""
    cuda = Cuda(CODES)
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    args = (descriptor(1 << 20), 4096, None, 8192)
    kernel = compiled(SIGNATURE, [META], launch_pdl=early)
    run = driver.DriverLaunch(kernel, (7, 2, 1), args, VALUES)
    attribute = [(6, 1)] if early else []
    for stream, matrix, a, b in ((0, 1 << 20, 4096, 8192), (9, 1 << 21, 512, None), (9, 1 << 21, 0, 1 << 47)):
        run(stream, [matrix, a, None, b])
        # bf16 as the host names it, innermost first, the strides in bytes, 128-byte swizzle and requests, zeros outside
        held = (9, 2, matrix, [128, 96], [256], [64, 32], [1, 1], (0, 3, 2, 0))
        given = [held, 96, 128, 128, 1, a or None, b, -5, 0.25, 1 << 40, None, None]
        given = [n if code != "P" else n or 0 for code, n in zip(CODES, given, strict=True)]
        want = (77, [7, 2, 1], [128, 1, 1], 1000, stream or None, attribute, given)
        assert cuda.launches.pop() == want
    assert len(cuda.maps) == 2  # the other address comes twice


@pytest.mark.compile
def test_room_in_shared_memory(driver, monkeypatch):
    """What a program gets, and may get, of all launches of a kernel the most."""
    cuda = Cuda(CODES)
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    args = (descriptor(1 << 20), 4096, None, 8192)
    for room, gets, most in ((0, 1000, 0), (900, 1000, 0), (5000, 5000, 5000), (3000, 3000, 5000)):
        run = driver.DriverLaunch(compiled(SIGNATURE, [META]), (7, 2, 1), args, VALUES, room)
        run(0, [1 << 20, 4096, None, 8192])
        assert cuda.launches.pop()[3] == gets
        assert cuda.room == most


@pytest.mark.compile
@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("parameters are others", {"codes": [*CODES, "P"]}),
        ("parameters are others", {"codes": CODES[:-1]}),
        ("parameters are others", {"codes": [*CODES[:7], "q", *CODES[8:]]}),
        ("global_scratch_size is 64", {"global_scratch_size": 64}),
        ("launch_cooperative_grid is True", {"launch_cooperative_grid": True}),
        ("clusters of 2", {"num_ctas": 2}),
        ("descriptor", {"metas": []}),
        ("descriptor", {"metas": [META | {"fp4_padded": True}]}),
        ("does not take a descriptor", {"refuses": 1}),
        ("of type fp16", {"signature": [*SIGNATURE[:-1], "fp16"]}),
        ("older than CUDA 12.4", {"cuda": None}),
    ],
)
def test_left_to_triton(driver, monkeypatch, why, change):
    """Whatever is not as it is known here has no launch by the driver, and says why."""
    change = dict(change)
    cuda = change.pop("cuda", Cuda(change.pop("codes", CODES)))
    if error := change.pop("refuses", 0):
        cuda.cuTensorMapEncodeTiled = lambda *_: error
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    signature, metas = change.pop("signature", SIGNATURE), change.pop("metas", [META])
    args = (descriptor(1 << 20), 4096, None, 8192)
    with pytest.raises(Unsupported, match=why):
        driver.DriverLaunch(compiled(signature, metas, **change), (7, 2, 1), args, VALUES)


@pytest.mark.compile
def test_what_is_left_to_triton_is_logged(driver, monkeypatch, caplog):
    launch = importlib.import_module("mx_kernels.kernels.launch")
    made = object.__new__(launch.CompiledKernel)
    vars(made).update(vars(compiled(["*u8"])))

    class Kernel:
        arg_names = ("a0",)

        def __getitem__(self, grid):
            return lambda *args: made

    monkeypatch.setattr(driver, "_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    run = launch.Launch(Kernel(), (1,), torch.device("cuda", 0))
    with caplog.at_level("INFO"):
        run(torch.empty(16, dtype=torch.uint8))
    assert run.compiled is made
    assert run.by_driver is None
    assert "kernel goes on by Triton's launcher: there is no CUDA driver" in caplog.text


@pytest.mark.compile
def test_errors_say_what_the_driver_says(driver, monkeypatch):
    cuda = Cuda(["P", "P", "P"])
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    run = driver.DriverLaunch(compiled(["*u8"]), (1, 1, 1), (16,), ())
    cuda.errors = [719]
    with pytest.raises(RuntimeError, match=r"did not launch kernel: out of patience \(error 719\)"):
        run(0, [16])
    run(0, [32])
    assert cuda.launches[0][-1] == [32, 0, 0]


@pytest.mark.compile
def test_a_thread_that_has_no_context_gets_one(driver, monkeypatch):
    cuda, asked = Cuda(["P", "P", "P"]), []
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(1))
    run = driver.DriverLaunch(compiled(["*u8"]), (1, 1, 1), (16,), ())
    for errors, launches in (([201], 1), ([201, 201], 0), ([], 1)):
        cuda.errors, cuda.launches = errors, []
        if not launches:
            with pytest.raises(RuntimeError, match="error 201"):
                run(0, [16])
        else:
            run(0, [16])
        assert len(cuda.launches) == launches
    assert len(asked) == 2


# --- on a GPU ---


def layer_of(name):
    """A layer whose products are described for the copy engine from 1100 tokens on (or always), and whose weights few tokens stream."""
    shape = (4, 5632, 2048)
    w13, w2 = (torch.randn(s, device="cuda").bfloat16() / 45 for s in (shape, (4, 2048, 2816)))
    act = mk.Activation("silu")
    if name == "rebased":
        w13, w2 = (mk.quantize(w, mk.MXFP8) for w in (w13, w2))
        return mk.RebasedLayer(mk.rebase(w13, gated=True), mk.rebase(w2), act)
    w13, w2 = mk.quantize(w13, name), mk.quantize(w2, name)
    return mk.PackedLayer(mk.pack(w13, gated=True), mk.pack(w2), act)


def given_of(tokens):
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    return x, torch.rand(tokens, 4, device="cuda").topk(2).indices.int(), torch.rand(tokens, 2, device="cuda")


def launches_of(layer, given):
    """(the result, once everything is compiled; the layer's launches)"""
    moe = importlib.import_module("mx_kernels.kernels.moe")
    compile_all(layer, given)
    moe._plans.clear()
    out = layer.launch(*given)
    assert out is not None
    (plan,) = moe._plans.values()
    return out, [run for run, _ in plan.launches]


def compile_all(layer, given):
    if isinstance(layer, mk.RebasedLayer):
        rebased_steps(layer, *given, True)
    else:
        steps(layer, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "rebased"])
@pytest.mark.parametrize("tokens", [1, 200, 2100])
def test_same_bits_as_by_triton(driver, monkeypatch, name, tokens):
    layer = layer_of(name)
    first, launches = launches_of(layer, given_of(tokens))
    assert all(run.by_driver is not None for run in launches) or driver._cuda() is None
    given = given_of(tokens)  # at other addresses
    got = layer.launch(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.launch(*given)
    graph.replay()
    for run in launches:
        monkeypatch.setattr(run, "by_driver", None)
    want = layer.launch(*given)
    assert torch.equal(got, want)
    assert torch.equal(captured, want)
    assert not torch.equal(first, want)


@pytest.mark.gpu
def test_threads_and_streams(driver):
    """Several threads launch one plan at once, each on a stream of its own but for one, whose first use of the device that is."""
    layer, many = layer_of("mxfp4"), [given_of(300) for _ in range(4)]
    compile_all(layer, many[0])
    want = [layer.launch(*given) for given in many]
    torch.cuda.synchronize()
    wrong = []

    def work(given, expected):
        with contextlib.nullcontext() if given is many[0] else torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                got = layer.launch(*given)
            torch.cuda.current_stream().synchronize()
            if not torch.equal(got, expected):
                wrong.append(given)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(many, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
