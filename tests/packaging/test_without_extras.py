"""The commands with the base requirements alone: what needs an extra says which in one line, and everything else works."""

import json
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT
from tests.packaging.environments import base_packages, without_extras

_IMPORT_EVERYTHING = """
import importlib, json, pkgutil
import opt_ds
from opt_ds.commands.serve import serve
from opt_ds.errors import UserError
failed = {}
names = [module.name for module in pkgutil.walk_packages(opt_ds.__path__, "opt_ds.") if not module.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except (ImportError, UserError) as error:
        failed[name] = f"{type(error).__name__}: {error}"
try:
    serve(None)
except UserError as error:
    failed["serve"] = str(error)
print(json.dumps(failed))
"""
#: The only modules that need an extra to be imported; the last two are reached behind a check of their own.
NEEDS_AN_EXTRA = {
    "opt_ds.evaluate.ablation", "opt_ds.evaluate.captioning", "opt_ds.evaluate.classification", "opt_ds.evaluate.summary",
    "opt_ds.evaluate.transcription", "opt_ds.prepare.importers.piper_worker", "opt_ds.serve.app",
}  # fmt: skip


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_packages(tmp_path_factory.mktemp("environment") / "base")


def test_help_works_and_no_extra_is_there(packages: Path) -> None:
    done = without_extras(packages, "-m", "opt_ds", "--help", root=ROOT)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
    assert without_extras(packages, "-c", "import jiwer", root=ROOT).returncode == 1


def test_every_other_module_works_and_these_name_the_extra(packages: Path) -> None:
    done = without_extras(packages, "-c", _IMPORT_EVERYTHING, root=ROOT)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert failed.pop("serve").endswith("pip install 'opt_ds[web]'")
    assert {name: text for name, text in failed.items() if name not in NEEDS_AN_EXTRA} == {}
    assert failed["opt_ds.evaluate.transcription"] == "UserError: the word error rate needs jiwer: pip install 'opt_ds[downstream]'"
    experiments = [text for name, text in failed.items() if name.startswith("opt_ds.evaluate.")]
    assert len(experiments) >= 5 and all(text.endswith("pip install 'opt_ds[downstream]'") for text in experiments)
