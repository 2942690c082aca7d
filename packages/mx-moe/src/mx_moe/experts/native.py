"""Native experts: weights and inputs stay quantized and go into the block-scaled matrix instructions (``tl.dot_scaled``).

Activation and quantization of GEMM 2's input are one float32 pass in GEMM 1's epilogue; GEMM 2 is float32 times the routing
weight, summed over k in float32 and then cast. Chosen where the architecture's table has the instruction for both formats.
"""

from __future__ import annotations

import mx_kernels as mk

from .base import ExpertsBase, hardware_reason, triton_reason
from .problem import EVERY_FORMAT, Capability, Problem, why_not_inputs

NATIVE_INPUTS = {
    "mxfp8_e4m3": "mxfp8_e4m3",
    "mxfp8_e5m2": "mxfp8_e4m3",
    "mxfp6_e2m3": "mxfp8_e4m3",
    "mxfp6_e3m2": "mxfp8_e4m3",
    "mxfp4": "mxfp8_e4m3",
    "nvfp4": "nvfp4",
}
"""With inputs "auto": what native experts quantize activations to, by weight format."""


class NativeExperts(ExpertsBase):
    """QuantizedTensor x QuantizedTensor through the hardware's block scales."""

    name = "native"
    capability = Capability(weights=EVERY_FORMAT, inputs=("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4"))
    quantizes_inputs = True

    @classmethod
    def why_not(cls, device: mk.Device, problem: Problem) -> str | None:
        """Hardware first, since it is what a user cannot change; then what the class and the scheme allow."""
        if not problem.quantized:
            return f"the weights are {problem.weight}, not quantized: block-scaled instructions take quantized operands"
        inputs = NATIVE_INPUTS[problem.weight] if problem.inputs in (None, "auto") else str(problem.inputs)
        reason = hardware_reason(device, inputs, problem.weight) or triton_reason(
            device, "native runs in a Triton kernel"
        )
        if reason is not None:
            return reason
        if problem.inputs is None:
            return f"the scheme keeps inputs in 16 bits; {device} would multiply {inputs} x {problem.weight} (inputs={inputs!r})"
        return cls.capability.why_not(problem) or why_not_inputs(problem, inputs)

    @classmethod
    def auto_inputs(cls, weight: str) -> str | None:
        """The format that the hardware multiplies with these weights."""
        return NATIVE_INPUTS[weight]
