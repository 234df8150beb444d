"""Near-duplicates: copies are found, different images are not joined, `inspect` counts them, `split` keeps them together."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.near_duplicates import near_duplicate_notes, same_images
from opt_ds.store.same_content import block_colours, difference_hashes, near_matches, plain_caption, same_colours
from opt_ds.store.split import split_by_list, split_by_ratio
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.update import Arrays, rewrite_shards

Change = Callable[[Image.Image], Image.Image]


def scene(rng: np.random.Generator) -> Image.Image:
    """Draw eight coloured ellipses and rectangles, 200 x 200."""
    colour = lambda: tuple(rng.integers(20, 225, 3).tolist())  # noqa: E731
    image = Image.new("RGB", (200, 200), colour())
    draw = ImageDraw.Draw(image)
    for number in range(8):
        corners = np.sort(rng.integers(0, 200, (2, 2)), axis=0)
        (draw.ellipse if number % 2 else draw.rectangle)(corners.reshape(-1).tolist(), fill=colour())
    return image


def pixels_of(images: list[Image.Image]) -> np.ndarray:
    small = [np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1) for image in images]
    return np.stack(small)


def reencoded(kind: str, quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, kind, quality=quality)
        return Image.open(file).convert("RGB")

    return change


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [scene(rng) for _ in range(200)]


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        (reencoded("JPEG", 50), 0.99),
        (reencoded("WEBP", 50), 0.99),
        (lambda image: image.resize((90, 90), Image.Resampling.BICUBIC), 0.99),
        (lambda image: image.resize((260, 260), Image.Resampling.BICUBIC), 0.99),
        (lambda image: ImageEnhance.Brightness(image).enhance(0.85), 0.99),
        (lambda image: ImageEnhance.Brightness(image).enhance(1.1), 0.95),
        (lambda image: ImageEnhance.Contrast(image).enhance(0.9), 0.99),
    ],
)
def test_changed_copies_are_found_among_all(scenes: list[Image.Image], change: Change, at_least: float) -> None:
    pixels = pixels_of([*scenes, *map(change, scenes)])
    names = near_matches(difference_hashes(pixels), block_colours(pixels))
    assert (names[:200] == names[200:]).mean() >= at_least
    assert len(np.unique(names[:200])) == 200  # and no original is joined to another one


def test_different_images_are_not_joined(scenes: list[Image.Image]) -> None:
    colours = block_colours(pixels_of(scenes))
    one, other = np.triu_indices(len(colours), 1)
    assert same_colours(colours[one], colours[other]).sum() == 0  # of 19,900 pairs
    face = Image.new("RGB", (200, 200), "white")
    for skin, clothes in (("#fadcbc", "red"), ("#a57939", "red"), ("#fadcbc", "blue")):  # one drawing, one colour differs
        ImageDraw.Draw(face).ellipse((60, 20, 140, 100), fill=skin, outline="black", width=4)
        ImageDraw.Draw(face).rectangle((50, 105, 150, 200), fill=clothes, outline="black", width=4)
        scenes = [*scenes, face.copy()]
    pixels = pixels_of(scenes)
    names = near_matches(difference_hashes(pixels), block_colours(pixels))
    assert len(np.unique(names)) == len(scenes)


def test_many_images_are_compared_in_little_time() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20_000, "uint64")
    colours = rng.integers(0, 256, (20_000, 192), "uint8")
    copies = rng.permutation(20_000)[:1000]
    bits = np.uint64(1) << rng.integers(0, 64, (2, 1000)).astype("uint64")
    names = near_matches(np.concatenate([hashes, hashes[copies] ^ bits[0] ^ bits[1]]), np.concatenate([colours, colours[copies]]))
    assert (names[20_000:] == copies).mean() > 0.99
    assert len(np.unique(names)) <= 20_010


@pytest.mark.parametrize("caption", ["A red, RED car!", "a red red  car", "ａ red “red” car"])
def test_captions_are_compared_without_case_spaces_and_punctuation(caption: str) -> None:
    assert plain_caption(caption) == "a red red car"
    assert plain_caption("?!") != plain_caption("!!")
    assert plain_caption("naïve 2") != plain_caption("naive 2")


@pytest.fixture
def store(tmp_path: Path, scenes: list[Image.Image]) -> Path:
    """160 train and 40 valid samples: valid's first four images are train's first four, two of them re-encoded; six are blank."""
    write_synthetic_store(
        tmp_path / "s", 200, samples_per_shard=70, image_feature_dim=3, audio_feature_dim=2, num_codes_vocab=2**16
    )
    pixels = pixels_of([*scenes[:160], *scenes[:2], *map(reencoded("JPEG", 60), scenes[2:4]), *scenes[164:]])
    pixels[[10, 11, 12, 190, 191, 192]] = 255
    change_arrays(tmp_path / "s", {"image/pixels": pixels})
    return tmp_path / "s"


def change_arrays(path: Path, new: dict[str, np.ndarray]) -> None:
    store = FeatureStore(path)
    ends = np.cumsum([shard.num_images for shard in store.description.shards]).tolist()

    def change(index: int, arrays: Arrays) -> Arrays:
        start = ends[index] - store.description.shards[index].num_images
        return {**arrays, **{name: values[start : ends[index]] for name, values in new.items()}}

    rewrite_shards(store, change, dict)


def split_of(path: Path, sample: int) -> str:
    store = FeatureStore(path)
    return store.description.split_names[store.split_codes[sample]]


def test_inspect_counts_them_between_and_within_splits(store: Path) -> None:
    inspection = inspect_store(store)
    assert inspection.failures == []
    assert [note for note in inspection.notes if "captions" not in note] == [
        "near-duplicates between train and valid (identical pixels at 64 x 64): 2 of 160 images in train and 2 of 40 images in "
        'valid, such as "sample0" and "sample160", "sample1" and "sample161"',
        "near-duplicates between train and valid (nearly or fully identical pixels): 4 of 160 images in train and 4 of 40 images "
        'in valid, such as "sample0" and "sample160", "sample1" and "sample161", "sample2" and "sample162"',
        "6 images are blank (nearly one colour) and are not compared for near-duplicates",
    ]
    codes = np.arange(200 * 64, dtype="uint16").reshape(200, 64)
    codes[7], codes[20], codes[21] = codes[6], 5, 5  # the last two: one code throughout, as of a blank image
    change_arrays(store, {"image/codes": codes})
    within = 'near-duplicates within train (identical image codes): 2 of 160 images, such as "sample6" and "sample7"'
    assert within in near_duplicate_notes(FeatureStore(store))


def test_captions_and_audio_files_are_counted(tmp_path: Path) -> None:
    fixed = {"text_len": (12, 12), "frames": (5, 5), "regions": (2, 2)}
    write_synthetic_store(tmp_path / "s", 20, pixels=False, num_codes_vocab=None, **fixed)
    one, half = FeatureStore(tmp_path / "s"), 16

    def change(index: int, arrays: Arrays) -> Arrays:
        for name, offsets in (("text/utf8", "text/utf8_offsets"), ("audio/features", "audio/offsets")):
            parts = np.split(arrays[name], arrays[offsets][1:-1])
            parts[half] = np.frombuffer(parts[0].tobytes().upper() + b".", "uint8") if name == "text/utf8" else parts[0]
            lengths = [len(part) for part in parts]
            arrays = {**arrays, name: np.concatenate(parts), offsets: np.concatenate([[0], np.cumsum(lengths)]).astype("int64")}
        features = arrays["image/features"].copy()
        features[2 * half : 2 * half + 2] = features[:2]
        return {**arrays, "image/features": features}

    rewrite_shards(one, change, dict)
    notes = near_duplicate_notes(FeatureStore(tmp_path / "s"))
    assert [note.split("(")[1].split(")")[0] for note in notes] == [
        "identical region features",
        "equal except for case, spaces and punctuation",
        "identical frames",
    ]
    assert all("1 of 4" in note and '"sample0" and "sample16"' in note for note in notes)


@pytest.mark.parametrize("seed", range(3))
def test_split_by_ratio_keeps_them_together_and_not_the_blank_ones(store: Path, seed: int, logged: list[str]) -> None:
    split_by_ratio(store, {"train": 0.5, "valid": 0.5}, seed)
    assert logged == [f"{store}: 8 samples of 8 groups are kept together in 4 by near-duplicate images"]
    assert [split_of(store, sample) for sample in range(4)] == [split_of(store, sample) for sample in range(160, 164)]
    assert len({split_of(store, sample) for sample in (10, 11, 12, 190, 191, 192)}) == 2
    logged.clear()
    split_by_ratio(store, {"train": 0.5, "valid": 0.5}, seed, near_duplicates_together=False)
    assert logged == []
    assert [split_of(store, sample) for sample in range(4)] != [split_of(store, sample) for sample in range(160, 164)]


def test_what_a_list_or_another_split_fixes_is_counted_and_not_moved(store: Path, tmp_path: Path, logged: list[str]) -> None:
    split_by_ratio(store, {"train": 0.5, "test": 0.5}, source="train")
    assert logged == [f"{store}: 8 images have a near-duplicate in another split; opt-ds inspect names some"]
    (tmp_path / "ids.csv").write_text("".join(f"sample{index},valid\n" for index in (0, 1, 2)))
    logged.clear()
    split_by_list(store, tmp_path / "ids.csv")
    assert logged == [f"{store}: 2 images have a near-duplicate in another split; opt-ds inspect names some"]
    assert [split_of(store, sample) for sample in (0, 1, 2)] == ["valid"] * 3


def test_one_image_everywhere_is_refused_and_the_store_stays(store: Path, scenes: list[Image.Image]) -> None:
    pixels = pixels_of(scenes)
    pixels[20:180] = pixels[20]
    change_arrays(store, {"image/pixels": pixels})
    before = json.loads((store / "store.json").read_text())
    with pytest.raises(UserError, match=r'connect 160 of 200 samples, such as "sample20": .* --ignore-near-duplicates'):
        split_by_ratio(store, {"train": 0.7, "valid": 0.3})
    assert json.loads((store / "store.json").read_text()) == before
    split_by_ratio(store, {"train": 0.7, "valid": 0.3}, near_duplicates_together=False)
    assert same_images(FeatureStore(store)).num_blank == 0
