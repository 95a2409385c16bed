"""python -m fa_sdpa bench: what it is asked for, who is judged and how, what is made of the times. No GPU."""

from __future__ import annotations

import collections
import contextlib
import csv
import itertools
import json
import subprocess
import sys

import pytest
import torch

import fa_sdpa
from fa_sdpa import reference
from fa_sdpa.__main__ import main
from fa_sdpa.bench import cells, command, contenders, gate, host, measure, plots, report, timing
from fa_sdpa.bench.cells import Cell
from fa_sdpa.bench.contenders import Contender, contender, sdpa
from fa_sdpa.meta.models import MODELS
from fa_sdpa.meta.spec import AttentionSpec

SMALL = Cell(2, 4, 2, 24, 24, 16, 16, True, "fp32")


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_flops_and_bytes_are_those_of_the_peers_papers():
    cell = Cell(2, 8, 8, 1024, 1024, 64, 64)
    assert cell.flops == 4 * 2 * 8 * 1024 * 1024 * 64
    assert cell.flops_of("backward") == 2.5 * cell.flops and cell.flops_of("both") == 3.5 * cell.flops
    assert cell._replace(is_causal=True).flops == cell.flops // 2
    tensor, rows = 2 * 2 * 8 * 1024 * 64, 2 * 8 * 1024
    assert cell.bytes_of("forward") == 4 * tensor + 4 * rows
    assert cell.bytes_of("backward") == 8 * tensor + 4 * rows
    grouped = cell._replace(heads_kv=2, head_dim_v=32)
    assert grouped.bytes_of("forward") == tensor + tensor // 4 + tensor // 8 + tensor // 2 + 4 * rows


def test_grid():
    whole = cells.grid([512, 4096], [64, 80], (False, True), ("bf16", "fp16"))
    assert len(whole) == len(set(whole)) == len({str(cell) for cell in whole}) == 16
    assert {cell.batch * cell.seqlen_q for cell in whole} == {16384}
    assert {(cell.head_dim, cell.heads) for cell in whole} == {(64, 32), (80, 25)}
    shaped = cells.grid([7], [64], (True,), batches=[1, 3], heads=6, heads_kv=2, seqlen_k=9, head_dim_v=32)
    assert shaped == [Cell(b, 6, 2, 7, 9, 64, 32, True) for b in (1, 3)]


def parse(line):
    found = []
    with contextlib.ExitStack() as stack:
        patch = pytest.MonkeyPatch()
        stack.callback(patch.undo)
        patch.setattr(command, "run", lambda args: found.append(args))
        main(["bench", *line.split()])
    return found[0]


def test_arguments():
    work = command.wanted(parse("--seqlen 512,4k --head-dim 64 --causal yes --direction forward,both"))
    assert [(cell.seqlen_q, cell.batch, direction) for cell, direction in work] == [
        (512, 32, "forward"), (4096, 4, "forward"), (512, 32, "both"), (4096, 4, "both"),
    ]  # fmt: skip
    assert len(command.wanted(parse(""))) == 24
    assert [cell.dtype for cell, _ in command.wanted(parse("--case 3"))] == ["bf16", "fp16", "fp8"]
    of_model = command.wanted(parse("--model qwen2.5-7b --batch 2 --seqlen 1k"))
    assert [str(cell) for cell, _ in of_model] == ["d128 causal 1024 b2 h28/4", "d128 full 1x8192 b2 h28/4"]
    with pytest.raises(ValueError, match="one of --model"):
        command.wanted(parse("--model vit --case 1"))
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        command.wanted(parse("--heads 5 --kv-heads 2"))


@pytest.mark.parametrize(
    "line", ["--seqlen 4x", "--backend fa5", "--case 5", "--direction up", "--model gpt", "--dtype ,"]
)
def test_arguments_that_mean_nothing(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *line.split()])
    assert (line.split()[1].strip(",") or "nothing: not one of") in capsys.readouterr().err


def test_models_are_whole_and_warm_knows_them():
    assert {"llama3-8b", "qwen2.5-7b", "mistral-7b", "mixtral-8x7b", "llama2-7b", "sd3", "flux", "vit", "bert"} <= set(
        MODELS
    )
    for cell in cells.of_models(MODELS):
        assert cell.heads % cell.heads_kv == 0 and cell.head_dim in (64, 128)
    whisper = cells.of_models(["whisper"], seqlens=[100])
    assert [(c.seqlen_q, c.seqlen_k) for c in whisper] == [(100, 100), (100, 100), (448, 1500)]


