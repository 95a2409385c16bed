"""attn_mask: numerics of torch's math path on the CPU, metadata, autograd, errors, and how routed calls hand it on."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_ops import SHAPES, assert_within_bound, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa
from fa_sdpa import Policy, reference
from fa_sdpa.kernels import masks
from fa_sdpa.kernels.sm90.config import LIST_HEADER, TRANSPOSED_HEADER
from fa_sdpa.meta.crossover import Crossover, Rule
from fa_sdpa.meta.shapes import is_dense
from fa_sdpa.meta.spec import AttentionSpec, mask_kind

fwd = torch.ops.fa4.attention_fwd
bwd = torch.ops.fa4.attention_bwd

BROADCASTS = {  # of (B, H, Sq, Sk); a dot keeps a size, 1 makes it 1, - leaves it out
    "full": "....",
    "per_batch": ".1..",
    "per_head": "1...",
    "padding": ".11.",
    "rows": "..1.",
    "columns": "11.1",
    "one": "1111",
    "2d": "--..",
    "2d_padding": "--1.",
    "3d": "-...",
}
KINDS = ("bool", "infinite", "lowest", "bias")


def sizes_of(pattern, full):
    return [1 if mark == "1" else size for mark, size in zip(pattern, full, strict=True) if mark != "-"]


def make_mask(kind, sizes, dtype=torch.float32, visible=0.6):
    """A random mask: boolean, or floating with hidden keys at -inf, at the dtype's lowest value, or biases beside."""
    keep = torch.rand(sizes) < visible
    if kind == "bool":
        return keep
    bias = torch.randn(sizes, dtype=dtype) if kind == "bias" else torch.zeros(sizes, dtype=dtype)
    return bias.masked_fill(~keep, torch.finfo(dtype).min if kind == "lowest" else -math.inf)


