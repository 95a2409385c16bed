"""Eager calls that are repeated go past the dispatcher: what they compute, what sees them, and what they cost."""

from __future__ import annotations

import contextlib
import timeit

import pytest
import torch
import torch.nn.functional as F
from conftest import counted_calls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fa_sdpa
from fa_sdpa import router
from fa_sdpa.kernels import launch
from fa_sdpa.meta.crossover import Crossover, Rule
from fa_sdpa.meta.spec import Decision, Options, Reason
from fa_sdpa.meta.target import Target
from fa_sdpa.ops import attention
from fa_sdpa.policy import Policy, decide

H100 = Target("cuda", 90, "NVIDIA H100 80GB HBM3", 132, 232_448)
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
    router._forget_decisions()
    attention._forget_calls()
    fa_sdpa.reset_stats()
    yield
    router._forget_decisions()
    attention._forget_calls()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def qkv(*shape, dtype=torch.float32, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 17, 8)), dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def assert_same_up_to_one_backward(out, expected, ours, native, grad):
    """Results and gradients are torch's; a double backward is refused."""
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == grad
    if grad:
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, ours, dout, retain_graph=True, create_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, native, dout))
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(grads[0].sum(), ours)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.0}, {"is_causal": True, "scale": 0.3}])
@pytest.mark.parametrize("grad", [False, True])
def test_repeated_calls_go_past_the_dispatcher(options, grad, through_op):
    for _ in range(3):
        native = qkv(requires_grad=grad)
        ours = [x.detach().clone().requires_grad_(grad) for x in native]
        expected = sdpa(*native, **options)
        with fa_sdpa.enable("always"):
            out = sdpa(*ours, **options)
        assert_same_up_to_one_backward(out, expected, ours, native, grad)
    assert len(through_op) == 1
    assert fa_sdpa.stats().eager.routed == 3


def masks_of(dtype, *sizes):
    return torch.rand(sizes) < 0.7 if dtype is torch.bool else torch.randn(sizes, dtype=dtype)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_repeated_calls_with_masks_do_so_too(dtype, grad, through_op):
    """Each kind of mask once through the op; what torch has to serve, in between, is torch's."""
    kinds = [(17, 17), (2, 1, 1, 17), (1, 4, 17, 17)]
    for _ in range(3):
        for sizes in kinds:
            native = qkv(requires_grad=grad)
            ours = [x.detach().clone().requires_grad_(grad) for x in native]
            mask = masks_of(dtype, *sizes)
            mask[..., 0] = 0 if dtype is not torch.bool else True
            expected = sdpa(*native, mask)
            with fa_sdpa.enable("always"):
                out = sdpa(*ours, mask)
            assert_same_up_to_one_backward(out, expected, ours, native, grad)
        with fa_sdpa.enable("always"):
            if dtype is not torch.bool:
                bias = torch.randn(17, 17, requires_grad=True)
                sdpa(*ours, bias).sum().backward()
                assert bias.grad is not None
            torch.testing.assert_close(sdpa(*ours), sdpa(*native))  # without a mask, the same tensors
    assert len(through_op) == len(kinds) + 1
    left = 0 if dtype is torch.bool else 3
    assert fa_sdpa.stats().eager[:2] == (3 * len(kinds) + 6, left)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3, "enable_gqa": True}], ids=str)
def test_what_is_routed_for_the_hosts_sake_is_torchs_in_a_cuda_graph(options, through_op, monkeypatch):
    """In eager mode it repeats as any other; it is counted where it ran; a capture leaves nothing behind."""

    def decide(spec, target, policy, *, in_graph=False, **how):
        if in_graph:
            return Decision("native", (Reason("below_crossover", "on the device"),))
        return Decision("fa4", (Reason("host_decides", "in eager mode"),))

    capturing = []
    monkeypatch.setattr(router, "decide", decide)
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (router.jit, "capturing")):
        monkeypatch.setattr(module, name, lambda: bool(capturing))
    calls = [qkv() for _ in range(2)]
    expected = [sdpa(*x, **options) for x in calls]
    with fa_sdpa.enable("always"):
        capturing.append("from the first call on")
        for x, out in zip(calls, expected, strict=True):
            torch.testing.assert_close(sdpa(*x, **options), out, rtol=0, atol=0)
        capturing.clear()
        assert fa_sdpa.stats().eager[:2] == (0, 2) and not through_op
        for turn in range(3):
            for x, out in zip(calls, expected, strict=True):
                torch.testing.assert_close(sdpa(*x, **options), out)
            assert fa_sdpa.stats().eager[:2] == (2 * turn + 2, 2 * turn + 2)
            capturing.append("again")
            torch.testing.assert_close(sdpa(*calls[0], **options), expected[0], rtol=0, atol=0)
            torch.testing.assert_close(sdpa(*calls[1], **options), expected[1], rtol=0, atol=0)
            capturing.clear()
            assert fa_sdpa.stats().eager[:2] == (2 * turn + 2, 2 * turn + 4)
    assert len(through_op) == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones(17, 17, dtype=torch.bool)], ids=["plain", "mask"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "enable_gqa": True}], ids=str)
