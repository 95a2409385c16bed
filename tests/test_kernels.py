"""Kernel keys, configs, refusals, bundles, and the compiled code itself. No GPU is needed; some need the compiler."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fa_sdpa import kernels
from fa_sdpa.kernels import compile as compiling
from fa_sdpa.kernels import launch
from fa_sdpa.kernels.key import KernelKey
from fa_sdpa.kernels.sm90 import config
from fa_sdpa.meta.spec import AttentionSpec, Options

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import backward_cases  # noqa: E402
import mask_cases  # noqa: E402
import sm90_sanitize  # noqa: E402
from forward_cases import BREADTH, H100, Case, keys_of, random_case  # noqa: E402
from mask_backward_cases import random_backward_case  # noqa: E402
from mask_cases import random_masked_case  # noqa: E402

COMPILE_ALL = bool(os.environ.get("FA_SDPA_COMPILE_ALL"))  # make compile-all: every head dim with every option
MASKS = (
    Options(),
    Options(is_causal=True),
    Options(window_left=100, window_right=20),
)
SHAPES = (  # batch, heads, heads_kv, seqlen_q, seqlen_k: few tiles and many, short and long, GQA
    (1, 1, 1, 128, 128),
    (84, 16, 16, 64, 64),
    (1, 16, 16, 1024, 1024),
    (4, 28, 4, 2048, 2048),
    (1, 16, 16, 8192, 8192),
    (1, 32, 8, 1, 32768),
)


def calls() -> Iterator[Case]:
    """Calls that between them launch every tile with every option, each at the largest head dims that it serves, where
    registers are scarcest; with COMPILE_ALL at every head dim and both dtypes."""
    chosen = [
        *(("bf16", d, d, True) for d in (64, 128, 192, 256)),
        *(("fp16", d, d, False) for d in (64, 128, 192, 256)),
        *((dtype, d, d, False) for dtype, d in (("fp16", 8), ("bf16", 40), ("bf16", 80), ("bf16", 96), ("bf16", 136))),
        *(("bf16", *dims, False) for dims in ((192, 128), (128, 64), (128, 256), (256, 128), (64, 128))),
        ("fp16", 64, 256, False),
    ]
    if COMPILE_ALL:
        chosen += [(dtype, d, d, True) for dtype in ("bf16", "fp16") for d in range(8, 257, 8)]
        chosen += [("bf16", d, dv, True) for d in range(64, 257, 64) for dv in range(64, 257, 64)]
    for dtype, head_dim, head_dim_v, has_options in chosen:
        extras = itertools.product((0.0, 30.0), (False, True)) if has_options else ((0.0, False),)
        for (softcap, sink), mask, shape in itertools.product(extras, MASKS, SHAPES):
            yield Case(dtype, head_dim, head_dim_v, *shape, mask._replace(softcap=softcap), sink)


BACKWARD = [  # both splits of the work, each tile_m, dQ by rows and by columns, stores by TMA and from registers
    config.backward_key(
        dtype, head_dim, head_dim_v, is_causal, window=window, softcap=softcap, deterministic=deterministic
    )
    for deterministic in (False, True)
    for dtype, head_dim, head_dim_v, is_causal, window, softcap in (
        (torch.bfloat16, 64, 64, False, False, False),
        (torch.float16, 64, 64, True, False, False),
        (torch.bfloat16, 64, 64, False, True, False),
        (torch.bfloat16, 64, 64, False, True, True),
        (torch.bfloat16, 128, 128, False, False, False),
        (torch.float16, 128, 128, True, False, False),
        (torch.bfloat16, 128, 128, False, True, False),
        (torch.bfloat16, 128, 128, False, True, True),
        (torch.bfloat16, 96, 96, True, False, True),
        (torch.float16, 8, 8, True, False, False),
        (torch.bfloat16, 80, 48, True, False, False),
        (torch.bfloat16, 192, 64, False, True, False),
        (torch.bfloat16, 64, 192, False, False, False),
        (torch.bfloat16, 192, 128, True, False, False),
        (torch.bfloat16, 192, 192, False, True, False),
        (torch.bfloat16, 192, 192, False, True, True),
        (torch.bfloat16, 256, 256, True, False, False),
        (torch.float16, 256, 256, False, True, True),
        (torch.bfloat16, 256, 8, False, False, False),
    )
]
MASKED = [  # biases take the most registers where O does
    *(
        config.forward_key(
            torch.bfloat16, head_dim, head_dim_v, False, tile, softcap=options, sink=options, attn_mask=mask
        )
        for head_dim, head_dim_v, tile, options, mask in (
            *((d, d, "normal", False, mask) for d in (64, 128, 192, 256) for mask in ("bf16", "fp32")),
            *((d, d, "normal", False, "bool") for d in (64, 256)),
            *((d, d, "small", False, mask) for d, mask in ((128, "bool"), (256, "bf16"), (256, "fp32"))),
            *((d, d, "wide", False, mask) for d in (40, 64) for mask in ("bf16", "fp32")),
            (64, 256, "normal", False, "fp32"),
            *((d, d, "normal", True, "fp32") for d in (128, 256)),
        )
    ),
    *(config.mask_key(mask, *tile) for mask in ("bool", "fp16", "fp32") for tile in ((128, 128), (64, 64), (128, 80))),
    *(config.mask_key("bf16", *tile) for tile in ((128, 112), (192, 128))),
]
MASKED_BACKWARD = [  # each split of the work, biases beside the most registers and in the least shared memory
    *(
        config.backward_key(dtype, head_dim, head_dim_v, False, softcap=softcap, attn_mask=mask)
        for dtype, head_dim, head_dim_v, softcap, masks in (
            (torch.bfloat16, 64, 64, False, ("bool", "bf16", "fp32")),
            (torch.float16, 64, 64, True, ("bool", "fp16", "fp32")),
            (torch.bfloat16, 80, 80, True, ("bool", "bf16", "fp32")),
            (torch.bfloat16, 96, 96, False, ("bool", "bf16", "fp32")),
            (torch.bfloat16, 96, 96, True, ("bool", "bf16", "fp32")),
            (torch.float16, 128, 128, False, ("bool", "fp16", "fp32")),
            (torch.bfloat16, 128, 128, True, ("bool", "bf16", "fp32")),
            (torch.bfloat16, 192, 64, False, ("bool", "bf16")),
            (torch.bfloat16, 192, 128, False, ("bool", "bf16", "fp32")),
            (torch.bfloat16, 192, 192, True, ("bool", "bf16", "fp32")),
            (torch.bfloat16, 256, 256, True, ("bool",)),
        )
        for mask in masks
    ),
    *(
        config.mask_key(mask, *tile, transposed=True)
        for mask in ("bool", "fp16", "fp32")
        for tile in ((128, 128), (64, 128), (64, 64))
        if mask == "bool" or tile != (128, 128)
    ),
]
KEYS = tuple(dict.fromkeys((*config.all_keys(), *keys_of(calls()), *BACKWARD, *MASKED, *MASKED_BACKWARD)))


def spec(**changes: object) -> AttentionSpec:
    plain = AttentionSpec(torch.bfloat16, 2, 8, 2, 512, 512, 128, 128)
    return plain._replace(**changes)  # type: ignore[arg-type]


def needs_compiler() -> None:
    try:
        import cutlass  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the CuTe DSL compiler is not installed: {error}")


def cuda_tool(name: str) -> str:
    """Path of a CUDA binary tool, from PATH or the pip package nvidia-cuda-<name>."""
    found = shutil.which(name)
    roots = [Path(root) / "nvidia" for root in sys.path if (Path(root) / "nvidia").is_dir()]
    paths = [found] if found else [str(path) for root in roots for path in root.glob(f"*/bin/{name}")]
    if not paths:
        pytest.skip(f"{name} is not installed (pip install nvidia-cuda-{name})")
    return paths[0]


# ---- keys and configs ------------------------------------------------------------------------------------------------


def test_key_names_are_distinct_and_parse_back():
    assert len({key.name for key in KEYS}) == len(KEYS) >= 80
    for key in KEYS:
        assert KernelKey.parse(key.name) == key
    with pytest.raises(ValueError, match="is not a kernel name"):
        KernelKey.parse("forward_sm90")


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "sideways"},
        {"dtype": "fp32"},
        {"head_dim": 0},
        {"head_dim_v": 12},
        {"tile_m": 100},
        {"tile_n": -16},
        {"stages": 0},
        {"window": True, "is_causal": True},
        {"attn_mask": "int8"},
        {"attn_mask": "bool", "is_causal": True},
        {"attn_mask": "bool", "direction": "backward", "deterministic": True},
        {"transposed": True},
        {"sink": True, "direction": "backward"},
        {"deterministic": True},
    ],
)
def test_key_is_checked_at_birth(change):
    with pytest.raises(ValueError, match=str(next(iter(change)))):
        dataclasses.replace(KEYS[0], **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((128, 128, 256, 128, 2), "tile_m"),
        ((128, 128, 96, 128, 2), "tile_m"),
        ((128, 128, 128, 264, 2), "tile_n"),
        ((128, 128, 128, 128, 1), "stages"),
        ((128, 128, 128, 128, 4), "smem_bytes"),
        ((100, 128, 128, 128, 2), "head_dim"),
        ((128, 264, 128, 128, 2), "head_dim_v"),
    ],
)
def test_config_is_checked_at_birth(values, message):
    with pytest.raises(ValueError, match=message):
        config.ForwardConfig(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((128, 128, 96, 128, 2), "tile_m"),
        ((128, 128, 64, 112, 2), "tile_n"),
        ((128, 128, 64, 128, 3), "stages"),
        ((256, 256, 64, 128, 2), "smem_bytes"),
        ((240, 16, 64, 128, 2), "tile_n"),
        ((64, 64, 128, 64, 2), "tile_m"),
        ((64, 64, 128, 80, 2), "tile_m"),
        ((256, 256, 64, 96, 2), "smem_bytes"),
        ((100, 128, 64, 128, 2), "head_dim"),
        ((128, 264, 64, 64, 2), "head_dim_v"),
    ],
)
def test_backward_config_is_checked_at_birth(values, message):
    with pytest.raises(ValueError, match=message):
        config.BackwardConfig(*values)


def test_every_pair_of_head_dims_has_a_backward_tile():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for softcap in (False, True):
                chosen = config.backward_config(head_dim, head_dim_v, softcap)
                assert chosen.smem_bytes <= config.SMEM_PER_BLOCK
                assert chosen.stages_dq() or not chosen.splits_keys  # a late dQ is only ever added from shared memory
                assert chosen.dq_columns >= head_dim and chosen.adders == (2 if chosen.stages_dq() else 4)
                assert chosen.stages_dq() or chosen.has_dq_warpgroup  # which adds to the sums itself
                statistics, sums, counters = 4 * 3 * 2 * chosen.tile_m, 2 * 2 * 3 * chosen.tile_m * chosen.dq_columns, 7
                assert chosen.scratch(4, 3, 2, 2, 0) == statistics + sums + counters
                assert chosen.scratch(4, 3, 2, 2, 5) == statistics + sums + counters + 5 * chosen.turn_warps


def test_backward_warpgroups_fit_the_register_file():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            chosen = config.backward_config(head_dim, head_dim_v)
            first, second, producer, dq = chosen.registers
            mma = min(first, second)
            warpgroups = 1 + chosen.mma_warpgroups
            launched = 65536 // (128 * warpgroups) // 8 * 8  # a CTA's registers are those that it has at its start
            assert first + second + producer + dq <= warpgroups * launched
            assert first % 8 == second % 8 == producer % 8 == dq % 8 == 0 and max(first, second) <= 240
            assert (chosen.mma_warpgroups == 3) == chosen.has_dq_warpgroup == (dq > 0)
            assert chosen.dq_columns % chosen.dq_chunk == 0
            columns, columns_v = chosen.head_dim_mma, chosen.head_dim_v_mma
            if chosen.has_dq_warpgroup and chosen.splits_keys:
                assert (columns + columns_v) // 2 + chosen.tile_m + 32 <= mma  # dK, dV, S, dP; addresses
            if chosen.transposes_sums:
                per_column = chosen.tile_n / 128  # of dV, S; of dK, dP and P in 16 bit; addresses
                assert (chosen.dv_columns + chosen.tile_m) * per_column + 32 <= first
                assert (chosen.dk_columns + 1.5 * chosen.tile_m) * per_column + 24 <= second
            elif not chosen.splits_keys:
                assert first == second
                for held, accumulated in ((chosen.k_slices, columns_v), (chosen.v_slices, columns)):
                    assert 4 * held + accumulated // 2 + 3 * chosen.tile_m // 4 + 32 <= mma  # K or V, dV or dK, S, P


@pytest.mark.parametrize(
    ("head_dims", "keys"),
    [
        ((192, 192), 80),
        ((184, 184), 80),
        ((192, 128), 96),
        ((128, 192), 96),
        ((184, 120), 96),
        ((192, 64), 128),
        ((176, 176), 64),  # 192 columns would be multiplied
        ((192, 112), 64),
        ((256, 256), 64),
        ((256, 128), 64),
    ],
)
def test_keys_of_a_backward_tile(head_dims, keys):
    chosen = config.backward_config(*head_dims)
    assert (chosen.tile_n, chosen.transposes_sums) == (keys, keys in config.SHORT_TILES)
    assert not config.backward_config(*head_dims, softcap=True).transposes_sums


@pytest.mark.parametrize("tile_n", [64, *config.SHORT_TILES, 128])
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize("mode", ["full", "causal", (0, 0), (-70, -7), (-200, 33), (5, 130), (-1000, 1000)])
def test_query_blocks_of_a_tile(tile_m, tile_n, mode):
    from fa_sdpa.kernels.common import blocks

    is_causal, window = mode == "causal", None if isinstance(mode, str) else blocks.Window(*mode)
    left, right = window or (-math.inf, 0 if is_causal else math.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "Int32", int)
        patch.setattr(blocks.cutlass, "min", min)
        patch.setattr(blocks.cutlass, "max", max)
        find = blocks.query_blocks.__wrapped__
        for sq, sk in itertools.product((1, 64, 65, 300, 513), (1, 79, 80, 96, 160, 449, 960)):
            rows, before = -(-sq // tile_m), (0, 0)
            for n in range(-(-sk // tile_n)):
                start, unmasked_start, unmasked_end, end = find(n, sq, sk, tile_m, tile_n, is_causal, window)
                assert 0 <= start <= unmasked_start <= unmasked_end <= end <= rows
                assert start >= before[0] and end >= before[1]  # as deterministic mode has it
                before = start, end
                for m in range(rows):
                    # a row's keys are a range, whose ends rise: what the first and the last row see tells of all
                    last_row = min(sq, (m + 1) * tile_m) - 1
                    seen = last_row + right >= n * tile_n and m * tile_m + left <= min(sk, (n + 1) * tile_n) - 1
                    is_whole = (n + 1) * tile_n <= sk
                    is_whole &= m * tile_m + right >= (n + 1) * tile_n - 1 and last_row + left <= n * tile_n
                    assert start <= m < end or not seen
                    assert is_whole or not unmasked_start <= m < unmasked_end


def test_configs_fit_the_register_file():
    for head_dim, tile in ((64, "small"), (64, "normal"), (64, "wide"), (96, "wide"), (128, "normal")):
        chosen = config.forward_config(head_dim, head_dim, tile)
        mma, producer = chosen.registers
        assert 128 * (chosen.mma_warpgroups * mma + producer) <= 65536
        assert mma % 8 == producer % 8 == 0


def test_every_pair_of_head_dims_has_a_tile():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for tile in config.forward_tiles(head_dim, head_dim_v, is_causal=False, has_options=False):
                chosen = config.forward_config(head_dim, head_dim_v, tile)
                assert chosen.tile_n >= (64 if tile in ("small", "split") else 80)
                assert chosen.smem_bytes <= config.SMEM_PER_BLOCK
                assert chosen.head_dim_mma - head_dim < 16 and chosen.head_dim_v_mma - head_dim_v < 16
    with pytest.raises(ValueError, match="wide"):
        config.forward_config(64, 104, "wide")


@pytest.mark.parametrize("mask", ["bf16", "fp32"])
def test_every_pair_of_head_dims_has_a_tile_for_biases(mask):
    """With two of them in flight wherever 16 bits allow it at d128, and the tile of a boolean mask up to there."""
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for tile in ("small", "normal"):
                key = config.forward_key(torch.bfloat16, head_dim, head_dim_v, False, tile, attn_mask=mask)
                chosen = config.forward_config_of(key)
                plain = config.forward_config(head_dim, head_dim_v, tile)
                assert chosen == config.forward_config(head_dim, head_dim_v, tile, config.BIAS_BYTES[mask])
                assert 64 <= chosen.tile_n <= plain.tile_n and chosen.smem_bytes <= config.SMEM_PER_BLOCK
                if max(head_dim, head_dim_v) <= 128:
                    assert chosen.tile_n == plain.tile_n
                    assert chosen.bias_stages == 2 or mask == "fp32" and max(head_dim, head_dim_v) > 64
                assert plain.bias_stages == 0 < chosen.bias_stages


@pytest.mark.parametrize(
    ("call", "tile"),
    [
        # head_dim, is_causal, has_options, seqlen_q, seqlen_k, sequences
        ((128, True, False, 512, 512, 16), "small"),
        ((128, True, True, 512, 512, 16), "small"),
        ((128, True, False, 1024, 1024, 16), "small"),
        ((128, False, False, 1024, 1024, 16), "normal"),
        ((64, True, False, 1024, 1024, 16), "normal"),
        ((80, False, False, 64, 64, 84 * 16), "small"),
        ((80, False, False, 65, 65, 84 * 16), "normal"),
        ((64, False, False, 512, 512, 1024), "wide"),
        ((64, False, True, 512, 512, 1024), "normal"),
        ((64, False, False, 256, 256, 2048), "normal"),
        (
            (64, False, False, 1024, 1024, 16),
            "normal",
        ),  # 96 wide tiles, which would take one wave as 128 normal ones do
        ((64, True, False, 2048, 2048, 256), "normal"),
        ((64, True, False, 4096, 4096, 128), "wide"),
        ((96, False, False, 4096, 4096, 84), "wide"),
        ((128, False, False, 4096, 4096, 64), "normal"),
        ((128, False, False, 4, 4096, 8), "split"),
        ((128, False, True, 4, 4096, 8), "small"),
        ((128, True, False, 4, 4096, 8), "small"),
        ((128, False, False, 4, 128, 8), "small"),
        ((128, False, False, 4, 4096, 128), "small"),
        ((80, False, False, 65, 8192, 16), "split"),
    ],
)
def test_tile_of_a_call(call, tile):
    head_dim, *rest = call
    assert config.forward_tile(head_dim, head_dim, *rest, num_sms=132) == tile
    assert tile in config.forward_tiles(head_dim, head_dim, *rest[:2])


@pytest.mark.parametrize(
    "flags", [{}, {"is_causal": True}, {"window": True}, {"mask": "bool"}, {"sink": True}], ids=str
)
def test_a_call_is_cut_as_its_launch_does(flags):
    for batch, heads, heads_kv, seqlen in (
        (1, 16, 16, 512),
        (1, 16, 16, 4096),
        (8, 28, 4, 1),
        (64, 8, 2, 64),
        (2, 16, 4, 700),
    ):
        call = spec(batch=batch, num_heads=heads, num_heads_kv=heads_kv, seqlen_q=seqlen, seqlen_k=4096, **flags)
        found = kernels.cuts(call, H100, 132)
        [key] = [key for key in launch.keys(call, H100) if key.direction == "forward"]
        assert found.forward[:2] == (key.tile_m, key.tile_n) and (found.forward.parts > 1) == key.split
        packs = heads > heads_kv and seqlen == 1 and flags.keys() <= {"mask"}
        assert found.forward.heads == (heads_kv if packs else heads)
        if "mask" not in flags:
            keys = launch.keys(call._replace(needs_grad=True), H100)
            [key] = [key for key in keys if key.direction == "backward"]
            assert found.backward[:2] == (key.tile_n, key.tile_m) and found.backward.heads % heads_kv == 0


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        # seqlen_q, seqlen_k, sequences: what was measured, docs/kernels/sm90_forward.md
        ((8, 2048, 2), 32),
        ((4, 1024, 8), 8),
        ((4, 2048, 8), 11),
        ((4, 4096, 8), 16),
        ((4, 8192, 64), 2),
        ((4, 8192, 128), 1),
        ((4, 64, 8), 1),
        ((1, 1 << 20, 1), 132),
    ],
)
def test_parts_of_a_call(call, parts):
    chosen = config.forward_parts(*call, num_sms=132)
    assert chosen == parts
    blocks = -(-call[1] // config.SMALL_TILE)
    assert (chosen - 1) * -(-blocks // chosen) < blocks  # the last part has keys


def test_query_heads_are_packed_for_one_query_that_nothing_tells_apart():
    assert config.packs_gqa(8, 1, False)
    assert not any((config.packs_gqa(1, 1, False), config.packs_gqa(8, 2, False), config.packs_gqa(8, 1, True)))


# ---- the backward's order --------------------------------------------------------------------------------------------


WINDOWS = [(0, 0), (-100, 37), (-64, 0), (20, 90), (-300, -200), (-5, 2000), (-2000, 5), (500, 600)]


def units_of(heads, batch, tiles, parts, is_masked, deterministic, num_sms):
    """Schedule and units of a launch in their order, found as the kernel finds them, with Python's integers."""
    needs_compiler()
    from fa_sdpa.kernels.sm90 import backward_order

    groups = heads * batch
    schedule = config.backward_schedule(groups, tiles, 2 * tiles, is_masked, deterministic, num_sms)
    section, sections, ahead, lag, slots = schedule
    order = backward_order.Order(heads, groups, tiles, parts, section, sections, ahead, lag, slots)
    count = ahead * parts + groups * (tiles + 2 * parts) + lag * parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_order, "Int32", int)
        patch.setattr(backward_order, "Int64", int)
        find = backward_order.find_unit.__wrapped__
        units = [find(i, order, is_masked or deterministic, deterministic) for i in range(count + 3)]
    assert [unit.kind for unit in units[-3:]] == [backward_order.END] * 3
    return schedule, units[:-3]


