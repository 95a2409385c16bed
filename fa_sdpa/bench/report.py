"""Rows as a table for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import timing
from .contenders import OURS
from .measure import COLUMNS, Row, time_of
from .provenance import save

RATIOS = {"gpu": "ratio_gpu", "eager": "ratio_eager", "graph": "ratio_graph"}
WHERE = 30  # width of a cell's name


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(direction, cell) → backend → row, in the order of the rows."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["direction"], row["cell"]), {})[row["backend"]] = row
    return cells


def table(rows: Sequence[Row], *, with_ms: bool = False) -> str:
    """One table for each direction: TFLOP/s of each backend on the device, and how the best peer's time compares with
    ours on the device, in eager mode and in a CUDA graph. With ``with_ms`` ms and TFLOP/s instead of the latter two.
    Below it what torch's own choice was, and who did not run and why."""
    lines: list[str] = []
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for direction in dict.fromkeys(row["direction"] for row in rows):
        unit = "ms, TFLOP/s" if with_ms else "TFLOP/s"
        width = 16 if with_ms else 13
        lines += ["", f"{f'{direction}, {unit}':{WHERE}}" + "".join(f"{name:>{width}}" for name in backends)]
        if OURS in backends:
            lines[-1] += "   best peer's time / ours: " + " ".join(f"{name:>6}" for name in RATIOS) + "  torch chose"
        for (of, cell), found in by_cell(rows).items():
            if of == direction:
                lines.append(_line(cell, found, backends, width, with_ms))
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            notes.setdefault(f"{row['backend']}: {row['reason']}", []).append(f"{row['direction']} {row['cell']}")
    if notes:
        lines += ["", "not timed, or not wholly:"]
        lines += [
            f"  {note}  ({cells[0]}{f' and {len(cells) - 1} more' * (len(cells) > 1)})" for note, cells in notes.items()
        ]
    return "\n".join([*lines, *summary_lines(rows)])


def _line(cell: str, found: dict[str, Row], backends: Sequence[str], width: int, with_ms: bool) -> str:
    line = f"{cell:{WHERE}}"
    for name in backends:
        row = found.get(name)
        ms = row and time_of(row)
        figure = "-" if not row or not ms else f"{row['tflops']:.{1 if row['tflops'] >= 1 else 4}f}"
        line += f"{f'{ms:.4f} {figure:>7}' if ms and with_ms else figure:>{width}}"
    if OURS in backends:
        ours = found.get(OURS, {})
        figures = " ".join(f"{f'{ours[key]:.2f}' if ours.get(key) else '-':>6}" for key in RATIOS.values())
        chosen = next((row["chosen"] for row in found.values() if row["chosen"]), "")
        line += " " * 28 + figures + f"  {chosen}"
    return line


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By direction and measure: geomean and minimum of our ratios, and in how many cells we are ahead."""
    about: dict[str, Any] = {}
    for direction in dict.fromkeys(row["direction"] for row in rows):
        for name, key in RATIOS.items():
            found = [row for row in rows if row["direction"] == direction and row[key]]
            if found:
                worst = min(found, key=lambda row: row[key])
                about[f"{direction}, {name}"] = {
                    "cells": len(found),
                    "geomean": round(statistics.geometric_mean(row[key] for row in found), 4),
                    "minimum": round(worst[key], 4),
                    "minimum_at": worst["cell"],
                    "ahead": sum(row[key] >= 1.0 for row in found),
                }
    return about


def summary_lines(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"{name}: {about['geomean']:.3f}× the best peer over {about['cells']} cells, ahead in {about['ahead']}, "
        f"least {about['minimum']:.2f}× at {about['minimum_at']}"
        for name, about in summary(rows).items()
    ]
    return ["", *lines] if lines else []


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line for each row, the columns those of measure.COLUMNS."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_json(rows: Sequence[Row], path: Path, **about: Any) -> None:
    """With provenance, protocol and summary."""
    protocol = " ".join((timing.__doc__ or "").split("\n\n", 1)[1].split())
    save(path, list(rows), protocol=protocol, summary=summary(rows), **about)
