"""A re-based layer launched at once does what its steps do: the same launches, each on what the same launch wrote, the same bits."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_kernels import reference

from .test_moe import OAI, Ledger, address

E, K = 32, 4


def steps(layer, x, ids, weights, promote):
    rows = mk.rebased_block_size(ids.numel(), layer.w13, promote)
    tiles = mk.moe_align_block_size(ids, rows, layer.w13.shape[0], layer.expert_map, sort=True)
    h = mk.grouped_gemm_rebased(
        mk.rebase_rows(x, tiles, top_k=ids.shape[1]),
        layer.w13,
        tiles,
        epilogue=mk.Epilogue(layer.w13_bias, layer.activation, requantize_to=mk.MXFP8),
        promote=promote,
    )
    y = mk.grouped_gemm_rebased(
        mk.rebase_rows(h, tiles),
        layer.w2,
        tiles,
        epilogue=mk.Epilogue(layer.w2_bias, row_weight=weights.reshape(-1)),
        scatter=True,
        promote=promote,
        out_dtype=x.dtype,
    )
    return mk.combine(y, tiles, out_dtype=x.dtype)


def make_layer(fmt=mk.MXFP4, *, bias=True, mapped=False, device="cpu", experts=E, hidden=256, width=128, act=OAI):
    rows = experts // 2 if mapped else experts
    w13, w2 = (
        reference.quantize(torch.randn(rows, *shape, device=device) / 16, fmt)
        for shape in ((2 * width, hidden), (hidden, width))
    )
    expert_map = None
    if mapped:
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
        expert_map[::2] = torch.arange(rows, dtype=torch.int32, device=device)
    return mk.RebasedLayer(
        mk.rebase(w13, gated=True),
        mk.rebase(w2),
        act,
        torch.randn(rows, 2 * width, device=device) if bias else None,
        torch.randn(rows, hidden, device=device).bfloat16() if bias else None,
        expert_map,
    )


def make_input(tokens, device="cpu", *, experts=E, k=K, hidden=256, dtype=torch.bfloat16):
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    ids = torch.rand(tokens, experts, device=device).topk(k).indices.int()
    if tokens > 2:
        ids[1, -1], ids[2] = -1, experts  # dropped
    return x, ids, torch.rand(tokens, k, device=device)


# --- which launches, without a GPU ---


@pytest.fixture
def ledger(monkeypatch):
    """Nothing is planned or compiled yet, nor stays so; on a device like Hopper's."""
    pytest.importorskip("triton")
    launch, moe, rebased = (
        importlib.import_module(f"mx_kernels.kernels.{name}") for name in ("launch", "moe", "rebased")
    )
    kernels = [importlib.import_module(f"mx_kernels.kernels.{name}") for name in ("align", "combine", "slots")]
    plans = [rebased.plan_rows, rebased.plan_product, *(kernel.plan for kernel in kernels)]
    for plan in plans:
        plan.cache_clear()
    monkeypatch.setattr(moe, "_plans", {})
    made = Ledger(monkeypatch)
    monkeypatch.setattr(rebased, "target", lambda device: launch.Target(True, True, 132, True, True))
    yield made
    for plan in plans:
        plan.cache_clear()


WRITES = {
    "_align_kernel": ("zeros", "sorted_ids", "expert_ids", "num_padded"),
    "_count_kernel": ("counts",),
    "_scan_kernel": ("counts",),
    "_place_kernel": ("zeros", "sorted_ids", "expert_ids", "num_padded"),
    "_rebase_rows_kernel": ("out", "scale"),
    "_places_kernel": ("places",),
    "_gather_rows_kernel": ("out", "out_scale"),
    "_grouped_gemm_rebased_kernel": ("y", "y_scale", "partial"),
    "_combine_kernel": ("out",),
}
UNLESS = {  # constant -> parameters that a kernel does not touch where it is not set
    "CODES": ("x_scale",),
    "LISTED": ("sorted_ids", "num_padded"),
    "FP4": ("octaves",),
    "BIAS": ("bias",),
    "ZEROS": ("zeros",),
    "WEIGHTED": ("row_weight", "weights"),
    "QUANTIZE": ("y_scale",),
    "HAS_MAP": ("expert_map",),
}


