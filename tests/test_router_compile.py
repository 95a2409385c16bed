"""The router under torch.compile: what the graph holds, that nothing goes stale, blocks inside compiled code."""

import threading

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fa_sdpa
from fa_sdpa.meta.crossover import Crossover, Rule
from fa_sdpa.policy import Policy


class Graphs(CompileCounterWithBackend):
    """A backend that keeps Dynamo's graphs and says where each one's attention goes."""

    def __init__(self, backend="eager"):
        super().__init__(backend)

    @property
    def attention(self):
        def words(graph):
            for node in graph.graph.nodes:
                if node.op == "call_function" and "fa4.attention_fwd" in str(node.target):
                    yield "fa4"
                elif node.op == "call_function" and "scaled_dot_product" in str(node.target):
                    yield "torch"

        return [" ".join(words(graph)) for graph in self.graphs]


def qkv(*shape, dtype=torch.float32, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 17, 8)), dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def above(seqlen):
    """A policy that routes CPU calls from this length on."""
    rules = [
        Rule(direction, (1, 256), causal, ((1, seqlen),))
        for direction in ("forward", "training")
        for causal in (True, False)
    ]
    return Policy("auto", Crossover(0, "a test", tuple(rules)))


# ---- what the graph holds --------------------------------------------------------------------------------------------


class TestGraphs(expecttest.TestCase):
    def graph(self, policy):
        graphs = Graphs()
        with fa_sdpa.enable(policy):
            torch.compile(attend, backend=graphs, fullgraph=True)(*qkv())
        (graph,) = graphs.graphs
        calls = [node for node in graph.graph.nodes if node.op != "placeholder"]
        return "\n".join(f"{node.name} = {node.target}, {node.args}, {node.kwargs}" for node in calls)

    def test_routed(self):
        self.assertExpectedInline(
            self.graph("always"),
            """\
attention_fwd = fa4.attention_fwd, (l_q_, l_k_, l_v_), {'is_causal': True, 'scale': None, 'version': 1}
getitem = <built-in function getitem>, (attention_fwd, 0), {}
output = output, ((getitem,),), {}""",
        )

    def test_left_to_torch(self):
        self.assertExpectedInline(
            self.graph("never"),
            """\
scaled_dot_product_attention = <built-in function scaled_dot_product_attention>, (l_q_, l_k_, l_v_), {'is_causal': True}
output = output, ((scaled_dot_product_attention,),), {}""",
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.0}, {"enable_gqa": True}])
def test_forward_and_backward(backend, options):
    heads_kv = 2 if "enable_gqa" in options else 4

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q.sin(), k, v, **options)

    x = [torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 19), (heads_kv, 17), (heads_kv, 17))]
    dout = torch.randn(2, 4, 19, 8)
    expected = torch.autograd.grad(attend(*x), x, dout)
    graphs = Graphs(backend)
    with fa_sdpa.enable("always"):
        out = torch.compile(attend, backend=graphs, fullgraph=True)(*x)
    grads = torch.autograd.grad(out, x, dout)  # after the block was left
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, attend(*x))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    graphs = Graphs("aot_eager")
    with mode():
        x = qkv()
        with fa_sdpa.enable("always"):
            out = torch.compile(attend, backend=graphs, fullgraph=True)(*x)
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, attend(*x))


def test_grad_mode_inside_the_graph():
    def both(q, k, v):
        with torch.no_grad():
            out = attend(q, k, v)
        return out + attend(q, k, v)

    forward_only = Policy("auto", Crossover(0, "a test", (Rule("forward", (1, 256), True, ((1, 1),)),)))
    graphs = Graphs("aot_eager")
    with fa_sdpa.enable(forward_only):
        torch.compile(both, backend=graphs, fullgraph=True)(*qkv(requires_grad=True))
    assert graphs.attention == ["fa4 torch"]


