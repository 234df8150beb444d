"""`--init-from RUN`: start a new pre-training run from another run's weights, and optionally from Adam's moments.

Carried over: weights, the standardisation of features and, with `--init-moments`, Adam's two moments and its count of
updates. Not carried over: step, schedule, position in the data, loss scale, best validation. `InitConfig` records the
start in the new run, so that resuming never reads the source run again.
"""

import json
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from opt_ds.abilities import GENERATE_IMAGES
from opt_ds.config import Config, InitConfig, ModelConfig, config_from_dict, load_config
from opt_ds.config.sources import given_keys
from opt_ds.data.modality import modalities_of
from opt_ds.errors import UserError
from opt_ds.former_names import LAUNCH, current_fields
from opt_ds.store.foreign import tensor_shapes
from opt_ds.store.processor_files import (
    PROCESSOR_FILE,
    PROCESSOR_FOLDER,
    fingerprint_differences,
    load_processor_description,
)
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import load_description
from opt_ds.training import checkpoint, run_folder
from opt_ds.training.checkpoint_files import check_file, pointed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from opt_ds.model.opt import OPT

#: Settings of the model that change neither the shape nor the meaning of a weight.
_FREE = ("dropout", "attention_dropout", "initializer_range", "embedding_range", "bert")


@dataclass(frozen=True)
class Start:
    """What a new run starts from, and the configuration that its model's settings come from."""

    init: InitConfig
    config: Config  # the source's configuration, or the run's own if it has already begun
    resumes: bool = False

    @property
    def run(self) -> Path:
        """Path of the source, as the user specified it."""
        return Path(self.init.run)

    @property
    def free(self) -> tuple[str, ...]:
        """Settings of the model that may differ from the source's.

        They include those of heads that the source never trained.
        """
        losses = [loss for unit in self.config.tasks.units.values() for loss in unit.losses]
        of_limits = [key for unit in self.config.model.modalities.values() for key in unit.free_keys]
        return (
            *_FREE,
            *of_limits,
            *(key for loss in losses if loss.name not in self.init.trained_losses for key in loss.settings),
        )


# ---- before the run: checkpoint and settings


def find_start(given: Path, moments: bool, output: Path | None) -> Start:
    """Return the start that `--init-from given` means for the run in `output`.

    A run that has begun keeps its own start.

    Raise UserError if `output` is None, the source has no readable checkpoint or is `output` itself, or the run in
    `output` began with another start.
    """
    if output is None:
        raise UserError("--init-from starts a new run: name its folder with --output")
    if given.resolve() == output.resolve() or given.resolve().is_relative_to((output / checkpoint.FOLDER).resolve()):
        raise UserError(
            f"--init-from {given}: this is the run in --output itself: name a new folder with --output, or omit --init-from to "
            "resume the run"
        )
    begun = recorded(output)
    if begun is None:
        return _start(given, moments)
    if begun.init is None:
        raise UserError(f"{output} holds a run that began without --init-from: omit it to resume, or use another --output")
    if not _is_same(begun.init, given):
        raise UserError(
            f"{output} holds a run that began with --init-from {begun.init.run}, not {given}: name that one to resume, or use "
            "another --output"
        )
    if begun.init.moments != moments:
        began, remedy = ("with", "add") if begun.init.moments else ("without", "omit")
        raise UserError(
            f"{output} holds a run that began {began} --init-moments: {remedy} it to resume, or use another --output"
        )
    return Start(begun.init, begun, resumes=True)


def recorded(output: Path) -> Config | None:
    """Return the configuration of the run in `output`, or None if no run has begun there."""
    files = (output / run_folder.RUN_FILE, output / run_folder.CONFIG_FILE)
    return load_config(str(files[1])) if all(file.is_file() for file in files) else None


