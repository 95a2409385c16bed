"""compute-sanitizer over small cases of every code path of the SM90 kernels, forward and backward.

    python benchmarks/sm90_sanitize.py --out benchmarks/results/sm90_sanitizer_h100.json

Runs itself under each tool, in several processes, all at the same time, with torch's caching allocator off, so that
every tensor is an allocation of its own. The cases: every kind of kernel (`code_path`), one block and several, ragged
and whole tiles, several tiles per CTA (the launch is told that there are few SMs) in each tile order, GQA, copied and
expanded inputs.
tests/test_kernels.py checks that no code path of the random numerics cases is missing. ``--list-keys`` prints the
kernels that a bundle must hold.

Only our kernels are looked at. Inputs are drawn on the CPU and copied, so that initcheck knows them written without
looking at any kernel of torch's, and the reference is computed on the CPU; so are out and lse that the backward gets.
initcheck sees plain loads and stores, but neither what TMA loads nor what it stores: it must report a control, a sink
that nobody wrote, for the backward an lse, and it does not check copies to the CPU, where it took every output for
uninitialised, with a backtrace for each run of bytes.

racecheck takes a bulk copy that is not a tensor's for a write of the thread that issues it, and of the threads that
free a stage for it knows those alone that arrive at the mbarrier themselves: not the other lanes of a warp, of which
one arrives behind a warp barrier. racecheck_control.cu is a pipeline of such copies and nothing else, in both ways. The
backward's lse and δ come by such copies, and its warps arrive by one lane, so racecheck reports each of their reads,
and those of P and of the units of work, which threads write that wait at such a mbarrier.
--every-lane DIR has it look at kernels in which every lane arrives, and which are the same otherwise: a bundle, which
is made where DIR has none (that needs the compiler, and no GPU).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forward_cases import Case
    from mask_cases import MaskedCase
    from torch import Tensor

    from fa_sdpa.kernels.key import KernelKey
    from fa_sdpa.meta.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parent))

CONTROL = Path(__file__).with_name("racecheck_control.cu")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


DIRECTIONS = ("forward", "backward", "masked", "masked backward")  # masked: the forward with an attn_mask


def code_path(key: KernelKey) -> tuple[Any, ...]:
    """What two kernels share that differ only in dtype and head dims: the roles' control flow, all but the widths."""
    from fa_sdpa.kernels.sm90.config import BackwardConfig, forward_config_of

    if key.direction == "mask":
        return key.direction, key.dtype == "bool", key.tile_m, key.transposed
    if key.direction == "forward":
        config: Any = forward_config_of(key)
    else:
        config = BackwardConfig(
            **{field.name: getattr(key, field.name) for field in dataclasses.fields(BackwardConfig)}
        )
    choices = {name: getattr(config, name) for name, kind in vars(type(config)).items() if isinstance(kind, property)}
    fields = dataclasses.asdict(key)
    for name in ("dtype", "head_dim", "head_dim_v", *(["tile_n"] if key.direction == "forward" else [])):
        del fields[name]
    fields["attn_mask"] = key.attn_mask.replace("fp16", "bf16")  # biases of 16 bits
    return (*sorted(fields.items()), *((name, value) for name, value in choices.items() if isinstance(value, bool)))


def forward_cases() -> list[tuple[Case, int]]:
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


def backward_cases() -> list[tuple[Case, int]]:
    """The same for the backward, which has one tile for each pair of head dims."""
    from forward_cases import Case

    from fa_sdpa.meta.spec import Options

    causal, window = Options(is_causal=True), Options(window_left=150, window_right=30)
    end = Options(is_causal=True, bottom_right=True, window_left=40)
    shapes = ((1, 1, 1, 1), (7, 129, 7, 1), (129, 7, 2, 2), (256, 256, 2, 1), (300, 500, 4, 2))
    layouts = ("bhsd", "bshd", "unaligned", "expanded_heads", "packed")
    plain = [
        Case(dtype, d, d, 2, h, h_kv, q, k, options, layout_kv=layout)
        for dtype, d in (("bf16", 64), ("fp16", 128))
        for options in (Options(), causal)
        for (q, k, h, h_kv), layout in zip(shapes, layouts, strict=True)
    ]
    pairs = (("bf16", 64, 128), ("fp16", 192, 128), ("bf16", 192, 192), ("bf16", 256, 256))
    wide = (*pairs, ("bf16", 128, 192), ("fp16", 192, 64), ("fp16", 64, 256))
    others = [
        Case(dtype, d, dv, 1, 4, 2, q, k, options)
        for dtype, d, dv in wide
        for options in (Options(), causal)
        for q, k in ((300, 400), (400, 150))
    ]
    optional = [
        Case("bf16", d, dv, 1, 4, 2, q, k, options._replace(softcap=softcap))
        for d, dv in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
        for options, softcap in ((window, 0.0), (end, 0.0), (window, 30.0), (Options(), 30.0), (causal, 30.0))
        for q, k in ((300, 400), (400, 150))
    ]
    optional += [
        Case("bf16", d, dv, 1, 4, 2, q, k, options)
        for d, dv in ((128, 256), (192, 192))
        for options in (window, end)
        for q, k in ((300, 400), (400, 150))
    ]
    orders = [
        (Case("bf16", 64, 64, 1, 16, 16, 3300, 256, causal), 5),  # paired, an even number of blocks
        (Case("fp16", 128, 128, 1, 8, 4, 3300, 300, causal), 5),  # paired, an odd number of blocks
        (Case("bf16", 256, 256, 1, 8, 8, 3300, 150, causal), 5),
        (Case("bf16", 64, 64, 3, 16, 16, 300, 700), 132),
        (Case("fp16", 128, 128, 3, 16, 16, 300, 700, causal), 132),  # longest first
    ]
    return [*((case._replace(spread=2.0), 3) for case in (*plain, *others, *optional)), *orders]


