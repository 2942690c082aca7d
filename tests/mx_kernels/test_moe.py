"""A layer launched at once does what its five steps do: the same launches on the same tensors, the same bits."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import mx_kernels as mk

E, H, I, K = 32, 256, 128, 4
OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)


def steps(layer, x, ids, weights):
    if layer.inputs is not None:
        x = mk.quantize_dequantize(x, layer.inputs)
    slots = layer.inputs is None and x.dtype == torch.bfloat16
    rows = mk.block_size(ids.numel(), layer.w13.shape[0], x.device, layer.w13, slots=slots)
    tiles = mk.moe_align_block_size(ids, rows, layer.w13.shape[0], layer.expert_map)
    gathered, ordered = mk.layer_slots(layer.w13, layer.w2, tiles, plain=layer.inputs is None, ordered=True)
    epilogue = mk.Epilogue(layer.w13_bias, layer.activation, round_to=layer.inputs)
    k = ids.shape[1]
    x, k = (mk.gather_rows(x, tiles, top_k=k), 1) if gathered else (x, k)
    h = mk.grouped_gemm(x, layer.w13, tiles, top_k=k, from_slots=gathered, to_slots=ordered, epilogue=epilogue)
    epilogue = mk.Epilogue(layer.w2_bias, row_weight=weights)
    return mk.combine(mk.grouped_gemm(h, layer.w2, tiles, from_slots=ordered, epilogue=epilogue), tiles)


def make_layer(name="mxfp4", *, bias=True, mapped=False, device="cpu", inputs=None):
    rows = E // 2 if mapped else E
    w13, w2 = torch.randn(rows, 2 * I, H, device=device) / 16, torch.randn(rows, H, I, device=device) / 16
    if name == "bf16":
        w13, w2 = w13.bfloat16(), w2.bfloat16()
    else:
        w13, w2 = mk.quantize(w13, name), mk.quantize(w2, name)
    expert_map = None
    if mapped:
        expert_map = torch.full((E,), -1, dtype=torch.int32, device=device)
        expert_map[::2] = torch.arange(rows, dtype=torch.int32, device=device)
    return mk.PackedLayer(
        mk.pack(w13, gated=True),
        mk.pack(w2),
        OAI,
        torch.randn(rows, 2 * I, device=device) if bias else None,
        torch.randn(rows, H, device=device).bfloat16() if bias else None,
        expert_map,
        inputs,
    )


def make_input(tokens, device="cpu"):
    x = torch.randn(tokens, H, device=device).bfloat16()
    ids = torch.rand(tokens, E, device=device).topk(K).indices.int()
    return x, ids, torch.rand(tokens, K, device=device)


# --- which launches, without a GPU ---


def address(given):
    """Of a tensor or of what a descriptor describes; an address and None are what they are."""
    given = getattr(given, "base", given)
    return given.data_ptr() if hasattr(given, "data_ptr") else given


def number(run, name):
    """What a launch has for an argument of its kernel that is no tensor."""
    names = run.kernel.arg_names
    return dict(zip(names[len(names) - len(run.values) :], run.values, strict=True))[name]


class Ledger:
    """Stands in for launching: (Launch, the addresses it was given), and takes kernels as compiled once they were launched.

    given: of each launch that is no layer's the tensors and descriptors themselves, of a layer's the addresses and descriptors. compiled:
    what was to be compiled together.
    """

    def __init__(self, monkeypatch):
        from mx_kernels.kernels import combine as combine_kernel
        from mx_kernels.kernels import launch
        from mx_kernels.kernels import moe as kernel

        self.calls, self.given, self.compiled = [], [], []
        for module in ("align", "combine", "packed_gemm", "moe", "rebase", "slots"):
            monkeypatch.setattr(importlib.import_module(f"mx_kernels.{module}"), "direct", lambda *tensors: True)
        monkeypatch.setattr(combine_kernel, "target", lambda device: launch.Target(True, True, 132))
        monkeypatch.setattr(importlib.import_module("mx_kernels.align"), "has_triton", lambda: True)
        on_a_gpu = property(lambda t: t.device.type == "cpu")
        monkeypatch.setattr(torch.Tensor, "is_xpu", on_a_gpu, raising=False)
        monkeypatch.setattr(kernel, "ready", lambda device: True)
        monkeypatch.setattr(kernel, "current_stream", lambda device: 0)
        monkeypatch.setattr(kernel, "_plans", {})
        monkeypatch.setattr(kernel, "compile_together", self.compiled.extend)
        monkeypatch.setattr(launch.Launch, "__call__", lambda run, *tensors: self.step(run, tensors))
        monkeypatch.setattr(launch.Launch, "_take", lambda run, made, given: self.take_as_compiled(run))
        monkeypatch.setattr(launch.Launch, "run", lambda run, stream, places: self.record(run, places))

    def step(self, run, tensors):
        self.take_as_compiled(run)
        self.record(run, tensors)

    def take_as_compiled(self, run):
        for each in (run, *run.others):
            each.compiled = each

    def record(self, run, given):
        self.calls.append((run, [*map(address, given)]))
        self.given.append([*given])

    def take(self):
        calls, self.calls, self.given = self.calls, [], []
        return calls


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 5, 40, 300, 3000])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "bf16"])
@pytest.mark.parametrize(("mapped", "inputs"), [(False, None), (True, None), (False, mk.MXFP8), (True, mk.MXFP4)])
def test_the_launches_of_the_steps(monkeypatch, tokens, name, mapped, inputs):
    pytest.importorskip("triton")
    layer = make_layer(name, bias=tokens != 40, mapped=mapped, inputs=inputs)
    x, ids, weights = make_input(tokens)
    given = {t.data_ptr() for t in (x, ids, weights, *layer.tensors.values())}
    ledger = Ledger(monkeypatch)
    assert layer.launch(x, ids, weights) is None  # nothing is compiled yet
    assert len(ledger.take()) == (inputs is not None)  # x is quantized and dequantized
    steps(layer, x, ids, weights)
    tensors = ledger.given[inputs is not None :]
    want = ledger.take()
    out = layer.launch(x, ids, weights)
    got = ledger.take()
    assert [run.kernel for run, _ in ledger.compiled] == [run.kernel for run, _ in got[inputs is not None :]]
    for (run, types), given_there in zip(ledger.compiled, tensors, strict=True):
        assert [*types] == [None if t is None else t.dtype for t in given_there], run.kernel
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert [run for run, _ in got] == [run for run, _ in want]
    if inputs is not None:
        want, got = want[1:], got[1:]
    assert got[-1][1][-1] == out.data_ptr()
    for (run, theirs), (_, ours) in zip(want, got, strict=True):
        for parameter, a, b in zip(run.kernel.arg_names, theirs, ours):
            assert (a is None) == (b is None), parameter
            if a in given or b in given:  # what the kernel does not read may be anything
                assert a == b or (parameter in ("sorted_ids", "num_padded") and len(got) == 3), parameter
    written = {"h": got[-3][1][3], "y": got[-2][1][3]}
    assert got[-2][1][0] == written["h"]
    assert got[-1][1][0] == written["y"]
    if len(got) > 3:
        assert got[-3][1][4:7] == got[-2][1][4:7] == got[-4][1][-3:]  # sorted_ids, expert_ids, num_padded
    if len(got) > 4:
        assert got[-6][1][2] == got[-5][1][0] == got[-4][1][2]  # counts


@pytest.mark.compile
@pytest.mark.parametrize("block", [16, 160])
@pytest.mark.parametrize("orders", [(True, True), (False, True), (True, False)], ids=str)
def test_the_launches_of_the_steps_in_slot_order(monkeypatch, orders, block):
    """x is gathered where y will lie; h has a row a slot: the same launches with the same numbers, from one workspace."""
    pytest.importorskip("triton")
    kernel = importlib.import_module("mx_kernels.kernels.moe")
    choose = lambda *args, **kwargs: orders  # noqa: E731
    monkeypatch.setattr(mk, "layer_slots", choose)
    monkeypatch.setattr(kernel, "layer_slots", choose)
    for module in (mk, kernel):
        monkeypatch.setattr(module, "block_size", lambda *args, **kwargs: block)
    monkeypatch.setattr(kernel, "_plans", {})
    layer, (x, ids, weights) = make_layer(), make_input(3000)
    ledger = Ledger(monkeypatch)
    steps(layer, x, ids, weights)
    want = [run for run, _ in ledger.take()]
    layer.launch(x, ids, weights)
    got = ledger.take()
    assert [run for run, _ in got] == want
    first, second, total = (places for _, places in got[-3:])
    assert second[0] == first[3]  # h
    assert total[0] == second[3]  # y
    if orders[0]:
        gather = got[-4][1]
        assert gather[0] == x.data_ptr()
        assert gather[1] == first[0] == second[3]
        for found in (got[-6][1], got[-5][1]):  # sorted_ids, num_padded, places
            assert found == [first[4], first[6], gather[-1]]
    capacity = mk.moe_align_block_size(
        ids, mk.block_size(ids.numel(), E, x.device, layer.w13), E, sort=True
    ).sorted_ids.numel()
    plan = kernel.plan(layer, x, ids, weights)
    rows = [capacity if order else ids.numel() for order in (orders[1], orders[0])]
    assert plan.offsets[1] >= rows[0] * I * 2
    assert plan.offsets[2] - plan.offsets[1] >= rows[1] * H * 2
    monkeypatch.setattr(kernel.grouped_gemm._Plan, "leads", lambda one, two: True)
    one, *_ = (run for run, _ in kernel.plan(layer, x, ids, weights).launches[-3:])
    # a GEMM 2 that begins before GEMM 1 has ended would write where gathered rows are read
    assert number(one, "flow") == (0 if orders[0] else -1)


@pytest.mark.compile
def test_parts_of_the_workspace_do_not_overlap(monkeypatch):
    pytest.importorskip("triton")
    from mx_kernels.kernels import moe as kernel

    layers = [make_layer(mapped=mapped) for mapped in (False, True)]
    ledger = Ledger(monkeypatch)
    for tokens, layer in itertools.product((1, 3, 40, 700, 5000), layers):
        x, ids, weights = make_input(tokens)
        plan = kernel.plan(layer, x, ids, weights)
        assert plan.offsets == tuple(sorted(plan.offsets))
        assert all(offset % 256 == 0 for offset in plan.offsets)
        pairs = tokens * K
        assert plan.offsets[1] >= pairs * I * 2
        assert (*plan.offsets, plan.size)[2] - plan.offsets[1] >= pairs * H * 2
        # The alignment's parts, where there are any.
        assert len(plan.offsets) == 2 or plan.size - plan.offsets[2] >= 4 * pairs or plan.counters
    assert ledger.take() == []


@pytest.mark.compile
def test_a_launch_that_fails_leaves_no_counts_behind(monkeypatch):
    """GEMM 1 has counted, and the sum, which clears that, is not launched: the next call has other zeros."""
    pytest.importorskip("triton")
    kernel = importlib.import_module("mx_kernels.kernels.moe")
    gemm, launch = kernel.grouped_gemm, importlib.import_module("mx_kernels.kernels.launch")
    monkeypatch.setattr(gemm, "_counters", {})
    monkeypatch.setattr(gemm, "_plans", {})
    monkeypatch.setattr(gemm, "overlaps", lambda streamed, programs, units: True)
    layer, given, ledger = make_layer(), make_input(3), Ledger(monkeypatch)
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(True, True, 132, pdl=True))
    steps(layer, *given)
    assert layer.launch(*given) is not None
    dirty = gemm.counters(given[0].device, 1)
    where = {run.kernel.__name__: places for run, places in ledger.take()}["_combine_kernel"][4]
    assert where == dirty.data_ptr()

    def fails(run, stream, places):
        dirty[:12] = 7
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(launch.Launch, "run", fails)
    with pytest.raises(RuntimeError, match="no such kernel"):
        layer.launch(*given)
    assert not gemm.counters(given[0].device, 1).any()
    assert dirty.any()  # a graph may still hold it


@pytest.mark.compile
def test_one_plan_for_layers_of_one_shape(monkeypatch):
    pytest.importorskip("triton")
    a, b, c = make_layer(), make_layer(), make_layer(bias=False)
    assert a.key is b.key
    assert a.key is not c.key
    assert a.key is not make_layer(inputs=mk.MXFP8).key


def test_refuses_where_the_steps_must_run():
    layer, (x, ids, weights) = make_layer(), make_input(8)
    assert layer.launch(x, ids, weights) is None  # the CPU


# --- bits, on a GPU ---


@pytest.fixture
def overlapping(monkeypatch):
    """GEMM 2 begins with the blocks that GEMM 1 has done, however small both are."""
    kernel = importlib.import_module("mx_kernels.kernels.grouped_gemm")
    monkeypatch.setattr(kernel, "overlaps", lambda streamed, programs, units: True)
    for module in (kernel, importlib.import_module("mx_kernels.kernels.moe")):
        monkeypatch.setattr(module, "_plans", {})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "bf16"])
def test_the_first_call_compiles_what_it_launches_together(monkeypatch, name):
    """On threads: nothing is left to be compiled one after another when the steps run."""
    triton = importlib.import_module("triton")
    jit = triton.runtime.jit
    alone, together, compiles = [], [], jit.JITFunction._do_compile

    def seen(kernel, *args, **kwargs):
        (alone if triton.runtime._async_compile.active_mode.get() is None else together).append(kernel)
        return compiles(kernel, *args, **kwargs)

    layer = make_layer(name, device="cuda")  # which compiles what quantizes and packs
    monkeypatch.setattr(jit.JITFunction, "_do_compile", seen)
    for tokens in (3, 77, 1533):  # which no other test takes
        x, ids, weights = make_input(tokens, "cuda")
        kernel = importlib.import_module("mx_kernels.kernels.moe")
        assert layer.launch(x, ids, weights) is None
        for plan in kernel._plans.values():
            for run, _ in plan.launches:
                run.kernel.device_caches.clear()
        kernel._plans.clear()
        together.clear()
        assert layer.launch(x, ids, weights) is None
        assert together
        assert not alone
        steps(layer, x, ids, weights)
        assert not alone
        assert layer.launch(x, ids, weights) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("mapped", "inputs"), [(False, None), (True, None), (False, mk.MXFP8), (True, mk.MXFP4)])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "nvfp4", "bf16"])
@pytest.mark.usefixtures("overlapping")
def test_same_bits(name, mapped, inputs):
    layer = make_layer(name, mapped=mapped, device="cuda", inputs=inputs)
    for tokens in (1, 7, 64, 1000, 3000):
        x, ids, weights = make_input(tokens, "cuda")
        want = steps(layer, x, ids, weights)
        for _ in range(3):
            got = layer.launch(x, ids, weights)
            assert got is not None
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tokens"), [("mxfp8_e4m3", 1100), ("mxfp4", 2100), ("nvfp4", 1100), ("bf16", 2100)])
def test_same_bits_in_slot_order(name, tokens):
    """Wide weights and many pairs an expert: x is gathered, h kept in slot order, and the copy engine loads both where there is one."""
    shape = (4, 5632, 2048)
    w13, w2 = (torch.randn(s, device="cuda").bfloat16() / 45 for s in (shape, (4, 2048, 2816)))
    if name != "bf16":
        w13, w2 = mk.quantize(w13, name), mk.quantize(w2, name)
    layer = mk.PackedLayer(mk.pack(w13, gated=True), mk.pack(w2), OAI, torch.randn(4, 5632, device="cuda"))
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    ids = torch.rand(tokens, 4, device="cuda").topk(2).indices.int()
    weights = torch.rand(tokens, 2, device="cuda")
    rows = mk.block_size(ids.numel(), 4, "cuda", layer.w13, slots=True)
    tiles = mk.moe_align_block_size(ids, rows, 4)
    if mk.Device.probe("cuda").arch.name == "sm90":
        assert mk.layer_slots(layer.w13, layer.w2, tiles, plain=True, ordered=True) == (True, True)
    want = steps(layer, x, ids, weights)
    epilogue = mk.Epilogue(layer.w13_bias, OAI)
    tiles = mk.moe_align_block_size(ids, 128, 4)
    h = mk.grouped_gemm(x, layer.w13, tiles, top_k=2, epilogue=epilogue)
    y = mk.grouped_gemm(h, layer.w2, tiles, epilogue=mk.Epilogue(row_weight=weights))
    assert torch.equal(want, mk.combine(y, tiles))
    for _ in range(3):
        got = layer.launch(x, ids, weights)
        assert got is not None
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "bf16"])
@pytest.mark.usefixtures("overlapping")
def test_no_pair_here(name):
    """Programs without work leave before the kernel in front has ended: layers without a pair, and others, in turns."""
    layer = make_layer(name, mapped=True, device="cuda")
    for tokens in (1, 7, 64, 300):
        x, ids, weights = make_input(tokens, "cuda")
        want = steps(layer, x, ids, weights)
        elsewhere = ids | 1  # of odd numbers none is here
        got = [(layer.launch(x, elsewhere, weights), layer.launch(x, ids, weights)) for _ in range(50)]
        for none, some in got:
            assert not none.any()
            assert torch.equal(some, want)


@pytest.mark.gpu
def test_strided_unaligned_and_empty():
    layer = make_layer(device="cuda")
    x, ids, weights = make_input(200, "cuda")
    steps(layer, x, ids, weights)
    wide = torch.randn(200, H + 64, device="cuda").bfloat16()
    part = wide[:, :H]
    steps(layer, part, ids, weights)
    assert torch.equal(layer.launch(part, ids, weights), steps(layer, part.contiguous(), ids, weights))
    assert layer.launch(wide[:, 1 : H + 1], ids, weights) is None  # not aligned to 16 bytes
    assert layer.launch(x.float(), ids, weights) is None
    assert layer.launch(x, ids.long(), weights) is None
    assert layer.launch(x, ids.t().contiguous().t(), weights) is None
    assert layer.launch(x[:0], ids[:0], weights[:0]) is None
    assert layer.launch(x.requires_grad_(), ids, weights) is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_cuda_graph_and_streams(tokens):
    layer = make_layer(device="cuda")
    x, ids, weights = make_input(tokens, "cuda")
    steps(layer, x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.launch(x, ids, weights)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, steps(layer, x, ids, weights))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = layer.launch(x, ids, weights)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, out)


@pytest.mark.gpu
def test_a_profiler_sees_every_launch():
    import triton

    layer = make_layer(device="cuda")
    x, ids, weights = make_input(100, "cuda")
    steps(layer, x, ids, weights)
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert layer.launch(x, ids, weights) is None
        steps(layer, x, ids, weights)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 4
