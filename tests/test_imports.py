"""Imports point down, and importing the package costs little and pulls in no compiler."""

from __future__ import annotations

import ast
import compileall
import shutil
import subprocess
import sys
from pathlib import Path

import fa_sdpa

PACKAGE = Path(fa_sdpa.__file__).parent
# A part may import itself and what stands in a line above it.
LAYERS = (
    {"meta", "_torch_private"},
    {"alike"},
    {"kernels", "reference"},
    {"tables"},
    {"ops", "policy"},
    {"state", "counts", "record", "warm", "progress"},
    {"router"},
    {"switch"},
    {"run", "doctor"},
    {"bench"},
    {"qualify"},
    {"__main__"},
)
COMPILERS = {"cutlass", "quack", "triton", "tvm_ffi"}


def imported(path: Path) -> set[str]:
    """Dotted names, relative to fa_sdpa, of what a file of ours imports of ours, also inside functions."""
    package = ["fa_sdpa", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("fa_sdpa.") for name in names if name.startswith("fa_sdpa.")}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in MODULES:
        assert part(path) in level, f"{part(path)} has no place in LAYERS yet"
        for name in imported(path):
            other = name.split(".")[0]
            if other in level and other != part(path) and level[other] >= level[part(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_families_never_import_one_another():
    families = {path.parent.name for path in PACKAGE.glob("kernels/*/config.py")}
    assert {"cpu", "sm90"} <= families
    wrong = []
    for path in PACKAGE.glob("kernels/*/*.py"):
        others = families - {path.parent.name}
        wrong += [f"{path.relative_to(PACKAGE)} imports {n}" for n in imported(path) if others & set(n.split("."))]
    assert not wrong


def run(code: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_import_pulls_in_no_compiler():
    code = "import sys, torch; before = set(sys.modules); import fa_sdpa; print(*(set(sys.modules) - before))"
    modules = run(code).split()
    added = {name.split(".")[0] for name in modules}
    assert "fa_sdpa" in added
    assert not added & COMPILERS and "torch._dynamo" not in modules


def test_import_is_quick(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fa_sdpa")
    assert compileall.compile_dir(tmp_path, quiet=1)  # as an install does, and what `-c` finds first
    code = "import time, torch; start = time.process_time(); import fa_sdpa; print(time.process_time() - start)"
    # Processor time of the best of three: what else the machine does has little part in it.
    assert min(float(run(code, cwd=tmp_path)) for _ in range(3)) < 0.15
