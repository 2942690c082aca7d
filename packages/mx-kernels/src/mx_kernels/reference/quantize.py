"""Quantization, exactly: the specification that every fast path and kernel must equal bit for bit.

MX formats, block of 32 values x with float32 bits; ``b`` are the bits of the block's amax, E = b >> 23, m = b & 0x7fffff::

    FLOOR  E - emax              CEIL   E - emax + (m > 0)
    EVEN   ((b + (1 << (22 - M))) >> 23) - emax
    RCEIL  E - emax + (m > T),  T the mantissa of the element's maximum
    scale byte = clamp(rule, 0, 254);  code = rne(x * 2^(127 - byte))

NVFP4, block of 16 values with global scale g, all in float32::

    g = A / 2688 (A the largest finite magnitude of the matrix; A = 0: 1)
    s = e4m3(clamp(amax / (6 g), 2^-9, 448));  code = e2m1(x * (1 / (s g)))

Blocks of zeros have scale byte 0x00. A NaN makes the scale byte NaN (E8M0 0xFF, E4M3 0x7F) and every code of its block 0x00;
an infinity makes the scale byte the largest (0xFE, 0x7E), becomes the largest code, and the rest of its block is quantized at that scale.
Sources: OCP Microscaling Formats (MX) v1.0, section 6.3; FORMATS of cuBLAS (RCEIL) and NVIDIA's NVFP4 recipe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import E2M1, E4M3, Element, Format, ScaleRule, get_format
from ..tensor import QuantizedTensor
from .elements import (
    ABS_MASK,
    INF_BITS,
    decode,
    encode,
    float_bits,
    pack_codes,
    scale_to_float,
    scale_to_reciprocal,
    unpack_codes,
)

GLOBAL_MIN = 2.0**-117  # keeps s * g, at least 2^-9 * g, a normal float32 whose reciprocal is finite
GLOBAL_MAX = 2.0**117  # keeps 448 * g finite
_SEARCH_STEPS = tuple(range(-3, 6))


def compute_global_scale(x: Tensor) -> Tensor:
    """NVFP4's global scale, A / 2688: x [..., N, K] -> float32 [...], one per matrix ([] for up to two dimensions).

    A is the largest finite magnitude; 1 where that is 0. At least 2^-117.
    """
    dims = tuple(range(max(0, x.ndim - 2), x.ndim))
    magnitude = x.abs()
    magnitude = torch.where(magnitude < math.inf, magnitude, 0)
    if magnitude.numel() == 0:
        return torch.ones(x.shape[: max(0, x.ndim - 2)], dtype=torch.float32, device=x.device)
    return global_scale_of(magnitude.amax(dims).to(torch.float32))


def global_scale_of(amax: Tensor) -> Tensor:
    """NVFP4's global scale of a matrix, or of several that share one, from its largest finite magnitude: float32 [...] -> [...]."""
    # By a tensor: CUDA divides by a Python number as a product with its rounded reciprocal.
    return torch.where(amax > 0, (amax / torch.full_like(amax, 2688.0)).clamp(min=GLOBAL_MIN), 1.0)


def scale_rounding(element: Element, rule: ScaleRule) -> int:
    """What an E8M0 rule adds to the float32 bits of amax before the exponent is taken; SEARCH is not one of these rules.

    A carry into the exponent happens exactly where the rule rounds up: m > 0, m past the middle of the first place, or m > T.
    """
    if rule is ScaleRule.FLOOR:
        return 0
    if rule is ScaleRule.CEIL:
        return 0x7FFFFF
    if rule is ScaleRule.EVEN:
        return 1 << (22 - element.mantissa)
    if rule is ScaleRule.RCEIL:
        return 0x7FFFFF - (float_bits(element.max) & 0x7FFFFF)
    raise ValueError(f"{rule.value!r} is not a rule of one E8M0 scale: use floor, ceil, even or rceil")


