"""Random calls of the forward op: what they are, their data, how they are judged, and which kernels they launch.

Rule (FlashAttention's): max|out - ref| ≤ 2 · max|pt - ref| + atol, where ref is the math in fp32, pt the same math in
the inputs' dtype, and atol = 2 · max|ref + 0.3 - 0.3 - ref| in that dtype; lse within 1e-4 (relative to its size where
that is above 1). Outputs are filled with NaN before each launch. Every case has its own seed, so that
`check(random_case(seed, index, variants), seed, index)` alone draws the same call and the same data again.

Sizes are random up to 16k, with batch and heads then chosen so that the reference's (B, H, Sq, Sk) scores stay within
SCORES, which keeps 5,000 cases within half a minute of an H100.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fa_sdpa import reference  # noqa: E402
from fa_sdpa.kernels import launch  # noqa: E402
from fa_sdpa.kernels.key import KernelKey  # noqa: E402
from fa_sdpa.kernels.sm90 import config  # noqa: E402
from fa_sdpa.meta.spec import Options  # noqa: E402
from fa_sdpa.meta.target import Target  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("bhsd", "bshd", "sbhd", "packed", "cache", "padded", "unaligned")
KV_LAYOUTS = (*LAYOUTS, "expanded_heads", "expanded_batch")
HEADS = ((1, 1), (2, 2), (5, 5), (4, 2), (8, 1), (7, 1), (14, 2), (28, 4), (6, 2), (32, 8), (24, 2), (40, 40))
SEQLENS = (1, 2, 7, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 384, 1000, 1024)
SCORES = 2**26  # elements of the reference's score matrices
H100 = Target("cuda", config.ARCH, "NVIDIA H100 80GB HBM3", 132, config.SMEM_PER_BLOCK)


class Variant(NamedTuple):
    """What a case wants of a kernel's code."""

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str  # "full", "causal" or "window"
    softcap: bool = False
    sink: bool = False


