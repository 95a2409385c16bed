"""What ``stats()`` says: how many calls were routed or left to torch, and by which reasons."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from .meta.spec import Decision

Where = Literal["eager", "compiled"]


class Counts(NamedTuple):
    """Decisions of one kind of call. ``reasons`` counts each reason's code once a decision, routed or native."""

    routed: int
    native: int
    reasons: dict[str, int]


class Stats(NamedTuple):
    """``eager`` counts calls. ``compiled`` counts decisions made while Dynamo traced: one for every SDPA call in a
    graph each time that graph is traced, however often it runs afterwards."""

    eager: Counts
    compiled: Counts

    @property
    def routed(self) -> int:
        return self.eager.routed + self.compiled.routed

    @property
    def native(self) -> int:
        return self.eager.native + self.compiled.native

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(self.eager.reasons) + Counter(self.compiled.reasons))


class Tally(NamedTuple):
    """Counts the calls that share a backend and the codes of its reasons."""

    routed: bool
    codes: tuple[str, ...]  # of the reasons
    tick: Callable[[], int]  # counts one call: a single C call, so threads need no lock, which would cost 0.2 µs
    counter: itertools.count[int]

    @property
    def calls(self) -> int:
        return int(repr(self.counter)[len("count(") : -1])  # the one way to read an itertools.count


_Key = tuple[Where, bool, tuple[str, ...]]  # the codes of its reasons come last
_tallies: dict[_Key, Tally] = {}
_counted_before: Counter[_Key] = Counter()  # the last reset_stats()
_lock = threading.Lock()


def tally(where: Where, decision: Decision) -> Tally:
    """The tally that counts decisions like this one."""
    codes = tuple(reason.code for reason in decision.reasons)
    key = (where, decision.routed, codes)
    with _lock:
        if key not in _tallies:
            counter = itertools.count()
            _tallies[key] = Tally(decision.routed, codes, counter.__next__, counter)
        return _tallies[key]


def stats() -> Stats:
    """The decisions of all threads since the start or the last ``reset_stats()``. A call that is made where routing
    is off is not counted."""
    with _lock:
        calls = {key: tally.calls - _counted_before[key] for key, tally in _tallies.items()}
    return Stats(_counts(calls, "eager"), _counts(calls, "compiled"))


def reset_stats() -> None:
    """Count from zero."""
    with _lock:
        _counted_before.update({key: tally.calls - _counted_before[key] for key, tally in _tallies.items()})


def _counts(calls: dict[_Key, int], where: Where) -> Counts:
    backends: Counter[bool] = Counter()
    reasons: Counter[str] = Counter()
    for (place, routed, codes), n in calls.items():
        if place == where and n:
            backends[routed] += n
            reasons.update(dict.fromkeys(codes, n))
    return Counts(backends[True], backends[False], dict(reasons.most_common()))
