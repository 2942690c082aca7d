"""Quantize a weight to MXFP4 and an input to MXFP8, multiply them, and see the error."""

from __future__ import annotations

import torch

import mx_kernels as mk

torch.manual_seed(0)
weight = torch.randn(256, 512, dtype=torch.bfloat16)
x = torch.randn(8, 512, dtype=torch.bfloat16)

w = mk.quantize(weight, mk.MXFP4)  # [N, K]
y = mk.gemm(mk.quantize(x, mk.MXFP8), w)  # [T, N]

exact = x.float() @ weight.float().T
error = float((y.float() - exact).norm() / exact.norm())
print(w)
print(f"{8 * w.nbytes / weight.numel():.2f} bits a weight, relative error {error:.3f}")
assert error < 0.15
