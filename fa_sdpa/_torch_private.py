"""Every private part of torch that the router stands on, and nothing else.

Tested on torch 2.11.0, 2.13.0 and 2.15.0 (see ``TESTED``). ``require()`` looks for each part before anything is
installed, so that a torch that moved one is refused by name instead of failing somewhere inside a model.
"""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

TESTED = ("2.11", "2.13", "2.15")  # the last one is the newest

OP = "aten::scaled_dot_product_attention"

_PARTS = {
    "torch._C._dispatch_has_kernel_for_dispatch_key": "whether the op can be overridden",
    "torch._C._get_flash_sdp_enabled": "the user's choice of SDPA backends",
    "torch._C._get_mem_efficient_sdp_enabled": "the user's choice of SDPA backends",
    "torch._C._get_math_sdp_enabled": "the user's choice of SDPA backends",
    "torch._C._get_cudnn_sdp_enabled": "the user's choice of SDPA backends",
    "torch._C._functorch.peek_interpreter_stack": "torch.func transforms",
    "torch._C._dynamo.guards.TensorGuards": "calls that are alike",
    "torch._C._AutoDispatchBelowAutograd": "autograd of the ops",
    "torch.autograd.forward_ad._current_level": "forward-mode AD",
    "torch._C._get_tracing_state": "torch.jit.trace",
    "torch._C._autograd._top_saved_tensors_default_hooks": "checkpoints whose forward is under way",
    "torch._C._get_dispatch_mode": "make_fx",
    "torch._C._TorchDispatchModeKey.PROXY": "make_fx",
    "torch._C._get_deterministic_algorithms": "what a call is decided by",
    "torch._C._len_torch_dispatch_stack": "modes that see every op",
    "torch._C._autograd._profiler_enabled": "profilers that see every op",
    "torch._C._FunctionBase.apply": "autograd of eager calls",
    "torch._guards._TLS": "a compiler at work in this thread",
    "torch._C._dynamo.eval_frame.set_code_exec_strategy": "frames that Dynamo leaves alone",
    "torch._C._dynamo.eval_frame._FrameExecStrategy": "frames that Dynamo leaves alone",
    "torch._C._dynamo.eval_frame._FrameAction.SKIP": "frames that Dynamo leaves alone",
    "torch._dynamo.reset_code_caches": "code that was compiled before routing",
    "torch._dynamo.source.CallFunctionNoArgsSource": "guards",
    "torch._dynamo.source.AttrSource": "guards",
    "torch._dynamo.guards.GuardBuilder.EQUALS_MATCH": "guards",
    "torch._dynamo.guards.install_guard": "guards",
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx": "blocks entered in a compiled function",
    "torch._dynamo.variables.functions.UserFunctionVariable": "Dynamo's handlers",
    "torch._dynamo.variables.torch.TorchInGraphFunctionVariable._get_handlers": "Dynamo's handlers",
    "torch._dynamo.trace_rules._force_inline": "Dynamo's handlers",
    "torch.utils.checkpoint._CheckpointFrame": "checkpoint's recomputation",
    "torch.utils.checkpoint.CheckpointFunction": "checkpoint's recomputation",
    "torch.library.get_kernel": "the kernel that was there before",
}


def _newer_than_tested() -> bool:
    release = [int(part) for part in torch.__version__.split(".")[:2]]
    return release > [int(part) for part in TESTED[-1].split(".")]


def missing() -> tuple[str, ...]:
    """The parts that this torch lacks, each with what it is for. Imports ``torch._dynamo``."""
    return tuple(f"{path} ({purpose})" for path, purpose in _PARTS.items() if not _exists(path))


def require() -> None:
    """Raise RuntimeError, naming each part that has moved, if routing can't work on this torch. Where all are there,
    a torch newer than the tested ones gets a warning."""
    gone = missing()
    if gone:
        raise RuntimeError(
            f"fa_sdpa can't route on torch {torch.__version__}: these private parts have moved: {', '.join(gone)}. "
            f"It was tested on torch {', '.join(TESTED)}; a newer fa_sdpa may know this torch."
        )
    if _newer_than_tested():
        warnings.warn(f"fa_sdpa was tested on torch {', '.join(TESTED)}, not on {torch.__version__}", stacklevel=2)


def _exists(path: str) -> bool:
    names = path.split(".")
    found: Any = torch
    try:
        for depth, name in enumerate(names[1:], start=1):
            if not hasattr(found, name):
                importlib.import_module(".".join(names[: depth + 1]))
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    return True


