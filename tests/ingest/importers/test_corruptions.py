"""Seeded corruptions of every format that importers read: each sample that comes out pairs the right caption and image.

The caption and the image of a sample both hold its id, a long one, so that no flipped byte makes one id another. What is
not a right sample is reported, or the import is refused in one line.
"""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions
from opt_ds.ingest.importers.folder import import_folder
from opt_ds.ingest.importers.karpathy import import_karpathy
from opt_ds.ingest.importers.localized_narratives import import_localized_narratives
from opt_ds.ingest.importers.table import import_table
from opt_ds.ingest.importers.visual_genome import import_visual_genome
from opt_ds.ingest.importers.vqa import import_vqa
from opt_ds.ingest.manifest import read_manifest

IDS = [f"{random.Random(number).randrange(10**11, 10**12)}" for number in range(6)]
Import = Callable[[Path, Path], object]  # folder, manifest


def caption(id: str) -> str:
    return f'a "{id}", seen'


def write_images(folder: Path) -> None:
    for number, id in enumerate(IDS):
        for name in (f"{id}.jpg", f"COCO_val2014_{id}.jpg"):
            (folder / name).write_text(id)
        downloaded = folder / "downloaded" / f"{number:09d}.jpg"
        downloaded.parent.mkdir(exist_ok=True)
        downloaded.write_text(id)
        downloaded.with_suffix(".json").write_text(json.dumps({"url": f"http://a.b/{id}", "caption": caption(id)}))


def csv_row(*cells: str) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' if '"' in cell or "," in cell else cell for cell in cells)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


QUESTIONS = {"questions": [{"question_id": int(id), "image_id": int(id), "question": caption(id)} for id in IDS]}
ANNOTATIONS = {"annotations": [{"question_id": int(id), "image_id": int(id), "answers": [{"answer": "x"}]} for id in IDS]}
KARPATHY = {"images": [{"filename": f"COCO_val2014_{id}.jpg", "cocoid": int(id), "split": "val",
                        "sentences": [{"raw": caption(id), "sentid": n}]} for n, id in enumerate(IDS)]}  # fmt: skip
GENOME = [{"id": int(id), "regions": [{"region_id": n, "phrase": caption(id), "image_id": int(id)}]} for n, id in enumerate(IDS)]
NARRATIVES = [{"dataset_id": "d_val", "image_id": id, "annotator_id": 1, "caption": caption(id)} for id in IDS]


def lines(rows: list[str]) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def vqa(folder: Path, manifest: Path, questions: str, annotations: str) -> None:
    import_vqa([str(folder / questions)], [str(folder / annotations)], manifest, images=folder, min_count=1)


FORMATS: dict[str, tuple[str, bytes, Import]] = {
    "conceptual": ("c.tsv", lines(["caption\turl", *(f"{caption(id)}\thttp://a.b/{id}" for id in IDS)]),
        lambda folder, manifest: import_conceptual_captions(
            [str(folder / "c.tsv")], manifest, images=[folder / "downloaded"])),
    "csv": ("t.csv", lines(["image,text", *(csv_row(f"{id}.jpg", caption(id)) for id in IDS)]),
        lambda folder, manifest: import_table(folder / "t.csv", manifest)),
    "csv, text first": ("t.csv", lines(["text,image", *(csv_row(caption(id), f"{id}.jpg") for id in IDS)]),
        lambda folder, manifest: import_table(folder / "t.csv", manifest)),
    "tsv": ("t.tsv", lines(["image\ttext", *(f"{id}.jpg\t{caption(id)}" for id in IDS)]),
        lambda folder, manifest: import_table(folder / "t.tsv", manifest)),
    "csv.gz": ("t.csv.gz", gzip.compress(lines(["image,text", *(csv_row(f"{id}.jpg", caption(id)) for id in IDS)]), mtime=0),
        lambda folder, manifest: import_table(folder / "t.csv.gz", manifest)),
    "karpathy": ("k.json", as_json(KARPATHY),
        lambda folder, manifest: import_karpathy(folder / "k.json", manifest, images=folder)),
    "token": ("f.token", lines([f"{id}.jpg#0\t{caption(id)}" for id in IDS]),
        lambda folder, manifest: import_karpathy(folder / "f.token", manifest, images=folder)),
    "genome": ("v.json", as_json(GENOME),
        lambda folder, manifest: import_visual_genome(folder / "v.json", manifest, images=folder)),
    "narratives": ("n.jsonl", lines([json.dumps(each) for each in NARRATIVES]),
        lambda folder, manifest: import_localized_narratives([folder / "n.jsonl"], manifest, images=folder)),
    "questions": ("q.json", as_json(QUESTIONS), lambda folder, manifest: vqa(folder, manifest, "q.json", "other.json")),
    "answers": ("a.json", as_json(ANNOTATIONS), lambda folder, manifest: vqa(folder, manifest, "other.json", "a.json")),
}  # fmt: skip
BESIDE = {"questions": as_json(ANNOTATIONS), "answers": as_json(QUESTIONS)}


