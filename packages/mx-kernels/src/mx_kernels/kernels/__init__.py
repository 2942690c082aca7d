"""Triton kernels: one file per operation, imported only when an operation runs on an accelerator."""
