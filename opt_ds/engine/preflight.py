"""What must hold between configuration and stores; checked before the model is built, one line a mistake."""

from pathlib import Path

from opt_ds.config import Config, load_config
from opt_ds.config_sources import preset_names
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import Dims, load_description
from opt_ds.store.verify import verify_store

DEFAULT_STORE = Path("data/emoji")


def default_preset(stores: list[str], has_gpu: bool) -> tuple[str, str]:
    """(preset, why) for a start without --config: the paper's model on a GPU, the emoji model on a CPU, if they fit.

    Without a store the emoji store is meant, and its preset.
    """
    if not stores:
        return "opt-emoji", "no --config and no --store: the emoji store's own preset" + (
            ", small for a GPU; --config opt-base trains the paper's model on a store of your own" if has_gpu else ""
        )
    dims = load_description(Path(stores[0])).dims
    order = ["opt-base", "opt-emoji"] if has_gpu else ["opt-emoji", "opt-base"]
    fitting = [name for name in order if not _differences(load_config(name), dims)]
    device = "GPU" if has_gpu else "CPU"
    return (fitting or order)[0], f"no --config, the store's sizes and a {device}"


def open_stores(config: Config) -> list[FeatureStore]:
    """Open the stores, check them against each other and the configuration, and verify their contents once.

    Raises UserError: a store missing, cut off, of another schema, with NaN; sizes that disagree; a split not there.
    """
    stores = [FeatureStore(path) for path in config.data.stores]
    for store in stores:
        check_store(config, store)
        if store.description.tokenizer != stores[0].description.tokenizer:
            raise UserError(f"{store.path} and {stores[0].path} have different vocabularies: use one tokenizer")
        for split in (config.data.train_split, config.data.valid_split):
            if not len(store.split_samples(split)):
                raise UserError(f'{store.path}: split "{split}" is empty: prepare the store with samples in it')
    for store in stores:
        verify_store(store.path)
    return stores


def check_store(config: Config, store: FeatureStore) -> None:
    """Raise UserError, with the settings that mend it, if the store's sizes are not the model's."""
    differences = _differences(config, store.description.dims)
    if differences:
        remedy = " ".join(f"--set {key}={there}" for key, _, there in differences)
        text = ", ".join(f"{key} is {ours} but the store has {there}" for key, ours, there in differences)
        raise UserError(f"{store.path} does not fit preset {config.preset}: {text}: add {remedy}")


def _differences(config: Config, dims: Dims) -> list[tuple[str, int, int]]:
    """(config key, its value, the store's value) for each size that disagrees."""
    model = config.model
    pairs = [
        ("model.vocab_size", model.vocab_size, dims.vocab_size),
        ("model.image_feature_dim", model.image_feature_dim, dims.image_feature_dim),
        ("model.image_num_classes", model.image_num_classes, dims.image_num_classes),
        ("model.audio_feature_dim", model.audio_feature_dim, dims.audio_feature_dim),
    ]
    if dims.num_codes is not None:
        pairs.append(("model.image_codebook_size", model.image_codebook_size, dims.num_codes))
    return [pair for pair in pairs if pair[1] != pair[2]]


def config_name(source: str | None) -> str:
    """Name of a run's default output directory under runs/: the preset without "opt-", or the file's stem."""
    name = Path(source or "opt-emoji").stem if source not in preset_names() else str(source)
    return name.removeprefix("opt-")
