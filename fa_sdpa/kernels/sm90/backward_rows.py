"""What the backward does to rows of queries before its main kernel, and its scratch memory.

    prepare   δ_i = Σ dO_i ∘ O_i and lse_i in log2 units, side by side where the main kernel loads them; one CTA of
              THREADS threads for each block of tile_m rows of a head. And zeros: the sums of dQ, the counters

Scratch memory, fp32, one tensor: for each block of rows of all heads 2 · tile_m statistics (lse, then δ); the ring of
sums of dQ, with as many blocks in a slot as a group of query heads has, as the main kernel's threads hold them, one
warpgroup after the other: four values of its thread 0, of its thread 1, …, the next four of thread 0, …; counters.

Counters, Int32: the next unit of work; for each slot how often warps that add to it finished a tile; for each slot how
often warps finished a part of its conversion. (The order of units: backward_order.py.) In deterministic mode also, for
each block of the ring and each warp of a CTA that adds to it, which tiles have: the number of the last one, plus 1,
plus the tiles of the slot's earlier users. Counters only ever rise.

Rows beyond seqlen_q, and rows that saw no key, get lse = +inf: exp2(s - inf) = 0 keeps them out of every gradient.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..common.softmax import LOG2_E

WARPGROUP, THREADS = 128, 256  # of threads; those of the main kernel that multiply


class Scratch(NamedTuple):
    """Scratch memory of a launch."""

    statistics: cute.Tensor  # (2 · tile_m, blocks of all heads of all sequences) fp32
    sums: cute.Tensor  # (4, WARPGROUP, values / 4 of a thread, THREADS / WARPGROUP, blocks of the ring) fp32
    next_unit: cute.Tensor  # (1,) Int32
    added: cute.Tensor  # (slots,) Int32
    converted: cute.Tensor  # (slots,) Int32
    turns: cute.Tensor | None  # (adding warps of a CTA, blocks of the ring) Int32, in deterministic mode


def split_scratch(
    mScratch: cute.Tensor,  # BackwardConfig.scratch elements
    blocks: Int64,
    ring_blocks: Int64,
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
    return Scratch(
        cute.make_tensor(mScratch.iterator, statistics),
        cute.make_tensor(start, sums),
        cute.make_tensor(counters, cute.make_layout(1)),
        cute.make_tensor(counters + 1, cute.make_layout(slots)),
        cute.make_tensor(counters + 1 + slots, cute.make_layout(slots)),
        cute.make_tensor(counters + 1 + 2 * slots, cute.make_layout((adders, ring_blocks))) if adders else None,
    )


@cute.jit
def _falling_index() -> Int32:
    """Scratch block of this CTA. The main kernel goes through the heads in rising order: falling order here leaves in
    L2 what is needed first."""
    index, _, _ = cute.arch.block_idx()
    count, _, _ = cute.arch.grid_dim()
    return count - 1 - index


@cute.jit
def find_block(index: Int32, blocks: Int32, heads: Int32) -> tuple[Int32, Int32, Int32]:
    """``(m_block, head, batch)`` of a scratch block."""
    sequence = index // blocks
    return index % blocks, sequence % heads, sequence // heads


@cute.kernel
def prepare(
    mO: cute.Tensor,  # (b, h, s_q, dv)
    mdO: cute.Tensor,  # (b, h, s_q, dv)
    mLSE: cute.Tensor,  # (b, h, s_q) fp32
    scratch: Scratch,
    tile_m: cutlass.Constexpr[int],
):
    cute.arch.griddepcontrol_launch_dependents()
    tidx, _, _ = cute.arch.thread_idx()
    index = _falling_index()
    _, heads, seqlen_q, head_dim_v = mO.shape
    m_block, head, batch = find_block(index, cute.ceil_div(seqlen_q, tile_m), heads)
    chunks = head_dim_v // 8  # of 16 bytes
    lanes = 8 if head_dim_v <= 64 else 16 if head_dim_v <= 128 else 32  # that share a row
    rows = THREADS // lanes
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), mO.element_type, num_bits_per_copy=128)
    lane = tidx % lanes
    for i in cutlass.range_constexpr(cute.ceil_div(tile_m, rows)):
        row = i * rows + tidx // lanes
        delta, lse = Float32(0.0), Float32.inf
        query = m_block * tile_m + row
        if query < seqlen_q:
            gO = cute.zipped_divide(mO[batch, head, query, None], (8,))
            gdO = cute.zipped_divide(mdO[batch, head, query, None], (8,))
            for c in cutlass.range_constexpr(cute.ceil_div(chunks, lanes)):
                chunk = c * lanes + lane
                if chunk < chunks:
                    rO, rdO = (cute.make_rmem_tensor(8, mO.element_type) for _ in range(2))
                    cute.copy(load, gO[None, chunk], rO)
                    cute.copy(load, gdO[None, chunk], rdO)
                    products = rO.load().to(Float32) * rdO.load().to(Float32)
                    for j in cutlass.range_constexpr(8):
                        delta += products[j]
            natural = mLSE[batch, head, query]
            if natural != -Float32.inf:
                lse = natural * LOG2_E
        delta = cute.arch.warp_reduction_sum(delta, threads_in_group=lanes)
        if lane == 0 and row < tile_m:
            scratch.statistics[row, Int64(index)] = lse
            scratch.statistics[tile_m + row, Int64(index)] = delta
    if index < cute.size(scratch.sums, mode=[4]):
        zero_block(scratch, Int64(index), tidx)
        if cutlass.const_expr(scratch.turns is not None):
            if tidx < cute.size(scratch.turns, mode=[0]):
                scratch.turns[tidx, Int64(index)] = 0
    if index == 0:
        slots = cute.size(scratch.added)
        if tidx == 0:
            scratch.next_unit[0] = 0
        for slot in cutlass.range(tidx, slots, THREADS, unroll=1):
            scratch.added[slot] = 0
            scratch.converted[slot] = 0


@cute.jit
def zero_block(scratch: Scratch, block: Int64, tidx: Int32) -> None:
    """Zero this thread's share of a block's sums."""
    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(cute.size(scratch.sums, mode=[2])):
        cute.copy(store, zeros, scratch.sums[None, tidx % WARPGROUP, i, tidx // WARPGROUP, block])


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
