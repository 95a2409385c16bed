"""Where a benchmark number comes from. Every file in benchmarks/results/ is written by `save`.

Importing this makes `import fa_sdpa` find this checkout, which is what is measured, installed or not.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from fa_sdpa.doctor import environment  # noqa: E402


def provenance() -> dict[str, Any]:
    """The machine, the software, the commit and the day."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {**environment(), "commit": commit(), "date": now.strftime("%Y-%m-%d %H:%M UTC")}


def commit() -> str | None:
    """The commit measured, with "+changes" where the code differs from it.

    FA_SDPA_COMMIT names it where git does not know: in a copy of the code without its history, or with an older one.
    """
    if named := os.environ.get("FA_SDPA_COMMIT"):
        return named
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != ROOT:  # inside another repository
            return None
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", ":!benchmarks/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()


def save(path: str | Path, results: Any, **about: Any) -> None:
    """Writes `{"provenance": …, **about, "results": …}` as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"provenance": provenance(), **about, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
