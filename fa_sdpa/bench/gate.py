"""Whether a result is right, before it is timed: FlashAttention's rule (reference.py), for every element of the first
and the last group of heads, against the same math in fp32 (of fp32: in fp64) and in the inputs' dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference

SCORES = 2**26  # elements of a block of the reference's score matrix
WIDE_EPS = 16  # of the largest result, that fp32 and fp64 may be off in any case
RESULTS = ("out", "dq", "dk", "dv")


class Inputs(NamedTuple):
    """One call's tensors."""

    query: Tensor  # (B, H, Sq, D)
    key: Tensor  # (B, H_kv, Sk, D)
    value: Tensor  # (B, H_kv, Sk, Dv)
    dout: Tensor | None = None  # (B, H, Sq, Dv), where a backward is run
    is_causal: bool = False
    attn_mask: Tensor | None = None  # (1 | B, 1 | H, 1 | Sq, 1 | Sk)


class Expected(NamedTuple):
    """What is right for one group of heads, exactly and in the inputs' dtype."""

    batch: int
    head_kv: int
    exact: tuple[Tensor, ...]  # of RESULTS, as many as there are
    rounded: tuple[Tensor, ...]
    summands: int  # of the rounding that is left of a gradient of 0: with a single key the softmax is constant


def expected(inputs: Inputs) -> list[Expected]:
    """For the first group of heads of the first sequence and the last one of the last."""
    batch, heads_kv = inputs.key.shape[:2]
    found = []
    for b, h in dict.fromkeys(((0, 0), (batch - 1, heads_kv - 1))):
        part = _group(inputs, b, h)
        wide = part._replace(
            query=_widen(part.query),
            key=_widen(part.key),
            value=_widen(part.value),
            dout=None if part.dout is None else _widen(part.dout),
            attn_mask=None if part.attn_mask is None else _widen(part.attn_mask),
        )
        summands = part.query.shape[1] * part.query.shape[2] if part.key.shape[2] == 1 else 1
        found.append(Expected(b, h, _math(wide), _math(part), summands))
    return found


def _widen(x: Tensor) -> Tensor:
    if x.dtype is torch.bool:
        return x
    return x.double() if x.dtype in (torch.float32, torch.float64) else x.float()


def _group(inputs: Inputs, b: int, h: int) -> Inputs:
    """Key/value head ``h`` of sequence ``b``, and the query heads that read it."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    of_query, mask = slice(h * group, (h + 1) * group), inputs.attn_mask
    if mask is not None:
        mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
        mask = mask[:, of_query] if mask.shape[1] > 1 else mask
    return Inputs(
        inputs.query.detach()[b : b + 1, of_query],
        inputs.key.detach()[b : b + 1, h : h + 1],
        inputs.value.detach()[b : b + 1, h : h + 1],
        None if inputs.dout is None else inputs.dout[b : b + 1, of_query],
        inputs.is_causal,
        mask,
    )


def _math(part: Inputs) -> tuple[Tensor, ...]:
    """out, and with dout the gradients, block by block of query rows: a row's result depends on no other row, and the
    gradients of key and value are sums over the rows."""
    outs, dqs = [], []
    sums: list[Tensor] = []
    for rows, dout, mask, first in _blocks(part):
        leaves = [x.detach().requires_grad_(dout is not None) for x in (rows, part.key, part.value)]
        # Row r of the block is row first + r, and sees the keys up to that one.
        out, _ = reference.attention(*leaves, attn_mask=mask, window_right=first if part.is_causal else None)
        outs.append(out.detach())
        if dout is not None:
            dq, *of_keys = torch.autograd.grad(out, leaves, dout)
            dqs.append(dq)
            sums = [a + _widen(b) for a, b in zip(sums, of_keys, strict=True)] if sums else [_widen(x) for x in of_keys]
    results = [torch.cat(outs, dim=2)]
    if dqs:
        results += [torch.cat(dqs, dim=2), *(x.to(part.key.dtype) for x in sums)]
    return tuple(results)


def _blocks(part: Inputs) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, int]]:
    """Rows of query, dout and mask, and the first one's number."""
    heads, seqlen_q, seqlen_k = part.query.shape[1], part.query.shape[2], part.key.shape[2]
    step = max(SCORES // (heads * seqlen_k), 1)
    for first in range(0, seqlen_q, step):
        rows = slice(first, first + step)
        mask = part.attn_mask
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        yield part.query[:, :, rows], None if part.dout is None else part.dout[:, :, rows], mask, first


def judge(results: Sequence[Tensor], right: Sequence[Expected]) -> str:
    """What is wrong with ``results``, of RESULTS as many as there are; "" if nothing is. Only what was ``expected``
    for is looked at, except for NaN and infinity, which are found anywhere."""
    for name, result in zip(RESULTS, results, strict=False):
        if not bool(torch.isfinite(result).all()):
            return f"{name} has elements that are not finite"
    for want in right:
        for name, result, exact, rounded in zip(RESULTS, results, want.exact, want.rounded, strict=False):
            per_group = exact.shape[1]
            heads = slice(want.head_kv * per_group, (want.head_kv + 1) * per_group)
            got = result.detach()[want.batch : want.batch + 1, heads]
            floor = 0.0 if name == "out" else 1e-5 * want.summands**0.5
            if got.dtype in (torch.float32, torch.float64):  # where few roundings make twice another's error no wonder
                floor += WIDE_EPS * torch.finfo(got.dtype).eps * float(exact.abs().max())
            excess = reference.excess(got, exact, rounded, floor)
            if not excess <= 0.0:
                return f"{name} is off by {excess:.3g} more than allowed; {reference.worst(got, exact)}"
    return ""
