"""Predictions per sample: complete, the figures follow from them, and one line per row whatever the texts."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.captioning import captioning
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.predictions import Row, check_files, write_evalai, write_rows
from opt_ds.evaluation.transcription import transcription
from opt_ds.evaluation.vqa import answer_accuracy, vqa
from opt_ds.model.generation import DEFAULT_DECODING
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_store


def test_error_rates_follow_from_the_edits_of_the_samples(evaluator: Evaluator) -> None:
    rows: list[Row] = []
    found = transcription(evaluator, "valid", whisper=True, predictions=rows)
    for name in ("A", "A+I", "I"):
        own = [row for row in rows if row["input"] == name]
        assert len(own) == found[name]["samples"] and len({row["id"] for row in own}) == len(own)
        for rate in ("wer", "cer", "wer_whisper_basic"):
            edits, items = (sum(row["errors"][rate][key] for row in own) for key in ("edits", "items"))
            assert edits / items == pytest.approx(found[name][rate])
    store = evaluator.store
    captions = {store.sample_id(int(index)): evaluator.caption(index) for index in store.split_samples("valid")}
    assert all(row["references"] == [captions[row["id"]]] for row in rows)
    written = evaluator.write_text([evaluator.read(i, (IMAGE,)) for i in evaluator.samples_with("valid", (TEXT, IMAGE))],
                                   DEFAULT_DECODING)  # fmt: skip
    assert [row["prediction"] for row in rows if row["input"] == "I"] == written


def test_captions_have_a_row_per_image_with_all_its_samples(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = evaluator.samples_with("valid", (TEXT, IMAGE))
    captions = [f"a red cat number {place % 4} on a mat" for place in range(len(samples))]
    captions[0] = "?!"
    by_index = dict(zip(samples.tolist(), captions, strict=True))
    real = Evaluator.caption
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: by_index.get(int(index)) or real(self, index))
    monkeypatch.setattr(Evaluator, "write_text", lambda self, given, options: ["A red cat number 2 on a hat!"] * len(given))
    rows: list[Row] = []
    found = captioning(evaluator, "valid", predictions=rows)
    assert sorted(id for row in rows for id in row["samples"]) == sorted(evaluator.store.sample_id(int(i)) for i in samples)
    assert all(row["prediction"] == "A red cat number 2 on a hat!" for row in rows)
    (wordless,) = (row for row in rows if row["references"] == ["?!"])
    assert wordless["scores"] is None
    scored = [row["scores"] for row in rows if row["scores"]]
    assert np.mean([scores["cider"] for scores in scored]) == pytest.approx(found["cider"])
    matched, ngrams = (sum(scores["bleu_4"][f"{kind}_4"] for scores in scored) for kind in ("matched", "ngrams"))
    assert ngrams == 5 * len(scored) and 0 < matched < ngrams


def test_answers_have_a_row_per_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", 30)
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: ["yes"] * 2 + ["no"] * (index % 9))
    config = make_config(tasks={"labels": {"names": ["no", "yes"], "answers": True}})
    rows: list[Row] = []
    found = vqa(Evaluator(make_model(config), config, store), "valid", predictions=rows)
    assert len(rows) == found["questions"]
    assert np.mean([row["accuracy"] for row in rows]) == pytest.approx(found["accuracy"])
    for row in rows:
        assert row["accuracy"] == pytest.approx(answer_accuracy(Counter(row["references"]), row["prediction"]))
    json.dumps(rows)


def test_a_row_is_a_line_and_only_the_main_rank_writes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows = [{"id": "a", "prediction": "one\u2028two\u0085three\nfour"}, {"id": "ü", "prediction": "猫"}]
    write_rows(path, rows, is_main=False)
    write_rows(None, rows, is_main=True)
    assert not path.exists()
    write_rows(path, rows, is_main=True)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert "猫" in path.read_text(encoding="utf-8")

    def failing() -> object:
        yield rows[0]
        raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        write_rows(path, failing(), is_main=True)  # type: ignore[arg-type]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2, "the earlier file is complete"
    assert list(path.parent.iterdir()) == [path]


def test_two_options_cannot_name_one_file(tmp_path: Path) -> None:
    check_files(tmp_path / "a.json", {"--predictions": tmp_path / "b.jsonl", "--other": None})
    with pytest.raises(UserError, match=r"--predictions .*: this is also the file of --output: name another one"):
        check_files(tmp_path / "a.json", {"--predictions": tmp_path / "x" / ".." / "a.json"})


def test_evalais_file_is_a_list_of_numbers_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    write_evalai(path, [{"id": "question 262144000", "prediction": "yes"}], is_main=False)
    assert not path.exists()
    write_evalai(path, [{"id": "question 262144000", "prediction": "yes"}, {"id": "question 7", "prediction": "2"}], is_main=True)
    assert json.loads(path.read_text()) == [{"question_id": 262144000, "answer": "yes"}, {"question_id": 7, "answer": "2"}]
    for id in ("sample 7", "7", "question seven", "question ²"):
        with pytest.raises(UserError, match=f'--evalai: the sample "{id}" is no question with a number'):
            write_evalai(path, [{"id": id, "prediction": "yes"}], is_main=True)
