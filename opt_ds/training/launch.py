"""Launch of a run, the same for pre-training and fine-tuning: check the configuration, join the ranks, resume, train.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opt_ds.config import Config
from opt_ds.errors import RunError, UserError
from opt_ds.training.distributed import Ranks
from opt_ds.training.signals import StopRequest

if TYPE_CHECKING:
    from opt_ds.store.reader import FeatureStore
    from opt_ds.training.callbacks import Callbacks
    from opt_ds.training.checkpoint import TrainState
    from opt_ds.training.collectives import CollectiveWatch
    from opt_ds.training.distributed import ProcessGroup

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def settle_by_main(ranks: Ranks, settle: Callable[[], Config]) -> "tuple[Config, ProcessGroup | None]":
    """Return, on every rank, the configuration that `settle` reads from stores and checkpoints on rank 0.

    If there are several ranks, they join first; pass their process group to `run_training`. A UserError of `settle` is
    raised on every rank.
    """
    if ranks.world_size == 1:
        return settle(), None
    from opt_ds.training.distributed import ProcessGroup

    group = ProcessGroup(ranks)
    return _with_lost_ranks_named(ranks, lambda: group.main_does(settle)), group


def run_training(
    config: Config,
    output: Path,
    ranks: Ranks,
    stop: StopRequest,
    must_resume: bool = False,
    group: "ProcessGroup | None" = None,
    *,
    callbacks: "Callbacks",
) -> int:
    """Train in `output`, starting from its newest checkpoint if there is one.

    Args:
        config: The run's configuration.
        output: The run's output directory.
        ranks: This process's ranks.
        stop: Receives the signals that ask the run to stop.
        must_resume: Whether a missing checkpoint is an error.
        group: The process group, if the ranks have already joined.
        callbacks: What is done between steps besides training.

    Returns:
        The exit code: 0 if the run is finished, 75 if it was stopped and saved.

    Raises:
        UserError: Stores, settings or `output` are wrong. It is raised before anything is written.
        RunError: Another rank was lost, or GPU memory is exhausted.
    """
    import torch

    from opt_ds.training import checkpoint_files, preflight, run_folder
    from opt_ds.training.deepspeed_config import Hardware, choose_precision, deepspeed_settings

    stores = preflight.open_stores(config, output, verify=False)
    run_folder.check_same_run(output, config, stores)
    hardware = Hardware.detect()
    precision = choose_precision(config, hardware)
    deepspeed_settings(config, precision)  # raises for a DeepSpeed JSON that contradicts the configuration

    def start() -> _Start:
        return _start(config, stores, output, must_resume, callbacks)

    # Run before DeepSpeed is loaded, so that mistakes are reported at once.
    alone = start() if ranks.world_size == 1 else None
    if alone and alone.finished:
        return 0

    from opt_ds.training.distributed import ProcessGroup

    held = run_folder.lock(output) if ranks.is_main else None
    joined = group or ProcessGroup(ranks, config.guard.rank_timeout_s)
    joined.limit(config.guard.rank_timeout_s)
    watch = _watch(config, ranks)

    def train() -> int:
        begun = alone or joined.main_does(start)
        if begun.finished:
            joined.close()
            return 0
        checkpoint_files.take_hashes(begun.hashes)

        from opt_ds.training.trainer import Trainer

        # A source run that is still training may have written a newer checkpoint by the time another rank looked.
        agreed = config.model_copy(update={"init": joined.from_main(config.init)})
        code = Trainer(agreed, stores, output, joined, hardware, precision, begun.resume_from, stop, callbacks).train()
        joined.close()
        return code

    try:
        return _with_lost_ranks_named(ranks, train)
    except torch.cuda.OutOfMemoryError:
        raise RunError(
            f"rank {ranks.rank}: out of GPU memory: lower batch.max_tokens (opt-ds plan estimates what fits), or set "
            "train.recompute=true or a higher zero.stage, then run the same command again to resume"
        ) from None
    finally:
        if watch:
            watch.close()
        if held:
            held.close()


def _with_lost_ranks_named(ranks: Ranks, work: Callable[[], _Result]) -> _Result:
    """Return the result of `work`. Raise RunError if it fails because another rank was lost."""
    from opt_ds.training.distributed import is_lost_rank

    try:
        return work()
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise RunError(
            f"rank {ranks.rank} lost contact with another rank, whose log has the reason ({reason}): run the same "
            "command again to resume"
        ) from None


@dataclass(frozen=True)
class _Start:
    """What rank 0 found before training, for all ranks."""

    resume_from: Path | None
    finished: bool  # no steps are left
    hashes: dict[Any, str]  # of the checkpoint's files


def _start(
    config: Config,
    stores: "list[FeatureStore]",
    output: Path,
    must_resume: bool,
    callbacks: "Callbacks",
) -> _Start:
    """Do, on rank 0, the checks that are needed once per run.

    The stores are verified, the callbacks' checks run, and the checkpoint is found.

    Raise UserError if stores or checkpoints are damaged or lack something that the run needs.
    """
    from opt_ds.data.finetune_plan import make_plan
    from opt_ds.training import checkpoint, checkpoint_files, preflight

    preflight.verify_stores(stores, output)
    for line in preflight.training_notes(config, stores):
        _LOG.info(line)
    callbacks.check(config, stores)
    resume_from = _resumable(config, output)
    if must_resume and resume_from is None:
        raise UserError(f"--resume: {output} has no checkpoint: name the output directory of a run, or omit --resume")
    finished, version = False, None
    if resume_from:
        saved = checkpoint.read_state(resume_from)
        state, version = checkpoint.train_state(saved), saved["plan_version"]
        finished = state.step >= config.max_steps or state.stopped_early
        if finished:
            _LOG.info(f"{output} is finished ({resume_from.name}): nothing to do; {_way_on(config, output, state)}")
    elif config.finetune:
        checkpoint_files.check_file(Path(config.finetune.checkpoint), checkpoint.MODEL_FILE)
    if not finished:
        if config.max_steps > config.schedule.total_steps:
            _LOG.info(_beyond_schedule(config, output))
        # Writes the data that step plans derive from complete stores, for the other ranks to map.
        make_plan(config, stores, version)
    return _Start(resume_from, finished, checkpoint_files.known_hashes())


def _way_on(config: Config, output: Path, state: "TrainState") -> str:
    """Return how the training of a finished run can be continued."""
    total = config.schedule.total_steps
    if state.stopped_early:
        return f"early stopping ended it; {_new_run(config, output)} continues from its weights"
    if state.step < total:
        return f"a larger --set train.max_steps continues it, up to schedule.total_steps ({total}), where the learning rate is 0"
    return f"its learning rate has reached 0; {_new_run(config, output)} continues from its weights"


def _beyond_schedule(config: Config, output: Path) -> str:
    """Return the log line for a run whose last steps do not change the weights."""
    return (
        f"train.max_steps {config.max_steps} is beyond schedule.total_steps {config.schedule.total_steps}: the learning rate is "
        f"0 from there on, so those steps do not change the weights; {_new_run(config, output)} continues from its weights"
    )


def _new_run(config: Config, output: Path) -> str:
    option = "pretrain.py --init-from" if config.finetune is None else "opt-ds finetune --checkpoint"
    return f"a new run ({option} {output}, another --output, a new schedule)"


def _watch(config: Config, ranks: Ranks) -> "CollectiveWatch | None":
    """Return the watchdog for collective calls, or None with a single rank."""
    if ranks.world_size == 1:
        return None
    from opt_ds.training.collectives import CollectiveWatch, end_process

    return CollectiveWatch(ranks.rank, ranks.world_size, config.guard.compare_calls_s, end_process(ranks.rank))


def _resumable(config: Config, output: Path) -> Path | None:
    from opt_ds.data.finetune_plan import plan_class
    from opt_ds.training import checkpoint

    plans = plan_class(config)
    folder = checkpoint.find_resumable(output)
    if folder and (version := checkpoint.read_state(folder)["plan_version"]) not in plans.VERSIONS:
        raise UserError(
            f"{folder} was written with version {version} of the step plan, this is version {plans.VERSION}, which samples "
            "differently: start again with another --output"
        )
    return folder
