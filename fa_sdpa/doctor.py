"""What this machine has and what can run on it. Works on any machine: guards all that may fail, imports torch only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__, _torch_private, kernels, router, tables
from .kernels import compile as compiling
from .kernels import quarantine
from .kernels.cache import open_cache
from .meta.spec import AttentionSpec
from .meta.target import Target, missing_on_host

PACKAGES = ("nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi", "triton", "transformers")
VARIABLES = ("FA_SDPA", "CUTE_DSL_", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS")  # by their beginnings
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


def environment() -> dict[str, Any]:
    """Versions and the device, as plain JSON: `doctor` prints it and every benchmark result carries it."""
    cuda = torch.cuda.is_available()
    return {
        "device": _attempt(torch.cuda.get_device_name) if cuda else "cpu",
        "arch": _attempt(lambda: "sm_{}{}".format(*torch.cuda.get_device_capability())) if cuda else None,
        "driver": _driver_version(),
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _attempt(_cudnn_version),
        "packages": {name: _package_version(name) for name in PACKAGES},
    }


def diagnose() -> dict[str, Any]:
    """Everything that `doctor` reports, as plain JSON."""
    devices = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    tables = {name: _attempt(partial(_kernels, torch.device(name))) for name in devices}
    if len(devices) == 1:
        tables["cuda"] = f"no device here; there are kernels for {', '.join(f'sm_{a}' for a in kernels.FAMILIES)}"
    return {
        "fa_sdpa": __version__,
        "environment": environment(),
        "missing": [str(reason) for reason in missing_on_host()],
        "kernels": tables,
        "cache": _attempt(_cache),
        "policy": {name: _attempt(partial(_policy, torch.device(name))) for name in devices if name != "cpu"},
        "conflicts": _attempt(_conflicts),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _conflicts() -> list[str]:
    """What keeps routing from working as it should on this torch and in this process."""
    moved = [f"torch {torch.__version__} lacks {part}: routing can't be enabled" for part in _torch_private.missing()]
    return [*moved, *map(str, router.conflicts())]


def _policy(device: torch.device) -> list[str]:
    """Which crossover tables speak for a device, which do not, and which kernels are in quarantine."""
    target = Target.of(device)
    found, refused = tables.of(target)
    held = quarantine.known(target.name)
    return [
        *(f"table: {len(table.rules)} rules, {table.source}" for table in found),
        *map(str, refused),
        *(f"in quarantine: {name}: {why}" for name, why in held.items()),
    ]


def _cache() -> list[str]:
    """Where compiled kernels come from and go to, or why they can't."""
    bundle = os.environ.get("FA_SDPA_BUNDLE")
    lines = [f"bundle: {compiling.describe_bundle(Path(bundle))}"] if bundle else []
    cache, why = open_cache()
    if cache is None:
        lines.append(f"folder: none: {why}")
    else:
        entries = cache.entries()
        current = {f"-{compiling.fingerprint(arch)}" for arch in kernels.FAMILIES}
        usable = sum(entry.path.stem.endswith(tuple(current)) for entry in entries)
        size = sum(entry.size for entry in entries) / 2**20
        lines.append(f"folder: {cache.directory}")
        lines.append(f"kernels: {usable} of this version, {len(entries) - usable} of others")
        lines.append(f"size: {size:.1f} of at most {cache.limit / 2**20:.0f} MB")
    command = compiling.linker()
    lines.append(f"C linker: {shlex.join(command) if command else compiling.NO_LINKER}")
    return lines


def _kernels(device: torch.device) -> list[dict[str, Any]]:
    """For every direction, dtype and head dim: why no kernel runs it on ``device``; no reason means that one does."""
    target = Target.of(device)
    cells = []
    for direction, needs_grad in (("forward", False), ("training", True)):
        for name, dtype in DTYPES.items():
            for dim in HEAD_DIMS:
                spec = AttentionSpec(dtype, 1, 16, 16, 4096, 4096, dim, dim, is_causal=True, needs_grad=needs_grad)
                reasons: dict[str, str] = {}
                for code, text in kernels.unsupported(spec, target):
                    reasons[code] = f"{reasons[code]}; {text}" if code in reasons else text
                cells.append({"direction": direction, "dtype": name, "head_dim": dim, "reasons": reasons})
    return cells


def render(report: dict[str, Any]) -> str:
    """``diagnose()``'s report for a terminal."""
    env = dict(report["environment"])
    facts = {"fa_sdpa": report["fa_sdpa"], **env.pop("packages"), **env}
    lines = [f"{name:20}{value if value is not None else 'none'}" for name, value in facts.items()]
    for device, cells in report["kernels"].items():
        lines += ["", *_table(device, cells)]
    sections = {
        "to compile and launch GPU kernels, this host lacks": report["missing"],
        "compiled kernels": report["cache"],
        **{f"policy on {name}": entries for name, entries in report["policy"].items()},
        "conflicts": report["conflicts"],
        "environment variables": [f"{name}={value}" for name, value in report["variables"].items()],
    }
    for title, entries in sections.items():
        entries = entries if isinstance(entries, list) else [entries]  # a section that could not be read says why
        lines += ["", f"{title}: none" if not entries else f"{title}:", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def _table(device: str, cells: list[dict[str, Any]] | str) -> list[str]:
    """One row per direction and dtype, one column per head dim; a number in a cell is the refusal of that number."""
    if isinstance(cells, str):
        return [f"kernels on {device}: {cells}"]
    notes: dict[str, tuple[int, str]] = {}  # by reason code: number, and the sentence of its first case
    rows: dict[str, list[str]] = {}
    for cell in cells:
        numbers = []
        for code, text in cell["reasons"].items():
            number, _ = notes.setdefault(code, (len(notes) + 1, f"{text} [{code}]"))
            numbers.append(str(number))
        rows.setdefault(f"{cell['direction']} {cell['dtype']}", []).append(",".join(numbers) or "yes")
    return [
        f"{f'kernels on {device}':20}" + "".join(f"{f'd{dim}':>7}" for dim in HEAD_DIMS),
        *(f"  {name:18}" + "".join(f"{entry:>7}" for entry in row) for name, row in rows.items()),
        *(f"  {number}: for example, {text}" for number, text in notes.values()),
    ]


def _attempt(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or the sentence of why it could not."""
    try:
        return read()
    except Exception as error:  # a broken driver or build must not keep the report from the rest
        return f"unknown: {type(error).__name__}: {error}"


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn_version() -> str | None:
    version = torch.backends.cudnn.version()
    if version is None:
        return None
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1_000)  # cuDNN 9 made room for the minor version
    return f"{major}.{rest // 100}.{rest % 100}"


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.splitlines()[0].strip() if output.strip() else None
