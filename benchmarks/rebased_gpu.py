"""Re-based products by tile, and re-basing of rows: GEMM 1 with its result quantized and GEMM 2 by pair, each alone.

    python benchmarks/rebased_gpu.py [--formats mxfp4 mxfp8] [--shapes ...] [--tokens ...] [--fast] [--out FOLDER]

Every tile's float32 result is compared with float32 products of some pairs before the time of the shipped kind of result is printed;
CUDA graphs over layers with their own weights and routing, medians. ``--fast``: sums stay in the matrix unit. ``kernels/rebased.py``
ships the fastest of each block size. Rows: x to codes once a slot or once a token and copied, h from codes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import SHAPES, TOKENS, Shape, describe, find_shape, routing, time_graph
from packing_gpu import random_weight, require
from torch import Tensor

import mx_kernels as mk
from mx_kernels import reference
from mx_kernels.kernels import rebased
from mx_kernels.rebase import _codes

LAYERS = 2
ROWS, WARPS, STAGES = (64, 128, 256), (4, 8), (3, 4, 6)


def blocks_for(shape: Shape, tokens: int) -> list[int]:
    """Block sizes worth measuring: what an expert gets on average, and the next."""
    mean = tokens * shape.top_k / shape.experts
    return (
        [16] if mean < 8 else [16, 32] if mean < 20 else [32, 64] if mean < 64 else [64, 128] if mean < 512 else [128]
    )


def codes_of(w: mk.RebasedWeight, e: int) -> Tensor:
    """float32 [N, K] of one expert, in the order of its rows."""
    n, k = w.shape[1:]
    tiles = -(-k // 64)
    one = (w.data[e], None) if w.octaves is None else (w.data[e * tiles : (e + 1) * tiles], w.octaves[e : e + 1])
    return _codes(*one, n, k).reshape(n, k).view(torch.float8_e4m3fn).float() * w.scale[e][:, None]


class Product:
    """One GEMM of one layer: weight, routed rows, and the call for a tile."""

    def __init__(self, shape: Shape, w: mk.RebasedWeight, tokens: int, block: int, seed: int, promote: bool) -> None:
        ids, _ = routing(shape, tokens, seed)
        self.activation = replace(shape.activation, layout="concatenated") if w.gated else None
        self.w, self.promote, self.block = w, promote, block
        self.tiles = mk.moe_align_block_size(ids, block, shape.experts, sort=True)
        self.rows = mk.rebase_rows(torch.randn(ids.numel(), w.shape[2], device="cuda").bfloat16(), self.tiles, top_k=1)

    def __call__(self, tile: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
        """float32 for a check where ``dtype`` says so, else what a layer's product gives."""
        t, (codes, scale), act = self.tiles, self.rows, self.activation
        epilogue = (
            {"activation": act.kind, "alpha": act.alpha or 0.0, "beta": act.beta or 0.0, "limit": act.limit or math.inf}
            if act
            else {}
        )
        return rebased.grouped_gemm_rebased(
            *(codes.view(torch.uint8), scale, self.w.data.view(torch.uint8), self.w.octaves, self.w.scale),
            *(t.sorted_ids, t.expert_ids, t.num_padded, self.block, t.num_pairs),
            scatter=dtype is not None or act is None, quantize=dtype is None and act is not None, promote=self.promote,
            out_dtype=dtype or torch.bfloat16, config=tile, **epilogue,
        )[0]  # fmt: skip

    def check(self, y: Tensor) -> None:
        """The pairs of the first block against float32 products; the limits are those of the tests."""
        assert self.tiles.sorted_ids is not None
        pairs = self.tiles.sorted_ids[: self.block].long()
        live = pairs < self.tiles.num_pairs
        x = self.rows[0][: self.block].float() * self.rows[1][: self.block, None]
        weight = codes_of(self.w, int(self.tiles.expert_ids[0]))
        if self.activation is None:
            want = (x @ weight.T)[live]
        else:
            want = reference.activated((x @ reference.concatenated_rows(weight[None])[0].T)[live], self.activation)
        error = float((y[pairs[live]] - want).norm() / want.norm())
        require(error < (2**-11 if self.promote else 2**-9) * (2 if self.activation else 1), f"error {error:.1e}")


def tiles_of(block: int, promote: bool, fp4: bool, quantize: bool) -> list[dict[str, Any]]:
    """The shipped tile, then others."""
    swaps = (True,) if fp4 else (True, False)
    others = (
        {"BN": n, "num_warps": w, "num_stages": s, "SWAP": p} for n, w, s, p in product(ROWS, WARPS, STAGES, swaps)
    )
    shipped = rebased.tile_config(block, promote, fp4, quantize)
    return [shipped, *(tile for tile in others if tile != shipped)]


def measure(shape: Shape, fmt: str, tokens: list[int], promote: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    torch.backends.cuda.matmul.allow_tf32 = False
    for gemm, n, k in ((1, 2 * shape.intermediate, shape.hidden), (2, shape.hidden, shape.intermediate)):
        f = mk.get_format(fmt)
        weights = [mk.rebase(random_weight((shape.experts, n, k), f), gated=gemm == 1) for _ in range(LAYERS)]
        for count in tokens:
            for block in blocks_for(shape, count):
                layers = [Product(shape, w, count, block, i, promote) for i, w in enumerate(weights)]
                for tile in tiles_of(block, promote, fmt == "mxfp4", gemm == 1):
                    row = {"shape": shape.name, "format": fmt, "gemm": gemm, "tokens": count, "block": block, **tile}
                    try:
                        layers[0].check(layers[0](tile, torch.float32))
                        row["us"] = time_graph([lambda p=p, tile=tile: p(tile) for p in layers], 0.03)
                    except Exception as e:  # too much shared memory, or more than the compiler can do: said in the row
                        row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:80]
                    rows.append(row)
                    print(row, flush=True)
    return rows


def rows_of(shape: Shape, tokens: int) -> list[dict[str, Any]]:
    """Microseconds of ``rebase_rows`` for blocks of 128 pairs."""
    ids, _ = routing(shape, tokens, 0)
    tiles = mk.moe_align_block_size(ids, 128, shape.experts, sort=True)
    assert tiles.sorted_ids is not None
    x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
    h = mk.quantize(torch.randn(tiles.sorted_ids.numel(), shape.intermediate, device="cuda").bfloat16(), mk.MXFP8)
    found = []
    for what, least in (("x, a slot", 1 << 62), ("x, a token, copied", 1), ("h, from codes", rebased.COPIED)):
        with mock.patch.object(rebased, "COPIED", least):
            call = (
                partial(mk.rebase_rows, h, tiles)
                if what[0] == "h"
                else partial(mk.rebase_rows, x, tiles, top_k=shape.top_k)
            )
            found.append({"shape": shape.name, "tokens": tokens, "rows": what, "us": time_graph([call] * LAYERS, 0.03)})
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:3])
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "mxfp8"], choices=["mxfp4", "mxfp8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    a = parser.parse_args()
    rows = [r for s, f in product(a.shapes, a.formats) for r in measure(find_shape(s), f, a.tokens, not a.fast)]
    rows += [r for s, t in product(a.shapes, a.tokens) for r in rows_of(find_shape(s), t)]
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "rebased_gpu.json").write_text(json.dumps({"where": describe(), "rows": rows}))


if __name__ == "__main__":
    main()
