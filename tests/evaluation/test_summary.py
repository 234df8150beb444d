import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.image_generation import ImageGenerator, bits_per_code
from opt_ds.evaluation.image_grid import draw_image_grid
from opt_ds.evaluation.summary import summarize, table
from opt_ds.tasks.baselines import BaselineResult, trivial_baselines
from opt_ds.training.validation import ValidationResult, validate
from tests.tiny import LOSSES, make_config, make_model


@pytest.fixture(scope="module")
def dvae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DVAE_PRESETS["dvae-tiny"].model_copy(update={"codebook_size": 16})).eval()


def test_bits_per_code_of_a_model_that_knows_nothing_is_log2_of_the_codebook(evaluator: Evaluator) -> None:
    decoder = evaluator.model.image_decoder
    saved = {name: value.clone() for name, value in decoder.state_dict().items()}
    torch.nn.init.zeros_(decoder.code.weight)
    torch.nn.init.zeros_(decoder.bias)
    try:
        assert bits_per_code(evaluator, "train", limit=4)["bits_per_code"] == pytest.approx(4.0)
    finally:
        decoder.load_state_dict(saved)


def test_validation_measures_every_loss_and_has_a_baseline_for_each(evaluator: Evaluator) -> None:
    result = validate(evaluator.model, evaluator.config, evaluator.store)
    assert set(result.losses) == set(LOSSES)
    assert set(trivial_baselines(evaluator.config, [evaluator.store])) == set(LOSSES)
    assert result.weighted == pytest.approx(sum(result.losses.values()))


def test_the_image_grid_shows_the_true_images(evaluator: Evaluator, dvae: DiscreteVAE) -> None:
    grid = draw_image_grid(evaluator, ImageGenerator(dvae), "train", num_samples=2)
    assert grid.dtype == np.uint8 and grid.ndim == 3
    first = evaluator.samples_with("train", (0, 1, 2), 2)[0]
    pixels = evaluator.store.pixels(int(evaluator.store.rows[first, 1])).transpose(1, 2, 0)
    shown = grid[31 : 31 + 128 : 2, 10 : 10 + 128 : 2]
    assert (shown[1:-1, 1:-1] == pixels[1:-1, 1:-1]).all()


def test_a_store_without_audio_files_is_summed_up_without_them(
    without_audio: Evaluator, dvae: DiscreteVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_ds.evaluation.summary.validate", lambda *_: ValidationResult({}, {}, 0.0))
    monkeypatch.setattr("opt_ds.evaluation.summary.baseline_result", lambda *_: BaselineResult({}, {}))
    figures = summarize(without_audio, dvae, ["valid"], tmp_path, candidates=4, matching_candidates=3)
    assert (tmp_path / figures["splits"]["valid"]["image_grid"]).is_file()
    assert "image→text" in table(figures) and "audio" not in table(figures)


def test_what_the_model_never_learned_is_left_out_of_the_summary(
    evaluator: Evaluator, dvae: DiscreteVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_ds.evaluation.summary.validate", lambda *_: ValidationResult({}, {}, 0.0))
    monkeypatch.setattr("opt_ds.evaluation.summary.baseline_result", lambda *_: BaselineResult({}, {}))
    config = make_config(
        data={"stores": [str(evaluator.store.path)]}, model={"num_image_codes": 64},
        tasks={loss: {"weight": 0} for loss in ("dtr", "dir")},
    )  # fmt: skip
    sorter = Evaluator(make_model(config), config, evaluator.store)
    figures = summarize(sorter, dvae, ["valid"], tmp_path, candidates=4, matching_candidates=3)["splits"]["valid"]
    assert set(figures) == {"retrieval", "transcription"} and not {"A", "A+I", "I"} & set(figures["transcription"])
    assert "likelihood" not in figures["retrieval"]["text_to_image"]


def test_the_summary_is_plain_json_and_its_table_names_all(evaluator: Evaluator, dvae: DiscreteVAE, tmp_path: Path) -> None:
    figures = summarize(evaluator, dvae, ["valid"], tmp_path, candidates=4, matching_candidates=3)
    assert json.loads(json.dumps(figures)) == figures
    assert (tmp_path / figures["splits"]["valid"]["image_grid"]).is_file()
    text = table(figures)
    for word in [*LOSSES, "image→text", "text+audio→image", "audio+image→text", "one caption for all", "bits per image code"]:
        assert word in text
    for control in (
        "trivial baseline", "chance", "untrained encoder, projection", "projection of [CLS]", "another sample's audio",
        "another sample's text", "counts of codes by position, left and above",
    ):  # fmt: skip
        assert control in text
    assert "not shown" not in text, "every figure has a control"
    assert set(figures["seconds_by_part"]) == {
        "validation", "baselines", "retrieval", "transcription", "image generation", "image grid"
    } and figures["seconds"] >= sum(figures["seconds_by_part"].values())  # fmt: skip
    assert all(row["baseline_accuracy"] is not None for row in figures["validation"].values() if row["accuracy"] is not None)


def test_further_splits_have_smaller_galleries(
    evaluator: Evaluator, dvae: DiscreteVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_ds.evaluation.summary.validate", lambda *_: ValidationResult({}, {}, 0.0))
    monkeypatch.setattr("opt_ds.evaluation.summary.baseline_result", lambda *_: BaselineResult({}, {}))
    figures = summarize(evaluator, dvae, ["train", "valid"], tmp_path, candidates=8, matching_candidates=4)["splits"]
    sizes = [
        {score: figures[split]["retrieval"]["text_to_image"][score]["candidates"] for score in ("likelihood", "matching")}
        for split in ("train", "valid")
    ]
    assert sizes == [{"likelihood": 8, "matching": 4}, {"likelihood": 2, "matching": 2}]


def test_a_result_of_an_earlier_version_is_still_printed(evaluator: Evaluator) -> None:
    """Its figures have the controls that it measured. Those that it measured without one are not shown."""
    ranks, chance = {"R@1": 0.74, "R@5": 0.9, "R@10": 0.95}, {"R@1": 0.005, "R@5": 0.025, "R@10": 0.05}
    rates = {"wer": 0.3, "cer": 0.2, "samples": 419, "wer_shuffled_audio": 0.889}
    text = table({
        "validation": {"mlm": {"loss": 0.97, "baseline": 4.1, "accuracy": 0.77}},
        "splits": {"test_variant": {
            "retrieval": {"text_to_image": {"likelihood": {"candidates": 200, **ranks, "chance": chance}}},
            "transcription": {"A": rates, "constant_caption": {"wer": 0.686, "text": "man walking"}},
            "image_generation": {"inputs": "T", "bits_per_code": 1.04, "unigram_bits_per_code": 5.86},
        }},
        "seconds": 60.0,
    })  # fmt: skip
    for shown in ("0.970", "4.100", "74.0%", "0.5%", "30.0%", "88.9%", "68.6%", "1.04", "5.86"):
        assert shown in text
    assert "77.0%" not in text and "20.0%" not in text and text.count("not shown") == 2
