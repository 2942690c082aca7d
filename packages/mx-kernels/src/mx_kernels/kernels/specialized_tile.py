"""What a warpgroup of ``specialized.py`` that multiplies does with the stages that ``specialized_load.py`` fills: codes and scales to
bf16 in registers, products, sums.

A step is decoded while the products of the step in front run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .numerics import SCALED_E2M1, SCALED_E4M3, SCALED_E5M2, byte_tile, word_tile
from .specialized_load import BK, PART, _barrier, following, half_of, main_of, released, rows_of


@gluon.jit
def _scales(words, second, BLOCK: gl.constexpr):
    """int32 [S, 8], four scale bytes of a row each -> int32 [S, 8, 64 / BLOCK]: bf16 pairs of one scale, of the step's columns."""
    if BLOCK == 16:
        a, b, c, d = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            prmt.b32 t, $4, 0, 0x4040;
            mad.lo.u32 $0, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4141;
            mad.lo.u32 $1, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4242;
            mad.lo.u32 $2, t, 16, 0x76007600;
            prmt.b32 t, $4, 0, 0x4343;
            mad.lo.u32 $3, t, 16, 0x76007600;
            }
            """,
            "=&r,=&r,=&r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(gl.join(a, c), gl.join(b, d)).reshape([words.shape[0], 8, 4])
    else:
        a, b = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            prmt.b32 t, $2, 0, 0x4040;
            shl.b32 $0, t, 7;
            prmt.b32 t, $2, 0, 0x4141;
            shl.b32 $1, t, 7;
            }
            """,
            "=&r,=r,r", [words >> (16 * second)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(a, b)


@gluon.jit
def _weights(w, low, high, KIND: gl.constexpr):
    """Words [T, S, 128] of codes and of scales of their rows (the strip's upper and lower eight) -> bf16 [16 S, 64].

    ``numerics.decode_*`` with the multiplication by the scales: LLVM would pair rows for it, whose halves then have to be sorted.
    """
    if KIND == "e2m1":
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            SCALED_E2M1, "=&h,=&h,=&h,=&h,=&h,=&h,=h,=h,r,r,r", [w, low, high],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True, pack=1,
        )  # fmt: skip
        return word_tile(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            SCALED_E4M3 if KIND == "e4m3" else SCALED_E5M2, "=&h,=&h,=h,=h,r,r,r", [w, low, high],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
        return byte_tile(a, b, c, d)


@gluon.jit
def _spread(scale, KIND: gl.constexpr, BLOCK: gl.constexpr, WORDS: gl.constexpr):
    """Scales [4, 8, 64 / BLOCK] for each of the words [T, 4, 128] (strip, g, c, its four words)."""
    if KIND != "e2m1":
        L: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [1, 0, 0, 0, 0]],
            [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]],
            [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0]], [], [2, 4, 8, 4, 4],
        )  # fmt: skip
        scale = gl.convert_layout(scale.permute([2, 0, 1]), gl.SliceLayout(3, gl.SliceLayout(4, L)))
        scale, _ = gl.broadcast(scale[:, :, :, None, None], gl.full([2, 4, 8, 4, 4], 0, gl.int32, L))
        return gl.convert_layout(scale.reshape([2, 4, 128]), WORDS)
    else:
        B: gl.constexpr = 64 // BLOCK
        L: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]] if B == 2 else [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0]],
            [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
            [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]], [], [4, 8, 4, B, 4 // B],
        )  # fmt: skip
        scale = gl.convert_layout(scale, gl.SliceLayout(2, gl.SliceLayout(4, L)))
        scale, _ = gl.broadcast(scale[:, :, None, :, None], gl.full([4, 8, 4, B, 4 // B], 0, gl.int32, L))
        return gl.convert_layout(scale.reshape([1, 4, 128]), WORDS)


@gluon.jit
def _scale_words(ss, stage, OF: gl.constexpr, GROUPS: gl.constexpr, BLOCK: gl.constexpr):
    """int32 [64]: words of scales of the warpgroup's rows and 128 columns; [64, 2] where BLOCK is 16."""
    if BLOCK == 16:
        BOTH: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 16]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]], [[0, 32], [0, 64]], [], [1, 2 * PART]
        )  # fmt: skip
        return ss.index(stage * GROUPS + OF).load(BOTH).reshape([PART, 2])
    else:
        ROW: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[0, 16], [0, 32]], [], [1, PART]
        )  # fmt: skip
        return ss.index(stage * GROUPS + OF).load(ROW).reshape([PART])


