"""fa4::attention_fwd / attention_bwd through torch.library: numerics on the CPU, metadata, autograd, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fa_sdpa.ops
from fa_sdpa import reference
from fa_sdpa.meta.spec import AttentionSpec, Options
from fa_sdpa.meta.target import Target

fwd = torch.ops.fa4.attention_fwd
bwd = torch.ops.fa4.attention_bwd

# B, H, H_kv, Sq, Sk, D, Dv
SHAPES = {
    "mha": (2, 3, 3, 300, 300, 16, 16),
    "gqa7": (1, 7, 1, 130, 517, 8, 8),
    "gqa_two_groups": (2, 6, 2, 517, 130, 80, 80),
    "dv_larger": (1, 2, 1, 65, 300, 8, 24),
    "dv_smaller": (1, 2, 2, 257, 31, 24, 8),
    "one_query": (2, 4, 2, 1, 600, 16, 16),
    "one_key": (1, 2, 2, 129, 1, 8, 8),
    "tiny": (1, 1, 1, 1, 1, 1, 1),
}


def inputs(shape, dtype=torch.float32, requires_grad=False, device="cpu"):
    batch, heads, heads_kv, sq, sk, d, dv = shape
    sizes = ((batch, heads, sq, d), (batch, heads_kv, sk, d), (batch, heads_kv, sk, dv))
    return [torch.randn(size, dtype=dtype, device=device, requires_grad=requires_grad) for size in sizes]


def assert_within_bound(name, actual, expected, baseline, floor=0.0):
    excess = reference.excess(actual, expected, baseline, floor)
    assert excess <= 0, f"{name} is over the bound by {excess:.3g}; {reference.worst(actual, expected)}"


LAYOUTS = {
    "bhsd": lambda b, h, s, d: torch.randn(b, h, s, d),
    "bshd": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "packed_qkv": lambda b, h, s, d: torch.randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    "expanded_batch": lambda b, h, s, d: torch.randn(1, h, s, d).expand(b, -1, -1, -1),
    "expanded_heads": lambda b, h, s, d: torch.randn(b, 1, s, d).expand(-1, h, -1, -1),
    "sliced_rows": lambda b, h, s, d: torch.randn(b, h, s, 2 * d)[..., :d],
    "sbhd": lambda b, h, s, d: torch.randn(s, b, h, d).permute(1, 2, 0, 3),
    "hbsd": lambda b, h, s, d: torch.randn(h, b, s, d).transpose(0, 1),
}


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.3], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_math_in_fp64(shape, is_causal, scale):
    q, k, v = inputs(shape, torch.float64, requires_grad=True)
    out, lse = fwd(q, k, v, is_causal=is_causal, scale=scale)
    expected, expected_lse = reference.attention(q, k, v, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # the backward starts from an fp32 lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keeps_the_error_bound(shape, is_causal, dtype):
    q, k, v = inputs(shape, dtype, requires_grad=True)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = fwd(q, k, v, is_causal=is_causal)
    expected, _ = reference.attention(*wide, is_causal=is_causal)
    baseline, _ = reference.attention(q, k, v, is_causal=is_causal)
    assert_within_bound("out", out, expected, baseline)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    baselines = torch.autograd.grad(baseline, (q, k, v), dout)
    references = torch.autograd.grad(expected, wide, dout.double())
    for name, got, want, base in zip(("dq", "dk", "dv"), grads, references, baselines, strict=True):
        assert_within_bound(name, got, want, base, floor=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_agrees_with_torch_sdpa(is_causal):
    q, k, v = inputs(SHAPES["gqa7"], torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(fwd(q, k, v, is_causal=is_causal)[0], expected)


# Every option alone, and together
OPTIONS = {
    "bottom_right": {"is_causal": True, "bottom_right": True},
    "window": {"window_left": 20, "window_right": 3},
    "window_left": {"window_left": 0},
    "window_right": {"window_right": 40},
    "causal_window": {"is_causal": True, "window_left": 300, "window_right": 5},
    "bottom_right_window": {"bottom_right": True, "window_left": 150, "window_right": 0},
    "softcap": {"softcap": 0.7},
    "sink": {"sink": True},
    "all": {
        "is_causal": True,
        "bottom_right": True,
        "window_left": 200,
        "softcap": 2.0,
        "sink": True,
        "scale": 0.4,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("mha", "gqa7", "gqa_two_groups", "dv_larger", "one_key")])
def test_options_match_math_in_fp64(shape, options):
    q, k, v = inputs(shape, torch.float64, requires_grad=True)
    leaves = [q, k, v]
    if options.get("sink"):
        options = options | {"sink": torch.randn(q.size(1), dtype=torch.float64, requires_grad=True)}
        leaves.append(options["sink"])
    out, lse = fwd(q, k, v, **options)
    expected, expected_lse = reference.attention(q, k, v, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_blocks_outside_the_window_are_not_visited():
    """A visited but masked NaN would show: its weight of 0 times NaN is NaN."""
    q, k, v = inputs((1, 1, 1, 4096, 4096, 4, 4))
    v[:, :, :2000] = v[:, :, 3000:] = math.nan
    out, _ = fwd(q, k, v, window_left=100, window_right=100)
    assert out[:, :, 2432:2560].isfinite().all() and out[:, :, 2100:2900].isfinite().any()
    assert out[:, :, :1900].isnan().all() and out[:, :, 3100:].isnan().all()


def test_gradients_of_expanded_inputs_are_dense_in_the_order_of_torchs_flash_backward():
    q = torch.randn(2, 5, 4, 8).transpose(1, 2)
    k, v = (x.detach().expand(2, 4, 7, 8).requires_grad_() for x in torch.randn(2, 2, 1, 7, 8))
    out, _ = fwd(q, k, v)
    dk, dv = torch.autograd.grad(out, (k, v), torch.ones_like(out))
    assert dk.stride() == dv.stride() == (7 * 4 * 8, 8, 4 * 8, 1)


@pytest.mark.parametrize("has_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "bottom_right": True, "scale": 0.3},
        {"window_left": 2, "window_right": 1},
        {"is_causal": True, "bottom_right": True, "window_left": 3, "softcap": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1, 2, 1, 5, 7, 3, 4), (2, 4, 2, 7, 4, 4, 3)], ids=str)
def test_gradcheck(sizes, options, has_sink):
    tensors = inputs(sizes, torch.float64, requires_grad=True)
    if has_sink:
        tensors = [*tensors, torch.randn(sizes[1], dtype=torch.float64, requires_grad=True)]

    def call(q, k, v, sink=None):
        return fwd(q, k, v, sink=sink, **options)[0]

    assert torch.autograd.gradcheck(call, tuple(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_without_keys_is_zero(dtype):
    q, k, v = inputs((2, 4, 2, 5, 0, 8, 16), dtype, requires_grad=True)
    out, lse = fwd(q, k, v)
    assert out.shape == (2, 4, 5, 16) and not out.any()
    assert (lse == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dq.any() and dk.shape == k.shape and dv.shape == v.shape


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4, 8, 8), (2, 2, 1, 0, 4, 8, 8), (2, 0, 0, 4, 4, 8, 8)], ids=str)
def test_empty_inputs(shape):
    q, k, v = inputs(shape, requires_grad=True)
    out, lse = fwd(q, k, v)
    assert out.shape == (*q.shape[:3], v.size(3)) and lse.shape == q.shape[:3]
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_masked_infinities_do_not_leak():
    q, k, v = inputs((1, 1, 1, 4, 4, 8, 8), torch.float64)
    expected = fwd(q, k, v, is_causal=True)[0][:, :, :3]
    k[:, :, 3] = math.inf
    torch.testing.assert_close(fwd(q, k, v, is_causal=True)[0][:, :, :3], expected)


def test_memory_is_linear_in_seqlen():
    """The largest tensor of a call stays far below Sq × Sk elements, forward and backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    q, k, v = inputs((1, 1, 1, 2048, 2048, 4, 4))
    with Watch():
        out, lse = fa_sdpa.kernels.cpu.attention.attention_fwd(q, k, v, None, Options())
        fa_sdpa.kernels.cpu.attention.attention_bwd(out, q, k, v, out, lse, Options())
    assert largest <= 2048 * 256


