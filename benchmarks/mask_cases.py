"""Random calls of the forward op with an attn_mask: what they are, their data, how they are judged.

The rule is that of forward_cases.py. lse is judged in rows whose lse is above -1e5: where a row sees only keys with a
huge negative bias, that is cut off (sm90/forward_masked.py), and lse with it. So are weights in rows with an lse around
-1e9: there fp32 rounds scores to multiples of 64, what is left of them is chance, and out has to be a mean of values,
no more. In every other case the keys that no row of any head sees, and their values, are NaN, since what is behind a
mask must not leak. Half of the floating masks up to d64 are given to 28 sequences of 513 to 640 rows, which have the
wide tile where the mask tells heads apart.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backward_cases import Poison  # noqa: E402
from forward_cases import H100, HEADS, Case, Outcome, Variant, excess, inputs, random_case  # noqa: E402

from fa_sdpa import reference  # noqa: E402
from fa_sdpa.kernels import launch, masks  # noqa: E402
from fa_sdpa.kernels.key import KernelKey  # noqa: E402
from fa_sdpa.meta.spec import AttentionSpec, mask_kind  # noqa: E402
from fa_sdpa.meta.target import Target  # noqa: E402

SCORES = 2**23  # elements of the reference's score matrices
CONTENTS = ("random", "sparse", "triangle", "padding", "left padding", "both", "blocks", "one key", "all", "nothing")
FILLS = (-math.inf, "lowest", -1e9, -1e4)
BIASES = ("none", "none", "normal", "slopes")
BROADCASTS = ("....", ".1..", "1...", "11..", ".11.", "1.1.", "..1.", "...1", "1111")
LAYOUTS = ("plain", "plain", "expanded", "transposed", "strided", "shifted", "roomy")
DTYPES = {"bool": torch.bool, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

VARIANTS = {
    "common": [Variant(t, d, d, mask) for t in ("bf16", "fp16") for d in (64, 128) for mask in ("full", "causal")],
    "breadth": [
        *(Variant("bf16", d, dv, "full") for d, dv in ((80, 80), (96, 96), (192, 128), (256, 256), (72, 40))),
        *(
            Variant("bf16", d, d, *flags)
            for d in (64, 128)
            for flags in (("window",), ("full", True), ("causal", False, True))
        ),
    ],
}


class MaskedCase(NamedTuple):
    """One call with a mask."""

    case: Case
    dtype: str  # of DTYPES
    content: str = "random"
    fill: float | str = -math.inf
    bias: str = "none"
    broadcast: str = "...."  # of (B, H, Sq, Sk): 1 where the mask's size is 1
    layout: str = "plain"
    dims: int = 4
    empty_rows: bool = False  # some rows see nothing
    poison: bool = False


def random_masked_case(seed: int, index: int) -> MaskedCase:
    """Case ``index`` of ``seed``."""
    rng = random.Random(f"mask:{seed}:{index}")
    case = random_case(seed, 1_000_000 + index, VARIANTS)
    seqlen_k = min(max(case.seqlen_k, 1), SCORES // case.seqlen_q)
    room = SCORES // (case.seqlen_q * seqlen_k)  # sequences
    heads, heads_kv = rng.choice([pair for pair in HEADS if pair[0] <= room])
    batch = rng.randint(1, min(room // heads, 4))
    case = case._replace(batch=batch, heads=heads, heads_kv=heads_kv, seqlen_k=seqlen_k)
    dtype = rng.choice(("bool", "bool", case.dtype, "fp32"))
    masked = MaskedCase(
        case,
        dtype,
        content=rng.choice(CONTENTS),
        fill=rng.choice(FILLS),
        bias=rng.choice(BIASES),
        broadcast=rng.choice(BROADCASTS),
        layout=rng.choice(LAYOUTS),
        dims=rng.choice((4, 4, 3, 2)),
        empty_rows=rng.random() < 0.3,
        poison=rng.random() < 0.5,
    )
    if dtype == "bool" or max(case.head_dim, case.head_dim_v) > 64 or rng.random() < 0.5:
        return masked
    heads_kv, sizes = rng.choice((2, 7, 14)), (rng.randint(513, 640), rng.randint(1, 460))  # biases in wide tiles
    case = case._replace(batch=2, heads=14, heads_kv=heads_kv, seqlen_q=sizes[0], seqlen_k=sizes[1])
    return masked._replace(case=case, dims=4, broadcast=rng.choice(("....", "1...", "1.1.", "...1")))


def make_mask(masked: MaskedCase, source: str = "cuda") -> Tensor:
    """The mask of a case on the GPU, drawn on the device ``source``: with "cpu", no kernel writes it."""
    case = masked.case
    full = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    sizes = [1 if mark == "1" else size for mark, size in zip(masked.broadcast, full, strict=True)]
    sizes[: 4 - masked.dims] = [1] * (4 - masked.dims)
    keep = _visible(masked.content, sizes, source)
    if masked.empty_rows:
        keep &= torch.rand((*sizes[:3], 1), device=source) > 0.2
    if masked.dtype == "bool":
        mask = keep
    else:
        dtype = DTYPES[masked.dtype]
        bias = torch.zeros(sizes, device=source)
        if masked.bias == "normal":
            bias.normal_(0.0, 2.0)
        elif masked.bias == "slopes":
            slopes = 2.0 ** -torch.arange(1, sizes[1] + 1, device=source).view(-1, 1, 1)
            bias += slopes * torch.arange(sizes[3], device=source)
        fill = torch.finfo(dtype).min if masked.fill == "lowest" else max(float(masked.fill), torch.finfo(dtype).min)
        mask = bias.to(dtype).masked_fill(~keep, -math.inf if masked.fill == -math.inf else fill)
    memory, view = _laid_out(mask, masked.layout)
    mask = view(memory.cuda())
    return mask[(0,) * (4 - masked.dims)]


def _visible(content: str, sizes: list[int], device: str) -> Tensor:
    """Which keys are seen, (b, h, q, k) bool."""
    batch, heads, rows, keys = sizes
    i, j = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)
    lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1), device=device)
    kinds = {
        "random": lambda: torch.rand(sizes, device=device) < 0.5,
        "sparse": lambda: torch.rand(sizes, device=device) < 0.01,
        "triangle": lambda: (j <= i).expand(sizes),
        "padding": lambda: (j < lengths).expand(sizes),
        "left padding": lambda: (j >= lengths).expand(sizes),
        "both": lambda: ((j <= i) & (j >= lengths // 2)).expand(sizes),
        "blocks": lambda: (
            (torch.rand((batch, heads, rows // 96 + 1, keys // 160 + 1), device=device) < 0.5)
            .repeat_interleave(96, 2)
            .repeat_interleave(160, 3)[:, :, :rows, :keys]
        ),
        "one key": lambda: j == torch.randint(0, keys, (batch, heads, rows, 1), device=device),
        "all": lambda: torch.ones(sizes, dtype=torch.bool, device=device),
        "nothing": lambda: torch.zeros(sizes, dtype=torch.bool, device=device),
    }
    return kinds[content]().clone()


def _laid_out(mask: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(memory with the values of ``mask``, how they are seen in it)."""
    shape = mask.shape
    if layout == "expanded":  # sizes of 1 with a stride of 0, of which one is seen
        doubled = [2 if size == 1 else size for size in shape]
        return mask, lambda x: x.expand(doubled)[tuple(slice(0, size) for size in shape)]
    if layout == "transposed":
        return mask.mT.contiguous(), lambda x: x.mT
    if layout in ("strided", "shifted"):
        step, extra = (3, 0) if layout == "strided" else (1, 3)
        wide = mask.new_ones((*shape[:-1], step * shape[-1] + extra))
        wide[..., 1 : 1 + step * shape[-1] : step] = mask
        return wide, lambda x: x[..., 1 : 1 + step * shape[-1] : step]
    if layout == "roomy":  # memory that goes on beyond the last row
        return torch.cat((mask.flatten(), mask.new_ones(256))), lambda x: x[: shape.numel()].view(shape)
    return mask, lambda x: x


