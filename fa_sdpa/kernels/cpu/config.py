"""What the CPU family runs, and in which blocks."""

from __future__ import annotations

import torch

from ...meta.spec import AttentionSpec, Reason, wrong_mask
from ...meta.target import Target

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rows of queries and keys in one block: the scores of a block stay in a core's L2 cache, and memory stays linear in
# the sequence length.
TILE_M, TILE_N = 128, 256


def unsupported(spec: AttentionSpec, target: Target) -> tuple[Reason, ...]:
    """Every reason why this family can't run ``spec``; empty if it can."""
    reasons = []
    if spec.dtype not in DTYPES:
        reasons.append(Reason("dtype", f"the CPU implementation takes fp64, fp32, bf16 and fp16, not {spec.dtype}"))
    reasons.extend(wrong_mask(spec))
    if spec.dropout_p != 0.0:
        reasons.append(Reason("dropout", f"no fa4 implementation has dropout (dropout_p={spec.dropout_p})"))
    if not spec.last_dim_contiguous:
        reasons.append(Reason("strides", "query, key and value must be contiguous in their last dimension"))
    return tuple(reasons)