def corrupted(raw: bytes, seed: int) -> bytes:
    """The bytes with one fault, as editors, disks, copies and people make them."""
    chance = random.Random(seed)
    rows = raw.split(b"\n")
    place, row = chance.randrange(len(raw)), chance.randrange(len(rows) - 1)
    other = chance.randrange(len(rows) - 1)
    swapped = list(rows)
    swapped[row], swapped[other] = swapped[other], swapped[row]
    letter = chance.choice([b'"', b",", b"\t", b"\n", b"\r", b"\0", b"\xff", b"{", b"}", b"[", b":", b"\\", b";", b" ", b'""'])
    faults: list[Callable[[], bytes]] = [
        lambda: raw[:place],
        lambda: raw[:place] + letter + raw[place:],
        lambda: raw[:place] + letter + raw[place + 1 :],
        lambda: raw[:place] + raw[place + 1 :],
        lambda: raw[:place] + bytes([raw[place] ^ (1 << chance.randrange(8))]) + raw[place + 1 :],
        lambda: b"\n".join(rows[:row] + rows[row + 1 :]),
        lambda: b"\n".join(rows[: row + 1] + rows[row:]),
        lambda: b"\n".join(swapped),
        lambda: b"\n".join([*rows[:row], b"", *rows[row:]]),
        lambda: b"\n".join([*rows[:row], rows[row] + rows[row + 1], *rows[row + 2 :]]),
        lambda: raw.replace(b"\n", chance.choice([b"\r\n", b"\r", b"\n\n"])),
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw + raw[place:],
        lambda: raw + raw,
        lambda: raw[:place] + bytes(chance.randrange(1, 40)) + raw[place + 20 :],
        lambda: raw.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"\n".join(rows[1:]),
        lambda: b"\n".join([rows[0].upper(), *rows[1:]]),
        lambda: raw.replace(b'"', b"", chance.randrange(1, 4)),
        lambda: raw.replace(chance.choice([b",", b"\t", b":"]), chance.choice([b";", b"\t", b" "])),
    ]
    return faults[seed % len(faults)]()


def check(folder: Path, name: str, seed: int) -> str:
    """Import the format `name` with the fault `seed`; return "refused", "reported" or "whole"."""
    file, raw, run = FORMATS[name]
    (folder / file).write_bytes(corrupted(raw, seed))
    (folder / "other.json").write_bytes(BESIDE.get(name, b""))
    manifest = folder / "m.jsonl"
    manifest.unlink(missing_ok=True)
    try:
        run(folder, manifest)
    except UserError as error:
        assert "\n" not in str(error) and not manifest.exists()
        return "refused"
    taken = set()
    report = json.loads(report_path(manifest).read_text())
    for line in read_manifest(manifest).lines:
        if line.image is None:  # the column's name in the header was hit, or a cell of it is empty
            told = [each["what"] for each in report["unused"]] + report["notes"]
            assert "columns" in told or "rows whose column image is empty: 1" in told, f"{name}, seed {seed}: {told}"
            continue
        image = (folder / line.image).read_text()
        named = [id for id in IDS if id in str(line.text)]
        assert named in ([image], []), f"{name}, seed {seed}: {image} has the caption {line.text!r}"
        taken.add(image)
    if len(taken) == len(IDS):
        return "whole"
    told = report["skipped"] + sum(each["count"] for each in report["unused"])
    assert told, f"{name}, seed {seed}: {len(IDS) - len(taken)} samples vanished in silence"
    return "reported"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corrupt")
    write_images(path)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_an_intact_file_is_whole(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "corrupted", lambda raw, seed: raw)
    assert check(folder, name, 0) == "whole"


@pytest.mark.parametrize("name", FORMATS)
def test_220_corruptions_shift_no_caption(folder: Path, name: str) -> None:
    results = [check(folder, name, seed) for seed in range(20)]
    assert results.count("whole") < len(results), "the faults do something"


@pytest.mark.faults
@pytest.mark.parametrize("name", FORMATS)
def test_many_more_corruptions_shift_no_caption(folder: Path, name: str) -> None:
    for seed in range(20, 200):
        check(folder, name, seed)


def test_damaged_folders_shift_no_caption(tmp_path: Path) -> None:
    """Files of a folder that are renamed, removed, emptied, doubled: each sample keeps its own."""
    for seed in range(20):
        chance = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        for id in IDS:
            (folder / f"{id}.jpg").write_text(id)
            (folder / f"{id}.txt").write_text(caption(id))
        victim = folder / f"{chance.choice(IDS)}.{chance.choice(['jpg', 'txt'])}"
        match seed % 5:
            case 0:
                victim.unlink()
            case 1:
                victim.rename(victim.with_suffix(".bak"))
            case 2:
                shutil.copy(victim, victim.with_suffix(".png" if victim.suffix == ".jpg" else ".TXT"))
            case 3:
                victim.rename(folder / f"copy of {victim.name}")
            case 4:
                victim.write_bytes(b"\xff\xfe")
        import_folder(folder)
        for line in read_manifest(folder / "manifest.jsonl").lines:
            if line.image is not None and line.text is not None:
                image = folder / line.image
                assert image.read_bytes() == b"\xff\xfe" or image.read_text() in line.text
