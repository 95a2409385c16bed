"""Tiles of the backward whose keys are no multiple of 64 (config.SHORT_TILES): what is different in their roles.

Warpgroups have the products that backward_roles.py tells of, of 80 or 96 keys: more than 64 spare L2 traffic, and 128
are too many registers. WGMMA's M is 64, so keys must be N: S and dP are multiplied queries × keys, dV and dK columns ×
keys,

    S = Q Kᵀ,  dP = dO Vᵀ,  dVᵀ += dOᵀ P,  dKᵀ += Qᵀ dS,

with both operands from shared memory. P has two stages: `score` writes one while its WGMMA of the block before may read
the other, and `differentiate` reads it as registers. dS likewise; `multiply_dq` is as with other tiles.

A thread has two queries of S and dP, 8 apart, and of dV and dK two columns of every 64, of all keys. Keys behind the
last one are masked, so that their P is 0, and not stored; columns behind the last one are multiplied, and not stored.
"""

from typing import TYPE_CHECKING

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warp

from ..common import fragments
from .backward_rows import WARPGROUP
from .wgmma import K_MAJOR, MN_MAJOR, issue, tiled_mma, transposed

if TYPE_CHECKING:
    from ..common.blocks import Window
    from .backward import Mmas, Scoring, Smem
    from .backward_roles import Place

P_WRITTEN, DS_WRITTEN = 1, 2  # named barriers of one warpgroup


