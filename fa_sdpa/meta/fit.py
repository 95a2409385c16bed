"""From measured cells to the rules of a crossover table: six figures for each curve, five of them by least squares."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import torch

from .crossover import (
    KEYS,
    ROWS,
    Backward,
    Curve,
    Direction,
    IsSmall,
    Measured,
    Rule,
    Waves,
    is_ragged,
    num_bytes,
    rows_of,
    work,
)
from .spec import AttentionSpec

MIN_CELLS = 4  # that a rule takes
MIN_SPLIT = 5  # with small tiles, and with others, that each their own curve takes
TOGETHER = 1.25  # times the error of two rules, by grouping, that one for both may have
FIGURES = 3  # of a curve, that are fitted to them; with MANY cells two more, the rate of memory and what is ragged
MANY = 16
MOST_GBS = 1e5  # what is faster takes no time
PRIOR_ERROR, PRIOR_CELLS = 0.05, 4  # what the error is taken to be before anything is measured, and how surely
WORST = 1.03  # times torch's time, that 99 of 100 calls at the margin are to stay within
SIGMAS = 2.33  # of a normal distribution, beyond which one of 100 lies


class Timed(NamedTuple):
    """One call's times on both sides, in µs."""

    direction: Direction
    spec: AttentionSpec
    fa4_us: float  # on the device
    native_us: float
    fa4_host_us: float
    native_host_us: float


def rules(cells: Iterable[Timed], num_sms: int, is_small: IsSmall = lambda spec: False) -> list[Rule]:
    """A rule for each direction, pair of head dims and causality, for any grouping, or one for each where that is much
    more exact; none for kinds with fewer than MIN_CELLS cells."""
    kinds: dict[tuple[Direction, int, int, bool], list[Timed]] = {}
    for cell in cells:
        spec = cell.spec
        kinds.setdefault((cell.direction, spec.head_dim, spec.head_dim_v, spec.is_causal), []).append(cell)
    found = []
    for kind in sorted(kinds):
        of_kind = kinds[kind]
        if len(of_kind) < MIN_CELLS:
            continue
        together = rule(kind, None, of_kind, num_sms, is_small)
        apart = []
        for grouped in (False, True):
            chosen = [cell for cell in of_kind if _grouped(cell.spec) is grouped]
            if len(chosen) >= MIN_CELLS:
                apart.append(rule(kind, grouped, chosen, num_sms, is_small))
        of_both = math.fsum(one.error * len(one.measured) for one in apart) / len(of_kind)
        found += apart if len(apart) == 2 and together.error > TOGETHER * of_both else [together]
    return found


def _grouped(spec: AttentionSpec) -> bool:
    return spec.num_heads != spec.num_heads_kv


def rule(
    kind: tuple[Direction, int, int, bool],
    grouped: bool | None,
    cells: Sequence[Timed],
    num_sms: int,
    is_small: IsSmall = lambda spec: False,
) -> Rule:
    """The rule of one kind of calls. Small tiles have a curve of their own if enough cells have them, and others."""
    direction, head_dim, head_dim_v, is_causal = kind
    specs = [cell.spec for cell in cells]
    of_small = [is_small(spec) for spec in specs]
    splits = min(sum(of_small), len(cells) - sum(of_small)) >= MIN_SPLIT
    native_host_us = statistics.median(cell.native_host_us for cell in cells)
    fa4_host_us = native_host_us * _host_ratio(cells)

    def fa4_of(wanted: bool | None) -> Curve:
        chosen = [cell for cell, small in zip(cells, of_small, strict=True) if wanted is None or small is wanted]
        times = [cell.fa4_us for cell in chosen]
        return curve([cell.spec for cell in chosen], direction, num_sms, times, fa4_host_us)

    fa4, small = (fa4_of(False), fa4_of(True)) if splits else (fa4_of(None), None)
    native = curve(specs, direction, num_sms, [cell.native_us for cell in cells], native_host_us)
    off = []
    for cell, by_small in zip(cells, of_small, strict=True):
        mine = small if small and by_small else fa4
        predicted = native.device_us(cell.spec, direction, num_sms) / mine.device_us(cell.spec, direction, num_sms)
        off.append(math.log(cell.native_us / cell.fa4_us / predicted))
    figures = sum(map(_figures, (sum(of_small), len(cells) - sum(of_small)) if splits else (len(cells),)))
    squares = sum(x * x for x in off) + PRIOR_CELLS * PRIOR_ERROR**2
    error = math.sqrt(squares / (max(len(cells) - figures, 0) + PRIOR_CELLS))
    measured = (
        Measured(*cell.spec[1:6], round(cell.fa4_us, 2), round(cell.native_us, 2))
        for cell in sorted(cells, key=lambda cell: (cell.spec.seqlen_q, cell.spec[1:6]))
    )
    return Rule(
        direction,
        (head_dim, head_dim),
        is_causal,
        head_dim_v=(head_dim_v, head_dim_v),
        grouped=grouped,
        fa4=fa4,
        small=small,
        native=native,
        error=round(error, 4),
        margin=round(max(math.exp(SIGMAS * error) / WORST - 1.0, 0.0), 4),
        least=(min(spec.seqlen_q for spec in specs), min(spec.seqlen_k for spec in specs), min(map(rows_of, specs))),
        measured=tuple(measured),
    )


