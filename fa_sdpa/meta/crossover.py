"""Crossover tables: where fa4 is faster than torch's own choice, by arch.

A table is a JSON file in this package's ``tables/`` folder, or one of the user's, which ``qualify`` writes::

    {"schema": 4, "arch": 90, "device": null, "kernels": null, "num_sms": 132,
     "provenance": {"source": …, "date": …},
     "rules": [
       {"direction": "forward", "head_dim": [64, 64], "head_dim_v": [64, 64], "is_causal": true, "grouped": null,
        "fa4":    {"host_us": 25.0, "launch_us": 3.1, "tile_us": 1.2, "tflops": 610.0, "rows": 128, "keys": 128,
                   "waves": "even", "backward": "by queries", "gbs": 4100.0, "ragged": 0.0},
        "small":  null,
        "native": {"host_us": 16.0, "launch_us": 5.0, "tile_us": 1.9, "tflops": 450.0, "rows": 128, "keys": 64,
                   "waves": "last", "backward": "by queries", "gbs": null, "ragged": 0.1},
        "error": 0.03, "margin": 0.04, "least": [128, 128, 2048], "measured": [[1, 16, 16, 128, 128, 4.7, 7.0], …]},
       {"direction": "training", "head_dim": [8, 64], "is_causal": false, "min_seqlen": [[1, 2048], [8, 1024]]}]}

A rule speaks for the calls of its direction, head dims (closed ranges; head_dim_v as head_dim where it is not given),
causality and grouping (whether several query heads share one of key/value; null: either), with the ``mask`` "bool" or
"float", or without one where it says nothing of that. The first one that fits a call decides, by a model of time or by
thresholds:

- **fa4, native**: each side's time by a few figures. A tile is ``rows`` query rows of a head, and takes its keys by
  ``keys`` at a time; ``waves`` are tiles over SMs, at least 1, and go "even" (any fraction), "whole" (rounded up) or
  "last" (likewise, and in a causal call the longest tiles run last). On the device a call takes launch_us + waves ·
  tile_us + flops / tflops + bytes / gbs, where the flops are those of whole tiles, and a causal call takes at least as
  long as its longest tile; the bytes are those of query, key, value and the like, and null is no time for them. The
  flops take ``ragged`` longer, as a share, where the keys are more than 128 and no
  multiple of it. A
  ``backward`` that is cut "by keys" has its flops in tiles of ``rows`` keys of a key/value head, and takes the query
  rows by ``keys`` at a time. ``small``, if not null, is fa4's curve for calls that its kernels serve with their
  smallest tile (``kernels.takes_small_tile``). In eager mode a call takes that or host_us, whichever is longer. fa4 is
  taken where it is predicted to be faster by ``margin`` on the device, and no slower in eager mode. ``error`` is the
  standard deviation of measured over predicted ratios, ``least`` what was measured least of lengths of query and of key
  and of query rows (batch · heads · length), below which nothing is predicted, and ``measured`` what the figures were
  fitted to: batch, heads, heads_kv, seqlen_q, seqlen_k, µs on the device of fa4 and of torch.
- **min_seqlen**: (batch, seqlen) pairs in rising order of batch; the last one whose batch the call reaches gives the
  length from which both of the call's sequences must be on.

What can run at all is the kernels' business.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .spec import AttentionSpec

SCHEMA = 4
Direction = Literal["forward", "training"]
ROWS = (64, 128, 192)  # of a tile, that are tried
KEYS = (1, 64, 128)  # at a time, likewise
WHOLE = 128  # keys, of whose multiples a length is not ragged
Mask = Literal["none", "bool", "float"]
Waves = Literal["even", "whole", "last"]
Backward = Literal["by queries", "by keys"]
FORWARDS = {"forward": 1.0, "training": 3.5}  # flops, in those of a forward
LONGEST = 1 << 17  # no threshold is looked for beyond
IsSmall = Callable[[AttentionSpec], bool]  # whether fa4's kernels serve a call with their smallest tile


class Curve(NamedTuple):
    """One side's time, see above."""

    host_us: float
    launch_us: float
    tile_us: float
    tflops: float
    rows: int = 128
    keys: int = 1
    waves: Waves = "even"
    backward: Backward = "by queries"
    gbs: float | None = None
    ragged: float = 0.0

    def device_us(self, spec: AttentionSpec, direction: Direction, num_sms: int) -> float:
        """What a call takes on the device."""
        waves, flops = work(spec, direction, num_sms, self.rows, self.keys, self.waves, self.backward)
        memory = num_bytes(spec, direction) / (self.gbs * 1e3) if self.gbs else 0.0
        math_us = flops / (self.tflops * 1e6) * (1.0 + self.ragged * is_ragged(spec))
        return self.launch_us + waves * self.tile_us + math_us + memory


