"""Epilogue of the packed GEMMs: what happens to a tile's float32 sums before and as they are stored.

    o = row_weight * act(alpha * acc + bias);  y[pair, column] = o, or o rounded to an MX format

Letters: N packed weight rows and M pairs of a tile. Gated rows come as [8 gates | 8 ups], so that one thread holds both.
"""

import triton
import triton.language as tl

from .bits import e8m0_byte, e8m0_reciprocal, e8m0_value, larger, round_to
from .finish import sigmoid


@triton.jit
def _tanh(x, ASM: tl.constexpr):
    return 2.0 * sigmoid(x, 2.0, ASM) - 1.0


@triton.jit
def _gate(g, alpha, KIND: tl.constexpr, ASM: tl.constexpr):
    if KIND == "silu":
        return g * sigmoid(g, 1.0, ASM)
    elif KIND == "swiglu_oai":
        return g * sigmoid(g, alpha, ASM)
    elif KIND == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g), ASM))
    elif KIND == "relu2":
        r = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r
    else:
        return g


@triton.jit
def gated(g, u, alpha, beta, limit, KIND: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr):
    """The activation of gates and the ups that they meet, float32 of any shape."""
    if LIMIT:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.maximum(u, -limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.minimum(u, limit, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "swiglu_oai":
        u = u + beta
    return _gate(g, alpha, KIND, ASM) * u


@triton.jit
def gate_and_up(j, half, INTERLEAVED: tl.constexpr):
    """Where the weight, and so its bias, has the gate and the up of output column j."""
    if INTERLEAVED:
        return 2 * j, 2 * j + 1
    else:
        return j, half + j


@triton.jit
def outputs(row0, n, N: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr):
    """(output column, whether there is one, bias of the gate or row, bias of the up): int32, for the N rows at ``row0``."""
    half = n // 2
    if GATED and ACT != "":  # a gate and an up make one output
        j = row0 // 2 + tl.arange(0, N // 2)
        inside = j < half
        i0, i1 = gate_and_up(j, half, INTERLEAVED)
    elif GATED:  # no activation: rows go back to where the weight had them
        row = row0 + tl.arange(0, N)
        index = row // 16 * 8 + row % 8
        inside = index < half
        if INTERLEAVED:
            j = 2 * index + row % 16 // 8
        else:
            j = row % 16 // 8 * half + index
        i0 = j
        i1 = j
    else:
        j = row0 + tl.arange(0, N)
        inside = j < n
        i0 = j
        i1 = j
    return j, inside, i0, i1


@triton.jit
def _finish(
    acc,  # [N, M]
    scale,  # float32, alpha[e]
    b0,  # float32 [N], or [N / 2] for gates
    b1,  # float32 [N / 2], for ups
    weight,  # float32 [M], of the pairs
    act_alpha,
    act_beta,
    act_limit,
    N: tl.constexpr,
    M: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scale, bias, activation, row weight: float32 [N or N / 2, M]."""
    if HAS_ALPHA:
        acc = acc * scale
    if GATED and ACT != "":
        g, u = tl.split(acc.reshape(N // 16, 2, 8, M).permute(0, 2, 3, 1))
        g = g.reshape(N // 2, M)
        u = u.reshape(N // 2, M)
        if HAS_BIAS:
            g += b0[:, None]
            u += b1[:, None]
        o = gated(g, u, act_alpha, act_beta, act_limit, ACT, LIMIT, ASM)
    else:
        o = acc
        if HAS_BIAS:
            o += b0[:, None]
        if ACT != "":
            if LIMIT:
                o = tl.minimum(o, act_limit, propagate_nan=tl.PropagateNan.ALL)
            o = _gate(o, act_alpha, ACT, ASM)
    if HAS_WEIGHT:
        o = o * weight[None, :]
    return o


@triton.jit
def _rounded(o, ELEMENT: tl.constexpr, RULE: tl.constexpr):
    """float32 [C, M], C a multiple of 32: each block of 32 along C quantized with its own scale and back."""
    v = o.reshape(o.shape[0] // 32, 32, o.shape[1])
    byte = e8m0_byte(tl.reduce(tl.abs(v), 1, larger).to(tl.int32, bitcast=True) & 0x7FFFFFFF, ELEMENT, RULE)
    v = round_to(v * e8m0_reciprocal(byte)[:, None, :], ELEMENT) * e8m0_value(byte)[:, None, :]
    return v.reshape(o.shape[0], o.shape[1])


@triton.jit
def store(
    acc, y, sorted_ids, bias, row_weight, first, pair, live, pairs, n, scale, row0, b0, b1, weight,
    act_alpha, act_beta, act_limit,
    N: tl.constexpr, M: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND: tl.constexpr, RULE: tl.constexpr, INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr, WIDE: tl.constexpr, RELOAD: tl.constexpr, TO_SLOTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Epilogue and store; loads what ``_tile`` did not load before the K loop. TO_SLOTS: y's rows are slots, not pairs."""
    j, inside, i0, i1 = outputs(row0, n, N, GATED, INTERLEAVED, ACT)
    if not EARLY:
        if RELOAD:  # another cache modifier, or it becomes one with the load before the K loop
            pair = tl.load(sorted_ids + first + tl.arange(0, M), cache_modifier=".cg")
            live = pair < pairs
            pair = tl.where(live, pair, 0)
        if HAS_BIAS:
            b0 = tl.load(bias + i0, mask=inside, other=0.0).to(tl.float32)
            b1 = tl.load(bias + i1, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(row_weight + pair, mask=live, other=0.0)
    o = _finish(
        acc, scale, b0, b1, weight, act_alpha, act_beta, act_limit,
        N, M, GATED, ACT, LIMIT, HAS_ALPHA, HAS_BIAS, HAS_WEIGHT, ASM,
    )  # fmt: skip
    if ROUND != "":
        o = _rounded(o, ROUND, RULE)
    width = n // 2 if GATED and ACT != "" else n
    at = pair
    if TO_SLOTS:
        at = first + tl.arange(0, M)
    if WIDE:
        at = at.to(tl.int64)
    out = y + at[:, None] * width + j[None, :]
    tl.store(out, o.to(y.dtype.element_ty).trans(), mask=live[:, None] & inside[None, :])