def test_what_is_left_for_the_hosts_sake_is_routed_in_a_cuda_graph(options, mask, grad, through_op, monkeypatch):
    """Also after eager calls, of which torch serves and counts each; a dispatch mode that sees ops changes nothing."""
    acted = []

    def decide(spec, target, policy, *, in_graph=False, **how):
        acted.append(in_graph)
        if in_graph:
            return Decision("fa4", (Reason("above_crossover", "on the device"),))
        return Decision("native", (Reason("below_crossover", "in eager mode"),))

    capturing = []
    monkeypatch.setattr(router, "decide", decide)
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (router.jit, "capturing")):
        monkeypatch.setattr(module, name, lambda: bool(capturing))
    x = qkv(requires_grad=grad)
    expected = sdpa(*x, mask, **options)
    with fa_sdpa.enable("auto"):
        for turn in range(3):
            for _ in range(2):
                torch.testing.assert_close(sdpa(*x, mask, **options), expected, rtol=0, atol=0)
            with Watching():
                sdpa(*x, mask, **options)
            capturing.append("now")
            torch.testing.assert_close(sdpa(*x, mask, **options), expected)
            capturing.clear()
            assert fa_sdpa.stats().eager[:2] == (turn + 1, 3 * (turn + 1))
        assert len(through_op) == 3 and acted[:2] == [False, True]


