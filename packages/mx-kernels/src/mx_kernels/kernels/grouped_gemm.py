"""Launching the grouped GEMM on packed weights and 16-bit activations: ``packed_kernel.py`` has the kernel, ``specialized.py`` the one for
many pairs an expert on Hopper. Everything about a launch that follows from sizes is planned once.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..formats import FORMATS
from ..tuned import config_for
from ..tuning import JOIN, LARGE, SHARED, SMALL, UNITS, Config, Problem, overlaps, together
from .launch import Launch, early_options, starts_early, takes_registers, target
from .packed_kernel import DENSE, PAIR, SELF, SORTED, _grouped_gemm_packed_kernel

# From Triton 3.8 on the loops of 32 and 64 pairs spill at 168 registers, and need up to 208, that of 96 up to 240 (compiled for sm_90, not
# timed).
_REGISTERS = {160: 240, 168: 208} if tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8) else {}

INTERPRET = not isinstance(
    _grouped_gemm_packed_kernel, triton.JITFunction
)  # in Triton's interpreter bf16 products are wrong

_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_PLANS = 4096  # launches that are remembered
_plans: dict[tuple, "_Plan"] = {}
_counters: dict[tuple[int, int], list[Tensor]] = {}
_spare: dict[torch.device, list[Tensor]] = {}


@dataclass
class _Plan:
    """A launch without its tensors. partial: float32 values, and counters: int32 zeros, that it needs. boxes: which tensors the copy
    engine loads: (place, shape, that of a box). tiles: of a block of ``pairs`` pairs, where its programs can count them or wait for
    those in front of them; else 0: in ``specialized.py`` each warpgroup counts its part. live: programs, or there tiles, that have work;
    streamed: bytes of weights that they read."""

    kernel: Any
    sizes: tuple[int | float, ...]
    constants: tuple
    options: dict[str, int]
    programs: int
    partial: int
    counters: int
    device: torch.device
    boxes: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...] = ()
    tiles: int = 0
    pairs: int = 0
    live: float = 0.0
    streamed: float = 0.0

    @functools.cached_property
    def launch(self) -> Launch:
        """For (x, w, w_scale, y, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight, partial, counter, done), y where absent,
        and expert_ids for ``done``."""
        values, boxes = (*self.sizes, *self.constants), ()
        if self.boxes:
            from .specialized_load import descriptor

            boxes = tuple((at, functools.partial(descriptor, shape=shape, box=box)) for at, shape, box in self.boxes)
        return Launch(self.kernel, (self.programs,), self.device, *values, boxes=boxes, **self.options)

    @property
    def begins(self) -> bool:
        """Whether it can begin before the kernel in front has ended, but for what that makes: not where warps of their own copy rows of x,
        which do not wait."""
        copied = bool(self.boxes) and self.boxes[0][0] > 0
        return bool(self.options.get("launch_pdl")) and not copied

    def leads(self, other: "_Plan") -> bool:
        """Whether ``other``, behind this one, should begin with what this one has done: tiles of the same blocks, which it counts."""
        able = self.tiles > 0 and other.tiles > 0 and other.begins and self.pairs == other.pairs
        return able and overlaps(self.streamed + other.streamed, other.live, _facts(self.device)[0])

    @property
    def counting(self) -> Launch:
        """The same, and each program counts its tile, at its block's place in ``done``, for a kernel behind (``behind``)."""
        return self.launch.having(flow=-1)

    def behind(self, tiles: int = 0) -> Launch:
        """The same behind a kernel that began when the alignment had ended: weights are asked for before that kernel has (``ahead.py``).
        tiles: of a block, for which to wait at its place in ``done``, instead of for the end of that kernel."""
        return self.launch.having(ahead=1, flow=tiles) if self.begins else self.launch


