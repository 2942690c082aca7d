"""How a public function reaches its implementation.

Every operation is a custom op: a PyTorch reference on any device, a Triton kernel on cuda (also ROCm) and xpu where Triton
is installed. Dataclasses stop at the op boundary: only tensors (FP8 codes and scales as uint8 views), numbers, strings and
dtypes cross it. ``flat_*`` takes the dataclasses apart, ``whole_*`` puts them together again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .epilogue import Activation
from .formats import ScaleRule, get_format
from .tensor import QuantizedTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # found, not imported; a constant, so that torch.compile sees one


def has_triton() -> bool:
    """Whether Triton is installed; without it every operation runs on its reference."""
    return _TRITON


@functools.cache
def kernels(name: str) -> Any:
    """The module ``mx_kernels.kernels.<name>``, imported when it is first needed, since that imports Triton."""
    return importlib.import_module(f"{__package__}.kernels.{name}")


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be launched at once, without the dispatcher's overhead.

    True for plain tensors on an accelerator that has Triton, while nothing traces, fakes or differentiates.
    """
    if not _TRITON or _traced():
        return False
    for t in tensors:  # noqa: SIM110 (all() costs the host 0.3 us more, at each step of a layer)
        if t is not None and not (_plain(t) and (t.is_cuda or t.is_xpu)):
            return False
    return True


def direct_on_cpu(*tensors: Tensor | None) -> bool:
    """The same for the CPU's implementation. The first call of a custom op imports much of torch, over a second of it."""
    return not _traced() and all(t is None or (_plain(t) and t.is_cpu) for t in tensors)


def _traced() -> bool:
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _plain(t: Tensor) -> bool:
    return type(t) in (Tensor, Parameter) and not (t.requires_grad and torch.is_grad_enabled())


def bytes_of(t: Tensor) -> Tensor:
    """A one-byte tensor as uint8."""
    return t if t.dtype == torch.uint8 else t.view(torch.uint8)


FlatActivation = tuple[str, str, bool, float, float, float]
FlatOperand = tuple[Tensor, Tensor | None, Tensor | None, str]


def flat_activation(a: Activation | None) -> FlatActivation:
    """(kind or "", layout, gated, alpha, beta, limit or inf)."""
    if a is None:
        return "", "concatenated", False, 0.0, 0.0, math.inf
    return a.kind, a.layout, a.gated, a.alpha or 0.0, a.beta or 0.0, math.inf if a.limit is None else a.limit


def whole_activation(
    act: str, act_layout: str, gated: bool, alpha: float, beta: float, limit: float
) -> Activation | None:
    """The inverse of ``flat_activation``."""
    if not act:
        return None
    oai = act == "swiglu_oai"
    return Activation(
        act,
        act_layout,
        gated,
        alpha if oai else None,
        beta if oai else None,
        None if math.isinf(limit) else limit,
    )


def flat_operand(t: Tensor | QuantizedTensor) -> FlatOperand:
    """(codes as bytes or the plain tensor, scales as bytes, global scale, format name or "")."""
    if isinstance(t, QuantizedTensor):
        return bytes_of(t.data), bytes_of(t.scale), t.global_scale, t.format.name
    return t, None, None, ""


def whole_operand(
    data: Tensor, scale: Tensor | None, global_scale: Tensor | None, name: str
) -> Tensor | QuantizedTensor:
    """The inverse of ``flat_operand``, but for the scale rule and dtype, which no product depends on."""
    if not name or scale is None:
        return data
    f = get_format(name)
    return QuantizedTensor(
        data.view(f.data_dtype), scale.view(f.scale_dtype), f, f.default_rule, torch.float32, global_scale
    )


def requantized(
    data: Tensor, scale: Tensor, name: str, rule: ScaleRule | str | None, dtype: torch.dtype, g: Tensor | None = None
) -> QuantizedTensor:
    """The bytes that an op returned, as the tensor that they are."""
    f = get_format(name)
    return QuantizedTensor(data.view(f.data_dtype), scale.view(f.scale_dtype), f, f.check_rule(rule), dtype, g)


def check_type(value: object, kind: type, what: str, advice: str) -> None:
    """Raise TypeError unless ``value`` is a ``kind``; ``advice`` says how to make one."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}, needs a {kind.__name__}: {advice}")


def check_last_stride(t: Tensor, what: str) -> None:
    """Raise ValueError unless the last dimension is contiguous."""
    if t.ndim and t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(f"{what} has stride {t.stride(-1)} along its last dimension, needs 1: pass it .contiguous()")


def check_float(t: Tensor, what: str) -> None:
    """Raise TypeError unless ``t`` is a tensor of float32, bfloat16 or float16."""
    check_type(t, Tensor, what, "torch.as_tensor makes one")
    if t.dtype not in FLOATS:
        raise TypeError(f"{what} is {t.dtype}, needs float32, bfloat16 or float16: cast it with .to()")


def check_float32(t: Tensor, what: str) -> None:
    """Raise TypeError unless ``t`` is a float32 tensor."""
    check_type(t, Tensor, what, "torch.as_tensor makes one")
    if t.dtype != torch.float32:
        raise TypeError(f"{what} is {t.dtype}, needs float32: cast it with .float()")


def check_out_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless ``dtype`` is one that results can have."""
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype is {dtype}, needs float32, bfloat16 or float16: cast the result to others yourself")


def check_device(t: Tensor, device: torch.device, what: str, of: str) -> None:
    """Raise ValueError unless ``t`` is on ``device``."""
    if t.device != device:
        raise ValueError(f"{what} is on {t.device} and {of} on {device}: move both to one device")
