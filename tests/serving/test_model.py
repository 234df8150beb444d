"""`opt_ds.load`: an exported model from Python does what the commands do, with files, Pillow images and arrays."""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import opt_ds
from opt_ds.data.modalities import TEXT
from opt_ds.model.generation import text_decoding
from opt_ds.serving.export import export
from opt_ds.serving.session import Session
from tests.serving.conftest import without


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported") / "my-model")


@pytest.fixture(scope="module")
def model(exported: Path) -> Iterator[opt_ds.Model]:
    with opt_ds.load(exported, device="cpu") as loaded:
        yield loaded


def test_an_exported_model_its_run_and_its_checkpoint_write_the_same(model: opt_ds.Model, run: Path, raw: Path) -> None:
    written = model.caption(raw / "0.png")
    assert isinstance(written, str)
    assert opt_ds.load(str(run), device="cpu").caption(str(raw / "0.png")) == written
    assert model.config.preset == "opt-tiny" and model.device == torch.device("cpu") and model.dtype == torch.float32
    assert "opt-tiny" in repr(model)


def test_each_method_is_the_sessions(model: opt_ds.Model, session: Session, raw: Path) -> None:
    image, audio = raw / "0.png", raw / "0.wav"
    assert model.transcribe(audio) == session.text(session.processor(audio=audio))
    assert model.transcribe(audio, image=image) == session.text(session.processor(image=image, audio=audio))
    sample = session.processor("a red square", image, audio)
    assert model.describe("a red square", image, audio, beam_size=1) == session.text(sample, text_decoding(1))
    assert model.match("a red square", image, audio) == session.matching(sample)
    pair = session.matching(session.processor("a red square", image))
    assert model.match_probability("a red square", image) == pytest.approx(pair["text_image"])
    vector = model.embed("a red square")
    assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1)
    raw_vector = model.embed("a red square", normalize=False)
    np.testing.assert_allclose(raw_vector, session.cls_vectors([session.processor("a red square")])[0], rtol=1e-5)


def test_images_are_generated_repeatably_and_the_best_candidate_is_taken(model: opt_ds.Model) -> None:
    images = model.generate_images("a red square", count=3, seed=5)
    probabilities = [one.probability for one in images]
    assert [one.image.size for one in images] == [(64, 64)] * 3 and probabilities == sorted(probabilities, reverse=True)
    assert model.generate_image("a red square", candidates=3, seed=5).tobytes() == images[0].image.tobytes()
    one = model.generate_images("a red square", count=1)
    assert one[0].probability is None
    assert model.generate_image("a red square").tobytes() == one[0].image.tobytes()
    assert model.generate_image("a red square", seed=2).tobytes() != one[0].image.tobytes()


def test_candidates_are_ranked_as_each_alone_is_judged(model: opt_ds.Model, session: Session, raw: Path) -> None:
    texts, files = ["a red square", "a green square", "a blue square", "a yellow square"], [raw / f"{n}.png" for n in range(4)]
    ranked = model.rank_texts(texts, image=files[0])
    assert sorted(found.index for found in ranked) == [0, 1, 2, 3]
    assert [found.score for found in ranked] == sorted((found.score for found in ranked), reverse=True)
    alone = [model.match_probability(text, files[0]) for text in texts]
    assert [found.score for found in sorted(ranked, key=lambda found: found.index)] == pytest.approx(alone)
    sounds = [raw / f"{n}.wav" for n in range(3)]
    for found in model.rank_audio(sounds, text=texts[0], image=files[0]):
        assert found.score == pytest.approx(model.match(texts[0], files[0], sounds[found.index])["all"])
    likely = {found.index: found.score for found in model.rank_images(files, text=texts[0], by="likelihood")}
    ids = session.processor(texts[0]).items[TEXT].ids
    assert ids is not None
    expected = session.text_log_likelihood([session.processor(image=file) for file in files], [ids])[:, 0]
    assert [likely[n] for n in range(4)] == pytest.approx(expected.tolist())
    by_text = {found.index: found.score for found in model.rank_texts(texts, image=files[0], by="likelihood")}
    assert by_text[0] == pytest.approx(likely[0])
    assert model.rank_images([], text="a red square") == [] == model.rank_texts([], image=files[0], by="likelihood")


