"""Re-ranking: of several images generated from one input, the model's own judgement chooses the best.

Generated images are read by the model's image extractor, as images of the store were. To add a criterion, write a subclass
of `Reranker` and add it to `RERANKERS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Protocol

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.config import Config
from opt_ds.data.modalities import AUDIO, TEXT
from opt_ds.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from opt_ds.data.sample import Sample


class ImageRater(Protocol):
    """Evaluates images with the image extractor of a trained model."""

    @property
    def config(self) -> Config:
        """The model's configuration."""

    def check_image_extractor(self) -> None:
        """Raise UserError if the model's image extractor is not available."""

    def match_probability(self, sample: "Sample", image: "Image.Image") -> float:
        """Return the match probability of the image with the sample's text and audio."""

    def caption_log_likelihood(self, sample: "Sample", image: "Image.Image") -> float:
        """Return log P(the sample's text | the image alone) by the text decoder, in nats."""

    def image_embedding(self, image: "Image.Image") -> "np.ndarray":
        """Return the embedding (feature vector) of an image."""


class Reranker(ABC):
    """Scores images for the input that they were generated from. Of the candidates, the one with the highest score is kept."""

    name: ClassVar[str]  # value of --rank-by, and key of the figures
    title: ClassVar[str]  # of the score, where it is printed
    ability: ClassVar[str]  # what the model must have learned (see `opt_ds.abilities`)

    def __init__(self, rater: ImageRater) -> None:
        self._rater = rater

    @classmethod
    @abstractmethod
    def accepts(cls, modalities: Collection[int]) -> bool:
        """Return whether an input of these modalities can be compared with images."""

    @abstractmethod
    def score(self, sample: "Sample", image: "Image.Image") -> float:
        """Return the score of an image. Scores are comparable among images of the same sample."""


class MatchingReranker(Reranker):
    """By the matching head: the probability that the image and the sample's text and audio belong together."""

    name, title, ability = "matching", "match probability", MATCH

    @classmethod
    def accepts(cls, modalities: Collection[int]) -> bool:
        """Return whether there is text or audio."""
        return TEXT in modalities or AUDIO in modalities

    def score(self, sample: "Sample", image: "Image.Image") -> float:
        """Return the match probability."""
        return self._rater.match_probability(sample, image)


class LikelihoodReranker(Reranker):
    """By the text decoder: the log likelihood of the sample's text as a caption of the image."""

    name, title, ability = "likelihood", "log likelihood of the text", WRITE_TEXT

    @classmethod
    def accepts(cls, modalities: Collection[int]) -> bool:
        """Return whether there is a text."""
        return TEXT in modalities

    def score(self, sample: "Sample", image: "Image.Image") -> float:
        """Return the log likelihood, in nats."""
        return self._rater.caption_log_likelihood(sample, image)


#: In the order of preference.
RERANKERS: tuple[type[Reranker], ...] = (MatchingReranker, LikelihoodReranker)


def choose_reranker(rater: ImageRater, modalities: Collection[int], by: str | None = None) -> Reranker:
    """Return what compares images generated from an input of these modalities.

    Args:
        rater: The model.
        modalities: Modalities of the input.
        by: Name of a reranker. None: the first one that the model learned and that accepts the input.

    Raises:
        UserError: In one line, if the name is unknown, the model learned none, none accepts the input, or the model's image
            extractor is not available.
    """
    kinds = {kind.name: kind for kind in RERANKERS}
    if by is not None and by not in kinds:
        raise UserError(f'--rank-by "{by}": choose {" or ".join(kinds)}{did_you_mean(by, kinds)}')
    learned = [kind for kind in kinds.values() if by in (None, kind.name) and rater.config.can(kind.ability)]
    if not learned:
        wanted = [kinds[by]] if by else list(kinds.values())
        losses = " and ".join(rater.config.tasks.loss_for(kind.ability) for kind in wanted)
        raise UserError(f"this model was trained without {losses}: it cannot choose the best of several images: use 1 candidate")
    for kind in learned:
        if kind.accepts(modalities):
            rater.check_image_extractor()
            return kind(rater)
    inputs = "text or audio" if MatchingReranker in learned else "a text"
    raise UserError(f"images are compared with {inputs} of the input, which has none: use 1 candidate")
