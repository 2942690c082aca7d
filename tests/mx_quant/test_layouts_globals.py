"""NVFP4 global scales of parts that become one matrix: folded exactly, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mx_kernels as mk
from mx_quant import layouts
from mx_quant.layouts import LAYOUTS, PER_EXPERT, fold_globals, regroup


def part(scales, g, seed=0):
    """[2, 16 * len(scales)] with these block scales in each row and global scale ``g``."""
    s = torch.tensor([scales, scales]).to(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (2, 8 * len(scales)), dtype=torch.uint8, generator=generator)
    return mk.QuantizedTensor(data, s, mk.NVFP4, mk.ScaleRule.AMAX, global_scale=torch.tensor(g))


def exact(q):
    """The values in float64, where every product here is exact."""
    x = mk.dequantize(replace(q, global_scale=torch.ones(())), torch.float32).double()
    return x * q.global_scale.double()


@pytest.mark.parametrize(
    ("globals_", "scales"),
    [
        ((0.25, 0.25), ([1.0, 448.0], [0.0, 2**-9])),  # equal: nothing to do
        ((0.25, 0.125), ([1.0, 448.0], [2.0, 448.0])),  # 448 / 2 = 224 is E4M3
        ((0.125, 1.0), ([8.0, 1.0], [0.5, 0.75])),
        ((3e-5, 3e-5 * 4), ([1.0, 2.0], [3.5, 0.0])),
        ((1.5, 1.0), ([1.0, 2.0], [3.0, 6.0])),  # 2/3 of 3 and 6 are 2 and 4: exact by luck
        ((1.0, 0.25, 0.5), ([1.0, 1.0], [8.0, 0.0], [2.0, 4.0])),  # q, k, v
    ],
)
def test_folds_exactly(globals_, scales):
    parts = [part(s, g, i) for i, (s, g) in enumerate(zip(scales, globals_, strict=True))]
    folded = fold_globals(parts, "w")
    assert len({float(p.global_scale) for p in folded}) == 1
    for before, after in zip(parts, folded, strict=True):
        assert torch.equal(exact(before), exact(after))
        assert torch.equal(before.data, after.data)


@pytest.mark.parametrize(
    ("globals_", "scales"),
    [
        ((1.0, 1.1), ([1.0, 2.0], [1.0, 2.0])),  # no E4M3 ratio
        ((1.0, 2.0**-12), ([1.0, 448.0], [1.0, 448.0])),  # a power of two, but out of E4M3's range either way
        ((1.0, 0.75), ([1.0, 1.125], [1.0, 1.875])),  # 0.75 * 1.875 has too many bits, and so has 1.125 / 0.75
    ],
)
def test_refuses(globals_, scales):
    parts = [part(s, g) for s, g in zip(scales, globals_, strict=True)]
    with pytest.raises(ValueError, match=r"w: its parts have different global scales .*joint global scale"):
        fold_globals(parts, "w")
    with pytest.raises(ValueError, match="some parts have a global scale"):
        fold_globals([parts[0], mk.quantize(torch.ones(2, 32), mk.MXFP4)], "w")


@pytest.mark.parametrize("ratio", [1.0, 0.5, 8.0, 1.1])
def test_assemble_gate_and_up(ratio):
    """Experts whose gate and up have different globals become one [E, 2I, H] with one global per expert, or an error."""
    layout, family = LAYOUTS["compressed-tensors"], layouts.FAMILIES["qwen3-moe"]
    tensors, parts, refs = {}, {}, []
    for e in range(2):
        for p, g in (("gate", 0.5), ("up", 0.5 * ratio)):
            q = part([1.0, 2.0, 4.0, 8.0], g * (e + 1), seed=e)
            ref = layouts.WeightRef(f"m.mlp.experts.{e}.{p}_proj.weight", "expert", (2, 64), mk.NVFP4)
            tensors |= layout.write(ref, q)
            parts[ref.name] = q
            refs.append(ref)
    (target,) = regroup(refs, layouts.FUSED, family)
    assert target.ref.shape == (2, 4, 64)
    by_name = {r.name: r for r in refs}

    def read(name, expert):
        return layout.read(by_name[name], lambda n, x=None: tensors[n])

    if ratio == 1.1:
        with pytest.raises(ValueError, match=r"m\.mlp\.experts\.gate_up_proj: its parts have different"):
            layouts.assemble(target, read)
        return
    q = layouts.assemble(target, read)
    assert q.global_scale.shape == (2,)
    for e in range(2):
        want = torch.cat([exact(parts[f"m.mlp.experts.{e}.{p}_proj.weight"]) for p in ("gate", "up")])
        assert torch.equal(exact(q[e]), want)
        assert torch.equal(exact(layouts.assemble(target, read, e)), want)
    back = regroup([target.ref], PER_EXPERT, family)
    assert [t.ref.name for t in back] == [r.name for r in refs]


def test_zero_global_only_over_zeros():
    """ModelOpt writes a multiplier of 0 for an all-zero weight; over any other it is damage."""
    layout = LAYOUTS["modelopt"]
    ref = layouts.WeightRef("m.mlp.up_proj.weight", "linear", (2, 32), mk.NVFP4)
    q = part([1.0, 2.0], 1.0)
    tensors = layout.write(ref, q)
    tensors["m.mlp.up_proj.weight_scale_2"] = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"weight_scale_2 is 0.0, needs a finite positive"):
        layout.read(ref, lambda n, e=None: tensors[n])
    tensors["m.mlp.up_proj.weight"] = torch.full_like(q.data, 0x80)  # -0 counts as zero
    again = layout.read(ref, lambda n, e=None: tensors[n])
    assert not mk.dequantize(again).any()
