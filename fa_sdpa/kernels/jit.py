"""When kernels are made: whether those of a call are ready, and if not, who compiles them and what the call does.

A call is routed only to kernels that are loaded in this process. "background": what was compiled before is loaded in
the call; else the call is left to torch while another process compiles, and later calls are routed. "block": the call
waits. "never": only what was compiled before is used. While a CUDA graph is captured a call loads and compiles nothing.
A kernel that could not be made or launched is reported once and not tried again.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from ..meta.spec import Reason
from . import FAMILIES
from . import compile as compiling
from .cache import open_cache, say_once
from .compile import KernelUnavailable, loaded
from .key import KernelKey
from .worker import Worker

Jit = Literal["background", "block", "never"]
AT_ONCE = max(1, min(4, (os.cpu_count() or 2) // 2))  # processes that compile in the background

THREADS = compiling.THREADS  # how their names begin

_failed: dict[KernelKey, str] = {}  # and why
_threads: dict[KernelKey, threading.Thread] = {}  # at work
_turn = threading.BoundedSemaphore(AT_ONCE)
_lock = threading.Lock()
_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Have ``listener`` called, in any thread, whenever ``missing`` may answer otherwise than before."""
    _listeners.append(listener)


def missing(keys: Sequence[KernelKey], jit: Jit, *, act: bool = True) -> Reason | None:
    """Why a call that needs these kernels can't be routed now, None if all are loaded.

    Loads, compiles or has compiled what is missing as ``jit`` says, unless ``act`` is False: then it tells what a call
    would meet. Never raises for a kernel that can't be had.
    """
    absent = [key for key in keys if not loaded(key)]
    if not absent and not _failed:
        return None
    if not act:
        return _refused(keys) or _prospect(absent, jit)
    captured = bool(absent) and capturing()
    if not captured:
        absent = [key for key in absent if key not in _failed and not _load(key, jit)]
    refused = _refused(keys)
    if refused or not absent:
        return refused
    names = ", ".join(key.name for key in absent)
    if jit == "background":
        for key in absent:
            _start(key)
    if captured:
        return Reason("capturing", f"a CUDA graph is captured, and kernels are not ready: {names}")
    if jit == "never":
        return Reason("not_compiled", f"jit='never', and these kernels were not compiled before: {names}")
    return Reason("compiling", f"kernels are being compiled in the background: {names}")


def _refused(keys: Sequence[KernelKey]) -> Reason | None:
    for key in keys:
        if key in _failed:
            return Reason("kernel_failed", f"kernel {key.name} cannot be used: {_failed[key]}")
    return None


def _load(key: KernelKey, jit: Jit) -> bool:
    """Whether ``key`` could be loaded, or with "block" made."""
    try:
        if jit != "block":
            return key not in _threads and compiling.load(key)
        compiling.kernel(key)
        return True
    except Exception as error:
        fail(key, error)
        return False


def _prospect(absent: Sequence[KernelKey], jit: Jit) -> Reason | None:
    """What a call would meet, with nothing loaded yet. Only the compiling of kernels keeps it from fa4."""
    cold = [key for key in absent if not compiling.stored(key)]
    names = ", ".join(key.name for key in cold)
    if not cold or jit == "block":
        return None
    if jit == "never":
        return Reason("not_compiled", f"jit='never', and these kernels were not compiled before: {names}")
    running = all(key in _threads for key in cold)
    text = "are being compiled in the background" if running else "will be compiled in the background by the first call"
    return Reason("compiling", f"kernels {text}: {names}")


def kernel(key: KernelKey) -> compiling.Kernel:
    """The kernel of ``key``, compiled now if need be. Raises KernelUnavailable if it cannot be had, or in a capture."""
    if not loaded(key) and capturing():
        raise KernelUnavailable(f"kernel {key.name} is not loaded, and a CUDA graph is captured: call it once before")
    return compiling.kernel(key)


