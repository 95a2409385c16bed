"""From the sums of dQ to dQ: dQ = softmax_scale · the sums, in 16 bit and in dQ's memory layout, zeros in their place.

A unit of work is PART_BLOCKS blocks of query rows of a group. Where shared memory has room, a warp of its own converts
(``convert_aside``): bulk copies bring slabs of 2 KB, the same four values of all threads of a warpgroup, four at a time
into one of two buffers, and bulk copies of a slab of zeros follow. Elsewhere the MMA warps convert (``convert``).

A quad's lanes hold four sums of every eight columns: two neighbours of a row, and two of the row eight further on. Four
lanes exchange those of 32 columns, so that each has eight neighbours, 16 bytes, to store.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from ..common.fragments import pack_pair, read_thread_idx, transpose_in_quad
from .backward_order import CONVERT, END, PART_BLOCKS, Order, Queue, Unit, drop_unit, peek_unit
from .backward_rows import WARPGROUP, Scratch, await_count, count_up, zero_block

CONVERT_REGISTERS = 128  # of an MMA thread, for sums that are loaded at a time
SLAB = 4 * WARPGROUP  # sums
BUFFERS, SLABS = 2, 4  # slabs of a buffer


@cute.jit
def convert(
    scratch: Scratch,
    mdQ: cute.Tensor,  # (s_q, d, h, b)
    unit: Unit,
    qhead_per_kvhead: Int32,
    softmax_scale: Float32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],  # whether a warpgroup has 64 rows of dQ, or half of its columns
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
                zero_block(scratch, Int64(unit.slot * per_slot + block), tidx)
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


@cute.jit
def convert_aside(
    scratch: Scratch,
    mdQ: cute.Tensor,  # (s_q, d, h, b)
    units: Queue,
    order: Order,
    buffers: cute.Tensor,  # (4, WARPGROUP, SLABS, BUFFERS) fp32 in shared memory
    zeros: cute.Tensor,  # (SLAB,) fp32 in shared memory
    full: cute.Pointer,  # mbarriers, one per buffer
    qhead_per_kvhead: Int32,
    softmax_scale: Float32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],
    adders: cutlass.Constexpr[int],  # warps of a CTA that add to the sums
) -> None:
    """The warp that converts: its part of all units of this CTA."""
    per_slot = cute.ceil_div(mdQ.shape[0], tile_m) * qhead_per_kvhead
    for i in cutlass.range_constexpr(SLAB // 32):
        zeros[i * 32 + cute.arch.lane_idx()] = Float32(0.0)
    cute.arch.fence_view_async_shared()
    cute.arch.sync_warp()
    done = Int32(0)
    unit, _ = peek_unit(units)
    while unit.kind != END:
        if unit.kind == CONVERT:
            await_count(scratch.added.iterator + unit.slot, (unit.generation + 1) * order.tiles * adders)
            block, is_part = unit.index * PART_BLOCKS, Boolean(True)
            while is_part:
                unit, _ = peek_unit(units)  # again: registers are few
                _convert_block(
                    scratch,
                    mdQ,
                    unit,
                    buffers,
                    zeros,
                    full,
                    qhead_per_kvhead,
                    softmax_scale,
                    tile_m,
                    by_rows,
                    block,
                    done,
                )
                done += 1
                block += 1
                is_part = block % PART_BLOCKS != 0 and block < per_slot
            cute.arch.cp_async_bulk_wait_group(0)
            count_up(scratch.converted.iterator + unit.slot)
        drop_unit(units)
        unit, _ = peek_unit(units)


@cute.jit
def _convert_block(
    scratch: Scratch,
    mdQ: cute.Tensor,
    unit: Unit,
    buffers: cute.Tensor,
    zeros: cute.Tensor,
    full: cute.Pointer,
    qhead_per_kvhead: Int32,
    softmax_scale: Float32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],
    block: Int32,  # of the group
    done: Int32,  # blocks that this warp has converted before
) -> None:
    """A block of query rows, in pieces of SLABS slabs, two of which are on their way at a time."""
    slabs = cute.size(scratch.sums, mode=[2])  # of a warpgroup: groups of eight columns
    pieces = -(-slabs // SLABS)
    blocks = cute.ceil_div(mdQ.shape[0], tile_m)
    sums = scratch.sums[None, 0, None, None, Int64(unit.slot * qhead_per_kvhead * blocks + block)]
    gdQ = mdQ[None, None, unit.head * qhead_per_kvhead + block // blocks, unit.batch]
    first_row = block % blocks * tile_m
    for p in cutlass.range_constexpr(2 * pieces):
        if cutlass.const_expr(p == 0):
            _load_piece(sums, buffers, full, 0)
            _load_piece(sums, buffers, full, 1)
        cute.arch.mbarrier_wait(full + p % BUFFERS, done * pieces + p // BUFFERS & 1)
        wg, first = p // pieces, p % pieces * SLABS
        if unit.is_reused == 1:
            _zero_piece(sums, zeros, p)
        row, group = (first_row + 64 * wg, first) if by_rows else (first_row, first + slabs * wg)
        _convert_piece(buffers, p % BUFFERS, gdQ, row, group, min(SLABS, slabs - first), softmax_scale)
        cute.arch.sync_warp()
        if cutlass.const_expr(p + BUFFERS < 2 * pieces):
            _load_piece(sums, buffers, full, p + BUFFERS)


@cute.jit
def _load_piece(
    sums: cute.Tensor,  # (4, slabs, 2) of a block, those of the first thread
    buffers: cute.Tensor,
    full: cute.Pointer,
    index: cutlass.Constexpr[int],
) -> None:
    """Load a piece of a block into its buffer, which no lane reads any more."""
    slabs, buffer = sums.shape[1], index % BUFFERS
    pieces = -(-slabs // SLABS)
    wg, first = index // pieces, index % pieces * SLABS
    count = min(SLABS, slabs - first)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full + buffer, count * (4 * SLAB))
        cute.copy(
            cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32),
            cute.make_tensor(sums[None, first, wg].iterator, cute.make_layout(count * SLAB)),
            cute.make_tensor(buffers[None, 0, 0, buffer].iterator, cute.make_layout(count * SLAB)),
            mbar_ptr=full + buffer,
        )


@cute.jit
def _zero_piece(sums: cute.Tensor, zeros: cute.Tensor, index: cutlass.Constexpr[int]) -> None:
    """Store zeros in the place of a piece of a block, asynchronously, as one bulk group."""
    slabs = sums.shape[1]
    pieces = -(-slabs // SLABS)
    wg, first = index // pieces, index % pieces * SLABS
    with cute.arch.elect_one():
        for k in cutlass.range_constexpr(min(SLABS, slabs - first)):
            target = cute.make_tensor(sums[None, first + k, wg].iterator, cute.make_layout(SLAB))
            cute.copy(cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Float32), zeros, target)
    cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _convert_piece(
    buffers: cute.Tensor,
    buffer: cutlass.Constexpr[int],
    gdQ: cute.Tensor,  # (s_q, d) of a head
    first_row: Int32,
    first_group: cutlass.Constexpr[int],  # of eight columns
    groups: cutlass.Constexpr[int],  # that the piece has
    softmax_scale: Float32,
) -> None:
    """dQ of 64 rows and 8 · groups columns."""
    lane = cute.arch.lane_idx()
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=64)
    group = first_group + lane % 4
    is_group = lane % 4 < groups and group < gdQ.shape[1] // 8
    start = buffers[None, None, None, buffer].iterator + lane * 4
    for i in cutlass.range(8, unroll=1):  # of eight rows: of each of a warpgroup's four warps, the first and the second
        words = cute.make_rmem_tensor(4, Int32)
        for k in cutlass.range_constexpr(SLABS):
            pair = cute.make_rmem_tensor(2, Float32)
            pair.fill(0.0)
            if cutlass.const_expr(k < groups):
                source = (start + (i // 2 * 128 + i % 2 * 2 + k * SLAB)).align(8)
                cute.copy(load, cute.make_tensor(source, cute.make_layout(2)), pair)
            words[k] = pack_pair(pair[0] * softmax_scale, pair[1] * softmax_scale, gdQ.element_type)
        transpose_in_quad(words)
        row = first_row + i * 8 + lane // 4
        if is_group and row < gdQ.shape[0]:
            _store_words(words, cute.zipped_divide(gdQ[row, None], (8,))[None, group])
