"""The recipes of docs/data.md, run as they are written there, on small file sets of the published names."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import Image
from pyarrow import ipc, parquet

from opt_ds.ingest.manifest import read_manifest
from tests.ingest.importers.tars import write_tar

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def recipes(*commands: str) -> dict[str, list[list[str]]]:
    """Return command -> arguments of each of its recipes."""
    code = re.sub(r"\\\n\s+", "", PAGE.read_text(encoding="utf-8"))
    lines = [shlex.split(line) for line in re.findall(r"^    opt-ds (import .+)$", code, re.MULTILINE)]
    return {command: [line for line in lines if line[1] == command] for command in commands}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(0).standard_normal(400), 16000, format="FLAC")
    return buffer.getvalue()


def write(name: str, content: Any) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def write_shards(count: int, folder: str) -> None:
    for shard in range(count):
        key = f"{shard:05d}0001"
        write_tar(Path(folder, f"{shard:05d}.tar"), [(f"{key}.jpg", png()), (f"{key}.txt", b"a cat"), (f"{key}.json", b"{}")])


def write_hugging_face() -> None:
    cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.Table.from_pylist(
        [{"image": {"bytes": png(), "path": "a.png"}, "caption": "A cat."}],
        pyarrow.schema({"image": cell, "caption": pyarrow.string()}),
    )
    write("my-saved-dataset/state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None})
    with ipc.new_stream("my-saved-dataset/data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    Path("hub/data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        parquet.write_table(table, f"hub/data/{name}.parquet")


def write_captions() -> None:
    for year, number in (("train2017", 9), ("val2017", 139)):
        image, caption = {"id": number, "file_name": f"{number:012d}.jpg"}, {"id": 1, "image_id": number, "caption": "A cat."}
        write(f"captions_{year}.json", {"images": [image], "annotations": [caption]})
        write(f"coco/{year}/{number:012d}.jpg", png())
    images = {"train": "train2014/COCO_train2014_000000000009.jpg", "val": "val2014/COCO_val2014_000000000139.jpg"}
    for split, image in images.items():
        write(f"coco/{image}", png())
        caption = {"text": "A cat.", "speaker": "m1", "uttid": f"m1-{split}", "wav": f"wavs/{split}/0/m1-{split}.wav"}
        write(f"SpokenCOCO/wavs/{split}/0/m1-{split}.wav", flac())
        write(f"SpokenCOCO_{split}.json", {"data": [{"image": image, "captions": [caption]}]})
        write(f"coco_karpathy_{split}.json", [{"image": image, "caption": "A cat.", "image_id": "coco_9"}])
        write(f"placesaudio/wavs/1/{split}.wav", flac())
        write(f"places205/a/abbey/{split}.jpg", png())
        entry = {"uttid": f"A-{split}", "speaker": "A", "asr_text": "an abbey", "wav": f"wavs/1/{split}.wav",
                 "image": f"a/abbey/{split}.jpg"}  # fmt: skip
        write(f"{split}.json", {"image_base_path": "/x", "audio_base_path": "/y", "data": [entry]})
    write("Flicker8k_Dataset/1.jpg", png())
    write("flickr_audio/wavs/1_0.wav", flac())
    write("flickr_audio/wav2capt.txt", "1_0.wav 1.jpg #0\n")
    write("dataset_flickr8k.json", {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A cat."}]}]})


def write_lists() -> None:
    write("birds/train/1.png", png())
    write("birds/train/metadata.jsonl", {"file_name": "1.png", "caption": "A bird."})
    for name in ("train", "dev"):
        write(f"en/{name}.tsv", f"client_id\tpath\tsentence\nx\tcommon_voice_en_{name}.mp3\tHello.\n")
        write(f"en/clips/common_voice_en_{name}.mp3", flac())
        write(f"data/{name}/wav.scp", f"utt-{name} wavs/{name}.flac\n")
        write(f"data/{name}/text", f"utt-{name} hello\n")
        write(f"corpus/wavs/{name}.flac", flac())


def test_every_recipe_is_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opt_ds.cli import _build
    from opt_ds.cli.program import run_command

    monkeypatch.chdir(tmp_path)
    write_shards(332, "cc3m/train")
    write_shards(2, "cc3m/valid")
    write_hugging_face()
    write_captions()
    write_lists()
    commands = "webdataset hugging-face metadata spoken-captions flickr8k-audio blip common-voice kaldi"
    found = recipes(*commands.split())
    found["coco"] = [line for line in recipes("coco")["coco"] if "captions_train2017.json" in line]
    samples: list[tuple[str, int]] = []
    for command, lines in found.items():
        assert lines, command
        for line in lines:
            assert run_command(_build(), line, "opt-ds") == 0, line
            read = read_manifest(Path(line[line.index("--output") + 1]), allow_outside=True)
            assert not read.rejected
            samples.append((command, len(read.lines)))
    assert samples == [
        ("webdataset", 334), ("hugging-face", 1), ("hugging-face", 3), ("metadata", 1), ("spoken-captions", 2),
        ("spoken-captions", 2), ("flickr8k-audio", 1), ("blip", 2), ("common-voice", 2), ("kaldi", 2), ("coco", 2),
    ]  # fmt: skip
