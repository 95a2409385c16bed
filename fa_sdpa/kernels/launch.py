"""From torch's call to a kernel launch: allocate, find the compiled kernel, call it. Host time per call counts here."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..meta.shapes import empty_grads, empty_out_lse
from ..meta.spec import AttentionSpec, Options
from ..meta.target import Target
from . import family_of
from .compile import Kernel
from .jit import first_launch, kernel
from .key import KernelKey
from .sm90 import config as sm90

LOG2_E = math.log2(math.e)


class _Plan(NamedTuple):
    """What a launch needs beyond its tensors."""

    run: Kernel
    scale_log2: float  # of the default scale


class _BackwardPlan(NamedTuple):
    """The same for the backward."""

    run: Kernel
    num_sms: int
    config: sm90.BackwardConfig


_plans: dict[tuple, _Plan] = {}
_backward_plans: dict[tuple, _BackwardPlan] = {}


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    sink: Tensor | None,  # (H,)
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Attention forward on the current stream of the tensors' CUDA device, with no synchronisation.

    Args:
        query, key, value: bf16 or fp16, any strides with a contiguous last dimension; what TMA cannot address (a base
            or a stride that is no multiple of 16 bytes) is copied first. H_kv divides H.
        sink: floating; one more score in the softmax of each row of a head, with a value of 0.
        options: is_causal, window, softcap as Options defines them; scale is positive and finite, None is 1/√D.

    Returns:
        out (B, H, Sq, Dv) in query's dtype and memory layout; lse (B, H, Sq) fp32, natural log. A row that sees no key
        has out = 0 and lse = -inf, or the sink.

    Raises:
        ValueError: a head dim or scale that no kernel takes.
        KernelUnavailable: the kernel is in no bundle and cannot be compiled here, or not now, in a CUDA graph capture;
            or its first launch failed.
    """
    out, lse = empty_out_lse(query, value)
    if lse.numel() == 0:
        return out, lse
    if sink is not None:
        sink = sink.to(torch.float32).contiguous()
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf) if sink is None else lse.copy_(sink[:, None].expand_as(lse))
    device = query.get_device()
    head_dim, head_dim_v, seqlen_q = query.shape[3], value.shape[3], query.shape[2]
    is_causal, left, right = _visible(options, seqlen_q, key.shape[2])
    flags = (left is not None, options.softcap > 0.0, sink is not None)
    batch, heads, num_sms = query.shape[0], query.shape[1], Target.of(query.device).num_sms
    rows = query, out, lse
    if _packs_gqa(heads // key.shape[1], seqlen_q, is_causal or left is not None or sink is not None):
        rows = _packed(query, out, lse, key.shape[1])
        heads, seqlen_q = key.shape[1], heads // key.shape[1]
    sizes = (seqlen_q, key.shape[2], batch * heads, num_sms)
    tile = sm90.forward_tile(head_dim, head_dim_v, is_causal, any(flags), *sizes)
    wanted = (query.dtype, head_dim, head_dim_v, is_causal, tile, flags, device)
    plan = _plans.get(wanted) or _make_plan(*wanted)
    if options.scale is None:
        scale_log2 = plan.scale_log2
    elif 0.0 < options.scale < math.inf:
        scale_log2 = options.scale * LOG2_E
    else:
        raise ValueError(f"scale={options.scale} must be positive and finite")
    cap_factor = None
    if options.softcap:
        scale_log2, cap_factor = options.softcap * LOG2_E, 2.0 * scale_log2 / options.softcap
    query, out_rows, lse_rows = rows
    tensors = (_addressable(query), _addressable(key), _addressable(value), out_rows, lse_rows)
    arguments: tuple = (*tensors, scale_log2, num_sms, left, right, cap_factor, sink)
    if tile == "split":
        shape = (batch * sm90.forward_parts(*sizes), heads, seqlen_q, head_dim_v + sm90.LSE_COLUMNS)
        part = torch.empty(shape, dtype=torch.float32, device=query.device)
        arguments = (*tensors, part, scale_log2, num_sms, cap_factor)
    _run_on(device, plan.run, arguments)
    return out, lse


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv)
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    out: Tensor,  # (B, H, Sq, Dv)
    lse: Tensor,  # (B, H, Sq)
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention on the current stream of the tensors' CUDA device, with no synchronisation.

    Args:
        dout: gradient of out, any strides; copied first where TMA cannot address it.
        query, key, value, options: as ``attention_fwd`` got them.
        out, lse: as ``attention_fwd`` returned them.

    Returns:
        dq, dk, dv in the dtypes and memory layouts of query, key and value. The order in which dq's summands are added
        varies from run to run, unless torch's deterministic mode is on. A row that saw no key contributes nothing.

    Raises:
        ValueError: a head dim or scale that no kernel takes.
        KernelUnavailable: the kernel is in no bundle and cannot be compiled here.
    """
    dq, dk, dv = empty_grads(query, key, value)
    if query.numel() == 0 or key.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    device = query.get_device()
    batch, heads, seqlen_q, head_dim = query.shape
    is_causal, left, right = _visible(options, seqlen_q, key.shape[2])
    deterministic = torch.are_deterministic_algorithms_enabled()
    flags = (left is not None, options.softcap > 0.0, deterministic)
    wanted = (query.dtype, head_dim, value.shape[3], is_causal, flags, device)
    plan = _backward_plans.get(wanted) or _make_backward_plan(*wanted)
    scale = 1.0 / math.sqrt(head_dim) if options.scale is None else options.scale
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={options.scale} must be positive and finite")
    scale_log2, cap_factor = scale * LOG2_E, None
    if options.softcap:
        scale_log2, cap_factor = options.softcap * LOG2_E, 2.0 * scale_log2 / options.softcap
    heads_kv, seqlen_k = key.shape[1:3]
    tiles = -(-seqlen_k // plan.config.tile_n)
    schedule = sm90.backward_schedule(batch * heads_kv, tiles, is_causal or left is not None, plan.num_sms)
    blocks = -(-seqlen_q // plan.config.tile_m)
    size = plan.config.scratch(batch * heads, blocks, heads // heads_kv, schedule.slots, deterministic)
    scratch = torch.empty(size, dtype=torch.float32, device=query.device)
    inputs = (_addressable(x) for x in (dout, query, key, value, out))
    arguments = (
        *inputs,
        lse.contiguous(),
        dq,
        dk,
        dv,
        scratch,
        scale,
        scale_log2,
        plan.num_sms,
        *schedule,
        left,
        right,
        cap_factor,
    )
    _run_on(device, plan.run, arguments)
    return dq, dk, dv


def _run_on(device: int, run: Kernel, arguments: tuple) -> None:
    """Launch on the current stream of ``device``."""
    if device == torch.cuda.current_device():
        run(*arguments)
    else:
        with torch.cuda.device(device):
            run(*arguments)


def keys(spec: AttentionSpec, target: Target, *, any_size: bool = False) -> tuple[KernelKey, ...]:
    """The kernels that may run a call, and so have to be ready before it is routed; none on a CPU.

    Sizes that are symbolic may be any, with ``any_size`` all may, and so they may on a GPU whose size is not known.
    """
    if family_of(target) != "sm90":
        return ()
    window, is_causal = spec.window, spec.is_causal
    if spec.bottom_right and is_causal and not window:
        is_causal, left, _ = _visible(Options(True, bottom_right=True), spec.seqlen_q, spec.seqlen_k)
        window = left is not None
    flags = (window, spec.softcap > 0.0, spec.sink)
    head_dim, head_dim_v = int(spec.head_dim), int(spec.head_dim_v)
    batch, heads, heads_kv, seqlen_q = spec.batch, spec.num_heads, spec.num_heads_kv, spec.seqlen_q
    tiles = sm90.forward_tiles(head_dim, head_dim_v, is_causal, any(flags))
    sizes = (seqlen_q, spec.seqlen_k, batch * heads, target.num_sms)
    if target.num_sms and not any_size and all(isinstance(n, int) for n in (*sizes, heads_kv)):
        if _packs_gqa(heads // heads_kv, seqlen_q, is_causal or window or spec.sink):
            sizes = (heads // heads_kv, spec.seqlen_k, batch * heads_kv, target.num_sms)
        tiles = (sm90.forward_tile(head_dim, head_dim_v, is_causal, any(flags), *sizes),)
    is_causal = is_causal and not window
    needed = tuple(_key(spec.dtype, head_dim, head_dim_v, is_causal, tile, flags) for tile in tiles)
    if not spec.needs_grad:
        return needed
    options = {"window": window, "softcap": flags[1], "deterministic": spec.deterministic}
    backward = sm90.backward_key(spec.dtype, head_dim, head_dim_v, is_causal, **options)
    return (*needed, backward)


def _key(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    tile: sm90.Tile,
    flags: tuple[bool, bool, bool],
) -> KernelKey:
    window, softcap, sink = flags
    return sm90.forward_key(dtype, head_dim, head_dim_v, is_causal, tile, window=window, softcap=softcap, sink=sink)


def _visible(options: Options, seqlen_q: int, seqlen_k: int) -> tuple[bool, int | None, int | None]:
    """``(is_causal, left, right)``: row i sees the keys i + left … i + right or, where these are None, all keys or
    those up to i. A window that comes down to one of these two needs no kernel of its own."""
    if not options.bottom_right and options.window_left is None and options.window_right is None:
        return options.is_causal, None, None
    left, right = options.bounds(seqlen_q, seqlen_k)
    if left is None or left <= 1 - seqlen_q:  # the last row sees key 0
        if right is None or right >= seqlen_k - 1:  # the first row sees the last key
            return False, None, None
        if right == 0:
            return True, None, None
        left = -seqlen_q
    return False, left, seqlen_k if right is None else min(right, seqlen_k)


def _make_plan(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    tile: sm90.Tile,
    flags: tuple[bool, bool, bool],
    device: int,
) -> _Plan:
    target = Target.of(torch.device("cuda", device))
    if family_of(target) != "sm90" or dtype not in sm90.DTYPE_NAMES:
        raise ValueError(f"no forward kernel for {dtype} on {target.name} (arch {target.arch})")
    key = _key(dtype, head_dim, head_dim_v, is_causal, tile, flags)
    plan = _Plan(kernel(key), LOG2_E / math.sqrt(head_dim))

    def keep() -> None:
        _plans[dtype, head_dim, head_dim_v, is_causal, tile, flags, device] = plan

    return plan._replace(run=first_launch(key, plan.run, keep))


def _packs_gqa(group: int, seqlen_q: int, tells_rows_apart: bool) -> bool:
    """Whether the ``group`` query heads of a key/value head become rows of one tile, so that K and V are read once:
    where each has one query, and no mask or sink tells them apart. With more queries it would depend on strides, and
    results with it."""
    return group > 1 and seqlen_q == 1 and not tells_rows_apart


def _packed(query: Tensor, out: Tensor, lse: Tensor, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of tensors with one query per head, where the heads that share a key/value head are rows of one head."""
    batch, heads = lse.shape[:2]
    group = heads // heads_kv

    def pack(x: Tensor) -> Tensor:
        of_batch, of_head, _, unit = x.stride()
        return x.as_strided((batch, heads_kv, group, x.shape[3]), (of_batch, group * of_head, of_head, unit))

    return pack(query), pack(out), lse.view(batch, heads_kv, group)


