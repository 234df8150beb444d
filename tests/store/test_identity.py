"""A store that is not of the model's vocabulary or extractors is refused by identity; --force says what will be wrong."""

import json
import shutil
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.store.files import folder_sha256
from opt_ds.store.processor_files import PROCESSOR_FILE, check_identity, copy_processor_files
from opt_ds.store.schema import TOKENIZER_FOLDER
from opt_ds.store.seal import seal_folder


@pytest.fixture
def processor(complete: FeatureStore, tmp_path: Path) -> Path:
    copy_processor_files(complete, tmp_path / "processor")
    return tmp_path / "processor"


def other(processor: Path, part: str, **changes: str) -> Path:
    """A processor folder that differs in one part."""
    folder = Path(shutil.copytree(processor, processor.with_name(f"other-{part}")))
    description = json.loads((folder / PROCESSOR_FILE).read_text())
    if part == "tokenizer":
        (folder / TOKENIZER_FOLDER / "another.txt").write_text("another vocabulary")
        changes = {"sha256": folder_sha256(folder / TOKENIZER_FOLDER)}
    (description["tokenizer"] if part == "tokenizer" else description["extractors"][part]).update(changes)
    (folder / PROCESSOR_FILE).write_text(json.dumps(description))
    seal_folder(folder)  # as a model of such a store would have it
    return folder


def test_the_models_own_store_passes_in_silence(processor: Path, complete: FeatureStore) -> None:
    said: list[str] = []
    check_identity(processor, complete, False, said.append)
    assert not said


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("tokenizer", {}, "its vocabulary is not the model's, so words become other words"),
        ("image", {"version": "9"}, "its image features come from another extractor than the model's (random, not random 9)"),
        ("audio", {"weights_sha256": "abcdef0123"}, "its audio features come from another extractor than the model's"),
    ],
)
def test_another_identity_is_refused_and_force_says_what_is_wrong(
    part: str, changes: dict[str, str], expected: str, processor: Path, complete: FeatureStore
) -> None:
    folder, said = other(processor, part, **changes), list[str]()
    with pytest.raises(UserError) as error:
        check_identity(folder, complete, False, said.append)
    assert expected in str(error.value) and str(complete.path) in str(error.value) and "--force" in str(error.value)
    assert not said
    check_identity(folder, complete, True, said.append)
    assert len(said) == 1 and expected in said[0]


def test_a_run_without_its_processor_files_is_said(tmp_path: Path, complete: FeatureStore) -> None:
    said: list[str] = []
    check_identity(tmp_path / "nowhere", complete, False, said.append)
    assert len(said) == 1 and "not checked" in said[0]