def pieces(x: Tensor, dtype: torch.dtype) -> Tensor:  # [M, K] -> [pieces, M, K], or x itself
    """x as a sum of tensors of ``dtype``, which is exact: 11 bits of fp16 are two bf16 of 8 bits, 24 bits of fp32 are three."""
    if x.dtype == dtype:
        return x
    parts, rest = [], x.float()
    for _ in range(_PIECES[x.dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts)


def _held(device: torch.device) -> list[Tensor]:
    """The zeros that PyTorch's current stream has had, those it has now at the end."""
    stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    return _counters.setdefault((device.index or 0, stream), [])


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros that every launch, or a layer's last, leaves as zeros; one tensor a stream, made outside of CUDA graphs (a few are kept for
    streams that begin with a capture), or one a launch within.

    None is ever freed, since a captured graph may hold it. As with cuBLAS's workspaces, graphs captured on one stream must
    not be replayed on several at once.
    """
    held = _held(device)
    if held and held[-1].numel() >= count:
        return held[-1]
    size = max(count, 1 << 16)
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    spare = _spare.get(device, [])
    if captured and spare and spare[-1].numel() >= size:
        held.append(spare.pop())
        return held[-1]
    made = torch.zeros(size, dtype=torch.int32, device=device)
    if not captured:
        held.append(made)
        if device not in _spare:
            _spare[device] = list(torch.zeros((4, size), dtype=torch.int32, device=device).unbind())
    return made


def forget(device: torch.device) -> None:
    """Have new zeros for the stream, where launches that failed may have left others behind."""
    held = _held(device)
    if held and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        held.append(torch.zeros_like(held[-1]))


ROLES = {(128, False): (224, 56), (128, True): (232, 40), (192, False): (160, 32), (192, True): (160, 32)}
"""Registers of a thread that multiplies and of one that loads, where warps do one of the two, by weight rows of a program and whether
the copy engine brings rows of x too. Three times 160 and 32 are 65536 / 128; of two and a third Triton gives out 504."""


@functools.cache
def _facts(device: torch.device) -> tuple[int, int, bool]:
    """(multiprocessors, bytes of shared memory a program may have, wgmma)."""
    if device.type != "cuda":
        return UNITS, SHARED, device.type == "meta"
    t = target(device)
    return t.units, t.shared, t.wgmma


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
    to_slots: bool,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] -> [num_pairs, N_out]: ``packed_gemm._grouped_gemm_packed`` on an accelerator. ``config``: for measuring."""
    rows = sorted_ids.shape[0] if to_slots and sorted_ids is not None else num_pairs
    y = torch.empty((rows, n // 2 if gated else n), dtype=out_dtype, device=x.device)
    if num_pairs == 0:
        return y
    x = pieces(x, w.dtype if not w_format else torch.bfloat16)
    plan = plan_packed(
        *(x, w, w_scale, w_alpha, w_shift, w_global, w_format, n, k, w_gated, w_layout),
        *(sorted_ids, expert_ids, num_padded),
        *(block_size, num_pairs, tokens, top_k, bias, act, gated, alpha, beta, limit),
        *(row_weight, round_to, rule, to_slots),
        *(out_dtype, config),
    )
    partial = counter = y
    if plan.partial:
        partial = torch.empty((plan.partial,), dtype=torch.float32, device=x.device)
    if plan.counters:
        counter = counters(x.device, plan.counters)
    done = y if expert_ids is None else expert_ids  # of the counts' type; not read, as nobody counts or waits
    if w_format:
        w = w.view(torch.int32)
    given = (w_scale, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight)
    w_scale, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight = (y if t is None else t for t in given)
    _launch(
        plan,
        (x, w, w_scale, y, sorted_ids, expert_ids, num_padded, w_alpha, bias, row_weight, partial, counter, done),
    )
    return y


def plan_packed(
    x, w, w_scale, w_alpha, w_shift, w_global, w_format, n, k, w_gated, w_layout, sorted_ids, expert_ids, num_padded,
    block_size, num_pairs, tokens, top_k, bias, act, gated, alpha, beta, limit, row_weight, round_to, rule, to_slots, out_dtype,
    config=None,
) -> _Plan:  # fmt: skip
    """The plan of ``grouped_gemm_packed`` for such arguments, x as ``pieces`` returns it."""
    blocks = 0 if expert_ids is None else expert_ids.shape[0]
    aligned = not any(t.data_ptr() & 15 for t in (x, w, w_scale) if t is not None)  # as the copy engine needs them
    route = DENSE if expert_ids is None else SORTED if sorted_ids is not None else SELF
    key = (
        *(x.shape, x.stride(), w.shape, w.dtype, w_format, n, k, w_gated, w_layout, route.value, blocks, block_size),
        *(num_pairs, tokens, top_k, act, gated, alpha, beta, limit, round_to, rule, to_slots),
        *(out_dtype, x.device, config),
        *(w_alpha is None, row_weight is None, None if bias is None else bias.dtype, aligned),
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
    gated, alpha, beta, limit, round_to, rule, to_slots, out_dtype, device, config, no_alpha, no_weight, bias, aligned, w_stride, s_stride,
    scale_rows,
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
    if not (16 <= block <= 256 and (block % 32 == 0 or block == 16)):
        raise ValueError(
            f"the alignment has blocks of {block} pairs, packed weights need 16 or a multiple of 32 up to 256"
        )
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
    units, shared, wgmma = _facts(device)
    count = shape[0] if len(shape) == 3 else 1
    largest = max(shape[-2] * stride[-2] * count, (blocks * block if to_slots else num_pairs) * n)
    problem = Problem(kind, 32 if f is None else f.block, num_pairs, experts, strips * 16, k)
    small = block == SMALL and kind != ""
    served = (
        wgmma and route == SORTED.value and strips >= (12 if small else 8) and (small or block == LARGE) and count == 1
    )
    served = served and round_to == "" and (act != "") == w_gated and aligned
    served = served and experts < 65535  # a table of the kernel's holds them in 16 bits
    if kind != "":
        served = served and tail < 2 and w_stride[:2] == (w_shape[1] * strips * 512, strips * 512)
        served = served and s_stride[1] == rows * 128 // problem.block and s_stride[0] % s_stride[1] == 0
    else:
        whole = tail == 0 and k % 64 == 0 and rows % 16 == 0 and w_stride == (rows * k, k, 1)
        served = served and whole and w_dtype == torch.bfloat16
    served = served and (stride == (k, 1) if top_k == 0 else stride[-2] % 16 == 0)
    if (
        config is not None
        and config.specialized
        and not (
            served
            and config.pairs == block
            and (config.rows == 128 or (config.rows == 192 and (small or kind == "") and strips >= 12))
            and config.join in ((0, JOIN) if block == LARGE and kind else (0,))
        )
    ):
        raise ValueError(
            "a specialized configuration serves weights of 128 rows and more (plain ones: bf16, whole strips and steps) in sorted blocks "
            "of 256 pairs (32 or none of which join another, of plain weights none; those of 192 rows and more by 192 too), or "
            "quantized ones of 192 and more, by 192 or 128, in blocks of 160, all contiguous and 16-byte aligned, bf16 x, "
            "whole K tiles, gates exactly with an activation and results that are not rounded, on sm_90: give this product another one"
        )
    if config is not None and route == SORTED.value and block % config.pairs:
        raise ValueError(
            f"the configuration takes {config.pairs} pairs, which do not divide blocks of {block}: give this product another one"
        )
    held = 32 if block == 96 and not wgmma else block  # 64 and 32 pairs at once spill registers of other products
    c = config or config_for(problem, held, device, units, shared, served, top_k == 0)
    if c.specialized and out_dtype.itemsize > 2:  # float32 results take more room on their way out
        c = replace(c, rows=c.rows if kind else 128, stages=min(c.stages, 4 if kind and not c.join else 3))
    tiles = -(-strips * 16 // c.rows)
    live = max(problem.active, num_pairs / c.pairs) * tiles
    streamed = problem.active * problem.expert_bytes
    if c.specialized:
        if c.join and top_k > 0 and not no_weight:  # notes of so many pairs, of their weights and rows likewise
            c = replace(c, stages=min(c.stages, 4))
        from .specialized import _grouped_gemm_specialized_kernel
        from .specialized_load import LINES, PART, box_of

        early = starts_early("product", num_pairs, device)
        options: dict[str, Any] = {"num_warps": c.warps} | early_options(early)
        pdl = options.pop("PDL")
        from_row = s_stride[0] // s_stride[1] if kind != "" else 0
        sizes = (
            *(experts, n, k, strips, *strides[:2], from_row, stride[-2], num_pairs, c.group),
            *(alpha, beta, limit, 0, 0),
        )
        constants = (
            *(c.pairs + c.join, c.rows // 64, kind, problem.block, tail),
            *(-(-k // 64) % 2 == 0, c.stages, w_layout == "interleaved", act),
            *(limit != math.inf, not no_alpha, bias is not None, not no_weight, largest >= 2**31, top_k, to_slots, pdl),
            *ROLES[c.rows, top_k == 0],
        )
        boxes = ((0, (shape[0], k), (box_of(c.pairs + c.join), 64)),) if top_k == 0 else ()
        if kind == "":
            boxes += ((1, (experts * rows, k), (PART.value, 64)),)
        else:
            lines = experts * w_shape[1] * strips * 4  # of 32 words
            words = 32 // problem.block
            scales = (experts * s_stride[0] // s_stride[1], rows * words), (1, PART.value * words)
            boxes += (1, (lines, 32), (LINES.value, 32)), (2, *scales)
        return _Plan(
            *(_grouped_gemm_specialized_kernel, sizes, constants, options),
            *(min(units, blocks * tiles), 0, 1, device, boxes),
            tiles=tiles * (c.rows // 64) if early and c.join == 0 else 0,
            pairs=c.pairs,
            live=live,
            streamed=streamed,
        )
    if config is None and c.pairs == 128 and not wgmma:  # activations are in registers too, and four warps have too few
        c = replace(c, warps=8)
    parts = block // c.pairs if route == SORTED.value else 1
    blocks = -(-num_pairs // c.pairs) if route == DENSE.value else blocks * parts
    lets = route != DENSE.value and starts_early("product", num_pairs, device)
    live *= c.split
    most = together(live, k / c.split, units) if lets else None
    options = early_options(most is not None, lets) | {"most": most or 0}
    pdl = options.pop("PDL")
    options |= {"num_warps": c.warps, "num_stages": c.stages if torch.version.hip is None else 2}
    if c.maxnreg and ptx:
        options["maxnreg"] = _REGISTERS.get(c.maxnreg, c.maxnreg)
    sizes = (
        *(experts, n, k, strips, rows, *strides, stride[-2], stride[0] if count > 1 else 0, num_pairs, blocks),
        *(alpha, beta, limit, 0, 0),
    )
    constants = (
        *(c.pairs, parts, c.rows, c.step, kind, problem.block, route, c.split, c.group, c.levels, tail),
        *(strips * 16 < c.rows, c.mask, count, c.evict, w_gated, w_layout == "interleaved", act, limit != math.inf),
        *(not no_alpha, bias is not None),
        *(not no_weight, FORMATS[round_to].element.name if round_to else "", rule),
        *(largest >= 2**31, top_k, to_slots, pdl, ptx, wgmma and kind != "" and takes_registers(), INTERPRET),
    )
    partial = blocks * tiles * c.split * c.pairs * c.rows if c.split > 1 else 0
    return _Plan(
        _grouped_gemm_packed_kernel,
        sizes,
        constants,
        options,
        blocks * tiles * c.split,
        partial,
        blocks * tiles if partial else 0,
        device,
        tiles=tiles if pdl and parts == 1 and route != DENSE.value else 0,
        pairs=c.pairs,
        live=live,
        streamed=streamed,
    )


def _launch(plan: _Plan, tensors: tuple[Tensor, ...]) -> None:
    plan.launch(*tensors)
