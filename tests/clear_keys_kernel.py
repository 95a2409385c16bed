"""A kernel around clear_keys; its PTX is left in CUTE_DSL_DUMP_DIR: python clear_keys_kernel.py ROWS COLUMNS STAGES."""

import sys

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.utils import SmemAllocator

from fa_sdpa.kernels.sm90.hidden_keys import WARPGROUP, clear_keys
from fa_sdpa.kernels.sm90.wgmma import smem_layout


class ClearedTile:
    """Copies a tile to shared memory, clears keys of a stage and copies it back."""

    def __init__(self, rows: int, columns: int, stages: int):
        self.sizes = rows, columns, stages

    @cute.jit
    def __call__(self, mX: cute.Tensor, mHidden: cute.Tensor, stage: Int32, stream):
        layout = smem_layout(cutlass.BFloat16, *self.sizes)
        self.kernel(mX, mHidden, stage, layout).launch(grid=[1, 1, 1], block=[WARPGROUP, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mHidden: cute.Tensor, stage: Int32, layout: cute.ComposedLayout):
        tidx, _, _ = cute.arch.thread_idx()
        _, columns, stages = self.sizes

        @cute.struct
        class SharedStorage:
            tile: cute.struct.Align[cute.struct.MemRange[cutlass.BFloat16, cute.cosize(layout)], 1024]

        tile = SmemAllocator().allocate(SharedStorage).tile.get_tensor(layout.outer, swizzle=layout.inner)
        for i in cutlass.range(cute.size(mX) // WARPGROUP, unroll=1):
            e = i * WARPGROUP + tidx
            place = e // stages // columns, e // stages % columns, e % stages
            tile[place] = mX[place]
        cute.arch.sync_threads()
        clear_keys(tile, stage, mHidden, 3)
        for i in cutlass.range(cute.size(mX) // WARPGROUP, unroll=1):
            e = i * WARPGROUP + tidx
            place = e // stages // columns, e // stages % columns, e % stages
            mX[place] = tile[place]


def main() -> None:
    rows, columns, stages = map(int, sys.argv[1:])
    strides = columns * stages, stages, 1
    tile = cute.runtime.make_fake_tensor(cutlass.BFloat16, (rows, columns, stages), strides, assumed_align=2)
    hidden = cute.runtime.make_fake_tensor(Int32, (4,), (1,), assumed_align=4)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    cute.compile(ClearedTile(rows, columns, stages), tile, hidden, Int32(0), stream, options=options)


if __name__ == "__main__":
    main()
