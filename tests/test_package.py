"""What is shipped: the wheel's content and needs, and a README in step with the result files."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from fa_sdpa.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(*folder.glob("*.whl")) as archive:
        yield archive


def test_wheel_holds_every_file_of_the_package(wheel):
    shipped = {name for name in wheel.namelist() if name.startswith("fa_sdpa/")}
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fa_sdpa/**/*") if path.is_file()}
    assert shipped == {name for name in files if "__pycache__" not in name}
    assert {"fa_sdpa/py.typed", "fa_sdpa/meta/tables/sm90.json"} <= shipped


def test_wheel_needs_torch_alone(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert needs == ["torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.10"


def numbers(*args):
    command = [sys.executable, ROOT / "benchmarks" / "readme_numbers.py", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_readme_is_in_step_with_the_results():
    done = numbers("--check")
    assert done.returncode == 0, done.stderr


def test_crossover_table_is_in_step_with_the_results():
    subprocess.run([sys.executable, ROOT / "benchmarks" / "crossover_table.py", "--check"], check=True)


def test_readme_tells_what_explain_says(capsys):
    console = (ROOT / "README.md").read_text().split("```console\n")[1].split("```")[0]
    samples = [sample.split("\n", 1) for sample in console.split("$ python -m fa_sdpa ")[1:]]
    assert samples
    for command, output in samples:
        main(shlex.split(command))
        assert capsys.readouterr().out == output


@pytest.fixture
def readme_numbers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme_numbers

    monkeypatch.setattr(readme_numbers, "ROOT", tmp_path)
    monkeypatch.setattr(readme_numbers, "RESULTS", tmp_path)
    return readme_numbers


def test_readme_numbers_come_from_the_result_file(readme_numbers, tmp_path, monkeypatch):
    about = {"device": "GPU", "torch": "2", "cudnn": "9", "date": "today", "commit": "abc"}
    rows = [{"mode": "eager", "tokens_per_second": 1000.0}, {"mode": "eager", "tokens_per_second": 1250.0}]
    (tmp_path / "llama_eval_h100.json").write_text(json.dumps({"provenance": about, "results": rows}))
    monkeypatch.setitem(readme_numbers.PAGES, "docs/page.md", readme_numbers.PAGES["README.md"])
    monkeypatch.delitem(readme_numbers.PAGES, "docs/kernels/masks.md")
    (tmp_path / "docs").mkdir()
    readme, other = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    for page in (readme, other):
        page.write_text("before\n<!-- llama_eval_h100.json -->\nstale\n<!-- end -->\nafter\n")

    monkeypatch.setattr(sys, "argv", ["readme_numbers.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        readme_numbers.main()
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py"])
    readme_numbers.main()
    text = readme.read_text()
    assert "| eager | 1,000 | 1,250 | 1.25× |" in text and "GPU" in text and "stale" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "](llama_eval_h100.json)" in text and "](../llama_eval_h100.json)" in other.read_text()
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py", "--check"])
    readme_numbers.main()
    other.write_text(text)
    with pytest.raises(SystemExit, match=r"page\.md is out of date"):
        readme_numbers.main()


def test_masks_and_their_models_become_tables(readme_numbers):
    cell = {
        "ours": 500.4,
        "ours, fresh": 450.0,
        "ours, no mask": 490.0,
        "torch": 240.0,
        "cudnn": 250.2,
        "efficient": None,
    }
    rows = [{"mask": "padding", "seqlen": s, "head_dim": d, "ratio": 2.0, **cell} for d, s in ((128, 1024), (64, 4096))]
    rows.append({**rows[0], "mask": "bias", "torch": None, "cudnn": None, "ratio": None})
    compact = readme_numbers.masks({"unit": "TFLOP/s", "results": rows})
    assert (
        "| d64 4096 | d128 1024 |" in compact and "| padding | 500/250 | 500/250 |" in compact and "bias" not in compact
    )
    full = readme_numbers.masks_in_full({"results": rows})
    assert "| padding, 4096, 64 | 500 | 450 | 490 | 240 | 250 | – | 2.00 |" in full
    assert "| bias, 1024, 128 | 500 | 450 | 490 | – | – | – |  |" in full
    model = {"model": "bert", "mode": "eager", "routed": 12, "left to torch": 1, "error": 0.1, "error_torch": 0.2}
    table = readme_numbers.masked_models({"results": [{**model, "torch_ms": 15.0, "fa_sdpa_ms": 10.0}]})
    assert "| bert, eager | 15.0 | 10.0 | 1.50× | 12 of 13 | 0.200, 0.100 |" in table


RESULT = "llama_train_h100.json"


def training_run(attention, losses, **others):
    row = {"mode": "eager", "attention": attention, "tokens_per_second": 1000.0, "peak_bytes": 25e9, "wrong": []}
    return {**row, "losses": losses, **others}


FALLING = [5.0 - 3.0 * step / 120 for step in range(120)]
RUNS = [
    training_run("torch", FALLING),
    training_run("fa_sdpa", [x + 0.001 for x in FALLING], tokens_per_second=1100.0),
    training_run("torch, Flash-2", [x + 0.002 * (-1) ** i for i, x in enumerate(FALLING)]),
    training_run("torch, seed 1", [x - 0.03 for x in FALLING]),
]


@pytest.fixture
def llama_train(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import llama_train

    return llama_train


def test_training_runs_become_a_table(readme_numbers, llama_train):
    text = readme_numbers.llama_train({"results": RUNS, "verdict": llama_train.judge(RUNS)})
    assert "| eager, fa_sdpa | 1,100 | 1.100× | 25.0 | 2.1635 | 0.0010 (+0.0010 ± 0.0000) |" in text
    assert "| eager, torch | 1,000 | 1.000× | 25.0 | 2.1625 |  |" in text and "llama_train_h100.png" in text


def test_training_is_judged_by_how_far_torchs_own_runs_are_apart(llama_train):
    assert llama_train.judge(RUNS)["eager"]["wrong"] == []
    for losses, complaint in (
        ([x + 0.05 * (-1) ** i for i, x in enumerate(FALLING)], "fa_sdpa is 0.05 from torch"),
        ([x + 0.04 for x in FALLING], "+0.04 on average"),
        ([x + 0.031 + 0.002 * (-1) ** i for i, x in enumerate(FALLING)], "+0.031 on average"),
        ([*FALLING[:-1], float("nan")], "fa_sdpa is nan"),
        ([5.0 - 0.001 * step for step in range(120)], "fa_sdpa: the loss did not fall"),
    ):
        wrong = llama_train.judge([RUNS[0], training_run("fa_sdpa", losses), *RUNS[2:]])["eager"]["wrong"]
        assert any(complaint in text for text in wrong), wrong
    drifting = [x + 0.05 * (-1) ** (i // 15) for i, x in enumerate(FALLING)]  # neighbours alike, 0.01 on average
    distance = llama_train.apart([x + 0.01 for x in drifting], FALLING)
    assert distance.error > 0.01 and abs(distance.mean) < 2 * distance.error
    stray = training_run("fa_sdpa", FALLING, wrong=["a call went elsewhere"])
    assert "fa_sdpa: a call went elsewhere" in llama_train.judge([RUNS[0], stray, *RUNS[2:]])["eager"]["wrong"]


def test_training_run_must_go_the_way_it_is_named_by(llama_train):
    counts, none = llama_train.fa_sdpa.counts.Counts, llama_train.fa_sdpa.counts.Counts(0, 0, {})
    stats = llama_train.fa_sdpa.Stats
    ours, torchs = llama_train.Run("fa_sdpa", False, routed=True), llama_train.Run("torch", True)
    kernels = {"kernel_cutlass_kernel_fa_sdpakernelssm90forwardForward_object": 2}
    kernels |= {"kernel_cutlass_kernel_fa_sdpakernelssm90backwardBackward_object": 2}
    cudnn = {"cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": 2}
    cudnn |= {"cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": 2}
    right = stats(counts(20, 0, {}), none)
    assert llama_train.wrong_way(ours, right, kernels, 10, 2) == []
    assert llama_train.wrong_way(torchs, stats(none, none), cudnn, 10, 2) == []
    assert llama_train.wrong_way(ours, stats(counts(19, 1, {}), none), kernels, 10, 2)
    assert len(llama_train.wrong_way(ours, right, cudnn, 10, 2)) == 2
    assert llama_train.wrong_way(ours, right, {**kernels, **cudnn}, 10, 2)
    assert llama_train.wrong_way(torchs, stats(none, none), {}, 10, 2)
    compiled = ours._replace(compiled=True)
    assert llama_train.wrong_way(compiled, stats(none, counts(1, 0, {})), kernels, 10, 2) == []
    assert llama_train.wrong_way(compiled, stats(none, none), kernels, 10, 2)


def test_plot_belongs_to_the_result_file(llama_train):
    """A PNG keeps text as it is, in a chunk of its own."""
    result = ROOT / "benchmarks" / "results" / RESULT
    if result.exists():
        assert llama_train.digest(result).encode() in result.with_suffix(".png").read_bytes()


def test_training_script_runs_and_writes_what_it_has(tmp_path):
    pytest.importorskip("transformers")
    small = (
        "--device cpu --policy always --layers 1 --heads 2 --kv-heads 1 --head-dim 64 --seqlen 32 --steps 3 --runs 2"
    )
    command = [sys.executable, ROOT / "benchmarks" / "llama_train.py", *small.split(), "--out", tmp_path / RESULT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / RESULT).read_text())["results"]
    assert [(row["attention"], row["calls"]["eager"]["routed"]) for row in rows] == [("torch", 0), ("fa_sdpa", 6)]
    assert rows[0]["losses"][0] == pytest.approx(rows[1]["losses"][0], abs=1e-2)
