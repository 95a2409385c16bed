"""Writes fa_sdpa/meta/tables/sm90.json from the kernels' result files, so that no threshold in it is chosen by hand.

    python benchmarks/crossover_table.py            write the table
    python benchmarks/crossover_table.py --check    exit status 1 where it differs from what would be written

A rule for each measured head dim and mask: forward by the forward's time, training by forward and backward together.
Its threshold is the shortest measured length from which on we are at least as fast as torch's default at every longer
one. That is time on the device, at 16,384 tokens a call. A call has to keep the device busy for longer than the host
needs to launch it, so below FREE_SEQLEN it also has to have MIN_TOKENS tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from provenance import RESULTS, ROOT

TABLE = ROOT / "fa_sdpa/meta/tables/sm90.json"
FORWARD = ("sm90_forward_h100",)
BACKWARD = tuple(
    name for name in ("sm90_backward_h100", "sm90_backward_breadth_h100") if (RESULTS / f"{name}.json").exists()
)
FREE_SEQLEN, MIN_TOKENS = 2048, 8192


class Cell(NamedTuple):
    head_dim: int
    is_causal: bool
    seqlen: int


def cells(names: Iterable[str]) -> dict[Cell, tuple[float, float]]:
    """Time of ours and of torch's default, in units of a forward's flops, where head dims and head counts are alike."""
    times = {}
    for name in names:
        for row in json.loads((RESULTS / f"{name}.json").read_text())["results"]:
            alike = row["head_dim"] == row["head_dim_v"] and row["heads"] == row["heads_kv"]
            if alike and row["seqlen"] * row["batch"] == 16384 and row.get("unit", "TFLOP/s") == "TFLOP/s":
                times[Cell(row["head_dim"], row["is_causal"], row["seqlen"])] = 1 / row["ours"], 1 / row["torch"]
    return times


def rules(direction: str, times: dict[Cell, tuple[float, float]]) -> list[dict[str, Any]]:
    """One rule for each head dim and mask; none where we are behind at the longest length."""
    found = []
    for head_dim, is_causal in sorted({cell[:2] for cell in times}):
        threshold = None
        for cell in sorted((cell for cell in times if cell[:2] == (head_dim, is_causal)), reverse=True):
            if times[cell][0] > times[cell][1]:
                break
            threshold = cell.seqlen
        if threshold is not None:
            steps = [[1, max(threshold, FREE_SEQLEN)]]
            steps += [[MIN_TOKENS // s, s] for s in (1024, 512) if threshold <= s]
            rule = {"direction": direction, "head_dim": [head_dim] * 2, "is_causal": is_causal, "min_seqlen": steps}
            found.append(rule)
    return found


def table() -> str:
    forward, backward = cells(FORWARD), cells(BACKWARD)
    training = {
        cell: tuple(f + 2.5 * b for f, b in zip(forward[cell], backward[cell], strict=True))
        for cell in forward.keys() & backward.keys()
    }
    provenance = [json.loads((RESULTS / f"{name}.json").read_text())["provenance"] for name in (*FORWARD, *BACKWARD)]
    files = ", ".join(
        f"{name}.json ({about['commit'][:7]})" for name, about in zip((*FORWARD, *BACKWARD), provenance, strict=True)
    )
    about = {
        "source": f"this library's kernels against torch's default backend: benchmarks/results/{files}",
        **{name: provenance[0][name] for name in ("device", "torch", "cudnn", "date")},
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
    }
    listed = [*rules("forward", forward), *rules("training", training)]  # type: ignore[arg-type]
    lines = ",\n    ".join(json.dumps(rule) for rule in listed)
    head = json.dumps({"schema": 1, "arch": 90, "provenance": about}, indent=2, ensure_ascii=False)
    return f'{head[:-2]},\n  "rules": [\n    {lines}\n  ]\n}}\n'


def main() -> None:
    if "--check" in sys.argv[1:]:
        sys.exit(TABLE.read_text() != table())
    TABLE.write_text(table())


if __name__ == "__main__":
    main()
