"""The SM90 backward in torch's deterministic mode on one GPU: whether it repeats bit for bit, and what that costs.

    python benchmarks/sm90_deterministic.py --out benchmarks/results/sm90_deterministic_h100.json

Every cell: gradients in deterministic mode, `--repeats` times over other contents of the memory that the caching
allocator hands out, must not differ in a bit; then its time over the default mode's, in turns, as sm90_backward.py
measures (random bf16 data, (B, S, H, D) memory seen as (B, H, S, D), 16,384 tokens). SMALL are shapes with unlike
lengths, GQA and few tiles, for `--small-repeats` repetitions and no time. ``--list-keys`` prints the kernels that a
bundle must hold. Exit status 1 if a bit differs or a cell takes more than LIMIT times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import backward_cases  # noqa: E402
from forward_cases import Case, inputs  # noqa: E402
from provenance import save  # noqa: E402
from sm90_backward import ours  # noqa: E402
from sm90_forward import bench_ms, square  # noqa: E402

from fa_sdpa.meta.spec import Options  # noqa: E402

LIMIT = 1.25
CELLS = [
    *(square(s, 128, c) for s in (512, 2048, 8192, 16384) for c in (False, True)),
    *(square(s, 64, c) for s in (512, 1024, 4096) for c in (False, True)),
    *(square(8192, 128, True, heads=heads) for heads in ("32/8", "28/4")),
    *(square(4096, d, c) for d in (192, 256) for c in (False, True)),
]
SMALL = [
    Case("bf16", d, d, batch, heads, heads_kv, seqlen_q, seqlen_k, Options(is_causal))
    for batch, heads, heads_kv, seqlen_q, seqlen_k, d, is_causal in (
        (2, 8, 8, 700, 700, 128, True),
        (1, 28, 4, 500, 900, 128, False),
        (1, 16, 4, 2048, 2048, 64, True),
        (1, 4, 2, 900, 900, 256, True),
        (1, 4, 4, 900, 300, 80, True),
        (2, 4, 2, 640, 640, 192, False),
    )
]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def prepared(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """The backward of a case."""
    tensors = list(inputs(case)[:3])
    size = case.batch, case.seqlen_q, case.heads, case.head_dim_v
    dout = torch.randn(size, device="cuda", dtype=tensors[0].dtype).transpose(1, 2)
    return ours(tensors, dout, case.options.is_causal)


def differing(run: Callable[[], tuple[Tensor, ...]], repeats: int) -> int:
    """In how many of so many repetitions a bit differs from the first time."""
    with deterministic():
        first = run()
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(repeats):
            again = run()
            count += torch.stack([(x != y).any() for x, y in zip(again, first, strict=True)]).any()
            for x in again:
                x.fill_(torch.nan)
    return int(count)


def times(run: Callable[[], tuple[Tensor, ...]]) -> dict[str, float]:
    """ms in both modes."""

    def deterministically() -> tuple[Tensor, ...]:
        with deterministic():
            return run()

    return bench_ms({"default": run, "deterministic": deterministically}, [()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small-repeats", type=int, default=1000)
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    args = parser.parse_args()
    if args.list_keys:
        drawn = [backward_cases.Drawn(case, "as_out", True) for case in (*SMALL, *(cell.case for cell in CELLS))]
        keys = set(backward_cases.keys_of(drawn))
        keys |= {dataclasses.replace(key, deterministic=True) for key in keys if key.direction == "backward"}
        return print("\n".join(sorted(key.name for key in keys)))
    rows: list[dict[str, Any]] = []
    about = {"limit": LIMIT, "protocol": " ".join((__doc__ or "").split("\n\n")[2].split())}
    for case in SMALL:
        rows.append({"cell": str(case), "repeats": args.small_repeats})
        rows[-1]["differing"] = differing(prepared(case), args.small_repeats)
        print(f"{case}: {rows[-1]['differing']} of {args.small_repeats} differ", flush=True)
    for cell in CELLS:
        run = prepared(cell.case)
        ms = times(run)
        row = {"cell": str(cell), "repeats": args.repeats, "differing": differing(run, args.repeats)}
        row |= {f"{name}_ms": round(value, 4) for name, value in ms.items()}
        rows.append(row | {"ratio": round(ms["deterministic"] / ms["default"], 3)})
        print(f"{cell}: {rows[-1]['ratio']}, {row['differing']} of {args.repeats} differ", flush=True)
        if args.out:
            save(args.out, rows, **about)
    slowest = max(row["ratio"] for row in rows if "ratio" in row)
    print(f"slowest: {slowest}")
    sys.exit(1 if slowest > LIMIT or any(row["differing"] for row in rows) else 0)


if __name__ == "__main__":
    main()