class ShortTiles:
    """Part of Backward."""

    def _short_mmas(self) -> tuple[cute.TiledMma, cute.TiledMma]:
        """S or dP, and dK or dV, of which each instruction has 64 columns."""
        sdp, sums = (
            tiled_mma(self.dtype, majors, (1, 1), self.tile_n) for majors in ((K_MAJOR, K_MAJOR), (MN_MAJOR, MN_MAJOR))
        )
        return sdp, sums

    def _short_operands(
        self,
        sums: cute.TiledMma,
        keys: cute.Tensor,  # K, V
        queries: cute.Tensor,  # Q, dO
        scores: cute.Tensor,  # P, dS
        factors: cute.Tensor,  # dO, Q
    ) -> tuple[cute.Tensor, cute.Tensor, cute.Tensor, cute.Tensor]:
        """Descriptors of these four in shared memory, for S or dP and for dV or dK."""
        sdp, sums = self._partitions().sdp.get_slice(0), sums.get_slice(0)
        return (
            sdp.make_fragment_B(sdp.partition_B(keys)),
            sdp.make_fragment_A(sdp.partition_A(queries)),
            sums.make_fragment_B(sums.partition_B(transposed(scores))),
            sums.make_fragment_A(sums.partition_A(transposed(factors))),
        )

    def _short_scores(self, mmas: "Mmas", dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """Registers of S or dP."""
        return cute.make_rmem_tensor(mmas.sdp.partition_shape_C((self.tile_m, self.tile_n)), dtype)

    def _short_sums(self, mma: cute.TiledMma, columns: int) -> cute.Tensor:
        """Registers of dV or dK."""
        return cute.make_rmem_tensor(mma.partition_shape_C((columns, self.tile_n)), Float32)

    @cute.jit
    def _short_limits(self, first_key: Int32, m_block: Int32, seqlen_k: Int32, window: "Window | None"):
        """``(starts, ends)`` of the keys that each of this thread's two queries sees, counted from the first key of the
        tile; starts is None without a window."""
        first_query = m_block * self.tile_m + self._row(Int32(0))
        starts = cute.make_rmem_tensor(2, Int32) if cutlass.const_expr(self.has_window) else None
        ends = cute.make_rmem_tensor(2, Int32)
        for r in cutlass.range_constexpr(2):
            query, end = first_query + 8 * r, seqlen_k
            if cutlass.const_expr(self.is_causal):
                end = cutlass.min(seqlen_k, query + 1)
            if cutlass.const_expr(self.has_window):
                end = cutlass.min(seqlen_k, query + window.right + 1)
                starts[r] = query + window.left - first_key
            ends[r] = end - first_key
        return starts, ends

    @cute.jit
    def _short_statistics(self, smem: "Smem", stage: Int32, first: int) -> cute.Tensor:
        """lse, or δ from row ``first`` = tile_m on, of this thread's two queries; registers."""
        values = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            values[r] = smem.statistics[first + self._row(Int32(0)) + 8 * r, stage]
        return values

    @cute.jit
    def _short_weights(self, acc_S: cute.Tensor, lse: cute.Tensor, scoring: "Scoring") -> None:
        """P in the place of S."""
        scores = self._slices(acc_S)
        for k in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            for i in cutlass.range_constexpr(8):
                exponent = scores[i, k] * scoring.scale_log2 - lse[i // 2 % 2]
                scores[i, k] = cute.math.exp2(exponent, fastmath=True)

    @cute.jit
    def _short_gradients(self, acc_dP: cute.Tensor, rP: cute.Tensor, rdS: cute.Tensor, delta: cute.Tensor) -> None:
        """dS = P ∘ (dP - δ) in 16 bit."""
        weights, gradients, rounded = self._slices(rP), self._slices(acc_dP), self._slices(rdS)
        for k in cutlass.range_constexpr(cute.size(gradients, mode=[1])):
            wide = cute.make_rmem_tensor(8, Float32)
            wide.store(weights[None, k].load().to(Float32))
            for i in cutlass.range_constexpr(8):
                gradients[i, k] = wide[i] * (gradients[i, k] - delta[i // 2 % 2])
            rounded[None, k].store(gradients[None, k].load().to(self.dtype))

    @cute.jit
    def _short_write(self, mmas: "Mmas", rounded: cute.Tensor, sX: cute.Tensor, place: "Place") -> None:
        """P or dS to a stage (tile_m, tile_n) of shared memory, for WGMMA."""
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(place.tidx)
        cute.copy(copy, copy.retile(rounded), copy.partition_D(sX))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def _short_read(self, mmas: "Mmas", sX: cute.Tensor, rounded: cute.Tensor, place: "Place") -> None:
        """P of a stage (tile_m, tile_n) to registers."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(place.tidx)
        cute.copy(copy, copy.partition_S(sX), copy.retile(rounded))

    @cute.jit
    def _short_issue(
        self, mma: cute.TiledMma, acc: cute.Tensor, scores: cute.Tensor, factors: cute.Tensor, stage: Int32
    ) -> None:
        """Issue dVᵀ += dOᵀ P or dKᵀ += Qᵀ dS."""
        scores, factors = scores[None, None, None, stage], factors[None, None, None, stage]
        issue(mma, acc, factors, scores, self.tile_m // 16, zero_init=False)

    @cute.jit
    def _short_store(
        self,
        acc: cute.Tensor,
        mX: cute.Tensor,  # (s_k, d / 2) of one head, pairs of values as Int32
        first_key: Int32,
        scale: Float32,
    ) -> None:
        """Round scale · acc, columns × keys, and write it; two lanes write 32 neighbouring bytes of a key at a time."""
        pairs = cute.recast_tensor(self._round(acc, scale), Int32)  # of neighbouring keys
        groups = self.tile_n // 8  # of eight keys
        thread = fragments.read_thread_idx() % WARPGROUP
        lane = thread % 4
        store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=128)
        for m in cutlass.range_constexpr(cute.size(pairs) // (2 * groups)):  # of 64 columns
            for v in cutlass.range_constexpr(0, groups, 2):
                values = cute.make_rmem_tensor(4, Int32)  # eight keys by eight columns each: a key's two columns
                for j in cutlass.range_constexpr(4):
                    values[j] = fragments.transpose_8x8(pairs[(m * groups + v) * 2 + j])
                fragments.transpose_in_quad(values)  # a key's eight columns of one of them
                key = first_key + 8 * (v + lane // 2) + thread % 32 // 4
                chunk = m * 8 + thread // 32 * 2 + lane % 2
                if key < mX.shape[0] and chunk * 4 < mX.shape[1]:
                    target = cute.zipped_divide(mX[key, None], (4,))[None, chunk].iterator
                    cute.copy(store, values, cute.make_tensor(target.align(16), cute.make_layout(4)))
