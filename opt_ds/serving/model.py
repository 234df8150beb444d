"""Python interface to a trained model: `opt_ds.load`.

    import opt_ds

    model = opt_ds.load("my-model")
    model.caption("photo.png")
    model.generate_image("red heart").save("heart.png")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opt_ds.abilities import WRITE_TEXT
from opt_ds.config import Config
from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.retrieval import joined
from opt_ds.former_names import former_arguments
from opt_ds.model.generation import DecodingConfig, image_decoding, text_decoding
from opt_ds.serving.arguments import Score, check_count, check_range, check_score, choose_dtype, parse_device
from opt_ds.serving.inputs import AudioInput, ImageInput
from opt_ds.serving.neighbours import Neighbour, Neighbours, evaluator_of, unit_cls
from opt_ds.serving.session import Session

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class GeneratedImage:
    """An image and its match probability with the input, or None if it was not computed."""

    image: Image.Image
    probability: float | None


@dataclass(frozen=True)
class Ranked:
    """The index of a candidate in the given list, and its score."""

    index: int
    score: float


class Model:
    """A trained model with the extractors, tokenizer and dVAE of its training. Use `opt_ds.load` to create it.

    Every method takes the inputs `text`, `image` and `audio`, of which any may be omitted:

    - text: a str.
    - image: the path of a file, a `PIL.Image`, or a uint8 array [height, width], [height, width, 3] or [height, width,
      4].
    - audio: the path of a file, mono samples [n] at 16 kHz, or a tuple (samples [n], rate in Hz). Samples are floats
      from -1 to 1, or int16, int32 or uint8 as in WAV files.

    Every method raises `opt_ds.UserError` (a ValueError) for an input that cannot be read, for no input at all, and for
    tasks that the model was not trained for. Inputs that exceed the limits of the model are truncated, and `logging`
    warns of it. An instance must not be used by several threads at once.
    """

    def __init__(self, session: Session) -> None:
        """Use `opt_ds.load` instead.

        Args:
            session: The model in inference mode with its processor.
        """
        self._session = session

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self._session.model.parameters())
        return f"<opt_ds.Model {self.config.preset}, {parameters / 1e6:.1f} million parameters, {self.device}, {self.dtype}>"

    @property
    def config(self) -> Config:
        """The configuration that the model was trained with."""
        return self._session.config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._session.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self._session.model.parameters()).dtype

    def close(self) -> None:
        """End the process that decodes files. The model remains usable and starts another one when needed."""
        self._session.processor.close()

    def caption(self, image: ImageInput, *, beam_size: int = 4) -> str:
        """Return a text for an image. `beam_size` 1 means greedy search."""
        return self.describe(image=image, beam_size=beam_size)

    def transcribe(self, audio: AudioInput, *, image: ImageInput | None = None, beam_size: int = 4) -> str:
        """Return the text that is spoken.

        An image of the subject improves the result. `beam_size` 1 means greedy search.
        """
        return self.describe(image=image, audio=audio, beam_size=beam_size)

    def describe(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
        *,
        beam_size: int = 4,
    ) -> str:
        """Return the text that the text decoder generates for any mixture of inputs.

        Args:
            text: Input.
            image: Input.
            audio: Input.
            beam_size: Beam size; 1: greedy search.
        """
        check_count("beam_size", beam_size)
        return self._session.text(self._read(text, image, audio), text_decoding(beam_size))

    def generate_image(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
        *,
        candidates: int = 1,
        rank_by: Score | None = None,
        top_k: int = 32,
        top_p: float = 1.0,
        temperature: float = 0.8,
        guidance: float = 1.0,
        seed: int = 1,
    ) -> Image.Image:
        """Generate a 64 x 64 image.

        Args:
            text: Input.
            image: Input.
            audio: Input.
            candidates: Images to generate, of which the best one is returned.
            rank_by: How they are compared. "matching": by the match probability. "likelihood": by the likelihood of `text`
                as a caption. None: by the first of them that the model learned.
            top_k: Sample each image code from this many likeliest ones; 0: from all.
            top_p: Sample each image code from the likeliest ones of this total probability.
            temperature: Divides the logits; lower values give less variation.
            guidance: Scale of classifier-free guidance; 1: none. Others require a model trained with
                `tasks.modality.condition_dropout`.
            seed: Equal seeds and inputs give equal images on the same hardware.
        """
        check_count("candidates", candidates)
        options = _image_options(top_k, top_p, temperature, guidance, seed)
        sample = self._read(text, image, audio)
        reranker = self._session.reranker(sample, rank_by) if candidates > 1 else None
        return self._session.ranked_images(sample, candidates, options, reranker)[0][0]

    def generate_images(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
        *,
        count: int = 4,
        top_k: int = 32,
        top_p: float = 1.0,
        temperature: float = 0.8,
        guidance: float = 1.0,
        seed: int = 1,
    ) -> list[GeneratedImage]:
        """Generate `count` images of 64 x 64 pixels, best match first.

        For a single image and for a model trained without matching, the probabilities are None and the order is that of
        sampling.

        Args:
            text: Input.
            image: Input.
            audio: Input.
            count: Images to generate.
            top_k: Sample each image code from this many likeliest ones; 0: from all.
            top_p: Sample each image code from the likeliest ones of this total probability.
            temperature: Divides the logits; lower values give less variation.
            guidance: Scale of classifier-free guidance; 1: none. Others require a model trained with
                `tasks.modality.condition_dropout`.
            seed: Equal seeds and inputs give equal images on the same hardware.
        """
        check_count("count", count)
        options = _image_options(top_k, top_p, temperature, guidance, seed)
        found = self._session.generate_images(self._read(text, image, audio), count, options)
        return [GeneratedImage(generated, probability) for generated, probability in found]

    def embed(
        self, text: str | None = None, image: ImageInput | None = None, audio: AudioInput | None = None, *, normalize: bool = True
    ) -> np.ndarray:
        """Return the encoder's output at [CLS], float32 [hidden_size].

        It is a feature vector for classifiers and for finding similar inputs of the same kind. Training does not make
        the vectors of a text and of its image similar; use `rank_images` to compare these.

        Args:
            text: Input.
            image: Input.
            audio: Input.
            normalize: Whether the vector is scaled to length 1.
        """
        sample = self._read(text, image, audio)
        vectors = unit_cls(self._session, [sample]) if normalize else self._session.cls_vectors([sample])
        return vectors[0]

    def match(
        self, text: str | None = None, image: ImageInput | None = None, audio: AudioInput | None = None
    ) -> dict[str, float]:
        """Return the probability of each matching label of two or three inputs.

        The labels are "all" (of three inputs), "text_image", "text_audio", "image_audio" (only these two match) and
        "none".
        """
        return self._session.matching(self._read(text, image, audio))

    def match_probability(
        self, text: str | None = None, image: ImageInput | None = None, audio: AudioInput | None = None
    ) -> float:
        """Return the probability that two or three inputs all match."""
        return self._session.match_probabilities([self._read(text, image, audio)])[0]

    def rank_texts(
        self,
        texts: Sequence[str],
        *,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
        by: Score = "matching",
    ) -> list[Ranked]:
        """Rank texts for an image, audio or both, best first.

        Args:
            texts: The candidates.
            image: The query.
            audio: The query.
            by: "matching": the score is the probability that query and candidate match. "likelihood": it is the log
                likelihood of the text, in nats, by the text decoder; longer texts are less likely.
        """
        query, candidates = self._read(None, image, audio), [self._read(text, None, None) for text in texts]
        if check_score(by) == "matching":
            return self._ranked_by_matching(query, candidates)
        self._session.require(WRITE_TEXT, "rank by likelihood")
        return _ranked(self._session.text_log_likelihood([query], [sample.of(TEXT).ids for sample in candidates])[0])

    def rank_images(
        self,
        images: Sequence[ImageInput],
        *,
        text: str | None = None,
        audio: AudioInput | None = None,
        by: Score = "matching",
    ) -> list[Ranked]:
        """Rank images for a text, audio or both, best first.

        Args:
            images: The candidates.
            text: The query.
            audio: The query.
            by: "matching": the score is the probability that query and candidate match. "likelihood": it is the log
                likelihood of the text, in nats, for each image (and the audio) by the text decoder.
        """
        return self._ranked_for(self._read(text, None, audio), [self._read(None, image, None) for image in images], by)

    @former_arguments(recordings="audio")
    def rank_audio(
        self,
        audio: Sequence[AudioInput],
        *,
        text: str | None = None,
        image: ImageInput | None = None,
        by: Score = "matching",
    ) -> list[Ranked]:
        """Rank audio for a text, an image or both, best first.

        Args:
            audio: The candidates.
            text: The query.
            image: The query.
            by: "matching" or "likelihood", as in `rank_images`.
        """
        return self._ranked_for(self._read(text, image, None), [self._read(None, None, one) for one in audio], by)

    def index(self, store: str | Path, split: str = "train", limit: int = 2000) -> "StoreIndex":
        """Embed samples of a feature store, for `StoreIndex.nearest`.

        Args:
            store: A store with the tokenizer and extractors of this model.
            split: Split of the store.
            limit: Maximum number of samples, chosen by a fixed seed.
        """
        check_count("limit", limit)
        return StoreIndex(Neighbours(evaluator_of(self._session, Path(store)), split, limit), self._read)

    def _read(self, text: str | None, image: ImageInput | None, audio: AudioInput | None) -> Sample:
        return self._session.processor(text, image, audio)

    def _ranked_for(self, query: Sample, candidates: list[Sample], by: Score) -> list[Ranked]:
        """Rank images or audio."""
        if check_score(by) == "matching":
            return self._ranked_by_matching(query, candidates)
        self._session.require(WRITE_TEXT, "rank by likelihood")
        if TEXT not in query.items:
            raise UserError('by="likelihood" ranks by the likelihood of a text: give text=, or use by="matching"')
        asked = Sample(items={modality: items for modality, items in query.items.items() if modality != TEXT})
        samples = [joined(asked, candidate) for candidate in candidates]
        return _ranked(self._session.text_log_likelihood(samples, [query.of(TEXT).ids])[:, 0] if samples else np.empty(0))

    def _ranked_by_matching(self, query: Sample, candidates: list[Sample]) -> list[Ranked]:
        return _ranked(np.array(self._session.match_probabilities([joined(query, candidate) for candidate in candidates])))


class StoreIndex:
    """Embedded samples of a feature store. Use `Model.index` to create it."""

    def __init__(self, neighbours: Neighbours, read: Callable[..., Sample]) -> None:
        self._neighbours, self._read = neighbours, read

    def __len__(self) -> int:
        return len(self._neighbours.samples)

    def nearest(
        self, text: str | None = None, image: ImageInput | None = None, audio: AudioInput | None = None, *, count: int = 5
    ) -> list[Neighbour]:
        """Return the samples that are nearest to the input, nearest first.

        Args:
            text: Input.
            image: Input.
            audio: Input.
            count: Number of samples.

        Returns:
            The samples whose embeddings have the largest cosine similarity with that of the input.
        """
        check_count("count", count)
        return self._neighbours.nearest(self._read(text, image, audio), count)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    image_weights: str | Path | None = None,
    speech_weights: str | Path | None = None,
    extractor_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Model:
    """Load a trained model. `opt_ds.load` is the public name.

    Args:
        path: A run's output directory, one of its checkpoints, or an exported folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32", "bf16" or "fp16": dtype of the weights.
        image_weights: Weights of an image extractor whose package does not include them.
        speech_weights: Weights of a speech extractor whose package does not include them.
        extractor_options: See `OPTProcessor`.

    Returns:
        The model.
    """
    where = parse_device(str(device))
    dtype = choose_dtype(precision, where)
    session = Session.load(
        Path(path).expanduser(),
        image_weights=None if image_weights is None else Path(image_weights),
        speech_weights=None if speech_weights is None else Path(speech_weights),
        extractor_options=extractor_options,
        device=str(where),
    )
    for parameter in session.model.parameters():  # Not the buffers: features are standardised in fp32, as in training.
        parameter.data = parameter.data.to(dtype)
    return Model(session)


def _image_options(top_k: int, top_p: float, temperature: float, guidance: float, seed: int) -> DecodingConfig:
    """Return the options of the image decoder. Raise UserError for a value outside its range."""
    check_range("top_k", top_k, 0, None)
    check_range("top_p", top_p, 0, 1)
    check_range("temperature", temperature, 1e-3, None)
    check_range("guidance", guidance, 0, None)
    check_range("seed", seed, 0, _MAX_SEED)
    return image_decoding(top_k, top_p, temperature, seed, guidance)


def _ranked(scores: np.ndarray) -> list[Ranked]:
    """Return the candidates, best first. Ties keep their order."""
    return [Ranked(int(index), float(scores[index])) for index in np.argsort(-scores, kind="stable")]
