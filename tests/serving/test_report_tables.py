"""Test the report's tables: figures of this version with controls and verdicts, figures of an earlier one with what they had."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.evaluation.figures import Measured, beside, measure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.ranking import recall_row
from opt_ds.former_names import FIGURES, current_keys
from opt_ds.serving import report_tables
from opt_ds.serving.report import write_report

_CHANCE = {"R@1": 0.005, "R@5": 0.025, "R@10": 0.05}
_RANKS = {"R@1": 0.74, "R@5": 0.9, "R@10": 0.95}
#: Results as an earlier version wrote them.
OLD: dict[str, Any] = {
    "result": {
        "schema": 1, "seconds": 60.0, "store": {"name": "emoji", "fingerprint": "0"},
        "validation": {"mlm": {"loss": 0.97, "baseline": 4.1, "accuracy": 0.774}},
        "splits": {"valid": {
            "retrieval": {"split": "valid", "text_to_image": {"likelihood": {"candidates": 200, **_RANKS, "chance": _CHANCE}},
                          "image_to_text": {"likelihood": {"candidates": 200, **_RANKS, "chance": _CHANCE}}},
            "transcription": {"A": {"wer": 0.3, "cer": 0.2, "samples": 419, "wer_shuffled_audio": 0.889},
                              "constant_caption": {"wer": 0.686, "text": "man walking"}},
            "image_generation": {"split": "valid", "inputs": "T", "bits_per_code": 1.04, "unigram_bits_per_code": 5.86},
        }},
    },
    "classification": {"split": "valid", "labels": 23, "test_samples": 9, "train_samples": 8, "chance": 0.158,
                       "subsets": {"T": {"mAP": 0.922}}},
    "two_stages": {"split": "valid", "candidates": 400, "shortlist": 50, "text_to_image": {
        "chance": _CHANCE, "projection": _RANKS, "shortlist_recall": 0.9, "likelihood": {**_RANKS, "encoder_fraction": 0.1}}},
    "captioning": {"split": "valid", "pictures": 9, "bleu_4": 20.0, "cider": None, "undefined": {"cider": "why"},
                   "constant_caption": {"bleu_4": 1.0, "cider": None, "text": "x"},
                   "another_image": {"bleu_4": 2.0, "cider": None}},
    "image_generation": {"T": {
        "split": "valid", "inputs": "T", "bits_per_code": 1.04, "unigram_bits_per_code": 5.86, "samples": 9,
        "generated": {"samples": 9, "candidates": 2, "nearest": {**_RANKS, "chance": _CHANCE}, "fid": 99.0,
                    "matching": {"first": 0.4, "kept": 0.6},
                    "clip_score": {"generated": 20.0, "true": 30.0, "another_caption": 19.0}}}},
}  # fmt: skip


def texts(table: report_tables.FigureTable) -> list[list[str]]:
    """Return all lines of a table as cells."""
    return [
        [row.name, *row.cells, *block.verdicts] for block in table.blocks for row in (block.figures, *block.controls)
    ]  # fmt: skip


def test_a_run_evaluated_by_an_earlier_version_has_its_report(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for name, figures in OLD.items():
        (old / f"{name}.json").write_text(json.dumps(figures))
    assert write_report(old, tmp_path / "page.html") == ["retrieval", "transcription"]
    page = (tmp_path / "page.html").read_text()
    for shown in ("74.0%", "0.5%", "30.0%", "88.9%", "68.6%", "1.04", "5.86", "92.2%", "15.8%", "20.0", "19.0", "0.970", "4.100"):
        assert shown in page, shown
    assert "text likelihood, transductive of 200" in page and "evaluate again" in page
    for hidden in ("77.4%", "99.0", "0.600"):
        assert hidden not in page, "it was measured without a control"


def test_the_figures_of_scenes_are_shown_and_not_missed(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(run, young, ignore=shutil.ignore_patterns("checkpoints"))
    assert "scenes" not in write_report(young, tmp_path / "page.html"), "most stores do not allow it"
    assert "judged by their truth" not in (tmp_path / "page.html").read_text()
    own, other = Measurement.mean(np.array([1.0, 0, 1])), Measured(Measurement.mean(np.array([1.0, 1, 0])))
    found = {
        "split": "test_composition", "skipped": {},
        "negatives": {"I": {"likelihood": {**beside({"swapped": measure(own, {"no_input": other})}), "pairs": {"swapped": 3}}}},
        "images": {"true": {**beside({"whole": measure(own, {"another_image": other})}), "samples": 3}},
    }  # fmt: skip
    (young / "scenes.json").write_text(json.dumps(found))
    write_report(young, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    rows = ("image→text, text likelihood, swapped (3)", "no input", "true image, whole (3 samples)")
    for shown in ("judged by their truth", *rows):
        assert shown in page, shown


def test_the_summary_s_figures_of_scenes_are_shown_for_each_split(run: Path, tmp_path: Path) -> None:
    def scenes(split: str, samples: int) -> dict[str, Any]:
        own, other = Measurement.mean(np.array([1.0, 0, 1])), Measured(Measurement.mean(np.array([1.0, 1, 0])))
        row = {**beside({"complete": measure(own, {"another_image": other}), "true": measure(own, {"another_image": other})})}
        probes = {"I": beside({"colour": measure(own, {"concepts_probe": other})}), "labels": {"colour": 7}}
        return {"split": split, "skipped": {}, "texts": {"I": {**row, "samples": samples}}, "probes": probes}

    young = tmp_path / "young"
    shutil.copytree(run, young, ignore=shutil.ignore_patterns("checkpoints"))
    summary = json.loads(json.dumps(OLD["result"]))
    figures = summary["splits"].pop("valid")
    summary["splits"] = {name: {**figures, "scenes": scenes(name, 50)} for name in ("test_composition", "test_voice")}
    (young / "result.json").write_text(json.dumps(summary))
    write_report(young, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for shown in ("Split test_composition: generated texts", "Split test_voice: mAP of a linear probe", "7 labels",
                  "true concepts without binding, probe"):  # fmt: skip
        assert shown in page, shown
    assert page.count("(50 samples)") == 2
    (young / "scenes.json").write_text(json.dumps(scenes("test_voice", 200)))
    write_report(young, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("(50 samples)") == page.count("(200 samples)") == 1, "the larger one replaces that of the summary"


def test_vqa_is_shown_by_kind_of_question(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(run, young, ignore=shutil.ignore_patterns("checkpoints"))
    own, other = Measurement.mean(np.array([1.0, 0, 1])), Measured(Measurement.mean(np.array([1.0, 1, 0])))
    row = {**beside({"accuracy": measure(own, {"constant_answer": other})}), "questions": 3, "best_possible": 1.0}
    found = {**row, "split": "valid", "inputs": "T+I", "constant_answer": {"answer": "yes", "accuracy": 0.6},
             "kinds": {"how many": {**row, "constant_answer": "1"}}, "not_measured": ["the control"]}  # fmt: skip
    (young / "vqa.json").write_text(json.dumps(found))
    assert "vqa" not in write_report(young, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    rows = ("VQA, how many, 3 questions *", "one answer for all", "* Not measured: the control.")
    for shown in ("Visual question answering", *rows):
        assert shown in page, shown


def test_a_figure_has_its_controls_below_and_its_verdict_beside() -> None:
    random, same = np.random.default_rng(0), np.eye(30, dtype=bool)
    own = random.random((30, 30)) + 0.4 * same
    row = recall_row(own, same, {"untrained_projection": own, "trained_projection": np.zeros((30, 30))}, prior="training inputs")
    ((split, table),) = report_tables.retrieval_tables({"retrieval": {"split": "valid", "image_to_text": {"likelihood": row}}})
    (block,) = table.blocks
    assert split == "valid" and block.figures.name == "image → text, text likelihood of 30"
    assert [control.name for control in block.controls] == ["chance", "untrained encoder, projection", "projection of [CLS]"]
    assert block.verdicts == ["no better than untrained encoder, projection"]
    assert block.figures.cells[0] == block.controls[1].cells[0] and "[" in block.figures.cells[0]
    assert len(block.figures.cells) == len(table.columns) == len(table.paper) == len(block.paper) == 3


def test_captions_and_losses_have_a_cell_per_column() -> None:
    values = np.random.default_rng(0).random(9)
    figures = {"cider": measure(Measurement.mean(values), {"constant_caption": Measured(Measurement.mean(values * 0.5))})}
    former = current_keys(OLD["captioning"], FIGURES)
    found = {**former, "bleu_4": None, **beside(figures), "undefined": {"bleu_4": "no caption has four words"}}
    table = report_tables.captioning_table(found)
    assert texts(table)[0][1] == "" and texts(table)[1][0] == "one caption for all"
    assert "bleu_4 is undefined: no caption has four words." in table.caption
    rows = {"mafr": {"loss": 0.9, "baseline": 0.95, "accuracy": None}, "mlm": {"loss": 5.0, "baseline": 4.0, "accuracy": 0.5}}
    losses = texts(report_tables.validation_table(rows))
    assert losses[0] == ["mafr", "0.900", ""] and losses[1][:2] == ["trivial baseline", "0.950"]
    assert losses[2][2:] == ["not shown (measured without a control: evaluate again)", "no better than trivial baseline"]


def test_error_rates_by_whispers_normalisers_have_rows_of_their_own() -> None:
    rate = {"value": 0.25, "interval": [0.2, 0.3], "controls": {
        "constant_caption": {"value": 0.75, "interval": None, "advantage": None, "advantage_interval": None, "samples": 5},
    }}  # fmt: skip
    row = {"wer": 0.5, "cer": 0.4, "wer_whisper_basic": 0.25, "samples": 5, "figures": {"wer_whisper_basic": rate}}
    found = {"A": row, "constant_caption": {"wer": 0.9, "text": "a cat"}}
    blocks = report_tables.transcription_table([("test", found)]).blocks
    assert [block.figures.name for block in blocks][1] == "test, audio→text (5 samples), Whisper's basic normaliser"
    assert blocks[1].figures.cells == ["25.0% [20.0–30.0]", ""] and blocks[1].controls[0].cells == ["75.0%", ""]
