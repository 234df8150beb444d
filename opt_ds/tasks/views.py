"""Views of a sample: the modalities that alignment encodes on their own, and the pairs of them that it compares.

Legend: n samples or views, M modalities of the model.
"""

from collections.abc import Sequence

import numpy as np

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT

#: View -> its modalities.
VIEWS = {"text": (TEXT,), "image": (IMAGE,), "audio": (AUDIO,), "text_audio": (TEXT, AUDIO)}
#: Pair -> the two views that are contrasted.
PAIRS = {
    "image_text": ("image", "text"), "audio_text": ("audio", "text"), "image_audio": ("image", "audio"),
    "text_audio_image": ("text_audio", "image"),
}  # fmt: skip
NUMBER_OF_VIEW = {frozenset(modalities): number for number, modalities in enumerate(VIEWS.values())}
VIEW_NAMES = tuple(VIEWS)


def views_of_pairs(pairs: Sequence[str]) -> tuple[str, ...]:
    """Return the views that occur in these pairs, in the order of VIEWS."""
    return tuple(view for view in VIEWS if any(view in PAIRS[pair] for pair in pairs))


def needed_views(present: np.ndarray, pairs: Sequence[str]) -> np.ndarray:
    """Return which views are encoded, bool [n, views], of samples that have modalities bool [n, M]."""
    has = {view: present[:, list(modalities)].all(1) for view, modalities in VIEWS.items()}
    needed = np.zeros((len(present), len(VIEWS)), dtype=bool)
    for first, second in (PAIRS[pair] for pair in pairs):
        both = has[first] & has[second]
        needed[:, VIEW_NAMES.index(first)] |= both
        needed[:, VIEW_NAMES.index(second)] |= both
    return needed


def rows_of_views(source_rows: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Return the input rows of views int64 [n], int64 [n, M]; the modalities that a view lacks are −1."""
    reads = np.array([[m in modalities for m in range(source_rows.shape[1])] for modalities in VIEWS.values()])
    return np.where(reads[view], source_rows, -1)


def views_of_rows(input_rows: np.ndarray) -> np.ndarray:
    """Return the view that has these input rows, int64 [n]."""
    reads = np.array([[m in modalities for m in range(input_rows.shape[1])] for modalities in VIEWS.values()])
    return ((input_rows >= 0)[:, None] == reads[None]).all(2).argmax(1)
