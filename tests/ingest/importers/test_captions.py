"""Captions and spoken captions of images: COCO's own files, SpokenCOCO, Places and Flickr8k Audio Captions."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.flickr8k_audio import import_flickr8k_audio
from opt_ds.ingest.importers.karpathy import import_karpathy
from opt_ds.ingest.importers.spoken_captions import import_spoken_captions
from tests.ingest.importers.manifests import left_out, lines_of, touch


def unused_of(manifest: Path) -> dict[str, list[str]]:
    return {each["what"]: each["names"] for each in json.loads(report_path(manifest).read_text())["unused"]}


def coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> str:
    info = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
    return json.dumps({"info": info, "licenses": [{"id": 1}], "images": images, "annotations": annotations})


def coco_image(id: int, name: str) -> dict[str, Any]:
    return {"license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{name}", "height": 427, "width": 640,
            "date_captured": "2013-11-14 17:02:52", "flickr_url": "http://a.b/c.jpg", "id": id}  # fmt: skip


def test_cocos_own_captions(tmp_path: Path) -> None:
    touch(tmp_path / "coco" / "val2017" / "000000000139.jpg", tmp_path / "coco" / "train2017" / "000000000009.jpg")
    named = ((139, "000000000139.jpg"), (285, "000000000285.jpg"), (7, "7.jpg"), (7, "8.jpg"))
    images = [coco_image(id, name) for id, name in named]
    annotations = [
        {"image_id": 139, "id": 37, "caption": "A woman stands.\n"},
        {"image_id": 139, "id": 38, "caption": "A living room."},
        {"image_id": 285, "id": 39, "caption": "A bear."},
        {"image_id": 1, "id": 40, "caption": "no image"},
        {"image_id": 7, "id": 41, "caption": "two images"},
        {"image_id": 139, "caption": "no id"},
        {"image_id": 139, "id": 42, "caption": None},
    ]
    (tmp_path / "captions_val2017.json").write_text(coco([*images, coco_image(11, "11.jpg")], annotations))
    train = coco([coco_image(9, "000000000009.jpg")], [{"image_id": 9, "id": 1, "caption": "Food."}])
    (tmp_path / "captions_train2017.json.gz").write_bytes(gzip.compress(train.encode()))
    manifest = tmp_path / "manifest.jsonl"
    files = [tmp_path / "captions_train2017.json.gz", tmp_path / "captions_val2017.json"]
    import_karpathy(files, manifest, images=tmp_path / "coco")
    samples = lines_of(manifest)
    assert {id: (line.split, line.text, line.image) for id, line in samples.items()} == {
        "captions_train2017/annotation 1": ("train", "Food.", "coco/train2017/000000000009.jpg"),
        "captions_val2017/annotation 37": ("valid", "A woman stands.", "coco/val2017/000000000139.jpg"),
        "captions_val2017/annotation 38": ("valid", "A living room.", "coco/val2017/000000000139.jpg"),
    }
    assert samples["captions_val2017/annotation 37"].group == samples["captions_val2017/annotation 38"].group
    prefix = "captions_val2017/"
    assert left_out(manifest) == {
        f"{prefix}annotation 39": "image file is missing: 000000000285.jpg",
        f"{prefix}annotation 40": "image 1 is not listed in the file",
        f"{prefix}annotation 41": "image 7 is listed twice in the file",
        f"{prefix}entry 5": f"not as published: {prefix}entry 5: no 'id'",
        f"{prefix}entry 6": f"not as published: {prefix}entry 6: caption is not a text",
    }
    assert unused_of(manifest)["images"] == ["8.jpg", "11.jpg"]
    boxes = coco(images, [{"image_id": 139, "id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}])
    for content, message in ((boxes, "its annotations have no caption"), ('{"annotations": []}', 'no list "images"')):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=message):
            import_karpathy(tmp_path / "x.json", manifest, images=tmp_path / "coco")


def test_spoken_coco_has_several_audio_files_per_image(tmp_path: Path) -> None:
    first, second = "val2014/COCO_val2014_000000325114.jpg", "train2014/COCO_train2014_000000000009.jpg"
    touch(tmp_path / "coco" / first, tmp_path / "coco" / "COCO_train2014_000000000009.jpg")
    wavs = tmp_path / "SpokenCOCO" / "wavs" / "val" / "0"
    touch(*(wavs / f"{name}.wav" for name in ("m1-a_325114_1", "m2-b_325114_2", "m3-c_9_3")))

    def caption(name: str, text: Any) -> dict[str, Any]:
        return {"text": text, "speaker": name[:2], "uttid": name, "wav": f"wavs/val/0/{name}.wav"}

    entries = [
        {"image": first, "captions": [caption("m1-a_325114_1", "A urinal."), caption("m2-b_325114_2", "A toilet on a wall."),
                                      caption("m4-d_325114_4", "gone"), {"text": "no wav"}, caption("m1-a_325114_1", 5)]},
        {"image": "val2014/gone.jpg", "captions": [caption("m3-c_9_3", "gone")]},
        {"captions": []},
        "odd",
    ]  # fmt: skip
    (tmp_path / "SpokenCOCO_val.json").write_text(json.dumps({"data": entries}))
    unrolled = [{"image": second, "caption": caption("m3-c_9_3", "Food.")}]
    (tmp_path / "SpokenCOCO_train_unrolled_karpathy.json").write_text(json.dumps({"data": unrolled}))
    manifest = tmp_path / "manifest.jsonl"
    files = [str(tmp_path / "SpokenCOCO_val.json"), str(tmp_path / "SpokenCOCO_train_unrolled_karpathy.json")]
    folders = {"images": tmp_path / "coco", "audio": tmp_path / "SpokenCOCO"}
    import_spoken_captions(files, manifest, **folders)
    samples = lines_of(manifest)
    assert {id: (line.split, line.text) for id, line in samples.items()} == {
        "m1-a_325114_1": ("valid", "A urinal."),
        "m2-b_325114_2": ("valid", "A toilet on a wall."),
        "m3-c_9_3": ("train", "Food."),
    }
    one, two = samples["m1-a_325114_1"], samples["m2-b_325114_2"]
    assert one.image == two.image == f"coco/{first}" and one.group == two.group and one.audio != two.audio
    assert one.audio == "SpokenCOCO/wavs/val/0/m1-a_325114_1.wav"
    reasons = left_out(manifest)
    assert reasons["m4-d_325114_4"] == "audio file is missing: wavs/val/0/m4-d_325114_4.wav"
    assert reasons["m3-c_9_3"] == "image file is missing: val2014/gone.jpg"
    assert reasons["SpokenCOCO_val.json entry 0 caption 3"] == (
        "not as published: SpokenCOCO_val.json entry 0 caption 3: no 'wav'"
    )
    assert sorted(reasons)[0].startswith("SpokenCOCO_val.json") and len(reasons) == 6
    import_spoken_captions([f"test={files[1]}"], manifest, **folders)
    assert [line.split for line in lines_of(manifest).values()] == ["test"]
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(UserError, match='no list "data"'):
        import_spoken_captions([str(tmp_path / "x.json")], manifest, **folders)


def test_places_audio_captions(tmp_path: Path) -> None:
    image, wav = "s/ski_resort/gsun_0a1.jpg", "wavs/400/utterance_333.wav"
    touch(tmp_path / "places" / image, tmp_path / "audio" / wav)
    entry = {"uttid": "A1-GSUN_0A1", "speaker": "A1", "asr_text": "people on skis", "wav": wav, "image": image}
    content = {"image_base_path": "/data/images/", "audio_base_path": "/data/audio/",
               "data": [entry, {**entry, "uttid": "A2-GSUN_0A1", "image": "s/gone.jpg"}]}  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(content))
    manifest = tmp_path / "manifest.jsonl"
    folders = {"images": tmp_path / "places", "audio": tmp_path / "audio"}
    import_spoken_captions([str(tmp_path / "val.json")], manifest, **folders)
    (line,) = lines_of(manifest).values()
    assert (line.id, line.text, line.split) == ("A1-GSUN_0A1", "people on skis", "valid")
    assert (line.image, line.audio) == (f"places/{image}", f"audio/{wav}")
    import_spoken_captions([str(tmp_path / "val.json")], manifest, keep_incomplete=True, **folders)
    assert lines_of(manifest)["A2-GSUN_0A1"].image is None


def test_flickr8k_audio_with_its_texts_and_splits(tmp_path: Path) -> None:
    name, other = "2571096893_694ce79768", "1000268201_693b08cb0e"
    touch(*(tmp_path / "flickr_audio" / "wavs" / f"{name}_{number}.wav" for number in range(3)))
    touch(*(tmp_path / "Flicker8k_Dataset" / f"{each}.jpg" for each in (name, other)))
    lines = [f"{name}_{number}.wav {name}.jpg #{number}" for number in range(4)]
    lines += [f"{other}_0.wav {other}.jpg #0", "odd line", f"{name}_0.wav {name}.jpg #9"]
    pairs = tmp_path / "flickr_audio" / "wav2capt.txt"
    pairs.write_text("\n".join(lines) + "\n")
    tokens = tmp_path / "Flickr8k.token.txt"
    captions = [f"{name}.jpg#{number}\tCaption {number} ." for number in range(5)] + [f"{other}.jpg#0\tA child ."]
    tokens.write_text("\n".join(captions))
    manifest = tmp_path / "manifest.jsonl"
    folders = {"images": tmp_path / "Flicker8k_Dataset", "audio": tmp_path / "flickr_audio" / "wavs"}
    import_flickr8k_audio(pairs, manifest, captions=tokens, **folders)
    samples = lines_of(manifest)
    assert {id: (line.text, line.image) for id, line in samples.items()} == {
        f"{name}_{number}.wav": (f"Caption {number} .", f"Flicker8k_Dataset/{name}.jpg") for number in range(3)
    }
    assert len({line.group for line in samples.values()}) == 1
    assert left_out(manifest) == {
        f"{name}_3.wav": f"audio file is missing: {name}_3.wav",
        f"{other}_0.wav": f"audio file is missing: {other}_0.wav",
        "wav2capt.txt line 6": "not an audio file, an image and #number: wav2capt.txt line 6",
        f"{name}_0.wav": f"its caption is not in Flickr8k.token.txt: {name}.jpg#9",
    }
    assert unused_of(manifest)["captions"] == [f"{name}.jpg#4"]

    (tmp_path / "train.txt").write_text(f"{name}.jpg\n")
    import_flickr8k_audio(pairs, manifest, captions=tokens, splits=[f"train={tmp_path}/train.txt"], **folders)
    assert {line.split for line in lines_of(manifest).values()} == {"train"}
    assert left_out(manifest)[f"{other}_0.wav"] == f"its image is in no split: {other}.jpg"
    images = [{"filename": f"{name}.jpg", "split": "val", "sentences": [{"raw": f"Raw {number}."} for number in range(3)]}]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    import_flickr8k_audio(pairs, manifest, captions=tmp_path / "dataset_flickr8k.json", **folders)
    assert [(line.split, line.text) for line in lines_of(manifest).values()] == [("valid", f"Raw {n}.") for n in range(3)]
    import_flickr8k_audio(pairs, manifest, keep_incomplete=True, **folders)
    assert lines_of(manifest)[f"{other}_0.wav"].audio is None

    for options, message in (
        ({"splits": [str(tmp_path / "train.txt")]}, "write SPLIT=FILE"),
        ({"splits": [f"train={tmp_path}/train.txt", f"test={tmp_path}/train.txt"]}, "is in split train too"),
        ({"captions": pairs}, "line 1: not name#number, tab and caption"),
        ({"captions": tmp_path / "bad.json"}, "not Karpathy's dataset_flickr8k.json"),
    ):
        (tmp_path / "bad.json").write_text('{"images": [{"filename": "x"}]}')
        with pytest.raises(UserError, match=message):
            import_flickr8k_audio(pairs, manifest, **folders, **options)
