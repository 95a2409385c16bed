"""Gradients on a GPU that has kernels: op, autograd, router, torch.compile, CUDA graphs. Skipped elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_cuda import OPTIONS, inputs, lacking
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa
import fa_sdpa.ops
from fa_sdpa import reference
from fa_sdpa.kernels import launch
from fa_sdpa.meta.spec import Options

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from forward_cases import LAYOUTS, with_layout  # noqa: E402

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd, bwd = torch.ops.fa4.attention_fwd, torch.ops.fa4.attention_bwd


def math_grads(tensors, dout, sink=None, **options):
    """Autograd through attention written out, in the dtype of ``tensors``; the sink's gradient last."""
    leaves = [x.detach().contiguous().requires_grad_() for x in tensors]
    if sink is not None:
        leaves.append(sink.detach().clone().requires_grad_())
    out, _ = reference.attention(*leaves[:3], sink=leaves[3] if sink is not None else None, **options)
    return torch.autograd.grad(out, leaves, dout)


def assert_grads_within_bound(grads, q, k, v, dout, **options):
    expected = math_grads([x.double() for x in (q, k, v)], dout.double(), **options)
    baseline = math_grads((q, k, v), dout, **options)
    for name, got, want, base in zip(("dq", "dk", "dv"), grads, expected, baseline, strict=True):
        excess = reference.excess(got, want, base, floor=1e-4)
        assert excess <= 0, f"{name} is over the bound by {excess:.3g}; {reference.worst(got, want)}"


def check(q, k, v, dout=None, **options):
    out, lse = fwd(q, k, v, **options)
    dout = torch.randn_like(out) if dout is None else dout
    grads = bwd(dout, q, k, v, out, lse, **options)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.stride() == torch.empty_like(x.transpose(1, 2)).transpose(1, 2).stride()
    assert_grads_within_bound(grads, q, k, v, dout, **options)
    return grads


@pytest.mark.parametrize("layout", ["bshd", "packed", "cache"])
@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen", "d", "dv", "options"),
    [
        (8, 2, 1000, 64, 64, {"is_causal": True}),
        (7, 1, 700, 128, 128, {}),
        (12, 2, 900, 80, 80, {"is_causal": True}),
        (8, 2, 800, 192, 128, {"window_left": 300}),
    ],
)
def test_groups_in_parts_where_tiles_are_few(heads, heads_kv, seqlen, d, dv, options, layout):
    q, k, v = inputs(1, heads, heads_kv, seqlen, seqlen, d, dv)
    assert launch._backward_launch_of(q, k, v, Options(**options)).heads > heads_kv
    k, v = (with_layout(x.contiguous(), layout) for x in (k, v))
    check(q, k, v, **options)


def test_parts_of_groups_use_slots_again():
    q, k, v = inputs(3, 28, 4, 1024, 1024, 128, 128)
    found = launch._backward_launch_of(q, k, v, Options(is_causal=True))
    slots = found.scalars[7]  # after the scaling, the SMs and the rest of the schedule
    assert found.heads == 28 and slots < 3 * 28
    check(q, k, v, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (7, 129), (129, 7), (300, 513), (513, 300)])
def test_gradients_keep_the_error_bound(sq, sk, dtype, is_causal):
    for heads, heads_kv, d in ((7, 1, 64), (4, 4, 128)):
        check(*inputs(heads=heads, heads_kv=heads_kv, sq=sq, sk=sk, d=d, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("d", "dv"),
    [(8, 8), (40, 40), (72, 72), (96, 96), (192, 192), (256, 256), (64, 128), (192, 128), (192, 64), (256, 8)],
)
def test_head_dims(d, dv, is_causal):
    for dtype in (torch.bfloat16, torch.float16):
        check(*inputs(sq=300, sk=411, d=d, dv=dv, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=str,
)
@pytest.mark.parametrize(("sq", "sk"), [(300, 513), (513, 300)])
def test_options(sq, sk, options):
    for d in (64, 128, 256):
        check(*inputs(sq=sq, sk=sk, d=d), **options)


def test_sink():
    q, k, v = inputs(sq=300, sk=411, d=64, requires_grad=True)
    sink = torch.randn(4, device="cuda", requires_grad=True)
    out, _ = fwd(q, k, v, sink=sink, is_causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v, sink), dout)
    expected = math_grads([x.double() for x in (q, k, v)], dout.double(), sink=sink.double(), is_causal=True)
    baseline = math_grads((q, k, v), dout, sink=sink, is_causal=True)
    for got, want, base in zip(grads, expected, baseline, strict=True):
        assert reference.excess(got, want, base, floor=1e-4) <= 0, reference.worst(got, want)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "unaligned", "sliced", "far"])
