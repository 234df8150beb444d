"""Environments to install into: with setup.py's base requirements and nothing else, made from the packages that are here."""

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.packaging.declared import base_requirements, closure

#: Variables of a test process that an installation must not see.
_NOT_INHERITED = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_NO_INDEX", "OPT_DS_", "CXX", "CUDACXX")


def base_packages(folder: Path) -> Path:
    """A folder of links to the base requirements and all that they require, without any extra; to be put on a path."""
    folder.mkdir(parents=True)
    for name in sorted(closure(base_requirements())):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    return folder


class Environment:
    """Make a virtual environment. `packages` is a folder that it sees in addition to its site-packages."""

    def __init__(self, folder: Path, packages: Path | None = None) -> None:
        self.folder = folder
        venv.create(folder, with_pip=True)
        if packages is not None:
            site = next(folder.glob("lib/python3*/site-packages"))
            (site / "base.pth").write_text(f"{packages}\n")
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}

    def run(self, program: str, *arguments: str | Path, cwd: Path | None = None, seconds: float = 600, **more: str):
        """Run one of the environment's programs, outside the checkout."""
        return subprocess.run(
            [self.folder / "bin" / program, *map(str, arguments)], cwd=cwd or self.folder, env=self.variables | more,
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip

    def pip_install(self, *arguments: str | Path, **more: str):
        return self.run("python", "-m", "pip", "install", "--disable-pip-version-check", *arguments, seconds=3000, **more)


def without_extras(packages: Path, *arguments: str | Path, root: Path) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` of the checkout with the base requirements alone."""
    variables = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{packages}"}
    return subprocess.run(
        [sys.executable, "-S", *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=300
    )  # fmt: skip
