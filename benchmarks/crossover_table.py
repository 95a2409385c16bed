"""Writes fa_sdpa/meta/tables/sm90.json from result files, so that no figure in it is chosen by hand.

    python benchmarks/crossover_table.py            write the table
    python benchmarks/crossover_table.py --check    exit status 1 where it differs from what would be written

Kinds of calls (direction, head dims, mask) that qualify_h100.json has measured, the report.json of `python -m fa_sdpa
qualify` on an H100, get a model of time fitted to it; grouped_training_h100.json replaces, and adds to, its cells of
grouped heads whose backward is cut into other parts since. So do the others whose forward was timed in enough cells by
sm90_forward.py; their host's time is that of host_overhead_h100.json. The rest get thresholds: the shortest measured
length from which on we are at least as fast as torch's default at every longer one, training by forward and backward
together. That is time on the device, at 16,384 tokens a call. A call has to keep the device busy for longer than the
host needs to launch it, so below FREE_SEQLEN it also has to have MIN_TOKENS tokens. Calls with an attn_mask have
thresholds by the masks of sm90_masks.py, boolean or floating: the one we do worst at decides, prepared in every call,
and by MARGIN. Preparing takes as long with fewer tokens: where that is too long with MIN_TOKENS, all 16,384 are asked
for.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from forward_cases import H100
from provenance import RESULTS, ROOT  # first: it makes this checkout importable
from sm90_forward import TOKENS
from sm90_masks import MASKS

from fa_sdpa import kernels
from fa_sdpa.bench.cells import Cell
from fa_sdpa.meta import fit
from fa_sdpa.meta.crossover import Crossover, Direction, Mask, Rule, to_json
from fa_sdpa.qualify.grid import timed

TABLE = ROOT / "fa_sdpa/meta/tables/sm90.json"
QUALIFY, HOST = ("qualify_h100", "grouped_training_h100"), "host_overhead_h100"  # later cells replace earlier ones
FORWARD, BACKWARD = ("sm90_forward_h100",), ("sm90_backward_h100",)
MASKED: dict[Direction, str] = {"forward": "sm90_masks_h100", "training": "sm90_masks_training_h100"}
FREE_SEQLEN, MIN_TOKENS = 2048, 8192
MARGIN = 1.03  # by which two times of calls with a mask have to differ to be told apart
NUM_SMS = 132


class Kind(NamedTuple):
    """The calls that a rule speaks for."""

    direction: Direction
    head_dim: int
    head_dim_v: int
    is_causal: bool


def content(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(names: Iterable[str]) -> list[dict[str, Any]]:
    return [row for name in names for row in (content(name) or {"results": []})["results"]]


# ---- models of time --------------------------------------------------------------------------------------------------


def forward_cells() -> list[fit.Timed]:
    """What sm90_forward.py has timed, with the host's times of host_overhead_h100.json."""
    host = {
        row["state"]: row["fastest_us"]
        for row in rows((HOST,))
        if row["call"] == "SDPA" and not row["grad"] and row["state"] in ("routed", "plain torch")
    }
    cells = []
    for row in rows(FORWARD):
        if row["group"] == "decode" or not row["ours"] or not row["torch"]:
            continue
        cell = Cell(*(row[name] for name in Cell._fields[:8]))
        ours, theirs = (
            row[name] if row["unit"] == "µs" else cell.flops / row[name] / 1e6 for name in ("ours", "torch")
        )
        cells.append(fit.Timed("forward", cell.spec("forward"), ours, theirs, host["routed"], host["plain torch"]))
    return cells


def kind_of(cell: fit.Timed) -> Kind:
    return Kind(cell.direction, cell.spec.head_dim, cell.spec.head_dim_v, cell.spec.is_causal)


def models() -> list[Rule]:
    """A rule for each kind that was measured enough: by ``qualify`` if that did."""
    cuts_of = kernels.cuts_on(H100, NUM_SMS)
    found = fit.rules(timed(rows(QUALIFY)), NUM_SMS, cuts_of)
    there = {kind_of_rule(rule) for rule in found}
    return found + fit.rules((cell for cell in forward_cells() if kind_of(cell) not in there), NUM_SMS, cuts_of)


def kind_of_rule(rule: Rule) -> Kind:
    return Kind(rule.direction, rule.head_dim[0], (rule.head_dim_v or rule.head_dim)[0], rule.is_causal)


# ---- thresholds ------------------------------------------------------------------------------------------------------


