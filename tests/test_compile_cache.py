"""The cache on disk, and when kernels are made: background, block, never, in graphs and captures. No GPU is needed.

Where the compiler is not the point it is replaced, and CPU calls are made to need a kernel as CUDA calls do.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import fa_sdpa
from fa_sdpa import Policy, router, warm
from fa_sdpa.__main__ import main
from fa_sdpa.kernels import cache as caching
from fa_sdpa.kernels import compile as compiling
from fa_sdpa.kernels import jit, launch
from fa_sdpa.kernels.cache import Cache
from fa_sdpa.kernels.sm90 import config
from fa_sdpa.kernels.worker import Worker, WorkerDied
from fa_sdpa.meta.models import MODELS
from fa_sdpa.meta.spec import AttentionSpec, Options
from fa_sdpa.meta.target import Target

ROOT = Path(__file__).resolve().parent.parent
KEY = config.forward_key(torch.bfloat16, 64, 64, True)
OTHER = config.forward_key(torch.bfloat16, 64, 64, False)
H100 = Target("cuda", 90, "NVIDIA H100", 132, config.SMEM_PER_BLOCK)
ELF = b"\x7fELF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own for every test, and a process that has no kernel yet."""
    monkeypatch.setenv(caching.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.setenv(caching.LIMIT, "1")
    monkeypatch.delenv("FA_SDPA_BUNDLE", raising=False)
    monkeypatch.delenv("FA_SDPA_JIT", raising=False)
    for module, name in ((compiling, "_kernels"), (compiling, "_locks"), (jit, "_failed"), (jit, "_threads")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(caching, "_said", set())
    router._forget_decisions()
    yield
    assert jit.wait(60)
    router._forget_decisions()


def opened() -> Cache:
    found, why = caching.open_cache()
    assert found is not None, why
    return found


def needs_compiler() -> None:
    try:
        import cutlass  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the CuTe DSL compiler is not installed: {error}")


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_found_and_nothing_else():
    cache = opened()
    assert cache.find("a") is None
    path = cache.store("a", ELF)
    assert cache.find("a") == path and path.read_bytes().startswith(ELF)
    assert cache.find("b") is None
    assert cache.store("a", ELF + b"2") == path and path.read_bytes().startswith(ELF + b"2")
    assert [entry.path for entry in cache.entries()] == [path]
    assert sorted(os.listdir(cache.directory)) == ["a.so"]
    assert path.stat().st_mode & 0o077 == 0 and cache.directory.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "append", "foreign", "renamed", "folder", "link"])
def test_a_damaged_or_foreign_file_is_a_miss(harm, tmp_path):
    cache = opened()
    path = cache.store("a", ELF)
    content = path.read_bytes()
    if harm == "flip":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif harm == "truncate":
        path.write_bytes(content[:-50])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "append":
        path.write_bytes(content + b"\0")
    elif harm == "foreign":
        path.write_bytes(Path(sys.executable).read_bytes()[:9999])
    elif harm == "renamed":
        shutil.copy(cache.store("b", ELF), path)
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    elif harm == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    assert cache.find("a") is None
    if harm != "folder":
        assert cache.find("a") == path if cache.store("a", ELF) and cache.find("a") else False


def test_the_least_recently_used_are_dropped():
    cache = Cache(opened().directory, limit=4 * (len(ELF) + 100))
    for age, name in enumerate("abcd"):
        os.utime(cache.store(name, ELF), (1000 + age, 1000 + age))
    assert cache.find("a")  # used now, so b is the oldest
    cache.store("e", ELF)
    assert {entry.path.stem for entry in cache.entries()} == set("acde")
    Cache(cache.directory, limit=1).store("f", ELF)  # never the one that has just come
    assert {entry.path.stem for entry in cache.entries()} == {"f"}


def test_leftovers_of_dead_processes_are_removed():
    cache = opened()
    old, new = cache.directory / ".x.part", cache.directory / ".y.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    cache.store("a", ELF)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_can_write_to_is_not_used(mode, caplog):
    directory = opened().directory
    directory.chmod(mode)
    found, why = caching.open_cache()
    assert found is None and "others can write to" in why and str(directory) in why
    directory.chmod(0o700)
    directory.parent.chmod(0o777)  # somebody could put another folder in its place
    try:
        found, why = caching.open_cache()
        assert found is None and str(directory.parent) in why
        directory.parent.chmod(0o1777)  # but not here
        assert caching.open_cache()[0] is not None
    finally:
        directory.parent.chmod(0o700)


