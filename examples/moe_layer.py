"""An MoE layer on MXFP4 weights, as gpt-oss has it; the choice of the backend says why."""

from __future__ import annotations

import torch

import mx_kernels as mk
import mx_moe as mm
import mx_quant as mq

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
E, H, I, T = 8, 128, 256, 16
w13 = torch.randn(E, 2 * I, H, dtype=torch.bfloat16, device=device) * H**-0.5
w2 = torch.randn(E, H, I, dtype=torch.bfloat16, device=device) * I**-0.5
x = torch.randn(T, H, dtype=torch.bfloat16, device=device)
logits = torch.randn(T, E, device=device)

activation = mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
experts = mm.make_experts(mq.quantize_experts(w13, w2, "mxfp4"), activation)
y = experts(x, mm.Router(top_k=4, softmax_over="selected")(logits))
print(experts.choice)
print(tuple(y.shape), y.dtype)
assert y.isfinite().all()
