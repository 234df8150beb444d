"""The paper's ablation (Liu et al.

2021, §4): runs with the same seed and budget without a task or a level, compared by a linear probe.

Each row is a run of pretrain.py in its own folder, with a `row.json` once it is probed. The table is made from the rows
that exist, so rows may come from several processes and different times.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_ds.config import Config, TasksConfig, load_config
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import RunError, UserError, did_you_mean
from opt_ds.evaluation.ablation_table import ABLATION_SCHEMA, FULL, UNTRAINED, write_ablation_table
from opt_ds.evaluation.classification import classification, label_matrices
from opt_ds.evaluation.evaluator import Evaluator, samples_with
from opt_ds.model.initial import initial_model
from opt_ds.store.files import exclusive_use, write_json
from opt_ds.store.reader import FeatureStore
from opt_ds.training import checkpoint
from opt_ds.training.distributed import RANK_VARIABLES
from opt_ds.training.metrics import METRICS_FILE
from opt_ds.training.signals import REQUEUE_EXIT_CODE, StopRequest
from opt_ds.version import PACKAGE_FOLDER

_LOG = logging.getLogger(__name__)
_LEVELS = ("sample", "modality", "token")
ROW_FILE = "row.json"


@dataclass(frozen=True)
class Row:
    """One run of the ablation.

    It has a name, settings on top of the full run's, its configuration, and the losses that it can compute. `folder` is
    the name of its folder.
    """

    name: str
    settings: tuple[str, ...]
    config: Config
    losses: tuple[str, ...]
    folder: str

    @property
    def steps(self) -> int:
        """Number of training steps; 0 for the untrained row."""
        return 0 if self.name == UNTRAINED else self.config.max_steps


@dataclass(frozen=True)
class Probe:
    """Settings of the linear probe. These are the arguments of `classification`."""

    split: str = "test_variant"
    train_split: str = "train"
    subsets: tuple[str, ...] = ("T+A+I",)
    min_positives: int = 10
    regularisation: float = 1.0
    limit: int | None = None


def rows_without(tasks: TasksConfig) -> dict[str, tuple[str, ...]]:
    """Return row name -> the tasks and losses whose weight the row sets to 0.

    A row leaves out one level, one task of a level that has several, or one loss of a level that has a single task.
    """
    units_there = [unit for unit in tasks.units.values() if unit.sampled and getattr(tasks, unit.name) is not None]
    levels = {level: [unit for unit in units_there if unit.level == level] for level in _LEVELS}
    rows: dict[str, tuple[str, ...]] = {FULL: ()}
    rows |= {f"no-{level}-level": tuple(unit.name for unit in units) for level, units in levels.items() if units}
    for units in reversed(levels.values()):
        parts = [unit.name for unit in units] if len(units) > 1 else [loss for unit in units for loss in unit.loss_names()]
        rows |= {f"no-{part}": (part,) for part in parts if len(parts) > 1}
    return rows | {UNTRAINED: ()}


def ablation_rows(
    source: str, settings: Sequence[str], stores: list[FeatureStore], names: Sequence[str] = (), num_seeds: int = 1
) -> list[Row]:
    """Return the ablation's rows in the order of `rows_without`.

    Early stopping is disabled in all of them, so that the budget is the same.

    Args:
        source: Preset or configuration file of the full run.
        settings: Overrides of the form "key.path=value" for all rows.
        stores: The stores to train on.
        names: The rows to return. Empty: all rows that differ from the full run.
        num_seeds: Number of runs per row, with consecutive seeds from the configured one on.

    Raises:
        UserError: A row is unknown or leaves no task, or a named row removes nothing because the full run has none of
            its losses.
    """
    shared = (*settings, "train.early_stopping=0")
    full = load_config(source, shared)
    known = rows_without(full.tasks)
    for name in names:
        if name not in known:
            raise UserError(f'--row "{name}": no such row{did_you_mean(name, known)}; known: {", ".join(known)}')
    possible = possible_losses(full, stores)
    rows = []
    for name, without in known.items():
        if names and name not in names:
            continue
        gone = {loss for task in without for loss in full.tasks.sampled.get(task, (task,))}
        left = () if name == UNTRAINED else tuple(loss for loss in possible if loss not in gone)
        if without and (not left or len(left) == len(possible)):
            if names:
                why = "leaves no task" if not left else "takes nothing away: the full run has none of its losses"
                raise UserError(f"--row {name} {why} (those of the full run: {', '.join(possible)}): omit it")
            continue
        own = tuple(f"tasks.{task}.weight=0" for task in without)
        for seed in range(full.seed, full.seed + num_seeds):
            given = (*shared, *own, *((f"seed={seed}",) if seed != full.seed else ()))
            rows.append(Row(name, given, load_config(source, given), left, folder_name(name, seed, full.seed)))
    return rows


def folder_name(name: str, seed: int, first_seed: int) -> str:
    """Return the name of the folder of a row's run. That of the first seed has the row's name."""
    return name if seed == first_seed else f"{name}-seed{seed}"


def possible_losses(config: Config, stores: list[FeatureStore]) -> tuple[str, ...]:
    """Return the losses that a run of this configuration computes on these stores.

    These losses have a positive weight, belong to a task that is sampled at some time, and are possible on the stores'
    samples.
    """
    disabled = PretrainingPlan(config, stores).disabled_tasks
    last = config.max_steps / config.schedule.total_steps
    weights_of_phases = [
        config.tasks.sampling_weights_at(f)
        for f in (0.0, *(p.from_fraction for p in config.tasks.curriculum))
        if f < last
    ]
    sampled = {
        task for weights in weights_of_phases for task, weight in weights.items() if weight > 0 and task not in disabled
    }
    active = config.tasks.active_losses
    return tuple(
        x
        for task, own in config.tasks.sampled.items()
        if task in sampled
        for x in own
        if x in active and x not in disabled
    )


def check_labels(store: FeatureStore, probe: Probe, seed: int) -> None:
    """Raise UserError, before anything is trained, if the probe would have no label to learn."""
    train, test = (samples_with(store, s, (TEXT, IMAGE, AUDIO), probe.limit, seed) for s in (probe.train_split, probe.split))
    label_matrices(store, train, test, probe.min_positives)


def is_done(row: Row, folder: Path, probe: Probe) -> bool:
    """Return whether the row's figures exist for the same budget and probe."""
    found = read_row(folder / row.folder)
    return found is not None and _is_of(found, row.config, probe, row.config.seed)


