"""python -m fa_sdpa run | explain | doctor | warm | bench | qualify: argument parsing only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import doctor, warm
from . import record as calls
from .bench import command as bench
from .kernels.key import KernelKey
from .meta.models import MODELS
from .meta.spec import AttentionSpec
from .meta.target import Target
from .policy import Policy, decide
from .progress import Progress
from .qualify import command as qualify
from .run import run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fa_sdpa")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("run", help="run an unchanged program with routing on, and count its SDPA calls")
    command.add_argument("--policy", default="auto", help="auto, always or never (default: auto)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the count there")
    command.add_argument(
        "--record", type=Path, metavar="FILE", help="write every distinct call there, for warm --calls"
    )
    command.add_argument("--jit", help="background, block or never: calls whose kernel is not compiled yet")
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

    _add_warm(commands)
    bench.add_parser(commands)
    qualify.add_parser(commands)

    args = parser.parse_args(argv)
    try:
        Policy(getattr(args, "policy", "auto"), jit=getattr(args, "jit", None))
    except ValueError as error:
        parser.error(str(error))
    args.call(args)


def _add_warm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "warm",
        help="compile kernels before they are needed, on a machine with or without a GPU",
        description="Without --model, --shape, --calls or --kernel: the kernels of the most common calls.",
    )
    command.add_argument("--arch", type=_arch, help="sm_90, for a GPU that need not be here (default: this machine's)")
    models = f"a transformers config.json, or one of {', '.join(MODELS)}"
    command.add_argument("--model", action="append", default=[], metavar="CONFIG", help=models)
    command.add_argument("--shape", type=_shape, action="append", default=[], metavar="B,H,Sq,D", help="of a query")
    command.add_argument("--dv", type=int, metavar="N", help="head dim of value with --shape (default: that of query)")
    command.add_argument("--causal", action="store_true", help="with --shape: is_causal=True")
    command.add_argument("--grad", action="store_true", help="with --shape: gradients are needed")
    command.add_argument("--dtype", choices=("bf16", "fp16"), help="default: the model's, or else bf16")
    command.add_argument(
        "--calls", type=Path, action="append", default=[], metavar="FILE", help="what run --record wrote"
    )
    command.add_argument("--kernel", type=_kernel, action="append", default=[], metavar="NAME", help="as in reasons")
    command.add_argument("--bundle", type=Path, metavar="DIR", help="write one library there, for FA_SDPA_BUNDLE=DIR")
    command.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes")
    command.add_argument("--list", action="store_true", help="only print the names of the kernels")
    command.set_defaults(call=_warm)


def _shape(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"four sizes B,H,Sq,D, not {text}")
    return sizes


def _arch(text: str) -> int:
    digits = text.removeprefix("sm_").rstrip("af")
    if not digits.isdigit():
        raise argparse.ArgumentTypeError(f"an arch as sm_90, not {text}")
    return int(digits)


def _kernel(text: str) -> KernelKey:
    try:
        return KernelKey.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> None:
    policy = Policy(args.policy, jit=args.jit) if args.jit else args.policy
    run(args.program, args.args, module=args.module, policy=policy, report=args.json, record=args.record)


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
    print(decide(spec, target, Policy.of(args.policy), detail=True))


def _doctor(args: argparse.Namespace) -> None:
    report = doctor.diagnose()
    print(json.dumps(report, indent=1) if args.json else doctor.render(report))


def _warm(args: argparse.Namespace) -> None:
    try:
        keys = _wanted_kernels(args)
        if args.list:
            print("\n".join(key.name for key in keys))
            return
        bar = Progress(len(keys), "kernels")
        manifest = None

        def progress(outcome: warm.Outcome) -> None:
            bar(outcome.key.name, outcome.what, outcome.error is not None)

        if args.bundle:
            done, manifest = warm.to_bundle(keys, args.jobs, progress, args.bundle)
        else:
            done = warm.to_cache(keys, args.jobs, progress)
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"fa_sdpa warm: {error}") from None
    failed = [outcome for outcome in done if outcome.error]
    for outcome in failed:
        print(f"{outcome.key.name}: {outcome.error}", file=sys.stderr)
    compiled = sum(outcome.seconds > 0 and not outcome.error for outcome in done)
    print(f"{compiled} kernels compiled, {len(done) - compiled - len(failed)} were there, {len(failed)} failed")
    if manifest:
        print(f"bundle: {manifest}")
    if failed:
        raise SystemExit(1)


def _wanted_kernels(args: argparse.Namespace) -> list[KernelKey]:
    """What ``warm``'s arguments ask for. ValueError if that is nothing that can be compiled."""
    if args.arch is None and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: name one with --arch sm_90")
    target = Target("cuda", args.arch) if args.arch else Target.of(torch.device("cuda"))
    dtype = DTYPES[args.dtype] if args.dtype else None
    models = [spec for model in args.model for spec in warm.specs_of_model(model, dtype)]
    specs = [spec for path in args.calls for spec in calls.read(path)]
    for batch, heads, seqlen, dim in args.shape:
        plain = AttentionSpec(dtype or torch.bfloat16, batch, heads, heads, seqlen, seqlen, dim, args.dv or dim)
        specs.append(plain._replace(is_causal=args.causal, needs_grad=args.grad))
    if not models and not specs and not args.kernel:
        return warm.common_keys(target)
    of_models, refused = warm.keys_of(models, target, any_size=True)
    of_calls, refused_too = warm.keys_of(specs, target)
    for refusal in dict.fromkeys((*refused, *refused_too)):
        print(f"no kernel for some of these calls: {refusal}", file=sys.stderr)
    keys = list(dict.fromkeys((*of_models, *of_calls, *args.kernel)))
    if not keys:
        raise ValueError("there is no kernel for any of these calls")
    return keys


if __name__ == "__main__":
    main()
