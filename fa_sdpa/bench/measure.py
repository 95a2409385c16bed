"""One row for each cell, direction and contender: right or not, which kernel, how fast, against whom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import gate, timing
from .cells import DTYPES, Cell, Direction
from .contenders import NATIVE, OURS, Contender, brief, chosen_by_torch, kernels_of
from .gate import Inputs
from .timing import CALLS, MODES, ROUNDS, Prepared

Row = dict[str, Any]
COLUMNS = (  # of a row, in this order
    *("cell", *Cell._fields, "direction", "backend", "reason", "gpu_ms", "host_us", "eager_ms", "graph_ms"),
    *("tflops", "share_of_matmul", "share_of_copy", "ratio_gpu", "ratio_eager", "ratio_graph", "chosen", "kernel"),
)
MEMORY_SHARE = 0.3  # of what is free, for all input sets and what a forward saves

Say = Callable[[str], None]


def measure(
    cell: Cell,
    direction: Direction,
    contenders: Sequence[Contender],
    device: str,
    *,
    modes: Sequence[str] = MODES,
    rounds: int = ROUNDS,
    ceilings: dict[str, float] | None = None,
    patience_ms: float = 0.0,
    profile: bool = True,
    say: Say = lambda name: None,
    attn_mask: Tensor | None = None,
) -> list[Row]:
    """The rows of a cell, one for each contender; one without times says why in ``reason``.

    Args:
        modes: of timing.MODES.
        rounds: how often each contender's turn comes; what is below timing.ROUNDS is quick and rough.
        ceilings: what ``timing.ceilings`` gave.
        patience_ms: see timing.measure.
        profile: find the kernel that torch's choice runs; it costs some 0.1 s.
        say: hears who comes next, so that one who listens in another process knows whom to blame.
        attn_mask: (1 | B, 1 | H, 1 | Sq, 1 | Sk), the same one in every call.
    """
    how = modes, rounds, patience_ms, profile, say, attn_mask
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):  # one that can be captured, for forward and backward alike
            rows = _measure(cell, direction, contenders, device, *how)
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
    else:
        rows = _measure(cell, direction, contenders, device, *how)
    for row in rows:
        _add_rates(row, cell, direction, ceilings or {})
    add_ratios(rows)
    return rows


def _measure(
    cell: Cell,
    direction: Direction,
    contenders: Sequence[Contender],
    device: str,
    modes: Sequence[str],
    rounds: int,
    patience_ms: float,
    profile: bool,
    say: Say,
    attn_mask: Tensor | None,
) -> list[Row]:
    rows = {c.name: _blank(cell, direction, c.name) for c in contenders}
    try:
        say("inputs")
        sets = [draw(cell, direction, device) for _ in range(_num_sets(cell, direction, device))]
        sets = [inputs._replace(attn_mask=attn_mask) for inputs in sets]
    except RuntimeError as error:  # no memory
        for row in rows.values():
            row["reason"] = f"no inputs: {brief(error)}"
        return list(rows.values())
    right: list[gate.Expected] | str
    try:
        right = gate.expected(sets[0])
    except RuntimeError as error:  # torch cannot compute in this dtype
        right = brief(error)
    ready: dict[str, Prepared] = {}
    for contender in contenders:
        say(contender.name)
        row = rows[contender.name]
        try:
            prepared, row["reason"] = prepare(contender, direction, sets, right)
            if prepared is None:
                continue
            ready[contender.name] = prepared
            if contender.name == NATIVE:
                query, key, value = sets[0][:3]
                row["chosen"] = chosen_by_torch(query, key, value, cell.is_causal) if attn_mask is None else None
                if device == "cuda" and profile:
                    row["kernel"] = kernels_of(prepared.runs[0])
        except Exception as error:  # each peer has its own way to refuse
            row["reason"] = brief(error)
    say("timing")
    try:
        taken = timing.measure(ready, device, modes, rounds, patience_ms)
    except RuntimeError as error:  # no memory, most likely
        for name in ready:
            rows[name]["reason"] = f"while it was timed: {brief(error)}"
        return list(rows.values())
    for name, times in taken.items():
        rows[name] |= {column: _digits(value) for column, value in times._asdict().items() if column != "note"}
        rows[name]["reason"] = rows[name]["reason"] or times.note
    return list(rows.values())


def _blank(cell: Cell, direction: Direction, backend: str) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    return row | {"cell": str(cell), **cell._asdict(), "direction": direction, "backend": backend, "reason": ""}


def _digits(value: float | None) -> float | None:
    """Five digits are more than a time is good for."""
    return None if value is None else float(f"{value:.5g}")


# ---- inputs ----------------------------------------------------------------------------------------------------------


def draw(cell: Cell, direction: Direction, device: str) -> Inputs:
    """Random tensors, (B, S, H, D) memory seen as (B, H, S, D), as a projection leaves them."""

    def tensor(heads: int, seqlen: int, head_dim: int) -> Tensor:
        x = torch.randn(cell.batch, seqlen, heads, head_dim, device=device).to(DTYPES[cell.dtype]).transpose(1, 2)
        return x.requires_grad_(direction != "forward")

    query = tensor(cell.heads, cell.seqlen_q, cell.head_dim)
    key = tensor(cell.heads_kv, cell.seqlen_k, cell.head_dim)
    value = tensor(cell.heads_kv, cell.seqlen_k, cell.head_dim_v)
    dout = None if direction == "forward" else tensor(cell.heads, cell.seqlen_q, cell.head_dim_v).detach()
    return Inputs(query, key, value, dout, cell.is_causal)


def _num_sets(cell: Cell, direction: Direction, device: str) -> int:
    """So many that they exceed the L2 cache twice, if there is memory for that; on a CPU two."""
    if device != "cuda":
        return 2
    size = max(cell.bytes_of("forward" if direction == "forward" else "both"), 1)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    room = int(MEMORY_SHARE * torch.cuda.mem_get_info()[0] / size)
    return max(min(math.ceil(2 * l2 / size), room, CALLS), 1)


# ---- one contender ---------------------------------------------------------------------------------------------------


def prepare(
    contender: Contender, direction: Direction, sets: Sequence[Inputs], right: Sequence[gate.Expected] | str
) -> tuple[Prepared | None, str]:
    """What to time, or None and why not: it refuses, or its result is wrong, or for the reason ``right`` nobody knows
    what is right."""
    with contender.scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every backend that does not take a call
        first = sets[0]
        why = contender.refuses(*_arguments(first))
        if why:
            return None, why
        results = _results(contender, direction, first)
        if isinstance(right, str):
            return None, f"there is no reference: {right}"
        wrong = gate.judge(results, right)
        if wrong:
            return None, f"wrong: {wrong}"
        del results
        return Prepared(contender.scope, [_run(contender, direction, inputs) for inputs in sets]), ""


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Of a contender's call."""
    query, key, value, _, is_causal, attn_mask = inputs
    return (query, key, value, is_causal) if attn_mask is None else (query, key, value, is_causal, attn_mask)


