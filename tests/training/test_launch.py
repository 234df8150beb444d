"""Test errors that end a running run: each is one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.errors import RunError
from opt_ds.training import distributed, trainer
from opt_ds.training.callbacks import Callbacks
from opt_ds.training.distributed import Ranks
from opt_ds.training.launch import run_training
from opt_ds.training.signals import StopRequest
from tests.training.runs import tiny_config


def test_a_gpu_without_memory_is_one_line_that_says_what_to_lower(
    store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(distributed, "ProcessGroup", lambda *_: group)
    monkeypatch.setattr(trainer, "Trainer", full)
    config = tiny_config(store)
    with StopRequest(config.train.preemption_signal) as stop, pytest.raises(RunError) as error:
        run_training(config, tmp_path / "run", Ranks(), stop, callbacks=Callbacks())
    assert str(error.value).startswith("rank 0: out of GPU memory: lower batch.max_tokens")