# ---- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dv", [16, 8, 24])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_is_exact_and_out_is_laid_out_like_torchs_flash(layout, dv):
    q = LAYOUTS[layout](2, 3, 5, 16)
    k, v = LAYOUTS[layout](2, 3, 7, 16), LAYOUTS[layout](2, 3, 7, dv)
    out, lse = fwd(q, k, v)
    grads = bwd(torch.randn_like(out), q, k, v, out, lse)
    with FakeTensorMode() as mode:
        fake_q, fake_k, fake_v = (mode.from_tensor(x) for x in (q, k, v))
        fake_out, fake_lse = fwd(fake_q, fake_k, fake_v)
        fake_grads = bwd(fake_out, fake_q, fake_k, fake_v, fake_out, fake_lse)
    for real, fake in zip((out, lse, *grads), (fake_out, fake_lse, *fake_grads), strict=True):
        assert (real.shape, real.stride(), real.dtype, real.device) == (
            fake.shape,
            fake.stride(),
            fake.dtype,
            fake.device,
        )
        # torch's flash op, asked through its own meta kernel
        with FakeTensorMode() as mode:
            cuda = [mode.from_tensor(x) for x in (q, k, v)] if dv == 16 else []
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*cuda) if cuda else None
    if flash is not None:
        assert out.stride() == flash[0].stride()
    else:  # the same order of dimensions in memory, dense
        order = sorted(range(3), key=lambda d: -out.stride(d))
        assert out.permute(*order, 3).is_contiguous()
        if layout not in ("expanded_batch", "expanded_heads"):
            assert order == sorted(range(3), key=lambda d: -q.stride(d))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed_qkv"])
