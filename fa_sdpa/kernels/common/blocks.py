"""Which key blocks a query tile visits, and which of them need a mask."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def key_blocks(
    m_block: Int32,
    seqlen_k: Int32,
    tile_m: cutlass.Constexpr[int],
    tile_n: cutlass.Constexpr[int],
    is_causal: cutlass.Constexpr[bool],  # top-left: row i sees the keys j ≤ i
) -> tuple[Int32, Int32]:
    """``(end, unmasked_end)``: the tile sees blocks [0, end); blocks [0, unmasked_end) are full for all its rows."""
    end = cute.ceil_div(seqlen_k, tile_n)
    unmasked_end = seqlen_k // tile_n
    if cutlass.const_expr(is_causal):
        end = cutlass.min(end, cute.ceil_div((m_block + 1) * tile_m, tile_n))
        unmasked_end = cutlass.min(unmasked_end, (m_block * tile_m + 1) // tile_n)
    return end, unmasked_end