class Prediction(NamedTuple):
    """µs of one call."""

    fa4_us: float
    native_us: float
    fa4_eager_us: float
    native_eager_us: float

    @property
    def ratio(self) -> float:
        """torch's time over fa4's, on the device: above 1 fa4 is faster."""
        return self.native_us / self.fa4_us

    @property
    def ratio_eager(self) -> float:
        return self.native_eager_us / self.fa4_eager_us


class Measured(NamedTuple):
    """One measured cell, in µs on the device."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    fa4_us: float
    native_us: float

    def __str__(self) -> str:
        sizes = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        return f"b{self.batch} h{self.heads} {sizes} {self.native_us / self.fa4_us:.2f}×"


class Rule(NamedTuple):
    """What decides the calls of one direction, range of head dims and causality: thresholds, or a model of time."""

    direction: Direction
    head_dim: tuple[int, int]
    is_causal: bool
    min_seqlen: tuple[tuple[int, int], ...] = ()  # (batch, seqlen), batches rising
    head_dim_v: tuple[int, int] | None = None  # None: as head_dim
    grouped: bool | None = None
    fa4: Curve | None = None
    small: Curve | None = None  # fa4's of small tiles
    native: Curve | None = None
    error: float = 0.0
    margin: float = 0.0
    least: tuple[int, int, int] = (1, 1, 1)  # seqlen_q, seqlen_k, batch · heads · seqlen_q
    measured: tuple[Measured, ...] = ()
    mask: Mask = "none"

    def covers(
        self, direction: Direction, head_dim: int, head_dim_v: int, is_causal: bool, grouped: bool, mask: Mask
    ) -> bool:
        low, high = self.head_dim
        low_v, high_v = self.head_dim_v or self.head_dim
        return (
            self.direction == direction
            and self.is_causal == is_causal
            and low <= head_dim <= high
            and low_v <= head_dim_v <= high_v
            and self.grouped in (None, grouped)
            and self.mask == mask
        )

    def predict(self, spec: AttentionSpec, num_sms: int, is_small: bool = False) -> Prediction | None:
        """The times of a call whose sizes are known, by a small tile or not; None for a rule of thresholds."""
        if self.fa4 is None or self.native is None:
            return None
        curve = self.small if is_small and self.small else self.fa4
        fa4 = curve.device_us(spec, self.direction, num_sms)
        native = self.native.device_us(spec, self.direction, num_sms)
        return Prediction(fa4, native, max(fa4, curve.host_us), max(native, self.native.host_us))

    def takes(self, prediction: Prediction) -> bool:
        """Whether fa4 is to run a call with these times."""
        return prediction.ratio >= 1.0 + self.margin and prediction.ratio_eager >= 1.0

    def threshold(self, batch: int) -> int:
        """The shortest sequence that a rule of thresholds routes at this batch size."""
        seqlen = self.min_seqlen[0][1]
        for at_least, length in self.min_seqlen[1:]:
            if batch >= at_least:
                seqlen = length
        return seqlen

    def shortest(self, spec: AttentionSpec, num_sms: int, is_small: IsSmall = lambda spec: False) -> int | None:
        """The length from which on self-attention like ``spec`` is predicted to be faster at every length; None if
        there is none. ``is_small``: see predict."""
        found, seqlen = None, LONGEST
        while seqlen >= max(self.least[:2]) and spec.batch * spec.num_heads * seqlen >= self.least[2]:
            asked = spec._replace(seqlen_q=seqlen, seqlen_k=seqlen)
            prediction = self.predict(asked, num_sms, is_small(asked))
            if prediction is None or not self.takes(prediction):
                break
            found, seqlen = seqlen, seqlen * 7 // 8 if seqlen > 256 else seqlen - 16
        return found

    def nearest(self, spec: AttentionSpec, count: int = 2) -> list[Measured]:
        """The measured cells most like a call: by tiles and by keys."""

        def distance(cell: Measured) -> float:
            rows = cell.batch * cell.heads * cell.seqlen_q
            return abs(math.log(rows / max(rows_of(spec), 1))) + abs(math.log(cell.seqlen_k / max(spec.seqlen_k, 1)))

        return sorted(self.measured, key=distance)[:count]


def rows_of(spec: AttentionSpec) -> int:
    """Query rows of a call."""
    return spec.batch * spec.num_heads * spec.seqlen_q


def is_ragged(spec: AttentionSpec) -> bool:
    """Whether the keys are some blocks and a part of one."""
    return spec.seqlen_k > WHOLE and spec.seqlen_k % WHOLE != 0


def num_bytes(spec: AttentionSpec, direction: Direction) -> float:
    """Bytes of query, key, value and out, in training of what the backward reads and writes of their kind as well."""
    of_queries = spec.batch * spec.num_heads * spec.seqlen_q
    of_keys = spec.batch * spec.num_heads_kv * spec.seqlen_k
    return 2 * (of_queries + of_keys) * (spec.head_dim + spec.head_dim_v) * FORWARDS[direction]


def work(
    spec: AttentionSpec, direction: Direction, num_sms: int, rows: int, keys: int, kind: Waves, backward: Backward
) -> tuple[float, float]:
    """(waves, flops) of a call as Curve's formula has them: the flops are what all SMs could make in the time that the
    tiles take them, those that idle while the last tiles run included."""
    q, k, group = spec.seqlen_q, spec.seqlen_k, spec.num_heads / spec.num_heads_kv
    per_pair = 2 * (spec.head_dim + spec.head_dim_v) * num_sms * rows
    waves = _waves(spec.batch * spec.num_heads * -(-q // rows), num_sms, kind)
    if spec.is_causal:
        seen = [-(-min(last, q, k) // keys) * keys for last in range(rows, q + rows, rows)]
    else:
        seen = [-(-k // keys) * keys]
    in_queries = _busy(waves, math.fsum(seen) / len(seen), max(seen), kind) * per_pair
    if direction == "forward" or backward == "by queries":
        return waves, in_queries * FORWARDS[direction]
    of_keys = _waves(spec.batch * spec.num_heads_kv * -(-k // rows), num_sms, kind)
    whole = -(-q // keys) * keys
    seeing = [whole]
    if spec.is_causal:
        seeing = [whole - first // keys * keys if first < q else 0 for first in range(0, k, rows)]
    in_keys = _busy(of_keys, math.fsum(seeing) / len(seeing), max(seeing), kind) * group * per_pair
    return waves, in_queries + (FORWARDS[direction] - 1.0) * in_keys


def _waves(tiles: int, num_sms: int, kind: Waves) -> float:
    waves = max(tiles / num_sms, 1.0)
    return waves if kind == "even" else math.ceil(waves)


def _busy(waves: float, mean: float, longest: float, kind: Waves) -> float:
    """What an SM has to do, of whose tiles one has ``mean`` on average."""
    return (waves - 1) * mean + longest if kind == "last" else max(waves * mean, longest)


class Crossover(NamedTuple):
    """A table and where its numbers come from."""

    arch: int  # compute capability × 10; 0 is the CPU
    source: str  # one line: what measured it, and when
    rules: tuple[Rule, ...]
    num_sms: int = 132  # of the device that was measured
    device: str | None = None  # the only one that it speaks for; None: any of the arch
    kernels: str | None = None  # digest of the kernels that it speaks for; None: any

    def find(
        self,
        direction: Direction,
        head_dim: int,
        head_dim_v: int,
        is_causal: bool,
        grouped: bool = False,
        mask: Mask = "none",
    ) -> Rule | None:
        for rule in self.rules:
            if rule.covers(direction, head_dim, head_dim_v, is_causal, grouped, mask):
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
        device, digest = table.get("device"), table.get("kernels")
        return cls(
            int(table["arch"]),
            str(table["provenance"]["source"]),
            tuple(_rule(entry) for entry in table["rules"]),
            int(table.get("num_sms", 132)),
            None if device is None else str(device),
            None if digest is None else str(digest),
        )


def _rule(entry: dict[str, Any]) -> Rule:
    """A rule from JSON; ValueError if it says nothing or contradicts itself."""
    steps = tuple((int(batch), int(seqlen)) for batch, seqlen in entry.get("min_seqlen", ()))
    fa4, small, native = (_curve(**entry[side]) if entry.get(side) else None for side in ("fa4", "small", "native"))
    thresholds_rise = all(a[0] < b[0] for a, b in zip(steps, steps[1:], strict=False))
    rates = all(
        curve.tflops > 0
        and min(curve[:4]) >= 0
        and min(curve.rows, curve.keys) > 0
        and (curve.gbs is None or curve.gbs > 0)
        for curve in (fa4, small, native)
        if curve
    )
    is_model = fa4 is not None and native is not None
    mask = entry.get("mask", "none")
    if (
        mask not in get_args(Mask)
        or entry["direction"] not in FORWARDS
        or bool(steps) == is_model
        or not thresholds_rise
        or not rates
    ):
        raise ValueError(f"bad rule {dict(entry, measured=...)}")
    low, high = entry["head_dim"]
    v = entry.get("head_dim_v")
    grouped = entry.get("grouped")
    least_q, least_k, least_rows = entry.get("least", (1, 1, 1))
    return Rule(
        entry["direction"],
        (int(low), int(high)),
        bool(entry["is_causal"]),
        steps,
        None if v is None else (int(v[0]), int(v[1])),
        None if grouped is None else bool(grouped),
        fa4,
        small,
        native,
        error=float(entry.get("error", 0.0)),
        margin=float(entry.get("margin", 0.0)),
        least=(int(least_q), int(least_k), int(least_rows)),
        measured=tuple(Measured(*map(int, cell[:5]), *map(float, cell[5:])) for cell in entry.get("measured", ())),
        mask=mask,
    )


def _curve(rows: int, keys: int, waves: Waves, backward: Backward, gbs: float | None, **figures: float) -> Curve:
    for name, value, known in (("waves", waves, get_args(Waves)), ("backward", backward, get_args(Backward))):
        if value not in known:
            raise ValueError(f"{name} {value!r}, not one of {', '.join(known)}")
    known_figures = {name: float(value) for name, value in figures.items()}
    rate = None if gbs is None else float(gbs)
    return Curve(**known_figures, gbs=rate, rows=int(rows), keys=int(keys), waves=waves, backward=backward)


def to_json(table: Crossover, provenance: dict[str, Any]) -> str:
    """The file that ``Crossover.load`` reads; ``provenance`` has ``source`` at least."""
    about = {"schema": SCHEMA, "arch": table.arch, "device": table.device, "kernels": table.kernels}
    head = json.dumps(about | {"num_sms": table.num_sms, "provenance": provenance}, indent=2, ensure_ascii=False)
    lines = ",\n    ".join(json.dumps(_entry(rule)) for rule in table.rules)
    return f'{head[:-2]},\n  "rules": [\n    {lines}\n  ]\n}}\n'


def _entry(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {name: getattr(rule, name) for name in ("direction", "head_dim", "head_dim_v")}
    entry |= {"is_causal": rule.is_causal, "grouped": rule.grouped}
    if rule.mask != "none":
        entry["mask"] = rule.mask
    if rule.fa4 is None or rule.native is None:
        return entry | {"min_seqlen": rule.min_seqlen}
    entry |= {"fa4": rule.fa4._asdict(), "small": rule.small and rule.small._asdict(), "native": rule.native._asdict()}
    return entry | {name: getattr(rule, name) for name in ("error", "margin", "least", "measured")}


@functools.cache
def shipped(arch: int) -> Crossover | None:
    """The table that comes with this package for an arch, None where nobody has measured."""
    path = Path(__file__).parent / "tables" / f"sm{arch}.json"
    return Crossover.load(path) if path.exists() else None
