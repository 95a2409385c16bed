"""The kernel families: which one serves a device, and why one can't. Imports torch only."""

from __future__ import annotations

from importlib import import_module

from ..meta.crossover import Cuts, CutsOf
from ..meta.spec import AttentionSpec, Reason
from ..meta.target import Target

# Compute capability × 10 → the folder with its kernels. A new family is a new folder and a line here.
FAMILIES = {90: "sm90"}


def family_of(target: Target) -> str | None:
    """The name of the family that serves ``target``, None if there is none."""
    if target.device_type == "cpu":
        return "cpu"
    if target.device_type == "cuda" and target.arch is not None:
        return FAMILIES.get(target.arch)
    return None


def unsupported(spec: AttentionSpec, target: Target) -> tuple[Reason, ...]:
    """Every reason why ``spec`` can't run on ``target``; empty if a kernel runs it."""
    family = family_of(target)
    if family is None:
        where = f"{target.name or target.device_type}" + (f" (sm_{target.arch})" if target.arch else "")
        return (Reason("no_kernel_family", f"no fa4 kernels for {where}"),)
    config = import_module(f"{__name__}.{family}.config")
    return (*target.missing, *config.unsupported(spec, target))


def cuts(spec: AttentionSpec, target: Target, num_sms: int) -> Cuts | None:
    """How the kernels of a family cut a call of known sizes into tiles on so many SMs, which a model of its time has to
    know; None on a CPU and where there are none."""
    family = family_of(target)
    if family is None or family == "cpu":
        return None
    found: Cuts = import_module(f"{__name__}.{family}.config").cuts(spec, num_sms)
    return found


def cuts_on(target: Target, num_sms: int) -> CutsOf:
    """``cuts`` as a function of the call, on a GPU that has kernels."""

    def of(spec: AttentionSpec) -> Cuts:
        found = cuts(spec, target, num_sms)
        assert found is not None, "what has a model of time has kernels"
        return found

    return of
