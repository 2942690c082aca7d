"""What a product does before the kernel in front has ended: it asks for weights, and begins with blocks that are done.

Weights that are asked for come to the second-level cache while the kernel in front still runs.

A product of few pairs starts early (``launch.PDL_PAIRS``) and waits for the end of the kernel in front, which makes its activations.
Its weights are there already, and memory has little to do meanwhile. So in a layer, where the alignment is known to have ended when
GEMM 2 starts (and with re-based MXFP8 GEMM 1, which follows the rows' codes), each program asks for the first steps of its own weights
before it waits (a kernel's ``ahead``). Asking for more than this slowed the kernel in front down (docs/performance-decode.md).

Where it pays (``tuning.overlaps``), each program of a layer's GEMM 1 counts its tile behind what it stored, in a place of its block, and
those of GEMM 2 wait for the count of theirs instead of for all of GEMM 1 (a packed product's ``flow``): what GEMM 1 leaves idle at its
end is used. In ``specialized.py``, whose programs draw tiles, each waits for the block of the tile that it draws; weights are not asked
for there.
"""

import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(512)  # bytes that a thread asks for
CHUNKS: tl.constexpr = tl.constexpr(16)  # that a program asks for


@triton.jit
def ask(base, at, there, size):
    """Ask for ``size`` bytes, a multiple of 16, at each of those bytes behind a pointer (rounded down to 16) that are ``there``."""
    address = tl.where(there, (base.to(tl.int64) + at) & -16, 0)
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.ne.s64 p, $1, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, $2;
        }
        """,
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def tiles_at(
    strip0, strips, w_step, k, first,
    N: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Where the first CHUNKS tiles of N rows from a strip on begin in an expert's codes, in bytes, and which are there.

    A tile is 16 rows of UNIT columns (``packing.py``). w_step: bytes from one to that of the next columns; first: a step of BK columns,
    then each STRIDE steps behind.
    """
    STRIPS: tl.constexpr = N // 16
    TILES: tl.constexpr = BK // UNIT
    i = tl.arange(0, CHUNKS)
    tile = (first + i // (STRIPS * TILES) * STRIDE) * TILES + i // STRIPS % TILES
    strip = strip0 + i % STRIPS
    return tile.to(tl.int64) * w_step + strip * CHUNK, (tile * UNIT < k) & (strip < strips)


@triton.jit
def scales_at(
    strip0, s_step, k, first,
    N: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, ROW: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The same of their scales, N * ROW bytes for 128 columns. s_step: bytes from those to the next."""
    i = tl.arange(0, CHUNKS)
    group = (first + i * STRIDE) * BK // 128
    asked = i * (N // 16 * (BK // UNIT)) < CHUNKS
    return group.to(tl.int64) * s_step + strip0 * (16 * ROW), asked & (group * 128 < k)


@triton.jit
def rows_at(
    row0, rows, width, k, first,
    N: tl.constexpr, BK: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The same of plain rows of ``width`` values of BYTES bytes: the first CHUNK bytes of CHUNKS rows, or of N and what follows."""
    COLUMNS: tl.constexpr = CHUNK // BYTES
    i = tl.arange(0, CHUNKS)
    row = row0 + i % N
    column = first * BK + i // N * (STRIDE * max(BK, COLUMNS))
    return (row.to(tl.int64) * width + column) * BYTES, (row < rows) & (column + COLUMNS <= k)


@triton.jit
def wait_where(condition):
    """``gdc_wait`` of programs for which a condition holds, without a branch: with one Triton 3.9's compiler spills."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.ne.s32 p, $1, 0;
        @p griddepcontrol.wait;
        mov.b32 $0, $1;
        }
        """,
        "=r,r",
        [condition.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def count_of(counter, count):
    """What programs of the kernel in front have counted there (``counted``): to be asked for early, beside other loads. 0 where ``count``
    is 0 or less, since there is no counter."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.gt.s32 p, $2, 0;
        mov.b32 $0, 0;
        @p ld.acquire.gpu.global.b32 $0, [$1];
        }
        """,
        "=&r,l,r",
        [counter.to(tl.int64), count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for(counter, count, found):
    """Wait until programs of the kernel in front have counted to ``count`` there; for the end of that kernel where ``count`` is 0 or less.
    found: ``count_of`` a while ago.

    No program that waits keeps those from running for which it does: it is there because all of them have begun or ended, as each lets
    the next kernel start.
    """
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 v;
        setp.gt.s32 p, $2, 0;
        @!p griddepcontrol.wait;
        setp.ge.s32 p, $3, $2;
        @p bra done;
        again:
        ld.acquire.gpu.global.b32 v, [$1];
        setp.ge.s32 p, v, $2;
        @p bra done;
        nanosleep.u32 64;
        bra again;
        done:
        mov.b32 $0, $2;
        }
        """,
        "=r,l,r,r",
        [counter.to(tl.int64), count, found],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def counted(counter):
    """Count this program, when all that its threads stored is there for whoever sees the count."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
