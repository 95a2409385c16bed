"""Asks a worker process with a time limit, and starts another one where one hung or died."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernels import quarantine

START_LIMIT = 120.0  # seconds more for the first task of a process, which imports and initialises


class Answer(NamedTuple):
    """What became of a task."""

    result: Any = None
    error: str = ""  # why there is no result
    stage: str = ""  # what was under way when there was none
    seconds: float = 0.0


class Session:
    """One worker at a time, to be used as a context."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        """``command``: what runs a worker; the default is worker.py in this Python, with this one's paths."""
        start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import main; main()"
        module = f"{__package__}.worker"
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        self._command = list(command or (sys.executable, "-c", start.format(module), paths))
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def ask(self, task: dict[str, Any], limit: float) -> Answer:
        """The answer to a task, or why there was none within ``limit`` seconds."""
        began = time.monotonic()
        if self._process is None or self._process.poll() is not None:
            self._start()
            limit += START_LIMIT
        stage = ""
        try:
            self._write(json.dumps(task).encode() + b"\n")
            while True:
                said = self._read(began + limit - time.monotonic())
                if "stage" in said:
                    stage = said["stage"]
                    continue
                if said.get("lost"):
                    self._end()
                error = said.get("error", "")
                return Answer(said.get("result"), error, stage if error else "", time.monotonic() - began)
        except TimeoutError:
            self._end()
            return Answer(None, f"no answer within {limit:.0f} s", stage, time.monotonic() - began)
        except (OSError, ValueError):
            return Answer(None, f"its process ended{self._end()}", stage, time.monotonic() - began)

    def _start(self) -> None:
        self._end()
        environment = {**os.environ, "FA_SDPA": "0", quarantine.OFF: "1"}
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            start_new_session=True,  # so that it can be ended with all that it started
        )
        self._pending = b""

    def _write(self, data: bytes) -> None:
        assert self._process and self._process.stdin
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line; TimeoutError if it does not come, OSError if the process has ended."""
        assert self._process and self._process.stdout
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise TimeoutError
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise BrokenPipeError
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def _end(self) -> str:
        """End the process, if there is one: its status and the last that it said."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds is left to it
                process.wait(20.0)
        process.stdout.close()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        self._said.close()
        return f" with status {process.returncode}" + "".join(f": {line[:300]}" for line in said)