def test_a_file_that_others_can_write_to_is_not_loaded(caplog):
    cache = opened()
    path = cache.store("a", ELF)
    path.chmod(0o666)
    assert cache.find("a") is None and cache.find("a") is None
    assert sum("others can write to" in record.message for record in caplog.records) == 1
    cache.store("a", ELF)
    assert cache.find("a") == path


def test_nothing_of_another_user_is_trusted(monkeypatch):
    opened().store("a", ELF)
    monkeypatch.setattr(caching, "_trusted_owners", lambda: frozenset({4242}))
    found, why = caching.open_cache()
    assert found is None and "belongs to another user" in why


@pytest.mark.parametrize("value", ["0", "-1"])
def test_the_cache_can_be_turned_off(value, monkeypatch):
    monkeypatch.setenv(caching.LIMIT, value)
    assert caching.open_cache()[0] is None


def test_the_limit_must_be_a_number(monkeypatch, caplog):
    monkeypatch.setenv(caching.LIMIT, "much")
    assert opened().limit == caching.DEFAULT_LIMIT_MB * 2**20 and "much" in caplog.text


def test_where_the_folder_is(monkeypatch):
    monkeypatch.delenv(caching.DIRECTORY)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert caching.default_directory() == Path("/x/fa_sdpa")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", "/h")
    assert caching.default_directory() == Path("/h/.cache/fa_sdpa")


# ---- locks -----------------------------------------------------------------------------------------------------------


