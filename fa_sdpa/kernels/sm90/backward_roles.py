"""Warpgroups of the backward that have some of its five products each, instead of some of a tile's keys.

    multiply_dq      dQ, where the registers of the others have no room for it
    score            S, P and dV of 64 keys    } head dims whose dK and dV are
    differentiate    dP, dS and dK of them     } too many registers for one

Pᵀ and dSᵀ of 64 keys × tile_m queries are the register operands of dV and dK, and each of S, dP, dV and dK is one WGMMA
of all columns that it has: shared memory delivers Q, dO and K or V once for each, and not once for each warpgroup. P
goes to `differentiate` in 16 bit through shared memory, each thread's values to the same thread of the other warpgroup
(with a softcap times its derivative, which dV does without); dS goes to `multiply_dq` as usual. What registers are left
hold the first columns of K and V (config.k_slices, v_slices).

Timeline, block i (‖: at the same time; each warpgroup goes on at its own pace):
    score            wait for S_i; P_i = 2^(…), to shared memory; dV += P_i dO_i  ‖  S_{i+1} = K Q_{i+1}ᵀ
    differentiate    wait for dP_i and P_i; dS_i = P_i ∘ (dP_i - δ_i), to shared memory; dK += dS_i Q_i  ‖  dP_{i+1}
    multiply_dq      wait for dS_i; dQ_i = dS_i K, dq_chunk columns at a time, to shared memory or to its sums

A tile's last S and dP are products of whatever shared memory holds, which nothing reads, as in backward.py.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import warp, warpgroup

from ..common import fragments, softmax
from ..common.atomics import add_fragment
from ..common.mask import mask_left, mask_right, row_limits, row_starts
from ..common.scheduler import Tiles
from .backward_rows import WARPGROUP, Scratch
from .wgmma import K_MAJOR, issue, tiled_mma, transposed

if TYPE_CHECKING:
    from ..common.blocks import Window
    from .backward import Gmem, Mmas, Pipelines, Scoring, Smem

P_WRITTEN, DS_WRITTEN = 1, 2  # named barriers of one warpgroup
HIDDEN = -1e18  # a masked score that is capped: 2^(HIDDEN · c - lse) is 0, and HIDDEN² is finite


class Place(NamedTuple):
    """Where this thread's elements of S are: the first one's key; its second row is 8 keys further on."""

    tidx: Int32  # of the threads that compute S
    wg: Int32
    row: Int32  # of the tile's keys


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
        tiles: Tiles,
        mmas: "Mmas",
        window: "Window | None",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies dQ of every block, all of its columns."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        partition = self._partitions().dq.get_slice(0)
        tQrdS = partition.make_fragment_A(partition.partition_A(smem.ds))
        tQrK = partition.make_fragment_B(partition.partition_B(transposed(smem.k)))
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        heads = gmem.q.shape[2]
        blocks = cute.ceil_div(gmem.q.shape[0], self.tile_m)
        step, is_valid, n_block, head_kv, batch = self._find_tile(Int32(0), tiles)
        while is_valid:
            start, _, _, end = self._query_blocks(n_block, gmem, window)
            first_block = (batch * heads + head_kv * qhead_per_kvhead) * blocks
            pipelines.k.consumer_wait(kv_state)
            for i in cutlass.range(end - start, unroll=1):
                for g in cutlass.range(qhead_per_kvhead, unroll=1):
                    block = Int64(first_block + g * blocks + end - 1 - i)
                    sums = scratch.sums[None, thread, None, None, block]
                    cute.arch.mbarrier_wait(pipelines.ds_full + state.index, state.phase)
                    self._dq_of_block(mmas, tQrdS[None, None, None, state.index], tQrK, smem, pipelines, state, sums)
                    state.advance()
            pipelines.k.consumer_release(kv_state)
            kv_state.advance()
            step, is_valid, n_block, head_kv, batch = self._find_tile(step + 1, tiles)

    @cute.jit
    def _dq_of_block(
        self,
        mmas: "Mmas",
        tQrdS: cute.Tensor,
        tQrK: cute.Tensor,
        smem: "Smem",
        pipelines: "Pipelines",
        state: pipeline.PipelineState,  # of dS
        sums: cute.Tensor,  # (4, values / 4, 2) fp32, this thread's in global memory
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
            self._add_chunk(acc, c, smem, sums)

    @cute.jit
    def _add_chunk(self, acc: cute.Tensor, c: cutlass.Constexpr[int], smem: "Smem", sums: cute.Tensor) -> None:
        """Chunk ``c`` of dQ to the warps that add its two parts, or to memory right here."""
        first, size = c * cute.size(acc), cute.size(acc)
        if cutlass.const_expr(not self.stages_dq):
            target = sums[None, first % self.dq_values // 4, first // self.dq_values].iterator
            add_fragment(target, acc, WARPGROUP)
        for part in cutlass.range_constexpr(2 if self.stages_dq else 0):
            begin, end = part * self.dq_values, (part + 1) * self.dq_values
            if cutlass.const_expr(first < end and begin < first + size):
                values = range(max(begin, first), min(end, first + size), 4)
                self._stage_dq(acc.iterator, first, values, smem, cute.arch.thread_idx()[0] % WARPGROUP, part)

    @cute.jit
    def score(
        self,
        gmem: "Gmem",
        smem: "Smem",
        pipelines: "Pipelines",
        tiles: Tiles,
        mmas: "Mmas",
        scoring: "Scoring",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies S and dV of all tiles of this CTA."""
        place = self._place_alone()
        rP = self._scores(mmas, self.dtype)
        tSrK, tSrQ, tVrP, tVrdO = self._fragments(self._partitions().dv, smem.k, smem.q, smem.do, rP, smem.p)
        regs = ScoreOperands(
            tSrK=tSrK,
            tSrQ=tSrQ,
            tVrP=tVrP,
            tVrdO=tVrdO,
            rK=self._first_columns(self.k_slices),
            rP=rP,
            acc_S=self._scores(mmas, Float32),
            acc_dV=self._sums(mmas.dv, self.dv_columns),
        )
        context = (mmas, regs, smem, pipelines, scoring, place)
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        seqlen_k = gmem.k.shape[0]
        step, is_valid, n_block, head_kv, batch = self._find_tile(Int32(0), tiles)
        while is_valid:
            start, unmasked_start, unmasked_end, end = self._query_blocks(n_block, gmem, scoring.window)
            if cutlass.const_expr(not self.has_window):
                unmasked_end = end
            left = (end - start) * qhead_per_kvhead
            pipelines.k.consumer_wait(kv_state)
            self._load_columns(smem.k, regs.rK, place)
            if left > 0:
                pipelines.q.consumer_wait(state)
            self._issue_scores(mmas, regs, state)
            regs.acc_dV.fill(0.0)
            if cutlass.const_expr(self.has_window):
                for i in cutlass.range(end - unmasked_end, unroll=1):
                    limits = self._limits_of(n_block, end - 1 - i, place, seqlen_k, scoring.window)
                    for _ in cutlass.range(qhead_per_kvhead, unroll=1):
                        left -= 1
                        self._score_block(context, state, left, limits)
                        state.advance()
            for _ in cutlass.range((unmasked_end - unmasked_start) * qhead_per_kvhead, unroll=1):
                left -= 1
                self._score_block(context, state, left, None)
                state.advance()
            for i in cutlass.range(unmasked_start - start, unroll=1):
                limits = self._limits_of(n_block, unmasked_start - 1 - i, place, seqlen_k, scoring.window)
                for _ in cutlass.range(qhead_per_kvhead, unroll=1):
                    left -= 1
                    self._score_block(context, state, left, limits)
                    state.advance()
            warpgroup.wait_group(0)
            pipelines.k.consumer_release(kv_state)
            kv_state.advance()
            self._store_sums(regs.acc_dV, gmem.dv[None, None, head_kv, batch], n_block, place, Float32(1.0))
            step, is_valid, n_block, head_kv, batch = self._find_tile(step + 1, tiles)

    @cute.jit
    def _score_block(
        self,
        context: tuple,  # as Context, of ScoreOperands
        state: pipeline.PipelineState,  # of this block's Q and dO
        left: Int32,  # how many blocks of this tile come after this one
        limits: tuple[cute.Tensor, cute.Tensor | None] | None,  # see _limits; None: every row sees every key
    ) -> None:
        """P and dV of one block of queries, whose S is being multiplied already, and the next one's S."""
        mmas, regs, smem, pipelines, scoring, place = context
        stage = state.index
        warpgroup.wait_group(0)
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(regs.acc_S, scoring.cap_factor)
        if cutlass.const_expr(limits is not None):
            fill = -math.inf if scoring.cap_factor is None else HIDDEN
            if cutlass.const_expr(limits[0] is not None):
                mask_left(regs.acc_S, limits[0], fill)
            if cutlass.const_expr(limits[1] is not None):
                mask_right(regs.acc_S, limits[1], fill)
        if cutlass.const_expr(self.transposes_sums):
            self._weights_of_rows(regs.acc_S, self._row_statistics(smem, stage, 0, place), scoring)
        else:
            self._weights(regs, self._statistics(smem, stage, 0, place), scoring)
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
            self._store_scores(mmas, regs.rP, smem.p[None, None, stage], place)
            self._arrive(pipelines.p_full)
            cute.arch.barrier(barrier_id=P_WRITTEN, number_of_threads=WARPGROUP)
        else:
            self._exchange_p(smem, place, rounded, writes=True)
            self._arrive(pipelines.p_full)
        pipelines.do.consumer_wait(state)
        self._issue_sums(mmas.dv, regs.acc_dV, regs.tVrP, regs.tVrdO, stage, stage)
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
        smem: "Smem",
        pipelines: "Pipelines",
        tiles: Tiles,
        mmas: "Mmas",
        scoring: "Scoring",
        qhead_per_kvhead: Int32,
    ) -> None:
        """Warpgroup that multiplies dP and dK of all tiles of this CTA."""
        place = self._place_alone()
        rP, rdS = (self._scores(mmas, self.dtype) for _ in range(2))
        tPrV, tPrdO, tKrdS, tKrQ = self._fragments(self._partitions().dk, smem.v, smem.do, smem.q, rdS, smem.ds)
        regs = GradientOperands(
            tPrV=tPrV,
            tPrdO=tPrdO,
            tKrdS=tKrdS,
            tKrQ=tKrQ,
            rV=self._first_columns(self.v_slices),
            rP=rP,
            rdS=rdS,
            acc_dP=self._scores(mmas, Float32),
            acc_dK=self._sums(mmas.dk, self.dk_columns),
        )
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        step, is_valid, n_block, head_kv, batch = self._find_tile(Int32(0), tiles)
        while is_valid:
            start, _, _, end = self._query_blocks(n_block, gmem, scoring.window)
            left = (end - start) * qhead_per_kvhead
            pipelines.v.consumer_wait(kv_state)
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
            kv_state.advance()
            target = gmem.dk[None, None, head_kv, batch]
            self._store_sums(regs.acc_dK, target, n_block, place, scoring.softmax_scale)
            step, is_valid, n_block, head_kv, batch = self._find_tile(step + 1, tiles)

    @cute.jit
    def _issue_dp(self, mmas: "Mmas", regs: GradientOperands, state: pipeline.PipelineState) -> None:
        tPrdO = regs.tPrdO[None, None, None, state.index]
        self._issue_from(mmas, regs.acc_dP, regs.rV, regs.tPrV[None, None, None, 0], tPrdO, self.head_dim_v // 16)

    @cute.jit
    def _issue_scores(self, mmas: "Mmas", regs: ScoreOperands, state: pipeline.PipelineState) -> None:
        tSrQ = regs.tSrQ[None, None, None, state.index]
        self._issue_from(mmas, regs.acc_S, regs.rK, regs.tSrK[None, None, None, 0], tSrQ, self.head_dim // 16)

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
            A, B = first if cutlass.const_expr(k < held) else tCrA, tCrB
            if cutlass.const_expr(self.transposes_sums):
                A, B = tCrB, tCrA
            cute.gemm(atom, acc, A[None, None, k], B[None, None, k], acc)
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
        warpgroup.wait_group(0)
        pipelines.do.consumer_release(state)
        cute.arch.mbarrier_wait(pipelines.p_full, stage)
        if cutlass.const_expr(self.transposes_sums):
            atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
            copy = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(place.tidx)
            cute.copy(copy, copy.partition_S(smem.p[None, None, stage]), copy.retile(regs.rP))
            self._arrive(pipelines.p_empty)
            self._gradients_of_rows(regs, self._row_statistics(smem, stage, self.tile_m, place))
        else:
            self._exchange_p(smem, place, self._slices(regs.rP), writes=False)
            self._arrive(pipelines.p_empty)
            self._gradients_of_columns(regs, self._statistics(smem, stage, self.tile_m, place))
        cute.arch.mbarrier_wait(pipelines.ds_empty + stage, state.phase ^ 1)
        self._store_scores(mmas, regs.rdS, smem.ds[None, None, stage], place)
        self._arrive(pipelines.ds_full + stage)
        if cutlass.const_expr(self.transposes_sums):
            cute.arch.barrier(barrier_id=DS_WRITTEN, number_of_threads=WARPGROUP)
        self._issue_sums(mmas.dk, regs.acc_dK, regs.tKrdS, regs.tKrQ, stage, stage)
        following = state.clone()
        following.advance()
        if left > 0:
            pipelines.do.consumer_wait(following)
        self._issue_dp(mmas, regs, following)
        warpgroup.wait_group(1)  # dK
        cute.arch.sync_warp()  # all lanes have read δ
        pipelines.q.consumer_release(state)

    @cute.jit
    def _gradients_of_columns(self, regs: GradientOperands, delta: cute.Tensor) -> None:
        """dS = P ∘ (dP - δ) in 16 bit, keys × queries."""
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
    def _gradients_of_rows(self, regs: GradientOperands, delta: cute.Tensor) -> None:
        """dS = P ∘ (dP - δ) in 16 bit, queries × keys."""
        weights, gradients, rounded = self._slices(regs.rP), self._slices(regs.acc_dP), self._slices(regs.rdS)
        for k in cutlass.range_constexpr(cute.size(gradients, mode=[1])):
            wide = cute.make_rmem_tensor(8, Float32)
            wide.store(weights[None, k].load().to(Float32))
            for i in cutlass.range_constexpr(8):
                gradients[i, k] = wide[i] * (gradients[i, k] - delta[i // 2 % 2])
            rounded[None, k].store(gradients[None, k].load().to(self.dtype))

    @cute.jit
    def _weights_of_rows(self, acc_S: cute.Tensor, lse: cute.Tensor, scoring: "Scoring") -> None:
        """P in the place of S, queries × keys."""
        scores = self._slices(acc_S)
        for k in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            for i in cutlass.range_constexpr(8):
                exponent = scores[i, k] * scoring.scale_log2 - lse[i // 2 % 2]
                scores[i, k] = cute.math.exp2(exponent, fastmath=True)

    @cute.jit
    def _row_statistics(self, smem: "Smem", stage: Int32, first: int, place: Place) -> cute.Tensor:
        """lse, or δ from row ``first`` = tile_m on, of this thread's two queries; registers."""
        values = cute.make_rmem_tensor(2, Float32)
        for i in cutlass.range_constexpr(2):
            values[i] = smem.statistics[first + place.row + 8 * i, stage]
        return values

    def _scores(self, mmas: "Mmas", dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """Registers of S."""
        shape = (self.tile_m, self.tile_n) if self.transposes_sums else (self.tile_n, self.tile_m)
        return cute.make_rmem_tensor(mmas.sdp.partition_shape_C(shape), dtype)

    def _sums(self, mma: cute.TiledMma, columns: int) -> cute.Tensor:
        """Registers of dV or dK."""
        shape = (columns, self.tile_n) if self.transposes_sums else (self.tile_n, columns)
        return cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)

    def _fragments(
        self,
        sums: cute.TiledMma,
        keys: cute.Tensor,  # K, V
        queries: cute.Tensor,  # Q, dO
        factors: cute.Tensor,  # dO, Q
        rounded: cute.Tensor,  # registers of P, dS
        scores: cute.Tensor,  # shared memory of P, dS
    ) -> tuple[cute.Tensor, ...]:
        """Operands of S or dP, keys and queries, and of dV or dK, scores and factors."""
        sdp, sums = self._partitions().sdp.get_slice(0), sums.get_slice(0)
        if self.transposes_sums:
            return (
                sdp.make_fragment_B(sdp.partition_B(keys)),
                sdp.make_fragment_A(sdp.partition_A(queries)),
                sums.make_fragment_B(sums.partition_B(transposed(scores))),
                sums.make_fragment_A(sums.partition_A(transposed(factors))),
            )
        return (
            sdp.make_fragment_A(sdp.partition_A(keys)),
            sdp.make_fragment_B(sdp.partition_B(queries)),
            fragments.as_operand_a(rounded),
            sums.make_fragment_B(sums.partition_B(transposed(factors))),
        )

    @cute.jit
    def _issue_sums(
        self,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        scores: cute.Tensor,
        factors: cute.Tensor,
        stage: Int32,  # of scores in shared memory
        factors_stage: Int32,
    ) -> None:
        """Issue dV += Pᵀ dO or dK += dSᵀ Q, or the same transposed."""
        factors = factors[None, None, None, factors_stage]
        if cutlass.const_expr(self.transposes_sums):
            issue(mma, acc, factors, scores[None, None, None, stage], self.tile_m // 16, zero_init=False)
        else:
            issue(mma, acc, scores, factors, self.tile_m // 16, zero_init=False)

    @cute.jit
    def _limits_of(self, n_block: Int32, m_block: Int32, place: Place, seqlen_k: Int32, window: "Window | None"):
        """``(starts, ends)`` of what each of this thread's rows of S sees of the other mode; None: no such limit."""
        if cutlass.const_expr(self.transposes_sums):
            first, starts = m_block * self.tile_m + place.row, None
            ends = row_limits(2, first, seqlen_k, n_block, self.tile_n, self.is_causal, window)
            if cutlass.const_expr(self.has_window):
                starts = row_starts(2, first, n_block, self.tile_n, window)
            return starts, ends
        else:
            return self._limits(n_block * self.tile_n + place.row, m_block, place, seqlen_k, window)

    @cute.jit
    def _store_sums(self, acc: cute.Tensor, mX: cute.Tensor, n_block: Int32, place: Place, scale: Float32) -> None:
        """Round scale · dV or dK and write this thread's part."""
        first_key = n_block * self.tile_n
        if cutlass.const_expr(self.transposes_sums):
            self._store_transposed(acc, mX, first_key, place, scale)
        else:
            self._store(acc, mX, first_key + place.row, place, scale)

    @cute.jit
    def _store_transposed(
        self, acc: cute.Tensor, mX: cute.Tensor, first_key: Int32, place: Place, scale: Float32
    ) -> None:
        """Round scale · acc, columns × keys, and write it; two lanes write 32 neighbouring bytes at a time."""
        pairs = cute.recast_tensor(self._round(acc, scale), Int32)  # of neighbouring keys
        groups = self.tile_n // 8  # of eight keys
        quad, lane = place.tidx % 32 // 4, place.tidx % 4
        store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=128)
        for m in cutlass.range_constexpr(cute.size(pairs) // (2 * groups)):  # of 64 columns
            for v in cutlass.range_constexpr(0, groups, 2):
                values = cute.make_rmem_tensor(4, Int32)  # eight keys by eight columns each: a row's two columns
                for j in cutlass.range_constexpr(4):
                    values[j] = fragments.transpose_8x8(pairs[(m * groups + v) * 2 + j])
                fragments.transpose_in_quad(values)  # a row's eight columns of one of them
                key = first_key + 8 * (v + lane // 2) + quad
                chunk = m * 8 + place.tidx // 32 * 2 + lane % 2
                if key < mX.shape[0] and chunk * 4 < mX.shape[1]:
                    target = cute.zipped_divide(mX[key, None], (4,))[None, chunk].iterator
                    cute.copy(store, values, cute.make_tensor(target.align(16), cute.make_layout(4)))

    def _place_alone(self) -> Place:
        """Where this thread's elements of S or dP are, of which its warpgroup has all."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        return Place(thread, Int32(0), thread // 32 * 16 + thread % 32 // 4)

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
