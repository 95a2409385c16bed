"""Additions to global memory that return nothing."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.cutlass_dsl import dsl_user_op

from .assembly import assemble


@dsl_user_op
def _add_4(  # type: ignore[no-untyped-def]
    address: Int64, offset: int, values: tuple[Float32, Float32, Float32, Float32], *, loc=None, ip=None
) -> None:
    assemble(
        None,
        [address.ir_value(loc=loc, ip=ip), *(Float32(value).ir_value(loc=loc, ip=ip) for value in values)],
        f"red.relaxed.gpu.global.add.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};",
        "l,f,f,f,f",
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def bulk_add(  # type: ignore[no-untyped-def]
    target: cute.Pointer,  # fp32 global memory, 16-byte aligned
    source: cute.Pointer,  # fp32 shared memory, likewise
    num_bytes: int,
    *,
    loc=None,
    ip=None,
) -> None:
    """Add shared memory to global memory, asynchronously, as part of the thread's current bulk group."""
    assemble(
        None,
        [target.toint(loc=loc, ip=ip).ir_value(), source.toint(loc=loc, ip=ip).ir_value()],
        f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], {num_bytes};",
        "l,r",
        loc=loc,
        ip=ip,
    )


@cute.jit
def add_fragment(
    target: cute.Pointer,  # fp32 global memory of this thread's first four values, 16-byte aligned
    values: cute.Tensor,  # registers, a multiple of four fp32
    threads: cutlass.Constexpr[int],  # that lie side by side: four values of thread t, of thread t + 1, …, and so on
) -> None:
    """Add this thread's registers to memory, four neighbouring values in one operation of 16 bytes a lane."""
    address = target.toint()
    for i in cutlass.range_constexpr(cute.size(values) // 4):
        _add_4(address, 16 * threads * i, tuple(values[4 * i + j] for j in range(4)))