def forked(work) -> int:
    """The id of a child process that runs ``work`` and ends."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return pid


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    cache = opened()
    ready = tmp_path / "ready"

    def hold():
        with cache.locked("a"):
            ready.touch()
            time.sleep(60)

    pid = forked(hold)
    try:
        while not ready.exists():
            time.sleep(0.01)
        with cache.locked("a", patience=0.1) as descriptor:  # a holder that hangs is not waited for for ever
            assert descriptor is None
        os.kill(pid, signal.SIGKILL)
        with cache.locked("a", patience=10) as descriptor:
            assert descriptor is not None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not list(cache.directory.glob("*.lock"))


def test_a_process_that_inherits_the_lock_holds_it():
    cache = opened()
    with cache.locked("a") as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
        shadow = cache.directory / "a.lock"
        shadow.rename(cache.directory / "kept")  # as if we had died, and not removed it
    (cache.directory / "kept").rename(shadow)
    try:
        with cache.locked("a", patience=0.1) as second:
            assert second is None
    finally:
        child.kill()
        child.wait()
    with cache.locked("a", patience=10) as third:
        assert third is not None


def test_sixteen_processes_compile_each_kernel_once(monkeypatch, tmp_path):
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def compile_slowly(key):
        os.write(log, f"{key.name}\n".encode())
        time.sleep(0.2)
        return print, ELF + key.name.encode()

    monkeypatch.setattr(compiling, "_compile_and_link", compile_slowly)
    monkeypatch.setattr(compiling, "library_kernel", lambda key, path: key.name.encode() in path.read_bytes() and print)
    monkeypatch.setattr(compiling, "require_compiler", lambda key, why: None)
    start = time.time() + 0.5

    def work():
        time.sleep(max(0, start - time.time()))
        for key in (KEY, OTHER):
            assert compiling.kernel(key) is print

    children = [forked(work) for _ in range(16)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 16
    assert sorted((tmp_path / "log").read_text().split()) == sorted([KEY.name, OTHER.name])
    assert len(os.listdir(opened().directory)) == 2


# ---- what decides the code -------------------------------------------------------------------------------------------


def test_entry_names_change_with_everything_that_decides_the_code(monkeypatch):
    def name() -> str:
        compiling.fingerprint.cache_clear()
        return compiling.entry_name(KEY)

    names = [name()]
    with monkeypatch.context() as m:
        m.setattr(compiling, "source_hash", lambda arch: "other sources")
        names.append(name())
    for package in compiling.PACKAGES:
        with monkeypatch.context() as m:
            m.setattr(compiling, "package_version", lambda name, changed=package: "99" if name == changed else "1")
            names.append(name())
    for attribute, value in (("flavour", lambda: "cu99"), ("GPU_ARCH", {90: "sm_90z"}), ("OPTIONS", "--other {arch}")):
        with monkeypatch.context() as m:
            m.setattr(compiling, attribute, value)
            names.append(name())
    with monkeypatch.context() as m:
        m.setenv("CUTE_DSL_LINEINFO", "1")
        names.append(name())
    assert len(set(names)) == len(names) == 10
    assert name() == names[0]


def test_sources_are_all_hashed(monkeypatch, tmp_path):
    package = tmp_path / "kernels"
    shutil.copytree(Path(compiling.__file__).parent, package)
    monkeypatch.setattr(compiling, "__file__", str(package / "compile.py"))
    hashes = []
    for file in ("key.py", "common/mask.py", "sm90/forward.py", "sm90/config.py", None):
        compiling.source_hash.cache_clear()
        hashes.append(compiling.source_hash(90))
        if file:
            (package / file).write_text((package / file).read_text() + "\n# changed")
    compiling.source_hash.cache_clear()
    assert len(set(hashes)) == 5


@pytest.mark.parametrize(
    ("driver", "installed", "chosen"),
    [(None, ("cu12", "cu13"), "cu13"), (12, ("cu12", "cu13"), "cu12"), (14, ("cu12", "cu13"), "cu13"), (13, (), None)],
)
def test_flavour_is_the_newest_that_the_driver_supports(driver, installed, chosen, monkeypatch):
    monkeypatch.setattr(compiling, "_driver_major", lambda: driver)
    monkeypatch.setattr(compiling, "_runtimes", lambda: [Path(f"/x/{name}/lib/lib.so") for name in installed])
    assert compiling.flavour.__wrapped__() == chosen


# ---- one process, the compiler replaced ------------------------------------------------------------------------------


class Compiler:
    """Stands in for the compiler, in this process and in the worker's; what it is asked for is in ``asked``."""

    def __init__(self, monkeypatch):
        self.asked: list[str] = []
        self.gate = threading.Event()  # what is compiled in the background is done when this is set
        self.gate.set()
        self.error: Exception | None = None
        monkeypatch.setattr(compiling, "require_compiler", lambda key, why: None)
        monkeypatch.setattr(compiling, "_compile_and_link", lambda key: (print, self.build(key, "here")))
        monkeypatch.setattr(compiling, "_compile", lambda key: self.build(key, "here") and print)
        monkeypatch.setattr(compiling, "library_kernel", lambda key, path: print)
        monkeypatch.setattr(jit, "_ask", self.ask)

    def build(self, key, where: str) -> bytes:
        self.asked.append(f"{where} {key.name}")
        if self.error:
            raise self.error
        return ELF

    def ask(self, key, inherit=(), **request) -> str:
        assert self.gate.wait(30)
        try:
            library = self.build(key, "beside")
            if "library" in request:
                Path(request["library"]).write_bytes(library)
            else:
                opened().store(compiling.entry_name(key), library)
        except OSError as error:
            return str(error)
        return ""


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


@pytest.fixture
def cpu_needs_kernels(monkeypatch):
    monkeypatch.setattr(launch, "keys", lambda spec, target: (KEY if spec.is_causal else OTHER,))


@pytest.fixture
def as_h100(monkeypatch):
    """launch.py takes the tensors of this host for those of an H100."""
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(Target, "of", lambda device: H100)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


Q = torch.randn(1, 2, 8, 64)


def routed(is_causal: bool = True) -> str:
    """How one call was decided: "fa4", or the code of its refusal."""
    fa_sdpa.reset_stats()
    expected = sdpa(Q, Q, Q, is_causal=is_causal)
    stats = fa_sdpa.stats()
    with fa_sdpa.disable():
        torch.testing.assert_close(sdpa(Q, Q, Q, is_causal=is_causal), expected)
    assert stats.routed + stats.native == 1
    return "fa4" if stats.routed else " ".join(stats.reasons)


def test_background_leaves_calls_to_torch_until_the_kernel_is_there(compiler, cpu_needs_kernels):
    compiler.gate.clear()
    with fa_sdpa.enable(Policy("always", jit="background")):
        assert fa_sdpa.explain(Q, Q, Q, is_causal=True).reasons[0].code == "compiling" and not jit._threads
        assert [routed() for _ in range(3)] == ["compiling"] * 3
        assert "background" in fa_sdpa.explain(Q, Q, Q, is_causal=True).reasons[0].text
        assert compiler.asked == []
        compiler.gate.set()
        assert jit.wait(30)
        assert compiler.asked == [f"beside {KEY.name}"]
        assert [routed(), routed(is_causal=False)] == ["fa4", "compiling"]
        assert jit.wait(30)
        assert [routed(), routed(is_causal=False)] == ["fa4", "fa4"]
    assert len(opened().entries()) == 2


