"""Who computes attention: fa4 as a program gets it, torch's own choice, each of torch's backends, flash-attn-4."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _torch_private as private
from ..policy import Policy
from ..router import explain
from ..switch import enable

OURS, NATIVE, PEER = "fa4", "native", "flash-attn-4"
TORCH_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = (OURS, NATIVE, *TORCH_BACKENDS, PEER)
DEFAULT = tuple(name for name in NAMES if name != "math")

Call = Callable[..., Tensor]  # query, key, value (B, H, S, D), is_causal and, if there is one, attn_mask → out
Scope = Callable[[], contextlib.AbstractContextManager[Any]]


class Contender(NamedTuple):
    """One way to compute attention."""

    name: str
    call: Call
    scope: Scope = contextlib.nullcontext  # to be open around calls; what opening it costs is nobody's time
    refuses: Callable[..., str] = lambda *call: ""  # why it does not take a call


def sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None = None) -> Tensor:
    """The call that programs make."""
    has_groups = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=has_groups)


def contender(name: str) -> Contender:
    """The contender called ``name``. Raises ValueError for no such name, ImportError for a peer that is not there."""
    if name == OURS:
        return Contender(OURS, sdpa, lambda: enable(Policy("always", jit="block")), _not_routed)
    if name == NATIVE:
        return Contender(NATIVE, sdpa)
    if name in TORCH_BACKENDS:
        return Contender(name, sdpa, lambda: sdpa_kernel(TORCH_BACKENDS[name]))
    if name == PEER:
        return Contender(PEER, _peer(), refuses=_not_its_alignment)
    raise ValueError(f"no backend {name!r}: there are {', '.join(NAMES)}")


def _not_routed(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None = None) -> str:
    """Why the router would leave this call to torch, with fa4's scope open."""
    has_groups = query.shape[1] != key.shape[1]
    decision = explain(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=has_groups)
    return "" if decision.routed else str(decision)


def _not_its_alignment(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None = None
) -> str:
    if attn_mask is not None:
        return "it takes no attn_mask"
    if is_causal and query.shape[2] != key.shape[2]:
        return "its causal mask is aligned at the bottom right"
    return ""


def _peer() -> Call:
    try:
        function = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    except RuntimeError as error:  # its compiler is only half there
        raise ImportError(f"{PEER} cannot be imported: {brief(error)}") from error

    def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def brief(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:300]


# ---- what torch really ran -------------------------------------------------------------------------------------------


def chosen_by_torch(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str:
    """The backend that torch's own choice falls on: "cudnn", "flash", "efficient", "math" or what torch calls it."""
    choice = private.fused_choice(query, key, value, is_causal, query.shape[1] != key.shape[1])
    return next((name for name, backend in TORCH_BACKENDS.items() if backend.name == choice), choice.lower())


def kernels_of(run: Callable[[], Any]) -> str:
    """The GPU kernel that takes most of the time of ``run``, by the profiler; "" if it sees none."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            run()
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                totals[event.name] = totals.get(event.name, 0.0) + event.device_time
    except RuntimeError as error:  # the driver does not let it
        return f"unknown: {brief(error)}"
    return max(totals, key=lambda name: totals[name], default="")
