"""A Llama of about 1B parameters trained by examples/llama.py, eager and compiled, without and with us; with a plot.

    python benchmarks/llama_train.py --out benchmarks/results/llama_train_h100.json   # runs, then plots
    python benchmarks/llama_train.py --plot benchmarks/results/llama_train_h100.json  # only plots, beside the file
    python benchmarks/llama_train.py --list-keys         # the kernels that a bundle must hold where nothing compiles

300 steps of one sequence of 4096 bytes of Python's standard library: 974M parameters in bf16, 16 layers, hidden size
2048, 16 query and 4 key/value heads of 128, AdamW on fp32 copies of the weights. Compiled means every decoder layer
with fullgraph=True; a model compiled as a whole hands SDPA a dense mask (README, Limits).

Runs, all in one process, all on the same batches in the same order:
    torch            torch's default backend (cuDNN on Hopper)
    torch, repeated  the same again: what its nondeterminism alone does, if it has any
    torch, Flash-2   the same weights at the start, torch's other fused backend: what other rounding does
    torch, seed 1    other weights at the start
    fa_sdpa          as torch, routed by policy
Two runs are apart by the root mean square, over the last two thirds of the steps, of the difference of their losses on
the same batch. fa_sdpa must be no further from torch than the furthest of torch's own runs; the distances of those that
start from the same weights are printed beside it. Nor may its losses be lower or higher on average: the mean difference
must be 0 at the 95 % level, by the method of batch means, as neighbouring steps have like differences, or smaller than
that of one of torch's own runs. Every attention call must have taken the way its run is named by: counted by
``fa_sdpa.stats()`` and, forward and backward, by the kernels that a profiler sees in one step. Exit status 1 if not, or
if the loss did not fall.

Speed: tokens over the seconds of all steps, after warm-up steps from other weights that are thrown away. Peak memory is
torch.cuda.max_memory_allocated of the timed steps, model and optimizer included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from provenance import ROOT, save
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa
from fa_sdpa.kernels import launch
from fa_sdpa.meta.spec import AttentionSpec
from fa_sdpa.policy import Policy

sys.path.insert(0, str(ROOT / "examples"))
import llama  # noqa: E402

SHAPE = ("batch", "seqlen", "layers", "heads", "kv_heads", "head_dim")
WARM_UP, WARM_UP_SEED = 3, 12345  # steps, and the seed of their data
WINDOW = 10  # steps whose mean is drawn
BLOCKS = 10  # of steps, whose means are taken to be independent
QUANTILE = 2.262  # of Student's t, for 95 % with BLOCKS - 1 degrees of freedom
KERNELS = {  # what runs attention, by the kernels' names
    "fa_sdpa": (r"fa_sdpakernelssm\d+forward", r"fa_sdpakernelssm\d+backward"),
    "torch": (
        r"sdpa_sm\d+_flash_fprop|flash_fwd_|fmha_cutlassF",
        r"sdpa_sm\d+_flash_bprop|flash_bwd_dq_dk_dv|fmha_cutlassB",
    ),
}


class Run(NamedTuple):
    name: str
    compiled: bool
    routed: bool = False
    backend: SDPBackend | None = None
    seed: int = 0  # of the weights

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"

    def __str__(self) -> str:
        return f"{self.mode} {self.name}"


# What matters most comes first in case time runs out.
RUNS = [
    *(
        Run(*fields)
        for compiled in (False, True)
        for fields in (
            ("torch", compiled),
            ("fa_sdpa", compiled, True),
            ("torch, Flash-2", compiled, False, SDPBackend.FLASH_ATTENTION),
        )
    ),
    *(Run("torch, seed 1", compiled, seed=1) for compiled in (False, True)),
    *(Run("torch, repeated", compiled) for compiled in (False, True)),
]


def copy_of_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


class Trial:
    """The model, which all runs share, and its data."""

    def __init__(self, args: argparse.Namespace) -> None:
        shape = [word for name in SHAPE for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        self.args, self.policy = args, Policy(args.policy, jit="block")
        self.options = llama.parse([*shape, "--device", args.device, "--dtype", "bfloat16"])
        self.model = llama.build(self.options)
        self.weights = {0: copy_of_weights(self.model)}
        self.data = llama.batches(llama.corpus(), self.options, args.steps)
        self.options.seed = WARM_UP_SEED
        self.warm_up = llama.batches(llama.corpus(), self.options, WARM_UP)

    def start_from(self, seed: int) -> None:
        """The weights of ``seed``, and none of what an earlier run left."""
        if seed not in self.weights:
            self.options.seed = seed
            self.weights[seed] = copy_of_weights(llama.build(self.options))
        self.model.load_state_dict(self.weights[seed])
        self.model.zero_grad()
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def set_mode(self, run: Run) -> None:
        """Compiled code of another run does not know which of torch's backends is allowed, in memory or on disk."""
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()
        torch.compiler.config.cache_key_tag = f"routed: {run.routed}, backend: {run.backend}"
        if run.compiled:
            llama.compile_layers(self.model)

    @contextlib.contextmanager
    def attention_of(self, run: Run) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if run.backend is not None:
                stack.enter_context(sdpa_kernel(run.backend))
            if run.routed:
                stack.enter_context(fa_sdpa.enable(self.policy))
            yield

    def measure(self, run: Run) -> dict[str, Any]:
        """One run's row."""
        start = time.perf_counter()
        self.set_mode(run)
        self.start_from(run.seed)
        fa_sdpa.reset_stats()
        with self.attention_of(run):
            llama.train(self.model, self.warm_up, self.args.lr)
            kernels = self.profile()
            self.start_from(run.seed)
            llama.synchronize(self.options.device)
            begin = time.perf_counter()
            losses = llama.train(self.model, self.data, self.args.lr)
            llama.synchronize(self.options.device)
            seconds = time.perf_counter() - begin
        stats, steps = fa_sdpa.stats(), WARM_UP + len(self.data) + (kernels is not None)
        return {
            "mode": run.mode,
            "attention": run.name,
            "tokens_per_second": round(sum(batch.numel() for batch in self.data) / seconds, 1),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.options.device.type == "cuda" else None,
            "seconds": round(seconds, 2),
            "seconds_with_warm_up": round(time.perf_counter() - start, 2),
            "parameters": self.model.num_parameters(),
            "calls": {"eager": stats.eager._asdict(), "compiled": stats.compiled._asdict()},
            "kernels_of_a_step": kernels,
            "wrong": wrong_way(run, stats, kernels, steps, self.args.layers),
            "losses": [round(loss, 5) for loss in losses],
        }

    def profile(self) -> dict[str, int] | None:
        """How often each kernel of attention runs in one training step; None on a CPU."""
        if self.options.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            llama.train(self.model, self.warm_up[:1], self.args.lr)
            torch.cuda.synchronize()
        wanted = re.compile("|".join(pattern for patterns in KERNELS.values() for pattern in patterns))
        names = (event.name for event in profiler.events())
        return dict(Counter(name[:80] for name in names if wanted.search(name)))


