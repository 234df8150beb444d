"""What of a store a trained model needs to read raw files itself: tokenizer, identities of the extractors, the dVAE.

    <folder>/processor.json    `ProcessorDescription`
    <folder>/tokenizer/        the store's
    <folder>/dvae/             the store's, if it has image codes
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from opt_ds.errors import UserError
from opt_ds.store.files import write_json
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import TOKENIZER_FOLDER, Dims, TokenizerDescription

PROCESSOR_FOLDER, PROCESSOR_FILE, DVAE_FOLDER = "processor", "processor.json", "dvae"


class ProcessorDescription(BaseModel):
    """How the model's features were made. `extractors` as in `store.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dims: Dims
    tokenizer: TokenizerDescription
    extractors: dict[str, dict[str, Any]]


def copy_processor_files(store: FeatureStore, folder: Path) -> None:
    """Keep what a model of this store needs in `folder`; what is there already is replaced. Ends whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shutil.copytree(store.tokenizer_folder, temporary / TOKENIZER_FOLDER)
    if (store.path / DVAE_FOLDER).is_dir():
        shutil.copytree(store.path / DVAE_FOLDER, temporary / DVAE_FOLDER)
    description = store.description
    kept = ProcessorDescription(dims=description.dims, tokenizer=description.tokenizer, extractors=description.extractors)
    write_json(temporary / PROCESSOR_FILE, kept.model_dump(mode="json"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_processor_description(folder: Path) -> ProcessorDescription:
    """Read `folder/processor.json`. Raises UserError for one that is missing or malformed."""
    file = folder / PROCESSOR_FILE
    try:
        return ProcessorDescription.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        raise UserError(
            f"{folder}: no {PROCESSOR_FILE} there, which says how to read raw files: start the run once more (it writes it)"
        ) from None
    except (ValueError, ValidationError) as error:
        raise UserError(f"{file}: not readable ({str(error).splitlines()[0]}): restore it") from None
