"""The interface of all feature extractors, and the loading of their weights.

A new modality or backbone is one class with this interface. The pipeline depends on nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from opt_ds.errors import UserError
from opt_ds.store.files import file_sha256


class Extractor(Protocol):
    """Converts decoded inputs (images, waveforms) to features. It is built inside the worker process that uses it.

    `extract` takes a short list of inputs and returns one result per input, in order. The results depend on this list
    only. None stands for an unreadable file; its result is None. The results of the other inputs are the same bytes as
    if the file had been readable.
    """

    name: str
    dim: int

    def identity(self) -> dict[str, Any]:
        """Return the fingerprint for `store.json`: name, settings, package, version and the SHA-256 of the weights."""
        ...

    def extract(self, inputs: Sequence[Any]) -> list[Any]:
        """Return one feature item per input; None for None."""
        ...


def weights_identity(path: Path) -> str:
    """Return the SHA-256 of a weights file, or of all weight files in a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not files:
        raise UserError(f"{path}: no weights there (*.safetensors or *.bin): give a folder saved by Hugging Face")
    return "+".join(file_sha256(file) for file in files)


def load_state_dict(path: Path | None, what: str) -> dict[str, Any]:
    """Load the tensors of a checkpoint without running code from it.

    Raise UserError if it is missing or not a state dict.
    """
    from opt_ds.weights import read_state_dict  # torch takes seconds to import

    if path is None:
        raise UserError(f"{what}: it needs a checkpoint: name its file")
    return read_state_dict(path, what)
