"""Crossover tables: where fa4 is faster than torch's own choice, by arch.

A table is a JSON file in this package's ``tables/`` folder, or one of the user's, which ``qualify`` writes::

    {"schema": 5, "arch": 90, "device": null, "kernels": null, "num_sms": 132,
     "provenance": {"source": …, "date": …},
     "rules": [
       {"direction": "training", "head_dim": [64, 64], "head_dim_v": [64, 64], "is_causal": true,
        "fa4":    {"host_us": 200.0, "forward": {"0": {"launch_us": 3.1, "tile_us": 1.2, "tflops": 610.0}, "192": …},
                   "backward": {"launch_us": 20.0, "tile_us": 2.1, "tflops": 500.0, "gbs": 4100.0}},
        "native": {"host_us": 190.0, "forward": {"0": {"launch_us": 5.0, "tile_us": 1.9, "tflops": 450.0, …}},
                   "backward": {…, "row_gbs": 3000.0, "grouped_us": 7.0, "grouped_gbs": 2000.0}},
        "error": 0.06, "margin": 0.11, "least": [128, 128, 2048], "measured": [[1, 16, 16, 128, 128, 30.7, 37.0], …]},
       {"direction": "forward", "head_dim": [8, 64], "is_causal": false, "min_seqlen": [[1, 2048], [8, 1024]]}]}

A rule speaks for the calls of its direction, head dims (closed ranges; head_dim_v as head_dim where it is not given)
and causality, with the ``mask`` "bool" or "float", or without one where it says nothing of that. The first one that
fits a call decides, by a model of time or by thresholds:

- **fa4, native**: each side's time, of a forward and, in training, of its backward besides. How a call is cut into
  tiles decides what there is to do (`load`): fa4's as its kernels do it (``kernels.cuts``), torch's as if it always did
  so in one way (`torch_cuts`). What that takes is said by a few figures, a Curve; fa4's forward has one for each tile,
  by its query rows, and under "0" one for any other. In eager mode a call takes that or host_us, whichever is longer.
  fa4 is taken where it is predicted to be faster by ``margin`` on the device, by more far from what was measured
  (`Rule.margin_of`), and no slower in eager mode; there it is taken if also the host's time gains something
  (`Prediction.is_faster_in_eager_mode`), or where the host decides (`Prediction.host_decides`). ``error`` is the
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
import operator
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .spec import AttentionSpec

SCHEMA = 5
Direction = Literal["forward", "training"]
Pass = Literal["forward", "backward"]
WHOLE = 128  # keys, of whose multiples a length is not ragged
Mask = Literal["none", "bool", "float"]
BACKWARD = 2.5  # flops, in those of a forward
LONGEST = 1 << 17  # no threshold is looked for beyond
MOST_GBS = 1e5  # what is faster takes no time
HOST_GAIN = 1.1  # torch's time on the host over fa4's, from which on that alone is worth while …
HOST_MARGIN = 0.06  # … and by how much more than 1 it is to be where the device alone is worth while: hosts differ
REACH = 1.0  # distance to a measured cell at which a prediction's error is 1.4 times that of the fit
FADE = 0.12  # power of the number of keys with which errors fall
SIGMAS = 2.05  # of a normal distribution, beyond which two of 100 lie


class Cut(NamedTuple):
    """How one pass over a call is cut into tiles, each a CTA's work at a time."""

    rows: int  # of a tile: query rows, in a backward keys
    block: int  # what it takes at a time: keys, in a backward query rows
    heads: int  # that have tiles of their own
    parts: int = 1  # tiles that share the blocks of one
    longest_last: bool = False  # whether the longest tiles run in the last wave


class Cuts(NamedTuple):
    """How one side cuts a call."""

    forward: Cut
    backward: Cut


CutsOf = Callable[[AttentionSpec], Cuts]


