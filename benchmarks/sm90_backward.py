"""The SM90 backward kernel on one GPU: numerics gate first, then speed against its peers; JSON, and a table last.

    python benchmarks/sm90_backward.py --out benchmarks/results/sm90_backward_h100.json
    python benchmarks/sm90_backward.py --breadth --cases 1000 --shapes breadth \\
        --out benchmarks/results/sm90_backward_breadth_h100.json

``--list-keys`` prints the kernels that a bundle must hold to run a command where there is no compiler.

Numerics: FlashAttention's rule for dQ, dK and dV on the random cases of forward_cases.py, dout in a layout of its own,
max|grad - ref| ≤ 2 · max|pt - ref| + atol, where ref is autograd through the math in fp32, pt the same in the inputs'
dtype, and atol = 2 · max|ref + 0.3 - 0.3 - ref| in that dtype. Gradients and scratch memory are filled with NaN before
each launch. One failing case stops the run.

Speed: bf16, (B, S, H, D) memory seen as (B, H, S, D), random data, backward alone. TFLOP/s from 2.5 · 4·B·H·Sq·Sk·D
flops (D the mean of both head dims), halved when causal, and do_bench's median. Grid: 16,384 tokens, heads = 2048 / d.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import forward_cases as cases  # noqa: E402
from provenance import save  # noqa: E402

from fa_sdpa import reference  # noqa: E402
from fa_sdpa.kernels import launch  # noqa: E402
from fa_sdpa.kernels.key import KernelKey  # noqa: E402
from fa_sdpa.kernels.sm90 import config  # noqa: E402
from fa_sdpa.meta.spec import Options  # noqa: E402

DOUT_LAYOUTS = ("as_out", "bhsd", "bshd", "padded", "unaligned", "transposed", "expanded")


def keys(calls: Iterable[cases.Case]) -> set[KernelKey]:
    """The kernels that serve the forward and the backward of these calls."""
    calls = [call for call in calls if call.seqlen_q and call.seqlen_k]
    found = set(cases.keys_of(calls))
    for call in calls:
        is_causal, left, _ = launch._visible(call.options, call.seqlen_q, call.seqlen_k)
        dims = (cases.DTYPES[call.dtype], call.head_dim, call.head_dim_v, is_causal)
        found.add(config.backward_key(*dims, window=left is not None, softcap=call.options.softcap > 0.0))
    return found


# ---- numerics --------------------------------------------------------------------------------------------------------


def gradient_of_out(out: Tensor, layout: str) -> Tensor:
    """Random dout in one of DOUT_LAYOUTS."""
    if layout == "as_out":
        return torch.randn_like(out)
    if layout == "transposed":
        return torch.randn_like(out.mT.contiguous()).mT
    if layout == "expanded":  # what sum().backward() gives
        return torch.randn((), device=out.device, dtype=out.dtype).expand(out.shape)
    return cases.with_layout(torch.randn_like(out), layout)


def math_grads(inputs: list[Tensor], dout: Tensor, sink: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    """Autograd through attention written out, in the inputs' dtype."""
    leaves = [x.detach().contiguous().requires_grad_() for x in inputs]
    out, _ = reference.attention(*leaves, sink=sink, **options._asdict())
    return torch.autograd.grad(out, leaves, dout)


def check(case: cases.Case, dout_layout: str) -> float:
    """Run one case; its largest error as a share of its bound. Raises AssertionError with the worst element."""
    query, key, value, sink = cases.inputs(case)
    out, lse = launch.attention_fwd(query, key, value, sink, case.options)
    dout = gradient_of_out(out, dout_layout)
    grads = launch.attention_bwd(dout, query, key, value, out, lse, case.options)
    inputs = [query, key, value]
    refs = math_grads([x.float() for x in inputs], dout.float(), sink, case.options)
    rounded = math_grads(inputs, dout, sink, case.options)
    worst = 0.0
    # With one key the math makes dS exactly 0, and recomputation from lse has rounding, more the more is summed.
    floor = 1e-5 * (case.seqlen_q * case.heads / case.heads_kv) ** 0.5 if case.seqlen_k == 1 else 1e-5
    for name, got, ref, low, like in zip(("dq", "dk", "dv"), grads, refs, rounded, inputs, strict=True):
        assert got.stride() == torch.empty_like(like).stride(), f"{case}: {name} has strides {got.stride()}"
        narrow = ref.to(got.dtype)
        atol = 2 * (narrow + 0.3 - 0.3 - narrow).abs().max().item()
        bound = 2 * (low.float() - ref).abs().max().item() + atol + floor
        errors = (got.float() - ref).abs().nan_to_num(float("inf"))
        error = errors.max().item()
        if not error <= bound:
            bad = int((errors > bound).sum())
            raise AssertionError(
                f"{case}, dout {dout_layout}: {name}, {reference.worst(got, ref)}: error {error:.3g} > bound"
                f" {bound:.3g}; {bad} of {errors.numel()} elements are beyond it"
            )
        worst = max(worst, error / bound)
    return worst


