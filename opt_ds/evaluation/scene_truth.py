"""Evaluation by the ground truth of the corpus `scenes`: generated texts, hard negatives, probes, generated images.

A text is judged as a scene graph, so a paraphrase of a true caption is right. An image is judged by what it shows.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from opt_ds.abilities import GENERATE_IMAGES, MATCH, WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.bag_of_words import BagOfWords, fit_bag_of_words
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import figure_lines, percent
from opt_ds.evaluation.image_generation import DEFAULT_SAMPLING
from opt_ds.evaluation.projections import FITTED_SAMPLES, ProjectionControls
from opt_ds.evaluation.reading import PROBE_INPUTS, TEXT_INPUTS, read_scenes
from opt_ds.evaluation.scene_images import generated_image_figures, true_image_figures
from opt_ds.evaluation.scene_negatives import LIKELIHOOD_SCORE, MATCHING_SCORE, Baselines, negative_figures
from opt_ds.evaluation.scene_probes import Probed, probe_figures
from opt_ds.evaluation.scene_texts import text_figures, truest_caption
from opt_ds.log import ON_STDERR
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig
from opt_ds.scenes.records import SceneRecord, read_truth

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

_LOG = logging.getLogger(__name__)
#: Names of modalities that hard negatives are scored with.
_GIVEN = {"I": IMAGE, "A": AUDIO}


class SampleCounts(NamedTuple):
    """Maximum numbers of samples per split: for texts and negatives, for probes, for generated images. None: all; 0: none.
    """

    limit: int | None = 200
    probe: int | None = 1000
    generate: int = 100


class SceneTruth:
    """The truth of a store's scenes, and all that the figures of several splits share.

    `skipped` of a split's figures names what the model or the store does not allow.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        truth: Path,
        open_dvae: Callable[[], "DiscreteVAE"],
        *,
        seed: int = 1,
        options: DecodingConfig | None = None,
        sampling: DecodingConfig = DEFAULT_SAMPLING,
        controls: ProjectionControls | None = None,
    ) -> None:
        """Read the truth.

        Args:
            evaluator: The model and the store.
            truth: The truth file of the corpus that the store was made of.
            open_dvae: Returns the dVAE that decodes image codes. It is called once, if images are generated.
            seed: Seed of the choices and of sampling.
            options: Decoding options of texts. None: the defaults.
            sampling: Options of sampling image codes. Its seed is replaced by `seed`.
            controls: The [CLS] vectors of the model and of an untrained one, if another evaluation has some already.

        Raises:
            UserError: The file is not a truth file.
        """
        self.evaluator, self.truth, self.seed = evaluator, truth, seed
        self.decoding = options or DEFAULT_DECODING
        self.sampling = sampling.model_copy(update={"seed": seed})
        self.controls = controls or ProjectionControls(evaluator, seed)
        self.all_records = read_truth(truth)
        self._open_dvae = open_dvae
        self._bags: dict[int, BagOfWords | None] = {}

    def records_of(self, split: str) -> dict[int, SceneRecord]:
        """Return sample index -> record of all samples of a split.

        Raises:
            UserError: A sample has no record, or its caption is not the record's.
        """
        store = self.evaluator.store
        found: dict[int, SceneRecord] = {}
        advice = f"give the {self.truth.name} of the corpus that {store.path} was made of"
        for index in map(int, store.split_samples(split)):
            name = store.sample_id(index)
            record = self.all_records.get(name)
            if record is None:
                raise UserError(f'{self.truth}: it has no sample "{name}", which split "{split}" of the store has: {advice}')
            if not self._has_caption_of(index, record):
                raise UserError(f'{self.truth}: the caption of sample "{name}" is not that of the store: {advice}')
            found[index] = record
        return found

    def measure(self, split: str, counts: SampleCounts | None = None) -> dict[str, Any]:
        """Return the figures of generated texts, hard negatives, probes and generated images, each beside its controls.

        Args:
            split: Name of the split.
            counts: Numbers of samples. None: the defaults.

        Returns:
            The figures, as plain values.

        Raises:
            UserError: The truth file belongs to other samples, or nothing can be measured.
        """
        counts = counts or SampleCounts()
        records, skipped = self.records_of(split), dict[str, str]()
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "texts": lambda: self._texts(split, records, counts.limit, skipped),
            "negatives": lambda: self._negatives(split, records, counts.limit, skipped),
        }
        if counts.probe != 0:
            parts["probes"] = lambda: self._probes(split, records, counts.probe, skipped)
        if counts.generate:
            parts["images"] = lambda: self._images(split, records, counts.generate, skipped)
        found: dict[str, Any] = {"split": split, "seed": self.seed, "decoding": self.decoding.model_dump()}
        for name, part in parts.items():
            started = time.perf_counter()
            if rows := part():
                found[name] = rows
                _LOG.info(f"note: {split}: {name} measured in {time.perf_counter() - started:.1f} s", extra=ON_STDERR)
        if not parts.keys() & found.keys():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            where = self.evaluator.store.path
            raise UserError(f"{where}: nothing can be measured ({reasons}): use another model or store")
        return found | {"untrained_seed": self.evaluator.config.seed, "skipped": skipped}

    # ---- parts

    def _texts(
        self, split: str, records: Mapping[int, SceneRecord], limit: int | None, skipped: dict[str, str]
    ) -> dict[str, Any]:
        """Return input -> figures of generated texts, and the constant caption."""
        if not self._can(WRITE_TEXT, "texts", skipped):
            return {}
        inputs = [name for name in TEXT_INPUTS if self.evaluator.has_samples(split, SUBSETS[name])]
        if not inputs:
            skipped["texts"] = f'no sample of split "{split}" has an image or audio'
            return {}
        rows: dict[str, Any] = {
            name: text_figures(self.evaluator, split, records, name, limit, self.seed, self.decoding, self._constant)
            for name in inputs
        }
        return rows | {"constant_caption": self._constant}

    def _negatives(
        self, split: str, records: Mapping[int, SceneRecord], limit: int | None, skipped: dict[str, str]
    ) -> dict[str, Any]:
        """Return input -> score -> figures of hard negatives."""
        abilities = {LIKELIHOOD_SCORE: WRITE_TEXT, MATCHING_SCORE: MATCH}
        scores = [score for score, ability in abilities.items() if self._can(ability, f"negatives, {score}", skipped)]
        rows = {}
        for name, modality in _GIVEN.items():
            with_input = self.evaluator.samples_with(split, (TEXT, modality))
            if scores and any(records[int(index)].negatives for index in with_input):
                baselines = Baselines(self.controls.untrained.evaluator, self._bag_of_words(modality))
                if baselines.bag_of_words is None:
                    skipped[f"negatives, {name}, bag of words"] = "no two training samples have text and this input"
                rows[name] = negative_figures(
                    self.evaluator, split, records, modality, scores, baselines, limit, self.seed
                )
        if scores and not rows:
            skipped["negatives"] = f'no sample of split "{split}" has negatives, text, and an image or audio'
        return rows

    def _probes(
        self, split: str, records: Mapping[int, SceneRecord], limit: int | None, skipped: dict[str, str]
    ) -> dict[str, Any]:
        """Return input -> figures of linear probes for the labels of the scenes."""
        train_split = self.evaluator.config.data.train_split
        there = [
            modality for modality in (TEXT, IMAGE, AUDIO)
            if self._has_training_samples(modality) and self.evaluator.has_samples(split, (modality,))
        ]  # fmt: skip
        train = self._known_training_samples(there) if there else np.empty(0, np.int64)
        test = self.evaluator.samples_with(split, there, limit, self.seed)
        rows = {}
        if len(train) and len(test):
            of_train = {int(index): self.all_records[self.evaluator.store.sample_id(int(index))] for index in train}
            inputs = [name for name in PROBE_INPUTS if set(SUBSETS[name]) <= set(there)]
            rows = probe_figures(self.controls, Probed.of({**records, **of_train}, train, test), inputs)
        if not rows:
            skipped["probes"] = (
                f'no label has 10 samples of split "{train_split}" that the truth file knows and one of split "{split}"'
            )
        return rows

    def _images(
        self, split: str, records: Mapping[int, SceneRecord], count: int, skipped: dict[str, str]
    ) -> dict[str, Any]:
        """Return input -> figures of generated images, beside the true images and their reconstructions."""
        evaluator, store = self.evaluator, self.evaluator.store
        if not evaluator.has_samples(split, (IMAGE,)):
            skipped["images"] = f'no sample of split "{split}" has an image'
            return {}
        if not self._can(GENERATE_IMAGES, "images", skipped):
            return {}
        if not store.has_codes:
            skipped["images"] = f"the store has no image codes: opt-ds train-dvae --store {store.path} writes them"
            return {}
        inputs = [name for name in ("T", "A", "T+A") if evaluator.has_samples(split, (IMAGE, *SUBSETS[name]))]
        rows = {
            name: generated_image_figures(evaluator, split, records, name, self._dvae, count, self.seed, self.sampling)
            for name in inputs
        }
        if not store.has_pixels:
            skipped["true images"] = "the store has no pixels"
        return rows | true_image_figures(evaluator, split, records, self._dvae, count, self.seed)

    # ---- what several parts or splits use

    @cached_property
    def _constant(self) -> str | None:
        return truest_caption(self.all_records.values(), self.seed)

    @cached_property
    def _dvae(self) -> "DiscreteVAE":
        return self._open_dvae()

    def _bag_of_words(self, modality: int) -> BagOfWords | None:
        if modality not in self._bags:
            self._bags[modality] = fit_bag_of_words(self.evaluator, modality, self.seed)
        return self._bags[modality]

    def _has_training_samples(self, modality: int) -> bool:
        train_split = self.evaluator.config.data.train_split
        names = self.evaluator.store.description.split_names
        return train_split in names and self.evaluator.has_samples(train_split, (modality,))

    def _known_training_samples(self, modalities: list[int]) -> np.ndarray:
        """Return at most 4,000 training samples that have these modalities and a record with their caption."""
        evaluator = self.evaluator
        train = evaluator.samples_with(evaluator.config.data.train_split, modalities, FITTED_SAMPLES, self.seed)
        records = [self.all_records.get(evaluator.store.sample_id(int(index))) for index in train]
        known = [
            record is not None and self._has_caption_of(int(index), record)
            for index, record in zip(train, records, strict=True)
        ]
        return train[np.array(known, dtype=bool)]

    def _has_caption_of(self, index: int, record: SceneRecord) -> bool:
        """Return whether the sample has the first caption of the record. A sample without text has any."""
        return self.evaluator.store.rows[index, TEXT] < 0 or self.evaluator.caption(index) == record.captions[0]

    def _can(self, ability: str, what: str, skipped: dict[str, str]) -> bool:
        """Return whether the model has an ability. If not, note why."""
        config = self.evaluator.config
        if not config.can(ability):
            skipped[what] = f"the model was trained without {config.tasks.loss_for(ability)}"
        return config.can(ability)


def scene_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of a split as text: a line per figure with its controls below, and what is left out."""
    lines = []
    for title, _, rows in read_scenes(figures):
        lines.append(f"  {title}")
        for name, shown in rows:
            lines += figure_lines(name, shown, percent)
    if constant := figures.get("texts", {}).get("constant_caption"):
        lines.append(f'  one caption for all: "{constant}"')
    return lines + [f"  not measured: {what}: {reason}" for what, reason in figures.get("skipped", {}).items()]
