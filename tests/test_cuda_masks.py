"""attn_mask on a GPU that has kernels: tile lists and bits, numerics, what leaks, what is kept. Skipped elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_cuda import inputs, lacking
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa
from fa_sdpa import reference
from fa_sdpa.kernels import launch, masks
from fa_sdpa.kernels.jit import kernel
from fa_sdpa.kernels.sm90 import config
from fa_sdpa.kernels.sm90.config import LIST_ENDS

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd = torch.ops.fa4.attention_fwd
LOW = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(autouse=True)
def nothing_kept():
    masks.forget()
    fa_sdpa.reset_stats()
    yield
    masks.forget()


def assert_within_bound(actual, q, k, v, mask, **options):
    wide = mask if mask.dtype is torch.bool else mask.double()
    expected, _ = reference.attention(q.double(), k.double(), v.double(), attn_mask=wide, **options)
    baseline, _ = reference.attention(q, k, v, attn_mask=mask, **options)
    excess = reference.excess(actual, expected, baseline)
    assert excess <= 0, f"over the bound by {excess:.3g}; {reference.worst(actual, expected)}"


# ---- preparation -----------------------------------------------------------------------------------------------------


def visible(bits, n_block, rows, tile_n):
    """(rows, tile_n) bool of one key block's bits, (blocks, rows, 4) of one head."""
    words = bits[n_block, :rows].cpu()
    columns = torch.arange(tile_n)
    word, bit = columns % 8 // 2, columns // 8 * 2 + columns % 2
    return (words[:, word] >> bit & 1).bool()


def padded(x, rows, columns, value):
    return F.pad(x, (0, columns - x.size(1), 0, rows - x.size(0)), value=value)


