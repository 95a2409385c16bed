"""KernelKey → callable: from memory, from a precompiled bundle, or compiled now.

A bundle is a directory with ``kernels.so`` and ``manifest.json``, made by ``write_bundle`` on any machine with the
compiler, GPU or not, and named by ``FA_SDPA_BUNDLE``. Loading from it needs no compiler, only its runtime library and
tvm-ffi. An entry that is missing, or was built from other sources than these, is compiled instead where the compiler is
installed. Imports no compiler itself until a kernel has to be compiled.
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
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import FAMILIES
from .key import KernelKey

SCHEMA = 1  # of manifest.json
LIBRARY, MANIFEST = "kernels.so", "manifest.json"
GPU_ARCH = {90: "sm_90a"}  # the compiler's name of an arch
CLASSES = {"forward": "Forward", "backward": "Backward"}  # direction (a family's module) → its kernel class

Kernel = Callable[..., None]

_kernels: dict[KernelKey, Kernel] = {}
_lock = threading.Lock()


class KernelUnavailable(RuntimeError):
    """A kernel is in no bundle and cannot be compiled here."""


def kernel(key: KernelKey) -> Kernel:
    """The kernel of ``key``, compiled at most once per process. Takes torch tensors; see the kernel's ``__call__``.

    Raises KernelUnavailable if it is in no usable bundle and there is no compiler.
    """
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = _find(key)
    return found


def _find(key: KernelKey) -> Kernel:
    directory = os.environ.get("FA_SDPA_BUNDLE")
    why = "FA_SDPA_BUNDLE names no bundle"
    if directory:
        found, why = _from_bundle(key, Path(directory))
        if found is not None:
            return found
    if importlib.util.find_spec("cutlass") is None:
        raise KernelUnavailable(
            f"kernel {key.name}: {why}, and it cannot be compiled because nvidia-cutlass-dsl is not installed"
        )
    return _compile(key)


def _compile(key: KernelKey) -> Any:
    """Compile ``key``; needs no GPU. The result is callable and can be exported."""
    import cutlass.cute as cute

    module = importlib.import_module(f"{__package__}.{FAMILIES[key.arch]}.{key.direction}")
    built = getattr(module, CLASSES[key.direction])(key)
    return cute.compile(
        built, *module.example_arguments(key), options=f"--enable-tvm-ffi --gpu-arch {GPU_ARCH[key.arch]}"
    )


# ---- bundles ---------------------------------------------------------------------------------------------------------


@functools.cache
def source_hash(arch: int) -> str:
    """Hash of every source file that can change the kernels of ``arch``."""
    here = Path(__file__).parent
    files = [here / "key.py", *sorted((here / "common").glob("*.py")), *sorted((here / FAMILIES[arch]).glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def write_bundle(keys: Iterable[KernelKey], directory: str | Path) -> Path:
    """Compile ``keys`` and link them into ``directory``; return its manifest. Needs the compiler and a C linker."""
    import cutlass.cute as cute

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    keys = list(keys)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        objects = []
        for key in keys:
            objects.append(str(Path(scratch) / f"{key.name}.o"))
            _compile(key).export_to_c(object_file_path=objects[-1], function_name=key.name)
        library = Path(scratch) / LIBRARY
        libraries = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
        subprocess.run(["cc", "-shared", "-o", library, *objects, *libraries], check=True)
        library.replace(directory / LIBRARY)
    manifest = {
        "schema": SCHEMA,
        "dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
        "kernels": {key.name: {**dataclasses.asdict(key), "source": source_hash(key.arch)} for key in keys},
    }
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def _from_bundle(key: KernelKey, directory: Path) -> tuple[Kernel | None, str]:
    """``key``'s kernel from a bundle, or None and why not."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        schema, kernels = manifest["schema"], manifest["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"the bundle {directory} cannot be read ({error})"
    if schema != SCHEMA:
        return None, f"the bundle {directory} has schema {schema}, not {SCHEMA}"
    if key.name not in kernels:
        return None, f"it is not in the bundle {directory}"
    if kernels[key.name].get("source") != source_hash(key.arch):
        return None, f"the bundle {directory} was built from other sources"
    return getattr(_library(directory / LIBRARY), key.name), ""


@functools.cache
def _library(path: Path) -> Any:
    import tvm_ffi

    for runtime in _runtime_libraries():
        with contextlib.suppress(OSError):  # a loader path may still hold it
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi.load_module(str(path))


def _runtime_libraries() -> list[Path]:
    """The compiler's runtime library for torch's CUDA version, in its wheel, found without importing the compiler."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    cuda = (torch.version.cuda or "13").split(".")[0]
    roots = list(spec.submodule_search_locations or ()) if spec else []
    paths = [Path(root) / f"cu{cuda}" / "lib" / "libcute_dsl_runtime.so" for root in roots]
    return [path for path in paths if path.exists()]