def test_what_is_in_the_cache_is_routed_at_once(compiler, cpu_needs_kernels):
    opened().store(compiling.entry_name(KEY), ELF)
    with fa_sdpa.enable(Policy("always", jit="background")):
        assert fa_sdpa.explain(Q, Q, Q, is_causal=True).routed and not compiling.loaded(KEY)
        assert routed() == "fa4" and compiler.asked == []


def test_block_compiles_in_the_call(compiler, cpu_needs_kernels):
    with fa_sdpa.enable("always"):
        assert fa_sdpa.explain(Q, Q, Q, is_causal=True).routed and compiler.asked == []
        assert routed() == "fa4" and compiler.asked == [f"here {KEY.name}"]
    assert len(opened().entries()) == 1


def test_never_uses_only_what_is_there(compiler, cpu_needs_kernels):
    opened().store(compiling.entry_name(KEY), ELF)
    with fa_sdpa.enable(Policy("always", jit="never")):
        assert [routed(), routed(is_causal=False)] == ["fa4", "not_compiled"]
        assert not fa_sdpa.explain(Q, Q, Q).routed
    assert compiler.asked == []


def test_deterministic_algorithms_pin_the_choice(compiler, cpu_needs_kernels):
    torch.use_deterministic_algorithms(True)
    try:
        with fa_sdpa.enable(Policy("always", jit="background")):
            assert routed() == "fa4" and compiler.asked == [f"here {KEY.name}"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_defaults_and_environment(monkeypatch, compiler, cpu_needs_kernels):
    assert [policy.jit for policy in map(Policy, ("auto", "always"))] == ["background", "block"]
    assert Policy("auto") == Policy("auto", jit="background")
    with pytest.raises(ValueError, match="sometimes"):
        Policy("auto", jit="sometimes")
    monkeypatch.setenv("FA_SDPA_JIT", "never")
    with fa_sdpa.enable("always"):
        assert routed() == "not_compiled"
    with fa_sdpa.enable(Policy("always")):  # who names a policy in full means it
        assert routed() == "fa4"
    monkeypatch.setenv("FA_SDPA_JIT", "sometimes")
    with pytest.raises(ValueError, match="sometimes"):
        fa_sdpa.enable("always")


@pytest.mark.parametrize("how", ["background", "block"])
def test_a_kernel_that_fails_is_reported_once_and_left_to_torch(how, compiler, cpu_needs_kernels, caplog):
    compiler.error = RuntimeError("register spill in hell")
    with fa_sdpa.enable(Policy("always", jit=how)):
        first = routed()
        jit.wait(30)
        assert first == ("compiling" if how == "background" else "kernel_failed")
        assert [routed(), routed()] == ["kernel_failed"] * 2
        assert "register spill in hell" in str(fa_sdpa.explain(Q, Q, Q, is_causal=True))
        assert len(compiler.asked) == 1
        compiler.error = None
        routed(is_causal=False)
        jit.wait(30)
        assert routed(is_causal=False) == "fa4"  # another kernel is another matter
    said = [record for record in caplog.records if "register spill in hell" in record.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING and KEY.name in said[0].message


def test_a_kernel_that_does_not_load_is_compiled_again(compiler, cpu_needs_kernels, monkeypatch, caplog):
    opened().store(compiling.entry_name(KEY), ELF)
    refused: list[object] = []

    def load(key, path):
        if not refused:
            refused.append(path)
            raise OSError("wrong ELF class")
        return print

    monkeypatch.setattr(compiling, "library_kernel", load)
    with fa_sdpa.enable("always"):
        assert routed() == "fa4"
    assert "wrong ELF class" in caplog.text and len(refused) == 1


def test_the_first_launch_may_fail(compiler, cpu_needs_kernels, as_h100, monkeypatch, caplog):
    """In the router the call goes to torch; the op itself raises."""

    def no_image(*arguments):
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(compiling, "library_kernel", lambda key, path: no_image)
    monkeypatch.setattr(launch, "_key", lambda *what: KEY)
    opened().store(compiling.entry_name(KEY), ELF)
    half = Q.bfloat16()

    def run(query, key, value, *, is_causal, scale):
        return launch.attention_fwd(query, key, value, None, Options(is_causal))

    with pytest.raises(compiling.KernelUnavailable, match="no kernel image"):
        run(half, half, half, is_causal=True, scale=None)
    assert not launch._plans
    monkeypatch.setattr(jit, "_failed", {})
    monkeypatch.setattr(router, "_fa4", run)
    monkeypatch.setattr(router, "decide", lambda *a, **k: fa_sdpa.meta.spec.Decision("fa4", ()))
    with fa_sdpa.enable("always"):
        torch.testing.assert_close(
            sdpa(half, half, half, is_causal=True),
            torch.ops.aten.scaled_dot_product_attention(half, half, half, is_causal=True),
        )
        assert fa_sdpa.explain(half, half, half, is_causal=True).reasons[0].code == "kernel_failed"
    assert sum("no kernel image" in record.message for record in caplog.records) == 1


def test_a_read_only_or_full_disk_costs_only_the_cache(compiler, cpu_needs_kernels, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(caching.tempfile, "mkstemp", lambda **kwargs: (_ for _ in ()).throw(full))
    with fa_sdpa.enable("always"):
        assert [routed(), routed(is_causal=False)] == ["fa4", "fa4"]
    assert sum("No space left" in record.message for record in caplog.records) == 1
    assert opened().entries() == []
    compiling._kernels.clear()
    with fa_sdpa.enable(Policy("always", jit="background")):  # then the library passes through a scratch folder
        assert routed() == "compiling"
        assert jit.wait(30)
        assert routed() == "fa4"


def test_a_write_that_breaks_off_leaves_nothing(monkeypatch):
    cache = opened()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, content):
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    fdopen = os.fdopen
    monkeypatch.setattr(caching.os, "fdopen", lambda *args: Full(fdopen(*args)))
    with pytest.raises(OSError, match="No space"):
        cache.store("a", ELF)
    assert os.listdir(cache.directory) == []


def test_a_folder_that_cannot_be_made_costs_only_the_cache(compiler, cpu_needs_kernels, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(caching.DIRECTORY, str(tmp_path / "file" / "cache"))
    with fa_sdpa.enable("always"):
        assert routed() == "fa4"
    assert "not kept" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(compiler, cpu_needs_kernels):
    directory = opened().directory
    directory.chmod(0o500)
    with fa_sdpa.enable("always"):
        assert routed() == "fa4"
    directory.chmod(0o700)


def test_an_untrusted_folder_is_said_once_and_not_used(compiler, cpu_needs_kernels, caplog):
    opened().store(compiling.entry_name(KEY), ELF)
    opened().directory.chmod(0o777)
    with fa_sdpa.enable("always"):
        assert [routed(), routed(is_causal=False)] == ["fa4", "fa4"]
    assert len(compiler.asked) == 2
    assert sum("others can write to" in record.message for record in caplog.records) == 1


def test_without_a_linker_kernels_still_run(cpu_needs_kernels, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "require_compiler", lambda key, why: None)
    monkeypatch.setattr(compiling, "linker", lambda: None)
    monkeypatch.setattr(compiling, "_compile", lambda key: print)
    monkeypatch.setattr(compiling, "export", lambda *a: Path("x.o"))
    monkeypatch.setitem(sys.modules, "cutlass", type(sys)("cutlass"))
    monkeypatch.setitem(sys.modules, "cutlass.cute", type(sys)("cutlass.cute"))
    with fa_sdpa.enable("always"):
        assert routed() == "fa4"
    with fa_sdpa.enable(Policy("always", jit="background")):
        assert routed(is_causal=False) == "compiling"
        jit.wait(30)
        assert routed(is_causal=False) == "fa4"
    assert "no C linker" in caplog.text and opened().entries() == []


def test_a_child_of_a_fork_starts_over(compiler):
    """There the parent's threads are gone, and so are the locks that they hold."""
    compiler.gate.clear()

    def child():
        assert not jit._threads and jit.missing((KEY,), "background").code == "compiling"
        assert jit.wait(30) and jit.missing((KEY,), "background") is None
        assert compiler.asked == []  # the parent was at it

    assert jit.missing((KEY,), "background").code == "compiling"
    while not list(opened().directory.glob("*.lock")):
        time.sleep(0.01)
    pid = forked(child)
    time.sleep(0.1)
    compiler.gate.set()
    assert os.waitpid(pid, 0)[1] == 0


# ---- graphs and captures ---------------------------------------------------------------------------------------------


def traced(policy) -> tuple[bool, torch.Tensor]:
    """Whether a call in a graph was routed, and what the graph returned."""
    torch._dynamo.reset()
    fa_sdpa.reset_stats()
    with fa_sdpa.enable(policy):
        out = torch.compile(lambda x: sdpa(x, x, x, is_causal=True), backend="aot_eager", fullgraph=True)(Q)
    stats = fa_sdpa.stats().compiled
    assert stats.routed + stats.native == 1
    return bool(stats.routed), out


@pytest.mark.parametrize("how", ["background", "block", "never"])
def test_a_traced_graph_has_its_kernels_when_it_is_traced(how, compiler, cpu_needs_kernels):
    was_routed, out = traced(Policy("always", jit=how))
    torch.testing.assert_close(out, sdpa(Q, Q, Q, is_causal=True))
    assert was_routed == (how != "never") == compiling.loaded(KEY)
    assert compiler.asked == ([] if how == "never" else [f"here {KEY.name}"])


def test_a_graph_whose_kernel_fails_has_torchs(compiler, cpu_needs_kernels, caplog):
    compiler.error = RuntimeError("register spill in hell")
    was_routed, out = traced("always")
    torch.testing.assert_close(out, sdpa(Q, Q, Q, is_causal=True))
    assert not was_routed and "register spill in hell" in caplog.text


def test_tracing_waits_for_what_is_compiled_in_the_background(compiler, cpu_needs_kernels):
    compiler.gate.clear()
    with fa_sdpa.enable(Policy("always", jit="background")):
        assert routed() == "compiling"
    threading.Timer(0.2, compiler.gate.set).start()
    assert traced(Policy("always", jit="background"))[0]
    assert compiler.asked == [f"beside {KEY.name}"]


@pytest.mark.parametrize("how", ["background", "block", "never"])
def test_nothing_is_compiled_or_loaded_inside_a_capture(how, compiler, cpu_needs_kernels, monkeypatch):
    opened().store(compiling.entry_name(OTHER), ELF)
    with fa_sdpa.enable(Policy("always", jit=how)):
        with monkeypatch.context() as m:
            m.setattr(jit, "capturing", lambda: True)
            assert [routed(), routed(is_causal=False)] == ["capturing"] * 2
            assert not any("here" in asked for asked in compiler.asked)
        assert jit.wait(30)
        assert routed() == ("not_compiled" if how == "never" else "fa4")  # the refusal ended with the capture
        assert routed(is_causal=False) == "fa4"


def test_the_op_itself_never_compiles_inside_a_capture(compiler, as_h100, monkeypatch):
    monkeypatch.setattr(jit, "capturing", lambda: True)
    with pytest.raises(compiling.KernelUnavailable, match="graph is captured"):
        launch.attention_fwd(Q.bfloat16(), Q.bfloat16(), Q.bfloat16(), None, Options(True))
    assert compiler.asked == []


def test_the_forward_of_a_checkpoint_waits(compiler, cpu_needs_kernels):
    """Else the recomputation would find the kernel, and save other tensors than the forward did."""
    x = Q.clone().requires_grad_()
    with fa_sdpa.enable(Policy("always", jit="background")):
        out = checkpoint(lambda x: sdpa(x, x, x, is_causal=True), x, use_reentrant=False)
        assert fa_sdpa.stats().routed == 1 and compiler.asked == [f"here {KEY.name}"]
        out.sum().backward()
    y = Q.clone().requires_grad_()
    sdpa(y, y, y, is_causal=True).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


# ---- which kernels a call needs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (80, 80), (256, 256)])
@pytest.mark.parametrize("seqlens", [(1, 900), (600, 600), (9000, 9000)])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 8), (2, 2), (40, 1)])
def test_keys_are_what_is_launched(dims, seqlens, batch, kv_heads, as_h100, monkeypatch):
    asked: list[object] = []

    def stop(key):
        asked.append(key)
        raise InterruptedError

    monkeypatch.setattr(launch, "kernel", stop)
    q, k = (torch.empty(1, 1, seqlen, dims[0], dtype=torch.float16) for seqlen in seqlens)
    v = torch.empty(1, 1, seqlens[1], dims[1], dtype=torch.float16)
    k, v = (x.expand(-1, kv_heads, -1, -1) for x in (k, v))
    q = q.expand(batch, 8, -1, -1)
    k, v = (x.expand(batch, -1, -1, -1) for x in (k, v))
    for options in ({}, {"is_causal": True}, {"is_causal": True, "bottom_right": True}, {"softcap": 3.0}):
        spec = AttentionSpec.of(q, k, v, **options)
        with pytest.raises(InterruptedError):
            launch.attention_fwd(q, k, v, None, Options(**options))
        assert launch.keys(spec, H100) == (asked[-1],)


