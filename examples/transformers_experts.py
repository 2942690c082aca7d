"""A transformers model whose experts are quantized in place: coverage, bytes, and a line of text."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from mx_moe.eval import continue_line
from mx_moe.integrations.transformers import quantize_experts_

model = AutoModelForCausalLM.from_pretrained(Path(__file__).parent / "tiny-gpt-oss").eval()
report = quantize_experts_(model, "nvfp4")
print(f"{100 * report.coverage:.0f}% of {report.elements:,} expert weights in {report.expert_bytes:,} bytes")
print(report.backends, report.layers[0].backend["rejected"])
prompt = b".. function:: "
print((prompt + continue_line(model, prompt, new_bytes=24)).decode(errors="replace"))
