"""Importers, each on small files in the exact published format: what becomes of them, and what is left out and why."""

import csv
import gzip
import json
import zlib
from pathlib import Path

import pytest
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import report_path
from opt_ds.prepare.importers.conceptual_captions import import_conceptual_captions
from opt_ds.prepare.importers.folder import folder_manifest, import_folder
from opt_ds.prepare.importers.karpathy import import_karpathy
from opt_ds.prepare.importers.localized_narratives import import_localized_narratives
from opt_ds.prepare.importers.table import import_table
from opt_ds.prepare.importers.tables import read_rows
from opt_ds.prepare.importers.visual_genome import import_visual_genome
from opt_ds.prepare.manifest import ManifestLine, read_manifest
from opt_ds.prepare.text_files import read_json_array, read_json_lines


def silent(_: str) -> None:
    pass


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def lines_of(manifest: Path) -> dict[str, ManifestLine]:
    """The samples by id, through the reader that `opt-ds prepare` uses."""
    read = read_manifest(manifest, allow_outside=True)
    assert read.rejected == []
    for line in read.lines:
        for name in (line.image, line.audio):
            assert name is None or (manifest.parent / name).is_file(), "paths are relative to the manifest"
    return {line.id: line for line in read.lines}


def left_out(manifest: Path) -> dict[str, str]:
    report = json.loads(report_path(manifest).read_text())
    assert report["skipped"] == len(report["skipped_samples"]) == sum(report["reasons"].values())
    return {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}


def narrative(dataset: str, image: str, annotator: int, caption: str, recording: str) -> str:
    return json.dumps(
        {
            "dataset_id": dataset,
            "image_id": image,
            "annotator_id": annotator,
            "caption": caption,
            "timed_caption": [{"caption": "In this image", "start_time": 0.0, "end_time": 1.1}],
            "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}, {"x": 0.2086, "y": -0.0533, "t": 0.037}]],
            "voice_recording": recording,
        }
    )


def test_localized_narratives_with_recordings_and_labels(tmp_path: Path) -> None:
    touch(tmp_path / "oi" / "train" / "0a1.jpg", tmp_path / "oi" / "0b2.jpg", tmp_path / "oi" / "000000000139.jpg")
    voices = tmp_path / "voices"
    first_recording = "open_images_train/open_images_train_0a1_7.ogg"
    touch(voices / first_recording, voices / "open_images_validation" / "b.ogg")
    touch(voices / "c.ogg", voices / "e.ogg")
    narratives = tmp_path / "open_images_train_v6_localized_narratives-00000-of-00010.jsonl"
    narratives.write_text(
        "\n".join(
            [
                narrative("open_images_train", "0a1", 7, "In this image there is a cat.", first_recording),
                narrative("open_images_train", "0a1", 9, "A cat on a mat.", "c.ogg"),
                narrative("open_images_train", "0a1", 9, "Again a cat.", "e.ogg"),
                narrative("open_images_validation", "0b2", 7, "A dog.", "open_images_validation/b.ogg"),
                narrative("mscoco_val2017", "139", 1, "A room.", "gone.ogg"),
                narrative("open_images_train", "lost", 7, "No picture.", "c.ogg"),
                '{"dataset_id": "open_images_train", "caption": "no image"}',
                "{cut off",
                narrative("open_images_train", "0b2", 3, " ", "c.ogg"),
            ]
        )
    )  # fmt: skip
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("ImageID", "Source", "LabelName", "Confidence"),
                ("0a1", "verification", "/m/01yrx", 1),
                ("0a1", "crowdsource-verification", "/m/01yrx", 1),
                ("0a1", "verification", "/m/0bt9lr", 0),
                ("0b2", "machine", "/m/0bt9lr", 0.8),
                ("other", "verification", "/m/01yrx", 1),
            ]
        )
    (tmp_path / "classes.csv").write_text('/m/01yrx,Cat\n/m/0bt9lr,"Dog, tame"\n')
    manifest = tmp_path / "m" / "manifest.jsonl"
    options = {
        "images": tmp_path / "oi",
        "recordings": voices,
        "labels": [tmp_path / "labels.csv"],
        "label_names": tmp_path / "classes.csv",
        "say": silent,
    }
    import_localized_narratives([narratives], manifest, **options)
    samples = lines_of(manifest)
    first = samples["open_images_train/0a1/7"]
    assert first.image == samples["open_images_train/0a1/9"].image == "../oi/train/0a1.jpg"
    assert first.group == samples["open_images_train/0a1/9/2"].group, "narratives of a picture stay together"
    assert first.audio == "../voices/open_images_train/open_images_train_0a1_7.ogg"
    assert (first.labels, samples["open_images_validation/0b2/7"].labels) == (("Cat",), ("Dog, tame",))
    assert [samples[name].split for name in samples] == ["train", "train", "train", "valid"]
    reasons = left_out(manifest)
    assert reasons["mscoco_val2017/139/1"] == "audio file is missing: gone.ogg"
    assert reasons["open_images_train/lost/7"] == "image file is missing: lost"
    assert "no 'image_id'" in reasons[f"{narratives.name} line 7"]
    assert reasons[f"{narratives.name} line 8"].startswith("not JSON")
    assert reasons["open_images_train/0b2/3"] == "the text is empty"
    import_localized_narratives([narratives], manifest, keep_incomplete=True, **options)
    samples = lines_of(manifest)
    assert samples["mscoco_val2017/139/1"].image == "../oi/000000000139.jpg"
    assert samples["mscoco_val2017/139/1"].audio is None
    assert samples["open_images_train/lost/7"].image is None
    (tmp_path / "labels.csv").write_text("image,label\n")
    with pytest.raises(UserError, match="no column ImageID"):
        import_localized_narratives([narratives], manifest, **options)


