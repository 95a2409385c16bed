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
    row_sum: cute.Tensor,  # (rows of this thread,), this thread's columns only
    row_scale: cute.Tensor,  # (rows of this thread,), out: what O has to be multiplied by if the result is True
    scale_log2: Float32,
    is_first: cutlass.Constexpr[bool],
) -> Boolean:
    """Fold one block of scores into the row statistics; True (the same in all lanes) if O must be rescaled."""
    scores = rows_by_columns(acc_S)
    num_rows = cute.size(row_max)
    maxima = cute.make_rmem_tensor(num_rows, Float32)
    grew = Boolean(False)
    for r in cutlass.range_constexpr(num_rows):
        initial = -Float32.inf if cutlass.const_expr(is_first) else row_max[r]
        maximum = row_maximum(scores[r, None].load(), initial)
        maxima[r] = cute.arch.warp_reduction_max(maximum, threads_in_group=4)
        if cutlass.const_expr(not is_first):
            grew = grew | ((maxima[r] - row_max[r]) * scale_log2 > STALE)
    if cutlass.const_expr(is_first):
        row_sum.fill(0.0)
        row_max.store(maxima.load())
    else:
        grew = cute.arch.vote_any_sync(grew)
        if grew:
            for r in cutlass.range_constexpr(num_rows):
                row_scale[r] = cute.math.exp2((row_max[r] - _finite(maxima[r])) * scale_log2, fastmath=True)
                row_sum[r] = row_sum[r] * row_scale[r]
                row_max[r] = maxima[r]
    for r in cutlass.range_constexpr(num_rows):
        shift = _finite(row_max[r]) * scale_log2
        weights = cute.math.exp2(scores[r, None].load() * scale_log2 - shift, fastmath=True)
        row_sum[r] = row_total(weights, row_sum[r])
        scores[r, None].store(weights)
    return grew


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