def masked_cases() -> list[tuple[MaskedCase, int]]:
    """The same for the forward with a mask. Biases are read where they are: a copy would be a kernel's write."""
    from forward_cases import Case
    from mask_cases import MaskedCase

    from fa_sdpa.meta.spec import Options

    hidden = [
        MaskedCase(Case("bf16", d, d, 2, 4, 2, q, k, options), "bool", content, broadcast=broadcast, layout=layout)
        for d in (64, 128, 256)
        for q, k, options, content, broadcast, layout in (
            (300, 500, Options(), "both", ".1..", "plain"),
            (300, 500, Options(is_causal=True), "padding", ".11.", "shifted"),
            (129, 700, Options(window_left=150, window_right=30), "random", "....", "strided"),
            (1, 400, Options(), "left padding", ".11.", "plain"),
            (70, 100, Options(), "nothing", "11..", "expanded"),
        )
    ]
    biased = [
        MaskedCase(Case("bf16", d, d, 1, 4, 2, q, k), dtype, content, fill, bias, broadcast, "roomy")
        for d in (64, 128, 256)
        for dtype in ("bf16", "fp32")
        for q, k, content, fill, bias, broadcast in (
            (300, 500, "both", -math.inf, "normal", "...."),
            (300, 512, "blocks", "lowest", "none", "1..."),
            (129, 258, "random", -1e9, "slopes", ".1.."),
            (70, 258, "all", -math.inf, "slopes", "1.1."),
            (1, 400, "nothing", "lowest", "none", "1111"),
        )
    ]
    optional = [
        MaskedCase(
            Case("bf16", d, d, 1, 4, 2, 300, 400, Options(softcap=softcap), sink), dtype, "random", layout="roomy"
        )
        for d in (64, 128, 256)
        for dtype in ("bool", "bf16", "fp32")
        for softcap, sink in ((30.0, False), (0.0, True))
    ]
    return [(masked, 3) for masked in (*hidden, *biased, *optional)]


def masked_backward_cases() -> list[tuple[MaskedCase, int]]:
    """The same for the backward with a mask."""
    from forward_cases import Case
    from mask_cases import MaskedCase

    from fa_sdpa.meta.spec import Options

    causal, window, capped = Options(is_causal=True), Options(window_left=150, window_right=30), Options(softcap=30.0)
    hidden = [
        MaskedCase(Case("bf16", d, dv, 2, 4, 2, q, k, options), "bool", content, broadcast=broadcast, layout=layout)
        for d, dv in ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
        for q, k, options, content, broadcast, layout in (
            (300, 500, Options(), "both", "....", "plain"),
            (300, 400, causal, "padding", ".11.", "shifted"),
            (129, 400, window, "random", ".1..", "strided"),
            (300, 400, capped, "blocks", "..1.", "plain"),
            (70, 100, Options(), "nothing", "11..", "expanded"),
        )
    ]
    biased = [
        MaskedCase(Case("bf16", d, dv, 1, 4, 2, q, k, options), dtype, content, fill, bias, broadcast, "roomy")
        for d, dv in ((64, 64), (80, 80), (128, 128), (192, 128))
        for dtype in ("bf16", "fp32")
        for q, k, options, content, fill, bias, broadcast in (
            (300, 512, Options(), "both", -math.inf, "normal", "...."),
            (300, 512, Options(), "blocks", "lowest", "none", "1..."),
            (129, 256, causal, "random", -math.inf, "slopes", "1.1."),
            (300, 400, capped, "random", -math.inf, "normal", ".1.."),
        )
    ]
    return [(masked, 3) for masked in (*hidden, *biased)]