class Load(NamedTuple):
    """What one pass over a call has to do. Times in µs are linear in it: see Curve."""

    launches: float  # 1
    waves: float  # tiles over SMs, rounded up
    mflops: float  # that all SMs could make in the time that the waves take them
    kilobytes: float  # of query, key, value and out
    ragged_mflops: float  # the same as above if the keys are some blocks of 128 and a part of one, else 0
    row_kilobytes: float  # of query and out, in a backward in whole blocks of rows
    grouped: float  # 1 if several query heads share a key/value head, else 0
    grouped_kilobytes: float  # then, of keys and values if each query head had its own


class Curve(NamedTuple):
    """Figures of one side's pass; None is no time for that."""

    launch_us: float
    tile_us: float  # of a wave of tiles, beside its flops
    tflops: float
    gbs: float | None = None  # of kilobytes
    ragged: float = 0.0  # how much longer flops take there, as a share
    row_gbs: float | None = None
    grouped_us: float = 0.0
    grouped_gbs: float | None = None

    @classmethod
    def of(cls, costs: Sequence[float]) -> Curve:
        """From what `costs` gives; rounded as figures are written."""
        launch, tile, per_mflop, per_kb, per_ragged, per_row_kb, grouped, per_grouped_kb = costs
        gbs, row_gbs, grouped_gbs = (
            round(1.0 / cost, 1) if cost * MOST_GBS > 1.0 else None for cost in (per_kb, per_row_kb, per_grouped_kb)
        )
        tflops, ragged = round(1.0 / per_mflop, 1), round(per_ragged / per_mflop, 4)
        return cls(round(launch, 3), round(tile, 4), tflops, gbs, ragged, row_gbs, round(grouped, 3), grouped_gbs)

    def costs(self) -> tuple[float, ...]:
        """µs for one of each that a Load has."""
        rates = self.gbs, self.row_gbs, self.grouped_gbs
        per_kb, per_row_kb, per_grouped_kb = (1.0 / gbs if gbs else 0.0 for gbs in rates)
        per_mflop = 1.0 / self.tflops
        rest = (self.ragged * per_mflop, per_row_kb, self.grouped_us, per_grouped_kb)
        return self.launch_us, self.tile_us, per_mflop, per_kb, *rest

    def device_us(self, load: Load) -> float:
        """What that takes on the device."""
        return math.fsum(map(operator.mul, self.costs(), load))


class Side(NamedTuple):
    """fa4's or torch's time."""

    host_us: float
    forward: tuple[tuple[int, Curve], ...]  # by query rows of a tile; 0: any other
    backward: Curve | None = None

    def device_us(self, spec: AttentionSpec, direction: Direction, cuts: Cuts, num_sms: int) -> float:
        """What a call takes on the device."""
        curves = dict(self.forward)
        curve = curves.get(cuts.forward.rows) or curves[0]
        forward_us = curve.device_us(load(spec, "forward", cuts.forward, num_sms))
        if direction == "forward" or self.backward is None:
            return forward_us
        return forward_us + self.backward.device_us(load(spec, "backward", cuts.backward, num_sms))


class Prediction(NamedTuple):
    """µs of one call, and by how much more than nothing fa4 is to be faster."""

    fa4_us: float
    native_us: float
    fa4_eager_us: float
    native_eager_us: float
    margin: float

    @property
    def ratio(self) -> float:
        """torch's time over fa4's, on the device: above 1 fa4 is faster."""
        return self.native_us / self.fa4_us

    @property
    def ratio_eager(self) -> float:
        return self.native_eager_us / self.fa4_eager_us

    @property
    def is_faster(self) -> bool:
        """Whether fa4 is to run the call in a graph."""
        return self.ratio >= 1.0 + self.margin and self.ratio_eager >= 1.0

    @property
    def is_faster_in_eager_mode(self) -> bool:
        """Whether it is to run it also where the host makes the call anew each time, by the device's time."""
        return self.is_faster and self.ratio_eager >= 1.0 + min(self.margin, HOST_MARGIN)

    @property
    def host_decides(self) -> bool:
        """Whether fa4 is to run the call where the host makes it anew each time, by what the host alone says: fa4 is
        done on the device, margin included, before the host can be, and costs the host less by HOST_GAIN. On the device
        it is then predicted to be no slower, by whatever margin."""
        is_free = self.fa4_us * (1.0 + self.margin) <= self.fa4_eager_us
        return is_free and self.ratio >= 1.0 and self.ratio_eager >= HOST_GAIN


