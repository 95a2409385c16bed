"""Rows as PNG pictures. Needs matplotlib, which nothing else here does: pip install 'fa_sdpa[plots]'."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import NATIVE, OURS
from .measure import Row
from .report import by_cell

MISSING = "plots need matplotlib: pip install 'fa_sdpa[plots]'"


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write what the rows are enough for: TFLOP/s by sequence length, and the crossover against torch.

    Raises RuntimeError, naming the extra that brings it, if matplotlib is not installed.
    """
    if not available():
        raise RuntimeError(MISSING)
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        chosen = [row for row in rows if row["direction"] == direction]
        written += _tflops(chosen, directory / f"tflops_{direction}.png")
        written += _crossover(chosen, directory / f"crossover_{direction}.png")
    return written


def series(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Head dims, heads and mask → backend → (seqlen, TFLOP/s), where two lengths or more were timed; of the cells of
    one length that of the largest batch."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        if row["tflops"]:
            dims = f"d{row['head_dim']}" + f"/{row['head_dim_v']}" * (row["head_dim"] != row["head_dim_v"])
            kv = f"/{row['heads_kv']}" if row["heads"] != row["heads_kv"] else ""
            panel = f"{dims} {'causal' if row['is_causal'] else 'full'} h{row['heads']}{kv} {row['dtype']}"
            panels.setdefault(panel, {}).setdefault(row["backend"], {})[row["seqlen_q"]] = row["tflops"]
    return {
        panel: {name: sorted(points.items()) for name, points in backends.items()}
        for panel, backends in panels.items()
        if any(len(points) > 1 for points in backends.values())
    }


def _tflops(rows: Sequence[Row], path: Path) -> list[Path]:
    from matplotlib import pyplot

    panels = series(rows)
    if not panels:
        return []
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False)
    for axis, (panel, backends) in zip(axes.flat, panels.items(), strict=False):
        for name, points in backends.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set(title=panel, xlabel="sequence length", ylabel="TFLOP/s")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return [_save(figure, path)]


def speedups(rows: Sequence[Row], column: str) -> dict[str, dict[str, float]]:
    """Kind of call → batch × seqlen → torch's time over ours."""
    found: dict[str, dict[str, float]] = {}
    for backends in by_cell(rows).values():
        ours, native = backends.get(OURS), backends.get(NATIVE)
        if ours and native and ours[column] and native[column]:
            heads = f"{ours['heads']}" + f"/{ours['heads_kv']}" * (ours["heads"] != ours["heads_kv"])
            kind = f"d{ours['head_dim']} {'causal' if ours['is_causal'] else 'full'} h{heads}"
            size = f"{ours['batch']}×{ours['seqlen_q']}"
            found.setdefault(kind, {})[size] = native[column] / ours[column]
    return found


def _crossover(rows: Sequence[Row], path: Path) -> list[Path]:
    """A heat map for eager mode and one for CUDA graphs: where we are ahead of torch, and by how much."""
    from matplotlib import colors, pyplot

    maps = {name: speedups(rows, column) for name, column in (("eager", "eager_ms"), ("CUDA graph", "graph_ms"))}
    maps = {name: found for name, found in maps.items() if sum(map(len, found.values())) > 1}
    if not maps:
        return []
    kinds = max(len(found) for found in maps.values())
    figure, axes = pyplot.subplots(len(maps), 1, figsize=(12, (1.5 + 0.35 * kinds) * len(maps)), squeeze=False)
    for axis, (name, found) in zip(axes.flat, maps.items(), strict=True):
        sizes = sorted({s for of_kind in found.values() for s in of_kind}, key=_by_length)
        values = [[of_kind.get(size, math.nan) for size in sizes] for of_kind in found.values()]
        norm: Any = colors.TwoSlopeNorm(1.0, vmin=0.5, vmax=2.0)
        axis.imshow(values, cmap="RdYlGn", norm=norm, aspect="auto")
        axis.set_xticks(range(len(sizes)), sizes, rotation=60, fontsize=7)
        axis.set_yticks(range(len(found)), list(found), fontsize=7)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axis.set_title(f"torch's time / fa4's, {name}, by batch × sequence length", fontsize=9)
    return [_save(figure, path)]


def _by_length(size: str) -> tuple[int, int]:
    batch, seqlen = size.split("×")
    return int(seqlen), int(batch)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
