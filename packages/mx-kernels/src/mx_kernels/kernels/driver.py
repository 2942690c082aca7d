"""Launching a compiled kernel by the CUDA driver itself, its parameters laid out once.

Triton's launcher takes each of some forty arguments as a Python object every time, and describes matrices for the copy engine (TMA)
anew: 36 us of the host's time for a product with three of them, of which the driver takes 5 (docs/performance-host.md). Here only addresses
and the stream change from one launch to the next. What a kernel's parameters are follows from Triton's signature of it, and has to be
what the driver says they are (their number and sizes): otherwise, and for whatever is not known here, there is no ``DriverLaunch``,
and Triton's launcher goes on, which is logged.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import re
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from triton.compiler import CompiledKernel

from ..choose import Unsupported

MAP = "128s"  # the copy engine's description of a matrix, CUtensorMap, aligned to 64 bytes
ADDRESS = "P"
_NUMBERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_NUMBERS |= {"u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}
_EARLY = 6  # the attribute of kernels that may start before the one in front has ended (programmatic dependent launch)
_MOST_SHARED = (
    8  # the attribute of a function: bytes of shared memory that a program of it may be given when it is launched
)
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: a thread's first use of a device


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class _Node(ctypes.Structure):
    """A kernel's launch as a node of a graph, CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("params", ctypes.c_void_p), ("extra", ctypes.c_void_p), ("kernel", ctypes.c_void_p), ("context", ctypes.c_void_p),
    )  # fmt: skip


_NAMES = (
    "cuLaunchKernelEx", "cuFuncGetParamInfo", "cuFuncGetAttribute", "cuFuncSetAttribute", "cuTensorMapEncodeTiled",
    "cuTensorMapReplaceAddress", "cuGetErrorString",
)  # fmt: skip


@functools.cache
def _cuda() -> ctypes.CDLL | None:
    """The driver, if it has all that is asked of it here (since CUDA 12.4)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1") if torch.version.hip is None else None
    except OSError:
        cuda = None
    return cuda if cuda is not None and all(hasattr(cuda, name) for name in _NAMES) else None


def asked(cuda: ctypes.CDLL, what: str, ask: Callable[..., int], *args: Any) -> None:
    """Call the driver, which then is to have done ``what``: RuntimeError, with what it says, where it has not."""
    if error := ask(*args):
        again(cuda, what, error, ask, *args)


def again(cuda: ctypes.CDLL, what: str, error: int, ask: Callable[..., int], *args: Any) -> None:
    """After a call that gave ``error``: once more with a context, if it is that which the thread lacked; else raise."""
    if error == _NO_CONTEXT:
        torch.cuda.mem_get_info()  # whatever needs a context makes the device's the thread's
        error = ask(*args)
    if error:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(error, ctypes.byref(text))
        said = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"the CUDA driver did not {what}: {said} (error {error})")


def parameters(signature: Sequence[Any]) -> list[list[str]]:
    """Of each argument by its type in Triton's signature: the parameters that it becomes, as ``struct`` has them; none where it is
    compiled in. Raises Unsupported for types that are not known here."""
    found = []
    for kind in map(str, signature):
        if kind == "constexpr":
            found.append([])
        elif kind[0] == "*":
            found.append([ADDRESS])
        elif matrix := re.match(r"tensordesc<[^[>]*\[([^\]]*)\]", kind):
            rank = matrix.group(1).count(",") + 1
            found.append([MAP, *"i" * rank, *"q" * rank])  # with its shape and strides
        elif kind in _NUMBERS:
            found.append([_NUMBERS[kind]])
        else:
            raise Unsupported(f"an argument is of type {kind}")
    return found


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What gives those places of a sequence, without a loop in Python."""
    return operator.itemgetter(*places) if len(places) > 1 else lambda given: [given[i] for i in places]


SCRATCH = (ADDRESS, ADDRESS)  # Triton's own memory for a kernel and for its profiler, behind all arguments: none