class Watching(TorchDispatchMode):
    """Sees ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


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


def test_modes_of_torchs_own_are_seen(through_op):
    """Which the C++ check of a call's tensors leaves out."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    x = qkv()
    with fa_sdpa.enable("always"):
        for _ in range(2):
            sdpa(*x)
            torch.ops.fa4.attention_fwd(*x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(sdpa(*x), FakeTensor)
            assert isinstance(torch.ops.fa4.attention_fwd(*x)[0], FakeTensor)
    assert len(through_op) == 2


@pytest.mark.parametrize("place", range(3))
def test_nested_tensors_after_calls_that_repeat(place):
    """They would end the process in the C++ check."""
    x = qkv(2, 4, 17, 8)
    nested = torch.nested.nested_tensor([torch.randn(4, 17, 8), torch.randn(4, 9, 8)])
    with fa_sdpa.enable("always"):
        for _ in range(3):
            sdpa(*x)
            torch.ops.fa4.attention_fwd(*x)
        with pytest.raises(RuntimeError):
            sdpa(*x[:place], nested, *x[place + 1 :])
        with pytest.raises(RuntimeError):
            torch.ops.fa4.attention_fwd(*x[:place], nested, *x[place + 1 :])
    assert "nested" in fa_sdpa.stats().eager.reasons


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_calls_are_torchs(around, layout):
    """In every mode they go to the kernel that is theirs, and not past the check of those that repeat."""
    jagged = layout is torch.jagged
    rows = [torch.randn(n, 4, 8).transpose(0, 0 if jagged else 1) for n in (17, 9)]
    with fa_sdpa.enable("always"), around():
        x = [torch.nested.nested_tensor(rows, layout=layout, requires_grad=True) for _ in range(3)]
        x = [t.transpose(1, 2) for t in x] if jagged else x
        sdpa(*qkv())
        sdpa(*qkv())
        out = sdpa(*x)
        with fa_sdpa.disable():
            expected = sdpa(*x)
    for given, right in zip(out.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(given, right, rtol=0, atol=0)
    assert out.requires_grad == expected.requires_grad
    assert jagged or "nested" in fa_sdpa.stats().eager.reasons


@pytest.mark.parametrize("layout", ["nested", "jagged", "sparse"])
@pytest.mark.parametrize("after_others", [False, True])
def test_a_nested_or_sparse_mask_is_torchs_to_refuse(layout, after_others):
    x, parts = qkv(), [torch.zeros(17, 17), torch.zeros(9, 17)]
    if layout == "sparse":
        mask = torch.zeros(17, 17).to_sparse()
    else:
        mask = torch.nested.nested_tensor(parts, layout=torch.jagged if layout == "jagged" else torch.strided)
    with pytest.raises((RuntimeError, ValueError)) as native:
        sdpa(*x, mask)
    with fa_sdpa.enable("always"):
        for _ in range(3):
            if after_others:
                sdpa(*x, parts[0])
            with pytest.raises((RuntimeError, ValueError)) as ours:
                sdpa(*x, mask)
    assert str(ours.value).splitlines()[0] == str(native.value).splitlines()[0]


@pytest.mark.parametrize("matter", [False, True])
def test_modes_that_decide_are_asked_for(matter, monkeypatch):
    def decide_call(call, **how):
        codes = ["grad" if call.needs_grad else "neither"] + ["deterministic"] * call.deterministic
        return Decision("native", tuple(Reason(code, "a test") for code in codes))

    if matter:
        monkeypatch.setattr(router, "decide_call", decide_call)
    x = qkv(requires_grad=True)
    options = {} if matter else {"dropout_p": 0.5}
    with fa_sdpa.enable("always"):
        for _ in range(3):
            for _ in range(2):
                sdpa(*x, **options)
            with torch.no_grad():
                for _ in range(2):
                    sdpa(*x, **options)
                torch.use_deterministic_algorithms(True)
                try:
                    for _ in range(2):
                        sdpa(*x, **options)
                finally:
                    torch.use_deterministic_algorithms(False)
        sdpa(*x, **options)
    expected = {"grad": 7, "neither": 12, "deterministic": 6} if matter else {"dropout": 19}
    assert fa_sdpa.stats().eager.reasons == expected


_LONG = Crossover(0, "a test", (Rule("forward", (8, 8), False, ((1, 18),)), Rule("training", (8, 8), True, ((1, 20),))))


@pytest.mark.parametrize("policy", ["auto", "never", Policy("auto", _LONG)], ids=["auto", "never", "table"])
def test_calls_whose_query_alone_makes_them_torchs_are_decided_once(policy, monkeypatch):
    """As those of a model that generates text, which have one more key with every token."""
    decided = []
    monkeypatch.setattr(router, "decide", lambda *args, **how: (decided.append(args), decide(*args, **how))[1])
    q = torch.randn(1, 4, 17, 8)
    bias = torch.randn(17, 40)
    with fa_sdpa.enable(policy):
        for length in range(17, 40):
            k, v = torch.randn(1, 4, length, 8), torch.randn(1, 4, length, 8, requires_grad=length % 2 == 0)
            for _ in range(2):
                out, masked = sdpa(q, k, v), sdpa(q, k, v, bias[:, :length])
                out_causal, grouped = sdpa(q, k, v, is_causal=True), sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)
                scaled = sdpa(q, k, v, scale=0.5)
            with fa_sdpa.disable():
                assert torch.equal(out, sdpa(q, k, v)) and torch.equal(masked, sdpa(q, k, v, bias[:, :length]))
                assert torch.equal(out_causal, sdpa(q, k, v, is_causal=True))
                assert torch.equal(grouped, sdpa(q, k[:, :2], v[:, :2], enable_gqa=True))
                assert torch.equal(scaled, sdpa(q, k, v, scale=0.5))
        with pytest.raises(RuntimeError):
            sdpa(q, k.double(), v)
        code = {"auto": "not_measured", "never": "policy_never"}.get(policy, "below_crossover")
        assert len(decided) == 1 and fa_sdpa.stats().eager == (0, 231, {code: 231})
        for other in (
            q.double(),
            q[:, :, :16],
            q.clone().requires_grad_(),
            q.transpose(1, 2).contiguous().transpose(1, 2),
        ):
            sdpa(other, k.to(other.dtype), v.to(other.dtype))
        assert len(decided) == 5
        with fa_sdpa.enable("always"):
            sdpa(q, k, v)
        assert fa_sdpa.stats().routed == 1
        router._calls.forget()
        sdpa(q, k, v)
        assert fa_sdpa.stats().native == 236


@pytest.mark.parametrize("told", ["log", "record"])
def test_each_call_is_told_of_where_somebody_asks(told, monkeypatch, caplog):
    if told == "record":
        monkeypatch.setattr(router.record, "_calls", {})
    else:
        caplog.set_level("DEBUG", "fa_sdpa")
        monkeypatch.setattr(router, "_said", set())
    q, k, v = qkv(1, 4, 17, 8)
    with fa_sdpa.enable("auto"):
        for _ in range(2):
            for length in range(10, 17):
                sdpa(q, k[:, :, :length], v[:, :, :length])
    if told == "record":
        assert len(router.record._calls) == 7
    else:
        assert sum("1x4x17x8 1x4x" in message for message in caplog.messages) == 7


def test_a_query_that_is_long_enough_for_some_calls_is_not_all_there_is_to_ask_for():
    q, k, v = qkv(1, 4, 18, 8)
    with fa_sdpa.enable(Policy("auto", _LONG)):
        for _ in range(3):
            sdpa(q, k[:, :, :17], v[:, :, :17])
            sdpa(q, k, v)
            sdpa(q, k, v, is_causal=True)
        assert fa_sdpa.stats().eager[:2] == (3, 6)


def test_another_query_in_between_costs_no_decision(monkeypatch):
    calls = [qkv(1, 4, 17, 8), qkv(1, 2, 17, 8), qkv(1, 4, 17, 8, requires_grad=True)]
    with fa_sdpa.enable("auto"):
        for x in calls:
            sdpa(*x)
        monkeypatch.setattr(router, "decide_call", None)
        for i in (0, 1, 2, 2, 1, 0, 2, 0, 0, 1, 1, 2):
            sdpa(*calls[i])
        assert fa_sdpa.stats().eager == (0, 15, {"not_measured": 15})


def test_a_call_that_torch_serves_and_fa4_can_not_is_not_known_by_its_query():
    q, k, v = qkv(2, 4, 9, 8)
    with fa_sdpa.enable("always"):
        for _ in range(3):
            assert sdpa(q, k[:1], v).shape == q.shape  # torch broadcasts
        assert router._calls.latest.run is None
        sdpa(q, k, v)
        assert fa_sdpa.stats().eager.routed == 1


def test_calls_in_turns(through_op):
    """Of other shapes, options, and with other gradients: each is served by its own."""
    calls = [
        (qkv(1, 2, 9, 8), {}),
        (qkv(1, 2, 9, 8), {"is_causal": True}),
        (qkv(1, 2, 9, 8), {"scale": 0.5}),
        (qkv(2, 2, 5, 8), {}),
        (qkv(1, 2, 9, 8, requires_grad=True), {}),
        (qkv(1, 2, 9, 8, requires_grad=True), {"is_causal": True}),
    ]
    with fa_sdpa.enable("always"):
        for turn in range(4):
            for tensors, options in calls if turn % 2 else calls[::-1]:
                with fa_sdpa.disable():
                    native = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
                    expected = sdpa(*native, **options)
                out = sdpa(*tensors, **options)
                torch.testing.assert_close(out, expected)
                if out.requires_grad:
                    dout = torch.randn_like(out)
                    grads = torch.autograd.grad(out, tensors, dout)
                    torch.testing.assert_close(grads, torch.autograd.grad(expected, native, dout))
    assert len(through_op) == len(calls)


@pytest.fixture
def backward_through_op(monkeypatch):
    """The backward calls that are made through the op."""
    return counted_calls(monkeypatch, attention, "_bwd")


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
def test_backward_repeats(needs, backward_through_op):
    x = [torch.randn(2, 4, 17, 8, requires_grad=needed) for needed in needs]
    leaves = [t for t in x if t.requires_grad]
    expected = torch.autograd.grad(sdpa(*x).sum(), leaves)
    dense = torch.randn(2, 4, 17, 8)
    expected_dense = torch.autograd.grad(sdpa(*x), leaves, dense)
    with fa_sdpa.enable("always"):
        for _ in range(4):
            torch.testing.assert_close(torch.autograd.grad(sdpa(*x).sum(), leaves), expected)
            torch.testing.assert_close(torch.autograd.grad(sdpa(*x), leaves, dense), expected_dense)
    assert len(backward_through_op) <= 4  # of the first node, which the op made, and of those it serves after that


def test_what_a_backward_depends_on(backward_through_op):
    """Deterministic algorithms, hooks that replace what was saved, modes and profilers: looked at in every backward."""
    x = qkv(requires_grad=True)
    dout = torch.randn_like(x[0])
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def made_through_op(context=None):
        before = len(backward_through_op)
        out = sdpa(*x)
        with context or contextlib.nullcontext():
            grads = torch.autograd.grad(out, x, dout)
        torch.testing.assert_close(grads, expected)
        return len(backward_through_op) - before

    expected = torch.autograd.grad(sdpa(*x), x, dout)
    with fa_sdpa.enable("always"):
        for _ in range(3):
            repeated = made_through_op()
        assert repeated == 0
        assert made_through_op(See()) == 1 and "fa4.attention_bwd.default" in seen
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            made_through_op()
        assert {"fa4::attention_bwd", "fa4::attention_fwd"} <= {event.key for event in profile.key_averages()}
        torch.use_deterministic_algorithms(True)
        try:
            assert made_through_op() == 1
        finally:
            torch.use_deterministic_algorithms(False)
        assert made_through_op() == 0
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone().mT.contiguous().mT):
            out = sdpa(*x)
        with pytest.raises(RuntimeError, match="contiguous in its last dimension"):  # the op's word, not a wrong result
            torch.autograd.grad(out, x, dout)
        with torch.autograd.set_detect_anomaly(True), torch.autograd.graph.save_on_cpu():
            made_through_op()
        out = sdpa(*x)
        with torch.no_grad():
            x[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, x, dout)