def test_reduce_overhead():
    x = qkv()
    with fa_sdpa.enable("always"):
        compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
        outs = [compiled(*x).clone() for _ in range(3)]
    assert fa_sdpa.stats().compiled.routed == 1
    for out in outs:
        torch.testing.assert_close(out, attend(*x))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float16)])
def test_autocast(inside, dtypes):
    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            return F.scaled_dot_product_attention(q, k, v)

    graphs = Graphs("aot_eager")
    x = [t.to(dtype) for t, dtype in zip(qkv(), dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        with fa_sdpa.enable("always"):
            eager = attend(*x)
            out = torch.compile(attend, backend=graphs, fullgraph=True)(*x)
    assert graphs.attention == ["fa4"]
    assert out.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(out, eager, rtol=0, atol=0)


def test_multihead_attention():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 9, 16)
    graphs = Graphs("aot_eager")
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend=graphs, fullgraph=True)
    with fa_sdpa.enable("always"):
        out = compiled(x)
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])
    compiled(x)
    assert graphs.attention == ["fa4", ""]  # opaque to Dynamo, as in plain torch


def test_multihead_attention_with_masks():
    """Inlining it must not break a graph that plain torch compiles whole."""
    module = nn.MultiheadAttention(16, 4, batch_first=True, bias=False)
    x, padding = torch.randn(2, 9, 16), torch.arange(9).expand(2, 9) > 6

    def run(x, need_weights=False):
        causal = torch.ones(9, 9).triu(1).bool()
        return module(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights)[0]

    def causal(x):
        mask = nn.Transformer.generate_square_subsequent_mask(9)
        return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    graphs = Graphs("aot_eager")
    compiled = torch.compile(run, backend=graphs, fullgraph=True)
    with fa_sdpa.enable("always"):
        torch.testing.assert_close(compiled(x), run(x))
        torch.testing.assert_close(compiled(x, True), run(x, True))
        compiled = torch.compile(causal, backend=graphs, fullgraph=True)
        torch.testing.assert_close(compiled(x), causal(x))
    assert graphs.attention == ["", "", "fa4"]


