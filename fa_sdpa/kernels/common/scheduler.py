"""Static persistent tile schedule: which tile CTA ``c`` of ``g`` works on in its ``step``-th turn.

Three orders, each chosen for balance between CTAs and for what the CTAs of one wave share in L2:

    all tiles cost the same   tile step · g + c; the query blocks of a head are neighbours, so that a wave shares the K
                              and V of few heads
    longest first (causal)    the last query block of every head, then the one before, …; every second wave is dealt out
                              in reverse, so that no CTA always gets the dearer tile. A wave touches every head's K, V:
                              right while those fit in L2, or are few enough for several CTAs to read each together
    paired (causal)           unit (step // 2) · g + c is a query block and its mirror image in the same head, which
                              together always cost the same; the middle blocks of two neighbours are such a pair, too,
                              where there are any. Neighbours share a head as in the first order
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

L2_BYTES = 24 << 20  # of keys and values that may be live at once: half of an H100's L2
SHARED_HEADS = 40  # with this many key/value heads or fewer, a wave of 132 CTAs reads each about three times


class Tiles(NamedTuple):
    """The work of a launch: ``num_m_blocks`` query blocks of each of ``num_heads`` heads of ``num_batch`` sequences."""

    num_m_blocks: Int32
    num_heads: Int32
    num_batch: Int32
    paired: Boolean  # of the two causal orders
    by_head: Boolean | None = None  # neighbours in each order are a head's sequences, not a sequence's heads


@cute.jit
def first_steps(tiles: Tiles) -> Int32:
    """How many CTAs there is a first tile for."""
    count = tiles.num_m_blocks * tiles.num_heads * tiles.num_batch
    if tiles.paired:
        count = (count + 1) // 2
    return count


def spills_l2(num_kv_heads: Int32, seqlen_k: Int32, bytes_per_key: int) -> Boolean:
    """Whether the longest-first order would read K and V from memory again and again."""
    return (num_kv_heads > SHARED_HEADS) & (Int64(num_kv_heads) * seqlen_k * bytes_per_key > L2_BYTES)


@cute.jit
def find_tile(step: Int32, tiles: Tiles, is_causal: cutlass.Constexpr[bool]) -> tuple[Boolean, Int32, Int32, Int32]:
    """``(is_valid, m_block, head, batch)`` of this CTA's tile in ``step``. It is done at the first one not valid."""
    cta, _, _ = cute.arch.block_idx()
    num_ctas, _, _ = cute.arch.grid_dim()
    blocks, sequences = tiles.num_m_blocks, tiles.num_heads * tiles.num_batch
    index = step * num_ctas + cta
    m_block, sequence = index % blocks, index // blocks
    if cutlass.const_expr(is_causal):
        if tiles.paired:
            # Two sequences have as many units as blocks: pairs of one, the middle blocks of both, pairs of the other.
            unit, second = step // 2 * num_ctas + cta, step % 2
            pairs, place = blocks // 2, unit % blocks
            sequence = unit // blocks * 2
            m_block = pairs
            if place >= blocks - pairs:
                sequence += 1
                place -= blocks - pairs
            elif place == pairs:
                sequence += second
            if place < pairs:
                m_block = place if second == 1 else blocks - 1 - place
        else:
            index = step * num_ctas + (cta if step % 2 == 0 else num_ctas - 1 - cta)
            m_block = blocks - 1 - index // sequences
            sequence = index % sequences
    is_valid = (sequence < sequences) & (m_block >= 0)
    head, batch = sequence % tiles.num_heads, sequence // tiles.num_heads
    if cutlass.const_expr(tiles.by_head is not None):
        if tiles.by_head:
            head, batch = sequence // tiles.num_batch, sequence % tiles.num_batch
    return is_valid, m_block, head, batch