def gate(num_cases: int, seed: int, kinds: dict[str, list[cases.Variant]]) -> dict[str, Any]:
    """Check ``num_cases`` random cases and the empty ones."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(seed)
    rng = random.Random(seed)
    allocate, empty = launch.empty_grads, torch.empty

    def poisoned(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.fill_(float("nan")) for grad in allocate(*tensors))

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))

    launch.empty_grads, launch.torch.empty = poisoned, poisoned_empty  # type: ignore[assignment]
    try:
        shares = []
        for i in range(num_cases):
            case, layout = cases.random_case(seed, i, kinds), rng.choice(DOUT_LAYOUTS)
            if not case.seqlen_q or not case.seqlen_k:
                continue  # see check_empty
            shares.append(check(case, layout))
            if (i + 1) % 250 == 0:
                print(f"{i + 1} cases, worst {max(shares):.2f} of the bound", flush=True)
        check_empty()
    finally:
        launch.empty_grads, launch.torch.empty = allocate, empty
    return {
        "rule": "max|grad - ref| <= 2 max|pt - ref| + atol + floor, for dq, dk and dv; floor 1e-5, with a single key "
        "1e-5 sqrt(summands)",
        "cases": len(shares),
        "kinds": {name: len(variants) for name, variants in kinds.items()},
        "seed": seed,
        "failed": 0,
        "worst_error_over_bound": max(shares),
        "mean_error_over_bound": sum(shares) / len(shares),
    }


def check_empty() -> None:
    """No key, no query, no batch: gradients of zeros."""
    for batch, seqlen_q, seqlen_k in ((1, 3, 0), (0, 3, 3), (1, 0, 3), (0, 0, 0)):
        query = torch.randn(batch, 2, seqlen_q, 64, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, 2, seqlen_k, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = launch.attention_fwd(query, key, value, None, Options())
        grads = launch.attention_bwd(torch.ones_like(out), query, key, value, out, lse, Options())
        for grad, x in zip(grads, (query, key, value), strict=True):
            assert grad.shape == x.shape and not grad.any()


# ---- speed -----------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    head_dim: int
    head_dim_v: int
    is_causal: bool

    def label(self) -> str:
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        gqa = f" {self.heads}/{self.heads_kv}" if self.heads != self.heads_kv else ""
        return f"{dims}{gqa} {'causal' if self.is_causal else 'full'} {self.seqlen}"

    def flops(self) -> float:
        per_dim = 2.5 * 2 * self.batch * self.heads * self.seqlen**2
        return per_dim * (self.head_dim + self.head_dim_v) / (2 if self.is_causal else 1)


def grid(head_dims: list[int], seqlens: list[int]) -> list[Shape]:
    return [
        Shape(16384 // seqlen, 2048 // d, 2048 // d, seqlen, d, d, is_causal)
        for d in head_dims
        for is_causal in (False, True)
        for seqlen in seqlens
    ]


def breadth() -> list[Shape]:
    """Other head dims at 1k and 4k, GQA at 2k and 8k, unlike head dims at 4k."""
    shapes = grid([80, 96, 192, 256], [1024, 4096])
    for heads, heads_kv in ((32, 8), (28, 4)):
        shapes += [Shape(16384 // s, heads, heads_kv, s, 128, 128, True) for s in (2048, 8192)]
    for head_dim, head_dim_v in ((192, 128), (128, 64)):
        shapes += [Shape(4, 2048 // 128, 2048 // 128, 4096, head_dim, head_dim_v, c) for c in (False, True)]
    return shapes


def contenders(shape: Shape) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and backward of each that takes the shape."""
    sizes = ((shape.heads, shape.head_dim), (shape.heads_kv, shape.head_dim), (shape.heads_kv, shape.head_dim_v))
    query, key, value = (
        torch.randn(shape.batch, shape.seqlen, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h, d in sizes
    )
    options = Options(is_causal=shape.is_causal)
    out, lse = launch.attention_fwd(query, key, value, None, options)
    dout = torch.randn_like(out)
    yield "ours", functools.partial(launch.attention_bwd, dout, query, key, value, out, lse, options)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]

    def backward(out: Tensor, dout: Tensor) -> Callable[[], Any]:
        return functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)

    sdpa: Callable[..., Tensor] = functools.partial(
        F.scaled_dot_product_attention, is_causal=shape.is_causal, enable_gqa=shape.heads != shape.heads_kv
    )
    yield "torch", backward(sdpa(*leaves), dout)
    for name, choice in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(choice):
                result = sdpa(*leaves)
        except RuntimeError:  # it does not take this shape
            continue
        yield name, backward(result, dout)
    try:
        fa4 = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        result = fa4(*(x.transpose(1, 2) for x in leaves), causal=shape.is_causal)
    except (ImportError, RuntimeError, AssertionError):  # RuntimeError: its compiler is only half there
        return
    yield "fa4", backward(result[0] if isinstance(result, tuple) else result, dout.transpose(1, 2))


