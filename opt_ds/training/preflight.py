"""Checks of the configuration against the stores, before the model is built. Each mistake is reported in one line."""

from operator import attrgetter
from pathlib import Path

from opt_ds.config import Config, load_config
from opt_ds.config.sources import given_keys, parse_value, preset_names, read_source, set_value
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.mixing import store_quotas, store_weights_note
from opt_ds.data.modality import modalities_of
from opt_ds.data.truncation import truncation_lines
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import StoreDescription, load_description
from opt_ds.store.trainable import split_problems
from opt_ds.store.verify import verify_store

DEFAULT_STORE = Path("data/emoji")
#: Smallest value of those sizes of a model that are not at least 1.
_SMALLEST_SIZE = {"model.vocab_size": 8, "model.image_num_classes": 0, "model.image_codebook_size": 2}


def default_preset(stores: list[str], has_gpu: bool) -> tuple[str, str]:
    """Return the preset for a command without --config, and the reason.

    The paper's model is the default on a GPU and the emoji model on a CPU, provided that they fit the store. Without a
    store, the emoji store and its preset are used.
    """
    if not stores:
        return "opt-emoji", "no --config and no --store: the emoji store's own preset" + (
            ", small for a GPU; --config opt-base trains the paper's model on a store of your own" if has_gpu else ""
        )
    description = load_description(Path(stores[0]))
    order = ["opt-base", "opt-emoji"] if has_gpu else ["opt-emoji", "opt-base"]
    fitting = [name for name in order if not _differences(load_config(name), description)]
    device = "GPU" if has_gpu else "CPU"
    return (fitting or order)[0], f"no --config, the store's sizes and a {device}"


def open_stores(config: Config, run: Path | None = None, *, verify: bool = True) -> list[FeatureStore]:
    """Open the stores, check them against each other and the configuration, and verify their contents once.

    Args:
        config: The run's configuration.
        run: The run's output directory, which keeps the records of read-only stores.
        verify: If False, contents are not verified here. One rank calls `verify_stores` for all instead.

    Returns:
        The opened stores.

    Raises:
        UserError: A store is missing, truncated, of another schema or contains NaN; sizes disagree; a split is missing.
    """
    stores = [FeatureStore(path, run) for path in config.data.stores]
    for problem in store_problems(config, stores):
        raise UserError(problem)
    if verify:
        verify_stores(stores, run)
    return stores


def verify_stores(stores: list[FeatureStore], run: Path | None = None) -> None:
    """Raise UserError unless the stores' contents are complete.

    A store is read only if it changed since its last verification.
    """
    for store in stores:
        verify_store(store.path, run=run)


def training_problems(config: Config, stores: list[FeatureStore]) -> list[str]:
    """Return one line, with its fix, for each reason why training rejects these complete stores.

    Tasks are checked only if splits and sizes are right.
    """
    return store_problems(config, stores) or (_task_problems(config, stores) if stores else [])


def store_problems(config: Config, stores: list[FeatureStore]) -> list[str]:
    """Return one line, with its fix, for each split, size, vocabulary and mixing weight that does not fit."""
    problems: list[str] = []
    for store in stores:
        problems += split_problems(store.path, store.description, config.data.train_split, config.data.valid_split)
        try:
            check_store(config, store)
        except UserError as error:
            problems.append(str(error))
        if store.description.tokenizer != stores[0].description.tokenizer:
            problems.append(
                f"{store.path} and {stores[0].path} have different vocabularies: prepare one of them with the other's, opt-ds "
                f"prepare --text {stores[0].tokenizer_folder}"
            )
    if config.data.store_weights is not None and len(stores) > 1:
        try:
            store_quotas(config.data.store_weights)
        except UserError as error:
            problems.append(str(error))
    return problems


def training_notes(config: Config, stores: list[FeatureStore]) -> list[str]:
    """Return one line for each model limit that truncates samples.

    A further line reports rounded proportions of `data.store_weights`.
    """
    lines = truncation_lines(config.model, stores)
    weights = config.data.store_weights
    note = store_weights_note(weights) if weights is not None and len(stores) > 1 else None
    return [*lines, *([note] if note else []), *_unread_modalities(config, stores)]


def _unread_modalities(config: Config, stores: list[FeatureStore]) -> list[str]:
    """Return a line for each modality that a store has and the model does not read, or that no store has."""
    read = config.model.modalities
    lines = [
        f"{store.path}: its {name} is not read, because the model has no such modality (model.plugins adds it)"
        for store in stores
        for name in store.modalities
        if name not in read
    ]
    absent = [name for name in read if not any(name in store.modalities for store in stores)]
    return [*lines, *(f"model.plugins: no store has {name}" for name in absent)]


