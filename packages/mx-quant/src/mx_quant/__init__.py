"""Quantization methods and checkpoints. See the package's README."""
