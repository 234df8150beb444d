"""The folder of a dVAE, as kept in a store next to the codes that it made: checks and fingerprint of its files.

    <folder>/config.json          the dVAE's configuration
    <folder>/model.safetensors    its weights
    <folder>/opt_ds_files.json    the hashes of both

No network is built here. `DiscreteVAE.from_pretrained` does that from the same files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from opt_ds.config.dvae import DVAEConfig
from opt_ds.errors import UserError
from opt_ds.store.foreign import check_inside, invalid_field, read_json_object, tensor_shapes
from opt_ds.store.schema import DVAE_FOLDER, StoreDescription
from opt_ds.store.seal import check_seal

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_REMEDY = "restore it, or train it again"


def read_dvae_folder(folder: Path) -> tuple[DVAEConfig, dict[str, tuple[int, ...]]]:
    """Return the configuration of a dVAE and the shapes of its weights by name.

    The files are compared with their hashes first. Raise UserError if a file is missing, is damaged or leads out of the
    folder.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no trained dVAE there (no {name}): train one with `opt-ds train-dvae`")
        check_inside(folder, folder / name)
    check_seal(folder, _REMEDY)
    try:
        config = DVAEConfig.model_validate(read_json_object(folder / CONFIG_FILE, _REMEDY))
    except ValidationError as error:
        where = invalid_field(error)
        raise UserError(f"{folder / CONFIG_FILE}: damaged or foreign dVAE (field {where}): train it again") from None
    return config, tensor_shapes(folder / WEIGHTS_FILE, _REMEDY)


def dvae_fingerprint(config: DVAEConfig, weights: "Mapping[str, Tensor]") -> dict[str, Any]:
    """Return the fingerprint of a dVAE: name, codebook size and SHA-256 of the weights.

    It links codes to their dVAE.
    """
    import torch  # takes seconds to import

    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
        digest.update(content.numpy().tobytes())
    return {"name": "dvae", "num_codes": config.codebook_size, "sha256": digest.hexdigest()}


def dvae_problem(path: Path, description: StoreDescription) -> str | None:
    """Return why the store's codes cannot be decoded to images; None if they can, or if the store has no dVAE."""
    folder = path / DVAE_FOLDER
    if not (description.has_codes and folder.is_dir()):
        return None
    from safetensors.torch import load_file  # torch takes seconds to import

    try:
        config, _ = read_dvae_folder(folder)
        check_fingerprints(path, description, dvae_fingerprint(config, load_file(folder / WEIGHTS_FILE)))
    except UserError as error:
        return str(error)
    return None


def check_fingerprints(path: Path, description: StoreDescription, fingerprint: dict[str, Any]) -> None:
    """Raise UserError unless the dVAE with this fingerprint made the codes of the store at `path`."""
    if fingerprint != description.extractors.get("codes"):
        raise UserError(
            f"{path / DVAE_FOLDER}: not the dVAE that made the store's codes: "
            f"write both again with opt-ds update {path} --modality codes --weights (train-dvae's output)"
        )
