"""python -m fa_sdpa run | explain | doctor: argument parsing only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from . import doctor
from .meta.spec import AttentionSpec
from .meta.target import Target
from .policy import Policy, decide
from .run import run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fa_sdpa")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("run", help="run an unchanged program with routing on, and count its SDPA calls")
    command.add_argument("--policy", default="auto", help="auto, always or never (default: auto)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the count there")
    command.add_argument("-m", dest="module", action="store_true", help="the program is a module, as for python -m")
    command.add_argument("program", help="a Python script, or a module after -m")
    command.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    command.set_defaults(call=_run)

    command = commands.add_parser("explain", help="where one SDPA call would go, and why")
    command.add_argument("--shape", type=_shape, required=True, metavar="B,H,Sq,D", help="of the query")
    command.add_argument("--kv-heads", type=int, metavar="N", help="default: as many as the query's")
    command.add_argument("--sk", type=int, metavar="N", help="keys (default: as many as queries)")
    command.add_argument("--dv", type=int, metavar="N", help="head dim of value (default: that of query)")
    command.add_argument("--dtype", choices=DTYPES, default="bf16")
    command.add_argument("--causal", action="store_true", help="is_causal=True")
    command.add_argument("--grad", action="store_true", help="gradients are needed")
    command.add_argument("--policy", default="auto", help="auto, always or never (default: auto)")
    command.add_argument("--arch", type=int, help="of a GPU that need not be here, as 90 (default: this machine)")
    command.set_defaults(call=_explain)

    command = commands.add_parser("doctor", help="what this machine has, and which kernels can run on it")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(call=_doctor)

    args = parser.parse_args(argv)
    try:
        Policy.of(getattr(args, "policy", "auto"))
    except ValueError as error:
        parser.error(str(error))
    args.call(args)


def _shape(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"four sizes B,H,Sq,D, not {text}")
    return sizes


def _run(args: argparse.Namespace) -> None:
    run(args.program, args.args, module=args.module, policy=args.policy, report=args.json)


def _explain(args: argparse.Namespace) -> None:
    batch, heads, seqlen, dim = args.shape
    spec = AttentionSpec(
        DTYPES[args.dtype],
        batch,
        heads,
        heads if args.kv_heads is None else args.kv_heads,
        seqlen,
        seqlen if args.sk is None else args.sk,
        dim,
        dim if args.dv is None else args.dv,
        is_causal=args.causal,
        needs_grad=args.grad,
    )
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target("cuda", args.arch) if args.arch else Target.of(here)
    print(decide(spec, target, Policy.of(args.policy)))


def _doctor(args: argparse.Namespace) -> None:
    report = doctor.diagnose()
    print(json.dumps(report, indent=1) if args.json else doctor.render(report))


if __name__ == "__main__":
    main()
