"""Ranks from the environment of each launcher."""

import os
from collections.abc import Callable

import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.training.distributed import Ranks, _own_device, find_ranks, tasks_per_node

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
          "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_GPUS_ON_NODE")  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in _NAMES:
        # Set, then deleted: so that what find_ranks writes is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_on_its_own_completes_the_environment(environment: pytest.MonkeyPatch) -> None:
    ranks = find_ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "1"
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("extra", "launcher"),
    [({"LOCAL_SIZE": "4"}, "deepspeed"), ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, "torchrun")],
)
def test_deepspeed_and_torchrun(environment: pytest.MonkeyPatch, extra: dict[str, str], launcher: str) -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in (given | extra).items():
        environment.setenv(name, value)
    ranks = find_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)
    assert (ranks.launcher, ranks.is_main) == (launcher, False)


def test_srun(environment: pytest.MonkeyPatch) -> None:
    given = {
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2", "MASTER_ADDR": "node0",
    }  # fmt: skip
    for name, value in given.items():
        environment.setenv(name, value)
    ranks = find_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 6, 1, 2)
    assert os.environ["RANK"] == "5" and os.environ["MASTER_ADDR"] == "node0"
    port = os.environ["MASTER_PORT"]
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment.delenv(name)
    environment.setenv("SLURM_PROCID", "0")
    find_ranks()
    assert os.environ["MASTER_PORT"] == port, "ranks that do not talk agree on the port"


def test_half_an_environment_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        find_ranks()


def test_slurms_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),2") == [4, 4, 2]
    assert tasks_per_node("1") == [1]
    with pytest.raises(UserError):
        tasks_per_node("many")


@pytest.fixture
def gpus(environment: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process see this many GPUs."""
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "set_device", lambda index: None)
    return lambda count: environment.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("told", ["4", None])
def test_a_gpu_that_slurm_bound_to_a_task_is_its_first(
    told: str | None, gpus: Callable[[int], None], environment: pytest.MonkeyPatch
) -> None:
    gpus(1)
    environment.setenv("LOCAL_RANK", "2")
    if told:
        environment.setenv("SLURM_GPUS_ON_NODE", told)
    assert _own_device(Ranks(2, 4, 2, 4, "srun")) == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed takes the device from it"


def test_more_ranks_than_gpus_are_refused_in_the_launchers_words(
    gpus: Callable[[int], None], environment: pytest.MonkeyPatch
) -> None:
    gpus(1)
    with pytest.raises(UserError, match="4 ranks on this node but 1 GPU: start with --num_gpus 1"):
        _own_device(Ranks(1, 4, 1, 4, "deepspeed"))
    environment.setenv("SLURM_GPUS_ON_NODE", "1")
    with pytest.raises(UserError, match=r"--ntasks-per-node.*--gpu-bind=none"):
        _own_device(Ranks(1, 4, 1, 4, "srun"))
