"""KernelKey: everything that changes the generated code of one kernel, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

DTYPES = ("bf16", "fp16")
MASK_DTYPES = ("bool", "bf16", "fp16", "fp32")
DIRECTIONS = ("forward", "backward", "mask")
_NAME = re.compile(
    r"(?P<direction>[a-z]+)_sm(?P<arch>\d+)_(?P<dtype>[a-z0-9]+)_d(?P<head_dim>\d+)_dv(?P<head_dim_v>\d+)"
    r"_(?P<mask>full|causal|window)_m(?P<tile_m>\d+)_n(?P<tile_n>\d+)_s(?P<stages>\d+)"
    r"(?P<softcap>_softcap)?(?P<sink>_sink)?(?P<split>_split)?(?P<deterministic>_deterministic)?"
    r"(?P<transposed>_transposed)?(?:_mask(?P<attn_mask>[a-z0-9]+))?"
)


@dataclasses.dataclass(frozen=True)
class KernelKey:
    """One compiled kernel. Sizes other than head dims, strides and scale are arguments of the kernel, not of its code.

    With direction "mask", kernels that prepare a mask of ``dtype`` for a forward of these tiles, or a backward; its
    head dims are 0.

    Raises ValueError for a value that no kernel can have; what one family can run is its ``config``'s business.
    """

    direction: str  # of DIRECTIONS
    arch: int  # compute capability times ten
    dtype: str  # of DTYPES, or of MASK_DTYPES
    head_dim: int
    head_dim_v: int
    is_causal: bool
    tile_m: int  # query rows per CTA
    tile_n: int  # keys per block
    stages: int  # K and V blocks in flight
    window: bool = False  # each row sees the keys between two bounds, which are arguments of the kernel
    softcap: bool = False  # scores are capped; the cap is an argument
    sink: bool = False  # every row's softmax has one more score, an argument
    split: bool = False  # several CTAs share the keys of a tile, and their results are combined
    deterministic: bool = False  # the backward adds dq up in a fixed order
    attn_mask: str = ""  # of MASK_DTYPES: for calls with such a mask, whose tile lists and bits the kernel gets
    transposed: bool = False  # a mask is prepared for a backward, whose tiles are blocks of keys

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"{self.direction=} must be one of {DIRECTIONS}")
        is_mask = self.direction == "mask"
        dtypes = MASK_DTYPES if is_mask else DTYPES
        if self.dtype not in dtypes:
            raise ValueError(f"{self.dtype=} must be one of {dtypes}")
        if is_mask and (self.head_dim or self.head_dim_v or self.is_causal or self.window or self.stages != 1):
            raise ValueError("a mask is prepared whatever the head dims, is_causal and window: 0, False, and one stage")
        if self.attn_mask and self.attn_mask not in MASK_DTYPES:
            raise ValueError(f"{self.attn_mask=} must be one of {MASK_DTYPES}")
        if self.attn_mask and (is_mask or self.is_causal or self.window or self.split or self.deterministic):
            raise ValueError(f"{self.attn_mask=}: its lists and bits stand for is_causal and window; in no fixed order")
        if self.transposed and not is_mask:
            raise ValueError(f"{self.transposed=}: only a mask")
        for name in () if is_mask else ("head_dim", "head_dim_v"):
            if getattr(self, name) <= 0 or getattr(self, name) % 8:
                raise ValueError(f"self.{name}={getattr(self, name)} must be a positive multiple of 8")
        if self.tile_m <= 0 or self.tile_m % 16:
            raise ValueError(f"{self.tile_m=} must be a positive multiple of 16")
        if self.tile_n <= 0 or self.tile_n % 16:
            raise ValueError(f"{self.tile_n=} must be a positive multiple of 16")
        if self.stages < 1:
            raise ValueError(f"{self.stages=} must be at least 1")
        if self.window and self.is_causal:
            raise ValueError(f"{self.window=}: its right bound replaces is_causal")
        if self.sink and self.direction == "backward":
            raise ValueError(f"{self.sink=}: to the backward a sink is part of lse")
        if self.split and (self.direction == "backward" or self.is_causal or self.window or self.sink):
            raise ValueError(f"{self.split=}: only a forward in which every row sees every key, without a sink")
        if self.deterministic and self.direction == "forward":
            raise ValueError(f"{self.deterministic=}: the forward always is")

    @property
    def name(self) -> str:
        """Stable name: the exported function, the manifest's entry, the cache's key."""
        mask = "window" if self.window else "causal" if self.is_causal else "full"
        return (
            f"{self.direction}_sm{self.arch}_{self.dtype}_d{self.head_dim}_dv{self.head_dim_v}_{mask}"
            f"_m{self.tile_m}_n{self.tile_n}_s{self.stages}{'_softcap' * self.softcap}{'_sink' * self.sink}"
            f"{'_split' * self.split}{'_deterministic' * self.deterministic}{'_transposed' * self.transposed}"
            f"{f'_mask{self.attn_mask}' if self.attn_mask else ''}"
        )

    @classmethod
    def parse(cls, name: str) -> KernelKey:
        """The key of a name; ValueError if ``name`` is not one."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a kernel name")
        values: dict[str, Any] = {k: int(v) if v and v.isdigit() else v for k, v in match.groupdict().items()}
        mask = values.pop("mask")
        values["is_causal"], values["window"] = mask == "causal", mask == "window"
        values["attn_mask"] = values["attn_mask"] or ""
        for flag in ("softcap", "sink", "split", "deterministic", "transposed"):
            values[flag] = bool(values[flag])
        return cls(**values)
