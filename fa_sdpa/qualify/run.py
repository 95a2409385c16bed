"""The steps in turn: describe, build, check, time, fit. Each has a time limit and a process to lose; what was done is
in a journal, so that a run that was interrupted goes on where it stopped. What failed goes into quarantine."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__, kernels, tables, warm
from ..bench.cells import Cell, Direction
from ..bench.contenders import NATIVE, OURS
from ..kernels import compile as compiling
from ..kernels import launch, quarantine, resources
from ..kernels.cache import open_cache
from ..kernels.key import KernelKey
from ..meta import crossover, fit
from ..meta.target import Target
from . import grid
from .session import Answer, Session

LIMITS = {"describe": 60.0, "ceilings": 60.0, "check": 60.0, "time": 60.0}  # seconds
QUICK_ROUNDS, ROUNDS = 3, 8
IDENTITY = ("fa_sdpa", "name", "driver", "torch", "cuda", "kernels")  # of what a journal is about

Say = Callable[[str, str, bool], None]  # a step's name, what became of it, whether it failed


class Settings(NamedTuple):
    device: str  # "cuda" or, to try the command, "cpu"
    quick: bool
    out: Path  # journal and report
    fresh: bool = False  # forget what an earlier run has done
    jobs: int = 8  # processes that compile
    minutes: float = math.inf  # after which no more is timed


class Findings(NamedTuple):
    """All that a run has found out, for the report."""

    about: dict[str, Any]
    quick: bool
    build: dict[str, dict[str, Any]]  # kernel → error, seconds, registers, frame_bytes
    checks: dict[str, str]  # name → what is wrong, "" if nothing is
    ceilings: dict[str, float]
    rows: list[dict[str, Any]]
    failed: dict[str, str]  # kernel → why
    notes: list[str]
    rules: list[crossover.Rule]

    @property
    def passed(self) -> bool:
        """Whether there is something to route: the checks of the plainest calls went well."""
        return not any(why for name, why in self.checks.items() if name.startswith("basic"))


class Journal:
    """What was done, one line each, for a run that goes on later."""

    def __init__(self, path: Path, identity: dict[str, Any], fresh: bool) -> None:
        self._path = path
        self.done: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not fresh and path.exists():
            self._read(identity)
        if not self.done:
            path.write_text(json.dumps({"identity": identity}) + "\n")

    def _read(self, identity: dict[str, Any]) -> None:
        try:
            first, *lines = self._path.read_text().splitlines()
            if json.loads(first)["identity"] != identity:
                return
        except (ValueError, KeyError, TypeError):
            return
        for line in lines:
            try:
                entry = json.loads(line)
                self.done[entry["id"]] = entry["value"]
            except (ValueError, KeyError, TypeError):  # the line that was being written
                continue

    def note(self, name: str, value: Any) -> None:
        self.done[name] = value
        with self._path.open("a") as file:
            file.write(json.dumps({"id": name, "value": value}) + "\n")


class Steps(NamedTuple):
    """What there is to do on a device."""

    checks: dict[str, tuple[Cell, Direction]]
    cells: Sequence[Cell]
    keys: tuple[KernelKey, ...]  # all kernels of both


def steps_of(settings: Settings, target: Target) -> Steps:
    """The checks and cells that a kernel runs on ``target``."""
    checks, cells = grid.CHECKS, grid.cells(settings.quick)
    if settings.device == "cpu":
        checks, cells = grid.CPU_CHECKS, list(grid.CPU_CELLS)

    def runs(cell: Cell, way: Direction) -> bool:
        return not kernels.unsupported(cell.spec(way), target)

    checks = {name: (cell, way) for name, (cell, way) in checks.items() if runs(cell, way)}
    cells = [cell for cell in cells if runs(cell, "both")]
    calls = [*checks.values(), *((cell, way) for cell in cells for way in grid.TIMED)]
    keys = dict.fromkeys(key for cell, way in calls for key in launch.keys(cell.spec(way), target))
    return Steps(checks, cells, tuple(keys))


def count(settings: Settings, steps: Steps) -> int:
    """How many steps ``say`` will hear of."""
    return len(steps.keys) + len(steps.checks) + 1 + len(steps.cells) * len(grid.TIMED)


class Run:
    """One run of the steps."""

    def __init__(self, settings: Settings, session: Session, about: dict[str, Any], say: Say) -> None:
        self._settings, self._session, self._about, self._say = settings, session, about, say
        identity = {name: about.get(name) for name in IDENTITY} | {"fa_sdpa": __version__}
        self._journal = Journal(settings.out / "qualify.jsonl", identity, settings.fresh)
        self.target = Target(about["device_type"], about["arch_number"], about["name"], about["num_sms"])
        self.steps = steps_of(settings, self.target)
        self._failed: dict[str, str] = {}
        self._forward_right: set[Cell] = set()  # cells whose forward was right and was timed
        self._notes: list[str] = []
        self._deadline, self._unreached = time.monotonic() + 60 * settings.minutes, 0

    def all(self) -> Findings:
        """Do what is not done, and tell everything."""
        build = self._build()
        checks = {name: self._check(name, *what) for name, what in self.steps.checks.items()}
        ceilings = self._once("ceilings", lambda: self._ask("ceilings").result or {})
        self._say("ceilings", "", False)
        rows: list[dict[str, Any]] = []
        for cell in grid.mixed(self.steps.cells):
            for direction in grid.TIMED:
                rows += self._time(cell, direction, ceilings)
        if self._unreached:
            of_all = len(grid.TIMED) * len(self.steps.cells)
            self._notes.append(f"time was up: {self._unreached} of {of_all} cells were not timed; run again to go on")
        timed = grid.timed(rows)
        sms = self.target.num_sms
        rules = fit.rules(timed, sms, kernels.cuts_on(self.target, sms)) if timed else []
        return Findings(
            self._about, self._settings.quick, build, checks, ceilings, rows, self._failed, self._notes, rules
        )

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self._journal.done:
            self._journal.note(name, work())
        return self._journal.done[name]

    def _ask(self, kind: str, **task: Any) -> Answer:
        return self._session.ask({"kind": kind, "device": self._settings.device, **task}, LIMITS[kind])

    # ---- build -------------------------------------------------------------------------------------------------------

    def _build(self) -> dict[str, dict[str, Any]]:
        todo = [key for key in self.steps.keys if f"build {key.name}" not in self._journal.done]
        for outcome in build(todo, self._settings.jobs):
            value = {"error": outcome.error, "seconds": outcome.seconds, **_usage(outcome.key)}
            self._journal.note(f"build {outcome.key.name}", value)
        found = {}
        for key in self.steps.keys:
            found[key.name] = value = self._journal.done[f"build {key.name}"]
            if value["error"]:
                self._failed[key.name] = f"it does not compile: {value['error']}"
            self._say(key.name, value["error"] or "built", bool(value["error"]))
        return found

    # ---- check -------------------------------------------------------------------------------------------------------

    def _check(self, name: str, cell: Cell, direction: Direction) -> str:
        why = self._refused(cell, direction)
        if not why:
            why, ours = self._once(f"check {name}", lambda: self._checked(cell, direction))
            if why and ours:
                self._blame(cell, direction, f"check {name!r}: {why}")
        self._say(f"check {name}", why or "right", bool(why))
        return why

    def _checked(self, cell: Cell, direction: Direction) -> tuple[str, bool]:
        """What is wrong, and whether fa4 is to blame."""
        answer = self._ask("check", cell=cell, direction=direction)
        if answer.result is None:
            return f"{answer.error}, in {answer.stage or 'its preparation'}", answer.stage == OURS
        return answer.result, not _nobodys(answer.result)

    # ---- time --------------------------------------------------------------------------------------------------------

    def _time(self, cell: Cell, direction: Direction, ceilings: dict[str, float]) -> list[dict[str, Any]]:
        rounds = QUICK_ROUNDS if self._settings.quick else ROUNDS
        why, rows = self._refused(cell, direction), []
        name = f"time {direction} {cell}, {rounds} rounds"
        if not why and name not in self._journal.done and time.monotonic() > self._deadline:
            self._unreached += 1
            self._say(f"{direction} {cell}", "not reached", False)
            return []
        if not why:
            result = self._once(name, lambda: self._timed(cell, direction, rounds, ceilings))
            rows, why = result["rows"], result["error"]
            if why and result["ours"]:
                self._blame(cell, direction, f"{direction} {cell}: {why}")
            elif not why and direction == "forward":
                self._forward_right.add(cell)
            elif why:
                self._notes.append(f"{direction} {cell} was not timed: {why}")
        self._say(f"{direction} {cell}", why or _speedup(rows), bool(why))
        return rows

    def _timed(self, cell: Cell, direction: Direction, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
        """rows, error, and whether fa4 is to blame for it. Where both were under way, it is asked alone."""
        error = ""
        for backends in ([OURS, NATIVE], [OURS]):
            task = {"cell": cell, "direction": direction, "rounds": rounds, "ceilings": ceilings, "backends": backends}
            answer = self._ask("time", **task)
            if answer.result is not None:
                mine = next(row for row in answer.result if row["backend"] == OURS)
                why = "" if mine["eager_ms"] else mine["reason"]
                if len(backends) == 1 and not why:
                    return {"rows": [], "error": f"beside torch: {error}", "ours": False}
                return {"rows": answer.result, "error": why, "ours": bool(why) and not _nobodys(why)}
            error = f"{answer.error}, in {answer.stage or 'its preparation'}"
            if answer.stage == OURS:
                break
        return {"rows": [], "error": error, "ours": answer.stage in (OURS, "timing")}

    # ---- who failed --------------------------------------------------------------------------------------------------

    def _names(self, cell: Cell, direction: Direction) -> list[str]:
        return [key.name for key in launch.keys(cell.spec(direction), self.target)]

    def _refused(self, cell: Cell, direction: Direction) -> str:
        """Why a cell is not tried: one of its kernels has failed before."""
        for name in self._names(cell, direction):
            if name in self._failed:
                return f"not tried, since {name} has failed"
        return ""

    def _blame(self, cell: Cell, direction: Direction, why: str) -> None:
        """Put the kernels that ran into quarantine; of a forward and a backward the one that is known to be wrong, or
        the backward's if the forward alone was right before."""
        names, of_forward = self._names(cell, direction), self._names(cell, "forward")
        if "wrong: out " in why:
            names = of_forward
        elif direction != "forward" and ("wrong: d" in why or cell in self._forward_right):
            names = [name for name in names if name not in of_forward]
        for name in names:
            self._failed[name] = why