def strided(mask, how):
    if how == "expanded":
        return mask.expand(*mask.shape[:-1], mask.size(-1))
    if how == "transposed":
        return mask.mT.contiguous().mT
    if how == "sliced":
        wide = mask.new_zeros((*mask.shape[:-1], 2 * mask.size(-1) + 1))
        wide[..., 1::2] = mask
        return wide[..., 1::2]
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broadcast", BROADCASTS.values(), ids=BROADCASTS)
@pytest.mark.parametrize(
    "shape", [SHAPES["gqa7"], SHAPES["mha"], SHAPES["one_query"]], ids=["gqa7", "mha", "one_query"]
)
def test_matches_math_in_fp64(shape, broadcast, kind):
    q, k, v = inputs(shape, torch.float64, requires_grad=True)
    scores = (*q.shape[:3], k.size(2))
    mask = make_mask(kind, sizes_of(broadcast, scores), torch.float64)
    out, lse = fwd(q, k, v, attn_mask=mask)
    expected, expected_lse = reference.attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    with sdpa_kernel(SDPBackend.MATH):
        torchs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(out, torchs)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for got, want in zip(grads, torch.autograd.grad(torchs, (q, k, v), dout), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_any_strides(kind, layout):
    q, k, v = inputs(SHAPES["mha"])
    mask = make_mask(kind, (2, 1, 300, 300))
    expected = fwd(q, k, v, attn_mask=mask)[0]
    torch.testing.assert_close(fwd(q, k, v, attn_mask=strided(mask, layout))[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_left": 20, "window_right": 3}, {"softcap": 0.7}])
def test_counts_together_with_other_options(options):
    q, k, v = inputs(SHAPES["gqa_two_groups"], torch.float64, requires_grad=True)
    mask = make_mask("bias", (2, 6, 517, 130), torch.float64)
    out, _ = fwd(q, k, v, attn_mask=mask, **options)
    expected, _ = reference.attention(q, k, v, attn_mask=mask, **options)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for got, want in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, None], ids=["bool", "fp32", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_the_error_bound(dtype, mask_dtype):
    q, k, v = inputs(SHAPES["gqa7"], dtype, requires_grad=True)
    mask = make_mask("bool" if mask_dtype is torch.bool else "bias", (1, 7, 130, 517), mask_dtype or dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*wide, attn_mask=mask)
    baseline, _ = reference.attention(q, k, v, attn_mask=mask)
    out, _ = fwd(q, k, v, attn_mask=mask)
    assert_within_bound("out", out, expected, baseline)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    baselines = torch.autograd.grad(baseline, (q, k, v), dout)
    references = torch.autograd.grad(expected, wide, dout.double())
    for name, got, want, base in zip(("dq", "dk", "dv"), grads, references, baselines, strict=True):
        assert_within_bound(name, got, want, base, floor=1e-5)


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
def test_row_of_hidden_keys_gives_what_torch_gives(kind):
    """Zeros where nothing is to be seen, the mean of all values where all biases are the same: and so the gradients."""
    q, k, v = inputs((1, 2, 2, 4, 300, 8, 8), requires_grad=True)
    mask = make_mask(kind, (4, 300), visible=0.0)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
    out, lse = fwd(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    if kind == "lowest":
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    else:
        assert not out.any() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_one_visible_key():
    q, k, v = inputs((1, 2, 2, 5, 70, 8, 8))
    mask = torch.zeros(5, 70, dtype=torch.bool)
    mask[torch.arange(5), torch.tensor([0, 13, 31, 64, 69])] = True
    torch.testing.assert_close(fwd(q, k, v, attn_mask=mask)[0], v[:, :, [0, 13, 31, 64, 69]])


def test_gradcheck():
    q, k, v = inputs((1, 4, 2, 5, 7, 4, 3), torch.float64, requires_grad=True)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        mask = make_mask(kind, (1, 4, 5, 7), torch.float64)

        def attend(q, k, v, sink, mask=mask):
            return fwd(q, k, v, attn_mask=mask, sink=sink)[0]

        assert torch.autograd.gradcheck(attend, (q, k, v, sink), atol=1e-5, rtol=1e-4, eps=1e-5)


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(kind, requires_grad):
    q, k, v = inputs((2, 4, 2, 9, 11, 8, 8), requires_grad=requires_grad)
    mask = make_mask(kind, (2, 1, 9, 11))
    opcheck(fwd, (q, k, v), {"attn_mask": mask})
    out, lse = (x.detach() for x in fwd(q, k, v, attn_mask=mask))
    opcheck(bwd, (torch.randn_like(out), *(x.detach() for x in (q, k, v)), out, lse), {"attn_mask": mask})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(9, dtype=torch.bool), "does not broadcast"),
        (torch.ones(1, 1, 1, 8, 9), "does not broadcast"),
        (torch.ones(9, 8), "does not broadcast"),
        (torch.ones(3, 1, 8, 9), "does not broadcast"),
        (torch.ones(8, 9, dtype=torch.int32), "attn_mask is torch.int32"),
        (torch.ones(8, 9, dtype=torch.float64), "attn_mask is torch.float64"),
        (torch.ones(8, 9, device="meta"), "attn_mask is on meta"),
    ],
)
def test_bad_masks_raise(mask, message):
    q, k, v = inputs((2, 2, 2, 8, 9, 8, 8))
    with pytest.raises(RuntimeError, match=message):
        fwd(q, k, v, attn_mask=mask)
    with FakeTensorMode() as fake, pytest.raises(RuntimeError, match=message):
        fwd(*map(fake.from_tensor, (q, k, v)), attn_mask=fake.from_tensor(mask))


def test_a_gradient_of_the_mask_is_refused():
    q, k, v = inputs((1, 1, 1, 4, 4, 8, 8), requires_grad=True)
    mask = torch.zeros(4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient of attn_mask"):
        fwd(q, k, v, attn_mask=mask)
    with torch.no_grad():
        fwd(q, k, v, attn_mask=mask)


def test_a_mask_changed_before_the_backward_is_noticed():
    q, k, v = inputs((1, 1, 1, 4, 4, 8, 8), requires_grad=True)
    mask = torch.zeros(4, 4)
    out, _ = fwd(q, k, v, attn_mask=mask)
    mask.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- routed calls ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_counts():
    fa_sdpa.reset_stats()
    yield
    fa_sdpa.reset_stats()


def call_with(mask, requires_grad=False, dtype=torch.float32, **options):
    q, k, v = inputs((2, 4, 4, 17, 19, 8, 8), dtype, requires_grad)
    expected = F.scaled_dot_product_attention(q, k, v, mask, **options)
    with fa_sdpa.enable("always"):
        return F.scaled_dot_product_attention(q, k, v, mask, **options), expected, (q, k, v)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("broadcast", BROADCASTS.values(), ids=BROADCASTS)
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_calls_with_a_mask_are_routed(kind, broadcast, requires_grad):
    mask = make_mask(kind, sizes_of(broadcast, (2, 4, 17, 19)))
    out, expected, leaves = call_with(mask, requires_grad)
    assert fa_sdpa.stats().eager.routed == 1
    torch.testing.assert_close(out, expected)
    if requires_grad:
        for got, want in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (out, expected)), strict=True):
            torch.testing.assert_close(got, want)


