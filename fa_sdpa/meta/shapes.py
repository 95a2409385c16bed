"""Output metadata: shapes, strides and dtypes of both ops, for real tensors and fake ones alike.

The fake implementations return these, and the CPU and CUDA implementations allocate with them, so that eager and
compiled runs can't disagree. SymInt-safe: sizes are only handed on, or put through ``torch._check``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_fwd(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise what is wrong with the inputs of ``fa4::attention_fwd``; see its docstring for the rules."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        torch._check(x.dim() == 4, lambda: f"{name} must be (batch, heads, seqlen, head_dim), got {x.dim()} dimensions")
        torch._check(
            x.dtype == query.dtype and x.device == query.device,
            lambda: f"{name} is {x.dtype} on {x.device}, query is {query.dtype} on {query.device}",
        )
        torch._check(x.size(0) == query.size(0), lambda: f"{name} has batch {x.size(0)}, query has {query.size(0)}")
        torch._check(x.stride(3) == 1 or x.size(3) == 1, lambda: f"{name} must be contiguous in its last dimension")
    torch._check(query.dtype.is_floating_point, lambda: f"query must be floating point, got {query.dtype}")
    torch._check(key.size(3) == query.size(3), lambda: f"key has head_dim {key.size(3)}, query has {query.size(3)}")
    torch._check(
        key.size(1) == value.size(1) and key.size(2) == value.size(2),
        lambda: f"key is {tuple(key.shape)}, value is {tuple(value.shape)}: heads and seqlen must agree",
    )
    torch._check(query.size(3) > 0 and value.size(3) > 0, lambda: "head_dim and head_dim_v must be positive")
    num_heads, num_heads_kv = query.size(1), key.size(1)
    torch._check(
        num_heads == num_heads_kv or (num_heads_kv > 0 and num_heads % num_heads_kv == 0),
        lambda: f"num_heads_kv ({num_heads_kv}) must divide num_heads ({num_heads})",
    )


def check_bwd(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise what is wrong with the inputs of ``fa4::attention_bwd``."""
    check_fwd(query, key, value)
    expected = (*query.shape[:3], value.size(3))
    for name, x in (("dout", dout), ("out", out)):
        torch._check(x.shape == expected, lambda: f"{name} is {tuple(x.shape)}, expected {expected}")
        torch._check(x.dtype == query.dtype, lambda: f"{name} is {x.dtype}, query is {query.dtype}")
    torch._check(lse.shape == expected[:3], lambda: f"lse is {tuple(lse.shape)}, expected {expected[:3]}")
    torch._check(lse.dtype == torch.float32, lambda: f"lse is {lse.dtype}, expected torch.float32")


def like_flash(x: Tensor) -> Tensor:
    """An empty tensor with the layout that torch's flash op gives to an output shaped like ``x`` (B, H, S, D).

    torch allocates it as (B, S, H, D) and transposes back: dense, in the order of ``x``'s own strides.
    """
    return torch.empty_like(x.transpose(1, 2)).transpose(1, 2)


def empty_out_lse(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` (B, H, Sq, Dv), in the memory order of ``query``, and ``lse`` (B, H, Sq), fp32."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    head_dim_v = value.shape[3]
    if head_dim_v == head_dim:
        out = like_flash(query)
    else:  # the rows of query keep their order in memory, only their length changes
        rows = like_flash(query[..., :1])
        strides = [stride * head_dim_v for stride in rows.stride()[:3]]
        out = query.new_empty_strided((batch, num_heads, seqlen_q, head_dim_v), (*strides, 1))
    return out, query.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


def empty_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``dq``, ``dk``, ``dv``, each in the memory order of its input; expanded inputs get dense ones."""
    return like_flash(query), like_flash(key), like_flash(value)
