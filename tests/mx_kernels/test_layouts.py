"""Scale layouts: golden vectors, the index formulas one by one, inverses, leading dimensions, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mx_kernels as mk

PAIRS = {
    "128x4": (mk.swizzle_128x4, mk.unswizzle_128x4),
    "8x4": (mk.swizzle_8x4, mk.unswizzle_8x4),
    "cdna4": (mk.swizzle_cdna4, mk.unswizzle_cdna4),
    "hopper4": (lambda s: mk.swizzle_hopper(s, 4), lambda d, r, c: mk.unswizzle_hopper(d, r, c, 4)),
    "hopper8": (lambda s: mk.swizzle_hopper(s, 8), lambda d, r, c: mk.unswizzle_hopper(d, r, c, 8)),
}
layouts = pytest.mark.parametrize("name", PAIRS)


def offset(name, r, c, rows, columns):
    """Where scale (r, c) of [rows, columns] is stored, by the formulas of the formats' descriptions."""
    if name == "128x4":
        return ((r // 128) * -(-columns // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    if name == "8x4":
        return ((r // 8) * -(-columns // 4) + c // 4) * 32 + (r % 8) * 4 + c % 4
    if name == "cdna4":
        return r // 32 * columns * 32 + ((((c // 8) * 4 + c % 4) * 16 + r % 16) * 2 + (c // 4) % 2) * 2 + (r // 16) % 2
    w = int(name[-1])
    row = (r // (32 * w)) * w + (r // 16) % w
    column = ((((c // 2) * 2 + (r // (16 * w)) % 2) * 8 + r % 8) * 2 + c % 2) * 2 + (r // 8) % 2
    return row * (columns + columns % 2) * 32 + column


def random_scales(*shape):
    return torch.randint(0, 256, shape).to(torch.uint8)


def test_golden(golden):
    v = {k: torch.from_numpy(a) for k, a in np.load(golden / "layouts_packing.npz").items()}
    for size in ("128x9", "200x6", "64x2"):
        stored = mk.swizzle_128x4(v[f"rowmajor_{size}"])
        assert torch.equal(stored, v[f"blocked128x4_{size}"])
        # triton_kernels pads columns further: what comes before that is the same.
        assert torch.equal(stored, v[f"tk_blackwell_{size}"][: stored.numel()])
    assert torch.equal(mk.swizzle_cdna4(v["tk_cdna4_in_64x16"]), v["tk_cdna4_64x16"])
    for w in (4, 8):
        assert torch.equal(mk.swizzle_hopper(v["tk_hopper_in_300x6"], w), v[f"tk_hopper_nw{w}_300x6"])


@layouts
def test_every_scale_is_where_the_formula_says(name):
    rows, columns = (96, 16) if name == "cdna4" else (300, 7)
    scale = torch.arange(rows * columns).remainder(251).to(torch.uint8).view(rows, columns) + 1  # no zeros
    stored = PAIRS[name][0](scale).view(-1)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    where = torch.tensor(
        [offset(name, i, j, rows, columns) for i, j in zip(r.flatten().tolist(), c.flatten().tolist())]
    )
    assert torch.equal(stored[where], scale.view(-1))
    assert stored.count_nonzero() == rows * columns  # padding is zero


@layouts
def test_inverse_and_leading_dimensions(name):
    forward, back = PAIRS[name]
    scale = random_scales(2, 3, 64, 16) if name == "cdna4" else random_scales(2, 3, 70, 9)
    stored = forward(scale)
    assert torch.equal(back(stored, *scale.shape[-2:]), scale)
    assert torch.equal(stored[1, 2], forward(scale[1, 2]))
    as_fp8 = scale.view(torch.float8_e4m3fn)
    assert forward(as_fp8).dtype == torch.float8_e4m3fn
    assert torch.equal(forward(as_fp8).view(torch.uint8), stored)
    strided = scale.mT.contiguous().mT
    assert torch.equal(forward(strided), stored)


@layouts
def test_nothing_and_meta(name):
    forward, back = PAIRS[name]
    empty = random_scales(0, 32, 8)
    assert torch.equal(back(forward(empty), 32, 8), empty)
    meta = forward(torch.empty(2, 64, 8, dtype=torch.uint8, device="meta"))
    assert meta.shape == forward(random_scales(2, 64, 8)).shape


@given(st.integers(1, 300), st.integers(1, 20), st.sampled_from(["128x4", "8x4", "hopper4", "hopper8"]))
@settings(max_examples=40, deadline=None)
def test_round_trip_of_any_size(rows, columns, name):
    scale = random_scales(rows, columns)
    forward, back = PAIRS[name]
    assert torch.equal(back(forward(scale), rows, columns), scale)


def test_torchao():
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = random_scales(260, 10)
    assert torch.equal(utils.to_blocked(scale).view(-1), mk.swizzle_128x4(scale))


def test_errors():
    with pytest.raises(ValueError, match="one-byte"):
        mk.swizzle_128x4(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\[\.\.\., rows, columns\]"):
        mk.swizzle_128x4(random_scales(4))
    with pytest.raises(ValueError, match=r"CDNA4 layout needs multiples of \(32, 8\)"):
        mk.swizzle_cdna4(random_scales(33, 8))
    with pytest.raises(ValueError, match="num_warps is 2, needs 4 or 8"):
        mk.swizzle_hopper(random_scales(32, 2), 2)
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 512\]"):
        mk.unswizzle_128x4(random_scales(511), 100, 4)
    with pytest.raises(ValueError, match="not negative"):
        mk.unswizzle_8x4(random_scales(32), -1, 4)
