"""Nearest samples of a store, by the cosine similarity of frozen [CLS] vectors that are computed once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.serving.session import Session
from opt_ds.store.processor_files import fingerprint_differences
from opt_ds.store.verify import open_store


@dataclass(frozen=True)
class Neighbour:
    """A sample of the store with its caption ('' if it has none) and its cosine similarity."""

    index: int
    name: str
    caption: str
    cosine: float


class Neighbours:
    """Vectors of a split's samples, each encoded with all its modalities."""

    def __init__(self, evaluator: Evaluator, split: str, limit: int = 2000) -> None:
        self._evaluator = evaluator
        self.samples = evaluator.samples_with(split, (), limit)
        self._unit_ne = unit_cls(evaluator, [evaluator.read(i, (TEXT, IMAGE, AUDIO)) for i in self.samples])

    def nearest(self, sample: Sample, count: int = 5) -> list[Neighbour]:
        """Return the `count` nearest samples, nearest first."""
        cosine_n = self._unit_ne @ unit_cls(self._evaluator, [sample])[0]
        store = self._evaluator.store
        found = []
        for place in np.argsort(-cosine_n)[:count]:
            index = int(self.samples[place])
            caption = self._evaluator.caption(index) if store.rows[index, TEXT] >= 0 else ""
            found.append(Neighbour(index, store.sample_id(index), caption, float(cosine_n[place])))
        return found


def evaluator_of(session: Session, store_path: Path) -> Evaluator:
    """Return the session's model with a store of the same tokenizer and extractors. Raise UserError if these differ."""
    store = open_store(store_path)
    differences = fingerprint_differences(session.processor.description, store, codes=False, labels=False)
    if differences:
        raise UserError(f"{store_path}: {'; '.join(differences)}: use the store that the model was trained on")
    return Evaluator(session.model, session.config, store, session.device)


def unit_cls(runner: ModelRunner, samples: list[Sample]) -> np.ndarray:
    """Return the samples' [CLS] vectors, normalised to length 1, float32 [n, e]."""
    cls_ne = runner.cls_vectors(samples)
    return cls_ne / np.maximum(np.linalg.norm(cls_ne, axis=1, keepdims=True), 1e-12)
