"""KernelKey → callable: from memory, from a precompiled bundle, from the cache on disk, or compiled now.

A bundle is a directory with ``kernels.so`` and ``manifest.json``, made by ``write_bundle`` on any machine with the
compiler, GPU or not, and named by ``FA_SDPA_BUNDLE``. The cache (cache.py) holds one library a kernel. Loading from
either needs no compiler, only its runtime library and tvm-ffi. An entry that is missing, or was built from other
sources than these, is compiled instead where the compiler is installed. Imports no compiler itself until a kernel has
to be compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import FAMILIES
from .cache import Cache, distrust, open_cache, say_once
from .key import KernelKey

SCHEMA = 1  # of manifest.json
LIBRARY, MANIFEST = "kernels.so", "manifest.json"
GPU_ARCH = {90: "sm_90a"}  # the compiler's name of an arch
CLASSES = {  # of a family's modules
    "forward": "Forward",
    "backward": "Backward",
    "forward_split": "SplitForward",
    "forward_masked": "MaskedForward",
    "backward_masked": "MaskedBackward",
    "mask": "Mask",
    "mask_transposed": "TransposedMask",
}
PACKAGES = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-core", "quack-kernels", "apache-tvm-ffi")

THREADS = "fa_sdpa: "  # how the names of our threads begin

Kernel = Callable[..., None]
_T = TypeVar("_T")

_kernels: dict[KernelKey, Kernel] = {}
_locks: dict[KernelKey, threading.Lock] = {}  # held while a thread makes or loads the kernel
_compiler = threading.Lock()  # the compiler is one at a time in a process


class KernelUnavailable(RuntimeError):
    """A kernel is in no bundle and cannot be compiled here."""


class CannotLink(RuntimeError):
    """There is no C linker here, or it refused."""


def kernel(key: KernelKey) -> Kernel:
    """The kernel of ``key``, found or compiled at most once per process. Takes torch tensors; see its ``__call__``.

    Waits for as long as that takes. Raises KernelUnavailable if it is in no usable bundle and there is no compiler.
    """
    found = _kernels.get(key)
    if found is None:
        with lock_of(key):
            found = _kernels.get(key)
            if found is None:
                found, why = find(key)
                _kernels[key] = found = found or _make(key, why)
    return found


def loaded(key: KernelKey) -> bool:
    """Whether ``kernel(key)`` returns at once."""
    return key in _kernels


def load(key: KernelKey) -> bool:
    """Load ``key`` if it is in the bundle or in the cache, which takes a millisecond; whether it was."""
    if key in _kernels:
        return True
    lock = lock_of(key)
    if not lock.acquire(blocking=False):  # another thread is at it
        return False
    try:
        found, _ = find(key)
        if found is not None:
            adopt(key, found)
        return found is not None
    finally:
        lock.release()


def lock_of(key: KernelKey) -> threading.Lock:
    """Held by the thread that makes or loads ``key``."""
    return _locks.setdefault(key, threading.Lock())


def adopt(key: KernelKey, found: Kernel) -> None:
    """Have ``kernel(key)`` return this one."""
    _kernels[key] = found


def find(key: KernelKey) -> tuple[Kernel | None, str]:
    """``key``'s kernel if it was compiled before, or None and why a bundle doesn't have it."""
    directory = os.environ.get("FA_SDPA_BUNDLE")
    why = "FA_SDPA_BUNDLE names no bundle"
    if directory:
        found, why = _from_bundle(key, Path(directory))
        if found is not None:
            return found, ""
    cache, _ = open_cache()
    return (_from_cache(key, cache) if cache else None), why


def stored(key: KernelKey) -> bool:
    """Whether ``key`` was compiled before, as far as can be told without loading it."""
    directory = os.environ.get("FA_SDPA_BUNDLE")
    if directory and not _bundle_lacks(key, Path(directory)):
        return True
    cache, _ = open_cache()
    return cache is not None and cache.find(entry_name(key)) is not None


def after_fork() -> None:
    """In the child of a fork, no lock is held by a thread that still runs."""
    global _compiler
    _locks.clear()
    _compiler = threading.Lock()


def _make(key: KernelKey, why: str) -> Kernel:
    """Compile ``key``, and keep it for later processes where that is possible."""
    require_compiler(key, why)
    cache, why = open_cache()
    if cache is None:
        say_once(f"compiled kernels are not kept: {why}")
        return in_clean_thread(lambda: _compile(key))
    with cache.locked(entry_name(key)):
        found = _from_cache(key, cache)  # another process may have been first
        if found is not None:
            return found
        built, library = in_clean_thread(lambda: _compile_and_link(key))
        if isinstance(library, bytes):
            with _the_disk_may_refuse(cache):
                cache.store(entry_name(key), library)
        else:
            say_once(f"compiled kernels are not kept: {library}")
        return built


def require_compiler(key: KernelKey, why: str) -> None:
    """Raise KernelUnavailable if there is no compiler; ``why`` says why one is needed."""
    if importlib.util.find_spec("cutlass") is None:
        raise KernelUnavailable(
            f"kernel {key.name}: {why}, and it cannot be compiled because nvidia-cutlass-dsl is not installed"
        )


@contextlib.contextmanager
def _the_disk_may_refuse(cache: Cache) -> Any:
    try:
        yield
    except OSError as error:
        say_once(f"compiled kernels are not kept: {cache.directory}: {error}")


def in_clean_thread(work: Callable[[], _T]) -> _T:
    """Run ``work`` and wait: in a thread without the caller's modes (fake tensors, default device, a trace)."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            with _compiler:
                outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=f"{THREADS}compile", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