@pytest.mark.parametrize("mode", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("num_sms", [1, 2, 7, 132])
def test_every_unit_comes_once_and_waits_only_for_earlier_ones(mode, num_sms):
    from fa_sdpa.kernels.sm90.backward_order import CONVERT, MULTIPLY, NONE, PREPARE

    sizes = itertools.product((1, 7), (1, 3, 5), (1, 2, 8, 17), (1, 2, 5))
    for heads, batch, tiles, parts in [*sizes, (16, 8, 4, 4), (4, 1, 64, 64)]:
        schedule, units = units_of(heads, batch, tiles, parts, *mode, num_sms)
        units = [(unit.batch * heads + unit.head, unit) for unit in units if unit.kind != NONE]
        first, last = {}, {}
        for i, (group, unit) in enumerate(units):
            assert unit.slot == group % schedule.slots and unit.generation == group // schedule.slots
            assert unit.is_reused == (group + schedule.slots < heads * batch)
            first.setdefault((group, unit.kind), i)
            last[group, unit.kind] = i
        counts = (PREPARE, parts), (MULTIPLY, tiles), (CONVERT, parts)
        expected = itertools.product(range(heads * batch), counts)
        assert sorted((group, unit.kind, unit.index) for group, unit in units) == sorted(
            (group, kind, index) for group, (kind, count) in expected for index in range(count)
        )
        for group in range(heads * batch):
            assert last[group, PREPARE] < first[group, MULTIPLY]
            assert last[group, MULTIPLY] < first[group, CONVERT]  # sums are converted when they are complete
            if group >= schedule.slots:  # and are zero again before the slot's next user adds to them
                assert last[group - schedule.slots, CONVERT] < first[group, MULTIPLY]
        if mode[1]:  # in deterministic mode a tile waits for the group's tile of the next keys
            seen = {}
            for group, unit in units:
                if unit.kind == MULTIPLY:
                    assert unit.index == seen.get(group, tiles) - 1
                    seen[group] = unit.index


@pytest.mark.parametrize("is_causal, bounds", [(False, None), (True, None), *((False, b) for b in WINDOWS)])
def test_the_tile_before_adds_to_what_a_tile_waits_for(is_causal, bounds):
    """And no later tile to what it does not wait for: so tiles take their turns at each block one by one."""
    needs_compiler()
    from fa_sdpa.kernels.common import blocks as block_ranges

    window = bounds and block_ranges.Window(*bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_ranges, "Int32", int)
        visited = block_ranges.query_blocks.__wrapped__
        for seqlen_q, seqlen_k, (tile_m, tile_n) in itertools.product(
            (1, 64, 130, 700), (1, 128, 300, 1000), ((64, 64), (64, 128), (128, 128))
        ):
            sizes = seqlen_q, seqlen_k, tile_m, tile_n, is_causal, window
            tiles = [range(*visited(tile, *sizes)[::3]) for tile in range(-(-seqlen_k // tile_n))]
            for tile, (blocks, before) in enumerate(itertools.pairwise(tiles)):
                waits = set(blocks) & set(range(before.start, seqlen_q))  # as _await_turn in backward_turns.py
                assert waits <= set(before), (sizes, tile)
                assert not (set(blocks) - waits) & set().union(*tiles[tile + 1 :]), (sizes, tile)


def test_turns_have_a_second_stage_where_there_is_room():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            chosen = config.backward_config(head_dim, head_dim_v)
            stages = chosen.stages_dq(deterministic=True)
            assert chosen.stages_dq() <= stages <= 2 and bool(stages) == bool(chosen.stages_dq())
            more = 4 * chosen.tile_m * chosen.dq_columns * (stages - chosen.stages_dq())
            assert chosen.smem_bytes + more <= config.SMEM_PER_BLOCK
            assert chosen.turn_warps == max(1, min(2, 2 * stages))
    stages = {(64, 64): 2, (80, 80): 2, (96, 96): 2, (128, 128): 2, (192, 64): 1, (192, 192): 0, (256, 256): 0}
    for head_dims, expected in stages.items():
        assert config.backward_config(*head_dims).stages_dq(deterministic=True) == expected, head_dims


def test_the_ring_stays_small():
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        for is_masked in (False, True):
            groups = 16384 // seqlen * 16
            schedule = config.backward_schedule(groups, seqlen // 128, seqlen // 64, is_masked, False, 132)
            assert schedule.slots * seqlen * 128 * 4 <= 40 << 20, (seqlen, schedule)


@pytest.mark.parametrize(
    ("call", "heads"),
    [
        # batch, heads, heads_kv, tiles of a key/value head, blocks of queries, is_masked
        ((1, 16, 4, 32, 64, True), 16),
        ((1, 16, 4, 32, 64, False), 4),  # 128 tiles, nearly a wave
        ((2, 16, 4, 18, 64, False), 16),  # 144, of which the last 12 would have a wave of their own; 576 are 4.4 waves
        ((17, 56, 7, 8, 15, False), 7),  # the ring counts with a mask alone
        ((17, 56, 7, 8, 15, True), 28),
        ((4, 8, 2, 8, 16, True), 8),  # 64 tiles, of which the longest would take four times what all SMs need
        ((16, 32, 8, 4, 8, True), 8),  # tiles enough, and a ring of 111 MB: parts would cost more than they save
        ((1, 28, 4, 2, 5, True), 28),
        ((6, 49, 7, 1, 2, True), 49),
        ((1, 28, 4, 2, 1, True), 4),  # too small
        ((1, 28, 4, 0, 64, True), 4),  # no keys
        ((1, 12, 4, 40, 80, True), 12),
        ((1, 16, 16, 4, 100, True), 16),
    ],
)
def test_heads_of_a_backward_call(call, heads):
    tile, (*sizes, is_masked) = config.backward_config(128, 128), call
    assert config.backward_heads(tile, *sizes, sizes[-1], is_masked, deterministic=False, num_sms=132) == heads


@pytest.mark.parametrize(("left", "right"), [(-300, 0), (-64, 20), (0, 0), (7, 64), (-127, 0), (-1000, 0)])
def test_a_tile_visits_the_blocks_that_its_window_leaves(left, right):
    for head_dim in (64, 128, 192):
        tile = config.backward_config(head_dim, head_dim)
        most = 0
        for first in range(0, 640, tile.tile_n):
            rows = range(max(0, first - right), min(639, first + tile.tile_n - 1 - left) + 1)
            most = max(most, len({row // tile.tile_m for row in rows}))
        blocks = 640 // tile.tile_m
        assert most - 1 <= tile.visited(blocks, left, right) <= most
        assert tile.visited(blocks, None, None) == blocks and tile.visited(blocks, 5, -200) == 1


@pytest.mark.parametrize(("window", "heads"), [(8192, 32), (2048, 16), (128, 8)])
def test_parts_of_groups_pay_where_a_window_leaves_much(window, heads):
    tile = config.backward_config(64, 64)
    visited = tile.visited(64, 1 - window, 0)
    assert config.backward_heads(tile, 1, 64, 8, 64, 64, visited, True, False, 132) == heads


@pytest.mark.parametrize(
    ("call", "times"),
    [
        # batch, heads, heads_kv, seqlen, head_dim; µs by parts of a group, on an H100: docs/kernels/sm90_backward.md
        ((1, 28, 4, 8192, 256), {1: 8728.0, 7: 5750.9}),
        ((1, 28, 4, 8192, 128), {1: 2821.9, 7: 2061.5}),
        ((1, 32, 8, 8192, 128), {1: 2702.5, 2: 2495.2, 4: 2439.9}),
        ((1, 24, 3, 10891, 256), {1: 11650.3, 2: 9548.8, 4: 8668.4, 8: 8551.0}),
        ((1, 64, 8, 16384, 128), {1: 20270.8, 2: 19537.1, 4: 17959.9, 8: 18755.2}),
        ((17, 56, 7, 957, 256), {1: 6827.3, 2: 4920.1, 4: 4251.2, 8: 4465.9}),
        ((17, 56, 7, 957, 128), {1: 2056.0, 2: 1697.7, 4: 1727.4, 8: 1893.2}),
        ((17, 56, 7, 957, 64), {1: 946.9, 2: 946.7, 4: 997.3, 8: 1086.7}),
        ((16, 64, 8, 512, 256), {1: 2692.7, 2: 2254.9, 4: 2003.1, 8: 2091.1}),
        ((8, 64, 8, 1285, 192), {1: 3246.1, 2: 2552.1, 4: 2638.0, 8: 2848.4}),
        ((8, 32, 8, 1024, 128), {1: 536.9, 2: 574.5, 4: 579.0}),
        ((8, 32, 8, 1024, 64), {1: 304.9, 2: 322.5, 4: 352.8}),
        ((8, 32, 8, 512, 128), {1: 250.7, 2: 267.5, 4: 281.1}),
        ((40, 42, 6, 269, 256), {1: 2136.8, 7: 1831.8}),
        ((40, 42, 6, 269, 96), {1: 609.6, 7: 705.3}),
        ((64, 42, 6, 534, 96), {1: 1993.3, 7: 2281.6}),
        ((8, 16, 2, 1024, 96), {1: 351.8, 2: 313.8, 4: 290.8, 8: 283.5}),
    ],
)
def test_groups_are_in_parts_where_that_was_faster(call, times):
    batch, heads, heads_kv, seqlen, head_dim = call
    tile = config.backward_config(head_dim, head_dim)
    tiles, blocks = -(-seqlen // tile.tile_n), -(-seqlen // tile.tile_m)
    chosen = config.backward_heads(tile, batch, heads, heads_kv, tiles, blocks, blocks, True, False, 132) // heads_kv
    assert times[chosen] <= 1.08 * min(times.values()), chosen


def test_heads_of_any_backward_call_are_whole_parts_of_groups():
    other = config.backward_config(128, 128)
    dims, sizes = ((64, 64), (96, 96), (192, 128), (256, 256)), ((1, 1), (2, 3), (16, 32), (5, 130))
    for head_dims, batch, (heads, heads_kv), (tiles, blocks) in itertools.product(
        dims, (1, 7, 64), ((8, 8), (28, 4), (64, 8), (71, 1)), sizes
    ):
        tile, call = config.backward_config(*head_dims), (batch, heads, heads_kv, tiles, blocks, blocks)
        for is_masked, deterministic, num_sms in itertools.product((False, True), (False, True), (16, 132)):
            chosen = config.backward_heads(tile, *call, is_masked, deterministic, num_sms)
            assert chosen % heads_kv == 0 and heads % chosen == 0, call
            if heads // heads_kv * blocks < 12:
                assert chosen == heads_kv, call
            if deterministic or not is_masked:  # the tiles alone decide, not what the ring takes
                of_128 = config.backward_heads(other, *call, is_masked, deterministic, num_sms)
                assert chosen == of_128, call


def test_heads_of_a_deterministic_backward_call():
    tile = config.backward_config(128, 128)
    for call, heads in (
        ((2, 32, 8, 64, 128, True), 32),  # 8k tokens: a head of its own each
        ((2, 32, 8, 64, 128, False), 8),
        ((4, 32, 8, 32, 64, True), 16),  # 4k: eight tiles for each SM
        ((16, 32, 8, 16, 32, True), 8),
        ((2, 16, 16, 64, 128, True), 16),
    ):
        *sizes, is_masked = call
        assert config.backward_heads(tile, *sizes, sizes[-1], is_masked, deterministic=True, num_sms=132) == heads, call


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_supported_call_has_no_reason():
    for dtype in (torch.bfloat16, torch.float16):
        for head_dims in ((64, 64), (8, 8), (80, 80), (256, 256), (64, 128), (192, 128), (128, 256)):
            for heads_kv in (1, 2, 8):
                call = spec(dtype=dtype, num_heads_kv=heads_kv, is_causal=True)
                call = call._replace(head_dim=head_dims[0], head_dim_v=head_dims[1])
                assert kernels.unsupported(call, H100) == ()


def test_windows_softcap_and_sink_are_supported():
    for change in ({"bottom_right": True}, {"window": True}, {"softcap": 30.0}, {"sink": True}):
        assert kernels.unsupported(spec(is_causal=True, **change), H100) == ()
    assert [reason.code for reason in kernels.unsupported(spec(softcap=float("inf")), H100)] == ["softcap"]


def test_a_mask_is_prepared_whatever_the_head_dims():
    with pytest.raises(ValueError, match="whatever the head dims"):
        dataclasses.replace(config.mask_key("bool", 128, 128), head_dim=64)


@pytest.mark.parametrize("mask", ["bool", "bf16", "fp32"])
def test_forwards_with_a_mask_are_supported(mask):
    assert kernels.unsupported(spec(mask=mask), H100) == ()
    assert [reason.code for reason in kernels.unsupported(spec(mask="fp16"), H100)] == ["attn_mask"]
    for change in ({}, {"is_causal": True}, {"seqlen_q": 1}, {"window": True}, {"softcap": 30.0}, {"sink": True}):
        forward, preparation = launch.keys(spec(mask=mask, **change), H100)
        assert (forward.direction, forward.attn_mask, preparation.direction) == ("forward", mask, "mask")
        assert (preparation.dtype, preparation.tile_m, preparation.tile_n) == (mask, forward.tile_m, forward.tile_n)
    assert len(launch.keys(spec(mask=mask), H100, any_size=True)) == 4
    call = spec(mask=mask, head_dim=64, head_dim_v=64)
    for change, wide in (({}, mask != "bool"), ({"is_causal": True}, mask != "bool"), ({"softcap": 30.0}, False)):
        tiles = [key.tile_m for key in launch.keys(call._replace(**change), H100, any_size=True)]
        assert tiles == [64, 64, 128, 128] + [192, 192] * wide


@pytest.mark.parametrize("mask", ["bool", "bf16", "fp32"])
def test_backwards_with_a_mask_are_supported(mask):
    call = spec(mask=mask, needs_grad=True)
    for dims in ((64, 64), (8, 8), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)):
        for softcap in (0.0, 30.0):
            wanted = call._replace(head_dim=dims[0], head_dim_v=dims[1], softcap=softcap)
            reasons = kernels.unsupported(wanted, H100)
            assert [reason.code for reason in reasons] == ["attn_mask"] * (dims == (256, 256) and mask != "bool")
    reasons = kernels.unsupported(call._replace(deterministic=True), H100)
    assert [reason.code for reason in reasons] == ["attn_mask"] and "deterministic" in reasons[0].text
    for change in ({}, {"is_causal": True}, {"window": True}, {"softcap": 30.0}, {"sink": True}):
        forward, first, backward, second = launch.keys(spec(mask=mask, needs_grad=True, **change), H100)[:4]
        assert (forward.direction, backward.direction) == ("forward", "backward")
        assert backward.attn_mask == mask and not backward.is_causal and not backward.window
        assert first == config.mask_key(mask, forward.tile_m, forward.tile_n)
        assert second == config.mask_key(mask, backward.tile_m, backward.tile_n, transposed=True)
    for dims in ((64, 64), (40, 24)):  # where a boolean mask has larger tiles, a floating one may turn out to be one
        for change in ({}, {"is_causal": True}):
            call = spec(mask=mask, needs_grad=True, head_dim=dims[0], head_dim_v=dims[1], **change)
            *_, backward, preparation = keys = launch.keys(call, H100)
            assert len(keys) == (4 if mask == "bool" else 6)
            assert (backward.attn_mask, backward.tile_m) == ("bool", 128)
            assert preparation == config.mask_key("bool", 128, 128, transposed=True)
            assert launch.keys(call._replace(softcap=3.0), H100)[-2].attn_mask == mask
            assert [key.direction for key in launch.keys(call._replace(needs_grad=False), H100)] == ["forward", "mask"]


@pytest.mark.parametrize("mask", ["bool", "bf16", "fp32"])
def test_masked_backward_tiles_have_room_for_the_mask(mask):
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for softcap in (False, True):
                try:
                    chosen = config.backward_config(head_dim, head_dim_v, softcap, mask)
                except ValueError:
                    assert mask != "bool" and head_dim > 192 and head_dim_v > 192
                    continue
                plain = config.BackwardConfig(head_dim, head_dim_v, chosen.tile_m, chosen.tile_n, 2)
                bias = chosen.tile_m * chosen.tile_n * {"bool": 0, "bf16": 2, "fp32": 4}[mask]
                assert chosen.mask_bytes == 32 * chosen.tile_n + bias and chosen.smem_bytes <= config.SMEM_PER_BLOCK
                assert chosen.stages_dq() or chosen.has_dq_warpgroup
                if chosen.stages_dq():
                    assert (
                        chosen.smem_bytes
                        == plain.smem_bytes + chosen.mask_bytes + max(chosen.bias_stages - 1, 0) * bias
                    )
                if max(head_dim, head_dim_v) <= 64 and mask == "bf16":
                    assert chosen.bias_stages == 2


def test_refusal_lists_every_reason():
    call = spec(
        dtype=torch.float32,
        head_dim=84,
        head_dim_v=264,
        mask="bool",
        dropout_p=0.1,
        scale=-1.0,
        needs_grad=True,
        deterministic=True,
        last_dim_contiguous=False,
    )
    reasons = kernels.unsupported(call, H100._replace(smem_per_block=101_376))
    assert [reason.code for reason in reasons] == [
        "dtype",
        "head_dim",
        "head_dim_v",
        "attn_mask",
        "dropout",
        "scale",
        "strides",
        "shared_memory",
    ]
    assert "84" in reasons[1].text and "0.1" in reasons[4].text and "101376" in reasons[-1].text


def test_gradients_have_a_kernel_also_in_deterministic_mode():
    for change in ({}, {"window": True}, {"softcap": 30.0}, {"head_dim": 256, "head_dim_v": 8}):
        for deterministic in (False, True):
            call = spec(needs_grad=True, deterministic=deterministic, **change)
            assert kernels.unsupported(call, H100) == ()
            backward = [key for key in launch.keys(call, H100) if key.direction == "backward"]
            assert [key.deterministic for key in backward] == [deterministic]


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_scale_must_be_positive_and_finite(scale):
    assert [reason.code for reason in kernels.unsupported(spec(scale=scale), H100)] == ["scale"]


@pytest.mark.parametrize("arch", [75, 100, None])
def test_other_archs_have_no_family(arch):
    target = H100._replace(arch=arch)
    assert kernels.family_of(target) is None
    assert "no_kernel_family" in [reason.code for reason in kernels.unsupported(spec(), target)]


def test_refusal_never_compares_a_size():
    class Size(int):
        def _refuse(self, other):
            raise AssertionError("a size was compared")

        __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
        __hash__ = int.__hash__

    assert kernels.unsupported(spec(batch=Size(2), seqlen_q=Size(5), seqlen_k=Size(7)), H100) == ()


def test_importing_kernels_does_not_import_the_compiler():
    code = (
        "import sys, fa_sdpa.kernels.launch, fa_sdpa.kernels.sm90.config\n"
        "assert not {'cutlass', 'quack', 'triton', 'tvm_ffi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- launch, as far as it goes without a GPU -------------------------------------------------------------------------


def test_addressable_copies_only_what_tma_cannot_take():
    x = torch.randn(2, 3, 5, 64).to(torch.bfloat16)
    for same in (x, x.transpose(1, 2), x[:, :1].expand(2, 3, 5, 64), x.expand(2, 3, 5, 64)):
        assert launch._addressable(same) is same
    one_row = torch.randn(2, 3, 1, 64).to(torch.bfloat16).as_strided((2, 3, 1, 64), (192, 64, 1, 1))
    assert launch._addressable(one_row).data_ptr() == one_row.data_ptr()
    odd = torch.randn(2, 3, 5, 65).to(torch.bfloat16)
    for bad in (odd[..., :64], odd[..., 1:], torch.randn(1001).to(torch.bfloat16)[1:961].view(1, 3, 5, 64)):
        copy = launch._addressable(bad)
        assert copy.data_ptr() != bad.data_ptr() and torch.equal(copy, bad)
        assert not any(stride % 8 for stride in copy.stride()[:3]) and copy.stride(3) == 1


def test_empty_calls_launch_nothing():
    query, key = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 0, 64)
    out, lse = launch.attention_fwd(query, key, key, None, Options())
    assert out.shape == query.shape and not out.any() and bool((lse == float("-inf")).all())
    sink = torch.tensor([0.5, -1.0])
    out, lse = launch.attention_fwd(query, key, key, sink, Options())
    assert not out.any() and torch.equal(lse, sink[None, :, None].expand(1, 2, 3))
    query = torch.randn(0, 2, 3, 64)
    out, lse = launch.attention_fwd(query, query, query, None, Options())
    assert out.shape == query.shape and lse.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("options", "seqlens", "visible"),
    [
        ({"is_causal": True}, (5, 9), (True, None, None)),
        ({"bottom_right": True}, (5, 9), (False, None, None)),
        ({"is_causal": True, "bottom_right": True}, (9, 9), (True, None, None)),
        ({"is_causal": True, "bottom_right": True}, (5, 9), (False, -5, 4)),
        ({"is_causal": True, "bottom_right": True}, (1, 9), (False, None, None)),  # one row at the end sees all
        ({"is_causal": True, "bottom_right": True}, (9, 5), (False, -9, -4)),  # the first four rows see nothing
        ({"window_left": 3}, (9, 9), (False, -3, 9)),
        ({"window_left": 8, "window_right": 2**40}, (9, 9), (False, None, None)),
        ({"is_causal": True, "window_left": 8}, (9, 9), (True, None, None)),
        ({"window_left": 2, "window_right": 1}, (9, 9), (False, -2, 1)),
    ],
)
def test_windows_become_the_plainest_mask(options, seqlens, visible):
    assert launch._visible(Options(**options), *seqlens) == visible


# ---- compiled code ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """[(directory, keys)]: KEYS, compiled once for this module by one process per core, each into a bundle of its own;
    the directories also hold the cubins."""
    needs_compiler()
    code = (
        "import pathlib, sys\n"
        "from fa_sdpa.kernels import compile\n"
        "from fa_sdpa.kernels.key import KernelKey\n"
        "directory = pathlib.Path(sys.argv[1])\n"
        "build = compile._compile\n"
        "def keep(key):\n"
        "    built = build(key)\n"
        "    [cubin] = directory.glob('cutlass*.cubin')\n"
        "    cubin.rename(directory / f'{key.name}.cubin')\n"
        "    return built\n"
        "compile._compile = keep\n"
        "compile.write_bundle([KernelKey.parse(name) for name in sys.argv[2:]], directory)\n"
    )
    count = len(os.sched_getaffinity(0))
    shares = [(tmp_path_factory.mktemp("bundle"), KEYS[i::count]) for i in range(count)]
    running = []
    for directory, keys in shares:
        env = {**os.environ, "CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(directory)}
        command = [sys.executable, "-c", code, str(directory), *(key.name for key in keys)]
        running.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parent.parent))
    assert [process.wait() for process in running] == [0] * count
    return shares


@pytest.fixture(scope="module")
def bundle(shares):
    """One of the shares: a bundle and the keys that are in it."""
    return shares[0]


@pytest.fixture(scope="module")
def usage(shares):
    """What cuobjdump says about each kernel's resources, by name."""
    tool, reports = cuda_tool("cuobjdump"), {}
    for directory, keys in shares:
        for key in keys:
            command = [tool, "-res-usage", directory / f"{key.name}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            reports[key.name] = done.stdout + done.stderr
    return reports


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_variant_compiles_without_spills(usage, key):
    report = usage[key.name]
    for space in ("STACK", "LOCAL"):
        assert set(re.findall(rf"{space}:(\d+)", report)) == {"0"}, report


def test_words_of_bits_and_of_keys():
    """What a mask's preparation makes of ballots, run on the host."""
    needs_compiler()
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack

    from fa_sdpa.kernels.sm90.mask import _first_bits, _spread

    @cute.jit
    def run(given, first, words):
        for i in range(cute.size(given)):
            first[i] = _first_bits(given[i])
            for t in cutlass.range_constexpr(4):
                words[i, t] = _spread(given[i], cutlass.Int32(2 * t))

    given = torch.tensor([-40, -1, 0, 1, 5, 31, 32, 33, 128, 0x12345678, -0x76543210], dtype=torch.int32)
    first, words = torch.zeros_like(given), torch.zeros(len(given), 4, dtype=torch.int32)
    run(*map(from_dlpack, (given, first, words)))
    for value, bits, row in zip(given.tolist(), first.tolist(), words.tolist(), strict=True):
        assert bits & 0xFFFFFFFF == (1 << min(max(value, 0), 32)) - 1
        for t, word in enumerate(row):  # bit 2v + j is key 8v + 2t + j
            assert word == sum((value >> 8 * v + 2 * t + j & 1) << 2 * v + j for v in range(4) for j in range(2))


def test_sanitizer_cases_take_every_code_path_of_the_numerics_cases():
    forward = keys_of(random_case(0, index, BREADTH) for index in range(3000))
    backward = backward_cases.keys_of(backward_cases.draw(0, index) for index in range(3000))
    sanitized = {sm90_sanitize.code_path(key) for key in sm90_sanitize.keys()}
    masked = map(random_masked_case, itertools.repeat(0), range(3000))
    masked_keys = mask_cases.keys_of((masked_case.case, masked_case.dtype) for masked_case in masked)
    trained = map(random_backward_case, itertools.repeat(0), range(3000))
    masked_keys += mask_cases.keys_of(((each.case, each.dtype) for each in trained), needs_grad=True)
    missing = [key.name for key in (*forward, *backward, *masked_keys) if sm90_sanitize.code_path(key) not in sanitized]
    assert missing == []


def test_bundle_serves_its_kernels(bundle, monkeypatch):
    pytest.importorskip("tvm_ffi")
    directory, keys = bundle
    manifest = json.loads((directory / compiling.MANIFEST).read_text())
    assert manifest["schema"] == compiling.SCHEMA and set(manifest["kernels"]) == {key.name for key in keys}
    monkeypatch.setenv("FA_SDPA_BUNDLE", str(directory))
    monkeypatch.setattr(compiling, "_kernels", {})
    monkeypatch.setattr(compiling, "_compile", lambda key: pytest.fail(f"{key.name} was compiled"))
    for key in keys:
        assert callable(compiling.kernel(key))
        assert compiling.kernel(key) is compiling.kernel(key)


def test_stale_or_missing_entries_are_compiled_instead(bundle, tmp_path, monkeypatch):
    pytest.importorskip("tvm_ffi")
    directory, keys = bundle
    manifest = json.loads((directory / compiling.MANIFEST).read_text())
    manifest["kernels"][keys[0].name]["source"] = "other"
    del manifest["kernels"][keys[1].name]
    (tmp_path / compiling.MANIFEST).write_text(json.dumps(manifest))
    shutil.copy(directory / compiling.LIBRARY, tmp_path)
    monkeypatch.setenv("FA_SDPA_BUNDLE", str(tmp_path))
    monkeypatch.setattr(compiling, "_kernels", {})
    compiled = []
    monkeypatch.setattr(compiling, "_compile", lambda key: compiled.append(key) or print)
    for key in keys[:3]:
        compiling.kernel(key)
    assert compiled == list(keys[:2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"schema": 99, "kernels": {}}', "schema 99"),
        (json.dumps({"schema": compiling.SCHEMA, "kernels": {}}), "not in the bundle"),
        (json.dumps({"schema": compiling.SCHEMA, "kernels": {KEYS[0].name: {}}}), "other sources"),
    ],
)
def test_without_bundle_or_compiler_the_error_names_the_kernel(content, message, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / compiling.MANIFEST).write_text(content)
    monkeypatch.setenv("FA_SDPA_BUNDLE", str(tmp_path))
    monkeypatch.setattr(compiling, "_kernels", {})
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compiling.KernelUnavailable, match=message) as raised:
        compiling.kernel(KEYS[0])
    assert KEYS[0].name in str(raised.value)
