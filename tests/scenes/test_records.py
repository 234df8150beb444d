"""Test the truth file: it survives writing and reading, and a broken one is a user error."""

from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.scenes.records import SceneRecord, Speech, read_truth, truth_lines


def test_records_survive_the_file(described: list[Any], tmp_path: Path) -> None:
    records = [
        SceneRecord(
            id=f"{number:012d}",
            split=each.split,
            scene=each.scene,
            held_out=("pair",),
            captions=tuple(text for text, _, _ in each.captions),
            negatives={kind: text for kind, (_, text) in each.negatives.items()},
            speech=Speech("joe", 1.15, joined=True) if number % 2 else None,
        )
        for number, each in enumerate(described[:20])
    ]
    (tmp_path / "truth.jsonl").write_text("".join(truth_lines(records)))
    assert list(read_truth(tmp_path / "truth.jsonl").values()) == records


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_truth(tmp_path / "truth.jsonl")
    (tmp_path / "truth.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match="line 1 is not the truth of a scene"):
        read_truth(tmp_path / "truth.jsonl")
