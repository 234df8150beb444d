"""The store's WordPiece tokenizer: a folder that Hugging Face's fast BERT tokenizer loads without any network."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from opt_ds.errors import UserError
from opt_ds.store.files import folder_sha256, write_json
from opt_ds.store.schema import TokenizerDescription

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def build_wordpiece(vocabulary: list[str], *, lowercase: bool = True) -> "Tokenizer":
    """Return a BERT WordPiece tokenizer (normaliser, splitter, decoder) over a vocabulary with the special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


def save_wordpiece(tokenizer: "Tokenizer", folder: Path, *, lowercase: bool = True) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `vocab.txt` in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, **SPECIAL_TOKENS}
    write_json(folder / "tokenizer_config.json", config)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")


def describe_tokenizer(folder: Path) -> tuple[TokenizerDescription, int]:
    """Return the special ids and hash of a tokenizer folder, and its vocabulary's size.

    Raises UserError if the folder has no `tokenizer.json` or lacks one of BERT's five special tokens.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: no tokenizer.json there: give a folder saved by a fast Hugging Face tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    ids = {}
    for name, token in SPECIAL_TOKENS.items():
        index = tokenizer.token_to_id(token)
        if index is None:
            raise UserError(f"{file}: token {token} is not in the vocabulary: use a BERT WordPiece tokenizer")
        ids[name.replace("_token", "_id")] = index
    return TokenizerDescription(**ids, sha256=folder_sha256(folder)), tokenizer.get_vocab_size()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder as Hugging Face's fast tokenizer, from local files only."""
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    special = {name: config.get(name, token) for name, token in SPECIAL_TOKENS.items()}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
