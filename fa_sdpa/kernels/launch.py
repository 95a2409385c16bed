"""From torch's call to a kernel launch: allocate, find the compiled kernel, call it. Host time per call counts here."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..meta.shapes import empty_out_lse
from ..meta.target import Target
from . import family_of
from .compile import Kernel, kernel
from .sm90 import config as sm90

LOG2_E = math.log2(math.e)


class _Plan(NamedTuple):
    """What a launch needs beyond its tensors."""

    run: Kernel
    scale_log2: float  # of the default scale
    num_sms: int


_plans: dict[tuple, _Plan] = {}


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention forward on the current stream of the tensors' CUDA device, with no synchronisation.

    Args:
        query, key, value: bf16 or fp16, any strides with a contiguous last dimension; what TMA cannot address (a base
            or a stride that is no multiple of 16 bytes) is copied first. H_kv divides H.
        is_causal: query row i sees keys 0 … i.
        scale: factor of Q Kᵀ, positive and finite; None is 1/√D.

    Returns:
        out (B, H, Sq, Dv) in query's dtype and memory layout; lse (B, H, Sq) fp32, natural log. A row that sees no key
        has out = 0 and lse = -inf.

    Raises:
        ValueError: a head dim or scale that no kernel takes.
        KernelUnavailable: the kernel is in no bundle and cannot be compiled here.
    """
    out, lse = empty_out_lse(query, value)
    if lse.numel() == 0:
        return out, lse
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    device = query.get_device()
    head_dim = query.shape[3]
    wide = sm90.wants_wide_tile(head_dim, is_causal, query.shape[2])
    wanted = (query.dtype, head_dim, value.shape[3], is_causal, wide, device)
    plan = _plans.get(wanted) or _make_plan(*wanted)
    if scale is None:
        scale_log2 = plan.scale_log2
    elif 0.0 < scale < math.inf:
        scale_log2 = scale * LOG2_E
    else:
        raise ValueError(f"{scale=} must be positive and finite")
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    if device == torch.cuda.current_device():
        plan.run(query, key, value, out, lse, scale_log2, plan.num_sms)
    else:
        with torch.cuda.device(device):
            plan.run(query, key, value, out, lse, scale_log2, plan.num_sms)
    return out, lse


def _make_plan(dtype: torch.dtype, head_dim: int, head_dim_v: int, is_causal: bool, wide: bool, device: int) -> _Plan:
    target = Target.of(torch.device("cuda", device))
    if family_of(target) != "sm90" or dtype not in sm90.DTYPE_NAMES:
        raise ValueError(f"no forward kernel for {dtype} on {target.name} (arch {target.arch})")
    run = kernel(sm90.forward_key(dtype, head_dim, head_dim_v, is_causal, wide))
    plan = _Plan(run, LOG2_E / math.sqrt(head_dim), target.num_sms)
    _plans[dtype, head_dim, head_dim_v, is_causal, wide, device] = plan
    return plan


def _addressable(x: Tensor) -> Tensor:
    """``x`` if TMA can address it (16-bit dtype, base and strides multiples of 16 bytes), or else a view or a copy."""
    batch, head, row, _ = x.stride()
    if (batch | head | row) & 7 == 0 and x.data_ptr() & 15 == 0:
        return x
    if x.data_ptr() & 15 == 0:  # the stride of a dimension of size 1 means nothing
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        if (strides[0] | strides[1] | strides[2]) & 7 == 0:
            return x.as_strided(x.shape, (*strides[:3], 1))
    return x.clone(memory_format=torch.contiguous_format)
