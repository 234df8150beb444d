"""Pre-training jobs for the Slurm tests: submitted as a user does, watched until something is to happen."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.local_cluster import LocalCluster
from tests.training.runs import FITTED, hashes

ROOT = Path(__file__).parents[2]
_SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


class PretrainJob:
    """`sbatch slurm/pretrain.sh` of a tiny model on two nodes, one rank each."""

    def __init__(
        self, cluster: LocalCluster, store: Path, output: Path, steps: int, *options: str, settings: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.output, self.steps = cluster, output, steps
        self.log = output.with_suffix(".log")
        changes = [*FITTED, "checkpoint.every_steps=50", "schedule.total_steps=1000", f"train.max_steps={steps}", *settings]
        arguments = [word for change in changes for word in ("--set", change)]
        cluster.environment |= {"OPT_DS_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.number = cluster.run(
            "sbatch", "--parsable", *_SMALL, "--time=30", f"--output={self.log}", *options, ROOT / "slurm" / "pretrain.sh",
            "--config", "opt-tiny", "--store", store, "--output", output, *arguments, cwd=output.parent,
        ).strip()  # fmt: skip

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def started_at(self) -> float:
        """Seconds since 1970 of the latest start."""
        return time.mktime(time.strptime(self.cluster.job(self.number)["StartTime"], "%Y-%m-%dT%H:%M:%S"))

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def wait(self, condition: Callable[[], object], seconds: float = 240) -> None:
        """Wait for it. The error contains the job's log."""
        try:
            self.cluster.wait(condition, seconds, f"job {self.number} is {self.state}")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def wait_for_step(self, step: int) -> None:
        """Wait until this many steps are logged."""
        metrics = self.output / "metrics.jsonl"
        self.wait(lambda: metrics.is_file() and metrics.read_text().count('"kind": "train"') >= step)

    def finish(self) -> dict[str, str]:
        """Wait for the job's end, and return the hashes of its last weights and moments."""
        self.wait(lambda: self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"))
        time.sleep(0.5)  # the log's last lines
        assert self.state == "COMPLETED", self.text()
        return hashes(self.output, self.steps)

    def text(self) -> str:
        """The job's log so far."""
        return self.log.read_text() if self.log.is_file() else "(no log)"