# ---- what the router asks torch about a call -------------------------------------------------------------------------

# Nothing here may fail when it is imported: what has moved is for require() to tell.
compiler = getattr(
    torch._guards, "_TLS", None
)  # its tracing_context is there, and not None, while this thread compiles

unknown = object()  # stands for an argument whose value is not known while a graph is traced


def sdp_flags() -> tuple[bool, bool, bool, bool]:
    """The user's enable flags: flash, memory-efficient, math, cuDNN."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def fused_choice(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, enable_gqa: bool) -> str:
    """The backend that torch's SDPA takes for a call without mask and dropout, as the flags are now: its name in
    SDPBackend, or "UNKNOWN" where torch does not tell."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "UNKNOWN"
    choice = choose(query, key, value, None, 0.0, is_causal, scale=None, enable_gqa=enable_gqa)
    return torch.nn.attention.SDPBackend(choice).name


def transform_active() -> bool:
    """Whether a torch.func transform (grad, jvp, functionalize …) is open."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def saved_tensors_are_hooked() -> bool:
    """Whether hooks see what autograd saves, as in the forward of a checkpoint, which must be repeated just so."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


below_autograd: Any = getattr(
    torch._C, "_AutoDispatchBelowAutograd", None
)  # a block in which ops skip their Autograd kernels


def forward_ad_active() -> bool:
    """Whether a forward-mode AD level is open."""
    return torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether jit.trace, make_fx or an exporter is recording this thread's calls."""
    return torch._C._get_tracing_state() is not None or _proxy_mode() is not None


def nothing_changes_ops() -> bool:
    """Whether no mode (TorchDispatchMode, fake tensors, make_fx), transform, forward-mode level or trace is at work on
    the ops that are called in this thread."""
    c = torch._C
    return (
        not c._len_torch_dispatch_stack()
        and c._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and c._get_tracing_state() is None
    )


def modes_open() -> bool:
    """Whether a mode sees the ops that are called in this thread: TorchDispatchMode, fake tensors, make_fx."""
    return _C._len_torch_dispatch_stack() != 0


_C, _autograd, _forward_ad = torch._C, getattr(torch._C, "_autograd", None), torch.autograd.forward_ad


def nothing_sees_ops() -> bool:
    """Of calls for which ``same_tensors`` holds: whether no mode, forward-mode level or profiler is at work."""
    return (
        _forward_ad._current_level < 0 and not _C._len_torch_dispatch_stack() and not _autograd._profiler_enabled()  # type: ignore[union-attr]
    )


def undisturbed() -> bool:
    """Of calls for which ``same_tensors`` holds: whether SDPA's backends are all on, and no mode, forward-mode level,
    profiler or compiler is at work. The rest of what a call depends on shows in its tensors."""
    return (
        _C._get_flash_sdp_enabled()
        and _C._get_mem_efficient_sdp_enabled()
        and _C._get_math_sdp_enabled()
        and _C._get_cudnn_sdp_enabled()
        and _forward_ad._current_level < 0
        and not _C._len_torch_dispatch_stack()
        and not _autograd._profiler_enabled()  # type: ignore[union-attr]
        and compiler.__dict__.get("tracing_context") is None
    )


def same_tensors(*tensors: torch.Tensor) -> Callable[..., bool]:
    """A check, in one C++ call, whether others are like these: of the same type, dtype, device, sizes and strides, with
    gradients or not, and dispatched alike. So a torch.func transform, jit.trace, inference mode or autocast that was
    not there, a tensor that is negated by a flag, or a functorch level that is over, make it False. Not all modes do.

    It keeps no tensor alive. To be called with as many tensors, none of them nested, which would end the process.
    """
    firsts = repeated(tensors)
    distinct = sorted(set(firsts))  # the C++ check refuses a tensor that comes twice
    check = torch._C._dynamo.guards.TensorGuards(
        *(tensors[i] for i in distinct), dynamic_dims_sizes=None, dynamic_dims_strides=None
    ).check
    if len(distinct) == len(tensors):
        return check
    return lambda *given: repeated(given) == firsts and check(*(given[i] for i in distinct))