def refuse_forgotten(config: Config, output: Path) -> None:
    """Raise UserError if the run in `output` began with --init-from and the current command omits the option."""
    init = run_folder.recorded_init(output) if config.init is None else None
    if init is not None:
        flag = " --init-moments" if init.moments else ""
        raise UserError(
            f"{output} holds a run that began with --init-from {init.run}{flag}: add this to resume, or use another --output"
        )


def _is_same(init: InitConfig, given: Path) -> bool:
    """Return whether `given` is the source recorded in `init`, possibly under another path."""
    if str(given.resolve()) == init.run:
        return True
    try:
        return checkpoint.weights_sha256(checkpoint.resolve_checkpoint(given)) == init.weights_sha256
    except UserError:
        return False


def _start(given: Path, moments: bool) -> Start:
    if not given.exists():
        raise UserError(f"--init-from {given}: no such folder: name a run's output directory, or one checkpoint in it")
    if checkpoint.is_exported(given):
        raise UserError(f"--init-from {given}: an exported model, not a run: name the run that it was exported from")
    folder = checkpoint.resolve_checkpoint(given)
    run = checkpoint.run_of(folder)
    if moments:
        check_file(folder, checkpoint.MOMENTS_FILE)
    state = checkpoint.read_state(folder)
    config = config_from_dict(state["config"], where=str(folder / checkpoint.STATE_FILE))
    steps = checkpoint.train_state(state).adam_steps if moments else 0
    init = InitConfig(
        run=str(given.resolve()), checkpoint=str(folder.resolve()), weights_sha256=checkpoint.weights_sha256(folder),
        trained_losses=_trained_losses(config, run), moments=moments, adam_steps=steps,
    )  # fmt: skip
    return Start(init, config)


def _trained_losses(config: Config, run: Path) -> tuple[str, ...]:
    """Return the losses whose heads a run trained. Losses of tasks that had no samples in any launch are excluded."""
    before = (
        *(config.finetune.trained_losses if config.finetune else ()),
        *(config.init.trained_losses if config.init else ()),
    )
    disabled = _disabled_tasks(run / run_folder.RUN_FILE)
    without = disabled | {loss for task in disabled for loss in config.tasks.sampled.get(task, ())}
    trained = (loss for loss in config.trained_losses if loss in before or loss not in without)
    sampled = {loss for losses in config.tasks.sampled.values() for loss in losses}
    return tuple(loss for loss in trained if loss in sampled)


def _disabled_tasks(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    try:
        launches = json.loads(file.read_text(encoding="utf-8"))["launches"]
        disabled = [set(current_fields(launch, LAUNCH)["tasks_disabled"]) for launch in launches]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file}: damaged, it does not hold a run's launches: restore it, or name another run") from None
    return set.intersection(*disabled) if disabled else set()


def settings_of_start(start: Start, source: str, settings: list[str]) -> list[str]:
    """Return the settings, extended by the start and by the source's model settings.

    Model settings that the file or `settings` already contains are not taken from the source.
    """
    given = {*given_keys(source), *(setting.partition("=")[0].strip() for setting in settings)}
    model = start.config.model.model_dump(mode="json")
    of_head = [key for key in ("image_codebook_size", "image_num_classes") if key in start.free and not start.resumes]
    taken = [] if "model" in given else [k for k in model if f"model.{k}" not in given and k not in ("bert", *of_head)]
    own = [setting for setting in settings if setting.partition("=")[0].strip() != "init"]
    taken_settings = [f"model.{key}={json.dumps(model[key])}" for key in taken]
    return [*own, *taken_settings, f"init={start.init.model_dump_json()}"]


