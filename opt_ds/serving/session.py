"""Session: a trained model that reads raw inputs, generates text and images, and computes match probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opt_ds.abilities import GENERATE_IMAGES, MATCH, WRITE_TEXT
from opt_ds.config import Config
from opt_ds.data.matching import MATCHING_LABELS
from opt_ds.data.modalities import AUDIO, IMAGE, MODALITIES, TEXT
from opt_ds.data.sample import Sample
from opt_ds.dvae.model import DiscreteVAE
from opt_ds.dvae.storage import load_processor_dvae
from opt_ds.errors import UserError
from opt_ds.evaluation.image_generation import DEFAULT_SAMPLING, generate_candidates, to_image
from opt_ds.evaluation.reranking import MatchingReranker, Reranker, choose_reranker
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig
from opt_ds.model.opt import OPT
from opt_ds.serving.exported import load_exported
from opt_ds.serving.processor import OPTProcessor
from opt_ds.store.processor_files import PROCESSOR_FOLDER
from opt_ds.store.schema import DVAE_FOLDER, TOKENIZER_FOLDER
from opt_ds.training.checkpoint import is_exported, load_model, resolve_checkpoint, run_of

_LABEL_OF_MODALITIES = {
    frozenset((IMAGE, AUDIO)): "image_audio", frozenset((TEXT, AUDIO)): "text_audio", frozenset((TEXT, IMAGE)): "text_image",
    frozenset((TEXT, IMAGE, AUDIO)): "all",
}  # fmt: skip


def matched(sample: Sample) -> frozenset[int]:
    """Return the modalities of a sample that matching compares: those of text, image and audio that it has."""
    return frozenset(sample.items) & frozenset(MODALITIES)


class Session(ModelRunner):
    """A model with its processor and its dVAE."""

    def __init__(self, model: OPT, config: Config, processor: OPTProcessor, device: torch.device | str = "cpu") -> None:
        super().__init__(model, config, processor.description.tokenizer, processor.folder / TOKENIZER_FOLDER, device)
        self.processor = processor
        self._dvae: DiscreteVAE | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        image_weights: Path | None = None,
        speech_weights: Path | None = None,
        extractor_options: Mapping[str, Mapping[str, Any]] | None = None,
        device: str = "cpu",
    ) -> "Session":
        """Load a model from a run's output directory, one of its checkpoints, or a folder that `opt-ds export` wrote.

        Args:
            checkpoint: The directory.
            image_weights: Weights of an image extractor whose package does not include them.
            speech_weights: Weights of a speech extractor whose package does not include them.
            extractor_options: See `OPTProcessor`.
            device: Device of the model and the extractors.

        Returns:
            The session.
        """
        if is_exported(checkpoint):
            model, config = load_exported(checkpoint)
            folder = checkpoint / PROCESSOR_FOLDER
        else:
            model, config = load_model(checkpoint)
            folder = run_of(resolve_checkpoint(checkpoint)) / PROCESSOR_FOLDER
        processor = OPTProcessor(
            folder,
            config.model,
            image_weights=image_weights,
            speech_weights=speech_weights,
            extractor_options=extractor_options,
            device=device,
        )
        return cls(model.to(device), config, processor, device)

    def text(self, sample: Sample, options: DecodingConfig = DEFAULT_DECODING) -> str:
        """Return the text that the text decoder generates. Raise UserError if the model never learned to write text."""
        self.require(WRITE_TEXT, "write text")
        return self.write_text([sample], options)[0]

    def reranker(self, sample: Sample, by: str | None = None) -> Reranker:
        """Return what compares images generated from this input. Raise UserError if nothing can (see `choose_reranker`)."""
        return choose_reranker(self, sample.items, by)

    def generate_images(
        self, sample: Sample, count: int = 1, options: DecodingConfig = DEFAULT_SAMPLING
    ) -> list[tuple[Image.Image, float | None]]:
        """Return `count` sampled images of 64 × 64 pixels with their match probabilities, best first.

        The probabilities are None and the order is that of generation if there is only one image, if the matching head was
        never trained, or without text and audio. Raise UserError if the model never learned to generate images.
        """
        matches = count > 1 and self.config.can(MATCH) and MatchingReranker.accepts(sample.items)
        return self.ranked_images(sample, count, options, MatchingReranker(self) if matches else None)

    def ranked_images(
        self, sample: Sample, count: int, options: DecodingConfig, reranker: Reranker | None
    ) -> list[tuple[Image.Image, float | None]]:
        """Return `count` sampled images of 64 × 64 pixels with the reranker's scores, best first.

        Without a reranker, the scores are None and the order is that of generation. Raise UserError if the model never
        learned to generate images.
        """
        self.require(GENERATE_IMAGES, "generate images")
        generated = generate_candidates(self, self.dvae, [sample], options, count)[0]
        images = [to_image(pixels) for pixels in generated]
        if count == 1 or reranker is None:
            return [(image, None) for image in images]
        scores = [reranker.score(sample, image) for image in images]
        return [(images[k], scores[k]) for k in sorted(range(count), key=lambda k: -scores[k])]

    def matching(self, sample: Sample) -> dict[str, float]:
        """Return the probability of each matching label (see data.matching) that the two or three given inputs allow.

        Raise UserError if the model never learned matching.
        """
        (named,), given = self._matching([sample]), matched(sample)
        possible = {label for pair, label in _LABEL_OF_MODALITIES.items() if pair <= given} | {"none"}
        return {label: value for label, value in named.items() if label in possible}

    def match_probabilities(self, samples: Sequence[Sample]) -> list[float]:
        """Return, for each sample of two or three inputs, the matching head's probability that all of them match.

        Raise UserError if the model never learned matching.
        """
        found = self._matching(samples)
        return [named[_LABEL_OF_MODALITIES[matched(sample)]] for sample, named in zip(samples, found, strict=True)]

    def _matching(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        self.require(MATCH, "predict whether inputs match")
        if any(len(matched(sample)) < 2 for sample in samples):
            raise UserError("matching compares two or three inputs: add another one")
        # As in training, matching reads no other modalities.
        compared = [replace(own, items={number: own.items[number] for number in sorted(matched(own))}) for own in samples]
        scores = torch.from_numpy(self.matching_scores(compared))
        values = torch.softmax(scores, 1) if self.matches_by_softmax else torch.sigmoid(scores)
        return [dict(zip(MATCHING_LABELS, row, strict=True)) for row in values.tolist()]

    @property
    def dvae(self) -> DiscreteVAE:
        """The dVAE that decodes the model's image codes."""
        if self._dvae is None:
            folder = self.processor.folder / DVAE_FOLDER
            if not folder.is_dir():
                raise UserError(f"{folder}: the model has no dVAE, it was trained on a store without image codes")
            self._dvae = load_processor_dvae(self.processor.folder).to(self.device).eval()
        return self._dvae

    def check_image_extractor(self) -> None:
        """Raise UserError if the model's image extractor is not available, so that generated images cannot be read."""
        try:
            self.processor.open_extractor("image")
        except UserError as error:
            raise UserError(f"generated images cannot be read: {error}") from None

    def caption_log_likelihood(self, sample: Sample, image: Image.Image) -> float:
        """Return log P(the sample's text | the image alone) by the text decoder, in nats."""
        return float(self.text_log_likelihood([self.processor(image=image)], [sample.of(TEXT).ids])[0, 0])

    def match_probability(self, sample: Sample, image: Image.Image) -> float:
        """Return the match probability of the image with the sample's text and audio."""
        pair = replace(sample, items=sample.items | self.processor(image=image).items)
        return self.match_probabilities([pair])[0] if len(matched(pair)) > 1 else 0.0

    def image_embedding(self, image: Image.Image) -> np.ndarray:
        """Return the image embedding: the mean of the region features by the model's image extractor."""
        features = self.processor(image=image).of(IMAGE).features
        return np.asarray(features, dtype=np.float32).mean(0)
