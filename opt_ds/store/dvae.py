"""The dVAE that lies in a store beside the codes that it made."""

from pathlib import Path
from typing import TYPE_CHECKING

from opt_ds.errors import UserError
from opt_ds.store.schema import DVAE_FOLDER, StoreDescription

if TYPE_CHECKING:
    from opt_ds.model.dvae import DiscreteVAE


def load_store_dvae(path: Path, description: StoreDescription) -> "DiscreteVAE":
    """Load the dVAE of the store at `path`, on the CPU. UserError if it is missing, damaged, or not the codes' own."""
    from opt_ds.model.dvae import DiscreteVAE

    dvae = DiscreteVAE.from_pretrained(path / DVAE_FOLDER)
    if dvae.identity() != description.extractors.get("codes"):
        raise UserError(
            f"{path / DVAE_FOLDER}: not the dVAE that made the store's codes: "
            f"write both again with opt-ds update {path} --modality codes --weights (train-dvae's output)"
        )
    return dvae


def dvae_problem(path: Path, description: StoreDescription) -> str | None:
    """Return why nothing can paint the store's codes; None also for codes that came without a dVAE."""
    if not (description.has_codes and (path / DVAE_FOLDER).is_dir()):
        return None
    try:
        load_store_dvae(path, description)
    except UserError as error:
        return str(error)
    return None
