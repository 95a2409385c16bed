"""Attention with an attn_mask on one GPU: numerics gate first, then the forward's speed against torch's backends.

    python benchmarks/sm90_masks.py --cases 3000 --out benchmarks/results/sm90_masks_h100.json

``--training`` does the same for forward and backward together, and the numerics of the backward.
``--list-keys`` prints the kernels that a bundle must hold to run the same command line where there is no compiler.

Numerics: mask_cases.py has the rule, mask_backward_cases.py that of the backward. A failing case ends the run with
status 1 before anything is timed. ``--jobs 6`` shares the cases among six processes, with seeds of their own.

Speed: random bf16 data, (B, S, H, D) memory seen as (B, H, S, D), 16,384 tokens, 2048 // d heads; contenders take turns
as in sm90_forward.py, and each round is do_bench's median (L2 flushed before each call). TFLOP/s from all flops,
4·B·H·S²·D, in training 14, whatever the mask hides. "ours" reuses what it prepared of the mask, as the layers of a
model do; in training it is torch's SDPA routed. "ours, fresh" prepares it in every call; in training it is a CUDA graph
of one step. The ratio is the best peer's time over ours. d64 and d128; other head dims with two of the masks, for the
crossover table.

    padding     (B, 1, 1, S) bool, lengths evenly from S / 2 to S
    triangle    (1, 1, S, S) bool, and the same in bf16 with -inf
    random      (1, 1, S, S) bool, half of the keys
    bias        (1, H, S, S) bf16, normal, and the same in fp32
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))

from forward_cases import H100, Case, inputs  # noqa: E402
from mask_backward_cases import RULE, check_backward, random_backward_case  # noqa: E402
from mask_cases import RULE as FORWARD_RULE  # noqa: E402
from mask_cases import check, gate, keys_of, random_masked_case, spec_of  # noqa: E402
from provenance import save  # noqa: E402
from sm90_forward import TOKENS, Run, bench_ms  # noqa: E402

import fa_sdpa  # noqa: E402
from fa_sdpa import kernels  # noqa: E402
from fa_sdpa.bench.contenders import brief  # noqa: E402
from fa_sdpa.bench.host import on_in_another_thread  # noqa: E402
from fa_sdpa.kernels import launch, masks  # noqa: E402
from fa_sdpa.meta.spec import MaskKind, Options  # noqa: E402

MASKS: dict[str, MaskKind] = {
    "padding": "bool",
    "triangle": "bool",
    "triangle, bf16": "bf16",
    "random": "bool",
    "bias": "bf16",
    "bias, fp32": "fp32",
}
PEERS = {"torch": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


class Cell(NamedTuple):
    mask: str  # of MASKS
    seqlen: int
    head_dim: int

    @property
    def case(self) -> Case:
        heads = 2048 // self.head_dim
        return Case("bf16", self.head_dim, self.head_dim, TOKENS // self.seqlen, heads, heads, self.seqlen, self.seqlen)

    @property
    def flops(self) -> float:
        case = self.case
        return 4.0 * case.batch * case.heads * case.seqlen_q * case.seqlen_k * case.head_dim

    def make(self) -> Tensor:
        """Its mask."""
        return make_mask(self.mask, TOKENS // self.seqlen, 2048 // self.head_dim, self.seqlen)


def make_mask(kind: str, batch: int, heads: int, size: int) -> Tensor:
    """One of MASKS for so many queries and keys."""
    if kind == "padding":
        lengths = torch.linspace(size // 2, size, batch, device="cuda").long()
        return (torch.arange(size, device="cuda") < lengths[:, None])[:, None, None]
    if kind == "random":
        return torch.rand(1, 1, size, size, device="cuda") < 0.5
    if kind in ("bias", "bias, fp32"):
        dtype = torch.bfloat16 if kind == "bias" else torch.float32
        return torch.randn(1, heads, size, size, device="cuda", dtype=dtype)
    triangle = torch.ones(1, 1, size, size, device="cuda", dtype=torch.bool).tril()
    if kind == "triangle":
        return triangle
    return torch.zeros(triangle.shape, device="cuda", dtype=torch.bfloat16).masked_fill(~triangle, -math.inf)


GRID = [Cell(mask, size, d) for d in (64, 128) for size in (128, 256, 512, 1024, 4096) for mask in MASKS]
BREADTH = [Cell(mask, size, d) for d in (80, 96, 192, 256) for size in (512, 1024, 4096) for mask in ("random", "bias")]
LONG = 1024  # from here on a cell of GRID is in the summary


def cells_of(names: Sequence[str], training: bool) -> list[Cell]:
    """The cells of these masks that there are kernels for."""

    def runs(cell: Cell) -> bool:
        return not kernels.unsupported(spec_of(cell.case, MASKS[cell.mask], training), H100)

    return [cell for cell in (*GRID, *BREADTH) if cell.mask in names and runs(cell)]


def contenders(mask: Tensor) -> dict[str, Run]:
    """Name → call of query, key and value with this mask, ours first."""

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with masks.in_eager_mode():
            return launch.attention_fwd(query, key, value, None, Options(), mask)[0]

    def fresh(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return launch.attention_fwd(query, key, value, None, Options(), mask)[0]

    def unmasked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return launch.attention_fwd(query, key, value, None, Options())[0]

    def peer(backend: SDPBackend | None) -> Run:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(query, key, value, mask)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, mask)

        return call

    peers = {name: peer(backend) for name, backend in PEERS.items()}
    return {"ours": ours, "ours, fresh": fresh, "ours, no mask": unmasked, **peers}


def trainers(mask: Tensor, dout: Tensor) -> dict[str, Run]:
    """The same for out and gradients, through autograd; all of them in one tensor would be a copy, so dK alone."""

    def routed(mask: Tensor | None) -> Run:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with fa_sdpa.enable(fa_sdpa.Policy("always", jit="block")):
                return F.scaled_dot_product_attention(query, key, value, mask)

        return call

    def train(forward: Run) -> Run:
        def call(*tensors: Tensor) -> Tensor:
            leaves = [x.detach().requires_grad_() for x in tensors]
            return torch.autograd.grad(forward(*leaves), leaves, dout)[1]

        return call

    forwards = contenders(mask)
    peers = {name: train(forwards[name]) for name in PEERS}
    ours = train(routed(mask))
    return {"ours": ours, "ours, fresh": in_graph(ours), "ours, no mask": train(routed(None)), **peers}


def in_graph(call: Run) -> Run:
    """``call`` as a CUDA graph of it, made of the first tensors that it gets."""
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replay(*tensors: Tensor) -> Tensor:
        if not captured:
            call(*tensors)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call(*tensors)
            captured.append((graph, out))
        graph, out = captured[0]
        graph.replay()
        return out

    return replay


def measure(cell: Cell, chosen: list[str], training: bool) -> dict[str, Any]:
    """A cell's row, with these peers."""
    tensors, mask = inputs(cell.case)[:3], cell.make()
    found = trainers(mask, torch.randn_like(tensors[0])) if training else contenders(mask)
    runs: dict[str, Run] = {name: run for name, run in found.items() if name not in PEERS or name in chosen}
    refused = {}
    routed_before = fa_sdpa.stats().routed
    expected = runs["ours"](*tensors)
    if training and fa_sdpa.stats().routed == routed_before:
        raise RuntimeError(f"{cell} was left to torch: {fa_sdpa.stats().reasons}")
    for name in chosen:
        try:
            out = runs[name](*tensors)
            off = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
            why = "" if off < 0.02 else f"its result differs from ours by {off:.3g} of the norm"
        except Exception as error:  # each has its own way to refuse
            why = brief(error)
        if why:
            refused[name] = why
            del runs[name]
    row: dict[str, Any] = {
        "cell": f"{cell.mask} s{cell.seqlen} d{cell.head_dim}",
        **cell._asdict(),
    }
    row |= dict.fromkeys(("ours", "ours, fresh", "ours, no mask", *PEERS))
    flops = cell.flops * (3.5 if training else 1.0)
    row |= {name: round(flops / ms / 1e9, 1) for name, ms in bench_ms(runs, [tensors]).items()}
    peers = [row[name] for name in PEERS if row[name]]
    row["ratio"] = round(row["ours"] / max(peers), 4) if peers else None
    return row | ({"refused": refused} if refused else {})