def check(masked: MaskedCase, seed: int = 0, index: int = 0) -> Outcome:
    """Run one case and judge it."""
    torch.manual_seed(hash((seed, index)) & 0x7FFFFFFF)
    case = masked.case
    query, key, value, sink = inputs(case)
    mask = make_mask(masked)
    clean = key.clone(), value.clone()
    poison(masked, mask, key, value)
    with Poison() as memory, masks.in_eager_mode():
        out, lse = launch.attention_fwd(query, key, value, sink, case.options, mask)
        again, _ = launch.attention_fwd(query, key, value, sink, case.options, mask)
    if not memory.count:
        raise AssertionError("memory of a launch is not filled with NaN")
    options = case.options._asdict()
    wide = mask if mask.dtype is torch.bool else mask.float()
    key, value = clean
    ref, ref_lse = reference.attention(
        query.float(),
        key.float(),
        value.float(),
        attn_mask=wide,
        sink=None if sink is None else sink.float(),
        **options,
    )
    rounded, _ = reference.attention(query, key, value, attn_mask=mask, sink=sink, **options)
    low = ref.to(out.dtype)
    atol = 2 * (low + 0.3 - 0.3 - low).abs().max()
    chance = ((ref_lse < -1e8) & (ref_lse > -1e10))[..., None] & (out.abs() <= value.abs().max() * 1.01)
    errors = (out.float() - ref).abs().masked_fill(chance, 0.0).nan_to_num(math.inf)
    errors_lse = ((lse - ref_lse).abs() / ref_lse.abs().clamp(min=1.0)).nan_to_num(math.inf)
    errors_lse = errors_lse.masked_fill((lse == ref_lse) | (ref_lse < -1e5) & (lse < -1e5), 0.0)
    bound = 2 * (rounded.float() - ref).abs().max() + atol
    same = torch.equal(out, again)
    error, limit, error_lse = torch.stack((errors.max(), bound, errors_lse.max())).tolist()
    message = ""
    if not same:
        message = "a second run with the mask that was kept gave other bits"
    elif not error <= limit:
        message = f"out: {excess(errors, limit)}; {reference.worst(out, ref)}"
    elif not error_lse <= 1e-4:
        message = f"lse: {excess(errors_lse, 1e-4)}; {reference.worst(lse, ref_lse)}"
    return Outcome(error, limit, error_lse, message)


