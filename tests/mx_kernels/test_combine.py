"""combine: the sum over a token's experts, dropped pairs never read."""

from __future__ import annotations

import pytest
import torch

import mx_kernels as mk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(tokens=7, k=3, experts=5, h=20, dtype=torch.float32, drops=True):
    ids = torch.randint(-1 if drops else 0, experts + 1 if drops else experts, (tokens, k), dtype=torch.int32)
    y = torch.randn(tokens * k, h).to(dtype)
    kept = (ids >= 0) & (ids < experts)
    return mk.moe_align_block_size(ids, 16, experts), y, kept


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype, out, weighted):
    """Float32 in slot order against float64: k - 1 additions and k products, each off by at most 2^-24, then one rounding."""
    tiles, y, kept = case(dtype=dtype)
    weights = torch.rand(tiles.ids.shape) if weighted else None
    y[~kept.flatten()] = torch.nan
    got = mk.combine(y, tiles, weights=weights, out_dtype=out)
    terms = torch.where(kept[..., None], y.double().view(*kept.shape, -1), 0.0)
    terms = terms * (1.0 if weights is None else weights.double()[..., None])
    exact, size = terms.sum(1), terms.abs().sum(1)
    assert got.dtype == (out or dtype)
    half_ulp = torch.finfo(got.dtype).eps / 2
    assert ((got.double() - exact).abs() <= 6 * 2.0**-24 * size + half_ulp * exact.abs() + 2.0**-25).all()
    in_order = torch.zeros(terms.shape[0], terms.shape[2])
    for slot in range(kept.shape[1]):
        term = y.float().view(*kept.shape, -1)[:, slot]
        term = term if weights is None else term * weights[:, slot, None]
        in_order = in_order + torch.where(kept[:, slot, None], term, 0.0)
    assert torch.equal(got, in_order.to(got.dtype))


def test_expert_map_and_nothing_left():
    ids = torch.tensor([[0, 1], [1, 1], [2, 0]], dtype=torch.int32)
    tiles = mk.moe_align_block_size(ids, 16, 2, torch.tensor([1, -1, 0], dtype=torch.int32))
    y = torch.arange(6.0).view(6, 1)
    y[1] = y[2] = y[3] = torch.inf
    assert mk.combine(y, tiles).flatten().tolist() == [0.0, 0.0, 9.0]


def test_sizes():
    for tokens, k in ((0, 2), (1, 1), (4, 0)):
        tiles, y, _ = case(tokens, k)
        assert mk.combine(y, tiles).shape == (tokens, 20)
    tiles, y, _ = case(h=0)
    assert mk.combine(y, tiles).shape == (7, 0)


def test_arguments_are_kept():
    tiles, y, _ = case(drops=False)
    weights = torch.rand(7, 3)
    copies = y.clone(), weights.clone()
    first = mk.combine(y, tiles, weights=weights)
    assert torch.equal(y, copies[0])
    assert torch.equal(weights, copies[1])
    assert torch.equal(first, mk.combine(y, tiles, weights=weights))
    wide = torch.randn(21, 40)[:, :20]
    assert torch.equal(mk.combine(wide, tiles), mk.combine(wide.contiguous(), tiles))


def test_refused():
    tiles, y, _ = case()
    cases = [
        ((y.double(), {}), TypeError, "y is torch.float64"),
        ((y[1:], {}), ValueError, r"y has shape \(20, 20\), needs \[21, H\]"),
        ((y.view(7, 3, 20), {}), ValueError, "y has shape"),
        ((y.T.contiguous().T, {}), ValueError, "stride"),
        ((y.to("meta"), {}), ValueError, "y is on meta"),
        ((y, {"weights": torch.rand(7, 3).half()}), TypeError, "weights is torch.float16"),
        ((y, {"weights": torch.rand(21)}), ValueError, "weights has shape"),
        ((y, {"weights": torch.rand(7, 3, device="meta")}), ValueError, "weights is on meta"),
        ((y, {"out_dtype": torch.float64}), TypeError, "out_dtype"),
    ]
    for (value, kwargs), error, message in cases:
        with pytest.raises(error, match=message):
            mk.combine(value, tiles, **kwargs)


def test_op_meta_compile():
    tiles, y, _ = case()
    weights = torch.rand(7, 3)
    table = torch.tensor([0, -1, 1, 2, 3], dtype=torch.int32)
    for expert_map, w in ((None, None), (table, weights)):
        args = (y, tiles.ids, 5, expert_map, w, torch.bfloat16)
        torch.library.opcheck(torch.ops.mx_kernels.combine.default, args)
    compiled = torch.compile(lambda a, b: mk.combine(a, tiles, weights=b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, weights), mk.combine(y, tiles, weights=weights))
    assert torch.equal(mk.reference.combine(y, tiles, weights=weights), mk.combine(y, tiles, weights=weights))
    away = mk.moe_align_block_size(tiles.ids.to("meta"), 16, 5)
    assert mk.combine(y.to("meta"), away).device.type == "meta"
