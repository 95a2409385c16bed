"""From torch's call to a kernel launch: allocate, find the compiled kernel, call it. Host time per call counts here."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch_private as private
from ..meta.shapes import empty_grads, empty_out_lse
from ..meta.spec import AttentionSpec, MaskKind, Options, mask_kind
from ..meta.target import Target
from . import family_of, masks
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
    preparation: KernelKey | None = None  # with a mask


class _MaskedPlan(NamedTuple):
    """The same for a call with a mask."""

    run: Kernel
    preparation: KernelKey
    tile_m: int
    tile_n: int


_plans: dict[tuple, _Plan] = {}
_masked_plans: dict[tuple, _MaskedPlan] = {}
_preparations: dict[KernelKey, Kernel] = {}
_backward_plans: dict[tuple, _BackwardPlan] = {}


def _load_preparation(preparation: KernelKey) -> Kernel:
    """Kernels that prepare masks."""
    found = _preparations.get(preparation)
    if found is not None:
        return found
    loaded = kernel(preparation)
    return first_launch(preparation, loaded, lambda: _preparations.update({preparation: loaded}))


class _MaskedLaunch(NamedTuple):
    """What follows from the sizes and options of a call, and the mask's layout."""

    run: Kernel
    packs: bool  # as of _Launch
    tiles: masks.Tiles
    load: Callable[[], Kernel]  # what prepares the mask
    scalars: tuple[Any, ...]  # the kernel's arguments after its tensors, the sink but


class _Launch(NamedTuple):
    """What follows from the sizes and options of a call."""

    run: Kernel
    packs: bool  # the query heads of a key/value head are rows of one head
    part: tuple[int, ...] | None  # shape of the fp32 results of parts of the keys, where these are split
    scalars: tuple[Any, ...]  # the kernel's arguments after its tensors, the sink but