def test_a_mask_that_changes_in_place_is_read_again():
    q, k, v = inputs((1, 2, 2, 9, 9, 8, 8))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    with fa_sdpa.enable("always"):
        for _ in range(3):
            mask[:, 0] = ~mask[:, 0]
            out = F.scaled_dot_product_attention(q, k, v, mask)
            torch.testing.assert_close(out, reference.attention(q, k, v, attn_mask=mask)[0])
    assert fa_sdpa.stats().eager.routed == 3


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (lambda: torch.zeros(17, 19, requires_grad=True), "mask_gradient"),
        (lambda: torch.zeros(17, 19).to_sparse(), "mask_shape"),
        (lambda: torch.ones(19, dtype=torch.bool), "mask_shape"),
        (lambda: torch.zeros(17, 19, dtype=torch.float64), "attn_mask"),
    ],
    ids=["gradient", "sparse", "1-D", "fp64"],
)
def test_masks_left_to_torch(mask, code):
    with fa_sdpa.enable("always"):
        try:
            F.scaled_dot_product_attention(*inputs((2, 4, 4, 17, 19, 8, 8)), mask())
        except (RuntimeError, IndexError, NotImplementedError):
            pass  # torch's answer, in torch's words
    assert set(fa_sdpa.stats().eager.reasons) == {code}


@pytest.mark.parametrize(
    ("sizes", "scores", "dense"),
    [
        ((2, 4, 17, 19), (2, 4, 17, 19), True),
        ((1, 4, 17, 19), (3, 4, 17, 19), True),
        ((1, 4, 17, 19), (4, 4, 17, 19), False),
        ((2, 1, 17, 19), (2, 4, 17, 19), False),
        ((2, 4, 1, 19), (2, 4, 17, 19), False),
        ((17, 19), (2, 2, 17, 19), False),
        ((17, 19), (1, 3, 17, 19), True),
    ],
)
def test_a_bias_is_dense_if_few_scores_share_a_value(sizes, scores, dense):
    bias = torch.zeros(sizes)
    assert is_dense(bias, scores) == dense and not is_dense(bias.bool(), scores)
    assert not is_dense(torch.zeros(1, 1, 1, 19).expand(scores[:3] + (19,)), scores)


def test_the_policy_judges_dense_biases_and_repeats_that():
    """They run under "always", and are left to torch under "auto" whatever the table says."""
    rules = tuple(Rule("forward", (8, 8), False, ((1, 1),), mask=mask) for mask in ("bool", "float"))
    policy = Policy("auto", Crossover(0, "a test", rules))
    q, k, v = inputs((2, 4, 4, 17, 19, 8, 8))
    bias = torch.randn(2, 4, 17, 19)
    expected = F.scaled_dot_product_attention(q, k, v, bias)
    for _ in range(3):
        with fa_sdpa.enable(policy):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, bias), expected, rtol=0, atol=0)
            F.scaled_dot_product_attention(q, k, v, bias[:, :1])
            F.scaled_dot_product_attention(q, k, v, bias > 0)
        with fa_sdpa.enable("always"):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, bias), expected)
    counts = fa_sdpa.stats().eager
    assert counts[:2] == (9, 3) and counts.reasons["dense_bias"] == 3


