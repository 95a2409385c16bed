"""Random calls of the backward: what they are, how their gradients are judged, and which kernels they launch.

Rule (FlashAttention's), for dQ, dK, dV and the sink's gradient: max|grad - ref| ≤ 2 · max(|pt - ref| + |rounded -
ref|) + atol + floor, where ref is autograd through the math in fp32, pt the same in the inputs' dtype, and atol = 2 ·
max|ref + 0.3 - 0.3 - ref| in that dtype, or if that is more one unit in the last place of max|ref|. `rounded` is ref
but for δ = Σ dO ∘ O with O rounded to that dtype and the sum to fp32, as any backward has it that recomputes: where
rows see few keys, or few that count, pt, which never needs O, may be nearly exact. The floor is for what the math makes
exactly 0: with one key dS is 0, and recomputation from lse has rounding, the more of it the more is summed. Gradients
must have the strides that torch's flash backward gives them.

Calls, sizes, layouts and data are those of forward_cases.py, with dout in a layout of its own. All memory that a launch
allocates, results and scratch, is filled with NaN first. Every case has its own seed, so that
`check(draw(seed, index), seed, index)` alone draws the same call and the same data again.

Out and lse come from our forward in the kinds of END_TO_END. In the others they come from the math in fp32, so that no
forward kernel has to be compiled for them; forward_cases.py is the proof of those.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from forward_cases import (
    BREADTH,
    H100,
    LAYOUTS,
    PLAIN,
    Case,
    Outcome,
    Variant,
    excess,
    inputs,
    random_case,
    recording,
    with_layout,
    without_memory,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fa_sdpa import _torch_private as private
from fa_sdpa import reference
from fa_sdpa.kernels import launch
from fa_sdpa.kernels.key import KernelKey
from fa_sdpa.meta.shapes import empty_out_lse
from fa_sdpa.meta.spec import Options
from fa_sdpa.meta.target import Target
from fa_sdpa.ops.attention import attention_fwd

DOUT_LAYOUTS = ("as_out", *LAYOUTS, "transposed", "sliced", "expanded")
END_TO_END = ("plain", "options")
MASKS = ("full", "causal", "window")

# Kinds of calls, drawn from with equal weights: BREADTH, with fewer masks for head dims that nobody uses.
KINDS = {
    **PLAIN,
    "head dims": [
        Variant("fp16" if d // 8 % 2 else "bf16", d, d, mask)
        for d in range(8, 257, 8)
        for mask in (MASKS if d in (80, 96, 160, 192, 256) else MASKS[d // 8 % 3 :][:1])
    ],
    "head_dim_v": BREADTH["head_dim_v"],
    "options": [
        Variant(dtype, d, dv, *flags)
        for dtype, d, dv in (
            ("bf16", 64, 64),
            ("fp16", 128, 128),
            ("bf16", 96, 96),
            ("fp16", 192, 128),
            ("bf16", 256, 256),
        )
        for flags in (
            *(("window",), ("window", True), ("window", False, True), ("window", True, True)),
            *(("full", True), ("causal", False, True), ("causal", True, True)),
        )
    ],
}


class Drawn(NamedTuple):
    case: Case
    dout_layout: str
    end_to_end: bool


def draw(seed: int, index: int, kinds: dict[str, list[Variant]] = KINDS) -> Drawn:
    """Case ``index`` of ``seed``."""
    rng = random.Random(f"backward {seed}:{index}")
    kind = rng.choice(list(kinds))
    return Drawn(random_case(seed, index, {kind: kinds[kind]}), rng.choice(DOUT_LAYOUTS), kind in END_TO_END)


# ---- data ------------------------------------------------------------------------------------------------------------


def gradient_of(out: Tensor, layout: str) -> Tensor:
    """Random dout for ``out`` in one of DOUT_LAYOUTS."""
    batch, heads, seqlen, head_dim = out.shape
    if layout == "as_out":
        return torch.randn_like(out)
    if layout == "transposed":
        return torch.randn_like(out.mT.contiguous()).mT
    if layout == "sliced":
        return out.new_empty(batch, heads, 2 * seqlen, 2 * head_dim).normal_()[:, :, ::2, :head_dim]
    if layout == "expanded":  # what sum().backward() gives
        return out.new_empty(()).normal_().expand(out.shape)
    return with_layout(torch.randn_like(out), layout)


class Poison(TorchDispatchMode):
    """Within it allocated memory is not uninitialised but NaN, the largest integer, or True. Counts the tensors."""

    ALLOCATE = {
        *(torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided),
        *(torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided),
    }

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __enter__(self) -> Poison:
        self.direct = private.empty_strided_cuda  # which no mode sees
        private.empty_strided_cuda = lambda *layout: self.fill(self.direct(*layout))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        private.empty_strided_cuda = self.direct
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.fill(result) if func.overloadpacket in self.ALLOCATE else result

    def fill(self, result: Tensor) -> Tensor:
        self.count += 1
        if result.is_floating_point():
            return result.fill_(math.nan)
        return result.fill_(1 if result.dtype is torch.bool else torch.iinfo(result.dtype).max)


def math_grads(
    tensors: list[Tensor], dout: Tensor, sink: Tensor | None, options: Options, attn_mask: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Autograd through attention written out, in the dtype of ``tensors``: (dq, dk, dv and the sink's), out, lse."""
    leaves = [x.detach().contiguous().requires_grad_() for x in tensors]
    if sink is not None:
        leaves.append(sink.detach().to(leaves[0].dtype).requires_grad_())
    named = {"sink": leaves[3] if sink is not None else None, "attn_mask": attn_mask, **options._asdict()}
    out, lse = reference.attention(*leaves[:3], **named)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype)), out.detach(), lse.detach()


