"""The store's WordPiece tokenizer: a folder that Hugging Face's fast BERT tokenizer loads without network access."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ds.errors import UserError
from opt_ds.store.files import folder_sha256, write_json
from opt_ds.store.foreign import check_inside, read_json_object
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
_LONGEST_WORD = 1000  # characters; the time to match pieces grows with the square of the length
MAX_TOKENIZER_BYTES = 32 << 20  # BERT's multilingual tokenizer has 3 MiB
_BERT = "use a BERT WordPiece tokenizer"
# Allowed components of tokenizer.json: they run in linear time and contain no regular expressions from the file.
_ALLOWED = {
    "normalizer": ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip", "Sequence"),
    "pre_tokenizer": ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Sequence"),
    "post_processor": ("TemplateProcessing", "BertProcessing", "Sequence"),
    "decoder": ("WordPiece", "Sequence"),
}
_INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"}


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


def checked_tokenizer(folder: Path) -> "Tokenizer":
    """Load `folder/tokenizer.json`, of unknown origin, if it is a BERT WordPiece tokenizer of allowed components.

    Raise a one-line UserError if the file is missing, damaged, too large or a link out of the folder, if the tokenizer
    is of another kind, or if a component has its own regular expression.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: no tokenizer.json there: give a folder saved by a fast Hugging Face tokenizer")
    check_inside(folder, file)
    problem = _problem_in(read_json_object(file, _BERT, MAX_TOKENIZER_BYTES))
    if problem:
        raise UserError(f"{file}: {problem}: {_BERT}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise UserError(f"{file}: not readable as a tokenizer: {_BERT}") from None  # Rust's own panics are no Exception
    if type(tokenizer.model).__name__ != "WordPiece":
        raise UserError(f"{file}: not a WordPiece tokenizer: {_BERT}")
    return tokenizer


def _problem_in(fields: dict[str, Any]) -> str | None:
    for name in _ALLOWED:
        problem = _piece_problem(name, fields.get(name))
        if problem:
            return problem
    model = fields.get("model")
    # Old files lack the type of a WordPiece model.
    if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece":
        return "not a WordPiece tokenizer"
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        return "damaged, no vocabulary"
    ids = list(vocabulary.values())
    if not all(type(index) is int for index in ids) or sorted(ids) != list(range(len(ids))):
        return f"damaged, its {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}"
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 1 <= longest <= _LONGEST_WORD:
        return f"max_input_chars_per_word is {longest!r}, not 1 to {_LONGEST_WORD}: a longer word would take hours"
    added = fields.get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "damaged, added_tokens is no list of tokens"
    return None


def _piece_problem(name: str, piece: Any) -> str | None:
    """Return why a normalizer, pre-tokenizer, post-processor or decoder is not accepted; None if it is."""
    if piece is None:
        return None
    kind = piece.get("type") if isinstance(piece, dict) else None
    if kind not in _ALLOWED[name]:
        return f"{name} {kind!r} is not one that BERT's tokenizers have"
    inner = piece.get(_INNER[name], []) if kind == "Sequence" else []
    if not isinstance(inner, list):
        return f"damaged, {name} is no list"
    return next((problem for problem in (_piece_problem(name, each) for each in inner) if problem), None)


def describe_tokenizer(folder: Path) -> tuple[TokenizerDescription, int]:
    """Return the special ids and the hash of a tokenizer folder, and the size of its vocabulary.

    Raise UserError if the folder has no `tokenizer.json` or one of BERT's five special tokens is missing.
    """
    tokenizer, file = checked_tokenizer(folder), folder / "tokenizer.json"
    ids = {}
    for name, token in SPECIAL_TOKENS.items():
        index = tokenizer.token_to_id(token)
        if index is None:
            raise UserError(f"{file}: token {token} is not in the vocabulary: use a BERT WordPiece tokenizer")
        ids[name.replace("_token", "_id")] = index
    return TokenizerDescription(**ids, sha256=folder_sha256(folder)), tokenizer.get_vocab_size()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder as Hugging Face's fast tokenizer, from local files only.

    Raise UserError like `checked_tokenizer`.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer, file = checked_tokenizer(folder), folder / "tokenizer_config.json"
    check_inside(folder, file)
    config = read_json_object(file, _BERT, MAX_TOKENIZER_BYTES) if file.is_file() else {}
    special = {}
    for name, token in SPECIAL_TOKENS.items():
        found = config.get(name, token)
        content = found.get("content") if isinstance(found, dict) else found
        if not isinstance(content, str) or tokenizer.token_to_id(content) is None:
            raise UserError(f"{file}: {name} is not a token of the vocabulary: {_BERT}")
        special[name] = content
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
