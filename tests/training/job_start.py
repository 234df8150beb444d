"""One rank of test_start.py: launches a run, or `opt-ds finetune`, on a read-only store; notes which files it hashed."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from opt_ds.cli.finetune import finetune
from opt_ds.cli.program import run_program
from opt_ds.config import config_from_dict
from opt_ds.evaluation.callbacks import EvaluationCallbacks
from opt_ds.training.distributed import find_ranks
from opt_ds.training.launch import run_training
from opt_ds.training.signals import StopRequest

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    store, output = Path(job["store"]), Path(job["output"])
    may, digest = os.access, hashlib.file_digest
    hashed: list[str] = []

    def access(path: Any, mode: int) -> bool:
        return may(path, mode) and not (mode & os.W_OK and Path(path) == store)

    def file_digest(file: Any, name: Any) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, name)

    os.access = access  # type: ignore[assignment]  # root may write anywhere: the permissions of the folder do not tell
    hashlib.file_digest = file_digest  # type: ignore[assignment]
    ranks = find_ranks()
    if "finetune" in job:
        code = run_program(finetune, job["finetune"], "finetune", ranks.rank)
    else:
        with StopRequest("SIGUSR1") as stop:
            config = config_from_dict(job["config"], where="job")
            code = run_training(config, output, ranks, stop, callbacks=EvaluationCallbacks())
    Path(f"{sys.argv[1]}.{ranks.rank}").write_text(json.dumps(hashed))
    sys.exit(code)
