"""Each Triton kernel once or a few times on small shapes, for a memory checker: ``nox -s sanitize`` runs it under compute-sanitizer.

Not a test of values (those are in test_*.py), but it fails where a result is not finite.
"""

from __future__ import annotations

import torch

import mx_kernels as mk

SWIGLU_OAI = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)


def finite(t: torch.Tensor | mk.QuantizedTensor) -> None:
    value = mk.dequantize(t) if isinstance(t, mk.QuantizedTensor) else t
    assert bool(value.isfinite().all())


def elementwise() -> None:
    for fmt in mk.FORMATS.values():
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(37, 96, device="cuda", dtype=dtype)
            finite(mk.quantize(x, fmt))
            finite(mk.quantize_dequantize(x, fmt))
        parts = mk.quantize(torch.randn(5, 37, 96, device="cuda"), fmt)
        finite(mk.dequantize(parts, rows=torch.tensor([4, -1, 0], device="cuda"))[::2])
    h = torch.randn(19, 192, device="cuda", dtype=torch.bfloat16)
    for layout in ("concatenated", "interleaved"):
        act = mk.Activation("silu", layout)
        finite(mk.activate(h, act))
        finite(mk.activate(h, act, requantize_to=mk.MXFP8))


def steps(layer: mk.PackedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """What ``layer.launch`` launches, one by one."""
    block = mk.block_size(ids.numel(), layer.w13.shape[0], x.device, layer.w13)
    tiles = mk.moe_align_block_size(ids, block, layer.w13.shape[0])
    epilogue = mk.Epilogue(activation=layer.activation)
    h = mk.grouped_gemm(x, layer.w13, tiles, top_k=ids.shape[1], epilogue=epilogue)
    finite(mk.combine(mk.grouped_gemm(h, layer.w2, tiles, epilogue=mk.Epilogue(row_weight=weights)), tiles))


def layers() -> None:
    experts, hidden, width, top_k = 5, 96, 160, 2
    for tokens in (1, 7, 70, 300):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.int()
        ids[-1, -1] = -1
        weights = torch.rand(tokens, top_k, device="cuda")
        for fmt in (None, mk.MXFP8, mk.MXFP6_E2M3, mk.MXFP4, mk.NVFP4):
            w13 = torch.randn(experts, 2 * width, hidden, device="cuda", dtype=torch.bfloat16)
            w2 = torch.randn(experts, hidden, width, device="cuda", dtype=torch.bfloat16)
            if fmt is not None:
                w13, w2 = mk.quantize(w13, fmt), mk.quantize(w2, fmt)
            block = mk.block_size(ids.numel(), experts, x.device)
            for packed in (False, True):
                tiles = mk.moe_align_block_size(ids, block, experts)
                a, b = (mk.pack(w13, gated=True), mk.pack(w2)) if packed else (w13, w2)
                h = mk.grouped_gemm(x, a, tiles, top_k=top_k, epilogue=mk.Epilogue(activation=SWIGLU_OAI))
                h = torch.where((ids.flatten() >= 0)[:, None], h, 0)  # rows of dropped pairs are undefined
                y = mk.grouped_gemm(h, b, tiles, epilogue=mk.Epilogue(row_weight=weights.flatten()))
                finite(mk.combine(y, tiles))
            layer = mk.PackedLayer(mk.pack(w13, gated=True), mk.pack(w2), SWIGLU_OAI)
            steps(layer, x, ids, weights)
            out = layer.launch(x, ids, weights)
            assert out is not None, "the steps have compiled every kernel of the layer"
            finite(out)
            if fmt in mk.REBASED_FORMATS:
                tiles = mk.moe_align_block_size(ids, 64 if tokens > 100 else 16, experts, sort=True)
                rows = mk.rebase_rows(x, tiles, top_k=top_k, gather=True)
                epilogue = mk.Epilogue(activation=SWIGLU_OAI)
                h = mk.grouped_gemm_rebased(rows, mk.rebase(w13, gated=True), tiles, epilogue=epilogue)
                y = mk.grouped_gemm_rebased(mk.rebase_rows(h, tiles), mk.rebase(w2), tiles, scatter=True)
                finite(mk.combine(y, tiles))


def alignment() -> None:
    for tokens, experts, k in ((1, 8, 2), (500, 128, 8), (5000, 300, 8)):
        ids = torch.randint(-1, experts + 1, (tokens, k), device="cuda", dtype=torch.int32)
        table = torch.randperm(experts, device="cuda").int() - experts // 2
        for expert_map in (None, table.clamp(min=-1)):
            tiles = mk.moe_align_block_size(ids, 16, experts, expert_map, sort=True)
            assert int(tiles.num_padded) <= tiles.sorted_ids.numel()


if __name__ == "__main__":
    torch.manual_seed(0)
    elementwise()
    alignment()
    layers()
    torch.cuda.synchronize()
    print("every kernel ran")
