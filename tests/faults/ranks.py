"""Two ranks of a tiny run as separate processes, without a launcher that would clean up after them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.training.runs import FITTED, free_port, rank_environment
from tests.warm import WarmProcess

ROOT = Path(__file__).parents[2]
SCRIPTS = {"fp32": ROOT / "opt_ds" / "pretrain.py", "fp16": ROOT / "tests" / "faults" / "fp16_on_cpu.py",
           "skipped gather": ROOT / "tests" / "faults" / "skipped_gather.py"}  # fmt: skip
PATIENCE_S = 600  # a busy machine is not a fault


class Ranks:
    """The processes of one start; their output goes to `log`, which grows from start to start."""

    def __init__(self, store: Path, output: Path, settings: tuple[str, ...], precision: str = "fp32", num: int = 2) -> None:
        self.output = output
        options = [part for setting in (*FITTED, *settings) for part in ("--set", setting)]
        given = ["--config", "opt-tiny", "--store", str(store), "--output", str(output), *options]
        output.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.logs = [output.parent / f"{output.name}.rank{rank}.log" for rank in range(num)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            command, environment = [str(SCRIPTS[precision]), *given], rank_environment(rank, num, port)
            self.processes.append(WarmProcess(command, environment, cwd=ROOT, stdout=log, stderr=log))

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for the condition; False if the run ended before."""
        began = time.monotonic()
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                return False
            assert time.monotonic() - began < PATIENCE_S, self.said(0)
            time.sleep(0.0005)
        return True

    def wait(self) -> list[int]:
        """The exit codes."""
        return [process.wait(timeout=PATIENCE_S) for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def ranks(
    store: Path, output: Path, settings: tuple[str, ...], precision: str = "fp32", num: int = 2
) -> Iterator[Ranks]:
    """Start them; whatever is left at the end is killed."""
    started = Ranks(store, output, settings, precision, num)
    try:
        yield started
    finally:
        started.end()