# Kinds of calls, drawn from with equal weights.
PLAIN = {"plain": [Variant(t, d, d, mask) for t in DTYPES for d in (64, 128) for mask in ("full", "causal")]}
BREADTH = {
    **PLAIN,
    "head dims": [
        Variant("fp16" if d // 8 % 2 else "bf16", d, d, mask)
        for d in range(8, 257, 8)
        for mask in ("full", "causal", "window")
    ],
    "head_dim_v": [
        Variant(dtype, d, dv, mask)
        for d, dv, dtype, masks in (
            *((d, dv, "bf16", ("full", "causal")) for d, dv in ((64, 128), (128, 64), (192, 128), (128, 256))),
            *((d, dv, "fp16", ("full", "causal")) for d, dv in ((256, 128), (64, 256), (256, 64), (192, 64))),
            *((d, dv, "bf16", ("causal",)) for d, dv in ((80, 48), (24, 96), (8, 256), (136, 128), (128, 192))),
            *((d, dv, "fp16", ("full",)) for d, dv in ((256, 8), (40, 56), (72, 200), (248, 104), (160, 224))),
            *((d, dv, "bf16", ("window",)) for d, dv in ((192, 128), (128, 256), (96, 24))),
        )
        for mask in masks
    ],
    "options": [
        Variant(dtype, d, dv, *flags)
        for dtype, d, dv in (
            *((dtype, d, d) for dtype in DTYPES for d in (64, 128)),
            *(("bf16", 96, 96), ("fp16", 192, 128), ("bf16", 192, 192), ("bf16", 256, 256)),
        )
        for flags in (
            *(("window",), ("window", True), ("window", False, True), ("window", True, True)),
            *(("full", True), ("causal", False, True), ("causal", True, True)),
        )
    ],
}


class Case(NamedTuple):
    """One call, with what its data are like."""

    dtype: str
    head_dim: int
    head_dim_v: int
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    options: Options = Options()
    sink: bool = False
    layout_q: str = "bshd"
    layout_kv: str = "bshd"
    spread: float = 1.0  # standard deviation of Q
    rising: bool = False  # scores grow along the order in which blocks are visited: the running maximum keeps rising


def random_case(seed: int, index: int, kinds: dict[str, list[Variant]]) -> Case:
    """Case ``index`` of ``seed``."""
    rng = random.Random(f"{seed}:{index}")
    variant = rng.choice(kinds[rng.choice(list(kinds))])
    seqlen_q = _random_seqlen(rng)
    seqlen_k = seqlen_q if rng.random() < 0.4 else _random_seqlen(rng)
    seqlen_k = min(seqlen_k, max(SCORES // seqlen_q, 1))
    options = Options(is_causal=variant.mask == "causal")
    if variant.mask == "window":
        seqlen_q, seqlen_k = max(seqlen_q, 2), max(seqlen_k, 2)
        options = _random_window(rng, seqlen_q, seqlen_k)
    elif rng.random() < 0.02:
        seqlen_k = 0
    room = max(SCORES // max(seqlen_q * seqlen_k, 4096), 1)  # sequences, batch × heads
    heads, heads_kv = rng.choice([pair for pair in HEADS if pair[0] <= room])
    most = min(room // heads, 64)
    return Case(
        *variant[:3],
        batch=rng.randint(1, most) if rng.random() < 0.15 else rng.randint(1, min(most, 3)),
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        options=options._replace(
            scale=None if rng.random() < 0.7 else rng.uniform(0.02, 0.5),
            softcap=rng.choice((5.0, 30.0, 50.0)) if variant.softcap else 0.0,
        ),
        sink=variant.sink,
        layout_q=rng.choice(LAYOUTS),
        layout_kv=rng.choice(KV_LAYOUTS),
        spread=rng.choice((1.0, 1.0, 4.0)),
        rising=rng.random() < 0.25,
    )


def _random_seqlen(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(SEQLENS)
    return rng.randint(1, 2048) if kind < 0.92 else round(2 ** rng.uniform(8, 14))


def _random_window(rng: random.Random, seqlen_q: int, seqlen_k: int) -> Options:
    """Options that hide more than a plain causal mask at these lengths, or a window of one key if none was found."""

    def bound() -> int | None:
        return rng.choice((None, 0, 1, rng.randint(0, 200), rng.randint(0, 2048)))

    for _ in range(100):
        options = Options(rng.random() < 0.4, None, rng.random() < 0.5, bound(), bound())
        left, right = options.bounds(seqlen_q, seqlen_k)
        hides_left = left is not None and left > 1 - seqlen_q
        hides_right = right is not None and right != 0 and right < seqlen_k - 1
        if hides_left or hides_right:
            return options
    return Options(window_left=0)


# ---- data ------------------------------------------------------------------------------------------------------------


def inputs(case: Case, source: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value and sink on the GPU, drawn on the device ``source``: with "cpu", no kernel writes them."""
    dtype = DTYPES[case.dtype]

    def draw(heads: int, seqlen: int, head_dim: int, layout: str, fill: Callable[[Tensor], Tensor]) -> Tensor:
        size, view = _memory((case.batch, heads, seqlen, head_dim), layout)
        return view(fill(torch.randn(size, device=source)).to(dtype).cuda())

    def fill_query(x: Tensor) -> Tensor:
        return (x.abs() if case.rising else x) * case.spread

    def fill_key(x: Tensor) -> Tensor:
        if not case.rising or case.seqlen_k == 0:
            return x
        rows = {"bshd": 1, "packed": 1, "sbhd": 0}.get(case.layout_kv, 2)  # which dimension of the memory they are
        ramp = torch.zeros(x.shape[rows], device=source)
        ramp[: case.seqlen_k] = torch.linspace(2.0, 0.0, case.seqlen_k, device=source)
        return x + ramp.view(-1, *[1] * (x.dim() - 1 - rows))

    query = draw(case.heads, case.seqlen_q, case.head_dim, case.layout_q, fill_query)
    key = draw(case.heads_kv, case.seqlen_k, case.head_dim, case.layout_kv, fill_key)
    value = draw(case.heads_kv, case.seqlen_k, case.head_dim_v, case.layout_kv, lambda x: x)
    sink = (3.0 * torch.randn(case.heads, device=source)).to(dtype).cuda() if case.sink else None
    return query, key, value, sink


def _memory(shape: tuple[int, int, int, int], layout: str) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    """(size of a layout's memory, how (B, H, S, D) is seen in it)."""
    batch, heads, seqlen, head_dim = shape
    sizes_and_views: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "bhsd": (shape, lambda x: x),
        "bshd": ((batch, seqlen, heads, head_dim), lambda x: x.transpose(1, 2)),
        "sbhd": ((seqlen, batch, heads, head_dim), lambda x: x.permute(1, 2, 0, 3)),
        "packed": ((batch, seqlen, 3, heads, head_dim), lambda x: x[:, :, 1].transpose(1, 2)),
        "cache": ((batch, heads, seqlen + 37, head_dim), lambda x: x[:, :, :seqlen]),
        "padded": ((batch, heads, seqlen, head_dim + 8), lambda x: x[..., :head_dim]),
        "unaligned": ((batch, heads, seqlen, head_dim + 1), lambda x: x[..., 1:]),
        "expanded_heads": ((batch, 1, seqlen, head_dim), lambda x: x.expand(shape)),
        "expanded_batch": ((1, heads, seqlen, head_dim), lambda x: x.expand(shape)),
    }
    return sizes_and_views[layout]


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` (B, H, S, D) in the memory of one of LAYOUTS, everything around them NaN."""
    size, view = _memory(tuple(x.shape), layout)  # type: ignore[arg-type]
    laid_out = view(x.new_full(size, math.nan))
    return laid_out.copy_(x)


# ---- numerics --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Errors and bound of one case; what is wrong with it, if anything."""

    error: float
    bound: float
    error_lse: float
    message: str = ""


def check(case: Case, seed: int = 0, index: int = 0) -> Outcome:
    """Run one case and judge it."""
    torch.manual_seed(hash((seed, index)) & 0x7FFFFFFF)
    query, key, value, sink = inputs(case)
    out, lse = launch.attention_fwd(query, key, value, sink, case.options)
    options = case.options._asdict()
    ref, ref_lse = reference.attention(query.float(), key.float(), value.float(), sink=sink, **options)
    rounded, _ = reference.attention(query, key, value, sink=sink, **options)
    low = ref.to(out.dtype)
    atol = 2 * (low + 0.3 - 0.3 - low).abs().max()
    errors = (out.float() - ref).abs().nan_to_num(math.inf)
    errors_lse = ((lse - ref_lse).abs() / ref_lse.abs().clamp(min=1.0)).nan_to_num(math.inf)
    errors_lse = errors_lse.masked_fill(lse == ref_lse, 0.0)  # -inf where a row sees no key
    bound = 2 * (rounded.float() - ref).abs().max() + atol
    error, limit, error_lse = torch.stack((errors.max(), bound, errors_lse.max())).tolist()
    message = ""
    if not error <= limit:
        message = f"out: {excess(errors, limit)}; {reference.worst(out, ref)}"
    elif not error_lse <= 1e-4:
        message = f"lse: {excess(errors_lse, 1e-4)}; {reference.worst(lse, ref_lse)}"
    return Outcome(error, limit, error_lse, message)


def excess(errors: Tensor, limit: float) -> str:
    bad = int((errors > limit).sum())
    return f"error {errors.max().item():.3g} > bound {limit:.3g}, {bad} of {errors.numel()} elements beyond it"


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Launches find NaN in their outputs."""
    allocate = launch.empty_out_lse

    def poisoned(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = allocate(query, value)
        return out.fill_(math.nan), lse.fill_(math.nan)

    with mock.patch.object(launch, "empty_out_lse", poisoned):
        yield


def gate(num_cases: int, seed: int, kinds: dict[str, list[Variant]], most_failures: int = 10) -> dict[str, Any]:
    """Check ``num_cases`` random cases, the empty ones and repeats; stops after ``most_failures`` cases that fail."""
    torch.backends.cuda.matmul.allow_tf32 = False
    failures, ratios, errors_lse = [], [], []
    with poisoned_outputs():
        for index in range(num_cases):
            case = random_case(seed, index, kinds)
            outcome = check(case, seed, index)
            ratios.append(outcome.error / outcome.bound if outcome.bound else 0.0)
            errors_lse.append(outcome.error_lse)
            if outcome.message:
                failures.append({"index": index, "case": str(case), "message": outcome.message})
                print(f"case {index} of seed {seed}: {case}\n  {outcome.message}", flush=True)
            if len(failures) == most_failures:
                break
        check_empty()
        check_repeats()
    return {
        "rule": "max|out - ref| <= 2 max|pt - ref| + atol; |lse - ref| <= 1e-4 max(1, |ref|)",
        "cases": len(ratios),
        "variants": sum(len(variants) for variants in kinds.values()),
        "seed": seed,
        "failed": len(failures),
        "worst_error_over_bound": max(ratios),
        "mean_error_over_bound": sum(ratios) / len(ratios),
        "worst_lse_error": max(errors_lse),
        **({"failures": failures} if failures else {}),
    }


def check_empty() -> None:
    """No key: out 0, lse -inf. No query or batch: empty results."""
    for batch, seqlen_q, seqlen_k in ((1, 3, 0), (0, 3, 3), (1, 0, 3), (0, 0, 0)):
        query = torch.randn(batch, 2, seqlen_q, 64, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, 2, seqlen_k, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = launch.attention_fwd(query, key, value, None, Options())
        assert out.shape == query.shape and lse.shape == query.shape[:3]
        assert bool((out == 0).all()) and bool((lse == -math.inf).all())


REPEATED = Case("bf16", 128, 128, 2, 4, 4, 1000, 1000, Options(is_causal=True))


def check_repeats(times: int = 100) -> None:
    """The same bits on every run, on a side stream, and from a CUDA graph."""
    query, key, value, _ = inputs(REPEATED)
    first, first_lse = launch.attention_fwd(query, key, value, None, REPEATED.options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [launch.attention_fwd(query, key, value, None, REPEATED.options) for _ in range(times)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs.append(launch.attention_fwd(query, key, value, None, REPEATED.options))
    graph.replay()
    for out, lse in runs:
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_target(target: Target) -> Iterator[None]:
    """Launches see the facts of ``target``: few SMs, say, so that each CTA has several tiles."""
    with (
        mock.patch.object(launch, "Target", mock.Mock(of=lambda device: target)),
        mock.patch.object(launch, "_plans", {}),
        mock.patch.object(launch, "_backward_plans", {}),
    ):
        yield


@contextlib.contextmanager
def recording(target: Target = H100) -> Iterator[set[KernelKey]]:
    """Fills the set with the keys of what is launched, on tensors without memory: no GPU. Nothing runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    keys: set[KernelKey] = set()

    def record(key: KernelKey) -> Callable[..., None]:
        keys.add(key)
        return lambda *arguments: None

    with (
        FakeTensorMode(),
        on_target(target),
        mock.patch.object(launch, "kernel", record),
        mock.patch.object(launch, "_addressable", lambda x: x),
        mock.patch.object(launch, "empty_out_lse", lambda query, value: (query, query.new_empty(query.shape[:3]))),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        yield keys


def without_memory(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``inputs`` for ``recording``: shapes and dtypes, in plain layouts."""
    query, key, value = (
        torch.empty(case.batch, heads, seqlen, head_dim, dtype=DTYPES[case.dtype], device="cuda")
        for heads, seqlen, head_dim in (
            (case.heads, case.seqlen_q, case.head_dim),
            (case.heads_kv, case.seqlen_k, case.head_dim),
            (case.heads_kv, case.seqlen_k, case.head_dim_v),
        )
    )
    return query, key, value, torch.empty(case.heads, device="cuda") if case.sink else None


def keys_of(cases: Iterable[Case], target: Target = H100) -> list[KernelKey]:
    """The forward kernels that ``cases`` launch on ``target``; without a key nothing is launched."""
    with recording(target) as keys:
        for case in cases:
            if case.seqlen_k:
                launch.attention_fwd(*without_memory(case), case.options)
    return sorted(keys, key=lambda key: key.name)