def test_the_nearest_samples_of_a_store(model: opt_ds.Model, raw_store: Path, raw: Path) -> None:
    index = model.index(raw_store, "train")
    assert len(index) == 8
    found = index.nearest("a red square", raw / "0.png", raw / "0.wav", count=3)
    assert found[0].name == "0" and found[0].cosine == pytest.approx(1, abs=1e-3) and len(found) == 3


def test_files_images_and_arrays_are_the_same_input(model: opt_ds.Model, raw: Path, tmp_path: Path) -> None:
    with Image.open(raw / "0.png") as opened:
        image = opened.copy()
    whole = model.embed(image=raw / "0.png")
    for same in (str(raw / "0.png"), image, np.asarray(image), np.asarray(image.convert("RGBA"))):
        np.testing.assert_array_equal(model.embed(image=same), whole)
    grey = model.embed(image=np.asarray(image.convert("L")))
    np.testing.assert_array_equal(grey, model.embed(image=image.convert("L").convert("RGB")))
    samples, _ = soundfile.read(raw / "0.wav", dtype="int16")
    sound = model.embed(audio=raw / "0.wav")
    for one in (samples, (samples / 32768).astype(np.float32), (samples / 32768, 16_000), samples.astype(np.int32) << 16):
        np.testing.assert_array_equal(model.embed(audio=one), sound)
    slow = np.sin(np.arange(8000) * 0.1)
    soundfile.write(tmp_path / "slow.wav", slow, 8000, subtype="DOUBLE")
    np.testing.assert_allclose(model.embed(audio=(slow, 8000)), model.embed(audio=tmp_path / "slow.wav"), atol=1e-6)


def test_transparent_and_turned_images_are_read_as_their_files(model: opt_ds.Model, tmp_path: Path) -> None:
    pixels = np.zeros((40, 30, 4), np.uint8)
    pixels[:20, :, 0], pixels[:20, :, 3] = 200, 255  # below, it is black and transparent: white
    clear = Image.fromarray(pixels)
    clear.save(tmp_path / "clear.png")
    np.testing.assert_array_equal(model.embed(image=clear), model.embed(image=tmp_path / "clear.png"))
    turned = Image.fromarray(np.linspace(0, 255, 40 * 30, dtype=np.uint8).reshape(40, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(model.embed(image=opened), model.embed(image=tmp_path / "turned.png"))
        assert opened.size == (30, 40), "the caller's image is left as it is"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no input"),
        ({"text": ""}, "the text is empty"),
        ({"text": b"red"}, "text: expected a str, got bytes"),
        ({"text": "a\udcff"}, "text: character 2 is a lone surrogate"),
        ({"image": "not/there.png"}, "image not/there.png: no such file"),
        ({"image": 3}, "image: expected a path, a PIL.Image or a NumPy array, got int"),
        ({"image": np.zeros((4, 4, 3))}, "image: an array of float64: give uint8"),
        ({"image": np.zeros((3, 4, 4, 4), np.uint8)}, r"image: an array of shape \[3, 4, 4, 4\]"),
        ({"image": np.zeros((3, 64, 64), np.uint8)}, r"image: an array of shape \[3, 64, 64\]"),
        ({"image": np.zeros((0, 4), np.uint8)}, r"image: an array of shape \[0, 4\]"),
        ({"image": Image.new("F", (4, 4))}, r"image: its values \(mode F\) have no fixed range"),
        ({"audio": "not/there.wav"}, "audio not/there.wav: no such file"),
        ({"audio": [0.0, 0.1]}, "audio: expected a path, a NumPy array of samples"),
        ({"audio": (16_000, np.zeros(9))}, r"\(samples, rate in Hz\)"),
        ({"audio": np.zeros((2, 9))}, r"audio: expected mono samples of shape \[n\], got \[2, 9\]"),
        ({"audio": np.zeros(0)}, r"got \[0\]"),
        ({"audio": np.array([np.nan])}, "audio: samples are NaN or infinite"),
        ({"audio": np.full(9, 3000.0)}, "audio: samples reach 3000: scale them"),
        ({"audio": np.zeros(9, complex)}, "audio: an array of complex128"),
        ({"audio": (np.zeros(9), 3)}, "audio: a rate of 3 Hz"),
    ],
)
def test_an_input_that_is_none_is_one_line(model: opt_ds.Model, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(opt_ds.UserError, match=message) as raised:
        model.describe(**inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate_image("a", candidates=0), "candidates 0: give at least 1"),
        (lambda m: m.generate_images("a", count=0), "count 0: give at least 1"),
        (lambda m: m.generate_image("a", guidance=-1), "guidance -1: give at least 0"),
        (lambda m: m.generate_image("a", guidance=2), "trained without dropped conditions"),
        (lambda m: m.generate_image("a", candidates=2, rank_by="machting"), '--rank-by "machting": .*did you mean "matching"'),
        (lambda m: m.generate_image("a", temperature=float("nan")), "temperature nan: give at least 0.001"),
        (lambda m: m.generate_image("a", top_p=1.5), "top_p 1.5: give 0 to 1"),
        (lambda m: m.generate_image("a", seed=2**63), "seed 9223372036854775808: give 0 to"),
        (lambda m: m.describe("a", beam_size=1.5), "beam_size: 1.5: give a whole number"),
        (lambda m: m.describe("a", beam_size="4"), "beam_size: expected a number, got str"),
        (lambda m: m.match("a"), "matching compares two or three inputs"),
        (lambda m: m.match_probability("a"), "matching compares two or three inputs"),
        (lambda m: m.rank_texts(["a"], audio=np.zeros(900), by="likelyhood"), r'by="likelyhood": .*did you mean "likelihood"'),
        (lambda m: m.rank_images([np.zeros((4, 4), np.uint8)], audio=np.zeros(900), by="likelihood"), "give text="),
        (lambda m: m.index("not/there"), "not/there"),
    ],
)
def test_an_argument_that_cannot_be_is_one_line(model: opt_ds.Model, call: Any, message: str) -> None:
    with pytest.raises(opt_ds.UserError, match=message):
        call(model)