class Measured(NamedTuple):
    """One measured cell, in µs on the device."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    fa4_us: float
    native_us: float

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.batch * self.heads * self.seqlen_q

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
    fa4: Side | None = None
    native: Side | None = None
    error: float = 0.0
    margin: float = 0.0
    least: tuple[int, int, int] = (1, 1, 1)  # seqlen_q, seqlen_k, batch · heads · seqlen_q
    measured: tuple[Measured, ...] = ()
    mask: Mask = "none"

    def is_of(self, head_dim: int) -> bool:
        """Whether it may cover calls with a query of this head dim."""
        return self.head_dim[0] <= head_dim <= self.head_dim[1]

    def covers(self, direction: Direction, head_dim: int, head_dim_v: int, is_causal: bool, mask: Mask) -> bool:
        low_v, high_v = self.head_dim_v or self.head_dim
        return (
            self.direction == direction
            and self.is_causal == is_causal
            and self.is_of(head_dim)
            and low_v <= head_dim_v <= high_v
            and self.mask == mask
        )

    def predict(self, spec: AttentionSpec, num_sms: int, cuts: Cuts) -> Prediction | None:
        """The times of a call whose sizes are known, which fa4 cuts like that; None for a rule of thresholds."""
        if self.fa4 is None or self.native is None:
            return None
        fa4 = self.fa4.device_us(spec, self.direction, cuts, num_sms)
        native = self.native.device_us(spec, self.direction, torch_cuts(spec), num_sms)
        eager = max(fa4, self.fa4.host_us), max(native, self.native.host_us)
        return Prediction(fa4, native, *eager, self.margin_of(spec))

    def margin_of(self, spec: AttentionSpec) -> float:
        """The margin for a call: more than the rule's where nothing like it was measured, and for short sequences.

        It grows with the distance to the nearest measured cell as √(1 + (distance / REACH)²). Ratios of 469 random
        calls on an H100 that the fit had not seen were off by 1.1 times ``error`` up to a distance of 0.5, by 1.5 times
        at 0.9 and 2.0 times beyond 1.1. What is larger than all that was measured counts as the largest: rates stay.
        And it falls with the number of keys to the power of FADE, from where most was measured on: all calls in eight
        parts, each predicted by the others, were off by 0.12 below 128 keys in training and 0.06 above 4096, by 0.09
        and 0.05 forward.
        """
        if not self.measured:
            return self.margin
        rows = min(rows_of(spec), max(cell.rows for cell in self.measured))
        keys = min(spec.seqlen_k, max(cell.seqlen_k for cell in self.measured))
        reach = min(distance(rows, keys, cell) for cell in self.measured) / REACH
        typical = math.fsum(math.log(cell.seqlen_k) for cell in self.measured) / len(self.measured)
        times = math.hypot(1.0, reach) * math.exp(FADE * (typical - math.log(max(keys, 1))))
        return (1.0 + self.margin) * math.exp(SIGMAS * self.error * (times - 1.0)) - 1.0

    def threshold(self, batch: int) -> int:
        """The shortest sequence that a rule of thresholds routes at this batch size."""
        seqlen = self.min_seqlen[0][1]
        for at_least, length in self.min_seqlen[1:]:
            if batch >= at_least:
                seqlen = length
        return seqlen

    def is_too_small(self, batch: int, heads: int, seqlen_q: int) -> bool:
        """Whether it leaves all calls with a query of this size to torch."""
        if self.fa4 is None:
            return seqlen_q < self.threshold(batch)
        return seqlen_q < self.least[0] or batch * heads * seqlen_q < self.least[2]

    def shortest(self, spec: AttentionSpec, num_sms: int, cuts_of: CutsOf) -> int | None:
        """The length from which on self-attention like ``spec`` is predicted to be faster at every length; None if
        there is none. ``cuts_of``: how fa4 cuts a call."""
        found, seqlen = None, LONGEST
        while seqlen >= max(self.least[:2]) and spec.batch * spec.num_heads * seqlen >= self.least[2]:
            asked = spec._replace(seqlen_q=seqlen, seqlen_k=seqlen)
            prediction = self.predict(asked, num_sms, cuts_of(asked))
            if prediction is None or not prediction.is_faster:
                break
            found, seqlen = seqlen, seqlen * 7 // 8 if seqlen > 256 else seqlen - 16
        return found

    def nearest(self, spec: AttentionSpec, count: int = 2) -> list[Measured]:
        """The measured cells most like a call."""
        return sorted(self.measured, key=functools.partial(distance, rows_of(spec), spec.seqlen_k))[:count]


def distance(rows: int, keys: int, cell: Measured) -> float:
    """How unlike a call of so many query rows in all, and keys, a measured cell is; 0.7 is twice as many of either."""
    return abs(math.log(cell.rows / max(rows, 1))) + abs(math.log(cell.seqlen_k / max(keys, 1)))


def rows_of(spec: AttentionSpec) -> int:
    """Query rows of a call."""
    return spec.batch * spec.num_heads * spec.seqlen_q


def is_ragged(spec: AttentionSpec) -> bool:
    """Whether the keys are some blocks and a part of one."""
    return spec.seqlen_k > WHOLE and spec.seqlen_k % WHOLE != 0


def torch_cuts(spec: AttentionSpec) -> Cuts:
    """How torch cuts a call; of the cuts that were tried, its measured times are nearest to what these make of them."""
    heads = spec.num_heads
    return Cuts(Cut(128, 128, heads, longest_last=True), Cut(64, 128, heads, longest_last=True))


def load(spec: AttentionSpec, of: Pass, cut: Cut, num_sms: int) -> Load:
    """What a pass over a call has to do, cut like that."""
    q, k, heads, heads_kv = spec.seqlen_q, spec.seqlen_k, spec.num_heads, spec.num_heads_kv
    if of == "forward":
        visited = _blocks_of_queries(q, k, cut, spec.is_causal)
        factor, pairs_of = 1.0, 1.0
    else:
        visited = _blocks_of_keys(q, k, cut, spec.is_causal)
        factor, pairs_of = BACKWARD, heads / cut.heads  # a tile of keys sees the rows of a group of heads
    waves = -(-spec.batch * cut.heads * cut.parts * len(visited) // num_sms)
    mean, longest = math.fsum(visited) / len(visited), max(visited)
    blocks = (waves - 1) * mean + longest if cut.longest_last else max(waves * mean, longest)
    width = spec.head_dim + spec.head_dim_v
    mflops = factor * pairs_of * blocks * 2 * width * cut.rows * cut.block * num_sms / 1e6
    kb = 2 * width * spec.batch / 1e3  # of one row of 16-bit numbers of each tensor
    grouped = float(heads != heads_kv)
    return Load(
        1.0,
        float(waves),
        mflops,
        kb * (heads * q + heads_kv * k),
        mflops * is_ragged(spec),
        kb * heads * (q if of == "forward" else -(-q // cut.block) * cut.block),
        grouped,
        grouped * kb * heads * k,
    )


def _blocks_of_queries(q: int, k: int, cut: Cut, is_causal: bool) -> list[int]:
    """Blocks of keys that each tile of a head's query rows visits."""
    ends = [min(last, q, k) if is_causal else k for last in range(cut.rows, q + cut.rows, cut.rows)]
    return [-(-end // (cut.block * cut.parts)) for end in ends]


def _blocks_of_keys(q: int, k: int, cut: Cut, is_causal: bool) -> list[int]:
    """Blocks of query rows that each tile of a head's keys visits."""
    whole = -(-q // cut.block)
    firsts = range(0, k, cut.rows)
    return [(whole - first // cut.block if first < q else 0) if is_causal else whole for first in firsts]


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
        mask: Mask = "none",
    ) -> Rule | None:
        for rule in self.rules:
            if rule.covers(direction, head_dim, head_dim_v, is_causal, mask):
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
    fa4, native = (_side(**entry[name]) if entry.get(name) else None for name in ("fa4", "native"))
    thresholds_rise = all(a[0] < b[0] for a, b in zip(steps, steps[1:], strict=False))
    is_model = fa4 is not None and native is not None
    lacks_backward = entry["direction"] != "forward" and not all(side.backward for side in (fa4, native) if side)
    mask = entry.get("mask", "none")
    if (
        mask not in get_args(Mask)
        or entry["direction"] not in get_args(Direction)
        or bool(steps) == is_model
        or not thresholds_rise
        or lacks_backward
    ):
        raise ValueError(f"bad rule {dict(entry, measured=...)}")
    low, high = entry["head_dim"]
    v = entry.get("head_dim_v")
    least_q, least_k, least_rows = entry.get("least", (1, 1, 1))
    return Rule(
        entry["direction"],
        (int(low), int(high)),
        bool(entry["is_causal"]),
        steps,
        None if v is None else (int(v[0]), int(v[1])),
        fa4,
        native,
        error=float(entry.get("error", 0.0)),
        margin=float(entry.get("margin", 0.0)),
        least=(int(least_q), int(least_k), int(least_rows)),
        measured=tuple(Measured(*map(int, cell[:5]), *map(float, cell[5:])) for cell in entry.get("measured", ())),
        mask=mask,
    )


def _side(host_us: float, forward: dict[str, Any], backward: dict[str, Any] | None = None) -> Side:
    curves = tuple((int(rows), _curve(**figures)) for rows, figures in forward.items())
    if 0 not in dict(curves) or host_us < 0:
        raise ValueError(f"no curve for any tile, or {host_us=}")
    return Side(float(host_us), curves, _curve(**backward) if backward else None)


def _curve(**figures: float) -> Curve:
    curve = Curve(**{name: float(value) for name, value in figures.items()})
    rates = (curve.gbs, curve.row_gbs, curve.grouped_gbs)
    if curve.tflops <= 0 or min(curve.costs()) < 0 or any(rate is not None and rate <= 0 for rate in rates):
        raise ValueError(f"bad figures {figures}")
    return curve


def to_json(table: Crossover, provenance: dict[str, Any]) -> str:
    """The file that ``Crossover.load`` reads; ``provenance`` has ``source`` at least."""
    about = {"schema": SCHEMA, "arch": table.arch, "device": table.device, "kernels": table.kernels}
    head = json.dumps(about | {"num_sms": table.num_sms, "provenance": provenance}, indent=2, ensure_ascii=False)
    lines = ",\n    ".join(json.dumps(_entry(rule)) for rule in table.rules)
    return f'{head[:-2]},\n  "rules": [\n    {lines}\n  ]\n}}\n'


def _entry(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {name: getattr(rule, name) for name in ("direction", "head_dim", "head_dim_v")}
    entry["is_causal"] = rule.is_causal
    if rule.mask != "none":
        entry["mask"] = rule.mask
    if rule.fa4 is None or rule.native is None:
        return entry | {"min_seqlen": rule.min_seqlen}
    entry |= {"fa4": _entry_of_side(rule.fa4), "native": _entry_of_side(rule.native)}
    return entry | {name: getattr(rule, name) for name in ("error", "margin", "least", "measured")}


def _entry_of_side(side: Side) -> dict[str, Any]:
    forward = {str(rows): _entry_of_curve(curve) for rows, curve in side.forward}
    backward = {"backward": _entry_of_curve(side.backward)} if side.backward else {}
    return {"host_us": side.host_us, "forward": forward, **backward}


def _entry_of_curve(curve: Curve) -> dict[str, float]:
    """The figures that are not what they are where nothing is said of them."""
    defaults = Curve._field_defaults
    return {name: value for name, value in curve._asdict().items() if name not in defaults or value != defaults[name]}


@functools.cache
def shipped(arch: int) -> Crossover | None:
    """The table that comes with this package for an arch, None where nobody has measured."""
    path = Path(__file__).parent / "tables" / f"sm{arch}.json"
    return Crossover.load(path) if path.exists() else None
