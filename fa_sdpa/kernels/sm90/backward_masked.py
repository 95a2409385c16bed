"""Attention backward for Hopper with an attn_mask: `Backward` over the query blocks that a list names; see
mask_transposed.py.

A tile visits its whole blocks first, then those with bits, then the biased ones, and of these last those that hide
keys or have biases far from 0. Each kind has a loop of its own, and in each comes the last block first; whole blocks
run the code of a call without a mask. The list has them in the other order, so that ``left``, which counts down, points
into it; heads of a group share an entry.

Bits and biases come through shared memory, so that neither their latency nor their addresses cost the MMA warpgroups
anything. Bits, 16 bytes for each key, are in the stages of Q and count for its mbarrier. Biases have one stage of their
own, or two where there is room, filled by TMA with the layout of dS and read into the layout of S by transposing loads,
as dS is written; those of 32 bits value by value. A stage is empty again as soon as a block's P is there.

Biases cost a conversion and a multiplication each, as a part of what is taken from the scores: they and lse in one.
Only in blocks that hide keys scores are cut off where the forward (forward_masked.py) does it, or lse would not fit
them. P of a hidden key is 0, whatever K has there. Where a key is hidden from all
of a tile's blocks, its K and V are zeroed before they are multiplied (hidden_keys.py), by each warpgroup that reads
them but the one that multiplies dQ: dS, for which it waits, is made of what others have zeroed.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync, warp

from ..common import softmax
from ..common.mask import mask_bits
from ..key import KernelKey
from . import backward
from .backward import Atoms, Backward, Gmem, Operands, Pipelines, Scoring, Smem, TileMask
from .backward_order import CONVERT, END, MULTIPLY, PREPARE, Order, Unit, put_unit, take_unit
from .backward_roles import HIDDEN, Place
from .backward_rows import Scratch, await_count
from .config import TRANSPOSED_HEADER
from .forward import shared_by_sequences
from .hidden_keys import clear_keys
from .mask import DTYPES
from .tma import load_tile

CLEARED = 1  # first of two named barriers
BITS_BLOCK = ()  # ``limits`` of a block with bits; those of a biased one are (how many came before, whether it hides)
Blocks = tuple[Int32, Int32, Int32, Int32, Int32]  # of a tile: see MaskedBackward._query_blocks


class MaskedBackward(Backward):
    """Kernels of one key with ``attn_mask``."""

    @cute.jit
    def __call__(
        self,
        mdO: cute.Tensor,  # as of Backward, up to mScratch
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
        mLists: cute.Tensor,  # see TileMask, as the next
        mBits: cute.Tensor,
        mBias: cute.Tensor | None,  # (b, h, s_q, s_k), strides of 0 where broadcast
        softmax_scale: Float32,
        softmax_scale_log2: Float32,
        num_sms: Int32,
        section: Int32,
        sections: Int32,
        ahead: Int32,
        lag: Int32,
        slots: Int32,
        bias_factor: Float32 | None,  # see Scoring, as the next two
        bias_limit: Float32 | None,
        cap_factor: Float32 | None,
        stream,
    ):
        atom = bias = by_head = None
        if cutlass.const_expr(mBias is not None):
            rows = cute.make_tensor(mBias.iterator, cute.select(mBias.layout, mode=[2, 3, 1, 0]))
            layout = cute.select(self._layouts().bias, mode=[0, 1])
            op = cpasync.CopyBulkTensorTileG2SOp()
            atom, bias = cpasync.make_tiled_tma_atom(op, rows, layout, (self.tile_m, self.tile_n))
            by_head = shared_by_sequences(mBias)
        scoring = Scoring(softmax_scale, softmax_scale_log2, None, cap_factor, bias_factor, bias_limit)
        mask = TileMask(mLists, mBits, bias, atom, by_head)
        schedule = section, sections, ahead, lag, slots
        tensors = mdO, mQ, mK, mV, mO, mLSE, mdQ, mdK, mdV, mPartK, mPartV, mScratch
        self.launch(*tensors, scoring, num_sms, schedule, mask, stream)

    @cute.jit
    def _entries(self, unit: Unit, gmem: Gmem) -> cute.Tensor:
        """The list of a tile."""
        return gmem.mask.lists[unit.batch, unit.head, unit.index, None]

    @cute.jit
    def _query_blocks(self, unit: Unit, gmem: Gmem, window: None) -> Blocks:
        """``(0, clear_start, bits_start, whole_start, end)``: where a tile's list has each kind of blocks, biased ones
        first, of which those that hide keys come before all others."""
        entries = self._entries(unit, gmem)
        clear_start = entries[3] >> 1 if cutlass.const_expr(self.has_bias) else Int32(0)
        return Int32(0), clear_start, entries[0], entries[1], entries[2]

    @cute.jit
    def _masked(self, blocks: Blocks, qhead_per_kvhead: Int32) -> tuple[Int32, Int32, Int32]:
        """How many visits are left of a tile after those of whole blocks, after those of blocks with bits, and after
        those of biased ones that hide nothing."""
        _, clear_start, bits_start, whole_start, _ = blocks
        bits_start = bits_start * qhead_per_kvhead if cutlass.const_expr(self.has_bias) else Int32(0)
        return whole_start * qhead_per_kvhead, bits_start, clear_start * qhead_per_kvhead

    @cute.jit
    def _in_list(self, index: Int32, unit: Unit, gmem: Gmem) -> Int32:
        return self._entries(unit, gmem)[TRANSPOSED_HEADER + index]

    @cute.jit
    def load(
        self,
        atoms: Atoms,
        gmem: Gmem,
        scratch: Scratch,
        smem: Smem,
        pipelines: Pipelines,
        order: Order,
        window: None,
        qhead_per_kvhead: Int32,
    ) -> None:
        """Producer warp, as without a mask. What it says of a tile is its number, in the lowest bit, and how many
        biased blocks this CTA had before it, in the next two: as far as these tell stages and their phases."""
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        turn, tile, biased = Int32(0), Int32(0), Int32(0)
        unit = self._take_unit(gmem, scratch, order)
        put_unit(pipelines.units, turn, unit, tile)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                head_kv = unit.head // (gmem.dk.shape[2] // gmem.k.shape[2])
                gK, gV = gmem.k[None, None, head_kv, unit.batch], gmem.v[None, None, head_kv, unit.batch]
                self._await_rows(unit, order, gmem, scratch)
                load_tile(atoms.k, gK, smem.k, unit.index, pipelines.k, kv_state)
                _, clear_start, bits_start, whole_start, end = self._query_blocks(unit, gmem, window)
                total = end * qhead_per_kvhead
                for i in cutlass.range(total, unroll=1):
                    index = (total - 1 - i) // qhead_per_kvhead
                    m_block = self._in_list(index, unit, gmem)
                    head = unit.head * qhead_per_kvhead + i % qhead_per_kvhead
                    is_biased = index < bits_start
                    has_bits = (index < clear_start) | ((index >= bits_start) & (index < whole_start))
                    args = unit, head, m_block, q_state, has_bits, is_biased
                    self._load_q(atoms, gmem, scratch, smem, pipelines, *args)
                    if i == 0:
                        load_tile(atoms.v, gV, smem.v, unit.index, pipelines.v, kv_state)
                    gdO = gmem.do[None, None, head, unit.batch]
                    load_tile(atoms.do, gdO, smem.do, m_block, pipelines.do, q_state)
                    if cutlass.const_expr(self.has_bias):
                        if is_biased:
                            self._load_bias(gmem, smem, pipelines, unit, head, m_block, biased)
                            biased += 1
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
            unit = self._take_unit(gmem, scratch, order)
            put_unit(pipelines.units, turn, unit, tile & 1 | (biased & 3) << 1)

    @cute.jit
    def _take_unit(self, gmem: Gmem, scratch: Scratch, order: Order) -> Unit:
        """The next unit of all."""
        unit = take_unit(scratch.next_unit.iterator, order, self.interleaved, self.deterministic)
        if cutlass.const_expr(self.has_bias):
            head, batch = unit.head, unit.batch
            if gmem.mask.by_head:
                group, sequences = self._join_group(unit, gmem), gmem.q.shape[3]
                head, batch = group // sequences, group % sequences
            unit = unit._replace(head=head, batch=batch)
        return unit

    @cute.jit
    def _load_q(
        self,
        atoms: Atoms,
        gmem: Gmem,
        scratch: Scratch,
        smem: Smem,
        pipelines: Pipelines,
        unit: Unit,
        head: Int32,
        m_block: Int32,
        state: pipeline.PipelineState,
        has_bits: Boolean,
        is_biased: Boolean,
    ) -> None:
        """Q of a block, its statistics, which its mbarrier expects with Q, and the bits of this tile's keys: there is
        a plane of them for tiles with bits, and one for biased ones."""
        load_tile(atoms.q, gmem.q[None, None, head, unit.batch], smem.q, m_block, pipelines.q, state)
        full = pipelines.q.producer_get_barrier(state)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32)
        if has_bits:
            with cute.arch.elect_one():
                cute.arch.mbarrier_expect_tx(full, 16 * self.tile_n)
                plane = Int32(0)
                if cutlass.const_expr(self.has_bias):
                    plane = Int32(is_biased)
                first = gmem.mask.bits.iterator + cute.crd2idx(
                    (unit.batch, head, plane, m_block, unit.index * self.tile_n, 0), gmem.mask.bits.layout
                )
                source = cute.make_tensor(first.align(16), cute.make_layout(4 * self.tile_n))
                cute.copy(bulk, source, cute.group_modes(smem.bits[None, None, state.index], 0, 2), mbar_ptr=full)
        with cute.arch.elect_one():
            blocks = cute.ceil_div(gmem.q.shape[0], self.tile_m)
            cute.copy(
                cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32),
                scratch.statistics[None, Int64((unit.batch * gmem.q.shape[2] + head) * blocks + m_block)],
                smem.statistics[None, state.index],
                mbar_ptr=full,
            )

    @cute.jit
    def _load_bias(
        self,
        gmem: Gmem,
        smem: Smem,
        pipelines: Pipelines,
        unit: Unit,
        head: Int32,
        m_block: Int32,
        count: Int32,  # of the biased blocks before
    ) -> None:
        """Biases of a block."""
        state = self._bias_state(count, first_phase=1)
        biases = gmem.mask.bias[None, None, head, unit.batch]
        load_tile(gmem.mask.bias_atom, biases, smem.bias, m_block, pipelines.bias, state, unit.index)

    def _bias_state(self, count: Int32, first_phase: int) -> pipeline.PipelineState:
        """The state of the biases' pipeline after so many blocks."""
        index, phase = count & self.bias_stages - 1, count >> self.bias_stages - 1 & 1 ^ first_phase  # of 1 or 2
        return pipeline.PipelineState(self.bias_stages, Int32(0), index, phase)

    @cute.jit
    def _clear_hidden(
        self,
        unit: Unit,
        gmem: Gmem,
        tiles: tuple[cute.Tensor, ...],  # K or V or both, in shared memory
        pipe: pipeline.PipelineTmaAsync,  # of the last one
        state: pipeline.PipelineState,
        wg: Int32 | int,  # which of the first two MMA warpgroups this is
    ) -> None:
        """Zero their rows of keys that are hidden from all blocks of a tile, if there are any."""
        entries = self._entries(unit, gmem)
        if entries[3] & 1 != 0:
            pipe.consumer_wait(state)
            hidden = cute.make_tensor(entries.iterator + 4, cute.make_layout(4))
            for tile in tiles:
                clear_keys(tile, 0, hidden, CLEARED + wg)

    @cute.jit
    def _visit(
        self,
        context: tuple,  # Context, or as Context
        blocks: Blocks,
        kinds: tuple[Int32, Int32, Int32],  # see _masked
        first_key: Int32,
        tile: Int32,  # see load
        q_state: pipeline.PipelineState,
        seqlen_k: Int32,
        qhead_per_kvhead: Int32,
    ) -> pipeline.PipelineState:
        total = blocks[4] * qhead_per_kvhead
        left = total
        whole_start, bits_start, clear_start = kinds
        while left > whole_start:
            left -= 1
            self._visit_block(context, q_state, total, left, None)
            q_state.advance()
        while left > bits_start:
            left -= 1
            self._visit_block(context, q_state, total, left, BITS_BLOCK)
            q_state.advance()
        if cutlass.const_expr(self.has_bias):
            before = (tile >> 1) + bits_start - 1
            while left > clear_start:
                left -= 1
                self._visit_block(context, q_state, total, left, (before - left, False))
                q_state.advance()
            while left > 0:
                left -= 1
                self._visit_block(context, q_state, total, left, (before - left, True))
                q_state.advance()
        return q_state

    @cute.jit
    def _weigh(
        self,
        regs: Operands,  # or ScoreOperands
        smem: Smem,
        pipelines: Pipelines,
        stage: Int32,
        limits: tuple | None,
        scoring: Scoring,
        place: Place,
    ) -> None:
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(regs.acc_S, scoring.cap_factor)
        lse = self._statistics(smem, stage, 0, place)
        if cutlass.const_expr(limits is None):
            self._weights(regs, lse, scoring)
        elif cutlass.const_expr(limits == BITS_BLOCK):
            fill = -math.inf if scoring.cap_factor is None else HIDDEN
            mask_bits(regs.acc_S, self._words(smem, stage, place), fill)
            self._weights(regs, lse, scoring)
        else:
            state = self._bias_state(limits[0], first_phase=0)
            pipelines.bias.consumer_wait(state)
            flipped = cute.composition(
                smem.bias[None, None, state.index],
                cute.make_ordered_layout((self.tile_n, self.tile_m), order=(1, 0)),
            )
            if cutlass.const_expr(limits[1]):
                self._hidden_weights(regs, flipped, self._words(smem, stage, place), lse, scoring, place)
            else:
                self._biased_weights(regs, flipped, lse, scoring, place)
            cute.arch.sync_warp()
            pipelines.bias.consumer_release(state)

    @cute.jit
    def _words(self, smem: Smem, stage: Int32, place: Place) -> cute.Tensor:
        """(2,) Int32: the bits of this thread's keys."""
        words = cute.make_rmem_tensor(2, Int32)
        for r in cutlass.range_constexpr(2):
            words[r] = smem.bits[place.tidx % 4, self._row(place.wg) + 8 * r, stage]
        return words

    @cute.jit
    def _biased_weights(
        self,
        regs: Operands,
        flipped: cute.Tensor,  # (tile_n, tile_m) biases in shared memory; so below
        lse: cute.Tensor,
        scoring: Scoring,
        place: Place,
    ) -> None:
        """_weights of scores with biases, a slice at a time."""
        scores, rounded = self._slices(regs.acc_S), self._slices(regs.rP)
        bias_log2 = scoring.bias_factor * scoring.scale_log2
        for k in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            biases = self._biases(flipped, k, place)
            caps = cute.make_rmem_tensor(8, Float32)
            for half in cutlass.range_constexpr(2):
                pair = lse[None, 2 * k + half].load()
                for i in cutlass.range_constexpr(4):
                    e = 4 * half + i
                    score = scores[e, k]
                    exponent = score * scoring.scale_log2 + (biases[e] * bias_log2 - pair[i % 2])
                    scores[e, k] = cute.math.exp2(exponent, fastmath=True)
                    caps[e] = 1.0 - score * score
            if cutlass.const_expr(self.has_softcap):
                rounded[None, k].store(scores[None, k].load().to(self.dtype))
                scores[None, k].store(scores[None, k].load() * caps.load())

    @cute.jit
    def _hidden_weights(
        self,
        regs: Operands,
        flipped: cute.Tensor,
        words: cute.Tensor,
        lse: cute.Tensor,
        scoring: Scoring,
        place: Place,
    ) -> None:
        """The same where some keys are hidden, and scores to be cut off."""
        scores, rounded = self._slices(regs.acc_S), self._slices(regs.rP)
        for k in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            biases = self._biases(flipped, k, place)
            caps = cute.make_rmem_tensor(8, Float32)
            for half in cutlass.range_constexpr(2):
                pair = lse[None, 2 * k + half].load()
                for i in cutlass.range_constexpr(4):
                    e, bit = 4 * half + i, 4 * k + 2 * half + i % 2
                    is_seen = words[i // 2] >> bit & 1 != 0
                    score = scores[e, k] if is_seen else Float32(0.0)
                    biased = cute.arch.fmax(score + biases[e] * scoring.bias_factor, -scoring.bias_limit, nan=True)
                    biased = cute.arch.fmin(biased, scoring.bias_limit, nan=True)
                    weight = cute.math.exp2(biased * scoring.scale_log2 - pair[i % 2], fastmath=True)
                    scores[e, k] = weight if is_seen else Float32(0.0)
                    caps[e] = 1.0 - score * score
            if cutlass.const_expr(self.has_softcap):
                rounded[None, k].store(scores[None, k].load().to(self.dtype))
                scores[None, k].store(scores[None, k].load() * caps.load())

    @cute.jit
    def _biases(self, flipped: cute.Tensor, k: cutlass.Constexpr[int], place: Place) -> cute.Tensor:
        """(8,) fp32: a thread's biases of slice ``k`` of 16 queries, of (tile_n, tile_m) biases in shared memory."""
        mma = self._mmas(self.dk_columns, self.dv_columns, self.dq_chunk).sdp
        biases = cute.make_rmem_tensor(8, Float32)
        if cutlass.const_expr(self.bias_dtype.width == 32):
            own = mma.get_slice(place.tidx).partition_C(flipped)
            for e in cutlass.range_constexpr(8):
                biases[e] = own[(e % 2, e // 2 % 2, 2 * k + e // 4), 0, 0]
        else:
            atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=4), self.bias_dtype)
            copy = cute.make_tiled_copy_C(atom, mma).get_slice(place.tidx)
            source, loaded = copy.partition_S(flipped), cute.make_rmem_tensor((8, 1, 1), self.bias_dtype)
            cute.copy(copy, source[(None, k), None, None], loaded)
            biases.store(cute.make_tensor(loaded.iterator, cute.make_layout(8)).load().to(Float32))
        return biases


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``, as those of ``Backward``."""
    *tensors, _, _, _, _, _, _, _, _, _, _, cap_factor, stream = backward.example_arguments(key)

    def tensor(dtype: type[cutlass.Numeric], rank: int, last: object, unit: int) -> cute.Tensor:
        """With strides that are multiples of ``unit``, and so aligned."""
        shape = (*(cute.sym_int() for _ in range(rank - 1)), last)
        strides = tuple(cute.sym_int64(divisibility=unit) for _ in range(rank - 1))
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=unit * dtype.width // 8)

    has_bias, dtype = key.attn_mask != "bool", DTYPES[key.attn_mask]
    return (
        *tensors,
        tensor(Int32, 4, cute.sym_int(), 1),
        tensor(Int32, 6, 4, 4),
        tensor(dtype, 4, cute.sym_int(), 128 // dtype.width) if has_bias else None,
        *(Float32(1.0), Float32(1.0)),
        *(Int32(1) for _ in range(6)),  # num_sms, then the five of Order
        *((Float32(1.0), Float32(1.0)) if has_bias else (None, None)),
        *(cap_factor, stream),
    )
