"""The router in eager mode: what is caught, what is left to torch and why, and that torch comes back as it was."""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import fa_sdpa
from fa_sdpa import _torch_private as private
from fa_sdpa import router, switch
from fa_sdpa.meta.crossover import Crossover, Rule
from fa_sdpa.meta.spec import Decision, Reason
from fa_sdpa.policy import Policy

ROOT = os.path.dirname(os.path.dirname(fa_sdpa.__file__))
builtin_before = torch._C._nn.scaled_dot_product_attention


def qkv(*shape, dtype=torch.float32, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 17, 8)), dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def routed_calls():
    return fa_sdpa.stats().eager.routed


def reasons():
    return set(fa_sdpa.stats().eager.reasons)


def same(a, b):
    """Equal up to the rounding of two right implementations."""
    loose = a.dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(a, b, **({"rtol": 2e-2, "atol": 1e-2} if loose else {}))


# ---- caught ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda *x: F.scaled_dot_product_attention(*x),
        lambda *x: imported_before(*x),
        lambda *x: builtin_before(*x),
        lambda *x: torch._C._nn.scaled_dot_product_attention(*x),
        lambda *x: torch.ops.aten.scaled_dot_product_attention(*x),
        lambda *x: torch.jit.script(scripted)(*x),
    ],
    ids=["F", "imported before", "builtin before", "torch._C._nn", "torch.ops.aten", "jit.script"],
)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_caught(call, mode):
    with mode():
        x = qkv()
        expected = call(*x)
        with fa_sdpa.enable("always"):
            out = call(*x)
        assert routed_calls() == 1
        same(out, expected)


def scripted(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.0}, {"scale": 0.3}, {"enable_gqa": True}])
def test_training(options):
    heads_kv = 2 if "enable_gqa" in options else 4
    native = [torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 19), (heads_kv, 17), (heads_kv, 17))]
    ours = copy.deepcopy(native)
    expected = F.scaled_dot_product_attention(*native, **options)
    with fa_sdpa.enable("always"):
        out = F.scaled_dot_product_attention(*ours, **options)
    assert "Attention" in type(out.grad_fn).__name__ and "ScaledDot" not in type(out.grad_fn).__name__
    same(out, expected)
    dout = torch.randn_like(out)
    out.backward(dout)  # after the block was left
    expected.backward(dout)
    for a, b in zip(ours, native, strict=True):
        same(a.grad, b.grad)


def test_parameters_are_plain_tensors():
    x = [nn.Parameter(t) for t in qkv()]
    with fa_sdpa.enable("always"):
        F.scaled_dot_product_attention(*x)
    assert routed_calls() == 1


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float16)])
def test_autocast_casts_as_torch_does(dtypes):
    x = [t.to(dtype).requires_grad_() for t, dtype in zip(qkv(), dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*x)
        with fa_sdpa.enable("always"):
            assert fa_sdpa.explain(*x).routed
            out = F.scaled_dot_product_attention(*x)
    assert routed_calls() == 1
    assert out.dtype == expected.dtype == torch.bfloat16
    same(out, expected)


def test_autocast_leaves_fp64_alone():
    with torch.autocast("cpu", torch.bfloat16), fa_sdpa.enable("always"):
        assert F.scaled_dot_product_attention(*qkv(dtype=torch.float64)).dtype == torch.float64
    assert routed_calls() == 1


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training):
    module = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = torch.randn(2, 9, 16, requires_grad=True)
    expected = module(x, x, x, need_weights=False)[0]
    with fa_sdpa.enable("always"):
        out = module(x, x, x, need_weights=False)[0]
    assert routed_calls() == 1
    same(out, expected)


def test_causal_bias():
    """A mask that is a Tensor subclass: torch itself turns the upper-left one into is_causal."""
    from torch.nn.attention.bias import causal_upper_left

    q, k, v = qkv()
    bias = causal_upper_left(17, 17)
    expected = F.scaled_dot_product_attention(q, k, v, bias)
    with fa_sdpa.enable("always"):
        same(F.scaled_dot_product_attention(q, k, v, bias), expected)
    assert routed_calls() == 1


def test_transformer_encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    with fa_sdpa.enable("always"):
        out = layer(x)
    assert routed_calls() == 1
    same(out, expected)


