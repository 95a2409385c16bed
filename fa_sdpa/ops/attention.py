"""``fa4::attention_fwd`` and ``fa4::attention_bwd``: schema, CPU, CUDA, fake and autograd on one screen.

    S = scale · Q Kᵀ + mask        P = softmax(S)        O = P V        lse = log Σ_j exp S_ij
    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ − Σ dO∘O)      dQ = scale · dS K      dK = scale · dSᵀ Q

(FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.) The schemas grow by keyword arguments with defaults, which
torch's rules let us append.

The Autograd kernels are written by hand rather than by ``torch.library.register_autograd``, which more than doubles an
op's host time and drops forward-mode tangents without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch_private as private
from .. import kernels
from ..alike import Alike, Memory, never
from ..kernels import jit, launch, masks
from ..kernels.cpu import attention as cpu
from ..meta import shapes
from ..meta.spec import AttentionSpec, Options, mask_kind
from ..meta.target import Target

# Revision of the autograd formula. Callers that trace pass it explicitly: compile caches on disk are keyed by the
# graph and its arguments, so an artifact that holds an older formula is never loaded for a newer one.
VERSION = 1

_lib = torch.library.Library("fa4", "DEF")
_OPTIONS = (  # the fields and defaults of meta.spec.Options
    "bool is_causal=False, float? scale=None, bool bottom_right=False, SymInt? window_left=None, "
    f"SymInt? window_right=None, float softcap=0.0, int version={VERSION}"
)
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_lib.define(
    "attention_fwd(Tensor query, Tensor key, Tensor value, *, Tensor? attn_mask=None, Tensor? sink=None, "
    f"{_OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=_tags,
)
_lib.define(
    "attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"*, Tensor? attn_mask=None, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_tags,
)
_fwd = torch.ops.fa4.attention_fwd.default
_bwd = torch.ops.fa4.attention_bwd.default


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, H_kv, Sk, D)
    value: Tensor,  # (B, H_kv, Sk, Dv)
    *,
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Sq, Sk)
    sink: Tensor | None = None,  # (H,), floating
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention forward on the kernel of the inputs' device; differentiable in query, key, value and sink.

    Args:
        query, key, value: one floating dtype and device, any strides with a contiguous last dimension. H_kv divides
            H: query head h reads key/value head h // (H / H_kv). CPU: fp64, fp32, bf16, fp16. CUDA: what
            ``fa_sdpa.explain`` lists for the GPU.
        attn_mask: 2 to 4 dimensions, any strides. Boolean: which keys a row sees; or added to its scores, in fp32 or
            query's dtype. It counts together with is_causal and the window, and gets no gradient. Like every softmax
            in fp32, this one cannot see a bias that is 29,000 and more below the largest of its row.
        sink: a score by head that joins every row's softmax with a value of 0 (arXiv:2309.17453, learnable as in
            gpt-oss); part of lse.
        is_causal: query row i sees keys 0 … i, aligned at the top left as in torch's SDPA, also where Sq ≠ Sk.
        scale: factor of Q Kᵀ; None is 1/√D.
        bottom_right: align is_causal and the window at the bottom right instead: row i stands at key i + Sk − Sq.
        window_left, window_right: how many keys a row sees on either side of where it stands; None is all of them.
        softcap: if > 0, scores become softcap · tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).

    Returns:
        out (B, H, Sq, Dv) in query's dtype and memory layout, and lse (B, H, Sq) in fp32, natural log, which is not
        differentiable. A row that sees no key has out = 0 and lse = −inf.

    Raises:
        RuntimeError: inputs that break the rules above; a double backward; torch.func and forward-mode derivatives.
        NotImplementedError: no kernel runs this call here; the message lists every reason. There is no fallback:
            that is the router's business.
    """
    return torch.ops.fa4.attention_fwd(
        query,
        key,
        value,
        attn_mask=attn_mask,
        sink=sink,
        is_causal=is_causal,
        scale=scale,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )


def attention_bwd(
    dout: Tensor,  # (B, H, Sq, Dv), any strides
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # as attention_fwd returned it
    lse: Tensor,  # likewise
    *,
    attn_mask: Tensor | None = None,  # as attention_fwd got it
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_fwd``: (dq, dk, dv), shaped, typed and laid out like query, key and value.

    The sink needs no argument, being part of lse. Not differentiable itself. Raises as ``attention_fwd`` does.
    """
    return torch.ops.fa4.attention_bwd(
        dout,
        query,
        key,
        value,
        out,
        lse,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )


# ---- implementations -------------------------------------------------------------------------------------------------
# The dispatcher leaves out keyword arguments that equal their default, so ``options`` holds the others: the fields of
# Options that were set, and ``version``.


def _options(version: int = VERSION, **options: Any) -> Options:
    if version != VERSION:
        raise RuntimeError(f"fa4: this graph holds version {version} of the formulas, installed is {VERSION}")
    return Options(**options)


_admitted: set[tuple[Any, ...]] = set()  # what is known of calls that passed; looking it up costs a tenth of checking


def _admit(
    check: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Tensor,  # those of the backward
    attn_mask: Tensor | None,
    sink: Tensor | None,
    options: Options,
) -> None:
    """Raise what ``check`` finds wrong with a call, or every reason why no kernel can run it on its device."""
    facts = (
        *((x.shape, x.dtype, x.device, x.stride(-1)) for x in (query, key, value, *others)),
        attn_mask is not None and (attn_mask.shape, attn_mask.dtype, attn_mask.device),
        sink is not None and (sink.shape, sink.dtype, sink.device),
        options,
        torch.are_deterministic_algorithms_enabled(),
    )
    if facts in _admitted:
        return
    check(query, key, value, *others, attn_mask, sink, options)
    _refuse(_spec(query, key, value, attn_mask, sink, options, needs_grad=bool(others)), query.device)
    if len(_admitted) >= 4096:
        _admitted.clear()
    _admitted.add(facts)


def _spec(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sink: Tensor | None,
    options: Options,
    needs_grad: bool,
) -> AttentionSpec:
    mask = mask_kind(None if attn_mask is None else attn_mask.dtype)
    has_sink = sink is not None
    return AttentionSpec.of(query, key, value, mask, needs_grad=needs_grad, sink=has_sink, **options._asdict())


def _refuse(spec: AttentionSpec, device: torch.device) -> None:
    """Raise NotImplementedError with every reason why no kernel can run a call on its device, if there is one."""
    reasons = kernels.unsupported(spec, Target.of(device))
    if reasons:
        raise NotImplementedError("fa4: no kernel for this call: " + "; ".join(map(str, reasons)))


# A call that repeats goes straight to what computes it, past the dispatcher and the checks: from the Autograd kernels,
# from backward nodes, and from the implementations, which inference mode calls directly.

Run = Callable[..., tuple[Tensor, ...]]
_forwards, _backwards = Memory(), Memory()  # calls of the two ops that were not recorded, by where they were met


def _forget_calls() -> None:
    _forwards.forget()
    _backwards.forget()


jit.on_change(_forget_calls)


def _facts(where: str, kwargs: dict[str, Any], attn_mask: Tensor | None) -> tuple[Any, ...]:
    """What tells calls apart besides their tensors, of which those with a mask have one more."""
    place = where if attn_mask is None else (where, masks.is_in_eager_mode())
    return place, tuple(kwargs.items()), private.is_grad_enabled(), private.is_deterministic()


def _repeated(memory: Memory, facts: tuple[Any, ...], *tensors: Tensor) -> Any:
    """The results of a call like one that was kept; None if there is none."""
    if private.modes_open():
        return None
    for x in tensors:
        if type(x) is not Tensor or x.is_nested:
            return None
    alike = memory.latest.next
    if alike.facts == facts and alike.same(*tensors):
        memory.latest = alike
    elif all(map(_is_plain, tensors)) and (found := memory.find(facts, *tensors)):
        alike = found
    else:
        return None
    return alike.run(*tensors)  # type: ignore[misc]


def _keep(
    memory: Memory, facts: tuple[Any, ...], direct: Callable[..., Run], options: Options, *tensors: Tensor
) -> None:
    """Keep a call that has run, if those like it may go past the dispatcher: plain tensors in memory, with nothing open
    that changes what an op does."""
    if all(map(_is_plain, tensors)) and private.in_memory(*tensors) and private.nothing_changes_ops():
        epoch = memory.epoch
        memory.keep(Alike(private.same_tensors(*tensors), facts, direct(options, *tensors)), epoch, *tensors)


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.layout is torch.strided and not x.is_nested


def _direct_fwd(options: Options, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Run:
    """What computes (out, lse) of calls like this one, on tensors that ``private.same_tensors`` takes for these."""
    if query.is_cuda:
        return launch.prepared_fwd(query, key, value, options, attn_mask)
    return lambda query, key, value, *mask: cpu.attention_fwd(query, key, value, None, options, *mask)


def _direct_bwd(options: Options, *tensors: Tensor) -> Run:
    """The same for (dq, dk, dv), of dout, query, key, value, out, lse and, if there is one, the mask."""
    if tensors[1].is_cuda:
        return launch.prepared_bwd(*tensors[:6], options, *tensors[6:])  # type: ignore[call-arg,arg-type]
    return lambda *tensors: cpu.attention_bwd(*tensors[:6], options, *tensors[6:])  # type: ignore[call-arg]


def _with_mask(attn_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if attn_mask is None else (*tensors, attn_mask)


def _forward(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A device's implementation of attention_fwd around what computes it."""

    def impl(query, key, value, *, attn_mask=None, sink=None, **kwargs):  # type: ignore[no-untyped-def]
        facts, tensors = _facts("implementation", kwargs, attn_mask), _with_mask(attn_mask, query, key, value)
        done = _repeated(_forwards, facts, *tensors) if sink is None else None
        if done is None:
            options = _options(**kwargs)
            _admit(shapes.check_fwd, query, key, value, attn_mask=attn_mask, sink=sink, options=options)
            done = run(query, key, value, sink, options, attn_mask)
            if sink is None:
                _keep(_forwards, facts, _direct_fwd, options, *tensors)
        return done

    return impl


_lib.impl("attention_fwd", _forward(cpu.attention_fwd), "CPU")
_lib.impl("attention_fwd", _forward(launch.attention_fwd), "CUDA")


def _backward(run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A device's implementation of attention_bwd around what computes it."""

    def impl(*tensors, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        facts, given = _facts("implementation", kwargs, attn_mask), _with_mask(attn_mask, *tensors)
        done = _repeated(_backwards, facts, *given)
        if done is None:
            dout, query, key, value, out, lse = tensors
            options = _options(**kwargs)
            _admit(shapes.check_bwd, query, key, value, dout, out, lse, attn_mask=attn_mask, sink=None, options=options)
            done = run(*tensors, options, attn_mask)
            _keep(_backwards, facts, _direct_bwd, options, *given)
        return done

    return impl


_lib.impl("attention_bwd", _backward(cpu.attention_bwd), "CPU")
_lib.impl("attention_bwd", _backward(launch.attention_bwd), "CUDA")


@torch.library.register_fake("fa4::attention_fwd", lib=_lib)
def _fwd_fake(query, key, value, *, attn_mask=None, sink=None, **kwargs):  # type: ignore[no-untyped-def]
    shapes.check_fwd(query, key, value, attn_mask, sink, _options(**kwargs))
    return shapes.empty_out_lse(query, value)


@torch.library.register_fake("fa4::attention_bwd", lib=_lib)
def _bwd_fake(dout, query, key, value, out, lse, *, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
    shapes.check_bwd(query, key, value, dout, out, lse, attn_mask, None, _options(**kwargs))
    return shapes.empty_grads(query, key, value)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, sink, kwargs):  # type: ignore[no-untyped-def]
        with private.below_autograd():
            out, lse = _fwd(query, key, value, attn_mask=attn_mask, sink=sink, **kwargs)
        ctx.save_for_backward(query, key, value, out, lse, attn_mask, sink)
        ctx.kwargs, ctx.in_eager_mode = kwargs, masks.is_in_eager_mode()
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):  # type: ignore[no-untyped-def]
        if dout is None:
            return (None,) * 6
        query, key, value, out, lse, attn_mask, sink = ctx.saved_tensors
        with masks.in_eager_mode() if ctx.in_eager_mode else contextlib.nullcontext():
            dq, dk, dv = _gradients(ctx.kwargs, attn_mask, dout, query, key, value, out, lse)
        dsink = None
        if ctx.needs_input_grad[4]:  # its value is 0, so dP − Σ dO∘O is −Σ dO∘O
            p = torch.exp(sink.to(lse.dtype)[:, None] - lse)
            dsink = -(p * (dout * out).sum(-1, dtype=lse.dtype)).sum((0, 2)).to(sink.dtype)
        return dq, dk, dv, None, dsink, None


def _gradients(kwargs: dict[str, Any], attn_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """attention_bwd, in a backward node."""
    if private.is_grad_enabled() or private.transform_active() or private.forward_ad_active():
        return _bwd(*tensors, attn_mask=attn_mask, **kwargs)
    facts, given = _facts("node", kwargs, attn_mask), _with_mask(attn_mask, *tensors)
    done = _repeated(_backwards, facts, *given) if private.nothing_sees_ops() else None
    if done is None:
        with private.below_autograd():  # nothing records: the Autograd kernel would only hand the call on
            done = _bwd(*tensors, attn_mask=attn_mask, **kwargs)
        _keep(_backwards, facts, _direct_bwd, _options(**kwargs), *given)
    return done


class _Served:
    """Serves the calls that are alike, with gradients recorded."""

    __slots__ = ("run", "kwargs", "backward")

    def __init__(self, run: Run, kwargs: dict[str, Any]) -> None:
        self.run, self.kwargs = run, kwargs
        self.backward = Alike(never, ())  # what served the last backward

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        return _apply_out(query, key, value, self, *mask)


class _AttentionOut(torch.autograd.Function):
    """``_Attention`` for out alone, of a call that ``prepared`` serves."""

    @staticmethod
    def forward(ctx, query, key, value, served, *mask):  # type: ignore[no-untyped-def]
        out, lse = served.run(query, key, value, *mask)
        ctx.save_for_backward(query, key, value, out, lse, *mask)
        ctx.served = served
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        served = ctx.served
        query, key, value, out, lse, *mask = tensors = ctx.saved_tensors
        none = (None,) if not mask else (None, None)
        if dout is None:
            return None, None, None, *none
        nested = dout.is_nested or query.is_nested or key.is_nested or value.is_nested or out.is_nested or lse.is_nested
        backward = served.backward
        if (
            not nested
            and backward.same(dout, *tensors)
            and backward.facts[2:] == (private.is_grad_enabled(), private.is_deterministic())
            and private.nothing_sees_ops()
        ):
            return *backward.run(dout, *tensors), *none
        with masks.in_eager_mode():
            grads = _gradients(served.kwargs, mask[0] if mask else None, dout, query, key, value, out, lse)
        latest, place = _backwards.latest, ("node", True) if mask else "node"
        if not nested and latest.facts[:2] == (place, tuple(served.kwargs.items())) and latest.same(dout, *tensors):
            served.backward = latest
        return *grads, *none


_apply_out = private.apply_of(_AttentionOut)


def prepared(
    query: Tensor, key: Tensor, value: Tensor, *mask: Tensor, needs_grad: bool, is_causal: bool, scale: float | None
) -> Callable[..., Tensor]:
    """out of ``attention_fwd`` past the dispatcher, with gradients recorded or not, for calls like this one, which has
    run: with tensors that ``private.same_tensors`` takes for these, where nothing is open that should see the op. In
    eager mode, so that a mask is kept."""
    kwargs: dict[str, Any] = {"is_causal": True} if is_causal else {}
    if scale is not None:
        kwargs["scale"] = scale
    with masks.in_eager_mode():
        run = _direct_fwd(_options(**kwargs), query, key, value, *mask)
    if needs_grad:
        return _Served(run, kwargs)
    return lambda *tensors: run(*tensors)[0]


class _AttentionBackward(torch.autograd.Function):
    """Runs attention_bwd under create_graph=True; raises only if somebody does differentiate the gradients."""

    @staticmethod
    def forward(ctx, dout, query, key, value, out, lse, attn_mask, kwargs):  # type: ignore[no-untyped-def]
        with private.below_autograd():
            return _bwd(dout, query, key, value, out, lse, attn_mask=attn_mask, **kwargs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "fa4::attention_bwd is not differentiable, so attention has no double backward: "
            "use torch's math backend, torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a derivative of a call on these tensors may be asked for; raises where we could not give it."""
    if private.transform_active() or private.forward_ad_active():
        raise RuntimeError(
            "fa4::attention_fwd takes no part in torch.func transforms and forward-mode AD: call "
            "torch.nn.functional.scaled_dot_product_attention, which is left to torch there"
        )
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


@torch.library.impl(_lib, "attention_fwd", "Autograd")
def _fwd_autograd(query, key, value, *, attn_mask=None, sink=None, **kwargs):  # type: ignore[no-untyped-def]
    facts, tensors = _facts("autograd", kwargs, attn_mask), _with_mask(attn_mask, query, key, value)
    if sink is None and not private.forward_ad_active():
        done = _repeated(_forwards, facts, *tensors)
        if done is not None:
            return done
    if _is_recorded(query, key, value, attn_mask, sink):
        if attn_mask is not None:
            _admit_gradients(query, key, value, attn_mask, sink, _options(**kwargs))
        return _Attention.apply(query, key, value, attn_mask, sink, kwargs)
    with private.below_autograd():
        done = _fwd(query, key, value, attn_mask=attn_mask, sink=sink, **kwargs)
    if sink is None:
        _keep(_forwards, facts, _direct_fwd, _options(**kwargs), *tensors)
    return done


def _admit_gradients(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, sink: Tensor | None, options: Options
) -> None:
    """Raise in the forward what would be refused in the backward."""
    if attn_mask.requires_grad:
        raise RuntimeError(
            "fa4::attention_fwd gives no gradient of attn_mask: detach it, or call "
            "torch.nn.functional.scaled_dot_product_attention, which is left to torch there"
        )
    _refuse(_spec(query, key, value, attn_mask, sink, options, needs_grad=True), query.device)


@torch.library.impl(_lib, "attention_bwd", "Autograd")
def _bwd_autograd(*tensors, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
    facts, given = _facts("autograd", kwargs, attn_mask), _with_mask(attn_mask, *tensors)
    if not private.forward_ad_active():
        done = _repeated(_backwards, facts, *given)
        if done is not None:
            return done
    if _is_recorded(*tensors, attn_mask):
        return _AttentionBackward.apply(*tensors, attn_mask, kwargs)
    with private.below_autograd():
        done = _bwd(*tensors, attn_mask=attn_mask, **kwargs)
    _keep(_backwards, facts, _direct_bwd, _options(**kwargs), *given)
    return done
