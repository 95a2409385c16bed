"""Static persistent tile schedule: CTA ``c`` of ``g`` takes the tiles c, g + c, 2g + c, …

Without a causal mask all tiles cost the same and the query blocks of one head are neighbours, so that the CTAs of one
wave share that head's K and V in L2. With a causal mask the tiles are ordered by falling cost (the last query block of
every head first), and every second wave is dealt out in reverse, so that no CTA always gets the dearer tile.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Tiles(NamedTuple):
    """The work of a launch: ``num_m_blocks`` query blocks of each of ``num_heads`` heads of ``num_batch`` sequences."""

    num_m_blocks: Int32
    num_heads: Int32
    num_batch: Int32

    @property
    def total(self) -> Int32:
        return self.num_m_blocks * self.num_heads * self.num_batch


@cute.jit
def tile_index(wave: Int32, longest_first: cutlass.Constexpr[bool]) -> Int32:
    """Index of this CTA's tile in a wave; a CTA is done once it is not below the total."""
    cta, _, _ = cute.arch.block_idx()
    num_ctas, _, _ = cute.arch.grid_dim()
    if cutlass.const_expr(longest_first):
        cta = num_ctas - 1 - cta if wave % 2 == 1 else cta
    return wave * num_ctas + cta


@cute.jit
def tile_coordinate(index: Int32, tiles: Tiles, longest_first: cutlass.Constexpr[bool]) -> tuple[Int32, Int32, Int32]:
    """``(m_block, head, batch)`` of a tile."""
    if cutlass.const_expr(longest_first):
        sequences = tiles.num_heads * tiles.num_batch
        m_block = tiles.num_m_blocks - 1 - index // sequences
        sequence = index % sequences
    else:
        m_block = index % tiles.num_m_blocks
        sequence = index // tiles.num_m_blocks
    return m_block, sequence % tiles.num_heads, sequence // tiles.num_heads