def rounded_out(
    tensors: list[Tensor],
    dout: Tensor,
    sink: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    attn_mask: Tensor | None = None,
    factors: Tensor | None = None,  # (B, H, Sq), by which O is off before it is rounded
) -> tuple[Tensor, ...]:
    """How far the gradients of fp32 ``tensors`` are off if δ = Σ dO ∘ O is that of O in ``dtype``, and a sum in fp32 as
    dP is, in the order of math_grads. dS_ij is off by p_ij times δ's error, and p_ij is the gradient of lse_i. (The
    fp32 sums matter where a row sees, or might as well see, one key: dS is 0, and δ and dP are all but the same.)"""
    leaves = [x.detach().contiguous().requires_grad_() for x in tensors]
    if sink is not None:
        leaves.append(sink.detach().requires_grad_())
    named = {"sink": leaves[3] if sink is not None else None, "attn_mask": attn_mask, **options._asdict()}
    out, lse = reference.attention(*leaves[:3], **named)
    dout = dout.to(out.dtype)
    coarse = out if factors is None else out * factors[..., None]
    error = (dout * (coarse.to(dtype).to(out.dtype) - out)).sum(-1)
    error = (error + 2.0**-24 * torch.randn_like(error) * (dout * out).abs().sum(-1)).detach()
    grads = torch.autograd.grad(lse, leaves, -error.to(lse.dtype), allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g.nan_to_num() for x, g in zip(leaves, grads, strict=True))


# ---- numerics --------------------------------------------------------------------------------------------------------


def check(drawn: Drawn, seed: int = 0, index: int = 0) -> Outcome:
    """Run one case and judge it by the gradient that is furthest off; ``error_lse`` is not used."""
    case, options = drawn.case, drawn.case.options
    torch.manual_seed(hash((seed, index)) & 0x7FFFFFFF)
    *tensors, sink = inputs(case)
    query, key, value = tensors
    dout = gradient_of(empty_out_lse(query, value)[0], drawn.dout_layout)
    wide = [x.float() for x in tensors]
    refs, ref_out, ref_lse = math_grads(wide, dout, None if sink is None else sink.float(), options)
    lows, _, _ = math_grads(tensors, dout, sink, options)
    rounded = rounded_out(wide, dout, None if sink is None else sink.float(), options, query.dtype)
    with Poison() as poison:
        if drawn.end_to_end:
            out, lse = launch.attention_fwd(query, key, value, sink, options)
        else:
            out, lse = empty_out_lse(query, value)
            out.copy_(ref_out), lse.copy_(ref_lse)
        grads: tuple[Tensor, ...] = launch.attention_bwd(dout, query, key, value, out, lse, options)
    if poison.count < 5:
        raise AssertionError(f"{poison.count} tensors allocated: some memory of a launch is not filled with NaN")
    if sink is not None:  # its gradient is autograd's
        learnt = sink.detach().requires_grad_()
        out, _ = attention_fwd(query, key, value, sink=learnt, **options._asdict())
        grads += torch.autograd.grad(out, learnt, dout)
    floor = 1e-5 * math.sqrt(case.seqlen_q * case.heads / case.heads_kv) if case.seqlen_k == 1 else 1e-5
    return judge(grads, refs, lows, rounded, tensors, floor)