def build(keys: Sequence[KernelKey], jobs: int) -> Iterable[warm.Outcome]:
    """Compile what is neither in the bundle nor in the cache."""
    there = [key for key in keys if compiling.stored(key)]
    todo = [key for key in keys if key not in there]
    try:
        done = warm.to_cache(todo, jobs, lambda outcome: None) if todo else []
    except RuntimeError as error:
        done = [warm.Outcome(key, 0.0, str(error)) for key in todo]
    return [*(warm.Outcome(key, 0.0) for key in there), *done]


def _usage(key: KernelKey) -> dict[str, Any]:
    """Registers and stack frame of a kernel in the cache; nothing of one in a bundle."""
    cache, _ = open_cache()
    path = cache.find(compiling.entry_name(key)) if cache else None
    used = resources.usage(path.read_bytes()) if path else None
    return used._asdict() if used else {}


def _nobodys(why: str) -> bool:
    """Whether a reason says that nobody failed: there was no memory, or the router left the call to torch."""
    left = why.startswith(("no inputs: ", "native: ")) and "kernel_failed" not in why
    return left or "OutOfMemoryError" in why


def _speedup(rows: Sequence[dict[str, Any]]) -> str:
    ours = next((row for row in rows if row["backend"] == OURS), {})
    ratio = ours.get("ratio_gpu") or ours.get("ratio_eager")
    return f"{ratio:.2f}× torch" if ratio else "timed"


