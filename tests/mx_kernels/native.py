"""What each architecture multiplies in hardware, found by compiling the canonical GEMM and reading its instructions; no GPU.

``compile_gemm`` makes the kernel as it is launched; the compile tests use it too. Run as a script (``nox -s native``) this
writes ``mx_kernels/native_table.py``: once with each Triton to collect (``native.py FILE``), then once to write what all of
them found (``native.py --write FILE...``, oldest Triton first).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aot

import mx_kernels as mk
from mx_kernels.kernels import generic_gemm as g

MATRIX = r"wgmma\.mma_async[\w.]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.:]*|v_mfma\w+|v_wmma\w+"
BLOCK_SCALED = (
    r"tcgen05\.mma.*kind::(mxf8f6f4|mxf4|mxf4nvf4)\.block_scale",
    r"mma\.sync.*kind::(mxf8f6f4|mxf4nvf4)\.block_scale",
    r"v_mfma_scale_f32_.*f8f6f4",
    r"v_wmma_scale(16)?_f32_.*f8f6f4",
)
FAMILIES = {"mxfp8": "mxfp8_e4m3", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
# Blocks of 32 and of 16 do not meet in one instruction; Triton 3.6 compiles such pairs for sm_100 with the scales misread.
PAIRS = [(x, w) for x in FAMILIES for w in FAMILIES if (x == "nvfp4") == (w == "nvfp4")]
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SILU = mk.Activation("silu")
TABLE = Path(mk.__file__).with_name("native_table.py")


def here(target: str) -> mk.Device:
    """The architecture of a target with the installed Triton."""
    return mk.Device.fake(target.replace("_", ""), aot.triton.__version__)


def compile_gemm(
    target, x, w, block=16, routing="sorted", activation=SILU, requantize=None, even=True, compute=None
) -> tuple[str, aot.Compiled]:
    """(COMPUTE, the kernel as ``_launch`` would configure it on that architecture); ``compute`` overrides the table's choice."""
    device = here(target)
    formats = [mk.FORMATS.get(name) for name in (x, w)]
    kinds = tuple(name if f is None else f.element.name for name, f in zip((x, w), formats, strict=True))
    blocks = [0 if f is None else f.block for f in formats]
    compute = compute or g.compute_mode(device, *("" if f is None else f.name for f in formats), kinds)
    options = dict(g.tile_config(compute, device.arch, kinds, blocks[1], block))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    words = [compute != "native" or name.startswith("mxfp6") for name in (x, w)]  # codes are read as words or as bytes
    stored = [POINTERS.get(name, "*i32" if word else "*u8") for name, word in zip((x, w), words, strict=True)]
    # Rows of K = 2880: 16-byte rows of words (8 of FP6), and scales by fours at best.
    units = [
        (2 if "fp6" in name else 4) if word and name in mk.FORMATS else 16
        for name, word in zip((x, w), words, strict=True)
    ]
    wanted = g.scale_units(compute, device.arch, options["REORDER"], blocks[1], options["BK"])
    scale_unit = next(unit for unit in wanted if unit <= 4)
    signature = {
        "x": stored[0],
        "x_scale": "*u8",
        "x_global": "*fp32",
        "x_stride": "i32",
        "x_scale_stride": "i32",
        "w": stored[1],
        "w_scale": "*u8",
        "w_global": "*fp32",
        "w_stride_e": "i32",
        "w_stride_n": "i32",
        "w_scale_stride_e": "i32",
        "w_scale_stride_n": "i32",
        "out": "*u8" if requantize else "*bf16",
        "out_scale": "*u8",
        "sorted_ids": "*i32",
        "expert_ids": "*i32",
        "num_padded": "*i32",
        "num_pairs": "i32",
        "top_k": "i32",
        "E": "i32",
        "N": "i32",
        "K": "i32",
        "tiles_n": "i32",
        "bias": "*bf16",
        "bias_stride_e": "i32",
        "row_weight": "*fp32",
        "alpha": "fp32",
        "beta": "fp32",
        "limit": "fp32",
    }
    a = activation
    constexprs = {
        "XKIND": kinds[0],
        "XB": blocks[0],
        "X_GLOBAL": "one" if x == "nvfp4" else "",
        "WKIND": kinds[1],
        "WB": blocks[1],
        "W_GLOBAL": "expert" if w == "nvfp4" else "",
        "ROUTING": routing,
        "BLOCK": block,
        "PAIRS": 64,
        "BIAS": True,
        "ROW_WEIGHT": True,
        "COMPUTE": compute,
        "ACT": a.kind if a else "",
        "INTERLEAVED": bool(a) and a.layout == "interleaved",
        "GATED": bool(a) and a.gated,
        "CLAMP": bool(a) and a.limit is not None,
        "WHOLE": True,
        "RAGGED": not even,
        "ELEMENT": requantize.element.name if requantize else "",
        "RULE": str(requantize.default_rule if requantize else ""),
        "WARPS": launch["num_warps"],
        "X_UNIT": units[0],
        "W_UNIT": units[1],
        "XS_UNIT": scale_unit,
        "WS_UNIT": scale_unit,
        **options,
    }
    odd = [n for n in signature if "stride" in n] + ["top_k", "num_pairs", "E", "tiles_n"]
    return compute, aot.compile_kernel(g._gemm_kernel, signature, constexprs, target, unaligned=odd, **launch)