def test_transformer_encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 16)
    graphs = Graphs("aot_eager")
    with fa_sdpa.enable("always"):
        out = torch.compile(layer, backend=graphs, fullgraph=True)(x)
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(value=v, query=q, key=k),
    ],
)
def test_other_ways_to_call(call):
    graphs = Graphs("aot_eager")
    x = qkv()
    with fa_sdpa.enable("always"):
        out = torch.compile(call, backend=graphs, fullgraph=True)(*x)
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, call(*x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_in_a_graph(reentrant):
    def block(q, k, v):
        return checkpoint(lambda *x: attend(*x).sin(), q, k, v, use_reentrant=reentrant)

    x, expected = qkv(requires_grad=True), qkv(requires_grad=True)
    with torch.no_grad():
        for a, b in zip(x, expected, strict=True):
            b.copy_(a)
    block(*expected).sum().backward()
    with fa_sdpa.enable("always"):
        out = torch.compile(block, backend="aot_eager", fullgraph=True)(*x)
    assert fa_sdpa.stats().compiled.routed == 1
    out.sum().backward()
    for a, b in zip(x, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_marked_dynamic_compiles_once_for_each_side_of_a_threshold():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    with fa_sdpa.enable(above(64)):
        for seqlen in (20, 33, 63, 64, 100, 200, 40, 70, 7):
            x = qkv(2, 4, seqlen, 8)
            for t in x:
                torch._dynamo.mark_dynamic(t, 2)
            torch.testing.assert_close(compiled(*x), attend(*x))
    assert graphs.attention == ["torch", "fa4"]


def test_marked_dynamic_without_a_threshold_compiles_once():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    with fa_sdpa.enable("always"):
        for seqlen in (20, 64, 7):
            x = qkv(2, 4, seqlen, 8)
            for t in x:
                torch._dynamo.mark_dynamic(t, 2)
            compiled(*x)
    assert graphs.attention == ["fa4"]


@pytest.mark.parametrize("dim", ["batch", "seqlen"])
def test_unbacked_sizes(dim):
    def masked(x, keep):
        kept = x[keep].reshape(-1, 4, 17, 8) if dim == "batch" else x[keep].reshape(1, -1, 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(kept, kept, kept)

    x, keep = torch.randn(17 * 3, 4, 8), torch.arange(17 * 3) < 17 * 2
    if dim == "batch":
        x, keep = x.reshape(3, 4, 17, 8), keep[:3]
    graphs = Graphs("aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), fa_sdpa.enable("always"):
        out = torch.compile(masked, backend=graphs, fullgraph=True)(x, keep)
    assert graphs.attention == ["fa4"]
    torch.testing.assert_close(out, masked(x, keep))


def test_a_threshold_that_an_unbacked_size_decides():
    def masked(x, keep):
        kept = x[keep]
        return F.scaled_dot_product_attention(kept, kept, kept)

    rule = Rule("forward", (1, 256), False, ((1, 1), (2, 64)))
    x, keep = torch.randn(3, 4, 17, 8), torch.tensor([True, False, True])
    graphs = Graphs("aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        with fa_sdpa.enable(Policy("auto", Crossover(0, "a test", (rule,)))):
            out = torch.compile(masked, backend=graphs, fullgraph=True)(x, keep)
    assert graphs.attention == ["torch"]
    assert "unbacked_size" in fa_sdpa.stats().compiled.reasons
    torch.testing.assert_close(out, masked(x, keep))


def test_symbolic_scale():
    def attend(x, scale):
        q, k, v = x
        return F.scaled_dot_product_attention(q, k, v, is_causal=True if q.shape[2] > 1 else False, scale=scale)

    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=True)
    with fa_sdpa.enable("always"):
        for seqlen, scale in ((17, 0.5), (19, 0.25), (33, 0.125)):
            x = qkv(2, 4, seqlen, 8)
            torch.testing.assert_close(compiled(x, scale), attend(x, scale))
    assert set(graphs.attention) - {""} == {"fa4"}  # Dynamo starts with an empty graph, also in plain torch


# ---- nothing goes stale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_on_and_off_by_calls(backend):
    graphs = Graphs(backend)
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()
    for _ in range(2):
        compiled(*x)
        fa_sdpa.enable("always")
        compiled(*x)
        fa_sdpa.enable("never")
        compiled(*x)
        fa_sdpa.disable()
    compiled(*x)
    assert graphs.attention == ["torch", "fa4", "torch"] * 2 + ["torch"]


def test_on_and_off_by_blocks_compiles_once_for_each_state():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()
    with fa_sdpa.enable("always"):
        compiled(*x)
    for _ in range(3):
        compiled(*x)
        with fa_sdpa.enable("always"):
            compiled(*x)
            with fa_sdpa.disable():
                compiled(*x)
        with fa_sdpa.enable(above(64)):
            compiled(*x)
    assert graphs.attention == ["fa4", "torch", "torch"]
    fa_sdpa.enable("always")  # the same policy by a call
    compiled(*x)
    assert len(graphs.attention) == 3


def test_compiled_before_the_first_enable():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()
    compiled(*x)
    with fa_sdpa.enable("always"):
        compiled(*x)
    assert graphs.attention == ["torch", "fa4"]


def test_recompiled_while_off_after_a_call_of_disable():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()
    fa_sdpa.enable("always")
    compiled(*x)
    fa_sdpa.disable()
    compiled(*x)
    with fa_sdpa.enable("always"):
        compiled(*x)
    assert graphs.attention == ["fa4", "torch", "fa4"]


def test_sdp_flags_are_guarded():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()
    with fa_sdpa.enable("always"):
        compiled(*x)
        with sdpa_kernel(SDPBackend.MATH):
            compiled(*x)
        compiled(*x)
    assert graphs.attention == ["fa4", "torch"]
    assert "sdp_backends" in fa_sdpa.stats().compiled.reasons


def test_sdpa_kernel_inside_the_graph():
    def both(q, k, v):
        with sdpa_kernel([SDPBackend.MATH]):
            out = attend(q, k, v)
        return out + attend(q, k, v)

    graphs = Graphs("aot_eager")
    compiled = torch.compile(both, backend=graphs, fullgraph=True)
    x = qkv()
    with fa_sdpa.enable("always"):
        torch.testing.assert_close(compiled(*x), both(*x))
        compiled(*x)
    assert graphs.attention == ["torch fa4"]


def test_threads_compile_for_their_own_state():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    x = qkv()

    def run(policy):
        with fa_sdpa.enable(policy):
            compiled(*x)

    for policy in ("always", "never", "always"):
        thread = threading.Thread(target=run, args=(policy,))
        thread.start()
        thread.join()
    compiled(*x)
    assert graphs.attention == ["fa4", "torch", "torch"]


# ---- blocks and graph breaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["always", Policy("always"), above(1)], ids=["mode", "Policy", "crossover"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_block_inside_a_compiled_function(policy, backend):
    def mixed(q, k, v):
        out = attend(q, k, v)
        with fa_sdpa.enable(policy):
            out = out + attend(q, k, v)
            with fa_sdpa.disable():
                out = out + attend(q, k, v)
        return out + attend(q, k, v)

    x = qkv(requires_grad=True)
    graphs = Graphs(backend)
    out = torch.compile(mixed, backend=graphs, fullgraph=True)(*x)
    assert graphs.attention == ["torch fa4 torch torch"]
    assert not fa_sdpa.is_enabled()
    torch.testing.assert_close(out, mixed(*x))
    out.sum().backward()
    with fa_sdpa.enable("always"):
        torch.compile(mixed, backend=graphs, fullgraph=True)(*x)
    assert graphs.attention[1:] == ["fa4 fa4 torch fa4"]


def test_trace_leaves_no_handler_behind():
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    before = dict(TorchInGraphFunctionVariable._get_handlers())

    def block(q, k, v):
        with fa_sdpa.enable("always"):
            return attend(q, k, v)

    def broken(q, k, v):
        with fa_sdpa.enable("always"):
            torch._dynamo.graph_break()
            return attend(q, k, v)

    torch.compile(block, backend="eager", fullgraph=True)(*qkv())
    assert dict(TorchInGraphFunctionVariable._get_handlers()) == before
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="eager", fullgraph=True)(*qkv())
    assert dict(TorchInGraphFunctionVariable._get_handlers()) == before


def test_block_with_a_graph_break_inside():
    def broken(q, k, v):
        with fa_sdpa.enable("always"):
            out = attend(q, k, v)
            torch._dynamo.graph_break()
            return out + attend(q, k, v)

    x = qkv()
    out = torch.compile(broken, backend="aot_eager")(*x)
    assert fa_sdpa.stats().routed >= 2 and not fa_sdpa.is_enabled()
    torch.testing.assert_close(out, broken(*x))


def test_call_inside_a_compiled_function_is_an_error():
    def switches(q, k, v):
        fa_sdpa.enable("always")
        return attend(q, k, v)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="must be the expression of a with statement"):
        torch.compile(switches, backend="eager", fullgraph=True)(*qkv())
    assert not fa_sdpa.is_enabled()
    torch.compile(switches, backend="eager")(*qkv())  # with graph breaks it runs, as Python
    assert fa_sdpa.is_enabled()


def test_block_made_outside_is_entered_or_refused():
    """Dynamo can't enter it on older torch; nowhere is it ignored."""
    block = fa_sdpa.enable("always")
    fa_sdpa.disable()

    def enters(q, k, v):
        with block:
            return attend(q, k, v)

    graphs = Graphs()
    try:
        torch.compile(enters, backend=graphs, fullgraph=True)(*qkv())
    except torch._dynamo.exc.Unsupported:
        assert graphs.attention == []
    else:
        assert graphs.attention == ["fa4"]
    assert not fa_sdpa.is_enabled()


def test_graph_broken_parts_are_routed_in_eager_mode():
    @torch._dynamo.disable
    def outside(*x):
        return attend(*x)

    def broken(q, k, v):
        q = q.sin()
        torch._dynamo.graph_break()
        return outside(q, k, v).cos()

    x = qkv()
    with fa_sdpa.enable("always"):
        out = torch.compile(broken, backend="aot_eager")(*x)
    assert fa_sdpa.stats().eager.routed == 1
    torch.testing.assert_close(out, broken(*x))


# ---- left to torch ---------------------------------------------------------------------------------------------------


LEARNED_MASK = torch.zeros(17, 17, requires_grad=True)


@pytest.mark.parametrize(
    "call, code",
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "dropout"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, LEARNED_MASK), "mask_gradient"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), "not_4d"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), "shapes"),
        (torch.func.grad(lambda q, k, v: attend(q, k, v).sum()), "transform"),
        (torch.func.vmap(attend), "transform"),
    ],
    ids=["dropout", "attn_mask", "3-D", "broadcast", "func.grad", "func.vmap"],
)
def test_left_to_torch(call, code):
    graphs = Graphs("eager")
    with fa_sdpa.enable("always"):
        torch.compile(call, backend=graphs, fullgraph=True)(*qkv())
    assert graphs.attention == ["torch"]
    assert code in fa_sdpa.stats().compiled.reasons


