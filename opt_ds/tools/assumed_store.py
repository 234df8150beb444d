"""Placeholder for a store that does not exist yet: assumed lengths and zero features, for estimates before preparation.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.store.reader import Regions
from opt_ds.store.schema import CODES_PER_IMAGE, MODALITIES, Dims, StoreDescription, TokenizerDescription

_SAMPLES = 4096
_VALID_FRACTION = 0.05
_SPREAD = 0.5  # lengths are spread uniformly over this fraction around their means


class AssumedStore:
    """Has the interface of a `FeatureStore` for the step plan and the sample reader.

    Every sample has all three modalities.

    `text`, `regions`, `frames` are the mean items per sample (WordPieces, regions, stored speech frames).
    """

    has_codes = has_pixels = True
    modalities = MODALITIES
    records: Path | None = None  # nothing derived from it is kept

    def __init__(self, model: ModelConfig, text: int, regions: int, frames: int) -> None:
        self._model, self._means = model, (text, regions, frames)
        further = [name for name in model.modalities if name not in self.modalities]
        left_out = f", without {' and '.join(further)}" if further else ""
        self.path = Path(f"assumed samples of {text} WordPieces, {regions} regions, {frames} frames{left_out}")
        self.fingerprint, self.name, self.num_samples = "assumed", "assumed", _SAMPLES
        self.rows = np.repeat(np.arange(_SAMPLES, dtype=np.int64)[:, None], 3, axis=1)
        self.groups = np.arange(_SAMPLES, dtype=np.int64)
        special = TokenizerDescription(pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, sha256="")
        dims = Dims(
            image_feature_dim=model.image_feature_dim, image_num_classes=model.image_num_classes,
            audio_feature_dim=model.audio_feature_dim, audio_frame_rate_hz=50.0, vocab_size=model.vocab_size,
            num_codes=model.image_codebook_size,
        )  # fmt: skip
        self.description = StoreDescription(
            schema_version=1, num_samples=_SAMPLES, split_names=["train", "valid"], split_counts={}, splits_source="manifest",
            dims=dims, has_codes=True, has_pixels=True, compression=None, extractors={}, tokenizer=special, label_names=[],
            statistics={}, shards=[],
        )  # fmt: skip

    def lengths(self, modality: str) -> np.ndarray:
        """Return the number of items per row of a modality, int32. Further modalities have no rows."""
        return self._lengths.get(modality, np.zeros(0, np.int32))

    @cached_property
    def _lengths(self) -> dict[str, np.ndarray]:
        return {name: self._spread(number) for number, name in enumerate(self.modalities)}

    def split_samples(self, split: str) -> np.ndarray:
        """Return the last samples for the split "valid", and the rest for any other name."""
        start = int(_SAMPLES * (1 - _VALID_FRACTION))
        return np.arange(start, _SAMPLES) if split == "valid" else np.arange(start)

    def split_subsets(self, split: str) -> np.ndarray:
        """Return the number of samples per subset of modalities. All samples of the split have all three."""
        return np.array([*[0] * 7, len(self.split_samples(split))])

    def all_have(self, modality: int) -> bool:
        """Return True, because all samples have all modalities."""
        return True

    def sample_id(self, index: int) -> str:
        """Return the index as the id."""
        return str(index)

    def text(self, row: int) -> np.ndarray:
        """Return a text of the row's length that repeats the last token."""
        return np.full(int(self.lengths("text")[row]), self._model.vocab_size - 1, dtype=np.int32)

    def regions(self, row: int) -> Regions:
        """Return zero regions."""
        count = int(self.lengths("image")[row])
        return Regions(
            np.zeros((count, self._model.image_feature_dim), np.float16),
            np.zeros((count, 7), np.float32),
            np.zeros(count, np.int16),
            np.zeros(count, np.float16),
        )

    def frames(self, row: int) -> np.ndarray:
        """Return zero frames."""
        return np.zeros((int(self.lengths("audio")[row]), self._model.audio_feature_dim), np.float16)

    def codes(self, row: int) -> np.ndarray:
        """Return zero image codes."""
        return np.zeros(CODES_PER_IMAGE, np.uint16)

    def release_pages(self) -> None:
        """Do nothing, because no pages are mapped."""
        pass

    def _spread(self, modality: int) -> np.ndarray:
        mean = self._means[modality]
        low, high = max(1, round(mean * (1 - _SPREAD))), round(mean * (1 + _SPREAD))
        # A fixed shuffle of uniformly spread lengths, different for each modality.
        lengths = np.rint(np.linspace(low, high, _SAMPLES)).astype(np.int32)
        return lengths[np.random.default_rng(modality).permutation(_SAMPLES)]
