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

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import backward_cases  # noqa: E402
from forward_cases import PLAIN, inputs  # noqa: E402
from provenance import save  # noqa: E402
from sm90_forward import CELLS as FORWARD_CELLS  # noqa: E402
from sm90_forward import (  # noqa: E402
    PEERS,
    Call,
    Cell,
    bench_ms,
    brief,
    chosen_cells,
    command_line,
    ratio,
    square,
    summary,
    tables,
)
from sm90_forward import contenders as forward_contenders  # noqa: E402

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
    calls = forward_contenders()
    return {"ours": ours, **{name: by_autograd(quietly(calls[name])) for name in PEERS if name in calls}}


def quietly(call: Call) -> Call:
    """``call`` without the warnings by which a backend says why it refuses."""

    def quiet(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(query, key, value, is_causal)

    return quiet


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
    parser = command_line(__doc__, CELLS)
    parser.add_argument("--plain", action="store_true", help="draw the cases from d64 and d128 without options")
    args = parser.parse_args()
    kinds = PLAIN if args.plain else backward_cases.KINDS
    cells = chosen_cells(args, CELLS)
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
