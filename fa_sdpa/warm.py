"""Compiles kernels before they are needed: which ones a model, a shape or a log of calls needs, and that in parallel,
into the cache or into a bundle. Needs the compiler and a C linker, but no GPU."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import kernels
from .kernels import compile as compiling
from .kernels import launch
from .kernels.cache import open_cache
from .kernels.key import KernelKey
from .kernels.worker import Worker, WorkerDied
from .meta.models import MODELS
from .meta.spec import AttentionSpec
from .meta.target import Target

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Outcome(NamedTuple):
    """What became of one kernel."""

    key: KernelKey
    seconds: float  # of compiling; 0 where that was not needed
    error: str | None = None

    @property
    def what(self) -> str:
        """In a word or two."""
        return "failed" if self.error else f"{self.seconds:.1f} s" if self.seconds else "there already"


# ---- which kernels ---------------------------------------------------------------------------------------------------


def specs_of_model(model: str, dtype: torch.dtype | None = None) -> list[AttentionSpec]:
    """What a model may ask for: prefill, decoding and training. The sizes mean nothing: for ``keys_of(any_size=True)``.

    Args:
        model: a name of meta.models.MODELS, or the path of a transformers ``config.json``.
        dtype: default: the config's if that is bf16 or fp16, or else bf16.

    Raises:
        ValueError: neither of the two, or a config in which no attention is found.
    """
    if model in MODELS:
        found = {(layer.head_dim, layer.head_dim): torch.bfloat16 for layer in MODELS[model]}
    else:
        try:
            found = dict(_attention_of(json.loads(Path(model).read_text()), torch.bfloat16))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{model} is no config.json and none of {', '.join(MODELS)}: {error}") from error
        if not found:
            raise ValueError(f"{model} names no head dim: neither head_dim nor hidden_size and num_attention_heads")
    return [
        AttentionSpec(dtype or own, 1, 1, 1, 1, 1, dim, dim_v, is_causal=is_causal, needs_grad=needs_grad)
        for (dim, dim_v), own in found.items()
        for needs_grad in (False, True)
        for is_causal in (False, True)
    ]


def _attention_of(config: dict[str, Any], dtype: torch.dtype) -> Iterable[tuple[tuple[int, int], torch.dtype]]:
    """The pairs of head dims in a config and in the configs inside it, each with its dtype."""
    dtype = HALVES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), dtype)
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads")
    heads = heads or config.get("encoder_attention_heads")
    if config.get("qk_rope_head_dim") and config.get("v_head_dim"):  # multi-head latent attention
        yield (config.get("qk_nope_head_dim", 0) + config["qk_rope_head_dim"], config["v_head_dim"]), dtype
    elif isinstance(config.get("head_dim") or config.get("d_kv"), int):
        dim = config.get("head_dim") or config["d_kv"]
        yield (dim, dim), dtype
    elif isinstance(width, int) and isinstance(heads, int):
        yield (width // heads, width // heads), dtype
    for inner in config.values():
        if isinstance(inner, dict):
            yield from _attention_of(inner, dtype)


def keys_of(
    specs: Iterable[AttentionSpec], target: Target, *, any_size: bool = False
) -> tuple[list[KernelKey], list[str]]:
    """The kernels that run these calls on ``target``, each once, and why some calls have none. With ``any_size`` the
    calls may come in all sizes."""
    keys: dict[KernelKey, None] = {}
    refusals: dict[str, None] = {}
    for spec in specs:
        reasons = kernels.unsupported(spec, target)
        if reasons:
            refusals["; ".join(map(str, reasons))] = None
        else:
            keys.update(dict.fromkeys(launch.keys(spec, target, any_size=any_size)))
    return list(keys), list(refusals)


def common_keys(target: Target) -> list[KernelKey]:
    """The kernels of the most common calls. ValueError if there are none for ``target``."""
    family = kernels.family_of(target)
    if family in (None, "cpu"):
        raise ValueError(f"there are no kernels to compile for {target.name or target.device_type} {target.arch or ''}")
    return list(import_module(f"{kernels.__name__}.{family}.config").all_keys())


# ---- compiling them --------------------------------------------------------------------------------------------------


def to_cache(keys: Sequence[KernelKey], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Compile what the cache lacks, in ``jobs`` processes; ``report`` hears of every kernel as it is done.

    Raises RuntimeError if there is no cache, compiler or linker.
    """
    cache, why = open_cache()
    if cache is None:
        raise RuntimeError(f"there is no cache: {why}")
    done = [Outcome(key, 0.0) for key in keys if cache.find(compiling.entry_name(key))]
    for outcome in done:
        report(outcome)
    there = {outcome.key for outcome in done}
    return done + _compile([key for key in keys if key not in there], jobs, report, lambda key: {})


def to_bundle(
    keys: Sequence[KernelKey], jobs: int, report: Callable[[Outcome], None], directory: Path
) -> tuple[list[Outcome], Path | None]:
    """Compile all ``keys`` and link them into a bundle; its manifest, or None if a kernel failed."""
    if not keys:
        raise RuntimeError("a bundle needs at least one kernel")
    with compiling.scratch_in(directory) as scratch:
        objects = {key: scratch / f"{key.name}.o" for key in keys}
        done = _compile(keys, jobs, report, lambda key: {"object": str(objects[key])})
        if any(outcome.error for outcome in done):
            return done, None
        return done, compiling.link_bundle(keys, list(objects.values()), directory)


def _compile(
    keys: Sequence[KernelKey],
    jobs: int,
    report: Callable[[Outcome], None],
    request: Callable[[KernelKey], dict[str, Any]],
) -> list[Outcome]:
    if keys:
        compiling.require_compiler(keys[0], "it was not compiled before")
        if compiling.linker() is None:
            raise RuntimeError(compiling.NO_LINKER)
    todo: queue.SimpleQueue[KernelKey] = queue.SimpleQueue()
    for key in keys:
        todo.put(key)
    outcomes: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_work, args=(todo, outcomes, request), daemon=True)
        for _ in range(min(max(jobs, 1), len(keys)))
    ]
    for thread in threads:
        thread.start()
    done = []
    for _ in keys:
        outcome = outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        report(outcome)
        done.append(outcome)
    return done


def _work(
    todo: queue.SimpleQueue[KernelKey],
    outcomes: queue.SimpleQueue[Outcome | BaseException],
    request: Callable[[KernelKey], dict[str, Any]],
) -> None:
    """One process's share: it takes the next kernel when it is done with one."""
    worker = None
    try:
        while True:
            key = todo.get_nowait()
            worker = worker or Worker()
            try:
                answer = worker.ask(key, **request(key))
                outcomes.put(Outcome(key, answer["seconds"], answer["error"]))
            except WorkerDied as error:
                outcomes.put(Outcome(key, 0.0, str(error)))
                worker.close()
                worker = None
    except queue.Empty:
        pass
    except BaseException as error:  # nobody waits for this thread, only for what it puts there
        outcomes.put(error)
    finally:
        if worker is not None:
            worker.close()
