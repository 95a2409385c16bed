"""When kernels are made, on a GPU that has them: eager calls, compiled graphs, CUDA graph capture. Skipped elsewhere.

Each test is a fresh process with an empty cache, for only there is nothing compiled or loaded. With FA_SDPA_BUNDLE the
kernels are loaded from it, so that what needs the compiler is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda import lacking

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())
COMPILER = importlib.util.find_spec("cutlass") is not None

START = """
import os, sys, time, torch, fa_sdpa
from fa_sdpa import Policy
from fa_sdpa.kernels import jit
from torch.nn.functional import scaled_dot_product_attention as sdpa
q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
native = sdpa(q, k, v, is_causal=True)
def same(out):
    torch.testing.assert_close(out, native, atol=2e-2, rtol=2e-2)
def routed():
    done = fa_sdpa.stats().routed
    fa_sdpa.reset_stats()
    return done
"""

EAGER = """
fa_sdpa.enable(Policy("always", jit="background"))
begun = time.perf_counter()
same(sdpa(q, k, v, is_causal=True))
assert not routed() and "compiling" in str(fa_sdpa.explain(q, k, v, is_causal=True))
assert time.perf_counter() - begun < 1.0
assert jit.wait(120)
same(sdpa(q, k, v, is_causal=True))
assert routed() == 1
assert "cutlass" not in sys.modules
"""

FAILURE = """
from fa_sdpa.kernels import worker
worker._START = "import sys; sys.exit('broken compiler')"
fa_sdpa.enable(Policy("always", jit="background"))
same(sdpa(q, k, v, is_causal=True))
assert jit.wait(120)
same(sdpa(q, k, v, is_causal=True))
assert not routed() and "kernel_failed" in str(fa_sdpa.explain(q, k, v, is_causal=True))
"""

COMPILED = """
fa_sdpa.enable(Policy("always", jit="background"))
graph = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), fullgraph=True)
same(graph(q, k, v))
assert routed() == 1
"""

REDUCED = """
fa_sdpa.enable(Policy("always", jit="background"))
graph = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), fullgraph=True, mode="reduce-overhead")
for _ in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    same(graph(q, k, v))
assert routed() == 1
"""

DYNAMIC = """
fa_sdpa.enable(Policy("always", jit="background"))
graph = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), fullgraph=True, dynamic=True)
for n in (512, 300, 9000):  # 9,000 rows take another kernel than 300
    q, k, v = (torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with fa_sdpa.disable():
        native = sdpa(q, k, v, is_causal=True)
    same(graph(q, k, v))
assert routed() == 1
"""

CAPTURE = """
def captured():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdpa(q, k, v, is_causal=True)
    graph.replay()
    torch.cuda.synchronize()
    same(out)
    return routed()
captured_mode = sys.argv[1]
fa_sdpa.enable(Policy("always", jit=captured_mode))
assert captured() == 0  # nothing is compiled or loaded in a capture
assert jit.wait(120)
sdpa(q, k, v, is_causal=True)
assert routed() == 1 and captured() == 1
"""

# The kernel's library is in this process, its code is not yet on the device.
CAPTURE_FIRST_LAUNCH = """
fa_sdpa.enable(Policy("always", jit="block"))
from fa_sdpa.kernels import compile, launch
from fa_sdpa.meta.spec import AttentionSpec
from fa_sdpa.meta.target import Target
for key in launch.keys(AttentionSpec.of(q, k, v, is_causal=True), Target.of(q.device)):
    compile.kernel(key)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = sdpa(q, k, v, is_causal=True)
graph.replay()
torch.cuda.synchronize()
same(out)
print("routed in capture:", routed())
"""

OP_IN_CAPTURE = """
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        torch.ops.fa4.attention_fwd(q, k, v, is_causal=True)
except Exception as error:
    assert "graph is captured" in str(error), error
else:
    raise AssertionError
"""


def fresh(tmp_path, code: str, *args: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env.update(FA_SDPA_CACHE_DIR=str(tmp_path / "cache"), FA_SDPA_CACHE_LIMIT_MB="100")
    command = [sys.executable, "-c", START + code, *args]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.skipif(not COMPILER or "FA_SDPA_BUNDLE" in os.environ, reason="nothing is to be compiled here")
@pytest.mark.parametrize("code", [EAGER, FAILURE], ids=["eager", "failure"])
def test_background(code, tmp_path):
    fresh(tmp_path, code)


@pytest.mark.parametrize("code", [COMPILED, REDUCED, DYNAMIC], ids=["compiled", "reduce-overhead", "dynamic"])
def test_a_traced_graph_has_its_kernels(code, tmp_path):
    fresh(tmp_path, code)


@pytest.mark.parametrize("how", ["background", "block"])
def test_nothing_is_compiled_inside_a_capture(how, tmp_path):
    fresh(tmp_path, CAPTURE, how)


def test_the_first_launch_may_be_captured(tmp_path):
    fresh(tmp_path, CAPTURE_FIRST_LAUNCH)


def test_the_op_itself_raises_inside_a_capture(tmp_path):
    fresh(tmp_path, OP_IN_CAPTURE)
