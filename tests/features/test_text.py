"""Tokenizers: trained ones are reproducible, foreign ones are Hugging Face's own, unfit ones are refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from opt_ds.errors import UserError
from opt_ds.features.text import TextExtractor, copy_tokenizer, train_wordpiece
from opt_ds.store.files import folder_sha256
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, load_tokenizer, save_wordpiece

CAPTIONS = [
    f"the {colour} {thing} is éclair-like" for colour in ("red", "green", "blue") for thing in ("cat", "cart", "car")
]


def test_training_is_reproducible_in_other_processes_and_orders(tmp_path: Path) -> None:
    train_wordpiece(CAPTIONS, 60, tmp_path / "here")
    program = (
        "import sys; from pathlib import Path; from opt_ds.features.text import train_wordpiece\n"
        "train_wordpiece(eval(sys.argv[1])[::-1], 60, Path(sys.argv[2]))"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, repr(CAPTIONS), str(tmp_path / name)], check=True)
        assert folder_sha256(tmp_path / name) == folder_sha256(tmp_path / "here")


def test_trained_tokens_round_trip_and_any_unicode_is_taken(tmp_path: Path) -> None:
    train_wordpiece(CAPTIONS, 80, tmp_path / "tok")
    extractor = TextExtractor(tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    tokens, odd, empty = extractor.extract(["The RED cat", "猫 \u202e 🐈 \x00 a", "  "])
    assert tokenizer.decode(tokens) == "the red cat"
    assert tokens.dtype == "int32"
    assert set(odd) <= set(range(extractor.dim))
    assert len(empty) == 0
    assert tokenizer("the red cat").input_ids[0] != tokenizer.cls_token_id  # [CLS] and [SEP] are training's to add
    assert extractor.dim <= 80


def test_a_vocabulary_too_small_for_the_letters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="characters alone require"):
        train_wordpiece(CAPTIONS, 8, tmp_path / "tok")


def test_a_bert_folder_gives_hugging_faces_tokens(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "un", "##aff", "##able", ",", "é"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words) + "\n")
    copy_tokenizer(tmp_path / "hf", tmp_path / "from_vocab")
    theirs = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    theirs.save_pretrained(tmp_path / "saved")
    copy_tokenizer(tmp_path / "saved", tmp_path / "from_saved")
    for text in ("Unaffable, AB é zzz", "a, un-a [a]"):
        expected = theirs(text, add_special_tokens=False).input_ids
        for folder in ("from_vocab", "from_saved"):
            assert TextExtractor(tmp_path / folder).extract([text])[0].tolist() == expected


def test_every_line_of_a_vocabulary_file_is_one_token_whatever_letters_are_in_it(tmp_path: Path) -> None:
    """BERT's weights know a token by its line alone."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "a\x85b", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    copy_tokenizer(tmp_path, tmp_path / "copied")
    assert TextExtractor(tmp_path / "copied").extract(["cat"])[0].tolist() == [7]
    assert (tmp_path / "copied" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1] == words


def test_a_folder_of_tokenizer_json_alone_is_loaded_again(tmp_path: Path) -> None:
    train_wordpiece(CAPTIONS, 80, tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    (tmp_path / "whole" / "tokenizer.json").rename(tmp_path / "alone" / "tokenizer.json")
    copy_tokenizer(tmp_path / "alone", tmp_path / "copied")
    tokenizer = load_tokenizer(tmp_path / "copied")
    assert tokenizer.decode(tokenizer("The RED cat").input_ids) == "the red cat"
    assert tokenizer.mask_token == "[MASK]"


def test_unfit_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        copy_tokenizer(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match=r"neither tokenizer.json nor vocab.txt"):
        copy_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"\[PAD\] is not in the vocabulary"):
        copy_tokenizer(tmp_path, tmp_path / "out")


_WORDS = ["a", "cat", "sep", "mask", "pad", "cls", "unk", "[", "]", "SEP", "CLS", "MASK", "PAD"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_special_tokens_in_a_caption_are_ordinary_text(tmp_path: Path, lowercase: bool) -> None:
    save_wordpiece(build_wordpiece([*SPECIAL_TOKENS.values(), *_WORDS], lowercase=lowercase), tmp_path, lowercase=lowercase)
    extractor = TextExtractor(tmp_path)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special = {vocabulary.token_to_id(token) for token in SPECIAL_TOKENS.values()} - {vocabulary.token_to_id("[UNK]")}
    for token in SPECIAL_TOKENS.values():
        for caption in (f"a {token} cat", token, f"{token}{token}", f"a{token}cat", token.lower()):
            (ids,) = extractor.extract([caption])
            assert len(ids) and not special & set(ids.tolist()), caption
    ids, plain = extractor.extract(["a [SEP] cat", "a [ SEP ] cat"])
    assert np.array_equal(ids, plain)


def test_special_tokens_stay_text_with_a_tokenizer_that_splits_at_spaces_alone(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    vocabulary = {token: id for id, token in enumerate([*SPECIAL_TOKENS.values(), *_WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(["[SEP]"])  # as an ordinary added token
    save_wordpiece(tokenizer, tmp_path)
    extractor = TextExtractor(tmp_path)
    (ids,) = extractor.extract(["a [SEP] cat [MASK]"])
    assert [tokenizer.id_to_token(id) for id in ids] == ["a", "[", "SEP", "]", "cat", "[", "MASK", "]"]


def test_ordinary_captions_keep_their_ids(tmp_path: Path) -> None:
    captions = ["A cat, on [a] mat!", "日本 cats", "it's 5 o'clock…", "x [sep] y", "cafe\u0301 [ ] mask"]
    train_wordpiece(captions, 120, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["o'clock"])
    tokenizer.add_special_tokens(["[EXTRA]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for ids, caption in zip(TextExtractor(tmp_path, "none").extract(captions), captions, strict=True):
        assert ids.tolist() == tokenizer.encode(caption, add_special_tokens=False).ids
