"""Eager calls that are repeated go past the dispatcher: what they compute, what sees them, and what they cost."""

from __future__ import annotations

import timeit

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fa_sdpa
from fa_sdpa import router
from fa_sdpa.kernels import launch
from fa_sdpa.meta.spec import Options
from fa_sdpa.meta.target import Target
from fa_sdpa.ops import attention

H100 = Target("cuda", 90, "NVIDIA H100 80GB HBM3", 132, 232_448)
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
    router._forget_decisions()
    attention._runs.clear()
    fa_sdpa.reset_stats()
    yield
    router._forget_decisions()
    attention._runs.clear()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def through_op(monkeypatch):
    """The calls that the router makes through the op."""
    calls: list[object] = []
    op = router._fa4

    def counted(*args, **kwargs):
        calls.append(args)
        return op(*args, **kwargs)

    monkeypatch.setattr(router, "_fa4", counted)
    return calls


def qkv(*shape, dtype=torch.float32, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 17, 8)), dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.0}, {"is_causal": True, "scale": 0.3}])
@pytest.mark.parametrize("grad", [False, True])
def test_repeated_calls_go_past_the_dispatcher(options, grad, through_op):
    for _ in range(3):
        native = qkv(requires_grad=grad)
        ours = [x.detach().clone().requires_grad_(grad) for x in native]
        expected = sdpa(*native, **options)
        with fa_sdpa.enable("always"):
            out = sdpa(*ours, **options)
        torch.testing.assert_close(out, expected)
        assert out.requires_grad == grad
        if grad:
            dout = torch.randn_like(out)
            grads = torch.autograd.grad(out, ours, dout, retain_graph=True, create_graph=True)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, native, dout))
            with pytest.raises(RuntimeError, match="no double backward"):
                torch.autograd.grad(grads[0].sum(), ours)
    assert len(through_op) == 1
    assert fa_sdpa.stats().eager.routed == 3


def test_another_layout_dtype_or_device_is_another_call(through_op):
    q, k, v = qkv()
    strided = torch.randn(2, 17, 4, 8).transpose(1, 2)
    with fa_sdpa.enable("always"):
        for _ in range(2):
            for key in (k, strided):
                torch.testing.assert_close(sdpa(q, key, v), torch.ops.fa4.attention_fwd(q, key, v)[0])
        assert len(through_op) == 2
        with pytest.raises(RuntimeError, match="dtype"):
            sdpa(q, k.double(), v)
        assert {"dtypes"} <= set(fa_sdpa.stats().eager.reasons)


def test_what_sees_ops_sees_this_one(through_op):
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = qkv()
    with fa_sdpa.enable("always"):
        for _ in range(2):
            sdpa(*x)
        with See():
            sdpa(*x)
            torch.ops.fa4.attention_fwd(*x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sdpa(*x)
    assert seen.count("fa4.attention_fwd.default") == 2
    assert "fa4::attention_fwd" in {event.key for event in profile.key_averages()}
    assert len(through_op) == 3


def test_circumstances_are_looked_at_in_every_call():
    x = qkv()
    with fa_sdpa.enable("always"):
        sdpa(*x)
        sdpa(*x)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            sdpa(*x)
        torch.func.grad(lambda q: sdpa(q, *x[1:]).sum())(x[0])
        with torch.autograd.forward_ad.dual_level():
            sdpa(*x)
        sdpa(*x)
    counts = fa_sdpa.stats().eager
    assert counts.routed == 3 and {"sdp_backends", "transform", "forward_ad"} <= set(counts.reasons)


@pytest.mark.parametrize("through", [sdpa, lambda *x: torch.ops.fa4.attention_fwd(*x)[0]], ids=["sdpa", "op"])
def test_tensors_that_are_not_what_they_seem(through):
    q, k, v = qkv()
    dead = []
    torch.func.grad(lambda x: (dead.append(x), x.sum())[1])(q)
    negated = torch._neg_view(q)
    assert type(dead[0]) is type(negated) is torch.Tensor
    with fa_sdpa.enable("always"):
        expected = through(q, k, v), through(-q, k, v)
        for given, right in zip((dead[0], negated), expected, strict=True):
            torch.testing.assert_close(through(given, k, v), right)


def test_the_graph_that_is_recorded_is_the_ops():
    """A checkpoint's recomputation must save what the forward saved, whichever of the two went through the op."""
    x = qkv(requires_grad=True)
    saved: list[list[torch.Size]] = []
    with fa_sdpa.enable("always"):
        for _ in range(2):
            saved.append([])
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved[-1].append(t.shape), t)[1], lambda t: t):
                sdpa(*x)
        router._forget_decisions()
        checkpoint(sdpa, *x, use_reentrant=False).sum().backward()
    assert saved[0] == saved[1] and len(saved[0]) == 5
    with fa_sdpa.enable("always"), torch.inference_mode():
        assert sdpa(*x).is_inference()


