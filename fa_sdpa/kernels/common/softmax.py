"""Online softmax in log2 space, on accumulator fragments.

For each row, with c = softmax_scale · log2(e), after the key blocks seen so far:

    l = Σ exp2(s·c - m·c),   O = Σ exp2(s·c - m·c) · v

``m`` is exact after a tile's first block. Each further block is weighed with the old ``m`` at once, without looking for
its maximum: a reference that is too low does no harm as long as no weight comes near the limits of 16 bits. Only where
a thread's sum of a row exceeds MAX_SUM, or is no number since its row has seen no key yet, the warp finds the maximum,
rescales l and O, and weighs the block once more. The result is the same: the lag cancels in O / l and in
lse = (m·c + log2 l) · ln 2. That takes 64 maxima and the exchange between lanes off the path of a 64 x 128 block.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .fragments import as_operand_a, pack_pair, row_maximum, rows_by_columns, scale_rows

MAX_SUM = 2.0**15  # no weight of the sum is larger, and fp16 ends at 65504
LN2, LOG2_E = math.log(2.0), math.log2(math.e)


@cute.jit
def _finite(row_max: Float32) -> Float32:
    """Row maximum to subtract: 0 where no key was seen yet, so that exp2(-inf - 0) = 0 and not NaN."""
    return Float32(0.0) if row_max == -Float32.inf else row_max


@cute.jit
def first_weights(
    acc_S: cute.Tensor,  # scores of a tile's first block
    tOrP: cute.Tensor,  # out: weights, the A operand of P V
    row_max: cute.Tensor,  # (rows of this thread,), out: whole rows
    row_sum: cute.Tensor,  # (rows of this thread,), out: this thread's columns only
    scale_log2: Float32,
) -> None:
    """Weights and row statistics of a tile's first block."""
    scores = rows_by_columns(acc_S)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        maximum = row_maximum(scores[r, None].load(), -Float32.inf)
        row_max[r] = cute.arch.warp_reduction_max(maximum, threads_in_group=4)
    _weigh(acc_S, tOrP, row_max, row_sum, scale_log2, may_be_empty=True)


@cute.jit
def next_weights(
    acc_S: cute.Tensor,  # scores of one more block
    tOrP: cute.Tensor,  # out: weights, the A operand of P V
    acc_O: cute.Tensor,  # rescaled where m changes
    row_max: cute.Tensor,  # (rows of this thread,), updated; so is the next
    row_sum: cute.Tensor,
    block_sum: cute.Tensor,  # (rows of this thread,), scratch
    scale_log2: Float32,
) -> None:
    """Weights of one more block; l, and O where it has to be rescaled. O must be complete up to the last block."""
    _weigh(acc_S, tOrP, row_max, block_sum, scale_log2, may_be_empty=False)
    fits = Boolean(True)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        fits = fits & (block_sum[r] <= MAX_SUM)  # False for NaN
    if not cute.arch.vote_all_sync(fits):
        scores = rows_by_columns(acc_S)
        factors = cute.make_rmem_tensor(cute.size(row_max), Float32)
        for r in cutlass.range_constexpr(cute.size(row_max)):
            maximum = row_maximum(scores[r, None].load(), row_max[r])
            maximum = cute.arch.warp_reduction_max(maximum, threads_in_group=4)
            factors[r] = cute.math.exp2((row_max[r] - _finite(maximum)) * scale_log2, fastmath=True)
            row_max[r] = maximum
            row_sum[r] = row_sum[r] * factors[r]
        scale_rows(acc_O, factors)
        _weigh(acc_S, tOrP, row_max, block_sum, scale_log2, may_be_empty=True)
    row_sum.store(row_sum.load() + block_sum.load())


@cute.jit
def _weigh(
    acc_S: cute.Tensor,
    tOrP: cute.Tensor,  # out
    row_max: cute.Tensor,
    block_sum: cute.Tensor,  # out, before rounding
    scale_log2: Float32,
    may_be_empty: cutlass.Constexpr[bool],  # a row without a key gets weights of 0; if not, of inf or NaN
) -> None:
    """P = exp2(s·c - m·c), rounded, and this thread's row sums, in two chains a row."""
    scores = as_operand_a(acc_S)
    packed = cute.make_tensor(cute.recast_ptr(tOrP.iterator, dtype=Int32), cute.make_layout(cute.size(tOrP) // 2))
    weights = cute.make_rmem_tensor(8, Float32)
    shifts = cute.make_rmem_tensor(2, Float32)
    chains = cute.make_rmem_tensor(4, Float32)
    chains.fill(0.0)
    for r in cutlass.range_constexpr(2):
        shifts[r] = (_finite(row_max[r]) if cutlass.const_expr(may_be_empty) else row_max[r]) * scale_log2
    for k in cutlass.range_constexpr(cute.size(tOrP, mode=[2])):
        for e in cutlass.range_constexpr(8):  # of row e // 2 % 2
            weights[e] = cute.math.exp2(scores[e, 0, k] * scale_log2 - shifts[e // 2 % 2], fastmath=True)
            chains[e % 4] = chains[e % 4] + weights[e]
        for e in cutlass.range_constexpr(4):
            packed[4 * k + e] = pack_pair(weights[2 * e], weights[2 * e + 1], tOrP.element_type)
    for r in cutlass.range_constexpr(2):
        block_sum[r] = chains[2 * r] + chains[2 * r + 1]


@cute.jit
def cap_scores(acc_S: cute.Tensor, factor: Float32) -> None:
    """tanh(s · factor / (2 · log2 e)) in place of each score s: 1 - 2 / (1 + exp2(s · factor)), within 1e-6."""
    for i in cutlass.range_constexpr(cute.size(acc_S)):
        power = cute.math.exp2(acc_S[i] * factor, fastmath=True)
        acc_S[i] = 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + power)


@cute.jit
def finish_rows(
    acc_O: cute.Tensor,
    row_max: cute.Tensor,  # (rows of this thread,)
    row_sum: cute.Tensor,  # (rows of this thread,), this thread's columns only; replaced by the rows' lse
    scale_log2: Float32,
    sink: Float32 | None,  # one more score, with a value of 0
) -> None:
    """O /= l and lse (natural log), in place; a row that saw no key gets O = 0 and lse = -inf, or the sink."""
    factors = cute.make_rmem_tensor(cute.size(row_sum), Float32)
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        total = cute.arch.warp_reduction_sum(row_sum[r], threads_in_group=4)
        if cutlass.const_expr(sink is not None):
            own, other = row_max[r] * scale_log2, sink * LOG2_E
            top = _finite(cute.arch.fmax(own, other))
            shrink = cute.math.exp2(own - top, fastmath=True)
            total = total * shrink + cute.math.exp2(other - top, fastmath=True)
        empty = total == 0.0
        factors[r] = Float32(0.0) if empty else cute.arch.rcp_approx(total)
        if cutlass.const_expr(sink is not None):
            factors[r] = factors[r] * shrink
            lse = (top + cute.math.log2(total, fastmath=True)) * LN2
        else:
            lse = (row_max[r] * scale_log2 + cute.math.log2(total, fastmath=True)) * LN2
        row_sum[r] = -Float32.inf if empty else lse
    scale_rows(acc_O, factors)