def repeated(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    """For each of them, which is the first that is the same object."""
    places: dict[int, int] = {}
    return tuple(places.setdefault(id(x), i) for i, x in enumerate(tensors))


def in_memory(*tensors: torch.Tensor) -> bool:
    """Whether plain tensors are in memory as they are: not negated by a flag, wrapped by a functorch level that is
    over, or made without memory, all of which the dispatcher would see to."""
    try:
        return all(x.data_ptr() for x in tensors) and not any(x.is_neg() for x in tensors)
    except RuntimeError:
        return False


is_grad_enabled = torch.is_grad_enabled
# torch.are_deterministic_algorithms_enabled without a frame of Python.
is_deterministic: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)

# torch.cuda.current_device without what it does for a process that has not initialised CUDA.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


# torch.cuda.current_stream(device).cuda_stream without the object.
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)


def empty_strided_cuda(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty_strided on the current CUDA device in a third of its time: what compiled graphs allocate with."""
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


if hasattr(torch._C, "_dynamo"):
    empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", empty_strided_cuda)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls outside of torch.func, which it need not look for again."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _proxy_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)


def equal(a: Any, b: Any) -> bool:
    """a == b for sizes; False where one is known only at run time."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a == b)


def data_dependent_error() -> type[Exception]:
    """What a comparison raises with a size that is known only at run time."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return GuardOnDataDependentSymNode


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast this input of SDPA now; None if it leaves it alone."""
    device = tensor.device.type
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def active_flash_impl() -> str | None:
    """The flash attention implementation that the user put in place of torch's own, if any."""
    return torch.nn.attention.current_flash_attention_impl()


def is_fake(tensor_type: type) -> bool:
    """Whether tensors of this type only stand for others while something traces."""
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return issubclass(tensor_type, (FakeTensor, FunctionalTensor))


# ---- eager: the dispatcher -------------------------------------------------------------------------------------------

# call_boxed wants the call's dispatch keys; a composite kernel, which SDPA's is, does not look at them.
KEYSET = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeImplicitAutograd)


class Override:
    """Replaces SDPA's CompositeImplicitAutograd kernel: reached by Python and C++ callers, after autocast's kernel
    and before autograd's, so that both stay torch's own.

    Args:
        kernel: serves calls in which no tensor is nested.
        of_nested: serves those in which one is, the mask or a subclass included. Telling them apart by the dispatcher
            is free.
    """

    def __init__(self, kernel: Callable[..., torch.Tensor], of_nested: Callable[..., torch.Tensor]) -> None:
        self._kernels = {"CompositeImplicitAutograd": kernel, "CompositeImplicitAutogradNestedTensor": of_nested}
        self._library: torch.library.Library | None = None

    def install(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(Warning only once for all operators|Overriding a previously)")
            for key, kernel in self._kernels.items():
                leave_frame_to_python(kernel, and_its_callees=True)
                self._library.impl(OP, kernel, key, allow_override=True)
        self._in_use = [torch.library.get_kernel(OP, key) for key in ("Undefined", "NestedTensorCPU")]

    def uninstall(self) -> None:
        """Take the kernel out, but keep it alive: another thread may be running it."""
        assert self._library is not None
        self._library._destroy()
        self._library = None


def native_kernel() -> Callable[..., torch.Tensor]:
    """Torch's own SDPA, called with KEYSET and the op's arguments. To be taken while no Override is installed."""
    return torch.library.get_kernel(OP, "Undefined").call_boxed


def leave_frame_to_python(function: Callable[..., Any], *, and_its_callees: bool) -> None:
    """Keep Dynamo from compiling this function's frames where a graph broke; tracing into it is not affected."""
    if not _exists("torch._C._dynamo.eval_frame.set_code_exec_strategy"):
        return  # require() tells
    frames = torch._C._dynamo.eval_frame
    action = frames._FrameAction
    recursive = action.SKIP if and_its_callees else action.DEFAULT
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action.SKIP, recursive))


# ---- torch.compile: Dynamo -------------------------------------------------------------------------------------------


