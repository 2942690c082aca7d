"""The main job: a transformers checkpoint with its experts quantized, scored on a text in bits per byte.

    bits per byte = sum over predicted tokens of -log2 p(token | window before it) / bytes of those tokens

The text is cut into windows; each starts with the last token of the one before it, so that every token but the first of the
text is predicted once. Models with 256 tokens and no tokenizer read bytes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mx_kernels import Format
from mx_quant import Scheme

from .integrations.loading import load_quantized
from .integrations.transformers import ExpertsReport, quantize_experts_, scheme_of
from .oracle import EXPERT_CLASSES

WINDOW = 512
STORED = "stored"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_LOGITS = 1 << 24  # elements of logits that are held at once


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found: bits per byte of the text, and what was done to the experts."""

    checkpoint: str
    format: str
    bits_per_byte: float
    predicted_bytes: int
    seconds: float
    experts: ExpertsReport

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "checkpoint": self.checkpoint,
            "format": self.format,
            "bits_per_byte": self.bits_per_byte,
            "predicted_bytes": self.predicted_bytes,
            "seconds": self.seconds,
            **{k: v for k, v in self.experts.to_dict().items() if k != "format"},
        }


def read_config(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint folder; FileNotFoundError without one, ValueError where it is not a JSON object."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint folder {folder}: give the path of a folder with config.json and weights"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a transformers checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): the checkpoint is damaged") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, needs a JSON object")
    return config


def load_model(checkpoint: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
    """The causal language model of a checkpoint folder, in its own dtype, in evaluation mode. Nothing is downloaded.

    Raises ImportError without transformers, FileNotFoundError without the folder or its config.json.
    """
    read_config(checkpoint)
    transformers = _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", local_files_only=True)
    return model.to(device or _default_device()).eval()


def tokens(checkpoint: str | os.PathLike[str], vocabulary: int, text: bytes) -> tuple[Tensor, int]:
    """(token ids [n] int64, bytes of all tokens but the first).

    Raises ValueError for a text of less than two tokens, and for a checkpoint without tokenizer unless it has 256 tokens.
    """
    folder = Path(checkpoint)
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        first = len(tokenizer.decode(ids[:1]).encode()) if ids else 0
    elif vocabulary == 256:
        ids, first = list(text), 1
    else:
        raise ValueError(
            f"{folder} has no tokenizer and a vocabulary of {vocabulary}: only models with 256 tokens can read bytes; "
            f"add the tokenizer's files ({', '.join(_TOKENIZER_FILES[:2])})"
        )
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens ({len(text)} bytes), needs at least 2: the first is never predicted"
        )
    return torch.tensor(ids), len(text) - first


@torch.no_grad()
def total_bits(model: Any, ids: Tensor, *, window: int = WINDOW, progress: bool = False) -> float:  # ids [n]
    """-log2 of the probability of ids[1:], each given what precedes it in its window of ``window`` predictions."""
    starts = range(0, ids.numel() - 1, window)
    pieces = [ids[start : start + window + 1] for start in starts]
    rows = max(1, min(16, _LOGITS // (window * int(model.config.get_text_config().vocab_size))))
    batches: list[list[Tensor]] = []
    for piece in pieces:  # equal lengths only: no padding
        if not batches or len(batches[-1]) == rows or batches[-1][0].numel() != piece.numel():
            batches.append([])
        batches[-1].append(piece)
    shown: Iterable[list[Tensor]] = batches
    if progress:
        from tqdm import tqdm

        shown = tqdm(batches, desc="evaluate", unit="batch", leave=False)
    bits = 0.0
    for batch in shown:
        x = torch.stack(batch).to(model.device)
        logits = model(x[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
        bits += float(loss) / math.log(2)
    return bits


def evaluate(
    checkpoint: str | os.PathLike[str],
    text: bytes,
    format: Scheme | Format | str,
    *,
    backend: str = "auto",
    inputs: str | None = "scheme",
    device: torch.device | str | None = None,
    window: int = WINDOW,
    allow_skipped: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Load ``checkpoint``, quantize its experts to ``format``, and score ``text``.

    format: a scheme, a format or its name; "bf16" leaves the experts as they are; "stored" runs a quantized checkpoint as it is.

    Raises what ``load_model``, ``tokens`` and ``quantize_experts_`` raise, and ValueError for logits that are not finite.
    """
    start = time.perf_counter()
    if window < 1:
        raise ValueError(f"window is {window}, needs at least one prediction")
    if format != STORED:
        scheme_of(format)  # wrong names fail before the model is loaded
    if backend not in ("auto", *EXPERT_CLASSES):
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(('auto', *EXPERT_CLASSES))}")
    config = read_config(checkpoint)
    if format != STORED and "quantization_config" in config:
        raise ValueError(
            f"{checkpoint} is quantized already ({config['quantization_config'].get('quant_method')}): score it with the format "
            f"{STORED!r}, or quantize its full-precision source"
        )
    if format == STORED:
        _transformers()
        model, report = load_quantized(
            checkpoint, backend=backend, inputs=inputs, device=device or _default_device(), progress=progress
        )
        ids, count = tokens(checkpoint, int(model.config.get_text_config().vocab_size), text)
    else:
        model = load_model(checkpoint, device=device)
        ids, count = tokens(checkpoint, int(model.config.get_text_config().vocab_size), text)
        report = quantize_experts_(
            model, format, backend=backend, inputs=inputs, allow_skipped=allow_skipped, progress=progress
        )
    bits = total_bits(model, ids, window=window, progress=progress)
    if not math.isfinite(bits):
        raise ValueError(
            f"{checkpoint} gives logits that are not finite with {report.format} experts: "
            "check the checkpoint with mx-quant verify"
        )
    return Evaluation(str(checkpoint), report.format, bits / count, count, time.perf_counter() - start, report)


def continue_line(model: Any, prompt: bytes, *, new_bytes: int = 64) -> bytes:
    """Greedy continuation of ``prompt`` by a byte-level model."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_bytes, do_sample=False, pad_token_id=0, eos_token_id=None
        )  # fmt: skip
    return bytes(out[0, ids.shape[1] :].tolist())


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this needs transformers, which is not installed: pip install 'mx-moe[transformers]'"
        ) from error
    return transformers
