"""What setup.py declares, read by running it; and which packages of this environment that amounts to."""

import functools
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_QUESTION = """
import json, sys
from distutils.core import run_setup
from setuptools import Distribution
distribution = run_setup("setup.py", stop_after="init")
fields = ("packages", "package_data", "install_requires", "extras_require", "entry_points")
print(json.dumps({name: getattr(distribution, name) for name in fields}))
"""


@functools.cache
def setup_arguments() -> dict[str, Any]:
    """The arguments of setup()."""
    code = f"import setuptools\n{_QUESTION}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def base_requirements() -> list[Requirement]:
    return [Requirement(text) for text in setup_arguments()["install_requires"]]


def extra_requirements() -> dict[str, list[Requirement]]:
    return {extra: [Requirement(text) for text in texts] for extra, texts in setup_arguments()["extras_require"].items()}


def pins() -> dict[str, str]:
    """requirements.txt: canonical name -> version."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[Requirement]) -> set[str]:
    """Canonical names of the installed packages that these requirements bring, themselves included."""
    found: set[str] = set()
    waiting = [(requirement.name, frozenset(requirement.extras)) for requirement in requirements]
    seen = set()
    while waiting:
        entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        name, extras = entry
        found.add(canonical(name))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found