def sources(calls, sizes, given):
    """Of each launch, whence what it reads: the launch and parameter that wrote it, or a name in ``given``; None where something else
    has been written there since, or is by itself."""
    live, found = {}, []
    for i, ((run, places), size) in enumerate(zip(calls, sizes, strict=True)):
        names = run.kernel.arg_names
        constants = dict(zip(names[len(places) :], run.values, strict=True))
        unread = {name for constant, of in UNLESS.items() if not constants.get(constant, True) for name in of}
        unread |= {"partial", "counter"} if constants.get("SPLIT") == 1 else set()
        at = {name: (a, s) for name, a, s in zip(names, places, size) if name not in unread}
        writes = WRITES[run.kernel.__name__]
        reads = {name: place for name, place in at.items() if name not in writes}
        found.append({name: given.get(place[0], live.get(place)) for name, place in reads.items()})
        for name in (name for name in writes if name in at):
            start, nbytes = at[name]
            apart = lambda a, s: a is None or a + s <= start or start + nbytes <= a  # noqa: B023, E731
            live = {place: owner for place, owner in live.items() if apart(*place)}
            live[start, nbytes] = i, name
            found[-1] |= {read: None for read, place in reads.items() if not apart(*place)}
    return found


def check_launches(ledger, layer, x, ids, weights, promote):
    """The same launches; what each reads is what the same launch wrote, as large as there, or the same tensor of the caller's."""
    given = {t.data_ptr(): name for name, t in {"x": x, "ids": ids, "weights": weights, **layer.tensors}.items()}
    assert layer.launch(x, ids, weights, promote=promote) is None  # nothing is compiled yet
    assert not ledger.calls
    want_out = steps(layer, x, ids, weights, promote)
    described, want = ledger.given, ledger.take()
    given[importlib.import_module("mx_kernels.kernels.grouped_gemm").counters(x.device, 1).data_ptr()] = "zeros"
    sizes = [[getattr(t, "base", t).nbytes if t is not None else 0 for t in tensors] for tensors in described]
    first = next(i for i, (run, _) in enumerate(want) if run.kernel.__name__ == "_grouped_gemm_rebased_kernel")
    if layer.w13_bias is not None:  # the steps' copy lives in their call alone
        bias = described[first][want[first][0].kernel.arg_names.index("bias")]
        assert torch.equal(bias, layer.tensors["w13_bias"])
        assert torch.equal(reference.concatenated_rows(bias), layer.w13_bias)
        given[bias.data_ptr()] = "w13_bias"
    out = layer.launch(x, ids, weights, promote=promote)
    ours, got = ledger.given, ledger.take()
    assert (out.shape, out.dtype) == (want_out.shape, want_out.dtype) == (x.shape, x.dtype)
    assert [run for run, _ in got] == [run for run, _ in want]
    read = sources(want, sizes, given)
    assert all(source is not None for step in read for source in step.values())
    assert sources(got, sizes, given) == read
    assert got[-1][1][-1] == out.data_ptr()
    plan = [*importlib.import_module("mx_kernels.kernels.moe")._plans.values()][-1]
    work = min(
        a for run, places in got[:-1] for n, a in zip(run.kernel.arg_names, places) if n in WRITES[run.kernel.__name__]
    )
    for (run, places), size in zip(got[:-1], sizes):
        for name, a, n in zip(run.kernel.arg_names, places, size):
            if name in WRITES[run.kernel.__name__]:
                assert work <= a <= work + plan.size - n, name
    for theirs, mine in zip(described, ours, strict=True):
        for a, b in zip(theirs, mine, strict=True):
            assert hasattr(a, "base") == hasattr(b, "base")
            if hasattr(a, "base"):
                for name in ("shape", "strides", "block_shape", "padding"):
                    assert [*getattr(a, name)] == [*getattr(b, name)], name
                assert a.base.dtype == b.base.dtype
                assert address(b) % 16 == 0
    return [run.kernel.__name__ for run, _ in got]


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 5, 40, 130, 300, 3000])
@pytest.mark.parametrize("fmt", [mk.MXFP4, mk.MXFP8], ids=str)
@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_launches_of_the_steps(ledger, tokens, fmt, promote, mapped):
    layer = make_layer(fmt, bias=tokens != 40, mapped=mapped)
    names = check_launches(ledger, layer, *make_input(tokens), promote)
    assert len(names) == (6 if tokens * K <= 2048 else 8)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_launches_for_other_dtypes(ledger, dtype):
    layer = make_layer(act=mk.Activation("silu"))
    check_launches(ledger, layer, *make_input(40, dtype=dtype), False)
    check_launches(ledger, layer, *make_input(40), False)


