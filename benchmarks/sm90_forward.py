"""The SM90 forward kernel on one GPU: numerics gate first, then speed against its peers; JSON, and tables last.

    python benchmarks/sm90_forward.py --breadth --cases 5000 --cells grid breadth latency decode \\
        --out benchmarks/results/sm90_forward_h100.json

``--breadth`` draws the numerics cases from all of forward_cases.BREADTH (every head dim, head_dim_v, windows, softcap,
sink) instead of d64 and d128 alone. ``--list-keys`` prints the kernels that a bundle must hold to run the same command
line where there is no compiler. ``--prepare`` calls every contender once in every cell and measures nothing: several of
these at the same time fill a peer's disk cache of compiled kernels.

Numerics: forward_cases.py has the rule. A failing case ends the run with status 1 before anything is timed.

Speed: random bf16 data, (B, S, H, D) memory seen as (B, H, S, D), except where a peer wants the former. Contenders take
turns, in rounds in which each follows each other one equally often, and each figure is the median over the rounds: a
card's clock depends on its power and heat, so on what ran before, and that is the same for all of them. Every peer's
result is compared with ours before it is timed; one that refuses a cell, or gives something else, is null there with
its reason. The ratio of a cell is the best peer's time over ours: above 1 we are ahead.

    grid, breadth      TFLOP/s from 2·B·H·Sq·Sk·(D + Dv) flops, halved when causal; 16,384 tokens and, except for GQA,
                       2048 // d heads; each round is do_bench's median (L2 flushed before each call)
    latency, decode    device µs of one call: CALLS calls captured in one CUDA graph, over as many different input sets
                       as exceed L2 twice (at most CALLS); decode rows are for information
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from forward_cases import BREADTH, PLAIN, REPEATED, Case, gate, inputs, keys_of, random_case  # noqa: E402
from provenance import save  # noqa: E402

from fa_sdpa.bench import cells as shapes  # noqa: E402
from fa_sdpa.bench.contenders import Call, Contender, brief, contender  # noqa: E402
from fa_sdpa.bench.timing import ROUNDS, in_rounds, orders  # noqa: E402, F401
from fa_sdpa.kernels import launch  # noqa: E402
from fa_sdpa.meta.spec import Options  # noqa: E402

TOKENS = 16384
CALLS = 64  # captured in one graph
L2_BYTES = 50 << 20
PEERS = {"torch": "native", "cudnn": "cudnn", "flash2": "flash", "fa4": "flash-attn-4"}  # here → in fa_sdpa.bench


class Cell(shapes.Cell):
    """One row of a table."""

    @property
    def case(self) -> Case:
        """As the numerics cases are."""
        return Case(
            self.dtype,
            self.head_dim,
            self.head_dim_v,
            self.batch,
            self.heads,
            self.heads_kv,
            self.seqlen_q,
            self.seqlen_k,
            Options(self.is_causal),
        )


def square(seqlen: int, head_dim: int, is_causal: bool, head_dim_v: int | None = None, heads: str = "") -> Cell:
    """16,384 tokens of self-attention."""
    count, _, count_kv = (heads or f"{2048 // head_dim}").partition("/")
    kv = int(count_kv or count)
    return Cell(TOKENS // seqlen, int(count), kv, seqlen, seqlen, head_dim, head_dim_v or head_dim, is_causal)


CELLS = {
    "grid": [square(s, d, c) for d in (64, 128) for c in (False, True) for s in (512, 1024, 2048, 4096, 8192, 16384)],
    "breadth": [
        *(square(s, d, c) for d in (80, 96, 192, 256) for s in (1024, 4096) for c in (False, True)),
        *(square(s, 128, True, heads=heads) for heads in ("32/8", "28/4") for s in (2048, 8192)),
        square(4096, 192, True, 128),
        square(4096, 128, False, 64),
    ],
    "latency": [
        *(
            Cell(1, 16, 16, s, s, d, d, c)
            for d in (64, 128)
            for c in (False, True)
            for s in [2**i for i in range(7, 13)]
        ),
        Cell(3, 16, 16, 1680, 1680, 80, 80, False),
        Cell(84, 16, 16, 64, 64, 80, 80, False),
        Cell(1, 16, 2, 1285, 1285, 80, 80, True),
    ],
    "decode": [
        Cell(1, 16, 2, 1, 2048, 80, 80, False),
        Cell(1, 32, 8, 1, 32768, 128, 128, False),
        Cell(16, 32, 8, 1, 8192, 128, 128, False),
    ],
}
UNITS = {"grid": "TFLOP/s", "breadth": "TFLOP/s", "latency": "µs", "decode": "µs"}

Run = Callable[..., Any]  # of query, key, value, or of what a caller of ``bench_ms`` gives instead


def contenders() -> dict[str, Call]:
    """Name → call(query, key, value, is_causal), ours first; flash-attn-4 where it can be imported."""
    calls: dict[str, Call] = {"ours": lambda q, k, v, c: launch.attention_fwd(q, k, v, None, Options(is_causal=c))[0]}
    for name in PEERS:
        with contextlib.suppress(ImportError):
            calls[name] = _in_scope(contender(PEERS[name]))
    return calls


def _in_scope(peer: Contender) -> Call:
    def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        with peer.scope():
            return peer.call(query, key, value, is_causal)

    return call


def refusal(call: Call, tensors: tuple[Tensor, ...], is_causal: bool, expected: Tensor | None) -> str:
    """Why ``call`` is not timed in a cell: it raises, or gives something else; empty if it is."""
    try:
        out = call(*tensors, is_causal)
    except Exception as error:  # each peer has its own way to refuse
        return brief(error)
    if expected is None:
        return ""
    off = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    return "" if off < 0.02 else f"its result differs from ours by {off:.3g} of the norm"


def measure(cell: Cell, group: str, calls: dict[str, Call], only_prepare: bool = False) -> dict[str, Any]:
    """A cell's row: what every contender reaches, and why some do not."""
    is_graph = UNITS[group] == "µs"
    size = 2 * (cell.batch * cell.heads * cell.seqlen_q + cell.batch * cell.heads_kv * cell.seqlen_k)
    size *= cell.head_dim + cell.head_dim_v
    num_sets = min(max(math.ceil(2 * L2_BYTES / size), 2), CALLS) if is_graph and not only_prepare else 1
    sets = [inputs(cell.case)[:3] for _ in range(num_sets)]
    expected = calls["ours"](*sets[0], cell.is_causal) if "ours" in calls else None
    refused = {name: why for name, call in calls.items() if (why := refusal(call, sets[0], cell.is_causal, expected))}
    if "ours" in refused:
        raise RuntimeError(f"{cell}: {refused['ours']}")
    runs = {name: _bound(call, cell.is_causal) for name, call in calls.items() if name not in refused}
    row: dict[str, Any] = {"group": group, "cell": str(cell), "unit": UNITS[group], "seqlen": cell.seqlen_q}
    row |= cell._asdict() | dict.fromkeys(calls)
    if not only_prepare:
        times = graph_ms(runs, sets, refused) if is_graph else bench_ms(runs, sets)
        for name, ms in times.items():
            row[name] = round(1e3 * ms, 2) if is_graph else round(cell.flops / ms / 1e9, 1)
        row["ratio"], row["ratio_cudnn"] = ratio(row), ratio(row, ("cudnn",))
    return row | ({"refused": refused} if refused else {})


