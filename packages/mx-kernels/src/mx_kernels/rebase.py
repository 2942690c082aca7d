"""Re-based W8A8 and W4A8: MXFP8 speed on FP8 matrix units that know no block scales (sm89, sm90). Opt-in, and it says how exact it is.

Weights: the block exponents of a row are folded into its codes once, at load (``rebase``); MXFP4 keeps its four bits and folds them
as codes are decoded (``rebased_fp4.py``). Activations: MXFP8 per 32, then folded per token (``rebase_rows``). Both are E4M3 with one
power of two per row, multiplied by ``grouped_gemm_rebased``.

The result differs from exact MXFP8 x MXFP8 where codes became subnormal (``RebasedWeight.changed``), and by the accumulator of
the matrix unit: Hopper's FP8 sums keep fewer bits than float32; ``promote=True`` adds them up in float32 every 128 along K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import Alignment
from .dispatch import (
    bytes_of,
    check_device,
    check_float,
    check_float32,
    check_last_stride,
    check_out_dtype,
    check_type,
    direct,
    flat_activation,
    has_triton,
    requantized,
    whole_activation,
)
from .epilogue import Epilogue
from .formats import E2M1, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, Element, Format
from .rebased_fp4 import OCTAVES, empty_fp4, pack_fp4, unpack_fp4
from .reference import rebase as reference
from .reference.elements import decode, encode, scale_to_float, unpack_codes
from .slots import slots_of
from .tensor import QuantizedTensor

REBASED_FORMATS = (MXFP8, MXFP6_E2M3, MXFP6_E3M2, MXFP4)
REBASED_ACTIVATIONS = ("silu", "swiglu_oai")


@dataclass(frozen=True, eq=False)
class RebasedWeight:
    """``w[e, n, k] ~ code[e, n, k] * scale[e, n]``, the codes E4M3; rows lie [8 gate | 8 up] per 16 where ``gated``.

    data: the codes, float8_e4m3fn [E, N, K]; of MXFP4 its own codes of four bits, uint8, in the layout of ``rebased_fp4.py``.
    octaves: of MXFP4, uint8: the power of two by which each block's codes are to be multiplied. None otherwise.
    scale: float32 [E, N], powers of two. shape: [E, N, K]. format: what it was made from.
    changed: share of the non-zero weights whose value changed. error: their relative error in the Frobenius norm.
    """

    data: Tensor
    octaves: Tensor | None
    scale: Tensor
    shape: torch.Size
    format: Format
    gated: bool
    changed: float
    error: float

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        return self.data.nbytes + self.scale.nbytes + (0 if self.octaves is None else self.octaves.nbytes)

    def codes(self) -> Tensor:
        """The E4M3 codes that are multiplied: float8_e4m3fn [E, N, K], ``data`` itself unless it is MXFP4."""
        return _codes(self.data, self.octaves, *self.shape[1:]).view(torch.float8_e4m3fn)


def _codes(data: Tensor, octaves: Tensor | None, n: int, k: int) -> Tensor:
    return data if octaves is None else unpack_fp4(data, octaves, n, k)


def rebase(w: QuantizedTensor, *, gated: bool = False) -> RebasedWeight:
    """Fold the block scales of each row of ``w`` [E, N, K] into its codes. Copies, one expert at a time; waits for the device.

    Raises ValueError for a format that E4M3 cannot hold (NVFP4 and E5M2), a shape that is not [E, N, K], N not a multiple of 16
    where ``gated``, and NaN scales.
    """
    check_type(w, QuantizedTensor, "w", "quantize it to one of REBASED_FORMATS")
    if w.format not in REBASED_FORMATS:
        names = ", ".join(f.name for f in REBASED_FORMATS)
        raise ValueError(
            f"{w.format} cannot be re-based: its values times their block scales are no E4M3 values; {names} can"
        )
    if w.ndim != 3:
        raise ValueError(f"w has shape {tuple(w.shape)}, needs [E, N, K]: add a dimension for one expert")
    if gated and w.shape[1] % 16:
        raise ValueError(f"a gated weight needs N to be a multiple of 16, got {w.shape[1]}")
    if bool((w.scale == 255).any()):
        raise ValueError("w has NaN block scales (255): they cannot be re-based; mend or quantize the weight again")
    data, octaves, scale, sums = _rebase(w, gated)
    changed, nonzero, wrong, total = sums.tolist()
    return RebasedWeight(
        data if octaves is not None else data.view(torch.float8_e4m3fn),
        octaves,
        scale,
        w.shape,
        w.format,
        gated,
        changed / max(nonzero, 1),
        (wrong / total) ** 0.5 if total else 0.0,
    )


def _rebase(w: QuantizedTensor, gated: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Codes, octaves and scales of a RebasedWeight, and float64 [4]: numbers of changed and of non-zero weights, squares of changes
    and weights."""
    (experts, n, k), element = w.shape, w.format.element
    lift, tiles = reference.octaves_of_room(element), -(-k // 64)
    top = w.scale.amax(-1)
    row = scale_to_float(top) * 2.0**-lift
    sums = torch.zeros(4, dtype=torch.float64, device=w.device)
    octaves, whole = None, False
    if element is E2M1:
        data, octaves = empty_fp4(experts, n, k, w.device)
        whole = not bool((top[..., None] - w.scale >= OCTAVES).any())  # no code changes: nothing to count
    else:
        data = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for e in range(experts):
        down = top[e][:, None].int() - w.scale[e].int()  # octaves below the row's largest scale
        codes = bytes_of(w.data[e])
        if not whole:
            codes = unpack_codes(codes, w.format)
            value = _values(codes, element).unflatten(-1, (-1, 32))
            want = value * _power(lift - down)[..., None]
            if octaves is None:
                new = want.to(torch.float8_e4m3fn)
                codes, now = new.view(torch.uint8).flatten(-2), new.float()
            else:
                kept = _power(lift - down.clamp(max=OCTAVES - 1))[..., None]
                new = encode(want / kept, E2M1)
                codes, now = new.flatten(-2), decode(new, E2M1) * kept
            squares = row[e].double().square()
            sums[0] += (now != want).sum()
            sums[1] += (want != 0).sum()
            sums[2] += ((now - want).square().sum((-2, -1)) * squares).sum()
            sums[3] += (want.square().sum((-2, -1)) * squares).sum()
        if gated:
            codes, down = (reference.gate_up_rows(t[None])[0] for t in (codes, down))
        if octaves is None:
            data[e] = codes
        else:
            codes = codes if whole else codes[..., 0::2] | (codes[..., 1::2] << 4)
            up = (OCTAVES - 1 - down).clamp(min=0).to(torch.uint8)
            data[e * tiles : (e + 1) * tiles], octaves[e] = pack_fp4(codes, up)
    return data, octaves, reference.gate_up_rows(row) if gated else row, sums


def _power(exponent: Tensor) -> Tensor:
    """2^exponent as float32; 0 where that would not be normal."""
    return ((exponent + 127).clamp(min=0) << 23).view(torch.float32)


def _values(codes: Tensor, element: Element) -> Tensor:
    """float32 values of codes, a byte each."""
    if element is MXFP8.element:
        return codes.view(torch.float8_e4m3fn).float()
    return _table(element, codes.device)[codes.int()]


@functools.cache
def _table(element: Element, device: torch.device) -> Tensor:
    return decode(torch.arange(1 << element.bits, dtype=torch.uint8), element).to(device)


@torch.library.custom_op("mx_kernels::rebase_rows", mutates_args=())
def _rebase_rows(
    x: Tensor, x_scale: Tensor | None, sorted_ids: Tensor | None, num_padded: Tensor | None, num_pairs: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return reference.rebase_rows(x, x_scale, sorted_ids, num_padded, num_pairs, top_k)


@_rebase_rows.register_kernel(("cuda", "xpu"))
def _rebase_rows_kernel(
    x: Tensor, x_scale: Tensor | None, sorted_ids: Tensor | None, num_padded: Tensor | None, num_pairs: int, top_k: int
) -> tuple[Tensor, Tensor]:
    if not has_triton():
        return reference.rebase_rows(x, x_scale, sorted_ids, num_padded, num_pairs, top_k)
    from .kernels import rebased as kernels

    return kernels.rebase_rows(x, x_scale, sorted_ids, num_padded, num_pairs, top_k)


@_rebase_rows.register_fake
def _(
    x: Tensor, x_scale: Tensor | None, sorted_ids: Tensor | None, num_padded: Tensor | None, num_pairs: int, top_k: int
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if sorted_ids is None else sorted_ids.shape[0]
    return x.new_empty((rows, x.shape[1]), dtype=torch.uint8), x.new_empty(rows, dtype=torch.float32)


def rebase_rows(
    x: Tensor | QuantizedTensor, tiles: Alignment | None = None, *, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize activations to MXFP8 (RCEIL) and re-base them, one scale a row.

    x: [M, K] bf16, fp16 or fp32, K a multiple of 32; or MXFP8 already. Returns codes float8_e4m3fn [M, K] and scales float32 [M]. With
    ``tiles`` rows are slots, M = capacity: slot r's is row r of x, or with ``top_k`` row ``tiles.sorted_ids[r] // top_k``, that is its
    pair's token; rows that hold no pair are undefined on a GPU (zero from the reference). Raises TypeError and ValueError.
    """
    if isinstance(x, QuantizedTensor):
        if x.format != MXFP8:
            raise ValueError(f"x is {x.format}, needs mxfp8_e4m3 or values: dequantize it first")
        data, x_scale = bytes_of(x.data).contiguous(), bytes_of(x.scale).contiguous()
    else:
        check_float(x, "x")
        check_last_stride(x, "x")
        data, x_scale = x, None
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, needs [M, K]: flatten leading dimensions into M")
    MXFP8.check_k(x.shape[1], "K of x")
    sorted_ids, num_padded, num_pairs = None, None, 0
    if tiles is None and top_k is not None:
        raise ValueError(
            f"top_k is {top_k} without tiles: it says how tokens go to their slots, pass the alignment too"
        )
    if tiles is not None:
        check_type(tiles, Alignment, "tiles", "moe_align_block_size makes one")
        check_device(tiles.ids, x.device, "the alignment", "x")
        slots = slots_of(tiles)
        if top_k is None and x.shape[0] != slots:
            raise ValueError(
                f"x has {x.shape[0]} rows, needs one per slot of the tile list ({slots}), or top_k with a row a token"
            )
        if top_k is not None and (top_k < 1 or x.shape[0] * top_k != tiles.num_pairs):
            raise ValueError(
                f"x has {x.shape[0]} rows and top_k is {top_k}, but the tile list holds {tiles.num_pairs} pairs: they must agree"
            )
        sorted_ids, num_padded, num_pairs = tiles.sorted_ids, tiles.num_padded, tiles.num_pairs
    call = _rebase_rows_kernel if direct(data) else _rebase_rows
    codes, scale = call(data, x_scale, sorted_ids, num_padded, num_pairs, top_k or 0)
    return codes.view(torch.float8_e4m3fn), scale


_SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor w, Tensor? w_octaves, Tensor w_scale, Tensor ids, Tensor sorted_ids, Tensor expert_ids,"
    " Tensor num_padded, int block_size, Tensor? bias, str act, float alpha, float beta, float limit, Tensor? row_weight,"
    " bool scatter, bool promote, bool quantize, ScalarType out_dtype) -> (Tensor, Tensor)"
)


def _rebased_product(  # type: ignore[no-untyped-def]
    x, x_scale, w, w_octaves, w_scale, ids, sorted_ids, expert_ids, num_padded, block_size, bias, act, alpha, beta, limit, row_weight,
    scatter, promote, quantize, out_dtype,
):  # fmt: skip
    tiles = Alignment(ids, w_scale.shape[0], block_size, sorted_ids, expert_ids, num_padded)
    bias = reference.concatenated_rows(bias) if bias is not None and act else bias
    activation = whole_activation(act, "concatenated", True, alpha, beta, limit)
    epilogue = Epilogue(bias, activation, row_weight, MXFP8 if quantize else None)
    codes = _codes(w, w_octaves, w_scale.shape[1], x.shape[1])
    return reference.grouped_gemm_rebased(x, x_scale, codes, w_scale, tiles, epilogue, scatter, out_dtype)


_grouped_gemm_rebased = torch.library.custom_op(
    "mx_kernels::grouped_gemm_rebased", _rebased_product, mutates_args=(), schema=_SCHEMA
)


@_grouped_gemm_rebased.register_kernel(("cuda", "xpu"))
def _grouped_gemm_rebased_kernel(*args):  # type: ignore[no-untyped-def]
    if not has_triton():
        return _rebased_product(*args)
    from .kernels import rebased as kernels

    x, x_scale, w, w_octaves, w_scale, ids, sorted_ids, expert_ids, num_padded, block_size = args[:10]
    bias, act, alpha, beta, limit, weight, scatter, promote, quantize, dtype = args[10:]
    return kernels.grouped_gemm_rebased(
        x, x_scale, w, w_octaves, w_scale, sorted_ids, expert_ids, num_padded, block_size, ids.numel(), bias=bias, row_weight=weight,
        scatter=scatter, activation=act, alpha=alpha, beta=beta, limit=limit, promote=promote, quantize=quantize, out_dtype=dtype,
    )  # fmt: skip


@_grouped_gemm_rebased.register_fake
def _(  # type: ignore[no-untyped-def]
    x, x_scale, w, w_octaves, w_scale, ids, sorted_ids, expert_ids, num_padded, block_size, bias, act, alpha, beta, limit, row_weight,
    scatter, promote, quantize, out_dtype,
):  # fmt: skip
    width = w_scale.shape[1] // 2 if act else w_scale.shape[1]
    rows = ids.numel() if scatter else x.shape[0]
    scale = x.new_empty((rows, width // 32) if quantize else (0,), dtype=torch.uint8)
    return x.new_empty((rows, width), dtype=torch.uint8 if quantize else out_dtype), scale


def grouped_gemm_rebased(
    x: tuple[Tensor, Tensor],  # [capacity, K], [capacity]
    w: RebasedWeight,  # [E, N, K]
    tiles: Alignment,
    *,
    epilogue: Epilogue | None = None,
    scatter: bool = False,
    promote: bool = True,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor | QuantizedTensor:  # [capacity, N_out] or [P, N_out]
    """``grouped_gemm`` on what ``rebase_rows`` and ``rebase`` return.

    Row r of x and of the result belongs to slot r of the tile list; with ``scatter``, row p of the result to pair p. Rows without a
    pair are zero from the reference and undefined on a GPU. Epilogue: bias [E, N], a gated "silu" or "swiglu_oai" (exactly where
    ``w.gated``), row weight, requantize_to MXFP8 by its rule.
    promote: sum in float32 every 128 along K instead of in the matrix unit's accumulator; the reference always does, and so does
    MXFP4 in blocks of fewer than 128 pairs.
    Raises ValueError for shapes, devices, and an epilogue that it does not have; TypeError for dtypes.
    """
    epilogue = epilogue or Epilogue()
    check_type(x, tuple, "x", "rebase_rows returns one")
    check_type(w, RebasedWeight, "w", "rebase makes one")
    check_type(tiles, Alignment, "tiles", "moe_align_block_size makes one")
    check_out_dtype(out_dtype)
    if tiles.block_size & (tiles.block_size - 1):
        raise ValueError(
            f"the alignment has blocks of {tiles.block_size} pairs, needs a power of two: rebased_block_size says which"
        )
    data, scale = x
    if data.dtype != torch.float8_e4m3fn or tuple(scale.shape) != (data.shape[0],):
        raise ValueError(
            f"x is {data.dtype} {tuple(data.shape)} with scales {tuple(scale.shape)}, needs float8_e4m3fn [capacity, K] with "
            "one float32 scale a row: pass what rebase_rows returns"
        )
    check_float32(scale, "the scale of x")
    check_device(w.data, data.device, "w", "x")
    check_device(tiles.ids, data.device, "the alignment", "x")
    act = epilogue.activation
    if (act is not None) != w.gated:
        raise ValueError(f"the weight was re-based with gated={w.gated}, but the epilogue's activation is {act}")
    if act is not None and (act.kind not in REBASED_ACTIVATIONS or not act.gated or act.layout != "concatenated"):
        raise ValueError(
            f"the re-based product fuses gated, concatenated {' or '.join(REBASED_ACTIVATIONS)}; got {act}"
        )
    quantize = epilogue.requantize_to is not None
    n_out = w.shape[1] // 2 if w.gated else w.shape[1]
    if epilogue.round_to is not None or (
        quantize and (epilogue.requantize_to != MXFP8 or epilogue.rule not in (None, MXFP8.default_rule))
    ):
        raise ValueError(
            f"the re-based product requantizes to mxfp8_e4m3 by rule {MXFP8.default_rule.value} or not at all; got {epilogue}"
        )
    if quantize:
        MXFP8.check_k(n_out, "the width of the result")
    slots = slots_of(tiles)
    if data.shape[0] != slots or data.shape[1] != w.shape[2]:
        raise ValueError(f"x is {tuple(data.shape)}, but the tile list has {slots} slots and w is {tuple(w.shape)}")
    if tiles.num_experts != w.shape[0]:
        raise ValueError(f"the tile list is for {tiles.num_experts} experts, w has {w.shape[0]}")
    bias = epilogue.bias
    if bias is not None:
        check_float(bias, "bias")
        check_device(bias, data.device, "bias", "x")
        if tuple(bias.shape) != tuple(w.shape[:2]):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, needs [E, N] = {tuple(w.shape[:2])}")
        bias = reference.gate_up_rows(bias) if w.gated else bias
    kind, _, _, alpha, beta, limit = flat_activation(act)
    weight = epilogue.row_weight
    if weight is not None:
        check_float32(weight, "row_weight")
        check_device(weight, data.device, "row_weight", "x")
        if weight.numel() != tiles.num_pairs:
            raise ValueError(f"row_weight has shape {tuple(weight.shape)}, needs {tiles.num_pairs} values, one a pair")
        weight = weight.reshape(-1)
    call = _grouped_gemm_rebased_kernel if direct(data, w.data) else _grouped_gemm_rebased
    y, y_scale = call(
        data.view(torch.uint8), scale, w.data.view(torch.uint8), w.octaves, w.scale, tiles.ids, tiles.sorted_ids, tiles.expert_ids,
        tiles.num_padded, tiles.block_size, bias, kind, alpha, beta, limit, weight, scatter, promote, quantize, out_dtype,
    )  # fmt: skip
    return requantized(y, y_scale, MXFP8.name, None, out_dtype) if quantize else y


def rebased_block_size(num_pairs: int, w13: RebasedWeight, promote: bool = True) -> int:
    """Pairs a block by the mean number of them that an expert gets; measured on an H200, of MXFP4 on an H100 (docs/performance.md).

    An expert that the second-level cache does not hold should be read once.
    """
    experts, n, k = w13.shape
    full = 96
    if w13.octaves is not None:
        full = 192 if promote else 48 if n * k / 2 > 24e6 else 96
    mean = num_pairs / experts
    return 128 if mean > full else 64 if mean > 20 else 32 if mean > 10 else 16
