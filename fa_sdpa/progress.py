"""A progress bar on a terminal; elsewhere a line for each thing done."""

from __future__ import annotations

import sys
import time


class Progress:
    """``progress(name, what)`` as each of ``total`` things is done. Writes to standard error."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._done, self._failed = total, unit, 0, 0
        self._start, self._bar = time.monotonic(), sys.stderr.isatty()

    def __call__(self, name: str, what: str, failed: bool = False) -> None:
        """``what`` became of ``name``."""
        self._done += 1
        self._failed += failed
        if not self._bar:
            print(f"{self._done}/{self._total} {name}: {what}", file=sys.stderr, flush=True)
            return
        filled = 30 * self._done // self._total
        failures = f", {self._failed} failed" if self._failed else ""
        seconds = f"{time.monotonic() - self._start:.0f} s"
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {self._done}/{self._total} {self._unit}{failures}, {seconds}"
        end = "\n" if self._done == self._total else ""
        print(f"\r{line}  {name[:60]:60}", end=end, file=sys.stderr, flush=True)
