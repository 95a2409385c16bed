"""Runs examples/llama.py twice, without and with fa_sdpa, and compares: `make demo`.

    python examples/demo.py [--policy P] [arguments of llama.py …]

Exit status 1 where the losses differ by more than the tolerance or no call was routed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LLAMA = Path(__file__).with_name("llama.py")
# The largest relative difference of a loss to expect over some hundred steps: attention that rounds otherwise makes
# other weights, and every training step widens the gap.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}


def run(title: str, command: list[str | Path]) -> None:
    print(f"\n=== {title}: {' '.join(map(str, command))}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def compare(plain: dict[str, Any], routed: dict[str, Any], counts: dict[str, Any]) -> list[str]:
    """Prints what the two runs have in common; returns what is wrong."""
    gaps = [abs(a - b) / abs(a) for a, b in zip(plain["losses"], routed["losses"], strict=True)]
    tolerance = TOLERANCE[plain["dtype"]]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    print(f"SDPA calls   {counts['routed']} routed to fa4, {counts['native']} left to torch")
    print(
        f"losses       {len(gaps)} steps, largest relative difference {gaps[worst]:.1e} at step {worst} "
        f"(tolerance {tolerance:.0e} in {plain['dtype']}); "
        f"last {plain['losses'][-1]:.5f} and {routed['losses'][-1]:.5f}"
    )
    texts = bytes.fromhex(plain["generated"]), bytes.fromhex(routed["generated"])
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), len(texts[0]))
    print(f"generated    {len(texts[0])} bytes, " + ("all the same" if texts[0] == texts[1] else f"same up to {same}"))
    print(f"time         {plain['seconds']:.1f} s without, {routed['seconds']:.1f} s with fa_sdpa")
    wrong = []
    if not all(gap <= tolerance for gap in gaps):  # so written, a NaN is too much
        wrong.append("the losses differ by more than the tolerance")
    if not counts["routed"]:
        wrong.append("no SDPA call was routed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="always", help='"auto" leaves a CPU to torch (default: %(default)s)')
    args, llama = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, routed, counts = (Path(folder, f"{name}.json") for name in ("plain", "routed", "counts"))
        run("without fa_sdpa", [LLAMA, *llama, "--json", plain])
        with_us = ["-m", "fa_sdpa", "run", "--policy", args.policy, "--json", counts]
        run("with fa_sdpa", [*with_us, LLAMA, *llama, "--json", routed])
        print("\n=== compared")
        wrong = compare(*(json.loads(file.read_text()) for file in (plain, routed, counts)))
    if wrong:
        sys.exit("demo failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
