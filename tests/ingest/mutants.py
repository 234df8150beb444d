"""The campaign of damaged files: seeded mutants of every accepted format, known killers and undamaged files, prepared at once.

    python tests/ingest/mutants.py --count 2000 [--seed 1] [--workers 2] [--folder /var/tmp/mutants]

`prepare` must end; every undamaged sample must be in the store; every other is in the store or named in the report.
"""

import argparse
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store import FeatureStore, inspect_store
from tests.decoding import hostile_files
from tests.decoding.wild_files import HEIC, SVG, noise

_IMAGES = {
    "jpg": ("JPEG", {}), "progressive.jpg": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}), "gif": ("GIF", {}), "bmp": ("BMP", {}), "tiff": ("TIFF", {}),
    "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}), "ppm": ("PPM", {}), "avif": ("AVIF", {}), "jp2": ("JPEG2000", {}),
}  # fmt: skip
_RECORDINGS = {
    "wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "gsm.wav": ("WAV", "GSM610"), "adpcm.wav": ("WAV", "MS_ADPCM"),
    "ima.wav": ("WAV", "IMA_ADPCM"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "ULAW"), "w64": ("W64", "PCM_16"),
    "caf": ("CAF", "ALAC_16"), "rf64": ("RF64", "PCM_16"),
}  # fmt: skip
KILLERS: dict[str, Callable[[Path], object]] = {
    "crash.heic": hostile_files.crashing_heic,
    "deep.svg": lambda path: hostile_files.nested_svg(path, 100_000),
    "bitmap.svg": lambda path: hostile_files.bitmap_svg(path, 11_000),
    "padded.png": hostile_files.padded_png,
}
SLOW_KILLERS = {"endless.svg": hostile_files.endless_svg, "large-bitmap.svg": hostile_files.bitmap_svg}


def originals() -> dict[str, bytes]:
    """Return a small valid file of every accepted format, by ending."""
    drawing = SVG.format('<circle r="4" fill="red"/><g><rect width="3" height="1"/></g>')
    files = {"heic": HEIC.read_bytes(), "svg": drawing.encode()}
    for ending, (name, options) in _IMAGES.items():
        file = io.BytesIO()
        noise(24, 20).resize((72, 60)).save(file, name, **options)
        files[ending] = file.getvalue()
    sound = 0.2 * np.sin(np.arange(4800) / 7)
    for ending, (name, codec) in _RECORDINGS.items():
        file = io.BytesIO()
        soundfile.write(file, sound, 8000, format=name, subtype=codec)
        files[ending] = file.getvalue()
    return files


def is_audio(name: str) -> bool:
    return name.split("-", 1)[-1] in _RECORDINGS


def mutate(content: bytes, other: bytes, dice: random.Random) -> tuple[bytes, int]:
    """Return a damaged copy, and how many zeros to append behind it."""
    data, zeros = bytearray(content), 0
    for _ in range(dice.choice((1, 1, 2, 4))):
        place = dice.randrange(len(data))
        match dice.randrange(8):
            case 0:  # a bit
                data[place] ^= 1 << dice.randrange(8)
            case 1:  # a byte of the header
                data[dice.randrange(min(64, len(data)))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            case 2:  # truncated
                del data[max(1, place) :]
            case 3:  # something inserted
                data[place:place] = dice.randbytes(dice.randrange(1, 40))
            case 4:  # a part of another file
                start = dice.randrange(len(other))
                data[place : place + 50] = other[start : start + 50]
            case 5:  # a number of four bytes
                data[place : place + 4] = dice.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\x01"))
            case 6:  # a part twice
                data[place:place] = data[place : place + dice.randrange(1, 200)]
            case 7:  # zeros at the end, without taking place on the disk
                zeros = dice.choice((100, 10**6, 3 * 10**10))
    return bytes(data), zeros


def write_campaign(folder: Path, count: int, seed: int, killers: dict[str, Callable[[Path], object]]) -> set[str]:
    """Write `count` mutants, the killers, and undamaged files between them; return the ids of the undamaged ones."""
    folder.mkdir(parents=True)
    dice, files = random.Random(seed), originals()
    names: list[str] = []
    for number in range(count):
        ending, content = list(files.items())[number % len(files)]
        damaged, zeros = mutate(content, files[dice.choice(list(files))], dice)
        path = folder / f"m{number:05d}-{ending}"
        path.write_bytes(damaged)
        with open(path, "r+b") as file:
            file.truncate(len(damaged) + zeros)
        names.append(path.name)
    for name, write in killers.items():
        write(folder / f"k-{name}")
        names.append(f"k-{name}")
    good = [f"g{number:04d}-{ending}" for number in range(max(1, count // 200)) for ending in files]
    for name in good:
        (folder / name).write_bytes(files[name.split("-", 1)[1]])
    names += good
    dice.shuffle(names)
    kinds = {name: "audio" if is_audio(name) else "image" for name in names}
    lines = [{"id": name, kind: name, "text": "some words", "split": "train"} for name, kind in kinds.items()]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return set(good)


def check(folder: Path, output: Path, good: set[str], workers: int) -> Counter[str]:
    """Prepare the folder and check what became of it; return the reasons' counts."""
    settings = PrepareSettings(vocab_size=40, samples_per_shard=256)
    prepare(folder / "manifest.jsonl", output, settings, workers=workers, device="cpu")
    everything = {json.loads(line)["id"] for line in (folder / "manifest.jsonl").read_text().splitlines()}
    reasons = {entry["id"]: entry["reason"] for entry in json.loads((output / REPORT_FILE).read_text())["skipped_samples"]}
    store = FeatureStore(output)
    kept = {store.sample_id(index) for index in range(store.num_samples)}
    assert good <= kept, f"undamaged, but not in the store: {sorted((name, reasons.get(name)) for name in good - kept)[:5]}"
    assert kept | reasons.keys() == everything and not kept & reasons.keys(), "each sample is in the store or in the report"
    assert not [reason for reason in reasons.values() if "\n" in reason or str(folder) in reason or "/tmp" in reason]
    assert inspect_store(output).failures == []
    counts = Counter(reason.split(":", 2)[-1].strip() for reason in reasons.values())
    counts["kept"] = len(kept)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = options.folder or Path(temporary)
        good = write_campaign(folder / "files", options.count, options.seed, {**KILLERS, **SLOW_KILLERS})
        counts = check(folder / "files", folder / "store", good, options.workers)
    for reason, count in counts.most_common(40):
        print(f"{count:6d}  {reason}")


if __name__ == "__main__":
    main()
