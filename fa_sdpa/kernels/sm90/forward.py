"""Attention forward for Hopper.

For each query row, with c = softmax_scale · log2(e) and the keys j that the row sees:

    O = Σ_j 2^(s_j·c - m·c) · v_j / l,   l = Σ_j 2^(s_j·c - m·c),   lse = ln 2 · (m·c + log2 l),   s_j = q · k_j

m is a (possibly lagging, see common/softmax.py) maximum of s_j; keys are visited in blocks of tile_n, right to left.

Roles (one CTA per SM, w = tile_m / 64 MMA warpgroups):
    warpgroup 0      producer; its warp 0 issues all TMA loads, the other three warps idle
    warpgroups 1…w   64 query rows each: both WGMMAs, softmax, and their rows' TMA store

Pipelines (full/empty mbarrier pairs; "producer → consumer"):
    q   2 stages      TMA, 1 arrival + bytes → 4·w warps; released after the tile's last Q Kᵀ (large head dims: 1 stage)
    k   `stages`      TMA, 1 arrival + bytes → 4·w warps; released when both multiplications of the step are done
    v   `stages`      TMA, 1 arrival + bytes → 4·w warps; likewise
    bias              of a floating attn_mask: see sm90/forward_masked.py

Named barriers:
    TURN + i      MMA warpgroup i may issue its WGMMAs: i waits (128), its predecessor arrives (128). The warpgroups
                  thus take turns on the tensor cores, and one's softmax runs under the others' WGMMAs.
    STORE + i     the 128 threads of MMA warpgroup i around its O tile in shared memory, or rows of V that they zero

Timeline of one MMA warpgroup, n blocks a tile (' marks the next tile); during its softmax the others multiply:
    once          S_0 = Q K_0ᵀ;  softmax(S_0) → P_0
    i = 1 … n-1   S_i = Q K_iᵀ, O += P_{i-1} V_{i-1};  softmax(S_i) → P_i; O rescaled if m was too low
    boundary      O += P_{n-1} V_{n-1}, S_0' = Q' K_0'ᵀ;  O / l → shared memory → TMA store, while S_0' is computed;
                  softmax(S_0') → P_0'   (where config.next_scores says so, S_0' first, as in a step)

So a boundary is one more step of the same loop. The grid is persistent (common/scheduler.py), Q has two stages so that
the next tile's is there in time, and O has shared memory of its own, whose store is waited for one tile later. Where
there is no room for that, Q has one stage, O is stored from registers, and S_0' follows when Q' is there, which is
loaded meanwhile. Rows beyond seqlen_q are loaded as zeros and clipped by the store; keys beyond seqlen_k are loaded as
zeros and masked.

Head dims: shared memory holds whole 128-byte rows (64 columns), which TMA fills up with zeros; only the columns up to
the next multiple of 16 are multiplied. For V, that is a WGMMA narrower than the tile that its descriptors describe.

Static options of a key, whose values are arguments (Scoring):
    window        row i sees the keys i + left … i + right; blocks outside are skipped on both sides, those at either
                  edge are masked. A tile that sees no key visits one block, all masked: O = 0, lse = -inf
    softcap       S becomes tanh(S · softmax_scale / cap) before the mask, and c = cap · log2(e)
    sink          joins l when a tile is finished
    attn_mask     in sm90/forward_masked.py

Constraints: 16-bit Q, K, V; head_dim and head_dim_v multiples of 8 up to 256; contiguous last dimension, other strides
and base pointers multiples of 16 bytes (0 included); seqlen_k ≥ 1; scale > 0. Tile sizes: sm90/config.py.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.utils import SmemAllocator

from ..common import fragments, softmax
from ..common.blocks import Window, first_key_blocks, key_blocks, part_of_blocks
from ..common.mask import mask_left, mask_right, row_limits, row_starts
from ..common.scheduler import Tiles, find_tile, first_steps, spills_l2
from ..key import KernelKey
from .config import forward_config_of
from .tma import load_tile
from .wgmma import K_MAJOR, MN_MAJOR, issue, smem_layout, tiled_mma, transposed

WARPGROUP = 128  # threads
TURN, STORE = 1, 5  # first named barrier of each kind, one per MMA warpgroup; barrier 0 is the CTA's
DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}
BIAS_DTYPES = {**DTYPES, "fp32": Float32}


class Pipelines(NamedTuple):
    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    bias: pipeline.PipelineTmaAsync | None  # of a floating attn_mask, as in the next three


class Smem(NamedTuple):
    """Swizzled tiles in shared memory."""

    q: cute.Tensor  # (tile_m, width, q_stages)
    k: cute.Tensor  # (tile_n, width, stages)
    v: cute.Tensor  # (tile_n, width_v, stages)
    o: cute.Tensor | None  # (64, head_dim_v, MMA warpgroups); None: O is stored from registers
    bias: cute.Tensor | None  # (tile_m, tile_n, bias_stages) of the mask's dtype


class Gmem(NamedTuple):
    """TMA coordinate tensors; O, where it is stored from registers, as pairs of values, (s_q, dv / 2, h, b) Int32, or
    that of all parts, (s_q, dv + 4, h, b · parts) fp32."""

    q: cute.Tensor  # (s_q, d, h, b)
    k: cute.Tensor  # (s_k, d, h_kv, b)
    v: cute.Tensor  # (s_k, dv, h_kv, b)
    o: cute.Tensor  # (s_q, dv, h, b)
    bias: cute.Tensor | None  # (s_q, s_k, h, b)


class Atoms(NamedTuple):
    """TMA copies of one tile each; no copy of O where it is stored from registers."""

    q: cute.CopyAtom
    k: cute.CopyAtom
    v: cute.CopyAtom
    o: cute.CopyAtom | None
    bias: cute.CopyAtom | None


class TileMask(NamedTuple):
    """An attn_mask as sm90/mask.py prepares it, with strides of 0 where it is broadcast."""

    lists: cute.Tensor  # (b, h, query blocks, ≥ HEADER) Int32
    bits: cute.Tensor  # (b, h, key blocks or twice as many, rows, 4) Int32
    bias_factor: Float32 | None  # from a bias to what is added to a score: log2(e) / Scoring.scale_log2
    bias_limit: Float32 | None  # a power of two; biased scores are cut off there on both sides


class Scoring(NamedTuple):
    """From Q Kᵀ to the softmax: what is None is not in this kernel."""

    scale_log2: Float32  # c: log2(e) times softmax_scale, or times the cap that scores are a fraction of
    window: Window | None
    cap_factor: Float32 | None  # 2 · log2(e) · softmax_scale / cap
    sink: cute.Tensor | None  # (h,) fp32
    mask: TileMask | None = None


class Operands(NamedTuple):
    """What one MMA warpgroup multiplies with and into."""

    tSrQ: cute.Tensor  # descriptors of its rows of sQ, both stages
    tSrK: cute.Tensor  # descriptors of sK, all stages
    tOrV: cute.Tensor  # descriptors of sV transposed, all stages
    tOrP: cute.Tensor  # registers, A operand
    acc_O: cute.Tensor  # registers, fp32
    row_max: cute.Tensor  # of the rows of this thread; so are the next two
    row_sum: cute.Tensor
    block_sum: cute.Tensor
    bias: cute.Tensor | None = None  # shared memory, pairs of biases, not seen through the swizzle
    biased: cute.Tensor | None = None  # (1,) Int32: how many biased blocks there were
    v: cute.Tensor | None = None  # with a mask, V in shared memory, and
    visited: cute.Tensor | None = None  # (1,) Int32: the last block, see MaskedForward._clear_hidden


def shared_by_sequences(biases: cute.Tensor) -> Boolean:
    """Whether the sequences of a batch share (b, h, s_q, s_k) biases and heads do not: then those of a head are to be
    at work at the same time, so that biases come from L2."""
    return (biases.stride[0] == 0) & (biases.stride[1] != 0)


class Forward:
    """Kernel of one key. Calling it (from ``cute.compile``) takes (b, h, s, d) tensors; see ``__call__``."""

    def __init__(self, key: KernelKey):
        config = forward_config_of(key)
        self.name = key.name
        self.dtype = DTYPES[key.dtype]
        # Columns that are multiplied, that shared memory holds, and that O has in global memory:
        self.head_dim, self.head_dim_v = config.head_dim_mma, config.head_dim_v_mma
        self.width, self.width_v = config.head_dim_smem, config.head_dim_v_smem
        self.head_dim_out = key.head_dim_v
        self.q_stages, self.stores_by_tma = config.q_stages, config.stores_by_tma and not key.split
        self.bias_dtype, self.bias_stages = BIAS_DTYPES.get(key.attn_mask), config.bias_stages
        self.is_split = key.split
        self.next_scores = config.next_scores(key.is_causal)
        self.is_causal, self.has_window = key.is_causal, key.window
        self.later_cost_more = key.is_causal or key.window  # query blocks; of the scheduler's orders
        self.tile_m, self.tile_n, self.stages = config.tile_m, config.tile_n, config.stages
        self.mma_warpgroups = config.mma_warpgroups
        self.mma_registers, self.producer_registers = config.registers

    def _mma_qk(self) -> cute.TiledMma:
        """Q Kᵀ from shared memory, 64 rows per warpgroup."""
        return tiled_mma(self.dtype, (K_MAJOR, K_MAJOR), (self.mma_warpgroups, 1), self.tile_n)

    def _mma_pv(self, warpgroups: int, width: int) -> cute.TiledMma:
        """P V with P in registers, 64 rows per warpgroup and ``width`` columns of V."""
        return tiled_mma(self.dtype, (K_MAJOR, MN_MAJOR), (warpgroups, 1), width, a_in_registers=True)

    def _shared_storage(self, *layouts: cute.ComposedLayout | None) -> type:
        """Barriers and the buffers of sQ, sK, sV, sO, biases, given in this order; None is an empty one."""
        dtypes = (*(self.dtype,) * 4, self.bias_dtype or self.dtype)
        q, k, v, o, bias = (
            cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout) if layout is not None else 0], 1024]
            for dtype, layout in zip(dtypes, layouts, strict=True)
        )

        @cute.struct
        class SharedStorage:
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.q_stages]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            bias_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.bias_stages]
            sQ: q
            sK: k
            sV: v
            sO: o
            sBias: bias

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
        window_left: Int32 | None,  # row i sees the keys from i + window_left on: see Window
        window_right: Int32 | None,
        cap_factor: Float32 | None,  # see Scoring
        mSink: cute.Tensor | None,  # (h,) fp32
        stream,
    ):
        window = Window(window_left, window_right) if cutlass.const_expr(self.has_window) else None
        scoring = Scoring(softmax_scale_log2, window, cap_factor, mSink)
        self.attend(mQ, mK, mV, mO, mLSE, scoring, None, num_sms, stream)

    @cute.jit
    def attend(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,  # with parts: (b · parts, h, s_q, dv + 4) fp32
        mLSE: cute.Tensor,  # with parts: (b · parts, h, s_q)
        scoring: Scoring,
        num_parts: Int32 | None,  # into which the key blocks of a tile are split
        num_sms: Int32,
        stream,
        mBias: cute.Tensor | None = None,  # (b, h, s_q, s_k)
    ) -> None:
        """Launch the kernel."""

        def s_d_h_b(tensor: cute.Tensor) -> cute.Tensor:
            return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[2, 3, 1, 0]))

        layouts = [
            smem_layout(self.dtype, self.tile_m, self.width, self.q_stages),
            smem_layout(self.dtype, self.tile_n, self.width, self.stages),
            smem_layout(self.dtype, self.tile_n, self.width_v, self.stages),
            smem_layout(self.dtype, 64, self.head_dim_v, self.mma_warpgroups) if self.stores_by_tma else None,
            smem_layout(self.bias_dtype, self.tile_m, self.tile_n, self.bias_stages) if mBias is not None else None,
        ]
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        copies = [
            cpasync.make_tiled_tma_atom(op, s_d_h_b(tensor), cute.select(layout, mode=[0, 1]), (rows, width))
            if layout is not None
            else (None, s_d_h_b(tensor) if self.is_split else cute.recast_tensor(s_d_h_b(tensor), Int32))
            for op, tensor, layout, rows, width in (
                (load, mQ, layouts[0], self.tile_m, self.width),
                (load, mK, layouts[1], self.tile_n, self.width),
                (load, mV, layouts[2], self.tile_n, self.width_v),
                (store, mO, layouts[3], 64, self.head_dim_v),
            )
        ]
        by_head = None
        if cutlass.const_expr(mBias is not None):
            sizes = (self.tile_m, self.tile_n)
            layout = cute.select(layouts[4], mode=[0, 1])
            copies.append(cpasync.make_tiled_tma_atom(load, s_d_h_b(mBias), layout, sizes))
            by_head = shared_by_sequences(mBias)
        else:
            copies.append((None, None))
        mma_qk, mma_pv = self._mma_qk(), self._mma_pv(self.mma_warpgroups, self.head_dim_v)
        bytes_per_key = (self.head_dim + self.head_dim_v) * self.dtype.width // 8
        paired = spills_l2(mK.shape[0] * mK.shape[1], mK.shape[2], bytes_per_key)
        tiles = Tiles(cute.ceil_div(mQ.shape[2], self.tile_m), mQ.shape[1], mO.shape[0], paired, by_head)
        self.kernel(
            Atoms(*(atom for atom, _ in copies)),
            Gmem(*(tensor for _, tensor in copies)),
            mLSE,
            scoring,
            mma_qk,
            mma_pv,
            *layouts,
            tiles,
            mQ.shape[1] // mK.shape[1],
            num_parts,
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
        scoring: Scoring,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        sQ_layout: cute.ComposedLayout,
        sK_layout: cute.ComposedLayout,
        sV_layout: cute.ComposedLayout,
        sO_layout: cute.ComposedLayout | None,
        sBias_layout: cute.ComposedLayout | None,
        tiles: Tiles,
        qhead_per_kvhead: Int32,
        num_parts: Int32 | None,
    ):
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom in atoms:
                if cutlass.const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)
        layouts = (sQ_layout, sK_layout, sV_layout, sO_layout, sBias_layout)
        storage = SmemAllocator().allocate(self._shared_storage(*layouts))
        smem = Smem(
            storage.sQ.get_tensor(sQ_layout.outer, swizzle=sQ_layout.inner),
            storage.sK.get_tensor(sK_layout.outer, swizzle=sK_layout.inner),
            storage.sV.get_tensor(sV_layout.outer, swizzle=sV_layout.inner),
            storage.sO.get_tensor(sO_layout.outer, swizzle=sO_layout.inner) if self.stores_by_tma else None,
            storage.sBias.get_tensor(sBias_layout.outer, swizzle=sBias_layout.inner) if self.bias_stages else None,
        )
        pipelines = Pipelines(
            self._pipeline(storage.q_barriers, self.q_stages, self.tile_m * self.width, self.dtype),
            self._pipeline(storage.k_barriers, self.stages, self.tile_n * self.width, self.dtype),
            self._pipeline(storage.v_barriers, self.stages, self.tile_n * self.width_v, self.dtype),
            self._pipeline(storage.bias_barriers, self.bias_stages, self.tile_m * self.tile_n, self.bias_dtype),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(self.is_split):
            cute.arch.griddepcontrol_launch_dependents()

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp_idx == 0:
                self.load(atoms, gmem, smem, pipelines, tiles, scoring, qhead_per_kvhead, num_parts)
        else:
            cute.arch.setmaxregister_increase(self.mma_registers)
            self.mma(atoms.o, gmem, mLSE, smem, pipelines, tiles, mma_qk, mma_pv, scoring, num_parts)

    def _pipeline(
        self, barriers, stages: int, elements: int, dtype: type[cutlass.Numeric] | None
    ) -> pipeline.PipelineTmaAsync | None:
        """Pipeline from the producer to all MMA warps, of tiles of so many elements, filled-up zeros included."""
        if dtype is None:
            return None
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers.data_ptr(),
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * self.mma_warpgroups),
            tx_count=elements * dtype.width // 8,
            defer_sync=True,
        )

    @cute.jit
    def load(
        self,
        atoms: Atoms,
        gmem: Gmem,
        smem: Smem,
        pipelines: Pipelines,
        tiles: Tiles,
        scoring: Scoring,
        qhead_per_kvhead: Int32,
        num_parts: Int32 | None,
    ) -> None:
        """Producer warp: K_0 and Q of the first tile, then K_{i+1}, V_i over all blocks of all tiles, with each next
        tile's Q right after its K_0: the order in which the MMA warpgroups wait for them."""
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.q_stages)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        seqlen_k = gmem.k.shape[0]
        step = Int32(0)
        is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
        start, _, _, end = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
        head_kv, sequence = head // qhead_per_kvhead, self._of_parts(batch, num_parts)
        load_tile(atoms.k, gmem.k[None, None, head_kv, sequence], smem.k, end - 1, pipelines.k, k_state)
        k_state.advance()
        load_tile(atoms.q, gmem.q[None, None, head, sequence], smem.q, m_block, pipelines.q, q_state)
        q_state.advance()
        while is_valid:
            gK, gV = gmem.k[None, None, head_kv, sequence], gmem.v[None, None, head_kv, sequence]
            first = start
            for i in cutlass.range(end - 1 - start, unroll=1):
                load_tile(atoms.k, gK, smem.k, end - 2 - i, pipelines.k, k_state)
                k_state.advance()
                load_tile(atoms.v, gV, smem.v, end - 1 - i, pipelines.v, v_state)
                v_state.advance()
            step += 1
            is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
            start, _, _, end = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
            head_kv, sequence = head // qhead_per_kvhead, self._of_parts(batch, num_parts)
            if is_valid:
                load_tile(atoms.k, gmem.k[None, None, head_kv, sequence], smem.k, end - 1, pipelines.k, k_state)
                load_tile(atoms.q, gmem.q[None, None, head, sequence], smem.q, m_block, pipelines.q, q_state)
            k_state.advance()
            q_state.advance()
            load_tile(atoms.v, gV, smem.v, first, pipelines.v, v_state)
            v_state.advance()

    def _operands(self, mma_qk: cute.TiledMma, mma_pv: cute.TiledMma, smem: Smem, warpgroup_idx: Int32) -> Operands:
        wg_qk = mma_qk.get_slice(warpgroup_idx * WARPGROUP)
        wg_pv = self._mma_pv(self.mma_warpgroups, self.width_v).get_slice(warpgroup_idx * WARPGROUP)
        acc_S = self._scores(mma_qk)
        acc_O = cute.make_rmem_tensor(mma_pv.partition_shape_C((self.tile_m, self.head_dim_v)), Float32)
        rows = cute.size(fragments.rows_by_columns(acc_O), mode=[0])
        return Operands(
            tSrQ=wg_qk.make_fragment_A(wg_qk.partition_A(smem.q)),
            tSrK=wg_qk.make_fragment_B(wg_qk.partition_B(smem.k)),
            tOrV=wg_pv.make_fragment_B(wg_pv.partition_B(transposed(smem.v))),
            tOrP=cute.make_rmem_tensor(cute.make_layout(fragments.as_operand_a(acc_S).shape), self.dtype),
            acc_O=acc_O,
            row_max=cute.make_rmem_tensor(rows, Float32),
            row_sum=cute.make_rmem_tensor(rows, Float32),
            block_sum=cute.make_rmem_tensor(rows, Float32),
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
        scoring: Scoring,
        num_parts: Int32 | None,
    ) -> None:
        """MMA warpgroup: all tiles of this CTA, 64 rows of each."""
        tidx, _, _ = cute.arch.thread_idx()
        tidx = tidx - WARPGROUP
        wg = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        tile_row = tidx // 32 * 16 + tidx % 32 // 4  # this thread's first row in a tile; its second is 8 further on
        regs = self._operands(mma_qk, mma_pv, smem, wg)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.q_stages)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        seqlen_k = gmem.k.shape[0]
        if wg == 0:
            self._pass_turn(wg, to_next=False)

        step = Int32(0)
        is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
        acc_S = self._scores(mma_qk)
        pipelines.q.consumer_wait(q_state)
        pipelines.k.consumer_wait(k_state)
        self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
        warpgroup.wait_group(0)
        pipelines.k.consumer_release(k_state)
        k_state.advance()
        blocks = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
        self._first_weights(acc_S, regs, pipelines, blocks, m_block * self.tile_m + tile_row, seqlen_k, scoring)
        while is_valid:
            first_row = m_block * self.tile_m + tile_row
            blocks = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
            k_state, v_state = self._visit(
                mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, blocks, first_row, seqlen_k, scoring
            )
            pipelines.q.consumer_release(q_state)
            q_state.advance()
            self._clear_hidden(regs, pipelines, v_state, wg, blocks, seqlen_k, scoring)

            # The last P V of this tile and the first Q Kᵀ of the next one. After the last tile that multiplies what the
            # stages still hold and nothing reads the result: a branch around it would make ptxas serialise every WGMMA
            # of the kernel.
            mLSE_done = mLSE[batch, head, None]
            gO = gmem.o[None, None, head, batch]
            sink = scoring.sink[head] if cutlass.const_expr(scoring.sink is not None) else None
            row_block = m_block * self.mma_warpgroups + wg
            step += 1
            is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
            acc_S = self._scores(mma_qk)
            if cutlass.const_expr(self.next_scores != "late"):
                self._wait_tile(pipelines, q_state, k_state, is_valid)
            self._wait_turn(wg)
            if cutlass.const_expr(self.next_scores == "before"):
                self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
            pipelines.v.consumer_wait(v_state)
            self._issue_pv(mma_pv, regs, v_state)
            if cutlass.const_expr(self.next_scores == "after"):
                self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
            self._pass_turn(wg, to_next=True)
            warpgroup.wait_group(1 if self.next_scores == "after" else 0)
            pipelines.v.consumer_release(v_state)
            v_state.advance()
            if cutlass.const_expr(self.next_scores == "before"):
                if is_valid:
                    pipelines.k.consumer_release(k_state)
            softmax.finish_rows(regs.acc_O, regs.row_max, regs.row_sum, scoring.scale_log2, sink)
            self._store_lse(mLSE_done, regs.row_sum, first_row)
            if cutlass.const_expr(self.stores_by_tma):
                self.epilogue(store_atom, regs.acc_O, smem.o, gO, row_block, wg)
            elif cutlass.const_expr(self.is_split):
                self._store_part(regs.acc_O, gO, first_row)
            else:
                self._store_rows(regs.acc_O, gO, first_row)
            if cutlass.const_expr(self.next_scores == "before"):
                blocks = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
                self._first_weights(acc_S, regs, pipelines, blocks, m_block * self.tile_m + tile_row, seqlen_k, scoring)
            else:
                if cutlass.const_expr(self.next_scores == "late"):
                    self._wait_tile(pipelines, q_state, k_state, is_valid)
                    self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
                warpgroup.wait_group(0)
                if is_valid:
                    pipelines.k.consumer_release(k_state)
                    blocks = self._key_blocks(m_block, head, batch, seqlen_k, scoring, num_parts)
                    self._first_weights(
                        acc_S, regs, pipelines, blocks, m_block * self.tile_m + tile_row, seqlen_k, scoring
                    )
            k_state.advance()
        if cutlass.const_expr(self.stores_by_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _key_blocks(
        self,
        m_block: Int32,
        head: Int32,
        batch: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
        num_parts: Int32 | None,
    ) -> tuple[Int32, Int32, Int32, Int32]:
        """``(start, unmasked_start, unmasked_end, end)``: the tile visits the key blocks from start to end; those
        between the middle two need no mask."""
        end, unmasked_end = key_blocks(m_block, seqlen_k, self.tile_m, self.tile_n, self.is_causal, scoring.window)
        start, unmasked_start = Int32(0), Int32(0)
        if cutlass.const_expr(self.has_window):
            start, unmasked_start = first_key_blocks(m_block, end, self.tile_m, self.tile_n, scoring.window)
        if cutlass.const_expr(self.is_split):
            start, end = part_of_blocks(end, batch % num_parts, num_parts)
        return start, unmasked_start, unmasked_end, end

    def _of_parts(self, batch: Int32, num_parts: Int32 | None) -> Int32:
        """The sequence whose parts the scheduler counts as batches of their own."""
        return batch // num_parts if self.is_split else batch

    def _clear_hidden(self, *args) -> None:
        """Nothing without a mask."""

    @cute.jit
    def _visit(
        self,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        regs: Operands,
        pipelines: Pipelines,
        q_state: pipeline.PipelineState,
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
        wg: Int32,
        blocks: tuple[Int32, Int32, Int32, Int32],  # see _key_blocks
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> tuple[pipeline.PipelineState, pipeline.PipelineState]:
        """All key blocks of a tile but its first; the states of K and V afterwards."""
        start, unmasked_start, unmasked_end, end = blocks
        masked = cutlass.max(end - 1 - unmasked_end, 0)
        if cutlass.const_expr(self.has_window):
            masked = cutlass.min(masked, end - 1 - start)
        for i in cutlass.range(masked, unroll=1):
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            self._mask(acc_S, first_row, seqlen_k, end - 2 - i, scoring.window)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        unmasked = end - 1 - masked - start
        if cutlass.const_expr(self.has_window):
            unmasked = cutlass.max(end - 1 - masked - cutlass.max(start, unmasked_start), 0)
        for _ in cutlass.range(unmasked, unroll=1):
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        if cutlass.const_expr(self.has_window):
            visited = masked + unmasked
            for i in cutlass.range(end - 1 - visited - start, unroll=1):
                acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
                self._mask(acc_S, first_row, seqlen_k, end - 2 - visited - i, scoring.window)
                self._softmax(acc_S, regs, scoring)
                k_state.advance()
                v_state.advance()
        return k_state, v_state

    @cute.jit
    def _wait_tile(
        self,
        pipelines: Pipelines,
        q_state: pipeline.PipelineState,
        k_state: pipeline.PipelineState,
        is_valid: Boolean,
    ) -> None:
        """Wait for Q and the first K of a tile, if there is one."""
        if is_valid:
            pipelines.q.consumer_wait(q_state)
            pipelines.k.consumer_wait(k_state)

    @cute.jit
    def _first_weights(
        self,
        acc_S: cute.Tensor,
        regs: Operands,
        pipelines: Pipelines,
        blocks: tuple[Int32, Int32, Int32, Int32],
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> None:
        """P, m and l of a tile's first block; O = 0."""
        _, unmasked_start, unmasked_end, end = blocks
        is_masked = unmasked_end < end
        if cutlass.const_expr(self.has_window):
            is_masked = is_masked | (unmasked_start >= end)
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(acc_S, scoring.cap_factor)
        if is_masked:
            self._mask(acc_S, first_row, seqlen_k, end - 1, scoring.window)
        softmax.first_weights(acc_S, regs.tOrP, regs.row_max, regs.row_sum, scoring.scale_log2)
        regs.acc_O.fill(0.0)

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
        scoring: Scoring,
    ) -> cute.Tensor:
        """In this warpgroup's turn: S = Q Kᵀ of the next block, O += P V of the last; S when both are done, capped."""
        acc_S = self._begin_block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg)
        self._end_block(acc_S, pipelines, k_state, v_state, scoring)
        return acc_S

    @cute.jit
    def _begin_block(
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
        """The multiplications of `_block`, issued; what S will be in."""
        acc_S = self._scores(mma_qk)
        pipelines.k.consumer_wait(k_state)
        self._wait_turn(wg)
        self._issue_qk(mma_qk, acc_S, regs, q_state, k_state)
        pipelines.v.consumer_wait(v_state)
        self._issue_pv(mma_pv, regs, v_state)
        self._pass_turn(wg, to_next=True)
        return acc_S

    @cute.jit
    def _end_block(
        self,
        acc_S: cute.Tensor,
        pipelines: Pipelines,
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
        scoring: Scoring,
    ) -> None:
        """Wait for the multiplications of `_block`."""
        warpgroup.wait_group(0)
        pipelines.k.consumer_release(k_state)
        pipelines.v.consumer_release(v_state)
        fragments.end_of_block(scoring.scale_log2 < 0.0)  # or the stages would be released after the softmax
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(acc_S, scoring.cap_factor)

    @cute.jit
    def _softmax(self, acc_S: cute.Tensor, regs: Operands, scoring: Scoring) -> None:
        softmax.next_weights(
            acc_S, regs.tOrP, regs.acc_O, regs.row_max, regs.row_sum, regs.block_sum, scoring.scale_log2
        )

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
        issue(mma_qk, acc_S, tSrQ, tSrK, self.head_dim // 16, zero_init=True)

    @cute.jit
    def _issue_pv(self, mma_pv: cute.TiledMma, regs: Operands, v_state: pipeline.PipelineState) -> None:
        tOrV = regs.tOrV[None, None, None, v_state.index]
        issue(mma_pv, regs.acc_O, regs.tOrP, tOrV, self.tile_n // 16, zero_init=False)

    @cute.jit
    def _mask(
        self, acc_S: cute.Tensor, first_row: Int32, seqlen_k: Int32, n_block: Int32, window: Window | None
    ) -> None:
        limits = row_limits(2, first_row, seqlen_k, n_block, self.tile_n, self.is_causal, window)
        mask_right(acc_S, limits)
        if cutlass.const_expr(self.has_window):
            mask_left(acc_S, row_starts(2, first_row, n_block, self.tile_n, window))

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
        sO: cute.Tensor,  # (64, head_dim_v, MMA warpgroups)
        mO: cute.Tensor,  # (s_q, dv) of one head, TMA coordinates
        row_block: Int32,
        wg: Int32,
    ) -> None:
        """Round O, write it to this warpgroup's shared memory once its last store has read that; store it by TMA."""
        rO = cute.make_rmem_tensor(acc_O.layout, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        tidx = fragments.read_thread_idx() % WARPGROUP
        is_storing_warp = tidx // 32 == 0
        if is_storing_warp:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.barrier(barrier_id=STORE + wg, number_of_threads=WARPGROUP)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, self._mma_pv(1, self.head_dim_v)).get_slice(tidx)
        cute.copy(copy, copy.retile(rO), copy.partition_D(sO[None, None, wg]))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=STORE + wg, number_of_threads=WARPGROUP)
        if is_storing_warp:
            gO = cute.local_tile(mO, (64, self.head_dim_v), (None, 0))
            tOsO, tOgO = cpasync.tma_partition(
                store_atom, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2)
            )
            cute.copy(store_atom, tOsO[None, wg], tOgO[None, row_block])
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _store_part(self, acc_O: cute.Tensor, mO: cute.Tensor, first_row: Int32) -> None:
        """Write this thread's two rows of a part's O, (s_q, dv + 4) fp32 of one head; 32 neighbouring bytes a quad."""
        values = fragments.rows_by_columns(acc_O)
        for r in cutlass.range_constexpr(2):
            row = first_row + 8 * r
            if row < mO.shape[0]:
                for v in cutlass.range_constexpr(self.head_dim_out // 8):
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair[0], pair[1] = values[r, 2 * v], values[r, 2 * v + 1]
                    start = mO.iterator + cute.crd2idx((row, 8 * v + 2 * (cute.arch.lane_idx() % 4)), mO.layout)
                    cute.autovec_copy(pair, cute.make_tensor(start.align(8), cute.make_layout(2)))

    @cute.jit
    def _store_rows(
        self,
        acc_O: cute.Tensor,
        mO: cute.Tensor,  # (s_q, dv / 2) of one head, pairs of values as Int32
        first_row: Int32,
    ) -> None:
        """Round O and write this thread's two rows from registers, 64 neighbouring bytes of a row per quad at a time;
        what is left of head dims that are no multiple of 32, 16 bytes at a time."""
        rO = cute.make_rmem_tensor(acc_O.layout, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        pairs = cute.recast_tensor(rO, Int32)
        lane = cute.arch.lane_idx() % 4
        octets = self.head_dim_out // 8
        for r in cutlass.range_constexpr(2):
            row = first_row + 8 * r
            for v in cutlass.range_constexpr(0, octets // 4 * 4, 4):
                quarter = cute.make_rmem_tensor(4, Int32)
                for i in cutlass.range_constexpr(4):
                    quarter[i] = pairs[2 * (v + i) + r]
                fragments.transpose_in_quad(quarter)
                if row < mO.shape[0]:
                    start = mO.iterator + cute.crd2idx((row, 4 * (v + lane)), mO.layout)
                    cute.autovec_copy(quarter, cute.make_tensor(start.align(16), cute.make_layout(4)))
            if row < mO.shape[0]:
                for v in cutlass.range_constexpr(octets // 4 * 4, octets):
                    mO[row, 4 * v + lane] = pairs[2 * v + r]


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
        Int32(0) if key.window else None,
        Int32(0) if key.window else None,
        Float32(1.0) if key.softcap else None,
        cute.runtime.make_fake_tensor(Float32, (heads,), (1,), assumed_align=4) if key.sink else None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
