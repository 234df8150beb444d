"""Image metrics computed by networks whose weights the user supplies: Fréchet inception distance and CLIP score.

Nothing is downloaded. FID (Heusel et al. 2017) is computed by torch-fidelity with its Inception-v3 (the TensorFlow
weights of 2015). The CLIP score (Hessel et al. 2021) is 100 · max(cos, 0), the scale of torchmetrics, from a Hugging
Face CLIP.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_ds.errors import UserError
from opt_ds.extras import needs_extra
from opt_ds.weights import read_config, read_folder, read_state_dict, refuse_remainder

_IDS = r".*\.position_ids"


class _Images(torch.utils.data.Dataset):
    """Images uint8 [n, 3, H, W] as the dataset that torch-fidelity reads."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[place])


def frechet_inception_distance(generated: np.ndarray, true: np.ndarray, weights: Path) -> float:
    """Return the FID of images, uint8 [n, 3, H, W].

    It decreases with n, so only figures with equal n are comparable.

    Raise UserError if the weights are missing or not those of torch-fidelity's Inception-v3, or if there are fewer than
    two images.
    """
    check_inception(weights)
    from torch_fidelity import calculate_metrics

    if min(len(generated), len(true)) < 2:
        raise UserError("--inception: the distance requires at least two samples: raise --generate")
    try:
        found = calculate_metrics(
            input1=_Images(generated), input2=_Images(true), fid=True, feature_extractor_weights_path=str(weights),
            cuda=torch.cuda.is_available(), batch_size=min(64, len(generated)), save_cpu_ram=True, cache=False,
            verbose=False,
        )  # fmt: skip
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(f"--inception {weights}: {_NOT_INCEPTION}") from None
    return float(found["frechet_inception_distance"])


_NOT_INCEPTION = "not the weights of torch-fidelity's Inception-v3 (weights-inception-2015-12-05-6726825d.pth of its releases)"


def check_inception(weights: Path) -> None:
    """Raise UserError unless the file is a dictionary of tensors, because torch-fidelity unpickles any file."""
    with needs_extra("downstream", "--inception"):
        import torch_fidelity  # noqa: F401 - before hours of generation
    if not weights.is_file():
        raise UserError(f"--inception {weights}: no such file: give {_NOT_INCEPTION.removeprefix('not ')}")
    try:
        read_state_dict(weights, "--inception")
    except UserError as error:
        raise UserError(f"--inception: {_NOT_INCEPTION}: {error}") from None
    try:  # load it as torch-fidelity does, whatever else the file contains
        state = torch.load(weights, map_location="meta", weights_only=True)
    except Exception:
        state = {}
    if not isinstance(state, dict) or "Mixed_7c.branch_pool.conv.weight" not in state:
        raise UserError(f"--inception {weights}: {_NOT_INCEPTION}")


class ClipScore:
    """CLIP score by a Hugging Face CLIP in a local folder (model and processor, as written by save_pretrained).

    Raise UserError if the folder does not hold one.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        if not (folder / "config.json").is_file():
            raise UserError(f"--clip {folder}: no config.json there: give a folder that Hugging Face's CLIP was saved to")
        read_config(folder, "clip", "CLIP")
        read_folder(folder, "--clip")  # reports problems with the weights in plain words
        try:
            found: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, attn_implementation="sdpa"
            )
            model, loaded = found
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception:  # transformers raises many kinds of errors, with messages that do not help here
            raise UserError(
                f"--clip {folder}: not readable as CLIP: give the folder that its model and processor were saved to"
            ) from None
        refuse_remainder(loaded["missing_keys"], loaded["unexpected_keys"], f"--clip {folder}", "its config.json", _IDS)
        self.model, self.device = model.to(device).eval(), device

    def mean(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """Return the mean score (0 … 100) of images, uint8 [n, 3, H, W], and their captions."""
        return float(np.mean(self.scores(images, captions)))

    @torch.inference_mode()
    def scores(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Return scores, float32 [n]. Captions are truncated to the length that the model reads."""
        found = []
        for start in range(0, len(images), 64):
            part = slice(start, start + 64)
            given = self.processor(
                text=list(captions[part]), images=list(images[part]), return_tensors="pt", padding=True, truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings, input_data_format="channels_first",
            ).to(self.device)  # fmt: skip
            output = self.model(**given)
            found.append(torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).clamp_min(0))
        return 100 * torch.cat(found).cpu().numpy()
