"""From measured cells to the rules of a crossover table: the figures of each curve, by least squares."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .crossover import (
    SIGMAS,
    Curve,
    Cuts,
    CutsOf,
    Direction,
    Load,
    Measured,
    Pass,
    Rule,
    Side,
    load,
    rows_of,
    torch_cuts,
)
from .spec import AttentionSpec

MIN_CELLS = 4  # that a rule takes, and the curve of a tile
FEW = 3  # figures that are fitted to few cells: launch, tile, flops
CELLS_OF_FIGURE = 2  # that there are to be for each figure, if more than FEW are fitted
# What of a Load takes a side's pass time, by what its measured times show.
FIGURES: dict[tuple[str, Pass], tuple[str, ...]] = {
    ("fa4", "forward"): ("launches", "waves", "mflops", "kilobytes"),
    ("fa4", "backward"): ("launches", "waves", "mflops", "row_kilobytes"),
    ("native", "forward"): ("launches", "waves", "mflops", "kilobytes", "ragged_mflops"),
    ("native", "backward"): (
        *("launches", "waves", "mflops", "kilobytes", "row_kilobytes", "grouped", "grouped_kilobytes"),
    ),
}
PRIOR_ERROR, PRIOR_CELLS = 0.05, 4  # what the error is taken to be before anything is measured, and how surely
DEPENDENT = 1e-9  # least share of the largest singular value that counts, where columns have a norm of 1
WORST = 1.03  # times torch's time, that 98 of 100 calls at the margin are to stay within

Kind = tuple[int, int, bool]  # head dims, is_causal


class Timed(NamedTuple):
    """One call's times on both sides, in µs."""

    direction: Direction
    spec: AttentionSpec
    fa4_us: float  # on the device
    native_us: float
    fa4_host_us: float
    native_host_us: float


def rules(cells: Iterable[Timed], num_sms: int, cuts_of: CutsOf) -> list[Rule]:
    """A rule for each direction, pair of head dims and causality; none for kinds with fewer than MIN_CELLS cells of a
    forward, and of training. ``cuts_of``: how fa4 cuts a call."""
    kinds: dict[Kind, dict[Direction, list[Timed]]] = {}
    for cell in cells:
        spec = cell.spec
        kind = spec.head_dim, spec.head_dim_v, spec.is_causal
        kinds.setdefault(kind, {"forward": [], "training": []})[cell.direction].append(cell)
    forwards, trainings = [], []
    for kind in sorted(kinds):
        forward, training = kinds[kind]["forward"], kinds[kind]["training"]
        if len(forward) < MIN_CELLS:
            continue
        fitted = _Fit(num_sms, cuts_of)
        fitted.add_forward(forward)
        forwards.append(fitted.rule(kind, "forward", forward))
        if len(training) >= MIN_CELLS:
            fitted.add_backward(training)
            trainings.append(fitted.rule(kind, "training", training))
    return forwards + trainings


