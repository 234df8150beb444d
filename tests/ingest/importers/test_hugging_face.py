"""Hugging Face data sets on disk: folders of save_to_disk, and Parquet shards of the Hub, read with pyarrow alone."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import Image
from pyarrow import ipc, parquet

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.hugging_face import import_hugging_face
from opt_ds.ingest.importers.table import import_table
from tests.ingest.importers.manifests import left_out, lines_of

FILE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
FEATURES = {
    "image": {"_type": "Image"},
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "caption": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}
SCHEMA = pyarrow.schema(
    {"image": FILE, "audio": FILE, "caption": pyarrow.list_(pyarrow.string()), "label": pyarrow.int64()},
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)
COLUMNS = ("text=caption", "labels=label")


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def flac(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(400), 16000, format="FLAC")
    return buffer.getvalue()


def row(seed: int, captions: Sequence[str], label: int = 0, **cells: Any) -> dict[str, Any]:
    return {"image": {"bytes": png(seed), "path": f"{seed}.png"}, "audio": {"bytes": flac(seed), "path": None},
            "caption": list(captions), "label": label, **cells}  # fmt: skip


def save(folder: Path, shards: Sequence[Sequence[dict[str, Any]]], split: str | None = None, schema: Any = SCHEMA) -> Path:
    """Write what `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        with ipc.new_stream(str(folder / name), schema) as writer:
            for start in range(0, len(rows), 2):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(list(rows[start : start + 2]), schema))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "d665e8f32748ade2",
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
             "_split": split}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return folder


def notes_of(manifest: Path) -> list[str]:
    return json.loads(report_path(manifest).read_text())["notes"]


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    rows = [row(0, ["A cat.", "One cat."]), row(1, ["A dog."], 1), row(0, ["The cat again."], -1), row(2, [], 5)]
    folder = save(tmp_path / "mine", [rows[:3], rows[3:]], "train")
    manifest = tmp_path / "m" / "manifest.jsonl"
    import_hugging_face([str(folder)], manifest, columns=COLUMNS)
    samples = lines_of(manifest)
    assert {id: line.text for id, line in samples.items()} == {
        "data-00000-of-00002/row 0#0": "A cat.", "data-00000-of-00002/row 0#1": "One cat.",
        "data-00000-of-00002/row 1": "A dog.", "data-00000-of-00002/row 2": "The cat again.",
    }  # fmt: skip
    first, second, dog, again = samples.values()
    assert first.image == second.image == again.image, "files of one content are written once"
    assert first.group_name == second.group_name != dog.group_name
    assert (manifest.parent / str(dog.image)).read_bytes() == png(1)
    assert (manifest.parent / str(dog.audio)).read_bytes() == flac(1)
    assert [line.labels for line in samples.values()] == [("cat",), ("cat",), ("dog",), ()]
    assert {line.split for line in samples.values()} == {None}
    assert left_out(manifest) == {"data-00001-of-00002/row 0": "its label is none of the classes: column label: 5, of 2 classes"}
    assert "all files are of split train: opt-ds prepare assigns splits" in notes_of(manifest)


def test_a_dataset_dict_has_splits(tmp_path: Path) -> None:
    schema = pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})
    for split, texts in (("train", ["a", "b"]), ("validation", ["c"]), ("test", ["d"])):
        save(tmp_path / "d" / split, [[{"id": number, "text": text} for number, text in enumerate(texts)]], split, schema)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    manifest = tmp_path / "manifest.jsonl"
    import_hugging_face([str(tmp_path / "d")], manifest)
    assert {id: (line.split, line.text) for id, line in lines_of(manifest).items()} == {
        "train/0": ("train", "a"), "train/1": ("train", "b"), "valid/0": ("valid", "c"), "test/0": ("test", "d"),
    }  # fmt: skip
    assert notes_of(manifest) == ['splits of the files: "validation" is valid']
    import_hugging_face([f"train={tmp_path}/d/train", f"held-out={tmp_path}/d/test"], manifest)
    assert {line.split for line in lines_of(manifest).values()} == {"train", "held-out"}


def test_parquet_shards_of_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("---\nconfigs: []\n---\n")
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        parquet.write_table(pyarrow.Table.from_pylist([row(number, [name])], SCHEMA), data / f"{name}.parquet")
    manifest = tmp_path / "manifest.jsonl"
    for sources in ([str(tmp_path / "hub")], [f"{data}/*.parquet"], [f"{data}/train-{{00000..00001}}-of-00002.parquet",
                                                                  f"{data}/validation-00000-of-00001.parquet"]):  # fmt: skip
        import_hugging_face(sources, manifest, columns=COLUMNS)
        samples = lines_of(manifest)
        assert [(line.split, line.text) for line in samples.values()] == [
            ("train", "train-00000-of-00002"), ("train", "train-00001-of-00002"), ("valid", "validation-00000-of-00001"),
        ]  # fmt: skip
        assert (tmp_path / str(samples["train-00001-of-00002/row 0"].image)).read_bytes() == png(1)
    import_table(data / "train-00000-of-00002.parquet", manifest, columns=COLUMNS)
    (line,) = lines_of(manifest).values()
    assert (line.id, line.split) == ("row 0", None), "a single table is as before"


def test_other_columns_damage_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", [[row(0, ["a"]), row(1, ["b"]), row(2, ["c"])], [row(3, ["d"])]])
    first, second = sorted(folder.glob("*.arrow"))
    whole, state = second.read_bytes(), json.loads((folder / "state.json").read_text())

    def refused(message: str, source: str = str(folder)) -> None:
        with pytest.raises(UserError, match=message) as error:
            import_hugging_face([source], tmp_path / "m.jsonl", columns=COLUMNS)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "m.jsonl").exists()

    other = pyarrow.schema({**dict(zip(SCHEMA.names, SCHEMA.types, strict=True)), "label": pyarrow.string()})
    with ipc.new_stream(str(second), other) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_pylist([row(3, ["d"], label="cat")], other))
    refused(r'data-00001-of-00002.arrow: other columns than in .*data-00000.*: column "label" is string, not int64')
    with ipc.new_stream(str(second), pyarrow.schema({"text": pyarrow.string()})) as writer:
        pass
    refused(r'data-00001-of-00002.arrow: other columns .*: column "text" is only in data-00001-of-00002.arrow')
    second.write_bytes(whole[:-8])
    refused("data-00001-of-00002.arrow: its end marker is missing, so it is truncated")
    second.write_bytes(whole[:-300])
    refused("data-00001-of-00002.arrow: damaged after row 0: copy it again")
    second.write_bytes(b"not Arrow")
    refused("data-00001-of-00002.arrow: not an Arrow file, or truncated")
    second.write_bytes(b"")
    refused("data-00001-of-00002.arrow: not an Arrow file, or truncated")
    second.unlink()
    refused("data-00001-of-00002.arrow: no such file, although state.json names it")
    for change, message in (
        ({"_data_files": [{"filename": "../../etc/passwd"}]}, 'no list "_data_files" of file names'),
        ({"_data_files": []}, 'no list "_data_files" of file names'),
        ({"_data_files": {"a": 1}}, 'no list "_data_files" of file names'),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "selected by a file of indices"),
    ):
        (folder / "state.json").write_text(json.dumps({**state, **change}))
        refused(message)
    (folder / "state.json").write_text("[")
    refused("not JSON: it is truncated")
    for splits in ('["../d"]', "[]", '"d"', "[1]"):
        (folder / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
        refused('no list "splits" of names')
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    refused("d/train: state.json is missing there")
    refused(r"neither state.json, dataset_dict.json nor \*.parquet", str(tmp_path))
    refused("it is named twice", f"{first.parent}/{{{first.name},{first.name}}}".replace("{data", "{./data", 1))


def test_an_arrow_file_of_feather_is_read_and_flipped_bytes_end_in_one_line(tmp_path: Path) -> None:
    rows = [row(number, [f"caption {number}"]) for number in range(3)]
    with ipc.new_file(str(tmp_path / "x.arrow"), SCHEMA) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
    import_hugging_face([str(tmp_path / "x.arrow")], tmp_path / "m.jsonl", columns=COLUMNS)
    assert [line.text for line in lines_of(tmp_path / "m.jsonl").values()] == [f"caption {number}" for number in range(3)]
    import_table(tmp_path / "x.arrow", tmp_path / "m.jsonl", columns=COLUMNS)
    assert list(lines_of(tmp_path / "m.jsonl")) == ["row 0", "row 1", "row 2"]
    folder = save(tmp_path / "d", [rows])
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(12):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        try:
            import_hugging_face([str(folder)], tmp_path / "m.jsonl", columns=COLUMNS)
        except UserError as error:
            assert "\n" not in str(error)
