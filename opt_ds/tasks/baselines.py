"""The loss that each task has without learning anything: what a validation loss must fall below to mean something.

mlm, dtr: unigram of the training texts. mvfr, mafr: the training mean. mrc: the classes' training frequencies. mac: log K, all
candidates alike. dir: the codes' training frequencies. matching: the frequency of each case in the validation plan. labels: each
label's training frequency.
Frequencies are smoothed by one half, so that an unseen item has a finite loss.
"""

import numpy as np

from opt_ds.config import Config
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.matching import NUM_CASES
from opt_ds.data.planned import IMAGE, TEXT
from opt_ds.data.samples import SampleReader, given
from opt_ds.model.embeddings import STANDARD_LIMIT
from opt_ds.store.reader import FeatureStore

_TRAIN_ROWS = 20_000  # training rows that the frequencies are counted over, at most


def trivial_baselines(config: Config, stores: list[FeatureStore], version: int | None = None) -> dict[str, float]:
    """Loss -> mean validation loss of its trivial baseline, over exactly the terms of the plan's validation pass."""
    plan, reader = make_plan(config, stores, version), SampleReader(config, stores)
    frequencies = _Frequencies(config, stores)
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    cases = np.zeros(NUM_CASES)
    label_shares = _label_shares(config, stores, reader)

    def add(loss: str, values: np.ndarray) -> None:
        sums[loss] = sums.get(loss, 0.0) + float(np.sum(values))
        counts[loss] = counts.get(loss, 0.0) + len(values)

    for planned in plan.validation(1, config.train.validate_samples):
        for slot in range(planned.num_samples):
            sample, number = reader.read(planned.samples, slot), int(planned.samples.store[slot])
            if sample.mlm_masked is not None:
                add("mlm", frequencies.text[given(sample.mlm_targets)[sample.mlm_masked]])
            if sample.predict_regions:
                masked = given(sample.region_masked)
                add("mvfr", frequencies.mean_error(given(sample.region_features)[masked], number, "image", 1))
                add("mrc", frequencies.classes[given(sample.region_labels)[masked]])
            if sample.predict_frames:
                masked = given(sample.frame_masked)
                add("mafr", frequencies.mean_error(given(sample.frames)[masked], number, "audio", config.model.audio_stack))
                add("mac", np.full(masked.sum(), np.log(1 + (~masked).sum())))
            if sample.written_text is not None:
                written = np.append(sample.written_text, -1) if sample.text_ends else sample.written_text
                add("dtr", frequencies.text_with_end[written])
            if sample.written_codes is not None:
                add("dir", frequencies.codes[sample.written_codes])
            if sample.label_targets is not None:
                add("labels", np.array([_cross_entropy(sample.label_targets, label_shares)]))
            if sample.case >= 0:
                cases[sample.case] += 1
    baselines = {loss: sums[loss] / counts[loss] for loss in sums}
    if cases.sum():
        baselines["matching"] = _matching_prior(cases / cases.sum(), config.tasks.matching.loss)
    return {loss: baselines[loss] for loss in config.tasks.active_losses if loss in baselines}


class _Frequencies:
    """Negative log-frequencies of the training split, and the mean vectors."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        model = config.model
        tokens, classes = np.zeros(model.vocab_size), np.zeros(model.image_num_classes)
        codes = np.zeros(model.image_codebook_size)
        num_texts = 0
        for store in stores:
            rows = store.rows[store.split_samples(config.data.train_split)[:_TRAIN_ROWS]]
            for row in rows[rows[:, TEXT] >= 0, TEXT]:
                np.add.at(tokens, store.text(row)[: model.max_text_tokens], 1)
                num_texts += 1
            for row in np.unique(rows[rows[:, IMAGE] >= 0, IMAGE]):
                np.add.at(classes, store.regions(row).labels[: model.max_regions], 1)
                if store.has_codes:
                    np.add.at(codes, store.codes(row), 1)
        self.text = _negative_log(tokens)
        self.text_with_end = _negative_log(np.append(tokens, num_texts))  # the end is the last entry: index −1
        self.classes, self.codes = _negative_log(classes), _negative_log(codes)
        self._statistics = [store.description.statistics for store in stores]
        self._standardize = model.standardize_features

    def mean_error(self, vectors: np.ndarray, store: int, name: str, repeat: int) -> np.ndarray:
        """Squared error of the training mean, averaged over dimensions, in the units that the model regresses."""
        statistics = self._statistics[store][name]
        mean, std = np.tile(statistics.mean, repeat), np.tile(statistics.std, repeat)
        error = vectors.astype(np.float64) - mean
        if self._standardize:
            error = np.clip(error / np.where(std > 1e-4, std, 1.0), -STANDARD_LIMIT, STANDARD_LIMIT)
        return np.square(error).mean(-1)


def _label_shares(config: Config, stores: list[FeatureStore], reader: SampleReader) -> np.ndarray:
    """float64 [names of the label head], mean target over the training samples that have labels; empty without the head."""
    if config.tasks.labels is None:
        return np.empty(0)
    total, count = np.zeros(len(config.tasks.labels.names)), 0
    for number, store in enumerate(stores):
        for index in store.split_samples(config.data.train_split)[:_TRAIN_ROWS]:
            if store.labels(int(index)):
                total += reader.label_targets(number, int(index))
                count += 1
    return (total + 0.5) / (count + 1)


def _cross_entropy(targets: np.ndarray, shares: np.ndarray) -> float:
    return float(-(targets * np.log(shares) + (1 - targets) * np.log(1 - shares)).sum())


def _negative_log(counts: np.ndarray) -> np.ndarray:
    smoothed = counts + 0.5
    return -np.log(smoothed / smoothed.sum())


def _matching_prior(prior: np.ndarray, loss: str) -> float:
    prior = np.clip(prior, 1e-12, 1 - 1e-12)
    if loss == "ce":
        return float(-(prior * np.log(prior)).sum())
    return float(-(prior * np.log(prior) + (1 - prior) * np.log(1 - prior)).mean())
