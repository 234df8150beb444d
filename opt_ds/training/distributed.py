"""Ranks: how each launcher identifies them, how they join, and the small collectives on the host.

Nothing here imports torch at module level. `find_ranks` runs before heavy imports, so that mistakes are reported at
once.
"""

import os
import re
import socket
import subprocess
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from opt_ds.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

#: Environment variables through which `deepspeed` and `torchrun` identify a rank.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_REPORT_S = 10.0  # interval at which rank 0 reports to ranks that wait for its work


@dataclass(frozen=True)
class Ranks:
    """This process's rank among all processes of the run and among those of its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that logs and writes files."""
        return self.rank == 0


def find_ranks() -> Ranks:
    """Return this process's ranks from the environment of `deepspeed`, `torchrun` or `srun`.

    Without a launcher there is a single rank.

    The environment variables that torch and DeepSpeed read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are
    completed. Raise UserError if the launcher's variables are incomplete.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in env]
        if missing:
            raise UserError(
                f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}: start with deepspeed, torchrun "
                "or srun, or unset them"
            )
        rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
        local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)
        return Ranks(rank, world_size, local_rank, local, "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed")
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        ranks = _slurm_ranks(env)
    else:
        ranks = Ranks()
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    env.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
    )
    return ranks


def _slurm_ranks(env: Any) -> Ranks:
    """Return the ranks of a process that `srun` started.

    All processes of the step derive the same address without communication.
    """
    world_size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    per_node = tasks_per_node(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world_size)
    )
    node = min(int(env.get("SLURM_NODEID", 0)), len(per_node) - 1)
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        env["MASTER_ADDR"] = _first_host(nodes) if world_size > 1 else "127.0.0.1"
    if "MASTER_PORT" not in env:
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env["SLURM_STEP_ID"])
        env["MASTER_PORT"] = str(15000 + (job * 31 + step) % 20000)
    return Ranks(int(env["SLURM_PROCID"]), world_size, int(env.get("SLURM_LOCALID", 0)), per_node[node], "srun")


def tasks_per_node(text: str) -> list[int]:
    """Return Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f'SLURM_TASKS_PER_NODE is "{text}": expected something like 4(x2),2')
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(nodes: str) -> str:
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f'cannot expand Slurm\'s node list "{nodes}" with scontrol: set MASTER_ADDR to the first node yourself'
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ProcessGroup:
    """The joined ranks: this rank's device, and a gloo group on the host for small collectives."""

    def __init__(self, ranks: Ranks, timeout_s: float = 1800.0) -> None:
        """Join the other ranks.

        A collective that takes longer than `timeout_s` seconds fails, because another rank is then presumed lost.
        """
        import torch

        from opt_ds.training import deepspeed_internals

        self.ranks = ranks
        self.device = _own_device(ranks)
        deepspeed_internals.name_accelerator(self.device.type)
        # DeepSpeed 0.19 calls collectives by names that newer versions of torch deprecate. The warning would appear at
        # every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

        import deepspeed

        _set_threads(ranks)
        deepspeed_internals.load_without_compiling()
        self._timeout = timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
            )
        except torch.distributed.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"port {os.environ.get('MASTER_PORT')} is taken, perhaps by another run on this machine: choose one with "
                    "the launcher's --master_port"
                ) from None
            raise RunError(
                f"rank {ranks.rank} could not join the other ranks at {address} ({str(error).splitlines()[0][:200]}): check "
                "their logs, or the network between the nodes"
            ) from None
        self._control: Any = None  # torch's default group
        if backend == "nccl":
            self._control = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def bound_all_collectives(self) -> None:
        """Set this group's timeout on all groups that other code has created since.

        DeepSpeed's default is half an hour.
        """
        from torch.distributed import distributed_c10d

        # The torch version used on a V100 has this function under its private name only.
        set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
        for group in distributed_c10d._world.pg_map:
            set_timeout(self._timeout, group)

    def limit(self, timeout_s: float) -> None:
        """Set the timeout of collectives, in seconds."""
        if self._timeout.total_seconds() != timeout_s:
            self._timeout = timedelta(seconds=timeout_s)
            self.bound_all_collectives()

    def max(self, value: int) -> int:
        """Return the maximum of the ranks' values."""
        if self.ranks.world_size == 1:
            return value
        import torch

        largest = torch.tensor(value)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._control)
        return int(largest)

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of a tensor over the ranks, on the host. A tensor on the host is summed in place."""
        import torch

        values = values.detach().cpu()
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values, group=self._control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value (a small picklable object) in rank order."""
        import torch

        values = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(values, value, group=self._control)
        return values

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value (a small picklable object)."""
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def main_does(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 only and return its result on every rank.

        A UserError that it raises is raised on every rank.

        `work` may take longer than the timeout of a collective, because rank 0 runs it in a thread and reports to the
        others meanwhile.
        """
        if self.ranks.world_size == 1:
            return work()
        running = _Running(work) if self.ranks.is_main else None
        period_s = min(_REPORT_S, self._timeout.total_seconds() / 4)
        while True:
            done, value, mistake, fault = self.from_main(running.report(period_s) if running else None)
            if mistake is not None:
                raise UserError(mistake)
            if fault is not None:
                if running and running.error is not None:
                    raise running.error
                raise RunError(f"rank {self.ranks.rank}: rank 0 failed, whose log has the reason ({fault})")
            if done:
                return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch

        torch.distributed.barrier(group=self._control)

    def close(self) -> None:
        """Destroy the process group, which avoids torch's warning at exit."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class SingleProcess:
    """The only rank of a run without a process group, with those methods of `ProcessGroup` that such a run needs."""

    ranks = Ranks()

    def max(self, value: int) -> int:
        """Return the value."""
        return value

    def from_main(self, value: Any) -> Any:
        """Return the value."""
        return value


class _Running:
    """A function that runs in a thread of rank 0."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="main_does", daemon=True)
        self._thread.start()

    def report(self, wait_s: float) -> tuple[bool, Any, str | None, str | None]:
        """Wait for at most `wait_s` seconds.

        Return whether the function has ended, its value, and the UserError's text or the name of the exception that
        ended it.
        """
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return False, None, None, None
        mistake = str(self.error) if isinstance(self.error, UserError) else None
        fault = type(self.error).__name__ if self.error is not None and mistake is None else None
        return True, self.value, mistake, fault

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.value = work()
        except BaseException as error:  # raised again by the thread that waits
            self.error = error


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank ended or did not answer in time."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error) or "NCCL" in str(error)


def _own_device(ranks: Ranks) -> "torch.device":
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), ranks.local_rank
    if ranks.launcher == "srun" and count == 1 and _slurm_gpus(ranks.local_world_size) >= ranks.local_world_size:
        index = 0  # Slurm bound one GPU to each task, which sees no other (--gpus-per-task, --gpu-bind).
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed uses this as the device index
    if index >= count:
        remedy = (
            f"start {count} tasks per node (--ntasks-per-node), or show every task all GPUs (--gpu-bind=none)"
            if ranks.launcher == "srun"
            else f"start with --num_gpus {count}"
        )
        raise UserError(f"{ranks.local_world_size} ranks on this node but {count} GPU{'s' * (count != 1)}: {remedy}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _slurm_gpus(unknown: int) -> int:
    """Return the number of GPUs that Slurm assigned to the job on this node, or `unknown` if it does not report one."""
    told = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(told) if told.isdigit() else unknown


def _set_threads(ranks: Ranks) -> None:
    """Give each rank of the node an equal number of cores, unless OMP_NUM_THREADS is set."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
