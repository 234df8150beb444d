"""Error rates after Whisper's normalisers: equal to those of its package, on both sides and in every control."""

from collections.abc import Iterator
from typing import Any

import jiwer
import pytest

from opt_ds.evaluation import whisper_normalization
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.evaluation.whisper_normalization import is_spaceless, whisper_normalizers

SENTENCES = [
    "Mr. Smith won't pay £1,000 for the grey colour!", "Uh, twenty-five metres [noise] isn't far (laughs).", "Ångström's café",
    "one oh one, two thirds and $20 million", "I'd've organised it in the nineteen sixties", "", "(nothing)", "3.5 %",
]  # fmt: skip


def _published(module: str) -> Any:
    return pytest.importorskip(f"whisper_normalizer.{module}", reason="pip install -r requirements.txt installs it")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    whisper_normalization._english.cache_clear()
    yield
    whisper_normalization._english.cache_clear()


def test_both_normalisers_are_those_of_whispers_package() -> None:
    english, basic = map(_published, ("english", "basic"))
    found, missing = whisper_normalizers(split_letters=False)
    assert missing == [] and list(found) == ["english", "basic"]
    published = {"english": english.EnglishTextNormalizer(), "basic": basic.BasicTextNormalizer()}
    for name, normalizer in published.items():
        assert list(map(found[name], SENTENCES)) == [normalizer(text).strip() for text in SENTENCES]
    assert found["english"](SENTENCES[0]) == "mister smith will not pay £1000 for the gray color"


def test_scripts_without_spaces_are_split_into_characters() -> None:
    assert is_spaceless(["一只红色的猫", "OK 猫在垫子上"]) and is_spaceless(["แมวสีแดง"])
    assert not is_spaceless(["a red cat", "the sign 猫"]) and not is_spaceless(["", "!"])
    found, missing = whisper_normalizers(split_letters=True)
    assert list(found) == ["basic"] and missing == []
    assert found["basic"]("红色的猫。") == "红 色 的 猫"


def _captions(monkeypatch: pytest.MonkeyPatch, captions: list[str], written: str) -> None:
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: captions[int(index) % len(captions)])
    monkeypatch.setattr(Evaluator, "write_text", lambda self, samples, options: [written] * len(samples))


def test_references_texts_and_controls_are_normalised_alike(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    _published("english")
    captions = ["The grey cat [meows] won't run", "the colour of twenty-five cats"]
    _captions(monkeypatch, captions, "the gray cat will not run")
    row = transcription(evaluator, "valid", inputs=("A",), whisper=True)["A"]
    english = whisper_normalizers(split_letters=False)[0]["english"]
    gallery = evaluator.samples_with("valid", (0, 2))
    wanted = [english(evaluator.caption(index)) for index in gallery]
    expected = jiwer.wer(wanted, [english("the gray cat will not run")] * len(wanted))
    assert row["wer_whisper_english"] == pytest.approx(expected)
    assert row["wer_whisper_english"] < row["wer_whisper_basic"]
    for name in ("wer_whisper_english", "cer_whisper_english", "wer_whisper_basic", "cer_whisper_basic"):
        assert row["figures"][name]["interval"] is not None
        assert "constant_caption" in row["figures"][name]["controls"]
    constant = transcription(evaluator, "valid", inputs=("A",))["constant_caption"]["text"]
    assert row["figures"]["wer_whisper_english"]["controls"]["constant_caption"]["value"] == pytest.approx(
        jiwer.wer(wanted, [english(constant)] * len(wanted))
    )


def test_a_missing_package_is_named_and_the_rest_is_measured(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(whisper_normalization, "files", absent)
    found = transcription(evaluator, "valid", limit=4, whisper=True)
    assert "wer_whisper_basic" in found["A"] and "wer_whisper_english" not in found["A"]
    lines = transcription_lines(found)
    assert lines[-1] == (
        "  * not measured: the error rate by Whisper's English normaliser needs whisper_normalizer: "
        "pip install 'opt_ds[downstream]'"
    )
    assert any("Whisper's basic normaliser" in line for line in lines)


def test_what_a_normaliser_leaves_nothing_of_is_counted(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    _captions(monkeypatch, ["(laughs)", "a cat"], "a cat")
    found = transcription(evaluator, "valid", inputs=("A",), whisper=True)
    empty = sum(evaluator.caption(index) == "(laughs)" for index in evaluator.samples_with("valid", (0, 2)))
    assert found["A"]["references_without_words_whisper_basic"] == empty > 0
    assert "references_without_words" not in found["A"] and found["A"]["wer_whisper_basic"] == 0 < found["A"]["wer"]
    _captions(monkeypatch, ["(laughs)"], "a cat")
    found = transcription(evaluator, "valid", inputs=("A",), whisper=True)
    assert "wer_whisper_basic" not in found["A"] and found["A"]["wer"] > 0
    assert any("basic normaliser: it leaves no word of any caption" in what for what in found["not_measured"])


def test_a_word_of_a_script_without_spaces_is_a_character(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    _captions(monkeypatch, ["红色的猫", "蓝色的狗。"], "红色的狗")
    found = transcription(evaluator, "valid", inputs=("A",), whisper=True)
    row = found["A"]
    assert row["wer"] == row["cer"] == row["wer_whisper_basic"]
    assert not {"cer_whisper_basic", "wer_whisper_english"} & set(row) and found["not_measured"] == []
    (line,) = (line for line in transcription_lines(found) if "word error rate is character error rate" in line)
    assert "characters of Han and kana" in line
