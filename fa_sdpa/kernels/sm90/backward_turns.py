"""Deterministic mode of the backward: tiles of a group add to a block of queries one after the other.

The last keys come first, and every tile visits its blocks in rising order of their positions: position p is block
p // G, head p % G of the G query heads of a group. So where two tiles of a group follow one another, the one of the
next keys has p behind it when it has the next positions to come, and one counter a tile tells all that it has added: up
to which position. A tile reads its predecessor's again only when it has come to where that was (a few blocks ahead of
it, if all goes well), so that most blocks wait for no memory.

    dQ through shared memory   warps 1 and 2 add whole blocks in turns, each until its additions are complete, which
                               takes longer than the MMA warps need for a block; dQ has two stages where there is room.
                               Each of the two has a counter of its own for even positions, and one for odd ones
    dQ straight from registers dQ's warpgroup adds; warp 1 hands on what it has added, as a fence waits for additions

Position p of a tile waits for p of the tile before it in the order of units, so there is no deadlock
(backward_order.py).
"""

from typing import TYPE_CHECKING

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ..common.atomics import bulk_add
from .backward_order import END, MULTIPLY, Order, Queue, Unit, get_unit
from .backward_rows import WARPGROUP, Scratch, await_count, count_up, end_turn

if TYPE_CHECKING:
    from ..common.blocks import Window
    from .backward import Atoms, Gmem, Layouts

# Named barriers, first of two each, between those that fill and empty dQ's shared memory; barrier 0 is the CTA's. In
# deterministic mode blocks with an odd stage of Q have others, so many further on.
DQ_EMPTY, DQ_FULL, TURN, ODD = 3, 5, 7, 6
FILLING = WARPGROUP + 32  # threads at each


