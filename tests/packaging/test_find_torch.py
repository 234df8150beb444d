"""Which torch the operators are compiled against, also from inside pip's isolation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import build_torch

_REPORT = """
import importlib.util, json
import build_torch
hidden = importlib.util.find_spec("torch") is None
try:
    torch = build_torch.find_torch()
except build_torch.BrokenTorchError as error:
    torch = str(error)
print(json.dumps([hidden, getattr(torch, "version", torch), getattr(torch, "folder", None)]))
"""
#: What pip's isolation does to an interpreter: the packages of its environment disappear from the path.
_ISOLATION = """
import site, sys
packages = set(site.getsitepackages() + [site.getusersitepackages()])
sys.path[:] = [path for path in sys.path if path not in packages]
"""


def _found(python: str | Path, **variables: str) -> tuple[bool, str | None, str | None]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables
    path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), str(ROOT / "csrc")]))
    done = subprocess.run(
        [python, "-c", _REPORT], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )  # fmt: skip
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _fake_torch(folder: Path, text: str) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(text)
    return folder


_SOUND = """
import types
__version__ = "{version}"
_C = types.SimpleNamespace(_GLIBCXX_USE_CXX11_ABI=False)
cuda = types.SimpleNamespace(is_available=lambda: False)
version = types.SimpleNamespace(cuda=None)
"""


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, Path]:
    """An environment's interpreter and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv" / "bin" / "python", next((tmp_path / "venv").glob("lib/python3*/site-packages"))


@pytest.fixture
def isolation(tmp_path: Path) -> str:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "sitecustomize.py").write_text(_ISOLATION)
    return str(tmp_path / "overlay")


def test_pips_isolation_does_not_hide_the_torch_of_the_environment(environment: tuple[Path, Path], isolation: str) -> None:
    python, packages = environment
    _fake_torch(packages, _SOUND.format(version="2.9.1"))
    assert _found(python) == (False, "2.9.1", str(packages / "torch"))
    assert _found(python, PYTHONPATH=isolation) == (True, "2.9.1", str(packages / "torch"))


def test_the_activated_environment_is_asked_too(environment: tuple[Path, Path], tmp_path: Path) -> None:
    """`python -m build` isolates by a separate environment."""
    python, packages = environment
    _fake_torch(packages, _SOUND.format(version="2.9.1"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "isolated"], check=True)
    isolated = tmp_path / "isolated" / "bin" / "python"
    assert _found(isolated) == (True, None, None)
    assert _found(isolated, VIRTUAL_ENV=str(python.parents[1])) == (True, "2.9.1", str(packages / "torch"))


def test_a_torch_that_is_too_old_will_be_replaced(environment: tuple[Path, Path]) -> None:
    _fake_torch(environment[1], _SOUND.format(version="2.5.1+cu121"))
    assert _found(environment[0]) == (False, None, None)


def test_a_broken_torch_is_one_line(environment: tuple[Path, Path]) -> None:
    _fake_torch(environment[1], 'raise OSError("libcudart.so.13: cannot open shared object file")')
    _, found, _ = _found(environment[0])
    assert found is not None and "\n" not in found
    assert found.endswith("(OSError: libcudart.so.13: cannot open shared object file): install it again")


def test_a_build_requires_torch_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import build_backend

    sound = build_torch.Torch(version="2.9.1", folder="/x", cuda=None, cxx11_abi=True, gpus=())
    for torch, kernels, expected in ((sound, "", []), (None, "", ["torch>=2.6"]), (None, "0", [])):
        monkeypatch.setenv("OPT_DS_BUILD_KERNELS", kernels)
        monkeypatch.setattr(build_backend, "find_torch", lambda torch=torch: torch)
        assert build_backend._torch_requirement() == expected


def test_a_setuptools_that_makes_no_wheels_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import build_backend

    absent = {"setuptools.command.bdist_wheel", "wheel"}
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(SystemExit, match=r"cannot make wheels: python -m pip install --upgrade setuptools"):
        build_backend.prepare_metadata_for_build_wheel(str(tmp_path))
