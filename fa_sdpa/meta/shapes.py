"""Output metadata: shapes, strides and dtypes of both ops, for real tensors and fake ones alike.

The fake implementations return these, and the CPU and CUDA implementations allocate with them, so that eager and
compiled runs can't disagree. SymInt-safe: sizes are only handed on, or put through ``torch._check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .spec import Options


def check_fwd(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, sink: Tensor | None, options: Options
) -> None:
    """Raise RuntimeError if these can't be inputs of ``fa4::attention_fwd``; see its docstring for the rules."""
    _check_one("query", query, query)
    _check_one("key", key, query)
    _check_one("value", value, query)
    _check(query.dtype.is_floating_point, lambda: f"query must be floating point, got {query.dtype}")
    _check(key.size(3) == query.size(3), lambda: f"key has head_dim {key.size(3)}, query has {query.size(3)}")
    _check(key.size(1) == value.size(1), lambda: f"key has {key.size(1)} heads, value has {value.size(1)}")
    _check(key.size(2) == value.size(2), lambda: f"key has seqlen {key.size(2)}, value has {value.size(2)}")
    num_heads, num_heads_kv = query.size(1), key.size(1)
    _check(
        num_heads == num_heads_kv or (num_heads_kv != 0 and num_heads % num_heads_kv == 0),
        lambda: f"num_heads_kv ({num_heads_kv}) must divide num_heads ({num_heads})",
    )
    _check_options(options)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    if sink is not None:
        _check(
            sink.dim() == 1 and sink.size(0) == num_heads and sink.dtype.is_floating_point,
            lambda: f"sink must be floating point ({num_heads},), got {sink.dtype} {tuple(sink.shape)}",
        )
        _check(sink.device == query.device, lambda: f"sink is on {sink.device}, query is on {query.device}")


def check_bwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    sink: Tensor | None,
    options: Options,
) -> None:
    """Raise RuntimeError if these can't be inputs of ``fa4::attention_bwd``."""
    check_fwd(query, key, value, attn_mask, sink, options)
    expected = (*query.shape[:3], value.size(3))
    _check(dout.shape == expected, lambda: f"dout is {tuple(dout.shape)}, expected {expected}")
    _check(out.shape == expected, lambda: f"out is {tuple(out.shape)}, expected {expected}")
    _check(lse.shape == expected[:3], lambda: f"lse is {tuple(lse.shape)}, expected {expected[:3]}")
    _check(
        dout.dtype == out.dtype == query.dtype and lse.dtype == torch.float32,
        lambda: (
            f"dout, out, lse are {dout.dtype}, {out.dtype}, {lse.dtype}; "
            f"expected {query.dtype}, {query.dtype}, torch.float32"
        ),
    )


def _check_one(name: str, x: Tensor, query: Tensor) -> None:
    _check(x.dim() == 4, lambda: f"{name} must be (batch, heads, seqlen, head_dim), got {x.dim()} dimensions")
    _check(x.dtype == query.dtype, lambda: f"{name} is {x.dtype}, query is {query.dtype}")
    _check(x.device == query.device, lambda: f"{name} is on {x.device}, query is on {query.device}")
    _check(x.size(0) == query.size(0), lambda: f"{name} has batch {x.size(0)}, query has {query.size(0)}")
    _check(x.size(3) != 0, lambda: f"{name} has an empty last dimension")
    _check(x.stride(3) == 1, lambda: f"{name} must be contiguous in its last dimension, stride is {x.stride(3)}")


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    dtypes = (torch.bool, query.dtype, torch.float32)
    _check(mask.dtype in dtypes, lambda: f"attn_mask is {mask.dtype}, expected one of {', '.join(map(str, dtypes))}")
    _check(mask.device == query.device, lambda: f"attn_mask is on {mask.device}, query is on {query.device}")
    scores = (*query.shape[:3], key.size(2))
    _check(
        mask_fits(mask.shape, scores),
        lambda: f"attn_mask is {tuple(mask.shape)}, which does not broadcast to {tuple(scores)} from 2 to 4 dimensions",
    )


def mask_fits(mask: Sequence[int], scores: Sequence[int]) -> bool:
    """Whether a mask's sizes broadcast to those of the scores, (B, H, Sq, Sk)."""
    if not 2 <= len(mask) <= 4:
        return False
    return all(size == 1 or size == full for size, full in zip(mask, scores[-len(mask) :], strict=True))


DENSE = 4  # scores for each value of a bias; with fewer it was not measured (benchmarks/sm90_masks.py), or was slower


def is_dense(mask: Tensor, scores: Sequence[int]) -> bool:
    """Whether a floating mask that fits the scores (B, H, Sq, Sk) has values of its own for so many of them that to
    read it, and perhaps to copy it, takes longer than the rest. Symbolic sizes count as 1."""
    if mask.dtype is torch.bool:
        return False
    missing = len(scores) - mask.dim()
    repeated = list(scores[:missing])
    for size, stride, full in zip(mask.shape, mask.stride(), scores[missing:], strict=True):
        if size == 1 or isinstance(stride, int) and stride == 0:
            repeated.append(full)
    return math.prod(size for size in repeated if isinstance(size, int)) < DENSE


def _check_options(options: Options) -> None:
    _check(options.softcap >= 0.0, lambda: f"softcap must be 0 (none) or positive, got {options.softcap}")
    for window in (options.window_left, options.window_right):
        if window is not None:
            _check(window >= 0, lambda: "window_left and window_right must be None or at least 0")


def _check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if condition is not True:  # torch._check alone costs half a microsecond, and there are twenty of these
        torch._check(condition, message)


def empty_out_lse(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` (B, H, Sq, Dv), laid out as torch's flash op does it,
    dense in the order of query's strides, and ``lse`` (B, H, Sq), fp32."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    head_dim_v = value.shape[3]
    if head_dim_v == head_dim:
        out = torch.empty_like(query)
    else:  # the rows of query keep their order in memory, only their length changes
        rows = torch.empty_like(query[..., :1])
        strides = [stride * head_dim_v for stride in rows.stride()[:3]]
        out = query.new_empty_strided((batch, num_heads, seqlen_q, head_dim_v), (*strides, 1))
    return out, query.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


def empty_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``dq``, ``dk``, ``dv``, each in the memory order of its input, as in torch's flash backward."""
    return _empty_grad(query), _empty_grad(key), _empty_grad(value)


def _empty_grad(x: Tensor) -> Tensor:
    if 0 in x.stride():  # expanded: no order can be read from that, and torch takes (B, S, H, D) memory
        return torch.empty_like(x.transpose(1, 2)).transpose(1, 2)
    return torch.empty_like(x)
