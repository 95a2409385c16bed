"""make demo: two runs of examples/llama.py, and the verdict on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_demo_routes_every_kind_of_call():
    pytest.importorskip("transformers")
    small = "--device cpu --steps 3 --seqlen 32 --batch 2 --generate 8".split()
    done = subprocess.run([sys.executable, EXAMPLES / "demo.py", *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # 2 layers: 3 training steps, the prompt, and 7 steps of one token.
    assert "SDPA calls   22 routed to fa4, 0 left to torch" in done.stdout
    assert "15 bytes, all the same" in done.stdout


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    return demo.compare


def result(losses, generated=b"abcd"):
    return {"dtype": "float32", "losses": losses, "generated": generated.hex(), "seconds": 1.0}


COUNTS = {"routed": 5, "native": 0}


def test_demo_accepts_what_is_within_the_tolerance(compare, capsys):
    assert compare(result([2.0, 1.0]), result([2.0, 1.0001], b"abXd"), COUNTS) == []
    assert "same up to 2" in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[2.0, 1.5], [2.0, float("nan")]])
def test_demo_fails_on_other_losses(compare, losses):
    assert compare(result([2.0, 1.0]), result(losses), COUNTS) == ["the losses differ by more than the tolerance"]


def test_demo_fails_where_nothing_was_routed(compare):
    same = result([1.0])
    assert compare(same, same, {"routed": 0, "native": 5}) == ["no SDPA call was routed"]
