"""Each metric of captions is its library's own figure, also over resamples, and is the best for perfect captions."""

import numpy as np
import pytest
import sacrebleu
from pycocoevalcap.rouge.rouge import Rouge

from opt_ds.errors import RunError, UserError
from opt_ds.evaluation import meteor
from opt_ds.evaluation.caption_metrics import (
    METRICS,
    bleu_sacrebleu,
    rouge_l,
    sacrebleu_signature,
    sacrebleu_tokenizer,
    why_undefined,
    with_meteor,
)
from opt_ds.evaluation.captioning import captioning, captioning_lines, scores
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.meteor import Meteor, find_program, meteor_of_sums
from opt_ds.evaluation.predictions import Row
from opt_ds.serving.report_tables import captioning_table

REFERENCES = [
    ["A red cat, on a mat.", "a cat on the mat"], ["Two dogs run in the snow!"], ["a boat at sea", "a ship at sea", "the sea"]
]  # fmt: skip
WRITTEN = ["a red cat on the mat", "two dogs running in snow", "a vessel"]
COLUMNS = [["A red cat, on a mat.", "Two dogs run in the snow!", "a boat at sea"],
           ["a cat on the mat", None, "a ship at sea"], [None, None, "the sea"]]  # fmt: skip
# What METEOR 1.5 answers for these pairs, and the scores that it computes of them: of each, and of all.
TERMS = np.array([
    [6, 5, 3, 3, 2, 2, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 5],
    [5, 6, 2, 3, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 5],
    [2, 4, 1, 2, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 2, 2],
    [0, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
])  # fmt: skip
SCORES = (0.4766362624370249, 0.41388921016683433, 0.1807398721165556, 0.0, 0.0)
SCORE_OF_ALL = 0.2507989912465352


def test_sacrebleu_is_its_own_figure_also_without_a_match() -> None:
    for written in (WRITTEN, ["red cat", "snow dogs", "boat"]):
        metric = sacrebleu.BLEU(lowercase=True)
        assert bleu_sacrebleu(REFERENCES, written).value == pytest.approx(metric.corpus_score(written, COLUMNS).score)  # type: ignore[arg-type]
    assert sacrebleu_signature(REFERENCES).startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert bleu_sacrebleu(REFERENCES, [texts[0].upper() for texts in REFERENCES]).value == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [("a red cat", "13a"), ("красный кот", "13a"), ("빨간 고양이", "13a"), ("一只红色的猫。", "zh"), ("แมวสีแดง", "char"),
     ("赤い猫がいる", "ja-mecab or char")],
)  # fmt: skip
def test_the_tokenizer_is_that_of_the_script(text: str, tokenizer: str) -> None:
    assert sacrebleu_tokenizer([[text], [text, text]]) in tokenizer.split(" or ")


def test_chinese_captions_are_scored_as_sacrebleu_scores_them() -> None:
    references, written = [["一只红色的猫在垫子上。"], ["两只狗在雪地里奔跑。"]], ["一只红猫在垫子上。", "两只狗在雪地里跑。"]
    metric = sacrebleu.BLEU(lowercase=True, tokenize="zh")
    expected = metric.corpus_score(written, [[texts[0] for texts in references]]).score
    assert bleu_sacrebleu(references, written).value == pytest.approx(expected) and expected > 10
    found = scores(references, [texts[0] for texts in references])
    assert found["bleu_4"] == pytest.approx(100) and found["rouge_l"] == pytest.approx(1) and "undefined" not in found


def test_rouge_is_cocos_and_ignores_case_and_punctuation() -> None:
    plain = [["a red cat on a mat", "a cat on the mat"], ["two dogs run in the snow"], REFERENCES[2]]
    expected = Rouge().compute_score(dict(enumerate(plain)), {place: [text] for place, text in enumerate(WRITTEN)})[0]
    assert rouge_l(REFERENCES, WRITTEN).value == pytest.approx(expected)
    assert rouge_l(REFERENCES, [texts[0] for texts in REFERENCES]).value == pytest.approx(1)
    assert rouge_l(REFERENCES, [""] * 3).value == 0


