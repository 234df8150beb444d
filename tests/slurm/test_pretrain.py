"""slurm/pretrain.sh on a real local Slurm: to the end, and back again after each thing that cuts a job on a cluster.

However often it was cut, the run ends with the weights of the run never cut, bit for bit.
"""

from pathlib import Path

import pytest

from tests.slurm.jobs import PretrainJob
from tests.slurm.local_cluster import LocalCluster

pytestmark = pytest.mark.timeout(900)
SHORT, LONG = 60, 300


@pytest.fixture(scope="module")
def straight(cluster: LocalCluster, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The long run, undisturbed."""
    return PretrainJob(cluster, store, tmp_path_factory.mktemp("straight") / "run", LONG).finish()


def test_a_signal_in_mid_run_changes_nothing(cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
    """Two nodes to the end, with the environment report; and the same cut by a signal."""
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

    def test_the_time_limit(self, cluster: LocalCluster, store: Path, tmp_path: Path, straight: dict[str, str]) -> None:
        """Two minutes, of which the last 100 seconds are kept free: the first launch trains for some seconds only."""
        options = ("--time=2", "--signal=TERM@1")
        job = PretrainJob(cluster, store, tmp_path / "run", LONG, *options, settings=("train.time_reserve_s=100",))
        job.wait(lambda: job.restarts >= 1)
        # From now on there is time: on a busy machine two minutes might allow a single step a launch.
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        assert job.finish() == straight
        assert "time limit: saved after step" in job.text()

    def test_scancel_ends_it(self, cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
        job = PretrainJob(cluster, store, tmp_path / "run", 100_000, settings=("schedule.total_steps=200000",))
        job.wait_for_step(5)
        cluster.run("scancel", job.number)
        job.wait(lambda: job.state == "CANCELLED")
        assert job.restarts == 0
        assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE.json")), "it saved before it went"