OPTIONS = "--enable-tvm-ffi --gpu-arch {arch}"


def _compile(key: KernelKey) -> Any:
    """Compile ``key``; needs no GPU. The result is callable and can be exported."""
    import cutlass.cute as cute

    name = key.direction + "_split" * key.split + "_masked" * bool(key.attn_mask) + "_transposed" * key.transposed
    module = importlib.import_module(f"{__package__}.{FAMILIES[key.arch]}.{name}")
    built = getattr(module, CLASSES[name])(key)
    return cute.compile(built, *module.example_arguments(key), options=OPTIONS.format(arch=GPU_ARCH[key.arch]))


def _compile_and_link(key: KernelKey) -> tuple[Any, bytes | str]:
    """Compile ``key``: its callable, and its shared library or why there is none."""
    built = _compile(key)
    try:
        with tempfile.TemporaryDirectory(prefix="fa_sdpa-") as scratch:
            library = Path(scratch) / LIBRARY
            link([export(built, key, Path(scratch))], library)
            return built, library.read_bytes()
    except (OSError, CannotLink) as error:
        return built, str(error)


def export(built: Any, key: KernelKey, directory: Path) -> Path:
    """Write what ``_compile`` returned as an object file."""
    path = directory / f"{key.name}.o"
    built.export_to_c(object_file_path=str(path), function_name=key.name)
    return path