@pytest.mark.compile
@pytest.mark.parametrize("promote", [False, True])
def test_the_launches_where_tokens_are_copied(ledger, monkeypatch, promote):
    monkeypatch.setattr(importlib.import_module("mx_kernels.kernels.rebased"), "COPIED", 1)
    for tokens, hidden in ((7, 256), (300, 256), (300, 4096)):  # the last's codes are more than what lies up to y
        layer = make_layer(hidden=hidden)
        names = check_launches(ledger, layer, *make_input(tokens, hidden=hidden), promote)
        assert names[1:5] == ["_rebase_rows_kernel", "_places_kernel", "_places_kernel", "_gather_rows_kernel"]
    layer, x = make_layer(), torch.randn(30, 320).bfloat16()[:, :256]
    _, ids, weights = make_input(30)
    check_launches(ledger, layer, x, ids, weights, promote)  # strided rows


@pytest.mark.compile
@pytest.mark.parametrize(("hidden", "width"), [(4096, 64), (256, 4096), (4096, 4096)])
def test_the_launches_of_split_products(ledger, hidden, width):
    layer, given = make_layer(experts=2, hidden=hidden, width=width), make_input(1, experts=2, k=2, hidden=hidden)
    check_launches(ledger, layer, *given, False)
    moe = importlib.import_module("mx_kernels.kernels.moe")
    assert next(iter(moe._plans.values())).counters > 0


@pytest.mark.compile
def test_promote_is_part_of_the_plan(ledger):
    layer, given = make_layer(), make_input(3000)
    for promote in (True, False):
        check_launches(ledger, layer, *given, promote)
    run = {}
    for promote in (True, False):
        layer.launch(*given, promote=promote)
        run[promote] = [run for run, _ in ledger.take()]
    assert run[True] != run[False]


