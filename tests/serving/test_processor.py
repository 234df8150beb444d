"""Test raw input: its features equal those of the store; what is truncated or cannot be read is reported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.serving.processor import OPTProcessor
from opt_ds.serving.session import Session
from opt_ds.store import FeatureStore
from opt_ds.store.seal import seal_folder


def test_a_raw_sample_becomes_just_what_training_reads(session: Session, raw: Path, raw_store: Path) -> None:
    store = FeatureStore(raw_store)
    evaluator = Evaluator(session.model, session.config, store)
    line = json.loads((raw / "manifest.jsonl").read_text().splitlines()[3])
    made = session.processor(line["text"], raw / line["image"], raw / line["audio"])
    index = next(i for i in range(store.num_samples) if store.sample_id(i) == line["id"])
    stored = evaluator.read(index, (0, 1, 2))
    for modality, part in ((TEXT, "ids"), (IMAGE, "boxes"), (IMAGE, "labels"), (AUDIO, "features")):
        np.testing.assert_array_equal(getattr(made.of(modality), part), getattr(stored.of(modality), part))
    # While preparing the store, sixteen images went through the network together, so sums have another order.
    np.testing.assert_allclose(made.items[IMAGE].features, stored.items[IMAGE].features, rtol=1e-2, atol=1e-2)


def test_images_and_waveforms_in_memory_are_read_as_their_files(session: Session, raw: Path) -> None:
    import soundfile

    of_file = session.processor(image=raw / "1.png", audio=raw / "1.wav")
    waveform = soundfile.read(raw / "1.wav", dtype="float32")[0]
    of_names = session.processor(image=str(raw / "1.png"), audio=str(raw / "1.wav"))
    np.testing.assert_array_equal(of_file.items[IMAGE].features, of_names.items[IMAGE].features)
    np.testing.assert_array_equal(of_file.items[AUDIO].features, of_names.items[AUDIO].features)
    in_memory = session.processor(image=Image.open(raw / "1.png"), audio=waveform)
    np.testing.assert_array_equal(of_file.items[IMAGE].features, in_memory.items[IMAGE].features)
    np.testing.assert_array_equal(of_file.items[AUDIO].features, in_memory.items[AUDIO].features)


def test_the_sound_of_a_video_is_read_as_a_file_of_sound(session: Session, raw: Path, tmp_path: Path) -> None:
    import soundfile

    from tests.decoding.test_containers import save

    tone = soundfile.read(raw / "1.wav", dtype="float32")[0][None]
    expected = session.processor(audio=raw / "1.wav").items[AUDIO].features
    found = session.processor(audio=save(tmp_path / "upload.mp4", tone, pictures=True)).items[AUDIO].features
    assert abs(len(found) - len(expected)) <= 1, "an encoder adds a frame or two, and each of these is eight"
    middle = slice(1, min(len(found), len(expected)) - 2)
    assert np.corrcoef(found[middle].ravel().astype("float32"), expected[middle].ravel().astype("float32"))[0, 1] > 0.9


def test_what_is_too_long_is_cut_aloud(run: Path, logged: list[str]) -> None:
    session = Session.load(run)
    sample = session.processor("red square " * 40, audio=np.zeros(16000 * 60, np.float32))
    assert len(sample.items[TEXT].ids) == session.config.model.max_text_tokens
    assert len(sample.items[AUDIO].features) == session.config.model.max_frames
    assert "the text has" in logged[0] and "only the first 24 are read" in logged[0]
    assert "the audio (60.0 s) has" in logged[1] and "(6.4 s) are read" in logged[1]
    Image.new("RGB", (1, 1), "red").save(run.parent / "pixel.png")
    assert len(session.processor(image=run.parent / "pixel.png").items[IMAGE].features) == 16, "one pixel is an image too"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "no input"),
        ({"text": " \u200b"}, "the text is empty"),
        ({"image": Path("/nowhere.png")}, "no such file"),
        ({"image": Path(__file__)}, "cannot be read"),
        ({"audio": Path(__file__)}, "cannot be read"),
    ],
)
def test_bad_input_is_one_line(given: dict[str, object], expected: str, session: Session) -> None:
    with pytest.raises(UserError, match=expected) as error:
        session.processor(**given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_an_extractor_that_is_not_the_training_stores_is_refused(run: Path, session: Session, raw: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "processor", tmp_path / "processor"))
    description = json.loads((folder / "processor.json").read_text())
    description["extractors"]["image"]["weights_sha256"] = "another"
    (folder / "processor.json").write_text(json.dumps(description))
    seal_folder(folder)
    processor = OPTProcessor(folder, session.config.model)
    with pytest.raises(UserError, match=r"image extractor grid: its weights_sha256 is .* trained with another"):
        processor(image=raw / "0.png")
    assert TEXT in processor("a red square").items, "what does not need it still works"
    description["extractors"]["audio"] |= {"name": "wav2vec2", "weights_sha256": "another"}
    (folder / "processor.json").write_text(json.dumps(description))
    seal_folder(folder)
    with pytest.raises(UserError, match="name their file with --speech-weights"):
        OPTProcessor(folder, session.config.model)(audio=raw / "0.wav")
    with pytest.raises(UserError, match="--speech-weights /nowhere: no such file"):
        OPTProcessor(folder, session.config.model, speech_weights=Path("/nowhere"))(audio=raw / "0.wav")


def test_weights_that_the_models_extractor_does_not_take_are_refused(session: Session, run: Path, raw: Path) -> None:
    given = OPTProcessor(run / "processor", session.config.model, image_weights=raw / "0.png", speech_weights=raw / "0.wav")
    for kind, option in (("image", "--image-weights"), ("audio", "--speech-weights")):
        with pytest.raises(UserError, match=f"{kind} extractor .* has no weights in a file: omit {option}"):
            given(**{kind: raw / ("0.png" if kind == "image" else "0.wav")})
