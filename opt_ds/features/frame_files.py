"""Own audio features: one `.npz`, `.npy`, safetensors or HDF5 file per sample, of any encoder and any size.

The array is features [T, C], or the only array of the file. An array that does not match is a ValueError, which
`opt-ds prepare` reports with the sample.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.decoding.decoder import load_arrays
from opt_ds.errors import UserError
from opt_ds.features.feature_arrays import as_float16, features_of, first_size
from opt_ds.features.speech import SpeechExtractor


class FrameFileOptions(Section):
    """The options of frame_files."""

    dim: int | None = Field(None, ge=1, description="Size of a frame. None: that of the first file.")
    frame_rate_hz: float | None = Field(None, gt=0, description="Frames per second. It must be set.")


class FrameFileExtractor(SpeechExtractor):
    """Reads files of frames instead of audio. The manifest's `audio` field names the files."""

    name = "frame_files"
    options = FrameFileOptions
    reads_files = True

    def __init__(self, options: FrameFileOptions, device: str = "cpu") -> None:
        assert options.dim is not None and options.frame_rate_hz is not None, "settle has set and checked them"
        self.dim, self.frame_rate_hz = options.dim, options.frame_rate_hz

    @classmethod
    def settle(cls, options: Section, files: Iterable[Path]) -> Section:
        """Return the options with the size of the first file's frames, unless they set one.

        Raise UserError if the frame rate is not set.
        """
        assert isinstance(options, FrameFileOptions)
        if options.frame_rate_hz is None:
            raise UserError(
                f"--speech {cls.name}: the files do not state their frames per second: set --extractor-option "
                "audio.frame_rate_hz=50"
            )
        return options.model_copy(update={"dim": options.dim or first_size(files, f"--speech {cls.name}")})

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint. The options are added to it, the files are not part of it."""
        return {"name": self.name, "weights_sha256": None}

    def extract(self, inputs: Sequence[Path | None]) -> list[np.ndarray | None]:
        """Return the frames of each file, float16 [T, C]. Raise ValueError for a file with another array or size."""
        return [None if path is None else self._read(path) for path in inputs]

    def _read(self, path: Path) -> np.ndarray:
        try:
            frames = features_of(load_arrays(path))
            if frames.shape[1] != self.dim:
                raise ValueError(f"features of {frames.shape[1]} values, not {self.dim} as the first file")
            return as_float16(frames)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
