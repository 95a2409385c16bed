"""Compile caches on disk: a process that starts warm from the other state's run compiles and runs its own code."""

import json
import os
import subprocess
import sys

import pytest

import fa_sdpa

ROOT = os.path.dirname(os.path.dirname(fa_sdpa.__file__))

# For each state in turn: which attention ops ran, forward and backward, and whether AOTAutograd's cache had the code.
PROGRAM = """
import json, sys
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
import fa_sdpa

def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

torch.manual_seed(0)
x = [torch.randn(2, 4, 17, 8, requires_grad=True) for _ in range(3)]
expected = attend(*x)
report = []
for state in sys.argv[1:]:
    if state == "off":
        fa_sdpa.disable()
    else:
        fa_sdpa.enable(state)
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True)
    compiled(*x)
    with torch.profiler.profile() as profile:
        out = compiled(*x)
        torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, expected)
    ran = {event.name for event in profile.events()}
    names = [name for name in ("fa4::attention_fwd", "fa4::attention_bwd") if name in ran]
    names += ["torch"] * any("scaled_dot_product" in name for name in ran)
    report.append([state, " ".join(names), counters["aot_autograd"]["autograd_cache_hit"]])
print(json.dumps(report))
"""
FA4 = "fa4::attention_fwd fa4::attention_bwd"
RUNS = {"off": "torch", "never": "torch", "always": FA4}


def run(cache, *states):
    path = os.pathsep.join([ROOT, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache), "FA_SDPA": ""}
    command = [sys.executable, "-c", PROGRAM, *states]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("first, second", [("off", "always"), ("always", "off")])
def test_second_process_starts_warm_from_the_other_state(tmp_path, first, second):
    assert run(tmp_path, first) == [[first, RUNS[first], 0]]
    assert run(tmp_path, second, first) == [
        [second, RUNS[second], 0],  # the other state's entry does not fit
        [first, RUNS[first], 1],  # its own does
    ]


def test_calls_left_to_torch_share_plain_torchs_entries(tmp_path):
    run(tmp_path, "off")
    assert run(tmp_path, "never") == [["never", "torch", 1]]