def e8m0_scale(amax_bits: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """E8M0 bytes of blocks from the float32 bits of their amax: int32 [...] -> uint8 [...]."""
    byte = ((amax_bits + scale_rounding(element, rule)) >> 23) - element.emax
    byte = torch.where(amax_bits == INF_BITS, 254, byte.clamp(0, 254))
    return torch.where(amax_bits > INF_BITS, 255, byte).to(torch.uint8)


def e4m3_scale(amax: Tensor, global_scale: Tensor, over: float = 6.0) -> Tensor:
    """NVFP4's block scales as E4M3 codes: amax [...], global scale broadcast to it -> uint8 [...]; ``over``: where amax maps to."""
    ratio = amax / (over * global_scale)
    code = encode(ratio.clamp(2.0**-9, 448.0), E4M3)
    code = torch.where(amax == 0, 0, code)
    return torch.where(amax.isnan(), 0x7F, code).to(torch.uint8)


def _e8m0_codes(blocks: Tensor, scale: Tensor, element: Element) -> Tensor:
    """blocks float32 [..., B], scale uint8 [...] -> codes uint8 [..., B]."""
    codes = encode(blocks * scale_to_reciprocal(scale)[..., None], element)
    return torch.where((scale == 255)[..., None], 0, codes).to(torch.uint8)


def nvfp4_reciprocal(scale: Tensor, global_scale: Tensor) -> Tensor:
    """1 / (s g) of E4M3 codes, float32, and 0 for code 0 (a block of zeros): what NVFP4's elements are multiplied by."""
    return torch.where(scale == 0, 0.0, 1 / (decode(scale, E4M3) * global_scale))


def _nvfp4_codes(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """blocks float32 [..., 16], scale uint8 [...], global scale broadcast to it -> codes uint8 [..., 16]."""
    codes = encode(blocks * nvfp4_reciprocal(scale, global_scale)[..., None], E2M1)
    return torch.where((scale == 0x7F)[..., None], 0, codes).to(torch.uint8)


def _squared_error(blocks: Tensor, codes: Tensor, step: Tensor, element: Element) -> Tensor:
    """Squared error of each block in float64: an infinity or NaN in a block makes its error Inf or NaN for every candidate."""
    error = blocks.double() - decode(codes, element).double() * step.double()[..., None]
    return error.square().sum(-1)


def _search_e8m0(blocks: Tensor, amax_bits: Tensor, element: Element) -> Tensor:
    """The better of FLOOR's byte and the next one; FLOOR's where they tie, and for blocks that are not finite."""
    low = e8m0_scale(amax_bits, element, ScaleRule.FLOOR)
    high = torch.where(low < 253, low + 1, low)
    error = [_squared_error(blocks, _e8m0_codes(blocks, s, element), scale_to_float(s), element) for s in (low, high)]
    return torch.where((error[1] < error[0]) & (amax_bits < INF_BITS), high, low)


def _search_nvfp4(blocks: Tensor, amax: Tensor, global_scale: Tensor, rule: ScaleRule) -> Tensor:
    """The block scale with the smallest squared error among the rule's candidates, the first of them where they tie.

    FOUR_OVER_SIX: amax at 6, amax at 4. SEARCH: the codes -3..+5 around the one that maps amax to 6, that one first, then upwards.
    """
    standard = e4m3_scale(amax, global_scale)
    if rule is ScaleRule.FOUR_OVER_SIX:
        candidates = [e4m3_scale(amax, global_scale, 4.0)]
    else:
        steps = [d for d in _SEARCH_STEPS if d]
        candidates = [(standard.to(torch.int32) + d).clamp(1, 0x7E).to(torch.uint8) for d in steps]
    best, least = (
        standard,
        _squared_error(
            blocks, _nvfp4_codes(blocks, standard, global_scale), decode(standard, E4M3) * global_scale, E2M1
        ),
    )
    for candidate in candidates:
        codes = _nvfp4_codes(blocks, candidate, global_scale)
        error = _squared_error(blocks, codes, decode(candidate, E4M3) * global_scale, E2M1)
        better = (error < least) & (amax > 0) & (amax < math.inf)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _broadcast_global(global_scale: Tensor, ndim: int) -> Tensor:
    """global_scale [...] with trailing ones up to ``ndim`` dimensions."""
    return global_scale.reshape(*global_scale.shape, *([1] * (ndim - global_scale.ndim)))


def quantize_codes(
    x: Tensor, format: Format | str, rule: ScaleRule | str | None = None, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] float -> codes uint8 [..., K] (one a byte, not packed) and scale bytes uint8 [..., K / block].

    ``global_scale``: float32 multiplier of NVFP4, [] or a prefix of the leading dimensions.
    """
    f = get_format(format)
    rule = f.check_rule(rule)
    blocks = x.to(torch.float32).unflatten(-1, (-1, f.block))  # [..., K / B, B]
    # The integer order of magnitudes is their order, and NaN comes last.
    bits = (blocks.view(torch.int32) & ABS_MASK).amax(-1)
    if f.scale == "e8m0":
        if rule is ScaleRule.SEARCH:
            scale = _search_e8m0(blocks, bits, f.element)
        else:
            scale = e8m0_scale(bits, f.element, rule)
        return _e8m0_codes(blocks, scale, f.element).flatten(-2), scale
    if global_scale is None:
        raise ValueError(f"{f} needs a global_scale: use compute_global_scale(x)")
    g = _broadcast_global(global_scale, bits.ndim)
    amax = bits.view(torch.float32)
    scale = e4m3_scale(amax, g) if rule is ScaleRule.AMAX else _search_nvfp4(blocks, amax, g, rule)
    return _nvfp4_codes(blocks, scale, g).flatten(-2), scale


def quantize(
    x: Tensor, format: Format | str, *, rule: ScaleRule | str | None = None, global_scale: Tensor | None = None
) -> QuantizedTensor:
    """Twin of ``mx_kernels.quantize``: x [..., K] bf16, fp16 or fp32 -> QuantizedTensor. Any device, no checks of values."""
    f = get_format(format)
    rule = f.check_rule(rule)
    f.check_k(x.shape[-1])
    if f.has_global_scale and global_scale is None:
        global_scale = compute_global_scale(x)
    codes, scale = quantize_codes(x, f, rule, global_scale)
    data = pack_codes(codes, f).contiguous()
    return QuantizedTensor(data.view(f.data_dtype), scale.view(f.scale_dtype), f, rule, x.dtype, global_scale)


def dequantize_parts(data: Tensor, scale: Tensor, global_scale: Tensor | None, format: Format | str) -> Tensor:
    """data and scale (uint8 or their own dtypes) -> float32 [..., K]: (decode(code) * scale) * global_scale.

    The first product is exact (but for float32's overflow and underflow), so the result is rounded at most once.
    """
    f = get_format(format)
    values = decode(unpack_codes(data, f), f.element).unflatten(-1, (-1, f.block))
    step = scale_to_float(scale.view(torch.uint8)) if f.scale == "e8m0" else decode(scale.view(torch.uint8), E4M3)
    values = torch.flatten(values * step[..., None], -2)
    return values if global_scale is None else values * _broadcast_global(global_scale, values.ndim)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Twin of ``mx_kernels.dequantize``: [..., K] in ``dtype`` (None: the tensor's own), one rounding from float32."""
    return dequantize_parts(q.data, q.scale, q.global_scale, q.format).to(dtype or q.dtype)


def quantize_dequantize(
    x: Tensor, format: Format | str, *, rule: ScaleRule | str | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """Twin of ``mx_kernels.quantize_dequantize``: x [..., K] -> the same shape and dtype."""
    return dequantize(quantize(x, format, rule=rule, global_scale=global_scale))