def first_launch(key: KernelKey, run: compiling.Kernel, keep: Callable[[], None]) -> compiling.Kernel:
    """``run`` for the first launch, which is the one that brings the code onto the device and finds whether it fits.

    Calls ``keep`` if it does. If not, the kernel has failed, and KernelUnavailable is raised.
    """

    def launch(*arguments: object) -> None:
        try:
            run(*arguments)
        except Exception as error:
            fail(key, error)
            raise KernelUnavailable(f"kernel {key.name} cannot be launched: {error}") from error
        keep()

    return launch


def fail(key: KernelKey, error: BaseException | str) -> None:
    """Never use ``key`` again in this process, and say so."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    _failed[key] = text
    say_once(f"kernel {key.name} cannot be used, its calls are left to torch: {text}")
    _changed()


def preload() -> None:
    """Load now what every first call would have to load, where a GPU may be called at all. Initialises no CUDA."""
    if torch.version.cuda is None or importlib.util.find_spec("tvm_ffi") is None:
        return
    try:
        compiling.preload()
        for arch in FAMILIES:
            compiling.fingerprint(arch)
    except Exception as error:  # the first call will say what it means
        say_once(f"the kernels' runtime cannot be loaded: {type(error).__name__}: {error}")


def wait(timeout: float | None = None) -> bool:
    """Wait until nothing is compiled in the background; whether that came within ``timeout`` seconds."""
    with _lock:
        threads = list(_threads.values())
    for thread in threads:
        thread.join(timeout)
    return not _threads


def threads_alive() -> int:
    """How many of Python's threads are ours; none of them ever calls torch's operators."""
    return sum(thread.name.startswith(THREADS) for thread in threading.enumerate())


def capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _changed() -> None:
    for listener in _listeners:
        listener()


# ---- in the background -----------------------------------------------------------------------------------------------


def _start(key: KernelKey) -> None:
    with _lock:
        if key in _threads or key in _failed or loaded(key):
            return
        thread = threading.Thread(target=_run, args=(key,), name=f"{THREADS}{key.name}", daemon=True)
        _threads[key] = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            del _threads[key]


def _run(key: KernelKey) -> None:
    try:
        with _turn, compiling.lock_of(key):
            if not loaded(key):
                compiling.adopt(key, _compile(key))
    except Exception as error:
        fail(key, error)
    finally:
        _threads.pop(key, None)
        _changed()


def _compile(key: KernelKey) -> compiling.Kernel:
    """``key``'s kernel, made by another process, which leaves this one's Python alone. No CUDA call is made here."""
    found, why = compiling.find(key)
    if found is not None:
        return found
    compiling.require_compiler(key, why)
    cache, why = open_cache()
    try:
        if cache is not None:
            with cache.locked(compiling.entry_name(key)) as lock:
                found, _ = compiling.find(key)  # another process may have been first
                if found is None:
                    why = _ask(key, () if lock is None else (lock,), locked=True)
                    found, _ = compiling.find(key)
            if found is not None:
                return found
        say_once(f"compiled kernels are not kept: {why}")
        with tempfile.TemporaryDirectory(prefix="fa_sdpa-") as scratch:
            library = Path(scratch) / compiling.LIBRARY
            why = _ask(key, library=str(library))
            if not why:
                return compiling.library_kernel(key, library)
    except OSError as error:  # no process, or no scratch
        why = str(error)
    say_once(f"kernels are compiled in this process, which stands still meanwhile: {why}")
    return compiling.in_clean_thread(lambda: compiling._compile(key))


def _ask(key: KernelKey, inherit: tuple[int, ...] = (), **request: object) -> str:
    """Have a process of its own compile ``key``: "", or what disk or linker refused. Raises KernelUnavailable for a
    kernel that does not compile."""
    if compiling.linker() is None:
        return compiling.NO_LINKER
    worker = Worker(inherit)
    try:
        answer = worker.ask(key, **request)
    finally:
        worker.close()
    if answer["error"] and not answer["disk"]:
        raise KernelUnavailable(answer["error"])
    return answer["error"] or ""


def _after_fork() -> None:
    """In the child of a fork the threads are gone, and a lock may be held by one of them."""
    global _turn, _lock
    _threads.clear()
    _turn, _lock = threading.BoundedSemaphore(AT_ONCE), threading.Lock()
    compiling.after_fork()
    _changed()


os.register_at_fork(after_in_child=_after_fork)