def linker() -> list[str] | None:
    """The command that links here, None if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = ([named] if named else []) + [["cc"], ["gcc"], ["clang"], ["ld"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


NO_LINKER = "there is no C linker here (cc, gcc, clang, ld, or what CC names)"


def link(objects: Sequence[Path], library: Path) -> None:
    """Make a shared library of object files. Raises CannotLink. Needs the compiler, whose runtime it refers to."""
    import cutlass.cute as cute

    command = linker()
    if command is None:
        raise CannotLink(NO_LINKER)
    libraries = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
    done = subprocess.run(
        [*command, "-shared", "-o", str(library), *map(str, objects), *libraries], capture_output=True, text=True
    )
    if done.returncode:
        raise CannotLink(f"{shlex.join(command)} failed: {done.stderr.strip()}")


# ---- what decides the code -------------------------------------------------------------------------------------------


def entry_name(key: KernelKey) -> str:
    """Name of ``key`` in the cache: of the kernel and of everything else that decides its code."""
    return f"{key.name}-{fingerprint(key.arch)}"


@functools.cache
def fingerprint(arch: int) -> str:
    """Digest of what decides the code of every kernel of ``arch``, besides its key."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("CUTE_DSL_")}
    facts = {
        "source": source_hash(arch),
        "options": OPTIONS.format(arch=GPU_ARCH[arch]),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": flavour(),
        "machine": [sys.platform, platform.machine()],
        "settings": sorted(settings.items()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def flavour() -> str | None:
    """Which of the compiler's installed CUDA flavours ("cu12", "cu13") is at work: as it chooses itself, the newest
    that the driver supports, or without a driver the newest. None if there is none."""
    installed = {path.parent.parent.name: path for path in _runtimes()}
    driver = _driver_major()
    fitting = [name for name in installed if driver is None or int(name[2:]) <= driver]
    return max(fitting, key=lambda name: int(name[2:]), default=None)


def _runtimes() -> list[Path]:
    """The compiler's runtime libraries, in its wheels, found without importing it."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return [path for root in roots for path in sorted(Path(root).glob("cu[1-9]*/lib/libcute_dsl_runtime.so"))]


def _driver_major() -> int | None:
    """Of the newest CUDA that the driver supports; asking it initialises nothing."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000


@functools.cache
def source_hash(arch: int) -> str:
    """Hash of every source file that can change the kernels of ``arch``."""
    here = Path(__file__).parent
    files = [here / "key.py", *sorted((here / "common").glob("*.py")), *sorted((here / FAMILIES[arch]).glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


# ---- libraries -------------------------------------------------------------------------------------------------------


def write_bundle(keys: Iterable[KernelKey], directory: str | Path) -> Path:
    """Compile ``keys`` and link them into ``directory``; return its manifest. Needs the compiler and a C linker."""
    with scratch_in(directory) as scratch:
        keys = list(keys)
        objects = [export(_compile(key), key, scratch) for key in keys]
        return link_bundle(keys, objects, directory)


@contextlib.contextmanager
def scratch_in(directory: str | Path) -> Any:
    """A folder for the parts of a bundle, beside it and gone afterwards."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        yield Path(scratch)


def link_bundle(keys: Sequence[KernelKey], objects: Sequence[Path], directory: str | Path) -> Path:
    """Make a bundle of its kernels' object files, which lie in a folder inside ``directory``; return its manifest."""
    directory = Path(directory)
    library = objects[0].parent / LIBRARY
    link(objects, library)
    library.replace(directory / LIBRARY)
    manifest = {
        "schema": SCHEMA,
        "dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
        "cuda": flavour(),
        "machine": platform.machine(),
        "kernels": {key.name: {**dataclasses.asdict(key), "source": source_hash(key.arch)} for key in keys},
    }
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def _from_bundle(key: KernelKey, directory: Path) -> tuple[Kernel | None, str]:
    """``key``'s kernel from a bundle, or None and why not."""
    why = _bundle_lacks(key, directory)
    if why:
        return None, why
    try:
        return library_kernel(key, directory / LIBRARY), ""
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"the bundle {directory} cannot be loaded ({error})"


def _bundle_lacks(key: KernelKey, directory: Path) -> str:
    """Why ``key`` is not to be loaded from a bundle, or ""."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        schema, kernels = manifest["schema"], manifest["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the bundle {directory} cannot be read ({error})"
    if schema != SCHEMA:
        return f"the bundle {directory} has schema {schema}, not {SCHEMA}"
    if key.name not in kernels:
        return f"it is not in the bundle {directory}"
    if manifest.get("machine", platform.machine()) != platform.machine():
        return f"the bundle {directory} was built for {manifest['machine']}"
    if kernels[key.name].get("source") != source_hash(key.arch):
        return f"the bundle {directory} was built from other sources"
    try:
        untrusted = distrust(directory / MANIFEST) or distrust(directory / LIBRARY)
    except OSError as error:
        return f"the bundle {directory} cannot be read ({error})"
    if untrusted:
        say_once(f"the bundle {directory} is not loaded: {untrusted}")
        return f"the bundle {directory} is not loaded: {untrusted}"
    return ""


def describe_bundle(directory: Path) -> str:
    """One line on a bundle for people: what it has, or why it is not used."""
    try:
        names = json.loads((directory / MANIFEST).read_text())["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{directory} cannot be read ({error})"
    for name in names:
        with contextlib.suppress(ValueError):
            why = _bundle_lacks(KernelKey.parse(name), directory)
            return why or f"{directory}, {len(names)} kernels"
    return f"{directory} has no kernels"


def _from_cache(key: KernelKey, cache: Cache) -> Kernel | None:
    """``key``'s kernel from the cache. One that the loader refuses is a miss."""
    path = cache.find(entry_name(key))
    if path is None:
        return None
    try:
        return library_kernel(key, path)
    except (OSError, RuntimeError, AttributeError) as error:
        say_once(f"cached kernel {path} cannot be loaded: {error}")
        return None


def library_kernel(key: KernelKey, path: Path) -> Kernel:
    """``key``'s kernel from a shared library. OSError, RuntimeError or AttributeError if it is not in there."""
    return getattr(_library(path), key.name)


@functools.cache
def _library(path: Path) -> Any:
    preload()
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


@functools.cache
def preload() -> None:
    """Load what every kernel needs: tvm-ffi, and the compiler's runtime library. Initialises no CUDA."""
    import tvm_ffi  # noqa: F401

    wanted = flavour()
    for runtime in _runtimes():
        if runtime.parent.parent.name == wanted:
            with contextlib.suppress(OSError):  # a loader path may still hold it
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
