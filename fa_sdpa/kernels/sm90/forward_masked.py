"""Attention forward for Hopper with an attn_mask: `Forward` over the key blocks that a list names; see sm90/mask.py.

A tile visits its whole blocks first, then those with bits, then the biased ones, each kind in a loop of its own; whole
blocks run the code of a call without a mask. For those with bits a thread loads one word of bits for each of its rows
from global memory before it waits for the block's scores. Biased blocks have a pipeline of their own:

    bias  1-2 stages  TMA, 1 arrival + bytes → 4·w warps; released when they are added to the scores

They are loaded after the K and V that are waited for with them: K_{i+1}, V_i, B_{i+1}. In shared memory they are
swizzled like K, so that the pairs of a warp's threads, 8 rows of 4 pairs, lie in different banks (fp32: two in each).
They are read beside the block's multiplications where there are registers for them (config.py), or else when these are
done. Where keys are hidden beside the biases, words of bits are loaded when the scores are there: few blocks have any,
and they come last.

Biases are added in units of Q Kᵀ. Where some are far from 0, scores are then cut off at ± bias_limit, a power of two
that stands for a bias of 2^18 … 2^19: huge numbers would lose, in s·c - m·c, what exp2 is to see of them. That of a
power of two is exact, so rows with nothing but keys far beyond the limit weigh them equally, as any fp32 softmax does.
NaN stays NaN.

A NaN in V stays behind the mask where a key is hidden from all of a tile: the list says so of a block, whose rows of V
are then zeroed before they are multiplied (hidden_keys.py).

Costs differ between tiles as with a causal mask, so the scheduler takes its order for that: later query blocks first.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, pipeline

from ..common import softmax
from ..common.fragments import rows_by_columns
from ..common.mask import mask_bits
from ..common.scheduler import Tiles, find_tile
from ..key import KernelKey
from . import forward
from .config import LIST_HEADER, forward_config_of
from .forward import BIAS_DTYPES, STORE, Atoms, Forward, Gmem, Operands, Pipelines, Scoring, Smem, TileMask
from .hidden_keys import clear_keys
from .tma import load_tile

Blocks = tuple[Int32, Int32, Int32, Int32, Int32, Int32, Int32]  # of a tile: see MaskedForward._key_blocks


class MaskedForward(Forward):
    """Kernels of one key with ``attn_mask``."""

    def __init__(self, key: KernelKey):
        super().__init__(key)
        config = forward_config_of(key)
        self.later_cost_more = True
        if self.bias_stages:
            self.bias_pair = Int64 if self.bias_dtype is Float32 else Int32
            self.reads_early = config.reads_biases_early
            # Columns of a swizzled row of biases in shared memory; a tile is as many slabs as there are in tile_n.
            self.bias_width = math.gcd(self.tile_n, 1024 // self.bias_dtype.width)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (b, h, s_q, d)
        mK: cute.Tensor,  # (b, h_kv, s_k, d)
        mV: cute.Tensor,  # (b, h_kv, s_k, dv)
        mO: cute.Tensor,  # (b, h, s_q, dv)
        mLSE: cute.Tensor,  # (b, h, s_q) fp32
        mLists: cute.Tensor,  # see TileMask, as the next
        mBits: cute.Tensor,
        mBias: cute.Tensor | None,  # (b, h, s_q, s_k), strides of 0 where broadcast
        softmax_scale_log2: Float32,
        num_sms: Int32,
        bias_factor: Float32 | None,
        bias_limit: Float32 | None,
        cap_factor: Float32 | None,  # see Scoring
        mSink: cute.Tensor | None,  # (h,) fp32
        stream,
    ):
        mask = TileMask(mLists, mBits, bias_factor, bias_limit)
        scoring = Scoring(softmax_scale_log2, None, cap_factor, mSink, mask)
        self.attend(mQ, mK, mV, mO, mLSE, scoring, None, num_sms, stream, mBias)

    @cute.jit
    def _entries(self, mask: TileMask, m_block: Int32, head: Int32, batch: Int32) -> cute.Tensor:
        """The list of a tile; of some tile where there is none with these indices."""
        m_block = cutlass.max(m_block, 0)
        head, batch = cutlass.min(head, mask.lists.shape[1] - 1), cutlass.min(batch, mask.lists.shape[0] - 1)
        return mask.lists[batch, head, m_block, None]

    @cute.jit
    def _key_blocks(
        self,
        m_block: Int32,
        head: Int32,
        batch: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
        num_parts: None,
    ) -> Blocks:
        """``(whole_end, bits_end, end, biased, m_block, head, batch)``: where each kind of blocks ends in a tile's
        list, and what its header says of the biased ones."""
        entries = self._entries(scoring.mask, m_block, head, batch)
        return entries[0], entries[1], entries[2], entries[3], m_block, head, batch

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
        num_parts: None,
    ) -> None:
        """Producer warp, as without a mask: K_0 and Q, then K_{i+1}, V_i, with each next tile's Q right after its K_0;
        i counts entries of a list. Biases follow the V that is waited for before them."""
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.q_stages)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        loaded = cute.make_rmem_tensor(1, Int32)  # blocks of biases
        loaded[0] = 0
        step = Int32(0)
        is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
        entries = self._entries(scoring.mask, m_block, head, batch)
        bits_end, n_block = entries[1], entries[LIST_HEADER] >> 1
        head_kv = head // qhead_per_kvhead
        load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, n_block, pipelines.k, k_state)
        k_state.advance()
        load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
        q_state.advance()
        self._load_biases(bits_end == 0, loaded, atoms, gmem, smem, pipelines, n_block, m_block, head, batch)
        while is_valid:
            gK, gV = gmem.k[None, None, head_kv, batch], gmem.v[None, None, head_kv, batch]
            entries = self._entries(scoring.mask, m_block, head, batch)
            bits_end = entries[1]
            for i in cutlass.range(1, entries[2], unroll=1):
                next_block = entries[LIST_HEADER + i] >> 1
                load_tile(atoms.k, gK, smem.k, next_block, pipelines.k, k_state)
                k_state.advance()
                load_tile(atoms.v, gV, smem.v, n_block, pipelines.v, v_state)
                v_state.advance()
                is_biased = i >= bits_end
                self._load_biases(is_biased, loaded, atoms, gmem, smem, pipelines, next_block, m_block, head, batch)
                n_block = next_block
            last = n_block
            step += 1
            is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
            entries = self._entries(scoring.mask, m_block, head, batch)
            is_biased, n_block = is_valid & (entries[1] == 0), entries[LIST_HEADER] >> 1
            head_kv = head // qhead_per_kvhead
            if is_valid:
                load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, n_block, pipelines.k, k_state)
                load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
            k_state.advance()
            q_state.advance()
            load_tile(atoms.v, gV, smem.v, last, pipelines.v, v_state)
            v_state.advance()
            self._load_biases(is_biased, loaded, atoms, gmem, smem, pipelines, n_block, m_block, head, batch)

    @cute.jit
    def _load_biases(
        self,
        is_biased: Boolean,
        loaded: cute.Tensor,  # (1,) Int32, counts blocks of biases
        atoms: Atoms,
        gmem: Gmem,
        smem: Smem,
        pipelines: Pipelines,
        n_block: Int32,
        m_block: Int32,
        head: Int32,
        batch: Int32,
    ) -> None:
        """Load the biases of a block, if it is a biased one."""
        if cutlass.const_expr(self.bias_stages):
            if is_biased:
                state = self._bias_state(loaded, first_phase=1)
                gBias = gmem.bias[None, None, head, batch]
                load_tile(atoms.bias, gBias, smem.bias, m_block, pipelines.bias, state, n_block)
                loaded[0] = loaded[0] + 1

    def _bias_state(self, count: cute.Tensor, first_phase: int) -> pipeline.PipelineState:
        """The state of the biases' pipeline after so many blocks, (1,) Int32."""
        index, phase = count[0] % self.bias_stages, count[0] // self.bias_stages % 2 ^ first_phase
        return pipeline.PipelineState(self.bias_stages, count[0], index, phase)

    def _operands(self, mma_qk: cute.TiledMma, mma_pv: cute.TiledMma, smem: Smem, warpgroup_idx: Int32) -> Operands:
        regs = super()._operands(mma_qk, mma_pv, smem, warpgroup_idx)
        regs = regs._replace(v=smem.v, visited=cute.make_rmem_tensor(1, Int32))
        regs.visited[0] = Int32(0)
        if not self.bias_stages:
            return regs
        biased = cute.make_rmem_tensor(1, Int32)
        biased[0] = 0
        start = cute.recast_ptr(smem.bias.iterator, dtype=self.bias_pair)  # swizzled by who reads it
        pairs = cute.make_tensor(start, cute.make_layout(cute.size(smem.bias) // 2))
        return regs._replace(bias=pairs, biased=biased)

    @cute.jit
    def _first_weights(
        self,
        acc_S: cute.Tensor,
        regs: Operands,
        pipelines: Pipelines,
        blocks: Blocks,
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> None:
        """P, m and l of a tile's first block; O = 0."""
        whole_end, bits_end, _, biased, m_block, head, batch = blocks
        mask = scoring.mask
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(acc_S, scoring.cap_factor)
        regs.visited[0] = Int32(0)
        if whole_end == 0:
            regs.visited[0] = self._entries(mask, m_block, head, batch)[LIST_HEADER]
            if cutlass.const_expr(self.bias_stages):
                if bits_end == 0:
                    regs.visited[0] = regs.visited[0] + 2 * self._num_blocks(seqlen_k)
                    biases = self._biases()
                    self._read_biases(biases, regs, pipelines, first_row)
                    self._add_biases(acc_S, biases, mask, biased)
                if (bits_end > 0) | (biased // 2 == 0):
                    mask_bits(acc_S, self._words(mask, head, batch, regs.visited[0] >> 1, first_row))
            else:
                mask_bits(acc_S, self._words(mask, head, batch, regs.visited[0] >> 1, first_row))
        softmax.first_weights(acc_S, regs.tOrP, regs.row_max, regs.row_sum, scoring.scale_log2)
        regs.acc_O.fill(0.0)

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
        blocks: Blocks,
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> tuple[pipeline.PipelineState, pipeline.PipelineState]:
        """All key blocks of a tile but its first; the states of K and V afterwards."""
        whole_end, bits_end, end, biased, m_block, head, batch = blocks
        mask = scoring.mask
        entries = self._entries(mask, m_block, head, batch)
        for _ in cutlass.range(1, whole_end, unroll=1):
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        for i in cutlass.range(cutlass.max(whole_end, 1), bits_end, unroll=1):
            entry = entries[LIST_HEADER + i]
            words = self._words(mask, head, batch, entry >> 1, first_row)
            self._clear_hidden(regs, pipelines, v_state, wg, blocks, seqlen_k, scoring)
            regs.visited[0] = entry
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            mask_bits(acc_S, words)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        if cutlass.const_expr(self.bias_stages):
            for i in cutlass.range(cutlass.max(bits_end, 1), end, unroll=1):
                self._clear_hidden(regs, pipelines, v_state, wg, blocks, seqlen_k, scoring)
                regs.visited[0] = entries[LIST_HEADER + i] + 2 * self._num_blocks(seqlen_k)
                acc_S = self._begin_block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg)
                biases = self._biases()
                if cutlass.const_expr(self.reads_early):
                    self._read_biases(biases, regs, pipelines, first_row)
                self._end_block(acc_S, pipelines, k_state, v_state, scoring)
                if cutlass.const_expr(not self.reads_early):
                    self._read_biases(biases, regs, pipelines, first_row)
                self._add_biases(acc_S, biases, mask, biased)
                if i >= biased // 2:
                    mask_bits(acc_S, self._words(mask, head, batch, regs.visited[0] >> 1, first_row))
                self._softmax(acc_S, regs, scoring)
                k_state.advance()
                v_state.advance()
        return k_state, v_state

    @cute.jit
    def _clear_hidden(
        self,
        regs: Operands,
        pipelines: Pipelines,
        v_state: pipeline.PipelineState,
        wg: Int32,
        blocks: Blocks,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> None:
        """Wait for V of the block that was visited last and zero its rows of hidden keys, if there are any.

        regs.visited is twice the number of that block, of the bits for biased tiles if it is biased, plus 1 if there
        are; 0 for a whole one."""
        visited = regs.visited[0]
        if visited & 1 != 0:
            pipelines.v.consumer_wait(v_state)
            _, _, _, _, m_block, head, batch = blocks
            entries = self._entries(scoring.mask, m_block, head, batch)
            first = LIST_HEADER + self._num_blocks(seqlen_k) + 4 * (visited >> 1)
            hidden = cute.make_tensor(entries.iterator + first, cute.make_layout(4))
            clear_keys(regs.v, v_state.index, hidden, STORE + wg)

    def _num_blocks(self, seqlen_k: Int32) -> Int32:
        return (seqlen_k + self.tile_n - 1) // self.tile_n

    @cute.jit
    def _words(self, mask: TileMask, head: Int32, batch: Int32, of_bits: Int32, first_row: Int32) -> cute.Tensor:
        """(2,) Int32: the bits of this thread's rows."""
        words = cute.make_rmem_tensor(2, Int32)
        rows = mask.bits[batch, head, of_bits, None, cute.arch.lane_idx() % 4]
        for r in cutlass.range_constexpr(2):
            words[r] = rows[first_row + 8 * r]
        return words

    def _biases(self) -> cute.Tensor:
        """Registers for a block of biases: (pairs of a row of a slab, rows of this thread, slabs)."""
        return cute.make_rmem_tensor((self.bias_width // 8, 2, self.tile_n // self.bias_width), self.bias_pair)

    @cute.jit
    def _read_biases(self, biases: cute.Tensor, regs: Operands, pipelines: Pipelines, first_row: Int32) -> None:
        """Wait for the next block of biases, read those of this thread's scores, and release it."""
        state = self._bias_state(regs.biased, first_phase=0)
        pipelines.bias.consumer_wait(state)
        regs.biased[0] = regs.biased[0] + 1
        width = self.bias_width // 2  # pairs of a row
        lane, row = cute.arch.lane_idx(), first_row % self.tile_m
        units = (
            lane // 4 * width * self.bias_pair.width // 1024
        )  # of 16 bytes, by which rows of 8 differ in their order
        own = lane % 4 ^ units * (128 // self.bias_pair.width)
        start = regs.bias.iterator + (state.index * self.tile_m * self.tile_n // 2 + row * width)
        slabs = cute.make_layout(cute.shape(biases)[1:], stride=(8 * width, self.tile_m * width))
        for v in cutlass.range_constexpr(width // 4):
            pairs = cute.make_tensor(start + (own ^ 4 * v), slabs)
            for r in cutlass.range_constexpr(cute.size(slabs, mode=[0])):
                for slab in cutlass.range_constexpr(cute.size(slabs, mode=[1])):
                    biases[v, r, slab] = pairs[r, slab]
        cute.arch.sync_warp()  # all lanes have read theirs
        pipelines.bias.consumer_release(state)

    @cute.jit
    def _add_biases(
        self,
        acc_S: cute.Tensor,
        biases: cute.Tensor,
        mask: TileMask,
        biased: Int32,  # odd if some are far from 0
    ) -> None:
        """Scores plus biases; within ± bias_limit if some are far from 0. Beyond the mask's rows and keys they may be
        anything: bits hide those keys."""
        scores = rows_by_columns(acc_S)
        for slab in cutlass.range_constexpr(cute.size(biases, mode=[2])):
            for v in cutlass.range_constexpr(cute.size(biases, mode=[0])):
                for r in cutlass.range_constexpr(2):
                    c = 2 * (cute.size(biases, mode=[0]) * slab + v)
                    first, second = self._unpack(biases[v, r, slab])
                    scores[r, c] = scores[r, c] + first * mask.bias_factor
                    scores[r, c + 1] = scores[r, c + 1] + second * mask.bias_factor
        if biased % 2 != 0:
            for i in cutlass.range_constexpr(cute.size(acc_S)):
                score = cute.arch.fmax(acc_S[i], -mask.bias_limit, nan=True)
                acc_S[i] = cute.arch.fmin(score, mask.bias_limit, nan=True)

    @cute.jit
    def _unpack(self, pair: Int32 | Int64) -> tuple[Float32, Float32]:
        """Two neighbouring biases."""
        if cutlass.const_expr(self.bias_dtype is cutlass.BFloat16):  # the upper half of an fp32, an operation each
            halves = cute.make_rmem_tensor(2, Int32)
            halves[0], halves[1] = pair << 16, pair & -65536
            values = cute.recast_tensor(halves, Float32)
        else:
            values = cute.make_rmem_tensor(2, self.bias_dtype)
            cute.recast_tensor(values, self.bias_pair)[0] = pair
        return values[0].to(Float32), values[1].to(Float32)


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``, as those of ``Forward``."""
    query, keys, value, out, lse, scale, num_sms, _, _, cap_factor, sink, stream = forward.example_arguments(key)

    def tensor(dtype: type[cutlass.Numeric], rank: int, last: object, unit: int) -> cute.Tensor:
        """With strides that are multiples of ``unit``, and so aligned."""
        shape = (*(cute.sym_int() for _ in range(rank - 1)), last)
        strides = tuple(cute.sym_int64(divisibility=unit) for _ in range(rank - 1))
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=unit * dtype.width // 8)

    bias_dtype = BIAS_DTYPES.get(key.attn_mask)
    return (
        *(query, keys, value, out, lse),
        tensor(Int32, 4, cute.sym_int(), 1),
        tensor(Int32, 5, 4, 1),
        tensor(bias_dtype, 4, cute.sym_int(), 128 // bias_dtype.width) if bias_dtype is not None else None,
        *(scale, num_sms),
        *((Float32(1.0), Float32(1.0)) if bias_dtype is not None else (None, None)),
        *(cap_factor, sink, stream),
    )
