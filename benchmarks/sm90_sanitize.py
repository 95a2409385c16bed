"""compute-sanitizer over small cases of every code path of the SM90 forward kernel.

    python benchmarks/sm90_sanitize.py --out benchmarks/results/sm90_forward_sanitizer_h100.json

Runs itself under each tool, all tools at the same time, with torch's caching allocator off, so that every tensor is an
allocation of its own. The cases: every kind of kernel (`code_path`), one block and several, ragged and whole tiles,
several tiles per CTA (the launch is told that there are few SMs) in each tile order, GQA, copied and expanded inputs.
tests/test_kernels.py checks that no code path of the random numerics cases is missing. ``--list-keys`` prints the
kernels that a bundle must hold.

Only our kernels are looked at. Inputs are drawn on the CPU and copied, so that initcheck knows them written without
looking at any kernel of torch's, and the reference is computed on the CPU. initcheck sees plain loads and stores, but
neither what TMA loads nor what it stores: it must report a control, a sink that nobody wrote, and it does not check
copies to the CPU, where it took every output for uninitialised, with a backtrace for each run of bytes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forward_cases import Case

    from fa_sdpa.kernels.key import KernelKey

sys.path.insert(0, str(Path(__file__).resolve().parent))

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def code_path(key: KernelKey) -> tuple[Any, ...]:
    """What two kernels share that differ only in dtype and head dims: the roles' control flow, all but the widths."""
    from fa_sdpa.kernels.sm90.config import ForwardConfig

    fields = dataclasses.asdict(key)
    widths = {name: fields.pop(name) for name in ("head_dim", "head_dim_v", "tile_n")}
    del fields["dtype"]
    stores_by_tma = ForwardConfig(**widths, tile_m=key.tile_m, stages=key.stages).stores_by_tma
    return (*sorted(fields.items()), stores_by_tma)


def cases() -> list[tuple[Case, int]]:
    """(case, how many SMs the second launch is told of)"""
    from forward_cases import Case

    from fa_sdpa.meta.spec import Options

    causal = Options(is_causal=True)
    shapes = (
        (1, 1, 1, 1, "bhsd"),
        (7, 129, 7, 1, "bshd"),
        (129, 7, 2, 2, "unaligned"),
        (256, 256, 2, 1, "expanded_heads"),
        (300, 500, 4, 2, "packed"),
    )
    plain = [
        Case(
            dtype,
            *(d, d, 2, heads, heads_kv, q, k),
            Options(is_causal),
            layout_q="bshd" if layout.startswith("expanded") else layout,
            layout_kv=layout,
        )
        for dtype, d in (("bf16", 64), ("fp16", 128))
        for is_causal in (False, True)
        for q, k, heads, heads_kv, layout in shapes
    ]
    others = [
        Case(dtype, d, dv, 1, 4, 2, 300, 400, options)
        for dtype, d, dv in (("bf16", 80, 80), ("fp16", 256, 128), ("bf16", 192, 192), ("bf16", 192, 128))
        for options in (Options(), causal)
    ]
    window = Options(window_left=150, window_right=30)
    end = Options(is_causal=True, bottom_right=True, window_left=40)
    optional = [
        Case("bf16", d, d, 1, 4, 2, q, k, options._replace(softcap=softcap), sink)
        for d in (128, 256)
        for options, softcap, sink in (
            *((o, s, has_sink) for o in (window, end) for s in (0.0, 30.0) for has_sink in (False, True)),
            *((Options(), 30.0, False), (causal, 0.0, True), (causal, 30.0, True)),
        )
        for q, k in ((300, 400), (400, 150))
    ]
    orders = [
        (Case("fp16", 128, 128, 3, 16, 16, 700, 700), 132),
        (Case("fp16", 128, 128, 3, 16, 16, 700, 700, causal), 132),  # longest first
        (Case("bf16", 64, 64, 20, 16, 16, 450, 700, causal), 132),  # paired, an even number of blocks
        (Case("fp16", 128, 128, 12, 8, 8, 620, 620, causal), 132),  # paired, an odd number of blocks
        (Case("bf16", 64, 64, 1, 2, 2, 1100, 1100), 3),  # the wide tile
        (Case("bf16", 96, 96, 1, 1, 1, 2100, 300), 3),
        (Case("bf16", 128, 128, 3, 8, 8, 50, 300), 7),  # the small tile, several to a CTA
        (Case("bf16", 64, 64, 1, 1, 1, 8200, 500, causal), 3),
    ]
    small = [*((case, 3) for case in plain), *((case, 2) for case in (*others, *optional))]
    return [*((case._replace(spread=4.0, rising=True), num_sms) for case, num_sms in small), *orders]


