"""The five sample-level cases: which of text, image and audio belong together, and which inputs donors replace."""

import numpy as np

#: Names in the order of the matching head's scores.
CASES = ("all", "image_audio", "text_audio", "text_image", "none")
NUM_CASES = len(CASES)
#: The case of the matching pair that remains without modality 0 text, 1 image, 2 audio.
CASE_OF_PAIR = np.array([1, 2, 3], dtype=np.int8)


def matching_case(case: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """bool [B, 3]: the modalities that donors replace, so that exactly this case holds.

    `kept` names the modality that stays the sample's own where nothing matches; the two others come from two donors.
    """
    modality = np.arange(3)[None, :]
    case, kept = np.asarray(case)[:, None], np.asarray(kept)[:, None]
    lone = (case >= 1) & (case <= 3) & (modality == case - 1)
    return lone | ((case == NUM_CASES - 1) & (modality != kept))
