"""Test re-ranking: generated images are compared by what the model learned, through the extractor of its training."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.image_generation import DEFAULT_SAMPLING
from opt_ds.serving.app import build_app
from opt_ds.serving.model import Model
from opt_ds.serving.session import Session
from tests.serving.conftest import without


def without_extractor(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the training store's image features have come from files that were made elsewhere."""
    extractors = session.processor.description.extractors | {"image": {"name": "npz"}}
    description = session.processor.description.model_copy(update={"extractors": extractors})
    monkeypatch.setattr(session.processor, "description", description)
    monkeypatch.setattr(session.processor, "_extractors", {})


def test_matching_is_the_default_and_likelihood_a_choice(session: Session) -> None:
    sample = session.processor("a red square")
    assert session.reranker(sample).name == "matching" and session.reranker(sample, "likelihood").name == "likelihood"
    assert session.reranker(session.processor(audio=np.zeros(16000))).name == "matching"
    assert session.ranked_images(sample, 3, DEFAULT_SAMPLING, session.reranker(sample)) == session.generate_images(sample, 3)


def test_the_kept_image_has_the_largest_likelihood_of_the_text(session: Session, tmp_path: Path) -> None:
    """The score is that of the image as a file, which its extractor reads, and of the text as its caption."""
    sample = session.processor("a red square", audio=np.zeros(16000))
    ranked = session.ranked_images(sample, 4, DEFAULT_SAMPLING, session.reranker(sample, "likelihood"))
    scores = []
    for number, (image, _) in enumerate(ranked):
        image.save(tmp_path / f"{number}.png")
        own = session.processor(image=tmp_path / f"{number}.png")
        scores.append(session.text_log_likelihood([own], [sample.of(TEXT).ids])[0, 0])
    assert [score for _, score in ranked] == pytest.approx(scores) and scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    in_order = {image.tobytes() for image, _ in session.ranked_images(sample, 4, DEFAULT_SAMPLING, None)}
    assert {image.tobytes() for image, _ in ranked} == in_order, "the same candidates, in another order"


def test_what_was_learned_decides(session: Session) -> None:
    sample, sound = session.processor("a red square"), session.processor(audio=np.zeros(16000))
    unmatched, mute = without(session, "matching"), without(session, "matching", "dtr")
    assert unmatched.reranker(sample).name == "likelihood"
    best = unmatched.ranked_images(sample, 3, DEFAULT_SAMPLING, unmatched.reranker(sample))[0][0]
    assert Model(unmatched).generate_image("a red square", candidates=3).tobytes() == best.tobytes()
    refused = [
        (lambda: unmatched.reranker(sample, "matching"), "trained without matching: it cannot choose the best"),
        (lambda: unmatched.reranker(sound), "images are compared with a text of the input, which has none"),
        (lambda: mute.reranker(sample), "trained without matching and dtr: it cannot choose the best"),
        (lambda: session.reranker(Sample()), "images are compared with text or audio of the input, which has none"),
        (lambda: session.reranker(sample, "liklihood"), '--rank-by "liklihood": .*did you mean "likelihood"'),
    ]
    for call, message in refused:
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_an_extractor_that_is_not_there_is_one_line_before_anything_is_generated(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_extractor(session, monkeypatch)
    sample = session.processor("a red square")
    for by in ("matching", "likelihood"):
        with pytest.raises(UserError, match=r"^generated images cannot be read: .* from files made elsewhere") as raised:
            session.reranker(sample, by)
        assert "\n" not in str(raised.value)
    assert Model(session).generate_image("a red square").size == (64, 64), "a single image is compared with nothing"


def test_a_server_without_the_extractor_answers_in_the_order_of_generation(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = session.ranked_images(session.processor("a red square"), 3, DEFAULT_SAMPLING, None)
    without_extractor(session, monkeypatch)
    client = TestClient(build_app(session), base_url="http://localhost")
    answer = client.post("/api/generate_image", data={"text": "a red square", "count": 3})
    assert answer.status_code == 200 and [image["matching"] for image in answer.json()["images"]] == [None] * 3
    (note,) = answer.json()["notes"]
    assert "from files made elsewhere" in note and "in the order of generation" in note
    found = [Image.open(io.BytesIO(base64.b64decode(image["png"].split(",")[1]))) for image in answer.json()["images"]]
    assert [image.tobytes() for image in found] == [image.tobytes() for image, _ in images]


def test_the_command_ranks_as_asked(
    run: Path, raw_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opt_ds(*arguments: object) -> int:
        return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")

    given = ("--text", "a red square", "--to", "image", "--candidates", 3, "--output", tmp_path / "a.png", "--rank-by")
    assert opt_ds("generate", "--checkpoint", run, *given, "likelihood") == 0
    assert re.search(r"log likelihood of the text -\d+\.\d+, the best of 3", capsys.readouterr().out)
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    assert opt_ds("generate", "--checkpoint", run, *given, "beauty") == 2
    assert capsys.readouterr().err == 'error: --rank-by "beauty": choose matching or likelihood\n'
    common = ("--checkpoint", run, "--store", raw_store, "--split", "valid", "--output", tmp_path / "a.json")
    options = ("--generate", 3, "--images", 0, "--candidates", 2, "--rank-by", "likelihood")
    assert opt_ds("evaluate", "image-generation", *common, *options) == 0
    shown, figures = capsys.readouterr(), json.loads((tmp_path / "a.json").read_text())
    assert figures["T"]["generated"]["likelihood"]["kept"] >= figures["T"]["generated"]["likelihood"]["first"]
    assert figures["A"]["generated"]["candidates"] == 1 and "likelihood" not in figures["A"]["generated"]
    assert "log likelihood of the text" in shown.out and "likelihood cannot compare images with this input" in shown.err
