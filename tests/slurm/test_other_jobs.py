"""slurm/prepare.sh, slurm/evaluate.sh and slurm/ablate.sh on a real local Slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ds.ingest import prepare
from tests.ingest.test_pipeline import contents
from tests.slurm.jobs import ROOT, PretrainJob
from tests.slurm.local_cluster import LocalCluster
from tests.training.runs import FITTED

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_an_array_of_shares_makes_the_store_that_one_process_makes(cluster: LocalCluster, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    lines = [{"id": f"s{number}", "text": f"word{number % 97} and word{number % 13}"} for number in range(2100)]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    cluster.environment |= {"OPT_DS_PYTHON": sys.executable, "PARTITIONS": "2"}
    script, store = ROOT / "slurm" / "prepare.sh", tmp_path / "apart" / "store"
    store.parent.mkdir()
    command = [str(script), "--manifest", str(manifest), "--output", str(store), "--vocab-size", "200", "--workers", "1"]
    submitted = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert submitted.returncode == 0, submitted.stderr
    merge = submitted.stdout.split()[-1]
    cluster.wait(lambda: cluster.job(merge)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 300, submitted.stdout)
    logs = "\n".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert cluster.job(merge)["JobState"] == "COMPLETED", logs
    from opt_ds.ingest import PrepareSettings

    prepare(manifest, tmp_path / "whole", PrepareSettings(vocab_size=200), workers=1, device="cpu")
    assert contents(store) == contents(tmp_path / "whole")
    assert len(list(store.glob("shard-*.h5"))) == 3
    missing = subprocess.run([str(script), "--manifest", "x"], env=cluster.environment, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "--output missing" in missing.stderr


def test_evaluation_of_a_run(cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
    run = PretrainJob(cluster, store, tmp_path / "run", 10)
    run.finish()
    job = cluster.run(
        "sbatch", "--parsable", f"--output={tmp_path}/evaluate.log", ROOT / "slurm" / "evaluate.sh", "retrieval",
        "--checkpoint", run.output, "--store", store, "--split", "valid", "--output", tmp_path / "retrieval.json", cwd=tmp_path,
    ).strip()  # fmt: skip
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 180, "evaluation")
    assert cluster.job(job)["JobState"] == "COMPLETED", (tmp_path / "evaluate.log").read_text()
    assert json.loads((tmp_path / "retrieval.json").read_text())


def test_an_array_of_ablation_rows_leaves_one_table(cluster: LocalCluster, store: Path, tmp_path: Path) -> None:
    cluster.environment |= {
        "OPT_DS_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "SBATCH_OPTIONS": "--ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1",
    }  # fmt: skip
    output, settings = tmp_path / "ablation", [*FITTED, "train.max_steps=3"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [
        str(ROOT / "slurm" / "ablate.sh"), "--config", "opt-tiny", "--store", str(store), "--output", str(output),
        "--split", "valid", "--min-positives", "5", "--row", "no-token-level", "--row", "no-sample-level", *options,
    ]  # fmt: skip
    submitted = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=120)
    assert submitted.returncode == 0, submitted.stderr
    assert "2 rows: no-sample-level no-token-level" in submitted.stdout
    job = submitted.stdout.split("job ")[1].split(",")[0]
    left = ("squeue", "--noheader", "--array", f"--jobs={job}")
    cluster.wait(lambda: not cluster.run(*left).strip(), 400, "the array does not end")
    logs = "\n".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert (output / "ablation.json").is_file(), logs
    rows = {row["row"]: row["losses"] for row in json.loads((output / "ablation.json").read_text())["rows"]}
    assert list(rows) == ["no-sample-level", "no-token-level"], logs
    assert "matching" not in rows["no-sample-level"] and "mlm" not in rows["no-token-level"]
    assert (output / "ablation.png").is_file()
