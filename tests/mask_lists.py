"""What the preparation of an attn_mask has to make of it, written out; for tests with a GPU and without one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fa_sdpa.kernels import masks
from fa_sdpa.kernels.sm90 import config
from fa_sdpa.kernels.sm90.config import LIST_HEADER, TRANSPOSED_HEADER
from fa_sdpa.meta.spec import mask_kind

LOW = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES = [torch.bool, *LOW]
SIZES = [(400, 515, None), (1, 700, None), (257, 130, (-70, 20)), (400, 515, (-330, 300))]  # queries, keys, window
TILES = [(128, 128), (64, 64), (128, 80), (192, 128)]
BACKWARD_TILES = [(128, 128), (64, 128), (64, 64)]


def visible(bits, n_block, rows, tile_n):
    """(rows, tile_n) bool of one key block's bits, (blocks, rows, 4) of one head."""
    words = bits[n_block, :rows].cpu()
    columns = torch.arange(tile_n)
    word, bit = columns % 8 // 2, columns // 8 * 2 + columns % 2
    return (words[:, word] >> bit & 1).bool()


def keys_of(words, tile_n):
    """(tile_n,) bool of a list's 4 words about the keys of a tile."""
    keys = torch.arange(tile_n)
    return (torch.tensor(words)[keys // 32] >> keys % 32 & 1).bool()


def padded(x, rows, columns, value):
    return F.pad(x, (0, columns - x.size(1), 0, rows - x.size(0)), value=value)


def with_tiles_alike(mask, tile_m, tile_n):
    """A floating mask (…, queries, keys) with tiles of nothing but small biases, of -inf, of larger biases, and of the
    lowest value."""
    rows = slice(tile_m, 2 * tile_m)
    mask[..., rows, 2 * tile_n : 3 * tile_n].normal_()
    mask[..., rows, 3 * tile_n : 4 * tile_n] = -math.inf
    mask[..., rows, 4 * tile_n : 5 * tile_n] = 2e4
    for rows in (slice(0, tile_m), slice(2 * tile_m, 3 * tile_m)):
        mask[..., rows, 3 * tile_n : 4 * tile_n] = LOW[mask.dtype]
    return mask


def check_lists(prepare, sq, sk, window, dtype, tile_m, tile_n):
    """Lists and bits of a forward against the same written out."""
    keep = (torch.rand(sq // 32 + 1, sk // 32 + 1) < 0.4).repeat_interleave(32, 0).repeat_interleave(32, 1)[:sq, :sk]
    keep[:, : 2 * tile_n] = True
    keep[:, 200:205] = False
    if dtype is torch.bool:
        mask = keep
    else:
        mask = torch.zeros(sq, sk, dtype=dtype).masked_fill(~keep, LOW[dtype])
        mask[:, -9:] = mask[:, -9:].masked_fill(mask[:, -9:] != 0, -math.inf)
        if sq > 200:
            mask[200, 140:] = torch.randn(sk - 140).to(dtype) if sk > 140 else 0
            mask[200, 200:203] = LOW[dtype]
            mask[20] = LOW[dtype]  # a row that sees nothing
        with_tiles_alike(mask, tile_m, tile_n)
    check_lists_of(prepare, mask, window, tile_m, tile_n)


def check_lists_of_unseen_rows(prepare, fill, dtype, tile_m, tile_n):
    """The same where a whole block of rows, and a ragged last one, has nothing but ``fill``, next to one that sees."""
    sq, sk = 2 * tile_m + 37, 2 * tile_n + 21
    mask = (torch.ones if dtype is torch.bool else torch.zeros)(sq, sk, dtype=dtype)
    mask[tile_m:] = fill
    check_lists_of(prepare, mask, None, tile_m, tile_n)


def check_lists_of(prepare, mask, window, tile_m, tile_n):
    """Lists and bits of a forward with ``mask``, (queries, keys), against the same written out."""
    (sq, sk), dtype, (left, right) = mask.shape, mask.dtype, window or (None, None)
    tiles = masks.Tiles(1, 1, sq, sk, left, right, tile_m, tile_n)
    done = prepare(mask[None, None], tiles, config.mask_key(mask_kind(dtype), tile_m, tile_n))
    distance = torch.arange(sk) - torch.arange(sq)[:, None]
    inside = (distance >= left) & (distance <= right) if window else torch.ones(sq, sk, dtype=torch.bool)
    value = torch.where(mask, 0.0, -math.inf) if dtype is torch.bool else mask.float()
    value = value.masked_fill(~inside, -math.inf)
    n_blocks = -(-sk // tile_n)
    for m in range(-(-sq // tile_m)):
        block = value[m * tile_m : (m + 1) * tile_m]
        low = (block <= -6e4) & (block > -math.inf)
        takes_low = bool((low.any(1) & ~(block >= -3e4).any(1)).any())
        whole, bits, biased, hiding, hidden = [], [], [], [], []
        for n in range(n_blocks):
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            seen, exists = tile > -6e4, torch.arange(tile_n) < sk - n * tile_n
            hidden.append([~some.any(0) & exists for some in (seen, tile > -math.inf)])  # as one with bits, as biased
            if (seen & (tile != 0)).any() or takes_low and ((tile <= -6e4) & (tile > -math.inf)).any():
                (hiding if (tile == -math.inf).any() else biased).append(n)
            elif seen.any():
                (whole if seen.all() else bits).append(n)
        entries = done.lists[0, 0, m].tolist()
        clear_end = 0 if dtype is torch.bool else len(whole) + len(bits) + len(biased)
        biased += hiding
        if not (whole or bits or biased):
            bits = [0]
        ends = [len(whole), len(whole) + len(bits), len(whole) + len(bits) + len(biased)]
        far = padded(block, len(block), n_blocks * tile_n, -math.inf).unflatten(1, (n_blocks, tile_n))[:, biased]
        is_far = bool(((far.abs() >= 6e4) & far.isfinite()).any())
        visited = [2 * n + int(hidden[n][n in biased].any()) for n in (*whole, *bits, *biased)]
        assert entries[: LIST_HEADER + ends[2]] == [*ends, 2 * clear_end + is_far, *visited]
        words = torch.tensor(entries[LIST_HEADER + n_blocks :]).view(-1, n_blocks, 4).tolist()
        assert len(words) == (1 if dtype is torch.bool else 2)
        for plane, of_blocks in enumerate(words):
            for n in range(n_blocks):
                assert torch.equal(keys_of(of_blocks[n], tile_n), hidden[n][plane])
        rows = slice(m * tile_m, m * tile_m + len(block))
        for n in bits:
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            assert torch.equal(visible(done.bits[0, 0][:, rows], n, len(block), tile_n), tile > -6e4)
        for n in hiding:  # of others no bits are read
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            got = visible(done.bits[0, 0][:, rows], n_blocks + n, len(block), tile_n)
            assert torch.equal(got, tile > -math.inf)


def transposed_bits(bits, m_block, keys, tile_m):
    """(tile_m, keys) bool of one query block's bits, (blocks, keys, 4) of one head and plane."""
    words = bits[m_block, :keys].mT
    rows = torch.arange(tile_m)
    word, bit = rows % 8 // 2, rows // 8 * 2 + rows % 2
    return (words[word] >> bit[:, None] & 1).bool()


def check_lists_of_a_backward(prepare, sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n):
    """The same for a backward."""
    keep = torch.rand(heads, sq // 32 + 1, sk // 32 + 1) < 0.4
    keep = keep.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :sq, :sk].clone()
    keep[:, :, : 2 * tile_n] = True
    keep[:, :, 200:205] = False
    if dtype is torch.bool:
        mask = keep
    else:
        mask = torch.zeros(heads, sq, sk, dtype=dtype).masked_fill(~keep, LOW[dtype])
        mask[..., -9:] = mask[..., -9:].masked_fill(mask[..., -9:] != 0, -math.inf)
        if sq > 200:
            mask[0, 200, 140:] = torch.randn(sk - 140).to(dtype) if sk > 140 else 0
            mask[0, 200, 200:203] = LOW[dtype]
            mask[0, 20] = LOW[dtype]  # a row that sees nothing
        with_tiles_alike(mask[:1], tile_m, tile_n)
    check_lists_of_a_backward_of(prepare, mask, sq, window, heads_kv, tile_m, tile_n)


def check_lists_of_a_backward_of_unseen_rows(prepare, fill, sk, window, heads, heads_kv, dtype, tile_m, tile_n):
    """The same where all rows, or but for the first head's all, have nothing but ``fill``, in a mask without rows."""
    mask = torch.full((heads, 1, sk), fill, dtype=dtype)
    check_lists_of_a_backward_of(prepare, mask, 2 * tile_m + 37, window, heads_kv, tile_m, tile_n)
    mask[0] = dtype is torch.bool
    check_lists_of_a_backward_of(prepare, mask, 2 * tile_m + 37, window, heads_kv, tile_m, tile_n)


def check_lists_of_a_backward_of(prepare, mask, sq, window, heads_kv, tile_m, tile_n):
    """Lists and bits of a backward with ``mask``, (heads, queries or 1, keys), against the same written out."""
    (heads, _, sk), dtype, (left, right) = mask.shape, mask.dtype, window or (None, None)
    tiles = masks.Tiles(1, heads, sq, sk, left, right, tile_m, tile_n, heads_kv)
    done = prepare(mask[None], tiles, config.mask_key(mask_kind(dtype), tile_m, tile_n, transposed=True))
    mask = mask.expand(-1, sq, -1)
    lists, planes = done.lists.cpu(), done.bits.cpu()
    distance = torch.arange(sk) - torch.arange(sq)[:, None]
    inside = (distance >= left) & (distance <= right) if window else torch.ones(sq, sk, dtype=torch.bool)
    value = torch.where(mask, 0.0, -math.inf) if dtype is torch.bool else mask.float()
    value = value.masked_fill(~inside, -math.inf)
    low = (value <= -6e4) & (value > -math.inf)
    m_blocks, n_blocks = -(-sq // tile_m), -(-sk // tile_n)
    for n in range(n_blocks):
        keys = slice(n * tile_n, (n + 1) * tile_n)
        for h in range(heads_kv):
            expected = {"hiding": [], "biased": [], "bits": [], "whole": []}
            hidden = torch.arange(tile_n) < sk - n * tile_n
            for m in range(m_blocks):
                kinds, tiles_of_heads = set(), {}
                rows = slice(m * tile_m, (m + 1) * tile_m)
                for head in range(h * heads // heads_kv, (h + 1) * heads // heads_kv):
                    block = value[head, rows]
                    takes_low = bool((low[head, rows].any(1) & ~(block >= -3e4).any(1)).any())
                    tile = padded(block[:, keys], len(block), tile_n, -math.inf)
                    seen, is_low = tile > -6e4, low[head, rows, keys].any()
                    is_biased = bool((seen & (tile != 0)).any()) or takes_low and bool(is_low)
                    hides = bool((tile == -math.inf).any() or is_low or (tile >= 6e4).any())
                    kind = "whole" if seen.all() else "bits" if seen.any() else "skipped"
                    kinds.add(("hiding" if hides else "biased") if is_biased else kind)
                    tiles_of_heads[head] = tile
                if kinds == {"skipped"}:
                    continue
                [kind] = [x for x in ("hiding", "biased") if x in kinds][:1] or [
                    "whole" if kinds == {"whole"} else "bits"
                ]
                expected[kind].append(m)
                for head, tile in tiles_of_heads.items():
                    visible = tile > -math.inf if kind in ("hiding", "biased") else tile > -6e4
                    hidden &= ~visible.any(0)
                    if kind in ("hiding", "bits"):  # those of others are not read
                        got = transposed_bits(planes[0, head, int(kind == "hiding"), :, keys], m, tile_n, tile_m)
                        assert torch.equal(got[: len(tile)], visible)
            entries = lists[0, h, n].tolist()
            counts = [len(blocks) for blocks in expected.values()]
            ends = [sum(counts[:end]) for end in (2, 3, 4)]
            assert entries[:3] == ends
            blocks = [m for kind in expected.values() for m in kind]
            assert entries[TRANSPOSED_HEADER : TRANSPOSED_HEADER + ends[2]] == blocks
            if blocks:
                assert entries[3] == 2 * counts[0] + int(hidden.any())
                assert torch.equal(keys_of(entries[4:TRANSPOSED_HEADER], tile_n), hidden)
