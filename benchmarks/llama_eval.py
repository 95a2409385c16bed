"""A Llama of about 1B parameters under torch.no_grad(): examples/llama.py, eager and compiled, without and with us.

    python benchmarks/llama_eval.py --out benchmarks/results/llama_eval_h100.json

Four processes of the unchanged example: bf16, heads of 128, 4 sequences of 4096 tokens by default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import ROOT, save

LLAMA = ROOT / "examples" / "llama.py"
SHAPE = "--dtype bfloat16 --heads 16 --kv-heads 4 --head-dim 128"


def measure(args: argparse.Namespace, compiled: bool, routed: bool) -> dict[str, Any]:
    """Tokens per second and the losses of one process, and what happened to its SDPA calls."""
    shape = f"{SHAPE} --layers {args.layers} --batch {args.batch} --seqlen {args.seqlen}"
    with tempfile.TemporaryDirectory() as folder:
        result, counts = Path(folder, "result.json"), Path(folder, "counts.json")
        command: list[str | Path] = [LLAMA, *shape.split(), "--eval", str(args.batches), "--json", result]
        if compiled:
            command.append("--compile")
        if routed:
            command = ["-m", "fa_sdpa", "run", "--policy", args.policy, "--json", counts, *command]
        print("python", *command, flush=True)
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        row = {"mode": "compiled" if compiled else "eager", "fa_sdpa": routed, **json.loads(result.read_text())}
        return {**row, "calls": json.loads(counts.read_text())} if routed else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()

    rows = [measure(args, compiled, routed) for compiled in (False, True) for routed in (False, True)]
    shape = {name: getattr(args, name) for name in ("policy", "batches", "batch", "seqlen", "layers")}
    if args.out:
        save(args.out, rows, shape={**shape, "heads": 16, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"})

    print(f"\n{'':10}{'torch':>12}{'fa_sdpa':>12}  tokens/s    loss apart    routed    left to torch")
    failed = False
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        apart = max(abs(a - b) / abs(a) for a, b in zip(plain["losses"], ours["losses"], strict=True))
        calls = ours["calls"]
        failed |= not calls["routed"]
        print(
            f"{plain['mode']:10}{plain['tokens_per_second']:12,.0f}{ours['tokens_per_second']:12,.0f}"
            f"{apart:24.1e}{calls['routed']:10}{calls['native']:17}"
        )
    print("compiled calls count once a trace, and the decoder layers share one graph")
    if failed:
        sys.exit("no call was routed")


if __name__ == "__main__":
    main()
