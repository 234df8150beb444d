"""Regions of a detector of transformers with object queries: DETR, Deformable DETR, RT-DETR, YOLOS and the like.

Shape letters: Q queries, K classes, R regions, C channels.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.errors import UserError
from opt_ds.features.extractors import weights_fingerprint
from opt_ds.features.hugging_face import build_config, build_processor, load_model, model_class, read_fields, read_processor
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.weights import read_folder

_WHAT = "--image-weights of hf_detector"
#: model_type -> (class of transformers, its image processor, whether the scores are those of a softmax with "no object").
DETECTORS = {
    "detr": ("DetrForObjectDetection", "DetrImageProcessor", True),
    "table-transformer": ("TableTransformerForObjectDetection", "DetrImageProcessor", True),
    "yolos": ("YolosForObjectDetection", "YolosImageProcessor", True),
    "conditional_detr": ("ConditionalDetrForObjectDetection", "ConditionalDetrImageProcessor", False),
    "deformable_detr": ("DeformableDetrForObjectDetection", "DeformableDetrImageProcessor", False),
    "rt_detr": ("RTDetrForObjectDetection", "RTDetrImageProcessor", False),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", "RTDetrImageProcessor", False),
}
_KEYS = (
    "size", "max_size", "resample", "image_mean", "image_std", "do_resize", "do_rescale", "rescale_factor", "do_normalize",
    "do_pad", "pad_size",
)  # fmt: skip


class HFDetectorOptions(Section):
    """The options of hf_detector. Those of the selection are those of faster_rcnn."""

    weights: Path | None = Field(
        None, description=f"A Hugging Face folder of one of {', '.join(DETECTORS)} (its model_type) with its detection head."
    )
    backbone: str | None = Field(
        None, description="Architecture that the folder must have, by its model_type. None: that of its config.json."
    )
    min_regions: int = Field(10, ge=1, description="Smallest number of regions per image, as far as there are queries.")
    max_regions: int = Field(100, ge=1, description="Largest number of regions per image.")
    confidence: float = Field(0.2, description="Regions below this score are dropped, except to reach `min_regions`.")


class HFDetectorExtractor(RegionExtractor):
    """The object queries of a detector: the last hidden state of each as feature, its box, its best class and that one's score.

    Queries are not suppressed by overlap, as these detectors need no such step. The network runs in fp32, one image at a time.
    """

    name = "hf_detector"
    options = HFDetectorOptions

    def __init__(self, options: HFDetectorOptions | None = None, device: str = "cpu") -> None:
        options = options or HFDetectorOptions()
        folder = options.weights
        if folder is None:
            raise UserError("--images hf_detector: it needs a model: name its folder with --image-weights")
        fields, self._backbone = _fields(folder, options.backbone)
        kind, processor, self._has_no_object = DETECTORS[self._backbone]
        self._options, self._device = options, device
        self._weights_sha256 = weights_fingerprint(folder)
        config = build_config(folder, fields, self._backbone)
        state = read_folder(folder, _WHAT)
        self._model = load_model(model_class(kind, folder), config, state, folder, f"the {kind} of its config.json").to(device)
        settings = read_processor(folder, "image_processor")
        if settings is None:
            raise UserError(f"{folder}: no preprocessor_config.json there, which states the size and colours of its input")
        names = sorted({own for _, own, _ in DETECTORS.values()})
        self._processor = build_processor(names, settings, _KEYS, processor, folder)
        self.num_classes = int(config.num_labels)
        self.dim = int(config.hidden_size)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        own = self._processor
        return {
            "name": self.name,
            "backbone": self._backbone,
            "package": "transformers",
            "version": version("transformers"),
            "weights_sha256": self._weights_sha256,
            "input": {
                "size": dict(own.size),
                "resample": int(own.resample),
                "scale": own.rescale_factor if own.do_rescale else 1,
                "colours": [list(own.image_mean), list(own.image_std)] if own.do_normalize else None,
            },
            **self._options.model_dump(include={"min_regions", "max_regions", "confidence"}),
        }

    def extract(self, inputs: Sequence[Image.Image | None]) -> list[RegionFeatures | None]:
        """Return the regions of each image, best first."""
        return [None if image is None else self._regions(image) for image in inputs]

    @torch.inference_mode()
    def queries(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all queries' features [Q, C], corners in 0..1 [Q, 4] and probabilities of the classes [Q, K], float32."""
        inputs = self._processor(images=[image], return_tensors="pt").to(self._device)
        output = self._model(**inputs)
        logits_qk = output.logits[0].float()
        scores_qk = logits_qk.softmax(-1)[:, :-1] if self._has_no_object else logits_qk.sigmoid()
        features_qc = output.last_hidden_state[0, -len(logits_qk) :].float()  # YOLOS has the patches before them
        x, y, width, height = output.pred_boxes[0].float().unbind(-1)
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1).clamp(0, 1)
        return features_qc.cpu().numpy(), corners.cpu().numpy(), scores_qk.cpu().numpy()

    def _regions(self, image: Image.Image) -> RegionFeatures:
        features_qc, corners, scores_qk = self.queries(image)
        scores, labels = scores_qk.max(1), scores_qk.argmax(1)
        order = np.argsort(-scores, kind="stable")
        confident = int((scores >= self._options.confidence).sum())
        kept = order[: min(max(confident, self._options.min_regions), self._options.max_regions)]
        with np.errstate(over="ignore"):  # the store refuses features beyond float16
            features = features_qc[kept].astype("float16")
        return RegionFeatures(
            features, boxes_with_size(corners[kept]), labels[kept].astype("int16"), scores[kept].astype("float16")
        )


def _fields(folder: Path, named: str | None) -> tuple[dict[str, Any], str]:
    """Return the fields of a folder's config.json and its model_type. UserError for another folder than is named."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder ({_WHAT})")
    fields, found = read_fields(
        folder, named, DETECTORS, reader="hf_detector", kind="detector", option="--image-backbone "
    )
    return {**fields, "use_pretrained_backbone": False}, found  # the folder has the backbone's weights
