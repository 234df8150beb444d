"""Test the commands with the base requirements alone: a missing extra is named in one line, everything else works."""

import json
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT
from tests.packaging.environments import base_packages, without_extras

_USES_AN_EXTRA = """
import importlib, json, sys
from pathlib import Path
from opt_ds.errors import UserError
import opt_ds.ingest, opt_ds.serving.export, opt_ds.serving.session
from opt_ds.cli.serve import serve
messages = []
for use in (lambda: serve(checkpoint=None), lambda: importlib.import_module("opt_ds.evaluation.transcription"),
            lambda: importlib.import_module("opt_ds.evaluation.classification")):
    try:
        use()
    except UserError as error:
        messages.append(str(error))
from opt_ds.decoding.decoder import DecodingError, own_decoder
from opt_ds.decoding.file_kinds import why_not_decodable
messages.append(why_not_decodable("a.m4a"))
for content in (b"\\0\\0\\0\\x20ftypM4A ", b"\\0\\0\\0\\x20ftypisom"):
    Path(sys.argv[1]).write_bytes(content + bytes(90))
    try:
        own_decoder().audio(Path(sys.argv[1]))
    except DecodingError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_packages(tmp_path_factory.mktemp("environment") / "base")


def test_help_works_and_no_extra_is_there(packages: Path) -> None:
    done = without_extras(packages, "-m", "opt_ds", "--help", root=ROOT)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
    assert without_extras(packages, "-c", "import jiwer", root=ROOT).returncode == 1


def test_what_needs_an_extra_names_it_and_the_rest_can_be_imported(packages: Path, tmp_path: Path) -> None:
    """test_requirements.py checks every module's imports. This test runs some of them."""
    done = without_extras(packages, "-c", _USES_AN_EXTRA, tmp_path / "sound", root=ROOT)
    assert done.returncode == 0, done.stderr
    web, words, probe, *sounds = json.loads(done.stdout.splitlines()[-1])
    assert web.startswith("opt-ds serve needs ") and web.endswith(": pip install 'opt_ds[web]'")
    assert words == "the word error rate needs jiwer: pip install 'opt_ds[downstream]'"
    m4a = "M4A needs PyAV: pip install 'opt_ds[media]', or convert it to WAV or FLAC"
    assert sounds == [m4a, m4a, "MPEG-4 needs PyAV: pip install 'opt_ds[media]', or extract its sound as WAV or FLAC"]
    assert probe == "the classification probe needs sklearn: pip install 'opt_ds[downstream]'"