def test_opcheck(layout, requires_grad):
    make = LAYOUTS[layout]
    q, k, v = (make(2, h, s, 8).requires_grad_(requires_grad) for h, s in ((4, 6), (2, 9), (2, 9)))
    for options in (
        {},
        {"is_causal": True, "scale": 0.5, "version": fa_sdpa.ops.VERSION},
        {"bottom_right": True, "window_left": 2, "window_right": 1, "softcap": 0.5},
    ):
        sink = torch.randn(4, requires_grad=requires_grad)
        opcheck(fwd.default, (q, k, v), options)
        opcheck(fwd.default, (q, k, v), options | {"sink": sink})
        out, lse = (x.detach() for x in fwd(q, k, v, **options))
        dout = torch.randn_like(out).requires_grad_(requires_grad)
        opcheck(bwd.default, (dout, q, k, v, out, lse), options, test_utils=BWD_UTILS[requires_grad])


# attention_bwd has no derivative, which is all that the last utility would look for when gradients are asked.
BWD_UTILS = {
    False: ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    True: ("test_schema", "test_autograd_registration", "test_faketensor"),
}


def test_inference_mode_and_no_grad_record_nothing():
    q, k, v = inputs(SHAPES["tiny"], requires_grad=True)
    with torch.no_grad():
        assert not fwd(q, k, v)[0].requires_grad
    with torch.inference_mode():
        assert not fwd(q, k, v)[0].requires_grad
    out, lse = fwd(q, k, v)
    assert out.requires_grad and not lse.requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_double_backward_raises_only_when_it_runs():
    q, k, v = inputs((1, 1, 1, 4, 4, 8, 8), requires_grad=True)
    out, _ = fwd(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query must be \\(batch, heads, seqlen, head_dim\\)"),
        (lambda q, k, v: (q, k.double(), v), "key is torch.float64, query is torch.float32"),
        (lambda q, k, v: (q, k[:1], v[:1]), "key has batch 1, query has 2"),
        (lambda q, k, v: (q, k[..., :4], v), "key has head_dim 4, query has 8"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "key has seqlen 6, value has 3"),
        (lambda q, k, v: (q, k, v[:, :1]), "key has 2 heads, value has 1"),
        (lambda q, k, v: (q[:, :3], k, v), "num_heads_kv \\(2\\) must divide num_heads \\(3\\)"),
        (lambda q, k, v: (q.mT, k.mT, v.mT), "query must be contiguous in its last dimension"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "query must be floating point"),
        (lambda q, k, v: (q, k.to("meta"), v), "key is on meta, query is on cpu"),
    ],
)
def test_bad_inputs_raise(change, message):
    q, k, v = inputs((2, 4, 2, 6, 6, 8, 8))
    with pytest.raises(RuntimeError, match=message):
        fwd(*change(q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -1.0}, "softcap must be 0"),
        ({"window_left": -1}, "window_left and window_right"),
        ({"sink": torch.zeros(3)}, "sink must be floating point \\(4,\\), got torch.float32 \\(3,\\)"),
        ({"sink": torch.zeros(4, device="meta")}, "sink is on meta"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(RuntimeError, match=message):
        fwd(*inputs((2, 4, 2, 6, 6, 8, 8)), **options)


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual"])
def test_other_derivatives_raise_and_are_not_dropped(transform):
    q, k, v = inputs(SHAPES["tiny"])
    with pytest.raises(RuntimeError, match="takes no part in torch.func"):
        if transform == "grad":
            torch.func.grad(lambda q: fwd(q, k, v)[0].sum())(q)
        elif transform == "jvp":
            torch.func.jvp(lambda q: fwd(q, k, v)[0], (q,), (q,))
        else:
            with torch.autograd.forward_ad.dual_level():
                fwd(torch.autograd.forward_ad.make_dual(q, q), k, v)


def test_bad_backward_inputs_raise():
    q, k, v = inputs((2, 4, 2, 6, 6, 8, 8))
    out, lse = fwd(q, k, v)
    with pytest.raises(RuntimeError, match="dout is"):
        bwd(out[:, :, :3], q, k, v, out, lse)
    with pytest.raises(RuntimeError, match="torch.float32"):
        bwd(out, q, k, v, out, lse.double())


def test_other_version_of_the_formula_raises():
    q, k, v = inputs(SHAPES["tiny"])
    with pytest.raises(RuntimeError, match="version 0 .* installed is 1"):
        fwd(q, k, v, version=0)


def test_no_kernel_raises_with_every_reason():
    """What the CUDA implementation raises by, on a device that is not here."""
    from fa_sdpa import kernels

    spec = AttentionSpec(torch.float32, 1, 4, 4, 8, 8, 33, 33, mask="fp64", dropout_p=0.1)
    codes = {reason.code for reason in kernels.unsupported(spec, Target("cuda", 90, "H100", 132, 232448))}
    assert codes >= {"dtype", "head_dim", "attn_mask", "dropout"}
    assert [r.code for r in kernels.unsupported(spec, Target("cuda", 70, "V100"))] == ["no_kernel_family"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_out_is_laid_out_like_eager(layout):
    """Inputs that are intermediates of the graph, which inductor would be free to lay out anew."""

    def block(q, k, v):
        return fwd(q * 2, k.expand_as(k) + 0, v, is_causal=True)

    q, k, v = (LAYOUTS[layout](2, 3, 5, 16) for _ in range(3))
    out, lse = block(q, k, v)
    compiled_out, compiled_lse = torch.compile(block, fullgraph=True)(q, k, v)
    assert compiled_out.stride() == out.stride() and compiled_lse.stride() == lse.stride()
    torch.testing.assert_close(compiled_out, out)
    torch._dynamo.reset()
