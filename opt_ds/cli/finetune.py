"""`opt-ds finetune`: train a checkpoint for one more task, with the engine of pre-training."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.options import Settings
from opt_ds.cli.program import finite
from opt_ds.config import Config, FineTuneConfig

_LOG = logging.getLogger(__name__)


def finetune(
    task: Annotated[str, typer.Argument(help="Task: retrieval, transcription, captioning, classification or vqa.")],
    checkpoint: Annotated[
        Path, typer.Option(help="A run's output directory (its best checkpoint), or one checkpoint.")
    ],
    store: Annotated[list[str], typer.Option(help="Feature store. May be repeated.")],
    output: Annotated[Path, typer.Option(help="Directory of the new run. If it holds the run, that run resumes.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            help="Input modalities, such as A or T+I. If repeated, one is sampled per sample. Default: the task's."
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the training samples. Default: the task's.", min=0.001, max=1e6, callback=finite
        ),
    ] = None,
    min_positives: Annotated[
        int, typer.Option(help="classification: training samples that a label requires.", min=1)
    ] = 10,
    settings: Settings = None,
    untrained: Annotated[
        bool,
        typer.Option(
            "--untrained",
            help="Start from random weights instead of the checkpoint's: the control of a fine-tuned model.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a store of another vocabulary or other extractors, with a warning.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail if --output has no checkpoint to resume from.")
    ] = False,
) -> int:
    """Fine-tune a checkpoint for one task.

    Several ranks: torchrun --nproc_per_node 4 -m opt_ds finetune … The result is a run: evaluate, generate, export and
    serve accept it. Exit codes: 0 finished, 2 bad input, 75 stopped by a signal and saved, others failed.
    """
    # Set before torch is loaded, because waiting threads must not spin if ranks share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from opt_ds.evaluation.callbacks import EvaluationCallbacks
    from opt_ds.store.processor_files import PROCESSOR_FOLDER, check_fingerprints
    from opt_ds.store.reader import FeatureStore
    from opt_ds.training.checkpoint import resolve_checkpoint
    from opt_ds.training.distributed import find_ranks
    from opt_ds.training.finetuning import finetune_config
    from opt_ds.training.launch import run_training, settle_by_main
    from opt_ds.training.signals import StopRequest

    ranks = find_ranks()

    def settle() -> Config:
        config = finetune_config(
            task, checkpoint, store, tuple(inputs or ()), epochs, min_positives, settings or (), untrained
        )
        for path in store:  # already verified
            check_fingerprints(
                resolve_checkpoint(checkpoint).parent.parent / PROCESSOR_FOLDER, FeatureStore(path), force
            )
        return config

    config, group = settle_by_main(ranks, settle)
    assert config.finetune is not None
    _LOG.info(
        f"fine-tuning for {task} from {_start(config.finetune)}, inputs {', '.join(config.finetune.inputs)}: "
        f"{config.max_steps} steps of {config.batch.size} samples, learning rate {config.optimizer.lr:g}, output {output}"
    )
    with StopRequest(config.train.preemption_signal) as stop:
        return run_training(
            config, output, ranks, stop, must_resume=resume, group=group, callbacks=EvaluationCallbacks()
        )


def _start(finetune: FineTuneConfig) -> str:
    """Return what a run starts from."""
    return f"random weights of the shape of {finetune.checkpoint}" if finetune.untrained else finetune.checkpoint