def poison(masked: MaskedCase, mask: Tensor, key: Tensor, value: Tensor) -> None:
    """NaN in the keys that no row of any head sees, and in their values, if that is to be and they share no memory."""
    if not masked.poison or masked.case.layout_kv not in ("bshd", "bhsd", "sbhd"):
        return
    hidden = ~mask if mask.dtype is torch.bool else mask == -math.inf
    hidden = hidden[(None,) * (4 - hidden.dim())].all(1).all(1)
    hidden = hidden.expand(key.size(0), key.size(2))
    for x in (key, value):
        x.masked_fill_(hidden[:, None, :, None], math.nan)


RULE = "max|out - ref| <= 2 max|pt - ref| + atol; |lse - ref| <= 1e-4 max(1, |ref|) where ref > -1e5"


def gate(
    num_cases: int,
    seed: int,
    most_failures: int = 10,
    draw: Callable[[int, int], MaskedCase] = random_masked_case,
    judge: Callable[[MaskedCase, int, int], Outcome] = check,
    rule: str = RULE,
) -> dict[str, Any]:
    """Check ``num_cases`` random cases; stops after ``most_failures`` that fail."""
    torch.backends.cuda.matmul.allow_tf32 = False
    failures, ratios, errors_lse = [], [], []
    for index in range(num_cases):
        masked = draw(seed, index)
        outcome = judge(masked, seed, index)
        ratios.append(outcome.error / outcome.bound if outcome.bound else 0.0)
        errors_lse.append(outcome.error_lse)
        if outcome.message:
            failures.append({"index": index, "case": str(masked), "message": outcome.message})
            print(f"case {index} of seed {seed}: {masked}\n  {outcome.message}", flush=True)
        if len(failures) == most_failures:
            break
    return {
        "rule": rule,
        "cases": len(ratios),
        "seed": seed,
        "failed": len(failures),
        "worst_error_over_bound": max(ratios),
        "mean_error_over_bound": sum(ratios) / len(ratios),
        "worst_lse_error": max(errors_lse),
        **({"failures": failures} if failures else {}),
    }


def spec_of(case: Case, dtype: str | None, needs_grad: bool = False) -> AttentionSpec:
    """A masked call as the router sees it."""
    options = case.options
    return AttentionSpec(
        torch.bfloat16 if case.dtype == "bf16" else torch.float16,
        *(case.batch, case.heads, case.heads_kv, case.seqlen_q, case.seqlen_k, case.head_dim, case.head_dim_v),
        is_causal=options.is_causal,
        needs_grad=needs_grad,
        mask=mask_kind(DTYPES[dtype] if dtype else None),
        window=options.window_left is not None or options.window_right is not None,
        softcap=options.softcap,
        sink=case.sink,
    )


def keys_of(cases: Iterable[tuple[Case, str]], target: Target = H100, needs_grad: bool = False) -> list[KernelKey]:
    """The kernels that cases with a mask of a dtype launch on ``target``, with gradients their backwards' too."""
    keys = {key for case, dtype in cases for key in launch.keys(spec_of(case, dtype, needs_grad), target)}
    return sorted(keys, key=lambda key: key.name)
