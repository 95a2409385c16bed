"""From the sums of dQ to dQ: dQ = softmax_scale · the sums, in 16 bit and in dQ's memory layout, zeros in their place.

A unit of work is PART_BLOCKS blocks of query rows of a group. Where shared memory has room, a warp of its own converts
(``convert_aside``): bulk copies bring slabs of 2 KB, the same four values of all threads of a warpgroup, four at a time
into one of two buffers; bulk copies of a slab of zeros follow; TMA stores dQ, a warpgroup's part of a block at a time.
Elsewhere the MMA warps convert (``convert``), from registers. A quad's lanes hold four sums of every eight columns: two
neighbours of a row, and two of the row eight further on. Four lanes exchange those of 32 columns, so that each has
eight neighbours, 16 bytes, to store.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warp

from ..common.fragments import pack_pair, read_thread_idx, transpose_in_quad
from .backward_order import CONVERT, END, PART_BLOCKS, Order, Queue, Unit, drop_unit, peek_unit
from .backward_rows import WARPGROUP, Scratch, await_count, count_up, zero_block
from .wgmma import K_MAJOR, MN_MAJOR, tiled_mma

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


class Aside(NamedTuple):
    """What the warp that converts works with."""

    buffers: cute.Tensor  # (4, WARPGROUP, SLABS, BUFFERS) fp32 in shared memory
    zeros: cute.Tensor  # (SLAB,) fp32 in shared memory
    full: cute.Pointer  # mbarriers, one per buffer
    sdQ: cute.Tensor  # (64, columns) of a warpgroup, 16 bit in shared memory
    atom: cute.CopyAtom  # TMA store of it
    mdQ: cute.Tensor  # (s_q, d, h, b), TMA coordinates
    softmax_scale: Float32


@cute.jit
def convert_aside(
    scratch: Scratch,
    aside: Aside,
    units: Queue,
    order: Order,
    qhead_per_kvhead: Int32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],
    adders: cutlass.Constexpr[int],  # warps of a CTA that add to the sums
) -> None:
    """The warp that converts: its part of all units of this CTA."""
    per_slot = cute.ceil_div(aside.mdQ.shape[0], tile_m) * qhead_per_kvhead
    for i in cutlass.range_constexpr(SLAB // 32):
        aside.zeros[i * 32 + cute.arch.lane_idx()] = Float32(0.0)
    cute.arch.fence_view_async_shared()
    cute.arch.sync_warp()
    unit, _ = peek_unit(units)
    while unit.kind != END:
        if unit.kind == CONVERT:
            await_count(scratch.added.iterator + unit.slot, (unit.generation + 1) * order.tiles * adders)
            block, is_part = unit.index * PART_BLOCKS, Boolean(True)
            while is_part:
                _convert_block(scratch, aside, units, qhead_per_kvhead, tile_m, by_rows, block)
                block += 1
                is_part = block % PART_BLOCKS != 0 and block < per_slot
            cute.arch.cp_async_bulk_wait_group(0)
            unit, _ = peek_unit(units)
            count_up(scratch.converted.iterator + unit.slot)
        drop_unit(units)
        unit, _ = peek_unit(units)


@cute.jit
def _convert_block(
    scratch: Scratch,
    aside: Aside,
    units: Queue,
    qhead_per_kvhead: Int32,
    tile_m: cutlass.Constexpr[int],
    by_rows: cutlass.Constexpr[bool],
    block: Int32,  # of the group
) -> None:
    """A block of query rows: for each warpgroup its pieces of SLABS slabs, each in a buffer of its own. Registers are
    few: what the unit says is read from the queue again and again."""
    slabs = cute.size(scratch.sums, mode=[2])  # of a warpgroup: groups of eight columns
    blocks = cute.ceil_div(aside.mdQ.shape[0], tile_m)
    per_slot = qhead_per_kvhead * blocks
    for p in cutlass.range_constexpr(0, slabs, SLABS):
        _load_piece(_sums(scratch, units, per_slot, block, Int32(0)), aside, p)
    for wg in cutlass.range(2, unroll=1):
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # by the last store of dQ
        cute.arch.sync_warp()
        for p in cutlass.range_constexpr(0, slabs, SLABS):
            cute.arch.mbarrier_wait(aside.full + p // SLABS, wg)
            unit, _ = peek_unit(units)
            if unit.is_reused == 1:
                _zero_piece(_sums(scratch, units, per_slot, block, wg), aside.zeros, p)
            _convert_piece(aside, p)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            if wg == 0:
                _load_piece(_sums(scratch, units, per_slot, block, wg + 1), aside, p)
        unit, _ = peek_unit(units)
        row, column = block % blocks, wg
        if cutlass.const_expr(by_rows):
            row, column = 2 * row + wg, Int32(0)
        mdQ = aside.mdQ[None, None, unit.head * qhead_per_kvhead + block // blocks, unit.batch]
        gdQ = cute.local_tile(mdQ, (64, cute.size(aside.sdQ, mode=[1])), (row, column))
        tXsX, tXgX = cpasync.tma_partition(
            aside.atom, 0, cute.make_layout(1), cute.group_modes(aside.sdQ, 0, 2), cute.group_modes(gdQ, 0, 2)
        )
        cute.copy(aside.atom, tXsX, tXgX)
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _sums(scratch: Scratch, units: Queue, per_slot: Int32, block: Int32, wg: Int32) -> cute.Tensor:
    """(4, slabs) sums of a warpgroup's part of a block of the group of the unit, those of its first thread."""
    unit, _ = peek_unit(units)
    return scratch.sums[None, 0, None, wg, Int64(unit.slot * per_slot + block)]


