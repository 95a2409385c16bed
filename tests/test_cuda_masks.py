"""attn_mask on a GPU that has kernels: tile lists and bits, numerics, what leaks, what is kept. Skipped elsewhere."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import mask_lists
import pytest
import torch
import torch.nn.functional as F
from mask_lists import LOW
from test_cuda import inputs, lacking
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa
from fa_sdpa import reference
from fa_sdpa.kernels import launch, masks
from fa_sdpa.kernels.jit import kernel
from fa_sdpa.ops import attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from backward_cases import Poison  # noqa: E402

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd = torch.ops.fa4.attention_fwd
bwd = torch.ops.fa4.attention_bwd


@pytest.fixture(autouse=True)
def nothing_kept():
    masks.forget()
    attention._forget_calls()
    fa_sdpa.reset_stats()
    yield
    masks.forget()
    attention._forget_calls()


def assert_within_bound(actual, q, k, v, mask, **options):
    wide = mask if mask.dtype is torch.bool else mask.double()
    expected, _ = reference.attention(q.double(), k.double(), v.double(), attn_mask=wide, **options)
    baseline, _ = reference.attention(q, k, v, attn_mask=mask, **options)
    excess = reference.excess(actual, expected, baseline)
    assert excess <= 0, f"over the bound by {excess:.3g}; {reference.worst(actual, expected)}"


# ---- preparation -----------------------------------------------------------------------------------------------------


def prepare(mask, tiles, key):
    done = masks.prepared(mask.cuda(), tiles, lambda: kernel(key))
    return done._replace(lists=done.lists.cpu(), bits=done.bits.cpu())


@pytest.mark.parametrize("tile_m, tile_n", mask_lists.TILES)
@pytest.mark.parametrize("dtype", mask_lists.DTYPES, ids=str)
@pytest.mark.parametrize("sq, sk, window", mask_lists.SIZES)
def test_lists_and_bits(sq, sk, window, dtype, tile_m, tile_n):
    mask_lists.check_lists(prepare, sq, sk, window, dtype, tile_m, tile_n)


@pytest.mark.parametrize("tile_m, tile_n", mask_lists.BACKWARD_TILES)
@pytest.mark.parametrize("dtype", mask_lists.DTYPES, ids=str)
@pytest.mark.parametrize("heads, heads_kv", [(1, 1), (4, 2)])
@pytest.mark.parametrize("sq, sk, window", mask_lists.SIZES)
def test_lists_and_bits_of_a_backward(sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n):
    mask_lists.check_lists_of_a_backward(prepare, sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n)


@pytest.mark.parametrize("tile_m, tile_n", mask_lists.TILES)
@pytest.mark.parametrize("dtype", mask_lists.DTYPES, ids=str)
def test_lists_and_bits_of_rows_that_see_nothing(dtype, tile_m, tile_n):
    with Poison():
        for value in (False,) if dtype is torch.bool else (-math.inf, LOW[dtype]):
            mask_lists.check_lists_of_unseen_rows(prepare, value, dtype, tile_m, tile_n)


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


def dense_bias(kind, sizes, like, hides):
    """Biases of heads of their own, small ones in most tiles; with ``hides`` some tiles have -inf, zeros, or the lowest
    value."""
    bias = torch.randn(sizes, device="cuda", dtype=torch.float32 if kind == "fp32" else like.dtype)
    if hides:
        bias[:, 0, 200:, 300:] = -math.inf
        bias[:, -1, 128:384, :256] = 0.0
        bias[:, -1, :, 400] = -math.inf
        bias[:, 1, 600, 5] = LOW[bias.dtype]
    return bias


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("broadcast", ["....", "1...", "1..1", "1.1."])
@pytest.mark.parametrize("kind", ["own", "fp32"])
@pytest.mark.parametrize("d", [40, 64])
def test_wide_tiles_of_biases_of_each_head(d, kind, broadcast, hides):
    heads, sq, sk = 16, 700, 650
    q, k, v = inputs(heads=heads, heads_kv=heads, sq=sq, sk=sk, d=d)
    sizes = [1 if mark == "1" else size for mark, size in zip(broadcast, (2, heads, sq, sk), strict=True)]
    mask = dense_bias(kind, sizes, q, hides and broadcast in ("....", "1..."))
    tiles = []
    with pytest.MonkeyPatch.context() as patch:
        prepared = masks.prepared
        patch.setattr(masks, "prepared", lambda mask, of, *how: tiles.append(of) or prepared(mask, of, *how))
        out, _ = fwd(q, k, v, attn_mask=mask)
    assert [of.tile_m for of in tiles] == [192]
    assert_within_bound(out, q, k, v, mask)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 20.0}])
@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (4, 2)])
@pytest.mark.parametrize("kind", ["own", "fp32"])
@pytest.mark.parametrize("d", [64, 128, 192])
def test_gradients_of_dense_biases(d, kind, heads, heads_kv, options, hides):
    """Blocks of biases alone, and beside them all other kinds."""
    q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=700, sk=650, d=d, requires_grad=True)
    assert_gradients(q, k, v, dense_bias(kind, (1, heads, 700, 650), q, hides), **options)


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


@pytest.mark.parametrize("heads, tile_m", [(2, 64), (16, 192)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_without_a_visible_key(dtype, heads, tile_m):
    """Whole ones and a ragged last one, whatever was in the memory of their bits before."""
    q, k, v = inputs(heads=heads, heads_kv=2, sq=2 * tile_m + 300, sk=650, d=64)
    hidden = torch.zeros(1, heads, q.size(2), 650, device="cuda", dtype=torch.bool)
    hidden[:, :, tile_m:] = True
    mask = ~hidden if dtype is torch.bool else torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -math.inf)
    with Poison() as memory:
        out, lse = launch.attention_fwd(q, k, v, None, launch.Options(), mask)
    assert memory.count
    assert_within_bound(out, q, k, v, mask)
    assert not out[:, :, tile_m:].any() and bool((lse[:, :, tile_m:] == -math.inf).all())


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


def once_captured(call, captured):
    """What ``call`` returns, from a CUDA graph of it if asked to."""
    if not captured:
        return call()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    return result


PADDING = {  # which keys of 600 each of two sequences sees
    "right": ([0, 0], [500, 131]),
    "left": ([77, 300], [600, 600]),
    "both": ([7, 120], [590, 260]),
    "all": ([0, 0], [300, 0]),
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_left": 90, "window_right": 40}])
@pytest.mark.parametrize("sides", PADDING)
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("heads, heads_kv", [(2, 2), (16, 4)])  # small tiles, normal ones
def test_nan_in_padding_does_not_leak(heads, heads_kv, d, kind, sides, options, captured):
    """Neither into out and lse nor into gradients; those of hidden keys are 0."""
    q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=300, sk=600, d=d)
    first, end = (torch.tensor(x, device="cuda")[:, None] for x in PADDING[sides])
    keys = torch.arange(600, device="cuda")
    keep = (keys >= first) & (keys < end)
    mask = keep[:, None, None]
    if kind == "bias":
        bias = torch.randn(1, heads, 300, 600, device="cuda", dtype=q.dtype)
        mask = bias.masked_fill(~mask, -math.inf)
    has_backward = kind == "bool" or d < 256
    dout = torch.randn_like(q)

    def call():
        out, lse = fwd(q, k, v, attn_mask=mask, **options)
        grads = bwd(dout, q, k, v, out, lse, attn_mask=mask, **options) if has_backward else ()
        return out, lse, *grads

    expected = call()
    hidden = ~keep[:, None, :, None]
    k.masked_fill_(hidden, math.nan)
    v.masked_fill_(hidden, math.nan)
    k[..., 1::3].masked_fill_(hidden, math.inf)
    v[..., 1::2].masked_fill_(hidden, -math.inf)
    out, lse, *grads = once_captured(call, captured)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert not out.isnan().any()
    for got, want in zip(grads, expected[2:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-2)  # dQ is added up in any order
    for got in grads[1:]:
        assert not got.masked_select(hidden).any()


@pytest.mark.parametrize("d", [64, 128])
def test_nan_behind_the_lowest_values_does_not_leak(d):
    """torch.finfo(dtype).min hides a key where the row has another one."""
    q, k, v = inputs(heads=4, heads_kv=2, sq=300, sk=600, d=d)
    hidden = torch.arange(600, device="cuda") >= torch.tensor([500, 131], device="cuda")[:, None]
    mask = torch.zeros(2, 1, 1, 600, device="cuda", dtype=q.dtype).masked_fill(hidden[:, None, None], LOW[q.dtype])
    dout = torch.randn_like(q)

    def call():
        out, lse = fwd(q, k, v, attn_mask=mask)
        return out, *bwd(dout, q, k, v, out, lse, attn_mask=mask)

    expected = call()
    for x in (k, v):
        x.masked_fill_(hidden[:, None, :, None], math.nan)
    out, *grads = call()
    assert torch.equal(out, expected[0])
    for got, want in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-2)


def test_nan_that_some_row_sees_stays_with_the_rows_of_its_tile():
    """A key in a tile of its own stage is hidden from some rows and seen by others: those have NaN, other tiles not."""
    q, k, v = inputs(heads=2, heads_kv=2, sq=300, sk=600, d=128)
    mask = torch.ones(300, 600, device="cuda", dtype=torch.bool)
    mask[:, 70] = False
    mask[200, 70] = True
    expected, _ = fwd(q, k, v, attn_mask=mask)
    v[:, :, 70] = math.nan
    out, _ = fwd(q, k, v, attn_mask=mask)
    assert out[:, :, 200].isnan().all()
    rows = [*range(128), *range(256, 300)]
    assert torch.equal(out[:, :, rows], expected[:, :, rows])


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


@pytest.mark.parametrize("low", [-math.inf, LOW[torch.bfloat16]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_routed_training_takes_a_mask_that_adds_nothing_as_boolean(heads_kv, dtype, low, monkeypatch):
    """Once the device has said so; until it is written to."""
    made, prepare = [], masks._prepare
    monkeypatch.setattr(masks, "_prepare", lambda *args: made.append(args[0].dtype) or prepare(*args))
    q, k, v = inputs(heads=4, heads_kv=heads_kv, sq=300, sk=300, d=64, requires_grad=True)
    hidden = torch.ones(300, 300, device="cuda").triu(1).bool()
    mask = torch.zeros(300, 300, device="cuda", dtype=dtype).masked_fill(hidden, low)
    dout = torch.randn_like(q)

    def train():
        torch.cuda.synchronize()
        with fa_sdpa.enable("always"):
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            return out, *torch.autograd.grad(out, (q, k, v), dout)

    def is_right(results):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = reference.attention(*(x.double() for x in leaves), attn_mask=mask.double())
        for got, want in zip(results, (out, *torch.autograd.grad(out, leaves, dout.double())), strict=True):
            torch.testing.assert_close(got.double(), want.double(), atol=3e-2, rtol=3e-2)

    for _ in range(5):
        is_right(train())
    assert made == [dtype, dtype, torch.bool]
    mask[200:, :100] = 1.5
    for _ in range(3):
        is_right(train())
    assert made == [dtype, dtype, torch.bool, dtype, dtype]


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
