"""Importers, each on small files in the exact published format: what becomes of them, and what is left out and why."""

import csv
import gzip
import json
import zlib
from pathlib import Path

import pytest
from PIL import Image

from opt_ds import log
from opt_ds.errors import UserError
from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions
from opt_ds.ingest.importers.karpathy import import_karpathy
from opt_ds.ingest.importers.localized_narratives import import_localized_narratives
from opt_ds.ingest.importers.visual_genome import import_visual_genome
from opt_ds.ingest.text_files import read_json_array
from tests.ingest.importers.manifests import left_out, lines_of, touch


def narrative(dataset: str, image: str, annotator: int, caption: str, audio_name: str) -> str:
    return json.dumps(
        {
            "dataset_id": dataset,
            "image_id": image,
            "annotator_id": annotator,
            "caption": caption,
            "timed_caption": [{"caption": "In this image", "start_time": 0.0, "end_time": 1.1}],
            "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}, {"x": 0.2086, "y": -0.0533, "t": 0.037}]],
            "voice_recording": audio_name,
        }
    )


def test_localized_narratives_with_audio_files_and_labels(tmp_path: Path) -> None:
    touch(tmp_path / "oi" / "train" / "0a1.jpg", tmp_path / "oi" / "0b2.jpg", tmp_path / "oi" / "000000000139.jpg")
    voices = tmp_path / "voices"
    first_audio = "open_images_train/open_images_train_0a1_7.ogg"
    touch(voices / first_audio, voices / "open_images_validation" / "b.ogg")
    touch(voices / "c.ogg", voices / "e.ogg")
    narratives = tmp_path / "open_images_train_v6_localized_narratives-00000-of-00010.jsonl"
    narratives.write_text(
        "\n".join(
            [
                narrative("open_images_train", "0a1", 7, "In this image there is a cat.", first_audio),
                narrative("open_images_train", "0a1", 9, "A cat on a mat.", "c.ogg"),
                narrative("open_images_train", "0a1", 9, "Again a cat.", "e.ogg"),
                narrative("open_images_validation", "0b2", 7, "A dog.", "open_images_validation/b.ogg"),
                narrative("mscoco_val2017", "139", 1, "A room.", "gone.ogg"),
                narrative("open_images_train", "lost", 7, "No image.", "c.ogg"),
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
        "audio": voices,
        "labels": [tmp_path / "labels.csv"],
        "label_names": tmp_path / "classes.csv",
    }
    import_localized_narratives([narratives], manifest, **options)
    samples = lines_of(manifest)
    first = samples["open_images_train/0a1/7"]
    assert first.image == samples["open_images_train/0a1/9"].image == "../oi/train/0a1.jpg"
    assert first.group == samples["open_images_train/0a1/9/2"].group, "narratives of an image stay together"
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
    import_conceptual_captions([f"valid={tsv}"], manifest, images=[tmp_path / "images"])
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
    )
    assert [line.text for line in lines_of(manifest).values()] == ["a caption"]
    with pytest.raises(UserError, match=r"use .index., .crc32. and .md5."):
        import_conceptual_captions([str(tsv)], manifest, images=[tmp_path], pattern="{number}")
    with pytest.raises(UserError, match="indices start again in each file"):
        import_conceptual_captions([str(tsv), str(tsv)], manifest, images=[tmp_path])


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
    import_visual_genome(annotations, manifest, images=tmp_path / "vg")
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
    )
    assert sorted(lines_of(manifest)) == ["region 10", "region 12"]
    assert left_out(manifest)["image 2"] == "held out for COCO's evaluation"
    image_data, coco = tmp_path / "image_data.json", tmp_path / "dataset_coco.json"
    for files, message in (
        ({"leave_out": coco}, "--leave-out requires --image-data"),
        ({"image_data": coco, "leave_out": coco}, r'dataset_coco.json: no list of "image_id" and "coco_id"'),
        ({"image_data": image_data, "leave_out": image_data}, r'image_data.json: no "images" with "cocoid" and "split"'),
    ):
        with pytest.raises(UserError, match=message):
            import_visual_genome(annotations, manifest, images=tmp_path / "vg", **files)


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
    import_karpathy(tmp_path / "dataset_coco.json", manifest, images=tmp_path / "coco")
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
        import_karpathy(tmp_path / "dataset_coco.json", manifest, images=tmp_path / "coco")


