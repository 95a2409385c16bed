"""compute-sanitizer over small cases of every code path of the SM90 forward kernel.

    python benchmarks/sm90_sanitize.py --out benchmarks/results/sm90_forward_sanitizer_h100.json
    python benchmarks/sm90_sanitize.py --breadth --out benchmarks/results/sm90_forward_breadth_sanitizer_h200.json

Runs itself under each tool with torch's caching allocator off, so that every tensor is an allocation of its own. The
cases: every kernel variant, full and causal, one block and several, ragged and whole tiles, several tiles per CTA (the
launch is told that there are few SMs) in each tile order, GQA, copied and expanded inputs. The reference is computed on
the CPU: racecheck fails in some of cuBLAS's kernels, and these are not what is looked at.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sm90_forward import Case

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

TOOLS = ("memcheck", "racecheck", "synccheck")


def plain_cases() -> list[tuple[Case, int]]:
    """(case, num_sms) for the kernels of d64 and d128."""
    from sm90_forward import Case

    from fa_sdpa.meta.spec import Options

    shapes = (
        (1, 1, 1, 1, "bhsd"),
        (7, 129, 7, 1, "bshd"),
        (129, 7, 2, 2, "unaligned"),
        (256, 256, 2, 1, "expanded_heads"),
        (300, 500, 4, 2, "packed"),
    )
    cases = [
        (Case(dtype, d, d, 2, heads, heads_kv, q, k, Options(is_causal), False, layout, 4.0, True), 3)
        for dtype in ("bf16", "fp16")
        for d in (64, 128)
        for is_causal in (False, True)
        for q, k, heads, heads_kv, layout in shapes
    ]
    for d, is_causal, batch, heads, seqlen, num_sms in (
        (128, False, 3, 16, 700, 132),
        (128, True, 3, 16, 700, 132),  # longest first
        (64, True, 20, 16, 450, 132),  # paired, an even number of blocks
        (128, True, 12, 8, 620, 132),  # paired, an odd number of blocks
        (64, False, 1, 2, 1100, 3),  # the wide tile
        (64, True, 1, 1, 8200, 3),
    ):
        options = Options(is_causal)
        case = Case("bf16", d, d, batch, heads, heads, seqlen, seqlen, options, False, "bshd", 1.0, False)
        cases.append((case, num_sms))
    return cases


def breadth_cases() -> list[tuple[Case, int]]:
    """(case, num_sms): other head dims (a narrow WGMMA, O stored by TMA and from registers), windows, softcap, sink."""
    from sm90_forward import Case

    from fa_sdpa.meta.spec import Options

    calls = [
        *((d, dv, Options(c), False) for d, dv in ((80, 80), (256, 256), (192, 128), (64, 256)) for c in (False, True)),
        (128, 128, Options(window_left=150, window_right=30), False),
        (128, 128, Options(bottom_right=True, is_causal=True), False),
        (128, 128, Options(softcap=30.0), False),
        (128, 128, Options(is_causal=True), True),
        (256, 256, Options(bottom_right=True, window_left=40, window_right=0, softcap=30.0), True),
    ]
    return [
        (Case("bf16", d, dv, 1, 4, 2, q, k, options, sink, "bshd", 4.0, True), 2)
        for d, dv, options, sink in calls
        for q, k in ((300, 400), (400, 150))
    ]


def run_cases(cases: list[tuple[Case, int]]) -> None:
    import torch

    torch.manual_seed(0)
    for case, num_sms in cases:
        verify(case, num_sms)
    print(f"cases: {len(cases)}")


def verify(case: Case, num_sms: int) -> None:
    """One launch on ``num_sms`` CTAs at most, against fp32 math on the CPU."""
    import torch
    from sm90_forward import inputs

    from fa_sdpa import reference
    from fa_sdpa.kernels import launch

    query, key, value, sink = inputs(case)
    launch.attention_fwd(query, key, value, sink, case.options)
    for wanted, plan in launch._plans.items():
        launch._plans[wanted] = plan._replace(num_sms=num_sms)
    out, lse = launch.attention_fwd(query, key, value, sink, case.options)
    query, key, value = (x.cpu().float() for x in (query, key, value))
    sink = None if sink is None else sink.cpu()
    ref, ref_lse = reference.attention(query, key, value, sink=sink, **case.options._asdict())
    assert (out.cpu().float() - ref).abs().max().item() < 0.05 * ref.abs().max().item(), case
    assert torch.allclose(lse.cpu(), ref_lse, rtol=1e-4, atol=1e-4), case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one tool")
    parser.add_argument("--cases", action="store_true", help="only run the cases, under no tool")
    parser.add_argument("--breadth", action="store_true", help="other head dims, windows, softcap, sink")
    args = parser.parse_args()
    rerun = [sys.executable, __file__, "--cases", *(["--breadth"] if args.breadth else [])]
    if args.cases:
        return run_cases(breadth_cases() if args.breadth else plain_cases())
    results = []
    for tool in args.tools:
        command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=kernel_cutlass", "--error-exitcode", "9"]
        try:
            done = subprocess.run(
                [*command, *rerun],
                capture_output=True,
                text=True,
                timeout=args.timeout,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        except subprocess.TimeoutExpired:
            results.append({"tool": tool, "clean": False, "summary": f"did not end in {args.timeout} s"})
            continue
        output = done.stdout + done.stderr
        cases = re.search(r"cases: (\d+)", output)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        results.append(
            {
                "tool": tool,
                "clean": done.returncode == 0 and cases is not None,
                "cases": int(cases[1]) if cases else 0,
                "summary": summary[-1] if summary else output[-1000:],
            }
        )
    for result in results:
        print(result)
    if args.out:
        from provenance import save

        save(args.out, results)


if __name__ == "__main__":
    main()
