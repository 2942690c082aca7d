"""Each Triton kernel a few times on small shapes, for a memory checker: ``nox -s sanitize`` runs it under compute-sanitizer.

``python tests/every_kernel.py [PART ...]`` runs all parts or those named; PARTS says which kernels each is for, and a kernel
that its part did not compile is an error. Not a test of values (those are in test_*.py), but it fails where a result is not
finite. Inputs come from the CPU, so that few kernels are not ours. Rows of dropped pairs are never written and go on as they
are into the next step: initcheck sees whoever reads one.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch

import mx_kernels as mk
from mx_kernels.packed_gemm import flat_product
from mx_kernels.tuning import Config

SWIGLU_OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 96, 160, 2
FORMATS = (None, mk.MXFP8, mk.MXFP6_E2M3, mk.MXFP4, mk.NVFP4)


def finite(t: torch.Tensor | mk.QuantizedTensor) -> None:
    value = mk.dequantize(t) if isinstance(t, mk.QuantizedTensor) else t
    assert bool(value.cpu().isfinite().all())


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).cuda()


def routed(tokens: int, experts: int = EXPERTS, k: int = TOP_K) -> torch.Tensor:
    """Ids with dropped pairs: the last token's last, and with more than 8 tokens all of the first token's."""
    ids = torch.rand(tokens, experts).topk(k).indices.int()
    ids[-1, -1] = -1
    if tokens > 8:
        ids[0] = experts
    return ids.cuda()


def weights_of(fmt: mk.Format | None) -> tuple[mk.QuantizedTensor | torch.Tensor, mk.QuantizedTensor | torch.Tensor]:
    w13, w2 = normal(EXPERTS, 2 * WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
    return (w13, w2) if fmt is None else (mk.quantize(w13, fmt), mk.quantize(w2, fmt))


def quantize() -> None:
    for fmt in mk.FORMATS.values():
        for dtype in (torch.bfloat16, torch.float32):
            x = normal(37, 96 + 32, dtype=dtype)[:, :96]  # strided rows
            finite(mk.quantize(x, fmt))
            finite(mk.quantize_dequantize(x, fmt))
        parts = mk.quantize(normal(5, 37, 96), fmt)
        finite(mk.dequantize(parts, rows=torch.tensor([4, -1, 0]).cuda())[::2])


def activate() -> None:
    h = normal(19, 192)
    for act in (mk.Activation("silu"), mk.Activation("silu", "interleaved"), SWIGLU_OAI):
        finite(mk.activate(h, act))
        for fmt in (mk.MXFP8, mk.MXFP4):
            finite(mk.activate(h, act, requantize_to=fmt))


def align() -> None:
    for tokens, experts, k in ((1, 8, 2), (500, 128, 8), (5000, 300, 8)):
        ids = torch.randint(-1, experts + 1, (tokens, k)).int().cuda()
        table = (torch.randperm(experts).int() - experts // 2).clamp(min=-1).cuda()
        for expert_map in (None, table):
            tiles = mk.moe_align_block_size(ids, 16, experts, expert_map, sort=True)
            assert int(tiles.num_padded) <= tiles.sorted_ids.numel()
            assert int(tiles.sorted_ids.cpu().max()) <= ids.numel()
            assert int(tiles.expert_ids.cpu().max()) < experts


def steps(
    x: torch.Tensor | mk.QuantizedTensor,
    ids: torch.Tensor,
    w13: mk.PackedWeight | mk.QuantizedTensor | torch.Tensor,
    w2: mk.PackedWeight | mk.QuantizedTensor | torch.Tensor,
    requantize_to: mk.Format | None = None,
) -> None:
    """A layer: what it writes of GEMM 1 is all that GEMM 2 and combine may read."""
    tiles = mk.moe_align_block_size(ids, mk.block_size(ids.numel(), EXPERTS, ids.device, w13), EXPERTS)
    route = torch.rand(ids.numel()).cuda()
    epilogue = mk.Epilogue(normal(EXPERTS, 2 * WIDTH), SWIGLU_OAI, requantize_to=requantize_to)
    h = mk.grouped_gemm(x, w13, tiles, top_k=TOP_K, epilogue=epilogue)
    y = mk.grouped_gemm(h, w2, tiles, epilogue=mk.Epilogue(row_weight=route), out_dtype=torch.bfloat16)
    finite(mk.combine(y, tiles))


def gemm() -> None:
    for tokens in (7, 70):
        x, ids = normal(tokens, HIDDEN), routed(tokens)
        for fmt in FORMATS:
            steps(x, ids, *weights_of(fmt))
        steps(mk.quantize(x, mk.MXFP8), ids, *weights_of(mk.MXFP4), requantize_to=mk.MXFP8)
        finite(mk.gemm(x, weights_of(mk.MXFP4)[0][0]))


def packed() -> None:
    for tokens in (1, 7, 70, 300):  # each pair on its own with split sums, self-routed, sorted
        x, ids = normal(tokens, HIDDEN), routed(tokens)
        for fmt in FORMATS:
            w13, w2 = weights_of(fmt)
            w13, w2 = mk.pack(w13, gated=True), mk.pack(w2)
            steps(x, ids, w13, w2)
            if fmt is mk.MXFP4:
                at_once(mk.PackedLayer(w13, w2, SWIGLU_OAI), x, ids)
                with blocks_waited_for():
                    at_once(mk.PackedLayer(w13, w2, SWIGLU_OAI), x, ids)
    finite(mk.gemm(normal(33, HIDDEN), mk.pack(mk.quantize(normal(40, HIDDEN), mk.NVFP4))))
    finite(
        mk.gemm(
            normal(33, HIDDEN),
            mk.pack(mk.quantize(normal(64, HIDDEN), mk.MXFP8)),
            epilogue=mk.Epilogue(round_to=mk.MXFP4),
        )
    )


def specialized() -> None:
    if mk.Device.probe("cuda").arch.name != "sm90":
        print("  left out: it is made of sm90's warpgroup products")
        return
    kernel = importlib.import_module("mx_kernels.kernels.grouped_gemm")
    config = Config(256, 128, 64, 4, 4, group=2, specialized=True)
    small = Config(160, 192, 64, 4, 6, specialized=True)
    three = Config(256, 192, 64, 4, 3, group=2, specialized=True)
    ids = routed(900)
    tiles, blocks = (mk.moe_align_block_size(ids, block, EXPERTS, sort=True) for block in (256, 160))
    live = ((ids >= 0) & (ids < EXPERTS)).flatten()
    epilogue = mk.Epilogue(activation=SWIGLU_OAI)
    for fmt, k in ((mk.MXFP8, 160), (mk.MXFP4, 192), (mk.NVFP4, 192), (None, 192)):
        w, x = normal(EXPERTS, 272, k), normal(900, k)
        p = mk.pack(w if fmt is None else mk.quantize(w, fmt), gated=True)
        if fmt is not None:
            with filled_memory():
                rows = mk.gather_rows(x, blocks, top_k=TOP_K)
                args = flat_product(rows, p, blocks, 0, epilogue, None, torch.bfloat16)
                finite(kernel.grouped_gemm_packed(*args, small)[live])
            for routed_to, chosen in ((tiles, config), (blocks, small)):
                args = flat_product(x, p, routed_to, TOP_K, epilogue, None, torch.bfloat16)
                finite(kernel.grouped_gemm_packed(*args, chosen)[live])
        for chosen in (config,) if fmt is not None else (config, three):
            with filled_memory():
                rows = mk.gather_rows(x, tiles, top_k=TOP_K)
                args = flat_product(rows, p, tiles, 0, epilogue, None, torch.bfloat16)
                finite(kernel.grouped_gemm_packed(*args, chosen)[live])
    w13, w2 = (mk.quantize(normal(EXPERTS, *shape) / 32, mk.MXFP4) for shape in ((1536, 2048), (2048, 768)))
    layer = mk.PackedLayer(mk.pack(w13, gated=True), mk.pack(w2), SWIGLU_OAI)
    with blocks_waited_for():
        at_once(layer, normal(300, 2048), routed(300), slots=True)


@contextlib.contextmanager
def blocks_waited_for() -> Iterator[None]:
    """GEMM 2 of a layer begins with blocks that GEMM 1 has done, where kernels start early, however few bytes its weights have."""
    plans = importlib.import_module("mx_kernels.kernels.moe")._plans
    early = importlib.import_module("mx_kernels.kernels.launch").target(torch.device("cuda", 0)).pdl
    plans.clear()
    with mock.patch("mx_kernels.kernels.grouped_gemm.overlaps", return_value=True) as asked:
        yield
    plans.clear()
    assert asked.called == early, "whether GEMM 2 should begin so was asked where it cannot, or not asked where it can"


def at_once(layer: mk.PackedLayer, x: torch.Tensor, ids: torch.Tensor, slots: bool = False) -> None:
    """``layer.launch``, after its steps have compiled what it launches. slots: the layer has h in slot order."""
    route = torch.rand(ids.shape).cuda()
    rows = mk.block_size(ids.numel(), EXPERTS, x.device, layer.w13, slots=slots)
    tiles = mk.moe_align_block_size(ids, rows, EXPERTS)
    first, last = mk.Epilogue(activation=layer.activation), mk.Epilogue(row_weight=route)
    h = mk.grouped_gemm(x, layer.w13, tiles, top_k=TOP_K, epilogue=first, to_slots=slots)
    finite(mk.combine(mk.grouped_gemm(h, layer.w2, tiles, epilogue=last, from_slots=slots), tiles))
    out = layer.launch(x, ids, route)
    assert out is not None, "the steps have compiled every kernel of the layer"
    finite(out)


def pack() -> None:
    for fmt in mk.FORMATS.values():
        for shape, gated in (((3, 34, 96), True), ((1, 200, 352), False)):
            w = mk.quantize(normal(*shape), fmt)
            finite(mk.pack(w, gated=gated).unpack())


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """New tensors are filled with NaN or the largest integer: the product of whole tiles reads the rows of their padding."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rebased() -> None:
    if mk.Device.probe("cuda").arch.name != "sm90":
        print("  left out: re-based products are made for sm90")
        return
    kernels = importlib.import_module("mx_kernels.kernels.rebased")
    for tokens, block, kernels.COPIED in ((7, 16, 1 << 24), (300, 64, 1)):
        x, ids = normal(tokens, HIDDEN), routed(tokens)
        for fmt in (mk.MXFP8, mk.MXFP4):
            w13, w2 = weights_of(fmt)
            tiles = mk.moe_align_block_size(ids, block, EXPERTS, sort=True)
            with filled_memory():
                rows = mk.rebase_rows(x, tiles, top_k=TOP_K)
                epilogue = mk.Epilogue(activation=SWIGLU_OAI, requantize_to=mk.MXFP8)
                h = mk.grouped_gemm_rebased(rows, mk.rebase(w13, gated=True), tiles, epilogue=epilogue)
                y = mk.grouped_gemm_rebased(mk.rebase_rows(h, tiles), mk.rebase(w2), tiles, scatter=True)
                rebased_at_once(mk.RebasedLayer(mk.rebase(w13, gated=True), mk.rebase(w2), SWIGLU_OAI), x, ids)
            finite(mk.combine(y, tiles))


