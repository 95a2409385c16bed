"""The process that compiles: for ``jit``, because the compiler holds Python's lock for seconds, and for ``warm``.

It reads one request a line and answers each with one line, both JSON, until its input ends. A request has ``key``, a
kernel's name, and at most one of ``library`` and ``object``, the file to write instead of an entry of the cache;
``locked`` says that the entry's lock is held already, by a descriptor that this process inherited. An answer has
``key``, ``seconds`` and ``error``, which is null if all went well; ``disk`` says that only disk or linker failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import compile as compiling
from .cache import open_cache
from .key import KernelKey

TIME_LIMIT = 600  # seconds for one kernel; past that the process ends itself
_START = """import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is meant for the program; what has begun is soon done
sys.path[:] = json.loads(sys.argv[1])
from {module} import main
main()
"""


class WorkerDied(RuntimeError):
    """The process ended without an answer."""


class Worker:
    """A compiling process, to be used by one thread at a time."""

    def __init__(self, inherit: tuple[int, ...] = ()) -> None:
        """``inherit``: descriptors that it is to keep open."""
        environment = {**os.environ, "FA_SDPA": "0", "CUDA_VISIBLE_DEVICES": ""}  # it needs no GPU's memory
        start = _START.format(module=__name__)
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable or "python3", "-c", start, json.dumps([os.path.abspath(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
            pass_fds=inherit,
        )

    def ask(self, key: KernelKey, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises WorkerDied, with the end of what it said, if there is none."""
        try:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(json.dumps({"key": key.name, **request}) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._process.kill()
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip()[-2000:] or "no word"
            raise WorkerDied(f"its process ended with status {self._process.returncode}: {said}") from None

    def close(self) -> None:
        """Let it end."""
        with contextlib.suppress(OSError):  # it has ended already
            self._process.communicate()
        self._said.close()


def main() -> None:
    """Answer the requests on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT)
        request = json.loads(line)
        started = time.monotonic()
        answer = {"key": request["key"], "error": None, "disk": False}
        try:
            _fulfil(KernelKey.parse(request["key"]), request)
        except Exception as failure:
            answer["error"] = f"{type(failure).__name__}: {failure}"
            answer["disk"] = isinstance(failure, (OSError, compiling.CannotLink))
        signal.alarm(0)
        answer["seconds"] = round(time.monotonic() - started, 3)
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:  # who asked has gone; what it asked for is done
            return


def _fulfil(key: KernelKey, request: dict[str, Any]) -> None:
    if "object" in request:
        built = compiling.export(compiling._compile(key), key, Path(request["object"]).parent)
        built.replace(request["object"])
    elif "library" in request:
        Path(request["library"]).write_bytes(_library(key))
    else:
        cache, why = open_cache()
        if cache is None:
            raise compiling.CannotLink(f"there is no cache: {why}")
        name = compiling.entry_name(key)
        if request.get("locked"):
            cache.store(name, _library(key))
            return
        with cache.locked(name):
            if cache.find(name) is None:
                cache.store(name, _library(key))


def _library(key: KernelKey) -> bytes:
    _, library = compiling._compile_and_link(key)
    if isinstance(library, str):
        raise compiling.CannotLink(library)
    return library