def test_recorded_calls(tmp_path, capsys):
    plain = AttentionSpec(torch.bfloat16, 2, 8, 2, 33, 65, 64, 32, True)
    specs = [plain, plain, plain._replace(needs_grad=True), plain._replace(mask="bool"), plain._replace(dropout_p=0.1)]
    found, left_out = cells.of_calls(specs)
    assert found == [(Cell(2, 8, 2, 33, 65, 64, 32, True), "forward"), (Cell(2, 8, 2, 33, 65, 64, 32, True), "both")]
    assert sum(left_out.values()) == 2 and all(why.startswith("with ") for why in left_out)
    (tmp_path / "script.py").write_text(
        "import torch\nx = torch.randn(1, 2, 8, 16)\n"
        "torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)\n"
        "torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(8, 8).bool())\n"
    )
    log = tmp_path / "calls.json"
    program = [sys.executable, "-m", "fa_sdpa", "run", "--record", log, tmp_path / "script.py"]
    subprocess.run(program, check=True, capture_output=True)
    assert command.wanted(parse(f"--from {log}")) == [(Cell(1, 2, 2, 8, 8, 16, 16, True, "fp32"), "forward")]
    assert "1 calls with an attn_mask" in capsys.readouterr().err


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, (), (1, 2, 3), (2,), (2, 3)], ids=str)  # the dimensions that are of size 1
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(24, 24), (31, 9), (9, 31)])
def test_reference_in_blocks_is_the_reference(monkeypatch, is_causal, seqlen_q, seqlen_k, mask):
    inputs = measure.draw(Cell(2, 4, 2, seqlen_q, seqlen_k, 16, 8, is_causal, "fp32"), "both", "cpu")
    if mask is not None:
        sizes = [1 if dim in mask else size for dim, size in enumerate((2, 4, seqlen_q, seqlen_k))]
        inputs = inputs._replace(attn_mask=torch.rand(sizes) < 0.7 if len(mask) % 2 else torch.randn(sizes))
    whole = gate.expected(inputs)
    monkeypatch.setattr(gate, "SCORES", 2 * seqlen_k * 5)  # five rows of two heads
    blocks = gate.expected(inputs)
    assert [(want.batch, want.head_kv) for want in blocks] == [(0, 0), (1, 1)]
    leaves = [x.detach().double().requires_grad_() for x in inputs[:3]]
    mask = inputs.attn_mask
    mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    out, _ = reference.attention(*leaves, is_causal=is_causal, attn_mask=mask)
    grads = torch.autograd.grad(out, leaves, inputs.dout.double())
    for want, same in zip(blocks, whole, strict=True):
        for i, x in enumerate((out, *grads)):
            per_group = want.exact[i].shape[1]
            heads = slice(want.head_kv * per_group, (want.head_kv + 1) * per_group)
            torch.testing.assert_close(want.exact[i], x[want.batch : want.batch + 1, heads].detach())
            torch.testing.assert_close(want.rounded[i], same.rounded[i])


def broken_call(how):
    def call(query, key, value, is_causal):
        out = sdpa(query, key, value, is_causal)
        if how == "out":
            return out + 0.01 * (torch.arange(out.shape[2]) == 3)[:, None]
        if how == "nan":
            return torch.where(torch.arange(out.shape[1])[:, None, None] == 2, torch.nan, out)  # in no group looked at
        if how == "mask":
            return sdpa(query, key, value, not is_causal)
        if how == "dk":
            return out + 0.0 * value.sum() + 0.01 * (key - key.detach()).sum()
        raise RuntimeError("not this\nshape")

    return call


@pytest.mark.parametrize("how", ["out", "nan", "mask", "dk", "raises"])
def test_who_is_wrong_or_refuses_is_not_timed(how):
    cell = SMALL._replace(heads=6, heads_kv=6)
    rows = measure.measure(cell, "both", [Contender("bad", broken_call(how)), contender("native")], "cpu", rounds=1)
    bad, native = rows
    expected = {"raises": "RuntimeError: not this", "nan": "wrong: out has elements", "dk": "wrong: dk is off"}
    assert bad["reason"].startswith(expected.get(how, "wrong: out is off"))
    assert bad["eager_ms"] is None and bad["tflops"] is None
    assert native["reason"] == "" and native["eager_ms"] > 0


