"""What the backward does to each block of query rows before and after its main kernel.

    prepare   δ_i = Σ dO_i ∘ O_i, and lse_i in log2 units, side by side where the main kernel loads them; dQ's sums = 0
    finish    dQ = softmax_scale · the sums, in 16 bit and in dQ's memory layout

Both have one CTA of THREADS threads per block of tile_m rows of a head, numbered as the blocks of the scratch memory.

Scratch memory, fp32, one tensor: for each block 2 · tile_m statistics (lse, then δ), then for each block the sums of
dQ as the main kernel's threads hold them, one warpgroup after the other: four values of its thread 0, of its thread 1,
…, the next four of thread 0, …

Rows beyond seqlen_q, and rows that saw no key, get lse = +inf: exp2(s - inf) = 0 keeps them out of every gradient.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.utils import SmemAllocator

from ..common.softmax import LOG2_E

WARPGROUP, THREADS = 128, 256  # of threads; those of the main kernel that multiply


class Scratch(NamedTuple):
    """Scratch memory of a launch; blocks are counted over all heads of all sequences."""

    statistics: cute.Tensor  # (2 · tile_m, blocks) fp32
    sums: cute.Tensor  # (4, WARPGROUP, values / 4 of a thread, THREADS / WARPGROUP, blocks) fp32


def split_scratch(mScratch: cute.Tensor, blocks: Int64, tile_m: int, values: int) -> Scratch:
    """The parts of the scratch tensor, which has blocks · (2 · tile_m + THREADS · values) elements."""
    rows = 2 * tile_m
    statistics = cute.make_layout((rows, blocks), stride=(1, rows))
    per_warpgroup = WARPGROUP * values
    sums = cute.make_layout(
        (4, WARPGROUP, values // 4, THREADS // WARPGROUP, blocks),
        stride=(1, 4, 4 * WARPGROUP, per_warpgroup, THREADS // WARPGROUP * per_warpgroup),
    )
    start = (mScratch.iterator + rows * blocks).align(16)
    return Scratch(cute.make_tensor(mScratch.iterator, statistics), cute.make_tensor(start, sums))


@cute.jit
def _falling_index() -> Int32:
    """Scratch block of this CTA. The main kernel goes through the heads in rising order: falling order before and after
    leaves in L2 what is needed next."""
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
    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(cute.size(scratch.sums, mode=[2])):
        cute.copy(store, zeros, scratch.sums[None, tidx % WARPGROUP, i, tidx // WARPGROUP, Int64(index)])


@cute.kernel
def finish(
    scratch: Scratch,
    store_atom: cute.CopyAtom,
    mdQ: cute.Tensor,  # (s_q, d, h, b), TMA coordinates
    sdQ_layout: cute.ComposedLayout,  # (tile_m, columns, 1)
    mma_dq: cute.TiledMma,
    softmax_scale: Float32,
    dtype: cutlass.Constexpr[type[cutlass.Numeric]],
    tile_m: cutlass.Constexpr[int],
    columns: cutlass.Constexpr[int],
):
    tidx, _, _ = cute.arch.thread_idx()
    index = _falling_index()
    seqlen_q, _, heads, _ = mdQ.shape
    m_block, head, batch = find_block(index, cute.ceil_div(seqlen_q, tile_m), heads)

    @cute.struct
    class SharedStorage:
        sdQ: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(sdQ_layout)], 1024]

    storage = SmemAllocator().allocate(SharedStorage)
    sdQ = storage.sdQ.get_tensor(sdQ_layout.outer, swizzle=sdQ_layout.inner)

    cute.arch.griddepcontrol_wait()  # for the main kernel's sums
    acc_dQ = cute.make_rmem_tensor(mma_dq.partition_shape_C((tile_m, columns)), Float32)
    values = cute.make_tensor(acc_dQ.iterator, cute.make_layout((4, cute.size(acc_dQ) // 4)))
    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    for i in cutlass.range_constexpr(cute.size(values, mode=[1])):
        sums = scratch.sums[None, tidx % WARPGROUP, i, tidx // WARPGROUP, Int64(index)]
        cute.copy(load, sums, values[None, i])
    rounded = cute.make_rmem_tensor(acc_dQ.layout, dtype)
    for i in cutlass.range_constexpr(cute.size(values)):
        rounded[i] = (acc_dQ[i] * softmax_scale).to(dtype)
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=2), dtype)
    copy = cute.make_tiled_copy_C(atom, mma_dq).get_slice(tidx)
    cute.copy(copy, copy.retile(rounded), copy.partition_D(sdQ[None, None, 0]))
    cute.arch.fence_view_async_shared()
    cute.arch.sync_threads()
    if tidx // 32 == 0:
        gdQ = cute.local_tile(mdQ[None, None, head, batch], (tile_m, columns), (m_block, 0))
        tQsdQ, tQgdQ = cpasync.tma_partition(
            store_atom, 0, cute.make_layout(1), cute.group_modes(sdQ[None, None, 0], 0, 2), cute.group_modes(gdQ, 0, 2)
        )
        cute.copy(store_atom, tQsdQ, tQgdQ)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
