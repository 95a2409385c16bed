"""How long a call takes, of several contenders that take turns.

They go in rounds, in which each follows each other one equally often: a card's clock depends on its power and heat, so
on what ran before, and that is the same for all of them. Each figure is the median over the rounds of a contender's
share of its round, times the median of the rounds: whatever makes a round slow is the same for all, too, above all a
host that others share, which is slow for tens of turns at a time. In a round a contender makes some calls in a row,
over input sets in turn that together exceed the device's L2 cache twice where there are few enough of them. Four
figures, each per call:

    gpu_ms     the device's time: the calls wait in its queue, behind a kernel that keeps it busy until the host has
               made all of them, so that the host's time is not in it
    host_us    the host's time to make a call, from the same calls
    eager_ms   from the first call until the device is done: what a loop in eager mode gets, the longer of both
    graph_ms   the calls captured in one CUDA graph and replayed

On a CPU there is only eager_ms.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .contenders import Scope, brief

ROUNDS = 10  # at least
CALLS = 64  # at most, in a row
TURN_MS = 4.0  # that the calls of a turn take together, about
MODES = ("eager", "graph")
BLOCKED = 1.5  # times the host's time, that the device is kept busy before the calls of a turn
BLOCKED_MS, MOST_BLOCKED_MS = 0.5, 50.0  # at least; beyond which it is not tried for longer
CYCLES_PER_MS = 2_000_000  # of the fastest clock there is: a slower one waits for longer

Run = Callable[[], Any]


class Prepared(NamedTuple):
    """A contender's call, ready to be timed: one for each input set, to be made with ``scope`` open."""

    scope: Scope
    runs: Sequence[Run]


class Times(NamedTuple):
    """Medians over the rounds; None where there is no such time."""

    gpu_ms: float | None = None
    host_us: float | None = None
    eager_ms: float | None = None
    graph_ms: float | None = None
    note: str = ""  # why one of them is missing


