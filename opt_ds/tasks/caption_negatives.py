"""Candidates of the matching task in the step plan and in the reader: a sample's caption and negatives of it."""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from opt_ds.config import Config
from opt_ds.data.modalities import MODALITIES, TEXT
from opt_ds.data.negatives import NegativeSampler
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import GROUP, StepSamples
from opt_ds.data.task import Candidates, SampledTasks
from opt_ds.modalities.text import read_text
from opt_ds.ops.keyed import keyed_hash
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.captions import REPLACE, SWAP, Captions, captions_of

_LOG = logging.getLogger(__name__)
_REDRAWS = 16

#: Kinds of negatives: two words swapped, a word replaced, another sample's caption.
CaptionKind = Literal["swap", "replace", "caption"]
_EXCHANGES = {"swap": SWAP, "replace": REPLACE, "caption": REPLACE}  # of "caption": if all that were sampled are true


@dataclass(frozen=True)
class CaptionCandidate:
    """Matching target of a sample whose text is one of several candidates."""

    group: int  # the same for all candidates of an image or audio
    number: int  # 0: the true caption
    label: int  # matching label whose score is compared


class CaptionNegatives:
    """Negatives of the captions of a run. The kinds are used in turn."""

    columns: ClassVar[dict[str, tuple[type, Any]]] = {
        "matching_candidate": (np.int8, -1),  # 0: the true caption, 1, 2, …: negatives; -1: no candidate
        "matching_exchange": (np.int8, -1),  # exchange of words that makes the negative (see `captions`); -1: none
        "matching_words_row": (np.int64, -1),  # text row whose words may be inserted
    }

    def __init__(self, config: Config, kinds: tuple[CaptionKind, ...]) -> None:
        self._config, self._kinds = config, kinds

    def _captions(self, store: FeatureStore) -> Captions:
        return captions_of(store, self._config.data.train_split, self._config.model.max_text_tokens)

    def report(self, store: FeatureStore) -> None:
        """Log how many captions of the training split have no words to swap."""
        captions = self._captions(store)
        if captions.num_without_swap and "swap" in self._kinds:
            _LOG.info(
                f"{store.path}: {captions.num_without_swap} of {captions.num_captions} captions of split "
                f"{self._config.data.train_split} do not have two different words to swap: a word is replaced instead"
            )

    def assign(
        self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, rows: np.ndarray, pools: list[NegativeSampler]
    ) -> None:
        """Set the columns of samples with candidates, and the text rows of negatives that are other samples' captions.

        Args:
            candidates: The samples of the step.
            sampled: The decisions, whose columns are changed.
            own: int64 [n], the samples with candidates and their copies.
            rows: int64 [n, M], the input rows of these, which are changed.
            pools: The negative sampler of each store.
        """
        copy, columns = candidates.copy[own], sampled.columns
        columns["matching_candidate"][own] = copy
        kind = (copy - 1) % len(self._kinds)
        exchange = np.array([_EXCHANGES[name] for name in self._kinds], dtype=np.int8)[kind]
        is_caption = np.array([name == "caption" for name in self._kinds])[kind]
        key = keyed_hash(candidates.key[own], "caption", copy)
        negative = np.flatnonzero(copy > 0)
        for number, pool in enumerate(pools):
            places = negative[candidates.of_store(number, own[negative])]
            if not places.size:
                continue
            captions, sample = self._captions(candidates.stores[number]), candidates.sample[own[places]]
            other, is_false = _other_captions(pool, captions, rows[places], sample, key[places])
            whole = is_caption[places] & is_false
            rows[places[whole], TEXT] = other[whole]
            edited = places[~whole]
            columns["matching_exchange"][own[edited]] = exchange[edited]
            columns["matching_words_row"][own[edited]] = other[~whole]

    def candidate(
        self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore, label: int
    ) -> CaptionCandidate | None:
        """Return the target of a sample with candidates, or None. The text of a negative by exchange is set here.

        Args:
            sample: The sample, whose text is changed.
            samples: The samples of the step.
            index: Global sample index.
            store: The sample's store.
            label: Its matching label.
        """
        columns, number = samples.columns, int(samples.columns["matching_candidate"][index])
        if number < 0:
            return None
        exchange = int(columns["matching_exchange"][index])
        if exchange >= 0:
            text, owner = sample.of(TEXT), int(samples.sample[index])
            epoch, of_store = int(samples.epoch[index]), int(samples.store[index])
            key = int(keyed_hash(self._config.seed, "captions", epoch, of_store, owner, number))
            other = read_text(store, int(columns["matching_words_row"][index]), self._config.model.max_text_tokens)
            text.ids = self._captions(store).negative(text.ids, other, exchange, owner, key)
        return CaptionCandidate(int(columns[GROUP][index]), number, label)


def _other_captions(
    pool: NegativeSampler, captions: Captions, rows: np.ndarray, sample: np.ndarray, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a text row of another group for each sample, int64 [n], and whether it is no true caption, bool [n].

    A true one is sampled again.
    """
    replaced = np.tile(np.array(MODALITIES) == TEXT, (len(rows), 1))
    other = pool.replace(rows, replaced, sample, key)[:, TEXT]
    waiting = np.flatnonzero(captions.are_true(sample, other))
    for attempt in range(_REDRAWS):
        if not waiting.size:
            break
        again = keyed_hash(key[waiting], "again", attempt)
        other[waiting] = pool.replace(rows[waiting], replaced[waiting], sample[waiting], again)[:, TEXT]
        waiting = waiting[captions.are_true(sample[waiting], other[waiting])]
    is_false = np.ones(len(rows), dtype=bool)
    is_false[waiting] = False
    return other, is_false
