"""Evaluator: a trained model together with the store that it is evaluated on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.modalities import SUBSETS, TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.samples import SampleReader
from opt_ds.errors import UserError
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.model.opt import OPT
from opt_ds.store.reader import FeatureStore

if TYPE_CHECKING:
    from opt_ds.training.distributed import ProcessGroup

__all__ = ["SUBSETS", "Evaluator"]

_NAMES = ("text", "an image", "audio")


def samples_with(
    store: FeatureStore, split: str, modalities: Sequence[int], limit: int | None = None, seed: int = 1
) -> np.ndarray:
    """Return the samples of a split that have these modalities.

    Args:
        store: The store.
        split: Name of the split.
        modalities: Modality numbers; each sample must have all of them.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice if there are more samples than `limit`.

    Returns:
        int64 sample indices, in store order.
    """
    samples = store.split_samples(split)
    samples = samples[(store.rows[samples][:, list(modalities)] >= 0).all(1)]
    return seeded_choice(samples, limit, seed)


def held_out_splits(store: FeatureStore) -> list[str]:
    """Return the default splits to evaluate on.

    These are the splits whose names begin with "test" ("test_variant" first: the emoji corpus's unseen variants of
    known concepts), otherwise the validation split. Raise UserError for a store with neither.
    """
    there = [name for name in store.description.split_names if len(store.split_samples(name))]
    tests = sorted((name for name in there if name.startswith("test")), key=lambda name: (name != "test_variant", name))
    found = tests or [name for name in there if name == "valid"]
    if not found:
        raise UserError(
            f'{store.path}: it has no split "valid" and none that begins with "test": choose one with --split: '
            f"{', '.join(there) or 'none has a sample'}"
        )
    return found


def seeded_choice(samples: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Return at most `limit` of these samples, in their order (None: all)."""
    if limit is None or len(samples) <= limit:
        return samples
    return np.sort(np.random.default_rng(seed).permutation(samples)[:limit])


class Evaluator(ModelRunner):
    """Evaluation of one model on one store."""

    def __init__(
        self,
        model: OPT,
        config: Config,
        store: FeatureStore,
        device: torch.device | str = "cpu",
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__(model, config, store.description.tokenizer, store.tokenizer_folder, device, group)
        self.store = store
        self.reader = SampleReader(config, [store])

    def samples_with(self, split: str, modalities: Sequence[int], limit: int | None = None, seed: int = 1) -> np.ndarray:
        """Return the samples of a split that have these modalities (see the function of the same name)."""
        return samples_with(self.store, split, modalities, limit, seed)

    def has_samples(self, split: str, modalities: Sequence[int]) -> bool:
        """Return whether a sample of the split has these modalities."""
        return len(self.samples_with(split, modalities)) > 0

    def require_samples(self, split: str, modalities: Sequence[int], limit: int | None = None, seed: int = 1) -> np.ndarray:
        """Return the result of `samples_with`. Raise UserError with the split and the modalities if it is empty."""
        samples = self.samples_with(split, modalities, limit, seed)
        if not len(samples):
            wanted = " and ".join(_NAMES[modality] for modality in sorted(set(modalities)))
            raise UserError(f'{self.store.path}: no sample of split "{split}" has {wanted}: choose another split')
        return samples

    def read(self, index: int, modalities: Sequence[int]) -> Sample:
        """Return a sample of the store, not truncated, with only these modalities."""
        return self.reader.read_unmasked(0, int(index), tuple(modalities))

    def captions_beyond_model(self, samples: np.ndarray) -> int:
        """Return how many of these samples' texts are longer than the model can write.

        The limit is model.max_text_tokens WordPieces.
        """
        rows = self.store.rows[samples, TEXT]
        return int((self.store.text_lengths[rows[rows >= 0]] > self.config.model.max_text_tokens).sum())

    def caption(self, index: int) -> str:
        """Return the original caption, before tokenisation."""
        return self.store.caption(int(self.store.rows[index, TEXT]))
