"""Test the pairing of captions and images: verified if possible, and never shifted by a header or a blank line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions
from opt_ds.ingest.importers.karpathy import import_karpathy
from opt_ds.ingest.importers.localized_narratives import import_localized_narratives
from opt_ds.ingest.importers.visual_genome import import_visual_genome
from opt_ds.ingest.importers.vqa import import_vqa
from opt_ds.ingest.manifest import read_manifest

COUNT = 5


def images(folder: Path, *, sidecars: bool = False, count: int = COUNT) -> Path:
    """Pictures that hold their row's number, as img2dataset names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        (folder / f"{row:09d}.jpg").write_text(f"image {row}")
        if sidecars:
            content = {"url": f"http://a.b/{row}", "caption": f"caption {row}", "key": f"{row:09d}"}
            (folder / f"{row:09d}.json").write_text(json.dumps(content))
    return folder


def rows(count: int = COUNT) -> list[str]:
    return [f"caption {row}\thttp://a.b/{row}" for row in range(count)]


def run(tmp_path: Path, lines: list[str], **options: Any) -> dict[str, str]:
    """Import the lines, assert that images and captions fit, and return image number -> caption."""
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    manifest = tmp_path / "m.jsonl"
    import_conceptual_captions([str(tmp_path / "t.tsv")], manifest, images=[tmp_path / "p"], **options)
    found = {(tmp_path / str(line.image)).read_text(): str(line.text) for line in read_manifest(manifest).lines}
    assert all(image.split()[1] == caption.split()[1] for image, caption in found.items()), found
    return found


def report(tmp_path: Path) -> dict[str, Any]:
    return json.loads(report_path(tmp_path / "m.jsonl").read_text())


@pytest.mark.parametrize("header", ["caption\turl", "Caption\tURL", "url\tcaption", "text\timage_url", "TEXT\tlink"])
def test_a_header_shifts_nothing(tmp_path: Path, header: str) -> None:
    images(tmp_path / "p")
    url_first = header.startswith("url")
    body = ["\t".join(reversed(row.split("\t"))) if url_first else row for row in rows()]
    assert len(run(tmp_path, [header, *body])) == COUNT
    assert "paired by their numbers alone: 0 is line 2, after the header" in report(tmp_path)["notes"][0]


def test_blank_lines_are_not_counted_as_img2dataset_does_not(tmp_path: Path) -> None:
    """pyarrow, which img2dataset reads with, is the reference for the numbers."""
    from pyarrow import csv

    images(tmp_path / "p")
    first, *others = rows()
    lines = ["caption\turl", first, "", "", *others, ""]
    assert len(run(tmp_path, lines)) == COUNT
    table = csv.read_csv(tmp_path / "t.tsv", parse_options=csv.ParseOptions(delimiter="\t"))
    assert table.column("caption").to_pylist() == [f"caption {row}" for row in range(COUNT)]


def test_a_first_line_that_may_be_a_header_is_refused(tmp_path: Path) -> None:
    images(tmp_path / "p")
    with pytest.raises(UserError, match=r"t.tsv line 1: no URL, so it is unclear whether it is a header"):
        run(tmp_path, ["Bildtext\tAdresse", *rows()])
    with pytest.raises(UserError, match=r"t.tsv line 1: no URL"):
        run(tmp_path, ["caption 0 http://a.b/0".replace("http:", "htp:"), *rows()[1:]])


def test_urls_in_the_other_column_are_refused_with_the_option(tmp_path: Path) -> None:
    images(tmp_path / "p")
    swapped = ["\t".join(reversed(row.split("\t"))) for row in rows()]
    with pytest.raises(UserError, match=r"the URLs are in column 1, not in column 2: add --url-first"):
        run(tmp_path, swapped)
    assert len(run(tmp_path, swapped, url_first=True)) == COUNT
    with pytest.raises(UserError, match="leave out --url-first"):
        run(tmp_path, rows(), url_first=True)
    with pytest.raises(UserError, match="column 2 holds no URL"):
        run(tmp_path, ["caption\turl", "a\tb"])
    mixed = [*rows()[:2], swapped[2], *rows()[3:]]
    assert len(run(tmp_path, mixed)) == COUNT - 1
    assert report(tmp_path)["skipped_samples"][0]["reason"].endswith("line 3: no URL in column 2")


def test_a_row_of_other_cells_is_named_and_shifts_nothing(tmp_path: Path) -> None:
    images(tmp_path / "p")
    lines = rows()
    lines[1] = "caption 1\tmore\thttp://a.b/1"
    lines[3] = "caption 3"
    assert set(run(tmp_path, lines)) == {"image 0", "image 2", "image 4"}
    reasons = [entry["reason"] for entry in report(tmp_path)["skipped_samples"]]
    assert reasons == [f"not caption and URL: t.tsv line {n}" + f": {m} cells, not 2" for n, m in ((2, 3), (4, 1))]


