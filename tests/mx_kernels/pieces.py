"""A kernel that says what ``specialized_load.fill_tables`` and ``piece`` make of an alignment; the ``pieces`` fixture loads it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mx_kernels.kernels.specialized_load import TABLE, _barrier, block_of, fill_tables, piece

LEVELS = {160: (64, 96, 128, 160), 256: (64, 128, 192, 256), 288: (64, 128, 192, 256, 288)}


@gluon.jit
def pieces_kernel(found, sorted_ids, expert_ids, num_padded, pairs, group, tiles, BM: gl.constexpr):
    """found: [blocks * tiles, 4] block, tile, expert and level of each piece of work."""
    runs = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ids = gl.allocate_shared_memory(gl.int32, [TABLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    blocks = gl.load(num_padded) // block_of(BM)
    fill_tables(runs, ids, sorted_ids, expert_ids, blocks, pairs, group, BM)
    _barrier()
    for t in range(blocks * tiles):
        block, tile, e, level = piece(t, tiles, blocks, group, runs, ids, sorted_ids, expert_ids, pairs, BM)
        gl.store(found + 4 * t, block)
        gl.store(found + 4 * t + 1, tile)
        gl.store(found + 4 * t + 2, e)
        gl.store(found + 4 * t + 3, level)
