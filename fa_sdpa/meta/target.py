"""Target: what decides whether a kernel can run on a device and how fast, read once per device."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from .spec import Reason


class Target(NamedTuple):
    """A device's facts. Build one by hand to ask the policy about a GPU that is not here."""

    device_type: str  # "cuda", "cpu", …
    arch: int | None = None  # compute capability times ten: 90 for an H100
    name: str = ""
    num_sms: int = 0
    smem_per_block: int = 0  # bytes, opt-in maximum
    missing: tuple[Reason, ...] = ()  # what this host lacks to run a kernel there

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target of ``device``; cached. Never initialises CUDA unless ``device`` is a CUDA device."""
        if device.type == "cuda":
            return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
        return _plain_target(device.type)


@functools.cache
def _plain_target(device_type: str) -> Target:
    return Target(device_type, name=device_type)


@functools.cache
def _cuda_target(index: int) -> Target:
    if torch.version.hip is not None:
        return Target("hip", name=torch.cuda.get_device_name(index))
    props = torch.cuda.get_device_properties(index)
    return Target(
        "cuda",
        props.major * 10 + props.minor,
        props.name,
        props.multi_processor_count,
        props.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        missing_on_host(),
    )


def missing_on_host() -> tuple[Reason, ...]:
    """What keeps this host from running compiled kernels, found without importing the compiler."""
    if os.environ.get("FA_SDPA_BUNDLE"):
        needed = {"tvm_ffi": "apache-tvm-ffi"}
    else:
        needed = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
    return tuple(
        Reason("not_installed", f"{package} is not installed (pip install 'fa_sdpa[cu13]')")
        for module, package in needed.items()
        if importlib.util.find_spec(module) is None
    )