def _agrees(cuda: ctypes.CDLL, function: int, codes: Sequence[str]) -> bool:
    """Whether a kernel has those parameters, and no others."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def look(i: int) -> bool:
        refs = ctypes.byref(offset), ctypes.byref(size)
        return cuda.cuFuncGetParamInfo(ctypes.c_void_p(function), ctypes.c_size_t(i), *refs) == 0

    sizes = [struct.calcsize(code) for code in codes]
    return all(look(i) and size.value == n for i, n in enumerate(sizes)) and not look(len(codes))


class DriverLaunch:
    """A kernel's launches on one device: call it with a stream's handle and the addresses of all arguments that are tensors, in their
    order (None: no address), where the device is current.

    They differ from ``kernel[grid](*args, *values)``, for which it was compiled, in nothing but addresses, and in shared memory that a
    program gets, and leaves alone, up to ``room`` bytes. Raises Unsupported, which says why, where launches are left to Triton.
    """

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, ...], args: Sequence[Any], values: Sequence[Any], room: int = 0
    ) -> None:
        cuda, about = _cuda(), compiled.metadata
        if cuda is None:
            raise Unsupported("there is no CUDA driver, or one older than CUDA 12.4")
        for need in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"):
            if getattr(about, need, 0):
                raise Unsupported(f"its {need} is {getattr(about, need)}")
        if about.num_ctas != 1:
            raise Unsupported(f"its programs are clusters of {about.num_ctas}")
        kinds = parameters([compiled.src.signature.get(name) for name in compiled.src.fn.arg_names])
        codes = [*itertools.chain(*kinds), *SCRATCH]
        if not _agrees(cuda, compiled.function, codes):
            raise Unsupported("the driver says that its parameters are others than those of Triton's signature")
        self.cuda, self.what = cuda, f"launch {compiled.name}"
        self.function = ctypes.c_void_p(compiled.function)
        self.lock = threading.Lock()  # what the driver reads is changed for each launch
        self.early = bool(about.launch_pdl)
        if room > about.shared:
            most = ctypes.c_int()  # other launches of the kernel may have asked for more
            asked(cuda, self.what, cuda.cuFuncGetAttribute, ctypes.byref(most), _MOST_SHARED, self.function)
            asked(cuda, self.what, cuda.cuFuncSetAttribute, self.function, _MOST_SHARED, max(room, most.value))
        attribute, block = ctypes.pointer(_Attribute(_EARLY, 0, 1)), (32 * about.num_warps, 1, 1)
        self.config = _Config((*grid,), block, max(about.shared, room), None, attribute, int(self.early))
        self.ref = ctypes.byref(self.config)

        # of each parameter where it is, None for addresses; which parameters are addresses, and of which arguments
        self.at: list[int | None] = []
        self.addresses: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int, bytes, int]] = []  # (parameter, argument, a map for such matrices, its address)
        self.numbers = ctypes.create_string_buffer(8 * len(codes))
        metas = iter(getattr(about, "tensordesc_meta", None) or ())
        for i, (kind, given) in enumerate(zip(kinds, (*args, *values), strict=True)):
            if kind == [ADDRESS]:
                self.addresses.append((len(self.at), i))
                self.at.append(None)
            elif kind and kind[0] == MAP:
                self.maps.append((len(self.at), i, self._describe(given, next(metas, {})), given.base.data_ptr()))
                self.at.append(None)
                for code, n in zip(kind[1:], (*given.shape, *given.strides), strict=True):
                    self._number(code, n)
            elif kind:
                self._number(kind[0], given)
        for code in SCRATCH:
            self._number(code, 0)
        tensors = sorted(i for _, i, *_ in (*self.addresses, *self.maps))
        self.pick = None if tensors == [*range(len(args))] else picker(tensors)  # from arguments
        self.given = (ctypes.c_void_p * len(tensors))()
        self.own = Bound(self, self.given, {i: place for place, i in enumerate(tensors)})

    def _number(self, code: str, n: float) -> None:
        place = 8 * len(self.at)
        struct.pack_into(code, self.numbers, place, n)
        self.at.append(ctypes.addressof(self.numbers) + place)

    def _describe(self, matrix: Any, meta: Mapping[str, Any]) -> bytes:
        """The map of a descriptor of Triton's, as its compiler lays the matrix out in shared memory."""
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        odd = meta.get("fp4_padded") or meta.get("is_im2col") or getattr(matrix, "round_f32_to_tf32", False)
        if not meta or odd or matrix.padding != "zero":
            raise Unsupported("a descriptor for the copy engine is of a kind that is not known here")
        rank, size = len(matrix.shape), meta["elem_size"]
        numbers = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        _memory, place = _room(1)
        error = self.cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], rank, ctypes.c_void_p(matrix.base.data_ptr()),
            numbers[0](*reversed(matrix.shape)), numbers[0](*(size * n for n in reversed(matrix.strides[:-1]))),
            numbers[1](*reversed(meta["block_size"])), numbers[1](*[1] * rank),
            0, meta["swizzle"], 2, 0,  # not interleaved; 128 bytes a request of the second-level cache; zeros outside
        )  # fmt: skip
        if error:
            raise Unsupported(f"the driver does not take a descriptor (error {error})")
        return ctypes.string_at(place, 128)

    def __call__(self, stream: int, given: Sequence[int | None]) -> None:
        """Launch on addresses that are aligned to 16 bytes."""
        if self.pick is not None:
            given = self.pick(given)
        with self.lock:
            self.given[:] = given
            self.own.follow(given)
            self.config.stream = stream
            asked(self.cuda, self.what, self.cuda.cuLaunchKernelEx, self.ref, self.function, self.own.params, None)


class Bound:
    """A launch's parameters that take their addresses from a list, as the driver reads them.

    given: the list's memory; places: where the launch's arguments are in it, by their places among all arguments.
    """

    def __init__(
        self, run: DriverLaunch, given: ctypes.Array[ctypes.c_void_p], places: Sequence[int] | Mapping[int, int]
    ) -> None:
        self.run, self.given = run, given
        self.memory, begin = _room(len(run.maps))
        self.maps: list[list[Any]] = []  # (a map, the place of its address, the address that it has)
        at = [*run.at]
        for i, argument in run.addresses:
            at[i] = ctypes.addressof(given) + 8 * places[argument]
        for n, (i, argument, made, address) in enumerate(run.maps):
            at[i] = begin + 128 * n
            ctypes.memmove(begin + 128 * n, made, 128)
            self.maps.append([ctypes.c_void_p(at[i]), places[argument], address])
        self.params = (ctypes.c_void_p * len(at))(*at)
        c = run.config
        params = ctypes.addressof(self.params)
        self.node = ctypes.byref(_Node(run.function.value, c.grid, c.block, c.shared, params, None, None, None))

    def follow(self, given: Sequence[int | None]) -> None:
        """Move maps to the addresses of a list, which has been written."""
        for held in self.maps:
            if given[held[1]] != held[2]:
                address = ctypes.c_void_p(given[held[1]])
                asked(self.run.cuda, self.run.what, self.run.cuda.cuTensorMapReplaceAddress, held[0], address)
                held[2] = given[held[1]]


def _room(maps: int) -> tuple[object, int]:
    """Memory for maps, which are aligned to 64 bytes, and the first one's address."""
    memory = ctypes.create_string_buffer(64 + 128 * maps)
    return memory, -(-ctypes.addressof(memory) // 64) * 64
