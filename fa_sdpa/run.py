"""Runs an unchanged program with routing on, and says at its end where its SDPA calls went."""

from __future__ import annotations

import atexit
import builtins
import importlib.util
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

import fa_sdpa

from . import record as calls
from .policy import Policy


def run(
    program: str,
    args: Sequence[str],
    *,
    module: bool,
    policy: str | Policy,
    report: Path | None,
    record: Path | None = None,
) -> None:
    """Runs ``program`` as ``python program args…`` would, or ``python -m program args…`` for a module.

    What it raises and exits with is left to the interpreter, so that exit status, hooks, threads and exit handlers
    behave as always; only our own frames are taken out of its traceback.
    """
    sys.excepthook = _excepthook
    main, code = _load_module(program) if module else _load_script(program)
    sys.modules["__main__"] = main
    sys.argv[:] = [str(main.__file__) if module else program, *args]
    if record is not None:
        calls.start()
        atexit.register(calls.write, record.absolute())  # the program may change the directory
    fa_sdpa.enable(policy)
    report = report and report.absolute()
    # Before the program's own exit handlers, hence run after them.
    atexit.register(_report, Policy.of(policy).mode, report)
    exec(code, vars(main))


def _load_script(path: str) -> tuple[ModuleType, CodeType]:
    absolute = os.path.abspath(path)
    try:
        with io.open_code(absolute) as file:
            source = file.read()
    except OSError as error:
        print(f"fa_sdpa run: can't open file {absolute!r}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    main = ModuleType("__main__")
    vars(main).update(__file__=absolute, __builtins__=builtins)
    return main, compile(source, absolute, "exec", dont_inherit=True)


def _load_module(name: str) -> tuple[ModuleType, CodeType]:
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # not the name asked for, but an import of its package
            raise
        spec = None
    code = getattr(spec.loader, "get_code", lambda _: None)(spec.name) if spec else None
    if spec is None or code is None:
        print(f"fa_sdpa run: no module named {name}, or none that can be run", file=sys.stderr)
        raise SystemExit(1)
    main = importlib.util.module_from_spec(spec)
    vars(main).update(__name__="__main__", __builtins__=builtins)
    return main, code


def _set_first_path(folder: str) -> None:
    """Puts what Python would for the program where Python put what it does for us."""
    if not getattr(sys.flags, "safe_path", False):  # with it Python puts nothing there
        sys.path[0] = folder


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Python's own hook, from the program's first frame on."""
    shown = frame = traceback
    while frame is not None:
        if frame.tb_frame.f_globals is globals():
            shown = frame.tb_next
        frame = frame.tb_next
    sys.__excepthook__(kind, error.with_traceback(shown), shown)


def _report(policy: str, path: Path | None) -> None:
    """The count, on stderr and as JSON."""
    stats = fa_sdpa.stats()
    kinds = {"eager": stats.eager, "compiled": stats.compiled}
    lines = [f"fa_sdpa: {stats.routed} SDPA calls routed to fa4, {stats.native} left to torch (policy {policy})"]
    for kind, counts in kinds.items():
        if counts.reasons:
            reasons = ", ".join(f"{code} {count}" for code, count in counts.reasons.items())
            lines.append(f"  {kind}: {counts.routed} routed, {counts.native} left to torch: {reasons}")
    if stats.compiled.reasons:
        lines.append("  (a call in a compiled graph counts once a trace, however often the graph runs)")
    print("\n".join(lines), file=sys.stderr)
    if path is not None:
        content = {kind: counts._asdict() for kind, counts in kinds.items()}
        path.write_text(json.dumps({"policy": policy, "routed": stats.routed, "native": stats.native, **content}))
