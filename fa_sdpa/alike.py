"""Calls that repeat: what was found out about one is kept, and the next one like it is served by that.

Whether two calls are alike takes one C++ call for their tensors (``private.same_tensors``) and one comparison for the
rest. Which call to compare with is guessed: the one that came after this one the last time, since a model makes its
calls in the same order again and again. After a wrong guess the one that came the time before is tried, as where layers
of one kind end and those of another begin; a second wrong guess costs a dictionary lookup.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _torch_private as private


class Alike:
    """Calls that are alike: what tells them from others, and what is known of them.

    Args:
        same: whether tensors are like those of the call that was kept, here and now; not to be asked about nested ones.
        facts: all else that has to be equal.
        run: what serves such a call; None if that is torch.
        tick: counts one.
        modes: the modes of the process and thread that have to be as they were.
        unless: says, asked last, whether a call is another one after all, here and now.
        by_query: the token under which the query alone tells that a call is one of these, and torch's, whatever comes
            with it: then only that is asked for, and ``same`` is of one tensor. "" where all of the call matters.
    """

    __slots__ = ("same", "facts", "run", "tick", "modes", "unless", "by_query", "next", "other")

    def __init__(
        self,
        same: Callable[..., bool],
        facts: tuple[Any, ...],
        run: Callable[..., Any] | None = None,
        tick: Callable[[], Any] = lambda: None,
        modes: tuple[Any, ...] = (),
        unless: Callable[[], bool] | None = None,
        by_query: str = "",
    ) -> None:
        self.same, self.facts, self.run, self.tick, self.modes, self.unless = same, facts, run, tick, modes, unless
        self.by_query = by_query
        self.next = self  # those that came after these the last time
        self.other = self  # and those that did before that

    def forget(self) -> None:
        """No call is like these any more."""
        self.same = never


def never(*tensors: Tensor) -> bool:
    """The check of no call."""
    return False


class Memory:
    """The calls that are kept. Callers compare with ``latest.next`` themselves, before they ask ``find``::

        alike = memory.latest.next
        if alike.same(*tensors) and alike.facts == facts:
            memory.latest = alike

    Nothing here takes a lock, which the child of a fork could find held: another thread may spoil a guess, and never
    more than the guess.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._kept: dict[tuple[Any, ...], Alike] = {}
        self._epochs = itertools.count(1)
        self.epoch = 0  # changes whenever all is forgotten
        self.latest = Alike(never, ())

    def find(self, facts: tuple[Any, ...], *tensors: Tensor, modes: tuple[Any, ...] = ()) -> Alike | None:
        """Those like a call with these plain strided tensors, hashable facts, by which calls with more or fewer tensors
        are told apart, and modes, if one of them was kept."""
        found = self.latest.other
        if found.facts == facts and found.modes == modes and found.same(*tensors):
            self._follow(found)
            return found
        known = self._kept.get(_key((*facts, *modes), tensors))
        if known is None or not known.same(*tensors):
            return None
        self._follow(known)
        return known

    def keep(self, alike: Alike, epoch: int, *tensors: Tensor, modes: tuple[Any, ...] = ()) -> None:
        """Keep a call that was made in these modes, and find those that are like it from now on, unless all that was
        known at ``epoch`` has been forgotten since."""
        if len(self._kept) >= self._limit and epoch == self.epoch:
            self.forget()
            epoch = self.epoch
        key = _key((*alike.facts, *modes), tensors)
        self._kept[key] = alike
        self._follow(alike)
        if epoch != self.epoch:  # looked at last: what is put in after the epoch changed may have been missed there
            alike.forget()
            self._kept.pop(key, None)

    def _follow(self, alike: Alike) -> None:
        """After the latest call came this one, which was not the first guess."""
        latest = self.latest
        latest.other, latest.next = latest.next, alike
        self.latest = alike

    def forget(self) -> None:
        """Forget every call, in all threads."""
        self.epoch = next(self._epochs)
        for alike in list(self._kept.values()):
            alike.forget()  # guesses of any thread may lead there
        self._kept.clear()
        self.latest = Alike(never, ())


def _key(facts: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What finds a call again. It may leave out what ``same`` looks at."""
    metadata = [(type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors]
    return (*facts, *metadata, private.repeated(tensors))
