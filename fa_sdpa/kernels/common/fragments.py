"""Views of matrix-multiply accumulators, and the plain register arithmetic on them.

An fp32 accumulator of a warp (mma.sync m16n8, and WGMMA m64 for each of its four warps) gives the thread of lane
``l`` the elements (row l//4 + 8·i, column 8·v + 2·(l%4) + j) for i, j in {0, 1}: mode 0 is (j, i, v).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32


def rows_by_columns(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, v), mma_m, mma_n) accumulator seen as (rows of this thread, columns of this thread)."""
    compact = cute.make_layout(acc.layout.shape)
    (shape_j, shape_i, shape_v), mma_m, mma_n = compact.shape
    (stride_j, stride_i, stride_v), stride_m, stride_n = compact.stride
    view = cute.make_layout(
        ((shape_i, mma_m), (shape_j, shape_v, mma_n)),
        stride=((stride_i, stride_m), (stride_j, stride_v, stride_n)),
    )
    return cute.make_tensor(acc.iterator, cute.composition(acc.layout, view))


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, n/8), mma_m, mma_n) accumulator seen as the next MMA's ((2, 2, 2), mma_m, n/16 · mma_n) A operand."""
    split = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    (shape_j, shape_i, (shape_2, shape_v)), mma_m, mma_n = split.shape
    (stride_j, stride_i, (stride_2, stride_v)), stride_m, stride_n = split.stride
    layout = cute.make_layout(
        ((shape_j, shape_i, shape_2), mma_m, (shape_v, mma_n)),
        stride=((stride_j, stride_i, stride_2), stride_m, (stride_v, stride_n)),
    )
    return cute.make_tensor(acc.iterator, layout)


@cute.jit
def scale_rows(acc: cute.Tensor, factors: cute.Tensor) -> None:
    """Multiply each row of an accumulator by its factor, in place."""
    view = rows_by_columns(acc)
    for r in cutlass.range_constexpr(cute.size(factors)):
        view[r, None].store(view[r, None].load() * factors[r])


@cute.jit
def row_maximum(row: cute.TensorSSA, initial: Float32) -> Float32:
    """Maximum of ``initial`` and a row, in four independent chains."""
    chains = [initial, row[0], row[1], row[2]]
    for i in cutlass.range_constexpr(3, cute.size(row.shape)):
        chains[i % 4] = cute.arch.fmax(chains[i % 4], row[i])
    return cute.arch.fmax(cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3]))


@cute.jit
def row_total(row: cute.TensorSSA, initial: Float32) -> Float32:
    """Sum of ``initial`` and a row, in four independent chains."""
    chains = [initial, row[0], row[1], row[2]]
    for i in cutlass.range_constexpr(3, cute.size(row.shape)):
        chains[i % 4] = chains[i % 4] + row[i]
    return (chains[0] + chains[1]) + (chains[2] + chains[3])
