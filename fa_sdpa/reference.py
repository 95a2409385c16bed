"""The oracle and the error bound: attention written out, and FlashAttention's rule for how far a kernel may be off."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .meta.spec import Options


def attention(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Sq, Sk); boolean, or added to the scores
    sink: Tensor | None = None,  # (H,)
    **options: Any,  # of meta.spec.Options
) -> tuple[Tensor, Tensor]:
    """Attention written out through full (Sq, Sk) matrices, differentiable, in the dtype of the inputs.

    Returns out (B, H, Sq, Dv) and lse (B, H, Sq); a row that sees no key has out = 0 and lse = −inf.
    """
    asked = Options(**options)
    seqlen_q, seqlen_k = query.size(2), key.size(2)
    group = query.size(1) // max(key.size(1), 1)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query * (1.0 / math.sqrt(query.size(3)) if asked.scale is None else asked.scale)) @ key.mT
    if asked.softcap > 0.0:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    left, right = asked.bounds(seqlen_q, seqlen_k)
    distance = torch.arange(seqlen_k, device=query.device) - torch.arange(seqlen_q, device=query.device)[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance < left
    if right is not None:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -math.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = (scores + attn_mask).masked_fill(attn_mask == -math.inf, -math.inf)  # gradients stay finite there
    if sink is not None:  # one more key that every row sees, with this score and a value of 0
        column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
        value = torch.cat((value, value.new_zeros((*value.shape[:2], 1, value.size(3)))), dim=2)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.softmax(scores, dim=-1).masked_fill((lse == -math.inf)[..., None], 0.0)
    return p.to(value.dtype) @ value, lse


def excess(actual: Tensor, expected: Tensor, baseline: Tensor, floor: float = 0.0) -> float:
    """How far ``actual`` breaks FlashAttention's rule: 0 or less if it keeps it, NaN never keeps it.

    max|actual − expected| ≤ 2 · max|baseline − expected| + atol + floor,
    atol = 2 · max|expected + 0.3 − 0.3 − expected|, with the rounding of atol taken in the dtype of ``actual``.

    Args:
        actual: what the kernel gave, in its dtype.
        expected: the same math in fp32 or better.
        baseline: the same math in the dtype of the kernel's inputs.
        floor: for values that the math makes exactly 0, the gradient of a softmax over one key say, where the
            baseline has no error and recomputation from lse has rounding.
    """
    if actual.numel() == 0:
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected = expected.to(wide)
    rounded = expected.to(actual.dtype)
    atol = 2 * ((rounded + 0.3 - 0.3).to(wide) - rounded.to(wide)).abs().max()
    bound = 2 * (baseline.to(wide) - expected).abs().max() + atol + floor
    excess = (actual.to(wide) - expected).abs().max() - bound
    return math.inf if excess.isnan() else excess.item()


def worst(actual: Tensor, expected: Tensor) -> str:
    """The element that is furthest off, for an assertion's message."""
    error = (actual.double() - expected.double()).abs().nan_to_num(nan=math.inf)
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"worst at {index}: got {actual[index].item():.6g}, expected {expected[index].item():.6g}"
