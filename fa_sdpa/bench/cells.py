"""What is computed: shapes, their flops and bytes, and where lists of them come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch

from ..meta.models import MODELS
from ..meta.spec import AttentionSpec

Direction = Literal["forward", "backward", "both"]  # both: a forward and its backward, as a training step runs them
DIRECTIONS = get_args(Direction)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORWARDS = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # flops, in those of a forward


class Cell(NamedTuple):
    """The shape of one call."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    is_causal: bool = False
    dtype: str = "bf16"  # of DTYPES

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        head_dim = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        seqlen = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        name = f"d{head_dim} {'causal' if self.is_causal else 'full'} {seqlen} b{self.batch} h{heads}"
        return name if self.dtype == "bf16" else f"{name} {self.dtype}"

    @property
    def flops(self) -> int:
        """Of the forward, 2·B·H·Sq·Sk·(D + Dv), halved when causal."""
        pairs = self.batch * self.heads * self.seqlen_q * self.seqlen_k
        return 2 * pairs * (self.head_dim + self.head_dim_v) // (2 if self.is_causal else 1)

    def flops_of(self, direction: Direction) -> float:
        """A backward counts for 2.5 forwards."""
        return FORWARDS[direction] * self.flops

    def bytes_of(self, direction: Direction) -> int:
        """The fewest that must move: each input read once, each output written once."""
        size = DTYPES[self.dtype].itemsize
        rows_q, rows_k = self.batch * self.heads * self.seqlen_q, self.batch * self.heads_kv * self.seqlen_k
        inputs = size * (rows_q * self.head_dim + rows_k * (self.head_dim + self.head_dim_v))
        out, lse = size * rows_q * self.head_dim_v, 4 * rows_q
        forward = inputs + out + lse
        backward = 2 * inputs + 2 * out + lse  # q, k, v, out, dout, lse; dq, dk, dv
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def spec(self, direction: Direction) -> AttentionSpec:
        """What the policy is asked."""
        return AttentionSpec(DTYPES[self.dtype], *self[:8], needs_grad=direction != "forward")


def grid(
    seqlens: Sequence[int],
    head_dims: Sequence[int],
    causal: Sequence[bool],
    dtypes: Sequence[str] = ("bf16",),
    *,
    tokens: int = 16384,
    batches: Sequence[int] = (),
    heads: int | None = None,
    heads_kv: int | None = None,
    seqlen_k: int | None = None,
    head_dim_v: int | None = None,
) -> list[Cell]:
    """Every combination. Batches: default as many as make ``tokens``; heads: default 2048 // head_dim."""
    return [
        Cell(b, heads or max(2048 // d, 1), heads_kv or heads or max(2048 // d, 1), s, seqlen_k or s, d, dv, c, t)
        for t in dtypes
        for d in head_dims
        for dv in (head_dim_v or d,)
        for c in causal
        for s in seqlens
        for b in (batches or (max(tokens // s, 1),))
    ]


def of_models(
    names: Iterable[str], dtypes: Sequence[str] = ("bf16",), batches: Sequence[int] = (), seqlens: Sequence[int] = ()
) -> list[Cell]:
    """The attention of models; ``batches`` and ``seqlens`` replace their own, the latter in self-attention only.

    Raises ValueError for a name that is not in meta.models.MODELS.
    """
    cells: dict[Cell, None] = {}
    for name in names:
        if name not in MODELS:
            raise ValueError(f"no model {name!r}: there are {', '.join(MODELS)}")
        for layer in MODELS[name]:
            is_self = layer.seqlen_q == layer.seqlen_k
            for b in batches or (layer.batch,):
                for s in seqlens if is_self and seqlens else (layer.seqlen_q,):
                    s_k = s if is_self else layer.seqlen_k
                    d = layer.head_dim
                    for t in dtypes:
                        cells[Cell(b, layer.heads, layer.heads_kv, s, s_k, d, d, layer.is_causal, t)] = None
    return list(cells)


CASES = {  # production calls, by number
    1: Cell(3, 16, 16, 1680, 1680, 80, 80),
    2: Cell(84, 16, 16, 64, 64, 80, 80),
    3: Cell(1, 16, 2, 1285, 1285, 80, 80, True),
    4: Cell(1, 16, 2, 1, 2048, 80, 80),
}
PRECISIONS = ("bf16", "fp16", "fp8")  # that are asked for with CASES


def of_calls(specs: Iterable[AttentionSpec]) -> tuple[list[tuple[Cell, Direction]], dict[str, int]]:
    """Cells of recorded calls, each once, with its direction; and how many calls were left out, by reason."""
    cells: dict[tuple[Cell, Direction], None] = {}
    left_out: dict[str, int] = {}
    for spec in specs:
        why = _left_out(spec)
        if why:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        cell = Cell(*spec[1:9], dtype=NAMES[spec.dtype])
        cells[cell, "both" if spec.needs_grad else "forward"] = None
    return list(cells), left_out


def _left_out(spec: AttentionSpec) -> str:
    if spec.mask != "none":
        return "with an attn_mask, whose content a log does not have"
    if spec.dropout_p:
        return "with dropout"
    if spec.dtype not in NAMES:
        return f"in {spec.dtype}"
    return "of size 0" if 0 in spec[1:8] else ""
