"""Repeated calls on a GPU that has kernels, which go past the dispatcher. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_cuda import inputs, lacking
from test_cuda_backward import assert_grads_within_bound

import fa_sdpa
import fa_sdpa.ops
from fa_sdpa import router

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

fwd, bwd = torch.ops.fa4.attention_fwd, torch.ops.fa4.attention_bwd


@pytest.fixture
def routed(through_op):
    """Routing is on; the calls that go through the op."""
    router._forget_decisions()
    with fa_sdpa.enable("always"):
        yield through_op
    router._forget_decisions()


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_repeats_are_the_op_bit_for_bit(d, inference, routed):
    with torch.inference_mode(inference), torch.no_grad():
        for _ in range(4):
            x = inputs(d=d)
            assert torch.equal(sdpa(*x), fwd(*x, is_causal=True)[0])
    assert len(routed) == 1


def test_any_address(routed):
    q, k, v = inputs(d=64)
    with torch.no_grad():
        sdpa(q, k, v)
        for shift in (1, 3, 8):  # elements of two bytes
            moved = []
            for x in (q, k, v):
                memory = torch.empty(x.numel() + shift, dtype=x.dtype, device="cuda")
                moved.append(memory[shift:].as_strided(x.shape, x.stride()).copy_(x))
            assert torch.equal(sdpa(*moved), fwd(q, k, v, is_causal=True)[0])
    assert len(routed) == 1


@pytest.mark.parametrize("needs_grad", [(True, True, True), (True, False, False), (False, True, True)])
def test_training_repeats(needs_grad, routed):
    for _ in range(4):
        x = [t.requires_grad_(needed) for t, needed in zip(inputs(d=128), needs_grad, strict=True)]
        out = sdpa(*x)
        dout = torch.randn_like(out)
        leaves = [t for t in x if t.requires_grad]
        grads = torch.autograd.grad(out, leaves, dout)
        q, k, v = (t.detach() for t in x)
        expected = bwd(dout, q, k, v, *fwd(q, k, v, is_causal=True), is_causal=True)
        wanted = [grad for grad, needed in zip(expected, needs_grad, strict=True) if needed]
        for got, want, leaf in zip(grads, wanted, leaves, strict=True):
            assert got.stride() == torch.empty_like(leaf).stride()
            torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)  # the order of dq's summands varies
        if all(needs_grad):
            assert_grads_within_bound(grads, q, k, v, dout, is_causal=True)
    assert len(routed) == 1


def test_streams_and_capture(routed):
    q, k, v = inputs(sq=300, sk=300, requires_grad=True)
    dout = torch.randn_like(q)

    def step():
        out = sdpa(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    for _ in range(3):
        expected = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # so that work on another stream would come first
        with torch.no_grad():
            on_side = sdpa(q + 1, k, v)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(on_side, sdpa(q + 1, k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    expected = step()
    assert torch.equal(captured[0], expected[0])
    for got, want in zip(captured[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_memory_is_given_back(routed):
    q, k, v = inputs(sq=512, sk=512, requires_grad=True)
    for step in range(20):
        sdpa(q, k, v).sum().backward()
        q.grad = k.grad = v.grad = None
        if step == 3:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current(routed):
    x = [t.to("cuda:1") for t in inputs()]
    with torch.no_grad():
        for _ in range(3):
            out = sdpa(*x)
            assert out.device == x[0].device
            assert torch.equal(out, fwd(*x, is_causal=True)[0])
