"""The oracle and the error bound: attention written out, and FlashAttention's rule for how far a kernel may be off."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + mask) V and its lse, in the dtype of the inputs, through full (Sq, Sk) matrices.

    Differentiable. is_causal is aligned at the top left. Returns out (B, H, Sq, Dv) and lse (B, H, Sq); a row that
    sees no key has out = 0 and lse = −inf.
    """
    group = query.size(1) // max(key.size(1), 1)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scale = 1.0 / math.sqrt(query.size(3)) if scale is None else scale
    scores = (query * scale) @ key.mT
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.softmax(scores, dim=-1) @ value, lse


def excess(actual: Tensor, expected: Tensor, baseline: Tensor, floor: float = 0.0) -> float:
    """How far ``actual`` breaks FlashAttention's rule: 0 or less if it keeps it, NaN never keeps it.

    max|actual − expected| ≤ 2 · max|baseline − expected| + atol, atol = 2 · max|expected + 0.3 − 0.3 − expected| + floor,
    with the rounding of atol taken in the dtype of ``actual``.

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
