"""Attention forward and backward on the CPU: online softmax over key blocks, recomputation from lse backwards.

Never holds more than one TILE_M × TILE_N block of scores per head. Works in fp32 (fp64 for fp64 inputs). The query
heads that share a key/value head are stacked into the rows of one matrix product, so K and V are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...meta import shapes
from .config import TILE_M, TILE_N


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, Dv) and lse (B, H, Sq); FlashAttention-2, arXiv:2307.08691, algorithm 1."""
    out, lse = shapes.empty_out_lse(query, value)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    scale = 1.0 / math.sqrt(query.size(3)) if scale is None else scale
    heads_kv, seqlen_k = key.shape[1:3]
    for m in _blocks(query.size(2), TILE_M):
        q = _rows(query[:, :, m], heads_kv)  # (B, H_kv, G·M, D)
        rows = q.shape[:3]
        acc = q.new_zeros((*rows, value.size(3)))
        row_max = q.new_full((*rows, 1), -math.inf)
        row_sum = q.new_zeros((*rows, 1))
        for n in _blocks(min(seqlen_k, m.stop) if is_causal else seqlen_k, TILE_N):
            scores = _scores(q, key[:, :, n].to(q.dtype), m, n, is_causal, scale)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            safe_max = new_max.masked_fill(new_max == -math.inf, 0.0)  # a row that saw no key yet: exp(−inf − 0) = 0
            p = torch.exp(scores - safe_max)
            rescale = torch.exp(row_max - safe_max)
            row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
            acc = acc * rescale + p @ value[:, :, n].to(q.dtype)
            row_max = new_max
        out[:, :, m] = _heads(acc / row_sum.masked_fill(row_sum == 0.0, 1.0), query.size(1)).to(out.dtype)
        lse[:, :, m] = _heads(row_max + torch.log(row_sum), query.size(1)).squeeze(-1)
    return out, lse


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,  # (B, H, Sq)
    *,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; FlashAttention-2, arXiv:2307.08691, algorithm 2."""
    grads = dq, dk, dv = shapes.empty_grads(query, key, value)
    scale = 1.0 / math.sqrt(query.size(3)) if scale is None else scale
    heads, heads_kv, seqlen_k = query.size(1), *key.shape[1:3]
    work = torch.promote_types(query.dtype, torch.float32)
    if heads_kv == 0 or heads == 0:
        return tuple(g.zero_() for g in grads)  # type: ignore[return-value]
    dk_acc, dv_acc = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (key, value))
    for m in _blocks(query.size(2), TILE_M):
        q, do, o = (_rows(x[:, :, m], heads_kv) for x in (query, dout, out))
        row_lse = _rows(lse[:, :, m, None], heads_kv).to(work)
        row_lse = row_lse.masked_fill(row_lse == -math.inf, math.inf)  # a row that saw no key: P = exp(−inf) = 0
        delta = (do * o).sum(-1, keepdim=True)
        dq_acc = torch.zeros_like(q)
        for n in _blocks(min(seqlen_k, m.stop) if is_causal else seqlen_k, TILE_N):
            k, v = key[:, :, n].to(work), value[:, :, n].to(work)
            p = torch.exp(_scores(q, k, m, n, is_causal, scale) - row_lse)
            ds = p * (do @ v.mT - delta)
            dv_acc[:, :, n] += p.mT @ do
            dk_acc[:, :, n] += ds.mT @ q
            dq_acc += ds @ k
        dq[:, :, m] = _heads(dq_acc * scale, heads).to(dq.dtype)
    dk.copy_(dk_acc * scale)
    dv.copy_(dv_acc)
    return dq, dk, dv


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _rows(x: Tensor, heads_kv: int) -> Tensor:
    """(B, H, M, D) → (B, H_kv, G·M, D) in the working precision: the G query heads of a key/value head, stacked."""
    batch, heads, m, d = x.shape
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, heads_kv, heads // heads_kv * m, d)


def _heads(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``_rows``: (B, H_kv, G·M, D) → (B, H, M, D)."""
    batch, heads_kv, rows, d = x.shape
    return x.reshape(batch, heads, rows * heads_kv // heads, d)


def _scores(q: Tensor, k: Tensor, m: slice, n: slice, is_causal: bool, scale: float) -> Tensor:
    """scale · Q Kᵀ of one block, −inf where key j > query i."""
    scores = (q @ k.mT) * scale
    if is_causal and n.stop > m.start + 1:
        i = torch.arange(m.start, m.stop, device=q.device).repeat(scores.size(2) // (m.stop - m.start))
        j = torch.arange(n.start, n.stop, device=q.device)
        scores.masked_fill_(j[None, :] > i[:, None], -math.inf)
    return scores
