"""What the Hopper kernels can run, and with which tile. Free of the compiler."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import torch

from ...meta.crossover import Cut, Cuts
from ...meta.spec import AttentionSpec, MaskKind, Reason, wrong_mask
from ...meta.target import Target
from ..key import KernelKey

ARCH = 90
DELAY = {False: 2, True: 1}  # blocks of queries between tiles of a group that take turns, by whether there is a mask
HEAD_BLOCKS = 128  # of queries; see backward_heads
RING_BYTES = 92_000_000  # of dQ's sums, up to which they cost nothing; as the next three: _blocks_of_time
RING_COST = 1 / 8  # of a block's time, for as many bytes more
LAST_COST = 1 / 16  # of a block's time, for each block of the longest tile
PART_COST = 0.4  # of a block's time, for each tile of keys of a part of dK and dV
SMEM_PER_BLOCK = 232_448  # bytes, what one CTA can opt in to on an H100
BARRIER_BYTES = 1024  # mbarriers and the alignment of the first buffer
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
BIAS_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_HEAD_DIM = 256  # what one WGMMA can be wide
SHORT_TILES = (80, 96)  # keys of tiles of the backward that are shared and no multiple of 64
TILE_REGISTERS = 192  # per thread, for S, P and O of two MMA warpgroups; what is left of 240 holds everything else


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile of the forward kernel. Raises ValueError if it cannot be built."""

    head_dim: int
    head_dim_v: int
    tile_m: int  # query rows of a CTA: 64 per MMA warpgroup
    tile_n: int  # keys per block
    stages: int  # K and V blocks in flight
    bias_bytes: int = 0  # of an element of a floating attn_mask, whose tiles are loaded beside K and V

    def __post_init__(self) -> None:
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % 8 or not 8 <= value <= MAX_HEAD_DIM:
                raise ValueError(f"self.{name}={value} must be a multiple of 8 in [8, {MAX_HEAD_DIM}]")
        if self.tile_m % 64 or not 1 <= self.mma_warpgroups <= 3:
            raise ValueError(f"{self.tile_m=} must be 64, 128 or 192")
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            raise ValueError(f"{self.tile_n=} must be a multiple of 16 in [16, 256]")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.smem_bytes > SMEM_PER_BLOCK:
            raise ValueError(f"{self.smem_bytes=} must be at most {SMEM_PER_BLOCK}")

    @property
    def mma_warpgroups(self) -> int:
        return self.tile_m // 64

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of an MMA warpgroup and of the producer after reallocation (64 K per SM)."""
        return {1: (256, 56), 2: (240, 24), 3: (160, 32)}[self.mma_warpgroups]

    @property
    def head_dim_mma(self) -> int:
        """Columns of Q and K that are multiplied: what WGMMA takes at a time is 16 deep."""
        return round_up(self.head_dim, 16)

    @property
    def head_dim_v_mma(self) -> int:
        """Columns of V that are multiplied, and of O in registers and in shared memory."""
        return round_up(self.head_dim_v, 16)

    @property
    def head_dim_smem(self) -> int:
        """Columns of Q and K in shared memory: whole 128-byte swizzled rows. TMA fills in zeros."""
        return round_up(self.head_dim, 64)

    @property
    def head_dim_v_smem(self) -> int:
        """Columns of V in shared memory, as ``head_dim_smem``."""
        return round_up(self.head_dim_v, 64)

    @property
    def stores_by_tma(self) -> bool:
        """Whether O has shared memory of its own to be stored from; if not, registers are stored to global memory."""
        return self._smem_bytes(2, True, self.bias_stages) <= SMEM_PER_BLOCK

    @property
    def bias_stages(self) -> int:
        """Tiles of biases in flight: 2 where they fit beside one stage of Q, 0 where there are none."""
        if not self.bias_bytes:
            return 0
        return 2 if self._smem_bytes(1, False, 2) <= SMEM_PER_BLOCK else 1

    @property
    def reads_biases_early(self) -> bool:
        """Whether a block's biases are read beside its multiplications: if TILE_REGISTERS hold them, too."""
        biases = self.tile_n // 8 * self.bias_bytes
        used = self.tile_n // 2 + self.tile_n // 4 + self.head_dim_v_mma // 2 + biases
        return self.tile_m < 192 and used <= TILE_REGISTERS

    @property
    def q_stages(self) -> int:
        """2 where there is room: then the next tile's Q is loaded while this one's is still in use."""
        return 2 if self.stores_by_tma else 1

    def next_scores(self, is_causal: bool) -> NextScores:
        """When, at the end of a tile, the next one's first Q Kᵀ is issued.

        After P V, O is finished beside it, and no softmax follows the last tile. Before P V both are waited for, and
        the softmax follows even there, without a branch. On an H100 (bf16, 16k tokens) that is 2 % faster for short
        causal tiles at d64 (512 … 2k), and up to 7 % slower at d80; elsewhere within 1.5 %, and 0.6-1 µs are lost where
        each CTA has one tile.
        """
        if self.q_stages == 1:
            return "late"
        return "before" if is_causal and self.tile_m == 128 and max(self.head_dim, self.head_dim_v) <= 64 else "after"

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self._smem_bytes(self.q_stages, self.stores_by_tma, self.bias_stages)

    def _smem_bytes(self, q_stages: int, stores_by_tma: bool, bias_stages: int) -> int:
        """16-bit Q, K and V in every stage, and O; biases."""
        q = q_stages * self.tile_m * self.head_dim_smem
        k_v = self.stages * self.tile_n * (self.head_dim_smem + self.head_dim_v_smem)
        o = self.tile_m * self.head_dim_v_mma if stores_by_tma else 0
        return 2 * (q + k_v + o) + bias_stages * self.tile_m * self.tile_n * self.bias_bytes + BARRIER_BYTES


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Tile of the backward kernel. Raises ValueError if it cannot be built.

    With ``tile_n`` 128 two MMA warpgroups have 64 keys each, and dK and dV for them. With 64 one has S, P and dV of all
    keys, the other dP, dS and dK; that serves the head dims at which dK and dV of 64 keys are too many registers for
    one warpgroup. So do SHORT_TILES, with dK and dV multiplied transposed. A third one multiplies dQ where that leaves
    the others enough registers.
    """

    head_dim: int
    head_dim_v: int
    tile_m: int  # query rows per block
    tile_n: int  # keys of a CTA
    stages: int  # Q and dO blocks in flight
    attn_mask: str = ""  # as of KernelKey

    def __post_init__(self) -> None:
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % 8 or not 8 <= value <= MAX_HEAD_DIM:
                raise ValueError(f"self.{name}={value} must be a multiple of 8 in [8, {MAX_HEAD_DIM}]")
        if self.tile_n not in (64, *SHORT_TILES, 128):
            raise ValueError(f"{self.tile_n=} must be 64, one of {SHORT_TILES} or 128")
        if self.attn_mask and self.transposes_sums:
            raise ValueError(f"{self.tile_n=} must be 64 or 128 with a mask: a warp classifies 32 keys")
        if self.tile_m not in (64, 128):
            raise ValueError(f"{self.tile_m=} must be 64 or 128")
        if self.tile_m != 64 and not self.splits_keys:
            raise ValueError(f"{self.tile_m=} must be 64 with {self.tile_n=}")
        if self.stages != 2:
            raise ValueError(f"{self.stages=} must be 2: dS is written to a stage while the other one is read")
        if self.smem_bytes > SMEM_PER_BLOCK:
            raise ValueError(f"{self.smem_bytes=} must be at most {SMEM_PER_BLOCK}")
        if self.splits_keys and not self.stages_dq():
            raise ValueError(f"{self.tile_n=} leaves no room for dQ")

    @property
    def mma_warpgroups(self) -> int:
        return 3 if self.has_dq_warpgroup else 2

    @property
    def registers(self) -> tuple[int, int, int, int]:
        """Registers per thread of the two MMA warpgroups, of the producer, and of dQ's warpgroup or 0, after
        reallocation (64 K per SM). In short tiles what is left beside dV and dK is the same for both."""
        if not self.has_dq_warpgroup:
            return 240, 240, 24, 0
        dq = round_up(self.dq_chunk // 2, 8) + 32  # with 24, ptxas ignores the limit, and all others with it (C7507)
        both = 512 - 24 - dq
        first = second = both // 16 * 8
        if self.transposes_sums:
            first = (both + (self.dv_columns - self.dk_columns) * self.tile_n // 128) // 16 * 8
            second = both - first
        return first, second, 512 - first - second - dq, dq

    @property
    def splits_keys(self) -> bool:
        """Whether each MMA warpgroup has keys of its own."""
        return self.tile_n == 128

    @property
    def transposes_sums(self) -> bool:
        """Whether dK and dV are multiplied transposed, columns × keys, for which keys need be no multiple of 64."""
        return self.tile_n in SHORT_TILES

    @property
    def dk_columns(self) -> int:
        """Columns of dK that are multiplied."""
        return self._sum_columns(self.head_dim_mma)

    @property
    def dv_columns(self) -> int:
        """Columns of dV that are multiplied."""
        return self._sum_columns(self.head_dim_v_mma)

    def _sum_columns(self, columns: int) -> int:
        if self.transposes_sums:
            return round_up(columns, 64)
        return columns if columns <= 192 else 256

    @property
    def p_stages(self) -> int:
        """Blocks of P in shared memory. Two where WGMMA reads it there: that of one block is written while another
        warp may still read the one before it."""
        if self.splits_keys:
            return 0
        return self.stages if self.transposes_sums else 1

    @property
    def has_dq_warpgroup(self) -> bool:
        """Whether a warpgroup of its own multiplies dQ: with shared keys, or if the others have 192 registers left, for
        dK and dV of 64 keys, S, dP and 32 more."""
        fits = self.head_dim_mma <= 144 and self.head_dim_mma + self.head_dim_v_mma <= 192
        return self.tile_m == 64 and (fits or not self.splits_keys)

    @property
    def k_slices(self) -> int:
        """16 columns each of K that one warpgroup keeps in registers, as operand of S, where products are shared."""
        return self._slices(self.head_dim_mma, self.head_dim_v_mma)

    @property
    def v_slices(self) -> int:
        """16 columns each of V that the other warpgroup keeps in registers, as operand of dP."""
        return self._slices(self.head_dim_v_mma, self.head_dim_mma)

    def _slices(self, columns: int, accumulated: int) -> int:
        """Slices of 4 registers beside S and P in 16 bit, or dP and dS, and dV or dK of so many columns."""
        if self.splits_keys or self.transposes_sums:
            return 0
        others = 40 if self.attn_mask in BIAS_BYTES else 32
        room = self.registers[0] - others - 3 * self.tile_m // 4 - self._sum_columns(accumulated) // 2
        return max(0, min(columns // 16, room // 4))

    @property
    def dq_chunk(self) -> int:
        """Columns of dQ that are multiplied at a time: one 128-byte row of shared memory where the registers of the
        others are worth more than reading dS again, else all."""
        return self.dq_columns if self.splits_keys else 64

    @property
    def head_dim_mma(self) -> int:
        """Depth of Q Kᵀ, and columns of dK up to 192."""
        return round_up(self.head_dim, 16)

    @property
    def head_dim_v_mma(self) -> int:
        """Depth of dO Vᵀ, and columns of dV up to 192."""
        return round_up(self.head_dim_v, 16)

    @property
    def head_dim_smem(self) -> int:
        """Columns of Q and K in shared memory: whole 128-byte rows. TMA fills in zeros."""
        return round_up(self.head_dim, 64)

    @property
    def head_dim_v_smem(self) -> int:
        """Columns of V and dO in shared memory, as ``head_dim_smem``."""
        return round_up(self.head_dim_v, 64)

    @property
    def dq_by_rows(self) -> bool:
        """Whether each MMA warpgroup computes dQ of 64 rows, or half of the columns of all."""
        return self.tile_m == 128

    @property
    def dq_columns(self) -> int:
        """Columns of dQ that are multiplied: as many as Q has where one WGMMA has all of them. Parts of them begin at
        whole rows of shared memory."""
        at_once = self.dq_by_rows or self.has_dq_warpgroup and self.splits_keys and self.head_dim > 64
        return self.head_dim_mma if at_once else self.head_dim_smem

    @property
    def adders(self) -> int:
        """Warps of a CTA that add dQ to its sums, each its share of every block: two of their own, or dQ's
        warpgroup."""
        return 2 if self.stages_dq() else 4

    @property
    def turn_warps(self) -> int:
        """Warps of a CTA that hand turns on in deterministic mode, each for blocks of its own."""
        return 2 if self.stages_dq() else 1

    def scratch(self, sequences: int, blocks: int, group: int, slots: int, turns: int) -> int:
        """fp32 elements of scratch memory for ``blocks`` blocks of tile_m query rows of each of ``sequences`` query
        heads of a batch: lse and δ of each row, dQ's sums of ``slots`` groups of query heads, counters; those of
        ``turns`` tiles, which are all in deterministic mode, else 0."""
        counters = 1 + 2 * slots + sequences // group + self.turn_warps * turns
        return sequences * blocks * 2 * self.tile_m + self.ring_values(slots, group, blocks) + counters

    def visited(self, blocks: int, left: int | None, right: int | None) -> int:
        """Blocks of queries, of ``blocks`` a head has, that the longest tile of keys visits where row i sees the keys
        i + left … i + right, or, where these are None, all keys or those up to i. With a window it may be one more."""
        if left is None or right is None:
            return blocks
        return max(1, min(blocks, -(-(right - left + self.tile_n) // self.tile_m)))

    def ring_values(self, slots: int, group: int, blocks: int) -> int:
        """fp32 sums of dQ of ``slots`` groups of query heads, of ``blocks`` blocks each."""
        return slots * group * blocks * self.tile_m * self.dq_columns

    def stages_dq(self, deterministic: bool = False) -> int:
        """Blocks of dQ in shared memory, to be added to global memory from there; with 0 that happens from registers. A
        second one is for turns in deterministic mode."""
        if self.transposes_sums:
            return 0
        wanted = range(2 if deterministic else 1, 0, -1)
        return next((stages for stages in wanted if self._smem_bytes(stages) <= SMEM_PER_BLOCK), 0)

    @property
    def stores_by_tma(self) -> bool:
        """Whether dK and dV, one after the other, are stored from dQ's shared memory; if not, from registers."""
        room = 4 * self.tile_m * self.dq_columns // 2
        tile = 2 * 64 * max(self.head_dim_mma, self.head_dim_v_mma)
        return not self.has_dq_warpgroup and tile <= room

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        used = self._smem_bytes(self.stages_dq())
        return used + max(0, self.bias_stages - 1) * self.bias_tile_bytes

    @property
    def bias_stages(self) -> int:
        """Blocks of biases in flight: 2 where the second one fits beside all else, 0 where there are none."""
        if not self.bias_tile_bytes:
            return 0
        return 2 if self._smem_bytes(self.stages_dq()) + self.bias_tile_bytes <= SMEM_PER_BLOCK else 1

    @property
    def bias_tile_bytes(self) -> int:
        """Biases of a block."""
        return self.tile_m * self.tile_n * BIAS_BYTES.get(self.attn_mask, 0)

    def _smem_bytes(self, stages_dq: int) -> int:
        """16-bit K and V; in every stage 16-bit Q, dO and dS, and fp32 lse and δ; 16-bit P on its way from one
        warpgroup to another; fp32 dQ."""
        width = self.head_dim_smem + self.head_dim_v_smem
        scores = self.tile_m * self.tile_n
        dq = 4 * self.tile_m * self.dq_columns * stages_dq
        tiles = 2 * (self.tile_n * width + self.stages * (self.tile_m * width + scores))
        tiles += 2 * self.p_stages * scores
        return tiles + 8 * self.tile_m * self.stages + dq + self.mask_bytes + BARRIER_BYTES

    @property
    def mask_bytes(self) -> int:
        """Shared memory of a mask: in every stage 16 bytes of bits for each key, and biases of one block."""
        bits = 16 * self.tile_n * self.stages if self.attn_mask else 0
        return bits + self.bias_tile_bytes


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# Of a list of key blocks (mask.py): where its whole blocks end, where those with bits end, where it ends, and of its
# biased blocks, twice the place where those that hide no key end, plus 1 if biases are far from 0.
LIST_HEADER = 4
# Of a list of query blocks (mask_transposed.py): where its biased blocks end, where those with bits end, where it ends;
# twice the place where those of the biased ones that hide keys end, plus 1 if keys are hidden from all blocks, and
# which ones: a bit each.
TRANSPOSED_HEADER = 8
MASK_ROWS = 16  # of a transposed one, classified at a time

