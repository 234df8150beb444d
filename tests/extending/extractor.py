"""Extractors of another package: an image as a grid of mean colours, audio as loudness, and touch, a modality of its own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.features.further import FurtherExtractor
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.features.speech import SpeechExtractor
from opt_ds.store.files import file_sha256
from opt_ds.store.further import StoredColumn


class ColourOptions(Section):
    side: int = Field(2, ge=1, le=8, description="Cells per side.")
    weights: Path | None = Field(None, description="File with the brightness that is added to each colour.")


class Colours(RegionExtractor):
    """Red, green and blue of each cell. An image with a first pixel of (1, 2, 3) ends the process, of (3, 2, 1) fails."""

    name = "colours"
    options = ColourOptions
    dim = 3
    num_classes = 2

    def __init__(self, options: ColourOptions, device: str) -> None:
        self._side = options.side
        self._added = 0.0 if options.weights is None else float(options.weights.read_text())
        self._sha256 = None if options.weights is None else file_sha256(options.weights)
        edges = np.arange(options.side + 1) / options.side
        cells = [(x, y) for y in range(options.side) for x in range(options.side)]
        self._boxes = boxes_with_size(np.array([(edges[x], edges[y], edges[x + 1], edges[y + 1]) for x, y in cells]))

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "version": "1.0", "weights_sha256": self._sha256}

    def extract(self, inputs: Sequence[Image.Image | None]) -> list[RegionFeatures | None]:
        return [None if image is None else self._regions(image) for image in inputs]

    def _regions(self, image: Image.Image) -> RegionFeatures:
        if image.getpixel((0, 0)) == (1, 2, 3):
            os.abort()
        if image.getpixel((0, 0)) == (3, 2, 1):
            raise ValueError("too dark")
        small = np.asarray(image.resize((self._side, self._side), Image.Resampling.BOX), "float32") / 255
        count = self._side**2
        features = (small.reshape(count, 3) + self._added).astype("float16")
        return RegionFeatures(features, self._boxes, np.zeros(count, "int16"), np.ones(count, "float16"))


class Unlabelled(Colours):
    """The same regions without classes."""

    name = "unlabelled_colours"
    num_classes = 0


class LoudnessOptions(Section):
    frames_per_s: int = Field(10, ge=1, le=100, description="Frames per second.")
    bands: tuple[float, ...] = Field((0.5, 1.0), description="Factors of the loudness, one per feature.")


class Loudness(SpeechExtractor):
    name = "loudness"
    options = LoudnessOptions

    def __init__(self, options: LoudnessOptions, device: str) -> None:
        self._bands = np.array(options.bands)
        self.dim, self.frame_rate_hz = len(options.bands), float(options.frames_per_s)

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "weights_sha256": None}

    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        return [None if waveform is None else self._frames(waveform) for waveform in inputs]

    def _frames(self, waveform: np.ndarray) -> np.ndarray:
        starts = np.arange(0, len(waveform), round(16_000 / self.frame_rate_hz))
        counts = np.diff(np.append(starts, len(waveform)))
        loudness = np.sqrt(np.add.reduceat(waveform.astype("float64") ** 2, starts) / counts)
        return (loudness[:, None] * self._bands).astype("float16")


class TouchOptions(Section):
    scale: float = Field(1.0, gt=0, description="Factor on the pressures.")


class Touch(FurtherExtractor):
    """Readings of three pressures: lines `milliseconds,x,y,z`."""

    name = "touch_csv"
    kind = "touch"
    options = TouchOptions
    item = "readings"
    columns = {  # noqa: RUF012
        "features": StoredColumn(dtype="float16", width=(3,)),
        "at_ms": StoredColumn(dtype="int32"),
    }

    def __init__(self, options: TouchOptions, device: str) -> None:
        self._scale = options.scale

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "version": "1.0"}

    def extract(self, inputs: Sequence[Path | None]) -> list[dict[str, np.ndarray] | None]:
        return [None if path is None else self._read(path) for path in inputs]

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        if path.suffix != ".csv":
            raise ValueError(f'no .csv file: "{path.suffix}"')
        table = np.loadtxt(path, delimiter=",", ndmin=2)
        return {"features": table[:, 1:] * self._scale, "at_ms": table[:, 0].astype(int)}


class Labelled(Touch):
    """Returns a column that its class does not describe."""

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        read = super()._read(path)
        return {**read, "labels": read["at_ms"]}


class Wrong(Touch):
    """Describes no features."""

    columns = {"at_ms": StoredColumn(dtype="int32")}  # noqa: RUF012
