"""Kernels that failed on a device of this machine, as ``qualify`` found: their calls are never routed.

A file of the user's, for one kind of device, read once a process. An entry holds for the sources that the kernel was
built from: a newer version of it gets another chance.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..meta import user
from ..meta.spec import AttentionSpec, Reason
from ..meta.target import Target
from . import launch
from .cache import say_once
from .compile import source_hash
from .key import KernelKey

SCHEMA = 1
OFF = "FA_SDPA_IGNORE_QUARANTINE"  # set for those who try the kernels again


def refusals(spec: AttentionSpec, target: Target) -> tuple[Reason, ...]:
    """Why a call is not routed on ``target``, though a kernel exists: empty if none of its kernels failed there."""
    failed = known(target.name) if target.device_type == "cuda" and target.name else {}
    if not failed:
        return ()
    return tuple(
        Reason("quarantined", f"kernel {key.name} failed on this machine: {failed[key.name]}")
        for key in launch.keys(spec, target)
        if key.name in failed
    )


@functools.cache
def known(device: str) -> Mapping[str, str]:
    """Kernel → why it is in quarantine on a kind of device, if what failed is what would run now."""
    if os.environ.get(OFF):
        return {}
    return {
        name: f"{entry['reason']} ({entry['date']})"
        for name, entry in read(path_of(device)).items()
        if entry["source"] == source_hash(KernelKey.parse(name).arch)
    }


def path_of(device: str) -> Path:
    return user.of_device(device) / "quarantine.json"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file, none where there is none. One that can't be read is reported, and does not count."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
        entries = content["kernels"]
        for name, entry in entries.items():
            KernelKey.parse(name), entry["reason"], entry["date"], entry["source"]
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say_once(f"the quarantine {path} cannot be read, and holds nothing back: {error!r}")
        return {}


def write(device: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Replace the quarantine of a kind of device; its path. Entries have ``reason``, ``date`` and ``source``."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps({"schema": SCHEMA, "device": device, "kernels": entries}, indent=1) + "\n")
    scratch.replace(path)
    known.cache_clear()
    return path
