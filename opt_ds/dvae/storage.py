"""Load the dVAE that a store, or a run's processor files, keep beside the codes that it made."""

from pathlib import Path

from opt_ds.dvae.model import DiscreteVAE
from opt_ds.errors import UserError
from opt_ds.store.dvae import check_identity
from opt_ds.store.processor_files import load_processor_description
from opt_ds.store.schema import DVAE_FOLDER, StoreDescription


def load_store_dvae(path: Path, description: StoreDescription) -> DiscreteVAE:
    """Load the dVAE of the store at `path`, on the CPU. UserError if it is missing, damaged, or not the codes' own."""
    dvae = DiscreteVAE.from_pretrained(path / DVAE_FOLDER)
    check_identity(path, description, dvae.identity())
    return dvae


def load_processor_dvae(folder: Path) -> DiscreteVAE:
    """Load the dVAE beside `folder/processor.json`. UserError if it is missing, damaged or not the one that made the codes."""
    dvae = DiscreteVAE.from_pretrained(folder / DVAE_FOLDER)
    if dvae.identity() != load_processor_description(folder).extractors.get("codes"):
        raise UserError(f"{folder / DVAE_FOLDER}: not the dVAE that made the codes: start the run once more (it writes it)")
    return dvae
