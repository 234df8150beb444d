"""Configuration of a fine-tuning run: the checkpoint's own, with one task enabled, a schedule in epochs and a new head.

The run itself is that of pre-training (`training.launch`): same store, same kind of step plan, same checkpoints, same
resume.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from opt_ds.config import Config, TasksConfig, config_from_dict
from opt_ds.data.finetune_plan import make_plan
from opt_ds.errors import UserError, did_you_mean
from opt_ds.store.reader import FeatureStore
from opt_ds.store.verify import open_store
from opt_ds.training import checkpoint
from opt_ds.training.preflight import check_store


class Job(NamedTuple):
    """Default settings of a fine-tuning job. Each task declares the jobs that train it (`DataTask.fine_tunes`)."""

    inputs: tuple[str, ...]
    epochs: float
    lr_factor: float = 1.0  # factor on the checkpoint's peak learning rate


JOBS = {
    # A matching label carries one bit per sample and a text one word per position, so retrieval needs more epochs.
    "retrieval": Job(("T+I",), epochs=20, lr_factor=0.5),
    "transcription": Job(("A", "A+I"), epochs=5),
    "captioning": Job(("I",), epochs=5),
    "classification": Job(("T+A+I",), epochs=5),
    "vqa": Job(("T+I",), epochs=5),
}
_LARGEST_BATCH = 256  # In samples. With pre-training's batches fine-tuning would have too few steps.
_WARMUP_FRACTION = 0.1


def finetune_config(
    task: str,
    start: Path,
    stores: list[str],
    inputs: tuple[str, ...] = (),
    epochs: float | None = None,
    min_positives: int = 10,
    settings: tuple[str, ...] | list[str] = (),
    untrained: bool = False,
) -> Config:
    """Return the configuration of a fine-tuning run.

    The batch is the checkpoint's, limited to 256 samples. The learning rate is the checkpoint's peak times the task's
    factor. Warm-up takes a tenth of the steps.

    Args:
        task: Name of the fine-tuning job.
        start: A checkpoint, or a run's output directory (its best checkpoint is used).
        stores: Paths of the stores.
        inputs: Combinations of modalities that the task is trained on, such as "T+I". Empty: the task's default.
        epochs: Number of epochs. None: the task's default.
        min_positives: Labels with fewer training samples than this are dropped. Answers are not: all that the store
            names are kept.
        settings: Overrides of the form "key.path=value".
        untrained: Whether the weights are random instead of the checkpoint's. Everything else is the same.

    Returns:
        The run's configuration.

    Raises:
        UserError: The checkpoint never learned what the task fine-tunes, the inputs do not fit the task, or a store has
            no samples for it.
    """
    if task not in JOBS:
        raise UserError(f'unknown task "{task}"{did_you_mean(task, JOBS)}: choose from {", ".join(JOBS)}')
    folder = checkpoint.resolve_checkpoint(start)
    saved = config_from_dict(checkpoint.read_state(folder)["config"], where=str(folder / checkpoint.STATE_FILE))
    inputs = inputs or JOBS[task].inputs
    unit = next(unit for unit in saved.tasks.units.values() if task in unit.fine_tunes)
    _check(task, unit, inputs, saved, folder)
    opened = [open_store(path) for path in stores]
    for store in opened:
        check_store(saved, store)
    tree = saved.model_dump(mode="json")
    tree["model"]["bert"] = tree["deepspeed_config"] = tree["init"] = None
    tree["data"] |= {"stores": [str(store.path) for store in opened], "store_weights": None}
    tree["finetune"] = {
        "task": task, "checkpoint": str(folder), "weights_sha256": checkpoint.weights_sha256(folder), "inputs": list(inputs),
        "trained_losses": [] if untrained else list(saved.trained_losses), "untrained": untrained,
    }  # fmt: skip
    if task == "vqa":
        tree["finetune"]["agreement"] = _agreement(opened, saved.data.train_split)
    _train_only(tree["tasks"], saved.tasks, unit.fine_tuned_loss)
    for name, other in saved.tasks.units.items():
        if other.copies_key:
            tree["tasks"][name][other.copies_key] = 1
    for other in saved.tasks.units.values():
        if other.is_optional:
            if other is unit:
                own = other.section_for_finetuning(task, opened, saved.data.train_split, min_positives)
                tree["tasks"][other.name] = own
            elif not other.sampled:  # the head of another fine-tuning job; that of a pre-training task is kept
                tree["tasks"][other.name] = None
    size = saved.batch.size if saved.batch.unit == "samples" else _LARGEST_BATCH
    tree["batch"] |= {"size": min(size, _LARGEST_BATCH), "unit": "samples"}
    tree["optimizer"]["lr"] *= JOBS[task].lr_factor
    tree["train"] |= {"max_steps": None, "image_grid": 0, "early_stopping": 0, "time_limit_minutes": None}
    tree["profile"] = {}
    return _with_schedule(tree, opened, epochs or JOBS[task].epochs, settings)


def _check(task: str, unit: Any, inputs: tuple[str, ...], saved: Config, folder: Path) -> None:
    loss = unit.fine_tuned_loss
    if not unit.is_optional and loss not in saved.trained_losses:
        raise UserError(
            f"{folder}: this model was trained without {loss} (tasks.{loss}.weight is 0), which {task} fine-tunes: take a "
            "checkpoint that was trained with it"
        )
    for name in inputs:
        letters = name.split("+")
        if task in ("transcription", "captioning") and "T" in letters:
            raise UserError(f"--inputs {name}: {task} generates the text, which cannot be an input: choose A, I or A+I")
        if task == "transcription" and "A" not in letters:
            raise UserError(f"--inputs {name}: transcription requires audio: choose A or A+I, or fine-tune for captioning")
        if task == "retrieval" and len(letters) < 2:
            raise UserError(f"--inputs {name}: retrieval compares modalities: choose T+I, T+A, A+I or T+A+I")
        if task == "vqa" and "T" not in letters:
            raise UserError(f"--inputs {name}: the question is the text: choose T+I, T+A or T+A+I")


def _train_only(tree: dict[str, Any], tasks: TasksConfig, loss: str) -> None:
    """Set the weight of `loss` to 1 and of all others to 0, in place.

    Task sampling weights have no meaning in fine-tuning.
    """
    sampled = {task: losses for task, losses in tasks.sampled.items() if tree[task] is not None}
    tree["curriculum"], tree["sampling_weights"] = [], dict.fromkeys(sampled, 1.0)
    for task, losses in sampled.items():
        for name in (task, *losses):
            tree[name]["weight"] = 0.0
        if loss in losses:
            tree[loss]["weight"] = tree[task]["weight"] = 1.0


def _agreement(stores: list[FeatureStore], split: str) -> int:
    """Return how many annotators must agree on an answer.

    It is 3 as published, and fewer if no question has that many answers.
    """
    most = max((len(store.labels(int(index))) for store in stores for index in store.split_samples(split)), default=3)
    return min(3, max(1, most))


def _with_schedule(
    tree: dict[str, Any], stores: list[FeatureStore], epochs: float, settings: tuple[str, ...] | list[str]
) -> Config:
    where = "fine-tuning"
    tree["schedule"] = {"total_steps": 2, "warmup_steps": 0}
    sized = [setting for setting in settings if not setting.startswith(("schedule.", "train.", "checkpoint."))]
    plan = make_plan(config_from_dict(tree, where, sized), stores)
    steps_per_epoch = max(1, math.ceil(plan.num_samples / plan.batch_samples))
    total = max(2, math.ceil(epochs * plan.num_samples / plan.batch_samples))
    tree["schedule"] = {"total_steps": total, "warmup_steps": min(total - 1, round(_WARMUP_FRACTION * total))}
    tree["train"] |= {"validate_every": steps_per_epoch, "log_every": max(1, min(20, steps_per_epoch))}
    tree["checkpoint"] |= {"every_steps": steps_per_epoch}
    return config_from_dict(tree, where, settings)
