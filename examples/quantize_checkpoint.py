"""Quantize a checkpoint on disk, look at it, and run it: python examples/quantize_checkpoint.py [SRC]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mx_quant as mq
from mx_moe.eval import evaluate

here = Path(__file__).parent
source = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "tiny-qwen3-moe"
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "quantized"
    print(mq.quantize_checkpoint(source, out, "mxfp8", layout="mxfp8", exclude=("*self_attn*",)))
    text = (here / "python-docs.txt").read_bytes()[:1024]
    print(f"{evaluate(out, text, 'stored').bits_per_byte:.4f} bits per byte")