CASES: dict[str, Callable[[], Sequence[tuple[Any, int]]]] = {
    "forward": forward_cases,
    "backward": backward_cases,
    "masked": masked_cases,
    "masked backward": masked_backward_cases,
}


def keys(directions: Sequence[str] = DIRECTIONS) -> set[KernelKey]:
    """The kernels that the cases launch."""
    from backward_cases import Drawn
    from backward_cases import keys_of as backward_keys_of
    from forward_cases import H100, keys_of
    from mask_cases import keys_of as mask_keys_of

    def launched(direction: str, case: Any, target: Target) -> list[KernelKey]:
        if direction.startswith("masked"):
            found = mask_keys_of([(case.case, case.dtype)], target, needs_grad=direction != "masked")
            return found if direction == "masked" else [x for x in found if x.direction == "backward" or x.transposed]
        if direction == "forward":
            return keys_of([case], target)
        return backward_keys_of([Drawn(case, "as_out", end_to_end=False)], target)

    return {
        key
        for direction in directions
        for case, num_sms in CASES[direction]()
        for target in (H100, H100._replace(num_sms=num_sms))
        for key in launched(direction, case, target)
    }


def bundle_of_every_lane(directions: Sequence[str], directory: Path) -> None:
    """Write a bundle of the backward kernels, changed in one thing: at every mbarrier at which a lane of each warp
    arrives, every lane does."""
    import types

    import cutlass.cute as cute
    from cutlass import Boolean

    from fa_sdpa.kernels.compile import write_bundle
    from fa_sdpa.kernels.sm90 import backward_order
    from fa_sdpa.kernels.sm90.backward import Backward

    init, by_warps = cute.arch.mbarrier_init, Backward._pipeline

    def init_for_lanes(mbarrier: Any, count: Any, **where: Any) -> None:
        init(mbarrier, count if count == 1 else 32 * count, **where)  # 1: a producer, not the warps that it waits for

    def by_lanes(self: Backward, barriers: Any, stages: int, num_bytes: int, warps: int) -> Any:
        made = by_warps(self, barriers, stages, num_bytes, warps)
        return dataclasses.replace(made, is_signaling_thread=Boolean(True))

    cute.arch.mbarrier_init = init_for_lanes
    Backward._pipeline = by_lanes  # type: ignore[method-assign]
    Backward._arrive = lambda self, mbarrier: cute.arch.mbarrier_arrive(mbarrier)  # type: ignore[method-assign]
    arch = types.SimpleNamespace(**{**vars(cute.arch), "elect_one": contextlib.nullcontext})  # for get_unit alone
    backward_order.cute = types.SimpleNamespace(**{**vars(cute), "arch": arch})
    write_bundle(sorted(keys(directions), key=lambda key: key.name), directory)


def run_cases(directions: Sequence[str], part: int, parts: int) -> None:
    """Every case whose number is ``part`` modulo ``parts``."""
    import torch

    torch.manual_seed(0)
    slowest: tuple[float, Any] = 0.0, None
    count = 0
    for direction in directions:
        verify = VERIFY[direction]
        for case, num_sms in CASES[direction]()[part::parts]:
            start = time.perf_counter()
            verify(case, num_sms)
            slowest = max(slowest, (time.perf_counter() - start, case), key=lambda timed: timed[0])
            count += 1
    print(f"slowest: {slowest[0]:.1f} s, {slowest[1]}")
    print(f"cases: {count}")


def verify_forward(case: Case, num_sms: int) -> None:
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


def verify_backward(case: Case, num_sms: int) -> None:
    """The same, with out, lse and dout from the CPU: what the forward stores by TMA, initcheck takes for unwritten."""
    import torch
    from backward_cases import math_grads
    from forward_cases import inputs

    query, key, value, _ = inputs(case, source="cpu")
    wide = [x.cpu().float() for x in (query, key, value)]
    dout = torch.randn(*query.shape[:3], case.head_dim_v).to(query.dtype)
    refs, out, lse = math_grads(wide, dout, None, case.options)
    out, lse = out.to(query.dtype).cuda(), lse.cuda()
    compare_grads((dout.cuda(), query, key, value, out, lse, case.options), refs, num_sms, case)