def _bound(call: Call, is_causal: bool) -> Run:
    return lambda query, key, value: call(query, key, value, is_causal)


def medians(names: list[str], time_one: Callable[[str], float]) -> dict[str, float]:
    """Median of ``time_one`` over rounds over the contenders."""
    return {name: statistics.median(values) for name, values in in_rounds(names, time_one).items()}


def bench_ms(runs: dict[str, Run], sets: list[Any]) -> dict[str, float]:
    """ms of one call, L2 flushed before each."""
    from triton.testing import do_bench

    def time_one(name: str) -> float:
        return do_bench(lambda: runs[name](*sets[0]), warmup=8, rep=15, return_mode="median")

    return medians(list(runs), time_one)


def graph_ms(runs: dict[str, Run], sets: list[Any], refused: dict[str, str]) -> dict[str, float]:
    """ms of one of CALLS calls captured in a CUDA graph, over all input sets in turn; adds who can't be captured."""
    graphs = {}
    for name, run in runs.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for i in range(CALLS):
                    run(*sets[i % len(sets)])
            graphs[name] = graph
        except Exception as error:
            if name == "ours":
                raise
            refused[name] = f"in a CUDA graph: {brief(error)}"

    def time_one(name: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graphs[name].replay()
        start.record()
        for _ in range(3):
            graphs[name].replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (3 * CALLS)

    return medians(list(graphs), time_one)


def ratio(row: dict[str, Any], peers: Iterable[str] = PEERS) -> float | None:
    """The best peer's time over ours; None if neither of them was timed."""
    values = [row[name] for name in peers if row.get(name)]
    if not values or not row.get("ours"):
        return None
    return round(min(values) / row["ours"] if row["unit"] == "µs" else row["ours"] / max(values), 4)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geomean and minimum of the ratios in each group."""
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group and row["ratio"]]
        if chosen:
            worst = min(chosen, key=lambda row: row["ratio"])
            against_cudnn = [row["ratio_cudnn"] for row in chosen if row["ratio_cudnn"]]
            groups[group] = {
                "cells": len(chosen),
                "geomean": round(statistics.geometric_mean(row["ratio"] for row in chosen), 4),
                "minimum": worst["ratio"],
                "minimum_at": worst["cell"],
                "ahead": sum(row["ratio"] >= 1.0 for row in chosen),
                **({"geomean_cudnn": round(statistics.geometric_mean(against_cudnn), 4)} if against_cudnn else {}),
            }
    return groups


def tables(rows: list[dict[str, Any]]) -> str:
    """One table per group, and the groups' summary last."""
    names = [name for name in ("ours", *PEERS) if name in rows[0]]
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group]
        title = f"{group} ({chosen[0]['unit']})"
        lines += ["", title.ljust(34) + "".join(n.rjust(9) for n in names) + "  /cudnn   /best"]
        for row in chosen:
            figures = "".join(f"{row[n]:9.1f}" if row[n] else "        -" for n in names)
            ratios = "".join(f"{row[n]:8.2f}" if row[n] else "       -" for n in ("ratio_cudnn", "ratio"))
            lines.append(row["cell"].ljust(34) + figures + ratios)
    for group, about in summary(rows).items():
        lines.append(f"{group}: {about}")
    return "\n".join(lines)


