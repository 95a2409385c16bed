"""WGMMA on Hopper: tiled multiplications of 16-bit operands, and how they are issued."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_helpers
from cutlass import Float32
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum

K_MAJOR, MN_MAJOR = cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.MN


def tiled_mma(
    dtype: type[cutlass.Numeric],
    majors: tuple[cute.nvgpu.OperandMajorMode, cute.nvgpu.OperandMajorMode],  # of A and B
    warpgroups: tuple[int, int],  # along M and N
    columns: int,  # of one warpgroup, which has 64 rows
    a_in_registers: bool = False,
) -> cute.TiledMma:
    """fp32 += A Bᵀ; A is (M, K), B is (N, K)."""
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    return sm90_helpers.make_trivial_tiled_mma(dtype, dtype, *majors, Float32, (*warpgroups, 1), (64, columns), source)


def smem_layout(
    dtype: type[cutlass.Numeric], rows: int, columns: int, stages: int, unit: int | None = None
) -> cute.ComposedLayout:
    """(rows, columns, stages), swizzled for TMA and WGMMA; ``unit`` columns, or all, are multiplied together."""
    kind = sm90_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, unit or columns)
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


def transposed(tile: cute.Tensor) -> cute.Tensor:
    """(rows, columns, stages) tile in shared memory seen as (columns, rows, stages)."""
    rows, columns, stages = tile.shape
    return cute.composition(tile, cute.make_ordered_layout((columns, rows, stages), order=(1, 0, 2)))


@cute.jit
def issue(
    mma: cute.TiledMma,
    acc: cute.Tensor,
    tCrA: cute.Tensor,
    tCrB: cute.Tensor,
    slices: cutlass.Constexpr[int],
    zero_init: cutlass.Constexpr[bool],
) -> None:
    """Issue acc (+)= A Bᵀ over the first ``slices`` k-slices of 16 as one WGMMA group."""
    warpgroup.fence()
    atom = cute.make_mma_atom(mma.op)
    for k in cutlass.range_constexpr(slices):
        atom.set(warpgroup.Field.ACCUMULATE, not (zero_init and k == 0))
        cute.gemm(atom, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
    warpgroup.commit_group()
