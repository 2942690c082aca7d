"""Ahead-of-time compilation of Triton kernels, shared by all compile tests: no GPU is needed.

``compile_kernel(fn, signature, constexprs, "sm_90")`` gives the assembly text, registers, spills and, for NVIDIA, ptxas's
log and the disassembly, through the tools that ship in the Triton wheel. What ``kernels/driver.py`` takes for an NVIDIA kernel's
parameters is compared with those that it declares.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.experimental.gluon._runtime import GluonASTSource

from mx_kernels.kernels.driver import SCRATCH, parameters

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 103, 120, 121)}
TARGETS |= {
    f"gfx{n}": GPUTarget("hip", f"gfx{n}", 64 if n[0] == "9" else 32)
    for n in ("90a", "942", "950", "1100", "1201", "1250")
}
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, eq=False)
class Compiled:
    """One compiled kernel. ``asm`` is PTX or AMDGCN text; ``spills`` counts bytes (NVIDIA) or registers (AMD)."""

    target: str
    asm: str
    ir: str
    registers: int
    spills: int
    shared: int
    cubin: bytes | None = None
    said: str = ""

    @functools.cached_property
    def log(self) -> str:
        """What ``ptxas -v`` says: C7510 and C7515 are serialized wgmma. Empty for AMD."""
        if self.cubin is None or self.said:
            return self.said
        arch = re.search(r"\.target\s+(\w+)", self.asm)
        assert arch is not None
        tool = get_ptxas(TARGETS[self.target].arch).path
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(self.asm)
            command = [tool, "-v", f"--gpu-name={arch.group(1)}", source, "-o", Path(folder, "kernel.cubin")]
            return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    @functools.cached_property
    def sass(self) -> list[str]:
        """The machine instructions in order ("LDG.E.128 R4, ..." with predicates removed); NVIDIA only."""
        found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*[^;]*);", self._text, re.M)
        return [line for line in (f.strip() for f in found) if not line.startswith("NOP")]

    def opcodes(self, *, full: bool = False) -> Counter[str]:
        """How often each machine opcode occurs ("LDG"), with its modifiers ("LDG.E.128") where ``full``; NVIDIA only."""
        names = (line.split()[0] for line in self.sass)
        return Counter(name if full else name.split(".")[0] for name in names)

    def loops(self) -> list[list[str]]:
        """The bodies of the backward branches, shortest first, as instruction lists; NVIDIA only."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        found = []
        for line in self._text.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label.group(1)] = len(instructions)
            elif m := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*[^;]*);", line):
                instructions.append(m.group(1).strip())
                branch = re.match(r"BRA.*?(\.L_\w+)", instructions[-1])
                if branch and branch.group(1) in labels:
                    found.append((labels[branch.group(1)], len(instructions)))
        return sorted((instructions[a:b] for a, b in found if b - a > 1), key=len)

    def overwritten(self) -> list[str]:
        """Instructions that write registers which a warpgroup product in flight still reads as its left operand; sm_90 only.

        A product reads them until a WARPGROUP.DEPBAR has waited for its group. Loops are walked twice, since what is in flight at
        their end is so at their start.
        """
        found = []
        for body in (self.sass, *(loop * 2 for loop in self.loops())):
            groups: list[set[int]] = []
            group: set[int] = set()
            for line in body:
                if product := re.match(r"[HQI]GMMA\S* R\d+, R(\d+), gdesc", line):
                    first = int(product.group(1))
                    group |= set(range(first, first + 4))
                if re.match(r"[HQI]GMMA.* gsb0", line):
                    groups, group = [*groups, group], set()
                elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", line):
                    kept = int(wait.group(1), 16)
                    groups = groups[-kept:] if kept else []
                elif _written(line) & group.union(*groups):
                    found.append(line)
        return found

    @functools.cached_property
    def _text(self) -> str:
        return self._tool("nvdisasm", "-c")

    def _tool(self, name: str, *flags: str) -> str:
        assert self.cubin is not None, f"{self.target} has no cubin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([_TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True).stdout