def _make_backward_plan(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, is_causal: bool, flags: tuple[bool, bool, bool], device: int
) -> _BackwardPlan:
    target = Target.of(torch.device("cuda", device))
    if family_of(target) != "sm90" or dtype not in sm90.DTYPE_NAMES:
        raise ValueError(f"no backward kernel for {dtype} on {target.name} (arch {target.arch})")
    window, softcap, deterministic = flags
    options = {"window": window, "softcap": softcap, "deterministic": deterministic}
    key = sm90.backward_key(dtype, head_dim, head_dim_v, is_causal, **options)
    config = sm90.backward_config(head_dim, head_dim_v, softcap)
    plan = _BackwardPlan(kernel(key), target.num_sms, config)

    def keep() -> None:
        _backward_plans[dtype, head_dim, head_dim_v, is_causal, flags, device] = plan

    return plan._replace(run=first_launch(key, plan.run, keep))


def _addressable(x: Tensor) -> Tensor:
    """``x`` if TMA can address it (16-bit dtype, base and strides multiples of 16 bytes), or else a view or a copy."""
    batch, head, row, element = x.stride()
    if element != 1:  # dout's may be anything; of size 1 it means nothing, but head dims are larger
        return x.clone(memory_format=torch.contiguous_format)
    if (batch | head | row) & 7 == 0 and x.data_ptr() & 15 == 0:
        return x
    if x.data_ptr() & 15 == 0:  # the stride of a dimension of size 1 means nothing
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        if (strides[0] | strides[1] | strides[2]) & 7 == 0:
            return x.as_strided(x.shape, (*strides[:3], 1))
    return x.clone(memory_format=torch.contiguous_format)