def wrong_way(run: Run, stats: fa_sdpa.Stats, kernels: dict[str, int] | None, steps: int, layers: int) -> list[str]:
    """What shows that attention calls of a run went another way than they should."""
    found = []
    if run.routed:
        expected = 0 if run.compiled else layers * steps
        if stats.native or stats.eager.routed != expected or run.compiled != bool(stats.compiled.routed):
            found.append(f"{stats} where {expected} eager calls should be routed, and none left to torch")
    elif stats.routed or stats.native:
        found.append(f"{stats} where routing is off")
    if kernels is not None:
        for owner, patterns in KERNELS.items():
            ran = [sum(n for name, n in kernels.items() if re.search(pattern, name)) for pattern in patterns]
            is_owner = (owner == "fa_sdpa") == run.routed
            if not all(n % layers == 0 and (n > 0) == is_owner for n in ran):
                found.append(f"kernels of {owner}: {ran} forward and backward in a step of {layers} layers")
    return found


# ---- judgement -------------------------------------------------------------------------------------------------------


class Distance(NamedTuple):
    """Of two curves over their last two thirds, of the differences of losses."""

    rms: float
    mean: float
    error: float  # standard error of the mean


def apart(losses: list[float], others: list[float]) -> Distance:
    """How far two curves are apart."""
    differences = [a - b for a, b in zip(losses, others, strict=True)][len(losses) // 3 :]
    mean = math.fsum(differences) / len(differences)
    rms = math.sqrt(math.fsum(x * x for x in differences) / len(differences))
    size = len(differences) // BLOCKS
    means = [math.fsum(differences[i * size : (i + 1) * size]) / max(size, 1) for i in range(BLOCKS)]
    center = math.fsum(means) / BLOCKS
    variance = math.fsum((x - center) ** 2 for x in means) / (BLOCKS - 1)
    return Distance(rms, mean, math.sqrt(variance / BLOCKS))


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each mode: distances to torch's run, and what is wrong with ours."""
    verdict: dict[str, Any] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        curves = {row["attention"]: row["losses"] for row in rows if row["mode"] == mode}
        wrong = [f"{row['attention']}: {text}" for row in rows if row["mode"] == mode for text in row["wrong"]]
        base = curves.get("torch")
        distances = {name: apart(losses, base) for name, losses in curves.items() if base and name != "torch"}
        mine = distances.get("fa_sdpa")
        noise = [distance for name, distance in distances.items() if name != "fa_sdpa"]
        if mine and noise:
            if not mine.rms <= max(own.rms for own in noise):  # so written, a NaN is too much
                wrong.append(f"fa_sdpa is {mine.rms:.3g} from torch, further than torch's own runs")
            if not abs(mine.mean) <= max(QUANTILE * mine.error, *(abs(own.mean) for own in noise)):
                wrong.append(f"fa_sdpa's losses are {mine.mean:+.3g} on average, standard error {mine.error:.3g}")
        tenth = max(len(base or ()) // 10, 1)
        for name, losses in curves.items():
            if len(losses) >= 100 and not math.fsum(losses[-tenth:]) / tenth < 0.75 * losses[0]:
                wrong.append(f"{name}: the loss did not fall")
        verdict[mode] = {
            "apart_from_torch": {name: distance._asdict() for name, distance in distances.items()},
            "wrong": wrong,
        }
    return verdict


def table(rows: list[dict[str, Any]]) -> str:
    """One line a run."""
    verdict = judge(rows)
    lines = [
        f"\n{'':28}{'tokens/s':>10}{'peak GB':>9}{'loss':>9}{'apart':>10}{'mean ± s.e.':>19}   (loss of the last tenth)"
    ]
    for row in rows:
        tail = row["losses"][-max(len(row["losses"]) // 10, 1) :]
        away = verdict[row["mode"]]["apart_from_torch"].get(row["attention"])
        far = f"{away['rms']:10.4f}{away['mean']:+10.4f} ± {away['error']:.4f}" if away else ""
        peak = f"{(row['peak_bytes'] or 0) / 1e9:9.2f}"
        name = f"{row['mode']} {row['attention']}"
        lines.append(f"{name:28}{row['tokens_per_second']:10,.0f}{peak}{sum(tail) / len(tail):9.4f}{far}")
    return "\n".join(lines)


# ---- plot ------------------------------------------------------------------------------------------------------------

COLOURS = {"fa_sdpa": "C3", "torch": "black", "torch, repeated": "C7", "torch, Flash-2": "C0", "torch, seed 1": "C2"}


def smooth(losses: list[float]) -> list[float]:
    """Means over WINDOW steps, the first ones over as many as there are."""
    return [
        math.fsum(part) / len(part) for i in range(len(losses)) for part in [losses[max(i - WINDOW + 1, 0) : i + 1]]
    ]


def plot(path: Path) -> Path:
    """The curves of a result file as a PNG beside it, which carries the file's digest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(path.read_text())
    rows, about = content["results"], content["provenance"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = pyplot.figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(modes), height_ratios=(3, 2))
    together = figure.add_subplot(grid[0, :])
    for row in rows:
        style = "-" if row["mode"] == "eager" else "--"
        label, width = f"{row['attention']}, {row['mode']}", 1.8 if row["attention"] == "fa_sdpa" else 1.0
        together.plot(smooth(row["losses"]), style, color=COLOURS[row["attention"]], label=label, linewidth=width)
    together.set(ylabel=f"loss, mean of {WINDOW} steps", title=title(content))
    together.legend(ncols=2, fontsize="small")
    for i, mode in enumerate(modes):
        curves = {row["attention"]: row["losses"] for row in rows if row["mode"] == mode}
        axes = figure.add_subplot(grid[1, i])
        furthest = 0.0
        for name in sorted(curves, key=lambda name: name == "fa_sdpa"):  # ours on top
            if name != "torch" and "torch" in curves:
                differences = smooth([a - b for a, b in zip(curves[name], curves["torch"], strict=True)])
                axes.plot(differences, color=COLOURS[name], label=name, linewidth=1.2)
                furthest = max(furthest, *map(abs, differences[len(differences) // 3 :]))
        if furthest:
            axes.set_ylim(-1.3 * furthest, 1.3 * furthest)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss minus torch's, same batch", title=mode)
        axes.legend(fontsize="small")
    figure.supxlabel(f"{about['device']}, torch {about['torch']}, {about['date']}, {about['commit']}", fontsize="small")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110, metadata={"Comment": digest(path)})
    pyplot.close(figure)
    return target


def title(content: dict[str, Any]) -> str:
    shape = content["shape"]
    parameters = content["results"][0]["parameters"] / 1e9
    return (
        f"Llama, {parameters:.2f}B parameters, bf16, {shape['batch']} × {shape['seqlen']} tokens a step, same batches"
    )


def digest(path: Path) -> str:
    """What tells whether a PNG was drawn from this result file."""
    return "results " + hashlib.sha256(path.read_bytes()).hexdigest()


# ---- command line ----------------------------------------------------------------------------------------------------


def keys(args: argparse.Namespace) -> list[str]:
    """Names of the kernels that routed runs may launch."""
    from forward_cases import H100

    sizes = (args.batch, args.heads, args.kv_heads, args.seqlen, args.seqlen, args.head_dim, args.head_dim)
    spec = AttentionSpec(torch.bfloat16, *sizes, is_causal=True, needs_grad=True)
    return sorted(key.name for key in launch.keys(spec, H100, any_size=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write, after every run; the plot goes beside it")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only judge this result file anew and plot it")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--policy", default="auto", help="of the routed runs")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="only the first N runs")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no run is begun")
    args = parser.parse_args()
    if args.plot:
        content = json.loads(args.plot.read_text())
        content["verdict"] = judge(content["results"])
        args.plot.write_text(json.dumps(content, indent=1) + "\n")
        return print(table(content["results"]), plot(args.plot), sep="\n")
    if args.list_keys:
        return print("\n".join(keys(args)))
    start = time.perf_counter()
    trial = Trial(args)
    shape = {name: getattr(args, name) for name in ("policy", "steps", "lr", *SHAPE)} | {"dtype": "bfloat16"}
    rows: list[dict[str, Any]] = []
    for run in RUNS[: args.runs]:
        longest = max((row["seconds_with_warm_up"] for row in rows), default=0.0)
        if time.perf_counter() - start + longest > args.budget:
            print(f"{run}: left out, {args.budget:.0f} s are over")
            continue
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            rows.append(trial.measure(run))
        took = rows[-1]["seconds_with_warm_up"]
        print(
            f"{run}: {rows[-1]['tokens_per_second']:,.0f} tokens/s, {took:.0f} s in all {rows[-1]['wrong']}", flush=True
        )
        if args.out:
            save(args.out, rows, shape=shape, verdict=judge(rows))
    print(table(rows))
    wrong = [text for about in judge(rows).values() for text in about["wrong"]]
    if args.out:
        try:
            print(plot(args.out))
        except ImportError as error:
            print(f"no plot: {error}; python benchmarks/llama_train.py --plot {args.out} draws it elsewhere")
    if len(rows) < min(args.runs, len(RUNS)):
        wrong.append("runs were left out")
    sys.exit("; ".join(wrong) or 0)


if __name__ == "__main__":
    main()
