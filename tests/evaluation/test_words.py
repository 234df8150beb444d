"""Test word metrics: scripts without spaces are scored fairly, and texts with spaces as by the libraries alone."""

import unicodedata

import jiwer
import pytest

from opt_ds.evaluation.captioning import scores
from opt_ds.evaluation.transcription import character_error_rate, word_error_rate
from opt_ds.evaluation.words import Words, normalize

SPACELESS = {
    "Chinese": (["一只红色的猫在垫子上。", "两只狗在雪地里奔跑！"], "一只黑色的猫在垫子上"),
    "Japanese": (["赤い猫がマットの上にいます。", "二匹の犬が雪の中を走る。"], "赤い犬がマットの上にいます"),
    "Thai": (["แมวสีแดงอยู่บนเสื่อ", "สุนัขสองตัววิ่งในหิมะ"], "แมวสีดำอยู่บนเสื่อ"),
    "Lao": (["ແມວສີແດງຢູ່ເທິງເສື່ອ", "ໝາສອງໂຕແລ່ນໃນຫິມະ"], "ແມວສີດຳຢູ່ເທິງເສື່ອ"),
    "Khmer": (["ឆ្មាក្រហមនៅលើកន្ទេល", "ឆ្កែពីរក្បាលរត់ក្នុងព្រិល"], "ឆ្មាខ្មៅនៅលើកន្ទេល"),
    "Burmese": (["ကြောင်နီသည်ဖျာပေါ်တွင်ရှိသည်", "ခွေးနှစ်ကောင်နှင်းထဲပြေးသည်"], "ကြောင်နက်သည်ဖျာပေါ်တွင်ရှိသည်"),
}
SPACED = {
    "English": ["A red cat on the mat.", "Two dogs run in snow, fast!"],
    "Hindi": ["एक लाल बिल्ली चटाई पर है।", "दो कुत्ते बर्फ में दौड़ते हैं।"],
    "Arabic": ["قطة حمراء على السجادة الكبيرة", "كلبان يركضان في الثلج"],
    "Hebrew": ["חתול אדום על המחצלת", "שני כלבים רצים בשלג"],
    "Korean": ["빨간 고양이가 매트 위에 있다", "개 두 마리가 눈 속을 달린다"],
}


@pytest.mark.parametrize("language", SPACELESS)
def test_scripts_without_spaces_are_judged_by_character(language: str) -> None:
    references, near = SPACELESS[language]
    texts = [normalize(text) for text in references]
    perfect = scores([[text] for text in texts], texts)
    assert perfect == {
        "bleu_4": pytest.approx(100), "cider": pytest.approx(10), "rouge_l": 1, "bleu_sacrebleu": pytest.approx(100),
    }  # fmt: skip
    good, bad = (scores([[text] for text in texts], [normalize(near), other]) for other in (texts[1], ""))
    assert 100 > good["bleu_4"] > bad["bleu_4"] and 10 > good["cider"] > bad["cider"] > 0
    assert 100 > good["bleu_sacrebleu"] > bad["bleu_sacrebleu"] and 1 > good["rouge_l"] > bad["rouge_l"]
    assert word_error_rate(references, references) == character_error_rate(references, references) == 0
    assert 0 < word_error_rate(references[:1], [near]) < 0.5, "one wrong word is not a wrong sentence"
    assert Words.of(texts).name.startswith("words; characters of ")


@pytest.mark.parametrize("language", SPACED)
def test_languages_with_spaces_are_judged_by_the_libraries_words(language: str) -> None:
    import sacrebleu

    texts = [normalize(text) for text in SPACED[language]]
    written = [" ".join(texts[0].split()[1:]), texts[1]]
    words = Words.of(texts)
    assert words.name == "words" and [words.spaced(text) for text in texts] == texts
    bleu = sacrebleu.corpus_bleu(written, [texts], tokenize="none", smooth_method="none").score
    assert scores([[text] for text in texts], written)["bleu_4"] == pytest.approx(bleu)
    assert word_error_rate(SPACED[language], written) == jiwer.wer(texts, written)
    assert character_error_rate(SPACED[language], written) == jiwer.cer(texts, written)


def test_words_of_other_scripts_stay_whole_within_a_script_without_spaces() -> None:
    words = Words.of([normalize("我有3台MacBook Pro电脑")])
    assert words.split(normalize("我有3台MacBook Pro电脑")) == ["我", "有", "3", "台", "macbook", "pro", "电", "脑"]
    assert words.unspaced("我 有3台 macbook pro 电脑") == "我有3台macbook pro电脑"
    assert word_error_rate(["日本 旗"], ["日本旗"]) == character_error_rate(["日本 旗"], ["日本旗"]) == 0


def test_the_references_decide_what_is_cut() -> None:
    assert word_error_rate(["a flag of japan"], ["a flag of 日本"]) == pytest.approx(1 / 4)
    assert Words.of(["日本"]).split("カメラ") == ["カ", "メ", "ラ"], "kana belong to Han"
    assert Words.of(["ไทย"]).split("日本 ไท") == ["日本", "ไ", "ท"]


@pytest.mark.parametrize("text", ["Café à la crème", "한국어 글", "が ぎ パン", "हिन्दी में ज़रा", "Tiếng Việt", "ที่นี่"])
def test_composed_and_decomposed_texts_are_equal(text: str) -> None:
    nfc, nfd = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert normalize(nfc) == normalize(nfd)
    assert word_error_rate([nfc], [nfd]) == character_error_rate([nfc], [nfd]) == 0


def test_marks_stay_with_their_letters() -> None:
    text = normalize("ที่นี่")
    assert Words.of([text]).split(text) == ["ที่", "นี่"]


def test_full_width_punctuation_is_no_word() -> None:
    assert normalize("「猫」、犬。（赤）！？…") == "猫 犬 赤"
    assert word_error_rate(["猫、犬。"], ["猫 犬！"]) == 0