def orders(count: int, rounds: int = ROUNDS) -> list[list[int]]:
    """``rounds`` or more orders of ``count`` contenders; within them each follows each other one equally often."""
    zigzag = [(i + 1) // 2 if i % 2 else (count - i // 2) % count for i in range(count)]
    rows = [[(x + shift) % count for x in zigzag] for shift in range(count)]
    rows += [row[::-1] for row in rows]  # what balances an odd count
    return rows * math.ceil(rounds / max(len(rows), 1))


def in_rounds(
    names: Sequence[str], time_one: Callable[[str], Any], rounds: int = ROUNDS, *, whole: bool = True
) -> dict[str, list[Any]]:
    """What ``time_one`` gives in each of the rounds over the contenders; with ``whole`` False exactly ``rounds``,
    which need not be balanced."""
    times: dict[str, list[Any]] = {name: [] for name in names}
    for order in orders(len(names), rounds)[: None if whole else rounds]:
        for i in order:
            times[names[i]].append(time_one(names[i]))
    return times


def medians(times: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """The figure of each contender, see above, from its times in each round; None where it has none."""
    known = {name: values for name, values in times.items() if any(values)}
    rounds = [found for found in zip(*known.values(), strict=True) if all(found)]  # in which none is missing
    levels = [statistics.geometric_mean(found) for found in rounds]
    figures: dict[str, float | None] = dict.fromkeys(times)
    for i, (name, values) in enumerate(known.items()):
        shares = [found[i] / level for found, level in zip(rounds, levels, strict=True)]
        own = statistics.median(value for value in values if value)
        figures[name] = statistics.median(levels) * statistics.median(shares) if rounds else own
    return figures


def measure(
    prepared: Mapping[str, Prepared],
    device: str,
    modes: Sequence[str] = MODES,
    rounds: int = ROUNDS,
    patience_ms: float = 0.0,
) -> dict[str, Times]:
    """The times of each contender. On CUDA, to be called on the stream on which the runs were prepared.

    ``patience_ms``: how long eager mode may take in all, in more rounds, where the host sets the pace of a contender: a
    host that others share is now busy, now not.
    """
    names = list(prepared)
    calls = {name: _calls(prepared[name], device) for name in names}
    whole = rounds >= ROUNDS
    parts: dict[str, dict[str, Any]] = {name: {} for name in names}

    def add(column: str, times: dict[str, list[Any]]) -> None:
        for name, value in medians(times).items():
            parts[name][column] = value

    eager_rounds = rounds
    if device == "cuda":
        host_us: dict[str, float] = {}  # of each one's last turn

        def on_device(name: str) -> tuple[float | None, float]:
            found = _gpu_ms_host_us(prepared[name], calls[name], host_us.get(name, 1e3 * TURN_MS / calls[name]))
            host_us[name] = found[1]
            return found

        both = in_rounds(names, on_device, rounds, whole=whole)
        add("gpu_ms", {name: [pair[0] for pair in pairs] for name, pairs in both.items()})
        add("host_us", {name: [pair[1] for pair in pairs] for name, pairs in both.items()})
        if any(found["gpu_ms"] is None or found["host_us"] > 1e3 * found["gpu_ms"] for found in parts.values()):
            eager_rounds = max(rounds, round(patience_ms / (TURN_MS * len(names))))
    if "eager" in modes or device != "cuda":
        add("eager_ms", in_rounds(names, lambda n: _eager_ms(prepared[n], calls[n], device), eager_rounds, whole=whole))
    if "graph" in modes and device == "cuda":
        graphs = {}
        for name in names:
            try:
                graphs[name] = _capture(prepared[name], calls[name])
            except Exception as error:  # each peer has its own way to refuse
                parts[name]["note"] = f"in a CUDA graph: {brief(error)}"
        add("graph_ms", in_rounds(list(graphs), lambda n: _replay_ms(graphs[n], calls[n]), rounds, whole=whole))
    return {name: Times(**values) for name, values in parts.items()}


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def _calls(prepared: Prepared, device: str) -> int:
    """How many calls in a row take about TURN_MS. Warms up."""
    _eager_ms(prepared, min(len(prepared.runs), 4), device)
    return min(max(math.ceil(TURN_MS / max(_eager_ms(prepared, 3, device), 1e-3)), 1), CALLS)


def _make(runs: Sequence[Run], calls: int) -> None:
    for i in range(calls):
        runs[i % len(runs)]()


def _eager_ms(prepared: Prepared, calls: int, device: str) -> float:
    with prepared.scope():
        prepared.runs[0]()  # what opening the scope has put off
        synchronize(device)
        start = time.perf_counter()
        _make(prepared.runs, calls)
        synchronize(device)
        return 1e3 * (time.perf_counter() - start) / calls


def _gpu_ms_host_us(prepared: Prepared, calls: int, expected_us: float) -> tuple[float | None, float]:
    """(ms on the device, None if it did not wait for the host; µs on the host) of one call, that is expected to take
    the host about so long."""
    with prepared.scope():
        prepared.runs[0]()
        blocked_ms = max(BLOCKED * 1e-3 * expected_us * calls, BLOCKED_MS)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(round(blocked_ms * CYCLES_PER_MS))
            start.record()
            began = time.perf_counter()
            _make(prepared.runs, calls)
            host = time.perf_counter() - began
            end.record()
            waited = not start.query()
            torch.cuda.synchronize()
            if waited:
                return start.elapsed_time(end) / calls, 1e6 * host / calls
            if blocked_ms > MOST_BLOCKED_MS:  # the calls themselves wait for the device
                return None, 1e6 * host / calls
            blocked_ms *= 2


def _capture(prepared: Prepared, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with prepared.scope():
        prepared.runs[0]()
        torch.cuda.synchronize()
        # A backward runs on its forward's stream, so that one has to be captured.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            _make(prepared.runs, calls)
    graph.replay()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    replays = 3 if calls == CALLS else 1  # of a short graph several, against what starting one takes
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (replays * calls)


# ---- what the device can do ------------------------------------------------------------------------------------------


def ceilings(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """TFLOP/s of a large matrix product in ``dtype``, GB/s of a large copy (bytes read and written): the rates that
    results are compared with, measured in the same run. Empty on a CPU."""
    if device != "cuda":
        return {}
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    matmul = _median_ms(lambda: torch.mm(a, b, out=c))
    copy = _median_ms(lambda: target.copy_(source))
    return {
        "matmul_tflops": round(2 * size**3 / matmul / 1e9, 1),
        "copy_gbs": round(2 * source.numel() / copy / 1e6, 1),
    }


def _median_ms(run: Run, calls: int = 10, rounds: int = 7) -> float:
    times = []
    run()
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _make([run], calls)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)