def test_files_beside_the_images_prove_the_pairing(tmp_path: Path) -> None:
    images(tmp_path / "p", sidecars=True)
    assert len(run(tmp_path, rows())) == COUNT
    assert report(tmp_path)["notes"] == [], "nothing had to be assumed"
    lost = rows()[1:]  # the image numbered 0 is the lost row's: all others are shifted
    with pytest.raises(UserError, match=r"4 of 4 images belong to other rows.* shifted by -1.*--first-index 1"):
        run(tmp_path, lost)
    assert len(run(tmp_path, lost, first_index=1)) == COUNT - 1
    swapped = [*rows()[:3], rows()[4], rows()[3]]
    assert len(run(tmp_path, swapped)) == COUNT - 2
    assert report(tmp_path)["reasons"] == {"the image belongs to another row": 2}


def test_captions_beside_the_images_prove_it_too(tmp_path: Path) -> None:
    folder = images(tmp_path / "p")
    for row in range(COUNT):
        (folder / f"{row:09d}.txt").write_text(f"caption {row}")
    assert len(run(tmp_path, rows())) == COUNT
    with pytest.raises(UserError, match="images belong to other rows"):
        run(tmp_path, rows()[1:])


def test_images_numbered_beyond_the_rows_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "p")
    with pytest.raises(UserError, match="1 images beyond them, such as 000000004"):
        run(tmp_path, rows()[1:])
    (tmp_path / "p" / "000000000.jpg").unlink()
    assert len(run(tmp_path, rows()[1:], first_index=1)) == COUNT - 1


def test_a_pattern_that_names_every_image_alike_is_refused(tmp_path: Path) -> None:
    images(tmp_path / "p")
    with pytest.raises(UserError, match="one name for all images"):
        run(tmp_path, rows(), pattern="000000000")


def test_images_of_one_name_are_never_guessed(tmp_path: Path) -> None:
    folder = images(tmp_path / "p")
    images(folder / "small", count=1)
    (folder / "small" / "000000000.jpg").write_text("another image")
    (folder / "copy").mkdir()
    (folder / "copy" / "000000001.jpg").write_text("image 1")
    (folder / "000000002.mp3").write_text("a sound is no image")
    (folder / "._000000003.jpg").write_text("what a Mac leaves")
    assert set(run(tmp_path, rows())) == {f"image {row}" for row in (1, 2, 3, 4)}
    (skipped,) = report(tmp_path)["skipped_samples"]
    assert skipped["reason"].startswith("several image files have its name: 000000000.jpg and small/000000000.jpg")


def test_unused_images_and_columns_are_counted(tmp_path: Path) -> None:
    folder = images(tmp_path / "p")
    (folder / "other.png").write_text("x")
    (folder / "000000001.jpg").rename(folder / "000000001.jxl")
    assert len(run(tmp_path, [f"{row}\t0.9" for row in rows()])) == COUNT - 1
    content = report(tmp_path)
    assert [(each["what"], each["count"]) for each in content["unused"]] == [("columns", 1), ("files", 1)]
    assert content["unused"][1]["names"] == ["other.png"]
    assert content["skipped_samples"][0]["reason"] == (
        "JPEG XL cannot be decoded here: 000000001.jxl: convert it to PNG or JPEG"
    )


