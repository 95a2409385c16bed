"""Warpgroups of the backward that have some of its five products each, instead of some of a tile's keys.

    multiply_dq      dQ, where the registers of the others have no room for it
    score            S, P and dV of 64 keys    } head dims whose dK and dV are
    differentiate    dP, dS and dK of them     } too many registers for one

Pᵀ and dSᵀ of 64 keys × tile_m queries are the register operands of dV and dK, and each of S, dP, dV and dK is one WGMMA
of all columns that it has: shared memory delivers Q, dO and K or V once for each, and not once for each warpgroup. P
goes to `differentiate` in 16 bit through shared memory, each thread's values to the same thread of the other warpgroup
(with a softcap times its derivative, which dV does without); dS goes to `multiply_dq` as usual. What registers are left
hold the first columns of K and V (config.k_slices, v_slices). Tiles of 80 or 96 keys: backward_short.py.

Warpgroups 1 and 2 do the units about rows between tiles; `multiply_dq` goes on to its next tile.

Timeline, block i (‖: at the same time; each warpgroup goes on at its own pace):
    score            wait for S_i; P_i = 2^(…), to shared memory; dV += P_i dO_i  ‖  S_{i+1} = K Q_{i+1}ᵀ
    differentiate    wait for dP_i and P_i; dS_i = P_i ∘ (dP_i - δ_i), to shared memory; dK += dS_i Q_i  ‖  dP_{i+1}
    multiply_dq      wait for dS_i; dQ_i = dS_i K, dq_chunk columns at a time, to shared memory or to its sums

A tile's last S and dP are products of whatever shared memory holds, which nothing reads, as in backward.py.
"""

from typing import TYPE_CHECKING, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import warp, warpgroup

from ..common import fragments
from ..common.atomics import add_fragment
from .backward_order import END, MULTIPLY, Order, Unit, get_unit
from .backward_rows import WARPGROUP, Scratch, count_up
from .backward_short import DS_WRITTEN, P_WRITTEN
from .backward_turns import DQ_EMPTY, DQ_FULL, FILLING
from .wgmma import K_MAJOR, issue, tiled_mma, transposed

if TYPE_CHECKING:
    from ..common.blocks import Window
    from .backward import Gmem, Mmas, Pipelines, Scoring, Smem

HIDDEN = -1e18  # a masked score that is capped: 2^(HIDDEN · c - lse) is 0, and HIDDEN² is finite


class Place(NamedTuple):
    """Which of the threads that compute S this one is."""

    tidx: Int32  # of the threads that compute S
    wg: Int32


class ScoreOperands(NamedTuple):
    """Descriptors and registers of `score`; see Operands."""

    tSrK: cute.Tensor
    tSrQ: cute.Tensor
    tVrP: cute.Tensor
    tVrdO: cute.Tensor
    rK: cute.Tensor | None  # registers of the first columns of K
    rP: cute.Tensor
    acc_S: cute.Tensor
    acc_dV: cute.Tensor


class GradientOperands(NamedTuple):
    """Descriptors and registers of `differentiate`."""

    tPrV: cute.Tensor
    tPrdO: cute.Tensor
    tKrdS: cute.Tensor
    tKrQ: cute.Tensor
    rV: cute.Tensor | None  # registers of the first columns of V
    rP: cute.Tensor
    rdS: cute.Tensor
    acc_dP: cute.Tensor
    acc_dK: cute.Tensor


