"""The five matching labels: which of text, image and audio match, and which inputs are replaced by negatives."""

import numpy as np

#: Names in the order of the matching head's scores.
MATCHING_LABELS = ("all", "image_audio", "text_audio", "text_image", "none")
NUM_LABELS = len(MATCHING_LABELS)
#: Matching label of the pair that remains without modality 0 text, 1 image, 2 audio.
LABEL_OF_PAIR = np.array([1, 2, 3], dtype=np.int8)


def matching_label(label: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return bool [B, 3], the modalities to replace by negatives so that exactly this matching label holds.

    `kept` is the modality that is kept if the label is "none"; the two others come from two negatives.
    """
    modality = np.arange(3)[None, :]
    label, kept = np.asarray(label)[:, None], np.asarray(kept)[:, None]
    lone = (label >= 1) & (label <= 3) & (modality == label - 1)
    return lone | ((label == NUM_LABELS - 1) & (modality != kept))