@pytest.mark.parametrize("tile_m, tile_n", [(128, 128), (64, 64), (128, 80)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sq, sk, window", [(300, 515, None), (1, 700, None), (257, 130, (-70, 20))])
def test_lists_and_bits(sq, sk, window, dtype, tile_m, tile_n):
    """Against the same written out on the CPU."""
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
            mask[20] = LOW[dtype]  # a row that sees nothing
    left, right = window or (None, None)
    tiles = masks.Tiles(1, 1, sq, sk, left, right, tile_m, tile_n)
    key = config.mask_key({torch.bool: "bool", **{t: n for n, t in NAMES.items()}}[dtype], tile_m, tile_n)
    done = masks.prepared(mask.cuda()[None, None], tiles, lambda: kernel(key))
    distance = torch.arange(sk) - torch.arange(sq)[:, None]
    inside = (distance >= left) & (distance <= right) if window else torch.ones(sq, sk, dtype=torch.bool)
    value = torch.where(keep, 0.0, -math.inf) if dtype is torch.bool else mask.float()
    value = value.masked_fill(~inside, -math.inf)
    n_blocks = -(-sk // tile_n)
    for m in range(-(-sq // tile_m)):
        block = value[m * tile_m : (m + 1) * tile_m]
        low = (block <= -6e4) & (block > -math.inf)
        takes_low = bool((low.any(1) & ~(block >= -3e4).any(1)).any())
        whole, bits, biased = [], [], []
        for n in range(n_blocks):
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            seen = tile > -6e4
            if (seen & (tile != 0)).any() or takes_low and ((tile <= -6e4) & (tile > -math.inf)).any():
                biased.append(n)
            elif seen.any():
                (whole if seen.all() else bits).append(n)
        entries = done.lists[0, 0, m].tolist()
        if not (whole or bits or biased):
            bits = [0]
        ends = [len(whole), len(whole) + len(bits), len(whole) + len(bits) + len(biased)]
        far = padded(block, len(block), n_blocks * tile_n, -math.inf).unflatten(1, (n_blocks, tile_n))[:, biased]
        is_far = bool(((far.abs() >= 6e4) & far.isfinite()).any())
        assert entries[: config.LIST_HEADER + ends[2]] == [*ends, int(is_far), *whole, *bits, *biased]
        rows = slice(m * tile_m, m * tile_m + len(block))
        for n in bits:
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            assert torch.equal(visible(done.bits[0, 0][:, rows], n, len(block), tile_n), tile > -6e4)
        for n in biased:
            tile = padded(block[:, n * tile_n : (n + 1) * tile_n], len(block), tile_n, -math.inf)
            got = visible(done.bits[0, 0][:, rows], n_blocks + n, len(block), tile_n)
            assert torch.equal(got, tile > -math.inf)


def transposed_bits(bits, m_block, keys, tile_m):
    """(tile_m, keys) bool of one query block's bits, (blocks, keys, 4) of one head and plane."""
    words = bits[m_block, :keys].mT
    rows = torch.arange(tile_m)
    word, bit = rows % 8 // 2, rows // 8 * 2 + rows % 2
    return (words[word] >> bit[:, None] & 1).bool()


@pytest.mark.parametrize("tile_m, tile_n", [(128, 128), (64, 128), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, heads_kv", [(1, 1), (4, 2)])
@pytest.mark.parametrize("sq, sk, window", [(300, 515, None), (1, 700, None), (257, 130, (-70, 20))])
def test_lists_and_bits_of_a_backward(sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n):
    """Against the same written out on the CPU."""
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
            mask[0, 20] = LOW[dtype]  # a row that sees nothing
    left, right = window or (None, None)
    tiles = masks.Tiles(1, heads, sq, sk, left, right, tile_m, tile_n, heads_kv)
    name = {torch.bool: "bool", **{t: n for n, t in NAMES.items()}}[dtype]
    key = config.mask_key(name, tile_m, tile_n, transposed=True)
    done = masks.prepared(mask.cuda()[None], tiles, lambda: kernel(key))
    lists, planes = done.lists.cpu(), done.bits.cpu()
    distance = torch.arange(sk) - torch.arange(sq)[:, None]
    inside = (distance >= left) & (distance <= right) if window else torch.ones(sq, sk, dtype=torch.bool)
    value = torch.where(keep, 0.0, -math.inf) if dtype is torch.bool else mask.float()
    value = value.masked_fill(~inside, -math.inf)
    low = (value <= -6e4) & (value > -math.inf)
    m_blocks, n_blocks = -(-sq // tile_m), -(-sk // tile_n)
    for n in range(n_blocks):
        keys = slice(n * tile_n, (n + 1) * tile_n)
        for h in range(heads_kv):
            expected = {"biased": [], "bits": [], "whole": []}
            for m in range(m_blocks):
                kinds = set()
                for head in range(h * heads // heads_kv, (h + 1) * heads // heads_kv):
                    rows = slice(m * tile_m, (m + 1) * tile_m)
                    block = value[head, rows]
                    takes_low = bool((low[head, rows].any(1) & ~(block >= -3e4).any(1)).any())
                    tile = padded(block[:, keys], len(block), tile_n, -math.inf)
                    seen = tile > -6e4
                    is_biased = bool((seen & (tile != 0)).any()) or takes_low and bool(low[head, rows, keys].any())
                    kind = "whole" if seen.all() else "bits" if seen.any() else "skipped"
                    kinds.add("biased" if is_biased else kind)
                    for plane, visible in enumerate((seen, tile > -math.inf)[: planes.size(2)]):
                        if plane or not is_biased:
                            got = transposed_bits(planes[0, head, plane, :, keys], m, tile_n, tile_m)
                            assert torch.equal(got[: len(block)], visible)
                if kinds != {"skipped"}:
                    expected["biased" if "biased" in kinds else "whole" if kinds == {"whole"} else "bits"].append(m)
            entries = lists[0, h, n].tolist()
            ends = [len(expected["biased"]), len(expected["biased"]) + len(expected["bits"])]
            ends.append(ends[1] + len(expected["whole"]))
            assert entries[: LIST_ENDS + ends[2]] == [*ends, *(m for kind in expected.values() for m in kind)]


NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (8, 2)])
@pytest.mark.parametrize("broadcast", ["....", ".1..", "1...", ".11.", "..1.", "11.1", "1111"])
@pytest.mark.parametrize("kind", ["bool", "own", "fp32"])
@pytest.mark.parametrize("sq, sk, d", [(257, 385, 64), (1, 1000, 128), (130, 64, 256)])
def test_every_broadcast(sq, sk, d, kind, broadcast, heads, heads_kv):
    q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=sq, sk=sk, d=d)
    sizes = [1 if mark == "1" else size for mark, size in zip(broadcast, (2, heads, sq, sk), strict=True)]
    keep = torch.rand(sizes, device="cuda") < 0.6
    mask = keep
    if kind != "bool":
        bias = torch.randn(sizes, device="cuda", dtype=torch.float32 if kind == "fp32" else q.dtype)
        mask = bias.masked_fill(~keep, -math.inf)
    assert_within_bound(fwd(q, k, v, attn_mask=mask)[0], q, k, v, mask)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_left": 60, "window_right": 10}, {"softcap": 20.0}])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_together_with_options(kind, options):
    q, k, v = inputs(heads=8, heads_kv=2, sq=300, sk=500, d=128)
    mask = torch.rand(2, 1, 300, 500, device="cuda") < 0.7
    if kind == "bias":
        mask = torch.randn(2, 8, 300, 500, device="cuda").masked_fill(~mask, -math.inf)
    assert_within_bound(fwd(q, k, v, attn_mask=mask, **options)[0], q, k, v, mask, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_visible_key_give_what_torch_gives(dtype):
    q, k, v = inputs(sq=300, sk=500)
    hidden = torch.zeros(300, 500, device="cuda", dtype=torch.bool)
    hidden[40:50] = True
    hidden[200:] = True
    for mask in (~hidden, torch.zeros(300, 500, device="cuda", dtype=dtype).masked_fill(hidden, LOW[dtype])):
        out, lse = fwd(q, k, v, attn_mask=mask)
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)
        if mask.dtype is torch.bool:
            assert not out[:, :, 200:].any() and bool((lse[:, :, 200:] == -math.inf).all())


@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (8, 2)])
@pytest.mark.parametrize("broadcast", ["....", ".1..", "1...", ".11.", "..1.", "11.1", "1111"])
@pytest.mark.parametrize("kind", ["bool", "own", "fp32"])
@pytest.mark.parametrize("sq, sk, d", [(257, 385, 64), (1, 1000, 128), (130, 64, 192)])
def test_gradients_of_every_broadcast(sq, sk, d, kind, broadcast, heads, heads_kv):
    q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=sq, sk=sk, d=d, requires_grad=True)
    sizes = [1 if mark == "1" else size for mark, size in zip(broadcast, (2, heads, sq, sk), strict=True)]
    keep = torch.rand(sizes, device="cuda") < 0.6
    mask = keep
    if kind != "bool":
        bias = torch.randn(sizes, device="cuda", dtype=torch.float32 if kind == "fp32" else q.dtype)
        mask = bias.masked_fill(~keep, -math.inf)
    assert_gradients(q, k, v, mask)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_left": 60, "window_right": 10}, {"softcap": 20.0}])
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_together_with_options(d, kind, options):
    q, k, v = inputs(heads=8, heads_kv=2, sq=300, sk=500, d=d, requires_grad=True)
    mask = torch.rand(2, 1, 300, 500, device="cuda") < 0.7
    if kind == "bias":
        mask = torch.randn(2, 8, 300, 500, device="cuda", dtype=q.dtype).masked_fill(~mask, -math.inf)
    assert_gradients(q, k, v, mask, **options)


def assert_gradients(q, k, v, mask, **options):
    wide = mask if mask.dtype is torch.bool else mask.double()
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*leaves, attn_mask=wide, **options)
    baseline, _ = reference.attention(q, k, v, attn_mask=mask, **options)
    out, _ = fwd(q, k, v, attn_mask=mask, **options)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    references = torch.autograd.grad(expected, leaves, dout.double())
    baselines = torch.autograd.grad(baseline, (q, k, v), dout)
    for name, got, want, base in zip(("dq", "dk", "dv"), grads, references, baselines, strict=True):
        excess = reference.excess(got, want, base, floor=1e-4)
        assert excess <= 0, f"{name} over the bound by {excess:.3g}; {reference.worst(got, want)}"


@pytest.mark.parametrize("d", [64, 128, 192])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_rows_without_a_visible_key(dtype, d):
    """0 where nothing is seen; of the mean of all values where all biases are the same, but for lse's rounding."""
    q, k, v = inputs(sq=300, sk=500, d=d, requires_grad=True)
    hidden = torch.zeros(300, 500, device="cuda", dtype=torch.bool)
    hidden[40:50] = True
    hidden[128:] = True
    mask = ~hidden
    if dtype is not torch.bool:
        mask = torch.zeros(300, 500, device="cuda", dtype=dtype).masked_fill(hidden, LOW[dtype])
    out, _ = fwd(q, k, v, attn_mask=mask)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    dout = torch.randn_like(out)
    for rows in (slice(0, 40), slice(40, 50), slice(128, None), slice(None)):
        part = torch.zeros_like(dout)
        part[:, :, rows] = dout[:, :, rows]
        grads = torch.autograd.grad(out, (q, k, v), part, retain_graph=True)
        wanted = torch.autograd.grad(expected, (q, k, v), part, retain_graph=True)
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=2e-2, rtol=4e-2)
            if dtype is torch.bool and rows.start:
                assert not got.any()


def test_gradients_where_padding_hides_nan():
    """In tiles that are skipped NaN stays where it is; the keys there get gradients of 0."""
    q, k, v = inputs(sq=300, sk=700)
    keep = torch.arange(700, device="cuda")[None] < torch.tensor([[500], [256]], device="cuda")
    mask = keep[:, None, None]
    dout = torch.randn_like(q)

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(fwd(*leaves, attn_mask=mask)[0], leaves, dout)

    expected = gradients()
    k[:, :, 512:] = v[:, :, 512:] = math.nan
    k[1, :, 256:] = v[1, :, 256:] = math.nan
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert not any(x[:, :, 512:].any() for x in gradients()[1:])


def test_what_padding_hides_does_not_leak():
    """Neither keys that nobody sees, wherever they are, nor values in tiles that are skipped."""
    q, k, v = inputs(sq=300, sk=700)
    keep = torch.arange(700, device="cuda")[None] < torch.tensor([[500], [256]], device="cuda")
    expected, _ = fwd(q, k, v, attn_mask=keep[:, None, None])
    k[:, :, 512:] = v[:, :, 512:] = math.nan
    k[0, :, 500:] = k[1, :, 256:] = math.nan
    out, _ = fwd(q, k, v, attn_mask=keep[:, None, None])
    assert torch.equal(out, expected)


# ---- routed calls ----------------------------------------------------------------------------------------------------


def test_routed_calls_keep_a_mask_until_it_changes(monkeypatch):
    made, prepare = [], masks._prepare
    monkeypatch.setattr(masks, "_prepare", lambda *args: made.append(1) or prepare(*args))
    q, k, v = inputs(heads=4, heads_kv=4, sq=300, sk=300)
    mask = torch.rand(2, 1, 300, 320, device="cuda") < 0.5
    with fa_sdpa.enable("always"):
        for _ in range(3):  # a view for each layer, as transformers make them
            out = F.scaled_dot_product_attention(q, k, v, mask[:, :, :, :300])
        assert len(made) == 1 and fa_sdpa.stats().eager.routed == 3
        assert_within_bound(out, q, k, v, mask[:, :, :, :300])
        mask[:, :, :, :100] = ~mask[:, :, :, :100]
        out = F.scaled_dot_product_attention(q, k, v, mask[:, :, :, :300])
        assert len(made) == 2
        assert_within_bound(out, q, k, v, mask[:, :, :, :300])
        mask = ~mask[:, :, :, :300]  # often at the same address as the old one, once that is gone
        out = F.scaled_dot_product_attention(q, k, v, mask)
        assert_within_bound(out, q, k, v, mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        count = len(made)
        with torch.cuda.stream(side):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, mask), out)
        assert len(made) == count + 1
    fwd(q, k, v, attn_mask=mask)
    fwd(q, k, v, attn_mask=mask)
    assert len(made) == count + 3  # called by name, perhaps from a compiled graph, whose buffers are used again


