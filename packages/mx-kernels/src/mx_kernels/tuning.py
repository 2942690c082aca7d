"""Launch configurations of the packed grouped GEMM, chosen from host integers alone: a model of the regimes.

Letters: P pairs, E experts, r = P / E pairs an expert, N packed weight rows, K columns, U multiprocessors.

- A block should hold what one expert gets, since the weight is decoded once a block; narrower loops serve the blocks that
  hold less (``levels``). Up to r = 10 a block is 16 pairs, and the time is that of streaming and decoding the weights; plain ones
  stream faster in steps of 128 columns than of 64, up to blocks of 32 pairs.
- Few programs (a small matrix, one token) do not fill the device: the K loop is then split among several (``best_split``).
- On devices with warpgroup products (sm_90) blocks of 96 pairs, products of 64 and 32, hold what most experts get from r = 50 to 86.
- From r = 48 on, else, blocks of 128 pairs make the tensor cores the limit. Two programs must fit a multiprocessor, so that one
  decodes while the other multiplies, and steps of 64 columns make room for four stages (five of E2M1 codes). Plain weights
  go to the tensor cores as they are: there fewer bytes from the second-level cache count, so from r = 96 on one program
  takes 256 pairs.
- Over long rows (K), where a device has warpgroup products (sm_90), warps that only load feed warps that only decode and multiply
  (``kernels/specialized.py``), where the rows of x lie in slot order (``slots.py``): three warpgroups in blocks of 160 pairs from r = 60
  (4 bits) or 64 on, or two in blocks of 256, whichever are expected to cost less (``small_blocks``: what is over a full block matters;
  up to 32 pairs that are over 256 may join the block in front, ``joins``).
  h can be kept so at once, and then rows of 768 columns are long enough. A gather of x moves 4 K bytes a pair, a sixth of a product
  takes K N / 3 operations: worth it for wide weights (``GATHERED`` rows). Where rows of x are copied instead, one by one, three
  warpgroups gain from r = 86 to 151, two from there on. Plain weights, which nothing decodes, gain from r = 512 on.
- Where an expert's weight does not fit the second-level cache beside the activations, several blocks walk it together; in
  ``specialized.py`` all full blocks of an expert do, where a wave of programs would otherwise be one block's, and blocks that are not
  full come last: what takes equally long keeps in step and finds in that cache what others have brought there. Such plain weights
  are multiplied by three warpgroups, 192 rows and 256 pairs a tile: both operands are brought for each tile, a fifth less so.

The thresholds were measured on an NVIDIA H200, those of steps of 64 columns and of 256 pairs on an H100 (r = 96 lies between the
measured 64 and 128; torch 2.11, Triton 3.6, November 2026; docs/performance.md), on shapes from 2048 x 768 to 28672 x 4096;
``benchmarks/tune.py`` measures them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

UNITS = 132  # multiprocessors, where the device does not say
SHARED = 232448  # bytes of shared memory that a program may have (sm_90), likewise
LONG, SHORT = 2048, 768  # columns from which on that kernel gains, and where h is in slot order
GATHERED = 5120  # weight rows from which on tokens are brought into slot order for a product
SMALL, LARGE = 160, 256  # pairs of its blocks
JOIN = 32  # of a last block that the large one in front takes along
SAVED = 0.29  # what that saves, of what a full large block costs
FEW = {True: ((0, 151), (288, 316)), False: ((0, 151), (290, 310))}
"""Pairs an expert, from and to, where small blocks are expected to cost less than large ones, by whether codes have four bits
(``test_tuning.py`` has the costs that were measured, and the model)."""
MIDDLE = 86  # pairs an expert up to which blocks of 96 gain over those of 128, and over small ones with copied rows
LEAST = 151  # pairs an expert from which on large blocks gain
MANY = 224  # the same of products that are not a layer's, or whose results are rounded
PLAIN = 512  # the same of plain weights, where rows lie in slot order or weights are narrow
HEAVY = 48e6  # bytes of an expert's plain matrix from which on a tile takes 192 of its rows, so that x is brought less often
NARROW = 0.8  # what a tile of 128 weight rows costs in such small blocks, of one of 192
RING = SHARED - (20 << 10)  # bytes of shared memory for its stages, beside tables, notes and results on their way out


@dataclass(frozen=True)
class Config:
    """One launch: a program computes ``rows`` weight rows times up to ``pairs`` pairs of one expert.

    pairs: those of a block of the alignment, or a part of them. step: columns a step of the K loop. split: programs that share
    the K loop of a tile. group: blocks of pairs that walk the weight tiles together. levels: narrower loops (a half, a quarter of
    ``pairs``; 96 are 64 and 32) for blocks with few pairs. mask: do not load rows of x that are not there. evict: eviction policy
    of weight loads. maxnreg: registers a thread, 0 for the compiler's choice. specialized: the kernel whose warps load or multiply, for
    256 pairs and 128 rows (of plain weights also 192), or 160 and 192 or 128; levels, mask, evict and maxnreg are its own. join: up to
    how many pairs of an expert's last block its block in front takes along (of 256, in that kernel).
    """

    pairs: int
    rows: int
    step: int
    warps: int
    stages: int
    split: int = 1
    group: int = 1
    levels: int = 1
    mask: bool = True
    evict: str = ""
    maxnreg: int = 0
    specialized: bool = False
    join: int = 0


@dataclass(frozen=True)
class Problem:
    """element: "e2m1", "e4m3", "e5m2" or "" (plain 16-bit weights). block: columns a scale covers. n: packed weight rows."""

    element: str
    block: int
    num_pairs: int
    num_experts: int
    n: int
    k: int

    @property
    def active(self) -> float:
        """Experts that get a pair, if every expert is as likely as another."""
        return self.num_experts * (1 - (1 - 1 / self.num_experts) ** self.num_pairs)

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's matrix."""
        return self.n * self.k * {"e2m1": 0.5, "": 2.0}.get(self.element, 1.0)