class Roles:
    """Part of Backward."""

    @cute.jit
    def multiply_dq(
        self,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        order: Order,
        mmas: "Mmas",
        window: "Window | None",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies dQ of every block, all of its columns."""
        partition = self._partitions().dq.get_slice(0)
        tQrdS = partition.make_fragment_A(partition.partition_A(smem.ds))
        tQrK = partition.make_fragment_B(partition.partition_B(transposed(smem.k)))
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        unit, tile = get_unit(pipelines.units)
        while unit.kind != END:
            if unit.kind == MULTIPLY:
                kv_state = pipeline.PipelineState(1, Int32(0), Int32(0), tile % 2)
                start, *_, end = self._query_blocks(unit, gmem, window)
                if cutlass.const_expr(not self.stages_dq):
                    self._await_slot(unit, order, gmem, scratch)
                if cutlass.const_expr(not self.stages_dq and self.deterministic):
                    shared, seen = self._next_start(unit, gmem, window) * qhead_per_kvhead, Int32(0)
                pipelines.k.consumer_wait(kv_state)
                total = (end - start) * qhead_per_kvhead
                for i in cutlass.range(total, unroll=1):
                    block = None
                    if cutlass.const_expr(not self.stages_dq):
                        block = self._block_in_ring(i, unit, start, end, qhead_per_kvhead, gmem)
                    if cutlass.const_expr(not self.stages_dq and self.deterministic):
                        seen = self._await_turn(unit, start * qhead_per_kvhead + i, shared, seen, gmem, scratch)
                    cute.arch.mbarrier_wait(pipelines.ds_full + state.index, state.phase)
                    tQrdS_stage = tQrdS[None, None, None, state.index]
                    self._dq_of_block(mmas, tQrdS_stage, tQrK, scratch, smem, pipelines, state, block)
                    if cutlass.const_expr(not self.stages_dq and self.deterministic):
                        cute.arch.barrier(barrier_id=DQ_EMPTY, number_of_threads=FILLING)
                        cute.arch.barrier_arrive(barrier_id=DQ_FULL, number_of_threads=FILLING)
                    state.advance()
                pipelines.k.consumer_release(kv_state)
                if cutlass.const_expr(not self.stages_dq):
                    count_up(scratch.added.iterator + unit.slot)
            unit, tile = get_unit(pipelines.units)

    @cute.jit
    def _dq_of_block(
        self,
        mmas: "Mmas",
        tQrdS: cute.Tensor,
        tQrK: cute.Tensor,
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        state: pipeline.PipelineState,  # of dS
        block: Int64 | None,  # of the ring; None: other warps add it
    ) -> None:
        """dQ, dq_chunk columns at a time."""
        chunks = self.dq_columns // self.dq_chunk
        acc = cute.make_rmem_tensor(mmas.dq.partition_shape_C((self.tile_m, self.dq_chunk)), Float32)
        for c in cutlass.range_constexpr(chunks):
            tQrK_chunk = cute.logical_divide(tQrK[None, None, None, 0], (None, 1))[None, (None, c), None]
            issue(mmas.dq, acc, tQrdS, tQrK_chunk, self.tile_n // 16, zero_init=True)
            warpgroup.wait_group(0)
            if cutlass.const_expr(c == chunks - 1):
                self._arrive(pipelines.ds_empty + state.index)
            if cutlass.const_expr(self.stages_dq):
                self._stage_chunk(acc, c, smem, state.index)
            else:
                first, thread = c * cute.size(acc), cute.arch.thread_idx()[0] % WARPGROUP
                group, part = first % self.dq_values // 4, first // self.dq_values
                add_fragment(scratch.sums[None, thread, group, part, block].iterator, acc, WARPGROUP)

    @cute.jit
    def _stage_chunk(self, acc: cute.Tensor, c: cutlass.Constexpr[int], smem: "Smem", stage: Int32) -> None:
        """Chunk ``c`` of dQ to the warps that add its two parts."""
        first, size = c * cute.size(acc), cute.size(acc)
        for part in cutlass.range_constexpr(2):
            begin, end = part * self.dq_values, (part + 1) * self.dq_values
            if cutlass.const_expr(first < end and begin < first + size):
                values = range(max(begin, first), min(end, first + size), 4)
                self._stage_dq(acc.iterator, first, values, smem, cute.arch.thread_idx()[0] % WARPGROUP, part, stage)

    @cute.jit
    def score(
        self,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        order: Order,
        mmas: "Mmas",
        scoring: "Scoring",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies S and dV of all tiles of this CTA, and does its part of the other units."""
        place = self._place_alone()
        regs = self._score_operands(mmas, smem)
        context = (mmas, regs, smem, pipelines, scoring, place)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        unit, tile = get_unit(pipelines.units)
        while unit.kind != END:
            self._do_rows(context, gmem, scratch, unit, state, qhead_per_kvhead)
            if unit.kind == MULTIPLY:
                state = self._score_tile(context, gmem, unit, tile, state, qhead_per_kvhead)
            unit, tile = get_unit(pipelines.units)

    def _score_operands(self, mmas: "Mmas", smem: "Smem") -> ScoreOperands:
        partition = self._partitions()
        if self.transposes_sums:
            rP, acc_S = (self._short_scores(mmas, dtype) for dtype in (self.dtype, Float32))
            tSrK, tSrQ, tVrP, tVrdO = self._short_operands(partition.dv, smem.k, smem.q, smem.p, smem.do)
            acc_dV = self._short_sums(mmas.dv, self.dv_columns)
            return ScoreOperands(tSrK, tSrQ, tVrP, tVrdO, None, rP, acc_S, acc_dV)
        sdp, dv = partition.sdp.get_slice(0), partition.dv.get_slice(0)
        rP = self._accumulator(mmas.sdp, self.tile_m, self.dtype)
        return ScoreOperands(
            tSrK=sdp.make_fragment_A(sdp.partition_A(smem.k)),
            tSrQ=sdp.make_fragment_B(sdp.partition_B(smem.q)),
            tVrP=fragments.as_operand_a(rP),
            tVrdO=dv.make_fragment_B(dv.partition_B(transposed(smem.do))),
            rK=self._first_columns(self.k_slices),
            rP=rP,
            acc_S=self._accumulator(mmas.sdp, self.tile_m),
            acc_dV=self._accumulator(mmas.dv, self.dv_columns),
        )

    @cute.jit
    def _score_tile(
        self,
        context: tuple,  # as Context, of ScoreOperands
        gmem: "Gmem",
        unit: Unit,
        tile: Int32,  # number of the tile among this CTA's
        state: pipeline.PipelineState,
        qhead_per_kvhead: Int32,
    ) -> pipeline.PipelineState:
        """S, P and dV of a tile; the state of Q and dO after it."""
        mmas, regs, smem, pipelines, scoring, place = context
        kv_state = pipeline.PipelineState(1, Int32(0), Int32(0), tile % 2)
        seqlen_k = gmem.k.shape[0]
        query_range = self._query_blocks(unit, gmem, scoring.window)
        start, *_, end = query_range
        masked = self._masked(query_range, qhead_per_kvhead)
        first_key, group = self._first_key(unit, place), self._join_group(unit, gmem)
        left = (end - start) * qhead_per_kvhead
        pipelines.k.consumer_wait(kv_state)
        self._clear_hidden(unit, gmem, (smem.k,), pipelines.k, kv_state, 0)
        self._load_columns(smem.k, regs.rK, place)
        if left > 0:
            pipelines.q.consumer_wait(state)
        self._issue_scores(mmas, regs, state)
        regs.acc_dV.fill(0.0)
        state = self._visit(context, query_range, masked, first_key, tile, state, seqlen_k, qhead_per_kvhead)
        warpgroup.wait_group(0)
        pipelines.k.consumer_release(kv_state)
        head, batch = self._split_group(group, gmem)
        self._store_sums(regs.acc_dV, gmem.dv[None, None, head, batch], first_key, Float32(1.0))
        return state

    @cute.jit
    def _score_block(
        self,
        context: tuple,  # as Context, of ScoreOperands
        state: pipeline.PipelineState,  # of this block's Q and dO
        left: Int32,  # how many blocks of this tile come after this one
        limits: tuple[cute.Tensor | None, cute.Tensor | None] | None,  # see _limits_of; None: every row sees every key
    ) -> None:
        """P and dV of one block of queries, whose S is being multiplied already, and the next one's S."""
        mmas, regs, smem, pipelines, scoring, place = context
        stage = state.index
        warpgroup.wait_group(0)
        self._weigh(regs, smem, pipelines, stage, limits, scoring, place)
        cute.arch.sync_warp()
        pipelines.q.consumer_release(state)
        rounded = cute.make_rmem_tensor(regs.acc_S.layout, self.dtype)  # P, or with a softcap P times its derivative
        values, rounded = self._slices(regs.acc_S), self._slices(rounded)
        for k in cutlass.range_constexpr(cute.size(values, mode=[1])):
            rounded[None, k].store(values[None, k].load().to(self.dtype))
            if cutlass.const_expr(not self.has_softcap):
                self._slices(regs.rP)[None, k].store(rounded[None, k].load())
        cute.arch.mbarrier_wait(pipelines.p_empty, stage ^ 1)
        if cutlass.const_expr(self.transposes_sums):
            self._short_write(mmas, regs.rP, smem.p[None, None, stage], place)
        else:
            self._exchange_p(smem, place, rounded, writes=True)
        self._arrive(pipelines.p_full)
        pipelines.do.consumer_wait(state)
        if cutlass.const_expr(self.transposes_sums):
            cute.arch.barrier(barrier_id=P_WRITTEN, number_of_threads=WARPGROUP)
            self._short_issue(mmas.dv, regs.acc_dV, regs.tVrP, regs.tVrdO, stage)
        else:
            tVrdO = regs.tVrdO[None, None, None, stage]
            issue(mmas.dv, regs.acc_dV, regs.tVrP, tVrdO, self.tile_m // 16, zero_init=False)
        following = state.clone()
        following.advance()
        if left > 0:
            pipelines.q.consumer_wait(following)
        self._issue_scores(mmas, regs, following)
        warpgroup.wait_group(1)  # dV
        pipelines.do.consumer_release(state)

    @cute.jit
    def differentiate(
        self,
        gmem: "Gmem",
        scratch: Scratch,
        smem: "Smem",
        pipelines: "Pipelines",
        order: Order,
        mmas: "Mmas",
        scoring: "Scoring",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies dP and dK of all tiles of this CTA, and does its part of the other units."""
        place = self._place_alone()
        regs = self._gradient_operands(mmas, smem)
        context = (mmas, regs, smem, pipelines, scoring, place)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        unit, tile = get_unit(pipelines.units)
        while unit.kind != END:
            self._do_rows(context, gmem, scratch, unit, state, qhead_per_kvhead)
            if unit.kind == MULTIPLY:
                state = self._differentiate_tile(context, gmem, unit, tile, state, qhead_per_kvhead)
            unit, tile = get_unit(pipelines.units)

    def _gradient_operands(self, mmas: "Mmas", smem: "Smem") -> GradientOperands:
        partition = self._partitions()
        if self.transposes_sums:
            rP, rdS, acc_dP = (self._short_scores(mmas, dtype) for dtype in (self.dtype, self.dtype, Float32))
            tPrV, tPrdO, tKrdS, tKrQ = self._short_operands(partition.dk, smem.v, smem.do, smem.ds, smem.q)
            acc_dK = self._short_sums(mmas.dk, self.dk_columns)
            return GradientOperands(tPrV, tPrdO, tKrdS, tKrQ, None, rP, rdS, acc_dP, acc_dK)
        sdp, dk = partition.sdp.get_slice(0), partition.dk.get_slice(0)
        rP, rdS = (self._accumulator(mmas.sdp, self.tile_m, self.dtype) for _ in range(2))
        return GradientOperands(
            tPrV=sdp.make_fragment_A(sdp.partition_A(smem.v)),
            tPrdO=sdp.make_fragment_B(sdp.partition_B(smem.do)),
            tKrdS=fragments.as_operand_a(rdS),
            tKrQ=dk.make_fragment_B(dk.partition_B(transposed(smem.q))),
            rV=self._first_columns(self.v_slices),
            rP=rP,
            rdS=rdS,
            acc_dP=self._accumulator(mmas.sdp, self.tile_m),
            acc_dK=self._accumulator(mmas.dk, self.dk_columns),
        )

    @cute.jit
    def _differentiate_tile(
        self,
        context: tuple,  # as Context, of GradientOperands
        gmem: "Gmem",
        unit: Unit,
        tile: Int32,  # number of the tile among this CTA's
        state: pipeline.PipelineState,
        qhead_per_kvhead: Int32,
    ) -> pipeline.PipelineState:
        """dP, dS and dK of a tile; the state of Q and dO after it."""
        mmas, regs, smem, pipelines, scoring, place = context
        kv_state = pipeline.PipelineState(1, Int32(0), Int32(0), tile % 2)
        start, *_, end = self._query_blocks(unit, gmem, scoring.window)
        first_key, group = self._first_key(unit, place), self._join_group(unit, gmem)
        left = (end - start) * qhead_per_kvhead
        pipelines.v.consumer_wait(kv_state)
        self._clear_hidden(unit, gmem, (smem.v,), pipelines.v, kv_state, 1)
        self._load_columns(smem.v, regs.rV, place)
        if left > 0:
            pipelines.do.consumer_wait(state)
        self._issue_dp(mmas, regs, state)
        regs.acc_dK.fill(0.0)
        for _ in cutlass.range((end - start) * qhead_per_kvhead, unroll=1):
            left -= 1
            self._differentiate_block(mmas, regs, smem, pipelines, place, state, left)
            state.advance()
        warpgroup.wait_group(0)
        pipelines.v.consumer_release(kv_state)
        head, batch = self._split_group(group, gmem)
        target = gmem.dk[None, None, head, batch]
        self._store_sums(regs.acc_dK, target, first_key, scoring.softmax_scale)
        return state

    @cute.jit
    def _issue_dp(self, mmas: "Mmas", regs: GradientOperands, state: pipeline.PipelineState) -> None:
        tPrdO = regs.tPrdO[None, None, None, state.index]
        tPrV, slices = regs.tPrV[None, None, None, 0], self.head_dim_v // 16
        if cutlass.const_expr(self.transposes_sums):
            issue(mmas.sdp, regs.acc_dP, tPrdO, tPrV, slices, zero_init=True)
        else:
            self._issue_from(mmas, regs.acc_dP, regs.rV, tPrV, tPrdO, slices)

    @cute.jit
    def _issue_scores(self, mmas: "Mmas", regs: ScoreOperands, state: pipeline.PipelineState) -> None:
        tSrQ = regs.tSrQ[None, None, None, state.index]
        tSrK, slices = regs.tSrK[None, None, None, 0], self.head_dim // 16
        if cutlass.const_expr(self.transposes_sums):
            issue(mmas.sdp, regs.acc_S, tSrQ, tSrK, slices, zero_init=True)
        else:
            self._issue_from(mmas, regs.acc_S, regs.rK, tSrK, tSrQ, slices)

    @cute.jit
    def _issue_from(
        self,
        mmas: "Mmas",
        acc: cute.Tensor,
        first: cute.Tensor | None,  # registers of the first slices of A
        tCrA: cute.Tensor,
        tCrB: cute.Tensor,
        slices: cutlass.Constexpr[int],
    ) -> None:
        """Issue acc = A Bᵀ over ``slices`` k-slices of 16 as one WGMMA group."""
        held = 0 if first is None else cute.size(first, mode=[2])
        warpgroup.fence()
        for k in cutlass.range_constexpr(slices):
            op = (self._from_registers() if k < held else mmas.sdp).op
            atom = cute.make_mma_atom(op)
            atom.set(warpgroup.Field.ACCUMULATE, k > 0)
            A = first if cutlass.const_expr(k < held) else tCrA
            cute.gemm(atom, acc, A[None, None, k], tCrB[None, None, k], acc)
        warpgroup.commit_group()

    def _from_registers(self) -> cute.TiledMma:
        """S or dP with K or V in registers."""
        return tiled_mma(self.dtype, (K_MAJOR, K_MAJOR), (1, 1), self.tile_m, a_in_registers=True)

    def _first_columns(self, slices: int) -> cute.Tensor | None:
        """Registers for so many slices of 16 columns of a tile of keys."""
        if not slices:
            return None
        shape = self._from_registers().partition_shape_A((self.tile_n, 16 * slices))
        return cute.make_rmem_tensor(shape, self.dtype)

    @cute.jit
    def _load_columns(self, tile: cute.Tensor, columns: cute.Tensor | None, place: Place) -> None:
        """The first columns of a tile of keys (tile_n, d, 1) to registers."""
        if cutlass.const_expr(columns is not None):
            atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
            copy = cute.make_tiled_copy_A(atom, self._from_registers()).get_slice(place.tidx)
            source, target = copy.partition_S(tile[None, None, 0]), copy.retile(columns)
            for k in cutlass.range_constexpr(cute.size(columns, mode=[2])):
                cute.copy(copy, source[None, None, k], target[None, None, k])

    @cute.jit
    def _differentiate_block(
        self,
        mmas: "Mmas",
        regs: GradientOperands,
        smem: "Smem",
        pipelines: "Pipelines",
        place: Place,
        state: pipeline.PipelineState,  # of this block's Q and dO
        left: Int32,  # how many blocks of this tile come after this one
    ) -> None:
        """dS and dK of one block of queries, whose dP is being multiplied already, and the next one's dP."""
        stage = state.index
        pipelines.q.consumer_wait(state)
        if cutlass.const_expr(self.transposes_sums):
            delta = self._short_statistics(smem, stage, self.tile_m)
        else:
            delta = self._statistics(smem, stage, self.tile_m, place)
        warpgroup.wait_group(0)
        pipelines.do.consumer_release(state)
        cute.arch.mbarrier_wait(pipelines.p_full, stage)
        if cutlass.const_expr(self.transposes_sums):
            self._short_read(mmas, smem.p[None, None, stage], regs.rP, place)
            self._arrive(pipelines.p_empty)
            self._short_gradients(regs.acc_dP, regs.rP, regs.rdS, delta)
        else:
            self._exchange_p(smem, place, self._slices(regs.rP), writes=False)
            self._arrive(pipelines.p_empty)
            self._gradients(regs, delta)
        cute.arch.mbarrier_wait(pipelines.ds_empty + stage, state.phase ^ 1)
        if cutlass.const_expr(self.transposes_sums):
            self._short_write(mmas, regs.rdS, smem.ds[None, None, stage], place)
        else:
            self._store_scores(mmas, regs.rdS, smem.ds[None, None, stage], place)
        self._arrive(pipelines.ds_full + stage)
        if cutlass.const_expr(self.transposes_sums):
            cute.arch.barrier(barrier_id=DS_WRITTEN, number_of_threads=WARPGROUP)
            self._short_issue(mmas.dk, regs.acc_dK, regs.tKrdS, regs.tKrQ, stage)
        else:
            tKrQ = regs.tKrQ[None, None, None, stage]
            issue(mmas.dk, regs.acc_dK, regs.tKrdS, tKrQ, self.tile_m // 16, zero_init=False)
        following = state.clone()
        following.advance()
        if left > 0:
            pipelines.do.consumer_wait(following)
        self._issue_dp(mmas, regs, following)
        warpgroup.wait_group(1)  # dK
        cute.arch.sync_warp()  # all lanes have read δ
        pipelines.q.consumer_release(state)

    @cute.jit
    def _gradients(self, regs: GradientOperands, delta: cute.Tensor) -> None:
        """dS = P ∘ (dP - δ) in 16 bit, of keys × queries."""
        weights, gradients, rounded = self._slices(regs.rP), self._slices(regs.acc_dP), self._slices(regs.rdS)
        for k in cutlass.range_constexpr(cute.size(gradients, mode=[1])):
            wide = cute.make_rmem_tensor(8, Float32)
            wide.store(weights[None, k].load().to(Float32))
            for half in cutlass.range_constexpr(2):
                pair = delta[None, 2 * k + half].load()
                for i in cutlass.range_constexpr(4 * half, 4 * half + 4):
                    gradients[i, k] = wide[i] * (gradients[i, k] - pair[i % 2])
            rounded[None, k].store(gradients[None, k].load().to(self.dtype))

    @cute.jit
    def _first_key(self, unit: Unit, place: Place) -> Int32:
        """First key of a tile, or where keys are rows of S the first one of this thread."""
        first_key = unit.index * self.tile_n
        if cutlass.const_expr(not self.transposes_sums):
            first_key += self._row(place.wg)
        return first_key

    @cute.jit
    def _limits_of(self, first_key: Int32, m_block: Int32, place: Place, seqlen_k: Int32, window: "Window | None"):
        """``(starts, ends)`` of the columns of S that each of this thread's two rows sees; None: no such limit.
        ``first_key``: see _first_key."""
        if cutlass.const_expr(self.transposes_sums):
            return self._short_limits(first_key, m_block, seqlen_k, window)
        else:
            return self._limits(first_key, m_block, place, seqlen_k, window)

    @cute.jit
    def _store_sums(self, acc: cute.Tensor, mX: cute.Tensor, first_key: Int32, scale: Float32) -> None:
        """Round scale · dV or dK and write this thread's part. ``first_key``: see _first_key."""
        if cutlass.const_expr(self.transposes_sums):
            self._short_store(acc, mX, first_key, scale)
        else:
            self._store(acc, mX, first_key, scale)

    def _place_alone(self) -> Place:
        """This thread's place where its warpgroup has all of S or dP."""
        return Place(cute.arch.thread_idx()[0] % WARPGROUP, Int32(0))

    @cute.jit
    def _exchange_p(self, smem: "Smem", place: Place, rounded: cute.Tensor, writes: cutlass.Constexpr[bool]) -> None:
        """Write or read this thread's values of P, (8, n) registers of 16 bit."""
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        for k in cutlass.range_constexpr(cute.size(rounded, mode=[1])):
            shared = smem.p[None, place.tidx, k]
            if cutlass.const_expr(writes):
                cute.copy(copy, rounded[None, k], shared)
            else:
                cute.copy(copy, shared, rounded[None, k])
