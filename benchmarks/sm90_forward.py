"""The SM90 forward kernel on one GPU: numerics gate first, then speed against its peers; JSON, and a table last.

    python benchmarks/sm90_forward.py --out benchmarks/results/sm90_forward_h100.json

Numerics: FlashAttention's rule on random cases, max|out - ref| ≤ 2 · max|pt - ref| + atol, where ref is the math in
fp32, pt the same math in the inputs' dtype, and atol = 2 · max|ref + 0.3 - 0.3 - ref| in that dtype; lse within 1e-4
(relative to its size where that is above 1). Outputs are filled with NaN before each launch, data is fresh in each
case. One failing case stops the run.

Speed: bf16, (B, S, H, D) memory seen as (B, H, S, D), 16,384 tokens, heads = 2048 / d. TFLOP/s from 4·B·H·Sq·Sk·D
flops, halved when causal, and do_bench's median.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from provenance import save  # noqa: E402

from fa_sdpa.kernels import launch  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("bhsd", "bshd", "packed", "expanded_heads", "expanded_batch", "padded", "unaligned")
HEADS = ((1, 1), (2, 2), (4, 2), (8, 1), (7, 1), (14, 2), (6, 3))
SEQLENS = (1, 7, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 384, 1000, 1024)


class Case(NamedTuple):
    """One random call."""

    dtype: str
    head_dim: int
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    is_causal: bool
    scale: float | None
    layout: str
    spread: float  # standard deviation of Q
    rising: bool  # scores grow along the order in which blocks are visited, so that the running maximum keeps rising


def random_case(rng: random.Random) -> Case:
    def seqlen() -> int:
        return rng.choice(SEQLENS) if rng.random() < 0.5 else rng.randint(1, 2048)

    seqlen_q = seqlen()
    heads, heads_kv = rng.choice(HEADS)
    return Case(
        dtype=rng.choice(("bf16", "fp16")),
        head_dim=rng.choice((64, 128)),
        batch=rng.randint(1, 3),
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if rng.random() < 0.4 else seqlen(),
        is_causal=rng.random() < 0.5,
        scale=None if rng.random() < 0.7 else rng.uniform(0.02, 0.5),
        layout=rng.choice(LAYOUTS),
        spread=rng.choice((1.0, 1.0, 4.0)),
        rising=rng.random() < 0.25,
    )


def laid_out(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Random (B, H, S, D) tensor in one of LAYOUTS."""
    batch, heads, seqlen, head_dim = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.float32).to(dtype)

    if layout == "bshd":
        return randn(batch, seqlen, heads, head_dim).transpose(1, 2)
    if layout == "packed":
        return randn(batch, seqlen, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
    if layout == "expanded_heads":
        return randn(batch, 1, seqlen, head_dim).expand(shape)
    if layout == "expanded_batch":
        return randn(1, heads, seqlen, head_dim).expand(shape)
    if layout == "padded":
        return randn(batch, heads, seqlen, head_dim + 8)[..., :head_dim]
    if layout == "unaligned":
        return randn(batch, heads, seqlen, head_dim + 1)[..., 1:]
    return randn(*shape)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    dtype = DTYPES[case.dtype]
    q_layout = "bshd" if case.layout.startswith("expanded") else case.layout
    query = laid_out((case.batch, case.heads, case.seqlen_q, case.head_dim), q_layout, dtype)
    kv_shape = (case.batch, case.heads_kv, case.seqlen_k, case.head_dim)
    key, value = (laid_out(kv_shape, case.layout, dtype) for _ in range(2))
    query.mul_(case.spread)
    if case.rising:
        query.copy_(query.abs())
        ramp = torch.linspace(2.0, 0.0, case.seqlen_k, device="cuda", dtype=torch.float32)
        dense = key if 0 not in key.stride() else key.as_strided(*base_of(key))
        dense.add_(ramp[:, None].to(dtype))
    return query, key, value


def base_of(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of an expanded tensor before it was expanded."""
    return tuple(1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)), x.stride()


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the textbook, in the dtype of the inputs."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1) @ value, scores.float().logsumexp(dim=-1)


def check(case: Case) -> dict[str, float]:
    """Run one case; its errors and bounds. Raises AssertionError with the worst element beyond a bound."""
    query, key, value = inputs(case)
    out, lse = launch.attention_fwd(query, key, value, is_causal=case.is_causal, scale=case.scale)
    ref, ref_lse = math_attention(query.float(), key.float(), value.float(), case.is_causal, case.scale)
    rounded, _ = math_attention(query, key, value, case.is_causal, case.scale)
    low = ref.to(out.dtype)
    atol = 2 * (low + 0.3 - 0.3 - low).abs().max().item()
    bound = 2 * (rounded.float() - ref).abs().max().item() + atol
    error = (out.float() - ref).abs().nan_to_num(float("inf"))
    error_lse = ((lse - ref_lse).abs() / ref_lse.abs().clamp(min=1.0)).nan_to_num(float("inf"))
    for name, errors, limit, got, want in (("out", error, bound, out, ref), ("lse", error_lse, 1e-4, lse, ref_lse)):
        worst = errors.max().item()
        if not worst <= limit:
            at = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
            bad = int((errors > limit).sum())
            raise AssertionError(
                f"{case}: {name}{list(at)} = {got[at].item():.6g}, reference {want[at].item():.6g}, error {worst:.3g}"
                f" > bound {limit:.3g}; {bad} of {errors.numel()} elements are beyond it"
            )
    return {"error": error.max().item(), "bound": bound, "error_lse": error_lse.max().item()}


def gate(num_cases: int, seed: int) -> dict[str, Any]:
    """Check ``num_cases`` random cases and the empty ones."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(seed)
    rng = random.Random(seed)
    allocate = launch.empty_out_lse

    def poisoned(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = allocate(query, value)
        return out.fill_(float("nan")), lse.fill_(float("nan"))

    launch.empty_out_lse = poisoned
    try:
        results = [check(random_case(rng)) for _ in range(num_cases)]
        check_empty()
        check_repeats()
    finally:
        launch.empty_out_lse = allocate
    return {
        "rule": "max|out - ref| <= 2 max|pt - ref| + atol; |lse - ref| <= 1e-4 max(1, |ref|)",
        "cases": num_cases,
        "seed": seed,
        "failed": 0,
        "worst_error_over_bound": max(r["error"] / r["bound"] if r["bound"] else 0.0 for r in results),
        "mean_error_over_bound": sum(r["error"] / r["bound"] if r["bound"] else 0.0 for r in results) / num_cases,
        "worst_lse_error": max(r["error_lse"] for r in results),
    }


def check_empty() -> None:
    """No key: out 0, lse -inf. No query or batch: empty results."""
    for batch, seqlen_q, seqlen_k in ((1, 3, 0), (0, 3, 3), (1, 0, 3), (0, 0, 0)):
        query = torch.randn(batch, 2, seqlen_q, 64, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, 2, seqlen_k, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = launch.attention_fwd(query, key, value, is_causal=False, scale=None)
        assert out.shape == query.shape and lse.shape == query.shape[:3]
        assert bool((out == 0).all()) and bool((lse == float("-inf")).all())


def check_repeats() -> None:
    """The same bits on every run, on a side stream, and from a CUDA graph."""
    query, key, value = (laid_out((2, 4, 1000, 128), "bshd", torch.bfloat16) for _ in range(3))
    first, first_lse = launch.attention_fwd(query, key, value, is_causal=True, scale=None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [launch.attention_fwd(query, key, value, is_causal=True, scale=None) for _ in range(20)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs.append(launch.attention_fwd(query, key, value, is_causal=True, scale=None))
    graph.replay()
    for out, lse in runs:
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


# ---- speed -----------------------------------------------------------------------------------------------------------


def contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor, bool], Any]]:
    """Name → call(query, key, value, is_causal); flash-attn-4 where it can be imported."""

    def backend(choice: SDPBackend) -> Callable[..., Any]:
        def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

        return call

    calls = {
        "ours": lambda q, k, v, c: launch.attention_fwd(q, k, v, is_causal=c, scale=None),
        "torch": lambda q, k, v, c: F.scaled_dot_product_attention(q, k, v, is_causal=c),
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "flash2": backend(SDPBackend.FLASH_ATTENTION),
    }
    try:
        fa4 = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    except (ImportError, RuntimeError):  # RuntimeError: its compiler is only half there
        return calls
    calls["fa4"] = lambda q, k, v, c: fa4(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=c)
    return calls


def measure(head_dims: list[int], seqlens: list[int], only: list[str]) -> list[dict[str, Any]]:
    """TFLOP/s of every contender in every cell."""
    from triton.testing import do_bench

    calls = {name: call for name, call in contenders().items() if not only or name in only}
    cells = []
    for head_dim in head_dims:
        for is_causal in (False, True):
            for seqlen in seqlens:
                batch, heads = 16384 // seqlen, 2048 // head_dim
                shape = (batch, heads, seqlen, head_dim)
                query, key, value = (laid_out(shape, "bshd", torch.bfloat16) for _ in range(3))
                flops = 4 * batch * heads * seqlen * seqlen * head_dim / (2 if is_causal else 1)
                cell: dict[str, Any] = {"head_dim": head_dim, "is_causal": is_causal, "seqlen": seqlen}
                for name, call in calls.items():
                    run = functools.partial(call, query, key, value, is_causal)
                    ms = do_bench(run, warmup=25, rep=100, return_mode="median")
                    cell[name] = round(flops / ms / 1e9, 1)
                cells.append(cell)
    return cells


def table(cells: list[dict[str, Any]]) -> str:
    names = [n for n in ("ours", "torch", "cudnn", "flash2", "fa4") if n in cells[0]]
    lines = ["cell".ljust(16) + "".join(n.rjust(9) for n in names) + "  ours/cudnn  ours/best"]
    for cell in cells:
        label = f"d{cell['head_dim']} {'causal' if cell['is_causal'] else 'full'} {cell['seqlen']}"
        peers = [cell[n] for n in names if n != "ours"]
        ratio = f"{cell['ours'] / cell['cudnn']:12.2f}" if "cudnn" in cell else " " * 12
        best = f"{cell['ours'] / max(peers):11.2f}" if peers else ""
        lines.append(label.ljust(16) + "".join(f"{cell[n]:9.1f}" for n in names) + ratio + best)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cases", type=int, default=600, help="random numerics cases; 0 skips the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head-dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--only", nargs="*", default=[], help="contenders to time; all by default")
    args = parser.parse_args()
    numerics = gate(args.cases, args.seed) if args.cases else None
    print(f"numerics: {numerics}", flush=True)
    cells = measure(args.head_dims, args.seqlens, args.only) if args.seqlens else []
    if args.out:
        save(args.out, cells, numerics=numerics, unit="TFLOP/s", protocol=(__doc__ or "").split("Speed: ")[1].strip())
    if cells:
        print(table(cells))


if __name__ == "__main__":
    main()