def test_forgetting_reaches_every_call(through_op):
    x, y = qkv(), qkv(1, 2, 9, 8)
    with fa_sdpa.enable("always"):
        for turn in range(3):
            for _ in range(2):
                sdpa(*x)
                sdpa(*y)
            assert len(through_op) == 2 * (turn + 1)
            router._forget_decisions()


# ---- the launch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """launch.py takes this host's tensors for an H100's; the arguments of every launch."""
    calls: list[tuple] = []
    monkeypatch.setattr(Target, "of", lambda device: H100)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(launch.private, "current_device", lambda: -1)
    monkeypatch.setattr(
        launch.private, "empty_strided_cuda", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    )
    monkeypatch.setattr(launch, "_backward_plans", {})
    config = launch.sm90.backward_config(64, 64)
    backward = launch._BackwardPlan(lambda *arguments: calls.append(arguments), 132, config)
    monkeypatch.setattr(
        launch, "_make_backward_plan", lambda *wanted: launch._backward_plans.setdefault(wanted, backward)
    )
    plan = launch._Plan(lambda *arguments: calls.append(arguments), 0.25)
    monkeypatch.setattr(launch, "_make_plan", lambda *wanted: launch._plans.setdefault(wanted, plan))
    masked = launch._MaskedPlan(lambda *arguments: calls.append(arguments), None, 128, 64)
    monkeypatch.setattr(launch, "_masked_plan", lambda *wanted: masked)
    monkeypatch.setattr(launch, "_load_preparation", lambda key: prepare_nothing)
    monkeypatch.setattr(launch.masks.private, "current_stream", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.masks.forget()
    yield calls
    launch.masks.forget()


def prepare_nothing(*arguments):
    """A kernel. Its lists tell of biased blocks."""
    arguments[-3].fill_(1)


def test_a_prepared_backward_launches_what_deterministic_mode_asks_for(launched):
    q, k, v = (torch.randn(2, 4, 9, 64).to(torch.bfloat16) for _ in range(3))
    out, lse = launch.attention_fwd(q, k, v, None, Options())
    run = launch.prepared_bwd(out, q, k, v, out, lse, Options())
    for mode in (True, False):
        torch.use_deterministic_algorithms(mode)
        try:
            run(out, q, k, v, out, lse)
        finally:
            torch.use_deterministic_algorithms(False)
    sizes = [arguments[11].numel() for arguments in launched[1:]]  # of scratch memory
    assert sizes[0] > sizes[1] and [wanted[4][2] for wanted in launch._backward_plans] == [False, True]


def test_deterministic_gradients_are_allocated_without_a_fill(launched, monkeypatch):
    """Those that nothing has prepared, in the memory order of their inputs, an expanded one among them."""
    allocate, layouts = launch.private.empty_strided_cuda, []
    monkeypatch.setattr(
        launch.private, "empty_strided_cuda", lambda *layout: layouts.append(layout) or allocate(*layout)
    )
    q, k = (torch.randn(2, 9, 4, 64).to(torch.bfloat16).transpose(1, 2) for _ in range(2))
    v = torch.randn(2, 1, 9, 64).to(torch.bfloat16).expand(2, 4, 9, 64)
    out, lse = launch.attention_fwd(q, k, v, None, Options())
    expected = [launch._layout(x) for x in launch.attention_bwd(out, q, k, v, out, lse, Options())]
    assert not layouts
    torch.use_deterministic_algorithms(True)
    try:
        grads = launch.attention_bwd(out, q, k, v, out, lse, Options())
    finally:
        torch.use_deterministic_algorithms(False)
    assert layouts[:3] == [launch._layout(x) for x in grads] == expected and len(layouts) == 4


def metadata(x):
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("options", [Options(), Options(True, 0.5), Options(window_left=3, softcap=2.0)])
@pytest.mark.parametrize(
    ("heads", "heads_kv", "sq", "sk", "d", "dv"),
    [(4, 4, 9, 9, 64, 64), (6, 2, 1, 30, 64, 128), (6, 2, 1, 3000, 128, 128)],
)
def test_a_prepared_launch_is_that_of_the_op(options, heads, heads_kv, sq, sk, d, dv, launched):
    def make(n, s, size):
        return torch.randn(2, s, n, size, dtype=torch.bfloat16).transpose(1, 2)

    x = make(heads, sq, d), make(heads_kv, sk, d), make(heads_kv, sk, dv)
    expected = launch.attention_fwd(*x, None, options)
    results = launch.prepared_fwd(*x, options)(*x)
    assert list(map(metadata, results)) == list(map(metadata, expected))
    assert list(map(metadata, launched[0])) == list(map(metadata, launched[1]))
    assert [a.data_ptr() for a in launched[0][:3]] == [a.data_ptr() for a in launched[1][:3]]


@pytest.mark.parametrize("options", [Options(), Options(True, 0.5), Options(window_left=3, softcap=2.0)])
@pytest.mark.parametrize(
    ("heads", "heads_kv", "sq", "sk", "d", "dv"),
    [(4, 4, 9, 9, 64, 64), (6, 2, 1, 30, 64, 128), (6, 2, 700, 300, 64, 128)],  # the last one's groups are in parts
)
@pytest.mark.parametrize("expanded_dout", [False, True])
def test_a_prepared_backward_is_that_of_the_op(options, heads, heads_kv, sq, sk, d, dv, expanded_dout, launched):
    def make(n, s, size):
        return torch.randn(2, s, n, size, dtype=torch.bfloat16).transpose(1, 2)

    x = make(heads, sq, d), make(heads_kv, sk, d), make(heads_kv, sk, dv)
    out, lse = launch.attention_fwd(*x, None, options)
    dout = torch.ones((), dtype=torch.bfloat16).expand_as(out) if expanded_dout else torch.randn_like(out)
    launched.clear()
    expected = launch.attention_bwd(dout, *x, out, lse, options)
    results = launch.prepared_bwd(dout, *x, out, lse, options)(dout, *x, out, lse)
    assert list(map(metadata, results)) == list(map(metadata, expected))
    assert list(map(metadata, launched[0])) == list(map(metadata, launched[1]))
    assert [a.data_ptr() for a in launched[0][1:6]] == [a.data_ptr() for a in launched[1][1:6]]
    for arguments, grads in zip(launched, (expected, results), strict=True):
        assert [x.data_ptr() for x in arguments[6:9]] == [x.data_ptr() for x in grads]
        if sq < 700:  # the kernel writes dK and dV itself
            assert [x.data_ptr() for x in arguments[9:11]] == [x.data_ptr() for x in grads[1:]]
        else:
            assert all(x.shape[1] == heads for x in arguments[9:11])


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "sq", "sk", "sizes"),
    [(4, 4, 9, 16, (16,)), (4, 2, 9, 16, (2, 1, 1, 16)), (6, 2, 1, 30, (1, 6, 1, 30)), (6, 2, 300, 301, (300, 301))],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_a_prepared_launch_with_a_mask_is_that_of_the_op(
    dtype, heads, heads_kv, sq, sk, sizes, keeps, launched, monkeypatch
):
    """Biases of 30 and 301 keys are copied."""

    def make(n, s):
        return torch.randn(2, s, n, 64, dtype=torch.bfloat16).transpose(1, 2)

    x, mask, options = (make(heads, sq), make(heads_kv, sk), make(heads_kv, sk)), masks_of(dtype, *sizes), Options()
    mask = mask[None] if mask.dim() == 1 else mask
    kind = "bool" if dtype is torch.bool else "bf16"
    plan = launch._BackwardPlan(
        lambda *arguments: launched.append(arguments), 132, launch.sm90.backward_config(64, 64, False, kind), "a key"
    )
    monkeypatch.setattr(launch, "_make_backward_plan", lambda *wanted: plan)
    with launch.masks.in_eager_mode() if keeps else contextlib.nullcontext():
        out, lse = launch.attention_fwd(*x, None, options, mask)
        launch.attention_bwd(out, *x, out, lse, options, mask)
        forward = launch.prepared_fwd(*x, options, mask)
        backward = launch.prepared_bwd(out, *x, out, lse, options, mask)
    again, lse_again = forward(*x, mask)
    grads = backward(out, *x, again, lse_again, mask)
    assert [metadata(a) for a in (again, lse_again)] == [metadata(a) for a in (out, lse)]
    assert [metadata(a) for a in grads] == [metadata(a) for a in x]
    by_op, directly = launched[:2], launched[2:]
    for one, other in zip(by_op, directly, strict=True):
        assert list(map(metadata, one)) == list(map(metadata, other))
    assert (by_op[0][5].data_ptr() == directly[0][5].data_ptr()) == keeps  # lists
    if dtype is not torch.bool:
        bias = directly[0][7]
        rows = mask.expand(2, heads, sq, sk).unflatten(1, (heads_kv, -1)).squeeze(3) if sq == 1 else mask
        torch.testing.assert_close(bias, rows.expand(bias.shape), rtol=0, atol=0)