@gluon.jit
def _decoded(
    ws, scales, stage, second, OF: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, OPERAND: gl.constexpr
):  # fmt: skip
    """bf16 [64, 64] of a stage: the warpgroup's part of the weight tile, as a left operand."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    T: gl.constexpr = 1 if KIND == "e2m1" else 2
    LINES: gl.constexpr = gl.DistributedLinearLayout(  # of 32 words, four a strip
        [[0, 1], [0, 2]] if T == 1 else [[0, 1], [0, 2], [16, 0]],
        [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [16 * T, 32],
    )  # fmt: skip
    lines = ws.index(stage * GROUPS + OF).load(LINES)
    words = gl.convert_layout(lines.reshape([T, 4, 128]), WORDS, assert_trivial=True)
    if BLOCK == 16:
        first, other = gl.split(scales)
        scales = gl.where(second == 1, other, first)
    low, high = gl.split(scales.reshape([4, 2, 8]).permute([0, 2, 1]))
    low = _spread(_scales(low, second, BLOCK), KIND, BLOCK, WORDS)
    high = _spread(_scales(high, second, BLOCK), KIND, BLOCK, WORDS)
    return gl.convert_layout(_weights(words, low, high, KIND), OPERAND)


@gluon.jit
def _used(a):
    """A use of registers, by a store that never happens: what they hold is there by now, decoded before a wait and not after it."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, %nsmid;
        setp.eq.u32 p, t, 0;
        @p st.shared.v4.b32 [t], {$4, $5, $6, $7};
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r", [a], dtype=gl.bfloat16, is_pure=False, pack=8,
    )  # fmt: skip


@gluon.jit
def _sums_of(ring, N: gl.constexpr):
    """Zeros [64, N], and of what is over the first product (else the same, which nobody looks at)."""
    MAIN: gl.constexpr = main_of(N, ring[0].shape[1])
    acc = gl.zeros([64, MAIN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16]))
    rest = acc
    if N > MAIN:
        rest = gl.zeros([64, N - MAIN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N - MAIN, 16]))
    return acc, rest


@gluon.jit
def _issued(a, ring, stage, acc, rest, N: gl.constexpr):
    """The products of a step, on their way."""
    xs, xt, _, _, _, _ = ring
    MAIN: gl.constexpr = main_of(N, xs.shape[1])
    acc = warpgroup_mma(a, rows_of(xs, xt, stage, 0, MAIN).permute([1, 0]), acc, is_async=True)
    if N > MAIN:
        rest = warpgroup_mma(a, rows_of(xs, xt, stage, MAIN, N - MAIN).permute([1, 0]), rest, is_async=True)
    return acc, rest


@gluon.jit
def _ended(ring, acc, rest, N: gl.constexpr, BUT: gl.constexpr = 0):
    """Wait for all products but those of the last BUT steps."""
    if main_of(N, ring[0].shape[1]) < N:
        acc, rest = warpgroup_mma_wait(2 * BUT, deps=[acc, rest])
    else:
        acc = warpgroup_mma_wait(BUT, deps=[acc])
    return acc, rest


