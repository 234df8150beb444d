"""Text generation in fine-tuning: the text decoder generates the sample's text from the other inputs.

The inputs are neither masked nor randomly dropped. The loss is that of `opt_ds.tasks.reconstruct`.
"""

from typing import Any

import numpy as np
from torch import nn

from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart, Candidates, SampledTasks
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, LossTerm, Task
from opt_ds.tasks.reconstruct import ModalityReconstruction, set_text_targets


class TextWriting(Task):
    """Text generation. Its targets, batch and loss are those of the reconstruction."""

    name = "write"
    about = "Text writing in fine-tuning."
    options = None
    sampled = False
    fine_tunes = ("transcription", "captioning")
    fine_tuned_loss = "dtr"
    target_words = " and text to write"

    def has_target(self, store: FeatureStore, samples: np.ndarray) -> np.ndarray:
        """Return which samples have text."""
        return store.rows[samples, TEXT] >= 0

    def assign_for_finetuning(
        self, candidates: Candidates, sampled: SampledTasks, inputs: np.ndarray, replaced: np.ndarray, derived: Any
    ) -> None:
        """Set the text of every sample as its target."""
        set_text_targets(candidates, sampled, np.ones(len(sampled.task), dtype=bool))

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the decoder targets of the sample."""
        ModalityReconstruction(self.config).add_targets(sample, samples, index, store)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return no terms: the reconstruction's `dtr` covers these targets."""
        return {}
