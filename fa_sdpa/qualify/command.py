"""``python -m fa_sdpa qualify``: its arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from .. import kernels
from ..meta import user
from ..progress import Progress
from . import report
from .run import Run, Settings, count, default_device, describe, keep
from .session import Session


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "qualify",
        help="find out which kernels work on this GPU and from where on they are faster, for the policy to go by",
        description="Each step has a time limit and a process of its own to lose. An interrupted run goes on where it "
        "stopped. What fails is never routed on this machine. With --device cpu nothing is kept for the policy.",
    )
    command.add_argument("--quick", action="store_true", help="fewer kinds of calls and rounds: some 3 minutes, not 25")
    command.add_argument("--out", type=Path, metavar="DIR", help="journal and report; default: in the user's settings")
    command.add_argument("--fresh", action="store_true", help="do again what an earlier run has done")
    command.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="compile so many at once"
    )
    command.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="time no more cells after so long"
    )
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    command.set_defaults(call=run)


def run(args: argparse.Namespace) -> None:
    """Qualify and report. Exit status 1 if it did not pass, or something failed."""
    device = args.device or default_device()
    with Session() as session:
        try:
            about = describe(session, device)
        except RuntimeError as error:
            raise SystemExit(f"fa_sdpa qualify: {error}") from None
        out = args.out or user.of_device(about["name"]) / "qualify"
        settings = Settings(device, args.quick, out, args.fresh, args.jobs, args.minutes)
        runner = Run(settings, session, about, lambda name, what, failed: progress(name, what, failed))
        if kernels.family_of(runner.target) is None or about["missing"]:
            lacking = about["missing"] or [f"no fa4 kernels for {about['name']} (sm_{about['arch_number']})"]
            raise SystemExit(f"fa_sdpa qualify: nothing can run here: {'; '.join(lacking)}")
        progress = Progress(count(settings, runner.steps), "steps")
        findings = runner.all()
    kept = keep(findings, runner.target) if device == "cuda" else []
    for path in report.write(findings, out, kept):
        print(path)
    for path in kept:
        print(f"for the policy: {path}")
    for name, why in findings.failed.items():
        print(f"in quarantine: {name}: {why}", file=sys.stderr)
    print("passed" if findings.passed else "not passed: calls stay with torch")
    if findings.failed or not findings.passed:
        raise SystemExit(1)