def test_dout_of_any_strides(layout):
    q, k, v = inputs(d=128)
    shape = (2, 4, 257, 128)
    dout = {
        "expanded": lambda: torch.ones((), device="cuda", dtype=q.dtype).expand(shape),
        "transposed": lambda: torch.randn(2, 4, 128, 257, device="cuda", dtype=q.dtype).mT,
        "unaligned": lambda: torch.randn(2, 4, 257, 129, device="cuda", dtype=q.dtype)[..., 1:],
        "sliced": lambda: torch.randn(2, 4, 514, 256, device="cuda", dtype=q.dtype)[:, :, ::2, :128],
        "far": lambda: q.new_empty(2**31 + 4 * 257 * 128).as_strided(shape, (2**31, 257 * 128, 128, 1)).normal_(),
    }[layout]()
    check(q, k, v, dout, is_causal=True)


def test_layouts_of_the_inputs():
    packed = torch.randn(2, 257, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    check(*(packed[:, :, i].transpose(1, 2) for i in range(3)), is_causal=True)
    q, k, v = inputs(heads_kv=1)
    check(q, k.expand(2, 4, 257, 64), v.expand(2, 4, 257, 64))


# Flash-2 does not look at alignment, and cannot do without it.
@pytest.mark.parametrize("layout", [*(name for name in LAYOUTS if name != "unaligned"), "expanded"])
def test_gradients_lie_in_memory_where_torchs_flash_backward_puts_them(layout):
    tensors = inputs(heads_kv=4)
    if layout == "expanded":
        tensors[1:] = (x[:, :1].expand(2, 4, 257, 64) for x in tensors[1:])
    else:
        tensors = [with_layout(x, layout) for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.randn_like(leaves[0])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        native = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    fa_sdpa.reset_stats()
    with fa_sdpa.enable("always"):
        grads = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    assert fa_sdpa.stats().routed == 1
    assert [grad.stride() for grad in grads] == [grad.stride() for grad in native]
    assert_grads_within_bound(grads, *tensors, dout, is_causal=True)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_rows_without_keys(d, dv):
    q, k, v = inputs(sq=300, sk=64, d=d, dv=dv)
    options = {"is_causal": True, "bottom_right": True}  # row i sees the keys up to i - 236
    dq, dk, dv = check(q, k, v, **options)
    assert not dq[:, :, :236].any()
    assert all(grad.isfinite().all() for grad in (dq, dk, dv))
    hidden = {"window_left": 5, "window_right": 0}  # row i sees the keys i - 5 … i: none from row 69 on
    dq, dk, dv = check(q, k, v, **hidden)
    assert not dq[:, :, 69:].any() and dq[:, :, :69].any()


def test_empty_calls():
    for batch, sq, sk in ((1, 3, 0), (0, 3, 3), (1, 0, 3)):
        q, k, v = inputs(batch=batch, sq=sq, sk=sk)
        out, lse = fwd(q, k, v)
        for grad, x in zip(bwd(torch.ones_like(out), q, k, v, out, lse), (q, k, v), strict=True):
            assert grad.shape == x.shape and not grad.any()


def test_more_than_65535_sequences_and_2_to_the_31_elements():
    q, k, v = (torch.randn(70_000, 4, 64, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out, lse = fwd(q, k, v)
    grads = bwd(out, q, k, v, out, lse)
    for part in (slice(0, 3), slice(69_997, 70_000)):
        assert_grads_within_bound([grad[part] for grad in grads], q[part], k[part], v[part], out[part])


def test_opcheck():
    q, k, v = inputs(sq=65, sk=65)
    out, lse = fwd(q, k, v, is_causal=True)
    opcheck(bwd.default, (torch.randn_like(out), q, k, v, out, lse), {"is_causal": True})
    opcheck(fwd.default, inputs(sq=65, sk=65, requires_grad=True), {"is_causal": True})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_routed_training_step(compiled):
    def block(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True, enable_gqa=True) * 3

    q, k, v = inputs(sq=512, sk=512, d=128, requires_grad=True)
    dout = torch.randn_like(q)
    fa_sdpa.reset_stats()
    with fa_sdpa.enable("always"):
        run = torch.compile(block, fullgraph=True) if compiled else block
        grads = torch.autograd.grad(run(q, k, v), (q, k, v), dout)
    assert fa_sdpa.stats().routed > 0
    dq, dk, dv = grads
    assert_grads_within_bound((dq / 2, dk, dv), (q * 2).detach(), k, v, dout * 3, is_causal=True)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"heads": 40, "heads_kv": 40, "sq": 700, "sk": 700, "d": 128}, {"is_causal": True}),
        ({"heads": 28, "heads_kv": 4, "sq": 520, "sk": 1030, "d": 128}, {}),
        ({"heads": 32, "heads_kv": 8, "sq": 1000, "sk": 1000, "d": 64}, {"is_causal": True}),
        ({"heads": 8, "heads_kv": 8, "sq": 900, "sk": 900, "d": 128}, {"window_left": 200, "window_right": 50}),
        ({"heads": 4, "heads_kv": 2, "sq": 600, "sk": 900, "d": 256}, {"is_causal": True}),
        ({"heads": 4, "heads_kv": 2, "sq": 600, "sk": 900, "d": 192}, {"softcap": 20.0}),
    ],
    ids=str,
)
def test_deterministic_mode_repeats_bit_for_bit(deterministic, sizes, options):
    q, k, v = inputs(**sizes)
    first = check(q, k, v, dout := torch.randn_like(q), **options)
    out, lse = fwd(q, k, v, **options)
    for _ in range(50):
        for grad, again in zip(first, bwd(dout, q, k, v, out, lse, **options), strict=True):
            assert torch.equal(grad, again)