# ---- the launch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """launch.py takes this host's tensors for an H100's; the arguments of every launch."""
    calls: list[tuple] = []
    monkeypatch.setattr(Target, "of", lambda device: H100)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(launch.private, "current_device", lambda: -1)
    plan = launch._Plan(lambda *arguments: calls.append(arguments), 0.25)
    monkeypatch.setattr(launch, "_make_plan", lambda *wanted: launch._plans.setdefault(wanted, plan))
    return calls


def metadata(x):
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("options", [Options(), Options(True, 0.5), Options(window_left=3, softcap=2.0)])
@pytest.mark.parametrize(("heads", "heads_kv", "sq", "sk", "d", "dv"), [(4, 4, 9, 9, 64, 64), (6, 2, 1, 30, 64, 128)])
def test_a_prepared_launch_is_that_of_the_op(options, heads, heads_kv, sq, sk, d, dv, launched):
    def make(n, s, size):
        return torch.randn(2, s, n, size, dtype=torch.bfloat16).transpose(1, 2)

    x = make(heads, sq, d), make(heads_kv, sk, d), make(heads_kv, sk, dv)
    expected = launch.attention_fwd(*x, None, options)
    results = launch.prepared(*x, options)(*x)
    assert list(map(metadata, results)) == list(map(metadata, expected))
    assert list(map(metadata, launched[0])) == list(map(metadata, launched[1]))
    assert [a.data_ptr() for a in launched[0][:3]] == [a.data_ptr() for a in launched[1][:3]]


def test_a_prepared_launch_looks_at_addresses(launched, monkeypatch):
    q, k, v = qkv(1, 2, 9, 64, dtype=torch.bfloat16)
    run = launch.prepared(q, k, v, Options())
    shifted = torch.randn(q.numel() + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    run(shifted, k, v)
    assert launched[0][0].data_ptr() % 16 == 0 and torch.equal(launched[0][0], shifted)
    assert run(torch._neg_view(q), k, v) is None and run(torch._efficientzerotensor(q.shape), k, v) is None
    assert len(launched) == 1
    monkeypatch.setattr(launch.private, "current_device", lambda: 7)
    run(q, k, v)  # on another device than the current one: attention_fwd sees to that
    assert len(launched) == 2


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_host_time_as_a_ratio(monkeypatch, one_thread):
    """A call that is left to torch, and one that is routed to a kernel that takes no time, beside torch's own call on
    tensors too small to matter. They read 1.53 and 0.71; a busy machine gets three tries."""
    q, k, v = qkv(1, 1, 16, 64)
    results = torch.empty_like(q), torch.empty(1, 1, 16)
    monkeypatch.setattr(attention, "_device_run", lambda *a: lambda *x: results)

    def fastest(rounds=15):
        return min(timeit.repeat(lambda: sdpa(q, k, v), number=200, repeat=rounds))

    with torch.no_grad():
        for _ in range(3):
            plain = fastest()
            with fa_sdpa.enable("auto"):
                left = fastest() / plain
            with fa_sdpa.enable("always"):
                routed = fastest() / plain
            if left <= 1.7 and routed <= 0.9:
                return
    pytest.fail(f"of torch's time: {left:.2f} left to torch, {routed:.2f} routed")