def compare_grads(arguments: tuple[Any, ...], refs: Sequence[Tensor], num_sms: int, case: Any) -> None:
    """Both launches of a backward; the second one's gradients are compared."""
    from forward_cases import H100, on_target

    from fa_sdpa.kernels import launch

    launch.attention_bwd(*arguments)
    with on_target(H100._replace(num_sms=num_sms)):
        grads = launch.attention_bwd(*arguments)
    for name, grad, ref in zip(("dq", "dk", "dv"), grads, refs, strict=True):
        off = (grad.cpu().float() - ref).abs().max().item()
        assert off < 0.05 * ref.abs().max().item() + 1e-2, (name, off, case)


def verify_masked(masked: MaskedCase, num_sms: int) -> None:
    """As ``verify_forward``."""
    import torch
    from forward_cases import H100, inputs, on_target
    from mask_cases import make_mask

    from fa_sdpa import reference
    from fa_sdpa.kernels import launch

    case = masked.case
    query, key, value, sink = inputs(case, source="cpu")
    sink = None if sink is None else sink.cpu().float().cuda()
    mask = make_mask(masked, "cpu")
    launch.attention_fwd(query, key, value, sink, case.options, mask)
    with on_target(H100._replace(num_sms=num_sms)):
        out, _ = launch.attention_fwd(query, key, value, sink, case.options, mask)
    query, key, value = (x.cpu().float() for x in (query, key, value))
    sink, mask = None if sink is None else sink.cpu(), mask.cpu()
    mask = mask if mask.dtype is torch.bool else mask.float()
    ref, _ = reference.attention(query, key, value, attn_mask=mask, sink=sink, **case.options._asdict())
    assert (out.cpu().float() - ref).abs().max().item() < 0.05 * ref.abs().max().item() + 1e-6, masked


def verify_masked_backward(masked: MaskedCase, num_sms: int) -> None:
    """As ``verify_backward``."""
    import torch
    from backward_cases import math_grads
    from forward_cases import inputs
    from mask_cases import make_mask

    from fa_sdpa.kernels import launch

    case = masked.case
    query, key, value, _ = inputs(case, source="cpu")
    mask = make_mask(masked, "cpu")
    wide = [x.cpu().float() for x in (query, key, value)]
    dout = torch.randn(*query.shape[:3], case.head_dim_v).to(query.dtype)
    wide_mask = mask.cpu() if mask.dtype is torch.bool else mask.cpu().float()
    refs, out, lse = math_grads(wide, dout, None, case.options, wide_mask)
    if mask.dtype is not torch.bool:  # a row whose keys all lie far below where the forward cuts scores off
        unit = launch._scaling(case.options, case.head_dim)[1]
        cut = -(launch._biasing(mask, unit)[1] or 0.0) * unit
        seen = (wide_mask.expand(*lse.shape, -1) > -math.inf).sum(-1)
        lse = torch.where(lse < cut, cut + seen.log(), lse)
    lse = lse.masked_fill((out == 0).all(-1), -math.inf)
    out, lse = out.to(query.dtype).cuda(), lse.cuda()
    compare_grads((dout.cuda(), query, key, value, out, lse, case.options, mask), refs, num_sms, masked)


VERIFY: dict[str, Callable[[Any, int], None]] = {
    "forward": verify_forward,
    "backward": verify_backward,
    "masked": verify_masked,
    "masked backward": verify_masked_backward,
}


def run_control(direction: str) -> None:
    """A launch that reads memory nobody wrote (the sink, the mask, the backward's lse), which initcheck must report."""
    import torch
    from forward_cases import Case, inputs

    from fa_sdpa.kernels import launch
    from fa_sdpa.meta.spec import Options

    case = Case("bf16", 128, 128, 1, 4, 2, 300, 400, Options(is_causal=True))
    query, key, value, _ = inputs(case, source="cpu")
    if direction == "forward":
        launch.attention_fwd(query, key, value, torch.empty(4, device="cuda"), case.options)
    elif direction == "masked":
        unwritten = torch.empty(300, 400, dtype=torch.bool, device="cuda")
        launch.attention_fwd(query, key, value, None, case.options, unwritten)
    else:
        dout, out = (torch.randn(query.shape).to(query.dtype).cuda() for _ in range(2))
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device="cuda")
        mask = torch.ones(300, 400, dtype=torch.bool).cuda() if direction == "masked backward" else None
        launch.attention_bwd(dout, query, key, value, out, lse, case.options, mask)
    torch.cuda.synchronize()