def keys() -> set[KernelKey]:
    """The kernels that the cases launch."""
    from forward_cases import H100, keys_of

    return {
        key
        for case, num_sms in cases()
        for target in (H100, H100._replace(num_sms=num_sms))
        for key in keys_of([case], target)
    }


def run_cases() -> None:
    import torch

    torch.manual_seed(0)
    slowest: tuple[float, Case | None] = 0.0, None
    for case, num_sms in cases():
        start = time.perf_counter()
        verify(case, num_sms)
        slowest = max(slowest, (time.perf_counter() - start, case), key=lambda timed: timed[0])
    print(f"slowest: {slowest[0]:.1f} s, {slowest[1]}")
    print(f"cases: {len(cases())}")


def verify(case: Case, num_sms: int) -> None:
    """One launch as it would be, one told of ``num_sms`` SMs, which is compared with fp32 math on the CPU."""
    import torch
    from forward_cases import H100, inputs, on_target

    from fa_sdpa import reference
    from fa_sdpa.kernels import launch

    query, key, value, sink = inputs(case, source="cpu")
    sink = None if sink is None else sink.cpu().float().cuda()  # a conversion by torch would be a kernel's write
    launch.attention_fwd(query, key, value, sink, case.options)
    with on_target(H100._replace(num_sms=num_sms)):
        out, lse = launch.attention_fwd(query, key, value, sink, case.options)
    query, key, value = (x.cpu().float() for x in (query, key, value))
    sink = None if sink is None else sink.cpu()
    ref, ref_lse = reference.attention(query, key, value, sink=sink, **case.options._asdict())
    assert (out.cpu().float() - ref).abs().max().item() < 0.05 * ref.abs().max().item(), case
    assert torch.allclose(lse.cpu(), ref_lse, rtol=1e-4, atol=1e-4), case


def run_control() -> None:
    """A launch that reads memory nobody wrote, the sink, which initcheck must report."""
    import torch
    from forward_cases import Case, inputs

    from fa_sdpa.kernels import launch
    from fa_sdpa.meta.spec import Options

    case = Case("bf16", 128, 128, 1, 4, 2, 300, 400, Options(is_causal=True))
    query, key, value, _ = inputs(case, source="cpu")
    launch.attention_fwd(query, key, value, torch.empty(4, device="cuda"), case.options)
    torch.cuda.synchronize()


def sanitize(tool: str, timeout: int) -> dict[str, Any]:
    """All cases under one tool."""
    start = time.perf_counter()
    status, output = run_under(tool, "--run-cases", timeout)
    finished, slowest = re.search(r"cases: (\d+)", output), re.search(r"slowest: (.*)", output)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    result: dict[str, Any] = {
        "tool": tool,
        "clean": status == 0 and finished is not None,
        "cases": int(finished[1]) if finished else 0,
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_case": slowest[1] if slowest else None,
        "summary": summary[-1] if summary else output[-1000:],
    }
    if not result["clean"]:
        result["output"] = output[:4000]
    if tool == "initcheck":
        _, output = run_under(tool, "--run-control", timeout)
        reports = re.findall(r"Uninitialized __global__ memory read", output)
        result["control"] = f"{len(reports)} reports of a sink that nobody wrote"
        result["clean"] = result["clean"] and bool(reports)
    return result


def run_under(tool: str, what: str, timeout: int) -> tuple[int, str]:
    """Exit status (124: it did not end in time) and output of this file under a tool."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=kernel_cutlass", "--error-exitcode", "9"]
    if tool == "initcheck":  # it does not see what TMA writes, and would report every copy of an output to the CPU
        command += ["--check-api-memory-access", "no"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "4"}
    command += [sys.executable, __file__, what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return 124, f"did not end in {timeout} s"
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one tool")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    parser.add_argument("--run-cases", action="store_true", help="only run the cases, under no tool")
    parser.add_argument("--run-control", action="store_true", help="only run what initcheck must report")
    args = parser.parse_args()
    if args.run_cases:
        return run_cases()
    if args.run_control:
        return run_control()
    if args.list_keys:
        return print("\n".join(sorted(key.name for key in keys())))
    with concurrent.futures.ThreadPoolExecutor(len(args.tools)) as pool:
        results = list(pool.map(lambda tool: sanitize(tool, args.timeout), args.tools))
    for result in results:
        print(result)
    if args.out:
        from provenance import save

        save(args.out, results)
    sys.exit(0 if all(result["clean"] for result in results) else 1)


if __name__ == "__main__":
    main()
