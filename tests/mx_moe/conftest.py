"""An oracle of the whole layer in float64, written as loops over tokens and experts, and layers to run it on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import mx_kernels as mk
import mx_quant as mq
from mx_moe import Routing


def activate64(h: torch.Tensor, a: mk.Activation) -> torch.Tensor:
    """The formulas of SwiGLU, GELU and the rest, in float64, from their definitions."""
    if not a.gated:
        g, u = h, torch.ones((), dtype=torch.float64)
    elif a.layout == "interleaved":
        g, u = h[0::2], h[1::2]
    else:
        g, u = h[: h.shape[0] // 2], h[h.shape[0] // 2 :]
    if a.limit is not None:
        g = torch.minimum(g, torch.tensor(a.limit, dtype=torch.float64))
        u = u.clamp(-a.limit, a.limit) if a.gated else u
    if a.kind == "swiglu_oai":
        return g / (1 + torch.exp(-a.alpha * g)) * (u + a.beta)
    if a.kind == "silu":
        return g / (1 + torch.exp(-g)) * u
    if a.kind == "gelu":
        return g * 0.5 * (1 + torch.erf(g / math.sqrt(2))) * u
    if a.kind == "gelu_tanh":
        return g * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if a.kind == "relu2":
        return g.clamp(min=0) ** 2 * u
    assert a.kind == "identity"
    return g * u


def values(w: torch.Tensor | mk.QuantizedTensor) -> torch.Tensor:
    """Weights as float64 on the CPU, a quantized tensor's product of code, scale and global scale formed there."""
    if not isinstance(w, mk.QuantizedTensor):
        return w.cpu().double()
    w = w.to("cpu")
    g = w.global_scale
    if g is not None:
        w = mk.QuantizedTensor(w.data, w.scale, w.format, w.rule, torch.float32, torch.ones_like(g))
    value = mk.reference.dequantize(w, torch.float32).double()
    return value if g is None else value * g.double().view(*g.shape, *(1,) * (value.ndim - g.ndim))


def dense(x, routing, weights, activation, *, inputs=None, expert_map=None, weight_on_input=False) -> torch.Tensor:
    """[T, H] float64: for each token and slot, that expert's two products, weighted and summed."""
    w13, w2 = values(weights.w13), values(weights.w2)
    b13 = None if weights.w13_bias is None else weights.w13_bias.cpu().double()
    b2 = None if weights.w2_bias is None else weights.w2_bias.cpu().double()
    ids, scale = routing.ids.cpu().tolist(), routing.weights.cpu().double()
    table = None if expert_map is None else expert_map.cpu().tolist()
    total = w13.shape[0] if table is None else len(table)

    def qdq(v: torch.Tensor, which: str) -> torch.Tensor:
        if inputs is None:
            return v
        g = getattr(weights, which + "_input_scale")
        g = None if g is None else g.float().max().cpu()
        return mk.reference.quantize_dequantize(v.float()[None], mk.get_format(inputs), global_scale=g)[0].double()

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for slot, e in enumerate(ids[t]):
            if e < 0 or e >= total:
                continue
            row = e if table is None else table[e]
            if row < 0:
                continue
            v, w = x[t].cpu().double(), scale[t, slot]
            if weight_on_input:
                v, w = (v.float() * w.float()).to(x.dtype).double(), 1.0
            h = w13[row] @ qdq(v, "w13")
            h = activate64(h if b13 is None else h + b13[row], activation)
            y = w2[row] @ qdq(h, "w2")
            out[t] += (y if b2 is None else y + b2[row]) * w
    return out


def layer(
    weight="mxfp8_e4m3", *, experts=6, hidden=64, intermediate=96, tokens=13, top_k=2, activation=None, bias=False,
    dtype=torch.float32, input_scales=False, inputs=None, device="cpu", seed=0,
):  # fmt: skip
    """Random weights (values of the order of 1/sqrt(K)), tokens and routing; some experts stay without tokens."""
    activation = activation or mk.Activation("silu")
    g = torch.Generator().manual_seed(seed)
    rows = (2 if activation.gated else 1) * intermediate

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(torch.bfloat16)

    w13 = normal(experts, rows, hidden, scale=hidden**-0.5)
    w2 = normal(experts, hidden, intermediate, scale=intermediate**-0.5)
    b13, b2 = (normal(experts, rows), normal(experts, hidden)) if bias else (None, None)
    if weight in mk.FORMATS:
        scheme = mq.Scheme(weight, inputs)
        weights = mq.quantize_experts(w13, w2, scheme, w13_bias=b13, w2_bias=b2)
    else:
        plain = getattr(torch, weight)
        weights = mq.ExpertWeights(w13.to(plain), w2.to(plain), b13, b2, mk.get_format(inputs) if inputs else None)
    x = normal(tokens, hidden).to(dtype)
    if input_scales:
        weights = mq.ExpertWeights(
            weights.w13, weights.w2, b13, b2, mk.NVFP4, torch.tensor(4 / 2688), torch.tensor(6 / 2688)
        )
    # the last expert gets nothing
    ids = torch.stack([torch.randperm(max(1, experts - 1), generator=g)[:top_k] for _ in range(tokens)]) if tokens else (
        torch.zeros(0, top_k, dtype=torch.int64)
    )  # fmt: skip
    routing = Routing(ids.to(device), torch.rand(tokens, top_k, generator=g).to(device))
    return SimpleNamespace(
        x=x.to(device), routing=routing, weights=weights.to(device), activation=activation, dtype=dtype
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||."""
    norm = float(want.norm())
    return float((got.cpu().double() - want).norm()) / (norm or 1.0)


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(dense=dense, layer=layer, relative=relative, activate=activate64, values=values)
