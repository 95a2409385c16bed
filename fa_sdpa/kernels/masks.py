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
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import _torch_private as private
from .compile import Kernel
from .sm90 import config as sm90

KEPT = 24  # at a time: lists and bits of a mask for some tiles, a copy of biases, or what was found out about it
KEPT_BYTES = 64 << 20  # what is larger, the copy of a bias mostly, is not worth the memory …
KEPT_PART = 3  # … unless the mask itself has this many times as much: bits of biases take a quarter of it or less
UNBOUNDED = 1 << 30  # of a window
ALIGNMENT = 16  # bytes, of addresses and strides that TMA takes

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # size and stride
Place = tuple[Any, ...]  # what a mask that is the same has the same


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


class _Finding:
    """Whether a floating mask is 0 for all keys that it does not hide. The device is asked, and the host looks when it
    comes by: it waits for nothing."""

    def __init__(self, lists: Tensor) -> None:
        """``lists`` of a backward: of no block of keys are there biased blocks of queries."""
        only_hides = (_once(lists)[..., 0] == 0).all()
        self._answer: Tensor | None = only_hides  # until it was looked at
        self._boolean: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if lists.is_cuda:
            self._answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._answer.copy_(only_hides, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_settled(self) -> bool:
        """Whether the answer was looked at."""
        return self._answer is None

    def boolean(self, mask: Tensor) -> Tensor | None:
        """``mask`` as a boolean one, if it is known to be one."""
        if self._answer is not None and (self._event is None or self._event.query()):
            if self._answer:
                self._boolean = _once(mask) == 0
            self._answer = None
        return self._boolean


Result = TypeVar("Result", Tensor, Prepared)


class _Eager(threading.local):
    on = False


_eager = _Eager()
_kept: dict[tuple, tuple[StorageWeakRef, Tensor | Prepared | _Finding]] = {}


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


def prepared(attn_mask: Tensor, tiles: Tiles, load: Callable[[], Kernel], keeps: bool | None = None) -> Prepared:
    """``attn_mask``, (1 | B, 1 | H, 1 | Sq, 1 | Sk) on the current GPU, for these tiles, on the current stream.

    Args:
        load: gives the kernel that prepares masks of this dtype for tiles of these sizes.
        keeps: whether the call comes from the program itself; None asks `is_in_eager_mode`.
    """
    return _prepared(attn_mask, _place(attn_mask) if _may_be_kept(attn_mask, keeps) else None, tiles, load)


def _prepared(attn_mask: Tensor, place: Place | None, tiles: Tiles, load: Callable[[], Kernel]) -> Prepared:
    """``place``: None if nothing is to be kept."""

    def once(what: object, make: Callable[[], Result]) -> Result:
        return make() if place is None else _kept_or_made(attn_mask, place + (what,), make)

    if attn_mask.dtype is torch.bool:
        return once(tiles, lambda: _prepare(attn_mask, tiles, load()))
    layout = _bias_layout(attn_mask.dtype, attn_mask.shape, attn_mask.stride(), tiles)
    if layout is not None and attn_mask.data_ptr() % ALIGNMENT == 0:
        biases = attn_mask.as_strided(*layout)
    else:
        copy = once(tiles.seqlen_k, lambda: _copy(_once(attn_mask), tiles.seqlen_k))
        biases = copy.expand(tiles.batch, tiles.heads, tiles.seqlen_q, -1)
    done = once(tiles, lambda: _prepare(biases, tiles, load()))
    return Prepared(done.lists, done.bits, biases)


def as_boolean(attn_mask: Tensor, tiles: Tiles, keeps: bool | None = None) -> Tensor | None:
    """A floating mask as a boolean one, (1 | B, 1 | H, 1 | Sq, 1 | Sk), that hides the same keys, if it is known to do
    no more. What `prepared` made of it for a backward's ``tiles`` tells: the second call with a mask that is kept asks
    the device, and later ones may have the answer. ``attn_mask`` and ``keeps`` as of `prepared`."""
    if attn_mask.dtype is torch.bool or not _may_be_kept(attn_mask, keeps):
        return None
    finding = _finding(attn_mask, _place(attn_mask), tiles)
    return None if finding is None else finding.boolean(attn_mask)


def _finding(attn_mask: Tensor, place: Place, tiles: Tiles) -> _Finding | None:
    """Whether a floating mask that is kept is as good as a boolean one; None if that can't be asked, or not yet."""
    finding = _find((*place, _Finding))
    if finding is None:
        before = _find((*place, tiles))
        is_whole = tiles.left is None and tiles.right is None  # else what is outside the window was not looked at
        if before is None or not is_whole or _once(attn_mask).numel() > KEPT_BYTES:
            return None
        finding = _Finding(before.lists)
        _keep((*place, _Finding), attn_mask.untyped_storage(), finding)
    return finding


def _may_be_kept(mask: Tensor, keeps: bool | None) -> bool:
    in_eager_mode = _eager.on if keeps is None else keeps
    return in_eager_mode and not mask.is_inference() and not torch.cuda.is_current_stream_capturing()


def _place(mask: Tensor) -> Place:
    """What a mask that is the same has the same."""
    storage = mask.untyped_storage()
    stream = private.current_stream(mask.get_device())
    return storage._cdata, mask.data_ptr(), mask._version, mask.dtype, mask.shape, mask.stride(), stream


def _find(wanted: tuple) -> Any:
    """What is kept of a mask that is still there."""
    found = _kept.get(wanted)
    return None if found is None or found[0].expired() else found[1]


def _kept_or_made(mask: Tensor, wanted: tuple, make: Callable[[], Result]) -> Result:
    """What ``make`` gives for ``mask``, which is kept as long as the mask is the same, but for what is large."""
    done = _find(wanted)
    if done is None:
        for key in [key for key, (owner, _) in list(_kept.items()) if owner.expired()]:
            _kept.pop(key, None)
        done, storage = make(), mask.untyped_storage()
        memory = [x.untyped_storage() for x in (done if isinstance(done, tuple) else (done,)) if x is not None]
        if sum(x.nbytes() for x in memory) <= max(KEPT_BYTES, storage.nbytes() // KEPT_PART):
            _keep(wanted, storage, done)
    return done


def _keep(wanted: tuple, storage: torch.UntypedStorage, done: Tensor | Prepared | _Finding) -> None:
    _make_room(_kept)
    _kept[wanted] = StorageWeakRef(storage), done


def _make_room(kept: dict[Any, Any]) -> None:
    """For one more; other threads may be at it, too."""
    for oldest in list(kept)[: max(len(kept) - KEPT + 1, 0)]:
        kept.pop(oldest, None)


def forget() -> None:
    """Keep none of them."""
    _kept.clear()
    _latest.clear()


class _Latest(NamedTuple):
    """The mask of the last call of a kind, and what `Repeated` gives for it."""

    owner: weakref.ref[Tensor]
    storage: StorageWeakRef  # while this is held no other storage gets its address
    address: int
    version: int
    stream: int
    found: Prepared | Tensor


_latest: dict[object, _Latest] = {}


class Repeated:
    """`prepared` for calls that repeat, whose masks have one layout on one device, with ``tiles``, ``load`` and
    ``keeps`` as there. Gives a boolean mask where a floating one is as good as that and the caller says that it is
    `faster_if_boolean`: see `as_boolean`.

    The mask of the last call is known by the tensor object, which is what a model hands to all its layers: the search
    for what is kept of any mask, and views of it, take the host longer than the launch.
    """

    __slots__ = ("_tiles", "_load", "_keeps", "_packed", "_faster_if_boolean", "_device", "_name")

    def __init__(
        self,
        tiles: Tiles,
        load: Callable[[], Kernel],
        keeps: bool,
        device: int,
        packed: int | None = None,
        faster_if_boolean: bool = False,
    ) -> None:
        """``packed``: as of `in_4d`."""
        self._tiles, self._load, self._keeps, self._device = tiles, load, keeps, device
        self._packed, self._faster_if_boolean = packed, faster_if_boolean
        self._name = object()  # in ``_latest``, which shall not keep a launch that nobody makes any more

    def __call__(self, attn_mask: Tensor) -> Prepared | Tensor:
        latest = _latest.get(self._name)
        if (
            latest is not None
            and latest.owner() is attn_mask
            and latest.version == attn_mask._version
            and latest.address == attn_mask.data_ptr()
            and latest.storage.cdata == attn_mask.untyped_storage()._cdata
            and latest.stream == private.current_stream(self._device)
            and not torch.cuda.is_current_stream_capturing()
        ):
            return latest.found
        mask = in_4d(attn_mask, self._packed)
        if not _may_be_kept(mask, self._keeps):
            return _prepared(mask, None, self._tiles, self._load)
        place = _place(mask)
        finding = _finding(mask, place, self._tiles) if self._faster_if_boolean else None
        boolean = None if finding is None else finding.boolean(mask)
        if boolean is not None:
            self._remember(attn_mask, place, _Finding, boolean)
            return boolean
        done = _prepared(mask, place, self._tiles, self._load)
        if not self._faster_if_boolean or finding is not None and finding.is_settled:  # there is no better to come
            self._remember(attn_mask, place, self._tiles, done)
        return done

    def _remember(self, attn_mask: Tensor, place: Place, what: object, found: Prepared | Tensor) -> None:
        """What was found, if it is kept."""
        kept, name = _kept.get((*place, what)), self._name
        if kept is None:
            return
        if isinstance(found, Prepared) and found.bias is not None:  # a view would keep the mask itself alive
            found = found._replace(bias=found.bias.detach())
        _make_room(_latest)
        owner = weakref.ref(attn_mask, lambda _: _latest.pop(name, None))
        _latest[name] = _Latest(owner, kept[0], place[1], place[2], place[-1], found)


def in_4d(attn_mask: Tensor, packed: int | None = None) -> Tensor:
    """A mask in 4 dimensions; for calls with one query per head, the heads that share one of ``packed`` key/value heads
    are rows of one head."""
    mask = attn_mask if attn_mask.dim() == 4 else attn_mask[(None,) * (4 - attn_mask.dim())]
    return mask if packed is None or mask.size(1) == 1 else mask.unflatten(1, (packed, -1)).squeeze(3)


class _Recipe(NamedTuple):
    """What a preparation reads, makes and passes on, for masks of one layout."""

    mask: Layout  # without what it repeats
    made: tuple[Layout, ...]  # int32: lists, bits, and what the preparation alone needs
    arguments: tuple[tuple[int, Layout] | None, ...]  # of its kernels, after the mask: which of these, as what
    bounds: tuple[int, int]  # left and right as these take them
    lists: Layout  # as the attention kernel sees them
    bits: Layout


def _prepare(attn_mask: Tensor, tiles: Tiles, run: Kernel) -> Prepared:
    """Launch what classifies the tiles and makes the lists; only metadata is looked at here. Biases are not in it."""
    recipe = _recipe(attn_mask.dtype, attn_mask.shape, attn_mask.stride(), tiles)
    mask = (attn_mask.view(torch.uint8) if attn_mask.dtype is torch.bool else attn_mask).as_strided(*recipe.mask)
    empty = private.empty_strided_cuda if mask.is_cuda else _empty_strided
    made = [empty(*layout, torch.int32) for layout in recipe.made]
    run(mask, *(x and made[x[0]].as_strided(*x[1]) for x in recipe.arguments), *recipe.bounds)
    return Prepared(made[0].as_strided(*recipe.lists), made[1].as_strided(*recipe.bits), None)


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On the CPU."""
    return torch.empty_strided(size, stride, dtype=dtype)


@functools.lru_cache(maxsize=4096)
def _recipe(dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...], tiles: Tiles) -> _Recipe:
    """For masks of this layout."""
    mask = _once(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
    has_rows = mask.size(2) > 1 or tiles.left is not None or tiles.right is not None
    left = -UNBOUNDED if tiles.left is None else max(tiles.left, -UNBOUNDED)
    bounds = left, UNBOUNDED if tiles.right is None else min(tiles.right, UNBOUNDED)
    if tiles.heads_kv is None:
        return _recipe_of_rows(mask, has_rows, tiles)._replace(bounds=bounds)
    return _recipe_of_keys(mask, has_rows, tiles, tiles.heads_kv)._replace(bounds=bounds)


def _recipe_of_rows(mask: Tensor, has_rows: bool, tiles: Tiles) -> _Recipe:
    """For a forward, but for the bounds."""
    batch, heads = mask.shape[:2]
    all_blocks, n_blocks = -(-tiles.seqlen_q // tiles.tile_m), -(-tiles.seqlen_k // tiles.tile_n)
    m_blocks, rows = (all_blocks, all_blocks * tiles.tile_m) if has_rows else (1, 1)
    planes = 1 if mask.dtype is torch.bool else 2
    kinds = batch, heads, m_blocks, n_blocks
    lists = _meta(batch, heads, m_blocks, sm90.LIST_HEADER + (1 + 4 * planes) * n_blocks)
    bits = _meta(batch, heads, planes * n_blocks, rows, 4)
    rest = [_meta(*kinds)] + [_meta(*kinds, sm90.mask_warps(tiles.tile_m))] * (planes - 1)
    made = tuple(map(_layout, (lists, bits, *rest)))
    return _Recipe(
        _layout(mask.expand(-1, -1, tiles.seqlen_q if has_rows else 1, tiles.seqlen_k)),
        made,
        ((2, made[2]), (3, made[3]) if planes == 2 else None, (1, made[1]), (0, made[0])),
        (0, 0),
        _layout(lists.expand(tiles.batch, tiles.heads, all_blocks, -1)),
        _layout(bits.expand(tiles.batch, tiles.heads, -1, all_blocks * tiles.tile_m, -1)),
    )


def _recipe_of_keys(mask: Tensor, has_rows: bool, tiles: Tiles, heads_kv: int) -> _Recipe:
    """For a backward."""
    batch, heads = mask.shape[:2]
    all_blocks, n_blocks = -(-tiles.seqlen_q // tiles.tile_m), -(-tiles.seqlen_k // tiles.tile_n)
    m_blocks, rows = (all_blocks, tiles.seqlen_q) if has_rows else (1, tiles.tile_m)
    planes = 1 if mask.dtype is torch.bool else 2
    lists = _meta(batch, heads_kv if heads > 1 else 1, n_blocks, sm90.TRANSPOSED_HEADER + all_blocks)
    bits = _meta(batch, heads, planes, m_blocks, n_blocks * tiles.tile_n, 4)
    kinds = _meta(batch, heads, m_blocks, n_blocks)
    hidden = _meta(*kinds.shape, 4, planes)
    words = tiles.tile_m // sm90.MASK_ROWS * (tiles.tile_n // 32)
    made = tuple(map(_layout, (lists, bits, kinds, hidden, *[_meta(*kinds.shape, words)] * (planes - 1))))
    all_kinds = _layout(kinds.expand(-1, -1, all_blocks, -1))
    all_hidden = _layout(hidden.expand(-1, -1, all_blocks, -1, -1, -1))
    found = (4, made[4]) if planes == 2 else None
    return _Recipe(
        _layout(mask.expand(-1, -1, rows, tiles.seqlen_k)),
        made,
        ((2, made[2]), found, (3, made[3]), (1, made[1]), (2, all_kinds), (3, all_hidden), (0, made[0])),
        (0, 0),
        _layout(lists.expand(tiles.batch, heads_kv, -1, -1)),
        _layout(bits.expand(tiles.batch, tiles.heads, -1, all_blocks, -1, -1)),
    )


def _meta(*sizes: int) -> Tensor:
    return torch.empty(sizes, device="meta")


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), x.stride()


def _once(mask: Tensor) -> Tensor:
    """``mask`` without what it repeats: size 1 where its stride is 0."""
    for dim in range(4):
        if mask.size(dim) > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


@functools.lru_cache(maxsize=4096)
def _bias_layout(dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...], tiles: Tiles) -> Layout | None:
    """Biases as the kernels take them, of masks of this layout at an address that TMA takes; None if it takes none."""
    mask = _once(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    if strides[3] != 1 or any(stride * dtype.itemsize % ALIGNMENT for stride in strides[:3]):
        return None
    return _layout(mask.as_strided(mask.shape, strides).expand(tiles.batch, tiles.heads, tiles.seqlen_q, -1))


def _copy(mask: Tensor, seqlen_k: int) -> Tensor:
    """``mask`` with ``seqlen_k`` keys where TMA can address it, with strides of 0 where a size is 1."""
    unit = ALIGNMENT // mask.element_size()
    copy = mask.new_empty((*mask.shape[:3], -(-seqlen_k // unit) * unit))[..., :seqlen_k]
    copy.copy_(mask)
    strides = [0 if size == 1 else stride for size, stride in zip(copy.shape[:3], copy.stride()[:3], strict=True)]
    return copy.as_strided(copy.shape, (*strides, 1))
