"""Gradients of a key/value head from those of the parts of its group of query heads, which are computed apart where
whole groups would keep too few SMs at work or too many sums of dQ in use (sm90/config.py, backward_heads)."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

THREADS = 256
VALUES = 8  # of 16 bit, 16 bytes, that a thread adds


@cute.jit
def num_ctas(mSum: cute.Tensor) -> Int32:
    """How many CTAs it takes to write a gradient."""
    batch, heads, seqlen, head_dim = mSum.shape
    return cute.ceil_div(batch * heads * seqlen * (head_dim // VALUES), THREADS)


@cute.kernel
def add_parts(
    mPartK: cute.Tensor,  # (b, h_kv · parts, s_k, d), the parts of a head side by side
    mPartV: cute.Tensor,  # (b, h_kv · parts, s_k, dv)
    mdK: cute.Tensor,  # (b, h_kv, s_k, d), out
    mdV: cute.Tensor,  # (b, h_kv, s_k, dv), out
):
    """CTAs (x, 0) add dK, (x, 1) dV, in fp32 and in the order of the parts."""
    _, which, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_wait()  # for the parts
    if which == 0:
        _add(mPartK, mdK)
    else:
        _add(mPartV, mdV)


@cute.jit
def _add(mPart: cute.Tensor, mSum: cute.Tensor) -> None:
    """This thread's VALUES neighbours of a gradient."""
    tidx, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    batch, heads, seqlen, head_dim = mSum.shape
    chunks = cutlass.const_expr(head_dim // VALUES)
    index = cta * THREADS + tidx
    chunk, row = index % chunks, index // chunks
    head, row = row % heads, row // heads
    row, b = row % seqlen, row // seqlen
    if b < batch:
        parts = mPart.shape[1] // heads
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), mSum.element_type, num_bits_per_copy=8 * 2 * VALUES)
        sums = cute.make_rmem_tensor(VALUES, Float32)
        sums.fill(0.0)
        values = cute.make_rmem_tensor(VALUES, mSum.element_type)
        for part in cutlass.range(parts, unroll=4):
            gPart = cute.zipped_divide(mPart[b, head * parts + part, row, None], (VALUES,))
            cute.copy(copy, gPart[None, chunk], values)
            sums.store(sums.load() + values.load().to(Float32))
        values.store(sums.load().to(mSum.element_type))
        cute.copy(copy, values, cute.zipped_divide(mSum[b, head, row, None], (VALUES,))[None, chunk])
