"""Test a session: texts and images from any input, repeatably; requests that the model was not trained for are refused."""

from pathlib import Path

import numpy as np
import pytest

from opt_ds.data.modalities import AUDIO
from opt_ds.errors import UserError
from opt_ds.model.generation import DecodingConfig
from opt_ds.serving.session import Session
from tests.serving.conftest import start_run, without

INPUTS = [("text",), ("image",), ("audio",), ("text", "image"), ("text", "audio"), ("image", "audio"), ("text", "image", "audio")]


@pytest.mark.parametrize("names", INPUTS, ids="+".join)
def test_every_mixture_of_inputs_gives_a_text_and_an_image(names: tuple[str, ...], session: Session, raw: Path) -> None:
    whole = {"text": "a red square", "image": raw / "0.png", "audio": raw / "0.wav"}
    sample = session.processor(**{name: whole[name] for name in names})  # type: ignore[arg-type]
    assert isinstance(session.text(sample, DecodingConfig()), str)
    ((image, score),) = session.generate_images(sample)
    assert image.size == (64, 64) and score is None


def test_several_images_differ_and_come_best_first_and_again_the_same(session: Session) -> None:
    sample = session.processor("a blue square")
    generated = session.generate_images(sample, 3)
    scores = [score for _, score in generated]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    assert len({image.tobytes() for image, _ in generated}) == 3
    again = session.generate_images(sample, 3)
    assert [image.tobytes() for image, _ in generated] == [image.tobytes() for image, _ in again]
    other = session.generate_images(sample, 3, DecodingConfig(method="sample", seed=2))
    assert other[0][0].tobytes() != generated[0][0].tobytes()


def test_matching_names_the_cases_that_the_inputs_allow(session: Session, raw: Path) -> None:
    pair = session.matching(session.processor("a red square", raw / "0.png"))
    assert set(pair) == {"text_image", "none"} and all(0 <= value <= 1 for value in pair.values())
    triple = session.matching(session.processor("a red square", raw / "0.png", raw / "0.wav"))
    assert set(triple) == {"all", "image_audio", "text_audio", "text_image", "none"}
    with pytest.raises(UserError, match="matching compares two or three inputs"):
        session.matching(session.processor("a red square"))


def test_what_was_not_learned_is_refused(raw_store: Path, tmp_path: Path) -> None:
    start_run(raw_store, tmp_path / "run", "tasks.dtr.weight=0", "tasks.dir.weight=0")
    session = Session.load(tmp_path / "run")
    sample = session.processor("a red square")
    with pytest.raises(UserError, match=r"trained without dtr .* cannot write text"):
        session.text(sample)
    with pytest.raises(UserError, match=r"trained without dir .* cannot generate images"):
        session.generate_images(sample)


def test_a_head_that_was_never_trained_judges_nothing(session: Session, raw: Path) -> None:
    other = without(session, "matching")
    sample = other.processor("a red square", raw / "0.png")
    with pytest.raises(UserError, match=r"trained without matching .* cannot predict whether"):
        other.matching(sample)
    generated, compared = other.generate_images(sample, 3), session.generate_images(sample, 3)
    assert [score for _, score in generated] == [None] * 3
    assert {image.tobytes() for image, _ in generated} == {image.tobytes() for image, _ in compared}


def test_a_run_without_its_processor_says_what_to_do(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "processor")
    with pytest.raises(UserError, match="start the run again"):
        Session.load(copy)


def test_an_audio_file_of_ten_samples_in_float64_is_read(session: Session) -> None:
    assert AUDIO in session.processor(audio=np.zeros(10, np.float64)).items, "a click is valid audio"
