"""The SM90 backward kernel on one GPU: numerics gate first, then speed against its peers; JSON, and tables last.

    python benchmarks/sm90_backward.py --cases 5000 --cells grid large breadth \\
        --out benchmarks/results/sm90_backward_h100.json

``--plain`` draws the numerics cases from d64 and d128 without options alone. ``--list-keys`` prints the kernels that a
bundle must hold to run the same command line where there is no compiler. ``--prepare`` calls every contender once in
every cell and measures nothing: several of these at the same time fill a peer's disk cache of compiled kernels.

Numerics: backward_cases.py has the rule. A failing case ends the run with status 1 before anything is timed.

Speed: backward alone, bf16, random data, (B, S, H, D) memory seen as (B, H, S, D). Peers run under autograd, from a
graph that is retained; ours is called directly. Contenders take turns, in rounds in which each follows each other one
equally often; a figure is the median over the rounds of do_bench's median (L2 flushed before each call). Every peer's
gradients are compared with ours before it is timed; one that refuses a cell, or gives something else, is null there
with its reason. TFLOP/s from 2.5 · 2·B·H·Sq·Sk·(D + Dv) flops, halved when causal; 16,384 tokens and, except for GQA,
2048 // d heads. The ratio of a cell is ours over the best peer's: above 1 we are ahead.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))

import backward_cases  # noqa: E402
from forward_cases import PLAIN, inputs  # noqa: E402
from provenance import save  # noqa: E402
from sm90_forward import CELLS as FORWARD_CELLS  # noqa: E402
from sm90_forward import PEERS, Cell, bench_ms, brief, ratio, square, summary, tables  # noqa: E402

from fa_sdpa.kernels import launch  # noqa: E402
from fa_sdpa.meta.spec import Options  # noqa: E402

FLOPS = 2.5  # of a forward's: five products instead of two
CELLS = {
    "grid": FORWARD_CELLS["grid"],
    "large": [square(s, d, c) for d in (192, 256) for s in (1024, 4096) for c in (False, True)],
    "breadth": [
        *(square(s, d, c) for d in (80, 96) for s in (1024, 4096) for c in (False, True)),
        *(square(s, 128, True, heads=heads) for heads in ("32/8", "28/4") for s in (2048, 8192)),
        *(square(4096, d, c, dv) for d, dv in ((192, 128), (128, 64)) for c in (False, True)),
    ],
}

Grads = tuple[Tensor, ...]
Run = Callable[[], Grads]
Prepare = Callable[[list[Tensor], Tensor, bool], Run]  # (query, key, value), dout, is_causal


def ours(tensors: list[Tensor], dout: Tensor, is_causal: bool) -> Run:
    query, key, value = tensors
    options = Options(is_causal=is_causal)
    out, lse = launch.attention_fwd(query, key, value, None, options)
    return functools.partial(launch.attention_bwd, dout, query, key, value, out, lse, options)


def by_autograd(call: Callable[..., Tensor]) -> Prepare:
    """The backward of ``call(query, key, value, is_causal)``."""

    def prepare(tensors: list[Tensor], dout: Tensor, is_causal: bool) -> Run:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = call(*leaves, is_causal)
        return functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)

    return prepare


def contenders() -> dict[str, Prepare]:
    """Name → what prepares its backward, ours first; flash-attn-4 where it can be imported."""

    def sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        has_groups = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=has_groups)

    def on_backend(choice: SDPBackend) -> Prepare:
        def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
            with sdpa_kernel(choice), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend refuses, said for each of them
                return sdpa(query, key, value, is_causal)

        return by_autograd(call)

    found: dict[str, Prepare] = {
        "ours": ours,
        "torch": by_autograd(sdpa),
        "cudnn": on_backend(SDPBackend.CUDNN_ATTENTION),
        "flash2": on_backend(SDPBackend.FLASH_ATTENTION),
    }
    try:
        fa4 = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    except (ImportError, RuntimeError):  # RuntimeError: its compiler is only half there
        return found

    def call_fa4(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        out = fa4(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return {**found, "fa4": by_autograd(call_fa4)}


def difference(grads: Grads, expected: Grads) -> str:
    """What is wrong with a peer's gradients; empty if they are ours within 16-bit rounding."""
    for name, got, want in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        off = ((got.float() - want.float()).norm() / want.float().norm()).item()
        if not off < 0.02:
            return f"its {name} differs from ours by {off:.3g} of the norm"
    return ""


