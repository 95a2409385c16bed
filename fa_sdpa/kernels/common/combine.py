"""Attention over keys that were split into parts: the parts' results to one.

Each part j has for each row its own lse_j and O_j over its keys. Then lse = log Σ_j exp(lse_j) and
O = Σ_j exp(lse_j - lse) · O_j (FlashDecoding; the merge step of FlashAttention, arXiv 2205.14135, section 3.1).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.utils import SmemAllocator

from .softmax import LN2, LOG2_E

WARPS = 8


@cute.kernel
def combine(
    mPart: cute.Tensor,  # (b · parts, h, s_q, > dv) fp32, parts of a sequence side by side: O_j, then lse_j
    mO: cute.Tensor,  # (b, h, s_q, dv), out
    mLSE: cute.Tensor,  # (b, h, s_q) fp32, out
    num_parts: Int32,
):
    """One CTA of WARPS warps a row; warp w adds up the parts w, w + WARPS, …, each lane four columns at a time."""
    tidx, _, _ = cute.arch.thread_idx()
    row, head, batch = cute.arch.block_idx()
    warp, lane = tidx // 32, tidx % 32
    head_dim_v = cutlass.const_expr(mO.shape[3])
    groups = cutlass.const_expr(cute.ceil_div(head_dim_v, 128))  # of four columns for each lane
    gPart = mPart[None, head, row, None]
    first = batch * num_parts

    @cute.struct
    class SharedStorage:
        sO: cute.struct.Align[cute.struct.MemRange[Float32, WARPS * head_dim_v], 16]
        totals: cute.struct.MemRange[Float32, WARPS]

    storage = SmemAllocator().allocate(SharedStorage)
    sO = storage.sO.get_tensor(cute.make_layout((WARPS, head_dim_v), stride=(head_dim_v, 1)))
    totals = storage.totals.get_tensor(cute.make_layout(WARPS))

    cute.arch.griddepcontrol_wait()  # for what the parts wrote
    maximum = -Float32.inf
    for i in cutlass.range(cute.ceil_div(num_parts, 32), unroll=1):
        part = i * 32 + lane
        if part < num_parts:
            maximum = cute.arch.fmax(maximum, gPart[first + part, head_dim_v])
    maximum = cute.arch.warp_reduction_max(maximum)

    load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
    sums = cute.make_rmem_tensor((4, groups), Float32)
    sums.fill(0.0)
    total = Float32(0.0)
    for i in cutlass.range((num_parts - warp + WARPS - 1) // WARPS, unroll=4):
        part = first + i * WARPS + warp
        weight = cute.math.exp2((gPart[part, head_dim_v] - maximum) * LOG2_E, fastmath=True)
        total += weight
        quads = cute.zipped_divide(gPart[part, None], (4,))
        for g in cutlass.range_constexpr(groups):
            if (g * 32 + lane) * 4 < head_dim_v:
                values = cute.make_rmem_tensor(4, Float32)
                cute.copy(load, quads[None, g * 32 + lane], values)
                sums[None, g].store(sums[None, g].load() + values.load() * weight)
    for g in cutlass.range_constexpr(groups):
        if (g * 32 + lane) * 4 < head_dim_v:
            cute.autovec_copy(sums[None, g], cute.zipped_divide(sO[warp, None], (4,))[None, g * 32 + lane])
    if lane == 0:
        totals[warp] = total
    cute.arch.sync_threads()

    total = Float32(0.0)
    for w in cutlass.range_constexpr(WARPS):
        total += totals[w]
    if tidx < head_dim_v:
        value = Float32(0.0)
        for w in cutlass.range_constexpr(WARPS):
            value += sO[w, tidx]
        mO[batch, head, row, tidx] = (value / total).to(mO.element_type)
    if tidx == 0:
        mLSE[batch, head, row] = maximum + cute.math.log2(total, fastmath=True) * LN2