def test_conceptual_captions_reports_dead_links(tmp_path: Path) -> None:
    url = "http://example.com/{}.jpg?size=640"
    rows = ['a "quoted" caption', "a very typical bus station", "gone", ""]
    tsv = tmp_path / "Train_GCC-training.tsv"
    tsv.write_text("".join(f"{caption}\t{url.format(index)}\n" for index, caption in enumerate(rows)) + "no url\n")
    touch(*(tmp_path / "images" / "00000" / f"{index:09d}.png" for index in (0, 1, 3)))
    for index in (0, 1):
        (tmp_path / "images" / "00000" / f"{index:09d}.json").write_text(json.dumps({"url": url.format(index)}))
        (tmp_path / "images" / "00000" / f"{index:09d}.txt").write_text(rows[index])
    manifest = tmp_path / "manifest.jsonl"
    import_conceptual_captions([f"valid={tsv}"], manifest, images=[tmp_path / "images"], say=silent)
    samples = lines_of(manifest)
    assert {line.text for line in samples.values()} == {'a "quoted" caption', "a very typical bus station"}
    assert samples["Train_GCC-training/1"].image == "images/00000/000000001.png"
    assert {line.split for line in samples.values()} == {"valid"}
    reasons = left_out(manifest)
    assert reasons["Train_GCC-training/2"] == f"image file is missing: 000000002 ({url.format(2)})"
    assert reasons["Train_GCC-training/3"] == "the text is empty"
    assert reasons["Train_GCC-training/4"].startswith("not caption and URL")
    # The download script's names: index and CRC-32 of the URL; and CC12M's order of columns, gzipped.
    with gzip.open(tmp_path / "cc12m.tsv.gz", "wt") as file:
        file.write("http://a.b/c.png\ta caption\n")
    touch(tmp_path / "other" / f"0_{zlib.crc32(b'http://a.b/c.png')}.png")
    import_conceptual_captions(
        [str(tmp_path / "cc12m.tsv.gz")],
        manifest,
        images=[tmp_path / "other"],
        pattern="{index}_{crc32}",
        url_first=True,
        say=silent,
    )
    assert [line.text for line in lines_of(manifest).values()] == ["a caption"]
    with pytest.raises(UserError, match=r"use .index., .crc32. and .md5."):
        import_conceptual_captions([str(tsv)], manifest, images=[tmp_path], pattern="{number}", say=silent)
    with pytest.raises(UserError, match="indices begin anew in each file"):
        import_conceptual_captions([str(tsv), str(tsv)], manifest, images=[tmp_path], say=silent)


