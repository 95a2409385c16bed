"""``enable`` and ``disable``: as calls they set the process, as blocks one thread. Torch is changed only while
something is on."""

from __future__ import annotations

import dis
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from . import _torch_private as private
from . import router
from .kernels import jit
from .policy import Policy
from .state import OFF, current_token, process, thread, token_of, traced_token

_NOT_TRACEABLE = "in compiled code, fa_sdpa.enable() and disable() must be the expression of a with statement"


class _Block:
    """Sets the thread's token while it is open; it may be opened again inside itself, and in other threads."""

    _keeps_handlers = True

    def __init__(self, token: str) -> None:
        self._token = token
        self._outer_traced: list[str] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            _open_trace()
            self._outer_traced.append(thread.traced)
            thread.traced = self._token
        else:
            _installation.open_block(self, self._token)
            thread.outer.append(thread.token)
            thread.token = self._token

    def __exit__(self, *exc: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            thread.traced = self._outer_traced.pop()
        else:
            thread.token = thread.outer.pop()
            _installation.close_block(self._token)


class _Setting(_Block):
    """Sets the process's token when it is made, unless it is made to be entered as a block."""

    def __init__(self, token: str) -> None:
        super().__init__(token)
        if torch.compiler.is_dynamo_compiling():
            if not _traced_before_with():
                torch._dynamo.graph_break(msg=_NOT_TRACEABLE)
        elif not _followed_by_with(sys._getframe(2)):
            _installation.set_process(self, token)


class enable(_Setting):
    """Route SDPA calls by ``policy``::

        fa_sdpa.enable()                     # from here on, in every thread
        with fa_sdpa.enable("always"): ...   # in this block, in this thread

    The innermost open block of a thread wins, then the last call. The backward pass of what ran in a block, and the
    recomputation of its checkpoints, behave as the forward did, also after the block was left. Inside a compiled
    function only the with-block can be traced.

    The first time, and the first time after a call of ``disable()``, all that Dynamo has compiled is dropped and will
    be compiled anew: not to be done while another thread runs compiled code. From then on, code is compiled once for
    each state it runs in. To switch often, use blocks.

    Args:
        policy: "auto" (where fa4 was measured faster), "always" (wherever a kernel runs the call), "never", each with
            the ``jit`` that FA_SDPA_JIT names or its default, or a ``Policy``.

    Raises:
        ValueError: ``policy`` is none of these.
        RuntimeError: a private part of torch that routing stands on has moved; the message names it.
    """

    def __init__(self, policy: str | Policy = "auto") -> None:
        super().__init__(token_of(policy))


class disable(_Setting):
    """Leave SDPA calls to torch: from here on, in every thread, or as a block in one thread. See ``enable``.

    The call restores torch exactly: its dispatch table, Dynamo's handlers, checkpoint. So make it while no other
    thread is inside an SDPA call, which torch's dispatcher can't stand; a block may be entered and left at any time.
    Where another thread's block is open, the call only sets the state: call it again after that block.
    """

    def __init__(self) -> None:
        super().__init__(OFF)


def is_enabled() -> bool:
    """Whether SDPA calls made here, in this thread, may be routed."""
    return router.routes(current_token())


def enable_from_environment() -> None:
    """Obey FA_SDPA: 0 (off), 1 or auto, always, never; and FA_SDPA_JIT, see ``Policy``. Warns, and changes nothing,
    where it can't."""
    value = os.environ.get("FA_SDPA", "").strip().lower()
    if value in ("", "0"):
        return
    try:
        enable("auto" if value == "1" else value)
    except Exception as error:  # an import must not break by an environment variable
        warnings.warn(f"FA_SDPA={value!r} has no effect: {error}", stacklevel=2)


# ---- with-blocks and calls -------------------------------------------------------------------------------------------

# A setting that is about to be entered must not set the process for a moment first: another thread could see it.
_WITH = {dis.opmap[name] for name in ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL") if name in dis.opmap}
_FILLERS = {dis.opmap[name] for name in ("CACHE", "COPY") if name in dis.opmap}


def _followed_by_with(frame: FrameType) -> bool:
    """Whether the call that ``frame`` is making is the expression of a with statement."""
    code = frame.f_code.co_code
    at = frame.f_lasti + 2
    while at < len(code) and code[at] in _FILLERS:
        at += 2
    return at < len(code) and code[at] in _WITH


@private.constant_while_tracing
def _traced_before_with() -> bool:
    """The same for the call that Dynamo, which runs this, is tracing."""
    return private.traced_opcode(outside=__file__) in _WITH


@private.constant_while_tracing
def _open_trace() -> None:
    """Dynamo runs this where it traces the entering of a block: from there on it needs its handlers."""
    private.while_this_trace_lasts(_installation.open_trace, _installation.close_trace)


class _Recomputation(_Block):
    """Torch's own doing, perhaps after disable(): it leaves nothing behind."""

    _keeps_handlers = False


class _Bound:
    """A checkpoint's function, tied to the token of the forward pass."""

    def __init__(self, function: Callable[..., Any], token: str) -> None:
        self._function, self._token = function, token

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Recomputation(self._token):
            return self._function(*args, **kwargs)


def _bind(function: Callable[..., Any]) -> Callable[..., Any]:
    return _Bound(function, current_token())


def _bind_off(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tie a function whose forward ran while nothing was installed; one that is tied already stays as it is."""
    return function if isinstance(function, _Bound) else _Bound(function, OFF)


# ---- what is installed in torch --------------------------------------------------------------------------------------


class _Installation:
    """Counts who needs the parts of ``_torch_private``, puts them in for the first and takes them out after the last.

    Two things stay when the last block is left, until ``disable()`` is called:

    - Dynamo's handlers. They cost nothing at run time, and while they are there all code is guarded by the state it is
      traced under, on or off, so that going in and out of blocks compiles nothing twice. Code compiled without them has
      no such guard: it is dropped when they come in.
    - Everything, if the process has other threads. Torch's dispatcher may crash a call if its kernel is taken out in
      another thread at that moment. An idle kernel costs each SDPA call 2 µs.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._override = private.Override(router.sdpa, router.sdpa_of_nested)
        self._checkpoint = private.CheckpointBinding(_bind, _bind_off)
        self._handlers = private.DynamoHandlers(
            current_token, traced_token, router.routes, router.routed_in_graph, router.fa4_in_graph
        )
        self._users = 0  # open blocks that are on, and the process if it is
        self._installed = False
        self._traces = 0  # traces at work with a block in them
        self._keep_handlers = False  # since the first user, until disable() is called
        self._forget_due = False  # there may be code compiled without the handlers
        self._last_call: tuple[_Setting | None, str] = None, OFF  # and the token that it replaced

    def set_process(self, setting: _Setting, token: str) -> None:
        with self._lock:
            before = process.token
            self._set_process(token)
            self._last_call = setting, before
            if token == OFF:
                self._keep_handlers = False
                self._uninstall_if_idle()
        self._forget_if_due()

    def open_block(self, block: _Block, token: str) -> None:
        with self._lock:
            setting, before = self._last_call
            if block is setting:  # it was made for a block after all
                self._set_process(before)
                self._last_call = None, OFF
            if token != OFF:
                self._add_user(block._keeps_handlers)
        self._forget_if_due()

    def close_block(self, token: str) -> None:
        with self._lock:
            if token != OFF:
                self._drop_user()

    def open_trace(self) -> None:
        with self._lock:
            if not self._handlers.installed:
                self._handlers.install()
            self._traces += 1

    def close_trace(self) -> None:
        with self._lock:
            self._traces -= 1
            self._drop_handlers_if_idle()

    def _set_process(self, token: str) -> None:
        if token != OFF and process.token == OFF:
            self._add_user()
        elif token == OFF and process.token != OFF:
            self._drop_user()
        process.token = token

    def _add_user(self, keep_handlers: bool = True) -> None:
        if not self._installed:
            self._install()
        self._users += 1
        self._keep_handlers = self._keep_handlers or keep_handlers

    def _drop_user(self) -> None:
        self._users -= 1
        if _alone():
            self._uninstall_if_idle()

    def _install(self) -> None:
        dynamo_may_have_compiled = "torch._dynamo" in sys.modules
        private.require()
        if not self._keep_handlers:  # where they are nevertheless there, a trace of this moment needs them
            if not self._handlers.installed:
                self._handlers.install()
            self._forget_due = dynamo_may_have_compiled
        jit.preload()
        router.take_native_kernel()
        self._override.install()
        self._checkpoint.install()
        self._installed = True

    def _uninstall_if_idle(self) -> None:
        if self._installed and not self._users:
            self._override.uninstall()
            self._checkpoint.uninstall()
            self._installed = False
        self._drop_handlers_if_idle()

    def _forget_if_due(self) -> None:
        """Not under our lock: this waits for a compilation at work in another thread, which may wait for our lock."""
        if self._forget_due:
            self._forget_due = False
            private.forget_compiled_code()

    def _drop_handlers_if_idle(self) -> None:
        if self._handlers.installed and not (self._keep_handlers or self._installed or self._traces):
            self._handlers.uninstall()


def _alone() -> bool:
    """Whether no other thread of Python's can be inside an SDPA call."""
    return threading.active_count() - jit.threads_alive() == 1


_installation = _Installation()
for _class in (_Block, _Setting, enable, disable):
    for _name in {"__init__", "__enter__", "__exit__"} & vars(_class).keys():
        private.leave_frame_to_python(vars(_class)[_name], and_its_callees=True)
private.leave_frame_to_python(_Bound.__call__, and_its_callees=False)
