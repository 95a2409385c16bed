"""Attention backward for Hopper.

For each query row i and each key j that it sees, with c = softmax_scale · log2(e) and s_ij = q_i · k_j:

    p_ij = 2^(s_ij·c - lse_i·log2(e)),   dp_ij = dO_i · v_j,   δ_i = dO_i · O_i,   ds_ij = p_ij · (dp_ij - δ_i)
    dV_j = Σ_i p_ij · dO_i,   dK_j = softmax_scale · Σ_i ds_ij · q_i,   dQ_i = softmax_scale · Σ_j ds_ij · k_j

Two launches: `reset` zeroes counters, `kernel` is the rest, launched while the one before it ends (griddepcontrol). Its
CTAs take units of three kinds, tiles, of which this page tells, blocks of rows to prepare (δ, lse) and sums of dQ to
convert (backward_units.py, with backward_rows.py, which also has the layout of scratch memory, and
backward_convert.py), in an order of which backward_order.py tells; that is also why the sums take little memory.

A tile is a block of tile_n keys of a key/value head: its K and V stay in shared memory, dK and dV in registers, while
the query blocks of tile_m rows that see it pass by, last one first (in deterministic mode the first one), of every
query head of the group in turn. So GQA needs no sums of dK and dV in memory, and the tiles of a causal head that run
at the same time read the same blocks at the same time. dQ is added to fp32 sums in global memory, from shared memory
by bulk reductions. (Straight from registers, 16 bytes a lane, an SM gets rid of 32 bytes a cycle, and the registers
are not free until then; that is what happens where shared memory has no room.)

Roles (persistent CTAs, one per SM):
    warpgroup 0      warp 0 takes the units and issues all TMA loads; warps 1 and 2 add half of dQ each to its sums and,
                     where there is no third MMA warpgroup, store dK and dV of 64 keys; warp 3 idles (in deterministic
                     mode each adds whole blocks: backward_turns.py)
    warpgroups 1, 2  four or five WGMMAs of 64 keys each, or two each of all keys; softmax; dK and dV; rows
    warpgroup 3      dQ, where it would take the others too many registers

Scores are computed transposed, keys × queries, and Pᵀ and dSᵀ are the A operands of dV and dK straight from registers.
Three splits of the work (config.has_dq_warpgroup, config.splits_keys):
    64 keys each          warpgroups 1 and 2 have five products of their 64 keys; only dS crosses shared memory, for dQ,
                          of which each has 64 rows, or half of the columns
    64 keys each, dQ      the same but for dQ, which warpgroup 3 multiplies
    shared keys, dQ       head dims whose dK and dV are too many registers: warpgroup 1 has S, P and dV of 64 keys,
                          warpgroup 2 dP, dS and dK of them, warpgroup 3 dQ (backward_roles.py); where the sums leave
                          room for it, of 80 or 96 keys, nothing transposed but the sums (backward_short.py)

Pipelines (full/empty mbarrier pairs; "producer → consumer"):
    k, v    1 stage    TMA, 1 arrival + bytes → the warps that read it; k is released after the tile's last block, v
                       after the last block's dP
    q       2 stages   TMA, 1 arrival + bytes (with lse and δ of the block) → 8 warps; released after dK of the block,
                       by warpgroup 1 of shared keys after P
    do      2 stages   TMA, 1 arrival + bytes → 8 warps; released with q, with shared keys after dV and after dP
    q, do   also take blocks of rows: O and dO, or the two halves of the sums of dQ, an even number of times each
    ds      2 stages   8 warps, or the 4 of warpgroup 2 → those that multiply dQ, which arrive at `empty` after it
    p       1 stage    4 warps → 4 warps (shared keys; two in turns in memory where WGMMA reads it, one full at a time)
    units   4 entries  warp 0, 1 arrival → all other warps that work

Named barriers:
    TURN + i       MMA warpgroup i may issue dV … S: i waits (128), the other arrives (128) (64 keys each)
    DQ_EMPTY + i   part i of dQ's shared memory has been read: its warp arrives (32), who fills it waits (128)
    DQ_FULL + i    it holds dQ, or dV or dK of a finished tile: who filled it arrives (128), its warp waits (32)
                   (in deterministic mode, for each stage of Q: backward_turns.py)
    CLEARED + i    with a mask, the 128 threads of warpgroup 1 + i around rows that they zero (backward_masked.py)

Timeline of one MMA warpgroup with 64 keys, block i of a tile (‖: at the same time):
    wait for S_i; nothing may be in flight here but S, or ptxas, which does not count groups across a loop's end,
    serialises all WGMMAs
    dP_i = V dO_iᵀ                                         ‖  P_i = 2^(…);  then dS_i = P_i ∘ (dP_i - δ_i)
    in this warpgroup's turn, as long as registers last:
    dV += P_i dO_i, dK += dS_i Q_i, dQ_{i-1} = dS_{i-1} K,  ‖  dS_i to shared memory; dQ_{i-1} to shared memory
    S_{i+1} = K Q_{i+1}ᵀ
dQ runs a block late, so that one warpgroup needs the other's dS half a block after it was made: they take turns, one's
exponentials under the other's WGMMAs. A tile's first dQ and last S are products of whatever shared memory holds, which
nothing reads: a branch around a WGMMA makes ptxas serialise them all. With a warpgroup for dQ it is not late, and with
shared keys there are no turns.

Masks: rows beyond seqlen_q have lse = +inf, so that p = 0. The blocks that need a mask, on the causal diagonal, at a
window's edges, or in a tile with keys beyond seqlen_k, have a loop of their own.

Static options of a key, whose values are arguments (Scoring):
    window        row i sees the keys i + left … i + right; query blocks outside are skipped on both sides
    softcap       s becomes cap · t, t = tanh(s · softmax_scale / cap), c = log2(e), and ds_ij gets a factor of 1 - t²
    deterministic tiles add to a block in falling order, one after the other (backward_turns.py; no argument)
    attn_mask     tiles visit the blocks that a list names (backward_masked.py)
A sink is part of lse and needs nothing here.

Constraints: 16-bit Q, K, V, O, dO; head_dim and head_dim_v multiples of 8 up to 256; contiguous last dimension, other
strides and base pointers multiples of 16 bytes (0 included); seqlen_q, seqlen_k ≥ 1; scale > 0. Tiles: sm90/config.py.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.utils import SmemAllocator

from ..common import fragments, softmax
from ..common.add_parts import THREADS as ADDING
from ..common.add_parts import add_parts, num_ctas
from ..common.atomics import bulk_add
from ..common.blocks import Window, query_blocks
from ..common.mask import mask_left, mask_right
from ..key import KernelKey
from .backward_order import (
    CONVERT,
    END,
    ENTRIES,
    FIELDS,
    MULTIPLY,
    PART_BLOCKS,
    PREPARE,
    WARPS,
    Order,
    Queue,
    Unit,
    get_unit,
    put_unit,
    take_unit,
)
from .backward_roles import HIDDEN, Place, Roles
from .backward_rows import THREADS, WARPGROUP, Scratch, await_count, count_up, reset, split_scratch
from .backward_short import ShortTiles
from .backward_turns import FILLING, TURN, Turns
from .backward_units import RowUnits
from .config import BackwardConfig, round_up
from .mask import DTYPES as MASK_DTYPES
from .tma import load_tile
from .wgmma import K_MAJOR, MN_MAJOR, issue, smem_layout, tiled_mma, transposed

DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


class Pipelines(NamedTuple):
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    ds_full: cute.Pointer  # mbarriers, one per stage
    ds_empty: cute.Pointer
    p_full: cute.Pointer | None  # mbarriers of one stage, where products are shared
    p_empty: cute.Pointer | None
    units: Queue
    bias: pipeline.PipelineTmaAsync | None  # of 1 or 2 stages, where a mask has biases


class Smem(NamedTuple):
    """Tiles in shared memory, all swizzled but the statistics."""

    k: cute.Tensor  # (tile_n, width, 1)
    v: cute.Tensor  # (tile_n, width_v, 1)
    q: cute.Tensor  # (tile_m, width, stages)
    do: cute.Tensor  # (tile_m, width_v, stages)
    ds: cute.Tensor  # (tile_m, tile_n, stages)
    p: cute.Tensor | None  # where products are shared: (8, WARPGROUP, values / 8 of a thread), or in short tiles as ds
    statistics: cute.Tensor  # (2 · tile_m, stages) fp32: lse in log2 units, then δ
    dq: cute.Tensor | None  # (4, WARPGROUP, values / 4 of a thread, 2, stages_dq) fp32, where there is room
    sums: tuple[cute.Tensor, cute.Tensor]  # (4, WARPGROUP, values / 4 of a thread, stages) fp32, half of the sums of dQ
    o: cute.Tensor  # (tile_m, width_v, stages); where there is no room for it, where dO is
    bits: cute.Tensor | None  # (4, tile_n, stages) Int32 of a mask
    bias: cute.Tensor | None  # (tile_m, tile_n, bias_stages) of a mask's dtype


class Layouts(NamedTuple):
    k: cute.ComposedLayout
    v: cute.ComposedLayout
    q: cute.ComposedLayout
    do: cute.ComposedLayout
    scores: cute.ComposedLayout
    dk: cute.ComposedLayout  # (64, columns, 1), in dQ's place
    dv: cute.ComposedLayout
    bias: cute.ComposedLayout | None


class Gmem(NamedTuple):
    """TMA coordinate tensors; dK and dV, where they are stored from registers, as pairs of values, (s_k, d / 2, …)."""

    k: cute.Tensor  # (s_k, d, h_kv, b)
    v: cute.Tensor  # (s_k, dv, h_kv, b)
    q: cute.Tensor  # (s_q, d, h, b)
    do: cute.Tensor  # (s_q, dv, h, b)
    o: cute.Tensor  # (s_q, dv, h, b)
    dk: cute.Tensor  # (s_k, d, h_kv, b)
    dv: cute.Tensor  # (s_k, dv, h_kv, b)
    dq: cute.Tensor  # (s_q, d, h, b) in memory
    lse: cute.Tensor  # (b, h, s_q) fp32 in memory
    mask: "TileMask | None"


class TileMask(NamedTuple):
    """What an attn_mask leaves of each tile (mask_transposed.py); where it is broadcast, strides are 0."""

    lists: cute.Tensor  # (b, h_kv, key blocks, TRANSPOSED_HEADER + query blocks) Int32
    bits: cute.Tensor  # (b, h, 1 or 2, query blocks, rows of all key blocks, 4) Int32
    bias: cute.Tensor | None  # (s_q, s_k, h, b) TMA coordinates
    bias_atom: cute.CopyAtom | None
    by_head: Boolean | None  # groups are ordered heads by heads instead of sequence by sequence


class Atoms(NamedTuple):
    """TMA copies of one tile each, of dK and dV the 64 keys of a warpgroup."""

    k: cute.CopyAtom
    v: cute.CopyAtom
    q: cute.CopyAtom
    do: cute.CopyAtom
    o: cute.CopyAtom
    dk: cute.CopyAtom | None
    dv: cute.CopyAtom | None


class Mmas(NamedTuple):
    sdp: cute.TiledMma  # (tile_n, tile_m): S and dP, transposed; this and the next two, in short tiles, (N, M)
    dk: cute.TiledMma  # (tile_n, columns of dK)
    dv: cute.TiledMma  # (tile_n, columns of dV)
    dq: cute.TiledMma  # (tile_m, columns of dQ)


class Scoring(NamedTuple):
    """From Q Kᵀ to P and dS: what is None is not in this kernel."""

    softmax_scale: Float32
    scale_log2: Float32  # c
    window: Window | None
    cap_factor: Float32 | None  # 2 · log2(e) · softmax_scale / cap
    bias_factor: Float32 | None = None  # from a bias to units of Q Kᵀ
    bias_limit: Float32 | None = None  # beyond which biased scores are cut off


class Operands(NamedTuple):
    """What one MMA warpgroup multiplies with and into; descriptors, but for registers where it says so."""

    tSrK: cute.Tensor
    tSrQ: cute.Tensor
    tPrV: cute.Tensor
    tPrdO: cute.Tensor
    tVrP: cute.Tensor  # registers
    tVrdO: cute.Tensor
    tKrdS: cute.Tensor  # registers
    tKrQ: cute.Tensor
    tQrdS: cute.Tensor | None  # None where a warpgroup of its own multiplies dQ; so is the next one
    tQrK: cute.Tensor | None
    rP: cute.Tensor  # registers of P in 16 bit, laid out as acc_S
    rdS: cute.Tensor  # registers of dS in 16 bit, likewise
    acc_S: cute.Tensor  # registers, fp32; so are the next two
    acc_dK: cute.Tensor
    acc_dV: cute.Tensor


class Context(NamedTuple):
    """What stays the same over all blocks of all tiles."""

    mmas: Mmas
    regs: Operands
    smem: Smem
    pipelines: Pipelines
    scoring: Scoring
    place: Place


class Backward(Roles, ShortTiles, RowUnits, Turns):
    """Kernels of one key. Calling it (from ``cute.compile``) takes (b, h, s, d) tensors; see ``__call__``."""

    def __init__(self, key: KernelKey):
        config = BackwardConfig(key.head_dim, key.head_dim_v, key.tile_m, key.tile_n, key.stages, key.attn_mask)
        self.dtype = DTYPES[key.dtype]
        self.tile_m, self.tile_n, self.stages = config.tile_m, config.tile_n, config.stages
        self.head_dim, self.head_dim_v = config.head_dim_mma, config.head_dim_v_mma
        self.width, self.width_v = config.head_dim_smem, config.head_dim_v_smem
        self.splits_keys, self.dq_by_rows = config.splits_keys, config.dq_by_rows
        self.has_dq_warpgroup, self.warpgroups = config.has_dq_warpgroup, config.mma_warpgroups
        self.dq_columns, self.dq_chunk = config.dq_columns, config.dq_chunk
        self.stages_dq = config.stages_dq(key.deterministic)
        self.stores_by_tma = config.stores_by_tma
        # Half of the sums of dQ of a block fits where its dO does, and its O where Q does; else each has two stages.
        self.splits_sums, self.splits_rows = self.dq_columns > self.width_v, self.width_v > self.width
        self.transposes_sums, self.p_stages = config.transposes_sums, config.p_stages
        self.dk_columns, self.dv_columns = config.dk_columns, config.dv_columns
        self.dq_values = self.tile_m * self.dq_columns // THREADS  # of a thread's two
        self.is_causal, self.has_window, self.has_softcap = key.is_causal, key.window, key.softcap
        self.deterministic, self.adders, self.turn_warps = key.deterministic, config.adders, config.turn_warps
        self.has_mask, self.has_bias = bool(key.attn_mask), key.attn_mask not in ("", "bool")
        self.bias_dtype, self.bias_stages = (
            MASK_DTYPES.get(key.attn_mask) if self.has_bias else None,
            config.bias_stages,
        )
        self.interleaved = key.is_causal or key.window or key.deterministic or self.has_mask
        self.k_slices, self.v_slices = config.k_slices, config.v_slices
        *self.mma_registers, self.producer_registers, self.dq_registers = config.registers

    def _layouts(self) -> Layouts:
        splits_dq = not self.has_dq_warpgroup and not self.dq_by_rows  # each warpgroup has half of its columns
        return Layouts(
            k=smem_layout(self.dtype, self.tile_n, self.width, 1, self.width // 2 if splits_dq else None),
            v=smem_layout(self.dtype, self.tile_n, self.width_v, 1),
            q=smem_layout(self.dtype, self.tile_m, self.width, self.stages),
            do=smem_layout(self.dtype, self.tile_m, self.width_v, self.stages),
            scores=smem_layout(self.dtype, self.tile_m, self.tile_n, self.stages),
            dk=smem_layout(self.dtype, 64, self.head_dim, 1),
            dv=smem_layout(self.dtype, 64, self.head_dim_v, 1),
            bias=smem_layout(self.bias_dtype, self.tile_m, self.tile_n, self.bias_stages) if self.has_bias else None,
        )

    def _mmas(self, dk_columns: int, dv_columns: int, dq_columns: int) -> Mmas:
        """Multiplications into so many columns of dK and dV, and of dQ at a time. More than 192 are multiplied in
        halves, as ptxas takes no instruction with more registers than a thread has at its start."""
        by_rows, by_columns, alone = (2, 1), (1, 2), (1, 1)
        split = alone if self.has_dq_warpgroup else by_rows if self.dq_by_rows else by_columns
        dq = tiled_mma(self.dtype, (K_MAJOR, MN_MAJOR), split, dq_columns // split[1])
        if self.transposes_sums:
            sdp, sums = self._short_mmas()
            return Mmas(sdp, sums, sums, dq)
        rows = by_rows if self.splits_keys else alone
        sdp = tiled_mma(self.dtype, (K_MAJOR, K_MAJOR), rows, self.tile_m)
        dk, dv = (
            tiled_mma(self.dtype, (K_MAJOR, MN_MAJOR), rows, columns if columns <= 192 else 128, a_in_registers=True)
            for columns in (dk_columns, dv_columns)
        )
        return Mmas(sdp, dk, dv, dq)

    def _shared_storage(self, layouts: Layouts) -> type:
        def buffer(layout: cute.ComposedLayout | None) -> type:
            elements = 0 if layout is None else cute.cosize(layout)
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        @cute.struct
        class SharedStorage:
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2]
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            do_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            ds_full: cute.struct.MemRange[cutlass.Int64, self.stages]
            ds_empty: cute.struct.MemRange[cutlass.Int64, self.stages]
            p_full: cute.struct.MemRange[cutlass.Int64, 0 if self.splits_keys else 1]
            p_empty: cute.struct.MemRange[cutlass.Int64, 0 if self.splits_keys else 1]
            units_full: cute.struct.MemRange[cutlass.Int64, ENTRIES]
            units_empty: cute.struct.MemRange[cutlass.Int64, ENTRIES]
            units: cute.struct.MemRange[Int32, FIELDS * ENTRIES]
            turns: cute.struct.MemRange[Int32, WARPS]
            statistics: cute.struct.Align[cute.struct.MemRange[Float32, 2 * self.tile_m * self.stages], 16]
            sK: buffer(layouts.k)  # type: ignore[valid-type]
            sV: buffer(layouts.v)  # type: ignore[valid-type]
            sQ: buffer(layouts.q)  # type: ignore[valid-type]
            sdO: buffer(layouts.do)  # type: ignore[valid-type]
            sdS: buffer(layouts.scores)  # type: ignore[valid-type]
            sP: cute.struct.Align[cute.struct.MemRange[self.dtype, self.p_stages * self.tile_m * self.tile_n], 1024]
            sdQ: cute.struct.Align[cute.struct.MemRange[Float32, THREADS * self.dq_values * self.stages_dq], 1024]
            sBias: cute.struct.Align[
                cute.struct.MemRange[self.bias_dtype or self.dtype, self.tile_m * self.tile_n * self.bias_stages], 1024
            ]
            bits: cute.struct.MemRange[Int32, 4 * self.tile_n * self.stages * self.has_mask]
            bias_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.bias_stages]

        return SharedStorage

    @cute.jit
    def __call__(
        self,
        mdO: cute.Tensor,  # (b, h, s_q, dv)
        mQ: cute.Tensor,  # (b, h, s_q, d)
        mK: cute.Tensor,  # (b, h_kv, s_k, d)
        mV: cute.Tensor,  # (b, h_kv, s_k, dv)
        mO: cute.Tensor,  # (b, h, s_q, dv)
        mLSE: cute.Tensor,  # (b, h, s_q) fp32
        mdQ: cute.Tensor,  # (b, h, s_q, d)
        mdK: cute.Tensor,  # (b, h_kv, s_k, d)
        mdV: cute.Tensor,  # (b, h_kv, s_k, dv)
        mPartK: cute.Tensor,  # (b, h_dk, s_k, d), h_dk a multiple of h_kv; mdK itself where they are the same
        mPartV: cute.Tensor,  # (b, h_dk, s_k, dv)
        mScratch: cute.Tensor,  # fp32, see split_scratch
        softmax_scale: Float32,
        softmax_scale_log2: Float32,  # c of Scoring
        num_sms: Int32,
        section: Int32,  # this and the next four: see Order
        sections: Int32,
        ahead: Int32,
        lag: Int32,
        slots: Int32,
        window_left: Int32 | None,  # row i sees the keys from i + window_left on: see Window
        window_right: Int32 | None,
        cap_factor: Float32 | None,  # see Scoring
        stream,
    ):
        window = Window(window_left, window_right) if cutlass.const_expr(self.has_window) else None
        scoring = Scoring(softmax_scale, softmax_scale_log2, window, cap_factor)
        schedule = section, sections, ahead, lag, slots
        tensors = mdO, mQ, mK, mV, mO, mLSE, mdQ, mdK, mdV, mPartK, mPartV, mScratch
        self.launch(*tensors, scoring, num_sms, schedule, None, stream)

    @cute.jit
    def launch(
        self,
        mdO: cute.Tensor,  # as of __call__
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mdQ: cute.Tensor,
        mdK: cute.Tensor,
        mdV: cute.Tensor,
        mPartK: cute.Tensor,
        mPartV: cute.Tensor,
        mScratch: cute.Tensor,
        scoring: Scoring,
        num_sms: Int32,
        schedule: tuple[Int32, Int32, Int32, Int32, Int32],  # the last five of Order
        mask: TileMask | None,
        stream,
    ) -> None:
        def s_d_h_b(tensor: cute.Tensor) -> cute.Tensor:
            return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[2, 3, 1, 0]))

        layouts = self._layouts()
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        copies = [
            cpasync.make_tiled_tma_atom(op, s_d_h_b(tensor), cute.select(layout, mode=[0, 1]), (rows, width))
            if op is load or self.stores_by_tma
            else (None, cute.recast_tensor(s_d_h_b(tensor), Int32))
            for op, tensor, layout, rows, width in (
                (load, mK, layouts.k, self.tile_n, self.width),
                (load, mV, layouts.v, self.tile_n, self.width_v),
                (load, mQ, layouts.q, self.tile_m, self.width),
                (load, mdO, layouts.do, self.tile_m, self.width_v),
                (load, mO, layouts.do, self.tile_m, self.width_v),
                (store, mPartK, layouts.dk, 64, self.head_dim),
                (store, mPartV, layouts.dv, 64, self.head_dim_v),
            )
        ]
        mmas = self._mmas(self.dk_columns, self.dv_columns, self.dq_chunk)
        batch, heads, seqlen_q, _ = mQ.shape
        blocks = cute.ceil_div(seqlen_q, self.tile_m)
        heads_dk = mPartK.shape[1]  # a multiple of K's: then each head of K has as many groups of query heads
        group = heads // heads_dk
        groups, tiles = heads_dk * batch, cute.ceil_div(mK.shape[2], self.tile_n)
        slots = schedule[4]
        scratch = split_scratch(
            mScratch,
            Int64(blocks * heads * batch),
            Int64(slots * group * blocks),
            groups,
            slots,
            self.tile_m,
            self.dq_values,
            (self.turn_warps, tiles, groups) if self.deterministic else None,
        )
        reset(scratch.counters).launch(
            grid=[cute.ceil_div(cute.size(scratch.counters), THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
        )
        parts = cute.ceil_div(blocks * group, PART_BLOCKS)
        self.kernel(
            Atoms(*(atom for atom, _ in copies)),
            Gmem(*(tensor for _, tensor in copies), s_d_h_b(mdQ), mLSE, mask),
            scratch,
            scoring,
            mmas,
            layouts,
            Order(heads_dk, groups, tiles, parts, *schedule),
            group,
        ).launch(
            grid=[cutlass.min(groups * cutlass.max(tiles, parts), num_sms), 1, 1],
            block=[WARPGROUP * (1 + self.warpgroups), 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        if heads_dk != mdK.shape[1]:
            add_parts(mPartK, mPartV, mdK, mdV).launch(
                grid=[cutlass.max(num_ctas(mdK), num_ctas(mdV)), 2, 1],
                block=[ADDING, 1, 1],
                stream=stream,
                use_pdl=True,
            )

    @cute.kernel
    def kernel(
        self,
        atoms: Atoms,
        gmem: Gmem,
        scratch: Scratch,
        scoring: Scoring,
        mmas: Mmas,
        layouts: Layouts,
        order: Order,
        qhead_per_kvhead: Int32,
    ):
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom in atoms[: 7 if self.stores_by_tma else 5]:
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(self._shared_storage(layouts))
        statistics = cute.make_layout((2 * self.tile_m, self.stages))
        staged_dq = cute.make_layout((4, WARPGROUP, self.dq_values // 4, 2, max(self.stages_dq, 1)))
        sums = cute.make_layout((4, WARPGROUP, self.dq_values // 4))
        smem = Smem(
            *(
                buffer.get_tensor(layout.outer, swizzle=layout.inner)
                for buffer, layout in (
                    (storage.sK, layouts.k),
                    (storage.sV, layouts.v),
                    (storage.sQ, layouts.q),
                    (storage.sdO, layouts.do),
                    (storage.sdS, layouts.scores),
                )
            ),
            self._shared_p(storage.sP, layouts.scores),
            storage.statistics.get_tensor(statistics),
            storage.sdQ.get_tensor(staged_dq) if self.stages_dq else None,
            tuple(
                self._in_stages(buffer.data_ptr(), width, sums, None)
                for buffer, width in ((storage.sQ, self.width), (storage.sdO, self.width_v))
            ),
            self._in_stages(
                (storage.sdO if self.splits_rows else storage.sQ).data_ptr(),
                self.width_v if self.splits_rows else self.width,
                cute.select(layouts.do.outer, mode=[0, 1]),
                layouts.do.inner,
            ),
            storage.bits.get_tensor(cute.make_layout((4, self.tile_n, self.stages))) if self.has_mask else None,
            storage.sBias.get_tensor(layouts.bias.outer, swizzle=layouts.bias.inner) if self.has_bias else None,
        )
        width = self.dtype.width // 8
        # Warps that read K, V and both of Q and dO, that write dS and that read it.
        main, dq = THREADS // 32, WARPGROUP // 32 if self.has_dq_warpgroup else 0
        on_k, on_v, writing, reading = (
            (main + dq, main, main, dq or main) if self.splits_keys else (main, main // 2, main // 2, dq)
        )
        others = 2 if self.stages_dq else int(self.deterministic)  # warps that add dQ, or hand turns on
        pipelines = Pipelines(
            self._pipeline(storage.k_barriers, 1, self.tile_n * self.width * width, on_k),
            self._pipeline(storage.v_barriers, 1, self.tile_n * self.width_v * width, on_v),
            self._pipeline(storage.q_barriers, self.stages, self.tile_m * (self.width * width + 8), main),
            self._pipeline(storage.do_barriers, self.stages, self.tile_m * self.width_v * width, main),
            storage.ds_full.data_ptr(),
            storage.ds_empty.data_ptr(),
            None if self.splits_keys else storage.p_full.data_ptr(),
            None if self.splits_keys else storage.p_empty.data_ptr(),
            Queue(
                storage.units.get_tensor(cute.make_layout((FIELDS, ENTRIES))),
                storage.units_full.data_ptr(),
                storage.units_empty.data_ptr(),
                storage.turns.get_tensor(cute.make_layout(WARPS)),
            ),
            self._bias_pipeline(storage.bias_barriers) if self.has_bias else None,
        )
        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(pipelines.ds_full + i, writing)
                    cute.arch.mbarrier_init(pipelines.ds_empty + i, reading)
                if cutlass.const_expr(not self.splits_keys):
                    cute.arch.mbarrier_init(pipelines.p_full, writing)
                    cute.arch.mbarrier_init(pipelines.p_empty, writing)
                for i in cutlass.range_constexpr(ENTRIES):
                    cute.arch.mbarrier_init(pipelines.units.full + i, 1)
                    cute.arch.mbarrier_init(pipelines.units.empty + i, main + dq + others)
                for i in cutlass.range_constexpr(WARPS):
                    pipelines.units.turns[i] = Int32(0)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()  # for what `reset` wrote

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp_idx == 0:
                self.load(atoms, gmem, scratch, smem, pipelines, order, scoring.window, qhead_per_kvhead)
            if cutlass.const_expr(self.stages_dq):
                if warp_idx == 1 or warp_idx == 2:
                    (self.add_in_turns if self.deterministic else self.add_dq)(
                        atoms,
                        gmem,
                        scratch,
                        smem.dq,
                        pipelines.units,
                        layouts,
                        order,
                        scoring.window,
                        qhead_per_kvhead,
                        warp_idx - 1,
                    )
            elif cutlass.const_expr(self.deterministic):
                if warp_idx == 1:
                    self.hand_on_turns(gmem, scratch, pipelines.units, scoring.window, qhead_per_kvhead)
        elif cutlass.const_expr(self.has_dq_warpgroup):
            if warp_idx < 12:
                if cutlass.const_expr(not self.transposes_sums):
                    cute.arch.setmaxregister_increase(self.mma_registers[0])
                if cutlass.const_expr(self.splits_keys):
                    self.mma(gmem, scratch, smem, pipelines, order, mmas, layouts, scoring, qhead_per_kvhead)
                elif warp_idx < 8:
                    if cutlass.const_expr(self.transposes_sums):
                        cute.arch.setmaxregister_increase(self.mma_registers[0])
                    self.score(gmem, scratch, smem, pipelines, order, mmas, scoring, qhead_per_kvhead)
                else:
                    if cutlass.const_expr(self.transposes_sums):
                        cute.arch.setmaxregister_increase(self.mma_registers[1])
                    self.differentiate(gmem, scratch, smem, pipelines, order, mmas, scoring, qhead_per_kvhead)
            else:
                cute.arch.setmaxregister_decrease(self.dq_registers)
                self.multiply_dq(gmem, scratch, smem, pipelines, order, mmas, scoring.window, qhead_per_kvhead)
        else:
            cute.arch.setmaxregister_increase(self.mma_registers[0])
            self.mma(gmem, scratch, smem, pipelines, order, mmas, layouts, scoring, qhead_per_kvhead)

    def _in_stages(
        self, start: cute.Pointer, width: int, layout: cute.Layout, swizzle: cute.Swizzle | None
    ) -> cute.Tensor:
        """Something else in the stages of Q or dO, as many columns wide: 16-bit values, swizzled, or else fp32."""
        stride = self.tile_m * width
        if swizzle is None:
            start, stride = cute.recast_ptr(start, dtype=Float32), stride // 2
        else:
            start = cute.recast_ptr(start, swizzle, dtype=self.dtype)
        return cute.make_tensor(start, cute.append(layout, cute.make_layout(self.stages, stride=stride)))

    def _pipeline(self, barriers, stages: int, num_bytes: int, warps: int) -> pipeline.PipelineTmaAsync:
        """Pipeline from the producer to so many warps, of so many bytes a stage, filled-up zeros included."""
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers.data_ptr(),
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, warps),
            tx_count=num_bytes,
            defer_sync=True,
        )

    def _bias_pipeline(self, barriers) -> pipeline.PipelineTmaAsync:
        """Of biases, to the warps that have S."""
        warps = THREADS // 32 if self.splits_keys else WARPGROUP // 32
        num_bytes = self.tile_m * self.tile_n * self.bias_dtype.width // 8
        return self._pipeline(barriers, self.bias_stages, num_bytes, warps)

    def _shared_p(self, buffer, scores: cute.ComposedLayout) -> cute.Tensor | None:
        """P as one warpgroup gives it to another: laid out as dS for WGMMA, or thread by thread."""
        if self.splits_keys:
            return None
        if self.transposes_sums:
            return buffer.get_tensor(scores.outer, swizzle=scores.inner)
        return buffer.get_tensor(cute.make_layout((8, WARPGROUP, self.tile_m * self.tile_n // (8 * WARPGROUP))))

    @cute.jit
    def _row(self, wg: Int32) -> Int32:
        """Key of the tile of this thread's first row of S, of dK and of dV; its second is 8 keys further on. In short
        tiles query of the block, of S alone."""
        tidx = fragments.read_thread_idx() % WARPGROUP
        row = tidx // 32 * 16 + tidx % 32 // 4
        if cutlass.const_expr(self.splits_keys):
            row += wg * 64
        return row

    def _join_group(self, unit: Unit, gmem: Gmem) -> Int32:
        """Head of dK and dV and sequence of a unit in one register, until dK or dV is stored."""
        return unit.batch * gmem.dk.shape[2] + unit.head

    def _split_group(self, group: Int32, gmem: Gmem) -> tuple[Int32, Int32]:
        """Head of dK and dV and sequence."""
        heads = gmem.dk.shape[2]
        return group % heads, group // heads

    @cute.jit
    def _query_blocks(self, unit: Unit, gmem: Gmem, window: Window | None):
        """See query_blocks."""
        seqlens = gmem.q.shape[0], gmem.k.shape[0]
        return query_blocks(unit.index, *seqlens, self.tile_m, self.tile_n, self.is_causal, window)

    @cute.jit
    def load(
        self,
        atoms: Atoms,
        gmem: Gmem,
        scratch: Scratch,
        smem: Smem,
        pipelines: Pipelines,
        order: Order,
        window: Window | None,
        qhead_per_kvhead: Int32,
    ) -> None:
        """Producer warp: takes the units of this CTA, and loads for each tile K, V, then Q and dO of all blocks of all
        query heads of the group."""
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        heads = gmem.q.shape[2]
        blocks = cute.ceil_div(gmem.q.shape[0], self.tile_m)
        turn, tile = Int32(0), Int32(0)
        unit = take_unit(scratch.next_unit.iterator, order, self.interleaved, self.deterministic)
        put_unit(pipelines.units, turn, unit, tile)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                start, *_, end = self._query_blocks(unit, gmem, window)
                head_kv = unit.head // (gmem.dk.shape[2] // gmem.k.shape[2])
                gK, gV = gmem.k[None, None, head_kv, unit.batch], gmem.v[None, None, head_kv, unit.batch]
                self._await_rows(unit, order, gmem, scratch)
                load_tile(atoms.k, gK, smem.k, unit.index, pipelines.k, kv_state)
                total = (end - start) * qhead_per_kvhead
                for i in cutlass.range(total, unroll=1):
                    m_block = self._visited(total - 1 - i, start, end, qhead_per_kvhead)
                    head = unit.head * qhead_per_kvhead + i % qhead_per_kvhead
                    gQ, gdO = gmem.q[None, None, head, unit.batch], gmem.do[None, None, head, unit.batch]
                    load_tile(atoms.q, gQ, smem.q, m_block, pipelines.q, q_state)
                    with cute.arch.elect_one():
                        cute.copy(
                            cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32),
                            scratch.statistics[None, Int64((unit.batch * heads + head) * blocks + m_block)],
                            smem.statistics[None, q_state.index],
                            mbar_ptr=pipelines.q.producer_get_barrier(q_state),
                        )
                    if i == 0:
                        load_tile(atoms.v, gV, smem.v, unit.index, pipelines.v, kv_state)
                    load_tile(atoms.do, gdO, smem.do, m_block, pipelines.do, q_state)
                    q_state.advance()
                if total == 0:
                    load_tile(atoms.v, gV, smem.v, unit.index, pipelines.v, kv_state)
                kv_state.advance()
                tile += 1
            elif unit.kind == CONVERT:
                await_count(scratch.added.iterator + unit.slot, (unit.generation + 1) * order.tiles * self.adders)
                self._load_sums(unit, gmem, scratch, smem, pipelines, q_state.clone(), qhead_per_kvhead)
            elif unit.kind == PREPARE:
                self._load_rows(atoms, unit, gmem, smem, pipelines, q_state.clone(), qhead_per_kvhead)
            turn += 1
            unit = take_unit(scratch.next_unit.iterator, order, self.interleaved, self.deterministic)
            put_unit(pipelines.units, turn, unit, tile)

    @cute.jit
    def _visited(self, left: Int32, start: Int32, end: Int32, qhead_per_kvhead: Int32) -> Int32:
        """The query block that a tile visits before the last ``left`` ones, heads counted singly."""
        if cutlass.const_expr(self.deterministic):
            return end - 1 - left // qhead_per_kvhead
        return start + left // qhead_per_kvhead

    def _in_list(self, index: Int32, unit: Unit, gmem: Gmem) -> Int32:
        """The query block that a tile's list has there, where there are lists."""
        return index

    @cute.jit
    def _masked(self, blocks: tuple[Int32, Int32, Int32, Int32], qhead_per_kvhead: Int32) -> tuple[Int32, Int32]:
        """How many visits are left of a tile after those at its beginning that need a mask, and how many need one at
        its end. ``blocks``: see query_blocks."""
        start, unmasked_start, unmasked_end, end = blocks
        if cutlass.const_expr(not self.has_window):
            unmasked_end = end
        if cutlass.const_expr(self.deterministic):
            return (end - unmasked_start) * qhead_per_kvhead, (end - unmasked_end) * qhead_per_kvhead
        return (unmasked_end - start) * qhead_per_kvhead, (unmasked_start - start) * qhead_per_kvhead

    @cute.jit
    def _await_rows(self, unit: Unit, order: Order, gmem: Gmem, scratch: Scratch) -> None:
        """Wait until the rows of a tile's group are prepared, and its first slot is zero."""
        group = self._join_group(unit, gmem)
        await_count(scratch.prepared.iterator + group, order.parts * (THREADS // 32))

    @cute.jit
    def add_dq(
        self,
        atoms: Atoms,
        gmem: Gmem,
        scratch: Scratch,
        sdQ: cute.Tensor,
        units: Queue,
        layouts: Layouts,
        order: Order,
        window: Window | None,
        qhead_per_kvhead: Int32,
        wg: Int32,
    ) -> None:
        """Warp that adds one MMA warpgroup's dQ of every block to its sums, once it is in shared memory, and stores its
        dV and dK of every tile from there."""
        source, stage = sdQ[None, 0, 0, wg, 0].iterator, Int32(0)
        unit, _ = get_unit(units)
        cute.arch.barrier_arrive(barrier_id=self._empty(wg, stage), number_of_threads=FILLING)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                start, *_, end = self._query_blocks(unit, gmem, window)
                self._await_slot(unit, order, gmem, scratch)
                total = (end - start) * qhead_per_kvhead
                for i in cutlass.range(total, unroll=1):
                    block = self._block_in_ring(i, unit, start, end, qhead_per_kvhead, gmem)
                    cute.arch.barrier(barrier_id=self._full(wg, stage), number_of_threads=FILLING)
                    with cute.arch.elect_one():
                        sums = scratch.sums[None, 0, 0, wg, block].iterator
                        bulk_add(sums, source, 4 * WARPGROUP * self.dq_values)
                    self._release_dq(wg, stage)
                if cutlass.const_expr(self.stores_by_tma):
                    row_block = unit.index * 2 + wg
                    for atom, mX, layout in (
                        (atoms.dv, gmem.dv[None, None, unit.head, unit.batch], layouts.dv),
                        (atoms.dk, gmem.dk[None, None, unit.head, unit.batch], layouts.dk),
                    ):
                        sX = self._in_dq(sdQ, layout, wg, stage)
                        gX = cute.local_tile(mX, (64, cute.size(sX, mode=[1])), (row_block, 0))
                        tXsX, tXgX = cpasync.tma_partition(
                            atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
                        )
                        cute.arch.barrier(barrier_id=self._full(wg, stage), number_of_threads=FILLING)
                        cute.copy(atom, tXsX, tXgX)
                        self._release_dq(wg, stage)
                cute.arch.cp_async_bulk_wait_group(0)
                count_up(scratch.added.iterator + unit.slot)
            unit, _ = get_unit(units)

    @cute.jit
    def _conversions(self, unit: Unit, order: Order) -> Int32:
        """How often warps must have finished a part of a conversion before the slot is this unit's group's."""
        return unit.generation * order.parts * (THREADS // 32)

    @cute.jit
    def _await_slot(self, unit: Unit, order: Order, gmem: Gmem, scratch: Scratch) -> None:
        """Wait until a tile's group has its slot of the ring, and it is zero."""
        self._await_rows(unit, order, gmem, scratch)
        await_count(scratch.converted.iterator + unit.slot, self._conversions(unit, order))

    @cute.jit
    def _block_in_ring(
        self,
        index: Int32,  # of a block of the tile, in the order in which they are visited
        unit: Unit,
        start: Int32,  # of the tile's query blocks
        end: Int32,
        qhead_per_kvhead: Int32,
        gmem: Gmem,
    ) -> Int64:
        """Where dQ of that block goes in the ring."""
        blocks = cute.ceil_div(gmem.q.shape[0], self.tile_m)
        m_block = self._visited((end - start) * qhead_per_kvhead - 1 - index, start, end, qhead_per_kvhead)
        m_block = self._in_list(m_block, unit, gmem)
        return Int64((unit.slot * qhead_per_kvhead + index % qhead_per_kvhead) * blocks + m_block)

    def _in_dq(self, sdQ: cute.Tensor, layout: cute.ComposedLayout, wg: Int32 | int, stage: Int32) -> cute.Tensor:
        """(64, columns) tile of 16-bit values in a warpgroup's part of dQ's shared memory for this stage of Q."""
        part = wg + 2 * self._dq_stage(stage)
        start = (sdQ.iterator + part * (WARPGROUP * self.dq_values)).align(1024)
        pointer = cute.recast_ptr(start, layout.inner, dtype=self.dtype)
        return cute.make_tensor(pointer, layout.outer)[None, None, 0]

    def _operands(self, mmas: Mmas, smem: Smem, wg: Int32) -> Operands:
        wide = self._partitions()
        sdp, dk, dv, dq = (mma.get_slice(wg * WARPGROUP) for mma in wide)
        acc_S, rP, rdS = (self._accumulator(mmas.sdp, self.tile_m, t) for t in (Float32, self.dtype, self.dtype))
        return Operands(
            tSrK=sdp.make_fragment_A(sdp.partition_A(smem.k)),
            tSrQ=sdp.make_fragment_B(sdp.partition_B(smem.q)),
            tPrV=sdp.make_fragment_A(sdp.partition_A(smem.v)),
            tPrdO=sdp.make_fragment_B(sdp.partition_B(smem.do)),
            tVrP=fragments.as_operand_a(rP),
            tVrdO=dv.make_fragment_B(dv.partition_B(transposed(smem.do))),
            tKrdS=fragments.as_operand_a(rdS),
            tKrQ=dk.make_fragment_B(dk.partition_B(transposed(smem.q))),
            tQrdS=None if self.has_dq_warpgroup else dq.make_fragment_A(dq.partition_A(smem.ds)),
            tQrK=None if self.has_dq_warpgroup else dq.make_fragment_B(dq.partition_B(transposed(smem.k))),
            rP=rP,
            rdS=rdS,
            acc_S=acc_S,
            acc_dK=self._accumulator(mmas.dk, self.dk_columns),
            acc_dV=self._accumulator(mmas.dv, self.dv_columns),
        )

    def _partitions(self) -> Mmas:
        """To partition shared memory with, as if all columns that it holds were multiplied; WGMMAs may be narrower."""
        return self._mmas(self.width, self.width_v, round_up(self.dq_chunk, 64))

    def _accumulator(self, mma: cute.TiledMma, columns: int, dtype: type[cutlass.Numeric] = Float32) -> cute.Tensor:
        """Registers of a product of tile_n keys with so many columns."""
        return cute.make_rmem_tensor(mma.partition_shape_C((self.tile_n, columns)), dtype)

    @cute.jit
    def mma(
        self,
        gmem: Gmem,
        scratch: Scratch,
        smem: Smem,
        pipelines: Pipelines,
        order: Order,
        mmas: Mmas,
        layouts: Layouts,
        scoring: Scoring,
        qhead_per_kvhead: Int32,
    ) -> None:
        """MMA warpgroup: its part of all units of this CTA."""
        tidx, _, _ = cute.arch.thread_idx()
        tidx = tidx - WARPGROUP
        wg = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        place = Place(tidx, wg)
        regs = self._operands(mmas, smem, wg)
        context = Context(mmas, regs, smem, pipelines, scoring, place)
        if wg == 0:
            cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=THREADS)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        unit, tile = get_unit(pipelines.units)
        while unit.kind != END:
            if cutlass.const_expr(self.has_dq_warpgroup):
                self._do_rows(context, gmem, scratch, unit, q_state, qhead_per_kvhead)
            if unit.kind == MULTIPLY:
                q_state = self._tile(context, gmem, layouts, unit, tile, q_state, qhead_per_kvhead)
            if cutlass.const_expr(not self.has_dq_warpgroup):
                self._do_rows(context, gmem, scratch, unit, q_state, qhead_per_kvhead)
            unit, tile = get_unit(pipelines.units)

    @cute.jit
    def _tile(
        self,
        context: Context,
        gmem: Gmem,
        layouts: Layouts,
        unit: Unit,
        tile: Int32,  # number of the tile among this CTA's
        q_state: pipeline.PipelineState,
        qhead_per_kvhead: Int32,
    ) -> pipeline.PipelineState:
        """This warpgroup's part of a tile; the state of Q and dO after it."""
        mmas, regs, smem, pipelines, scoring, place = context
        wg = place.wg
        kv_state = pipeline.PipelineState(1, Int32(0), Int32(0), tile % 2)
        seqlen_k = gmem.k.shape[0]
        query_range = self._query_blocks(unit, gmem, scoring.window)
        start, *_, end = query_range
        masked = self._masked(query_range, qhead_per_kvhead)
        first_key, group = unit.index * self.tile_n + self._row(wg), self._join_group(unit, gmem)
        total = (end - start) * qhead_per_kvhead
        left = total
        pipelines.k.consumer_wait(kv_state)
        self._clear_hidden(unit, gmem, (smem.k, smem.v), pipelines.v, kv_state, wg)
        if left > 0:
            pipelines.q.consumer_wait(q_state)
        self._issue_s(mmas, regs, q_state)
        pipelines.v.consumer_wait(kv_state)
        if total == 0:
            pipelines.v.consumer_release(kv_state)
        regs.acc_dK.fill(0.0)
        regs.acc_dV.fill(0.0)
        q_state = self._visit(context, query_range, masked, first_key, tile, q_state, seqlen_k, qhead_per_kvhead)
        if cutlass.const_expr(not self.has_dq_warpgroup):
            if total > 0:
                cute.arch.mbarrier_wait(pipelines.ds_full + (1 - q_state.index), q_state.phase ^ (1 - q_state.index))
            acc_dQ = self._issue_dq(mmas, regs, 1 - q_state.index)
            warpgroup.wait_group(0)
            if total > 0:
                self._give_dq(acc_dQ, smem, pipelines, place, 1 - q_state.index)
        warpgroup.wait_group(0)
        pipelines.k.consumer_release(kv_state)
        if cutlass.const_expr(self.stores_by_tma):
            self._hand_over(regs.acc_dV, smem.dq, layouts.dv, place, Float32(1.0), q_state.index)
            self._hand_over(regs.acc_dK, smem.dq, layouts.dk, place, scoring.softmax_scale, 1 - q_state.index)
        else:
            head, batch = self._split_group(group, gmem)
            self._store(regs.acc_dV, gmem.dv[None, None, head, batch], first_key, Float32(1.0))
            self._store(regs.acc_dK, gmem.dk[None, None, head, batch], first_key, scoring.softmax_scale)
        return q_state

    def _clear_hidden(self, *args) -> None:
        """Nothing without a mask."""

    @cute.jit
    def _visit(
        self,
        context: tuple,  # Context, or as Context
        blocks: tuple[Int32, Int32, Int32, Int32],  # see query_blocks
        kinds: tuple[Int32, Int32],  # see _masked
        first_key: Int32,
        tile: Int32,  # what the producer says of it
        q_state: pipeline.PipelineState,
        seqlen_k: Int32,
        qhead_per_kvhead: Int32,
    ) -> pipeline.PipelineState:
        """All blocks of a tile, each for all heads of the group; ``left`` tells which one it is, and whether it is
        masked. The state of Q and dO afterwards."""
        place, window = context[5], context[4].window
        start, _, _, end = blocks
        unmasked, masked = kinds
        total = (end - start) * qhead_per_kvhead
        left = total
        if cutlass.const_expr(self.has_window or self.deterministic):
            while left > unmasked:
                left -= 1
                m_block = self._visited(left, start, end, qhead_per_kvhead)
                limits = self._limits_of(first_key, m_block, place, seqlen_k, window)
                self._visit_block(context, q_state, total, left, limits)
                q_state.advance()
        while left > masked:
            left -= 1
            self._visit_block(context, q_state, total, left, None)
            q_state.advance()
        if cutlass.const_expr(self.has_window or not self.deterministic):
            while left > 0:
                left -= 1
                m_block = self._visited(left, start, end, qhead_per_kvhead)
                limits = self._limits_of(first_key, m_block, place, seqlen_k, window)
                self._visit_block(context, q_state, total, left, limits)
                q_state.advance()
        return q_state

    @cute.jit
    def _visit_block(
        self, context: tuple, state: pipeline.PipelineState, total: Int32, left: Int32, limits: tuple | None
    ) -> None:
        """This warpgroup's part of a block after which ``left`` of a tile's ``total`` ones come."""
        if cutlass.const_expr(self.splits_keys):
            self._block(context, state, left == total - 1, left, limits)
        else:
            self._score_block(context, state, left, limits)

    @cute.jit
    def _issue_s(self, mmas: Mmas, regs: Operands, q_state: pipeline.PipelineState) -> None:
        tSrQ = regs.tSrQ[None, None, None, q_state.index]
        issue(mmas.sdp, regs.acc_S, regs.tSrK[None, None, None, 0], tSrQ, self.head_dim // 16, zero_init=True)

    @cute.jit
    def _block(
        self,
        context: Context,
        state: pipeline.PipelineState,  # of this block's Q and dO
        is_first: Boolean,  # of its tile
        left: Int32,  # how many blocks of this tile come after this one
        limits: tuple[cute.Tensor, cute.Tensor | None] | None,  # see _limits; None: every row sees every key
    ) -> None:
        """All of one block of queries, whose S is being multiplied already, and the next one's S."""
        mmas, regs, smem, pipelines, scoring, place = context
        stage = state.index
        acc_dP = cute.make_rmem_tensor(regs.acc_S.layout, Float32)
        pipelines.do.consumer_wait(state)
        tPrdO = regs.tPrdO[None, None, None, stage]
        warpgroup.wait_group(0)
        issue(mmas.sdp, acc_dP, regs.tPrV[None, None, None, 0], tPrdO, self.head_dim_v // 16, zero_init=True)
        self._weigh(regs, smem, pipelines, stage, limits, scoring, place)
        warpgroup.wait_group(0)
        if left == 0:  # the next tile's V may come
            pipelines.v.consumer_release(pipeline.PipelineState(1, Int32(0), Int32(0), Int32(0)))
        self._score_gradients(regs, acc_dP, self._statistics(smem, stage, self.tile_m, place))
        tVrP, tVrdO = regs.tVrP, regs.tVrdO[None, None, None, stage]
        tKrdS, tKrQ = regs.tKrdS, regs.tKrQ[None, None, None, stage]
        cute.arch.barrier(barrier_id=TURN + place.wg, number_of_threads=THREADS)
        issue(mmas.dv, regs.acc_dV, tVrP, tVrdO, self.tile_m // 16, zero_init=False)
        issue(mmas.dk, regs.acc_dK, tKrdS, tKrQ, self.tile_m // 16, zero_init=False)
        cute.arch.mbarrier_wait(pipelines.ds_empty + stage, state.phase ^ 1)
        self._store_scores(mmas, regs.rdS, smem.ds[None, None, stage], place)
        self._arrive(pipelines.ds_full + stage)
        if cutlass.const_expr(self.has_dq_warpgroup):
            warpgroup.wait_group(1)  # dV: frees the registers of P
            following = state.clone()
            following.advance()
            if left > 0:
                pipelines.q.consumer_wait(following)
            self._issue_s(mmas, regs, following)
            cute.arch.barrier_arrive(barrier_id=TURN + 1 - place.wg, number_of_threads=THREADS)
            warpgroup.wait_group(1)  # dK
            self._release(pipelines, state)
        else:
            dq_stage = 1 - stage
            if not is_first:
                cute.arch.mbarrier_wait(pipelines.ds_full + dq_stage, state.phase ^ dq_stage)
            warpgroup.wait_group(1)
            acc_dQ = self._issue_dq(mmas, regs, dq_stage)
            warpgroup.wait_group(1)  # dK: frees the registers of dS, and this block's stage
            self._release(pipelines, state)
            following = state.clone()
            following.advance()
            if left > 0:
                pipelines.q.consumer_wait(following)
            self._issue_s(mmas, regs, following)
            cute.arch.barrier_arrive(barrier_id=TURN + 1 - place.wg, number_of_threads=THREADS)
            warpgroup.wait_group(1)
            if not is_first:
                self._give_dq(acc_dQ, smem, pipelines, place, dq_stage)

    @cute.jit
    def _release(self, pipelines: Pipelines, state: pipeline.PipelineState) -> None:
        """A block's Q, statistics and dO."""
        cute.arch.sync_warp()  # all lanes have read its statistics
        pipelines.q.consumer_release(state)
        pipelines.do.consumer_release(state)

    @cute.jit
    def _issue_dq(self, mmas: Mmas, regs: Operands, stage: Int32) -> cute.Tensor:
        acc_dQ = cute.make_rmem_tensor(mmas.dq.partition_shape_C((self.tile_m, self.dq_columns)), Float32)
        tQrdS, tQrK = regs.tQrdS[None, None, None, stage], regs.tQrK[None, None, None, 0]
        issue(mmas.dq, acc_dQ, tQrdS, tQrK, self.tile_n // 16, zero_init=True)
        return acc_dQ

    @cute.jit
    def _give_dq(self, acc_dQ: cute.Tensor, smem: Smem, pipelines: Pipelines, place: Place, stage: Int32) -> None:
        """This warpgroup's dQ to the warp that adds it."""
        self._arrive(pipelines.ds_empty + stage)
        values = range(0, self.dq_values, 4)
        self._stage_dq(acc_dQ.iterator, 0, values, smem, place.tidx % WARPGROUP, place.wg, stage)

    @cute.jit
    def _stage_dq(
        self,
        registers: cute.Pointer,
        offset: cutlass.Constexpr[int],  # of dQ's value in the first register
        values: cutlass.Constexpr[range],  # first ones of four
        smem: Smem,
        thread: Int32,  # of its warpgroup
        part: Int32,
        stage: Int32,  # of the block's Q
    ) -> None:
        """Values of one of the two parts of dQ to the warp that adds it, once it has all of them."""
        if cutlass.const_expr(values.start % self.dq_values == 0):
            cute.arch.barrier(barrier_id=self._empty(part, stage), number_of_threads=FILLING)
        store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
        target = smem.dq[None, None, None, None, self._dq_stage(stage)]
        for i in cutlass.range_constexpr(len(values)):
            source = cute.make_tensor(registers + (values[i] - offset), cute.make_layout(4))
            cute.copy(store, source, target[None, thread, values[i] % self.dq_values // 4, part])
        if cutlass.const_expr(values.stop % self.dq_values == 0):
            cute.arch.fence_view_async_shared()
            cute.arch.barrier_arrive(barrier_id=self._full(part, stage), number_of_threads=FILLING)

    @cute.jit
    def _arrive(self, mbarrier: cute.Pointer) -> None:
        """One arrival for this warp, after all of its lanes."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(mbarrier)

    def _statistics(self, smem: Smem, stage: Int32, first: int, place: Place) -> cute.Tensor:
        """(2, n) fp32: lse, or δ from row ``first`` = tile_m on, of this thread's n pairs of queries."""
        offset = first + place.tidx % 4 * 2
        pointer = (smem.statistics[None, stage].iterator + offset).align(8)
        return cute.make_tensor(pointer, cute.make_layout((2, self.tile_m // 8), stride=(1, 8)))

    @cute.jit
    def _weigh(
        self,
        regs: Operands,  # or ScoreOperands
        smem: Smem,
        pipelines: Pipelines,
        stage: Int32,
        limits: tuple | None,  # as of _block
        scoring: Scoring,
        place: Place,
    ) -> None:
        """P in the place of S, as of _weights, of a block with or without a mask."""
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(regs.acc_S, scoring.cap_factor)
        if cutlass.const_expr(limits is not None):
            fill = -math.inf if scoring.cap_factor is None else HIDDEN
            if cutlass.const_expr(limits[0] is not None):
                mask_left(regs.acc_S, limits[0], fill)
            if cutlass.const_expr(limits[1] is not None):
                mask_right(regs.acc_S, limits[1], fill)
        if cutlass.const_expr(self.transposes_sums):
            self._short_weights(regs.acc_S, self._short_statistics(smem, stage, 0), scoring)
        else:
            self._weights(regs, self._statistics(smem, stage, 0, place), scoring)

    @cute.jit
    def _weights(self, regs: Operands, lse: cute.Tensor, scoring: Scoring) -> None:
        """P in the place of S; with a softcap times its derivative there, and P itself in 16 bit in rP."""
        scores, rounded = self._slices(regs.acc_S), self._slices(regs.rP)
        for k in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            caps = cute.make_rmem_tensor(8, Float32)
            for half in cutlass.range_constexpr(2):
                pair = lse[None, 2 * k + half].load()
                for i in cutlass.range_constexpr(4):
                    score = scores[4 * half + i, k]
                    exponent = score * scoring.scale_log2 - pair[i % 2]
                    scores[4 * half + i, k] = cute.math.exp2(exponent, fastmath=True)
                    caps[4 * half + i] = 1.0 - score * score
            if cutlass.const_expr(self.has_softcap):
                rounded[None, k].store(scores[None, k].load().to(self.dtype))
                scores[None, k].store(scores[None, k].load() * caps.load())

    @cute.jit
    def _score_gradients(self, regs: Operands, acc_dP: cute.Tensor, delta: cute.Tensor) -> None:
        """dS = P ∘ (dP - δ), in 16 bit in rdS; P in 16 bit in rP, where a softcap has not left it already."""
        weights, gradients, rounded = self._slices(regs.acc_S), self._slices(acc_dP), self._slices(regs.rdS)
        for k in cutlass.range_constexpr(cute.size(weights, mode=[1])):
            if cutlass.const_expr(not self.has_softcap):
                self._slices(regs.rP)[None, k].store(weights[None, k].load().to(self.dtype))
            for half in cutlass.range_constexpr(2):
                pair = delta[None, 2 * k + half].load()
                for i in cutlass.range_constexpr(4 * half, 4 * half + 4):
                    gradients[i, k] = weights[i, k] * (gradients[i, k] - pair[i % 2])
            rounded[None, k].store(gradients[None, k].load().to(self.dtype))

    def _slices(self, fragment: cute.Tensor) -> cute.Tensor:
        """Registers of a fragment as (8, n): the values of a slice of 16 queries, as (query pair, 2 keys, 2)."""
        return cute.make_tensor(fragment.iterator, cute.make_layout((8, cute.size(fragment) // 8)))

    @cute.jit
    def _store_scores(
        self,
        mmas: Mmas,
        rounded: cute.Tensor,  # registers, laid out as acc_S
        sX: cute.Tensor,  # (tile_m, tile_n) of one stage
        place: Place,
    ) -> None:
        """Write this warpgroup's part of P or dS to shared memory, for WGMMA."""
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=True, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(place.tidx)
        flipped = cute.composition(sX, cute.make_ordered_layout((self.tile_n, self.tile_m), order=(1, 0)))
        cute.copy(copy, copy.retile(rounded), copy.partition_D(flipped))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def _limits(self, first_key: Int32, m_block: Int32, place: Place, seqlen_k: Int32, window: Window | None):
        """``(starts, ends)`` of the queries that see each of this thread's two keys, counted from the first query of
        the block; ends is None without a window."""
        first_query = m_block * self.tile_m
        starts = cute.make_rmem_tensor(2, Int32)
        ends = cute.make_rmem_tensor(2, Int32) if cutlass.const_expr(self.has_window) else None
        for r in cutlass.range_constexpr(2):
            key = first_key + 8 * r
            start = Int32(0)
            if cutlass.const_expr(self.is_causal):
                start = key - first_query
            if cutlass.const_expr(self.has_window):
                start = key - window.right - first_query
                ends[r] = key - window.left - first_query + 1
            starts[r] = start if key < seqlen_k else Int32(self.tile_m)
        return starts, ends

    @cute.jit
    def _round(self, acc: cute.Tensor, scale: Float32) -> cute.Tensor:
        """scale · acc in 16 bit; a slice at a time, or an odd number of values would be converted one by one."""
        rounded = cute.make_rmem_tensor(acc.layout, self.dtype)
        values, results = self._slices(acc), self._slices(rounded)
        for k in cutlass.range_constexpr(cute.size(values, mode=[1])):
            results[None, k].store((values[None, k].load() * scale).to(self.dtype))
        return rounded

    @cute.jit
    def _hand_over(
        self,
        acc: cute.Tensor,
        sdQ: cute.Tensor,
        layout: cute.ComposedLayout,
        place: Place,
        scale: Float32,
        stage: Int32,  # of the next block's Q, if it were one
    ) -> None:
        """Round scale · acc, all columns of this warpgroup's 64 keys, and give it to the warp that stores it."""
        sX = self._in_dq(sdQ, layout, place.wg, stage)
        rounded = self._round(acc, scale)
        alone = tiled_mma(self.dtype, (K_MAJOR, MN_MAJOR), (1, 1), cute.size(sX, mode=[1]), a_in_registers=True)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, alone).get_slice(fragments.read_thread_idx() % WARPGROUP)
        cute.arch.barrier(barrier_id=self._empty(place.wg, stage), number_of_threads=FILLING)
        cute.copy(copy, copy.retile(rounded), copy.partition_D(sX))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=self._full(place.wg, stage), number_of_threads=FILLING)

    @cute.jit
    def _store(
        self,
        acc: cute.Tensor,
        mX: cute.Tensor,  # (s_k, d / 2) of one head, pairs of values as Int32
        first_key: Int32,
        scale: Float32,
    ) -> None:
        """Round scale · acc and write this thread's two rows; a quad writes 64 neighbouring bytes at a time."""
        pairs = cute.recast_tensor(self._round(acc, scale), Int32)
        groups = cute.size(pairs) // 2  # of eight columns
        lane = fragments.read_thread_idx() % 4
        store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=128)
        for r in cutlass.range_constexpr(2):
            row = first_key + 8 * r
            for v in cutlass.range_constexpr(0, groups, 4):
                values = cute.make_rmem_tensor(4, Int32)
                for j in cutlass.range_constexpr(4):
                    values[j] = pairs[2 * min(v + j, groups - 1) + r]
                fragments.transpose_in_quad(values)  # now all eight columns of one group
                group = v + lane
                if row < mX.shape[0] and group * 4 < mX.shape[1]:
                    target = cute.zipped_divide(mX[row, None], (4,))[None, group].iterator
                    cute.copy(store, values, cute.make_tensor(target.align(16), cute.make_layout(4)))


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``: everything symbolic but the head dims and the unit stride."""
    dtype = DTYPES[key.dtype]
    batch, heads, heads_kv, heads_dk = (cute.sym_int() for _ in range(4))
    seqlen_q, seqlen_k = cute.sym_int(), cute.sym_int()

    def tensor(num_heads: cute.SymInt, seqlen: cute.SymInt, head_dim: int) -> cute.Tensor:
        strides = tuple(cute.sym_int64(divisibility=8) for _ in range(3))
        shape = (batch, num_heads, seqlen, head_dim)
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=16)

    of_query = (heads, seqlen_q, key.head_dim)
    of_output = (heads, seqlen_q, key.head_dim_v)
    of_key, of_value = (heads_kv, seqlen_k, key.head_dim), (heads_kv, seqlen_k, key.head_dim_v)
    shapes = (of_output, of_query, of_key, of_value, of_output)
    lse = cute.runtime.make_fake_tensor(
        Float32, (batch, heads, seqlen_q), (cute.sym_int64(), cute.sym_int64(), 1), assumed_align=4
    )
    return (
        *(tensor(*shape) for shape in shapes),
        lse,
        *(tensor(*shape) for shape in (of_query, of_key, of_value)),
        *(tensor(heads_dk, *shape[1:]) for shape in (of_key, of_value)),
        cute.runtime.make_fake_tensor(Float32, (cute.sym_int64(),), (1,), assumed_align=16),
        Float32(1.0),
        Float32(1.0),
        *(Int32(1) for _ in range(6)),  # num_sms, then the five of Order
        Int32(0) if key.window else None,
        Int32(0) if key.window else None,
        Float32(1.0) if key.softcap else None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
