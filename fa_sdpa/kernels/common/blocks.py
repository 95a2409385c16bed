"""Which key blocks a query tile visits, which query blocks a key tile, and which of them need a mask."""

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


@cute.jit
def part_of_blocks(end: Int32, index: Int32, count: Int32) -> tuple[Int32, Int32]:
    """``(start, end)`` of one of ``count`` parts of the blocks before ``end``, all of the same size but the last, which
    has what is left. No part is empty where count = ⌈end / ⌈end / n⌉⌉."""
    size = cute.ceil_div(end, count)
    return index * size, cutlass.min((index + 1) * size, end)


@cute.jit
def query_blocks(
    n_block: Int32,
    seqlen_q: Int32,
    seqlen_k: Int32,
    tile_m: cutlass.Constexpr[int],
    tile_n: cutlass.Constexpr[int],
    is_causal: cutlass.Constexpr[bool],  # top-left: row i sees the keys j ≤ i
    window: Window | None,
) -> tuple[Int32, Int32, Int32, Int32]:
    """``(start, unmasked_start, unmasked_end, end)``, rising: the key tile visits the query blocks from start to end;
    those between the middle two need no mask. Rows beyond seqlen_q need none at all. All four are equal for a tile that
    no row sees."""
    first_key, end_key = n_block * tile_n, (n_block + 1) * tile_n
    blocks = cute.ceil_div(seqlen_q, tile_m)
    start, end = Int32(0), blocks
    unmasked_start, unmasked_end = Int32(0), blocks
    if cutlass.const_expr(is_causal):
        start = cutlass.min(first_key // tile_m, blocks)
        unmasked_start = cute.ceil_div(end_key - 1, tile_m)
    if cutlass.const_expr(window is not None):
        start = cutlass.min(cutlass.max(first_key - window.right, 0) // tile_m, blocks)
        unmasked_start = cute.ceil_div(cutlass.max(end_key - 1 - window.right, 0), tile_m)
        last_key = cutlass.min(end_key, seqlen_k) - 1
        end = cutlass.min(blocks, cute.ceil_div(cutlass.max(last_key - window.left + 1, 0), tile_m))
        end = cutlass.max(end, start)
        unmasked_end = cutlass.max(first_key - window.left + 1, 0) // tile_m
    if end_key > seqlen_k:
        unmasked_start = end
    unmasked_start = cutlass.min(cutlass.max(unmasked_start, start), end)
    unmasked_end = cutlass.min(cutlass.max(unmasked_end, unmasked_start), end)
    return start, unmasked_start, unmasked_end, end