def measure(cell: Cell, group: str, chosen: dict[str, Prepare], only_prepare: bool = False) -> dict[str, Any]:
    """A cell's row: what every contender reaches, and why some do not."""
    tensors = list(inputs(cell.case)[:3])
    size = cell.batch, cell.seqlen_q, cell.heads, cell.head_dim_v
    dout = torch.randn(size, device="cuda", dtype=tensors[0].dtype).transpose(1, 2)
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    expected: Grads | None = None
    for name, prepare in chosen.items():
        try:
            run = prepare(tensors, dout, cell.is_causal)
            grads = run()
        except Exception as error:  # each peer has its own way to refuse
            if name == "ours":
                raise
            refused[name] = brief(error)
            continue
        expected = grads if name == "ours" else expected
        why = difference(grads, expected) if expected else ""
        if why:
            refused[name] = why
        else:
            runs[name] = run
    row: dict[str, Any] = {"group": group, "cell": str(cell), "unit": "TFLOP/s", "seqlen": cell.seqlen_q}
    row |= cell._asdict() | dict.fromkeys(chosen)
    if not only_prepare:
        for name, ms in bench_ms(runs, [()]).items():
            row[name] = round(FLOPS * cell.flops / ms / 1e9, 1)
        row["ratio"], row["ratio_cudnn"] = ratio(row), ratio(row, ("cudnn",))
    return row | ({"refused": refused} if refused else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cases", type=int, default=600, help="random numerics cases; 0 skips the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="draw the cases from d64 and d128 without options")
    parser.add_argument("--cells", nargs="*", default=["grid"], choices=CELLS, help="what to time; grid by default")
    parser.add_argument("--head-dims", type=int, nargs="*", help="only the cells of these head dims")
    parser.add_argument("--seqlens", type=int, nargs="*", help="only the cells of these lengths")
    parser.add_argument("--only", nargs="*", default=[], choices=("ours", *PEERS), help="contenders to time")
    parser.add_argument("--prepare", action="store_true", help="call everything once, time nothing")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    args = parser.parse_args()
    kinds = PLAIN if args.plain else backward_cases.KINDS
    cells = [
        (group, cell)
        for group in args.cells
        for cell in CELLS[group]
        if (args.head_dims is None or cell.head_dim in args.head_dims)
        and (args.seqlens is None or cell.seqlen_q in args.seqlens)
    ]
    if args.list_keys:
        drawn = [backward_cases.draw(args.seed, index, kinds) for index in range(args.cases)]
        drawn += [backward_cases.Drawn(cell.case, "as_out", True) for _, cell in cells]
        return print("\n".join(key.name for key in backward_cases.keys_of(drawn)))
    about: dict[str, Any] = {"numerics": None}
    if args.cases:
        about["numerics"] = backward_cases.gate(args.cases, args.seed, kinds)
        print(f"numerics: {about['numerics']}", flush=True)
    failed = args.cases and about["numerics"]["failed"]
    chosen = {name: prepare for name, prepare in contenders().items() if not args.only or name in args.only}
    rows: list[dict[str, Any]] = []
    about["protocol"] = (__doc__ or "").split("Speed: ")[1].strip()
    for group, cell in [] if failed else cells:
        rows.append(measure(cell, group, chosen, args.prepare))
        if not args.prepare:
            print(f"{cell}: {rows[-1]['ratio']}", flush=True)
            about["summary"] = summary(rows)
        if args.out:  # what was measured so far, whatever happens next
            save(args.out, rows, unit="TFLOP/s", **about)
    if args.out and not rows:
        save(args.out, rows, unit="TFLOP/s", **about)
    if rows and not args.prepare:
        print(tables(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
