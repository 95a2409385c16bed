"""What routing costs the host: µs per eager SDPA call in each state of the router, on tensors too small to matter.

    python benchmarks/host_overhead.py [--device cuda] [--out benchmarks/results/host_overhead_cpu.json]

The states take turns in short rounds, so that a busy machine slows all of them alike. What a state costs over plain
torch is the difference between their fastest rounds; the medians are shown to tell how busy the machine was. On CUDA
the queue is drained between rounds, so that only the host's time is seen. Then the steps of a routed call one by one,
and a call in a compiled graph beside torch's op there. Fails if a call that policy leaves to torch costs more than the
budget.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import provenance  # first: it makes this checkout importable
import torch
import torch.nn.functional as F

import fa_sdpa
from fa_sdpa.ops import attention

BUDGET_US = 5.0  # what a call that policy leaves to torch may cost over plain torch


@contextlib.contextmanager
def on_in_another_thread() -> Iterator[None]:
    """The router is installed, and off in this thread."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with fa_sdpa.enable("always"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    yield
    leave.set()
    thread.join()


@contextlib.contextmanager
def after_disable() -> Iterator[None]:
    fa_sdpa.enable("always")
    fa_sdpa.disable()
    yield


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "plain torch": contextlib.nullcontext,
    "after disable()": after_disable,
    "on in another thread": on_in_another_thread,
    "left to torch by policy": lambda: fa_sdpa.enable("auto"),
    "left to torch, attn_mask": lambda: fa_sdpa.enable("always"),
    "routed": lambda: fa_sdpa.enable("always"),
}


def time_call(call: Callable[[], Any], calls: int, device: str) -> float:
    """µs per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return elapsed / calls * 1e6


def measure(device: str, dtype: torch.dtype, grad: bool, rounds: int, calls: int) -> list[dict[str, Any]]:
    q, k, v = (torch.randn(1, 1, 16, 64, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
    mask = torch.zeros(16, 16, device=device, dtype=dtype)
    attend = F.scaled_dot_product_attention
    plain, masked, other = (lambda: attend(q, k, v)), (lambda: attend(q, k, v, mask)), (lambda: torch.add(q, k))
    cases = [("SDPA", state, masked if "mask" in state else plain) for state in STATES]
    cases += [("SDPA, attn_mask", "plain torch", masked)]
    cases += [("add", state, other) for state in ("plain torch", "left to torch by policy")]
    times: dict[tuple[str, str], list[float]] = {case[:2]: [] for case in cases}
    for turn in range(rounds + 1):
        for name, state, call in cases:
            with STATES[state]():
                time_call(call, calls // 10, device)
                us = time_call(call, calls, device)
            if turn:  # the first one warms up
                times[name, state].append(us)
    rows = []
    for (name, state), took in times.items():
        base = times["SDPA, attn_mask" if "mask" in state else name, "plain torch"]
        rows.append(
            {
                "call": name,
                "state": state,
                "grad": grad,
                "fastest_us": round(min(took), 2),
                "median_us": round(statistics.median(took), 2),
                "over_torch_us": round(min(took) - min(base), 2),
            }
        )
    return rows


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int, count: int, device: str) -> dict[str, float]:
    """µs per call, the fastest of rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time_call(call, count // 10, device)
            times[name].append(time_call(call, count, device))
    return {name: min(took) for name, took in times.items()}


@torch.no_grad()
def measure_steps(
    device: str, dtype: torch.dtype, rows: list[dict[str, Any]], rounds: int, count: int
) -> dict[str, float]:
    """µs of each step of a routed call without gradients; ``rows`` are those of ``measure``."""
    q, k, v = (torch.randn(1, 1, 16, 64, device=device, dtype=dtype) for _ in range(3))
    op = torch.ops.fa4.attention_fwd.default
    op(q, k, v)
    run = attention.prepared(q, k, v, False, is_causal=False, scale=None)
    like_lse = torch.empty((), device=device).expand(q.shape[:3])
    recorded = attention.prepared(q, k, v, True, is_causal=False, scale=None)
    leaf = q.clone().requires_grad_()

    def record() -> None:
        with torch.enable_grad():
            recorded(leaf, k, v)

    def enable_grad() -> None:
        with torch.enable_grad():
            pass

    calls = {
        "record": record,
        "enable_grad": enable_grad,
        "allocation": lambda: (torch.empty_like(q), torch.empty_like(like_lse, memory_format=torch.contiguous_format)),
        "run": lambda: run(q, k, v),
        "op": lambda: op(q, k, v),
    }
    took = time_in_turns(calls, rounds, count, device)
    fastest = {row["state"]: row["fastest_us"] for row in rows if row["call"] == "SDPA" and not row["grad"]}
    steps = {
        "router: into Python and back to torch": fastest["on in another thread"] - fastest["plain torch"],
        "decision": fastest["left to torch by policy"] - fastest["on in another thread"],
        "allocation": took["allocation"],
        "launch" if device == "cuda" else "computation": took["run"] - took["allocation"],
        "recording gradients, where they are": took["record"] - took["enable_grad"] - took["run"],
        "op dispatch, where the op is called by name or in a graph": took["op"] - took["run"],
        "routed call, whole": fastest["routed"],
    }
    return {name: round(us, 2) for name, us in steps.items()}


@torch.no_grad()
def measure_graph(device: str, dtype: torch.dtype, rounds: int, count: int) -> dict[str, float]:
    """µs of an inductor graph (no CUDA graph) that is one attention call."""
    q, k, v = (torch.randn(1, 1, 16, 64, device=device, dtype=dtype) for _ in range(3))

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with fa_sdpa.enable("always"):
            return F.scaled_dot_product_attention(q, k, v)

    compiled = {"torch's op": torch.compile(plain), "routed": torch.compile(ours)}
    for function in compiled.values():
        function(q, k, v)
    took = time_in_turns(
        {name: functools.partial(function, q, k, v) for name, function in compiled.items()}, rounds, count, device
    )
    took["over_torch_us"] = took["routed"] - took["torch's op"]
    return {name: round(us, 2) for name, us in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=1000, help="calls in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.no_grad():
        rows = measure(args.device, dtype, False, args.rounds, args.calls)
    rows += measure(args.device, dtype, True, args.rounds, args.calls)
    print(f"{'µs per call':42}{'fastest':>9}{'median':>9}{'over torch':>12}")
    for row in rows:
        what = f"{row['call']}{', grad' * row['grad']}: {row['state']}"
        print(f"{what:42}{row['fastest_us']:9.2f}{row['median_us']:9.2f}{row['over_torch_us']:12.2f}")
    worst = max(row["over_torch_us"] for row in rows if "left to torch" in row["state"])
    print(f"left to torch: at most {worst:.2f} µs over plain torch, the budget is {BUDGET_US} µs")
    steps = measure_steps(args.device, dtype, rows, args.rounds, args.calls)
    for name, us in steps.items():
        print(f"{name:60}{us:9.2f}")
    graph = measure_graph(args.device, dtype, args.rounds, args.calls)
    print(f"compiled graph, µs: {graph}")
    if args.out:
        provenance.save(args.out, rows, budget_us=BUDGET_US, steps_us=steps, graph_us=graph)
    raise SystemExit(worst > BUDGET_US)


if __name__ == "__main__":
    main()
