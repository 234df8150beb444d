"""Decode files and extract their features, inside a worker process (see workers.py).

An unusable file becomes a `Failure`. It leaves an empty position in its chunk, so the features of the other files are the same
bytes as if it had been readable.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.decoding.decoder import Decoded, DecodingError, EnvironmentFaultError, MissingFileError, own_decoder
from opt_ds.decoding.tar_members import shown_name
from opt_ds.features.extractors import Extractor, ExtractorChoice
from opt_ds.ingest.retry import file_state
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.store.checks import audio_problem, image_problem
from opt_ds.store.writer import ImageItem


@dataclass(frozen=True)
class Failure:
    """The result for a file that could not be used. `state` is the state of the file (see retry.py)."""

    reason: str
    state: Any = None


@dataclass(frozen=True)
class Extracted:
    """The result for a file: an ImageItem, frames [T, Da] or columns; a hash of the bytes; whether frames were truncated."""

    item: Any
    digest: str
    was_truncated: bool = False


class FileFeatures:
    """Extracts features from chunks of files. Each extractor is built for the first file of its kind.

    Args:
        choices: Kind -> its extractor.
        settings: How files are decoded and what is kept of them.
        device: Device of the extractors.
    """

    def __init__(self, choices: Mapping[str, ExtractorChoice], settings: PrepareSettings, device: str) -> None:
        self._choices, self._settings, self._device = choices, settings, device
        self._extractors: dict[str, Extractor] = {}

    def chunk(self, kind: str, names: Sequence[str | None], folder: Path) -> list[Extracted | Failure]:
        """Return the result of each file, in order. A position without a name stays empty.

        Raise EnvironmentFaultError, which ends the run, for faults unrelated to the files' content.
        """
        if kind not in self._extractors:
            self._extractors[kind] = self._choices[kind].build(self._device)
        extractor = self._extractors[kind]
        decoded = [Failure("") if name is None else _decode(extractor, folder / name, self._settings) for name in names]
        inputs = [value.content if isinstance(value, Decoded) else None for value in decoded]
        results: list[Extracted | Failure] = []
        for name, value, feature in zip(names, decoded, extract(extractor, inputs), strict=True):
            if isinstance(value, Failure):
                result: Extracted | Failure = value
            else:
                result = feature if isinstance(feature, Failure) else _finish(feature, value, extractor, self._settings)
            if isinstance(result, Failure) and name is not None:
                result = replace(result, state=file_state(folder / name))
            results.append(result)
        return results


def extract(extractor: Extractor, inputs: Sequence[Any]) -> list[Any]:
    """Extract a chunk. If that fails, extract file by file, so that one unusual file affects itself only.

    The other positions stay empty then, since features depend on the position of a file in its chunk.
    """
    try:
        return _results(extractor, inputs)
    except EnvironmentFaultError:
        raise
    except Exception:
        return [_extract_alone(extractor, inputs, place) for place in range(len(inputs))]


def _extract_alone(extractor: Extractor, inputs: Sequence[Any], place: int) -> Any:
    value = inputs[place]
    if value is None:
        return None
    try:
        return _results(extractor, [value if other == place else None for other in range(len(inputs))])[place]
    except EnvironmentFaultError:
        raise
    except DecodingError as error:
        return _failure(extractor.kind, value, error) if isinstance(value, Path) else _no_features(extractor.kind, error)
    except Exception as error:
        return _no_features(extractor.kind, error)


def _results(extractor: Extractor, inputs: Sequence[Any]) -> list[Any]:
    results = extractor.extract(inputs)
    if len(results) != len(inputs):
        raise ValueError(f"the extractor {extractor.name} returned {len(results)} results for {len(inputs)} inputs")
    return results


def _decode(extractor: Extractor, path: Path, settings: PrepareSettings) -> Decoded[Any] | Failure:
    """Decode a file. Raise EnvironmentFaultError, which ends the run, for faults unrelated to its content."""
    from opt_ds.decoding.audio import trim_silence

    decoder, limits = own_decoder(), settings.decoding_limits()
    try:
        if extractor.reads_files:
            return Decoded(path, decoder.digest(path, "arrays"))
        if extractor.kind == "image":
            return decoder.image(path, limits)
        audio = decoder.audio(path, limits)
        return replace(audio, content=trim_silence(audio.content)) if settings.trim_silence else audio
    except DecodingError as error:
        return _failure(extractor.kind, path, error)
    except EnvironmentFaultError:
        raise
    except MemoryError:
        raise EnvironmentFaultError(f"{path}: its content does not fit into memory: use fewer --workers") from None
    except Exception as error:
        return Failure(f"{extractor.kind} file is broken: {shown_name(path)}: {_one_line(error)}")


def _failure(kind: str, path: Path, error: DecodingError) -> Failure:
    # The report must not depend on the folder of the files.
    if isinstance(error, MissingFileError):
        return Failure(f"{kind} file is missing: {shown_name(path)}")
    return Failure(f"{kind} file is {'refused' if error.refused else 'broken'}: {shown_name(path)}: {error}")


def _no_features(kind: str, error: Exception) -> Failure:
    return Failure(f"no {kind} features could be made: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _finish(feature: Any, decoded: Decoded[Any], extractor: Any, settings: PrepareSettings) -> Extracted | Failure:
    """Return the item that the store keeps of a feature, or why it cannot keep it."""
    item_of = _ITEMS.get(extractor.kind, _further_item)
    try:
        return item_of(feature, decoded, extractor, settings)
    except (AttributeError, TypeError, ValueError) as error:  # a result of another type than the extractor's base class says
        return Failure(f"{extractor.kind} features cannot be stored: {_one_line(error)}")


def _image_item(feature: Any, decoded: Decoded[Any], extractor: Any, settings: PrepareSettings) -> Extracted | Failure:
    from opt_ds.decoding.images import to_pixels

    if not len(feature.features):
        return Failure("no region was found in the image")
    if (problem := image_problem(feature, extractor.dim, extractor.num_classes)) is not None:
        return Failure(f"regions cannot be stored: {problem}")
    image = decoded.content
    # Labels by k-means are made when all features are there. The writer compares labels with the number of clusters.
    labels = feature.labels if settings.image_labels is None else np.zeros_like(feature.labels)
    pixels = to_pixels(image) if settings.pixels and not isinstance(image, Path) else None
    item = ImageItem(feature.features, feature.boxes, labels, feature.scores, pixels)
    return Extracted(item, decoded.digest)


def _audio_item(frames: np.ndarray, decoded: Decoded[Any], extractor: Any, settings: PrepareSettings) -> Extracted | Failure:
    from opt_ds.features.speech import pool_frames

    frames = pool_frames(frames, settings.pool_frames)
    kept = frames[: settings.max_frames]
    if (problem := audio_problem(kept, extractor.dim)) is not None:
        return Failure(f"speech cannot be stored: {problem}")
    return Extracted(kept, decoded.digest, was_truncated=len(kept) < len(frames))


def _further_item(columns: Any, decoded: Decoded[Any], extractor: Any, settings: PrepareSettings) -> Extracted | Failure:
    if (problem := extractor.problem(columns)) is not None:
        return Failure(f"{extractor.kind} features cannot be stored: {problem}")
    return Extracted(columns, decoded.digest)


_ITEMS: dict[str, Callable[..., Extracted | Failure]] = {"image": _image_item, "audio": _audio_item}
