"""The layout of re-based MXFP4: codes of four bits that become E4M3 in the registers of an FP8 matrix unit.

    strip    16 rows of a matrix
    tile     a strip's 64 columns: 512 bytes, 16 for each thread t = 4 g + c of a warp: words (row half, block of 32 columns)
    data     uint8 [E * K tiles, strips, 512]; where K is no multiple of 128, a tile of zeros more
    octaves  uint8 [E, ceil(K / 128), rows, 4], the rows padded to 16

A thread's fragment of 32 columns of E4M3 holds rows g and g + 8 and columns 4c .. 4c + 3 and 16 + 4c .. 16 + 4c + 3 (PTX ISA,
wgmma, register fragments of A): eight codes of a row, a word. Code i lies in the word's nibble i, but for its sign, which lies
where the byte that it becomes has it: bit 8 i + 7 of the first four codes, 8 (i - 4) + 3 of the last, which are shifted by 4. So
four codes without their signs are a selector of ``prmt``, which looks up four bytes in a table of eight, and the table has the
block's power of two in it: adding 8 to an E4M3 byte doubles its value.

A block whose scale is 2^-d of its row's largest has 11 - d octaves (E2M1's 0.5 is then E4M3's smallest normal number or more);
below that its codes are rounded to 0 octaves. A product takes steps of 128 columns: the last one's second tile may be the next
expert's, or those zeros; activations are zero there. Letters: E experts, N rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import E2M1, E4M3
from .reference.elements import decode, encode
from .reference.rebase import octaves_of_room

OCTAVES = 12
"""Block scales of a row that are exact: its largest and the eleven powers of two below it."""


def empty_fp4(experts: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the data and octaves of E matrices."""
    tiles, strips, steps = -(-k // 64), -(-n // 16), -(-k // 128)
    data = torch.empty((experts * tiles + tiles % 2, strips, 512), dtype=torch.uint8, device=device)
    if tiles % 2:
        data[-1] = 0
    return data, torch.empty((experts, steps, 16 * strips, 4), dtype=torch.uint8, device=device)


def pack_fp4(codes: Tensor, octaves: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4's bytes, uint8 [N, K / 2], and octaves, uint8 [N, K / 32], of one matrix -> its data [K tiles, strips, 512] and octaves."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    codes = pad(codes, (0, -k % 64 // 2, 0, -n % 16))
    octaves = pad(octaves, (0, -k % 128 // 32, 0, -n % 16))
    # strip, row half, g, tile, block, column half, c
    fours = codes.view(torch.int16).reshape(-1, 2, 8, codes.shape[1] // 32, 2, 2, 4)
    first, last = (fours[..., half, :].int() & 0xFFFF for half in (0, 1))
    words = (first | (last << 16)) & 0x77777777 | _top_bits(first, 4) | _top_bits(last, 0)
    words = words.permute(3, 0, 2, 5, 1, 4).contiguous()
    data = words.view(torch.uint8).reshape(*words.shape[:2], 512)
    return data, octaves.reshape(codes.shape[0], -1, 4).transpose(0, 1)


def _top_bits(nibbles: Tensor, up: int) -> Tensor:
    """The top bits of four nibbles, each in a byte of its own, at its bit 3 + ``up``."""
    bits = torch.zeros_like(nibbles)
    for i in range(4):
        bits |= ((nibbles >> (4 * i + 3)) & 1) << (8 * i + 3 + up)
    return bits


def unpack_fp4(data: Tensor, octaves: Tensor, n: int, k: int) -> Tensor:
    """The E4M3 codes that ``data`` and ``octaves`` of E matrices stand for: uint8 [E, N, K]."""
    experts, tiles, strips = octaves.shape[0], -(-k // 64), data.shape[1]
    w = data[: experts * tiles].reshape(experts, tiles, strips, 8, 4, 2, 2, 4)  # .., g, c, row half, block, byte
    magnitudes = torch.stack((w & 7, (w >> 4) & 7), -1).flatten(-2)
    codes = magnitudes | (torch.cat((w >> 7, (w >> 3) & 1), -1) << 3)
    codes = codes.unflatten(-1, (2, 4)).permute(0, 2, 5, 3, 1, 6, 7, 4, 8).reshape(experts, strips * 16, tiles * 64)
    octave = octaves.transpose(1, 2).flatten(2).int()[..., : tiles * 2] + octaves_of_room(E2M1) - (OCTAVES - 1)
    factor = torch.ldexp(torch.ones_like(octave, dtype=torch.float32), octave)
    values = decode(codes, E2M1).unflatten(-1, (-1, 32)) * factor[..., None]
    return encode(values.flatten(-2)[:, :n, :k], E4M3)
