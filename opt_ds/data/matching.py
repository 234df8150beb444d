"""The five matching labels: which of text, image and audio match, and which inputs are replaced by negatives."""

import numpy as np

#: Names in the order of the matching head's scores.
CASES = ("all", "image_audio", "text_audio", "text_image", "none")
NUM_CASES = len(CASES)
#: Matching label of the pair that remains without modality 0 text, 1 image, 2 audio.
CASE_OF_PAIR = np.array([1, 2, 3], dtype=np.int8)


def matching_case(case: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return bool [B, 3], the modalities to replace by negatives so that exactly this matching label holds.

    `kept` is the modality that is kept if the label is "none"; the two others come from two negatives.
    """
    modality = np.arange(3)[None, :]
    case, kept = np.asarray(case)[:, None], np.asarray(kept)[:, None]
    lone = (case >= 1) & (case <= 3) & (modality == case - 1)
    return lone | ((case == NUM_CASES - 1) & (modality != kept))
