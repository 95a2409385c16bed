"""What routing costs the host: µs per eager SDPA call in each state of the router, on tensors too small to matter.

    python -m fa_sdpa bench host [--device cuda] [--json benchmarks/results/host_overhead_cpu.json]

The states take turns in short rounds, so that a busy machine slows all of them alike. What a state costs over plain
torch is the difference between their fastest rounds; the medians are shown to tell how busy the machine was. On CUDA
the queue is drained between rounds, so that only the host's time is seen. Fails if a call that policy leaves to torch
costs more than the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fa_sdpa

from . import provenance

BUDGET_US = 6.0  # what a call that policy leaves to torch may cost over plain torch


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fa_sdpa bench host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=1000, help="calls in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

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
    if args.json:
        provenance.save(args.json, rows, budget_us=BUDGET_US)
    raise SystemExit(worst > BUDGET_US)


if __name__ == "__main__":
    main()
