"""Annotations that are not as published: an importer takes what it can and reports the rest, whatever a line holds."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions
from opt_ds.ingest.importers.karpathy import import_karpathy
from opt_ds.ingest.importers.localized_narratives import import_localized_narratives
from opt_ds.ingest.importers.table import import_table
from opt_ds.ingest.importers.visual_genome import import_visual_genome
from opt_ds.ingest.importers.vqa import import_vqa
from opt_ds.ingest.manifest import read_manifest

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "a\0b", "n" * 3000]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value with one part, anywhere, replaced by something odd, or left out."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 3)) == 0:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: draw(spoiled(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(spoiled(value[index])), *value[index + 1 :]]
    return draw(odd)


def check(write: Callable[[Path], Callable[[Path], object]]) -> None:
    """Import in a folder with two images: a manifest without a rejected line and its report, or one line of error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("1.jpg", "2.jpg"):
            (folder / image).write_bytes(b"x")
        manifest = folder / "manifest.jsonl"
        try:
            write(folder)(manifest)
        except UserError as error:
            assert "\n" not in str(error)
            assert not manifest.exists()
            return
        assert read_manifest(manifest).rejected == []
        assert json.loads(report_path(manifest).read_text())["samples"] == len(read_manifest(manifest).lines)


NARRATIVE = {"dataset_id": "open_images_train", "image_id": "1", "annotator_id": 2, "caption": "A cat",
             "voice_recording": "1.jpg"}  # fmt: skip
GENOME = [{"id": 1, "regions": [{"region_id": 5, "phrase": "a cat", "image_id": 1}, {"region_id": 6, "phrase": "a dog"}]}]
COCO = {"images": [{"filepath": "", "filename": "1.jpg", "split": "val", "cocoid": 1,
                    "sentences": [{"raw": "A cat", "sentid": 3}]}]}  # fmt: skip
QUESTIONS = {"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 1, "question": "what?"},
                                                       {"question_id": 2, "image_id": 1, "question": "who?"}]}  # fmt: skip
ANNOTATIONS = {"data_subtype": "val2014", "annotations": [
    {"question_id": 1, "image_id": 1, "answers": [{"answer": "cat"}, {"answer": 2}]},
    {"question_id": 2, "image_id": 1, "answers": [{"answer": "dog"}]},
]}  # fmt: skip
GOOD = {**NARRATIVE, "image_id": "2"}


@settings(deadline=None)
@given(entry=spoiled(NARRATIVE))
def test_localized_narratives(entry: Any) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        (folder / "a.jsonl").write_text(f"{json.dumps(entry)}\n{json.dumps(GOOD)}\n")
        return lambda manifest: import_localized_narratives(
            [folder / "a.jsonl"], manifest, images=folder, audio=folder
        )

    check(write)


@settings(deadline=None)
@given(content=spoiled(GENOME))
def test_visual_genome(content: Any) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        (folder / "a.json").write_text(json.dumps(content))
        return lambda manifest: import_visual_genome(folder / "a.json", manifest, images=folder)

    check(write)


@settings(deadline=None)
@given(content=spoiled(COCO))
def test_coco(content: Any) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        (folder / "a.json").write_text(json.dumps(content))
        return lambda manifest: import_karpathy(folder / "a.json", manifest, images=folder)

    check(write)


@settings(deadline=None, max_examples=50)
@given(questions=spoiled(QUESTIONS), annotations=spoiled(ANNOTATIONS))
def test_vqa(questions: Any, annotations: Any) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        (folder / "q.json").write_text(json.dumps(questions))
        (folder / "a.json").write_text(json.dumps(annotations))
        (folder / "COCO_val2014_000000000001.jpg").write_bytes(b"x")
        return lambda manifest: import_vqa(
            [str(folder / "q.json")], [str(folder / "a.json")], manifest, images=folder, min_count=1
        )

    check(write)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.text(alphabet='1.jpg#0\t"\r\n é', max_size=20), max_size=4))
def test_flickrs_token_file(rows: list[str]) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        (folder / "f.token").write_text("\n".join(["1.jpg#0\tA cat", *rows]))
        return lambda manifest: import_karpathy(folder / "f.token", manifest, images=folder)

    check(write)


@pytest.mark.parametrize("ending", ["tsv", "csv", "parquet", "labels"])
@settings(deadline=None)
@given(raw=st.binary(max_size=60) | st.text(alphabet='a1,\t"\n\r\0é.jpg', max_size=60).map(str.encode))
def test_tables_of_any_bytes(ending: str, raw: bytes) -> None:
    def write(folder: Path) -> Callable[[Path], object]:
        if ending == "labels":
            (folder / "l.csv").write_bytes(b"ImageID,Source,LabelName,Confidence\n" + raw)
            (folder / "a.jsonl").write_text(json.dumps(GOOD))
            return lambda manifest: import_localized_narratives(
                [folder / "a.jsonl"], manifest, images=folder, labels=[folder / "l.csv"]
            )
        table = folder / f"t.{ending}"
        if ending == "tsv":
            table.write_bytes(raw)
            return lambda manifest: import_conceptual_captions(
                [str(table)], manifest, images=[folder], pattern="{index}"
            )
        table.write_bytes(raw if ending == "parquet" else b"image,text\n" + raw)
        return lambda manifest: import_table(table, manifest)

    check(write)
