"""What tests/warm.py's server imports before it forks: with it, a rank or a worker of `prepare` starts in tenths of a second."""

import gc

import deepspeed  # noqa: F401
import torch._dynamo  # imported by the first optimizer
import torch.utils.tensorboard  # noqa: F401 - imported by a run's log

import opt_ds.ingest.workers
import opt_ds.training.trainer  # noqa: F401

gc.collect()
gc.freeze()  # no process copies the pages of these objects to look for garbage