def test_visual_genome_takes_phrases_and_leaves_out_coco_tests(tmp_path: Path) -> None:
    touch(tmp_path / "vg" / "VG_100K" / "1.jpg", tmp_path / "vg" / "VG_100K_2" / "2.jpg")

    def region(number: int, image: int, phrase: str) -> dict:
        return {"region_id": number, "width": 82, "height": 139, "image_id": image, "phrase": phrase, "y": 57, "x": 421}

    phrases = [region(10 * image + number, image, f"thing {number}") for image in (1, 2, 3) for number in range(4)]
    phrases.append(region(99, 2, ""))
    content = [
        {"id": image, "regions": [each for each in phrases if each["image_id"] == image]} for image in (1, 2, 3)
    ]
    (tmp_path / "region_descriptions.json").write_text(json.dumps([*content, {"odd": 1}]))
    (tmp_path / "image_data.json").write_text(
        json.dumps(
            [
                {"width": 800, "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{image}.jpg", "height": 600,
                 "image_id": image, "coco_id": coco, "flickr_id": None}
                for image, coco in ((1, None), (2, 139))
            ]
        )
    )  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [{"cocoid": 139, "split": "test"}], "dataset": "coco"}))
    manifest = tmp_path / "manifest.jsonl"
    annotations = tmp_path / "region_descriptions.json"
    import_visual_genome(annotations, manifest, images=tmp_path / "vg", say=silent)
    samples = lines_of(manifest)
    assert len(samples) == 8
    assert samples["region 21"].text == "thing 1"
    assert samples["region 21"].image == "vg/VG_100K_2/2.jpg"
    assert samples["region 10"].group == samples["region 13"].group != samples["region 20"].group
    reasons = left_out(manifest)
    assert reasons == {
        "region 99": "the text is empty",
        "image 3": "image file is missing: 3.jpg",
        "region_descriptions.json entry 3": "not as published: region_descriptions.json entry 3: no 'id'",
    }
    import_visual_genome(
        annotations,
        manifest,
        images=tmp_path / "vg",
        image_data=tmp_path / "image_data.json",
        leave_out=tmp_path / "dataset_coco.json",
        max_phrases=2,
        say=silent,
    )
    assert sorted(lines_of(manifest)) == ["region 10", "region 12"]
    assert left_out(manifest)["image 2"] == "held out for COCO's evaluation"
    image_data, coco = tmp_path / "image_data.json", tmp_path / "dataset_coco.json"
    for files, message in (
        ({"leave_out": coco}, "--leave-out: only --image-data tells"),
        ({"image_data": coco, "leave_out": coco}, r'dataset_coco.json: no list of "image_id" and "coco_id"'),
        ({"image_data": image_data, "leave_out": image_data}, r'image_data.json: no "images" with "cocoid" and "split"'),
    ):
        with pytest.raises(UserError, match=message):
            import_visual_genome(annotations, manifest, images=tmp_path / "vg", say=silent, **files)


def karpathy(dataset: str, images: list[dict]) -> str:
    return json.dumps({"images": images, "dataset": dataset})


def sentence(number: int, raw: str, image: int = 0) -> dict:
    return {"tokens": raw.lower().split(), "raw": raw, "imgid": image, "sentid": number}


def test_coco_in_karpathys_splits(tmp_path: Path) -> None:
    touch(tmp_path / "coco" / "val2014" / "COCO_val2014_000000391895.jpg", tmp_path / "coco" / "COCO_train2014_000000000009.jpg")
    images = [
        {"filepath": "val2014", "sentids": [1, 2], "filename": "COCO_val2014_000000391895.jpg", "imgid": 0, "split": "val",
         "sentences": [sentence(1, "A man on a bike."), sentence(2, "A red bike")], "cocoid": 391895},
        {"filepath": "train2014", "sentids": [3], "filename": "COCO_train2014_000000000009.jpg", "imgid": 1, "split": "restval",
         "sentences": [sentence(3, "Food.", 1)], "cocoid": 9},
        {"filepath": "train2014", "sentids": [4], "filename": "COCO_train2014_000000000010.jpg", "imgid": 2, "split": "train",
         "sentences": [sentence(4, "Gone.", 2)], "cocoid": 10},
        {"filename": "broken"},
    ]  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(karpathy("coco", images))
    manifest = tmp_path / "manifest.jsonl"
    import_karpathy(tmp_path / "dataset_coco.json", manifest, images=tmp_path / "coco", say=silent)
    samples = lines_of(manifest)
    assert {name: (line.split, line.text) for name, line in samples.items()} == {
        "sentence 1": ("valid", "A man on a bike."),
        "sentence 2": ("valid", "A red bike"),
        "sentence 3": ("train", "Food."),
    }
    assert samples["sentence 1"].group == samples["sentence 2"].group
    assert left_out(manifest) == {
        "sentence 4": "image file is missing: train2014/COCO_train2014_000000000010.jpg",
        "image 3": "not as published: image 3: no 'split'",
    }
    (tmp_path / "dataset_coco.json").write_text("[]")
    with pytest.raises(UserError, match='no list "images"'):
        import_karpathy(tmp_path / "dataset_coco.json", manifest, images=tmp_path / "coco", say=silent)