# ---- what is made of it ----------------------------------------------------------------------------------------------


def keep(findings: Findings, target: Target) -> list[Path]:
    """Write the quarantine, and the crossover table if there is something to route; their paths."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    entries = {
        name: entry
        for name, entry in quarantine.read(quarantine.path_of(target.name)).items()
        if name not in findings.build  # what this run did not try stays as it was
    }
    for name, why in findings.failed.items():
        source = compiling.source_hash(KernelKey.parse(name).arch)
        entries[name] = {"reason": why, "date": now, "source": source}
    written = [quarantine.write(target.name, entries)]
    if findings.passed and findings.rules:
        path = tables.user_path(target.name)
        path.write_text(table(findings, target))
        tables.forget()
        written.append(path)
    return written


def table(findings: Findings, target: Target) -> str:
    """The crossover table of this device and these kernels."""
    about = findings.about
    source = f"qualify{' --quick' * findings.quick} on {about['name']}, torch {about['torch']}, {about['date']}"
    chosen = crossover.Crossover(
        target.arch or 0, source, tuple(findings.rules), target.num_sms, about["name"], about["kernels"]
    )
    names = ("device", "driver", "torch", "cuda", "cudnn", "date", "commit")
    return crossover.to_json(chosen, {"source": source, **{name: about.get(name) for name in names}})


def describe(session: Session, device: str) -> dict[str, Any]:
    """What the worker says of the machine. Raises RuntimeError if it can't."""
    answer = session.ask({"kind": "describe", "device": device}, LIMITS["describe"])
    if answer.result is None:
        raise RuntimeError(f"the device cannot be asked: {answer.error}")
    return answer.result


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
