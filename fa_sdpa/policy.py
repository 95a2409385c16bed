"""decide(spec, target, policy) → Decision: pure, needs no GPU, and tells every reason of a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from . import kernels, tables
from .kernels import quarantine
from .kernels.jit import Jit
from .meta.crossover import Crossover, Direction, Mask, Rule, rows_of
from .meta.shapes import DENSE
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

    def tables(self, target: Target) -> tuple[tuple[Crossover, ...], tuple[Reason, ...]]:
        """The crossover tables for a device, first to last, none where nobody has measured; and why others are not
        used."""
        own = self.crossover
        if own is not None and own.arch == (0 if target.device_type == "cpu" else target.arch):
            return (own,), ()
        return tables.of(target)


AUTO = Policy()
HOST_DECIDES = "host_decides"  # the reason of a call that is routed, but would not be in a graph


def decide(
    spec: AttentionSpec, target: Target, policy: Policy = AUTO, *, detail: bool = False, in_graph: bool = False
) -> Decision:
    """Where a call goes: to fa4 or to torch ("native").

    ``in_graph``: the call becomes part of a compiled graph or a CUDA graph; else the host makes it anew each time.

    Batch and sequence lengths are compared only with the steps of one crossover rule, so that a graph with symbolic
    sizes is guarded by no more than that. With ``detail`` the reason of a prediction names the measured cells nearest
    to the call, which takes longer than all the rest.
    """
    if policy.mode == "never":
        return Decision("native", (Reason("policy_never", "the policy is 'never'"),))
    refusals = kernels.unsupported(spec, target)
    if not refusals:
        refusals = quarantine.refusals(spec, target)
    if policy.mode == "always":
        return Decision("native", refusals) if refusals else Decision("fa4", (_ALWAYS,))
    if refusals and isinstance(spec.seqlen_q, torch.SymInt):
        return Decision("native", refusals)  # refused whatever its length: don't make the graph depend on that
    faster, reasons = _crossover(spec, target, policy, detail, in_graph)
    if refusals or not faster:
        return Decision("native", refusals if faster else (*refusals, *reasons))
    return Decision("fa4", reasons)


_ALWAYS = Reason("policy_always", "the policy is 'always' and a kernel runs this call")
_DENSE_BIAS = Reason(
    "dense_bias", f"a floating attn_mask with a value for fewer than {DENSE} scores each: reading it takes the time"
)


def _crossover(
    spec: AttentionSpec, target: Target, policy: Policy, detail: bool, in_graph: bool
) -> tuple[bool, tuple[Reason, ...]]:
    """Whether fa4 was measured faster, and the reasons to give."""
    direction: Direction = "training" if spec.needs_grad else "forward"
    mask: Mask = spec.mask if spec.mask in ("none", "bool") else "float"
    if spec.dense_bias:
        return False, (_DENSE_BIAS,)
    found, refused = policy.tables(target)
    for table in found:
        rule = table.find(direction, spec.head_dim, spec.head_dim_v, spec.is_causal, mask)
        if rule is None:
            continue
        if rule.fa4 is None:
            faster, reason = _by_length(spec, rule.threshold(spec.batch))
        elif any(isinstance(size, torch.SymInt) for size in spec[1:6]):
            faster, reason = _symbolic(spec, rule, target, target.num_sms or table.num_sms)
        else:
            faster, reason = _predicted(spec, rule, target, target.num_sms or table.num_sms, detail, in_graph)
        return faster, (reason,) if faster else (reason, *refused)
    return False, (_unmeasured(spec, direction, target, bool(found)), *refused)


def left_by_query(query: torch.Size, codes: tuple[str, ...], target: Target, policy: Policy) -> bool:
    """Whether all calls with a query (B, H, Sq, D) of this size are torch's by the reasons by which one was, of these
    codes, whatever comes with the query: it is too small for every rule of its head dim, or there is none; or policy or
    device leave every call."""
    if codes[0] in ("policy_never", "no_kernel_family"):
        return True
    if policy.mode != "auto" or codes[0] not in ("below_crossover", "not_measured", "not_qualified"):
        return False
    batch, heads, seqlen, head_dim = query
    rules = [rule for table in policy.tables(target)[0] for rule in table.rules if rule.is_of(head_dim)]
    return bool(rules) == (codes[0] == "below_crossover") and all(r.is_too_small(batch, heads, seqlen) for r in rules)


def _by_length(spec: AttentionSpec, threshold: int) -> tuple[bool, Reason]:
    for name, seqlen in (("seqlen_q", spec.seqlen_q), ("seqlen_k", spec.seqlen_k)):
        if seqlen < threshold:
            return False, Reason("below_crossover", f"{name} {seqlen} is below {threshold}, from where fa4 is faster")
    return True, Reason("above_crossover", f"both seqlens reach {threshold}, from where fa4 is faster")


def _symbolic(spec: AttentionSpec, rule: Rule, target: Target, num_sms: int) -> tuple[bool, Reason]:
    """For a graph with symbolic sizes: a length from which on fa4 is faster with as many sequences, and more."""
    sizes = {name: getattr(spec, name) for name in ("batch", "num_heads", "num_heads_kv")}
    for name, size in sizes.items():
        if isinstance(size, torch.SymInt):
            sizes[name] = _power_of_two_below(size)
    threshold = rule.shortest(spec._replace(**sizes), num_sms, kernels.cuts_on(target, num_sms))
    if threshold is None:
        return False, Reason("below_crossover", "fa4 is not predicted to be faster at every length from one on")
    return _by_length(spec, threshold)


def _power_of_two_below(size: torch.SymInt) -> int:
    """The largest that ``size`` reaches; that alone becomes a guard."""
    hint = size.node.hint
    power = 1 << (max(int(hint), 1).bit_length() - 1) if hint is not None else 2
    return power if size >= power else 1


def _predicted(
    spec: AttentionSpec, rule: Rule, target: Target, num_sms: int, detail: bool, in_graph: bool
) -> tuple[bool, Reason]:
    asked = (spec.seqlen_q, spec.seqlen_k, rows_of(spec))
    for name, size, least in zip(("seqlen_q", "seqlen_k", "query rows"), asked, rule.least, strict=True):
        if size < least:
            return False, Reason("below_crossover", f"{name} {size} is below {least}, the least that was measured")
    times = rule.predict(spec, num_sms, kernels.cuts_on(target, num_sms)(spec))
    assert times is not None, "a rule with a model"
    text = (
        f"predicted {times.fa4_us:.4g} µs on the device, torch {times.native_us:.4g}: {times.ratio:.2f}×, margin "
        f"{times.margin:.2f}; in eager mode {times.ratio_eager:.2f}×"
    )
    if detail:
        text += f"; measured: {', '.join(map(str, rule.nearest(spec)))}"
    if times.is_faster if in_graph else times.is_faster_in_eager_mode:
        return True, Reason("above_crossover", text)
    if not in_graph and times.host_decides:
        return True, Reason(HOST_DECIDES, f"{text}, where the host decides; in a graph it is left to torch")
    return False, Reason("below_crossover", text)


def _unmeasured(spec: AttentionSpec, direction: Direction, target: Target, has_table: bool) -> Reason:
    where = target.name or target.device_type
    if not has_table and target.device_type == "cuda" and kernels.family_of(target):
        return Reason(
            "not_qualified",
            f"nobody has measured {where} (sm_{target.arch}): calls are left to torch until "
            "`python -m fa_sdpa qualify` has passed there",
        )
    dims = f"head_dim {spec.head_dim}"
    if spec.head_dim_v != spec.head_dim:
        dims += f", head_dim_v {spec.head_dim_v}"
    mask = "" if spec.mask == "none" else f", attn_mask {spec.mask}"
    what = f"{direction}, {dims}, is_causal={spec.is_causal}{mask} on {where}"
    return Reason("not_measured", f"no measurement says that fa4 is faster: {what}")
