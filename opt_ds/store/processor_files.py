"""The parts of a store that a trained model needs to process raw files: tokenizer, extractor fingerprints, dVAE.

    <folder>/processor.json       `ProcessorDescription`
    <folder>/tokenizer/           the store's tokenizer
    <folder>/dvae/                the store's dVAE, if it has image codes
    <folder>/image_clusters-….safetensors    the clusters of its region labels, if it has them
    <folder>/opt_ds_files.json    the hashes of all these files, compared whenever one of them is read
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from opt_ds.errors import UserError
from opt_ds.store.clusters import IMAGE_LABELS, load_clusters
from opt_ds.store.files import atomic_folder, folder_sha256, write_json
from opt_ds.store.foreign import invalid_field, read_json_object
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import DVAE_FOLDER, TOKENIZER_FOLDER, Dims, TokenizerDescription
from opt_ds.store.seal import check_seal, seal_folder
from opt_ds.store.tokenizer import describe_tokenizer

_LOG = logging.getLogger(__name__)
PROCESSOR_FOLDER, PROCESSOR_FILE = "processor", "processor.json"


class ProcessorDescription(BaseModel):
    """How the model's features were computed. `extractors` holds fingerprints, as in `store.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dims: Dims
    tokenizer: TokenizerDescription
    extractors: dict[str, dict[str, Any]]


def copy_processor_files(store: FeatureStore, folder: Path) -> None:
    """Copy what a model of this store needs into `folder`.

    Existing content is replaced; an interruption leaves no partial folder.
    """
    description = store.description
    kept = ProcessorDescription(dims=description.dims, tokenizer=description.tokenizer, extractors=description.extractors)
    with atomic_folder(folder) as temporary:
        shutil.copytree(store.tokenizer_folder, temporary / TOKENIZER_FOLDER)
        if (store.path / DVAE_FOLDER).is_dir():
            shutil.copytree(store.path / DVAE_FOLDER, temporary / DVAE_FOLDER)
        if (clusters := load_clusters(store.path, description.extractors)) is not None:
            clusters.save(temporary)
        write_json(temporary / PROCESSOR_FILE, kept.model_dump(mode="json"))
        seal_folder(temporary)


def fingerprint_differences(
    own: ProcessorDescription, store: FeatureStore, codes: bool = True, labels: bool = True
) -> list[str]:
    """Return the differences, by fingerprints, of a store from what a model was trained on, each with its effect.

    `codes`: compare the image codes too. `labels`: compare the clusters of region labels too.
    """
    there = store.description
    found = []
    if own.tokenizer.sha256 != there.tokenizer.sha256:
        found.append("its vocabulary is not the model's, so words become other words")
    # A further modality that only one of the two has is not read by the other.
    further = [name for name in there.further if name in own.extractors]
    for kind in ("image", "audio", *further):
        if own.extractors.get(kind) != there.extractors.get(kind):
            ours, theirs = (_short(extractors.get(kind)) for extractors in (own.extractors, there.extractors))
            found.append(
                f"its {kind} features come from another extractor than the model's ({theirs}, not {ours}), so they mean "
                "something else"
            )
    clusters = own.extractors.get(IMAGE_LABELS)
    if labels and clusters is not None and there.extractors.get(IMAGE_LABELS, clusters) != clusters:
        found.append("its region labels are of other clusters than the model's, so MRC is measured on other classes")
    if codes and "codes" in own.extractors and store.has_codes and own.extractors["codes"] != there.extractors.get("codes"):
        found.append("its image codes come from another dVAE than the model's, so image generation is compared with other codes")
    return found


def _short(extractor: dict[str, Any] | None) -> str:
    if not extractor:
        return "none"
    weights = str(extractor.get("weights_sha256") or "")[:8]
    return " ".join(filter(None, [extractor.get("name", ""), str(extractor.get("version") or ""), weights]))


def check_fingerprints(folder: Path, store: FeatureStore, force: bool) -> None:
    """Refuse a store whose vocabulary or extractors differ from those in `folder`, a run's processor files.

    With `force`, log a warning per difference instead. Without processor files, log that nothing was compared.
    """
    if not (folder / PROCESSOR_FILE).is_file():
        _LOG.warning(f"{folder / PROCESSOR_FILE} does not exist: the extractors of {store.path} are not checked")
        return
    differences = fingerprint_differences(load_processor_description(folder), store)
    if differences and not force:
        raise UserError(
            f"{store.path}: {'; '.join(differences)}: use a store prepared like the one that the model was trained on, or --force"
        )
    for difference in differences:
        _LOG.warning(f"--force: {store.path}: {difference}")


def load_processor_description(folder: Path) -> ProcessorDescription:
    """Read `folder/processor.json`, after comparing all files of the folder with their recorded hashes.

    Raise UserError for a file that is missing, malformed or was modified.
    """
    file = folder / PROCESSOR_FILE
    remedy = "restore the folder, or start the run again, which writes it"
    if not file.is_file():
        raise UserError(
            f"{folder}: no {PROCESSOR_FILE} there, which specifies how to read raw files: start the run again, which writes it"
        )
    check_seal(folder, remedy)
    fields = read_json_object(file, remedy)
    try:
        description = ProcessorDescription.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{file}: damaged, field {invalid_field(error)}: {remedy}") from None
    tokenizer = folder / TOKENIZER_FOLDER
    if not tokenizer.is_dir() or folder_sha256(tokenizer) != description.tokenizer.sha256:
        raise UserError(f"{tokenizer}: its files differ from the checksum in {PROCESSOR_FILE}: {remedy}")
    found, size = describe_tokenizer(tokenizer)
    if found != description.tokenizer or size != description.dims.vocab_size:
        raise UserError(f"{tokenizer}: {size} tokens, which are not those of {PROCESSOR_FILE}: {remedy}")
    return description
