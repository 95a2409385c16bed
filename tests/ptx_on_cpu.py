"""Kernels on a CPU: their PTX as C, for tests of kernels of whole warps without asynchronous copies and WGMMAs.

A thread is a function that stops where threads meet (vote, shfl, bar.sync) and is called again to go on. A warp goes on
when its 32 threads have stopped at the same place, and it is an error if they stop at different ones; a CTA does so
when all of its warps are at a barrier. Instructions that are not known here are an error, too. Shared memory begins as
0xA5.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from torch import Tensor

TYPES = {f"{kind}{size}": f"{c}{size}_t" for kind, c in (("s", "int"), ("u", "uint")) for size in (8, 16, 32, 64)}
TYPES |= {f"b{size}": f"uint{size}_t" for size in (8, 16, 32, 64)}
OPERATORS = {"add": "+", "sub": "-", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
WIDE = {"s16": "int32_t", "u16": "uint32_t", "s32": "int64_t", "u32": "uint64_t"}

PROLOGUE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct {
    uint32_t r[%(r)d]; uint64_t rd[%(rd)d]; uint16_t rs[%(rs)d]; uint8_t p[%(p)d];
    int at; uint32_t in, out; int source;
} Thread;
static uint8_t *shared;
static uint32_t row_of_ctas;
static float as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
static uint32_t as_bits(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
static uint32_t as_bf16(float f) { uint32_t x = as_bits(f); return x + 0x7FFF + (x >> 16 & 1) >> 16; }
static float half(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static float least(float a, float b) { return isnan(a) || isnan(b) ? NAN : a < b ? a : b; }
static float most(float a, float b) { return isnan(a) || isnan(b) ? NAN : a > b ? a : b; }
enum { DONE, VOTE, SHUFFLE, BARRIER };
static int go_on(Thread *t, int tid, int cta, uint8_t **parameters) {
    switch (t->at) { case 0:;
"""
EPILOGUE = r"""
    }
    abort();
}
enum { THREADS = %(threads)d, SHARED = 1 << 18 };
int run(int ctas, uint32_t row, uint8_t **parameters) {
    static Thread threads[THREADS];
    static int state[THREADS];
    shared = malloc(SHARED);
    row_of_ctas = row;
    for (int cta = 0; cta < ctas; cta++) {
        memset(threads, 0, sizeof threads);
        memset(shared, 0xA5, SHARED);
        for (int i = 0; i < THREADS; i++) state[i] = go_on(&threads[i], i, cta, parameters);
        for (int live = 1; live;) {
            int moved = 0, waiting = 0;
            live = 0;
            for (int w = 0; w < THREADS; w += 32) {
                uint32_t votes = 0;
                for (int i = w; i < w + 32; i++) {
                    if (state[i] != state[w] || state[w] != DONE && threads[i].at != threads[w].at) return 1;
                    votes |= (uint32_t)(threads[i].in != 0) << (i - w);
                }
                live += state[w] != DONE;
                waiting += state[w] == BARRIER;
                if (state[w] == DONE || state[w] == BARRIER) continue;
                for (int i = w; i < w + 32; i++)
                    threads[i].out = state[i] == VOTE ? votes : threads[w + (threads[i].source & 31)].in;
                for (int i = w; i < w + 32; i++) state[i] = go_on(&threads[i], i, cta, parameters);
                moved = 1;
            }
            if (live && !moved) {
                if (waiting * 32 != THREADS) return 2;
                for (int i = 0; i < THREADS; i++) state[i] = go_on(&threads[i], i, cta, parameters);
            }
        }
    }
    free(shared);
    return 0;
}
"""


def _value(operand: str) -> str:
    register = re.fullmatch(r"%(rd|rs|r|p)(\d+)", operand)
    if register:
        return f"t->{register[1]}[{register[2]}]"
    if operand.startswith("0f"):
        return f"0x{operand[2:]}u"
    if operand.startswith("__dynamic_shmem"):
        return "0u"
    known = {"%tid.x": "(uint32_t)tid", "%ctaid.x": "(uint32_t)cta", "%ctaid.y": "row_of_ctas"}
    return known.get(operand, f"({operand})")