def test_a_mask_is_kept_where_other_tensors_are_copied(launched, monkeypatch):
    """What serves a repeated call hands on those that TMA cannot address, a dout that is expanded for one."""
    made, prepare = [], launch.masks._prepare
    monkeypatch.setattr(launch.masks, "_prepare", lambda *args: made.append(args[1].heads_kv) or prepare(*args))
    plan = launch._BackwardPlan(
        lambda *arguments: None, 132, launch.sm90.backward_config(64, 64, False, "bool"), "a key"
    )
    monkeypatch.setattr(launch, "_make_backward_plan", lambda *wanted: plan)
    q, k, v = qkv(2, 4, 16, 64, dtype=torch.bfloat16)
    shifted, mask = torch.randn(q.numel() + 1, dtype=torch.bfloat16)[1:].view(q.shape), masks_of(torch.bool, 16, 16)
    with launch.masks.in_eager_mode():
        forward = launch.prepared_fwd(q, k, v, Options(), mask)
        out, lse = forward(q, k, v, mask)
        dout = torch.ones((), dtype=torch.bfloat16).expand_as(out)
        backward = launch.prepared_bwd(dout, q, k, v, out, lse, Options(), mask)
    for _ in range(2):
        forward(shifted, k, v, mask)
        backward(dout, q, k, v, out, lse, mask)
    assert made == [None, 4]


