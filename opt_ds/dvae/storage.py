"""Load the dVAE that is kept next to its codes, in a store or in a run's processor files."""

from pathlib import Path

from opt_ds.dvae.model import DiscreteVAE
from opt_ds.errors import UserError
from opt_ds.store.dvae import check_fingerprints
from opt_ds.store.processor_files import load_processor_description
from opt_ds.store.schema import DVAE_FOLDER, StoreDescription


def load_store_dvae(path: Path, description: StoreDescription) -> DiscreteVAE:
    """Load the dVAE of the store at `path`, on the CPU.

    Raise UserError if it is missing, damaged, or did not make the codes.
    """
    dvae = DiscreteVAE.from_pretrained(path / DVAE_FOLDER)
    check_fingerprints(path, description, dvae.fingerprint())
    return dvae


def load_processor_dvae(folder: Path) -> DiscreteVAE:
    """Load the dVAE next to `folder/processor.json`.

    Raise UserError if it is missing, damaged, or did not make the codes.
    """
    dvae = DiscreteVAE.from_pretrained(folder / DVAE_FOLDER)
    if dvae.fingerprint() != load_processor_description(folder).extractors.get("codes"):
        raise UserError(f"{folder / DVAE_FOLDER}: not the dVAE that made the codes: start the run again, which writes it")
    return dvae