def test_flickr30k_from_both_of_its_files(tmp_path: Path) -> None:
    touch(tmp_path / "flickr" / "1000092795.jpg")
    sentences = [sentence(0, "Two young guys .")]
    images = [{"sentids": [0], "imgid": 0, "sentences": sentences, "split": "test", "filename": "1000092795.jpg"}]
    (tmp_path / "dataset_flickr30k.json").write_text(karpathy("flickr30k", images))
    (tmp_path / "results_20130124.token").write_text(
        '1000092795.jpg#0\tTwo young guys " look .\n1000092795.jpg#1\tTwo men\n36979.jpg#0\tgone\nodd line\n'
    )
    manifest = tmp_path / "manifest.jsonl"
    import_karpathy(tmp_path / "dataset_flickr30k.json", manifest, images=tmp_path / "flickr", say=silent)
    assert lines_of(manifest)["sentence 0"].split == "test"
    import_karpathy(tmp_path / "results_20130124.token", manifest, images=tmp_path / "flickr", say=silent)
    samples = lines_of(manifest)
    assert samples["1000092795.jpg#0"].text == 'Two young guys " look .'
    assert samples["1000092795.jpg#0"].group == samples["1000092795.jpg#1"].group
    assert sorted(left_out(manifest)) == ["36979.jpg#0", "line 4"]


