"""The values that travel: what a call asks (AttentionSpec), why not (Reason), what was decided (Decision).

All three are NamedTuples: the router builds a spec on every call and looks its decision up by it, and a
NamedTuple is built and hashed several times faster than a frozen dataclass.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Backend = Literal["fa4", "native"]
MaskKind = Literal["none", "bool", "bf16", "fp16", "fp32", "fp64", "other"]


_MASK_KINDS: dict[torch.dtype | None, MaskKind] = {
    None: "none",
    torch.bool: "bool",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def mask_kind(dtype: torch.dtype | None) -> MaskKind:
    """How an AttentionSpec names the dtype of a call's attn_mask; None is no mask."""
    return _MASK_KINDS.get(dtype, "other")


class Reason(NamedTuple):
    """Why a call was decided the way it was."""

    code: str  # stable, snake_case: what stats() counts by
    text: str  # one sentence with this call's numbers

    def __str__(self) -> str:
        return f"{self.text} [{self.code}]"


class Decision(NamedTuple):
    """Where a call goes. A refusal ("native") carries every reason, not the first one found."""

    backend: Backend
    reasons: tuple[Reason, ...]

    @property
    def routed(self) -> bool:
        return self.backend == "fa4"

    def __str__(self) -> str:
        return f"{self.backend}: " + "; ".join(map(str, self.reasons))


class Options(NamedTuple):
    """What shapes the scores besides query and key: the keyword arguments that both ops share, with their defaults.

    Row i is centred on key c = i, with ``bottom_right`` on c = i + Sk − Sq. It sees the keys c − window_left …
    c + window_right, both ends included; None is no bound, and ``is_causal`` is a window_right of 0.
    """

    is_causal: bool = False
    scale: float | None = None  # None: 1/sqrt(head_dim)
    bottom_right: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0  # > 0: scores become softcap · tanh(scores / softcap)

    def bounds(self, seqlen_q: int, seqlen_k: int) -> tuple[int | None, int | None]:
        """(left, right): row i sees the keys i + left … i + right; None is no bound."""
        centre = seqlen_k - seqlen_q if self.bottom_right else 0
        left = None if self.window_left is None else centre - self.window_left
        reach = 0 if self.is_causal else self.window_right
        if self.is_causal and self.window_right is not None:
            reach = min(0, self.window_right)
        return left, None if reach is None else centre + reach


class AttentionSpec(NamedTuple):
    """What one SDPA call asks for, without its tensors.

    Sizes may be ``torch.SymInt`` while a graph is traced; such a spec does not hash and is decided uncached.
    """

    dtype: torch.dtype
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    is_causal: bool = False
    mask: MaskKind = "none"
    dropout_p: float = 0.0
    scale: float | None = None  # None: 1/sqrt(head_dim)
    needs_grad: bool = False
    deterministic: bool = False  # torch.are_deterministic_algorithms_enabled()
    last_dim_contiguous: bool = True  # of query, key and value alike
    bottom_right: bool = False  # from here on: see Options
    window: bool = False
    softcap: float = 0.0
    sink: bool = False
    dense_bias: bool = False  # a floating mask with few scores for each of its values: see shapes.is_dense

    @classmethod
    def of(
        cls,
        query: torch.Tensor,  # (B, H, Sq, D)
        key: torch.Tensor,  # (B, H_kv, Sk, D)
        value: torch.Tensor,  # (B, H_kv, Sk, Dv)
        mask: MaskKind = "none",
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        needs_grad: bool = False,
        *,
        bottom_right: bool = False,
        window_left: int | None = None,
        window_right: int | None = None,
        softcap: float = 0.0,
        sink: bool = False,
    ) -> AttentionSpec:
        """The spec of a call with these tensors, whose shapes must agree, and these options."""
        batch, num_heads, seqlen_q, head_dim = query.shape
        _, num_heads_kv, seqlen_k, head_dim_v = value.shape
        return cls(
            query.dtype,
            batch,
            num_heads,
            num_heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            head_dim_v,
            is_causal,
            mask,
            dropout_p,
            scale,
            needs_grad,
            torch.are_deterministic_algorithms_enabled(),
            query.stride(3) == key.stride(3) == value.stride(3) == 1,
            bottom_right,
            window_left is not None or window_right is not None,
            softcap,
            sink,
        )


def wrong_mask(spec: AttentionSpec) -> tuple[Reason, ...]:
    """Why a mask of this dtype is torch's to judge; empty if it is none of those that torch refuses."""
    if spec.mask in ("none", "bool", "fp32", mask_kind(spec.dtype)):
        return ()
    return (Reason("attn_mask", f"an attn_mask is boolean, fp32 or of query's dtype, not {spec.mask}"),)
