"""Interface of a modality to the step plan, the sample reader, the collator and the model.

A modality is one class in one file (`opt_ds.modalities`). It states how many items of a stored row the model reads, how
its items are read, masked and packed, and how they are embedded. Everything else loops over the modalities of the
model's configuration.

Legend: n items of a sample, t packed rows, e width, v feature width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from opt_ds.config import DataConfig, ModelConfig, Section
from opt_ds.data.layout import Layout
from opt_ds.data.lengths import ModelLengths
from opt_ds.data.masking import masked_items, num_masked
from opt_ds.ops.movable import Movable
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import Dims, StoreDescription


@dataclass
class Items(ABC):
    """The items of one modality in one sample. Subclasses add arrays whose first dimension is n."""

    masked: np.ndarray | None = field(default=None, kw_only=True)  # bool [n]; None: nothing is masked

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def is_masked(self) -> np.ndarray:
        """Which items are masked, bool [n]."""
        return np.zeros(len(self), dtype=bool) if self.masked is None else self.masked


@dataclass
class ModalityBatch(Movable):
    """A modality's rows in a packed batch. Subclasses add tensors; without rows they have length 0."""

    index: torch.Tensor  # int64 [rows], packed positions


AnyItems = TypeVar("AnyItems", bound=Items)
AnyBatch = TypeVar("AnyBatch", bound=ModalityBatch)


class Modality(ABC, Generic[AnyItems, AnyBatch]):
    """A modality of a model. Instances hold the configuration and no state."""

    name: ClassVar[str]  # its group in a store, and its field in a manifest
    item_word: ClassVar[str]  # plural, as in "tokens"
    row_word: ClassVar[str]  # plural of one sample's input, as in "texts"
    embedder: ClassVar[str]  # name of the embedder in the model, a prefix of its parameters
    standardizer: ClassVar[str] = ""  # name of the feature standardisation in the model; "": it has none
    limit_key: ClassVar[str]  # key of the model's configuration that limits the items
    #: Further keys of the model's configuration that change none of its weights.
    free_keys: ClassVar[tuple[str, ...]] = ()
    #: Configuration section `model.<name>` of a modality of another package. None: its keys are those of `model` itself.
    options: ClassVar[type[Section] | None] = None
    about: ClassVar[str] = ""  # one sentence for the configuration reference, if it has a section
    special_rows: ClassVar[int] = 0  # packed rows of a sample that are no items and belong to this modality

    def __init__(self, model: ModelConfig, number: int) -> None:
        self.model = model
        self.number = number  # column of every array over the modalities

    # ---- the step plan

    @property
    @abstractmethod
    def limit(self) -> int:
        """Largest number of items that the model reads."""

    @property
    def stack(self) -> int:
        """Number of consecutive stored items that form one item of the model."""
        return 1

    @property
    def lengths_key(self) -> list[Any]:
        """What `lengths` depends on besides the store; JSON."""
        return [self.name, self.limit, self.stack]

    def lengths(self, store: FeatureStore) -> ModelLengths:
        """Return the number of items that the model reads of each row of a store."""
        return ModelLengths(store.lengths(self.name), self.limit, self.stack)

    def limit_note(self, dims: Sequence[Dims]) -> str:
        """Return a note on the limit for the report of truncated rows, such as its duration. `dims` are the stores'."""
        return ""

    def count_masked(self, lengths: np.ndarray | int, probability: float) -> np.ndarray:
        """Return how many items are masked for each number of items, int64."""
        return num_masked(lengths, probability)

    @property
    def projected_dim(self) -> int:
        """Dimensions of an item that the embedder projects to the width. They determine its operations."""
        return 0

    def store_sizes(self, store: StoreDescription) -> dict[str, int]:
        """Return key of the model's configuration -> value that a store requires, if the store has the modality."""
        return {}

    def stored_bytes(self, dims: Dims) -> int:
        """Return the bytes that are read from a store per stored item."""
        return 0

    # ---- samples

    @abstractmethod
    def read(self, store: FeatureStore, row: int, data: DataConfig | None = None, key: int | None = None) -> AnyItems:
        """Return the items of a row, truncated to the limit and unmasked.

        Args:
            store: The store.
            row: The row.
            data: The configuration of the data, for augmentation. None: no augmentation.
            key: Key of the augmentation. None: no augmentation, as in validation.
        """

    @abstractmethod
    def items_of(self, features: Any) -> AnyItems:
        """Return the items of what the modality's extractor yields for a raw file, truncated to the limit."""

    def mask(self, items: AnyItems, store: FeatureStore, probability: float, span: int, key: int) -> None:
        """Mask items in place.

        Args:
            items: The items, which are changed.
            store: Their store.
            probability: Fraction of the items that are masked.
            span: Number of neighbouring items that are masked together, for modalities that have spans.
            key: Key of the random choice.
        """
        count = int(self.count_masked(len(items), probability))
        items.masked = masked_items(len(items), count, key, self.number)

    # ---- packed batches

    def num_rows(self, items: AnyItems | None) -> int:
        """Return the number of packed rows of a sample with these items (None: the modality is absent)."""
        return 0 if items is None else len(items)

    @abstractmethod
    def collate(self, items: Sequence[AnyItems | None], layout: Layout) -> AnyBatch:
        """Return the rows of all samples of a batch. An entry is None if the sample lacks the modality."""

    # ---- the model

    @abstractmethod
    def make_embedder(self) -> nn.Module:
        """Return the embedder, which `embed` calls."""

    def make_standardizer(self) -> nn.Module | None:
        """Return the standardisation of the features. It must be there if `standardizer` names it."""
        return None

    def features(self, batch: AnyBatch) -> torch.Tensor | None:
        """Return the stored features of the rows, float16 [rows, v], or None if it has none."""
        return None

    @abstractmethod
    def embed(
        self, embedder: nn.Module, batch: AnyBatch, features: torch.Tensor | None, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings of the rows, [rows, e].

        Args:
            embedder: The result of `make_embedder`.
            batch: The rows.
            features: Standardised features, float32 [rows, v], if the modality has a standardizer.
            type_e: The type embedding of the modality.
        """

    def initialized_parts(self, embedder: Any) -> tuple[nn.Parameter | None, list[nn.Linear]]:
        """Return the embedder's vector of masked items and the projections of its features, if it has any."""
        return None, []


def modalities_of(model: ModelConfig) -> tuple[Modality, ...]:
    """Return the modalities of a model in the order of their numbers."""
    return tuple(unit(model, number) for number, unit in enumerate(model.modalities.values()))