def check_fit(start: Start, config: Config) -> list[str]:
    """Check that the new run fits the source. Return notes about what cannot be checked.

    Model settings are compared, and each store's sizes, vocabulary and extractors. Raise UserError with the first
    mismatch.
    """
    if config.finetune is not None:
        raise UserError("--init-from: the configuration is that of a fine-tuning run: use opt-ds finetune, or another --config")
    if config.model.bert:
        raise UserError("--init-from and model.bert both give the weights to start from: give one of them")
    theirs, ours = start.config.model, config.model
    for key in ModelConfig.model_fields:
        was, now = getattr(theirs, key), getattr(ours, key)
        if key not in start.free and was != now:
            raise UserError(
                f"--init-from {start.run}: its weights do not fit: model.{key} is {was} there and {now} here: omit this "
                "setting, it is taken from the source"
            )
    return [] if start.resumes else _check_stores(start, config)


def _check_stores(start: Start, config: Config) -> list[str]:
    processor = checkpoint.run_of(Path(start.init.checkpoint)) / PROCESSOR_FOLDER
    has_processor = (processor / PROCESSOR_FILE).is_file()
    notes = [] if has_processor else [
        f"{processor / PROCESSOR_FILE} is not there: the stores' vocabulary and extractors are not compared with the source's"
    ]  # fmt: skip
    for path in config.data.stores:
        description = load_description(Path(path))
        sizes = [pair for unit in modalities_of(start.config.model) for pair in unit.store_sizes(description).items()]
        for key, there in sizes:
            own = attrgetter(key)(start.config.model)
            if key not in start.free and there != own:
                raise UserError(
                    f"{path} does not fit --init-from {start.run}: {key} is {there} in the store and {own} in the model: use a "
                    "store prepared with the model's extractors and vocabulary"
                )
        if has_processor:
            _check_extractors(start, processor, FeatureStore(path))
    return notes


def _check_extractors(start: Start, processor: Path, store: FeatureStore) -> None:
    """Raise UserError for another vocabulary or another extractor.

    Extractors are compared for the modalities that the source and the store both have.
    """
    description = load_processor_description(processor)
    shared = {kind: description.extractors.get(kind, there) for kind, there in store.description.extractors.items()}
    own = description.model_copy(update={"extractors": shared})
    trained = start.init.trained_losses
    differences = fingerprint_differences(
        own, store, codes=start.config.tasks.loss_for(GENERATE_IMAGES) in trained, labels="mrc" in trained
    )
    if differences:
        raise UserError(
            f"{store.path} does not fit --init-from {start.run}: {'; '.join(differences)}: use a store prepared as the source's "
            f"(opt-ds prepare --text {processor / 'tokenizer'} takes its vocabulary)"
        )


def describe_start(start: Start) -> str:
    """Return a log line that says which checkpoint the weights come from."""
    folder = Path(start.init.checkpoint)
    if start.resumes:
        return f"--init-from {start.run}: this run began with its {folder.name} and resumes from its own checkpoints"
    step, until = checkpoint.read_record(folder)[0], start.config.max_steps
    latest = pointed(checkpoint.run_of(folder), "latest")
    newer = f"; its latest is {latest.name}, name that folder to take it" if latest and latest.name > folder.name else ""
    return f"--init-from {start.run}: weights of {folder.name} (step {step} of {until}{newer})"


# ---- in the run: weights and moments


@dataclass(frozen=True)
class Carried:
    """Which parameters came from the source. The others are freshly initialised."""

    init: InitConfig
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]  # parameters of the source that this model does not have
    heads: tuple[str, ...]  # name prefixes of the parameters that only one loss trains

    def record(self) -> dict[str, object]:
        """Return the entry for run.json's record of this launch."""
        fields = self.init.model_dump(mode="json")
        return {**fields, "parameters_taken": len(self.taken), "fresh": list(self.fresh), "left_out": list(self.left)}

    def lines(self) -> list[str]:
        """Return the lines to log at the start of the run."""
        total = len(self.taken) + len(self.fresh)
        fresh = f"; freshly initialised: {_grouped(self.fresh, self.heads)}" if self.fresh else ""
        left = f"; left out: {_grouped(self.left, self.heads)}" if self.left else ""
        moments = (
            f"Adam's moments of these after {self.init.adam_steps} updates" + (", 0 for the fresh ones" if self.fresh else "")
            if self.init.moments
            else "no optimiser moments (--init-moments takes them)"
        )
        return [
            f"from {self.init.checkpoint}: {len(self.taken)} of {total} parameters{fresh}{left}; {moments}",
            "not carried over: step, schedule, position in the data, loss scale, best validation",
        ]


