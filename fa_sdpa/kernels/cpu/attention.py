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
from ...meta.spec import Options
from .config import TILE_M, TILE_N

HUGE = 1e4  # an lse beyond this has lost the logarithm of a count to rounding, or is about to


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    sink: Tensor | None,  # (H,)
    options: Options,
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Sq, Sk)
) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, Dv) and lse (B, H, Sq); FlashAttention-2, arXiv:2307.08691, algorithm 1."""
    out, lse = shapes.empty_out_lse(query, value)
    if lse.numel() == 0:
        return out, lse
    heads, heads_kv = query.size(1), key.size(1)
    attn_mask = _expanded(attn_mask, query, key)
    for m in _blocks(0, query.size(2), TILE_M):
        q = _rows(query[:, :, m], heads_kv)  # (B, H_kv, G·M, D)
        acc = q.new_zeros((*q.shape[:3], value.size(3)))
        row_max = q.new_full((*q.shape[:3], 1), -math.inf)
        if sink is not None:  # one more key, with this score and a value of 0
            row_max = _rows(sink.view(1, -1, 1, 1).expand(len(query), -1, m.stop - m.start, 1), heads_kv)
        row_sum = (row_max > -math.inf).to(q.dtype)
        for n in _key_blocks(m, query.size(2), key.size(2), options):
            scores, _ = _scores(q, key[:, :, n].to(q.dtype), m, n, query.size(2), key.size(2), attn_mask, options)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            safe_max = new_max.masked_fill(new_max == -math.inf, 0.0)  # a row that saw no key yet: exp(−inf − 0) = 0
            p = torch.exp(scores - safe_max)
            rescale = torch.exp(row_max - safe_max)
            row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
            acc = acc * rescale + p @ value[:, :, n].to(q.dtype)
            row_max = new_max
        out[:, :, m] = _heads(acc / row_sum.masked_fill(row_sum == 0.0, 1.0), heads).to(out.dtype)
        lse[:, :, m] = _heads(row_max + torch.log(row_sum), heads).squeeze(-1)
    return out, lse


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,  # (B, H, Sq); a sink needs nothing else here: it is part of lse
    options: Options,
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Sq, Sk)
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; FlashAttention-2, arXiv:2307.08691, algorithm 2."""
    dq, dk, dv = shapes.empty_grads(query, key, value)
    heads, heads_kv = query.size(1), key.size(1)
    work = torch.promote_types(query.dtype, torch.float32)
    attn_mask = _expanded(attn_mask, query, key)
    dk_acc, dv_acc = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (key, value))
    for m in _blocks(0, query.size(2) if query.numel() else 0, TILE_M):
        q, do, o = (_rows(x[:, :, m], heads_kv) for x in (query, dout, out))
        row_lse = _rows(lse[:, :, m, None], heads_kv).to(work)
        delta = (do * o).sum(-1, keepdim=True)
        dq_acc = torch.zeros_like(q)
        shift, row_sum = _weighing(q, key, row_lse, m, query.size(2), attn_mask, options)
        for n in _key_blocks(m, query.size(2), key.size(2), options):
            k, v = key[:, :, n].to(work), value[:, :, n].to(work)
            scores, slope = _scores(q, k, m, n, query.size(2), key.size(2), attn_mask, options)
            p = torch.exp(scores - shift) / row_sum
            ds = p * (do @ v.mT - delta) * slope
            dv_acc[:, :, n] += p.mT @ do
            dk_acc[:, :, n] += ds.mT @ q
            dq_acc += ds @ k
        dq[:, :, m] = _heads(dq_acc, heads).to(dq.dtype)
    dk.copy_(dk_acc)
    dv.copy_(dv_acc)
    return dq, dk, dv


def _expanded(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.size(2))


def _weighing(
    q: Tensor, key: Tensor, row_lse: Tensor, m: slice, seqlen_q: int, attn_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """``(shift, row_sum)`` of P = exp(S − shift) / row_sum: lse and 1, and for a row that saw no key inf.

    A row that sees only keys with a huge negative bias, such as the smallest number of a dtype, has an lse that no
    longer tells how many keys share the weight: there both are found again.
    """
    shift, row_sum = row_lse.masked_fill(row_lse == -math.inf, math.inf), torch.ones_like(row_lse)
    if attn_mask is None or attn_mask.dtype is torch.bool or not bool((row_lse < -HUGE).any()):
        return shift, row_sum
    top, total = torch.full_like(row_lse, -math.inf), torch.zeros_like(row_lse)
    for n in _key_blocks(m, seqlen_q, key.size(2), options):
        scores, _ = _scores(q, key[:, :, n].to(q.dtype), m, n, seqlen_q, key.size(2), attn_mask, options)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe_top = new_top.masked_fill(new_top == -math.inf, 0.0)
        total = total * torch.exp(top - safe_top) + torch.exp(scores - safe_top).sum(-1, keepdim=True)
        top = new_top
    again = (top > -math.inf) & torch.isclose(row_lse, top.float().to(row_lse.dtype), rtol=1e-3)  # not with a sink
    again &= row_lse < -HUGE
    return torch.where(again, top, shift), torch.where(again, total, row_sum)


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def _key_blocks(m: slice, seqlen_q: int, seqlen_k: int, options: Options) -> Iterator[slice]:
    """The blocks of keys that some query row of block ``m`` sees."""
    left, right = options.bounds(seqlen_q, seqlen_k)
    start = 0 if left is None else max(0, m.start + left)
    stop = seqlen_k if right is None else min(seqlen_k, m.stop + right)
    return _blocks(start, stop, TILE_N)


def _rows(x: Tensor, heads_kv: int) -> Tensor:
    """(B, H, M, D) → (B, H_kv, G·M, D) in the working precision: the G query heads of a key/value head, stacked."""
    batch, heads, m, d = x.shape
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, heads_kv, heads // heads_kv * m, d)


def _heads(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``_rows``: (B, H_kv, G·M, D) → (B, H, M, D)."""
    batch, heads_kv, rows, d = x.shape
    return x.reshape(batch, heads, rows * heads_kv // heads, d)


def _scores(
    q: Tensor,
    k: Tensor,
    m: slice,
    n: slice,
    seqlen_q: int,
    seqlen_k: int,
    attn_mask: Tensor | None,  # (B, H, Sq, Sk)
    options: Options,
) -> tuple[Tensor, Tensor | float]:
    """Scores of one block, −inf where a row does not see a key, and their derivative by Q Kᵀ."""
    scale = 1.0 / math.sqrt(q.size(3)) if options.scale is None else options.scale
    scores = (q @ k.mT) * scale
    slope: Tensor | float = scale
    if options.softcap > 0.0:
        tanh = torch.tanh(scores / options.softcap)
        scores, slope = tanh * options.softcap, (1.0 - tanh * tanh) * scale
    if attn_mask is not None:
        block = attn_mask[:, :, m, n].reshape(scores.shape)  # the heads stacked as in ``_rows``
        scores = scores.masked_fill(~block, -math.inf) if block.dtype is torch.bool else scores + block
    left, right = options.bounds(seqlen_q, seqlen_k)
    if left is None and right is None:
        return scores, slope
    i = torch.arange(m.start, m.stop, device=q.device).repeat(scores.size(2) // (m.stop - m.start))[:, None]
    j = torch.arange(n.start, n.stop, device=q.device)[None, :]
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if left is not None:
        hidden = hidden | (j < i + left)
    if right is not None:
        hidden = hidden | (j > i + right)
    return scores.masked_fill(hidden, -math.inf), slope
