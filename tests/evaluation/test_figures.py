"""Test that no figure is printed without its control: one that has none cannot be made, or says why it is not shown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.evaluation.captioning import captioning, captioning_lines
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import (
    FIGURES,
    Control,
    Figure,
    Measured,
    beside,
    decimals,
    figure_lines,
    figure_rows,
    measure,
    percent,
    read_figure,
)
from opt_ds.evaluation.image_generation import bits_lines, bits_per_code
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.projections import ProjectionControls
from opt_ds.evaluation.reading import read_bits, read_captioning, read_error_rates, read_loss
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.evaluation.two_stage_retrieval import two_stage_retrieval
from opt_ds.model.generation import DecodingConfig

#: Keys of JSON that are figures.
KEYS = (
    "R@1", "R@5", "R@10", "wer", "cer", "wer_whisper_basic", "cer_whisper_basic", "bleu_4", "cider", "rouge_l", "meteor",
    "bleu_sacrebleu", "bits_per_code", "accuracy", "mAP", "shortlist_recall",
)  # fmt: skip
#: Rows of JSON that are controls themselves.
CONTROLS = ("chance", "constant_caption", "another_image", "constant_answer", FIGURES)


def rows(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield tree
    for key, value in tree.items():
        if isinstance(value, dict) and key not in CONTROLS:
            yield from rows(value)


def check_controls(found: dict[str, Any]) -> int:
    """Raise AssertionError if a figure stands anywhere without a control. Return the number of figures."""
    count = 0
    for row in rows(found):
        for key in (key for key in KEYS if row.get(key) is not None):
            assert row[FIGURES][key]["controls"], f"{key} has no control"
            assert row[FIGURES][key]["value"] == row[key]
            count += 1
    return count


def test_a_figure_without_a_control_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="a figure needs a control, or the reason why it has none"):
        Figure(0.3, None, {})
    with pytest.raises(ValueError, match="needs a control"):
        measure(Measurement.mean(np.ones(3)), {})
    with pytest.raises(ValueError, match="needs a control"):
        measure(Measurement.mean(np.ones(3)), {"another_text": Measured(Measurement.mean(np.empty(0)), np.empty(0, int))})


def test_a_figure_that_can_have_no_control_is_not_shown() -> None:
    hidden = measure(Measurement.mean(np.full(3, 0.4321)), {}, uncontrolled="there is only one sample")
    lines = figure_lines("text→image", {"R@1": hidden}, percent)
    assert "not shown (there is only one sample)" in lines[0] and "43" not in "\n".join(lines)


def test_a_line_has_the_figure_its_interval_and_its_controls_below() -> None:
    own, other = np.array([1.0, 1, 1, 0] * 20), np.array([0.0, 0, 1, 0] * 20)
    figure = measure(Measurement.mean(own), {"another_text": Measured(Measurement.mean(other)), "chance": 0.01})
    first, *below = figure_lines("text→image", {"R@1": figure}, percent)
    assert "R@1 75.0% [65.0–83.8]" in first or "R@1 75.0% [" in first
    assert below[0].startswith("      another sample's text") and "25.0%" in below[0]
    assert below[1].startswith("      chance") and "1.0%" in below[1] and len(below) == 2


def test_a_figure_that_its_control_reaches_is_named() -> None:
    values = np.random.default_rng(0).random(50)
    own = Measurement.mean(values)
    figure = measure(own, {"another_audio": Measured(own), "another_image": Measured(Measurement.mean(values + 1)),
                           "untrained_probe": Measured(Measurement.mean(values - 1))}, lower_is_better=True)  # fmt: skip
    assert figure.verdicts == ["does not use its input (audio)", "no better than untrained encoder, probe"]
    assert figure_rows("x", {"WER": figure}, percent).verdicts == figure.verdicts
    assert "      → does not use its input (audio)" in figure_lines("x", {"WER": figure}, percent)
    assert figure.controls["another_image"].advantage == pytest.approx(1)


def test_a_control_of_some_samples_is_compared_on_these() -> None:
    own, places = Measurement.mean(np.array([9.0, 1, 1, 1])), np.array([1, 2, 3])
    figure = measure(own, {"another_text": Measured(Measurement.mean(np.array([1.0, 1, 1])), places)})
    control = figure.controls["another_text"]
    assert control.advantage == 0 and control.samples == 3 and figure.value == 3


def test_figures_survive_json() -> None:
    random = np.random.default_rng(0)
    figure = measure(
        Measurement.mean(random.random(20)), {"another_text": Measured(Measurement.mean(random.random(20))), "chance": 0.1}
    )
    hidden = Figure(1.0, None, {}, "why")
    row = json.loads(json.dumps(beside({"R@1": figure, "R@5": hidden})))
    assert row["R@1"] == figure.value
    assert read_figure(row, "R@1") == figure and read_figure(row, "R@5") == hidden


def test_rows_of_an_earlier_version_are_read_with_the_baselines_that_they_had() -> None:
    rates = read_error_rates({"A": {"wer": 0.3, "cer": 0.2, "wer_shuffled_audio": 0.9}, "constant_caption": {"wer": 0.7}}, "A")
    assert {name: control.value for name, control in rates["WER"].controls.items()} == {
        "another_audio": 0.9, "constant_caption": 0.7
    }  # fmt: skip
    assert not rates["CER"].controls and "evaluate again" in rates["CER"].text(percent)
    assert read_bits({"bits_per_code": 1.0, "unigram_bits_per_code": 5.9}).controls["code_frequencies"].value == 5.9
    captions = {"bleu_4": 20.0, "cider": None, "constant_caption": {"bleu_4": 1.0}, "another_image": {"bleu_4": 2.0}}
    assert set(read_captioning(captions)["BLEU-4"].controls) == {"constant_caption", "another_image"}
    lines = figure_lines("mlm", {"loss": read_loss({"loss": 4.2, "baseline": 4.1})}, decimals(3))
    assert "      → no better than trivial baseline" in lines
    assert Control(1.0).is_as_good is False, "without an interval nothing is claimed"


def test_every_figure_of_every_experiment_has_a_control(evaluator: Evaluator) -> None:
    controls, greedy = ProjectionControls(evaluator), DecodingConfig()
    ranked = retrieval(evaluator, "valid", 6, 4, 3, controls=controls, transductive=True)
    written = transcription(evaluator, "valid", limit=5, options=greedy, ignored_words=frozenset(["w1"]), whisper=True)
    captions = captioning(evaluator, "valid", limit=5, options=greedy)
    bits = {name: bits_per_code(evaluator, "valid", name, limit=5) for name in ("T", "A", "T+A")}
    two_stages = two_stage_retrieval(evaluator, "valid", 3)
    for found in (ranked, written, captions, bits, two_stages):
        assert json.loads(json.dumps(found)) == found
        assert check_controls(found) > 0
        figures = [figure for row in rows(found) for figure in row.get(FIGURES, {}).values()]
        assert all(figure["interval"] is not None for figure in figures), "every figure of several samples has an interval"
    assert {"another_text", "another_audio", "code_frequencies", "code_positions", "code_contexts"} == set(
        bits["T+A"][FIGURES]["bits_per_code"]["controls"]
    )
    assert {"another_audio", "another_image", "constant_caption"} == set(written["A+I"][FIGURES]["wer"]["controls"])
    lines = [*retrieval_lines(ranked), *transcription_lines(written), *captioning_lines(captions), *bits_lines(bits["T"], "T")]
    assert not any("not shown" in line for line in lines)
    del ranked["image_to_text"]["matching"][FIGURES]["R@1"]["controls"]["chance"]
    ranked["image_to_text"]["matching"][FIGURES]["R@1"]["controls"] = {}
    with pytest.raises(AssertionError, match="R@1 has no control"):
        check_controls(ranked)
    assert any("not shown" in line for line in retrieval_lines(ranked)), "a figure whose control was removed is hidden"


def test_one_sample_alone_has_no_other_sample_s_input(evaluator: Evaluator, tmp_path: Path) -> None:
    found = transcription(evaluator, "valid", limit=1, options=DecodingConfig())
    assert set(found["A"][FIGURES]["wer"]["controls"]) == {"constant_caption"}
    assert found["A"][FIGURES]["wer"]["interval"] is None