@pytest.mark.compile
def test_the_workspace_is_what_the_steps_hold_at_once(ledger):
    align, moe = (importlib.import_module(f"mx_kernels.kernels.{name}") for name in ("align", "moe"))
    for tokens, fmt in itertools.product((1, 40, 3000), (mk.MXFP4, mk.MXFP8)):
        layer, given = make_layer(fmt), make_input(tokens)
        layer.launch(*given)
        plan, pairs = [*moe._plans.values()][-1], tokens * K
        assert plan.offsets == tuple(sorted(plan.offsets))
        assert all(offset % 256 == 0 for offset in (*plan.offsets, plan.size))
        sizes = align.plan(pairs, mk.rebased_block_size(pairs, layer.w13), E, None, given[0].device).sizes
        slots = sizes["sorted_ids"]
        held = 4 * sum(sizes.values()) + slots * (128 + 128 // 32 + 128 + 4) + max(slots * 256, pairs * 256 * 2)
        assert held <= plan.size <= held + 256 * len(plan.offsets)


@pytest.mark.compile
def test_one_plan_for_layers_of_one_shape():
    pytest.importorskip("triton")
    a, b = make_layer(), make_layer()
    assert a.key is b.key
    others = (
        make_layer(bias=False),
        make_layer(mk.MXFP8),
        make_layer(mapped=True),
        make_layer(act=mk.Activation("silu")),
    )
    assert len({a.key, *(layer.key for layer in others)}) == 5


def test_refuses_where_the_steps_must_run():
    layer, (x, ids, weights) = make_layer(), make_input(8)
    assert layer.launch(x, ids, weights) is None  # the CPU


def test_the_bias_is_copied_when_the_layer_is_made():
    layer = make_layer()
    want = reference.gate_up_rows(layer.w13_bias)
    layer.w13_bias.zero_()
    assert torch.equal(layer.tensors["w13_bias"], want)
    assert layer.tensors["w2_bias"] is layer.w2_bias


@pytest.mark.compile
def test_what_is_not_served(ledger):
    layer, (x, ids, weights) = make_layer(mapped=True), make_input(40)
    steps(layer, x, ids, weights, True)
    assert layer.launch(x, ids, weights) is not None
    apart = replace(layer, expert_map=torch.stack((layer.expert_map, layer.expert_map), 1)[:, 0])
    steps(apart, x, ids, weights, True)
    assert apart.launch(x, ids, weights) is None
    for given in (
        (x.int(), ids, weights),
        (x[:, :128], ids, weights),
        (x.t().contiguous().t(), ids, weights),
        (x, ids.long(), weights),
        (x, ids.t().contiguous().t(), weights),
        (x, ids, weights.double()),
        (x, ids, weights[:, :2]),
        (x[:2], ids, weights),
        (x[:0], ids[:0], weights[:0]),
    ):
        assert layer.launch(*given) is None
    wide = torch.randn(40, 320).bfloat16()
    steps(layer, wide[:, :256], ids, weights, True)
    assert layer.launch(wide[:, :256], ids, weights) is not None
    assert layer.launch(wide[:, 1:257], ids, weights) is None  # not aligned to 16 bytes


# --- bits, on a GPU ---


def hopper():
    if mk.Device.probe("cuda").arch.name != "sm90":
        pytest.skip("re-based products are made for sm90")


@pytest.mark.gpu
@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP6_E2M3, mk.MXFP4], ids=str)
def test_same_bits(fmt, mapped, promote):
    hopper()
    layer = make_layer(fmt, mapped=mapped, device="cuda")
    for tokens, bias in itertools.product((1, 7, 64, 130, 300, 1000, 5000), (True, False)):
        of = layer if bias else replace(layer, w13_bias=None, w2_bias=None)
        x, ids, weights = make_input(tokens, "cuda")
        want = steps(of, x, ids, weights, promote)
        for _ in range(3):
            got = of.launch(x, ids, weights, promote=promote)
            assert got is not None
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP4], ids=str)
def test_same_bits_where_tokens_are_copied_and_sums_are_split(monkeypatch, fmt):
    hopper()
    monkeypatch.setattr(importlib.import_module("mx_kernels.kernels.rebased"), "COPIED", 1)
    monkeypatch.setattr(importlib.import_module("mx_kernels.kernels.moe"), "_plans", {})
    # tiles of GEMM 2 for less than half of the device
    layer = make_layer(fmt, device="cuda", experts=4, hidden=2048, width=4096)
    for tokens, dtype in itertools.product((1, 3, 200), (torch.bfloat16, torch.float16)):
        given = make_input(tokens, "cuda", experts=4, k=2, hidden=2048, dtype=dtype)
        want = steps(layer, *given, True)
        for _ in range(3):
            got = layer.launch(*given)
            assert got is not None
            assert torch.equal(got, want)
    assert any(plan.counters for plan in importlib.import_module("mx_kernels.kernels.moe")._plans.values())


@pytest.mark.gpu
def test_strided_unaligned_and_empty():
    hopper()
    layer = make_layer(device="cuda")
    x, ids, weights = make_input(200, "cuda")
    steps(layer, x, ids, weights, True)
    wide = torch.randn(200, 256 + 64, device="cuda").bfloat16()
    part = wide[:, :256]
    steps(layer, part, ids, weights, True)
    assert torch.equal(layer.launch(part, ids, weights), steps(layer, part.contiguous(), ids, weights, True))
    assert layer.launch(wide[:, 1:257], ids, weights) is None  # not aligned to 16 bytes
    assert layer.launch(x, ids.long(), weights) is None
    assert layer.launch(x[:0], ids[:0], weights[:0]) is None
    assert layer.launch(x.requires_grad_(), ids, weights) is None


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mk.MXFP8, mk.MXFP4], ids=str)
@pytest.mark.parametrize("tokens", [1, 300])
def test_cuda_graph_and_streams(tokens, fmt):
    hopper()
    layer = make_layer(fmt, device="cuda")
    x, ids, weights = make_input(tokens, "cuda")
    steps(layer, x, ids, weights, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.launch(x, ids, weights, promote=False)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, steps(layer, x, ids, weights, False))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = layer.launch(x, ids, weights, promote=False)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, out)


@pytest.mark.gpu
def test_a_profiler_sees_every_launch():
    import triton

    hopper()
    layer = make_layer(device="cuda")
    given = make_input(100, "cuda")
    steps(layer, *given, True)
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert layer.launch(*given) is None
        steps(layer, *given, True)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 6
