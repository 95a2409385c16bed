"""Stand-in until the SM90 kernels land."""

from __future__ import annotations

from torch import Tensor


def attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