def curve(
    specs: Sequence[AttentionSpec],
    direction: Direction,
    num_sms: int,
    device_us: Sequence[float],
    host_us: float,
) -> Curve:
    """The figures whose device times are off least, as shares of the measured ones, over all tiles and kinds of
    waves that there are. ValueError for times that no figures have."""
    targets = torch.tensor(device_us, dtype=torch.float64)
    best, least = None, math.inf
    kinds = get_args(Waves) if any(spec.is_causal for spec in specs) else ("even", "whole")  # "last" is "whole" there
    backwards = get_args(Backward) if direction == "training" else ("by queries",)
    memory = [num_bytes(spec, direction) / 1e3 for spec in specs]
    for rows, keys, kind, backward in itertools.product(ROWS, KEYS, kinds, backwards):
        loads = [work(spec, direction, num_sms, rows, keys, kind, backward) for spec in specs]
        shares = [
            (1.0, waves, flops / 1e6, size, is_ragged(spec) * flops / 1e6)
            for (waves, flops), size, spec in zip(loads, memory, specs, strict=True)
        ]
        columns = torch.tensor(shares, dtype=torch.float64)[:, : _figures(len(specs))]
        figures = _positive(columns / targets[:, None])
        if figures is None:
            continue
        predicted = columns @ torch.tensor(figures, dtype=torch.float64)
        off = float((predicted / targets).log().square().sum())
        if off < least * (1 - 1e-6):  # what differs by rounding alone is a tie, and the first has it
            best, least = (figures, rows, keys, kind, backward), off
    if best is None:
        raise ValueError("times that do not grow with the math")
    (launch, tile, per_flop, *rest), rows, keys, kind, backward = best
    per_byte, per_ragged_flop = rest or (0.0, 0.0)
    gbs = round(1.0 / per_byte, 1) if per_byte * MOST_GBS > 1.0 else None
    times = round(host_us, 2), round(launch, 3), round(tile, 4), round(1.0 / per_flop, 1)
    return Curve(*times, rows, keys, kind, backward, gbs, round(per_ragged_flop / per_flop, 4))


def _host_ratio(cells: Sequence[Timed]) -> float:
    """fa4's time on the host over torch's, which is measured beside it, as the host is now busy, now not: of grouped
    heads or of the others, whichever is larger."""
    ratios: dict[bool, list[float]] = {}
    for cell in cells:
        ratios.setdefault(_grouped(cell.spec), []).append(cell.fa4_host_us / cell.native_host_us)
    return max(map(statistics.median, ratios.values()))


def _figures(cells: int) -> int:
    """How many figures are fitted to so many cells."""
    return FIGURES + 2 * (cells >= MANY)


def _positive(shares: torch.Tensor) -> list[float] | None:
    """The figures f ≥ 0, the third one above 0, with shares · f nearest to 1."""
    best, least, count = None, math.inf, shares.shape[1]
    present = [i for i in range(count) if shares[:, i].any()]
    for size in range(len(present), 0, -1):
        for chosen in itertools.combinations(present, size):  # what is left out is 0
            columns = shares[:, chosen]
            scale = columns.norm(dim=0)
            solved = torch.linalg.lstsq(columns / scale, torch.ones(len(shares), 1, dtype=shares.dtype))
            figures = dict(zip(chosen, (solved.solution[:, 0] / scale).tolist(), strict=True))
            off = float((columns @ torch.tensor(list(figures.values()), dtype=shares.dtype) - 1.0).square().sum())
            if min(figures.values()) >= 0 and figures.get(2, 0.0) > 0 and off < least * (1 - 1e-6):
                best, least = [figures.get(i, 0.0) for i in range(count)], off
    return best