class _Fit:
    """Both sides' curves of one kind of calls; the backward's are what training takes beside its forward."""

    def __init__(self, num_sms: int, cuts_of: CutsOf):
        self._num_sms, self._cuts_of = num_sms, cuts_of
        self._forward: dict[str, tuple[tuple[int, Curve], ...]] = {}
        self._backward: dict[str, Curve] = {}

    def add_forward(self, cells: Sequence[Timed]) -> None:
        """The curves of a forward: fa4's for each tile with MIN_CELLS cells, and for any other; torch's."""
        cuts = [self._cuts_of(cell.spec).forward for cell in cells]
        loads = [self._load(cell, "fa4", "forward") for cell in cells]
        times = [cell.fa4_us for cell in cells]

        def of_tile(rows: int) -> Curve:
            chosen = [i for i, cut in enumerate(cuts) if rows in (0, cut.rows)]
            return curve(("fa4", "forward"), [loads[i] for i in chosen], [times[i] for i in chosen])

        tiles = sorted({cut.rows for cut in cuts})
        own = [rows for rows in tiles if sum(cut.rows == rows for cut in cuts) >= MIN_CELLS] if len(tiles) > 1 else []
        self._forward["fa4"] = tuple((rows, of_tile(rows)) for rows in (0, *own))
        loads = [self._load(cell, "native", "forward") for cell in cells]
        self._forward["native"] = ((0, curve(("native", "forward"), loads, [cell.native_us for cell in cells])),)

    def add_backward(self, cells: Sequence[Timed]) -> None:
        """The curves of a backward."""
        for name, times in (("fa4", [c.fa4_us for c in cells]), ("native", [c.native_us for c in cells])):
            loads = [self._load(cell, name, "backward") for cell in cells]
            forwards = [self._device_us(cell, name, "forward") for cell in cells]
            self._backward[name] = curve((name, "backward"), loads, times, forwards)

    def rule(self, kind: Kind, direction: Direction, cells: Sequence[Timed]) -> Rule:
        """The rule of one direction, with the error of what it predicts for these cells."""
        head_dim, head_dim_v, is_causal = kind
        native_host_us = statistics.median(cell.native_host_us for cell in cells)
        fa4, native = (
            Side(round(host_us, 2), self._forward[name], self._backward.get(name) if direction == "training" else None)
            for name, host_us in (("fa4", native_host_us * _host_ratio(cells)), ("native", native_host_us))
        )
        off = []
        for cell in cells:
            predicted = self._device_us(cell, "native", direction) / self._device_us(cell, "fa4", direction)
            off.append(math.log(cell.native_us / cell.fa4_us / predicted))
        squares = sum(x * x for x in off) + PRIOR_CELLS * PRIOR_ERROR**2
        error = math.sqrt(squares / (max(len(cells) - self._figures(direction, len(cells)), 0) + PRIOR_CELLS))
        specs = [cell.spec for cell in cells]
        measured = (
            Measured(*cell.spec[1:6], round(cell.fa4_us, 2), round(cell.native_us, 2))
            for cell in sorted(cells, key=lambda cell: (cell.spec.seqlen_q, cell.spec[1:6]))
        )
        return Rule(
            direction,
            (head_dim, head_dim),
            is_causal,
            head_dim_v=(head_dim_v, head_dim_v),
            fa4=fa4,
            native=native,
            error=round(error, 4),
            margin=round(max(math.exp(SIGMAS * error) / WORST - 1.0, 0.0), 4),
            least=(min(s.seqlen_q for s in specs), min(s.seqlen_k for s in specs), min(map(rows_of, specs))),
            measured=tuple(measured),
        )

    def _cuts(self, cell: Timed, name: str) -> Cuts:
        return self._cuts_of(cell.spec) if name == "fa4" else torch_cuts(cell.spec)

    def _load(self, cell: Timed, name: str, of: Pass) -> Load:
        return load(cell.spec, of, getattr(self._cuts(cell, name), of), self._num_sms)

    def _device_us(self, cell: Timed, name: str, direction: Direction) -> float:
        side = Side(0.0, self._forward[name], self._backward.get(name))
        return side.device_us(cell.spec, direction, self._cuts(cell, name), self._num_sms)

    def _figures(self, direction: Direction, cells: int) -> float:
        """How many figures of a side were fitted to cells of this direction, the mean of both."""
        of: Pass = "forward" if direction == "forward" else "backward"
        count = {name: len(_fitted((name, of), cells)) for name in ("fa4", "native")}
        if direction == "forward":
            count["fa4"] *= max(len(self._forward["fa4"]) - 1, 1)
        return sum(count.values()) / 2


def curve(
    what: tuple[str, Pass], loads: Sequence[Load], device_us: Sequence[float], before_us: Sequence[float] = ()
) -> Curve:
    """The figures whose device times are off least, as shares of the measured ones, of which ``before_us`` are not this
    pass's. ValueError for times that no figures have."""
    names = _fitted(what, len(loads))
    targets = torch.tensor(device_us, dtype=torch.float64)
    columns = torch.tensor([[getattr(one, name) for name in names] for one in loads], dtype=torch.float64)
    rest = targets - torch.tensor(before_us or [0.0] * len(loads), dtype=torch.float64)
    costs = _positive(columns / targets[:, None], rest / targets)
    if costs is None:
        raise ValueError("times that do not grow with the math")
    known = dict(zip(names, costs, strict=True))
    return Curve.of([known.get(name, 0.0) for name in Load._fields])


def _fitted(what: tuple[str, Pass], cells: int) -> tuple[str, ...]:
    """What of a Load is fitted to so many cells."""
    names = FIGURES[what]
    return names if cells >= CELLS_OF_FIGURE * len(names) else names[:FEW]


def _host_ratio(cells: Sequence[Timed]) -> float:
    """fa4's time on the host over torch's, which is measured beside it, as the host is now busy, now not: of grouped
    heads or of the others, whichever is larger."""
    ratios: dict[bool, list[float]] = {}
    for cell in cells:
        grouped = cell.spec.num_heads != cell.spec.num_heads_kv
        ratios.setdefault(grouped, []).append(cell.fa4_host_us / cell.native_host_us)
    return max(map(statistics.median, ratios.values()))


def _positive(columns: torch.Tensor, targets: torch.Tensor) -> list[float] | None:
    """The costs c ≥ 0, the third one above 0, with columns · c nearest to targets. Of columns that are a sum of others,
    as waves are of launches where all cells have one, the last ones get 0: which shares a solver gives them depends on
    the processor."""
    best, least, count = None, math.inf, columns.shape[1]
    present = [i for i in range(count) if columns[:, i].any()]
    for size in range(len(present), 0, -1):
        for chosen in itertools.combinations(present, size):  # what is left out is 0
            own = columns[:, chosen]
            scale = own.norm(dim=0)
            solved = torch.linalg.lstsq(own / scale, targets[:, None], rcond=DEPENDENT, driver="gelsy")
            if int(solved.rank) < size:
                continue
            costs = dict(zip(chosen, (solved.solution[:, 0] / scale).tolist(), strict=True))
            off = float((own @ torch.tensor(list(costs.values()), dtype=own.dtype) - targets).square().sum())
            if min(costs.values()) >= 0 and costs.get(2, 0.0) > 0 and off < least * (1 - 1e-6):
                best, least = [costs.get(i, 0.0) for i in range(count)], off
    return best