def test_deterministic_training_is_routed(deterministic):
    q, k, v = inputs(requires_grad=True)
    fa_sdpa.reset_stats()
    with fa_sdpa.enable("always"):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    assert q.grad is not None and fa_sdpa.stats().routed == 1


def test_streams_side_by_side_and_other_numbers_of_ctas(monkeypatch):
    """Waits between CTAs end also when few run at a time, or more are launched than fit."""
    calls = []
    for sizes in ({"heads": 32, "heads_kv": 8, "d": 128}, {"heads": 16, "heads_kv": 16, "d": 64}):
        q, k, v = inputs(batch=4, sq=600, sk=600, **sizes)
        out, lse = fwd(q, k, v, is_causal=True)
        calls.append((torch.randn_like(out), q, k, v, out, lse))
    expected = [bwd(*call, is_causal=True) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(bwd(*call, is_causal=True))
    torch.cuda.synchronize()
    for num_sms in (1, 3, 40, 500):
        plans = {key: plan._replace(num_sms=num_sms) for key, plan in launch._backward_plans.items()}
        monkeypatch.setattr(launch, "_backward_plans", plans)
        found += [bwd(*call, is_causal=True) for call in calls]
    for grads, wanted in zip(found, expected * 5, strict=True):
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, atol=5e-2, rtol=2e-2)  # parts of a group are rounded one by one


def test_cuda_graph_capture():
    q, k, v = inputs(sq=300, sk=300)
    out, lse = fwd(q, k, v)
    dout = torch.randn_like(out)
    bwd(dout, q, k, v, out, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = bwd(dout, q, k, v, out, lse)
    dout.copy_(torch.randn_like(dout))
    graph.replay()
    torch.cuda.synchronize()
    assert_grads_within_bound(grads, q, k, v, dout)


def test_cuda_graph_capture_of_a_routed_step():
    q, k, v = inputs(sq=300, sk=300, requires_grad=True)
    dout = torch.randn_like(q)

    def step():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), dout)

    fa_sdpa.reset_stats()
    with fa_sdpa.enable("always"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grads = step()
    assert fa_sdpa.stats().routed == 2 and fa_sdpa.stats().native == 0
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_grads_within_bound(grads, q, k, v, dout, is_causal=True)
