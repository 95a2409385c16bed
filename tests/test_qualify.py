"""python -m fa_sdpa qualify: what hangs, dies or is wrong costs a cell and not the run, and is never routed. No GPU."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
import torch

import fa_sdpa
from fa_sdpa import tables, warm
from fa_sdpa.__main__ import main
from fa_sdpa.bench import measure
from fa_sdpa.bench.cells import Cell
from fa_sdpa.kernels import compile as compiling
from fa_sdpa.kernels import launch, quarantine, resources
from fa_sdpa.meta.crossover import Crossover
from fa_sdpa.meta.target import Target
from fa_sdpa.policy import Policy, decide
from fa_sdpa.qualify import grid, report, run, session
from fa_sdpa.qualify.run import Findings, Journal, Run, Settings
from fa_sdpa.qualify.session import Answer, Session

H100 = Target("cuda", 90, "A made-up H100", 132, 232448)
ABOUT = {
    "device": H100.name, "arch": "sm_90", "driver": "1", "torch": "2", "cuda": "13", "cudnn": "9", "date": "today",
    "commit": "abc", "device_type": "cuda", "arch_number": 90, "name": H100.name, "num_sms": 132, "missing": [],
    "kernels": "digest",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_SDPA_CONFIG_DIR", str(tmp_path / "settings"))
    for forget in (tables.forget, quarantine.known.cache_clear):
        forget()
    yield
    for forget in (tables.forget, quarantine.known.cache_clear):
        forget()


# ---- a worker that hangs or dies -------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
print("noise", file=sys.stderr)
for line in sys.stdin:
    task = json.loads(line)
    say = lambda **what: print(json.dumps(what), flush=True)
    if task["kind"] == "hang":
        say(stage="fa4")
        if task.get("deaf"):
            import signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if task["kind"] == "die":
        say(stage="timing")
        print("illegal memory access", file=sys.stderr, flush=True)
        os._exit(7)
    if task["kind"] == "babble":
        print("no json", flush=True)
        continue
    if task["kind"] == "lost":
        say(error="the device is gone", lost=True)
        os._exit(1)
    say(stage="almost")
    say(result=[os.getpid(), task.get("what"), os.environ["FA_SDPA"], os.environ[sys.argv[1]]])
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "START_LIMIT", 0.0)
    (tmp_path / "worker.py").write_text(WORKER)
    with Session([sys.executable, str(tmp_path / "worker.py"), quarantine.OFF]) as opened:
        yield opened


def test_one_process_answers_task_after_task(worker):
    first, second = (worker.ask({"kind": "echo", "what": n}, 30.0) for n in (1, 2))
    assert first.result[1:] == [1, "0", "1"] and second.result[1] == 2 and first.result[0] == second.result[0]
    assert first.error == first.stage == "" and first.seconds > 0


def test_what_hangs_is_ended_in_time_and_the_next_task_gets_a_new_process(worker):
    pid = worker.ask({"kind": "echo"}, 30.0).result[0]
    began = time.monotonic()
    lost = worker.ask({"kind": "hang", "deaf": True}, 1.0)
    assert time.monotonic() - began < 20
    assert lost.result is None and lost.stage == "fa4" and "no answer within 1 s" in lost.error
    assert worker.ask({"kind": "echo"}, 30.0).result[0] != pid


def test_what_dies_says_its_last_words(worker):
    lost = worker.ask({"kind": "die"}, 30.0)
    assert lost.stage == "timing" and lost.error == "its process ended with status 7: illegal memory access"
    assert worker.ask({"kind": "babble"}, 30.0).error.startswith("its process ended")
    gone = worker.ask({"kind": "lost"}, 30.0)
    assert gone.error == "the device is gone"
    assert worker.ask({"kind": "echo"}, 30.0).result


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_and_forgets_what_was_of_others(tmp_path):
    path = tmp_path / "new" / "qualify.jsonl"
    journal = Journal(path, {"torch": "1"}, fresh=False)
    journal.note("a", {"x": 1})
    journal.note("b", [2])
    with path.open("a") as file:
        file.write('{"id": "c", "val')  # cut off
    assert Journal(path, {"torch": "1"}, fresh=False).done == {"a": {"x": 1}, "b": [2]}
    assert Journal(path, {"torch": "2"}, fresh=False).done == {}
    assert Journal(path, {"torch": "1"}, fresh=False).done == {}  # it is of torch 2 now
    journal = Journal(path, {"torch": "2"}, fresh=False)
    journal.note("a", 1)
    assert Journal(path, {"torch": "2"}, fresh=True).done == {}


# ---- a run with scripted answers -------------------------------------------------------------------------------------


class Scripted:
    """Answers as a worker on a good device would, but for what ``trouble`` says: (kind, direction, cell, backends)."""

    def __init__(self, trouble=lambda *what: None):
        self.trouble, self.asked = trouble, []

    def ask(self, task, limit):
        if task["kind"] == "ceilings":
            return Answer({"matmul_tflops": 700.0, "copy_gbs": 3000.0})
        cell, direction = Cell(*task["cell"]), task["direction"]
        self.asked.append((task["kind"], direction, cell))
        answer = self.trouble(task["kind"], direction, cell, task.get("backends"))
        if answer is not None:
            return answer
        return Answer("") if task["kind"] == "check" else Answer(rows_of(cell, direction, task["backends"]))


def rows_of(cell, direction, backends=("fa4", "native"), fa4_reason=""):
    """fa4 at 600 TFLOP/s and 3 µs, torch at 400 and 5."""
    rows = []
    for name in backends:
        rate, launch = (600, 3) if name == "fa4" else (400, 5)
        ms = cell.flops_of(direction) / rate / 1e9 + launch / 1e3
        row = measure._blank(cell, direction, name)
        if name == "fa4" and fa4_reason:
            row["reason"] = fa4_reason
        else:
            row |= {"gpu_ms": ms, "graph_ms": ms, "host_us": 20.0, "eager_ms": max(ms, 0.02), "chosen": "cudnn"}
        rows.append(row)
    measure.add_ratios(rows)
    return rows


@pytest.fixture
def qualify(tmp_path, monkeypatch):
    """Runs --quick with these answers; kernels are said to compile, except those in ``broken``."""
    said = []

    def qualified(scripted, broken=(), fresh=False, minutes=math.inf):
        def build(keys, jobs):
            return [warm.Outcome(key, 1.0, "it does not fit" if key.name in broken else None) for key in keys]

        monkeypatch.setattr(run, "build", build)
        said.clear()
        settings = Settings("cuda", True, tmp_path / "out", fresh, minutes=minutes)
        runner = Run(settings, scripted, ABOUT, lambda *what: said.append(what))
        findings = runner.all()
        assert len(said) == run.count(settings, runner.steps)
        return findings

    qualified.said = said
    return qualified


def names(cell, direction="forward"):
    return {key.name for key in launch.keys(cell.spec(direction), H100)}


def test_all_goes_well(qualify):
    findings = qualify(Scripted())
    assert findings.passed and not findings.failed and not findings.notes
    assert set(findings.checks) == set(grid.CHECKS) and not any(findings.checks.values())
    assert len(findings.rows) == 4 * len(grid.cells(True))
    kinds = {(rule.direction, rule.head_dim[0], rule.is_causal) for rule in findings.rules}
    assert kinds == {(way, d, c) for way in ("forward", "training") for d in (64, 128) for c in (False, True)}


def test_what_was_done_is_not_done_again(qualify):
    last = grid.mixed(grid.cells(True))[-1]
    first = Scripted(lambda kind, way, cell, _: pytest.fail("no more") if way == "both" and cell == last else None)
    with pytest.raises(pytest.fail.Exception):
        qualify(first)
    second = Scripted()
    findings = qualify(second)
    assert {(kind, way) for kind, way, _ in second.asked} == {("time", "both")} and len(second.asked) == 1
    assert len(findings.rows) == 4 * len(grid.cells(True))
    third = Scripted()
    qualify(third, fresh=True)
    assert {kind for kind, _, _ in third.asked} == {"check", "time"}


def test_time_that_is_up_leaves_cells_to_the_next_run(qualify, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

    def takes_a_second(kind, way, cell, backends):
        now[0] += kind == "time"

    first = qualify(scripted := Scripted(takes_a_second), minutes=1.0)
    done = {(way, cell) for kind, way, cell in scripted.asked if kind == "time"}
    total = 2 * len(grid.cells(True))
    assert 61 == len(done) < total and len(first.rows) == 2 * 61
    assert first.notes == [f"time was up: {total - 61} of {total} cells were not timed; run again to go on"]
    assert {(rule.direction, rule.head_dim[0], rule.is_causal) for rule in first.rules} == {
        (way, d, c) for way in ("forward", "training") for d in (64, 128) for c in (False, True)
    }
    findings = qualify(again := Scripted())
    assert not findings.notes and len(findings.rows) == 2 * total
    assert {(way, cell) for _, way, cell in again.asked}.isdisjoint(done)


def test_a_wrong_result_puts_its_kernels_into_quarantine_and_they_are_tried_no_more(qualify):
    cell, way = grid.CHECKS["causal"]

    def trouble(kind, direction, asked, _):
        return Answer("wrong: dk is off by 1") if kind == "check" and asked == cell else None

    scripted = Scripted(trouble)
    findings = qualify(scripted)
    backward = names(cell, "both") - names(cell)
    assert findings.passed and set(findings.failed) == backward and len(backward) == 1
    assert "check 'causal': wrong: dk is off by 1" in findings.failed[backward.pop()]
    causal = [(way, c) for kind, way, c in scripted.asked if kind == "time" and c.is_causal and c.head_dim == 128]
    assert {way for way, _ in causal} == {"forward"}
    assert not any(r.direction == "training" and r.is_causal and r.head_dim[0] == 128 for r in findings.rules)


@pytest.mark.parametrize("error", ["no answer within 60 s", "its process ended with status 1: illegal memory access"])
def test_a_hang_or_a_fault_costs_one_kernel_and_not_the_run(qualify, error):
    cell = next(c for c in grid.cells(True) if c.head_dim == 64 and c.is_causal and c.seqlen_q == 8192)

    def trouble(kind, direction, asked, _):
        return Answer(None, error, "fa4") if (kind, direction, asked) == ("time", "forward", cell) else None

    findings = qualify(Scripted(trouble))
    assert set(findings.failed) == names(cell) and error in next(iter(findings.failed.values()))
    assert findings.passed and len(findings.rows) > 2 * len(grid.cells(True))


@pytest.mark.parametrize("alone", ["works", "hangs too"])
def test_who_hangs_beside_torch_is_asked_alone(qualify, alone):
    cell = grid.SHOWN

    def trouble(kind, direction, asked, backends):
        if (kind, direction, asked) != ("time", "forward", cell):
            return None
        if backends == ["fa4"] and alone == "works":
            return None
        return Answer(None, "no answer within 60 s", "timing")

    findings = qualify(Scripted(trouble))
    if alone == "works":
        assert not findings.failed and "forward d128 full 2048 b2 h16 was not timed: beside torch" in findings.notes[0]
    else:
        assert set(findings.failed) == names(cell)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(None, "no answer within 60 s", "native"),
        Answer(rows_of(grid.SHOWN, "forward", fa4_reason="OutOfMemoryError: CUDA out of memory")),
        Answer(rows_of(grid.SHOWN, "forward", fa4_reason="no inputs: RuntimeError: …")),
    ],
    ids=["torch hangs", "no memory", "no inputs"],
)
def test_what_is_nobodys_fault_is_a_note(qualify, answer):
    def trouble(kind, direction, asked, backends):
        if (kind, direction, asked) == ("time", "forward", grid.SHOWN) and "native" in backends:
            return answer
        return None

    findings = qualify(Scripted(trouble))
    assert not findings.failed and findings.passed and len(findings.notes) == 1


def test_a_kernel_that_does_not_compile_is_tried_no_further(qualify):
    broken = names(grid.SHOWN)
    scripted = Scripted()
    findings = qualify(scripted, broken)
    assert set(findings.failed) == broken and "does not compile: it does not fit" in next(
        iter(findings.failed.values())
    )
    assert not any(names(cell, way) & broken for _, way, cell in scripted.asked)
    assert not findings.passed or all(not names(*grid.CHECKS[n]) & broken for n in grid.CHECKS if n.startswith("basic"))


# ---- what the policy makes of it -------------------------------------------------------------------------------------


def test_what_passed_is_routed_and_what_failed_never_is(qualify, monkeypatch):
    full = Cell(4, 16, 16, 4096, 4096, 128, 128)
    causal = full._replace(is_causal=True)
    wrong = rows_of(causal, "forward", fa4_reason="wrong: out is off by 1")

    def trouble(kind, direction, asked, _):
        return Answer(wrong) if (kind, direction, asked) == ("time", "forward", causal) else None

    monkeypatch.setitem(ABOUT, "kernels", compiling.source_hash(90))
    findings = qualify(Scripted(trouble))
    written = run.keep(findings, H100)
    assert [path.name for path in written] == ["quarantine.json", "crossover.json"]
    table = Crossover.load(written[1])
    assert table.device == H100.name and table.kernels == compiling.source_hash(90)
    decision = decide(full.spec("forward"), H100)
    assert decision.routed and "predicted" in decision.reasons[0].text
    for policy in (Policy("auto"), Policy("always")):
        held = decide(causal.spec("forward"), H100, policy)
        assert held.reasons[0].code == "quarantined" and "4096 b4 h16: wrong: out" in held.reasons[0].text
        assert decide(full.spec("forward"), H100, policy).routed
    elsewhere = H100._replace(name="another")
    assert decide(causal.spec("forward"), elsewhere, Policy("always")).routed
    monkeypatch.setenv(quarantine.OFF, "1")
    quarantine.known.cache_clear()
    assert decide(causal.spec("forward"), H100, Policy("always")).routed


def test_other_sources_get_another_chance_and_what_works_again_is_let_out(qualify, monkeypatch):
    forward = next(iter(names(grid.SHOWN)))
    entry = {"reason": "r", "date": "d", "source": "other sources"}
    quarantine.write(H100.name, {forward: entry})
    assert decide(grid.SHOWN.spec("forward"), H100, Policy("always")).routed
    quarantine.write(H100.name, {forward: entry | {"source": compiling.source_hash(90)}})
    assert not decide(grid.SHOWN.spec("forward"), H100, Policy("always")).routed
    untried = next(iter(names(Cell(1, 1, 1, 64, 64, 24, 24))))
    quarantine.write(H100.name, {n: entry for n in (forward, untried)})
    run.keep(qualify(Scripted()), H100)
    assert set(quarantine.read(quarantine.path_of(H100.name))) == {untried}


@pytest.mark.parametrize("text", ["{", '{"schema": 9, "kernels": {}}', '{"schema": 1, "kernels": {"no kernel": {}}}'])
def test_a_quarantine_that_cannot_be_read_holds_nothing_back(text, caplog):
    path = quarantine.path_of(H100.name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert quarantine.read(path) == {}
    assert decide(grid.SHOWN.spec("forward"), H100, Policy("always")).routed


def test_nothing_is_routed_by_a_run_that_did_not_pass(qualify):
    cell = grid.CHECKS["basic"][0]
    findings = qualify(Scripted(lambda kind, way, c, _: Answer("wrong: out is off") if c == cell else None))
    assert not findings.passed
    assert [path.name for path in run.keep(findings, H100)] == ["quarantine.json"]


def test_worker_ignores_the_quarantine(monkeypatch):
    forward = next(iter(names(grid.SHOWN)))
    quarantine.write(H100.name, {forward: {"reason": "r", "date": "d", "source": compiling.source_hash(90)}})
    assert quarantine.known(H100.name)
    quarantine.known.cache_clear()
    monkeypatch.setenv(quarantine.OFF, "1")
    assert not quarantine.known(H100.name)


# ---- grid, report, resources -----------------------------------------------------------------------------------------


def test_grids():
    quick, full = grid.cells(True), grid.cells(False)
    assert len(set(quick)) == len(quick) > 40 and len(set(full)) == len(full) > 4 * len(quick)
    assert full == grid.cells(False) and set(grid.regular(False)) < set(full)  # drawn, but always the same
    assert sum(c.seqlen_q % 16 != 0 for c in full) > 100
    assert quick[0] == full[0] == grid.SHOWN
    assert {c.head_dim for c in full} == {64, 80, 96, 128, 192, 256}
    assert {c.heads // c.heads_kv for c in full} == {1, 4, 7, 8}
    for chosen in (quick, full):
        kinds = {(c.head_dim, c.head_dim_v, c.is_causal) for c in chosen}
        for kind in kinds:
            assert sum((c.head_dim, c.head_dim_v, c.is_causal) == kind for c in chosen) >= 8
        assert max(c.bytes_of("both") for c in chosen) < 4 << 30


def test_report(qualify, tmp_path):
    cell = grid.CHECKS["ragged"][0]

    def trouble(kind, direction, asked, _):
        return Answer(None, "no answer within 60 s", "fa4") if kind == "check" and asked == cell else None

    findings = qualify(Scripted(trouble))
    build = {name: value | {"registers": 168, "frame_bytes": 16} for name, value in findings.build.items()}
    findings = findings._replace(build=build)
    written = report.write(findings, tmp_path / "report", [tmp_path / "crossover.json"])
    text = written[0].read_text()
    for part in ("**GPU**: A made-up H100", "**Driver**: 1", "**fa_sdpa**: 0.", "168 registers, 16 bytes spilled"):
        assert part in text
    assert "- [x] GQA\n" in text and "- [ ] ragged: no answer within 60 s, in fa4" in text
    assert "## Performance at d128 full 2048 b2 h16" in text and "700 TFLOP/s in a matmul" in text
    assert "in quarantine, never routed here: " in text and "the policy uses " in text
    content = json.loads(written[1].read_text())
    assert grid.timed(content["results"]) == grid.timed(findings.rows) != []
    assert (
        content["passed"]
        and len(content["results"]) == len(findings.rows)
        and content["provenance"]["name"] == H100.name
    )
    if len(written) > 2:
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])
        assert "![crossover_forward](plots/crossover_forward.png)" in text


def test_report_of_a_run_in_which_nothing_worked():
    nothing = Findings(ABOUT, False, {}, {"basic": "wrong"}, {}, [], {"k": "why"}, [], [])
    text = report.markdown(nothing, [], [])
    assert "not passed: calls stay with torch" in text and "Nothing was timed." in text and "- [ ] basic: wrong" in text


def test_resources_of_what_is_no_library():
    assert resources.usage(b"") is None
    assert resources.usage(b"\x7fELF" * 40) is None
    assert resources.usage(b"..\x7fELF" + bytes(14) + b"\xbe\x00" + bytes(100)) is None


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "CPU_CELLS", grid.CPU_CELLS[:2])
    out = tmp_path / "out"
    main(["qualify", "--device", "cpu", "--quick", "--out", str(out)])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "passed" and "check ragged, causal: right" in said.err
    content = json.loads((out / "report.json").read_text())
    assert content["provenance"]["torch"] == torch.__version__ and len(content["results"]) == 8
    assert all(row["eager_ms"] > 0 for row in content["results"])
    assert not (tmp_path / "settings").exists()  # nothing is kept for the policy
    assert not fa_sdpa.is_enabled()


def test_command_without_kernels(monkeypatch, capsys):
    v100 = ABOUT | {"arch_number": 70, "name": "V100"}
    monkeypatch.setattr(Session, "ask", lambda self, task, limit: Answer(v100))
    with pytest.raises(SystemExit, match=r"no fa4 kernels for V100 \(sm_70\)"):
        main(["qualify", "--device", "cuda"])
    monkeypatch.setattr(Session, "ask", lambda self, task, limit: Answer(None, "no device"))
    with pytest.raises(SystemExit, match="cannot be asked: no device"):
        main(["qualify", "--device", "cuda"])
