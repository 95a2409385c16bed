"""Where results lie and where a number comes from. Every file in benchmarks/results/ is written by `save`.

Importing this makes `import fa_sdpa` find this checkout, which is what is measured, installed or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from fa_sdpa.bench.provenance import commit, provenance, save  # noqa: E402

__all__ = ["RESULTS", "ROOT", "commit", "provenance", "save"]
