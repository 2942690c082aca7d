"""Grouped GEMM on packed weights and 16-bit activations: ``packing.py`` has the layout, ``dot.py`` the K loop.

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program computes N weight rows times up to BM pairs of one expert, the rows it needs gathered from x. Which pairs: from the
alignment (sorted_ids, expert_ids, num_padded), from the expert of each pair alone (up to 64 pairs: every program finds the
pairs of its expert by comparing ids), or all rows in order (a linear layer).

Blocks that hold few pairs run a narrower loop than full ones (LEVELS), so that one decoded weight tile serves a whole
expert without multiplying by rows that are not there. With split K, each program stores its partial sums, and the last
to arrive adds them up in a fixed order, so the result does not depend on which one that is.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from ..tuned import config_for
from ..tuning import SHARED, UNITS, Config, Problem
from .dot import packed_dot
from .epilogue import outputs, store
from .launch import Launch, takes_registers, target

SORTED: tl.constexpr = tl.constexpr(0)
PAIR: tl.constexpr = tl.constexpr(1)
SELF: tl.constexpr = tl.constexpr(2)
DENSE: tl.constexpr = tl.constexpr(3)


# From Triton 3.8 on the loops of 32 and 64 pairs spill at 168 registers, and need up to 208 (compiled for sm_90, not timed).
_REGISTERS = {168: 208} if tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8) else {}


@triton.jit
def _tile(
    x, w, s, y, sorted_ids, bias, row_weight, partial, counter,
    first, pair, count, scale, strip0, strips, rows, w_step, s_step, n, k, x_stride, piece_stride, pairs, slot, split,
    act_alpha, act_beta, act_limit,
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    TAIL: tl.constexpr, CLAMP: tl.constexpr, MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr,
    TOP_K: tl.constexpr, ROUTE: tl.constexpr, PTX: tl.constexpr, DRAIN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """N weight rows times M pairs: K loop, reduction over splits, epilogue."""
    live = pair < pairs
    pair = tl.where(live, pair, 0)
    if CLAMP:  # fewer rows than N: repeat the last
        strip = tl.minimum(strip0 + tl.arange(0, N // 16), strips - 1)
        row = tl.minimum(strip0 * 16 + tl.arange(0, N), rows - 1)
    else:
        strip = strip0 + tl.arange(0, N // 16)
        row = strip0 * 16 + tl.arange(0, N)
    EARLY: tl.constexpr = M <= 32  # hide the latency of what the epilogue loads; larger tiles need the registers
    b0 = 0.0
    b1 = 0.0
    weight = 0.0
    if EARLY and HAS_BIAS:
        _, inside, i0, i1 = outputs(strip0 * 16, n, N, GATED, INTERLEAVED, ACT)
        b0 = tl.load(bias + i0, mask=inside, other=0.0).to(tl.float32)
        b1 = tl.load(bias + i1, mask=inside, other=0.0).to(tl.float32)
    if EARLY and HAS_WEIGHT:
        weight = tl.load(row_weight + pair, mask=live, other=0.0)
    at = pair // TOP_K
    if WIDE:
        at = at.to(tl.int64)
    steps = tl.cdiv(k, BK)
    if SPLIT > 1:
        steps = (steps - split + SPLIT - 1) // SPLIT
    acc = packed_dot(
        tl.zeros((N, M), tl.float32), x, at * x_stride, live, w, s, row if KIND == "" else strip, row,
        w_step, s_step, k, split, steps, piece_stride,
        N, M, BK, KIND, BLOCK, SPLIT, TAIL, MASK_ROWS, PIECES, EVICT, PTX, DRAIN, INTERPRET,
    )  # fmt: skip
    last = True
    if SPLIT > 1:
        part = partial + slot.to(tl.int64) * (SPLIT * M * N) + tl.arange(0, M)[None, :] * N + tl.arange(0, N)[:, None]
        column = (tl.arange(0, M) < count)[None, :]
        tl.store(
            part + split * (M * N), acc, mask=column
        )  # only the pairs that are there: reading back takes most time
        tl.debug_barrier()
        last = tl.atomic_add(counter + slot, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((N, M), tl.float32)
            for q in tl.static_range(SPLIT):
                acc += tl.load(part + q * (M * N), mask=column, other=0.0, cache_modifier=".cg")
            tl.store(counter + slot, 0)
        store(
            acc, y, sorted_ids, bias, row_weight, first, pair, live, pairs, n, scale, strip0 * 16, b0, b1, weight,
            act_alpha, act_beta, act_limit,
            N, M, GATED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, INTERLEAVED, EARLY, WIDE, ROUTE == SORTED, PTX,
        )  # fmt: skip


@triton.jit
def _ones(x):  # int64 -> int32, the number of ones
    x -= (x >> 1) & 0x5555555555555555
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    return ((x + (x >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _pairs(sorted_ids, first, pairs, M: tl.constexpr, ROUTE: tl.constexpr):
    """int32 [M]: the pairs of a block; ``pairs`` or more where there is none."""
    column = first + tl.arange(0, M)
    if ROUTE == SORTED:
        return tl.load(sorted_ids + column)
    else:
        return column


@triton.jit(do_not_specialize=["experts", "pairs", "blocks", "piece_stride", "act_alpha", "act_beta", "act_limit"])
def _grouped_gemm_packed_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter,
    experts, n, k, strips, rows, w_expert, w_step, s_expert, s_step, x_stride, piece_stride, pairs, blocks,
    act_alpha, act_beta, act_limit,
    BM: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ROUTE: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, TAIL: tl.constexpr, CLAMP: tl.constexpr,
    MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROUND: tl.constexpr, RULE: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
    DRAIN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed; y [P, N_out]; bias [E, n]; partial [blocks * tiles, SPLIT, BM, N], counter [blocks * tiles].

    A block is one of PARTS parts of a block of the alignment.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(strips * 16, N)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = 0
    if GROUP == 1:
        tile = pid % tiles
        block = pid // tiles
        if SPLIT > 1:
            split = block % SPLIT
            block = block // SPLIT
    else:  # GROUP blocks share the weight tiles that they read from the second-level cache
        first = pid // (GROUP * tiles) * GROUP
        size = tl.minimum(blocks - first, GROUP)
        block = first + pid % (GROUP * tiles) % size
        tile = pid % (GROUP * tiles) // size
    column = tl.arange(0, BM)
    if ROUTE == DENSE:
        e = 0
        pair = _pairs(sorted_ids, block * BM, pairs, BM, ROUTE)
        count = tl.minimum(pairs - block * BM, BM)
    elif ROUTE == SORTED:
        used = tl.load(num_padded)  # the three loads do not wait for each other
        e = tl.load(expert_ids + block // PARTS)
        pair = _pairs(sorted_ids, block * BM, pairs, BM, ROUTE)
        if block * BM >= used:
            return
        count = tl.sum((pair < pairs).to(tl.int32), 0)  # padding follows the pairs
        if PARTS > 1 and count == 0:
            return
    elif ROUTE == PAIR:
        e = tl.load(expert_ids + block)
        pair = tl.where(column == 0, block, pairs)
        count = 1
    else:
        other = tl.arange(0, 64)
        ids = tl.load(expert_ids + other, mask=other < pairs, other=-1)
        e = tl.load(expert_ids + block)
        mine = tl.sum((ids == e).to(tl.int64) << other.to(tl.int64), 0)  # a bit for each pair of this expert
        before = _ones(mine & ((tl.full((), 1, tl.int64) << block.to(tl.int64)) - 1))
        if before % BM != 0:
            return  # another program computes this pair
        count = tl.minimum(_ones(mine) - before, BM)
        for _ in range(before):
            mine &= mine - 1
        pair = tl.full((BM,), 0, tl.int32) + pairs
        for i in range(count):
            pair = tl.where(column == i, _ones((mine & -mine) - 1), pair)
            mine &= mine - 1
    if ROUTE != DENSE:  # noqa: SIM102
        if (e < 0) | (e >= experts):
            return
    strip0 = tile * (N // 16)
    if not CLAMP:
        strip0 = tl.minimum(strip0, strips - N // 16)  # the last tile ends at the last row; two store the same values
    scale = 1.0
    if HAS_ALPHA:
        scale = tl.load(alpha + e)
    if ROUTE != DENSE:
        w += e.to(tl.int64) * w_expert
        s += e.to(tl.int64) * s_expert
        bias += e.to(tl.int64) * n
    slot = block * tiles + tile
    first = block * BM
    QUARTER: tl.constexpr = BM // 4 if LEVELS > 2 else BM
    HALF: tl.constexpr = BM // 2 if LEVELS > 1 else BM
    tensors = (x, w, s, y, sorted_ids, bias, row_weight, partial, counter)
    sizes = (
        strip0, strips, rows, w_step, s_step, n, k, x_stride, piece_stride, pairs, slot, split, act_alpha, act_beta, act_limit,
    )  # fmt: skip
    if LEVELS > 2 and count <= QUARTER:
        _tile(
            *tensors, first, _pairs(sorted_ids, first, pairs, QUARTER, ROUTE), count, scale, *sizes,
            QUARTER, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, ROUTE, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    elif LEVELS > 1 and count <= HALF:
        _tile(
            *tensors, first, _pairs(sorted_ids, first, pairs, HALF, ROUTE), count, scale, *sizes,
            HALF, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, ROUTE, PTX, DRAIN, INTERPRET,
        )  # fmt: skip
    else:
        _tile(
            *tensors, first, pair, count, scale, *sizes,
            BM, N, BK, KIND, BLOCK, SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT,
            HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ROUND, RULE, WIDE, TOP_K, ROUTE, PTX, DRAIN, INTERPRET,
        )  # fmt: skip


# --- launching ---

INTERPRET = not isinstance(
    _grouped_gemm_packed_kernel, triton.JITFunction
)  # in Triton's interpreter bf16 products are wrong

_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_PLANS = 4096  # launches that are remembered
_plans: dict[tuple, "_Plan"] = {}
_counters: dict[tuple[int, int], list[Tensor]] = {}


@dataclass
class _Plan:
    """A launch without its tensors."""

    kernel: Any
    sizes: tuple[int | float, ...]
    constants: tuple
    options: dict[str, int]
    programs: int
    partial: int
    tiles: int
    device: torch.device

    @functools.cached_property
    def launch(self) -> Launch:
        """For (x, w, w_scale, y, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight, partial, counter), y where absent."""
        values = (*self.sizes, *self.constants)
        return Launch(self.kernel, (self.programs,), self.device, *values, **self.options)


def pieces(x: Tensor, dtype: torch.dtype) -> Tensor:  # [M, K] -> [pieces, M, K], or x itself
    """x as a sum of tensors of ``dtype``, which is exact: 11 bits of fp16 are two bf16 of 8 bits, 24 bits of fp32 are three."""
    if x.dtype == dtype:
        return x
    parts, rest = [], x.float()
    for _ in range(_PIECES[x.dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts)


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros that every launch leaves as zeros; one tensor a stream, made outside of CUDA graphs, or one a launch within.

    None is ever freed, since a captured graph may hold it. As with cuBLAS's workspaces, graphs captured on one stream must
    not be replayed on several at once.
    """
    stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    held = _counters.setdefault((device.index or 0, stream), [])
    if held and held[-1].numel() >= count:
        return held[-1]
    made = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        held.append(made)
    return made


