"""What an attn_mask leaves of each tile of scores, found out on the device: which key blocks a block of query rows
visits, and the bits that tell its keys apart.

Two launches. `classify`: a CTA for each tile of tile_m rows and tile_n keys reads the mask and writes its bits, and
what kind of tile it is. `enlist`: a warp for each block of rows makes the list of the key blocks that it visits.

    whole   every row sees every key, with no bias: runs as without a mask
    bits    some keys are hidden from some rows
    biased  the mask's values are added to the scores, and keys are hidden

A tile in which no row sees a key is on no list; if that leaves a block of rows without any, its list has tile 0, whose
bits are all 0. A mask also stands for a causal mask or window given beside it, and for the last block's missing keys.

A full tile of a floating mask whose values are all alike, as those of biases mostly are, is told by 16-byte loads and a
few operations a value (`alike`): all 0, all small, all -inf, all finite up to HIDDEN. Only others are looked at value
by value. Tiles of the first two kinds have no bits, as nothing reads them.

Bits: bit 2v + j of word t of (key block, row) is key 8v + 2t + j of the block, which is what a thread holds of a row of
a score accumulator (common/fragments.py): one word a row and thread. Floating masks have bits of two sorts, for tiles
with bits and, after those of all blocks, for biased tiles, where only -inf hides a key.

Lists: LIST_HEADER numbers (config.py); the visited blocks, twice their number, plus 1 if some key is hidden from all
rows of the tile; behind room for all blocks, 4 words for each block, and again for biased tiles, that tell which keys
these are: bit j of word w is key 32w + j. Keys beyond seqlen_k are not among them.

Values up to HIDDEN hide a key as -inf does where another key of the row has a value of at least VISIBLE: the weight
beside that is 0 in fp32 as long as the scores of a row differ by less than 30,000. That is how torch.finfo(dtype).min
of any dtype gets tiles skipped. A block of rows in which some row has such values and none that is visible takes the
values as they are: its tiles with finite ones become biased tiles.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.utils import SmemAllocator

from ..common.blocks import Window
from ..key import KernelKey
from .config import LIST_HEADER, mask_warps

HIDDEN, VISIBLE = -6.0e4, -3.0e4
SMALL_LOG2 = 14  # biases within ± 2^14 are visible, and far from HIDDEN and -HIDDEN
SKIPPED, WHOLE, BITS, BIASED = range(4)  # kinds of tiles
HIDING = 4  # in lists, biased tiles in which keys are hidden; they come last
HAS_LOW = 4  # added to the kind of a tile with values up to HIDDEN that are finite
HAS_HIGH = 8  # added to the kind of a tile with values from -HIDDEN on
HIDES = 16  # added to the kind of a floating tile in which -inf hides a key
ZERO, SMALL, UNSEEN, LOW = 1, 2, 4, 8  # what all values of a tile may be, see `alike`; 0 is SMALL, too
HIDDEN_KEYS = 32  # added to the kind of a tile if some key has no bit in it; twice that, no bit as a biased tile
DTYPES = {
    "bool": cutlass.Uint8,
    "bf16": cutlass.BFloat16,
    "fp16": cutlass.Float16,
    "fp32": cutlass.Float32,
}
EXPONENTS = {"bf16": (127, 7), "fp16": (15, 10), "fp32": (127, 23)}  # bias, and where it begins


class Mask:
    """Kernels of one key with direction "mask"; see ``__call__``."""

    def __init__(self, key: KernelKey):
        self.name = key.name
        self.dtype = DTYPES[key.dtype]
        self.is_bool = key.dtype == "bool"
        self.patterns = Patterns.of(key.dtype)
        self.tile_m, self.tile_n = key.tile_m, key.tile_n
        self.warps = mask_warps(key.tile_m)
        self.rows_of_warp = key.tile_m // self.warps
        self.rows_at_once = 32 // self.warps  # of a warp; so many registers that two CTAs and more fit an SM

    @cute.jit
    def __call__(
        self,
        mMask: cute.Tensor,  # (b, h, s_q, s_k), sizes of 1 for what it broadcasts over, but s_k is whole; see below
        mKinds: cute.Tensor,  # (b, h, query blocks, key blocks) Int32, scratch memory
        mRows: cute.Tensor | None,  # (b, h, query blocks, key blocks, warps) Int32, scratch memory, unless bool
        mBits: cute.Tensor,  # (b, h, key blocks, rows of all query blocks or 1, 4) Int32, out, or twice the blocks
        mLists: cute.Tensor,  # (b, h, query blocks, LIST_HEADER + 5 times the key blocks, or 9 times) Int32, out
        window_left: Int32,  # row i sees the keys i + window_left … i + window_right, if the mask has rows
        window_right: Int32,
        stream,
    ):
        """Floating masks are contiguous along the keys and aligned to 16 bytes, with strides that are multiples."""
        window = Window(window_left, window_right)
        batch, heads, m_blocks, n_blocks = mKinds.shape
        self.classify(mMask, mKinds, mRows, mBits, mLists, window).launch(
            grid=[batch * heads * m_blocks * n_blocks, 1, 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
        )
        self.enlist(mKinds, mRows, mLists).launch(
            grid=[batch * heads * m_blocks, 1, 1], block=[32, 1, 1], stream=stream
        )

    @cute.kernel
    def classify(
        self,
        mMask: cute.Tensor,
        mKinds: cute.Tensor,
        mRows: cute.Tensor | None,
        mBits: cute.Tensor,
        mLists: cute.Tensor,
        window: Window,
    ):
        """Kind and bits of one tile, and which keys are hidden from all of it; for floating masks also, by warp, which
        of its rows have a visible value, and in the upper half which have a finite one up to HIDDEN."""
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        _, heads, m_blocks, n_blocks = mKinds.shape
        n_block, sequence = index % n_blocks, index // n_blocks // m_blocks
        m_block, head, batch = index // n_blocks % m_blocks, sequence % heads, sequence // heads
        mask, bits = mMask[batch, head, None, None], mBits[batch, head, None, None, None]

        @cute.struct
        class SharedStorage:
            flags: cute.struct.MemRange[Int32, self.warps]
            alike: cute.struct.MemRange[Int32, self.warps]
            keys: cute.struct.MemRange[Int32, 8 * self.warps]

        storage = SmemAllocator().allocate(SharedStorage)
        flags = storage.flags.get_tensor(cute.make_layout(self.warps))
        keys_of_warps = storage.keys.get_tensor(cute.make_layout((4, 2, self.warps)))
        alike = Int32(0)
        if cutlass.const_expr(not self.is_bool):
            alike_of_warps = storage.alike.get_tensor(cute.make_layout(self.warps))
            if is_full_tile(mask, m_block, n_block, self.tile_m, self.tile_n, window):
                alike = self.patterns.alike(mask, m_block, n_block, self.tile_m, self.tile_n, tidx, alike_of_warps)
        if alike != 0:
            if cutlass.const_expr(not self.is_bool):
                self._put_alike(alike, mKinds, mRows, bits, mLists, (batch, head, m_block, n_block), tidx)
        else:
            self._put_mixed(
                mask, mKinds, mRows, bits, mLists, window, (batch, head, m_block, n_block), flags, keys_of_warps
            )

    @cute.jit
    def _put_alike(
        self,
        alike: Int32,
        mKinds: cute.Tensor,
        mRows: cute.Tensor,
        bits: cute.Tensor,  # (key blocks, rows, 4) of a head
        mLists: cute.Tensor,
        place: tuple[Int32, Int32, Int32, Int32],  # batch, head, query block, key block
        tidx: Int32,
    ) -> None:
        """What there is to say of a tile whose values are all alike."""
        batch, head, m_block, n_block = place
        n_blocks = mKinds.shape[3]
        warp, lane = tidx // 32, tidx % 32
        kind, visible = Int32(BIASED), Int32((1 << self.rows_of_warp) - 1)
        if alike & ZERO != 0:
            kind = Int32(WHOLE)
        hidden = Int32(0)
        if alike & (UNSEEN | LOW) != 0:
            kind, visible = Int32(SKIPPED + HIDES + 3 * HIDDEN_KEYS), Int32(0)
            soft = Int32(0)
            if alike & LOW != 0:
                kind = Int32(SKIPPED + HAS_LOW + HIDDEN_KEYS)
                visible = Int32(-1 << 16 if self.rows_of_warp == 16 else ((1 << self.rows_of_warp) - 1) << 16)
                soft = Int32(-1)
            if (tidx < 4) | (alike & UNSEEN != 0):
                hidden = _first_bits(self.tile_n - 32 * (lane % 4))
            words = cute.make_rmem_tensor(4, Int32)
            rows, threads = bits.shape[1], 32 * self.warps
            for i in cutlass.range_constexpr(cute.ceil_div(2 * self.tile_m, threads)):
                index = i * threads + tidx
                row, plane = m_block * self.tile_m + index % self.tile_m, index // self.tile_m
                words.fill(soft * plane)
                if (row < rows) & (plane < 2):
                    cute.autovec_copy(words, bits[plane * n_blocks + n_block, row, None])
        if lane == 0:
            mRows[batch, head, m_block, n_block, warp] = visible
        if tidx < 8:
            entries = mLists[batch, head, m_block, None]
            entries[LIST_HEADER + n_blocks + 4 * (tidx // 4 * n_blocks + n_block) + tidx % 4] = hidden
        if tidx == 0:
            mKinds[batch, head, m_block, n_block] = kind

    @cute.jit
    def _put_mixed(
        self,
        mask: cute.Tensor,  # (s_q, s_k) of a head
        mKinds: cute.Tensor,
        mRows: cute.Tensor | None,
        bits: cute.Tensor,  # (key blocks or twice as many, rows, 4) of a head
        mLists: cute.Tensor,
        window: Window,
        place: tuple[Int32, Int32, Int32, Int32],  # batch, head, query block, key block
        flags: cute.Tensor,  # (warps,) Int32 in shared memory
        keys_of_warps: cute.Tensor,  # (4, 2, warps) Int32 in shared memory
    ) -> None:
        """The same of any other tile, value by value."""
        batch, head, m_block, n_block = place
        n_blocks = mKinds.shape[3]
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
        first_row = m_block * self.tile_m + warp * self.rows_of_warp
        keys = cute.make_rmem_tensor((cute.ceil_div(self.tile_n, 32), 1 if self.is_bool else 2), Int32)
        values = cute.make_rmem_tensor((cute.ceil_div(self.tile_n, 32), self.rows_at_once), Float32)
        seen, visible, low = Int32(0), Int32(0), Int32(0)
        keys.fill(0)
        for part in cutlass.range(self.rows_of_warp // self.rows_at_once, unroll=1):
            for r in cutlass.range_constexpr(self.rows_at_once):  # all loads before their first use
                self._read_row(mask, first_row + part * self.rows_at_once + r, n_block, window, lane, values[None, r])
            for r in cutlass.range_constexpr(self.rows_at_once):
                index = part * self.rows_at_once + r
                row, hard, soft = first_row + index, Int32(0), Int32(0)
                if row < mask.shape[0]:
                    hard, soft, found = self._words(values[None, r], lane, keys)
                    seen = seen | found
                    if cutlass.const_expr(not self.is_bool):
                        visible = visible | (found >> 3 & 1) << index
                        low = low | (found >> 4 & 1) << index
                if (row < bits.shape[1]) & (lane < 4):
                    bits[n_block, row, lane] = hard
                    if cutlass.const_expr(not self.is_bool):
                        bits[n_blocks + n_block, row, lane] = soft
        if lane == 0:
            flags[warp] = seen
            for e in cutlass.range_constexpr(cute.size(keys, mode=[0])):
                for plane in cutlass.range_constexpr(cute.size(keys, mode=[1])):
                    keys_of_warps[e, plane, warp] = keys[e, plane]
            if cutlass.const_expr(mRows is not None):
                mRows[batch, head, m_block, n_block, warp] = visible | low << 16
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(self.warps):
            seen = seen | flags[w]
        kind = Int32(SKIPPED)
        if seen & 1 != 0:
            kind = Int32(BITS) if seen & 2 != 0 else Int32(WHOLE)
        if seen & 4 != 0:
            kind = Int32(BIASED)
        if warp == 0:
            count = cutlass.min(mask.shape[1] - n_block * self.tile_n, self.tile_n)
            entries = mLists[batch, head, m_block, None]
            hidden = self._list_hidden(keys_of_warps, entries, n_block, n_blocks, count, lane)
            if lane == 0:
                mKinds[batch, head, m_block, n_block] = kind + (seen >> 4 & 7) * HAS_LOW + hidden

    @cute.jit
    def _read_row(
        self,
        mask: cute.Tensor,
        row: Int32,
        n_block: Int32,
        window: Window,
        lane: Int32,
        values: cute.Tensor,  # (⌈tile_n / 32⌉,) fp32, out
    ) -> None:
        """The values of a row's keys lane, lane + 32, … of a block; -inf for those that are hidden, which is all that a
        boolean mask says beside 0, outside of the window, or that there are none of."""
        for e in cutlass.range_constexpr(cute.size(values)):
            column = 32 * e + lane
            key = n_block * self.tile_n + column
            values[e] = -Float32.inf
            exists = (row < mask.shape[0]) & (column < self.tile_n) & (key < mask.shape[1])
            if exists & (key >= row + window.left) & (key <= row + window.right):
                value = mask[row, key]
                if cutlass.const_expr(self.is_bool):
                    values[e] = Float32(0.0) if value != 0 else -Float32.inf
                else:
                    values[e] = value.to(Float32)

    @cute.jit
    def _list_hidden(
        self,
        keys: cute.Tensor,  # (4, 2, warps) Int32 in shared memory: which keys some row of a warp sees
        entries: cute.Tensor,  # the list of these rows
        n_block: Int32,
        n_blocks: Int32,
        count: Int32,  # of the keys of this block
        lane: Int32,
    ) -> Int32:
        """Put the keys that are hidden from all rows of a tile on the list, by a warp; what that adds to its kind."""
        hidden, word, plane = Int32(0), lane % 4, lane // 4
        if lane < (4 if self.is_bool else 8):
            for w in cutlass.range_constexpr(self.warps):
                hidden = hidden | keys[word, plane, w]
            hidden = ~hidden & _first_bits(count - 32 * word)
            entries[LIST_HEADER + n_blocks + 4 * (plane * n_blocks + n_block) + word] = hidden
        found = cute.arch.vote_ballot_sync(hidden != 0)
        hard, soft = Int32(found & 0xF != 0), Int32(found & 0xF0 != 0)
        return (hard + 2 * soft) * HIDDEN_KEYS

    @cute.jit
    def _words(self, values: cute.Tensor, lane: Int32, keys: cute.Tensor) -> tuple[Int32, Int32, Int32]:
        """Word ``lane`` of a row as a tile with bits, and as one with biases; and flags: 1 some key is seen, 2 some key
        is hidden, 4 some bias is no 0, 8 some value is visible, 16 some value up to HIDDEN is finite, 32 some value is
        -HIDDEN or more, 64 some value is -inf; from 16 on HAS_LOW, HAS_HIGH and HIDES, times 4. The keys that the row
        sees are added to ``keys``, (⌈tile_n / 32⌉, 1 or 2) Int32: a bit each."""
        hard, soft, found = Int32(0), Int32(0), Int32(0)
        shift = lane % 4 * 2
        for e in cutlass.range_constexpr(cute.size(values)):
            value = values[e]
            exists = 32 * e + lane < self.tile_n
            is_seen = exists & ~(value <= HIDDEN)  # and so is NaN
            seen = cute.arch.vote_ballot_sync(is_seen)
            hard = hard | _spread(seen, shift) << 8 * e
            keys[e, 0] = keys[e, 0] | seen
            found = found | (Int32(1) if seen != 0 else Int32(0))
            if cute.arch.vote_any_sync(exists & (value <= HIDDEN)):
                found = found | 2
            if cutlass.const_expr(not self.is_bool):
                added = cute.arch.vote_ballot_sync(exists & ~(value == -Float32.inf))
                soft = soft | _spread(added, shift) << 8 * e
                keys[e, 1] = keys[e, 1] | added
                if cute.arch.vote_any_sync(is_seen & ~(value == 0.0)):
                    found = found | 4
                if cute.arch.vote_any_sync(exists & ~(value < VISIBLE)):
                    found = found | 8
                if cute.arch.vote_any_sync((value <= HIDDEN) & (value > -Float32.inf)):
                    found = found | 16
                if cute.arch.vote_any_sync(value >= -HIDDEN):
                    found = found | 32
                if cute.arch.vote_any_sync(exists & (value == -Float32.inf)):
                    found = found | 64
        return hard, soft, found

    @cute.kernel
    def enlist(self, mKinds: cute.Tensor, mRows: cute.Tensor | None, mLists: cute.Tensor):
        """The list of one block of rows; a warp."""
        lane, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        _, heads, m_blocks, n_blocks = mKinds.shape
        m_block, head, batch = index % m_blocks, index // m_blocks % heads, index // m_blocks // heads
        kinds, entries = mKinds[batch, head, m_block, None], mLists[batch, head, m_block, None]
        is_low = Boolean(False)
        if cutlass.const_expr(mRows is not None):
            is_low = self._has_low_row(mRows[batch, head, m_block, None, None], lane)
        count = Int32(0)
        is_far = Boolean(False)  # a bias of a biased tile
        clear_end = Int32(0)
        last_kind = BIASED if mRows is None else HIDING
        for kind in cutlass.range_constexpr(WHOLE, last_kind + 1):
            for i in cutlass.range(cute.ceil_div(n_blocks, 32), unroll=1):
                n_block = i * 32 + lane
                found, hidden = Int32(SKIPPED), Int32(0)
                if n_block < n_blocks:
                    found = kinds[n_block]
                    hidden = Int32(found & (HIDDEN_KEYS if kind < BIASED else 2 * HIDDEN_KEYS) != 0)
                    has_low, has_high, hides = found & HAS_LOW != 0, found & HAS_HIGH != 0, found & HIDES != 0
                    found = Int32(BIASED) if is_low & has_low else found % HAS_LOW
                    is_far = is_far | (found == BIASED) & (has_low | has_high)
                    if cutlass.const_expr(mRows is not None):
                        found = Int32(HIDING) if (found == BIASED) & hides else found
                chosen = cute.arch.vote_ballot_sync(found == kind)
                if found == kind:
                    entries[LIST_HEADER + count + cute.arch.popc(chosen & (1 << lane) - 1)] = 2 * n_block + hidden
                count += cute.arch.popc(chosen)
            if cutlass.const_expr(kind == BIASED and kind != last_kind):
                clear_end = count
            elif lane == 0:
                entries[cutlass.min(kind, BIASED) - WHOLE] = count
        is_far = cute.arch.vote_any_sync(is_far)
        if lane == 0:
            entries[3] = 2 * clear_end + (Int32(1) if is_far else Int32(0))
        if (count == 0) & (lane == 0):
            entries[1] = 1
            entries[2] = 1
            entries[LIST_HEADER] = 1  # all keys of block 0 are hidden

    @cute.jit
    def _has_low_row(self, rows: cute.Tensor, lane: Int32) -> Boolean:
        """Whether some row of a block has finite values up to HIDDEN and none that is visible."""
        found = Int32(0)  # of the rows of warp lane % warps
        for i in cutlass.range(cute.ceil_div(rows.shape[0] * self.warps, 32), unroll=4):
            place = i * 32 + lane
            if place < rows.shape[0] * self.warps:
                found = found | rows[place // self.warps, place % self.warps]
        for distance in cutlass.range_constexpr(self.warps.bit_length() - 1, 5):
            found = found | cute.arch.shuffle_sync_bfly(found, 1 << distance)
        return cute.arch.vote_any_sync((found >> 16 & ~found & 0xFFFF) != 0)


class Patterns(NamedTuple):
    """Bits of a floating dtype, repeated in 32 of them."""

    width: int
    magnitudes: int  # all but the sign
    small: int  # of 2^SMALL_LOG2, not repeated
    hidden: int  # of -inf
    low: int  # of the largest value up to HIDDEN, in the upper half, or all; a negative number, as the last one

    @classmethod
    def of(cls, dtype: str) -> "Patterns | None":
        """Those of a mask, None of a boolean one."""
        if dtype not in EXPONENTS:
            return None
        bias, shift = EXPONENTS[dtype]
        width = DTYPES[dtype].width
        infinity, twice = (2 * bias + 1) << shift, 1 if width == 32 else 1 << 16 | 1
        small, magnitudes = (bias + SMALL_LOG2) << shift, (1 << width - 1) - 1
        sign, upper = 1 << width - 1, 32 - width
        hidden = ((infinity | sign) * twice) - (1 << 32)
        most = math.ceil((-HIDDEN / 2**15 - 1) * 2**shift) | (bias + 15) << shift
        return cls(width, magnitudes * twice, small, hidden, ((most | sign) << upper) - (1 << 32))

    @cute.jit
    def alike(
        self,
        mask: cute.Tensor,  # (s_q, s_k) of a head, see Mask.__call__
        m_block: Int32,
        n_block: Int32,
        tile_m: cutlass.Constexpr[int],
        tile_n: cutlass.Constexpr[int],
        tidx: Int32,
        flags: cute.Tensor,  # (warps,) Int32 in shared memory
    ) -> Int32:
        """ZERO, SMALL, UNSEEN and LOW, where all values of a full tile are that; 0 if they are none. By a whole CTA."""
        threads = 32 * cute.size(flags)
        of_row, vectors = tile_n * self.width // 128, tile_m * tile_n * self.width // 128
        rounds = (vectors + threads - 1) // threads
        values = cute.make_rmem_tensor((4, rounds), Int32)
        for i in cutlass.range_constexpr(rounds):
            index = i * threads + tidx
            if cutlass.const_expr(vectors % threads != 0):
                index = cutlass.min(index, vectors - 1)  # the last one more than once
            row, column = m_block * tile_m + index // of_row, n_block * tile_n + index % of_row * (128 // self.width)
            start = mask.iterator + cute.crd2idx((row, column), mask.layout)
            source = cute.make_tensor(cute.recast_ptr(start.align(16), dtype=Int32), cute.make_layout(4))
            cute.autovec_copy(source, values[None, i])
        upper, lower, other = Int32(0), Int32(0), Int32(0)
        for i in cutlass.range_constexpr(cute.size(values)):
            value = values[i]
            upper = cutlass.max(upper, value & (self.magnitudes if self.width == 32 else 0x7FFF0000))
            if cutlass.const_expr(self.width == 16):
                lower = cutlass.max(lower, value & 0x7FFF)
            other = other | value ^ self.hidden
        is_small = (upper < self.small << 32 - self.width) & (lower < self.small)  # False for NaN and inf
        found = Int32(ZERO) if cute.arch.vote_all_sync(upper | lower == 0) else Int32(0)
        found = found | (Int32(SMALL) if cute.arch.vote_all_sync(is_small) else Int32(0))
        found = found | (Int32(UNSEEN) if cute.arch.vote_all_sync(other == 0) else Int32(0))
        found = _common(found, flags, tidx)
        if found == 0:
            least, most = Int32(-1), Int32(self.low)
            for i in cutlass.range_constexpr(cute.size(values)):
                for half in cutlass.range_constexpr(32 // self.width):
                    value = values[i] << 16 * half
                    least, most = cutlass.min(least, value), cutlass.max(most, value)
            first_hidden = self.hidden & -65536 if cutlass.const_expr(self.width == 16) else self.hidden
            is_low = (least >= self.low) & (most < first_hidden)
            found = Int32(LOW) if cute.arch.vote_all_sync(is_low) else Int32(0)
            cute.arch.sync_threads()  # all have read the flags
            found = _common(found, flags, tidx)
        return found


@cute.jit
def _common(found: Int32, flags: cute.Tensor, tidx: Int32) -> Int32:
    """Bits that all warps of a CTA have found; ``flags``: (warps,) Int32 in shared memory."""
    if tidx % 32 == 0:
        flags[tidx // 32] = found
    cute.arch.sync_threads()
    for w in cutlass.range_constexpr(cute.size(flags)):
        found = found & flags[w]
    return found


@cute.jit
def is_full_tile(
    mask: cute.Tensor,  # (s_q, s_k) of a head
    m_block: Int32,
    n_block: Int32,
    tile_m: cutlass.Constexpr[int],
    tile_n: cutlass.Constexpr[int],
    window: Window,
) -> Boolean:
    """Whether all rows and keys of a tile exist, and all of them are in the window."""
    row, key = m_block * tile_m, n_block * tile_n
    exists = (row + tile_m <= mask.shape[0]) & (key + tile_n <= mask.shape[1])
    return exists & (key >= row + tile_m - 1 + window.left) & (key + tile_n - 1 <= row + window.right)


@cute.jit
def _first_bits(count: Int32) -> Int32:
    """So many bits from the lowest on; none if that is negative, all from 32 on."""
    bits = Int32(-1)
    if count < 32:
        bits = (Int32(1) << cutlass.max(count, 0)) - 1
    return bits


@cute.jit
def _spread(ballot: Int32, shift: Int32) -> Int32:
    """The bits shift + 8w + j of a ballot over 32 keys, as bits 2w + j of eight; w < 4, j < 2."""
    pairs = ballot >> shift & 0x03030303
    return (pairs | pairs >> 6 | pairs >> 12 | pairs >> 18) & 0xFF


def example_mask(dtype: str, batch: object, heads: object) -> cute.Tensor:
    """A mask without data: a boolean one has any strides, others those of `Mask.__call__`."""
    shape = (batch, heads, cute.sym_int(), cute.sym_int())
    if dtype == "bool":
        return cute.runtime.make_fake_tensor(DTYPES[dtype], shape, tuple(cute.sym_int64() for _ in shape))
    unit = 128 // DTYPES[dtype].width
    strides = tuple(cute.sym_int64(divisibility=unit) for _ in shape[1:])
    return cute.runtime.make_fake_tensor(DTYPES[dtype], shape, (*strides, 1), assumed_align=16)


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``: everything symbolic but the dtype."""

    def tensor(dtype: type[cutlass.Numeric], *shape: object, last_stride: object = 1) -> cute.Tensor:
        strides = tuple(cute.sym_int64() for _ in shape[1:])
        align = max(dtype.width // 8, 1)
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, last_stride), assumed_align=align)

    batch, heads, m_blocks, n_blocks = (cute.sym_int() for _ in range(4))
    return (
        example_mask(key.dtype, batch, heads),
        tensor(Int32, batch, heads, m_blocks, n_blocks),
        None if key.dtype == "bool" else tensor(Int32, batch, heads, m_blocks, n_blocks, mask_warps(key.tile_m)),
        tensor(Int32, batch, heads, cute.sym_int(), cute.sym_int(), 4),
        tensor(Int32, batch, heads, m_blocks, cute.sym_int()),
        Int32(0),
        Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
