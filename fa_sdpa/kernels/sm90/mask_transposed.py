"""What an attn_mask leaves of each tile of the backward: which query blocks a block of keys visits, and the bits that
tell its keys apart. Kinds of tiles and what hides a key are those of mask.py, but that a biased tile counts as hiding
not only where -inf hides a key: also where biases are far from 0, so that others need neither bits nor limits.

Launches: `classify`: a CTA for each tile of tile_m rows and tile_n keys, a thread for each key, reads the mask and
writes its bits, and what kind of tile it is; `settle`, for floating masks: a warp for each block of rows, in which some
tiles turn out to be biased; `enlist`: a warp for each block of keys makes the list of the query blocks that it visits.

Bits: bit 2v + j of word t of (query block, key) is row 8v + 2t + j of the block, which is what a thread holds of a key
of a transposed score accumulator. Rows beyond seqlen_q have no part in anything, and bits of 0. A mask that is the same
for all rows has bits of one block, of tile_m rows.

Bits of tiles that are told by all their values being alike (mask.py) are written only if some are read: where no key is
seen, else if lists are for several heads, for one of which the tile may be another.

Lists: where its biased blocks end, where those with bits end, where it ends; twice the place where those of the biased
ones that hide keys end, plus 1 if there are keys that are hidden from all rows of all blocks; 4 words that tell which,
bit j of word w is key 32w + j (keys beyond seqlen_k only if there are no blocks); then these blocks, hiding ones, other
biased ones, those with bits, whole ones, each kind in rising order.
A list is for all query heads of a key/value head.
If the mask tells these apart, it has the blocks that any of them visits, as the kind that is right for all: hiding if
one is; else biased if one is; else with bits, unless they are whole for all.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.utils import SmemAllocator

from ..common.blocks import Window
from ..key import KernelKey
from .config import MASK_ROWS, TRANSPOSED_HEADER
from .mask import (
    BIASED,
    BITS,
    DTYPES,
    HAS_LOW,
    HIDDEN,
    HIDES,
    HIDING,
    LOW,
    SKIPPED,
    UNSEEN,
    VISIBLE,
    WHOLE,
    ZERO,
    Patterns,
    example_mask,
    is_full_tile,
)


class TransposedMask:
    """Kernels of one transposed key with direction "mask"; see ``__call__``."""

    def __init__(self, key: KernelKey):
        self.dtype = DTYPES[key.dtype]
        self.is_bool = key.dtype == "bool"
        self.patterns = Patterns.of(key.dtype)
        self.planes = 1 if self.is_bool else 2
        self.tile_m, self.tile_n = key.tile_m, key.tile_n
        self.warps = key.tile_n // 32

    @cute.jit
    def __call__(
        self,
        mMask: cute.Tensor,  # (b, h, s_q, s_k), as of Mask, but tile_m for s_q where it broadcasts over that
        mKinds: cute.Tensor,  # (b, h, query blocks, key blocks) Int32, scratch memory
        mRows: cute.Tensor | None,  # (b, h, query blocks, key blocks, tile_m / MASK_ROWS · warps) Int32, unless bool
        mHidden: cute.Tensor,  # (b, h, query blocks, key blocks, 4, 1 or 2) Int32, scratch memory
        mBits: cute.Tensor,  # (b, h, 1 or 2, query blocks, rows of all key blocks, 4) Int32, out
        mAllKinds: cute.Tensor,  # mKinds with all query blocks of the call
        mAllHidden: cute.Tensor,  # mHidden, likewise
        mLists: cute.Tensor,  # (b, h or key/value heads, key blocks, TRANSPOSED_HEADER + query blocks) Int32, out
        window_left: Int32,  # row i sees the keys i + window_left … i + window_right
        window_right: Int32,
        stream,
    ):
        batch, heads, m_blocks, n_blocks = mKinds.shape
        is_shared = mLists.shape[1] < heads
        self.classify(mMask, mKinds, mRows, mHidden, mBits, Window(window_left, window_right), is_shared).launch(
            grid=[batch * heads * m_blocks * n_blocks, 1, 1], block=[self.tile_n, 1, 1], stream=stream
        )
        if cutlass.const_expr(mRows is not None):
            self.settle(mKinds, mRows).launch(grid=[batch * heads * m_blocks, 1, 1], block=[32, 1, 1], stream=stream)
        self.enlist(mAllKinds, mAllHidden, mLists).launch(
            grid=[batch * mLists.shape[1] * n_blocks, 1, 1], block=[32, 1, 1], stream=stream
        )

    @cute.kernel
    def classify(
        self,
        mMask: cute.Tensor,
        mKinds: cute.Tensor,
        mRows: cute.Tensor | None,
        mHidden: cute.Tensor,
        mBits: cute.Tensor,
        window: Window,
        is_shared: Boolean,  # whether lists are for several heads
    ):
        """Kind and bits of one tile, and which keys are hidden from all of it; for floating masks also, by warp and
        MASK_ROWS rows, which of them have a visible value, and in the upper half which have a finite one up to
        HIDDEN."""
        column, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        _, heads, m_blocks, n_blocks = mKinds.shape
        n_block, sequence = index % n_blocks, index // n_blocks // m_blocks
        m_block, head, batch = index // n_blocks % m_blocks, sequence % heads, sequence // heads
        mask, place = mMask[batch, head, None, None], (batch, head, m_block, n_block)

        @cute.struct
        class SharedStorage:
            flags: cute.struct.MemRange[Int32, 4]
            alike: cute.struct.MemRange[Int32, 4]

        storage = SmemAllocator().allocate(SharedStorage)
        flags = storage.flags.get_tensor(cute.make_layout(4))
        alike = Int32(0)
        if cutlass.const_expr(not self.is_bool):
            alike_of_warps = storage.alike.get_tensor(cute.make_layout(self.warps))
            if is_full_tile(mask, m_block, n_block, self.tile_m, self.tile_n, window):
                alike = self.patterns.alike(mask, m_block, n_block, self.tile_m, self.tile_n, column, alike_of_warps)
        if alike != 0:
            if cutlass.const_expr(not self.is_bool):
                self._put_alike(alike, mKinds, mRows, mHidden, mBits, place, is_shared, column)
        else:
            self._put_mixed(mask, mKinds, mRows, mHidden, mBits, window, place, flags, column)

    @cute.jit
    def _put_alike(
        self,
        alike: Int32,
        mKinds: cute.Tensor,
        mRows: cute.Tensor,
        mHidden: cute.Tensor,
        mBits: cute.Tensor,
        place: tuple[Int32, Int32, Int32, Int32],  # batch, head, query block, key block
        is_shared: Boolean,
        column: Int32,
    ) -> None:
        """What there is to say of a tile whose values are all alike."""
        batch, head, m_block, n_block = place
        warp = column // 32
        kind, hidden, visible = Int32(BIASED), Int32(0), Int32((1 << MASK_ROWS) - 1)
        if alike & ZERO != 0:
            kind = Int32(WHOLE)
        if alike & (UNSEEN | LOW) != 0:
            kind, hidden, visible = Int32(SKIPPED), Int32(-1), Int32(0)
        unseen = hidden
        if alike & LOW != 0:
            kind, unseen, visible = Int32(SKIPPED + HAS_LOW), Int32(0), Int32(-1 << MASK_ROWS)
        bits = mBits[batch, head, None, m_block, n_block * self.tile_n + column, None]
        if is_shared | (alike & (UNSEEN | LOW) != 0):
            for t in cutlass.range_constexpr(4):
                bits[0, t], bits[1, t] = ~hidden, ~unseen
        if column % 32 == 0:
            for part in cutlass.range_constexpr(self.tile_m // MASK_ROWS):
                mRows[batch, head, m_block, n_block, part * self.warps + warp] = visible
            mHidden[batch, head, m_block, n_block, warp, 0] = hidden
            mHidden[batch, head, m_block, n_block, warp, 1] = unseen
        if column == 0:
            mKinds[batch, head, m_block, n_block] = kind

    @cute.jit
    def _put_mixed(
        self,
        mask: cute.Tensor,  # (s_q, s_k) of a head
        mKinds: cute.Tensor,
        mRows: cute.Tensor | None,
        mHidden: cute.Tensor,
        mBits: cute.Tensor,
        window: Window,
        place: tuple[Int32, Int32, Int32, Int32],  # batch, head, query block, key block
        flags: cute.Tensor,  # (4,) Int32 in shared memory
        column: Int32,
    ) -> None:
        """The same of any other tile, value by value."""
        batch, head, m_block, n_block = place
        warp = cute.arch.make_warp_uniform(column // 32)
        first_row, key = m_block * self.tile_m, n_block * self.tile_n + column
        hard, soft = (cute.make_rmem_tensor(4, Int32) for _ in range(2))
        hard.fill(0)
        soft.fill(0)
        seen = Int32(0)
        values = cute.make_rmem_tensor(MASK_ROWS, Float32)
        for part in cutlass.range(self.tile_m // MASK_ROWS, unroll=1):
            row = first_row + part * MASK_ROWS
            self._read_rows(mask, row, key, window, values)
            found, rows = self._add_words(values, mask.shape[0] - row, part * (MASK_ROWS // 4), hard, soft)
            seen = seen | found
            if cutlass.const_expr(mRows is not None):
                if column % 32 == 0:
                    mRows[batch, head, m_block, n_block, part * self.warps + warp] = rows
        for bit in cutlass.range_constexpr(1 if self.is_bool else 5, -1, -1):
            any_seen = cute.arch.vote_any_sync(seen >> bit & 1 != 0)
            seen = seen | (Int32(1 << bit) if any_seen else Int32(0))
        if column % 32 == 0:
            flags[warp] = seen
        bits = mBits[batch, head, None, m_block, key, None]
        for t in cutlass.range_constexpr(4):
            bits[0, t] = hard[t]
            if cutlass.const_expr(not self.is_bool):
                bits[1, t] = soft[t]
        for plane, words in enumerate((hard, soft)[: self.planes]):
            is_hidden = (key < mask.shape[1]) & (words[0] | words[1] | words[2] | words[3] == 0)
            hidden = cute.arch.vote_ballot_sync(is_hidden)
            if column % 32 == 0:
                mHidden[batch, head, m_block, n_block, warp, plane] = hidden
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(self.warps):
            seen = seen | flags[w]
        kind = Int32(SKIPPED)
        if seen & 1 != 0:
            kind = Int32(BITS) if seen & 2 != 0 else Int32(WHOLE)
        if seen & 4 != 0:
            kind = Int32(BIASED)
        if column == 0:
            mKinds[batch, head, m_block, n_block] = kind + (seen >> 4 & 1) * HAS_LOW + (seen >> 5 & 1) * HIDES

    @cute.jit
    def _read_rows(
        self,
        mask: cute.Tensor,
        row: Int32,
        key: Int32,
        window: Window,
        values: cute.Tensor,  # (MASK_ROWS,) fp32, out
    ) -> None:
        """The values of a key in rows from ``row`` on; -inf where it is hidden, which is all that a boolean mask says
        beside 0, outside of the window, or where there is none."""
        for r in cutlass.range_constexpr(MASK_ROWS):
            values[r] = -Float32.inf
            distance = key - row - r
            exists = (row + r < mask.shape[0]) & (key < mask.shape[1])
            if exists & (distance >= window.left) & (distance <= window.right):
                value = mask[row + r, key]
                if cutlass.const_expr(self.is_bool):
                    values[r] = Float32(0.0) if value != 0 else -Float32.inf
                else:
                    values[r] = value.to(Float32)

    @cute.jit
    def _add_words(
        self,
        values: cute.Tensor,  # (MASK_ROWS,) fp32
        count: Int32,  # of rows from the first of these on
        shift: Int32,  # where the bits of these rows begin
        hard: cute.Tensor,  # (4,) Int32, the words of this key as of a tile with bits; what is found is added
        soft: cute.Tensor,  # as of a biased tile
    ) -> tuple[Int32, Int32]:
        """Flags of this key: 1 some row sees it, 2 it is hidden from some row, 4 some bias is no 0, 16 some value up to
        HIDDEN is finite, 32 some value is -inf, or -HIDDEN or more; and of the rows, for all keys of the warp: which
        have a visible value, and in the upper half which have a finite one up to HIDDEN."""
        found, visible, low = Int32(0), Int32(0), Int32(0)
        for r in cutlass.range_constexpr(MASK_ROWS):
            value, word = values[r], r % 8 // 2
            place = Int32(1 << r // 8 * 2 + r % 2) << shift
            is_seen = ~(value <= HIDDEN)  # and so is NaN
            hard[word] = hard[word] | (place if is_seen else Int32(0))
            found = found | (Int32(1) if is_seen else Int32(2) if r < count else Int32(0))
            if cutlass.const_expr(not self.is_bool):
                is_low = (value <= HIDDEN) & (value > -Float32.inf)
                soft[word] = soft[word] | (place if is_seen | is_low else Int32(0))
                found = found | (Int32(4) if is_seen & ~(value == 0.0) else Int32(0))
                found = found | (Int32(16) if is_low else Int32(0))
                hides = (value == -Float32.inf) & (r < count) | (value >= -HIDDEN)
                found = found | (Int32(32) if hides else Int32(0))
                if cute.arch.vote_any_sync(~(value < VISIBLE)):
                    visible = visible | 1 << r
                if cute.arch.vote_any_sync(is_low):
                    low = low | 1 << r
        return found, visible | low << 16

    @cute.kernel
    def settle(self, mKinds: cute.Tensor, mRows: cute.Tensor):
        """A block of rows, by a warp: if some row has finite values up to HIDDEN and none that is visible, tiles with
        such values are biased. And which biased tiles are hiding ones."""
        lane, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        _, heads, m_blocks, n_blocks = mKinds.shape
        m_block, head, batch = index % m_blocks, index // m_blocks % heads, index // m_blocks // heads
        kinds, rows = mKinds[batch, head, m_block, None], mRows[batch, head, m_block, None, None]
        takes_low = Boolean(False)
        for part in cutlass.range_constexpr(self.tile_m // MASK_ROWS):
            found = Int32(0)
            for i in cutlass.range(cute.ceil_div(n_blocks * self.warps, 32), unroll=4):
                place = i * 32 + lane
                if place < n_blocks * self.warps:
                    found = found | rows[place // self.warps, part * self.warps + place % self.warps]
            for distance in cutlass.range_constexpr(5):
                found = found | cute.arch.shuffle_sync_bfly(found, 1 << distance)
            takes_low = takes_low | ((found >> 16 & ~found & 0xFFFF) != 0)
        for i in cutlass.range(cute.ceil_div(n_blocks, 32), unroll=1):
            n_block = i * 32 + lane
            if n_block < n_blocks:
                kind = kinds[n_block]
                has_low, hides = kind & HAS_LOW != 0, kind & HIDES != 0
                kind = kind % HAS_LOW
                if (takes_low & has_low) | ((kind == BIASED) & (has_low | hides)):
                    kind = Int32(HIDING)
                kinds[n_block] = kind

    @cute.kernel
    def enlist(self, mKinds: cute.Tensor, mHidden: cute.Tensor, mLists: cute.Tensor):
        """The list of one block of keys; a warp."""
        lane, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        _, heads_of_lists, n_blocks, _ = mLists.shape
        group, m_blocks = mKinds.shape[1] // heads_of_lists, mKinds.shape[2]
        n_block, sequence = index % n_blocks, index // n_blocks
        head, batch = sequence % heads_of_lists, sequence // heads_of_lists
        kinds, entries = mKinds[batch, None, None, n_block], mLists[batch, head, n_block, None]
        words = mHidden[batch, None, None, n_block, None, None]
        count, hidden = Int32(0), cute.make_rmem_tensor(self.warps, Int32)
        hidden.fill(-1)
        clear_start = Int32(0)
        for kind in cutlass.range_constexpr(BIASED if self.is_bool else HIDING, SKIPPED, -1):
            for i in cutlass.range(cute.ceil_div(m_blocks, 32), unroll=1):
                m_block = i * 32 + lane
                found = Int32(SKIPPED)
                if m_block < m_blocks:
                    found = kinds[head * group, m_block]
                    for g in cutlass.range(1, group, unroll=1):
                        other = kinds[head * group + g, m_block]
                        is_either = (found != other) & (found < BITS) & (other < BITS)  # skipped, whole
                        found = Int32(BITS) if is_either else cutlass.max(found, other)
                chosen = cute.arch.vote_ballot_sync(found == kind)
                if found == kind:
                    entries[TRANSPOSED_HEADER + count + cute.arch.popc(chosen & (1 << lane) - 1)] = m_block
                    for g in cutlass.range(group, unroll=1):
                        for w in cutlass.range_constexpr(self.warps):
                            if cutlass.const_expr(kind == WHOLE):
                                hidden[w] = Int32(0)
                            elif cutlass.const_expr(kind == BITS):
                                hidden[w] = hidden[w] & words[head * group + g, m_block, w, 0]
                            elif cutlass.const_expr(not self.is_bool):
                                hidden[w] = hidden[w] & words[head * group + g, m_block, w, 1]
                count += cute.arch.popc(chosen)
            if cutlass.const_expr(kind == HIDING):
                clear_start = count
            elif lane == 0:
                entries[BIASED - kind] = count
        found = Int32(0)
        for w in cutlass.range_constexpr(self.warps):
            for distance in cutlass.range_constexpr(5):
                hidden[w] = hidden[w] & cute.arch.shuffle_sync_bfly(hidden[w], 1 << distance)
            found = found | hidden[w]
        if lane == 0:
            entries[3] = 2 * clear_start + Int32(found != 0)
            for w in cutlass.range_constexpr(4):
                entries[4 + w] = hidden[w] if w < self.warps else Int32(0)


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``: everything symbolic but the dtype."""

    def tensor(dtype: type[cutlass.Numeric], *shape: object, last_stride: object = 1) -> cute.Tensor:
        strides = tuple(cute.sym_int64() for _ in shape[1:])
        align = max(dtype.width // 8, 1)
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, last_stride), assumed_align=align)

    batch, heads, m_blocks, all_m_blocks, n_blocks = (cute.sym_int() for _ in range(5))
    planes = 1 if key.dtype == "bool" else 2
    mask = example_mask(key.dtype, batch, heads)
    return (
        mask,
        tensor(Int32, batch, heads, m_blocks, n_blocks),
        None if key.dtype == "bool" else tensor(Int32, batch, heads, m_blocks, n_blocks, cute.sym_int()),
        tensor(Int32, batch, heads, m_blocks, n_blocks, 4, planes),
        tensor(Int32, batch, heads, cute.sym_int(), m_blocks, cute.sym_int(), 4),
        tensor(Int32, batch, heads, all_m_blocks, n_blocks),
        tensor(Int32, batch, heads, all_m_blocks, n_blocks, 4, planes),
        tensor(Int32, batch, cute.sym_int(), n_blocks, cute.sym_int()),
        Int32(0),
        Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
