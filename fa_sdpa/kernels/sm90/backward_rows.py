"""What the backward knows of rows of queries before it multiplies, and its scratch memory.

    reset          zeroes the counters, before the main kernel; the only other launch
    prepare_rows   δ_i = Σ dO_i ∘ O_i and lse_i in log2 units, side by side where the main kernel loads them, and zeros
                   for the first users of the ring. Work of a warp that each CTA of the main kernel has for it

Blocks of tile_m rows of a head are prepared in the order in which tiles need them, by whichever CTA takes them next;
warps that prepare wait for nothing, so that a tile may wait for its group. O and dO come through shared memory, some
rows of both at a time, into ROW_STAGES stages: the warp has few registers.

Scratch memory, fp32, one tensor: for each block of rows of all heads 2 · tile_m statistics (lse, then δ); the ring of
sums of dQ, with as many blocks in a slot as a group of query heads has, as the main kernel's threads hold them, one
warpgroup after the other: four values of its thread 0, of its thread 1, …, the next four of thread 0, …; counters.

Counters, Int32: the next unit of work, and the next block of rows to prepare; for each slot how often warps that add to
it finished a tile; for each slot how often warps finished a part of its conversion; for each group how many blocks are
prepared. (The order of units: backward_order.py.) In deterministic mode also, for each block of the ring and each warp
of a CTA that adds to it, which tiles have: how many of the group's tiles come before the last one, plus 1, plus the
tiles of the slot's earlier users. Counters only ever rise.

Rows beyond seqlen_q, and rows that saw no key, get lse = +inf: exp2(s - inf) = 0 keeps them out of every gradient.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..common.softmax import LOG2_E
from .backward_order import take
from .config import ROW_STAGES
from .tma import copy_tile

WARPGROUP, THREADS = 128, 256  # of threads; those of the main kernel that multiply
ROW_LANES = 8  # that share a row: what they read at a time is in all banks of shared memory


class Scratch(NamedTuple):
    """Scratch memory of a launch."""

    statistics: cute.Tensor  # (2 · tile_m, blocks of all heads of all sequences) fp32
    sums: cute.Tensor  # (4, WARPGROUP, values / 4 of a thread, THREADS / WARPGROUP, blocks of the ring) fp32
    counters: cute.Tensor  # all that follow
    next_unit: cute.Tensor  # (1,) Int32
    next_rows: cute.Tensor  # (1,) Int32
    added: cute.Tensor  # (slots,) Int32
    converted: cute.Tensor  # (slots,) Int32
    prepared: cute.Tensor  # (groups,) Int32
    turns: cute.Tensor | None  # (adding warps of a CTA, blocks of the ring) Int32, in deterministic mode


class Rows(NamedTuple):
    """O and dO on their way to the warp that prepares rows."""

    load_o: cute.CopyAtom  # TMA, of as many rows as a stage has
    load_do: cute.CopyAtom
    gO: cute.Tensor  # (s_q, dv, h, b) TMA coordinates
    gdO: cute.Tensor
    mLSE: cute.Tensor  # (b, h, s_q) fp32


def split_scratch(
    mScratch: cute.Tensor,  # BackwardConfig.scratch elements
    blocks: Int64,
    ring_blocks: Int64,
    groups: Int32,
    slots: Int32,
    tile_m: int,
    values: int,
    adders: int | None,  # warps of a CTA that add to the sums, where they take turns
) -> Scratch:
    """The parts of the scratch tensor."""
    rows = 2 * tile_m
    statistics = cute.make_layout((rows, blocks), stride=(1, rows))
    per_warpgroup = WARPGROUP * values
    per_block = THREADS // WARPGROUP * per_warpgroup
    sums = cute.make_layout(
        (4, WARPGROUP, values // 4, THREADS // WARPGROUP, ring_blocks),
        stride=(1, 4, 4 * WARPGROUP, per_warpgroup, per_block),
    )
    start = (mScratch.iterator + rows * blocks).align(16)
    counters = cute.recast_ptr(start + per_block * ring_blocks, dtype=Int32)
    counts = [1, 1, slots, slots, groups]
    total = Int64(2 + 2 * slots + groups)
    turns = None
    if adders:
        turns = cute.make_tensor(counters + total, cute.make_layout((adders, ring_blocks)))
        total += adders * ring_blocks
    parts, position = [], Int32(0)
    for count in counts:
        parts.append(cute.make_tensor(counters + position, cute.make_layout(count)))
        position += count
    return Scratch(
        cute.make_tensor(mScratch.iterator, statistics),
        cute.make_tensor(start, sums),
        cute.make_tensor(counters, cute.make_layout(total)),
        *parts,
        turns,
    )


@cute.jit
def find_block(index: Int32, blocks: Int32, heads: Int32) -> tuple[Int32, Int32, Int32]:
    """``(m_block, head, batch)`` of a scratch block."""
    sequence = index // blocks
    return index % blocks, sequence % heads, sequence // heads


@cute.kernel
def reset(counters: cute.Tensor):
    """Zero counters, one by each thread."""
    cute.arch.griddepcontrol_launch_dependents()
    block, _, _ = cute.arch.block_idx()
    tidx, _, _ = cute.arch.thread_idx()
    index = Int64(block) * THREADS + tidx
    if index < cute.size(counters):
        counters[index] = 0


@cute.jit
def prepare_rows(
    rows: Rows,
    sO: cute.Tensor,  # (rows of a stage, dv padded, ROW_STAGES)
    sdO: cute.Tensor,
    full: cute.Pointer,  # mbarriers, one per stage, 1 arrival + bytes
    scratch: Scratch,
    qhead_per_kvhead: Int32,
    tile_m: cutlass.Constexpr[int],
) -> None:
    """By a whole warp: blocks of rows, until none is left."""
    _, heads, seqlen_q = rows.mLSE.shape
    blocks = cute.ceil_div(seqlen_q, tile_m)
    steps = tile_m // cute.size(sO, mode=[0])  # of a block
    phase = Int32(0)
    index = take(scratch.next_rows.iterator)
    while index < cute.size(scratch.statistics, mode=[1]):
        for step in cutlass.range_constexpr(ROW_STAGES):
            _load_rows(rows, sO, sdO, full, index, Int32(step), steps, blocks, heads)
        _store_lse(rows.mLSE, scratch.statistics[None, Int64(index)], index, blocks, heads, tile_m)
        if index < cute.size(scratch.sums, mode=[4]):
            for i in cutlass.range(THREADS // 32, unroll=1):
                zero_sums(scratch, Int64(index), i % 4 * 32 + cute.arch.lane_idx(), i // 4)
        for i in cutlass.range(steps // ROW_STAGES, unroll=1):
            for stage in cutlass.range_constexpr(ROW_STAGES):
                step = i * ROW_STAGES + stage
                cute.arch.mbarrier_wait(full + stage, phase)
                first = tile_m + step * cute.size(sO, mode=[0])
                delta = scratch.statistics[None, Int64(index)].iterator + first
                _sum_products(sO[None, None, stage], sdO[None, None, stage], delta)
                cute.arch.sync_warp()
                if step + ROW_STAGES < steps:
                    _load_rows(rows, sO, sdO, full, index, step + ROW_STAGES, steps, blocks, heads)
            phase ^= 1
        count_up(scratch.prepared.iterator + index // (blocks * qhead_per_kvhead))
        index = take(scratch.next_rows.iterator)


@cute.jit
def _load_rows(
    rows: Rows,
    sO: cute.Tensor,
    sdO: cute.Tensor,
    full: cute.Pointer,
    index: Int32,  # of the block
    step: Int32,
    steps: cutlass.Constexpr[int],
    blocks: Int32,
    heads: Int32,
) -> None:
    """O and dO of one step of a block, by the calling warp."""
    m_block, head, batch = find_block(index, blocks, heads)
    stage = step % ROW_STAGES
    with cute.arch.elect_one():
        num_bytes = 2 * cute.size(sO[None, None, 0]) * sO.element_type.width // 8
        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, num_bytes)
    for atom, gX, sX in ((rows.load_o, rows.gO, sO), (rows.load_do, rows.gdO, sdO)):
        copy_tile(atom, gX[None, None, head, batch], sX, m_block * steps + step, stage, full + stage)


@cute.jit
def _store_lse(
    mLSE: cute.Tensor,  # (b, h, s_q)
    statistics: cute.Tensor,  # (2 · tile_m,) of the block
    index: Int32,  # of the block
    blocks: Int32,
    heads: Int32,
    tile_m: cutlass.Constexpr[int],
) -> None:
    """lse of a block's rows, in log2 units."""
    m_block, head, batch = find_block(index, blocks, heads)
    for i in cutlass.range_constexpr(tile_m // 32):
        row = i * 32 + cute.arch.lane_idx()
        value = Float32.inf
        if m_block * tile_m + row < mLSE.shape[2]:
            natural = mLSE[batch, head, m_block * tile_m + row]
            if natural != -Float32.inf:
                value = natural * LOG2_E
        statistics[row] = value


@cute.jit
def _sum_products(sO: cute.Tensor, sdO: cute.Tensor, first: cute.Pointer) -> None:
    """δ of the rows of a stage, (rows, dv), each by ROW_LANES lanes, to memory from ``first`` on."""
    delta = cute.make_tensor(first, cute.make_layout(cute.size(sO, mode=[0])))
    lane = cute.arch.lane_idx()
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), sO.element_type, num_bits_per_copy=128)
    at_once = 32 // ROW_LANES
    for i in cutlass.range(cute.size(sO, mode=[0]) // at_once, unroll=1):
        row, total = i * at_once + lane // ROW_LANES, Float32(0.0)
        for c in cutlass.range_constexpr(cute.size(sO, mode=[1]) // (8 * ROW_LANES)):
            rO, rdO = (cute.make_rmem_tensor(8, sO.element_type) for _ in range(2))
            chunk = c * ROW_LANES + lane % ROW_LANES
            for source, target in ((sO, rO), (sdO, rdO)):
                cute.copy(load, cute.zipped_divide(source[row, None], (8,))[None, chunk], target)
            products = rO.load().to(Float32) * rdO.load().to(Float32)
            for j in cutlass.range_constexpr(8):
                total += products[j]
        total = cute.arch.warp_reduction_sum(total, threads_in_group=ROW_LANES)
        if lane % ROW_LANES == 0:
            delta[row] = total


@cute.jit
def zero_sums(scratch: Scratch, block: Int64, thread: Int32, part: Int32) -> None:
    """Zero the sums of a block that one thread of one of the two warpgroups converts."""
    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(cute.size(scratch.sums, mode=[2])):
        cute.copy(store, zeros, scratch.sums[None, thread, i, part, block])


@cute.jit
def await_count(counter: cute.Pointer, count: Int32) -> None:
    """Wait until a counter has at least this value, and until what was written before it rose can be read, and be added
    to by bulk reductions, by the calling thread."""
    seen = cute.arch.load(counter, Int32, sem="acquire", scope="gpu")
    while seen < count:
        seen = cute.arch.load(counter, Int32, sem="acquire", scope="gpu")
    cute.arch.fence_proxy("async.global")


@cute.jit
def _publish() -> None:
    """Order all that the lanes of this warp have written, and bulk operations that they waited for, before what one of
    them releases next."""
    cute.arch.fence_proxy("async.global")
    cute.arch.sync_warp()


@cute.jit
def count_up(counter: cute.Pointer) -> None:
    """One more for this warp, which has done what is counted."""
    _publish()
    with cute.arch.elect_one():
        cute.arch.red(counter, Int32(1), op="add", dtype=Int32, sem="release", scope="gpu")


@cute.jit
def end_turn(counter: cute.Pointer, value: Int32) -> None:
    """Hand the counter on: this warp has added what it had to."""
    _publish()
    with cute.arch.elect_one():
        cute.arch.store(counter, value, sem="release", scope="gpu")