_WIDTHS = {"64": 2, "128": 4, "WIDE": 2}
_NO_RESULT = re.compile(
    r"ST|RED|BAR|BRA|DEPBAR|WARPGROUP|WARPSYNC|[FDIHU]SETP|PLOP3|LDGSTS|U[A-Z]|R2UR|R2P|EXIT|BS|[HQI]GMMA|MEMBAR|ERRBAR"
)


@functools.cache
def _written(line: str) -> frozenset[int]:
    """The registers that a machine instruction writes."""
    opcode, *operands = line.replace(",", " ").split()
    result = next((o for o in operands if re.match(r"R\d+", o)), None)
    if _NO_RESULT.match(opcode) or result is None or (operands[0] != result and operands[0][0] != "P"):
        return frozenset()
    first = int(re.match(r"R(\d+)", result).group(1))  # type: ignore[union-attr]
    parts = opcode.split(".")
    wide = 2 if parts[0] == "CS2R" and "32" not in parts else max([_WIDTHS.get(p, 1) for p in parts])
    if parts[0] == "LDSM":
        wide = int(parts[-1]) if parts[-1].isdigit() else 1
    return frozenset(range(first, first + wide))


def compile_kernel(fn, signature, constexprs, target, *, unaligned=(), **options) -> Compiled:
    """Compile a ``@triton.jit`` or ``@gluon.jit`` function for a name in ``TARGETS``.

    signature: {parameter: type} of every run-time parameter ("*bf16", "*u8", "*fp8e4nv", "i32", "i64", "fp32").
    constexprs: {parameter: value}; a run-time parameter whose host value is 1 or None belongs here too, as in a launch.
    unaligned: run-time parameters that are *not* multiples of 16; pointers and integers are otherwise taken as such.
    options: num_warps, num_stages, maxnreg ...
    """
    names = fn.arg_names
    unknown = (set(signature) | set(constexprs)) ^ set(names)
    assert not unknown, f"{fn.__name__}: parameters {sorted(unknown)} are unknown or missing"
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = [
        i for i, n in enumerate(names) if n not in unaligned and (types[n][0] == "*" or types[n] in ("i32", "i64"))
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(
        fn=fn, signature=types, constexprs={(names.index(k),): v for k, v in constexprs.items()}, attrs=attrs
    )
    gpu = TARGETS[target]
    said = io.StringIO()  # nothing where Triton's cache has the kernel
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = gpu.backend == "cuda"
        kernel = triton_compile(source, target=gpu, options=options)
    shared = kernel.metadata.shared
    if gpu.backend == "hip":
        asm = kernel.asm["amdgcn"]
        registers = _number(asm, r"\.vgpr_count:\s*(\d+)")
        spills = _number(asm, r"\.vgpr_spill_count:\s*(\d+)")
        return Compiled(target, asm, kernel.asm["ttgir"], registers, spills, shared)
    made = Compiled(target, kernel.asm["ptx"], kernel.asm["ttgir"], 0, 0, shared, kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", made._tool("cuobjdump", "-res-usage"))
    assert usage is not None
    registers, stack, local = (int(n) for n in usage.groups())
    if gpu.arch >= 90 or not any("tensordesc" in kind for kind in types.values()):  # older ones have no copy engine
        codes = [*itertools.chain(*parameters([types[name] for name in names])), *SCRATCH]
        assert _parameter_bytes(made.asm) == [struct.calcsize(code) for code in codes], "the driver cannot launch it"
    return Compiled(target, made.asm, made.ir, registers, stack + local, shared, made.cubin, said.getvalue())


def _parameter_bytes(ptx: str) -> list[int]:
    """Sizes of a kernel's parameters."""
    head = re.search(r"\.entry \w+\(([^)]*)\)", ptx)
    assert head is not None
    found = re.findall(r"\.param\s+(?:\.align \d+\s+)?\.[a-z](\d+)[^\n\[,]*(?:\[(\d+)\])?", head.group(1))
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))