def load_weights(model: "OPT", init: InitConfig) -> Carried:
    """Copy the source's weights and standardisation into a freshly initialised model.

    Heads that the source never trained keep their initialisation.
    """
    folder = Path(init.checkpoint)
    if checkpoint.weights_sha256(folder) != init.weights_sha256:
        raise UserError(f"--init-from {init.run}: {folder.name} has other weights than when this run began: use another --output")
    heads = _heads(model)
    fresh_heads = tuple(name for loss, name in heads.items() if loss not in init.trained_losses)
    checkpoint.load_weights(model, folder, leave=(*fresh_heads, *_unset_standardizers(model, folder)))
    names = [name for name, _ in model.named_parameters()]
    fresh = tuple(name for name in names if name.startswith(fresh_heads))
    held = tensor_shapes(folder / checkpoint.MODEL_FILE, "use another checkpoint of the run")
    left = tuple(sorted(held.keys() - {*names, *checkpoint.buffers_of(model)}))
    return Carried(init, tuple(name for name in names if name not in fresh), fresh, left, tuple(heads.values()))


def load_moments(engine: "DeepSpeedEngine", carried: Carried) -> None:
    """Load the source's moments into an engine whose moments are 0.

    Freshly initialised parameters keep moments of 0.
    """
    # Imported here because it loads DeepSpeed, which the checks before the run do not need.
    from opt_ds.training import deepspeed_internals, optimizer_state

    file = check_file(Path(carried.init.checkpoint), checkpoint.MOMENTS_FILE)
    held, taken = tensor_shapes(file, "use another checkpoint of the run"), set(carried.taken)
    missing = [f"{name}.{key}" for name in carried.taken for key in optimizer_state.MOMENTS if f"{name}.{key}" not in held]
    if missing:
        raise UserError(f"{file}: no {missing[0]}: omit --init-moments, or use another checkpoint of the run")
    full = {name: deepspeed_internals.full_shape(p) for name, p in engine.module.named_parameters()}
    with safe_open(file, "pt") as moments:

        def read(name: str, key: str) -> torch.Tensor:
            return moments.get_tensor(f"{name}.{key}") if name in taken else torch.zeros(full[name])

        optimizer_state.scatter(engine, read, optimizer_state.MOMENTS)


def _unset_standardizers(model: "OPT", folder: Path) -> list[str]:
    """Return the standardisers that the source never set because it had no samples of their modality.

    The new stores set them instead.
    """
    names = [f"embeddings.{unit.standardizer}." for unit in model.embeddings.modalities if unit.standardizer]
    with safe_open(check_file(folder, checkpoint.MODEL_FILE), "pt") as file:
        held = set(file.keys())
        return [
            name
            for name in names
            if {f"{name}mean", f"{name}std"} <= held
            and not file.get_tensor(f"{name}mean").any()
            and bool((file.get_tensor(f"{name}std") == 1).all())
        ]


def _heads(model: "OPT") -> dict[str, str]:
    """Return loss name -> name prefix of the parameters that only this loss trains."""
    return {loss.name: loss.parameters for unit in model.tasks.values() if unit.sampled for loss in unit.losses}


def _grouped(names: tuple[str, ...], heads: tuple[str, ...]) -> str:
    """Return parameter names as a summary such as "image_decoder (24), matching (2)"."""
    counts: dict[str, int] = {}
    for name in names:
        head = next((head for head in heads if name.startswith(head)), f"{name.partition('.')[0]}.").rstrip(".")
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head} ({count})" for head, count in counts.items())
