"""The log of calls: every distinct SDPA call that was decided, for ``warm --calls``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .meta.spec import AttentionSpec, mask_kind

SCHEMA = 1  # of the file
FIELDS = ("query", "key", "value", "dtype", "device", "mask", "dropout_p", "is_causal", "enable_gqa", "needs_grad")

_calls: dict[str, None] | None = None  # as JSON, in the order of their first appearance; None: nobody asked


def start() -> None:
    """Begin an empty log."""
    global _calls
    _calls = {}


def is_on() -> bool:
    """Whether a log is kept."""
    return _calls is not None


def note(where: str, call: Any) -> None:
    """Add a ``router.Call``, unless it is there already."""
    if _calls is None:
        return
    try:
        entry = {"where": where, **{name: _plain(getattr(call, name)) for name in FIELDS}}
    except (AttributeError, TypeError):  # a size known only at run time
        return
    _calls.setdefault(json.dumps(entry))


def write(path: Path) -> None:
    """Write the log."""
    entries = ",\n  ".join(_calls or ())
    path.write_text(f'{{"schema": {SCHEMA}, "calls": [\n  {entries}\n]}}\n')


def read(path: str | Path) -> list[AttentionSpec]:
    """The calls of a log that have a spec, as the router sees them. ValueError, naming the file, if it is none."""
    try:
        log = json.loads(Path(path).read_text())
        if log["schema"] != SCHEMA:
            raise ValueError(f"schema {log['schema']}, this version reads {SCHEMA}")
        return list(_specs(log["calls"]))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"log of calls {path}: {error!r}") from error


def _specs(calls: Iterable[dict[str, Any]]) -> Iterable[AttentionSpec]:
    for call in calls:
        if len(call["query"]) == len(call["value"]) == 4:
            batch, heads, seqlen_q, head_dim = call["query"]
            _, heads_kv, seqlen_k, head_dim_v = call["value"]
            yield AttentionSpec(
                getattr(torch, call["dtype"]),
                batch,
                heads,
                heads_kv,
                seqlen_q,
                seqlen_k,
                head_dim,
                head_dim_v,
                call["is_causal"],
                mask_kind(call["mask"] and getattr(torch, call["mask"])),
                call["dropout_p"],
                needs_grad=call["needs_grad"],
            )


def _plain(value: Any) -> Any:
    """A field of a call as JSON can hold it; a symbolic size by the value it was traced with."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, tuple):
        return [int(size) if isinstance(size, int) else int(size.node.hint) for size in value]
    return value