def tables(rows: list[dict[str, Any]]) -> str:
    names = ("ours", "ours, fresh", "ours, no mask", *PEERS)
    lines = ["".ljust(28) + "".join(name.rjust(14) for name in names) + "   ratio"]
    for row in rows:
        figures = "".join(f"{row[name]:14.1f}" if row[name] else "-".rjust(14) for name in names)
        lines.append(row["cell"].ljust(28) + figures + (f"{row['ratio']:8.2f}" if row["ratio"] else "       -"))
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geomean and minimum of the ratios for each mask, at d64 and d128 from LONG tokens on."""
    long = [row for row in rows if row["ratio"] and row["seqlen"] >= LONG and row["head_dim"] in (64, 128)]
    found = {mask: [row["ratio"] for row in long if row["mask"] == mask] for mask in MASKS}
    return {
        mask: {"geomean": round(statistics.geometric_mean(ratios), 4), "minimum": min(ratios)}
        for mask, ratios in found.items()
        if ratios
    }


def gate_in_processes(cases: int, seed: int, jobs: int, training: bool) -> dict[str, Any]:
    """What ``gate`` finds in so many processes, which have the seeds from ``seed`` on. One that ends without a result
    is a failure with its last words."""
    what = [sys.executable, __file__, "--no-cells", "--cases", str(cases // jobs), *["--training"] * training]

    def run(job: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "numerics.json"
            done = subprocess.run(
                [*what, "--seed", str(seed + job), "--out", str(path)], capture_output=True, text=True, check=False
            )
            if path.exists():
                return json.loads(path.read_text())["numerics"]
        said = (done.stdout + done.stderr)[-2000:]
        return {"cases": 0, "failed": 1, "failures": [{"seed": seed + job, "message": f"{done.returncode}: {said}"}]}

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return joined(list(pool.map(run, range(jobs))))


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What several gates found, as one."""
    done = [one for one in found if one["cases"]]
    cases = sum(one["cases"] for one in done)
    failures = [{"seed": one.get("seed"), **failure} for one in found for failure in one.get("failures", ())]
    return {
        "rule": done[0]["rule"] if done else None,
        "cases": cases,
        "seeds": [one["seed"] for one in done],
        "failed": sum(one["failed"] for one in found),
        "worst_error_over_bound": max((one["worst_error_over_bound"] for one in done), default=None),
        "mean_error_over_bound": sum(one["mean_error_over_bound"] * one["cases"] for one in done) / max(cases, 1),
        "worst_lse_error": max((one["worst_lse_error"] for one in done), default=None),
        **({"failures": failures} if failures else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cases", type=int, default=600, help="random numerics cases; 0 skips the gate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the numerics cases")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--no-cells", action="store_true", help="time nothing")
    parser.add_argument("--masks", nargs="*", default=list(MASKS), choices=MASKS, help="whose cells are timed")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="what to compare with")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    args = parser.parse_args()
    if args.cases % args.jobs:
        parser.error("--jobs must divide --cases")
    draw, judged = (random_backward_case, check_backward) if args.training else (random_masked_case, check)
    cells = cells_of(args.masks, args.training)
    if args.list_keys:
        seeds = range(args.seed, args.seed + args.jobs)
        cases = [draw(seed, index) for seed in seeds for index in range(args.cases // args.jobs)]
        calls = [*((masked.case, masked.dtype) for masked in cases), *((cell.case, MASKS[cell.mask]) for cell in cells)]
        plain = {key for cell in cells for key in launch.keys(spec_of(cell.case, None, args.training), H100)}
        keys = [*keys_of(calls, needs_grad=args.training), *sorted(plain, key=lambda key: key.name)]
        return print("\n".join(key.name for key in keys))
    about: dict[str, Any] = {"numerics": None}
    if args.cases and args.jobs > 1:
        about["numerics"] = gate_in_processes(args.cases, args.seed, args.jobs, args.training)
    elif args.cases:
        about["numerics"] = gate(
            args.cases, args.seed, draw=draw, judge=judged, rule=RULE if args.training else FORWARD_RULE
        )
        print(f"numerics: {about['numerics']}", flush=True)
    failed = args.cases and about["numerics"]["failed"]
    rows = []
    if not failed and not args.no_cells:
        with on_in_another_thread():  # so that turning it on, here, is quick
            rows = [measure(cell, args.peers, args.training) for cell in cells]
    if rows:
        about |= {"summary": summary(rows), "protocol": (__doc__ or "").split("Speed: ")[1].strip()}
        print(tables(rows))
        print(about["summary"])
    if args.out:
        save(args.out, rows, unit="TFLOP/s", **about)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