def times(names: Iterable[str]) -> dict[tuple[int, bool, int], tuple[float, float]]:
    """(head dim, is_causal, seqlen) → time of ours and of torch's default, in units of a forward's flops, where head
    dims and head counts are alike."""
    found = {}
    for row in rows(names):
        alike = row["head_dim"] == row["head_dim_v"] and row["heads"] == row["heads_kv"]
        if alike and row["seqlen"] * row["batch"] == 16384 and row.get("unit", "TFLOP/s") == "TFLOP/s":
            found[row["head_dim"], row["is_causal"], row["seqlen"]] = 1 / row["ours"], 1 / row["torch"]
    return found


def fewest_tokens(ours: float, theirs: float, once: float = 0.0, margin: float = 1.0) -> int | None:
    """With how many tokens, MIN_TOKENS or TOKENS, a call is faster than torch's; None with neither. The times are of
    TOKENS; ``once`` is the part of ours that is no shorter with fewer."""
    for tokens in (MIN_TOKENS, TOKENS):
        if ((ours - once) * tokens + once * TOKENS) * margin <= theirs * tokens:
            return tokens
    return None


def thresholds(direction: Direction, of: dict[tuple[int, bool, int], int | None]) -> list[Rule]:
    """One rule for each head dim and mask; none where we are behind at the longest length. ``of``: the fewest tokens
    of each length."""
    found = []
    for head_dim, is_causal in sorted({cell[:2] for cell in of}):
        steps: list[tuple[int, int]] = []
        for cell in sorted((cell for cell in of if cell[:2] == (head_dim, is_causal)), reverse=True):
            seqlen, tokens = cell[2], of[cell]
            if tokens is None:
                break
            batch = 1 if seqlen >= FREE_SEQLEN else tokens // seqlen
            steps = [step for step in steps if step[0] < batch] + [(batch, seqlen)]
        if steps:
            if steps[-1][1] < FREE_SEQLEN:
                steps[0] = 1, FREE_SEQLEN
            found.append(Rule(direction, (head_dim, head_dim), is_causal, tuple(steps)))
    return found


def masked() -> list[Rule]:
    """Rules for calls with an attn_mask."""
    found = []
    kinds: dict[Mask, tuple[str, ...]] = {"bool": ("bool",), "float": ("bf16", "fp16", "fp32")}
    for (direction, name), (mask, dtypes) in itertools.product(MASKED.items(), kinds.items()):
        most: dict[tuple[int, bool, int], int | None] = {}
        for row in rows((name,)):
            if MASKS[row["mask"]] in dtypes and row["torch"]:
                cell = row["head_dim"], False, row["seqlen"]
                fresh, kept = 1 / row["ours, fresh"], 1 / row["ours"]
                tokens = fewest_tokens(fresh, 1 / row["torch"], max(fresh - kept, 0.0), MARGIN)
                before = most.get(cell, MIN_TOKENS)
                most[cell] = None if tokens is None or before is None else max(tokens, before)
        found += [rule._replace(mask=mask) for rule in thresholds(direction, most)]
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def table() -> str:
    forward, backward = times(FORWARD), times(BACKWARD)
    training = {
        cell: (forward[cell][0] + 2.5 * backward[cell][0], forward[cell][1] + 2.5 * backward[cell][1])
        for cell in forward.keys() & backward.keys()
    }
    rules = models()
    there = {kind_of_rule(rule) for rule in rules}
    both: dict[Direction, dict[tuple[int, bool, int], tuple[float, float]]] = {"forward": forward, "training": training}
    rest = [
        rule
        for direction, of in both.items()
        for rule in thresholds(direction, {cell: fewest_tokens(*pair) for cell, pair in of.items()})
    ]
    rules += [rule for rule in rest if kind_of_rule(rule) not in there]
    rules += masked()
    files = (*QUALIFY, *FORWARD, *BACKWARD, *MASKED.values(), HOST)
    provenance = {name: about["provenance"] for name in files if (about := content(name))}
    sources = ", ".join(f"{name}.json ({about['commit'][:7]})" for name, about in provenance.items())
    newest = max(provenance.values(), key=lambda about: about["date"])
    about = {
        "source": f"this library's kernels against torch's default backend: benchmarks/results/{sources}",
        **{name: newest[name] for name in ("device", "torch", "cudnn", "date")},
        "protocol": " ".join((__doc__ or "").split("\n\n")[2].split()),
    }
    return to_json(Crossover(90, about["source"], tuple(rules), NUM_SMS), about)


def main() -> None:
    if "--check" in sys.argv[1:]:
        sys.exit(TABLE.read_text() != table())
    TABLE.write_text(table())


if __name__ == "__main__":
    main()