def test_autocast_casts_the_mask_as_torch_does():
    mask = make_mask("bias", (17, 19))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected, _ = call_with(mask)
    assert fa_sdpa.stats().eager.routed == 1 and out.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_in_a_graph(kind, autocast, dynamic):
    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask[:, :, :, : k.size(2)])

    q, k, v = inputs((2, 4, 4, 17, 19, 8, 8), requires_grad=True)
    mask = make_mask(kind, (2, 1, 17, 23))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = attend(q, k, v, mask)
        with fa_sdpa.enable("always"):
            out = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)(q, k, v, mask)
    assert fa_sdpa.stats().compiled.routed == 1
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if autocast else {}
    torch.testing.assert_close(out, expected, **tolerance)
    grads = zip(*(torch.autograd.grad(x.float().sum(), (q, k, v)) for x in (out, expected)), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, **tolerance)


def test_the_kind_of_a_mask_is_its_dtype():
    kinds = [mask_kind(x) for x in (None, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int32)]
    assert kinds == ["none", "bool", "bf16", "fp16", "fp32", "other"]
    spec = AttentionSpec(torch.bfloat16, 1, 1, 1, 8, 8, 64, 64, mask="fp16")
    assert "attn_mask" in {reason.code for reason in fa_sdpa.kernels.cpu.config.unsupported(spec, None)}


# ---- on the way to a GPU kernel, without one -------------------------------------------------------------------------


@pytest.fixture
def preparations(monkeypatch):
    """What would be launched to prepare masks; CPU tensors stand for the GPU's."""
    launched = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(masks.private, "current_stream", lambda device: 7)
    masks.forget()
    yield launched, lambda: lambda *arguments: launched.append(arguments)
    masks.forget()


TILES = masks.Tiles(2, 4, 300, 500, None, None, 128, 64)


def test_a_mask_is_kept_as_long_as_it_is_the_same(preparations):
    launched, load = preparations
    mask = torch.ones(2, 1, 300, 600, dtype=torch.bool)
    with masks.in_eager_mode():
        first = masks.prepared(mask[..., :500], TILES, load)
        assert masks.prepared(mask[..., :500], TILES, load) is first and len(launched) == 1
        changes = (
            lambda: masks.prepared(mask[..., 1:501], TILES, load),
            lambda: masks.prepared(mask[..., :500], TILES._replace(tile_m=64), load),
            lambda: masks.prepared(mask[..., :500], TILES._replace(right=0), load),
            lambda: masks.prepared(mask[..., :500].clone(), TILES, load),
            lambda: masks.prepared(mask.fill_(True)[..., :500], TILES, load),
        )
        for count, change in enumerate(changes, 2):
            assert change() is not first and len(launched) == count
    masks.prepared(mask[..., :500], TILES, load)
    assert len(launched) == 7
    with torch.inference_mode(), masks.in_eager_mode():
        mask = torch.ones(2, 1, 300, 500, dtype=torch.bool)
        assert masks.prepared(mask, TILES, load) is not masks.prepared(mask, TILES, load)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_that_are_gone_are_not_kept(preparations, dtype):
    def load():
        return lambda *arguments: None

    with masks.in_eager_mode():
        for _ in range(3):
            mask = torch.ones(1, 1, 300, 500, dtype=dtype)
            masks.prepared(mask, TILES, load)
            done = masks.prepared(mask, TILES, load)
            assert (done.bias is None) == (dtype is torch.bool)
            del mask, done
        assert len(masks._kept) == 1
        held = [torch.ones(1, 1, 1, 500, dtype=torch.bool) for _ in range(masks.KEPT + 5)]
        for mask in held:
            masks.prepared(mask, TILES, load)
        assert len(masks._kept) == masks.KEPT