def read_row(folder: Path) -> dict[str, Any] | None:
    """Return a row's figures, or None if there are none yet."""
    try:
        return json.loads((folder / ROW_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / ROW_FILE}: not readable ({error}): remove it to fit the row's probe again") from None


def probe_row(row: Row, folder: Path, store: FeatureStore, probe: Probe, device: str) -> dict[str, Any]:
    """Probe the last checkpoint of the row's run and write row.json.

    Args:
        row: The row.
        folder: Folder of the ablation.
        store: The store to probe on.
        probe: Settings of the probe.
        device: Device of the model.

    Returns:
        The row's figures.

    Raises:
        RunError: The run is unfinished or trained a loss that the row leaves out.
    """
    run = folder / row.folder
    seconds = 0.0
    ran: tuple[str, ...] = ()
    if row.name == UNTRAINED:
        model = initial_model(row.config, [store])
    else:
        last = checkpoint.pointed(run, "latest")
        state = checkpoint.train_state(checkpoint.read_state(last)) if last else checkpoint.TrainState()
        if last is None or state.step != row.steps:
            raise RunError(f"{run}: its run is at step {state.step} of {row.steps}: run the same command again")
        ran, seconds = losses_of_run(run, row.config.tasks), state.train_seconds
        if set(ran) - set(row.losses):
            raise RunError(f"{run}: {', '.join(sorted(set(ran) - set(row.losses)))} ran, which this row disables")
        model, _ = checkpoint.load_model(last)
    evaluator = Evaluator(model.to(device), row.config, store, device)
    figures = classification(
        evaluator, probe.split, probe.train_split, probe.subsets, probe.min_positives, probe.regularisation, probe.limit,
        row.config.seed, with_untrained=False,
    )  # fmt: skip
    found = {
        "row": row.name, "seed": row.config.seed, "without": list(rows_without(row.config.tasks)[row.name]), "losses": list(ran),
        "steps": row.steps, "train_seconds": seconds,
        "probe": _probe_settings(probe, row.config.seed), "classification": figures,
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / ROW_FILE, found)
    return found


def losses_of_run(run: Path, tasks: TasksConfig) -> tuple[str, ...]:
    """Return the losses that a run's training steps computed, according to its metrics.jsonl."""
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    return tuple(loss for loss in tasks.all_losses if f"train/{loss}/loss" in logged)


def pretrain_arguments(source: str, row: Row, folder: Path) -> list[str]:
    """Return the command line arguments of pretrain.py for a row."""
    settings = {setting.partition("=")[0]: setting for setting in row.settings}  # pretrain.py accepts each key once
    return ["--config", source, "--output", str(folder / row.folder), *(part for x in settings.values() for part in ("--set", x))]


def make_rows(
    source: str, rows: Sequence[Row], folder: Path, store: FeatureStore, probe: Probe, ranks: int, device: str,
    seeds: Sequence[int],
) -> int:  # fmt: skip
    """Pre-train and probe the rows that are not done, and write the tables after each row.

    Args:
        source: Preset or configuration file of the full run.
        rows: The rows to make.
        folder: Folder of the ablation, with one folder per row.
        store: The store to train and probe on.
        probe: Settings of the probe.
        ranks: Number of ranks of each pre-training run.
        device: Device of the probe.
        seeds: All seeds of the ablation, the configured one first; `rows` may be a part of its rows.

    Returns:
        0, or 75 if a signal stopped the process. A run that was interrupted has saved a checkpoint.

    Raises:
        RunError: A run failed.
    """
    with StopRequest() as stop:
        for number, row in enumerate(rows, 1):
            where = f"[{number}/{len(rows)}] {row.folder}"
            if is_done(row, folder, probe):
                _LOG.info(f"{where}: already complete")
                continue
            _LOG.info(f"{where}: losses {', '.join(row.losses) or 'none'}")
            code = _pretrain(pretrain_arguments(source, row, folder), ranks, stop) if row.steps else 0
            if stop.received:
                return REQUEUE_EXIT_CODE
            if code:
                raise RunError(f"row {row.folder}: pretrain.py ended with code {code}, see above; run it again to resume")
            probe_row(row, folder, store, probe, device)
            write_tables(folder, store, row.config, probe, seeds)
    return 0


def _pretrain(arguments: Sequence[str], ranks: int, stop: StopRequest) -> int:
    """Run pretrain.py, forward requests to stop to it, and return its exit code."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = PACKAGE_FOLDER / "pretrain.py"
    # If this process is a rank of a job itself, the run must not inherit its rank variables.
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # The run gets its own session, so that a Ctrl-C in the terminal reaches it only once, through this process.
    with subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments], env=environment, start_new_session=True
    ) as process:
        passed_on = False
        while (code := process.poll()) is None:
            if stop.received and not passed_on:
                process.send_signal(signal.SIGTERM)  # the only signal that torchrun forwards to its ranks
                passed_on = True
            time.sleep(0.2)
    return code


def write_tables(
    folder: Path, store: FeatureStore, config: Config, probe: Probe, seeds: Sequence[int]
) -> dict[str, Any]:
    """Write the table of all rows in `folder` with this budget and probe (see ablation_table).

    Processes take turns. The last of an array job's tasks to write has therefore read every row.

    Args:
        folder: Folder of the ablation.
        store: The store of the runs.
        config: Configuration of any row, which defines the budget.
        probe: Settings of the probe.
        seeds: Seeds of the runs, the configured one first.

    Returns:
        The figures of the table.
    """
    with exclusive_use(folder / "ablation"):
        rows = []
        for name in rows_without(config.tasks):
            for seed in seeds:
                row = read_row(folder / folder_name(name, seed, seeds[0]))
                if row is not None and _is_of(row, config, probe, seed):
                    rows.append({"seed": seed, **row})
        figures = {
            "schema": ABLATION_SCHEMA, "store": {"name": store.name, "fingerprint": store.fingerprint}, "preset": config.preset,
            "seed": seeds[0], "seeds": list(seeds), "batch": config.batch.model_dump(include={"size", "unit"}), "rows": rows,
        }  # fmt: skip
        write_ablation_table(figures, folder)
    return figures


def _is_of(found: dict[str, Any], config: Config, probe: Probe, seed: int) -> bool:
    steps = 0 if found["row"] == UNTRAINED else config.max_steps
    return found["steps"] == steps and found["probe"] == _probe_settings(probe, seed)


def _probe_settings(probe: Probe, seed: int) -> dict[str, Any]:
    return {**json.loads(json.dumps(asdict(probe))), "seed": seed}
