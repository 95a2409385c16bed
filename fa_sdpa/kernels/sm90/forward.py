"""Attention forward for Hopper.

For each query row, with c = softmax_scale · log2(e) and the keys j that the row sees:

    O = Σ_j 2^(s_j·c - m·c) · v_j / l,   l = Σ_j 2^(s_j·c - m·c),   lse = ln 2 · (m·c + log2 l),   s_j = q · k_j

m is the (possibly lagging, see common/softmax.py) maximum of s_j; keys are visited in blocks of tile_n, right to left.

Roles (one CTA per SM, w = tile_m / 64 MMA warpgroups):
    warpgroup 0      producer; its warp 0 issues all TMA loads, the other three warps idle
    warpgroups 1…w   64 query rows each: both WGMMAs, softmax, and their rows' TMA store

Pipelines (full/empty mbarrier pairs; "producer → consumer"):
    q   2 stages      TMA, 1 arrival + bytes → 4·w warps; released after the tile's last Q Kᵀ
    k   `stages`      TMA, 1 arrival + bytes → 4·w warps; released after Q Kᵀ of the block
    v   `stages`      TMA, 1 arrival + bytes → 4·w warps; released after P V of the block

Named barriers:
    TURN + i      MMA warpgroup i may issue its WGMMAs: i waits (128), its predecessor arrives (128). The warpgroups
                  thus take turns on the tensor cores, and one's softmax runs under the others' WGMMAs.
    STORE + i     the 128 threads of MMA warpgroup i around its O tile in shared memory

Timeline of one MMA warpgroup, n blocks a tile (‖: at the same time; ' marks the next tile):
    once          S_0 = Q K_0ᵀ;  softmax(S_0) → P_0
    i = 1 … n-1   S_i = Q K_iᵀ,  O += P_{i-1} V_{i-1}    ‖  softmax(S_i) → P_i; O rescaled if its maximum grew
    boundary      S_0' = Q' K_0'ᵀ,  O += P_{n-1} V_{n-1}  ‖  softmax(S_0'); O / l → shared memory → TMA store; → P_0'

So a boundary is one more step of the same loop. The grid is persistent (common/scheduler.py), Q has two stages so that
the next tile's is there in time, and O has shared memory of its own, whose store is waited for one tile later. Rows
beyond seqlen_q are loaded as zeros and clipped by the TMA store; keys beyond seqlen_k are loaded as zeros and masked.

Constraints: 16-bit Q, K, V; head_dim == head_dim_v, a multiple of 64; contiguous last dimension, other strides and base
pointers multiples of 16 bytes (0 included); seqlen_k ≥ 1; scale > 0. Tile sizes: sm90/config.py.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_helpers
from cutlass import Float32, Int32, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.utils import LayoutEnum, SmemAllocator

from ..common import fragments, softmax
from ..common.blocks import key_blocks
from ..common.mask import mask_right, row_limits
from ..common.scheduler import Tiles, find_tile, first_steps, spills_l2
from ..key import KernelKey
from .config import Q_STAGES, ForwardConfig

WARPGROUP = 128  # threads
TURN, STORE = 1, 5  # first named barrier of each kind, one per MMA warpgroup; barrier 0 is the CTA's
DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


class Pipelines(NamedTuple):
    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync


class Smem(NamedTuple):
    """Swizzled tiles in shared memory."""

    q: cute.Tensor  # (tile_m, d, 2)
    k: cute.Tensor  # (tile_n, d, stages)
    v: cute.Tensor  # (tile_n, dv, stages)
    o: cute.Tensor  # (64, dv, MMA warpgroups)


class Gmem(NamedTuple):
    """TMA coordinate tensors."""

    q: cute.Tensor  # (s_q, d, h, b)
    k: cute.Tensor  # (s_k, d, h_kv, b)
    v: cute.Tensor  # (s_k, dv, h_kv, b)
    o: cute.Tensor  # (s_q, dv, h, b)


class Atoms(NamedTuple):
    """TMA copies of one tile each."""

    q: cute.CopyAtom
    k: cute.CopyAtom
    v: cute.CopyAtom
    o: cute.CopyAtom


class Operands(NamedTuple):
    """What one MMA warpgroup multiplies with and into."""

    tSrQ: cute.Tensor  # descriptors of its rows of sQ, both stages
    tSrK: cute.Tensor  # descriptors of sK, all stages
    tOrV: cute.Tensor  # descriptors of sV transposed, all stages
    tOrP: cute.Tensor  # registers, A operand
    acc_O: cute.Tensor  # registers, fp32
    row_max: cute.Tensor  # of the rows of this thread; so are the next four
    row_sum: cute.Tensor
    block_max: cute.Tensor  # of a tile's first block, while the last tile's row_max is still needed
    block_sum: cute.Tensor
    growth: cute.Tensor


class Forward:
    """Kernel of one key. Calling it (from ``cute.compile``) takes (b, h, s, d) tensors; see ``__call__``."""

    def __init__(self, key: KernelKey):
        config = ForwardConfig(key.head_dim, key.head_dim_v, key.tile_m, key.tile_n, key.stages)
        self.name = key.name
        self.dtype = DTYPES[key.dtype]
        self.head_dim = key.head_dim
        self.is_causal = key.is_causal
        self.tile_m, self.tile_n, self.stages = config.tile_m, config.tile_n, config.stages
        self.mma_warpgroups = config.mma_warpgroups
        self.mma_registers, self.producer_registers = config.registers

    def _smem_layout(self, rows: int, stages: int) -> cute.ComposedLayout:
        """(rows, head_dim, stages), swizzled for TMA and WGMMA."""
        kind = sm90_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.head_dim)
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        return cute.tile_to_shape(atom, (rows, self.head_dim, stages), order=(0, 1, 2))

    def _tiled_mmas(self) -> tuple[cute.TiledMma, cute.TiledMma]:
        """Q Kᵀ from shared memory, P V with P in registers; 64 rows per warpgroup."""
        k_major, mn_major = cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.MN
        layout = (self.mma_warpgroups, 1, 1)
        mma_qk = sm90_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, k_major, k_major, Float32, layout, (64, self.tile_n)
        )
        mma_pv = sm90_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            k_major,
            mn_major,
            Float32,
            layout,
            (64, self.head_dim),
            warpgroup.OperandSource.RMEM,
        )
        return mma_qk, mma_pv

    def _shared_storage(self, *layouts: cute.ComposedLayout) -> type:
        """Barriers and the buffers of sQ, sK, sV, sO, given in this order."""
        q, k, v, o = (
            cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout)], 1024] for layout in layouts
        )

        @cute.struct
        class SharedStorage:
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * Q_STAGES]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            sQ: q
            sK: k
            sV: v
            sO: o

        return SharedStorage

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (b, h, s_q, d)
        mK: cute.Tensor,  # (b, h_kv, s_k, d)
        mV: cute.Tensor,  # (b, h_kv, s_k, dv)
        mO: cute.Tensor,  # (b, h, s_q, dv)
        mLSE: cute.Tensor,  # (b, h, s_q) fp32
        softmax_scale_log2: Float32,
        num_sms: Int32,
        stream,
    ):
        def s_d_h_b(tensor: cute.Tensor) -> cute.Tensor:
            return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[2, 3, 1, 0]))

        layouts = (
            self._smem_layout(self.tile_m, Q_STAGES),
            self._smem_layout(self.tile_n, self.stages),
            self._smem_layout(self.tile_n, self.stages),
            self._smem_layout(64, self.mma_warpgroups),
        )
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        copies = [
            cpasync.make_tiled_tma_atom(op, s_d_h_b(tensor), cute.select(layout, mode=[0, 1]), (rows, self.head_dim))
            for op, tensor, layout, rows in (
                (load, mQ, layouts[0], self.tile_m),
                (load, mK, layouts[1], self.tile_n),
                (load, mV, layouts[2], self.tile_n),
                (store, mO, layouts[3], 64),
            )
        ]
        mma_qk, mma_pv = self._tiled_mmas()
        paired = spills_l2(mK.shape[0] * mK.shape[1], mK.shape[2], 2 * self.head_dim * self.dtype.width // 8)
        tiles = Tiles(cute.ceil_div(mQ.shape[2], self.tile_m), mQ.shape[1], mQ.shape[0], paired)
        self.kernel(
            Atoms(*(atom for atom, _ in copies)),
            Gmem(*(tensor for _, tensor in copies)),
            mLSE,
            softmax_scale_log2,
            mma_qk,
            mma_pv,
            *layouts,
            tiles,
            mQ.shape[1] // mK.shape[1],
        ).launch(
            grid=[cutlass.min(first_steps(tiles), num_sms), 1, 1],
            block=[WARPGROUP * (1 + self.mma_warpgroups), 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        atoms: Atoms,
        gmem: Gmem,
        mLSE: cute.Tensor,
        softmax_scale_log2: Float32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        sQ_layout: cute.ComposedLayout,
        sK_layout: cute.ComposedLayout,
        sV_layout: cute.ComposedLayout,
        sO_layout: cute.ComposedLayout,
        tiles: Tiles,
        qhead_per_kvhead: Int32,
    ):
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom in atoms:
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(self._shared_storage(sQ_layout, sK_layout, sV_layout, sO_layout))
        smem = Smem(
            storage.sQ.get_tensor(sQ_layout.outer, swizzle=sQ_layout.inner),
            storage.sK.get_tensor(sK_layout.outer, swizzle=sK_layout.inner),
            storage.sV.get_tensor(sV_layout.outer, swizzle=sV_layout.inner),
            storage.sO.get_tensor(sO_layout.outer, swizzle=sO_layout.inner),
        )
        pipelines = Pipelines(
            self._pipeline(storage.q_barriers, Q_STAGES, self.tile_m),
            self._pipeline(storage.k_barriers, self.stages, self.tile_n),
            self._pipeline(storage.v_barriers, self.stages, self.tile_n),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp_idx == 0:
                self.load(atoms, gmem, smem, pipelines, tiles, qhead_per_kvhead)
        else:
            cute.arch.setmaxregister_increase(self.mma_registers)
            self.mma(atoms.o, gmem, mLSE, smem, pipelines, tiles, mma_qk, mma_pv, softmax_scale_log2)

    def _pipeline(self, barriers, stages: int, rows: int) -> pipeline.PipelineTmaAsync:
        """Pipeline of (rows, head_dim) tiles from the producer warp to all MMA warps."""
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers.data_ptr(),
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * self.mma_warpgroups),
            tx_count=rows * self.head_dim * self.dtype.width // 8,
            defer_sync=True,
        )

    @cute.jit
    def load(
        self, atoms: Atoms, gmem: Gmem, smem: Smem, pipelines: Pipelines, tiles: Tiles, qhead_per_kvhead: Int32
    ) -> None:
        """Producer warp: K_0 and Q of the first tile, then K_{i+1}, V_i over all blocks of all tiles, with each next
        tile's Q right after its K_0: the order in which the MMA warpgroups wait for them."""
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, Q_STAGES)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        seqlen_k = gmem.k.shape[0]
        step, is_valid, m_block, head, batch = find_tile(Int32(0), tiles, self.is_causal)
        end, _ = key_blocks(m_block, seqlen_k, self.tile_m, self.tile_n, self.is_causal)
        head_kv = head // qhead_per_kvhead
        self._load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, end - 1, pipelines.k, k_state)
        k_state.advance()
        self._load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
        q_state.advance()
        while is_valid:
            gK, gV = gmem.k[None, None, head_kv, batch], gmem.v[None, None, head_kv, batch]
            for i in cutlass.range(end - 1, unroll=1):
                self._load_tile(atoms.k, gK, smem.k, end - 2 - i, pipelines.k, k_state)
                k_state.advance()
                self._load_tile(atoms.v, gV, smem.v, end - 1 - i, pipelines.v, v_state)
                v_state.advance()
            step, is_valid, m_block, head, batch = find_tile(step + 1, tiles, self.is_causal)
            end, _ = key_blocks(m_block, seqlen_k, self.tile_m, self.tile_n, self.is_causal)
            head_kv = head // qhead_per_kvhead
            if is_valid:
                self._load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, end - 1, pipelines.k, k_state)
                self._load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
            k_state.advance()
            q_state.advance()
            self._load_tile(atoms.v, gV, smem.v, Int32(0), pipelines.v, v_state)
            v_state.advance()

    @cute.jit
    def _load_tile(
        self,
        atom: cute.CopyAtom,
        mX: cute.Tensor,  # (s, d) of one head
        sX: cute.Tensor,  # (rows, d, stages)
        index: Int32,
        pipe: pipeline.PipelineTmaAsync,
        state: pipeline.PipelineState,
    ) -> None:
        """Wait for the state's stage to be empty, then load row tile ``index`` into it."""
        gX = cute.local_tile(mX, (cute.size(sX, mode=[0]), self.head_dim), (None, 0))
        tXsX, tXgX = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
        )
        pipe.producer_acquire(state)
        cute.copy(atom, tXgX[None, index], tXsX[None, state.index], tma_bar_ptr=pipe.producer_get_barrier(state))

    def _operands(self, mma_qk: cute.TiledMma, mma_pv: cute.TiledMma, smem: Smem, warpgroup_idx: Int32) -> Operands:
        sV = smem.v
        transposed = cute.make_ordered_layout((self.head_dim, self.tile_n, self.stages), order=(1, 0, 2))
        wg_qk = mma_qk.get_slice(warpgroup_idx * WARPGROUP)
        wg_pv = mma_pv.get_slice(warpgroup_idx * WARPGROUP)
        acc_S = self._scores(mma_qk)
        acc_O = cute.make_rmem_tensor(wg_pv.partition_shape_C((self.tile_m, self.head_dim)), Float32)
        rows = cute.size(fragments.rows_by_columns(acc_O), mode=[0])
        return Operands(
            tSrQ=wg_qk.make_fragment_A(wg_qk.partition_A(smem.q)),
            tSrK=wg_qk.make_fragment_B(wg_qk.partition_B(smem.k)),
            tOrV=wg_pv.make_fragment_B(wg_pv.partition_B(cute.composition(sV, transposed))),
            tOrP=cute.make_rmem_tensor(cute.make_layout(fragments.as_operand_a(acc_S).shape), self.dtype),
            acc_O=acc_O,
            row_max=cute.make_rmem_tensor(rows, Float32),
            row_sum=cute.make_rmem_tensor(rows, Float32),
            block_max=cute.make_rmem_tensor(rows, Float32),
            block_sum=cute.make_rmem_tensor(rows, Float32),
            growth=cute.make_rmem_tensor(rows, Float32),
        )

    def _scores(self, mma_qk: cute.TiledMma) -> cute.Tensor:
        """Registers for one block of scores of a warpgroup. Made anew for each, or ptxas keeps the old one alive."""
        return cute.make_rmem_tensor(mma_qk.partition_shape_C((self.tile_m, self.tile_n)), Float32)

    @cute.jit
    def mma(
        self,
        store_atom: cute.CopyAtom,
        gmem: Gmem,
        mLSE: cute.Tensor,
        smem: Smem,
        pipelines: Pipelines,
        tiles: Tiles,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        softmax_scale_log2: Float32,
    ) -> None:
        """MMA warpgroup: all tiles of this CTA, 64 rows of each."""
        tidx, _, _ = cute.arch.thread_idx()
        tidx = tidx - WARPGROUP
        wg = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        tile_row = tidx // 32 * 16 + tidx % 32 // 4  # this thread's first row in a tile; its second is 8 further on
        regs = self._operands(mma_qk, mma_pv, smem, wg)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, Q_STAGES)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        seqlen_k = gmem.k.shape[0]
        if wg == 0:
            self._pass_turn(wg, to_next=False)

        step, is_valid, m_block, head, batch = find_tile(Int32(0), tiles, self.is_causal)
        acc_S = self._scores(mma_qk)
        pipelines.q.consumer_wait(q_state)
        pipelines.k.consumer_wait(k_state)
        self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
        warpgroup.wait_group(0)
        pipelines.k.consumer_release(k_state)
        k_state.advance()
        self._first_weights(acc_S, regs, m_block, tile_row, seqlen_k, softmax_scale_log2)
        self._begin_tile(acc_S, regs)
        while is_valid:
            end, unmasked_end = key_blocks(m_block, seqlen_k, self.tile_m, self.tile_n, self.is_causal)
            first_row = m_block * self.tile_m + tile_row
            masked = cutlass.max(end - 1 - unmasked_end, 0)
            for i in cutlass.range(masked, unroll=1):
                acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg)
                self._mask(acc_S, first_row, seqlen_k, end - 2 - i)
                self._finish_block(acc_S, regs, pipelines, v_state, softmax_scale_log2)
                k_state.advance()
                v_state.advance()
            for _ in cutlass.range(end - 1 - masked, unroll=1):
                acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg)
                self._finish_block(acc_S, regs, pipelines, v_state, softmax_scale_log2)
                k_state.advance()
                v_state.advance()
            pipelines.q.consumer_release(q_state)
            q_state.advance()

            # The last P V of this tile together with the first Q Kᵀ of the next one. After the last tile that
            # multiplies what the stages still hold and nothing reads the result: a branch around it would make ptxas
            # serialise every WGMMA of the kernel.
            mLSE_done = mLSE[batch, head, None]
            gO = cute.local_tile(gmem.o[None, None, head, batch], (64, self.head_dim), (None, 0))
            row_block = m_block * self.mma_warpgroups + wg
            step, is_valid, m_block, head, batch = find_tile(step + 1, tiles, self.is_causal)
            acc_S = self._scores(mma_qk)
            if is_valid:
                pipelines.q.consumer_wait(q_state)
                pipelines.k.consumer_wait(k_state)
            self._wait_turn(wg)
            self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
            pipelines.v.consumer_wait(v_state)
            self._issue_pv(mma_pv, regs, v_state)
            self._pass_turn(wg, to_next=True)
            warpgroup.wait_group(1)
            if is_valid:
                pipelines.k.consumer_release(k_state)
            k_state.advance()
            self._first_weights(acc_S, regs, m_block, tile_row, seqlen_k, softmax_scale_log2)
            warpgroup.wait_group(0)
            pipelines.v.consumer_release(v_state)
            v_state.advance()
            softmax.finish_rows(regs.acc_O, regs.row_max, regs.row_sum, softmax_scale_log2)
            self._store_lse(mLSE_done, regs.row_sum, first_row)
            self.epilogue(store_atom, regs.acc_O, smem.o, gO, row_block, tidx, wg)
            self._begin_tile(acc_S, regs)
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _first_weights(
        self,
        acc_S: cute.Tensor,
        regs: Operands,
        m_block: Int32,
        tile_row: Int32,
        seqlen_k: Int32,
        softmax_scale_log2: Float32,
    ) -> None:
        """Weights of a tile's first block, in place, and its row statistics in block_max and block_sum."""
        end, unmasked_end = key_blocks(m_block, seqlen_k, self.tile_m, self.tile_n, self.is_causal)
        if unmasked_end < end:
            self._mask(acc_S, m_block * self.tile_m + tile_row, seqlen_k, end - 1)
        softmax.softmax_step(acc_S, regs.block_max, regs.block_sum, regs.growth, softmax_scale_log2, is_first=True)

    @cute.jit
    def _begin_tile(self, acc_S: cute.Tensor, regs: Operands) -> None:
        """Make the first block's weights and statistics the tile's."""
        self._round(acc_S, regs.tOrP)
        regs.acc_O.fill(0.0)
        regs.row_max.store(regs.block_max.load())
        regs.row_sum.store(regs.block_sum.load())

    @cute.jit
    def _block(
        self,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        regs: Operands,
        pipelines: Pipelines,
        q_state: pipeline.PipelineState,
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
        wg: Int32,
    ) -> cute.Tensor:
        """In this warpgroup's turn: S = Q Kᵀ of the next block, O += P V of the last one; S when it is there."""
        acc_S = self._scores(mma_qk)
        pipelines.k.consumer_wait(k_state)
        self._wait_turn(wg)
        self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
        pipelines.v.consumer_wait(v_state)
        self._issue_pv(mma_pv, regs, v_state)
        self._pass_turn(wg, to_next=True)
        warpgroup.wait_group(1)
        pipelines.k.consumer_release(k_state)
        return acc_S

    @cute.jit
    def _finish_block(
        self,
        acc_S: cute.Tensor,
        regs: Operands,
        pipelines: Pipelines,
        v_state: pipeline.PipelineState,
        softmax_scale_log2: Float32,
    ) -> None:
        """Softmax of S while P V runs, then the new P; O is rescaled only if a maximum grew.

        Within a basic block ptxas would put the wait for P V in front of the softmax, and l may be rescaled without a
        branch. Waiting for V, which is there already, makes it one that ptxas cannot remove. The wait for P V itself
        must stay outside: the warps of a warpgroup have to execute it together, and they differ in what grew.
        """
        grew = softmax.softmax_step(
            acc_S, regs.row_max, regs.block_sum, regs.growth, softmax_scale_log2, is_first=False
        )
        if grew:
            pipelines.v.consumer_wait(v_state)
            softmax.rescale_sums(regs.row_sum, regs.growth, softmax_scale_log2)
        warpgroup.wait_group(0)
        pipelines.v.consumer_release(v_state)
        if grew:
            fragments.scale_rows(regs.acc_O, regs.growth)
        regs.row_sum.store(regs.row_sum.load() + regs.block_sum.load())
        self._round(acc_S, regs.tOrP)

    @cute.jit
    def _issue_qk(
        self,
        mma_qk: cute.TiledMma,
        acc_S: cute.Tensor,
        regs: Operands,
        q_state: pipeline.PipelineState,
        k_state: pipeline.PipelineState,
    ) -> None:
        tSrQ, tSrK = regs.tSrQ[None, None, None, q_state.index], regs.tSrK[None, None, None, k_state.index]
        self._issue(mma_qk, acc_S, tSrQ, tSrK, zero_init=True)

    @cute.jit
    def _issue_pv(self, mma_pv: cute.TiledMma, regs: Operands, v_state: pipeline.PipelineState) -> None:
        self._issue(mma_pv, regs.acc_O, regs.tOrP, regs.tOrV[None, None, None, v_state.index], zero_init=False)

    @cute.jit
    def _issue(
        self,
        tiled_mma: cute.TiledMma,
        acc: cute.Tensor,
        tCrA: cute.Tensor,
        tCrB: cute.Tensor,
        zero_init: cutlass.Constexpr[bool],
    ) -> None:
        """Issue acc (+)= A B as one WGMMA group."""
        warpgroup.fence()
        atom = cute.make_mma_atom(tiled_mma.op)
        for k in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, not (zero_init and k == 0))
            cute.gemm(atom, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
        warpgroup.commit_group()

    @cute.jit
    def _round(self, acc_S: cute.Tensor, tOrP: cute.Tensor) -> None:
        """P in 16 bit, laid out as the A operand of P V. One k-slice at a time: 8 values convert as 4 packed pairs, a
        number of values that is no power of two would not."""
        weights = fragments.as_operand_a(acc_S)
        for k in cutlass.range_constexpr(cute.size(tOrP, mode=[2])):
            tOrP[None, None, k].store(weights[None, None, k].load().to(self.dtype))

    @cute.jit
    def _mask(self, acc_S: cute.Tensor, first_row: Int32, seqlen_k: Int32, n_block: Int32) -> None:
        limits = row_limits(2, first_row, seqlen_k, n_block, self.tile_n, self.is_causal)
        mask_right(acc_S, limits)

    @cute.jit
    def _wait_turn(self, wg: Int32) -> None:
        if cutlass.const_expr(self.mma_warpgroups > 1):
            cute.arch.barrier(barrier_id=TURN + wg, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _pass_turn(self, wg: Int32, to_next: cutlass.Constexpr[bool]) -> None:
        if cutlass.const_expr(self.mma_warpgroups > 1):
            receiver = (wg + 1) % self.mma_warpgroups if cutlass.const_expr(to_next) else wg
            cute.arch.barrier_arrive(barrier_id=TURN + receiver, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _store_lse(self, mLSE: cute.Tensor, lse: cute.Tensor, first_row: Int32) -> None:
        """One lane of each quad writes its rows' lse; ``mLSE`` is one head's (s_q,)."""
        if cute.arch.lane_idx() % 4 == 0:
            for r in cutlass.range_constexpr(cute.size(lse)):
                if first_row + 8 * r < mLSE.shape[0]:
                    mLSE[first_row + 8 * r] = lse[r]

    @cute.jit
    def epilogue(
        self,
        store_atom: cute.CopyAtom,
        acc_O: cute.Tensor,
        sO: cute.Tensor,  # (64, dv, MMA warpgroups)
        gO: cute.Tensor,  # (64, dv, row blocks), TMA coordinates
        row_block: Int32,
        tidx: Int32,
        wg: Int32,
    ) -> None:
        """Round O, write it to this warpgroup's shared memory once its last store has read that; store it by TMA."""
        rO = cute.make_rmem_tensor(acc_O.layout, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        is_storing_warp = tidx // 32 % 4 == 0
        if is_storing_warp:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.barrier(barrier_id=STORE + wg, number_of_threads=WARPGROUP)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        row_mma = sm90_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            cute.nvgpu.OperandMajorMode.K,
            cute.nvgpu.OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (64, self.head_dim),
            warpgroup.OperandSource.RMEM,
        )
        copy = cute.make_tiled_copy_C(atom, row_mma).get_slice(tidx % WARPGROUP)
        cute.copy(copy, copy.retile(rO), copy.partition_D(sO[None, None, wg]))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=STORE + wg, number_of_threads=WARPGROUP)
        if is_storing_warp:
            tOsO, tOgO = cpasync.tma_partition(
                store_atom, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2)
            )
            cute.copy(store_atom, tOsO[None, wg], tOgO[None, row_block])
            cute.arch.cp_async_bulk_commit_group()


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``: everything symbolic but the head dims and the unit stride."""
    dtype = DTYPES[key.dtype]
    batch, heads, heads_kv = cute.sym_int(), cute.sym_int(), cute.sym_int()
    seqlen_q, seqlen_k = cute.sym_int(), cute.sym_int()

    def tensor(num_heads: cute.SymInt, seqlen: cute.SymInt, head_dim: int) -> cute.Tensor:
        strides = tuple(cute.sym_int64(divisibility=8) for _ in range(3))
        shape = (batch, num_heads, seqlen, head_dim)
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=16)

    lse = cute.runtime.make_fake_tensor(
        Float32, (batch, heads, seqlen_q), (cute.sym_int64(), cute.sym_int64(), 1), assumed_align=4
    )
    return (
        tensor(heads, seqlen_q, key.head_dim),
        tensor(heads_kv, seqlen_k, key.head_dim),
        tensor(heads_kv, seqlen_k, key.head_dim_v),
        tensor(heads, seqlen_q, key.head_dim_v),
        lse,
        Float32(1.0),
        Int32(1),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
