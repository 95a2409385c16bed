"""Preparation of an attn_mask without a GPU: the kernels' PTX, run on the CPU, against what it has to be."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import mask_lists
import ptx_on_cpu
import pytest
import torch
from ptx_on_cpu import parameter
from test_compile_cache import needs_compiler

from fa_sdpa.kernels import masks
from fa_sdpa.meta.spec import mask_kind

ROOT = Path(__file__).parent.parent
KINDS = [
    (torch.bool, 64, 64),
    (torch.bfloat16, 64, 64),
    (torch.float32, 64, 64),
    (torch.float16, 128, 128),
    (torch.float32, 128, 80),
    (torch.bfloat16, 192, 128),
    (torch.float32, 192, 128),
]
GARBAGE = 0x5A5A5A5B
BACKWARD_KINDS = [
    (torch.bool, 128, 128),
    (torch.bfloat16, 64, 64),
    (torch.float16, 64, 128),
    (torch.float32, 64, 128),
]

COMPILE = """
import pathlib, sys
from fa_sdpa.kernels import compile
from fa_sdpa.kernels.key import KernelKey
directory = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    compile._compile(KernelKey.parse(name))
    [ptx] = directory.glob("cutlass*.ptx")
    ptx.rename(directory / f"{name}.ptx")
"""


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """Prepares masks, as masks.prepared, on the CPU with the kernels of a key."""
    needs_compiler()
    directory = tmp_path_factory.mktemp("ptx")
    keys = [mask_lists.config.mask_key(mask_kind(dtype), *tile) for dtype, *tile in KINDS]
    keys += [mask_lists.config.mask_key(mask_kind(dtype), *tile, transposed=True) for dtype, *tile in BACKWARD_KINDS]
    env = {**os.environ, "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(directory)}
    command = [sys.executable, "-c", COMPILE, str(directory), *(key.name for key in keys)]
    subprocess.run(command, env=env, cwd=ROOT, check=True)

    @functools.cache
    def kernels(name):
        ptx, own = (directory / f"{name}.ptx").read_text(), directory / name
        own.mkdir()
        found = ("classify", "settle", "enlist") if "settle" in ptx else ("classify", "enlist")
        return {which: ptx_on_cpu.load(ptx, which, own) for which in found}

    def prepared(mask, tiles, key):
        run = run_transposed if key.transposed else run_forward
        return masks.prepared(mask, tiles, lambda: functools.partial(run, kernels(key.name)))

    return prepared


def fill(*tensors):
    """As memory that is allocated may be."""
    for x in tensors:
        if x is not None:
            x.fill_(GARBAGE)


def run_forward(kernels, mask, kinds, rows, bits, lists, left, right):
    """The launches of sm90/mask.py."""
    fill(kinds, rows, bits, lists)
    in_rows = () if rows is None else (parameter(rows, 1),)
    outputs = parameter(bits, 1), parameter(lists)
    whole = parameter(mask, static_stride=rows is not None), parameter(kinds), *in_rows, *outputs
    ptx_on_cpu.launch(kernels["classify"], kinds.numel(), *whole, parameter(left), parameter(right))
    ptx_on_cpu.launch(kernels["enlist"], kinds[..., 0].numel(), parameter(kinds), *in_rows, parameter(lists))


def run_transposed(kernels, mask, kinds, rows, hidden, bits, all_kinds, all_hidden, lists, left, right):
    """The launches of sm90/mask_transposed.py."""
    fill(kinds, rows, hidden, bits, lists)
    in_rows = () if rows is None else (parameter(rows),)
    whole = parameter(mask, static_stride=rows is not None), parameter(kinds), *in_rows, parameter(hidden, 2)
    window, is_shared = (parameter(left), parameter(right)), parameter(int(lists.size(1) < kinds.size(1)))
    ptx_on_cpu.launch(kernels["classify"], kinds.numel(), *whole, parameter(bits, 1), *window, is_shared)
    if rows is not None:
        ptx_on_cpu.launch(kernels["settle"], kinds[..., 0].numel(), parameter(kinds), *in_rows)
    found = parameter(all_kinds), parameter(all_hidden, 2), parameter(lists)
    ptx_on_cpu.launch(kernels["enlist"], lists[..., 0].numel(), *found)


@pytest.mark.parametrize("dtype, tile_m, tile_n", KINDS, ids=str)
@pytest.mark.parametrize("sq, sk, window", mask_lists.SIZES)
def test_lists_and_bits(prepare, sq, sk, window, dtype, tile_m, tile_n):
    mask_lists.check_lists(prepare, sq, sk, window, dtype, tile_m, tile_n)


@pytest.mark.parametrize("dtype, tile_m, tile_n", KINDS, ids=str)
def test_lists_and_bits_of_rows_that_see_nothing(prepare, dtype, tile_m, tile_n):
    for value in (False,) if dtype is torch.bool else (-math.inf, mask_lists.LOW[dtype]):
        mask_lists.check_lists_of_unseen_rows(prepare, value, dtype, tile_m, tile_n)


@pytest.mark.parametrize("dtype, tile_m, tile_n", BACKWARD_KINDS, ids=str)
@pytest.mark.parametrize("heads, heads_kv", [(1, 1), (4, 2)])
@pytest.mark.parametrize("sq, sk, window", mask_lists.SIZES)
def test_lists_and_bits_of_a_backward(prepare, sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n):
    mask_lists.check_lists_of_a_backward(prepare, sq, sk, window, heads, heads_kv, dtype, tile_m, tile_n)


@pytest.mark.parametrize("dtype, tile_m, tile_n", BACKWARD_KINDS, ids=str)
@pytest.mark.parametrize("heads, heads_kv", [(1, 1), (4, 2)])
@pytest.mark.parametrize("sk, window", [(1, (-masks.UNBOUNDED, 0)), (150, None), (150, (-masks.UNBOUNDED, 0))])
def test_lists_and_bits_of_a_backward_of_rows_that_see_nothing(
    prepare, sk, window, heads, heads_kv, dtype, tile_m, tile_n
):
    for value in (False,) if dtype is torch.bool else (-math.inf, mask_lists.LOW[dtype]):
        mask_lists.check_lists_of_a_backward_of_unseen_rows(
            prepare, value, sk, window, heads, heads_kv, dtype, tile_m, tile_n
        )


HIDING = {
    "triangle": (True, lambda mask, low: mask.masked_fill_(~mask.new_ones(mask.shape[-2:]).tril().bool(), low)),
    "padding": (True, lambda mask, low: mask[..., 90:].fill_(low)),
    "nothing": (True, lambda mask, low: mask),
    "minus zero": (True, lambda mask, low: mask[..., 3:9].fill_(-0.0)),
    "one value": (False, lambda mask, low: mask[:, -1, -1, 7].fill_(1e-4)),
    "one value beside others that hide": (False, lambda mask, low: mask.fill_(low)[:, -1, -1, 7].fill_(-1.0)),
    "a value that nearly hides": (False, lambda mask, low: mask[:, -1, -1, 7].fill_(-31000.0)),
    "not a number": (None, lambda mask, low: mask[:, -1, -1, 7].fill_(math.nan)),
    "infinity": (False, lambda mask, low: mask[:, -1, -1, 7].fill_(math.inf)),
    "a row without a key": (None, lambda mask, low: mask[:, -1, -1].fill_(low)),
}


@pytest.mark.parametrize("content", HIDING)
@pytest.mark.parametrize("sizes", [(1, 1, 150, 131), (2, 1, 1, 131), (1, 4, 150, 131)], ids=str)
@pytest.mark.parametrize("dtype, tile_m, tile_n", BACKWARD_KINDS[2:], ids=str)
def test_a_mask_that_adds_nothing_is_as_good_as_boolean(prepare, monkeypatch, dtype, tile_m, tile_n, sizes, content):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(masks.private, "current_stream", lambda device: 7)
    masks.forget()
    key = mask_lists.config.mask_key(mask_kind(dtype), tile_m, tile_n, transposed=True)
    tiles = masks.Tiles(2, 4, 150, 131, None, None, tile_m, tile_n, 2)
    for low in (-math.inf, mask_lists.LOW[dtype]):
        expected, change = HIDING[content]
        mask = torch.zeros(sizes, dtype=dtype)
        change(mask, low)
        if content == "a row without a key":  # of low values it has the mean of all
            expected = low == -math.inf
        with masks.in_eager_mode():
            assert masks.as_boolean(mask, tiles) is None
            prepare(mask, tiles, key)
            boolean = masks.as_boolean(mask, tiles)
        if expected is not None:
            assert (boolean is not None) == expected
        if boolean is not None:
            assert boolean.dtype is torch.bool and torch.equal(boolean, mask == 0)
    masks.forget()


@pytest.mark.parametrize("rows, columns, stages", [(80, 192, 2), (128, 64, 2), (64, 256, 1)])
def test_hidden_keys_are_cleared_in_swizzled_tiles(tmp_path, rows, columns, stages):
    """All of their rows, in the right stage, and nothing else."""
    needs_compiler()
    env = {**os.environ, "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    script = ROOT / "tests" / "clear_keys_kernel.py"
    subprocess.run([sys.executable, str(script), *map(str, (rows, columns, stages))], env=env, check=True)
    [ptx] = tmp_path.glob("cutlass*.ptx")
    kernel = ptx_on_cpu.load(ptx.read_text(), "kernel", tmp_path)
    hidden = torch.rand(rows) < 0.4
    bits = torch.zeros(128, dtype=torch.int64)
    bits[:rows] = hidden
    words = (bits.view(4, 32) << torch.arange(32)).sum(1).to(torch.int32)
    for stage in range(stages):
        tile = torch.randint(1, 1 << 15, (rows, columns, stages), dtype=torch.int16)
        expected = tile.clone()
        expected[hidden, :, stage] = 0
        addresses = (x.data_ptr().to_bytes(8, "little") for x in (tile, words))
        ptx_on_cpu.launch(kernel, 1, *addresses, parameter(stage))
        assert torch.equal(tile, expected)


@pytest.mark.parametrize("code", ["foo.s32 %r1, %r2;", "@%p1 vote.sync.any.pred %p1, %p2, -1;"])
def test_unknown_instructions_are_an_error(code):
    with pytest.raises(ValueError, match="not known|may not be there"):
        ptx_on_cpu.translate(f".visible .entry kernel_a()\n.reqntid 32, 1, 1\n{{\n{code}\nret;\n}}\n", "a")
