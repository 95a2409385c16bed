"""Keys that an attn_mask hides from all of a tile: their rows of K and V are zeroed in shared memory before they are
multiplied. A weight of 0 times NaN would be NaN."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..common.fragments import read_thread_idx

WARPGROUP = 128  # threads


@cute.jit
def clear_keys(
    tile: cute.Tensor,  # (rows up to 128, columns, stages) of 16 bit, swizzled in rows of 128 bytes
    stage: Int32 | int,
    hidden: cute.Tensor,  # (4,) Int32 in global memory: bit j of word w is row 32w + j
    barrier: Int32 | int,  # named barrier of this warpgroup
) -> None:
    """Zero those rows of a stage, for this warpgroup: where several read a tile, each of them does it. They all have to
    be there already, and WGMMAs may read them then; TMA may write them once the stage is released."""
    rows, columns = cute.size(tile, mode=[0]), cute.size(tile, mode=[1])
    thread = read_thread_idx() % WARPGROUP
    octet = thread // 8  # of rows; 8 threads zero a row, whatever the swizzle makes of it
    word = hidden[octet // 4] >> octet % 4 * 8
    first = stage * (rows * columns // 2) + octet * 256 + thread % 8 * 4
    start = cute.recast_ptr(tile.iterator, dtype=Int32) + first
    zeros = cute.make_rmem_tensor(4, Int32)
    zeros.fill(0)
    for r in cutlass.range_constexpr(8):
        if word >> r & 1 != 0:
            for slab in cutlass.range_constexpr(columns // 64):
                there = (start + (slab * rows * 32 + r * 32)).align(16)
                cute.autovec_copy(zeros, cute.make_tensor(there, cute.make_layout(4)))
    cute.arch.fence_view_async_shared()
    cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