def block_pairs(num_pairs: int, num_experts: int, plain: bool = False, wgmma: bool = False) -> int:
    """Pairs of a block of the alignment: 16, 32, 64, 96 (on a device with ``wgmma``), 128, or 256 where the weights are plain."""
    middle: tuple[tuple[int, int], ...] = ((64, 50), (96, MIDDLE)) if wgmma and not plain else ((64, 48),)
    for block, limit in ((16, 10), (32, 24), *middle, (128, 96)):
        if num_pairs <= limit * num_experts:
            return block
    return 256 if plain else 128


def small_blocks(p: Problem) -> bool:
    """Whether blocks of ``SMALL`` pairs are expected to cost less than those of ``LARGE``: they do where few experts need a second one, or
    where it holds what many have over ``LARGE``."""
    return any(a * p.num_experts <= p.num_pairs <= b * p.num_experts for a, b in FEW[p.element == "e2m1"])


def joins(p: Problem, slots: bool) -> bool:
    """Whether large blocks should take last ones of up to ``JOIN`` pairs along, where an expert's pairs are normal with their mean as
    variance: they cost others 2%, or, where rows are copied, 8-bit codes 6%, as fewer stages fit."""
    each = p.num_pairs / p.num_experts
    spread = math.sqrt(2 * each) or 1.0
    last = round(each / LARGE) * LARGE + 0.5  # where the block behind would begin
    few = (math.erf((last + JOIN - each) / spread) - math.erf((last - each) / spread)) / 2 if last > LARGE else 0.0
    return few * SAVED > (0.02 if slots or p.element == "e2m1" else 0.06) * (each / LARGE + 0.1)


def specialized_from(p: Problem, slots: bool, block: int = LARGE) -> int:
    """Pairs an expert from which on warps that load and warps that multiply are faster in such blocks, where a device has both; 0: never.
    slots: the rows of x lie in slot order."""
    if p.k < (SHORT if slots else LONG):
        return 0
    if p.element == "":
        return PLAIN if block == LARGE and (slots or p.n < GATHERED) else 0
    if block == SMALL:
        return MIDDLE if not slots else 60 if p.element == "e2m1" else 64
    return LEAST


