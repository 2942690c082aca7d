"""Grouped GEMM: each routed pair is multiplied by the weight of its expert.

    out[p, n] = epilogue(sum_k x[p // top_k, k] * w[expert of p, n, k])

Letters: M rows of x, E experts, P = M * top_k pairs, N output features before the activation, K summed over.
Kernels: ``kernels.generic_gemm.grouped_gemm`` for the canonical layout, with the op's arguments and results.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .activation import fake_result
from .alignment import Alignment
from .dispatch import (
    check_device,
    check_type,
    direct,
    flat_activation,
    flat_operand,
    has_triton,
    kernels,
    requantized,
    whole_operand,
)
from .epilogue import Epilogue
from .formats import Format, ScaleRule
from .gemm import (
    Operand,
    check_epilogue,
    check_operand,
    check_product,
    flat_result,
    fused_format,
    output_dtype,
    stored,
    whole_epilogue,
)
from .packed_gemm import packed_product, rounds_itself
from .packing import PackedWeight
from .quantize import dequantize, quantize
from .reference.moe import local_experts
from .slots import slots_of
from .tensor import QuantizedTensor
from .tuned import block_for

_SCHEMA = (
    "(Tensor x, Tensor? x_scale, Tensor? x_global, str x_format, Tensor w, Tensor? w_scale, Tensor? w_global, str w_format, "
    "Tensor? sorted_ids, Tensor expert_ids, Tensor num_padded, int block_size, int num_pairs, int top_k, "
    "Tensor? bias, str act, str act_layout, bool gated, float alpha, float beta, float limit, Tensor? row_weight, "
    "str requantize, str rule, ScalarType out_dtype) -> (Tensor, Tensor)"
)


def block_size(
    num_pairs: int,
    num_experts: int,
    device: torch.device | str,
    w: Operand | PackedWeight | None = None,
    *,
    slots: bool = False,
) -> int:
    """Rows of a block that suit this many pairs: 16 to 128 (96, 160 and 256 for packed weights), by the pairs an expert gets.

    w: the weight that will be multiplied first; packed weights have their own rule (``tuned.py``). slots: the layer asks
    ``layer_slots`` which rows should be in slot order, and multiplies bf16 x as it is.

    A block should hold what one expert gets, since the weight is decoded once per block: measured on an H200, 16 rows are
    best up to 8 pairs an expert, 64 up to 128. On the CPU the size only decides how many slots the padding takes: 16.
    """
    if torch.device(device).type == "cpu":
        return 16
    if isinstance(w, PackedWeight):
        return block_for(w.problem(num_pairs, num_experts), torch.device(device), slots)
    for rows, limit in ((16, 8), (32, 32), (64, 128)):
        if num_pairs <= limit * num_experts:
            return rows
    return 128


def _grouped_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    x_global: Tensor | None,
    x_format: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_global: Tensor | None,
    w_format: str,
    sorted_ids: Tensor | None,
    expert_ids: Tensor,
    num_padded: Tensor,
    block_size: int,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None,
    act: str,
    act_layout: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    row_weight: Tensor | None,
    requantize: str,
    rule: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [M, K], w [E, N, K] -> (values or codes [num_pairs, ..], scales or empty)."""
    ids = expert_ids.new_empty((num_pairs // top_k, top_k))  # only its size counts here: the blocks say who goes where
    tiles = Alignment(ids, w.shape[0], block_size, sorted_ids, expert_ids, num_padded)
    result = reference.grouped_gemm(
        whole_operand(x, x_scale, x_global, x_format),
        whole_operand(w, w_scale, w_global, w_format),
        tiles,
        top_k=top_k,
        epilogue=whole_epilogue(bias, (act, act_layout, gated, alpha, beta, limit), row_weight, requantize, rule),
        out_dtype=out_dtype,
        decoder=dequantize,
    )
    return flat_result(result)


grouped_gemm_op = torch.library.custom_op("mx_kernels::grouped_gemm", _grouped_gemm, mutates_args=(), schema=_SCHEMA)


@grouped_gemm_op.register_kernel(("cuda", "xpu"))
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    if not has_triton():
        return _grouped_gemm(x, *args)  # type: ignore[arg-type]
    result: tuple[Tensor, Tensor] = kernels("generic_gemm").grouped_gemm(x, *args)
    return result


@grouped_gemm_op.register_fake
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    w, num_pairs, gated, requantize, out_dtype = args[3], args[11], args[16], args[21], args[23]
    assert isinstance(w, Tensor)
    assert isinstance(num_pairs, int)
    assert isinstance(requantize, str)
    assert isinstance(out_dtype, torch.dtype)
    return fake_result(x, (num_pairs, w.shape[1] // 2 if gated else w.shape[1]), requantize, out_dtype)


def grouped_gemm(
    x: Operand,  # [M, K]
    w: Operand | PackedWeight,  # [E, N, K]
    tiles: Alignment,
    *,
    top_k: int = 1,
    from_slots: bool = False,
    to_slots: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008
    out_dtype: torch.dtype | None = None,
) -> Tensor | QuantizedTensor:  # [P, N_out]
    """Multiply each routed pair by its expert's weight, with float32 sums, then the epilogue, then one rounding.

    x: float32, bf16, fp16 or quantized, K last; pair p reads row p // top_k, so top_k is k where x holds tokens and 1 where
    x already holds one row a pair. w: the same kinds, one matrix per expert. Any mix; quantized operands are decoded exactly.
    A ``PackedWeight`` (of ``pack``) gives the same values, faster where its layout suits the device.
    tiles: of ``moe_align_block_size``, with E experts and P = M * top_k pairs. epilogue: bias [E, N], activation, row_weight
    (P values, float32), requantize_to or round_to. out_dtype: of the result, by default x's. N_out is N, or N/2 after a gated activation.

    Row p of the result belongs to pair p. Rows of dropped pairs are zero on the CPU and anything on an accelerator: read none
    (``combine`` does not). On the CPU only the experts that a pair goes to are decoded.

    from_slots: row r of x belongs to slot r of the tile list instead (``gather_rows``, or a result with to_slots); to_slots: so does row
    r of the result. Both for packed weights and a sorted alignment: they say how rows lie, and change no value.

    Raises ValueError for shapes, strides, devices and a requantized width off the block; TypeError for dtypes.
    """
    check_operand(x, "x")
    if not isinstance(w, PackedWeight):
        check_operand(w, "w")
    if x.ndim != 2 or w.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}, needs x [M, K] and w [E, N, K]")
    check_product(x, w)
    check_type(tiles, Alignment, "tiles", "moe_align_block_size makes one")
    check_device(tiles.ids, x.device, "the alignment", "x")
    num_experts, n, _ = w.shape
    if num_experts != tiles.num_experts:
        raise ValueError(
            f"w has {num_experts} experts, but the alignment was made for {tiles.num_experts}: pass it num_experts={num_experts}"
        )
    pairs = tiles.num_pairs
    if from_slots or to_slots:
        if not isinstance(w, PackedWeight):
            raise ValueError(
                "from_slots and to_slots are for packed weights: pack(w), or leave rows in the order of pairs"
            )
        if from_slots and (x.shape[0] != slots_of(tiles) or top_k != 1):
            raise ValueError(
                f"x has {x.shape[0]} rows and top_k is {top_k}, needs one row a slot of the tile list ({slots_of(tiles)}) and top_k=1 with "
                "from_slots: gather_rows makes them"
            )
        slots_of(tiles)
    if not from_slots and (top_k < 1 or x.shape[0] * top_k != pairs):
        raise ValueError(
            f"x has {x.shape[0]} rows and top_k is {top_k}, but the alignment has {pairs} pairs (ids {tuple(tiles.ids.shape)}): "
            f"pass top_k={tiles.top_k} with one row a token, or top_k=1 with one row a pair"
        )
    dtype = output_dtype(x, out_dtype)
    row_weight = check_epilogue(epilogue, (num_experts, n), pairs, x.device)
    f, rule = epilogue.requantize_to or epilogue.round_to, epilogue.rule
    if isinstance(w, PackedWeight):
        whole = f is None or rounds_itself(epilogue, w)
        if to_slots and not whole:
            raise ValueError(
                f"{epilogue} with to_slots would quantize the result in a pass over all rows, also of slots without a pair: round to a "
                "format without a global scale, by a rule that is no search, and gates with their activation"
            )
        held = dtype if whole else torch.float32
        y = packed_product(x, w, tiles, 0 if from_slots else top_k, epilogue, row_weight, held, to_slots)
        return y if whole or f is None else stored(_requantized(y, tiles, f, rule, dtype), epilogue)
    fused = fused_format(f)
    args = (
        *flat_operand(x),
        *flat_operand(w),
        *(tiles.sorted_ids, tiles.expert_ids, tiles.num_padded, tiles.block_size, pairs, top_k),
        epilogue.bias,
        *flat_activation(epilogue.activation),
        row_weight,
        fused,
        f.check_rule(rule).value if f is not None and fused else "",
        torch.float32 if f is not None and not fused else dtype,
    )
    run = (
        kernels("generic_gemm").grouped_gemm if direct(args[0], args[4], epilogue.bias, row_weight) else grouped_gemm_op
    )
    out: Tensor
    out, scale = run(*args)
    if f is None:
        return out
    if fused:
        return stored(requantized(out, scale, fused, rule, dtype), epilogue)
    return _requantized(out, tiles, f, rule, dtype)


def _requantized(
    out: Tensor, tiles: Alignment, f: Format, rule: ScaleRule | None, dtype: torch.dtype
) -> QuantizedTensor:
    """Float32 results [P, N_out] in another format; rows of dropped pairs become zeros, so as not to reach a global scale."""
    dropped = local_experts(tiles.ids, tiles.num_experts, tiles.expert_map) < 0
    return replace(quantize(out.masked_fill(dropped[:, None], 0), f, rule=rule), dtype=dtype)