def test_a_mask_is_in_every_call_and_who_ignores_it_is_wrong():
    cell = SMALL._replace(is_causal=False)
    mask = torch.rand(cell.batch, 1, cell.seqlen_q, cell.seqlen_k) < 0.6
    ignores = Contender("ignores", lambda query, key, value, is_causal, attn_mask: sdpa(query, key, value, is_causal))
    both = [contender("fa4"), contender("native"), ignores]
    before = fa_sdpa.stats().routed
    ours, native, bad = measure.measure(cell, "both", both, "cpu", rounds=1, attn_mask=mask)
    assert (
        [ours["reason"], native["reason"]] == ["", ""] and ours["ratio_eager"] > 0 and fa_sdpa.stats().routed > before
    )
    assert bad["reason"].startswith("wrong: out is off") and bad["eager_ms"] is None


def test_ours_goes_through_the_router_and_native_does_not():
    ran = []

    def spy(call, name):
        def spied(*arguments):
            ran.append((name, fa_sdpa.is_enabled()))
            return call(*arguments)

        return spied

    both = [contender(name) for name in ("fa4", "native")]
    both = [c._replace(call=spy(c.call, c.name)) for c in both]
    before = fa_sdpa.stats().routed
    rows = measure.measure(SMALL, "forward", both, "cpu", rounds=1)
    assert set(ran) == {("fa4", True), ("native", False)}
    assert fa_sdpa.stats().routed - before == sum(name == "fa4" for name, _ in ran)
    assert [row["reason"] for row in rows] == ["", ""] and rows[0]["ratio_eager"] > 0
    assert rows[1]["chosen"] in ("flash", "math")


def test_a_call_that_we_leave_to_torch_is_said_so_and_not_timed():
    rows = measure.measure(SMALL._replace(dtype="fp8"), "forward", [contender("fa4")], "cpu", rounds=1)
    assert rows[0]["reason"].startswith("native: ") and "[dtype]" in rows[0]["reason"] and not command.failures(rows)


def test_backward_alone_is_alone():
    ran = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ran.append("forward")
            ctx.save_for_backward(q, k, v)
            return q.clone()

        @staticmethod
        def backward(ctx, dout):
            ran.append("backward")
            return dout, dout, dout

    peer = Contender("peer", lambda q, k, v, c: Square.apply(q, k, v))
    sets = [measure.draw(SMALL._replace(heads_kv=4), "backward", "cpu") for _ in range(2)]
    for direction, expected in (("backward", ["backward"] * 3), ("both", ["forward", "backward"] * 3)):
        runs = [measure._run(peer, direction, inputs) for inputs in sets]
        ran.clear()
        for i in range(3):
            runs[i % 2]()
        assert ran == expected


# ---- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_each_contender_follows_each_other_one_equally_often(count):
    orders = timing.orders(count)
    assert len(orders) >= timing.ROUNDS
    follows = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(follows) == set(itertools.permutations(range(count), 2)) and len(set(follows.values())) <= 1
    assert len(timing.in_rounds(["a", "b", "c"], lambda name: name, 2, whole=False)["a"]) == 2
    assert timing.orders(0) == []


def test_calls_rotate_over_the_input_sets_with_the_scope_open():
    open_now, made = [], []

    @contextlib.contextmanager
    def scope():
        open_now.append(True)
        yield
        open_now.pop()

    runs = [lambda i=i: made.append((i, bool(open_now))) for i in range(3)]
    times = timing.measure({"a": timing.Prepared(scope, runs)}, "cpu", rounds=1)["a"]
    assert times.gpu_ms is times.graph_ms is times.host_us is None and times.eager_ms >= 0
    assert all(inside for _, inside in made)
    last = [i for i, _ in made[-timing.CALLS :]]  # these runs take no time, so a turn has as many calls as it may
    assert last == [i % 3 for i in range(timing.CALLS)]


class FakeEvent:
    """Of a device whose clock is a list of what was enqueued, in ms."""

    device: list[float] = []
    late = False

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = sum(self.device)

    def query(self):
        return self.late

    def elapsed_time(self, other):
        return other.at - self.at


