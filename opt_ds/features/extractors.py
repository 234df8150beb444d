"""The one interface of all feature extractors, and their weights.

A new modality or backbone is one class with this interface; the pipeline knows nothing else about it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from opt_ds.errors import UserError
from opt_ds.store.files import file_sha256


class Extractor(Protocol):
    """Turns decoded inputs (pictures, waveforms) into features. Built inside the worker process that uses it.

    `extract` gets a short list of inputs and returns one result for each, in order; results depend on the list alone.
    None among the inputs is a hole, a file that could not be read: it gives None, and the others' results are the same
    bytes as if it were a file.
    """

    name: str
    dim: int

    def identity(self) -> dict[str, Any]:
        """Return name, settings, package and version, and the SHA-256 of the weights: what `store.json` records."""
        ...

    def extract(self, inputs: Sequence[Any]) -> list[Any]:
        """Return one feature item per input, None for None."""
        ...


def weights_identity(path: Path) -> str:
    """Return the SHA-256 of a weights file, or of the weight files in a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not files:
        raise UserError(f"{path}: no weights there (*.safetensors or *.bin): give a folder saved by Hugging Face")
    return "+".join(file_sha256(file) for file in files)


def load_state_dict(path: Path | None, what: str) -> dict[str, Any]:
    """Load a checkpoint's tensors without running code from it. UserError if it is missing or not a state dict."""
    from opt_ds.weights import read_state_dict  # torch takes seconds to import

    if path is None:
        raise UserError(f"{what}: it needs a checkpoint: name its file")
    return read_state_dict(path, what)
