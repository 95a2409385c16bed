"""What routing costs the host: µs per SDPA call in each state of the router, on tensors too small to matter.

    python -m fa_sdpa bench host [--device cuda] [--json benchmarks/results/host_overhead_cpu.json]

The states take turns in short rounds, so that a busy machine slows all of them alike. What a state costs over plain
torch is the difference between their fastest tenths of a round; the medians are shown to tell how busy the machine
was. On CUDA the queue is drained in between, so that only the host's time is seen. Then the steps of a routed call one
by one, and a call in a compiled graph beside torch's op there. Fails if a target is missed: on a CPU, where the
computation counts too, only that of calls that are left to torch is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fa_sdpa

from .. import _torch_private as private
from .. import router
from ..meta.spec import Options
from ..ops import attention
from ..state import token_of
from . import provenance

SHAPE = (1, 1, 16, 64)
PARTS = 10  # of a round, timed one by one: the shorter, the sooner one is not disturbed
LAYERS = 8  # calls that a model makes for one token; fewer than a part has, so that each has a new length
LENGTHS = 64
GENERATION = "SDPA, generating text"


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
    "left to torch, attn_mask": lambda: fa_sdpa.enable("auto"),
    "routed": lambda: fa_sdpa.enable("always"),
    "routed, attn_mask": lambda: fa_sdpa.enable("always"),
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


def backward_of(state: str, call: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A call that runs the backward of an SDPA call that was made in ``state``."""
    with STATES[state](), torch.enable_grad():
        call()
        out = call()  # as calls that repeat are recorded
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def generation(device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The calls of a model that generates text: one query, and keys and values of which each token adds one."""
    size = SHAPE[0], SHAPE[1], LENGTHS, SHAPE[3]
    q = torch.randn(*size[:2], 1, size[3], device=device, dtype=dtype)
    keys, values = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    k = v = keys

    def tokens() -> Iterator[None]:
        nonlocal k, v
        while True:
            router._forget_decisions()  # to the router the lengths are new, as to a model's
            for length in range(1, LENGTHS + 1):
                k, v = keys[:, :, :length], values[:, :, :length]
                yield from itertools.repeat(None, LAYERS)

    following = tokens()

    def call() -> torch.Tensor:
        next(following)
        return F.scaled_dot_product_attention(q, k, v)

    for _ in range(LENGTHS * LAYERS):
        call()  # cuDNN plans for each length when it first comes, 40 ms
    return call


def measure(device: str, dtype: torch.dtype, grad: bool, rounds: int, calls: int) -> list[dict[str, Any]]:
    """µs per call of SDPA, of its backward if ``grad``, and of another op, one row for each state."""
    q, k, v = (torch.randn(SHAPE, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
    mask = torch.zeros(SHAPE[2], SHAPE[2], device=device, dtype=dtype)
    attend = F.scaled_dot_product_attention
    plain, masked, other = (lambda: attend(q, k, v)), (lambda: attend(q, k, v, mask)), (lambda: torch.add(q, k))
    cases = [("SDPA", state, masked if "mask" in state else plain) for state in STATES]
    cases += [("SDPA, attn_mask", "plain torch", masked)]  # the same mask in every call, as in the layers of a model
    cases += [("add", state, other) for state in ("plain torch", "left to torch by policy")]
    if grad:
        cases += [("backward", state, backward_of(state, plain, (q, k, v))) for state in ("plain torch", "routed")]
        cases += [
            (name, state, backward_of(state, masked, (q, k, v)))
            for name, state in (("backward, attn_mask", "plain torch"), ("backward", "routed, attn_mask"))
        ]
    else:
        cases += [
            (GENERATION, state, generation(device, dtype)) for state in ("plain torch", "left to torch by policy")
        ]
    times: dict[tuple[str, str], list[float]] = {case[:2]: [] for case in cases}
    for turn in range(rounds + 1):
        for name, state, call in cases:
            with STATES[state]():
                time_call(call, calls // 10, device)
                took = [time_call(call, calls // PARTS, device) for _ in range(PARTS)]
            if turn:  # the first one warms up
                times[name, state] += took
    rows = []
    for (name, state), took in times.items():
        base = times[f"{name}, attn_mask" if "mask" in state else name, "plain torch"]
        rows.append(
            {
                "call": name,
                "state": state,
                "grad": grad,
                "fastest_us": round(min(took), 2),
                "median_us": round(statistics.median(took), 2),
                "over_torch_us": round(min(took) - min(base), 2),
                "of_torch": round(min(took) / min(base), 3),
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


def measure_steps(
    device: str, dtype: torch.dtype, rows: list[dict[str, Any]], rounds: int, count: int
) -> dict[str, float]:
    """µs of each step of a routed call; ``rows`` are those of ``measure``."""
    q, k, v = (torch.randn(SHAPE, device=device, dtype=dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    op, bwd, options = torch.ops.fa4.attention_fwd.default, torch.ops.fa4.attention_bwd.default, Options()
    out, lse = op(q, k, v)
    inputs = (torch.randn_like(out), q, k, v, out, lse)
    bwd(*inputs)
    forward, backward = attention._direct_fwd(options, q, k, v), attention._direct_bwd(options, *inputs)
    recorded = attention.prepared(leaves[0], leaves[1], leaves[2], needs_grad=True, is_causal=False, scale=None)
    token, same = token_of("always"), private.same_tensors(q, k, v)
    facts, modes = router._facts(token, None, 0.0, False, None, False), router._modes()
    empty = private.empty_strided_cuda if device == "cuda" else lambda *layout: torch.empty_strided(*layout[:2])
    layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in (out, lse)]

    def allocate() -> None:
        for layout in layouts:
            empty(*layout)

    with torch.no_grad():
        took = time_in_turns(
            {
                "allocation": allocate,
                "forward": lambda: forward(q, k, v),
                "backward": lambda: backward(*inputs),
                "op": lambda: op(q, k, v),
                "decision": lambda: (
                    same(q, k, v)
                    and facts == router._facts(token, None, 0.0, False, None, False)
                    and modes == (private.is_grad_enabled(), private.is_deterministic())
                    and private.undisturbed()  # as in sdpa
                ),
            },
            rounds,
            count,
            device,
        )
    took |= time_in_turns({"recorded": lambda: recorded(*leaves)}, rounds, count, device)
    fastest = {(row["call"], row["state"], row["grad"]): row["fastest_us"] for row in rows}
    routed = fastest["SDPA", "routed", False]
    work = "launch" if device == "cuda" else "computation"
    steps = {
        "routed call": routed,
        "  router: from C++ into Python and back": routed - took["decision"] - took["forward"],
        "  decision": took["decision"],
        "  allocation": took["allocation"],
        f"  {work}": took["forward"] - took["allocation"],
        "routed call, gradients recorded": fastest["SDPA", "routed", True],
        "  recording": took["recorded"] - took["forward"],
        "routed backward": fastest["backward", "routed", True],
        "  autograd and decision": fastest["backward", "routed", True] - took["backward"],
        f"  allocation and {work}": took["backward"],
        "op dispatch, where the op is called by name or in a graph": took["op"] - took["forward"],
    }
    return {name: round(us, 2) for name, us in steps.items()}


@torch.no_grad()
def measure_graph(device: str, dtype: torch.dtype, rounds: int, count: int) -> dict[str, float]:
    """µs of an inductor graph (no CUDA graph) that is one attention call."""
    q, k, v = (torch.randn(SHAPE, device=device, dtype=dtype) for _ in range(3))

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


def targets(device: str, rows: list[dict[str, Any]], graph: dict[str, float]) -> list[dict[str, Any]]:
    """What calls may cost beside torch's, and what they do."""
    table: list[tuple[str, str, float, float, float]] = []
    if device == "cuda":
        of_torch = {(row["call"], row["state"], row["grad"]): row["of_torch"] for row in rows}
        for mask in ("", ", attn_mask"):
            state = f"routed{mask}"
            table += [
                (f"routed forward{mask}", "of torch", 1.1, 0.8, of_torch["SDPA", state, False]),
                (f"routed forward{mask}, gradients recorded", "of torch", 1.3, 1.0, of_torch["SDPA", state, True]),
                (f"routed backward{mask}", "of torch", 1.3, 1.0, of_torch["backward", state, True]),
            ]
        table.append(("routed, in a compiled graph", "µs over torch", 8.0, 3.0, graph["over_torch_us"]))
    for row in rows:
        if "left to torch" in row["state"] and row["call"] in ("SDPA", GENERATION):
            what = f"left to torch{row['call'].removeprefix('SDPA')}{', attn_mask' * ('mask' in row['state'])}"
            what += ", gradients recorded" * row["grad"]
            table.append((what, "µs over torch", 5.0, 3.0, row["over_torch_us"]))
    names = ("what", "unit", "must", "aim", "measured")
    return [dict(zip(names, row, strict=True)) for row in table]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fa_sdpa bench host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=100, help="calls in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.no_grad():
        rows = measure(args.device, dtype, False, args.rounds, args.calls)
    rows += measure(args.device, dtype, True, args.rounds, args.calls)
    print(f"{'µs per call':42}{'fastest':>9}{'median':>9}{'over torch':>12}{'of torch':>10}")
    for row in rows:
        what = f"{row['call']}{', grad' * row['grad']}: {row['state']}"
        numbers = f"{row['fastest_us']:9.2f}{row['median_us']:9.2f}{row['over_torch_us']:12.2f}{row['of_torch']:10.2f}"
        print(f"{what:42}{numbers}")
    steps = measure_steps(args.device, dtype, rows, args.rounds, args.calls)
    for name, us in steps.items():
        print(f"{name:60}{us:9.2f}")
    graph = measure_graph(args.device, dtype, args.rounds, args.calls)
    print(f"compiled graph, µs: {graph}")
    reached = targets(args.device, rows, graph)
    for row in reached:
        print(f"{row['what']:42}{row['measured']:9.2f} {row['unit']}, must {row['must']}, aim {row['aim']}")
    if args.json:
        provenance.save(args.json, rows, targets=reached, steps_us=steps, graph_us=graph)
    raise SystemExit(any(row["measured"] > row["must"] for row in reached))


if __name__ == "__main__":
    main()
