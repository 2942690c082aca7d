"""What every checkpoint layout shares: its row type, weight references, checks, and the reading and writing of config.json.

A layout is how one tool stores a QuantizedTensor: which tensors, under which names, with which dtypes and shapes, and what
config.json says about them. Letters: E experts, N rows, K columns (canonical: K last, gate rows before up rows), B block length.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mx_kernels import NVFP4, Format, QuantizedTensor, ScaleRule

from .families import FUSED_BIAS, FUSED_EXPERT, classify

Configs = Mapping[str, Mapping[str, Any]]
"""JSON files of a checkpoint by file name: "config.json" and, where there is one, "hf_quant_config.json"."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Info(Protocol):
    """Anything with a dtype and a shape: TensorInfo, a Tensor, a row of a safetensors header."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102


Infos = Mapping[str, Info]


class Get(Protocol):
    """Reads a stored tensor: all of it, or (``expert``) entry ``expert`` of its first dimension alone."""

    def __call__(self, name: str, expert: int | None = None) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class WeightRef:
    """One weight of a checkpoint.

    name: its full-precision name: "..q_proj.weight", "..experts.3.gate_proj.weight", "..experts.gate_up_proj".
    kind: "linear" or "expert" [N, K], "fused_expert" [E, N, K]; "expert_bias" [N] and "fused_bias" [E, N] where listed.
    shape: the canonical shape, whatever the layout's own is. format: None is full precision.
    tensors: names of the stored tensors it occupies. rule: the scale rule the config states, else the format's default.
    activation: the format that activations are quantized to, where the config says so.
    input_scale: the stored tensor with the NVFP4 global scale of the activations, if any.
    interleaved: stored rows of gate_up alternate gate, up. transposed: the family stores fused parameters [E, K, N]; in full
        precision always, quantized only where the layout does (ModelOpt NVFP4).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: Format | None = None
    tensors: tuple[str, ...] = ()
    rule: ScaleRule | None = None
    activation: Format | None = None
    input_scale: str | None = None
    interleaved: bool = False
    transposed: bool = False

    @property
    def module(self) -> str:
        """The name without ".weight", as configs list modules."""
        return self.name.removesuffix(".weight")

    @property
    def experts(self) -> int | None:
        """E of a fused weight or bias, else None."""
        return self.shape[0] if self.kind in (FUSED_EXPERT, FUSED_BIAS) else None


@dataclass(frozen=True)
class Layout:
    """One row of LAYOUTS: how a tool stores quantized weights, as data and functions.

    name, formats: what it is called and which formats it holds. kinds: the kinds of weights it holds.
    activations: formats for which it can also record quantized activations.
    detect(configs, infos) -> bool: whether a checkpoint is stored this way (by quant_method and tensor names).
    refs(configs, infos) -> [WeightRef]: every quantized weight, checked: formats, group sizes, dtypes, shapes, missing tensors.
    plan(ref) -> {tensor name: TensorInfo}: what ``write`` will return, known before any data is.
    write(ref, q, *, expert=None, input_scale=None) -> {tensor name: Tensor}: the stored form of ``q``; with ``expert``, ``q`` is
        that expert [N, K] of a fused weight and each tensor lacks the first dimension. No argument is changed.
    read(ref, get, *, expert=None) -> QuantizedTensor: the exact inverse, canonical; one expert of a fused weight with ``expert``.
    read_input_scale(ref, get, *, expert=None) -> Tensor | None: float32 multiplier [] or [E] of NVFP4 activations.
    config(configs, refs, infos, *, activations=False) -> {file name: JSON}: new contents of the configuration files for an output
        whose quantized weights are ``refs`` and whose tensors are ``infos``.
    """

    name: str
    formats: tuple[Format, ...]
    kinds: tuple[str, ...]
    activations: tuple[Format, ...]
    detect: Callable[[Configs, Infos], bool]
    refs: Callable[[Configs, Infos], list[WeightRef]]
    plan: Callable[[WeightRef], dict[str, TensorInfo]]
    write: Callable[..., dict[str, Tensor]]
    read: Callable[..., QuantizedTensor]
    read_input_scale: Callable[..., Tensor | None]
    config: Callable[..., dict[str, dict[str, Any]]]