def small_rows(p: Problem, units: int) -> int:
    """Weight rows of a tile in blocks of ``SMALL`` pairs: 192, or 128 where that takes less time because tiles come in few rounds, of one
    for each multiprocessor."""
    units = units or UNITS
    blocks = p.active * math.ceil(p.num_pairs / (p.active * SMALL))
    rounds = {rows: math.ceil(-(-p.n // rows) * blocks / units) for rows in (128, 192)}
    return 128 if NARROW * rounds[128] < rounds[192] else 192


def slots_from(p: Problem, gather: bool, block: int = LARGE) -> int:
    """Pairs an expert from which on a layer has the rows of this product in slot order, 0 for never. gather: they have to be brought
    there."""
    return 0 if gather and (p.n < GATHERED or p.k < LONG) else specialized_from(p, True, block)


def specialized_block(p: Problem, slots: bool) -> int:
    """Pairs of a block for the sake of such warps, for a layer whose first weight is ``p``'s; 0 where another size suits it better.
    slots: tokens may be brought into slot order."""
    pairs, experts = p.num_pairs, p.num_experts
    ordered = slots and p.k >= LONG and p.n >= 2 * SHORT  # h may be in slot order
    wide = ordered and p.n >= GATHERED
    if ordered and p.k % 64 == 0 and p.n % 128 == 0:  # whole steps of both products, gates and ups being half of n
        least = specialized_from(p, wide, SMALL)
        # where narrow weights' rows are copied, small blocks do not gain with more than one an expert
        if 0 < least * experts <= pairs and (wide or pairs <= SMALL * experts) and small_blocks(p):
            return SMALL
    large = slots_from(p, True) if wide else specialized_from(p, False)
    if large and not ordered:
        large = max(large, MANY)
    return LARGE if 0 < large * experts <= pairs else 0


def shared_bytes(c: Config, p: Problem) -> int:
    """Shared memory of a program: activations in every stage; codes and scales, which go on to registers, in one fewer."""
    codes = {"e2m1": 0.5, "": 2.0}.get(p.element, 1.0) * c.rows * c.step
    scales = 0 if p.element == "" else c.rows * max(4, c.step // p.block)
    return 2 * c.pairs * c.step * c.stages + int(codes + scales) * (c.stages if p.element == "" else c.stages - 1)


def together(programs: float, columns: float, units: int) -> int | None:
    """How many programs of a product of few pairs a multiprocessor may have at a time if it starts before the kernel in front of it has
    ended: 0 for as many as fit, None where it should not.

    Its programs are placed where there is room at that time: some multiprocessors would get more of them than others, which takes longer
    (a tenth of a layer, measured) unless each gets many. So none gets more than its share; long ones start early only where the shares
    are nearly even. programs: those that have work; columns: of K, for each.
    """
    units = units or UNITS
    share = math.ceil(programs / units)
    if share > 4:
        return 0
    even = programs <= units or columns <= 1536 or share * units <= 1.25 * programs
    return share if even else None


def overlaps(streamed: float, programs: float, units: int) -> bool:
    """Whether a layer's second product should begin with blocks that its first has done, instead of waiting for all of them.

    Who waits for a count hears of it a microsecond late, which few bytes do not make up for. And programs of which all fit at a time, and
    fill what there is, take as long as those that begin last, whom the others leave less of the memory's rate. streamed: bytes of both
    weights; programs: of the second product, that have work.
    """
    units = units or UNITS
    share = math.ceil(programs / units)
    return streamed >= 75e6 and (share > 4 or programs <= 0.93 * share * units)


def best_split(p: Problem, rows: int, step: int, units: int) -> int:
    """Programs that share a tile's K loop, for few pairs: the fastest by a model in microseconds on an H200.

    A step takes 1.0 alone; with c programs on a multiprocessor c times what decoding (0.30) or streaming (0.45) its 128 x 128
    weights takes. Adding up the partial sums takes 5 and 1.5 for each of them.
    The constants are those that fit 27 measured problems best, each to 4.4%.
    """
    steps = -(-p.k // step)
    programs = -(-p.n // rows) * p.active / (units or UNITS)
    each = 0.30 if p.element == "e2m1" else 0.45
    best, least = 1, float("inf")
    for split in (1, 2, 4, 8):
        if split > steps:
            break
        time = -(-steps // split) * max(1.0, each * programs * split) + (5 + 1.5 * split if split > 1 else 0)
        if time < 0.97 * least:
            best, least = split, time
    return best


def streaming_stages(p: Problem, programs: float, units: int) -> int:
    """Stages of blocks of 16 pairs. Four of E2M1 codes fit a multiprocessor four times, which is all that registers allow.

    Three stages of 8-bit codes fit four times, four stages three times: what counts is the last wave of programs, since a
    nearly empty one streams slowly. Measured on an H200: 67 or 80 us for 680 programs, 84 or 65 us for 420.
    """
    if p.element == "e2m1":
        return 4
    units = units or UNITS
    if programs > 3 * units and 3 * math.ceil(programs / (3 * units)) < 4 * math.ceil(programs / (4 * units)):
        return 4
    return 3


def choose_config(
    p: Problem, pairs: int, units: int = UNITS, shared: int = SHARED, specialized: bool = False, slots: bool = False
) -> Config:
    """The configuration for blocks of ``pairs`` pairs.

    units: multiprocessors; shared: bytes a program may have of the device; specialized: whether ``kernels/specialized.py`` serves
    this product; slots: whether the rows of x lie in slot order.
    """
    c = _preferred(p, pairs if pairs == 96 or pairs & (pairs - 1) == 0 else 32, units)
    least = specialized_from(p, slots, pairs) if specialized and pairs in (SMALL, LARGE) and shared >= SHARED else 0
    if least and p.num_pairs >= least * p.num_experts:
        if p.element:  # x of those who walk together takes 16 MiB of the second-level cache
            wide = p.expert_bytes > 24e6 and p.n >= 128 * (units or UNITS)
            rows = small_rows(p, units) if pairs == SMALL else 128
            group = max(1, min(8, (16 << 20) // (2 * pairs * p.k))) if wide else 1
        else:
            rows, group = (192, 8) if p.expert_bytes > HEAVY and p.n >= 192 else (128, 1)
        join = JOIN if pairs == LARGE and p.element and joins(p, slots) else 0
        stage = 128 * (pairs + join) + rows * (
            128 if p.element == "" else (32 if p.element == "e2m1" else 64) + 128 // p.block
        )
        return Config(pairs, rows, 64, 4, RING // stage, group=group, specialized=True, join=join)
    if p.element == "" and c.step == 128 and shared_bytes(c, p) > shared:
        c = replace(c, step=64, stages=2 * c.stages)  # more of which fit
    while c.stages > 2 and shared_bytes(c, p) > shared:
        c = replace(c, stages=c.stages - 1)
    if shared_bytes(c, p) > shared and c.rows > 64:
        c = replace(c, rows=64, warps=4)
    return c


def _preferred(p: Problem, pairs: int, units: int) -> Config:
    plain = p.element == ""
    rows = min(128, max(64, 1 << (p.n - 1).bit_length()))
    few = p.num_pairs <= 64
    each = p.num_pairs / p.num_experts
    if plain and pairs <= 32 and p.k % 128 == 0:
        return Config(pairs, rows, 128, 4, 4, levels=1 if pairs <= 16 else 2)
    if pairs <= 16:
        if plain:
            return Config(pairs, rows, 64, 4, 8)
        split = best_split(p, rows, 128, units) if few else 1
        stages = streaming_stages(p, -(-p.n // rows) * p.active * split, units)
        return Config(pairs, rows, 128, 4, stages, split, maxnreg=128)
    if pairs == 96:
        return Config(pairs, rows, 64, 4, 3 if plain else 4, levels=3, maxnreg=0 if plain else 160)
    if pairs <= 64:
        levels = 2 if pairs == 32 or each < 48 else 3
        return Config(pairs, rows, 64, 4, 4, levels=levels, maxnreg=0 if plain else 168)
    if plain and pairs == 256:
        if p.k <= 1024 and p.n >= 256:
            return Config(128, 256, 64, 8, 4, group=8, levels=3, mask=False)
        return Config(256, rows, 64, 8, 4, levels=3)
    if plain:
        return Config(pairs, rows, 64, 4, 3, levels=3)
    config = Config(min(pairs, 128), rows, 64, 4, 5 if p.element == "e2m1" else 4, levels=3)
    return replace(config, group=8) if p.expert_bytes > 24e6 and each >= 256 else config