def _memory(operation: list[str], operands: list[list[str]]) -> str:
    """ld and st of one or more neighbouring values."""
    is_load, space = operation[0] == "ld", operation[1]
    values, [place] = operands if is_load else reversed(operands)
    base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", place).groups()
    kind, size = TYPES[operation[-1]], int(operation[-1][1:]) // 8
    if space == "param":
        start = f"parameters[{base.rsplit('_', 1)[1]}]"
    else:
        start = f"shared + {_value(base)}" if space == "shared" else f"(uint8_t *){_value(base)}"
    statements = []
    for i, value in enumerate(values):
        memory = f"*({kind} *)({start} + ({int(offset or 0) + i * size}))"
        statements.append(f"{_value(value)} = {memory};" if is_load else f"{memory} = {_value(value)};")
    return " ".join(statements)


def _comparison(operation: list[str], a: str, b: str) -> str:
    name, kind = operation[1:3]
    if kind != "f32":
        return f"({TYPES[kind]}){a} {COMPARISONS[name]} ({TYPES[kind]}){b}"
    a, b = f"as_float({a})", f"as_float({b})"
    if name.endswith("u"):  # true for NaN, too
        return f"{a} {COMPARISONS[name[:-1]]} {b} || isnan({a}) || isnan({b})"
    return f"{a} {COMPARISONS[name]} {b} && !isnan({a}) && !isnan({b})"


def _meeting(operation: list[str], operands: list[str], place: int) -> str:
    """An instruction at which the threads of a warp or CTA meet."""
    if operation[0] == "bar":
        return f"t->at = {place}; return BARRIER; case {place}:;"
    result, value, *others = operands
    if operation[0] == "vote":
        found = {"any": "t->out != 0", "all": "t->out == 0xFFFFFFFFu", "ballot": "t->out"}[operation[2]]
        return f"t->in = {value}; t->at = {place}; return VOTE; case {place}: {result} = {found};"
    source = {"bfly": f"tid % 32 ^ {others[0]}", "idx": others[0]}[operation[2]]
    return f"t->in = {value}; t->source = {source}; t->at = {place}; return SHUFFLE; case {place}: {result} = t->out;"


def _result(operation: list[str], operands: list[str]) -> str:
    """The value of an instruction of registers."""
    name, kind = operation[0], operation[-1]
    c = TYPES.get(kind, "")
    a, b, third = (*operands, "", "")[:3]
    if name == "mov":
        return f"({a}) != 0" if kind == "pred" else a
    if name == "setp":
        return _comparison(operation, a, b)
    if name == "selp":
        return f"{third} ? {a} : {b}"
    if name == "not":
        return f"!{a}" if kind == "pred" else f"~{a}"
    if name == "neg":
        return f"-{a}"
    if operation == ["add", "f32"]:
        return f"as_bits(as_float({a}) + as_float({b}))"
    if operation == ["cvt", "rn", "bf16x2", "f32"]:  # not of NaN
        return f"as_bf16(as_float({a})) << 16 | as_bf16(as_float({b}))"
    if name in OPERATORS:
        return f"({c}){a} {OPERATORS[name]} ({c}){b}" if c else f"{a} {OPERATORS[name]} {b}"
    if name in ("mul", "mad") and operation[1] == "wide":
        return f"({WIDE[kind]})({c}){a} * ({WIDE[kind]})({c}){b}"
    if name in ("mul", "mad") and operation[1] == "lo":
        return f"({c}){a} * ({c}){b}" + (f" + ({c}){third}" if name == "mad" else "")
    if name == "mul" and operation[1:] == ["hi", "u32"]:
        return f"(uint64_t)(uint32_t){a} * (uint32_t){b} >> 32"
    if name == "mul" and operation[1:] == ["hi", "u16"]:
        return f"(uint32_t)(uint16_t){a} * (uint16_t){b} >> 16"
    if name in ("shl", "shr"):
        beyond = f"({c}){a} < 0 ? -1 : 0" if name == "shr" and kind[0] == "s" else "0"
        return f"(uint32_t){b} >= {kind[1:]} ? {beyond} : ({c}){a} {'<<' if name == 'shl' else '>>'} {b}"
    if name in ("min", "max") and kind == "f32":
        return f"as_bits({'least' if name == 'min' else 'most'}(as_float({a}), as_float({b})))"
    if name in ("min", "max"):
        return f"({c}){a} {'<' if name == 'min' else '>'} ({c}){b} ? {a} : {b}"
    if name == "popc":
        return f"__builtin_popcount({a})"
    if name == "cvt":
        to, of = operation[-2:]
        return {"bf16": f"(uint32_t){a} << 16", "f16": f"as_bits(half({a}))"}.get(
            of
        ) or f"({TYPES[to]})({TYPES[of]}){a}"
    raise ValueError(f"{'.'.join(operation)} is not known here")