def written(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def karpathy(folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    entries = [
        {"filename": f"COCO_val2014_{n:012d}.jpg", "split": "val", "cocoid": n, "imgid": n,
         "sentences": [{"raw": f"caption {n}", "sentid": 10 * n + k, "imgid": n} for k in (0, 1)]}
        for n in (1, 2)
    ]  # fmt: skip
    for n in (1, 2):
        (folder / f"COCO_val2014_{n:012d}.jpg").write_text(str(n))
    change(entries[0])
    path = written(folder, "k.json", {"images": entries})
    import_karpathy([path], folder / "m.jsonl", images=folder)
    return [line.id for line in read_manifest(folder / "m.jsonl").lines]


def test_karpathys_entries_that_contradict_themselves_are_left_out(tmp_path: Path) -> None:
    assert karpathy(tmp_path, lambda entry: None) == ["sentence 10", "sentence 11", "sentence 20", "sentence 21"]
    assert karpathy(tmp_path, lambda entry: entry.update(cocoid=2)) == ["sentence 20", "sentence 21"]
    others = karpathy(tmp_path, lambda entry: entry["sentences"][0].update(imgid=2))
    assert others == ["sentence 11", "sentence 20", "sentence 21"]


def test_one_bad_sentence_leaves_its_siblings(tmp_path: Path) -> None:
    assert karpathy(tmp_path, lambda entry: entry["sentences"][0].pop("raw")) == ["sentence 11", "sentence 20", "sentence 21"]
    assert karpathy(tmp_path, lambda entry: entry["sentences"].insert(0, None))[:2] == ["sentence 10", "sentence 11"]
    (skipped,) = report(tmp_path)["skipped_samples"]
    assert skipped["id"] == "image 0 sentence 0"


def test_one_bad_region_leaves_its_siblings_and_another_images_region_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_text("1")
    regions = [{"region_id": 1, "phrase": "a"}, {"region_id": 2}, {"region_id": 3, "phrase": "b", "image_id": 9},
               {"region_id": 4, "phrase": "c", "image_id": 1}]  # fmt: skip
    path = written(tmp_path, "v.json", [{"id": 1, "regions": regions}])
    import_visual_genome([path], tmp_path / "m.jsonl", images=tmp_path)
    assert [line.id for line in read_manifest(tmp_path / "m.jsonl").lines] == ["region 1", "region 4"]
    assert report(tmp_path)["reasons"] == {"not as published": 1, "it contradicts itself": 1}


def test_one_bad_answer_leaves_the_file(tmp_path: Path) -> None:
    (tmp_path / "000000000007.jpg").write_text("7")
    questions = [{"question_id": n, "image_id": 7, "question": "how many?"} for n in (1, 2, 3)]
    notes = [
        {"question_id": 1, "image_id": 7, "answers": [{"answer": 2}, {"answer": "2"}, {"answer": None}, {}]},
        {"question_id": 2, "image_id": 8, "answers": [{"answer": "2"}]},
        {"question_id": 3, "answers": [{"answer": "two"}]},
        {"answers": []},
    ]
    q = written(tmp_path, "q.json", {"data_subtype": "train2014", "questions": questions})
    a = written(tmp_path, "a.json", {"data_subtype": "train2014", "annotations": notes})
    import_vqa([str(q)], [str(a)], tmp_path / "m.jsonl", images=tmp_path, min_count=1)
    lines = {line.id: line.labels for line in read_manifest(tmp_path / "m.jsonl").lines}
    assert lines == {"question 1": ("2", "2"), "question 3": ("2",)}
    assert set(report(tmp_path)["reasons"]) == {"an answer is no text", "it contradicts its annotation", "not as published"}
    written(tmp_path, "a.json", {"data_subtype": "val2014", "annotations": notes})
    with pytest.raises(UserError, match="questions of train2014, but its annotations are of val2014"):
        import_vqa([str(q)], [str(a)], tmp_path / "m.jsonl", images=tmp_path, min_count=1)


def test_several_annotations_are_all_imported(tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 1)):
        (tmp_path / f"{name}.jpg").write_text("x")
        sentences = [{"raw": name, "sentid": first}]
        written(tmp_path, f"{name}.json", {"images": [{"filename": f"{name}.jpg", "split": "val", "sentences": sentences}]})
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    import_karpathy(paths, tmp_path / "m.jsonl", images=tmp_path)
    assert [line.id for line in read_manifest(tmp_path / "m.jsonl").lines] == ["a/sentence 1", "b/sentence 1"]
    with pytest.raises(UserError, match="the same name: give each once"):
        import_karpathy([paths[0], paths[0]], tmp_path / "m.jsonl", images=tmp_path)


def narrative(**fields: Any) -> dict[str, Any]:
    return {"dataset_id": "mscoco_val2017", "image_id": "139", "annotator_id": 1, "caption": "a room", **fields}


def test_narratives_of_another_image_or_split_are_not_guessed(tmp_path: Path) -> None:
    for name in ("000000000139.jpg", "7.jpg", "000000000007.jpg", "8.jpg"):
        (tmp_path / name).write_text(name)
    lines = [
        narrative(),
        narrative(image_id="7"),
        narrative(image_id="8", dataset_id="mscoco_test2017"),
        narrative(image_id="8", voice_recording="mscoco_val2017/mscoco_val2017_139_1.ogg"),
        narrative(image_id="8", annotator_id=2, voice_recording="mscoco_val2017/mscoco_val2017_8_2.ogg"),
    ]
    path = tmp_path / "n.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    import_localized_narratives([path], tmp_path / "m.jsonl", images=tmp_path)
    found = {line.id: line.split for line in read_manifest(tmp_path / "m.jsonl").lines}
    assert found == {"mscoco_val2017/139/1": "valid", "mscoco_test2017/8/1": "test", "mscoco_val2017/8/2": "valid"}
    reasons = {entry["id"]: entry["reason"] for entry in report(tmp_path)["skipped_samples"]}
    assert reasons["mscoco_val2017/7/1"].startswith("several image files have its name: 7 and 000000000007")
    assert reasons["mscoco_val2017/8/1"].startswith("it contradicts itself: its audio is")
