"""What the backward knows of rows of queries before it multiplies, and its scratch memory.

    reset     zeroes the counters, before the main kernel; the only other launch
    prepare   δ_i = Σ dO_i ∘ O_i and lse_i in log2 units, side by side where the main kernel loads them; by the warps of
              warpgroups 1 and 2, from a block of O and dO in shared memory

Scratch memory, fp32, one tensor: for each block of rows of all heads 2 · tile_m statistics (lse, then δ); the ring of
sums of dQ, with as many blocks in a slot as a group of query heads has, as the main kernel's threads hold them, one
warpgroup after the other: four values of its thread 0, of its thread 1, …, the next four of thread 0, …; counters.

Counters, Int32: the next unit of work; for each slot how often warps that add to it finished a tile; for each slot how
often warps finished a part of its conversion; for each group how often warps prepared a part of it. (The order of
units: backward_order.py.) In deterministic mode also, for each tile, up to which position it has added to the sums
(backward_turns.py). Counters only ever rise.

Rows beyond seqlen_q, and rows that saw no key, get lse = +inf: exp2(s - inf) = 0 keeps them out of every gradient.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..common import fragments
from ..common.softmax import LOG2_E

WARPGROUP, THREADS = 128, 256  # of threads; those of the main kernel that multiply
ROW_LANES = 8  # that share a row of O and dO: they read 128 bytes of it at a time


class Scratch(NamedTuple):
    """Scratch memory of a launch."""

    statistics: cute.Tensor  # (2 · tile_m, blocks of all heads of all sequences) fp32
    sums: cute.Tensor  # (4, WARPGROUP, values / 4 of a thread, THREADS / WARPGROUP, blocks of the ring) fp32
    counters: cute.Tensor  # all that follow
    next_unit: cute.Tensor  # (1,) Int32
    added: cute.Tensor  # (slots,) Int32
    converted: cute.Tensor  # (slots,) Int32
    prepared: cute.Tensor  # (groups,) Int32
    turns: cute.Tensor | None  # (warps of a CTA that hand them on, tiles, groups) Int32, in deterministic mode


def split_scratch(
    mScratch: cute.Tensor,  # BackwardConfig.scratch elements
    blocks: Int64,
    ring_blocks: Int64,
    groups: Int32,
    slots: Int32,
    tile_m: int,
    values: int,
    turns: tuple | None,  # shape of the counters in deterministic mode
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
    counts = [1, slots, slots, groups]
    total = Int64(1 + 2 * slots + groups)
    if turns is not None:
        turns = cute.make_tensor(counters + total, cute.make_layout(turns))
        total += cute.size(turns)
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
def prepare(
    sO: cute.Tensor,  # (tile_m, dv padded)
    sdO: cute.Tensor,
    lse: cute.Tensor,  # (s_q,) of the head
    first_row: Int32,
    statistics: cute.Tensor,  # (2 · tile_m,) of the block
) -> None:
    """A block of rows, by the THREADS threads of eight warps: each has as many rows, ROW_LANES lanes have one."""
    tidx = fragments.read_thread_idx() - WARPGROUP
    lane = tidx % 32
    tile_m, columns = (cute.size(sO, mode=[mode]) for mode in (0, 1))
    rows = tile_m // (THREADS // 32)  # of a warp
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), sO.element_type, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(rows * ROW_LANES // 32):
        row, delta = tidx // 32 * rows + i * (32 // ROW_LANES) + lane // ROW_LANES, Float32(0.0)
        for c in cutlass.range_constexpr(columns // (8 * ROW_LANES)):
            rO, rdO = (cute.make_rmem_tensor(8, sO.element_type) for _ in range(2))
            for source, target in ((sO, rO), (sdO, rdO)):
                chunk = cute.local_tile(source, (1, 8), (row, c * ROW_LANES + lane % ROW_LANES))
                cute.copy(load, cute.group_modes(chunk, 0, 2), target)
            wide, wide_do = rO.load().to(Float32), rdO.load().to(Float32)
            for j in cutlass.range_constexpr(8):
                delta += wide[j] * wide_do[j]
        delta = cute.arch.warp_reduction_sum(delta, threads_in_group=ROW_LANES)
        if lane % ROW_LANES == 0:
            value = Float32.inf
            if first_row + row < cute.size(lse):
                natural = lse[first_row + row]
                if natural != -Float32.inf:
                    value = natural * LOG2_E
            statistics[row] = value
            statistics[tile_m + row] = delta


@cute.jit
def zero_sums(scratch: Scratch, block: Int64, thread: Int32, part: Int32) -> None:
    """Zero the sums of a block that one thread of one of the two warpgroups converts."""
    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(cute.size(scratch.sums, mode=[2])):
        cute.copy(store, zeros, scratch.sums[None, thread, i, part, block])


@cute.jit
def await_count(counter: cute.Pointer, count: Int32) -> Int32:
    """Wait until a counter has at least this value, and until what was written before it rose can be read, and be added
    to by bulk reductions, by the calling thread; the value."""
    seen = cute.arch.load(counter, Int32, sem="acquire", scope="gpu")
    while seen < count:
        seen = cute.arch.load(counter, Int32, sem="acquire", scope="gpu")
    cute.arch.fence_proxy("async.global")
    return seen


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
    """Set a counter that only this warp writes."""
    _publish()
    with cute.arch.elect_one():
        cute.arch.store(counter, value, sem="release", scope="gpu")
