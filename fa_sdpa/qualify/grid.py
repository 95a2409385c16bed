"""What is checked and timed, and what of it a crossover table is fitted to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..bench.cells import Cell, Direction
from ..bench.contenders import NATIVE, OURS
from ..bench.report import by_cell
from ..meta.fit import Timed

TIMED: tuple[Direction, ...] = ("forward", "both")  # a training step is what a call with gradients leads to
SHOWN = Cell(2, 16, 16, 2048, 2048, 128, 128)  # the cell that reports show by itself

# Functional checks, by name: every kind of call once, with its gradients where the name says so.
CHECKS: dict[str, tuple[Cell, Direction]] = {
    "basic": (Cell(2, 4, 4, 256, 256, 128, 128), "forward"),
    "basic, fp16": (Cell(2, 4, 4, 256, 256, 64, 64, dtype="fp16"), "forward"),
    "forward and backward": (Cell(2, 4, 4, 256, 256, 128, 128), "both"),
    "causal": (Cell(2, 4, 4, 384, 384, 128, 128, True), "both"),
    "causal, head dim 64": (Cell(2, 4, 4, 384, 384, 64, 64, True), "both"),
    "GQA": (Cell(2, 8, 2, 256, 256, 128, 128, True), "both"),
    "ragged": (Cell(3, 3, 3, 197, 333, 128, 128), "both"),
    "ragged, causal": (Cell(1, 3, 1, 1285, 1285, 64, 64, True), "both"),
    "one query": (Cell(4, 8, 2, 1, 1000, 128, 128), "forward"),
}
CPU_CHECKS = {
    name: (cell._replace(seqlen_q=min(cell.seqlen_q, 40), seqlen_k=min(cell.seqlen_k, 40), dtype="fp32"), direction)
    for name, (cell, direction) in CHECKS.items()
}

QUICK_SIZES = ((1, 512), (1, 2048), (1, 8192), (4, 512), (8, 1024), (32, 512), (4, 4096), (64, 128))  # batch, seqlen
QUICK_GROUPED_SIZES = ((1, 512), (1, 2048), (1, 8192), (8, 512), (4, 2048), (16, 1024))
FULL_SIZES = (
    *((1, s) for s in (128, 256, 512, 1024, 2048, 4096, 16384)),
    *((4, 256), (4, 1024), (16, 128), (16, 1024), (64, 512)),
)
GROUPED_SIZES = ((1, 512), (1, 2048), (1, 8192), (8, 512), (4, 2048))
DRAWN = 12  # random calls of each kind: what lies between round sizes costs more, on both sides
HEAD_DIMS = (64, 128, 80, 96, 192, 256)
GROUPS = (1, 1, 1, 4, 7, 8)
MOST_BYTES, MOST_FLOPS = 4 << 30, 10e12


def cells(quick: bool) -> list[Cell]:
    """The grid: head dims, masks, grouping, many heads and few, batches and lengths; SHOWN first."""
    found = regular(quick)
    if not quick:
        rng = random.Random(0)
        for head_dim, head_dim_v in (*((d, d) for d in HEAD_DIMS), (192, 128)):
            for is_causal in (False, True):
                found += [draw(rng, head_dim, head_dim_v, is_causal) for _ in range(DRAWN)]
    return list(dict.fromkeys(found))


def regular(quick: bool) -> list[Cell]:
    """The cells of round sizes, which make pictures."""
    found = [SHOWN, SHOWN._replace(is_causal=True)]
    sizes, grouped_sizes = (QUICK_SIZES, QUICK_GROUPED_SIZES) if quick else (FULL_SIZES, GROUPED_SIZES)
    for head_dim in HEAD_DIMS[:2] if quick else HEAD_DIMS:
        for is_causal in (False, True):
            heads = 2048 // head_dim
            found += [_square(b, heads, heads, s, head_dim, is_causal) for b, s in sizes]
            if head_dim in (64, 128):
                found += [_square(b, 32, 8, s, head_dim, is_causal) for b, s in grouped_sizes]
            if not quick:
                found.append(Cell(4, heads, heads, 512, 4096, head_dim, head_dim, is_causal))
    if not quick:
        found += [
            _square(b, 16, 16, s, 192, is_causal)._replace(head_dim_v=128)
            for is_causal in (False, True)
            for b, s in FULL_SIZES
        ]
    return list(dict.fromkeys(found))


def draw(rng: random.Random, head_dim: int, head_dim_v: int, is_causal: bool) -> Cell:
    """A random call: batch 1 to 64, 4 to 64 heads, lengths 16 to 16k log-uniform; not too large to be timed."""
    while True:
        seqlen, group = round(2 ** rng.uniform(4, 14)), rng.choice(GROUPS)
        heads = max(rng.randint(4, 64) // group, 1) * group
        batch = rng.choice((1, rng.randint(1, 64)))
        cell = Cell(batch, heads, heads // group, seqlen, seqlen, head_dim, head_dim_v, is_causal)
        if cell.bytes_of("both") <= MOST_BYTES and cell.flops_of("both") <= MOST_FLOPS:
            return cell


def mixed(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with all kinds in turns, so that whoever stops early has some of each."""
    kinds: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        kind = cell.head_dim, cell.head_dim_v, cell.is_causal, cell.heads != cell.heads_kv
        kinds.setdefault(kind, []).append(cell)
    return [cell for turn in itertools.zip_longest(*kinds.values()) for cell in turn if cell is not None]


CPU_CELLS = tuple(Cell(b, 2, 2, s, s, 16, 16, c, "fp32") for c in (False, True) for b, s in ((1, 16), (1, 64), (2, 32)))


def _square(batch: int, heads: int, heads_kv: int, seqlen: int, head_dim: int, is_causal: bool) -> Cell:
    return Cell(batch, heads, heads_kv, seqlen, seqlen, head_dim, head_dim, is_causal)


def timed(rows: Sequence[dict[str, Any]] | Iterable[dict[str, Any]]) -> list[Timed]:
    """The cells that were timed on a device on both sides, from rows of bench.measure."""
    found = []
    for backends in by_cell(list(rows)).values():
        ours, native = backends.get(OURS), backends.get(NATIVE)
        if not ours or not native:
            continue
        times = [row.get("gpu_ms") or row.get("graph_ms") for row in (ours, native)]
        hosts: list[Any] = [row.get("host_us") for row in (ours, native)]
        if all(times) and all(hosts):  # on a CPU there are none
            fa4_us, native_us = (1e3 * ms for ms in times if ms)
            cell = Cell(*(ours[name] for name in Cell._fields))
            direction: Direction = ours["direction"]
            kind: Any = "forward" if direction == "forward" else "training"
            found.append(Timed(kind, cell.spec(direction), fa4_us, native_us, float(hosts[0]), float(hosts[1])))
    return found
