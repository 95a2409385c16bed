"""What is kept of calls that repeat."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from fa_sdpa import _torch_private as private
from fa_sdpa import alike as alike_module
from fa_sdpa.alike import Alike, Memory


def pair(rows=3):
    return torch.randn(rows, 4), torch.randn(rows, 4)


def kept(memory, facts, *tensors, epoch=None):
    alike = Alike(private.same_tensors(*tensors), facts)
    memory.keep(alike, memory.epoch if epoch is None else epoch, *tensors)
    return alike


def guessed(memory, *tensors):
    return memory.latest.next if memory.latest.next.same(*tensors) else None


def test_calls_are_found_and_guessed():
    memory = Memory()
    small, large = pair(), pair(5)
    a, b = kept(memory, ("a",), *small), kept(memory, ("b",), *large)
    assert memory.find(("a",), *pair()) is a and memory.find(("b",), *pair(5)) is b
    assert memory.find(("b",), *pair()) is None and memory.find(("c",), *pair()) is None
    assert memory.find(("a",), *small) is a
    assert memory.latest.next is b  # what came after a
    assert guessed(memory, *large) is b and guessed(memory, *small) is None


def test_the_second_guess_is_what_came_the_time_before(monkeypatch):
    """As where a model has layers of one kind and then those of another: no key is made of any call."""
    memory = Memory()
    tensors = {"a": pair(), "b": pair(5)}
    made = [kept(memory, (name,), *tensors[name]) for name in "ab"]
    calls = [call for name, alike in zip("ab", made, strict=True) for call in [(name, alike)] * 4]
    guesses = []

    def call(name, alike):
        guess = memory.latest.next
        if guess.facts == (name,) and guess.same(*tensors[name]):
            memory.latest = guess
            guesses.append(1)
        else:
            assert memory.find((name,), *tensors[name]) is alike
            guesses.append(2)

    for _ in range(3):
        for one in calls:
            call(*one)
    guesses.clear()
    monkeypatch.setattr(alike_module, "_key", None)
    for _ in range(3):
        for one in calls:
            call(*one)
    assert guesses == [2, 2, 1, 1] * 6
    monkeypatch.undo()
    memory.forget()
    assert all(memory.find((name,), *tensors[name]) is None for name in "ab")


def test_like_is_like():
    memory = Memory()
    x, y = pair()
    kept(memory, (), x, y)
    unlike = [
        (x.double(), y),
        (x.mT.contiguous().mT, y),
        (x.clone().requires_grad_(), y),
        (torch._neg_view(x), y),
        (torch.nn.Parameter(x, requires_grad=False), y),
        (x[:2], y),
        (x, x),
    ]
    for tensors in unlike:
        assert guessed(memory, *tensors) is None and memory.find((), *tensors) is None
    with torch.inference_mode():
        assert guessed(memory, x, y) is None
    assert guessed(memory, *pair()) is not None


def test_one_tensor_given_twice():
    memory = Memory()
    x, y = pair()
    twice = kept(memory, (), x, x)
    other = torch.randn(3, 4)
    assert memory.find((), other, other) is twice and guessed(memory, other, other) is twice
    assert guessed(memory, x, y) is None and memory.find((), x, y) is None


def test_nothing_is_kept_alive():
    memory = Memory()
    x, y = pair()
    kept(memory, (), x, y)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_forgetting_reaches_guesses_and_the_late():
    memory = Memory()
    tensors = pair()
    alike, epoch = kept(memory, (), *tensors), memory.epoch
    memory.forget()
    assert not alike.same(*tensors) and memory.find((), *tensors) is None and guessed(memory, *tensors) is None
    late = kept(memory, (), *tensors, epoch=epoch)  # decided before, kept after
    assert not late.same(*tensors) and memory.find((), *tensors) is None


def test_a_limit():
    memory = Memory(limit=10)
    calls = [kept(memory, (n,), *pair()) for n in range(25)]
    alive = [alike for alike in calls if alike.same(*pair())]
    assert 0 < len(alive) <= 10 and calls[-1] in alive
    assert memory.find((24,), *pair()) is calls[-1]


@pytest.mark.parametrize("forgetting", [False, True])
def test_threads_only_spoil_guesses(forgetting):
    memory, wrong = Memory(limit=50), []

    def work(seed):
        for turn in range(1500):
            n = (seed + turn) % 60
            tensors = pair(1 + n % 3)
            alike = memory.latest.next
            if alike.same(*tensors) and alike.facts == (n,):
                memory.latest = alike
            else:
                alike = memory.find((n,), *tensors) or kept(memory, (n,), *tensors)
            if alike.facts != (n,):
                wrong.append(n)
            if forgetting and turn % 100 == 99:
                memory.forget()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    alike = kept(memory, ("last",), *pair())
    assert memory.find(("last",), *pair()) is alike
