"""The layers of pyproject.toml: every import of the package goes down, and one that goes up is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the import contracts on the package in `folder`."""
    # -c puts the working folder first on the search path: its package is the one that is read.
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    arguments = [sys.executable, "-c", program, "--no-logo", "--no-cache", *options]
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(arguments, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's source and its contracts."""
    shutil.copytree(ROOT / "opt_ds", tmp_path / "opt_ds", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_import_goes_down_and_none_is_excepted() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: 2 kept, 0 broken", done.stdout)
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "line", "contract", "found"),
    [
        ("training/trainer.py", "from opt_ds.evaluation import evaluator", "layers", "training.trainer -> opt_ds.evaluation"),
        ("data/loader.py", "def late():\n    from opt_ds.model import opt", "layers", "opt_ds.data.loader -> opt_ds.model.opt"),
        ("store/shards.py", "def late():\n    import opt_ds.store.split", "circles", "No cycles are allowed in opt_ds.store"),
    ],
)  # fmt: skip
def test_an_upward_import_and_a_hidden_circle_are_found(copy: Path, file: str, line: str, contract: str, found: str) -> None:
    assert lint(copy, "--contract", contract).returncode == 0
    path = copy / "opt_ds" / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    done = lint(copy, "--contract", contract)
    assert done.returncode == 1 and found in done.stdout


def test_a_module_without_a_layer_is_found(copy: Path) -> None:
    (copy / "opt_ds" / "nowhere.py").write_text('"""Of no layer."""\n')
    done = lint(copy, "--contract", "layers")
    assert done.returncode == 1 and "nowhere" in done.stdout