def judge(
    grads: tuple[Tensor, ...],
    refs: tuple[Tensor, ...],
    lows: tuple[Tensor, ...],
    rounded: tuple[Tensor, ...],  # of rounded_out
    tensors: list[Tensor],
    floor: float,
) -> Outcome:
    """The gradient that comes closest to its bound, or exceeds it; grads of ``tensors`` must have their strides."""
    names, figures = ("dq", "dk", "dv", "dsink"), []
    for got, ref, low, off in zip(grads, refs, lows, rounded, strict=True):
        if got.numel() == 0:
            figures.append(torch.zeros(2, device=got.device))
            continue
        narrow = ref.to(got.dtype)
        atol = 2 * (narrow + 0.3 - 0.3 - narrow).abs().max().float()
        atol = torch.maximum(atol, torch.finfo(got.dtype).eps * ref.abs().max())
        error = (got.float() - ref).abs().nan_to_num(math.inf).max()
        figures.append(torch.stack((error, 2 * ((low.float() - ref).abs() + off.abs()).max() + atol + floor)))
    shares = torch.stack(figures).tolist()
    worst = max(range(len(shares)), key=lambda i: shares[i][0] / (shares[i][1] or 1.0))
    error, bound = shares[worst]
    message = ""
    if not error <= bound:
        off = (grads[worst].float() - refs[worst]).abs().nan_to_num(math.inf)
        message = f"{names[worst]}: {excess(off, bound)}; {reference.worst(grads[worst], refs[worst])}"
    for name, got, like in zip(names, grads, tensors, strict=False):
        if got.shape != like.shape or strides(got) != strides(torch.empty_like(like.transpose(1, 2)).transpose(1, 2)):
            message = f"{name} is {tuple(got.shape)} with strides {got.stride()}"
    return Outcome(error, bound, 0.0, message)


def strides(x: Tensor) -> list[int]:
    """Of the dimensions in which they mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def gate(num_cases: int, seed: int, kinds: dict[str, list[Variant]], most_failures: int = 10) -> dict[str, Any]:
    """Check ``num_cases`` random cases and the empty ones; stops after ``most_failures`` cases that fail."""
    torch.backends.cuda.matmul.allow_tf32 = False
    failures, shares = [], []
    for index in range(num_cases):
        drawn = draw(seed, index, kinds)
        outcome = check(drawn, seed, index)
        shares.append(outcome.error / outcome.bound if outcome.bound else 0.0)
        if outcome.message:
            failures.append({"index": index, "case": str(drawn), "message": outcome.message})
            print(f"case {index} of seed {seed}: {drawn}\n  {outcome.message}", flush=True)
        if len(failures) == most_failures:
            break
        if (index + 1) % 1000 == 0:
            print(f"{index + 1} cases, worst {max(shares):.2f} of the bound", flush=True)
    check_empty()
    return {
        "rule": "max|grad - ref| <= 2 max(|pt - ref| + |rounded - ref|) + atol + floor, for dq, dk, dv and the sink's; "
        "rounded has O in 16 bit and δ in fp32; floor 1e-5, with a single key 1e-5 sqrt(summands)",
        "cases": len(shares),
        "variants": sum(len(variants) for variants in kinds.values()),
        "seed": seed,
        "failed": len(failures),
        "worst_error_over_bound": max(shares),
        "mean_error_over_bound": sum(shares) / len(shares),
        **({"failures": failures} if failures else {}),
    }


def check_empty() -> None:
    """No key, no query, no batch: gradients of zeros."""
    for batch, seqlen_q, seqlen_k in ((1, 3, 0), (0, 3, 3), (1, 0, 3), (0, 0, 0)):
        query = torch.randn(batch, 2, seqlen_q, 64, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, 2, seqlen_k, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = launch.attention_fwd(query, key, value, None, Options())
        with Poison():
            grads = launch.attention_bwd(torch.ones_like(out), query, key, value, out, lse, Options())
        for grad, x in zip(grads, (query, key, value), strict=True):
            assert grad.shape == x.shape and not grad.any()


# ---- kernels ---------------------------------------------------------------------------------------------------------


def keys_of(drawn: Iterable[Drawn], target: Target = H100) -> list[KernelKey]:
    """The kernels that these cases launch on ``target``."""
    with recording(target) as keys:
        for case, _, end_to_end in drawn:
            if case.seqlen_k == 0:
                continue
            query, key, value, sink = without_memory(case)
            if end_to_end:
                launch.attention_fwd(query, key, value, sink, case.options)
            out = query.new_empty(*query.shape[:3], case.head_dim_v)
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            launch.attention_bwd(out, query, key, value, out, lse, case.options)
    return sorted(keys, key=lambda key: key.name)