@gluon.jit
def _in_front(stage, STAGES: gl.constexpr):
    """The stage in front. (Not a variable that a loop carries beside ``stage``: Triton takes two that begin alike for one.)"""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def passed_over(ring, stage, phase, k, STAGES: gl.constexpr):
    """Give back the stages of a tile of which a warpgroup multiplies nothing."""
    _, _, _, _, full, empty = ring
    for _ in range(gl.cdiv(k, BK)):
        mbarrier.wait(full.index(stage), phase)
        released(empty, stage)
        stage, phase = following(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def plain_tile(
    ring, stage, phase, k, OF: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, COPIED: gl.constexpr
):  # fmt: skip
    """``tile`` of plain weights: the next product is issued before the one in front of it has ended."""
    _, _, ws, _, full, empty = ring
    acc, rest = _sums_of(ring, N)
    for step in range(gl.cdiv(k, BK)):
        mbarrier.wait(full.index(stage), phase)
        if COPIED:
            fence_async_shared()
        acc, rest = _issued(ws.index(stage * GROUPS + OF), ring, stage, acc, rest, N)
        acc, rest = _ended(ring, acc, rest, N, 1)
        _barrier()
        mbarrier.arrive(empty.index(_in_front(stage, STAGES)), count=1, pred=step > 0)
        stage, phase = following(stage, phase, STAGES)
    acc, rest = _ended(ring, acc, rest, N)
    released(empty, _in_front(stage, STAGES))
    return acc, rest, stage, phase


@gluon.jit
def _ready(
    ring, stage, phase, scales, second,
    OF: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """The warpgroup's weights of a step, once they have come, and the words of their scales: of an odd step those of the one in front."""
    _, _, ws, ss, full, _ = ring
    MAIN: gl.constexpr = main_of(N, ring[0].shape[1])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16]), 2)
    mbarrier.wait(full.index(stage), phase)
    if COPIED:
        fence_async_shared()
    if scales is None:
        scales = _scale_words(ss, stage, OF, GROUPS, BLOCK)
    a = _decoded(ws, scales, stage, second, OF, GROUPS, KIND, BLOCK, OPERAND)
    return a, scales


@gluon.jit
def tile(
    ring, stage, phase, k,
    OF: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    EVEN: gl.constexpr, STAGES: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """float32 [64, N]: the sums of the warpgroup's weight rows and N pairs, in two parts.

    A step is decoded while the products of the step in front run; two steps a turn, so that operands change places without moves.
    EVEN: whether the number of steps is. COPIED: whether x was, by threads, whose stores have to be there for products.
    """
    empty = ring[5]
    acc, rest = _sums_of(ring, N)
    steps = gl.cdiv(k, BK)
    a, scales = _ready(ring, stage, phase, None, half_of(0, k, TAIL), OF, GROUPS, N, KIND, BLOCK, COPIED)
    for step in range(1, steps - 1, 2):
        acc, rest = _issued(a, ring, stage, acc, rest, N)
        behind, phase = following(stage, phase, STAGES)
        b, _ = _ready(ring, behind, phase, scales, 1, OF, GROUPS, N, KIND, BLOCK, COPIED)
        _used(b)
        acc, rest = _ended(ring, acc, rest, N)
        released(empty, stage)
        acc, rest = _issued(b, ring, behind, acc, rest, N)
        stage, phase = following(behind, phase, STAGES)
        second = (step == steps - 2).to(gl.int32) if TAIL else 0
        a, scales = _ready(ring, stage, phase, None, second, OF, GROUPS, N, KIND, BLOCK, COPIED)
        _used(a)
        acc, rest = _ended(ring, acc, rest, N)
        released(empty, behind)
    if EVEN:
        acc, rest = _issued(a, ring, stage, acc, rest, N)
        behind, phase = following(stage, phase, STAGES)
        b, _ = _ready(ring, behind, phase, scales, 1, OF, GROUPS, N, KIND, BLOCK, COPIED)
        _used(b)
        acc, rest = _ended(ring, acc, rest, N)
        released(empty, stage)
        acc, rest = _issued(b, ring, behind, acc, rest, N)
        acc, rest = _ended(ring, acc, rest, N)
        released(empty, behind)
        stage = behind
    else:
        acc, rest = _issued(a, ring, stage, acc, rest, N)
        acc, rest = _ended(ring, acc, rest, N)
        released(empty, stage)
    stage, phase = following(stage, phase, STAGES)
    return acc, rest, stage, phase