# ---- left to torch ---------------------------------------------------------------------------------------------------


def left(code, call=F.scaled_dot_product_attention, *args, **kwargs):
    """Run a call with routing on and check that torch ran it, for this reason."""
    args = args or qkv()
    torch.manual_seed(1)
    expected = call(*args, **kwargs)
    torch.manual_seed(1)
    with fa_sdpa.enable("always"):
        out = call(*args, **kwargs)
    assert routed_calls() == 0
    assert code in reasons()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_dropout():
    left("dropout", dropout_p=0.5)


def test_sdpa_kernel():
    with sdpa_kernel([SDPBackend.MATH]):
        left("sdp_backends")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        left("sdp_backends")


@pytest.mark.parametrize("name", ["flash", "mem_efficient", "math", "cudnn"])
def test_enable_sdp_narrowed(name):
    switch_backend = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch_backend(False)
    try:
        left("sdp_backends")
        assert name in str(fa_sdpa.explain(*qkv())) or not fa_sdpa.is_enabled()
    finally:
        switch_backend(True)


def test_func_grad():
    left("transform", torch.func.grad(lambda *x: F.scaled_dot_product_attention(*x).sum()))


def test_func_vmap():
    """vmap decomposes SDPA in C++ and never reaches the router."""
    x = qkv(3, 2, 4, 17, 8)
    expected = torch.func.vmap(F.scaled_dot_product_attention)(*x)
    with fa_sdpa.enable("always"):
        out = torch.func.vmap(F.scaled_dot_product_attention)(*x)
    assert routed_calls() == 0
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_forward_ad():
    def jvp(q, k, v):
        with sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            return torch.autograd.forward_ad.unpack_dual(F.scaled_dot_product_attention(dual, k, v)).tangent

    left("forward_ad", jvp)


def test_nested():
    x = torch.nested.nested_tensor([torch.randn(4, 17, 8), torch.randn(4, 9, 8)], layout=torch.strided)
    left("nested", lambda x: F.scaled_dot_product_attention(x, x, x).to_padded_tensor(0.0), x)


class Sub(torch.Tensor):
    pass


def test_subclass():
    left("tensor_subclass", F.scaled_dot_product_attention, *(x.as_subclass(Sub) for x in qkv()))


def test_dtensor():
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def attend(*x):
        with sdpa_kernel(SDPBackend.MATH):  # torch 2.11 has no sharding strategy for its CPU flash op
            return F.scaled_dot_product_attention(*x).to_local()

    try:
        mesh = DeviceMesh("cpu", [0])
        left("tensor_subclass", attend, *(distribute_tensor(t, mesh, [Replicate()]) for t in qkv()))
    finally:
        dist.destroy_process_group()


def test_jit_trace():
    x = qkv()
    with fa_sdpa.enable("always"):
        traced = torch.jit.trace(scripted, x)
    assert "aten::scaled_dot_product_attention" in str(traced.graph) and "fa4" not in str(traced.graph)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = qkv()
    expected = make_fx(scripted, tracing_mode=tracing_mode)(*x).code
    with fa_sdpa.enable("always"):
        assert make_fx(scripted, tracing_mode=tracing_mode)(*x).code == expected
    assert routed_calls() == 0 and "tracing" in reasons()


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    x = tuple(qkv())
    expected = torch.export.export(Model(), x, strict=strict)
    with fa_sdpa.enable("always"):
        exported = torch.export.export(Model(), x, strict=strict)
    assert exported.graph_module.code == expected.graph_module.code
    assert fa_sdpa.stats().routed == 0 and "tracing" in fa_sdpa.stats().reasons


def test_unsupported_device():
    x = [t.to("meta") for t in qkv()]
    with fa_sdpa.enable("always"):
        assert F.scaled_dot_product_attention(*x).device.type == "meta"
    assert reasons() == {"no_kernel_family"}


def test_three_dimensions():
    left("not_4d", F.scaled_dot_product_attention, *qkv(4, 17, 8))
    left("not_4d", F.scaled_dot_product_attention, *qkv(2, 2, 4, 17, 8))


def test_broadcast_batch():
    q, k, v = qkv()
    left("shapes", F.scaled_dot_product_attention, q, k[:1], v[:1])


