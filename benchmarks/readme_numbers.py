"""Writes the tables of README.md and docs/kernels/masks.md from benchmarks/results/*.json, and below
`$ python -m fa_sdpa explain …` what that prints, so that no number in them is typed by hand.

python benchmarks/readme_numbers.py           rewrite what stands between <!-- NAME.json --> and <!-- end -->
python benchmarks/readme_numbers.py --check   exit status 1 where a page differs from that
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from provenance import RESULTS, ROOT  # first: it makes this checkout importable

from fa_sdpa.__main__ import main as command_line

EXPLAIN = re.compile(r"(\$ python -m fa_sdpa explain (.*)\n).*\n")
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


def masks(content: dict[str, Any]) -> str:
    """Ours with the mask prepared before, and the best peer, a row for each mask; d64 and d128."""
    rows: dict[str, list[str]] = {}
    cells = [cell for cell in content["results"] if cell["ratio"] and cell["head_dim"] in (64, 128)]
    for cell in sorted(cells, key=lambda cell: (cell["head_dim"], cell["seqlen"])):
        best = cell["ours"] / cell["ratio"]
        rows.setdefault(cell["mask"], []).append(f"{cell['ours']:.0f}/{best:.0f}")
    shapes = sorted({(cell["head_dim"], cell["seqlen"]) for cell in cells})
    header = [f"{content['unit']}: fa_sdpa/best of torch, cuDNN, efficient", *(f"d{d} {s}" for d, s in shapes)]
    return markdown(header, [[name, *entries] for name, entries in rows.items()])


def masks_in_full(content: dict[str, Any]) -> str:
    """Every contender in every cell."""
    names = ("ours", "ours, fresh", "ours, no mask", "torch", "cudnn", "efficient")
    rows = []
    for cell in sorted(content["results"], key=lambda cell: (cell["head_dim"], cell["seqlen"])):
        figures = [f"{cell[name]:.0f}" if cell[name] else "–" for name in names]
        ratio = f"{cell['ratio']:.2f}" if cell["ratio"] else ""
        rows.append([f"{cell['mask']}, {cell['seqlen']}, {cell['head_dim']}", *figures, ratio])
    header = ["mask, length, head dim", "prepared", "fresh", "without mask", "torch", "cuDNN", "efficient"]
    return markdown([*header, "best peer's time over ours"], rows)


def masked_models(content: dict[str, Any]) -> str:
    """transformers with masks, without and with us."""
    rows = []
    for row in content["results"]:
        times = row["torch_ms"], row["fa_sdpa_ms"]
        errors = f"{row['error_torch']:.3f}, {row['error']:.3f}"
        rows.append([f"{row['model']}, {row['mode']}", *(f"{ms:.1f}" for ms in times), f"{times[0] / times[1]:.2f}×"])
        rows[-1] += [f"{row['routed']} of {row['routed'] + row['left to torch']}", errors]
    return markdown(["ms", "torch", "fa_sdpa", "ratio", "routed", "off fp32: torch, fa_sdpa"], rows)


Tables = dict[str, Callable[[dict[str, Any]], str]]
OF_README: Tables = {
    "sm90_forward_h100": kernel,
    "sm90_backward_h100": kernel,
    "llama_eval_h100": llama,
    "llama_train_h100": llama_train,
    "first_call_h100": first_call,
    "host_overhead_h100": host_overhead,
    "policy_promise_h100": promise,
    "policy_promise_masks_h100": promise,
    "sm90_masks_h100": masks,
    "sm90_masks_training_h100": masks,
    "masked_models_h100": masked_models,
}
PAGES: dict[str, Tables] = {
    "README.md": OF_README,
    "docs/kernels/masks.md": {"sm90_masks_h100": masks_in_full, "sm90_masks_training_h100": masks_in_full},
}


def block(page: str, name: str) -> str:
    """The table of one result file and where it was measured."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    content = json.loads(path.read_text())
    about = content["provenance"]
    machine = f"{about['device']}, torch {about['torch']}, cuDNN {about['cudnn']}, {about['date']}"
    link = os.path.relpath(path, (ROOT / page).parent)
    return f"{PAGES[page][name](content)}\n{machine}, commit {about['commit']} ([{path.name}]({link})).\n"


def explanation(arguments: str) -> str:
    """What `python -m fa_sdpa explain` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command_line(["explain", *shlex.split(arguments)])
    return said.getvalue()


def written(page: str, text: str) -> str:
    """A page with its tables and explanations as they are to be."""
    text = BLOCK.sub(lambda match: match[1] + block(page, match[2]) + match[3], text)
    return EXPLAIN.sub(lambda match: match[1] + explanation(match[2]), text)


def main() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        fresh = written(page, text)
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(fresh)
        elif fresh != text:
            sys.exit(f"{page} is out of date: python benchmarks/readme_numbers.py")


if __name__ == "__main__":
    main()
