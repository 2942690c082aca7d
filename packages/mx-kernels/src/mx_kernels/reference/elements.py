"""Elements and block scales, exactly: encode, decode, pack and unpack.

A code of an element with ``M`` mantissa bits and bias ``B`` is sign, exponent field ``e`` and mantissa field ``m``::

    e > 0: (-1)^s * 2^(e - B) * (1 + m / 2^M)          e = 0: (-1)^s * 2^(1 - B) * (m / 2^M)

Codes are uint8, one per element, the sign in the element's top bit. An E8M0 byte ``b`` is 2^(b - 127), and 255 is NaN.
Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 5.4; OCP 8-bit floating point (OFP8) v1.0, section 5.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..formats import E4M3, E5M2, Element, Format, get_format

ABS_MASK = 0x7FFFFFFF  # float32 bits without the sign
INF_BITS = 0x7F800000  # float32 bits of +Inf; larger ones are NaN


def float_bits(value: float) -> int:
    """The float32 bits of ``value`` as an int."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


@functools.cache
def code_values(element: Element) -> tuple[float, ...]:
    """The value of every code, in code order: 2^bits numbers (E4M3 and E5M2 have NaN codes, E5M2 infinities)."""
    fraction = 1 << element.mantissa
    half = []
    for e in range(1 << element.exponent):
        for m in range(fraction):
            top = e == (1 << element.exponent) - 1
            if element == E4M3 and top and m == fraction - 1:
                half.append(math.nan)
            elif element == E5M2 and top:
                half.append(math.nan if m else math.inf)
            elif e:
                half.append(math.ldexp(1 + m / fraction, e - element.bias))
            else:
                half.append(math.ldexp(m / fraction, 1 - element.bias))
    return (*half, *(-v for v in half))


def decode(codes: Tensor, element: Element) -> Tensor:
    """The values of ``codes``: uint8 [...] -> float32 [...], exact.

    Bits above the element's width are an error of the caller and are ignored.
    """
    table = torch.tensor(code_values(element), dtype=torch.float32, device=codes.device)
    index = codes.to(torch.int32) & (len(table) - 1)
    return table.index_select(0, index.reshape(-1)).reshape(codes.shape)


def encode(x: Tensor, element: Element) -> Tensor:
    """Round to the nearest code: float [...] -> uint8 [...].

    Ties go to the even code, magnitudes above the element's maximum (Inf too) saturate, and the sign of zero is kept.
    NaN becomes code 0x7F (with its sign) where the element has one, and the largest magnitude where it has none.
    """
    bits = x.to(torch.float32).view(torch.int32)
    magnitude = bits & ABS_MASK
    clamped = magnitude.clamp(max=float_bits(element.max))
    shift = 23 - element.mantissa
    normal = (clamped + ((1 << (shift - 1)) - 1) + ((clamped >> shift) & 1)) >> shift
    normal = normal - ((127 - element.bias) << element.mantissa)
    # Below the smallest normal, the adder rounds: the last place of `anchor` is the smallest subnormal.
    anchor = math.ldexp(1.0, 1 - element.bias + shift)
    subnormal = (clamped.view(torch.float32) + anchor).view(torch.int32) - float_bits(anchor)
    code = torch.where(clamped < float_bits(math.ldexp(1.0, 1 - element.bias)), subnormal, normal)
    if element.dtype is not None:
        code = torch.where(magnitude > INF_BITS, 0x7F, code)
    return (code + torch.where(bits < 0, 1 << (element.bits - 1), 0)).to(torch.uint8)


def scale_to_float(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32, exactly: uint8 [...] -> float32 [...]; 0 is the subnormal 2^-127, 255 is NaN."""
    byte = scale.to(torch.int32)
    bits = torch.where(byte == 0, 0x00400000, byte << 23)
    return torch.where(byte == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def scale_to_reciprocal(scale: Tensor) -> Tensor:
    """2^(127 - byte) of E8M0 bytes as float32, exactly: uint8 [...] -> float32 [...]; 255 is NaN."""
    return torch.where(scale == 255, math.nan, scale_to_float((254 - scale.to(torch.int32)).clamp(min=0)))


def pack_codes(codes: Tensor, format: Format | str) -> Tensor:
    """Codes, one a byte, as ``format`` stores them: uint8 [..., K] -> uint8 [..., data_width(K)].

    FP8: the same bytes. FP6: v0 | v1 << 6 | v2 << 12 | v3 << 18 in three little-endian bytes. FP4: even k in the low nibble.
    """
    bits = get_format(format).element.bits
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(-2)


def unpack_codes(data: Tensor, format: Format | str) -> Tensor:
    """The inverse of ``pack_codes``: uint8 or FP8 [..., data_width(K)] -> uint8 [..., K]."""
    bits = get_format(format).element.bits
    data = data.view(torch.uint8)
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack((data & 0xF, data >> 4), -1).flatten(-2)
    a, b, c = data.unflatten(-1, (-1, 3)).unbind(-1)
    codes = (a & 0x3F, (a >> 6) | ((b & 0xF) << 2), (b >> 4) | ((c & 0x3) << 4), c >> 2)
    return torch.stack(codes, -1).flatten(-2)
