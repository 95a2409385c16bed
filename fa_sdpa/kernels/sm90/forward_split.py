"""Attention forward for Hopper where few tiles have many keys, as in decoding: several CTAs share the keys of a tile.

Two launches: `Forward.kernel` with each part of a tile's key blocks as a tile of its own, whose O (fp32) and lse go to
scratch memory; then common/combine.py, launched while the first one runs (griddepcontrol). How many parts:
sm90/config.py. No causal mask, window or sink: with a single query, the common case, a mask comes down to fewer keys.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ..common.combine import WARPS, combine
from ..key import KernelKey
from . import forward
from .config import LSE_COLUMNS
from .forward import Forward, Scoring


class SplitForward(Forward):
    """Kernels of one key with ``split``."""

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (b, h, s_q, d)
        mK: cute.Tensor,  # (b, h_kv, s_k, d)
        mV: cute.Tensor,  # (b, h_kv, s_k, dv)
        mO: cute.Tensor,  # (b, h, s_q, dv)
        mLSE: cute.Tensor,  # (b, h, s_q) fp32
        mPart: cute.Tensor,  # (b · parts, h, s_q, dv + LSE_COLUMNS) fp32 scratch memory
        softmax_scale_log2: Float32,
        num_sms: Int32,
        cap_factor: Float32 | None,  # see Scoring
        stream,
    ):
        batch, heads, seqlen_q, head_dim_v = mO.shape
        num_parts = mPart.shape[0] // batch
        of_part = cute.make_tensor(mPart.iterator + head_dim_v, cute.select(mPart.layout, mode=[0, 1, 2]))
        scoring = Scoring(softmax_scale_log2, None, cap_factor, None)
        self.attend(mQ, mK, mV, mPart, of_part, scoring, num_parts, num_sms, stream)
        combine(mPart, mO, mLSE, num_parts).launch(
            grid=[seqlen_q, heads, batch], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=True
        )


def example_arguments(key: KernelKey) -> tuple:
    """Tensors without data, for ``cute.compile``, as those of ``Forward``."""
    query, keys, value, out, lse, scale, num_sms, _, _, cap_factor, _, stream = forward.example_arguments(key)
    shape = (cute.sym_int(), *query.shape[1:3], key.head_dim_v + LSE_COLUMNS)
    strides = tuple(cute.sym_int64(divisibility=4) for _ in range(3))
    part = cute.runtime.make_fake_tensor(cutlass.Float32, shape, (*strides, 1), assumed_align=16)
    return query, keys, value, out, lse, part, scale, num_sms, cap_factor, stream