Tile = Literal["small", "split", "normal", "wide"]
NextScores = Literal["before", "after", "late"]  # P V of the last block; late: O is stored first

LSE_COLUMNS = 4  # behind the fp32 columns of a part's O: its lse, and what keeps rows aligned to 16 bytes
SMALL_TILE = 64  # query rows, and keys per block

# Keys per block of the wide tile, by the larger head dim: what leaves S, P and O within 160 registers of a thread.
WIDE_KEYS = {64: 128, 96: 96}
# From how many query rows on it serves a call, by is_causal and head dim. For speed, measured on an H100 (bf16, 16k
# tokens; docs/kernels/sm90_forward.md): d64 is 8-30 % ahead of the normal tile at 512 … 16k without a mask, 6-19 % from
# 4k on where causal, and 10 % and more behind at 2k; d80 and d96 win 6-19 % from 1.5k on and lose 3-9 % at 1k, causal
# 1-11 % from 3k on and lose 6-7 % at 2k.
WIDE_FROM = {(False, 64): 512, (True, 64): 4096, (False, 96): 1536, (True, 96): 3072}
WIDE_TIME = 0.8  # of a wide tile, per row, where the normal one takes 1


def _wide_class(head_dim: int, head_dim_v: int) -> int | None:
    """Key of WIDE_KEYS, None where there is no wide tile."""
    return next((limit for limit in WIDE_KEYS if max(head_dim, head_dim_v) <= limit), None)