def check_info(
    infos: Infos, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None, why: str
) -> Info:
    """The stored tensor's info; ValueError if it is missing or its shape differs, TypeError if its dtype does."""
    info = infos.get(name)
    if info is None:
        raise ValueError(f"{name} is missing: {why}; the checkpoint is incomplete or its config describes another one")
    if info.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} is {str(info.dtype).removeprefix('torch.')}, needs {names}: {why}")
    if shape is not None and tuple(info.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(info.shape)}, needs {tuple(shape)}: {why}")
    return info


def check_unclaimed(refs: Sequence[WeightRef], infos: Infos, where: str) -> list[WeightRef]:
    """``refs``, after checking that no stored matrix of 8-bit elements belongs to none of them (ValueError).

    Such a tensor is quantized in a way that the config does not tell, and would pass through as if it were an ordinary one.
    """
    owned = {t for r in refs for t in r.tensors}
    for name, info in infos.items():
        if info.dtype.itemsize == 1 and info.dtype != torch.bool and len(info.shape) >= 2 and name not in owned:
            dtype = str(info.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {dtype} {list(info.shape)}, so it is quantized, but {where} describes no weight that it belongs to"
            )
    return list(refs)


def scale_dtypes(format: Format) -> tuple[torch.dtype, ...]:
    """Dtypes in which a stored block scale of the format is accepted: E8M0 bytes may be typed as such."""
    if format.scale == "e8m0":
        return (torch.uint8, torch.float8_e8m0fnu)
    return (torch.float8_e4m3fn,)


def check_weight(
    ref: WeightRef, q: QuantizedTensor, expert: int | None, formats: tuple[Format, ...], layout: str
) -> None:
    """Raise unless ``q`` is what ``ref`` says and holds no scale that a layout may not store (E8M0 255; E4M3 NaN or negative)."""
    if q.format not in formats:
        names = ", ".join(f.name for f in formats)
        raise ValueError(f"layout {layout} cannot hold {q.format} ({ref.name}); it holds {names}")
    if ref.format is not None and q.format is not ref.format:
        raise ValueError(f"{ref.name} is {q.format}, but its reference says {ref.format}")
    want = ref.shape if expert is None else ref.shape[1:]
    if tuple(q.shape) != tuple(want):
        part = "" if expert is None else f" (expert {expert})"
        raise ValueError(f"{ref.name}{part} has shape {tuple(q.shape)}, needs {tuple(want)}")
    check_scale(ref.name, q.scale)
    if q.global_scale is not None:
        check_global(f"the global scale of {ref.name}", q.global_scale, q.data)


def check_scale(name: str, scale: Tensor) -> None:
    """Raise ValueError where a block scale decodes to NaN (E8M0 byte 255, E4M3 0x7F) or is negative."""
    if scale.is_meta or scale.numel() == 0:
        return
    codes = scale.view(torch.uint8)
    limit = 0xFE if scale.dtype == torch.uint8 else 0x7E
    if int(codes.max()) > limit:
        bad = torch.nonzero(codes > limit)[0].tolist()
        byte = int(codes[tuple(bad)])
        raise ValueError(
            f"block scale of {name} at index {tuple(bad)} is byte {byte:#04x} (not a positive finite number): "
            f"the source had a NaN there, or the file is damaged; quantize this tensor again"
        )


def check_global(name: str, g: Tensor, data: Tensor | None = None) -> None:
    """Raise ValueError unless every multiplier is finite and positive; zero is accepted only where all codes are zero."""
    if g.is_meta:
        return
    bad = ~(torch.isfinite(g) & (g > 0))
    if not bool(bad.any()):
        return
    if data is not None and bool((g[bad] == 0).all()):
        codes = data.view(torch.uint8).expand_as(data) if g.ndim == 0 else data.view(torch.uint8)[bad]
        if not bool((codes & 0x77).any()):
            return
    raise ValueError(
        f"{name} is {float(g[bad].flatten()[0])}, needs a finite positive number: the checkpoint was saved without calibration or is "
        f"damaged"
    )