def _task_problems(config: Config, stores: list[FeatureStore]) -> list[str]:
    try:
        plan = make_plan(config, stores)
    except UserError as error:
        return [str(error)]
    where = ", ".join(str(store.path) for store in stores)
    weights = config.tasks.sampling_weights_at(0.0) if config.finetune is None else {}
    if weights and all(task in plan.disabled_tasks for task, weight in weights.items() if weight):
        why = "; ".join(f"{task}: {reason}" for task, reason in plan.disabled_tasks.items() if weights.get(task))
        return [
            f"{where}: no task can be trained ({why}): prepare samples that have it, or change tasks.sampling_weights"
        ]
    if not plan.has_validation(config.train.validate_samples):
        return [
            f'{where}: no sample of split "{config.data.valid_split}" has what the tasks need: move samples that have it to this '
            f"split (opt-ds split {stores[0].path} --ids FILE), or name another split with data.valid_split"
        ]
    return []


def check_store(config: Config, store: FeatureStore) -> None:
    """Raise UserError, with the settings that fix it, if the store's sizes differ from the model's."""
    differences = _differences(config, store.description)
    if differences:
        remedy = " ".join(f"--set {key}={there}" for key, _, there in differences)
        text = ", ".join(f"{key} is {ours} but the store has {there}" for key, ours, there in differences)
        raise UserError(
            f"{store.path} does not fit preset {config.preset}: {text}: add {remedy}, or omit these keys: they are taken from "
            "the (first) store"
        )


def with_store_sizes(source: str | None, settings: list[str], stores: list[str]) -> tuple[list[str], str | None]:
    """Add settings that set the model's sizes to those of the first store.

    Sizes that `source` or `settings` already sets are left unchanged.

    Return all settings, and a line that lists what was taken from the store (None if nothing differs from the preset).
    """
    if not stores:
        return settings, None
    given = [*given_keys(source or "opt-base"), *(setting.partition("=")[0].strip() for setting in settings)]
    shapes = [setting for setting in settings if setting.startswith(("model.", "data."))]
    config = load_config(source, [*shapes, f"data.stores={stores!r}"])
    found = [
        (key, ours, there)
        for key, ours, there in _differences(config, load_description(Path(stores[0])))
        if key not in given and "model" not in given and there >= _SMALLEST_SIZE.get(key, 1)
    ]
    if not found:
        return settings, None
    taken = ", ".join(f"{key}={there} ({config.preset}: {ours})" for key, ours, there in found)
    return [*settings, *(f"{key}={there}" for key, _, there in found)], f"from {stores[0]}: {taken}"


def _differences(config: Config, store: StoreDescription) -> list[tuple[str, int, int]]:
    """Return (config key, its value, the store's value) for each size that disagrees."""
    sizes: dict[str, int] = {}
    for modality in modalities_of(config.model):
        sizes |= modality.store_sizes(store)
    if store.dims.num_codes is not None:
        sizes["image_codebook_size"] = store.dims.num_codes
    pairs = [(f"model.{key}", attrgetter(key)(config.model), there) for key, there in sizes.items()]
    return [pair for pair in pairs if pair[1] != pair[2]]


def config_name(source: str | None) -> str:
    """Return the name of a run's default output directory under runs/.

    It is the preset without "opt-", or the file's stem.
    """
    name = Path(source or "opt-emoji").stem if source not in preset_names() else str(source)
    return name.removeprefix("opt-")


def settle(source: str | None, settings: list[str], stores: list[str]) -> tuple[Config, list[str], str | None]:
    """Return the configuration with its stores (`stores`, otherwise its own) and the sizes of the first store.

    Returns the configuration, its settings, and a line that lists what was taken from the store (None if nothing).
    """
    stores = stores or configured_stores(source, settings)
    settings, taken = with_store_sizes(source, settings, stores)
    settings = [setting for setting in settings if setting.partition("=")[0].strip() != "data.stores"]
    settings += [f"data.stores={stores!r}"] if stores else []
    return load_config(source, settings), settings, taken


def configured_stores(source: str | None, settings: list[str]) -> list[str]:
    """Return the stores that the settings or the configuration file name."""
    named = [setting for setting in settings if setting.partition("=")[0].strip() == "data.stores"]
    tree = read_source(source or "opt-base")
    for setting in named:
        set_value(tree, ["data", "stores"], parse_value("data.stores", setting.partition("=")[2]))
    found = tree.get("data", {}).get("stores", []) if isinstance(tree.get("data", {}), dict) else []
    if not isinstance(found, (list, tuple)) or not all(isinstance(path, str) for path in found):
        raise UserError(f"data.stores: a list of folders is expected, such as [data/mine] (found {found!r})")
    return list(found)
