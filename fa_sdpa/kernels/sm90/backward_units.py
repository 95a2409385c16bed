"""Units of the backward that are about rows of queries: what is done before tiles need them, and after.

Both go through the stages of Q and dO: the producer warp loads blocks of O and dO, or of sums of dQ, into them, and the
warps of warpgroups 1 and 2 take them from there, as they take those of a tile. A unit is PART_BLOCKS blocks, of which
each takes a stage of Q and one of dO, or, if O is wider than Q or half of the sums wider than dO, two of the one and
none of the other. So a unit takes every stage an even number of times, and pipeline states are the same after it.
"""

from typing import TYPE_CHECKING

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync

from ..common import fragments
from .backward_convert import convert
from .backward_order import CONVERT, PART_BLOCKS, PREPARE, Unit
from .backward_rows import WARPGROUP, Scratch, count_up, prepare, zero_sums
from .tma import copy_tile, load_tile

if TYPE_CHECKING:
    from .backward import Atoms, Gmem, Pipelines, Smem


class RowUnits:
    """Part of Backward."""

    @cute.jit
    def _load_sums(
        self,
        unit: Unit,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        state: pipeline.PipelineState,  # of Q and dO; theirs is the same afterwards
        qhead_per_kvhead: Int32,
    ) -> None:
        """Sums of the blocks of a unit, one half in Q's stage and the other in dO's, or each in a stage of Q's."""
        for b in cutlass.range(PART_BLOCKS, unroll=1):
            _, _, in_group = self._block_of(unit, b, gmem, qhead_per_kvhead)
            block = self._ring_block(unit, in_group, gmem, qhead_per_kvhead)
            for half in cutlass.range_constexpr(2):
                in_do = half == 1 and not self.splits_sums
                pipe, source = pipelines.do if in_do else pipelines.q, scratch.sums[None, None, None, half, block]
                pipe.sync_object_empty.wait(state.index, state.phase)
                with cute.arch.elect_one():
                    full = pipe.producer_get_barrier(state)
                    cute.arch.mbarrier_arrive_and_expect_tx(full, 4 * cute.size(source))
                    cute.copy(
                        cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32),
                        cute.group_modes(source, 0, 3),
                        cute.group_modes(smem.sums[in_do][None, None, None, state.index], 0, 3),
                        mbar_ptr=full,
                    )
                if cutlass.const_expr(half == 1 or self.splits_sums):
                    state.advance()

    @cute.jit
    def _load_rows(
        self,
        atoms: "Atoms",
        unit: Unit,
        gmem: "Gmem",
        smem: "Smem",
        pipelines: "Pipelines",
        state: pipeline.PipelineState,
        qhead_per_kvhead: Int32,
    ) -> None:
        """O and dO of the blocks of a unit, O in Q's stage or in dO's before."""
        for b in cutlass.range(PART_BLOCKS, unroll=1):
            m_block, head, _ = self._block_of(unit, b, gmem, qhead_per_kvhead)
            gO, gdO = (tensor[None, None, head, unit.batch] for tensor in (gmem.o, gmem.do))
            if cutlass.const_expr(self.splits_rows):
                load_tile(atoms.o, gO, smem.o, m_block, pipelines.do, state)
                state.advance()
            else:
                pipelines.q.sync_object_empty.wait(state.index, state.phase)
                full = pipelines.q.producer_get_barrier(state)
                with cute.arch.elect_one():
                    num_bytes = self.tile_m * self.width_v * self.dtype.width // 8
                    cute.arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
                copy_tile(atoms.o, gO, smem.o, m_block, state.index, full)
            load_tile(atoms.do, gdO, smem.do, m_block, pipelines.do, state)
            state.advance()

    @cute.jit
    def _block_of(self, unit: Unit, index: Int32, gmem: "Gmem", qhead_per_kvhead: Int32) -> tuple[Int32, Int32, Int32]:
        """``(m_block, head, block)`` of one of the blocks of query rows of a unit that prepares or converts, the last
        one its number in the group. A unit's last one may be one too many: it is the one before."""
        blocks = cute.ceil_div(gmem.q.shape[0], self.tile_m)
        block = cutlass.min(unit.index * PART_BLOCKS + index, blocks * qhead_per_kvhead - 1)
        return block % blocks, unit.head * qhead_per_kvhead + block // blocks, block

    @cute.jit
    def _ring_block(self, unit: Unit, block: Int32, gmem: "Gmem", qhead_per_kvhead: Int32) -> Int64:
        """Where the sums of a group's block are in the ring."""
        return Int64(unit.slot * (cute.ceil_div(gmem.q.shape[0], self.tile_m) * qhead_per_kvhead) + block)

    @cute.jit
    def _do_rows(
        self,
        context: tuple,  # Context, or as Context
        gmem: "Gmem",
        scratch: Scratch,
        unit: Unit,
        state: pipeline.PipelineState,  # of Q and dO
        qhead_per_kvhead: Int32,
    ) -> None:
        """This thread's share, of the threads of warpgroups 1 and 2, of a unit that prepares or converts; nothing of a
        tile. With two MMA warpgroups this must be called after the tile and in no else branch, or ptxas keeps none of
        its descriptors in uniform registers; with three before it, or the unit stays in registers, which spill."""
        _, _, smem, pipelines, scoring, _ = context
        if unit.kind == CONVERT:
            self._convert(gmem, scratch, smem, pipelines, unit, state.clone(), scoring.softmax_scale, qhead_per_kvhead)
            count_up(scratch.converted.iterator + unit.slot)
        if unit.kind == PREPARE:
            self._prepare(gmem, scratch, smem, pipelines, unit, state.clone(), qhead_per_kvhead)
            count_up(scratch.prepared.iterator + self._join_group(unit, gmem))

    @cute.jit
    def _convert(
        self,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        unit: Unit,
        state: pipeline.PipelineState,
        softmax_scale: Float32,
        qhead_per_kvhead: Int32,
    ) -> None:
        """dQ of the blocks of a unit, and zeros in the place of its sums if the slot has another user."""
        thread, half = self._half()
        for b in cutlass.range(PART_BLOCKS, unroll=1):
            m_block, head, block = self._block_of(unit, b, gmem, qhead_per_kvhead)
            gdQ, first_row = gmem.dq[None, None, head, unit.batch], m_block * self.tile_m
            is_block = unit.index * PART_BLOCKS + b == block
            for step in cutlass.range_constexpr(1 + self.splits_sums):
                pipelines.q.consumer_wait(state)
                if cutlass.const_expr(self.splits_sums):
                    if is_block and half == step:
                        sums = smem.sums[0][None, None, None, state.index]
                        convert(sums, gdQ, first_row, softmax_scale, self.dq_by_rows)
                else:
                    pipelines.do.consumer_wait(state)
                    if is_block:
                        sums = self._half_of_sums(smem, half, state.index)
                        convert(sums, gdQ, first_row, softmax_scale, self.dq_by_rows)
                cute.arch.sync_warp()
                pipelines.q.consumer_release(state)
                if cutlass.const_expr(not self.splits_sums):
                    pipelines.do.consumer_release(state)
                state.advance()
            if is_block and unit.is_reused == 1:
                zero_sums(scratch, self._ring_block(unit, block, gmem, qhead_per_kvhead), thread, half)

    @cute.jit
    def _prepare(
        self,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        unit: Unit,
        state: pipeline.PipelineState,
        qhead_per_kvhead: Int32,
    ) -> None:
        """Statistics of the blocks of a unit, and zeros for the first user of a slot."""
        thread, half = self._half()
        blocks, heads = cute.ceil_div(gmem.q.shape[0], self.tile_m), gmem.q.shape[2]
        for b in cutlass.range(PART_BLOCKS, unroll=1):
            m_block, head, block = self._block_of(unit, b, gmem, qhead_per_kvhead)
            first = state.clone()
            if cutlass.const_expr(self.splits_rows):
                pipelines.do.consumer_wait(first)
                state.advance()
            else:
                pipelines.q.consumer_wait(first)
            pipelines.do.consumer_wait(state)
            prepare(
                smem.o[None, None, first.index],
                smem.do[None, None, state.index],
                gmem.lse[unit.batch, head, None],
                m_block * self.tile_m,
                scratch.statistics[None, Int64((unit.batch * heads + head) * blocks + m_block)],
            )
            cute.arch.sync_warp()
            (pipelines.do if self.splits_rows else pipelines.q).consumer_release(first)
            pipelines.do.consumer_release(state)
            state.advance()
            if unit.generation == 0:
                zero_sums(scratch, self._ring_block(unit, block, gmem, qhead_per_kvhead), thread, half)

    @cute.jit
    def _half_of_sums(self, smem: "Smem", half: Int32, stage: Int32) -> cute.Tensor:
        """One half of a block's sums, in a stage of Q's or of dO's."""
        in_q, in_do = (sums[None, None, None, stage] for sums in smem.sums)
        distance = (in_do.iterator.toint() - in_q.iterator.toint()) // 4
        return cute.make_tensor((in_q.iterator + half * distance).align(16), in_q.layout)

    @cute.jit
    def _half(self) -> tuple[Int32, Int32]:
        """This thread's number in its warpgroup, and which of the two that multiply it is."""
        tidx = fragments.read_thread_idx() - WARPGROUP
        return tidx % WARPGROUP, cute.arch.make_warp_uniform(tidx // WARPGROUP)
