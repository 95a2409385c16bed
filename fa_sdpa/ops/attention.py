"""``fa4::attention_fwd`` and ``fa4::attention_bwd``: schema, CPU, CUDA, fake and autograd on one screen.

    S = scale · Q Kᵀ + mask        P = softmax(S)        O = P V        lse = log Σ_j exp S_ij
    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ − Σ dO∘O)      dQ = scale · dS K      dK = scale · dSᵀ Q

(FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.) What SDPA asks beyond this comes as further keyword
arguments with defaults (attn_mask, window, softcap, bottom-right alignment), which torch's schema rules let us append.

The Autograd kernels are written by hand rather than by ``torch.library.register_autograd``: the same graph for
6 and 13 µs a call (without and with gradients) instead of 16 and 27.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import launch
from ..kernels.cpu import attention as cpu
from ..meta import shapes
from ..meta.spec import AttentionSpec
from ..meta.target import Target

# Revision of the autograd formula. Callers that trace pass it explicitly: compile caches on disk are keyed by the
# graph and its arguments, so an artifact that holds an older formula is never loaded for a newer one.
VERSION = 1

_lib = torch.library.Library("fa4", "DEF")
_OPTIONS = f"*, bool is_causal=False, float? scale=None, int version={VERSION}"
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_lib.define(
    f"attention_fwd(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=_tags
)
_lib.define(
    "attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_tags,
)
_fwd = torch.ops.fa4.attention_fwd.default
_bwd = torch.ops.fa4.attention_bwd.default
_unsupported = lru_cache(maxsize=4096)(kernels.unsupported)


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention forward on the kernel of the inputs' device; differentiable in query, key and value.

    Args:
        query, key, value: one floating dtype and device, any strides with a contiguous last dimension. H_kv divides
            H: query head h reads key/value head h // (H / H_kv). CPU: fp64, fp32, bf16, fp16. CUDA: what
            ``fa_sdpa.explain`` lists for the GPU.
        is_causal: query row i sees keys 0 … i, aligned at the top left as in torch's SDPA, also where Sq ≠ Sk.
        scale: factor of Q Kᵀ; None is 1/√D.

    Returns:
        out (B, H, Sq, Dv) in query's dtype and memory layout, and lse (B, H, Sq) in fp32, natural log, which is not
        differentiable. A row that sees no key has out = 0 and lse = −inf.

    Raises:
        RuntimeError: inputs that break the rules above.
        NotImplementedError: no kernel runs this call here; the message lists every reason. There is no fallback:
            that is the router's business.
    """
    return torch.ops.fa4.attention_fwd(query, key, value, is_causal=is_causal, scale=scale)


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv), any strides
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # as attention_fwd returned it
    lse: Tensor,  # likewise
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_fwd``: (dq, dk, dv), shaped, typed and laid out like query, key and value.

    Not differentiable itself: a double backward raises. Raises as ``attention_fwd`` does.
    """
    return torch.ops.fa4.attention_bwd(dout, query, key, value, out, lse, is_causal=is_causal, scale=scale)


# ---- implementations -------------------------------------------------------------------------------------------------


def _require_kernel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, needs_grad: bool) -> None:
    """Raise with every reason why no kernel can run this call on its device."""
    spec = AttentionSpec.of(q, k, v, is_causal=is_causal, scale=scale, needs_grad=needs_grad)
    reasons = _unsupported(spec, Target.of(q.device))
    if reasons:
        raise NotImplementedError("fa4: no kernel for this call: " + "; ".join(map(str, reasons)))


def _check_version(version: int) -> None:
    if version != VERSION:
        raise RuntimeError(f"fa4: this graph holds version {version} of the formulas, installed is {VERSION}")


def _forward(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def impl(query, key, value, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
        _check_version(version)
        shapes.check_fwd(query, key, value)
        _require_kernel(query, key, value, is_causal, scale, needs_grad=False)
        return run(query, key, value, is_causal=is_causal, scale=scale)

    return impl


def _backward(run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def impl(dout, query, key, value, out, lse, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
        _check_version(version)
        shapes.check_bwd(dout, query, key, value, out, lse)
        _require_kernel(query, key, value, is_causal, scale, needs_grad=True)
        return run(dout, query, key, value, out, lse, is_causal=is_causal, scale=scale)

    return impl


def _no_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("unreachable: no CUDA family has a backward kernel, so _require_kernel has raised")


_lib.impl("attention_fwd", _forward(cpu.attention_fwd), "CPU")
_lib.impl("attention_bwd", _backward(cpu.attention_bwd), "CPU")
_lib.impl("attention_fwd", _forward(launch.attention_fwd), "CUDA")
_lib.impl("attention_bwd", _backward(_no_backward), "CUDA")


@torch.library.register_fake("fa4::attention_fwd", lib=_lib)
def _fwd_fake(query, key, value, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
    shapes.check_fwd(query, key, value)
    return shapes.empty_out_lse(query, value)


@torch.library.register_fake("fa4::attention_bwd", lib=_lib)
def _bwd_fake(dout, query, key, value, out, lse, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
    shapes.check_bwd(dout, query, key, value, out, lse)
    return shapes.empty_grads(query, key, value)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, is_causal, scale, version):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return _fwd(query, key, value, is_causal=is_causal, scale=scale, version=version)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        query, key, value, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _dlse):  # type: ignore[no-untyped-def]
        if dout is None:
            return (None,) * 6
        is_causal, scale, version = ctx.options
        grads = _bwd(dout, *ctx.saved_tensors, is_causal=is_causal, scale=scale, version=version)
        return (*grads, None, None, None)


class _AttentionBackward(torch.autograd.Function):
    """Runs attention_bwd under create_graph=True; raises only if somebody does differentiate the gradients."""

    @staticmethod
    def forward(dout, query, key, value, out, lse, is_causal, scale, version):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return _bwd(dout, query, key, value, out, lse, is_causal=is_causal, scale=scale, version=version)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "fa4::attention_bwd is not differentiable, so attention has no double backward: "
            "use torch's math backend, torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fwd_autograd(query, key, value, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
    if _needs_grad(query, key, value):
        return _Attention.apply(query, key, value, is_causal, scale, version)
    with torch._C._AutoDispatchBelowAutograd():
        return _fwd(query, key, value, is_causal=is_causal, scale=scale, version=version)


def _bwd_autograd(dout, query, key, value, out, lse, *, is_causal=False, scale=None, version=VERSION):  # type: ignore[no-untyped-def]
    if _needs_grad(dout, query, key, value, out):
        return _AttentionBackward.apply(dout, query, key, value, out, lse, is_causal, scale, version)
    with torch._C._AutoDispatchBelowAutograd():
        return _bwd(dout, query, key, value, out, lse, is_causal=is_causal, scale=scale, version=version)


_lib.impl("attention_fwd", _fwd_autograd, "Autograd")
_lib.impl("attention_bwd", _bwd_autograd, "Autograd")