class Turns:
    """Part of Backward."""

    @cute.jit
    def add_in_turns(
        self,
        atoms: "Atoms",
        gmem: "Gmem",
        scratch: Scratch,
        sdQ: cute.Tensor,
        units: Queue,
        layouts: "Layouts",
        order: Order,
        window: "Window | None",
        qhead_per_kvhead: Int32,
        own: Int32,
    ) -> None:
        """Warp that adds dQ of the blocks whose stage of Q is ``own`` to its sums, and stores dV or dK of each tile."""
        if self.stages_dq == 2 or own == 0:
            for part in cutlass.range_constexpr(2):
                cute.arch.barrier_arrive(barrier_id=self._empty(part, own), number_of_threads=FILLING)
        filled = Int32(0)  # the stage that the next tile begins with
        unit, _ = get_unit(units)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                start, _, _, end = self._query_blocks(unit, gmem, window)
                total, first = (end - start) * qhead_per_kvhead, start * qhead_per_kvhead
                shared, seen = self._next_start(unit, gmem, window) * qhead_per_kvhead, Int32(0)
                self._await_slot(unit, order, gmem, scratch)
                for i in cutlass.range((filled + own) % 2, total, 2, unroll=1):
                    seen = self._await_turn(unit, first + i, shared, seen, gmem, scratch)
                    block = self._block_in_ring(i, unit, start, end, qhead_per_kvhead, gmem)
                    for part in cutlass.range_constexpr(2):
                        source = sdQ[None, 0, 0, part, self._dq_stage(own)].iterator
                        cute.arch.barrier(barrier_id=self._full(part, own), number_of_threads=FILLING)
                        with cute.arch.elect_one():
                            sums = scratch.sums[None, 0, 0, part, block].iterator
                            bulk_add(sums, source, 4 * WARPGROUP * self.dq_values)
                        self._release_dq(part, own)
                    cute.arch.cp_async_bulk_wait_group(0)
                    end_turn(self._done(unit, unit.index, first + i, gmem, scratch), first + i + 1)
                count_up(scratch.added.iterator + unit.slot)
                filled = (filled + total) % 2
                if cutlass.const_expr(self.stores_by_tma):
                    if filled == own:
                        self._store_from_dq(atoms.dv, gmem.dv, layouts.dv, sdQ, unit, own)
                    else:
                        self._store_from_dq(atoms.dk, gmem.dk, layouts.dk, sdQ, unit, own)
            unit, _ = get_unit(units)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def _store_from_dq(
        self,
        atom: cute.CopyAtom,
        mX: cute.Tensor,  # (s_k, columns, h_kv, b)
        layout: cute.ComposedLayout,
        sdQ: cute.Tensor,
        unit: Unit,
        stage: Int32,
    ) -> None:
        """Store dV or dK of a tile's keys, 64 from each part of dQ's shared memory, once it is there."""
        for part in cutlass.range_constexpr(2):
            sX = self._in_dq(sdQ, layout, part, stage)
            rows = (64, cute.size(sX, mode=[1]))
            gX = cute.local_tile(mX[None, None, unit.head, unit.batch], rows, (unit.index * 2 + part, 0))
            tXsX, tXgX = cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
            )
            cute.arch.barrier(barrier_id=self._full(part, stage), number_of_threads=FILLING)
            cute.copy(atom, tXsX, tXgX)
            self._release_dq(part, stage)

    @cute.jit
    def hand_on_turns(
        self, gmem: "Gmem", scratch: Scratch, units: Queue, window: "Window | None", qhead_per_kvhead: Int32
    ) -> None:
        """Warp that hands on, block by block, what dQ's warpgroup has added from its registers."""
        cute.arch.barrier_arrive(barrier_id=DQ_EMPTY, number_of_threads=FILLING)
        unit, _ = get_unit(units)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                start, _, _, end = self._query_blocks(unit, gmem, window)
                for position in cutlass.range(start * qhead_per_kvhead, end * qhead_per_kvhead, unroll=1):
                    cute.arch.barrier(barrier_id=DQ_FULL, number_of_threads=FILLING)
                    cute.arch.barrier_arrive(barrier_id=DQ_EMPTY, number_of_threads=FILLING)
                    end_turn(self._done(unit, unit.index, position, gmem, scratch), position + 1)
            unit, _ = get_unit(units)

    @cute.jit
    def _next_start(self, unit: Unit, gmem: "Gmem", window: "Window | None") -> Int32:
        """The tile of the next keys, which comes first, adds to those query blocks of this one that are not before
        this. (Neither start nor end of their ranges ever falls.)"""
        next_start = cute.ceil_div(gmem.q.shape[0], self.tile_m)
        if (unit.index + 1) * self.tile_n < gmem.k.shape[0]:
            next_start, _, _, _ = self._query_blocks(unit._replace(index=unit.index + 1), gmem, window)
        return next_start

    @cute.jit
    def _await_turn(
        self,
        unit: Unit,
        position: Int32,
        shared: Int32,  # the first position that the tile before adds to
        seen: Int32,  # what its counter was seen to be
        gmem: "Gmem",
        scratch: Scratch,
    ) -> Int32:
        """Wait until the tile before has added to a position of this one; what its counter was seen to be then."""
        if position >= shared and position >= seen:
            counter = self._done(unit, unit.index + 1, position, gmem, scratch)
            seen = cute.arch.make_warp_uniform(await_count(counter, position + 1))
        return seen

    @cute.jit
    def _done(self, unit: Unit, tile: Int32, position: Int32, gmem: "Gmem", scratch: Scratch) -> cute.Pointer:
        """The counter of a tile of a unit's group for a position."""
        turns = scratch.turns
        index = position % self.turn_warps
        return turns.iterator + cute.crd2idx((index, tile, self._join_group(unit, gmem)), turns.layout)

    # ---- dQ's shared memory: a stage for the blocks of each stage of Q, or one for all ------------------------------

    def _dq_stage(self, stage: Int32) -> Int32 | int:
        """Where blocks with this stage of Q have their dQ."""
        return stage if self.stages_dq == 2 else 0

    def _empty(self, part: Int32 | int, stage: Int32) -> Int32 | int:
        """Barrier: a part of the shared memory for dQ of these blocks has been read."""
        return DQ_EMPTY + part + (ODD * stage if self.stages_dq == 2 else 0)

    def _full(self, part: Int32 | int, stage: Int32) -> Int32 | int:
        """Barrier: it holds dQ of such a block, or dV or dK."""
        return DQ_FULL + part + (ODD * stage if self.deterministic else 0)

    @cute.jit
    def _release_dq(self, part: Int32, stage: Int32) -> None:
        """Tell an MMA warpgroup, once it is so, that what it put into dQ's shared memory has been read."""
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        # With one stage for all blocks, who fills it waits here for the next one, whichever warp that is of.
        cute.arch.barrier_arrive(barrier_id=self._empty(part, stage), number_of_threads=FILLING)
