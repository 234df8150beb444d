"""Text: WordPiece tokens, embedded as in BERT, between [CLS] and [SEP].

[CLS] is present in every sample, with or without text. It is a text row.

Legend: n text rows (or tokens of one sample), e width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from opt_ds.config import DataConfig, ModelConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.modality import Items, Modality, ModalityBatch
from opt_ds.nn.transformer import LayerNorm
from opt_ds.nn.word_embedding import WordEmbedding
from opt_ds.ops.keyed import keyed_choice, keyed_uniform
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import Dims, StoreDescription, TokenizerDescription

MASK_TOKEN_FRACTION, RANDOM_TOKEN_FRACTION = 0.8, 0.1  # the rest is unchanged (Devlin et al. 2019, §3.1)


@dataclass
class TextItems(Items):
    """Tokens of one sample, without [CLS] and [SEP]."""

    ids: np.ndarray  # int64 [n], with masked tokens replaced
    original: np.ndarray | None = None  # int64 [n], before masking; None: nothing is masked

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class TextBatch(ModalityBatch):
    """Text rows of a batch."""

    ids: torch.Tensor  # int64 [n], with [CLS] and [SEP]
    positions: torch.Tensor  # int64 [n]


class Text(Modality[TextItems, TextBatch]):
    """Text."""

    name = "text"
    item_word, row_word = "tokens", "texts"
    embedder = "text"
    limit_key = "max_text_tokens"
    special_rows = 2

    @property
    def limit(self) -> int:
        """Longest text, in tokens."""
        return self.model.max_text_tokens

    def store_sizes(self, store: StoreDescription) -> dict[str, int]:
        """Return the size of the vocabulary."""
        return {"vocab_size": store.dims.vocab_size}

    def stored_bytes(self, dims: Dims) -> int:
        """Return the bytes of a token."""
        return 4

    def read(self, store: FeatureStore, row: int, data: DataConfig | None = None, key: int | None = None) -> TextItems:
        """Return the first tokens of a text."""
        return self.items_of(store.text(row))

    def items_of(self, features: np.ndarray) -> TextItems:
        """Return the first tokens of int [n] token ids."""
        return TextItems(features[: self.limit].astype(np.int64))

    def mask(self, items: TextItems, store: FeatureStore, probability: float, span: int, key: int) -> None:
        """Choose tokens and replace them (see `corrupt_tokens`)."""
        super().mask(items, store, probability, span, key)
        assert items.masked is not None
        description = store.description
        ordinary = ordinary_ids(description.tokenizer, description.dims.vocab_size)
        items.original = items.ids
        items.ids = corrupt_tokens(items.ids, items.masked, description.tokenizer.mask_id, ordinary, key)

    def num_rows(self, items: TextItems | None) -> int:
        """Return the number of tokens with [CLS] and [SEP]; 1 for [CLS] alone."""
        return 1 if items is None else len(items) + self.special_rows

    def collate(self, items: Sequence[TextItems | None], layout: Layout) -> TextBatch:
        """Return the tokens of all samples, with [CLS], and [SEP] after texts."""
        tokens = [
            np.array([layout.cls_id]) if text is None else np.concatenate([[layout.cls_id], text.ids, [layout.sep_id]])
            for text in items
        ]
        return TextBatch(
            index=torch.from_numpy(layout.index_of(self.number)),
            ids=join(tokens, np.int64),
            positions=join([np.arange(len(t)) for t in tokens], np.int64),
        )

    def make_embedder(self) -> nn.Module:
        """Return BERT's embedding."""
        return TextEmbedder(self.model)

    def embed(
        self, embedder: nn.Module, batch: TextBatch, features: torch.Tensor | None, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings of the text rows."""
        return embedder(batch.ids, batch.positions, type_e)


def read_text(store: FeatureStore, row: int, max_tokens: int) -> np.ndarray:
    """Return the first `max_tokens` WordPieces of a text row, int64 [n]."""
    return store.text(row)[:max_tokens].astype(np.int64)


@cache
def ordinary_ids(tokenizer: TokenizerDescription, vocab_size: int) -> np.ndarray:
    """Return the ids that may replace a masked token: all ids except the special ones."""
    t = tokenizer
    return np.setdiff1d(np.arange(vocab_size), [t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id])


def corrupt_tokens(
    tokens: np.ndarray, masked: np.ndarray, mask_id: int, ordinary_ids: np.ndarray, *keys: int | str
) -> np.ndarray:
    """Return the tokens with the masked ones replaced.

    A masked token becomes [MASK] (80 %) or a random token (10 %), or it is kept (10 %).

    Args:
        tokens: int64 [n].
        masked: bool [n].
        mask_id: Id of [MASK].
        ordinary_ids: Ids of the tokens that may replace a masked one.
        *keys: Keys of the random choices.

    Returns:
        int64 [n].
    """
    index = np.arange(len(tokens))
    uniform = keyed_uniform(*keys, "share", index)
    random_tokens = ordinary_ids[keyed_choice(len(ordinary_ids), *keys, "token", index)]
    replacement = np.where(uniform < MASK_TOKEN_FRACTION, mask_id, tokens)
    randomised = (uniform >= MASK_TOKEN_FRACTION) & (uniform < MASK_TOKEN_FRACTION + RANDOM_TOKEN_FRACTION)
    replacement = np.where(randomised, random_tokens, replacement)
    return np.where(masked, replacement, tokens).astype(np.int64)


class TextEmbedder(nn.Module):
    """Token + position + type -> LN (BERT's embedding)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = WordEmbedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_text_tokens + Text.special_rows, config.hidden_size)
        self.norm = LayerNorm(config)

    def forward(self, token_ids_n: torch.Tensor, positions_n: torch.Tensor, type_e: torch.Tensor) -> torch.Tensor:
        """Return embeddings [n, e]."""
        return self.norm(self.word(token_ids_n) + self.position(positions_n) + type_e)
