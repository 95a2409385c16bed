"""The whole path on a GPU that has kernels: op, router, torch.compile, CUDA graphs, streams. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fa_sdpa
import fa_sdpa.ops
from fa_sdpa import kernels, reference
from fa_sdpa.meta.spec import AttentionSpec
from fa_sdpa.meta.target import Target

SPEC = AttentionSpec(torch.bfloat16, 1, 4, 2, 256, 256, 64, 64)


def lacking() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "; ".join(map(str, kernels.unsupported(SPEC, Target.of(torch.device("cuda")))))


pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd = torch.ops.fa4.attention_fwd


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
    [
        {"is_causal": True, "bottom_right": True},
        {"window_left": 60, "window_right": 10},
        {"window_left": 0, "bottom_right": True, "is_causal": True},
        {"window_right": 200},
        {"softcap": 20.0, "is_causal": True},
        {"softcap": 5.0, "window_left": 130, "window_right": 0, "bottom_right": True},
    ],
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


def test_same_values_through_any_strides_give_the_same_bits():
    q, k, v = (x.contiguous() for x in inputs(heads=3, heads_kv=3, d=128))
    expected = fwd(q, k, v, is_causal=True)
    packed = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).contiguous()  # B, S, 3, H, D
    odd = [torch.randn(*x.shape[:3], 131, device="cuda", dtype=x.dtype)[..., 1:129] for x in (q, k, v)]
    for x, y in zip(odd, (q, k, v), strict=True):
        x.copy_(y)
    for variant in ([packed[:, :, i].transpose(1, 2) for i in range(3)], odd):
        for got, want in zip(fwd(*variant, is_causal=True), expected, strict=True):
            assert torch.equal(got, want)


def test_repeats_are_bitwise_equal():
    q, k, v = inputs(sq=1000, sk=1000, d=128)
    first = fwd(q, k, v, is_causal=True)
    for _ in range(100):
        for got, want in zip(fwd(q, k, v, is_causal=True), first, strict=True):
            assert torch.equal(got, want)


def test_empty_and_keyless():
    q, k, v = inputs(sk=0)
    out, lse = fwd(q, k, v)
    assert not out.any() and (lse == -torch.inf).all()
    q, k, v = inputs(batch=0)
    assert fwd(q, k, v)[0].shape == q.shape


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
    out, lse = fwd(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(NotImplementedError, match=r"\[nondeterministic\]"):
            torch.ops.fa4.attention_bwd(out, q, k, v, out, lse)
    finally:
        torch.use_deterministic_algorithms(False)


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
    with fa_sdpa.enable(), torch.no_grad():
        for sq, backend in ((512, "native"), (4096, "fa4")):
            decision = fa_sdpa.explain(*inputs(heads=16, heads_kv=16, sq=sq, sk=sq, d=128))
            assert decision.backend == backend, str(decision)
