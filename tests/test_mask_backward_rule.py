"""The rule for gradients with an attn_mask (benchmarks/mask_backward_cases.py), where rows see one key with a large
bias: what the kernels' arithmetic gives passes, and what is wrong does not."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from forward_cases import Case, Options  # noqa: E402
from mask_backward_cases import judge_masked  # noqa: E402
from mask_cases import MaskedCase  # noqa: E402

SCALE = 0.042
OPTIONS = Options(is_causal=False, scale=SCALE, bottom_right=False, window_left=None, window_right=None, softcap=0.0)
CASE = Case("fp16", 128, 128, 3, 4, 2, 604, 1, OPTIONS, False, "bhsd", "bhsd", 4.0, False)


def multiply_add(a, b, c):
    """Rounded once."""
    return (a.double() * float(b) + c.double()).float()


def one_key_attention(query, key, value, dout, bias, fault):
    """dq, dk, dv and lse as the kernels have them: weights from fp32 scores and their rounded maximum; P, O, dS in 16
    bits; P of the backward from lse."""
    dtype, group = query.dtype, query.size(1) // key.size(1)
    wide_key, wide_value = (x.repeat_interleave(group, 1).float() for x in (key, value))
    scale_log2 = torch.tensor(SCALE * math.log2(math.e))
    limit = 2.0 ** (18 - math.floor(math.log2(SCALE)))
    scores = multiply_add(torch.full(query.shape[:3], bias), 1 / SCALE, (query.float() * wide_key).sum(-1))
    scores = scores.clamp(-limit, limit)
    shift = scores * scale_log2
    weights = torch.exp2(multiply_add(scores, scale_log2, -shift))
    out = (weights.to(dtype).float() / weights)[..., None].mul(wide_value).to(dtype)
    lse = (shift + torch.log2(weights)) * math.log(2)
    delta, weighed = (dout.float() * out.float()).sum(-1), (dout.float() * wide_value).sum(-1)
    weights = torch.exp2(multiply_add(scores, scale_log2, -(lse * math.log2(math.e))))
    if fault == "V cleared":
        weighed = torch.zeros_like(weighed)
    if fault == "one row's δ":
        delta[0, 0, 7] = 0
    if fault == "P twice":
        weights = 2 * weights
    gradient = (weights * (weighed - delta)).to(dtype).float()[..., None]
    dk = (gradient * query.float()).sum(2, keepdim=True) * SCALE
    dv = (weights.to(dtype).float()[..., None] * dout.float()).sum(2, keepdim=True)
    of_groups = (x.unflatten(1, (-1, group)).sum(2).to(dtype) for x in (dk, dv))
    return (gradient * wide_key * SCALE).to(dtype), *of_groups, lse


@pytest.mark.parametrize("fault", ["", "V cleared", "one row's δ", "P twice"])
@pytest.mark.parametrize("bias", [0.0, -1e4, torch.finfo(torch.float16).min])
def test_rows_with_one_key_and_a_large_bias(bias, fault):
    torch.manual_seed(0)
    masked = MaskedCase(CASE, "fp16", content="nothing", fill="lowest", broadcast="..1.")
    size = (CASE.batch, CASE.heads, CASE.seqlen_q, CASE.head_dim)
    query, dout = torch.randn(size).mul(CASE.spread).half(), torch.randn(size).half()
    key, value = (torch.randn(CASE.batch, CASE.heads_kv, 1, CASE.head_dim).half() for _ in range(2))
    mask = torch.full((CASE.batch, CASE.heads, 1, 1), bias, dtype=torch.float16)
    *grads, lse = one_key_attention(query, key, value, dout, bias, fault)
    tensors = query, key, value
    outcome = judge_masked(masked, grads, lse, tensors, None, mask, dout, tensors)
    assert bool(outcome.message) == bool(fault), outcome