Row = dict[str, Any]


def row(arch: str) -> Row:
    """What the installed Triton makes for ``arch`` ("sm100").

    native: the (activation, weight) families multiplied by block-scaled instructions and by nothing else. product: whether 16-bit
    activations times upcast weights compile to matrix instructions.
    """
    target = arch.replace("sm", "sm_")
    native = [(x, w) for x, w in PAIRS if _only(BLOCK_SCALED, target, FAMILIES[x], FAMILIES[w], "native")]
    return {"native": native, "product": _only([MATRIX], target, "bf16", "mxfp4", None)}


def _only(patterns: Iterable[str], target: str, x: str, w: str, compute: str | None) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # ptxas's complaints go there
            _, kernel = compile_gemm(target, x, w, activation=None, compute=compute)
    except Exception:  # of many kinds: each stage of each Triton has its own
        return False
    names = set(re.findall(MATRIX, kernel.asm))
    return bool(names) and all(re.match("|".join(patterns), name) for name in names)


def gpus() -> list[str]:
    """The architectures of the table that Triton compiles for without its vendor's own build."""
    return [a.name for a in mk.ARCHITECTURES.values() if a.vendor in ("nvidia", "amd")]


def source(found: dict[str, dict[str, Row]]) -> str:
    """The module's text from {Triton version: {architecture: row}}, oldest first: the newest's rows, and since when they hold."""
    (oldest, *_), (*_, newest) = found, found
    text = f'''"""What each architecture multiplies in hardware. Made by ``nox -s native``: do not edit.

The canonical GEMM was compiled with Triton {", ".join(found)}, and its matrix instructions read.
"""

NATIVE: dict[str, frozenset[tuple[str, str]]] = {{
'''
    for arch, made in found[newest].items():
        if made["native"]:
            inner = ", ".join(f'("{x}", "{w}")' for x, w in made["native"])
            line = f'    "{arch}": frozenset({{{inner}}}),\n'
            text += line if len(line) <= 121 else f'    "{arch}": frozenset(\n        {{{inner}}}\n    ),\n'
    text += '''}
"""(activation family, weight family) whose products are block-scaled instructions only; an architecture without any is not here."""
'''
    for name, field, what in (
        ("NATIVE_SINCE", "native", "makes an architecture's row of NATIVE"),
        ("PRODUCT_SINCE", "product", "compiles 16-bit activations times upcast weights"),
    ):
        text += f"\n{name}: dict[str, str] = {{\n"
        for arch in found[newest]:
            since = _since(found, arch, field)
            text += f'    "{arch}": "{since}",\n' if since != oldest else ""
        text += f'}}\n"""The first of those versions that {what}, where that is not the oldest."""\n'
    return text


def _since(found: dict[str, dict[str, Row]], arch: str, field: str) -> str:
    versions = list(found)
    last = found[versions[-1]][arch][field]
    while len(versions) > 1 and found[versions[-2]][arch][field] == last:
        versions.pop()
    return versions[-1]


def main(arguments: list[str]) -> None:
    if arguments[0] == "--write":
        texts = [json.loads(Path(name).read_text()) for name in arguments[1:]]
        TABLE.write_text(source({t["triton"]: t["rows"] for t in texts}))
    else:
        rows = {arch: row(arch) for arch in gpus()}
        Path(arguments[0]).write_text(json.dumps({"triton": aot.triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
