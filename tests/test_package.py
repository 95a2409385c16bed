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
    monkeypatch.setattr(readme_numbers, "README", tmp_path / "README.md")
    return readme_numbers


def test_readme_numbers_come_from_the_result_file(readme_numbers, tmp_path, monkeypatch):
    about = {"device": "GPU", "torch": "2", "cudnn": "9", "date": "today", "commit": "abc"}
    rows = [{"mode": "eager", "tokens_per_second": 1000.0}, {"mode": "eager", "tokens_per_second": 1250.0}]
    (tmp_path / "llama_eval_h100.json").write_text(json.dumps({"provenance": about, "results": rows}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- llama_eval_h100.json -->\nstale\n<!-- end -->\nafter\n")

    monkeypatch.setattr(sys, "argv", ["readme_numbers.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        readme_numbers.main()
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py"])
    readme_numbers.main()
    text = readme.read_text()
    assert "| eager | 1,000 | 1,250 | 1.25× |" in text and "GPU" in text and "stale" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