@pytest.mark.parametrize("name", sorted({*METRICS} - {"cider"}))  # its weights are of all images, in a resample too
def test_a_resample_is_the_figure_of_the_images_that_it_counts(name: str) -> None:
    measurement = METRICS[name](REFERENCES, WRITTEN)
    twice_and_never = measurement.counted(np.array([[2.0, 0.0, 1.0]]))[0]
    counted = METRICS[name]([REFERENCES[place] for place in (0, 0, 2)], [WRITTEN[place] for place in (0, 0, 2)])
    assert twice_and_never == pytest.approx(counted.value)


def test_what_perfect_captions_cannot_reach_is_undefined() -> None:
    assert why_undefined([["red cat"], ["two dogs"]]) == dict.fromkeys(("bleu_4", "bleu_sacrebleu"), "no caption has four words")
    assert why_undefined(REFERENCES) == {} and set(why_undefined([])) == set(METRICS)


def test_meteor_of_terms_is_what_the_program_computes() -> None:
    measurement = Measurement(TERMS.astype(float), meteor_of_sums)
    assert measurement.value == pytest.approx(SCORE_OF_ALL)
    each = [measurement.at(np.array([place])).value for place in range(len(TERMS))]
    assert each == pytest.approx(SCORES)
    perfect = np.array([[3.0, 3, 1, 1, 2, 2, 1, 1, *[0] * 12, 1, 3, 3]])
    assert meteor_of_sums(np.ones((1, 1)), perfect) == pytest.approx([1.0])


def test_meteor_stands_beside_its_controls(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def terms(self, references: list[list[str]], written: list[str]) -> np.ndarray:
            return np.resize(TERMS, (len(written), TERMS.shape[1])).astype(float)

    monkeypatch.setattr("opt_ds.evaluation.captioning.find_program", lambda: None)
    monkeypatch.setattr("opt_ds.evaluation.captioning.meteor_program", Counting)
    rows: list[Row] = []
    found = captioning(evaluator, "valid", predictions=rows, meteor=True)
    assert set(found["figures"]["meteor"]["controls"]) == {"constant_caption", "another_image"}
    assert found["figures"]["meteor"]["interval"] is not None and found["not_measured"] == []
    assert [row["scores"]["meteor"] for row in rows][:2] == pytest.approx(SCORES[:2])
    assert any("METEOR" in line for line in captioning_lines(found)) and "METEOR" in captioning_table(found).columns
    assert captioning_lines(captioning(evaluator, "valid"))[-1] == (
        "  * not measured: METEOR, for English captions: --meteor measures it, with Java"
    )
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: f"第{index}只红色的猫")
    chinese = captioning(evaluator, "valid", meteor=True)
    assert "meteor" not in chinese and "METEOR: it is for English" in chinese["not_measured"][0]


def test_every_metric_has_an_interval_and_both_controls(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a red cat on the mat", "two dogs run in the snow", "a small boat out at sea"]
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: captions[int(index) % 3])
    monkeypatch.setattr(Evaluator, "write_text", lambda self, given, options: ["a red cat in the snow"] * len(given))
    figures = captioning(evaluator, "valid")["figures"]
    assert set(figures) == set(METRICS)
    for figure in figures.values():
        low, high = figure["interval"]
        assert low <= figure["value"] <= high and set(figure["controls"]) == {"constant_caption", "another_image"}


def test_what_is_missing_for_meteor_is_said_before_anything_is_generated(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    monkeypatch.setattr(Evaluator, "write_text", lambda *given: pytest.fail("nothing is generated"))
    with pytest.raises(UserError, match="no java on the PATH: leave out --meteor, or install a Java runtime"):
        captioning(evaluator, "valid", meteor=True)
    monkeypatch.undo()
    monkeypatch.setattr(meteor.shutil, "which", lambda name: "java")
    monkeypatch.setattr(meteor, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no meteor-1\.5\.jar in pycocoevalcap"):
        find_program()


def test_a_program_that_ends_early_is_an_error_of_one_line() -> None:
    import io

    with pytest.raises(RunError, match="METEOR's program gave no terms but ''"):
        Meteor(io.StringIO(), io.StringIO("")).terms([["a cat"]], ["a cat"])


def test_the_names_of_metrics_with_meteor() -> None:
    assert list(with_meteor(None)) == list(METRICS)
    assert list(with_meteor(lambda references, written: TERMS)) == [*METRICS, "meteor"]