def _results(contender: Contender, direction: Direction, inputs: Inputs) -> list[Tensor]:
    """out, and with a backward the gradients; no NaN that memory held before can pass for a result unseen."""
    out = contender.call(*_arguments(inputs))
    if inputs.dout is None:
        return [out]
    return [out, *torch.autograd.grad(out, inputs[:3], inputs.dout)]


def _run(contender: Contender, direction: Direction, inputs: Inputs) -> timing.Run:
    call, arguments, leaves, dout = contender.call, _arguments(inputs), inputs[:3], inputs.dout
    if direction == "forward":
        return lambda: call(*arguments)
    if direction == "both":
        return lambda: torch.autograd.grad(call(*arguments), leaves, dout)
    out = call(*arguments)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# ---- what is made of the times ---------------------------------------------------------------------------------------


def time_of(row: Row) -> float | None:
    """ms on the device, or on a CPU in all."""
    return row["gpu_ms"] or row["eager_ms"] or row["graph_ms"]


def _add_rates(row: Row, cell: Cell, direction: Direction, ceilings: dict[str, float]) -> None:
    ms = time_of(row)
    if not ms:
        return
    row["tflops"] = _digits(cell.flops_of(direction) / ms / 1e9)
    if ceilings:
        row["share_of_matmul"] = _digits(row["tflops"] / ceilings["matmul_tflops"])
        row["share_of_copy"] = _digits(cell.bytes_of(direction) / ms / 1e6 / ceilings["copy_gbs"])


def add_ratios(rows: Iterable[Row]) -> None:
    """To our row: the best peer's time over ours, by each measure; above 1 we are ahead."""
    rows = list(rows)
    ours = [row for row in rows if row["backend"] == OURS]
    for row in ours:
        peers = [peer for peer in rows if peer["backend"] != OURS]
        for column, name in (("gpu_ms", "ratio_gpu"), ("eager_ms", "ratio_eager"), ("graph_ms", "ratio_graph")):
            times = [peer[column] for peer in peers if peer[column]]
            row[name] = _digits(min(times) / row[column]) if times and row[column] else None
