"""The process that checks and times, one task after the other, until its input ends. It may hang or die (session.py).

It reads one task a line and writes, each a line of JSON: any number of ``{"stage": what comes next}``, then
``{"result": …}`` or ``{"error": …}``, with ``"lost": true`` if the device answers no more and the process ends itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..bench import measure, timing
from ..bench.cells import Cell
from ..bench.contenders import brief, contender
from ..bench.provenance import provenance
from ..kernels import FAMILIES
from ..kernels.compile import source_hash
from ..meta.target import Target

Say = Callable[[str], None]


def main() -> None:
    """Answer the tasks on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"result": TASKS[task["kind"]](task, lambda stage: say(stage=stage))}
        except Exception as error:
            answer = {"error": brief(error)}
        if not _device_answers(task):
            say(**answer, lost=True)
            os._exit(1)  # nothing that needs the device could end in order
        say(**answer)


def _device_answers(task: dict[str, Any]) -> bool:
    try:
        timing.synchronize(task["device"])
        return True
    except RuntimeError:
        return False


def describe(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """The machine, the software, the device and the kernels there are for it."""
    device = torch.device(task["device"])
    target = Target.of(device)
    return {
        **provenance(),
        "device_type": target.device_type,
        "arch_number": target.arch,
        "name": target.name,
        "num_sms": target.num_sms,
        "missing": [str(reason) for reason in target.missing],
        "kernels": source_hash(target.arch) if target.arch in FAMILIES else None,
    }


def ceilings(task: dict[str, Any], say: Say) -> dict[str, float]:
    return timing.ceilings(task["device"])


def check(task: dict[str, Any], say: Say) -> str:
    """What is wrong with fa4's result, "" if nothing is."""
    cell, direction = Cell(*task["cell"]), task["direction"]
    inputs = measure.draw(cell, direction, task["device"])
    right = measure.gate.expected(inputs)
    timing.synchronize(task["device"])
    say("fa4")
    _, why = measure.prepare(contender("fa4"), direction, [inputs], right)
    timing.synchronize(task["device"])
    return why


def time(task: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    """The rows of a cell."""
    return measure.measure(
        Cell(*task["cell"]),
        task["direction"],
        [contender(name) for name in task["backends"]],
        task["device"],
        rounds=task["rounds"],
        ceilings=task["ceilings"],
        profile=False,
        say=say,
    )


TASKS: dict[str, Callable[[dict[str, Any], Say], Any]] = {
    "describe": describe,
    "ceilings": ceilings,
    "check": check,
    "time": time,
}


if __name__ == "__main__":
    main()
