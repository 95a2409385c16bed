"""Parts of a group's gradients are added up without a GPU: the kernel's PTX, run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ptx_on_cpu
import pytest
import torch
from test_compile_cache import needs_compiler

from fa_sdpa.kernels.sm90 import config

ROOT = Path(__file__).parent.parent
D, DV = 64, 128
COMPILE = """
import sys
from fa_sdpa.kernels import compile
from fa_sdpa.kernels.key import KernelKey
compile._compile(KernelKey.parse(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def add_parts(tmp_path_factory):
    needs_compiler()
    directory = tmp_path_factory.mktemp("ptx")
    key = config.backward_key(torch.bfloat16, D, DV, False)
    env = {**os.environ, "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(directory)}
    subprocess.run([sys.executable, "-c", COMPILE, key.name], env=env, cwd=ROOT, check=True)
    [ptx] = directory.glob("*.ptx")
    return ptx_on_cpu.load(ptx.read_text(), "add_parts", directory)


def drawn(batch, heads, seqlen, size, order):
    x = torch.randn(batch, seqlen, heads, size, dtype=torch.bfloat16).transpose(1, 2)
    return x.contiguous() if order == "bhsd" else x


@pytest.mark.parametrize("order", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    ("batch", "heads_kv", "seqlen", "parts"), [(1, 2, 37, 3), (2, 3, 130, 2), (1, 1, 5, 8), (3, 1, 1, 7)]
)
def test_sums_of_all_parts_and_nothing_else(add_parts, batch, heads_kv, seqlen, parts, order):
    given = [drawn(batch, heads_kv * parts, seqlen, size, "bshd") for size in (D, DV)]
    sums = [drawn(batch, heads_kv, seqlen, size, order).fill_(float("nan")) for size in (D, DV)]
    ctas = -(-max(x.numel() for x in sums) // (256 * 8))
    arguments = [ptx_on_cpu.parameter(x, static_sizes=1) for x in (*given, *sums)]
    for row in range(2):
        ptx_on_cpu.launch(add_parts, ctas, *arguments, row=row)
    for part, found in zip(given, sums, strict=True):
        expected = torch.zeros_like(found, dtype=torch.float32)
        for i in range(parts):  # in this order
            expected += part.unflatten(1, (heads_kv, parts))[:, :, i].float()
        assert torch.equal(found, expected.to(torch.bfloat16))
