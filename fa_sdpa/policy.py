"""decide(spec, target, policy) → Decision: pure, needs no GPU, and tells every reason of a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from . import kernels
from .kernels.jit import Jit
from .meta.crossover import Crossover, Direction, shipped
from .meta.spec import AttentionSpec, Decision, Reason
from .meta.target import Target

Mode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Policy:
    """How calls are routed. Frozen and told apart by its repr, which compiled graphs are guarded on.

    Args:
        mode: "auto" routes a call where a kernel can run it and the crossover table of the device's arch says that
            it is faster there; "always" routes whatever a kernel can run; "never" leaves every call to torch.
        crossover: a table to use for its arch instead of the shipped one; ``Crossover.load(path)`` reads one.
        jit: what a call does whose GPU kernel was not compiled yet. "background" leaves it to torch and compiles beside
            the program, "block" compiles in the call, "never" leaves it to torch. Default: "background" with mode
            "auto", "block" with "always". "background" counts as "block" for graphs that are traced by torch.compile,
            with deterministic algorithms, and in the forward of a non-reentrant checkpoint.

    Raises:
        ValueError: an unknown mode or jit.
    """

    mode: Mode = "auto"
    crossover: Crossover | None = None
    jit: Jit | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"policy mode must be one of {', '.join(get_args(Mode))}, not {self.mode!r}")
        if self.jit is None:
            object.__setattr__(self, "jit", "background" if self.mode == "auto" else "block")
        elif self.jit not in get_args(Jit):
            raise ValueError(f"policy jit must be one of {', '.join(get_args(Jit))}, not {self.jit!r}")

    @classmethod
    def of(cls, policy: Policy | str) -> Policy:
        """A Policy from itself or from the name of a mode."""
        return policy if isinstance(policy, Policy) else cls(policy)  # type: ignore[arg-type]

    def table(self, target: Target) -> Crossover | None:
        """The crossover table for a device, None where nobody has measured."""
        arch = 0 if target.device_type == "cpu" else target.arch
        if arch is None:
            return None
        if self.crossover is not None and self.crossover.arch == arch:
            return self.crossover
        return shipped(arch)


AUTO = Policy()


def decide(spec: AttentionSpec, target: Target, policy: Policy = AUTO) -> Decision:
    """Where a call goes: to fa4 or to torch ("native").

    Batch and sequence lengths are compared only with the steps of one crossover rule, so that a graph with symbolic
    sizes is guarded by no more than that.
    """
    if policy.mode == "never":
        return Decision("native", (Reason("policy_never", "the policy is 'never'"),))
    refusals = kernels.unsupported(spec, target)
    if policy.mode == "always":
        return Decision("native", refusals) if refusals else Decision("fa4", (_ALWAYS,))
    if refusals and isinstance(spec.seqlen_q, torch.SymInt):
        return Decision("native", refusals)  # refused whatever its length: don't make the graph depend on that
    faster, reason = _crossover(spec, target, policy)
    if refusals or not faster:
        return Decision("native", refusals if faster else (*refusals, reason))
    return Decision("fa4", (reason,))


_ALWAYS = Reason("policy_always", "the policy is 'always' and a kernel runs this call")


def _crossover(spec: AttentionSpec, target: Target, policy: Policy) -> tuple[bool, Reason]:
    """Whether fa4 was measured faster, and the reason to give."""
    direction: Direction = "training" if spec.needs_grad else "forward"
    table = policy.table(target)
    rule = table and table.find(direction, spec.head_dim, spec.head_dim_v, spec.is_causal)
    if not rule:
        dims = f"head_dim {spec.head_dim}"
        if spec.head_dim_v != spec.head_dim:
            dims += f", head_dim_v {spec.head_dim_v}"
        what = f"{direction}, {dims}, is_causal={spec.is_causal} on {target.name or target.device_type}"
        return False, Reason("not_measured", f"no measurement says that fa4 is faster: {what}")
    threshold = rule.threshold(spec.batch)
    for name, seqlen in (("seqlen_q", spec.seqlen_q), ("seqlen_k", spec.seqlen_k)):
        if seqlen < threshold:
            return False, Reason("below_crossover", f"{name} {seqlen} is below {threshold}, from where fa4 is faster")
    return True, Reason("above_crossover", f"both seqlens reach {threshold}, from where fa4 is faster")
