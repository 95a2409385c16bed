"""benchmarks/policy_promise.py: what it draws, and that it sees a promise that is broken. No GPU."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import policy_promise  # noqa: E402

from fa_sdpa.bench.cells import Cell  # noqa: E402
from fa_sdpa.qualify import grid  # noqa: E402


def test_calls_cover_what_the_promise_names():
    rng = random.Random(0)
    drawn = [policy_promise.draw(rng, list(grid.HEAD_DIMS)) for _ in range(2000)]
    cells = [cell for cell, _ in drawn]
    assert min(c.seqlen_q for c in cells) < 24 and max(c.seqlen_q for c in cells) > 14000
    assert {c.batch for c in cells} == set(range(1, 65)) and {c.heads for c in cells} >= set(range(4, 65, 4))
    assert {c.heads // c.heads_kv for c in cells} == {1, 4, 7, 8} and all(4 <= c.heads <= 64 for c in cells)
    assert {c.head_dim for c in cells} == set(grid.HEAD_DIMS) and {c.is_causal for c in cells} == {
        True,
        False,
    }
    assert {way for _, way in drawn} == {"forward", "both"}
    assert max(c.bytes_of("both") for c in cells) <= grid.MOST_BYTES


def results(slow, routed=("eager", "graph"), count=200):
    cell = Cell(1, 16, 16, 512, 512, 64, 64)
    rows = []
    for i in range(count):
        ours = 1.2 if i < slow else 0.8
        of = {"gpu_ms": 1.0, "eager_ms": 1.0, "graph_ms": 1.0, "reason": ""}
        both = [{**of, "backend": "fa4", "eager_ms": ours}, {**of, "backend": "native"}]
        rows.append(policy_promise.outcome(cell, "forward", list(routed), both))
    return rows


@pytest.mark.parametrize(("slow", "kept"), [(0, True), (4, True), (5, False)])
def test_one_of_a_hundred_times_of_routed_calls_may_be_longer(slow, kept):
    about = policy_promise.summary(results(slow))  # 200 calls in two modes, in one of which some are slow
    assert policy_promise.kept(about) is kept
    assert about["routed"]["times"] == 400 and about["routed"]["within_limit"] == round(1 - slow / 400, 4)
    assert about["routed, eager"]["within_limit"] == 1 - slow / 200
    assert about["routed, graph"]["geomean_speedup"] == 1.0
    if slow:
        assert about["routed"]["worst"][0] == "forward d64 full 512 b1 h16, eager: 1.20"


def test_calls_that_are_left_to_torch_are_told_and_not_counted():
    about = policy_promise.summary([*results(0), *results(50, routed=())])
    assert policy_promise.kept(about) and about["left to torch, eager"]["within_limit"] == 0.75
    assert policy_promise.kept(policy_promise.summary(results(50, routed=())))


def test_calls_with_masks_list_their_kernels(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["promise", "--masks", "--calls", "40", "--seed", "1", "--list-keys"])
    policy_promise.main()
    names = capsys.readouterr().out.split()
    assert {name.split("_")[0] for name in names} == {"forward", "backward", "mask"}
    assert all("mask" in name for name in names) and any("bf16" in name for name in names)


def test_a_call_may_be_routed_in_eager_mode_alone():
    about = policy_promise.summary(results(4, routed=("eager",)))
    assert about["routed"]["times"] == 200 and not policy_promise.kept(about)
    assert "routed, graph" not in about and about["left to torch, graph"]["times"] == 200