ROLES = (208, 88)
"""Registers of a thread that multiplies and of one that loads, where warps do one of the two: 2 x 208 + 88 <= 65536 / 128."""


@functools.cache
def _facts(device: torch.device) -> tuple[int, int, bool, bool]:
    """(multiprocessors, bytes of shared memory a program may have, programmatic dependent launch, wgmma)."""
    if device.type != "cuda":
        return UNITS, SHARED, False, device.type == "meta"
    t = target(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return t.units, shared, t.pdl, t.wgmma


def grouped_gemm_packed(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    w_alpha: Tensor | None,
    w_shift: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    n: int,
    k: int,
    w_gated: bool,
    w_layout: str,
    sorted_ids: Tensor | None,
    expert_ids: Tensor | None,
    num_padded: Tensor | None,
    block_size: int,
    num_pairs: int,
    tokens: int,
    top_k: int,
    bias: Tensor | None,
    act: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    row_weight: Tensor | None,
    round_to: str,
    rule: str,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] -> [num_pairs, N_out]: ``packed_gemm._grouped_gemm_packed`` on an accelerator. ``config``: for measuring."""
    y = torch.empty((num_pairs, n // 2 if gated else n), dtype=out_dtype, device=x.device)
    if num_pairs == 0:
        return y
    x = pieces(x, w.dtype if not w_format else torch.bfloat16)
    plan = plan_packed(
        *(x, w, w_scale, w_alpha, w_shift, w_global, w_format, n, k, w_gated, w_layout),
        *(sorted_ids, expert_ids, num_padded),
        *(
            block_size,
            num_pairs,
            tokens,
            top_k,
            bias,
            act,
            gated,
            alpha,
            beta,
            limit,
            row_weight,
            round_to,
            rule,
            out_dtype,
            config,
        ),
    )
    partial = counter = y
    if plan.partial:
        partial = torch.empty((plan.partial,), dtype=torch.float32, device=x.device)
        counter = counters(x.device, plan.tiles)
    if w_format:
        w = w.view(torch.int32)
    given = (w_scale, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight)
    w_scale, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight = (y if t is None else t for t in given)
    _launch(
        plan,
        (x, w, w_scale, y, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight, partial, counter),
    )
    return y


def plan_packed(
    x, w, w_scale, w_alpha, w_shift, w_global, w_format, n, k, w_gated, w_layout, sorted_ids, expert_ids, num_padded,
    block_size, num_pairs, tokens, top_k, bias, act, gated, alpha, beta, limit, row_weight, round_to, rule, out_dtype,
    config=None,
) -> _Plan:  # fmt: skip
    """The plan of ``grouped_gemm_packed`` for such arguments, x as ``pieces`` returns it."""
    blocks = 0 if expert_ids is None else expert_ids.shape[0]
    route = DENSE if expert_ids is None else SORTED if sorted_ids is not None else SELF
    key = (
        *(x.shape, x.stride(), w.shape, w.dtype, w_format, n, k, w_gated, w_layout, route.value, blocks, block_size),
        *(num_pairs, tokens, top_k, act, gated, alpha, beta, limit, round_to, rule, out_dtype, x.device, config),
        *(w_alpha is None, row_weight is None, None if bias is None else bias.dtype),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _PLANS:
            _plans.clear()
        strides = () if w_scale is None else w_scale.stride()
        scale_rows = 0 if w_scale is None else w_scale.shape[2]
        plan = _plans[key] = _plan(*key, w.stride(), strides, scale_rows)
    return plan


def _plan(
    shape, stride, w_shape, w_dtype, w_format, n, k, w_gated, w_layout, route, blocks, block, num_pairs, tokens, top_k, act,
    gated, alpha, beta, limit, round_to, rule, out_dtype, device, config, no_alpha, no_weight, bias, w_stride, s_stride, scale_rows,
) -> _Plan:  # fmt: skip
    """Everything about a launch that follows from sizes."""
    f = FORMATS[w_format] if w_format else None
    kind = "" if f is None else ("e4m3" if f.element.bits == 6 else f.element.name)
    experts = w_shape[0]
    if route == DENSE.value:
        block = 16 if num_pairs <= 32 else 64 if num_pairs <= 2048 else 128 if kind else 256
    elif route == SELF.value:
        block = 16
        if tokens == 1 or num_pairs > 64:  # a token's experts differ; many pairs over even more experts mostly do
            route = PAIR.value
    if not 16 <= block <= 256:
        raise ValueError(f"the alignment has blocks of {block} pairs, packed weights need 16, 32, 64, 128 or 256")
    if n * k >= 2**31:
        raise ValueError(f"the weight has {n} x {k} elements a matrix, 32-bit offsets reach 2^31: split its rows")
    ptx = device.type in ("cuda", "meta") and torch.version.hip is None  # meta: to compile without a device
    if f is None:
        rows, width = w_shape[1:]
        strips, strides, tail = -(-rows // 16), (w_stride[0], width, 0, 0), 0 if k == width else 2
    else:
        rows, strips, width = scale_rows, w_shape[2], w_shape[1] * (64 if kind == "e2m1" else 32)
        strides, tail = (
            (w_stride[0] // 4, w_stride[1] // 4, s_stride[0], s_stride[1]),
            2 if k < width else int(k % 128 != 0),
        )
    units, shared, dependent, wgmma = _facts(device)
    count = shape[0] if len(shape) == 3 else 1
    largest = max(shape[-2] * stride[-2] * count, num_pairs * n)
    problem = Problem(kind, 32 if f is None else f.block, num_pairs, experts, strips * 16, k)
    served = kind != "" and route == SORTED.value and block == 256 and count == 1 and tail < 2 and strips >= 8
    served = wgmma and served and round_to == "" and (act != "") == w_gated
    if config is not None and config.specialized and not served:
        raise ValueError(
            "a specialized configuration serves quantized weights of 128 rows and more, bf16 x, whole K tiles, sorted blocks of 256 pairs, "
            "gates exactly with an activation and results that are not rounded, on sm_90: give this product another one"
        )
    c = config or config_for(problem, block, device, units, shared, served)
    if c.specialized:
        from .specialized import _grouped_gemm_specialized_kernel

        sizes = (experts, n, k, strips, *strides, stride[-2], num_pairs, c.group, alpha, beta, limit)
        constants = (
            *(c.pairs, kind, problem.block, tail, c.stages, w_layout == "interleaved", act, limit != math.inf),
            *(not no_alpha, bias is not None, not no_weight, largest >= 2**31, top_k, takes_registers(), *ROLES),
        )
        programs, options = min(units, blocks * -(-strips // 8)), {"num_warps": c.warps}
        return _Plan(_grouped_gemm_specialized_kernel, sizes, constants, options, programs, 0, 0, device)
    if config is None and c.pairs == 128 and not wgmma:  # activations are in registers too, and four warps have too few
        c = replace(c, warps=8)
    parts = block // c.pairs if route == SORTED.value else 1
    blocks = -(-num_pairs // c.pairs) if route == DENSE.value else blocks * parts
    pdl = c.pdl and dependent and (config is not None or (top_k == 1 and tokens < num_pairs))  # GEMM 2 follows GEMM 1
    tiles = -(-strips * 16 // c.rows)
    options = {"num_warps": c.warps, "num_stages": c.stages if torch.version.hip is None else 2}
    if c.maxnreg and ptx:
        options["maxnreg"] = _REGISTERS.get(c.maxnreg, c.maxnreg)
    if pdl:
        options["launch_pdl"] = True
    sizes = (
        *(experts, n, k, strips, rows, *strides, stride[-2], stride[0] if count > 1 else 0, num_pairs, blocks),
        *(alpha, beta, limit),
    )
    constants = (
        *(
            c.pairs,
            parts,
            c.rows,
            c.step,
            kind,
            problem.block,
            route,
            c.split,
            c.group,
            c.levels,
            tail,
            strips * 16 < c.rows,
            c.mask,
        ),
        *(count, c.evict, w_gated, w_layout == "interleaved", act, limit != math.inf, not no_alpha, bias is not None),
        *(not no_weight, FORMATS[round_to].element.name if round_to else "", rule),
        *(largest >= 2**31, top_k, pdl, ptx, wgmma and kind != "" and takes_registers(), INTERPRET),
    )
    partial = blocks * tiles * c.split * c.pairs * c.rows if c.split > 1 else 0
    return _Plan(
        _grouped_gemm_packed_kernel,
        sizes,
        constants,
        options,
        blocks * tiles * c.split,
        partial,
        blocks * tiles,
        device,
    )


def _launch(plan: _Plan, tensors: tuple[Tensor, ...]) -> None:
    plan.launch(*tensors)
