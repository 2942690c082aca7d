"""Grouped GEMM on packed weights and 16-bit activations: ``packing.py`` has the layout, ``dot.py`` the K loop.

    y[p, j] = row_weight[p] * act(alpha[e] * sum_k w[e, n, k] * x[p // top_k, k] + bias[e, n])      e: the expert of pair p

A program computes N weight rows times up to BM pairs of one expert, the rows it needs gathered from x. Which pairs: from the
alignment (sorted_ids, expert_ids, num_padded), from the expert of each pair alone (up to 64 pairs: every program finds the
pairs of its expert by comparing ids), or all rows in order (a linear layer).

Blocks that hold few pairs run a narrower loop than full ones (LEVELS), so that one decoded weight tile serves a whole
expert without multiplying by rows that are not there. With split K, each program stores its partial sums, and the last
to arrive adds them up in a fixed order, so the result does not depend on which one that is.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from ..tuning import Config, choose_config
from .dot import packed_dot

SORTED: tl.constexpr = tl.constexpr(0)
PAIR: tl.constexpr = tl.constexpr(1)
SELF: tl.constexpr = tl.constexpr(2)
DENSE: tl.constexpr = tl.constexpr(3)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _gate(g, alpha, KIND: tl.constexpr):
    if KIND == "silu":
        return g * tl.sigmoid(g)
    elif KIND == "swiglu_oai":
        return g * tl.sigmoid(alpha * g)
    elif KIND == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
    elif KIND == "relu2":
        r = tl.maximum(g, 0.0)
        return r * r
    else:
        return g


@triton.jit
def _finish(
    acc,  # [N, M]
    y,
    pair,  # [M]
    live,
    scale,  # float32, alpha[e]
    bias,  # the expert's
    row_weight,
    row0,  # the tile's first packed row
    n,  # logical weight rows
    act_alpha,
    act_beta,
    act_limit,
    N: tl.constexpr,
    M: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Scale, bias, activation, row weight, store."""
    if HAS_ALPHA:
        acc = acc * scale
    if GATED and ACT != "":
        half = n // 2
        j = row0 // 2 + tl.arange(0, N // 2)
        inside = j < half
        g, u = tl.split(acc.reshape(N // 16, 2, 8, M).permute(0, 2, 3, 1))
        g = g.reshape(N // 2, M)
        u = u.reshape(N // 2, M)
        if HAS_BIAS:
            if INTERLEAVED:
                g += tl.load(bias + 2 * j, mask=inside, other=0.0).to(tl.float32)[:, None]
                u += tl.load(bias + 2 * j + 1, mask=inside, other=0.0).to(tl.float32)[:, None]
            else:
                g += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)[:, None]
                u += tl.load(bias + half + j, mask=inside, other=0.0).to(tl.float32)[:, None]
        if LIMIT:
            g = tl.minimum(g, act_limit)
            u = tl.minimum(tl.maximum(u, -act_limit), act_limit)
        if ACT == "swiglu_oai":
            u = u + act_beta
        o = _gate(g, act_alpha, ACT) * u
        width = half
    else:
        row = row0 + tl.arange(0, N)
        if GATED:  # rows back to where the weight had them
            half = n // 2
            index = row // 16 * 8 + row % 8
            up = row % 16 // 8
            if INTERLEAVED:
                j = 2 * index + up
            else:
                j = up * half + index
            inside = index < half
        else:
            j = row
            inside = j < n
        o = acc
        if HAS_BIAS:
            o += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)[:, None]
        if ACT != "":
            if LIMIT:
                o = tl.minimum(o, act_limit)
            o = _gate(o, act_alpha, ACT)
        width = n
    if HAS_WEIGHT:
        o = o * tl.load(row_weight + pair, mask=live, other=0.0)[None, :]
    o = o.to(y.dtype.element_ty).trans()
    tl.store(y + pair[:, None] * width + j[None, :], o, mask=live[:, None] & inside[None, :])


@triton.jit
def _tile(
    x, w, s, y, sorted_ids, bias, row_weight, partial, counter,
    first, pair, count, scale, strip0, strips, rows, w_step, s_step, n, k, x_stride, piece_stride, pairs, slot, split,
    act_alpha, act_beta, act_limit,
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    TAIL: tl.constexpr, CLAMP: tl.constexpr, MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, RELOAD: tl.constexpr, PTX: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """N weight rows times M pairs: K loop, reduction over splits, epilogue."""
    live = pair < pairs
    pair = tl.where(live, pair, 0)
    if WIDE:
        pair = pair.to(tl.int64)
    if CLAMP:  # fewer rows than N: repeat the last
        strip = tl.minimum(strip0 + tl.arange(0, N // 16), strips - 1)
        row = tl.minimum(strip0 * 16 + tl.arange(0, N), rows - 1)
    else:
        strip = strip0 + tl.arange(0, N // 16)
        row = strip0 * 16 + tl.arange(0, N)
    steps = tl.cdiv(k, BK)
    if SPLIT > 1:
        steps = (steps - split + SPLIT - 1) // SPLIT
    acc = packed_dot(
        tl.zeros((N, M), tl.float32), x, pair // TOP_K * x_stride, live, w, s, row if KIND == "" else strip, row,
        w_step, s_step, k, split, steps, piece_stride,
        N, M, BK, KIND, BLOCK, SPLIT, TAIL, MASK_ROWS, PIECES, EVICT, PTX, INTERPRET,
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
        if (
            RELOAD
        ):  # frees the registers that hold them during the K loop; another cache modifier, or the two loads become one
            pair = tl.load(sorted_ids + first + tl.arange(0, M), cache_modifier=".cg")
            live = pair < pairs
            pair = tl.where(live, pair, 0)
            if WIDE:
                pair = pair.to(tl.int64)
        _finish(
            acc, y, pair, live, scale, bias, row_weight, strip0 * 16, n, act_alpha, act_beta, act_limit,
            N, M, GATED, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
        )  # fmt: skip


@triton.jit
def _pairs(sorted_ids, first, pairs, M: tl.constexpr, ROUTE: tl.constexpr):
    """int32 [M]: the pairs of a block; ``pairs`` or more where there is none."""
    column = first + tl.arange(0, M)
    if ROUTE == SORTED:
        return tl.load(sorted_ids + column)
    else:
        return column


@triton.jit
def _grouped_gemm_packed_kernel(
    x, w, s, y, sorted_ids, expert_ids, num_padded, alpha, bias, row_weight, partial, counter,
    experts, n, k, strips, rows, w_expert, w_step, s_expert, s_step, x_stride, piece_stride, pairs, blocks,
    act_alpha, act_beta, act_limit,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, ROUTE: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, TAIL: tl.constexpr, CLAMP: tl.constexpr,
    MASK_ROWS: tl.constexpr, PIECES: tl.constexpr, EVICT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WIDE: tl.constexpr, TOP_K: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K]; w, s: packed; y [P, N_out]; bias [E, n]; partial [blocks * tiles, SPLIT, BM, N], counter [blocks * tiles]."""
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
        if ROUTE == SORTED:
            if block * BM >= tl.load(num_padded):
                return
    else:  # GROUP blocks share the weight tiles that they read from the second-level cache
        if ROUTE == SORTED:
            blocks = tl.load(num_padded) // BM
        if pid >= blocks * tiles:
            return
        first = pid // (GROUP * tiles) * GROUP
        size = tl.minimum(blocks - first, GROUP)
        block = first + pid % (GROUP * tiles) % size
        tile = pid % (GROUP * tiles) // size
    column = tl.arange(0, BM)
    if ROUTE == DENSE:
        pair = _pairs(sorted_ids, block * BM, pairs, BM, ROUTE)
        count = tl.minimum(pairs - block * BM, BM)
    elif ROUTE == SORTED:
        e = tl.load(expert_ids + block)
        pair = _pairs(sorted_ids, block * BM, pairs, BM, ROUTE)
        count = tl.sum((pair < pairs).to(tl.int32), 0)  # padding follows the pairs
    elif ROUTE == PAIR:
        e = tl.load(expert_ids + block)
        pair = tl.where(column == 0, block, pairs)
        count = 1
    else:
        other = tl.arange(0, 64)
        ids = tl.load(expert_ids + other, mask=other < pairs, other=-1)
        e = tl.load(expert_ids + block)
        same = ids == e
        rank = tl.cumsum(same.to(tl.int32), 0) - 1
        mine = tl.sum((same & (other < block)).to(tl.int32), 0)  # pairs of this expert before mine
        if mine % BM != 0:
            return  # another program computes this pair
        wanted = same[None, :] & (rank[None, :] == mine + column[:, None])
        pair = tl.sum(tl.where(wanted, other[None, :] - pairs, 0), 1) + pairs
        count = tl.minimum(tl.sum(same.to(tl.int32), 0) - mine, BM)
    if ROUTE != DENSE:
        if (e < 0) | (e >= experts):
            return
    strip0 = tile * (N // 16)
    if not CLAMP:
        strip0 = tl.minimum(
            strip0, strips - N // 16
        )  # the last tile ends at the last row: two tiles store the same values
    scale = 1.0
    if HAS_ALPHA:
        scale = tl.load(alpha + e)
    if ROUTE != DENSE:
        w += e.to(tl.int64) * w_expert
        s += e.to(tl.int64) * s_expert
        bias += e.to(tl.int64) * n
    slot = block * tiles + tile
    QUARTER: tl.constexpr = BM // 4 if LEVELS > 2 else BM
    HALF: tl.constexpr = BM // 2 if LEVELS > 1 else BM
    if LEVELS > 2 and count <= QUARTER:
        few = _pairs(sorted_ids, block * BM, pairs, QUARTER, ROUTE)
        _tile(
            x, w, s, y, sorted_ids, bias, row_weight, partial, counter, block * BM, few, count, scale, strip0, strips, rows, w_step, s_step, n, k,
            x_stride, piece_stride, pairs, slot, split, act_alpha, act_beta, act_limit, QUARTER, N, BK, KIND, BLOCK,
            SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
            WIDE, TOP_K, ROUTE == SORTED and BM > 32, PTX, INTERPRET,
        )  # fmt: skip
    elif LEVELS > 1 and count <= HALF:
        half = _pairs(sorted_ids, block * BM, pairs, HALF, ROUTE)
        _tile(
            x, w, s, y, sorted_ids, bias, row_weight, partial, counter, block * BM, half, count, scale, strip0, strips, rows, w_step, s_step, n, k,
            x_stride, piece_stride, pairs, slot, split, act_alpha, act_beta, act_limit, HALF, N, BK, KIND, BLOCK,
            SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
            WIDE, TOP_K, ROUTE == SORTED and BM > 32, PTX, INTERPRET,
        )  # fmt: skip
    else:
        _tile(
            x, w, s, y, sorted_ids, bias, row_weight, partial, counter, block * BM, pair, count, scale, strip0, strips, rows, w_step, s_step, n, k,
            x_stride, piece_stride, pairs, slot, split, act_alpha, act_beta, act_limit, BM, N, BK, KIND, BLOCK,
            SPLIT, TAIL, CLAMP, MASK_ROWS, PIECES, EVICT, GATED, INTERLEAVED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT,
            WIDE, TOP_K, ROUTE == SORTED and BM > 32, PTX, INTERPRET,
        )  # fmt: skip


# --- launching ---

INTERPRET = not isinstance(
    _grouped_gemm_packed_kernel, triton.JITFunction
)  # in Triton's interpreter bf16 products are wrong

_SIZES = ("experts", "n", "k", "strips", "rows", "w_expert", "w_step", "s_expert", "s_step", "x_stride")
_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_counters: dict[tuple[int, int], Tensor] = {}
_units: dict[int, int] = {}


def pieces(x: Tensor, dtype: torch.dtype) -> Tensor:  # [M, K] -> [pieces, M, K], or x itself
    """x as a sum of tensors of ``dtype``, which is exact: 11 bits of fp16 are two bf16 of 8 bits, 24 bits of fp32 are three."""
    if x.dtype == dtype:
        return x
    parts, rest = [], x.float()
    for _ in range(_PIECES[x.dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts)


def _counter(device: torch.device, count: int) -> Tensor:
    """Zeros that every launch leaves as zeros; one tensor a stream, made outside of CUDA graphs, or one a launch within."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device.index or 0, stream)
    held = _counters.get(key)
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 1 << 14), dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _counters[key] = held
    return held


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
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] -> [num_pairs, N_out]: ``packed_gemm._grouped_gemm_packed`` on an accelerator. ``config``: for measuring."""
    y = torch.empty((num_pairs, n // 2 if gated else n), dtype=out_dtype, device=x.device)
    if num_pairs == 0:
        return y
    f = FORMATS[w_format] if w_format else None
    kind = "" if f is None else ("e4m3" if f.element.bits == 6 else f.element.name)
    experts = w.shape[0]
    if expert_ids is None:
        route, block = 3, 64 if num_pairs > 32 else 16
        if num_pairs > 2048:
            block = 128
    elif sorted_ids is None:
        route, block = (1 if tokens == 1 or num_pairs > 64 else 2), 16
    else:
        route, block = 0, block_size
    if not 16 <= block <= 128:
        raise ValueError(f"the alignment has blocks of {block_size} pairs, packed weights need 16, 32, 64 or 128")
    dtype = w.dtype if f is None else torch.bfloat16
    x = pieces(x, dtype)
    count = x.shape[0] if x.ndim == 3 else 1
    units = _units.get(x.device.index or 0)
    if units is None:
        units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 0
        _units[x.device.index or 0] = units
    if f is None:
        rows, width = w.shape[1:]
        strips = -(-rows // 16)
        steps = (w.stride(0), width, 0, 0)
        tail = 0 if k == width else 2
    else:
        strips, width = w.shape[2], w.shape[1] * (64 if kind == "e2m1" else 32)
        rows = w_scale.shape[2]
        steps = (w.stride(0), w.stride(1), w_scale.stride(0), w_scale.stride(1))
        tail = 2 if k < width else int(k % 128 != 0)
    c = config or choose_config(kind, block, num_pairs, experts, strips * 16, k, units)
    tiles = -(-strips * 16 // c.rows)
    blocks = num_pairs if route in (1, 2) else expert_ids.shape[0] if route == 0 else -(-num_pairs // block)
    partial = counter = y
    if c.split > 1:
        partial = torch.empty((blocks * tiles * c.split * c.pairs * c.rows,), dtype=torch.float32, device=x.device)
        counter = _counter(x.device, blocks * tiles)
    ptx = x.device.type in ("cuda", "meta") and torch.version.hip is None  # meta: to compile without a device
    wide = x.numel() >= 2**31 or y.numel() >= 2**31
    has = (w_alpha is not None, bias is not None, row_weight is not None)
    options = {"num_warps": c.warps, "num_stages": c.stages}
    if c.maxnreg and ptx:
        options["maxnreg"] = c.maxnreg
    if c.pdl:
        options["launch_pdl"] = True
    _launch(
        (
            *(x, w if ptx or f is None else w.view(torch.int32), y if w_scale is None else w_scale, y),
            *(y if t is None else t for t in (sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight)),
            *(partial, counter, experts, n, k, strips, rows),
            *(steps if ptx or f is None else (steps[0] // 4, steps[1] // 4, *steps[2:])),
            *(x.stride(-2), x.stride(0) if count > 1 else 0, num_pairs, blocks, alpha, beta, limit),
        ),
        (
            *(block, c.rows, c.step, kind, 32 if f is None else f.block, route, c.split, c.group, c.levels, tail),
            *(strips * 16 < c.rows, c.mask, count, c.evict, w_gated, w_layout == "interleaved", act, limit != math.inf),
            *(*has, wide, top_k, c.pdl, ptx, INTERPRET),
        ),
        options,
        blocks * tiles * c.split,
    )
    return y


def _launch(args: tuple, constants: tuple, options: dict[str, int], programs: int) -> None:
    _grouped_gemm_packed_kernel[(programs,)](*args, *constants, **options)
