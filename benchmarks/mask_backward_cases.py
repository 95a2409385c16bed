"""Random calls of the backward op with an attn_mask, after a forward of our own, and how their gradients are judged.

Masks and data are those of mask_cases.py, dout and the rule those of backward_cases.py, with one term more: the
backward has P from lse, an fp32 number, which is the coarser the larger it is; where a row sees only keys with a huge
negative bias, P is off by a factor of exp(|lse| · 2^-22). Gradients are linear in dout, so those of dout · |lse| ·
2^-22 say how much that can be. And the forward's weights of such a row are all off by a factor of up to exp(|lse| ·
2^-24), as its maximum times the scale is rounded. That cancels in O / l but for their rounding to 16 bit: the weight of
a lone key, which is 1 else, and with it O and δ, are off by up to half an ulp, where dS would be 0. Not so beyond the
cut at ± 2^18 … 2^19, as that is a power of two. dout is 0 in the rows whose weights are chance (around -1e9, see
mask_cases.py).

Memory that is allocated is filled with NaN, and so are, in every other case, keys and values that no row sees. dK and
dV of a second run, with the mask that was kept, must be the same, and of a third one, when the device has said whether
a floating mask hides keys and no more. Where it does, and a boolean mask is faster, that one is judged like the first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from backward_cases import DOUT_LAYOUTS, Poison, gradient_of, judge, math_grads, rounded_out
from forward_cases import H100, Outcome, inputs
from mask_cases import MaskedCase, make_mask, poison, random_masked_case, spec_of
from torch import Tensor

from fa_sdpa import kernels
from fa_sdpa.kernels import launch, masks
from fa_sdpa.meta.shapes import empty_out_lse

RULE = (
    "max|grad - ref| <= 2 max(|pt - ref| + |rounded - ref|) + atol + floor, for dq, dk and dv; rounded has O in 16 bit "
    "and lse in fp32, and where |lse| is large weights in 16 bit; floor 1e-5, where rows see one key or few 1e-5 "
    "sqrt(summands)"
)


def random_backward_case(seed: int, index: int) -> MaskedCase:
    """Case ``index`` of ``seed``; boolean where there is no backward for another mask."""
    masked = random_masked_case(seed, 2_000_000 + index)
    refused = kernels.unsupported(spec_of(masked.case, masked.dtype, needs_grad=True), H100)
    return masked._replace(dtype="bool") if refused else masked


def weight_factors(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Random factors by which O of rows with these lse may be off for the rounding of weights to ``dtype``."""
    size = lse.abs().masked_fill(lse.abs() > 2.0**19, 0.0)
    most = (size * 2.0**-24).clamp(max=torch.finfo(dtype).eps / 2)
    return 1.0 + most * (2.0 * torch.rand_like(most) - 1.0)


def judge_masked(
    masked: MaskedCase,
    grads: Sequence[Tensor],
    lse: Tensor,  # of the forward
    tensors: Sequence[Tensor],  # query, key, value, without NaN
    sink: Tensor | None,
    mask: Tensor,
    dout: Tensor,
    like: Sequence[Tensor],  # whose strides the gradients must have
) -> Outcome:
    """Judge dq, dk and dv by the one that is furthest off."""
    case, options = masked.case, masked.case.options
    wide, wide_sink = [x.float() for x in tensors], None if sink is None else sink.float()
    wide_mask, dtype = mask if mask.dtype is torch.bool else mask.float(), tensors[0].dtype
    refs, _, ref_lse = math_grads(wide, dout, wide_sink, options, wide_mask)
    lows, _, _ = math_grads(list(tensors), dout, sink, options, mask)
    factors = weight_factors(ref_lse, dtype)
    rounded = rounded_out(wide, dout, wide_sink, options, dtype, wide_mask, factors)
    coarse = dout.float() * (lse.abs().nan_to_num(posinf=0.0) * 2.0**-22)[..., None]
    coarse_grads, _, _ = math_grads(wide, coarse, wide_sink, options, wide_mask)
    off = tuple(a.abs() + b.abs() for a, b in zip(rounded, coarse_grads, strict=True))
    few = case.seqlen_k == 1 or masked.content in ("one key", "sparse")
    floor = 1e-5 * math.sqrt(case.seqlen_q * case.heads / case.heads_kv) if few else 1e-5
    return judge(tuple(grads), refs[:3], lows[:3], off[:3], list(like), floor)


def check_backward(masked: MaskedCase, seed: int = 0, index: int = 0) -> Outcome:
    """Run one case and judge it by the gradient that is furthest off; ``error_lse`` is not used."""
    torch.manual_seed(hash((seed, index)) & 0x7FFFFFFF)
    case, options = masked.case, masked.case.options
    *tensors, sink = inputs(case)
    query, key, value = tensors
    mask = make_mask(masked)
    layout = random.Random(f"dout:{seed}:{index}").choice(DOUT_LAYOUTS)
    dout = gradient_of(empty_out_lse(query, value)[0], layout)
    wide, wide_sink = [x.float() for x in tensors], None if sink is None else sink.float()
    wide_mask = mask if mask.dtype is torch.bool else mask.float()
    _, _, ref_lse = math_grads(wide, dout, wide_sink, options, wide_mask)
    chance = (ref_lse < -1e8) & (ref_lse > -1e10)
    if bool(chance.any()):
        dout = dout.masked_fill(chance[..., None], 0.0)
    clean = [x.clone() for x in tensors]
    poison(masked, mask, key, value)
    with Poison() as memory, masks.in_eager_mode():
        out, lse = launch.attention_fwd(query, key, value, sink, options, mask)
        grads = launch.attention_bwd(dout, query, key, value, out, lse, options, mask)
        again = launch.attention_bwd(dout, query, key, value, out, lse, options, mask)
        torch.cuda.synchronize()
        settled = launch.attention_bwd(dout, query, key, value, out, lse, options, mask)
        as_boolean = launch._backward_launch_of(query, key, value, options, mask).as_boolean(mask) is not None
    if memory.count < 10:
        raise AssertionError(f"{memory.count} tensors allocated: some memory of a launch is not filled with NaN")
    outcome = judge_masked(masked, grads, lse, clean, sink, mask, dout, tensors)
    if as_boolean and not outcome.message:
        other = judge_masked(masked, settled, lse, clean, sink, mask, dout, tensors)
        if other.message or other.error * outcome.bound > outcome.error * other.bound:
            outcome = other
    allowed = (grads, settled) if as_boolean else (grads,)  # the device may have said so before the second run
    if not outcome.message and not all(any(_same(run, one) for one in allowed) for run in (again, settled)):
        return outcome._replace(message="another run with the mask that was kept gave another dK or dV")
    return outcome


def _same(grads: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether dK and dV are; dQ is added up in any order."""
    return all(torch.equal(a, b) for a, b in zip(grads[1:], others[1:], strict=True))
