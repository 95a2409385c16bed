"""What the Hopper kernels can run, and with which tile. Free of the compiler."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ...meta.spec import AttentionSpec, Reason
from ...meta.target import Target
from ..key import KernelKey

ARCH = 90
SMEM_PER_BLOCK = 232_448  # bytes, what one CTA can opt in to on an H100
Q_STAGES = 2  # the next tile's Q is loaded while this one's is still in use
BARRIER_BYTES = 1024  # mbarriers and the alignment of the first buffer
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile of the forward kernel. Raises ValueError if it cannot be built."""

    head_dim: int
    head_dim_v: int
    tile_m: int  # query rows of a CTA: 64 per MMA warpgroup
    tile_n: int  # keys per block
    stages: int  # K and V blocks in flight

    def __post_init__(self) -> None:
        if self.tile_m % 64 or not 1 <= self.mma_warpgroups <= 3:
            raise ValueError(f"{self.tile_m=} must be 64, 128 or 192")
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            raise ValueError(f"{self.tile_n=} must be a multiple of 16 in [16, 256]")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.smem_bytes > SMEM_PER_BLOCK:
            raise ValueError(f"{self.smem_bytes=} must be at most {SMEM_PER_BLOCK}")

    @property
    def mma_warpgroups(self) -> int:
        return self.tile_m // 64

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of an MMA warpgroup and of the producer after reallocation (64 K per SM)."""
        return {1: (256, 56), 2: (240, 24), 3: (160, 32)}[self.mma_warpgroups]

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: 16-bit Q, K and V in every stage, and O."""
        q_o = self.tile_m * (Q_STAGES * self.head_dim + self.head_dim_v)
        k_v = self.stages * self.tile_n * (self.head_dim + self.head_dim_v)
        return 2 * (q_o + k_v) + BARRIER_BYTES


# From how many query rows on the 192-row tile of d64 serves a call, by is_causal. For speed, measured on an H100 (bf16,
# 16k tokens, 32 heads; docs/kernels/sm90_forward.md): full 3-15 % ahead at 512 … 16k, causal 10 % ahead at 16k and 3 %
# and more behind up to 4k.
WIDE_FROM = {False: 512, True: 8192}


def wants_wide_tile(head_dim: int, is_causal: bool, seqlen_q: int) -> bool:
    """Which of a head dim's tiles serves a call; asked at launch, where sizes are plain integers."""
    return head_dim == 64 and seqlen_q >= WIDE_FROM[is_causal]


@functools.cache
def forward_config(head_dim: int, head_dim_v: int, wide: bool = False) -> ForwardConfig:
    """Tile for a head dim; ValueError for head dims, or a wide tile, that no kernel has.

    d128: the accumulators (S and O, 64 registers each, P 32) leave room for two MMA warpgroups of 240 registers.
    d64: O is half of that, so three warpgroups of 160 fit, and each K and V block serves 192 rows; short sequences
    lose more to the ragged last tile than they win by that.
    """
    if head_dim != head_dim_v or head_dim not in HEAD_DIMS or (wide and head_dim != 64):
        raise ValueError(f"no forward kernel for head_dim={head_dim}, head_dim_v={head_dim_v}, wide={wide}")
    return ForwardConfig(head_dim, head_dim_v, tile_m=192 if wide else 128, tile_n=128, stages=2)


@functools.cache
def forward_key(dtype: torch.dtype, head_dim: int, head_dim_v: int, is_causal: bool, wide: bool = False) -> KernelKey:
    """Key of the forward kernel for what decides its code."""
    config = forward_config(head_dim, head_dim_v, wide)
    return KernelKey(
        "forward",
        ARCH,
        DTYPE_NAMES[dtype],
        head_dim,
        head_dim_v,
        is_causal,
        config.tile_m,
        config.tile_n,
        config.stages,
    )


def all_keys() -> tuple[KernelKey, ...]:
    """Every kernel of this family."""
    return tuple(
        forward_key(dtype, head_dim, head_dim, is_causal, wide)
        for dtype in DTYPE_NAMES
        for head_dim, wide in ((64, False), (64, True), (128, False))
        for is_causal in (False, True)
    )


def unsupported(spec: AttentionSpec, target: Target) -> tuple[Reason, ...]:
    """Every reason why these kernels cannot run ``spec``. Never looks at a size, so that none becomes a guard."""
    reasons = []
    if spec.dtype not in DTYPE_NAMES:
        reasons.append(Reason("dtype", f"{spec.dtype} is neither bfloat16 nor float16"))
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(Reason("head_dim", f"head_dim {spec.head_dim} is not one of {HEAD_DIMS}"))
    if spec.head_dim_v != spec.head_dim:
        reasons.append(Reason("head_dim_v", f"head_dim_v {spec.head_dim_v} differs from head_dim {spec.head_dim}"))
    if spec.mask != "none":
        reasons.append(Reason("attn_mask", f"there is no kernel for an attn_mask ({spec.mask})"))
    if spec.dropout_p > 0.0:
        reasons.append(Reason("dropout", f"there is no kernel with dropout (dropout_p={spec.dropout_p})"))
    if spec.scale is not None and not (math.isfinite(spec.scale) and spec.scale > 0.0):
        reasons.append(Reason("scale", f"scale {spec.scale} is not a positive finite number"))
    for code, asked in (
        ("bottom_right", spec.bottom_right and (spec.is_causal or spec.window)),
        ("window", spec.window),
        ("softcap", spec.softcap > 0.0),
        ("sink", spec.sink),
    ):
        if asked:
            reasons.append(Reason(code, f"the SM90 kernels have no {code} yet"))
    if spec.needs_grad:
        reasons.append(Reason("no_backward", "gradients are needed and there is no backward kernel"))
    if not spec.last_dim_contiguous:
        reasons.append(Reason("strides", "query, key and value must be contiguous in their last dimension"))
    smem = target.smem_per_block
    if smem and smem < SMEM_PER_BLOCK:
        reasons.append(Reason("shared_memory", f"{smem} bytes of shared memory per block, {SMEM_PER_BLOCK} needed"))
    return tuple(reasons)