@pytest.mark.parametrize("hides_only", [False, True])
@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 64), (torch.float32, 128), (torch.bfloat16, 128)], ids=str)
def test_a_backward_takes_a_mask_that_adds_nothing_as_boolean(dtype, d, hides_only, launched, monkeypatch):
    """As soon as that is known, where a boolean one has larger tiles; directly and by the op. Until it changes."""
    monkeypatch.setattr(
        launch, "_load_preparation", lambda key: lambda *arguments: arguments[-3].fill_(0 if hides_only else 1)
    )
    kinds = []

    def plan(dtype, d, dv, is_causal, flags, kind, device):
        config = launch.sm90.backward_config(d, dv, flags[1], kind)
        return launch._BackwardPlan(lambda *arguments: kinds.append(kind), 132, config, "a key")

    monkeypatch.setattr(launch, "_make_backward_plan", plan)
    x, own = qkv(2, 4, 96, d, dtype=torch.bfloat16), "fp32" if dtype is torch.float32 else "bf16"
    mask = torch.zeros(96, 96, dtype=dtype).masked_fill(torch.ones(96, 96).triu(1).bool(), float("-inf"))
    later = "bool" if hides_only and (d, own) != (128, "bf16") else own
    out, lse = launch.attention_fwd(*x, None, Options(), mask)
    launch.attention_bwd(out, *x, out, lse, Options(), mask)  # from a compiled graph, say: nothing is kept
    for repeat in range(2):
        with launch.masks.in_eager_mode():
            for _ in range(3):
                launch.attention_bwd(out, *x, out, lse, Options(), mask)
            backward = launch.prepared_bwd(out, *x, out, lse, Options(), mask)
        for _ in range(2):
            grads = backward(out, *x, out, lse, mask)
        assert [metadata(a) for a in grads] == [metadata(a) for a in x]
        assert kinds == [own] * (2 - repeat) + [later] * 4
        kinds.clear()
        mask[0, 0] = 0.0