def constant_while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo run ``function`` when it traces a call of it, and take the result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def while_this_trace_lasts(enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """Call ``enter`` now and ``leave`` when Dynamo is done with the graph it is tracing."""
    enter()
    _translator().output.add_cleanup_hook(leave)


def traced_opcode(outside: str) -> int:
    """The instruction that Dynamo will trace next in the innermost traced function that is neither in the file
    ``outside`` nor one of Dynamo's own."""
    dynamo = os.path.dirname(torch._dynamo.__file__)
    frame = _translator().output.current_tx
    while frame.f_code.co_filename == outside or frame.f_code.co_filename.startswith(dynamo):
        frame = frame.parent
    return frame.instructions[frame.instruction_pointer].opcode


def forget_compiled_code() -> None:
    """Drop what Dynamo has compiled in this process; the caches on disk stay."""
    torch._dynamo.reset_code_caches()


def _translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx()


class DynamoHandlers:
    """Dynamo's handlers for SDPA and F.multi_head_attention_forward, there while installed.

    A handler that returns None leaves the call to Dynamo, which puts the untouched op into its graph.

    Args:
        token: the token that holds where it is called; the graph is guarded by its result on entry.
        traced_token: Dynamo traces it: the token of the innermost block in the graph, "" outside of all.
        routes: (token) → whether calls may be routed under that token at all.
        decide: (token, whether an export is traced, the types of query, key, value and attn_mask if there is one,
            SDPA's arguments by name) → whether this call is routed.
        routed: Dynamo traces it in place of a routed call: (query, key, value, attn_mask, is_causal, scale, autocast
            dtypes of the tensors).
    """

    def __init__(
        self,
        token: Callable[[], str],
        traced_token: Callable[[], str],
        routes: Callable[[str], bool],
        decide: Callable[[str, bool, tuple[type, ...], dict[str, Any]], bool],
        routed: Callable[..., torch.Tensor],
    ) -> None:
        self._token, self._traced_token = token, traced_token
        self._routes, self._decide, self._routed = routes, decide, routed
        self._installed: dict[Any, Callable[..., Any]] = {}

    @property
    def installed(self) -> bool:
        return bool(self._installed)

    def install(self) -> None:
        sdpa = torch.ops.aten.scaled_dot_product_attention
        ours: dict[Any, Callable[..., Any]] = {
            fn: self._sdpa for fn in (torch._C._nn.scaled_dot_product_attention, sdpa, sdpa.default)
        }
        ours[torch.nn.functional.multi_head_attention_forward] = self._multi_head_attention
        handlers = _dynamo_handlers()
        taken = [fn for fn in ours if fn in handlers]
        if taken:
            raise RuntimeError(f"fa_sdpa can't route compiled code: Dynamo already has a handler for {taken}")
        handlers.update(ours)
        self._installed = ours

    def uninstall(self) -> None:
        handlers = _dynamo_handlers()
        for fn in self._installed:
            del handlers[fn]
        self._installed = {}

    # Dynamo calls a handler with the variable of the function, the translator, and the arguments as variables.

    def _multi_head_attention(self, variable: Any, tx: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Inlined only where it ends in an SDPA call that fa4 may take: Dynamo can't trace all that it does else."""
        function = torch.nn.functional.multi_head_attention_forward
        try:
            call = inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            return None  # torch words the error
        call.apply_defaults()
        wants = {name: _example(call.arguments[name]) for name in ("need_weights", "key_padding_mask", "attn_mask")}
        causal = _example(call.arguments["is_causal"]) is True  # then SDPA gets no attn_mask
        if wants["need_weights"] is not False or wants["key_padding_mask"] is not None:
            return None
        if wants["attn_mask"] is not None and not causal or _exporting(tx):
            return None
        if not self._routes(self._guarded_token(tx)):
            return None
        return _inline(tx, function, args, kwargs)

    def _sdpa(self, variable: Any, tx: Any, /, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import VariableTracker

        token = self._guarded_token(tx)
        if not self._routes(token):
            return None
        try:
            variables = _SIGNATURE.bind(*args, **kwargs)
        except TypeError:
            return None  # torch words the error
        variables.apply_defaults()
        given = variables.arguments
        tensors = [given[name] for name in ("query", "key", "value")]
        if not all(isinstance(x, VariableTracker) and x.is_tensor() for x in tensors):
            return None
        _guard_sdp_flags(tx)
        examples = {name: _example(value) for name, value in given.items()}
        mask = given["attn_mask"]
        has_mask = examples["attn_mask"] is not None
        if has_mask and not (isinstance(mask, VariableTracker) and mask.is_tensor()):
            return None
        types = tuple(x.python_type() for x in ([*tensors, mask] if has_mask else tensors))
        if not self._decide(token, _exporting(tx), types, examples):
            return None
        names = ("query", "key", "value", "attn_mask") if has_mask else ("query", "key", "value")
        dtypes = tuple(autocast_dtype(examples[name]) for name in names)
        passed = (*tensors, mask, given["is_causal"], given["scale"], dtypes)
        return _inline(tx, self._routed, [_as_variable(tx, x) for x in passed], {})

    def _guarded_token(self, tx: Any) -> str:
        # Saved Dynamo code (TORCH_CACHING_PRECOMPILE=1) comes back without its guards on module globals.
        tx.output.bypass_package("fa_sdpa routes by state that a saved package does not guard")
        traced = _inline(tx, self._traced_token, (), {}).as_python_constant()
        if not traced:
            _guard_result(tx, self._token)
        return traced or self._token()


def _exporting(tx: Any) -> bool:
    return torch.compiler.is_exporting() or bool(getattr(tx, "export", False))


def _sdpa_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> None:
    """The op's signature: the Python builtin has none to inspect."""


_SIGNATURE = inspect.signature(_sdpa_signature)
_SDP_SETTERS = frozenset(
    getattr(module, name)
    for module in (torch._C, torch.backends.cuda, torch.nn.attention)
    for name in dir(module)
    if name.startswith(("_set_sdp_use_", "_sdpa_kernel")) or (name.startswith("enable_") and name.endswith("_sdp"))
)


def _dynamo_handlers() -> dict[Any, Callable[..., Any]]:
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    return TorchInGraphFunctionVariable._get_handlers()


def _inline(tx: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    from torch._dynamo.trace_rules import _force_inline
    from torch._dynamo.variables.functions import UserFunctionVariable

    with _force_inline():
        return tx.inline_user_function_return(UserFunctionVariable(function), list(args), kwargs)


def _as_variable(tx: Any, value: Any) -> Any:
    from torch._dynamo.variables import VariableTracker

    return value if isinstance(value, VariableTracker) else VariableTracker.build(tx, value)  # a default


def _example(value: Any) -> Any:
    """What stands behind a Dynamo variable: a fake tensor, a SymInt or a constant; ``unknown`` if it is none."""
    from torch._dynamo.variables import VariableTracker

    if not isinstance(value, VariableTracker):
        return value
    if value.is_python_constant():
        return value.as_python_constant()
    try:
        return value.as_proxy().node.meta["example_value"]
    except (NotImplementedError, AttributeError, KeyError):
        return unknown


def _guard_sdp_flags(tx: Any) -> None:
    """Guard the graph by the flags with which it is entered, unless the graph itself sets them."""
    if not any(node.target in _SDP_SETTERS for tracer in tx.output.tracers for node in tracer.graph.nodes):
        _guard_result(tx, sdp_flags)


def _guard_result(tx: Any, function: Callable[[], Any]) -> None:
    """Guard the graph by what a module's function returns on entry."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource

    source = CallFunctionNoArgsSource(AttrSource(tx.import_source(function.__module__), function.__name__))
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))


# ---- checkpoint ------------------------------------------------------------------------------------------------------


class CheckpointBinding:
    """Ties each checkpoint's recomputation to the state of its forward, while installed.

    Args:
        bind: (function) → the function tied to the state that holds now; asked in the forward.
        bind_off: (function) → the function tied to "off" unless it is tied already; asked before the recomputation,
            for a forward that ran while nothing was installed.
    """

    def __init__(
        self,
        bind: Callable[[Callable[..., Any]], Callable[..., Any]],
        bind_off: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._bind, self._bind_off = bind, bind_off

    def install(self) -> None:
        function, frame = _checkpoint_classes()
        bind, bind_off = self._bind, self._bind_off
        self._forward = forward = vars(function)["forward"]
        self._backward = backward = vars(function)["backward"]

        def bound_forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
            return forward.__func__(ctx, bind(run_function), *args)

        def bound_backward(ctx: Any, *grads: Any) -> Any:
            ctx.run_function = bind_off(ctx.run_function)
            return backward.__func__(ctx, *grads)

        # Non-reentrant: a frame keeps its recomputation in an attribute, which becomes a property of the class.
        def get(frame: Any) -> Callable[..., Any]:
            return bind_off(vars(frame)["recompute_fn"])

        def put(frame: Any, recompute: Callable[..., Any]) -> None:
            vars(frame)["recompute_fn"] = bind(recompute)

        function.forward, function.backward = staticmethod(bound_forward), staticmethod(bound_backward)
        frame.recompute_fn = property(get, put)

    def uninstall(self) -> None:
        function, frame = _checkpoint_classes()
        function.forward, function.backward = self._forward, self._backward
        del frame.recompute_fn


def _checkpoint_classes() -> tuple[Any, Any]:
    """Of the reentrant kind the autograd function, of the other the frame."""
    from torch.utils import checkpoint

    return checkpoint.CheckpointFunction, checkpoint._CheckpointFrame
