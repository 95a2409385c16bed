"""The report of a run: Markdown, JSON, and pictures where matplotlib is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..bench import plots
from ..bench.report import by_cell, summary, summary_lines
from ..meta.crossover import Rule
from . import grid
from .run import Findings

NONE = "none"
FIGURES = {  # of a Curve, as columns
    "launch_us": "launch µs",
    "tile_us": "µs a wave",
    "tflops": "TFLOP/s",
    "ragged": "ragged",
    "gbs": "GB/s",
    "row_gbs": "GB/s of rows",
    "grouped_us": "grouped µs",
    "grouped_gbs": "GB/s grouped",
}


def write(findings: Findings, out: Path, kept: list[Path]) -> list[Path]:
    """Write report.md, report.json and plots/ into ``out``; their paths. ``kept``: what the policy will use."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    if plots.available() and findings.rows:
        regular = {str(cell) for cell in grid.regular(findings.quick)}
        rows = [row for row in findings.rows if row["cell"] in regular]
        pictures = plots.plot(rows or findings.rows, out / "plots")
    text = markdown(findings, [path.relative_to(out) for path in pictures], kept)
    (out / "report.md").write_text(text)
    (out / "report.json").write_text(as_json(content(findings)))
    return [out / "report.md", out / "report.json", *pictures]


def content(findings: Findings) -> dict[str, Any]:
    """Everything, as benchmarks/results/ files are: provenance first, rows as ``results``."""
    return {
        "provenance": findings.about,
        "fa_sdpa": __version__,
        "quick": findings.quick,
        "passed": findings.passed,
        "ceilings": findings.ceilings,
        "summary": summary(findings.rows),
        "build": findings.build,
        "checks": findings.checks,
        "quarantined": findings.failed,
        "notes": findings.notes,
        "results": findings.rows,
    }


def as_json(report: dict[str, Any]) -> str:
    """One line for each row, without what it has no value for."""
    rows = ({name: value for name, value in row.items() if value not in (None, "")} for row in report["results"])
    head = json.dumps({**report, "results": []}, indent=1)
    return head.removesuffix("[]\n}") + "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"


def markdown(findings: Findings, pictures: list[Path], kept: list[Path]) -> str:
    """The report for people."""
    about = findings.about
    verdict = "passed" if findings.passed else "not passed: calls stay with torch"
    facts = {
        "Date": about["date"],
        "GPU": f"{about['name']} ({about['arch'] or about['device_type']}, {about['num_sms']} SMs)",
        "Driver": about["driver"] or NONE,
        "CUDA": about["cuda"] or NONE,
        "torch": about["torch"],
        "cuDNN": about["cudnn"] or NONE,
        "fa_sdpa": f"{__version__}, commit {about['commit'] or 'unknown'}",
        "Run": f"{'quick' if findings.quick else 'full'}: {verdict}",
    }
    lines = ["# fa_sdpa on this GPU", "", *(f"- **{name}**: {value}" for name, value in facts.items())]
    if about["missing"]:
        lines += [f"- **Missing**: {reason}" for reason in about["missing"]]
    lines += ["", "## Build", "", *_build(findings.build)]
    lines += ["", "## Functional", ""]
    lines += [f"- [{' ' if why else 'x'}] {name}{f': {why}' if why else ''}" for name, why in findings.checks.items()]
    lines += ["", f"## Performance at {grid.SHOWN}", "", *_performance(findings, shown=True)]
    lines += ["", "## Performance, whole grid", "", *_performance(findings, shown=False), *summary_lines(findings.rows)]
    if findings.ceilings:
        matmul, copy = findings.ceilings.values()
        lines += ["", f"In the same run: {matmul:.0f} TFLOP/s in a matmul, {copy:.0f} GB/s in a copy."]
    lines += ["", "## Where fa4 is faster", "", *_crossover(findings.rules)]
    lines += [f"\n![{path.stem}]({path.as_posix()})" for path in pictures]
    lines += ["", "## Notes", ""]
    lines += [f"- in quarantine, never routed here: {name}: {why}" for name, why in findings.failed.items()]
    lines += [f"- {note}" for note in findings.notes]
    lines += [f"- the policy uses {path}" for path in kept] or ["- nothing was written for the policy"]
    return "\n".join(lines) + "\n"


def _build(build: dict[str, dict[str, Any]]) -> list[str]:
    if not build:
        return ["There is nothing to compile for this device."]
    lines = []
    for name, about in build.items():
        used = f"{about['registers']} registers, {about['frame_bytes']} bytes spilled" if "registers" in about else ""
        seconds = f"{about['seconds']:.1f} s" if about["seconds"] else "there already"
        what = about["error"] or ", ".join(part for part in (seconds, used) if part)
        lines.append(f"- [{' ' if about['error'] else 'x'}] {name}: {what}")
    return lines


def _performance(findings: Findings, *, shown: bool) -> list[str]:
    """µs of both sides and torch's time over ours, by cell."""
    lines = [
        "| direction | cell | fa4 ms | torch ms | torch's choice | device | eager | CUDA graph | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    wanted = {str(grid.SHOWN), str(grid.SHOWN._replace(is_causal=True))}
    for (direction, cell), found in by_cell(findings.rows).items():
        ours, native = found.get("fa4"), found.get("native")
        if ours and native and (cell in wanted or not shown):
            times = [_number(row["gpu_ms"] or row["eager_ms"], ".4f") for row in (ours, native)]
            ratios = [_number(ours[name], ".2f") for name in ("ratio_gpu", "ratio_eager", "ratio_graph")]
            figures = [*times, native["chosen"] or "-", *ratios, _number(ours["tflops"], ".1f")]
            lines.append(f"| {direction} | {cell} | {' | '.join(figures)} |")
    return lines if len(lines) > 2 else ["Nothing was timed."]


def _crossover(rules: list[Rule]) -> list[str]:
    """The table that the policy goes by, figure by figure."""
    if not rules:
        return ["Too little was timed for a table."]
    lines = [
        "Figures of fa4 / of torch; `fa_sdpa/meta/crossover.py` says how they make a time.",
        "",
        f"| direction | head dims | mask | pass | host µs | {' | '.join(FIGURES.values())} | error | margin |",
        "|" + " --- |" * (7 + len(FIGURES)),
    ]
    for rule in rules:
        if rule.fa4 is None or rule.native is None:
            continue
        dim_v = (rule.head_dim_v or rule.head_dim)[0]
        dims = f"{rule.head_dim[0]}" + f"/{dim_v}" * (dim_v != rule.head_dim[0])
        hosts = f"{rule.fa4.host_us:g} / {rule.native.host_us:g}"
        about = [rule.direction, dims, "causal" if rule.is_causal else "full"]
        native = rule.native.forward[0][1]
        passes = [(f"tiles of {rows}" if rows else "forward", curve, native) for rows, curve in rule.fa4.forward]
        if rule.direction == "training" and rule.fa4.backward and rule.native.backward:
            passes = [("backward", rule.fa4.backward, rule.native.backward)]  # the forward's are those of its own rule
        for name, fa4, torchs in passes:
            pairs = ((getattr(fa4, figure), getattr(torchs, figure)) for figure in FIGURES)
            figures = (" / ".join(_number(figure, "g") for figure in pair) for pair in pairs)
            lines.append(f"| {' | '.join((*about, name, hosts, *figures))} | {rule.error:.1%} | {rule.margin:.1%} |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
