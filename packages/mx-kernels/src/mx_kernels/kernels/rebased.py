"""Re-based MXFP8 on FP8 tensor cores that know no block scales (Hopper): one power of two per row instead of one per 32.

    y[p, n] = x_scale[p] * w_scale[e, n] * sum_k x[p, k] * w[e, n, k]        x [R, K], w [E, N, K] float8_e4m3fn

``rebase_rows`` makes x: MXFP8 (RCEIL) per 32, then each code times 2^(block exponent - row exponent), rounded to E4M3 again;
only codes that become subnormal or vanish can change. Rows lie in the order of the tile list (row r of tile r // BM), so x and w
arrive by TMA; MXFP4's words are decoded in registers (``rebased_fp4.py`` has their layout). Weight rows of a gated layer come as
[8 gate | 8 up] per 16: both halves of a pair meet in one thread. A result may be quantized to MXFP8 as it is stored, from which
``rebase_rows`` goes on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..choose import Unsupported
from ..tuning import Problem, together
from .ahead import CHUNK, ask, rows_at
from .bits import e8m0_reciprocal, e8m0_value
from .dot import drained
from .finish import activated
from .grouped_gemm import counters
from .launch import Address, Launch, early_options, starts_early, takes_registers, target
from .slots import gather_rows, slots


@triton.jit
def _rceil(amax):
    """Scale bytes from the float32 bits of blocks' largest magnitudes; 254 where one is not finite."""
    e = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(amax >= 0x7F800000, 254, tl.maximum(e, 0))


@triton.jit
def _codes(v, e):
    """float32 / 2^(e - 127) as E4M3; e broadcast over the blocks of v. By RCEIL only infinities are above 448: the conversion
    saturates them."""
    return (v * e8m0_reciprocal(e)).to(tl.float8e4nv)


