"""Which crossover tables speak for a device: one that FA_SDPA_POLICY names, the user's own, the shipped one. In this
order: the first that has a rule for a call decides it. Each is read once a process."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from .kernels import FAMILIES
from .kernels.cache import say_once
from .kernels.compile import source_hash
from .meta import user
from .meta.crossover import Crossover, shipped
from .meta.spec import Reason
from .meta.target import Target


def named() -> Crossover | None:
    """The table that FA_SDPA_POLICY names; ValueError, with the file and what is wrong with it, if it is none."""
    path = os.environ.get("FA_SDPA_POLICY")
    return _load(Path(path)) if path else None


def user_path(device: str) -> Path:
    """Where the user's table for a kind of device is."""
    return user.of_device(device) / "crossover.json"


def of(target: Target) -> tuple[tuple[Crossover, ...], tuple[Reason, ...]]:
    """The tables that speak for a device, first to last, and why others do not."""
    return _of(0 if target.device_type == "cpu" else target.arch, target.name)


def forget() -> None:
    """Read the files anew when they are next asked for."""
    _of.cache_clear()
    _load.cache_clear()


@functools.cache
def _load(path: Path) -> Crossover:
    return Crossover.load(path)


@functools.cache
def _of(arch: int | None, device: str) -> tuple[tuple[Crossover, ...], tuple[Reason, ...]]:
    if arch is None:
        return (), ()
    found: list[Crossover] = []
    refused: list[Reason] = []
    asked = os.environ.get("FA_SDPA_POLICY")
    paths = [Path(asked)] if asked else []
    if device and arch and user_path(device).exists():
        paths.append(user_path(device))
    for path in paths:
        try:
            table = _load(path)
            why = unfit(table, arch, device)
            if why:
                raise ValueError(f"crossover table {path}: {why}")
            found.append(table)
        except ValueError as error:
            refused.append(Reason("table_refused", str(error)))
            say_once(f"a table is not used: {error}")
    ours = shipped(arch)
    return (*found, *((ours,) if ours else ())), tuple(refused)


def unfit(table: Crossover, arch: int, device: str) -> str:
    """Why a table does not speak for a device and these kernels; "" if it does."""
    if table.arch != arch:
        return f"it was measured on arch {table.arch}, and this is {arch}"
    if table.device is not None and device and table.device != device:
        return f"it was measured on {table.device}, and this is {device}"
    if table.kernels is not None and arch in FAMILIES and table.kernels != source_hash(arch):
        return "it was measured with other kernels: python -m fa_sdpa qualify measures again"
    return ""