def command_line(description: str | None, groups: Mapping[str, list[Cell]]) -> argparse.ArgumentParser:
    """What the SM90 benchmarks take, but for the kinds that cases are drawn from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cases", type=int, default=600, help="random numerics cases; 0 skips the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="*", default=["grid"], choices=groups, help="what to time; grid by default")
    parser.add_argument("--head-dims", type=int, nargs="*", help="only the cells of these head dims")
    parser.add_argument("--seqlens", type=int, nargs="*", help="only the cells of these query lengths")
    parser.add_argument("--only", nargs="*", default=[], choices=("ours", *PEERS), help="contenders to time")
    parser.add_argument("--prepare", action="store_true", help="call everything once, time nothing")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    return parser


def chosen_cells(args: argparse.Namespace, groups: Mapping[str, list[Cell]]) -> list[tuple[str, Cell]]:
    """(group, cell) of what the command line asks for."""
    return [
        (group, cell)
        for group in args.cells
        for cell in groups[group]
        if (args.head_dims is None or cell.head_dim in args.head_dims)
        and (args.seqlens is None or cell.seqlen_q in args.seqlens)
    ]


def main() -> None:
    parser = command_line(__doc__, CELLS)
    parser.add_argument("--breadth", action="store_true", help="draw the cases from every kind of call")
    args = parser.parse_args()
    kinds = BREADTH if args.breadth else PLAIN
    cells = chosen_cells(args, CELLS)
    if args.list_keys:
        cases = [random_case(args.seed, index, kinds) for index in range(args.cases)]
        return print("\n".join(key.name for key in keys_of([*cases, REPEATED, *(cell.case for _, cell in cells)])))
    about: dict[str, Any] = {"numerics": None}
    if args.cases:
        about["numerics"] = gate(args.cases, args.seed, kinds)
        print(f"numerics: {about['numerics']}", flush=True)
    failed = args.cases and about["numerics"]["failed"]
    calls = {name: call for name, call in contenders().items() if not args.only or name in args.only}
    rows = [] if failed else [measure(cell, group, calls, args.prepare) for group, cell in cells]
    if rows and not args.prepare:
        about |= {"summary": summary(rows), "protocol": (__doc__ or "").split("Speed: ")[1].strip()}
    if args.out:
        save(args.out, rows, unit="TFLOP/s", **about)
    if rows and not args.prepare:
        print(tables(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