def rebased_at_once(layer: mk.RebasedLayer, x: torch.Tensor, ids: torch.Tensor) -> None:
    """``layer.launch``, after its steps have compiled what it launches."""
    route = torch.rand(ids.shape).cuda()
    tiles = mk.moe_align_block_size(ids, mk.rebased_block_size(ids.numel(), layer.w13), EXPERTS, sort=True)
    rows = mk.rebase_rows(x, tiles, top_k=TOP_K)
    epilogue = mk.Epilogue(activation=layer.activation, requantize_to=mk.MXFP8)
    h = mk.grouped_gemm_rebased(rows, layer.w13, tiles, epilogue=epilogue)
    epilogue = mk.Epilogue(row_weight=route.flatten())
    y = mk.grouped_gemm_rebased(mk.rebase_rows(h, tiles), layer.w2, tiles, epilogue=epilogue, scatter=True)
    finite(mk.combine(y, tiles))
    out = layer.launch(x, ids, route)
    assert out is not None, "the steps have compiled every kernel of the layer"
    finite(out)


PARTS = {
    quantize: {
        "quantize": ("_quantize_kernel", "_dequantize_kernel"),
        "global_scale": ("_amax_kernel", "_global_scale_kernel"),
    },
    activate: {"activation": ("_activate_kernel",)},
    align: {"align": ("_align_kernel", "_count_kernel", "_scan_kernel", "_place_kernel")},
    gemm: {"generic_kernel": ("_gemm_kernel",), "combine": ("_combine_kernel",)},
    packed: {"packed_kernel": ("_grouped_gemm_packed_kernel",)},
    specialized: {
        "specialized": ("_grouped_gemm_specialized_kernel",),
        "slots": ("_places_kernel", "_gather_rows_kernel"),
    },
    pack: {"packing": ("_pack_codes_kernel", "_pack_scales_kernel", "_unpack_codes_kernel")},
    rebased: {"rebased": ("_rebase_rows_kernel", "_grouped_gemm_rebased_kernel")},
}
"""Part -> module of mx_kernels.kernels -> the kernels that the part is for."""


def check_compiled(part: str, kernels: dict[str, tuple[str, ...]]) -> None:
    for module, names in kernels.items():
        for name in names:
            kernel = getattr(importlib.import_module(f"mx_kernels.kernels.{module}"), name)
            compiled = sum(len(cache[0]) for cache in kernel.device_caches.values())
            assert compiled, f"{part} did not launch {module}.{name}"


def main(chosen: list[str]) -> None:
    parts = {part.__name__: (part, kernels) for part, kernels in PARTS.items()}
    unknown = set(chosen) - set(parts)
    if unknown:
        sys.exit(f"unknown parts {sorted(unknown)}; there are {', '.join(parts)}")
    torch.manual_seed(0)
    for name in chosen or parts:
        start = time.monotonic()
        part, kernels = parts[name]
        part()
        torch.cuda.synchronize()
        if part not in (rebased, specialized) or mk.Device.probe("cuda").arch.name == "sm90":
            check_compiled(name, kernels)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
