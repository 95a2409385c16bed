"""The whole path on a GPU that has kernels: op, router, torch.compile, CUDA graphs, streams. Skipped elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fa_sdpa
import fa_sdpa.ops
from fa_sdpa import kernels, reference
from fa_sdpa.kernels import launch
from fa_sdpa.meta.spec import AttentionSpec, Options
from fa_sdpa.meta.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from forward_cases import LAYOUTS, with_layout  # noqa: E402

SPEC = AttentionSpec(torch.bfloat16, 1, 4, 2, 256, 256, 64, 64)


def lacking() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "; ".join(map(str, kernels.unsupported(SPEC, Target.of(torch.device("cuda")))))


pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd = torch.ops.fa4.attention_fwd


OPTIONS = (
    {"is_causal": True, "bottom_right": True},
    {"window_left": 60, "window_right": 10},
    {"window_left": 0, "bottom_right": True, "is_causal": True},
    {"window_right": 200},
    {"softcap": 20.0, "is_causal": True},
    {"softcap": 5.0, "window_left": 130, "window_right": 0, "bottom_right": True},
)


def inputs(batch=2, heads=4, heads_kv=2, sq=257, sk=257, d=64, dv=None, dtype=torch.bfloat16, requires_grad=False):
    """BSHD memory seen as BHSD."""
    sizes = ((batch, sq, heads, d), (batch, sk, heads_kv, d), (batch, sk, heads_kv, dv or d))
    tensors = [torch.randn(size, dtype=dtype, device="cuda").transpose(1, 2) for size in sizes]
    return [x.requires_grad_(requires_grad) for x in tensors]


def assert_within_bound(actual, q, k, v, is_causal):
    expected, _ = reference.attention(q.double(), k.double(), v.double(), is_causal=is_causal)
    baseline, _ = reference.attention(q, k, v, is_causal=is_causal)
    excess = reference.excess(actual, expected, baseline)
    assert excess <= 0, f"over the bound by {excess:.3g}; {reference.worst(actual, expected)}"


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (7, 129), (129, 7), (300, 513)])
def test_routed_call_keeps_the_error_bound(sq, sk, dtype, is_causal):
    for heads, heads_kv, d in ((7, 1, 64), (4, 4, 128)):
        q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=sq, sk=sk, d=d, dtype=dtype)
        fa_sdpa.reset_stats()
        with fa_sdpa.enable("always"):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=heads != heads_kv)
        assert fa_sdpa.stats().routed == 1
        assert out.stride() == torch.empty_like(q).stride()
        assert_within_bound(out, q, k, v, is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("d", "dv"), [(8, 8), (40, 40), (72, 72), (96, 96), (192, 192), (256, 256), (64, 128), (192, 128), (128, 256)]
)
def test_head_dims(d, dv, is_causal):
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = inputs(sq=300, sk=411, d=d, dv=dv, dtype=dtype)
        assert_within_bound(fwd(q, k, v, is_causal=is_causal)[0], q, k, v, is_causal)


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=str,
)
@pytest.mark.parametrize("has_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(("sq", "sk"), [(300, 513), (513, 300)])
def test_options(sq, sk, has_sink, options):
    for d in (64, 128, 256):
        q, k, v = inputs(sq=sq, sk=sk, d=d)
        sink = torch.randn(4, device="cuda") if has_sink else None
        out, lse = fwd(q, k, v, sink=sink, **options)
        wide = [x.double() for x in (q, k, v)]
        expected, expected_lse = reference.attention(*wide, sink=sink, **options)
        baseline, _ = reference.attention(q, k, v, sink=sink, **options)
        assert reference.excess(out, expected, baseline) <= 0, reference.worst(out, expected)
        torch.testing.assert_close(lse, expected_lse.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "padded"])
@pytest.mark.parametrize(("heads", "heads_kv"), [(32, 8), (28, 4), (16, 1), (70, 1)])
def test_one_query_per_head(heads, heads_kv, layout, d):
    q, k, v = inputs(batch=9, heads=heads, heads_kv=heads_kv, sq=1, sk=1500, d=d)
    q, k, v = (with_layout(x.contiguous(), layout) for x in (q, k, v))
    for options in ({}, {"softcap": 20.0}, {"is_causal": True}, {"is_causal": True, "bottom_right": True}):
        out, lse = fwd(q, k, v, **options)
        wide = [x.double() for x in (q, k, v)]
        expected, expected_lse = reference.attention(*wide, **options)
        baseline, _ = reference.attention(q, k, v, **options)
        assert out.stride() == torch.empty_like(q).stride()
        assert reference.excess(out, expected, baseline) <= 0, reference.worst(out, expected)
        torch.testing.assert_close(lse, expected_lse.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (128, 64), (72, 256)])
@pytest.mark.parametrize(
    ("batch", "heads", "heads_kv", "sq", "sk"),
    [(1, 16, 2, 1, 2048), (1, 32, 8, 1, 32768), (2, 6, 3, 5, 4999), (1, 1, 1, 1, 20001), (1, 2, 1, 200, 9000)],
)
def test_keys_shared_by_several_ctas(batch, heads, heads_kv, sq, sk, d, dv):
    q, k, v = inputs(batch, heads, heads_kv, sq, sk, d, dv)
    needed = launch.keys(AttentionSpec.of(q, k, v), Target.of(q.device))
    assert [key.split for key in needed] == [True]
    out, lse = fwd(q, k, v)
    expected, expected_lse = reference.attention(*(x.double() for x in (q, k, v)))
    baseline, _ = reference.attention(q, k, v)
    assert reference.excess(out, expected, baseline) <= 0, reference.worst(out, expected)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-4, rtol=1e-4)
    for _ in range(20):
        again, again_lse = fwd(q, k, v)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, _ = fwd(q, k, v)
    replayed.fill_(torch.nan)
    graph.replay()
    assert torch.equal(replayed, out)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_left": 90, "softcap": 15.0}], ids=str)
def test_same_values_through_any_strides_give_the_same_bits(options, d):
    q, k, v = (x.contiguous() for x in inputs(heads=4, heads_kv=2, sk=301, d=d))
    expected = fwd(q, k, v, **options)
    for layout_q, layout_kv in ((a, b) for a in LAYOUTS for b in (a, "bhsd", "packed", "cache")):
        variant = [
            with_layout(x, layout) for x, layout in zip((q, k, v), (layout_q, layout_kv, layout_kv), strict=True)
        ]
        for got, want in zip(fwd(*variant, **options), expected, strict=True):
            assert torch.equal(got, want), (layout_q, layout_kv)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_packed_and_expanded_inputs_give_the_same_bits(is_causal):
    q, k, v = (x.contiguous() for x in inputs(heads=3, heads_kv=3, d=128))
    packed = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)  # of (B, S, 3, H, D)
    for got, want in zip(fwd(*packed, is_causal=is_causal), fwd(q, k, v, is_causal=is_causal), strict=True):
        assert torch.equal(got, want)
    for dim in (0, 1):  # one sequence, or one head, of keys for all
        shared = [x.narrow(dim, 0, 1).expand_as(x) for x in (k, v)]
        copied = fwd(q, *(x.contiguous() for x in shared), is_causal=is_causal)
        for got, want in zip(fwd(q, *shared, is_causal=is_causal), copied, strict=True):
            assert torch.equal(got, want)
    shared = [x[:, :1] for x in (k, v)]  # one key/value head by GQA, or expanded to all: the same multiplications
    expanded = fwd(q, *(x.expand_as(q) for x in shared), is_causal=is_causal)
    for got, want in zip(fwd(q, *shared, is_causal=is_causal), expanded, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("d", "heads", "heads_kv", "options"),
    [
        (64, 4, 4, {}),
        (64, 8, 1, {"is_causal": True}),
        (128, 28, 4, {"is_causal": True}),
        (128, 4, 2, {"window_left": 100, "bottom_right": True, "is_causal": True}),
        (256, 4, 2, {"softcap": 20.0}),
    ],
    ids=str,
)
def test_repeats_are_bitwise_equal(d, heads, heads_kv, options):
    q, k, v = inputs(heads=heads, heads_kv=heads_kv, sq=1000, sk=1111, d=d)
    sink = torch.randn(heads, device="cuda")
    first = fwd(q, k, v, sink=sink, **options)
    plain = fwd(q, k, v, **options)
    for _ in range(100):
        for got, want in zip(fwd(q, k, v, sink=sink, **options), first, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(fwd(q, k, v, **options), plain, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("seqlen", [100, 300, 400, 600, 1100])  # 1, 3, 4, 5, 9 query blocks
def test_paired_tiles_of_many_sequences(seqlen):
    """So many that keys and values do not fit in half of L2, an odd number of them: one middle block is left alone."""
    batch = (24 << 20) // (17 * seqlen * 2 * 128 * 2) // 2 * 2 + 3
    q, k, v = inputs(batch, 17, 17, seqlen, seqlen, 128)
    out, lse = fwd(q, k, v, is_causal=True)
    assert torch.isfinite(lse).all()
    for b in range(batch):
        one = slice(b, b + 1)
        assert_within_bound(out[one], q[one], k[one], v[one], True)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_left": 7, "softcap": 9.0}], ids=str)
def test_empty_and_keyless(options, d):
    q, k, v = inputs(sk=0, d=d)
    out, lse = fwd(q, k, v, **options)
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
    sink = torch.randn(4, device="cuda")
    out, lse = fwd(q, k, v, sink=sink, **options)
    assert not out.any() and torch.equal(lse, sink[:, None].expand_as(lse))
    for sizes in ({"batch": 0}, {"sq": 0}, {"heads": 0, "heads_kv": 0}, {"batch": 0, "sk": 0}):
        q, k, v = inputs(**sizes, d=d)
        out, lse = fwd(q, k, v, **options)
        assert out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [64, 128])
def test_every_short_length(d, is_causal):
    for sq, sk in (
        [(s, s) for s in range(1, 18)] + [(1, s) for s in (2, 127, 128, 129, 1023)] + [(s, 1) for s in (2, 255)]
    ):
        q, k, v = inputs(sq=sq, sk=sk, d=d)
        assert_within_bound(fwd(q, k, v, is_causal=is_causal)[0], q, k, v, is_causal)


@pytest.mark.parametrize(
    ("sq", "sk", "d", "options"),
    [
        (1 << 20, 1 << 20, 64, {"window_left": 3000, "window_right": 40}),
        (1 << 20, 1 << 20, 128, {"window_left": 1000, "is_causal": True}),
        (1 << 20, 513, 64, {"is_causal": True}),
        (257, 1 << 20, 64, {}),
        (257, 1 << 20, 128, {"is_causal": True, "bottom_right": True}),
        (1 << 20, 1 << 20, 64, {"is_causal": True}),
    ],
    ids=str,
)
def test_long_sequences(sq, sk, d, options):
    q, k, v = inputs(batch=1, heads=2, heads_kv=1, sq=sq, sk=sk, d=d)
    out, lse = fwd(q, k, v, **options)
    assert not out.isnan().any() and not lse.isnan().any()
    left, right = Options(**options).bounds(sq, sk)
    for row in sorted({0, 1, 127, 128, sq // 2, sq // 3, sq - 129, sq - 2, sq - 1}):
        first = 0 if left is None else max(row + left, 0)
        end = sk if right is None else min(row + right + 1, sk)
        case = [q[:, :, row : row + 1], k[:, :, first:end], v[:, :, first:end]]  # a row and the keys that it sees
        expected, expected_lse = reference.attention(*(x.double() for x in case))
        baseline, _ = reference.attention(*case)
        got = out[:, :, row : row + 1]
        assert reference.excess(got, expected, baseline) <= 0, (row, reference.worst(got, expected))
        torch.testing.assert_close(lse[:, :, row : row + 1], expected_lse.float(), atol=1e-4, rtol=1e-4)


def test_more_than_65535_sequences_and_2_to_the_31_elements():
    q, k, v = (torch.randn(70_000, 4, 64, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out, _ = fwd(q, k, v)
    assert out.numel() > 2**31
    for part in (slice(0, 3), slice(69_997, 70_000)):
        assert_within_bound(out[part], q[part], k[part], v[part], False)


def test_opcheck():
    q, k, v = inputs(sq=65, sk=65)
    opcheck(fwd.default, (q, k, v), {"is_causal": True})


def test_named_ops_fail_loudly():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match=r"\[dtype\].*\[head_dim\]"):
        fwd(*(x[..., :42].float() for x in (q, k, v)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_fullgraph(mode):
    def block(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True, enable_gqa=True) + 1

    q, k, v = inputs(sq=512, sk=512, d=128)
    with torch.no_grad():
        native = block(q, k, v)
        fa_sdpa.reset_stats()
        with fa_sdpa.enable("always"):
            compiled = torch.compile(block, fullgraph=True, mode=mode)
            for _ in range(4):
                out = compiled(q, k, v).clone()
        assert fa_sdpa.stats().routed > 0
    torch.testing.assert_close(out, native, atol=2e-2, rtol=2e-2)


def test_cuda_graph_capture_and_side_stream():
    q, k, v = inputs(sq=300, sk=300)
    expected, _ = fwd(q, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out, _ = fwd(q, k, v)
    side.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = fwd(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, fwd(q, k, v)[0]) and not torch.equal(out, expected)


def test_auto_follows_the_crossover_table():
    with fa_sdpa.enable(fa_sdpa.Policy("auto", jit="block")), torch.no_grad():
        for sq, backend in ((8, "native"), (4096, "fa4")):
            decision = fa_sdpa.explain(*inputs(heads=16, heads_kv=16, sq=sq, sk=sq, d=128))
            assert decision.backend == backend, str(decision)
