"""What a compiled kernel uses, read from the machine code in its library: no tool of CUDA's is needed.

The library embeds a cubin, an ELF file for CUDA devices. Its section ``.nv.info`` is a list of attributes: format (1
byte), attribute (1), then a value (2) or, in format 4, the size of what follows (2). Registers and stack frames come as
pairs (symbol's index, value), 4 bytes each. A frame is what ptxas spills to, and what it keeps arrays in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

EM_CUDA = b"\xbe\x00"  # in the ELF header, 18 bytes in
SIZED, FRAME_SIZE, REGCOUNT = 0x04, 0x11, 0x2F


class Usage(NamedTuple):
    """The most that any of a library's kernels uses."""

    registers: int  # of a thread, at launch
    frame_bytes: int  # of a thread, in local memory: 0 unless something was spilled


def usage(library: bytes) -> Usage | None:
    """What the kernels in a library use; None if no cubin is found in it."""
    registers: list[int] = []
    frames: list[int] = []
    for cubin in _cubins(library):
        for attribute, value in _attributes(cubin):
            if attribute == REGCOUNT:
                registers.append(value)
            elif attribute == FRAME_SIZE:
                frames.append(value)
    return Usage(max(registers), max(frames, default=0)) if registers else None


def _cubins(library: bytes) -> Iterator[bytes]:
    at = library.find(b"\x7fELF", 1)
    while at >= 0:
        if library[at + 18 : at + 20] == EM_CUDA:
            yield library[at:]
        at = library.find(b"\x7fELF", at + 1)


def _attributes(cubin: bytes) -> Iterator[tuple[int, int]]:
    """(attribute, value) of the pairs in ``.nv.info``; nothing from a file that ends too early."""
    try:
        for name, start, size in _sections(cubin):
            if name == b".nv.info":
                yield from _pairs(cubin[start : start + size])
    except (struct.error, ValueError, IndexError):
        return


def _sections(elf: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    base = headers[names][4]
    for name, _, _, _, start, size in headers:
        yield elf[base + name : elf.index(b"\0", base + name)], start, size


def _pairs(info: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            if size == 8:
                yield attribute, struct.unpack_from("<II", info, at)[1]
            at += size
