"""Online softmax in log2 space, on accumulator fragments.

For each row, with c = softmax_scale · log2(e), after the key blocks seen so far:

    m ≥ max(s) - STALE / c,   l = Σ exp2(s·c - m·c),   O = Σ exp2(s·c - m·c) · v

``m`` may lag behind the true maximum by at most STALE in log2 units: as long as no row of the warp grows by more,
neither l nor O is rescaled, and P stays below 2^STALE, far from fp16's 65504. The result is the same: the lag cancels
in O / l and in lse = (m·c + log2 l) · ln 2.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32

from .fragments import row_maximum, row_total, rows_by_columns, scale_rows

STALE = 8.0  # log2 units
LN2 = math.log(2.0)


@cute.jit
def _finite(row_max: Float32) -> Float32:
    """Row maximum to subtract: 0 where no key was seen yet, so that exp2(-inf - 0) = 0 and not NaN."""
    return Float32(0.0) if row_max == -Float32.inf else row_max


@cute.jit
def softmax_step(
    acc_S: cute.Tensor,  # scores of one block, replaced by exp2(s·c - m·c)
    row_max: cute.Tensor,  # (rows of this thread,), whole rows
    block_sum: cute.Tensor,  # (rows of this thread,), out: sums of this thread's new weights
    growth: cute.Tensor,  # (rows of this thread,), out: old m minus new m, ≤ 0; unused if is_first
    scale_log2: Float32,
    is_first: cutlass.Constexpr[bool],
) -> Boolean:
    """Weights of one block; True (the same in all lanes) if some row's ``m`` changed: l and O must be rescaled."""
    scores = rows_by_columns(acc_S)
    grew = Boolean(False)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        before = -Float32.inf if cutlass.const_expr(is_first) else row_max[r]
        maximum = row_maximum(scores[r, None].load(), before)
        maximum = cute.arch.warp_reduction_max(maximum, threads_in_group=4)
        if cutlass.const_expr(is_first):
            row_max[r] = maximum
        else:
            lags = (maximum - before) * scale_log2 <= STALE  # False for the first key that a row sees
            row_max[r] = before if lags else maximum
            growth[r] = before - _finite(row_max[r])
            grew = grew | (not lags)
        weights = cute.math.exp2(scores[r, None].load() * scale_log2 - _finite(row_max[r]) * scale_log2, fastmath=True)
        block_sum[r] = row_total(weights, Float32(0.0))
        scores[r, None].store(weights)
    return grew if cutlass.const_expr(is_first) else cute.arch.vote_any_sync(grew)


@cute.jit
def rescale_sums(
    row_sum: cute.Tensor,  # (rows of this thread,)
    growth: cute.Tensor,  # (rows of this thread,), of softmax_step; replaced by the factors that O needs as well
    scale_log2: Float32,
) -> None:
    """Bring l to the new ``m``, in place."""
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        growth[r] = cute.math.exp2(growth[r] * scale_log2, fastmath=True)
        row_sum[r] = row_sum[r] * growth[r]


@cute.jit
def finish_rows(
    acc_O: cute.Tensor,
    row_max: cute.Tensor,  # (rows of this thread,)
    row_sum: cute.Tensor,  # (rows of this thread,), this thread's columns only; replaced by the rows' lse
    scale_log2: Float32,
) -> None:
    """O /= l and lse (natural log), in place; a row that saw no key gets O = 0 and lse = -inf."""
    factors = cute.make_rmem_tensor(cute.size(row_sum), Float32)
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        total = cute.arch.warp_reduction_sum(row_sum[r], threads_in_group=4)
        empty = total == 0.0
        factors[r] = Float32(0.0) if empty else cute.arch.rcp_approx(total)
        lse = (row_max[r] * scale_log2 + cute.math.log2(total, fastmath=True)) * LN2
        row_sum[r] = -Float32.inf if empty else lse
    scale_rows(acc_O, factors)