def forward_tiles(head_dim: int, head_dim_v: int, is_causal: bool, has_options: bool) -> tuple[Tile, ...]:
    """The tiles that serve calls of these head dims, with or without a window, softcap or sink."""
    tiles: tuple[Tile, ...] = ("small", "normal")
    if not is_causal and not has_options:
        tiles += ("split",)
    if _wide_class(head_dim, head_dim_v) is not None and not has_options:
        tiles += ("wide",)
    return tiles


def forward_tile(
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    has_options: bool,
    seqlen_q: int,
    seqlen_k: int,
    sequences: int,
    num_sms: int,
) -> Tile:
    """The tile that serves a call of ``sequences`` = batch · heads. Asked at launch, where sizes are plain integers.

    Small: where even twice as many CTAs all run at once, or no tile is more than half full. In a CUDA graph on an H100
    16 heads of 512 causal rows take 8.8 µs (normal: 11.5) at d128, 7.2 µs (9.2) without mask at d64, and 84 · 16 heads
    of 64 rows 26 µs (33) at d80. Also beyond d64 where causal tiles, which differ in cost, all run at once: 1024 rows
    take 15.5 µs (16.8) at d128. Without mask, or at d64, the normal tile is faster there.
    Split: small, with a row's keys shared by several CTAs, where ``forward_parts`` finds that worth while.
    Wide: from WIDE_FROM on, unless that leaves SMs idle in the last wave.
    """
    normal = -(-seqlen_q // 128) * sequences
    if seqlen_q <= 64 or 2 * normal <= num_sms:
        splits = not is_causal and not has_options and forward_parts(seqlen_q, seqlen_k, sequences, num_sms) > 1
        return "split" if splits else "small"
    if is_causal and normal <= num_sms and max(head_dim, head_dim_v) > 64:
        return "small"
    wide_class = _wide_class(head_dim, head_dim_v)
    if wide_class is None or has_options or seqlen_q < WIDE_FROM[is_causal, wide_class]:
        return "normal"
    wide = -(-seqlen_q // 192) * sequences
    time, wide_time = -(-normal // num_sms) * 128, -(-wide // num_sms) * 192 * WIDE_TIME
    return "wide" if wide_time <= time else "normal"


class Tiling(NamedTuple):
    """How a forward call is cut into tiles."""

    tile: Tile
    packs: bool  # the query heads of a key/value head are rows of one head
    sizes: tuple[int, int, int, int]  # seqlen_q and seqlen_k, sequences, SMs, as packed


def forward_tiling(
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    flags: tuple[bool, bool, bool],  # window, softcap, sink
    batch: int,
    heads: int,
    heads_kv: int,
    seqlen_q: int,
    seqlen_k: int,
    num_sms: int,
    has_mask: bool = False,
) -> Tiling:
    """What serves a call; with an attn_mask is_causal is one of the flags, window."""
    window, _, sink = flags
    packs = packs_gqa(heads // heads_kv, seqlen_q, is_causal or window or sink)
    if packs:
        heads, seqlen_q = heads_kv, heads // heads_kv
    sizes = (seqlen_q, seqlen_k, batch * heads, num_sms)
    has_options = has_mask or any(flags)
    return Tiling(forward_tile(head_dim, head_dim_v, is_causal, has_options, *sizes), packs, sizes)


def takes_wide_biases(head_dim: int, head_dim_v: int, flags: tuple[bool, bool, bool], mask: MaskKind) -> bool:
    """Whether calls with such a mask that tells heads apart, and would have the normal tile, have the one that
    ``forward_tile`` gives a call without options. Flags: as of ``forward_tiling``.

    A block of 128 keys at d64 is 64 KB from L2 for 128 rows, half of them biases, and L2 sets the time. The wide tile
    takes 53 KB for as many rows. Masks that are the same for all heads are mostly those that hide keys, which tiles of
    fewer rows do better.
    """
    return mask in BIAS_BYTES and _wide_class(head_dim, head_dim_v) == 64 and not any(flags[1:])


def cuts(spec: AttentionSpec, num_sms: int) -> Cuts:
    """How a call is cut, see meta/crossover.py; its backward as one that is not deterministic, and whose window is as
    long as the keys."""
    has_mask = spec.mask != "none"
    is_masked = spec.window or spec.is_causal or has_mask
    flags = (spec.window or (has_mask and spec.is_causal), spec.softcap > 0.0, spec.sink)
    dims = spec.head_dim, spec.head_dim_v
    sizes = spec.batch, spec.num_heads, spec.num_heads_kv, spec.seqlen_q, spec.seqlen_k, num_sms
    tile, packs, (rows, keys, sequences, _) = forward_tiling(
        *dims, spec.is_causal and not has_mask, flags, *sizes, has_mask=has_mask
    )
    forward = forward_config(*dims, tile)
    parts = forward_parts(rows, keys, sequences, num_sms) if tile == "split" else 1
    heads = spec.num_heads_kv if packs else spec.num_heads
    backward = backward_config(*dims, flags[1])
    tiles, blocks = -(-keys // backward.tile_n), -(-spec.seqlen_q // backward.tile_m)
    counts = spec.batch, spec.num_heads, spec.num_heads_kv, tiles, blocks, blocks
    summed = backward_heads(backward, *counts, is_masked, False, num_sms)
    return Cuts(Cut(forward.tile_m, forward.tile_n, heads, parts), Cut(backward.tile_n, backward.tile_m, summed))


@functools.lru_cache(maxsize=4096)
def forward_parts(seqlen_q: int, seqlen_k: int, sequences: int, num_sms: int) -> int:
    """Into how many parts small tiles split their keys, so that more SMs are at work; 1 is for not at all.

    The model, fitted to CUDA graphs on an H100 (bf16, d80 and d128, one query a head, 512 … 32k keys): a block of 64
    keys takes 0.75 µs, each CTA beside it 0.02, combining the parts 1.5. With 8 key/value heads of d128 and 4096 keys,
    16 parts take 8.9 µs (1 part: 42.8), with 2 and d80 and 2048 keys 32 parts 5.8 (20.0).
    """
    tiles, blocks = -(-seqlen_q // SMALL_TILE) * sequences, -(-seqlen_k // SMALL_TILE)
    best, parts = 0.75 * blocks, 1
    for count in range(2, min(num_sms // tiles, blocks) + 1):
        size = -(-blocks // count)
        time = 0.75 * size + 0.02 * tiles * count + 1.5
        if time < best:
            best, parts = time, -(-blocks // size)  # no part is empty
    return parts


def packs_gqa(group: int, seqlen_q: int, tells_rows_apart: bool) -> bool:
    """Whether the ``group`` query heads of a key/value head become rows of one tile, so that K and V are read once:
    where each has one query, and no mask or sink tells them apart.

    On an H100 (bf16, CUDA graphs) 16 / 2 heads of d80 with 2048 keys take 5.8 µs, packed and their keys split, and 19.0
    with a tile for each head. With more queries packing would depend on strides, and results with it; there the heads
    of a group are neighbours in the schedule and share K and V in L2.
    """
    return group > 1 and seqlen_q == 1 and not tells_rows_apart


@functools.cache
def forward_config(head_dim: int, head_dim_v: int, tile: Tile = "normal", bias_bytes: int = 0) -> ForwardConfig:
    """Tile for a pair of head dims; ValueError for head dims, or a tile, that no kernel has.

    Small, split: one MMA warpgroup, 64 x 64.
    Normal: two MMA warpgroups of 240 registers, and the longest key block up to 128 that leaves S, P and O within
    TILE_REGISTERS and two stages of K and V, and one of biases, within shared memory. O at d128 takes 64 registers, at
    d256 128.
    Wide: three MMA warpgroups of 160 registers, so that each K and V block serves 192 rows and the softmax of two
    warpgroups runs beside the multiplications of the third.
    """
    stages = 2
    if tile in ("small", "split"):
        return ForwardConfig(head_dim, head_dim_v, SMALL_TILE, SMALL_TILE, stages, bias_bytes)
    if tile == "wide":
        wide_class = _wide_class(head_dim, head_dim_v)
        if wide_class is None:
            raise ValueError(f"no wide tile for head_dim={head_dim}, head_dim_v={head_dim_v}")
        return ForwardConfig(head_dim, head_dim_v, 192, WIDE_KEYS[wide_class], stages, bias_bytes)
    tile_m = 128
    registers = (TILE_REGISTERS - round_up(head_dim_v, 16) // 2) * 4 // 3
    room = SMEM_PER_BLOCK - BARRIER_BYTES - 2 * tile_m * round_up(head_dim, 64)  # beside one stage of Q
    smem = room // (2 * stages * (round_up(head_dim, 64) + round_up(head_dim_v, 64)) + tile_m * bias_bytes)
    tile_n = min(128, registers // 16 * 16, smem // 16 * 16)
    return ForwardConfig(head_dim, head_dim_v, tile_m, tile_n, stages, bias_bytes)


@functools.cache
def forward_key(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    tile: Tile = "normal",
    *,
    window: bool = False,
    softcap: bool = False,
    sink: bool = False,
    attn_mask: MaskKind = "none",
) -> KernelKey:
    """Key of the forward kernel for what decides its code; with an attn_mask that stands for is_causal and window."""
    config = forward_config(head_dim, head_dim_v, tile, BIAS_BYTES.get(attn_mask, 0))
    if attn_mask != "none":
        key = _key("forward", dtype, False, config, softcap=softcap, sink=sink)
        return dataclasses.replace(key, attn_mask=attn_mask)
    flags = {"window": window, "softcap": softcap, "sink": sink, "split": tile == "split"}
    return _key("forward", dtype, is_causal, config, **flags)


def forward_config_of(key: KernelKey) -> ForwardConfig:
    """The tile of a forward kernel."""
    sizes = (key.head_dim, key.head_dim_v, key.tile_m, key.tile_n, key.stages)
    return ForwardConfig(*sizes, BIAS_BYTES.get(key.attn_mask, 0))


def mask_warps(tile_m: int) -> int:
    """Warps that classify a tile of a forward, up to 16 rows each; a power of two."""
    return 16 if tile_m > 128 else 8


@functools.cache
def mask_key(attn_mask: MaskKind, tile_m: int, tile_n: int, transposed: bool = False) -> KernelKey:
    """Key of the kernels that prepare masks of a dtype for the tiles of a forward, or transposed, of a backward."""
    return KernelKey("mask", ARCH, attn_mask, 0, 0, False, tile_m, tile_n, 1, transposed=transposed)


@functools.cache
def backward_config(
    head_dim: int, head_dim_v: int, softcap: bool = False, attn_mask: MaskKind = "none"
) -> BackwardConfig:
    """Tile for a pair of head dims; ValueError for head dims that no kernel has.

    With keys of its own a warpgroup holds (head_dim + head_dim_v) / 2 registers a thread of dK and dV, and
    tile_m / 2 each of S, dP and, where no third one multiplies it, dQ. A softcap needs some more, with biases more yet.
    Shared memory holds 128 keys beside two stages of 64 queries and their dQ if 768 bytes for each column of Q and 512
    for each of V (padded to 64), and what a mask takes, are within 192 KB. Else the warpgroups share 64 keys. Biases of
    128 queries find no room.

    For speed, on an H100 (bf16, 4k, full / causal, TFLOP/s), the third warpgroup: d80 444 / 382 → 486 / 425, d96
    484 / 430 → 544 / 485; and keys shared by products instead of columns: d192 381 / 342 → 420 / 380, d256 381 / 354 →
    424 / 386.
    """
    columns = round_up(head_dim, 16) + round_up(head_dim_v, 16)
    smem = 768 * round_up(head_dim, 64) + 512 * round_up(head_dim_v, 64)
    mask, bias = "" if attn_mask == "none" else attn_mask, BIAS_BYTES.get(attn_mask, 0)
    smem += 64 * 128 * bias + (4096 if mask else 0)
    most = (128 if bias else 192) if softcap else 256
    if columns > most or smem > 192 << 10:
        keys = 64 if mask else _shared_keys(head_dim, head_dim_v, softcap)
        return BackwardConfig(head_dim, head_dim_v, 64, keys, 2, mask)
    wide = max(head_dim, head_dim_v) <= 64 and not softcap and not bias
    return BackwardConfig(head_dim, head_dim_v, 128 if wide else 64, 128, 2, mask)


def is_faster_if_boolean(head_dim: int, head_dim_v: int, softcap: bool, attn_mask: MaskKind) -> bool:
    """Whether the backward of a mask of this kind has a smaller tile than that of a boolean one, which a mask that adds
    nothing can have, too. See masks.as_boolean."""
    if attn_mask not in BIAS_BYTES:
        return False
    own, boolean = (backward_config(head_dim, head_dim_v, softcap, kind) for kind in (attn_mask, "bool"))
    return own.tile_m * own.tile_n < boolean.tile_m * boolean.tile_n


def _shared_keys(head_dim: int, head_dim_v: int, softcap: bool) -> int:
    """Keys of a tile whose products the warpgroups share.

    The fewer they are, the more often Q, dO and dQ cross L2, which limits tiles of 64. More leave room for S and 32
    other registers beside dV or dK: 80 at d192, 96 where one of them has 128 columns. Not where that multiplies columns
    of zeros, 64 at a time. On an H100 (bf16, 4k, full / causal, TFLOP/s) instead of 64: d192 447 / 399 → 508 / 461, and
    192 / 128 370 / 350 → 507 / 432.
    """
    columns = [round_up(value, 16) for value in (head_dim, head_dim_v)]
    if softcap or max(columns) > 192 or any(value % 64 for value in columns):
        return 64
    return 96 if min(columns) <= 128 else 80


class Schedule(NamedTuple):
    """How the backward orders its work; groups, sections and the rest as in backward_order.py."""

    section: int  # groups
    sections: int
    ahead: int  # groups
    lag: int  # groups
    slots: int  # groups


@functools.lru_cache(maxsize=4096)
def backward_schedule(
    groups: int, tiles: int, visits: int, is_masked: bool, deterministic: bool, num_sms: int
) -> Schedule:
    """Order of ``groups`` key/value heads with ``tiles`` tiles of keys each, of which the longest visits ``visits``
    blocks of queries.

    A CTA comes to a unit about a tile after it has taken it, and is done with it a tile later. So rows are prepared two
    waves of CTAs before the tiles, sums are converted a wave after them, and a slot is used again some time later. With
    a mask, the longest tile takes twice the mean, and a section is half a wave; the last one has up to twice as many
    groups, for balance at the end. In deterministic mode a tile may begin DELAY blocks after the one before it: so many
    groups go side by side, but no more, as the tiles of a group are all over its queries, which have to fit L2. For
    speed only, but for what backward_order.py asks of the numbers.
    """
    section = max(1, num_sms // (2 * tiles)) if is_masked else 1
    if deterministic:
        section = max(section, DELAY[is_masked] * num_sms // visits)
    sections = max(1, groups // section)
    width = groups - (sections - 1) * section  # of the last section
    waves = (23 if is_masked else 13) + 5 * deterministic  # tenths; then the longest tiles are a section's last
    ahead = width + -(-2 * num_sms // tiles)
    lag = max(width, -(-waves * num_sms // (10 * tiles)))
    slots = lag + width + -(-2 * num_sms // (5 * tiles))
    return Schedule(section, sections, min(groups, ahead), min(groups, lag), min(groups, slots))


@functools.lru_cache(maxsize=4096)
def backward_heads(
    config: BackwardConfig,
    batch: int,
    heads: int,
    heads_kv: int,
    tiles: int,
    blocks: int,
    visited: int,
    is_masked: bool,
    deterministic: bool,
    num_sms: int,
) -> int:
    """How many heads dK and dV are computed of, a multiple of heads_kv that divides heads, where a key/value head has
    ``tiles`` tiles of keys and a query head ``blocks`` blocks of queries, of which the longest tile visits ``visited``.
    The gradients of a key/value head are then added up.

    With a mask, as many as `_blocks_of_time` says take the least time. Without one, more than heads_kv only where that
    few tiles leave SMs idle: if the last wave is less than 3/4 of what it could be. And only for tiles of some 20 µs:
    that takes a launch more.
    In deterministic mode with a mask, eight tiles for each SM, as the longest one takes twice the mean and comes last;
    a head of its own also from HEAD_BLOCKS blocks on: the tiles of a group are all over its queries, and those of
    several heads do not fit L2.
    """
    group = heads // heads_kv
    if group * blocks < 12 or not tiles:
        return heads_kv
    if deterministic and is_masked and blocks >= HEAD_BLOCKS:
        return heads
    counts = [heads_kv * split for split in range(1, group + 1) if group % split == 0]
    if is_masked and not deterministic:
        time_of = functools.partial(_blocks_of_time, config, batch, heads, heads_kv, tiles, blocks, visited, num_sms)
        return min(counts, key=time_of)
    for count in counts:
        on_all = batch * count * tiles
        waves = -(-on_all // num_sms)
        if on_all >= 8 * num_sms if is_masked else 4 * on_all >= 3 * waves * num_sms:
            return count
    return heads


def _blocks_of_time(
    config: BackwardConfig,
    batch: int,
    heads: int,
    heads_kv: int,
    tiles: int,
    blocks: int,
    visited: int,
    num_sms: int,
    count: int,
) -> float:
    """What a backward with a mask takes whose dK and dV are computed of ``count`` heads, in the time of a block: a tile
    of keys with a block of queries. Any mask counts as a causal one of as many queries as keys, which leaves half, but
    for windows that leave less: `backward_heads` names the sizes.

    Blocks take the longer, the farther the ring of dQ's sums is beyond L2; the longest tile is over all queries of a
    group, ends late, and is the least there is to wait for; parts of dK and dV are written, read and added up. The
    figures are fitted to 51 causal calls with 4 to 8 query heads a key/value head on an H100 (bf16, d64 … d256, 269 …
    16k tokens): choices are 0.6 % slower on average than the best ones, 7 % at worst (docs/kernels/sm90_backward.md).
    """
    group = heads // count
    slots = backward_schedule(batch * count, tiles, group * blocks, True, False, num_sms).slots
    beyond = max(0.0, 4 * config.ring_values(slots, group, blocks) / RING_BYTES - 1.0)
    work, longest = batch * heads * tiles * min(visited, blocks / 2) / num_sms, group * visited
    parts = batch * count * tiles / num_sms if count > heads_kv else 0.0
    return (1.0 + RING_COST * beyond) * max(work + LAST_COST * longest, longest) + PART_COST * parts


@functools.cache
def backward_key(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    *,
    window: bool = False,
    softcap: bool = False,
    deterministic: bool = False,
    attn_mask: MaskKind = "none",
) -> KernelKey:
    """Key of the backward kernel for what decides its code; with an attn_mask that stands for is_causal and window."""
    if attn_mask != "none":
        is_causal = window = False
    config = backward_config(head_dim, head_dim_v, softcap, attn_mask)
    return _key("backward", dtype, is_causal, config, window=window, softcap=softcap, deterministic=deterministic)


def _key(
    direction: str, dtype: torch.dtype, is_causal: bool, config: ForwardConfig | BackwardConfig, **flags: Any
) -> KernelKey:
    sizes = dataclasses.asdict(config)
    sizes.pop("bias_bytes", None)  # which attn_mask says
    return KernelKey(direction, ARCH, DTYPE_NAMES[dtype], is_causal=is_causal, **sizes, **flags)


def all_keys() -> tuple[KernelKey, ...]:
    """The plain kernels of the most common head dims, forward and backward. Those of other head dims, and those with a
    window, softcap or sink, are compiled when they are needed."""
    common = [(t, d, is_causal) for t in DTYPE_NAMES for d in (64, 96, 128, 256) for is_causal in (False, True)]
    forward = (
        forward_key(dtype, head_dim, head_dim, is_causal, tile)
        for dtype, head_dim, is_causal in common
        for tile in forward_tiles(head_dim, head_dim, is_causal, has_options=False)
    )
    return (*forward, *(backward_key(dtype, head_dim, head_dim, is_causal) for dtype, head_dim, is_causal in common))


def unsupported(spec: AttentionSpec, target: Target) -> tuple[Reason, ...]:
    """Every reason why these kernels cannot run ``spec``. Never looks at a size, so that none becomes a guard."""
    reasons = []
    if spec.dtype not in DTYPE_NAMES:
        reasons.append(Reason("dtype", f"{spec.dtype} is neither bfloat16 nor float16"))
    for code, value in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
        if value % 8 or not 8 <= value <= MAX_HEAD_DIM:
            reasons.append(Reason(code, f"{code} {value} is not a multiple of 8 up to {MAX_HEAD_DIM}"))
    reasons.extend(wrong_mask(spec))
    if spec.mask != "none" and spec.needs_grad:
        reasons.extend(_no_masked_backward(spec))
    if spec.dropout_p > 0.0:
        reasons.append(Reason("dropout", f"there is no kernel with dropout (dropout_p={spec.dropout_p})"))
    if spec.scale is not None and not (math.isfinite(spec.scale) and spec.scale > 0.0):
        reasons.append(Reason("scale", f"scale {spec.scale} is not a positive finite number"))
    if not math.isfinite(spec.softcap):
        reasons.append(Reason("softcap", f"softcap {spec.softcap} is not finite"))
    if not spec.last_dim_contiguous:
        reasons.append(Reason("strides", "query, key and value must be contiguous in their last dimension"))
    smem = target.smem_per_block
    if smem and smem < SMEM_PER_BLOCK:
        reasons.append(Reason("shared_memory", f"{smem} bytes of shared memory per block, {SMEM_PER_BLOCK} needed"))
    return tuple(reasons)


def _no_masked_backward(spec: AttentionSpec) -> tuple[Reason, ...]:
    """Why there is no backward kernel for a call with this attn_mask."""
    if spec.deterministic:
        return (Reason("attn_mask", "the backward with an attn_mask has no deterministic mode"),)
    try:
        backward_config(int(spec.head_dim), int(spec.head_dim_v), spec.softcap > 0.0, spec.mask)
    except ValueError:
        text = f"the backward has no kernel for an attn_mask ({spec.mask}) with head_dim {spec.head_dim}"
        return (Reason("attn_mask", f"{text}, head_dim_v {spec.head_dim_v}"),)
    return ()
