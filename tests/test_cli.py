"""python -m fa_sdpa run | explain | doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa_sdpa import doctor
from fa_sdpa.__main__ import main
from fa_sdpa.meta.spec import Reason

ROOT = Path(__file__).resolve().parent.parent


def python(*args, cwd, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def both(*program, cwd):
    """The same program under plain Python and under ours; ours without its closing count."""
    plain, ours = python(*program, cwd=cwd), python("-m", "fa_sdpa", "run", *program, cwd=cwd)
    assert "fa_sdpa: " in ours.stderr
    ours.stderr = ours.stderr[: ours.stderr.rindex("fa_sdpa: ")]
    return plain, ours


SELF_PORTRAIT = """
import os, pickle, sys
class Thing: pass
print(sys.argv, __name__, __file__, __package__, __doc__, sys.path[0])
print(__spec__ and __spec__.name, sys.modules["__main__"].Thing is Thing, __builtins__)
print(type(pickle.loads(pickle.dumps(Thing()))).__module__, "annotations" in globals())
"""


def test_script_sees_what_it_sees_under_python(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "script.py").write_text(SELF_PORTRAIT)
    plain, ours = both("sub/script.py", "--policy", "x", "-m", cwd=tmp_path)
    assert ours.stdout == plain.stdout != ""
    assert ours.stderr == plain.stderr
    assert (ours.returncode, plain.returncode) == (0, 0)


@pytest.mark.parametrize("name", ["pkg", "pkg.mod"])
def test_module_sees_what_it_sees_under_python(tmp_path, name):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    for file in ("__main__.py", "mod.py"):
        (tmp_path / "pkg" / file).write_text(SELF_PORTRAIT)
    plain, ours = both("-m", name, "--json", "x", cwd=tmp_path)
    assert ours.stdout == plain.stdout != ""


ENDINGS = {
    "uncaught": "def f():\n    raise ValueError('bad')\nf()",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    "syntax": "x = = 1",
    "status": "import sys; sys.exit(3)",
    "message": "import sys; sys.exit('gone')",
    "hook": "import sys; sys.excepthook = lambda *a: print('mine', a[0])\nraise OSError",
    "atexit": "import atexit, sys; atexit.register(print, 'last', file=sys.stderr)",
    "thread": "import threading; threading.Thread(target=lambda: print(1 / 0)).start()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_program_ends_as_under_python(tmp_path, ending):
    (tmp_path / "script.py").write_text(ENDINGS[ending])
    if ending == "syntax":  # it never starts, so there is nothing to count
        plain = python("script.py", cwd=tmp_path)
        ours = python("-m", "fa_sdpa", "run", "script.py", cwd=tmp_path)
    else:
        plain, ours = both("script.py", cwd=tmp_path)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    strip = [line.split(" (Thread")[0] for line in plain.stderr.splitlines()]
    assert [line.split(" (Thread")[0] for line in ours.stderr.splitlines()] == strip


def test_program_that_is_not_there(tmp_path):
    assert python("-m", "fa_sdpa", "run", "absent.py", cwd=tmp_path).returncode == 2
    absent = python("-m", "fa_sdpa", "run", "-m", "absent.module", cwd=tmp_path)
    assert absent.returncode == 1
    assert absent.stderr == "fa_sdpa run: no module named absent.module, or none that can be run\n"


CALLS = """
import os, torch
os.chdir("/")
from torch.nn.functional import scaled_dot_product_attention as sdpa
x = torch.randn(1, 2, 8, 16)
for _ in range(3):
    sdpa(x, x, x, is_causal=True)
sdpa(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool))
sdpa(x, x, x, dropout_p=0.5)
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(4)", "raise ValueError"])
def test_counts_routed_calls_and_reasons(tmp_path, ending):
    (tmp_path / "script.py").write_text(CALLS + ending)
    options = ["--policy", "always", "--json", "counts.json"]
    done = python("-m", "fa_sdpa", "run", *options, "script.py", cwd=tmp_path)
    assert "fa_sdpa: 4 SDPA calls routed to fa4, 1 left to torch (policy always)" in done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["policy"], counts["routed"], counts["native"]) == ("always", 4, 1)
    assert counts["eager"]["reasons"] == {"policy_always": 4, "dropout": 1}
    assert counts["compiled"]["routed"] == 0
    assert "dropout 1" in done.stderr


def test_policy_that_is_none(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--policy", "sometimes", "script.py"])
    assert "sometimes" in capsys.readouterr().err


def explain(capsys, line):
    main(["explain", *line.split()])
    return capsys.readouterr().out


def test_explain(capsys):
    assert explain(capsys, "--shape 1,2,64,64 --policy always").startswith("native:" if on_cuda() else "fa4:")
    assert explain(capsys, "--shape 1,2,64,64 --policy never").startswith("native: the policy is 'never'")
    long = "--arch 90 --shape 1,16,16384,128 --kv-heads 4 --causal"
    assert explain(capsys, long).startswith("fa4:")
    refused = explain(capsys, f"{long} --dtype fp32 --grad")
    assert refused.startswith("native:") and "[dtype]" in refused
    assert explain(capsys, f"{long} --grad").startswith("fa4:")


def on_cuda():
    return torch.cuda.is_available()


def test_doctor_tells_what_runs_and_why_not(capsys, monkeypatch):
    monkeypatch.setenv("FA_SDPA", "never")
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["torch"] == torch.__version__
    assert report["variables"]["FA_SDPA"] == "never"
    cells = report["kernels"]["cpu"]
    assert {cell["direction"] for cell in cells} == {"forward", "training"}
    assert not any(cell["reasons"] for cell in cells)
    main(["doctor"])
    text = capsys.readouterr().out
    assert torch.__version__ in text and "kernels on cpu" in text and "FA_SDPA=never" in text


def test_doctor_keeps_every_reason_of_one_code(monkeypatch):
    reasons = (Reason("not_installed", "no compiler"), Reason("not_installed", "no runtime"))
    monkeypatch.setattr(doctor.kernels, "unsupported", lambda spec, target: reasons)
    text = doctor.render(doctor.diagnose())
    assert "1: for example, no compiler; no runtime [not_installed]" in text


def test_doctor_table_numbers_the_refusals():
    cells = [
        {"direction": "forward", "dtype": "fp32", "head_dim": 80, "reasons": {"dtype": "no fp32", "head_dim": "no 80"}},
        {"direction": "forward", "dtype": "bf16", "head_dim": 80, "reasons": {"head_dim": "no 80"}},
        {"direction": "forward", "dtype": "bf16", "head_dim": 64, "reasons": {}},
    ]
    table = doctor.render({**doctor.diagnose(), "kernels": {"cuda:0": cells}})
    assert "forward fp32          1,2\n" in table
    assert "forward bf16            2    yes\n" in table
    assert "1: for example, no fp32 [dtype]" in table and "2: for example, no 80 [head_dim]" in table


def test_doctor_reports_a_broken_driver_instead_of_failing(monkeypatch):
    def broken(*args):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_device_name", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, broken)
    text = doctor.render(doctor.diagnose())
    assert "kernels on cuda:0: unknown: RuntimeError: driver too old" in text
    assert "kernels on cpu" in text


def test_doctor_imports_no_compiler(tmp_path):
    code = (
        "import sys; from fa_sdpa.__main__ import main; main(['doctor']); print(*{'cutlass', 'quack'} & {*sys.modules})"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
