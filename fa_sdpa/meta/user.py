"""The user's folder of settings: what ``qualify`` found out about a device of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path


def directory() -> Path:
    """FA_SDPA_CONFIG_DIR, or ``fa_sdpa`` in $XDG_CONFIG_HOME or ~/.config."""
    named = os.environ.get("FA_SDPA_CONFIG_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path("~/.config").expanduser()) / "fa_sdpa"


def of_device(name: str) -> Path:
    """The folder of one kind of device, by its name: ``crossover.json`` and ``quarantine.json`` in it are used."""
    return directory() / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown")
