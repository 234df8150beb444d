"""Figures that the paper reports (Liu et al. 2021, arXiv 2107.00249), in per cent, for comparison.

Its galleries have 5,000 candidates from Open Images. None of its figures comes from the emoji corpus.
"""

CLASSIFICATION_MAP = 58.11  # the paper does not state the input modalities of this figure
#: Direction -> R@1, R@5, R@10; None where the figure is unknown.
RETRIEVAL: dict[str, tuple[float | None, float | None, float | None]] = {
    "image_to_text": (39.4, 71.94, 82.56),
    "text_to_image": (41.96, 72.0, 81.26),
    "text_to_audio": (78.0, 92.7, 95.8),
    "audio_to_text": (80.3, None, None),
    "text_audio_to_image": (57.06, None, None),
}
SPEECH_RECOGNITION_WER = 30.24
#: Relative change of classification mAP without a level.
ABLATION = {"no-sample-level": -7.4, "no-modality-level": -7.0}
