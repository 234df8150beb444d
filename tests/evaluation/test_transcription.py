import pytest

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.transcription import normalize, transcription, transcription_lines, word_error_rate
from tests.tiny import masked


def test_word_error_rate_counts_edits_after_normalisation() -> None:
    assert word_error_rate(["Woman: running fast"], ["woman running"]) == pytest.approx(1 / 3)
    assert word_error_rate(["a b", "c d e"], ["a b", "c d"]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Côte d’Ivoire!", "côte d'ivoire"), ("Man's  HAT.", "man's hat"), ("日本 旗", "日本 旗"), ("हिन्दी में।", "हिन्दी में"),
        ("cafe\u0301", "caf\u00e9"), ("keycap: 10 a_b", "keycap 10 a_b"),
    ],
)  # fmt: skip
def test_normalisation_keeps_letters_and_marks_of_any_script(text: str, normal: str) -> None:
    assert normalize(text) == normal


def test_perfect_writing_has_no_errors(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(self: Evaluator, samples: list, options: object) -> list[str]:
        captions = {self.store.sample_id(int(i)): self.caption(i) for i in self.store.split_samples("train")}
        return [captions[sample.name.partition("/")[2]] for sample in samples]

    monkeypatch.setattr(Evaluator, "write_text", told)
    found = transcription(evaluator, "train")
    assert found["A"]["wer"] == found["A+I"]["wer"] == 0.0
    assert found["constant_caption"]["wer"] > 0.5


def test_figures_are_all_there(evaluator: Evaluator) -> None:
    found = transcription(evaluator, "train", limit=5)
    assert found["A"]["samples"] == 5
    assert set(found["A"]) == {"wer", "cer", "samples", "references_beyond_model", "figures"}
    gallery = evaluator.samples_with("train", (TEXT, AUDIO), 5, 1)
    lengths = evaluator.store.text_lengths[evaluator.store.rows[gallery, TEXT]]
    assert found["A"]["references_beyond_model"] == (lengths > evaluator.config.model.max_text_tokens).sum() > 0
    for name, others in (("A", {"another_audio"}), ("A+I", {"another_audio", "another_image"}), ("I", {"another_image"})):
        assert set(found[name]["figures"]["wer"]["controls"]) == {*others, "constant_caption"}
    assert "ignored_words" not in found


def test_ignored_words_count_on_neither_side(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluator.samples_with("train", (TEXT, IMAGE), 2)[0]
    monkeypatch.setattr(
        Evaluator, "caption", lambda self, index: "woman firefighter: dark skin tone" if index == first else "man walking"
    )
    monkeypatch.setattr(Evaluator, "write_text", lambda self, samples, options: ["man astronaut light skin tone", "walking"])
    ignored = frozenset(["woman", "man", "dark", "light", "skin", "tone"])
    found = transcription(evaluator, "train", inputs=("I",), limit=2, ignored_words=ignored)
    assert found["I"]["wer"] == pytest.approx(4 / 7)
    assert found["I"]["wer_of_other_words"] == pytest.approx(1 / 2)


def test_an_input_that_no_sample_has_is_left_out_and_a_store_without_any_is_refused(
    evaluator: Evaluator, without_audio: Evaluator
) -> None:
    found = transcription(without_audio, "valid")
    assert "I" in found and not {"A", "A+I"} & set(found)
    assert not any("audio" in line for line in transcription_lines(found))
    with pytest.raises(UserError, match=r'split "valid" has text and an input to write it from \(A\)'):
        transcription(without_audio, "valid", inputs=("A",))
    with pytest.raises(UserError, match='no sample of split "valid" has text and'):
        transcription(Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, TEXT)), "valid")


def test_one_sample_has_nobody_elses_audio_to_hear(evaluator: Evaluator) -> None:
    controls = transcription(evaluator, "valid", limit=1)["A"]["figures"]["wer"]["controls"]
    assert set(controls) == {"constant_caption"}


def test_captions_without_a_word_have_no_error_rate() -> None:
    with pytest.raises(UserError, match="no caption has a word left"):
        word_error_rate(["!", "…"], ["a", "b"])