@triton.jit
def _load_blocks(x, x_scale, live, start, K: tl.constexpr, WIDTH: tl.constexpr, CODES: tl.constexpr):
    """Blocks of 32 from ``start`` on, of the rows at x [R] that are live: MXFP8 codes' values [R, WIDTH/32, 32] and scale bytes, 255
    where a block is not a number."""
    block = start // 32 + tl.arange(0, WIDTH // 32)
    k = block[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    v = tl.load(x[:, None, None] + k, mask=live[:, None, None] & (k < K), other=0.0).to(tl.float32)
    if CODES:
        inside = live[:, None] & (block < K // 32)[None, :]
        return v, tl.load(x_scale[:, None] + block[None, :], mask=inside, other=0).to(tl.int32)
    amax = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    e = _rceil(amax)
    return _codes(v, e[:, :, None]).to(tl.float32), tl.where(amax > 0x7F800000, 255, e)


@triton.jit
def _store_blocks(out, live, start, v, e, top, K: tl.constexpr, WIDTH: tl.constexpr):
    """Codes of the blocks, folded by 2^(e - top)."""
    k = start + tl.arange(0, WIDTH // 32)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    q = v * (tl.maximum(127 + e - top[:, None], 0) << 23).to(tl.float32, bitcast=True)[:, :, None]
    tl.store(out[:, None, None] + k, q.to(tl.float8e4nv), mask=live[:, None, None] & (k < K))


@triton.jit
def _rebase_rows_kernel(
    x, x_scale, out, scale, sorted_ids, num_padded, x_stride, n_pairs, top_k,
    K: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, CODES: tl.constexpr, LISTED: tl.constexpr,
    GATHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows. CODES: x is MXFP8 with scale bytes x_scale [M, K / 32]. LISTED: only rows that are slots of a tile list with a pair,
    which are of x's row sorted_ids[r] // top_k where GATHER; otherwise all of n_pairs rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if LISTED:
        there, r, live, token = slots(sorted_ids, num_padded, n_pairs, top_k, R)
        if not there:
            return
        source = token if GATHER else r
    else:
        r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        live = r < n_pairs
        source = r
    x += source * x_stride
    x_scale += source * (K // 32)
    out += r * K
    v, e = _load_blocks(x, x_scale, live, 0, K, FIRST, CODES)
    top = tl.max(e, 1)
    if REST > 0:
        v2, e2 = _load_blocks(x, x_scale, live, FIRST, K, REST, CODES)
        top = tl.maximum(top, tl.max(e2, 1))
        _store_blocks(out, live, FIRST, v2, e2, top, K, REST)
    _store_blocks(out, live, 0, v, e, top, K, FIRST)
    tl.store(scale + r, e8m0_value(top), mask=live)


def _needs_fp8(device: torch.device) -> None:
    """Raise Unsupported where an accelerator has no FP8 conversions and products that Triton can use."""
    if device.type in ("cuda", "xpu") and not target(device).fp8:
        raise Unsupported(
            f"{device} has no FP8 matrix units that re-based products can use (NVIDIA sm_89 and later have): use packed or "
            "quantized weights there (mx_moe's fused experts do)"
        )


COPIED = 1 << 26
"""Codes from which on tokens are re-based once each and copied to their slots, instead of once a slot: two launches."""


def copies(pairs: int, k: int, top_k: int) -> bool:
    """Whether tokens of K codes are re-based once each and copied."""
    return top_k > 1 and pairs * k >= COPIED


def rebase_rows(
    x: Tensor, x_scale: Tensor | None, sorted_ids: Tensor | None, num_padded: Tensor | None, num_pairs: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """x [M, K], or MXFP8 codes with scale bytes [M, K / 32] -> codes uint8 and scales float32 of M rows, or of each slot; the op's
    arguments."""
    _needs_fp8(x.device)
    k, rows = x.shape[1], x.shape[0] if sorted_ids is None else sorted_ids.shape[0]
    if copies(num_pairs, k, top_k):
        assert sorted_ids is not None
        assert num_padded is not None
        codes, once = rebase_rows(x, x_scale, None, None, 0, 0)
        words, slot_scale = gather_rows(codes.view(torch.int32), sorted_ids, num_padded, num_pairs, top_k, once)
        assert slot_scale is not None
        return words.view(torch.uint8), slot_scale
    out = torch.empty(rows, k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if not rows or not k:
        return out, scale
    coded, listed = x_scale is not None, sorted_ids is not None
    run = plan_rows(rows, k, x.dtype, x.stride(0), coded, num_pairs if listed else None, top_k, x.device)
    run(
        *(x.view(torch.float8_e4m3fn), x_scale) if coded else (x, out), out.view(torch.float8_e4m3fn), scale,
        *(sorted_ids, num_padded) if listed else (scale, scale),
    )  # fmt: skip
    return out, scale


@functools.lru_cache(maxsize=4096)
def plan_rows(
    rows: int, k: int, dtype: torch.dtype, stride: int, coded: bool, pairs: int | None, top_k: int, device: torch.device
) -> Launch:
    """The launch for (x, x_scale, out, scale, sorted_ids, num_padded): out's bytes for x_scale where x is not ``coded``, and scale for
    the last two where there is no tile list, ``pairs`` None."""
    first, rest = _split(k)
    r = _rows_of_a_program(first)
    return Launch(
        _rebase_rows_kernel, (-(-rows // r),), device, stride, rows if pairs is None else pairs, top_k or 1,
        K=k, R=r, FIRST=first, REST=rest, CODES=coded, LISTED=pairs is not None, GATHER=top_k > 0, num_warps=_warps(first, r),
        **early_options(pairs is not None and starts_early("rebase_rows", pairs, device)),
    )  # fmt: skip


def _rows_of_a_program(first: int) -> int:
    """Rows that a program re-bases."""
    return max(1, min(8, 8192 // first))


def _warps(first: int, rows: int) -> int:
    """For some 32 values a thread."""
    return max(1, min(8, first * rows // 1024))


def _split(k: int) -> tuple[int, int]:
    """K as two powers of two that cover it with less waste than one (2880: 2048 + 1024)."""
    one = triton.next_power_of_2(k)
    rest = max(32, triton.next_power_of_2(k - one // 2)) if k > one // 2 >= 32 else one
    return (one, 0) if rest > one // 4 or one == k else (one // 2, rest)


@triton.jit
def _tile_of(pid, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tiles in groups of GROUP token tiles, token tile fastest: a wave of programs shares few rows of both operands."""
    per_group = GROUP * n_tiles
    first = (pid // per_group) * GROUP
    size = tl.maximum(tl.minimum(m_tiles - first, GROUP), 1)
    inside = pid % per_group
    return first + inside % size, inside // size


@triton.jit
def _decode_words(w, low, high):
    """Words [.., 4] (each four times), and the E4M3 bytes of E2M1's 0, 0.5, 1, 1.5 and 2, 3, 4, 6 under the scale of its block:
    its first and its last four codes, two float8e4nv [.., 4]. A call of the assembly takes the four of a word."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 m, p;
        and.b32 m, $2, 0x77777777;
        prmt.b32 p, $6, $10, m;
        lop3.b32 $0, $2, 0x80808080, p, 0xEA;
        shr.u32 m, m, 16;
        prmt.b32 p, $6, $10, m;
        shl.b32 m, $2, 4;
        lop3.b32 $1, m, 0x80808080, p, 0xEA;
        }
        """,
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, low, high],
        dtype=(tl.float8e4nv, tl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _plain_words(w, octave):
    """``_decode_words`` without assembly; octave: of the block."""
    i = tl.arange(0, 4)[None, None, None, :]
    return _e4m3_of(w >> (4 * i), w >> (8 * i + 7), octave), _e4m3_of(w >> (16 + 4 * i), w >> (8 * i + 3), octave)


@triton.jit
def _e4m3_of(magnitude, sign, octave):
    m = magnitude & 7
    byte = tl.where(m > 1, 8 + 4 * m, 8) + 8 * octave
    return (tl.where(m > 0, byte, 0) | ((sign & 1) << 7)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _fp4_tile(words, octaves, N: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr):
    """int32 [BK / 64, N / 16, 128] and uint8 [N, BK / 32] -> float8e4nv [N, BK]."""
    BLOCKS: tl.constexpr = BK // 32
    w = words.reshape(BK // 64, N // 16, 8, 4, 2, 2).trans(1, 4, 2, 0, 5, 3).reshape(N, BLOCKS, 4)  # .., c
    w = w[:, :, :, None].broadcast_to(N, BLOCKS, 4, 4)
    octave = octaves.to(tl.int32)
    if PTX:
        low = (octave * 0x08080800 + 0x14100800)[:, :, None, None].broadcast_to(N, BLOCKS, 4, 4)
        high = (octave * 0x08080808 + 0x24201C18)[:, :, None, None].broadcast_to(N, BLOCKS, 4, 4)
        first, last = _decode_words(w, low, high)
    else:
        first, last = _plain_words(w, octave[:, :, None, None])
    return tl.join(first, last).trans(0, 1, 4, 2, 3).reshape(N, BK)


@triton.jit(do_not_specialize=["ahead"])
def _grouped_gemm_rebased_kernel(
    x, w, octaves, x_scale, w_scale, y, y_scale, sorted_ids, expert_ids, num_padded, bias, row_weight,
    partial, counter, n_pairs, N, N_OUT, ahead,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, PROMOTE: tl.constexpr, FP4: tl.constexpr, PTX: tl.constexpr, DRAIN: tl.constexpr, BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, SCATTER: tl.constexpr, QUANTIZE: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x, w: descriptors; FP4: w is the pointer to MXFP4's words, BK is 128, and SWAP is set (weights from registers are the left
    operand); else octaves is the pointer to w, and ahead says whether it is asked for before the kernel in front has ended (``ahead.py``).
    SPLIT programs share a tile's K loop; the last of them to arrive adds up, in a fixed order, what each stored in
    partial [tiles, SPLIT, values of a tile], and leaves counter [tiles] at zero."""
    if PDL:  # noqa: SIM102
        if FP4 or ahead == 0:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    m_tiles = tl.load(num_padded) // BM
    n_tiles = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    tile, pid_n = _tile_of(pid // SPLIT, m_tiles, n_tiles, GROUP)
    if (tile >= m_tiles) | (pid_n >= n_tiles):
        if PDL and not FP4:  # noqa: SIM102
            if pid == 0:  # which whatever starts behind this kernel relies on
                tl.extra.cuda.gdc_wait()
        return
    expert = tl.load(expert_ids + tile)
    steps = tl.cdiv(K, BK)
    if PDL and not FP4:  # noqa: SIM102
        if ahead != 0:
            at, there = rows_at(pid_n * BN, N, K, K, pid % SPLIT, BN, BK, 1, SPLIT)
            ask(octaves + expert.to(tl.int64) * N * K, at, there, CHUNK)
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    if FP4:
        strips = tl.cdiv(N, 16)
        strip = tl.minimum(pid_n * (BN // 16) + tl.arange(0, BN // 16), strips - 1)
        weight_row = tl.minimum(pid_n * BN + tl.arange(0, BN), strips * 16 - 1)
        part = tl.arange(0, BK // 64)[:, None, None] * (strips * 128)
        w_at = w + expert.to(tl.int64) * tl.cdiv(K, 64) * (strips * 128)
        w_at += part + strip[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
        octave_at = octaves + expert.to(tl.int64) * steps * (strips * 64)
        octave_at += weight_row[:, None] * 4 + tl.arange(0, 4)[None, :]
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for i in range(steps // SPLIT):
        step = i * SPLIT + pid % SPLIT
        xt = x.load([tile * BM, step * BK])
        if FP4:
            wt = _fp4_tile(
                tl.load(w_at + step * (strips * 256)), tl.load(octave_at + step * (strips * 64)), BN, BK, PTX
            )
        else:
            wt = w.load([expert * N + pid_n * BN, step * BK])
        if FP4:
            if PROMOTE:  # the compiler splits a product along K whose left operand is in registers: promote by hand
                acc += tl.dot(wt, xt.T, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(wt, xt.T, acc)
                if DRAIN:
                    acc = drained(acc)
        elif SWAP:
            if PROMOTE:
                acc = tl.dot(wt, xt.T, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(wt, xt.T, acc)
        else:
            if PROMOTE:
                acc = tl.dot(xt, wt.T, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(xt, wt.T, acc)
    if SPLIT > 1:
        slot = tile * n_tiles + pid_n
        at = partial + slot.to(tl.int64) * (SPLIT * BM * BN)
        at += tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        tl.store(at + pid % SPLIT * (BM * BN), acc)
        tl.debug_barrier()
        if tl.atomic_add(counter + slot, 1, sem="acq_rel", scope="gpu") < SPLIT - 1:
            return
        acc = tl.zeros_like(acc)
        for part in tl.static_range(SPLIT):
            acc += tl.load(at + part * (BM * BN), cache_modifier=".cg")
        tl.store(counter + slot, 0)
    if SWAP:
        acc = acc.trans()
    n = pid_n * BN + tl.arange(0, BN)
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    pair = tl.load(sorted_ids + row)
    live = pair < n_pairs
    ws = tl.load(w_scale + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
    xs = tl.load(x_scale + row, mask=live, other=0.0)
    acc = acc * xs[:, None] * ws[None, :]
    if BIAS:
        acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(acc.reshape(BM, BN // 16, 2, 8).permute(0, 1, 3, 2))
        gate = gate.reshape(BM, BN // 2)
        up = up.reshape(BM, BN // 2)
        CLAMP: tl.constexpr = float("inf") > LIMIT
        acc = activated(gate, up, ALPHA, BETA, LIMIT, KIND, True, CLAMP, PTX)
        n = pid_n * (BN // 2) + tl.arange(0, BN // 2)
    if WEIGHTED:
        acc = acc * tl.load(row_weight + pair, mask=live, other=0.0)[:, None]
    target = pair.to(tl.int64) if SCATTER else row
    inside = live[:, None] & (n < N_OUT)[None, :]
    if QUANTIZE:
        v = acc.reshape(BM, acc.shape[1] // 32, 32)
        amax = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
        e = _rceil(amax)
        codes = _codes(v, e[:, :, None]).reshape(BM, acc.shape[1])
        tl.store(y + target[:, None] * N_OUT + n[None, :], codes, mask=inside)
        block = pid_n * (acc.shape[1] // 32) + tl.arange(0, acc.shape[1] // 32)
        at = y_scale + target[:, None] * (N_OUT // 32) + block[None, :]
        byte = tl.where(amax > 0x7F800000, 255, e)
        tl.store(at, byte.to(tl.uint8), mask=live[:, None] & (block < N_OUT // 32)[None, :])
    else:
        tl.store(y + target[:, None] * N_OUT + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


def tile_config(block_m: int, promote: bool, fp4: bool = False, quantize: bool = False) -> dict[str, int | bool]:
    """Tile of weight rows, warps and stages for a block of ``block_m`` tokens: the fastest measured (docs/performance.md).

    Promoted sums need twice the registers: with the weight rows on the instruction's M side (SWAP) 128 x 256 does not spill. FP4
    promoted in blocks of 128 takes three programs of 64 rows a multiprocessor, since they wait for every product; where the result is
    quantized, they need to be held to the registers for that.
    """
    if fp4 and block_m >= 128 and promote:
        return {"BN": 64, "num_warps": 4, "num_stages": 3, "SWAP": True} | ({"maxnreg": 168} if quantize else {})
    if fp4:
        return {"BN": 128, "num_warps": 4, "num_stages": 4, "SWAP": True}
    if block_m >= 128:
        return {"BN": 256, "num_warps": 8, "num_stages": 4, "SWAP": promote}
    if block_m == 64:
        return {"BN": 128, "num_warps": 4, "num_stages": 4, "SWAP": False}
    if block_m == 32:
        return {"BN": 128, "num_warps": 4, "num_stages": 5, "SWAP": True}
    return {"BN": 64, "num_warps": 4, "num_stages": 7, "SWAP": True}


def _split_of(n: int, k: int, experts: int, pairs: int, rows: int, step: int, device: torch.device) -> int:
    """Programs that share a tile's K loop: where tiles are fewer than half of the multiprocessors, two a multiprocessor."""
    tiles = -(-n // rows) * Problem("e4m3", 32, pairs, experts, n, k).active
    units, steps = target(device).units, -(-k // step)
    if pairs > 64 or 2 * tiles > units:
        return 1
    found = (s for s in (2, 4, 8) if s * tiles <= 2 * units and steps % s == 0 and steps >= 8 * s)
    return max(found, default=1)


@dataclass(frozen=True)
class Product:
    """A product without its tensors. launch: for (x, w, octaves, x_scale, w_scale, y, y_scale, sorted_ids, expert_ids, num_padded,
    bias, row_weight, partial, counter), y where absent (w for octaves, sorted_ids for counter). partial: float32 values, and counters:
    int32 zeros, of a split K. asks: whether weights can be asked for early (MXFP4's cannot: its kernels took other registers and were
    1 to 9% slower).
    """

    launch: Launch
    partial: int
    counters: int
    asks: bool

    @functools.cached_property
    def behind(self) -> Launch:
        """The same behind a kernel that began when the alignment had ended: weights are asked for before that kernel has (``ahead.py``)."""
        return self.launch.having(ahead=1) if self.asks else self.launch


@functools.lru_cache(maxsize=4096)
def plan_product(
    capacity: int, k: int, experts: int, n: int, fp4: bool, block_m: int, pairs: int, bias: torch.dtype | None, weighted: bool,
    scatter: bool, activation: str, alpha: float, beta: float, limit: float, promote: bool, quantize: bool, out_dtype: torch.dtype,
    device: torch.device, wgmma: bool, config: tuple[tuple[str, int | bool], ...],
) -> Product:  # fmt: skip
    """Everything about a product's launch that follows from sizes; the arguments of ``grouped_gemm_rebased``."""
    promote = promote or (fp4 and block_m < 64)  # where it costs next to nothing
    c = {**tile_config(block_m, promote, fp4, quantize), **dict(config)}
    bn, bk, group = c.pop("BN"), c.pop("BK", 128), c.pop("GROUP", 8)
    split = c.pop("SPLIT", 0) or _split_of(n, k, experts, pairs, bn, bk, device)
    slots = -(-(capacity // block_m) // group) * group * -(-n // bn)
    boxes = [(0, (capacity, k), (block_m, bk)), (1, (experts * n, k), (bn, bk))]  # w too, where it is E4M3
    live = max(Problem("e4m3", 32, pairs, experts, n, k).active, pairs / block_m) * -(-n // bn) * split
    lets = starts_early("rebased", pairs, device)
    most = together(live, k / split, target(device).units) if lets else None
    run = Launch(
        _grouped_gemm_rebased_kernel, (slots * split,), device, pairs, n, n // 2 if activation else n, 0,
        K=k, BM=block_m, BN=bn, BK=bk, GROUP=group, SPLIT=split, SWAP=c.pop("SWAP"), PROMOTE=promote, FP4=fp4, PTX=wgmma,
        DRAIN=wgmma and takes_registers(),
        BIAS=bias is not None, WEIGHTED=weighted, SCATTER=scatter, QUANTIZE=quantize,
        GATED=bool(activation), KIND=activation, ALPHA=alpha, BETA=beta, LIMIT=limit, **c,
        **early_options(most is not None, lets), most=most or 0,
        boxes=tuple((at, functools.partial(_descriptor, shape=shape, box=box)) for at, shape, box in boxes[: 1 if fp4 else 2]),
    )  # fmt: skip
    partial, counters = (slots * split * block_m * bn, slots) if split > 1 else (0, 0)
    return Product(run, partial, counters, most is not None and not fp4)


def _descriptor(base: Tensor | int, shape: tuple[int, int], box: tuple[int, int]) -> TensorDescriptor:
    """A contiguous matrix of E4M3, or of its bytes, or what lies at an address, for the copy engine."""
    fp8 = torch.float8_e4m3fn
    return TensorDescriptor(
        base.view(fp8) if isinstance(base, Tensor) else Address(base, fp8), [*shape], [shape[1], 1], [*box]
    )


def grouped_gemm_rebased(
    x: Tensor, x_scale: Tensor, w: Tensor, w_octaves: Tensor | None, w_scale: Tensor, sorted_ids: Tensor, expert_ids: Tensor,
    num_padded: Tensor, block_m: int, num_pairs: int, *, bias: Tensor | None = None, row_weight: Tensor | None = None,
    scatter: bool = False, activation: str = "", alpha: float = 0.0, beta: float = 0.0, limit: float = math.inf,
    promote: bool = True, quantize: bool = False, out_dtype: torch.dtype = torch.bfloat16, config: dict | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x bytes of E4M3 in tile order [capacity, K] -> [capacity, N_out] in tile order, or [num_pairs, N_out] if ``scatter``; with
    ``quantize`` codes and scale bytes of MXFP8, otherwise the second is empty."""
    _needs_fp8(x.device)
    (experts, n), k, fp4 = w_scale.shape, x.shape[1], w_octaves is not None
    n_out = n // 2 if activation else n
    rows, fp8 = num_pairs if scatter else x.shape[0], torch.float8_e4m3fn
    y = torch.empty(rows, n_out, dtype=torch.uint8 if quantize else out_dtype, device=x.device)
    y_scale = torch.empty((rows, n_out // 32) if quantize else 0, dtype=torch.uint8, device=x.device)
    if x.shape[0] < block_m or y.numel() == 0:
        return y, y_scale
    p = plan_product(
        x.shape[0], k, experts, n, fp4, block_m, num_pairs, None if bias is None else bias.dtype, row_weight is not None,
        scatter, activation, alpha, beta, limit, promote, quantize, out_dtype, x.device, target(x.device).wgmma,
        tuple((config or {}).items()),
    )  # fmt: skip
    partial, counter = y, sorted_ids
    if p.partial:
        partial = torch.empty(p.partial, dtype=torch.float32, device=x.device)
        counter = counters(x.device, p.counters)
    p.launch(
        x, w.view(torch.int32) if fp4 else w, w_octaves if fp4 else w, x_scale, w_scale,
        y.view(fp8) if quantize else y, y_scale, sorted_ids, expert_ids, num_padded, bias if bias is not None else y,
        row_weight if row_weight is not None else y, partial, counter,
    )  # fmt: skip
    return y, y_scale
