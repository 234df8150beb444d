"""CSV, TSV and Parquet with columns of any name, and files inside of Parquet: the same samples come out."""

import csv
import json
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.table import import_table
from tests.ingest.importers.manifests import left_out, lines_of, touch


@pytest.mark.parametrize("kind", ["csv", "tsv", "v1.tsv", "parquet"])
def test_tables_with_columns_of_any_name(tmp_path: Path, kind: str) -> None:
    touch(tmp_path / "p" / "a.jpg", tmp_path / "p" / "b.wav")
    rows = [
        {"path": "a.jpg", "audio": "", "caption": 'one, "two"', "labels": "x|y z"},
        {"path": "", "audio": "b.wav", "caption": "speech", "labels": ""},
        {"path": "gone.jpg", "audio": "", "caption": "gone", "labels": ""},
        {"path": "", "audio": "", "caption": "words alone", "labels": ""},
    ]
    table, manifest, kind = tmp_path / f"t.{kind}", tmp_path / "manifest.jsonl", kind.split(".")[-1]
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {name: [row[name] or None for row in rows] for name in rows[0]}
        columns["labels"] = [["x", "y z"], None, [], None]
        parquet.write_table(pyarrow.table(columns), table)
    else:
        rows = [{**row, "caption": row["caption"].replace('"', "") if kind == "tsv" else row["caption"]} for row in rows]
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    import_table(table, manifest, files=tmp_path / "p", columns=["image=path", "text=caption"])
    samples = lines_of(manifest)
    assert samples["row 0"].text == ("one, two" if kind == "tsv" else 'one, "two"')
    assert (samples["row 0"].image, samples["row 0"].labels) == ("p/a.jpg", ("x", "y z"))
    assert (samples["row 1"].audio, samples["row 1"].image) == ("p/b.wav", None)
    assert samples["row 3"].text == "words alone"
    assert left_out(manifest) == {"row 2": "image file is missing: gone.jpg"}
    with pytest.raises(UserError, match=r'no column "captoin" .did you mean "caption"'):
        import_table(table, manifest, columns=["text=captoin"])
    for field in ("txt", "further"):
        with pytest.raises(UserError, match="write FIELD=COLUMN"):
            import_table(table, manifest, columns=[f"{field}=caption"])


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    """Images and audio in the table, classes as numbers. A name in it is never a path."""
    import pyarrow
    from pyarrow import parquet

    image, drawing, sound = b"\xff\xd8picture", b"<svg xmlns='x'/>", b"RIFFsound"
    touch(tmp_path / "there.png")
    rows = [
        {
            "id": "a",
            "image": {"bytes": image, "path": "../../a.JPG"},
            "audio": {"bytes": sound, "path": None},
            "label": 1,
        },
        {"id": "b", "image": {"bytes": image, "path": "b.exe"}, "audio": None, "label": -1},
        {"id": "c", "image": {"bytes": drawing, "path": None}, "audio": None, "label": 0},
        {"id": "d", "image": {"bytes": None, "path": "there.png"}, "audio": None, "label": None},
        {"id": "e", "image": {"bytes": b"", "path": None}, "audio": None, "label": 0},
        {"id": "f", "image": {"bytes": None, "path": "gone.png"}, "audio": None, "label": 0},
    ]
    cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"id": pyarrow.string(), "image": cell, "audio": cell, "label": pyarrow.int64()})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    table, manifest = tmp_path / "train.parquet", tmp_path / "out" / "manifest.jsonl"
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), table)
    import_table(table, manifest, columns=["labels=label"])
    samples = lines_of(manifest)
    folder = manifest.parent / "manifest-files"
    assert (manifest.parent / samples["a"].image).read_bytes() == image
    assert (manifest.parent / samples["a"].audio).read_bytes() == sound
    assert samples["a"].image.endswith(".jpg") and samples["c"].image.endswith(".svg")
    assert {(manifest.parent / line.image).parent for line in samples.values() if line.id in "abc"} == {folder}
    assert samples["d"].image == "../there.png"
    assert [samples[id].labels for id in "abcd"] == [("dog",), (), ("cat",), ()]
    assert left_out(manifest) == {"e": "image file is missing: no bytes and no path", "f": "image file is missing: gone.png"}
    assert len(list(folder.iterdir())) == 4  # a.jpg and b, of one content, have different endings
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    import_table(table, manifest, columns=["labels=label"])
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps


def test_a_plain_binary_column_is_files_and_lists_are_not(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    manifest = tmp_path / "manifest.jsonl"
    parquet.write_table(pyarrow.table({"image": [b"x", b"y"]}), tmp_path / "t.parquet")
    import_table(tmp_path / "t.parquet", manifest)
    assert [(tmp_path / line.image).read_bytes() for line in lines_of(manifest).values()] == [b"x", b"y"]
    parquet.write_table(pyarrow.table({"image": [[b"x"]], "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column image does not hold files or paths"):
        import_table(tmp_path / "t.parquet", manifest)