def translate(ptx: str, which: str) -> str:
    """The kernel whose name contains ``which`` as a C program with a function ``run(ctas, parameters)``."""
    entry = next(text for text in ptx.split(".visible .entry ")[1:] if which in text.split("(", 1)[0])
    signature, code = entry.split("{", 1)
    code = code.split("\n}", 1)[0]
    counts = {kind: int((re.findall(rf"%{kind}<(\d+)>", code) or ["1"])[0]) for kind in ("r", "rd", "rs", "p")}
    statements = []
    for line in (line.split("//")[0].strip() for line in code.splitlines()):
        if line.endswith(":"):
            statements.append(line.replace("$", "") + ";")
        if not line.endswith(";") or line.startswith("."):
            continue
        guard, name, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+?)\s*(?:\s(.*))?;", line).groups()
        operands = [
            part.strip("{}").replace(" ", "").split(",") for part in re.findall(r"\{[^}]*\}|[^,\s][^,]*", rest or "")
        ]
        operands = [[item.strip() for item in group] for group in operands]
        operation, values = name.split("."), [_value(group[0]) for group in operands]
        if operation[0] == "bra":
            statement = f"goto {operands[0][0].replace('$', '')};"
        elif operation[0] == "ret":
            statement = "return DONE;"
        elif operation[0] in ("fence", "griddepcontrol"):
            statement = ""
        elif operation[0] == "mov" and len(operands[0]) == 2:
            low, high = map(_value, operands[0])
            statement = f"{low} = {values[1]}; {high} = {values[1]} >> 16;"
        elif operation[0] in ("ld", "st"):
            statement = _memory(operation, operands)
        elif operation[0] in ("vote", "shfl", "bar"):
            if guard:
                raise ValueError(f"{line}: threads may not be there")
            statement = _meeting(operation, values, len(statements) + 1)
        else:
            statement = f"{values[0]} = {_result(operation, values[1:])};"
        condition = f"if ({guard[:1].replace('%', '')}{_value(guard.lstrip('!'))}) " if guard else ""
        statements.append(f"{condition}{{ {statement} }}")
    threads = int(re.search(r"\.reqntid (\d+)", signature)[1])
    return PROLOGUE % counts + "\n".join(statements) + EPILOGUE % {"threads": threads}


def parameter(x: Tensor | int, static_sizes: int = 0, static_stride: bool = True) -> bytes:
    """A kernel's argument: a 32-bit number, or a tensor, whose last sizes and whose last stride may be static."""
    if isinstance(x, int):
        return x.to_bytes(4, "little", signed=True)
    sizes = x.shape[: x.dim() - static_sizes]
    strides = x.stride()[: x.dim() - static_stride]
    head = x.data_ptr().to_bytes(8, "little") + b"".join(size.to_bytes(4, "little") for size in sizes)
    return head + bytes(-len(head) % 8) + b"".join(stride.to_bytes(8, "little") for stride in strides)


def load(ptx: str, which: str, directory: Path) -> ctypes.CDLL:
    """The kernel, compiled in ``directory``."""
    source = directory / f"{which}.c"
    source.write_text(translate(ptx, which))
    library = source.with_suffix(".so")
    flags = ("-O1", "-w", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


def launch(kernel: ctypes.CDLL, ctas: int, *arguments: bytes, row: int = 0) -> None:
    """Run so many CTAs, a row of the grid, one after the other."""
    memory = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
    status = kernel.run(ctas, row, (ctypes.c_void_p * len(memory))(*map(ctypes.addressof, memory)))
    assert status == 0, ("", "threads of a warp are at different places", "a barrier that some threads do not reach")[
        status
    ]
