"""compute-sanitizer over small cases of every code path of the SM90 forward kernel.

    python benchmarks/sm90_sanitize.py --out benchmarks/results/sm90_forward_sanitizer_h100.json

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


def run_cases() -> None:
    import torch
    from sm90_forward import Case

    torch.manual_seed(0)
    count = 0
    shapes = (
        (1, 1, 1, 1, "bhsd"),
        (7, 129, 7, 1, "bshd"),
        (129, 7, 2, 2, "unaligned"),
        (256, 256, 2, 1, "expanded_heads"),
        (300, 500, 4, 2, "packed"),
    )
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 128):
            for is_causal in (False, True):
                for q, k, heads, heads_kv, layout in shapes:
                    case = Case(dtype, head_dim, 2, heads, heads_kv, q, k, is_causal, None, layout, 4.0, True)
                    verify(case, num_sms=3)
                    count += 1
    for head_dim, is_causal, batch, heads, seqlen, num_sms in (
        (128, False, 3, 16, 700, 132),
        (128, True, 3, 16, 700, 132),  # longest first
        (64, True, 20, 16, 450, 132),  # paired, an even number of blocks
        (128, True, 12, 8, 620, 132),  # paired, an odd number of blocks
        (64, False, 1, 2, 1100, 3),  # the wide tile
        (64, True, 1, 1, 8200, 3),
    ):
        case = Case("bf16", head_dim, batch, heads, heads, seqlen, seqlen, is_causal, None, "bshd", 1.0, False)
        verify(case, num_sms)
        count += 1
    print(f"cases: {count}")


def verify(case: Case, num_sms: int) -> None:
    """One launch on ``num_sms`` CTAs at most, against fp32 math on the CPU."""
    import torch
    from sm90_forward import inputs, math_attention

    from fa_sdpa.kernels import launch

    query, key, value = inputs(case)
    launch.attention_fwd(query, key, value, is_causal=case.is_causal, scale=case.scale)
    for wanted, plan in launch._plans.items():
        launch._plans[wanted] = plan._replace(num_sms=num_sms)
    out, lse = launch.attention_fwd(query, key, value, is_causal=case.is_causal, scale=case.scale)
    query, key, value = (x.cpu().float() for x in (query, key, value))
    ref, ref_lse = math_attention(query, key, value, case.is_causal, case.scale)
    assert (out.cpu().float() - ref).abs().max().item() < 0.05 * ref.abs().max().item(), case
    assert torch.allclose(lse.cpu(), ref_lse, rtol=1e-4, atol=1e-4), case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one tool")
    parser.add_argument("--cases", action="store_true", help="only run the cases, under no tool")
    args = parser.parse_args()
    if args.cases:
        return run_cases()
    results = []
    for tool in args.tools:
        command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=kernel_cutlass", "--error-exitcode", "9"]
        try:
            done = subprocess.run(
                [*command, sys.executable, __file__, "--cases"],
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
