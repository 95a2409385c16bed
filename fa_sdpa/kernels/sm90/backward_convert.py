"""From the sums of dQ to dQ: dQ = softmax_scale · the sums, in 16 bit and in dQ's memory layout, zeros in their place.

A unit of work is PART_BLOCKS blocks of query rows of a group, and the threads of warpgroups 1 and 2 convert it, from
registers. A quad's lanes hold four sums of every eight columns: two neighbours of a row, and two of the row eight
further on. Four lanes exchange those of 32 columns, so that each has eight neighbours, 16 bytes, to store.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from ..common.fragments import pack_pair, read_thread_idx, transpose_in_quad
from .backward_order import PART_BLOCKS, Unit
from .backward_rows import WARPGROUP, Scratch, zero_sums

CONVERT_REGISTERS = 128  # of an MMA thread, for sums that are loaded at a time


@cute.jit
def convert(
    scratch: Scratch,
    mdQ: cute.Tensor,  # (s_q, d, h, b)
    unit: Unit,
    qhead_per_kvhead: Int32,
    softmax_scale: Float32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],  # whether a half of the sums is of 64 rows, or of half of the columns
) -> None:
    """dQ of the blocks of a unit, this thread's share, from complete sums; then zeros for the slot's next user."""
    tidx = read_thread_idx() - WARPGROUP
    thread, wg = tidx % WARPGROUP, tidx // WARPGROUP
    seqlen_q, head_dim, _, _ = mdQ.shape
    blocks = cute.ceil_div(seqlen_q, tile_m)
    per_slot = blocks * qhead_per_kvhead
    groups = cute.size(scratch.sums, mode=[2])  # of eight columns, that this thread has sums in
    first_row, first_group = thread // 32 * 16 + thread % 32 // 4, Int32(0)
    if cutlass.const_expr(by_rows):
        first_row += 64 * wg
    else:
        first_group = groups * wg
    load = cute.make_copy_atom(
        cute.nvgpu.CopyG2ROp(),
        Float32,
        num_bits_per_copy=128,
        memory_order=cute.nvgpu.MemoryOrder.RELAXED,
        memory_scope=cute.nvgpu.MemoryScope.GPU,
    )
    batch = max(1, min(PART_BLOCKS, CONVERT_REGISTERS // (4 * groups)))  # blocks whose loads are in flight together
    start = unit.index * PART_BLOCKS
    for first in cutlass.range(start, cutlass.min(start + PART_BLOCKS, per_slot), batch, unroll=1):
        sums = cute.make_rmem_tensor((4, groups, batch), Float32)
        for b in cutlass.range_constexpr(batch):
            ring_block = Int64(unit.slot * per_slot + cutlass.min(first + b, per_slot - 1))
            for i in cutlass.range_constexpr(groups):
                cute.copy(load, scratch.sums[None, thread, i, wg, ring_block], sums[None, i, b])
        for b in cutlass.range_constexpr(batch):
            block = first + b
            if unit.is_reused == 1 and block < per_slot:
                zero_sums(scratch, Int64(unit.slot * per_slot + block), thread, wg)
            head = unit.head * qhead_per_kvhead + block // blocks
            row = block % blocks * tile_m + first_row
            for r in cutlass.range_constexpr(2):
                gdQ = cute.zipped_divide(mdQ[row + 8 * r, None, head, unit.batch], (8,))
                is_row = row + 8 * r < seqlen_q and block < per_slot
                _store_row(gdQ, is_row, sums[None, None, b], r, softmax_scale, first_group)


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
    groups, lane = cute.size(sums, mode=[1]), cute.arch.lane_idx() % 4
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
