"""BLEU-4 and CIDEr as their libraries count them; a perfect writer gets the most, a constant one next to nothing."""

import numpy as np
import pytest
import sacrebleu

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.caption_metrics import bleu_4, cider
from opt_ds.evaluation.captioning import captioning, scores
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.model.generation import DecodingConfig
from opt_ds.store import FeatureStore
from tests.tiny import index_with, masked

REFERENCES = [
    ["a red cat on a mat", "a cat on the mat"], ["two dogs run in the snow"], ["a boat at sea", "a ship at sea", "the sea"]
]  # fmt: skip
WRITTEN = ["a red cat on the mat", "two dogs run in snow", "a boat"]


def test_bleu_is_sacrebleus_with_ragged_references() -> None:
    columns = [["a red cat on a mat", "two dogs run in the snow", "a boat at sea"],
               ["a cat on the mat", None, "a ship at sea"], [None, None, "the sea"]]  # fmt: skip
    expected = sacrebleu.corpus_bleu(WRITTEN, columns, tokenize="none", smooth_method="none").score  # type: ignore[arg-type]
    assert bleu_4(REFERENCES, WRITTEN).value == pytest.approx(expected)
    assert bleu_4(REFERENCES, [texts[0] for texts in REFERENCES]).value == pytest.approx(100)


def test_cider_prefers_the_right_words_and_rare_ones() -> None:
    right, constant = [texts[0] for texts in REFERENCES], ["a cat on the mat"] * 3
    assert cider(REFERENCES, right).value > cider(REFERENCES, WRITTEN).value > cider(REFERENCES, constant).value > 0
    one = [["red circle"], ["blue square"]]
    perfect = cider(one, ["red circle", "blue square"]).value
    assert perfect == pytest.approx(5.0), "n-grams of 1 and 2 of the four lengths, times ten"


def test_a_models_captions_are_scored_an_image_once(evaluator: Evaluator) -> None:
    figures = captioning(evaluator, "valid", options=DecodingConfig())
    gallery = evaluator.samples_with("valid", (0, 1))
    assert figures["images"] == len(np.unique(evaluator.store.rows[gallery, 1]))
    assert {"bleu_4", "cider", "constant_caption", "another_image"} <= set(figures)
    for name in {"bleu_4", "cider"} & set(figures["figures"]):
        controls = figures["figures"][name]["controls"]
        assert set(controls) == {"constant_caption", "another_image"}
        assert controls["constant_caption"]["value"] == pytest.approx(figures["constant_caption"][name])
        assert controls["another_image"]["value"] == figures["another_image"][name]


def test_a_limit_is_one_of_images_and_keeps_all_their_captions(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(evaluator.store.path)
    gallery = evaluator.samples_with("valid", (TEXT, IMAGE))
    rows = store.index.rows.copy()
    rows[gallery, IMAGE] = np.repeat(rows[gallery[::3], IMAGE], 3)[: len(gallery)]
    store.__dict__["index"] = index_with(store, rows)
    wanted: list[list[str]] = []
    monkeypatch.setattr(
        "opt_ds.evaluation.captioning._figures", lambda metrics, undefined, references, *rest: wanted.extend(references) or {}
    )
    figures = captioning(Evaluator(evaluator.model, evaluator.config, store), "valid", limit=2, options=DecodingConfig())
    assert figures["images"] == 2
    assert all(len(captions) == 3 for captions in wanted)


def test_a_split_without_images_is_refused(evaluator: Evaluator) -> None:
    imageless = Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, IMAGE))
    with pytest.raises(UserError, match='no sample of split "valid" has text and an image'):
        captioning(imageless, "valid")


def test_figures_that_a_perfect_writer_could_not_reach_are_undefined() -> None:
    short = scores([["red cat"], ["two dogs"]], ["red cat", "two dogs"])
    assert short["bleu_4"] is None
    assert short["undefined"] == dict.fromkeys(("bleu_4", "bleu_sacrebleu"), "no caption has four words")
    assert short["cider"] == pytest.approx(5.0)
    alone = scores([["a red cat on a mat"]], ["a red cat on a mat"])
    assert alone["bleu_4"] == pytest.approx(100)
    assert alone["cider"] is None and alone["undefined"] == {"cider": "there is only one image"}
    same = scores([["a red cat on a mat"]] * 3, ["a red cat on a mat"] * 3)
    assert same["cider"] is None and same["undefined"] == {"cider": "all images have the same captions"}
    nothing = dict.fromkeys(("bleu_4", "cider", "rouge_l", "bleu_sacrebleu"), "no caption has a word")
    assert scores([], [])["undefined"] == nothing
    assert "undefined" not in scores(REFERENCES, [""] * 3), "a writer of nothing has earned its 0"
    assert scores(REFERENCES, [""] * 3)["bleu_4"] == 0


def test_captions_of_punctuation_alone_are_left_out(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = {int(index): evaluator.caption(index) for index in evaluator.samples_with("valid", (TEXT, IMAGE))}
    lost = next(iter(captions))
    real = Evaluator.caption
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: "?!" if int(index) == lost else real(self, index))
    figures = captioning(evaluator, "valid", options=DecodingConfig())
    assert figures["images_without_words"] == 1
    assert figures["tokenization"] == "words"
