"""Writes the tables of README.md from benchmarks/results/*.json, and below `$ python -m fa_sdpa explain …` what that
prints, so that no number in it is typed by hand.

python benchmarks/readme_numbers.py           rewrite what stands between <!-- NAME.json --> and <!-- end -->
python benchmarks/readme_numbers.py --check   exit status 1 where README.md differs from that
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from provenance import RESULTS, ROOT  # first: it makes this checkout importable

from fa_sdpa.__main__ import main as command_line

EXPLAIN = re.compile(r"(\$ python -m fa_sdpa explain (.*)\n).*\n")
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def kernel(content: dict[str, Any]) -> str:
    """Ours against the contenders in the grid's cells, one row per head dim and mask, one column per seqlen."""
    cells = [cell for cell in content["results"] if cell.get("group", "grid") == "grid"]
    seqlens = sorted({cell["seqlen"] for cell in cells})
    peers = [name for name in ("torch", "flash2", "fa4") if name in cells[0]]
    rows: dict[str, list[str]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["head_dim"], cell["is_causal"], cell["seqlen"])):
        entry = "/".join(f"{cell[name]:.0f}" if cell[name] else "–" for name in ("ours", *peers))
        rows.setdefault(f"d{cell['head_dim']} {'causal' if cell['is_causal'] else 'full'}", []).append(entry)
    header = [f"{content['unit']}: fa_sdpa/{'/'.join(peers)}", *map(str, seqlens)]
    return markdown(header, [[name, *entries] for name, entries in rows.items()])


def llama(content: dict[str, Any]) -> str:
    """Tokens per second of examples/llama.py --eval, without and with us."""
    rows = []
    for plain, ours in zip(content["results"][::2], content["results"][1::2], strict=True):
        rates = plain["tokens_per_second"], ours["tokens_per_second"]
        rows.append([plain["mode"], *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}×"])
    return markdown(["tokens/s", "torch", "fa_sdpa", "ratio"], rows)


def llama_train(content: dict[str, Any]) -> str:
    """Speed, memory and losses of each training run, and how far it is from torch's."""
    rows = []
    rates = {(row["mode"], row["attention"]): row["tokens_per_second"] for row in content["results"]}
    for row in sorted(content["results"], key=lambda row: row["mode"] != "eager"):
        rate, tail = row["tokens_per_second"], row["losses"][-(len(row["losses"]) // 10) :]
        ratio = rate / rates[row["mode"], "torch"]
        away = content["verdict"][row["mode"]]["apart_from_torch"].get(row["attention"])
        far = f"{away['rms']:.4f} ({away['mean']:+.4f} ± {away['error']:.4f})" if away else ""
        name = f"{row['mode']}, {row['attention'].replace(', ', ' ')}"
        rows.append([name, f"{rate:,.0f}", f"{ratio:.3f}×", f"{row['peak_bytes'] / 1e9:.1f}"])
        rows[-1] += [f"{sum(tail) / len(tail):.4f}", far]
    header = [
        "training",
        "tokens/s",
        "ratio",
        "peak GB",
        "loss, last tenth",
        "apart from torch: rms (mean ± its standard error)",
    ]
    picture = "![Loss curves of all runs, and their distance from torch's](benchmarks/results/llama_train_h100.png)"
    return f"{markdown(header, rows)}\n{picture}\n"


def first_call(content: dict[str, Any]) -> str:
    """Milliseconds of the first SDPA call of a process, by what is ready."""
    medians = content["medians_ms"]
    return markdown(["first call, ms", *medians], [["", *(f"{ms:,.1f}" for ms in medians.values())]])


def promise(content: dict[str, Any]) -> str:
    """Random calls under "auto" beside torch."""
    rows = []
    for name, found in content["summary"].items():
        share = f"{found['within_limit']:.1%}"
        rows.append([name, f"{found['times']}", share, f"{found['geomean_speedup']:.2f}×", found["worst"][0]])
    return markdown(["random calls", "times", f"at most {content['limit']} of torch's", "geomean", "worst"], rows)


def host_overhead(content: dict[str, Any]) -> str:
    """Host time of calls beside torch's, and what they are to keep to."""
    rows = [
        [row["what"], f"{row['measured']:.2f} {row['unit']}", f"{row['must']:g}", f"{row['aim']:g}"]
        for row in content["targets"]
    ]
    return markdown(["host time of a call", "measured", "must", "aim"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "sm90_forward_h100": kernel,
    "sm90_backward_h100": kernel,
    "llama_eval_h100": llama,
    "llama_train_h100": llama_train,
    "first_call_h100": first_call,
    "host_overhead_h100": host_overhead,
    "policy_promise_h100": promise,
}


def block(name: str) -> str:
    """The table of one result file and where it was measured."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    content = json.loads(path.read_text())
    about = content["provenance"]
    machine = f"{about['device']}, torch {about['torch']}, cuDNN {about['cudnn']}, {about['date']}"
    return f"{TABLES[name](content)}\n{machine}, commit {about['commit']} ([{path.name}]({path.relative_to(ROOT)})).\n"


def explanation(arguments: str) -> str:
    """What `python -m fa_sdpa explain` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command_line(["explain", *shlex.split(arguments)])
    return said.getvalue()


def main() -> None:
    text = README.read_text()
    fresh = BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)
    fresh = EXPLAIN.sub(lambda match: match[1] + explanation(match[2]), fresh)
    if "--check" not in sys.argv[1:]:
        README.write_text(fresh)
    elif fresh != text:
        sys.exit("README.md is out of date: python benchmarks/readme_numbers.py")


if __name__ == "__main__":
    main()