def test_symbolic_lengths_need_every_tile():
    spec = AttentionSpec(torch.bfloat16, 1, 1, 1, 8, 8, 64, 64, is_causal=True)
    sizes = ((1, 8), (900, 128), (1, 10**6))
    either = {key for b, n in sizes for key in launch.keys(spec._replace(batch=b, seqlen_q=n), H100)}
    found = []

    def backend(graph, inputs):
        size = next(x for x in inputs if isinstance(x, torch.SymInt))
        found.append(launch.keys(spec._replace(seqlen_q=size), H100))
        return graph

    torch.compile(lambda x: x * 2, dynamic=True, backend=backend)(torch.ones(16))
    assert len(either) == 3 and set(found[0]) == either == set(launch.keys(spec, H100, any_size=True))
    assert launch.keys(spec, Target("cpu")) == ()


# ---- warm ------------------------------------------------------------------------------------------------------------

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "float16"}


@pytest.mark.parametrize(
    ("content", "dims", "dtype"),
    [
        (LLAMA, (128, 128), "fp16"),
        ({**LLAMA, "head_dim": 64, "dtype": "float32"}, (64, 64), "bf16"),
        ({"torch_dtype": "bfloat16", "n_embd": 768, "n_head": 12}, (64, 64), "bf16"),
        ({"text_config": LLAMA}, (128, 128), "fp16"),
        ({**LLAMA, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, (192, 128), "fp16"),
    ],
)
def test_kernels_of_a_model(content, dims, dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    keys, _ = warm.keys_of(warm.specs_of_model(str(tmp_path / "config.json")), H100, any_size=True)
    assert {(key.head_dim, key.head_dim_v) for key in keys} == {dims} and {key.dtype for key in keys} == {dtype}
    assert {key.is_causal for key in keys if key.direction == "forward"} == {False, True}
    assert {key.tile_m for key in keys if key.direction == "forward"} == (
        {64, 128, 192} if dims == (64, 64) else {64, 128}
    )


def test_models_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for model in (tmp_path / "config.json", tmp_path / "absent", ROOT / "README.md"):
        with pytest.raises(ValueError, match=str(model)):
            warm.specs_of_model(str(model))
    for preset in MODELS:
        assert warm.specs_of_model(preset)


def listed(capsys, line: str) -> list[str]:
    main(["warm", "--list", *line.split()])
    return capsys.readouterr().out.split()


def test_what_warm_would_compile(capsys, tmp_path):
    assert listed(capsys, "--arch sm_90") == [key.name for key in config.all_keys()]
    assert listed(capsys, f"--arch 90a --kernel {KEY.name}") == [KEY.name]
    assert listed(capsys, f"--arch sm_90 --kernel {OTHER.name}") == [OTHER.name]
    both = listed(capsys, "--arch sm_90 --shape 1,8,4096,128 --dtype fp16 --dv 64 --shape 2,8,4096,96")
    assert {re.search(r"_d\d+_dv\d+_", name)[0] for name in both} == {"_d128_dv64_", "_d96_dv64_"}
    for line in ("--arch sm_70", "--arch sm_90 --shape 1,8,100,20", "--arch sm_90 --model absent"):
        with pytest.raises(SystemExit, match="fa_sdpa warm: "):
            listed(capsys, line)


def test_a_recorded_run_says_what_to_compile(tmp_path, capsys):
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        "x = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16)\n"
        "for _ in range(3): sdpa(x, x, x, is_causal=True)\n"
        "sdpa(x[0], x[0], x[0])\n"
        "sdpa(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool))\n"
        "torch.compile(lambda x: sdpa(x, x, x), backend='eager', dynamic=True)(x)\n"
    )
    command = [sys.executable, "-m", "fa_sdpa", "run", "--record", "calls.json", "script.py"]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    log = json.loads((tmp_path / "calls.json").read_text())
    assert log["schema"] == 1 and [call["where"] for call in log["calls"][:3]] == ["eager"] * 3
    assert [len(call["query"]) for call in log["calls"][:3]] == [4, 3, 4]
    assert any(call["where"] == "compiled" for call in log["calls"])
    names = listed(capsys, f"--arch sm_90 --calls {tmp_path / 'calls.json'}")
    masked = [name for name in names if "mask" in name]  # the call with a mask, and what prepares the mask
    assert {name.split("_")[0] for name in masked} == {"forward", "mask"}
    assert {KEY.name, OTHER.name} < set(names) and all("_d64_" in name or name in masked for name in names)
    (tmp_path / "calls.json").write_text("[]")
    with pytest.raises(SystemExit, match="calls.json"):
        listed(capsys, f"--arch sm_90 --calls {tmp_path / 'calls.json'}")


def test_doctor_shows_the_cache(capsys, monkeypatch, tmp_path):
    opened().store(compiling.entry_name(KEY), ELF)
    opened().store("older-0123", ELF)
    main(["doctor"])
    text = capsys.readouterr().out
    assert f"folder: {opened().directory}" in text and "kernels: 1 of this version, 1 of others" in text
    assert "of at most 1 MB" in text and "C linker" in text
    opened().directory.chmod(0o777)
    monkeypatch.setenv("FA_SDPA_BUNDLE", str(tmp_path / "absent"))
    main(["doctor", "--json"])
    lines = json.loads(capsys.readouterr().out)["cache"]
    assert "absent cannot be read" in lines[0] and "others can write to" in lines[1]


def test_run_takes_jit(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--jit", "sometimes", "script.py"])
    assert "sometimes" in capsys.readouterr().err


# ---- the compiler itself ---------------------------------------------------------------------------------------------


def test_background_for_real(cpu_needs_kernels):
    """A process of its own compiles; this one's Python is never held up, and later processes find the kernel."""
    needs_compiler()
    pytest.importorskip("tvm_ffi")
    with fa_sdpa.enable(Policy("always", jit="background")):
        assert routed() == "compiling"
        longest, last = 0.0, time.monotonic()
        while jit._threads:
            time.sleep(0.002)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        assert routed() == "fa4"
    assert "cutlass" not in sys.modules or longest < 1.0  # the compiler holds Python for 2.5 s
    assert longest < 1.0
    [entry] = opened().entries()
    code = (
        "import sys; from fa_sdpa.kernels import compile, key\n"
        "compile._compile = None\n"
        "k = key.KernelKey.parse(sys.argv[1])\n"
        "assert compile.stored(k) and compile.load(k) and callable(compile.kernel(k))\n"
        "print('cutlass' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, KEY.name], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_block_and_warm_for_real(tmp_path, capsys):
    needs_compiler()
    pytest.importorskip("tvm_ffi")
    assert callable(compiling.kernel(KEY))
    [entry] = opened().entries()
    compiling._kernels.clear()
    assert compiling.load(KEY)  # what another process would do
    main(["warm", "--arch", "sm_90", "--kernel", KEY.name])
    assert "0 kernels compiled, 1 were there, 0 failed" in capsys.readouterr().out
    main(["warm", "--arch", "sm_90", "--kernel", KEY.name, "--bundle", str(tmp_path / "bundle")])
    assert "1 kernels compiled" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "bundle")) == [compiling.LIBRARY, compiling.MANIFEST]
    assert compiling._from_bundle(KEY, tmp_path / "bundle")[1] == ""
    (tmp_path / "bundle").chmod(0o777)
    assert "others can write to" in compiling._from_bundle(KEY, tmp_path / "bundle")[1]


def test_a_worker_tells_what_went_wrong(monkeypatch):
    needs_compiler()
    worker = Worker()
    wrong = dataclasses.replace(KEY, tile_m=176)  # a name that parses, and that no kernel has
    answer = worker.ask(wrong)
    assert answer["error"] and not answer["disk"]
    answer = worker.ask(KEY, library="/absent/folder/k.so")
    assert "FileNotFoundError" in answer["error"] and answer["disk"]
    worker._process.kill()
    with pytest.raises(WorkerDied, match="status -9"):
        worker.ask(KEY)
