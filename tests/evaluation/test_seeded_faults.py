"""Test that the controls expose models that ignore their input, by seeded faults; and that they clear one that uses it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.evaluation.classification import classification
from opt_ds.evaluation.controls import untrained
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import FIGURES
from opt_ds.evaluation.image_generation import bits_lines, bits_per_code
from opt_ds.evaluation.projections import ProjectionControls
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.evaluation.vqa import vqa, vqa_lines
from opt_ds.serving.report_tables import image_generation_tables, transcription_table
from opt_ds.store import FeatureStore
from opt_ds.tasks.reconstruct import set_code_targets
from tests.tiny import make_config, make_model, make_store

CLASSES, CODES = 4, 16
PATTERNS = np.random.default_rng(3).integers(0, 16, (CLASSES, CODES))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store whose captions tell the image: its class is the first token, and decides all image codes."""
    store = make_store(tmp_path_factory.mktemp("scenes") / "store", 240, splits={"train": 0.75, "valid": 0.25})
    store.__dict__["text"] = lambda row: np.array([5 + row % CLASSES, 10 + row % 7])
    store.__dict__["caption"] = lambda row: f"caption {row}"
    store.__dict__["codes"] = lambda row: PATTERNS[row % CLASSES]
    return store


def learned(store: FeatureStore, shuffled: bool, listens: bool = True, steps: int = 60) -> Evaluator:
    """Train a tiny model to predict the codes from the caption. `shuffled`: from that of another sample."""
    config = make_config(data={"stores": [str(store.path)]}, model={"num_image_codes": CODES})
    evaluator = Evaluator(make_model(config), config, store)
    model, train = evaluator.model, evaluator.samples_with("train", (TEXT, IMAGE))
    if not listens:  # a decoder whose attention to the encoder is frozen at nothing
        for layer in model.image_decoder.decoder.layers:
            for parameter in layer.cross.parameters():
                parameter.data.zero_()
                parameter.requires_grad_(False)
    images = np.random.default_rng(0).permutation(train) if shuffled else train
    samples = [evaluator.read(index, (TEXT,)) for index in train]
    for sample, image in zip(samples, images, strict=True):
        set_code_targets(sample, store.codes(int(store.rows[image, IMAGE])))
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-2)
    choice = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        batch = evaluator.packer.pack([samples[place] for place in choice.integers(0, len(samples), 32)])
        term = model(batch)["dir"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
    model.eval()
    return evaluator


def verdicts(row: dict[str, Any], name: str) -> list[str]:
    return row[FIGURES][name]["verdicts"]


def test_a_model_that_listens_to_its_caption_is_cleared(scenes: FeatureStore) -> None:
    found = bits_per_code(learned(scenes, shuffled=False), "valid")
    control = found[FIGURES]["bits_per_code"]["controls"]["another_text"]
    assert control["value"] > found["bits_per_code"] + 0.5 and control["advantage_interval"][0] > 0.3
    assert not any("input" in verdict for verdict in verdicts(found, "bits_per_code"))
    assert found["unigram_bits_per_code"] == pytest.approx(
        found[FIGURES]["bits_per_code"]["controls"]["code_frequencies"]["value"]
    )


@pytest.mark.parametrize("fault", ["shuffled captions in training", "frozen image decoder"])
def test_a_model_that_ignores_its_caption_is_exposed(scenes: FeatureStore, fault: str) -> None:
    shuffled = fault == "shuffled captions in training"
    found = bits_per_code(learned(scenes, shuffled, listens=shuffled), "valid")
    figure = found[FIGURES]["bits_per_code"]
    low, high = figure["interval"]
    assert low <= figure["controls"]["another_text"]["value"] <= high
    assert "does not use its input (text)" in verdicts(found, "bits_per_code")
    assert any("does not use its input (text)" in line for line in bits_lines(found, "text→image"))
    table = image_generation_tables({"summary": {"splits": {"valid": {"image_generation": found}}}})[0]
    assert "does not use its input (text)" in table.blocks[0].verdicts
    # Far below the frequencies of the codes, and yet no better than counts of their neighbours.
    assert found["bits_per_code"] < 0.5 * found["unigram_bits_per_code"]
    assert any(verdict.startswith("no better than counts of codes") for verdict in table.blocks[0].verdicts)


def test_a_text_decoder_that_hears_but_does_not_look_is_exposed(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    train = evaluator.samples_with("train", (TEXT, AUDIO))
    has_audio = {
        evaluator.read(index, (AUDIO,)).of(AUDIO).features.tobytes(): evaluator.caption(index) for index in train
    }

    def write(self: Evaluator, samples: list, options: object) -> list[str]:
        return [
            has_audio[sample.of(AUDIO).features.tobytes()] if AUDIO in sample.items else "w1 w2" for sample in samples
        ]

    monkeypatch.setattr(Evaluator, "write_text", write)
    found = transcription(evaluator, "train")
    assert found["A"]["wer"] == 0 and not verdicts(found["A"], "wer")
    assert verdicts(found["A+I"], "wer") == ["does not use its input (image)"]
    assert "does not use its input (image)" in verdicts(found["I"], "wer")
    assert any("another sample's audio" in line for line in transcription_lines(found))
    by_name = {block.figures.name: block for block in transcription_table([("train", found)]).blocks}
    assert by_name[f"train, audio+image→text ({len(train)} samples)"].verdicts == ["does not use its input (image)"]


def test_a_writer_of_one_caption_is_exposed(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = transcription(evaluator, "train", ("A",), limit=2)["constant_caption"]["text"]
    monkeypatch.setattr(Evaluator, "write_text", lambda self, samples, options: [constant] * len(samples))
    found = transcription(evaluator, "train", ("A", "I"))
    assert verdicts(found["A"], "wer") == ["does not use its input (audio)", "no better than one caption for all"]


def test_constant_scores_are_at_chance_in_every_direction(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "matching_scores", lambda self, samples: np.zeros((len(samples), 5), np.float32))
    monkeypatch.setattr(Evaluator, "text_log_likelihood", lambda self, samples, texts: np.zeros((len(samples), len(texts))))
    found = retrieval(evaluator, "train", 12, 12, 12)
    for direction in ("image_to_text", "text_to_image", "text_to_audio", "audio_to_text", "text_audio_to_image"):
        for row in found[direction].values():
            assert {name: row[name] for name in row["chance"]} == pytest.approx(row["chance"]) and row["R@1"] < 0.2
            assert verdicts(row, "R@1") == ["no better than chance"]
    assert sum("no better than chance" in line for line in retrieval_lines(found)) == 9


def test_an_untrained_encoder_is_no_better_than_an_untrained_encoder(evaluator: Evaluator) -> None:
    """The model that is evaluated has the weights of the control: projection and probe must say so."""
    beginner = untrained(evaluator)
    found = retrieval(beginner, "train", 12, 6, 4, controls=ProjectionControls(beginner))
    for direction in ("image_to_text", "text_audio_to_image"):
        row = found[direction]["projection"]
        assert row["R@1"] == row[FIGURES]["R@1"]["controls"]["untrained_projection"]["value"]
        assert "no better than untrained encoder, projection" in verdicts(row, "R@1")
    probed = classification(beginner, "valid", subsets=("T",), min_positives=5)["subsets"]["T"]
    assert "no better than untrained encoder, probe" in verdicts(probed, "mAP")
    assert probed["mAP"] == probed[FIGURES]["mAP"]["controls"]["untrained_probe"]["value"]


def test_an_answerer_that_does_not_look_is_exposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", 60)
    names = ("no", "yes")
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [names[index % 2]] * 10)
    config = make_config(tasks={"labels": {"names": list(names), "answers": True}})
    evaluator = Evaluator(make_model(config), config, store)
    asked = {evaluator.read(index, (TEXT,)).of(TEXT).ids.tobytes(): index % 2 for index in store.split_samples("valid")}

    def scores(self: Evaluator, samples: list) -> np.ndarray:
        return np.eye(2)[[asked[sample.of(TEXT).ids.tobytes()] for sample in samples]]

    monkeypatch.setattr(Evaluator, "label_scores", scores)
    found = vqa(evaluator, "valid")
    assert found["accuracy"] == 1 and verdicts(found, "accuracy") == ["does not use its input (image)"]
    assert any("another sample's image" in line for line in vqa_lines(found))