def check_input_scales(refs: Sequence[WeightRef], activations: bool) -> None:
    """Raise ValueError where a config would say of NVFP4 activations what the stored input scales contradict."""
    for ref in refs:
        if ref.format is NVFP4 and activations != (ref.input_scale is not None):
            raise ValueError(
                f"activations={activations}, but {ref.name} has {'an' if ref.input_scale else 'no'} input_scale: NVFP4 activations "
                f"need one for every weight, and weights alone (W4A16) have none"
            )


def quantization_config(configs: Configs) -> Mapping[str, Any]:
    """config.json's ``quantization_config`` (also inside ``text_config``), {} without one."""
    config = configs.get("config.json", {})
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"quantization_config is {found!r}, needs an object")
    return found


def require(field: str, value: Any, known: Sequence[Any], where: str) -> None:
    """Raise ValueError naming the field, its value and what is known, unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{where}: {field} is {value!r}; known: {', '.join(repr(k) for k in known)}")


# A config is untrusted, and Python's regular expressions have no time limit: a repeated group can take exponential time.
_REPEATED_GROUP = re.compile(r"\)(\*|\+|\{)")
_UNBOUNDED = re.compile(r"(?<!\\)[*+]")


def matcher(patterns: Sequence[str], *, shell: bool) -> Callable[[str], bool]:
    """Whether a module's name is listed: as it is, by a "re:" pattern from its start, or (``shell``) by a shell pattern.

    Lists of whole names (tens of thousands in mixed checkpoints) cost one look-up.
    """
    wild = [p for p in patterns if p.startswith("re:") or (shell and any(c in p for c in "*?["))]
    exact = set(patterns) - set(wild)
    for p in wild:
        if p.startswith("re:") and (_REPEATED_GROUP.search(p) or len(_UNBOUNDED.findall(p)) > 6 or len(p) > 4096):
            raise ValueError(
                f"module pattern {p[:200]!r} repeats a group or has more than 6 '*' or '+': it could match for hours"
            )
    try:
        compiled = [re.compile(p[3:] if p.startswith("re:") else fnmatch.translate(p)) for p in wild]
    except re.error as error:
        raise ValueError(f"a module pattern is no regular expression: {error.pattern!r}: {error}") from None
    return lambda module: module in exact or any(c.match(module) for c in compiled)


def names_list(value: Any, field: str) -> list[str]:
    """A list of module names or patterns from a config, [] for None; ValueError naming the field otherwise."""
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{field} is {value!r}, needs a list of module names")
    return list(value)


def with_quantization(configs: Configs, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with ``quantization_config`` replaced."""
    config = {k: v for k, v in configs.get("config.json", {}).items() if k != "quantization_config"}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "quantization_config" in text:
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return {**config, "quantization_config": dict(quantization)}


def unquantized_modules(refs: Sequence[WeightRef], infos: Infos) -> list[str]:
    """Modules with a matrix weight that stay in full precision, without embeddings and norms; always decides on "lm_head".

    These are what readers must be told not to expect quantized. Fused experts are listed by what holds them ("..mlp.experts").
    ``infos`` may hold full-precision or output tensors.
    """
    quantized = {r.module for r in refs}
    holders = {classify(r.name).experts for r in refs}
    owned = {t for r in refs for t in r.tensors}
    out = []
    for name, info in infos.items():
        if name in owned or len(info.shape) < 2:
            continue
        role = classify(name)
        if role.kind == FUSED_EXPERT and role.experts not in holders:
            out.append(role.experts)
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        if module in quantized or role.kind in ("embedding", "norm"):
            continue
        out.append(module)
    if not any(m.endswith("lm_head") or m == "unembedding" for m in (*out, *quantized)):
        out.append("lm_head")
    return sorted(set(out))