def test_device_time_leaves_out_the_hosts_and_says_none_where_it_cannot(monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (slept.append(cycles), FakeEvent.device.append(99.0)))
    FakeEvent.device = []
    prepared = timing.Prepared(contextlib.nullcontext, [lambda: FakeEvent.device.append(0.25)])
    gpu_ms, host_us = timing._gpu_ms_host_us(prepared, 8, 100.0)
    assert gpu_ms == 0.25 and host_us > 0
    assert slept == [round(timing.BLOCKED * 0.8 * timing.CYCLES_PER_MS)]
    monkeypatch.setattr(FakeEvent, "late", True)  # the device was never behind the host
    gpu_ms, _ = timing._gpu_ms_host_us(prepared, 8, 100.0)
    assert gpu_ms is None and slept[-1] > timing.MOST_BLOCKED_MS * timing.CYCLES_PER_MS
    monkeypatch.setattr(FakeEvent, "late", False)  # one hiccup of the host does not slow down what comes after
    timing._gpu_ms_host_us(prepared, 1, 1.0)
    assert slept[-1] == round(timing.BLOCKED_MS * timing.CYCLES_PER_MS)


# ---- rows ------------------------------------------------------------------------------------------------------------


def made_up(cell, backend, ms, direction="forward", **more):
    row = measure._blank(cell, direction, backend) | {"gpu_ms": ms, "eager_ms": ms and 2 * ms, "graph_ms": ms} | more
    measure._add_rates(row, cell, direction, {"matmul_tflops": 800.0, "copy_gbs": 3000.0})
    return row


def made_up_rows():
    rows = []
    for seqlen in (512, 1024, 2048):
        cell = Cell(16384 // seqlen, 16, 16, seqlen, seqlen, 128, 128, True)
        of_cell = [
            made_up(cell, "fa4", 0.5),
            made_up(cell, "native", 2.0 * seqlen / 2048, chosen="cudnn"),
            made_up(cell, "flash", 4.0),
            made_up(cell, "efficient", None, reason="RuntimeError: no"),
        ]
        measure.add_ratios(of_cell)
        rows += of_cell
    return rows


def test_rates_and_ratios():
    rows = made_up_rows()
    ours = [row for row in rows if row["backend"] == "fa4"]
    assert [row["ratio_gpu"] for row in ours] == [1.0, 2.0, 4.0] == [row["ratio_graph"] for row in ours]
    assert ours[0]["tflops"] == pytest.approx(4 * 16 * 16384 * 512 * 128 / 2 / 0.5e-3 / 1e12, rel=1e-4)
    assert ours[0]["share_of_matmul"] == pytest.approx(ours[0]["tflops"] / 800, rel=1e-4)
    assert ours[0]["share_of_copy"] == pytest.approx(
        Cell(32, 16, 16, 512, 512, 128, 128).bytes_of("forward") / 0.5e-3 / 3e12, rel=1e-4
    )
    about = report.summary(rows)["forward, gpu"]
    assert about == {"cells": 3, "geomean": 2.0, "minimum": 1.0, "minimum_at": "d128 causal 512 b32 h16", "ahead": 3}


def test_table_names_who_did_not_run_and_why():
    text = report.table(made_up_rows())
    line = next(line for line in text.splitlines() if line.startswith("d128 causal 2048"))
    assert line.split()[-5:] == ["-", "4.00", "4.00", "4.00", "cudnn"]
    assert "efficient: RuntimeError: no  (forward d128 causal 512 b32 h16 and 2 more)" in text
    with_ms = report.table(made_up_rows(), with_ms=True)
    assert "0.5000" in with_ms and "2.0000" in with_ms


def test_csv_has_every_row_and_column(tmp_path):
    rows = made_up_rows()
    report.write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows) and tuple(read[0]) == measure.COLUMNS
    assert float(read[1]["gpu_ms"]) == rows[1]["gpu_ms"] and read[3]["gpu_ms"] == ""


