"""What comes before the first routed call, step by step, and what that call takes beside torch's own first one.

    python benchmarks/first_call.py [--runs 5] [--cold] [--out benchmarks/results/first_call_h100.json]

Every state is measured in fresh processes that take turns, on a GPU:

    torch         torch alone
    warm          the kernel is in the cache, or in the bundle that FA_SDPA_BUNDLE names; policy "auto"
    cold block    with --cold: an empty cache, jit="block"; needs the compiler
    cold background   with --cold: likewise, jit="background": how long calls go to torch, and how long one takes

A first call is timed from its start until its result is there. Exit status 1 if the median of "warm" is more than
10 ms above that of "torch".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = (1, 16, 4096, 128)  # (B, H, S, D), bf16, causal
BUDGET_MS = 10.0
STATES = {"torch": None, "warm": "background", "cold block": "block", "cold background": "background"}


class Steps:
    """Milliseconds by step, in the order of their ends; a step within another is indented."""

    def __init__(self) -> None:
        self.ms: list[tuple[str, float]] = []
        self._depth = 0

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        self._depth += 1
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._depth -= 1
            self.ms.append(("  " * self._depth + name, round(1e3 * (time.perf_counter() - start), 3)))

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Time the calls of ``owner.attribute``."""
        function = getattr(owner, attribute)
        setattr(owner, attribute, lambda *args, **kwargs: self.time(name, lambda: function(*args, **kwargs)))


def child(state: str) -> dict[str, Any]:
    """One fresh process."""
    steps = Steps()
    steps.time("import torch", lambda: __import__("torch"))
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    if state != "torch":
        fa_sdpa = steps.time("import fa_sdpa", lambda: __import__("fa_sdpa"))
        from fa_sdpa.kernels import compile as compiling
        from fa_sdpa.kernels import jit

        steps.watch(jit, "preload", "load tvm-ffi and the kernels' runtime")
        steps.time("import torch._dynamo", lambda: __import__("torch._dynamo"))
        steps.time("enable()", lambda: fa_sdpa.enable(fa_sdpa.Policy("auto", jit=STATES[state])))
    query, key, value = steps.time(
        "CUDA context and inputs",
        lambda: [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3)],
    )
    torch.cuda.synchronize()

    def call() -> None:
        with torch.no_grad():
            sdpa(query, key, value, is_causal=True)
        torch.cuda.synchronize()

    if state != "torch":
        from fa_sdpa import router
        from fa_sdpa.kernels import launch

        steps.watch(router, "decide_call", "decide")
        steps.watch(compiling, "find", "find the kernel and load its library")
        steps.watch(launch, "_make_plan", "plan the launch")
        load = compiling.library_kernel

        def load_and_watch(*args: Any) -> Any:
            kernel = load(*args)
            return lambda *tensors: steps.time("launch, which loads the code onto the GPU", lambda: kernel(*tensors))

        setattr(compiling, "library_kernel", load_and_watch)  # noqa: B010
    steps.time("first call", call)
    result: dict[str, Any] = {"first_call_ms": steps.ms[-1][1], "steps_ms": list(steps.ms)}
    if state == "cold background":
        result.update(watch_background(call, lambda: fa_sdpa.stats().eager.routed))
    elif state != "torch" and not fa_sdpa.stats().eager.routed:
        raise SystemExit(f"{state}: the first call was not routed: {fa_sdpa.stats()}")
    start = time.perf_counter()
    call()
    return {**result, "second_call_ms": round(1e3 * (time.perf_counter() - start), 3)}


def watch_background(call: Callable[[], None], routed: Callable[[], int]) -> dict[str, float]:
    """Call on until a call is routed: after how long, the longest call, the longest that another thread stood still."""
    begun, calls, pauses, done = time.perf_counter(), [0.0], [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    while not routed() and time.perf_counter() - begun < 120:
        start = time.perf_counter()
        call()
        calls.append(time.perf_counter() - start)
    done.set()
    thread.join()
    return {
        "routed_after_s": round(time.perf_counter() - begun, 2),
        "longest_call_ms": round(1e3 * max(calls), 2),
        "longest_pause_ms": round(1e3 * max(pauses), 2),
    }


def run(state: str, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "FA_SDPA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, __file__, "--child", state], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{state}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=STATES)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    import provenance

    results: dict[str, list[dict[str, Any]]] = {"torch": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        run("torch", folder)  # not counted: it reads torch's libraries from the disk
        if args.cold:  # also fills the cache of "warm"
            results["cold block"] = [run("cold block", f"{folder}/warm")]
            results["cold background"] = [run("cold background", f"{folder}/cold")]
        for _ in range(args.runs):
            for state in ("torch", "warm"):
                results[state].append(run(state, f"{folder}/warm"))
    medians = {}
    for state, runs in results.items():
        medians[state] = statistics.median(done["first_call_ms"] for done in runs)
        print(f"{state:20} first call {medians[state]:9.2f} ms, second {runs[0]['second_call_ms']:.2f} ms")
    print(*(f"{ms:10.2f} ms  {name}" for name, ms in results["warm"][-1]["steps_ms"]), sep="\n")
    for name in ("routed_after_s", "longest_call_ms", "longest_pause_ms"):
        if args.cold:
            print(f"cold background: {name} {results['cold background'][0][name]}")
    over = medians["warm"] - medians["torch"]
    print(f"warm is {over:+.2f} ms from torch; budget {BUDGET_MS} ms")
    if args.out:
        about = {"unit": "ms", "shape": SHAPE, "budget_ms": BUDGET_MS, "medians_ms": medians}
        provenance.save(args.out, results, **about)
    raise SystemExit(over > BUDGET_MS)


if __name__ == "__main__":
    main()
