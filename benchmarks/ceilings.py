"""The ceilings of a card, measured: reading memory, copying it, a bf16 product. The roofline of every figure of a run."""

from __future__ import annotations

import functools
import itertools
import statistics
import time

import torch
import triton
import triton.language as tl
from cases import Ceilings, time_graph


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Adds up BLOCK * STEPS words, so that nothing but reading takes time."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(x + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def ceilings(size: int = 4 << 30) -> Ceilings:
    """Measured on the current device, in two seconds; ``size``: bytes that are read."""
    block, steps = 2048, 8
    a = torch.randint(0, 127, (size,), dtype=torch.int8, device="cuda").view(torch.int32)
    out = torch.empty(a.numel() // (block * steps), dtype=torch.int32, device="cuda")
    read = time_graph([functools.partial(_read_kernel[(out.numel(),)], a, out, block, steps, num_warps=8)])
    del a, out
    copy = copy_gb_s(size)
    x, y = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    torch.cuda.synchronize()
    time.sleep(1)  # a rested card runs a short burst at higher clocks
    matmul = _stream_us(functools.partial(torch.mm, x, y))
    return Ceilings(size / read * 1e-3, copy, 2 * 8192**3 / matmul * 1e-6)


def copy_gb_s(size: int = 2 << 30) -> float:
    """GB/s of a device-to-device copy, read + write: plain or in a graph, where it takes another path."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device="cuda")
    copying = functools.partial(torch.empty_like(source).copy_, source)
    return 2 * size / min(_stream_us(copying), time_graph([copying])) * 1e-3


def _stream_us(run, times: int = 10) -> float:
    """Median microseconds of plain launches in a row."""
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events))


if __name__ == "__main__":
    print(ceilings())