def test_a_prepared_launch_looks_at_addresses_and_the_device(launched, monkeypatch):
    q, k, v = qkv(1, 2, 9, 64, dtype=torch.bfloat16)
    forward = launch.prepared_fwd(q, k, v, Options())
    out, lse = forward(q, k, v)
    backward = launch.prepared_bwd(out, q, k, v, out, lse, Options())
    launched.clear()
    shifted = torch.randn(q.numel() + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    forward(shifted, k, v)
    backward(shifted, q, k, v, out, lse)
    for arguments in launched:  # copied to where TMA can read it
        assert arguments[0].data_ptr() % 16 == 0 and torch.equal(arguments[0], shifted)
    elsewhere: list[int] = []
    monkeypatch.setattr(launch.private, "current_device", lambda: 7)
    monkeypatch.setattr(launch, "_run_on", lambda device, run, arguments: elsewhere.append(device))
    for prepare, given in ((launch.prepared_fwd, (q, k, v)), (launch.prepared_bwd, (out, q, k, v, out, lse))):
        prepare(*given, Options())(*given)  # on another device than the current one
    assert elsewhere == [-1, -1]


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_host_time_as_a_ratio(monkeypatch, one_thread):
    """Calls that are left to torch, and calls that are routed to kernels that only allocate, beside torch's own call on
    tensors too small to matter. They read 1.4, 0.7, 0.5, 1.2 and 0.9; a busy machine gets three tries."""
    q, k, v = qkv(1, 1, 16, 64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    mask = torch.ones(16, 16, dtype=torch.bool)
    limits = {"left to torch": 1.7, "routed": 0.9, "routed, attn_mask": 0.8}
    limits |= {"routed, gradients recorded": 1.5, "backward": 1.1}

    def fastest(call, rounds=15):
        return min(timeit.repeat(call, number=200, repeat=rounds))

    def forward(*mask):
        with torch.no_grad():
            return fastest(lambda: sdpa(q, k, v, *mask))

    def backward():
        sdpa(*leaves)
        out = sdpa(*leaves)
        return fastest(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))

    monkeypatch.setattr(
        attention, "_direct_fwd", lambda *a: lambda q, *others: (torch.empty_like(q), torch.empty(1, 1, 16))
    )
    monkeypatch.setattr(
        attention, "_direct_bwd", lambda *a: lambda dout, q, k, v, out, lse: tuple(map(torch.empty_like, (q, k, v)))
    )
    for _ in range(3):
        plain, plain_mask = forward(), forward(mask)
        plain_grad, plain_backward = fastest(lambda: sdpa(*leaves)), backward()
        with fa_sdpa.enable("auto"):
            read = {"left to torch": forward() / plain}
        with fa_sdpa.enable("always"):
            read["routed"] = forward() / plain
            read["routed, attn_mask"] = forward(mask) / plain_mask
            read["routed, gradients recorded"] = fastest(lambda: sdpa(*leaves)) / plain_grad
            read["backward"] = backward() / plain_backward
        if all(read[name] <= limit for name, limit in limits.items()):
            return
    pytest.fail(f"of torch's time: {read}; limits: {limits}")
