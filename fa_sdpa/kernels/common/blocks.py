"""Which key blocks a query tile visits, and which of them need a mask."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Window(NamedTuple):
    """Row i sees the keys i + left … i + right, both ends included."""

    left: Int32
    right: Int32


@cute.jit
def key_blocks(
    m_block: Int32,
    seqlen_k: Int32,
    tile_m: cutlass.Constexpr[int],
    tile_n: cutlass.Constexpr[int],
    is_causal: cutlass.Constexpr[bool],  # top-left: row i sees the keys j ≤ i
    window: Window | None,
) -> tuple[Int32, Int32]:
    """``(end, unmasked_end)``: the tile visits blocks before ``end``; those before ``unmasked_end`` need no mask on the
    right. A tile that sees no key at all visits one block, masked."""
    end = cute.ceil_div(seqlen_k, tile_n)
    unmasked_end = seqlen_k // tile_n
    if cutlass.const_expr(is_causal):
        end = cutlass.min(end, cute.ceil_div((m_block + 1) * tile_m, tile_n))
        unmasked_end = cutlass.min(unmasked_end, (m_block * tile_m + 1) // tile_n)
    if cutlass.const_expr(window is not None):
        first_row_end = cutlass.max(m_block * tile_m + 1 + window.right, 0)
        last_row_end = cutlass.max((m_block + 1) * tile_m + window.right, 1)
        end = cutlass.min(end, cute.ceil_div(last_row_end, tile_n))
        unmasked_end = cutlass.min(unmasked_end, first_row_end // tile_n)
    return end, unmasked_end


@cute.jit
def first_key_blocks(
    m_block: Int32,
    end: Int32,
    tile_m: cutlass.Constexpr[int],
    tile_n: cutlass.Constexpr[int],
    window: Window,
) -> tuple[Int32, Int32]:
    """``(start, unmasked_start)``: the tile's first block, and the first that needs no mask on the left."""
    first_row_start = cutlass.max(m_block * tile_m + window.left, 0)
    last_row_start = cutlass.max((m_block + 1) * tile_m - 1 + window.left, 0)
    return cutlass.min(first_row_start // tile_n, end - 1), cute.ceil_div(last_row_start, tile_n)