Run = Callable[..., tuple[Tensor, ...]]
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # what ``empty_strided_cuda`` takes


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    sink: Tensor | None,  # (H,)
    options: Options,
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Sq, Sk)
) -> tuple[Tensor, Tensor]:
    """Attention forward on the current stream of the tensors' CUDA device, with no synchronisation.

    Args:
        query, key, value: bf16 or fp16, any strides with a contiguous last dimension; what TMA cannot address (a base
            or a stride that is no multiple of 16 bytes) is copied first. H_kv divides H.
        sink: floating; one more score in the softmax of each row of a head, with a value of 0.
        options: is_causal, window, softcap as Options defines them; scale is positive and finite, None is 1/√D.
        attn_mask: boolean, fp32 or of query's dtype, 2 to 4 dimensions, any strides; counts together with the options.

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
    if attn_mask is not None:
        _run_on(query.get_device(), _attend_masked, (query, key, value, out, lse, attn_mask, sink, options))
        return out, lse
    launch = _launch_of(query, key, value, sink is not None, options)
    rows = _packed(query, out, lse, key.shape[1]) if launch.packs else (query, out, lse)
    query, out_rows, lse_rows = rows
    part = None if launch.part is None else torch.empty(launch.part, dtype=torch.float32, device=query.device)
    tensors = (_addressable(query), _addressable(key), _addressable(value), out_rows, lse_rows)
    arguments = (*tensors, *launch.scalars, sink) if part is None else (*tensors, part, *launch.scalars)
    _run_on(query.get_device(), launch.run, arguments)
    return out, lse


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor,
    sink: Tensor | None,  # fp32
    options: Options,
) -> None:
    """``attention_fwd`` with a mask, whose tile lists and bits stand for is_causal and the window too."""
    run, packs, tiles, load, scalars = _masked_launch_of(query, key, value, attn_mask, sink is not None, options)
    done = masks.prepared(masks.in_4d(attn_mask, key.shape[1] if packs else None), tiles, load)
    if packs:
        query, out, lse = _packed(query, out, lse, key.shape[1])
    run(_addressable(query), _addressable(key), _addressable(value), out, lse, *done, *scalars, sink)


def _masked_launch_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, has_sink: bool, options: Options
) -> _MaskedLaunch:
    batch, heads, seqlen_q, head_dim = query.shape
    heads_kv, seqlen_k, head_dim_v = value.shape[1:]
    is_causal, left, right = _visible(options, seqlen_q, seqlen_k)
    right = 0 if is_causal else right
    mask, kind = masks.in_4d(attn_mask), mask_kind(attn_mask.dtype)
    num_sms = Target.of(query.device).num_sms
    flags = (right is not None, options.softcap > 0.0, has_sink)
    sizes = (batch, heads, heads_kv, seqlen_q, seqlen_k, num_sms)
    tile, packs, rows = sm90.forward_tiling(head_dim, head_dim_v, False, flags, *sizes, has_mask=True)
    if tile == "normal" and mask.size(1) > 1 and mask.stride(1) != 0:
        if sm90.takes_wide_biases(head_dim, head_dim_v, flags, kind):
            tile = sm90.forward_tile(head_dim, head_dim_v, False, False, *rows)
    plan = _masked_plan(query.dtype, head_dim, head_dim_v, kind, tile, flags, query.get_device())
    _, unit, cap_factor = _scaling(options, head_dim)
    sequences = batch, heads_kv if packs else heads, rows[0], seqlen_k
    tiles = masks.Tiles(*sequences, left, right, plan.tile_m, plan.tile_n)
    scalars = (unit * LOG2_E, num_sms, *_biasing(attn_mask, unit), cap_factor)
    return _MaskedLaunch(plan.run, packs, tiles, functools.partial(_load_preparation, plan.preparation), scalars)


def _biasing(attn_mask: Tensor, unit: float) -> tuple[float | None, float | None]:
    """bias_factor and bias_limit of a call whose scores are so many times what the kernel has of them."""
    if attn_mask.dtype is torch.bool:
        return None, None
    return 1.0 / unit, 2.0 ** (18 - math.floor(math.log2(unit)))


def prepared_fwd(query: Tensor, key: Tensor, value: Tensor, options: Options, attn_mask: Tensor | None = None) -> Run:
    """``attention_fwd`` without a sink for calls like this one, which has run: with tensors of the same sizes, strides,
    dtypes and devices. All that does not depend on addresses is settled here. Takes query, key, value and, if there is
    one, the mask, which is kept if this is asked for in eager mode."""

    keeps = attn_mask is not None and masks.is_in_eager_mode()

    def any_run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        with masks.in_eager_mode() if keeps else contextlib.nullcontext():
            return attention_fwd(query, key, value, None, options, attn_mask)

    if key.shape[2] == 0 or query.numel() == 0:
        return any_run
    launch: _Launch | _MaskedLaunch
    if attn_mask is None:
        launch = _launch_of(query, key, value, False, options)
    else:
        launch = _masked_launch_of(query, key, value, attn_mask, False, options)
    out, lse = empty_out_lse(query, value)
    given = (_packed(query, out, lse, key.shape[1])[0] if launch.packs else query, key, value)
    if not all(_addressable(x) is x for x in given):
        return any_run
    layouts = query.get_device(), key.shape[1], _layout(out), _layout(lse)
    if isinstance(launch, _Launch):
        return _fast_fwd(any_run, launch, *layouts)
    return _fast_masked_fwd(any_run, launch, keeps, *layouts)


def _fast_fwd(any_run: Run, launch: _Launch, device: int, heads_kv: int, layout_out: Layout, layout_lse: Layout) -> Run:
    """What ``prepared_fwd`` gives; ``any_run`` serves what it can't."""
    run, packs, part, scalars = launch
    current_device, empty = private.current_device, private.empty_strided_cuda
    layout_part = part and _layout(torch.empty(part, dtype=torch.float32, device="meta"))

    def fast_run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15 or current_device() != device:
            return any_run(query, key, value)
        out, lse = empty(*layout_out), empty(*layout_lse)
        rows = _packed(query, out, lse, heads_kv) if packs else (query, out, lse)
        if layout_part:
            run(rows[0], key, value, rows[1], rows[2], empty(*layout_part), *scalars)
        else:
            run(rows[0], key, value, rows[1], rows[2], *scalars, None)
        return out, lse

    return fast_run


def _fast_masked_fwd(
    any_run: Run, launch: _MaskedLaunch, keeps: bool, device: int, heads_kv: int, layout_out: Layout, layout_lse: Layout
) -> Run:
    """The same with a mask."""
    run, packs, tiles, load, scalars = launch
    current_device, empty = private.current_device, private.empty_strided_cuda
    prepared = masks.Repeated(tiles, load, keeps, device, heads_kv if packs else None)

    def fast_run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> tuple[Tensor, ...]:
        if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15 or current_device() != device:
            return any_run(query, key, value, attn_mask)
        done = prepared(attn_mask)
        out, lse = empty(*layout_out), empty(*layout_lse)
        rows = _packed(query, out, lse, heads_kv) if packs else (query, out, lse)
        run(rows[0], key, value, rows[1], rows[2], *done, *scalars, None)
        return out, lse

    return fast_run


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), tuple(x.stride()), x.dtype