def test_what_is_kept_is_small_or_much_smaller_than_the_mask(preparations, monkeypatch):
    launched, load = preparations
    monkeypatch.setattr(masks, "KEPT_BYTES", 0)
    bias, row = (
        torch.randn(1, 4, 300, 512),
        torch.randn(1, 1, 1, 512),
    )  # of a row with a window there is more than of it
    with masks.in_eager_mode():
        for mask, tiles, launches in ((bias, TILES, 1), (row, TILES._replace(left=-5), 3)):
            for _ in range(2):
                masks.prepared(mask, tiles._replace(seqlen_k=512), load)
            assert len(launched) == launches


@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        (torch.ones(1, 1, 1, 500, dtype=torch.bool), (1, 1, 1)),
        (torch.ones(2, 1, 1, 500, dtype=torch.bool).expand(2, 4, 300, 500), (2, 1, 1)),
        (torch.ones(1, 4, 300, 1), (1, 4, 300)),
        (torch.ones(2, 4, 300, 500).bfloat16(), (2, 4, 300)),
    ],
    ids=["padding", "expanded", "columns", "full"],
)
def test_what_is_broadcast_is_read_and_written_once(preparations, mask, sizes):
    launched, load = preparations
    done = masks.prepared(mask, TILES, load)
    [(given, kinds, found, bits, lists, left, right)] = launched
    assert given.shape == (*sizes, 500) and (found is None) == (mask.dtype is torch.bool)
    m_blocks, planes = (3 if sizes[2] > 1 else 1), (1 if mask.dtype is torch.bool else 2)
    entries = LIST_HEADER + 8 + 4 * planes * 8
    assert kinds.shape == (*sizes[:2], m_blocks, 8) and lists.shape == (*sizes[:2], m_blocks, entries)
    assert bits.shape == (*sizes[:2], planes * 8, 3 * 128 if sizes[2] > 1 else 1, 4)
    assert left < -300 and right > 500
    assert done.lists.shape == (2, 4, 3, entries) and done.bits.shape == (2, 4, planes * 8, 384, 4)
    assert done.lists.data_ptr() == lists.data_ptr() and done.bits.data_ptr() == bits.data_ptr()
    if done.bias is not None:
        assert done.bias.shape == (2, 4, 300, 500) and done.bias.stride(3) == 1
        assert [stride == 0 for stride in done.bias.stride()[:3]] == [size == 1 for size in sizes]
        torch.testing.assert_close(done.bias, mask.expand(2, 4, 300, 500))


