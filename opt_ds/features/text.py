"""Captions to WordPiece tokens, with the tokenizer of a Hugging Face folder or one trained on the corpus."""

import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, checked_tokenizer, describe_tokenizer, save_wordpiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD", "none")
# Characters that are rare in the captions may become [UNK], so that one multi-script caption does not stop a corpus.
_RARE_FRACTION = 0.005
_BRACKETED = re.compile(r"\[(\w+)\]")


def normalise_unicode(text: str, form: str) -> str:
    """Return the text in a Unicode normal form; "none" returns it unchanged."""
    return text if form == "none" else unicodedata.normalize(form, text)  # type: ignore[arg-type]


def train_wordpiece(captions: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a lower-casing BERT WordPiece tokenizer on captions and save it in Hugging Face's layout.

    The result depends only on the multiset of captions and on the size. Characters that do not fit into half of the
    vocabulary are dropped, the rarest first. If more than 0.5 % of all character occurrences would be dropped, none
    are; if the vocabulary is then too large, UserError is raised.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(SPECIAL_TOKENS.values())
    captions = sorted(captions)
    # The trainer breaks ties by piece number, and it numbers "##x" pieces in the order of a randomly seeded hash table.
    # Passing these pieces as special tokens makes training reproducible.
    captions = _without_rare_letters(captions, tokenizer, vocab_size)
    inner = _inner_letters(captions, tokenizer)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *inner], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the characters alone require {tokenizer.get_vocab_size()}: use a larger value"
        )
    # WordPiece depends on the set of pieces only. Sorting them makes the ids independent of the trainer's internals.
    pieces = sorted(set(tokenizer.get_vocab()) - set(special))
    save_wordpiece(build_wordpiece([*special, *pieces]), folder)


def _without_rare_letters(captions: list[str], tokenizer: "Tokenizer", vocab_size: int) -> list[str]:
    """Return the normalised captions with a space instead of each rare character.

    Return them unchanged if too many characters would be lost.
    """
    plain = [tokenizer.normalizer.normalize_str(caption) for caption in captions]
    counts = Counter("".join(plain))
    counts.pop(" ", None)
    most = max(1, (vocab_size - len(SPECIAL_TOKENS)) // 4)  # a character needs two pieces, x and ##x
    ranked = sorted(counts, key=lambda letter: (-counts[letter], letter))
    rare = ranked[most:]
    if not rare or sum(counts[letter] for letter in rare) > _RARE_FRACTION * counts.total():
        return captions
    return [text.translate({ord(letter): " " for letter in rare}) for text in plain]


def _inner_letters(captions: Iterable[str], tokenizer: "Tokenizer") -> list[str]:
    """Return "##x" for every character x that occurs inside a word, sorted."""
    letters: set[str] = set()
    for caption in captions:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption)):
            letters.update(word[1:])
    return sorted(f"##{letter}" for letter in letters)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a Hugging Face folder. Raise UserError if it has no fast WordPiece tokenizer."""
    if not source.is_dir():
        raise UserError(f"--text {source}: no such folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not (source / "tokenizer.json").is_file():
        if not (source / "vocab.txt").is_file():
            raise UserError(
                f"--text {source}: neither tokenizer.json nor vocab.txt there: give a Hugging Face BERT folder"
            )
        # splitlines() would also split at characters such as U+2028, which would shift the ids of all later tokens.
        vocabulary = (source / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for token in SPECIAL_TOKENS.values():
            if token not in vocabulary:
                raise UserError(f"--text {source}: {token} is not in the vocabulary: use a BERT WordPiece tokenizer")
        lowercase = not any(piece[:1].isupper() for piece in vocabulary)
        save_wordpiece(build_wordpiece(vocabulary, lowercase=lowercase), folder, lowercase=lowercase)
        return
    describe_tokenizer(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class TextExtractor:
    """Tokenises captions with the tokenizer in a folder, after conversion to a Unicode normal form.

    [CLS] and [SEP] are added in training. Truncation, and its count, is the task of the pipeline.
    """

    name = "wordpiece"

    def __init__(self, folder: Path, unicode_form: str = "NFC") -> None:
        self._form = unicode_form
        self._tokenizer = checked_tokenizer(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a caption is ordinary text
        self._description, self.dim = describe_tokenizer(folder)
        ids = self._description
        self._controls = {ids.pad_id, ids.cls_id, ids.sep_id, ids.mask_id}
        highest = max(self._tokenizer.get_vocab().values())
        if highest >= self.dim:
            raise UserError(f"{folder}: {self.dim} tokens with ids up to {highest}: number them from 0 without gaps")

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the tokens depend on."""
        return {
            "name": self.name,
            "vocab_size": self.dim,
            "unicode_form": self._form,
            "package": "tokenizers",
            "version": version("tokenizers"),
            "weights_sha256": self._description.sha256,
        }

    def extract(self, inputs: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each caption, int32 [L]."""
        texts = [normalise_unicode(text, self._form) for text in inputs]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._as_text(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def _as_text(self, text: str, ids: list[int]) -> np.ndarray:
        """Return the ids of a text without control tokens.

        A tokenizer that splits at spaces only would map "[SEP]" to one.
        """
        if self._controls.intersection(ids):
            spaced = _BRACKETED.sub(r"[ \1 ]", text)
            ids = self._tokenizer.encode(spaced, add_special_tokens=False).ids
            ids = [self._description.unk_id if id in self._controls else id for id in ids]
        return np.array(ids, "int32")
