"""Test slurm/pretrain.sh on a real local Slurm: to the end, and resumed after everything that stops a job on a cluster.

However often it was stopped, the run ends with the weights of an uninterrupted run, bit for bit.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.jobs import PretrainJob
from tests.slurm.local_cluster import LocalCluster

pytestmark = pytest.mark.timeout(900)
SHORT, LONG = 60, 300


@dataclass(frozen=True)
class Undisturbed:
    """Return the long run, without interruption."""

    hashes: dict[str, str]
    start_up_s: float  # from the job's start to its first step
    training_s: float  # from there to its end


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    job = PretrainJob(cluster, store, tmp_path_factory.mktemp("straight") / "run", LONG)
    job.wait_for_step(1)
    first_step = time.time()
    found = job.finish()
    return Undisturbed(found, first_step - job.started_at, time.time() - first_step)


@pytest.fixture(scope="module")
def straight(undisturbed: Undisturbed) -> dict[str, str]:
    """Hashes of the long run's last weights and moments."""
    return undisturbed.hashes


def test_a_signal_in_mid_run_changes_nothing(cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
    """Two nodes to the end, with the environment report; and the same interrupted by a signal."""
    cluster.environment["OPT_DS_DOCTOR"] = "1"
    whole = PretrainJob(cluster, store, tmp_path / "whole", SHORT)
    expected = whole.finish()
    text = whole.text()
    assert "start number 1" in text
    assert "FAIL" not in text
    assert text.count("torch") >= 2, "each node reports its environment"
    assert "2 ranks" in text
    assert "(srun)" in text
    assert "time limit: 30 minutes" in text or "time limit: 29 minutes" in text

    cluster.environment["OPT_DS_DOCTOR"] = "0"
    cut = PretrainJob(cluster, store, tmp_path / "cut", SHORT)
    cut.wait_for_step(3)
    cluster.run("scancel", "--signal=TERM", cut.number)
    assert cut.finish() == expected
    assert cut.restarts == 1
    assert "requeue: saved and stopped" in cut.text()
    assert "start number 2" in cut.text(), "the log is appended to"
    assert "resuming from" in cut.text()


@pytest.mark.faults
class TestCampaign:
    def test_requeue(self, cluster: LocalCluster, store: Path, tmp_path: Path, straight: dict[str, str]) -> None:
        job = PretrainJob(cluster, store, tmp_path / "run", LONG)
        job.wait_for_step(60)
        cluster.run("scontrol", "requeue", job.number)
        assert job.finish() == straight
        assert job.restarts == 1

    def test_several_signals(self, cluster: LocalCluster, store: Path, tmp_path: Path, straight: dict[str, str]) -> None:
        job = PretrainJob(cluster, store, tmp_path / "run", LONG)
        for step in (5, 80, 160):
            job.wait_for_step(step)
            cluster.run("scancel", "--signal=TERM", job.number)
        assert job.finish() == straight
        assert job.restarts == 3

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_node_dies(
        self, which: int, cluster: LocalCluster, store: Path, tmp_path: Path, straight: dict[str, str]
    ) -> None:
        """The node that runs the batch script, and the other one."""
        job = PretrainJob(cluster, store, tmp_path / "run", LONG)
        job.wait_for_step(60)
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
        cluster.kill_node(nodes[which])
        try:
            assert job.finish() == straight
        finally:
            cluster.start_node(nodes[which])
        assert job.restarts >= 1
        cluster.wait(lambda: len(cluster.idle_nodes()) == 3, 90, "the node did not come back")

    def test_the_time_limit(
        self, cluster: LocalCluster, store: Path, tmp_path: Path, undisturbed: Undisturbed
    ) -> None:
        """Four minutes, most of them kept free for saving: the first launch trains for half of the steps or fewer."""
        used = undisturbed.start_up_s + undisturbed.training_s / 2
        assert used < 170, "Slurm may send TERM 61 seconds before the end: this machine is too slow for the limit of the test"
        options = ("--time=4", "--signal=TERM@1")
        job = PretrainJob(
            cluster, store, tmp_path / "run", LONG, *options, settings=(f"train.time_reserve_s={240 - used:.0f}",)
        )
        job.wait(lambda: job.restarts >= 1, 300)
        # From now on there is time: on a busy machine four minutes might allow a single step a launch.
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        assert job.finish() == undisturbed.hashes
        assert "time limit: saved after step" in job.text()

    def test_scancel_ends_it(self, cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
        job = PretrainJob(cluster, store, tmp_path / "run", 100_000, settings=("schedule.total_steps=200000",))
        job.wait_for_step(5)
        cluster.run("scancel", job.number)
        job.wait(lambda: job.state == "CANCELLED")
        assert job.restarts == 0
        assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE.json")), "it saved before it went"