def test_what_was_not_learned_is_refused(session: Session, raw: Path) -> None:
    model = opt_ds.Model(without(session, "dtr", "dir", "matching"))
    image = raw / "0.png"
    refused = [
        lambda: model.caption(image),
        lambda: model.generate_image("a"),
        lambda: model.generate_image("a", candidates=2),
        lambda: model.match("a", image),
        lambda: model.rank_images([image], text="a"),
        lambda: model.rank_images([image], text="a", by="likelihood"),
    ]
    for call in refused:
        with pytest.raises(opt_ds.UserError, match="this model was trained without"):
            call()


def test_what_is_truncated_is_logged(model: opt_ds.Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="opt_ds"):
        model.embed("red " * 600)
    assert "only the first" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, 'device "gpu": choose auto, cpu, cuda'),
        ({"device": "cuda:99"}, r'device "cuda:99": this PyTorch sees \d+ GPUs'),
        ({"device": "cpu", "precision": "half"}, 'precision "half": choose auto, fp32, bf16, fp16'),
        ({"device": "cpu", "precision": "fp16"}, "fp16 does not run on the CPU"),
        ({"device": "cpu", "image_weights": "not/there"}, "has no weights in a file"),
    ],
)
def test_a_model_that_cannot_be_loaded_so_is_one_line(exported: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(opt_ds.UserError, match=message):
        opt_ds.load(exported, **options).embed(image=np.zeros((8, 8), np.uint8))


def test_a_folder_without_a_model_and_a_damaged_one_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(opt_ds.UserError, match="nothing-here"):
        opt_ds.load(tmp_path / "nothing-here")
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "processor" / "tokenizer" / "vocab.txt").write_text("changed")
    with pytest.raises(opt_ds.UserError, match="export the model again"):
        opt_ds.load(copy)


def test_half_precision_halves_the_weights_and_changes_little(model: opt_ds.Model, exported: Path, raw: Path) -> None:
    half = opt_ds.load(exported, device="cpu", precision="bf16")
    assert half.dtype == torch.bfloat16
    inputs = {"text": "a red square", "image": raw / "0.png", "audio": raw / "0.wav"}
    assert float(model.embed(**inputs) @ half.embed(**inputs)) > 0.99  # type: ignore[arg-type]
    assert isinstance(half.caption(raw / "0.png"), str) and half.generate_image("a red square").size == (64, 64)
    assert half.match_probability("a red square", raw / "0.png") == pytest.approx(
        model.match_probability("a red square", raw / "0.png"), abs=0.05
    )
    assert half.rank_texts(["a red square"], image=raw / "0.png", by="likelihood")[0].score < 0


def test_the_manual_names_every_method_and_no_other() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:model\.|`)(\w+)\(", manual))
    public = {name for name, value in vars(opt_ds.Model).items() if callable(value) and not name.startswith("_")}
    assert public <= named
    assert {name for name in re.findall(r"model\.(\w+)\(", manual)} <= public
