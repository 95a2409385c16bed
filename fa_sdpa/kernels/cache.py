"""Compiled kernels on disk: one shared library a file, shared by all processes of a user.

An entry's name says everything that decides its code (``compile.entry_name``), so an entry is never stale, only unused.
Its file ends in a checksum over name and content: a corrupt, truncated, renamed or foreign file is a miss. Files come
in whole by a rename. A shared library is code, so nothing is taken from a place that somebody else can write to. What
the disk refuses costs the cache, never the call. Imports the standard library only.

Set by environment variables: FA_SDPA_CACHE_DIR, the folder (default: fa_sdpa in $XDG_CACHE_HOME or ~/.cache), and
FA_SDPA_CACHE_LIMIT_MB, from which size on the entries that were not used for longest are dropped (default: 512;
0 turns the cache off).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("fa_sdpa")

DIRECTORY, LIMIT = "FA_SDPA_CACHE_DIR", "FA_SDPA_CACHE_LIMIT_MB"
DEFAULT_LIMIT_MB = 512
SUFFIX = ".so"
MAGIC = b"fa_sdpa\1"  # then the checksum; what follows an ELF image does not disturb the loader
LOCK_PATIENCE = 600.0  # seconds that another process may take over one entry; longer than any compile
LOCK_POLL = 0.02
LEFTOVER_AGE = 3600.0  # seconds after which a temporary file is one that its process left behind

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn about ``message``, the first time in this process. By logging: a warning could be turned into an error."""
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)


class Entry(NamedTuple):
    """One file of the cache."""

    path: Path
    size: int  # bytes
    used: float  # when it was stored or last loaded, seconds since 1970


class Cache:
    """The entries in one folder, which must be one that ``distrust`` has nothing against."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit  # bytes

    def path(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"

    def find(self, name: str) -> Path | None:
        """The library of an entry, whole and trusted, or None. Counts as a use."""
        path = self.path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                why = _others_can_write(os.fstat(file.fileno()))
                content = file.read()
        except OSError:
            return None
        if why:
            say_once(f"cached kernel {path} is not loaded, {why}: it is compiled instead")
            return None
        end = len(content) - len(_footer(name, b""))
        if end <= 0 or content[end:] != _footer(name, content[:end]):
            return None
        with contextlib.suppress(OSError):  # a read-only folder has no order of use
            os.utime(path)
        return path

    def store(self, name: str, library: bytes) -> Path:
        """Keep a library, replacing what was there, and drop old entries. OSError where the disk refuses it."""
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(library)
                file.write(_footer(name, library))
            os.replace(temporary, self.path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._evict(keep=self.path(name))
        return self.path(name)

    def entries(self) -> list[Entry]:
        """All entries, the one not used for longest first."""
        found = []
        for path in self.directory.glob(f"[!.]*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process has just dropped it
                status = path.stat()
                found.append(Entry(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def _evict(self, keep: Path) -> None:
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit:
                break
            if entry.path != keep:
                with contextlib.suppress(OSError):  # a process that has loaded it keeps what it has
                    entry.path.unlink()
                total -= entry.size
        for path in self.directory.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                    path.unlink()

    @contextlib.contextmanager
    def locked(self, name: str, patience: float = LOCK_PATIENCE) -> Iterator[int | None]:
        """Hold the one lock of an entry, so that only one process compiles it.

        Yields the lock's descriptor: a process that inherits it holds the lock as well. Yields None, without a lock,
        where the file system has none or another process keeps it longer than ``patience`` seconds: the work is then
        done twice. The system frees the lock of a process that ends, however it ends.
        """
        path = self.directory / f"{name}.lock"
        descriptor = _acquire(path, patience)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    path.unlink()  # while it is still ours: who waits for it sees that, and opens a new one
                os.close(descriptor)


def _acquire(path: Path, patience: float) -> int | None:
    deadline = time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # held by another, or given up and removed by it
        except OSError:  # no locks here
            os.close(descriptor)
            return None
        os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(LOCK_POLL)


def _footer(name: str, library: bytes) -> bytes:
    return MAGIC + hashlib.sha256(name.encode() + b"\0" + library).digest()


# ---- which folder ----------------------------------------------------------------------------------------------------


def default_directory() -> Path:
    """Where the environment wants the cache; it need not exist."""
    named = os.environ.get(DIRECTORY)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "fa_sdpa"


def open_cache() -> tuple[Cache | None, str]:
    """The user's cache, or None and why there is none. Makes the folder."""
    try:
        limit = float(os.environ.get(LIMIT) or DEFAULT_LIMIT_MB)
    except ValueError:
        say_once(f"{LIMIT}={os.environ[LIMIT]!r} is no number of megabytes: {DEFAULT_LIMIT_MB} is used")
        limit = DEFAULT_LIMIT_MB
    if limit <= 0:
        return None, f"{LIMIT}=0 turns it off"
    try:
        directory = Path(os.path.realpath(default_directory()))
        _make(directory)
        why = distrust(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        return None, str(error)
    return (None, why) if why else (Cache(directory, int(limit * 2**20)), "")


def _make(directory: Path) -> None:
    """Make a folder and those it stands in, each for this user alone."""
    for path in (*reversed(directory.parents), directory):
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):  # another process was faster
                path.mkdir(0o700)


def distrust(path: Path) -> str | None:
    """Why code must not be loaded from a file or folder: who else can write to it, or put another in its place. None
    if nobody can. OSError if it is not there."""
    path = Path(os.path.realpath(path))
    for part in (path, *path.parents):
        status = os.stat(part)
        sticky = part != path and status.st_mode & stat.S_ISVTX  # there, only its owner can replace what stands in it
        why = _others_can_write(status, sticky=bool(sticky))
        if why:
            return f"{part} {why}" if part == path else f"it stands in {part}, {why}"
    return None


def _others_can_write(status: os.stat_result, *, sticky: bool = False) -> str | None:
    if status.st_uid not in _trusted_owners():
        return f"which belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"which others can write to (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@functools.cache
def _trusted_owners() -> frozenset[int]:
    """Who can put code into this process anyway: its user, root, and the owner of this very file."""
    return frozenset({os.geteuid(), 0, os.stat(__file__).st_uid})
