"""The configuration of a fine-tuning run: the checkpoint's own, with one task on, a schedule counted in epochs, and a new head.

The run itself is pre-training's (`engine.launch`): same store, same plan of samples, same checkpoints, same resume.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from opt_ds.config import LABELS_LOSS, LOSSES, LOSSES_OF_DRAW, Config, config_from_dict
from opt_ds.data.finetune_plan import make_plan
from opt_ds.engine import checkpoint
from opt_ds.engine.preflight import check_store
from opt_ds.errors import UserError, did_you_mean
from opt_ds.store.reader import FeatureStore
from opt_ds.store.verify import open_store


class Task(NamedTuple):
    """What a task trains, and what it takes where nothing is said."""

    loss: str
    inputs: tuple[str, ...]
    epochs: float
    lr_share: float = 1.0  # of the checkpoint's peak


TASKS = {
    # A judgement says one bit of a sample, where a text says a word a position: it takes more of them.
    "retrieval": Task("matching", ("T+I",), epochs=20, lr_share=0.5),
    "transcription": Task("dtr", ("A", "A+I"), epochs=5),
    "captioning": Task("dtr", ("I",), epochs=5),
    "classification": Task(LABELS_LOSS, ("T+A+I",), epochs=5),
    "vqa": Task(LABELS_LOSS, ("T+I",), epochs=5),
}
_LARGEST_BATCH = 256  # samples; fine-tuning wants more steps than pre-training's batches would leave
_WARMUP_SHARE = 0.1


def finetune_config(
    task: str,
    start: Path,
    stores: list[str],
    inputs: tuple[str, ...] = (),
    epochs: float | None = None,
    min_positives: int = 10,
    settings: tuple[str, ...] | list[str] = (),
) -> Config:
    """The run's configuration. `start`: a checkpoint, or a run's directory (its best); `settings`: key.path=value, laid over.

    Batch: the checkpoint's, at most 256 samples; learning rate: the task's share of the checkpoint's peak; warm-up: a tenth;
    epochs: the task's. Labels are those that `min_positives` training samples have; answers are all that the store names. Raises
    UserError for a checkpoint that never learned what the task fine-tunes, inputs that do not fit the task, a store without
    samples for it.
    """
    if task not in TASKS:
        raise UserError(f'unknown task "{task}"{did_you_mean(task, TASKS)}: choose from {", ".join(TASKS)}')
    loss = TASKS[task].loss
    folder = checkpoint.resolve_checkpoint(start)
    saved = config_from_dict(checkpoint.read_state(folder)["config"], where=str(folder / checkpoint.STATE_FILE))
    inputs = inputs or TASKS[task].inputs
    _check(task, loss, inputs, saved, folder)
    opened = [open_store(path) for path in stores]
    for store in opened:
        check_store(saved, store)
    tree = saved.model_dump(mode="json")
    tree["model"]["bert"] = tree["deepspeed_config"] = tree["init"] = None
    tree["data"] |= {"stores": [str(store.path) for store in opened], "mix": None}
    tree["finetune"] = {
        "task": task, "checkpoint": str(folder), "weights_sha256": _weights_sha256(folder), "inputs": list(inputs),
        "learned": list(saved.learned_losses),
    }  # fmt: skip
    if task == "vqa":
        tree["finetune"]["agreement"] = _agreement(opened, saved.data.train_split)
    _train_only(tree["tasks"], loss)
    tree["tasks"][LABELS_LOSS] = _label_head(task, loss, opened, saved.data.train_split, min_positives)
    size = saved.batch.size if saved.batch.unit == "samples" else _LARGEST_BATCH
    tree["batch"] |= {"size": min(size, _LARGEST_BATCH), "unit": "samples"}
    tree["optimizer"]["lr"] *= TASKS[task].lr_share
    tree["train"] |= {"max_steps": None, "picture_grid": 0, "early_stopping": 0, "time_limit_minutes": None}
    tree["profile"] = {}
    return _with_schedule(tree, opened, epochs or TASKS[task].epochs, settings)


def _check(task: str, loss: str, inputs: tuple[str, ...], saved: Config, folder: Path) -> None:
    if loss != LABELS_LOSS and loss not in saved.learned_losses:
        raise UserError(
            f"{folder}: this model was trained without {loss} (tasks.{loss}.weight is 0), which {task} fine-tunes: take a "
            "checkpoint that was trained with it"
        )
    for name in inputs:
        letters = name.split("+")
        if task in ("transcription", "captioning") and "T" in letters:
            raise UserError(f"--inputs {name}: {task} writes the text, which cannot go in: choose A, I or A+I")
        if task == "transcription" and "A" not in letters:
            raise UserError(f"--inputs {name}: transcription listens: choose A or A+I, or finetune captioning")
        if task == "retrieval" and len(letters) < 2:
            raise UserError(f"--inputs {name}: retrieval judges what belongs together: choose T+I, T+A, A+I or T+A+I")
        if task == "vqa" and "T" not in letters:
            raise UserError(f"--inputs {name}: the question is the text: choose T+I, T+A or T+A+I")


def _train_only(tasks: dict[str, Any], loss: str) -> None:
    """Weight 1 for the loss and 0 for the others, in place; the draws' shares mean nothing in fine-tuning."""
    for other in (*LOSSES, *LOSSES_OF_DRAW):
        tasks[other]["weight"] = 0.0
    tasks["curriculum"], tasks["mix"] = [], dict.fromkeys(LOSSES_OF_DRAW, 1.0)
    if loss in LOSSES:
        draw = next(draw for draw, losses in LOSSES_OF_DRAW.items() if loss in losses)
        tasks[loss]["weight"] = tasks[draw]["weight"] = 1.0


def _label_head(
    task: str, loss: str, stores: list[FeatureStore], split: str, min_positives: int
) -> dict[str, Any] | None:
    if loss != LABELS_LOSS:
        return None
    names = sorted({name for store in stores for name in store.description.label_names})
    if task == "classification":
        found = Counter(
            name for store in stores for index in store.split_samples(split) for name in set(store.labels(int(index)))
        )
        names = [name for name in names if found[name] >= min_positives]
    if not names:
        raise UserError(
            f"{stores[0].path}: no label has {min_positives} samples of split {split}: prepare the store with `labels` in the "
            "manifest (opt-ds import vqa writes answers there), or lower --min-positives"
        )
    return {"names": names, "answers": task == "vqa"}


def _agreement(stores: list[FeatureStore], split: str) -> int:
    """Return the annotators that can agree on an answer: 3 as published, fewer where no question has as many answers."""
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
    tree["schedule"] = {"total_steps": total, "warmup_steps": min(total - 1, round(_WARMUP_SHARE * total))}
    tree["train"] |= {"validate_every": steps_per_epoch, "log_every": max(1, min(20, steps_per_epoch))}
    tree["checkpoint"] |= {"every_steps": steps_per_epoch}
    return config_from_dict(tree, where, settings)


def _weights_sha256(folder: Path) -> str:
    return checkpoint.read_record(folder)[1][checkpoint.MODEL_FILE].sha256
