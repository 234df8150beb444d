"""A real `opt-ds serve` process, and clients that use it as they should."""

import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil


class ServeProcess:
    """The running command."""

    def __init__(self, process: "subprocess.Popen[str]", address: str, log: Path) -> None:
        self.process, self.address, self._log = process, address, log
        self.port = int(address.rsplit(":", 1)[1])

    def memory_mib(self) -> float:
        """Resident memory of the process and its children."""
        root = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (root, *root.children(recursive=True))) / 2**20

    def settled_mib(self, most_s: float = 30.0) -> float:
        """The memory once its connections are closed: the least of what is seen within the time."""
        end, least = time.monotonic() + most_s, self.memory_mib()
        while time.monotonic() < end:
            time.sleep(1)
            least = min(least, self.memory_mib())
        return least

    def log(self) -> str:
        """What the server wrote to its standard error."""
        return self._log.read_text(errors="replace")

    def lives(self) -> bool:
        return self.process.poll() is None


@contextmanager
def serve_process(checkpoint: Path, *options: str) -> Iterator[ServeProcess]:
    """`opt-ds serve` on a free port, until the block ends."""
    command = [sys.executable, "-m", "opt_ds", "serve", "--checkpoint", str(checkpoint), "--port", "0", *options]
    log = Path(tempfile.mkdtemp(prefix="opt-ds-serve-")) / "stderr"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            match = re.search(r"http://\S+", line)
            assert match, f"the server did not start: {log.read_text()}"
            yield ServeProcess(process, match[0], log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            shutil.rmtree(log.parent)


class GoodClients:
    """Clients that send one request after another, and after a 503 wait for `Retry-After` seconds and send it again.

    That is what a 503 is for, so it is no failure. Any other status than 200, a closed connection or a wait of more than
    `patience_s` is one.
    """

    def __init__(self, address: str, files: dict[str, bytes], count: int = 2, patience_s: float = 120.0) -> None:
        self._address, self._files, self._patience_s = address, files, patience_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        self.served, self.retries, self.slowest_s = 0, 0, 0.0
        self.failures: Counter[str] = Counter()

    def __enter__(self) -> "GoodClients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=self._patience_s)

    def _work(self) -> None:
        with httpx.Client(base_url=self._address, timeout=self._patience_s) as client:
            while not self._stop.is_set():
                start = time.monotonic()
                try:
                    status = self._send(client)
                except httpx.HTTPError as error:
                    status = repr(error)
                self.slowest_s = max(self.slowest_s, time.monotonic() - start)
                if status == "200":
                    self.served += 1
                else:
                    self.failures[status] += 1

    def _send(self, client: httpx.Client) -> str:
        end = time.monotonic() + self._patience_s
        while True:
            reply = client.post("/api/describe", data={"text": "a red square"}, files=self._files)
            if reply.status_code != 503 or time.monotonic() > end:
                return str(reply.status_code)
            self.retries += 1
            time.sleep(float(reply.headers["retry-after"]))