def _launch_of(query: Tensor, key: Tensor, value: Tensor, has_sink: bool, options: Options) -> _Launch:
    head_dim, head_dim_v, seqlen_q = query.shape[3], value.shape[3], query.shape[2]
    is_causal, left, right = _visible(options, seqlen_q, key.shape[2])
    flags = (left is not None, options.softcap > 0.0, has_sink)
    batch, heads, heads_kv, num_sms = *query.shape[:2], key.shape[1], Target.of(query.device).num_sms
    sizes = (batch, heads, heads_kv, seqlen_q, key.shape[2], num_sms)
    tile, packs, rows = sm90.forward_tiling(head_dim, head_dim_v, is_causal, flags, *sizes)
    wanted = (query.dtype, head_dim, head_dim_v, is_causal, tile, flags, query.get_device())
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
    if tile != "split":
        return _Launch(plan.run, packs, None, (scale_log2, num_sms, left, right, cap_factor))
    seqlen_q, _, sequences, _ = rows
    part = (batch * sm90.forward_parts(*rows), sequences // batch, seqlen_q, head_dim_v + sm90.LSE_COLUMNS)
    return _Launch(plan.run, packs, part, (scale_log2, num_sms, cap_factor))


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv)
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    out: Tensor,  # (B, H, Sq, Dv)
    lse: Tensor,  # (B, H, Sq)
    options: Options,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention on the current stream of the tensors' CUDA device, with no synchronisation.

    Args:
        dout: gradient of out, any strides; copied first where TMA cannot address it.
        query, key, value, options: as ``attention_fwd`` got them.
        out, lse: as ``attention_fwd`` returned them.
        attn_mask: as ``attention_fwd`` got it; gets no gradient.

    Returns:
        dq, dk, dv in the dtypes and memory layouts of query, key and value. The order in which dq's summands are added
        varies from run to run, unless torch's deterministic mode is on; with a floating mask that is kept also that of
        dk's and dv's, once it is known to hide keys and no more. A row that saw no key contributes nothing.

    Raises:
        ValueError: a head dim or scale that no kernel takes.
        KernelUnavailable: the kernel is in no bundle and cannot be compiled here.
        NotImplementedError: an attn_mask in torch's deterministic mode.
    """
    if query.numel() == 0 or key.numel() == 0:
        dq, dk, dv = empty_grads(query, key, value)
        return dq.zero_(), dk.zero_(), dv.zero_()
    launch = _backward_launch_of(query, key, value, options, attn_mask)
    run, elements, scalars, heads = launch[:4]
    mask: tuple[Tensor | None, ...] = ()
    if attn_mask is not None:
        boolean = _run_on(query.get_device(), launch.as_boolean, (attn_mask,))
        if boolean is not None:
            return attention_bwd(dout, query, key, value, out, lse, options, boolean)
        mask = _run_on(query.get_device(), launch.prepared, (attn_mask,))
    dq, dk, dv = _empty_grads(query, key, value)
    (scratch,) = _empty(query, ((elements,), (1,), torch.float32))
    parts: tuple[Tensor, ...] = dk, dv
    if heads != key.shape[1]:
        parts = _empty(query, _parts_layout(key, heads), _parts_layout(value, heads))
    inputs = (_addressable(x) for x in (dout, query, key, value, out))
    _run_on(query.get_device(), run, (*inputs, lse.contiguous(), dq, dk, dv, *parts, scratch, *mask, *scalars))
    return dq, dk, dv


def _empty(like: Tensor, *layouts: Layout) -> tuple[Tensor, ...]:
    """Memory on the device of ``like`` that kernels write all of. In deterministic mode torch fills what Python gets in
    the common way: 240 MB for 16k tokens of 2048 values, where a backward of 512 tokens takes 470 µs."""
    if private.is_deterministic():
        allocate = private.empty_strided_cuda
        return _run_on(like.get_device(), lambda: tuple(allocate(*layout) for layout in layouts), ())
    return tuple(like.new_empty_strided(size, stride, dtype=dtype) for size, stride, dtype in layouts)


def _empty_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """dq, dk and dv."""
    if private.is_deterministic():
        return _empty(query, *_grad_layouts(_layout(query), _layout(key), _layout(value)))
    return empty_grads(query, key, value)


@functools.lru_cache(maxsize=4096)
def _grad_layouts(*inputs: Layout) -> tuple[Layout, ...]:
    """Layouts of dq, dk and dv."""
    query, key, value = (torch.empty_strided(size, stride, dtype=t, device="meta") for size, stride, t in inputs)
    return tuple(map(_layout, empty_grads(query, key, value)))


def prepared_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    attn_mask: Tensor | None = None,
) -> Run:
    """``attention_bwd`` for calls like this one, which has run, as ``prepared_fwd`` is for the forward."""

    keeps = attn_mask is not None and masks.is_in_eager_mode()

    def any_run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with masks.in_eager_mode() if keeps else contextlib.nullcontext():
            return attention_bwd(*tensors[:6], options, *tensors[6:])  # type: ignore[call-arg,arg-type]

    inputs = (dout, query, key, value, out)
    if query.numel() == 0 or key.numel() == 0:
        return any_run
    if not (lse.is_contiguous() and all(_addressable(x) is x for x in inputs)):
        return any_run
    launch = _backward_launch_of(query, key, value, options, attn_mask)
    run, elements, scalars, heads = launch[:4]
    device, current_device, empty = query.get_device(), private.current_device, private.empty_strided_cuda
    is_deterministic, deterministic = private.is_deterministic, private.is_deterministic()
    layout_dq, layout_dk, layout_dv = map(_layout, empty_grads(query, key, value))
    layout_scratch = (elements,), (1,), torch.float32
    heads_kv = key.shape[1]
    layout_part_k, layout_part_v = (_parts_layout(x, heads) for x in (key, value))
    prepared = launch.mask and masks.Repeated(*launch.mask, keeps, device, faster_if_boolean=launch.slower_than_boolean)
    of_boolean: list[Run] = []  # what serves these calls once the mask is known to be as good as boolean

    def fast_run(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *mask: Tensor
    ) -> tuple[Tensor, ...]:
        addresses = dout.data_ptr() | query.data_ptr() | key.data_ptr() | value.data_ptr() | out.data_ptr()
        if addresses & 15 or current_device() != device or is_deterministic() != deterministic:
            return any_run(dout, query, key, value, out, lse, *mask)
        done: tuple[Tensor | None, ...] = ()
        if prepared is not None:
            found = prepared(mask[0])
            if isinstance(found, Tensor):
                tensors = dout, query, key, value, out, lse
                if not of_boolean:
                    with masks.in_eager_mode():
                        of_boolean.append(prepared_bwd(*tensors, options, found))
                return of_boolean[0](*tensors, found)
            done = found
        dq, dk, dv, scratch = empty(*layout_dq), empty(*layout_dk), empty(*layout_dv), empty(*layout_scratch)
        parts = (dk, dv) if heads == heads_kv else (empty(*layout_part_k), empty(*layout_part_v))
        run(dout, query, key, value, out, lse, dq, dk, dv, *parts, scratch, *done, *scalars)
        return dq, dk, dv

    return fast_run


def _parts_layout(x: Tensor, heads: int) -> Layout:
    """Layout of the gradients of so many parts of key's or value's heads."""
    batch, _, seqlen, size = x.shape
    return (batch, heads, seqlen, size), (seqlen * heads * size, size, heads * size, 1), x.dtype


class _BackwardLaunch(NamedTuple):
    """What follows from the sizes, options and mask of a backward call."""

    run: Kernel
    scratch: int  # fp32 elements
    scalars: tuple[Any, ...]  # the kernel's arguments after its tensors
    heads: int  # of dK and dV in the kernel; see config.backward_heads
    mask: tuple[masks.Tiles, Callable[[], Kernel]] | None = None  # what it is prepared for, and by what
    slower_than_boolean: bool = False

    def as_boolean(self, attn_mask: Tensor) -> Tensor | None:
        """The mask as masks.as_boolean gives it, if that is faster."""
        if self.mask is None or not self.slower_than_boolean:
            return None
        return masks.as_boolean(masks.in_4d(attn_mask), self.mask[0])

    def prepared(self, attn_mask: Tensor) -> masks.Prepared:
        """The mask, as masks.prepared gives it."""
        assert self.mask is not None, "a call with a mask"
        return masks.prepared(masks.in_4d(attn_mask), *self.mask)


def _backward_launch_of(
    query: Tensor, key: Tensor, value: Tensor, options: Options, attn_mask: Tensor | None = None
) -> _BackwardLaunch:
    batch, heads, seqlen_q, head_dim = query.shape
    is_causal, left, right = _visible(options, seqlen_q, key.shape[2])
    deterministic = private.is_deterministic()
    has_mask = attn_mask is not None
    if has_mask and deterministic:
        raise NotImplementedError("the backward with an attn_mask has no deterministic mode")
    flags = (left is not None, options.softcap > 0.0, deterministic)
    kind = mask_kind(None if attn_mask is None else attn_mask.dtype)
    wanted = (query.dtype, head_dim, value.shape[3], is_causal, flags, kind, query.get_device())
    plan = _backward_plans.get(wanted) or _make_backward_plan(*wanted)
    scale, unit, cap_factor = _scaling(options, head_dim)
    blocks, tiles = -(-seqlen_q // plan.config.tile_m), -(-key.shape[2] // plan.config.tile_n)
    is_masked = is_causal or left is not None or has_mask
    counts = batch, heads, key.shape[1], tiles, blocks, plan.config.visited(blocks, left, right)
    summed = sm90.backward_heads(plan.config, *counts, is_masked, deterministic, plan.num_sms)
    visits = blocks * (heads // summed)
    schedule = sm90.backward_schedule(batch * summed, tiles, visits, is_masked, deterministic, plan.num_sms)
    turns = batch * summed * tiles if deterministic else 0
    size = plan.config.scratch(batch * heads, blocks, heads // summed, schedule.slots, turns)
    if attn_mask is None or plan.preparation is None:
        scalars: tuple[Any, ...] = (scale, unit * LOG2_E, plan.num_sms, *schedule, left, right, cap_factor)
        return _BackwardLaunch(plan.run, size, scalars, summed)
    bounds, load = (left, 0 if is_causal else right), functools.partial(_load_preparation, plan.preparation)
    sizes = (batch, heads, seqlen_q, key.shape[2], *bounds, plan.config.tile_m, plan.config.tile_n, summed)
    scalars = (scale, unit * LOG2_E, plan.num_sms, *schedule, *_biasing(attn_mask, unit), cap_factor)
    slower = sm90.is_faster_if_boolean(head_dim, value.shape[3], flags[1], kind)
    return _BackwardLaunch(plan.run, size, scalars, summed, (masks.Tiles(*sizes), load), slower)


def _scaling(options: Options, head_dim: int) -> tuple[float, float, float | None]:
    """``(scale, unit, cap_factor)``: a score is unit times what the kernel has of it, Q Kᵀ or with a softcap the tanh
    of Q Kᵀ · scale / softcap, which it takes from Q Kᵀ · cap_factor. ValueError for a scale that no kernel takes."""
    scale = 1.0 / math.sqrt(head_dim) if options.scale is None else options.scale
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={options.scale} must be positive and finite")
    if options.softcap:
        return scale, options.softcap, 2.0 * scale * LOG2_E / options.softcap
    return scale, scale, None


def _run_on(device: int, run: Callable[..., Any], arguments: tuple) -> Any:
    """Launch on the current stream of ``device``, or do something else with that as the current device."""
    if device == torch.cuda.current_device():
        return run(*arguments)
    with torch.cuda.device(device):
        return run(*arguments)


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
    sizes = (spec.batch, spec.num_heads, spec.num_heads_kv, spec.seqlen_q, spec.seqlen_k, target.num_sms)
    tiles = sm90.forward_tiles(head_dim, head_dim_v, is_causal, any(flags))
    is_causal = is_causal and not window
    has_mask = spec.mask != "none"
    if has_mask:
        tiles = sm90.forward_tiles(head_dim, head_dim_v, False, True)
        may_be_wide = sm90.takes_wide_biases(head_dim, head_dim_v, flags, spec.mask)
    if target.num_sms and not any_size and all(isinstance(n, int) for n in sizes):
        flags = (window or is_causal, *flags[1:]) if has_mask else flags
        is_cut_causal = is_causal and not has_mask
        tiles = (sm90.forward_tiling(head_dim, head_dim_v, is_cut_causal, flags, *sizes, has_mask=has_mask).tile,)
    needed = tuple(_key(spec.dtype, head_dim, head_dim_v, is_causal, tile, flags) for tile in tiles if not has_mask)
    if has_mask:
        tiles += ("wide",) if may_be_wide and "normal" in tiles else ()
        needed = tuple(
            key for tile in tiles for key in _masked_keys(spec.dtype, head_dim, head_dim_v, spec.mask, tile, flags)
        )
    if not spec.needs_grad:
        return needed
    options = {"window": window, "softcap": flags[1], "deterministic": spec.deterministic, "attn_mask": spec.mask}
    backward = sm90.backward_key(spec.dtype, head_dim, head_dim_v, is_causal, **options)
    needed += (backward, *_transposed(backward))
    if sm90.is_faster_if_boolean(head_dim, head_dim_v, flags[1], spec.mask):
        boolean = sm90.backward_key(spec.dtype, head_dim, head_dim_v, False, softcap=flags[1], attn_mask="bool")
        needed += (boolean, *_transposed(boolean))
    return needed


def _transposed(backward: KernelKey) -> tuple[KernelKey, ...]:
    """What prepares the masks of a backward kernel, if it takes any."""
    if not backward.attn_mask:
        return ()
    return (sm90.mask_key(backward.attn_mask, backward.tile_m, backward.tile_n, transposed=True),)


def _masked_keys(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    attn_mask: MaskKind,
    tile: sm90.Tile,
    flags: tuple[bool, bool, bool],  # as of ``_key``; of a window nothing is left in the key
) -> tuple[KernelKey, KernelKey]:
    """The forward with a mask, and what prepares the mask for it."""
    _, softcap, sink = flags
    key = sm90.forward_key(dtype, head_dim, head_dim_v, False, tile, softcap=softcap, sink=sink, attn_mask=attn_mask)
    return key, sm90.mask_key(attn_mask, key.tile_m, key.tile_n)


def _masked_plan(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    attn_mask: MaskKind,
    tile: sm90.Tile,
    flags: tuple[bool, bool, bool],
    device: int,
) -> _MaskedPlan:
    wanted = (dtype, head_dim, head_dim_v, attn_mask, tile, flags[1:], device)
    found = _masked_plans.get(wanted)
    if found is not None:
        return found
    target = Target.of(torch.device("cuda", device))
    if family_of(target) != "sm90" or dtype not in sm90.DTYPE_NAMES:
        raise ValueError(f"no forward kernel for {dtype} on {target.name} (arch {target.arch})")
    key, preparation = _masked_keys(dtype, head_dim, head_dim_v, attn_mask, tile, flags)
    plan = _MaskedPlan(kernel(key), preparation, key.tile_m, key.tile_n)
    return plan._replace(run=first_launch(key, plan.run, lambda: _masked_plans.update({wanted: plan})))


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


def _packed(query: Tensor, out: Tensor, lse: Tensor, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of tensors with one query per head, where the heads that share a key/value head are rows of one head."""
    batch, heads = lse.shape[:2]
    group = heads // heads_kv

    def pack(x: Tensor) -> Tensor:
        of_batch, of_head, _, unit = x.stride()
        return x.as_strided((batch, heads_kv, group, x.shape[3]), (of_batch, group * of_head, of_head, unit))

    return pack(query), pack(out), lse.view(batch, heads_kv, group)


def _make_backward_plan(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    flags: tuple[bool, bool, bool],
    attn_mask: MaskKind,
    device: int,
) -> _BackwardPlan:
    target = Target.of(torch.device("cuda", device))
    if family_of(target) != "sm90" or dtype not in sm90.DTYPE_NAMES:
        raise ValueError(f"no backward kernel for {dtype} on {target.name} (arch {target.arch})")
    window, softcap, deterministic = flags
    options = {"window": window, "softcap": softcap, "deterministic": deterministic, "attn_mask": attn_mask}
    key = sm90.backward_key(dtype, head_dim, head_dim_v, is_causal, **options)
    config = sm90.backward_config(head_dim, head_dim_v, softcap, attn_mask)
    plan = _BackwardPlan(kernel(key), target.num_sms, config, next(iter(_transposed(key)), None))

    def keep() -> None:
        _backward_plans[dtype, head_dim, head_dim_v, is_causal, flags, attn_mask, device] = plan

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