def test_plots_need_matplotlib_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'fa_sdpa\[plots\]'"):
        plots.plot(made_up_rows(), tmp_path)
    with pytest.raises(SystemExit, match="matplotlib"):
        main(["bench", "--plots", str(tmp_path)])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = made_up_rows()
    written = plots.plot(rows, tmp_path / "png")
    assert [path.name for path in written] == ["tflops_forward.png", "crossover_forward.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in written)
    assert plots.plot(rows[:1], tmp_path / "none") == []


def test_what_is_plotted():
    rows = made_up_rows()
    larger = made_up(Cell(64, 16, 16, 2048, 2048, 128, 128, True), "fa4", 1.0)
    points = plots.series([larger, *rows])["d128 causal h16 bf16"]["fa4"]
    assert points[-1] == (2048, larger["tflops"]) and len(points) == 3
    assert {name: len(points) for name, points in plots.series(rows)["d128 causal h16 bf16"].items()} == {
        "fa4": 3, "native": 3, "flash": 3,
    }  # fmt: skip
    assert plots.speedups(rows, "eager_ms") == {"d128 causal h16": {"32×512": 1.0, "16×1024": 2.0, "8×2048": 4.0}}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    files = f"--json {tmp_path / 'rows.json'} --csv {tmp_path / 'rows.csv'}"
    shape = "--device cpu --dtype fp32 --seqlen 16,32 --head-dim 16 --tokens 64 --heads 2 --kv-heads 1 --quick"
    main(f"bench {shape} --direction forward,both --backend fa4,native,math {files}".split())
    said = capsys.readouterr()
    assert "d16 causal 32 b2 h2/1 fp32" in said.out and "× the best peer over 4 cells" in said.out
    assert "8/8 both d16 causal 32" in said.err
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["provenance"]["torch"] == torch.__version__ and "rounds" in content["protocol"]
    rows = content["results"]
    assert len(rows) == 24 and {row["backend"] for row in rows} == {"fa4", "native", "math"}
    assert all(row["eager_ms"] > 0 and row["reason"] == "" for row in rows)
    assert not fa_sdpa.is_enabled()


def test_host_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "targets", lambda *of: [])  # how fast this machine is, is not the question
    monkeypatch.setattr(host, "measure_graph", lambda *of: {"over_torch_us": 0.0})  # needs a C++ compiler
    with pytest.raises(SystemExit, match="False"):
        host.main(["--device", "cpu", "--rounds", "1", "--calls", "10", "--json", str(tmp_path / "host.json")])
    assert "left to torch by policy" in capsys.readouterr().out
    content = json.loads((tmp_path / "host.json").read_text())
    assert {row["state"] for row in content["results"]} >= set(host.STATES) and content["provenance"]["torch"]
    asked = []
    monkeypatch.setattr(host, "main", asked.extend)
    main("bench host --device cpu --quick --json there.json".split())
    assert asked == ["--device", "cpu", "--rounds", "5", "--json", "there.json"]


def test_command_fails_where_we_are_wrong(monkeypatch, capsys):
    real = contenders.contender
    wrong = Contender("fa4", broken_call("out"))
    monkeypatch.setattr(command, "contender", lambda name: wrong if name == "fa4" else real(name))
    shape = "--device cpu --dtype fp32 --seqlen 16 --head-dim 16 --tokens 16 --heads 1 --causal no --quick"
    with pytest.raises(SystemExit, match="1"):
        main(f"bench {shape} --backend fa4,native".split())
    assert "fa4: wrong: out is off" in capsys.readouterr().out


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert [c.name for c in command.available(["native", "flash-attn-4"])] == ["native"]
    assert "flash-attn-4 is left out" in capsys.readouterr().err
    with pytest.raises(ValueError):
        command.available(["flash-attn-4"])


def test_a_ratio_is_that_of_turns_side_by_side():
    """What slows a whole round down does not move it, however few rounds are slow."""
    slow = [1.0, 1.0, 3.0, 2.0, 1.0, 5.0, 1.0]
    found = timing.medians({"fa4": [0.8 * x for x in slow], "native": slow, "none": [None] * 7})
    assert found["fa4"] / found["native"] == pytest.approx(0.8) and found["native"] == pytest.approx(1.0)
    assert found["none"] is None
    alone = timing.medians({"fa4": [2.0, None, 4.0, 9.0]})
    assert alone == {"fa4": 4.0}
    apart = timing.medians({"fa4": [2.0, None], "native": [None, 3.0]})
    assert apart == {"fa4": 2.0, "native": 3.0}