@cute.jit
def _load_piece(
    sums: cute.Tensor,  # (4, slabs)
    aside: Aside,
    first: cutlass.Constexpr[int],  # slab
) -> None:
    """Load a piece into its buffer, which no lane reads any more."""
    count, buffer = min(SLABS, sums.shape[1] - first), first // SLABS
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(aside.full + buffer, count * (4 * SLAB))
        cute.copy(
            cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32),
            cute.make_tensor(sums[None, first].iterator, cute.make_layout(count * SLAB)),
            cute.make_tensor(aside.buffers[None, 0, 0, buffer].iterator, cute.make_layout(count * SLAB)),
            mbar_ptr=aside.full + buffer,
        )


@cute.jit
def _zero_piece(sums: cute.Tensor, zeros: cute.Tensor, first: cutlass.Constexpr[int]) -> None:
    """Store zeros in the place of a piece, asynchronously, as one bulk group."""
    with cute.arch.elect_one():
        for k in cutlass.range_constexpr(first, min(first + SLABS, sums.shape[1])):
            target = cute.make_tensor(sums[None, k].iterator, cute.make_layout(SLAB))
            cute.copy(cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Float32), zeros, target)
    cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _convert_piece(aside: Aside, first: cutlass.Constexpr[int]) -> None:
    """Round a piece, and write it to its columns of the tile in shared memory."""
    dtype, columns = aside.sdQ.element_type, cute.size(aside.sdQ, mode=[1])
    count = min(SLABS, columns // 8 - first)
    mma = tiled_mma(dtype, (K_MAJOR, MN_MAJOR), (1, 1), columns, a_in_registers=True)
    store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for w in cutlass.range(4, unroll=1):  # the warps of a warpgroup, one after the other
        thread = w * 32 + read_thread_idx() % 32
        copy = cute.make_tiled_copy_C(store, mma).get_slice(thread)
        rounded = cute.make_rmem_tensor(mma.partition_shape_C((64, columns)), dtype)
        words = cute.recast_tensor(rounded, Int32)
        source, target = copy.retile(rounded), copy.partition_D(aside.sdQ)
        for k in cutlass.range_constexpr(0, count, 2):
            sums = cute.make_rmem_tensor((4, 2), Float32)
            for j in cutlass.range_constexpr(2):
                cute.copy(load, aside.buffers[None, thread, k + j, first // SLABS], sums[None, j])
            for j in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    low, high = sums[2 * r, j] * aside.softmax_scale, sums[2 * r + 1, j] * aside.softmax_scale
                    words[2 * (first + k + j) + r] = pack_pair(low, high, dtype)
            pair = (first + k) // 2
            cute.copy(copy, source[(None, pair), None, None], target[(None, pair), None, None])
