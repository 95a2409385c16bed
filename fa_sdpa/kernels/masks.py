"""An attn_mask as the kernels take it: tile lists and bits (sm90/mask.py, for the backward sm90/mask_transposed.py),
made on the device and kept.

A mask is the same if it is in the same storage, which has not been freed and not been written to since (torch's version
counter), at the same place with the same sizes and strides, and is asked for on the same stream. Code that writes to
memory behind torch's back breaks that rule. Compiled graphs do so all the time, reusing buffers, so nothing is kept
unless the caller says that it is `in_eager_mode`; nor for inference tensors, which have no version, or while a CUDA
graph is captured, whose replays must read the mask again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .compile import Kernel
from .sm90 import config as sm90

KEPT = 16  # at a time: lists and bits of a mask for some tiles, or a copy of biases
KEPT_BYTES = 64 << 20  # what is larger, the copy of a bias mostly, is not worth the memory …
KEPT_PART = 3  # … unless the mask itself has this many times as much: bits of biases take a quarter of it or less
UNBOUNDED = 1 << 30  # of a window


class Prepared(NamedTuple):
    """A mask for one kernel's tiles, with strides of 0 where it is broadcast: see the TileMask of sm90/forward.py, or
    of sm90/backward.py, whose shapes are given second."""

    lists: Tensor  # (B, H, query blocks, ≥ LIST_HEADER) or (B, heads_kv, key blocks, ≥ TRANSPOSED_HEADER) int32
    bits: Tensor  # (B, H, key blocks or twice as many, rows, 4) or (B, H, 1 or 2, query blocks, keys, 4) int32
    bias: Tensor | None  # (B, H, Sq, Sk) that TMA can address


class Tiles(NamedTuple):
    """Of what a mask is prepared for."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    left: int | None  # row i sees the keys i + left … i + right; None is no bound
    right: int | None
    tile_m: int
    tile_n: int
    heads_kv: int | None = None  # of a backward, in whose tiles the query heads of one of them share a list


Result = TypeVar("Result", Tensor, Prepared)


class _Eager(threading.local):
    on = False


_eager = _Eager()
_kept: dict[tuple, tuple[StorageWeakRef, Tensor | Prepared]] = {}


@contextlib.contextmanager
def in_eager_mode() -> Iterator[None]:
    """Masks that are prepared in this block, in this thread, come from calls of the program itself, one by one."""
    before, _eager.on = _eager.on, True
    try:
        yield
    finally:
        _eager.on = before


def is_in_eager_mode() -> bool:
    """Whether this is such a call."""
    return _eager.on


def prepared(attn_mask: Tensor, tiles: Tiles, load: Callable[[], Kernel]) -> Prepared:
    """``attn_mask``, (1 | B, 1 | H, 1 | Sq, 1 | Sk) on a GPU, for these tiles, on the current stream.

    Args:
        load: gives the kernel that prepares masks of this dtype for tiles of these sizes.
    """
    is_kept = _eager.on and not attn_mask.is_inference() and not torch.cuda.is_current_stream_capturing()

    def once(what: object, make: Callable[[], Result]) -> Result:
        return _kept_or_made(attn_mask, what, make) if is_kept else make()

    if attn_mask.dtype is torch.bool:
        return once(tiles, lambda: _prepare(attn_mask, tiles, load()))
    biases = once(tiles.seqlen_k, lambda: _addressable(_once(attn_mask), tiles.seqlen_k))
    done = once(tiles, lambda: _prepare(biases, tiles, load()))
    return done._replace(bias=biases.expand(tiles.batch, tiles.heads, tiles.seqlen_q, -1))


