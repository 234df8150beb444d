"""opt_ds: pre-train, evaluate and serve the Omni-Perception Pre-Trainer (OPT, arXiv 2107.00249) with DeepSpeed.

    import opt_ds

    model = opt_ds.load("my-model")
    print(model.caption("photo.png"))

Importing the package imports neither PyTorch nor NumPy; `load` does.
"""

from typing import TYPE_CHECKING, Any

from opt_ds.errors import UserError
from opt_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from opt_ds.serving.model import Model

__all__ = ["Model", "UserError", "__version__", "load"]


def load(
    path: "str | Path",
    *,
    device: "str | torch.device" = "auto",
    precision: str = "fp32",
    image_weights: "str | Path | None" = None,
    speech_weights: "str | Path | None" = None,
    extractor_options: "Mapping[str, Mapping[str, Any]] | None" = None,
) -> "Model":
    """Load a trained model for use.

    Args:
        path: A folder that `opt-ds export` wrote, a run's output directory (its best checkpoint), or one checkpoint of a run.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        precision: "fp32"; "bf16" or "fp16", with which the weights take half the memory and results differ slightly; or "auto":
            fp32 on the CPU, bf16 on GPUs from Ampere on, fp16 on older ones.
        image_weights: Weights of the image extractor, if no package includes them.
        speech_weights: Weights of the speech extractor, if it has any.
        extractor_options: Modality -> options of its extractor that the model does not record, such as other files.

    Returns:
        The model. See `opt_ds.Model` for what it does.

    Raises:
        UserError: If there is no model at `path`, it is damaged, or device or precision do not exist here.
    """
    from opt_ds.serving.model import load_model

    return load_model(
        path,
        device=device,
        precision=precision,
        image_weights=image_weights,
        speech_weights=speech_weights,
        extractor_options=extractor_options,
    )


def __getattr__(name: str) -> Any:
    if name == "Model":
        from opt_ds.serving.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
