"""Masks on accumulator fragments: a score outside its row's range of columns becomes -inf, or another filling."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .blocks import Window
from .fragments import rows_by_columns


@cute.jit
def mask_right(
    acc_S: cute.Tensor,
    limits: cute.Tensor,  # (rows of this thread,) Int32: columns ≥ limit are masked, counted from this block's first
    fill: cutlass.Constexpr[float] = -math.inf,
) -> None:
    """Mask the columns of each row from its limit on."""
    scores = rows_by_columns(acc_S)
    first_column = cute.arch.lane_idx() % 4 * 2
    for r in cutlass.range_constexpr(cute.size(limits)):
        limit = limits[r] - first_column
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] if c // 2 * 8 + c % 2 < limit else Float32(fill)


@cute.jit
def mask_left(
    acc_S: cute.Tensor,
    limits: cute.Tensor,  # (rows of this thread,) Int32: columns < limit are masked, counted from this block's first
    fill: cutlass.Constexpr[float] = -math.inf,
) -> None:
    """Mask the columns of each row before its limit."""
    scores = rows_by_columns(acc_S)
    first_column = cute.arch.lane_idx() % 4 * 2
    for r in cutlass.range_constexpr(cute.size(limits)):
        limit = limits[r] - first_column
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] if c // 2 * 8 + c % 2 >= limit else Float32(fill)


@cute.jit
def mask_bits(acc_S: cute.Tensor, words: cute.Tensor, fill: cutlass.Constexpr[float] = -math.inf) -> None:
    """Mask the columns whose bits are 0; ``words`` has one Int32 for each row of this thread, a bit for each column."""
    scores = rows_by_columns(acc_S)
    for r in cutlass.range_constexpr(cute.size(words)):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] if words[r] >> c & 1 != 0 else Float32(fill)


@cute.jit
def row_limits(
    num_rows: cutlass.Constexpr[int],
    first_row: Int32,  # query index of this thread's first row; its others are 8 apart
    seqlen_k: Int32,
    n_block: Int32,
    tile_n: cutlass.Constexpr[int],
    is_causal: cutlass.Constexpr[bool],
    window: Window | None,
) -> cute.Tensor:
    """Where the keys that each row of this thread sees end, counted from block ``n_block``'s first key (may be ≤ 0)."""
    limits = cute.make_rmem_tensor(num_rows, Int32)
    for r in cutlass.range_constexpr(num_rows):
        end = seqlen_k
        if cutlass.const_expr(is_causal):
            end = cutlass.min(seqlen_k, first_row + 8 * r + 1)
        if cutlass.const_expr(window is not None):
            end = cutlass.min(seqlen_k, first_row + 8 * r + 1 + window.right)
        limits[r] = end - n_block * tile_n
    return limits


@cute.jit
def row_starts(
    num_rows: cutlass.Constexpr[int],
    first_row: Int32,  # as for row_limits
    n_block: Int32,
    tile_n: cutlass.Constexpr[int],
    window: Window,
) -> cute.Tensor:
    """The first key that each row of this thread sees, counted from block ``n_block``'s first key (may be < 0)."""
    starts = cute.make_rmem_tensor(num_rows, Int32)
    for r in cutlass.range_constexpr(num_rows):
        starts[r] = first_row + 8 * r + window.left - n_block * tile_n
    return starts