def _kept_or_made(mask: Tensor, what: object, make: Callable[[], Result]) -> Result:
    """What ``make`` gives for ``mask``, which is kept as long as the mask is the same, unless that takes much memory or
    is the mask's own."""
    storage = mask.untyped_storage()
    place: tuple = (storage._cdata, mask.data_ptr(), mask._version, mask.dtype, mask.shape, mask.stride())
    wanted = (*place, torch.cuda.current_stream(mask.device).cuda_stream, what)
    found = _kept.get(wanted)
    if found is not None and not found[0].expired():
        return found[1]  # type: ignore[return-value]
    for key in [key for key, (owner, _) in list(_kept.items()) if owner.expired()]:
        _kept.pop(key, None)
    done = make()
    memory = [x.untyped_storage() for x in (done if isinstance(done, tuple) else (done,)) if x is not None]
    is_own = any(x._cdata == storage._cdata for x in memory)  # which would keep the mask itself
    if not is_own and sum(x.nbytes() for x in memory) <= max(KEPT_BYTES, storage.nbytes() // KEPT_PART):
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[wanted] = StorageWeakRef(storage), done
    return done


def forget() -> None:
    """Keep none of them."""
    _kept.clear()


def _prepare(attn_mask: Tensor, tiles: Tiles, run: Kernel) -> Prepared:
    """Launch what classifies the tiles and makes the lists; only metadata is looked at here. Biases are not in it."""
    if tiles.heads_kv is not None:
        return _prepare_transposed(attn_mask, tiles, tiles.heads_kv, run)
    mask = _once(attn_mask)
    has_rows = _has_rows(mask, tiles)
    batch, heads = mask.shape[:2]
    m_blocks = -(-tiles.seqlen_q // tiles.tile_m) if has_rows else 1
    n_blocks = -(-tiles.seqlen_k // tiles.tile_n)
    is_bool = mask.dtype is torch.bool
    rows = m_blocks * tiles.tile_m if has_rows else 1

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=mask.device)

    planes = 1 if is_bool else 2
    lists = empty(batch, heads, m_blocks, sm90.LIST_HEADER + (1 + 4 * planes) * n_blocks)
    bits = empty(batch, heads, planes * n_blocks, rows, 4)
    kinds = empty(batch, heads, m_blocks, n_blocks)
    found = None if is_bool else empty(batch, heads, m_blocks, n_blocks, sm90.mask_warps(tiles.tile_m))
    whole = mask.expand(-1, -1, tiles.seqlen_q if has_rows else 1, tiles.seqlen_k)
    run(whole.view(torch.uint8) if is_bool else whole, kinds, found, bits, lists, *_bounds(tiles))
    all_rows = -(-tiles.seqlen_q // tiles.tile_m) * tiles.tile_m
    return Prepared(
        lists.expand(tiles.batch, tiles.heads, all_rows // tiles.tile_m, -1),
        bits.expand(tiles.batch, tiles.heads, -1, all_rows, -1),
        None,
    )


def _prepare_transposed(attn_mask: Tensor, tiles: Tiles, heads_kv: int, run: Kernel) -> Prepared:
    """The same for a backward."""
    mask = _once(attn_mask)
    has_rows = _has_rows(mask, tiles)
    batch, heads = mask.shape[:2]
    all_m_blocks, n_blocks = -(-tiles.seqlen_q // tiles.tile_m), -(-tiles.seqlen_k // tiles.tile_n)
    m_blocks, rows = (all_m_blocks, tiles.seqlen_q) if has_rows else (1, tiles.tile_m)
    is_bool = mask.dtype is torch.bool

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=mask.device)

    lists = empty(batch, heads_kv if heads > 1 else 1, n_blocks, sm90.TRANSPOSED_HEADER + all_m_blocks)
    planes = 1 if is_bool else 2
    bits = empty(batch, heads, planes, m_blocks, n_blocks * tiles.tile_n, 4)
    kinds = empty(batch, heads, m_blocks, n_blocks)
    hidden = empty(batch, heads, m_blocks, n_blocks, 4, planes)
    words = tiles.tile_m // sm90.MASK_ROWS * (tiles.tile_n // 32)
    found = None if is_bool else empty(batch, heads, m_blocks, n_blocks, words)
    whole = mask.expand(-1, -1, rows, tiles.seqlen_k)
    all_kinds = kinds.expand(-1, -1, all_m_blocks, -1), hidden.expand(-1, -1, all_m_blocks, -1, -1, -1)
    scratch = kinds, found, hidden
    run(whole.view(torch.uint8) if is_bool else whole, *scratch, bits, *all_kinds, lists, *_bounds(tiles))
    return Prepared(
        lists.expand(tiles.batch, heads_kv, -1, -1),
        bits.expand(tiles.batch, tiles.heads, -1, all_m_blocks, -1, -1),
        None,
    )


def _has_rows(mask: Tensor, tiles: Tiles) -> bool:
    """Whether rows differ."""
    return mask.size(2) > 1 or tiles.left is not None or tiles.right is not None


def _bounds(tiles: Tiles) -> tuple[int, int]:
    """left and right as the kernels take them."""
    left = -UNBOUNDED if tiles.left is None else max(tiles.left, -UNBOUNDED)
    return left, UNBOUNDED if tiles.right is None else min(tiles.right, UNBOUNDED)


def _once(mask: Tensor) -> Tensor:
    """``mask`` without what it repeats: size 1 where its stride is 0."""
    for dim in range(4):
        if mask.size(dim) > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _addressable(mask: Tensor, seqlen_k: int) -> Tensor:
    """``mask`` with ``seqlen_k`` keys as TMA loads it: its address and strides multiples of 16 bytes, 0 where a size is
    1. A view of itself, or a copy."""
    unit = 16 // mask.element_size()
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    is_aligned = mask.data_ptr() % 16 == 0 and not any(stride % unit for stride in strides[:3])
    if strides[3] == 1 and is_aligned:
        return mask.as_strided(mask.shape, strides)
    copy = mask.new_empty((*mask.shape[:3], -(-seqlen_k // unit) * unit))[..., :seqlen_k]
    copy.copy_(mask)
    strides = [0 if size == 1 else stride for size, stride in zip(copy.shape[:3], copy.stride()[:3], strict=True)]
    return copy.as_strided(copy.shape, (*strides, 1))
