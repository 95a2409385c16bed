"""Attention forward for Hopper with an attn_mask: `Forward` over the key blocks that a list names; see sm90/mask.py.

A tile visits its whole blocks first, then those with bits, then the biased ones, each kind in a loop of its own; whole
blocks run the code of a call without a mask. For the others a thread loads one word of bits for each of its rows from
global memory before it waits for the block's scores, and for biased ones pairs of biases: all of them if they have 16
bits, with fp32 those of one row, which are as many registers; the other row's follow when the scores are there.

Biases are added in units of Q Kᵀ. Where some are far from 0, scores are then cut off at ± bias_limit, a power of two
that stands for a bias of 2^18 … 2^19: huge numbers would lose, in s·c - m·c, what exp2 is to see of them. That of a
power of two is exact, so rows with nothing but keys far beyond the limit weigh them equally, as any fp32 softmax does.
NaN stays NaN.

Costs differ between tiles as with a causal mask, so the scheduler takes its order for that: later query blocks first.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, pipeline

from ..common import softmax
from ..common.fragments import rows_by_columns
from ..common.mask import mask_bits
from ..common.scheduler import Tiles, find_tile
from ..key import KernelKey
from . import forward
from .config import LIST_HEADER
from .forward import Atoms, Forward, Gmem, Operands, Pipelines, Scoring, Smem, TileMask
from .mask import DTYPES
from .tma import load_tile


class MaskedForward(Forward):
    """Kernels of one key with ``attn_mask``."""

    def __init__(self, key: KernelKey):
        super().__init__(key)
        self.later_cost_more = True
        self.bias_dtype = None if key.attn_mask == "bool" else DTYPES[key.attn_mask]
        self.early_rows = 1 if key.attn_mask == "fp32" else 2  # of a thread, whose biases are loaded early

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
        mBias: cute.Tensor | None,
        softmax_scale_log2: Float32,
        num_sms: Int32,
        bias_factor: Float32 | None,
        bias_limit: Float32 | None,
        cap_factor: Float32 | None,  # see Scoring
        mSink: cute.Tensor | None,  # (h,) fp32
        stream,
    ):
        mask = TileMask(mLists, mBits, mBias, bias_factor, bias_limit)
        scoring = Scoring(softmax_scale_log2, None, cap_factor, mSink, mask)
        self.attend(mQ, mK, mV, mO, mLSE, scoring, None, num_sms, stream)

    @cute.jit
    def _entries(self, mask: TileMask, m_block: Int32, head: Int32, batch: Int32) -> cute.Tensor:
        """The list of a tile; of some tile where there is none with these indices."""
        m_block, batch = cutlass.max(m_block, 0), cutlass.min(batch, mask.lists.shape[0] - 1)
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
    ) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32]:
        """``(whole_end, bits_end, end, m_block, head, batch)``: where each kind of blocks ends in a tile's list."""
        entries = self._entries(scoring.mask, m_block, head, batch)
        return entries[0], entries[1], entries[2], m_block, head, batch

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
        i counts entries of a list."""
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.q_stages)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        step = Int32(0)
        is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
        n_block = self._entries(scoring.mask, m_block, head, batch)[LIST_HEADER]
        head_kv = head // qhead_per_kvhead
        load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, n_block, pipelines.k, k_state)
        k_state.advance()
        load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
        q_state.advance()
        while is_valid:
            gK, gV = gmem.k[None, None, head_kv, batch], gmem.v[None, None, head_kv, batch]
            entries = self._entries(scoring.mask, m_block, head, batch)
            for i in cutlass.range(1, entries[2], unroll=1):
                next_block = entries[LIST_HEADER + i]
                load_tile(atoms.k, gK, smem.k, next_block, pipelines.k, k_state)
                k_state.advance()
                load_tile(atoms.v, gV, smem.v, n_block, pipelines.v, v_state)
                v_state.advance()
                n_block = next_block
            last = n_block
            step += 1
            is_valid, m_block, head, batch = find_tile(step, tiles, self.later_cost_more)
            n_block = self._entries(scoring.mask, m_block, head, batch)[LIST_HEADER]
            head_kv = head // qhead_per_kvhead
            if is_valid:
                load_tile(atoms.k, gmem.k[None, None, head_kv, batch], smem.k, n_block, pipelines.k, k_state)
                load_tile(atoms.q, gmem.q[None, None, head, batch], smem.q, m_block, pipelines.q, q_state)
            k_state.advance()
            q_state.advance()
            load_tile(atoms.v, gV, smem.v, last, pipelines.v, v_state)
            v_state.advance()

    @cute.jit
    def _first_weights(
        self,
        acc_S: cute.Tensor,
        regs: Operands,
        blocks: tuple[Int32, Int32, Int32, Int32, Int32, Int32],
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> None:
        """P, m and l of a tile's first block; O = 0."""
        whole_end, bits_end, _, m_block, head, batch = blocks
        mask = scoring.mask
        if cutlass.const_expr(scoring.cap_factor is not None):
            softmax.cap_scores(acc_S, scoring.cap_factor)
        if whole_end == 0:
            entries = self._entries(mask, m_block, head, batch)
            n_block = entries[LIST_HEADER]
            of_bits = n_block
            if cutlass.const_expr(mask.bias is not None):
                if bits_end == 0:
                    of_bits = n_block + self._num_blocks(seqlen_k)
                    early = self._biases(self.early_rows)
                    self._load_biases(early, mask.bias, head, batch, first_row, n_block)
                    self._add_biases(acc_S, early, mask, head, batch, first_row, n_block, entries[3] != 0)
            mask_bits(acc_S, self._words(mask, head, batch, of_bits, first_row))
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
        blocks: tuple[Int32, Int32, Int32, Int32, Int32, Int32],  # see _key_blocks
        first_row: Int32,
        seqlen_k: Int32,
        scoring: Scoring,
    ) -> tuple[pipeline.PipelineState, pipeline.PipelineState]:
        """All key blocks of a tile but its first; the states of K and V afterwards."""
        whole_end, bits_end, end, m_block, head, batch = blocks
        mask = scoring.mask
        entries = self._entries(mask, m_block, head, batch)
        for _ in cutlass.range(1, whole_end, unroll=1):
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        for i in cutlass.range(cutlass.max(whole_end, 1), bits_end, unroll=1):
            words = self._words(mask, head, batch, entries[LIST_HEADER + i], first_row)
            acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
            mask_bits(acc_S, words)
            self._softmax(acc_S, regs, scoring)
            k_state.advance()
            v_state.advance()
        if cutlass.const_expr(mask.bias is not None):
            is_far = entries[3] != 0
            for i in cutlass.range(cutlass.max(bits_end, 1), end, unroll=1):
                n_block = entries[LIST_HEADER + i]
                words = self._words(mask, head, batch, n_block + self._num_blocks(seqlen_k), first_row)
                early = self._biases(self.early_rows)
                self._load_biases(early, mask.bias, head, batch, first_row, n_block)
                acc_S = self._block(mma_qk, mma_pv, regs, pipelines, q_state, k_state, v_state, wg, scoring)
                self._add_biases(acc_S, early, mask, head, batch, first_row, n_block, is_far)
                mask_bits(acc_S, words)
                self._softmax(acc_S, regs, scoring)
                k_state.advance()
                v_state.advance()
        return k_state, v_state

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

    def _biases(self, rows: int) -> cute.Tensor:
        """Registers for the biases of so many rows of a thread: (pair, pairs of a row, rows)."""
        return cute.make_rmem_tensor((2, self.tile_n // 8, rows), self.bias_dtype)

    @cute.jit
    def _load_biases(
        self,
        biases: cute.Tensor,  # out
        mBias: cute.Tensor,
        head: Int32,
        batch: Int32,
        first_row: Int32,
        n_block: Int32,
    ) -> None:
        """Biases of this thread's rows from first_row on, 8 apart. Beyond the mask's rows and keys they may be
        anything; their bits are 0."""
        bits = 2 * self.bias_dtype.width
        first_column = n_block * self.tile_n + cute.arch.lane_idx() % 4 * 2
        for r in cutlass.range_constexpr(cute.size(biases, mode=[2])):
            row = cutlass.min(first_row + 8 * r, mBias.shape[2] - 1)
            start = mBias.iterator + cute.crd2idx((batch, head, row, first_column), mBias.layout)
            pairs = cute.make_layout((2, cute.size(biases, mode=[1])), stride=(1, 8))
            load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.bias_dtype, num_bits_per_copy=bits)
            cute.copy(load, cute.make_tensor(start.align(bits // 8), pairs), biases[None, None, r])

    @cute.jit
    def _add_biases(
        self,
        acc_S: cute.Tensor,
        early: cute.Tensor,  # biases of this thread's first row, or of both
        mask: TileMask,
        head: Int32,
        batch: Int32,
        first_row: Int32,
        n_block: Int32,
        is_far: Boolean,
    ) -> None:
        """Scores plus biases; within ± bias_limit if some are far from 0."""
        rows = [early[None, None, r] for r in range(self.early_rows)]
        if cutlass.const_expr(self.early_rows < 2):
            late = self._biases(1)
            self._load_biases(late, mask.bias, head, batch, first_row + 8, n_block)
            rows = [*rows, late[None, None, 0]]
        scores = rows_by_columns(acc_S)
        for r in cutlass.range_constexpr(2):
            biases = rows[r].load().to(Float32)
            for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                scores[r, c] = scores[r, c] + biases[c] * mask.bias_factor
        if is_far:
            for i in cutlass.range_constexpr(cute.size(acc_S)):
                score = cute.arch.fmax(acc_S[i], -mask.bias_limit, nan=True)
                acc_S[i] = cute.arch.fmin(score, mask.bias_limit, nan=True)


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``, as those of ``Forward``."""
    query, keys, value, out, lse, scale, num_sms, _, _, cap_factor, sink, stream = forward.example_arguments(key)

    def tensor(dtype: type[cutlass.Numeric], rank: int, last: object, unit: int) -> cute.Tensor:
        """With strides that are multiples of ``unit``, and so aligned."""
        shape = (*(cute.sym_int() for _ in range(rank - 1)), last)
        strides = tuple(cute.sym_int64(divisibility=unit) for _ in range(rank - 1))
        return cute.runtime.make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=unit * dtype.width // 8)

    has_bias = key.attn_mask != "bool"
    return (
        *(query, keys, value, out, lse),
        tensor(Int32, 4, cute.sym_int(), 1),
        tensor(Int32, 5, 4, 1),
        tensor(DTYPES[key.attn_mask], 4, cute.sym_int(), 2) if has_bias else None,
        *(scale, num_sms),
        *((Float32(1.0), Float32(1.0)) if has_bias else (None, None)),
        *(cap_factor, sink, stream),
    )
