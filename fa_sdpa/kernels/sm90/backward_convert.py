"""From the sums of dQ to dQ: dQ = softmax_scale · the sums, in 16 bit and in dQ's memory layout.

The threads of warpgroups 1 and 2 convert a block of query rows from shared memory, to where the producer has loaded
it. A quad's lanes hold four sums of every eight columns: two neighbours of a row, and two of the row eight further on.
Four lanes exchange those of 32 columns, so that each has eight neighbours, 16 bytes, to store.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ..common.fragments import pack_pair, read_thread_idx, transpose_in_quad
from .backward_rows import WARPGROUP


@cute.jit
def convert(
    sums: cute.Tensor,  # (4, WARPGROUP, values / 4 of a thread) fp32 in shared memory, of this thread's half
    gdQ: cute.Tensor,  # (s_q, d) of the head
    first_row: Int32,  # of the block
    softmax_scale: Float32,
    by_rows: cutlass.Constexpr[bool],  # whether a half of the sums is of 64 rows, or of half of the columns
) -> None:
    """dQ of a block, this thread's share."""
    tidx = read_thread_idx() - WARPGROUP
    thread, wg = tidx % WARPGROUP, tidx // WARPGROUP
    seqlen_q, groups = gdQ.shape[0], cute.size(sums, mode=[2])  # groups of eight columns
    row, first_group = first_row + thread // 32 * 16 + thread % 32 // 4, Int32(0)
    if cutlass.const_expr(by_rows):
        row += 64 * wg
    else:
        first_group = groups * wg
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    values = cute.make_rmem_tensor((4, groups), Float32)
    for i in cutlass.range_constexpr(groups):
        cute.copy(load, sums[None, thread, i], values[None, i])
    for r in cutlass.range_constexpr(2):
        chunks = cute.zipped_divide(gdQ[row + 8 * r, None], (8,))
        _store_row(chunks, row + 8 * r < seqlen_q, values, r, softmax_scale, first_group)


@cute.jit
def _store_row(
    gdQ: cute.Tensor,  # (8, columns / 8) of a row, 16 bit
    is_row: Boolean,  # whether there is such a row
    sums: cute.Tensor,  # (4, groups) registers, as two values of each of two rows
    r: cutlass.Constexpr[int],
    softmax_scale: Float32,
    first_group: Int32,
) -> None:
    """Round a quad's sums of one of its two rows and write them, 16 bytes a lane."""
    groups, lane = cute.size(sums, mode=[1]), read_thread_idx() % 4
    for i in cutlass.range_constexpr(0, groups, 4):
        words = cute.make_rmem_tensor(4, Int32)
        for j in cutlass.range_constexpr(4):
            words[j] = Int32(0)
            if cutlass.const_expr(i + j < groups):
                low, high = sums[2 * r, i + j] * softmax_scale, sums[2 * r + 1, i + j] * softmax_scale
                words[j] = pack_pair(low, high, gdQ.element_type)
        transpose_in_quad(words)
        group = first_group + i + lane
        if is_row and i + lane < groups and group < cute.size(gdQ, mode=[1]):
            _store_words(words, gdQ[None, group])


@cute.jit
def _store_words(words: cute.Tensor, target: cute.Tensor) -> None:
    """Four registers to eight values of 16 bit."""
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), target.element_type, num_bits_per_copy=128)
    values = cute.make_tensor(cute.recast_ptr(words.iterator, dtype=target.element_type), cute.make_layout(8))
    cute.copy(store, values, target)