def test_a_captured_call_reads_the_mask_at_every_replay():
    q, k, v = inputs(heads=4, heads_kv=4, sq=300, sk=300)
    mask = torch.rand(300, 300, device="cuda") < 0.5
    with fa_sdpa.enable("always"), torch.no_grad():
        F.scaled_dot_product_attention(q, k, v, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.scaled_dot_product_attention(q, k, v, mask)
    for _ in range(2):
        mask.copy_(torch.rand(300, 300, device="cuda") < 0.3)
        graph.replay()
        assert_within_bound(out, q, k, v, mask)


def test_routed_training_prepares_a_mask_once_for_each_direction(monkeypatch):
    made, prepare = [], masks._prepare
    monkeypatch.setattr(masks, "_prepare", lambda *args: made.append(args[1].heads_kv) or prepare(*args))
    q, k, v = inputs(heads=4, heads_kv=4, sq=257, sk=257, requires_grad=True)
    mask = torch.rand(257, 257, device="cuda") < 0.5
    with fa_sdpa.enable("always"):
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v, mask).sum().backward()
    assert fa_sdpa.stats().eager.routed == 3 and made == [None, 4]


def test_deterministic_gradients_are_left_to_torch():
    q, k, v = inputs(heads=4, heads_kv=4, requires_grad=True)
    mask = torch.rand(257, 257, device="cuda") < 0.5
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with fa_sdpa.enable("always"):
            F.scaled_dot_product_attention(q, k, v, mask).sum().backward()
        assert fa_sdpa.stats().eager.routed == 0 and "attn_mask" in fa_sdpa.stats().eager.reasons
        with pytest.raises(NotImplementedError, match="no deterministic mode"):
            fwd(q, k, v, attn_mask=mask)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_in_a_graph(mode):
    q, k, v = inputs(heads=4, heads_kv=4, sq=300, sk=300, requires_grad=True)
    mask = torch.rand(300, 300, device="cuda") < 0.5
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).sum(), (q, k, v))
    with fa_sdpa.enable("always"):
        compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, mode=mode)
        for _ in range(3):
            grads = torch.autograd.grad(compiled(q, k, v, mask).sum(), (q, k, v))
    assert fa_sdpa.stats().compiled.routed >= 1
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_in_a_graph(mode):
    """Two masks that may share a buffer, one after the other."""

    def attend(q, k, v, lengths):
        for i in range(2):
            keep = torch.arange(300, device="cuda") < (lengths + i)[:, None, None, None]
            bias = torch.where(keep, 0.0, -math.inf).to(q.dtype)
            q = F.scaled_dot_product_attention(q, k, v, bias * 1.0)
        return q

    q, k, v = inputs(heads=4, heads_kv=4, sq=300, sk=300)
    lengths = torch.tensor([100, 250], device="cuda")
    with torch.no_grad():
        expected = attend(q, k, v, lengths)
        with fa_sdpa.enable("always"):
            compiled = torch.compile(attend, fullgraph=True, mode=mode)
            for _ in range(4):
                out = compiled(q, k, v, lengths).clone()
    assert fa_sdpa.stats().compiled.routed == 2
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_opcheck():
    q, k, v = inputs(sq=65, sk=65)
    opcheck(fwd.default, (q, k, v), {"attn_mask": torch.rand(65, 65, device="cuda") < 0.5})


def test_empty_and_keyless():
    q, k, v = inputs(sq=5, sk=0)
    out, lse = launch.attention_fwd(q, k, v, None, launch.Options(), torch.ones(5, 0, device="cuda", dtype=torch.bool))
    assert not out.any() and bool((lse == -math.inf).all())
