"""`opt-ds train-dvae`: train the dVAE."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import Device
from opt_ds.cli.program import MAX_SEED, run_program
from opt_ds.errors import TrainingStoppedError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a dVAE is trained; the fields are the arguments of `opt_ds.dvae.training.train_dvae`."""

    preset: Annotated[
        str | None,
        typer.Option(help="dvae-base (8,192 codes), dvae-emoji (1,024), dvae-scenes (512) or dvae-tiny. Default: by store size."),
    ] = None
    config_file: Annotated[
        Path | None, typer.Option("--config", help="YAML file of `key: value` that changes the preset.")
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key. May be repeated.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Number of optimiser steps, the same as --set steps=N.")] = None
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of weights, batches and noise.")] = 1
    device: Device = "auto"
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16 (autocast).")] = "auto"
    train_split: Annotated[str, typer.Option(help="Split to train on. All others are evaluated.")] = "train"
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Optimiser steps between two checkpoints.")] = 200
    write_codes: Annotated[
        bool, typer.Option("--codes/--no-codes", help="Write the codes into the store at the end.")
    ] = True


@with_option_groups
def train_dvae(
    *,
    store: Annotated[Path, typer.Option(help="Feature store with pixels (image/pixels).")],
    output: Annotated[Path, typer.Option(help="Directory of the run. If it holds a run, that run resumes.")],
    training: TrainingOptions,
) -> int:
    """Train the discrete VAE (stage 1 of the image decoder) on a store's images and write its codes into the store.

    Exit codes: 0 finished, 2 bad input, 75 stopped by a signal and saved, 130 stopped by Ctrl-C and saved, others
    failed.
    """
    # This must be set before torch is loaded. On shared cores, threads that spin while waiting would multiply the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Importing PyTorch takes seconds, which --help should not need.
    from opt_ds.dvae.training import train_dvae as run
    from opt_ds.training.signals import REQUEUE_EXIT_CODE

    try:
        run(store, output, **vars(training) | {"settings": tuple(training.settings or ())})
    except TrainingStoppedError as stop:
        if stop.reason == "SIGINT":
            raise KeyboardInterrupt from None
        _LOG.info(f"{stop}; run the same command again to resume")
        return REQUEUE_EXIT_CODE
    return 0


def main() -> None:
    """Run the command as a standalone program, as `python opt_ds/train_dvae.py` does, and exit with its code."""
    sys.exit(run_program(train_dvae, sys.argv[1:], "train_dvae.py"))
