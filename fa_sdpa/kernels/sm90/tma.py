"""Loads by the tensor memory accelerator (TMA) into the stages of a pipeline."""

import cutlass.cute as cute
from cutlass import Int32, pipeline
from cutlass.cute.nvgpu import cpasync


@cute.jit
def load_tile(
    atom: cute.CopyAtom,
    mX: cute.Tensor,  # (s, d) of one head
    sX: cute.Tensor,  # (rows, d, stages)
    index: Int32,
    pipe: pipeline.PipelineTmaAsync,
    state: pipeline.PipelineState,
    column: Int32 | int = 0,  # of tiles
) -> None:
    """Wait for the state's stage to be empty, then load row tile ``index`` into it."""
    pipe.producer_acquire(state)
    copy_tile(atom, mX, sX, index, state.index, pipe.producer_get_barrier(state), column)


@cute.jit
def copy_tile(
    atom: cute.CopyAtom,
    mX: cute.Tensor,  # (s, d) of one head
    sX: cute.Tensor,  # (rows, d, stages)
    index: Int32,
    stage: Int32,
    barrier: cute.Pointer,  # mbarrier that is told of the bytes
    column: Int32 | int = 0,  # of tiles
) -> None:
    """Load row tile ``index`` into a stage."""
    gX = cute.local_tile(mX, (cute.size(sX, mode=[0]), cute.size(sX, mode=[1])), (None, column))
    tXsX, tXgX = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
    )
    cute.copy(atom, tXgX[None, index], tXsX[None, stage], tma_bar_ptr=barrier)
