"""One SDPA call → AttentionSpec → Decision → fa4 op or torch's own kernel, in eager mode and under torch.compile.

Eager: ``sdpa`` below is the op's kernel while routing is on. Compiled: Dynamo asks ``routed_in_graph`` while it
traces and puts either ``fa4::attention_fwd`` or the untouched SDPA call into its graph. ``sdpa`` never routes while
a compiler traces, so what is compiled is a function of Dynamo's graph alone, and the compile caches on disk, which
are keyed by that graph, can't return the other state's code.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _torch_private as private
from . import record
from .alike import Alike, Memory
from .counts import Tally, tally
from .kernels import jit, launch, masks
from .kernels.compile import KernelUnavailable
from .meta.shapes import is_dense, mask_fits
from .meta.spec import AttentionSpec, Decision, Reason, mask_kind
from .meta.target import Target
from .ops import VERSION, attention
from .policy import HOST_DECIDES, decide, left_by_query
from .state import OFF, current_token, policy_of, process, thread

log = logging.getLogger("fa_sdpa")  # torch turns it on by the package's name: TORCH_LOGS=+fa_sdpa
_fa4 = torch.ops.fa4.attention_fwd.default


class Circumstances(NamedTuple):
    """What keeps a call with torch wherever it deviates from these defaults, and else decides nothing."""

    sdp_flags: tuple[bool, bool, bool, bool] = (True, True, True, True)
    in_transform: bool = False  # torch.func
    in_forward_ad: bool = False
    in_trace: bool = False  # jit.trace, make_fx or export is recording
    one_device: bool = True
    one_dtype: bool = True
    strided: bool = True  # not sparse, not mkldnn
    rows_contiguous: bool = True
    mask_fits: bool = True  # attn_mask is strided, on the device of the others, and broadcasts to the scores
    mask_needs_grad: bool = False
    dense_bias: bool = False  # which is the policy's to judge


_ORDINARY = Circumstances()
_DENSE_BIAS = Circumstances(dense_bias=True)


class Call(NamedTuple):
    """All that a decision depends on, without tensors. Sizes may be SymInts while a graph is traced."""

    token: str
    query: torch.Size
    key: torch.Size
    value: torch.Size
    device: torch.device
    dtype: torch.dtype
    mask: torch.dtype | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    needs_grad: bool
    deterministic: bool
    circumstances: Circumstances = _ORDINARY
    captured: bool = False  # in a CUDA graph


# ---- eager -----------------------------------------------------------------------------------------------------------


_calls = Memory()  # those that repeat
_decided: dict[Call, Tally] = {}  # all of them
_CACHED_CALLS = 4096
_PASSING = {"capturing", "compiling"}  # reasons that end, and that depend on more than the call


def _forget_decisions() -> None:
    _calls.forget()
    _decided.clear()


jit.on_change(_forget_decisions)
_compiler = private.compiler
_undisturbed, _is_grad_enabled, _is_deterministic = (
    private.undisturbed,
    private.is_grad_enabled,
    private.is_deterministic,
)
_KEYSET = private.KEYSET
_native: Callable[..., Tensor]  # what was the op's kernel before, from ``take_native_kernel``; wants _KEYSET first


def take_native_kernel() -> None:
    """To be called before ``sdpa`` becomes the op's kernel."""
    global _native
    _native = private.native_kernel()


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA's kernel while routing is on. Calls that stay with torch pay for every line they pass here, and would for
    parameters that only go by keyword."""
    token = thread.token or process.token
    alike = _calls.latest.next
    if alike.by_query == token and alike.same(query):
        _calls.latest = alike
        alike.tick()
    elif token != OFF:
        foreseen = (
            # == _facts(token, …), but here the call of a function counts
            alike.facts == (token, attn_mask is None, dropout_p, is_causal, scale, enable_gqa)
            and (alike.same(query, key, value) if attn_mask is None else alike.same(query, key, value, attn_mask))
            and alike.modes == (_is_grad_enabled(), _is_deterministic())
            and (alike.unless is None or not alike.unless())
        )
        if foreseen and alike.run is None:
            _calls.latest = alike
            alike.tick()
        elif foreseen and _undisturbed():
            _calls.latest = alike
            alike.tick()
            if attn_mask is None:
                return alike.run(query, key, value)  # type: ignore[misc]
            return alike.run(query, key, value, attn_mask)  # type: ignore[misc]
        else:
            out = _looked_at(token, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if out is not None:
                return out
    if enable_gqa:
        return _native(_KEYSET, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    if scale is not None:
        return _native(_KEYSET, query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if is_causal or dropout_p:  # fewer arguments cost less
        return _native(_KEYSET, query, key, value, attn_mask, dropout_p, is_causal)
    if attn_mask is None:
        return _native(_KEYSET, query, key, value)
    return _native(_KEYSET, query, key, value, attn_mask)


def sdpa_of_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same where a tensor is nested, which must not come to the check of those that are alike: it would end the
    process."""
    token = thread.token or process.token
    out = None
    if token != OFF:
        out = _looked_at(token, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if out is None:
        options = attn_mask, dropout_p, is_causal
        out = _native(_KEYSET, query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    return out


def _facts(
    token: str,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Any, ...]:
    """What calls that are alike share besides their tensors and modes."""
    return token, attn_mask is None, dropout_p, is_causal, scale, enable_gqa


def _modes() -> tuple[bool, bool]:
    """The modes that a decision may depend on."""
    return _is_grad_enabled(), _is_deterministic()


def _looked_at(
    token: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """A call that was not foreseen; None if it is torch's."""
    if _compiler.__dict__.get("tracing_context") is not None:
        if torch.compiler.is_exporting():
            tally("eager", Decision("native", (_EXPORT,))).tick()
        return None
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not _plain(*tensors):
        _unusual(*tensors).tick()
        return None
    facts = _facts(token, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    modes, epoch = _modes(), _calls.epoch
    strided = all([x.layout is torch.strided for x in tensors])
    alike = _calls.find(facts, *tensors, modes=modes) if strided else None
    if alike is not None and (alike.unless is None or not alike.unless()) and (alike.run is None or _undisturbed()):
        alike.tick()
        return alike.run(*tensors) if alike.run else None
    alike = _calls.find((token,), query) if strided else None
    if alike is not None:
        alike.tick()
        return None
    call = Call(*_fields(token, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    call = call._replace(captured=jit.capturing())
    keeps = strided and not call.captured
    counted = _decided.get(call) or _remember(call, epoch)
    if counted.routed:  # but for a dense bias, which the policy may take, they can only take a call away from fa4
        call = call._replace(circumstances=_circumstances(query, key, value, attn_mask))
        if call.circumstances != _ORDINARY:
            counted = _decided.get(call) or _remember(call, epoch)
        if call.circumstances not in (_ORDINARY, _DENSE_BIAS):
            counted.tick()
            return None
    counted.tick()
    if not counted.routed:
        if keeps and call in _decided:
            _keep_left(call, counted, facts, modes, epoch, *tensors)
        return None
    out = _by_op(query, key, value, attn_mask, is_causal, scale)
    if keeps and out is not None and private.in_memory(*tensors) and _undisturbed() and private.nothing_changes_ops():
        run = attention.prepared(*tensors, needs_grad=out.requires_grad, is_causal=is_causal, scale=scale)
        unless = torch.cuda.is_current_stream_capturing if counted.codes == (HOST_DECIDES,) else None
        alike = Alike(private.same_tensors(*tensors), facts, run, counted.tick, modes, unless)
        _calls.keep(alike, epoch, *tensors, modes=modes)
    return out


def _keep_left(
    call: Call, counted: Tally, facts: tuple[Any, ...], modes: tuple[bool, bool], epoch: int, *tensors: Tensor
) -> None:
    """Keep calls like one that is torch's: by their query where that alone makes them so, as in a model that generates
    text, whose keys are others with every token. But not while each call is to be told of."""
    query, token = tensors[0], call.token
    told = record.is_on() or log.isEnabledFor(logging.DEBUG)
    if not told and left_by_query(call.query, counted.codes, Target.of(call.device), policy_of(token)):
        alike = Alike(private.same_tensors(query), (token,), None, counted.tick, by_query=token)
        _calls.keep(alike, epoch, query)
        return
    unless = None
    if counted.codes == ("below_crossover",) and decide_call(call._replace(captured=True)).routed:
        # In a CUDA graph the policy routes it, where the host's time counts for nothing. Its kernels are made ready
        # now, as they cannot be in a capture.
        unless = torch.cuda.is_current_stream_capturing
    alike = Alike(private.same_tensors(*tensors), facts, None, counted.tick, modes, unless)
    _calls.keep(alike, epoch, *tensors, modes=modes)


def _by_op(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """The call through ``fa4::attention_fwd``; None if its first launch fails, which is said, and never comes again."""
    try:
        if attn_mask is None:
            return _fa4(query, key, value, is_causal=is_causal, scale=scale)[0]
        with masks.in_eager_mode():
            return _fa4(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)[0]
    except KernelUnavailable:
        return None


def _plain(*tensors: Tensor) -> bool:
    return all((type(x) is Tensor or type(x) is Parameter) and not x.is_nested for x in tensors)


def _fields(
    token: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Any, ...]:
    """The fields of a Call in ordinary circumstances."""
    return (
        token,
        query.shape,
        key.shape,
        value.shape,
        query.device,
        query.dtype,
        None if attn_mask is None else attn_mask.dtype,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        torch.are_deterministic_algorithms_enabled(),
    )


def _circumstances(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Circumstances:
    strided = query.layout is key.layout is value.layout is torch.strided
    fits = attn_mask is None or _mask_fits(attn_mask, query, key)
    return Circumstances(
        private.sdp_flags(),
        private.transform_active(),
        private.forward_ad_active(),
        private.tracing(),
        query.device == key.device == value.device,
        query.dtype == key.dtype == value.dtype,
        strided,
        strided and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1,
        fits,
        attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled(),
        fits and attn_mask is not None and is_dense(attn_mask, (*query.shape[:3], key.shape[2])),
    )


def _mask_fits(attn_mask: Tensor, query: Tensor, key: Tensor) -> bool:
    if attn_mask.layout is not torch.strided or attn_mask.device != query.device or query.dim() != 4 or key.dim() != 4:
        return False
    return mask_fits(attn_mask.shape, (*query.shape[:3], key.shape[2]))


def _remember(call: Call, epoch: int) -> Tally:
    decision = decide_call(call)
    _say_once(call, decision)
    record.note("eager", call)
    counted = tally("eager", decision)
    if len(_decided) >= _CACHED_CALLS:
        _decided.clear()
    if not any(reason.code in _PASSING for reason in decision.reasons):
        _decided[call] = counted
        if epoch != _calls.epoch:  # a kernel became ready, or failed, meanwhile
            _decided.pop(call, None)
    return counted


def _unusual(*tensors: Tensor) -> Tally:
    return _unusual_tally(tuple(map(type, tensors)), any(x.is_nested for x in tensors))


@functools.lru_cache(maxsize=256)
def _unusual_tally(types: tuple[type, ...], nested: bool) -> Tally:
    return tally("eager", Decision("native", _unusual_types(types, nested)))


def _unusual_types(types: tuple[type, ...], nested: bool) -> tuple[Reason, ...]:
    """Why tensors of these types stay with torch; empty if they are plain tensors."""
    reasons = []
    if nested:
        reasons.append(Reason("nested", "a nested tensor"))
    for tensor_type in dict.fromkeys(types):
        if private.is_fake(tensor_type):
            text = f"a {tensor_type.__name__}: the call is traced, or made for its shapes only"
            reasons.append(Reason("tracing", text))
        elif tensor_type is not Tensor and tensor_type is not Parameter:
            reasons.append(Reason("tensor_subclass", f"a {tensor_type.__name__}, which is a subclass of Tensor"))
    return tuple(reasons)


_EXPORT = Reason("tracing", "torch.export is recording")


def _call(token: str, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Call:
    """The whole call, as it looks before autocast has cast its inputs."""
    dtypes = [private.autocast_dtype(x) or x.dtype for x in (query, key, value)]
    mask = options[0]
    now = _circumstances(query, key, value, mask)._replace(one_dtype=len(set(dtypes)) == 1)
    call = Call(*_fields(token, query, key, value, *options))._replace(dtype=dtypes[0], circumstances=now)
    return call if mask is None else call._replace(mask=private.autocast_dtype(mask) or mask.dtype)


# ---- the decision ----------------------------------------------------------------------------------------------------


def decide_call(call: Call, *, in_graph: bool = False, act: bool = True, detail: bool = False) -> Decision:
    """Where a call goes, with every reason of a refusal.

    Args:
        in_graph: the call is traced into a graph, which must be able to run whenever it is called.
        act: load, compile or have compiled what the call needs; if False, only tell what would happen.
        detail: as of policy.decide.
    """
    reasons = (*_against_circumstances(call.circumstances), *_against_shapes(call))
    if any(len(shape) != 4 for shape in (call.query, call.key, call.value)):
        return Decision("native", reasons)  # no spec can be made of it
    spec, target, policy = _spec(call), Target.of(call.device), policy_of(call.token)
    decision = decide(spec, target, policy, detail=detail, in_graph=in_graph or call.captured)
    if reasons:
        return Decision("native", reasons if decision.routed else (*reasons, *decision.reasons))
    if not decision.routed:
        return decision
    how = policy.jit or "background"
    bound = in_graph or call.deterministic or call.needs_grad and private.saved_tensors_are_hooked()
    if how == "background" and bound:  # what runs later is to be as it is now
        how = "block"
    absent = jit.missing(launch.keys(spec, target), how, act=act)
    return decision if absent is None else Decision("native", (absent,))


def _spec(call: Call) -> AttentionSpec:
    batch, num_heads, seqlen_q, head_dim = call.query
    return AttentionSpec(
        call.dtype,
        batch,
        num_heads,
        call.value[1],
        seqlen_q,
        call.value[2],
        head_dim,
        call.value[3],
        call.is_causal,
        mask_kind(call.mask),
        call.dropout_p,
        call.scale,
        call.needs_grad,
        call.deterministic,
        call.circumstances.rows_contiguous,
        dense_bias=call.circumstances.dense_bias,
    )


_SDP_NAMES = ("flash", "mem_efficient", "math", "cudnn")


def _against_circumstances(now: Circumstances) -> list[Reason]:
    """Why a call stays with torch here and now; what its kernel needs of the strides is the policy's to say."""
    reasons = []
    if not all(now.sdp_flags):
        off = ", ".join(name for name, enabled in zip(_SDP_NAMES, now.sdp_flags, strict=True) if not enabled)
        reasons.append(Reason("sdp_backends", f"SDPA's backends were narrowed: {off} disabled"))
    if now.in_transform:
        reasons.append(Reason("transform", "a torch.func transform is open"))
    if now.in_forward_ad:
        reasons.append(Reason("forward_ad", "a forward-mode AD level is open, and fa4 has no forward derivative"))
    if now.in_trace:
        reasons.append(Reason("tracing", "jit.trace, make_fx or torch.export is recording"))
    if not now.one_device:
        reasons.append(Reason("devices", "query, key and value are not on one device"))
    if not now.one_dtype:
        reasons.append(Reason("dtypes", "query, key and value are not of one dtype"))
    if not now.strided:
        reasons.append(Reason("layout", "query, key or value is sparse or of another layout without strides"))
    if not now.mask_fits:
        text = "attn_mask is sparse, on another device, or does not broadcast from 2 to 4 dimensions to (B, H, Sq, Sk)"
        reasons.append(Reason("mask_shape", text))
    if now.mask_needs_grad:
        reasons.append(Reason("mask_gradient", "attn_mask requires a gradient, and fa4 gives none of it"))
    return reasons


def _against_shapes(call: Call) -> list[Reason]:
    """What torch may refuse, or serve with its own broadcasting: its kernel and its words, not ours."""
    shapes = query, key, value = call.query, call.key, call.value
    if any(len(shape) != 4 for shape in shapes):
        return [_shapes("not_4d", "only (B, H, S, D) inputs are routed", shapes)]
    if any(isinstance(size, int) and size == 0 for shape in shapes for size in shape):
        return [_shapes("empty", "a size is 0", shapes)]
    same = private.equal
    agree = same(query[0], key[0]) and same(query[3], key[3]) and all(map(same, key[:3], value[:3]))
    if call.mask is not None and call.is_causal:
        return [Reason("mask_and_causal", "attn_mask and is_causal together, which some releases of torch refuse")]
    if not agree or not (same(query[1], key[1]) or call.enable_gqa and same(query[1] % key[1], 0)):
        return [_shapes("shapes", "shapes disagree, or broadcast, or head counts differ without enable_gqa", shapes)]
    return []


def _shapes(code: str, what: str, shapes: tuple[torch.Size, torch.Size, torch.Size]) -> Reason:
    return Reason(code, f"{what}: {', '.join(str(tuple(shape)) for shape in shapes)}")


_said: set[str] = set()


def _say_once(call: Call, decision: Decision) -> None:
    if log.isEnabledFor(logging.DEBUG):
        text = f"{_in_words(call)} -> {decision}"
        if text not in _said:
            _said.add(text)
            log.debug("%s", text)


def _in_words(call: Call) -> str:
    shapes = " ".join("x".join(map(str, shape)) for shape in (call.query, call.key, call.value))
    options = [name for name in ("is_causal", "enable_gqa", "needs_grad") if getattr(call, name)]
    return f"{call.dtype} {call.device} {shapes}" + "".join(f" {name}" for name in options)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def routed_in_graph(token: str, exporting: bool, types: tuple[type, ...], arguments: dict[str, Any]) -> bool:
    """Whether Dynamo, tracing under ``token``, is to put fa4 into its graph for one call.

    Args:
        exporting: whether the graph is to be exported.
        types: of query, key, value and attn_mask if there is one, as the traced program sees them.
        arguments: SDPA's, by name: fake tensors, SymInts, constants, or ``private.unknown``.
    """
    decision = Decision("native", (_EXPORT,)) if exporting else _decide_in_graph(token, types, **arguments)
    tally("compiled", decision).tick()
    return decision.routed


_IN_GRAPH: dict[str, Any] = {  # what may stand in a graph for these arguments; others are torch's to judge
    "attn_mask": (Tensor, type(None)),
    "dropout_p": (float, int),
    "is_causal": bool,
    "scale": (float, int, torch.SymFloat, torch.SymInt, type(None)),
    "enable_gqa": bool,
}


def _decide_in_graph(
    token: str, types: tuple[type, ...], query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Decision:
    unclear = [name for name, kinds in _IN_GRAPH.items() if not isinstance(options[name], kinds)]
    if unclear:
        return Decision("native", (Reason("dynamic_argument", f"not constant in the graph: {', '.join(unclear)}"),))
    given = [query, key, value] if options["attn_mask"] is None else [query, key, value, options["attn_mask"]]
    unusual = _unusual_types(types, any(x.is_nested for x in given))
    if unusual:
        return Decision("native", unusual)
    if not isinstance(options["scale"], float):
        options["scale"] = None  # one that is symbolic is handed on to the op, and decides nothing
    call = _call(token, query, key, value, *(options[name] for name in _IN_GRAPH))
    call = call._replace(circumstances=call.circumstances._replace(in_trace=False))  # of the compiler's own
    try:
        decision = decide_call(call, in_graph=True)
    except private.data_dependent_error() as error:
        decision = Decision("native", (Reason("unbacked_size", f"depends on a size known only at run time: {error}"),))
    _say_once(call, decision)
    record.note("compiled", call)
    return decision


def fa4_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    autocast: tuple[torch.dtype | None, ...],
) -> Tensor:
    """What Dynamo traces in place of a routed call; ``autocast`` has the dtype to cast each tensor to, if any."""
    query, key, value = (x if to is None else x.to(to) for x, to in zip((query, key, value), autocast[:3], strict=True))
    if attn_mask is None:
        return torch.ops.fa4.attention_fwd(query, key, value, is_causal=is_causal, scale=scale, version=VERSION)[0]
    attn_mask = attn_mask if autocast[3] is None else attn_mask.to(autocast[3])
    return torch.ops.fa4.attention_fwd(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, version=VERSION
    )[0]


def routes(token: str) -> bool:
    """Whether calls may be routed under this token at all."""
    return token != OFF


# ---- what the user can ask -------------------------------------------------------------------------------------------


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Decision:
    """What would happen to this SDPA call, made here and now, and every reason why; nothing runs.

    Takes the arguments of ``torch.nn.functional.scaled_dot_product_attention`` and looks at everything that the
    call itself would be decided by: the policy that holds in this thread, autocast, the enabled SDPA backends,
    open transforms, whether gradients are needed. ``print`` it, or read ``.routed`` and ``.reasons``.
    """
    token = current_token()
    others = conflicts()
    given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    unusual = _unusual_types(tuple(map(type, given)), any(x.is_nested for x in given))
    off = () if routes(token) else (Reason("off", "routing is off here: fa_sdpa.enable() turns it on"),)
    if unusual or off:
        return Decision("native", (*off, *unusual, *others))
    call = _call(token, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    decision = decide_call(call, act=False, detail=True)
    return decision._replace(reasons=(*decision.reasons, *others))


def conflicts() -> tuple[Reason, ...]:
    """Others that are at work on SDPA in this process, and what that means."""
    impl = private.active_flash_impl()
    if impl is None:
        return ()
    text = f"torch's flash attention is replaced by {impl!r}: calls that fa_sdpa leaves to torch may run there"
    return (Reason("other_flash_impl", text),)
