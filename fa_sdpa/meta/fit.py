"""From measured cells to the rules of a crossover table: four figures for each side, by least squares."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import torch

from .crossover import ROWS, Backward, Crossover, Curve, Direction, Measured, Rule, Waves, rows_of, work
from .spec import AttentionSpec

MIN_CELLS = 4  # that a rule takes
TOGETHER = 1.25  # times the error of two rules, by grouping, that one for both may have
FIGURES = 3  # that are fitted to them
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


def rules(cells: Iterable[Timed], num_sms: int) -> list[Rule]:
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
        together = rule(kind, None, of_kind, num_sms)
        apart = []
        for grouped in (False, True):
            chosen = [cell for cell in of_kind if _grouped(cell.spec) is grouped]
            if len(chosen) >= MIN_CELLS:
                apart.append(rule(kind, grouped, chosen, num_sms))
        of_both = math.fsum(one.error * len(one.measured) for one in apart) / len(of_kind)
        found += apart if len(apart) == 2 and together.error > TOGETHER * of_both else [together]
    return found


def _grouped(spec: AttentionSpec) -> bool:
    return spec.num_heads != spec.num_heads_kv


def rule(kind: tuple[Direction, int, int, bool], grouped: bool | None, cells: Sequence[Timed], num_sms: int) -> Rule:
    """The rule of one kind of calls."""
    direction, head_dim, head_dim_v, is_causal = kind
    specs = [cell.spec for cell in cells]
    fa4 = curve(specs, direction, num_sms, [cell.fa4_us for cell in cells], [cell.fa4_host_us for cell in cells])
    native = curve(
        specs, direction, num_sms, [cell.native_us for cell in cells], [cell.native_host_us for cell in cells]
    )
    off = []
    for cell in cells:
        predicted = native.device_us(cell.spec, direction, num_sms) / fa4.device_us(cell.spec, direction, num_sms)
        off.append(math.log(cell.native_us / cell.fa4_us / predicted))
    squares = sum(x * x for x in off) + PRIOR_CELLS * PRIOR_ERROR**2
    error = math.sqrt(squares / (max(len(cells) - FIGURES, 0) + PRIOR_CELLS))
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
    host_us: Sequence[float],
) -> Curve:
    """The figures whose device times are off least, as shares of the measured ones, over all rows of a tile and kinds
    of waves that there are. ValueError for times that no figures have."""
    targets = torch.tensor(device_us, dtype=torch.float64)
    best, least = None, math.inf
    kinds = get_args(Waves) if any(spec.is_causal for spec in specs) else ("even", "whole")  # "last" is "whole" there
    backwards = get_args(Backward) if direction == "training" else ("by queries",)
    for rows, kind, backward in itertools.product(ROWS, kinds, backwards):
        loads = [work(spec, direction, num_sms, rows, kind, backward) for spec in specs]
        columns = torch.tensor([[1.0, waves, flops / 1e6] for waves, flops in loads], dtype=torch.float64)
        figures = _positive(columns / targets[:, None])
        if figures is None:
            continue
        predicted = columns @ torch.tensor(figures, dtype=torch.float64)
        off = float((predicted / targets).log().square().sum())
        if off < least * (1 - 1e-6):  # what differs by rounding alone is a tie, and the first has it
            best, least = (figures, rows, kind, backward), off
    if best is None:
        raise ValueError("times that do not grow with the math")
    (launch, tile, per_flop), rows, kind, backward = best
    host = statistics.median(host_us)
    return Curve(round(host, 2), round(launch, 3), round(tile, 4), round(1.0 / per_flop, 1), rows, kind, backward)


def _positive(shares: torch.Tensor) -> list[float] | None:
    """The three figures f ≥ 0, the last one above 0, with shares · f nearest to 1."""
    best, least = None, math.inf
    for chosen in ((0, 1, 2), (0, 2), (1, 2), (2,)):  # what is left out is 0
        columns = shares[:, chosen]
        scale = columns.norm(dim=0)
        solved = torch.linalg.lstsq(columns / scale, torch.ones(len(shares), 1, dtype=shares.dtype))
        figures = solved.solution[:, 0] / scale
        off = float((columns @ figures - 1.0).square().sum())
        if bool((figures >= 0).all()) and float(figures[-1]) > 0 and off < least * (1 - 1e-6):
            best, least = [0.0, 0.0, 0.0], off
            for column, figure in zip(chosen, figures.tolist(), strict=True):
                best[column] = figure
    return best


def table(
    cells: Iterable[Timed], arch: int, num_sms: int, source: str, device: str | None, digest: str | None
) -> Crossover:
    """The table of an arch, or of one device and kernels' digest alone."""
    return Crossover(arch, source, tuple(rules(cells, num_sms)), num_sms, device, digest)