def test_empty():
    q, k, v = qkv()
    left("empty", F.scaled_dot_product_attention, q[:, :, :0], k, v)


def test_strided_last_dim():
    q, k, v = qkv(2, 4, 8, 17)
    left("strides", F.scaled_dot_product_attention, *(x.transpose(2, 3) for x in (q, k, v)))


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_other_layouts(convert):
    x = [convert(t) for t in qkv()]
    with fa_sdpa.enable("always"):
        assert "layout" in {reason.code for reason in fa_sdpa.explain(*x).reasons}


@pytest.mark.parametrize("field, code", [("needs_grad", "no_gradient"), ("deterministic", "nondeterministic")])
def test_what_a_kernel_lacks(monkeypatch, field, code):
    """Kernels refuse gradients and deterministic algorithms through the spec; no CPU kernel does."""

    def decide(spec, target, policy, **how):
        return Decision("native", (Reason(code, "no such kernel"),)) if getattr(spec, field) else routed

    routed = Decision("fa4", (Reason("policy_always", "it can"),))
    monkeypatch.setattr(router, "decide", decide)
    router._forget_decisions()
    q, k, v = qkv(requires_grad=True)
    torch.use_deterministic_algorithms(field == "deterministic")
    try:
        left(code, F.scaled_dot_product_attention, q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    with fa_sdpa.enable("always"), torch.no_grad():
        F.scaled_dot_product_attention(q, k, v)
    assert routed_calls() == 1
    router._forget_decisions()


def test_policies():
    for policy, code in (("never", "policy_never"), ("auto", "not_measured")):
        with fa_sdpa.enable(policy):
            F.scaled_dot_product_attention(*qkv())
        assert fa_sdpa.stats().eager == (0, 1, {code: 1})
        fa_sdpa.reset_stats()


def test_every_reason_is_given():
    q, k, v = qkv(17, 8)
    with fa_sdpa.enable("always"), sdpa_kernel(SDPBackend.MATH):
        codes = {r.code for r in fa_sdpa.explain(q, k.double(), v, dropout_p=0.5).reasons}
        assert codes == {"sdp_backends", "dtypes", "not_4d"}
        codes = {r.code for r in fa_sdpa.explain(*qkv(), torch.randn(17, 17).double(), dropout_p=0.5).reasons}
        assert codes == {"sdp_backends", "dropout", "attn_mask"}


def with_key(*shape, dtype=torch.float32, device="cpu"):
    query, _, _ = qkv()
    return query, torch.randn(*shape, device=device).to(dtype), torch.randn(*shape, device=device).to(dtype)


BAD = {  # what torch says depends on its release; a few of these it even computes
    "head dims": lambda: (with_key(2, 4, 17, 16), {}),
    "heads": lambda: (with_key(2, 3, 17, 8), {}),
    "heads with enable_gqa": lambda: (with_key(2, 3, 17, 8), {"enable_gqa": True}),
    "seqlens": lambda: (with_key(2, 4, 16, 8)[:2] + with_key(2, 4, 15, 8)[2:], {}),
    "batches": lambda: (with_key(3, 4, 17, 8), {}),
    "dtypes": lambda: (with_key(2, 4, 17, 8, dtype=torch.float64), {}),
    "devices": lambda: (with_key(2, 4, 17, 8, device="meta"), {}),
    "integers": lambda: ((torch.ones(2, 4, 17, 8, dtype=torch.int32),) * 3, {}),
    "dimensions": lambda: (qkv(8), {}),
    "mask and is_causal": lambda: (qkv(), {"attn_mask": torch.ones(17, 17).bool(), "is_causal": True}),
    "mask's shape": lambda: (qkv(), {"attn_mask": torch.ones(16, 17).bool()}),
    "dropout": lambda: (qkv(), {"dropout_p": -0.5}),
    "sparse": lambda: ([t.to_sparse() for t in qkv()], {}),
    "no tensors": lambda: ((1, 2, 3), {}),
    "argument": lambda: (qkv(), {"causal": True}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_torchs_own_answer(case):
    def answer():
        args, kwargs = BAD[case]()
        try:
            F.scaled_dot_product_attention(*args, **kwargs)
        except Exception as error:
            return type(error), str(error)

    expected = answer()
    with fa_sdpa.enable("always"):
        assert answer() == expected
    assert routed_calls() == 0


def test_most_bad_input_is_an_error():
    args, kwargs = BAD["head dims"]()
    with fa_sdpa.enable("always"), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*args, **kwargs)


# ---- on and off ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """The process has no other thread, as far as the router knows: tqdm and Inductor leave some behind."""
    monkeypatch.setattr(switch, "_alone", lambda: True)


def torch_state():
    """What the router changes in torch while it is on."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
    from torch.utils import checkpoint

    return (
        torch._C._dispatch_dump(private.OP),
        torch._C._dispatch_dump_table(private.OP),
        dict(TorchInGraphFunctionVariable._get_handlers()),
        dict(checkpoint.CheckpointFunction.__dict__),
        dict(checkpoint._CheckpointFrame.__dict__),
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
    )


def test_disable_restores_torch():
    before = torch_state()
    fa_sdpa.enable()
    during = torch_state()
    assert all(a != b for a, b in zip(before[:5], during[:5], strict=True))
    assert before[5:] == during[5:]
    fa_sdpa.disable()
    assert torch_state() == before


def test_a_block_restores_all_but_dynamos_handlers(alone):
    before = torch_state()
    with fa_sdpa.enable():
        pass
    after = torch_state()
    assert after[:2] + after[3:] == before[:2] + before[3:]
    assert after[2] != before[2]
    fa_sdpa.disable()
    assert torch_state() == before


def test_call_sets_and_disable_unsets():
    assert not fa_sdpa.is_enabled()
    fa_sdpa.enable("always")
    fa_sdpa.enable("always")
    assert fa_sdpa.is_enabled()
    F.scaled_dot_product_attention(*qkv())
    assert routed_calls() == 1
    fa_sdpa.disable()
    assert not fa_sdpa.is_enabled()
    F.scaled_dot_product_attention(*qkv())
    assert routed_calls() == 1


def test_nested_blocks():
    seen = []

    def look():
        F.scaled_dot_product_attention(*qkv())
        seen.append(fa_sdpa.explain(*qkv()).reasons[0].code)

    look()
    with fa_sdpa.enable("always"):
        look()
        with fa_sdpa.disable():
            look()
            with fa_sdpa.enable("never"):
                look()
            look()
        look()
    look()
    assert seen == ["off", "policy_always", "off", "policy_never", "off", "policy_always", "off"]
    assert fa_sdpa.stats().eager == (2, 1, {"policy_always": 2, "policy_never": 1})


def test_one_block_entered_twice():
    block = fa_sdpa.enable("always")
    with block, block:
        pass
    assert not fa_sdpa.is_enabled()


def test_block_left_by_an_exception(alone):
    before = torch_state()
    with pytest.raises(ZeroDivisionError), fa_sdpa.enable("always"):
        F.scaled_dot_product_attention(*qkv())
        raise ZeroDivisionError
    assert not fa_sdpa.is_enabled()
    assert torch_state()[:2] == before[:2]
    fa_sdpa.disable()
    assert torch_state() == before


def test_block_inside_an_enabled_process():
    fa_sdpa.enable("always")
    with fa_sdpa.disable():
        F.scaled_dot_product_attention(*qkv())
    assert routed_calls() == 0
    F.scaled_dot_product_attention(*qkv())
    assert routed_calls() == 1


def test_exit_stack():
    with contextlib.ExitStack() as stack:
        stack.enter_context(fa_sdpa.enable("always"))
        assert switch.process.token == switch.OFF  # a block like any other
        assert fa_sdpa.is_enabled()
    assert not fa_sdpa.is_enabled()


def test_a_with_statement_never_sets_the_process(monkeypatch):
    """Not even for the moment between the making of the block and its entering: other threads would see it."""
    calls = []
    monkeypatch.setattr(switch._Installation, "set_process", lambda *args: calls.append(args))
    with fa_sdpa.enable("always"):
        pass
    with fa_sdpa.enable(policy="always") as _, fa_sdpa.disable():
        pass
    with (
        fa_sdpa.enable(
            "always",
        ),
    ):
        pass
    assert calls == []
    fa_sdpa.enable("always")
    assert len(calls) == 1


def test_bad_policy():
    with pytest.raises(ValueError, match="sometimes"):
        fa_sdpa.enable("sometimes")
    assert not fa_sdpa.is_enabled()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("forward, backward", [("on", "off"), ("off", "on"), ("off", "process"), ("process", "off")])
def test_checkpoint_recomputes_as_its_forward_ran(alone, reentrant, forward, backward):
    def state(name):
        if name == "process":
            return contextlib.ExitStack()
        return fa_sdpa.enable("always") if name == "on" else contextlib.nullcontext()

    def attend(*x):
        ran.append(fa_sdpa.is_enabled())
        return F.scaled_dot_product_attention(*x) * 2

    ran = []
    x = qkv(requires_grad=True)
    if forward == "process":
        fa_sdpa.enable("always")
    with state(forward):
        out = checkpoint(attend, *x, use_reentrant=reentrant)
    fa_sdpa.disable()
    before = torch_state()
    if backward == "process":
        fa_sdpa.enable("always")
    with state(backward):
        out.sum().backward()
    fa_sdpa.disable() if backward != "off" else None
    assert torch_state() == before
    assert ran == [forward != "off"] * 2
    assert routed_calls() == (2 if forward != "off" else 0)


def test_selective_checkpoint_names_our_op():
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    keep = [torch.ops.fa4.attention_fwd.default]
    x = qkv(requires_grad=True)
    with fa_sdpa.enable("always"):
        out = checkpoint(
            lambda *x: F.scaled_dot_product_attention(*x) * 2,
            *x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep),
        )
    out.sum().backward()
    assert x[0].grad is not None


def test_double_backward_raises():
    x = qkv(requires_grad=True)
    with fa_sdpa.enable("always"):
        out = F.scaled_dot_product_attention(*x)
    (grad,) = torch.autograd.grad(out.sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_a_torch_that_has_moved_is_refused(monkeypatch):
    before = torch_state()
    monkeypatch.setitem(private._PARTS, "torch._C._no_such_part", "a test")
    with pytest.raises(RuntimeError, match=r"_no_such_part \(a test\).*tested on torch 2.11"):
        fa_sdpa.enable()
    assert not fa_sdpa.is_enabled()
    with pytest.raises(RuntimeError, match="_no_such_part"), fa_sdpa.enable():
        pass
    assert not fa_sdpa.is_enabled()
    assert torch_state() == before


def test_import_survives_a_torch_that_has_moved():
    """Deletes parts before the import: that works, and enabling names them."""
    run = python(
        "import torch; del torch._C._functorch.peek_interpreter_stack, torch.library.get_kernel\n"
        "del torch._C._dynamo.eval_frame.set_code_exec_strategy, torch._guards._TLS\n"
        "import fa_sdpa; print(fa_sdpa.is_enabled())\n"
        "try:\n    fa_sdpa.enable()\nexcept RuntimeError as error:\n    print(error)"
    )
    assert run.stdout.startswith("False\n")
    for part in ("peek_interpreter_stack", "get_kernel", "set_code_exec_strategy", "_TLS"):
        assert part in run.stdout


def test_a_newer_torch_gets_a_warning(monkeypatch):
    monkeypatch.setattr(private, "TESTED", ("1.13", "2.0"))
    with pytest.warns(UserWarning, match="tested on torch 1.13, 2.0, not on"):
        fa_sdpa.enable()
    assert fa_sdpa.is_enabled()


def test_anothers_override_is_kept_below_ours():
    lib = torch.library.Library("aten", "IMPL")
    lib.impl("scaled_dot_product_attention", lambda q, k, v, *args, **kwargs: q + 1, "CompositeImplicitAutograd")
    try:
        q, k, v = qkv()
        with fa_sdpa.enable("never"):
            same(F.scaled_dot_product_attention(q, k, v), q + 1)
        same(F.scaled_dot_product_attention(q, k, v), q + 1)
    finally:
        lib._destroy()


def test_conflicts(monkeypatch):
    from torch.nn.attention import _registry

    assert fa_sdpa.conflicts() == ()
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("FA3", None))
    (reason,) = fa_sdpa.conflicts()
    assert reason.code == "other_flash_impl" and "FA3" in reason.text
    with fa_sdpa.enable("always"):
        decision = fa_sdpa.explain(*qkv())
    assert decision.routed and reason in decision.reasons


# ---- voice -----------------------------------------------------------------------------------------------------------


def test_stats_are_counted_and_reset():
    with fa_sdpa.enable("always"):
        for _ in range(3):
            F.scaled_dot_product_attention(*qkv())
        F.scaled_dot_product_attention(*qkv(), dropout_p=0.5)
    stats = fa_sdpa.stats()
    assert stats.eager == (3, 1, {"policy_always": 3, "dropout": 1})
    assert stats.compiled == (0, 0, {})
    assert (stats.routed, stats.native, stats.reasons) == (3, 1, stats.eager.reasons)
    fa_sdpa.reset_stats()
    assert fa_sdpa.stats().eager == (0, 0, {})
    with fa_sdpa.enable("always"):
        F.scaled_dot_product_attention(*qkv())
    assert fa_sdpa.stats().eager == (1, 0, {"policy_always": 1})


def test_explain_runs_nothing():
    x = qkv()
    with fa_sdpa.enable("always"):
        assert fa_sdpa.explain(*x, is_causal=True).routed
    assert fa_sdpa.stats().eager == (0, 0, {})


def python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, *sys.path]), **environment}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


CALL = """
import torch
import torch.nn.functional as F
x = [torch.randn(2, 4, 17, 8) for _ in range(3)]
for _ in range(3):
    F.scaled_dot_product_attention(*x)
F.scaled_dot_product_attention(*x, is_causal=True)
"""


def test_torch_logs():
    run = python("import torch, fa_sdpa; fa_sdpa.enable('always')\n" + CALL, TORCH_LOGS="+fa_sdpa")
    lines = [line for line in run.stderr.splitlines() if "policy_always" in line]
    assert len(lines) == 2 and "is_causal" in lines[1] and "2x4x17x8" in lines[0]
    assert "policy_always" not in python("import fa_sdpa; fa_sdpa.enable('always')\n" + CALL).stderr


@pytest.mark.parametrize(
    "value, token", [("1", "auto"), ("auto", "auto"), ("always", "always"), ("never", "never"), ("0", None), ("", None)]
)
def test_environment(value, token):
    out = python("import fa_sdpa; from fa_sdpa.state import current_token; print(current_token())", FA_SDPA=value)
    assert f"'{token}'" in out.stdout if token else out.stdout == "off\n"
    assert "Warning" not in out.stderr


def test_bad_environment_warns():
    run = python("import fa_sdpa; print(fa_sdpa.is_enabled())", FA_SDPA="sometimes")
    assert run.stdout == "False\n" and "FA_SDPA='sometimes' has no effect" in run.stderr


def test_explain_asks_for_details_and_calls_do_not(monkeypatch):
    """Those take longer than all the rest of a decision."""
    asked, decide = [], router.decide
    monkeypatch.setattr(router, "decide", lambda *given, **how: asked.append(how["detail"]) or decide(*given, **how))
    q = torch.randn(1, 2, 21, 8)
    with fa_sdpa.enable("auto"):
        F.scaled_dot_product_attention(q, q, q)
        assert asked and not any(asked)
        fa_sdpa.explain(q, q, q)
    assert asked[-1]


@pytest.mark.parametrize(("shortest", "times"), [(None, 1), (24, 2), (1, 1)])
def test_a_call_that_was_never_seen_is_decided_once(shortest, times, monkeypatch):
    """But one that is too short in eager mode twice: once more for CUDA graphs."""
    asked, decide = [], router.decide
    monkeypatch.setattr(router, "decide", lambda *given, **how: asked.append(given[0]) or decide(*given, **how))
    q, k = torch.randn(1, 2, 23, 8), torch.randn(1, 2, 23, 8)
    rules = (Rule("forward", (8, 8), False, ((1, shortest),)),) if shortest else ()
    other = Rule("forward", (8, 8), True, ((1, 1),))  # one that a query of this length reaches
    fa_sdpa.reset_stats()
    with fa_sdpa.enable(Policy("auto", Crossover(0, "a test", (*rules, other)))), torch.no_grad():
        for _ in range(4):
            F.scaled_dot_product_attention(q, k, k)
            assert len(asked) == times
    assert fa_sdpa.stats().routed == (4 if shortest == 1 else 0)
