"""Test stores of another vocabulary or extractor: refused by fingerprint; --force logs a warning."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.store.files import folder_sha256
from opt_ds.store.processor_files import (
    PROCESSOR_FILE,
    check_fingerprints,
    copy_processor_files,
    load_processor_description,
)
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


def test_the_models_own_store_passes_in_silence(processor: Path, complete: FeatureStore, logged: list[str]) -> None:
    check_fingerprints(processor, complete, False)
    assert not logged


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("tokenizer", {}, "its vocabulary is not the model's, so words become other words"),
        (
            "image",
            {"version": "9"},
            "its image features come from another extractor than the model's (random, not random 9)",
        ),
        ("audio", {"weights_sha256": "abcdef0123"}, "its audio features come from another extractor than the model's"),
    ],
)
def test_another_fingerprint_is_refused_and_force_says_what_is_wrong(
    part: str, changes: dict[str, str], expected: str, processor: Path, complete: FeatureStore, logged: list[str]
) -> None:
    folder = other(processor, part, **changes)
    with pytest.raises(UserError) as error:
        check_fingerprints(folder, complete, False)
    assert expected in str(error.value) and str(complete.path) in str(error.value) and "--force" in str(error.value)
    assert not logged
    check_fingerprints(folder, complete, True)
    assert len(logged) == 1 and expected in logged[0]


def test_a_run_without_its_processor_files_is_said(tmp_path: Path, complete: FeatureStore, logged: list[str]) -> None:
    check_fingerprints(tmp_path / "nowhere", complete, False)
    assert len(logged) == 1 and "not checked" in logged[0]


def test_what_file_managers_leave_in_a_tokenizer_folder_changes_nothing(processor: Path) -> None:
    for name in (".DS_Store", "._vocab.txt", "Thumbs.db", ".nfs0001"):
        (processor / TOKENIZER_FOLDER / name).write_bytes(b"x")
    load_processor_description(processor)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fields: fields["model"].update(max_input_chars_per_word=10**9), "max_input_chars_per_word is 1000000000"),
        (lambda fields: fields["added_tokens"].append({**fields["added_tokens"][0], "id": 10**6, "content": "zz"}),
         "tokens, which are not those of processor.json"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_would_hang_or_overrun_the_model_is_refused(
    processor: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    file = processor / TOKENIZER_FOLDER / "tokenizer.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    description = json.loads((processor / PROCESSOR_FILE).read_text())
    description["tokenizer"]["sha256"] = folder_sha256(processor / TOKENIZER_FOLDER)
    (processor / PROCESSOR_FILE).write_text(json.dumps(description))
    seal_folder(processor)
    with pytest.raises(UserError, match=reason):
        load_processor_description(processor)