def sanitize(tool: str, direction: str, timeout: int, jobs: int, every_lane: Path | None) -> dict[str, Any]:
    """All cases of one direction under one tool, in so many processes, as most of the time goes into a kernel's first
    launch. ``every_lane``: the bundle for racecheck."""
    start = time.perf_counter()
    what = ["--run-cases", "--directions", direction, "--part"]
    of_lanes = every_lane if tool == "racecheck" and direction.endswith("backward") else None
    kernels = {"FA_SDPA_BUNDLE": str(of_lanes)} if of_lanes else {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = list(
            pool.map(lambda part: run_under(tool, [*what, str(part), str(jobs)], timeout, kernels), range(jobs))
        )
    finished = [int(number) for _, output in runs for number in re.findall(r"cases: (\d+)", output)]
    slowest = [(float(s), case) for _, output in runs for s, case in re.findall(r"slowest: ([\d.]+) s, (.*)", output)]
    summaries = [
        (re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output) or [f"status {status}: {output[-1000:]}"])[-1]
        for status, output in runs
    ]
    result: dict[str, Any] = {
        "tool": tool,
        "direction": direction,
        "clean": all(status == 0 for status, _ in runs) and sum(finished) == len(CASES[direction]()),
        "cases": sum(finished),
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_case": max(slowest, default=None),
        "summary": {summary: summaries.count(summary) for summary in summaries},  # and of how many processes
    }
    if not result["clean"]:
        result["output"] = "\n".join(output[: 4000 // jobs] for status, output in runs if status)
    if tool == "initcheck":
        _, output = run_under(tool, ["--run-control", "--directions", direction], timeout)
        reports = re.findall(r"Uninitialized __global__ memory read", output)
        result["control"] = f"{len(reports)} reports of what nobody wrote"
        result["clean"] = result["clean"] and bool(reports)
    if tool == "racecheck" and direction.endswith("backward"):
        result["arrives"] = "every lane" if of_lanes else "one lane of each warp"
        result["control"] = racecheck_control(timeout)
    return result


def racecheck_control(timeout: int) -> str:
    """What racecheck says of racecheck_control.cu, where there is a compiler for it."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "control")
        build = ["nvcc", "-arch=sm_90a", "-o", str(program), str(CONTROL)]
        command = ["compute-sanitizer", "--tool", "racecheck", str(program)]
        said = []
        try:
            subprocess.run(build, check=True, capture_output=True, timeout=timeout)
            for who, arguments in (("threads", []), ("a lane of each warp", ["warps"])):
                done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout)
                summary = re.findall(r"RACECHECK SUMMARY: .*", done.stdout)
                right = "right results" if "right" in done.stdout else "wrong results"
                said.append(f"{who}: {right}, {summary[-1] if summary else done.stdout[-300:]}")
        except subprocess.SubprocessError as error:
            return f"the control did not run: {error}"
    return f"a pipeline of bulk copies by the book, to whose mbarrier arrive {'; '.join(said)}"


def run_under(tool: str, what: Sequence[str], timeout: int, kernels: Mapping[str, str] = {}) -> tuple[int, str]:
    """Exit status (124: it did not end in time) and output of this file under a tool."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=kernel_cutlass", "--error-exitcode", "9"]
    if tool == "initcheck":  # it does not see what TMA writes, and would report every copy of an output to the CPU
        command += ["--check-api-memory-access", "no"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "4", **kernels}
    command += [sys.executable, __file__, *what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return 124, f"did not end in {timeout} s"
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--directions", nargs="*", default=DIRECTIONS, choices=DIRECTIONS)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one tool")
    parser.add_argument("--list-keys", action="store_true", help="only print the names of the kernels")
    parser.add_argument("--every-lane", type=Path, metavar="DIR", help="bundle for racecheck of a backward")
    parser.add_argument("--jobs", type=int, default=4, help="processes for one tool")
    parser.add_argument("--run-cases", action="store_true", help="only run the cases, under no tool")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="which of how many parts of them")
    parser.add_argument("--run-control", action="store_true", help="only run what initcheck must report")
    args = parser.parse_args()
    if args.run_cases:
        return run_cases(args.directions, *args.part)
    if args.run_control:
        return run_control(args.directions[0])
    if args.list_keys:
        return print("\n".join(sorted(key.name for key in keys(args.directions))))
    if args.every_lane and not (args.every_lane / "manifest.json").exists():
        bundle_of_every_lane([d for d in args.directions if d.endswith("backward")], args.every_lane)
    runs = [(tool, direction) for direction in args.directions for tool in args.tools]
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        results = list(pool.map(lambda run: sanitize(run[0], run[1], args.timeout, args.jobs, args.every_lane), runs))
    for result in results:
        print({name: value for name, value in result.items() if name != "output"})
    if args.out:
        from provenance import save

        save(args.out, results)
    sys.exit(0 if all(result["clean"] for result in results) else 1)


if __name__ == "__main__":
    main()
