"""NVFP4 global scales: divisors and multipliers, and folding several of them into one, exactly or not at all.

In memory a global scale g is always the float32 multiplier, w = e2m1 * e4m3 * g. compressed-tensors stores the divisor 1 / g.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from mx_kernels import QuantizedTensor


def invert_global(g: Tensor) -> Tensor:
    """The float32 reciprocal of a global scale, from multiplier to divisor or back.

    Divisor -> multiplier -> divisor -> multiplier gives the same multiplier for every float32 (checked on all 2^23 mantissas), so a
    checkpoint with divisors is converted without loss. Of the multipliers 17% have no divisor that gives them back; their error is
    one ulp, 6e-8, and ``exact_global`` avoids it when a new global scale is chosen.
    """
    return g.float().reciprocal()


def exact_global(g: Tensor) -> Tensor:
    """``g``, or the next larger float32 where ``1 / (1 / g)`` is not ``g``: a multiplier that every layout stores without loss."""
    g = g.float()
    up = torch.nextafter(g, torch.full_like(g, torch.inf))
    return torch.where(invert_global(invert_global(g)) == g, g, up)


_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
_CODE = {Fraction(v): code for code, v in enumerate(_E4M3)}


def fold_globals(parts: list[QuantizedTensor], name: str) -> list[QuantizedTensor]:
    """Parts of one fused matrix (gate and up; q, k and v), each with a global scale [], rewritten to share one, exactly.

    The ratio of two globals goes into the block scales where every product is again an E4M3 number (a power of two, or by luck);
    the base is tried in order of size, largest first. ValueError where no base works: dequantize and quantize these weights again.
    """
    values = [float(p.global_scale) for p in parts if p.global_scale is not None]
    if len(values) != len(parts):
        raise ValueError(f"{name}: some parts have a global scale and some have none")
    if len(set(values)) == 1:
        return parts
    used = [sorted(set(p.scale.view(torch.uint8).flatten().tolist())) for p in parts]
    for base in sorted(set(values), reverse=True):
        tables = [_table(Fraction(v) / Fraction(base), codes) for v, codes in zip(values, used)] if base else [None]
        if all(t is not None for t in tables):
            g = torch.tensor(base, dtype=torch.float32, device=parts[0].device)
            return [
                replace(
                    p, scale=t.to(p.device)[p.scale.view(torch.uint8).long()].view(torch.float8_e4m3fn), global_scale=g
                )
                for p, t in zip(parts, tables)
                if t is not None
            ]
    listed = ", ".join(f"{v:.9g}" for v in values)
    raise ValueError(
        f"{name}: its parts have different global scales ({listed}) whose ratio does not fold into E4M3 block scales exactly; "
        f"taking one of them would change the weights: dequantize and quantize with a joint global scale"
    )


def _table(ratio: Fraction, codes: list[int]) -> Tensor | None:
    """E4M3 code -> code of its value times ``ratio``, or None where a code in use has no exact product."""
    table = torch.zeros(256, dtype=torch.uint8)
    for code in codes:
        if code >= len(_E4M3):
            return None
        product = _CODE.get(Fraction(_E4M3[code]) * ratio)
        if product is None:
            return None
        table[code] = product
    return table