def test_a_folder_joins_files_of_one_name(tmp_path: Path) -> None:
    top = tmp_path / "mine"
    touch(top / "train" / "cat.jpg", top / "train" / "cat.wav", top / "val" / "dog.PNG", top / "val" / "twice.jpg")
    touch(top / "val" / "twice.png", top / "val" / "notes.pdf")
    (top / "train" / "cat.txt").write_text("A cat\n", encoding="utf-8")
    (top / "train" / "latin.txt").write_bytes(b"caf\xe9")
    (top / "train" / "blank.txt").write_text(" \n")
    said: list[str] = []
    manifest = folder_manifest(top, say=said.append)
    samples = lines_of(manifest)
    assert sorted(samples) == ["train/cat", "val/dog"]
    cat = samples["train/cat"]
    assert (cat.image, cat.text, cat.audio, cat.split) == ("train/cat.jpg", "A cat", "train/cat.wav", "train")
    assert samples["val/dog"].split == "valid"
    assert left_out(manifest) == {
        "train/latin": "the text is not UTF-8: latin.txt",
        "train/blank": "the text is empty",
        "val/twice": "two files of one kind: twice.jpg and twice.png",
    }
    before = manifest.read_bytes()
    assert folder_manifest(top, say=said.append).read_bytes() == before
    assert "found" in said[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no picture, recording or \.txt file there"):
        import_folder(tmp_path / "empty", say=silent)


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
    import_table(table, manifest, files=tmp_path / "p", columns=["image=path", "text=caption"], say=silent)
    samples = lines_of(manifest)
    assert samples["row 0"].text == ("one, two" if kind == "tsv" else 'one, "two"')
    assert (samples["row 0"].image, samples["row 0"].labels) == ("p/a.jpg", ("x", "y z"))
    assert (samples["row 1"].audio, samples["row 1"].image) == ("p/b.wav", None)
    assert samples["row 3"].text == "words alone"
    assert left_out(manifest) == {"row 2": "image file is missing: gone.jpg"}
    with pytest.raises(UserError, match=r'no column "captoin" .did you mean "caption"'):
        import_table(table, manifest, columns=["text=captoin"], say=silent)
    with pytest.raises(UserError, match="write FIELD=COLUMN"):
        import_table(table, manifest, columns=["txt=caption"], say=silent)


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    """Pictures and recordings inside the table, classes as numbers; a name in it is never a path."""
    import pyarrow
    from pyarrow import parquet

    picture, drawing, sound = b"\xff\xd8picture", b"<svg xmlns='x'/>", b"RIFFsound"
    touch(tmp_path / "there.png")
    rows = [
        {"id": "a", "image": {"bytes": picture, "path": "../../a.JPG"}, "audio": {"bytes": sound, "path": None}, "label": 1},
        {"id": "b", "image": {"bytes": picture, "path": "b.exe"}, "audio": None, "label": -1},
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
    import_table(table, manifest, columns=["labels=label"], say=silent)
    samples = lines_of(manifest)
    folder = manifest.parent / "manifest-files"
    assert (manifest.parent / samples["a"].image).read_bytes() == picture
    assert (manifest.parent / samples["a"].audio).read_bytes() == sound
    assert samples["a"].image.endswith(".jpg") and samples["c"].image.endswith(".svg")
    assert {(manifest.parent / line.image).parent for line in samples.values() if line.id in "abc"} == {folder}
    assert samples["d"].image == "../there.png"
    assert [samples[id].labels for id in "abcd"] == [("dog",), (), ("cat",), ()]
    assert left_out(manifest) == {"e": "image file is missing: no bytes and no path", "f": "image file is missing: gone.png"}
    assert len(list(folder.iterdir())) == 4  # a.jpg and b, of one content, have different endings
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    import_table(table, manifest, columns=["labels=label"], say=silent)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps


def test_a_plain_binary_column_is_files_and_lists_are_not(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    manifest = tmp_path / "manifest.jsonl"
    parquet.write_table(pyarrow.table({"image": [b"x", b"y"]}), tmp_path / "t.parquet")
    import_table(tmp_path / "t.parquet", manifest, say=silent)
    assert [(tmp_path / line.image).read_bytes() for line in lines_of(manifest).values()] == [b"x", b"y"]
    parquet.write_table(pyarrow.table({"image": [[b"x"]], "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column image does not hold files or paths"):
        import_table(tmp_path / "t.parquet", manifest, say=silent)


def test_nothing_to_take_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a caption\thttp://a.b\n")
    with pytest.raises(UserError, match=r"no sample could be taken; .*image file is missing"):
        import_conceptual_captions([str(tmp_path / "t.tsv")], tmp_path / "m.jsonl", images=[tmp_path], say=silent)
    with pytest.raises(UserError, match="no such folder"):
        import_conceptual_captions([str(tmp_path / "t.tsv")], tmp_path / "m.jsonl", images=[tmp_path / "none"], say=silent)
    with pytest.raises(UserError, match="no such file"):
        import_karpathy(tmp_path / "none.json", tmp_path / "m.jsonl", images=tmp_path, say=silent)
    (tmp_path / "bad.json").write_text('[{"id": 1}, {"id"')
    with pytest.raises(UserError, match="not JSON: it is cut off"):
        list(read_json_array(tmp_path / "bad.json"))
    assert not (tmp_path / "m.jsonl").exists()


def test_text_in_another_encoding_or_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"caption": "café"}'.encode("latin-1"))
    whole = gzip.compress(b"a caption\thttp://a.b/c.png\n" * 100)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[:-9])
    (tmp_path / "not.tsv.gz").write_bytes(b"a caption\thttp://a.b/c.png\n")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[1, 2")[:-9])
    (tmp_path / "latin.csv").write_bytes("café,x".encode("latin-1"))
    (tmp_path / "wide.csv").write_bytes("café,x".encode("utf-16"))
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04")
    assert list(read_json_lines(tmp_path / "latin.jsonl")) == [(1, "not UTF-8 text (byte 16)")]
    for name, read, why in (
        ("latin.csv", lambda path: read_rows(path, ",", quoted=True), "not UTF-8 text: save it as UTF-8"),
        ("wide.csv", lambda path: read_rows(path, ",", quoted=True), "not UTF-8 text but UTF-16: save it as UTF-8"),
        ("t.csv", lambda path: read_rows(path, ",", quoted=True), "archive, not a text file: unpack it"),
        ("cut.tsv.gz", lambda path: read_rows(path, "\t", quoted=False), "the gzip file is cut off or damaged"),
        ("not.tsv.gz", lambda path: read_rows(path, "\t", quoted=False), "not a gzip file"),
        ("cut.json.gz", read_json_array, "the gzip file is cut off or damaged"),
    ):
        with pytest.raises(UserError, match=f"{name}: {why}"):
            list(read(tmp_path / name))


def test_large_json_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_ds.prepare.text_files._JSON_BLOCK", 7)
    content = [{"id": index, "text": "x" * index, "list": [1, [2, {"]": "[,"}]]} for index in range(20)] + [12345678901]
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    assert list(read_json_array(tmp_path / "a.json")) == content


def test_the_commands_say_what_comes_next(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from opt_ds.commands.imports import imports

    (tmp_path / "mine").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "mine" / "a.png")
    result = CliRunner().invoke(imports, ["folder", str(tmp_path / "mine"), "--output", str(tmp_path / "o" / "m.jsonl")])
    assert result.exit_code == 0, result.output
    assert f"opt-ds prepare --manifest {tmp_path / 'o' / 'm.jsonl'} --output STORE --allow-outside" in result.output
    for command in ("localized-narratives", "conceptual-captions", "visual-genome", "coco", "flickr30k", "folder", "table"):
        assert CliRunner().invoke(imports, [command, "--help"]).exit_code == 0