def test_graph_of_an_unrouted_call_is_plain_torchs():
    def code(x):
        graphs = Graphs("eager")
        torch.compile(attend, backend=graphs, fullgraph=True)(*x)
        return graphs.graphs[0].code

    x = qkv()
    plain = code(x)
    with fa_sdpa.enable("never"):
        assert code(x) == plain
    assert code(x) == plain


def test_the_compilers_own_calls_are_not_counted():
    with fa_sdpa.enable("never"):
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*qkv(requires_grad=True))
    assert fa_sdpa.stats() == ((0, 0, {}), (0, 1, {"policy_never": 1}))


def test_strict_export():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    with fa_sdpa.enable("always"):
        exported = torch.export.export(Model(), tuple(qkv()), strict=True)
    assert "fa4" not in exported.graph_module.code
    assert fa_sdpa.stats().reasons == {"tracing": fa_sdpa.stats().native}


def test_dynamos_own_export():
    graph, _ = torch._dynamo.export(attend)(*qkv())
    with fa_sdpa.enable("always"):
        exported, _ = torch._dynamo.export(attend)(*qkv())
    assert exported.code == graph.code
    assert set(fa_sdpa.stats().reasons) == {"tracing"}


@pytest.mark.parametrize("options", [{"attn_mask": True}, {"scale": "1"}, {"is_causal": 2}, {"enable_gqa": None}])
def test_bad_arguments_get_torchs_own_answer(options):
    def answer(*x):
        try:
            torch.compile(lambda *x: F.scaled_dot_product_attention(*x, **options), backend="eager", fullgraph=True)(*x)
        except Exception as error:
            return type(error), str(error).splitlines()[:6]

    x = qkv()
    expected = answer(*x)
    with fa_sdpa.enable("always"):
        assert answer(*x) == expected


def test_no_package_is_saved_of_a_graph_with_our_guards(monkeypatch):
    """TORCH_CACHING_PRECOMPILE=1 would save it, and load it without them."""
    reasons = []
    output_graph = torch._dynamo.output_graph.OutputGraph
    monkeypatch.setattr(output_graph, "bypass_package", lambda self, reason="", **kwargs: reasons.append(reason))
    with fa_sdpa.enable("always"):
        torch.compile(attend, backend="eager", fullgraph=True)(*qkv())
    assert any("fa_sdpa" in reason for reason in reasons)