def test_a_window_makes_rows_differ(preparations):
    launched, load = preparations
    masks.prepared(torch.ones(1, 1, 1, 500, dtype=torch.bool), TILES._replace(left=-5, right=0), load)
    [(given, kinds, _, bits, _, left, right)] = launched
    assert given.shape == (1, 1, 300, 500) and given.stride(2) == 0 and (left, right) == (-5, 0)
    assert kinds.shape == (1, 1, 3, 8) and bits.shape == (1, 1, 8, 384, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("seqlen_k", [1, 4, 8, 15, 16])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_biases_are_read_where_they_are_if_tma_can_address_them(preparations, seqlen_k, shift, layout, rows, dtype):
    mask = torch.randn(2, 1, rows, seqlen_k + shift).to(dtype)[..., shift:]
    mask = strided(mask, layout)
    item = dtype.itemsize
    tiles = masks.Tiles(2, 1, rows, seqlen_k, None, None, 128, 64)
    read = masks.prepared(mask, tiles, preparations[1]).bias
    torch.testing.assert_close(read, mask)
    assert read.stride(3) == 1 and read.stride(1) == 0 and (read.stride(2) == 0) == (rows == 1)
    assert read.data_ptr() % 16 == 0 and not any(stride * item % 16 for stride in read.stride()[:3])
    in_place = layout == "plain" and not shift and seqlen_k * item % 16 == 0
    if rows > 1 or layout == "plain":
        assert (read.data_ptr() == mask.data_ptr()) == in_place


def test_both_directions_share_a_copy_of_biases(preparations):
    launched, load = preparations
    mask = torch.randn(2, 1, 300, 501)[..., 1:]
    with masks.in_eager_mode():
        forward = masks.prepared(mask, TILES, load).bias
        backward = masks.prepared(mask, BACKWARD_TILES, load).bias
        assert len(launched) == 2 and forward.data_ptr() == backward.data_ptr() != mask.data_ptr()
        assert forward.shape == backward.shape == (2, 4, 300, 500)
        torch.testing.assert_close(forward, mask.expand(2, 4, 300, 500))
        mask += 1
        torch.testing.assert_close(masks.prepared(mask, TILES, load).bias, mask.expand(2, 4, 300, 500))


def test_the_mask_of_the_last_call_is_known_by_the_tensor(preparations, monkeypatch):
    launched, load = preparations
    monkeypatch.setattr(masks.private, "current_stream", lambda device: stream)
    stream, searches, place = 7, [], masks._place
    monkeypatch.setattr(masks, "_place", lambda mask: searches.append(mask) or place(mask))
    repeated = masks.Repeated(TILES, load, True, -1)
    mask = torch.zeros(300, 512)[:, :500]

    def is_known(mask):
        before = len(searches)
        done = repeated(mask)
        torch.testing.assert_close(done.bias, mask.expand(2, 4, 300, 500))
        return len(searches) == before

    assert not is_known(mask) and is_known(mask) and len(launched) == 1
    mask[0, 0] = 1.0
    assert not is_known(mask) and is_known(mask) and len(launched) == 2
    same_memory = mask.view_as(mask)
    assert not is_known(same_memory) and is_known(same_memory) and len(launched) == 2
    stream = 8
    assert not is_known(same_memory) and is_known(same_memory) and len(launched) == 3
    mask.data = mask.clone()
    assert not is_known(mask) and is_known(mask) and len(launched) == 4
    latest = masks._latest[repeated._name]  # as if other memory had come to lie there
    masks._latest[repeated._name] = latest._replace(storage=StorageWeakRef(torch.zeros(1).untyped_storage()))
    assert not is_known(mask) and is_known(mask) and len(launched) == 4
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for count in (5, 6):  # its replays have to read the mask
        repeated(mask)
        assert len(launched) == count


def test_a_mask_that_is_not_kept_is_not_known_by_the_tensor_either(preparations, monkeypatch):
    launched, load = preparations
    mask = torch.ones(2, 1, 300, 500, dtype=torch.bool)
    with torch.inference_mode():
        inference = torch.ones(2, 1, 300, 500, dtype=torch.bool)
    for given, keeps in ((mask, False), (inference, True)):
        repeated = masks.Repeated(TILES, load, keeps, -1)
        assert repeated(given).lists is not repeated(given).lists
    monkeypatch.setattr(masks, "KEPT_BYTES", 0)
    repeated = masks.Repeated(TILES._replace(left=-5), load, True, -1)
    row = torch.ones(1, 1, 1, 500, dtype=torch.bool)
    assert repeated(row).lists is not repeated(row).lists
    assert len(launched) == 6 and not masks._latest


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_no_mask_lives_longer_for_being_known(preparations, dtype):
    _, load = preparations
    several = [masks.Repeated(TILES, load, True, -1) for _ in range(masks.KEPT + 3)]
    mask = torch.ones(300, 512, dtype=dtype)[:, :500]
    gone = weakref.ref(mask)
    for repeated in several:
        repeated(mask), repeated(mask)
    assert len(masks._latest) == masks.KEPT
    del mask
    assert gone() is None and not masks._latest


def test_a_call_with_packed_heads_knows_its_mask(preparations):
    launched, load = preparations
    repeated = masks.Repeated(TILES._replace(heads=2, seqlen_q=2), load, True, -1, packed=2)
    mask = torch.rand(2, 4, 1, 500) < 0.5
    first = repeated(mask)
    assert repeated(mask) is first and launched[0][0].shape == (2, 2, 2, 500)
    assert torch.equal(launched[0][0].bool(), mask.view(2, 2, 2, 500))


def test_a_mask_that_may_be_as_good_as_boolean_is_not_known_before_that_is_settled(preparations, monkeypatch):
    biased, answers = [], []

    def load():
        return lambda *arguments: arguments[7].fill_(0)[..., 0].fill_(len(biased))

    init = masks._Finding.__init__

    def not_at_once(self, lists):
        init(self, lists)
        self._event = type("Event", (), {"query": lambda self: bool(answers)})()

    monkeypatch.setattr(masks._Finding, "__init__", not_at_once)
    repeated = masks.Repeated(BACKWARD_TILES, load, True, -1, faster_if_boolean=True)
    mask = torch.zeros(2, 1, 300, 512)[..., :500]
    for _ in range(3):
        assert isinstance(repeated(mask), masks.Prepared) and not masks._latest
    answers.append("yes")
    boolean = repeated(mask)
    assert boolean.all() and repeated(mask) is boolean and len(masks._latest) == 1
    mask += 1.0
    biased.append("now")
    answers.clear()
    for _ in range(3):
        assert isinstance(repeated(mask), masks.Prepared)
    answers.append("no")
    found = repeated(mask)
    assert isinstance(found, masks.Prepared) and repeated(mask) is not boolean
    monkeypatch.setattr(masks, "_finding", None)  # is not asked again
    assert repeated(mask).lists is found.lists


# ---- the same for a backward -----------------------------------------------------------------------------------------

BACKWARD_TILES = masks.Tiles(2, 4, 300, 500, None, None, 64, 128, 2)


@pytest.mark.parametrize(
    ("mask", "sizes", "heads_of_lists"),
    [
        (torch.ones(1, 1, 1, 500, dtype=torch.bool), (1, 1, 64), 1),
        (torch.ones(2, 1, 1, 500, dtype=torch.bool).expand(2, 4, 300, 500), (2, 1, 64), 1),
        (torch.ones(1, 4, 300, 1), (1, 4, 300), 2),
        (torch.ones(2, 4, 300, 500).bfloat16(), (2, 4, 300), 2),
        (torch.ones(2, 4, 1, 500).bfloat16(), (2, 4, 64), 2),
    ],
    ids=["padding", "expanded", "columns", "full", "row"],
)
def test_a_backward_reads_and_writes_once_what_is_broadcast(preparations, mask, sizes, heads_of_lists):
    launched, load = preparations
    done = masks.prepared(mask, BACKWARD_TILES, load)
    [(given, kinds, found, hidden, bits, all_kinds, all_hidden, lists, left, right)] = launched
    is_bool, m_blocks = mask.dtype is torch.bool, -(-sizes[2] // 64)
    assert given.shape == (*sizes, 500) and (found is None) == is_bool
    assert kinds.shape == (*sizes[:2], m_blocks, 4) and all_kinds.shape == (*sizes[:2], 5, 4)
    planes = 1 if is_bool else 2
    assert hidden.shape == (*kinds.shape, 4, planes) and all_hidden.shape == (*all_kinds.shape, 4, planes)
    assert all_kinds.data_ptr() == kinds.data_ptr() and all_hidden.data_ptr() == hidden.data_ptr()
    assert bits.shape == (*sizes[:2], planes, m_blocks, 512, 4)
    assert lists.shape == (sizes[0], heads_of_lists, 4, TRANSPOSED_HEADER + 5)
    assert is_bool or found.shape == (*kinds.shape, 4 * 4)
    assert left < -300 and right > 500
    assert done.lists.shape == (2, 2, 4, TRANSPOSED_HEADER + 5) and done.lists.data_ptr() == lists.data_ptr()
    assert done.bits.shape == (2, 4, planes, 5, 512, 4) and done.bits.data_ptr() == bits.data_ptr()
    if done.bias is not None:
        assert done.bias.shape == (2, 4, 300, 500)
        torch.testing.assert_close(done.bias, mask.expand(2, 4, 300, 500))


def test_a_backward_has_a_preparation_of_its_own(preparations):
    launched, load = preparations
    mask = torch.ones(2, 1, 300, 500, dtype=torch.bool)
    forward = BACKWARD_TILES._replace(heads_kv=None)
    with masks.in_eager_mode():
        assert masks.is_in_eager_mode()
        first = masks.prepared(mask, BACKWARD_TILES, load)
        assert masks.prepared(mask, BACKWARD_TILES, load) is first
        assert masks.prepared(mask, forward, load) is not first
        assert masks.prepared(mask, BACKWARD_TILES._replace(heads_kv=4), load) is not first
    assert [len(arguments) for arguments in launched] == [10, 7, 10] and not masks.is_in_eager_mode()


def test_a_mask_is_known_to_be_as_good_as_boolean_while_it_is_the_same(preparations, monkeypatch):
    """Here the lists say what the test wants; what they say of real masks: test_mask_lists.py."""
    biased = []

    def load():
        return lambda *arguments: arguments[7].fill_(0)[..., 0].fill_(len(biased))

    mask = torch.zeros(2, 1, 300, 512).masked_fill(torch.rand(2, 1, 300, 512) < 0.3, -math.inf)[:, :, :, :500]
    tiles, seen = BACKWARD_TILES, mask == 0
    assert masks.as_boolean(mask, tiles) is None
    with masks.in_eager_mode():
        assert masks.as_boolean(mask, tiles) is None  # nobody has prepared it
        masks.prepared(mask, tiles, load)
        boolean = masks.as_boolean(mask, tiles)
        assert torch.equal(boolean, seen) and masks.as_boolean(mask, tiles) is boolean
        assert masks.as_boolean(mask, tiles._replace(tile_n=64)) is boolean  # it is the mask that is known
        assert masks.as_boolean(seen, tiles) is None
        for other in (mask[:1], mask.clone()):
            assert masks.as_boolean(other, tiles) is None
        expanded = mask[:1].expand(2, 4, -1, -1)
        masks.prepared(expanded, tiles, load)
        assert masks.as_boolean(expanded, tiles).shape == (1, 1, 300, 500)
        mask[0, 0, 0, 0] = 1.0
        biased.append("since")
        for _ in range(3):
            masks.prepared(mask, tiles, load)
            assert masks.as_boolean(mask, tiles) is None
        biased.clear()
        for refused in ({"right": 0}, {"left": -9, "right": 9}):
            windowed = torch.zeros(300, 512)[None, None, :, :500]
            masks.prepared(windowed, tiles._replace(**refused), load)
            assert masks.as_boolean(windowed, tiles._replace(**refused)) is None
        monkeypatch.setattr(masks, "KEPT_BYTES", 1000)
        large = torch.zeros(2, 4, 300, 512)[..., :500]
        masks.prepared(large, tiles, load)
        assert masks.as_boolean(large, tiles) is None and masks._find((*masks._place(large), tiles)) is not None
    assert masks.as_boolean(expanded, tiles) is None  # a compiled graph's, say


def test_the_host_does_not_wait_for_what_the_device_finds_out(preparations):
    lists, answered = torch.zeros(1, 1, 3, 9, dtype=torch.int32), []
    finding = masks._Finding(lists)
    finding._event = type("Event", (), {"query": lambda self: bool(answered)})()
    mask = torch.zeros(1, 1, 1, 9)
    assert finding.boolean(mask) is None
    answered.append("yes")
    assert finding.boolean(mask).all()
    assert finding.boolean(mask) is finding.boolean(mask)


def test_a_backward_node_keeps_the_mask_of_a_routed_call(monkeypatch):
    """Which runs in a thread of its own on a GPU, so the call has to say that it was one."""
    seen = []
    original = fa_sdpa.ops.attention._gradients
    monkeypatch.setattr(
        fa_sdpa.ops.attention,
        "_gradients",
        lambda *arguments: seen.append(masks.is_in_eager_mode()) or original(*arguments),
    )
    mask = torch.rand(17, 19) < 0.5
    out, _, leaves = call_with(mask, requires_grad=True)
    torch.autograd.grad(out.sum(), leaves)
    out, _ = fwd(*leaves, attn_mask=mask)
    torch.autograd.grad(out.sum(), leaves)
    assert seen == [True, False]
