"""Crossover tables: from which size on fa4 was measured faster than torch's own choice, by arch.

A table is a JSON file in this package's ``tables/`` folder, or one of the user's::

    {"schema": 1, "arch": 90, "provenance": {"source": …, "device": …, "torch": …, "date": …},
     "rules": [{"direction": "forward", "head_dim": [1, 64], "is_causal": true, "min_seqlen": [[1, 2048], [8, 4096]]}]}

A rule speaks for the calls whose head_dim and head_dim_v both lie in its closed range. ``min_seqlen`` lists
(batch, seqlen) pairs in rising order of batch: the last one whose batch the call reaches gives the length from which
both of the call's sequences must be on. Thresholds say what is faster; what can run at all is the kernels' business.
"""

from __future__ import annotations

import functools
import json
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

SCHEMA = 1
Direction = Literal["forward", "training"]


class Rule(NamedTuple):
    """Thresholds for one direction, range of head dims and causality."""

    direction: Direction
    head_dim: tuple[int, int]
    is_causal: bool
    min_seqlen: tuple[tuple[int, int], ...]  # (batch, seqlen), batches rising

    def threshold(self, batch: int) -> int:
        """The shortest sequence that is routed at this batch size."""
        seqlen = self.min_seqlen[0][1]
        for at_least, length in self.min_seqlen[1:]:
            if batch >= at_least:
                seqlen = length
        return seqlen


class Crossover(NamedTuple):
    """A table and where its numbers come from."""

    arch: int  # compute capability × 10; 0 is the CPU
    source: str  # one line: what measured it, and when
    rules: tuple[Rule, ...]

    def find(self, direction: Direction, head_dim: int, head_dim_v: int, is_causal: bool) -> Rule | None:
        for rule in self.rules:
            low, high = rule.head_dim
            covers = low <= min(head_dim, head_dim_v) and max(head_dim, head_dim_v) <= high
            if rule.direction == direction and rule.is_causal == is_causal and covers:
                return rule
        return None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Crossover:
        """Read a table. Raises ValueError, naming the file and what is wrong with it, if it can't be used."""
        try:
            return cls._from_json(json.loads(Path(path).read_text()))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"crossover table {path}: {error!r}") from error

    @classmethod
    def _from_json(cls, table: dict[str, Any]) -> Crossover:
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema {table['schema']}, this version reads {SCHEMA}")
        rules = []
        for entry in table["rules"]:
            low, high = entry["head_dim"]
            steps = tuple((int(batch), int(seqlen)) for batch, seqlen in entry["min_seqlen"])
            if entry["direction"] not in ("forward", "training") or not steps or list(steps) != sorted(steps):
                raise ValueError(f"bad rule {entry}")
            rules.append(Rule(entry["direction"], (int(low), int(high)), bool(entry["is_causal"]), steps))
        return cls(int(table["arch"]), str(table["provenance"]["source"]), tuple(rules))


@functools.cache
def shipped(arch: int) -> Crossover | None:
    """The table that comes with this package for an arch, None where nobody has measured."""
    path = Path(__file__).parent / "tables" / f"sm{arch}.json"
    return Crossover.load(path) if path.exists() else None