def measure(shapes: list[Shape], only: list[str]) -> list[dict[str, Any]]:
    """TFLOP/s of every contender in every cell."""
    from triton.testing import do_bench

    cells = []
    for shape in shapes:
        cell: dict[str, Any] = {"cell": shape.label(), **shape._asdict()}
        for name, run in contenders(shape):
            if only and name not in only:
                continue
            try:
                run()
            except (RuntimeError, AssertionError) as error:
                print(f"{shape.label()}: {name} fails: {str(error)[:200]}", flush=True)
                continue
            cell[name] = round(shape.flops() / do_bench(run, warmup=25, rep=100, return_mode="median") / 1e9, 1)
        cells.append(cell)
        print(row(cell), flush=True)
    return cells


NAMES = ("ours", "torch", "cudnn", "flash2", "fa4")


def row(cell: dict[str, Any]) -> str:
    peers = [cell[name] for name in NAMES[1:] if name in cell]
    ratio = f"{cell['ours'] / max(peers):8.2f}" if peers and "ours" in cell else ""
    return cell["cell"].ljust(24) + "".join(f"{cell.get(name, 0):9.1f}" for name in NAMES) + ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cases", type=int, default=600, help="random numerics cases; 0 skips the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", choices=("grid", "breadth", "none"), default="grid")
    parser.add_argument("--head-dims", type=int, nargs="*", default=[64, 128], help="of the grid")
    parser.add_argument("--seqlens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384], help="likewise")
    parser.add_argument("--only", nargs="*", default=[], help="contenders to time; all by default")
    parser.add_argument("--breadth", action="store_true", help="draw the cases from BREADTH")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    args = parser.parse_args()
    kinds = cases.BREADTH if args.breadth else cases.PLAIN
    shapes = {"grid": grid(args.head_dims, args.seqlens), "breadth": breadth(), "none": []}[args.shapes]
    if args.list_keys:
        drawn = [cases.random_case(args.seed, i, kinds) for i in range(args.cases)]
        timed = [
            cases.Case("bf16", x.head_dim, x.head_dim_v, x.batch, x.heads, x.heads_kv, x.seqlen, x.seqlen, options)
            for x in shapes
            for options in (Options(is_causal=x.is_causal),)
        ]
        return print("\n".join(sorted(key.name for key in keys([*drawn, *timed]))))
    numerics = gate(args.cases, args.seed, kinds) if args.cases else None
    print(f"numerics: {numerics}\n{' ' * 24}" + "".join(name.rjust(9) for name in NAMES) + "    best", flush=True)
    cells = measure(shapes, args.only)
    if args.out:
        save(args.out, cells, numerics=numerics, unit="TFLOP/s", protocol=(__doc__ or "").split("Speed: ")[1].strip())


if __name__ == "__main__":
    main()
