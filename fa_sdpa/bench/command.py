"""``python -m fa_sdpa bench``: its arguments, and what they ask for."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from .. import record as calls
from ..meta.models import MODELS
from ..progress import Progress
from ..switch import disable
from . import cells, host, plots, report, timing
from .cells import DIRECTIONS, DTYPES, Cell, Direction
from .contenders import DEFAULT, NAMES, OURS, PEER, Contender, contender
from .measure import Row, measure, time_of

CAUSAL = {"yes": (True,), "no": (False,), "both": (False, True)}
QUICK_ROUNDS = 3


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="time fa4 beside torch's backends and flash-attn-4, on shapes, models or recorded calls",
        description="Without --model, --from and --case: the grid of --seqlen, --head-dim and --causal.",
    )
    command.add_argument("of", nargs="?", choices=("host",), help="host: what a call costs the host, by state and step")
    what = command.add_argument_group("what is timed")
    what.add_argument("--direction", type=_names(DIRECTIONS), default=["forward"], metavar="LIST", help="forward, "
        "backward, both (a forward and its backward, as in training); default: forward")  # fmt: skip
    what.add_argument("--backend", type=_names(NAMES), default=list(DEFAULT), metavar="LIST", help=", ".join(NAMES)
        + "; default: all but math")  # fmt: skip
    what.add_argument("--dtype", type=_names(DTYPES), metavar="LIST", help="default: bf16")
    what.add_argument("--mode", type=_names(timing.MODES), default=list(timing.MODES), metavar="LIST", help="eager, "
        "graph; default: both")  # fmt: skip
    grid = command.add_argument_group("a grid")
    grid.add_argument(
        "--seqlen", type=_sizes, metavar="LIST", help="of queries, as 512,1k,4k (the default: 512 to 16k)"
    )
    grid.add_argument("--head-dim", type=_sizes, default=[64, 128], metavar="LIST", help="default: 64,128")
    grid.add_argument("--causal", choices=CAUSAL, default="both", help="default: both")
    grid.add_argument("--batch", type=_sizes, default=[], metavar="LIST", help="default: as many as make --tokens")
    grid.add_argument("--tokens", type=_size, default=16384, metavar="N", help="batch × seqlen; default: 16k")
    grid.add_argument("--heads", type=int, metavar="N", help="default: 2048 // head dim")
    grid.add_argument("--kv-heads", type=int, metavar="N", help="default: as many as --heads")
    grid.add_argument("--sk", type=_size, metavar="N", help="keys; default: as many as queries")
    grid.add_argument("--dv", type=int, metavar="N", help="head dim of value; default: that of query")
    other = command.add_argument_group("instead of a grid")
    other.add_argument("--model", type=_names(MODELS), default=[], metavar="LIST", help=", ".join(MODELS)
        + "; --batch and --seqlen replace their own sizes")  # fmt: skip
    other.add_argument("--from", dest="calls", type=Path, metavar="FILE", help="what run --record wrote")
    other.add_argument("--case", type=_case, nargs="+", metavar="N", help="production calls "
        + "; ".join(f"{n}: {cell}" for n, cell in cells.CASES.items()))  # fmt: skip
    out = command.add_argument_group("how, and where to")
    out.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {timing.ROUNDS}: rougher")
    out.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    out.add_argument("--json", type=Path, metavar="FILE", help="write rows and provenance there")
    out.add_argument("--csv", type=Path, metavar="FILE", help="write rows there")
    out.add_argument("--plots", type=Path, metavar="DIR", help="write PNG pictures there; needs matplotlib")
    command.set_defaults(call=run)


def run(args: argparse.Namespace) -> None:
    """Time what was asked for and report it. Exit status 1 if a result of ours was wrong or raised."""
    if args.plots and not plots.available():
        raise SystemExit(f"fa_sdpa bench: {plots.MISSING}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.of == "host":
        where = ["--json", str(args.json)] if args.json else []
        rough = ["--rounds", "5"] if args.quick else []
        return host.main(["--device", device, *rough, *where])
    try:
        work = wanted(args)
        contenders = available(args.backend)
    except ValueError as error:
        raise SystemExit(f"fa_sdpa bench: {error}") from None
    disable()  # FA_SDPA=1 is not to route torch's own calls
    ceilings = timing.ceilings(device)
    rows: list[Row] = []
    progress = Progress(len(work), "cells")
    rounds = QUICK_ROUNDS if args.quick else timing.ROUNDS
    for cell, direction in work:
        found = measure(cell, direction, contenders, device, modes=args.mode, rounds=rounds, ceilings=ceilings)
        rows += found
        progress(f"{direction} {cell}", _outcome(found), any(failures(found)))
    print(report.table(rows, with_ms=args.case is not None))
    if ceilings:
        matmul, copy = ceilings.values()
        print(f"\nin the same run, this device reached {matmul:.0f} TFLOP/s in a matmul, {copy:.0f} GB/s in a copy")
    if args.csv:
        report.write_csv(rows, args.csv)
    if args.json:
        report.write_json(rows, args.json, ceilings=ceilings, rounds=rounds, device=device)
    if args.plots:
        print("\n".join(str(path) for path in plots.plot(rows, args.plots)) or "too few rows for a plot")
    wrong = failures(rows)
    if wrong:
        raise SystemExit(1)


def wanted(args: argparse.Namespace) -> list[tuple[Cell, Direction]]:
    """The cells that the arguments ask for. ValueError if they are none, or contradict one another."""
    if sum(map(bool, (args.model, args.calls, args.case))) > 1:
        raise ValueError("one of --model, --from and --case")
    if args.calls:
        found, left_out = cells.of_calls(calls.read(args.calls))
        for why, count in left_out.items():
            print(f"{count} calls {why} are not timed", file=sys.stderr)
        if not found:
            raise ValueError(f"{args.calls} has no call that can be timed")
        return found
    if args.case:
        dtypes = args.dtype or cells.PRECISIONS
        of_dtypes = (cells.CASES[n]._replace(dtype=t) for n in dict.fromkeys(args.case) for t in dtypes)
        return list(itertools.product(of_dtypes, args.direction))
    dtypes = args.dtype or ["bf16"]
    if args.model:
        of_models = cells.of_models(args.model, dtypes, args.batch, args.seqlen or [])
        return list(itertools.product(of_models, args.direction))
    seqlens = args.seqlen or [512 << i for i in range(6)]
    whole = cells.grid(
        seqlens, args.head_dim, CAUSAL[args.causal], dtypes, tokens=args.tokens, batches=args.batch, heads=args.heads,
        heads_kv=args.kv_heads, seqlen_k=args.sk, head_dim_v=args.dv,
    )  # fmt: skip
    bad = next((cell for cell in whole if cell.heads % cell.heads_kv), None)
    if bad:
        raise ValueError(f"{bad.heads} query heads cannot share {bad.heads_kv} key/value heads")
    return [(cell, direction) for direction in args.direction for cell in whole]


def available(names: list[str]) -> list[Contender]:
    """The contenders of these names. A peer that is not installed is left out; only if it was asked for by itself
    that is an error, ValueError."""
    found = []
    for name in names:
        try:
            found.append(contender(name))
        except ImportError as error:
            if name != PEER or len(names) == 1:
                raise ValueError(str(error)) from None
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def failures(rows: list[Row]) -> list[Row]:
    """Our rows with a wrong result, or an error; a call that we leave to torch is none."""
    return [
        row
        for row in rows
        if row["backend"] == OURS and row["reason"] and not row["reason"].startswith(("native: ", "no inputs"))
    ]


def _outcome(rows: list[Row]) -> str:
    """A line for who has no progress bar."""
    times: dict[str, Any] = {row["backend"]: time_of(row) for row in rows}
    return ", ".join(f"{name} {ms:.4f} ms" if ms else f"{name} -" for name, ms in times.items())


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: not one of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def _size(text: str) -> int:
    """4096, 4k or 4K."""
    scale = 1024 if text[-1:] in ("k", "K") else 1
    digits = text[:-1] if scale > 1 else text
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"a size as 4096 or 4k, not {text!r}")
    return int(digits) * scale


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def _case(text: str) -> int:
    if not text.isdigit() or int(text) not in cells.CASES:
        raise argparse.ArgumentTypeError(f"one of {', '.join(map(str, cells.CASES))}, not {text!r}")
    return int(text)