def test_flickr30k_from_both_of_its_files(tmp_path: Path) -> None:
    touch(tmp_path / "flickr" / "1000092795.jpg")
    sentences = [sentence(0, "Two young guys .")]
    images = [{"sentids": [0], "imgid": 0, "sentences": sentences, "split": "test", "filename": "1000092795.jpg"}]
    (tmp_path / "dataset_flickr30k.json").write_text(karpathy("flickr30k", images))
    (tmp_path / "results_20130124.token").write_text(
        '1000092795.jpg#0\tTwo young guys " look .\n1000092795.jpg#1\tTwo men\n36979.jpg#0\tgone\nodd line\n'
    )
    manifest = tmp_path / "manifest.jsonl"
    import_karpathy(tmp_path / "dataset_flickr30k.json", manifest, images=tmp_path / "flickr")
    assert lines_of(manifest)["sentence 0"].split == "test"
    import_karpathy(tmp_path / "results_20130124.token", manifest, images=tmp_path / "flickr")
    samples = lines_of(manifest)
    assert samples["1000092795.jpg#0"].text == 'Two young guys " look .'
    assert samples["1000092795.jpg#0"].group == samples["1000092795.jpg#1"].group
    assert sorted(left_out(manifest)) == ["36979.jpg#0", "line 4"]


def test_nothing_to_take_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a caption\thttp://a.b\n")
    with pytest.raises(UserError, match=r"no sample could be taken; .*image file is missing"):
        import_conceptual_captions([str(tmp_path / "t.tsv")], tmp_path / "m.jsonl", images=[tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        import_conceptual_captions([str(tmp_path / "t.tsv")], tmp_path / "m.jsonl", images=[tmp_path / "none"])
    with pytest.raises(UserError, match="no such file"):
        import_karpathy(tmp_path / "none.json", tmp_path / "m.jsonl", images=tmp_path)
    (tmp_path / "bad.json").write_text('[{"id": 1}, {"id"')
    with pytest.raises(UserError, match="not JSON: it is truncated"):
        list(read_json_array(tmp_path / "bad.json"))
    assert not (tmp_path / "m.jsonl").exists()


def test_the_commands_say_what_comes_next(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from opt_ds.cli.imports import imports

    (tmp_path / "mine").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "mine" / "a.png")
    with log.to_terminal():
        result = CliRunner().invoke(imports, ["folder", str(tmp_path / "mine"), "--output", str(tmp_path / "o" / "m.jsonl")])
    assert result.exit_code == 0, result.output
    assert f"opt-ds prepare --manifest {tmp_path / 'o' / 'm.jsonl'} --output STORE --allow-outside" in result.output
    for command in ("localized-narratives", "conceptual-captions", "visual-genome", "coco", "flickr30k", "folder", "table"):
        assert CliRunner().invoke(imports, [command, "--help"]).exit_code == 0


def test_commands_take_several_annotations_and_refuse_uncertain_splits(tmp_path: Path) -> None:
    from opt_ds.cli import _build
    from opt_ds.cli.program import run_command

    def main(arguments: list[str]) -> int:
        return run_command(_build(), arguments, "opt-ds")

    touch(tmp_path / "f" / "train" / "a.jpg", tmp_path / "f" / "test" / "a.jpg", tmp_path / "f" / "b.jpg", tmp_path / "x.jpg")
    for name in ("one", "two"):
        images = [{"filename": "x.jpg", "split": "val", "sentences": [sentence(1, name)]}]
        (tmp_path / f"{name}.json").write_text(karpathy("coco", images))
    files = [f"--annotations={tmp_path / name}.json" for name in ("one", "two")]
    output = ["--output", str(tmp_path / "m.jsonl")]
    for command in ("coco", "flickr30k"):
        assert main(["import", command, *files, "--images", str(tmp_path), *output]) == 0
        assert [line.text for line in lines_of(tmp_path / "m.jsonl").values()] == ["one", "two"]
    assert main(["import", "folder", str(tmp_path / "f"), *output]) == 2
    assert main(["prepare", "--manifest", str(tmp_path / "f"), "--output", str(tmp_path / "s")]) == 2
    assert main(["import", "folder", str(tmp_path / "f"), "--folder-splits", *output]) == 0
    assert {line.split for line in lines_of(tmp_path / "m.jsonl").values()} == {"train", "test"}
    assert main(["import", "folder", str(tmp_path / "f"), "--no-folder-splits", *output]) == 0
    assert len(lines_of(tmp_path / "m.jsonl")) == 3
