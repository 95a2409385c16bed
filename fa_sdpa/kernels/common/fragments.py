"""Views of matrix-multiply accumulators, and the plain register arithmetic on them.

An fp32 accumulator of a warp (mma.sync m16n8, and WGMMA m64 for each of its four warps) gives the thread of lane
``l`` the elements (row l//4 + 8·i, column 8·v + 2·(l%4) + j) for i, j in {0, 1}: mode 0 is (j, i, v).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.cutlass_dsl import dsl_user_op

from .assembly import assemble


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


@dsl_user_op
def pack_pair(
    first: Float32, second: Float32, dtype: type[cutlass.Numeric], *, loc: object = None, ip: object = None
) -> Int32:
    """Two values rounded to 16 bit, the first one in the lower half.

    Assembly with side effects, as the compiler would else move the conversions of weights beyond a branch that
    rarely replaces them, and keep all of them alive in fp32 until then.
    """
    kind = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}[dtype]
    values = [second.ir_value(loc=loc, ip=ip), first.ir_value(loc=loc, ip=ip)]
    code = f"cvt.rn.{kind}.f32 $0, $1, $2;"
    return Int32(assemble(Int32.mlir_type, values, code, "=r,f,f", loc=loc, ip=ip))


@cute.jit
def end_of_block(never: Boolean) -> None:
    """End the basic block, by a branch that is not taken. Within a block ptxas delays what nothing there depends on,
    such as the release of a pipeline stage; ``never`` is a condition that it cannot know to be false."""
    if never:
        _trap()


@dsl_user_op
def read_thread_idx(*, loc: object = None, ip: object = None) -> Int32:
    """threadIdx.x, read here and now: addresses computed from it are not kept in registers across a loop."""
    return Int32(assemble(Int32.mlir_type, [], "mov.u32 $0, %tid.x;", "=r", loc=loc, ip=ip))


@dsl_user_op
def _trap(*, loc: object = None, ip: object = None) -> None:
    assemble(None, [], "trap;", "", loc=loc, ip=ip)


@dsl_user_op
def transpose_8x8(pair: Int32, *, loc: object = None, ip: object = None) -> Int32:
    """Of an 8 x 8 matrix of 16-bit values, two neighbouring ones of row ``lane // 4`` a lane: the same of its
    transpose. All lanes of a warp take part."""
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return Int32(assemble(Int32.mlir_type, [pair.ir_value(loc=loc, ip=ip)], code, "=r,r", loc=loc, ip=ip))


@cute.jit
def transpose_in_quad(values: cute.Tensor) -> None:
    """Transpose the 4 x 4 matrix whose row ``l`` is the four 32-bit registers of a quad's lane ``l``, in place."""
    lane = cute.arch.lane_idx()
    for b in cutlass.range_constexpr(2):  # swap the off-diagonal 2 x 2 blocks at distance 1, then 2
        is_upper = lane & 1 << b != 0
        for i in cutlass.range_constexpr(4):
            if cutlass.const_expr(not i & 1 << b):
                j = i | 1 << b
                kept = values[j] if is_upper else values[i]
                sent = values[i] if is_upper else values[j]
                received = cute.arch.shuffle_sync_bfly(sent, 1 << b)
                values[i] = received if is_upper else kept
                values[j] = kept if is_upper else received
